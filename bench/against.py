#!/usr/bin/env python3
"""This checkout against another, fresh containers a second and warm requests: sudo bench/against.py CHECKOUT [ROUNDS]

For example, what a change costs: git worktree add /tmp/before COMMIT && sudo bench/against.py /tmp/before. Both daemons
run side by side with the same handler, and take their turns; what is printed is the ratio of this checkout to the
other, as median and 10th to 90th percentile. Runs in a network namespace of its own; needs root.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import lab

CLIENTS, WINDOW_SECONDS = 4, 5.0        # of a closed loop
WARM_REQUESTS = 40                      # a round
PAUSE = 0.1                             # seconds: until a warm container is replaced, and the machine is idle again


def measure_rate(address: str) -> float:
    load = lab.Load(address)
    rate = load.run(CLIENTS, WINDOW_SECONDS)
    assert not load.errors, load.errors
    return rate


def measure_warm(address: str) -> float:
    """Return the median of some requests, in seconds."""
    samples = []
    for _ in range(WARM_REQUESTS):
        time.sleep(PAUSE)
        samples.append(lab.request(address))
    return lab.spread(samples)["median"]


def main(other: Path, rounds: int) -> None:
    rates: dict[str, list[float]] = {"this": [], "other": []}
    warm: dict[str, list[float]] = {"this": [], "other": []}
    with contextlib.ExitStack() as stack:
        addresses = {}
        for name, top, subnet in (("this", lab.TOP, "10.0.0.0/24"), ("other", other, "10.0.1.0/24")):
            directory = stack.enter_context(lab.scratch())
            daemon = stack.enter_context(lab.Faasd(directory, "--subnet", subnet, top=top))
            addresses[name] = daemon.deploy("f", lab.pack(directory), "--warm", "2")
            daemon.wait_warm("f", 2)
        for number in range(rounds):
            for name in sorted(addresses, reverse=number % 2 == 1):
                time.sleep(1)               # what the other side has left to do
                warm[name].append(measure_warm(addresses[name]))
                rates[name].append(measure_rate(addresses[name]))
    for what, figures, unit in (("fresh containers a second", rates, 1), ("warm request, ms", warm, 1000)):
        ratio = lab.ratios(figures["this"], figures["other"])
        medians = {name: lab.spread(values)["median"] * unit for name, values in figures.items()}
        print(f"{what}: {medians['this']:.3g} here, {medians['other']:.3g} there, ratio {ratio['median']:.3f} "
              f"({ratio['p10']:.3f} to {ratio['p90']:.3f})")


if __name__ == "__main__":
    lab.in_own_network()
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
