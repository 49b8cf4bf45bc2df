#!/usr/bin/env python3
"""Run faasd's tests with nothing but unittest: `python3 tests/run.py [-v] [tests/test_x.py…]`.

One line per file as it finishes, tracebacks of what failed, then what was skipped, a line `skipped: N: reason` for each
reason, and the closing line `N passed, N failed[, N skipped]`. Exit status 1 if a test failed, or if none ran. A test
counts once, however many of its subtests fail or are skipped; an error outside of a test (import, setUpClass) counts as
one failure. Tests expect root and a network namespace of their own: ./test.sh makes that.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import signal
import sys
import time
import traceback
import unittest
from pathlib import Path

TESTS = Path(__file__).resolve().parent
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
    """Run one file, print its line and the tracebacks of what failed."""
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
    counts = f"{len(result.passed)} passed"
    counts += f", {len(result.broken)} FAILED" if result.broken else ""
    counts += f", {len(result.left_out)} skipped" if result.left_out else ""
    print(f"{show(path):32}  {counts}  {time.monotonic() - start:.1f} s", flush=True)
    for name, problems in result.broken:
        print(f"\n--- {name}")
        for text in problems:
            print(*(f"    {line}" for line in text.splitlines()), sep="\n", flush=True)
    if result.broken:
        print()
    return result


def reset_signals() -> None:
    """Give what tests start the dispositions and the mask that a shell would, whatever started us (nohup, cron, a CI).

    Exec resets a signal that is handled, but not one that is ignored. So those stay without effect on us, and have their
    own on daemons and handlers. SIGPIPE and SIGXFSZ are ignored by Python itself, which resets them in its children.
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
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="tests/test_*.py by default")
    arguments = parser.parse_args()
    if arguments.soak:
        os.environ["FAASD_SOAK_SECONDS"] = arguments.soak       # which the tests read
    files = [path.resolve() for path in arguments.files] or sorted(TESTS.glob("test_*.py"))
    if missing := [path for path in files if not path.is_file()]:
        parser.error(f"no such test file: {missing[0]}")
    reset_signals()
    os.chdir(TESTS.parent)
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    results = []
    for path in files:
        results.append(run_file(path, arguments.verbose))
        if results[-1].shouldStop:
            break
    for name, reason in [skip for result in results for skip in result.left_out]:
        print(f"skipped {name}: {reason}")
    for reason, count in collections.Counter(reason for result in results for reason in result.reasons).most_common():
        print(f"skipped: {count}: {reason}")
    passed, failed, skipped = (sum(map(len, lists)) for lists in (
        [result.passed for result in results], [result.broken for result in results],
        [result.left_out for result in results]))
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
