"""Random nonsense for the control API, on both its listeners: it answers, or not, but nothing breaks or is left.

A few seconds of the same nonsense each time; longer, and of a seed that nobody has tried:
`sudo ./test.sh --soak 600 tests/hold/test_fuzz.py`. A failure names its seed, and FAASD_FUZZ_SEED repeats it.
"""

import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import unittest
import urllib.parse
from pathlib import Path

import archives
import faasd
import support
from support import wait_until

SECONDS = float(os.environ.get("FAASD_SOAK_SECONDS", "6"))
SEED = os.environ.get("FAASD_FUZZ_SEED", secrets.token_hex(8) if "FAASD_SOAK_SECONDS" in os.environ else "faasd")
ROUNDS = 40             # of requests at least, however slow the machine
ADDRESS = ("127.0.0.1", 9000)
TOKEN = "correct-horse-battery-staple"

METHODS = ["GET", "POST", "PATCH", "DELETE", "PUT", "HEAD", "OPTIONS", "CONNECT", "get", "", "G E T", "A" * 300]
# `good` is not among them: it has to go on answering.
NAMES = [
    "victim", "new", "new", "none", "", ".", "..", "%2e%2e%2f", "a" * 63, "a" * 64, "-", "A", "é", "%00", "%ff", "%",
    "new%0d%0aX:y", "*", "victim/..", "healthz", "\\", "new\x7f", "\U0001f600"]
RESOURCES = ["", "", "/logs", "/logs", "/stats", "/versions", "/rollback", "/x", "//", "/../..", "/%2e%2e"]
PATHS = [
    "/", "/healthz", "/version", "/metrics", "/stats", "/functions", "*", "", "//x", "http://x/healthz", "/?", "/#",
    "/%", "/[", "//[", "http://[/"]
OPTIONS = [
    "memory", "cpus", "pids", "timeout", "start_timeout", "concurrency", "queue", "queue_timeout", "warm", "reuse",
    "env", "cmd", "unset_env", "unset_cmd", "reset", "tag", "version", "tail", "since", "follow", "colour", "",
    "__class__"]
VALUES = [
    "", "0", "1", "2", "-1", "1.5", "64m", "512m", "1g", "999999999999999g", "9" * 400, "1e309", "nan", "inf",
    "auto", "10ms", "1s", "999999999h", "0x10", "١", "A=1", "=", "A", "A=\0", "\0", "A=" + "x" * 9000, "\n",
    "\r\nX: y", "é", "\ud800", "2026-01-31T12:00:00Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
    "latest", "%", "../../etc", "\x1b[2J", "/bin/sh", "true", "yesterday", "[]", "{}"]
HEADERS = [
    "Content-Length: 0", "Content-Length: 5", "Content-Length: -1", "Content-Length: 99999999999999999999",
    "Content-Length: ", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding:\tchunked", "Expect: 100-continue", "Expect: x", "Connection: close",
    "Connection: keep-alive", "Connection: upgrade", "Upgrade: h2c", "Origin: null", "Sec-Fetch-Site: none",
    "Host: evil.example", "Host: [::1", "Content-Type: text/plain", "Content-Type: x", "Content-Type: ;;=\"",
    "Authorization: Basic eDp5", "Authorization: Bearer", "X: " + "y" * 3000, "X :y", " folded", "broken", ":",
    "X: \x01", "X: é", "Range: bytes=0-", "Cookie: a=b", "If-None-Match: *", "Accept-Encoding: gzip"]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"\r\n\r\n", b"0\r\n\r\n", b"%", b"?", b"&", b"=",
    b"HTTP/1.1", b"HTTP/0.9", b"HTTP/1.0", b"HTTP/2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01", b"A" * 5000, b"ffffffffffffffff\r\n", b"Content-Length: 1\r\n",
    b"Transfer-Encoding: chunked\r\n", b"GET / HTTP/1.1\r\n\r\n"]
ENTRY_NAMES = [
    "x", "a/b/c", "/etc/passwd", "../../x", ".", "..", "", "/", "x/" * 300, "n" * 300, ".wh.x", ".wh..wh..opq",
    ".wh.", "a\0b", "etc", "link", "link/x", "\x1b[2J", b"\xff\xfe", "dev/null", "hello"]
KINDS = [b"3", b"4", b"6", b"7", b"S", b"K", b"L", b"x", b"g", b"V", b"\0", b"Z"]
RECORDS = [{"path": "y"}, {"size": "-1"}, {"mtime": "1e400"}, {"uid": "9" * 30}, {"SCHILY.xattr.user.x": "y"},
           {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.map": "0,1,0"}, {"hdrcharset": "BINARY"},
           {"linkpath": "/etc/shadow"}, {"SCHILY.xattr.security.capability": "x"}]
PROCESS = {
    "Cmd": [["/hello"], ["sh"], [], None, "x", [1], ["\0"], ["x" * 5000]], "Entrypoint": [None, ["/x"], {}, [""]],
    "Env": [None, ["A=1"], ["A"], ["=", ""], "A=1", [None], ["A=\0"]],
    "User": ["", "0", "1:2", "nobody", "-1", "9" * 20, "a:b:c", 7],
    "WorkingDir": ["", "/", "x", "/a/../../b", "/link", "\0", 5],
    "Volumes": [None, {"/data": {}}, {"/proc": {}}, {"": {}}, [], {"/link/x": {}}]}
CHANGES = [{}, {"rootfs": None}, {"rootfs": {"diff_ids": 5}}, {"os": "plan9"}, {"config": []}, {"history": 7}]


def bruise(chance: random.Random, data: bytes, tokens: list[bytes] = TOKENS) -> bytes:
    """Return data with some bytes changed, cut out, doubled or put in."""
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        at, length = chance.randrange(len(data) + 1), chance.choice([1, 1, 2, 8, 100, 2000])
        cut, rest = data[at:at + length], data[at + length:]
        kind = chance.randrange(6)
        if kind == 0:
            cut = bytes(byte ^ 1 << chance.randrange(8) for byte in cut[:4]) + cut[4:]
        elif kind == 1:
            cut = b""
        elif kind == 2:
            cut = cut * 2
        elif kind == 3:
            cut = chance.choice(tokens) + cut
        elif kind == 4:
            cut = chance.randbytes(len(cut))
        else:
            rest = rest if chance.random() < 0.8 else b""
        data = data[:at] + cut + rest
    return data


def usually(chance: random.Random, values: list):
    """Return the first of values, which is sound, or now and then another."""
    return values[0] if chance.random() < 0.9 else chance.choice(values)


class Images:
    """Image archives, some of them sound. None runs: what is in them is no program, or one that never connects."""

    def __init__(self, chance: random.Random):
        self.chance = chance

    def entry(self) -> bytes:
        chance = self.chance
        data = chance.choice([b"", b"x", b"hello\n" * 200, chance.randbytes(700)])
        kind = usually(chance, [chance.choice([b"0", b"0", b"1", b"2", b"5"]), *KINDS])
        data = data if kind in b"07S\0xgKL" else b""
        records = usually(chance, [None, *RECORDS])
        head = archives.header(
            chance.choice(ENTRY_NAMES), kind, size=usually(chance, [len(data), 0, -1, 1, 511, 10**6, 2**62, -2**40]),
            mode=usually(chance, [0o755, 0, 0o7777, -1, 2**20]), uid=usually(chance, [0, 1000, -1, 2**31, 2**32]),
            target=chance.choice(ENTRY_NAMES), device=usually(chance, [(0, 0), (1, 3), (-1, 2**20)]))
        return (archives.pax(records) if records else b"") + head + archives.padded(data)

    def layer(self) -> bytes:
        data = archives.layer(*(self.entry() for _ in range(self.chance.choice([0, 1, 2, 5, 10]))))
        return bruise(self.chance, data) if self.chance.random() < 0.1 else data

    def archive(self) -> bytes:
        chance = self.chance
        image = archives.Image([self.layer() for _ in range(chance.choice([0, 1, 1, 2, 5]))],
                               {key: usually(chance, values) for key, values in PROCESS.items()},
                               usually(chance, [("app:latest",), (), ("a", "b"), ("\x1b[2J:\n",)]),
                               usually(chance, [archives.HOST, archives.FOREIGN, "", "\n"]), usually(chance, CHANGES))
        compress = chance.choice([lambda data: data, archives.gz, archives.gz_members])
        write = chance.choice([archives.podman, archives.docker_old, archives.containerd,
                               lambda image: archives.oci(image, compress=compress),
                               lambda image: archives.docker_new(image, compress)])
        data = write(image) if image.tags else archives.oci(image, compress=compress)
        if chance.random() < 0.1:           # other keys in its JSON, of the same length
            data = re.sub(rb'"[A-Za-z]+"(?=: )', lambda match: usually(chance, [match[0], match[0].swapcase()]), data)
        data = usually(chance, [data, archives.gz(data)])
        return bruise(chance, data) if chance.random() < 0.3 else data


class Requests:
    """Requests, from sound to nonsense. more is what a listener wants of each."""

    def __init__(self, chance: random.Random, more: list[str]):
        self.chance, self.more = chance, more
        self.images = Images(chance)

    def query(self) -> str:
        chance = self.chance
        pairs = [(chance.choice(OPTIONS), chance.choice(VALUES)) for _ in range(chance.choice([0, 0, 1, 1, 2, 5]))]
        text = urllib.parse.urlencode(pairs, errors="surrogatepass")
        text = usually(chance, [text, bruise(chance, text.encode()).decode("latin-1")])
        return f"?{text}" if pairs else ""

    def target(self, method: str) -> str:
        chance = self.chance
        if chance.random() < 0.15:
            return chance.choice(PATHS) + self.query()
        names = NAMES if method != "DELETE" else NAMES[1:]
        return f"/functions/{chance.choice(names)}{chance.choice(RESOURCES)}{self.query()}"

    def body(self, data: bytes) -> tuple[list[str], bytes]:
        """Return headers and bytes of a body with one framing or another, mostly right."""
        chance = self.chance
        if chance.random() < 0.5:
            return [f"Content-Length: {len(data) + chance.choice([0] * 8 + [1, -1, 10**9])}"], data
        pieces, at = [], 0
        while at < len(data):
            size = chance.choice([1, 100, 4096, 65536])
            piece = data[at:at + size]
            pieces.append(b"%x%s\r\n%s\r\n" % (len(piece), usually(chance, [b"", b";a=b"]), piece))
            at += size
        ends = [b"0\r\n\r\n", b"", b"0\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n" + b"X: y\r\n" * 50, b"-1\r\n"]
        return ["Transfer-Encoding: chunked"], b"".join(pieces) + usually(chance, ends)

    def deploy(self) -> bytes:
        headers, data = self.body(self.images.archive())
        name = "victim" if self.chance.random() < 0.2 else "new"
        query = self.query() if self.chance.random() < 0.1 else "?start_timeout=2"
        headers = ["Content-Type: application/x-tar", *headers]
        return self.assemble("POST", f"/functions/{name}{query}", headers, data)

    def anything(self) -> bytes:
        chance = self.chance
        method = chance.choice(METHODS[:4]) if chance.random() < 0.8 else chance.choice(METHODS)
        headers, data = [], b""
        if chance.random() < 0.3:
            headers, data = self.body(chance.choice([b"", b"{}", chance.randbytes(50)]))
        return self.assemble(method, self.target(method), headers, data)

    def assemble(self, method: str, target: str, headers: list[str], data: bytes) -> bytes:
        chance = self.chance
        lines = [*(self.more if chance.random() < 0.95 else self.more[1:]), *headers,
                 *(chance.choice(HEADERS) for _ in range(chance.choice([0, 0, 0, 1, 2])))]
        chance.shuffle(lines)
        if chance.random() < 0.01:
            lines *= 60
        version = usually(chance, ["HTTP/1.1", "HTTP/1.0", "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "http/1.1", ""])
        return "\r\n".join([f"{method} {target} {version}", *lines, "", ""]).encode("utf-8", "surrogatepass") + data

    def make(self) -> bytes:
        """Return what one connection sends."""
        chance = self.chance
        kind = chance.random()
        if kind < 0.3:
            return self.deploy()
        if kind < 0.35:
            return chance.randbytes(chance.choice([1, 10, 1000]))
        if kind < 0.45:
            return "\r\n".join([f"GET {chance.choice(PATHS[1:6])} HTTP/1.1", *self.more, "", ""]).encode()
        data = b"".join(self.anything() for _ in range(chance.choice([1, 1, 1, 2, 4])))
        return bruise(chance, data) if chance.random() < 0.5 else data


def check_answers(data: bytes, sent: bytes) -> list[int]:
    """Return the status of each answer to what was sent. Raises AssertionError unless all are well-formed."""
    statuses = []
    while data:
        match = re.match(rb"HTTP/1\.1 (\d{3}) [ -~]+\r\n((?:[A-Za-z-]+: [ -~]*\r\n)*)\r\n", data)
        assert match, f"no head of an answer: {data[:300]}"
        data = data[match.end():]
        if match[1] == b"100":
            continue
        statuses.append(int(match[1]))
        headers = dict(line.lower().split(b": ", 1) for line in match[2].splitlines())
        body, data = take_body(headers, data)
        if not body and b"HEAD" in sent and headers.get(b"connection") == b"close":
            continue
        if statuses[-1] >= 400:
            check_error(headers, body)
        elif headers[b"content-type"] == b"application/json":
            json.loads(body)
        if headers.get(b"connection") == b"close":
            assert not data, f"more after the last answer: {data[:300]}"
    return statuses


def check_error(headers: dict[bytes, bytes], body: bytes) -> None:
    assert headers[b"content-type"] == b"application/json" and body.count(b"\n") == 1, (headers, body)
    message = json.loads(body)["error"]
    assert message and message.replace("\t", "").isprintable(), body


def take_body(headers: dict[bytes, bytes], data: bytes) -> tuple[bytes, bytes]:
    """Return the body of an answer, and what follows it."""
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while match := re.match(rb"([0-9a-f]+)\r\n", data):
            size = int(match[1], 16)
            chunk, data = data[match.end():][:size], data[match.end() + size:]
            assert data[:2] == b"\r\n", "a chunk without its end"
            body, data = body + chunk, data[2:]
            if size == 0:
                return body, data
        raise AssertionError(f"no chunk: {data[:300]}")
    if b"content-length" not in headers:                # HTTP/1.0's way
        assert headers.get(b"connection") == b"close", headers
        return data, b""
    size = int(headers[b"content-length"])
    return data[:size], data[size:]


class Archives(archives.Sandbox):
    def test_nonsense(self):
        """Unpacked in this process, a hundred times as fast as through the API."""
        until, images, unpacked = time.monotonic() + SECONDS / 2, Images(random.Random(SEED)), 0
        signal.alarm(int(SECONDS) + 600)
        for count in range(10**9):
            if time.monotonic() > until:
                break
            data = images.archive()
            try:
                self.unpack(data, max_size=64 << 20, max_entries=10_000)
                unpacked += 1
            except faasd.FaasdError as error:
                self.assertTrue(str(error).isprintable(), error)
                self.assertLess(error.status, 500, error)
            except Exception as error:
                path = Path(tempfile.gettempdir(), f"faasd-fuzz.{SEED}.{count}.tar")
                path.write_bytes(data)
                raise AssertionError(f"FAASD_FUZZ_SEED={SEED} archive {count}, kept as {path}") from error
        self.assertGreater(unpacked, count / 20)        # else what is tested is how damage is found


class ControlApi(unittest.TestCase):
    def setUp(self):
        signal.alarm(int(SECONDS) + 600)        # tests/run.py takes a test of over 10 minutes for a hang
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        token = directory / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        self.daemon = support.Daemon(
            "--api", "127.0.0.1:9000", "--api-token-file", str(token), "--max-image-size", "64m",
            constants={"FOLLOW_SECONDS": 0.2, "LINGER_SECONDS": 0.5, "MAX_HEADER_SECONDS": 5.0})
        self.daemon.start()
        self.addCleanup(self.daemon.close)
        self.good = self.daemon.deploy("good", None, "--warm", "1")
        self.daemon.wait_warm("good", 1)
        self.failures: list[str] = []
        self.statuses: dict[int, int] = {}

    def send(self, target, data: bytes, patience: float) -> bytes:
        """Send bytes, half-close when an answer comes or so many seconds have passed; return all that comes."""
        received = b""
        with socket.socket(socket.AF_INET if isinstance(target, tuple) else socket.AF_UNIX) as client:
            client.settimeout(support.READY_SECONDS)
            client.connect(target)
            try:
                client.sendall(data)
                if patience:
                    client.settimeout(patience)
                    received = client.recv(65536)
            except OSError:             # it has heard enough, or waits for more
                pass
            client.settimeout(support.READY_SECONDS)
            try:
                client.shutdown(socket.SHUT_WR)
                while chunk := client.recv(65536):
                    received += chunk
            except ConnectionError:     # a reset
                pass
        return received

    def client(self, target, more: list[str], until: float) -> None:
        chance = random.Random(f"{SEED}/{target if isinstance(target, tuple) else 'unix'}")
        requests = Requests(chance, more)
        for count in range(10**9):
            if count > ROUNDS and time.monotonic() > until or self.failures:
                return
            data, patience = requests.make(), chance.choice([0, 0, 0.2, 2])
            try:
                for status in check_answers(self.send(target, data, patience), data):
                    self.statuses[status] = self.statuses.get(status, 0) + 1
                    assert status != 500 and status < 600, f"status {status}"
                assert self.daemon.process.poll() is None, "the daemon has ended"
                assert "Traceback" not in self.daemon.log(), self.daemon.log()[-3000:]
            except (AssertionError, OSError, ValueError, KeyError) as error:
                self.failures.append(f"FAASD_FUZZ_SEED={SEED} {target} round {count}: {error!r}\n{data[:3000]!r}")

    def count(self) -> tuple[int, int]:
        """Return the daemon's descriptors and threads."""
        top = Path(f"/proc/{self.daemon.process.pid}")
        return len(os.listdir(top / "fd")), len(os.listdir(top / "task"))

    def test_nonsense(self):
        self.daemon.wait_warm("good", 1)
        self.daemon.faas("logs", "good")        # the answer comes when the log is written, and so open
        descriptors, threads = self.count()
        self.daemon.deploy("victim", None, "--start-timeout", "2")
        until = time.monotonic() + SECONDS / 2
        clients = [threading.Thread(target=self.client, args=arguments) for arguments in (
            (str(self.daemon.socket), [], until),
            (ADDRESS, [f"Authorization: Bearer {TOKEN}", "Host: localhost:9000"], until))]
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            self.assertEqual(support.get(self.good)[0], 200)
            time.sleep(0.2)
        self.assertFalse(self.failures, "\n".join(self.failures))
        if SECONDS > 60:
            print(f"    seed {SEED}: {dict(sorted(self.statuses.items()))}")
        self.assertLessEqual({200, 400, 401, 404}, set(self.statuses))
        wait_until(lambda: not list((self.daemon.state_dir / "tmp").iterdir()), "no upload is left")
        names = [function["name"] for function in json.loads(self.daemon.api("GET", "/functions")[1])["functions"]]
        self.assertEqual(names, ["good", "victim"])
        self.daemon.remove("victim")
        self.daemon.wait_warm("good", 1)
        wait_until(lambda: self.count()[0] <= descriptors,
                   f"as before, {descriptors} descriptors are open (FAASD_FUZZ_SEED={SEED})")
        wait_until(lambda: self.count()[1] <= threads + (os.cpu_count() or 1) + 4,
                   "threads are those of asyncio.to_thread")
        self.assertEqual(support.get(self.good)[0], 200)


if __name__ == "__main__":
    unittest.main()
