"""--secret: a file of the user's in containers, and nowhere else."""

import base64
import itertools
import json
import os
import signal
import stat
import subprocess
import unittest
import urllib.parse
from pathlib import Path

import archives
import gate
import support
from clients import get
from test_volume import NAMED, NOTES

FIRST, SECOND = "correct horse battery staple 1", "correct horse battery staple 2"
DIRECTORY = "/run/secrets"


def image(*links: bytes, **config) -> bytes:
    layers = [support.python_layer("http.server", "sqlite3"), support.layer({"notes.py": NOTES, **NAMED})]
    return support.docker_archive(layers + ([archives.layer(*links)] if links else []), {
        "Entrypoint": [support.PYTHON, "/notes.py"], "User": "app", "ExposedPorts": {"80/tcp": {}}, **config})


class Secrets(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon("--verbose").start()
        cls.addClassCleanup(cls.daemon.close)
        cls.directory = support.temporary_directory()
        cls.addClassCleanup(subprocess.run, ["rm", "-rf", cls.directory], check=True)
        for name, text in (("first", FIRST), ("second", SECOND), ("large", "x" * 32769), ("whole", "x" * 32768)):
            (cls.directory / name).write_text(text)

    def file(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def ask(self, code: str, name: str = "f"):
        address = self.daemon.faas("ip", name).stdout.strip()
        return get(address, "/eval?" + urllib.parse.quote(code))[1]

    def read(self, name: str) -> str:
        return self.ask(f"open('{DIRECTORY}/{name}').read()").strip("'")

    def kept(self) -> list[Path]:
        """The files in which the daemon keeps secrets."""
        return sorted((self.daemon.state_dir / "secrets").glob("*/*"))

    def test_life_of_a_secret(self):
        self.daemon.faas("new", "f", "--contract", "server", "--secret", f"db={self.file('first')}", "-e", "A=shown",
                         stdin=image())
        self.assertEqual(self.read("db"), FIRST)
        self.assertEqual(self.ask(f"[oct(os.stat('{DIRECTORY}/db').st_mode), os.stat('{DIRECTORY}/db')[4:6]]"),
                         "['0o100400', (1000, 1001)]")
        mount = self.ask(f"[line.split() for line in open('/proc/self/mountinfo') if ' {DIRECTORY} ' in line]")
        self.assertIn("'tmpfs'", mount)
        self.assertIn("'ro,nosuid,nodev,noexec", mount)
        self.assertNotIn(FIRST, self.ask("os.environ"))
        first, = self.kept()
        self.assertEqual([stat.S_IMODE(path.stat().st_mode) for path in (first, first.parent, first.parent.parent)],
                         [0o600, 0o700, 0o700])
        self.assertEqual(self.daemon.info("f")["secrets"], ["db"])
        self.assertRegex(self.daemon.faas("info", "f").stdout, "secrets: +db\n")
        # Replaced and added to: what runs keeps what it has, what starts has the new.
        self.daemon.faas("set", "f", "--warm", "1", "--timeout", "0")
        self.daemon.wait_warm("f", 1)
        self.assertEqual(self.daemon.faas("set", "f", "--secret", f"db={self.file('second')}", "--secret",
                                          f"more={self.file('whole')}").stdout,
                         "✓ Set secrets of f: they apply to containers started from now on\n")
        self.assertEqual((self.read("db"), len(self.read("more"))), (SECOND, 32768))
        support.wait_until(lambda: len(self.kept()) == 2 and first not in self.kept(), "what was replaced is gone")
        for stop in (lambda: self.daemon.stop(signal.SIGHUP), self.daemon.kill):
            stop()
            self.daemon.start()
            self.assertEqual(self.read("db"), SECOND)
        kept = self.kept()
        refused = self.daemon.faas("set", "f", "--secret", f"third={self.file('first')}", "--entrypoint", "/no",
                                   check=False)
        self.assertEqual(refused.returncode, 1)
        self.assertEqual((self.kept(), self.daemon.info("f")["secrets"]), (kept, ["db", "more"]))
        self.daemon.faas("set", "f", "--reset", "--contract", "server")       # they are the function's, and no option
        self.assertEqual((self.kept(), self.daemon.info("f")["secrets"]), (kept, ["db", "more"]))
        self.daemon.faas("set", "f", "--unset-secret", "more")
        self.assertEqual(self.ask(f"os.listdir('{DIRECTORY}')"), "['db']")
        # Nowhere else.
        state = [path.read_text() for path in self.daemon.state_dir.rglob("*")
                 if path.is_file() and "rootfs" not in path.parts and path not in self.kept()]
        run = [path.read_text(errors="replace") for path in self.daemon.run_dir.rglob("*.json")]
        api = [self.daemon.api("GET", path)[1].decode() for path in
               ("/functions", "/functions/f", "/functions/f/versions", "/functions/f/logs", "/functions/f/isolation")]
        lines = [path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline")]
        for text in (*state, *run, *api, *lines, self.daemon.log()):
            for secret in (FIRST, SECOND):
                self.assertNotIn(secret, text)
                self.assertNotIn(base64.b64encode(secret.encode()).decode(), text)
        self.daemon.faas("rm", "f")
        self.assertEqual(list((self.daemon.state_dir / "secrets").iterdir()), [])

    def test_image_that_leads_elsewhere(self):
        """The image's own links, and a volume where they lead: a container's files decide nothing."""
        volume = support.temporary_directory()
        self.addCleanup(subprocess.run, ["rm", "-rf", volume], check=True)
        (volume / "secrets").symlink_to("/etc")
        self.addCleanup(self.daemon.faas, "rm", "f", check=False)
        self.daemon.faas("new", "f", "--contract", "server", "--secret", f"db={self.file('first')}",
                         stdin=image(archives.symlink("run", "../../var/run")))
        self.assertEqual(self.ask("open('/var/run/secrets/db').read()"), f"'{FIRST}'")
        result = self.daemon.faas("new", "f", "--volume", f"{volume}:/data:ro", check=False,
                                  stdin=image(archives.symlink("run", "data")))
        self.assertIn("links /run/secrets to /data/secrets, which is in the way of each container's own /data: change "
                      "the link or the volume, or use no secrets", result.stderr)
        self.assertFalse(Path("/etc/db").exists())
        result = self.daemon.faas("new", "f", "--reset", "--secret", f"db={self.file('first')}", check=False,
                                  stdin=image(archives.symlink("run", "run")))
        self.assertIn("too many symbolic links", result.stderr)
        # Where each container has other things than the image: there it would have no secret, and not say so.
        for links, real, target in (
                ({"run": "proc/1"}, "/proc/1/secrets", "/proc"), ({"run/secrets": "/dev"}, "/dev", "/dev"),
                ({"run/secrets": "/sys/x"}, "/sys/x", "/sys"), ({"run/secrets": "/"}, "/", "/dev"),
                ({"run": "dev/x", "dev/x": "/data"}, "/data/secrets", "/dev"),
                ({"run/secrets": "/etc"}, "/etc", "/etc/resolv.conf")):
            result = self.daemon.faas("new", "f", "--reset", "--secret", f"db={self.file('first')}", check=False,
                                      stdin=image(*itertools.starmap(archives.symlink, links.items())))
            self.assertEqual((result.returncode, result.stderr), (1, (
                f"faas: the image links {DIRECTORY} to {real}, which is in the way of each container's own {target}: "
                "change the link or the volume, or use no secrets\n")), links)

    def test_refused(self):
        self.daemon.deploy("g", support.small_image())
        self.addCleanup(self.daemon.remove, "g")
        for entry, status, says in ((f"a={self.file('large')}", 1, "over 32768"), ("a", 2, "write NAME=FILE"),
                                    (f"../a={self.file('first')}", 1, "bad name of a secret"),
                                    (f"a={self.file('none')}", 1, "cannot read")):
            result = self.daemon.faas("set", "g", "--secret", entry, check=False)
            self.assertEqual((result.returncode, result.stdout), (status, ""), entry)
            self.assertIn(says, result.stderr)
        several = [word for name in "abc" for word in ("--secret", f"{name}={self.file('whole')}")]
        self.assertIn("over 44 KiB together", self.daemon.faas("set", "g", *several, check=False).stderr)
        status, answer = self.daemon.api("PATCH", "/functions/g?secret=a%3DYQ%3D%3D")
        self.assertEqual(status, 400)
        self.assertIn("does not belong in an address", json.loads(answer)["error"])
        self.assertEqual(self.daemon.info("g")["secrets"], [])


class HangingDisk(unittest.TestCase):
    def test_holds_up_the_change_and_nobody_else(self):
        """A named pipe that nobody writes stands for it; and at the gate it shows which thread removes."""
        removed: list[tuple[str, bool]] = []

        def decide(call: gate.Call) -> None:
            if call.name in ("unlink", "unlinkat", "rmdir") and "/secrets/" in call.paths[0]:
                removed.append((call.paths[0].rpartition("/")[2], call.pid == keeper.daemon))
        keeper = gate.Gate(decide)
        self.addCleanup(keeper.close)
        directory = support.temporary_directory()
        hang = directory / "hang"
        daemon = support.Daemon(wrapper=keeper.wrapper, directory=directory, constants={"secrets.token_hex": (
            "lambda size, name=faasd.secrets.token_hex, threads=faasd.threading: [faasd.time.sleep(0.01) for _ in iter("
            "lambda: threads.current_thread() is not threads.main_thread() "       # whose names are containers'
            f"and faasd.os.path.exists({str(hang)!r}), False)] and False or name(size)")}).start()
        self.addCleanup(daemon.close)
        secret = daemon.directory / "secret"
        secret.write_text(FIRST)
        daemon.faas("new", "f", "--contract", "handler", "--secret", f"db={secret}", stdin=support.small_image())
        first, = (daemon.state_dir / "secrets/f").iterdir()
        daemon.faas("set", "f", "--secret", f"db={secret}")
        support.wait_until(removed.copy, "what was replaced is removed")
        self.assertEqual(removed, [(first.name, False)])
        path, = (daemon.state_dir / "secrets/f").iterdir()
        path.unlink()
        os.mkfifo(path)
        change = subprocess.Popen([*support.FAAS, "--socket", daemon.socket, "set", "f", "--timeout", "5"],
                                  stdout=subprocess.DEVNULL)
        try:
            support.wait_until(lambda: any("fifo" in text or "wait_for_partner" in text
                                           for text in support.waits(daemon.process.pid)), "its reader waits")
            self.assertEqual(daemon.info("f")["options"]["timeout"], 30)
        finally:
            path.write_text(SECOND)
            self.assertEqual(change.wait(support.READY_SECONDS), 0)
        # A change that is cut while a secret is on its way to the disk: the file that comes late goes too.
        path.unlink()
        path.write_text(FIRST)
        hang.touch()
        change = [*support.FAAS, "--socket", daemon.socket, "set", "f", "--secret", f"db={secret}"]
        with subprocess.Popen(change, stderr=subprocess.DEVNULL) as cut:
            try:
                support.wait_until(lambda: daemon.api("PATCH", "/functions/f?timeout=bad")[0] == 409, "it is under way")
                daemon.process.send_signal(signal.SIGTERM)
                support.wait_until(lambda: "stopping: 0 invocations" in daemon.log(), "it is cut")
            finally:
                hang.unlink()
        self.assertEqual((cut.returncode, daemon.process.wait(support.READY_SECONDS)), (1, 0))
        self.assertEqual(os.listdir(path.parent), [path.name])


if __name__ == "__main__":
    unittest.main()
