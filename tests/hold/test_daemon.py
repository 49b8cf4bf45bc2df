"""The daemon's life: when it refuses to start, how it stops, what it brings back, what it clears away."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support
from clients import read_until_cut, request
from support import get, wait_until

import faasd


IP_FREEBIND = 15        # ip(7); the socket module has no name for it


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


class Refusals(unittest.TestCase):
    """One line, exit status 2 (or 1 where it is not the command line), and nothing made."""

    def setUp(self):
        self.directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, self.directory)

    def refuse(self, *arguments: str, wrapper: tuple[str, ...] = (), status: int = 2, env: dict | None = None) -> str:
        """Start a daemon that must refuse, return its one line."""
        daemon = support.Daemon(*arguments, directory=self.directory, wrapper=wrapper)
        before = os.listdir(self.directory)
        result = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=support.READY_SECONDS,
                                env={**os.environ, **(env or {})}, check=False)
        self.assertEqual(result.returncode, status, result.stderr)
        *others, line = result.stderr.splitlines()
        self.assertTrue(line.startswith("faasd: "), result.stderr)
        self.assertNotRegex(result.stderr, "Traceback|usage:")
        if not before:
            self.assertEqual(os.listdir(self.directory), [], others)
        return line

    def test_not_root(self):
        # In a user namespace without a mapping nobody is root, though all files can be read.
        line = self.refuse(wrapper=("unshare", "--user"))
        self.assertEqual(line, "faasd: faasd needs root, for namespaces, addresses and file owners: sudo ./faasd.py")

    def test_no_runtime(self):
        self.assertIn("no rune on this machine: apt install rune", self.refuse("--runtime", "rune"))
        self.assertIn("no /opt/none on this machine", self.refuse("--runtime", "/opt/none"))

    def test_runtime_that_does_not_run(self):
        self.assertIn("false --version failed", self.refuse("--runtime", "false", status=1))
        self.assertEqual(support.addresses(), [])

    def test_already_running(self):
        with support.Daemon() as daemon:
            for arguments in (("--run-dir", str(daemon.run_dir)), ("--state-dir", str(daemon.state_dir))):
                line = self.refuse(*arguments, "--subnet", "10.1.0.0/24")
                self.assertIn("faasd is already running on ", line)
            self.assertEqual(daemon.api("GET", "/healthz")[0], 200)

    def test_bad_arguments(self):
        for arguments, words in (
                (("--subnet", "10.0.0.0/33"), "bad subnet"), (("--subnet", "10.0.0.1/24"), "has host bits set"),
                (("--subnet", "fd00::/64"), "bad subnet"), (("--subnet", "10.0.0.0/29"), "is too small"),
                (("--port", "0"), "bad port"), (("--port", "http"), "bad port"), (("--drain-timeout", "x"), "bad dur"),
                (("--max-image-size", "-1"), "bad size '-1'"), (("--nonsense",), "unrecognized arguments"),
                (("--run-dir", "/tmp/" + "x" * 90), "is too long")):
            with self.subTest(arguments):
                self.assertIn(words, self.refuse(*arguments))

    def test_subnet_assigned_elsewhere(self):
        ip("addr", "add", "10.0.0.77/24", "dev", "lo")
        self.addCleanup(ip, "addr", "del", "10.0.0.77/24", "dev", "lo")
        line = self.refuse()
        self.assertIn("subnet 10.0.0.0/24 is in use: 10.0.0.0/24 is assigned to lo; choose another with --subnet", line)

    def test_subnet_routed_elsewhere(self):
        for route in ("10.0.0.128/25", "10.0.0.0/8", "10.0.0.3/32"):
            with self.subTest(route):
                ip("route", "add", route, "dev", "lo")
                try:
                    self.assertRegex(self.refuse(), "is in use: 10[0-9./]+ is routed to lo; choose another")
                finally:
                    ip("route", "del", route, "dev", "lo")

    def test_default_route_in_pieces_is_no_conflict(self):
        ip("route", "add", "0.0.0.0/1", "dev", "lo")
        self.addCleanup(ip, "route", "del", "0.0.0.0/1", "dev", "lo")
        with support.Daemon() as daemon:
            self.assertEqual(daemon.api("GET", "/healthz")[0], 200)

    def test_subnet_of_another_daemon(self):
        with support.Daemon("--subnet", "10.7.0.0/24") as daemon:
            for subnet in ("10.7.0.0/24", "10.7.0.0/16", "10.7.0.128/25"):
                self.assertIn("another faasd uses 10.7.0.0/24", self.refuse("--subnet", subnet))
            self.assertEqual(daemon.api("GET", "/healthz")[0], 200)

    def test_loopback_down(self):
        self.assertIn("the loopback interface is down: ip link set lo up", self.refuse(wrapper=("unshare", "--net")))

    def test_registry_damaged_or_newer(self):
        state = self.directory / "state"
        state.mkdir()
        for content, words in (("{", "is damaged"), ("[]", "is damaged"), ('{"format": 3}', "is damaged"),
                               ('{"format": 3, "functions": [{"name": "x"}]}', "is damaged"),
                               ('{"format": 5, "functions": []}', "has format 5, this faasd knows 3 and 4")):
            with self.subTest(content):
                (state / "registry.json").write_text(content)
                self.assertIn(words, self.refuse(status=1))
                self.assertEqual((state / "registry.json").read_text(), content)
                self.assertEqual(os.listdir(self.directory), ["state"])


class Stop(unittest.TestCase):
    def test_running_invocations_finish_and_new_ones_are_refused(self):
        daemon = support.Daemon().start()
        self.addCleanup(daemon.close)
        address = daemon.deploy("f", support.handler_image(label="slow"))
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(get, address, "/label?go:") for _ in range(4)]
            wait_until(lambda: daemon.info("f")["running"] == 4, "4 invocations")
            wait_until(lambda: len(support.processes(daemon.directory.name)) >= 5, "containers")
            daemon.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in daemon.log(), "it stops")
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection((address, 80)).close()
            daemon.release("f", "go")
            self.assertEqual([future.result() for future in running], [(200, "slow")] * 4)
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        self.assertEqual(support.remains(daemon), [])

    def test_who_is_connected_and_silent_is_served_and_newcomers_are_not_let_in(self):
        """A balancer that has a connection sends its request on it, and may not repeat a POST that was reset."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            daemon = support.Daemon(constants={"ARRIVAL_SECONDS": 5 * support.PATIENCE}).start()
            self.addCleanup(daemon.close)
            address = daemon.deploy("f")

            def is_held_off(address=address) -> bool:
                try:
                    socket.create_connection((address, 80), 0.5).close()
                except TimeoutError:
                    return True
                return False
            with self.subTest(number), socket.create_connection((address, 80), support.READY_SECONDS) as client:
                daemon.process.send_signal(number)
                wait_until(is_held_off, "nobody else is let in")
                client.sendall(b"POST /label")
                wait_until(lambda: number == signal.SIGHUP or "stopping: 1 invocation" in daemon.log(), "it is let in")
                client.sendall(b"?late HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
                with client.makefile("rb") as answer:
                    self.assertIn(b" 200 ", answer.readline())
            self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
            daemon.log_file.close()
            daemon.start()              # SIGHUP leaves what it needs
            daemon.stop()

    def end_by_force(self, *signals: int, drain: str) -> None:
        daemon = support.Daemon("--drain-timeout", drain).start()
        self.addCleanup(daemon.close)
        address = daemon.deploy("f")
        with ThreadPoolExecutor() as pool:
            hanging = pool.submit(get, address, "/hang")
            half = request(address, "/half-and-hang")
            self.assertIn(b"only this", half.recv(65536))
            wait_until(lambda: len([p for p in support.processes(daemon.directory.name) if " run " in p]) == 2, "runc")
            wait_until(lambda: Restart.waiting(daemon) == 0, "both handlers are ready")
            for number in signals:
                daemon.process.send_signal(number)
            status, body = hanging.result()
            self.assertEqual(status, 503)
            self.assertIn("faasd is stopping", body)
            self.assertEqual(read_until_cut(half), b"")
            half.close()
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        self.assertEqual(support.remains(daemon), [])

    def test_what_overruns_the_drain_timeout_is_killed(self):
        self.end_by_force(signal.SIGTERM, drain="1s")

    def test_second_signal_stops_at_once(self):
        self.end_by_force(signal.SIGINT, signal.SIGTERM, drain="1h")

    def test_exit_status_of_an_idle_daemon(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            daemon = support.Daemon().start()
            self.addCleanup(daemon.close)
            self.assertEqual(daemon.stop(number), 0)
            self.assertEqual(support.remains(daemon), [])

    def test_foreign_addresses_stay(self):
        ip("addr", "add", "10.9.0.1/32", "dev", "lo", "label", "lo:other")
        ip("addr", "add", "10.8.0.1/32", "dev", "lo", "label", "lo:faas")       # of a daemon with another subnet
        self.addCleanup(ip, "addr", "del", "10.9.0.1/32", "dev", "lo")
        self.addCleanup(ip, "addr", "del", "10.8.0.1/32", "dev", "lo")
        with support.Daemon() as daemon:
            daemon.deploy("f")
            self.assertEqual(support.addresses(), ["10.8.0.1/32", "10.0.0.10/32"])
            daemon.stop()
            left = ip("-o", "addr", "show", "dev", "lo")
            self.assertIn("10.9.0.1", left)
            self.assertIn("10.8.0.1", left)
            self.assertNotIn("10.0.0.10", left)

    def test_stop_during_an_upload(self):
        with support.Daemon() as daemon:
            client = socket.socket(socket.AF_UNIX)
            self.addCleanup(client.close)
            client.connect(str(daemon.socket))
            client.sendall(b"POST /functions/f HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-tar\r\n"
                           b"Content-Length: 1000000\r\n\r\nabc")
            wait_until(lambda: list((daemon.state_dir / "tmp").iterdir()), "the upload has begun")
            self.assertEqual(daemon.stop(), 0)
            self.assertEqual(support.remains(daemon), [])
            self.assertNotIn("Traceback", daemon.log())

    def test_service_manager_is_told(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(manager.close)
        manager.bind(str(directory / "notify"))
        manager.settimeout(support.READY_SECONDS)
        with support.Daemon(env={"NOTIFY_SOCKET": str(directory / "notify")}):
            self.assertEqual(manager.recv(100), b"READY=1")
        longest = 2 * 30 + 5 * faasd.STOP_SECONDS       # --drain-timeout is 30 s
        self.assertEqual(manager.recv(100).decode(), f"STOPPING=1\nEXTEND_TIMEOUT_USEC={longest * 1e6:.0f}")


class Restart(unittest.TestCase):
    def test_functions_come_back_on_their_addresses(self):
        with support.Daemon() as daemon:
            addresses = {name: daemon.deploy(name, support.handler_image(label=name)) for name in ("a", "b", "c")}
            self.assertEqual(sorted(addresses.values()), ["10.0.0.10", "10.0.0.11", "10.0.0.12"])
            daemon.remove("b")
            before = {name: daemon.info(name) for name in ("a", "c")}
            daemon.stop()
            daemon.start()
            for name in ("a", "c"):
                self.assertEqual(get(addresses[name], "/label"), (200, name))
                after = daemon.info(name)
                for key in ("address", "created", "updated", "version", "digest", "options", "command"):
                    self.assertEqual(after[key], before[name][key])
            self.assertEqual(daemon.deploy("d"), "10.0.0.11")       # the lowest free one

    def test_function_whose_image_is_gone_is_broken_and_can_be_deployed_again(self):
        with support.Daemon() as daemon:
            daemon.deploy("a")
            address = daemon.deploy("b")
            daemon.stop()
            shutil.rmtree(daemon.rootfs("b"))
            daemon.start()
            self.assertEqual(get("10.0.0.10")[0], 200)
            info = daemon.info("b")
            self.assertEqual((info["state"], info["address"]), ("broken", address))
            self.assertIn("deploy it again", info["error"])
            self.assertEqual(daemon.deploy("b"), address)
            self.assertEqual(get(address)[0], 200)

    def test_kill_9_during_50_invocations(self):
        """Whose client has left is removed; whose client is there still goes on."""
        with support.Daemon() as daemon:
            address = daemon.deploy("f", support.handler_image(label="back"), "--timeout", "1h",
                                    "--queue-timeout", "1h")
            daemon.deploy("g")
            clients = [socket.create_connection((address, 80)) for _ in range(50)]
            for client in clients:
                self.addCleanup(client.close)
                client.sendall(b"GET /label-after?/go HTTP/1.1\r\n\r\n")
            wait_until(lambda: len(list((daemon.run_dir / "containers").iterdir())) == 50, "50 containers", 120)
            wait_until(lambda: self.waiting(daemon) == 0, "all are ready", 120)
            orphans = support.processes(daemon.directory.name)
            self.assertGreaterEqual(len(orphans), 50)
            (daemon.state_dir / "tmp" / "cut-upload").mkdir()
            (daemon.state_dir / "images" / "f" / "0123456789ab").mkdir()
            (daemon.state_dir / "logs" / "gone.log").touch()
            ip("addr", "add", "10.0.0.99/32", "dev", "lo", "label", "lo:faas")
            daemon.kill()
            for client in clients[5:]:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # a reset
                client.close()
            daemon.start()
            self.assertEqual(daemon.info("f")["running"], 5)
            self.assertEqual(len(support.list_containers(daemon)), 5)
            daemon.release("f", "go")
            for client in clients[:5]:
                self.assertTrue(client.makefile().read().endswith("back"))
            self.assertEqual(get(address, "/label"), (200, "back"))
            self.assertEqual(get("10.0.0.11")[0], 200)
            daemon.wait_idle("f")
            daemon.wait_idle("g")
            footprint = support.footprint(daemon)
            self.assertEqual((footprint["containers"], footprint["cgroups"]), ([], []))
            self.assertEqual(list((daemon.run_dir / "containers").iterdir()), [])
            self.assertEqual(list((daemon.state_dir / "tmp").iterdir()), [])
            self.assertFalse((daemon.state_dir / "images" / "f" / "0123456789ab").exists())
            self.assertFalse((daemon.state_dir / "logs" / "gone.log").exists())
            self.assertEqual(support.addresses(), ["10.0.0.10/32", "10.0.0.11/32"])
            runs = [line for line in support.processes(daemon.directory.name) if " run " in line]
            self.assertEqual(runs, [])

    @staticmethod
    def waiting(daemon: support.Daemon) -> int:
        """Return how many containers are not connected yet: their control socket listens."""
        return sum(f"{daemon.run_dir}/containers/" in line and line.split()[3] == "00010000"
                   for line in Path("/proc/net/unix").read_text().splitlines())

    def test_port_taken_at_restart_leaves_the_others_running(self):
        with support.Daemon() as daemon:
            daemon.deploy("a")
            daemon.deploy("b")
            daemon.stop()
            ip("addr", "add", "10.6.0.1/32", "dev", "lo")
            self.addCleanup(ip, "addr", "del", "10.6.0.1/32", "dev", "lo")
            squatter = socket.socket()
            self.addCleanup(squatter.close)
            squatter.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind(("10.0.0.10", 80))
            squatter.listen()
            daemon.start()
            self.assertEqual(daemon.info("a")["state"], "broken")
            self.assertIn("port 80 on 10.0.0.10 is taken", daemon.info("a")["error"])
            self.assertEqual(get("10.0.0.11")[0], 200)


class Socket(unittest.TestCase):
    def test_user_who_ran_sudo_needs_none_for_the_client(self):
        """The socket belongs to SUDO_UID, mode 0660; others may not open it."""
        with support.Daemon(env={"SUDO_UID": "12345"}) as daemon:
            daemon.directory.chmod(0o755)
            status = os.stat(daemon.socket)
            self.assertEqual((status.st_uid, status.st_gid, status.st_mode & 0o777), (12345, 0, 0o660))

            def version_as(uid: int) -> int:
                # curl, not faas: the interpreter itself may lie where only root can read.
                return subprocess.run(["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "curl", "-sS",
                                       "--unix-socket", daemon.socket, "http://x/version"], capture_output=True,
                                      check=False).returncode
            self.assertEqual(version_as(12345), 0)
            self.assertEqual(version_as(12346), 7)      # curl: could not connect

    def test_members_of_the_group_from_the_moment_they_are_added(self):
        """Neither the daemon nor the user's session begins anew; and the group need not be there when it starts."""
        etc = support.temporary_directory()
        self.addCleanup(shutil.rmtree, etc)
        shutil.copytree("/etc", etc / "etc", symlinks=True, dirs_exist_ok=True)
        etc /= "etc"

        def replace(name: str, line: str) -> None:          # as useradd and groupadd do
            text = "".join(each + "\n" for each in Path("/etc", name).read_text().splitlines()
                           if each.split(":")[0] != line.split(":")[0])
            (etc / f"{name}.new").write_text(f"{text}{line}\n")
            (etc / f"{name}.new").rename(etc / name)
        replace("passwd", "somebody:x:12345:12345::/:/bin/sh")
        replace("group", "nothing:x:54320:")
        own_etc = ("unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc; exec "$@"', str(etc))
        with support.Daemon(wrapper=own_etc) as daemon:
            daemon.directory.chmod(0o755)

            def may_open(uid: int, gid: int) -> bool:
                return subprocess.run(["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "curl", "-sS",
                                       "--unix-socket", daemon.socket, "http://x/version"], capture_output=True,
                                      check=False).returncode == 0
            self.assertFalse(may_open(12345, 12345))
            replace("group", "faas:x:54321:nobody-there,somebody")
            support.wait_until(lambda: may_open(12345, 12345), "a member may open it")
            self.assertFalse(may_open(12346, 12346))
            self.assertTrue(may_open(12346, 54321), "who has logged in since")
            replace("group", "faas:x:54321:")
            support.wait_until(lambda: not may_open(12345, 12345), "it is a member no more")
            self.assertEqual(os.stat(daemon.socket).st_mode & 0o777, 0o660)

    def test_state_is_closed_to_others(self):
        with support.Daemon() as daemon:
            self.assertEqual(os.stat(daemon.state_dir).st_mode & 0o777, 0o711)
            self.assertEqual(os.stat(daemon.run_dir / "containers").st_mode & 0o777, 0o711)

    def test_registry_is_closed_to_others_wherever_it_is(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        state = directory / "state"
        state.mkdir(mode=0o755)
        daemon = support.Daemon()
        daemon.state_dir = state
        with daemon:
            daemon.deploy("f", support.handler_image(), "-e", "SECRET=1")
            self.assertEqual(os.stat(state).st_mode & 0o777, 0o755, "a directory of the user's own was changed")
            for name, mode in (("registry.json", 0o600), ("images", 0o711), ("logs", 0o700), ("tmp", 0o700)):
                self.assertEqual(os.stat(state / name).st_mode & 0o777, mode, name)
            self.assertNotIn("SECRET", daemon.log())

    def test_directories_through_links(self):
        """Relative names and links: runc and the mount table know only real, absolute ones."""
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "real").mkdir()
        (directory / "link").symlink_to("real")
        daemon = support.Daemon()
        daemon.state_dir, daemon.run_dir = directory / "link/state", directory / "link/run"
        daemon.socket = daemon.run_dir / "faasd.sock"
        with daemon:
            self.assertEqual(get(daemon.deploy("f"))[0], 200)

    def test_containers_are_on_a_tmpfs(self):
        with support.Daemon() as daemon:
            kinds = dict(faasd.read_mounts())
            path = daemon.run_dir / "containers"
            kind = next(kinds[str(p)] for p in [path, *path.parents] if str(p) in kinds)
            self.assertEqual(kind, "tmpfs")


class Version(unittest.TestCase):
    def test_any_program_with_the_command_line_of_runc_is_a_runtime(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        program = directory / "my-runtime"
        program.write_text(f'#!/bin/sh\necho "$@" >>{directory}/calls\nexec {support.RUNTIME} "$@"\n')
        program.chmod(0o755)
        with support.Daemon("--runtime", str(program)) as daemon:
            self.assertEqual(get(daemon.deploy("f"))[0], 200)
            # One probe at start, two containers that prove the function, and one more to be warm.
        self.assertEqual((directory / "calls").read_text().count(" --bundle "), 4)

    def test_runtime_and_its_holes_are_named_at_start(self):
        version = subprocess.run([support.RUNTIME, "--version"], capture_output=True, text=True, check=True)
        first = version.stdout.splitlines()[0]
        with support.Daemon() as daemon:
            self.assertIn(first, daemon.log())
            changelog = faasd.package_changelog(shutil.which(support.RUNTIME))
            self.assertEqual("known holes" in daemon.log(), faasd.runc_warning(first, changelog) is not None)
            self.assertEqual(json.loads(daemon.api("GET", "/version")[1])["runtime"], first)

    def test_json_log(self):
        with support.Daemon("--log-format", "json") as daemon:
            for line in daemon.log().splitlines():
                self.assertEqual(set(json.loads(line)), {"time", "level", "message"})

    def test_help(self):
        out = subprocess.run([sys.executable, support.TOP / "faasd.py", "--help"], capture_output=True, text=True,
                             check=True).stdout
        for option in ("--state-dir", "--run-dir", "--subnet", "--port", "--runtime", "--drain-timeout"):
            self.assertIn(option, out)


if __name__ == "__main__":
    unittest.main()
