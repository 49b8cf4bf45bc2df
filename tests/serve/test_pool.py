"""Warm pool, admission, reuse, and what is counted: a real daemon with real containers."""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support
from clients import get, read_all, request, reset
from support import wait_until


def init_pid(daemon: support.Daemon, container: str) -> int:
    """Return the pid of a container's first process."""
    for directory in support.container_cgroups(daemon):
        if directory.endswith(container):
            return int(Path(directory, "cgroup.procs").read_text().split()[0])
    raise AssertionError(f"no container {container}")


class Warm(support.SharedDaemonCase):
    def test_container_that_proved_the_deploy_serves_the_first_client(self):
        address = self.daemon.deploy("f", None, "--warm", "auto")
        proof, = self.daemon.wait_warm("f", 1)
        self.assertEqual(get(address, "/id"), (200, proof))
        second, = self.daemon.wait_warm("f", 1)
        self.assertNotEqual(second, proof)
        self.assertEqual(get(address, "/id"), (200, second))

    def test_number_asked_for_is_kept(self):
        address = self.daemon.deploy("f", None, "--warm", "3")
        before = self.daemon.wait_warm("f", 3)
        self.assertEqual(len(before), 3)
        with ThreadPoolExecutor(3) as pool:
            served = {body for _, body in pool.map(lambda _: get(address, "/id"), range(3))}
        self.assertEqual(served, before)
        self.assertFalse(self.daemon.wait_warm("f", 3) & before)

    def test_none(self):
        address = self.daemon.deploy("f", None, "--warm", "0")
        wait_until(lambda: not support.list_containers(self.daemon), "the container of the proof is gone")
        self.assertEqual(get(address)[0], 200)
        wait_until(lambda: not support.list_containers(self.daemon), "the container is gone")

    def test_after_a_restart_numbers_are_there_again_and_auto_waits_for_a_client(self):
        addresses = [self.daemon.deploy(name, None, "--warm", warm) for name, warm in (("a", "auto"), ("b", "2"))]
        self.assertEqual(self.daemon.stop(), 0)
        self.daemon.start()
        self.daemon.wait_warm("b", 2)
        self.assertEqual(self.daemon.info("a")["warm"], 0)
        self.assertEqual([get(address)[0] for address in addresses], [200, 200])
        self.daemon.wait_warm("a", 1)

    def test_one_that_dies_is_replaced_and_nobody_notices(self):
        address = self.daemon.deploy("f", None, "--warm", "1")
        before, = self.daemon.wait_warm("f", 1)
        os.kill(init_pid(self.daemon, before), signal.SIGKILL)
        self.assertEqual(get(address)[0], 200)
        wait_until(lambda: before not in support.list_containers(self.daemon), "it is gone")
        self.daemon.wait_warm("f", 1)
        self.assertEqual(self.daemon.outcomes("f"), {"answered": 1})

    def test_one_that_dies_while_it_is_handed_a_client_costs_the_client_nothing(self):
        address = self.daemon.deploy("f", None, "--warm", "1")
        container, = self.daemon.wait_warm("f", 1)
        pid = init_pid(self.daemon, container)
        os.kill(pid, signal.SIGSTOP)                    # so that it does not take the client
        client = request(address, "/id")
        wait_until(lambda: self.daemon.info("f")["running"] == 1, "the client is handed over")
        os.kill(pid, signal.SIGKILL)
        answer = read_all(client)
        self.assertIn(b"200 OK", answer)
        self.assertNotIn(container.encode(), answer)
        self.daemon.wait_idle("f")
        self.assertEqual(self.daemon.outcomes("f"), {"answered": 1})

    def test_one_that_talks_out_of_turn_is_ended(self):
        """Also by out-of-band data, which keeps a connection readable, and which no other way of reading shows."""
        for name, flags in (("f", 0), ("g", int(socket.MSG_OOB))):
            source = ("import socket, time\nc = socket.socket(socket.AF_UNIX)\nc.connect('/control.sock')\n"
                      f"time.sleep(0.3)\nc.send(b'x', {flags})\ntime.sleep(3600)\n")
            self.daemon.deploy(name, support.handler_image(source), "--warm", "1")
            wait_until(lambda name=name: re.search(f"function={name} .*next try in 2 s", self.daemon.log()),
                       "it is tried again, less often each time")

    def test_redeploy_change_and_removal_end_the_old_ones_at_once(self):
        self.daemon.deploy("f", None, "--warm", "2")
        before = self.daemon.wait_warm("f", 2)
        self.daemon.deploy("f", support.handler_image(label="2"), "--warm", "2")
        redeployed = self.daemon.wait_warm("f", 2)
        wait_until(lambda: not before & set(support.list_containers(self.daemon)), "those of the old image are gone")
        self.daemon.post("PATCH", "/functions/f?warm=1")
        wait_until(lambda: not redeployed & set(support.list_containers(self.daemon)), "those before the change too")
        self.daemon.wait_warm("f", 1)
        self.daemon.remove("f")
        self.assertEqual(support.list_containers(self.daemon), [])


class WarmInTime(support.SharedDaemonCase):
    """With the minutes of the constants made seconds."""
    constants = {"WARM_SECONDS": 3.0, "SURPLUS_SECONDS": 1.0, "RATE_SECONDS": 1.0, "WARM_HEADROOM": 100.0}

    def test_traffic_asks_for_more_and_when_it_ends_for_none(self):
        address = self.daemon.deploy("f", None, "--warm", "auto", "--timeout", "5m", "--start-timeout", "5m")
        enough = threading.Event()

        def ask() -> set[int]:
            statuses = set()
            while not enough.wait(0.5):         # with a pause: a machine that only just keeps up has none to spare
                statuses.add(get(address)[0])
            return statuses
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            try:
                wait_until(lambda: self.daemon.info("f")["warm"] > 1, "more than one is warm")
            finally:
                enough.set()
            self.assertEqual(asked.result(), {200})
        self.daemon.wait_warm("f", 0)
        wait_until(lambda: not support.list_containers(self.daemon), "all are gone")


class WarmOld(support.SharedDaemonCase):
    constants = {"MAX_WARM_SECONDS": 2.0}

    def test_old_one_is_replaced_before_it_is_ended(self):
        self.daemon.deploy("f", None, "--warm", "1")
        before, = self.daemon.wait_warm("f", 1)
        counts = set()

        def replaced():
            counts.add(self.daemon.info("f")["warm"])
            return before not in support.list_containers(self.daemon)
        wait_until(replaced, "the old one is replaced", longest_pause=0.01)
        self.assertNotIn(0, counts)


class WarmLimit(support.SharedDaemonCase):
    arguments = ("--max-warm", "2")

    def test_coldest_function_gives_up_first(self):
        addresses = {name: self.daemon.deploy(name, None, "--warm", "auto") for name in "abc"}
        self.assertEqual([self.daemon.info(name)["warm"] for name in "abc"], [0, 1, 1])
        self.assertEqual(get(addresses["a"])[0], 200)
        self.daemon.wait_warm("a", 1)
        self.assertEqual([self.daemon.info(name)["warm"] for name in "abc"], [1, 0, 1])

    def test_no_more_is_promised_than_there_may_be(self):
        self.daemon.deploy("a", None, "--warm", "2")
        result = self.daemon.faas("new", "b", "--warm", "1", stdin=support.handler_image(), check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn("only 0 of 2 warm containers are not promised", result.stderr)
        self.assertEqual(self.daemon.api("PATCH", "/functions/a?warm=3")[0], 409)
        self.assertEqual(self.daemon.info("a")["options"]["warm"], 2)


class Admission(support.SharedDaemonCase):
    def deploy(self, *options: str) -> str:
        return self.daemon.deploy("f", None, *options)

    def fill(self, address: str, running: int, queued: int) -> list[socket.socket]:
        """Send requests that hang until closed, first the running ones."""
        clients = []
        for number in range(running + queued):
            clients.append(request(address, "/echo" if number < running else f"/{number}"))
            wait_until(lambda least=number: sum(self.counts()) > least, "it is admitted")
        wait_until(lambda: self.counts() == (running, queued), "as many run and wait as should")
        for client in clients[:running]:
            self.assertIn(b"101", client.recv(65536))
        return clients

    def counts(self) -> tuple[int, int]:
        info = self.daemon.info("f")
        return info["running"], info["queued"]

    def test_over_the_queue_is_told_to_come_back(self):
        address = self.deploy("--concurrency", "1", "--queue", "2")
        running, *waiting = self.fill(address, 1, 2)
        refused = read_all(request(address, "/too-many", b"x" * (1 << 20)))      # and reads it, whatever it sent
        self.assertRegex(refused, rb"(?s)^HTTP/1.1 503 .*\r\nRetry-After: 1\r\n"
                                  rb".*the queue is full: all places of --concurrency 1 and --queue 2 are taken\n")
        running.close()
        self.assertEqual([read_all(client).rpartition(b"\n")[2] for client in waiting], [b"hello /1", b"hello /2"])
        self.daemon.wait_idle("f")
        self.assertEqual(self.daemon.outcomes("f"), {"answered": 3, "queue-full": 1})

    def test_waits_in_order(self):
        address = self.deploy("--concurrency", "1")
        running, *waiting = self.fill(address, 1, 6)
        running.close()
        order = []                      # of the answers: a line of the log is written when all of its container is gone
        while waiting:
            for client in select.select(waiting, [], [], support.READY_SECONDS)[0]:
                waiting.remove(client)
                order.append(read_all(client).rpartition(b"\n")[2].decode())
        self.assertEqual(order, [f"hello /{number}" for number in range(1, 7)])

    def test_waited_too_long(self):
        address = self.deploy("--concurrency", "1", "--queue-timeout", "500ms")
        running, = self.fill(address, 1, 0)
        self.assertRegex(read_all(request(address)),
                         rb"(?s)^HTTP/1.1 503 .*\r\nRetry-After: 1\r\n.*no container was free in time")
        running.close()
        self.daemon.wait_idle("f")
        self.assertEqual(self.daemon.outcomes("f"), {"answered": 1, "queue-timeout": 1})

    def test_client_that_gives_up_costs_no_container(self):
        address = self.deploy("--concurrency", "1")
        running, *waiting = self.fill(address, 1, 3)
        for client in waiting[:2]:
            reset(client)
        wait_until(lambda: self.counts() == (1, 1), "two have left the queue")
        running.close()
        self.assertIn(b"hello /3", read_all(waiting[2]))
        self.daemon.wait_idle("f")
        self.assertEqual(self.daemon.outcomes("f"), {"answered": 2, "abandoned": 2})
        log = self.daemon.function_log("f")
        self.assertEqual(len(re.findall(r" - > outcome=abandoned", log)), 2)

    def test_client_that_closes_its_own_direction_still_gets_its_answer(self):
        address = self.deploy("--concurrency", "1")
        running, = self.fill(address, 1, 0)
        client = request(address, "/half-closed")
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: self.counts() == (1, 1), "it waits")
        time.sleep(0.2)                         # for whatever might come of it
        running.close()
        self.assertIn(b"hello /half-closed", read_all(client))

    def test_function_that_does_not_start_does_not_keep_others_from_starting(self):
        self.daemon.deploy("bad", None, "--start-timeout", "5")
        good = self.daemon.deploy("good", None)
        (self.daemon.rootfs("bad") / "misbehave").write_text("never-connect")
        clients = [request(self.daemon.info("bad")["address"]) for _ in range(3 * os.cpu_count())]
        wait_until(lambda: self.daemon.info("bad")["starting"] == len(clients), "all hang in their start")
        self.assertEqual(get(good)[0], 200)
        self.assertEqual(self.daemon.outcomes("bad"), {})
        self.assertEqual({read_all(client)[:12] for client in clients}, {b"HTTP/1.1 504"})


class Slots(support.SharedDaemonCase):
    constants = {"START_SLOT_SECONDS": 60}

    def test_function_whose_starts_hang_leaves_a_slot_to_others(self):
        self.daemon.deploy("bad", None, "--warm", "0", "--start-timeout", "30")
        good = self.daemon.deploy("good", None, "--warm", "0")
        (self.daemon.rootfs("bad") / "misbehave").write_text("never-connect")
        clients = [request(self.daemon.info("bad")["address"]) for _ in range(2 * os.cpu_count())]
        wait_until(lambda: self.daemon.info("bad")["starting"] == os.cpu_count(), "its starts take the other slots")
        for _ in range(3):
            self.assertEqual(get(good)[0], 200)
        self.assertEqual(self.daemon.outcomes("bad"), {})
        for client in clients:
            client.close()

        def ended() -> bool:                # to remove the function would take until its starts have timed out
            for pid in support.container_pids(self.daemon):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return self.daemon.info("bad")["starting"] == 0
        wait_until(ended, "its starts have ended")


class Reuse(support.SharedDaemonCase):
    def ids(self, address: str, count: int) -> list[str]:
        answers = []
        for _ in range(count):
            answers.append(get(address, "/id"))
            wait_until(lambda: self.daemon.info("f")["running"] == 0, "the container is back or gone")
        self.assertEqual({status for status, _ in answers}, {200})
        return [body for _, body in answers]

    def test_container_is_ended_after_its_last_invocation(self):
        address = self.daemon.deploy("f", None, "--reuse", "3", "--warm", "0")
        a, b, c, d, e, f, g = self.ids(address, 7)
        self.assertEqual((a, d, b, e), (c, f, a, d))
        self.assertEqual(len({a, d, g}), 3)
        wait_until(lambda: support.list_containers(self.daemon) == [g], "only the last one is left")

    def test_one_that_exits_after_its_answer_or_answers_nothing_is_not_reused(self):
        address = self.daemon.deploy("f", None, "--reuse", "100")
        first, = self.ids(address, 1)
        self.assertEqual(get(address, "/answer-and-exit?0"), (200, "good-bye"))
        second, = self.ids(address, 1)
        self.assertEqual(get(address, "/answer-and-exit?1"), (200, "good-bye"))
        third, = self.ids(address, 1)
        self.assertEqual(get(address, "/exit?1")[0], 502)
        fourth, = self.ids(address, 1)
        self.assertEqual(get(address, "/junk"), (200, "junk sent"))
        fifth, = self.ids(address, 1)
        self.assertEqual(len({first, second, third, fourth, fifth}), 5)

    def test_timeout_ends_it(self):
        address = self.daemon.deploy("f", None, "--reuse", "100", "--timeout", "1")
        first, = self.ids(address, 1)
        self.assertEqual(get(address, "/hang")[0], 504)
        self.assertNotEqual(self.ids(address, 1), [first])

    def test_as_many_as_are_busy_at_a_time(self):
        address = self.daemon.deploy("f", None, "--reuse", "1000", "--warm", "0")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: get(address, "/id"), range(200)))
        self.assertEqual({status for status, _ in answers}, {200})
        self.assertLess(len({body for _, body in answers}), 50)

    def test_busy_one_that_does_not_come_back_is_not_waited_for(self):
        address = self.daemon.deploy("f", None, "--reuse", "1000", "--warm", "0", "--timeout", "0")
        self.ids(address, 3)                    # quick ones, so that clients are patient
        hanging = [request(address, "/hang") for _ in range(3)]
        self.assertEqual(get(address)[0], 200)
        self.daemon.wait_outcomes("f", {"answered": 4})
        for client in hanging:                  # one that is killed earlier would have its client go to the next
            os.close(wait_until(lambda client=client: support.client_socket(self.daemon, client), "its handler has it"))
        wait_until(lambda: self.daemon.info("f")["running"] == 3, "only they run")
        for pid in support.container_pids(self.daemon):
            with contextlib.suppress(ProcessLookupError):                       # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        self.assertEqual({read_all(client)[:12] for client in hanging}, {b"HTTP/1.1 502"})

    def test_waiting_clients_cost_no_cpu(self):
        address = self.daemon.deploy("f", None, "--reuse", "1000", "--warm", "0", "--concurrency", "2")
        self.ids(address, 3)
        busy = [request(address, "/echo") for _ in range(2)]
        for client in busy:
            self.assertIn(b"101", client.recv(65536))
        waiting = request(address)
        wait_until(lambda: self.daemon.info("f")["queued"] == 1, "it waits")
        before = support.cpu_ticks(self.daemon.process.pid)
        time.sleep(2)
        self.assertLess(support.cpu_ticks(self.daemon.process.pid) - before, os.sysconf("SC_CLK_TCK") / 5)
        for client in busy:
            client.close()
        self.assertIn(b"200 OK", read_all(waiting))


class ReuseAtTheLimit(support.SharedDaemonCase):
    # Says READY, and lets go of the control connection at once.
    HANDLER = """
import socket, time
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
client = socket.socket(fileno=descriptors[0])
data = b""
while b"go" not in data:
    data += client.recv(65536)
client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 4\\r\\n\\r\\ndone")
control.sendall(b"R")
control.close()
client.shutdown(socket.SHUT_WR)
time.sleep(3600)
"""

    def test_one_that_lets_go_makes_room_for_the_next(self):
        """Not at the next look, which may be long after."""
        address = self.daemon.deploy("f", support.handler_image(self.HANDLER), "--reuse", "9", "--warm", "0",
                                     "--concurrency", "1", "--queue-timeout", "10m")
        first, second = (request(address, "/") for _ in range(2))
        wait_until(lambda: self.daemon.info("f")["queued"] == 1, "one of them waits")
        time.sleep(3)                           # longer than the second one is patient, which ends by a look
        self.daemon.process.send_signal(signal.SIGSTOP)         # so that it meets both at the same time
        try:
            for client in (first, second):
                client.sendall(b"go")
            self.assertTrue(read_all(first).endswith(b"done"))
        finally:
            self.daemon.process.send_signal(signal.SIGCONT)
        self.assertTrue(read_all(second).endswith(b"done"))


class ReuseInTime(support.SharedDaemonCase):
    constants = {"SURPLUS_SECONDS": 1.0}

    def test_idle_one_is_ended(self):
        address = self.daemon.deploy("f", None, "--reuse", "100", "--warm", "0")
        self.assertEqual(get(address)[0], 200)
        wait_until(lambda: not support.list_containers(self.daemon), "it is gone")


class Versions(support.SharedDaemonCase):
    arguments = ("--keep-versions", "2")

    def versions(self) -> list[str]:
        return self.daemon.versions("f")

    def deploy(self, label: str) -> str:
        address = self.daemon.deploy("f", support.handler_image(label=label), "-e", f"MARK={label}")
        self.assertEqual(get(address, "/label"), (200, label))
        return address

    def test_back_and_forth(self):
        for label in ("1", "2", "3"):
            address = self.deploy(label)
        three, two = self.versions()
        self.assertEqual((three, two), (3, 2))
        images = self.daemon.state_dir / "images" / "f"
        wait_until(lambda: len(list(images.iterdir())) == 2, "the oldest is removed")
        self.assertEqual(self.daemon.post("POST", "/functions/f/rollback")["version"], two)
        self.assertEqual(get(address, "/label"), (200, "2"))
        self.assertEqual(self.daemon.info("f")["options"]["env"], ["MARK=2"])       # what it ran under
        self.assertEqual(self.versions(), [two, three])
        self.assertEqual(self.daemon.post("POST", f"/functions/f/rollback?version={three}")["version"], three)
        self.assertEqual(get(address, "/label"), (200, "3"))
        self.assertEqual(self.daemon.api("POST", "/functions/f/rollback?version=zzz")[0], 404)
        self.assertEqual(self.daemon.stop(), 0)
        self.daemon.start()
        self.assertEqual(self.versions(), [three, two])
        self.assertEqual(get(address, "/label"), (200, "3"))

    def test_one_that_does_not_start_changes_nothing(self):
        self.deploy("1")
        bad, = (self.daemon.state_dir / "images" / "f").glob("*/rootfs")
        address = self.deploy("2")
        (bad / "misbehave").write_text("exit")
        before = self.versions()
        status, body = self.daemon.api("POST", "/functions/f/rollback")
        self.assertEqual(status, 422)
        self.assertIn(b"I refuse to start", body)
        self.assertEqual(self.versions(), before)
        self.assertEqual(get(address, "/label"), (200, "2"))

    def test_nothing_to_go_back_to(self):
        self.deploy("1")
        self.assertEqual(self.daemon.api("POST", "/functions/f/rollback")[0], 409)
        self.assertEqual(self.daemon.api("POST", "/functions/none/rollback")[0], 404)

    def test_change_of_options(self):
        address = self.deploy("1")
        query = "env=A=1&env=B=2&memory=64m&unset_env=MARK&timeout=5"
        options = self.daemon.post("PATCH", f"/functions/f?{query}")["options"]
        self.assertEqual((options["env"], options["memory"], options["timeout"]), (["A=1", "B=2"], 64 << 20, 5.0))
        self.assertIn('"A": "1"', get(address, "/facts")[1])
        options = self.daemon.post("PATCH", "/functions/f?env=A=3")["options"]
        self.assertEqual((options["env"], options["memory"]), (["A=3", "B=2"], 64 << 20))
        for query in ("", "?memory=1", "?warm=-1", "?reuse=-1", "?queue_timeout=0", "?nonsense=1", "?tag=x"):
            self.assertEqual(self.daemon.api("PATCH", f"/functions/f{query}")[0], 400, query)
        status, body = self.daemon.api("PATCH", "/functions/f?cmd=-c&cmd=import+nothing_like_it")
        self.assertEqual(status, 200, "the command is the handler's argument")
        self.assertEqual(self.daemon.info("f")["options"]["cmd"], ["-c", "import nothing_like_it"])


class Counted(support.SharedDaemonCase):
    def metrics(self) -> str:
        return self.daemon.api("GET", "/metrics")[1].decode()

    def test_metrics_are_what_prometheus_wants_and_what_happened(self):
        address = self.daemon.deploy("f", None, "--warm", "1")
        self.daemon.wait_warm("f", 1)
        for path, status in (("/", 200), ("/", 200), ("/exit?1", 502)):
            self.assertEqual(get(address, path)[0], status)
        self.daemon.wait_warm("f", 1)
        text = self.metrics()
        for line in ('faasd_invocations_total{function="f",outcome="answered"} 2',
                     'faasd_invocations_total{function="f",outcome="no-answer"} 1',
                     'faasd_run_seconds_count{function="f"} 3', 'faasd_queue_seconds_count{function="f"} 3',
                     'faasd_start_seconds_bucket{function="f",le="+Inf"} 3', 'faasd_warm_containers{function="f"} 1',
                     'faasd_running_invocations{function="f"} 0', "faasd_functions 1"):
            self.assertIn(line, text.splitlines())
        support.wait_until(lambda: re.search(r"faasd_loop_lag_seconds_count [1-9]", self.metrics()), "a timer ran out")
        resident = int(re.search(r"^process_resident_memory_bytes (\d+)$", text, re.MULTILINE)[1])
        self.assertAlmostEqual(resident, support.resident_memory(self.daemon.process.pid), delta=8 << 20)
        if shutil.which("promtool") is None:
            self.skipTest("promtool is not installed: apt install prometheus")
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True,
                                 check=False)
        self.assertEqual((checked.returncode, checked.stdout + checked.stderr), (0, ""))


class Idle(support.SharedDaemonCase):
    def test_idle_daemon_does_not_wake_up(self):
        address = self.daemon.deploy("f", None, "--warm", "2")
        self.assertEqual(get(address)[0], 200)
        self.daemon.wait_warm("f", 2)
        time.sleep(1)                           # the probe of the loop's lag, the log's delay
        for _ in range(3):                      # somebody else may write a file in /etc, which it looks at
            if not (calls := self.trace_calls()):
                break
        self.assertEqual(calls, [])

    def trace_calls(self) -> list[str]:
        """Return the system calls that the daemon makes within 10 s, but for those that go on all along."""
        trace = self.daemon.directory / "trace"
        subprocess.run(["timeout", "--signal=INT", "10", "strace", "-f", "-qq", "-o", trace, "-p",
                        str(self.daemon.process.pid)], check=False, capture_output=True)
        return [line for line in trace.read_text().splitlines()
                if not re.search("unfinished|detached|resumed|restart_syscall", line)]


if __name__ == "__main__":
    unittest.main()
