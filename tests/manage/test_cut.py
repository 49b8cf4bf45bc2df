"""Changes and invocations that are cut in the middle: by their client, by a stop, by what lacks."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import unittest

import support
from clients import get, request
from support import wait_until

SLOW_SYNC = {"os.fsync": "lambda descriptor: __import__('time').sleep(1)"}      # the registry's: a save takes 2 s


class CutCase(unittest.TestCase):
    def start(self, *arguments: str, **more) -> support.Daemon:
        daemon = support.Daemon(*arguments, **more).start()
        self.addCleanup(daemon.close)
        return daemon

    def client(self, daemon: support.Daemon, *arguments: str, image: bytes | None = None) -> subprocess.Popen:
        """Start `faas`; its output is to be had with communicate()."""
        process = subprocess.Popen([*support.FAAS, "--socket", daemon.socket, *arguments], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if image:
            process.stdin.write(image)
        process.stdin.close()
        process.stdin = None
        self.addCleanup(process.communicate)
        return process


class ClientLeaves(CutCase):
    def interrupt_in_save(self, daemon: support.Daemon, image: bytes) -> None:
        def count() -> int:
            return len(re.findall("(deployed|replaced) at", daemon.log()))
        before = count()
        new = self.client(daemon, "new", "f", "--warm", "0", image=image)
        wait_until((daemon.state_dir / ".registry.json.new").exists, "the registry is being written")
        new.send_signal(signal.SIGINT)
        new.wait()
        wait_until(lambda: count() > before, "it is over")

    def check(self, daemon: support.Daemon, label: str) -> None:
        address = daemon.info("f")["address"]
        self.assertEqual(get(address, "/label"), (200, label))
        self.assertEqual(daemon.stop(), 0)
        daemon.start()
        self.assertEqual(get(address, "/label"), (200, label))

    def test_while_the_registry_is_written_the_deploy_is_finished(self):
        daemon = self.start(constants=SLOW_SYNC)
        self.interrupt_in_save(daemon, support.handler_image(label="1"))
        self.check(daemon, "1")
        self.interrupt_in_save(daemon, support.handler_image(label="2"))
        self.check(daemon, "2")
        self.assertEqual(daemon.deploy("g"), "10.0.0.11")

    def test_while_a_removal_drains_it_is_removed_all_the_same(self):
        daemon = self.start()
        address = daemon.deploy("f")
        client = request(address, "/label?go:")
        self.addCleanup(client.close)
        wait_until(lambda: daemon.info("f")["running"] == 1, "it is in flight")
        removal = self.client(daemon, "rm", "f")
        wait_until(lambda: daemon.info("f")["state"] == "removing", "the removal drains")
        removal.send_signal(signal.SIGINT)
        removal.wait()
        self.assertIn("is under way", daemon.faas("new", "f", stdin=support.handler_image(), check=False).stderr)
        daemon.release("f", "go")
        self.assertIn(b"200 OK", client.recv(65536))
        wait_until(lambda: daemon.api("GET", "/functions/f")[0] == 404, "it is removed")
        self.assertEqual(support.addresses(), [])
        # Its files go last, and until they have gone its name is not free.
        wait_until(lambda: daemon.faas("new", "f", stdin=support.handler_image(), check=False).returncode == 0,
                   "the name is free again")
        self.assertEqual(get(address)[0], 200)


class Stop(CutCase):
    def test_connections_that_the_kernel_has_completed_are_answered(self):
        daemon = self.start("--drain-timeout", "5m")
        patience = [word for option in ("queue-", "start-", "") for word in (f"--{option}timeout", "5m")]
        address = daemon.deploy("f", support.small_image(), "--concurrency", "8", *patience)  # the machine may be busy
        daemon.process.send_signal(signal.SIGSTOP)
        clients = []
        for _ in range(100):
            client = request(address, "/")
            self.addCleanup(client.close)
            clients.append(client)
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGCONT)
        self.assertEqual({client.recv(15) for client in clients}, {b"HTTP/1.1 200 OK"})

    def test_a_function_whose_end_fails_ends_no_other(self):
        failing = ("lambda function, timeout, drain=faasd.Function.drain: "
                   "faasd.asyncio.sleep('it fails') if function.record.name == 'bad' else drain(function, timeout)")
        daemon = self.start(constants={"Function.drain": failing})
        daemon.deploy("bad")
        client = request(daemon.deploy("f"), "/label?go:")
        self.addCleanup(client.close)
        wait_until(lambda: daemon.info("f")["running"] == 1, "it is in flight")
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "the end of a function failed inside faasd" in daemon.log(), "that is logged")
        daemon.release("f", "go")
        self.assertIn(b"200 OK", client.recv(65536))
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)

    def test_second_signal_while_containers_are_being_killed_leaves_nothing(self):
        daemon = self.start("--drain-timeout", "100ms")
        address = daemon.deploy("f", None, "--warm", "2")
        for _ in range(12):
            client = request(address, "/hang")
            self.addCleanup(client.close)
        wait_until(lambda: daemon.info("f")["running"] > 6, "they hang")
        daemon.process.send_signal(signal.SIGTERM)
        for _ in range(10):             # one of them comes at the wrong moment
            time.sleep(0.015)
            if daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGTERM)
        self.assertEqual(daemon.process.wait(support.READY_SECONDS), 0)
        self.assertEqual(support.remains(daemon), [])

    def test_deploy_that_is_cut_says_so(self):
        source = "import time; time.sleep(3600)"
        daemon = self.start()
        new = self.client(daemon, "new", "f", image=support.handler_image(source))
        wait_until(lambda: support.list_containers(daemon), "the proof has begun")
        daemon.stop()
        _, error = new.communicate()
        self.assertEqual((new.returncode, error.decode()), (1, "faas: faasd is stopping, or you left\n"))

    def test_followers_of_a_log_come_to_its_end_with_its_function(self):
        daemon = self.start()
        for name in ("f", "g"):
            daemon.deploy(name)
        followers = {name: self.client(daemon, "logs", "-f", name) for name in ("f", "g")}
        wait_until(lambda: len(re.findall("GET /functions/./logs", daemon.log())) == 2, "both follow")
        daemon.remove("f")
        output, error = followers["f"].communicate()
        self.assertEqual((followers["f"].returncode, output.count(b"deployed"), error), (0, 1, b""))
        daemon.stop()
        self.assertEqual(followers["g"].stderr.readline(), b"faas: faasd has ended; waiting for it to come back\n")
        followers["g"].send_signal(signal.SIGINT)
        output, error = followers["g"].communicate()
        self.assertEqual((followers["g"].returncode, output.count(b"deployed"), error), (130, 1, b""))


class Start(CutCase):
    def test_functions_of_another_subnet_move(self):
        """Each keeps its number, so that it has its address again when the subnet comes back."""
        daemon = self.start()
        for name in ("e", "f", "g"):
            daemon.deploy(name)
        daemon.remove("e")
        client = request("10.0.0.11", "/hang")
        wait_until(lambda: daemon.info("f")["running"] == 1, "one is served")
        daemon.kill()
        for subnet, f, g in (("10.1.0.0/24", "10.1.0.11", "10.1.0.12"), ("10.2.0.0/28", "10.2.0.11", "10.2.0.12"),
                             ("10.0.0.0/24", "10.0.0.11", "10.0.0.12")):
            daemon.arguments = ("--subnet", subnet)
            daemon.start()
            self.assertEqual([daemon.info(name)["address"] for name in ("f", "g")], [f, g])
            self.assertEqual((get(f)[0], get(g)[0]), (200, 200))
            self.assertEqual(support.addresses(), [f"{f}/32", f"{g}/32"])
            self.assertIn("function=f its address is", daemon.log())
            self.assertEqual(daemon.stop(), 0)
        client.close()

    def test_damaged_image_breaks_its_function_alone(self):
        daemon = self.start()
        daemon.deploy("f")
        address = daemon.deploy("g")
        self.assertEqual(daemon.stop(), 0)
        image, = (daemon.state_dir / "images" / "f").glob("*/image.json")
        good = json.loads(image.read_text())
        process = {key: value for key, value in good["process"].items() if key != "cwd"}
        for content in ("[]", "{}", "", '{"process": 1}', json.dumps({**good, "digest": None}),
                        json.dumps({**good, "process": process})):
            image.write_text(content)
            daemon.start()
            self.assertEqual((daemon.info("f")["state"], get(address)[0]), ("broken", 200), content)
            self.assertEqual(daemon.stop(), 0)
        daemon.start()
        daemon.deploy("f")
        wait_until(lambda: len(os.listdir(daemon.state_dir / "images" / "f")) == 1, "the damaged one is replaced")


class Lacking(CutCase):
    def test_api_out_of_descriptors_does_not_spin(self):
        daemon = self.start(wrapper=("prlimit", "--nofile=60"))
        clients = []
        for _ in range(70):
            client = socket.socket(socket.AF_UNIX)
            self.addCleanup(client.close)
            client.connect(str(daemon.socket))
            clients.append(client)
        wait_until(lambda: "control API cannot accept" in daemon.log(), "it has none left")
        for _ in range(5):              # some turns of the loop
            time.sleep(0.1)
        self.assertLess(daemon.log().count("cannot accept"), 10)
        for client in clients:
            client.close()
        self.assertEqual(daemon.api("GET", "/healthz")[0], 200)

    def test_newlines_fill_the_log_no_more_than_other_output(self):
        daemon = self.start()
        address = daemon.deploy("f", None, "--warm", "0")
        self.assertEqual(get(address, "/newlines?2000000"), (200, "written"))
        daemon.wait_idle("f")
        log = daemon.function_log("f")
        self.assertLess(len(log), 3 << 20)
        self.assertEqual(len(re.findall(r"\(output over \d+ bytes is dropped\)", log)), 1)
        self.assertIn("deployed", log)


if __name__ == "__main__":
    unittest.main()
