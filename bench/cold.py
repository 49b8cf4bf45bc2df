#!/usr/bin/env python3
"""How much of a cold request is ours, and how much is runc's: sudo bench/cold.py [ROUNDS]

Alternates, in one run on an otherwise idle function without warm containers:
  request   connect to the function, send a GET, read the answer (the container is started in between)
  ready     spawn a bare `runc run` of the same bundle, until its handler has connected to the control socket
  run       the same until runc has exited; the handler is told at once that there is no work

request - ready is what faasd and the handler's work add for the client; request - run is negative because faasd
removes the container after it has answered. Runs in a network namespace of its own; needs root.
"""

import sys
import time

import lab

PAUSE = 0.05        # seconds: until faasd has cleaned up; and both sides start from an idle machine
FIRST_ROUNDS = 3    # warm the page cache and do not count


def main(rounds: int) -> None:
    samples: dict[str, list[float]] = {"request": [], "ready": [], "run": []}
    with lab.scratch() as directory, lab.Faasd(directory) as daemon:
        address = daemon.deploy("cold", lab.pack(directory, lab.TOP / "test_handler.py"), "--warm", "0")
        bare = lab.BareRuns(directory, daemon.state_dir, "cold")
        for number in range(rounds + FIRST_ROUNDS):
            first = lab.request(address)
            time.sleep(PAUSE)
            sample = (first, *bare.run())
            time.sleep(PAUSE)
            if number >= FIRST_ROUNDS:
                for name, seconds in zip(samples, sample, strict=True):
                    samples[name].append(seconds * 1000)
        bare.close()
    print(f"{rounds} rounds, alternating, ms      median     p10     p90")
    for name, values in samples.items():
        show(name, values)
    for name in ("ready", "run"):
        show(f"request - {name}", [r - b for r, b in zip(samples["request"], samples[name], strict=True)])


def show(name: str, values: list[float]) -> None:
    figures = lab.spread(values)
    print(f"  {name:28} {figures['median']:10.2f} {figures['p10']:7.2f} {figures['p90']:7.2f}")


if __name__ == "__main__":
    lab.in_own_network()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
