"""What integration tests share: a real daemon in temporary directories, images with a handler of ours, snapshots.

Everything a test makes carries PREFIX in its name, so that tests/run.py can look for what a file has left: leftovers().
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import glob
import hashlib
import http.client
import io
import ipaddress
import json
import os
import py_compile
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import unittest
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP))
import faasd  # noqa: E402
from clients import PATIENCE, READY_SECONDS, get  # noqa: E402, F401

PREFIX = f"faasd-test.{secrets.token_hex(3)}."         # of this run: another may be under way
SCRATCH = None if "FAASD_TEST_CACHE" in os.environ else tempfile.TemporaryDirectory(prefix="faasd-tests.")
CACHE = Path(os.environ.get("FAASD_TEST_CACHE") or SCRATCH.name)    # what all files share: layers, byte code
with contextlib.suppress(FileExistsError):
    (CACHE / "faas.py").symlink_to(TOP / "faas")
# Python compiles a program anew each time, but keeps the byte code of what is imported. Tests write none into the tree.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Without what faasd does not need of Python, nor a search for garbage in what is imported: 10 ms, 2,500 times.
IMPORTING = (sys.executable, "-S", "-X", f"pycache_prefix={CACHE}/byte-code", "-c")
FAAS = (*IMPORTING, f"import gc, os, sys; sys.path.insert(0, {str(CACHE)!r}); sys.argv[0] = 'faas'; gc.disable(); "
                    "import faas; gc.enable(); os._exit(faas.main())")          # as ./faas does
RUN_DIRS: set[Path] = set()                             # of all daemons of this run
HANDLER = TOP / "tests/handlers/handler.py"            # to put something in front of; all else runs handler.pl
RUNTIME = os.environ.get("FAASD_TEST_RUNTIME", "runc")     # the --runtime of every daemon that does not ask for another
DEPLOY_SECONDS = 10 * READY_SECONDS
# For a daemon whose tests end with no container: those that a burst has asked for in vain would wait for 20 s.
BRIEF_SURPLUS = {"SURPLUS_SECONDS": 2.0}


# A network namespace that nobody has set up has no routes; this machine's own has some.
IN_PRIVATE_NETWORK = len(Path("/proc/net/route").read_text().splitlines()) <= 1


def wait_until(condition, what: str, seconds: float = READY_SECONDS, longest_pause: float = 0.1):
    """Return the first true value of condition(); fail if there is none in time."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {seconds} s: {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, longest_pause)
    return value


def temporary_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    path.chmod(0o711)           # containers, which run as nobody in particular, must pass
    return path


# -- images --

PYTHON = str(Path(getattr(sys, "_base_executable", "") or sys.executable).resolve())
# What handlers of tests import, and what Python itself imports when it fails.
MODULES = ("contextlib", "ctypes", "encodings.idna", "encodings.latin_1", "errno", "fcntl", "itertools", "json", "mmap",
           "random", "resource", "select", "shutil", "signal", "socket", "struct", "subprocess", "threading", "time",
           "traceback")
PERL = "/usr/bin/perl"
COLUMN = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
SYSTEM_CALLS = {"recvmsg": (47, 212)[COLUMN], "vmsplice": (278, 75)[COLUMN], "setsid": (112, 157)[COLUMN],
                "getgroups": (115, 158)[COLUMN]}


@functools.cache
def python_layer(*more: str) -> bytes:
    """Return the tar of a layer with this machine's python3 and what MODULES and more need of its library.

    With byte code, as `faas pack` makes it. Tests unpack it hundreds of times.
    """
    made = CACHE / f"python-{hashlib.sha256(' '.join(more).encode()).hexdigest()}.tar"
    if not made.exists():
        replace(made, make_python_layer(more))
    return made.read_bytes()


def replace(path: Path, content: bytes) -> None:
    """Write a file that another process may be reading, or writing too."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.rename(path)


def make_python_layer(more: tuple[str, ...]) -> bytes:
    script = f"import sys, {', '.join((*MODULES, *more))}\nfor module in list(sys.modules.values()):\n" \
             "    print(getattr(module, '__file__', None) or '')"
    loaded = subprocess.run([PYTHON, "-I", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    stdlib = sysconfig.get_path("stdlib")
    sources = {path for path in loaded if path.startswith(stdlib) and "-packages/" not in path}
    files = {path: Path(path).read_bytes() for path in sources | {PYTHON}}
    with tempfile.TemporaryDirectory(prefix=PREFIX) as directory:
        for path in sorted(sources):
            if path.endswith(".py"):
                compiled = py_compile.compile(path, f"{directory}/pyc", path, doraise=True,
                                              invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
                files[byte_code_path(path)] = Path(compiled).read_bytes()
    for binary in [path for path in files if not path.endswith((".py", ".pyc"))]:
        files |= {path: Path(path).read_bytes() for path in libraries(binary)}
    return layer({path.lstrip("/"): data for path, data in sorted(files.items())})


def byte_code_path(source: str) -> str:
    """Return where a container's Python looks for byte code; importlib.util says where ours does."""
    directory, name = os.path.split(source)
    return f"{directory}/__pycache__/{name.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"


def libraries(program: str) -> set[str]:
    """Return the shared libraries that the loader takes for a program or a library, with the loader itself."""
    out = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(/\S+) \(0x", out))


def layer(files: dict[str, bytes | str]) -> bytes:
    """Return the tar of a layer with files of that content, all 0755 root:root."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            add_file(tar, name, content.encode() if isinstance(content, str) else content)
    return buffer.getvalue()


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o755
    tar.addfile(entry, io.BytesIO(data))


def docker_archive(layers: list[bytes], config: dict, tag: str = "test:latest") -> bytes:
    """Return an image archive as `docker save` wrote it for years."""
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    document = {"architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine), "os": "linux",
                "config": config, "rootfs": {"type": "layers", "diff_ids": [
                    f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]}}
    config_bytes = json.dumps(document).encode()
    config_name = f"{hashlib.sha256(config_bytes).hexdigest()}.json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [tag], "Layers": names}]).encode()
    return layer({**dict(zip(names, layers, strict=True)), config_name: config_bytes, "manifest.json": manifest})


@functools.cache
def perl_layer() -> bytes:
    """Return the tar of a layer with this machine's perl, without its library, and tests/handlers/handler.pl.

    Its handler costs 25 ms of CPU to start, runtime included, where Python's costs 64; it deploys in two thirds of the
    time.
    """
    files = {path.lstrip("/"): Path(path).read_bytes() for path in (PERL, *libraries(PERL))}
    numbers = ", ".join(f"{name} => {number}" for name, number in SYSTEM_CALLS.items())
    return layer({**files, "handler.pl": f"our %SYS = ({numbers});\n{HANDLER.with_suffix('.pl').read_text()}"})


def handler_image(source: str | bytes | None = None, label: str = "1", files: dict[str, bytes | str] | None = None,
                  layers: Iterable[bytes] = (), **config) -> bytes:
    """Return an image that runs a handler: tests/handlers/handler.pl, or the Python source of the test's own.

    label makes images differ; files and layers come on top; config adds to or replaces fields of the image config.
    """
    settings = {"Labels": {"label": label}, "Env": ["PYTHONDONTWRITEBYTECODE=1", f"LABEL={label}"]}
    if source is None:
        base = [perl_layer()]
        settings["Entrypoint"] = [PERL, "/handler.pl"]
    else:
        base = [python_layer(), layer({"handler.py": source})]
        settings["Entrypoint"] = [PYTHON, "-S", "/handler.py"]      # site costs 5 ms, and finds nothing here
    return docker_archive([*base, *([layer(files)] if files else []), *layers], {**settings, **config})


def small_image(label: str = "1", **config) -> bytes:
    """Return an image that runs tests/handlers/handler.pl, which answers with the label."""
    return handler_image(label=label, **{"Env": [f"LABEL={label}", f"ANSWER={label}"], **config})


# -- the daemon --

def program() -> Path:
    """Return a directory with faasd.py and its byte code, such as a daemon's children import it from."""
    made = CACHE / "program"
    if not made.exists():
        new = Path(tempfile.mkdtemp(dir=CACHE))
        shutil.copyfile(faasd.__file__, new / "faasd.py")
        py_compile.compile(faasd.__file__, f"{new}{byte_code_path('/faasd.py')}", "faasd.py", doraise=True,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        with contextlib.suppress(OSError):          # another process has been faster
            new.rename(made)
    return made


class Daemon:
    """A faasd of the test's own, on temporary directories. It is imported, so that Python need compile it but once."""

    def __init__(self, *arguments: str, directory: Path | None = None, env: dict[str, str] | None = None,
                 wrapper: tuple[str, ...] = (), constants: dict[str, float] | None = None):
        """arguments are the command line's; constants are set in the module before main, where waiting takes long."""
        if not IN_PRIVATE_NETWORK:
            raise RuntimeError("tests use 10.0.0.0/24 and must have a network namespace of their own: run ./test.sh")
        self.directory = directory or temporary_directory()
        self.state_dir, self.run_dir = self.directory / "state", self.directory / "run"
        RUN_DIRS.add(self.run_dir)
        self.socket = self.run_dir / "faasd.sock"
        self.arguments, self.env, self.wrapper, self.constants = arguments, env, wrapper, constants
        self.pass_fds: tuple[int, ...] = ()             # for the daemon to inherit
        self.process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        settings = "".join(f"faasd.{name} = {value}; " for name, value in (self.constants or {}).items())
        program = (f"import gc, sys; sys.path.insert(0, {str(TOP)!r}); sys.argv[0] = 'faasd.py'; gc.disable(); "
                   f"import faasd; gc.enable(); {settings}sys.exit(faasd.main(sys.argv[1:]))")
        return [*self.wrapper, *IMPORTING, program, "--state-dir", str(self.state_dir), "--run-dir", str(self.run_dir),
                "--runtime", RUNTIME, *self.arguments]

    def start(self) -> Daemon:
        self.log_file = (self.directory / "log").open("ab")
        begin = self.log_file.tell()
        self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stderr=self.log_file,
                                        pass_fds=self.pass_fds, env={**os.environ, **(self.env or {})})

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"faasd ended with {self.process.returncode}: {self.log()[begin:]}")
            return "ready: " in self.log()[begin:]
        try:
            wait_until(ready, "faasd is ready")
            self.give_byte_code()
        except BaseException:
            self.kill()
            raise
        return self

    def give_byte_code(self) -> None:
        """Spare the first unpacking child the compiling of the daemon's copy of faasd.py: half a second each time."""
        with contextlib.suppress(FileNotFoundError, FileExistsError):       # it keeps none, or has begun to
            (self.run_dir / "program/__pycache__").mkdir()
            shutil.copytree(program() / "__pycache__", self.run_dir / "program/__pycache__", dirs_exist_ok=True)

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def wait_log(self, text: str) -> None:
        """Wait until the log has a text: a thread writes it, behind what it tells of."""
        wait_until(lambda: text in self.log(), f"the log says {text!r}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the daemon, return its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(READY_SECONDS * 2)
        self.log_file.close()
        return status

    def kill(self) -> None:
        """Kill the daemon, as the out-of-memory killer would."""
        self.process.kill()
        self.process.wait()
        self.log_file.close()

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop, check that nothing is left, remove the directories."""
        try:
            if self.process.poll() is None:
                status = self.stop()
                assert status == 0, f"exit status {status}: {self.log()[-2000:]}"
                left = remains(self)
                assert not left, f"left behind: {left}"
                assert "Traceback" not in self.log(), self.log()
        finally:
            if self.process.poll() is None:     # it hangs, and must not stand in the way of the tests that follow
                self.kill()
            if guards(self.run_dir):            # it was killed, and there is no next one
                faasd.AddressGuard(self.run_dir, ipaddress.ip_network("10.0.0.0/24")).detach()
            shutil.rmtree(self.directory)

    # -- clients --

    def faas(self, *arguments: str, stdin: bytes | None = None, check: bool = True) -> subprocess.CompletedProcess:
        """Run the CLI, imported as the daemon is; output is text.

        Functions have no warm containers unless a test asks for them: most tests look at one container at a time.
        """
        if arguments[0] == "new" and "--warm" not in arguments:
            arguments = (*arguments[:2], "--warm", "0", *arguments[2:])
        if arguments[0] == "new" and "--start-timeout" not in arguments and PATIENCE > 1:
            arguments = (*arguments[:2], "--start-timeout", str(10 * PATIENCE), *arguments[2:])
        result = subprocess.run([*FAAS, "--socket", self.socket, *arguments],
                                input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
                                capture_output=True, check=False)
        result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
        if check and result.returncode != 0:
            raise AssertionError(f"faas {arguments}: {result.returncode}: {result.stderr}{self.log()[-2000:]}")
        return result

    def deploy(self, name: str, image: bytes | None = None, *options: str) -> str:
        """Deploy as the CLI does, with the options that it takes, and return the address."""
        query, body = option_query(options), image or handler_image()
        query.setdefault("warm", ["0"])
        if PATIENCE > 1:
            query.setdefault("start_timeout", [str(10 * PATIENCE)])
        path = f"/functions/{name}?{urllib.parse.urlencode(query, doseq=True)}"
        status, answer = self.api("POST", path, body, DEPLOY_SECONDS)
        if status not in (200, 201):
            raise AssertionError(f"deploy of {name}: {status}: {answer.decode()}{self.log()[-2000:]}")
        return json.loads(answer)["address"]

    def set(self, name: str, *options: str) -> dict:
        """Change options, as the CLI takes them."""
        return self.post("PATCH", f"/functions/{name}?{urllib.parse.urlencode(option_query(options), doseq=True)}")

    def remove(self, *names: str) -> None:
        for name in names:
            status, answer = self.api("DELETE", f"/functions/{name}", seconds=DEPLOY_SECONDS)
            assert status == 200, answer

    def remove_all(self) -> None:
        """Remove all functions, however a test has left the daemon."""
        if self.process.poll() is not None:
            self.start()
        self.remove(*(entry["name"] for entry in json.loads(self.api("GET", "/functions")[1])["functions"]))

    def function_log(self, name: str) -> str:
        """Return a function's log; the API waits for what is on its way to the file, which may not be there yet."""
        return self.api("GET", f"/functions/{name}/logs")[1].decode()

    def api(self, method: str, path: str, body: bytes = b"", seconds: float = READY_SECONDS) -> tuple[int, bytes]:
        """Send one request to the control API; return status and body."""
        connection = UnixConnection(self.socket, seconds)
        with contextlib.closing(connection):
            with contextlib.suppress(BrokenPipeError):  # it has answered, and closed, before it has read the body
                connection.request(method, path, body, {"Content-Type": "application/x-tar"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()

    def info(self, name: str) -> dict:
        status, body = self.api("GET", f"/functions/{name}")
        assert status == 200, body
        return json.loads(body)

    def release(self, name: str, key: str) -> None:
        """Let go on what waits in a function's handlers for /key (tests/handlers/handler.py)."""
        for rootfs in (self.state_dir / "images" / name).glob("*/rootfs"):
            (rootfs / key).touch()
        # A root that was searched for it in vain does not look into the image again (overlayfs).
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):          # it has ended
                found = re.search(rb"\0FAAS_CONTAINER_ID=(\w{12})\0", (process / "environ").read_bytes() + b"\0")
                note = self.run_dir / "containers" / found[1].decode() / "note" if found else None
                if note and os.readlink(note).split(" ")[2] == name:
                    (process / "root" / key).touch()

    def rootfs(self, name: str) -> Path:
        rootfs, = (self.state_dir / "images" / name).glob("*/rootfs")
        return rootfs

    def container(self) -> Path:
        """Return the directory of the only container, once the one that has proved a deploy is gone."""
        def only() -> list[Path]:
            found = list((self.run_dir / "containers").iterdir())
            return found if len(found) == 1 else []
        return wait_until(only, "there is one container")[0]

    def post(self, method: str, path: str) -> dict:
        """Change something through the API; return its answer."""
        status, body = self.api(method, path)
        assert status == 200, body
        return json.loads(body)

    def outcomes(self, name: str) -> dict[str, int]:
        """Return how often each outcome occurred that did."""
        stats, = json.loads(self.api("GET", f"/functions/{name}/stats")[1])["functions"]
        return {outcome: count for outcome, count in stats["outcomes"].items() if count}

    def wait_outcomes(self, name: str, expected: dict[str, int]) -> None:
        """Wait until just these outcomes are counted: a client has its answer a moment before the daemon counts it."""
        wait_until(lambda: self.outcomes(name) == expected, f"{name} counts {expected}")

    def wait_warm(self, name: str, count: int) -> set[str]:
        """Wait until so many warm containers wait and none is on its way; return all containers' ids."""
        def settled():
            info = self.info(name)
            return info["warm"] == count and info["starting"] == info["running"] == 0
        wait_until(settled, f"{name} has {count} warm containers")
        return set(list_containers(self))

    def versions(self, name: str) -> list[str]:
        """Return the versions kept of a function, the one that runs first."""
        return [entry["version"] for entry in json.loads(self.api("GET", f"/functions/{name}/versions")[1])["versions"]]

    def wait_idle(self, name: str) -> None:
        """Wait until no invocation of a function is running, with all its cleaning."""
        wait_until(lambda: self.info(name)["running"] == 0, f"{name} is idle")


class SharedDaemonCase(unittest.TestCase):
    """One daemon for the tests of a class, each of which begins and ends without functions."""

    arguments: tuple[str, ...] = ()
    constants: dict[str, float] = {}

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(*cls.arguments, constants=cls.constants).start()
        cls.addClassCleanup(cls.daemon.close)

    def setUp(self):
        self.addCleanup(self.daemon.remove_all)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, seconds: float):
        super().__init__("localhost", timeout=seconds)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def option_query(options: Iterable[str]) -> dict[str, list[str]]:
    """Return options of `faas new` and `faas set` as the API takes them."""
    query: dict[str, list[str]] = {}
    words = iter(options)
    for word in words:
        if word == "--":
            query["cmd"] = list(words)
        else:
            key = {"-e": "env"}.get(word, word.removeprefix("--").replace("-", "_"))
            query.setdefault(key, []).append(next(words))
    return query


def curl(*arguments: str, check: bool = True) -> str:
    """Run the real curl and return what it prints."""
    result = subprocess.run(["curl", "--silent", "--show-error", "--max-time", str(READY_SECONDS * 2), *arguments],
                            capture_output=True, text=True, check=False)
    if check and result.returncode != 0:
        raise AssertionError(f"curl {arguments} ended with {result.returncode}: {result.stderr}")
    return result.stdout


# -- what is there --

def cgroup_directories(name: str = PREFIX) -> list[str]:
    """Return the cgroups with name in theirs, at the top of each hierarchy of v1 and v2."""
    return sorted(directories("/sys/fs/cgroup", f"*{name}*/", f"*/*{name}*/"))


def directories(top: str, *patterns: str) -> list[str]:
    """Return the directories below top that match; Path.glob fails where one goes while it looks."""
    return [path.rstrip("/") for pattern in patterns for path in glob.glob(f"{top}/{pattern}")]


def tree(top: Path) -> list[str]:
    """Return what is at and below top; Path.rglob fails where a directory goes while it looks."""
    return [str(top), *(f"{directory}/{name}" for directory, *names in os.walk(top) for name in sum(names, []))]


def container_cgroups(daemon: Daemon) -> list[str]:
    """Return the cgroups of a daemon's containers, in all hierarchies."""
    parents = cgroup_directories(daemon.directory.name)
    return sorted(path for parent in parents for path in directories(parent, "*/", "function-*/*/")
                  if faasd.CONTAINER_ID.fullmatch(os.path.basename(path)))


def container_pids(daemon: Daemon, container: str = "") -> set[int]:
    """Return the processes of a container, or of all of a daemon's: those that are there while it looks."""
    pids: set[int] = set()
    for path in container_cgroups(daemon):
        with contextlib.suppress(OSError):                  # it goes: ENOENT, or ENODEV
            if path.endswith(container):
                pids |= set(map(int, Path(path, "cgroup.procs").read_text().split()))
    return pids


def function_cgroups(daemon: Daemon) -> set[str]:
    """Return the names of the cgroups that hold those of functions' containers."""
    parents = cgroup_directories(daemon.directory.name)
    return {os.path.basename(path) for parent in parents for path in directories(parent, "function-*/")}


def processes(name: str = PREFIX) -> list[str]:
    """Return the command lines of processes that have name in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if name in line and path.parent.name != str(os.getpid()):
                found.append(f"{path.parent.name}: {line}")
    return found


def mounts(name: str = PREFIX) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [line for line in lines if name in line]


def addresses(subnet: str = "0.0.0.0/0") -> list[str]:
    """Return the addresses on lo that carry faasd's label, those of a subnet."""
    out = subprocess.run(["ip", "-o", "-4", "addr", "show", "dev", "lo"], capture_output=True, text=True, check=True)
    return [found for found in re.findall(r"inet ([\d./]+) .*lo:faas", out.stdout)
            if ipaddress.ip_network(found).subnet_of(ipaddress.ip_network(subnet))]


def networks(mark: str = "") -> list[str]:
    """Return the links and the tables of functions with net egress, of all daemons or of that whose names have mark."""
    links = [f"link {name}" for _, name in socket.if_nameindex() if name.startswith(f"faas{mark}")]
    if not shutil.which("nft"):
        return links
    out = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    return links + [line for line in out.splitlines() if f"faasd_{mark}" in line]


def guards(run_dir: Path) -> list[str]:
    """Return the BPF programs that guard the addresses of the daemon on run_dir: one for bind, one for connect."""
    name, found = f"faasd_{faasd.run_dir_mark(run_dir)}", []
    with contextlib.suppress(OSError), faasd.top_cgroup() as cgroup:        # OSError: no BPF here
        for kind, label in ((8, "bind"), (10, "connect")):
            ids = (ctypes.c_uint32 * 64)()
            faasd.bpf(16, "4IQ2I", cgroup, kind, 0, 0, ctypes.addressof(ids), 64, 0)
            for number in filter(None, ids):
                with contextlib.suppress(FileNotFoundError), open(faasd.bpf(13, "3I", number, 0, 0), "rb") as program:
                    info = ctypes.create_string_buffer(80)
                    faasd.bpf(15, "2IQ", program.fileno(), 80, ctypes.addressof(info))
                    found += [label] if info[64:80].rstrip(b"\0").decode() == name else []
    return found


def remains(daemon: Daemon) -> list[str]:
    """Return what a stopped daemon should not have left."""
    name = daemon.directory.name
    subnet = dict(zip(daemon.arguments, daemon.arguments[1:], strict=False)).get("--subnet", "10.0.0.0/24")
    mark = faasd.run_dir_mark(daemon.run_dir)
    found = [*processes(name), *mounts(name), *cgroup_directories(name), *addresses(subnet), *networks(mark)]
    found += guards(daemon.run_dir)
    found += [str(path) for path in daemon.run_dir.rglob("*") if path.name != "faasd.lock"]
    found += [str(path) for path in (daemon.state_dir / "tmp").glob("*")]         # it may be gone
    return found


def leftovers() -> list[str]:
    """Return what the tests of this process have left, once what is on its way out is gone."""
    def look() -> list[str]:
        found = [*processes(), *mounts(), *cgroup_directories(), *addresses(), *networks()]
        found += [f"guard of {run_dir}" for run_dir in RUN_DIRS if guards(run_dir)]
        tops = (tempfile.gettempdir(), "/var/tmp")
        return found + [str(path) for top in tops for path in Path(top).glob(f"{PREFIX}*")]
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not look(), "all is gone", 5)
    return look()


def footprint(daemon: Daemon, before: dict | None = None) -> dict[str, object]:
    """Return what must be the same before and after any number of invocations.

    But for descriptors: a thread may have closed one of an earlier test since before, so there may be fewer.
    """
    name = daemon.directory.name
    mounted = sorted(line.split(" ", 2)[2] for line in mounts(name))        # less their ids: a restart mounts anew
    kinds = descriptors(daemon.process.pid)
    for _ in range(3):                  # a thread closes a connection of the API, or writes to a log, just now
        time.sleep(0.02)
        kinds &= descriptors(daemon.process.pid)
    if kinds["user"] <= 1 + len(list((daemon.state_dir / "images").iterdir())):
        del kinds["user"]               # one for each function, and the trial at start, from the first container on
    return {"containers": list_containers(daemon), "mounts": mounted, "cgroups": container_cgroups(daemon),
            "descriptors": kinds | (before["descriptors"] if before else collections.Counter()),
            "run_dir": sorted(path for top in daemon.run_dir.iterdir() if top.name not in ("rootfs", "program")
                              for path in tree(top)),
            "children": Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text()}


def descriptors(pid: int) -> collections.Counter[str]:
    """Return how many descriptors of which kind a process has; of a file, its path is the kind."""
    kinds: collections.Counter[str] = collections.Counter()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):        # closed just now
            kinds[re.sub(r"^(socket|pipe|user):.*", r"\1", os.readlink(path))] += 1
    return kinds


def list_containers(daemon: Daemon) -> list[str]:
    """Return what the runtime lists; without a root directory it knows nothing, which newer ones call an error."""
    root = daemon.run_dir / "runc"
    if not root.exists() or not os.listdir(root):       # an empty one too: tests ask for this time and again
        return []

    def ask() -> subprocess.CompletedProcess | None:        # it fails if a container ends while it looks
        result = subprocess.run([RUNTIME, "--root", root, "list", "--quiet"], capture_output=True, text=True,
                                check=False)
        return result if result.returncode == 0 else None
    return wait_until(ask, f"{RUNTIME} lists the containers").stdout.split()


# -- locks of the kernel --

HOLDER = """
import ctypes, fcntl, mmap, os, select, struct, sys, threading
USERFAULTFD, UFFDIO_API, UFFDIO_REGISTER = {"x86_64": 323, "aarch64": 282}[os.uname().machine], 0xC018AA3F, 0xC020AA00
libc = ctypes.CDLL(None, use_errno=True)
fault = libc.syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)       # else poll(2) returns an error at once
if fault < 0:
    sys.exit(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
fcntl.ioctl(fault, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(fault, UFFDIO_REGISTER, struct.pack("QQQQ", address, mmap.PAGESIZE, 1, 0))
if sys.argv[1].isdigit():
    held = int(sys.argv[1])
else:
    held = os.open(sys.argv[1], os.O_WRONLY)
    os.write(held, b"printed\\n")
threading.Thread(target=libc.write, args=(held, ctypes.c_void_p(address), ctypes.c_size_t(1)), daemon=True).start()
poll = select.poll()
poll.register(fault, select.POLLIN)
poll.poll()
print("held", flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def lock_held(what: Path | int, cgroups: Iterable[str] = ()) -> Iterator[subprocess.Popen]:
    """Have somebody in cgroups print a line into a pipe and hold its lock; or hold that of a socket of ours.

    As a handler can for long: the kernel takes the lock, and then waits for a page of what is to be written, here for
    one that never comes (userfaultfd(2)).
    """
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(what)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, pass_fds=[what] if isinstance(what, int) else ())
    try:
        if not holder.stdout.readline():
            raise unittest.SkipTest(holder.stderr.read().strip().splitlines()[-1])
        for cgroup in cgroups:
            Path(cgroup, "cgroup.procs").write_text(str(holder.pid))
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def client_socket(daemon: Daemon, client: socket.socket) -> int:
    """Return a duplicate of the socket that a container has of a client; 0 if none has it."""
    for pid in container_pids(daemon):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError), faasd.kept_open(os.pidfd_open(pid)) as pidfd:
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):              # it is closed, or not connected
                    if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):
                        continue
                    with faasd.duplicate_socket(pidfd, int(number)) as candidate:
                        if candidate.getpeername() == client.getsockname():
                            return candidate.detach()
    return 0


def waits(pid: int | str = "self") -> list[str]:
    """Return where the threads of a process wait in the kernel: those that do not end while it looks."""
    found = []
    for path in glob.glob(f"/proc/{pid}/task/*/wchan"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(path).read_text())
    return found


def cpu_ticks(pid: int | str) -> int:
    """Return the CPU time that a process, or PID/task/TID, has used, in units of SC_CLK_TCK (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def resident_memory(pid: int, field: str = "VmRSS") -> int:
    """Return a process's memory in bytes: VmRSS now, VmHWM at most so far."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024

