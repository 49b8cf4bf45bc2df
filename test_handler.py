"""A faasd handler without any library: what every handler does, in full (README, "Writing a handler")."""

import os
import socket

MAX_REQUEST = 1 << 20                                       # bytes; more is not read

control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")                            # ready: from now on a client may come

while True:
    _, descriptors, _, _ = socket.recv_fds(control, 1, 1)   # one byte and the client's socket
    if not descriptors:
        break                                               # end of file: no more work
    with socket.socket(fileno=descriptors[0]) as client:
        try:
            request = b""
            while b"\r\n\r\n" not in request and len(request) < MAX_REQUEST and (data := client.recv(65536)):
                request += data
            line = request.split(b"\r\n")[0]
            body = b"Hello from FaaS handler!\n" + line + b"\n"
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
                           b"X-FaaS-Container: %s\r\nConnection: close\r\n\r\n%s"
                           % (len(body), os.environb.get(b"FAAS_CONTAINER_ID", b"-"), body))
            client.shutdown(socket.SHUT_WR)                 # the end of the answer, whoever else has the socket
        except OSError:
            pass                                            # the client left; the next one is somebody else
    control.sendall(b"\n")                                  # ready again; faasd may send another, or close
