"""What ordinary programs need, and what must work under all that stops the hostile ones."""

import asyncio
import ctypes
import fcntl
import json
import multiprocessing
import multiprocessing.shared_memory
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading


def python(client, control):
    """Return what came of each."""
    results = {}
    for check in (run_program, run_threads, run_processes, share_memory, run_loop, use_sqlite, reopen_output,
                  set_options, use_sockets, control_files, control_process):
        try:
            results[check.__name__] = check() or "works"
        except Exception as error:
            results[check.__name__] = repr(error)
    return results


def run_program():
    out = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True).stdout
    assert out == "42\n", out


def run_threads():
    numbers = []
    threads = [threading.Thread(target=numbers.append, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(8)), numbers


def run_processes():
    with multiprocessing.get_context("fork").Pool(2) as pool:       # POSIX semaphores in /dev/shm
        assert pool.map(abs, [-1, -2]) == [1, 2]


def share_memory():
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
    block.buf[:2] = b"hi"
    other = multiprocessing.shared_memory.SharedMemory(block.name)
    assert bytes(other.buf[:2]) == b"hi"
    other.close()
    block.close()
    block.unlink()


def run_loop():
    async def talk():
        async def answer(reader, writer):
            writer.write(await reader.readline())
            writer.close()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"line\n")
        assert await reader.read() == b"line\n"
        writer.close()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
        assert await process.wait() == 0
    asyncio.run(talk())


def use_sqlite():
    for journal in ("wal", "delete"):               # wal maps a file that processes share
        with sqlite3.connect(f"/tmp/{journal}.db") as database:
            assert database.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
            database.execute("create table t (x)")
            database.execute("insert into t values (1)")
        with sqlite3.connect(f"/tmp/{journal}.db") as database:
            assert database.execute("select x from t").fetchall() == [(1,)]


def reopen_output():
    """Log files of images are often links to /dev/stdout."""
    for path in ("/dev/stdout", "/dev/stderr"):
        with open(path, "w") as file:
            file.write(f"written to {path}\n")


def set_options():
    """SO_LINGER only seems to be set; others are."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
        for level, option in ((socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.SOL_SOCKET, socket.SO_REUSEPORT),
                              (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                              (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)):
            sock.setsockopt(level, option, 1)
            assert sock.getsockopt(level, option), (level, option)
    with socket.socket(socket.AF_INET6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def use_sockets():
    for family in (socket.AF_INET, socket.AF_INET6):
        for kind, protocol in ((socket.SOCK_STREAM, 6), (socket.SOCK_DGRAM, 17)):
            for number in (0, protocol):
                for flags in (0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC):
                    socket.socket(family, kind | flags, number).close()
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        for sock in socket.socketpair(socket.AF_UNIX, kind):
            sock.close()
    assert socket.if_nameindex()                    # by netlink
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendmsg([b"x"], [], socket.MSG_DONTWAIT, server.getsockname())
        sock.sendto(b"x", socket.MSG_NOSIGNAL, server.getsockname())


def control_files():
    with open("/tmp/controlled", "w") as file:
        for command, argument in ((fcntl.F_GETFD, 0), (fcntl.F_SETFL, os.O_APPEND), (fcntl.F_GETLEASE, 0),
                                  (fcntl.F_DUPFD_CLOEXEC, 500), (fcntl.F_GETOWN, 0), (fcntl.F_SETOWN, os.getpid())):
            fcntl.fcntl(file, command, argument)
        fcntl.lockf(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_UN)
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))        # F_OFD_SETLK
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 1 << 16)             # F_SETPIPE_SZ
    memory = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(memory, 1033, 1)                    # F_ADD_SEALS


def control_process():
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *arguments in ((15, b"name"), (1, 9), (4, 1), (36, 1), (38, 1), (0x53564D41, 0, 0, 0, 0)):
        result = libc.prctl(option, *arguments)     # names, death signal, dumpable, subreaper, no_new_privs, VMA names
        assert result == 0 or ctypes.get_errno() in (22, 9, 12, 14), (option, ctypes.get_errno())
    libc.prctl(1, 0)
    os.setpriority(os.PRIO_PROCESS, 0, 1)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.sched_setaffinity(0, os.sched_getaffinity(0))


def program(client, control, words):
    """Run a program; words are its argv as JSON in hexadecimal.

    $PORT in its environment, and @PORT@ in argv, is the port of a web server that answers "served".
    """
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]

    def serve():
        while True:
            with server.accept()[0] as asking:
                asking.recv(65536)
                asking.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nserved")
    threading.Thread(target=serve, daemon=True).start()
    environment = {**os.environ, "PORT": str(port), "HOME": "/tmp"}
    argv = json.loads(bytes.fromhex(words).replace(b"@PORT@", b"%d" % port))
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=environment, cwd="/tmp", timeout=20, check=False)
    return [done.returncode, done.stdout[-2000:]]
