"""What lacks, fails, hangs or is damaged: the others are served meanwhile, and when the fault is over all works again.

In each test `f` meets the fault. Its neighbour `g`, whose one container is reused, is asked all the time.
"""

import ast
import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import unittest
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gate
import support
from clients import get, read_all, request
from support import wait_until

import faasd

MIB = 1 << 20
FORKS = ("vfork", "clone", "clone3")


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def ask(address: str, path: str = "/") -> str:
    """Send one request and return all of the answer."""
    return read_all(request(address, path)).decode()


def fill_file(path: Path) -> None:
    """Write to a file until its disk is full."""
    with open(path, "wb", buffering=0) as file:
        for size in (MIB, 4096, 1):         # what does not fit as a whole is refused by some file systems
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    continue


class FaultCase(unittest.TestCase):
    def start(self, *arguments: str, **more) -> support.Daemon:
        """Start a daemon with f, which has no warm container, and g."""
        daemon = support.Daemon(*arguments, **more)
        return self.begin(daemon)

    def begin(self, daemon: support.Daemon) -> support.Daemon:
        self.daemon = daemon.start()
        self.addCleanup(daemon.close)
        self.image = support.small_image()
        self.f = self.deploy("f")["address"]
        self.g = self.deploy("g", "warm=1&reuse=1000000")["address"]
        self.settle()
        return daemon

    def deploy(self, name: str, options: str = "warm=0", status: int = 201) -> dict:
        answer = self.daemon.api("POST", f"/functions/{name}?{options}", self.image)
        self.assertEqual(answer[0], status, answer[1])
        return json.loads(answer[1])

    def settle(self) -> None:
        """Wait until there is no container but g's."""
        self.daemon.wait_idle("f")
        self.daemon.wait_warm("g", 1)
        wait_until(lambda: self.containers() == 1, "one container is left")

    def containers(self) -> int:
        return sum(path.is_dir() for path in (self.daemon.run_dir / "containers").iterdir())

    @contextlib.contextmanager
    def neighbour_is_served(self) -> Iterator[None]:
        """Ask g again and again meanwhile: it answers each time."""
        over = threading.Event()

        def keep_asking() -> list[str]:
            answers = []
            while not (over.is_set() and answers):
                answers.append(ask(self.g))
                over.wait(0.01)
            return answers
        with ThreadPoolExecutor() as pool:
            asking = pool.submit(keep_asking)
            try:
                yield
            finally:
                over.set()
        self.assertEqual({answer.split()[1] for answer in asking.result()}, {"200"})

    def all_is_well(self) -> None:
        """Everything works again, and nothing is left of what failed."""
        daemon = self.daemon
        self.assertEqual(get(self.f), (200, "1"))
        self.assertEqual(daemon.api("PATCH", "/functions/f?timeout=20")[0], 200)
        address = self.deploy("new")["address"]
        self.assertEqual(get(address), (200, "1"))
        self.assertEqual(daemon.api("DELETE", "/functions/new")[0], 200)
        self.settle()
        self.assertEqual(sorted(support.addresses()), sorted([f"{self.f}/32", f"{self.g}/32"]))
        self.assertEqual(os.listdir(daemon.state_dir / "tmp"), [])
        self.assertEqual(sorted(os.listdir(daemon.state_dir / "images")), ["f", "g"])
        self.assertEqual(len(list((daemon.state_dir / "images" / "f").iterdir())), 1)
        self.assertEqual(len(support.list_containers(daemon)), 1)
        self.assertEqual(len({path.rpartition("/")[2] for path in support.container_cgroups(daemon)}), 1)

    def assert_one_line(self, result: subprocess.CompletedProcess, words: str) -> None:
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertIn(words, result.stderr.splitlines()[0])
        self.assertTrue(result.stderr.startswith("faas: "), result.stderr)


class Space(FaultCase):
    """STATE_DIR is a small tmpfs, filled up in one way or the other."""

    def start_on_tmpfs(self, options: str) -> support.Daemon:
        disk = support.temporary_directory()
        self.addCleanup(shutil.rmtree, disk)
        run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk))
        self.addCleanup(run, "umount", str(disk))
        daemon = support.Daemon()
        daemon.state_dir = disk
        return self.begin(daemon)

    def fill(self, room: int) -> None:
        """Leave so much room on the disk, in bytes."""
        fill_file(self.daemon.state_dir / "fill")
        os.truncate(self.daemon.state_dir / "fill", os.path.getsize(self.daemon.state_dir / "fill") - room)

    def refuse_all_changes(self) -> None:
        before = self.daemon.info("f")["options"], (self.daemon.state_dir / "registry.json").read_bytes()
        for method, path, body in (("POST", "/functions/new", self.image), ("POST", "/functions/f", self.image),
                                   ("PATCH", "/functions/f?timeout=12", b""), ("DELETE", "/functions/f", b"")):
            status, answer = self.daemon.api(method, path, body)
            self.assertEqual(status, 507, answer)
            self.assertIn("no space left on the device; free some and try again", json.loads(answer)["error"])
        self.assertEqual(get(self.f), (200, "1"))
        after = self.daemon.info("f")["options"], (self.daemon.state_dir / "registry.json").read_bytes()
        self.assertEqual(after, before)
        self.assertEqual(os.listdir(self.daemon.state_dir / "tmp"), [])

    def test_disk_is_full(self):
        daemon = self.start_on_tmpfs("size=48m,mode=0700")
        with self.neighbour_is_served():
            for room in (6, 10, 13):        # an archive has 7 MiB, and so have its files
                self.fill(room * MIB)
                status, answer = daemon.api("POST", "/functions/new", self.image)
                if status == 201:           # the archive may have been unpacked as it came
                    daemon.api("DELETE", "/functions/new")
                else:
                    self.assertEqual(status, 507, answer)
                self.assertEqual(os.listdir(daemon.state_dir / "tmp"), [])
                self.assertEqual(len(list((daemon.state_dir / "images").glob("*/*"))), 2)
                (daemon.state_dir / "fill").unlink()
            self.fill(0)
            self.refuse_all_changes()
            wait_until(lambda: "g.log: No space left on device" in daemon.log(), "the log cannot be written")
            self.assert_one_line(daemon.faas("set", "f", "--timeout", "12", check=False), "no space left on the device")
            (daemon.state_dir / "fill").unlink()
        self.all_is_well()
        lines = daemon.faas("logs", "g", "-n", "1").stdout
        self.assertEqual(ask(self.g)[9:12], "200")
        daemon.wait_idle("g")
        self.assertNotEqual(daemon.faas("logs", "g", "-n", "1").stdout, lines)
        for line in daemon.function_log("g").splitlines():
            self.assertRegex(line, r"^\S+Z \S+ [|>] [^|>]+$")      # none was cut, with the next one behind it
        self.assertEqual(daemon.stop(), 0)
        os.truncate(daemon.state_dir / "faasd.lock", 0)
        self.fill(0)
        daemon.start()
        self.assertEqual(get(self.f), (200, "1"))

    def test_inodes_are_used_up(self):
        daemon = self.start_on_tmpfs("size=48m,nr_inodes=200,mode=0700")
        fill = daemon.state_dir / "fill"
        fill.mkdir()
        with self.neighbour_is_served():
            for room in (0, 3, 8):
                with contextlib.suppress(OSError):
                    for number in itertools.count():
                        (fill / str(number)).touch()
                for number in range(room):
                    (fill / str(number)).unlink()
                if room == 0:
                    self.refuse_all_changes()
                else:
                    self.deploy("new", status=507)
                self.assertEqual(os.listdir(daemon.state_dir / "tmp"), [])
                shutil.rmtree(fill)
                fill.mkdir()
        self.all_is_well()

    def test_tmpfs_of_the_containers_is_full(self):
        daemon = self.start()
        if not os.path.ismount(daemon.run_dir / "containers"):
            self.skipTest("the run-dir is on a tmpfs already, which others use too")
        fill = daemon.run_dir / "containers" / "fill"
        with self.neighbour_is_served():
            fill_file(fill)
            status, body = get(self.f)
            self.assertEqual(status, 503)
            self.assertIn("cannot start a container: No space left on device", body)
            self.assertIn("No space left on device", self.deploy("new", status=422)["error"])
            fill.unlink()
        self.all_is_well()


class Logs(FaultCase):
    def test_logs_are_read_only(self):
        daemon = self.start()
        logs = daemon.state_dir / "logs"
        with self.neighbour_is_served():
            run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(logs))
            try:
                address = self.deploy("h")["address"]
                self.assertEqual(get(address), (200, "1"))
                wait_until(lambda: "h.log: Read-only file system" in daemon.log(), "its log cannot be written")
                self.assertEqual(daemon.faas("rm", "h").returncode, 0)
            finally:
                run("umount", str(logs))
        self.all_is_well()
        self.deploy("h")
        self.assertIn("deployed", daemon.function_log("h"))

    def test_logs_are_deleted(self):
        daemon = self.start()
        daemon.wait_idle("f")                   # nothing is about to be written
        shutil.rmtree(daemon.state_dir / "logs")
        with self.neighbour_is_served():
            self.assertEqual(get(self.f)[0], 200)
            daemon.wait_idle("f")
            self.assertEqual(daemon.function_log("f").count("outcome=answered"), 1)
        self.all_is_well()


class Processes(FaultCase):
    def test_no_process_can_be_made(self):
        """fork fails with EAGAIN, as at a limit of processes, and with ENOMEM."""
        failure: int | None = None

        def decide(call: gate.Call) -> int | None:
            return failure if call.of == "daemon" and call.name in FORKS and not call.starts_thread else None
        daemon = self.start_at_gate(decide)
        for number in (errno.EAGAIN, errno.ENOMEM):
            failure = number
            with self.neighbour_is_served():
                status, body = get(self.f)
                self.assertEqual(status, 503)
                self.assertIn(f"cannot start a container: {os.strerror(number)}", body)
                self.assertIn(os.strerror(number), self.deploy("new", status=503)["error"])
                self.assert_one_line(daemon.faas("set", "f", "--timeout", "12", check=False), os.strerror(number))
                self.assertEqual(daemon.api("DELETE", "/functions/f")[0], 200)
                self.assertIn(f"{self.f}/32", support.addresses())          # nobody could take it away
                failure = None
                self.assertEqual(self.deploy("f")["address"], self.f)
            self.all_is_well()

    def start_at_gate(self, decide) -> support.Daemon:
        keeper = gate.Gate(decide)
        self.addCleanup(keeper.close)
        return self.start(wrapper=keeper.wrapper)

    def test_descriptors_are_used_up(self):
        daemon = self.start()
        pid = daemon.process.pid
        soft, hard = (word for word in Path(f"/proc/{pid}/limits").read_text().split("Max open files")[1].split()[:2])
        with ThreadPoolExecutor() as pool:
            for room in range(8):           # the next one has no descriptor left, or the one after …
                lines = daemon.log().count("Too many open files")
                used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
                run("prlimit", f"--pid={pid}", f"--nofile={used + room}:{hard}")
                client = pool.submit(get, self.f)
                wait_until(lambda: client.done() or daemon.log().count("Too many open files") > lines, "it lacks some")
                run("prlimit", f"--pid={pid}", f"--nofile={soft}:{hard}")
                self.assertIn(client.result()[0], (200, 503))
                daemon.wait_idle("f")
        daemon.wait_log("cannot accept: Too many open files")
        daemon.wait_log("cannot start a container: Too many open files")
        self.all_is_well()

    def test_unpacking_child_is_killed(self):
        def decide(call: gate.Call) -> None:
            if call.of == "unpack" and killing:
                os.kill(call.pid, signal.SIGKILL)
        killing = False
        self.start_at_gate(decide)
        killing = True
        with self.neighbour_is_served():
            answer = self.deploy("new", status=500)
            self.assertEqual(answer["error"], "unpacking the image was killed by SIGKILL (out of memory?)")
            killing = False
        self.all_is_well()

    def test_signal_cannot_be_sent(self):
        """A kill that fails is tried again, and the client has its answer."""
        refused = 3

        def decide(call: gate.Call) -> int | None:
            nonlocal refused
            if call.of != "daemon" or refused >= 3:
                return None
            if call.name == "openat" and call.paths[0].endswith("/cgroup.kill"):        # which needs no signal
                return errno.EPERM
            refused += call.name == "pidfd_send_signal"
            return errno.EPERM if call.name == "pidfd_send_signal" else None
        daemon = self.start_at_gate(decide)
        self.assertEqual(daemon.api("PATCH", "/functions/f?timeout=200ms")[0], 200)
        with self.neighbour_is_served():
            refused = 0
            self.assertEqual(get(self.f, "/label?3600")[0], 504)
        self.assertEqual(refused, 3)
        daemon.wait_log("cannot kill its process")
        self.assertEqual(daemon.api("PATCH", "/functions/f?timeout=30")[0], 200)
        self.all_is_well()

    def test_disk_fails_to_sync(self):
        """EIO of fsync: there a disk tells that it has lost what was written."""
        failing = ""

        def decide(call: gate.Call) -> int | None:
            return errno.EIO if call.of == "daemon" and call.name == "fsync" and call.paths == [failing] else None
        daemon = self.start_at_gate(decide)
        registry = daemon.state_dir / "registry.json"
        before = registry.read_bytes()
        with self.neighbour_is_served():
            failing = str(daemon.state_dir / ".registry.json.new")
            answer = daemon.api("PATCH", "/functions/f?timeout=12")
            self.assertEqual((answer[0], json.loads(answer[1])["error"]),
                             (500, "writing the registry: Input/output error"))
            self.assertEqual((registry.read_bytes(), daemon.info("f")["options"]["timeout"]), (before, 30))
            failing = str(daemon.state_dir)
            self.assertEqual(daemon.api("PATCH", "/functions/f?timeout=12")[0], 200)
            daemon.wait_log("may be an older one after a power loss: Input/output error")
            self.assertIn(b'"timeout": 12', registry.read_bytes())
            failing = ""
        self.all_is_well()

    def test_disk_fails_to_take_an_image(self):
        """EIO of syncfs: the registry must not name the image."""
        failing = False

        def decide(call: gate.Call) -> int | None:
            return errno.EIO if call.of == "daemon" and call.name == "syncfs" and failing else None
        daemon = self.start_at_gate(decide)
        registry = (daemon.state_dir / "registry.json").read_bytes()
        with self.neighbour_is_served():
            failing = True
            answer = self.deploy("new", status=500)
            self.assertEqual(answer["error"], "writing the image to disk: Input/output error")
            failing = False
        self.assertEqual((daemon.state_dir / "registry.json").read_bytes(), registry)
        self.assertFalse((daemon.state_dir / "images" / "new").exists())
        self.all_is_well()


class Programs(FaultCase):
    """The runtime and ip, each behind a script of ours."""

    def setUp(self):
        self.bin = support.temporary_directory()
        self.addCleanup(shutil.rmtree, self.bin)
        self.flag = self.bin / "fault"

    def wrapper(self, name: str, fault: str) -> Path:
        """Make a program that does what the real one does, or fault while the flag is there."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n[ -e {self.flag} ] && {fault}\nexec {shutil.which(name)} \"$@\"\n")
        path.chmod(0o755)
        return path

    def start_with(self, name: str, fault: str, **more) -> support.Daemon:
        return self.start(env={"PATH": f"{self.wrapper(name, fault).parent}:{os.environ['PATH']}"}, **more)

    def test_runc_is_missing(self):
        daemon = self.start_with(support.RUNTIME, "exit 1")
        with self.neighbour_is_served():
            (self.bin / support.RUNTIME).rename(self.bin / "away")
            status, body = get(self.f)
            self.assertEqual(status, 503)
            self.assertIn("cannot start a container: No such file or directory", body)
            self.assertIn("No such file or directory", self.deploy("new", status=422)["error"])
            self.assert_one_line(daemon.faas("set", "f", "--timeout", "9", check=False), "No such file or directory")
            (self.bin / "away").rename(self.bin / support.RUNTIME)
        self.all_is_well()

    def test_runc_fails(self):
        self.start_with(support.RUNTIME, "{ echo out of luck >&2; exit 3; }")
        with self.neighbour_is_served():
            self.flag.touch()
            status, body = get(self.f)
            self.assertEqual(status, 502)
            self.assertIn("exited with status 3 before it connected", body)
            self.assertEqual(self.deploy("new", status=422)["output"], ["out of luck"])
            self.flag.unlink()
        self.all_is_well()

    def test_runc_hangs(self):
        daemon = self.start_with(support.RUNTIME, "exec sleep 3600", constants={"KILL_TIMEOUT": 0.5})
        self.assertEqual(daemon.api("PATCH", "/functions/f?start_timeout=3s")[0], 200)
        with self.neighbour_is_served():
            self.flag.touch()
            status, body = get(self.f)
            self.assertEqual(status, 504)
            self.assertIn("did not connect to /control.sock within 3 s", body)
            self.assertIn("within 3 s", self.deploy("new", "start_timeout=3s", status=422)["error"])
            self.flag.unlink()
        self.all_is_well()

    def test_ip_fails(self):
        daemon = self.start_with("ip", "{ echo RTNETLINK answers: no >&2; exit 2; }")
        self.deploy("h")
        self.deploy("i")
        with self.neighbour_is_served():
            self.flag.touch()
            self.assertEqual(self.deploy("new", status=500)["error"],
                             "cannot add 10.0.0.14 to lo: RTNETLINK answers: no")
            self.assertEqual(daemon.faas("rm", "h").returncode, 0)
            self.assertIn("10.0.0.12/32", support.addresses())
            self.assertEqual(get(self.f)[0], 200)
            self.flag.unlink()
            self.assertEqual(daemon.faas("rm", "i").returncode, 0)
            self.assertEqual(len(support.addresses()), 2)       # h's is gone too
        self.all_is_well()


class Clock(FaultCase):
    def test_deadlines_do_not_depend_on_the_time_of_day(self):
        """The daemon's wall clock jumps by years at each look."""
        daemon = self.start(constants={"time.time": "lambda: __import__('random').uniform(0, 2e9)"})
        with self.neighbour_is_served():
            self.assertEqual(daemon.api("PATCH", "/functions/f?timeout=1&concurrency=1&queue_timeout=500ms")[0], 200)
            with ThreadPoolExecutor() as pool:
                slow = pool.submit(get, self.f, "/label?3600")
                wait_until(lambda: daemon.info("f")["running"] == 1, "it hangs")
                self.assertEqual(get(self.f)[0], 503)
                self.assertEqual(slow.result()[0], 504)
        self.all_is_well()

    def test_nothing_but_what_people_read_asks_for_the_time_of_day(self):
        allowed = {"timestamp", "statistics", "parse_since", "process_metrics"}
        tree = ast.parse((support.TOP / "faasd.py").read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if ast.unparse(call.func) in ("time.time", "datetime.now", "time.localtime", "datetime.utcnow"):
                    self.assertIn(function.name, allowed)


class Registry(unittest.TestCase):
    """A registry that no faasd wrote is refused, never overwritten."""

    def setUp(self):
        self.directory = tempfile.TemporaryDirectory(prefix=support.PREFIX)
        self.addCleanup(self.directory.cleanup)
        self.path = Path(self.directory.name) / "registry.json"
        options = faasd.Options()
        self.record = faasd.FunctionRecord("f", "10.0.0.10", faasd.FIRST_ID, "2026", "2026", [
            faasd.VersionRecord(1, "0123456789ab", "2026", options)])
        faasd.Registry(self.path).save([self.record])
        self.good = json.loads(self.path.read_text())

    def refuse(self, content: bytes) -> str:
        self.path.write_bytes(content)
        with self.assertRaises(faasd.FaasdError) as caught:
            faasd.Registry(self.path).load()
        self.assertNotIsInstance(caught.exception, faasd.UsageError)        # exit status 1
        self.assertEqual(self.path.read_bytes(), content)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def test_good_one(self):
        self.assertEqual(faasd.Registry(self.path).load(), [self.record])

    def test_damaged_file(self):
        whole = self.path.read_bytes()
        for content in (b"", b"{", b"null", b"[]", b"\0" * len(whole), b"\xff\xfe", b"[" * 100_000, b'{"format": 4}',
                        *(whole[:cut] for cut in range(1, len(whole) - 2, 37))):
            with self.subTest(content[:40]):
                line = self.refuse(content)
                self.assertIn("registry.json is damaged (", line)
                self.assertIn("restore it from a backup, or move it away to start without functions", line)

    def test_damaged_entries(self):
        def version(**changes) -> dict:
            return {"versions": [{**self.good["functions"][0]["versions"][0], **changes}]}

        def options(**changes) -> dict:
            return version(options={**self.good["functions"][0]["versions"][0]["options"], **changes})
        for changes in ({"name": "../../etc"}, {"name": "/etc"}, {"name": ""}, {"name": 1}, {"name": "F"},
                        {"address": "nowhere"}, {"address": "10.0.0"}, {"address": "::1"}, {"address": 167772170},
                        {"address": "10.0.0.10/8"}, {"address": None}, {"created": 1}, {"updated": None},
                        {"first_id": 0}, {"first_id": None}, {"first_id": "1000000"}, {"highest": "2"},
                        {"highest": 1.5},
                        {"versions": []}, {"versions": {}}, {"versions": None}, {"versions": ["0123456789ab"]},
                        version(image="../../../etc"), version(image="0123"), version(image=None), version(number=0),
                        version(number="1"), version(deployed=0), version(options={}), version(options=None),
                        options(memory="512m"), options(memory=1), options(cpus=None), options(timeout="30"),
                        options(env="A=1"),
                        options(env=["A"]), options(env=[1]), options(cmd=[None]), options(warm="many"),
                        options(concurrency=1.5), options(queue_timeout=0)):
            with self.subTest(changes):
                entry = {**self.good["functions"][0], **changes}
                self.assertIn("is damaged", self.refuse(json.dumps({**self.good, "functions": [entry]}).encode()))
        for missing in self.good["functions"][0].keys() - {"secrets", "highest"}:       # an older faasd had none
            with self.subTest(missing=missing):
                entry = {key: value for key, value in self.good["functions"][0].items() if key != missing}
                self.assertIn("is damaged (no '", self.refuse(json.dumps({**self.good, "functions": [entry]}).encode()))

    def test_duplicates(self):
        first, = self.good["functions"]
        for second, words in (({**first, "address": "10.0.0.11"}, "2 functions have the name f"),
                              ({**first, "name": "g"}, "2 functions have the address 10.0.0.10"),
                              ({**first, "name": "g", "address": "10.0.0.11"}, "2 functions have the first_id ")):
            with self.subTest(words):
                self.assertIn(words, self.refuse(json.dumps({**self.good, "functions": [first, second]}).encode()))

    def test_newer_faasd(self):
        for change, words in (({"format": 99}, "has format 99"), ({"format": 2}, "has format 2"),
                              ({"format": "2.1"}, "has format '2.1'")):
            with self.subTest(change):
                line = self.refuse(json.dumps({**self.good, **change}).encode())
                self.assertIn(words, line)
                self.assertIn("use the faasd that wrote it", line)
        function, = self.good["functions"]
        for part in (function, function["versions"][0], function["versions"][0]["options"]):
            part["gpus"] = 1
            self.assertIn("options that this faasd does not know (gpus): use the faasd that wrote it",
                          self.refuse(json.dumps(self.good).encode()))
            del part["gpus"]

    def test_daemon_that_refuses_leaves_all_as_it_was(self):
        daemon = support.Daemon()
        self.addCleanup(shutil.rmtree, daemon.directory)
        (daemon.state_dir / "images/f/0123456789ab").mkdir(parents=True)
        (daemon.state_dir / "registry.json").write_bytes(b"{")
        result = subprocess.run(daemon.command(), capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"\nfaasd: \S+registry.json is damaged \(.*\): restore .* without .*\n\Z")
        self.assertNotIn("Traceback", result.stderr)
        self.assertEqual((daemon.state_dir / "registry.json").read_bytes(), b"{")
        self.assertTrue((daemon.state_dir / "images/f/0123456789ab").exists())
        self.assertEqual(support.addresses(), [])


if __name__ == "__main__":
    unittest.main()
