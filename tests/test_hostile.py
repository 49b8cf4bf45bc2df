"""Proof from inside: an image that tries to get out, to spy and to wreck, beside neighbours that go on being served.

The attempts, and what is in the way of each, are in tests/hostile/. Real daemon, real containers; nothing is simulated.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import threading
import unittest
from pathlib import Path

import support
from support import get, wait_until

HOSTILE = Path(__file__).with_name("hostile")
sys.path.insert(0, str(HOSTILE))
import attempts  # noqa: E402

MEMORY = 32 << 20           # bytes by which the daemon may have grown over all of it
STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("asyncio", "concurrent", "ctypes", "logging", "multiprocessing", "sqlite3")
EXTENSIONS = ("_asyncio", "_contextvars", "_ctypes", "_multiprocessing", "_posixshmem", "_queue", "_sqlite3", "fcntl", "mmap", "resource", "unicodedata")
NODES = {"memory": (1, 1, tarfile.CHRTYPE), "kmsg": (1, 11, tarfile.CHRTYPE), "disk": (8, 0, tarfile.BLKTYPE),
         "fuse": (10, 229, tarfile.CHRTYPE), "tun": (10, 200, tarfile.CHRTYPE)}
CAPABILITIES = struct.pack("<5I", 0x02000001, *[0x7F7F7F7F] * 4).decode()      # struct vfs_cap_data, linux/capability.h
PROGRAMS = {"setuid-root": (0o4755, 0, {}), "setuid-other": (0o4755, 33, {}), "setgid-root": (0o2755, 0, {}),
            "capable": (0o755, 0, {"SCHILY.xattr.security.capability": CAPABILITIES})}


def libraries(program: Path) -> set[str]:
    """Return the shared libraries that the loader takes for a program or a library, with the loader itself."""
    out = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(/\S+) \(0x", out))


def host_layer(*trees: str | Path) -> bytes:
    """Return a layer with files and directories of this machine at their places, and the libraries they need."""
    files: set[str] = set()
    for tree in map(Path, trees):
        files |= {str(p) for p in tree.rglob("*") if p.is_file() and p.suffix != ".pyc"} if tree.is_dir() else {str(tree)}
    for file in [file for file in files if os.access(file, os.X_OK) or ".so" in file]:
        files |= libraries(Path(file))
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


def hostile_image(**config) -> bytes:
    extras = [STDLIB / name for name in PACKAGES]
    extras += [path for name in EXTENSIONS for path in STDLIB.glob(f"lib-dynload/{name}.*")]
    layers = [support.python_layer(), host_layer(*extras, shutil.which("cat")), nodes_layer(),
              support.layer({path.name: path.read_bytes() for path in HOSTILE.glob("*.py")})]
    return support.docker_archive(layers, {
        "Entrypoint": [*support.python_layer.entrypoint, "/handler.py"], "Env": ["PYTHONDONTWRITEBYTECODE=1"], **config})


class HostileCase(unittest.TestCase):
    """One daemon with a neighbour and a hostile function; after each test the daemon is as it was before."""

    options: tuple[str, ...] = ()
    config: dict = {}
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        cls.neighbour = cls.daemon.deploy("neighbour", support.handler_image(), "--warm", "1")
        cls.address = cls.daemon.deploy("hostile", hostile_image(**cls.config), *cls.options)
        for name in ("neighbour", "hostile"):
            wait_until(lambda: b"> deployed" in cls.daemon.api("GET", f"/functions/{name}/logs")[1], "the log is there")
        cls.memory = support.resident_memory(cls.daemon.process.pid)

    def setUp(self):
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
                self.answers.append(get(self.neighbour, "/"))
            except AssertionError as error:
                self.answers.append((0, str(error)))

    def tearDown(self):
        wait_until(lambda: self.answers, "the neighbour answers")
        count = len(self.answers)
        wait_until(lambda: len(self.answers) > count, "the neighbour goes on answering")
        self._stop_asking.set()
        self.assertEqual(set(self.answers), {(200, "hello /")})
        self.settle()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.footprint() == self.before, "all is as before", 10)
        self.assertEqual(self.footprint(), self.before)
        self.assertLess(support.resident_memory(self.daemon.process.pid), self.memory + MEMORY)
        self.assertNotIn("Traceback", self.daemon.log())

    def settle(self) -> None:
        self.daemon.wait_idle("hostile")
        self.daemon.wait_warm("neighbour", 1)

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
    """Everything in tests/hostile/attempts.py, as the container's root."""

    def test_attempts(self):
        outcomes = self.ask("/attempts")
        self.assertEqual(outcomes.keys(), attempts.ATTEMPTS.keys())
        for name, attempt in attempts.ATTEMPTS.items():
            with self.subTest(name, stopped_by=attempt.stopped_by):
                self.assertIn(outcomes[name], attempt.expected)


class AttemptsOfAUser(Attempts):
    """The same, of an image that runs as a user of its own."""
    config = {"User": "1000:1000"}


class Neighbours(HostileCase):
    """Other functions, the host, and what a container is given of either."""

    def test_other_functions_and_the_host(self):
        """A victim owns one thing of every kind; nothing of it is there for another function, nor for another container of its own."""
        host = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(host.close)
        with socket.create_connection((self.address, 80)) as victim:
            victim.sendall(b"GET /hold HTTP/1.1\r\n\r\n")
            self.assertIn(b"ready", read_until(victim, b"ready\n"))
            container, = filter(self.is_hostile, os.listdir(self.daemon.run_dir / "containers"))
            known = {"pid": self.init_pid(container), "host_port": host.getsockname()[1], "abstract": "\0faasd/10.0.0.0/24",
                     "address": self.neighbour,
                     "paths": [str(self.daemon.rootfs("neighbour") / "handler.py"), str(self.daemon.state_dir), str(self.daemon.run_dir)],
                     "sockets": [str(self.daemon.socket), str(self.daemon.run_dir / "containers" / container / "control.sock")]}
            outcomes = self.ask(f"/reach?{json.dumps(known).encode().hex()}")
        expected = dict.fromkeys(outcomes, {"ENOENT"}) | {
            "its port": {"ECONNREFUSED"}, "its abstract socket": {"ECONNREFUSED"}, "kill its process": {"ESRCH"},
            "port of the host": {"ECONNREFUSED"}, "abstract socket of faasd": {"ECONNREFUSED"},
            "another function's address": {"ENETUNREACH"}}
        for name, outcome in outcomes.items():
            with self.subTest(name):
                self.assertIn(outcome, expected[name])

    def is_hostile(self, container: str) -> bool:
        config = self.daemon.run_dir / "containers" / container / "config.json"
        with contextlib.suppress(FileNotFoundError):        # the neighbour's come and go
            return json.loads(config.read_text())["hostname"] == "hostile"
        return False

    def init_pid(self, container: str) -> int:
        return json.loads((self.daemon.run_dir / "runc" / container / "state.json").read_text())["init_process_pid"]

    def test_what_is_counted_by_user(self):
        """One function takes all it can get of what the kernel counts for each user; others have theirs."""
        with socket.create_connection((self.address, 80)) as greedy:
            greedy.sendall(b"GET /exhaust HTTP/1.1\r\n\r\n")
            counts = json.loads(read_until(greedy, b"}\n").partition(b"\r\n\r\n")[2])
            print(counts)
            other = self.daemon.deploy("other", hostile_image())
            try:
                status, body = get(other, "/take_one")
                self.assertEqual((status, set(json.loads(body).values())), (200, {"done"}), body)
            finally:
                self.daemon.faas("rm", "other")


def read_until(sock: socket.socket, end: bytes) -> bytes:
    sock.settimeout(support.READY_SECONDS)
    data = b""
    while end not in data:
        received = sock.recv(65536)
        if not received:
            raise AssertionError(f"the connection ended: {data!r}")
        data += received
    return data


class ClientSocket(HostileCase):
    """The client's socket is a socket of the host's network; it must be good for this client alone."""

    options = ("--timeout", "10")

    def test_options(self):
        self.assertEqual(set(self.ask("/options").values()), {"EPERM"})

    def test_connect_elsewhere(self):
        for address in ("127.0.0.1", self.neighbour):
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

    def test_linger(self):
        """close(2) of a socket that lingers waits for its client: faasd's must not."""
        with socket.create_connection((self.address, 80)) as client:
            client.sendall(b"GET /linger HTTP/1.1\r\n\r\n")
            wait_until(lambda: "[lingers]" in self.function_log()[self.log_start:], "the handler says so", 5)
            self.daemon.wait_idle("hostile")

    def test_kept_by_a_process_that_left(self):
        status, body = get(self.address, "/keep_client")
        self.assertEqual(status, 502, body)

    def test_closed_at_once(self):
        status, body = get(self.address, "/close_client")
        self.assertEqual(status, 504, body)

    def test_left_unusable(self):
        with contextlib.suppress(AssertionError):
            get(self.address, "/cork")


class ControlSocket(HostileCase):
    """The handler's other end of faasd's own conversation."""

    options = ("--timeout", "5")

    def test_junk(self):
        with contextlib.suppress(AssertionError):
            get(self.address, "/junk")

    def test_descriptors(self):
        with contextlib.suppress(AssertionError):
            print(get(self.address, "/descriptors"))

    def test_ready_without_end(self):
        with contextlib.suppress(AssertionError):
            get(self.address, "/ready_and_more")

    def test_shared_with_a_child(self):
        self.assertEqual(get(self.address, "/share_control"), (200, ""))


class Resources(HostileCase):
    """What a container may take of the machine."""

    options = ("--timeout", "20", "--memory", "160m", "--pids", "48")
    config = {"Volumes": {"/volume": {}}}

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
        self.assertIn("out of memory?", body)

    def test_temporary_files(self):
        for directory, size in (("/tmp", 64), ("/dev/shm", 64), ("/dev", 1), ("/volume", 64)):
            with self.subTest(directory):
                self.assertEqual(self.ask(f"/fill?{directory}"), [["ENOSPC", size]])

    def test_temporary_files_are_memory(self):
        status, body = get(self.address, "/fill?/tmp?/dev/shm?/volume")
        self.assertEqual(status, 502, body)
        self.assertIn("out of memory?", body)

    def test_open_files(self):
        error, count = self.ask("/open_files")
        self.assertEqual(error, "EMFILE")
        self.assertLess(count, 65536)

    def test_socket_buffers(self):
        print(get(self.address, "/sockets"))

    def test_cpu(self):
        status, _ = get(self.address, "/spin")
        self.assertEqual(status, 504)

    def test_flood_of_output(self):
        self.assertEqual(self.ask("/flood?2"), "written")

    def test_forged_log(self):
        self.assertEqual(self.ask("/forge"), "written")
        text = self.function_log()[self.log_start:]
        self.assertNotRegex(text, r"(?m)^\S+ forged")
        self.assertTrue(all(c.isprintable() or c == "\n" for c in text), text)


class Ends(HostileCase):
    """Containers that do not want to end."""

    def test_ignores_signals_and_leaves_its_session(self):
        self.assertEqual(get(self.address, "/ignore_signals")[0], 200)

    def test_stops_all_its_processes(self):
        self.assertEqual(get(self.address, "/stop_everything")[0], 200)
