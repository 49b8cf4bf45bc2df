"""What an image says about its process, and what faasd prepares in the rootfs: rules G and H.1 of UNPACKING.md."""

import contextlib
import json
import os
import shutil
import stat
import unittest
from pathlib import Path

import faasd
import archives
from archives import (
    CANARY,
    Image,
    Refused,
    Sandbox,
    add_cases,
    device,
    directory,
    fifo,
    file,
    hardlink,
    layer,
    symlink,
)

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/usr/sbin:/bin/false
# a comment
app:x:1000:1001:App,,,:/home/app:/bin/sh
app:x:4000:4000::/second:/bin/sh
nohome:x:1002:1002:::
badgid:x:1003:many:::
5000:x:6000:6001::/number:/bin/sh
short:x:7
letters:x:abc:1::/:
\xff\xfe:x:1004:1004::/bytes:/bin/sh
noshell:x:1005:1005::/noshell
"""
GROUP = b"""root:x:0:
wheel:x:10:app,daemon
video:x:44:daemon,app
own:x:1001:app
other:x:50:apple,xapp
app:x:2000:
numbers:x:60:1000
30:x:31:
broken:x:x:app
nomembers:x:70
dup:x:10:app
"""


class Users(unittest.TestCase):
    """G.3: a table of User against passwd and group."""

    def check(self, user: str, expected, passwd: bytes = PASSWD, group: bytes = GROUP):
        if isinstance(expected, Refused):
            with self.assertRaisesRegex(faasd.ImageError, expected.pattern) as caught:
                faasd.resolve_user(user, passwd, group)
            self.assertEqual(caught.exception.status, expected.status)
            self.assertTrue(str(caught.exception).isprintable())
        else:
            account = faasd.resolve_user(user, passwd, group)
            self.assertEqual((account.uid, account.gid, account.groups, account.home), expected)


add_cases(Users, [
    ("G3 empty", "", (0, 0, [], "/root")),
    ("G3 root", "root", (0, 0, [], "/root")),
    ("G3 zero", "0", (0, 0, [], "/root")),
    ("G3 name: first of two lines, supplementary groups without its own", "app", (1000, 1001, [10, 44], "/home/app")),
    ("G3 uid that passwd knows", "1000", (1000, 1001, [10, 44], "/home/app")),
    ("G3 uid with zeros before", "01000", (1000, 1001, [10, 44], "/home/app")),
    ("G3 uid that passwd does not know", "1234", (1234, 0, [], "/")),
    ("G3 uid that is somebody's name is a number", "5000", (5000, 0, [], "/")),
    ("G3 name:group", "app:video", (1000, 44, [], "/home/app")),
    ("G3 name:gid", "app:7", (1000, 7, [], "/home/app")),
    ("G3 uid:gid", "1234:5678", (1234, 5678, [], "/")),
    ("G3 uid:group", "1234:wheel", (1234, 10, [], "/")),
    ("G3 known uid:gid", "1000:0", (1000, 0, [], "/home/app")),
    ("G3 own group explicitly: no supplementary groups", "app:own", (1000, 1001, [], "/home/app")),
    ("G3 group that is somebody's number is a number", "app:30", (1000, 30, [], "/home/app")),
    ("G3 group with a user's name", "daemon:app", (1, 2000, [], "/usr/sbin")),
    ("G3 colon and nothing", "app:", (1000, 1001, [10, 44], "/home/app")),
    ("G3 group alone", ":wheel", (0, 10, [], "/root")),
    ("G3 no home", "nohome", (1002, 1002, [], "/")),
    ("G3 no shell", "noshell", (1005, 1005, [], "/noshell")),
    ("G3 gid in passwd is not a number", "badgid", (1003, 0, [], "/")),
    ("G3 largest id", "65535:65535", (65535, 65535, [], "/")),
    ("G3 unknown name", "nobody", Refused(400, "user 'nobody' is not in its /etc/passwd")),
    ("G3 unknown group", "app:nogroup", Refused(400, "group 'nogroup' is not in its /etc/group")),
    ("G3 unknown group for a number", "5:nogroup", Refused(400, "group 'nogroup'")),
    ("G3 line with too few fields", "short", Refused(400, "not in its /etc/passwd")),
    ("G3 line with letters for a number", "letters", Refused(400, "not in its /etc/passwd")),
    ("G3 id that no container has", "65536", Refused(400, "too large")),
    ("G3 id too large", "99999999999", Refused(400, "too large")),
    ("G3 id of a million digits", "9" * 1_000_000, Refused(400, "too large")),
    ("G3 gid too large", "1:99999999999", Refused(400, "too large")),
    ("G3 negative id is a name", "-1", Refused(400, "not in its /etc/passwd")),
    ("G3 other digits are a name", "１２", Refused(400, "not in its /etc/passwd")),
    ("G3 two colons", "app:wheel:x", Refused(400, "not in its /etc/group")),
    ("G3 control characters", "\x1b[2J\n", Refused(400, "not in its /etc/passwd")),
    ("G3 no passwd: name", "app", Refused(400, "not in its /etc/passwd"), b"", b""),
    ("G3 no passwd: number", "1000", (1000, 0, [], "/"), b"", b""),
    ("G3 no passwd: root", "", (0, 0, [], "/"), b"", b""),
    ("G3 no passwd: name root", "root", Refused(400, "not in its /etc/passwd"), b"", b""),
    ("G3 passwd is not text", "", (0, 0, [], "/"), bytes(range(256)) * 4, bytes(range(256))),
    ("G3 number of 5000 digits in passwd", "", (0, 0, [], "/root"),
     b"x:x:" + b"1" * 5000 + b":0::/x:\nroot:x:0:0::/root:\n", GROUP),
    ("G3 number of 5000 digits in passwd for the name itself", "big", Refused(400, "."),
     b"big:x:" + b"1" * 5000 + b":0::/x:\n", GROUP),
    ("G3 uid in passwd that no container has", "big", Refused(400, "user 'big' is .* or has an id from 65536 on"),
     b"big:x:65536:0::/x:\n", b""),
    ("G3 gid in passwd that no container has", "big", Refused(400, "group 65536 is too large"),
     b"big:x:5:65536::/x:\n", b""),
    ("G3 uid in passwd that no id can be", "big", Refused(400, "too large|not in its /etc/passwd"),
     b"big:x:4294967295:0::/x:\n", b""),
    ("G3 gid in passwd that no id can be", "big", Refused(400, "too large|not in its /etc/passwd"),
     b"big:x:5:4294967296::/x:\n", b""),
    ("G3 number of 5000 digits in group", "app", (1000, 1001, [10], "/home/app"), PASSWD,
     b"big:x:" + b"1" * 5000 + b":app\nwheel:x:10:app\n"),
    ("G3 gid in group that no id can be", "app", (1000, 1001, [10], "/home/app"), PASSWD,
     b"big:x:4294967295:app\nwheel:x:10:app\n"),
    ("G3 gid in group that no id can be, asked for", "app:big", Refused(400, "too large|not in its /etc/group"), PASSWD,
     b"big:x:99999999999:app\n"),
], "check")


def with_files(*entries: bytes, **process) -> Image:
    return Image(layers=[layer(*entries)], process=process)


class Processes(Sandbox):
    """G: from an image config to image.json's process."""

    def process(self, *entries: bytes, **process) -> dict:
        return self.unpack(archives.podman(with_files(*entries, **process)))["process"]

    def check_error(self, entries: list, process: dict, status: int, pattern: str):
        with self.refused(status, pattern):
            self.process(*entries, **process)

    def check_child_error(self, entries: list, process: dict, status: int, pattern: str):
        """Where an escape from the error handling was likely: nothing but the answer may come out of the child."""
        child = self.unpack_child(archives.podman(with_files(*entries, **process)))
        self.assert_child_refused(child, status, pattern)

    def test_G1_everything_absent(self):
        for config in ({}, {"config": None}, {"config": {}}):
            process = self.unpack(archives.podman(Image(changes={"config": None, **config})))["process"]
            self.assertEqual(process, {
                "entrypoint": [], "cmd": [], "env": [f"PATH={faasd.DEFAULT_PATH}", "HOME=/"], "has_home": False,
                "cwd": "/", "uid": 0, "gid": 0, "groups": [], "labels": {}, "stop_signal": "", "exposed_ports": [],
                "image_volumes": [], "resolv_conf": "/etc/resolv.conf"})

    def test_G1_everything_null(self):
        fields = ("User", "WorkingDir", "Env", "Entrypoint", "Cmd", "Volumes", "Labels", "StopSignal", "ExposedPorts")
        process = self.process(**dict.fromkeys(fields))
        self.assertEqual((process["cwd"], process["uid"], process["cmd"]), ("/", 0, []))

    def test_G1_unknown_fields_and_docker_leftovers_are_fine(self):
        process = self.process(Cmd=["a"], ArgsEscaped=True, OnBuild=None, Image="", Healthcheck={"Test": ["x"]},
                               Shell=["/bin/sh"], Tty=False, MacAddress="", Future={"deep": [1]})
        self.assertEqual(process["cmd"], ["a"])
        image = Image(changes={"history": [{"created_by": "x"}], "created": None, "variant": "v8", "os.version": "1",
                               "container_config": {}, "author": 5})
        self.assertEqual(self.unpack(archives.podman(image))["process"]["cmd"], ["/hello"])

    def test_G1_entrypoint_and_cmd_are_kept_apart(self):
        process = self.process(Entrypoint=["/e", "a b", ""], Cmd=["$x", "ü"])
        self.assertEqual((process["entrypoint"], process["cmd"]), (["/e", "a b", ""], ["$x", "ü"]))

    def test_G2_env_verbatim_and_in_order(self):
        env = ["Z=1", "A=", "PATH=/x", "B=a=b", "A=again", "S= two  spaces ", "N=line\nline", "HOME=/h", "ü=ö"]
        self.assertEqual(self.process(Env=env)["env"], env)

    def test_G2_env_that_no_runtime_takes_is_left_out(self):
        self.assertEqual(self.process(Env=["=x", "A=1", "B", "", "=", "HOME=/h", "PATH=/p"])["env"],
                         ["A=1", "HOME=/h", "PATH=/p"])

    def test_G2_path_and_home_only_if_absent(self):
        passwd = file("etc/passwd", PASSWD)
        self.assertEqual(self.process(passwd, Env=["A=1"], User="app")["env"],
                         ["A=1", f"PATH={faasd.DEFAULT_PATH}", "HOME=/home/app"])
        self.assertEqual(self.process(passwd, Env=["HOME=", "PATH="], User="app")["env"], ["HOME=", "PATH="])
        self.assertEqual(self.process(passwd, Env=["HOMER=1", "MYPATH=2"])["env"],
                         ["HOMER=1", "MYPATH=2", f"PATH={faasd.DEFAULT_PATH}", "HOME=/root"])

    def test_G2_working_directory(self):
        for given, cwd in (("", "/"), ("/", "/"), ("//", "/"), ("/d", "/d"), ("/d/", "/d"), ("/d/../e/./f", "/e/f"),
                           ("/../x", "/x"), ("//d", "/d"), ("/a b/ü", "/a b/ü"), ("/process", "/process")):
            with self.subTest(given):
                self.assertEqual(self.process(directory("d"), WorkingDir=given)["cwd"], cwd)
                self.assertTrue((self.image / "rootfs" / cwd.lstrip("/")).is_dir())

    def test_G2_working_directory_is_made_in_the_image(self):
        os.umask(0o777)
        self.process(symlink("l", CANARY), file("f", "a file"), WorkingDir="/l/new/dir")
        status = os.lstat(f"{self.image}/rootfs{CANARY}/new/dir")
        self.assertEqual((stat.S_IMODE(status.st_mode), status.st_uid), (0o755, 0))

    def test_G2_existing_working_directory_is_left_alone(self):
        self.process(directory("w", mode=0o700, uid=5, gid=6), WorkingDir="/w")
        status = os.lstat(self.image / "rootfs/w")
        self.assertEqual((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid), (0o700, 5, 6))

    def test_G2_a_deep_working_directory_or_volume_can_be_removed_again(self):
        """A tree that shutil.rmtree cannot remove (RecursionError on Python 3.11) stops the daemon's next start."""
        for process in ({"WorkingDir": "/a" * 1500}, {"Volumes": {"/v" * 1500: {}}}):
            with self.subTest(list(process)), self.refused(400, "deep|MAX_PATH_DEPTH"):
                self.process(**process)
            deepest = max(path.count("/") for path in [".", *archives.tree(self.image / "rootfs")])
            self.assertLessEqual(deepest, faasd.MAX_PATH_DEPTH)

    def test_G3_accounts_are_read_in_the_image(self):
        """Everything but a regular file counts as no file: the host's root has a home, this image's has none."""
        for name, entries in [
                ("none", []), ("link to the host", [symlink("etc/passwd", "/etc/passwd")]),
                ("link to a host file by dotdots", [symlink("etc/passwd", "../" * 20 + "etc/passwd")]),
                ("directory link to the host", [symlink("etc", CANARY)]),
                ("fifo", [fifo("etc/passwd")]), ("fifo for group", [fifo("etc/group")]),
                ("directory", [directory("etc/passwd")]), ("device", [device("etc/passwd", b"3", 1, 5)]),
                ("etc is a file", [file("etc", "x")])]:
            with self.subTest(name):
                # In the child: opening a FIFO would hang.
                child = self.unpack_child(archives.podman(with_files(*entries, User="0")), timeout=30)
                self.assertEqual((child.returncode, child.stderr), (0, ""), child)
                self.assertIn("HOME=/", child.document["process"]["env"])
                shutil.rmtree(self.image)

    def test_G3_accounts_on_a_device(self):
        """The runtime would read them there, whoever the user is."""
        for entries, refused in (([symlink("etc/group", "/dev/urandom")], "group of the image leads to /dev/urandom"),
                                 ([symlink("etc/passwd", "../a"), symlink("a", "/dev/zero")], "leads to /dev/zero"),
                                 ([symlink("etc/passwd", "/dev/zero"), symlink("dev", "b")], "leads to /dev/zero"),
                                 ([symlink("etc/passwd", "/dev/null")], "")):
            with self.subTest(refused), self.refused(400, refused) if refused else contextlib.nullcontext():
                self.process(*entries)

    def test_G3_accounts_through_links_of_the_image(self):
        entries = [file("usr/etc/passwd", PASSWD), file("usr/etc/group", GROUP), symlink("etc", "/usr/etc")]
        process = self.process(*entries, User="app")
        self.assertEqual((process["uid"], process["gid"], process["groups"]), (1000, 1001, [10, 44]))

    def test_G3_a_link_for_passwd_is_not_read(self):
        with self.refused(400, "user 'app' is not in its /etc/passwd"):
            self.process(file("real", PASSWD), symlink("etc/passwd", "/real"), User="app")

    def test_G4_labels_ports_and_signals_are_data(self):
        process = self.process(Labels={"a": "$(reboot)", "b": "\x1b"}, StopSignal="SIGQUIT",
                               ExposedPorts={"80/tcp": {}, "53/udp": {}})
        self.assertEqual((process["labels"], process["stop_signal"], process["exposed_ports"]),
                         ({"a": "$(reboot)", "b": "\x1b"}, "SIGQUIT", ["53/udp", "80/tcp"]))

    def test_G4_labels_are_texts_and_not_without_end(self):
        deep = json.loads("[" * 900 + "]" * 900)
        for labels in ({"a": deep}, {"a": 1}, {"a": None}, {"a": {"b": "c"}}):
            with self.subTest(str(labels)[:20]), self.refused(400, "has a label that is no text"):
                self.process(Labels=labels)
        with self.refused(413, "MAX_DESCRIPTION"):
            self.process(Labels={str(number): "x" * 100_000 for number in range(11)})

    def test_G4_volumes(self):
        """They are directories of the root, which can all be written."""
        numbered = [f"/v{number}" for number in range(10, 100)]
        process = self.process(
            directory("data", mode=0o1770, uid=7, gid=8), file("full/x", "x"), symlink("l", "/"),
            Volumes={"/full": {}, "/data": {}, "new/dir": None, "/data/": {}, "/tmp": {}, "/l": {}, "": {},
                     "/sys/fs/cgroup": {}, **dict.fromkeys(numbered, {})})
        self.assertEqual(process["image_volumes"], ["/data", "/full", "/new/dir", "/tmp", *numbered])
        with self.refused(400, "over 64 volumes"):
            faasd.choose_process(process, faasd.Options(read_only=True), None)
        for name, mode, owner in (("data", 0o1770, 7), ("full", 0o755, 0), ("new/dir", 0o755, 0), ("v99", 0o755, 0)):
            status = os.lstat(self.image / "rootfs" / name)
            self.assertEqual((status.st_mode, status.st_uid), (stat.S_IFDIR | mode, owner), name)
        self.assertEqual((self.image / "rootfs/full/x").read_text(), "x")

    def test_H1_volumes_through_links_lie_in_the_image(self):
        self.process(symlink("l", CANARY), symlink("d", f"..{CANARY}/dir"),
                     Volumes={"/l/v": {}, "/d": {}, "/f": {}, "/../../x": {}})
        for volume in (f"{CANARY}/dir", f"{CANARY}/v", "/f", "/x"):
            path = Path(f"{self.image}/rootfs{volume}")
            self.assertEqual(os.path.realpath(path), str(path))
            self.assertTrue(path.is_dir())

    def test_image_json_is_what_was_returned(self):
        document = self.unpack(archives.podman(with_files(file("f", "12345"), Cmd=["x"], Env=["A=ü"])))
        self.assertEqual(json.loads((self.image / "image.json").read_text()), document)
        self.assertEqual((document["size"], document["entries"]), (5, 1))


add_cases(Processes, [
    *[(f"G1 {field} is {value!r}", [], {field: value}, 400, field)
      for field, value in (("Cmd", "sh -c x"), ("Cmd", [1]), ("Entrypoint", {"a": 1}), ("Env", "A=1"), ("Env", [None]),
                           ("User", 5), ("WorkingDir", ["/"]), ("Volumes", ["/v"]), ("Labels", ["x"]),
                           ("StopSignal", 9), ("ExposedPorts", [80]), ("Cmd", ["a\0b"]), ("Env", ["A=\0"]))],
    *[(f"G2 WorkingDir {path!r}", [], {"WorkingDir": path}, 400, pattern)
      for path, pattern in (("relative", "not an absolute"), ("./x", "not an absolute"), ("../x", "not an absolute"),
                            ("C:\\x", "not an absolute"), ("/proc", "CVE-2024-21626"),
                            ("/proc/self/fd/7", "CVE-2024-21626"), ("//proc/self/fd/7", "CVE-2024-21626"),
                            ("/x/../proc/self/fd/8", "CVE-2024-21626"),
                            ("/./proc/", "CVE-2024-21626"), ("/../proc/1/cwd", "CVE-2024-21626"))],
    ("G2 WorkingDir of 4,000 bytes", [], {"WorkingDir": "/x" * 2000}, 400, "WorkingDir is too long"),
    ("G2 WorkingDir is a link to /proc", [symlink("w", "/proc/self/fd/7")], {"WorkingDir": "/w"}, 400,
     "CVE-2024-21626"),
    ("G2 WorkingDir lies below a link to /proc", [symlink("w", "proc")], {"WorkingDir": "/w/self/fd/7"}, 400,
     "CVE-2024-21626"),
    ("G2 WorkingDir is a chain of links to /proc", [symlink("w", "x"), symlink("x", "y/../proc/self/cwd")],
     {"WorkingDir": "/w"}, 400, "CVE-2024-21626"),
    *[(f"G2 {what} {path} of the image",
       [file("etc/passwd", PASSWD), device("c", b"3", 1, 3), symlink("l", "etc/passwd")],
       setting, 400, f"{what}: {real} of the image is not a directory")
      for path, real in (("/etc/passwd", "/etc/passwd"), ("/etc/passwd/x", "/etc/passwd"), ("/c", "/c"),
                         ("/l", "/etc/passwd"))
      for what, setting in (("WorkingDir", {"WorkingDir": path}), ("volume", {"Volumes": {path: {}}}))],
    *[(f"G2 WorkingDir {path!r}, where a container has other things", [directory("dev/fd/7"), directory("sys/fs")],
       {"WorkingDir": path}, 400, "CVE-2024-21626")
      for path in ("/dev/fd/7", "/dev", "/dev/x/../fd/7", "/sys/fs", "/control.sock", "/control.sock/x")],
    ("G2 WorkingDir by a link in /dev that leads elsewhere", [symlink("w", "dev/fd/7"), directory("d/7"),
                                                              symlink("dev/fd", "../d")],
     {"WorkingDir": "/w"}, 400, "CVE-2024-21626"),
    ("G2 WorkingDir through a loop", [symlink("w", "w")], {"WorkingDir": "/w/x"}, 400, "MAX_LINK_HOPS"),
    ("G3 passwd too large", [file("etc/passwd", "x" * (1 << 20) + "x")], {}, 413, "MAX_ACCOUNTS_SIZE"),
    ("G3 group too large", [file("etc/group", "x" * (1 << 20) + "x")], {}, 413, "MAX_ACCOUNTS_SIZE"),
    ("G3 passwd is a loop of links", [symlink("etc", "etc")], {}, 400, "MAX_LINK_HOPS"),
    ("G3 passwd lies below a link to a name that cannot be", [symlink("etc", "x" * 256)], {}, 400,
     "cannot unpack .*too long"),
    ("G3 passwd lies below a link to a path that cannot be", [symlink("etc", f"{'x' * 250}/" * 16 + "y" * 70)], {}, 400,
     "cannot unpack .*too long"),
    ("G2 WorkingDir is a link to a name that is no UTF-8", [symlink("w", "\udcff")], {"WorkingDir": "/w"}, 400,
     "leads to is not valid Unicode"),
    ("G2 WorkingDir is a link to a name that cannot be", [symlink("w", "x" * 256)], {"WorkingDir": "/w"}, 400,
     "cannot unpack .*too long"),
    ("G3 unknown user", [], {"User": "app"}, 400, "user 'app'"),
    ("H1 volume through a loop", [symlink("l", "l")], {"Volumes": {"/l": {}}}, 400, "MAX_LINK_HOPS"),
], "check_error")
add_cases(Processes, [
    ("G2 WorkingDir with NUL in the child", [], {"WorkingDir": "/a\0b"}, 400, "WorkingDir"),
    ("G2 WorkingDir with a lone surrogate in the child", [], {"WorkingDir": "/\ud800"}, 400, "."),
    ("G2 WorkingDir with a long component in the child", [], {"WorkingDir": "/" + "n" * 300}, 400, "."),
    ("G2 WorkingDir over PATH_MAX in the child", [], {"WorkingDir": "/" + ("n" * 200 + "/") * 30}, 400, "."),
    ("G3 User with a lone surrogate in the child", [], {"User": "\ud800"}, 400, "not in its /etc/passwd"),
    ("G3 number of 5000 digits in passwd in the child", [file("etc/passwd", "x:x:" + "1" * 5000 + ":0::/x:\n")],
     {"User": "x"}, 400, "too large|not in its /etc/passwd"),
    ("G4 volume with NUL in the child", [], {"Volumes": {"/a\0b": {}}}, 400, "."),
    ("G4 volume with a lone surrogate in the child", [], {"Volumes": {"/\ud800": {}}}, 400, "."),
    ("G4 volume with a long component in the child", [], {"Volumes": {"/" + "n" * 300: {}}}, 400, "."),
], "check_child_error")


class MountTargets(Sandbox):
    """H.1: what containers get mounted is never behind a link of the image."""

    TARGETS = ("dev", "proc", "sys", "tmp")

    def check(self, *entries: bytes):
        self.unpack(archives.podman(with_files(*entries)))
        rootfs = self.image / "rootfs"
        for target in self.TARGETS:
            self.assertTrue(stat.S_ISDIR(os.lstat(rootfs / target).st_mode), target)
        status = os.lstat(rootfs / "control.sock")
        self.assertEqual((stat.S_IFMT(status.st_mode), status.st_size, status.st_nlink, status.st_uid),
                         (stat.S_IFREG, 0, 1, 0))
        for name in ("hosts", "hostname"):
            status = os.lstat(rootfs / os.path.realpath(f"/etc/{name}").lstrip("/"))
            self.assertEqual((status.st_mode, status.st_size, status.st_nlink, status.st_uid),
                             (stat.S_IFREG | 0o644, 0, 1, 0), name)
        return rootfs

    def test_H1_made_with_the_right_mode_whatever_the_umask(self):
        os.umask(0o777)
        rootfs = self.check()
        self.assertEqual([stat.S_IMODE(os.lstat(rootfs / name).st_mode)
                          for name in (*self.TARGETS, "control.sock", "etc")],
                         [0o1777 if name == "tmp" else 0o755 for name in self.TARGETS] + [0o644, 0o755])

    def test_B2_tmp_is_everybodys_whatever_the_image_has(self):
        for entry in (b"", directory("tmp", mode=0o755), directory("tmp", mode=0o700, uid=5), symlink("tmp", "var/tmp"),
                      file("tmp", "x")):
            rootfs = self.check(entry)
            self.assertEqual(stat.S_IMODE(os.lstat(rootfs / "tmp").st_mode), 0o1777)

    def test_H1_directories_of_the_image_stay(self):
        rootfs = self.check(directory("tmp", mode=0o1777), file("tmp/keep", "k"), file("dev/null", "a file"))
        self.assertEqual((rootfs / "tmp/keep").read_text(), "k")
        self.assertEqual(stat.S_IMODE(os.lstat(rootfs / "tmp").st_mode), 0o1777)

    def test_H1_hosts_and_hostname_are_plain_files(self):
        """Each container gets its own in their place, as in docker, whatever the image has (test_root)."""
        for name in ("hosts", "hostname"):
            for entry in (b"", file(f"etc/{name}", "1.2.3.4 x\n", mode=0o600), symlink(f"etc/{name}", f"{CANARY}/file"),
                          fifo(f"etc/{name}"), symlink(f"etc/{name}", f"{CANARY}/new"),
                          directory(f"etc/{name}") + file(f"etc/{name}/x", "x")):
                self.check(entry)

    def test_H1_resolv_conf_is_a_plain_file(self):
        for entry in (b"", symlink("etc/resolv.conf", f"{CANARY}/file"), symlink("etc/resolv.conf", f"{CANARY}/new"),
                      symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"), fifo("etc/resolv.conf"),
                      directory("etc/resolv.conf")):
            rootfs = self.check(entry)
            self.assertEqual(stat.S_IFMT(os.lstat(rootfs / "etc/resolv.conf").st_mode), stat.S_IFREG)
            self.assertEqual((rootfs / "etc/resolv.conf").read_bytes(), b"")

    def test_H1_resolv_conf_of_the_image_stays(self):
        self.assertEqual((self.check(file("etc/resolv.conf", "x")) / "etc/resolv.conf").read_text(), "x")

    def test_H1_etc_that_is_a_link_to_the_host(self):
        image = self.unpack(archives.podman(with_files(symlink("etc", CANARY))))
        self.assertEqual(image["process"]["resolv_conf"], f"{CANARY}/resolv.conf")      # as the container sees it
        for name in ("hosts", "hostname"):
            self.assertEqual(Path(f"{self.image}/rootfs{CANARY}/{name}").read_text(), "")


add_cases(MountTargets, [
    *[(f"H1 {target} is a {what}", entry(target)) for target in (*MountTargets.TARGETS, "control.sock")
      for what, entry in (
          ("link to a host directory", lambda name: symlink(name, f"{CANARY}/dir")),
          ("link to a host file", lambda name: symlink(name, f"{CANARY}/file")),
          ("dangling link to the host", lambda name: symlink(name, f"{CANARY}/new")),
          ("link with dotdots", lambda name: symlink(name, "../../../../.." + CANARY)),
          ("link to slash", lambda name: symlink(name, "/")), ("link to itself", lambda name: symlink(name, name)),
          ("file", lambda name: file(name, "x")), ("fifo", fifo),
          ("device", lambda name: device(name, b"4", 8, 0)),
          ("full directory", lambda name: directory(name) + file(name + "/a/b", "x")),
          ("hard link to a file of the image", lambda name: file("other", "x") + hardlink(name, "other")))],
    ("H1 all links to each other", symlink("dev", "proc"), symlink("proc", "sys"), symlink("sys", "dev"),
     symlink("tmp", "dev/shm")),
], "check")


class OneFileSeveralNames(Sandbox):
    def test_H1_the_control_socket_does_not_empty_a_hard_linked_file(self):
        self.unpack(archives.podman(with_files(file("other", "content"), hardlink("control.sock", "other"))))
        self.assertEqual((self.image / "rootfs/other").read_text(), "content")

    def test_H1_hosts_do_not_reach_a_hard_linked_file(self):
        self.unpack(archives.podman(with_files(file("other", ""), hardlink("etc/hosts", "other"))))
        self.assertEqual((self.image / "rootfs/other").read_text(), "")


if __name__ == "__main__":
    unittest.main()
