"""The runner itself: what tests start must not depend on what started them, and every skip is told with its reason."""

import re
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

RUN = Path(__file__).with_name("run.py")
SIGNALS = '''
import re, subprocess, unittest
class Signals(unittest.TestCase):
    def test_child(self):
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        self.assertEqual({int(mask, 16) for mask in re.findall(r"Sig(?:Blk|Ign):\\s+(\\w+)", status)}, {0})
'''
SKIPS = '''
import unittest
class Skips(unittest.TestCase):
    def test_in_part(self):
        for tool in ("busybox", "node"):
            with self.subTest(tool):
                self.skipTest(f"no {tool}")
    def test_half(self):
        with self.subTest("there"):
            pass
        with self.subTest("not there"):
            self.skipTest("no node")
    @unittest.skip("no node")
    def test_whole(self):
        pass
'''


class Runner(unittest.TestCase):
    def run_tests(self, source: str, *wrapper: str, **more) -> str:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "test_x.py")
            file.write_text(source)
            result = subprocess.run([*wrapper, sys.executable, RUN, file], stdin=subprocess.DEVNULL, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **more)
        self.assertEqual(result.returncode, 0, result.stdout)
        return result.stdout

    def test_signals_ignored_or_blocked_around_it_are_not_inherited_by_what_tests_start(self):
        def block():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD})
        ignoring = ("sh", "-c", "trap '' HUP INT QUIT USR2; exec \"$@\"", "sh", "nohup")
        self.run_tests(SIGNALS, *ignoring, preexec_fn=block)

    def test_skips_are_summed_by_reason(self):
        out = self.run_tests(SKIPS)
        self.assertEqual(re.findall("^skipped: .*$", out, re.MULTILINE),
                         ["skipped: 3: no node", "skipped: 1: no busybox"])
        self.assertTrue(out.endswith("1 passed, 0 failed, 2 skipped\n"), out)


if __name__ == "__main__":
    unittest.main()
