"""What keeps containers apart and the host from them: ids, modes on the way to an image, the report, the profiles."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import support
from support import get

sys.path.insert(0, str(support.TOP))
import faasd  # noqa: E402

DEFAULT = range(0x7000_0000, 0x7FFF_0000)


class HostIds(unittest.TestCase):
    """Where the ids come from: one file of each kind, one line changed at a time."""

    def find(self, users: str | None, groups: str | None) -> range:
        with tempfile.TemporaryDirectory() as directory:
            for name, text in (("subuid", users), ("subgid", groups)):
                if text is not None:
                    (Path(directory) / name).write_text(text)
            return faasd.find_host_ids(Path(directory))

    def test_found(self):
        ours = "root:1:1\nfaasd:100000:131072\nfaasd:900000:65536\n"
        for name, users, groups, ids in (
                ("no files", None, None, DEFAULT),
                ("others' entries", "me:100000:65536\n", "me:100000:65536\n", DEFAULT),
                ("ours", ours, ours, range(100_000, 231_072)),
                ("no entry of that name", "faasder:100000:65536\n", "xfaasd:100000:65536\n", DEFAULT)):
            with self.subTest(name):
                self.assertEqual(self.find(users, groups), ids)

    def test_refused(self):
        for name, users, groups in (
                ("one file only", "faasd:100000:65536", None),
                ("different", "faasd:100000:65536", "faasd:100000:65537"),
                ("too few", "faasd:100000:65535", "faasd:100000:65535"),
                ("the host's own", "faasd:1:65536", "faasd:1:65536"),
                ("more than there are", "faasd:4294901760:65537", "faasd:4294901760:65537")):
            with self.subTest(name), self.assertRaisesRegex(faasd.UsageError, "subuid"):
                self.find(users, groups)


class Ranges(unittest.TestCase):
    def test_lowest_free_one_that_touches_no_other(self):
        ranges = faasd.IdRanges(range(100_000, 100_000 + 3 * 65_536))
        ranges.taken.add(100_000 + 65_536 + 1)          # given under other ids, so it overlaps two of these
        self.assertEqual(ranges.take(), 100_000)
        self.assertRaisesRegex(faasd.Conflict, "all 3 ranges", ranges.take)
        ranges.release(100_000 + 65_536 + 1)
        self.assertEqual([ranges.take(), ranges.take()], [165_536, 231_072])


class Profiles(unittest.TestCase):
    def test_seccomp_is_for_the_machine_alone(self):
        for machine, architecture in (("x86_64", "SCMP_ARCH_X86_64"), ("aarch64", "SCMP_ARCH_AARCH64")):
            profile = faasd.seccomp_profile(machine)
            self.assertEqual((profile["architectures"], profile["defaultAction"]), ([architecture], "SCMP_ACT_ERRNO"))
        self.assertIsNone(faasd.seccomp_profile("m68k"))

    def test_seccomp_allows_nothing_that_is_for_the_host(self):
        refused = {"mount", "umount2", "unshare", "setns", "bpf", "keyctl", "add_key", "request_key", "ptrace",
                   "process_vm_readv", "process_vm_writev", "init_module", "finit_module", "delete_module",
                   "io_uring_setup", "io_uring_enter", "userfaultfd", "perf_event_open", "open_by_handle_at", "reboot",
                   "settimeofday", "clock_settime", "pivot_root", "chroot", "personality", "syslog", "acct", "swapon",
                   "kexec_load", "clone", "socket"}          # the last two with some arguments only
        self.assertEqual((refused | set(faasd.REFUSED_CALLS)) & set(faasd.ALLOWED_CALLS), set())
        self.assertEqual(len(faasd.ALLOWED_CALLS), len(set(faasd.ALLOWED_CALLS)))

    def test_conditions_hold_for_all_numbers_but_some(self):
        """Each number by exactly one of them, those with more bits by none: the kernel may not look at these."""
        for numbers, bits in (([13, 26, 50, 51, 52], 7), ([1024, 1026], 11), ([1], 9), ([0], 4), ([15], 4), ([], 3)):
            conditions = faasd.all_but(0, numbers, bits)
            for high in (0, 1 << bits, 1 << 32, 1 << 63):
                for number in range(1 << bits):
                    held = sum((number | high) & c["value"] == c["valueTwo"] for c in conditions)
                    self.assertEqual(held, high == 0 and number not in numbers, (numbers, number, high))

    def test_apparmor_profile_is_valid(self):
        """Compiled, not loaded: that takes a kernel with AppArmor."""
        if shutil.which("apparmor_parser") is None:
            self.skipTest("apparmor_parser is not installed: apt install apparmor")
        path = support.TOP / "packaging" / f"apparmor-{faasd.APPARMOR_PROFILE}"
        compiled = subprocess.run(["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--names", path],
                                  capture_output=True, text=True, check=False)
        self.assertEqual((compiled.returncode, compiled.stdout.split()), (0, [faasd.APPARMOR_PROFILE]), compiled.stderr)


class Users(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        cls.address = {name: cls.daemon.deploy(name) for name in ("f", "g")}

    def facts(self, name: str) -> dict:
        return json.loads(get(self.address[name], "/facts")[1])

    def first_id(self, name: str) -> int:
        registry = json.loads((self.daemon.state_dir / "registry.json").read_text())
        return next(entry["first_id"] for entry in registry["functions"] if entry["name"] == name)

    def test_root_of_a_container_is_nobody_on_the_host(self):
        facts = self.facts("f")
        self.assertEqual(facts["ids"], [0, 0, []])
        self.assertNotEqual(facts["namespaces"]["user"], os.readlink("/proc/self/ns/user"))
        self.assertEqual((facts["status"]["Seccomp"], facts["status"]["NoNewPrivs"]), ("2", "1"))
        self.assertEqual({int(value, 16) for key, value in facts["status"].items() if key.startswith("Cap")}, {0})

    def test_two_functions_share_no_id(self):
        first = {name: self.first_id(name) for name in ("f", "g")}
        self.assertGreaterEqual(abs(first["f"] - first["g"]), 65_536)
        for name in ("f", "g"):
            self.assertIn(first[name], DEFAULT)
            report = self.daemon_report(name)
            self.assertEqual(report["host_ids"], [first[name]] * 2)
            self.assertEqual(report["uid_map"].split(), ["0", str(first[name]), "65536"])
            for path in self.daemon.rootfs(name).rglob("*"):
                self.assertEqual((path.lstat().st_uid, path.lstat().st_gid), (first[name],) * 2, path)

    def daemon_report(self, name: str) -> dict:
        status, body = self.daemon.api("GET", f"/functions/{name}/isolation")
        self.assertEqual(status, 200, body)
        return json.loads(body)

    def test_on_the_host_only_root_and_the_function_itself_reach_its_image(self):
        """Setuid files and devices of an image are on the host's file system too."""
        rootfs = self.daemon.rootfs("f")
        parent = self.daemon.state_dir / "images/f"
        status = parent.stat()
        self.assertEqual((status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)), (0, self.first_id("f"), 0o710))

        def reaches(user: int) -> bool:
            return subprocess.run(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "test", "-e",
                                   rootfs / "handler.pl"], check=False).returncode == 0
        self.assertTrue(reaches(self.first_id("f")))
        self.assertFalse(reaches(self.first_id("g")))
        self.assertFalse(reaches(12345))

    def test_report(self):
        before = support.footprint(self.daemon)
        report = self.daemon_report("f")
        self.assertEqual(set(report["namespaces"].values()) | {"own"}, {"own", "the host's"})
        for kind in ("pid", "mnt", "net", "ipc", "uts", "cgroup", "user"):
            self.assertEqual(report["namespaces"][kind], "own")
        self.assertEqual({int(value, 16) for value in report["capabilities"].values()}, {0})
        self.assertEqual((report["no_new_privs"], report["seccomp"], report["interfaces"]), (True, "filter", ["lo"]))
        root = next(mount for mount in report["mounts"] if mount["target"] == "/")
        self.assertLessEqual({"rw", "nosuid", "nodev"}, set(root["options"].split(",")))
        limits = report["limits"]
        self.assertIn(str(512 << 20), (limits.get("memory.limit_in_bytes"), limits.get("memory.max")))
        self.assertEqual(report["limits"]["pids.max"], "64")
        self.assertEqual(report["rlimits"]["Max core file size"], "0")
        text = self.daemon.faas("info", "f", "--isolation").stdout
        for line in ("capabilities:  *none", "seccomp:  *filter", "no_new_privs:  *yes", "interfaces:  *lo"):
            self.assertRegex(text, line)
        support.wait_until(lambda: support.footprint(self.daemon) == before, "what was started for it is gone")

    def test_report_of_a_warm_container_starts_none(self):
        self.daemon.deploy("warm", None, "--warm", "1")
        self.addCleanup(self.daemon.faas, "rm", "warm")
        container, = self.daemon.wait_warm("warm", 1)
        self.assertEqual(self.daemon_report("warm")["container"], container)

    def test_user_of_the_image_connects_and_has_its_tmp(self):
        address = self.daemon.deploy("user", support.handler_image(User="1000:1000", Volumes={"/data": {}}))
        self.addCleanup(self.daemon.faas, "rm", "user")
        self.assertEqual(json.loads(get(address, "/facts")[1])["ids"], [1000, 1000, []])
        self.assertEqual(get(address, "/write?/tmp/x")[1], "done")
        self.assertEqual(get(address, "/write?/x")[1], "Permission denied")
        self.assertEqual(self.daemon_report("user")["host_ids"], [self.first_id("user") + 1000] * 2)

    def test_ids_that_no_container_has_are_refused(self):
        for config, words in (({"User": "65536"}, "too large"), ({"User": "1:70000"}, "too large")):
            result = self.daemon.faas("new", "bad", stdin=support.handler_image(**config), check=False)
            self.assertEqual(result.returncode, 1)
            self.assertIn(words, result.stderr)


class Lasting(unittest.TestCase):
    """A function keeps its ids, because its files do."""

    def setUp(self):
        self.daemon = support.Daemon()

    def first_ids(self) -> dict[str, int]:
        registry = json.loads((self.daemon.state_dir / "registry.json").read_text())
        return {entry["name"]: entry["first_id"] for entry in registry["functions"]}

    def test_over_restart_redeploy_and_the_end_of_others(self):
        with self.daemon as daemon:
            for name in "abc":
                daemon.deploy(name)
            before = self.first_ids()
            self.assertEqual(len(set(before.values())), 3)
            daemon.remove("b")
            daemon.stop()
            daemon.start()
            addresses = {name: daemon.deploy(name, support.handler_image(label="2")) for name in "ac"}
            self.assertEqual(self.first_ids(), {name: before[name] for name in "ac"})
            addresses["d"] = daemon.deploy("d")
            self.assertEqual(self.first_ids()["d"], before["b"], "what is free is used again")
            self.assertEqual({get(address)[0] for address in addresses.values()}, {200})

    def test_directory_that_containers_cannot_pass_is_refused(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        directory.chmod(0o700)
        for option in ("--state-dir", "--run-dir"):
            command = [sys.executable, support.TOP / "faasd.py", "--state-dir", self.daemon.state_dir, "--run-dir",
                       self.daemon.run_dir, option, directory / "x"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            self.assertEqual(result.returncode, 2, result)
            self.assertRegex(result.stderr, rf"^faasd: {option} .*chmod o\+x {directory},.*\n$")
        shutil.rmtree(self.daemon.directory)


if __name__ == "__main__":
    unittest.main()
