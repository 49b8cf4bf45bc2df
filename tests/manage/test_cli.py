"""The client: usage, exit statuses, and how it takes a daemon that answers early, late or not at all."""

import contextlib
import itertools
import json
import os
import pty
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import unittest

import support

FAAS = support.FAAS
FILE = [sys.executable, str(support.TOP / "faas")]      # for what may depend on how Python runs a file


def faas(*arguments: str, stdin: bytes | None = b"", env: dict | None = None) -> subprocess.CompletedProcess:
    result = subprocess.run([*FAAS, *arguments], input=stdin, capture_output=True, env={**os.environ, **(env or {})},
                            check=False)
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


def read_to_the_end(master: int) -> bytes:
    """Return what comes from a terminal until its other side is closed, and close it."""
    shown = b""
    with contextlib.suppress(OSError):          # EIO: it is
        while data := os.read(master, 65536):
            shown += data
    os.close(master)
    return shown


class Usage(unittest.TestCase):
    def test_one_line_and_status_2(self):
        for arguments, words in (
                (("--json",), "required: COMMAND"), (("nonsense",), "invalid choice"),
                (("stat",), "did you mean stats?"), (("new",), "required: NAME"),
                (("new", "Bad_Name"), "use 1 to 63 of a-z"), (("ip", "a" * 64), "use 1 to 63"),
                (("rm",), "required: NAME"),
                (("new", "f", "--memory", "lots"), "write 512m"), (("new", "f", "--memory", "-1"), "write 512m"),
                (("new", "f", "--cpus", "x"), "write 0.5"), (("new", "f", "--pids", "0"), "whole number"),
                (("new", "f", "--timeout", "1d"), "write 500ms"), (("logs", "f", "-n", "x"), "whole number"),
                (("new", "f", "-e", "=x"), "bad environment entry"),
                (("list", "--", "x"), "exec and pack take a command"), (("exec", "f", "sh"), "after --: faas exec f"),
                (("set", "f"), "nothing to change"), (("set", "f", "--warm", "x"), "write auto"),
                (("new", "f", "--queue", "-1"), "from 0 on"), (("top", "--json"), "faas --json stats"),
                (("list", "extra"), "unrecognized arguments"),
                (("exec", "f", "sh", "-c", "x", "-la"), "after --: faas exec f -- sh -c x -la\n"),
                (("proxy-config",), "required: caddy|nginx|haproxy (see"), (("rollback", "f", ""), "write a number"),
                (("rollback", "f", "zz"), "write a number"), (("top", "-d", "9" * 14), "no more than 99999"),
                (("top", "-n", "9" * 5000), "from 1 to 999999999"), (("logs", "f", "-n", "9" * 14), "to 999999999"),
                (("--json", "save", "f"), "no JSON document"), (("--json", "pack", "f"), "no JSON document"),
                *((("pack", "f", "--tag", tag), "write NAME, NAME:TAG") for tag in ("A B", "a@b:c:d", "", "a:")),
                (("--api", "http://127.0.0.1:1", "--token-file", "/dev/null", "list"), "/dev/null is empty: write")):
            with self.subTest(arguments):
                result = faas(*arguments, stdin=b"x")
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                self.assertRegex(result.stderr, r"\Afaas: [^\n\\]+\n\Z")     # nor \n as an escape
                self.assertIn(words, result.stderr)

    def test_help_and_version(self):
        """As a newcomer asks for them; and a command in a help text can be copied, however narrow the terminal is."""
        version = subprocess.run([*FILE, "--version"], capture_output=True, text=True, check=True)
        self.assertEqual(version.stdout, f"faas {runpy.run_path(str(support.TOP / 'faas'))['__version__']}\n")
        self.assertEqual([faas(*words).stdout for words in ((), ("help",))], [faas("--help").stdout] * 2)
        self.assertEqual(faas("help", "new").stdout, faas("new", "--help").stdout)
        self.assertEqual(faas("--json", "help").stdout, faas("--help").stdout)
        self.assertEqual(faas("--socket", "/nowhere", "help", "new").stdout, faas("new", "--help").stdout)
        self.assertEqual((faas("help", "nope").returncode, faas().returncode), (2, 0))
        for command, example in (("new", "docker save my-image | faas new my-function"),
                                 ("pack", "faas pack script.sh | faas new NAME --contract stdio")):
            out = faas("help", command, env={"COLUMNS": "45"}).stdout
            self.assertIn(f"\n    {example}\n", out)
            self.assertNotRegex(out, "[a-z]-\n")

    def test_who_may_not_ask_is_told_before_that_the_image_is_empty(self):
        result = faas("--socket", "/nonexistent/faasd.sock", "new", "f", stdin=b"")
        self.assertIn("cannot reach faasd", result.stderr)

    def test_pack_refuses_what_is_no_python(self):
        for file in (support.TOP / "README.md", "/bin/true"):
            result = faas("pack", str(file))
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr, r"\Afaas: cannot pack \S+: it is not Python \(line \d+\), and has no .*\n")

    def test_stdin_is_a_terminal(self):
        master, slave = pty.openpty()
        try:
            result = subprocess.run([*FAAS, "new", "f"], stdin=slave, capture_output=True, text=True, check=False)
        finally:
            os.close(master)
            os.close(slave)
        self.assertEqual(result.returncode, 2)
        self.assertIn("docker save IMAGE | faas new NAME", result.stderr)

    def test_help_names_every_command_and_option(self):
        out = faas("--help").stdout
        for command in ("new", "ip", "url", "help", "list", "info", "logs", "rm", "version", "pack", "set", "versions",
                        "rollback", "stats", "top", "exec", "events"):
            self.assertRegex(out, rf"\n    {command} ")
            self.assertEqual(faas(command, "--help").returncode, 0)
        options = ("--env", "--env-file", "--memory", "--cpus", "--pids", "--timeout", "--start-timeout",
                   "--concurrency", "--queue", "--queue-timeout", "--warm", "--reuse")
        for command, more in (("new", ("--file", "--tag")), ("set", ("--unset-env",))):
            out = faas(command, "--help").stdout
            for option in (*options, *more):
                self.assertIn(option, out)

    def test_files_that_cannot_be_read(self):
        for arguments, words in (
                ("-f /nonexistent", "/"), ("-f /", "/"), ("-f ''", "'': No such file"), ("--env-file ''", "'': No"),
                ("--env-file /nonexistent", "/"), ("--env-file /dev/zero", "/dev/zero: it is over 64 KiB"),
                ("--secret x=/dev/zero", "/dev/zero: it is over 64 KiB"),
                ("--api http://127.0.0.1:1 --token-file /dev/zero", "/dev/zero: it is over 64 KiB")):
            result = subprocess.run(        # with so little memory that a file without an end has one
                ["bash", "-c", f'ulimit -v 1000000; "$@" {arguments}', "bash", *FILE, "new", "f"], input="x",
                capture_output=True, text=True, check=False)
            self.assertEqual((result.returncode, result.stderr.count("\n")), (1, 1), result.stderr)
            self.assertIn(f"cannot read {words}", result.stderr)

    def test_no_daemon(self):
        for command in (("list",), ("new", "f"), ("rm", "f")):
            result = faas("--socket", "/nonexistent/faasd.sock", *command, stdin=b"x")
            self.assertEqual(result.returncode, 1)
            self.assertIn("cannot reach faasd at /nonexistent/faasd.sock: No such file or directory "
                          "(is it running? sudo ./faasd.py)", result.stderr)
        result = faas("version", env={"FAAS_SOCKET": "/nonexistent"})
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stdout, "^client   faas ")

    def test_output_that_nobody_takes(self):
        """Closed, full, or a pipe whose reader has gone: one line at most, and never a traceback."""
        for command in (("new", "--help"), ("version",), ("new", "f"), ("rm", "f"), ("nonsense",)):
            for streams in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "2>&1 | true"):
                with self.subTest(command, streams=streams):
                    result = subprocess.run(
                        ["bash", "-c", f'"$@" {streams}', "bash", *FILE, *command], stdin=subprocess.DEVNULL, text=True,
                        env={**os.environ, "FAAS_SOCKET": "/nonexistent"}, capture_output=True, check=False)
                    self.assertLessEqual(result.stderr.count("\n"), 2, result.stderr)
                    self.assertNotRegex(result.stderr + result.stdout, "Traceback|Exception")

    def test_stdout_is_closed(self):
        for command in ("list", f"pack {support.HANDLER}"):
            result = subprocess.run(f"'{FILE[0]}' '{FILE[1]}' {command} >&-", shell=True, capture_output=True,
                                    text=True, check=False)
            self.assertEqual((result.returncode, result.stderr), (2, "faas: stdout is closed: use >/dev/null\n"))

    def test_stdin_is_closed(self):
        for command in ("new f", "new f -f -"):
            result = subprocess.run(f"'{FILE[0]}' '{FILE[1]}' {command} <&-", shell=True, capture_output=True,
                                    text=True, check=False)
            self.assertEqual((result.returncode, result.stdout), (2, ""))
            self.assertRegex(result.stderr, r"\Afaas: an image archive is needed: [^\n]+\n\Z")

    def test_full_disk_for_the_output(self):
        for command in ("version", f"pack {support.HANDLER}"):
            result = subprocess.run(f"'{FILE[0]}' '{FILE[1]}' {command} >/dev/full", shell=True, capture_output=True,
                                    env={**os.environ, "FAAS_SOCKET": "/nonexistent"}, text=True, check=False)
            self.assertEqual(result.returncode, 1)
            self.assertTrue(result.stderr.endswith("faas: cannot write the output: No space left on device\n"),
                            result.stderr)

    def test_interrupt_during_the_imports(self):
        """A module in front of the standard library's sends the signal; and what ignores it goes on ignoring it."""
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "tomllib.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
        for prefix, status, out in (("", -signal.SIGINT, False), ("trap '' INT; ", 0, True)):
            result = subprocess.run(["bash", "-c", f'{prefix}exec "$@"', "bash", *FILE, "--version"], text=True,
                                    env={**os.environ, "PYTHONPATH": str(directory)}, capture_output=True, check=False)
            self.assertEqual((result.returncode, result.stderr, result.stdout != ""), (status, "", out))

    def test_broken_output_pipe_is_quiet(self):
        out = subprocess.run(f"'{FILE[0]}' '{FILE[1]}' new --help | true", shell=True, capture_output=True, text=True,
                             check=False)
        self.assertEqual(out.stderr, "")


class ScriptedDaemon(threading.Thread):
    """Accepts one connection, reads a request up to some point and says what it is told: no real daemon does so on
    demand."""

    def __init__(self, path, answer: bytes, read: int):
        super().__init__()
        self.request = b""
        self._answer, self._read = answer, read
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.start()

    def run(self):
        connection, _ = self._listener.accept()
        with connection, self._listener:
            while len(self.request) < self._read and (data := connection.recv(65536)):
                self.request += data
            with contextlib.suppress(BrokenPipeError):      # it was interrupted
                connection.sendall(self._answer)


def response(status: int, document: dict) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class Conversation(unittest.TestCase):
    def setUp(self):
        self.directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, self.directory)
        self.socket = self.directory / "s"

    def talk(self, answer: bytes, *arguments: str, read: int = 1, stdin: bytes = b"x") -> subprocess.CompletedProcess:
        daemon = ScriptedDaemon(self.socket, answer, read)
        result = faas("--socket", str(self.socket), *arguments, stdin=stdin)
        daemon.join()
        self.request = daemon.request
        return result

    def test_early_refusal_of_a_long_upload(self):
        result = self.talk(response(409, {"error": "a deploy is under way"}), "new", "f", stdin=bytes(50 << 20))
        self.assertEqual((result.returncode, result.stderr), (1, "faas: a deploy is under way\n"))

    def test_output_of_the_handler_is_shown_and_escaped(self):
        result = self.talk(response(422, {"error": "it exited", "output": ["one", "two \x1b[2J"]}), "new", "f")
        self.assertEqual(result.stderr, "faas: it exited\n  one\n  two \\x1b[2J\n")

    def test_daemon_that_dies(self):
        for answer in (b"", b"HTTP/1.1 200", b"HTTP/1.1 500 X\r\nContent-Length: 5\r\n\r\nxx"):
            with self.subTest(answer):
                result = self.talk(answer, "new", "f")
                self.assertEqual((result.returncode, result.stderr.count("\n")), (1, 1), result.stderr)
                self.assertIn("faasd went away before it had answered", result.stderr)
                self.socket.unlink()            # before the next one

    def test_warnings_of_a_deploy_are_shown(self):
        document = {"name": "f", "address": "10.0.0.10", "warnings": ["3 pipes (first: /\x1b[2J)", "5 owners"]}
        result = self.talk(response(201, document), "new", "f")
        self.assertEqual((result.returncode, result.stderr), (0, "faas: warning: 3 pipes (first: /\\x1b[2J)\n"
                                                                 "faas: warning: 5 owners\n"))

    def test_what_a_daemon_says_reaches_no_terminal_raw(self):
        """Of an older daemon, say, that let every tag pass: neither a forged row, nor a full screen, nor a command."""
        moment = "2026-01-01T00:00:00+00:00"
        for tag, shown in (("app\nforged  *", r"app\nforged  *"), ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),
                           ("\u202e\x9b2J\r", r"\u202e\x9b2J\r"), ("x" * 200_000, "x" * 99 + "…")):
            answer = response(200, {"versions": [{"version": "0123", "current": True, "deployed": moment, "size": 5,
                                                  "digest": "", "image": tag}]})
            out = self.talk(answer, "versions", "f").stdout
            self.socket.unlink()
            self.assertEqual(out.count("\n"), 2)
            self.assertTrue(out.endswith(f"5 B           {shown}\n"), out[-200:])
            self.assertEqual(json.loads(self.talk(answer, "--json", "versions", "f").stdout)[0]["image"], tag)
            self.socket.unlink()
        self.assertEqual(self.talk(response(404, {"error": "no \x1b[2J"}), "info", "f").stderr, "faas: no \\x1b[2J\n")

    def test_daemon_of_0_1_0(self):
        """It knows no URL, and its logs are text."""
        self.assertEqual(self.talk(response(200, {"address": "10.0.0.10"}), "url", "f").stdout, "http://10.0.0.10\n")
        self.socket.unlink()
        result = self.talk(b"HTTP/1.1 200 X\r\nContent-Length: 4\r\n\r\none\n", "--json", "logs", "f")
        self.assertEqual((result.returncode, result.stderr),
                         (1, "faas: the daemon is too old to print logs as JSON: upgrade it\n"))

    def test_something_other_than_faasd(self):
        """It answers 200 with a document of its own, as Docker's socket does; but a proxy may hide who answers."""
        documents = itertools.cycle(({}, {"functions": [5], "options": 5, "versions": None}))
        for command in ("version", "versions f", "df", "list", "stats", "info f", "ip f", "info f --isolation", "rm f",
                        "url f", "rollback f", "set f --memory 1g", "new f", "proxy-config caddy", "export compose f"):
            with self.subTest(command):
                result = self.talk(response(200, next(documents)), *command.split())
                self.socket.unlink()            # before the next one
                self.assertEqual((result.returncode, result.stderr), (
                    1, "faas: something other than faasd answers there (status 200): check the address\n"))
        for body in (b"[" * 200_000, b'{"error": "x", "output": 5}'):
            answer = b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            self.assertRegex(self.talk(answer, "df").stderr, r"\Afaas: something other [^\n]*\n\Z")
            self.socket.unlink()
        own = response(200, {}).replace(b"X\r\n", b"X\r\nServer: faasd/0.2.0\r\n")
        self.assertIn("KeyError", self.talk(own, "df").stderr)          # a fault of ours is not hidden
        self.socket.unlink()
        proxied = response(200, {"address": "10.0.0.10"}).replace(b"X\r\n", b"X\r\nServer: nginx\r\n")
        self.assertEqual(self.talk(proxied, "ip", "f").stdout, "10.0.0.10\n")

    def test_exec_through_a_proxy_that_drops_the_upgrade(self):
        for status in (200, 204):
            with self.subTest(status):
                result = self.talk(response(status, {}), "exec", "f")
                self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
                self.assertRegex(result.stderr, rf"\Afaas: a proxy on the way [^\n]* \(status {status}\)\n\Z")
                self.socket.unlink()            # before the next one

    def test_rm_of_nothing_prints_nothing(self):
        result = self.talk(response(404, {"error": "no function"}), "rm", "nope")
        self.assertEqual((result.returncode, result.stdout, result.stderr), (1, "", "faas: no function\n"))

    def test_interrupted_upload_has_changed_nothing(self):
        daemon = ScriptedDaemon(self.socket, b"", 1 << 20)
        process = subprocess.Popen([*FAAS, "--socket", str(self.socket), "new", "f"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdin.write("x")
        process.stdin.flush()
        support.wait_until(lambda: daemon.request.endswith(b"x\r\n"), "the upload has begun")
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(support.READY_SECONDS), 130)
        daemon.join()
        self.assertEqual(process.communicate(), ("", "faas: interrupted: nothing has changed\n"))

    def test_logs_reach_no_terminal_raw(self):
        body = "one\ttab ü\n\x1b[2J two\r\n".encode() + b"\xff\xc3\n"
        head = b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.assertEqual(self.talk(head + body, "logs", "f").stdout, "one\ttab ü\n\\x1b[2J two\\r\n\\xff\\xc3\n")

    def test_options_are_sent_as_they_are_typed(self):
        env_file = self.directory / "env"
        env_file.write_text("# comment\nA=1\n\n  B=2 = 3\nMINE\nNOT_SET\n")
        os.environ["MINE"] = "from outside"
        self.addCleanup(os.environ.pop, "MINE")
        result = self.talk(
            response(201, {"name": "f", "address": "10.0.0.10"}), "new", "f", "--tag", "a:b", "--env-file",
            str(env_file), "-e", "C=ü", "-e", "MINE", "-e", "NOT_SET", "--memory", "64m", "--timeout", "500ms",
            "--", "-x", "--", "y z")
        self.assertEqual(result.stderr.splitlines(), [
            "faas: warning: NOT_SET is not set here, so it is left out: write NOT_SET=value"] * 2)
        query = re.search(rb"POST /functions/f\?(\S+) HTTP", self.request)[1].decode()
        self.assertEqual(query, "tag=a%3Ab&env=A%3D1&env=B%3D2+%3D+3&env=MINE%3Dfrom+outside&env=C%3D%C3%BC"
                                "&env=MINE%3Dfrom+outside&memory=64m&timeout=500ms&cmd=-x&cmd=--&cmd=y+z")
        self.assertIn(b"Transfer-Encoding: chunked", self.request)

    def test_environment_files(self):
        """As editors of Windows write them, and as pipes; a name with a blank in it is none."""
        daemon = ScriptedDaemon(self.socket, response(201, {"name": "f", "address": "10.0.0.10"}), 1)
        done = subprocess.run(
            ["bash", "-c", '"$@" --env-file <(printf "\\xef\\xbb\\xbfA=1\\r\\nB= 2 ") --secret x=<(echo hidden)', "sh",
             *FAAS, "--socket", self.socket, "new", "f"], input="x", capture_output=True, text=True, check=False)
        daemon.join()
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn(b"POST /functions/f?env=A%3D1&env=B%3D+2+ HTTP", daemon.request)
        self.assertIn(b"Faasd-Secrets: x=aGlkZGVuCg==\r\n", daemon.request)
        env_file = self.directory / "env"
        for line in ("export A=1", "A =1", "A ", "=1"):
            env_file.write_text(f"# comment\n{line}\n")
            result = faas("new", "f", "--env-file", str(env_file), stdin=b"x")
            self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
            self.assertIn(f"bad environment entry {line!r} ({env_file}, line 2): write KEY=value", result.stderr)

    def test_file_has_a_length(self):
        (self.directory / "image").write_bytes(b"abc")
        self.talk(response(201, {"name": "f", "address": "10.0.0.10"}), "new", "f", "-f", str(self.directory / "image"))
        self.assertIn(b"Content-Length: 3\r\n", self.request)

    def test_check_mark_in_any_locale(self):
        result = self.talk(response(201, {"name": "f", "address": "10.0.0.10"}), "new", "f")
        self.assertEqual(result.stdout, "✓ Deployed f at 10.0.0.10\n")

    def test_progress_on_a_terminal_only(self):
        answer = response(201, {"name": "f", "address": "10.0.0.10"})
        self.assertEqual(self.talk(answer, "new", "f", stdin=b"x").stderr, "")
        self.socket.unlink()
        image = self.directory / "image"
        image.write_bytes(bytes(3 << 20))
        daemon = ScriptedDaemon(self.socket, answer, 3 << 20)
        master, slave = pty.openpty()
        process = subprocess.Popen([*FAAS, "--socket", str(self.socket), "new", "f", "-f", str(image)],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave)
        os.close(slave)
        shown = read_to_the_end(master)
        self.assertEqual(process.wait(), 0)
        daemon.join()
        self.assertRegex(shown.decode(), r"uploading \[#+ *\] +\d+%  \d\.\d MiB  [\d.]+ [KMG]iB/s")
        self.assertIn("3.0 MiB uploaded; unpacking and starting", shown.decode())


class WithDaemon(unittest.TestCase):
    def test_json_is_one_document(self):
        with support.Daemon() as daemon:
            def document(*arguments: str):
                return json.loads(daemon.faas("--json", *arguments).stdout)
            self.assertEqual(document("list"), [])
            out = daemon.faas("new", "f", "--json", stdin=support.handler_image()).stdout
            self.assertEqual(json.loads(out)["address"], "10.0.0.10")
            self.assertEqual([f["name"] for f in document("list")], ["f"])
            self.assertEqual(document("ip", "f"), "10.0.0.10")
            self.assertEqual(document("info", "f")["state"], "ready")
            self.assertEqual(len(document("logs", "f")), 1)
            self.assertEqual(set(document("version")), {"client", "daemon"})
            self.assertEqual(document("set", "f", "--reuse", "2")["options"]["reuse"], 2)
            self.assertEqual([f["requests"] for f in document("stats", "f")["functions"]], [0])
            self.assertEqual([v["current"] for v in document("versions", "f")], [True, False])
            self.assertEqual(document("url", "f"), "http://10.0.0.10")
            self.assertEqual(document("rm", "f"), {"removed": ["f"]})

    def test_set_versions_rollback(self):
        with support.Daemon() as daemon:
            daemon.deploy("f", None, "-e", "A=1", "-e", "B=1")
            out = daemon.faas("set", "f", "-e", "A=2", "--unset-env", "B", "--queue", "0", "--", "x y").stdout
            self.assertEqual(out, "✓ Set options of f at 10.0.0.10 (version 2)\n")
            options = daemon.info("f")["options"]
            self.assertEqual((options["env"], options["queue"], options["cmd"]), (["A=2"], 0, ["x y"]))
            daemon.deploy("f", support.handler_image(label="2"))
            rows = daemon.faas("versions", "f").stdout.splitlines()
            self.assertEqual(rows[0].split(), ["VERSION", "CURRENT", "CREATED", "ACTIVATED", "SIZE", "DIGEST", "IMAGE",
                                               "OPTIONS"])
            before = {entry["version"]: entry for entry in json.loads(daemon.faas("--json", "versions", "f").stdout)}
            self.assertEqual([entry["created"] for entry in before.values()],
                             [entry["deployed"] for entry in before.values()])
            self.assertEqual([row.split()[0] for row in rows[1:]], ["3", "2", "1"])
            self.assertEqual(rows[1].split()[1], "*")
            self.assertTrue(rows[2].endswith("  queue 0, warm 0, 1 variable and the command 'x y'"), rows[2])
            self.assertEqual(daemon.faas("rollback", "f").stdout, "✓ Rolled back f to version 2\n")
            self.assertEqual(daemon.info("f")["options"]["env"], ["A=2"])
            self.assertEqual(daemon.faas("rollback", "f", "1").stdout, "✓ Rolled back f to version 1\n")
            self.assertEqual(sorted(daemon.info("f")["options"]["env"]), ["A=1", "B=1"])
            entry = json.loads(daemon.faas("--json", "versions", "f").stdout)[0]
            self.assertEqual((entry["version"], entry["created"]), (1, before[1]["created"]))
            self.assertGreater(entry["deployed"], before[3]["deployed"])
            for version, words in (("99", "has no version '99' to go back to"), ("1", "runs version 1 already")):
                result = daemon.faas("rollback", "f", version, check=False)
                self.assertEqual((result.returncode, result.stderr.count("\n")), (1, 1), result.stderr)
                self.assertIn(words, result.stderr)

    def test_new_keeps_options_unless_they_are_named_or_reset(self):
        """What it says of them; an empty `--` is the image's command again; set makes versions too, but not forever."""
        with support.Daemon("--port", "8080") as daemon:
            def new(*arguments: str) -> str:
                return daemon.faas("new", "f", "--warm", "0", *arguments, stdin=support.handler_image()).stdout
            self.assertEqual(new("--memory", "1g", "-e", "A=1", "-e", "B=1", "--read-only", "--", "x"),
                             "✓ Deployed f at 10.0.0.10:8080\n")
            self.assertEqual(new("-e", "C=1"), "✓ Replaced f at 10.0.0.10:8080 (version 2; kept memory 1g, read-only, "
                                               "2 variables and the command x)\n")
            self.assertEqual(new("--unset-env", "A", "--no-read-only", "--"),
                             "✓ Replaced f at 10.0.0.10:8080 (version 3; kept memory 1g and 2 variables)\n")
            options = daemon.info("f")["options"]
            self.assertEqual((options["memory"], options["env"], options["cmd"], options["read_only"]),
                             (1 << 30, ["B=1", "C=1"], [], False))
            self.assertEqual(new(), "✓ Replaced f at 10.0.0.10:8080 (version 3; kept memory 1g and 2 variables)\n")
            self.assertEqual(daemon.faas("set", "f", "--reset", "--warm", "0").stdout,
                             "✓ Set options of f at 10.0.0.10:8080 (version 4)\n")
            self.assertEqual(daemon.info("f")["options"]["env"], [])
            self.assertEqual(new("--reset", "-e", "D=1"), "✓ Replaced f at 10.0.0.10:8080 (version 5)\n")
            self.assertEqual(daemon.faas("url", "f").stdout, "http://10.0.0.10:8080\n")
            self.assertIn(" replaced version=5 address=10.0.0.10:8080 by=root\n", daemon.faas("events").stdout)
            self.assertEqual(daemon.faas("ip", "f").stdout, "10.0.0.10\n")
            self.assertIn(" 10.0.0.10:8080 ", daemon.faas("list").stdout)
            new("--user", "1:1", "--start-timeout", "20s")
            bad = support.handler_image("raise SystemExit(3)")
            result = daemon.faas("new", "f", "--warm", "0", stdin=bad, check=False)
            self.assertIn("(kept from before: start-timeout, user, env; `--reset` starts from the defaults)\n",
                          result.stderr)
            self.assertEqual(daemon.info("f")["version"], 6)
            for number in range(11):
                daemon.set("f", "-e", f"N={number}")
            self.assertEqual(daemon.versions("f"), list(range(17, 7, -1)))

    def test_statistics_for_people(self):
        with support.Daemon() as daemon:
            address = daemon.deploy("f")
            daemon.deploy("idle", support.handler_image())
            for _ in range(3):
                support.get(address)
            daemon.wait_idle("f")
            rows = [re.split("  +", row) for row in daemon.faas("stats").stdout.splitlines()]
            self.assertEqual([row[:4] for row in rows], [["NAME", "STATE", "REQUESTS", "ERRORS"],
                                                         ["f", "ready", "3", "0"], ["idle", "ready", "0", "0"]])
            self.assertRegex(rows[1][-1], r"^[\d.]+ms/[\d.]+ms/[\d.]+ms$")
            self.assertEqual(rows[2][-3:], ["-", "-", "-"])
            self.assertEqual(len(daemon.faas("stats", "f").stdout.splitlines()), 2)
            out = daemon.faas("top", "-n", "2", "-d", "0.1").stdout
            self.assertEqual(len(re.findall(r"^faasd .* 2 functions ", out, re.MULTILINE)), 2)

    def test_top_on_a_terminal_cleans_up_when_it_is_interrupted(self):
        with support.Daemon() as daemon:
            master, slave = pty.openpty()
            process = subprocess.Popen([*FAAS, "--socket", str(daemon.socket), "top", "-d", "0.1"], stdout=slave,
                                       stdin=slave, stderr=slave)
            os.close(slave)
            shown = b""
            while shown.count(b"faasd ") < 2:
                shown += os.read(master, 65536)
            process.send_signal(signal.SIGINT)
            shown += read_to_the_end(master)
            self.assertEqual(process.wait(), 130)
            self.assertTrue(shown.startswith(b"\x1b[?1049h"))
            self.assertTrue(shown.endswith(b"\x1b[?25h\x1b[?1049l"), shown[-100:])

    def test_no_image_reaches_the_terminal_raw(self):
        """Tag, command, directory and descriptors of a hostile image: each command prints as many lines as ever."""
        evil = "\x1b]52;c;aGk=\x07\x1b[2J\x9b\nforged  10.0.0.66  ready"
        source = f"""import os
for number in range(50):
    os.set_inheritable(os.open(f"/tmp/{{number:03}}" + {evil!r} + "n" * 190, os.O_CREAT), True)
print({evil!r}, flush=True)
""" + support.HANDLER.read_text()
        base = support.python_layer()
        settings = {"Entrypoint": [support.PYTHON, "/handler.py"], "Cmd": [evil, "x" * 9000],
                    "WorkingDir": f"/{evil}", "Env": ["PYTHONDONTWRITEBYTECODE=1", f"EVIL={evil}"]}
        with support.Daemon() as daemon:
            image = support.docker_archive([base, support.layer({"handler.py": source})], settings, evil)
            daemon.deploy("f", image, "--warm", "1")
            for command, lines in (("list", 2), ("versions f", 2), ("stats", 2), ("top -n 1 -d 0.01", 5),
                                   ("info f", None), ("info f --isolation", None), ("logs f", None)):
                out = daemon.faas(*command.split()).stdout
                with self.subTest(command):
                    self.assertEqual([line for line in out.split("\n") if not line.replace("\t", "").isprintable()], [])
                    self.assertNotRegex(out, "(?m)^ ?forged")
                    self.assertLess(max(map(len, out.split("\n"))), 5000)
                    if lines:
                        self.assertEqual(out.count("\n"), lines, out)
            report = daemon.post("GET", "/functions/f/isolation")["descriptors"]
            self.assertEqual(len([name for name in report if evil in name]), 50)
            image = support.docker_archive([support.layer({"x": ""})], {"Cmd": ["x"]}, "t" * 200_000)
            result = daemon.faas("new", "long", stdin=image, check=False)
            self.assertRegex(result.stderr, r"\Afaas: the image's tag is over 512 characters: t{255}…\n\Z")

    def test_info_for_people(self):
        with support.Daemon() as daemon:
            daemon.deploy("f", support.handler_image(), "-e", "A=b c", "--timeout", "0")
            out = daemon.faas("info", "f").stdout
            for line in ("address:       10.0.0.10:80", "state:         ready", "memory:        512m",
                         "timeout:       none", "start-timeout: 10s", "env:           A=***"):
                self.assertIn(line + "\n", out)
            self.assertIn("env:           'A=b c'\n", daemon.faas("info", "f", "--show-env").stdout)
            for options, shown in (((), "A=***"), (("--show-env",), "A=b c")):
                document = json.loads(daemon.faas("info", "f", "--json", *options).stdout)
                self.assertEqual(document["options"]["env"], [shown])


if __name__ == "__main__":
    unittest.main()
