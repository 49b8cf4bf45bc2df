"""--volume: a directory or file of the machine in containers, owned there by the image's user, and what that must not
give away."""

import concurrent.futures
import http.client
import io
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import tarfile
import tempfile
import threading
import time
import unittest
import urllib.parse
from pathlib import Path

import archives
import support
import test_real_servers
from clients import get, request

# An ordinary server that keeps notes in SQLite, and runs what a test sends it. It knows nothing of faasd.
NOTES = b"""
import http.server, os, sqlite3, subprocess, sys, urllib.parse

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kind, _, text = urllib.parse.unquote(self.path[1:]).partition("?")
        try:
            answer = note(text) if kind == "note" else repr(eval(text))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

def note(text):
    with sqlite3.connect("/data/notes.db", timeout=30) as database:
        if text:
            database.execute("CREATE TABLE IF NOT EXISTS notes (text)")
            database.execute("INSERT INTO notes VALUES (?)", [text])
    return repr(sorted(row for row, in database.execute("SELECT text FROM notes")))

def attempt(action):
    try:
        action()
        return "done"
    except OSError as error:
        return error.strerror

http.server.ThreadingHTTPServer(("", 80), Handler).serve_forever()
"""
# A Flask application over SQLite like any other, for Debian's gunicorn.
FLASK = b'''
import sqlite3
from flask import Flask, request

app = Flask(__name__)

def database():
    return sqlite3.connect("/data/notes.db", timeout=60)

@app.post("/")
def write():
    with database() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS notes (text)")
        connection.execute("INSERT INTO notes VALUES (?)", [request.get_data(as_text=True)])
    return "", 201

@app.get("/")
def read():
    connection = database()
    return {"check": connection.execute("PRAGMA integrity_check").fetchall(),
            "rows": [row for row, in connection.execute("SELECT text FROM notes")]}
'''
GUNICORN = ["gunicorn", "--threads", "4", "--bind", "0.0.0.0:8000", "notes:app"]
# What it needs of the image of servers.
FLASK_FILES = (r"\./(bin|lib|lib64|sbin|usr/bin/(gunicorn|python3.*)|usr/lib(/[^/]*-linux-gnu)?/(ld-|lib(c|m|z|sqlite3|"
               r"expat|ssl|crypto|ffi|bz2|lzma|uuid|crypt)[.-]).*|usr/lib64/.*|usr/lib/python3(\.[0-9]+)?(/.*)?)")
NOT_FLASKS = re.compile(r".*/(django|websockets|uvicorn|test|lib2to3|idlelib|ensurepip)(/.*)?")
USER, GROUP = 4321, 5432        # of the machine: whose the data is
NAMED = {"etc/passwd": b"root:x:0:0::/root:\napp:x:1000:1001::/home/app:\n", "file": b"of the image"}


def notes_image(**config) -> bytes:
    layers = [support.python_layer("http.server", "sqlite3"), support.layer({"notes.py": NOTES, **NAMED}),
              archives.layer(archives.symlink("away", "../../../../etc"), archives.symlink("host", "/proc/1/root"))]
    return support.docker_archive(layers, {"Entrypoint": [support.PYTHON, "/notes.py"], "User": "app",
                                           "ExposedPorts": {"80/tcp": {}}, **config})


def flask_layer() -> bytes:
    buffer, wanted = io.BytesIO(), re.compile(FLASK_FILES)
    with tarfile.open(test_real_servers.LAYER) as servers, tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in servers:
            if wanted.fullmatch(entry.name) and not NOT_FLASKS.fullmatch(entry.name):
                tar.addfile(entry, servers.extractfile(entry) if entry.isreg() else None)
    return buffer.getvalue()


def post(address: str, body: bytes) -> int:
    """Return the status. Raises OSError, HTTPException."""
    with request(address, "/", body) as client:
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return answer.status


class Writers:
    """8 clients that write all the time: what they have tried, and what they were told is written."""

    def __init__(self, address: str):
        self.tried: list[str] = []
        self.written: list[str] = []
        self.failed: list[str] = []
        self._address, self._over, self._numbers = address, threading.Event(), itertools.count()
        self._threads = [threading.Thread(target=self._run) for _ in range(8)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            note = f"note{next(self._numbers)}"
            self.tried.append(note)
            try:
                status = post(self._address, note.encode())
            except (OSError, http.client.HTTPException):
                status = 0
                time.sleep(0.05)                # there is no daemon
            (self.written if status == 201 else self.failed).append(note)

    def go_on(self, count: int = 16) -> None:
        until = len(self.written) + count
        support.wait_until(lambda: len(self.written) >= until, "notes are written", 6 * support.READY_SECONDS)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


class Volumes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        cls.daemon.faas("new", "f", "--contract", "server", "--start-timeout", "60", stdin=notes_image())
        cls.address = cls.daemon.faas("ip", "f").stdout.strip()

    def setUp(self):
        self.addCleanup(self.daemon.set, "f", "--volume", "")
        self.data = self.directory()

    def directory(self, owner: int = USER) -> Path:
        path = support.temporary_directory()
        self.addCleanup(subprocess.run, ["rm", "-rf", path], check=True)
        os.chown(path, owner, GROUP if owner else 0)
        return path

    def use(self, *volumes: str) -> None:
        self.daemon.set("f", "--volume", ",".join(map(str, volumes)))

    def ask(self, code: str):
        """Have a container evaluate an expression."""
        body = get(self.address, "/eval?" + urllib.parse.quote(code))[1]
        try:
            return eval(body)       # noqa: S307  what a container of ours says
        except (SyntaxError, NameError):
            return body

    def refuse(self, volume: str, says: str) -> None:
        status, body = self.daemon.api("PATCH", f"/functions/f?{urllib.parse.urlencode({'volume': volume})}")
        self.assertIn(status, (400, 409, 422), (volume, body))
        self.assertIn(says, json.loads(body)["error"])

    def test_owner_of_the_data_is_the_images_user(self):
        (self.data / "mine").write_text("mine")
        os.chown(self.data / "mine", USER, GROUP)
        (self.data / "mine").chmod(0o600)
        (self.data / "roots").write_text("root's")
        (self.data / "roots").chmod(0o600)
        self.use(f"{self.data}:/data")
        self.assertEqual(self.ask("[os.stat('/data/' + name)[4:6] for name in ('', 'mine', 'roots')]"),
                         [(1000, 1001), (1000, 1001), (65534, 65534)])
        self.assertEqual(self.ask("open('/data/mine').read()"), "mine")
        self.assertIn("Permission denied", self.ask("open('/data/roots').read()"))
        self.assertEqual(self.ask("open('/data/new', 'w').write('new')"), 3)
        status = (self.data / "new").stat()
        self.assertEqual((status.st_uid, status.st_gid), (USER, GROUP))
        self.assertEqual(self.daemon.info("f")["options"]["volume"], f"{self.data}:/data")
        # Root of the image may do to the owner's files what its capabilities say, and nothing to root's.
        self.daemon.set("f", "--user", "root")
        self.addCleanup(self.daemon.set, "f", "--user", "")
        self.assertEqual(self.ask("os.stat('/data/mine')[4:6]"), (0, 0))
        self.assertEqual(self.ask("[attempt(lambda: open(path).close()) for path in ('/data/mine', '/data/roots')]"),
                         ["done", "Permission denied"])
        # As PostgreSQL's and Redis' images do. These ids are the function's own on the machine.
        self.assertEqual(self.ask("attempt(lambda: os.chown('/data/new', 999, 999))"), "done")
        first = int(self.ask("open('/proc/self/uid_map').read().split()[1]"))
        self.assertEqual((self.data / "new").stat().st_uid, first + 999)
        self.assertEqual(self.ask("os.stat('/data/new')[4:6]"), (999, 999))

    def test_read_only_and_a_single_file(self):
        (self.data / "config").write_text("1")
        os.chown(self.data / "config", USER, GROUP)
        self.use(f"{self.data}:/made/for/it:ro", f"{self.data}/config:/file", f"{self.data}/config:/new/file:ro")
        self.assertEqual(self.ask("attempt(lambda: open('/made/for/it/x', 'w'))"), "Read-only file system")
        self.assertEqual(self.ask("attempt(lambda: os.unlink('/made/for/it/config'))"), "Read-only file system")
        self.assertEqual(self.ask("attempt(lambda: open('/new/file', 'w'))"), "Read-only file system")
        self.assertEqual(self.ask("[open(path).read() for path in ('/file', '/made/for/it/config', '/new/file')]"),
                         ["1"] * 3)
        self.ask("open('/file', 'w').write('2')")
        self.assertEqual((self.data / "config").read_text(), "2")
        self.refuse(f"{self.data}:/file", "one is a file and the other is not")

    def test_a_program_that_cannot_be_made_to_run_as_the_owner(self):
        self.use(f"{self.data}:/data")
        self.ask("open('/data/x', 'w').close()")
        modes = {
            "chmod": "os.chmod('/data/x', 0o4755)", "setgid": "os.chmod('/data/x', 0o2755)",
            "fchmod": "os.fchmod(os.open('/data/x', os.O_RDWR), 0o6755)",
            "open": "os.open('/data/y', os.O_CREAT | os.O_WRONLY, 0o4755)",
            "tmpfile": "os.open('/data', os.O_TMPFILE | os.O_WRONLY, 0o4755)",
            "mknod": "os.mknod('/data/z', 0o104755)", "device": "os.mknod('/data/d', 0o20666, os.makedev(1, 5))",
            "block": "os.mknod('/data/d', 0o60666, os.makedev(8, 0))",
        }
        for user in ("", "root"):
            self.daemon.set("f", "--user", user, "--cap-add", "ALL")
            outcomes = self.ask(f"[{', '.join(f'attempt(lambda: {action})' for action in modes.values())}]")
            self.assertEqual(dict(zip(modes, outcomes, strict=True)), dict.fromkeys(modes, "Operation not permitted"))
        self.daemon.set("f", "--user", "", "--cap-add", "")
        self.assertEqual(self.ask("attempt(lambda: os.chmod('/data/x', 0o1755))"), "done")
        done = self.daemon.faas("exec", "f", "--", support.PYTHON, "-c", "import os; os.chmod('/data/x', 0o4755)",
                                check=False)
        self.assertIn("Operation not permitted", done.stderr)
        self.assertEqual((self.data / "x").stat().st_mode & 0o7777, 0o1755)
        modes = {path.name: path.stat().st_mode for path in self.data.iterdir()}
        self.assertEqual(modes, {"x": stat.S_IFREG | 0o1755})
        # One that is there from before gives nothing, and neither does a device.
        os.mknod(self.data / "null", 0o20666, os.makedev(1, 3))
        options = self.ask("[line.split()[5] for line in open('/proc/self/mountinfo') if line.split()[4] == '/data']")
        self.assertLessEqual({"nosuid", "nodev"}, set(options[0].split(",")))
        self.assertEqual(self.ask("attempt(lambda: open('/data/null'))"), "Permission denied")

    def test_files_of_root_are_not_its_groups(self):
        (self.data / "secret").write_text("of a group")
        (self.data / "secret").chmod(0o640)
        os.chown(self.data / "secret", 0, GROUP)
        self.use(f"{self.data}/secret:/secret:ro")
        self.assertEqual(self.ask("attempt(lambda: open('/secret').read())"), "Permission denied")
        os.chown(self.data / "secret", USER, 0)
        self.refuse(f"{self.data}/secret:/secret", "it is of root's group")

    def test_what_would_give_the_machine_away(self):
        inside = self.daemon.state_dir / "images"
        for host in ("/", "/etc", "/etc/..", "//proc", "/proc/self/root", "/sys/fs", "/dev/shm", "/run",
                     "/usr", "/var", "/root", "/boot", self.daemon.state_dir, self.daemon.run_dir, inside,
                     self.daemon.directory, tempfile.gettempdir()):
            self.refuse(f"{host}:/data:ro", "would give this machine away" if Path(host).exists() else "not there")
        bound = self.directory()
        subprocess.run(["mount", "--bind", self.daemon.state_dir, bound], check=True)
        self.addCleanup(subprocess.run, ["umount", bound], check=True)
        for host in (bound, bound / "images"):
            self.refuse(f"{host}:/data:ro", "would give this machine away")
        roots = self.directory(owner=0)
        self.refuse(f"{roots}:/data", "it is root's")
        self.refuse(f"{self.data}/none:/data", "it does not exist on this machine: create it first")
        self.refuse(f"{self.data}/pipe:/data", "it does not exist")
        os.mkfifo(self.data / "pipe")
        self.refuse(f"{self.data}/pipe:/data", "neither a directory nor a file")
        for text in ("data:/data", "/srv", f"{self.data}:data", f"{self.data}:/data:rx", f"{self.data}:/a:/b"):
            self.refuse(text, "write HOST:PATH or HOST:PATH:ro, both absolute")
        for path in ("/", "/proc", "/proc/x", "/sys", "/dev/shm", "/control.sock", "/run", "/run/secrets/x", "/etc",
                     "/host/etc", "/away"):
            self.refuse(f"{self.data}:{path}", "in each other's way")
        self.refuse(f"{self.data}:/data,{self.data}:/data/in", "lies in another volume")
        self.refuse(f"{self.data}:/file/below", "is a file of the image")
        # This one by the command, which says it in one line.
        result = self.daemon.faas("set", "f", "--volume", f"{self.data}:/data", "--workdir", "/data/work", check=False)
        self.assertEqual((result.returncode, result.stdout, len(result.stderr.splitlines())), (1, "", 1))
        self.assertIn("lies in the volume /data", result.stderr)
        self.assertEqual(self.daemon.info("f")["options"]["volume"], "")

    def test_links(self):
        """A link of the image leads nowhere but into its own root; one of the machine's is followed once."""
        self.use(f"{self.data}:/away/x")
        self.ask("open('/etc/x/new', 'w').close()")
        self.assertEqual(os.listdir(self.data), ["new"])
        self.assertFalse(Path("/etc/x").exists())
        link = self.directory(owner=0) / "link"
        link.symlink_to(self.data)
        self.use(f"{link}:/data")
        self.assertEqual(self.daemon.info("f")["options"]["volume"], f"{self.data}:/data")
        foreign = self.directory(owner=0) / "foreign"
        foreign.symlink_to(self.data)
        os.chown(foreign, USER, USER, follow_symlinks=False)
        self.refuse(f"{foreign}:/data", "another user's")

    def test_exchanged_for_something_else(self):
        """What root mounts is what is there when a container starts, which is looked at once more."""
        holder = self.directory()
        data = holder / "data"
        data.mkdir()
        os.chown(data, USER, GROUP)
        self.use(f"{data}:/data")
        self.assertEqual(self.ask("os.listdir('/data')"), [])
        data.rmdir()
        for what, exchange, says in (
                ("a link", lambda: data.symlink_to("/etc"), "it is neither a directory nor a file"),
                ("nothing", lambda: data.unlink(), "it does not exist"),
                ("the machine", lambda: (data.mkdir(), subprocess.run(["mount", "--bind", "/etc", data], check=True)),
                 "that would give this machine away"),
                ("root's", lambda: subprocess.run(["umount", data], check=True), "it is root's")):
            exchange()
            with self.subTest(what):
                self.refuse_client(says)
        holder.rename(holder.with_name(f"{holder.name}.moved"))
        holder.symlink_to(f"{holder.name}.moved")
        self.addCleanup(subprocess.run, ["rm", "-rf", f"{holder}.moved"], check=True)
        self.refuse_client("there is a symbolic link on the way")

    def refuse_client(self, says: str) -> None:
        """A client is told what is wrong, and not what the machine's directories are called."""
        status, body = get(self.address, "/eval?1")
        self.assertEqual(status, 503, body)
        self.assertIn(f"volume /data: {says}", body)
        self.assertNotIn(support.PREFIX, body)

    def test_file_system_without_idmapped_mounts(self):
        """overlayfs knows none. The version before goes on."""
        parts = {name: self.directory() for name in ("lowerdir", "upperdir", "workdir")}
        options = ",".join(f"{key}={path}" for key, path in parts.items())
        subprocess.run(["mount", "-t", "overlay", "-o", options, "test", self.data], check=True)
        self.addCleanup(subprocess.run, ["umount", self.data], check=True)
        os.chown(self.data, USER, GROUP)
        self.refuse(f"{self.data}:/data", "its file system cannot show files as another user's")
        self.assertEqual(self.ask("1 + 1"), 2)

    def test_rows_of_flask_stay(self):
        """Debian's Flask and gunicorn, unmodified, while 8 clients write and everything is replaced and killed."""
        if not test_real_servers.LAYER.exists():
            self.skipTest(f"no {test_real_servers.LAYER}; tests/ci/servers_image.sh makes it")
        layers = [flask_layer(), support.layer({"srv/notes.py": FLASK})]

        def image(label: str) -> bytes:
            return support.docker_archive(layers, {
                "Entrypoint": GUNICORN, "User": "1000:1001", "WorkingDir": "/srv", "Labels": {"label": label},
                "Env": ["PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"]})
        words = ("--volume", f"{self.data}:/data", "--reuse", "8", "--share", "4", "--queue", "64")
        address = self.daemon.deploy("flask", image("1"), "--start-timeout", "60", *words)
        self.addCleanup(self.daemon.remove, "flask")
        writers = Writers(address)
        self.addCleanup(writers.end)
        writers.go_on()
        self.daemon.faas("new", "flask", stdin=image("2"))
        writers.go_on()
        self.assertEqual(writers.failed, [])            # until here
        self.daemon.stop(signal.SIGHUP)
        self.daemon.start()
        writers.go_on()
        self.daemon.kill()
        self.daemon.start()
        writers.go_on()
        for container in support.list_containers(self.daemon):
            subprocess.run([support.RUNTIME, "--root", self.daemon.run_dir / "runc", "kill", container, "KILL"],
                           capture_output=True, check=False)            # it may have ended by itself
        writers.go_on()
        writers.end()

        def read(place: str) -> dict:
            return json.loads(get(place, "/")[1])
        answer = read(address)
        self.assertEqual(answer["check"], [["ok"]])
        self.assertEqual(len(answer["rows"]), len(set(answer["rows"])))
        self.assertLessEqual(set(writers.written), set(answer["rows"]))
        self.assertLessEqual(set(answer["rows"]), set(writers.tried))
        self.daemon.set("flask", "--volume", f"{self.data}:/data:ro")
        self.assertEqual([post(address, b"more"), read(address)], [500, answer])
        self.assertIn("attempt to write a readonly database", self.daemon.function_log("flask"))
        # Another function, and this one without its volume, see nothing of it.
        self.daemon.set("flask", "--volume", "")
        self.assertEqual(get(address, "/")[0], 500)
        self.daemon.faas("rollback", "flask")
        self.assertEqual(read(address), answer)

    def test_rows_stay(self):
        """Over containers, redeploys, restarts and kill -9, with 8 writers at a time."""
        notes: list[str] = []
        self.use(f"{self.data}:/data")

        def write(count: int) -> None:
            new = [f"note{number}" for number in range(len(notes), len(notes) + count)]
            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                for status, body in threads.map(lambda note: get(self.address, f"/note?{note}"), new):
                    self.assertEqual(status, 200, body)
                    self.assertIn("note", body)
            notes.extend(new)

        def kept() -> list[str]:
            return json.loads(get(self.address, "/note?")[1].replace("'", '"'))
        write(8)
        self.daemon.faas("new", "f", "--contract", "server", "--volume", f"{self.data}:/data",
                         stdin=notes_image(Labels={"n": "2"}))
        write(8)
        self.daemon.stop(signal.SIGHUP)
        self.daemon.start()
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            during = [threads.submit(get, self.address, f"/note?lost{number}") for number in range(8)]
            concurrent.futures.wait(during, timeout=0.5)
            self.daemon.kill()
            self.daemon.start()
            concurrent.futures.wait(during)
        write(8)
        rows = kept()
        self.assertEqual(sorted(row for row in rows if row.startswith("note")), sorted(notes))
        answered = {number for number, ask in enumerate(during) if not ask.exception() and ask.result()[0] == 200}
        self.assertLessEqual({f"lost{number}" for number in answered}, set(rows))
        self.assertEqual(self.ask("subprocess and sqlite3.connect('/data/notes.db').execute("
                                  "'PRAGMA integrity_check').fetchall()"), [("ok",)])
        # Another function, and this one without its volume, see nothing of it.
        other = self.daemon.deploy("other", notes_image(Labels={"n": "3"}), "--contract", "server")
        self.addCleanup(self.daemon.remove, "other")
        self.assertIn("FileNotFoundError", get(other, "/eval?os.listdir('/data')")[1])
        self.use("")
        self.assertIn("FileNotFoundError", self.ask("os.listdir('/data')"))
        self.daemon.faas("rollback", "f")
        self.assertEqual(len(kept()), len(rows))


if __name__ == "__main__":
    unittest.main()
