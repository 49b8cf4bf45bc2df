#!/usr/bin/env python3
"""Run faasd's tests with nothing but unittest: `python3 tests/run.py [-v] [--workers N] [tests/FOLDER/test_x.py…]`.

Each file runs in a process and a network namespace of its own, and ends with a look for what it has left: processes,
mounts, cgroups, addresses, directories. Two more than there are CPUs run at a time, those that take long first. What a
file prints comes in one piece when it has ended; with one at a time, as it goes.

One line per file, tracebacks of what failed, then what was skipped, a line `skipped: N: reason` for each reason, and
the closing line `N passed, N failed[, N skipped]`. Exit status 1 if a test failed, or if none ran. A test counts once,
however many of its subtests fail or are skipped; an error outside of a test (import, setUpClass, something left) counts
as one failure.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
FOLDERS = ("lib", "unit", "images", "serve", "manage", "hold", "cluster")
# Of all files, those that begin first.
LONGEST = ("hostile_clients", "server", "docker", "crash", "cluster", "invocation", "restart", "hostile_servers",
           "pool", "local_users", "network", "daemon", "faults", "deploy", "hostile", "pack", "real_servers",
           "volume", "cut", "output", "readme", "cli", "look", "api_tcp", "archive", "nodes", "root", "machine",
           "soak", "bench", "troubleshooting", "examples", "packaging", "secret", "save", "quickstart")
MAX_WORKERS = 4
# Of the shell's, what tests have; besides FAASD_* of their own. What else there may be changes what Python, faasd, its
# client and programs do: PYTHONOPTIMIZE, NOTIFY_SOCKET, FAAS_API, COLUMNS …
ENVIRONMENT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TMPDIR")
PR_SET_PDEATHSIG = 1
TEST_SECONDS = 600 * int(os.environ.get("FAASD_TEST_PATIENCE", "1"))      # for one test; only a hang takes longer


class Interrupted(Exception):
    """Raised inside the running test, so that its cleanups run, unlike after KeyboardInterrupt."""


class FileResult(unittest.TestResult):
    """What one file's tests came to. Every test, and every error outside of one, ends in exactly one list."""

    def __init__(self, verbose: bool):
        super().__init__()
        self.verbose = verbose
        self.passed: list[str] = []
        self.broken: list[tuple[str, list[str]]] = []       # name, tracebacks
        self.left_out: list[tuple[str, str]] = []           # name, reason
        self.reasons: list[str] = []                        # of every skip, also of a part of a test that passed
        self.in_test = False
        self._problems: list[str] = []                      # of the running test
        self._reasons: list[str] = []
        self._succeeded = False
        self._start = 0.0

    def startTest(self, test):
        super().startTest(test)
        self.in_test = True
        self._problems, self._reasons, self._succeeded = [], [], False
        self._start = time.monotonic()
        signal.alarm(TEST_SECONDS)

    def stopTest(self, test):
        signal.alarm(0)
        super().stopTest(test)
        self.in_test = False
        name = test.id()
        if self._problems:
            self._conclude(self.broken, (name, self._problems), "FAILED")
        elif self._reasons and not self._succeeded:
            self._conclude(self.left_out, (name, self._reasons[0]), "skipped")
        else:
            self._conclude(self.passed, name, "ok")

    def _conclude(self, outcome: list, entry, word: str) -> None:
        outcome.append(entry)
        if self.verbose:
            name = entry if isinstance(entry, str) else entry[0]
            print(f"    {word:8} {name}  {time.monotonic() - self._start:.1f} s", flush=True)

    def _problem(self, test, text: str) -> None:
        """Keep text for the running test's end, or count it at once where no test is running (setUpClass)."""
        if self.in_test:
            self._problems.append(text)
        else:
            self._conclude(self.broken, (test.id(), [text]), "FAILED")

    def addSuccess(self, test):
        self._succeeded = True

    def addError(self, test, err):
        self._problem(test, describe(err))

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._problem(test, f"{subtest.id()}\n{describe(err)}")
        else:
            self._succeeded = True              # so that a test of which only a part is skipped counts as run

    def addSkip(self, test, reason):
        self.reasons.append(reason)
        if self.in_test:
            self._reasons.append(reason)
        else:
            self._conclude(self.left_out, (test.id(), reason), "skipped")

    def addExpectedFailure(self, test, err):
        self._succeeded = True

    def addUnexpectedSuccess(self, test):
        self._problem(test, "succeeded, but is marked as an expected failure\n")

    def report(self) -> Report:
        return Report(len(self.passed), len(self.broken), self.left_out, self.reasons)


class Report(NamedTuple):
    """What the process of one file tells the one that started it."""
    passed: int
    failed: int
    skipped: list[tuple[str, str]]
    reasons: list[str]


def describe(err) -> str:
    """The traceback without unittest's own frames around the test."""
    kind, error, frames = err
    inner = frames
    while inner is not None and "__unittest" in inner.tb_frame.f_globals:
        inner = inner.tb_next
    return "".join(traceback.format_exception(kind, error, inner or frames))


def load(path: Path) -> unittest.TestSuite:
    """The tests of one file, imported under its own name, as `import` would find it from a neighbour."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def run_file(path: Path, verbose: bool) -> FileResult:
    """Run one file in this process, print its line and the tracebacks of what failed."""
    result = FileResult(verbose)
    start = time.monotonic()

    def interrupt(number, frame):
        if number == signal.SIGALRM:
            raise Interrupted(f"the test took over {TEST_SECONDS} s")
        result.stop()
        raise Interrupted(f"{signal.Signals(number).name} in the middle of a test")

    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        load(path).run(result)
    except unittest.SkipTest as skip:
        result.left_out.append((path.stem, str(skip)))
        result.reasons.append(str(skip))
    except (Exception, SystemExit):
        result.broken.append((path.stem, [describe(sys.exc_info())]))
    if "support" in sys.modules and (left := sys.modules["support"].leftovers()):
        result.broken.append((f"{path.stem} has left behind", left))
    counts = f"{len(result.passed)} passed"
    counts += f", {len(result.broken)} FAILED" if result.broken else ""
    counts += f", {len(result.left_out)} skipped" if result.left_out else ""
    cpu = sum(os.times()[:4])
    print(f"{show(path):36}  {counts}  {time.monotonic() - start:.1f} s, {cpu:.1f} s of CPU", flush=True)
    for name, problems in result.broken:
        print(f"\n--- {name}")
        for text in problems:
            print(*(f"    {line}" for line in text.splitlines()), sep="\n", flush=True)
    if result.broken:
        print()
    return result


class Runner:
    """Runs files, each in a process and a network namespace of its own, some at a time."""

    def __init__(self, files: list[Path], workers: int, verbose: bool, directory: str):
        """directory is where the processes share byte code and layers of images, and leave their reports."""
        self.waiting = sorted(files, key=self._place)
        self.workers, self.directory = workers, directory
        self.options = ["-v"] if verbose else []
        self.running: dict[int, tuple[subprocess.Popen, Path]] = {}
        self.reports: list[Report] = []

    @staticmethod
    def _place(path: Path) -> int:
        name = path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    def run(self) -> list[Report]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.workers:
                self._start(self.waiting.pop(0))
            self._collect(os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid)
        return self.reports

    def _interrupt(self, number, frame) -> None:
        self.waiting = []
        for pid in self.running:                # none is reaped before _collect() has it
            os.kill(pid, signal.SIGTERM)

    def _start(self, path: Path) -> None:
        environment = {name: value for name, value in os.environ.items()
                       if name in ENVIRONMENT or name.startswith("FAASD_") and name != "FAASD_TOKEN"}
        environment["FAASD_TEST_CACHE"] = self.directory
        command = ["unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-X",
                   f"pycache_prefix={self.directory}/byte-code", __file__, *self.options,
                   "--report", self._file(path, "report"), str(path)]
        with open(self._file(path, "output"), "wb") as output:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
                                       stdout=output if self.workers > 1 else None,
                                       stderr=output if self.workers > 1 else None)
        self.running[process.pid] = (process, path)

    def _file(self, path: Path, kind: str) -> str:
        return f"{self.directory}/{path.stem}.{kind}"

    def _collect(self, pid: int) -> None:
        """Show what a process that has ended has printed, and keep its report."""
        if pid not in self.running:             # an orphan, if we are process 1 of a namespace
            os.waitpid(pid, 0)
            return
        process, path = self.running.pop(pid)
        status = process.wait()
        sys.stdout.write(Path(self._file(path, "output")).read_text(errors="replace"))
        try:
            self.reports.append(Report(*json.loads(Path(self._file(path, "report")).read_text())))
        except (FileNotFoundError, ValueError):
            print(f"{show(path):36}  FAILED: the process of its tests ended with status {status}")
            self.reports.append(Report(0, 1, [], []))
        sys.stdout.flush()


def run_inside(path: Path, verbose: bool, report: Path) -> int:
    """Be the process of one file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGHUP, lambda number, frame: None)        # a terminal's end is for who started us to judge
    sys.path[:0] = [*(str(TESTS / folder) for folder in FOLDERS), str(TESTS.parent)]
    result = run_file(path, verbose).report()
    report.write_text(json.dumps(result))
    return 0


def reset_signals() -> None:
    """Give what tests start the dispositions and the mask that a shell would, whatever started us (nohup, cron, a CI).

    Exec resets a signal that is handled, but not one that is ignored. So those stay without effect on us, and have
    their own on daemons and handlers. SIGPIPE and SIGXFSZ are ignored by Python itself, which resets them in its
    children.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def show(path: Path) -> str:
    return os.path.relpath(path, TESTS.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run faasd's tests.")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every test and its seconds")
    parser.add_argument("--soak", metavar="SECONDS", help="how long each of those tests takes that may take any time")
    parser.add_argument("--workers", type=int, metavar="N",
                        default=min(len(os.sched_getaffinity(0)) + 2, MAX_WORKERS),     # half of the time, tests wait
                        help="how many files run at a time (default: two more than CPUs, at most %d)" % MAX_WORKERS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)      # in the process of one file
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="tests/*/test_*.py by default")
    arguments = parser.parse_args()
    if arguments.soak:
        os.environ["FAASD_SOAK_SECONDS"] = arguments.soak       # which the tests read
    files = [path.resolve() for path in arguments.files] or sorted(TESTS.glob("*/test_*.py"))
    if missing := [path for path in files if not path.is_file()]:
        parser.error(f"no such test file: {missing[0]}")
    reset_signals()
    os.umask(0o022)
    os.chdir(TESTS.parent)
    if arguments.report:
        return run_inside(files[0], arguments.verbose, arguments.report)
    workers = max(1, min(arguments.workers, len(files)))
    with tempfile.TemporaryDirectory(prefix="faasd-tests.") as directory:
        reports = Runner(files, workers, arguments.verbose, directory).run()
    for name, reason in [skip for report in reports for skip in report.skipped]:
        print(f"skipped {name}: {reason}")
    for reason, count in collections.Counter(reason for report in reports for reason in report.reasons).most_common():
        print(f"skipped: {count}: {reason}")
    passed, failed = sum(report.passed for report in reports), sum(report.failed for report in reports)
    skipped = sum(len(report.skipped) for report in reports)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
