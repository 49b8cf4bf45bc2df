"""The control API over TCP, and what both listeners do against web pages, slow clients and too many of them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path

import support
from clients import connect, exchange, read_all
from support import wait_until

ADDRESS = ("127.0.0.1", 9000)
URL = "http://127.0.0.1:9000"
TOKEN = "correct-horse-battery-staple"
HOST = "Host: 127.0.0.1:9000\r\n"
BEARER = f"Authorization: Bearer {TOKEN}\r\n"
ARCHIVE = "Content-Type: application/x-tar\r\n"


def token_file(test) -> str:
    """Return the path of a file with TOKEN in it."""
    directory = support.temporary_directory()
    test.addClassCleanup(shutil.rmtree, directory)
    path = directory / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return str(path)


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers in lower case, and body of one answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    return int(line.split(" ")[1]), {k.lower(): v for k, _, v in (header.partition(": ") for header in lines)}, body


class TcpCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.token_file = token_file(cls)
        cls.daemon = support.Daemon("--api", "127.0.0.1:9000", "--api-token-file", cls.token_file, "--max-uploads", "2",
                                    "--api-host", "Faas.example").start()
        cls.addClassCleanup(cls.daemon.close)

    def status(self, request: str, target=ADDRESS) -> int:
        return split(exchange(target, request))[0]

    def tearDown(self):
        self.assertNotIn("Traceback", self.daemon.log())
        self.assertEqual(self.daemon.api("GET", "/healthz")[0], 200)

    def settled(self) -> None:
        """Wait until no thread of the daemon serves a client any more."""
        tasks = Path(f"/proc/{self.daemon.process.pid}/task")
        wait_until(lambda: not list((self.daemon.state_dir / "tmp").iterdir()), "no upload is under way")
        wait_until(lambda: not connections(self.daemon.process.pid), "no connection is open")
        self.assertTrue(tasks.exists())


def connections(pid: int) -> list[str]:
    """Return a process's TCP connections to ADDRESS as /proc/net/tcp has them, less the listener."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{ADDRESS[1]:04X}"
    return [line[2] for line in lines if line[1].endswith(port) and line[3] != "0A" and line[9] in inodes]


class Token(TcpCase):
    def test_every_request_needs_it(self):
        for head in ("GET /healthz", "GET /metrics", "GET /functions", "GET /nothing", "POST /functions/f",
                     "DELETE /functions/f", "PUT /functions/f", "OPTIONS /functions/f", "HEAD /"):
            for header in ("", "Authorization:\r\n", "Authorization: Bearer\r\n", "Authorization: Bearer \r\n",
                           f"Authorization: Bearer {TOKEN[:-1]}\r\n", f"Authorization: Bearer {TOKEN}x\r\n",
                           f"Authorization: Bearer {TOKEN.upper()}\r\n", f"Authorization: Basic {TOKEN}\r\n",
                           f"Authorization: {TOKEN}\r\n", "Authorization: Bearer \xe4\xff\r\n", BEARER + BEARER,
                           f"Authorization: Bearer x\r\n{BEARER}", f"X-Authorization: Bearer {TOKEN}\r\n"):
                with self.subTest(head=head, header=header):
                    request = f"{head} HTTP/1.1\r\n{HOST}{header}\r\n".encode("latin-1")
                    status, headers, body = split(exchange(ADDRESS, request))
                    self.assertEqual((status, headers["www-authenticate"]), (401, "Bearer"))
                    self.assertEqual(headers["connection"], "close")
                    self.assertIn("" if head == "HEAD /" else "Authorization: Bearer TOKEN", body.decode())
        self.assertNotIn(TOKEN, self.daemon.log())

    def test_with_it(self):
        for header in (BEARER, f"authorization: bearer   {TOKEN}  \r\n"):
            answer = exchange(ADDRESS, f"GET /healthz HTTP/1.1\r\n{HOST}{header}\r\n" * 3)
            self.assertEqual(answer.count(b"HTTP/1.1 200 OK"), 3)
        self.assertEqual(self.status(f"GET /metrics HTTP/1.1\r\n{HOST}{BEARER}\r\n"), 200)
        self.assertEqual(self.status(f"PUT / HTTP/1.1\r\n{HOST}{BEARER}\r\n"), 501)

    def test_it_is_asked_for_on_every_request_of_a_connection(self):
        answer = exchange(ADDRESS, f"GET /healthz HTTP/1.1\r\n{HOST}{BEARER}\r\nGET /healthz HTTP/1.1\r\n{HOST}\r\n")
        self.assertEqual(re.findall(rb"HTTP/1.1 (\d+)", answer), [b"200", b"401"])

    def test_the_unix_socket_needs_none(self):
        self.assertEqual(self.status("GET /healthz HTTP/1.1\r\n\r\n", self.daemon.socket), 200)

    def test_refusal_of_a_large_upload_can_be_read(self):
        """A reset for what we do not read would destroy the answer."""
        with connect(ADDRESS) as client:
            client.sendall(f"POST /functions/f HTTP/1.1\r\n{HOST}{ARCHIVE}Content-Length: 8000000\r\n\r\n".encode())
            client.sendall(bytes(8_000_000))
            self.assertEqual(split(read_all(client))[0], 401)

    def test_refusal_comes_before_the_continue(self):
        for header, status in (("", b"401"), (BEARER + "Content-Type: text/plain\r\n", b"415"), (BEARER, b"415")):
            with connect(ADDRESS) as client:
                client.sendall(f"POST /functions/f HTTP/1.1\r\n{HOST}{header}Expect: 100-continue\r\n"
                               "Content-Length: 10\r\n\r\n".encode())
                self.assertEqual(read_all(client)[9:12], status)


class WebPages(TcpCase):
    """What a page in a browser on this machine can send: the headers are those that browsers set themselves."""

    def test_host(self):
        for host, status in (
                ("127.0.0.1:9000", 200), ("127.0.0.1", 200), ("localhost:9000", 200), ("LOCALHOST", 200),
                ("[::1]:9000", 200), ("127.0.0.2:1234", 200), ("faas.example", 200), ("FAAS.example:443", 200),
                ("evil.example:9000", 421), ("10.0.0.10:9000", 421), ("0.0.0.0:9000", 421), ("127.1", 421),
                ("localhost.evil.example", 421), ("localhost.", 421), ("127.0.0.1.evil.example", 421), ("", 421),
                (":9000", 421), ("localhost@evil.example", 421), ("localhost:9000/x", 421), ("[127.0.0.1]x", 421)):
            with self.subTest(host):
                self.assertEqual(self.status(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n{BEARER}\r\n"), status)
        self.assertEqual(self.status(f"GET /healthz HTTP/1.1\r\n{BEARER}\r\n"), 421)
        self.assertEqual(self.status(f"GET /healthz HTTP/1.1\r\n{HOST}Host: evil.example\r\n{BEARER}\r\n"), 421)

    def test_requests_of_a_browser(self):
        page = "Origin: http://evil.example\r\n"
        fetch = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n"
        form = "Content-Type: {}\r\nContent-Length: 3\r\n\r\na=b"
        post = "POST /functions/f?memory=64m HTTP/1.1\r\n"
        requests = {
            "preflight": f"OPTIONS /functions/f HTTP/1.1\r\n{page}Access-Control-Request-Method: POST\r\n"
                         "Access-Control-Request-Headers: authorization,content-type\r\n\r\n",
            "fetch": f"{post}{page}{fetch}Content-Length: 3\r\n\r\nabc",
            "fetch as an archive": f"{post}{page}{fetch}{ARCHIVE}Content-Length: 3\r\n\r\nabc",
            "sandboxed frame": f"{post}Origin: null\r\n{ARCHIVE}Content-Length: 3\r\n\r\nabc",
            "same origin after rebinding": f"{post}Origin: {URL}\r\n{ARCHIVE}Content-Length: 3\r\n\r\nabc",
            "image": f"GET /functions HTTP/1.1\r\n{fetch}\r\n",
            "form": post + page + form.format("application/x-www-form-urlencoded"),
            "old browser's form": post + form.format("application/x-www-form-urlencoded"),
            "form with a file": post + form.format("multipart/form-data; boundary=x"),
            "plain form": post + form.format("TEXT/plain; charset=utf-8"),
            "old browser's rollback": "POST /functions/f/rollback HTTP/1.1\r\n"
                                      + form.format("application/x-www-form-urlencoded"),
            "beacon": f"{post}Content-Length: 3\r\n\r\nabc",
            "two types": f"{post}Content-Type: text/plain\r\n{ARCHIVE}Content-Length: 3\r\n\r\nabc"}
        for target, more in ((self.daemon.socket, ""), (ADDRESS, HOST), (ADDRESS, HOST + BEARER)):
            for what, request in requests.items():
                with self.subTest(f"{what} to {target} with {more}"):
                    status, headers, body = split(exchange(target, request.replace("\r\n", f"\r\n{more}", 1)))
                    self.assertIn(status, {401} if more == HOST else {403, 415}, body)
                    self.assertIn("error", json.loads(body))
                    self.assertEqual([name for name in headers if name.startswith("access-control")], [])
        self.assertEqual(self.daemon.api("GET", "/functions"), (200, b'{"functions": []}\n'))
        options = f"OPTIONS /functions/f HTTP/1.1\r\n{HOST}{BEARER}\r\n"
        status, headers, _ = split(exchange(ADDRESS, options))
        self.assertEqual((status, headers["allow"]), (405, "GET, POST, PATCH, DELETE"))


class Requests(TcpCase):
    def test_the_log_says_who_asked(self):
        exchange(self.daemon.socket, "GET /version?hidden=1 HTTP/1.1\r\n\r\n")
        line = f"pid={os.getpid()} uid={os.getuid()} gid={os.getgid()} 'GET /version' 200"
        wait_until(lambda: line in self.daemon.log(), line)
        with connect(ADDRESS) as client:
            client.sendall(f"GET /version HTTP/1.1\r\n{HOST}{BEARER}\r\n".encode())
            client.recv(1)
            line = f"peer=127.0.0.1:{client.getsockname()[1]} 'GET /version HTTP/1.1' 200"
        wait_until(lambda: line in self.daemon.log(), line)

    def test_a_body_that_nobody_reads_is_no_request(self):
        hidden = f"GET /version HTTP/1.1\r\n{HOST}{BEARER}\r\n"
        for framing in (f"Content-Length: {len(hidden)}\r\n\r\n{hidden}",
                        f"Transfer-Encoding: chunked\r\n\r\n{len(hidden):x}\r\n{hidden}\r\n0\r\n\r\n"):
            for head in ("GET /healthz", "DELETE /functions/none", "POST /functions/none/rollback", "GET /metrics"):
                with self.subTest(head=head, framing=framing[:20]):
                    answer = exchange(ADDRESS, f"{head} HTTP/1.1\r\n{HOST}{BEARER}{framing}")
                    self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
                    self.assertEqual(split(answer)[1]["connection"], "close")

    def test_logs_for_http_1_0_are_not_chunked(self):
        self.daemon.deploy("f")
        status, headers, body = split(exchange(ADDRESS, f"GET /functions/f/logs HTTP/1.0\r\n{HOST}{BEARER}\r\n"))
        self.assertEqual((status, headers.get("transfer-encoding")), (200, None))
        self.assertRegex(body, rb"\A20\d\d-.* deployed ")
        self.daemon.faas("rm", "f")

    def test_too_many_uploads(self):
        self.addCleanup(self.settled)
        image = support.handler_image()
        head = f"{ARCHIVE}Content-Length: {len(image)}\r\n\r\n"
        with connect(ADDRESS) as one, connect(self.daemon.socket) as two:
            one.sendall(f"POST /functions/one?warm=0 HTTP/1.1\r\n{HOST}{BEARER}{head}".encode())
            two.sendall(f"POST /functions/two?warm=0 HTTP/1.1\r\n{head}".encode())
            wait_until(lambda: len(list((self.daemon.state_dir / "tmp").iterdir())) == 2, "both uploads have begun")
            status, headers, body = split(exchange(ADDRESS, f"POST /functions/three HTTP/1.1\r\n{HOST}{BEARER}{head}"))
            self.assertEqual((status, headers["retry-after"]), (503, "5"))
            self.assertIn("2 deploys are under way already", body.decode())
            result = self.daemon.faas("new", "three", stdin=image, check=False)
            self.assertRegex(result.stderr, r"\Afaas: 2 deploys are under way already[^\n]*\n\Z")
            for client in (one, two):
                client.sendall(image)
                self.assertEqual(client.recv(12), b"HTTP/1.1 201")
        self.daemon.deploy("three", image)
        self.daemon.faas("rm", "one", "two", "three")


class Limits(unittest.TestCase):
    """Constants are lowered, for a test must not wait as long as a client may."""

    def start(self, **constants) -> support.Daemon:
        daemon = support.Daemon("--api", "127.0.0.1:9000", "--api-token-file", token_file(type(self)),
                                constants=constants)
        self.addCleanup(daemon.close)
        return daemon.start()

    def test_too_many_connections(self):
        daemon = self.start(MAX_CONNECTIONS=3, LINGER_SECONDS=0.2)
        for target, other, head in ((ADDRESS, daemon.socket, HOST + BEARER), (daemon.socket, ADDRESS, "")):
            request = f"GET /healthz HTTP/1.1\r\n{head}\r\n"
            with contextlib.ExitStack() as stack:
                for _ in range(3):
                    stack.enter_context(connect(target)).sendall(b"GET ")
                for _ in range(3):
                    with connect(target) as silent:
                        self.assertEqual(read_all(silent), b"")
                with connect(other) as client:              # which has room of its own
                    client.sendall(f"GET /healthz HTTP/1.1\r\n{'' if head else HOST + BEARER}\r\n".encode())
                    self.assertEqual(client.recv(12), b"HTTP/1.1 200")
            wait_until(lambda target=target, request=request: self.is_answered(target, request), "there is room")
        daemon.wait_log("turned away: over 3 connections")

    def is_answered(self, target, request: str) -> bool:
        try:
            return exchange(target, request).startswith(b"HTTP/1.1 200")
        except OSError:                     # it is closed before we have sent all
            return False

    def test_a_flood_of_connections(self):
        """It fills neither the daemon nor its log."""
        daemon = self.start(MAX_CONNECTIONS=3, LINGER_SECONDS=1.0, WARNING_SECONDS=1e9)
        before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(connect(ADDRESS))
            wait_until(lambda: "clients that are not admitted are left out" in daemon.log(), "many have been seen")
            self.assertEqual(daemon.api("GET", "/healthz")[0], 200)
            wait_until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) < before + 20, "they are closed")
        wait_until(lambda: self.is_answered(ADDRESS, f"GET /version HTTP/1.1\r\n{HOST}{BEARER}\r\n"), "there is room")
        self.assertEqual(split(exchange(ADDRESS, f"GET / HTTP/1.1\r\n{HOST}\r\n"))[0], 401)
        daemon.wait_log("'GET /version HTTP/1.1' 200")
        self.assertLessEqual(daemon.log().count("peer="), support.faasd.MAX_WARNINGS + daemon.log().count("' 200"))
        wait_until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= before, "all is closed")
        self.assertEqual(split(exchange(ADDRESS, f"GET /healthz HTTP/1.1\r\n{HOST}{BEARER}\r\n"))[0], 200)

    def test_drops_of_a_head_do_not_hold_a_thread(self):
        daemon = self.start(MAX_HEADER_SECONDS=0.5, LINGER_SECONDS=0.2)
        for target in (ADDRESS, daemon.socket):
            with connect(target) as client, self.assertRaises(OSError):
                client.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
                deadline = time.monotonic() + support.READY_SECONDS
                while time.monotonic() < deadline:          # until the daemon has closed it
                    client.sendall(b"x")
                    time.sleep(0.05)
        with connect(ADDRESS) as silent:
            self.assertEqual(read_all(silent), b"")
        with connect(ADDRESS) as kept:
            kept.sendall(f"GET /healthz HTTP/1.1\r\n{HOST}{BEARER}\r\n".encode())
            self.assertEqual(read_all(kept).count(b"200 OK"), 1)

    def test_an_upload_may_take_longer_than_a_head(self):
        daemon = self.start(MAX_HEADER_SECONDS=1.0)
        image = support.handler_image()
        with connect(ADDRESS) as client:
            client.sendall(f"POST /functions/f?warm=0 HTTP/1.1\r\n{HOST}{BEARER}{ARCHIVE}"
                           f"Content-Length: {len(image)}\r\n\r\n".encode())
            wait_until(lambda: list((daemon.state_dir / "tmp").iterdir()), "the upload has begun")
            time.sleep(1.5)
            client.sendall(image)
            self.assertEqual(client.recv(12), b"HTTP/1.1 201")

    def test_descriptors_over_1024(self):
        """select(2) knows none of them, and the daemon of many functions has more."""
        opened = "for i in {10..1040}; do eval \"exec $i</dev/null\"; done; exec \"$@\""
        daemon = support.Daemon("--api", "127.0.0.1:9000", "--api-token-file", token_file(type(self)),
                                wrapper=("bash", "-c", opened, "bash"), constants={"FOLLOW_SECONDS": 0.1})
        self.addCleanup(daemon.close)
        daemon.start()
        daemon.deploy("f")
        with connect(ADDRESS) as client:
            client.sendall(f"GET /functions/f/logs?follow=1&tail=1 HTTP/1.1\r\n{HOST}{BEARER}\r\n".encode())
            received = b""
            while b"deployed" not in received:
                received += client.recv(65536)
            time.sleep(0.5)             # some looks at whether we are still there
            daemon.post("PATCH", "/functions/f?memory=256m")
            while b"> set " not in received:
                received += client.recv(65536)
            self.assertNotIn(b"error", received)


class Usage(unittest.TestCase):
    def refuse(self, *arguments: str) -> str:
        """Start a daemon that must not come up; return its last line."""
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        command = [sys.executable, support.TOP / "faasd.py", "--state-dir", directory / "s", "--run-dir",
                   directory / "r", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=support.READY_SECONDS, check=False)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        return result.stderr.splitlines()[-1]

    def test_addresses(self):
        for text in ("9000", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:x", "127.0.0.1:70000", "::1:9000",
                     "[::1]", "[::1:9000", "localhost:9000", ":9000", "[127.0.0.1]x:9000", ""):
            with self.subTest(text):
                self.assertRegex(self.refuse("--api", text, "--api-token-file", "/x"), "bad (address|port)")

    def test_token_files(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        os.mkfifo(directory / "fifo", 0o600)
        for name, mode, content in (("short", 0o600, "fifteen-letters"), ("readable", 0o644, TOKEN),
                                    ("group", 0o640, TOKEN), ("empty", 0o600, ""),
                                    ("blanks", 0o600, f"{TOKEN} {TOKEN}"), ("binary", 0o600, f"{TOKEN}\xff")):
            (directory / name).write_text(content)
            (directory / name).chmod(mode)
        for name, words in (("none", "No such file"), (".", "Is a directory"), ("fifo", "no regular file"),
                            ("short", "16 characters or more"), ("empty", "16 characters"), ("blanks", "one word"),
                            ("binary", "ASCII"), ("readable", "others: chmod 600"),
                            ("group", "others: chmod 600")):
            with self.subTest(name):
                line = self.refuse("--api", "127.0.0.1:9000", "--api-token-file", str(directory / name))
                self.assertIn(words, line)
                self.assertRegex(line, r"\Afaasd: .*(make one with|chmod 600)")
        self.assertIn("make one with: (umask 077;", self.refuse("--api", "127.0.0.1:9000"))
        self.assertIn("with --api HOST:PORT only", self.refuse("--api-token-file", "/x"))

    def test_port_is_taken(self):
        with socket.create_server(ADDRESS):
            line = self.refuse("--api", "127.0.0.1:9000", "--api-token-file", token_file(type(self)))
        self.assertEqual(line, f"faasd: cannot listen on {URL}: Address already in use; choose another --api HOST:PORT")
        line = self.refuse("--api", "192.0.2.1:9000", "--api-token-file", token_file(type(self)))
        self.assertIn("Cannot assign requested address", line)
        for port, options in (("80", ()), ("9000", ("--port", "9000"))):
            line = self.refuse("--api", f"0.0.0.0:{port}", *options, "--api-token-file", "/x")
            self.assertRegex(line, f"--api 0.0.0.0:{port} .*--port {port} ")

    def test_the_command_that_makes_a_token(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        command = re.search(r"make one with: (\(.*\)) \(see", self.refuse("--api", "127.0.0.1:9000"))[1]
        subprocess.run(["sh", "-c", command.replace("FILE", str(directory / "token"))], check=True)
        for host in ("[::1]", "0.0.0.0"):
            with support.Daemon("--api", f"{host}:9000", "--api-token-file", str(directory / "token")) as daemon:
                self.assertIn(f"http://{host}:9000", daemon.log())
                url = f"http://{host.replace('0.0.0.0', '127.0.0.1')}:9000"
                out = faas("--api", url, "--token-file", str(directory / "token"), "list")
                self.assertEqual((out.returncode, out.stderr), (0, ""))


def faas(*arguments: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess:
    """Run the client; options of its own in env."""
    result = subprocess.run([*support.FAAS, *arguments], input=stdin, capture_output=True,
                            env={**os.environ, **env}, check=False)
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


class Client(TcpCase):
    def run_faas(self, *arguments: str, stdin: bytes = b"") -> str:
        result = faas("--api", URL, *arguments, stdin=stdin, FAASD_TOKEN=TOKEN)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return result.stdout

    def test_every_command(self):
        image = support.handler_image()
        self.assertEqual(self.run_faas("new", "f", "--warm", "0", stdin=image), "✓ Deployed f at 10.0.0.10\n")
        self.assertEqual(support.get("10.0.0.10")[0], 200)
        self.assertEqual(self.run_faas("ip", "f"), "10.0.0.10\n")
        self.run_faas("new", "f", "--warm", "0", stdin=support.handler_image(label="2"))
        self.assertEqual(self.run_faas("versions", "f").count("\n"), 3)
        self.assertIn("Rolled back f", self.run_faas("rollback", "f"))
        self.assertIn("Set options of f", self.run_faas("set", "f", "--memory", "256m"))
        self.assertIn("10.0.0.10", self.run_faas("list"))
        self.assertRegex(self.run_faas("url", "f"), "^http://10.0.0.10\n$")
        self.assertRegex(self.run_faas("info", "f"), "\nmemory: +256m\n")
        self.assertIn("NAME", self.run_faas("stats"))
        self.assertIn("f", self.run_faas("top", "-n", "1", "-d", "0.1"))
        self.assertIn("deployed", self.run_faas("logs", "f"))
        self.assertIn("faasd", self.run_faas("version"))
        command = [*support.FAAS, "logs", "-f", "f", "--token-file", self.token_file]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "FAAS_API": f"{URL}/"}) as follow:
            self.assertIn(b"deployed", follow.stdout.readline())
            support.get("10.0.0.10", "/marked")
            self.assertTrue(any(b"/marked" in line for line in follow.stdout))
            follow.send_signal(signal.SIGINT)
        self.assertEqual(follow.returncode, 130)
        self.assertEqual(self.run_faas("rm", "f"), "f\n")

    def test_one_line_for_each_error(self):
        token = ("--token-file", self.token_file)
        with socket.create_server(("127.0.0.1", 9001)) as other:
            threading.Thread(target=serve_something_else, args=(other,), daemon=True).start()
            for arguments, status, words in (
                    (("--api", URL, "list"), 2, "needs the daemon's token: --token-file FILE, or $FAASD_TOKEN"),
                    (("--api", URL, "--token-file", "/none", "list"), 1, "cannot read /none: No such file"),
                    (("--api", URL, "--token-file", "/", "list"), 1, "cannot read /: Is a directory"),
                    (("--api", URL, *token, "--socket", "/x", "list"), 2, "exclude each other"),
                    (("--api", "https://127.0.0.1:9000", *token, "list"), 2, "no TLS"),
                    (("--api", "127.0.0.1:9000", *token, "list"), 2, "write http://HOST:PORT"),
                    (("--api", "http://127.0.0.1:x", *token, "list"), 2, "write http://HOST:PORT"),
                    (("--api", f"{URL}/x", *token, "list"), 2, "write http://HOST:PORT"),
                    (("--api", f"http://{TOKEN}@127.0.0.1", *token, "list"), 2, "write http://HOST:PORT"),
                    (("--api", "http://a b", *token, "list"), 2, "write http://HOST:PORT"),
                    (("--api", "http://127.0.0.1:9002", *token, "list"), 1, "refused (does it run with --api?)"),
                    (("--api", "http://no.such.invalid", *token, "list"), 1, "reach faasd at http://no.such"),
                    (("--api", f"http://{'a' * 70}.b", *token, "list"), 1, "cannot reach faasd"),
                    (("--api", "http://127.0.0.1:9001", *token, "list"), 1,
                     "something other than faasd answers there (status 404)")):
                with self.subTest(arguments):
                    result = faas(*arguments)
                    self.assertEqual((result.returncode, result.stdout), (status, ""), result.stderr)
                    self.assertRegex(result.stderr, r"\Afaas: [^\n]+\n\Z")
                    self.assertIn(words, result.stderr)
        self.assertIn("write http", faas("list", FAAS_API="x").stderr)
        self.assertEqual(faas("pack", "--help", FAAS_API="x").returncode, 0)

    def test_wrong_token(self):
        for stdin in (b"x", bytes(30 << 20)):           # the second is refused before all of it is sent
            result = faas("--api", URL, "new", "f", stdin=stdin, FAASD_TOKEN="wrong")
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, r"\Afaas: this needs `Authorization[^\n]* \(--token-file FILE, or "
                                            r"\$FAASD_TOKEN\)\n\Z")


def serve_something_else(listener: socket.socket) -> None:
    with listener.accept()[0] as client:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\n<html>")


if __name__ == "__main__":
    unittest.main()
