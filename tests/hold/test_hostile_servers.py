"""Servers that wrong the one who answers their calls: tests/handlers/hostile/server.py, beside a neighbour.

Of each: the neighbour is answered all the while, clients of the same container get an answer, a 502, a 504 or a close,
and the daemon is as it was before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import unittest

import support
import test_hostile
from clients import connect, read_until_cut, request
from support import wait_until
from test_hostile import got_through, hostile_image, in_hex, read_until

import faasd


class Lab:
    """One daemon for all tests: a neighbour, and the hostile server, once with little time."""

    def __init__(self):
        self.daemon = support.Daemon(constants=support.BRIEF_SURPLUS).start()
        try:
            self.neighbour = self.daemon.deploy("neighbour", support.handler_image(), "--warm", "1")
            image = hostile_image(Entrypoint=[support.PYTHON, "-u", "/server.py"])
            options = ("--reuse", "0", "--share", "8", "--pids", "128", "--start-timeout", "1m")
            self.hostile = self.daemon.deploy("hostile", image, *options, "--timeout", f"{10 * support.PATIENCE:g}s")
            self.short = self.daemon.deploy("short", image, *options, "--timeout", "2s")
            self.stdio = self.daemon.deploy("stdio", image, "--contract", "stdio", "--", "executing")
            self.host = self.daemon.deploy("host", image, "--net", "host", "--start-timeout", "1m")
        except BaseException:
            self.daemon.close()
            raise
        self.memory = support.resident_memory(self.daemon.process.pid)


def setUpModule():
    test_hostile.lab = Lab()
    unittest.addModuleCleanup(test_hostile.lab.daemon.close)


def outcome(client: socket.socket) -> str:
    """Return the status and the body of an answer, or "closed"."""
    answer = read_until_cut(client).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return f"{head.split()[1]} {body}" if head else "closed"


class HostileServerCase(test_hostile.HostileCase):
    def setUp(self):
        super().setUp()
        self.threads = self.count_threads()
        self.short = test_hostile.lab.short

    def tearDown(self):
        for name in ("short", "host", "stdio"):
            self.daemon.wait_idle(name)
        super().tearDown()
        wait_until(lambda: self.count_threads() <= self.threads, "no thread is left")

    def count_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/task"))

    def attack(self, name: str, *words: object, others: int = 1, address: str = ""):
        """Have the server attack while others wait in the same container.

        Return what came of it, None if it has ended without a word, and what the others have got: "answered" is by the
        container that attacks.
        """
        target = address or self.address
        path = "?".join(map(str, (f"/{name}", others, *words)))
        with request(target, path) as attacker, contextlib.ExitStack() as stack:
            attacker.settimeout(2 * support.READY_SECONDS)
            begun = read_until(attacker, b"\n\n").decode()
            container = re.search("begun in (.*)\n\n", begun)[1]
            waiting = [stack.enter_context(request(target)) for _ in range(others)]
            rest = begun.partition("\n\n")[2] + read_until_cut(attacker).decode()
            outcomes = [outcome(other) for other in waiting]
        answers = ["answered" if one == f"200 {container}" else one for one in outcomes]
        return json.loads(rest) if rest else None, answers


class Storms(HostileServerCase):
    def check_storm(self, kind: str) -> None:
        count, others = self.attack("storm", kind, 1)
        self.assertEqual(others, ["answered"])
        self.assertLess(count, 2000, "calls are answered later and later")

    def test_accept(self):
        self.check_storm("accept")

    def test_listen(self):
        self.check_storm("listen")

    def test_accept_of_its_own(self):
        self.check_storm("own")

    def test_execve(self):
        with connect(test_hostile.lab.stdio, b"GET / HTTP/1.1\r\n\r\n") as client:
            self.assertIn(int(read_until_cut(client)), range(3000, 10_000), "later and later, but only after thousands")

    def test_signals(self):
        count, others = self.attack("interrupted", 1)
        self.assertEqual(others, ["answered"])
        self.assertGreater(count, 0)

    def test_threads_that_wait(self):
        self.assertEqual(self.attack("blocked", 64, others=7), (None, 7 * ["answered"]))

    def test_processes_that_are_killed(self):
        # One of those that are killed may have got it, or exit with it.
        self.assertIn(self.attack("vanishing", 50), [(None, [end]) for end in ("answered", "closed")])


class Listeners(HostileServerCase):
    def test_closed_while_a_doorbell_rings(self):
        self.assertEqual(self.attack("closing", 5, others=3), (None, 3 * ["answered"]))

    def test_closed_for_good(self):
        self.assertEqual(self.attack("closed", address=self.short)[1][0][:4], "504 ")

    def test_shut_down(self):
        self.assertEqual(self.attack("shut", 5), (["EINVAL"], ["answered"]))

    def test_many(self):
        self.assertEqual(self.attack("many", 100), (100, ["answered"]))

    def test_group(self):
        self.assertEqual(self.attack("group"), (None, ["answered"]))

    def test_replaced(self):
        outcomes, others = self.attack("replaced", 1)
        self.assertLessEqual(set(outcomes), {"EAGAIN", "ENOTSOCK", "ENOTSUP"})
        self.assertEqual(others, ["answered"])

    def test_what_is_none(self):
        expected = {
            "accept closed": "EBADF", "accept negative": "EBADF", "accept file": "ENOTSOCK", "accept pipe": "ENOTSOCK",
            "accept path": "EBADF", "accept event": "ENOTSOCK", "accept epoll": "ENOTSOCK",
            "accept not connected": "EINVAL", "accept connected": "EINVAL", "accept not bound": "EINVAL",
            "accept datagram": "ENOTSUP", "accept datagram 6": "ENOTSUP", "accept netlink": "ENOTSUP",
            "accept unix": "done", "listen closed": "EBADF", "listen file": "ENOTSOCK", "listen path": "EBADF",
            "listen connected": "EINVAL", "listen datagram": "ENOTSUP", "listen netlink": "ENOTSUP",
            "socket MPTCP": "EPROTONOSUPPORT", "socket SCTP": "EPROTONOSUPPORT", "socket VSOCK": "EPERM"}
        self.assertEqual(self.attack("kinds"), (expected, ["answered"]))


class Memory(HostileServerCase):
    def test_addresses(self):
        fault = dict.fromkeys(("none", "null", "kernel", "last", "no size", "null size", "kernel size",
                               "truncated", "truncated size", "image", "closed"), "EFAULT")
        done = dict.fromkeys(("memory", "slow", "huge", "none to half", "nothing", "two"), "done 16")
        rest = {"negative": "EINVAL", "least": "EINVAL", "image is as before": "True"}
        outcomes, others = self.attack("addresses")
        self.assertEqual(outcomes, fault | done | rest)
        self.assertEqual(others, ["answered"])


class Processes(HostileServerCase):
    def test_exec(self):
        self.assertEqual(self.attack("started_anew"), (None, ["answered"]))

    def test_fork(self):
        self.assertEqual(self.attack("forking"), (None, ["answered"]))

    def test_exit_with_clients_offered(self):
        ended, others = self.attack("gone", others=3)
        self.assertIsNone(ended)
        for other in others:
            self.assertRegex(other, r"^200 [0-9a-f]{12}$")          # of another container


class OwnConnections(HostileServerCase):
    def test_queue_is_full(self):
        self.assertEqual(self.attack("flood", 1), (None, ["answered"]))

    def test_from_the_port_of_a_doorbell(self):
        self.assertEqual(self.attack("disguised"), (["done"], ["answered"]))

    def test_again_and_again(self):
        count, others = self.attack("connecting", 1)
        self.assertEqual(others, ["answered"])
        self.assertGreater(count, 0)


class ClientSocket(HostileServerCase):
    def get(self, path: str, address: str = "") -> str:
        with request(address or self.address, path) as client:
            client.settimeout(2 * support.READY_SECONDS)
            return outcome(client)

    def test_kept_in_a_grandchild(self):
        self.assertEqual(self.get("/kept", self.short)[:4], "504 ")

    def test_kept_in_a_child_of_one_that_exits(self):
        self.assertEqual(self.get("/kept_and_left"), "closed")

    def test_sent_to_another_process(self):
        self.assertRegex(self.get("/sent"), "^200 [0-9a-f]{12}$")

    def test_sent_to_nobody(self):
        self.assertEqual(self.get("/in_flight", self.short), "closed")

    def test_gets_nowhere(self):
        with socket.create_server(("127.0.0.1", 0)) as host:
            words = in_hex(connect=[host.getsockname(), (test_hostile.lab.neighbour, 80)],
                           bind=[("127.0.0.1", 0), ("0.0.0.0", 8080), ("127.0.0.1", 8000)])
            self.assertEqual(self.get(f"/escaping?1?{words}"), "closed")
            self.assertEqual(got_through(self.said("escape")), {})
            host.setblocking(False)
            self.assertRaises(BlockingIOError, host.accept)

    def test_gets_nowhere_from_the_network_of_the_host(self):
        """There it is faasd that binds for it."""
        words = in_hex(connect=[], bind=[("127.0.0.1", 8081), ("127.0.0.1", 0), ("0.0.0.0", 8081)])
        self.assertEqual(self.get(f"/escaping?1?{words}", test_hostile.lab.host), "closed")
        found = wait_until(lambda: re.search(r"\[escape: (.*)\]", self.daemon.function_log("host")), "it has tried")
        self.assertEqual(got_through(found[1]), {})

    def test_listens(self):
        with request(self.address, "/listening"):
            host, port = self.said("listening").split(":")
            with socket.socket() as other:
                other.settimeout(1)
                self.assertRaises(TimeoutError, other.connect, (host, int(port)))
            self.assertEqual(self.said("accepting"), "TimeoutError('timed out')")


class Locks(unittest.TestCase):
    """A socket whose lock a container holds for as long as it lives: the loop does not wait for it, nor a restart."""

    def setUp(self):
        self.daemon = self.enterContext(support.Daemon("--subnet", "10.0.3.0/24", "--drain-timeout", "5s"))
        image = hostile_image(Entrypoint=[support.PYTHON, "-u", "/server.py"])
        self.address = self.daemon.deploy("f", image, "--timeout", "0", "--start-timeout", "1m")

    def test_of_a_client_s_socket_over_a_restart(self):
        with request(self.address, "/held") as client:
            container = self.said_in("held", client)
            held = wait_until(lambda: support.client_socket(self.daemon, client), "the server has it")
            self.addCleanup(os.close, held)
            self.assertEqual(self.daemon.stop(signal.SIGHUP), 0)
            with support.lock_held(held, self.cgroups(container)):
                self.daemon.start()
                self.assertEqual(self.daemon.info("f")["running"], 1)
                self.assertRegex(self.get("/"), "^200 ")

    def test_of_what_was_a_listener_over_a_restart(self):
        with request(self.address, "/turned") as client:
            container = self.said_in("turned", client)
            held = wait_until(lambda: self.turned_socket(container), "it is connected")
            self.addCleanup(os.close, held)
            with support.lock_held(held, self.cgroups(container)):
                client.sendall(b"x")            # now it accepts
                wait_until(lambda: any("lock_sock" in place for place in support.waits(self.daemon.process.pid)),
                           "the answer waits for the lock")
                self.assertRegex(self.get("/"), "^200 ")
                self.assertEqual(self.daemon.stop(signal.SIGHUP), 0)
            self.daemon.start()
            self.assertRegex(self.get("/"), "^200 ")

    def said_in(self, what: str, client: socket.socket) -> str:
        """Return the container that says so to its client."""
        return re.search(f"{what} in (.*)\n", read_until(client, b"\n").decode())[1]

    def get(self, path: str) -> str:
        with request(self.address, path) as client:
            return outcome(client)

    def cgroups(self, container: str) -> list[str]:
        return [path for path in support.container_cgroups(self.daemon) if path.endswith(container)]

    def turned_socket(self, container: str) -> int:
        """Return a duplicate of the socket of a container that is connected from port 8080 to another of its own."""
        for pid in support.container_pids(self.daemon, container):
            with faasd.kept_open(os.pidfd_open(pid)) as pidfd:
                for number in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError), faasd.duplicate_socket(pidfd, int(number)) as candidate:
                        if candidate.getsockname()[1] == 8080 and candidate.getpeername()[1] == 8082:
                            return candidate.detach()
        return 0


if __name__ == "__main__":
    unittest.main()
