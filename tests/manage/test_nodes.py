"""faas --node: several daemons by their names, changed and shown together, whatever one of them does."""

import contextlib
import http.client
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import threading
import unittest

import support
from support import get, wait_until

TOKEN = "correct-horse-battery-staple"
CHUNK = 1 << 20


def impatient(seconds: int) -> list[str]:
    """A faas that gives nodes up sooner than otherwise."""
    *python, program = support.FAAS
    seconds *= support.PATIENCE
    return [*python, program.replace("import faas; ", f"import faas; faas.NODE_SECONDS = {seconds}; ")]


class Home:
    """A home directory in which faas finds nodes."""

    def __init__(self, test):
        self.directory = support.temporary_directory()
        test.addClassCleanup(shutil.rmtree, self.directory)
        self.file = self.directory / ".config/faas/nodes.toml"
        self.file.parent.mkdir(parents=True)
        (self.file.parent / "token").write_text(f"{TOKEN}\n")
        (self.file.parent / "token").chmod(0o600)
        self.env = {**os.environ, "HOME": str(self.directory)}

    def write(self, **ports: int) -> None:
        self.file.write_text("".join(f'[{name}]\napi = "http://127.0.0.1:{port}"\ntoken-file = "token"\n'
                                     for name, port in ports.items()))

    def faas(self, *arguments: str, stdin: bytes = b"", program: list[str] = support.FAAS
             ) -> subprocess.CompletedProcess:
        result = subprocess.run([*program, *arguments], input=stdin, capture_output=True, env=self.env,
                                timeout=10 * support.READY_SECONDS, check=False)
        result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
        return result


class Node(threading.Thread):
    """An API that takes an upload, as far as a test lets it, and answers."""

    def __init__(self, least: int | None = None):
        """least: after so many bytes it reads no more, and does not answer either."""
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.received, self.least = 0, least
        self.may_go_on = threading.Event()
        self.start()

    def run(self):
        client, _ = self.listener.accept()
        with self.listener, client, client.makefile("rb") as file:
            http.client.parse_headers(file)             # the request's line counts as one
            while size := int(file.readline() or b"0", 16):
                self.received += len(file.read(size))
                file.readline()
                if self.least is not None and self.received >= self.least:
                    self.may_go_on.wait()
                    return
            body = json.dumps({"name": "f", "address": "10.0.0.10"}).encode()
            with contextlib.suppress(ConnectionError):          # it was interrupted
                client.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class NodesFile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.home = Home(cls)

    def test_one_line_and_status_2(self):
        good = 'api = "http://127.0.0.1:9"\ntoken-file = "token"\n'
        (self.home.file.parent / "blanks").write_text("two words")
        for text, words in (
                (None, "no node a in ~/.config/faas/nodes.toml (nodes there: none): add the three lines [a], "
                       'api = "http://HOST:8000" and token-file = "a.token"'),
                (b"\xff", "can't decode"), ("[a", "nodes.toml: "), ("a = 1", "(nodes there: none)"),
                ("[b]\n" + good + "[c]\n" + good, "no node a in ~/.config/faas/nodes.toml (nodes there: b, c): "),
                ("[a]\n" + good + "x = 1", "what is x?"), ("[a]\napi = 1", "what is api?"),
                ("[a]\n" + good.replace("http", "https"), "no TLS"), ('[a]\ntoken-file = "token"', "it has no api"),
                ("[a]\n" + good.replace("127.0.0.1", "a b"), "write http://"),
                ("[a]\n" + good.replace('"token"', '"\\u0000"'), "embedded null"),
                ("[a]\n" + good.replace('"token"', '"none"'), "none: No such file"),
                ("[a]\n" + good.replace('"token"', '"blanks"'), "token"),
                ('[a]\napi = "http://h"', "it has no token-file"),
                ("[a]\n" + good + 'address = "1 2"', "write an address")):
            with self.subTest(text):
                self.home.file.unlink(missing_ok=True)
                if text is not None:
                    self.home.file.write_bytes(text if isinstance(text, bytes) else text.encode())
                result = self.home.faas("--node", "a", "list")
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                self.assertRegex(result.stderr, r"\Afaas: [^\n]+\n\Z")
                self.assertIn(words, result.stderr)

    def test_what_does_not_go_together(self):
        self.home.write(a=9, b=9)
        for words, said in ((("logs", "f"), "logs is for one machine"), (("ip", "f"), "ip is for one machine"),
                            (("exec", "f"), "exec is for one machine"), (("version",), "version is for one machine"),
                            (("proxy-config", "nginx"), "only haproxy"), (("list", "--socket", "/x"), "each other"),
                            (("list", "--api", "http://127.0.0.1:9"), "each other"),
                            (("list", "--token-file", "/x"), "--token-file is for --api"),
                            (("list", "--node", "a/b"), "write a name")):
            with self.subTest(words):
                result = self.home.faas("--node", "a", *words, "--node", "b")
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                self.assertIn(said, result.stderr)
        self.assertIn("only haproxy", self.home.faas("proxy-config", "haproxy", "--check", "/").stderr)


class Uploads(unittest.TestCase):
    """An image is read once, and sent to all at the same time: what others do with it is of no concern to one."""

    @classmethod
    def setUpClass(cls):
        cls.home = Home(cls)

    def begin(self, *nodes: str) -> subprocess.Popen:
        words = [word for name in nodes for word in ("--node", name)]
        return subprocess.Popen([*impatient(5), *words, "new", "f"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=self.home.env)

    def test_none_is_ahead_and_little_is_in_memory(self):
        a, b = Node(), Node()
        self.home.write(a=a.port, b=b.port)
        process = self.begin("a", "b")
        for number in range(1, 4):
            process.stdin.write(bytes(CHUNK))
            process.stdin.flush()
            wait_until(lambda number=number: a.received == b.received == number * CHUNK, "both have what there is")
        process.stdin.write(bytes(60 * CHUNK))
        process.stdin.flush()
        wait_until(lambda: a.received == b.received == 63 * CHUNK, "both have all")
        self.assertLess(support.resident_memory(process.pid, "VmHWM"), 60 << 20)
        out, err = process.communicate()
        self.assertEqual((process.returncode, err), (0, b""))
        self.assertEqual(sorted(out.decode().splitlines()), [f"{name}: ✓ Deployed f at 10.0.0.10" for name in "ab"])

    def test_who_takes_no_more_is_left_behind(self):
        """One never reads on, one is not there, one answers before it has all; the last has everything."""
        stuck, good = Node(least=CHUNK), Node()
        self.addCleanup(stuck.may_go_on.set)
        with socket.create_server(("127.0.0.1", 0)) as refusing:
            def refuse() -> None:
                with refusing.accept()[0] as client:
                    client.recv(1000)
                    client.sendall(b'HTTP/1.1 409 X\r\nContent-Length: 16\r\n\r\n{"error": "no!"}')
                    while client.recv(CHUNK):
                        continue
            threading.Thread(target=refuse, daemon=True).start()
            self.home.write(stuck=stuck.port, absent=9, refusing=refusing.getsockname()[1], good=good.port)
            process = self.begin("stuck", "absent", "refusing", "good")
            out, err = process.communicate(bytes(20 * CHUNK))
        self.assertEqual((process.returncode, out.decode()), (1, "good: ✓ Deployed f at 10.0.0.10\n"), err)
        self.assertEqual(good.received, 20 * CHUNK)
        lines = sorted(err.decode().splitlines())
        self.assertEqual(len(lines), 3, lines)
        self.assertIn("absent: cannot reach faasd at http://127.0.0.1:9: Connection refused", lines[0])
        self.assertEqual(lines[1], "faas: refusing: no!")
        self.assertIn("stuck: faasd has not answered in time (timed out)", lines[2])

    def test_interrupted(self):
        a, b = Node(), Node()
        self.home.write(a=a.port, b=b.port)
        process = self.begin("a", "b")
        process.stdin.write(b"x")
        process.stdin.flush()
        wait_until(lambda: a.received == b.received == 1, "the upload has begun")
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(support.READY_SECONDS), 130)
        self.assertEqual(process.communicate()[1].decode(), "faas: interrupted: nothing has changed\n")


class Daemons(unittest.TestCase):
    """Two daemons, and a node that is not there."""

    @classmethod
    def setUpClass(cls):
        cls.home = Home(cls)
        cls.home.write(a=9001, b=9002, gone=9)
        with contextlib.ExitStack() as stack:
            cls.daemons = [stack.enter_context(support.Daemon(
                "--subnet", f"10.0.{number}.0/24", "--api", f"127.0.0.1:900{number}", "--api-token-file",
                str(cls.home.file.parent / "token"))) for number in (1, 2)]
            cls.addClassCleanup(stack.pop_all().close)

    def run_faas(self, *arguments: str, stdin: bytes = b"", status: int = 0) -> str:
        result = self.home.faas("--node", "a", *arguments, "--node", "b", stdin=stdin)
        self.assertEqual(result.returncode, status, result.stderr)
        return result.stdout

    def on_a_terminal(self, *arguments: str) -> list[str]:
        """Return the lines that faas prints there."""
        ours, terminal = pty.openpty()
        with open(ours, "rb", buffering=0) as shown:
            with open(terminal, "wb") as theirs:
                subprocess.run([*support.FAAS, *arguments], stdout=theirs, env=self.home.env, check=True)
            return shown.read(65536).decode().split()

    def check(self, lines: str, *expected: str) -> None:
        """Lines of nodes come in the order in which they have ended."""
        self.assertEqual(sorted(lines.splitlines()), [*expected])

    def test_changes_and_views(self):
        self.check(self.run_faas("new", "f", "--warm", "0", stdin=support.small_image()),
                   "a: ✓ Deployed f at 10.0.1.10", "b: ✓ Deployed f at 10.0.2.10")
        self.assertEqual([get(f"10.0.{number}.10")[1] for number in (1, 2)], ["1", "1"])
        self.check(self.run_faas("set", "f", "--memory", "256m"),
                   "a: ✓ Set options of f at 10.0.1.10 (version 2)", "b: ✓ Set options of f at 10.0.2.10 (version 2)")
        self.check(self.run_faas("rollback", "f"),
                   "a: ✓ Rolled back f to version 1", "b: ✓ Rolled back f to version 1")
        result = self.home.faas("--node", "gone", "--node", "b", "--node", "b", "set", "f", "--memory", "1g")
        self.assertEqual((result.returncode, result.stdout), (1, "b: ✓ Set options of f at 10.0.2.10 (version 3)\n"))
        self.assertRegex(result.stderr, r"\Afaas: gone: cannot reach faasd at http://127\.0\.0\.1:9: [^\n]*\n\Z")

        rows = [row.split()[:3] for row in self.run_faas("list").splitlines()]
        self.assertEqual(rows, [["NODE", "NAME", "ADDRESS"], ["a", "f", "10.0.1.10"], ["b", "f", "10.0.2.10"]])
        for words in (("list",), ("stats",), ("stats", "f")):
            document = json.loads(self.run_faas("--json", *words))
            functions = document if words == ("list",) else document["functions"]
            self.assertEqual([(one["node"], one["name"]) for one in functions], [("a", "f"), ("b", "f")])
        self.assertEqual(self.home.faas("--node", "a", "set", "g", "--memory", "1g").stderr,
                         "faas: a: no function 'g': `faas list` shows the existing ones; deploy it there with "
                         "faas --node a new g\n")
        result = self.home.faas("--node", "gone", "stats", "--node", "b")
        self.assertEqual((result.returncode, [row.split()[:2] for row in result.stdout.splitlines()]),
                         (1, [["NODE", "NAME"], ["b", "f"]]))
        out = self.home.faas("top", "-n", "1", "-d", "0.1", "--node", "a", "--node", "gone").stdout
        self.assertRegex(out, r"(?s)\Afaasd .*\ngone: cannot reach [^\n]+\n\nNODE +NAME .*\na +f ")
        documents = json.loads(self.run_faas("--json", "set", "f", "--memory", "64m", "--node", "gone", status=1))
        self.assertEqual([(one["node"], "error" in one) for one in documents],
                         [("a", False), ("gone", True), ("b", False)])

        self.assertEqual(self.home.faas("--node", "b", "ip", "f").stdout, "10.0.2.10\n")
        self.assertEqual(self.run_faas("rm", "f", "g", status=1).split("\n")[2], "")
        self.assertEqual(self.run_faas("list").count("\n"), 1)

    def test_a_frozen_node_is_named_and_holds_up_no_other(self):
        self.run_faas("new", "frozen", "--warm", "0", stdin=support.small_image())
        self.addCleanup(wait_until, lambda: "no function" in self.home.faas("--node", "b", "rm", "frozen").stderr,
                        "it has been removed")
        frozen = self.daemons[1].process
        for words, said in ((("set", "frozen", "--memory", "256m"), "Set options of"),
                            (("new", "frozen"), "Replaced"), (("rm", "frozen", "f"), "")):
            frozen.send_signal(signal.SIGSTOP)
            try:
                result = self.home.faas("--node", "a", "--node", "b", *words, stdin=support.small_image("2"),
                                        program=impatient(2))
            finally:
                frozen.send_signal(signal.SIGCONT)
            self.assertEqual(result.returncode, 1, words)
            self.assertRegex(result.stdout, rf"\Aa: (✓ {said} )?frozen[^\n]*\n\Z")
            silent = [line for line in result.stderr.splitlines() if line.startswith("faas: b: ")]
            self.assertEqual(silent, ["faas: b: faasd has not answered in time (timed out)" if "new" in words else
                                      "faas: b: the node does not answer any more. It may have done what was asked, or "
                                      "do it yet: see faas --node b list"], words)

    def test_a_node_that_takes_its_time(self):
        """An answer may take longer than a node may be silent."""
        slow = support.handler_image(f"import time; time.sleep({3 * support.PATIENCE})\n{support.HANDLER.read_text()}")
        result = self.home.faas("--node", "b", "new", "slow", "--start-timeout", "60s", stdin=slow,
                                program=impatient(2))
        self.addCleanup(self.home.faas, "--node", "b", "rm", "slow")
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_what_a_balancer_is_told(self):
        """A published port where there is one, else the address; what cannot work is refused."""
        self.run_faas("new", "f", "--warm", "0", "--timeout", "9s", stdin=support.small_image())
        self.addCleanup(self.run_faas, "rm", "f")
        text = self.run_faas("proxy-config", "haproxy", "--domain", "example.org")
        for node, place in (("a", "10.0.1.10:80"), ("b", "10.0.2.10:80")):
            self.assertIn(f"\n    server {node} {place} check inter 1s fall 2 rise 2\n", text)
        self.assertIn("\n    timeout server 30s\n", text)
        self.home.faas("--node", "a", "new", "half", "--warm", "0", stdin=support.small_image())
        result = self.home.faas("--node", "a", "--node", "b", "proxy-config", "haproxy")
        self.assertEqual((result.stdout.split("\n")[0], result.stderr),
                         ("# half is not on b", "faas: warning: half is not on b\n"))
        self.home.faas("--node", "a", "rm", "half")
        self.assertIn("http-check send meth GET uri /healthz hdr Host f.example.org\n", self.run_faas(
            "proxy-config", "haproxy", "--domain", "example.org", "--check", "/healthz"))
        self.home.faas("--node", "b", "set", "f", "--publish", "127.0.0.1:8001,127.0.0.2:8002,8080", "--timeout", "0")
        self.assertIn(' must say where others reach port 8080 of function f: address = "192.0.2.1"',
                      self.home.faas("--node", "b", "proxy-config", "haproxy").stderr)
        with self.home.file.open("a") as file:
            file.write('[c]\napi = "http://127.0.0.1:9002"\ntoken-file = "token"\naddress = "192.0.2.2"\n')
            file.write('[d]\napi = "http://127.0.0.1:9002"\ntoken-file = "token"\naddress = "fd00::1"\n')
        self.assertIn(' must say where ', self.home.faas("--node", "d", "proxy-config", "haproxy").stderr)
        text = self.home.faas("proxy-config", "haproxy", "f", "--node", "a", "--node", "c").stdout
        self.assertIn("\n    server a 10.0.1.10:80 check ", text)
        self.assertIn("\n    server c 192.0.2.2:8080 check ", text)
        self.assertIn("\n    timeout server 86400s\n", text)
        self.assertEqual(self.home.faas("--node", "c", "url", "f").stdout, "http://192.0.2.2:8080\n")
        self.assertEqual(self.on_a_terminal("--node", "c", "url", "f"), [
            "http://192.0.2.2:8080", "http://127.0.0.1:8001", "http://127.0.0.2:8002"])
        rows = [row.split()[1:5] for row in self.run_faas("list").splitlines()]
        self.assertEqual(rows, [["NAME", "ADDRESS", "PUBLISHED", "STATE"], ["f", "10.0.1.10", "-", "ready"],
                                ["f", "10.0.2.10", "127.0.0.1:8001,127.0.0.2:8002,8080", "ready"]])
        self.home.faas("--node", "b", "set", "f", "--publish", "")
        result = self.home.faas("--node", "b", "--node", "c", "proxy-config", "haproxy")
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertIn("function f at the same address, 10.0.2.10:80: give each a --subnet of its own", result.stderr)
        (self.home.file.parent / "wrong").write_text("x")
        self.home.file.write_text(self.home.file.read_text().replace('9001"\ntoken-file = "token"',
                                                                     '9001"\ntoken-file = "wrong"'))
        self.addCleanup(self.home.write, a=9001, b=9002, gone=9)
        self.assertIn("(token-file of ~/.config/faas/nodes.toml)", self.home.faas("--node", "a", "ip", "f").stderr)
        result = self.home.faas("--node", "b", "--node", "gone", "proxy-config", "haproxy")
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertIn("gone: cannot reach", result.stderr)


if __name__ == "__main__":
    unittest.main()
