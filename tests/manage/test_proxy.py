"""faas proxy-config: what it prints, run by the proxies themselves, with TLS, streams and upgraded connections."""

import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import unittest

import support

HANDLER = """
import json, os, socket, time

def serve(client):
    file = client.makefile("rwb")
    while request := file.readline():
        headers = {}
        while (line := file.readline().strip()):
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        if headers.get("upgrade"):
            file.write(b"HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\n")
            file.flush()
            while data := file.read1(100):
                file.write(data)
                file.flush()
            return
        if b"/stream" in request:
            file.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n3\\r\\none\\r\\n")
            file.flush()
            while not os.path.exists("/go"):
                time.sleep(0.01)
            file.write(b"3\\r\\ntwo\\r\\n0\\r\\n\\r\\n")
            file.flush()
        else:
            own = {"container": os.environ["FAAS_CONTAINER_ID"], "peer": client.getpeername()[1]}
            body = json.dumps({**own, **headers})
            file.write(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
            file.flush()
        if headers.get("connection", "").lower() == "close":
            return

control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
while True:
    _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not descriptors:
        break
    with socket.socket(fileno=descriptors[0]) as client:
        try:
            serve(client)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass
    control.send(b"x")
"""
SERVER = b"""
import os, socket
client, _ = socket.create_server(("", 8080)).accept()
request = b""
while b"a=b" not in request:
    request += client.recv(1000)
if b"/crash" in request:
    print("crash", flush=True)
    os._exit(3)
client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
client.close()
"""
DOMAIN = "example.org"
NGINX = "daemon off; user root; pid {0}/pid; error_log stderr; events {{}} http {{ access_log off; {1} }}"


class ProxyTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon("--port", "81").start()     # as README.md says, for a proxy on the same machine
        cls.addClassCleanup(cls.daemon.close)
        cls.directory = cls.daemon.directory
        cls.certificate = cls.directory / "faas.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                        "-nodes", "-days", "2", "-subj", "/CN=example.org", "-addext",
                        "subjectAltName=DNS:*.example.org",
                        "-keyout", cls.certificate, "-out", cls.directory / "certificate"], check=True,
                       capture_output=True)
        with cls.certificate.open("a") as file:
            file.write((cls.directory / "certificate").read_text())
        image = support.handler_image(HANDLER)
        cls.daemon.deploy("once", image)
        cls.daemon.deploy("kept", image, "--reuse", "0", "--timeout", "0")
        cls.daemon.deploy("server", support.docker_archive(
            [support.python_layer(), support.layer({"server.py": SERVER})],
            {"Entrypoint": [support.PYTHON, "/server.py"]}))

    def connect(self, name: str) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.directory / "certificate")
        plain = socket.create_connection(("127.0.0.1", 443), support.READY_SECONDS)
        return context.wrap_socket(plain, server_hostname=f"{name}.{DOMAIN}")

    def listens(self) -> bool:
        try:
            self.connect("once").close()
        except OSError:
            return False
        return True

    def ask(self, name: str, count: int = 1) -> list[dict]:
        """Return the answers to requests on one connection."""
        url = f"https://{name}.{DOMAIN}/"
        out = support.curl("--cacert", self.directory / "certificate", "--resolve", f"{name}.{DOMAIN}:443:127.0.0.1",
                           "-w", "\n", *[url] * count)
        return [json.loads(line) for line in out.splitlines()]

    def check(self, proxy: str, *command: str, around: str = "{1}") -> None:
        if not shutil.which(proxy):
            self.skipTest(f"not installed: {proxy}")
        text = self.daemon.faas("proxy-config", proxy, "--domain", DOMAIN, "--certificate",
                                str(self.certificate)).stdout
        path = self.directory / f"{proxy}.conf"
        root = self.directory / "haproxy"       # other tests have HAProxy too
        root.mkdir(exist_ok=True)
        path.write_text(around.format(self.directory, text).replace("/var/lib/haproxy", str(root)))
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.directory)}
        with (self.directory / "log").open("wb") as log:
            running = subprocess.Popen([proxy, *command, path], stdout=log, stderr=log, env=env)
        with running:
            try:
                support.wait_until(lambda: running.poll() is not None or self.listens(), f"{proxy} listens")
                self.check_requests()
            except Exception as error:
                error.add_note((self.directory / "log").read_text()[-2000:])
                raise
            finally:
                running.terminate()

    def check_requests(self) -> None:
        status = support.curl("--resolve", f"once.{DOMAIN}:80:127.0.0.1", "-o", self.directory / "answer", "-w",
                              "%{http_code} %{redirect_url}", f"http://once.{DOMAIN}/a?b=c")
        self.assertEqual(status, f"308 https://once.{DOMAIN}/a?b=c")
        first, second = self.ask("once", 2)
        self.assertNotEqual(first["container"], second["container"])
        self.assertEqual((first["host"], first["x-forwarded-proto"], first["x-forwarded-for"]),
                         (f"once.{DOMAIN}", "https", "127.0.0.1"))
        first, second = self.ask("kept", 2)
        self.assertEqual((first["container"], first["peer"]), (second["container"], second["peer"]))
        for name in ("once", "kept"):
            with self.connect(name) as client:
                client.sendall(f"GET / HTTP/1.1\r\nHost: {name}.{DOMAIN}\r\nConnection: Upgrade\r\n"
                               "Upgrade: echo\r\n\r\n".encode())
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1)
                self.assertIn(b" 101 ", head)
                for word in (b"hello", b"again"):
                    client.sendall(word)
                    self.assertEqual(client.recv(5), word)
        with self.connect("once") as client:            # the first part comes before the second is there
            client.sendall(f"GET /stream HTTP/1.1\r\nHost: once.{DOMAIN}\r\n\r\n".encode())
            data = b""
            while b"one" not in data:
                data += client.recv(1000)
            self.assertNotIn(b"two", data)
            self.daemon.release("once", "go")
            while b"two" not in data:
                data += client.recv(1000)
        (self.daemon.rootfs("once") / "go").unlink()
        self.check_crash()

    def check_crash(self) -> None:
        """What may have been done is not sent again, however the client speaks: it hears that it failed."""
        url = f"https://server.{DOMAIN}/"
        for words in (["--http1.1", url + "crash"], ["--http1.1", url, url + "crash"], ["--http2", url + "crash"]):
            since = self.daemon.faas("logs", "server").stdout.count("| crash")
            status = support.curl("--cacert", self.directory / "certificate", "--resolve",
                                  f"server.{DOMAIN}:443:127.0.0.1", "-d", "a=b", "-o", self.directory / "answer",
                                  "-w", "%{http_code} ", *words)
            self.assertEqual(status.split()[-1], "502", words)
            self.assertEqual(self.daemon.faas("logs", "server").stdout.count("| crash") - since, 1, words)

    def test_nginx(self):
        self.check("nginx", "-e", "stderr", "-c", around=NGINX)

    def test_caddy(self):
        self.check("caddy", "run", "--adapter", "caddyfile", "--config")

    def test_haproxy(self):
        self.check("haproxy", "-db", "-f")
        sockets = [path for path in (self.directory / "haproxy").iterdir() if path.is_socket()]
        self.assertEqual([(path.owner(), stat.S_IMODE(path.stat().st_mode)) for path in sockets], [("haproxy", 0o600)])
        self.assertNotIn("abns@", (self.directory / "haproxy.conf").read_text())

    def test_a_function_that_has_port_80(self):
        """The proxy must start, and cannot have the port; nothing is kept secret.

        Comes first by its name: connections to the other tests' proxies linger on that port for a minute.
        """
        self.daemon.set("kept", "--publish", "80")
        self.addCleanup(self.daemon.set, "kept", "--publish", "")
        checks = {"nginx": ("-t", "-e", "stderr", "-c"), "caddy": ("validate", "--adapter", "caddyfile", "--config"),
                  "haproxy": ("-c", "-f")}
        for proxy, words in checks.items():
            done = self.daemon.faas("proxy-config", proxy, "--certificate", str(self.certificate))
            said = ("HTTP on port 80 is not redirected to HTTPS, because function kept has that port: start faasd with "
                    "another --port, and publish no function on port 80")
            self.assertEqual(done.stderr, f"faas: warning: {said}\n")
            self.assertTrue(done.stdout.startswith(f"# {said}\n"))
            self.assertNotRegex(done.stdout, "308|:80\\b")
            self.assertEqual("disable_redirects" in done.stdout, proxy == "caddy")
            if not shutil.which(proxy):
                continue
            path = self.directory / f"{proxy}.conf"
            path.write_text(done.stdout if proxy != "nginx" else NGINX.format(self.directory, done.stdout))
            checked = subprocess.run([proxy, *words, path], capture_output=True, text=True, check=False,
                                     env={**os.environ, "HOME": str(self.directory)})
            self.assertEqual(checked.returncode, 0, checked.stderr)

    def test_what_is_printed(self):
        """Without options: all functions, by their own names, Caddy with certificates of its own; or those named."""
        text = self.daemon.faas("proxy-config", "caddy").stdout
        self.assertRegex(text, r"(?s)kept \{\n    reverse_proxy 10\.0\.0\.11:81.*"
                               r"once \{\n    reverse_proxy 10\.0\.0\.10:81")
        self.assertNotIn("tls", text)
        self.assertNotIn("auto_https", text)
        text = self.daemon.faas("proxy-config", "nginx", "--domain", DOMAIN, "once").stdout
        self.assertIn("/etc/ssl/private/faas.pem;", text)
        self.assertNotIn("kept", text)
        done = self.daemon.faas("proxy-config", "haproxy", "nosuch", check=False)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        for words in (["apache"], ["nginx", "--domain", "a b"], ["nginx", "--certificate", "/x;y"]):
            self.assertEqual(self.daemon.faas("proxy-config", *words, check=False).returncode, 2, words)


if __name__ == "__main__":
    unittest.main()
