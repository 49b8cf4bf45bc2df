"""What a user of this machine, a handler or an image can shape decides nothing of what root does at start and stop.

One test for each row of the table in SECURITY.md. The user is 65534, who may do nothing in particular.
"""

import contextlib
import ctypes
import fcntl
import ipaddress
import json
import os
import platform
import shutil
import select
import socket
import stat
import struct
import subprocess
import sys
import threading
import types
import unittest
import unittest.mock
from pathlib import Path

import support
from support import get, wait_until
from test_restart import RestartCase

import faasd

# Does what is put into it for one command, and answers with its label else.
HANDLER = """
import os, socket, time
control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
if not descriptors:
    raise SystemExit
client = socket.socket(fileno=descriptors[0])
command, _, key = client.recv(65536).split()[1].decode().partition("?")
HEAD = b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n"
if command == "COMMAND":
    BODY
else:
    client.sendall(HEAD + os.environ["LABEL"].encode())
client.shutdown(socket.SHUT_WR)
"""
NOBODY = 65534
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
PYTHON = "/usr/bin/python3"     # which everybody may run
# A program that takes any arguments and does nothing: pause(2), or ppoll(2), for ever.
CODE = {"x86_64": (62, b"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"),
        "aarch64": (183, struct.pack("<7I", 0xD2800928, 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD4000001,
                                     0x17FFFFFB))}
UFFD_USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(platform.machine(), 0)
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
PAGE = os.sysconf("SC_PAGE_SIZE")


def sleeper() -> bytes:
    """Return an ELF program (elf(5)) of CODE."""
    machine, code = CODE[platform.machine()]
    size = 120 + len(code)
    return struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0) + \
        struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, PAGE) + code


def far_path(target: Path) -> str:
    """Return a path that leads to target from wherever it is joined to."""
    return "../" * 12 + str(target).lstrip("/")


class LocalUserCase(RestartCase):
    def scratch(self) -> Path:
        """A directory of the user's own."""
        directory = support.temporary_directory()
        directory.chmod(0o755)
        self.addCleanup(shutil.rmtree, directory)
        return directory

    def as_nobody(self, *argv: str | Path, **more) -> subprocess.Popen:
        process = subprocess.Popen([*AS_NOBODY, *argv], stdin=subprocess.DEVNULL, **more)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def run_as_nobody(self, source: str) -> subprocess.Popen:
        """Run Python that writes a line when it has done what it wants, and then stays."""
        process = self.as_nobody(PYTHON, "-c", f"import fcntl, os, socket, time\n{source}\nprint(flush=True)\n"
                                 "time.sleep(1e6)", stdout=subprocess.PIPE)
        with process.stdout:
            self.assertEqual(process.stdout.readline(), b"\n")
        return process

    def refused(self, daemon: support.Daemon) -> subprocess.CompletedProcess:
        """Start a daemon that should refuse to; return how it ended."""
        return subprocess.run(daemon.command(), capture_output=True, text=True, check=False,
                              timeout=support.READY_SECONDS)

    def check_stops(self, daemon: support.Daemon) -> None:
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual([line for line in support.remains(daemon) if "x --root" not in line], [])
        self.assertNotIn("Traceback", daemon.log())


class Forgers(LocalUserCase):
    """Processes that pose as `runc --root OURS run` at the next start."""

    def trap(self, directory: Path, output: str) -> None:
        """Make what a daemon might look at of a container: of a plain file, a pipe or a link as its output."""
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(
            '{"process": {"env": ["FAAS_FUNCTION=f", "FAAS_VERSION=000000000000"]}}' if output != "link" else "[]")
        (directory / "cgroup.procs").write_text("\n".join(map(str, range(5000, 0, -1))))
        os.symlink("1 1 f 000000000000", directory / "note")
        (directory / "control.sock").touch()
        if output == "pipe":
            os.mkfifo(directory / "output", 0o666)
        elif output == "link":
            os.symlink("/dev/zero", directory / "output")
        else:
            (directory / "output").touch()

    def pose(self, daemon: support.Daemon, container: str) -> subprocess.Popen:
        """Have a user run a program with a runtime's command line."""
        program = self.scratch() / "x"
        program.write_bytes(sleeper())
        program.chmod(0o755)
        return self.as_nobody(PYTHON, "-c", "import os, sys; os.execv(sys.argv[1], ['x', *sys.argv[2:]])", program,
                              "--root", daemon.run_dir / "runc", "run", container)

    def check_user(self, output: str, end) -> None:
        daemon = self.start()
        address = self.deploy(daemon)
        client = self.client(address, "/work?go")
        client.read_number()
        trap = self.scratch() / "trap"
        self.trap(trap, output)
        names = sorted(os.listdir(trap))
        forgers = [self.pose(daemon, name) for name in (far_path(trap), str(trap), "0123456789ab", "", ".")]
        end(daemon)
        daemon.start()
        self.assertEqual(daemon.info("f")["running"], 1, "the one that serves a client")
        self.assertEqual(get(address)[0], 200)
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.check_nothing_left(daemon)
        self.assertEqual([forger.poll() for forger in forgers], [None] * 5, "they are nobody's business")
        self.assertEqual(sorted(os.listdir(trap)), names)
        self.check_stops(daemon)

    def test_user_with_a_plain_file_after_a_crash(self):
        self.check_user("file", support.Daemon.kill)

    def test_user_with_a_pipe_after_a_restart(self):
        self.check_user("pipe", self.leave)

    def test_user_with_links_after_a_crash(self):
        self.check_user("link", support.Daemon.kill)

    def test_user_whose_directory_becomes_a_link_to_root_s(self):
        daemon = self.start()
        self.deploy(daemon)
        daemon.kill()
        trap, secret = self.scratch() / "trap", self.scratch()
        self.trap(trap, "pipe")
        self.trap(secret, "pipe")
        names = sorted(os.listdir(secret))
        forger = self.pose(daemon, far_path(trap))
        daemon.start()
        shutil.rmtree(trap)
        trap.symlink_to(secret)
        forger.kill()
        self.check_stops(daemon)
        self.assertEqual(sorted(os.listdir(secret)), names)

    def check_handler(self, end) -> None:
        source = HANDLER.replace("COMMAND", "/forge").replace("BODY", """run, trap = key.split(":")
    os.set_inheritable(client.fileno(), True)
    if os.fork() == 0:
        os.execv("/x", ["x", "--root", run, "run", trap])
    client.sendall(HEAD + b"0\\n")
    while not os.path.exists("/go"):
        time.sleep(0.02)
    client.sendall(b"done\\n")""")
        trap = self.scratch()
        self.trap(trap, "file")
        evil = {f"evil/{name}": (trap / name).read_bytes() for name in ("config.json", "output", "cgroup.procs")}
        image = support.docker_archive(
            [support.python_layer(), support.layer({"handler.py": source, "x": sleeper(), **evil})],
            {"Entrypoint": [support.PYTHON, "/handler.py"], "Env": ["LABEL=1"]})
        daemon = self.start()
        address = daemon.deploy("f", image)
        other = daemon.deploy("good", support.small_image())
        client = self.client(address, f"/forge?{daemon.run_dir}/runc:{far_path(daemon.rootfs('f') / 'evil')}")
        self.assertEqual(client.read_line() and "200", "200")
        wait_until(lambda: support.processes(f"x --root {daemon.run_dir}"), "it poses")
        end(daemon)
        daemon.start()
        self.assertEqual((daemon.info("f")["running"], daemon.info("good")["running"]), (1, 0))
        self.assertEqual((get(address)[0], get(other)[0]), (200, 200))
        self.assertEqual(sorted(os.listdir(daemon.rootfs("f") / "evil")), ["cgroup.procs", "config.json", "output"])
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        self.check_nothing_left(daemon)
        self.check_stops(daemon)

    def test_handler_after_a_restart(self):
        self.check_handler(self.leave)

    def test_handler_after_a_crash(self):
        self.check_handler(support.Daemon.kill)


class Notes(LocalUserCase):
    """Only what a daemon has noted makes a survivor; everything else of ours is found and ended."""

    def cut(self, change) -> support.Daemon:
        """Kill a daemon while a client is served, change its container's directory, and start another."""
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?never")
        client.read_number()
        container = daemon.container()
        daemon.kill()
        change(container)
        daemon.start()
        self.check_nothing_left(daemon)
        self.assertEqual([line for line in support.processes(daemon.directory.name) if " run " in line], [])
        self.assertEqual(get(daemon.info("f")["address"]), (200, "1"))
        return daemon

    def test_runtime_that_was_not_noted_is_ended(self):
        def change(container: Path) -> None:
            (container / "note").unlink()
            self.assertFalse((container / "config.json").exists(), "nothing could be started from it again")
        self.cut(change)

    def test_output_that_is_no_pipe(self):
        def change(container: Path) -> None:
            (container / "output").unlink()
            (container / "output").touch()
        self.cut(change)

    def check_bystander(self, process: subprocess.Popen, pid: int, started: str = "") -> None:
        """A process of that pid, which a note has, and the time when it started if that is given, is no runtime."""
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)

        def change(container: Path) -> None:
            _, before, *words = os.readlink(container / "note").split()
            (container / "note").unlink()
            os.symlink(" ".join([str(pid), started or before, *words]), container / "note")
        self.cut(change)
        self.assertIsNone(process.poll())

    def test_pid_that_became_another_s(self):
        bystander = subprocess.Popen(["sleep", "1000"])
        self.check_bystander(bystander, bystander.pid)

    def test_process_of_a_user(self):
        user = self.run_as_nobody("")
        self.check_bystander(user, user.pid, faasd.start_time(user.pid))

    def test_process_of_root_in_another_pid_namespace(self):
        unshare = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "1000"])
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        child = int(wait_until(lambda: children.read_text().strip(), "it has a child"))
        self.check_bystander(unshare, child, faasd.start_time(child))

    def test_directory_that_is_a_link(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?never")
        client.read_number()
        container = daemon.container()
        daemon.kill()
        elsewhere = self.scratch() / "moved"
        shutil.copytree(container, elsewhere, symlinks=True, ignore=lambda *_: ["control.sock", "output"])
        os.mkfifo(elsewhere / "output")
        shutil.rmtree(container)
        container.symlink_to(elsewhere)
        names = sorted(os.listdir(elsewhere))
        self.assertIn("note", names)
        daemon.start()
        daemon.wait_idle("f")
        self.assertEqual(sorted(os.listdir(elsewhere)), names)
        container.unlink()

    def test_runtime_that_was_upgraded_goes_on(self):
        directory = self.scratch()
        shutil.copy(shutil.which("runc"), directory / "runc")
        daemon = self.start("--runtime", str(directory / "runc"))
        client = self.client(self.deploy(daemon), "/work?go")
        client.read_number()
        self.leave(daemon)
        shutil.copy(directory / "runc", directory / "new")
        (directory / "new").rename(directory / "runc")
        daemon.start()
        self.assertEqual(daemon.info("f")["running"], 1)
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))

    def test_directory_that_cannot_be_removed_holds_nobody_up(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?go")
        client.read_number()
        container = daemon.container()
        (container / "left").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "left", container / "left"], check=True)
        try:
            self.release(daemon, "go")
            self.assertTrue(client.rest().endswith("done\n"))
            daemon.wait_idle("f")
            daemon.wait_log(f"cannot remove {container}: Directory not empty")
        finally:
            subprocess.run(["umount", container / "left"], check=True)
        self.check_stops(daemon)


FUSE_ROOT = f"rootmode=40000,user_id={NOBODY},group_id={NOBODY},allow_other"
# As in linux/fuse.h.
FUSE_HEAD, FUSE_INIT = struct.Struct("<IIQ"), struct.pack("<IIIIHHII32x", 7, 31, 0, 0, 0, 0, 64 << 10, 0)


class VolumeThatHangs(LocalUserCase):
    """The owner of a volume's directory mounts a file system over it that never answers, as FUSE lets them."""

    def hang(self, directory: Path) -> int:
        """Return a descriptor, at whose end the file system goes."""
        try:
            device = os.open("/dev/fuse", os.O_RDWR)
        except OSError as error:
            self.skipTest(f"no FUSE: {error.strerror}")
        options = f"fd={device},{FUSE_ROOT}".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        self.assertEqual(libc.mount(b"test", os.fsencode(directory), b"fuse", 0, options), 0, ctypes.get_errno())
        self.addCleanup(subprocess.run, ["umount", "-l", directory], check=True)
        self.addCleanup(os.close, device)               # first: then all calls that wait end with an error
        _, _, unique = FUSE_HEAD.unpack_from(os.read(device, 64 << 10))
        os.write(device, struct.pack("<IiQ", 16 + len(FUSE_INIT), 0, unique) + FUSE_INIT)
        return device

    def test_nobody_else_waits_and_a_stop_leaves_nothing(self):
        directory = self.scratch() / "data"
        directory.mkdir()
        os.chown(directory, NOBODY, NOBODY)
        daemon = support.Daemon("--drain-timeout", "0s").start()
        self.addCleanup(daemon.close)
        self.deploy(daemon, "--volume", f"{directory}:/data")
        other = daemon.deploy("g", support.small_image("2"))
        self.hang(directory)
        daemon.kill()
        daemon.start()
        self.client(daemon.info("f")["address"], "/")
        wait_until(lambda: daemon.info("f")["starting"] == 1, "a container is being started")
        self.assertEqual(get(other), (200, "2"))
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(support.remains(daemon), [])


class Waits(LocalUserCase):
    """What others can make last for ever, root does not wait for. userfaultfd(2) stands for FUSE, or a slow disk."""

    def setUp(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.uffd = self.libc.syscall(UFFD_USERFAULTFD, os.O_CLOEXEC) if UFFD_USERFAULTFD else -1
        if self.uffd < 0:
            self.skipTest("userfaultfd(2) is not there")

    def test_memory_of_a_command_line(self):
        """It may never come; so that of a user's process is not read at all."""
        user = self.run_as_nobody("")
        with unittest.mock.patch.object(Path, "read_bytes", side_effect=AssertionError("it was read")):
            self.assertFalse(faasd.Leftovers(None)._is_our_runtime(user.pid))

    def test_lock_of_a_client_s_socket(self):
        """A thread that sends from memory that does not come holds it."""
        daemon = self.start()
        address = self.deploy(daemon)
        client = self.client(address, "/silent?go")
        self.handed_over(daemon, 1)
        held = wait_until(lambda: support.client_socket(daemon, client.socket), "the handler has taken it")
        self.leave(daemon)
        fcntl.ioctl(self.uffd, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
        self.libc.mmap.restype = ctypes.c_void_p
        memory = self.libc.mmap(None, ctypes.c_size_t(PAGE), 3, 0x22, -1, ctypes.c_long(0))
        fcntl.ioctl(self.uffd, UFFDIO_REGISTER, struct.pack("QQQQ", memory, PAGE, 1, 0))
        sender = threading.Thread(target=lambda: self.libc.send(held, ctypes.c_void_p(memory), PAGE, 0))
        sender.start()
        try:
            wait_until(lambda: "userfault" in " ".join(support.waits()), "it holds the lock")
            daemon.start()
            self.assertEqual(daemon.info("f")["running"], 1)
            self.assertEqual(get(address)[0], 200)
        finally:
            os.close(self.uffd)
            sender.join()
            os.close(held)
        self.release(daemon, "go")
        self.check_nothing_left(daemon)

    def test_poll_of_a_client_s_socket(self):
        """Who closes a file last waits for each epoll that it is in, and that waits for memory for its events."""
        daemon = self.start()
        other = daemon.deploy("other", support.small_image())
        address = self.deploy(daemon)
        client = self.client(address, "/silent?go")
        self.handed_over(daemon, 1)
        held = wait_until(lambda: support.client_socket(daemon, client.socket), "the handler has taken it")
        with select.epoll() as poll:
            poll.register(held, select.EPOLLOUT)
            os.close(held)
            memory = self.missing_page()
            polling = threading.Thread(target=self.libc.epoll_wait,
                                       args=(poll.fileno(), ctypes.c_void_p(memory), 1, -1))
            polling.start()
            try:
                self.wait_for_fault()
                self.release(daemon, "go")
                self.assertIn(b"502", client.socket.recv(65536))
                client.socket.close()
                self.assertEqual(get(other), (200, "1"))
            finally:
                os.close(self.uffd)
                polling.join()
        self.check_nothing_left(daemon)

    def test_polls_in_polls(self):
        """One process at a time, of all, may put an epoll into another; it waits for who waits for memory in that."""
        daemon = self.start()
        address = self.deploy(daemon, "--concurrency", "1", "--queue-timeout", "60s")
        busy = self.client(address, "/silent?go")
        self.handed_over(daemon, 1)
        with select.epoll() as outer, select.epoll() as inner, \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as writable:
            inner.register(writable, select.EPOLLOUT)
            memory = self.missing_page()
            polling = threading.Thread(target=self.libc.epoll_wait,
                                       args=(inner.fileno(), ctypes.c_void_p(memory), 1, -1))
            polling.start()
            self.wait_for_fault()
            event = struct.pack("=IQ", select.EPOLLIN, 0) if platform.machine() == "x86_64" else bytes(16)
            nesting = threading.Thread(target=self.libc.epoll_ctl, args=(outer.fileno(), 1, inner.fileno(), event))
            nesting.start()
            try:
                wait_until(lambda: "ep_loop_check_proc" in self.waits() or "do_epoll_ctl" in self.waits(), "it waits")
                self.client(address, "/")               # waits, and is watched
                self.assertEqual(wait_until(lambda: daemon.info("f")["queued"], "it is in the queue"), 1)
                self.assertEqual(daemon.info("f")["running"], 1)
            finally:
                os.close(self.uffd)
                polling.join()
                nesting.join()
        self.release(daemon, "go")
        busy.socket.close()

    @staticmethod
    def waits() -> str:
        return " ".join(support.waits())

    def missing_page(self) -> int:
        """Return the address of memory of ours that never comes, until uffd is closed."""
        fcntl.ioctl(self.uffd, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
        self.libc.mmap.restype = ctypes.c_void_p
        memory = self.libc.mmap(None, ctypes.c_size_t(PAGE), 3, 0x22, -1, ctypes.c_long(0))
        fcntl.ioctl(self.uffd, UFFDIO_REGISTER, struct.pack("QQQQ", memory, PAGE, 1, 0))
        return memory

    @staticmethod
    def wait_for_fault() -> None:
        wait_until(lambda: "userfault" in Waits.waits(), "it holds the lock")


class Lists(LocalUserCase):
    """The kernel's lists of what everybody has, which a user can make so long that nobody reads them to the end."""

    def test_locks_and_groups(self):
        """A pipe that nobody writes to stands for 200,000 locks, and for 65,536 groups of each of 1,500 processes."""
        pipe = self.scratch() / "pipe"
        os.mkfifo(pipe)
        process = subprocess.Popen(["unshare", "--user", "sleep", "1000"])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        namespace = os.readlink("/proc/self/ns/user")
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/user") != namespace, "it has a namespace")
        whole = self.scratch()                  # without one, the kernel would give containers no /proc
        hide = f"mount -t proc proc {whole} && mount --bind {pipe} /proc/locks && " \
               f'mount --bind {pipe} /proc/{process.pid}/status && exec "$@"'
        daemon = self.start(wrapper=("unshare", "--mount", "sh", "-c", hide, "sh"))
        address = self.deploy(daemon)
        daemon.kill()
        daemon.start()
        self.assertEqual(get(address), (200, "1"))
        second = support.Daemon(directory=daemon.directory, wrapper=daemon.wrapper)
        self.assertIn("faasd is already running on", self.refused(second).stderr)
        self.check_stops(daemon)


class Names(LocalUserCase):
    TOO_MANY = "there are too many Unix sockets to look at, or to ask whether another faasd listens"

    def test_abstract_sockets_of_a_user(self):
        names = [b"faasd/0.0.0.0/0", b"faasd/10.0.0.0/24", b"faasd/9", b"faasd/1.2.3", b"faasd/\xff\xfe",
                 b"faasd/\n@faasd/9", b"faasd/10.0.0.0/24/0123456789abcdef", b"faasd/0.0.0.0/0/0123456789abcdef",
                 b"faasd/./0123456789abcdef"]
        self.run_as_nobody(f"""
sockets = [socket.socket(socket.AF_UNIX) for _ in range({len(names)})]
for s, name in zip(sockets, {names}):
    s.bind(b"\\0" + name)
    s.listen()
""")
        daemon = self.start()
        self.assertEqual(daemon.api("GET", "/healthz")[0], 200)

    def test_listener_of_a_user_that_sends_what_cannot_be_closed(self):
        """A socket that lingers, whose peer takes nothing, keeps the last to close it waiting: that would be us."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(b"\0faasd/10.0.0.0/24/0123456789abcdef")
            listener.listen()

            def send(credentials: bytes) -> tuple[int, int, int]:
                with listener.accept()[0] as theirs, self.assertRaises(BrokenPipeError):
                    socket.send_fds(theirs, [b"x"], [0])
                return 0, NOBODY, NOBODY
            with unittest.mock.patch.object(faasd, "UCRED", types.SimpleNamespace(
                    size=faasd.UCRED.size, unpack=unittest.mock.Mock(side_effect=send))) as ucred:
                self.assertFalse(faasd.is_roots_listener(listener.getsockname()))
            ucred.unpack.assert_called_once()

    def test_more_abstract_sockets_than_can_be_asked(self):
        self.run_as_nobody("""
sockets = [socket.socket(socket.AF_UNIX) for _ in range(20)]
for n, s in enumerate(sockets):
    s.bind(b"\\0faasd/10.0.0.0/24/%016x" % n)
    s.listen()
""")
        daemon = support.Daemon(constants={"MAX_CLAIMS": 10}).start()
        self.addCleanup(daemon.close)
        self.assertIn(self.TOO_MANY, daemon.log())

    def test_sockets_that_take_long_to_look_through(self):
        """The kernel walks a list of sockets with one hash anew for each page: with 60,000 it takes seconds."""
        addresses = faasd.Addresses(ipaddress.ip_network("10.0.0.0/24"))
        with unittest.mock.patch.object(faasd, "CLAIM_SECONDS", 0), self.assertLogs("faasd", "WARNING") as logged:
            addresses.claim()
        addresses._claim.close()
        self.assertIn(self.TOO_MANY, logged.output[0])

    def test_connections_of_others(self):
        """What anybody can leave in /proc/net/tcp by the hundred thousand is passed over."""
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.2", 0)) as other:
            for listener in (server, other):
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()            # which leaves a TIME_WAIT
            with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted, \
                    socket.create_connection(other.getsockname(), source_address=("127.0.0.3", 0)), other.accept()[0]:
                expected = {os.fstat(end.fileno()).st_ino: ("127.0.0.1", "{}:{}".format(*end.getpeername()))
                            for end in (client, accepted)}
                self.assertEqual(faasd.read_connections(["127.0.0.1"]), expected)
                self.assertEqual(len(faasd.read_connections(["127.0.0.1", "127.0.0.2"])), 3)
                self.assertEqual(faasd.read_connections([]), {})

    @staticmethod
    def claim() -> str:
        """Return the name of the abstract socket of the daemon that runs."""
        lines = Path("/proc/net/unix").read_text().splitlines()
        return next(line.split()[-1][1:] for line in lines if "@faasd/" in line)

    def test_another_daemon_is_still_told(self):
        """However many ask, the one who listens goes on telling."""
        daemon = self.start()
        name = self.claim()
        for _ in range(200):                    # its queue has 128
            with socket.socket(socket.AF_UNIX) as probe:
                wait_until(lambda probe=probe: probe.connect_ex(f"\0{name}") == 0, "it is answered")
        other = support.Daemon()
        self.addCleanup(shutil.rmtree, other.directory)
        result = self.refused(other)
        self.assertEqual((result.returncode, daemon.api("GET", "/healthz")[0]), (2, 200))
        self.assertIn("another faasd uses 10.0.0.0/24", result.stderr)

    def test_who_asks_without_end_is_answered_slowly(self):
        """And one after the other: what closing may have to wait for takes one thread, not all."""
        daemon = support.Daemon(constants={"CLAIM_PAUSE": 3600}).start()
        self.addCleanup(daemon.close)
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
            for probe in probes:
                probe.connect(f"\0{self.claim()}")
            self.assertEqual(probes[0].recv(1), b"")
            self.assertEqual(daemon.api("GET", "/healthz")[0], 200)
            self.assertEqual(select.select(probes[1:], (), (), 0.2), ([], [], []))

    def test_mounts_of_a_user(self):
        """With FUSE a user mounts on any directory of their own. Here it is a tmpfs of root's, in its own namespace.
        """
        names = [b"\xff", b"a\x0cb", "line\u2028end\u00a0x".encode(), b"back\\040slash", b"new\nline - cgroup x"]
        mount = ("import os, subprocess, sys\n"
                 f"for path in [os.path.join({os.fsencode(self.scratch())!r}, name) for name in {names!r}]:\n"
                 "    os.mkdir(path)\n"
                 "    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', path], check=True)\n"
                 "os.execv(sys.argv[1], sys.argv[1:])\n")
        daemon = self.start(wrapper=("unshare", "--mount", sys.executable, "-c", mount))
        self.assertEqual(daemon.api("GET", "/healthz")[0], 200)
        self.assertEqual(daemon.stop(), 0)

    def test_name_of_a_handler_s_process(self):
        daemon = self.start()
        rename = 'open("/proc/self/comm", "wb").write(b"\\xff\\xfe\\nUid:\\t0")\n'
        daemon.deploy("f", support.handler_image(rename + support.HANDLER.read_text()), "--warm", "1")
        daemon.wait_warm("f", 1)
        report = json.loads(daemon.api("GET", "/functions/f/isolation")[1])
        self.assertNotIn(0, report["host_ids"])


class Files(LocalUserCase):
    def test_locks_are_root_s_whatever_the_umask(self):
        daemon = self.start(wrapper=("sh", "-c", 'umask 000 && exec "$@"', "sh"))
        for directory in (daemon.run_dir, daemon.state_dir):
            self.assertEqual(stat.S_IMODE((directory / "faasd.lock").stat().st_mode), 0o600)
            with self.assertRaises(PermissionError):
                self.check_can_open(directory / "faasd.lock")

    @staticmethod
    def check_can_open(path: Path) -> None:
        if subprocess.run([*AS_NOBODY, "cat", path], capture_output=True, check=False).returncode:
            raise PermissionError(path)

    def test_lock_of_a_faasd_before_this_one_that_runs(self):
        for name in ("run", "state"):
            daemon = support.Daemon()
            self.addCleanup(shutil.rmtree, daemon.directory, ignore_errors=True)
            (daemon.directory / name).mkdir(mode=0o711)
            with self.subTest(name), open(daemon.directory / name / "faasd.lock", "w") as lock:
                os.chmod(lock.name, 0o644)
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.assertIn("faasd is already running on", self.refused(daemon).stderr)

    def test_lock_that_a_user_has_open(self):
        """Of a faasd before this one: to take its mode away would not take away the lock."""
        daemon = self.start()
        daemon.stop()
        daemon.directory.chmod(0o755)
        locks = [directory / "faasd.lock" for directory in (daemon.run_dir, daemon.state_dir)]
        for path in locks:
            path.chmod(0o644)
        self.run_as_nobody(f"files = [open(path) for path in {list(map(str, locks))}]\n"
                           "for file in files: fcntl.flock(file, fcntl.LOCK_SH)")
        daemon.start()
        for path in locks:
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)

    def test_directories_of_others_are_refused(self):
        for mode, owner in ((0o777, 0), (0o775, 0), (0o755, 65534)):
            for option in ("--run-dir", "--state-dir"):
                with self.subTest(option, mode=oct(mode), owner=owner):
                    daemon = support.Daemon(directory=self.scratch())
                    directory = {"--run-dir": daemon.run_dir, "--state-dir": daemon.state_dir}[option]
                    directory.mkdir()
                    directory.chmod(mode)
                    os.chown(directory, owner, 0)
                    result = self.refused(daemon)
                    self.assertEqual(result.returncode, 2, result.stderr)
                    self.assertRegex(result.stderr, rf"\Afaasd: {option} \S+ is open to others than root.*\n\Z")

    def check_refused(self, daemon: support.Daemon, message: str) -> None:
        """Check that it does not start, says so in one line, and has touched nothing."""
        def everything() -> list:
            return [(path, path.lstat().st_mode, path.lstat().st_uid) for path in sorted(daemon.directory.rglob("*"))
                    if path != daemon.run_dir]
        before = everything()
        result = self.refused(daemon)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(result.stderr, message + r".*\n\Z")
        self.assertEqual(everything(), before)

    def test_links_in_a_directory_of_another_s(self):
        """To be refused is not enough: they lead to root's own directories, which would get other modes."""
        daemon = support.Daemon(directory=self.scratch())
        target = daemon.directory / "root-s"
        daemon.state_dir.mkdir()
        os.chown(daemon.state_dir, 65534, 65534)
        target.mkdir(mode=0o755)
        for name in ("images", "logs", "tmp"):
            (daemon.state_dir / name).symlink_to(target)
        self.check_refused(daemon, r"\Afaasd: --state-dir \S+ is open to others than root")

    def test_link_of_another_s_to_a_directory_of_root_s(self):
        for option in ("--state-dir", "--run-dir"):
            daemon = support.Daemon(directory=self.scratch())
            target, link = daemon.directory / "root-s", daemon.directory / "link"
            (target / "tmp").mkdir(parents=True)
            (target / "tmp/precious").touch()
            link.symlink_to(target)
            os.lchown(link, 65534, 65534)
            daemon.arguments = (option, str(link))
            with self.subTest(option):
                self.check_refused(daemon, rf"\Afaasd: argument {option}: {link} is a link that leads nowhere"
                                           ", or another user's")

    def test_links_of_root_s_lead_where_they_say(self):
        directory = self.scratch().resolve()
        (directory / "a/b").mkdir(parents=True)
        (directory / "relative").symlink_to("a/b/../b")
        (directory / "absolute").symlink_to(directory / "relative")
        (directory / "round").symlink_to("round")
        self.assertEqual(faasd.resolved_path(f"{directory}/absolute/./x/../y"), directory / "a/b/y")
        self.assertEqual(faasd.resolved_path(f"{directory}/absolute/../x"), directory / "a/x")
        self.assertEqual(faasd.resolved_path("x"), Path.cwd() / "x")
        with self.assertRaises(faasd.BadRequest):
            faasd.resolved_path(f"{directory}/round/x")

    def test_state_directory_that_is_something_else_s(self):
        """Its tmp would be emptied: /var has one."""
        daemon = support.Daemon(directory=self.scratch())
        (daemon.state_dir / "tmp").mkdir(parents=True)
        (daemon.state_dir / "tmp/precious").touch()
        self.check_refused(daemon, r"\Afaasd: --state-dir \S+ has a directory tmp already, and not from faasd")

    def test_parent_of_another_s_is_refused(self):
        daemon = support.Daemon(directory=self.scratch())
        os.chown(daemon.directory, 65534, 0)
        result = self.refused(daemon)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn(f"{daemon.directory} belongs to another user (uid 65534), who can rename what is in it",
                      result.stderr)
        daemon.env = {"SUDO_UID": "65534"}              # it is that user who starts us
        self.assertEqual(daemon.start().stop(), 0)

    def test_token_of_another_s_is_refused(self):
        daemon = support.Daemon(directory=self.scratch())
        token = daemon.directory / "token"
        token.write_text("0123456789abcdef")
        token.chmod(0o600)
        os.chown(token, 65534, 0)
        daemon.arguments = ("--api", "127.0.0.1:8000", "--api-token-file", str(token))
        result = self.refused(daemon)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn(f"--api-token-file {token} is open to others: chown root {token}\n", result.stderr)

    def test_parent_in_which_others_may_write_is_refused(self):
        directory = self.scratch()
        daemon = support.Daemon(directory=directory)
        entries = ((faasd.ACL_USER_OBJ, 7, faasd.ACL_NO_ID), (faasd.ACL_USER, 7, 65534),
                   (faasd.ACL_GROUP_OBJ, 5, faasd.ACL_NO_ID), (faasd.ACL_MASK, 7, faasd.ACL_NO_ID),
                   (faasd.ACL_OTHER, 5, faasd.ACL_NO_ID))
        access = struct.pack("<I", faasd.ACL_VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
        for mode, group, change in ((0o777, 0, None), (0o775, 65534, None), (0o755, 0, access)):
            directory.chmod(mode)
            os.chown(directory, 0, group)
            if change:
                os.setxattr(directory, faasd.ACL_XATTRS[0], change)
            result = self.refused(daemon)
            self.assertEqual(result.returncode, 2, result.stderr)
            self.assertIn(f"not only root can rename what is in {directory}: chmod go-w {directory}", result.stderr)
        os.removexattr(directory, faasd.ACL_XATTRS[0])
        os.chown(directory, 0, 65534)
        daemon.env = {"SUDO_GID": "65534"}              # the own group of the user who starts us
        self.assertEqual(daemon.start().stop(), 0)

    def test_image_json_with_what_it_should_not_have_breaks_its_function_alone(self):
        daemon = self.start()
        self.deploy(daemon)
        good = daemon.deploy("good", support.small_image())
        daemon.stop()
        path, = (daemon.state_dir / "images/f").glob("*/image.json")
        image = json.loads(path.read_text())
        image["process"]["env"] = [{"what": 0}]
        path.write_text(json.dumps(image))
        daemon.start()
        self.assertEqual(daemon.info("f")["state"], "broken")
        self.assertEqual(get(good)[0], 200)


class Cgroups(LocalUserCase):
    def check_go_on(self, daemon: support.Daemon, client, start_other) -> None:
        client.read_number()
        with start_other() as other:
            client.read_number()
            self.assertEqual(daemon.info("f")["running"], 1)
            self.assertIsNone(other.poll())
        self.release(daemon, "go")
        self.assertTrue(client.rest().endswith("done\n"))
        daemon.wait_idle("f")
        self.assertEqual(daemon.outcomes("f"), {"answered": 1})

    @contextlib.contextmanager
    def other(self, command: list, directory: Path):
        with (directory / "other").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        try:
            wait_until(lambda: "ready: " in (directory / "other").read_text() or process.poll(), "it is ready")
            yield process
        finally:
            process.terminate()
            self.assertEqual(process.wait(support.READY_SECONDS), 0, (directory / "other").read_text())

    def test_directories_whose_names_look_alike(self):
        daemon = support.Daemon()
        daemon.run_dir = daemon.directory / "a/b"
        daemon.socket = daemon.run_dir / "faasd.sock"
        daemon.start()
        self.addCleanup(daemon.close)
        client = self.client(self.deploy(daemon), "/work?go")
        second = support.Daemon("--subnet", "10.1.0.0/24", directory=daemon.directory)
        second.run_dir, second.state_dir = daemon.directory / "a-b", daemon.directory / "state-2"
        self.check_go_on(daemon, client, lambda: self.other(second.command(), daemon.directory))

    def test_one_path_in_two_mount_namespaces(self):
        daemon = self.start()
        client = self.client(self.deploy(daemon), "/work?go")
        hide = ("unshare", "--mount", "sh", "-c",
                f'mount -t tmpfs -o mode=755 tmpfs {daemon.directory} && exec "$@"', "sh")
        second = support.Daemon("--subnet", "10.1.0.0/24", directory=daemon.directory, wrapper=hide)
        self.check_go_on(daemon, client, lambda: self.other(second.command(), self.scratch()))

    def test_a_directory_made_anew_is_the_same(self):
        directory = self.scratch()
        before = faasd.run_dir_mark(directory)
        directory.rename(f"{directory}-old")
        directory.mkdir()
        self.assertEqual(faasd.run_dir_mark(directory), before)
        os.rmdir(f"{directory}-old")


class Ports(LocalUserCase):
    TAKE = HANDLER.replace("COMMAND", "/take").replace("BODY", """taken = socket.socket()
    taken.bind(("127.0.0.1", 8000))             # not even listening
    client.sendall(HEAD + b"0\\n")
    time.sleep(3600)""")

    def test_container_that_holds_the_api_s_is_ended(self):
        daemon = self.start()
        address, own = (daemon.deploy(name, support.handler_image(self.TAKE), "--net", net, "--timeout", "0")
                        for name, net in (("f", "host"), ("own", "none")))
        clients = [self.client(one, "/take?x") for one in (address, own)]
        for client in clients:
            while client.read_line() != "0":
                continue
        self.leave(daemon)
        token = daemon.directory / "token"
        token.write_text("0123456789abcdef")
        token.chmod(0o600)
        daemon.arguments = ("--api", "127.0.0.1:8000", "--api-token-file", str(token))
        daemon.start()
        self.assertIn("has taken port 8000, which is ours: ending it", daemon.log())
        self.assertEqual(daemon.info("own")["running"], 1, "its port 8000 is of its own network")
        daemon.remove("own")
        self.check_nothing_left(daemon)
        self.assertEqual(get(address), (200, "1"))

    def test_somebody_else_s_is_told(self):
        with socket.create_server(("127.0.0.1", 8000)):
            daemon = support.Daemon()
            self.addCleanup(shutil.rmtree, daemon.directory)
            (daemon.directory / "token").write_text("0123456789abcdef")
            (daemon.directory / "token").chmod(0o600)
            daemon.arguments = ("--api", "127.0.0.1:8000", "--api-token-file", str(daemon.directory / "token"))
            result = self.refused(daemon)
        self.assertEqual(result.returncode, 2)
        self.assertRegex(result.stderr,
                         r"\nfaasd: cannot listen on http://127.0.0.1:8000: Address already in use; .*\s\Z")
        self.assertEqual(support.remains(daemon), [])


class Addresses(LocalUserCase):
    """What root's other programs take from lo is put back."""

    def flush(self) -> None:
        subprocess.run(["ip", "addr", "flush", "dev", "lo", "label", "lo:faas"], check=True)

    def test_put_back_by_itself(self):
        daemon = self.start()
        addresses = [daemon.deploy(name, support.small_image()) for name in "abc"]
        daemon.remove("b")
        self.flush()
        wait_until(lambda: support.addresses() == ["10.0.0.10/32", "10.0.0.12/32"], "they are back")
        self.assertEqual([get(address)[0] for address in (addresses[0], addresses[2])], [200, 200])
        self.assertEqual(daemon.info("a")["state"], "ready")

    def test_list_tells_the_truth_and_set_does_not_lie_while_it_cannot_be(self):
        programs = self.scratch()
        (programs / "ip").write_text(f"#!/bin/sh\n[ -e {programs}/broken ] && [ $2 = replace ] && exit 2\n"
                                     f'exec {shutil.which("ip")} "$@"\n')
        (programs / "ip").chmod(0o755)
        daemon = self.start(env={"PATH": f"{programs}:{os.environ['PATH']}"})
        address = daemon.deploy("f", support.small_image())
        (programs / "broken").touch()
        self.flush()
        wait_until(lambda: daemon.info("f")["state"] == "broken", "it says so")
        self.assertIn("somebody has taken its address from lo", daemon.info("f")["error"])
        self.assertEqual(json.loads(daemon.faas("stats", "--json").stdout)["functions"][0]["state"], "broken")
        self.assertIn(b'\nfaasd_function_ready{function="f"} 0\n', daemon.api("GET", "/metrics")[1])
        result = daemon.faas("set", "f", "--memory", "256m", check=False)
        self.assertEqual((result.returncode, daemon.info("f")["options"]["memory"]), (1, 512 << 20))
        self.assertIn(f"cannot add {address} to lo", result.stderr)
        (programs / "broken").unlink()
        wait_until(lambda: daemon.info("f")["state"] == "ready", "it tries again")
        self.assertEqual(get(address)[0], 200)


class Promises(LocalUserCase):
    """--max-warm, and what functions were promised of it."""

    def test_less_than_what_is_promised_refuses_nobody_else(self):
        daemon = self.start("--max-warm", "4")
        daemon.deploy("a", support.small_image(), "--warm", "4")
        daemon.stop()
        daemon.arguments = ("--max-warm", "2")
        daemon.start()
        self.assertIn("functions were promised 4 warm containers, and --max-warm is 2", daemon.log())
        daemon.faas("new", "b", "--warm", "auto", stdin=support.small_image())
        daemon.set("b", "--memory", "256m")
        result = daemon.faas("set", "b", "--warm", "1", check=False)
        self.assertIn("warm 1: only 0 of 2 warm containers are not promised to other functions", result.stderr)

    def test_two_that_ask_at_once(self):
        daemon = self.start("--max-warm", "4")
        for name in "ab":
            daemon.deploy(name, support.small_image())
        faas = [*support.FAAS, "--socket", daemon.socket]
        asking = [subprocess.Popen([*faas, "set", name, "--warm", "4"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL) for name in "ab"]
        self.assertEqual(sorted(process.wait(support.READY_SECONDS) for process in asking), [0, 1])


if __name__ == "__main__":
    unittest.main()
