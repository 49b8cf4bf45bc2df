"""--net: what a function reaches and what it does not, between namespaces that stand for the internet, a LAN, cloud
metadata, another function and this host; and that nothing of it is left.

What must not be reached is reached from somewhere else in the same test: a closed port proves nothing.
"""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import unittest
from pathlib import Path

import support
from support import get, wait_until

import faasd

# How a client tries a place such as tcp:192.0.2.1:80, here, in a peer's namespace and in a function's container.
CLIENT = r'''
import errno, json, os, socket, sys, threading

PATIENCE = 10                   # seconds

QUERY = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04name\x04test\x00\x00\x01\x00\x01"


def attempt(place):
    """Return what a service there says first, or the name of the error."""
    kind, host, port = place.split(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as peer:
            peer.settimeout(PATIENCE)
            peer.connect((host, int(port)))
            peer.sendall(b"GET /who HTTP/1.1\r\n\r\n" if kind == "tcp" else QUERY)
            answer = peer.recv(1000)
            return "answered" if kind == "udp" else answer.split(b"\n")[0].decode()
    except OSError as error:
        return errno.errorcode.get(error.errno, "timed out")


def attempt_all(places):
    results = dict.fromkeys(places)
    threads = [threading.Thread(target=lambda place=place: results.update({place: attempt(place)})) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
'''

HANDLER = CLIENT + r'''
def describe(action):
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno]


def facts():
    return {"interfaces": sorted(name for _, name in socket.if_nameindex()), "sys": os.listdir("/sys"),
            "resolv": open("/etc/resolv.conf").read(),
            "mounts": {line.split()[1]: line.split()[3].split(",")[0] for line in open("/proc/mounts")},
            "raw": describe(lambda: str(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))),
            "packet": describe(lambda: str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)))}


def late(client, place):
    """Have a connection; once the client says so, use it, and make another."""
    _, host, port = place.split(":")
    with socket.socket() as peer:
        peer.settimeout(PATIENCE)
        peer.connect((host, int(port)))
        peer.recv(1000)
        client.sendall(b"connected\n")
        client.recv(1)
        peer.sendall(b"still there")
        return {"old": peer.recv(1000).decode(), "new": attempt(place)}


def answer(client, path):
    command, _, argument = path.partition("?")
    if command == "/try":
        return attempt_all(argument.split(","))
    if command == "/facts":
        return facts()
    if command == "/late":
        return late(client, argument)
    if command == "/hosts":
        return open("/etc/hosts").read()
    if command == "/lookup":
        return socket.getaddrinfo(argument.encode(), 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    return None


control = socket.socket(socket.AF_UNIX)
control.connect("/control.sock")
_, descriptors, _, _ = socket.recv_fds(control, 1, 1)
if not descriptors:
    sys.exit()
with socket.socket(fileno=descriptors[0]) as client:
    path = client.recv(65536).split()[1].decode()
    if path == "/who":
        client.sendall(f"{os.environ['FAAS_FUNCTION']} saw {client.getpeername()[0]}\n".encode())
    else:
        body = json.dumps(answer(client, path))
        client.sendall(f"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{body}".encode())
    client.shutdown(socket.SHUT_WR)
'''

# A machine's services: tcp says who it saw and then echoes, udp is a resolver that knows one name, or writes down what
# comes (port 7000).
PEER = r'''
import contextlib, socket, sys, threading

label, *services = sys.argv[1:]


def serve_stream(client, peer):
    with client, contextlib.suppress(ConnectionError):
        client.sendall(f"{label} saw {peer}\n".encode())
        while data := client.recv(1000):
            client.sendall(data)


def accept(listener):
    while True:
        client, (peer, _) = listener.accept()
        threading.Thread(target=serve_stream, args=(client, peer), daemon=True).start()


def receive(server, port):
    while True:
        data, (peer, source) = server.recvfrom(1000)
        if port == 7000:
            print(f"{peer} {data.decode()}", flush=True)
        else:
            answer = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04" + socket.inet_aton("203.0.113.80")
            server.sendto(data[:2] + b"\x81\x80\x00\x01\x00\x01" + b"\x00" * 4 + data[12:data.index(b"\0", 12) + 5]
                          + answer, (peer, source))


for service in services:
    kind, host, port = service.split(":")
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, int(port)))
    if kind == "tcp":
        server.listen()
    arguments = (server,) if kind == "tcp" else (server, int(port))
    threading.Thread(target=accept if kind == "tcp" else receive, args=arguments, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
'''

# UDP datagrams with a source of their own making: SPOOF TARGET SOURCE…, and then an honest one.
SPOOF = r'''
import socket, struct, sys

target, *sources = sys.argv[1:]
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
for source in sources:
    payload = f"as {source}".encode()
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, socket.inet_aton(source),
                       socket.inet_aton(target))
    raw.sendto(head + struct.pack("!HHHH", 7000, 7000, 8 + len(payload), 0) + payload, (target, 0))
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"honest", (target, 7000))
'''

RESOLV_CONF = """\
search example.test
nameserver 127.0.0.53
nameserver 169.254.169.254
nameserver 203.0.113.2
"""
FITTED = "search example.test\nnameserver 169.254.169.254\nnameserver 203.0.113.2\n"
# What Docker does to publish a port: this host's 8088 is the LAN's 80, for whoever comes from elsewhere.
PUBLISHED_PORT = """\
table ip published {
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 203.0.113.2 tcp dport 8088 dnat to 192.168.77.2:80
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip daddr 192.168.77.2 masquerade
    }
}
"""
STRICT_FIREWALL = """\
table ip firewall {
    chain forward { type filter hook forward priority filter; policy drop; }
}
"""


def run(*argv: str, stdin: str = "") -> str:
    result = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (argv, result.stderr)
    return result.stdout


def in_namespace(namespace: Path | str) -> tuple[str, ...]:
    return ("nsenter", f"--net={namespace}")


def attempt(*places: str, wrapper: tuple[str, ...] = (), patience: int = 10) -> dict[str, str]:
    """Try places from this host, or from a namespace by a wrapper."""
    program = CLIENT + f"PATIENCE = {patience}; print(json.dumps(attempt_all(sys.argv[1:])))"
    return json.loads(run(*wrapper, sys.executable, "-c", program, *places))


class Peer:
    """Services in a namespace: of its own, or what a wrapper leads to."""

    def __init__(self, label: str, *services: str, wrapper: tuple[str, ...] = ("unshare", "--net")):
        self.process = subprocess.Popen([*wrapper, sys.executable, "-c", PEER, label, *services], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"
        self.wrapper = in_namespace(f"/proc/{self.process.pid}/ns/net")

    def link(self, name: str, ours: str, theirs: str) -> None:
        """Lay a cable, called name on our side."""
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(self.process.pid))
        run("ip", "-batch", "-", stdin=f"addr add {ours} dev {name}\nlink set {name} up\n")
        run(*self.wrapper, "ip", "-batch", "-", stdin=f"link set lo up\naddr add {theirs} dev eth0\nlink set eth0 up\n")
        set_sysctl(f"{name}/forwarding", "1")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def set_sysctl(name: str, value: str) -> str:
    """Set one of net.ipv4.conf, return what it was."""
    path = Path("/proc/sys/net/ipv4/conf") / name
    before = path.read_text()
    path.write_text(value)
    return before


def link_of(name: str) -> str | None:
    """Return the link whose alias is a function's name."""
    return next((link["ifname"] for link in json.loads(run("ip", "-j", "link")) if link.get("ifalias") == name), None)


def address_of(daemon: support.Daemon, name: str) -> str:
    """Return a function's address in its own namespace."""
    out = run(*in_namespace(daemon.run_dir / "net" / name), "ip", "-j", "-4", "addr", "show", "dev", "eth0")
    return json.loads(out)[0]["addr_info"][0]["local"]


def tables() -> list[str]:
    return run("nft", "list", "tables").split("\n")[:-1]


def requested(address: str, path: str):
    """Return what the handler answers, as the document it is."""
    status, body = get(address, path)
    assert status == 200, (status, body)
    return json.loads(body)


@contextlib.contextmanager
def route_from_the_lan(subnet: str):
    """Have the neighbour send packets for a subnet to this host."""
    run(*world.lan.wrapper, "ip", "route", "add", subnet, "via", "192.168.77.1")
    try:
        yield
    finally:
        run(*world.lan.wrapper, "ip", "route", "del", subnet)


@contextlib.contextmanager
def rules(text: str):
    """Have nftables rules of somebody else's, in one table."""
    run("nft", "-f", "-", stdin=text)
    try:
        yield
    finally:
        run("nft", "delete", *text.split()[:3])


def change_registry(daemon: support.Daemon, name: str, **options: str) -> None:
    """Change options of a function of a daemon that is not running."""
    registry = daemon.state_dir / "registry.json"
    document = json.loads(registry.read_text())
    function, = (function for function in document["functions"] if function["name"] == name)
    function["versions"][0]["options"].update(options)
    registry.write_text(json.dumps(document))


class World:
    """This namespace is the host: with a default route to the internet, a LAN, a metadata service, and one daemon."""

    def __init__(self):
        self.directory = support.temporary_directory()
        unittest.addModuleCleanup(shutil.rmtree, self.directory)
        # Inherited from the machine. Without filters of the kernel's own, what holds is faasd's rules.
        for name in ("all/forwarding", "all/rp_filter", "default/rp_filter"):
            unittest.addModuleCleanup(set_sysctl, name, set_sysctl(name, "0"))
        self.internet = self.peer("wan", "203.0.113.2/24", "203.0.113.1/24",
                                  Peer("internet", "tcp:0.0.0.0:80", "udp:0.0.0.0:7000"))
        self.lan = self.peer("lan", "192.168.77.1/24", "192.168.77.2/24",
                             Peer("lan", "tcp:0.0.0.0:80", "udp:0.0.0.0:53"))
        self.peer("meta", "169.254.1.1/16", "169.254.169.254/16",
                  Peer("metadata", "tcp:0.0.0.0:80", "tcp:0.0.0.0:53", "udp:0.0.0.0:53"))
        run("ip", "route", "add", "default", "via", "203.0.113.1")
        run("ip", "addr", "add", "10.9.9.9/32", "dev", "lo")
        unittest.addModuleCleanup(run, "ip", "addr", "del", "10.9.9.9/32", "dev", "lo")
        host = Peer("host", "tcp:0.0.0.0:8080", "tcp:203.0.113.2:80", "tcp:0.0.0.0:53", "udp:203.0.113.2:53",
                    "udp:192.168.77.1:53", wrapper=())
        unittest.addModuleCleanup(host.end)
        (self.directory / "resolv.conf").write_text(RESOLV_CONF)
        self.image = support.handler_image(HANDLER)
        self.daemon = self.start_daemon(unittest.addModuleCleanup)

    @staticmethod
    def peer(name: str, ours: str, theirs: str, peer: Peer) -> Peer:
        unittest.addModuleCleanup(peer.end)
        peer.link(name, ours, theirs)
        unittest.addModuleCleanup(run, "ip", "link", "del", name)
        return peer

    def start_daemon(self, add_cleanup, *arguments: str, env: dict | None = None) -> support.Daemon:
        constants = {"RESOLV_CONFS": (str(self.directory / "resolv.conf"), str(self.directory / "none"))}
        daemon = support.Daemon(*arguments, constants=constants, env=env).start()
        add_cleanup(daemon.close)
        return daemon


def setUpModule():
    """One world for all: what takes time is the deploys."""
    global world
    world = World()


OTHER_DAEMON = ("--subnet", "10.7.0.0/24", "--egress-subnet", "198.18.16.0/24")
INTERNET = "tcp:203.0.113.1:80"
BY_NAT = {INTERNET: "internet saw 203.0.113.2"}


class Egress(unittest.TestCase):
    """Functions a and b, both with egress."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.daemon, cls.internet, cls.lan = world.daemon, world.internet, world.lan
        cls.a = cls.daemon.deploy("a", world.image, "--net", "egress")
        cls.b = cls.daemon.deploy("b", world.image, "--net", "egress")
        cls.addClassCleanup(cls.daemon.faas, "rm", "a", "b")
        cls.a_inside, cls.b_inside = address_of(cls.daemon, "a"), address_of(cls.daemon, "b")
        # A service in b's namespace, as a container might open one.
        server = Peer("b's", "tcp:0.0.0.0:8090", wrapper=in_namespace(cls.daemon.run_dir / "net" / "b"))
        cls.addClassCleanup(server.end)

    def attempt(self, address: str, *places: str) -> dict[str, str]:
        """Try places from a function."""
        return requested(address, "/try?" + ",".join(places))

    def test_the_world_behind_nat_and_others_public_addresses(self):
        reached = {**BY_NAT, "tcp:192.168.77.2:80": "lan saw 192.168.77.1",
                   f"tcp:{self.b}:80": f"b saw {self.a_inside}", f"tcp:{self.a}:80": f"a saw {self.a_inside}",
                   "udp:192.168.77.2:53": "answered"}
        self.assertEqual(self.attempt(self.a, *reached), reached)

    def test_not_the_host_nor_other_functions_nor_metadata(self):
        refused = ["tcp:198.18.0.1:8080", "tcp:203.0.113.2:8080", "tcp:203.0.113.2:80", "tcp:192.168.77.1:8080",
                   "tcp:169.254.1.1:8080", "tcp:10.9.9.9:8080", f"tcp:{self.b}:8080", "tcp:169.254.169.254:80",
                   f"tcp:{self.b_inside}:8090"]
        control = attempt(*refused)
        self.assertEqual({place: answer.split(" saw ")[0] for place, answer in control.items()},
                         {**dict.fromkeys(refused[:-2], "host"), refused[-2]: "metadata", refused[-1]: "b's"})
        self.assertEqual(self.attempt(self.a, *refused), dict.fromkeys(refused, "ECONNREFUSED"))
        # Its own loopback is not the host's.
        self.assertEqual(attempt("tcp:127.0.0.1:8080"), {"tcp:127.0.0.1:8080": "host saw 127.0.0.1"})
        self.assertEqual(self.attempt(self.a, "tcp:127.0.0.1:8080"), {"tcp:127.0.0.1:8080": "ECONNREFUSED"})

    def test_not_what_the_host_publishes_on_its_addresses(self):
        with rules(PUBLISHED_PORT):
            place = "tcp:203.0.113.2:8088"
            self.assertEqual(attempt(place, wrapper=self.internet.wrapper), {place: "lan saw 192.168.77.1"})
            self.assertEqual(self.attempt(self.a, place), {place: "ECONNREFUSED"})

    def test_resolvers_of_the_host_on_port_53_alone(self):
        # One is where the metadata are, one is this host.
        places = [f"{kind}:{host}:53" for kind in ("udp", "tcp") for host in ("169.254.169.254", "203.0.113.2")]
        answers = self.attempt(self.a, *places)
        self.assertEqual({place: answer.split(" saw ")[0] for place, answer in answers.items()},
                         {places[0]: "answered", places[1]: "answered", places[2]: "metadata", places[3]: "host"})
        place = "udp:192.168.77.1:53"           # this host too, but not in resolv.conf
        self.assertEqual(attempt(place), {place: "answered"})
        self.assertEqual(self.attempt(self.a, place), {place: "EHOSTUNREACH"})

    def test_names(self):
        self.assertEqual(requested(self.a, "/lookup?name.test"), "203.0.113.80")
        facts = requested(self.a, "/facts")
        self.assertEqual((facts["resolv"], facts["mounts"]["/etc/resolv.conf"]), (FITTED, "ro"))

    def test_namespace(self):
        facts = requested(self.a, "/facts")
        self.assertEqual((facts["interfaces"], facts["sys"], facts["mounts"]["/sys"], facts["raw"], facts["packet"]),
                         (["eth0", "lo"], ["fs"], "ro", "EPERM", "EPERM"))     # fs: its own cgroup's

    def test_no_ipv6(self):
        """No address at either end of the link; and if something on the host gave it some, no way."""
        inside = in_namespace(self.daemon.run_dir / "net" / "a")
        ends = ((), link_of("a"), "fd00::1"), (inside, "eth0", "fd00::2")
        macs = [json.loads(run(*wrapper, "ip", "-j", "link", "show", "dev", link))[0]["address"]
                for wrapper, link, _ in ends]
        for number, (wrapper, link, address) in enumerate(ends):
            self.assertEqual(run(*wrapper, "ip", "-6", "addr", "show", "dev", link), "")
            neighbour = ends[1 - number][2]
            run(*wrapper, "ip", "-6", "-batch", "-", stdin=f"addr add {address}/64 dev {link} nodad\n"
                f"neigh add {neighbour} lladdr {macs[1 - number]} dev {link}\n")
        program = ("import socket, sys\ntry: socket.create_connection(('fd00::1', 9), timeout=float(sys.argv[1]))\n"
                   "except OSError as error: print(error)")
        self.assertEqual(run(sys.executable, "-c", program, "10"), "[Errno 111] Connection refused\n")
        self.assertEqual(run(*inside, sys.executable, "-c", program, "1"), "timed out\n")

    def test_spoofed_sources_go_nowhere(self):
        """With root's rights in the namespace, which a handler never has."""
        run(*in_namespace(self.daemon.run_dir / "net" / "a"), sys.executable, "-c", SPOOF, "203.0.113.1",
            self.b_inside, "198.18.9.9", "203.0.113.2", "192.168.77.2", "8.8.8.8")
        self.assertEqual(self.internet.process.stdout.readline(), "203.0.113.2 honest\n")      # in order, so alone
        run(*in_namespace(self.daemon.run_dir / "net" / "a"), sys.executable, "-c", SPOOF, "203.0.113.1", self.a_inside)
        self.assertEqual(self.internet.process.stdout.readline(), f"203.0.113.2 as {self.a_inside}\n")
        self.assertEqual(self.internet.process.stdout.readline(), "203.0.113.2 honest\n")

    def test_nobody_outside_connects_to_a_functions_link(self):
        run(*self.lan.wrapper, "ip", "route", "add", "198.18.0.0/20", "via", "192.168.77.1")
        place = f"tcp:{self.b_inside}:8090"
        self.assertEqual(attempt(place), {place: "b's saw 198.18.0.1"})
        self.assertEqual(attempt(place, wrapper=self.lan.wrapper), {place: "ECONNREFUSED"})

    def test_neighbours_reach_published_ports_alone(self):
        with route_from_the_lan("10.0.0.0/24"):
            place, published = f"tcp:{self.b}:80", "tcp:192.168.77.1:8000"
            self.daemon.set("b", "--publish", "8000")
            self.addCleanup(self.daemon.set, "b", "--publish", "")
            self.assertEqual(attempt(published, wrapper=self.lan.wrapper), {published: "b saw 192.168.77.2"})
            self.assertEqual(attempt(place, wrapper=self.lan.wrapper, patience=1), {place: "timed out"})
            self.assertEqual(attempt(place), {place: f"b saw {self.b}"})
            self.assertEqual(self.attempt(self.a, place), {place: f"b saw {self.a_inside}"})

    def test_commands_of_the_documents_open_the_firewall_of_a_docker_engine(self):
        if shutil.which("iptables") is None:
            self.skipTest("iptables is not installed")
        self.addCleanup(run, "nft", "-f", "-", stdin="add table ip filter\ndelete table ip filter\n")
        for arguments in ("-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-A FORWARD -j REJECT"):
            run("iptables", *arguments.split())
        self.assertEqual(self.attempt(self.a, INTERNET), {INTERNET: "ECONNREFUSED"})
        text = (support.TOP / "RUNC.md").read_text()
        run("sh", "-e", "-c", "\n".join(re.findall("^ {4}(iptables .*)$", text, re.MULTILINE)))
        self.assertEqual(self.attempt(self.a, INTERNET), BY_NAT)

    def test_flushed_rules_come_back(self):
        table, = tables()
        run("nft", "flush", "ruleset")          # as a firewall does that is reloaded
        wait_until(lambda: tables() == [table], "the table is back")
        self.assertEqual(self.attempt(self.a, "tcp:203.0.113.2:8080", INTERNET),
                         {"tcp:203.0.113.2:8080": "ECONNREFUSED", **BY_NAT})
        self.daemon.wait_log(f"somebody deleted nftables {table}")


class Modes(unittest.TestCase):
    def setUp(self):
        self.daemon = world.daemon

    def deploy(self, name: str, *options: str) -> str:
        self.addCleanup(self.daemon.faas, "rm", name, check=False)
        return self.daemon.deploy(name, world.image, *options)

    def test_from_one_to_the_next(self):
        address = self.deploy("f")
        facts = requested(address, "/facts")
        self.assertEqual((facts["interfaces"], facts["resolv"]), (["lo"], ""))
        self.assertIn("class", facts["sys"])
        self.assertEqual(requested(address, f"/try?{INTERNET}"), {INTERNET: "ENETUNREACH"})
        self.assertEqual((link_of("f"), support.mounts(f"{self.daemon.run_dir}/net")), (None, []))

        self.daemon.set("f", "--net", "egress")
        self.assertEqual(requested(address, f"/try?{INTERNET}"), BY_NAT)
        self.assertEqual(self.daemon.info("f")["options"]["net"], "egress")
        self.assertRegex(self.daemon.faas("info", "f").stdout, r"(?m)^net: +egress$")

        self.daemon.set("f", "--net", "host")
        facts = requested(address, "/facts")
        self.assertTrue({"wan", "lan", "meta"} < set(facts["interfaces"]), facts)
        self.assertEqual((facts["resolv"], facts["sys"], facts["raw"]), (RESOLV_CONF, ["fs"], "EPERM"))
        self.assertEqual(requested(address, "/try?tcp:127.0.0.1:8080"), {"tcp:127.0.0.1:8080": "host saw 127.0.0.1"})
        self.assert_gone("f")

        self.daemon.set("f", "--net", "none")
        self.assertEqual(requested(address, "/facts")["interfaces"], ["lo"])

    def assert_gone(self, name: str) -> None:
        """Wait until no trace of the last function with egress is left."""
        wait_until(lambda: not (self.daemon.run_dir / "net").exists(), f"the namespace of {name} is gone")
        self.assertEqual((link_of(name), [table for table in tables() if "faasd" in table]), (None, []))
        self.assertFalse((self.daemon.run_dir / "resolv.conf.egress").exists())

    def test_running_invocations_keep_their_network(self):
        """One connection was made before its function's network changes and others' come and go, one is made after."""
        address = self.deploy("f", "--net", "egress")
        self.deploy("g")
        with socket.create_connection((address, 80), timeout=support.READY_SECONDS) as client:
            client.sendall(f"GET /late?{INTERNET} HTTP/1.1\r\n\r\n".encode())
            self.assertEqual(client.recv(100), b"connected\n")
            self.daemon.set("g", "--net", "egress")
            self.daemon.remove("g")
            self.assertEqual((link_of("g"), os.listdir(self.daemon.run_dir / "net")), (None, ["f"]))
            self.assertEqual(len(re.findall(r'"faas\w+-\d+" \. ', run("nft", "list", "ruleset"))), 1)
            self.daemon.set("f", "--net", "none")
            self.assertEqual(requested(address, "/facts")["interfaces"], ["lo"])
            client.sendall(b"x")
            answer = b"".join(iter(lambda: client.recv(1000), b""))
        self.assertEqual(json.loads(answer.partition(b"\r\n\r\n")[2]),
                         {"old": "still there", "new": "internet saw 203.0.113.2"})
        self.assert_gone("f")

    def test_a_deploy_that_fails_leaves_none(self):
        result = self.daemon.faas("new", "f", "--net", "egress", stdin=support.handler_image("raise SystemExit(3)"),
                                  check=False)
        self.assertIn("exited with status 3", result.stderr)
        self.assert_gone("f")

    def test_bad_values(self):
        self.assertEqual(self.daemon.faas("set", "f", "--net", "bridge", check=False).returncode, 2)
        status, body = self.daemon.api("POST", "/functions/f?net=bridge", b"x")
        self.assertEqual((status, json.loads(body)["error"]), (400, "bad net 'bridge': write none, egress or host"))

    def test_subnets_in_use(self):
        self.deploy("f", "--net", "egress")
        for subnet, words in (("198.18.0.0/24", "198.18.0.1/32 is assigned to faas"),
                              ("10.7.0.0/16", "functions listen on 10.7.0.0/24"),
                              ("192.168.77.0/30", "192.168.77.0/24 is assigned to lan")):
            networks = faasd.EgressNetworks(world.directory, ipaddress.IPv4Network(subnet),
                                            ipaddress.IPv4Network("10.7.0.0/24"), 80)
            with self.subTest(subnet), self.assertRaises(faasd.Conflict) as caught:
                networks.provide("g")
            self.assertIn(f"is in use: {words}", str(caught.exception))
            self.assertIn("start faasd with another --egress-subnet", str(caught.exception))
            self.assertEqual((link_of("g"), len(support.networks())), (None, 2))


    def test_what_fails_half_way_leaves_nothing(self):
        networks = faasd.EgressNetworks(world.directory, ipaddress.IPv4Network("198.18.16.0/24"),
                                        ipaddress.IPv4Network("10.7.0.0/24"), 80)
        mark = networks.table.removeprefix("faasd_")
        run("ip", "link", "add", f"faas{mark}-1", "type", "veth", "peer", "name", "in-the-way")
        with self.assertRaisesRegex(faasd.FaasdError, "cannot make a network for net egress: ip: RTNETLINK.*exists"):
            networks.provide("g")
        self.assertEqual((networks.has("g"), support.networks(mark), (world.directory / "net").exists()),
                         (False, [], False))


class Names(unittest.TestCase):
    """RUN_DIR/hosts/functions, and who reads it."""

    RESOLVER = "127.0.0.1"

    def setUp(self):
        self.daemon = world.start_daemon(self.addCleanup, *OTHER_DAEMON, "--domain", "functions.test")
        self.names = self.daemon.run_dir / "hosts/functions"

    def test_containers_with_a_network_find_functions(self):
        address = self.daemon.deploy("f", world.image)
        self.assertEqual(self.names.read_text(), f"{address}\tf.functions.test\n")
        for net, expected in (("egress", f'"{address}"'), ("host", f'"{address}"')):
            with self.subTest(net):
                other = self.daemon.deploy(net, world.image, "--net", net)
                self.assertEqual(get(other, "/lookup?f.functions.test"), (200, expected))
        self.assertNotIn("functions.test", get(self.daemon.deploy("n", world.image), "/hosts")[1])
        self.daemon.kill()
        self.daemon.start()
        self.daemon.remove("f")
        self.assertEqual(sorted(line.split()[1] for line in self.names.read_text().splitlines()),
                         [f"{name}.functions.test" for name in ("egress", "host", "n")])
        self.daemon.stop()
        self.assertFalse(self.names.exists())
        self.daemon.start()

    def test_dnsmasq(self):
        if shutil.which("dnsmasq") is None:
            self.skipTest("dnsmasq is not installed")
        server = subprocess.Popen(["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv",
                                   "--no-hosts", "--user=nobody", "--pid-file=", "--port=5353",
                                   f"--listen-address={self.RESOLVER}", "--bind-interfaces",
                                   f"--hostsdir={self.names.parent}"], stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)
        self.daemon.deploy("f", world.image)
        wait_until(lambda: self.look_up("f.functions.test") == "10.7.0.10", "it resolves")
        self.daemon.deploy("g", world.image)
        wait_until(lambda: self.look_up("g.functions.test") == "10.7.0.11", "a second one does")
        self.daemon.remove("f")
        wait_until(lambda: self.look_up("f.functions.test") == "", "it does no more")
        self.assertEqual(self.look_up("g.functions.test"), "10.7.0.11")

    def look_up(self, name: str) -> str:
        """Return the address that dnsmasq has for a name."""
        question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0\0\1\0\1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(1)
            client.connect((self.RESOLVER, 5353))
            try:
                client.send(b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + question)
                answer = client.recv(512)
            except OSError:                     # it does not listen yet
                return ""
        return socket.inet_ntoa(answer[-4:]) if answer[6:8] == b"\0\1" else ""


class Published(unittest.TestCase):
    """Ports of this machine that lead to functions."""

    HERE, LAN = "tcp:127.0.0.1:8000", "tcp:192.168.77.1:8000"
    ONE = "tcp:192.168.77.1:80"

    def start(self) -> support.Daemon:
        return world.start_daemon(self.addCleanup, *OTHER_DAEMON)

    def from_the_lan(self, *places: str) -> dict[str, str]:
        return attempt(*places, wrapper=world.lan.wrapper)

    def test_answers_there(self):
        daemon = self.start()
        address = daemon.deploy("f", world.image, "--publish", "8000,192.168.77.1:80")
        self.assertEqual(self.from_the_lan(self.LAN, self.ONE, "tcp:192.168.77.1:81"), {
            self.LAN: "f saw 192.168.77.2", self.ONE: "f saw 192.168.77.2", "tcp:192.168.77.1:81": "ECONNREFUSED"})
        self.assertEqual(attempt(self.HERE, "tcp:127.0.0.1:80", f"tcp:{address}:8000", f"tcp:{address}:80"), {
            self.HERE: "f saw 127.0.0.1", "tcp:127.0.0.1:80": "ECONNREFUSED", f"tcp:{address}:8000": "ECONNREFUSED",
            f"tcp:{address}:80": f"f saw {address}"})
        self.assertRegex(daemon.faas("info", "f").stdout, r"(?m)^publish: +8000,192\.168\.77\.1:80$")
        daemon.set("f", "--publish", "192.168.77.1:80")
        self.assertEqual(self.from_the_lan(self.LAN, self.ONE),
                         {self.LAN: "ECONNREFUSED", self.ONE: "f saw 192.168.77.2"})
        with socket.create_server(("0.0.0.0", 8000)):           # nobody keeps it any more
            pass
        daemon.remove("f")
        self.assertEqual(self.from_the_lan(self.ONE), {self.ONE: "ECONNREFUSED"})
        self.assertEqual([table for table in tables() if "publish" in table], [])
        with socket.create_server(("192.168.77.1", 80)):
            pass

    def test_what_is_taken_is_refused(self):
        daemon = self.start()
        daemon.deploy("f", world.image, "--publish", "8000")
        for places, status, words in (
                ("8080", 409, "cannot publish 127.0.0.1:8080: another program has it"),
                ("192.168.77.1:8000", 409, "cannot publish 192.168.77.1:8000: function f already publishes it"),
                ("8001,8000", 409, "cannot publish 127.0.0.1:8000: function f already publishes it"),
                ("192.0.2.9:80", 409, "cannot publish 192.0.2.9:80: this machine has no such address"),
                ("10.7.0.10:81", 409, "cannot publish 10.7.0.10: that is an address of functions"),
                ("0", 400, "bad place to publish '0'"), ("1.2.3:80", 400, "bad place"), ("x", 400, "bad place")):
            with self.subTest(places):
                answer, body = daemon.api("POST", f"/functions/g?publish={places}&warm=0", world.image)
                self.assertEqual((answer, words in json.loads(body)["error"]), (status, True), body)
        with socket.create_server(("0.0.0.0", 8001)):           # held in vain
            pass
        with self.assertRaises(OSError), socket.create_server(("0.0.0.0", 8000)):
            self.fail("others can take what is published")
        self.assertEqual(attempt(self.HERE), {self.HERE: "f saw 127.0.0.1"})

    def test_rules_that_cannot_be_loaded(self):
        """Nothing is left of the function, or of what it was to become."""
        daemon = world.start_daemon(self.addCleanup, *OTHER_DAEMON)
        address = daemon.deploy("f", world.image, "--publish", "8000")
        daemon.stop()
        daemon.constants = {**daemon.constants, "PUBLISH_RULES": "'nonsense'"}
        daemon.start()
        place = f"tcp:{address}:80"
        self.assertEqual(attempt(place), {place: f"f saw {address}"})
        for method, path, image in (("PATCH", "/functions/f?publish=8001", None),
                                    ("POST", "/functions/g?publish=8002&warm=0", world.image)):
            status, body = daemon.api(method, path, image)
            self.assertIn("nft cannot load the rules of --publish", json.loads(body)["error"])
        self.assertEqual(attempt(place), {place: f"f saw {address}"})
        self.assertEqual(support.addresses("10.7.0.0/24"), [f"{address}/32"])
        daemon.deploy("h", world.image, "--warm", "0")          # it has nothing to do with them
        for port in (8001, 8002):
            with socket.create_server(("0.0.0.0", port)):
                pass

    @staticmethod
    def take_port() -> socket.socket:
        """Listen on a port that a daemon had published: a child that it was just starting may have it for a moment."""
        def listener() -> socket.socket | None:
            with contextlib.suppress(OSError):
                return socket.create_server(("127.0.0.1", 8000))
        return wait_until(listener, "the port is free")

    def test_rules_are_loaded_when_they_change_and_are_there_before_a_removal(self):
        """Ports that lead to a function that is gone would lead to the next one of its address."""
        programs, broken, calls = world.directory / "programs", world.directory / "broken", world.directory / "calls"
        loads = world.directory / "loads"
        programs.mkdir()
        for name in ("ip", "nft"):
            Daemons.script(programs / name, f'echo {name} >> {calls}\n[ {name} = nft ] && [ -e {broken} ] && exit 1\n'
                                            f'[ "$1" = -f ] && {{ tee -a {loads} | {shutil.which(name)} "$@"; '
                                            'exit; }\n'
                                            f'exec {shutil.which(name)} "$@"')
        daemon = world.start_daemon(self.addCleanup, *OTHER_DAEMON, env={"PATH": f"{programs}:{os.environ['PATH']}"})
        address = daemon.deploy("f", world.image, "--publish", "8000")
        broken.touch()
        status, body = daemon.api("DELETE", "/functions/f")
        self.assertEqual((status, json.loads(body)["error"]), (
            500, "function f stays, because its ports cannot be taken from it: nft cannot load the rules of --publish: "
                 "nft exited with status 1"))
        places = f"tcp:{address}:80", self.HERE
        self.assertEqual(attempt(*places), {places[0]: f"f saw {address}", self.HERE: "f saw 127.0.0.1"})
        broken.unlink()
        daemon.deploy("g", world.image, "--publish", "8001")
        daemon.kill()
        loads.unlink()
        daemon.constants = {**daemon.constants, "PORT_RETRY_SECONDS": "0.01"}
        with self.take_port():
            daemon.start()
            daemon.wait_log("trying again")
            before = calls.read_text().split()
            wait_until(lambda: calls.read_text().split().count("ip") > before.count("ip") + 3, "it looks again")
            self.assertEqual(calls.read_text().split().count("nft"), before.count("nft"))
        # Functions come back one after the other; meanwhile the ports of those to come are nobody else's.
        loaded = loads.read_text()
        self.assertGreater(loaded.count("dport 8000 dnat"), 0)
        self.assertEqual(loaded.count("dport 8001 dnat"), loaded.count("dport 8000 dnat"))
        wait_until(lambda: attempt(self.HERE) == {self.HERE: "f saw 127.0.0.1"}, "it is published there again")
        daemon.remove("f")
        daemon.remove("g")
        self.assertEqual([table for table in tables() if "publish" in table], [])

    def test_what_others_listen_on_stays_theirs(self):
        """On an address of lo that is in no list, as resolvers have it."""
        other = Peer("other", "tcp:127.0.0.53:8000", wrapper=())
        self.addCleanup(other.end)
        daemon = self.start()
        daemon.deploy("f", world.image, "--publish", "8000")
        self.assertEqual(attempt("tcp:127.0.0.53:8000", self.HERE),
                         {"tcp:127.0.0.53:8000": "other saw 127.0.0.1", self.HERE: "f saw 127.0.0.1"})

    def test_port_that_is_taken_while_no_daemon_runs(self):
        daemon = self.start()
        address = daemon.deploy("f", world.image, "--publish", "8000")
        daemon.kill()
        with self.take_port():
            daemon.start()
            place = f"tcp:{address}:80"
            self.assertEqual(attempt(place), {place: f"f saw {address}"})
            self.assertEqual(self.from_the_lan(self.LAN), {self.LAN: "f saw 192.168.77.2"})
            daemon.wait_log("cannot publish 127.0.0.1:8000: another program has it; trying again")
        wait_until(lambda: attempt(self.HERE) == {self.HERE: "f saw 127.0.0.1"}, "it is published there again")

    def test_a_user_who_takes_the_port_between_two_daemons_gets_nothing(self):
        """Whatever leads it to the function stays; after a stop nothing does, and nothing is tried without end."""
        daemon = self.start()
        daemon.deploy("f", world.image, "--publish", "127.0.0.1:8000")
        for end in (daemon.kill, lambda: daemon.stop(signal.SIGHUP)):
            end()
            with self.take_port():
                daemon.start()
                self.assertEqual(attempt(self.HERE), {self.HERE: "f saw 127.0.0.1"})
        daemon.stop()
        thief = Peer("thief", self.HERE, wrapper=())
        self.addCleanup(thief.end)
        daemon.start()
        self.assertEqual(attempt(self.HERE), {self.HERE: "thief saw 127.0.0.1"})
        daemon.wait_log("cannot publish 127.0.0.1:8000: another program has it; trying again")
        daemon.deploy("g", world.image, "--publish", "8001")     # what comes and goes with it is no other's doing
        daemon.remove("g")
        self.assertNotIn("somebody deleted", daemon.log())

    def test_rules_of_functions_that_come_back_last_stay_meanwhile(self):
        """Else whoever has taken their ports gets what comes there, until all others are back."""
        functions = {name: (f"10.7.0.{number}", [("127.0.0.1", 8000 + number)])
                     for number, name in enumerate("fgh", 10)}
        earlier, now = (faasd.PublishedPorts(world.directory, ipaddress.IPv4Network("10.7.0.0/24"), 80) for _ in "12")
        for name, (address, places) in functions.items():
            earlier.hold(name, places)
            earlier.publish(name, address, places)
        rules = run("nft", "list", "table", "ip", earlier.table)
        self.assertEqual(rules.count("dnat to"), 3)
        del functions["h"]              # it was removed while nothing could be told the kernel
        now.recover(functions)
        now.publish("f", *functions["f"])
        self.assertEqual(run("nft", "list", "table", "ip", now.table).splitlines(), [
            line for line in rules.splitlines() if "dnat to 10.7.0.12" not in line])
        earlier.remove_all()
        self.assertEqual([table for table in tables() if "publish" in table], [])
        for name in "fgh":
            earlier.give_back(name)

    def test_stop_refuses_newcomers_and_serves_who_is_on_the_way(self):
        daemon = support.Daemon(*OTHER_DAEMON, constants={"ARRIVAL_SECONDS": 5 * support.PATIENCE}).start()
        self.addCleanup(daemon.close)
        daemon.deploy("f", world.image, "--publish", "8000")
        with socket.create_connection(("127.0.0.1", 8000), support.READY_SECONDS) as client:
            daemon.process.send_signal(signal.SIGTERM)
            wait_until(lambda: attempt(self.HERE) == {self.HERE: "ECONNREFUSED"}, "nobody else is let in")
            client.sendall(b"GET /who HTTP/1.1\r\n\r\n")
            self.assertEqual(client.recv(1000), b"f saw 127.0.0.1\n")
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        daemon.log_file.close()

    def test_restarts_and_flushed_rules(self):
        daemon = self.start()
        daemon.deploy("f", world.image, "--publish", "8000")
        for end in (daemon.kill, lambda: daemon.stop(signal.SIGHUP)):
            end()
            daemon.start()
            self.assertEqual(self.from_the_lan(self.LAN), {self.LAN: "f saw 192.168.77.2"})
        run("nft", "flush", "ruleset")
        wait_until(lambda: self.from_the_lan(self.LAN) == {self.LAN: "f saw 192.168.77.2"}, "the rules are back")
        daemon.kill()
        change_registry(daemon, "f", publish="")
        daemon.start()
        self.assertEqual([table for table in tables() if "publish" in table], [])


class Lan(unittest.TestCase):
    """--lan: whether a neighbour reaches functions who sends packets for their subnet here."""

    def test_each_start_chooses(self):
        daemon = world.start_daemon(self.addCleanup, *OTHER_DAEMON, "--lan", "allow")
        f = daemon.deploy("f", world.image)
        daemon.deploy("g", world.image, "--net", "egress", "--publish", "8000")
        place, published = f"tcp:{f}:80", "tcp:192.168.77.1:8000"
        with route_from_the_lan("10.7.0.0/24"):
            for lan, answer, end in (("allow", "f saw 192.168.77.2", daemon.kill),
                                     ("deny", "timed out", lambda: daemon.stop(signal.SIGHUP)),
                                     ("allow", "f saw 192.168.77.2", None)):
                with self.subTest(lan):
                    self.assertEqual(attempt(published, wrapper=world.lan.wrapper), {published: "g saw 192.168.77.2"})
                    if lan == "deny":           # whatever somebody's firewall does
                        run("nft", "flush", "ruleset")
                    patience = 1 if answer == "timed out" else 10
                    self.assertEqual(attempt(place, wrapper=world.lan.wrapper, patience=patience), {place: answer})
                    self.assertEqual(attempt(place), {place: f"f saw {f}"})
                if end:
                    end()
                    daemon.arguments = (*OTHER_DAEMON, "--lan", "allow" if lan == "deny" else "deny")
                    daemon.start()


class Daemons(unittest.TestCase):
    """A second daemon beside the first."""

    def test_two_side_by_side(self):
        f = world.daemon.deploy("f", world.image, "--net", "egress")
        self.addCleanup(world.daemon.faas, "rm", "f", check=False)
        other = world.start_daemon(self.addCleanup, "--subnet", "10.7.0.0/24", "--egress-subnet", "198.18.16.0/30")
        g = other.deploy("g", world.image, "--net", "egress")
        result = other.faas("new", "h", "--net", "egress", stdin=world.image, check=False)
        self.assertIn("198.18.16.0/30 has no free address: start faasd with a larger --egress-subnet", result.stderr)
        server = Peer("g's", "tcp:0.0.0.0:8090", wrapper=in_namespace(other.run_dir / "net" / "g"))
        self.addCleanup(server.end)
        refused = ["tcp:198.18.16.2:8090", "tcp:198.18.16.1:8080", f"tcp:{g}:80"]
        self.assertEqual([answer.split(" saw ")[0] for answer in attempt(*refused).values()], ["g's", "host", "g"])
        self.assertEqual(requested(f, f"/try?{','.join(refused)}"), dict.fromkeys(refused, "ECONNREFUSED"))
        for address in (f, g):
            self.assertEqual(requested(address, f"/try?{INTERNET}"), BY_NAT)
        world.daemon.faas("rm", "f")
        self.assertEqual(requested(g, f"/try?{INTERNET}"), BY_NAT)

    def test_killed(self):
        """A network in use is taken over; one whose function wants it no more, half a one and a stranger's are not."""
        daemon = world.start_daemon(self.addCleanup, *OTHER_DAEMON)
        f = daemon.deploy("f", world.image, "--net", "egress")
        h = daemon.deploy("h", world.image, "--net", "egress")
        link, namespace = link_of("f"), os.stat(daemon.run_dir / "net/f").st_ino
        daemon.kill()
        change_registry(daemon, "h", net="none")
        half = link.rpartition("-")[0] + "-9"
        run("ip", "link", "add", half, "type", "veth", "peer", "name", "half")
        (daemon.run_dir / "net/ghost").touch()
        run("unshare", f"--net={daemon.run_dir}/net/ghost", "true")
        daemon.start()
        self.assertEqual((link_of("f"), os.stat(daemon.run_dir / "net/f").st_ino), (link, namespace))
        self.assertEqual((link_of("h"), os.listdir(daemon.run_dir / "net")), (None, ["f"]))
        self.assertNotIn(half, run("ip", "link"))
        self.assertEqual(requested(f, f"/try?{INTERNET}"), BY_NAT)
        self.assertEqual(requested(h, f"/try?{INTERNET}"), {INTERNET: "ENETUNREACH"})
        # And if its namespace is gone, as with the mount namespace of a systemd unit, it gets another.
        daemon.kill()
        run("umount", f"{daemon.run_dir}/net/f")
        daemon.start()
        self.assertEqual(requested(f, f"/try?{INTERNET}"), BY_NAT)
        daemon.kill()
        change_registry(daemon, "f", net="none")
        daemon.start()
        self.assertEqual((support.networks(), (daemon.run_dir / "net").exists()), ([], False))

    def test_without_nft(self):
        hidden = ("unshare", "--mount", "--propagation", "private", "sh", "-c",
                  'mount --bind /dev/null "$(readlink -f "$(command -v nft)")" && exec "$@"', "sh")
        with support.Daemon(*OTHER_DAEMON, wrapper=hidden) as daemon:
            daemon.deploy("f", world.image)
            status, body = daemon.api("PATCH", "/functions/f?net=egress")
            self.assertEqual((status, json.loads(body)["error"]),
                             (409, "net egress needs the nft program: apt install nftables"))
            daemon.remove("f")

    def test_what_the_machine_lacks(self):
        """Each is one line, and the function goes on as it was."""
        programs = world.directory / "bin"
        programs.mkdir()
        for name in ("ip", support.RUNTIME, "mount", "umount", "unshare", "nsenter", "true"):
            (programs / name).symlink_to(shutil.which(name))
        daemon = world.start_daemon(self.addCleanup, *OTHER_DAEMON, env={"PATH": str(programs)})
        address = daemon.deploy("f", world.image)

        def refuse(status: int, words: str, left: bool = False) -> None:
            answer, body = daemon.api("PATCH", "/functions/f?net=egress")
            self.assertEqual((answer, words in json.loads(body)["error"]), (status, True), body)
            self.assertEqual(requested(address, "/facts")["interfaces"], ["lo"])
            self.assertEqual((support.networks(), (daemon.run_dir / "net").exists()), ([], left))

        self.script(programs / "nft", 'echo "no netlink" >&2; exit 1')
        refuse(500, "cannot list the chains of nftables: no netlink")
        self.script(programs / "nft", f'exec {shutil.which("nft")} "$@"')
        for words in ("link set lo", "link add", "-batch", "alias"):
            self.script(programs / "ip", f'case "$*" in *"{words}"*) echo "no such luck" >&2; exit 2 ;; esac\n'
                                         f'exec {shutil.which("ip")} "$@"')
            refuse(500, "no such luck")
        self.script(programs / "ip", f'exec {shutil.which("ip")} "$@"')
        for name in ("wan", "lan", "meta"):
            self.addCleanup(set_sysctl, f"{name}/forwarding", set_sysctl(f"{name}/forwarding", "0"))
        refuse(409, "sysctl -w net.ipv4.ip_forward=1")
        set_sysctl("wan/forwarding", "1")       # as the message says, this is enough
        with rules(STRICT_FIREWALL):
            daemon.set("f", "--net", "egress")
        daemon.wait_log("chain forward of nftables table ip firewall drops what it does not know")
        self.assertEqual(requested(address, f"/try?{INTERNET}"), BY_NAT)

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


if __name__ == "__main__":
    unittest.main()
