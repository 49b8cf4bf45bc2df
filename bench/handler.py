"""One handler, three ways to run it, so that what is compared runs the same code:

  handler.py              as a function of faasd
  handler.py --fork PORT  as a forking socket server on 127.0.0.1, no container, no faasd
  handler.py --boot       only until it would be ready
"""

import os
import signal
import socket
import sys


def serve(client):
    """Answer requests until the client, or its wish, ends the connection."""
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = client.recv(65536)
            if not data:
                return
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        close = b"connection: close" in head.lower()
        body = b"Hello from %s\n" % os.environb.get(b"FAAS_CONTAINER_ID", b"-")
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
                       % (len(body), b"close" if close else b"keep-alive", body))
        if close:
            client.shutdown(socket.SHUT_WR)
            return


def serve_function():
    control = socket.socket(socket.AF_UNIX)
    control.connect("/control.sock")
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as client:
            try:
                serve(client)
            except OSError:
                pass                    # the client left; the next one is somebody else
        control.sendall(b"\n")


def serve_forking(port):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # children are not waited for
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    while True:
        client, _ = listener.accept()
        with client:
            if os.fork() == 0:
                listener.close()
                serve(client)
                os._exit(0)


if sys.argv[1:2] == ["--fork"]:
    serve_forking(int(sys.argv[2]))
elif sys.argv[1:2] != ["--boot"]:
    serve_function()
