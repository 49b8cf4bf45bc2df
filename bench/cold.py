#!/usr/bin/env python3
"""How much of a cold request is ours, and how much is runc's: sudo bench/cold.py [ROUNDS]

Alternates, in one run on an otherwise idle function:
  request   connect to the function, send a GET, read the answer (the container is started in between)
  ready     spawn a bare `runc run` of the same bundle, until its handler has connected to the control socket
  run       the same until runc has exited; the handler is told at once that there is no work

request - ready is what faasd and the handler's work add for the client; request - run is negative because faasd
removes the container after it has answered. Runs in a network namespace of its own; needs root.
"""

import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
import faasd  # noqa: E402

ADDRESS = "10.0.0.10"
PAUSE = 0.05        # seconds


def start_daemon(directory: Path) -> subprocess.Popen:
    daemon = subprocess.Popen([sys.executable, TOP / "faasd.py", "--state-dir", directory / "state", "--run-dir",
                               directory / "run"], stderr=(directory / "log").open("wb"))
    while " ready: " not in (directory / "log").read_text():
        if daemon.poll() is not None:
            sys.exit((directory / "log").read_text())
        time.sleep(0.01)
    return daemon


def deploy(directory: Path) -> None:
    image = directory / "image.tar"
    with image.open("wb") as file:
        subprocess.run([sys.executable, TOP / "faas", "pack", TOP / "test_handler.py"], stdout=file, check=True)
    subprocess.run([sys.executable, TOP / "faas", "--socket", directory / "run/faasd.sock", "new", "cold", "-f", image],
                   stdout=subprocess.DEVNULL, check=True)


def request() -> float:
    """Return the seconds until a request has its whole answer."""
    start = time.perf_counter()
    with socket.create_connection((ADDRESS, 80)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: cold\r\n\r\n")
        received = b""
        while True:
            data = client.recv(65536)
            received += data
            length = re.search(rb"Content-Length: (\d+)", received)
            head, end, body = received.partition(b"\r\n\r\n")
            if not data or (end and length and len(body) >= int(length[1])):
                break
    seconds = time.perf_counter() - start
    assert b"Hello from FaaS handler!" in received, received
    return seconds


class BareRuns:
    """Runs the function's bundle with nothing but runc."""

    def __init__(self, directory: Path):
        self.run_dir = directory / "bare"
        (self.run_dir / "containers").mkdir(parents=True)
        rootfs, = (directory / "state/images/cold").glob("*/rootfs")
        image = json.loads((rootfs.parent / "image.json").read_text())
        self.cgroups = faasd.Cgroups(self.run_dir)
        self.bundle = faasd.Bundle("cold", image, faasd.Options(), rootfs, self.run_dir, self.cgroups)
        self.runtime = faasd.Runtime("runc", self.run_dir / "runc")

    def run(self) -> tuple[float, float]:
        """Return the seconds until the handler was ready, and until runc was done."""
        container = secrets.token_hex(6)
        directory = self.run_dir / "containers" / container
        directory.mkdir()
        (directory / "config.json").write_bytes(self.bundle.render(container))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "control.sock"))
            listener.listen(1)
            start = time.perf_counter()
            process = subprocess.Popen(self.runtime.run_argv(directory, container), stdin=subprocess.DEVNULL)
            connection, _ = listener.accept()
            ready = time.perf_counter() - start
            connection.close()
            status = process.wait()
        done = time.perf_counter() - start
        assert status == 0, status
        shutil.rmtree(directory)
        return ready, done


def main(rounds: int) -> None:
    directory = Path(tempfile.mkdtemp(prefix="faasd-bench.", dir="/dev/shm"))      # a tmpfs: the same for both sides
    daemon = start_daemon(directory)
    try:
        deploy(directory)
        bare = BareRuns(directory)
        samples: dict[str, list[float]] = {"request": [], "ready": [], "run": []}
        for number in range(rounds + 3):
            first = request()
            time.sleep(PAUSE)           # until faasd has cleaned up; and both sides start from an idle machine
            sample = (first, *bare.run())
            time.sleep(PAUSE)
            if number >= 3:             # the first ones warm the page cache
                for name, seconds in zip(samples, sample, strict=True):
                    samples[name].append(seconds * 1000)
        bare.cgroups.remove(bare.cgroups.parent)
    finally:
        daemon.terminate()
        daemon.wait()
        shutil.rmtree(directory)
    print(f"{rounds} rounds, alternating, ms      median     p10     p90")
    for name, values in samples.items():
        deciles = statistics.quantiles(values, n=10)
        print(f"  {name:28} {statistics.median(values):10.2f} {deciles[0]:7.2f} {deciles[8]:7.2f}")
    for name in ("ready", "run"):
        differences = [r - b for r, b in zip(samples["request"], samples[name], strict=True)]
        deciles = statistics.quantiles(differences, n=10)
        print(f"  request - {name:18} {statistics.median(differences):10.2f} {deciles[0]:7.2f} {deciles[8]:7.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--inside"]:
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable,
                              sys.argv[0], "--inside", *sys.argv[1:]])
    main(int(sys.argv[2]) if len(sys.argv) > 2 else 100)
