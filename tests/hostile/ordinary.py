"""What ordinary programs need, and what must work under all that stops the hostile ones."""

import asyncio
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
                  set_options):
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
