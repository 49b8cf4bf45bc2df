"""`faas pack`: an image without Docker, which runs, and is the same each time."""

import functools
import hashlib
import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import unittest
import zipfile
from pathlib import Path

import support
from clients import connect

HANDLER = support.TOP / "test_handler.py"


PYTHON = os.path.realpath(sys.executable)


@functools.cache
def pack(*arguments, python: str = PYTHON) -> bytes:
    """Return the image that `faas pack` makes, once: it compiles a whole standard library."""
    return subprocess.run([python, support.TOP / "faas", "pack", *arguments], capture_output=True, check=True).stdout


class Pack(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.image = pack(HANDLER)
        cls.members = {}
        with tarfile.open(fileobj=io.BytesIO(cls.image)) as archive:
            for member in archive:
                cls.members[member.name] = archive.extractfile(member).read()
        cls.manifest = json.loads(cls.members["manifest.json"])[0]
        cls.config = json.loads(cls.members[cls.manifest["Config"]])

    def test_same_input_gives_the_same_bytes(self):
        self.assertEqual(hashlib.sha256(pack.__wrapped__(HANDLER)).hexdigest(), hashlib.sha256(self.image).hexdigest())

    def test_digests(self):
        diff_ids = [f"sha256:{hashlib.sha256(self.members[name]).hexdigest()}" for name in self.manifest["Layers"]]
        self.assertEqual(self.config["rootfs"]["diff_ids"], diff_ids)
        self.assertEqual(self.manifest["Config"],
                         f"{hashlib.sha256(self.members[self.manifest['Config']]).hexdigest()}.json")
        self.assertEqual(self.manifest["RepoTags"], ["test-handler:latest"])

    def test_entries(self):
        for name in self.manifest["Layers"]:
            with tarfile.open(fileobj=io.BytesIO(self.members[name])) as layer:
                names = layer.getnames()
                for entry in layer:
                    self.assertEqual((entry.uid, entry.gid, entry.mtime, entry.uname), (0, 0, 0, ""), entry.name)
                    self.assertIn(oct(entry.mode), ("0o755", "0o644", "0o1777"), entry.name)
                    self.assertFalse(entry.name.startswith("/") or ".." in entry.name.split("/"), entry.name)
                    self.assertTrue(entry.isreg() or entry.isdir(), entry.name)
                    parent = os.path.dirname(entry.name)
                    self.assertTrue(not parent or parent in names, f"{entry.name} comes without its directory")
        self.assertIn("test_handler.py", names)

    def test_python_needs_no_compiling(self):
        with tarfile.open(fileobj=io.BytesIO(self.members[self.manifest["Layers"][0]])) as layer:
            names = set(layer.getnames())
            sources = [name for name in names if name.endswith("/socket.py")]
            self.assertEqual(len(sources), 1)
            directory, tag = os.path.dirname(sources[0]), sys.implementation.cache_tag
            byte_code = layer.extractfile(f"{directory}/__pycache__/socket.{tag}.pyc").read(8)
        self.assertEqual(byte_code[4:], b"\1\0\0\0")        # hash-based, and the hash is never checked (PEP 552)
        self.assertFalse([name for name in names if "/test/" in name or "site-packages" in name])

    def test_name_that_is_taken_and_a_module_beside_it(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "tmp").write_text("import beside")
        (directory / "beside.py").touch()
        result = subprocess.run([PYTHON, support.TOP / "faas", "pack", directory / "tmp"], capture_output=True,
                                check=True)
        self.assertEqual(result.stderr.decode(), f"faas: warning: {directory}/tmp imports beside, which the image does "
                                                 "not have: pack takes one file; merge them, or use docker build\n")
        with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
            manifest = json.loads(archive.extractfile("manifest.json").read())[0]
            config = json.loads(archive.extractfile(manifest["Config"]).read())
        self.assertEqual(config["config"]["Entrypoint"], [PYTHON, "/handler.py"])

    def test_other_pythons_of_this_machine(self):
        """The handler answers from an image of each: what `faas` runs with is what it packs."""
        asked = [subprocess.run([path, "-c", "import os, sys; sys.version_info < (3, 11) or "
                                             "print(os.path.realpath(sys.executable))"],        # PATH may have a script
                                capture_output=True, text=True, check=True).stdout.strip()
                 for path in ("/usr/bin/python3", "python3", PYTHON) if shutil.which(path)]
        pythons = {python for python in asked if python}
        with support.Daemon() as daemon:
            for number, python in enumerate(sorted(pythons)):
                image = pack(HANDLER, python=python)
                address = daemon.deploy(f"f{number}", image)
                status, body = support.get(address, "/packed")
                self.assertEqual((status, body), (200, "Hello from FaaS handler!\nGET /packed HTTP/1.1\n"))
                self.assertEqual(daemon.info(f"f{number}")["command"], [python, "/test_handler.py"])

    def test_from_a_virtual_environment(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        try:
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], check=True,
                           capture_output=True)
        except subprocess.CalledProcessError as error:
            self.skipTest(f"python3 -m venv does not work here: {error.stderr[-200:]}")
        self.assertEqual(pack(HANDLER, python=directory / "venv/bin/python3"), self.image)

    def test_refusals(self):
        usage = " (usage: faas pack [options] FILE [-- MODULE ARGUMENT…] > image.tar; see faas pack --help)"
        for arguments, status, words in (
                (("/nonexistent.py",), 1, "it is not there; name one file, your program"),
                (("/",), 1, "it is a directory; name one file, your program"),
                (("/dev/null",), 1, "it is no plain file; name one file, your program"),
                (("-f", HANDLER), 2, "unrecognized arguments: -f" + usage), ((), 2, "are required: FILE" + usage)):
            result = subprocess.run([sys.executable, support.TOP / "faas", "pack", *arguments], capture_output=True,
                                    text=True, check=False)
            self.assertEqual((result.returncode, result.stdout), (status, ""))
            self.assertRegex(result.stderr, rf"\Afaas: [^\n]*{re.escape(words)}\n\Z")
        deep = support.temporary_directory()
        self.addCleanup(shutil.rmtree, deep)
        for text in (f"x = {'-' * 200_000}1\n", f"x = {'1 + ' * 100_000}1\n"):
            (deep / "deep.py").write_text(text)
            result = subprocess.run([sys.executable, support.TOP / "faas", "pack", deep / "deep.py"],
                                    capture_output=True, text=True, check=False)
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr, r"\Afaas: cannot pack [^\n]+\n\Z")
        master, slave = pty.openpty()
        result = subprocess.run([sys.executable, support.TOP / "faas", "pack", HANDLER], stdout=slave,
                                stderr=subprocess.PIPE, text=True, check=False)
        os.close(master)
        os.close(slave)
        self.assertEqual(result.returncode, 2)
        self.assertIn("faas pack FILE > image.tar", result.stderr)

    def test_a_signal_leaves_no_temporary_directory(self):
        """It comes while pack asks ldd. nohup has it ignore SIGHUP."""
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "script.sh").write_text("#!/bin/sh\n")
        (directory / "ldd").write_text(f"#!/bin/sh\nkill -$SIGNAL $PPID\nexec {shutil.which('ldd')} $1\n")
        (directory / "ldd").chmod(0o755)
        for prefix, number, status in (("", 15, 143), ("", 1, 129), ("trap '' HUP; ", 1, 0)):
            result = subprocess.run(
                ["bash", "-c", f'{prefix}exec "$@"', "bash", PYTHON, support.TOP / "faas", "pack",
                 directory / "script.sh"], capture_output=True, check=False,
                env={**os.environ, "TMPDIR": directory, "PATH": f"{directory}:{os.environ['PATH']}",
                     "SIGNAL": str(number)})
            self.assertEqual((result.returncode, result.stderr, bool(result.stdout)), (status, b"", status == 0))
            self.assertEqual(list(directory.glob("faas-pack.*")), [])

    @unittest.skipUnless(shutil.which("skopeo"), "skopeo is not installed")
    def test_skopeo_takes_it(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "image.tar").write_bytes(self.image)
        subprocess.run(["skopeo", "--tmpdir", directory, "--insecure-policy", "copy", "--quiet",
                        f"docker-archive:{directory}/image.tar", f"oci:{directory}/oci"],
                       check=True, capture_output=True)
        index = json.loads((directory / "oci/index.json").read_text())
        self.assertEqual(len(index["manifests"]), 1)


class Handler(unittest.TestCase):
    """test_handler.py, which everybody will copy."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        cls.address = cls.daemon.deploy("f", pack(HANDLER))

    def test_every_kind_of_client(self):
        for arguments, body in (((), "Hello from FaaS handler!\nGET / HTTP/1.1\n"),
                                (("--data", "x=1"), "Hello from FaaS handler!\nPOST / HTTP/1.1\n"),
                                (("--http1.0",), "Hello from FaaS handler!\nGET / HTTP/1.0\n")):
            self.assertEqual(support.curl(*arguments, f"http://{self.address}/"), body)
        self.assertIn("X-FaaS-Container: ", support.curl("--head", f"http://{self.address}/"))
        self.daemon.wait_idle("f")
        log = self.daemon.faas("logs", "f", "-n", "4").stdout
        self.assertEqual(log.count("outcome=answered"), 4)
        self.assertEqual(log.count("exit=0"), 4)

    def test_clients_that_leave(self):
        for data in (b"G", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100):
            with socket.create_connection((self.address, 80), timeout=support.READY_SECONDS) as client:
                client.sendall(data)
        self.daemon.wait_idle("f")
        log = self.daemon.faas("logs", "f").stdout
        self.assertNotIn("Traceback", log)


SHELL_SCRIPT = """#!/bin/sh
# a comment needs no perl
read name
printf 'HTTP/1.0 200 OK\\r\\n\\r\\n'
echo "Hello, $name" | tr a-z A-Z
zcat packed 2>&1
"""
PERL_SCRIPT = """#!/usr/bin/env perl
use strict; use warnings; use POSIX qw(strtol);
my ($number) = strtol(scalar(<STDIN>), 16);
print "$number\\n";
"""


class Script(unittest.TestCase):
    """A script in any language, with the programs that it names, for --contract stdio."""

    def setUp(self):
        self.directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, self.directory)

    def pack(self, name: str, text: str, *options: str) -> subprocess.CompletedProcess:
        (self.directory / name).write_text(text)
        return subprocess.run([PYTHON, support.TOP / "faas", "pack", self.directory / name, *options],
                              capture_output=True, check=False)

    def test_programs_of_scripts(self):
        """zcat is a script itself, on most machines, and runs gzip."""
        with support.Daemon() as daemon:
            for name, script, sent, answer in (
                    ("f0", SHELL_SCRIPT, b"you\n", rb"HTTP/1.0 200 OK\r\n\r\nHELLO, YOU\n.*packed.*"),
                    ("f1", "#!/usr/bin/env -S bash -e\nread\necho ${BASH_VERSION:0:1} $0\n", b"\n",
                     rb"[5-9] /f1.txt\n"),
                    ("f2", PERL_SCRIPT, b"ff\n", rb"255\n")):
                packed = self.pack(f"{name}.txt", script)
                self.assertEqual((packed.returncode, packed.stderr), (0, b""))
                out = daemon.faas("new", name, "--contract", "stdio", stdin=packed.stdout).stdout
                address = out.split()[4]
                self.assertEqual(out, f"✓ Deployed {name} at {address} (stdio)\n")
                with connect(address, sent) as client:
                    received = b"".join(iter(lambda: client.recv(1000), b""))
                self.assertRegex(received, rb"(?s)\A%b\Z" % answer)
                self.assertFalse(list(daemon.rootfs(name).glob("usr/bin/perl*")) if name == "f0" else [])

    def test_nothing_is_written_above_the_image(self):
        """A script may name a program by a path that leads out of the directory in which the image is put together."""
        place, elsewhere = self.directory / "place", self.directory / "elsewhere"
        place.mkdir()
        elsewhere.mkdir()
        (elsewhere / "program").write_text(f"#!/bin/sh\n/../..{elsewhere}/program\n")
        (elsewhere / "program").chmod(0o755)
        (place / str(elsewhere)[1:]).mkdir(parents=True)
        (self.directory / "bad.sh").write_text(f"#!/bin/sh\n/../..{elsewhere}/program\n")
        packed = subprocess.run([PYTHON, support.TOP / "faas", "pack", self.directory / "bad.sh"], capture_output=True,
                                check=False, env={**os.environ, "TMPDIR": str(place)})
        self.assertEqual((packed.returncode, packed.stderr), (0, b""))
        self.assertEqual([path for path in place.rglob("*") if path.is_file()], [])

    def test_tag(self):
        for tag, whole in (("localhost:5000/app", "localhost:5000/app:latest"), ("h.io/a_b/c.d:V1", "h.io/a_b/c.d:V1")):
            with tarfile.open(fileobj=io.BytesIO(self.pack("one.sh", "#!/bin/sh\n", "--tag", tag).stdout)) as archive:
                self.assertEqual(json.load(archive.extractfile("manifest.json"))[0]["RepoTags"], [whole])

    def test_same_bytes(self):
        self.assertEqual(self.pack("one.sh", SHELL_SCRIPT).stdout, self.pack("one.sh", SHELL_SCRIPT).stdout)

    def test_refusals(self):
        for script, words in (("#!/usr/bin/nosuch -x\n", b"names /usr/bin/nosuch, which is not"),
                              ("#!/usr/bin/env nosuch\n", b"names nosuch, which is not"),
                              ("#!/usr/bin/perl\nuse NoSuch::Module;\n", b"NoSuch/Module.pm")):
            result = self.pack("bad.sh", script)
            self.assertEqual((result.returncode, result.stdout), (1, b""))
            self.assertIn(words, result.stderr)
            self.assertRegex(result.stderr, rb"\Afaas: cannot pack [^\n]+\n\Z")


APP = """import http.server, greeting
try:
    import nosuch
except ImportError:
    pass
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        import app                  # by its own name
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{greeting.TEXT} {greeting.__cached__} {app.__file__}".encode())
    def do_POST(self):
        import missing.module
if __name__ == "__main__":
    http.server.HTTPServer(("", 8080), Handler).serve_forever()
"""

WSGI = """
def make(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{__name__} at {environ['PATH_INFO']}".encode()]
"""
SERVING = """
import importlib, sys, wsgiref.simple_server
module, _, name = sys.argv[1].partition(":")
application = getattr(importlib.import_module(module), name)
wsgiref.simple_server.make_server("", int(sys.argv[2]), application).serve_forever()
"""


class Requirements(unittest.TestCase):
    """A Python program that is a server, with what pip installs."""

    def setUp(self):
        if subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0:
            self.skipTest("this Python has no pip")
        self.directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, self.directory)
        (self.directory / "app.py").write_text(APP)

    def pack(self, requirements: str, file: str = "app.py", words=(), **more) -> subprocess.CompletedProcess:
        (self.directory / "requirements.txt").write_text(requirements)
        return subprocess.run([PYTHON, support.TOP / "faas", "pack", self.directory / file, "--requirements",
                               self.directory / "requirements.txt", *words], capture_output=True, check=False,
                              env={**os.environ, "PIP_NO_INDEX": "1"}, **more)

    def wheel(self, name: str, files: dict[str, str]) -> Path:
        """Return a package of one's own: there is no index here to install from."""
        with zipfile.ZipFile(self.directory / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            for path, text in {
                    **files, f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                    f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                    f"{name}-1.0.dist-info/RECORD": ""}.items():
                archive.writestr(path, text)
        return Path(archive.filename)

    def test_application_that_a_server_imports(self):
        """A server of WSGI from a package, which knows the program by a name as gunicorn does."""
        (self.directory / "app.py").write_text(WSGI)
        packed = self.pack(f"{self.wheel('serving', {'serving/__init__.py': '', 'serving/__main__.py': SERVING})}\n",
                           words=("--", "serving", "app:make", "8081"))
        self.assertEqual((packed.returncode, packed.stderr.decode()), (0, ""))
        with support.Daemon() as daemon:
            out = daemon.faas("new", "app", stdin=packed.stdout).stdout
            self.assertEqual(out, "✓ Deployed app at 10.0.0.10 (server, port 8081)\n")
            self.assertEqual(support.get("10.0.0.10", "/x"), (200, "app at /x"))

    def test_server_with_a_package(self):
        wheel = self.wheel("greeting", {"greeting.py": "TEXT = 'Hello from a package'\n",
                                        "other/of_python_2.py": "print 'no'\n"})
        (self.directory / "another's").mkdir()      # of another user, to whom root has gone
        (self.directory / "another's/pip.py").write_text("raise SystemExit('it ran')\n")
        packed = self.pack(f"{wheel}\n", cwd=self.directory / "another's")
        self.assertEqual((packed.returncode, packed.stderr.decode()), (0, (
            f"faas: warning: {self.directory}/app.py imports missing, which the image does not have: list what pip "
            "should install in a file, and give it with --requirements FILE\n")))
        with support.Daemon() as daemon:
            out = daemon.faas("new", "app", stdin=packed.stdout).stdout
            self.assertEqual(out, "✓ Deployed app at 10.0.0.10 (server, port 8080)\n")
            status, body = support.get("10.0.0.10")
            self.assertEqual(status, 200)
            self.assertRegex(body, r"\AHello from a package /packages/__pycache__/greeting\.[\w-]+\.pyc /app\.py\Z")
            self.assertEqual(len(list(daemon.rootfs("app").glob("packages/__pycache__/greeting.*.pyc"))), 1)

    def test_refusals(self):
        (self.directory / "script.sh").write_text("#!/bin/sh\n")
        for file, status, words in (("app.py", 1, b"No matching distribution found for nosuch"),
                                    ("script.sh", 2, b"--requirements and a module after -- are for Python")):
            result = self.pack("nosuch\n", file)
            self.assertEqual((result.returncode, result.stdout), (status, b""))
            self.assertIn(words, result.stderr)
            self.assertRegex(result.stderr, rb"\Afaas: [^\n]+\n\Z")
        for module in ("nosuch", "idlelib", "/packages/bin/x", ""):
            result = self.pack("", words=("--", module))
            self.assertEqual((result.returncode, result.stdout), (1, b""))
            self.assertIn(f"the image has no module '{module}' to run".encode(), result.stderr)


if __name__ == "__main__":
    unittest.main()
