"""The hostile server: gets its clients from accept(2), and wrongs the one who answers that call.

A request's path is the name of a function, of how many others are to be answered behind it, and its arguments, with
question marks between. What it returns is the answer, and then the container ends. The others come to the same
container, when it has said "begun".
"""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time

import abuse
from attempts import LIBC, try_it

PORT = 8080
MAP_FAILED = ctypes.c_void_p(-1).value
LIBC.mmap.restype = ctypes.c_void_p
answered = threading.Semaphore(0)           # once for each of the others


def main(arguments) -> None:
    if arguments == ["executing"]:
        execute()
        return
    if arguments:                           # started anew, with a listener that was inherited
        os.write(int(arguments[1]), b"x")
        answer(socket.socket(fileno=int(arguments[0])).accept()[0])
        return
    listener = listen()
    while True:
        client = listener.accept()[0]
        name, *words = client.recv(65536).split(b" ")[1].decode().lstrip("/").split("?")
        if not name:
            respond(client)
        elif name in QUIET:                 # without a word to its client, whose socket is what it is about
            QUIET[name](client, listener, *words)
        else:
            client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            others, *words = words
            result = globals()[name](client, listener, *words)
            for _ in range(int(others)):
                while not answered.acquire(blocking=False):
                    answer(accept_blocking(listener))
            client.sendall(json.dumps(result).encode() + b"\n")
            client.close()
            os._exit(0)


def listen(port=PORT) -> socket.socket:
    listener = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(16)
    return listener


def accept_blocking(listener) -> socket.socket:
    listener.setblocking(True)
    return listener.accept()[0]


def accept(listener, place=None, size=None) -> int:
    """Call accept(2) itself, once. Raises OSError."""
    return abuse.checked(LIBC.accept(getattr(listener, "fileno", lambda: listener)(), ctypes.c_void_p(place),
                                     ctypes.c_void_p(size)))


def answer(client) -> None:
    """Answer one of the others; what else was accepted is closed."""
    with contextlib.suppress(OSError), client:
        client.setblocking(True)
        if client.recv(65536).startswith(b"GET / "):
            respond(client)
            answered.release()


def respond(client) -> None:
    body = os.environ["FAAS_CONTAINER_ID"].encode()
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
    client.close()


def begin(client) -> None:
    client.sendall(b"begun in %s\n\n" % os.environ["FAAS_CONTAINER_ID"].encode())


def wait_readable(*listeners) -> list:
    """Return listeners that have a connection in their queues: a doorbell's."""
    return select.select(listeners, [], [])[0]


def own_connection(source="127.0.0.1", port=0) -> socket.socket:
    own = socket.create_connection(("127.0.0.1", PORT), source_address=(source, port))
    own.sendall(b"GET /own HTTP/1.1\r\n\r\n")
    return own


def run_threads(function, count: int) -> None:
    threads = [threading.Thread(target=function) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- storms --

def storm(client, listener, kind, seconds):
    """Make calls from many threads for so long; return how many were answered."""
    own = socket.socket(socket.AF_UNIX)
    own.bind("\0own")
    own.listen()
    counts = []
    what = own if kind == "own" else listener
    what.setblocking(False)
    begin(client)
    end = time.monotonic() + float(seconds)

    def call():
        count = 0
        while time.monotonic() < end:
            count += 1
            with contextlib.suppress(BlockingIOError):
                if kind == "listen":
                    listener.listen(16)
                else:
                    answer(what.accept()[0])
        counts.append(count)
    run_threads(call, 32)
    return sum(counts)


def execute() -> None:
    """As a program on standard input and output, have programs executed that are not there, from many threads."""
    input()
    counts, words = [], (ctypes.c_char_p * 2)(b"none", None)
    end = time.monotonic() + 3

    def call():
        count = 0
        while time.monotonic() < end:
            LIBC.execve(b"/none", words, None)
            count += 1
        counts.append(count)
    run_threads(call, 16)
    print(sum(counts))


def interrupted(client, listener, seconds):
    """Interrupt accept(2) with a signal every millisecond; return how often it was."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    listener.setblocking(True)
    begin(client)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    end, count = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        try:
            accepted = accept(listener)
        except InterruptedError:
            count += 1
            continue
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(socket.socket(fileno=accepted))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return count


def blocked(client, listener, threads):
    """Have many threads wait in accept(2), and end with some that do."""
    for _ in range(int(threads)):
        threading.Thread(target=lambda: [answer(listener.accept()[0]) for _ in iter(int, 1)], daemon=True).start()
    begin(client)


def vanishing(client, listener, count):
    """Kill processes that wait in accept(2)."""
    for _ in range(int(count)):
        pid = os.fork()
        if pid == 0:
            accept(listener)
            os._exit(0)
        time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    begin(client)


# -- listeners --

def closing(client, listener, times):
    """Close a listener whose doorbell rings, and listen anew."""
    begin(client)
    with open("/dev/null") as nothing:
        for _ in range(int(times)):
            wait_readable(listener)
            os.dup2(nothing.fileno(), listener.fileno())
            with listen() as new:
                os.dup2(new.fileno(), listener.fileno())


def closed(client, listener):
    """Close it, and stay."""
    begin(client)
    wait_readable(listener)
    listener.close()
    time.sleep(3600)


def shut(client, listener, times):
    """Shut a listener down, whose doorbell rings and by which a thread waits; return what accept(2) says."""
    outcomes = set()
    thread = threading.Thread(target=lambda: outcomes.add(try_it(accept, listener)))
    thread.start()
    time.sleep(0.1)
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.listen(16)
    begin(client)
    for _ in range(int(times)):
        wait_readable(listener)
        listener.shutdown(socket.SHUT_RD)
        outcomes.add(try_it(accept, listener))
        listener.listen(16)
    return sorted(outcomes)


def many(client, listener, count):
    """Listen on many sockets more."""
    here = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(count))]
    begin(client)
    return len(here)


def group(client, listener):
    """Listen with many sockets on one port, and close those that a doorbell has come to."""
    listeners = [listen() for _ in range(7)]
    begin(client)
    for _ in range(4):
        ready, = wait_readable(listener, *listeners)
        if ready is not listener:
            listeners.remove(ready)
            ready.close()
    if ready is listener:
        return
    ready, = wait_readable(listener, *listeners)
    answer(accept_blocking(ready))


def replaced(client, listener, seconds):
    """Put other files in the place of a listener while accept(2) is answered."""
    listener.setblocking(False)
    target, pipe = os.dup(listener.fileno()), os.pipe()
    unix, datagram, another = socket.socket(socket.AF_UNIX), socket.socket(type=socket.SOCK_DGRAM), listen(PORT + 1)
    unix.bind("\0own")
    unix.listen()
    for own in (unix, another):
        own.setblocking(False)
    begin(client)
    end = time.monotonic() + float(seconds)

    def replace():
        while time.monotonic() < end:
            for file in (listener, unix, listener, datagram, listener, another, listener, pipe[0]):
                os.dup2(getattr(file, "fileno", lambda file=file: file)(), target)
                time.sleep(0.0003)
    threading.Thread(target=replace).start()
    outcomes = set()
    while time.monotonic() < end:
        try:
            answer(socket.socket(fileno=accept(target)))
        except OSError as error:
            outcomes.add(errno.errorcode[error.errno])
    return sorted(outcomes)


def kinds(client, listener):
    """Return what accept(2) and listen(2) say to what is no listener, and socket(2) to other protocols."""
    begin(client)
    own = socket.create_connection(("127.0.0.1", PORT))
    files = {"closed": 999, "negative": -1, "file": os.open("/server.py", os.O_RDONLY), "pipe": os.pipe()[0],
             "path": os.open("/", os.O_PATH), "event": os.eventfd(0), "epoll": select.epoll(),
             "not connected": socket.socket(), "connected": own, "not bound": socket.socket(socket.AF_UNIX),
             "datagram": socket.socket(type=socket.SOCK_DGRAM), "datagram 6": socket.socket(socket.AF_INET6, 2),
             "netlink": socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)}
    outcomes = {f"accept {name}": try_it(accept, file) for name, file in files.items()}
    for name in ("closed", "file", "path", "connected", "datagram", "netlink"):
        file = getattr(files[name], "fileno", lambda name=name: files[name])()
        outcomes[f"listen {name}"] = try_it(lambda file=file: abuse.checked(LIBC.listen(file, 1)))
    for name, family, protocol in (("MPTCP", socket.AF_INET, 262), ("SCTP", socket.AF_INET, 132),
                                   ("VSOCK", socket.AF_VSOCK, 0)):
        outcomes[f"socket {name}"] = try_it(lambda family=family, protocol=protocol: socket.socket(
            family, socket.SOCK_STREAM, protocol).listen())
    unix = socket.socket(socket.AF_UNIX)
    unix.bind("\0own")
    unix.listen()
    peer = socket.socket(socket.AF_UNIX)
    peer.connect("\0own")
    outcomes["accept unix"] = try_it(lambda: unix.accept()[0].close())
    return outcomes


# -- memory --

def addresses(client, listener):
    """Have the peer's address written where it cannot be, or not at once; return what accept(2) says of each."""
    page = mmap.PAGESIZE
    library = os.path.dirname(os.__file__)      # the program itself may have but five pages, with a shared library
    largest = max((f"{library}/{name}" for name in os.listdir(library)), key=os.path.getsize)
    code, cold = open("/server.py", "rb"), open(largest, "rb")

    def make(protection, flags, file=None, length=page):
        place = LIBC.mmap(None, ctypes.c_size_t(length), protection, flags, file.fileno() if file else -1,
                          ctypes.c_long(0))
        assert place != MAP_FAILED
        return place
    memory = make(mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, length=2 * page)
    LIBC.munmap(ctypes.c_void_p(memory + page), ctypes.c_size_t(page))
    size = memory + page // 2
    with open("/tmp/cut", "wb+") as file:
        file.truncate(page)
        cut = make(mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file)
        file.truncate(0)
    slow = make(mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, cold, 1 << 20)
    LIBC.madvise(ctypes.c_void_p(slow), ctypes.c_size_t(1 << 20), mmap.MADV_DONTNEED)
    os.posix_fadvise(cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    places = {
        "memory": (memory, size, 128), "none": (memory + page, size, 16), "none to half": (memory + page - 8, size, 16),
        "null": (8, size, 16), "kernel": (0xFFFF_8880_0000_0000, size, 16), "last": (2 ** 64 - 4, size, 16),
        "no size": (memory, memory + page, 0), "null size": (memory, 0, 0), "kernel size": (memory, 2 ** 64 - 2, 0),
        "truncated": (cut, size, 16), "truncated size": (memory, cut, 0), "slow": (slow + 8 * page + 1, size, 16),
        "image": (make(mmap.PROT_READ, mmap.MAP_SHARED, code), size, 16),
        "closed": (make(0, mmap.MAP_SHARED, code), size, 16),
        "negative": (memory, size, -1), "huge": (memory, size, 2 ** 31 - 1), "least": (memory, size, -2 ** 31),
        "nothing": (memory + page, size, 0), "two": (memory + page - 2, size, 2)}
    before = code.read()
    begin(client)
    outcomes = {}
    for name, (place, length, value) in places.items():
        if length == size:
            ctypes.c_int.from_address(size).value = value
        with own_connection():
            wait_readable(listener)
            try:
                answer(socket.socket(fileno=accept(listener, place, length)))
                outcomes[name] = "done" + (f" {ctypes.c_int.from_address(size).value}" if length == size else "")
            except OSError as error:
                outcomes[name] = errno.errorcode[error.errno]
    with open("/server.py", "rb") as file:
        outcomes["image is as before"] = str(file.read() == before)
    return outcomes


# -- processes --

def started_anew(client, listener):
    """Have a thread wait in accept(2) while another makes the process execute a program that accepts."""
    listener.setblocking(True)
    started, starts = os.pipe()
    if os.fork() == 0:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        time.sleep(0.1)
        for descriptor in (listener.fileno(), starts):
            os.set_inheritable(descriptor, True)
        os.execv(sys.executable, [sys.executable, "/server.py", str(listener.fileno()), str(starts)])
    os.read(started, 1)
    begin(client)
    if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
        answered.release()


def forking(client, listener):
    """Fork again and again in a process whose threads wait in accept(2)."""
    listener.setblocking(True)
    threading.Thread(target=lambda: answer(listener.accept()[0]), daemon=True).start()
    begin(client)
    for _ in range(50):
        if os.fork() == 0:
            os._exit(0)
        os.wait()


def gone(client, listener):
    """Exit while a doorbell rings."""
    begin(client)
    wait_readable(listener)
    os._exit(0)


# -- connections to itself --

def flood(client, listener, seconds):
    """Fill the queue of connections, and accept none for so long."""
    mine = []
    for _ in range(40):
        own = socket.socket()
        own.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            own.connect(("127.0.0.1", PORT))
        mine.append(own)
    begin(client)
    time.sleep(float(seconds))
    for own in mine:
        own.close()


def disguised(client, listener):
    """Connect to itself from the port that the doorbell has; return whether that was seen to work."""
    begin(client)
    wait_readable(listener)
    with open("/proc/net/tcp") as file:
        lines = [line.split() for line in file][1:]
    ports = {int(peer.partition(":")[2], 16) for _, local, peer, state, *_ in lines
             if state == "01" and local == f"0100007F:{PORT:04X}"}
    return [try_it(lambda port=port: own_connection("127.0.0.2", port).detach() and None) for port in ports]


def connecting(client, listener, seconds):
    """Connect to itself in a loop and accept what comes; return how often."""
    begin(client)
    end, count = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        with own_connection():
            answer(listener.accept()[0])
        count += 1
    return count


# -- the client's socket: nothing of these answers its client first --

def kept(client, listener):
    """Leave it to a grandchild, close it, and go on."""
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            time.sleep(3600)
        os._exit(0)
    os.wait()
    client.close()


def kept_and_left(client, listener):
    """Leave it to a child, and exit."""
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(0)


def sent(client, listener):
    """Send it to another process, which answers once nobody else has it."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        for own in (client, listener, ours):
            own.close()
        _, (descriptor,), _, _ = socket.recv_fds(theirs, 1, 1)
        theirs.recv(1)
        respond(socket.socket(fileno=descriptor))
        os._exit(0)
    socket.send_fds(ours, [b"x"], [client.fileno()])
    client.close()
    ours.send(b"x")
    ours.detach()


def in_flight(client, listener):
    """Send it to nobody: it is in a queue, and no process has it."""
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [client.fileno()])
    client.close()
    time.sleep(3600)
    theirs.close()


def escaping(client, listener, seconds, words):
    """Try for so long to get anywhere with it."""
    abuse.escape(client, None, seconds, words)
    os._exit(0)


def listening(client, listener):
    """Dissolve its connection, and wait with it for others'."""
    abuse.checked(LIBC.connect(client.fileno(), abuse.UNSPECIFIED, len(abuse.UNSPECIFIED)))
    client.listen()
    abuse.say("listening: %s:%d" % client.getsockname())
    client.settimeout(3)
    abuse.say("accepting: " + try_it(lambda: client.accept()[1]))
    os._exit(0)


def held(client, listener):
    """Say that it has it, and stay."""
    client.sendall(b"held in %s\n" % os.environ["FAAS_CONTAINER_ID"].encode())
    time.sleep(3600)


def turned(client, listener):
    """Connect a listener elsewhere, and accept by it once the client says so."""
    peer = listen(PORT + 2)
    abuse.checked(LIBC.connect(listener.fileno(), abuse.UNSPECIFIED, len(abuse.UNSPECIFIED)))
    listener.connect(("127.0.0.1", PORT + 2))
    with socket.socket(fileno=accept(peer)) as other:
        other.send(b"x")                        # so that it is readable
        client.sendall(b"turned in %s\n" % os.environ["FAAS_CONTAINER_ID"].encode())
        client.recv(1)
        accept(listener)
    time.sleep(3600)


QUIET = {function.__name__: function for function in (kept, kept_and_left, sent, in_flight, escaping, listening, held,
                                              turned)}

if __name__ == "__main__":
    main(sys.argv[1:])
