"""The benchmarks run, for a moment each; what they measure is nothing that a test could be about."""

import subprocess
import unittest

import support


class Bench(unittest.TestCase):
    def test_quick_run(self):
        command = [support.TOP / "bench" / "run", "--quick", "warm", "many"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
        for words in ("warm: request ÷ forking server", "many: restart with 20 functions"):
            self.assertIn(words, result.stdout)

    def test_cold(self):
        result = subprocess.run([support.TOP / "bench" / "cold.py", "3"], capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
        self.assertIn("request - ready", result.stdout)


if __name__ == "__main__":
    unittest.main()
