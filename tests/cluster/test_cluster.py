"""Three nodes and a balancer, each in a network namespace of its own on one bridge: real faasd, HAProxy and registry.

What `faas --node` deploys and `faas proxy-config haproxy --node` balances, while nodes go and come back. 8 s of load,
or as long as --soak says: `sudo ./test.sh --soak 60 tests/cluster/test_cluster.py`
"""

import contextlib
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

import support
from clients import connect, read_all, request
from support import wait_until

SECONDS = float(os.environ.get("FAASD_SOAK_SECONDS", "8"))
RATE = 200                              # connections a second that the balancer makes to functions
CLIENTS = 20
REGISTRY, BALANCER = "192.0.2.254", "192.0.2.10"
NODES = {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.3"}
PROGRAMS = {"haproxy": "haproxy", "docker-registry": "docker-registry", "skopeo": "skopeo", "openssl": "openssl",
            "nft": "nftables"}
TOKEN = "correct-horse-battery-staple"
REGISTRY_CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {0}}}}}
http: {{addr: "{1}:5000"}}
"""
# What HAProxy says of each request, in front of what `faas proxy-config` prints.
LOGGED = "global\n    log stdout format raw local0\ndefaults\n    log global\n    option httplog\n"


def run(*argv: str, **more) -> str:
    result = subprocess.run(argv, capture_output=True, text=True, check=False, **more)
    assert result.returncode == 0, (argv, result.stderr)
    return result.stdout


def in_namespace(pid: int) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{pid}/ns/net")


def is_post(number: int) -> bool:
    """Whether a request is one that must not be made twice."""
    return number % 10 == 0


class Load:
    """Clients of the balancer, with a connection for each request; what fails is counted by its number."""

    def __init__(self):
        self.failures: dict[int, str] = {}
        self.count = 0
        self._over, self._lock = threading.Event(), threading.Lock()
        self._begin = time.monotonic()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            with self._lock:
                number, self.count = self.count, self.count + 1
            time.sleep(max(0, self._begin + number / RATE - time.monotonic()))
            head = (f"{'POST' if is_post(number) else 'GET'} /?{number} HTTP/1.1\r\nHost: web.example.org\r\n"
                    "Content-Length: 0\r\nConnection: close\r\n\r\n")
            try:
                answer = read_all(connect((BALANCER, 80), head.encode()))
            except OSError as error:
                answer = repr(error).encode()
            if not answer.startswith(b"HTTP/1.1 200 "):
                self.failures[number] = answer[:100].decode()

    def wait(self, share: float) -> None:
        """Wait for that share of all requests."""
        wait_until(lambda: self.count > share * SECONDS * RATE, "requests are made",
                   3 * SECONDS + support.READY_SECONDS)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


class Cluster(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        for program, package in PROGRAMS.items():
            if not shutil.which(program):
                raise unittest.SkipTest(f"{program} is not installed: apt install {package}")
        cls.directory = support.temporary_directory()
        cls.addClassCleanup(shutil.rmtree, cls.directory)
        (cls.directory / "token").write_text(f"{TOKEN}\n")
        (cls.directory / "token").chmod(0o600)
        run("ip", "link", "add", "cluster", "type", "bridge")
        cls.addClassCleanup(run, "ip", "link", "del", "cluster")
        run("ip", "addr", "add", f"{REGISTRY}/24", "dev", "cluster")
        run("ip", "link", "set", "cluster", "up")
        cls.places = {name: cls.namespace(name, address) for name, address in {**NODES, "lb": BALANCER}.items()}
        cls.daemons = {name: cls.start_node(name) for name in NODES}
        cls.start_registry()
        config = cls.directory / "home/.config/faas/nodes.toml"
        config.parent.mkdir(parents=True)
        config.write_text("".join(f'[{name}]\napi = "http://{address}:8000"\ntoken-file = "{cls.directory}/token"\n'
                                  for name, address in NODES.items()))

    @classmethod
    def namespace(cls, name: str, address: str) -> tuple[str, ...]:
        """Make a network namespace on the bridge, and return what leads to it."""
        keeper = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        cls.addClassCleanup(keeper.communicate)
        own = os.stat("/proc/self/ns/net").st_ino
        wait_until(lambda: os.stat(f"/proc/{keeper.pid}/ns/net").st_ino != own, "it has a namespace")
        run("ip", "link", "add", f"to-{name}", "master", "cluster", "up", "type", "veth",
            "peer", "name", "eth0", "netns", str(keeper.pid))
        place = in_namespace(keeper.pid)
        run(*place, "ip", "-batch", "-", input=f"link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n")
        return place

    @classmethod
    def start_node(cls, name: str) -> support.Daemon:
        daemon = support.Daemon("--api", f"{NODES[name]}:8000", "--api-token-file", str(cls.directory / "token"),
                                "--drain-timeout", "60s", wrapper=cls.places[name]).start()
        cls.addClassCleanup(daemon.close)
        return daemon

    @classmethod
    def start_registry(cls) -> None:
        config = cls.directory / "registry.yml"
        config.write_text(REGISTRY_CONFIG.format(cls.directory / "registry", REGISTRY))
        cls.start_program("registry", (), "docker-registry", "serve", str(config))
        for label in ("1", "2"):
            archive = cls.directory / f"image-{label}.tar"
            archive.write_bytes(support.small_image(label))
            wait_until(lambda: listens(REGISTRY, 5000), "the registry listens")
            run("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false",
                f"docker-archive:{archive}", f"docker://{REGISTRY}:5000/web:{label}")

    @classmethod
    def start_program(cls, name: str, place: tuple[str, ...], *command: str) -> None:
        with (cls.directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([*place, *command], stdout=log, stderr=log)

        def end() -> None:
            process.terminate()
            process.wait()
        cls.addClassCleanup(end)

    def pull(self, label: str, *command: str) -> str:
        """Have skopeo pull an image from the registry, and pipe it to a command."""
        pull = ("skopeo --insecure-policy copy --quiet --src-tls-verify=false docker://"
                f"{REGISTRY}:5000/web:{label} docker-archive:/dev/stdout")
        return run("bash", "-o", "pipefail", "-c", f'{pull} | "$@"', "bash", *command, env=self.env())

    def env(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.directory / "home")}

    def faas(self, *arguments: str) -> list[str]:
        """Return a command of faas on all nodes."""
        return [*support.FAAS, *(word for name in NODES for word in ("--node", name)), *arguments]

    def balance(self) -> None:
        """Start HAProxy with what faas proxy-config prints."""
        certificate = self.directory / "faas.pem"
        run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
            "2", "-subj", "/CN=example.org", "-addext", "subjectAltName=DNS:*.example.org", "-keyout", str(certificate),
            "-out", str(self.directory / "certificate"))
        with certificate.open("a") as file:
            file.write((self.directory / "certificate").read_text())
        text = run(*self.faas("proxy-config", "haproxy", "--domain", "example.org", "--certificate", str(certificate)),
                   env=self.env()).replace("bind :80\n", "bind :81\n")      # these clients speak no TLS
        for name, address in NODES.items():
            self.assertIn(f"    server {name} {address}:8080 check", text)
        config, root = self.directory / "haproxy.cfg", self.directory / "haproxy"
        root.mkdir()                    # other tests have HAProxy too
        text = text.replace("defaults\n", LOGGED, 1).replace("bind :443", "bind :80\n    bind :443")
        config.write_text(text.replace("/var/lib/haproxy", str(root)))
        self.start_program("haproxy", self.places["lb"], "haproxy", "-db", "-f", str(config))
        wait_until(lambda: listens(BALANCER, 80), "HAProxy listens")

    def served(self, name: str) -> int:
        return self.daemons[name].info("web")["requests"]

    def served_again(self, name: str) -> None:
        wait_until(lambda: self.served(name) > 0, f"HAProxy sends requests to {name} again")

    def test_nodes_go_and_come_back(self):
        """No request fails but those that the killed node had, and of these none that may be made twice."""
        signal.alarm(int(SECONDS) + 600)
        for name, daemon in self.daemons.items():
            self.pull("1", *self.places[name], *support.FAAS, "--socket", str(daemon.socket), "new", "web",
                      "--reuse", "0", "--warm", "2", "--publish", "8080")
        self.balance()
        load = Load()
        self.addCleanup(load.end)
        load.wait(0.15)
        # One is drained, with a client that takes its time, and comes back as another daemon.
        with request((NODES["a"], 8080), "/work?go") as client:
            client.recv(1000)
            self.daemons["a"].process.send_signal(signal.SIGTERM)
            self.daemons["a"].wait_log("stopping: ")
            load.wait(0.25)
            self.daemons["a"].release("web", "go")
            with client.makefile("rb") as answer:
                self.assertTrue(answer.read().endswith(b"done\n"))
        self.assertEqual(self.daemons["a"].process.wait(support.READY_SECONDS), 0)
        self.daemons["a"].log_file.close()
        load.wait(0.35)
        self.daemons["a"].start()
        self.served_again("a")
        load.wait(0.5)
        self.daemons["b"].kill()
        load.wait(0.65)
        self.daemons["b"].start()
        self.served_again("b")
        load.wait(0.75)
        lines = self.pull("2", *self.faas("new", "web")).splitlines()
        self.assertEqual([re.sub(r" \(.*", "", line) for line in sorted(lines)],
                         [f"{name}: ✓ Replaced web at 10.0.0.10" for name in NODES])
        load.wait(1)
        load.end()
        signal.alarm(0)
        self.check(load)

    def check(self, load: Load) -> None:
        log = (self.directory / "haproxy.log").read_text()
        servers = {int(number): server for server, number in re.findall(r' faas_web/(\S+) .*"\S+ \S*/\?(\d+) ', log)}
        by_node = {name: sum(server == name for server in servers.values()) for name in NODES}
        print(f"{load.count} requests, {by_node} by node, failed: {load.failures}", file=sys.stderr)
        self.assertGreater(min(by_node.values()), 0)
        for number, failure in load.failures.items():
            self.assertEqual((servers.get(number), is_post(number)), ("b", True), f"request {number}: {failure}")


def listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


if __name__ == "__main__":
    unittest.main()
