"""The server of the integration tests: knows nothing of faasd, and does what the request's path says.

Its arguments: how it accepts, then the ports it listens on, as HOST:PORT.
"""

import os
import select
import socket
import sys
import threading
import time


class Load:
    """How many clients are served at a time."""
    lock, now, most = threading.Lock(), 0, 0

    @classmethod
    def add(cls, count):
        with cls.lock:
            cls.now += count
            cls.most = max(cls.most, cls.now)


def serve(client, peer):
    Load.add(1)
    try:
        request = client.recv(65536)
        path = request.split(b" ")[1].decode() if request.count(b" ") > 1 else ""
        names = f"{client.getpeername()[0]} {client.getsockname()[0]} {os.environ.get('PORT')}"
        body = {"/id": os.environ.get("FAAS_CONTAINER_ID", ""), "/peer": f"{peer[0]} {peer[1]}",
                "/names": names, "/load": f"{os.environ.get('FAAS_CONTAINER_ID')} {Load.most}"}.get(path, "hello")
        if path == "/exit":
            os._exit(3)
        if path == "/silent":
            return
        if path == "/never":
            time.sleep(3600)
        if path == "/half":
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            time.sleep(3600)
        if path == "/wait":
            client.sendall(b"waiting\n")
            client.recv(1)
        if path == "/echo":
            client.sendall(request.partition(b"\r\n\r\n")[2])
            while data := client.recv(65536):
                client.sendall(data)
            return
        if path == "/descriptors":
            body = " ".join(os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")[:-1])
        if path == "/self":
            body = talk_to_itself()
        if path.startswith("/relay?"):
            body = talk_within(int(path.partition("?")[2]))
        if path == "/interfaces":
            body = " ".join(name for _, name in socket.if_nameindex())
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        client.sendall((head + body).encode())
    except OSError as error:
        print("server:", error, file=sys.stderr, flush=True)
    finally:
        Load.add(-1)
        client.close()


def greet(client, peer):
    """Speak first, as in SSH or SMTP; then repeat what the client says."""
    with client:
        client.sendall(f"hello {peer[0]} {peer[1]}\n".encode())
        while data := client.recv(65536):
            client.sendall(data)


def talk_to_itself():
    with socket.create_connection(("127.0.0.1", int(sys.argv[2].rpartition(":")[2]))) as own:
        own.sendall(b"GET /peer HTTP/1.1\r\n\r\n")
        return "itself: " + own.makefile().read().splitlines()[-1]


def talk_within(count):
    """Ask a server behind this one again and again, as nginx does php-fpm for a client that stays."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        for _ in range(count):
            with socket.socket(socket.AF_UNIX) as own:
                own.connect(listener.getsockname())
                with listener.accept()[0] as accepted:
                    accepted.sendall(b"within")
                assert own.recv(7) == b"within"
    return "done"


def listen(place, reuse_port=False):
    host, _, port = place.removeprefix("only ipv6").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if place.startswith("only ipv6"):
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, int(port)))
    listener.listen(128)
    return listener


def blocking(listener, work=serve):
    while True:
        threading.Thread(target=work, args=listener.accept()).start()


def alone(listener):
    while True:
        serve(*listener.accept())


def polling(listener):
    listener.setblocking(False)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        poll.poll()
        try:
            client, peer = listener.accept()
        except BlockingIOError:
            continue
        client.setblocking(True)
        threading.Thread(target=serve, args=(client, peer)).start()


def main():
    how, *places = sys.argv[1:]
    if how == "unix":
        own = socket.socket(socket.AF_UNIX)
        own.bind("\0own")
        own.listen()
        time.sleep(3600)
    if how == "udp":
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("0.0.0.0", 5353))
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        asking.connect(("127.0.0.1", 53))       # as who asks for a name
    if how in ("nothing", "udp"):
        time.sleep(3600)
    if how == "again":                          # looks whether its port is free, as some do
        listen(places[0]).close()
    if how == "deferred":
        first = listen(places[0])
        first.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        polling(first)
    if how == "speaking":
        blocking(listen(places[0]), greet)
    if how == "dying":
        listen(places[0])
        time.sleep(1.5)                         # longer than a deploy waits for that
        sys.exit(4)
    if how == "deaf":
        listen(places[0])
        time.sleep(3600)
    listeners = [listen(place) for place in places]
    if how == "forking":
        for _ in range(3):
            if os.fork() == 0:
                break
    if how == "forking-polling":
        for _ in range(3):
            if os.fork() == 0:
                break
    if how == "exclusive":                      # a listener each, of one port
        listeners[0].close()
        for _ in range(3):
            if os.fork() == 0:
                break
        listeners = [listen(places[0], True)]
    accept = polling if how in ("polling", "forking-polling", "exclusive") else alone if how == "alone" else blocking
    for listener in listeners[1:]:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    accept(listeners[0])


main()
