"""Looking inside: logs and events, also across a restart of the daemon; top on a terminal; commands in a container."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import unittest
from pathlib import Path

import archives
import support
from clients import get, read_all, request
from support import faasd, wait_until

FAAS = support.FAAS
API = ("--api", "http://127.0.0.1:9000")


def client(daemon: support.Daemon, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([*FAAS, "--socket", str(daemon.socket), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def read_until(terminal: int, shown: str, wanted: str) -> str:
    """Read from a terminal, from which shown was read already, until a text comes; return all of it."""
    while wanted not in shown:
        if not faasd.is_readable(terminal, support.READY_SECONDS):
            raise AssertionError(f"{wanted!r} does not come: {shown!r}")
        shown += os.read(terminal, 65536).decode()
    return shown


def command_of(pid: int) -> str:
    """Return the name of a process's program; none if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


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
        self.assertRegex(deployed["event"], "^deployed version=1$")
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
        self.assertEqual(get(address, "/exit?4")[0], 502)
        self.daemon.wait_idle("f")
        lines = self.documents("logs", "f", "--failed")         # of which -n counts the invocations
        self.assertEqual(lines[:2], [last_words, failed])
        for count in (1, 2, 3):
            self.assertEqual(self.documents("logs", "f", "--failed", "-n", str(count)), lines[-2 * count:])
        text = self.daemon.faas("logs", "f", "--failed").stdout
        self.assertRegex(text, r"\A(\S+ \w+ \| about to exit\n\S+ \w+ > outcome=no-answer [^\n]+\n){2}\Z")

    def test_failed_start_with_what_its_container_printed(self):
        address = self.daemon.deploy("f")
        (self.daemon.rootfs("f") / "misbehave").write_text("exit\n")
        self.assertEqual(get(address)[0], 502)
        *printed, failed = self.documents("logs", "f", "--failed")
        self.assertEqual(failed["outcome"], "start-failed")
        self.assertEqual({line["container"] for line in printed}, {failed["container"]})
        self.assertIn("I refuse to start", printed[0]["text"])
        info = self.daemon.info("f")
        self.assertEqual((info["state"], info["error"]), ("failing", failed["reason"]))
        self.assertRegex(self.daemon.faas("info", "f").stdout, "(?m)^state: +failing\nerror: +the handler exited ")
        self.assertEqual(self.daemon.faas("list").stdout.splitlines()[1].split()[2], "failing")
        self.assertIn(b'\nfaasd_function_ready{function="f"} 0\n', self.daemon.api("GET", "/metrics")[1])
        (self.daemon.rootfs("f") / "misbehave").unlink()
        self.assertEqual(get(address)[0], 200)
        self.assertEqual((self.daemon.info("f")["state"], "error" in self.daemon.info("f")), ("ready", False))
        self.assertIn(b'\nfaasd_function_ready{function="f"} 1\n', self.daemon.api("GET", "/metrics")[1])

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
        self.daemon.deploy("g")
        get(address, "/before")
        self.daemon.wait_idle("f")
        log, events = self.follow("logs", "f"), self.follow("events", "f", "-n", "1")
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
            self.daemon.set("g", "--queue", str(number))
            self.daemon.set("f", "--queue", str(number))
            event = json.loads(events.stdout.readline())
            self.assertEqual((event["function"], event["event"]), ("f", "set"))
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

    def events(self, *arguments: str) -> list[tuple[str, str, str]]:
        return [(event["function"], event["event"], event["by"]) for event in self.documents("events", *arguments)]

    def test_what_became_of_functions_and_by_whom(self):
        self.daemon.deploy("f")
        self.daemon.deploy("f", support.handler_image(label="2"))
        self.daemon.set("f", "--queue", "1")
        result = subprocess.run([*FAAS, *API, "--token-file", str(self.token_file), "rollback", "f"],
                                capture_output=True, check=False)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.daemon.deploy("other")
        *rest, (name, event, by) = self.events("f")
        self.assertEqual([*rest, (name, event, by)], [event for event in self.events() if event[0] == "f"])
        self.assertEqual(self.events("f", "-n", "1"), [(name, event, by)])
        self.assertEqual(self.events("nobody"), [])
        self.assertEqual(rest, [("f", "deployed", "root"), ("f", "replaced", "root"), ("f", "set", "root")])
        self.assertEqual((name, event), ("f", "rolled-back"))
        self.assertRegex(by, r"^token@127\.0\.0\.1:\d+$")
        self.assertEqual((self.daemon.state_dir / "events.log").stat().st_mode & 0o777, 0o600)
        last = self.documents("events", "f", "-n", "1")[0]
        self.assertEqual((last["version"], last["address"]), (self.daemon.versions("f")[0], "10.0.0.10"))
        self.daemon.stop()
        for image in (self.daemon.state_dir / "images/f").glob("*/image.json"):
            image.write_text("{}")
        self.daemon.start()
        broken = self.documents("events", "f", "-n", "1")[0]
        self.assertEqual((broken["event"], broken["by"]), ("broken", "faasd"))
        self.assertEqual(broken["reason"], self.daemon.info("f")["error"])
        self.daemon.remove("f")
        self.assertEqual(self.events()[-1], ("f", "removed", "root"))
        self.assertRegex(self.daemon.faas("events", "-n", "1").stdout, r"\A\S+Z f > removed by=root\n\Z")

    def test_back_off(self):
        self.daemon.deploy("g", None, "--warm", "1")
        container, = self.daemon.wait_warm("g", 1)
        (self.daemon.rootfs("g") / "misbehave").write_text("exit\n")
        for pid in support.container_pids(self.daemon, container):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.events()[-1] == ("g", "back-off", "faasd"), "it backs off")
        wait_until(lambda: "the handler exited with status" in self.daemon.info("g")["error"], "it is said")
        self.assertEqual(self.daemon.info("g")["state"], "failing")
        (self.daemon.rootfs("g") / "misbehave").unlink()
        self.daemon.wait_warm("g", 1)
        self.assertEqual(self.daemon.info("g")["state"], "ready")


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

    def wait_shown(self, text: str) -> str:
        """Read until the terminal has been sent a text, since the last time; return what came before it."""
        before, _, self.shown = read_until(self.master, self.shown, text).partition(text)
        return before

    def test_keys_sort_and_end_it_within_80_columns(self):
        process = self.start("top", "-d", "0.1")
        screens = ""
        for keys, wanted in (("", "(by RATE)"), ("\x1b[D\x1b[D", "(by REQUESTS)"), ("\x1b[C", "(by ERRORS)"),
                             ("x\x1bOD", "(by REQUESTS)"), ("\x1b[B\x1b[A", "(by REQUESTS)")):
            os.write(self.master, keys.encode())
            screens += self.wait_shown(wanted) + wanted
        os.write(self.master, b"q")
        self.wait_shown("\x1b[?25h\x1b[?1049l")
        self.assertEqual(process.wait(), 0)
        self.assertEqual(termios.tcgetattr(self.slave), self.before)
        self.assertIn("\x1b[7m", screens)
        self.assertIn("p50/p95/p99", screens)
        plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screens.replace("\x1b[H", "\n"))
        self.assertLessEqual(max(map(len, plain.replace("\r", "").split("\n"))), 80)
        self.assertNotRegex(plain, r"\^\[|x$")          # no key was echoed

    def test_terminal_is_as_before_however_it_ends(self):
        for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
            process = self.start("top", "-d", "0.1", NO_COLOR="1")
            self.assertNotIn("\x1b[7m", self.wait_shown("scroll") + self.wait_shown("scroll"))
            self.assertNotEqual(termios.tcgetattr(self.slave), self.before)
            process.send_signal(number)
            self.wait_shown("\x1b[?25h\x1b[?1049l")
            self.assertEqual(process.wait(), status)
            self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_tables_fit_the_terminal(self):
        for command in ("list", "stats"):
            process = self.start(command)
            self.assertEqual(process.wait(), 0)
            rows = [self.wait_shown("\r\n") for _ in range(3)]         # the kernel passes it on in pieces
            self.assertEqual([row[:6] for row in rows], ["NAME  ", "aaaaaa", "b     "])
            self.assertIn("a… ", rows[1])
            self.assertLessEqual(max(map(len, rows)), 80)
            self.assertIn("a" * 63, self.daemon.faas(command).stdout)       # where there is no terminal, all is there

    def test_numbers_are_rounded(self):
        document = json.loads(self.daemon.faas("stats", "--json").stdout)
        values = re.findall(r"[0-9]+\.([0-9]+)", json.dumps(document))
        self.assertLessEqual(max(map(len, values)), 6)


def shell_image() -> bytes:
    """Return the image of a handler that has a shell as well, and what these tests have it run."""
    files = {path.lstrip("/"): Path(path).read_bytes() for program in ("/bin/dash", "/bin/cat", "/bin/stty")
             for path in (program, *support.libraries(program))}
    files["bin/sh"] = files.pop("bin/dash")
    files.update({"bad/interpreter": "#!/nope\n", "bad/junk": b"junk\n\0\1"})
    plain = archives.layer(archives.file("bad/plain", "text", mode=0o644))
    return support.handler_image(files=files, layers=[plain], Env=["LABEL=1", "FROM=image"])


# It ignores every signal that it can, fills all of --pids, and each of its processes prints without end.
HOSTILE = (support.PERL, "-e", '$SIG{$_} = "IGNORE" for qw(TERM INT HUP PIPE); fork for 1 .. 30; '
                               'syswrite STDOUT, ("x" x 63) . "\\n" while 1')


class ExecCase(LookCase):
    """What is run, and by whom; afterwards there is nothing that was not there before."""

    def deploy(self, *options: str) -> str:
        address = self.daemon.deploy("f", shell_image(), *options)
        wait_until(lambda: not os.listdir(self.daemon.run_dir / "containers"), "the one that proved it has ended")
        daemon, before = self.daemon.process.pid, support.footprint(self.daemon)
        self.addCleanup(lambda: self.daemon.process.pid != daemon or wait_until(
            lambda: support.footprint(self.daemon, before) == before, "nothing is left"))
        return address

    def exec(self, *arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        result = self.daemon.faas("exec", *arguments, stdin=stdin, check=False)
        return result.returncode, result.stdout, result.stderr

    def begin(self, *arguments: str) -> subprocess.Popen:
        """Start a command whose client is not read from."""
        process = client(self.daemon, "exec", "f", *arguments, stdin=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        wait_until(lambda: support.container_pids(self.daemon), "it runs")
        return process


class Exec(ExecCase):
    def test_streams_and_status(self):
        self.deploy("-e", "OWN=1", "--user", "1234:5678", "--hostname", "name")
        script = 'echo $FROM $OWN $(cat /etc/hostname) $(stty size 2>/dev/null); echo bad >/dev/stderr; exit 7'
        self.assertEqual(self.exec("f", "--", "sh", "-c", script), (7, "image 1 name\n", "bad\n"))
        seen = self.exec("-e", "OWN=a b", "-e", "NEW=", "f", "--", "cat", "/proc/self/environ")[1].split("\0")
        self.assertEqual([entry for entry in seen if entry.startswith(("FROM=", "OWN=", "NEW=", "FAAS_FUNCTION="))],
                         ["FROM=image", "OWN=a b", "FAAS_FUNCTION=f", "NEW="])
        self.assertEqual(self.exec("f", "-i", stdin=b"echo $$; exit 3"), (3, "1\n", ""))       # /bin/sh
        self.assertEqual(self.exec("f", "--", "cat", stdin=b"not for it"), (0, "", ""))
        self.assertEqual(self.exec("f", "--", "sh", "-c", "sh -c 'kill -9 $$'")[0], 137)
        for command, expected, words in (
                ("nonsense", 127, "it is not in the image's PATH"), ("/bad/none", 127, "it is not in the image"),
                ("/bad/interpreter", 127, "its interpreter (the #! line), or what loads it, is not in the image"),
                ("/bad/junk", 126, "it is no program for this machine, and has no #! line"),
                ("/bad/plain", 126, "it is not executable, or is a directory"), ("/bad", 126, "is a directory")):
            # On a terminal crun may lose the last words of a process that ends at once.
            lost = support.RUNTIME == "crun" and command in ("/bad/interpreter", "/bad/junk")
            for terminal in ((),) if lost else ((), ("-t",)):
                with self.subTest((command, *terminal)):
                    status, output, error = self.exec(*terminal, "f", "--", command)
                    self.assertEqual((status, output), (expected, ""), error)
                    self.assertRegex(error, f"\\Afaas: cannot run '{command}': [^\\n]*{re.escape(words)}\n\\Z")
        words = "exec: /bad/none: no such file or directory"             # of a program's own
        self.assertEqual(self.exec("f", "--", "sh", "-c", f"echo '{words}'; exit 1"), (1, f"{words}\n", ""))
        words = "exec /bin/sh: permission denied"       # even if it looks just like the runtime's, and nothing follows
        waiting = self.begin("-i", "--", "sh", "-c", f"echo '{words}'; cat")
        self.assertEqual(waiting.stdout.readline(), f"{words}\n")
        words = "sh: exec: line 1: ./none: Permission denied"            # as BusyBox says it
        self.assertEqual(self.exec("f", "--", "sh", "-c", f"echo '{words}'; exit 126"), (126, f"{words}\n", ""))
        self.daemon.deploy("shell-less", support.small_image(), "--warm", "0")
        status, _, error = self.exec("shell-less")
        self.assertEqual((status, error), (127, "faas: cannot run '/bin/sh': it is not in the image: "
                                                "say faas exec NAME -- PROGRAM\n"))
        self.daemon.remove("shell-less")
        data = os.urandom(2_000_000)
        copy = subprocess.run([*FAAS, "--socket", self.daemon.socket, "exec", "-i", "f", "--", "cat"], input=data,
                              capture_output=True, check=False)
        self.assertEqual((copy.returncode, copy.stdout == data, copy.stderr), (0, True, b""))
        with open("/dev/null", "w") as output:
            copy = subprocess.run([*FAAS, "--socket", self.daemon.socket, "exec", "-i", "f", "--", "cat"], stdin=output,
                                  capture_output=True, text=True, check=False)
        self.assertEqual((copy.returncode, copy.stderr), (1, "faas: cannot read stdin: Bad file descriptor\n"))
        self.assertEqual(self.daemon.info("f")["requests"], 0)
        last = self.documents("events", "-n", "1")[0]
        self.assertEqual((last["event"], last["command"], last["by"]), ("exec", "cat", "root"))
        for arguments, words in ((("f", "sh"), "after --: faas exec f -- sh"), (("f", "-it"), "-it needs a terminal"),
                                 (("nope",), "no function 'nope'"), (("f", "-e", "=x"), "bad environment entry"),
                                 (("f", "--json"), "no JSON document")):
            status, output, error = self.exec(*arguments)
            self.assertEqual((status in (1, 2), output, error.count("\n")), (True, "", 1), error)
            self.assertIn(words, error)

    def test_isolation_is_that_of_the_function(self):
        self.deploy("--cap-add", "CHOWN", "--memory", "64m", "--pids", "32", "--cpus", "0.5", "--read-only", "true")
        expected = json.loads(self.daemon.faas("info", "f", "--isolation", "--json").stdout)
        wait_until(lambda: not support.container_pids(self.daemon), "the container that was looked at is gone")
        process = self.begin("-i", "--", "cat")
        container = self.daemon.container().name
        pid, = wait_until(lambda: [pid for pid in support.container_pids(self.daemon) if command_of(pid) == "cat"],
                          "it is executed")
        seen = faasd.inspect_process(pid)
        seen["limits"] = faasd.Cgroups(self.daemon.run_dir).limits(f"{faasd.Cgroups(self.daemon.run_dir).group('f')}/"
                                                                   f"{container}")
        mounts = [mount for mount in expected.pop("mounts") if mount["target"] != faasd.CONTROL_SOCKET]
        self.assertEqual(seen.pop("mounts"), mounts)
        own = seen.pop("descriptors")
        self.assertEqual([name for name in own if not name.startswith("pipe:")], [])
        self.assertEqual(seen, {key: expected[key] for key in seen})
        process.communicate()
        self.assertEqual(process.returncode, 0)

    def test_out_of_memory(self):
        self.deploy("--memory", "32m")
        script = "sh -c 'A=x; while A=$A$A; do :; done'; while :; do :; done"      # goes on without what was killed
        status, _, error = self.exec("f", "--", "sh", "-c", script)
        self.assertEqual((status, error.splitlines()[-1]), (137, "faas: the command ran out of memory (--memory)"))

    def test_takes_a_place_of_the_concurrency(self):
        address = self.deploy("--concurrency", "1")
        process = self.begin("-i", "--", "cat")
        self.assertIn("all 1 places of --concurrency are taken", self.exec("f")[2])
        waiting = request(address)
        self.addCleanup(waiting.close)
        wait_until(lambda: self.daemon.info("f")["queued"] == 1, "a client waits")
        process.communicate()
        self.assertTrue(read_all(waiting).startswith(b"HTTP/1.1 200"))
        self.daemon.wait_idle("f")

    def test_over_tcp(self):
        token = self.daemon.directory / "token"
        token.touch(0o600)
        token.write_text("t" * 32)
        self.daemon.stop()
        self.addCleanup(setattr, self.daemon, "arguments", self.daemon.arguments)
        self.daemon.arguments = ("--api", "127.0.0.1:9000", "--api-token-file", str(token))
        self.daemon.start()
        self.deploy()
        result = subprocess.run([*FAAS, *API, "--token-file", str(token), "exec", "f", "-i"], capture_output=True,
                                input=b"echo $FROM; exit 4", check=False)
        self.assertEqual((result.returncode, result.stdout, result.stderr), (4, b"image\n", b""))


class ExecTerminal(ExecCase):
    def test_size_keys_and_status(self):
        self.deploy()
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        before = termios.tcgetattr(slave)
        shown = ""

        def resize(lines: int, columns: int) -> None:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

        def type_(keys: str, wanted: str) -> None:
            nonlocal shown
            os.write(master, keys.encode())
            shown = read_until(master, shown, wanted).partition(wanted)[2]
        resize(30, 90)
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        process = subprocess.Popen([*FAAS, "--socket", str(self.daemon.socket), "exec", "-it", "f"], stdin=slave,
                                   stdout=slave, stderr=slave, env=environment)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        type_("", "# ")
        type_("echo $TERM; stty size\n", "xterm\r\n30 90\r\n")
        resize(40, 100)
        process.send_signal(signal.SIGWINCH)            # as the kernel tells whoever is in front
        type_("until [ \"$(stty size)\" = '40 100' ]; do :; done; echo 're''sized'\n", "resized\r\n")
        type_("sh -c 'trap \"echo in\"\"terrupted; exit\" INT; echo st\"\"arted; while :; do :; done'\n", "started\r\n")
        type_("\x03", "interrupted\r\n")
        os.write(master, b"exit 5\n")
        self.assertEqual(process.wait(), 5)
        self.assertEqual(termios.tcgetattr(slave), before)

    def test_none_is_left(self):
        """In a file system of terminals that has room for one."""
        mount = ("mount -t devpts -o newinstance,max=1,ptmxmode=666 none /dev/pts && "
                 "mount --bind /dev/pts/ptmx /dev/ptmx")
        program = """if True:
            import contextlib, os, faasd
            os.openpty()
            try:
                faasd.Streams(True, True, (24, 80), contextlib.ExitStack())
            except OSError as error:
                print(error.strerror)"""
        result = subprocess.run(["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c",
                                 program], capture_output=True, text=True, check=False,
                                env={**os.environ, "PYTHONPATH": str(support.program())})
        self.assertEqual(result.stdout, "no terminal is left on this machine (kernel.pty.max)\n", result.stderr)


class ExecHostile(ExecCase):
    def test_flood_that_nobody_takes_and_client_that_vanishes(self):
        address = self.deploy("--pids", "24")
        for options in ((), ("-t",)):
            process = self.begin(*options, "--", *HOSTILE)
            wait_until(lambda: len(support.container_pids(self.daemon)) >= 24, "it has all its processes")
            self.assertEqual(get(address)[0], 200)
            self.assertEqual(self.exec("f", "--", "sh", "-c", "echo other"), (0, "other\n", ""))
            process.kill()
            process.wait()
            wait_until(lambda: not support.container_pids(self.daemon), "it is gone")
        self.assertNotIn("error", self.daemon.log())

    def test_flood_whose_function_is_removed(self):
        self.deploy("--pids", "24")
        process = self.begin("--", *HOSTILE)
        wait_until(lambda: len(support.container_pids(self.daemon)) >= 24, "it has all its processes")
        self.daemon.remove("f")
        _, error = process.communicate()
        self.assertRegex(error, r"faas: the command was ended: faasd is stopping, or the function is being removed\n\Z")
        self.assertEqual(process.returncode, 1)
        self.assertNotIn("does not end", self.daemon.log())

    def test_frames_that_are_none(self):
        self.deploy()
        for data in (b"\x07\0\0\0\x01x", b"\0\xff\xff\xff\xff", b"\x03\0\0\0\x01x"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(support.READY_SECONDS)
                sock.connect(str(self.daemon.socket))
                sock.sendall(b"POST /functions/f/exec?stdin=1&cmd=cat HTTP/1.1\r\nUpgrade: faasd-frames\r\n\r\n")
                self.assertIn(b" 101 ", sock.recv(65536))
                sock.sendall(data)
                self.assertIn(b"the command was ended", read_all(sock))
        status, body = self.daemon.api("POST", "/functions/f/exec")     # a proxy may have dropped the header
        self.assertEqual((status, b"a proxy on the way" in body), (426, True), body)
        self.assertEqual(self.daemon.api("GET", "/functions/f/exec")[0], 405)

    def test_end_of_the_daemon(self):
        self.deploy()
        for end in (lambda: self.daemon.stop(), lambda: self.daemon.stop(signal.SIGHUP), self.daemon.kill):
            process = self.begin("-i", "--", "sh", "-c", 'trap "" TERM HUP; echo up; cat; while :; do :; done')
            self.assertEqual(process.stdout.readline(), "up\n")         # else the runtime may complain of its end
            end()
            _, error = process.communicate()
            self.assertEqual(process.returncode, 1)
            self.assertRegex(error, r"\Afaas: (the command was ended: faasd is stopping|faasd went away)[^\n]*\n\Z")
            self.daemon.start()
            self.assertEqual((support.container_pids(self.daemon), support.list_containers(self.daemon)), (set(), []))
        self.assertEqual(self.exec("f", "--", "sh", "-c", "echo again"), (0, "again\n", ""))


if __name__ == "__main__":
    unittest.main()
