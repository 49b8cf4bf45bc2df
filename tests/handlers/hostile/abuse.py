"""What the hostile image does to the machine, its neighbours and faasd.

One function for each, called with the client's socket, the control connection and words of the request. What a function
returns is the answer; what cannot be answered is printed.
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time

from attempts import LIBC, SIOCGSKNS, UNIX, configure_interface, try_it

ABSTRACT, PORT, SHM_KEY, QUEUE = "\0hostile-victim", 7777, 0x5EC7E7, b"/hostile-victim"
UNSPECIFIED = struct.pack("H14x", 0)        # connect(2): dissolves a connection
SO_LINGER_FOR_EVER = struct.pack("ii", 1, 1 << 20)
TCP_FASTOPEN_NO_COOKIE, MSG_FASTOPEN = 34, 0x2000_0000
SO_DETACH_FILTER, SO_ATTACH_FILTER, SO_MARK, TCP_REPAIR, IP_TRANSPARENT = 27, 26, 36, 19, 19
SO_BINDTOIFINDEX, IP_ADD_SOURCE_MEMBERSHIP, MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP = 62, 39, 42, 46
GROUP = struct.pack("QHH4s120x", 1, socket.AF_INET, 0, bytes([239, 1, 2, 3]))           # struct group_req: of lo


def say(text) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


# -- across functions --

def hold(client, control):
    """Own one thing of every kind that another function might reach, until the client hangs up."""
    listener = socket.create_server(("127.0.0.1", PORT))
    abstract = socket.socket(UNIX)
    abstract.bind(ABSTRACT)
    abstract.listen()
    assert LIBC.shmget(SHM_KEY, 4096, 0o1666) >= 0
    while LIBC.mq_open(QUEUE, os.O_CREAT | os.O_RDWR, 0o666, None) < 0:
        time.sleep(0.1)                 # exhaust() has all, in a function of another daemon's that is the same user
    with open("/tmp/secret", "w") as file:
        file.write("the other function's secret")
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\nready\n")
    select.select([client, listener, abstract], [], [])


def reach(client, control, words):
    """Try to reach what hold() has, and what the host has; words are the JSON of what the test knows of both."""
    known = json.loads(bytes.fromhex(words))
    tries = {
        "its port": lambda: socket.create_connection(("127.0.0.1", PORT), 2),
        "its abstract socket": lambda: socket.socket(UNIX).connect(ABSTRACT),
        "its shared memory": lambda: checked(LIBC.shmget(SHM_KEY, 4096, 0)),
        "its message queue": lambda: checked(LIBC.mq_open(QUEUE, os.O_RDWR)),
        "its secret": lambda: open("/tmp/secret").read(),
        "kill its process": lambda: os.kill(known["pid"], signal.SIGKILL),
        "its /proc": lambda: os.listdir(f"/proc/{known['pid']}/root"),
        "port of the host": lambda: socket.create_connection(("127.0.0.1", known["host_port"]), 2),
        "abstract socket of faasd": lambda: socket.socket(UNIX).connect(known["abstract"]),
        "another function's address": lambda: socket.create_connection((known["address"], 80), 2),
    }
    for path in known["paths"]:
        for top in ("", "/proc/1/root", "/proc/self/root", "/proc/self/cwd/../../../..", "/tmp/../../.."):
            tries[f"{top}{path}"] = lambda path=top + path: os.stat(path)
    for path in known["sockets"]:
        tries[f"connect {path}"] = lambda path=path: socket.socket(UNIX).connect(path)
    return {name: try_it(action) for name, action in tries.items()}


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# -- the client's socket, which belongs to the host's network --

def options(client, control):
    """Ask of the host's network, through the one socket of it that a handler has, what it should not give."""
    return {
        "its namespace": try_it(lambda: fcntl.ioctl(client, SIOCGSKNS)),
        "take lo down": try_it(lambda: configure_interface(client.dup())),
        "mark": try_it(lambda: client.setsockopt(socket.SOL_SOCKET, SO_MARK, 1)),
        "repair": try_it(lambda: client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)),
        "transparent": try_it(lambda: client.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)),
        "take the filter off": try_it(lambda: client.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)),
        "another filter": try_it(lambda: attach_filter(client)),
        "another device": try_it(lambda: client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")),
        "another device, by number": try_it(lambda: client.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, 1)),
        "another way": try_it(lambda: client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS,
                                                        b"\x83\x07\x04\x7f\0\0\1\0")),
        "a group of the host": try_it(lambda: client.setsockopt(socket.IPPROTO_IP, MCAST_JOIN_GROUP, GROUP)),
        "a group with a source": try_it(lambda: client.setsockopt(
            socket.IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, bytes([239, 1, 2, 3, 127, 0, 0, 1, 127, 0, 0, 1]))),
        "a group with a source, by number": try_it(lambda: client.setsockopt(
            socket.IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, GROUP + GROUP[8:])),
    }


def attach_filter(sock) -> None:
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF))         # ret -1: all
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(code)))


def connect_elsewhere(client, control, host, port):
    """Dissolve the client's connection and make another from its socket, out of the host's network."""
    checked(LIBC.connect(client.fileno(), UNSPECIFIED, len(UNSPECIFIED)))
    client.settimeout(2)
    say("elsewhere: " + try_it(lambda: client.connect((host, int(port)))))


def listen_elsewhere(client, control):
    """Dissolve the client's connection and wait for others'."""
    checked(LIBC.connect(client.fileno(), UNSPECIFIED, len(UNSPECIFIED)))
    client.listen()
    say("listening: %s:%d" % client.getsockname())
    client.settimeout(4)
    try:
        client.accept()
        say("accepting: done")
    except TimeoutError:
        say("accepting: timeout")


def escape(client, control, seconds, words):
    """Dissolve the client's connection and try for so long to get its socket anywhere; say what came of each.

    words are the JSON of where: places to connect to, and places to bind.
    """
    say("escape: " + json.dumps(try_to_escape(client, float(seconds), json.loads(bytes.fromhex(words)))))


def escape_unseen(client, control, seconds, words):
    """Do so, and leave what came of it in a file, for no daemon reads what is said."""
    outcomes = try_to_escape(client, float(seconds), json.loads(bytes.fromhex(words)))
    with open("/tmp/writing", "w") as file:
        json.dump(outcomes, file)
    os.rename("/tmp/writing", "/tmp/escape")
    time.sleep(3600)


def try_to_escape(client, seconds, places):
    checked(LIBC.connect(client.fileno(), UNSPECIFIED, len(UNSPECIFIED)))
    client.setblocking(False)
    for level, option in ((socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.SOL_SOCKET, socket.SO_REUSEPORT),
                          (socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE)):
        client.setsockopt(level, option, 1)
    tries = {}
    for place in map(tuple, places["connect"]):
        tries["connect %s:%d" % place] = lambda place=place: client.connect(place)
        tries["fast open %s:%d" % place] = lambda place=place: client.sendto(b"the secret", MSG_FASTOPEN, place)
    for place in map(tuple, places["bind"]):
        tries["bind %s:%d" % place] = lambda place=place: client.bind(place)
    outcomes = {name: set() for name in tries}
    say("tries")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, action in tries.items():
            LIBC.connect(client.fileno(), UNSPECIFIED, len(UNSPECIFIED))
            outcomes[name].add(try_it(action))
    return {name: sorted(found) for name, found in outcomes.items()}


def linger(client, control):
    """Have whoever closes the client's socket last wait until the client has read everything, which it does not."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_FOR_EVER)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(1 << 16))
    say("lingers")


def keep_client(client, control):
    """Give the client's socket to a child that has left the session, answer nothing, exit."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    os.wait()
    os._exit(0)


def close_client(client, control):
    """Let go of everything without a word, and stay."""
    client.close()
    control.close()
    time.sleep(3600)


def hold_epoll(client, control):
    """Answer, and keep the lock of an epoll set that has the socket, in page faults, while others take all the CPU."""
    with open("/cold", "rb") as file:
        cold = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    cold.madvise(mmap.MADV_RANDOM)
    start, descriptor = ctypes.addressof(ctypes.c_char.from_buffer(cold)), os.open("/cold", os.O_RDONLY)
    epoll = select.epoll()
    for member in (client, *(os.eventfd(1) for _ in range(900))):
        epoll.register(member, select.EPOLLIN | select.EPOLLOUT)

    gate, opened = os.pipe()
    for number in range(200):
        if os.fork() == 0:
            client.close()
            control.close()
            os.close(opened)
            os.read(gate, 1)
            os.setpriority(os.PRIO_PROCESS, 0, 19 if number < 4 else 0)
            while number >= 4:
                pass
            for page in itertools.cycle(range(0, 3 << 20, 16384)):
                cold.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                LIBC.epoll_wait(epoll.fileno(), ctypes.c_void_p(start + page + 4090), 1000, -1)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    os.close(opened)
    time.sleep(0.3)
    client.close()
    control.send(b"R")
    time.sleep(3600)


def cork(client, control):
    """Leave the client's socket in the worst of states for the one who still has to answer on it."""
    for level, option, value in ((socket.SOL_SOCKET, socket.SO_SNDBUF, 1), (socket.IPPROTO_TCP, socket.TCP_CORK, 1),
                                 (socket.SOL_SOCKET, 47, 1)):         # SO_MAX_PACING_RATE, bytes a second
        client.setsockopt(level, option, value)
    client.setblocking(True)
    os._exit(5)


# -- the control connection --

def junk(client, control):
    """Write a megabyte of it; return how it ended."""
    def write_all():
        for _ in range(1000):
            control.sendall(b"junk" * 256)
    return try_it(write_all)


def descriptors(client, control):
    """Send as many descriptors as go, of the kinds that are dear to close."""
    return try_it(lambda: send_descriptors(control))


def send_descriptors(control):
    """Send sockets that nobody should close who cannot wait, and let go of them: faasd is the last to have them."""
    listener = socket.create_server(("127.0.0.1", 0))
    pairs = [make_lingering_pair(listener) for _ in range(50)]
    control.setblocking(False)
    for one, _ in pairs:
        socket.send_fds(control, [b"R"], [one.fileno()])
        one.close()


def make_lingering_pair(listener):
    one, other = socket.create_connection(listener.getsockname()), listener.accept()[0]
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_FOR_EVER)
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(bytes(1 << 16))
    return one, other


def ready_and_more(client, control):
    """Say READY again and again, without reading what comes."""
    def write_all():
        for _ in range(1000):
            control.send(b"R")
    return try_it(write_all)


def share_control(client, control):
    """Leave the control connection to a child and exit."""
    client.sendall(answer("shared"))
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(0)


# -- resources --

def fork_bomb(client, control):
    """Fork in every process until nothing more goes anywhere; return how it ended, and how many there were."""
    for _ in range(6):
        fork_quietly()
    if os.getpid() != 1:
        while True:
            fork_quietly()
    failures = []
    while len(failures) < 10:               # while the others go on trying
        try:
            if os.fork() == 0:
                time.sleep(3600)
        except OSError as error:
            failures.append(errno.errorcode[error.errno])
    client.sendall(answer([failures[-1], len([name for name in os.listdir("/proc") if name.isdigit()])]))
    os._exit(0)


def fork_quietly():
    with contextlib.suppress(OSError):
        os.fork()


def fork_at_start(client, control):
    """Fork before connecting, so that a warm container has all the processes that it may."""
    with contextlib.suppress(OSError):
        while True:
            if os.fork() == 0:
                time.sleep(3600)


def answer(result) -> bytes:
    body = json.dumps(result).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n" % (len(body) + 1, body)


def zombies(client, control):
    """Make children that end, and reap none, until no more go."""
    count = 0
    with contextlib.suppress(OSError):
        while True:
            if os.fork() == 0:
                os._exit(0)
            count += 1
    return count


def threads(client, control):
    count = 0
    try:
        while count < 1000:
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
            count += 1
    except RuntimeError:
        client.sendall(answer(count))
        os._exit(0)


def memory(client, control):
    blocks = []
    while True:
        blocks.append(b"x" * (8 << 20))


def fill(client, control, *directories):
    """Fill each file system; return [errno, MiB written] of each, and leave the files."""
    return [fill_one(directory) for directory in directories]


def fill_one(directory):
    count = 0
    try:
        with open(f"{directory}/fill", "wb", buffering=0) as file:
            while True:
                count += file.write(bytes(1 << 20))
    except OSError as error:
        return [errno.errorcode[error.errno], count >> 20]


def open_files(client, control):
    """Open files until the limit, which is raised as far as it goes; return how it ended and the count."""
    count, hard = 0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        while True:
            os.open("/handler.py", os.O_RDONLY)
            count += 1
    except OSError as error:
        client.sendall(answer([errno.errorcode[error.errno], count]))
        os._exit(0)


def sockets(client, control):
    """Leave as much as goes, up to 400 MiB, in the buffers of connections to itself; return how many MiB."""
    pairs, held = [], 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        while len(pairs) < 400 and held < 400 << 20:
            pairs.append((socket.create_connection(listener.getsockname()), listener.accept()[0]))
            pairs[-1][0].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while held < 400 << 20:
                    held += pairs[-1][0].send(bytes(1 << 20))
    return held >> 20


def exhaust(client, control):
    """Take what is counted by user rather than by container, and hold it until the client hangs up."""
    counts = {name: count_until_error(action) for name, action in COUNTED.items()}
    client.sendall(answer(counts))
    select.select([client], [], [])


def take_one(client, control):
    """Take one of each; return how that went."""
    return {name: try_it(lambda: None if action(0) is None else None) for name, action in COUNTED.items()}


def make_queue(number):
    attributes = ctypes.create_string_buffer(struct.pack("8l", 0, 10, 8192, 0, 0, 0, 0, 0))
    return checked(LIBC.mq_open(b"/q%d" % number, os.O_CREAT | os.O_RDWR, 0o600, attributes))


def make_timer(number):
    timer = ctypes.c_void_p()
    return checked(LIBC.timer_create(1, None, ctypes.byref(timer)))


def make_terminal(number):
    return os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)


def make_pipe(number):
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 1 << 20)         # F_SETPIPE_SZ
    return reading


COUNTED = {"inotify": lambda number: checked(LIBC.inotify_init()), "queue": make_queue, "timer": make_timer,
           "terminal": make_terminal, "pipe": make_pipe}


def count_until_error(action):
    count = 0
    try:
        while count < 150_000:
            action(count)
            count += 1
    except OSError as error:
        return [errno.errorcode[error.errno], count]
    return ["no limit", count]


def spin(client, control, seconds):
    """Use every CPU there is, in as many processes as go."""
    with contextlib.suppress(OSError):
        while os.fork():
            continue
    end = time.monotonic() + float(seconds)
    while os.getpid() != 1 or time.monotonic() < end:
        continue
    client.sendall(answer("spun"))
    os._exit(0)


def flood(client, control, seconds):
    """Write to stderr as fast as it goes."""
    block = b"x" * 65535 + b"\n"
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        os.write(2, block)
    return "written"


def forge(client, control):
    """Write what would look like lines of faasd's own, or move the cursor of a terminal."""
    os.write(2, b"a\r2026-01-01T00:00:00.000Z forged > outcome=answered\n")
    os.write(2, b"\x1b[2J\x1b]0;title\x07\x9b1A\xc2\x9b\xe2\x80\xa8\x00\xff\n")
    return "written"


# -- refusing to end --

def ignore_signals(client, control):
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    for _ in range(20):                     # and away, by two forks each
        if os.fork() == 0:
            control.close()
            os.setsid()
            if os.fork() == 0:
                time.sleep(3600)
            time.sleep(3600)
    client.sendall(answer("stays"))
    control.close()                         # last: whoever lets go without an answer is killed without one
    time.sleep(3600)


def stop_everything(client, control):
    """Stop all processes, so that none can end by itself."""
    for _ in range(10):
        if os.fork() == 0:
            control.close()
            os.kill(os.getpid(), signal.SIGSTOP)
    client.sendall(answer("stays"))
    control.close()
    time.sleep(3600)
