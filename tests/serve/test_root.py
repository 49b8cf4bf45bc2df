"""The root of a container: the image, which it may change as it likes, in memory of its own that goes with it."""

import json
import os
import re
import shutil
import signal
import subprocess
import unittest
import urllib.parse
from pathlib import Path

import archives
import support
from clients import get

import faasd

# All that changes a file or directory of the image, each tried once; then a handler that answers with what came of it.
CHANGES = """
import json, os, shutil

def write(path):
    with open(path, "r+b") as file:
        file.write(b"EVIL")

ACTIONS = {
    "write": lambda: write("/etc/a"), "by /proc/self/root": lambda: write("/proc/self/root/etc/b"),
    "by /proc/1/cwd": lambda: write(f"/proc/1/cwd{'/..' * 20}/etc/c"), "append": lambda: open("/etc/d", "a").write("x"),
    "truncate": lambda: os.truncate("/etc/e", 1), "remove": lambda: os.unlink("/etc/f"),
    "rename": lambda: os.rename("/etc/g", "/etc/other"), "link": lambda: os.link("/etc/h", "/tmp/h"),
    "chmod": lambda: os.chmod("/etc/i", 0o4777), "time": lambda: os.utime("/etc/j", (1, 1)),
    "attribute": lambda: os.setxattr("/etc/k", "user.x", b"x"),
    "make": lambda: open("/new", "w").close(), "directory": lambda: os.mkdir("/etc/new"),
    "fifo": lambda: os.mkfifo("/etc/fifo"), "tree": lambda: shutil.rmtree("/tree"),
    "root": lambda: os.chmod("/", 0o700), "volume": lambda: open("/data/x", "w").close(),
}
DONE = {}
for what, action in ACTIONS.items():
    try:
        action()
        DONE[what] = "done"
    except OSError as error:
        DONE[what] = error.strerror
shm = os.statvfs("/dev/shm")
print("shm", shm.f_blocks * shm.f_frsize, flush=True)
print("changed", json.dumps(DONE), flush=True)
""" + support.HANDLER.read_text()
FILES = {f"etc/{letter}": f"content of {letter}" for letter in "abcdefghijk"} | {"tree/x": "x", "tree/deep/y": "y"}


def content(top: Path) -> dict[str, tuple]:
    """Return all that can be told of the files below a directory."""
    return {str(path): (os.lstat(path), path.read_bytes() if path.is_file() and not path.is_symlink() else b"",
                        os.listxattr(path, follow_symlinks=False)) for path in (top, *sorted(top.rglob("*")))
            if "python" not in str(path)}


def less_times_of_access(tree: dict) -> dict:
    return {path: (status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_size, status.st_mtime_ns,
                   status.st_ctime_ns, data, names) for path, (status, data, names) in tree.items()}


class Root(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)

    def deploy(self, *options: str, volumes: tuple[str, ...] = ("/data",), **config) -> str:
        self.addCleanup(self.daemon.faas, "rm", "f", check=False)
        image = support.handler_image(CHANGES.encode(), files=FILES, Volumes=dict.fromkeys(volumes, {}), **config)
        return self.daemon.faas("new", "f", *options, stdin=image).stdout.split()[-1]

    def changes(self, count: int = 1) -> list[dict]:
        """What each container so far could do, once so many have said it."""
        def said() -> list[dict]:
            found = [json.loads(line.partition("changed ")[2]) for line in self.daemon.function_log("f").splitlines()
                     if "changed {" in line]
            return found if len(found) >= count else []
        return support.wait_until(said, f"{count} containers have said what they could change")

    def test_whatever_it_does_to_the_image_it_alone_sees_and_once(self):
        address = self.deploy("--warm", "0")
        before = less_times_of_access(content(self.daemon.rootfs("f")))
        for _ in range(2):
            self.assertEqual(get(address)[0], 200)
        self.daemon.wait_idle("f")
        first, *others = self.changes(3)
        self.assertEqual(set(first.values()) - {"Operation not supported"}, {"done"})   # user.*: tmpfs, Linux 6.6
        self.assertEqual(others, [first] * 2)
        self.assertEqual(less_times_of_access(content(self.daemon.rootfs("f"))), before)

    def test_read_only(self):
        """All but the image's volumes, as in docker, whatever else has its place in one of them."""
        mine = support.temporary_directory()
        self.addCleanup(shutil.rmtree, mine)
        os.chown(mine, 1234, 1234)
        (mine / "secret").write_text("s")
        self.deploy("--warm", "0", "--read-only", "--volume", f"{mine}:/data/mine:ro", "--secret", f"s={mine}/secret",
                    volumes=("/data", "/run", "/proc", "/dev/x", "/etc/hosts", "/etc/hostname", "/control.sock/x", "/"))
        changes = self.changes()[0]
        self.assertEqual(changes.pop("volume"), "done")         # as in docker
        self.assertEqual({*changes.values()}, {"Read-only file system"})
        self.daemon.faas("set", "f", "--no-read-only")
        self.assertIn("done", self.changes(2)[-1].values())

    def test_options_of_docker_run(self):
        address = self.deploy("--shm-size", "3m", "--hostname", "h.example", "--cap-add", "CHOWN",
                              "--cap-add", "cap_kill")
        facts = json.loads(get(address, "/facts")[1])
        self.assertEqual((facts["env"]["HOSTNAME"], int(facts["status"]["CapEff"], 16)), ("h.example", 1 << 0 | 1 << 5))
        self.assertIn(f"shm {3 << 20}\n", self.daemon.function_log("f"))
        self.assertRegex(self.daemon.faas("info", "f", "--isolation").stdout,
                         r"\ncapabilities: +capeff=CHOWN,KILL capprm=CHOWN,KILL capbnd=CHOWN,KILL\n")

    def test_nothing_is_mounted_for_others_to_see_and_nothing_is_left(self):
        before = support.footprint(self.daemon)["mounts"]
        self.deploy("--warm", "3")
        self.daemon.wait_warm("f", 3)
        self.assertEqual(support.footprint(self.daemon)["mounts"], before)
        self.assertEqual(list((self.daemon.run_dir / faasd.ROOT).iterdir()), [])

    def test_users_of_the_image_own_what_is_theirs(self):
        self.deploy("--warm", "0", User="1000:1000")
        refused = self.changes()[0]
        self.assertEqual({refused[what] for what in ("write", "remove", "make", "root")},
                         {"Permission denied", "Operation not permitted"} & set(refused.values()))

    def test_host_unmounts_what_containers_runtimes_have_seen(self):
        """Their mount namespace has all of the host's; what a disk is in there must not keep it busy."""
        shared = support.temporary_directory()
        self.addCleanup(os.rmdir, shared)
        disk = shared / "disk"
        for command in (["mount", "-t", "tmpfs", "shared", shared], ["mount", "--make-shared", shared], ["mkdir", disk],
                        ["mount", "-t", "tmpfs", "disk", disk]):
            subprocess.run(command, check=True)
        self.addCleanup(subprocess.run, ["umount", "-R", shared], check=True)
        self.deploy("--warm", "1")
        self.daemon.wait_warm("f", 1)
        parent, = (path for path in Path("/proc").glob("[0-9]*") if self.runs_a_container(path))
        def seen() -> bool:
            return str(disk) in {before[4] for before, _ in faasd.read_mountinfo(str(parent / "mountinfo"))}
        self.assertTrue(seen())
        subprocess.run(["umount", disk], check=True)
        self.assertFalse(seen())

    def runs_a_container(self, path: Path) -> bool:
        try:
            argv = (path / "cmdline").read_bytes()
        except OSError:
            return False
        return str(self.daemon.run_dir / "runc").encode() in argv and b"\0run\0" in argv


ACCOUNTS = {"etc/passwd": b"root:x:0:0::/root:\napp:x:1000:1001::/home/app:\n",
            "etc/group": b"app:x:1001:\nextra:x:44:app\nother:x:45:\n", "a-file": b""}


class Chosen(unittest.TestCase):
    """What a user chooses in the place of what the image says: --user, --workdir and --entrypoint of docker run."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)

    def deploy(self, *options: str, **config) -> dict:
        """Deploy an image with these accounts; return what a container of it sees of itself."""
        self.addCleanup(self.daemon.faas, "rm", "f", check=False)
        image = support.docker_archive(
            [support.python_layer(), support.layer({"handler.py": support.HANDLER.read_bytes(), **ACCOUNTS}),
             archives.layer(archives.symlink("links/fd", "/proc/self/fd"),
                            archives.symlink("links/data", "../data/x"))],
            {"Entrypoint": [support.PYTHON, "/handler.py"], **config})
        self.daemon.faas("new", "f", "--warm", "0", *options, stdin=image)
        return self.facts()

    def change(self, *options: str) -> dict:
        self.daemon.set("f", *options)
        return self.facts()

    def facts(self) -> dict:
        return json.loads(get(self.daemon.info("f")["address"], "/facts")[1])

    def shown(self) -> dict[str, str]:
        """What `faas info` says."""
        return dict(re.split(": +", line, maxsplit=1) for line in self.daemon.faas("info", "f").stdout.splitlines())

    def refuse(self, *options: str) -> str:
        query = urllib.parse.urlencode(support.option_query(options), doseq=True)
        status, body = self.daemon.api("PATCH", f"/functions/f?{query}")
        self.assertIn(status, (400, 422), body)
        return json.loads(body)["error"]

    def test_user(self):
        facts = self.deploy("--user", "app")
        self.assertEqual((facts["ids"], facts["env"]["HOME"]), ([1000, 1001, [44]], "/home/app"))
        self.assertEqual(self.shown()["user"], "1000:1001 (app)")
        for user, ids, home in (("app:other", [1000, 45, []], "/home/app"), ("1000", [1000, 1001, [44]], "/home/app"),
                                ("7:8", [7, 8, []], "/"), ("7", [7, 0, []], "/"), ("root", [0, 0, []], "/root"),
                                ("", [0, 0, []], "/root")):
            with self.subTest(user):
                facts = self.change("--user", user)
                self.assertEqual(([*facts["ids"][:2], sorted(set(facts["ids"][2]) - {facts["ids"][1]})],
                                  facts["env"]["HOME"]), (ids, home))
        for user, complaint in (("nobody", "user 'nobody' is not in its /etc/passwd"), ("70000", "too large"),
                                ("app:x", "group 'x' is not in its /etc/group")):
            self.assertIn(complaint, self.refuse("--user", user))
        self.assertEqual(self.shown()["user"], "0:0 (the image's)")

    def test_home_that_the_image_sets_stays(self):
        facts = self.deploy("--user", "app", Env=["HOME=/its/own"])
        self.assertEqual((facts["ids"][0], facts["env"]["HOME"]), (1000, "/its/own"))

    def test_workdir(self):
        facts = self.deploy("--workdir", "/new/dir", "--user", "app")
        self.assertEqual(facts["cwd"], "/new/dir")
        self.assertEqual(self.shown()["workdir"], "/new/dir (/new/dir)")
        self.assertFalse((self.daemon.rootfs("f") / "new").exists())        # which all its containers share
        for text, where in (("/etc", "/etc"), ("/read/only", "/read/only"), ("//etc/../tmp/", "/tmp"),
                            ("/links/data", "/data/x"), ("", "/")):
            with self.subTest(text):
                self.assertEqual(self.change("--workdir", text, "--read-only", "true")["cwd"], where)
        for text, complaint in (("/a-file", "a-file of the image is not a directory"), ("/a-file/x", "not a directory"),
                                ("/proc/self/fd/7", "lies in /proc"), ("/links/fd/7", "CVE-2024-21626"),
                                ("/" + "n" * 300, "too long"), ("/dev/shm", "lies in /dev")):
            self.assertIn(complaint, self.refuse("--workdir", text))
        result = self.daemon.faas("set", "f", "--workdir", "relative", check=False)
        self.assertEqual((result.returncode, result.stdout, len(result.stderr.splitlines())), (2, "", 1))
        self.assertIn("absolute path", result.stderr)

    def test_entrypoint(self):
        facts = self.deploy("--entrypoint", support.PYTHON, "--", "/handler.py", "a", Cmd=["image's"])
        self.assertEqual(facts["argv"], ["/handler.py", "a"])
        self.assertEqual((self.shown()["entrypoint"], self.shown()["command"]),
                         (support.PYTHON, f"{support.PYTHON} /handler.py a"))
        self.assertEqual(self.change("--entrypoint", "", "--", support.PYTHON, "/handler.py")["argv"], ["/handler.py"])
        self.assertEqual(self.change("--entrypoint", "auto", "--", "b")["argv"], ["/handler.py", "b"])
        image = support.handler_image(Cmd=["image's"])
        for options, complaint in ((["--entrypoint", ""], "names no command to run"),
                                   (["--entrypoint", "/bin/none"], "could not make the container|/bin/none")):
            result = self.daemon.faas("new", "other", *options, stdin=image, check=False)
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, complaint)

    def test_they_are_kept_with_their_version(self):
        self.deploy("--user", "app", "--workdir", "/one", "--entrypoint", support.PYTHON, "--", "/handler.py")
        options = {"user": "app", "workdir": "/one", "entrypoint": support.PYTHON}
        self.daemon.faas("new", "f", "--reset", "--warm", "0", "--workdir", "/two",
                         stdin=support.handler_image(label="2"))
        self.daemon.faas("rollback", "f")
        self.daemon.stop(signal.SIGHUP)
        self.daemon.start()
        facts = self.facts()
        self.assertEqual((facts["ids"][0], facts["cwd"], facts["argv"]), (1000, "/one", ["/handler.py"]))
        described = self.daemon.info("f")
        self.assertEqual({name: described["options"][name] for name in options}, options)


# What an ordinary image looks for in its container, printed; then a handler that answers.
EXPECTS = """
import json, os, socket

def read(path):
    with open(path) as file:
        return file.read()

def refusal(action):
    try:
        action()
    except OSError as error:
        return error.strerror
    return "done"

NAMES = "memory.max", "cpu.max", "pids.max", "memory.limit_in_bytes", "cpu.cfs_quota_us", "cgroup.procs"
TREE = list(os.walk("/sys/fs/cgroup"))
FILES = [path for top, _, names in TREE for path in (f"{top}/{name}" for name in names) if os.path.isfile(path)]
ETC = {name: os.stat(f"/etc/{name}") for name in ("hosts", "hostname")}
print("expected", json.dumps({
    "limits": {os.path.basename(path): read(path).strip() for path in FILES if os.path.basename(path) in NAMES},
    "written": [refusal(lambda: open(path, "r+").close()) for path in FILES if os.stat(path).st_mode & 0o222],
    "made": [refusal(lambda: os.mkdir(f"{top}/new")) for top, _, _ in TREE],
    "etc": {name: [status.st_uid, oct(status.st_mode)] for name, status in ETC.items()},
    "directory": [os.stat("/etc").st_uid, oct(os.stat("/etc").st_mode)],
    "hostname": read("/etc/hostname"),
    "resolved": {name: socket.gethostbyname(name) for name in ("localhost", socket.gethostname())},
}), flush=True)
""" + support.HANDLER.read_text()


class Expected(unittest.TestCase):
    """What an ordinary image expects of its container, as it finds it under docker (ANY_IMAGE.md, rule 7)."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)

    def expect(self, *options: str, **files: bytes) -> dict:
        self.addCleanup(self.daemon.faas, "rm", "f", check=False)
        image = support.handler_image(EXPECTS.encode(), files={
            "etc/nsswitch.conf": b"hosts: files\n", **{f"etc/{name}": content for name, content in files.items()}},
            layers=[archives.layer(archives.directory("etc", uid=7, mode=0o2751))])
        self.daemon.faas("new", "f", "--warm", "0", *options, stdin=image)
        return json.loads(support.wait_until(lambda: re.findall("expected ({.*})", self.daemon.function_log("f")),
                                             "the container has said what it finds")[-1])

    def test_its_name(self):
        for options, hostname in (((), "f"), (("--hostname", "h.example", "--read-only", "--user", "7:8"), "h.example"),
                                  (("--net", "host"), "f")):
            with self.subTest(options):
                found = self.expect(*options, hosts=b"192.0.2.1 localhost f h.example\n")
                self.assertEqual((found["hostname"], found["resolved"]),
                                 (f"{hostname}\n", {"localhost": "127.0.0.1", hostname: "127.0.0.1"}))
                self.assertEqual(found["etc"], dict.fromkeys(("hosts", "hostname"), [0, "0o100644"]))
                self.assertEqual(found["directory"], [7, "0o42751"])        # the image's
                self.daemon.faas("rm", "f")

    def test_its_limits(self):
        for net in ("none", "host"):
            with self.subTest(net):
                found = self.expect("--net", net, "--memory", "96m", "--cpus", "0.5", "--pids", "33")
                limits = found["limits"]
                self.assertEqual(limits.get("memory.max", limits.get("memory.limit_in_bytes")), str(96 << 20))
                self.assertEqual(limits.get("cpu.max", limits.get("cpu.cfs_quota_us")).split()[0], "50000")
                self.assertEqual((limits["pids.max"], limits["cgroup.procs"]), ("33", "1"))     # nobody else's
                self.assertEqual({*found["made"]}, {"Read-only file system"})
                self.assertLessEqual({*found["written"]}, {"Read-only file system", "Permission denied"})
                self.daemon.faas("rm", "f")


FILL = """
import os
def fill():
    size = 0
    with open("/fill", "wb", buffering=0) as file:
        while True:
            size += file.write(bytes(1 << 20))
def files():
    number = 0
    os.mkdir("/files")
    while True:
        os.close(os.open(f"/files/{number}", os.O_CREAT | os.O_WRONLY))
        number += 1
"""


class Alone(unittest.TestCase):
    def test_state_directory_with_a_name_that_overlayfs_would_take_apart(self):
        daemon = support.Daemon()
        daemon.state_dir = daemon.directory / "a:b,c\\d\\,e"
        with daemon:
            self.assertEqual(get(daemon.deploy("f"))[0], 200)

    def test_root_that_is_filled_costs_the_container_and_nobody_else(self):
        with support.Daemon() as daemon:
            neighbour = daemon.deploy("neighbour", None, "--warm", "1")
            for what in ("fill", "files"):
                with self.subTest(what):
                    result = daemon.faas("new", "f", "--memory", "32m", stdin=support.handler_image(
                        (FILL + f"\n{what}()\n").encode()), check=False)
                    self.assertEqual(result.returncode, 1)
                    self.assertRegex(result.stderr, "out of memory|No space left on device|exited with status")
                    self.assertEqual(get(neighbour)[0], 200)


if __name__ == "__main__":
    unittest.main()
