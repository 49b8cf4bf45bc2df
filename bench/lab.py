"""What the benchmarks share: a daemon in a network namespace of its own, bare `runc run`, clients, and figures."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
import secrets
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
import faasd  # noqa: E402

HANDLER = Path(__file__).with_name("handler.py")
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
CLIENT_SECONDS = 60.0       # for one request; a benchmark reports what takes longer as an error


def in_own_network() -> None:
    """Run this program again in a network namespace of its own, unless it is in one."""
    if os.environ.get("FAASD_BENCH_NETNS") != "1":
        if os.geteuid() != 0:
            sys.exit(f"{sys.argv[0]} needs root: sudo {sys.argv[0]}")
        os.environ["FAASD_BENCH_NETNS"] = "1"
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable,
                              *sys.argv])


@contextlib.contextmanager
def scratch(where: str = "/dev/shm"):
    """A directory that is removed in the end; on a tmpfs it is the same for all sides of a comparison."""
    directory = Path(tempfile.mkdtemp(prefix="faasd-bench.", dir=where))
    directory.chmod(0o711)      # containers, which run as nobody in particular, must pass
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


class Faasd:
    """A daemon of the benchmark's own."""

    def __init__(self, directory: Path, *arguments: str, top: Path = TOP):
        """top is the checkout to run."""
        self.directory, self.top = directory, top
        self.state_dir, self.run_dir = directory / "state", directory / "run"
        self.arguments = arguments

    def __enter__(self) -> Faasd:
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen([sys.executable, self.top / "faasd.py", "--state-dir", self.state_dir,
                                             "--run-dir", self.run_dir, *self.arguments], stderr=log)
        while " ready: " not in (self.directory / "log").read_text():
            if self.process.poll() is not None:
                sys.exit((self.directory / "log").read_text())
            time.sleep(0.005)
        return self

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        self.process.wait()

    def faas(self, *arguments) -> str:
        return subprocess.run([sys.executable, self.top / "faas", "--socket", self.run_dir / "faasd.sock", *arguments],
                              stdout=subprocess.PIPE, text=True, check=True).stdout

    def deploy(self, name: str, image: Path, *options: str) -> str:
        """Deploy an image; return the function's address."""
        return self.faas("new", name, "-f", image, *options).split()[-1]

    def stats(self, name: str) -> dict:
        return json.loads(self.faas("--json", "stats", name))["functions"][0]

    def wait_warm(self, name: str, count: int) -> None:
        while (stats := self.stats(name))["warm"] < count or stats["running"] or stats["starting"]:
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """The daemon's own CPU time; containers and runc are not in it."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Its memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pack(directory: Path, handler: Path = HANDLER) -> Path:
    """Return an image with this machine's Python and a handler."""
    image = directory / f"{handler.stem}.tar"
    with image.open("wb") as file:
        subprocess.run([sys.executable, TOP / "faas", "pack", handler], stdout=file, check=True)
    return image


class BareRuns:
    """Runs a function's bundle with nothing but an OCI runtime."""

    def __init__(self, directory: Path, faasd_state: Path, name: str, runtime: str = "runc"):
        self.run_dir = Path(tempfile.mkdtemp(prefix="bare.", dir=directory))
        self.run_dir.chmod(0o711)
        (self.run_dir / "containers").mkdir()
        self.rootfs, = (faasd_state / "images" / name).glob("*/rootfs")
        self.image = json.loads((self.rootfs.parent / "image.json").read_text())
        self.cgroups = faasd.Cgroups(self.run_dir)
        self.bundle = faasd.Bundle(name, self.image, faasd.Options(), self.rootfs, self.run_dir, self.cgroups)
        self.runtime = faasd.Runtime(runtime, self.run_dir / "runc")

    def run(self) -> tuple[float, float]:
        """Return the seconds until the handler was ready, and until runc was done. It is told that there is no work."""
        container = secrets.token_hex(6)
        directory = self.run_dir / "containers" / container
        directory.mkdir()
        os.chown(directory, 0, self.bundle.first_id)
        (directory / "config.json").write_bytes(self._config(container))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "control.sock"))
            (directory / "control.sock").chmod(0o666)
            listener.listen(1)
            start = time.perf_counter()
            process = self._spawn(self.runtime.run_argv(str(directory), container))
            connection, _ = listener.accept()
            ready = time.perf_counter() - start
            connection.close()
            status = process.wait()
        done = time.perf_counter() - start
        assert status == 0, status
        shutil.rmtree(directory)
        return ready, done

    def _config(self, container: str) -> bytes:
        """Return its config.json, whose root is the image itself: the runtime alone makes no other."""
        config = self.bundle.render(container)
        return config.replace(bytes(self.run_dir / faasd.ROOT / "root"), bytes(self.rootfs))

    def _spawn(self, argv: list[str]) -> subprocess.Popen:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        self.cgroups.remove_groups()
        self.cgroups.remove(self.cgroups.parent)


class WritableRuns(BareRuns):
    """The same with the bundle's own root, which can be written: each run gets one first, as faasd makes it."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        (self.run_dir / faasd.ROOT).mkdir()
        (self.run_dir / faasd.NAMES).parent.mkdir()
        (self.run_dir / faasd.NAMES).touch()

    def _config(self, container: str) -> bytes:
        return self.bundle.render(container)

    def _spawn(self, argv: list[str]) -> subprocess.Popen:
        def spawn() -> subprocess.Popen:
            faasd.mount_root(str(self.run_dir / faasd.ROOT), self.bundle)
            return super(WritableRuns, self)._spawn(argv)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:        # a thread with a mount namespace of its own
            return thread.submit(spawn).result()


class NotRun(Exception):
    """A comparison, or a side of one, cannot run here; str() says why."""


class Engine:
    """containerd and a Docker engine of our own, started by hand (tests/ci/docker_engine.sh)."""

    def __init__(self, directory: Path):
        self.directory = directory / "faasd-bench-engine"
        self.directory.mkdir()
        for program in ("containerd", "ctr", "dockerd", "docker"):
            if shutil.which(program) is None:
                raise NotRun(f"no {program}: apt install docker.io")

    def __enter__(self) -> Engine:
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen([TOP / "tests/ci/docker_engine.sh", self.directory],
                                            stdin=subprocess.PIPE, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while subprocess.run([*self.docker(), "version"], capture_output=True, check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise NotRun(f"the engine does not start: {(self.directory / 'log').read_text()[-300:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *exception) -> None:
        self.process.stdin.close()
        self.process.wait()

    def docker(self) -> list[str]:
        return ["docker", "--host", f"unix://{self.directory}/docker.sock"]

    def docker_run(self) -> list[str]:
        return [*self.docker(), "run", "--rm", "--network", "none", "handler:latest", "--boot"]

    def ctr_run(self, bare: BareRuns) -> list[str]:
        process = bare.image["process"]
        environment = [word for entry in process["env"] for word in ("--env", entry)]
        return ["ctr", "--address", f"{self.directory}/containerd.sock", "run", "--rm", "--null-io", *environment,
                "--rootfs", str(bare.rootfs), f"bench{time.monotonic_ns()}", *process["entrypoint"], "--boot"]


def request(address: str, port: int = 80) -> float:
    """Return the seconds until a request has its whole answer. Raises OSError, AssertionError."""
    with socket.socket() as client:
        client.settimeout(CLIENT_SECONDS)
        start = time.perf_counter()
        client.connect((address, port))
        client.sendall(REQUEST)
        received = b""
        while data := client.recv(65536):
            received += data
        seconds = time.perf_counter() - start
    assert received.startswith(b"HTTP/1.1 200 "), received
    return seconds


class Load:
    """Clients in a closed loop: each sends its next request, on a new connection, when it has the last answer.

    Without asyncio, whose streams take twice the CPU: what is measured needs it.
    """

    def __init__(self, address: str):
        self.address = address
        self.latencies: list[float] = []            # seconds, of those answered with 200
        self.errors: collections.Counter = collections.Counter()

    def run(self, clients: int, seconds: float) -> float:
        """Return the rate of answers; those under way when the time is over count in neither."""
        end = time.perf_counter() + seconds
        latencies = [latency for done, latency in self._answers(clients, end) if done < end]
        self.latencies += latencies
        return len(latencies) / seconds

    def burst(self, count: int) -> list[float]:
        """Send so many at once; return the times until each was answered, in order."""
        self.latencies = sorted(latency for _, latency in self._answers(count, until=0))
        return self.latencies

    def _answers(self, clients: int, until: float) -> Iterator[tuple[float, float]]:
        """Send requests until then; yield when each was answered, and after how many seconds."""
        with selectors.DefaultSelector() as selector:
            for _ in range(clients):
                self._send(selector)
            while under_way := selector.get_map():
                ready = [key for key, _ in selector.select(CLIENT_SECONDS)]
                for key in ready or list(under_way.values()):
                    start, answer = key.data
                    try:
                        if not ready:
                            raise TimeoutError
                        answer.append(key.fileobj.recv(65536))
                    except OSError as error:
                        self.errors[type(error).__name__] += 1
                    else:
                        if answer[-1]:              # there may be more
                            continue
                        done, status = time.perf_counter(), b"".join(answer)[9:12]
                        if status == b"200":
                            yield done, done - start
                        else:
                            self.errors[status.decode() or "empty"] += 1
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    if time.perf_counter() < until:
                        self._send(selector)

    def _send(self, selector: selectors.BaseSelector) -> None:
        start = time.perf_counter()
        try:
            client = socket.create_connection((self.address, 80), CLIENT_SECONDS)
            client.sendall(REQUEST)
            selector.register(client, selectors.EVENT_READ, (start, []))
        except OSError as error:
            self.errors[type(error).__name__] += 1


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, p10 and p90."""
    return {"median": statistics.median(values), "p10": percentile(values, 10), "p90": percentile(values, 90)}


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Return the spread of the ratios of two sides that alternated."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
