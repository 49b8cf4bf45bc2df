"""Deploying, redeploying and removing functions through the real CLI, and everything that may go wrong on the way."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

import support
from support import get, wait_until
import archives

EXITS = "import sys; print('on stdout'); print('no config \\x1b[2J', file=sys.stderr); sys.exit(4)"
SLEEPS = "import time; print('waiting for nothing', flush=True); time.sleep(3600)"


class DeployCase(support.SharedDaemonCase):
    def assert_nothing_there(self, name: str):
        """No directory, address, registry entry or log of a function that was refused."""
        self.assertEqual(list((self.daemon.state_dir / "images").iterdir()), [])
        self.assertEqual(list((self.daemon.state_dir / "logs").iterdir()), [])
        self.assertEqual(list((self.daemon.state_dir / "tmp").iterdir()), [])
        self.assertEqual(support.addresses(), [])
        registry = self.daemon.state_dir / "registry.json"
        self.assertTrue(not registry.exists() or json.loads(registry.read_text())["functions"] == [])
        self.assertEqual(support.footprint(self.daemon)["containers"], [])
        self.assertIn(f"no function '{name}'", self.daemon.faas("info", name, check=False).stderr)

    def refuse(self, *arguments: str, stdin: bytes | None = None) -> list[str]:
        """Run a faas command that must fail with status 1 and return its lines."""
        result = self.daemon.faas(*arguments, stdin=stdin, check=False)
        self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
        self.assertTrue(result.stderr.startswith("faas: "), result.stderr)
        self.assertNotIn("Traceback", result.stderr + self.daemon.log())
        return result.stderr.splitlines()


class TooLarge(DeployCase):
    """What execve(2) refuses, and a config.json that would fill the directory of all functions' containers."""

    def test_environment_and_command(self):
        large, word = "x" * (128 << 10), r"\Afaas: "
        variable = word + r"the variable BIG has 131076 bytes: one may have at most 131071\Z"
        argument = word + r"the command's argument has 131072 bytes: one may have at most 131071\Z"
        together = word + (r"the environment of \d+ bytes and the command of \d+ make a config.json of \d+ bytes, "
                           r"over 262")
        many = [f"V{number}=" + "x" * 60_000 for number in range(10)]
        for config, message in (({"Env": ["BIG=" + large]}, variable), ({"Cmd": [large]}, argument),
                                ({"Env": many}, together), ({"Cmd": ["x" * 60_000] * 10}, together),
                                ({"Env": ["A=" + "\x80" * 60_000]}, together)):       # six bytes each in JSON
            line, = self.refuse("new", "f", stdin=support.small_image(**config))
            self.assertRegex(line, message)
        self.assert_nothing_there("f")
        self.daemon.deploy("f", support.small_image(), "-e", "A=" + "x" * 60_000)
        for number in range(3):
            self.daemon.faas("set", "f", "-e", f"V{number}=" + "x" * 50_000)
        line, = self.refuse("set", "f", "-e", "V3=" + "x" * 60_000)
        self.assertRegex(line, together)
        self.assertEqual(self.daemon.info("f")["state"], "ready")
        self.assertEqual(len(self.daemon.info("f")["options"]["env"]), 4)


class HitPids(DeployCase):
    """What the kernel counted, told where the container's own words only are "can't start new thread"."""

    THREADS = """import os, threading
hold = threading.Event()
def start(count):
    try:
        for _ in range(count):
            threading.Thread(target=hold.wait, daemon=True).start()
    except RuntimeError as error:
        print(error, flush=True)
        hold.wait(WAIT)
        os._exit(1)
"""

    def test_a_start_that_is_refused_threads(self):
        source = self.THREADS.replace("WAIT", "2") + "start(130)\n"
        first, *rest = self.refuse("new", "f", "--pids", "64", stdin=support.handler_image(source))
        self.assertRegex(first, "the program exited with status 1 after it had hit --pids before it listened on")
        self.assertRegex("".join(rest), "can't start new thread")

    def test_one_that_exits_at_once(self):
        """Its cgroup may be gone before we can look."""
        source = self.THREADS.replace("WAIT", "0") + "start(130)\n"
        first, *rest = self.refuse("new", "f", "--pids", "64", stdin=support.handler_image(source))
        self.assertRegex(first, r"exited with status 1 (after it had hit --pids|\(did it hit --pids\?\)) before it",
                         rest)

    def test_a_handler_that_is_refused_threads(self):
        handler = support.HANDLER.read_text()
        refused = handler.replace("def respond(", "def respond(*_):\n    start(130)\n\ndef unused(")
        source = self.THREADS.replace("WAIT", "2") + refused
        address = self.daemon.deploy("f", support.handler_image(source), "--pids", "64")
        status, body = get(address)
        self.assertEqual(status, 502)
        self.assertIn("after it had hit --pids without an answer", body)
        self.daemon.wait_idle("f")
        self.assertIn("(it has hit --pids: a process or thread was refused)", self.daemon.function_log("f"))

    def test_who_only_prints_so_has_not(self):
        source = "import sys\nprint('thread\\n' * 300, flush=True)\nsys.exit('can not fork')"
        first, *_ = self.refuse("new", "f", stdin=support.handler_image(source))
        self.assertRegex(first, "the program exited with status 1 before it listened on")


class OtherMakers(DeployCase):
    def test_what_an_image_loses_is_told(self):
        """An owner that no container has, a named pipe: one warning each, in the log and on stderr."""
        odd = archives.layer(archives.file("far", "x", uid=1_516_583_083), archives.fifo("run/s6"))
        result = self.daemon.faas("new", "f", stdin=with_layer(odd))
        self.assertEqual(result.stdout, "✓ Deployed f at 10.0.0.10\n")
        self.assertRegex(result.stderr, r"\Afaas: warning: 1 files are of users .* of 65534 \(first: far\)\n"
                                        r"faas: warning: 1 named pipes .* \(first: /run/s6\)\n\Z")
        self.daemon.wait_log("function=f image: 1 named pipes")
        self.assertRegex(self.daemon.log(), "function=f image: 1 files .*\n(.*\n)*.*function=f image: 1 named pipes")

    def test_user_of_a_scratch_image_reads_by_access_list_and_writes_to_tmp(self):
        """B2, B18: user:1000:r on a 0640 file; /tmp is missing in the image; other mounts have their modes."""
        listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in (
            (1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 0, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)))
        odd = archives.layer(
            archives.file("secret", "by list", mode=0o640, records={"SCHILY.xattr.system.posix_acl_access": listed}),
            archives.directory("volume", mode=0o1733), archives.whiteout("tmp"))
        source = """import os, stat
for path in ("/tmp/x", "/dev/shm/x", "/volume/x"):
    with open(path, "w") as file:
        file.write("x")
print(open("/secret").read(), *(oct(stat.S_IMODE(os.stat(path).st_mode)) for path in
      ("/tmp", "/dev/shm", "/volume", "/dev", "/dev/mqueue")), flush=True)
""" + support.HANDLER.read_text()
        self.daemon.deploy("f", with_layer(odd, source, User="1000:1000", Volumes={"/volume": {}}), "--warm", "1")
        self.daemon.wait_warm("f", 1)
        self.assertIn("by list 0o1777 0o1777 0o1733 0o755 0o1777\n", self.daemon.function_log("f"))
        acl = os.getxattr(self.daemon.rootfs("f") / "secret", "system.posix_acl_access")
        first = json.loads((self.daemon.rootfs("f").parent / "image.json").read_text())["first_id"]
        self.assertEqual(struct.unpack_from("<I", acl, 16)[0], first + 1000)


def with_layer(layer: bytes, source: str | None = None, **config) -> bytes:
    """The image of the tests' handler with a layer more."""
    return support.handler_image(source, layers=[layer], **config)


class Deploy(DeployCase):
    def test_whole_life(self):
        self.assertEqual(self.daemon.faas("list").stdout.split(),
                         "NAME ADDRESS STATE WARM RUNNING REQUESTS CONTRACT IMAGE CREATED COMMAND".split())
        address = self.daemon.deploy("hello", support.handler_image(), "--memory", "64m", "--cpus", "0.5")
        self.assertEqual(address, "10.0.0.10")
        self.assertEqual(support.addresses(), ["10.0.0.10/32"])
        self.assertEqual(get(address, "/x"), (200, "hello /x"))
        self.assertEqual(self.daemon.faas("ip", "hello").stdout, "10.0.0.10\n")
        self.daemon.wait_idle("hello")
        row = self.daemon.faas("list").stdout.splitlines()[1].split()
        self.assertEqual(row[:8], ["hello", "10.0.0.10", "ready", "0", "0", "1", "handler", "test:latest"])
        info = self.daemon.info("hello")
        self.assertEqual((info["options"]["memory"], info["options"]["cpus"]), (64 << 20, 0.5))
        self.assertEqual(self.daemon.function_log("hello").count("outcome=answered"), 1)
        self.assertEqual(self.daemon.faas("rm", "hello").returncode, 0)
        self.assert_nothing_there("hello")
        with self.assertRaises(OSError):
            socket.create_connection((address, 80), timeout=5).close()

    def test_address_that_is_asked_for(self):
        ask = functools.partial(self.daemon.faas, "new", stdin=support.handler_image(), check=False)
        self.assertEqual(ask("f", "--ip", "10.0.0.77").stdout, "✓ Deployed f at 10.0.0.77\n")
        self.assertEqual(get("10.0.0.77")[0], 200)
        for name, address, complaint in (
                ("g", "10.0.0.77", "function f has 10.0.0.77: ask for another address, or for none"),
                ("f", "10.0.0.78", "function f has 10.0.0.77 already: remove it to give it another address"),
                ("g", "10.0.0.9", "ask for one from 10.0.0.10 to 10.0.0.254"),
                ("g", "10.0.0.255", "a function cannot have the address"), ("g", "10.1.0.10", "a function cannot have"),
                ("g", "x", "a function cannot have the address 'x'")):
            with self.subTest(address):
                self.assertIn(complaint, ask(name, "--ip", address).stderr)
        self.assertIn("✓ Replaced f at 10.0.0.77", ask("f", "--ip", "10.0.0.77").stdout)
        self.assertEqual(self.daemon.deploy("g"), "10.0.0.10")

    def test_lowest_free_address(self):
        image = support.handler_image()
        for number in range(4):
            self.assertEqual(self.daemon.deploy(f"f{number}", image), f"10.0.0.{10 + number}")
        self.daemon.faas("rm", "f2", "f1")
        self.assertEqual(self.daemon.deploy("g", image), "10.0.0.11")
        self.assertEqual(self.daemon.deploy("h", image), "10.0.0.12")

    def test_several_deploys_at_once_get_different_addresses(self):
        image = support.handler_image()
        with ThreadPoolExecutor(6) as pool:
            addresses = list(pool.map(lambda n: self.daemon.deploy(f"f{n}", image), range(6)))
        self.assertEqual(sorted(addresses), [f"10.0.0.{n}" for n in range(10, 16)])
        for address in addresses:
            self.assertEqual(get(address)[0], 200)

    def test_one_change_of_a_function_at_a_time(self):
        image = support.handler_image()
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.connect(str(self.daemon.socket))
        client.sendall(b"POST /functions/f HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-tar\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(image))
        wait_until(lambda: list((self.daemon.state_dir / "tmp").iterdir()), "the first upload has begun")
        self.assertIn("a deploy is under way", self.refuse("new", "f", stdin=image)[0])
        client.sendall(image)
        self.assertIn(b" 201 ", client.recv(65536))
        self.assertEqual(get("10.0.0.10")[0], 200)

    def test_options_of_the_image_config(self):
        image = support.handler_image(User="1234:5678", WorkingDir="/work/dir", Volumes={"/data": {}},
                                      Env=["A=image", "B=image", "HOME=/custom", "LABEL=x"])
        address = self.daemon.deploy("f", image, "-e", "A=user", "--", "word")
        facts = json.loads(get(address, "/facts")[1])
        self.assertEqual((facts["ids"][:2], facts["cwd"]), ([1234, 5678], "/work/dir"))
        self.assertEqual([facts["env"][key] for key in ("A", "B", "HOME")], ["user", "image", "/custom"])
        self.assertEqual(facts["argv"], ["/handler.pl", "word"])
        self.assertNotIn("/data", [mount for mount, *_ in facts["mounts"]])

    def test_volume_with_content_keeps_it_and_is_private(self):
        image = support.handler_image(files={"etc/conf/file": "content"}, Volumes={"/etc/conf": {}})
        address = self.daemon.deploy("f", image)
        self.assertEqual(get(address, "/read?/etc/conf/file"), (200, "content"))
        self.assertEqual(get(address, "/write?/etc/conf/new"), (200, "done"))
        self.assertEqual(get(address, "/read?/etc/conf/new")[0], 502)

    def test_logs(self):
        address = self.daemon.deploy("f")
        self.assertEqual(self.daemon.function_log("f").count("\n"), 1)       # the deploy itself
        for number in range(3):
            get(address, f"/{number}")
        self.daemon.wait_idle("f")
        self.assertEqual(re.findall(r"GET /(\d)", self.daemon.faas("logs", "f", "-n", "2").stdout), ["1", "2"])
        self.assertEqual(self.daemon.faas("logs", "f", "--since", "2030-01-01T00:00:00Z").stdout, "")
        self.assertEqual(self.daemon.faas("logs", "f", "--since", "1h").stdout.count("outcome="), 3)
        follower = subprocess.Popen([*support.FAAS, "--socket", self.daemon.socket, "logs", "f", "-f", "-n", "1"],
                                    stdout=subprocess.PIPE, text=True)
        try:
            self.assertIn("GET /2", follower.stdout.readline())
            get(address, "/followed")
            self.assertIn("GET /followed", follower.stdout.readline())
        finally:
            follower.send_signal(signal.SIGINT)
            follower.wait()
            follower.stdout.close()

    def test_log_is_rotated_and_capped(self):
        address = self.daemon.deploy("f")
        for _ in range(18):
            self.assertEqual(get(address, f"/stderr?{1 << 20}")[0], 200)
        self.daemon.wait_idle("f")
        self.daemon.function_log("f")           # so that all of it is in the files
        sizes = [path.stat().st_size for path in (self.daemon.state_dir / "logs").iterdir()]
        self.assertEqual(len(sizes), 2)
        self.assertLessEqual(max(sizes), 8 << 20)
        self.assertGreater(sum(sizes), 8 << 20)


class FailedDeploy(DeployCase):
    """Whatever goes wrong: one clear line, nothing left, and the version before goes on serving."""

    def setUp(self):
        super().setUp()
        self.good = support.handler_image(label="good")

    def test_image_whose_digest_begins_like_that_of_another(self):
        """Such a pair can be found; here the one that runs is called by another digest."""
        address = self.daemon.deploy("f", self.good)
        description = self.daemon.rootfs("f").parent / "image.json"
        document = json.loads(description.read_text())
        description.write_text(json.dumps({**document, "digest": document["digest"][:-1] + "x"}))
        self.assertIn("another digest that begins like", self.refuse("new", "f", stdin=self.good)[0])
        self.assertEqual(get(address, "/label"), (200, "good"))

    def both_ways(self, *options: str, image: bytes) -> str:
        """Deploy what must fail, as a new function and over an existing one; return the output of the first."""
        lines = self.refuse("new", "bad", *options, stdin=image)
        self.assert_nothing_there("bad")
        address = self.daemon.deploy("f", self.good)
        before = self.daemon.info("f")
        self.refuse("new", "f", *options, stdin=image)
        self.assertEqual(get(address, "/label"), (200, "good"))
        self.daemon.wait_idle("f")
        self.assertEqual({**self.daemon.info("f"), "requests": 0}, before)
        self.assertEqual(len(list((self.daemon.state_dir / "images" / "f").iterdir())), 1)
        return "\n".join(lines)

    def test_server_exits(self):
        """What is told is its failure with all that a server may do, not that for want of it."""
        source = "import os\nos.chown('/etc', 1, 1)\nprint('no config', flush=True)\nos._exit(5)\n"
        result = self.daemon.faas("new", "bad", stdin=support.handler_image(source), check=False)
        self.assertIn("the program exited with status 5 before it listened on a TCP port", result.stderr)
        self.assertIn("\n  no config\n", result.stderr)

    def test_handler_exits(self):
        out = self.both_ways(image=support.handler_image(EXITS))
        self.assertRegex(out, "^faas: function bad does not start: the program exited with status 4 before it listened "
                              "on a TCP port; it listened on nothing; it did not connect to /control.sock either\n")
        self.assertIn("\n  on stdout", out)
        self.assertIn("  no config \\x1b[2J", out)

    def test_handler_never_connects(self):
        out = self.both_ways("--start-timeout", "1s", image=support.handler_image(SLEEPS))
        self.assertIn("the program did not listen on a TCP port or connect to /control.sock within 1 s", out)
        self.assertIn("  waiting for nothing", out)

    def test_command_that_does_not_exist(self):
        out = self.both_ways(image=support.handler_image(Entrypoint=["/no/such/program"]))
        self.assertIn("function bad does not start: cannot run '/no/such/program': it is not in the image\n", out)

    def test_no_command(self):
        out = self.both_ways(image=support.handler_image(Entrypoint=None, Cmd=None))
        self.assertIn("the image names no command to run: give one after `--`", out)

    def test_not_an_image(self):
        for data, words in ((b"", "the image is empty"), (b"x" * 5000, "this is not an image archive"),
                            (self.good[:-200_000], "cut short"),
                            (self.good[:1_000_000], "cut short"), (support.layer({"a": "b"}), "holds no image")):
            with self.subTest(words):
                self.assertIn(words, self.refuse("new", "bad", stdin=data)[0])
                self.assert_nothing_there("bad")

    def test_producer_before_the_pipe_fails(self):
        """docker save of an image that does not exist prints an error and nothing else."""
        out = subprocess.run(f"false | '{sys.executable}' '{support.TOP}/faas' --socket '{self.daemon.socket}' new x",
                             shell=True, capture_output=True, text=True, check=False)
        self.assertEqual(out.returncode, 1)
        self.assertIn("the command before the pipe printed nothing", out.stderr)

    def test_upload_is_cut(self):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.daemon.socket))
        client.sendall(b"POST /functions/bad HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-tar\r\n"
                       b"Transfer-Encoding: chunked\r\n\r\n400\r\nabc")
        client.shutdown(socket.SHUT_WR)
        with client, client.makefile("rb") as answer:
            self.assertIn(b"the upload was cut short", answer.read())
        self.assert_nothing_there("bad")

    def test_client_leaves_during_the_proof(self):
        """Ctrl-C at `faas new` while the handler starts: what was begun is undone."""
        process = subprocess.Popen([*support.FAAS, "--socket", self.daemon.socket, "new", "bad", "--start-timeout",
                                    "1h"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(support.handler_image(SLEEPS))
        process.stdin.close()
        wait_until(lambda: support.footprint(self.daemon)["containers"], "the proof runs")
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(support.READY_SECONDS), 130)
        with process.stderr as said:
            self.assertIn(b"interrupted: faasd abandons the deploy", said.read())
        wait_until(lambda: not list(self.daemon.state_dir.glob("images/*")) + list(self.daemon.state_dir.glob("tmp/*")),
                   "it is undone")
        self.assert_nothing_there("bad")
        self.assertEqual(self.daemon.deploy("bad", self.good), "10.0.0.10")

    def test_port_is_taken(self):
        squatter = socket.socket()
        self.addCleanup(squatter.close)
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("0.0.0.0", 80))
        squatter.listen()
        line = self.refuse("new", "bad", stdin=self.good)[0]
        self.assertIn("port 80 on 10.0.0.10 is taken by another program", line)
        self.assertIn("--port", line)
        self.assert_nothing_there("bad")

    def test_subnet_is_full(self):
        with support.Daemon("--subnet", "10.3.0.0/28") as daemon:
            for number in range(5):
                self.assertEqual(daemon.deploy(f"f{number}", self.good), f"10.3.0.{10 + number}")
            result = daemon.faas("new", "g", stdin=self.good, check=False)
            self.assertEqual(result.returncode, 1)
            self.assertIn("subnet 10.3.0.0/28 has no free address", result.stderr)
            self.assertEqual(len(list((daemon.state_dir / "images").iterdir())), 5)

    def test_bad_options(self):
        for options, words in (("env=novalue", "bad environment entry"), ("memory=1m", "at least 6m"),
                               ("memory=999999999g", "at most 1048576g"), ("shm_size=999999999g", "bad size"),
                               ("pids=99999999999", "bad number of pids '99999999999'"),
                               ("timeout=9999999h", "bad duration '9999999h': write 500ms, "),
                               ("memory=lots", "bad size"), ("cpus=0", "bad number of cpus"), ("pids=0", "bad number"),
                               ("cpus=9999", "this machine has"),
                               ("timeout=-1", "bad duration"), ("start_timeout=0", "must be over 0"),
                               ("colour=red", "unknown option"), ("cmd=%00", "NUL")):
            with self.subTest(options):
                status, body = self.daemon.api("POST", f"/functions/bad?{options}", b"never read")
                self.assertEqual(status, 400)
                self.assertIn(words, json.loads(body)["error"])
        self.assert_nothing_there("bad")

    def test_image_over_the_limits(self):
        with support.Daemon("--max-image-size", "1m", "--subnet", "10.2.0.0/24") as daemon:
            result = daemon.faas("new", "f", stdin=self.good, check=False)
            self.assertIn("is over 1048576 bytes (--max-image-size)", result.stderr)
            self.assertEqual(list((daemon.state_dir / "images").iterdir()), [])
            self.assertEqual(list((daemon.state_dir / "tmp").iterdir()), [])

    def test_full_disk(self):
        directory = support.temporary_directory()
        disk = directory / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m,mode=755", "tmpfs", disk], check=True)
        try:
            daemon = support.Daemon("--subnet", "10.2.0.0/24")
            daemon.state_dir = disk
            with daemon:
                result = daemon.faas("new", "f", stdin=self.good, check=False)
                self.assertEqual(result.returncode, 1)
                self.assertIn("no space left on the device; free some and try again", result.stderr)
                self.assertEqual(sorted(path.name for path in disk.rglob("*")),
                                 ["faasd.lock", "images", "logs", "secrets", "tmp"])
        finally:
            subprocess.run(["umount", disk], check=True)
            shutil.rmtree(directory)


class Redeploy(DeployCase):
    def test_under_load_no_request_is_dropped(self):
        """In-flight ones finish on the old version, new ones meet the new one, all on the same address."""
        images = {label: support.handler_image(label=label) for label in ("v1", "v2", "v3")}
        address = self.daemon.deploy("f", images["v1"])
        slow = ThreadPoolExecutor(2)
        in_flight = [slow.submit(get, address, "/label?go:") for _ in range(2)]
        wait_until(lambda: self.daemon.info("f")["running"] >= 2, "two are in flight")
        answers: list[tuple[int, str]] = []
        stop = threading.Event()

        def load():
            while not stop.wait(0.1):           # each takes a container, and the deploys need the CPUs too
                answers.append(get(address, "/label"))
        clients = [threading.Thread(target=load) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            for label in ("v2", "v3"):
                count = len(answers) + 8
                wait_until(lambda least=count: len(answers) > least, "requests before the redeploy")
                self.assertEqual(self.daemon.deploy("f", images[label]), address)
                self.assertEqual(get(address, "/label"), (200, label))
            count = len(answers) + 8
            wait_until(lambda: len(answers) > count, "requests after the redeploy")
        finally:
            stop.set()
            self.daemon.release("f", "go")
            for client in clients:
                client.join()
        self.assertEqual({status for status, _ in answers}, {200})
        self.assertEqual({label for _, label in answers}, {"v1", "v2", "v3"})
        self.assertEqual([future.result() for future in in_flight], [(200, "v1")] * 2)
        slow.shutdown()
        current = self.daemon.info("f")["version"]
        self.assertEqual(len(os.listdir(self.daemon.state_dir / "images" / "f")), 3)
        self.assertEqual(self.daemon.versions("f")[0], current)

    def test_same_image_with_other_options(self):
        image = support.handler_image()
        address = self.daemon.deploy("f", image, "-e", "X=1")
        first = self.daemon.info("f")
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(get, address, "/label?go:")
            wait_until(lambda: self.daemon.info("f")["running"] == 1, "one is in flight")
            self.assertEqual(self.daemon.deploy("f", image, "-e", "X=2"), address)
            second = self.daemon.info("f")
            self.assertEqual(json.loads(get(address, "/facts")[1])["env"]["X"], "2")
            self.daemon.release("f", "go")
            self.assertEqual(slow.result(), (200, "1"))
        self.assertEqual((first["version"], first["created"]), (1, second["created"]))
        self.assertEqual((second["version"], second["digest"]), (2, first["digest"]))
        self.assertEqual(len(list((self.daemon.state_dir / "images/f").iterdir())), 1)
        # An environment is never overwritten: the one before is what a rollback brings back.
        self.daemon.post("POST", "/functions/f/rollback")
        self.assertEqual(json.loads(get(address, "/facts")[1])["env"]["X"], "1")

    def test_back_to_the_image_before_while_it_is_still_in_use(self):
        old, new = support.handler_image(label="old"), support.handler_image(label="new")
        address = self.daemon.deploy("f", old)
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(get, address, "/label?go:")
            wait_until(lambda: self.daemon.info("f")["running"] == 1, "one is in flight")
            self.daemon.deploy("f", new)
            self.daemon.deploy("f", old)
            self.daemon.release("f", "go")
            self.assertEqual(slow.result(), (200, "old"))
        time.sleep(0.5)
        self.assertEqual(get(address, "/label"), (200, "old"))

    def test_survives_a_restart(self):
        address = self.daemon.deploy("f", support.handler_image(label="one"))
        self.daemon.deploy("f", support.handler_image(label="two"), "--timeout", "7")
        self.daemon.stop()
        self.daemon.start()
        self.assertEqual(get(address, "/label"), (200, "two"))
        self.assertEqual(self.daemon.info("f")["options"]["timeout"], 7)


    def test_same_image_that_does_not_start_changes_nothing(self):
        image = support.small_image()
        self.daemon.deploy("f", image)
        before, stored = self.daemon.info("f"), self.daemon.rootfs("f").with_name("image.json").read_text()
        renamed = image.replace(b"test:latest", b"best:latest")
        self.assertNotEqual(renamed, image)
        status, body = self.daemon.api("POST", "/functions/f?cmd=no-such-argument&start_timeout=1ms", renamed)
        self.assertEqual(status, 422, body)
        self.assertEqual(self.daemon.rootfs("f").with_name("image.json").read_text(), stored)
        self.assertEqual(self.daemon.info("f"), before)


class Rerun(DeployCase):
    """`faas set` and `faas rollback` of functions that are not as they should be."""

    def test_set_of_a_broken_function_answers_what_became_of_it(self):
        self.daemon.deploy("f")
        self.daemon.stop()
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind(("0.0.0.0", 80))
            squatter.listen()
            self.daemon.start()
        self.assertEqual(self.daemon.info("f")["state"], "broken")
        answer = json.loads(self.daemon.faas("--json", "set", "f", "--memory", "256m").stdout)
        self.assertEqual((answer["state"], answer["options"]["memory"]), ("ready", 256 << 20))
        self.assertRegex(self.daemon.function_log("f"), "> set version=")
        self.assertEqual(get(answer["address"])[0], 200)

    def test_damaged_image_is_told(self):
        self.daemon.deploy("f", support.handler_image(label="one"))
        self.daemon.deploy("f", support.handler_image(label="two"))
        images = {path: json.loads(path.read_text())
                  for path in (self.daemon.state_dir / "images" / "f").glob("*/image.json")}
        for damage, words in (({"entrypoint": None}, "image.json has no valid 'entrypoint'"),
                              ({"env": ["novalue"]}, "ValueError"), ({"uid": "0"}, "image.json has no valid 'uid'"),
                              (None, "image.json has no valid 'first_id'")):
            for path, good in images.items():
                bad = {**good, "process": {**good["process"], **damage}} if damage else {**good, "first_id": None}
                path.write_text(json.dumps(bad))
            for command in (("set", "f", "--memory", "256m"), ("rollback", "f")):
                line, = self.refuse(*command)
                self.assertRegex(line, r"its image .*[0-9a-f]{12} is damaged \(.*" + words + r".*\): deploy it again")
        self.assertEqual(get("10.0.0.10", "/label"), (200, "two"))


class Remove(DeployCase):
    def test_running_invocations_finish_first(self):
        address = self.daemon.deploy("f", support.handler_image(label="last words"))
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(get, address, "/label?go:")
            wait_until(lambda: self.daemon.info("f")["running"] == 1, "one is in flight")
            removal = pool.submit(self.daemon.faas, "rm", "f")
            wait_until(lambda: self.daemon.info("f")["state"] == "removing", "it is being removed")
            self.assertIn("a removal is under way", self.refuse("new", "f", stdin=support.handler_image())[0])
            self.daemon.release("f", "go")
            self.assertEqual(slow.result(), (200, "last words"))
            removal.result()
        self.assert_nothing_there("f")

    def test_unknown_function(self):
        self.daemon.deploy("f")
        result = self.daemon.faas("rm", "nope", "f", check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn("no function 'nope'", result.stderr)
        self.assert_nothing_there("f")
        for command in ("ip", "info", "logs"):
            self.assertIn("no function 'nope'", self.refuse(command, "nope")[0])


class Memory(DeployCase):
    def test_upload_and_unpacking_are_streamed(self):
        """A 300 MiB layer, and the daemon and its child stay under 64 MiB each; bench/deploy.py does it with 2 GiB."""
        blob = os.urandom(1 << 20) * 300
        image = support.handler_image(files={"blob": blob})
        del blob
        peak = {"child": 0}
        done = threading.Event()

        def watch():
            while not done.is_set():
                for line in support.processes(self.daemon.directory.name):
                    pid, _, command = line.partition(": ")
                    if " unpack " in command:
                        try:
                            peak["child"] = max(peak["child"], support.resident_memory(int(pid), "VmHWM"))
                        except (FileNotFoundError, TypeError):
                            continue
                time.sleep(0.02)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.daemon.deploy("f", image)
        finally:
            done.set()
            watcher.join()
        self.assertGreater(peak["child"], 0)
        self.assertLess(peak["child"], 64 << 20)
        self.assertLess(support.resident_memory(self.daemon.process.pid, "VmHWM"), 64 << 20)


if __name__ == "__main__":
    unittest.main()
