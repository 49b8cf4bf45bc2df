"""Servers as Debian has them, unmodified, in the image that tests/ci/servers_image.sh makes."""

import re
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clients
import support
from clients import connect
from support import wait_until

LAYER = Path("/var/cache/faasd-ci/servers.tar")
APP = """from flask import Flask, request
app = Flask(__name__)
@app.route("/")
def hello():
    return f"{request.remote_addr} {request.environ['REMOTE_PORT']}"
"""
GET = b"GET / HTTP/1.0\r\n\r\n"


@unittest.skipUnless(LAYER.exists(), f"no {LAYER}; tests/ci/servers_image.sh makes it")
class Servers(support.SharedDaemonCase):
    """One image; the command says which of its servers runs."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.image = support.docker_archive([LAYER.read_bytes(), support.layer({"srv/app.py": APP})], {
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/srv", "Cmd": ["nginx", "-g", "daemon off;"]})

    def exchange(self, address: str, data: bytes, end: bytes) -> tuple[bytes, tuple[str, int]]:
        """Return what comes until it ends so, and the client's own address."""
        received = b""
        with connect(address, data) as client:
            while not re.search(end, received) and (more := client.recv(65536)):
                received += more
            return received, client.getsockname()

    def run_server(self, command: list[str], port: int) -> None:
        out = self.daemon.faas("set", "f", "--timeout", "60", "--", *command).stdout
        self.assertIn("f", out)
        self.assertEqual(self.daemon.info("f")["server_port"], port)

    def test_servers(self):
        out = self.daemon.faas("new", "f", stdin=self.image).stdout
        self.assertEqual(out, "✓ Deployed f at 10.0.0.10 (server, port 80)\n")
        address = "10.0.0.10"
        with self.subTest("nginx"), ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: self.exchange(address, GET, b"</html>")[0], range(20)))
            for answer in answers:
                self.assertRegex(answer, rb"^HTTP/1.1 200 OK\r\nServer: nginx")
        wait_until(lambda: len(set(re.findall(r" (\w{12}) > outcome=answered", self.daemon.function_log("f")))) == 20,
                   "20 connections had 20 containers")
        for command, port, sent, answer in (
                (["apache2ctl", "-D", "FOREGROUND"], 80, GET, rb"(?s)200 OK.*Apache2.*</html>"),
                (["lighttpd", "-D", "-f", "/etc/lighttpd/lighttpd.conf"], 80, GET, rb"(?s)200 OK.*</html>"),
                (["redis-server", "--protected-mode", "no"], 6379, b"PING\r\n", rb"\+PONG\r\n"),
                (["memcached", "-u", "nobody"], 11211, b"version\r\n", rb"VERSION [0-9.]+\r\n"),
                (["gunicorn", "-w", "2", "-b", "0.0.0.0:8000", "app:app"], 8000, GET, rb"10\.0\.0\.10 \d+$"),
                (["gunicorn", "-k", "gthread", "-b", "[::]:8001", "app:app"], 8001, GET, rb"10\.0\.0\.10 \d+$"),
                (["flask", "run", "--host", "0.0.0.0"], 5000, GET, rb"10\.0\.0\.10 \d+$")):
            with self.subTest(command[0]):
                self.run_server(command, port)
                for _ in range(3):
                    received, (_, own_port) = self.exchange(address, sent, answer)
                    self.assertRegex(received, answer)
                    if port in (8000, 5000):
                        self.assertTrue(received.endswith(str(own_port).encode()), received)
        wait_until(lambda: not support.list_containers(self.daemon), "no container is left")
        self.daemon.remove("f")                 # its image is large, and removing it goes on behind the answer
        wait_until(lambda: not list((self.daemon.state_dir / "tmp").iterdir()), "its image is gone")


if __name__ == "__main__":
    unittest.main()
