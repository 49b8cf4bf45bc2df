"""Mixed load for a while: nothing goes wrong but what is injected, and nothing grows.

12 s, or as long as --soak says: `sudo ./test.sh --soak 1800 tests/hold/test_soak.py`
"""

import collections
import os
import random
import signal
import threading
import time
import unittest

import support
from clients import read_all, request
from support import wait_until

SOAK_SECONDS = float(os.environ.get("FAASD_SOAK_SECONDS", "12"))
# What a client may meet on each path: an answer's status, or "" for a connection that ends without one.
EXPECTED = {"/": {"200"}, "/id": {"200"}, "/stderr?100000": {"200"}, "/exit?3": {"502"}, "/hang": {"504"},
            "/half-and-die": {"200"}, "/answer-and-exit?1": {"200"}, "/fork-silently": {"504"}}
WEIGHTS = [40, 20, 4, 4, 1, 4, 4, 1]


class Soak(unittest.TestCase):
    def setUp(self):
        signal.alarm(int(SOAK_SECONDS) + 600)       # tests/run.py takes a test of over 10 minutes for a hang
        self.daemon = support.Daemon().start()
        self.addCleanup(self.daemon.close)
        self.addresses = [self.daemon.deploy("fresh", None, "--warm", "auto", "--timeout", "5"),
                          self.daemon.deploy("reused", None, "--warm", "auto", "--timeout", "5", "--reuse", "20"),
                          self.daemon.deploy("cold", None, "--warm", "0", "--timeout", "5", "--concurrency", "2")]
        self.images = [support.handler_image(label=f"next-{number}") for number in range(2)]
        self.seen: collections.Counter = collections.Counter()
        self.unexpected: list[str] = []
        self.over = threading.Event()

    def one_request(self, chance: random.Random) -> None:
        """Send a request and see what comes; now and then leave before it does."""
        path = chance.choices(list(EXPECTED), WEIGHTS)[0]
        with request(chance.choice(self.addresses), path) as client:
            if chance.random() < 0.05:
                time.sleep(chance.random() / 10)
                self.seen["left"] += 1
                return
            received = read_all(client)
        status = received[9:12].decode()
        self.seen[status] += 1
        if status not in EXPECTED[path]:
            self.unexpected.append(f"{path}: {received[:200]}")

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.over.is_set():
            try:
                if chance.random() < 0.02:      # a burst, then a rest
                    burst = [threading.Thread(target=self.one_request, args=(chance,)) for _ in range(15)]
                    for thread in burst:
                        thread.start()
                    for thread in burst:
                        thread.join()
                    self.over.wait(chance.random() * 3)
                else:
                    self.one_request(chance)
            except OSError as error:
                self.unexpected.append(repr(error))

    def change(self) -> None:
        """Redeploy, change options, roll back, deploy and remove others, one after the other."""
        for number in range(10**9):
            name = ("fresh", "reused", "cold")[number % 3]
            self.daemon.deploy(name, self.images[number % 2], "--warm", "0" if name == "cold" else "auto",
                               "--timeout", "5", "--reuse", "20" if name == "reused" else "1")
            self.daemon.post("PATCH", f"/functions/{name}?memory={256 + number % 2}m")
            self.daemon.post("POST", f"/functions/{name}/rollback")
            self.daemon.deploy("passing", self.images[0], "--warm", "2")
            self.daemon.remove("passing")
            if self.over.wait(2):
                return

    def measure(self) -> tuple[int, int]:
        """Return the daemon's descriptors and resident memory once all is quiet."""
        for name in ("fresh", "reused", "cold"):
            self.daemon.wait_idle(name)
            wait_until(lambda name=name: self.daemon.info(name)["starting"] == 0, "nothing is being started")
        pid = self.daemon.process.pid
        return len(os.listdir(f"/proc/{pid}/fd")), support.resident_memory(pid)

    def run_for(self, seconds: float) -> None:
        self.over.clear()
        threads = [threading.Thread(target=self.client, args=(seed,)) for seed in range(6)]
        failures = []

        def change():
            try:
                self.change()
            except AssertionError as error:
                failures.append(str(error))
        threads.append(threading.Thread(target=change))
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self.over.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_mixed_load(self):
        self.run_for(SOAK_SECONDS / 3)          # what is filled once: caches, statistics, free lists
        descriptors, memory = self.measure()
        self.run_for(SOAK_SECONDS * 2 / 3)
        later, more = self.measure()
        self.assertFalse(self.unexpected, "\n".join(self.unexpected[:20]))
        self.assertGreater(self.seen["200"], 20)           # so that it was a load at all; how fast is bench/'s
        idle = sum(self.daemon.info(name)["warm"] for name in ("fresh", "reused", "cold"))
        self.assertLess(later, descriptors + 4 * idle + 8)      # a warm container has four or less
        self.assertLess(more, memory + (8 << 20))
        wait_until(lambda: len(support.list_containers(self.daemon)) == sum(
            self.daemon.info(name)["warm"] for name in ("fresh", "reused", "cold")), "no container but the warm ones")


if __name__ == "__main__":
    unittest.main()
