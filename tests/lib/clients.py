"""Clients of functions and of the control API, on bare sockets.

A target is the address of a function, whose port is 80, a pair of host and port, or the Path of a Unix socket.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
from pathlib import Path

PATIENCE = int(os.environ.get("FAASD_TEST_PATIENCE", "1"))
READY_SECONDS = 30 * PATIENCE           # for anything that must happen at all; no test is about how fast
RESET = struct.pack("ii", 1, 0)         # struct linger: on, 0 s
Target = str | tuple[str, int] | Path


def connect(target: Target, data: bytes = b"", source: str = "") -> socket.socket:
    """Connect, from an address of ours if one is given, and send data."""
    if isinstance(target, Path):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(READY_SECONDS)
        client.connect(str(target))
    else:
        place = (target, 80) if isinstance(target, str) else target
        client = socket.create_connection(place, READY_SECONDS, (source, 0) if source else None)
    if data:                            # else one who was closed at once would be an error already
        client.sendall(data)
    return client


def request(target: Target, path: str = "/", body: bytes = b"") -> socket.socket:
    """Send a request and return the connection."""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: f\r\n"
    return connect(target, (head + (f"Content-Length: {len(body)}\r\n" if body else "") + "\r\n").encode() + body)


def read_all(client: socket.socket) -> bytes:
    """Return all that comes until the end of file, and close."""
    with client, client.makefile("rb") as stream:
        return stream.read()


def read_until_cut(client: socket.socket) -> bytes:
    """Return all that comes until the end of file, or until a reset."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65536):
            received += data
    return received


def exchange(target: Target, data: str | bytes) -> bytes:
    """Send data, half-close, return all that comes."""
    client = connect(target, data.encode() if isinstance(data, str) else data)
    client.shutdown(socket.SHUT_WR)
    return read_all(client)


def reset(client: socket.socket) -> None:
    """Leave as a program does that crashes with unread data: RST in the place of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()


def get(address: str, path: str = "/", port: int = 80) -> tuple[int, str]:
    """Return status and body of a GET; fail if there is no whole answer."""
    try:
        with request((address, port), path) as client:
            client.settimeout(2 * READY_SECONDS)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise AssertionError(f"GET {path} of {address}:{port}: {error!r}") from error
