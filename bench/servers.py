"""The server contract: real servers, unmodified, in the image of test_real_servers.py. Called by bench/run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import lab

BARE_PORT, PROXY_PORT, ENGINE_PORT, GROUPED_PORT = 8001, 8002, 8080, 8003
GROUPED_ADDRESS = "10.255.0.1"      # not 127.0.0.1, which the kernel treats as nearer than a function's address
START_SECONDS = 60
NGINX, GO = "nginx -g 'daemon off;'", "./hello"
COLD = {"nginx": "nginx -c /srv/nginx.conf -g 'daemon off;'", "node": "node server.js", "java": "java Hello http"}
PROXY = f"""global
    maxconn 4096
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen bench
    bind 127.0.0.1:{PROXY_PORT}
    server nginx 127.0.0.1:{BARE_PORT}
"""
# nginx of the image with its own configuration, but for address and port ($3), and a root that it may write, as in a
# container; in the cgroups that the other words name.
BARE_NGINX = """for group in "${@:4}"; do echo $$ >"$group/cgroup.procs"; done
mount -t tmpfs tmpfs "$2" && mkdir "$2/upper" "$2/work" "$2/root" &&
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root" && cd "$2/root" &&
mount --bind /dev dev && exec chroot . sh -c "
    sed -i 's/listen 80 /listen $3 /; /listen \\[/d' /etc/nginx/sites-available/default
    exec nginx -g 'daemon off;'" """


def write_image(path: Path) -> None:
    """Write an archive of the servers' layer, as `docker save` does."""
    script = lab.TOP / "tests/ci/servers_image.sh"
    layer = Path(subprocess.run([script, "--path"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
    if not layer.exists():
        raise lab.NotRun(f"no {layer}: tests/ci/servers_image.sh makes it")
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {"architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine], "os": "linux",
              "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/srv",
                         "Cmd": shlex.split(NGINX)},
              "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}
    manifest = [{"Config": "config.json", "RepoTags": ["servers:latest"], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive, tempfile.TemporaryDirectory() as directory:
        archive.add(layer, "layer.tar")
        for name, document in (("config.json", config), ("manifest.json", manifest)):
            file = Path(directory, name)
            file.write_text(json.dumps(document))
            archive.add(file, name)


def first_byte(address: str, port: int = 80) -> float:
    """Return the seconds until a request has the first byte of its answer, which is OK. Raises OSError."""
    start = time.perf_counter()
    with socket.create_connection((address, port), lab.CLIENT_SECONDS) as client:
        client.sendall(lab.REQUEST)
        first = client.recv(65536)
        seconds = time.perf_counter() - start
        while client.recv(65536):
            continue
    if not first.startswith(b"HTTP/1."):
        raise OSError(f"no answer but {first!r}")
    return seconds


def wait_for(address: str, port: int, process: subprocess.Popen) -> None:
    """Wait until a server answers. Raises lab.NotRun."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            first_byte(address, port)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise lab.NotRun(f"{process.args[0]} does not serve port {port}")
        time.sleep(0.001)


@contextlib.contextmanager
def running(command: list, **options):
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def bare_nginx(rootfs: Path, directory: Path, address: str = "127.0.0.1", port: int = BARE_PORT, groups=()):
    place = directory / f"bare-{port}"
    place.mkdir()
    with running(["unshare", "--mount", "--propagation", "private", "bash", "-c", BARE_NGINX, "bash", rootfs, place,
                  f"{address}:{port}", *groups]) as process:
        wait_for(address, port, process)
        yield


@contextlib.contextmanager
def cgroups_of_a_container():
    """Have cgroups beside those of a container of web, without limits: what any container pays for being in some."""
    groups = {path.parent / "bench" for path in Path("/sys/fs/cgroup").glob("**/function-web/*/")
              if "cpuset" not in path.parts}            # which takes nobody before it has CPUs
    for group in groups:
        group.mkdir()
    try:
        yield groups
    finally:
        for group in groups:
            group.rmdir()


@contextlib.contextmanager
def haproxy(directory: Path):
    if shutil.which("haproxy") is None:
        raise lab.NotRun("no haproxy: apt install haproxy")
    (directory / "haproxy.cfg").write_text(PROXY)
    with running(["haproxy", "-f", directory / "haproxy.cfg"]) as process:
        wait_for("127.0.0.1", PROXY_PORT, process)
        yield


def measure_warm(report, daemon: lab.Faasd, directory: Path, rounds: int, pause: float) -> None:
    """Have a request at a time served by a fresh container, of a server and, in turn, of a handler."""
    handler = daemon.deploy("handler", lab.pack(directory), "--warm", "2")
    for name, command in (("nginx", NGINX), ("go", GO)):
        daemon.faas("set", "web", "--warm", "2", "--", *shlex.split(command))
        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for side, function, address in ((0, "web", daemon.address), (1, "handler", handler)):
                daemon.wait_warm(function, 2)
                time.sleep(pause)
                samples[side].append(first_byte(address))
        for percent in (50, 99):
            report.figure(f"server: {name}, warm, fresh container, p{percent}",
                          round(lab.percentile(samples[0], percent) * 1000, 3), "ms")
        report.ratio(f"server: {name}, warm ÷ a handler (Python), warm", lab.ratios(*samples))
    daemon.faas("rm", "handler")


def measure_fresh(report, daemon: lab.Faasd, directory: Path, rounds: int, seconds: int) -> None:
    """Have 16 clients served by fresh containers, of a server and, in turn, of a handler."""
    handler = daemon.deploy("handler", lab.pack(directory), "--warm", "0")
    for name, command in (("nginx", NGINX), ("go", GO)):
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for side, function, address in ((0, "web", daemon.address), (1, "handler", handler)):
                words = ("--", *shlex.split(command)) if function == "web" else ()
                daemon.faas("set", function, "--warm", "auto", *words)
                rates[side].append(lab.Load(address).run(16, seconds))
                daemon.faas("set", function, "--warm", "0")
                daemon.wait_warm(function, 0)
        report.figure(f"server: {name}, 16 clients, fresh containers", round(statistics.median(rates[0]), 1),
                      "requests/s")
        report.ratio(f"server: {name}, 16 clients, fresh containers ÷ a handler's (Python)", lab.ratios(*rates))
    daemon.faas("rm", "handler")


def measure_shared(report, daemon: lab.Faasd, directory: Path, rounds: int, seconds: int, wrk) -> None:
    """Have nginx in one container serve 64 clients at a time: the requests of one connection, and new connections.

    It may use all CPUs, as what it is compared with does.
    """
    daemon.faas("set", "web", "--reuse", "0", "--share", "64", "--warm", "1", "--timeout", "0", "--cpus",
                str(os.cpu_count()), "--", *shlex.split(NGINX))
    daemon.wait_warm("web", 1)
    rootfs, = (daemon.state_dir / "images/web").glob("*/rootfs")
    close = ("-H", "Connection: close")
    kept: tuple[list[float], list[float], list[float]] = ([], [], [])
    new: tuple[list[float], list[float]] = ([], [])
    cpu, errors = [], set()
    subprocess.run(["ip", "address", "add", f"{GROUPED_ADDRESS}/32", "dev", "lo"], check=True)
    with (bare_nginx(rootfs, directory), haproxy(directory), cgroups_of_a_container() as groups,
          bare_nginx(rootfs, directory, GROUPED_ADDRESS, GROUPED_PORT, groups)):
        for _ in range(rounds):
            kept[2].append(wrk(f"{GROUPED_ADDRESS}:{GROUPED_PORT}", seconds)[0])
            kept[1].append(wrk(f"127.0.0.1:{BARE_PORT}", seconds)[0])
            kept[0].append(wrk(daemon.address, seconds)[0])
            new[1].append(wrk(f"127.0.0.1:{PROXY_PORT}", seconds, *close)[0])
            before, requests = daemon.cpu_seconds(), daemon.stats("web")["requests"]
            rate, error = wrk(daemon.address, seconds, *close)
            new[0].append(rate)
            cpu.append((daemon.cpu_seconds() - before) / max(1, daemon.stats("web")["requests"] - requests))
            errors.add(error)
    report.figure("server: nginx, keep-alive", round(statistics.median(kept[0])), "requests/s")
    report.ratio("server: nginx, keep-alive ÷ the same nginx on the bare host", lab.ratios(*kept[:2]))
    report.ratio("server: nginx, keep-alive ÷ the same, in cgroups and at an address like a function's",
                 lab.ratios(kept[0], kept[2]))
    report.figure("server: nginx, --reuse 0 --share 64, new connections", round(statistics.median(new[0])),
                  "requests/s")
    report.ratio("server: nginx, new connections ÷ HAProxy (TCP) before the bare one", lab.ratios(*new))
    report.figure("server: the daemon's CPU for a new connection", round(statistics.median(cpu) * 1e6), "µs")
    print(f"    errors as wrk tells them: {', '.join(sorted(errors))}")
    report.skip("server: ÷ docker run -p", "our own engine has no network: it must not change this machine's rules")


def measure_cold(report, daemon: lab.Faasd, image: Path, directory: Path, rounds: int, pause: float) -> None:
    """Measure from nothing to the first byte: of a function without warm containers, and of `docker run`."""
    with lab.Engine(directory) as engine:
        subprocess.run([*engine.docker(), "load", "--input", image], capture_output=True, check=True)

        def docker_run(command: str) -> float:
            start = time.perf_counter()
            with running([*engine.docker(), "run", "--rm", "--name", "bench", "--network", "host", "--env",
                          f"PORT={ENGINE_PORT}", "servers:latest", *shlex.split(command)]) as process:
                try:
                    wait_for("127.0.0.1", ENGINE_PORT, process)
                    return time.perf_counter() - start
                finally:                # not by a signal to docker, which process 1 of the container may ignore
                    subprocess.run([*engine.docker(), "kill", "bench"], capture_output=True, check=False)
                    process.wait()
        for name, command in COLD.items():
            daemon.faas("set", "web", "--reuse", "1", "--share", "1", "--warm", "0", "--port", str(ENGINE_PORT), "--",
                        *shlex.split(command))
            samples: tuple[list[float], list[float]] = ([], [])
            for number in range(rounds + 1):
                sample = first_byte(daemon.address), docker_run(command)
                if number:              # the first one warms the page cache
                    for values, value in zip(samples, sample, strict=True):
                        values.append(value)
                time.sleep(pause)
            report.figure(f"server: {name}, cold, first byte, p50", round(statistics.median(samples[0]) * 1000, 1),
                          "ms")
            report.ratio(f"server: {name}, cold ÷ docker run", lab.ratios(*samples))


def measure(report, quick: bool, wrk, pause: float) -> None:
    """Measure everything. wrk runs that program, and returns requests/s and errors."""
    if shutil.which("wrk") is None:
        raise lab.NotRun("no wrk: apt install wrk")
    rounds, seconds = (1, 2) if quick else (4, 4)
    with lab.scratch() as directory, lab.Faasd(directory) as daemon:
        image = directory / "servers.tar"
        write_image(image)
        daemon.deploy("web", image, "--start-timeout", "60")
        daemon.address = daemon.faas("ip", "web").strip()
        measure_warm(report, daemon, directory, 10 if quick else 150, pause)
        measure_fresh(report, daemon, directory, rounds, seconds)
        for part in (lambda: measure_shared(report, daemon, directory, rounds, seconds, wrk),
                     lambda: measure_cold(report, daemon, image, directory, 3 if quick else 15, pause)):
            try:
                part()
            except lab.NotRun as reason:
                report.skip("server", str(reason))
