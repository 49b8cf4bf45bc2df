#!/usr/bin/env python3
"""Deploy an image to three nodes: time against a deploy to one: sudo bench/nodes.py [PAIRS]

The nodes are three daemons, which share nothing but this machine. Machines of their own would not share their CPUs
either, so each daemon, with the children that unpack, gets a quarter of the CPUs and no more, by its CPU cgroup. The
client has the rest. The image has 130 MiB: data, small files and Python. Runs in a network namespace of its own; needs
root.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import deploy
import lab

NODES, MEBIBYTES, PERIOD = 3, 40, 100_000           # cfs_period_us
CPU_V1, CPU_V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(name: str, cpus: float):
    """Make a CPU cgroup; yield the file that takes processes. Tried with v1 only."""
    top = CPU_V1 if (CPU_V1 / "cgroup.procs").exists() else CPU_V2
    group = top / name
    group.mkdir()
    try:
        if top is CPU_V1:
            (group / "cpu.cfs_quota_us").write_text(str(int(cpus * PERIOD)))
        else:
            (group / "cpu.max").write_text(f"{int(cpus * PERIOD)} {PERIOD}")
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@contextlib.contextmanager
def node(directory: Path, number: int, cpus: float):
    """Run a daemon with its API on TCP, and an entry of nodes.toml."""
    directory.mkdir(mode=0o711)
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text("t" * 32)
    api = f"127.0.0.1:{8001 + number}"
    arguments = ["--subnet", f"10.0.{number}.0/24", "--api", api, "--api-token-file", str(token)]
    with limited(f"faasd-bench-{os.getpid()}-{number}", cpus) as processes, lab.Faasd(directory, *arguments) as daemon:
        processes.write_text(str(daemon.process.pid))
        yield f'[node{number}]\napi = "http://{api}"\ntoken-file = "{token}"\n'


def seconds(environment: dict, image: Path, nodes: int) -> float:
    """Deploy an image to so many nodes; return the seconds that took."""
    names = [word for number in range(nodes) for word in ("--node", f"node{number}")]
    begin = time.perf_counter()
    subprocess.run([sys.executable, lab.TOP / "faas", *names, "new", "big", "-f", image], env=environment, check=True,
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    pairs, cpus = int(sys.argv[1]) if len(sys.argv) > 1 else 7, os.cpu_count() / 4
    lab.in_own_network()
    with lab.scratch() as directory, contextlib.ExitStack() as stack:
        image, _ = deploy.make_image(directory, MEBIBYTES)
        entries = [stack.enter_context(node(directory / f"node{number}", number, cpus)) for number in range(NODES)]
        (directory / ".config/faas").mkdir(parents=True)
        (directory / ".config/faas/nodes.toml").write_text("\n".join(entries))
        environment = {**os.environ, "HOME": str(directory)}
        one, three = [], []
        for _ in range(pairs):
            one.append(seconds(environment, image, 1))
            three.append(seconds(environment, image, NODES))
        print(f"{os.cpu_count()} CPUs, {cpus:g} for each node, load {os.getloadavg()[0]:.1f}, image of "
              f"{image.stat().st_size >> 20} MiB, {pairs} pairs")
        print(f"  one node: {statistics.median(one):.2f} s   {NODES} nodes: {statistics.median(three):.2f} s")
        print("  three ÷ one: {median:.2f} ({p10:.2f} to {p90:.2f})".format(**lab.ratios(three, one)))


if __name__ == "__main__":
    main()
