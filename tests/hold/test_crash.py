"""The daemon is killed with SIGKILL between two system calls, at every such place: nothing is lost, nothing is left.

By default a sample of the places, always the same; all of them with --soak, however long that takes:
`sudo ./test.sh -v --soak 1 tests/hold/test_crash.py`
"""

import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gate
import support
from support import curl, get, wait_until

EXHAUSTIVE = "FAASD_SOAK_SECONDS" in os.environ
SAMPLE = 4                      # calls of the daemon in each operation: those at which the state changes for good …
OTHERS = 1                      # … and at least so many others; and one of its children's
TELLING = ("rename", "fsync", "syncfs")
QUIET_SECONDS = 0.3             # without a call of the daemon: what an operation leaves to do is done
LABELS = ("1", "2")
F_ADDRESS = "10.0.0.10"


class Crash(unittest.TestCase):
    """One operation a test. Beside `f`, which it is about, there is always `g`, with a warm container."""

    def setUp(self):
        signal.alarm(7200 if EXHAUSTIVE else 600)
        self.calls: list[tuple[str, str]] = []          # whose, and what, since arm()
        self.target: tuple[str, int] | None = None      # whose call, which one: the daemon is killed before it
        self.seen: list[tuple[str, str]] = []           # those of the last round
        self.last_call = 0.0
        self.killed = False
        self.lock = threading.Lock()                    # of what decide() uses, which runs in a thread of its own
        self.gate = gate.Gate(self.decide)
        self.addCleanup(self.gate.close)
        self.daemon = support.Daemon(wrapper=self.gate.wrapper).start()
        self.addCleanup(self.daemon.close)
        self.images = {label: support.small_image(label=label) for label in LABELS}
        self.labels: dict[str, str] = {}                # image → label
        self.prepare: Callable[[], object] = lambda: None       # makes f what the operation needs
        self.goal: dict = {}                            # what state() is when it has succeeded
        for label in LABELS:
            self.deploy("f", label)
        self.deploy("g", "1", warm=1)
        self.options = self.state()["f"]["versions"][0][2]
        self.settle()
        self.standing = self.what_stands()

    # -- at the gate --

    def decide(self, call: gate.Call) -> None:
        if call.starts_thread:
            return
        with self.lock:
            self.last_call = time.monotonic()
            self.calls.append((call.of, str(call) if call.of == "daemon" else call.of))
            if self.target and call.of == self.target[0]:
                if sum(1 for of, _ in self.calls if of == call.of) == self.target[1]:
                    os.kill(self.gate.daemon, signal.SIGKILL)
                    self.killed = True

    def arm(self, target: tuple[str, int] | None) -> None:
        with self.lock:
            self.calls, self.target, self.killed, self.last_call = [], target, False, time.monotonic()

    def disarm(self) -> list[tuple[str, str]]:
        """Return the calls since arm(), once the daemon is dead or has nothing to do any more."""
        wait_until(lambda: self.killed or time.monotonic() - self.last_call > QUIET_SECONDS, "it is killed or idle")
        with self.lock:
            self.target = None
            calls, self.calls = self.calls, []
        if self.killed:
            self.daemon.process.wait()
        return calls

    # -- what there is --

    def api(self, method: str, path: str, body: bytes = b"") -> dict | None:
        """Send a request; None if the daemon died meanwhile."""
        try:
            status, answer = self.daemon.api(method, path, body)
        except (OSError, http.client.HTTPException):
            return None
        self.assertIn(status, (200, 201), answer)
        return json.loads(answer)

    def deploy(self, name: str, label: str, warm: int = 0) -> dict | None:
        document = self.api("POST", f"/functions/{name}?warm={warm}", self.images[label])
        if document:
            self.labels[document["digest"][7:19]] = label
        return document

    def state(self) -> dict[str, dict]:
        """Return what must survive of each function."""
        functions = {}
        for entry in self.api("GET", "/functions")["functions"]:
            versions = self.api("GET", f"/functions/{entry['name']}/versions")["versions"]
            functions[entry["name"]] = {
                "address": entry["address"], "state": entry["state"],
                "versions": [(version["digest"][7:19], version["version"], version["options"]) for version in versions]}
        return functions

    def settle(self) -> None:
        """Wait until there is no container but the warm one."""
        self.daemon.wait_warm("g", 1)
        wait_until(lambda: len(os.listdir(self.daemon.run_dir / "containers")) == 1, "one container is left")

    def what_stands(self) -> tuple[list[str], list[str], int]:
        """Return what is the same whatever is deployed: entries of RUN_DIR and STATE_DIR, mounts."""
        return (sorted(os.listdir(self.daemon.run_dir)), sorted(os.listdir(self.daemon.state_dir)),
                len(support.mounts(self.daemon.directory.name)))

    def check(self) -> None:
        """Each function answers, with what it says it runs, and there is nothing that no function has."""
        functions = self.state()
        for name, entry in functions.items():
            self.assertEqual(get(entry["address"]), (200, self.labels[entry["versions"][0][0]]), name)
            self.daemon.wait_idle(name)
        self.settle()
        state_dir, run_dir = self.daemon.state_dir, self.daemon.run_dir
        ids = os.listdir(run_dir / "containers")
        self.assertEqual(ids, support.list_containers(self.daemon))
        self.assertEqual({path.rpartition("/")[2] for path in support.container_cgroups(self.daemon)}, set(ids))
        self.assertEqual(self.what_stands(), self.standing)
        self.assertEqual(os.listdir(state_dir / "tmp"), [])
        kept = {(name, image) for name, entry in functions.items() for image, *_ in entry["versions"]}
        self.assertEqual({(path.parent.name, path.name) for path in (state_dir / "images").glob("*/*")}, kept)
        self.assertEqual(set(os.listdir(state_dir / "images")), set(functions))
        self.assertLessEqual({path.name for path in (state_dir / "logs").iterdir()}, {f"{f}.log" for f in functions})
        self.assertEqual(sorted(support.addresses()), sorted(f"{entry['address']}/32" for entry in functions.values()))
        self.assertEqual([" run " in line for line in support.processes(f"--root {run_dir}")], [True])
        self.assertEqual(len(support.processes(f"--run-dir {run_dir}")), 1)

    # -- killing --

    def crash_everywhere(self, operate: Callable[[dict], bool]) -> None:
        """Kill the daemon at each place of an operation and look whether the next one finds all in order.

        operate is given what state() is, sets `goal` to what it shall be, does it, and returns whether the daemon said
        that it is done.
        """
        self.one_round(operate, None)
        places = self.places()
        self.assertGreaterEqual(len(places), SAMPLE)
        expected = killed = 0
        for of, number, what in places:
            with self.subTest(f"before call {number} of {of}: {what}"):
                expected += of == "daemon"
                killed += self.one_round(operate, (of, number)) and of == "daemon"
        # Which thread comes first is not the same each time, and how many calls runc makes still less.
        self.assertGreaterEqual(killed, expected * 0.5)

    def one_round(self, operate: Callable[[dict], bool], target: tuple[str, int] | None) -> bool:
        """Operate, with a kill at the target; see what there is then. Returns whether the kill took place."""
        self.prepare()
        self.settle()
        before = self.state()
        self.arm(target)
        done = operate(before)
        calls, killed = self.disarm(), self.killed
        if self.daemon.process.poll() is not None:
            self.daemon.kill()
            self.daemon.start()
        after = self.state()
        if done:
            self.assertEqual(after, self.goal)
        else:
            self.assertIn(after, (before, self.goal))
        self.check()
        self.seen = calls
        return killed

    def places(self) -> list[tuple[str, int, str]]:
        """Return whose call it is, which one of theirs and what it does, for the places where to kill."""
        places = collections.defaultdict(list)
        for of, what in self.seen:
            places[of].append((of, len(places[of]) + 1, what))
        if EXHAUSTIVE:
            return [place for of in places for place in places[of]]
        chance = random.Random(self.id())
        telling = [place for place in places["daemon"] if any(f" {name}(" in place[2] for name in TELLING)]
        others = [place for place in places.pop("daemon") if place not in telling]
        count = min(len(others), max(OTHERS, SAMPLE - len(telling)))
        return telling + chance.sample(others, count) + [chance.choice(chance.choice(sorted(places.values())))]

    # -- operations --

    def with_version(self, before: dict, image: str, options: dict, number: int = 0) -> dict:
        """Return the state with that version of f on top, a new one unless it has a number."""
        kept = before["f"]["versions"] if "f" in before else []
        number = number or 1 + max((version[1] for version in kept), default=0)
        versions = [(image, number, options), *(version for version in kept if version[1] != number)]
        images = [version[0] for version in versions]
        last = [version for place, version in enumerate(versions)
                if images[:place].count(version[0]) < support.faasd.MAX_VERSIONS_KEPT]
        return {**before, "f": {"address": F_ADDRESS, "state": "ready", "versions": last}}

    def image_of(self, label: str) -> str:
        return next(image for image, other in self.labels.items() if other == label)

    def redeploy(self, before: dict) -> bool:
        label = "2" if self.labels[before["f"]["versions"][0][0]] == "1" else "1"
        self.goal = self.with_version(before, self.image_of(label), self.options)
        return self.deploy("f", label) is not None

    def deploy_new(self, before: dict) -> bool:
        self.goal = self.with_version(before, self.image_of("1"), self.options)
        return self.deploy("f", "1") is not None

    def roll_back(self, before: dict) -> bool:
        image, number, options = before["f"]["versions"][1]
        self.goal = self.with_version(before, image, options, number)
        return self.api("POST", "/functions/f/rollback") is not None

    def set_timeout(self, before: dict) -> bool:
        image, _, options = before["f"]["versions"][0]
        timeout = 50 - options["timeout"]
        self.goal = self.with_version(before, image, {**options, "timeout": timeout})
        return self.api("PATCH", f"/functions/f?timeout={timeout:g}") is not None

    def remove(self, before: dict) -> bool:
        self.goal = {name: entry for name, entry in before.items() if name != "f"}
        return self.api("DELETE", "/functions/f") is not None

    def invoke(self, before: dict) -> bool:
        """A client gets the whole answer, or an end that it can tell from one."""
        self.goal = before
        out = curl("--write-out", "\n%{http_code}", f"http://{F_ADDRESS}/label?0.2", check=False)
        self.assertIn(out, (f"{self.labels[before['f']['versions'][0][0]]}\n200", "\n000"))
        return True

    def stop(self, before: dict) -> bool:
        self.goal = before
        with ThreadPoolExecutor() as pool:
            client = pool.submit(self.invoke, before)
            # Or is over: polling may take longer.
            wait_until(lambda: client.done() or (self.api("GET", "/functions/f") or {"running": 1})["running"],
                       "it runs")
            self.daemon.process.send_signal(signal.SIGTERM)
            self.daemon.process.wait(support.READY_SECONDS)
            return client.result()

    def start(self, before: dict) -> bool:
        self.goal = before
        self.daemon.kill()
        with contextlib.suppress(AssertionError):       # it was killed again
            self.daemon.start()
        return True

    # -- tests --

    def test_redeploy(self):
        self.crash_everywhere(self.redeploy)

    def test_deploy(self):
        self.prepare = lambda: "f" not in self.state() or self.api("DELETE", "/functions/f")
        self.crash_everywhere(self.deploy_new)

    def test_rollback(self):
        self.crash_everywhere(self.roll_back)

    def test_set(self):
        self.crash_everywhere(self.set_timeout)

    def test_rm(self):
        self.prepare = lambda: "f" in self.state() or self.deploy("f", "1")
        self.crash_everywhere(self.remove)

    def test_invocation(self):
        self.crash_everywhere(self.invoke)

    def test_stop(self):
        self.crash_everywhere(self.stop)

    def test_start_after_a_kill(self):
        self.crash_everywhere(self.start)


class PowerLoss(unittest.TestCase):
    """What the registry names is on the disk before, and what it does not name any more goes after: by strace."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        cls.state = str(cls.daemon.state_dir)

    def setUp(self):
        self.addCleanup(self.daemon.remove_all)

    def trace(self, method: str, path: str, body: bytes = b"") -> list[str]:
        """Return the daemon's calls during a request: `+call(...)` when it begins, `-call(...)` when it is done."""
        output = self.daemon.directory / "strace"
        strace = subprocess.Popen(["strace", "-f", "--detach-on=execve", "-y", "-qq", "-s", "4096", "-o", output,
                                   "-e", "trace=/^(syncfs|f.*sync|openat|rename.*|mkdir.*|rmdir|unlink.*)$",
                                   "-e", "inject=syncfs:delay_enter=2s",
                                   "-p", str(self.daemon.process.pid)], stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: re.search(r"TracerPid:\t[1-9]", self.status()), "strace is there")
            status, answer = self.daemon.api(method, path, body)
            self.assertIn(status, (200, 201), answer)
        finally:
            strace.terminate()
            strace.wait()
        events, unfinished = [], {}
        for line in output.read_text().splitlines():
            pid, call = line.split(None, 1)
            if call.startswith("<... "):
                events.append("-" + unfinished.pop(pid))
            elif call.endswith("<unfinished ...>"):
                unfinished[pid] = call
                events.append("+" + call)
            elif not call.startswith(("+++", "---")):
                events += ["+" + call, "-" + call]
        return events

    def status(self) -> str:
        return Path(f"/proc/{self.daemon.process.pid}/status").read_text()

    def assert_order(self, events: list[str], *patterns: str) -> None:
        """The patterns are found in this order, and the last event of each is before the first of the next."""
        last = -1
        for pattern in patterns:
            found = [index for index, event in enumerate(events) if re.search(pattern, event)]
            self.assertTrue(found, f"{pattern} in {events}")
            self.assertGreater(found[0], last, f"{pattern} in {events}")
            last = found[-1]

    def registry_is_replaced(self) -> list[str]:
        new, final = re.escape(f"{self.state}/.registry.json.new"), re.escape(f"{self.state}/registry.json")
        return [rf"\+openat\(.*{new}.*O_TRUNC", rf"-fsync\(\d+<{new}>", rf"\+rename.*{new}.*{final}",
                rf"-fsync\(\d+<{re.escape(self.state)}>"]

    def test_image_is_on_disk_before_the_registry_names_it(self):
        """Its proof begins meanwhile."""
        for label in LABELS:                # a new function, and a new version
            events = self.trace("POST", "/functions/f?warm=0", support.small_image(label=label))
            self.assert_order(events, r"-rename.*/images/f/[0-9a-f]{12}\"", r"-syncfs\(\d+<.*/images/f/[0-9a-f]{12}>",
                              *self.registry_is_replaced())
            written, container = (next(index for index, event in enumerate(events) if re.search(pattern, event))
                                  for pattern in (r"-syncfs", r"\+mkdir.*/containers/"))
            self.assertLess(container, written, events)

    def test_registry_forgets_a_function_before_its_files_go(self):
        self.daemon.deploy("f", support.small_image())
        events = self.trace("DELETE", "/functions/f")
        self.assert_order(events, *self.registry_is_replaced(), r"\+rename.*/images/f/", r"-rmdir\(.*/images/f\"",
                          r"\+unlinkat\(.*(perl|rootfs|image\.json)\"")

    def test_change_of_options_is_on_disk_when_it_is_answered(self):
        self.daemon.deploy("f", support.small_image())
        self.assert_order(self.trace("PATCH", "/functions/f?timeout=20"), *self.registry_is_replaced())


if __name__ == "__main__":
    unittest.main()
