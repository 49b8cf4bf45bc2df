"""faasd's handler protocol by hand: README, "Writing a handler"."""

import socket

control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")                            # ready
while (descriptors := socket.recv_fds(control, 1, 1)[1]):   # a byte and the client's socket; at the end, neither
    with socket.socket(fileno=descriptors[0]) as client:
        client.recv(65536)
        body = f"Hello, {client.getpeername()[0]}, from a handler!\n".encode()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        client.shutdown(socket.SHUT_WR)
    control.sendall(b"\n")                                  # ready again
