"""What a client meets: good handlers, bad handlers, and what stays behind of either. Real daemon, runc and curl."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support
from clients import connect, exchange, get, read_all, request, reset
from support import curl, wait_until

import faasd

CONNECTIONS = 1000 if "FAASD_SOAK_SECONDS" in os.environ else 100


class InvocationCase(unittest.TestCase):
    """One daemon and one function for all tests of a class; every test ends with nothing of its own left."""

    options: tuple[str, ...] = ()
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        cls.address = cls.daemon.deploy("f", support.handler_image(), *cls.options)
        cls.wait_logged("f")
        cls.wait_containers(0)

    @classmethod
    def wait_containers(cls, count: int):
        """Wait for those that have proved deploys, which are nobody's invocations, to be gone."""
        wait_until(lambda: len(list((cls.daemon.run_dir / "containers").iterdir())) == count, f"{count} are left")

    @classmethod
    def wait_logged(cls, name: str):
        """Logs are written behind the answers; wait for the file, which is one of the descriptors that are counted."""
        wait_until(lambda: b"> deployed" in cls.daemon.api("GET", f"/functions/{name}/logs")[1], "the log is there")

    def setUp(self):
        self.daemon.wait_idle("f")
        self.before = support.footprint(self.daemon)
        self.log_start = len(self.function_log())

    def tearDown(self):
        self.daemon.wait_idle("f")
        # A container whose client gave up is nobody's invocation, and may still be on its way out.
        try:
            wait_until(lambda: support.footprint(self.daemon, self.before) == self.before, "all is as before")
        except AssertionError:                  # say what is not
            self.assertEqual(support.footprint(self.daemon, self.before), self.before)
        self.assertEqual(get(self.address, "/alive"), (200, "hello /alive"))

    def function_log(self) -> str:
        return self.daemon.api("GET", "/functions/f/logs")[1].decode()

    def last_line(self) -> str:
        """Return the log line of this test's only invocation, once it is over."""
        def line():
            found = re.findall(r"> (outcome=.*)", self.function_log()[self.log_start:])
            return found[-1] if found else None
        return wait_until(line, "the invocation is logged")

    def connect(self) -> socket.socket:
        client = connect(self.address)
        self.addCleanup(client.close)
        return client

    def exchange(self, path: str) -> bytes:
        """Send a request and return all that comes until the end of file."""
        client = request(self.address, path)
        client.settimeout(10 * support.READY_SECONDS)
        return read_all(client)

    def assert_cut(self, client: socket.socket, received: bytes):
        """Assert that this, and no end of file, is all that comes: half an answer must not look whole."""
        got = b""
        with self.assertRaises(ConnectionResetError):
            while data := client.recv(65536):
                got += data
            self.fail(f"end of file after {got}")
        self.assertEqual(got, received)


class GoodHandler(InvocationCase):
    def test_answer_and_log_line(self):
        self.assertEqual(get(self.address, "/x"), (200, "hello /x"))
        self.assertRegex(self.last_line(), r'^outcome=answered client=10\.0\.0\.10:\d+ request="GET /x HTTP/1\.1" wait='
                                           r'[\d.]+ms start=[\d.]+ms run=[\d.]+ms received=\d\d+ sent=\d\d+ exit=0$')

    def test_every_connection_has_its_own_container(self):
        ids = {get(self.address, "/id")[1] for _ in range(5)}
        self.assertEqual(len(ids), 5)
        self.assertTrue(all(re.fullmatch("[0-9a-f]{12}", container) for container in ids))

    def test_post_with_a_large_body_that_the_handler_does_not_read(self):
        out = curl("--data-binary", "x" * 100_000, f"http://{self.address}/y")
        self.assertEqual(out, "hello /y")

    def test_half_closed_client_is_answered(self):
        received = exchange(self.address, "GET /half HTTP/1.0\r\n\r\n")
        self.assertTrue(received.endswith(b"hello /half"), received)

    def test_client_that_hangs_up_at_once_harms_nobody(self):
        client = self.connect()
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        reset(client)
        self.assertRegex(self.last_line(), "outcome=(abandoned|no-answer|closed|answered)")

    def test_silent_client_costs_no_container(self):
        before = self.daemon.info("f")["requests"]
        silent = [self.connect() for _ in range(20)]
        self.assertEqual(get(self.address)[0], 200)
        self.assertEqual(self.daemon.info("f")["requests"], before + 1)
        for client in silent:
            client.close()

    def test_handler_gets_a_blocking_socket(self):
        self.assertEqual(get(self.address, "/blocking"), (200, "True"))

    def test_two_way_traffic(self):
        client = self.connect()
        client.sendall(b"GET /echo HTTP/1.1\r\n\r\n")
        self.assertIn(b"101", client.recv(65536))
        for number in range(100):
            client.sendall(b"%d" % number)
            self.assertEqual(client.recv(65536), b"%d" % number)
        client.close()

    def test_a_gigabyte_streams_past_the_daemon(self):
        size = 1 << 30
        before = support.resident_memory(self.daemon.process.pid)
        cpu = os.sysconf("SC_CLK_TCK")

        ticks = support.cpu_ticks(self.daemon.process.pid)
        out = curl("--output", "/dev/null", "--write-out", "%{size_download}", f"http://{self.address}/stream?{size}")
        self.assertEqual(int(out), size)
        self.assertLess(support.resident_memory(self.daemon.process.pid) - before, 4 << 20)
        used = support.cpu_ticks(self.daemon.process.pid) - ticks
        self.assertLess(used, cpu, "the daemon worked on a stream it should not see")
        self.assertIn(f"sent={size + 47}", self.last_line())


class InsideContainer(InvocationCase):
    """What a handler finds around itself."""

    options = ("-e", "MINE=1", "-e", "LABEL=mine", "--pids", "20", "--memory", "128m", "--", "an argument", "another")

    def facts(self) -> dict:
        return json.loads(get(self.address, "/facts")[1])

    def test_environment_and_arguments(self):
        facts = self.facts()
        env = facts["env"]
        self.assertEqual((env["MINE"], env["LABEL"], env["FAAS_FUNCTION"]), ("1", "mine", "f"))
        self.assertEqual(env["FAAS_VERSION"], str(self.daemon.info("f")["version"]))
        self.assertRegex(env["FAAS_CONTAINER_ID"], "^[0-9a-f]{12}$")
        self.assertEqual((env["HOME"], env["PATH"]), ("/", faasd.DEFAULT_PATH))
        self.assertEqual(facts["argv"][1:], ["an argument", "another"])
        self.assertEqual((facts["cwd"], facts["hostname"], facts["ids"]), ("/", "f", [0, 0, []]))

    def test_no_descriptor_of_the_daemon_leaks(self):
        """stdin, stdout and stderr, the control connection, the client: nothing else (rule H.2)."""
        fds = self.facts()["fds"]
        # runc's own pipes; another runtime hands on what it has from the daemon.
        standard = "pipe:" if support.RUNTIME == "runc" else ("/dev/null", f"{self.daemon.run_dir}/containers/")
        self.assertTrue(all(fds[number].startswith(standard) for number in "012"), fds)
        others = [link for number, link in fds.items() if number not in "012"]
        self.assertEqual(len([link for link in others if link.startswith("socket:")]), 2)
        self.assertEqual([link for link in others if not link.startswith("socket:")], [])

    def test_isolation(self):
        facts = self.facts()
        status = facts["status"]
        self.assertEqual({status["CapEff"], status["CapBnd"], status["CapPrm"]}, {"0" * 16})
        self.assertEqual(status["NoNewPrivs"], "1")
        self.assertEqual(facts["interfaces"], ["lo"])
        self.assertEqual(facts["processes"], ["1"])
        for name in ("pid", "mnt", "net", "ipc", "uts", "cgroup"):
            self.assertNotEqual(facts["namespaces"][name], os.readlink(f"/proc/self/ns/{name}"), name)

    def test_all_of_its_root_can_be_written_and_nothing_else(self):
        for path in ("/tmp/file", "/file", "/etc/hosts", "/handler.pl"):
            self.assertEqual(get(self.address, f"/write?{path}")[1], "done")
        for path in ("/proc/sys/kernel/hostname", "/sys/file"):
            self.assertIn(get(self.address, f"/write?{path}")[1], ("Read-only file system", "Permission denied",
                                                                  "No such file or directory"), path)
        self.assertFalse((self.daemon.rootfs("f") / "file").exists())

    def test_nothing_of_one_invocation_is_there_in_the_next(self):
        for path in ("/tmp/left", "/left"):
            self.assertEqual(get(self.address, f"/write?{path}")[1], "done")
            status, body = get(self.address, f"/read?{path}")
            self.assertEqual(status, 502, body)

    def test_localhost_has_a_name(self):
        self.assertIn("localhost", get(self.address, "/read?/etc/hosts")[1])

    def test_second_connect_is_refused(self):
        self.assertEqual(get(self.address, "/second-connect"), (200, "Connection refused"))

    def test_junk_on_the_control_connection(self):
        status, body = get(self.address, "/junk")
        self.assertIn((status, body), [(200, "junk sent")])

    def test_limit_of_processes(self):
        status, body = get(self.address, "/forks")
        self.assertEqual(status, 200)
        self.assertLess(int(body), 20)

    def test_limit_of_memory(self):
        self.assertEqual(get(self.address, f"/memory?{16 << 20}")[0], 200)
        status, body = get(self.address, f"/memory?{512 << 20}")
        self.assertEqual(status, 502)
        self.assertIn("the handler ran out of memory", body)


class BadHandler(InvocationCase):
    """DESIGN section 2.5: 502 where it exited without a byte, 504 where it overran, else as the handler left it."""

    options = ("--timeout", "2")

    def assert_refused(self, out: bytes, status: int, line: str):
        head, _, body = out.partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(f"HTTP/1.1 {status} ".encode()), out)
        self.assertIn(b"Content-Length: %d" % len(body), head)
        self.assertRegex(body.decode(), rf"^faasd: function f: {line} \(container [0-9a-f]{{12}}\)\n$")

    def test_exits_without_a_byte(self):
        for status, text in ((0, "exited with status 0"), (7, "exited with status 7"),
                             (139, "was killed by SIGSEGV")):
            with self.subTest(status):
                self.log_start = len(self.function_log())
                self.assert_refused(self.exchange(f"/exit?{status}"), 502, f"the handler {text} without an answer")
                self.assertRegex(self.last_line(), rf'outcome=no-answer .* exit={status} status=502 reason="the hand')
                self.assertIn("| about to exit", self.function_log())

    def test_exits_badly_after_an_answer(self):
        before = self.daemon.info("f")["errors"]
        self.assertEqual(get(self.address, "/answer-and-exit?9"), (200, "good-bye"))
        self.assertRegex(self.last_line(), "outcome=answered .* exit=9$")
        self.assertEqual(self.daemon.info("f")["errors"], before + 1)

    def test_hangs_and_ignores_signals(self):
        self.assert_refused(self.exchange("/hang"), 504, "the handler did not finish in time")
        self.assertRegex(self.last_line(), "outcome=timeout .* exit=137 status=504")

    def test_sends_half_an_answer_and_dies(self):
        out = self.exchange("/half-and-die")
        self.assertTrue(out.endswith(b"\r\n\r\nonly this"), out)
        self.assertRegex(self.last_line(), "outcome=answered .* exit=1$")

    def test_sends_half_an_answer_and_hangs(self):
        client = self.connect()
        client.sendall(b"GET /half-and-hang HTTP/1.1\r\n\r\n")
        self.assert_cut(client, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
        self.assertRegex(self.last_line(), "outcome=timeout .* received=31 sent=50 exit=137")
        self.assertNotIn("status=", self.last_line())

    def test_forks_and_lingers(self):
        self.assertEqual(get(self.address, "/fork-and-linger"), (200, "parent"))
        self.assertRegex(self.last_line(), "outcome=answered .* exit=0$")

    def test_forks_and_nobody_answers(self):
        self.assert_refused(self.exchange("/fork-silently"), 504, "the handler did not finish in time")

    def test_lets_go_and_stays(self):
        self.assertEqual(get(self.address, "/let-go-and-stay"), (200, "stays"))
        self.assertRegex(self.last_line(), "outcome=answered .* exit=137$")

    def test_writes_100_megabytes_to_stderr(self):
        self.daemon.post("PATCH", "/functions/f?timeout=0")      # however busy the machine is
        before = support.resident_memory(self.daemon.process.pid)
        self.assertEqual(get(self.address, f"/stderr?{100 << 20}"), (200, "written"))
        self.last_line()
        self.assertIn("(output over 1048576 bytes is dropped)", self.function_log())
        self.assertLess(len(self.function_log()), 3 << 20)
        self.assertLess(support.resident_memory(self.daemon.process.pid) - before, 8 << 20)

    def test_cannot_forge_log_lines(self):
        self.assertEqual(get(self.address, "/controls")[0], 200)
        self.last_line()
        self.assertIn(r"| evil \x1b[2J\r2026-01-01T00:00:00.000Z forged > outcome=answered\x9b\u2028end",
                      self.function_log())

    def test_request_line_cannot_forge_either(self):
        client = self.connect()
        client.sendall(b"GET /\x1b[2J\rforged HTTP/1.1\r\n\r\n")
        self.assertIn(b"200 OK", client.recv(65536))
        self.assertIn(r'request="GET /\x1b[2J\rforged HTTP/1.1"', self.last_line())


class FailsToStart(InvocationCase):
    """The proof at deploy passed, and then something in the rootfs changed."""

    options = ("--start-timeout", "2")

    def tearDown(self):
        (self.daemon.rootfs("f") / "misbehave").unlink(missing_ok=True)
        super().tearDown()

    def misbehave(self, how: str):
        (self.daemon.rootfs("f") / "misbehave").write_text(how)

    def test_exits_before_it_is_ready(self):
        self.misbehave("exit")
        out = self.exchange("/")
        self.assertIn(b"502 Bad Gateway", out)
        self.assertIn(b"the handler exited with status 3 before it connected to /control.sock", out)
        self.assertRegex(self.last_line(), 'outcome=start-failed .* status=502 reason="the handler exited with')
        self.assertIn("| I refuse to start", self.function_log())

    def test_cannot_be_handed_a_client(self):
        """It connects, and so is ready; but it receives nothing."""
        self.misbehave("deaf")
        out = self.exchange("/")
        self.assertIn(b"502 Bad Gateway", out)
        self.assertIn(b"the handler was ready, but takes no client", out)
        self.assertRegex(self.last_line(), "outcome=start-failed .* wait=- .* status=502")

    def test_connects_and_lets_go(self):
        self.misbehave("let-go")
        out = self.exchange("/")
        # Or it does so when it has been handed a client, which it then leaves without an answer.
        self.assertRegex(out, rb"502 Bad Gateway(?s:.*)the handler (let go|was ready, but|exited)")
        self.assertRegex(self.last_line(), "outcome=(start-failed .* wait=-|no-answer) .* status=502")

    def test_never_connects(self):
        self.misbehave("never-connect")
        out = self.exchange("/")
        self.assertIn(b"504 Gateway Timeout", out)
        self.assertIn(b"the handler did not connect to /control.sock within 2 s", out)
        self.assertRegex(self.last_line(), "outcome=start-failed .* status=504")


class ShortTimeout(InvocationCase):
    options = ("--timeout", "1")

    def test_connection_ends_at_the_timeout(self):
        client = self.connect()
        client.sendall(b"GET /echo HTTP/1.1\r\n\r\n")
        self.assert_cut(client, b"HTTP/1.1 101 Switching Protocols\r\n\r\n")

    def test_answer_that_came_before_a_standstill_is_no_timeout(self):
        """Of what happened while the daemon was stopped, it learns before its timers run out."""
        with contextlib.closing(self.connect()) as client:
            client.sendall(b"GET /label?go: HTTP/1.1\r\n\r\n")
            wait_until(lambda: self.daemon.info("f")["running"] and not self.daemon.info("f")["starting"], "it runs")
            os.kill(self.daemon.process.pid, signal.SIGSTOP)
            try:
                self.daemon.release("f", "go")
                self.assertIn(b"200 OK", client.recv(65536))
                time.sleep(1.5)                         # longer than --timeout
            finally:
                os.kill(self.daemon.process.pid, signal.SIGCONT)
        self.assertRegex(self.last_line(), "^outcome=answered .* exit=0$")


class OutOfMemory(InvocationCase):
    """A process that the kernel kills for its memory ends its container at once, and is called by its name."""

    options = ("--memory", "64m", "--timeout", "0")

    def test_first_process(self):
        status, body = get(self.address, f"/memory?{256 << 20}")
        self.assertEqual((status, "the handler ran out of memory" in body), (502, True), body)
        self.assertRegex(self.last_line(), "^outcome=out-of-memory .* status=502 reason=")

    def test_child_while_its_parent_waits(self):
        before = self.daemon.outcomes("f").get("out-of-memory", 0)
        status, body = get(self.address, f"/memory-of-child?{256 << 20}")
        self.assertEqual((status, "the handler ran out of memory" in body), (502, True), body)
        self.assertRegex(self.last_line(), "^outcome=out-of-memory .* status=502 reason=")
        self.assertEqual(self.daemon.outcomes("f")["out-of-memory"], before + 1)

    def test_when_faasd_comes_to_look_too_late(self):
        """A container's cgroup goes with it, and on v2 the one above remembers."""
        if not faasd.Cgroups(self.daemon.run_dir).kills_whole:
            self.skipTest("cgroup v1 does not tell of a container that is gone")
        client = self.connect()
        client.sendall(f"GET /memory?late:{256 << 20} HTTP/1.1\r\n\r\n".encode())
        wait_until(lambda: self.daemon.info("f")["running"] == 1, "it is handed over")
        os.kill(self.daemon.process.pid, signal.SIGSTOP)
        try:
            cgroups = support.container_cgroups(self.daemon)
            self.daemon.release("f", "late")
            wait_until(lambda: not any(map(os.path.exists, cgroups)), "its cgroups are gone")
        finally:
            os.kill(self.daemon.process.pid, signal.SIGCONT)
        self.assertIn(b"the handler ran out of memory", client.recv(65536))
        self.assertRegex(self.last_line(), "^outcome=out-of-memory .* status=502 reason=")

    def test_killed_for_something_else(self):
        """By root; that others of its function ran out of memory before is nothing to it."""
        client = self.connect()
        client.sendall(b"GET /hang HTTP/1.1\r\n\r\n")

        def serving() -> list[int]:
            """Those that ignore SIGTERM, as it does once it has read the request."""
            pids = []
            for pid in support.container_pids(self.daemon):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):        # a start has just gone on
                    ignored = re.search(r"SigIgn:\t(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
                    if int(ignored, 16) >> signal.SIGTERM - 1 & 1:
                        pids.append(pid)
            return pids
        os.kill(wait_until(serving, "the handler hangs")[0], signal.SIGKILL)
        self.assertIn(b"was killed by SIGKILL (out of memory?)", client.recv(65536))
        self.assertRegex(self.last_line(), "^outcome=no-answer .* exit=137")

    def test_of_a_child_after_a_restart(self):
        client = self.connect()
        client.sendall(f"GET /memory-of-child?restarted:{256 << 20} HTTP/1.1\r\n\r\n".encode())
        wait_until(lambda: self.daemon.info("f")["running"] == 1, "it is handed over")
        self.daemon.kill()
        self.daemon.start()
        self.assertEqual(self.daemon.info("f")["running"], 1)
        self.daemon.release("f", "restarted")
        self.assertIn(b"the handler ran out of memory", client.recv(65536))

    def test_before_it_is_ready(self):
        source = "import os, time\nif os.fork() == 0:\n    bytearray(256 << 20)\nos.wait()\ntime.sleep(3600)\n"
        result = self.daemon.faas("new", "g", "--memory", "64m", "--start-timeout", f"{4 * support.PATIENCE:g}",
                                  stdin=support.handler_image(source), check=False)
        self.assertIn("the program ran out of memory before it listened", result.stderr)

    def test_after_half_an_answer(self):
        client = self.connect()
        client.sendall(f"GET /half-and-memory?{256 << 20} HTTP/1.1\r\n\r\n".encode())
        self.assert_cut(client, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
        self.assertRegex(self.last_line(), "^outcome=out-of-memory ")


class Load(InvocationCase):
    """Many connections, and beside them one that stays open all the time (--timeout 0)."""

    options = ("--queue-timeout", "10m", "--timeout", "10m", "--start-timeout", "10m")      # the machine may be busy

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        address = cls.daemon.deploy("forever", support.handler_image(), "--timeout", "0")
        cls.wait_logged("forever")
        cls.open = socket.create_connection((address, 80), timeout=support.READY_SECONDS)
        cls.addClassCleanup(cls.open.close)
        cls.open.sendall(b"GET /echo HTTP/1.1\r\n\r\n")
        cls.opened = time.monotonic()
        assert b"101" in cls.open.recv(65536)
        cls.wait_containers(1)

    def test_zz_connection_outlives_the_default_timeout(self):
        time.sleep(max(0.0, self.opened + faasd.Options().timeout + 1 - time.monotonic()))
        self.open.sendall(b"still here?")
        self.assertEqual(self.open.recv(65536), b"still here?")

    def test_many_connections_8_at_a_time(self):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: self.exchange("/id"), range(CONNECTIONS)))
        self.assertEqual({answer.partition(b"\r\n")[0] for answer in answers}, {b"HTTP/1.1 200 OK"})
        ids = {answer.partition(b"\r\n\r\n")[2] for answer in answers}
        self.assertEqual(len(ids), CONNECTIONS)

    def test_burst_of_64_waits_in_order_and_loses_none(self):
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda _: self.exchange("/id"), range(64)))
        self.assertEqual({answer.partition(b"\r\n")[0] for answer in answers}, {b"HTTP/1.1 200 OK"})
        self.assertEqual(len({answer.partition(b"\r\n\r\n")[2] for answer in answers}), 64)

    def test_starts_in_flight_are_at_most_the_cpus(self):
        """Count runc processes whose handler is not there yet, while more clients wait than there are CPUs.

        A start that takes over a second no longer counts, so on a busy machine there are some more.
        """
        most = 0
        stop = threading.Event()
        root = f"--root {self.daemon.run_dir}/runc "

        def watch():
            nonlocal most
            while not stop.is_set():
                # By id: a child of runc has its command line for a moment, until it is `runc init`.
                running = {line.split()[-1] for line in support.processes(self.daemon.directory.name)
                           if root in line and " run " in line}
                most = max(most, sum(not self.is_ready(container) for container in running))
                time.sleep(0.01)                # a start takes longer
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(32) as pool:
                list(pool.map(lambda _: self.exchange("/label?0.5"), range(32)))
        finally:
            stop.set()
            watcher.join()
        self.assertLess(most, max(16, 2 * os.cpu_count()))
        self.assertGreater(most, 0)

    @staticmethod
    def is_ready(container: str) -> bool:
        """The control socket is in /proc/net/unix as listening for as long as the handler has not connected."""
        return not any(f"/{container}/control.sock" in line and line.split()[3] == "00010000"
                       for line in Path("/proc/net/unix").read_text().splitlines())


if __name__ == "__main__":
    unittest.main()
