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
EXTENSIONS = ("_asyncio", "_contextvars", "_ctypes", "_multiprocessing", "_posixshmem", "_queue", "_sqlite3", "fcntl", "mmap", "resource")
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
