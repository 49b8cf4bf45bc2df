"""Servers: programs that know nothing of faasd, and get their clients from accept(2)."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clients
import faasd
import support
from clients import PATIENCE, connect, exchange, get, read_all, read_until_cut, request
from support import wait_until

SERVER = support.TOP / "tests/handlers/server.py"
CONNECTIONS, CLIENTS = (10_000, 64) if "FAASD_SOAK_SECONDS" in os.environ else (1_000, 32)


def server_image(*arguments: str, source: bytes | None = None, **config) -> bytes:
    """Return an image of a server: tests/handlers/server.py, or a source of the test's own."""
    settings = {"Entrypoint": [support.PYTHON, "-u", "/server.py", *arguments]}
    return support.docker_archive([support.python_layer(), support.layer({"server.py": source or SERVER.read_bytes()})],
                                  {**settings, **config})


# What a process has open there, readlink(2) does not tell: the path is longer than a path may be.
DEEP = b"""import os, socket, time
os.chdir("/tmp")
for _ in range(30):
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
file = open("file", "w")
"""


class Accepting(support.SharedDaemonCase):
    """However a program accepts, it gets the client's own connection."""

    WAYS = {"blocking": ["0.0.0.0:8080"], "polling": ["0.0.0.0:8080"], "forking": ["0.0.0.0:8080"],
            "forking-polling": ["0.0.0.0:8080"], "exclusive": ["0.0.0.0:8080"], "again": ["0.0.0.0:8080"],
            "deferred": ["127.0.0.1:8080"]}

    def test_ways(self):
        for number, (how, places) in enumerate(self.WAYS.items()):
            with self.subTest(how):
                address = self.daemon.deploy(f"f{number}", server_image(how, *places))
                self.assertEqual(self.daemon.info(f"f{number}")["contract"], "server")
                served = set()
                for _ in range(2):
                    with request(address, "/peer") as client:
                        answer = read_until_cut(client)
                        self.assertEqual(answer.split(b"\r\n\r\n")[1].decode(), "{} {}".format(*client.getsockname()))
                    served.add(get(address, "/id")[1])
                self.assertEqual(len(served), 2)
                self.daemon.remove(f"f{number}")

    def test_addresses_of_both_ends(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"))
        self.assertEqual(get(address, "/names"), (200, f"{address} {address} 8080"))
        self.assertRegex(self.daemon.faas("list").stdout, r"(?m)^f .* server:8080  ")

    def test_it_has_no_descriptor_but_its_own(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"))
        kinds = [word.partition(":")[0] for word in get(address, "/descriptors")[1].split()]
        self.assertEqual(kinds.count("socket"), 2)              # its listener, and its client
        self.assertLessEqual(set(kinds), {"socket", "pipe", "/dev/null"} | {kind for kind in kinds if "output" in kind})

    def test_client_is_as_the_kernel_would_have_accepted_it(self):
        """By accept(2), and accept4(2) with each of its flags: beside a connection within, to a listener like it."""
        source = b"""import ctypes, fcntl, json, socket
OPTIONS = [(socket.IPPROTO_TCP, option, 70 + option) for option in (
    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)]
OPTIONS += [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000), (socket.SOL_SOCKET, socket.SO_SNDBUF, 60_000)]
libc = ctypes.CDLL(None, use_errno=True)
listeners = []
for port in 8080, 8081:
    listeners.append(socket.socket())
    for option in OPTIONS:
        listeners[-1].setsockopt(*option)
    listeners[-1].bind(("", port))
    listeners[-1].listen()


def accept(listener, flags):
    number = listener.fileno()
    descriptor = libc.accept(number, None, None) if flags < 0 else libc.accept4(number, None, None, flags)
    state = [fcntl.fcntl(descriptor, fcntl.F_GETFL), fcntl.fcntl(descriptor, fcntl.F_GETFD)]
    accepted = socket.socket(fileno=descriptor)
    return accepted, state + [accepted.getsockopt(level, option) for level, option, _ in OPTIONS]


for flags in -1, 0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC:
    client, found = accept(listeners[0], flags)
    with client, socket.create_connection(("127.0.0.1", 8081)):
        client.setblocking(True)
        client.recv(65536)
        body = json.dumps([flags, found, accept(listeners[1], flags)[1]])
        client.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
"""
        address = self.daemon.deploy("f", server_image(source=source), "--reuse", "0", "--warm", "1")
        self.daemon.wait_warm("f", 1)
        seen = set()
        for _ in range(5):
            wait_until(lambda: not self.daemon.info("f")["running"], "its container is back")
            flags, found, expected = json.loads(get(address)[1])
            seen.add(flags)
            with self.subTest(flags=flags):
                self.assertEqual(found, expected)
        self.assertEqual(len(seen), 5)

    def test_listener_of_both_protocols(self):
        address = self.daemon.deploy("f", server_image("polling", ":::8080"))
        status, body = get(address, "/peer")
        self.assertEqual((status, body.split()[0]), (200, f"::ffff:{address}"))
        self.assertEqual(get(address, "/names"), (200, f"{address} {address} 8080"))

    def test_listener_of_both_protocols_where_ipv6_is_switched_off(self):
        """In its own network, as ipv6.disable_ipv6=1 on the kernel's command line does; and in one that it shares."""
        off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
        address = self.daemon.deploy("own", server_image("polling", ":::8080"), "--reuse", "0", "--warm", "1")
        self.daemon.wait_warm("own", 1)
        pid = next(iter(support.container_pids(self.daemon)))
        subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-c", off], check=True)
        self.assertEqual(get(address, "/names"), (200, f"{address} {address} 8080"))
        self.daemon.remove("own")
        self.addCleanup(subprocess.run, ["sh", "-c", off.replace("1", "0", 1)], check=True)
        subprocess.run(["sh", "-c", off], check=True)
        for place in ":::8080", "only ipv6:::8080":
            address = self.daemon.deploy("shared", server_image("polling", place), "--net", "host")
            self.assertEqual(get(address, "/names"), (200, f"{address} {address} 8080"))

    def test_own_connections_are_the_programs(self):
        for how in ("blocking", "polling"):
            with self.subTest(how):
                address = self.daemon.deploy("f", server_image(how, "0.0.0.0:8080"))
                status, body = get(address, "/self")
                self.assertEqual(status, 200)
                self.assertRegex(body, r"^itself: 127\.0\.0\.1 \d+$")

    def test_own_connection_from_the_port_of_a_doorbell(self):
        """From another address: only the whole address says which connection is which."""
        address = self.daemon.deploy("f", server_image(source=b'''
import re, select, socket
first, second = (socket.create_server((host, 8080)) for host in ("127.0.0.1", "127.0.0.2"))
select.select([first], [], [])
port = int(re.search("0100007F:1F90 0100007F:(....)", open("/proc/net/tcp").read())[1], 16)
own = socket.create_connection(("127.0.0.2", 8080), source_address=("127.0.0.2", port))
accepted, peer = second.accept()
client = first.accept()[0] if peer == own.getsockname() else accepted
client.recv(65536)
body = f"{peer == own.getsockname()} {accepted.getpeername() == own.getsockname()}"
client.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
'''))
        self.assertEqual(get(address), (200, "True True"))

    def test_servers_behind_it_are_not_held_up(self):
        """At 200 accepts a second they would not be done within --timeout."""
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"), "--timeout", f"{20 * PATIENCE}s")
        self.assertEqual(get(address, f"/relay?{5000 * PATIENCE}"), (200, "done"))

    def test_half_close_and_much_data(self):
        address = self.daemon.deploy("f", server_image("blocking", "0.0.0.0:8080"))
        data = os.urandom(8 << 20)
        client = connect(address, b"GET /echo HTTP/1.1\r\n\r\n")
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            received = client.makefile("rb").read()
            sending.result()
        client.close()
        self.assertEqual(received, data)
        wait_until(lambda: f"sent={len(data)}" in self.daemon.function_log("f"), "its bytes are counted")

    def test_fifty_connections_have_fifty_containers(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"), "--concurrency", "8")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: get(address, "/id"), range(50)))
        self.assertEqual({status for status, _ in answers}, {200})
        self.assertEqual(len({body for _, body in answers}), 50)
        wait_until(lambda: not support.list_containers(self.daemon), "no container is left")
        wait_until(lambda: self.daemon.function_log("f").count("outcome=answered") == 50, "50 are logged")
        self.assertEqual(self.daemon.info("f")["errors"], 0, "that faasd ends a server is no error")

    def test_in_the_host_network_each_has_a_port_of_its_own(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"), "--net", "host", "--warm", "3")
        self.daemon.wait_warm("f", 3)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(request(address, "/wait")) for _ in range(2)]
            for client in waiting:
                self.assertEqual(client.recv(100), b"waiting\n")
            self.assertEqual(get(address, "/names")[1], f"{address} {address} 8080")
            self.assertIn("lo", get(address, "/interfaces")[1].split(), "netlink is bound as ever")


class BeforeLinux69(support.SharedDaemonCase):
    """The kernel has no descriptor for a thread that is not its process's first."""

    constants = {"PIDFD_THREAD": 1 << 20}           # a flag that no kernel knows yet

    def test_threads_accept(self):
        address = self.daemon.deploy("f", server_image("blocking", "0.0.0.0:8081", "0.0.0.0:8080"), "--port", "8080")
        for _ in range(2):
            self.assertEqual(get(address, "/names"), (200, f"{address} {address} 8080"))


class SpeakingFirst(support.SharedDaemonCase):
    """--speaks-first: a client need not say anything before its server does."""

    IMAGE = server_image("speaking", "0.0.0.0:8080")
    HANDLER = b"""import socket
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
client = socket.socket(fileno=socket.recv_fds(control, 1, 1)[1][0])
client.sendall(b"hello\\n")
client.sendall(client.recv(100))
"""

    def check(self, address: str) -> None:
        with connect(address) as client:
            self.assertEqual(client.recv(100).decode(), "hello {} {}\n".format(*client.getsockname()))
            client.sendall(b"good bye")
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_until_cut(client), b"good bye")

    def check_that_silence_costs_nothing(self, address: str) -> None:
        before = self.daemon.info("f")["requests"]
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(connect(address))
            self.assertTrue(clients.exchange(address, b"x").endswith(b"\nx"))       # later than those
        self.assertEqual(self.daemon.info("f")["requests"], before + 1)

    def test_warm_and_cold(self):
        address = self.daemon.deploy("f", self.IMAGE, "--speaks-first", "true")
        for options in ("--warm", "1"), ("--warm", "0"):
            with self.subTest(options):
                self.daemon.set("f", *options)
                for _ in range(3):
                    self.check(address)
        wait_until(lambda: self.daemon.function_log("f").count("outcome=answered") == 6, "the log says what was")
        self.assertEqual(len(set(re.findall(r" (\w{12}) > outcome=", self.daemon.function_log("f")))), 6)

    def test_switched_on_and_off(self):
        address = self.daemon.deploy("f", self.IMAGE)
        self.check_that_silence_costs_nothing(address)
        self.daemon.set("f", "--speaks-first", "true")
        self.check(address)
        self.assertEqual(self.daemon.stop(), 0)
        self.daemon.start()
        self.check(address)
        self.daemon.set("f", "--speaks-first", "false")
        self.check_that_silence_costs_nothing(address)

    def test_half_closed_without_a_word(self):
        address = self.daemon.deploy("f", self.IMAGE, "--speaks-first", "true", "--warm", "0")
        self.assertRegex(clients.exchange(address, b""), rb"^hello [0-9.]+ [0-9]+\n$")

    def test_one_that_leaves_costs_no_container(self):
        address = self.daemon.deploy("f", self.IMAGE, "--speaks-first", "true", "--warm", "0", "--concurrency", "1")
        with connect(address) as first:
            self.assertIn(b"hello", first.recv(100))
            clients.reset(connect(address))
            self.daemon.wait_outcomes("f", {"abandoned": 1})

    def test_handler(self):
        address = self.daemon.deploy("f", support.handler_image(self.HANDLER), "--speaks-first", "true")
        with connect(address) as client:
            self.assertEqual(client.recv(100), b"hello\n")
            client.sendall(b"good bye")
            self.assertEqual(read_until_cut(client), b"good bye")


class Sharing(support.SharedDaemonCase):
    def test_reuse(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"), "--reuse", "3", "--warm", "1")
        served = [get(address, "/id")[1] for _ in range(7) if wait_until(
            lambda: self.daemon.info("f")["warm"], "a container waits")]
        self.assertEqual([served.count(one) for one in dict.fromkeys(served)], [3, 3, 1])

    def test_without_a_limit(self):
        address = self.daemon.deploy("f", server_image("blocking", "0.0.0.0:8080"), "--reuse", "0", "--warm", "1")
        served = {get(address, "/id")[1] for _ in range(20) if wait_until(
            lambda: self.daemon.info("f")["warm"], "a container waits")}
        self.assertEqual(len(served), 1)

    def test_several_at_a_time(self):
        for how in ("polling", "forking"):
            address = self.daemon.deploy("f", server_image(how, "0.0.0.0:8080"), "--reuse", "0", "--share", "4",
                                         "--warm", "1")
            self.daemon.wait_warm("f", 1)
            with self.subTest(how), contextlib.ExitStack() as stack:
                waiting = [stack.enter_context(request(address, "/wait")) for _ in range(8)]
                for client in waiting:
                    self.assertEqual(client.recv(100), b"waiting\n")
                containers = support.list_containers(self.daemon)
                self.assertLessEqual(len(containers), 3)        # one may be warm
                self.assertEqual(self.daemon.info("f")["running"], 8)
                for client in waiting:
                    client.sendall(b"x")
                    self.assertIn(b"hello", read_until_cut(client))
            wait_until(lambda: not self.daemon.info("f")["running"], "all have ended")

    def test_where_a_container_has_one_client_at_a_time_each_client_has_a_start(self):
        """--share is of no use to a handler, nor with --reuse 1."""
        server = server_image(source=b"""import os, socket, time
listener = os.path.exists("/misbehave") or socket.create_server(("", 8080))
time.sleep(3600)""")
        for number, (image, *reuse) in enumerate(((server,), (support.handler_image(), "--reuse", "0"))):
            name = f"f{number}"
            address = self.daemon.deploy(name, image, "--share", "8", "--warm", "0", "--start-timeout",
                                         str(5 * PATIENCE), *reuse)
            (self.daemon.rootfs(name) / "misbehave").write_text("never-connect")

            def ended() -> bool:
                for pid in support.container_pids(self.daemon):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return not support.list_containers(self.daemon)
            wait_until(ended, "the one that was tried has ended")
            with self.subTest(reuse=reuse), contextlib.ExitStack() as stack:
                waiting = [stack.enter_context(request(address)) for _ in range(4)]
                wait_until(lambda name=name: self.daemon.info(name)["starting"] == 4, "all four are starting")
                self.assertEqual({read_all(client)[:12] for client in waiting}, {b"HTTP/1.1 504"})

    def test_many_connections(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"), "--reuse", "100", "--share", "8")
        containers, shares, used = collections.Counter(), set(), []

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

        for _ in range(2):
            with ThreadPoolExecutor(CLIENTS) as pool:
                for status, body in pool.map(lambda _: get(address, "/load"), range(CONNECTIONS // 2)):
                    self.assertEqual(status, 200)
                    container, at_a_time = body.split()
                    containers[container] += 1
                    shares.add(int(at_a_time))
            wait_until(lambda: not self.daemon.info("f")["running"], "all have ended")
            self.daemon.set("f", "--warm", "1")         # so that as many containers wait each time
            self.daemon.wait_warm("f", 1)
            wait_until(lambda: len(support.list_containers(self.daemon)) == 1, "the others are gone")
            used.append((support.resident_memory(self.daemon.process.pid), descriptors()))
        self.assertLessEqual(max(containers.values()), 100)
        self.assertLessEqual(max(shares), 8)
        self.assertGreater(max(shares), 1)              # so that they did share
        (memory, before), (memory_later, _) = used
        self.assertLess(memory_later, memory + (8 << 20))
        # Threads close those of a container a moment after it is gone.
        wait_until(lambda: descriptors() <= before + 8, "descriptors are given back")

    def test_one_that_takes_too_long_does_not_end_the_others(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"), "--reuse", "0", "--share", "4",
                                     "--timeout", "3", "--warm", "1")
        self.daemon.wait_warm("f", 1)
        with request(address, "/never") as slow:
            time.sleep(1.5)
            with request(address, "/wait") as other:
                self.assertEqual(other.recv(100), b"waiting\n")
                self.assertIn(b"504", read_until_cut(slow))
                other.sendall(b"x")
                self.assertIn(b"hello", read_until_cut(other))


class Ends(support.SharedDaemonCase):
    """What becomes of clients whose server does not answer."""

    def line(self, outcome: str) -> str:
        wait_until(lambda: f"outcome={outcome}" in self.daemon.function_log("f"), f"the log says {outcome}")
        return next(line for line in self.daemon.function_log("f").splitlines() if f"outcome={outcome}" in line)

    def test_exits_instead_of_answering(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"))
        with request(address, "/exit") as client:
            self.assertEqual(read_until_cut(client), b"")
        self.assertIn("the program exited with status 3 without an answer", self.line("no-answer"))

    def test_closes_instead_of_answering(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"))
        with request(address, "/silent") as client:
            self.assertEqual(read_until_cut(client), b"")
        self.assertIn('reason="the program closed the connection without an answer"', self.line("closed"))
        with request(address, "/echo") as client:
            wait_until(lambda: [self.daemon.info("f")[key] for key in ("running", "queued")] == [1, 0], "it has it")
            clients.reset(client)
        wait_until(lambda: self.daemon.function_log("f").count("outcome=closed") == 2, "the log says so")
        self.assertRegex(self.daemon.function_log("f").splitlines()[-1],        # it may not have accepted it yet
                         'reason="(before an answer, )?the client reset the connection(, or the program closed it '
                         'without reading it all| before the program had answered)"')

    def test_exits_before_it_accepts(self):
        address = self.daemon.deploy("f", server_image("dying", "0.0.0.0:8080"), "--warm", "0")
        status, body = get(address)
        self.assertEqual(status, 502)
        self.assertIn("the program exited with status 4 without an answer", body)
        wait_until(lambda: self.daemon.info("f")["state"] == "failing", "info says so too")
        self.assertEqual(self.daemon.info("f")["error"], "the program exited with status 4 without an answer")

    def test_never_accepts(self):
        address = self.daemon.deploy("f", server_image("deaf", "0.0.0.0:8080"), "--timeout", "1")
        self.assertEqual(get(address)[0], 504)

    def test_never_answers(self):
        address = self.daemon.deploy("f", server_image("blocking", "0.0.0.0:8080"), "--timeout", "1")
        self.assertEqual(get(address, "/never")[0], 504)
        image = server_image(source=DEEP + b"""
with socket.create_server(("", 8080)) as listener:
    client, _ = listener.accept()
    time.sleep(3600)""")
        self.assertEqual(get(self.daemon.deploy("f", image, "--timeout", "1"))[0], 504)

    def test_half_an_answer_ends_in_a_reset(self):
        address = self.daemon.deploy("f", server_image("blocking", "0.0.0.0:8080"), "--timeout", "1")
        client = request(address, "/half")
        with self.assertRaises(ConnectionResetError):
            while client.recv(100):
                continue
        client.close()


class StandardInputAndOutput(support.SharedDaemonCase):
    """Any program that reads its standard input and writes its standard output."""

    def deploy(self, source: str) -> str:
        image = support.docker_archive([support.python_layer()],
                                       {"Entrypoint": [support.PYTHON, "-c", source]})
        out = self.daemon.faas("new", "f", "--contract", "stdio", "--warm", "1", stdin=image).stdout
        self.assertEqual(out, "✓ Deployed f at 10.0.0.10 (stdio)\n")
        self.daemon.wait_warm("f", 1)
        return "10.0.0.10"

    def test_answers(self):
        address = self.deploy("import os, socket, sys; line = input(); "
                              "print('to stderr', file=sys.stderr, flush=True); "
                              "print(line.upper(), os.environ['FAAS_CONTAINER_ID'], os.listdir('/proc/self/fd')[:-1], "
                              "*socket.socket(fileno=0).getpeername())")
        answers = []
        for _ in range(3):
            with connect(address, b"hello\n") as client:
                answers.append(read_until_cut(client).decode().split(" ", 2))
                self.assertEqual(answers[-1][2], "['0', '1', '2'] {} {}\n".format(*client.getsockname()))
        self.assertEqual({first for first, *_ in answers}, {"HELLO"})
        self.assertEqual(len({container for _, container, _ in answers}), 3)
        wait_until(lambda: self.daemon.function_log("f").count("to stderr\n") == 3, "stderr goes to the log")
        wait_until(lambda: self.daemon.function_log("f").count("outcome=answered") == 3, "three are logged")

    def test_program_that_reads_to_the_end(self):
        files = {path.lstrip("/"): Path(path).read_bytes()
                 for path in ("/usr/bin/tr", *support.libraries("/usr/bin/tr"))}
        self.daemon.faas("new", "f", "--contract", "stdio", "--", "/usr/bin/tr", "a-z", "A-Z",
                         stdin=support.docker_archive([support.layer(files)], {}))
        self.assertEqual(exchange("10.0.0.10", "hello\n"), b"HELLO\n")

    def test_runs_other_programs(self):
        address = self.deploy("import os, subprocess; "
                              f"subprocess.run([{support.PYTHON!r}, '-c', 'print(input() * 2)']); "
                              f"os.execv({support.PYTHON!r}, ['python', '-c', 'print(input() * 3)'])")
        with connect(address, b"ab\n") as client:
            self.assertEqual(client.recv(100), b"abab\n")
            client.sendall(b"c\n")
            self.assertEqual(read_until_cut(client), b"ccc\n")

    def test_bad_ends(self):
        address = self.deploy("input()\nraise SystemExit(3)")
        with connect(address, b"x\n") as client:
            self.assertEqual(read_until_cut(client), b"")
        wait_until(lambda: "exited with status 3 without an answer" in self.daemon.function_log("f"), "the log says so")

    def test_serves_one_client(self):
        result = self.daemon.faas("new", "f", "--contract", "stdio", "--reuse", "2", stdin=support.small_image(),
                                  check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn("a container serves one client", result.stderr)


class LostMessages(support.SharedDaemonCase):
    """The kernel tells of each connection that is gone, and drops what does not fit into the daemon's buffer."""

    constants = {"DIAG_BUFFER": 64 * 1024}

    def dropped(self) -> int:
        """Return how many messages on connections that are gone the kernel has dropped."""
        lines = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
        return sum(int(drops) for _, *kind, drops, _ in lines if (kind[0], kind[2]) == ("4", "00000001"))

    def daemon_sockets(self) -> set[int]:
        """Return the inodes of the daemon's sockets."""
        found = set()
        for path in Path(f"/proc/{self.daemon.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.update(map(int, re.findall(r"^socket:\[([0-9]+)\]$", os.readlink(path))))
        return found

    def test_invocation_ends_all_the_same(self):
        address = self.daemon.deploy("f", server_image("polling", "0.0.0.0:8080"))
        with request(address, "/wait") as client, socket.create_server((address, 9999)) as other:
            self.assertEqual(client.recv(100), b"waiting\n")
            wait_until(lambda: not self.daemon_sockets() & faasd.read_connections([address]).keys(), "it is let go of")
            os.kill(self.daemon.process.pid, signal.SIGSTOP)
            try:
                for _ in range(500):
                    with socket.create_connection((address, 9999)) as ours, other.accept()[0]:
                        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(b"x")
                self.assertIn(b"hello", read_until_cut(client))
                client.close()
                wait_until(lambda: not faasd.read_connections([address]) and self.dropped(), "a message is lost")
            finally:
                os.kill(self.daemon.process.pid, signal.SIGCONT)
            wait_until(lambda: "outcome=" in self.daemon.function_log("f"), "it ends")
            self.daemon.wait_log("missed messages of the kernel")
        self.assertEqual(get(address)[0], 200)
        wait_until(lambda: not support.list_containers(self.daemon), "no container is left")


class Deploying(support.SharedDaemonCase):
    def refused(self, image: bytes, *options: str, name: str = "f") -> str:
        result = self.daemon.faas("new", name, "--start-timeout", str(3 * PATIENCE), *options, stdin=image,
                                  check=False)
        self.assertEqual(result.returncode, 1)
        return result.stderr

    def deployed(self, image: bytes, *options: str) -> str:
        return self.daemon.faas("new", "f", *options, stdin=image).stdout

    def test_line_and_info(self):
        out = self.deployed(server_image("polling", "0.0.0.0:3000"))
        self.assertEqual(out, "✓ Deployed f at 10.0.0.10 (server, port 3000)\n")
        self.assertRegex(self.daemon.faas("info", "f").stdout, r"(?m)^contract: +server \(auto\)$")
        self.assertRegex(self.daemon.faas("info", "f").stdout, r"(?m)^port: +3000 \(auto\)$")

    def test_ports(self):
        two = ["0.0.0.0:9000", "0.0.0.0:8080"]
        for image, options, port in (
                (server_image("polling", *two), (), 8080),                          # PORT
                (server_image("polling", *two), ("-e", "PORT=9000"), 9000),
                (server_image("polling", *two), ("--port", "9000"), 9000),
                (server_image("polling", *two, ExposedPorts={"9000/tcp": {}}), (), 9000),
                (server_image("polling", "0.0.0.0:9001", *two, ExposedPorts={"9000": {}, "9002": {}}), (), 9000),
                (server_image("polling", "0.0.0.0:9001", "0.0.0.0:9002"), (), 9001)):
            with self.subTest(port=port, options=options):
                self.assertIn(f"server, port {port})\n", self.deployed(image, "--reset", *options))
                self.assertEqual(get("10.0.0.10")[0], 200)

    def test_what_did_not_listen(self):
        patience = f"{3 * PATIENCE:g}"
        cases = (
            (server_image("unix"), (), "listened on a Unix socket"),
            (server_image("nothing"), (), "listened on nothing"),
            (server_image(source=DEEP + b"time.sleep(3600)"), (), "listened on nothing"),
            (server_image("udp"), (), "listened on UDP port 5353\n"),
            (server_image("udp"), ("--net", "host"), "listened on UDP port 5353\n"),
            (server_image("nothing"), ("--contract", "server"), "did not listen on a TCP port within"),
            (server_image("polling", "0.0.0.0:8081"), ("--port", "80"),
             f"the program did not listen on port 80 (--port) or connect to /control.sock within {patience} s; "
             "it listened on port 8081: say --port 8081, or --port auto\n"),
            (server_image("polling", "0.0.0.0:8081", ExposedPorts={"80/tcp": {}}), (),
             "; it listened on port 8081: say --port 8081\n"),
            (server_image("polling", "0.0.0.0:8081"), ("--contract", "handler"),
             "did not connect to /control.sock"))
        with ThreadPoolExecutor(3) as pool, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as of_the_host:
            of_the_host.bind(("", 5354))
            # They wait rather than work.
            answers = pool.map(lambda number, case: self.refused(case[0], *case[1], name=f"f{number}"),
                               range(len(cases)), cases)
            for (_, _, said), answer in zip(cases, answers, strict=True):
                with self.subTest(said):
                    self.assertIn(said, answer)

    def test_init_that_tries_again_for_ever(self):
        """What it may not do without a server's capabilities, as some do that start a service as another user."""
        retrying = server_image(source=b"""import os, socket, time
while True:
    try:
        os.setuid(33)
        break
    except PermissionError:
        time.sleep(0.1)
socket.create_server(("", 8080)).accept()
""")
        self.assertIn("(server, port 8080)\n", self.deployed(retrying, "--start-timeout", str(10 * PATIENCE)))

    def test_handlers_are_handlers(self):
        self.assertEqual(self.deployed(support.small_image()), "✓ Deployed f at 10.0.0.10\n")
        self.assertEqual(self.daemon.info("f")["contract"], "handler")


class Restarting(unittest.TestCase):
    """What serves a client goes on, and its program does not notice, however the daemon ends."""

    def restart(self, how: str, number: int, clients_together: int) -> None:
        with support.Daemon() as daemon, contextlib.ExitStack() as stack:
            image = server_image(how, "0.0.0.0:8080")
            address = daemon.deploy("f", image, "--reuse", "0", "--share", "4", "--warm", "1")
            daemon.wait_warm("f", 1)
            waiting = [stack.enter_context(request(address, "/wait")) for _ in range(clients_together)]
            for client in waiting:
                self.assertEqual(client.recv(100), b"waiting\n")
            for _ in range(2):
                if number == signal.SIGHUP:
                    self.assertEqual(daemon.stop(number), 0)
                else:
                    daemon.kill()
                daemon.start()
                self.assertEqual(daemon.info("f")["running"], clients_together)
            for client in waiting:
                client.sendall(b"x")
                self.assertIn(b"hello", read_until_cut(client))
            wait_until(lambda: not daemon.info("f")["running"], "all have ended")
            wait_until(lambda: daemon.function_log("f").count("outcome=answered") == clients_together, "all are logged")
            self.assertNotIn("Traceback", daemon.function_log("f"))
            wait_until(lambda: len(support.list_containers(daemon)) <= 1, "their container is gone")
            self.assertEqual(get(address)[0], 200)
            self.assertEqual(daemon.info("f")["contract"], "server")

    def test_who_has_not_been_accepted_yet_is_before_the_daemon_leaves(self):
        """Its server serves one client after the other, and still has the first."""
        with support.Daemon(constants={"OFFER_SECONDS": support.READY_SECONDS}) as daemon:
            address = daemon.deploy("f", server_image("alone", "0.0.0.0:8080"), "--reuse", "0", "--share", "2")
            with request(address, "/wait") as first:
                self.assertEqual(first.recv(100), b"waiting\n")
                with request(address, "/wait") as second:
                    wait_until(lambda: daemon.info("f")["running"] == 2, "the second is handed over")
                    daemon.process.send_signal(signal.SIGHUP)
                    daemon.wait_log("leaving: 2 invocations running")
                    first.sendall(b"x")
                    self.assertIn(b"hello", read_until_cut(first))
                    self.assertEqual(second.recv(100), b"waiting\n")
                    self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
                    daemon.start()
                    second.sendall(b"x")
                    self.assertIn(b"hello", read_until_cut(second))

    def test_who_is_never_accepted_does_not_keep_the_daemon(self):
        """Clients of all functions wait for the next one meanwhile."""
        with support.Daemon("--drain-timeout", "1h") as daemon:
            address = daemon.deploy("f", server_image("deaf", "0.0.0.0:8080"), "--timeout", "0")
            with request(address) as client:
                wait_until(lambda: daemon.info("f")["running"] == 1, "it is handed over")
                daemon.process.send_signal(signal.SIGHUP)
                self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
                self.assertIn(b" 503 ", read_all(client))
            daemon.start()

    def test_standard_input_and_output(self):
        with support.Daemon() as daemon:
            image = support.docker_archive([support.python_layer()], {"Entrypoint": [
                support.PYTHON, "-c", "print(input(), flush=True); print(input() * 2)"]})
            address = daemon.deploy("f", image, "--contract", "stdio")
            with connect(address, b"a\n") as client:
                self.assertEqual(client.recv(100), b"a\n")
                daemon.kill()
                daemon.start()
                client.sendall(b"b\n")
                self.assertEqual(read_until_cut(client), b"bb\n")
            wait_until(lambda: "outcome=answered" in daemon.function_log("f"), "it has ended")

    def test_invocations_go_on(self):
        for how, number, together in (("polling", signal.SIGHUP, 1), ("blocking", signal.SIGHUP, 3),
                                      ("polling", signal.SIGKILL, 3), ("blocking", signal.SIGKILL, 1)):
            with self.subTest(how=how, number=number):
                self.restart(how, number, together)


if __name__ == "__main__":
    unittest.main()
