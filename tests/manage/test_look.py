"""Looking inside: logs and events for people and programs, also across a restart of the daemon; top on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import unittest

import support
from clients import get
from support import wait_until

FAAS = (sys.executable, str(support.TOP / "faas"))
API = ("--api", "http://127.0.0.1:9000")


def client(daemon: support.Daemon, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([*FAAS, "--socket", str(daemon.socket), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


class LookCase(support.SharedDaemonCase):
    def documents(self, *arguments: str) -> list[dict]:
        return json.loads(self.daemon.faas(*arguments, "--json").stdout)

    def follow(self, *arguments: str) -> subprocess.Popen:
        follower = client(self.daemon, *arguments, "-f", "--json")
        self.addCleanup(follower.communicate)
        self.addCleanup(follower.kill)
        return follower


class Logs(LookCase):
    def test_fields_and_failures(self):
        address = self.daemon.deploy("f")
        self.assertEqual(get(address, "/?outcome=closed exit=1")[0], 200)
        self.assertEqual(get(address, "/stderr?1024")[0], 200)
        self.assertEqual(get(address, "/exit?3")[0], 502)
        self.daemon.wait_idle("f")
        deployed, good, printed, second, last_words, failed = self.documents("logs", "f")
        self.assertEqual((deployed["function"], deployed["container"]), ("f", None))
        self.assertRegex(deployed["event"], "^deployed version=[0-9a-f]{12}$")
        self.assertEqual({key: good[key] for key in ("outcome", "status", "exit", "request", "reason")}, {
            "outcome": "answered", "status": None, "exit": 0, "request": "GET /?outcome=closed exit=1 HTTP/1.1",
            "reason": None})
        self.assertEqual({type(good[key]) for key in ("queue", "start", "run")}, {float})
        self.assertGreater(min(good["received"], good["sent"]), 30)
        self.assertRegex(good["peer"], r"^[\d.]+:\d+$")
        self.assertEqual((printed["container"], printed["text"]), (second["container"], "x" * 1023))
        self.assertEqual((failed["outcome"], failed["status"], failed["exit"]), ("no-answer", 502, 3))
        self.assertEqual(failed["reason"], "the handler exited with status 3 without an answer")
        self.assertEqual(last_words["text"], "about to exit")
        self.assertEqual(self.documents("logs", "f", "--failed"), [last_words, failed])
        self.assertEqual(self.documents("logs", "f", "--failed", "-n", "1"), [failed])
        text = self.daemon.faas("logs", "f", "--failed").stdout
        self.assertRegex(text, r"\A\S+ \w+ \| about to exit\n\S+ \w+ > outcome=no-answer [^\n]+\n\Z")

    def test_failed_start_with_what_its_container_printed(self):
        address = self.daemon.deploy("f")
        (self.daemon.rootfs("f") / "misbehave").write_text("exit\n")
        self.assertEqual(get(address)[0], 502)
        *printed, failed = self.documents("logs", "f", "--failed")
        self.assertEqual(failed["outcome"], "start-failed")
        self.assertEqual({line["container"] for line in printed}, {failed["container"]})
        self.assertIn("I refuse to start", printed[0]["text"])

    def test_a_line_that_is_none(self):
        """As a power failure may leave one."""
        self.daemon.deploy("f")
        self.daemon.function_log("f")
        with (self.daemon.state_dir / "logs/f.log").open("ab") as file:
            file.write(b"2026-01-01T00:00:00.000Z 0123456789ab > outcome=answered received=12\0\xff\n\0half\n")
        documents = self.documents("logs", "f")
        self.assertEqual((documents[1]["outcome"], documents[1]["received"]), ("answered", None))
        self.assertEqual(documents[2]["text"], "\0half")
        self.assertEqual(self.daemon.faas("logs", "f", "--failed").stdout, "")

    def test_followers_survive_a_restart_and_say_so(self):
        address = self.daemon.deploy("f")
        get(address, "/before")
        self.daemon.wait_idle("f")
        log, events = self.follow("logs", "f"), self.follow("events", "-n", "1")
        seen = [json.loads(log.stdout.readline()) for _ in range(2)]
        self.assertEqual(json.loads(events.stdout.readline())["event"], "deployed")
        for number, end in enumerate((self.daemon.kill, self.daemon.stop)):
            end()
            for follower in (log, events):
                self.assertEqual(follower.stderr.readline(), "faas: faasd has ended; waiting for it to come back\n")
            self.daemon.start()
            for follower in (log, events):
                self.assertEqual(follower.stderr.readline(), "faas: faasd is back\n")
            get(address, f"/after/{number}")
            seen.append(json.loads(log.stdout.readline()))
            self.daemon.set("f", "--queue", str(number))
            self.assertEqual(json.loads(events.stdout.readline())["event"], "set")
            seen.append(json.loads(log.stdout.readline()))
        self.daemon.wait_idle("f")
        self.assertEqual(self.documents("logs", "f"), seen)
        self.daemon.remove("f")
        self.assertEqual((log.communicate(), log.returncode), (("", ""), 0))


class Events(LookCase):
    @classmethod
    def setUpClass(cls):
        cls.token_file = support.temporary_directory() / "token"
        cls.addClassCleanup(support.shutil.rmtree, cls.token_file.parent)
        cls.token_file.touch(0o600)
        cls.token_file.write_text("t" * 32)
        cls.arguments = ("--api", "127.0.0.1:9000", "--api-token-file", str(cls.token_file))
        super().setUpClass()

    def events(self) -> list[tuple[str, str, str]]:
        return [(event["function"], event["event"], event["by"]) for event in self.documents("events")]

    def test_what_became_of_functions_and_by_whom(self):
        self.daemon.deploy("f")
        self.daemon.deploy("f", support.handler_image(label="2"))
        self.daemon.set("f", "--queue", "1")
        result = subprocess.run([*FAAS, *API, "--token-file", str(self.token_file), "rollback", "f"],
                                capture_output=True, check=False)
        self.assertEqual(result.returncode, 0, result.stderr)
        *rest, (name, event, by) = [event for event in self.events() if event[0] == "f"]
        self.assertEqual(rest, [("f", "deployed", "root"), ("f", "replaced", "root"), ("f", "set", "root")])
        self.assertEqual((name, event), ("f", "rolled-back"))
        self.assertRegex(by, r"^token@127\.0\.0\.1:\d+$")
        last = self.documents("events", "-n", "1")[0]
        self.assertEqual((last["version"], last["address"]), (self.daemon.versions("f")[0], "10.0.0.10"))
        self.daemon.stop()
        image, = (self.daemon.state_dir / "images/f").glob(f"{last['version']}/image.json")
        image.write_text("{}")
        self.daemon.start()
        broken = self.documents("events", "-n", "1")[0]
        self.assertEqual((broken["event"], broken["by"]), ("broken", "faasd"))
        self.assertEqual(broken["reason"], self.daemon.info("f")["error"])
        self.daemon.remove("f")
        self.assertEqual(self.events()[-1], ("f", "removed", "root"))
        self.assertRegex(self.daemon.faas("events", "-n", "1").stdout, r"\A\S+Z f > removed by=root\n\Z")

    def test_back_off(self):
        self.daemon.deploy("g", None, "--warm", "1")
        container, = self.daemon.wait_warm("g", 1)
        for pid in support.container_pids(self.daemon, container):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.events()[-1] == ("g", "back-off", "faasd"), "it backs off")


class Top(LookCase):
    def setUp(self):
        super().setUp()
        self.daemon.deploy("a" * 63, support.small_image())
        get(self.daemon.deploy("b", support.small_image()))
        self.daemon.wait_idle("b")
        self.master, self.slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        self.addCleanup(os.close, self.slave)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.shown = ""

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        process = subprocess.Popen([*FAAS, "--socket", str(self.daemon.socket), *arguments], stdin=self.slave,
                                   stdout=self.slave, stderr=self.slave, start_new_session=True,
                                   env={**os.environ, "TERM": "xterm", **env})
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def wait_shown(self, text: str) -> None:
        """Read until the terminal has been sent a text, since the last time."""
        while text not in self.shown:
            self.shown += os.read(self.master, 65536).decode()
        self.shown = self.shown.partition(text)[2]

    def test_keys_sort_and_end_it_within_80_columns(self):
        process = self.start("top", "-d", "0.1")
        screens = ""
        for keys, wanted in (("", "(by RATE)"), ("\x1b[D\x1b[D", "(by REQUESTS)"), ("\x1b[C", "(by ERRORS)"),
                             ("x\x1bOD", "(by REQUESTS)"), ("\x1b[B\x1b[A", "(by REQUESTS)")):
            os.write(self.master, keys.encode())
            while wanted not in self.shown:
                self.shown += os.read(self.master, 65536).decode()
            screens += self.shown
            self.shown = ""
        os.write(self.master, b"q")
        self.assertEqual(process.wait(), 0)
        self.wait_shown("\x1b[?25h\x1b[?1049l")
        self.assertEqual(termios.tcgetattr(self.slave), self.before)
        self.assertIn("\x1b[7m", screens)
        self.assertIn("p50/p95/p99", screens)
        plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screens.replace("\x1b[H", "\n"))
        self.assertLessEqual(max(map(len, plain.replace("\r", "").split("\n"))), 80)
        self.assertNotRegex(plain, r"\^\[|x$")          # no key was echoed

    def test_terminal_is_as_before_however_it_ends(self):
        for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
            process = self.start("top", "-d", "0.1", NO_COLOR="1")
            self.wait_shown("scroll")
            self.wait_shown("scroll")
            self.assertNotEqual(termios.tcgetattr(self.slave), self.before)
            process.send_signal(number)
            self.assertEqual(process.wait(), status)
            self.assertNotIn("\x1b[7m", self.shown)
            self.wait_shown("\x1b[?25h\x1b[?1049l")
            self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_tables_fit_the_terminal(self):
        for command in ("list", "stats"):
            process = self.start(command)
            self.assertEqual(process.wait(), 0)
            rows = os.read(self.master, 65536).decode().splitlines()
            self.assertEqual([row[:6] for row in rows], ["NAME  ", "aaaaaa", "b     "])
            self.assertIn("a… ", rows[1])
            self.assertLessEqual(max(map(len, rows)), 80)
            self.assertIn("a" * 63, self.daemon.faas(command).stdout)       # where there is no terminal, all is there

    def test_numbers_are_rounded(self):
        document = json.loads(self.daemon.faas("stats", "--json").stdout)
        values = re.findall(r"[0-9]+\.([0-9]+)", json.dumps(document))
        self.assertLessEqual(max(map(len, values)), 6)


if __name__ == "__main__":
    unittest.main()
