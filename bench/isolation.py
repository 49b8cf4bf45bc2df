#!/usr/bin/env python3
"""What a container really has under faasd, Docker and containerd, as /proc tells: sudo bench/isolation.py

The same image is started by each with its defaults, and the first process of each container is looked at from outside.
Prints the rows of RUNC.md's table. Docker's and containerd's own engine is started for it (tests/ci/docker_engine.sh),
without a bridge, so that its containers have no network here. Runs in a network namespace of its own; needs root.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from pathlib import Path

import lab
from lab import faasd

SLEEP = ["-c", "import time; time.sleep(600)"]


def find_process(mark: str) -> int:
    """Return the first process of the container whose cgroup has mark in its name."""
    while True:
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (path / "status").read_text()
                if mark in (path / "cgroup").read_text() and re.search(r"^NSpid:.*\t1$", status, re.MULTILINE) \
                        and b"python" in (path / "cmdline").read_bytes():
                    return int(path.name)
        time.sleep(0.05)


def limits(pid: int) -> dict[str, str]:
    """Return the limits of a process's cgroups by the names of the files that hold them."""
    found = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for directory in {Path("/sys/fs/cgroup") / name for name in controllers.split(",")} | {Path("/sys/fs/cgroup")}:
            for name in faasd.LIMIT_FILES:
                with contextlib.suppress(OSError):
                    found[name] = (directory / path.lstrip("/") / name).read_text().strip()
    return found


def inspect(pid: int) -> dict:
    return {**faasd.inspect_process(pid), "limits": limits(pid)}


def capability_count(report: dict, name: str) -> str:
    return f"{int(report['capabilities'][name], 16).bit_count()}"


def bytes_or_none(report: dict, *names: str) -> str:
    value = next((report["limits"][name] for name in names if name in report["limits"]), "max")
    return f"{int(value) >> 20} MiB" if value.isdigit() and int(value) < 1 << 60 else "none"


def first_of(report: dict, *names: str) -> str:
    value = next((report["limits"][name] for name in names if name in report["limits"]), "max")
    return "none" if value in ("max", "-1") else value.split()[0]


def mount_options(report: dict, target: str) -> str:
    options = next((m["options"] for m in report["mounts"] if m["target"] == target), "")
    return {"ro": "read-only", "rw": "writable"}.get(options.split(",")[0], "not there")


ROWS = {
    "namespaces of its own": lambda r: ", ".join(k for k, whose in r["namespaces"].items() if whose == "own"),
    "root is the host's user": lambda r: str(r["host_ids"][0]),
    "capabilities held; that an exec could gain":
        lambda r: f"{capability_count(r, 'capeff')}; {capability_count(r, 'capbnd')}",
    "no_new_privs": lambda r: "yes" if r["no_new_privs"] else "no",
    "seccomp": lambda r: r["seccomp"],
    "root file system": lambda r: mount_options(r, "/"),
    "/proc/sys": lambda r: mount_options(r, "/proc/sys"),
    "/sys": lambda r: mount_options(r, "/sys"),
    "masked or read-only paths of /proc and /sys": lambda r: str(sum(
        1 for m in r["mounts"] if re.match(r"/(proc|sys)/(?!fs/cgroup)", m["target"]) and "cgroup" not in m["type"])),
    "memory limit": lambda r: bytes_or_none(r, "memory.limit_in_bytes", "memory.max"),
    "process limit": lambda r: first_of(r, "pids.max"),
    "CPU limit (quota in µs for each 100 ms)": lambda r: first_of(r, "cpu.cfs_quota_us", "cpu.max"),
    "open files": lambda r: r["rlimits"]["Max open files"],
}


def docker_report(engine: lab.Engine, image: Path, python: str) -> dict:
    docker = engine.docker()
    subprocess.run([*docker, "load", "--input", image], check=True, capture_output=True)
    run = [*docker, "run", "--detach", "--network", "none", "--entrypoint", python, "handler:latest", *SLEEP]
    container = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    report = inspect(find_process(container))
    subprocess.run([*docker, "rm", "--force", container], check=True, capture_output=True)
    return report


def containerd_report(engine: lab.Engine, rootfs: Path, directory: Path, python: str) -> dict:
    # A copy whose owners are the image's: faasd's is shifted for a user namespace that ctr does not make.
    plain = directory / "plain"
    plain.mkdir()
    subprocess.run(f"tar -C {rootfs} -c --owner=0 --group=0 . | tar -C {plain} -x", shell=True, check=True)
    name = "isolation-bench"
    ctr = ["ctr", "--address", f"{engine.directory}/containerd.sock"]
    subprocess.run([*ctr, "run", "--detach", "--null-io", "--rootfs", plain, name, python, *SLEEP], check=True)
    report = inspect(find_process(name))
    subprocess.run([*ctr, "tasks", "kill", "--signal", "SIGKILL", name], check=True)
    return report


def main() -> None:
    with lab.scratch() as directory, lab.Faasd(directory) as daemon:
        image = lab.pack(directory)
        daemon.deploy("f", image)
        reports = {"faasd": json.loads(daemon.faas("--json", "info", "--isolation", "f"))}
        rootfs, = (daemon.state_dir / "images/f").glob("*/rootfs")
        python = json.loads((rootfs.parent / "image.json").read_text())["process"]["entrypoint"][0]
        with lab.Engine(directory) as engine:
            reports["docker run"] = docker_report(engine, image, python)
            reports["ctr run"] = containerd_report(engine, rootfs, directory, python)
    print("| | " + " | ".join(reports) + " |\n| --- |" + " --- |" * len(reports))
    for name, row in ROWS.items():
        print(f"| {name} | " + " | ".join(row(report) for report in reports.values()) + " |")


if __name__ == "__main__":
    lab.in_own_network()
    main()
