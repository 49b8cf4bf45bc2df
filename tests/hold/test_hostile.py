"""Proof from inside: an image that tries to get out, to spy and to wreck, beside neighbours that go on being served.

The attempts, and what is in the way of each, are in tests/handlers/hostile/. Real daemon, real containers: no mocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import unittest
from collections.abc import Iterable
from pathlib import Path

import support
from support import get, wait_until

import faasd


HOSTILE = support.TOP / "tests/handlers/hostile"
sys.path.insert(0, str(HOSTILE))
import attempts  # noqa: E402

ETH_P_ALL = 3               # linux/if_ether.h
MEMORY = 32 << 20           # bytes by which the daemon may have grown over all of it
# What ordinary.py imports beyond the handlers of other tests, and what that imports once it is used.
MODULES = ("asyncio", "multiprocessing.connection", "multiprocessing.heap", "multiprocessing.pool",
           "multiprocessing.popen_fork", "multiprocessing.queues", "multiprocessing.resource_tracker",
           "multiprocessing.shared_memory", "multiprocessing.synchronize", "platform", "sqlite3", "dataclasses")
NODES = {"memory": (1, 1, tarfile.CHRTYPE), "kmsg": (1, 11, tarfile.CHRTYPE), "disk": (8, 0, tarfile.BLKTYPE),
         "fuse": (10, 229, tarfile.CHRTYPE), "tun": (10, 200, tarfile.CHRTYPE), "null": (1, 3, tarfile.CHRTYPE),
         "zero": (1, 5, tarfile.CHRTYPE), "full": (1, 7, tarfile.CHRTYPE), "random": (1, 8, tarfile.CHRTYPE),
         "urandom": (1, 9, tarfile.CHRTYPE), "tty": (5, 0, tarfile.CHRTYPE), "ptmx": (5, 2, tarfile.CHRTYPE),
         "pts": (136, 0, tarfile.CHRTYPE)}
CAPABILITIES = struct.pack("<5I", 0x02000001, *[0x7F7F7F7F] * 4).decode()      # struct vfs_cap_data, linux/capability.h
PROGRAMS = {"setuid-root": (0o4755, 0, {}), "setuid-other": (0o4755, 33, {}), "setgid-root": (0o2755, 0, {}),
            "capable": (0o755, 0, {"SCHILY.xattr.security.capability": CAPABILITIES})}


# name: arguments, what they print. In /tmp, with $PORT a web server on the container's own lo.
PROGRAMS_THAT_MEAN_WELL = {
    "bash": (["-c", "for i in 3 1 2; do echo $i; done | (while read x; do echo $((x + 1)); done); echo x >/dev/stderr; "
              "read -r line < <(echo substituted); echo $line; (exit 3) & wait $! || echo waited $?"], "waited 3"),
    "busybox": (["sh", "-c", "echo b a | busybox tr ' ' '\\n' | busybox sort | busybox tr -d '\\n'; "
                 "busybox wget -qO- http://127.0.0.1:$PORT/; busybox tar cf t.tar /handler.py; busybox ps"],
                "abserved"),
    "perl": (["-e", "$p = fork; exit 5 unless $p; wait; print $? >> 8; open F, '/handler.py' or die"], "5"),
    "git": (["init", "/tmp/repository"], "Initialized empty Git repository"),
    "openssl": (["dgst", "-sha256", "/handler.py"], "(/handler.py)= "),
    "curl": (["--silent", "--show-error", "http://127.0.0.1:@PORT@/"], "served"),
    "node": (["-e", """
        const {Worker} = require("worker_threads"), http = require("http"), os = require("os");
        new Worker("require('worker_threads').parentPort.postMessage(42)", {eval: true}).on("message", answer => {
            os.networkInterfaces(); require("fs").watch("/tmp").close();
            console.log(require("child_process").execFileSync(process.execPath, ["-p", "6*7"]).toString(),
                        require("crypto").pbkdf2Sync("a", "b", 10, 8, "sha256").length);
            http.get("http://127.0.0.1:" + process.env.PORT,
                     response => response.on("data", data => console.log(`${answer} ${data}`)));
        });"""], "42 served"),
}
DATA = ("/usr/lib/ssl/openssl.cnf", "/etc/ssl/openssl.cnf", "/usr/share/nodejs")      # what they read at start


def host_layer(*trees: str | Path) -> bytes:
    """Return a layer with files and directories of this machine at their places, and the libraries they need."""
    files: set[str] = set()
    for tree in map(Path, trees):
        found = tree.rglob("*") if tree.is_dir() else [tree]
        files |= {str(path) for path in found if path.is_file() and path.suffix != ".pyc"}
    for file in [file for file in files if os.access(file, os.X_OK) or ".so" in file]:
        files |= support.libraries(file)
    return support.layer({file.lstrip("/"): Path(file).read_bytes() for file in sorted(files)})


def nodes_layer() -> bytes:
    """Return a layer with device nodes, setuid programs and a program with capabilities."""
    buffer = io.BytesIO()
    cat = Path(shutil.which("cat")).read_bytes()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, (major, minor, kind) in NODES.items():
            entry = tarfile.TarInfo(f"nodes/{name}")
            entry.type, entry.devmajor, entry.devminor, entry.mode = kind, major, minor, 0o666
            tar.addfile(entry)
        for name, (mode, owner, headers) in PROGRAMS.items():
            entry = tarfile.TarInfo(f"nodes/{name}")
            entry.mode, entry.uid, entry.gid, entry.size, entry.pax_headers = mode, owner, owner, len(cat), headers
            tar.addfile(entry, io.BytesIO(cat))
    return buffer.getvalue()


def hostile_image(more: Iterable[bytes] = (), **config) -> bytes:
    layers = [support.python_layer(*MODULES), host_layer(shutil.which("cat")), nodes_layer(),
              support.layer({path.name: path.read_bytes() for path in HOSTILE.glob("*.py")}), *more]
    return support.docker_archive(layers, {"Entrypoint": [support.PYTHON, "/handler.py"],
                                           "Env": ["PYTHONDONTWRITEBYTECODE=1"], **config})


class Lab:
    """One daemon for all tests: a neighbour, and the hostile image as the container's root and as another user."""

    def __init__(self):
        self.daemon = support.Daemon(constants=support.BRIEF_SURPLUS).start()
        try:
            self.neighbour = self.daemon.deploy("neighbour", support.handler_image(), "--warm", "1")
            image = hostile_image(Volumes={"/volume": {}})
            self.hostile = self.daemon.deploy("hostile", image, "--memory", "192m", "--pids", "48")
            self.user = self.daemon.deploy("user", hostile_image(User="1000:1000"), "--cap-add", "ALL")    # has none
            self.capable = self.daemon.deploy("capable", hostile_image(), "--cap-add", "ALL")
            for name in ("neighbour", "hostile", "user", "capable"):    # their logs are open files, which are counted
                wait_until(lambda name=name: b"> deployed" in self.daemon.api("GET", f"/functions/{name}/logs")[1],
                           "the log is there")
        except BaseException:
            self.daemon.close()
            raise
        self.memory = support.resident_memory(self.daemon.process.pid)


lab: Lab


def setUpModule():
    global lab
    lab = Lab()
    unittest.addModuleCleanup(lab.daemon.close)


def init_pid(daemon: support.Daemon, container: str) -> int:
    command = [support.RUNTIME, "--root", daemon.run_dir / "runc", "state", container]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["pid"]


class HostileCase(unittest.TestCase):
    """The neighbour is asked all the time and must answer; after each test the daemon is as it was before."""

    maxDiff = None

    def setUp(self):
        self.daemon, self.address = lab.daemon, lab.hostile
        self.settle()
        self.before = self.footprint()
        self.log_start = len(self.function_log())
        self._stop_asking = threading.Event()
        self.answers: list[tuple[int, str]] = []
        asking = threading.Thread(target=self.ask_neighbour)
        asking.start()
        self.addCleanup(asking.join)
        self.addCleanup(self._stop_asking.set)

    def ask_neighbour(self) -> None:
        """Ask the neighbour again and again for as long as the test runs."""
        while not self._stop_asking.is_set():
            try:
                self.answers.append(get(lab.neighbour, "/"))
            except AssertionError as error:
                self.answers.append((0, str(error)))
            time.sleep(0.2)                         # each takes a container: leave the CPUs to the attack

    def tearDown(self):
        wait_until(lambda: self.answers, "the neighbour answers")
        count = len(self.answers)
        wait_until(lambda: len(self.answers) > count, "the neighbour goes on answering")
        self._stop_asking.set()
        self.assertEqual(set(self.answers), {(200, "hello /")})
        self.settle()
        try:
            wait_until(lambda: self.footprint() == self.before, "all is as before", 10)
        except AssertionError:                  # say what is not
            self.assertEqual(self.footprint(), self.before)
        self.assertLess(support.resident_memory(self.daemon.process.pid), lab.memory + MEMORY)
        self.assertNotIn("Traceback", self.daemon.log())

    def settle(self) -> None:
        self.daemon.wait_idle("hostile")
        support.wait_until(lambda: len(self.daemon.wait_warm("neighbour", 1)) == 1, "the neighbour has one container")

    def footprint(self) -> dict:
        """Return the daemon's footprint; the neighbour's one warm container is another each time."""
        found = support.footprint(self.daemon)
        return {key: value if isinstance(value, int) else len(value.split() if isinstance(value, str) else value)
                for key, value in found.items()}

    def function_log(self) -> str:
        return self.daemon.api("GET", "/functions/hostile/logs")[1].decode()

    def ask(self, path: str):
        """Return the hostile handler's answer."""
        status, body = get(self.address, path)
        self.assertEqual(status, 200, body + self.function_log()[-2000:])
        return json.loads(body)

    def said(self, what: str) -> str:
        """Wait until the handler has printed [what: …] and return what."""
        def look():
            return re.search(rf"\[{what}: (.*)\]", self.function_log()[self.log_start:])
        return wait_until(look, f"the handler says {what}")[1]


class Attempts(HostileCase):
    """Everything in tests/handlers/hostile/attempts.py."""

    def check(self, address: str, but: Iterable[str] = ()) -> dict[str, str]:
        """Check what came of all attempts but some, whose outcomes are the value."""
        status, body = get(address, "/attempts")
        self.assertEqual(status, 200, body)
        outcomes = json.loads(body)
        self.assertEqual(outcomes.keys(), attempts.ATTEMPTS.keys())
        for name, attempt in attempts.ATTEMPTS.items():
            with self.subTest(name, stopped_by=attempt.stopped_by):
                if name not in but:
                    self.assertIn(outcomes[name], attempt.expected)
        return {name: outcomes[name] for name in but}

    def test_as_root(self):
        self.check(lab.hostile)

    def test_as_user(self):
        self.check(lab.user)

    def test_with_all_capabilities(self):
        """They let it become others of its own ids. Its setuid programs add nothing to what it has."""
        own = ("setuid", "setgid", "setgroups", "chown")
        programs = [name for name in attempts.ATTEMPTS if name.startswith("a program of the image")]
        outcomes = self.check(lab.capable, [*own, *programs])
        self.assertEqual({outcomes[name] for name in own}, {"done"})
        for name in programs:
            self.assertEqual({*re.findall(r"'(\w+)'", outcomes[name])}, {"0", "0" * 16, "00000000a80425fb"}, name)


class Neighbours(HostileCase):
    """Other functions, the host, and what a container is given of either."""

    def test_other_functions_and_the_host(self):
        """A victim owns one thing of every kind; nothing of it is there for another container, even of its function."""
        host = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(host.close)
        with socket.create_connection((self.address, 80)) as victim:
            victim.sendall(b"GET /hold HTTP/1.1\r\n\r\n")
            self.assertIn(b"ready", read_until(victim, b"ready\n"))
            container, = filter(self.is_hostile, os.listdir(self.daemon.run_dir / "containers"))
            state, run = self.daemon.state_dir, self.daemon.run_dir
            known = {"pid": init_pid(self.daemon, container), "host_port": host.getsockname()[1],
                     "abstract": "\0faasd/10.0.0.0/24", "address": lab.neighbour,
                     "paths": [str(path) for path in (self.daemon.rootfs("neighbour") / "handler.pl", state, run)],
                     "sockets": [str(self.daemon.socket), str(run / "containers" / container / "control.sock")]}
            outcomes = self.ask(f"/reach?{json.dumps(known).encode().hex()}")
        expected = dict.fromkeys(outcomes, {"ENOENT"}) | {
            "its port": {"ECONNREFUSED"}, "its abstract socket": {"ECONNREFUSED"}, "kill its process": {"ESRCH"},
            "port of the host": {"ECONNREFUSED"}, "abstract socket of faasd": {"ECONNREFUSED"},
            "another function's address": {"ENETUNREACH"}}
        for name, outcome in outcomes.items():
            with self.subTest(name):
                self.assertIn(outcome, expected[name])

    def is_hostile(self, container: str) -> bool:
        with contextlib.suppress(FileNotFoundError):        # the neighbour's come and go
            return os.readlink(self.daemon.run_dir / "containers" / container / "note").split()[2] == "hostile"
        return False

    def test_what_is_counted_by_user(self):
        """One function takes all it can get of what the kernel counts for each user; others have theirs."""
        libc = ctypes.CDLL(None, use_errno=True)
        with socket.create_connection((self.address, 80)) as greedy:
            greedy.sendall(b"GET /exhaust HTTP/1.1\r\n\r\n")
            counts = json.loads(read_until(greedy, b"}\n").partition(b"\r\n\r\n")[2])
            self.assertNotIn("no limit", {error for error, _ in counts.values()}, counts)
            self.assertEqual(json.loads(get(lab.user, "/take_one")[1]), dict.fromkeys(counts, "done"))
            self.assertGreaterEqual(libc.inotify_init(), 0, "root of the host has its own")


def read_until(sock: socket.socket, end: bytes) -> bytes:
    sock.settimeout(support.READY_SECONDS)
    data = b""
    while end not in data:
        received = sock.recv(65536)
        if not received:
            raise AssertionError(f"the connection ended: {data!r}")
        data += received
    return data


def in_hex(**known) -> str:
    """Return the JSON of what a handler is told, as it stands in a request."""
    return json.dumps(known).encode().hex()


def got_through(outcomes: str) -> dict[str, list[str]]:
    """Return which ways to escape were not refused, and how they ended."""
    return {name: found for name, found in json.loads(outcomes).items() if found not in (["EPERM"], ["ENOTSUP"])}


def syns(sniffer: socket.socket, source: str) -> Iterable[tuple[str, int]]:
    """Yield where packets went that open a connection from an address, its own clients' aside."""
    sniffer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            packet = sniffer.recv(65536)[14:]                   # behind the head of Ethernet
            place = socket.inet_ntoa(packet[16:20]), int.from_bytes(packet[22:24], "big")
            opens = packet[9] == socket.IPPROTO_TCP and packet[33] & 0x12 == 2
            if opens and packet[12:16] == socket.inet_aton(source) and place != (source, 80):
                yield place


class ClientSocket(HostileCase):
    """The client's socket is a socket of the host's network; it must be good for this client alone."""

    def test_options(self):
        self.assertEqual(set(self.ask("/options").values()), {"EPERM"})

    def test_connect_elsewhere(self):
        for address in ("127.0.0.1", lab.neighbour):
            with self.subTest(address), socket.create_server((address, 0)) as host:
                with contextlib.suppress(AssertionError):
                    get(self.address, "/connect_elsewhere?%s?%d" % host.getsockname())
                self.assertNotEqual(self.said("elsewhere"), "done")
                host.settimeout(0)
                self.assertRaises(BlockingIOError, host.accept)

    def test_listen_elsewhere(self):
        with socket.create_connection((self.address, 80)) as client:
            client.sendall(b"GET /listen_elsewhere HTTP/1.1\r\n\r\n")
            host, port = self.said("listening").split(":")
            with socket.socket() as other:
                other.settimeout(1)
                self.assertRaises(TimeoutError, other.connect, (host, int(port)))
        self.assertEqual(self.said("accepting"), "timeout")

    def test_sends_nothing(self):
        """To a port that listens, one that does not, a host that is not there: no packet, and no telling them apart."""
        with socket.create_server(("127.0.0.1", 0)) as host, socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer:
            sniffer.bind(("lo", 0))
            places = [host.getsockname(), ("127.0.0.1", 9), (lab.neighbour, 80), ("192.0.2.1", 80)]
            with contextlib.suppress(AssertionError):
                get(self.address, f"/escape?1?{in_hex(connect=places, bind=[])}")
            self.assertEqual(got_through(self.said("escape")), {})
            self.assertEqual(list(syns(sniffer, self.address)), [])

    def test_takes_no_port(self):
        """Not one that is free, nor one of a service that shares it, as root's sockets may: the client's is root's."""
        with socket.socket() as service:
            service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            service.bind(("127.0.0.1", 0))
            service.listen()
            places = [service.getsockname(), ("0.0.0.0", 0), ("127.0.0.1", 8000), (lab.neighbour, 8080)]
            with contextlib.suppress(AssertionError):
                get(self.address, f"/escape?1?{in_hex(connect=[], bind=places)}")
            self.assertEqual(got_through(self.said("escape")), {})
            for _ in range(20):
                with socket.create_connection(service.getsockname(), 1):
                    service.accept()[0].close()

    def test_linger(self):
        """close(2) of a socket that lingers waits for its client: faasd's must not."""
        with socket.create_connection((self.address, 80)) as client:
            client.sendall(b"GET /linger HTTP/1.1\r\n\r\n")
            wait_until(lambda: "[lingers]" in self.function_log()[self.log_start:], "the handler says so")
            self.assertEqual(self.daemon.info("hostile")["state"], "ready")
        self.daemon.wait_idle("hostile")        # once the client is gone: until then its answer is memory of ours

    def test_kept_by_a_process_that_left(self):
        status, body = get(self.address, "/keep_client")
        self.assertEqual(status, 502, body)

    def test_closed_at_once(self):
        status, body = get(self.address, "/close_client")
        self.assertEqual(status, 502, body)

    def test_left_unusable(self):
        with contextlib.suppress(AssertionError):
            get(self.address, "/cork")


class LockOfEpoll(unittest.TestCase):
    def test_daemon_goes_on(self):
        """What closes the client's socket last waits for it: the loop must not."""
        image = hostile_image([support.layer({"cold": bytes(4 << 20)})])
        address = lab.daemon.deploy("epoll", image, "--pids", "256", "--reuse", "100")
        self.addCleanup(lab.daemon.faas, "rm", "epoll", check=False)
        self.assertEqual(get(address, "/hold_epoll"), (200, "ok"))
        for _ in range(5):
            self.assertEqual(get(lab.neighbour), (200, "hello /"))
            time.sleep(0.2)
        lab.daemon.remove("epoll")              # which waits for its container, and with it for who closes the socket


class ClientSocketOfAPortForAll(unittest.TestCase):
    """Where anybody may bind the function's port, and the daemon leaves its ports for a while."""

    def test_over_restarts_and_to_the_end(self):
        token = support.temporary_directory() / "token"
        self.addCleanup(shutil.rmtree, token.parent)
        token.touch(0o600)
        token.write_text("a" * 32)
        with socket.create_server(("127.0.0.1", 0)) as self.host, support.Daemon(
                "--port", "8080", "--subnet", "10.0.1.0/24", "--api", "127.0.0.1:8000", "--api-token-file",
                str(token)) as self.daemon:
            self.evil = self.daemon.deploy("evil", hostile_image(), "--timeout", "60s")
            self.other = self.daemon.deploy("other")
            self.host.setblocking(False)
            for number in (signal.SIGKILL, signal.SIGHUP):
                with self.subTest(number):
                    self.check_while_no_daemon_runs(number)
            self.check_while_it_drains()
            self.assertEqual(support.guards(lab.daemon.run_dir), ["bind", "connect"], "those of another daemon stay")

    def check_while_no_daemon_runs(self, number: int) -> None:
        attack = self.attack("escape_unseen", 1)
        pid = init_pid(self.daemon, self.daemon.container().name)
        self.daemon.stop(number)
        self.assertEqual(support.guards(self.daemon.run_dir), ["bind", "connect"])
        path = Path(f"/proc/{pid}/root/tmp/escape")
        wait_until(path.exists, "the handler has tried")
        self.check(path.read_text())
        self.daemon.start()                             # its own port, and the API's, are free
        attack.close()
        self.assertEqual(self.daemon.info("other")["state"], "ready")
        self.assertEqual(support.guards(self.daemon.run_dir), ["bind", "connect"])

    def check_while_it_drains(self) -> None:
        with self.attack("escape", 2):
            self.assertEqual(self.daemon.stop(), 0)
        log = (self.daemon.state_dir / "logs/evil.log").read_text()
        self.check(re.search(r"\[escape: (.*)\]", log)[1])
        self.assertEqual(support.guards(self.daemon.run_dir), [])

    def attack(self, name: str, seconds: float) -> socket.socket:
        """Have a handler try for so long to take our ports and to connect; return its client once it has begun."""
        before = self.daemon.function_log("evil").count("[tries]")
        ports = [(self.evil, 8080), (self.other, 8080), ("127.0.0.1", 8000), ("0.0.0.0", 8000)]
        words = in_hex(connect=[self.host.getsockname()], bind=ports)
        client = socket.create_connection((self.evil, 8080))
        client.sendall(f"GET /{name}?{seconds}?{words} HTTP/1.1\r\n\r\n".encode())
        wait_until(lambda: self.daemon.function_log("evil").count("[tries]") > before, "the handler tries")
        return client

    def check(self, outcomes: str) -> None:
        self.assertEqual(got_through(outcomes), {})
        self.assertRaises(BlockingIOError, self.host.accept)


class NoGuard(unittest.TestCase):
    def test_a_kernel_without(self):
        """The daemon says what that leaves open, and serves. (The kernel knows no call of this number to guard.)"""
        with support.Daemon("--port", "8080", "--subnet", "10.0.2.0/24", constants={"GUARDED_CALLS": (99,)}) as daemon:
            self.assertEqual(daemon.log().count("cannot guard the addresses of functions"), 1)
            self.assertEqual(daemon.log().count("port 8080 is not privileged"), 1)
            self.assertEqual(get(daemon.deploy("f"), "/", 8080), (200, "hello /"))

    def test_a_port_that_the_kernel_gives_to_anybody(self):
        with support.Daemon("--port", "40000", "--subnet", "10.0.2.0/24") as daemon:
            self.assertIn("port 40000 is in net.ipv4.ip_local_port_range", daemon.log())


class ControlSocket(HostileCase):
    """The handler's other end of faasd's own conversation."""

    def test_junk(self):
        status, body = get(self.address, "/junk")       # it may be killed before it can say how that ended
        self.assertTrue(status == 502 or json.loads(body) in ("EPIPE", "ECONNRESET"), body)

    def test_descriptors(self):
        """Since Linux 6.16 they are refused; before, faasd is the one who closes them."""
        status, body = get(self.address, "/descriptors")
        if tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2])) >= (6, 16):
            self.assertEqual((status, json.loads(body)), (200, "EPERM"))

    def test_ready_without_end(self):
        status, body = get(self.address, "/ready_and_more")
        self.assertTrue(status == 502 or json.loads(body) in ("EPIPE", "ECONNRESET"), body)

    def test_shared_with_a_child(self):
        self.assertEqual(self.ask("/share_control"), "shared")


class Resources(HostileCase):
    """What a container may take of the machine."""

    def test_fork_bomb(self):
        error, count = self.ask("/fork_bomb")
        self.assertEqual(error, "EAGAIN")
        self.assertLessEqual(count, 48)

    def test_zombies(self):
        self.assertLess(self.ask("/zombies"), 48)

    def test_threads(self):
        self.assertLess(self.ask("/threads"), 48)

    def test_memory(self):
        status, body = get(self.address, "/memory")
        self.assertEqual(status, 502)
        self.assertIn("out of memory", body)

    def test_temporary_files(self):
        self.assertEqual(self.ask("/fill?/dev?/dev/shm"), [["ENOSPC", 1], ["ENOSPC", 64]])

    def test_temporary_files_are_memory(self):
        for places in ("/tmp?/dev/shm", "/", "/volume"):
            with self.subTest(places):
                status, body = get(self.address, f"/fill?{places}")
                self.assertEqual(status, 502, body)
                self.assertIn("out of memory", body)

    def test_buffers_of_sockets_are_memory(self):
        status, body = get(self.address, "/sockets")
        self.assertTrue(status == 200 and int(body) < 250 or status == 502 and "out of memory" in body, body)

    def test_open_files(self):
        error, count = self.ask("/open_files")
        self.assertEqual(error, "EMFILE")
        self.assertLess(count, 4096 if faasd.can_set_limits() else 65536)

    def test_cpu(self):
        self.assertEqual(self.ask("/spin?2"), "spun")

    def test_flood_of_output(self):
        self.assertEqual(self.ask("/flood?1"), "written")

    def test_forged_log(self):
        self.assertEqual(self.ask("/forge"), "written")
        text = self.function_log()[self.log_start:]
        self.assertNotRegex(text, r"(?m)^\S+ forged")
        self.assertTrue(all(c.isprintable() or c == "\n" for c in text), text)


def is_cached(path: Path) -> bool:
    """Whether the kernel has the first byte of a file in memory."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError as error:                # a file system that is nothing but memory
            if error.errno != errno.EOPNOTSUPP:
                raise
            return True


class MemoryCgroups(unittest.TestCase):
    # Evicts a page of the image and reads it again: it is charged to this container's memory cgroup, and keeps it.
    HANDLER = """
import os, socket
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
if descriptors:
    client = socket.socket(fileno=descriptors[0])
    file = os.open(client.recv(65536).split()[1].decode(), os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    body = os.read(file, 4096)
    client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
"""

    def test_kept_by_pages_of_the_image(self):
        pages = [f"page-{number}" for number in range(50)]
        with support.Daemon("--subnet", "10.1.0.0/24", constants={"MANY_ENDED": 10, "MANY_DYING": 20}) as daemon:
            image = support.handler_image(self.HANDLER, files=dict.fromkeys(pages, b"page"))
            address = daemon.deploy("f", image, "--start-timeout", "1m")
            files = [daemon.rootfs("f") / page for page in pages]
            with files[0].open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if is_cached(files[0]):
                self.skipTest("no page can be evicted from the file system of the images")
            for page in pages:
                self.assertEqual(get(address, f"/{page}"), (200, "page"))
            # v1 counts those of the whole machine, where other tests may have let go of many meanwhile: so go on.
            for page in itertools.cycle(pages):
                if sum(map(is_cached, files)) < 35:
                    break
                self.assertEqual(get(address, f"/{page}"), (200, "page"))


class Ends(HostileCase):
    """Containers that do not want to end, or to begin."""

    def test_ignores_signals_and_leaves_its_session(self):
        self.assertEqual(self.ask("/ignore_signals"), "stays")

    def test_stops_all_its_processes(self):
        self.assertEqual(self.ask("/stop_everything"), "stays")

    def test_warm_containers_full_of_processes(self):
        self.daemon.set("hostile", "--warm", "2", "-e", "AT_START=fork_at_start")
        self.daemon.wait_warm("hostile", 2)
        self.assertEqual(self.ask("/zombies"), 0)
        self.daemon.set("hostile", "--warm", "0", "--unset-env", "AT_START")


class Ordinary(HostileCase):
    """What the same containers must not keep from programs that mean well."""

    def test_python(self):
        for address in (lab.hostile, lab.user):
            status, body = get(address, "/python")
            self.assertEqual((status, set(json.loads(body).values())), (200, {"works"}), body)

    def test_programs(self):
        """Programs of this machine, with their libraries, in an image."""
        present = {name: path for name in PROGRAMS_THAT_MEAN_WELL if (path := shutil.which(name))}
        layers = [host_layer(*present.values(), *filter(os.path.exists, DATA))]
        address = self.daemon.deploy("ordinary", hostile_image(layers))
        try:
            for name, (script, expected) in PROGRAMS_THAT_MEAN_WELL.items():
                with self.subTest(name):
                    if name not in present:
                        self.skipTest(f"{name} is not installed")
                    argv = [present[name], *script]
                    status, body = get(address, f"/program?{json.dumps(argv).encode().hex()}")
                    self.assertEqual(status, 200, body)
                    code, out = json.loads(body)
                    self.assertEqual(code, 0, out)
                    self.assertIn(expected, out)
        finally:
            self.daemon.remove("ordinary")
