"""What handlers print and what the daemon logs: it may be without end, unread, or stuck, and nobody waits for it."""

import os
import re
import signal
import socket
import struct
import subprocess
import unittest
from pathlib import Path

import gate
import support
from support import get, wait_until

# Answers, and stays with all the processes that it may have.
FORKER = """
import os, socket, time
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
with socket.socket(fileno=descriptors[0]) as client:
    client.recv(65536)
    try:
        while os.fork():
            pass
        time.sleep(3600)
    except OSError:
        client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nforked")
        client.shutdown(socket.SHUT_WR)
control.sendall(b"R")
time.sleep(3600)
"""

# Sends an end of a pipe of its own on its control connection, and keeps the other.
SENDER = """
import os, socket, time
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
client = socket.socket(fileno=descriptors[0])
reading, writing = os.pipe()
client.sendall(client.recv(65536))
client.recv(65536)
socket.send_fds(control, [b"R"], [reading])
os.close(reading)
client.sendall(b"sent")
time.sleep(3600)
"""


# Prints 5000 bytes, one by one.
DRIBBLER = """
import os, socket, time
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
with socket.socket(fileno=descriptors[0]) as client:
    client.sendall(client.recv(65536))
    client.recv(65536)
    for _ in range(5000):
        os.write(1, b"x")
        time.sleep(0.0002)
    client.sendall(b"printed")
"""


class OutputCase(unittest.TestCase):
    def start(self, *arguments: str, **more) -> support.Daemon:
        daemon = support.Daemon(*arguments, **more).start()
        self.addCleanup(daemon.close)
        return daemon


class Handlers(OutputCase):
    def test_more_than_the_log_takes_is_not_copied(self):
        daemon = self.start()
        address = daemon.deploy("f", support.small_image(), "--timeout", "0")
        with socket.create_connection((address, 80), support.READY_SECONDS) as client:
            client.sendall(b"GET /splice HTTP/1.1\r\n\r\n")
            wait_until(lambda: "is dropped)" in daemon.faas("logs", "f", "-n", "1").stdout, "the log takes no more")

            def copied() -> int:
                return int(re.search(r"rchar: (\d+)", Path(f"/proc/{daemon.process.pid}/io").read_text())[1])
            client.recv(1 << 20)                        # all that has come so far
            before, received = copied(), 0
            while received < 8:                         # times 4 MiB
                received += client.recv(65536).count(b"4")
            self.assertLess(copied() - before, 4 << 20)

    def working(self, daemon: support.Daemon, name: str = "f", image: bytes | None = None) -> tuple[socket.socket, str]:
        """Deploy a function; return a client that it serves, and its container's id."""
        others = set(support.list_containers(daemon))
        client = socket.create_connection((daemon.deploy(name, image), 80), support.READY_SECONDS)
        self.addCleanup(client.close)
        client.sendall(b"GET /echo HTTP/1.1\r\n\r\n")
        self.assertTrue(client.recv(65536))

        def new() -> set[str]:                  # the one that has proved the deploy goes behind the answer
            found = set(support.list_containers(daemon)) - others
            return found if len(found) == 1 else set()
        return client, wait_until(new, "one container is left").pop()

    @staticmethod
    def output(daemon: support.Daemon, container: str) -> Path:
        return daemon.run_dir / "containers" / container / "output"

    def test_bytes_that_come_one_by_one_are_not_read_one_by_one(self):
        daemon = self.start()
        client, _ = self.working(daemon, image=support.handler_image(DRIBBLER))

        def reads() -> int:
            return int(re.search(r"syscr: (\d+)", Path(f"/proc/{daemon.process.pid}/io").read_text())[1])
        before = reads()
        client.sendall(b"go")
        self.assertEqual(client.recv(65536), b"printed")
        self.assertLess(reads() - before, 5000)

    def test_who_holds_the_lock_of_its_pipe_stops_nobody(self):
        daemon = self.start()
        other = daemon.deploy("other", support.small_image())
        client, container = self.working(daemon)
        daemon.process.send_signal(signal.SIGSTOP)      # so that it reads while the lock is held
        try:
            with support.lock_held(self.output(daemon, container)):
                daemon.process.send_signal(signal.SIGCONT)
                self.assertEqual(get(other), (200, "1"))
                client.sendall(b"still here?")
                self.assertEqual(client.recv(65536), b"still here?")
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        client.close()
        wait_until(lambda: "| printed\n" in daemon.function_log("f"), "what was written before is in the log")

    def test_who_holds_the_lock_of_its_pipe_does_not_go_on(self):
        """The next daemon starts without it; those who hold nothing go on."""
        daemon = self.start()
        address = daemon.deploy("other", support.small_image())
        honest, _ = self.working(daemon, "honest")
        hostile, container = self.working(daemon)
        daemon.kill()
        with support.lock_held(self.output(daemon, container)):
            daemon.start()
            self.assertEqual(get(address), (200, "1"))
            honest.sendall(b"still here?")
            self.assertEqual(honest.recv(65536), b"still here?")
            self.assertEqual(hostile.recv(65536), b"")
            wait_until(lambda: container not in support.list_containers(daemon), "it has been ended")

    def test_who_does_not_end_holds_up_no_restart(self):
        """A process that waits for a lock outlives SIGKILL, as one does, for seconds, that has a million open files."""
        daemon = self.start(constants={"KILL_TIMEOUT": 3600.0, "STOP_SECONDS": 3600.0})
        address = daemon.deploy("f", support.small_image(), "--warm", "1")
        container, = daemon.wait_warm("f", 1)
        fifo = daemon.directory / "fifo"
        os.mkfifo(fifo)
        self.addCleanup(os.close, os.open(fifo, os.O_RDWR))
        with support.lock_held(fifo):
            waiting = subprocess.Popen(["tee", fifo], stdin=subprocess.DEVNULL)
            self.addCleanup(waiting.wait)
            wait_until(lambda: "fifo_open" in support.waits(waiting.pid), "it waits")
            for cgroup in [path for path in support.container_cgroups(daemon) if path.endswith(container)]:
                Path(cgroup, "cgroup.procs").write_text(str(waiting.pid))
            self.assertEqual(daemon.stop(signal.SIGHUP), 0)
            daemon.start()
            self.assertEqual(get(address), (200, "1"))
            self.assertIsNone(waiting.poll())
        wait_until(lambda: container not in support.list_containers(daemon), "it is removed once it has ended")

    def test_who_holds_the_lock_of_its_pipe_keeps_no_dead_daemon(self):
        """A thread that waits for it outlives kill -9, and the process keeps its lock of the run-dir."""
        daemon = self.start()
        address = daemon.deploy("other", support.small_image())
        _, container = self.working(daemon)
        cgroups = [path for path in support.container_cgroups(daemon) if path.endswith(container)]
        killed = daemon.process
        killed.send_signal(signal.SIGSTOP)              # so that it reads while the lock is held
        try:
            with support.lock_held(self.output(daemon, container), cgroups):
                killed.send_signal(signal.SIGCONT)
                wait_until(lambda: "pipe" in " ".join(support.waits(killed.pid)), "it waits")
                killed.kill()
                wait_until(lambda: re.search(r"State:\tZ", Path(f"/proc/{killed.pid}/status").read_text()),
                           "it is dead")
                daemon.log_file.close()
                daemon.start()
                self.assertEqual(get(address), (200, "1"))
        finally:
            killed.kill()
            killed.wait()

    def test_who_holds_the_lock_of_its_pipe_is_not_left_to_the_next_daemon(self):
        """The daemon's end would have to wait for it."""
        daemon = self.start()
        _, container = self.working(daemon)
        cgroups = [path for path in support.container_cgroups(daemon) if path.endswith(container)]
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            with support.lock_held(self.output(daemon, container), cgroups):
                daemon.process.send_signal(signal.SIGHUP)
                daemon.process.send_signal(signal.SIGCONT)
                self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        daemon.log_file.close()
        daemon.start()
        self.assertEqual(daemon.info("f")["running"], 0)

    def test_who_holds_the_lock_of_a_pipe_that_it_sends_stops_nobody(self):
        """Whoever takes a message from the queue of a socket closes the descriptors in it."""
        daemon = self.start(constants={"SO_PASSRIGHTS": 9999})          # as before Linux 6.16
        other = daemon.deploy("other", support.small_image())
        client, container = self.working(daemon, image=support.handler_image(SENDER))
        pids = support.container_pids(daemon, container)
        pipes = [path for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir() if "pipe:" in os.readlink(path)]
        with support.lock_held(pipes[0]):
            daemon.process.send_signal(signal.SIGSTOP)      # so that the handler's own close is not the last
            try:
                client.sendall(b"go")
                self.assertEqual(client.recv(65536), b"sent")
            finally:
                daemon.process.send_signal(signal.SIGCONT)
            self.assertEqual(get(other), (200, "1"))

    def test_many_processes_are_not_killed_on_the_loop(self):
        kills: list[int] = []                           # threads

        def decide(call: gate.Call) -> None:
            if call.of == "daemon" and (call.name == "pidfd_send_signal" or call.name == "openat"
                                        and call.paths[0].endswith("/cgroup.kill")):
                kills.append(call.pid)
        watch = gate.Gate(decide)
        self.addCleanup(watch.close)
        daemon = self.start(wrapper=watch.wrapper)
        address = daemon.deploy("f", support.handler_image(FORKER), "--pids", "60", "--timeout", "0")
        kills.clear()
        self.assertEqual(get(address), (200, "forked"))
        daemon.wait_idle("f")
        self.assertTrue(kills)
        self.assertNotIn(daemon.process.pid, kills)


class OwnLog(OutputCase):
    """The daemon's stderr."""

    def start_with_reader(self, **more) -> tuple[support.Daemon, subprocess.Popen]:
        """Return a daemon whose stderr is a pipe, and the process that reads it."""
        daemon = support.Daemon("--verbose", **more)
        reading, writing = os.pipe()
        daemon.wrapper, daemon.pass_fds = ("sh", "-c", f'exec "$@" 2>&{writing}', "sh"), (writing,)
        with (daemon.directory / "log").open("ab") as log:
            reader = subprocess.Popen(["cat"], stdin=reading, stdout=log)
        self.addCleanup(reader.wait)
        self.addCleanup(reader.kill)
        daemon.start()
        self.addCleanup(daemon.close)
        os.close(reading)
        os.close(writing)
        return daemon, reader

    def test_nobody_reads_it_any_more(self):
        daemon, reader = self.start_with_reader(constants={"MAX_UNWRITTEN_MESSAGES": 100})
        address = daemon.deploy("f", support.small_image(), "--warm", "1")
        reader.send_signal(signal.SIGSTOP)
        for _ in range(2000):                           # lines of 100 bytes, and 64 KiB fit into the pipe
            daemon.api("GET", "/healthz")
        self.assertEqual(get(address), (200, "1"))
        reader.send_signal(signal.SIGCONT)

        def told() -> int:
            log = daemon.log()
            return log.count("'GET /healthz") + sum(map(int, re.findall(r"(\d+) lines of this log were dropped", log)))
        wait_until(lambda: told() >= 2000, "what was kept is there, and what was not is counted")

    def test_nobody_reads_it_at_the_end(self):
        daemon, reader = self.start_with_reader(constants={"FLUSH_SECONDS": 0.5})
        daemon.deploy("f", support.small_image())
        reader.send_signal(signal.SIGSTOP)
        for _ in range(2000):
            daemon.api("GET", "/healthz")
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(support.remains(daemon), [])

    def test_everything_is_in_it_before_the_end(self):
        daemon, reader = self.start_with_reader()
        for _ in range(100):
            daemon.api("GET", "/healthz")
        self.assertEqual(daemon.stop(), 0)
        reader.wait()
        self.assertEqual(daemon.log().count("'GET /healthz"), 100)
        self.assertTrue(daemon.log().endswith("info stopped\n"), daemon.log())

    def test_an_error_that_ends_it_is_the_last_line(self):
        daemon = self.start()
        daemon.stop()
        (daemon.state_dir / "registry.json").write_text("{")
        failed = subprocess.run(daemon.command(), capture_output=True, text=True, check=False)
        self.assertEqual(failed.returncode, 1)
        self.assertIn("info faasd ", failed.stderr)
        self.assertRegex(failed.stderr.splitlines()[-1], "^faasd: ")

    def test_clients_that_are_told_off_cannot_fill_it(self):
        """They send garbage of which each byte becomes six, and reset the connection."""
        daemon = self.start(constants={"WARNING_SECONDS": 3.0})
        address = daemon.deploy("f", None, "--concurrency", "1", "--timeout", "0")
        busy = socket.create_connection((address, 80), support.READY_SECONDS)
        busy.sendall(b"GET /echo HTTP/1.1\r\n\r\n")
        self.assertIn(b"101", busy.recv(65536))
        begin = len(daemon.log())
        for _ in range(1000):
            with socket.create_connection((address, 80), support.READY_SECONDS) as client:
                client.sendall(b"\xff" * 4000)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def told() -> tuple[int, int]:
            log = daemon.log()[begin:]
            left_out = re.findall(r"function=f (\d+) more such lines are in its own log only", log)
            return log.count("outcome=abandoned"), sum(map(int, left_out))
        wait_until(lambda: sum(told()) == 1000, "all are told of, or counted")
        self.assertGreater(told()[1], told()[0])
        busy.close()
        daemon.wait_idle("f")
        log = daemon.function_log("f")
        self.assertEqual(log.count("outcome=abandoned"), 1000)
        self.assertLess(max(map(len, (log + daemon.log()).splitlines())), 500)


class FunctionLogs(OutputCase):
    def test_a_disk_that_hangs_stops_nobody_nor_the_end(self):
        """A named pipe that nobody reads stands for it: to open it takes for ever."""
        daemon = self.start(constants={"FLUSH_SECONDS": 0.5})
        address = daemon.deploy("f", support.small_image(), "--warm", "1")
        path = daemon.state_dir / "logs" / "f.log"
        wait_until(path.exists, "the log is there")
        path.unlink()
        os.mkfifo(path)
        for _ in range(3):
            self.assertEqual(get(address), (200, "1"))
        wait_until(lambda: any("fifo" in text or "wait_for_partner" in text
                               for text in support.waits(daemon.process.pid)), "its writer waits")
        self.assertEqual(get(address), (200, "1"))
        self.assertEqual(get(daemon.deploy("other", support.small_image())), (200, "1"))
        daemon.remove("f")
        self.assertEqual(get(daemon.deploy("f", support.small_image("2"))), (200, "2"))
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(support.remains(daemon), [])


if __name__ == "__main__":
    unittest.main()
