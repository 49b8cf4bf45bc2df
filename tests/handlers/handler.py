"""The handler of the integration tests: does what the request's path says, well or badly.

/misbehave in the rootfs, which a test writes from outside after the deploy, makes it fail before it is ready.
"""

import os
import signal
import socket
import sys
import time


def misbehave_at_start():
    try:
        with open("/misbehave") as file:
            how = file.read().strip()
    except FileNotFoundError:
        return ""
    if how == "exit":
        print("I refuse to start", file=sys.stderr)
        sys.exit(3)
    if how == "never-connect":
        time.sleep(3600)
    return how


def respond(client, text, extra=""):
    body = text.encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    client.sendall(head.encode() + body)


def facts():
    """What a container can see of itself."""
    status = dict(line.split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
    return {
        "env": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(), "pid": os.getpid(),
        "ids": [os.getuid(), os.getgid(), os.getgroups()], "hostname": os.uname().nodename,
        "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.lexists(f"/proc/self/fd/{fd}")},
        "status": {key: status[key].strip() for key in ("CapEff", "CapBnd", "CapPrm", "NoNewPrivs", "Seccomp")},
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "processes": sorted(name for name in os.listdir("/proc") if name.isdigit()),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")},
        "mounts": [line.split()[1:4] for line in open("/proc/mounts")],
    }


def attempt(action):
    try:
        action()
    except OSError as error:
        return error.strerror
    return "done"


def second_connect():
    socket.socket(socket.AF_UNIX).connect("/control.sock")


def stream(client, size):
    client.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
    block = bytes(1 << 20)
    while size > 0:
        size -= client.send(block[:size])


def fill(client):
    """Leave as much to the kernel as it takes, for the client to fetch."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    client.setblocking(False)
    try:
        while True:
            client.send(bytes(1 << 16))
    except BlockingIOError:
        return


def echo(client):
    """Two-way traffic for as long as the client wants it, as a WebSocket would."""
    client.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    while data := client.recv(65536):
        client.sendall(data)


def hold_lock(client, control):
    """Keep the lock of the client's socket, in a send(2) that sleeps in page faults while others take all the CPU."""
    import mmap
    import threading
    file = os.open("/cold", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    cold = mmap.mmap(file, 0, prot=mmap.PROT_READ)
    cold.madvise(mmap.MADV_RANDOM)

    def send():
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            pass                                    # the attack is slower then
        while True:
            client.send(cold)
    gate, opened = os.pipe()
    for _ in range(30):
        if os.fork() == 0:
            os.close(opened)
            os.read(gate, 1)
            while True:
                pass
    threading.Thread(target=send).start()
    os.close(opened)
    time.sleep(0.2)
    control.sendall(b"R")
    time.sleep(3600)


def serve(client, control, path):
    command, _, argument = path.partition("?")
    if ":" in argument:                             # only when the test says so: Daemon.release
        key, _, argument = argument.partition(":")
        while not os.path.exists(f"/{key}"):
            time.sleep(0.01)
    if command == "/facts":
        import json                                 # here: most containers have no use for it
        respond(client, json.dumps(facts()))
    elif command == "/id":
        respond(client, os.environ["FAAS_CONTAINER_ID"])
    elif command == "/label":
        time.sleep(float(argument or 0))
        respond(client, os.environ["LABEL"])
    elif command == "/label-after":                 # a test has made this file in the rootfs
        while not os.path.exists(argument):
            time.sleep(0.05)
        respond(client, os.environ["LABEL"])
    elif command == "/exit":                        # without a byte
        print("about to exit", file=sys.stderr, flush=True)
        os._exit(int(argument))
    elif command == "/answer-and-exit":
        respond(client, "good-bye")
        os._exit(int(argument))
    elif command == "/hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(3600)
    elif command == "/half-and-die":
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
        os._exit(1)
    elif command == "/half-and-hang":
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
        time.sleep(3600)
    elif command == "/fork-and-linger":             # the child keeps the client's socket and the container's pipe
        if os.fork() == 0:
            os.setsid()
            time.sleep(3600)
        respond(client, "parent")
        os._exit(0)
    elif command == "/fork-silently":               # as above, but nobody answers, and the first process stays
        if os.fork() == 0:
            time.sleep(3600)
        control.close()
        time.sleep(3600)
    elif command == "/let-go-and-stay":             # answers, lets go of the control connection, does not exit
        respond(client, "stays")
        control.close()
        time.sleep(3600)
    elif command == "/stderr":
        block = b"x" * 1023 + b"\n"
        for _ in range(int(argument) // len(block)):
            os.write(2, block)
        respond(client, "written")
    elif command == "/newlines":
        for _ in range(int(argument) // 50_000):
            os.write(1, b"\n" * 50_000)
        respond(client, "written")
    elif command == "/controls":
        os.write(1, b"evil \x1b[2J\r2026-01-01T00:00:00.000Z forged > outcome=answered\x9b\xe2\x80\xa8end\n")
        respond(client, "printed")
    elif command == "/stream":
        stream(client, int(argument))
    elif command == "/leave-much":
        fill(client)
        os._exit(0)
    elif command == "/finish-and-stay":             # ends its answer, and holds on to its client
        fill(client)
        client.shutdown(socket.SHUT_WR)
        time.sleep(3600)
    elif command == "/say-ready":                   # and nothing else
        control.sendall(b"R")
        time.sleep(3600)
    elif command == "/hold-lock":
        hold_lock(client, control)
    elif command == "/echo":
        echo(client)
    elif command == "/second-connect":
        respond(client, attempt(second_connect))
    elif command == "/write":
        respond(client, attempt(lambda: open(argument, "w").close()))
    elif command == "/read":
        respond(client, open(argument).read())
    elif command == "/junk":
        control.sendall(b"junk" * 1000)
        respond(client, "junk sent")
    elif command == "/blocking":
        respond(client, str(os.get_blocking(client.fileno())))
    elif command == "/forks":                       # until the pids limit
        count = 0
        try:
            while os.fork():
                count += 1
            time.sleep(3600)
        except OSError:
            respond(client, str(count))
    elif command == "/memory":
        respond(client, str(len(bytearray(int(argument)))))
    elif command in ("/memory-of-child", "/half-and-memory"):
        if command == "/half-and-memory":
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
        child = os.fork()
        if child == 0:
            bytearray(int(argument))
            os._exit(0)
        time.sleep(3600)
    else:
        respond(client, f"hello {path}")


def main():
    how = misbehave_at_start()
    control = socket.socket(socket.AF_UNIX)
    if how == "deaf":                               # connects, but receives nothing
        control.shutdown(socket.SHUT_RD)
        control.connect("/control.sock")
        time.sleep(3600)
    control.connect("/control.sock")
    if how == "let-go":
        control.close()
        time.sleep(3600)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as client:
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(65536)
                if not data:
                    break
                head += data
            serve(client, control, head.split(b" ")[1].decode() if b" " in head else "/")
            client.shutdown(socket.SHUT_WR)
        control.sendall(b"R")


main()
