"""Builds layers and image archives in memory, well-formed and hostile, and looks at what became of them.

Tar entries are written by hand, since tarfile refuses to write most of what an attacker would. An entry is the bytes of
its headers and its data; a layer is the entries one after the other and an end marker. Names are bytes or str, paths in
expected trees are str (with surrogateescape).
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import faasd
import support

BLOCK = 512
END = bytes(2 * BLOCK)
MTIME = 1_600_000_000                   # of every entry that does not say otherwise
HOST = faasd.host_architecture()
FOREIGN = "s390x" if HOST != "s390x" else "amd64"

# Stands for the host: what an attack through an absolute path would touch. Known before any test runs, so that tables
# can name it; on the file system of the rootfs, so that a hard link would succeed.
CANARY = f"/var/tmp/faasd-canary.{os.getpid()}"

MAX_IMAGE_SIZE, MAX_IMAGE_ENTRIES = 16 << 30, 1_000_000         # the daemon's defaults
FIRST_ID = 1 << 20          # the host id that root of an image is, where layers are applied without a child


def owner(status: os.stat_result) -> tuple[int, int]:
    """Return the owner of a file as an image has it."""
    return status.st_uid % FIRST_ID, status.st_gid % FIRST_ID


def as_bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else os.fsencode(text)


# -- entries -----------------------------------------------------------------------------------------------------------

def number(value: int, width: int) -> bytes:
    """A tar number: octal where it fits, else base-256 as GNU tar writes it, which can also be negative."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return bytes([0x80 if value >= 0 else 0xFF]) + (value % (1 << 8 * (width - 1))).to_bytes(width - 1, "big")


def header(name: bytes | str, kind: bytes = b"0", *, size: int = 0, mode: int = 0o644, uid: int = 0, gid: int = 0,
           mtime: int = MTIME, target: bytes | str = b"", device: tuple[int, int] = (0, 0), owner: bytes = b"",
           gnu: bool = False, tail: bytes | None = None, checksum: int | None = None) -> bytes:
    """One 512-byte header with exactly these fields; tail replaces what follows the device numbers."""
    block = b"".join([
        as_bytes(name)[:100].ljust(100, b"\0"), number(mode, 8), number(uid, 8), number(gid, 8), number(size, 12),
        number(mtime, 12), b" " * 8, kind, as_bytes(target)[:100].ljust(100, b"\0"),
        b"ustar  \0" if gnu else b"ustar\x0000", owner.ljust(32, b"\0"), owner.ljust(32, b"\0"),
        number(device[0], 8), number(device[1], 8), (tail or b"").ljust(167, b"\0")])
    if checksum is None:
        checksum = sum(block)
    return block[:148] + b"%06o\0 " % checksum + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def record(key: bytes | str, value: bytes | str) -> bytes:
    """One PAX record, with the length that counts itself."""
    body = b" " + as_bytes(key) + b"=" + as_bytes(value) + b"\n"
    length = len(body)
    while length != len(body) + len(b"%d" % length):
        length = len(body) + len(b"%d" % length)
    return b"%d" % length + body


def pax(records: dict | bytes, kind: bytes = b"x") -> bytes:
    """A PAX extension header (kind g: a global one) for the entry that follows."""
    if isinstance(records, dict):
        records = b"".join(record(key, value) for key, value in records.items())
    return header(b"./PaxHeaders/x", kind, size=len(records)) + padded(records)


def gnu_long(text: bytes | str, kind: bytes = b"L") -> bytes:
    """A GNU extension header: the entry that follows has this name (kind K: this link target)."""
    return header(b"././@LongLink", kind, size=len(as_bytes(text)) + 1, gnu=True) + padded(as_bytes(text) + b"\0")


def entry(name: bytes | str, kind: bytes = b"0", data: bytes = b"", *, records: dict | None = None, **fields) -> bytes:
    """An entry with its data. Long names and targets, and whatever is in records, go into a PAX header."""
    records = dict(records or {})
    if len(as_bytes(name)) > 100:
        records.setdefault("path", name)
    if len(as_bytes(fields.get("target", b""))) > 100:
        records.setdefault("linkpath", fields["target"])
    fields.setdefault("size", len(data))
    return (pax(records) if records else b"") + header(name, kind, **fields) + padded(data)


def file(name, data: bytes | str = b"", **fields) -> bytes:
    return entry(name, b"0", as_bytes(data), **fields)


def directory(name, **fields) -> bytes:
    fields.setdefault("mode", 0o755)
    return entry(name, b"5", **fields)


def symlink(name, target, **fields) -> bytes:
    fields.setdefault("mode", 0o777)
    return entry(name, b"2", target=target, **fields)


def hardlink(name, target, **fields) -> bytes:
    return entry(name, b"1", target=target, **fields)


def fifo(name, **fields) -> bytes:
    return entry(name, b"6", **fields)


def device(name, kind: bytes, major: int, minor: int, **fields) -> bytes:
    return entry(name, kind, device=(major, minor), **fields)


def whiteout(path: str) -> bytes:
    """The marker that removes path of the layers below."""
    parent, _, name = path.rpartition("/")
    return file(f"{parent}/.wh.{name}" if parent else f".wh.{name}")


def opaque(path: str = "") -> bytes:
    """The marker that hides everything the layers below have in path."""
    return file(f"{path}/.wh..wh..opq" if path else ".wh..wh..opq")


def layer(*entries: bytes) -> bytes:
    return b"".join(entries) + END


def sparse_gnu(name, size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    """A sparse file as `tar --format=gnu --sparse` writes it: type S, the map in the header and in extension blocks."""
    spans = b"".join(number(at, 12) + number(len(data), 12) for at, data in pieces)
    first, rest = spans[:96], spans[96:]
    tail = bytes(12 + 12 + 12 + 4 + 1) + first.ljust(96, b"\0") + bytes([bool(rest)]) + number(size, 12)
    blocks = []
    while rest:
        block, rest = rest[:504], rest[504:]
        blocks.append((block.ljust(504, b"\0") + bytes([bool(rest)])).ljust(BLOCK, b"\0"))
    stored = b"".join(data for _, data in pieces)
    return header(name, b"S", size=len(stored), gnu=True, tail=tail) + b"".join(blocks) + padded(stored)


def sparse_pax(name, size: int, pieces: list[tuple[int, bytes]], version: str) -> bytes:
    """A sparse file as `tar --format=pax --sparse-version=…` writes it."""
    stored = b"".join(data for _, data in pieces)
    spans = [(at, len(data)) for at, data in pieces]
    if version == "1.0":
        numbers = [len(spans), *(value for span in spans for value in span)]
        stored = padded("".join(f"{value}\n" for value in numbers).encode()) + stored
        records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
                   "GNU.sparse.realsize": str(size)}
        return pax(records) + header(b"GNUSparseFile.0/x", size=len(stored)) + padded(stored)
    text = record("GNU.sparse.size", str(size)) + record("GNU.sparse.numblocks", str(len(spans)))
    if version == "0.1":
        text += record("GNU.sparse.name", name)
        text += record("GNU.sparse.map", ",".join(str(value) for span in spans for value in span))
    else:
        for at, count in spans:
            text += record("GNU.sparse.offset", str(at)) + record("GNU.sparse.numbytes", str(count))
    return pax(text) + header(name, size=len(stored)) + padded(stored)


# -- compression -------------------------------------------------------------------------------------------------------

def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def gz_members(data: bytes, count: int = 3) -> bytes:
    """Several gzip members in a row, as pigz, stargz and `cat a.gz b.gz` make them."""
    step = len(data) // count + 1
    return b"".join(gz(data[at:at + step]) for at in range(0, len(data), step))


def zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        raise unittest.SkipTest("no zstd program")
    return subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout


# -- images ------------------------------------------------------------------------------------------------------------

def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dumps(document) -> bytes:
    return json.dumps(document).encode()


@dataclass
class Image:
    """An image to be written in any of the archive formats."""
    layers: list[bytes] = field(default_factory=lambda: [layer(file("hello", "hello\n"))])      # uncompressed tars
    process: dict = field(default_factory=lambda: {"Cmd": ["/hello"]})                          # config.config
    tags: tuple[str, ...] = ("app:latest",)
    architecture: str = HOST
    changes: dict = field(default_factory=dict)         # of the config's top level

    @property
    def config(self) -> bytes:
        return dumps({"architecture": self.architecture, "os": "linux", "config": self.process,
                      "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(data)}" for data in self.layers]},
                      **self.changes})

    @property
    def digest(self) -> str:
        return f"sha256:{sha256(self.config)}"


def outer(*members: tuple[str, bytes] | bytes, prefix: str = "") -> bytes:
    """The archive around an image: (name, content) pairs, or entries as they are. A name appears once."""
    seen, parts = set(), []
    for member in members:
        if isinstance(member, tuple):
            if member[0] in seen:
                continue
            seen.add(member[0])
            member = file(prefix + member[0], member[1])
        parts.append(member)
    return b"".join(parts) + END


def podman(*images: Image) -> bytes:
    """A docker-archive of podman, skopeo or buildah: <diffid>.tar, a second name as symlink, manifest.json last."""
    members, manifest = [], []
    for image in images:
        names = [f"{sha256(data)}.tar" for data in image.layers]
        members += zip(names, image.layers, strict=True)
        members += [symlink(f"{sha256(name.encode())}/layer.tar", f"../{name}") for name in dict.fromkeys(names)]
        config = f"{sha256(image.config)}.json"
        members.append((config, image.config))
        manifest.append({"Config": config, "RepoTags": list(image.tags), "Layers": names})
    return outer(*members, ("manifest.json", dumps(manifest)))


def docker_old(*images: Image) -> bytes:
    """docker save before 25: a directory per layer, repeated layers as symbolic links, `repositories`."""
    members, manifest = [], []
    for number_, image in enumerate(images):
        names, first = [], {}
        for at, data in enumerate(image.layers):
            identity = sha256(f"{number_} {at}".encode() + data)
            members += [directory(f"{identity}/"), (f"{identity}/VERSION", b"1.0"), (f"{identity}/json", b"{}")]
            members.append(symlink(f"{identity}/layer.tar", f"../{first[data]}/layer.tar") if data in first
                           else (f"{identity}/layer.tar", data))
            first.setdefault(data, identity)
            names.append(f"{identity}/layer.tar")
        config = f"{sha256(image.config)}.json"
        members.append((config, image.config))
        manifest.append({"Config": config, "RepoTags": list(image.tags) or None, "Layers": names})
    return outer(*members, ("manifest.json", dumps(manifest)), ("repositories", b"{}"))


def descriptor(data: bytes, kind: str = "manifest", **more) -> dict:
    return {"mediaType": f"application/vnd.oci.image.{kind}.v1+json", "digest": f"sha256:{sha256(data)}",
            "size": len(data), **more}


def blob(data: bytes) -> tuple[str, bytes]:
    return f"blobs/sha256/{sha256(data)}", data


def oci_manifest(image: Image, compress=lambda data: data) -> tuple[bytes, list[tuple[str, bytes]]]:
    """An image's OCI manifest and the members that belong to it."""
    layers = [compress(data) for data in image.layers]
    manifest = dumps({"schemaVersion": 2, "config": descriptor(image.config, "config"),
                      "layers": [descriptor(data, "layer") for data in layers]})
    return manifest, [*map(blob, layers), blob(image.config), blob(manifest)]


def tagged(tag: str) -> dict:
    return {"org.opencontainers.image.ref.name": tag}


def oci(*images: Image, compress=lambda data: data, prefix: str = "") -> bytes:
    """An OCI layout in a tar, as skopeo, podman, buildah and umoci make it."""
    members, descriptors = [("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')], []
    for image in images:
        manifest, more = oci_manifest(image, compress)
        members += more
        descriptors += [descriptor(manifest, annotations=tagged(tag)) for tag in image.tags] or [descriptor(manifest)]
    return outer(*members, ("index.json", dumps({"schemaVersion": 2, "manifests": descriptors})), prefix=prefix)


def docker_new(image: Image, compress=lambda data: data) -> bytes:
    """docker save from 25 on: an OCI layout with a manifest.json that names its blobs."""
    manifest, members = oci_manifest(image, compress)
    index = dumps({"schemaVersion": 2, "manifests": [descriptor(manifest, annotations=tagged("latest"))]})
    entry_ = {"Config": f"blobs/sha256/{sha256(image.config)}", "RepoTags": list(image.tags),
              "Layers": [f"blobs/sha256/{sha256(compress(data))}" for data in image.layers]}
    return outer(directory("blobs/"), directory("blobs/sha256/"), *members, ("index.json", index),
                 ("manifest.json", dumps([entry_])), ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'))


def attestation() -> dict:
    """A descriptor of buildx's provenance, whose blob `docker save` leaves out."""
    return descriptor(b"not in the archive", platform={"os": "unknown", "architecture": "unknown"},
                      annotations={"vnd.docker.reference.type": "attestation-manifest"})


def containerd(image: Image, with_manifest_json: bool = True) -> bytes:
    """docker save of the containerd store: gzip layers, an index in the index, and blobs that are not there."""
    manifest, members = oci_manifest(image, gz)
    inner = dumps({"schemaVersion": 2, "manifests": [
        descriptor(b"another platform", platform={"os": "linux", "architecture": FOREIGN}),
        descriptor(manifest, platform={"os": "linux", "architecture": HOST}), attestation()]})
    annotations = {"io.containerd.image.name": f"docker.io/library/{image.tags[0]}", **tagged("latest")}
    index = dumps({"schemaVersion": 2, "manifests": [descriptor(inner, "index", annotations=annotations)]})
    members += [blob(inner), ("index.json", index), ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')]
    if with_manifest_json:
        members.append(("manifest.json", dumps([{
            "Config": f"blobs/sha256/{sha256(image.config)}", "RepoTags": list(image.tags),
            "Layers": [f"blobs/sha256/{sha256(gz(data))}" for data in image.layers]}])))
    return outer(*members)


# -- what is there -----------------------------------------------------------------------------------------------------

def walk(root: str | Path) -> Iterator[str]:
    """All paths below root, never following a link."""
    for directory_, directories, files in os.walk(root):
        for name in sorted(directories + files):
            yield os.path.join(directory_, name)


def describe(path: str) -> str:
    """A file's type and content on one line: `file hello`, `link target`, `dir`, `fifo`, `char 1:3`."""
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        return f"file {os.fsdecode(Path(path).read_bytes())}"
    if kind == stat.S_IFLNK:
        return f"link {os.readlink(path)}"
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        word = "char" if kind == stat.S_IFCHR else "block"
        return f"{word} {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return {stat.S_IFDIR: "dir", stat.S_IFIFO: "fifo"}[kind]


def tree(root: str | Path) -> dict[str, str]:
    """Everything below root: path → description."""
    return {os.path.relpath(path, root): describe(path) for path in walk(root)}


def xattrs(path: str | Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)}


def full_tree(root: str | Path) -> dict[str, tuple]:
    """The same with owner, mode, time to the nanosecond, extended attributes and link count; content as a digest."""
    found = {}
    for path in [str(root), *walk(root)]:
        status = os.lstat(path)
        what = describe(path)
        if len(what) > 200:
            what = sha256(os.fsencode(what))
        links = status.st_nlink if not stat.S_ISDIR(status.st_mode) else 0
        found[os.path.relpath(path, root)] = (what, oct(status.st_mode), *owner(status), links,
                                              status.st_mtime_ns, tuple(sorted(xattrs(path).items())))
    return found


def snapshot(root: str | Path) -> dict[str, tuple]:
    """The same with inode numbers and change times, so that no touch goes unnoticed."""
    return {path: (*what, os.lstat(os.path.join(root, path)).st_ino, os.lstat(os.path.join(root, path)).st_ctime_ns)
            for path, what in full_tree(root).items()}


# -- running it --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Refused:
    """What an archive is expected to be answered with."""
    status: int
    pattern: str
    tree: dict | None = None            # what is in the rootfs then, where that matters


def apply_layers(path: Path, layers: Iterable[bytes], losses: faasd.Losses, max_size: int = MAX_IMAGE_SIZE,
                 max_entries: int = MAX_IMAGE_ENTRIES) -> faasd.Budget:
    """Apply layers as unpack_image does, and return what they used."""
    budget = faasd.Budget(max_size, max_entries)
    rootfs = faasd.Rootfs(path, FIRST_ID, budget)
    for data in layers:
        wanted = faasd.Layer("test", sha256(data), None)
        with contextlib.closing(faasd.LayerStream(wanted, iter([data]), budget)) as stream:
            faasd.LayerApplier(stream, rootfs, budget, losses).apply()
            stream.verify()
    return budget


# Runs a command and writes its peak of resident memory. A process of its own, because a child inherits the peak of whom
# it was forked from, and a test that has made a bomb is large.
WATCH = """
import os, resource, subprocess, sys
status = subprocess.call([str(os.getpid()) if word == "PARENT" else word for word in sys.argv[2:]])
with open(sys.argv[1], "w") as out:
    out.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status % 256)
"""


@dataclass
class Child:
    """How the unpacking child ended."""
    returncode: int
    stdout: str
    stderr: str
    peak: int                           # bytes of resident memory

    @property
    def document(self) -> dict:
        return json.loads(self.stdout)


class Sandbox(unittest.TestCase):
    """A private directory per test, with the host's stand-in beside it.

    Any test fails if the canary has changed, or if something appeared beside the image's directory.
    """

    maxDiff = None

    def setUp(self):
        if os.geteuid() != 0:
            self.skipTest("not root")
        self.directory = Path(tempfile.mkdtemp(prefix="faasd-test.", dir="/var/tmp"))
        self.addCleanup(self._remove)
        self.rootfs = self.directory / "rootfs"
        self.image = self.directory / "image"
        self._make_canary()
        previous = os.umask(0o022)
        self.addCleanup(os.umask, previous)

    def _remove(self):
        subprocess.run(["rm", "-rf", "--one-file-system", self.directory, CANARY], check=True)

    def _make_canary(self):
        canary = Path(CANARY)
        canary.mkdir(mode=0o750)
        (canary / "file").write_text("host\n")
        (canary / "file").chmod(0o4640)
        (canary / "dir").mkdir()
        (canary / "dir/inside").write_text("host\n")
        (canary / "link").symlink_to("dir")
        os.mkfifo(canary / "fifo")
        os.setxattr(canary / "dir", "trusted.canary", b"host")
        for path in [*walk(canary), CANARY]:
            os.utime(path, ns=(10**18 + 7, 10**18 + 7), follow_symlinks=False)
        self._before = snapshot(canary)
        self._outside = {os.path.relpath(path, self.directory) for path in walk(self.directory)}

    def assert_host_unchanged(self):
        self.assertEqual(snapshot(CANARY), self._before, "the host was touched")

    def assert_clear(self, error: BaseException | str):
        """One printable line of bearable length: it ends on somebody's terminal."""
        text = str(error)
        self.assertTrue(text)
        self.assertTrue(text.isprintable(), f"control characters in {text!r}")
        self.assertLess(len(text), 1000, text[:200])

    @contextlib.contextmanager
    def refused(self, status: int, pattern: str):
        """Expect a FaasdError of that status; the message must match pattern."""
        with self.assertRaisesRegex(faasd.FaasdError, pattern) as caught:
            yield
        self.assert_clear(caught.exception)
        self.assertEqual(caught.exception.status, status, caught.exception)

    def apply(self, *layers: bytes, **limits) -> Path:
        """Apply layers to a new rootfs; the host must be as before, however that ends."""
        self.rootfs.mkdir(exist_ok=True)
        losses = faasd.Losses()
        try:
            self.budget = apply_layers(self.rootfs, layers, losses, **limits)
        finally:
            self.assert_host_unchanged()
        self.losses = losses.lines()
        return self.rootfs

    def write(self, data: bytes, name: str = "archive.tar") -> Path:
        path = self.directory / name
        path.write_bytes(data)
        return path

    def unpack(self, archive: bytes, tag: str = "", max_size: int = MAX_IMAGE_SIZE,
               max_entries: int = MAX_IMAGE_ENTRIES) -> dict:
        """Unpack a whole image in this process, to self.image."""
        subprocess.run(["rm", "-rf", self.image], check=True)
        try:
            return faasd.unpack_image(pieces(io.BytesIO(archive)), self.image, tag, max_size, max_entries, 0)
        finally:
            self.assert_host_unchanged()
            self.assertLessEqual({path.name for path in self.directory.iterdir()}, {"image"})

    def unpack_child(self, archive: bytes | Path, tag: str = "", max_size: int = MAX_IMAGE_SIZE,
                     max_entries: int = MAX_IMAGE_ENTRIES, env: dict | None = None, before: tuple = (),
                     image: Path | None = None, timeout: float = 120, parent: str = "PARENT") -> Child:
        """Run the unpacking child as the daemon does; before is a command to run it under."""
        path = archive if isinstance(archive, Path) else self.write(archive)
        image = image or self.image
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr, \
                tempfile.NamedTemporaryFile("r") as peak, path.open("rb") as source:
            command = [sys.executable, "-c", WATCH, peak.name, *before, sys.executable, "-I", "-S", "-c", faasd.CHILD,
                       "unpack", support.program(), parent, image, tag, str(path.stat().st_size), str(max_size),
                       str(max_entries), "0"]
            child = subprocess.Popen(command, stdin=source, stdout=stdout, stderr=stderr, env=env,
                                     start_new_session=True)
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                self.fail(f"the unpacking child still runs after {timeout:g} s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)        # what it may have left behind, too
                child.wait()
            stdout.seek(0)
            stderr.seek(0)
            self.assert_host_unchanged()
            return Child(child.returncode, stdout.read(), stderr.read(), int(peak.read()) * 1024)

    def assert_child_refused(self, child: Child, status: int, pattern: str):
        """Exit status 1, one JSON document that says why, and nothing on stderr."""
        self.assertEqual((child.returncode, child.stderr), (1, ""), child)
        self.assertEqual(set(child.document), {"error", "status"})
        self.assertRegex(child.document["error"], pattern)
        self.assertEqual(child.document["status"], status, child.document)
        self.assert_clear(child.document["error"])


def save(directory: Path, first_id: int, options: faasd.Options = faasd.Options()) -> bytes:
    """Return the archive that the saving child sends of an unpacked image."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs, tempfile.TemporaryFile() as chosen:
        chosen.write(dumps(options.to_json()))
        chosen.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", faasd.CHILD, "save", support.program(), str(os.getpid()), directory,
             str(first_id), "saved:latest", str(chosen.fileno())],
            stdin=theirs, stdout=subprocess.PIPE, pass_fds=[chosen.fileno()])
        theirs.close()
        response = http.client.HTTPResponse(ours)
        try:
            response.begin()
            data = response.read()
        finally:
            said, _ = child.communicate()
        if said != b"{}\n":
            raise AssertionError(said)
        return data


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """Return what a file holds as unpack_image wants it."""
    return iter(lambda: file.read(faasd.COPY_CHUNK), b"")


def add_cases(test_class: type, cases: list[tuple], run: str) -> None:
    """Make a test method of each case: (name, …) becomes test_NAME, which calls run(self, …)."""
    for name, *case in cases:
        method = base = "test_" + re.sub(r"\W+", "_", name).strip("_")
        for again in range(2, len(cases) + 2):          # names that differ in punctuation only
            if not hasattr(test_class, method):
                break
            method = f"{base}_{again}"

        def test(self, case=case):
            getattr(self, run)(*case)

        test.__name__, test.__doc__, test.__qualname__ = method, name, f"{test_class.__name__}.{method}"
        setattr(test_class, method, test)


# A capability set as setcap(8) writes it: cap_net_bind_service=ep, revision 2.
CAPABILITY = base64.b64decode("AQAAAgAEAAAAAAAAAAAAAAAAAAA=")
