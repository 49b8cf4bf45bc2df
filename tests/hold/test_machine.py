"""Odd machines: what faasd asks for at start by trying, what it says is missing, what it does without.

What would disturb this machine is changed in private namespaces of the daemon's.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import unittest
from pathlib import Path

import faasd
import gate
import support
from support import READY_SECONDS, TOP, get, wait_until

RUNTIME = os.environ.get("FAASD_TEST_RUNTIME", "runc")
BUSYBOX = shutil.which("busybox")
CGROUPS = {kind: [mount for mount, other in faasd.read_mounts() if other == kind] for kind in ("cgroup", "cgroup2")}


def in_namespaces(script: str, *unshare: str) -> tuple[str, ...]:
    """Return a wrapper that runs a shell script in private namespaces, and there the daemon."""
    return ("unshare", *(unshare or ("--mount",)), "--", "sh", "-ec", f'{script}; exec "$@"', "sh")


class MachineCase(unittest.TestCase):
    def daemon(self, *arguments: str, **kind) -> support.Daemon:
        """Return a daemon that is not started yet."""
        daemon = support.Daemon(*arguments, **kind)
        self.addCleanup(shutil.rmtree, daemon.directory, ignore_errors=True)
        return daemon

    def started(self, *arguments: str, **kind) -> support.Daemon:
        daemon = support.Daemon(*arguments, **kind).start()
        self.addCleanup(daemon.close)
        return daemon

    def refused(self, daemon: support.Daemon) -> str:
        """Start a daemon that must refuse with one line; return that."""
        done = subprocess.run(daemon.command(), capture_output=True, text=True, check=False, timeout=READY_SECONDS * 2,
                              env={**os.environ, **(daemon.env or {})})
        self.assertEqual(done.returncode, 2, done)
        lines = [line for line in done.stderr.splitlines() if line.startswith("faasd: ")]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(support.remains(daemon) if (daemon.state_dir / "tmp").exists() else [], [])
        return lines[0]

    def script(self, daemon: support.Daemon, text: str) -> Path:
        """Return a runtime that is the real one, after some lines of shell."""
        path = daemon.directory / "runtime"
        path.write_text('#!/bin/sh\nfail() { echo "{\\"level\\": \\"error\\", \\"msg\\": \\"$1\\"}" >"$5"; exit 1; }\n'
                        f'{text}\nexec {shutil.which(RUNTIME)} "$@"\n')
        path.chmod(0o755)
        daemon.arguments += ("--runtime", str(path))
        return path


class Lacking(MachineCase):
    """What is missing and needed is one line at start, with the mend, and exit status 2."""

    def test_mount_without_exec(self):
        daemon = self.daemon()
        daemon.wrapper = in_namespaces(f"mount -t tmpfs -o noexec,mode=755 tmpfs {daemon.directory}")
        self.assertRegex(self.refused(daemon), f"noexec: mount -o remount,exec {daemon.directory}, or choose another")

    def test_user_namespaces(self):
        everybody = ("--map-users=0,0,4294967295", "--map-groups=0,0,4294967295")
        if subprocess.run(["unshare", "--user", *everybody, "true"], capture_output=True, check=False).returncode:
            self.skipTest("unshare(1) makes no user namespace with all ids")
        script = "ip link set lo up; echo 0 >/proc/sys/user/max_user_namespaces"
        daemon = self.daemon(wrapper=in_namespaces(script, "--user", *everybody, "--mount", "--net"))
        self.assertIn("sysctl user.max_user_namespaces=", self.refused(daemon))

    @unittest.skipUnless(CGROUPS["cgroup"], "taking a controller away takes cgroup v1")
    def test_controllers(self):
        for name in ("memory", "pids", "cpu"):
            mount, = (before[4] for before, after in faasd.read_mountinfo()
                      if after[0] == "cgroup" and name in after[2].split(","))
            with self.subTest(name):
                daemon = self.daemon(wrapper=in_namespaces(f"umount {mount}"))
                self.assertIn(f"cgroup_enable={name}", self.refused(daemon))

    @unittest.skipUnless(BUSYBOX, "there is no BusyBox")
    def test_ip_of_busybox(self):
        daemon = self.daemon()
        (daemon.directory / "ip").symlink_to(BUSYBOX)
        daemon.env = {"PATH": f"{daemon.directory}:{os.environ['PATH']}"}
        self.assertRegex(self.refused(daemon), "needs the ip of iproute2.*apt install iproute2")

    @unittest.skipUnless(shutil.which("crun") and CGROUPS["cgroup"] and CGROUPS["cgroup2"],
                         "there is no crun, or not both versions of cgroups")
    def test_both_versions_of_cgroups(self):
        self.assertIn(f"umount {CGROUPS['cgroup2'][0]}", self.refused(self.daemon("--runtime", "crun")))

    def test_runtime(self):
        daemon = self.daemon()
        self.script(daemon, 'case "$*" in *" run "*) fail "no luck today" "$@";; esac')
        self.assertRegex(self.refused(daemon), "runtime cannot start a container on this machine.*no luck today")

    def test_directories_of_others(self):
        for change in (lambda path: path.chmod(0o777), lambda path: path.chmod(0o775),
                       lambda path: os.chown(path, 65534, 0)):
            for name in ("state", "run"):
                daemon = self.daemon()
                (daemon.directory / name).mkdir(mode=0o755)
                change(daemon.directory / name)
                with self.subTest(name):
                    self.assertRegex(self.refused(daemon), f"--{name}-dir .* is open to others than root")


class OldPython(unittest.TestCase):
    def run_with(self, python: str, program: str) -> subprocess.CompletedProcess:
        return subprocess.run([python, TOP / program], capture_output=True, text=True, check=False)

    def test_one_line(self):
        found = [path for path in Path.home().glob(".pyenv/versions/3.*/bin/python") if "/3.1" not in str(path)
                 or "/3.10." in str(path)]
        if not found:
            self.skipTest("there is no Python older than 3.11")
        for python in found:
            version = tuple(map(int, re.search(r"versions/([0-9]+)\.([0-9]+)", str(python)).groups()))
            for program in ("faasd.py", "faas"):
                with self.subTest(program, version=version):
                    done = self.run_with(python, program)
                    if version < (3, 8):        # which cannot read the file: it shows the line that says so
                        self.assertIn("needs_python_3_11_or_newer", done.stderr)
                        self.assertLess(len(done.stderr.splitlines()), 5)
                    else:
                        self.assertEqual(done.returncode, 2)
                        self.assertRegex(done.stderr, r"\A\w+: needs Python 3\.11 or newer.*\n\Z")

    def test_can_read_as_far_as_the_line(self):
        for program in ("faasd.py", "faas"):
            source = (TOP / program).read_text()
            ast.parse(source, feature_version=(3, 8))
            before = ast.parse(source[:source.index("if (needs_python_3_11_or_newer")], feature_version=(3, 6))
            self.assertEqual([type(node) for node in before.body], [ast.Expr, ast.ImportFrom, ast.Import])


class DoneWithout(MachineCase):
    """What is missing and not needed is done without, and said once."""

    def test_runtime_that_joins_no_user_namespace(self):
        daemon = support.Daemon()
        self.script(daemon, 'case "$*" in *" run "*) grep -q \'"user", "path"\' "${4%/*}/config.json" && '
                            'fail "cannot join" "$@";; esac')
        daemon.start()
        self.addCleanup(daemon.close)
        self.assertEqual(len(re.findall("joins no user namespace.*cannot join", daemon.log())), 1)
        self.assertEqual(get(daemon.deploy("f", support.small_image()))[0], 200)

    def test_ptrace_scope(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "yama").mkdir()
        (directory / "yama/ptrace_scope").write_text("3\n")
        # With a mount below /proc the kernel gives containers none of their own, so the warning alone is looked at.
        code = f"import sys; sys.path.insert(0, {str(TOP)!r}); import faasd; " \
               "print(*faasd.machine_warnings(), sep='\\n')"
        command = [*in_namespaces(f"mount --bind {directory} /proc/sys/kernel"), sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        self.assertEqual(len(re.findall("ptrace_scope is 3", out)), 1)

    def test_sockets_of_others_that_cannot_be_had(self):
        """As with ptrace_scope 3, or in a container of another: what serves clients goes on all the same."""
        forbid = """import ctypes, os, struct, sys
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 438), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]      # pidfd_getfd: EPERM
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, program, 0, 0):
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])"""
        daemon = self.started(wrapper=(sys.executable, "-c", forbid))
        address = daemon.deploy("f")
        with socket.create_connection((address, 80), READY_SECONDS) as client:
            client.sendall(b"GET /stream?done:1000 HTTP/1.1\r\n\r\n")
            wait_until(lambda: daemon.info("f")["running"] == 1, "it is handed over")
            daemon.kill()
            daemon.start()
            self.assertEqual(daemon.info("f")["running"], 1)
            daemon.release("f", "done")
            self.assertIn(b"200 OK", client.recv(65536))
        daemon.wait_idle("f")
        self.assertIn("faasd cannot answer containers' system calls on this machine", daemon.log())
        out = daemon.faas("new", "g", "--contract", "server", stdin=support.small_image(), check=False)
        self.assertEqual(out.returncode, 1)
        self.assertIn("so servers and --contract stdio do not work", out.stderr)

    def test_another_supervisor(self):
        """As in a container of LXD: our containers' calls are another's to answer, so only handlers run."""
        keeper = gate.Gate(lambda call: None)
        self.addCleanup(keeper.close)
        daemon = self.started(wrapper=keeper.wrapper)
        self.assertIn("faasd cannot answer containers' system calls on this machine", daemon.log())
        self.assertEqual(get(daemon.deploy("f", support.small_image()))[0], 200)
        self.assertEqual(daemon.info("f")["contract"], "handler")

    def test_runtime_that_has_something_to_say(self):
        daemon = support.Daemon()
        self.script(daemon, "echo a word of warning >&2")
        daemon.start()
        self.addCleanup(daemon.close)
        self.assertEqual(get(daemon.deploy("f", support.small_image()))[0], 200)

    def test_without_stderr(self):
        daemon = support.Daemon(wrapper=("sh", "-c", 'exec "$@" 2>&-', "sh"))
        with open(os.devnull, "wb") as nowhere:
            process = subprocess.Popen(daemon.command(), stderr=nowhere)
        try:
            def answers() -> bool:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):      # its socket, or its listen
                    return daemon.api("GET", "/healthz")[0] == 200
            wait_until(answers, "it is there")
            self.assertRegex((daemon.run_dir / "faasd.lock").read_bytes(), rb"^[0-9]+ *$")        # no line of the log
        finally:
            process.terminate()
            self.assertEqual(process.wait(READY_SECONDS), 0)
            shutil.rmtree(daemon.directory)

    def test_path_without_sbin(self):
        daemon = self.started(env={"PATH": "/nowhere"})
        self.assertEqual(get(daemon.deploy("f", support.small_image()))[0], 200)

    @unittest.skipUnless(Path("/sys/kernel/security").is_dir(), "this kernel has no security modules")
    def test_apparmor_whose_profile_is_not_loaded(self):
        """It names the file of the package where there is one, else ours."""
        for there, named in (("other", "packaging/apparmor-faasd-default"),
                             ("faasd-default", "/etc/apparmor.d/faasd-default")):
            with self.subTest(named):
                wrapper = in_namespaces(f"""
                    mount -t tmpfs tmpfs /sys/kernel/security
                    mkdir /sys/kernel/security/apparmor
                    echo 'faasd-default-2 (enforce)' >/sys/kernel/security/apparmor/profiles
                    mount -t tmpfs tmpfs /mnt
                    mkdir /mnt/changes /mnt/work
                    mount -t overlay -o lowerdir=/etc,upperdir=/mnt/changes,workdir=/mnt/work overlay /etc
                    rm -rf /etc/apparmor.d
                    mkdir /etc/apparmor.d
                    touch /etc/apparmor.d/{there}""")
                with support.Daemon(wrapper=wrapper) as daemon:
                    self.assertIn(f"so containers run without it: apparmor_parser -r {named}", daemon.log())

    def test_umask_and_missing_parents(self):
        daemon = support.Daemon(wrapper=("sh", "-c", 'umask 077; exec "$@"', "sh"))
        daemon.state_dir, daemon.run_dir = daemon.directory / "a/b/state", daemon.directory / "c/d/run"
        daemon.socket = daemon.run_dir / "faasd.sock"
        daemon.start()
        self.addCleanup(daemon.close)
        self.assertEqual(get(daemon.deploy("f", support.small_image()))[0], 200)

    def test_mount_with_a_name_that_is_no_text(self):
        daemon = support.Daemon()
        daemon.wrapper = in_namespaces(f"mkdir {daemon.directory}/$(printf '\\377'); "
                                       f"mount -t tmpfs tmpfs {daemon.directory}/$(printf '\\377')")
        daemon.start()
        self.addCleanup(daemon.close)
        self.assertEqual(get(daemon.deploy("f", support.small_image()))[0], 200)


class Probe(MachineCase):
    def test_one_that_was_killed_is_cleared_away(self):
        daemon = support.Daemon()
        stop = daemon.directory / "stop"
        self.script(daemon, f'case "$*" in *" run "*) [ ! -e {stop} ] || exec sleep 1d;; esac')
        stop.touch()
        with (daemon.directory / "log").open("ab") as log:
            process = subprocess.Popen(daemon.command(), stderr=log)
        wait_until(lambda: list(daemon.run_dir.glob("containers/*/config.json")), "the probe is under way")
        sleeping = wait_until(lambda: re.findall(r"\d+", Path(
            f"/proc/{process.pid}/task/{process.pid}/children").read_text()), "its runtime sleeps")
        process.kill()
        process.wait()
        stop.unlink()
        daemon.start()
        self.addCleanup(daemon.close)
        for pid in map(int, sleeping):          # it has hidden its command line from the daemon
            if Path(f"/proc/{pid}/cmdline").exists():
                os.kill(pid, signal.SIGKILL)
        self.assertEqual(list(daemon.run_dir.glob("containers/*")), [])
        self.assertEqual(support.container_cgroups(daemon), [])


class Told(MachineCase):
    """Who is to blame for a container that does not start: the image's handler, the runtime, or the machine."""

    def deploy(self, daemon: support.Daemon, image: bytes) -> tuple[int, dict]:
        status, body = daemon.api("POST", "/functions/bad?warm=0", image)
        return status, json.loads(body)

    def test_in_a_deploy(self):
        daemon = support.Daemon()
        broken = daemon.directory / "broken"
        self.script(daemon, f'case "$*" in *" run "*) [ ! -e {broken} ] || fail "no luck" "$@";; esac')
        daemon.start()
        self.addCleanup(daemon.close)
        status, answer = self.deploy(daemon, support.small_image(Entrypoint=["/nope"]))
        self.assertEqual(status, 422)
        self.assertIn("does not start: cannot run '/nope': it is not in the image", answer["error"])
        self.assertIn("/nope", "".join(answer["output"]))
        liar = """print STDERR qq({"level": "error", "msg": "runc run failed: x"}\\nrunc run failed: x\\n); exit 1"""
        status, answer = self.deploy(daemon, support.small_image(Entrypoint=["/usr/bin/perl", "-e", liar]))
        self.assertEqual(status, 422)
        self.assertIn("the program exited with status 1", answer["error"])
        broken.touch()
        status, answer = self.deploy(daemon, support.small_image())
        self.assertEqual(status, 500)
        self.assertIn("cannot start a container on this machine", answer["error"])
        broken.unlink()                         # and what has passed costs nothing afterwards
        joined = daemon.directory / "joined"
        self.script(daemon, f"case \"$*\" in *' run '*) grep -q '\"user\", \"path\"' \"${{4%/*}}/config.json\" && "
                            f"touch {joined};; esac")
        self.assertEqual(self.deploy(daemon, support.small_image())[0], 201)
        self.assertTrue(joined.exists(), "it joins no user namespace any more")

    def test_in_an_invocation_and_in_the_log(self):
        daemon = self.started()
        address = daemon.deploy("f", support.small_image())
        (daemon.rootfs("f") / "usr/bin/perl").unlink()
        line = "cannot run '/usr/bin/perl': it is not in the image"
        self.assertEqual(get(address), (502, f"faasd: function f: {line}\n"))

        def said() -> bool:
            text = daemon.function_log("f")
            return re.search(r"\| .*/usr/bin/perl.*o such file", text) and line in text
        wait_until(said, "the function's log has what the runtime said")


class Inherited(MachineCase):
    """Whoever started the daemon may have had limits; containers have their own."""

    BLOCK = ("import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1}); "
             "signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.signal(signal.SIGUSR2, signal.SIG_IGN); "
             "os.execv(sys.argv[1], sys.argv[1:])")

    def test_nothing_of_the_shell(self):
        wrapper = (sys.executable, "-c", self.BLOCK, shutil.which("nice"), "-n", "10", "taskset", "-c", "0", "prlimit",
                   "--fsize=10000000:", "--stack=1000000:", "--cpu=3600:", "--memlock=65536:", "--as=4000000000:",
                   "sh", "-c", 'echo 300 >/proc/self/oom_score_adj; exec "$@"', "sh")
        daemon = self.started(wrapper=wrapper)
        daemon.deploy("f", support.small_image(), "--warm", "1")
        container, = daemon.wait_warm("f", 1)
        state = subprocess.run([RUNTIME, "--root", daemon.run_dir / "runc", "state", container], capture_output=True,
                               check=True).stdout
        pid = json.loads(state)["pid"]
        limits = {line[:25].strip(): line[26:].split()[:2] for line in
                  Path(f"/proc/{pid}/limits").read_text().splitlines()}
        unlimited = ["unlimited"] * 2
        names = ("file size", "cpu time", "address space")
        self.assertEqual([limits[f"Max {name}"] for name in names], [unlimited] * 3)
        self.assertEqual(limits["Max stack size"], ["8388608", "unlimited"])
        locked = min(8 << 20, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1])
        self.assertEqual(limits["Max locked memory"], [str(locked)] * 2)
        status = Path(f"/proc/{pid}/status").read_text()
        inherited = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD))
        for field in ("SigBlk", "SigIgn"):
            self.assertEqual(int(re.search(rf"{field}:\t(\w+)", status)[1], 16) & inherited, 0, field)
        online = Path("/sys/devices/system/cpu/online").read_text()
        self.assertEqual(os.sched_getaffinity(pid), {number for first, last in re.findall(r"(\d+)(?:-(\d+))?", online)
                                                     for number in range(int(first), int(last or first) + 1)})
        self.assertEqual(os.getpriority(os.PRIO_PROCESS, pid), 0)
        self.assertEqual(Path(f"/proc/{pid}/oom_score_adj").read_text(), "300\n")
        # And a SIGTERM ends the daemon, as the end of this test shows.


if __name__ == "__main__":
    unittest.main()
