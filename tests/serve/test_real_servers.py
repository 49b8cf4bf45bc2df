"""Servers as Debian has them, unmodified, in the image that tests/ci/servers_image.sh makes. No option is needed."""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shlex
import socket
import struct
import subprocess
import tarfile
import tempfile
import time
import unittest
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support
from clients import connect, read_all
from support import curl, wait_until

LAYER = Path(subprocess.run([support.TOP / "tests/ci/servers_image.sh", "--path"], capture_output=True, text=True,
                            check=True).stdout.strip())
ADDRESS = "10.0.0.10"
AT_LENGTH = "FAASD_SOAK_SECONDS" in os.environ
CONNECTIONS = 50 if AT_LENGTH else 4
WEB_SOCKET_SECONDS = 60 if AT_LENGTH else 0
REMOVAL_SECONDS = 4 * support.READY_SECONDS     # of the image, which is large
GET = b"GET / HTTP/1.0\r\nHost: f\r\n\r\n"
CGI = GET.replace(b"/", b"/cgi-bin/address", 1)
PAGE = rb"^HTTP/1.. 200 .*</html>\s*$"
WHO = rb"^HTTP/1.. 200 .*\r\n\r\n\[?(::ffff:)?HOST\]?[ :]PORT$"       # the program says who its client is
HOST_ALONE = rb"^HTTP/1.. 200 .*\r\n\r\n(::ffff:)?HOST$"
POSTGRES = """sh -c 'exec runuser -u postgres -- /usr/lib/postgresql/*/bin/postgres -D /var/lib/postgresql/*/main
    -c config_file=$(echo /etc/postgresql/*/main/postgresql.conf) -c hba_file=/srv/pg_hba.conf -c listen_addresses=*'
""".replace("\n", " ")
NGINX = "nginx -c /srv/nginx.conf -g 'daemon off;'"
PHP_FPM = """sh -c "/usr/sbin/php-fpm* && ln -s /run/php/php*fpm.sock /run/php/php-fpm.sock &&
    exec nginx -c /srv/nginx.conf -g 'daemon off;'" """.replace("\n", " ")


def postgres_message(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack(">I", len(data) + 4) + data


POSTGRES_QUERY = (postgres_message(b"", b"\0\x03\0\0user\0postgres\0\0") +
                  postgres_message(b"Q", b"SELECT host(inet_client_addr()) || ' ' || inet_client_port()\0"))

# The command, its port, what a client sends, and a pattern of all that it gets; HOST and PORT are the client's own.
SERVERS = {
    "nginx": ("nginx -g 'daemon off;'", 80, GET, PAGE),
    "apache": ("apache2ctl -D FOREGROUND", 80, GET, PAGE),
    "lighttpd": ("lighttpd -D -f /etc/lighttpd/lighttpd.conf", 80, GET, PAGE),
    "caddy": ("caddy run --config Caddyfile", 8080, GET, WHO),
    "busybox": ("busybox httpd -f -p 8081 -h /srv", 8081, CGI, WHO),
    "node": ("node server.js", 8080, GET, WHO),
    "go": ("./hello", 8080, GET, WHO),
    "java": ("java Hello http", 8080, GET, WHO),
    "java_blocking": ("java Hello blocking", 8080, GET, WHO),
    "uvicorn": ("python3 -m uvicorn --host 0.0.0.0 asgi:app", 8000, GET, WHO),
    "uvicorn_workers": ("python3 -m uvicorn --host 0.0.0.0 --workers 2 asgi:app", 8000, GET, WHO),
    "gunicorn": ("gunicorn -w 2 -b 0.0.0.0:8000 wsgi:app", 8000, GET, WHO),
    "gunicorn_threads": ("gunicorn -k gthread -b [::]:8001 wsgi:app", 8001, GET, WHO),
    "flask": ("flask --app wsgi run --host 0.0.0.0", 5000, GET, WHO),
    "django": ("python3 manage.py runserver 0.0.0.0:8000", 8000, GET, HOST_ALONE),
    "puma": ("puma --bind tcp://0.0.0.0:9292", 9292, GET, HOST_ALONE),
    "puma_workers": ("puma -w 2 --bind tcp://[::]:9292", 9292, GET, HOST_ALONE),
    "php": ("php -S 0.0.0.0:8080 index.php", 8080, GET, WHO),
    "php_fpm": (PHP_FPM, 8080, GET, WHO),
    "redis": ("redis-server --protected-mode no", 6379, b"CLIENT INFO\r\nQUIT\r\n", rb" addr=HOST:PORT .*\+OK\r\n$"),
    "memcached": ("memcached -u nobody", 11211, b"version\r\nquit\r\n", rb"^VERSION [0-9.]+\r\n$"),
    "postgres": (POSTGRES, 5432, POSTGRES_QUERY + postgres_message(b"X", b""), rb"HOST PORT.*Z\0\0\0\x05I$"),
}
KEEP_ALIVE = "nginx", "apache", "lighttpd", "caddy", "node", "go", "java", "uvicorn", "puma"
HALF_CLOSE = "nginx", "apache", "lighttpd", "caddy", "node", "go", "java", "java_blocking", "gunicorn", "php"


class Chunks:
    """A body of 100 MB that nobody holds as a whole, with its digest."""

    SIZE, COUNT = 1 << 20, 100

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def __iter__(self):
        for _ in range(self.COUNT):
            chunk = os.urandom(self.SIZE)
            self.digest.update(chunk)
            yield chunk


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port)):
        return True
    return False


def write_image(archive, layers: Iterable[bytes] = (), **config) -> None:
    """Write an archive of the servers' layer and others as `docker save` did; it is too large to be kept in memory."""
    with open(LAYER, "rb") as layer:
        digests = [hashlib.file_digest(layer, "sha256").hexdigest(),
                   *(hashlib.sha256(own).hexdigest() for own in layers)]
    names = [f"{digest}.tar" for digest in digests]
    settings = {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/srv", **config}
    document = {"architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine], "os": "linux",
                "config": settings,
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]}}
    manifest = [{"Config": "config.json", "RepoTags": ["servers:latest"], "Layers": names}]
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(LAYER, names[0])
        for name, data in (*zip(names[1:], layers, strict=True), ("config.json", json.dumps(document).encode()),
                           ("manifest.json", json.dumps(manifest).encode())):
            support.add_file(tar, name, data)
    archive.flush()


class Servers(support.SharedDaemonCase):
    """One image; the command says which of its servers runs."""

    @classmethod
    def setUpClass(cls) -> None:
        with contextlib.suppress(FileNotFoundError), open(f"{LAYER}.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)    # it is being made
        if not LAYER.exists():
            raise unittest.SkipTest(f"no {LAYER}; tests/ci/servers_image.sh makes it")
        super().setUpClass()
        with tempfile.NamedTemporaryFile(dir="/var/tmp", prefix=support.PREFIX) as archive:
            write_image(archive)
            command = shlex.split(SERVERS["nginx"][0])
            out = cls.daemon.faas("new", "f", "--warm", "auto", "-f", archive.name, "--", *command).stdout
        assert out == f"✓ Deployed f at {ADDRESS} (server, port 80)\n", out
        cls.daemon.set("f", "--start-timeout", "60")            # two Pythons or a JVM on a machine that is busy

    def setUp(self) -> None:
        """The function stays."""

    @classmethod
    def tearDownClass(cls) -> None:
        cls.daemon.remove("f")                  # its image is large, and removing it goes on behind the answer
        wait_until(lambda: not support.list_containers(cls.daemon), "no container is left")
        tmp = cls.daemon.state_dir / "tmp"
        wait_until(lambda: not list(tmp.iterdir()), "its image is gone", REMOVAL_SECONDS)

    def run_server(self, command: str, port: int, *options: str) -> None:
        self.daemon.faas("set", "f", *options, "--", *shlex.split(command))
        self.assertEqual(self.daemon.info("f")["server_port"], port)

    def ask(self, sent: bytes, expected: bytes, half_close: bool = False) -> int:
        """Have a connection, and compare all that comes. Return how many it took."""
        for number in range(1, 100):
            client = connect(ADDRESS, sent)
            host, port = client.getsockname()
            if half_close:
                client.shutdown(socket.SHUT_WR)
            received = read_all(client)
            if b"the database system is starting up" not in received:       # postgres listens before it can serve
                expected = expected.replace(b"HOST", re.escape(host.encode())).replace(b"PORT", b"%d" % port)
                self.assertRegex(received, b"(?s)" + expected)
                return number
            time.sleep(number / 10)             # one that waits, warm, has the time it needs
        self.fail("it does not come up")

    def check(self, name: str) -> None:
        command, port, sent, expected = SERVERS[name]
        self.run_server(command, port)
        before = len(self.daemon.function_log("f"))
        with ThreadPoolExecutor(2) as pool:
            connections = sum(pool.map(lambda _: self.ask(sent, expected), range(CONNECTIONS)))

        def containers() -> set[str]:
            return set(re.findall(r" (\w{12}) > outcome=answered", self.daemon.function_log("f")[before:]))
        wait_until(lambda: len(containers()) == connections, f"{connections} connections had as many containers")
        if name in HALF_CLOSE:
            with self.subTest("half-close"):
                self.ask(sent, expected, half_close=True)
        if name in KEEP_ALIVE:
            with self.subTest("keep-alive"):
                self.check_keep_alive()

    def check_keep_alive(self) -> None:
        with contextlib.closing(http.client.HTTPConnection(ADDRESS, timeout=support.READY_SECONDS)) as connection:
            connection.connect()
            own = connection.sock
            for _ in range(100):
                connection.request("GET", "/")
                answer = connection.getresponse()
                self.assertEqual((answer.status, bool(answer.read())), (200, True))
                self.assertIs(connection.sock, own)

    def test_the_proxies_of_the_documents(self):
        """nginx and Caddy as README has them, from the image's files, before a function on port 81."""
        fences = re.findall(r"(?ms)^```(nginx|caddy)\n(.*?)^```", (support.TOP / "README.md").read_text())
        self.assertEqual([name for name, _ in fences], ["nginx", "caddy"])
        changes = ("10.0.0.10:81", "10.7.0.10:81"), ("listen 80", "listen 127.0.0.1:8088"), (
            "example.org {", "http://127.0.0.1:8088 {")
        run = {"nginx": "nginx -e stderr -c {}", "caddy": "env HOME=/tmp caddy run --adapter caddyfile --config {}"}
        around = {"nginx": "user root; daemon off; pid /tmp/nginx.pid; events {{}} http {{ access_log off; {} }}",
                  "caddy": "{{\n    admin off\n}}\n{}"}
        with support.Daemon("--subnet", "10.7.0.0/24", "--port", "81") as daemon:
            daemon.deploy("g", support.small_image("behind"))
            for name, text in fences:
                for old, new in changes:
                    text = text.replace(old, new)
                root = self.daemon.rootfs("f")
                (root / "tmp/proxy.conf").write_text(around[name].format(text))
                command = ["chroot", root, *run[name].format("/tmp/proxy.conf").split()]
                with self.subTest(name), subprocess.Popen(command, stderr=subprocess.DEVNULL) as proxy:
                    try:
                        wait_until(lambda: answers("127.0.0.1", 8088), f"{name} listens")
                        self.assertEqual(curl("http://127.0.0.1:8088/"), "behind")
                    finally:
                        proxy.terminate()

    def test_upload_and_download_in_chunks(self):
        """Node sends back what comes, while it comes."""
        self.run_server(*SERVERS["node"][:2])
        sent, received = Chunks(), hashlib.sha256()
        client = connect(ADDRESS, b"POST / HTTP/1.1\r\nHost: f\r\nTransfer-Encoding: chunked\r\n\r\n")

        def send() -> None:
            for chunk in sent:
                client.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            client.sendall(b"0\r\n\r\n")
        with client, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            self.assertEqual(answer.getheader("Transfer-Encoding"), "chunked")
            while data := answer.read(Chunks.SIZE):
                received.update(data)
            sending.result()
        self.assertEqual(received.hexdigest(), sent.digest.hexdigest())

    def test_upload_to_go(self):
        self.run_server(*SERVERS["go"][:2])
        body = Chunks()
        connection = http.client.HTTPConnection(ADDRESS, timeout=support.READY_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", "/", iter(body), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
            self.assertEqual(connection.getresponse().read().decode(), body.digest.hexdigest())

    def test_web_socket(self):
        self.run_server(*SERVERS["uvicorn"][:2], "--timeout", "0")
        self.addCleanup(self.daemon.set, "f", "--timeout", "30")
        until = time.monotonic() + WEB_SOCKET_SECONDS
        with connect(ADDRESS, b"GET / HTTP/1.1\r\nHost: f\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                              b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                     ) as client, client.makefile("rb") as stream:
            self.assertIn(b" 101 ", stream.readline())
            while stream.readline() != b"\r\n":
                continue
            number = 0
            while number < 100 or time.monotonic() < until:
                number += 1
                message = b"%03d" % (number % 1000)
                client.sendall(b"\x82\x83\0\0\0\0" + message)           # a binary frame, masked with zeros
                self.assertEqual(stream.read(5), b"\x82\x03" + message)

    def test_http_2(self):
        """By prior knowledge, and behind TLS that the server ends."""
        for port, options, url in ((8082, ["--http2-prior-knowledge"], f"http://{ADDRESS}/"),
                                   (8443, ["--http2", "--insecure"], f"https://{ADDRESS}:80/"),
                                   (8443, ["--http1.1", "--insecure"], f"https://{ADDRESS}:80/")):
            with self.subTest(options):
                self.run_server(NGINX, port, "--port", str(port))
                self.addCleanup(self.daemon.set, "f", "--port", "auto", "--", "./hello")
                out = curl(*options, "--write-out", "\n%{http_version}\n%{local_ip} %{local_port}", url)
                body, version, own = out.split("\n")
                self.assertEqual((body, version), (own, "1.1" if "--http1.1" in options else "2"))

    def test_dropbear(self):
        """SSH: the server speaks first, both send their keys' names, and it logs who came."""
        self.run_server("dropbear -F -E -R -p 2222", 2222, "--speaks-first")
        self.addCleanup(self.daemon.set, "f", "--speaks-first", "false", "--", "./hello")
        ports = []
        for _ in range(CONNECTIONS):
            with connect(ADDRESS) as client, client.makefile("rb") as stream:
                self.assertRegex(stream.readline(), rb"^SSH-2\.0-dropbear")
                client.sendall(b"SSH-2.0-test\r\n")
                length, _, kind = struct.unpack(">IBB", stream.read(6))
                self.assertEqual(kind, 20)      # SSH_MSG_KEXINIT
                self.assertEqual(len(stream.read(length - 2)), length - 2)
                ports.append(client.getsockname()[1])
        for port in ports:
            line = f"Child connection from {ADDRESS}:{port}"
            wait_until(lambda line=line: line in self.daemon.function_log("f"), "it is logged")


def add_test(name: str) -> None:
    setattr(Servers, f"test_{name}", lambda self: self.check(name))


for server in SERVERS:
    add_test(server)


if __name__ == "__main__":
    unittest.main()
