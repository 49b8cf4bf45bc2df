"""The hostile handler: runs all attempts, one abuse, or something ordinary, and answers in JSON with what came of it.

The request's path is the name of a function, and its arguments after question marks.
"""

import importlib
import json
import os
import socket

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
        action = getattr(abuse, words[0], None) or getattr(importlib.import_module("ordinary"), words[0])
        result = action(client, control, *words[1:])
        if result is not None:
            respond(client, result)
    client.close()


if __name__ == "__main__":
    main()
