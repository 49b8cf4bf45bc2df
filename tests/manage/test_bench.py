"""The benchmarks run, for a moment each, and some only with --soak; no test could be about what they measure."""

import os
import subprocess
import unittest

import support


class Bench(unittest.TestCase):
    def test_quick_run(self):
        parts = {"warm": "warm: request ÷ forking server", "many": "many: restart with 20 functions"}
        if "FAASD_SOAK_SECONDS" not in os.environ:
            del parts["many"]
        command = [support.TOP / "bench" / "run", "--quick", *parts]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
        for words in parts.values():
            self.assertIn(words, result.stdout)

    def test_cold(self):
        result = subprocess.run([support.TOP / "bench" / "cold.py", "3"], capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
        self.assertIn("request - ready", result.stdout)


if __name__ == "__main__":
    unittest.main()
