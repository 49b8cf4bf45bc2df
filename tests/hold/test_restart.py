"""A daemon goes and another comes: what serves a client goes on, what waits is kept, nothing is left over."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
import unittest.mock
from pathlib import Path

import support
from clients import get, read_all, request, reset
from support import wait_until

import faasd

RESTARTS = int(os.environ.get("FAASD_RESTARTS", "8"))


class Client:
    """A connection that has sent a request, and reads its answer in its own time."""

    def __init__(self, address: str, path: str):
        self.socket = request(address, path)
        self.received = ""

    def read_line(self) -> str:
        """Return the next line of the answer; "" at its end."""
        while "\n" not in self.received and (data := self.socket.recv(65536)):
            self.received += data.decode()
        line, _, self.received = self.received.partition("\n")
        return line

    def read_number(self) -> int:
        """Return the next number that /work sends."""
        while not (line := self.read_line()).isdigit():
            assert line, "the answer has ended"
        return int(line)

    def rest(self) -> str:
        self.received += read_all(self.socket).decode()
        return self.received

    def reset(self) -> None:
        reset(self.socket)


@contextlib.contextmanager
def steady_load(addresses: list[str]):
    """Send requests, one after the other, to each of addresses; the value is a list of those that fail."""
    over, failures, counts = threading.Event(), [], []

    def load(address: str) -> None:
        count = 0
        while not over.is_set():
            try:
                answer = Client(address, "/").rest()
            except OSError as error:
                answer = repr(error)
            count += 1
            if not answer.startswith("HTTP/1.1 200 "):
                failures.append(answer)
        counts.append(count)
    threads = [threading.Thread(target=load, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert min(counts) >= 2, counts


class RestartCase(unittest.TestCase):
    def start(self, *arguments: str, **more) -> support.Daemon:
        daemon = support.Daemon(*arguments, **more).start()
        self.addCleanup(daemon.close)
        return daemon

    def deploy(self, daemon: support.Daemon, *options: str, label: str = "1") -> str:
        return daemon.deploy("f", support.small_image(label), *options)

    def client(self, address: str, path: str) -> Client:
        client = Client(address, path)
        self.addCleanup(client.socket.close)
        return client

    def leave(self, daemon: support.Daemon) -> None:
        self.assertEqual(daemon.stop(signal.SIGHUP), 0, daemon.log())

    def release(self, daemon: support.Daemon, key: str) -> None:
        daemon.release("f", key)

    def handed_over(self, daemon: support.Daemon, count: int) -> None:
        wait_until(lambda: daemon.info("f")["running"] == count, f"{count} run")

    def log(self, daemon: support.Daemon) -> str:
        return daemon.faas("logs", "f", "-n", "100000").stdout

    def check_nothing_left(self, daemon: support.Daemon) -> None:
        daemon.wait_idle("f")
        wait_until(lambda: not any((daemon.run_dir / "containers").iterdir()), "no container is left, of any function")
        self.assertEqual(support.list_containers(daemon), [])
        self.assertEqual(support.container_cgroups(daemon), [])


class FunctionCgroups(RestartCase):
    """Each function has a cgroup above those of its containers."""

    def expect(self, daemon: support.Daemon, *functions: str) -> None:
        self.assertEqual(support.function_cgroups(daemon) - {"function-probe"},
                         {f"function-{name}" for name in functions})

    def test_as_long_as_the_function(self):
        daemon = self.start()
        image = support.small_image()
        names = ["a", "a-b", "0123456789ab", "function-a", "f" * 63]       # one as a container's
        for name in names:
            daemon.deploy(name, image, "--warm", "1")
            daemon.wait_warm(name, 1)
        self.expect(daemon, *names)
        containers = {Path(path).name: Path(path).parent.name for path in support.container_cgroups(daemon)}
        self.assertEqual(sorted(containers.values()), sorted(f"function-{name}" for name in names))
        daemon.remove("a")
        self.expect(daemon, *names[1:])
        daemon.kill()
        daemon.start()
        for name in names[1:]:
            daemon.wait_warm(name, 1)
        self.assertFalse(containers.keys() & {Path(path).name for path in support.container_cgroups(daemon)})
        self.expect(daemon, *names[1:])
        for name in names[1:]:
            self.assertEqual(get(daemon.info(name)["address"])[0], 200)

    def test_deploy_that_fails(self):
        daemon = self.start()
        image = support.small_image(Entrypoint=["/usr/bin/perl", "-e", "1"])
        result = daemon.faas("new", "g", stdin=image, check=False)
        self.assertIn("before it listened", result.stderr)
        self.expect(daemon)

    def test_container_of_an_older_daemon(self):
        older = {"Cgroups.path": "lambda self, function, container_id: f'{self.parent}/{container_id}'"}
        for killed in (False, True):
            with self.subTest(killed=killed):
                daemon = self.start(constants=older)
                client = self.client(self.deploy(daemon), "/work?go")
                client.read_number()
                daemon.faas("new", "g", "--warm", "1", stdin=support.small_image())
                daemon.wait_warm("g", 1)
                if killed:
                    daemon.kill()
                else:
                    self.leave(daemon)
                daemon.constants = None
                daemon.start()
                self.assertEqual(daemon.info("f")["running"], 1)
                daemon.wait_warm("g", 1)
                self.expect(daemon, "g")
                self.release(daemon, "go")
                self.assertTrue(client.rest().endswith("done\n"))
                daemon.remove("g")
                self.check_nothing_left(daemon)
                self.assertEqual(daemon.stop(), 0)
                self.assertEqual(support.remains(daemon), [])


class Survival(RestartCase):
    def read_on(self, client: Client, last: int) -> int:
        """Read some more numbers after last; return the one read last."""
        while (number := client.read_number()) < last + 30:
            continue
        return number

    def test_over_restarts_and_crashes(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?go")
        seen = [client.read_number()]
        wait_until(lambda: f"working {seen[0]}" in self.log(daemon), "the first lines are in the log")
        for end in (self.leave, support.Daemon.kill, self.leave):
            end(daemon)
            seen.append(self.read_on(client, seen[-1]))         # it works while no daemon is there
            daemon.start()
            self.assertEqual(daemon.info("f")["running"], 1)
            seen.append(self.read_on(client, seen[-1]))
            wait_until(lambda: f"working {seen[-1]}" in self.log(daemon), "it is in the log")
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.check_nothing_left(daemon)
        printed = self.log(daemon)
        for number in (0, *seen):
            self.assertIn(f"| working {number}\n", printed)
        self.assertIn("| done\n", printed)
        line, = re.findall("outcome=.*", printed)
        self.assertRegex(line, r'outcome=answered client=\S+ request="" wait=- start=- run=\S+ received=\d+ sent=\d+ '
                               r"exit=-$")
        self.assertEqual(daemon.outcomes("f"), {"answered": 1})
        self.assertEqual(get(daemon.info("f")["address"]), (200, "1"))

    def test_who_prints_more_than_a_pipe_holds_waits_for_the_next_daemon(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/flood?go")
        self.handed_over(daemon, 1)
        container = daemon.container()
        self.leave(daemon)
        self.release(daemon, "go")
        pid, = support.container_pids(daemon)
        wait_until(lambda: "pipe" in Path(f"/proc/{pid}/wchan").read_text(), "it waits for a reader of its output")
        daemon.start()
        self.assertTrue(client.rest().endswith("flooded"))
        wait_until(lambda: "| flood 2999 " in self.log(daemon), "all of it is in the log")
        self.assertNotRegex(self.log(daemon), "Error")
        self.check_nothing_left(daemon)
        self.assertFalse(container.exists())

    def test_over_a_start_that_fails(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?go")
        client.read_number()
        self.leave(daemon)
        daemon.socket.mkdir()                   # where the control API should be
        failed = subprocess.run(daemon.command(), capture_output=True, timeout=support.READY_SECONDS, check=False)
        self.assertEqual(failed.returncode, 1, failed.stderr)
        daemon.socket.rmdir()
        daemon.start()
        self.assertEqual(daemon.info("f")["running"], 1)
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.check_nothing_left(daemon)

    def test_an_image_stays_while_somebody_runs_on_it(self):
        daemon = self.start("--keep-versions", "1")
        client = self.client(self.deploy(daemon), "/work?go")
        client.read_number()
        old, = (daemon.state_dir / "images/f").iterdir()
        address = self.deploy(daemon, label="2")
        self.leave(daemon)
        daemon.start()
        self.assertEqual(get(address), (200, "2"))
        self.deploy(daemon, label="3")
        self.assertEqual(get(address), (200, "3"))
        self.assertTrue(old.exists())
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        wait_until(lambda: len(list((daemon.state_dir / "images/f").iterdir())) == 1, "old images are removed")
        self.check_nothing_left(daemon)


class Adopted(RestartCase):
    """What the next daemon does with a container that it has not started is what it does with its own."""

    def adopt(self, path: str, *options: str, arguments: tuple[str, ...] = ()) -> tuple[support.Daemon, Client]:
        daemon = self.start(*arguments)
        client = self.client(self.deploy(daemon, *options), path)
        self.handed_over(daemon, 1)
        return daemon, client

    def restart(self, daemon: support.Daemon) -> None:
        daemon.kill()
        daemon.start()
        self.assertEqual(daemon.info("f")["running"], 1)

    def test_without_an_answer(self):
        daemon, client = self.adopt("/silent?go")
        self.restart(daemon)
        self.release(daemon, "go")
        answer = client.rest()
        self.assertTrue(answer.startswith("HTTP/1.1 502 "), answer)
        self.assertIn("the handler ended without an answer", answer)
        self.check_nothing_left(daemon)
        self.assertEqual(daemon.outcomes("f"), {"no-answer": 1})

    def test_over_its_time(self):
        daemon, client = self.adopt("/silent?never", "--timeout", "1h")
        daemon.faas("set", "f", "--timeout", "1s")      # for new ones, and for adopted ones
        self.restart(daemon)
        self.assertTrue(client.rest().startswith("HTTP/1.1 504 "))
        self.check_nothing_left(daemon)
        self.assertEqual(daemon.outcomes("f"), {"timeout": 1})

    def test_drained_by_a_stop(self):
        daemon, client = self.adopt("/work?go")
        self.restart(daemon)
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in daemon.log(), "it stops")
        client.read_number()
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        self.assertEqual(support.remains(daemon), [])

    def test_killed_by_a_stop_after_the_drain_timeout(self):
        daemon, client = self.adopt("/silent?never", arguments=("--drain-timeout", "1s"))
        self.restart(daemon)
        self.assertEqual(daemon.stop(), 0)
        self.assertTrue(client.rest().startswith("HTTP/1.1 503 "))
        self.assertEqual(support.remains(daemon), [])

    def test_drained_by_rm(self):
        daemon, client = self.adopt("/work?go")
        self.restart(daemon)
        remove = subprocess.Popen([*support.FAAS, "--socket", daemon.socket, "rm", "f"], stdout=subprocess.DEVNULL)
        self.addCleanup(remove.wait)
        wait_until(lambda: daemon.info("f")["state"] == "removing", "it is being removed")
        client.read_number()
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.assertEqual(remove.wait(support.READY_SECONDS), 0)
        self.assertEqual(support.list_containers(daemon), [])
        self.assertFalse((daemon.state_dir / "images/f").exists())

    def test_counts_for_concurrency(self):
        daemon, client = self.adopt("/work?go", "--concurrency", "1")
        self.restart(daemon)
        second = self.client(daemon.info("f")["address"], "/")
        wait_until(lambda: daemon.info("f")["queued"] == 1, "the second waits")
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.assertTrue(second.rest().endswith("\r\n\r\n1"))


class NotAdopted(RestartCase):
    def test_warm_ones_are_ended_and_made_again(self):
        daemon = self.start()
        self.deploy(daemon, "--warm", "2")
        before = daemon.wait_warm("f", 2)
        self.leave(daemon)
        self.assertEqual(support.list_containers(daemon), [])
        self.assertEqual(list((daemon.run_dir / "containers").iterdir()), [])
        self.assertEqual(support.addresses(), ["10.0.0.10/32"])
        daemon.start()
        between = daemon.wait_warm("f", 2)
        daemon.kill()
        daemon.start()
        after = daemon.wait_warm("f", 2)
        self.assertEqual(len(before | between | after), 6)

    def test_who_has_lost_its_client_is_ended(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/silent?never")
        self.handed_over(daemon, 1)
        daemon.kill()
        client.reset()
        daemon.start()
        self.check_nothing_left(daemon)

    def test_whose_function_is_broken_is_ended(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?never")
        client.read_number()
        self.leave(daemon)
        for path in (daemon.state_dir / "images/f").glob("*/image.json"):
            path.unlink()
        daemon.start()
        self.assertEqual(daemon.info("f")["state"], "broken")
        with self.assertRaises(ConnectionResetError):           # so that half an answer does not look whole
            client.rest()
        self.check_nothing_left(daemon)
        self.assertEqual(support.addresses(), [])


    def test_a_fault_of_ours_breaks_one_function_only(self):
        daemon = self.start()
        client, other = self.client(self.deploy(daemon), "/work?never"), daemon.deploy("other", support.small_image())
        client.read_number()
        self.leave(daemon)
        daemon.constants = {"Function.adopt": "None"}
        daemon.start()
        self.assertIn("faasd's log has the detail", daemon.info("f")["error"])
        self.assertIn("Traceback", daemon.log())
        self.assertEqual(get(other), (200, "1"))
        self.expect_traceback(daemon)
        self.check_nothing_left(daemon)

    def expect_traceback(self, daemon: support.Daemon) -> None:
        """The log has the detail, as it should; the end of a test looks for others."""
        log = daemon.directory / "log"
        log.write_text(log.read_text().replace("Traceback", "traceback"))

    def test_container_of_an_invocation_that_a_fault_of_ours_has_cut_is_ended(self):
        daemon = self.start(constants={"Invocation._conclude": "None"})
        self.assertEqual(get(self.deploy(daemon, "--warm", "0", "--reuse", "0"))[0], 200)
        daemon.wait_log("an invocation failed inside faasd")
        self.expect_traceback(daemon)
        self.check_nothing_left(daemon)


class Nohup(RestartCase):
    def test_a_terminal_that_closes_does_not_end_it(self):
        daemon = self.start(wrapper=("nohup",))
        daemon.process.send_signal(signal.SIGHUP)
        self.assertEqual(daemon.api("GET", "/healthz")[0], 200)
        self.assertEqual(daemon.stop(), 0)
        self.assertNotIn("leaving", daemon.log())


class Waiting(RestartCase):
    def hang_up(self, *arguments: str) -> tuple[support.Daemon, Client, Client]:
        """Return a daemon that leaves while one client is served and one waits for it."""
        daemon = self.start(*arguments)
        address = self.deploy(daemon, "--concurrency", "1", "--queue-timeout", "1h")
        running = self.client(address, "/work?first")
        running.read_number()
        waiting = self.client(address, "/work?second")
        wait_until(lambda: daemon.info("f")["queued"] == 1, "the second waits")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "leaving: 1 invocation running\n" in daemon.log(), "it leaves")
        return daemon, running, waiting

    def test_is_handed_over_before_the_daemon_leaves(self):
        daemon, running, waiting = self.hang_up()
        self.release(daemon, "first")
        self.assertTrue(running.rest().endswith("done\n"))
        waiting.read_number()
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        daemon.start()
        self.release(daemon, "second")
        self.assertTrue(waiting.rest().endswith("done\n"))
        self.check_nothing_left(daemon)

    def check_refused(self, daemon: support.Daemon, running: Client, waiting: Client) -> None:
        self.assertTrue(waiting.rest().startswith("HTTP/1.1 503 "))
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        daemon.start()
        running.read_number()
        self.release(daemon, "first")
        self.assertTrue(running.rest().endswith("done\n"))
        self.check_nothing_left(daemon)

    def test_gets_an_honest_503_after_the_drain_timeout(self):
        self.check_refused(*self.hang_up("--drain-timeout", "1s"))

    def test_gets_it_at_once_after_a_second_signal(self):
        daemon, running, waiting = self.hang_up("--drain-timeout", "1h")
        daemon.process.send_signal(signal.SIGHUP)
        self.check_refused(daemon, running, waiting)


class ServiceManager:
    """systemd's part of the bargain: takes notifications, keeps descriptors, passes them to the next daemon."""

    # The program that becomes the daemon: LISTEN_PID must be its own pid.
    PASS = ("import os, sys\n"
            "for number in range(int(os.environ['LISTEN_FDS'])):\n"
            "    os.dup2(200 + number, 3 + number)\n"
            "    os.close(200 + number)\n"
            "os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.argv[1], sys.argv[1:])\n")

    def __init__(self, daemon: support.Daemon):
        self.daemon = daemon
        self.states: list[str] = []
        self.kept: list[tuple[str, int]] = []           # FDNAME, descriptor
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(daemon.directory / "notify"))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        daemon.env = {"NOTIFY_SOCKET": str(daemon.directory / "notify")}
        daemon.wrapper = (sys.executable, "-c", self.PASS)

    def _serve(self) -> None:
        while True:
            message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 16)
            if not message:
                return
            fields = dict(line.split("=", 1) for line in message.decode().splitlines())
            with self._lock:
                self.states.append(message.decode())
                if "FDSTORE" in fields:
                    self.kept += [(fields["FDNAME"], descriptor) for descriptor in descriptors]
                for entry in [entry for entry in self.kept if "FDSTOREREMOVE" in fields]:
                    if entry[0] == fields["FDNAME"]:
                        os.close(entry[1])
                        self.kept.remove(entry)

    def start(self) -> None:
        with self._lock:
            for number, (_, descriptor) in enumerate(self.kept):
                os.dup2(descriptor, 200 + number, inheritable=False)
            count = len(self.kept)
            self.daemon.pass_fds = tuple(range(200, 200 + count))
            self.daemon.env.update(LISTEN_FDS=str(count), LISTEN_FDNAMES=":".join(name for name, _ in self.kept))
        try:
            self.daemon.start()
        finally:
            for descriptor in self.daemon.pass_fds:
                os.close(descriptor)

    def names(self) -> list[str]:
        with self._lock:
            return [name for name, _ in self.kept]

    def filters(self) -> list[list[tuple[int, int, int, int]]]:
        with self._lock:
            sockets = [socket.socket(fileno=os.dup(descriptor)) for _, descriptor in self.kept]
        with contextlib.ExitStack() as stack:
            return [faasd.filter_of(stack.enter_context(kept)) for kept in sockets]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._socket.close()
        for _, descriptor in self.kept:
            os.close(descriptor)


def is_held_off(address: str) -> bool:
    try:
        socket.create_connection((address, 80), 0.5).close()
    except TimeoutError:
        return True
    return False


class Kept(RestartCase):
    """Listening sockets that the service manager keeps."""

    def managed(self, *arguments: str, **options) -> tuple[support.Daemon, ServiceManager]:
        daemon = support.Daemon(*arguments, **options)
        manager = ServiceManager(daemon)
        self.addCleanup(manager.close)
        manager.start()
        self.addCleanup(daemon.close)
        return daemon, manager

    def test_who_comes_while_no_daemon_runs_is_answered_by_the_next(self):
        daemon, manager = self.managed()
        address = self.deploy(daemon)
        self.assertEqual(manager.names(), ["10.0.0.10-80"])
        for end in (self.leave, support.Daemon.kill):
            end(daemon)
            clients = [self.client(address, "/") for _ in range(20)]
            manager.start()
            for client in clients:
                self.assertTrue(client.rest().endswith("\r\n\r\n1"))
        self.assertEqual(manager.names(), ["10.0.0.10-80"])
        stored = [state for state in manager.states if state.startswith("FDSTORE=1")]
        self.assertEqual(len(stored), 1, "what came back is kept already")

    def test_is_forgotten_with_its_function(self):
        daemon, manager = self.managed()
        address = self.deploy(daemon)
        self.leave(daemon)
        manager.start()
        daemon.remove("f")
        wait_until(lambda: manager.names() == [], "nothing is kept")
        self.assertEqual(self.deploy(daemon), address)
        self.assertEqual(get(address), (200, "1"))
        self.assertEqual(manager.names(), ["10.0.0.10-80"])

    def test_a_stop_refuses_connections_though_the_socket_is_kept(self):
        daemon, manager = self.managed()
        address = self.deploy(daemon)
        client = self.client(address, "/work?go")
        client.read_number()
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in daemon.log(), "it stops")
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((address, 80)).close()
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)

    def test_who_waits_in_one_function_does_not_hold_up_the_others(self):
        daemon, manager = self.managed()
        address = self.deploy(daemon, "--concurrency", "1", "--queue-timeout", "1h")
        other = daemon.deploy("other", support.small_image())
        running = self.client(address, "/work?first")
        running.read_number()
        waiting = self.client(address, "/work?second")
        wait_until(lambda: daemon.info("f")["queued"] == 1, "one waits")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any("STOPPING=1" in state for state in manager.states), "the daemon begins to leave")
        self.assertEqual(get(other), (200, "1"))
        self.release(daemon, "first")
        self.assertTrue(running.rest().endswith("done\n"))
        waiting.read_number()
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        manager.start()
        self.release(daemon, "second")
        self.assertTrue(waiting.rest().endswith("done\n"))
        self.check_nothing_left(daemon)

    def test_a_second_signal_right_behind_the_first_is_not_lost(self):
        """A daemon leaves in two rounds, the first of which may be over before it has looked for signals."""
        daemon, manager = self.managed("--drain-timeout", "1h", constants={"LONG_START_SECONDS": 3600})
        address = self.deploy(daemon, "--warm", "0", "--start-timeout", "1h", "--queue-timeout", "1h")
        (daemon.rootfs("f") / "handler.pl").write_text("sleep")
        waiting = self.client(address, "/")
        wait_until(lambda: daemon.info("f")["starting"] == 1, "a start is under way that never ends")
        for _ in range(2):              # of two that are pending at a time, the kernel drops one
            daemon.process.send_signal(signal.SIGHUP)
            status = Path(f"/proc/{daemon.process.pid}/status")
            wait_until(lambda: "ShdPnd:\t0000000000000000" in status.read_text(), "it has come", longest_pause=0.001)
        self.assertTrue(waiting.rest().startswith("HTTP/1.1 503 "))
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        manager.start()
        self.check_nothing_left(daemon)

    def test_port_of_the_api(self):
        """Whoever had it while no daemon runs would be sent the token, and keep the next daemon from starting."""
        directory = support.temporary_directory()
        (directory / "token").write_text("0123456789abcdef")
        (directory / "token").chmod(0o600)
        daemon, manager = self.managed("--api", "127.0.0.1:8000", "--api-token-file", str(directory / "token"),
                                       "--port", "8000", directory=directory)
        for end in (self.leave, support.Daemon.kill):
            end(daemon)
            with self.assertRaises(OSError):
                socket.create_server(("127.0.0.1", 8000)).close()
            with socket.create_connection(("127.0.0.1", 8000)) as client:
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer 0123456789abcdef\r\n"
                               b"Connection: close\r\n\r\n")
                manager.start()
                self.assertIn(b" 200 ", read_all(client))
        self.assertEqual(get(self.deploy(daemon), port=8000), (200, "1"))
        for api, name in (("0.0.0.0:8000", "0.0.0.0-8000"), ("127.0.0.1:8000", "127.0.0.1-8000"),
                          ("[::1]:8000", "..1-8000")):
            self.leave(daemon)
            daemon.arguments = ("--api", api, *daemon.arguments[2:4])       # what listened there before is in the way
            manager.start()
            wait_until(lambda name=name: set(manager.names()) == {name, "10.0.0.10-80"}, "the others are closed")
        self.assertEqual(daemon.stop(), 0)
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("::1", 8000)).close()

    def test_who_was_connected_to_a_daemon_that_was_killed_as_it_stopped_is_served(self):
        """The kernel completes the connection while the socket drops what newcomers, and most clients, send."""
        daemon, manager = self.managed(constants={"ARRIVAL_SECONDS": 600})
        address = self.deploy(daemon)
        with socket.create_connection((address, 80), support.READY_SECONDS) as client:
            daemon.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_held_off(address), "nobody else is let in")
            daemon.kill()
            client.sendall(b"GET / HTTP/1.1\r\n")
            daemon.constants = None
            manager.start()
            wait_until(lambda: daemon.info("f")["running"] == 1, "it is let in")
            client.sendall(b"\r\n")
            with client.makefile("rb") as answer:
                self.assertIn(b" 200 ", answer.readline())

    def test_nobody_s_are_closed(self):
        daemon, manager = self.managed()
        address = self.deploy(daemon)
        self.leave(daemon)
        pipe = os.pipe()
        manager.kept += [("a-pipe", descriptor) for descriptor in pipe]
        daemon.arguments = ("--port", "8080")
        manager.start()
        wait_until(lambda: manager.names() == ["10.0.0.10-8080"], "only what is used is kept")
        self.assertEqual(get(address, port=8080), (200, "1"))
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((address, 80)).close()

    def test_what_makes_no_sense_is_not_taken(self):
        for count in ("some", "", "999999"):
            with unittest.mock.patch.dict(os.environ, LISTEN_FDS=count, LISTEN_PID=str(os.getpid())), \
                    self.assertLogs("faasd", "WARNING") as logged:
                faasd.ListenerStore(None).forget_unclaimed()
                self.assertNotIn("LISTEN_FDS", os.environ)
            self.assertIn(f"because LISTEN_FDS is {count!r}", logged.output[0])

    def test_another_choice_of_lan_opens_them_anew(self):
        daemon, manager = self.managed()
        address = self.deploy(daemon)
        for lan, mark in (("allow", None), ("deny", faasd.packet_mark(daemon.run_dir))):
            self.leave(daemon)
            daemon.arguments = ("--lan", lan)
            manager.start()
            self.assertEqual(get(address), (200, "1"))
            wanted = faasd.listener_filter(address, 80, mark)
            wait_until(lambda wanted=wanted: manager.filters() == [wanted], f"what is kept is as --lan {lan} says")

    def test_restarts_under_load(self):
        """No request fails, nothing leaks."""
        daemon, manager = self.managed()
        addresses = [self.deploy(daemon), daemon.deploy("reused")]
        before = self.measure(daemon, addresses)
        daemon.set("f", "--warm", "auto")
        daemon.set("reused", "--reuse", "20")
        with steady_load(addresses * 2) as failures:
            for _ in range(RESTARTS):
                self.leave(daemon)
                manager.start()
        self.assertEqual(failures, [])
        for name in ("f", "reused"):
            daemon.set(name, "--warm", "0", "--reuse", "1")
        self.assertEqual(self.measure(daemon, addresses), before)
        self.assertEqual(len(manager.names()), 2)

    def measure(self, daemon: support.Daemon, addresses: list[str]) -> dict[str, object]:
        """Return the daemon's footprint after each function has been used once; its log is open from then on."""
        for name, address in zip(("f", "reused"), addresses, strict=True):
            daemon.wait_warm(name, 0)
            self.assertEqual(get(address)[0], 200)
            daemon.wait_warm(name, 0)
        return support.footprint(daemon)


class Systemd:
    """A systemd that runs the unit as it is, in namespaces and cgroups of its own, but in our network namespace."""

    PROGRAM = Path("/lib/systemd/systemd")
    BOOT = """
        mount --make-rprivate /
        mount -t tmpfs tmpfs /usr/local/lib
        mkdir /usr/local/lib/faasd
        cp "$1/faasd.py" /usr/local/lib/faasd/
        mkdir /usr/local/lib/units
        sed 's|/usr/sbin/faasd|/usr/local/lib/faasd/faasd.py|' "$1/packaging/faasd.service" \
            >/usr/local/lib/units/faasd.service
        umount --lazy /proc             # one that stays below would let containers mount theirs whatever the unit hides
        mount -t proc proc /proc
        mount -t tmpfs tmpfs /run
        mount -t tmpfs tmpfs /var/lib
        # What shows the cgroups from ours down: systemd takes the top for its own.
        hierarchies=$(awk '$5 ~ "^/sys/fs/cgroup" { for (i = 6; i < NF; i++)
            if ($i == "-" && $(i + 1) ~ "^cgroup") print $5, $(i + 1), $(i + 3) }' /proc/self/mountinfo)
        umount --recursive /sys/fs/cgroup
        mount -t tmpfs tmpfs /sys/fs/cgroup
        echo "$hierarchies" | while read -r path kind options; do
            mkdir -p "$path"
            mount -t "$kind" -o "$(echo "$options" | sed 's/^r[wo],\\?//')" "$kind" "$path"
        done
        mkdir -p /run/systemd/system/faasd.service.d
        cp /usr/local/lib/units/faasd.service /run/systemd/system/
        echo "[Unit]\nDefaultDependencies=no\n[Service]\nStandardError=append:/run/stderr\nTimeoutStopSec=2" \
            >/run/systemd/system/faasd.service.d/no-boot.conf
        echo "[Unit]\nDefaultDependencies=no\nWants=faasd.service" >/run/systemd/system/test.target
        exec env container=test SYSTEMD_LOG_TARGET=console "$2" --system --unit=test.target --show-status=no
    """

    def __init__(self):
        self.name = support.PREFIX + "systemd"
        self.daemon = support.Daemon()          # for its clients; never started
        self._log = (self.daemon.directory / "log").open("wb")
        self._process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup",
             "sh", "-ec", self.BOOT, "sh", support.TOP, self.PROGRAM],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, preexec_fn=self._enter_cgroups)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(wait_until(lambda: children.read_text().split(), "systemd's process is there")[0])
        for mount, kind in faasd.read_mounts():         # v2: no process may be beside what has controllers (cgroups(7))
            if kind == "cgroup2":
                Path(mount, "cgroup.procs").write_text(str(self._process.pid))
        root = Path(f"/proc/{self.pid}/root")
        self.daemon.socket = root / "run/faasd/faasd.sock"
        self.daemon.run_dir, self.daemon.state_dir = root / "run/faasd", root / "var/lib/faasd"

    @staticmethod
    def _remove(cgroup: Path) -> bool:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    def _enter_cgroups(self) -> None:
        for mount, kind in faasd.read_mounts():
            if kind in ("cgroup", "cgroup2"):
                cgroup = Path(mount, self.name)
                cgroup.mkdir()
                if kind == "cgroup2":           # v2: what a child has, its parent must pass on; here that is the top
                    there = (cgroup.parent / "cgroup.controllers").read_text().split()
                    for controller in {"cpu", "memory", "pids"} & set(there):
                        (cgroup.parent / "cgroup.subtree_control").write_text(f"+{controller}")
                for name in ("cpuset.cpus", "cpuset.mems"):     # v1: empty at first
                    if kind == "cgroup" and (cgroup / name).exists():
                        (cgroup / name).write_text((cgroup.parent / name).read_text())
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    def systemctl(self, *arguments: str) -> str:
        result = subprocess.run(["nsenter", f"--target={self.pid}", "--mount", "--pid", "systemctl", *arguments],
                                capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise AssertionError(f"systemctl {arguments}: {result.stderr} {self.daemon.log()[-2000:]}")
        return result.stdout.strip()

    def show(self, field: str) -> str:
        return self.systemctl("show", "--value", f"--property={field}", "faasd")

    def close(self) -> None:
        self._process.kill()                    # and with it all its namespace
        self._process.wait()
        self._log.close()
        for cgroup in map(Path, support.cgroup_directories(self.name)):
            for path in [*sorted(cgroup.rglob("*/"), reverse=True), cgroup]:
                if path.is_dir():
                    wait_until(lambda path=path: self._remove(path), f"{path} is left by its processes")
        for address in support.addresses():
            subprocess.run(["ip", "addr", "del", address, "dev", "lo"], check=True)
        shutil.rmtree(self.daemon.directory)


def skip_unless_systemd_runs(test: unittest.TestCase) -> None:
    if not Systemd.PROGRAM.exists():
        test.skipTest("systemd is not installed: apt install systemd")
    version = int(subprocess.run([Systemd.PROGRAM, "--version"], capture_output=True, check=True).stdout.split()[1])
    # 256 and 257 run with cgroup v1 below $container, where they follow what the host has mounted.
    if version >= 258 and ("/sys/fs/cgroup", "cgroup2") not in faasd.read_mounts():
        test.skipTest(f"systemd {version} does not run with cgroup v1")


class UnderSystemd(RestartCase):
    def test_the_unit(self):
        """A restart hands over, a crash too but for who was waiting, a stop drains and leaves nothing."""
        skip_unless_systemd_runs(self)
        systemd = Systemd()
        self.addCleanup(systemd.close)
        daemon = systemd.daemon
        try:
            wait_until(daemon.socket.exists, "systemd has started faasd")
        except AssertionError as error:
            said = Path(f"/proc/{systemd.pid}/root/run/stderr")
            raise AssertionError(f"{error}: {(said.read_text() if said.exists() else daemon.log())[-3000:]}") from None
        address = self.deploy(daemon, "--warm", "1", "--timeout", "0")
        client = self.client(address, "/work?go")
        client.read_number()
        wait_until(lambda: systemd.show("NFileDescriptorStore") == "1", "systemd keeps the listener")
        pids = {systemd.show("MainPID")}
        with steady_load([address]) as failures:
            for change in ("restart", "reload"):
                systemd.systemctl(change, "faasd")
                pids.add(systemd.show("MainPID"))
        self.assertEqual(failures, [])
        client.read_number()
        systemd.systemctl("kill", "--kill-who=main", "--signal=SIGKILL", "faasd")
        waiting = self.client(address, "/")
        self.assertTrue(waiting.rest().endswith("\r\n\r\n1"))
        pids.add(systemd.show("MainPID"))
        self.assertEqual(len(pids), 4)
        client.read_number()
        self.assertEqual(systemd.show("NFileDescriptorStore"), "1")
        systemd.systemctl("stop", "--no-block", "faasd")
        time.sleep(3)                               # longer than TimeoutStopSec=
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        wait_until(lambda: systemd.show("ActiveState") == "inactive", "it has stopped")
        self.assertEqual(systemd.show("NFileDescriptorStore"), "0")
        self.assertEqual(support.addresses(), [])
        self.assertFalse(daemon.run_dir.exists())
        self.assertEqual(systemd.show("Result"), "success")


if __name__ == "__main__":
    unittest.main()
