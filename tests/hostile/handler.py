"""The hostile handler: runs the attempts, or one abuse, and answers with what came of it as JSON."""

import json
import os
import signal
import socket
import sys

import abuse
import attempts


def respond(client, result) -> None:
    body = json.dumps(result).encode()
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))


def main() -> None:
    if "AT_START" in os.environ:
        getattr(abuse, os.environ["AT_START"])(None, None)
    control = socket.socket(socket.AF_UNIX)
    control.connect("/control.sock")
    _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not descriptors:
        return
    client = socket.socket(fileno=descriptors[0])
    head = client.recv(65536)
    words = head.split(b" ")[1].decode().lstrip("/").split("?")
    if words[0] == "attempts":
        respond(client, attempts.run_all())
    else:
        result = getattr(abuse, words[0])(client, control, *words[1:])
        if result is not None:
            respond(client, result)
    client.close()


if __name__ == "__main__":
    main()
