"""./quickstart.sh as a new user runs it, in directories of its own, ended with Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import unittest

import support

# None for runc, as in the README.
OPTIONS = [] if support.RUNTIME == "runc" else ["--runtime", support.RUNTIME]


def run_quickstart(test: unittest.TestCase, env: dict[str, str]) -> str:
    """Run it to the end of its demonstration, call the function, press Ctrl-C; return its output."""
    directory = support.temporary_directory()
    test.addCleanup(shutil.rmtree, directory)
    output = directory / "output"
    directories = ["--state-dir", directory / "state", f"--run-dir={directory}/run"]
    with output.open("w") as file:
        process = subprocess.Popen([support.TOP / "quickstart.sh", *OPTIONS, *directories], env=env,
                                   stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        support.wait_until(lambda: "Ctrl-C stops it" in output.read_text() or process.poll() is not None,
                           "the demonstration is over", 120)
        text = output.read_text()
        test.assertIsNone(process.poll(), text)
        test.assertIn("✓ Deployed test-handler at 10.0.0.10\n", text)
        test.assertEqual(re.findall(r"request (\d): [\d.]+ ms", text), list("12345"), text)
        test.assertIn("Hello from FaaS handler!", support.curl("http://10.0.0.10/again"))
        process.send_signal(signal.SIGINT)
        test.assertEqual(process.wait(60), 0, output.read_text())
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    text = output.read_text()
    test.assertIn("Nothing of it is left", text)
    test.assertEqual(os.listdir(directory), ["output"], text)
    test.assertEqual(support.addresses(), [])
    test.assertEqual(support.processes(directory.name), [])
    return text


@unittest.skipUnless(support.IN_PRIVATE_NETWORK, "not in a network namespace of its own: run ./test.sh")
class Quickstart(unittest.TestCase):
    def test_without_docker(self):
        output = run_quickstart(self, {**os.environ, "DOCKER_HOST": "unix:///nonexistent"})
        self.assertIn("./faas pack test_handler.py", output)
        self.assertNotIn("Docker keeps", output)


@unittest.skipUnless(support.IN_PRIVATE_NETWORK, "not in a network namespace of its own: run ./test.sh")
class Refusals(unittest.TestCase):
    def test_help(self):
        done = subprocess.run([support.TOP / "quickstart.sh", "--help"], capture_output=True, text=True, check=True)
        self.assertRegex(done.stdout, r"(?s)\ASee a function answer: .*\n\nStarts faasd, .*/run/faasd\.\n\Z")

    def test_a_running_faasd_is_left_alone(self):
        with support.Daemon() as daemon:
            env = {**os.environ, "FAASD_STATE_DIR": str(daemon.state_dir), "FAASD_RUN_DIR": str(daemon.run_dir)}
            done = subprocess.run([support.TOP / "quickstart.sh", *OPTIONS], env=env, capture_output=True, text=True,
                                  timeout=60)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn("already running", done.stderr)
            self.assertIsNone(daemon.process.poll())

    def test_a_function_of_that_name_is_left_alone(self):
        with support.Daemon() as daemon:
            daemon.deploy("test-handler")
            self.assertEqual(daemon.stop(), 0)
            env = {**os.environ, "FAASD_STATE_DIR": str(daemon.state_dir), "FAASD_RUN_DIR": str(daemon.run_dir)}
            done = subprocess.run([support.TOP / "quickstart.sh", *OPTIONS], env=env, capture_output=True, text=True,
                                  timeout=60)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn("left alone", done.stderr)
            daemon.start()
            self.assertIn('"test-handler"', daemon.faas("--json", "list").stdout)


if __name__ == "__main__":
    unittest.main()
