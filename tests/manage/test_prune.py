"""faas df and faas prune."""

import json
import os
import pty
import shutil
import subprocess
import sys
import unittest

import support

SHAPING = """
import os, sys, time
os.chdir(sys.argv[1])
while True:
    for name in ("link", "file"):
        for old, new in (("a", "directory"), (name, "a"), ("a", name), ("directory", "a")):
            os.rename(old, new)
            if new == "a":
                time.sleep(0.001)
"""


class PruneTest(support.SharedDaemonCase):
    def prune(self, answer: str) -> subprocess.CompletedProcess:
        """Run it on a terminal, where it asks."""
        master, slave = pty.openpty()
        try:
            os.write(master, answer.encode())
            return subprocess.run([support.TOP / "faas", "--socket", self.daemon.socket, "prune"], stdin=slave,
                                  capture_output=True, text=True, check=False)
        finally:
            os.close(master)
            os.close(slave)

    def usage(self) -> dict:
        return json.loads(self.daemon.faas("--json", "df").stdout)

    def directories(self) -> list[str]:
        return sorted(os.listdir(self.daemon.state_dir / "images/f"))

    def test_what_no_function_runs_is_removed(self):
        for label in ("1", "2", "3"):
            address = self.daemon.deploy("f", support.small_image(label))
        self.daemon.set("f", "--memory", "200m")        # a version of the same image
        self.daemon.deploy("g", support.small_image("1"))
        before = self.usage()
        f, g = before["functions"]
        self.assertEqual([(image["versions"], image["current"]) for image in f["images"]],
                         [([4, 3], True), ([2], False), ([1], False)])
        self.assertEqual(([image["current"] for image in g["images"]], before["tmp"]), ([True], 0))
        self.assertGreater(min(image["size"] for image in f["images"]), 1 << 20)
        self.assertGreater(f["logs"], 0)
        self.assertEqual(before["total"], f["logs"] + g["logs"] + sum(i["size"] for i in f["images"] + g["images"]))
        self.assertRegex(self.daemon.faas("df").stdout, r"(?m)^f  +\w{12}  4,3  +\*  .*MiB\n")

        done = self.daemon.faas("prune", check=False)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertEqual(done.stderr, "faas: prune asks first, and there is no terminal: say --force\n")
        done = self.prune("n\n")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("This removes 2 images", done.stderr)
        self.assertEqual(len(self.directories()), 3)
        freed = sum(image["size"] for image in f["images"][1:])
        done = self.prune("y\n")
        self.assertEqual(done.returncode, 0, done)
        self.assertRegex(done.stdout, rf"\Af \w+\nf \w+\n✓ Freed {freed / (1 << 20):.1f} MiB\n\Z")
        support.wait_until(lambda: self.directories() == [f["images"][0]["image"]], "the images are removed")
        self.assertEqual(self.daemon.versions("f"), [4, 3])
        self.assertEqual(self.usage()["functions"][0]["images"], f["images"][:1])
        self.assertEqual(support.curl(f"http://{address}/"), "3")
        done = self.daemon.faas("rollback", "f", "1", check=False)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(json.loads(self.daemon.faas("--json", "prune", "--force").stdout),
                         {"removed": [], "busy": [], "held": 0, "freed": 0})

        self.assertEqual(self.daemon.faas("prune").stdout, "✓ Freed 0 B\n")         # there is nothing to ask

        # No number is used again.
        self.daemon.deploy("f", support.small_image("4"))
        self.daemon.faas("rollback", "f")
        self.daemon.faas("prune", "--force")
        self.assertEqual(self.daemon.versions("f"), [4, 3])
        self.daemon.set("f", "--memory", "300m")
        self.assertEqual(self.daemon.versions("f"), [6, 4, 3])

    def test_what_a_container_runs_on_is_not_freed_yet(self):
        self.daemon.deploy("f", support.small_image("1"))
        command = subprocess.Popen([support.TOP / "faas", "--socket", self.daemon.socket, "exec", "f", "--",
                                    support.PERL, "-e", "print 1; close STDOUT; sleep 1000"], stdout=subprocess.PIPE)
        self.addCleanup(command.communicate)
        self.addCleanup(command.kill)
        self.assertEqual(command.stdout.read(1), b"1")
        self.daemon.deploy("f", support.small_image("2"))
        size = self.usage()["functions"][0]["images"][1]["size"]
        document = json.loads(self.daemon.faas("--json", "prune", "--force").stdout)
        self.assertEqual((document["freed"], document["held"], len(document["removed"])), (0, size, 1))
        self.assertEqual([(image["versions"], image["size"]) for image in self.usage()["functions"][0]["images"]],
                         [([2], size), ([], size)])
        command.kill()
        support.wait_until(lambda: len(self.usage()["functions"][0]["images"]) == 1, "the image is removed")

    def test_what_an_image_makes_meanwhile_leads_nowhere(self):
        """Its layers may make a link or a file of any directory, while df and prune look at what is under way."""
        outside, unpacked = self.daemon.directory / "outside", self.daemon.state_dir / "tmp/unpacked"
        for number in range(50):
            (unpacked / f"a/{number}").mkdir(parents=True)
            (outside / f"{number}").mkdir(parents=True)
            with (outside / f"{number}/large").open("wb") as file:
                file.truncate(1 << 40)
        (unpacked / "link").symlink_to(outside)
        (unpacked / "file").touch()
        shaping = subprocess.Popen([sys.executable, "-c", SHAPING, unpacked])
        self.addCleanup(shutil.rmtree, unpacked)
        self.addCleanup(shaping.wait)
        self.addCleanup(shaping.kill)
        for _ in range(100):
            status, body = self.daemon.api("GET", "/usage")
            self.assertEqual(status, 200, body)
            self.assertLess(json.loads(body)["tmp"], 1 << 40)

    def test_what_is_being_changed_keeps_its_images(self):
        for label in ("1", "2"):
            self.daemon.deploy("f", support.small_image(label))
        upload = support.UnixConnection(self.daemon.socket, support.READY_SECONDS)
        upload.putrequest("POST", "/functions/f")
        upload.putheader("Content-Type", "application/x-tar")
        upload.putheader("Content-Length", "1000000")
        upload.endheaders(b"x")
        tmp = self.daemon.state_dir / "tmp"
        support.wait_until(lambda: list(tmp.iterdir()), "a deploy goes on")         # a PATCH would be in its way
        document = json.loads(self.daemon.faas("--json", "prune", "--force").stdout)
        upload.close()
        support.wait_until(lambda: self.daemon.api("PATCH", "/functions/f?memory=200m")[0] == 200,
                           "the deploy has ended")
        self.assertEqual(document, {"removed": [], "busy": ["f"], "held": 0, "freed": 0})
        self.assertEqual(len(self.directories()), 2)


if __name__ == "__main__":
    unittest.main()
