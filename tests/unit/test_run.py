"""The runner itself: what tests start must not depend on what started them, and every skip is told with its reason."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

RUN = Path(__file__).parents[1] / "run.py"
SIGNALS = '''
import re, subprocess, unittest
class Signals(unittest.TestCase):
    def test_child(self):
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        self.assertEqual({int(mask, 16) for mask in re.findall(r"Sig(?:Blk|Ign):\\s+(\\w+)", status)}, {0})
'''
SHELL = '''
import os, unittest
class Shell(unittest.TestCase):
    def test_what_is_left_of_it(self):
        odd = {"COLUMNS", "FAAS_API", "FAASD_TOKEN", "NOTIFY_SOCKET", "PYTHONOPTIMIZE"} & set(os.environ)
        self.assertEqual((odd, os.umask(0), __debug__), (set(), 0o022, True))
        self.assertEqual(os.environ["FAASD_SOAK_SECONDS"], "7")
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

LEAVES = '''
import support, unittest
class Leaves(unittest.TestCase):
    def test_directory(self):
        support.temporary_directory()
'''
PAIR = '''
import pathlib, support, unittest
class Pair(unittest.TestCase):
    def test_other_is_there_too(self):
        place = pathlib.Path(__file__)
        place.with_suffix(".begun").touch()
        other = place.with_name({"test_a.py": "test_b.begun", "test_b.py": "test_a.begun"}[place.name])
        support.wait_until(other.exists, "the other file runs")
        print("first half of", place.name, flush=True)
        print("second half of", place.name, flush=True)
'''


class Runner(unittest.TestCase):
    def run_tests(self, source: str, *wrapper: str, names: tuple[str, ...] = ("x",), status: int = 0, **more) -> str:
        with tempfile.TemporaryDirectory() as directory:
            files = [Path(directory, f"test_{name}.py") for name in names]
            for file in files:
                file.write_text(source)
            command = [*wrapper, sys.executable, RUN, "--workers", str(len(files)), *files]
            result = subprocess.run(command, stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, check=False, **more)
        self.assertEqual(result.returncode, status, result.stdout)
        return result.stdout

    def test_signals_ignored_or_blocked_around_it_are_not_inherited_by_what_tests_start(self):
        def block():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD})
        ignoring = ("sh", "-c", "trap '' HUP INT QUIT USR2; exec \"$@\"", "sh", "nohup")
        self.run_tests(SIGNALS, *ignoring, preexec_fn=block)

    def test_environment_and_umask_of_the_shell_are_not_those_of_tests(self):
        odd = {"COLUMNS": "30", "FAAS_API": "http://127.0.0.1:1", "FAASD_TOKEN": "x", "NOTIFY_SOCKET": "/nowhere",
               "PYTHONOPTIMIZE": "1", "FAASD_SOAK_SECONDS": "7"}
        self.run_tests(SHELL, "sh", "-c", 'umask 077; exec "$@"', "sh", env={**os.environ, **odd})

    def test_skips_are_summed_by_reason(self):
        out = self.run_tests(SKIPS)
        self.assertEqual(re.findall("^skipped: .*$", out, re.MULTILINE),
                         ["skipped: 3: no node", "skipped: 1: no busybox"])
        self.assertTrue(out.endswith("1 passed, 0 failed, 2 skipped\n"), out)

    def test_what_a_file_leaves_is_a_failure(self):
        out = self.run_tests(LEAVES, status=1)
        left, = re.findall(r"^--- test_x has left behind\n +(/\S+)$", out, re.MULTILINE)
        self.addCleanup(Path(left).rmdir)
        self.assertTrue(out.endswith("1 passed, 1 failed\n"), out)

    def test_files_run_beside_each_other_and_each_prints_in_one_piece(self):
        out = self.run_tests(PAIR, names=("a", "b"))
        for name in "ab":
            file = f"test_{name}.py"
            self.assertRegex(out, rf"(?m)^first half of {file}\nsecond half of {file}\n.*{file}  ")
        self.assertTrue(out.endswith("2 passed, 0 failed\n"), out)

    def test_process_that_dies_is_a_failure(self):
        out = self.run_tests("import os\nos._exit(0)\n", status=1)
        self.assertIn("ended with status 0", out)
        self.assertTrue(out.endswith("0 passed, 1 failed\n"), out)


if __name__ == "__main__":
    unittest.main()
