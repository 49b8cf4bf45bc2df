"""Each message of README's section "Troubleshooting" is provoked, and found there as it is said."""

import dataclasses
import re
import shutil
import socket
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import archives
import clients
import support
from support import wait_until

SECTION = (support.TOP / "README.md").read_text().partition("### Troubleshooting\n")[2].partition("\n## ")[0]
SERVER = b"""
import os, socket
client, _ = socket.create_server(("", 8080)).accept()
client.recv(1000)
os._exit(3)
"""
SLEEP = (support.PERL, "-e", "sleep")


def rows(title: str) -> list[list[str]]:
    """Return for each row of a table the messages in its first cell, and that cell alone if it has none."""
    table = SECTION.partition(f"{title}\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in table]
    return [re.findall("`([^`]+)`", cell) or [cell] for cell in cells]


def pattern(message: str) -> str:
    return ".+".join(re.escape(part.strip()) for part in message.split("…") if part.strip())


class Troubleshooting(unittest.TestCase):
    def setUp(self):
        self.said: list[str] = []           # all that was answered and printed
        self.directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, self.directory)

    def check(self, title: str) -> None:
        """Every message of a table has been said."""
        self.assertGreater(len(rows(title)), 3, title)
        for messages in rows(title):
            for message in messages:
                with self.subTest(message):
                    self.assertRegex("\n".join(self.said), pattern(message))

    def answer(self, address: str, path: str = "/") -> None:
        status, body = support.get(address, path)
        self.said.append(f"{status} {body}")

    def exit_status_of_a_neighbours_curl(self, address: str) -> int:
        """Have a machine beside this one ask a function, for whose subnet it sends packets here."""
        with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as neighbour:
            network = Path(f"/proc/{neighbour.pid}/ns/net")
            wait_until(lambda: network.stat().st_ino != Path("/proc/self/ns/net").stat().st_ino, "its network is there")
            enter = ("nsenter", f"--net={network}")
            for wrapper, command in (((), f"link add near type veth peer name far netns {neighbour.pid}"),
                                     ((), "address add 192.168.9.1/24 dev near"), ((), "link set near up"),
                                     (enter, "address add 192.168.9.2/24 dev far"), (enter, "link set far up"),
                                     (enter, "route add 10.0.0.0/24 via 192.168.9.1")):
                subprocess.run([*wrapper, "ip", *command.split()], check=True)
            status = subprocess.run([*enter, "curl", "--silent", "--max-time", "2", f"http://{address}/"],
                                    check=False).returncode
            neighbour.kill()
        return status

    def faas(self, daemon: support.Daemon, *arguments: str, stdin: bytes | None = None) -> None:
        result = daemon.faas(*arguments, stdin=stdin, check=False)
        self.assertEqual(result.returncode, 1, result)
        self.said.append(result.stderr)

    def test_there_are_as_many_tables_as_tests_of_them(self):
        self.assertEqual(SECTION.count("\n| --- |"), 4)

    def test_what_clients_are_answered(self):
        with support.Daemon() as daemon:
            address = daemon.deploy("f", None, "--memory", "32m")
            self.answer(address, "/exit?3")
            self.answer(address, f"/memory?{64 << 20}")
            daemon.set("f", "--timeout", "1")
            self.answer(address, "/hang")
            with clients.request(address, "/half-and-hang") as client, self.assertRaises(ConnectionResetError):
                while client.recv(65536):
                    pass
            self.said.append("the connection is reset")
            server = daemon.deploy("server", support.docker_archive(
                [support.python_layer(), support.layer({"server.py": SERVER})],
                {"Entrypoint": [support.PYTHON, "/server.py"]}))
            self.said.append(subprocess.run(["curl", "--silent", "--show-error", f"http://{server}/"],
                                            stderr=subprocess.PIPE, text=True, check=False).stderr)
            self.assertIn("outcome=no-answer", daemon.faas("logs", "--failed", "server").stdout)
            daemon.set("f", "--timeout", "0", "--concurrency", "1", "--queue", "1", "--queue-timeout", "1")
            with ThreadPoolExecutor() as pool:
                running = pool.submit(support.get, address, "/label?go:")
                wait_until(lambda: daemon.info("f")["running"] == 1, "it runs")
                waiting = pool.submit(self.answer, address)
                wait_until(lambda: daemon.info("f")["queued"] == 1 or waiting.done(), "one waits")
                daemon.set("f", "--queue", "0")
                self.answer(address)
                waiting.result()
                daemon.release("f", "go")
                running.result()
            daemon.wait_idle("f")
            with clients.connect(address) as silent:
                self.answer(address)            # one that came later, and spoke
                silent.setblocking(False)
                self.assertRaises(BlockingIOError, silent.recv, 1)
            self.said.append("the connection hangs")
            self.assertEqual(self.exit_status_of_a_neighbours_curl(address), 28)        # its --max-time is over
            self.said.append("another machine's connection hangs")
        self.check("What a client may see:")

    def test_what_new_says(self):
        image, one = support.small_image(Entrypoint=[]), archives.Image()
        other = archives.Image([archives.layer()], tags=("other:1",))
        listen = 'socket S, 2, 1, 0; bind S, pack "Sna4x8", 2, 8000, ""; listen S, 1; '      # AF_INET, TCP
        with support.Daemon(constants={"STAY_SECONDS": support.READY_SECONDS}) as daemon:
            for archive, *options in (
                    (b"",), (b"# A text",), (archives.layer(*map(archives.directory, ("bin", "etc", "usr"))),),
                    (support.docker_archive([], {}),), (archives.podman(one, other),),
                    (archives.podman(dataclasses.replace(one, architecture="s390x")),),
                    (image, "--", "/nope"), (image, "--", support.PERL, "-e", "exit 3"),
                    (image, "--", support.PERL, "-e", "exit"),
                    (image, "--start-timeout", "1", "--port", "81", "--", support.PERL, "-e", listen + "sleep"),
                    (image, "--port", "8000", "--", support.PERL, "-e", listen + "fork and exit; sleep"),
                    # One that has a server's capabilities the second time: nothing else is said of it.
                    (image, "--", support.PERL, "-e", f"$< = 33; die if $< != 33; {listen} fork and exit; sleep"),
                    (image, "--start-timeout", "1", "--", *SLEEP),
                    (image, "--memory", "16m", "--", support.PERL, "-e", "my $memory = 'x' x (64 << 20); sleep")):
                self.faas(daemon, "new", "f", *options, stdin=archive)
            with socket.create_server(("", 80)):
                self.faas(daemon, "new", "f", stdin=support.small_image())
        self.assertEqual("".join(self.said).count("it must stay in the foreground\n"), 2)
        self.check("What `faas new` may say:")

    def test_what_faas_says(self):
        with support.Daemon() as daemon:
            daemon.deploy("f")
            self.faas(daemon, "info", "g")
            daemon.stop()
            for path in daemon.state_dir.glob("images/f/*/image.json"):
                path.unlink()
            self.faas(daemon, "list")
            daemon.start()
            self.faas(daemon, "info", "f", "--isolation")
        with socket.socket(socket.AF_UNIX) as server:
            path = self.directory / "socket"
            server.bind(str(path))
            shutil.chown(path, 12345, 12345)
            path.chmod(0o600)
            # In a user namespace without a mapping nobody is root, though all of root's files can be read.
            said = subprocess.run(["unshare", "--user", sys.executable, support.TOP / "faas", "--socket", path, "list"],
                                  capture_output=True, text=True, check=False)
            self.said.append(said.stderr)
        self.check("What `faas` may say:")

    def refuse(self, *arguments: str, wrapper: tuple[str, ...] = ()) -> None:
        daemon = support.Daemon(*arguments, directory=self.directory, wrapper=wrapper)
        result = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=support.READY_SECONDS,
                                check=False)
        self.assertNotEqual(result.returncode, 0)
        self.said.append(result.stderr)

    def test_why_the_daemon_may_not_start(self):
        self.refuse(wrapper=("unshare", "--user"))
        self.refuse("--runtime", "rune")
        with support.Daemon() as daemon:
            self.refuse()
            self.refuse("--run-dir", str(daemon.run_dir), "--subnet", "10.1.0.0/24")
        registry = self.directory / "state/registry.json"
        registry.parent.mkdir()
        registry.write_text("{")
        self.refuse()
        self.check("Why the daemon may not start:")


if __name__ == "__main__":
    unittest.main()
