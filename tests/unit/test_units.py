"""The pure parts of faasd.py, which need neither root nor a daemon."""

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import json
import logging
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import faasd

TOP = Path(faasd.__file__).parent
DEFAULTS = faasd.Options()


class Parsing(unittest.TestCase):
    def test_sizes(self):
        for text, size in (("64m", 64 << 20), ("1g", 1 << 30), ("512k", 512 << 10), ("4096", 4096), ("1G", 1 << 30),
                           ("2mb", 2 << 20)):
            self.assertEqual(faasd.parse_size(text), size)
        for text in ("", "m", "-1", "1.5g", "1t", "1 m", "９", "1e9", "1" * 30):
            self.assertRaises(faasd.BadRequest, faasd.parse_size, text)

    def test_durations(self):
        for text, seconds in (("500ms", 0.5), ("30s", 30), ("5m", 300), ("1.5", 1.5), ("0", 0), ("2h", 7200)):
            self.assertEqual(faasd.parse_duration(text), seconds)
        for text in ("", "s", "-1", "1d", "inf", "nan", "1e3", "1" * 30):
            self.assertRaises(faasd.BadRequest, faasd.parse_duration, text)

    def test_names(self):
        for name in ("a", "0", "a-b", "a" * 63):
            self.assertEqual(faasd.check_name(name), name)
        for name in ("", "-a", "a-", "A", "a_b", "a.b", "a" * 64, "a\n", "ä", "..", "a/b"):
            self.assertRaises(faasd.BadRequest, faasd.check_name, name)

    def test_since(self):
        self.assertEqual(faasd.parse_since("2026-01-31T12:00:00Z"), "2026-01-31T12:00:00.000")
        self.assertEqual(faasd.parse_since("2026-01-31T14:00:00+02:00"), "2026-01-31T12:00:00.000")
        self.assertRegex(faasd.parse_since("10m"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}$")
        for text in ("", "soon", "-5m", "99999999999h"):
            self.assertRaises(faasd.BadRequest, faasd.parse_since, text)

    def test_subnets(self):
        self.assertEqual(str(faasd.parse_subnet("10.1.0.0/16")), "10.1.0.0/16")
        for text in ("10.0.0.1/24", "10.0.0.0/29", "fd00::/8", "x", ""):
            self.assertRaises(faasd.BadRequest, faasd.parse_subnet, text)
        self.assertEqual(str(faasd.parse_egress_subnet("198.18.0.0/30")), "198.18.0.0/30")
        for text in ("198.18.0.0/31", "198.18.0.1/30", ""):
            self.assertRaises(faasd.BadRequest, faasd.parse_egress_subnet, text)

    def test_nets(self):
        for text in ("none", "egress", "host"):
            self.assertEqual(faasd.Options().changed({"net": [text]}).net, text)
        for text in ("", "Host", "bridge", "none "):
            self.assertRaises(faasd.BadRequest, faasd.Options().changed, {"net": [text]})

    def test_lowest_free_address(self):
        addresses = faasd.Addresses(ipaddress.IPv4Network("10.0.0.0/28"))
        self.assertEqual(addresses.lowest_free([]), "10.0.0.10")
        self.assertEqual(addresses.lowest_free(["10.0.0.10", "10.0.0.12"]), "10.0.0.11")
        self.assertRaises(faasd.Conflict, addresses.lowest_free, [f"10.0.0.{n}" for n in range(10, 15)])


class OptionsOfNew(unittest.TestCase):
    """What `faas new` takes, by the daemon, by the client, and by the table in README.md."""

    def setUp(self):
        self.daemon = {option.name: option for option in dataclasses.fields(faasd.Options)
                       if option.name not in ("env", "cmd")}
        self.client = runpy.run_path(str(TOP / "faas"))
        rows = re.findall(r"^\| `--([a-z-]+) .*? \| (.*?) \| .+ \|$", (TOP / "README.md").read_text(), re.MULTILINE)
        self.readme = {name.replace("-", "_"): default for name, default in rows
                       if name not in ("tag", "env-file", "secret")}

    def test_names(self):
        self.assertEqual(list(self.daemon), list(self.client["OPTIONS"]))
        self.assertEqual(sorted(self.daemon), sorted(self.readme))

    def test_defaults(self):
        for name, option in self.daemon.items():
            _, default, text = self.client["OPTIONS"][name]
            for where, written in (("faas", default), ("README.md", self.readme[name].replace(" ", ""))):
                with self.subTest(name, where=where):
                    self.assertEqual(option.metadata["read"](written), option.default)
            self.assertTrue(text)

    def test_every_option_is_sent_and_shown(self):
        """What the client takes for good, the daemon does, and `faas info` has a text for."""
        for name, option in self.daemon.items():
            kind, default, _ = self.client["OPTIONS"][name]
            with self.subTest(name):
                self.assertEqual(kind.type(default), default)
                self.assertTrue(kind.show(faasd.Options().to_json()[name]))
                self.assertEqual(faasd.Options().changed({name: [default]}), faasd.Options())

    def test_defaults_are_values_that_may_be(self):
        self.assertEqual(faasd.Options().check(), faasd.Options.from_json(faasd.Options().to_json()))


class Text(unittest.TestCase):
    def test_control_characters(self):
        for text, escaped in (("plain ünïcode", "plain ünïcode"), ("a\tb", "a\tb"), ("a\nb", "a\\nb"),
                              ("\x1b[2J", "\\x1b[2J"), ("\x7f\x9b", "\\x7f\\x9b"), ("\u2028", "\\u2028"),
                              ("\u202e", "\\u202e")):
            self.assertEqual(faasd.escape_controls(text), escaped)

    def test_an_error_is_one_line(self):
        self.assertEqual(str(faasd.ImageError("two\nlines  and\ttab")), "two lines and tab")

    def test_exit_statuses(self):
        self.assertEqual(faasd.describe_exit(3), "exited with status 3")
        self.assertEqual(faasd.describe_exit(139), "was killed by SIGSEGV")
        self.assertEqual(faasd.describe_exit(137), "was killed by SIGKILL (out of memory?)")
        self.assertEqual(faasd.describe_exit(128 + 99), "was killed by signal 99")

    def test_log_lines_cannot_be_forged(self):
        record = logging.LogRecord("faasd", logging.INFO, "", 0, "a\x1bb", (), None)
        self.assertRegex(faasd.LogFormatter(False).format(record), r"^\S+Z info a\\x1bb$")
        self.assertEqual(json.loads(faasd.LogFormatter(True).format(record))["message"], "a\x1bb")

    def test_log_lines_for_the_journal(self):
        record = logging.LogRecord("faasd", logging.WARNING, "", 0, "a\n<0>b", (), None)
        self.assertEqual(faasd.LogFormatter(False, for_journal=True).format(record), "<4>a\n<4><0>b")
        self.assertTrue(faasd.LogFormatter(True, for_journal=True).format(record).startswith('<4>{"time": '))

    def test_a_long_command_that_cannot_be_executed(self):
        """An image names it, and the loop looks at what the runtime says: no search may begin again at each word."""
        command = "exec " * 200_000
        said = f'runc create failed: exec: "{command}": executable file not found in $PATH'
        self.assertEqual(faasd.command_fault(command, said),
                         (127, f"cannot run {command!r}: it is not in the image's PATH"))


    def test_a_long_command_that_is_nearly_what_was_said(self):
        """The runtime quotes what an image names: no search may compare all of it at each of its letters."""
        program = ("import faasd; name = ' ' * 200_000; "
                   "faasd.command_fault(name + chr(1), f'exec: \"{name}\\\\x01\": stat: no such file or directory')")
        limited = subprocess.run(["prlimit", "--cpu=6", sys.executable, "-Bc", program], cwd=TOP, check=False)
        self.assertEqual(limited.returncode, 0)


class Cgroups(unittest.TestCase):
    def test_process_that_is_gone_while_its_session_is_not(self):
        """Of its pid, Linux 6.1 says EINVAL rather than ESRCH."""
        leader = subprocess.Popen(["sh", "-c", "sleep 1000 >&2 & echo $!"], start_new_session=True, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with leader.stdout:
            self.addCleanup(os.kill, int(leader.stdout.readline()), signal.SIGKILL)
        leader.wait()
        with tempfile.TemporaryDirectory() as hierarchy:
            cgroups = faasd.Cgroups(Path(hierarchy))
            cgroups._hierarchies = [Path(hierarchy)]
            directory = Path(hierarchy + cgroups.path("f", "container"))
            directory.mkdir(parents=True)
            (directory / "cgroup.procs").write_text(f"{leader.pid}\n")
            with self.assertNoLogs(faasd.log):
                cgroups.kill(cgroups.path("f", "container"))


class DyingCgroups(unittest.TestCase):
    """When what ended containers leave is reclaimed, by how many memory cgroups are dying at each look."""

    def looks(self, *counts: int) -> str:
        dying = faasd.DyingCgroups(None, "", None)
        return "".join("R" if dying.are_many(count) else "-" for count in counts)

    def test_ordinary_function(self):
        self.assertEqual(self.looks(*range(63), *[63] * 50), "-" * 113)

    def test_many_of_others_from_before(self):
        self.assertEqual(self.looks(5000, 5020, 4990, 5053, 5000), "-----")

    def test_one_each_time(self):
        self.assertEqual(self.looks(32, 64, 96, 32, 64, 96, 32, 64, 96), "--R--R--R")

    def test_one_every_other_time(self):
        self.assertEqual(self.looks(16, 32, 48, 64, 80, 16), "----R-")

    def test_more_each_time_if_in_vain(self):
        counts = [0, 64, 64, 127, 191, 192, 192, 447, 448]
        self.assertEqual(self.looks(*counts), "-R---R--R")
        self.assertEqual(self.looks(*counts, 100, 163, 164), "-R---R--R--R")         # the last time was not in vain


class ResolvConf(unittest.TestCase):
    """What a namespace of its own is told about resolvers, by what the host's files say."""

    def test_resolvers_of_the_host(self):
        for texts, fitted, resolvers in (
                (["nameserver 192.0.2.1\n"], "nameserver 192.0.2.1\n", ["192.0.2.1"]),
                (["# x\n; y\nsearch a b\noptions edns0\ndomain c\nsortlist 1\nnameserver\t192.0.2.1 # z\n"],
                 "search a b\noptions edns0\ndomain c\nnameserver 192.0.2.1\n", ["192.0.2.1"]),
                (["nameserver 127.0.0.53\nsearch a\n", "nameserver 192.0.2.1\nnameserver 169.254.169.253\n"],
                 "nameserver 192.0.2.1\nnameserver 169.254.169.253\n", ["192.0.2.1", "169.254.169.253"]),
                (["nameserver 127.0.0.53\nnameserver 192.0.2.1\n", "nameserver 192.0.2.2\n"],
                 "nameserver 192.0.2.1\n", ["192.0.2.1"]),
                (["nameserver fd00::1\nnameserver 0.0.0.0\nnameserver x\nnameserver\nnameserver 224.0.0.1"], "", []),
                (["nameserver 127.0.0.1\nsearch a\n", ""], "", []), ([""], "", []), ([], "", [])):
            with self.subTest(texts):
                self.assertEqual(faasd.fit_resolv_conf(texts), (fitted, resolvers))


class RuntimeWarnings(unittest.TestCase):
    def test_versions(self):
        for version, warned in (("runc version 1.1.5+ds1", True), ("runc version 1.1.11", True),
                                ("runc version 1.1.12", True), ("runc version 1.2.7", True),
                                ("runc version 1.2.8", False), ("runc version 1.3.0-rc.1", True),
                                ("runc version 1.3.2", True), ("runc version 1.3.3", False),
                                ("runc version 1.4.0", False), ("crun version 1.8.1", False), ("", False)):
            self.assertEqual(faasd.runc_warning(version) is not None, warned, version)
        self.assertIn("CVE-2024-21626, fixed in 1.1.12;", faasd.runc_warning("runc version 1.1.11"))
        self.assertIn("CVE-2025-52881, fixed in 1.2.8 and 1.3.3)", faasd.runc_warning("runc version 1.1.12"))
        self.assertNotIn("CVE-2024-21626", faasd.runc_warning("runc version 1.1.5", "  * Fix CVE-2024-21626"))
        fixes = "CVE-2024-21626 CVE-2025-31133 CVE-2025-52565 CVE-2025-52881"
        self.assertIsNone(faasd.runc_warning("runc version 1.1.5+ds1", fixes))
        self.assertNotIn("CVE-2024-21626", faasd.runc_warning("runc version 1.1.12"))


    def test_the_package_manager_is_asked(self):
        runtime = next(filter(shutil.which, ("runc", "crun")))
        kept = Path(f"/usr/share/doc/{runtime}/changelog.Debian.gz").exists()         # minimal images leave it out
        self.assertEqual(faasd.package_changelog(shutil.which(runtime)).startswith(f"{runtime} ("), kept)
        self.assertEqual(faasd.package_changelog("/nowhere"), "")
        if shutil.which("dpkg-query"):          # the package may have another name
            self.assertRegex(faasd.package_changelog("/usr/bin/ls"), r"^coreutils \(|^\Z")


class NoCgroups:
    can_limit_swap = kills_whole = True

    @staticmethod
    def path(function: str, container_id: str) -> str:
        return f"/p/{function}/{container_id}"

    @staticmethod
    def mounts(function: str, container_id: str) -> list[dict]:
        return []


class Spec(unittest.TestCase):
    """One literal image; each test changes one thing."""

    image = {"version": "0123456789ab", "digest": "sha256:00", "first_id": 1 << 20, "process": {
        "entrypoint": ["/e"], "cmd": ["c"], "env": ["PATH=/bin", "A=1"], "cwd": "/w", "uid": 1, "gid": 2, "groups": [3],
        "resolv_conf": "/usr/etc/resolv.conf"}}

    def spec(self, image: dict | None = None, options: faasd.Options = DEFAULTS, number: int = 0,
             cgroups: NoCgroups | None = None) -> dict:
        bundle = faasd.Bundle("name", image or self.image, options, Path("/r"), Path("/run/x"),
                              cgroups or NoCgroups(), number=number)
        return json.loads(bundle.render("ID", "/u"))

    def test_process(self):
        process = self.spec(number=7)["process"]
        self.assertEqual((process["args"], process["cwd"]), (["/e", "c"], "/w"))
        self.assertEqual(process["user"], {"uid": 1, "gid": 2, "additionalGids": [3]})
        self.assertEqual(process["env"], ["HOSTNAME=name", "PATH=/bin", "A=1", "FAAS_FUNCTION=name", "FAAS_VERSION=7",
                                          "FAAS_CONTAINER_ID=ID"])

    def test_capabilities_are_those_that_a_user_adds(self):
        for added, dropped, held in (("chown,CAP_Kill", "", ["CHOWN", "KILL"]), ("ALL", "kill,ALL,", []),
                                     ("all", "cap_kill", [name for name in faasd.CAPABILITIES if name != "KILL"]),
                                     ("KILL", "ALL", ["KILL"]), ("", "ALL", []), ("KILL", "KILL", ["KILL"]),
                                     ("KILL", "CHOWN,KILL", ["KILL"]), ("CHOWN,ALL", "CHOWN,ALL", [])):
            options = DEFAULTS.changed({"cap_add": [added], "cap_drop": [dropped]})
            for uid in (0, 1):
                kinds = faasd.capabilities(options, {"uid": uid}, "handler")
                names = [f"CAP_{name}" for name in held]
                self.assertEqual(kinds, {"bounding": names, "effective": names if uid == 0 else [], "inheritable": [],
                                         "permitted": names if uid == 0 else [], "ambient": []}, (added, dropped))
        for bad in ("SYS_ADMIN", "CAP_CAP_KILL", "KILL;CHOWN"):
            self.assertRaisesRegex(faasd.BadRequest, "bad capability", DEFAULTS.changed, {"cap_add": [bad]})

    def test_operator_s_protection_is_not_the_handler_s(self):
        for ours, theirs in (("-900\n", 0), ("300\n", 300), ("", 0)):
            with self.subTest(ours), mock.patch.object(faasd, "read_text", return_value=ours):
                self.assertEqual(self.spec()["process"]["oomScoreAdj"], theirs)

    def test_safe_by_default(self):
        spec = self.spec()
        self.assertFalse(spec["root"]["readonly"])
        self.assertTrue(self.spec(options=faasd.Options(read_only=True))["root"]["readonly"])
        self.assertTrue(spec["process"]["noNewPrivileges"])
        self.assertEqual(set(map(tuple, spec["process"]["capabilities"].values())), {()})
        self.assertEqual({n["type"] for n in spec["linux"]["namespaces"]},
                         {"pid", "mount", "network", "ipc", "uts", "cgroup", "user"})
        self.assertEqual(spec["linux"]["uidMappings"], [{"containerID": 0, "hostID": 1 << 20, "size": 65536}])
        self.assertEqual(spec["linux"]["gidMappings"], spec["linux"]["uidMappings"])
        self.assertEqual(spec["linux"]["resources"]["devices"], [{"allow": False, "access": "rwm"}])
        self.assertIn("/proc/kcore", spec["linux"]["maskedPaths"])
        self.assertIn("/proc/sys", spec["linux"]["readonlyPaths"])

    def test_networks(self):
        for net, namespace, sys_type in (("none", [{"type": "network"}], "sysfs"), ("host", [], "tmpfs"),
                                         ("egress", [{"type": "network", "path": "/run/x/net/name"}], "tmpfs")):
            spec = self.spec(options=faasd.Options(net=net))
            self.assertEqual([n for n in spec["linux"]["namespaces"] if n["type"] == "network"], namespace)
            mounts = {mount["destination"]: mount for mount in spec["mounts"]}
            self.assertEqual(mounts["/sys"]["type"], sys_type)
            self.assertIn("ro", mounts["/sys"]["options"])
            self.assertEqual(mounts.get("/usr/etc/resolv.conf", {}).get("source"),
                             None if net == "none" else f"/run/x/resolv.conf.{net}")
            self.assertEqual("/sys/firmware" in spec["linux"]["maskedPaths"], net == "none")

    def test_system_calls_of_which_some_are_refused(self):
        """Every number meets one rule, and those with higher bits, which the kernel overlooks, none that allows."""
        rules = [rule for rule in faasd.seccomp_profile("x86_64")["syscalls"] if rule.get("args")]
        allowed = [("SCMP_ACT_ALLOW", None)]

        def holds(number: int, condition: dict) -> bool:
            if condition["op"] == "SCMP_CMP_GT":
                return number > condition["value"]
            return number & condition["value"] == condition["valueTwo"]

        def meets(name: str, *numbers: int) -> list[tuple[str, int | None]]:
            return [(rule["action"], rule.get("errnoRet")) for rule in rules
                    if rule["names"] == [name] and all(holds(numbers[c["index"]], c) for c in rule["args"])]
        for name, before, count, refused in (
                ("setsockopt", [0, socket.SOL_SOCKET], 256,
                 {socket.SO_LINGER: 0, 25: 1, 26: 1, 50: 1, 51: 1, 52: 1, 62: 1}),
                ("setsockopt", [0, socket.IPPROTO_IP], 256, dict.fromkeys((4, 21, 39, 42, 46), 1)),
                ("setsockopt", [0, socket.IPPROTO_IPV6], 256, {73: 1}),
                ("setsockopt", [0, socket.IPPROTO_TCP], 256, dict.fromkeys((14, 31, 32, 38, 39, 40, 41), 1)),
                ("fcntl", [0], 2048, {1024: 1, 1026: 1}), ("prctl", [], 128, {22: errno.EINVAL})):
            for number in range(count):
                expected = [("SCMP_ACT_ERRNO", refused[number])] if number in refused else allowed
                self.assertEqual(meets(name, *before, number), expected, (name, number))
            for number in refused:
                for high in (1 << 32, 1 << 40, 1 << 63):
                    self.assertEqual(meets(name, *before, high | number), [])
        modules = {0x5423, 0x8940, 0x8941, *range(0x8980, 0x89C0)}
        for number in (*range(0x5400, 0x5440), *range(0x8930, 0x89D0), *(1 << bit for bit in range(32))):
            for high in (0, 0xFFFF_FFFF << 32, 1 << 32):        # the kernel looks at 32 bits
                expected = [("SCMP_ACT_ERRNO", 1)] if number in modules else allowed
                self.assertEqual(meets("ioctl", 0, high | number), expected, (high, number))
        for level in (0, *range(2, 6), *range(7, 512)):
            self.assertEqual(meets("setsockopt", 0, level, socket.SO_LINGER), allowed)
        self.assertEqual(meets("setsockopt", 0, 1 << 32 | socket.SOL_SOCKET, socket.SO_LINGER), [])
        for family in range(64):
            good = family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
            self.assertEqual(meets("socket", family, socket.SOCK_STREAM, 0) == allowed, good, family)
        for protocol in range(512):
            for family in (socket.AF_INET, socket.AF_INET6):
                for kind, own in ((socket.SOCK_STREAM, 6), (socket.SOCK_DGRAM, 17)):
                    found = meets("socket", family, kind | socket.SOCK_CLOEXEC, protocol)
                    self.assertEqual(found == allowed, protocol in (0, own), (family, kind, protocol))

    def test_limits(self):
        resources = self.spec(options=faasd.Options(memory=1 << 26, cpus=0.5, pids=9))["linux"]["resources"]
        self.assertEqual(resources["memory"], {"limit": 1 << 26, "swap": 1 << 26})
        self.assertEqual(resources["cpu"], {"quota": 50_000, "period": 100_000})
        self.assertEqual(resources["pids"], {"limit": 9})
        self.assertEqual(resources["unified"], {"memory.oom.group": "1"})
        version_1 = NoCgroups()
        version_1.can_limit_swap = version_1.kills_whole = False
        resources = self.spec(cgroups=version_1)["linux"]["resources"]
        self.assertNotIn("swap", resources["memory"])
        self.assertNotIn("unified", resources)

    def test_command(self):
        self.assertEqual(self.spec(options=faasd.Options(cmd=("x", "y")))["process"]["args"], ["/e", "x", "y"])
        empty = {**self.image, "process": {**self.image["process"], "entrypoint": [], "cmd": []}}
        self.assertRaises(faasd.ImageError, self.spec, empty)

    def test_env_overrides_in_place(self):
        self.assertEqual(faasd.merge_env(["A=1", "B=2", "A=3"], ["A=4", "C=5"]), ["A=4", "B=2", "C=5"])
        self.assertEqual(faasd.merge_env(["AB=1"], ["A=2"]), ["AB=1", "A=2"])

    def test_only_the_id_differs_between_containers(self):
        # A user's text that looks like anything at all is left alone.
        options = faasd.Options(env=("X=@CONTAINER@ {} %s $ID",))
        bundle = faasd.Bundle("name", self.image, options, Path("/r"), Path("/run/faasd"), NoCgroups())
        first, second = bundle.render("aaaaaaaaaaaa"), bundle.render("bbbbbbbbbbbb")
        self.assertEqual(first.replace(b"a" * 12, b"b" * 12), second)
        self.assertEqual(first.count(b"a" * 12), 3)
        self.assertIn("X=@CONTAINER@ {} %s $ID", json.loads(first)["process"]["env"])


class Demand(unittest.TestCase):
    """What should be warm, by the clock that the test sets."""

    def setUp(self):
        self.demand = faasd.Demand()
        self.demand.start.seconds = 0.052

    def arrive(self, count: int, begin: float, seconds: float) -> float:
        for number in range(count):
            self.demand.arrived(begin + seconds * number / count)
        return begin + seconds

    def test_nobody_yet(self):
        self.assertEqual(self.demand.target(1000.0, False), (0, float("inf")))

    def test_one_client_is_remembered_for_a_while(self):
        self.demand.arrived(1000.0)
        end = 1000.0 + faasd.WARM_SECONDS
        self.assertEqual(self.demand.target(1000.0, False), (1, end))
        self.assertEqual(self.demand.target(end - 1, False), (1, end))
        self.assertEqual(self.demand.target(end, False)[0], 0)

    def test_rate_times_start_time_with_headroom(self):
        end = self.arrive(4000, 1000.0, 40.0)           # 100 a second: 5 during a start
        self.assertEqual(self.demand.target(end, False)[0], 1 + int(faasd.WARM_HEADROOM * 5))
        self.demand.run.seconds = 0.0105                # reused containers are back after their run
        self.assertEqual(self.demand.target(end, True)[0], 1 + int(faasd.WARM_HEADROOM * 1))

    def test_decays_at_the_moments_it_names(self):
        now = self.arrive(4000, 1000.0, 40.0)
        target, change = self.demand.target(now, False)
        while target > 0:
            self.assertEqual(self.demand.target(change - 0.001, False)[0], target)
            before, now = target, change + 0.001
            target, change = self.demand.target(now, False)
            self.assertEqual(target, before - 1)


class Metrics(unittest.TestCase):
    def test_histogram(self):
        histogram = faasd.Histogram()
        self.assertIsNone(histogram.percentiles())
        for number in range(1, 101):
            histogram.add(number / 1000)
        self.assertEqual(histogram.percentiles(), {"p50": 0.051, "p95": 0.096, "p99": 0.1})
        lines = list(histogram.expose("x", 'a="b"'))
        self.assertIn('x_bucket{a="b",le="0.01"} 10', lines)        # bounds are inclusive
        self.assertIn('x_bucket{a="b",le="0.025"} 25', lines)
        self.assertIn('x_bucket{a="b",le="+Inf"} 100', lines)
        self.assertEqual(lines[-2:], ['x_sum{a="b"} 5.05', 'x_count{a="b"} 100'])
        self.assertEqual(list(faasd.Histogram().expose("y"))[-1], "y_count 0")


class RegistryFile(unittest.TestCase):
    def test_round_trip(self):
        with tempfile.TemporaryDirectory() as directory:
            registry = faasd.Registry(Path(directory) / "registry.json")
            self.assertEqual(registry.load(), [])
            versions = [faasd.VersionRecord(2, "0" * 12, "t", faasd.Options(env=("A=1",), cmd=("x",), warm=3)),
                        faasd.VersionRecord(1, "0" * 12, "s", faasd.Options())]
            record = faasd.FunctionRecord("n", "10.0.0.10", 1 << 20, "t", "u", versions)
            registry.save([record])
            self.assertEqual(registry.load(), [record])
            self.assertEqual((record.version, record.options.warm), (2, 3))
            self.assertEqual([path.name for path in Path(directory).iterdir()], ["registry.json"])

    def test_one_of_faasd_0_1_0_is_read(self):
        """There a version was an image: numbers are given, the highest to the one that runs."""
        with tempfile.TemporaryDirectory() as directory:
            path, options = Path(directory) / "registry.json", faasd.Options(memory=1 << 30, env=("A=1",))
            versions = [{"version": digit * 12, "deployed": "t", "options": options.to_json(), "contract": "server",
                         "port": 80} for digit in "ba"]
            path.write_text(json.dumps({"format": 3, "functions": [{
                "name": "n", "address": "10.0.0.10", "first_id": 1 << 20, "created": "t", "updated": "u",
                "versions": versions}]}))
            record, = faasd.Registry(path).load()
            self.assertEqual(record.versions, [faasd.VersionRecord(2, "b" * 12, "t", options, "server", 80),
                                               faasd.VersionRecord(1, "a" * 12, "t", options, "server", 80)])
            faasd.Registry(path).save([record])
            self.assertEqual((json.loads(path.read_text())["format"], faasd.Registry(path).load()), (4, [record]))

    def test_failed_save_leaves_the_old_file(self):
        with tempfile.TemporaryDirectory() as directory:
            registry = faasd.Registry(Path(directory) / "registry.json")
            registry.save([])
            (Path(directory) / ".registry.json.new").mkdir()
            self.assertRaises(faasd.FaasdError, registry.save, [])
            self.assertEqual(registry.load(), [])


class TcpState(unittest.TestCase):
    def test_sent_is_the_data_alone_whether_or_not_it_has_left(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
            client.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += client.send(bytes(1 << 16))
            self.assertEqual(faasd.TcpState.of(client).sent, sent)
            client.shutdown(socket.SHUT_WR)             # the FIN waits behind what the peer has no room for
            self.assertEqual(faasd.TcpState.of(client).sent, sent)
            while server.recv(1 << 20):
                pass
            self.assertEqual(faasd.TcpState.of(client).sent, sent)


    def test_dissolved_connection_has_sent_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname()) as client, listener.accept()[0]:
            client.send(b"x" * 100)
            faasd.reset_connection(client)
            self.assertEqual((faasd.TcpState.of(client).sent, faasd.TcpState.of(client).can_answer), (0, False))


class Descriptors(unittest.TestCase):
    def test_starts_take_nothing_that_is_for_ending_containers(self):
        """Each end leaves a hole low down, while all above is taken: one hole is no room for a start."""
        descriptors = faasd.Descriptors()
        with contextlib.ExitStack() as files:
            def take() -> int:
                return files.enter_context(open(os.devnull, "rb")).fileno()
            holes = [open(os.devnull, "rb") for _ in range(20)]
            descriptors.limit = take() + 100
            with self.assertRaises(OSError):
                while True:
                    descriptors.check_start()
                    take()
            for hole in holes:
                hole.close()
                with contextlib.suppress(OSError):
                    descriptors.check_start()
                    for _ in range(faasd.CONTAINER_DESCRIPTORS):
                        self.assertLess(take(), descriptors.limit - descriptors._spare)


class Workers(unittest.IsolatedAsyncioTestCase):
    async def test_calls_that_do_not_come_back_hold_up_nobody(self):
        workers, letting_go = faasd.Workers(asyncio.get_running_loop()), threading.Event()
        self.addCleanup(letting_go.set)
        stuck = [workers.run(letting_go.wait) for _ in range(100)]
        self.assertEqual(await workers.run(lambda: "back"), "back")
        self.assertEqual(await workers.finished([*stuck, later := workers.run(lambda: "later")]), {later})
        self.assertLess(self.count(), 250)
        letting_go.set()
        await asyncio.gather(*stuck)
        self.assertEqual(await workers.run(lambda: "back"), "back")
        while self.count() > 1:
            await asyncio.sleep(0.01)

    async def test_who_is_overdue_is_told_once(self):
        workers, letting_go, told = faasd.Workers(asyncio.get_running_loop()), threading.Event(), []
        self.addCleanup(letting_go.set)

        def overdue() -> None:
            told.append(1)
            asyncio.get_running_loop().call_later(0.1, letting_go.set)
        self.assertTrue(await workers.run(letting_go.wait, overdue=overdue))
        self.assertEqual(told, [1])

    async def test_error_is_for_whoever_asked(self):
        workers = faasd.Workers(asyncio.get_running_loop())
        with self.assertRaises(FileNotFoundError):
            await workers.run(os.open, "/nowhere", os.O_RDONLY)
        self.assertEqual(await workers.run(lambda: "back"), "back")

    def setUp(self):
        self.others = set(threading.enumerate())

    def count(self) -> int:
        return len({thread for thread in threading.enumerate() if thread.name == "worker"} - self.others)


class SilentConnections(unittest.TestCase):
    def test_those_that_load_balancers_keep_ready_are_left_to_them(self):
        self.assertGreater(faasd.FIRST_BYTE_SECONDS, 65)        # AWS ELB closes them after 60 s


if __name__ == "__main__":
    unittest.main()
