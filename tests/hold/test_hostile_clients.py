"""Clients that mean harm: silent, slow, leaving, vanishing, sending garbage. Real daemon, real sockets.

Of each attack: nothing of it stays behind, and what it has not to do with goes on. Random resets last 3 s, or as long
as --soak says, with which there are more clients, too: `sudo ./test.sh --soak 600 tests/hold/test_hostile_clients.py`
"""

import collections
import contextlib
import os
import random
import re
import resource
import select
import signal
import socket
import subprocess
import threading
import time
import unittest
from pathlib import Path

import support
from clients import RESET, connect, get, read_until_cut, reset
from support import wait_until

import faasd

SOAK_SECONDS = float(os.environ.get("FAASD_SOAK_SECONDS", "3"))
SYN_COOKIES = Path("/proc/sys/net/ipv4/tcp_syncookies")         # of our network namespace
AT_LENGTH = "FAASD_SOAK_SECONDS" in os.environ
IDLE_CLIENTS = 10_000 if AT_LENGTH else 3_000                   # several times MAX_SILENT
LEAVING_CLIENTS = 2000 if AT_LENGTH else 500
TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(194))
# A request line, and what would be lines of the log if nothing were escaped.
FORGERY = (b'GET /exit?0 \x1b[2J\x00"\\ outcome=answered\xff\xfe\xe2\x80\xa8\xc2\x85\r'
           b'2026-01-01T00:00:00.000Z - > outcome=forged HTTP/1.1\n2026-01-01T00:00:00.000Z - > outcome=forged\r\n\r\n')


def setUpModule():
    """Allow ourselves as many connections as the attacks take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = IDLE_CLIENTS + 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(hard, needed)))
    unittest.addModuleCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, max(hard, needed)))


class HostileCase(unittest.TestCase):
    """One daemon for the attacks of a class, with a function that is attacked and another that must not notice."""

    constants: dict[str, object] = {}
    wrapper: tuple[str, ...] = ()
    options: tuple[str, ...] = ()       # of the function that is attacked
    handler: str | None = None          # in Python, in the place of handler.pl
    files: dict[str, bytes] = {}        # in its image
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon(constants=support.BRIEF_SURPLUS | cls.constants, wrapper=cls.wrapper).start()
        cls.addClassCleanup(cls.daemon.close)
        cls.address = cls.daemon.deploy("f", support.handler_image(cls.handler, files=cls.files), *cls.options)
        cls.other = cls.daemon.deploy("other", None)
        assert get(cls.address) == get(cls.other)       # whatever is opened once is open now
        for name in ("f", "other"):
            cls.daemon.wait_idle(name)
            wait_until(lambda name=name: "outcome=answered" in cls.log_of(name), "it is logged")

    @classmethod
    def log_of(cls, name: str) -> str:
        return cls.daemon.api("GET", f"/functions/{name}/logs")[1].decode()

    def setUp(self):
        self.pid = self.daemon.process.pid
        self.settle()
        self.before = support.footprint(self.daemon)
        self.counted = collections.Counter(self.daemon.outcomes("f"))
        self.log_start = len(self.log_of("f"))

    def settle(self) -> None:
        """Wait until nothing runs, and what was started for a client that left is gone too."""
        def idle(name: str) -> bool:
            info = self.daemon.info(name)
            return not any(info[key] for key in ("running", "queued", "starting"))
        for name in ("f", "other"):
            wait_until(lambda name=name: idle(name), f"{name} is idle")
        wait_until(lambda: not any((self.daemon.run_dir / "containers").iterdir()), "no container is left")

    def tearDown(self):
        self.settle()
        try:
            wait_until(lambda: support.footprint(self.daemon, self.before) == self.before, "all is as before")
        except AssertionError:                  # say what is not
            self.assertEqual(support.footprint(self.daemon, self.before), self.before)
        self.assertEqual((get(self.address), get(self.other)), ((200, "hello /"), (200, "hello /")))
        self.assertNotIn("Traceback", self.daemon.log())
        self.assertNotIn("inside faasd", self.daemon.log())

    # -- attackers --

    def connect(self, data: bytes = b"", source: str = "") -> socket.socket:
        client = connect(self.address, data, source)
        self.addCleanup(client.close)
        return client

    def request(self, path: str, **more) -> socket.socket:
        return self.connect(f"GET {path} HTTP/1.1\r\nHost: f\r\n\r\n".encode(), **more)

    def counts(self) -> tuple[int, int]:
        info = self.daemon.info("f")
        return info["running"], info["queued"]

    def wait_counts(self, running: int, queued: int) -> None:
        wait_until(lambda: self.counts() == (running, queued), f"{running} run, {queued} wait")

    def outcomes(self) -> dict[str, int]:
        """Return the outcomes since the test began, once all is over."""
        self.settle()
        return dict(collections.Counter(self.daemon.outcomes("f")) - self.counted)

    def lines(self) -> list[str]:
        """Return the log lines of the test's invocations."""
        return re.findall(r"> (outcome=.*)", self.log_of("f")[self.log_start:])

    # -- those who must not notice --

    @contextlib.contextmanager
    def neighbour(self):
        """Ask the other function for as long as the block lasts; every answer must be good."""
        seen: collections.Counter = collections.Counter()
        over = threading.Event()

        def ask() -> None:
            while not seen or not over.wait(0.2):       # each takes a container: the attack shall have the CPUs
                try:
                    seen[get(self.other)] += 1
                except AssertionError as error:
                    seen[str(error)] += 1
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        self.assertEqual(set(seen), {(200, "hello /")})

    def with_syn_cookies(self, value: str) -> None:
        """2: every connection is made by a SYN cookie, and accepted without data whatever TCP_DEFER_ACCEPT says."""
        self.addCleanup(SYN_COOKIES.write_text, SYN_COOKIES.read_text())
        SYN_COOKIES.write_text(value)


class Silent(HostileCase):
    """The times in which the kernel, and then faasd, waits for a first byte are shortened."""

    constants = {"DEFER_ACCEPT_SECONDS": 1, "FIRST_BYTE_SECONDS": 3}

    def connect_silently(self, count: int) -> list[socket.socket]:
        """Open connections as fast as the kernel completes them, from four addresses."""
        clients = []
        for number in range(count):
            client = socket.socket()
            self.addCleanup(client.close)
            client.bind((f"127.0.0.{2 + number % 4}", 0))
            client.setblocking(False)
            client.connect_ex((self.address, 80))
            clients.append(client)
        return clients

    def test_idle_connections_by_the_thousand(self):
        self.with_syn_cookies("1")                      # as Linux has it by default
        memory = support.resident_memory(self.pid)
        most = 0
        with self.neighbour():
            clients = self.connect_silently(IDLE_CLIENTS)
            waiting = select.poll()
            for client in clients:
                waiting.register(client, select.POLLRDHUP)
            open_ones = {client.fileno() for client in clients}
            self.assertEqual(get(self.address), (200, "hello /"))
            deadline = time.monotonic() + 4 * support.READY_SECONDS
            while open_ones:                            # faasd closes all of them in the end
                self.assertLess(time.monotonic(), deadline, f"{len(open_ones)} are still open")
                for descriptor, _ in waiting.poll(100):
                    open_ones.discard(descriptor)
                    waiting.unregister(descriptor)
                most = max(most, len(os.listdir(f"/proc/{self.pid}/fd")))
            self.assertEqual(get(self.address), (200, "hello /"))
        self.assertEqual(self.outcomes(), {"answered": 2})
        before = self.before["descriptors"].total()
        self.assertGreater(most, before + faasd.MAX_SILENT // 2)        # it was an attack
        # Half as many again: those of the last batches are on their way out.
        self.assertLess(most, before + faasd.MAX_SILENT * 3 // 2)
        self.assertLess(support.resident_memory(self.pid) - memory, 16 << 20)

    def test_urgent_byte_alone_is_nothing_said(self):
        client = self.connect()
        client.send(b"!", socket.MSG_OOB)
        self.assertEqual(read_until_cut(client), b"")
        self.assertEqual(self.outcomes(), {})

    def test_close_without_a_word(self):
        for leave in (lambda client: client.shutdown(socket.SHUT_WR), socket.socket.close, reset):
            leave(self.connect())
        self.assertEqual(get(self.address)[0], 200)     # later than those
        self.assertEqual(self.outcomes(), {"answered": 1})

    def test_missing_syn_cookies_are_told_of(self):
        self.with_syn_cookies("0")
        self.assertIn("SYN cookies are off", "".join(faasd.machine_warnings()))
        SYN_COOKIES.write_text("1")
        self.assertNotIn("SYN cookies are off", "".join(faasd.machine_warnings()))


class Crowds(HostileCase):
    """What clients hold by doing nothing is bounded, and the oldest has to make room."""

    constants = {"MAX_SILENT": 8, "MAX_ANSWERING": 8, "LINGER_SECONDS": 3600}
    options = ("--concurrency", "1", "--queue", "0")

    def descriptors(self) -> int:
        return support.descriptors(self.pid)["socket"] - self.before["descriptors"]["socket"]

    def test_oldest_silent_one_goes_first(self):
        self.with_syn_cookies("2")
        clients = [self.connect() for _ in range(8)]
        wait_until(lambda: self.descriptors() == 8, "all are accepted")
        clients += [self.connect() for _ in range(4)]
        self.assertEqual([read_until_cut(client) for client in clients[:4]], [b""] * 4)
        self.assertEqual(self.descriptors(), 8)
        self.assertEqual(self.outcomes(), {})
        for client in clients[4:]:                      # and who speaks at last is heard
            client.sendall(b"GET /late HTTP/1.1\r\n\r\n")
            self.assertIn(b"hello /late", read_until_cut(client))
            self.settle()

    def test_stranger_with_many_takes_none_of_others(self):
        self.with_syn_cookies("2")
        others = [self.connect(source="127.0.0.2") for _ in range(3)]
        wait_until(lambda: self.descriptors() == 3, "they are accepted")
        strangers = [self.connect(source="127.0.0.3") for _ in range(20)]
        self.assertEqual([read_until_cut(client) for client in strangers[:15]], [b""] * 15)
        for client in strangers:
            client.close()
        for client in others:
            client.sendall(b"GET /late HTTP/1.1\r\n\r\n")
            self.assertIn(b"hello /late", read_until_cut(client))
            self.settle()

    def test_refused_ones_that_keep_their_connection_cannot_gather(self):
        busy = self.request("/echo")
        self.assertIn(b"101", busy.recv(65536))
        held = self.descriptors()
        with self.neighbour():
            refused = [self.request("/") for _ in range(40)]
            for client in refused:
                self.assertRegex(read_until_cut(client),
                                 rb"(?s)^HTTP/1.1 503 .*\r\nRetry-After: 1\r\n.*--queue 0 are taken")
        wait_until(lambda: self.descriptors() <= held + 8, "those before the last 8 are let go")
        for client in [*refused, busy]:
            client.close()
        self.assertEqual(self.outcomes(), {"queue-full": 40, "answered": 1})


class Slow(HostileCase):
    options = ("--concurrency", "2", "--queue", "3", "--timeout", "1", "--queue-timeout", "60")

    def trickle(self, clients: list[socket.socket]) -> list[bytes]:
        """Send all clients' requests a byte at a time, without end; return what each was answered."""
        answers = [b""] * len(clients)
        left = set(range(len(clients)))
        deadline = time.monotonic() + 4 * support.READY_SECONDS
        while left:
            self.assertLess(time.monotonic(), deadline, f"{left} are not answered")
            for number in sorted(left):
                try:
                    clients[number].send(b"x", socket.MSG_DONTWAIT)
                    data = clients[number].recv(65536, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except (ConnectionResetError, BrokenPipeError):
                    data = b""
                answers[number] += data
                if not data:
                    left.discard(number)
            time.sleep(0.05)
        return answers

    def test_slowloris(self):
        with self.neighbour():
            clients = []
            for number in range(12):
                clients.append(self.connect(b"GET /slow HTTP/1.1\r\nX-Slow: "))
                wait_until(lambda least=min(number + 1, 5): sum(self.counts()) >= least, "it is admitted")
            answers = self.trickle(clients)
        self.assertEqual([answer[9:12] for answer in answers], [b"504"] * 5 + [b"503"] * 7)
        self.assertTrue(all(b"Retry-After" in answer for answer in answers[5:]))
        self.assertEqual(self.outcomes(), {"timeout": 5, "queue-full": 7})

    def test_refused_one_reads_its_answer_whatever_it_was_sending(self):
        self.daemon.post("PATCH", "/functions/f?timeout=60")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?timeout=1")
        busy = [self.request("/echo") for _ in range(5)]
        self.wait_counts(2, 3)
        for size in (0, 100_000, 4 << 20):
            client = self.connect(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
            client.sendall(bytes(size))                 # all of it, before it reads
            self.assertRegex(read_until_cut(client), rb"(?s)^HTTP/1.1 503 .*\r\nRetry-After: 1\r\n"
                                                     rb".*--concurrency 2 and --queue 3 are taken")
        for client in busy:
            reset(client)


class Leaving(HostileCase):
    """Clients that leave in every phase, or only close their own direction."""

    constants = {"CLIENT_KEEPALIVE": (1, 1, 2)}
    options = ("--concurrency", "2", "--timeout", "0")

    def occupy(self) -> list[socket.socket]:
        busy = [self.request("/echo") for _ in range(2)]
        for client in busy:
            self.assertIn(b"101", client.recv(65536))
        return busy

    def release(self, busy: list[socket.socket]) -> None:
        for client in busy:
            client.close()

    def assert_no_container(self, outcome: str, count: int) -> None:
        self.assertEqual(self.outcomes(), {"answered": 2, outcome: count})
        lines = re.findall(rf" (\S+) > outcome={outcome} .* wait=- start=- run=- .* exit=-", self.log_of("f"))
        self.assertGreaterEqual(len(lines), count)
        self.assertEqual(set(lines), {"-"})

    def test_connect_and_leave_flood(self):
        busy = self.occupy()
        with self.neighbour():
            for _ in range(LEAVING_CLIENTS):
                reset(self.connect(b"GET /left HTTP/1.1\r\n\r\n"))
            wait_until(lambda: self.counts() == (2, 0), "none of them waits")
        self.release(busy)
        self.assert_no_container("abandoned", LEAVING_CLIENTS)

    def test_half_closed_behind_a_whole_request(self):
        busy = self.occupy()
        whole = [b"GET /a HTTP/1.1\r\n\r\n", b"POST /b HTTP/1.0\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000),
                 b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", b"quit\n"]
        clients = [self.connect(data) for data in whole]
        self.wait_counts(2, len(whole))
        for client in clients:
            time.sleep(0.2)
            client.shutdown(socket.SHUT_WR)
        self.release(busy)
        for client, answer in zip(clients, (b"hello /a", b"hello /b", b"hello /c", b"hello /"), strict=True):
            self.assertTrue(read_until_cut(client).endswith(answer))

    def test_half_closed_in_the_middle_of_a_request(self):
        busy = self.occupy()
        for data in (b"GET / HT", b"GET / HTTP/1.1\r\nHost: f\r\n", b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\na",
                     b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"):
            client = self.connect(data)
            self.wait_counts(2, 1)
            client.shutdown(socket.SHUT_WR)
            self.wait_counts(2, 0)
        self.release(busy)
        self.assert_no_container("abandoned", 4)

    def test_half_closed_behind_what_takes_long_to_read(self):
        """Each line of it may be the last chunk, with all the others for its trailer."""
        busy = self.occupy()
        with self.neighbour():
            client = self.connect(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0\n" * 20_000 + b"1")
            self.wait_counts(2, 1)
            client.shutdown(socket.SHUT_WR)
            self.wait_counts(2, 0)
        self.release(busy)
        self.assert_no_container("abandoned", 1)

    def test_half_closed_and_then_gone(self):
        busy = self.occupy()
        client = self.request("/")
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.2)                                 # for faasd to see it
        self.assertEqual(self.counts(), (2, 1))
        reset(client)
        self.wait_counts(2, 0)
        self.release(busy)
        self.assert_no_container("abandoned", 1)

    def test_reset_before_accept(self):
        """Its data is there to be read nevertheless, and a warm container to be had."""
        self.daemon.post("PATCH", "/functions/f?warm=1")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?warm=0")
        container, = self.daemon.wait_warm("f", 1)
        os.kill(self.pid, signal.SIGSTOP)
        try:
            for _ in range(50):
                reset(self.connect(b"GET /left HTTP/1.1\r\n\r\n"))
        finally:
            os.kill(self.pid, signal.SIGCONT)
        before = self.counted["abandoned"]
        wait_until(lambda: self.daemon.outcomes("f").get("abandoned", 0) == before + 50, "all are seen")
        self.assertEqual(get(self.address, "/id"), (200, container))
        self.daemon.wait_warm("f", 1)
        self.daemon.post("PATCH", "/functions/f?warm=0")

    def test_reset_while_its_container_starts(self):
        for _ in range(5):
            client = self.request("/")
            wait_until(lambda: self.daemon.info("f")["starting"] or not any(self.counts()), "a container starts")
            reset(client)
            self.settle()
        self.assertEqual(sum(self.outcomes().values()), 5)

    def test_reset_while_the_handler_reads(self):
        client = self.connect(b"GET / HT")
        self.wait_counts(1, 0)
        wait_until(lambda: self.daemon.info("f")["starting"] == 0, "the handler has it")
        reset(client)
        self.settle()
        self.assertRegex(self.lines()[-1], r'^outcome=closed .*request="GET / HT" .*received=8 sent=0 exit=1 '
                                            'reason="the client reset the connection before the handler had answered"$')

    def test_reset_while_the_handler_answers(self):
        client = self.request("/stream?1000000000")
        self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 200 OK"))
        reset(client)
        self.settle()
        self.assertRegex(self.lines()[-1], r'^outcome=answered .*sent=[1-9]\d* exit=1$')

    def test_reset_while_faasd_answers(self):
        """502 for the handler that ended, 504 for one that overran, 503 for a full queue."""
        self.daemon.post("PATCH", "/functions/f?timeout=1&queue=0")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?timeout=0&queue=1024")
        for path, outcome, status in (("/exit?0", "no-answer", 502), ("/hang", "timeout", 504)):
            client = self.request(path)
            self.assertEqual(client.recv(12), b"HTTP/1.1 %d" % status)
            reset(client)
            self.settle()
            self.assertRegex(self.lines()[-1], rf"^outcome={outcome} .* status={status} reason=")
        busy = [self.request("/hang") for _ in range(2)]
        self.wait_counts(2, 0)
        for _ in range(50):
            client = self.connect(b"POST /full HTTP/1.1\r\n\r\n" + bytes(50_000))
            client.recv(12)
            reset(client)
        self.release(busy)
        outcomes = self.outcomes()
        self.assertEqual(outcomes.pop("queue-full"), 50)
        self.assertEqual(outcomes, {"no-answer": 1, "timeout": 3})

    def test_resets_at_any_moment(self):
        """Seeded, so that what fails once can fail again, as far as a race can."""
        signal.alarm(int(SOAK_SECONDS) + 600)
        self.daemon.post("PATCH", "/functions/f?timeout=1&queue=3")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?timeout=0&queue=1024")
        paths = ["/", "/id", "/echo", "/hang", "/exit?0", "/half-and-hang", "/half-and-die", "/stream?100000000"]
        over = time.monotonic() + SOAK_SECONDS

        def attack(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < over:
                with socket.create_connection((self.address, 80), support.READY_SECONDS) as client:
                    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                        client.sendall(f"GET {chance.choice(paths)} HTTP/1.1\r\n\r\n".encode())
                        time.sleep(chance.choice([0, 0.001, 0.01, 0.05, 0.1, 0.2]))
                        if chance.random() < 0.7:
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        threads = [threading.Thread(target=attack, args=(seed,)) for seed in range(6)]
        with self.neighbour():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertGreater(sum(self.outcomes().values()), 20)


class Vanishing(HostileCase):
    """A client whose host is gone: its address is taken away, so that packets to it lead nowhere and nobody answers."""

    constants = {"CLIENT_KEEPALIVE": (1, 1, 2)}
    options = ("--timeout", "0")
    source = "10.99.0.1"

    def setUp(self):
        super().setUp()
        self.ip("add")
        self.there = True
        self.addCleanup(self.vanish)

    def ip(self, what: str) -> None:
        subprocess.run(["ip", "addr", what, f"{self.source}/32", "dev", "lo"], check=True)

    def vanish(self) -> None:
        if self.there:
            self.ip("del")
            self.there = False

    def test_handler_that_waits_for_it_is_told(self):
        """Without a timeout only keepalive ends this."""
        client = self.request("/echo", source=self.source)
        self.assertIn(b"101", client.recv(65536))
        self.vanish()
        self.assertEqual(self.outcomes(), {"answered": 1})
        self.assertRegex(self.lines()[-1], r"^outcome=answered client=10\.99\.0\.1:\d+ .* exit=1$")

    def test_one_that_waits_is_dropped(self):
        self.daemon.post("PATCH", "/functions/f?concurrency=1&queue_timeout=1h")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?concurrency=64&queue_timeout=10")
        busy = self.request("/echo")
        self.assertIn(b"101", busy.recv(65536))
        self.request("/", source=self.source)
        self.wait_counts(1, 1)
        self.vanish()
        self.wait_counts(1, 0)
        busy.close()
        self.assertEqual(self.outcomes(), {"answered": 1, "abandoned": 1})

    def test_handler_that_sends_to_it_ends_by_its_timeout(self):
        self.daemon.post("PATCH", "/functions/f?timeout=2")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?timeout=0")
        client = self.request("/stream?1000000000", source=self.source)
        self.assertTrue(client.recv(1000))
        self.vanish()
        self.assertEqual(self.outcomes(), {"timeout": 1})


class SlowReaders(HostileCase):
    """What a handler has left to the kernel for its client is memory that no container answers for any more."""

    options = ("--concurrency", "1", "--timeout", "3")

    def ask_for_much(self, path: str = "/leave-much", body: bytes = b"") -> socket.socket:
        client = socket.socket()
        self.addCleanup(client.close)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(support.READY_SECONDS)
        client.connect((self.address, 80))
        client.sendall(f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: self.counts() == (1, 0) and not any((self.daemon.run_dir / "containers").iterdir()),
                   "its container is gone")
        return client

    def test_they_count_until_they_have_everything(self):
        self.daemon.post("PATCH", "/functions/f?timeout=60")
        self.addCleanup(self.daemon.post, "PATCH", "/functions/f?timeout=3")
        client = self.ask_for_much()
        other = self.request("/next")
        self.wait_counts(1, 1)
        received = 0
        while data := client.recv(1 << 20):             # all of it, and an end of file
            received += len(data)
        self.assertIn(b"hello /next", read_until_cut(other))
        self.settle()
        self.assertRegex(self.lines()[0], rf"^outcome=answered .* sent={received} exit=0$")

    def test_they_are_cut_in_the_end(self):
        client = self.ask_for_much()
        self.wait_counts(0, 0)
        with self.assertRaises(ConnectionResetError):
            while client.recv(1 << 20):
                continue

    def test_of_a_handler_that_has_ended_its_answer_and_stays(self):
        """It is killed in time, and what it has left counts on."""
        client = self.ask_for_much("/finish-and-stay")
        other = self.request("/next")
        self.wait_counts(1, 1)
        while client.recv(1 << 20):                     # all of it, and an end of file
            continue
        self.assertIn(b"hello /next", read_until_cut(other))
        self.settle()
        self.assertRegex(self.lines()[0], "^outcome=timeout .* exit=137")

    def test_large_answer_to_a_request_that_nobody_read(self):
        client = self.connect(b"POST /stream?3000000 HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
        received = b""
        while data := client.recv(1 << 16):
            received += data
            time.sleep(0.001)
        self.assertEqual(len(received.partition(b"\r\n\r\n")[2]), 3_000_000)


class SlowReadersOfServers(HostileCase):
    """A server closes a connection for good: nobody has a descriptor of what its client has yet to take."""

    options = ("--concurrency", "1", "--timeout", str(2 * support.PATIENCE), "--reuse", "0", "--queue-timeout", "1h")
    handler = """
import contextlib, socket
with socket.create_server(("", 8080)) as listener:
    while True:
        with listener.accept()[0] as client:
            path = client.recv(65536).split()[1].decode()
            if path == "/leave-much":
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while client.send(bytes(65536)):
                        continue
            else:
                body = f"hello {path}"
                client.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n"
                               f"Connection: close\\r\\n\\r\\n{body}".encode())
"""

    def test_they_count_until_they_are_cut_and_their_server_goes_on(self):
        client = socket.socket()
        self.addCleanup(client.close)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(support.READY_SECONDS)
        client.connect((self.address, 80))
        client.sendall(b"GET /leave-much HTTP/1.1\r\n\r\n")
        self.wait_counts(1, 0)
        other = self.request("/next")
        self.assertIn(b"hello /next", read_until_cut(other))
        end = f":{client.getsockname()[1]:04X} 04 "         # FIN_WAIT1, which holds all that the client has not taken
        self.assertNotIn(end, Path("/proc/net/tcp").read_text())
        with self.assertRaises(ConnectionResetError):
            while client.recv(1 << 20):
                continue
        self.settle()
        lines = re.findall("([0-9a-f]+) > outcome=(.*?) ", self.log_of("f")[self.log_start:])
        self.assertEqual([outcome for _, outcome in lines], ["answered"] * 2)
        self.assertEqual(len({container for container, _ in lines}), 1)


class LockedSocket(HostileCase):
    """A handler that never lets go of the lock of its client's socket, which whoever asks the kernel about it needs."""

    handler = support.HANDLER.read_text()
    files = {"cold": bytes(4 << 20)}
    options = ("--cpus", "1", "--pids", "64", "--timeout", "8", "--reuse", "100")

    def test_as_a_handler_can(self):
        """Its lock is free between two calls of send(2), so how this ends is chance; nobody else notices."""
        with self.neighbour():
            clients = [self.request("/hold-lock") for _ in range(2)]
            for client in clients:
                read_until_cut(client)
        self.assertEqual(sum(self.outcomes().values()), 2)
        for line in self.lines():
            self.assertRegex(line, "^outcome=(no-answer|timeout) .* exit=137|^outcome=answered ")

    def test_for_good(self):
        client = self.request("/say-ready?held:")
        held = wait_until(lambda: support.client_socket(self.daemon, client), "the handler has it")
        cgroups = support.container_cgroups(self.daemon)
        try:
            with support.lock_held(held, cgroups), self.neighbour():
                self.daemon.release("f", "held")
                self.assertRegex(read_until_cut(client), b"(?s)^HTTP/1.1 502 .*kept its client's connection locked")
        finally:
            os.close(held)
        self.settle()
        self.assertRegex(self.lines()[0], "^outcome=no-answer .* exit=137")


class Garbage(HostileCase):
    """faasd does not parse what clients send; what of it meets the log is escaped."""

    options = ("--timeout", "5", "--memory", "64m")

    def test_bytes_that_are_no_request(self):
        """The handler under test answers whatever has an empty line in it; else its client closes its direction."""
        noise = random.Random(1).randbytes(100_000)
        with self.neighbour():
            for name, data in (("TLS", TLS_HELLO), ("noise", noise), ("zeros", bytes(100_000)), ("one byte", b"\0"),
                               ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), ("CR", b"\r" * 5000),
                               ("half", b"GET / HT")):
                with self.subTest(name):
                    client = self.connect(data)
                    client.shutdown(socket.SHUT_WR)
                    # One that ends in the middle of a request has given up, if that is seen before a handler has it.
                    nothing = b"|^$" if name == "half" else b""
                    self.assertRegex(read_until_cut(client), rb"^HTTP/1.1 (200|502) " + nothing)

    def test_pipelined_garbage(self):
        client = self.connect(b"GET /first HTTP/1.1\r\n\r\n" + b"GET /x HTTP/1.1\r\n\r\n" * 1000 + TLS_HELLO)
        self.assertIn(b"hello /first", read_until_cut(client))
        self.assertEqual(self.outcomes(), {"answered": 1})

    def test_header_line_of_a_gigabyte(self):
        """The handler keeps all of it, and ends by its memory or its time."""
        memory = support.resident_memory(self.pid)
        client = self.connect(b"GET / HTTP/1.1\r\nX: ")
        block = b"x" * (1 << 20)
        with self.neighbour(), contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(1024):
                client.sendall(block)
        self.settle()
        self.assertRegex(self.lines()[-1], r"^outcome=(no-answer|out-of-memory|timeout) .* status=50[24] ")
        self.assertLess(support.resident_memory(self.pid) - memory, 8 << 20)

    def test_urgent_data_within_a_request(self):
        client = self.connect(b"GET /urg")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"ent HTTP/1.1\r\n\r\n")
        self.assertIn(b"hello /urgent", read_until_cut(client))

    def test_log_cannot_be_forged(self):
        start = len(self.daemon.log())
        self.assertIn(b"502 Bad Gateway", read_until_cut(self.connect(FORGERY)))
        self.settle()
        wait_until(lambda: "exit?0" in self.log_of("f")[self.log_start:], "it is logged")
        wait_until(lambda: "exit?0" in self.daemon.log()[start:], "it is in the daemon's own log too")
        for text in (self.log_of("f")[self.log_start:], self.daemon.log()[start:]):
            self.assertTrue(all(c.isprintable() or c == "\n" for c in text), text)
            self.assertEqual([line for line in re.split("[\r\n]+", text) if line.startswith("2026-01-01")], [])
            self.assertIn(r'request="GET /exit?0 \x1b[2J\x00\"\\ outcome=answered\udcff\udcfe\u2028\x85\r2026-', text)


class FewDescriptors(HostileCase):
    """A flood takes what descriptors there are for clients, but not those that other functions need."""

    wrapper = ("prlimit", "--nofile=512:512")
    options = ("--concurrency", "4", "--timeout", "0", "--queue-timeout", "1h")

    def test_flood(self):
        running = [self.request("/echo") for _ in range(4)]
        for client in running:
            self.assertIn(b"101", client.recv(65536))
        clients = [self.request("/") for _ in range(700)]
        told = select.poll()
        for client in clients:
            told.register(client, select.POLLIN)
        wait_until(lambda: self.daemon.info("f")["queued"] + len(told.poll(0)) == 700, "all wait or are refused")
        for _ in range(3):
            self.assertEqual(get(self.other), (200, "hello /"))
        running[0].sendall(b"still here?")
        self.assertEqual(running[0].recv(65536), b"still here?")
        spoken_to = {descriptor for descriptor, _ in told.poll(0)}
        refused = [client for client in clients if client.fileno() in spoken_to]
        self.assertGreater(len(refused), 200)
        for client in refused:
            self.assertRegex(read_until_cut(client), b"(?s)^HTTP/1.1 503 .*Retry-After: 1.*has few descriptors left")
        for client in [*clients, *running]:
            reset(client)
        self.assertEqual(self.outcomes(), {"answered": 4, "abandoned": 700 - len(refused), "queue-full": len(refused)})
        self.assertIn("only 512 file descriptors are allowed", self.daemon.log())


class TooFewDescriptors(HostileCase):
    """Fewer than the invocations in flight take, which has others go without; but all of it ends."""

    wrapper = ("prlimit", "--nofile=128:128")
    options = ("--timeout", "1", "--queue-timeout", "3", "--start-timeout", "1m")

    def test_flood(self):
        clients = [self.request("/hang") for _ in range(200)]
        answers = collections.Counter(read_until_cut(client)[9:12] for client in clients)
        self.assertEqual(set(answers), {b"503", b"504"})
        outcomes = self.outcomes()
        self.assertEqual((outcomes["timeout"], sum(outcomes.values())), (answers[b"504"], 200))


if __name__ == "__main__":
    unittest.main()
