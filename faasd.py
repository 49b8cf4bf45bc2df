#!/usr/bin/env python3
"""faasd: a serverless runtime for one Linux machine, in one process and one file.

An image is unpacked once into a plain directory. A function is an image, an address on `lo` and a few limits.
Every TCP connection accepted on that address is one invocation: it gets a container of its own, started by
`runc run`, and the accepted socket itself travels to the handler over /control.sock with SCM_RIGHTS. From then on
client and handler talk kernel to kernel; faasd neither parses nor copies a byte of it.

    client            faasd                                 container (runc: own pid, mount, net, ipc, uts, cgroup)
      |  connect        |                                      |
      |---------------->| accept                               |
      |                 | mkdir RUN_DIR/containers/ID          |
      |                 | listen control.sock ---- runc run -->| handler boots
      |                 |<------------ connect /control.sock --| "ready"
      |                 |--- sendmsg(SCM_RIGHTS: the socket) ->|
      |<===================== request and answer =============>|
      |                 |<--- end of file on control.sock -----| exits
      |<----- FIN ------| close our duplicate; reap runc; rmdir RUN_DIR/containers/ID

One invocation, in the names used below:
    Function._accept       accept from a listener with TCP_DEFER_ACCEPT
    Function._invoke       wait for one of as many start slots as there are CPUs
    Container.start        private directory, config.json, control.sock, runc run, wait for the connect
    Container.hand_over    one sendmsg with one descriptor
    Container.handled      end of file (or a READY byte) on the control connection, or runc's exit
    Function._conclude     no byte sent (TCP_INFO)? then 502 or 504 on the duplicate that faasd kept
    Container.finish       the container exits or is killed, runc removes its cgroups, faasd its directory

Process and threads: one asyncio loop in the main thread owns listeners, containers, functions and the registry, so
there are no locks around them. The control API is a stdlib http.server on a Unix socket, one thread a request, which
calls into the loop with run_coroutine_threadsafe. Images are unpacked by a child process (`faasd.py unpack …`): it
is heavy, must not delay an invocation, and is where hostile bytes are parsed.

On disk:
    STATE_DIR/registry.json                   functions and their addresses
    STATE_DIR/images/NAME/VERSION/rootfs/     the unpacked image; VERSION = first 12 hex digits of its digest
    STATE_DIR/images/NAME/VERSION/image.json  what the image says about the process to run
    STATE_DIR/logs/NAME.log, NAME.log.1       output of the handlers and a line per invocation
    STATE_DIR/tmp/                            uploads and unpacking; emptied at start
    RUN_DIR/faasd.sock, faasd.lock            control API; one daemon per run-dir
    RUN_DIR/containers/ID/                    config.json and control.sock of one container, on a tmpfs
    RUN_DIR/runc/                             runc --root

Trusted: this host, and whoever may open faasd.sock (that is root on this box). Not trusted: images, handlers and
clients. Not done here: TLS, HTTP, load balancing, more than one machine.

The sections follow a function's way through the daemon: image archive, layers, process config, OCI bundle, network,
container, function, registry, logs, control API, daemon and main.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import grp
import hashlib
import http.server
import ipaddress
import json
import logging
import os
import platform
import posixpath
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import BinaryIO

__version__ = "0.1.0"

log = logging.getLogger("faasd")

# ---------------------------------------------------------------------------------------------------------------------
# Constants and errors
# ---------------------------------------------------------------------------------------------------------------------

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Images. A flag exists where a user may need another value; see parse_arguments.
MAX_IMAGE_SIZE = 16 * GIB           # bytes of an archive, of its layers uncompressed, of their files (--max-image-size)
MAX_IMAGE_ENTRIES = 1_000_000       # entries of all layers together (--max-image-entries)
MAX_ARCHIVE_MEMBERS = 100_000       # members of the outer archive
MAX_JSON_SIZE = 4 * MIB             # one manifest, index or config; the OCI distribution spec asks for 4 MiB
MAX_RECORD_SIZE = MIB               # all headers of one tar entry: PAX records, long names, sparse maps
MAX_DIGITS = 1024                   # in a row, within such headers; no name or number has as many
MAX_LINK_HOPS = 40                  # symbolic links followed for one path, as the kernel does (path_resolution(7))
MAX_INDEX_DEPTH = 4                 # OCI indexes inside indexes
MAX_PATH_DEPTH = 256                # directories above an entry; keeps recursive removal far from its limits
MAX_NAME_LENGTH = 255               # bytes of one component (NAME_MAX)
MAX_PATH_LENGTH = 3072              # bytes of a path in an image config: PATH_MAX less what the rootfs is below
MAX_ACCOUNTS_SIZE = MIB             # /etc/passwd and /etc/group of an image
UNPACK_ADDRESS_SPACE = GIB          # bytes; RLIMIT_AS of the unpacking child, whatever a parser is talked into
COPY_CHUNK = 256 * KIB              # bytes read or written at a time

# Containers.
CONTROL_SOCKET = "/control.sock"
MIN_MEMORY = 6 * MIB                # bytes; Docker's minimum too: runc's own init runs inside the limit
CPU_PERIOD = 100_000                # microseconds (cgroup cpu controller)
TMP_SIZE, SHM_SIZE, DEV_SIZE, VOLUME_SIZE = "64m", "64m", "1m", "64m"      # tmpfs(5) size=
CONTAINER_NOFILE = 65_536           # RLIMIT_NOFILE inside
EXIT_GRACE = 1.0                    # seconds a handler has between letting go of its client and being killed
KILL_RETRY = 0.02                   # seconds between two rounds of killing one container
KILL_TIMEOUT = 10.0                 # seconds before runc itself is killed and its remains are deleted
COMMAND_TIMEOUT = 30.0              # seconds for ip, mount and runc delete

# Clients.
DEFER_ACCEPT_SECONDS = 15           # TCP_DEFER_ACCEPT; the kernel rounds up to its SYN-ACK retransmissions (tcp(7))
FIRST_BYTE_SECONDS = 30             # for the rare connection that is accepted without data
LINGER_SECONDS = 2.0                # reading what the client still sends after our own 502 or 504
LINGER_BYTES = 16 * MIB             # of it, at most
PEEK_BYTES = 2048                   # of the request, for the log line
ACCEPT_BATCH = 64                   # connections accepted before other events get their turn
ACCEPT_PAUSE = 0.5                  # seconds without accepting when descriptors have run out
TCP_ESTABLISHED, TCP_CLOSE, TCP_CLOSE_WAIT = 1, 7, 8          # include/net/tcp_states.h
TCP_INFO_RECEIVED, TCP_INFO_NOTSENT, TCP_INFO_SENT = 128, 144, 200    # offsets in struct tcp_info (linux/tcp.h)

# Logs.
LOG_FILE_SIZE = 8 * MIB             # NAME.log is renamed to NAME.log.1 above this, so a function keeps at most twice it
MAX_MESSAGE = 600                   # characters of an error message
MAX_LINE = 8 * KIB                  # a longer line of a handler is cut into several
MAX_OUTPUT = MIB                    # bytes of output kept of one container; the rest is read and dropped
TAIL_LINES = 20                     # lines of output shown when a deploy fails

# Network.
ADDRESS_LABEL = "lo:faas"           # how our addresses are told from everybody else's; at most 15 bytes (IFNAMSIZ)
FIRST_HOST = 10                     # the first function's address is .10

# Control API.
MAX_HEADER_SECONDS = 60.0           # socket timeout while a client sends
UPLOAD_END_SECONDS = 5.0            # how long a stop waits for the threads of cut uploads
FOLLOW_SECONDS = 15.0               # how often `logs --follow` looks whether its client is still there

REGISTRY_FORMAT = 1
NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")      # a DNS label (RFC 1123)
DIGEST_PATTERN = re.compile(r"sha256:([0-9a-f]{64})")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386",
                 "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}      # uname -m → GOARCH
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class FaasdError(Exception):
    """Any failure that a user may see: str() is one line that says what is wrong and what to do.

    status is the HTTP status it is answered with, output are lines of a handler that explain it.
    """

    status = 500

    def __init__(self, message: str, output: Iterable[str] = (), status: int | None = None):
        # Names and tags out of an image go into messages: they must not move a cursor, nor fill a screen.
        line = escape_controls(" ".join(message.split()))
        super().__init__(line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "…")
        self.output = list(output)
        if status is not None:
            self.status = status


class UsageError(FaasdError):
    """The daemon cannot start as it was called; exit status 2."""


class BadRequest(FaasdError):
    status = 400


class NotFound(FaasdError):
    status = 404


class Conflict(FaasdError):
    status = 409


class ImageError(FaasdError):
    """The archive is not an image that can run here."""
    status = 400


class LimitExceeded(FaasdError):
    """The image is over a limit; the message names it."""
    status = 413


class DeployFailed(FaasdError):
    """The image unpacked, but its handler did not come up."""
    status = 422


class Stopping(FaasdError):
    status = 503


class StorageFull(FaasdError):
    status = 507


def storage_error(error: OSError, doing: str) -> FaasdError:
    """Return the error a user should see for a failed file operation: 507 where space is what lacks."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{doing}: no space left on the device; free some and try again")
    return FaasdError(f"{doing}: {error.strerror or error}")


def escape_controls(text: str) -> str:
    """Return text with control characters written as escapes, so that no output can forge a log line or move a cursor.

    C0, DEL, C1 and the Unicode line separators go; tab stays.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii") for c in text)


SIZE_UNITS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB}
DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Return the bytes that text names: `64m`, `1g`, `512k`, or plain bytes. Raises BadRequest."""
    match = re.fullmatch(r"([0-9]{1,15})([bkmg]?)b?", text.strip().lower())
    if not match:
        raise BadRequest(f"bad size {text!r}: write 512m, 1g or a number of bytes")
    return int(match[1]) * SIZE_UNITS[match[2]]


def parse_duration(text: str) -> float:
    """Return the seconds that text names: `500ms`, `30s`, `5m`, or plain seconds. Raises BadRequest."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|)", text.strip().lower())
    if not match:
        raise BadRequest(f"bad duration {text!r}: write 500ms, 30s, 5m or a number of seconds")
    return float(match[1]) * DURATION_UNITS[match[2]]


def parse_count(text: str) -> int:
    """Return a whole number from 1 on. Raises BadRequest."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise BadRequest(f"bad number {text!r}: write a whole number from 1 on")
    return int(text)


def parse_cpus(text: str) -> float:
    """Return a number of CPUs such as 0.5 or 2. Raises BadRequest."""
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", text) or float(text) < 0.01:
        raise BadRequest(f"bad number of cpus {text!r}: write 0.5, 1 or 2")
    return float(text)


def check_name(name: str) -> str:
    """Return name if it may be a function's name, else raise BadRequest."""
    if not NAME_PATTERN.fullmatch(name):
        raise BadRequest(f"bad function name {name!r}: use 1 to 63 of a-z, 0-9 and '-', not at either end")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Image archive: which layers, which config. Runs in the unpacking child.
#
# The outer tar is indexed, never extracted: names are keys of a dictionary and touch no file system. The rules, their
# reasons and the CVEs behind them are in UNPACKING.md of the project's contract; the letters below name them.
# ---------------------------------------------------------------------------------------------------------------------


class SpanReader:
    """Bytes offset..offset+size of a file, as a stream that can also seek."""

    def __init__(self, file, offset: int, size: int):
        self._file, self._start, self._size, self._position = file, offset, size, 0

    def read(self, count: int) -> bytes:
        count = min(count, self._size - self._position)
        data = os.pread(self._file.fileno(), count, self._start + self._position) if count > 0 else b""
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position

    def chunks(self) -> Iterator[bytes]:
        while data := self.read(COPY_CHUNK):
            yield data


class TarReader:
    """Iterates over the entries of a tar stream, taking tarfile as a parser and nothing else.

    TarFile itself stops silently at a damaged header, keeps every entry in memory, and loops for ever on a negative
    size (CVE-2025-8194). So the iteration is ours, and TarInfo.fromtarfile, which parses one entry with all its
    extension headers, is shown this object in the place of a TarFile. Everything it reads comes through read(), which
    bounds what the headers of one entry may cost whatever the parser is talked into (rules E.4, E.5).
    """

    encoding, errors = "utf-8", "surrogateescape"       # so that any bytes in a name survive (rule C.5)

    def __init__(self, stream):
        self.fileobj = self
        self.offset = 0                 # of the next header; set by the parser
        self.ended = False              # saw the end-of-archive marker, rather than the end of the data
        self._stream = stream
        self._budget = 0

    @property
    def pax_headers(self) -> dict[str, str]:
        return {}                       # a new one each time: global PAX headers are ignored (rule C.4)

    def read(self, count: int) -> bytes:
        if count < 0:
            raise ImageError("bad tar header: negative size")
        if count > self._budget:
            raise LimitExceeded(f"a tar entry's headers are over {MAX_RECORD_SIZE} bytes (MAX_RECORD_SIZE)")
        self._budget -= count
        data = self._stream.read(count)
        # Until Python 3.12.6 the parser's time is quadratic in the length of a run of digits (CVE-2024-6232).
        if count > tarfile.BLOCKSIZE and max(map(len, re.findall(rb"[0-9]+", data)), default=0) > MAX_DIGITS:
            raise ImageError(f"bad tar header: a run of over {MAX_DIGITS} digits")
        return data

    def tell(self) -> int:
        return self._stream.tell()

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while True:
            self._stream.seek(self.offset)
            self._budget = MAX_RECORD_SIZE
            at = self.offset
            try:
                entry = tarfile.TarInfo.fromtarfile(self)
            except tarfile.EOFHeaderError:
                self.ended = True
                return
            except tarfile.EmptyHeaderError:
                return
            except tarfile.TruncatedHeaderError:
                raise ImageError("the tar stream is cut short in the middle of a header") from None
            except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
                raise ImageError(f"bad tar header at byte {at}: {error}") from None
            if entry.size < 0 or self.offset < self.tell():     # either would lead back, and round for ever
                raise ImageError(f"bad tar header at byte {at}: negative size")
            yield entry


@dataclass(frozen=True)
class Blob:
    """Where a member's bytes lie in the archive."""
    offset: int
    size: int


class Archive:
    """The members of an image archive by name."""

    def __init__(self, file):
        self._file = file
        self._blobs: dict[str, Blob] = {}
        self._links: dict[str, str] = {}        # docker before 25 writes repeated layers as symbolic links (F.1)
        self._top: set[str] = set()             # first components, to recognise what is not an image
        self._scan(os.fstat(file.fileno()).st_size)

    def _scan(self, file_size: int) -> None:
        reader = TarReader(SpanReader(self._file, 0, file_size))
        count = 0
        for count, entry in enumerate(reader, 1):
            if count > MAX_ARCHIVE_MEMBERS:
                raise LimitExceeded(f"the archive has over {MAX_ARCHIVE_MEMBERS} members (MAX_ARCHIVE_MEMBERS)")
            name = self._normalise(entry.name)
            self._top.add(name.split("/")[0])
            if entry.isreg() and entry.sparse is None:
                if entry.offset_data + entry.size > file_size:
                    raise ImageError("the archive is cut short: did the command before the pipe fail?")
                self._blobs[name] = Blob(entry.offset_data, entry.size)
            elif entry.issym() or entry.islnk():
                base = posixpath.dirname(name) if entry.issym() else ""
                self._links[name] = self._normalise(posixpath.join(base, entry.linkname))
        self.complete = reader.ended
        if count == 0:
            raise ImageError("the archive is empty: did the command before the pipe fail?")

    @staticmethod
    def _normalise(name: str) -> str:
        return posixpath.normpath(name).lstrip("/")

    def find(self, name: str) -> Blob | None:
        """Return the blob of that name, following links among the members; None if there is none."""
        name = self._normalise(name)
        for _ in range(MAX_LINK_HOPS):
            if name in self._blobs:
                return self._blobs[name]
            if name not in self._links:
                return None
            name = self._links[name]
        raise ImageError(f"the archive's member {name!r} is a link to itself")

    def open(self, name: str) -> SpanReader:
        """Return a stream of a member's bytes. Raises ImageError if it is missing."""
        blob = self.find(name)
        if blob is None:
            raise ImageError(f"the archive lacks {name!r}" + ("" if self.complete else ": it is cut short"))
        return SpanReader(self._file, blob.offset, blob.size)

    def read_document(self, name: str) -> bytes:
        """Return the bytes of a small member, checked against the digest in its name where it has one (E.2)."""
        blob = self.find(name)
        if blob is not None and blob.size > MAX_JSON_SIZE:
            raise LimitExceeded(f"{name!r} has {blob.size} bytes, over {MAX_JSON_SIZE} (MAX_JSON_SIZE)")
        data = self.open(name).read(MAX_JSON_SIZE)
        match = re.search(r"(?:^|/)([0-9a-f]{64})(?:\.json)?$", name)
        if match and hashlib.sha256(data).hexdigest() != match[1]:
            raise ImageError(f"{name!r} is damaged: its content does not match its digest")
        return data

    def looks_like_root_filesystem(self) -> bool:
        return len(self._top & {"bin", "etc", "usr", "lib", "var", "dev", "proc"}) >= 3


@dataclass(frozen=True)
class Layer:
    """One layer to apply: which member, and what its bytes must hash to."""
    member: str
    diff_id: str                    # sha256 hex of the uncompressed tar
    blob_digest: str | None         # sha256 hex of the member as it is, where the format names it


@dataclass(frozen=True)
class Image:
    """What was chosen from an archive."""
    digest: str                     # sha256 hex of the config: the same for every archive format
    tag: str
    config: dict
    layers: list[Layer]


@dataclass(frozen=True)
class Candidate:
    """One image that the archive offers."""
    tags: tuple[str, ...]
    config: str                     # member name
    layers: tuple[str, ...]         # member names

    @property
    def label(self) -> str:
        return self.tags[0] if self.tags else posixpath.basename(self.config)[:12]


def parse_json(data: bytes, kind: type, what: str):
    """Return a JSON document of that type, else raise ImageError."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(document, kind):
        raise ImageError(f"{what} is not a JSON {'list' if kind is list else 'object'}")
    return document


def take(document: dict, key: str, kind: type, what: str):
    """Return document[key], or an empty kind() where it is null or absent (G.1); ImageError if it is another type."""
    value = document.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ImageError(f"{what}: {key!r} is not a {kind.__name__}")
    return value


def take_strings(document: dict, key: str, what: str) -> list[str]:
    """Return document[key] as a list of strings that a process can be given."""
    values = take(document, key, list, what)
    if not all(isinstance(value, str) for value in values):
        raise ImageError(f"{what}: {key!r} is not a list of strings")
    for value in values:
        encode_text(value, f"{what}: {key!r}")
    return values


def encode_text(text: str, what: str) -> bytes:
    """Return a string of a JSON document as UTF-8. Raises ImageError for one that no system call takes."""
    try:
        data = text.encode()
    except UnicodeEncodeError:          # JSON can write half a surrogate pair
        raise ImageError(f"{what} is not valid Unicode") from None
    if b"\0" in data:
        raise ImageError(f"{what} has a NUL byte")
    return data


def blob_name(descriptor: dict) -> str:
    """Return the member that holds a descriptor's content (OCI image-layout.md)."""
    match = DIGEST_PATTERN.fullmatch(take(descriptor, "digest", str, "a descriptor"))
    if not match:
        raise ImageError("a descriptor's digest is not sha256:…; other algorithms are not supported")
    return f"blobs/sha256/{match[1]}"


def docker_candidates(archive: Archive) -> list[Candidate]:
    """Return the images of a docker-archive's manifest.json."""
    entries = parse_json(archive.read_document("manifest.json"), list, "manifest.json")
    candidates = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise ImageError("manifest.json: an entry is not an object")
        candidates.append(Candidate(tags=tuple(take_strings(entry, "RepoTags", "manifest.json")),
                                    config=take(entry, "Config", str, "manifest.json"),
                                    layers=tuple(take_strings(entry, "Layers", "manifest.json"))))
    return candidates


class OciIndex:
    """Finds the images for this machine in an OCI layout, through nested indexes."""

    def __init__(self, archive: Archive, architecture: str):
        self._archive = archive
        self._architecture = architecture
        self._found: dict[str, list[Candidate]] = {}    # by member: one document may be listed under several tags
        self._others: list[str] = []                    # platforms passed over, for the error message

    def candidates(self) -> list[Candidate]:
        found = []
        for descriptor in self._wanted("index.json"):
            tags = self._tags(descriptor)
            found += [replace(candidate, tags=tags) for candidate in self._resolve(blob_name(descriptor), 1)]
        if not found and self._others:
            raise ImageError(f"the image is for {', '.join(dict.fromkeys(self._others))}; "
                             f"this machine is linux/{self._architecture}")
        return found

    def _resolve(self, member: str, depth: int) -> list[Candidate]:
        """Return what a manifest, or the best entry of an index, stands for."""
        if member in self._found:
            return self._found[member]
        document = self._document(member)
        if "manifests" in document:
            if depth > MAX_INDEX_DEPTH:                 # also how an index that contains itself ends
                raise ImageError(f"OCI indexes are nested deeper than {MAX_INDEX_DEPTH} (MAX_INDEX_DEPTH)")
            # It lists one image for several platforms: the first that fits is the best (image-index.md).
            nested = (self._resolve(blob_name(d), depth + 1) for d in self._wanted(member))
            found = next(filter(None, nested), [])
        else:
            layers = take(document, "layers", list, member)
            if not all(isinstance(layer, dict) for layer in layers):
                raise ImageError(f"{member}: a layer is not an object")
            found = [Candidate(tags=(), config=blob_name(take(document, "config", dict, member)),
                               layers=tuple(blob_name(layer) for layer in layers))]
        self._found[member] = found
        return found

    def _document(self, member: str) -> dict:
        document = parse_json(self._archive.read_document(member), dict, member)
        if "manifests" in document and ("layers" in document or "config" in document):
            raise ImageError(f"{member} is both an index and a manifest (CVE-2021-41190)")
        if "fsLayers" in document:
            raise ImageError(f"{member} is a schema 1 manifest; save the image with a newer tool")
        return document

    def _wanted(self, member: str) -> Iterator[dict]:
        """Yield the descriptors of an index that may be for this machine."""
        for descriptor in take(self._document(member), "manifests", list, member):
            if not isinstance(descriptor, dict):
                raise ImageError(f"{member}: an entry is not an object")
            platform_ = take(descriptor, "platform", dict, "a descriptor")
            name = f"{platform_.get('os')}/{platform_.get('architecture')}"
            # Without a platform the config will tell; unknown/unknown are attestations (docker buildx).
            if not platform_ or name == f"linux/{self._architecture}":
                yield descriptor
            elif name != "unknown/unknown":
                self._others.append(name)

    @staticmethod
    def _tags(descriptor: dict) -> tuple[str, ...]:
        annotations = take(descriptor, "annotations", dict, "a descriptor")
        names = (annotations.get("io.containerd.image.name"), annotations.get("org.opencontainers.image.ref.name"))
        return tuple(name for name in names if isinstance(name, str))


def tag_matches(tag: str, wanted: str) -> bool:
    """Tell whether a user who writes wanted may mean tag: `app` fits `app:latest` and `localhost/app:latest`."""
    return any(tag == name or tag.endswith("/" + name) for name in (wanted, wanted + ":latest"))


def list_tags(candidates: list[Candidate]) -> str:
    return ", ".join(sorted({tag for candidate in candidates for tag in candidate.tags or (candidate.label,)}))


def choose_candidate(candidates: list[Candidate], tag: str) -> Candidate:
    """Return the one image meant, else raise an ImageError that lists the choice (F.3)."""
    if not candidates:
        raise ImageError("the archive holds no image")
    fitting = [c for c in candidates if not tag or any(tag_matches(t, tag) for t in c.tags)]
    if not fitting:
        raise ImageError(f"no image is tagged {tag!r}: the archive has {list_tags(candidates)}")
    if len({(c.config, c.layers) for c in fitting}) > 1:
        raise ImageError(f"the archive holds several images, choose one with --tag: {list_tags(fitting)}")
    return fitting[0]


def choose_image(archive: Archive, tag: str, architecture: str) -> Image:
    """Return the image to unpack from an archive: docker-archive first, then OCI layout (rules F)."""
    if archive.find("manifest.json"):
        candidates = docker_candidates(archive)
    elif archive.find("index.json"):
        candidates = OciIndex(archive, architecture).candidates()
    elif archive.looks_like_root_filesystem():
        raise ImageError("this is a bare file system, not an image: use `docker save`, not `docker export`")
    elif not archive.complete:
        raise ImageError("the archive is cut short: did the command before the pipe fail?")
    else:
        raise ImageError("this tar holds no image: neither manifest.json nor index.json; use `docker save`")
    chosen = choose_candidate(candidates, tag)
    if not archive.complete:
        raise ImageError("the archive is cut short: did the command before the pipe fail?")
    data = archive.read_document(chosen.config)
    config = parse_json(data, dict, "the image config")
    check_platform(config, architecture)
    return Image(digest=hashlib.sha256(data).hexdigest(), tag=tag or (chosen.tags[0] if chosen.tags else ""),
                 config=config, layers=pair_layers(chosen, config))


def check_platform(config: dict, architecture: str) -> None:
    """Raise ImageError if the image was built for another machine."""
    system = take(config, "os", str, "the image config") or "linux"
    machine = take(config, "architecture", str, "the image config") or architecture
    if (system, machine) != ("linux", architecture):
        raise ImageError(f"the image is for {system}/{machine}; this machine is linux/{architecture}")


def pair_layers(chosen: Candidate, config: dict) -> list[Layer]:
    """Return the layers with the digests that the config promises for them (E.3)."""
    diff_ids = take_strings(take(config, "rootfs", dict, "the image config"), "diff_ids", "the image config")
    if len(diff_ids) != len(chosen.layers):
        raise ImageError(f"the image lists {len(chosen.layers)} layers but {len(diff_ids)} diff_ids; "
                         "save it again (docker 25.0.0 wrote such archives)")
    layers = []
    for member, diff_id in zip(chosen.layers, diff_ids, strict=True):
        match = DIGEST_PATTERN.fullmatch(diff_id)
        if not match:
            raise ImageError(f"diff_id {diff_id!r} is not sha256:…; other algorithms are not supported")
        blob = re.fullmatch(r"(?:\./)?blobs/sha256/([0-9a-f]{64})", member)
        layers.append(Layer(member, match[1], blob[1] if blob else None))
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Layers: decompress, verify, apply. Runs in the unpacking child.
# ---------------------------------------------------------------------------------------------------------------------

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def gunzip(compressed: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip of any number of members, in pieces of bounded size (E.1)."""
    member = None
    for data in compressed:
        while data:
            if member is None:
                data = data.lstrip(b"\0")           # padding between members, which gzip(1) ignores too
                member = zlib.decompressobj(wbits=31) if data else None
                continue
            try:
                yield member.decompress(data, COPY_CHUNK)
            except zlib.error as error:
                raise ImageError(f"gzip data in the archive is damaged: {error}") from None
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        raise ImageError("gzip data in the archive is cut short")


def unzstd(compressed: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress zstd of any number of frames, in pieces of bounded size (E.1)."""
    try:
        from compression import zstd
    except ImportError:                 # before Python 3.14
        yield from unzstd_by_program(compressed)
        return
    frame = None
    for data in compressed:
        while data or frame is not None and not frame.needs_input:
            frame = frame or zstd.ZstdDecompressor()
            try:
                yield frame.decompress(data, COPY_CHUNK)
            except zstd.ZstdError as error:
                raise ImageError(f"zstd data in the archive is damaged: {error}") from None
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise ImageError("zstd data in the archive is cut short")


def unzstd_by_program(compressed: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress zstd with the `zstd` program, fed by a thread."""
    program = shutil.which("zstd")
    if program is None:
        raise ImageError("a layer is compressed with zstd and this machine has no zstd program: "
                         "install it (apt install zstd), or save the image with gzip layers")
    failure: list[Exception] = []

    def feed(pipe) -> None:
        try:
            with pipe:
                for data in compressed:
                    pipe.write(data)
        except OSError as error:                # zstd went away; its exit status says more
            failure.append(error)

    with subprocess.Popen([program, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as child:
        feeder = threading.Thread(target=feed, args=(child.stdin,))
        feeder.start()
        try:
            while data := child.stdout.read(COPY_CHUNK):
                yield data
        except BaseException:
            child.kill()
            raise
        finally:
            feeder.join()
    if child.returncode != 0 or failure:
        raise ImageError("zstd data in the archive is damaged or cut short")


def find_decompressor(blob: SpanReader) -> Callable[[Iterator[bytes]], Iterator[bytes]] | None:
    """Tell by its first bytes how a stream is compressed; media types and names lie (E.1)."""
    magic = blob.read(4)
    blob.seek(0)
    if magic.startswith(GZIP_MAGIC):
        return gunzip
    return unzstd if magic == ZSTD_MAGIC else None


class Budget:
    """What one image may still use (E.4)."""

    def __init__(self, max_size: int, max_entries: int):
        self._max_size, self._max_entries = max_size, max_entries
        self.written = 0                # bytes of files, with the holes of sparse ones
        self.read = 0                   # bytes of layers after decompression
        self.entries = 0

    def spend_written(self, count: int) -> None:
        self.written += count
        self._check_size(self.written)

    def spend_read(self, count: int) -> None:
        self.read += count
        self._check_size(self.read)

    def _check_size(self, size: int) -> None:
        if size > self._max_size:
            raise LimitExceeded(f"the unpacked image is over {self._max_size} bytes (--max-image-size)")

    def spend_entry(self) -> None:
        self.entries += 1
        if self.entries > self._max_entries:
            raise LimitExceeded(f"the image has over {self._max_entries} files (--max-image-entries)")


class LayerStream:
    """The uncompressed bytes of one layer: read once, forward, hashing on both sides of the decompression."""

    def __init__(self, blob: SpanReader, budget: Budget):
        self._diff_hash = self._blob_hash = hashlib.sha256()    # the same bytes, unless they are compressed
        self._budget = budget
        self._position = 0
        self._chunk = memoryview(b"")
        self._chunks = self._decompress(blob)

    def _decompress(self, blob: SpanReader) -> Iterator[bytes]:
        decompress = find_decompressor(blob)
        if decompress is None:
            return blob.chunks()
        self._blob_hash = hashlib.sha256()
        return decompress(self._hashed(blob))

    def _hashed(self, blob: SpanReader) -> Iterator[bytes]:
        for data in blob.chunks():
            self._blob_hash.update(data)
            yield data

    def take(self, count: int) -> memoryview:
        """Return between 1 and count bytes without copying them; none at the end."""
        while not self._chunk:
            data = next(self._chunks, None)
            if data is None:
                return self._chunk
            self._diff_hash.update(data)
            self._budget.spend_read(len(data))
            self._chunk = memoryview(data)
        piece, self._chunk = self._chunk[:count], self._chunk[count:]
        self._position += len(piece)
        return piece

    def read(self, count: int) -> bytes:
        first = self.take(count) if count else b""
        if len(first) == count:
            return bytes(first)
        parts = [first]
        missing = count - len(first)
        while missing and (piece := self.take(missing)):
            parts.append(piece)
            missing -= len(piece)
        return b"".join(parts)

    def seek(self, position: int) -> None:
        """Read on to position. Raises ImageError if the data ends before it."""
        while self._position < position:
            if not self.take(min(position - self._position, COPY_CHUNK)):
                raise ImageError("a layer is cut short in the middle of a file")

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        """End the decompression, and the program that does it, before the archive is closed."""
        self._chunks.close()

    def verify(self, layer: Layer) -> None:
        """Read to the end and compare the digests (E.2)."""
        while self.take(COPY_CHUNK):
            continue
        if layer.blob_digest and self._blob_hash.hexdigest() != layer.blob_digest:
            raise ImageError(f"layer {layer.member} is damaged: its content does not match its digest")
        if self._diff_hash.hexdigest() != layer.diff_id:
            raise ImageError(f"layer {layer.member} is damaged: its content does not match diff_id "
                             f"sha256:{layer.diff_id[:12]}…")


class Missing(Exception):
    """A path does not lead to a directory."""


class Rootfs:
    """A directory as the root of an image: paths in it are resolved as if chrooted, links and all (rules A).

    Paths are bytes, start with a slash and have no trailing one; the root itself is b"". Nobody else writes here (it
    lies below a 0700 directory), so what was looked at cannot change before it is used.
    """

    def __init__(self, path: str | Path):
        self.path = os.fsencode(path)
        self._resolved: dict[bytes, bytes] = {}         # directory as named → as it really is

    def host(self, path: bytes) -> bytes:
        """Return the host's name of a resolved path."""
        return self.path + path

    def make_directory(self, path: bytes) -> bytes:
        """Return the real path of a directory, made 0755 root:root with its parents where it is missing (A.6)."""
        real = self._resolved.get(path)
        if real is None:
            real = self._resolved[path] = self._walk(path, self._place_directory)
        return real

    def find_directory(self, path: bytes) -> bytes:
        """Return the real path of a directory. Raises Missing."""
        return self._walk(path, self._refuse)

    def _walk(self, path: bytes, repair: Callable[[bytes], None]) -> bytes:
        """Follow path from the root; repair is called where something else than a directory is in the way."""
        real, hops = b"", 0
        ahead = path.split(b"/")[::-1]
        while ahead:
            name = ahead.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                real = real.rpartition(b"/")[0]         # of the root: the root, as in a chroot
                continue
            here = real + b"/" + name
            kind = self.kind(here)
            if kind == stat.S_IFLNK:
                hops += 1
                if hops > MAX_LINK_HOPS:
                    raise ImageError(f"too many symbolic links in {show(path)} (MAX_LINK_HOPS)")
                target = os.readlink(self.host(here))
                if target.startswith(b"/"):
                    real = b""
                ahead += target.split(b"/")[::-1]
                continue
            if kind != stat.S_IFDIR:
                repair(here)
            real = here
            if real.count(b"/") > MAX_PATH_DEPTH:       # links lead deeper than a name tells
                raise ImageError(f"a path in the image is over {MAX_PATH_DEPTH} directories deep (MAX_PATH_DEPTH)")
        return real

    def is_directory(self, path: bytes) -> bool:
        """Tell whether a path that was real once still is: no component of it has become a link since."""
        while path:
            try:
                if self.kind(path) != stat.S_IFDIR:
                    return False
            except NotADirectoryError:
                return False
            path = path.rpartition(b"/")[0]
        return True

    def kind(self, path: bytes) -> int:
        """Return the file type (S_IFMT) of the last component itself, 0 if there is none."""
        try:
            return stat.S_IFMT(os.lstat(self.host(path)).st_mode)
        except FileNotFoundError:
            return 0

    def _place_directory(self, path: bytes) -> None:
        self.remove(path)
        os.mkdir(self.host(path))
        os.chmod(self.host(path), 0o755)                # whatever the umask is

    @staticmethod
    def _refuse(path: bytes) -> None:
        raise Missing(path)

    def remove(self, path: bytes) -> None:
        """Remove whatever is there, with all below it and without following a link; nothing there is fine."""
        kind = self.kind(path)
        if kind in (stat.S_IFDIR, stat.S_IFLNK):
            self._resolved.clear()
        if kind == stat.S_IFDIR:
            shutil.rmtree(self.host(path))
        elif kind:
            os.unlink(self.host(path))

    def make_real_directory(self, path: bytes) -> None:
        """Make path and all its parents plain directories, putting them in the place of links and files (H.1)."""
        real = b""
        for name in path.split(b"/")[1:]:
            real += b"/" + name
            if self.kind(real) != stat.S_IFDIR:
                self._place_directory(real)

    def read_file(self, path: bytes, limit: int) -> bytes:
        """Return the content of a small regular file, b"" if there is none; never follows a final link (G.3)."""
        directory, _, name = path.rpartition(b"/")
        try:
            real = self.find_directory(directory) + b"/" + name
        except Missing:
            return b""
        if self.kind(real) != stat.S_IFREG:
            return b""
        with open(self.host(real), "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise LimitExceeded(f"{show(path)} of the image is over {limit} bytes (MAX_ACCOUNTS_SIZE)")
        return data

    def write_file(self, path: bytes, data: bytes) -> None:
        """Put a plain 0644 file at path, in the place of whatever is there."""
        directory, _, name = path.rpartition(b"/")
        real = self.make_directory(directory) + b"/" + name
        self.remove(real)
        descriptor = os.open(self.host(real), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)


def show(path: bytes) -> str:
    """Return a path of an image for a message."""
    return escape_controls(path.decode("utf-8", "backslashreplace"))


# Errors that are not the image's.
HOST_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
SELINUX_XATTR = "security.selinux"      # labels are the host's affair


class LayerApplier:
    """Applies one layer's entries to a rootfs (rules A to D)."""

    def __init__(self, rootfs: Rootfs, budget: Budget):
        self._rootfs = rootfs
        self._budget = budget
        self._own: set[bytes] = set()                   # paths of this layer and their parents: no whiteout hides them
        self._directory_times: dict[bytes, int] = {}    # set at the end, when nothing writes into them any more
        self._warned_xattrs = False                     # the file system has none: one warning is enough

    def apply(self, stream: LayerStream) -> None:
        """Apply all entries of a layer, leaving the stream behind the last."""
        for entry in TarReader(stream):
            self._budget.spend_entry()
            name = entry.name.encode("utf-8", "surrogateescape")
            try:
                self._apply_entry(entry, self._clean(entry, name), stream)
            except OSError as error:
                if error.errno in HOST_FAULTS:
                    raise storage_error(error, "unpacking the image") from None
                raise ImageError(f"cannot unpack {show(name)}: {error.strerror}") from None
            except (OverflowError, ValueError) as error:        # a number that no system call takes
                raise ImageError(f"cannot unpack {show(name)}: {error}") from None
        for path, mtime in self._directory_times.items():
            # A parent may have become a link to the host meanwhile, and utime would follow it there.
            if self._rootfs.is_directory(path):
                os.utime(self._rootfs.host(path), ns=(mtime, mtime))

    @staticmethod
    def _clean(entry: tarfile.TarInfo, name: bytes) -> bytes:
        """Return an entry's path, clamped to the root and checked (A.1, A.5)."""
        if b"\0" in name or (not name and not entry.isdir()):
            raise ImageError("a layer's entry has an empty name or one with a NUL byte")
        path = posixpath.normpath(b"/" + name.lstrip(b"/")).rstrip(b"/")
        if path.count(b"/") > MAX_PATH_DEPTH + 1:
            raise ImageError(f"a path in the image is over {MAX_PATH_DEPTH} directories deep (MAX_PATH_DEPTH)")
        if any(len(component) > MAX_NAME_LENGTH for component in path.split(b"/")):
            raise ImageError(f"a name in the image is over {MAX_NAME_LENGTH} bytes: {show(name[:80])}…")
        return path

    def _apply_entry(self, entry: tarfile.TarInfo, path: bytes, stream: LayerStream) -> None:
        directory, _, name = path.rpartition(b"/")
        if path.startswith(b"/.wh..wh.") and path != b"/.wh..wh..opq":
            return                                      # bookkeeping of aufs at the root (B.4)
        if b"/.wh." in directory:
            raise ImageError(f"{show(path)}: a whiteout cannot be a directory")
        if name.startswith(b".wh."):
            self._apply_whiteout(directory, name.removeprefix(b".wh."))
            return
        if not path:
            if not entry.isdir():
                raise ImageError("the image's root is not a directory (CVE-2021-29136)")
            self._set_metadata(b"", entry)
            return
        real = self._rootfs.make_directory(directory) + b"/" + name
        self._create(entry, real, stream)
        self._claim(real)

    def _claim(self, path: bytes) -> None:
        while path not in self._own:
            self._own.add(path)
            path = path.rpartition(b"/")[0]

    # -- whiteouts --

    def _apply_whiteout(self, directory: bytes, hidden: bytes) -> None:
        opaque = hidden == b".wh..opq"
        if not opaque and (hidden in (b"", b".", b"..") or hidden.startswith(b".wh.")):
            raise ImageError(f"bad whiteout {show(directory)}/.wh.{show(hidden)}")
        try:
            real = self._rootfs.find_directory(directory)
        except Missing:
            return
        if opaque:
            self._hide_lower_children(real)
        elif real + b"/" + hidden in self._own:         # same layer has it too: only what lies below is hidden (B.2)
            self._hide_lower_children(real + b"/" + hidden)
        else:
            self._rootfs.remove(real + b"/" + hidden)

    def _hide_lower_children(self, path: bytes) -> None:
        if self._rootfs.kind(path) != stat.S_IFDIR:
            return
        for name in os.listdir(self._rootfs.host(path)):
            child = path + b"/" + name
            if child in self._own:
                self._hide_lower_children(child)
            else:
                self._rootfs.remove(child)

    # -- objects --

    def _create(self, entry: tarfile.TarInfo, path: bytes, stream: LayerStream) -> None:
        if entry.islnk():
            self._create_hardlink(entry, path)
            return
        kind = self._rootfs.kind(path)
        if entry.isdir():
            if kind != stat.S_IFDIR:
                self._rootfs.remove(path)
                os.mkdir(self._rootfs.host(path))
        else:
            self._rootfs.remove(path)                   # never write through what is there (C.1, C.2)
            self._create_leaf(entry, path, stream)
        self._set_metadata(path, entry)

    def _create_leaf(self, entry: tarfile.TarInfo, path: bytes, stream: LayerStream) -> None:
        host = self._rootfs.host(path)
        if entry.isreg():
            self._write_file(entry, host, stream)
        elif entry.issym():
            os.symlink(entry.linkname.encode("utf-8", "surrogateescape"), host)     # verbatim (A.3)
        elif entry.isfifo():
            os.mkfifo(host, 0o600)
        elif entry.ischr() or entry.isblk():
            kind = stat.S_IFCHR if entry.ischr() else stat.S_IFBLK
            os.mknod(host, kind | 0o600, os.makedev(entry.devmajor, entry.devminor))
        else:
            raise ImageError(f"{show(path)} is of the unknown tar type {entry.type!r}")

    def _create_hardlink(self, entry: tarfile.TarInfo, path: bytes) -> None:
        """Link to a file of this or a lower layer; the entry's own metadata counts for nothing (C.3)."""
        target = posixpath.normpath(b"/" + entry.linkname.encode("utf-8", "surrogateescape").lstrip(b"/"))
        directory, _, name = target.rpartition(b"/")
        kind = stat.S_IFDIR if not name else 0          # the root itself
        with contextlib.suppress(Missing):
            real = self._rootfs.find_directory(directory) + b"/" + name
            kind = self._rootfs.kind(real)
        if kind in (0, stat.S_IFDIR):
            raise ImageError(f"hard link {show(path)} points to {show(target)}, "
                             f"which {'is a directory' if kind else 'does not exist'}")
        if real == path or real.startswith(path + b"/"):
            raise ImageError(f"hard link {show(path)} points to itself")
        self._rootfs.remove(path)
        os.link(self._rootfs.host(real), self._rootfs.host(path), follow_symlinks=False)

    def _write_file(self, entry: tarfile.TarInfo, host: bytes, stream: LayerStream) -> None:
        self._budget.spend_written(entry.size)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(host, flags, 0o600)
        try:
            if entry.sparse is None:
                self._copy(stream, descriptor, entry.size)
            else:
                self._copy_sparse(entry, stream, descriptor)
        finally:
            os.close(descriptor)

    @staticmethod
    def _copy(stream: LayerStream, descriptor: int, count: int) -> None:
        while count:
            piece = stream.take(min(count, COPY_CHUNK))
            if not piece:
                raise ImageError("a layer is cut short in the middle of a file")
            count -= len(piece)
            while piece:
                piece = piece[os.write(descriptor, piece):]

    def _copy_sparse(self, entry: tarfile.TarInfo, stream: LayerStream, descriptor: int) -> None:
        """Write a sparse file's pieces where they belong; the holes stay holes."""
        for offset, count in entry.sparse:
            if offset < 0 or count < 0 or offset + count > entry.size:
                raise ImageError(f"{entry.name!r} has a bad sparse map")
            os.lseek(descriptor, offset, os.SEEK_SET)
            self._copy(stream, descriptor, count)
        os.ftruncate(descriptor, entry.size)

    # -- metadata --

    def _set_metadata(self, path: bytes, entry: tarfile.TarInfo) -> None:
        """Set owner, extended attributes, mode, time, in this order: chown clears setuid and capabilities (D.1)."""
        host = self._rootfs.host(path)
        if max(entry.uid, entry.gid) > 0xFFFFFFFE or min(entry.uid, entry.gid) < 0:     # -1 means "leave it"
            raise ImageError(f"{show(path)} has a bad owner {entry.uid}:{entry.gid}")
        os.chown(host, entry.uid, entry.gid, follow_symlinks=False)
        self._set_xattrs(host, entry)
        if not entry.issym():
            os.chmod(host, entry.mode & 0o7777)
        mtime = modification_time(entry)
        if entry.isdir():
            self._directory_times[path] = mtime
        else:
            os.utime(host, ns=(mtime, mtime), follow_symlinks=False)

    def _set_xattrs(self, host: bytes, entry: tarfile.TarInfo) -> None:
        if entry.isdir():                               # a directory over a directory takes nothing over (D.3)
            for name in os.listxattr(host, follow_symlinks=False):
                if name != SELINUX_XATTR:               # the host's own label
                    os.removexattr(host, name, follow_symlinks=False)
        for key, value in entry.pax_headers.items():
            name = key.removeprefix("SCHILY.xattr.")
            if name in (key, SELINUX_XATTR):
                continue
            if name.startswith("user.") and not (entry.isreg() or entry.isdir()):
                continue                                # xattr(7): only files and directories carry them
            try:
                os.setxattr(host, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.ENOSPC and os.statvfs(self._rootfs.path).f_bavail > len(value):
                    raise ImageError(f"cannot unpack {entry.name}: extended attribute {name} is too large for this "
                                     "machine's file system") from None     # ENOSPC says that too (setxattr(2))
                if error.errno != errno.ENOTSUP:
                    raise
                if not self._warned_xattrs:
                    log.warning("the file system of the state directory has no extended attributes: %s is lost", name)
                self._warned_xattrs = True


def modification_time(entry: tarfile.TarInfo) -> int:
    """Return an entry's mtime in nanoseconds, exact where a PAX record has it, within what a file system can hold."""
    try:
        seconds = Decimal(entry.pax_headers.get("mtime") or entry.mtime)
    except (InvalidOperation, ValueError):
        seconds = Decimal(0)
    if not seconds.is_finite():
        seconds = Decimal(0)
    return int(min(max(seconds, Decimal(-1 << 31)), Decimal((1 << 34) - 1)) * 1_000_000_000)


# ---------------------------------------------------------------------------------------------------------------------
# Process config: what an image says about the process to run. Runs in the unpacking child.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Who a process runs as."""
    uid: int
    gid: int
    groups: list[int]
    home: str


MAX_ID = 0xFFFFFFFE                     # the highest uid and gid; one more means "none" (chown(2))


def is_id(text: str) -> bool:
    return re.fullmatch("[0-9]{1,10}", text) is not None and int(text) <= MAX_ID


def account_lines(data: bytes, fields: int) -> Iterator[list[str]]:
    """Yield the fields of each usable line of passwd(5) or group(5)."""
    for line in data.decode("utf-8", "replace").split("\n"):
        parts = line.split(":")
        if len(parts) >= fields and is_id(parts[2]) and "\0" not in line:
            yield parts


def parse_id(text: str, what: str) -> int | None:
    """Return text as a uid or gid, None if it is a name. Raises ImageError for a number no id can be."""
    if not re.fullmatch("[0-9]+", text):
        return None
    if not is_id(text):
        raise ImageError(f"the image's {what} {text[:12]} is too large")
    return int(text)


def resolve_user(user: str, passwd: bytes, group: bytes) -> Account:
    """Return the account that an image's User means (G.3).

    user is "", "name", "uid", "name:group", "uid:gid" or mixed; passwd and group are the image's own files. An explicit
    group brings no supplementary groups, as in Docker. Raises ImageError for a name that is in neither file.
    """
    name, _, group_name = user.partition(":")
    name = name or "0"
    uid = parse_id(name, "user")
    account = None
    for line in account_lines(passwd, 6):
        if line[0] == name if uid is None else int(line[2]) == uid:
            account = line
            break
    if account is None and uid is None:
        raise ImageError(f"the image's user {name!r} is not in its /etc/passwd")
    uid = int(account[2]) if account else uid
    home = (account[5] if account else "") or "/"
    groups = list(account_lines(group, 3))
    if group_name:
        gid = parse_id(group_name, "group")
        if gid is None:
            gid = next((int(line[2]) for line in groups if line[0] == group_name), None)
        if gid is None:
            raise ImageError(f"the image's group {group_name!r} is not in its /etc/group")
        return Account(uid, gid, [], home)
    if account is None:
        return Account(uid, 0, [], home)
    own = parse_id(account[3], "group") or 0
    members = [int(line[2]) for line in groups if len(line) > 3 and account[0] in line[3].split(",")]
    return Account(uid, own, sorted(set(members) - {own}), home)


def with_default(env: list[str], key: str, value: str) -> list[str]:
    """Return env with KEY=value appended where KEY is not set (G.2)."""
    return env if any(entry.startswith(key + "=") for entry in env) else [*env, f"{key}={value}"]


def config_path(text: str, what: str) -> bytes:
    """Return a path of an image config, normalised, without a slash at its end: b"" is the root. Raises ImageError."""
    path = encode_text(text, what)
    if not path.startswith(b"/"):
        raise ImageError(f"{what} {text!r} is not an absolute path")
    path = b"/" + posixpath.normpath(path).lstrip(b"/")
    if len(path) > MAX_PATH_LENGTH or any(len(component) > MAX_NAME_LENGTH for component in path.split(b"/")):
        raise ImageError(f"{what} is too long")
    return path.rstrip(b"/")


def prepare_working_directory(rootfs: Rootfs, text: str) -> str:
    """Make an image's WorkingDir, as Docker does, and return it. Raises ImageError (G.2)."""
    path = config_path(text or "/", "the image's WorkingDir")
    for seen in (path, rootfs.make_directory(path)):        # as it is written, and where links lead
        if seen == b"/proc" or seen.startswith(b"/proc/"):
            raise ImageError(f"the image's WorkingDir {text!r} lies in /proc (CVE-2024-21626)")
    return path.decode() or "/"


RESERVED_TARGETS = ("/dev", "/proc", "/sys", CONTROL_SOCKET)       # mounted in every container


def prepare_volumes(rootfs: Rootfs, paths: Iterable[str]) -> list[dict]:
    """Make the directories of an image's volumes and return what their tmpfs should look like (G.4)."""
    volumes = {}
    for path in paths:
        real = os.fsdecode(rootfs.make_directory(config_path("/" + path, "the image's volume")))
        if real in ("", "/tmp") or any(real == r or real.startswith(r + "/") for r in RESERVED_TARGETS):
            if real == "/tmp":                          # is one already
                continue
            raise ImageError(f"the image's volume {path!r} is in the way of faasd's own mounts")
        host = rootfs.host(os.fsencode(real))
        status = os.stat(host)
        volumes[real] = {"path": real, "mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid,
                         "gid": status.st_gid, "copy_up": bool(os.listdir(host))}
    return [volumes[path] for path in sorted(volumes)]      # a parent is mounted before what lies in it


HOSTS = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def prepare_mount_targets(rootfs: Rootfs) -> None:
    """Put real directories where every container gets a mount, and a plain file for its control socket.

    An image with a symbolic link there made runc touch the host (CVE-2026-41579, rule H.1), and a target that runc
    has to make itself is written into a rootfs that other containers share.
    """
    for target in (b"/dev", b"/proc", b"/sys", b"/tmp"):
        rootfs.make_real_directory(target)
    rootfs.write_file(os.fsencode(CONTROL_SOCKET), b"")
    if not rootfs.read_file(b"/etc/hosts", MAX_ACCOUNTS_SIZE).strip():      # Docker gives every container one
        rootfs.write_file(b"/etc/hosts", HOSTS)


def resolve_process(config: dict, rootfs: Rootfs) -> dict:
    """Return what an image config says about its process, with users and volumes looked up in the rootfs (rules G)."""
    settings = take(config, "config", dict, "the image config")
    what = "the image config"
    account = resolve_user(take(settings, "User", str, what),
                           rootfs.read_file(b"/etc/passwd", MAX_ACCOUNTS_SIZE),
                           rootfs.read_file(b"/etc/group", MAX_ACCOUNTS_SIZE))
    cwd = prepare_working_directory(rootfs, take(settings, "WorkingDir", str, what))
    env = [entry for entry in take_strings(settings, "Env", what) if "=" in entry]     # runc refuses one without
    env = with_default(with_default(env, "PATH", DEFAULT_PATH), "HOME", account.home)
    return {
        "entrypoint": take_strings(settings, "Entrypoint", what), "cmd": take_strings(settings, "Cmd", what),
        "env": env, "cwd": cwd, "uid": account.uid, "gid": account.gid, "groups": account.groups,
        "volumes": prepare_volumes(rootfs, take(settings, "Volumes", dict, what)),
        "labels": take(settings, "Labels", dict, what), "stop_signal": take(settings, "StopSignal", str, what),
        "exposed_ports": sorted(take(settings, "ExposedPorts", dict, what)),
    }


def host_architecture() -> str:
    """Return this machine's architecture in the words of image configs (GOARCH)."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def inflate_archive(path: Path, budget: Budget) -> Path:
    """Return path, or a file beside it with its content decompressed: `docker load` takes a compressed archive too."""
    with path.open("rb") as file:
        blob = SpanReader(file, 0, os.fstat(file.fileno()).st_size)
        decompress = find_decompressor(blob)
        if decompress is None:
            return path
        inflated = path.with_name("inflated.tar")
        with inflated.open("wb") as out, contextlib.closing(decompress(blob.chunks())) as chunks:
            for data in chunks:
                budget.spend_read(len(data))
                out.write(data)
    path.unlink()
    return inflated


def unpack_image(path: Path, directory: Path, tag: str, max_size: int, max_entries: int) -> dict:
    """Unpack the image archive at path to directory/rootfs and return what directory/image.json then says.

    directory must not exist yet, and nobody but root may be able to reach it. On any error it is left half done, for
    the caller to remove. Raises FaasdError.
    """
    try:
        path = inflate_archive(path, Budget(max_size, max_entries))
        directory.mkdir(mode=0o700)
        rootfs_path = directory / "rootfs"
        rootfs_path.mkdir()
        rootfs_path.chmod(0o755)
        with path.open("rb") as file:
            archive = Archive(file)
            image = choose_image(archive, tag, host_architecture())
            budget = Budget(max_size, max_entries)
            for layer in image.layers:
                # A rootfs of its own for each layer: what one has resolved, the next may change.
                with contextlib.closing(LayerStream(archive.open(layer.member), budget)) as stream:
                    LayerApplier(Rootfs(rootfs_path), budget).apply(stream)
                    stream.verify(layer)
        rootfs = Rootfs(rootfs_path)
        process = resolve_process(image.config, rootfs)
        prepare_mount_targets(rootfs)
        document = {"digest": f"sha256:{image.digest}", "version": image.digest[:12], "tag": image.tag,
                    "size": budget.written, "entries": budget.entries, "process": process}
        (directory / "image.json").write_text(json.dumps(document, indent=1))
        return document
    except OSError as error:
        raise storage_error(error, "unpacking the image") from error


def unpack_main(arguments: list[str]) -> int:
    """Run `faasd.py unpack ARCHIVE DIRECTORY TAG MAX_SIZE MAX_ENTRIES`, the daemon's child; print JSON to stdout."""
    archive, directory, tag, max_size, max_entries = arguments
    die_with_parent()
    os.nice(10)                         # invocations come first
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_AS, (UNPACK_ADDRESS_SPACE, UNPACK_ADDRESS_SPACE))
    try:
        document = unpack_image(Path(archive), Path(directory), tag, int(max_size), int(max_entries))
    except FaasdError as error:
        print(json.dumps({"error": str(error), "status": error.status}))
        return 1
    except MemoryError:
        print(json.dumps({"error": "the image's archive needs too much memory to read (UNPACK_ADDRESS_SPACE)",
                          "status": LimitExceeded.status}))
        return 1
    print(json.dumps(document))
    return 0


PR_SET_PDEATHSIG = 1                    # prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when the daemon dies, so that it does not unpack for nobody."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# OCI bundle: from an image and options to config.json, and the runtime that reads it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What a user chose for a function; the defaults are the product's."""
    memory: int = 512 * MIB             # bytes, swap included
    cpus: float = 1.0
    pids: int = 64                      # processes and threads
    timeout: float = 30.0               # seconds from hand-over to the end of the handler; 0: none
    start_timeout: float = 10.0         # seconds from spawning runc to the connect
    env: tuple[str, ...] = ()           # KEY=value
    cmd: tuple[str, ...] = ()           # in the place of the image's Cmd

    @classmethod
    def from_query(cls, query: dict[str, list[str]]) -> Options:
        """Return the options of a request's query string. Raises BadRequest."""
        parsers = {"memory": parse_size, "cpus": parse_cpus, "pids": parse_count,
                   "timeout": parse_duration, "start_timeout": parse_duration}
        values: dict = {}
        for key, texts in query.items():
            if key in parsers:
                values[key] = parsers[key](texts[-1])
            elif key in ("env", "cmd"):
                values[key] = tuple(texts)
            elif key != "tag":
                raise BadRequest(f"unknown option {key!r}")
        return cls(**values).check()

    def check(self) -> Options:
        """Return self, else raise BadRequest for a value that no container can start with."""
        if not MIN_MEMORY <= self.memory <= 1 << 50:
            raise BadRequest(f"memory must be at least {MIN_MEMORY // MIB}m: less does not start a container")
        if self.start_timeout <= 0:
            raise BadRequest("start-timeout must be over 0")
        for entry in self.env:
            if not re.fullmatch(r"[^=\0]+=[^\0]*", entry, re.DOTALL):
                raise BadRequest(f"bad environment entry {entry!r}: write KEY=value")
        if any("\0" in word for word in self.cmd):
            raise BadRequest("the command has a NUL byte")
        return self

    @classmethod
    def from_json(cls, document: dict) -> Options:
        return cls(**{**document, "env": tuple(document["env"]), "cmd": tuple(document["cmd"])})


def merge_env(base: list[str], overrides: Iterable[str]) -> list[str]:
    """Return base with each override in the place of the entries of its key, or at the end."""
    merged = list(base)
    for entry in overrides:
        key = entry.partition("=")[0] + "="
        places = [i for i, old in enumerate(merged) if old.startswith(key)]
        if places:
            merged[places[0]] = entry
            for i in reversed(places[1:]):
                del merged[i]
        else:
            merged.append(entry)
    return merged


# What Docker masks and what it makes read-only: kernel interfaces that are not namespaced.
MASKED_PATHS = ["/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
                "/sys/devices/virtual/powercap", "/sys/firmware"]
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
NAMESPACES = ["pid", "mount", "network", "ipc", "uts", "cgroup"]


def tmpfs_mount(destination: str, size: str, *options: str) -> dict:
    return {"destination": destination, "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", f"size={size}", *options]}


def bundle_mounts(volumes: list[dict], control_socket: str) -> list[dict]:
    """Return the mounts of every container.

    /dev must be a mount: without one runc writes device nodes into the rootfs, which other containers share.
    """
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "noexec", "strictatime", "mode=755", f"size={DEV_SIZE}"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        tmpfs_mount("/dev/shm", SHM_SIZE, "noexec", "mode=1777"),
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        tmpfs_mount("/tmp", TMP_SIZE, "mode=1777"),
    ]
    for volume in volumes:
        mounts.append(tmpfs_mount(volume["path"], VOLUME_SIZE, f"mode={volume['mode']:o}", f"uid={volume['uid']}",
                                  f"gid={volume['gid']}", *(["tmpcopyup"] if volume["copy_up"] else [])))
    mounts.append({"destination": CONTROL_SOCKET, "type": "bind", "source": control_socket,
                   "options": ["bind", "nosuid", "nodev", "noexec"]})
    return mounts


def command_line(process: dict, options: Options) -> list[str]:
    """Return argv: the image's Entrypoint and the user's command or the image's Cmd (G.1). Raises ImageError."""
    arguments = [*process["entrypoint"], *(options.cmd or process["cmd"])]
    if not arguments:
        raise ImageError("the image names no command to run: give one after `--`")
    return arguments


def build_spec(name: str, image: dict, options: Options, rootfs: str, control_socket: str, cgroup: str,
               container_id: str, limit_swap: bool) -> dict:
    """Return the OCI runtime configuration (runtime-spec config.md) of a function's container.

    image is the content of image.json; rootfs, control_socket and cgroup are paths, cgroup below the cgroup mounts.
    """
    process = image["process"]
    # The container's init has no capability to raise a hard limit above the one it inherits from us.
    nofile = min(CONTAINER_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    env = merge_env(process["env"], [*options.env, f"FAAS_FUNCTION={name}", f"FAAS_VERSION={image['version']}",
                                     f"FAAS_CONTAINER_ID={container_id}"])
    memory = {"limit": options.memory, **({"swap": options.memory} if limit_swap else {})}
    return {
        "ociVersion": "1.0.2",
        "hostname": name,
        "root": {"path": rootfs, "readonly": True},
        "process": {
            "terminal": False, "cwd": process["cwd"], "args": command_line(process, options), "env": env,
            "user": {"uid": process["uid"], "gid": process["gid"], "additionalGids": process["groups"]},
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in
                             ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "rlimits": [{"type": kind, "soft": limit, "hard": limit} for kind, limit in
                        (("RLIMIT_NOFILE", nofile), ("RLIMIT_CORE", 0))],
        },
        "mounts": bundle_mounts(process["volumes"], control_socket),
        "linux": {
            "namespaces": [{"type": kind} for kind in NAMESPACES],
            "cgroupsPath": cgroup,
            "maskedPaths": MASKED_PATHS, "readonlyPaths": READONLY_PATHS,
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],     # runc adds null, zero, tty and their like
                "memory": memory,
                "cpu": {"quota": int(options.cpus * CPU_PERIOD), "period": CPU_PERIOD},
                "pids": {"limit": options.pids},
            },
        },
    }


class Bundle:
    """A function's config.json, rendered once; only the container's id is filled in for each."""

    def __init__(self, name: str, image: dict, options: Options, rootfs: Path, run_dir: Path, cgroups: Cgroups):
        self._mark = f"@{secrets.token_hex(16)}@"       # stands for the id; nothing a user writes contains it
        spec = build_spec(name, image, options, str(rootfs), str(run_dir / "containers" / self._mark / "control.sock"),
                          cgroups.path(self._mark), self._mark, cgroups.can_limit_swap)
        self._template = json.dumps(spec)

    def render(self, container_id: str) -> bytes:
        return self._template.replace(self._mark, container_id).encode()


class Cgroups:
    """The cgroups of this daemon's containers: PARENT/ID in every hierarchy, of v1 and v2.

    The parent is ours alone and named after the run-dir, so that containers are not nested in the cgroup faasd itself
    happens to run in, and two daemons do not meet.
    """

    def __init__(self, run_dir: Path):
        self.parent = "/faasd" + str(run_dir).replace("/", "-")
        self._hierarchies = [Path(mount) for mount, kind in read_mounts() if kind in ("cgroup", "cgroup2")]
        # runc fails on a swap limit where a v1 kernel does not account for swap; on v2 it copes by itself.
        version_1 = [h / "memory.limit_in_bytes" for h in self._hierarchies if (h / "memory.limit_in_bytes").exists()]
        self.can_limit_swap = all(path.with_name("memory.memsw.limit_in_bytes").exists() for path in version_1)

    def path(self, container_id: str) -> str:
        """Return the cgroupsPath of a container."""
        return f"{self.parent}/{container_id}"

    def _directories(self, path: str) -> list[Path]:
        return [h / path.lstrip("/") for h in self._hierarchies if (h / path.lstrip("/")).is_dir()]

    def exists(self, container_id: str) -> bool:
        return bool(self._directories(self.path(container_id)))

    def containers(self) -> set[str]:
        """Return the ids of all containers that have a cgroup."""
        return {child.name for parent in self._directories(self.parent) for child in parent.iterdir() if child.is_dir()}

    def processes(self, container_id: str) -> set[int]:
        """Return the pids in a container's cgroups."""
        pids: set[int] = set()
        for directory in self._directories(self.path(container_id)):
            with contextlib.suppress(FileNotFoundError, OSError):       # runc may be removing it just now
                pids.update(map(int, (directory / "cgroup.procs").read_text().split()))
        return pids - {0}                       # a process that our pid namespace does not see

    def kill(self, container_id: str) -> None:
        """Send SIGKILL to every process of a container."""
        for pid in self.processes(container_id):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                # The pid may have been taken over since we read it, but the descriptor now holds one process fast.
                if f"/{container_id}" in Path(f"/proc/{pid}/cgroup").read_text():
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
            finally:
                os.close(descriptor)

    def remove(self, path: str) -> None:
        """Remove a cgroup directory in every hierarchy if it is empty."""
        for directory in self._directories(path):
            try:
                directory.rmdir()
            except OSError as error:
                if error.errno != errno.ENOENT:
                    log.warning("cannot remove cgroup %s: %s", directory, error.strerror)


def read_mounts() -> list[tuple[str, str]]:
    """Return mount point and file system type of every mount (proc_pid_mountinfo(5)), in order of mounting."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mounts.append((re.sub(r"\\([0-9]{3})", lambda m: chr(int(m[1], 8)), before.split()[4]), after.split()[0]))
    return mounts


def run_command(*argv: str) -> subprocess.CompletedProcess:
    """Run a short-lived tool to its end and return its result with text output. Raises FaasdError if it cannot run."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=COMMAND_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FaasdError(f"cannot run {argv[0]}: {error}") from error


def runc_warning(version: str) -> str | None:
    """Return what to tell the user about this runc's known holes, None for a runc without (H.2).

    version is what `runc --version` prints first, such as "runc version 1.1.5+ds1".
    """
    match = re.match(r"runc version ([0-9]+)\.([0-9]+)\.([0-9]+)", version)
    if not match:
        return None
    number = tuple(map(int, match.groups()))
    if number < (1, 1, 12):
        holes = "leaked descriptors (CVE-2024-21626), masked paths and console (CVE-2025-31133, -52565, -52881)"
    elif number < (1, 2, 8) or (1, 3, 0) <= number < (1, 3, 3):
        holes = "masked paths and console (CVE-2025-31133, -52565, -52881)"
    else:
        return None
    return (f"{version} is older than the release that fixed {holes}; "
            "distributions backport such fixes, so check your package's changelog")


class Runtime:
    """The OCI runtime program and its state directory."""

    def __init__(self, program: str, root: Path):
        self.program, self.root = program, root

    def version(self) -> str:
        """Return the first line of `runc --version`. Raises FaasdError if it does not run."""
        result = run_command(self.program, "--version")
        if result.returncode != 0:
            raise FaasdError(f"{self.program} --version failed: {result.stderr.strip()[:200]}")
        return result.stdout.splitlines()[0] if result.stdout else "unknown"

    def run_argv(self, bundle: Path, container_id: str) -> list[str]:
        return [self.program, "--root", str(self.root), "run", "--bundle", str(bundle), container_id]

    def containers(self) -> set[str]:
        """Return the ids that the runtime keeps state for."""
        return {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()

    def has_state(self, container_id: str) -> bool:
        return (self.root / container_id).exists()

    def delete(self, container_id: str) -> None:
        """Remove a container by force. Blocks; failure is logged, for the caller removes what is left by hand."""
        result = run_command(self.program, "--root", str(self.root), "delete", "--force", container_id)
        if result.returncode != 0:
            log.warning("container=%s %s delete failed: %s", container_id, self.program, result.stderr.strip()[:500])


# ---------------------------------------------------------------------------------------------------------------------
# Network: addresses on lo, and listeners on them
# ---------------------------------------------------------------------------------------------------------------------


def ip_json(*arguments: str) -> list[dict]:
    """Return what `ip -j` prints for a query. Raises FaasdError."""
    result = run_command("ip", "-j", "-4", *arguments)
    if result.returncode != 0:
        raise FaasdError(f"ip {' '.join(arguments)} failed: {result.stderr.strip()}")
    return json.loads(result.stdout or "[]")


class Network:
    """Addresses of one subnet on `lo`, one for each function.

    Each is a /32: a /24 on lo would swallow the user's LAN. The label tells them from everybody else's.
    """

    def __init__(self, subnet: ipaddress.IPv4Network):
        self.subnet = subnet
        self._claim: socket.socket | None = None

    def claim(self) -> None:
        """Make sure that the subnet is nobody else's. Raises UsageError."""
        links = ip_json("addr", "show")
        loopback = next((link for link in links if link.get("ifname") == "lo"), {})
        if "UP" not in loopback.get("flags", []):
            raise UsageError("the loopback interface is down: ip link set lo up")
        for link in links:
            for address in link.get("addr_info", []):
                network = ipaddress.ip_network(f"{address['local']}/{address['prefixlen']}", strict=False)
                if address.get("label") != ADDRESS_LABEL and network.overlaps(self.subnet):
                    self._refuse(f"{network} is assigned to {link['ifname']}")
        for route in ip_json("route", "show", "table", "all"):
            if route.get("type", "unicast") == "unicast" and route["dst"] != "default":
                network = ipaddress.ip_network(route["dst"], strict=False)
                # Shorter than /8 is a default route in pieces, as VPNs set it (0.0.0.0/1 and 128.0.0.0/1).
                if network.prefixlen >= 8 and network.overlaps(self.subnet):
                    self._refuse(f"{network} is routed to {route.get('dev', route.get('gateway', 'elsewhere'))}")
        self._claim_from_daemons()

    def _claim_from_daemons(self) -> None:
        """Bind an abstract Unix socket named after the subnet: those are per network namespace, as addresses are."""
        for name in re.findall(r"@faasd/([0-9./]+)$", Path("/proc/net/unix").read_text(), re.MULTILINE):
            if ipaddress.ip_network(name).overlaps(self.subnet):
                self._refuse(f"another faasd uses {name}")
        self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._claim.bind(f"\0faasd/{self.subnet}")
        except OSError:
            self._refuse(f"another faasd uses {self.subnet}")

    def _refuse(self, reason: str) -> None:
        raise UsageError(f"subnet {self.subnet} is in use: {reason}; choose another with --subnet")

    def lowest_free(self, taken: Iterable[str]) -> str:
        """Return the lowest address from .10 up that no function has. Raises Conflict when there is none."""
        used = set(taken)
        first = int(self.subnet.network_address) + FIRST_HOST
        for number in range(first, int(self.subnet.broadcast_address)):
            address = str(ipaddress.IPv4Address(number))
            if address not in used:
                return address
        raise Conflict(f"subnet {self.subnet} has no free address: remove a function, or start with a larger --subnet")

    def add(self, address: str) -> None:
        """Put a function's address on lo. Raises FaasdError."""
        result = run_command("ip", "addr", "add", f"{address}/32", "dev", "lo", "label", ADDRESS_LABEL)
        if result.returncode != 0:
            raise FaasdError(f"cannot add {address} to lo: {result.stderr.strip()}")

    def remove(self, address: str) -> None:
        """Take an address from lo; failure is logged."""
        result = run_command("ip", "addr", "del", f"{address}/32", "dev", "lo", "label", ADDRESS_LABEL)
        if result.returncode != 0:
            log.warning("cannot remove %s from lo: %s", address, result.stderr.strip())

    def labelled(self) -> list[str]:
        """Return the addresses of our subnet that carry our label."""
        return [address["local"] for link in ip_json("addr", "show", "dev", "lo")
                for address in link.get("addr_info", [])
                if address.get("label") == ADDRESS_LABEL and ipaddress.ip_address(address["local"]) in self.subnet]


def open_listener(address: str, port: int) -> socket.socket:
    """Return a non-blocking listening socket. Raises Conflict if the port is taken, FaasdError otherwise.

    TCP_DEFER_ACCEPT: the kernel shows us a connection when its first data is there, so that a client that sends
    nothing costs no container (tcp(7)).
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_SECONDS)
        listener.bind((address, port))
        listener.listen(int(Path("/proc/sys/net/core/somaxconn").read_text()))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} on {address} is taken by another program, perhaps one that listens on every "
                           "address: stop it, or start faasd with another --port") from None
        raise FaasdError(f"cannot listen on {address}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


@dataclass(frozen=True)
class TcpState:
    """What the kernel knows of a client's connection."""
    state: int
    received: int       # bytes
    sent: int           # bytes handed to the kernel for sending, whether or not they have left

    @classmethod
    def of(cls, client: socket.socket) -> TcpState:
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        received, = struct.unpack_from("Q", info, TCP_INFO_RECEIVED)
        sent, sent_again = struct.unpack_from("QQ", info, TCP_INFO_SENT)
        waiting, = struct.unpack_from("I", info, TCP_INFO_NOTSENT)
        return cls(info[0], received, sent - sent_again + waiting)

    @property
    def can_answer(self) -> bool:
        """Whether nothing was said to the client yet and it still can be."""
        return self.sent == 0 and self.state in (TCP_ESTABLISHED, TCP_CLOSE_WAIT)


# ---------------------------------------------------------------------------------------------------------------------
# Container: one runc run, one control connection, one invocation
# ---------------------------------------------------------------------------------------------------------------------


class StartFailed(Exception):
    """A container did not become ready; str() says why, output are the last lines it printed."""

    def __init__(self, reason: str, output: Iterable[str], timed_out: bool):
        super().__init__(reason)
        self.output = list(output)
        self.timed_out = timed_out


def describe_exit(status: int) -> str:
    """Return an exit status in words. runc reports death by a signal as 128 + its number, as a shell does."""
    if status > 128:
        try:
            name = signal.Signals(status - 128).name
        except ValueError:
            name = f"signal {status - 128}"
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    if status < 0:
        return f"vanished with runc, killed by signal {-status}"
    return f"exited with status {status}"


class OutputReader:
    """Reads a container's stdout and stderr from a pipe, line by line, for as long as anybody holds its other end."""

    def __init__(self, descriptor: int, write_line: Callable[[str], None]):
        self._descriptor = descriptor
        self._write_line = write_line
        self._partial = b""
        self._room = MAX_OUTPUT
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> bool:
        """Take what is there; return whether there may be more."""
        try:
            data = os.read(self._descriptor, COPY_CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        # A handler may write without end: it must not wait for a full pipe, nor fill the log.
        if self._room > 0:
            self._take(data[:self._room])
            self._room -= len(data)
            if self._room <= 0:
                self._take(b"\n")
                self._write_line(f"(output over {MAX_OUTPUT} bytes is dropped)")
        return True

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        while len(self._partial) >= MAX_LINE:
            lines.append(self._partial[:MAX_LINE])
            self._partial = self._partial[MAX_LINE:]
        for line in lines:
            for start in range(0, max(len(line), 1), MAX_LINE):
                self._emit(line[start:start + MAX_LINE])

    def _emit(self, line: bytes) -> None:
        text = escape_controls(line.decode("utf-8", "backslashreplace").removesuffix("\r"))
        self.tail.append(text)
        self._write_line(text)

    def finish(self) -> None:
        """Take what is left in the pipe once the container is gone, and close it."""
        while self._descriptor >= 0 and self._read():
            continue
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            if self._partial:
                self._emit(self._partial)
                self._partial = b""


class Container:
    """One container from spawn to the last trace. Lives on the loop's thread.

    Three things happen to it, each once, and anybody may wait for them: connected (the handler is ready), handled (the
    handler let go of the control connection, or sent its READY byte), exited (runc is reaped).
    """

    def __init__(self, host: ContainerHost, bundle: Bundle, write_line: Callable[[str, str], None]):
        loop = asyncio.get_running_loop()
        self.id = secrets.token_hex(6)
        self._host = host
        self._bundle = bundle
        self._write_line = lambda text: write_line(self.id, text)
        self._directory = host.containers_dir / self.id
        self._listener: socket.socket | None = None     # until the handler connects: it may connect once
        self._control: socket.socket | None = None      # from then on
        self._process: subprocess.Popen | None = None   # runc run
        self._output: OutputReader | None = None
        self._pidfd = -1
        self.connected: asyncio.Future[None] = loop.create_future()
        self.handled: asyncio.Future[None] = loop.create_future()
        self.exited: asyncio.Future[int] = loop.create_future()

    # -- start --

    async def start(self, timeout: float) -> None:
        """Start the container and return when its handler has connected; timeout is in seconds.

        Raises StartFailed when it exits or the time is over; then nothing of it is left.
        """
        try:
            self._spawn()
        except OSError as error:
            await self.finish(0)
            raise StartFailed(f"cannot start a container: {error.strerror or error}", [], False) from error
        await asyncio.wait([self.connected, self.exited], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self.connected.done():
            return
        timed_out = not self.exited.done()
        status = await self.finish(0)
        tail = self._output.tail if self._output else []
        if timed_out:
            raise StartFailed(f"the handler did not connect to {CONTROL_SOCKET} within {timeout:g} s", tail, True)
        raise StartFailed(f"the handler {describe_exit(status)} before it connected to {CONTROL_SOCKET}", tail, False)

    def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self._directory.mkdir(mode=0o700)
        (self._directory / "config.json").write_bytes(self._bundle.render(self.id))
        self._listener = self._listen()
        loop.add_reader(self._listener, self._on_connect)
        reading, writing = os.pipe()
        self._output = OutputReader(reading, self._write_line)
        try:
            # A session of its own: a Ctrl-C on our terminal is not for handlers.
            self._process = subprocess.Popen(
                self._host.runtime.run_argv(self._directory, self.id), stdin=subprocess.DEVNULL, stdout=writing,
                stderr=writing, env={"PATH": DEFAULT_PATH}, start_new_session=True)
        finally:
            os.close(writing)
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:                 # out of descriptors: what cannot be watched must not run
            self._process.kill()
            self._process.wait()
            self._process = None
            raise
        loop.add_reader(self._pidfd, self._on_exit)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = str(self._directory / "control.sock")
        listener.bind(path)
        os.chmod(path, 0o666)           # the image's user connects; on the host the directory above keeps others out
        listener.listen(1)
        listener.setblocking(False)
        return listener

    def _on_connect(self) -> None:
        try:
            self._control, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:        # out of descriptors; trying again at once would spin
            log.error("container=%s cannot accept its handler: %s", self.id, error.strerror)
            self._close_listener()
            return
        self._close_listener()          # who connects again is refused
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, self._on_control)
        self.connected.set_result(None)

    # -- work --

    def hand_over(self, client: socket.socket) -> bool:
        """Send the client's socket to the handler; return whether somebody was there to take it."""
        if self._control is None:       # it connected and let go at once
            return False
        try:
            socket.send_fds(self._control, [b"\0"], [client.fileno()])
        except OSError as error:        # EPIPE, ECONNRESET: it is gone; ETOOMANYREFS: the kernel takes no more
            log.info("container=%s cannot be handed a client: %s", self.id, error.strerror)
            return False
        return True

    def _on_control(self) -> None:
        """Any byte is READY for another socket; we have none to give, so that and end of file mean the same: done.

        recv without room for ancillary data: descriptors that a handler sends are closed by the kernel (unix(7)).
        """
        try:
            self._control.recv(1)
        except BlockingIOError:
            return
        except ConnectionResetError:    # it exited without having read what we sent
            pass
        self._close_control()

    # -- end --

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(self._process.wait())
        self._close_control()

    def _close_listener(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _close_control(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        if not self.handled.done():
            self.handled.set_result(None)

    async def finish(self, grace: float) -> int:
        """Wait grace seconds for the container to exit, kill it if it does not, remove all of it.

        Returns the exit status of runc run, which is the handler's, or 128 + the signal that ended it.
        """
        self._close_control()
        if self._process is not None:
            if grace:
                await asyncio.wait([self.exited], timeout=grace)
            await self._kill()
        if self._host.has_remains(self.id):             # runc was killed, by us or by somebody else
            await asyncio.to_thread(self._host.remove_remains, self.id)
        self._close_listener()
        if self._output is not None:
            self._output.finish()
        if self._directory.exists():
            shutil.rmtree(self._directory)
        return self.exited.result() if self.exited.done() else -signal.SIGKILL

    async def _kill(self) -> None:
        """Kill every process of the container until runc, which waits for the first of them, is done."""
        deadline = time.monotonic() + KILL_TIMEOUT
        while not self.exited.done() and time.monotonic() < deadline:
            self._host.cgroups.kill(self.id)            # again and again: while starting it may have none yet
            await asyncio.wait([self.exited], timeout=KILL_RETRY)
        if not self.exited.done():
            log.error("container=%s runc does not end, killing it", self.id)
            self._process.kill()
            await self.exited


class ContainerHost:
    """Where this daemon's containers live: directories, runtime and cgroups, and what to do about their remains."""

    def __init__(self, run_dir: Path, runtime: Runtime):
        self.containers_dir = run_dir / "containers"
        self.runtime = runtime
        self.cgroups = Cgroups(run_dir)
        self._run_dir = run_dir

    def prepare(self) -> None:
        """Make RUN_DIR/containers, on a tmpfs, and clear what a killed daemon left. Blocks. Raises FaasdError."""
        self.containers_dir.mkdir(mode=0o700, exist_ok=True)
        if self._file_system_type(self.containers_dir) != "tmpfs":
            result = run_command("mount", "-t", "tmpfs", "-o", "mode=0700,nosuid,nodev,noexec,size=64m", "faasd",
                                 str(self.containers_dir))
            if result.returncode != 0:
                raise FaasdError(f"cannot mount a tmpfs on {self.containers_dir}: {result.stderr.strip()}")
        self._remove_orphans()

    @staticmethod
    def _file_system_type(path: Path) -> str:
        kinds = {mount: kind for mount, kind in read_mounts()}      # a later mount hides an earlier one
        return next(kinds[str(p)] for p in [path, *path.parents] if str(p) in kinds)

    def _remove_orphans(self) -> None:
        for pid in self._runtime_processes():           # first: a runc that lives could still start a container
            log.warning("killing orphaned %s, pid %d", self.runtime.program, pid)
            with contextlib.suppress(ProcessLookupError):       # it was about to end
                os.kill(pid, signal.SIGKILL)
        left = {path.name for path in self.containers_dir.iterdir()}
        for container_id in left | self.runtime.containers() | self.cgroups.containers():
            log.warning("container=%s removing what a killed daemon left of it", container_id)
            self.remove_remains(container_id)
            shutil.rmtree(self.containers_dir / container_id, ignore_errors=True)

    def _runtime_processes(self) -> list[int]:
        """Return the pids of `runc --root OURS …`: nobody else has a reason to use our root."""
        root = os.fsencode(self.runtime.root)
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):      # it exited
                    argv = (entry / "cmdline").read_bytes().split(b"\0")
                    if argv[1:3] == [b"--root", root]:
                        pids.append(int(entry.name))
        return pids

    def has_remains(self, container_id: str) -> bool:
        return self.runtime.has_state(container_id) or self.cgroups.exists(container_id)

    def remove_remains(self, container_id: str) -> None:
        """Remove a container without the runc that ran it. Blocks; what cannot be removed is logged."""
        deadline = time.monotonic() + KILL_TIMEOUT
        while self.cgroups.processes(container_id) and time.monotonic() < deadline:
            self.cgroups.kill(container_id)
            time.sleep(KILL_RETRY)
        if self.runtime.has_state(container_id):
            self.runtime.delete(container_id)
        self.cgroups.remove(self.cgroups.path(container_id))

    def dismantle(self) -> None:
        """Remove what prepare made, once no container is left. Blocks."""
        self.cgroups.remove(self.cgroups.parent)
        if os.path.ismount(self.containers_dir):
            result = run_command("umount", str(self.containers_dir))
            if result.returncode != 0:
                log.warning("cannot unmount %s: %s", self.containers_dir, result.stderr.strip())
        for directory in (self.containers_dir, self.runtime.root):
            try:
                directory.rmdir()
            except OSError as error:
                if error.errno != errno.ENOENT:
                    log.warning("cannot remove %s: %s", directory, error.strerror)


# ---------------------------------------------------------------------------------------------------------------------
# Function: an address, the version it runs, and its invocations
# ---------------------------------------------------------------------------------------------------------------------


def now() -> str:
    """Return the time for people and machines: RFC 3339, UTC, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class FunctionRecord:
    """What the registry keeps of a function."""
    name: str
    address: str
    created: str                # RFC 3339
    updated: str
    version: str                # first 12 hex digits of the image's digest: the directory of the image
    options: Options


class Version:
    """An image with the options it runs under: what a deploy makes, and the next one replaces."""

    def __init__(self, name: str, directory: Path, image: dict, options: Options, host: ContainerHost):
        self.directory = directory
        self.image = image
        self.options = options
        self.command = command_line(image["process"], options)
        self.bundle = Bundle(name, image, options, directory / "rootfs", host.containers_dir.parent, host.cgroups)
        self._users = 0                         # invocations that run on it
        self.unused = asyncio.Event()
        self.unused.set()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep the version's files while an invocation needs them."""
        self._users += 1
        self.unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self.unused.set()


@dataclass
class Invocation:
    """What the log tells of one connection. Times are of time.monotonic()."""
    peer: str
    request: str                        # first line, if it was there already
    accepted: float
    container: str = "-"
    slot: float = 0.0                   # a start slot was free
    ready: float = 0.0                  # the handler connected
    handled: float = 0.0                # the handler let go
    outcome: str = "?"
    status: int = 0                     # of the answer that faasd itself gave, if it did
    reason: str = ""
    exit_status: int | None = None
    received: int = 0                   # bytes on the client's connection
    sent: int = 0

    def line(self) -> str:
        """Return the invocation as key=value for the log."""
        def elapsed(start: float, end: float) -> str:
            return f"{(end - start) * 1000:.1f}ms" if start and end else "-"
        parts = [f"outcome={self.outcome}", f"client={self.peer}", f'request="{escape_controls(self.request)}"',
                 f"wait={elapsed(self.accepted, self.slot)}", f"start={elapsed(self.slot, self.ready)}",
                 f"run={elapsed(self.ready, self.handled)}", f"received={self.received}", f"sent={self.sent}",
                 f"exit={'-' if self.exit_status is None else self.exit_status}"]
        if self.status:
            parts.append(f"status={self.status}")
        if self.reason:
            parts.append(f'reason="{self.reason}"')
        return " ".join(parts)


REASON_PHRASES = {502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}


async def answer(client: socket.socket, status: int, line: str) -> None:
    """Answer a client in the place of its handler, which must be gone. Errors are the client's, who left.

    What the client still sends is read and dropped: closing a socket with unread data sends a reset, which can destroy
    the answer before the client has read it.
    """
    body = f"faasd: {line}\n".encode()
    retry = "Retry-After: 1\r\n" if status == 503 else ""
    head = (f"HTTP/1.1 {status} {REASON_PHRASES[status]}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n").encode()
    loop = asyncio.get_running_loop()
    client.setblocking(False)
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            await loop.sock_sendall(client, head + body)
            client.shutdown(socket.SHUT_WR)
            room = LINGER_BYTES
            while room > 0 and (data := await loop.sock_recv(client, COPY_CHUNK)):
                room -= len(data)
    except (OSError, TimeoutError) as error:
        log.debug("answering %d: %s", status, error or "the client keeps the connection open")


async def peek_request(client: socket.socket) -> bytes:
    """Return the first bytes of a request without taking them; b"" if the client left without a word.

    TCP_DEFER_ACCEPT has normally waited for them already. After its time, and when the kernel falls back to SYN
    cookies, a connection is accepted without data; it still costs no container until there is some.
    """
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    try:
        return client.recv(PEEK_BYTES, flags)
    except BlockingIOError:
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(client, lambda: readable.done() or readable.set_result(None))
        try:
            async with asyncio.timeout(FIRST_BYTE_SECONDS):
                await readable
            return client.recv(PEEK_BYTES, flags)
        except (TimeoutError, OSError):
            return b""
        finally:
            loop.remove_reader(client)
    except OSError:                             # reset
        return b""


class Function:
    """Accepts connections on one address and gives each a container of its own. Lives on the loop's thread."""

    def __init__(self, record: FunctionRecord, host: ContainerHost, starts: asyncio.Semaphore, log_: FunctionLog):
        self.record = record
        self.log = log_
        self.version: Version | None = None     # None: cannot run, error says why
        self.error = ""
        self.leaving = False                    # being removed: no longer written down
        self.requests = 0                       # connections that asked for something, since the daemon started
        self.errors = 0                         # of these: no answer, or a bad exit
        self.changing = asyncio.Lock()          # held by who puts or removes image directories
        self._host = host
        self._starts = starts
        self._listener: socket.socket | None = None
        self._invocations: set[asyncio.Task] = set()

    @property
    def running(self) -> int:
        return len(self._invocations)

    @property
    def state(self) -> str:
        if self.leaving:
            return "removing"
        return "ready" if self.version else "broken"

    # -- accept --

    def listen(self, listener: socket.socket) -> None:
        """Take connections from a listening socket, which becomes the function's."""
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                client, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:            # EMFILE, ENFILE, ENOBUFS, ENOMEM: trying again at once would spin
                log.error("function=%s cannot accept: %s", self.record.name, error.strerror)
                self._pause()
                return
            task = asyncio.get_running_loop().create_task(self._serve(client, f"{peer[0]}:{peer[1]}"))
            self._invocations.add(task)
            task.add_done_callback(self._forget)

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        listener = self._listener
        loop.call_later(ACCEPT_PAUSE, lambda: self._listener is listener and loop.add_reader(listener, self._accept))

    def _forget(self, task: asyncio.Task) -> None:
        self._invocations.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("function=%s an invocation failed inside faasd", self.record.name, exc_info=task.exception())

    def stop_listening(self) -> None:
        """Accept what the kernel has completed already, then refuse new connections."""
        if self._listener is not None:
            self._accept()
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def drain(self, timeout: float) -> None:
        """Let running invocations finish for timeout seconds, then end them; their clients get a 503."""
        if self._invocations:
            await asyncio.wait(self._invocations, timeout=timeout)
        while self._invocations:
            for task in self._invocations:
                task.cancel()
            await asyncio.wait(self._invocations)

    # -- invoke --

    async def _serve(self, client: socket.socket, peer: str) -> None:
        """Serve one connection from accept to close."""
        accepted = time.monotonic()
        with client:
            request = await peek_request(client)
            if not request:
                return
            self.requests += 1
            first_line = request.split(b"\r\n")[0].split(b"\n")[0].decode("utf-8", "backslashreplace")
            invocation = Invocation(peer=peer, request=first_line, accepted=accepted)
            await self._invoke(client, invocation)
        if invocation.outcome != "answered" or invocation.exit_status:
            self.errors += 1
        self.log.write(invocation.container, ">", invocation.line())
        level = logging.DEBUG if invocation.outcome == "answered" else logging.WARNING
        log.log(level, "function=%s container=%s %s", self.record.name, invocation.container, invocation.line())

    async def _invoke(self, client: socket.socket, invocation: Invocation) -> None:
        container = None
        with contextlib.ExitStack() as holds:
            try:
                async with self._starts:
                    version = self.version      # now: a redeploy while this waited counts
                    holds.enter_context(version.used())
                    container = Container(self._host, version.bundle, self.log.write_output)
                    invocation.container, invocation.slot = container.id, time.monotonic()
                    await container.start(version.options.start_timeout)
                invocation.ready = time.monotonic()
                in_time = await self._handle(client, container, version.options.timeout)
                invocation.handled = time.monotonic()
                await self._conclude(client, container, invocation, in_time)
            except StartFailed as failure:
                invocation.outcome, invocation.reason = "start-failed", str(failure)
                await self._speak(client, invocation, 504 if failure.timed_out else 502, str(failure))
            except asyncio.CancelledError:      # drain
                if container is not None:
                    invocation.exit_status = await container.finish(0)
                if client.fileno() >= 0:        # else the client has its answer, and only the cleaning was cut short
                    invocation.outcome = "stopped"
                    await self._speak(client, invocation, 503, "faasd is stopping, or the function is being removed")

    @staticmethod
    async def _handle(client: socket.socket, container: Container, timeout: float) -> bool:
        """Hand the client over and wait for the handler to let go; return False if that took over timeout seconds."""
        if not container.hand_over(client):
            return True
        done, _ = await asyncio.wait([container.handled], timeout=timeout or None)
        return bool(done)

    async def _conclude(self, client: socket.socket, container: Container, invocation: Invocation,
                        in_time: bool) -> None:
        """End the client's connection: as the handler left it or, if it said nothing, with an answer of our own."""
        state = TcpState.of(client)
        if in_time and not state.can_answer:
            invocation.outcome = "answered" if state.sent else "closed"
            invocation.received, invocation.sent = state.received, state.sent
            client.close()                      # first: what follows is nothing the client should wait for
            invocation.exit_status = await container.finish(EXIT_GRACE)
            return
        # Whoever in the container still has the socket must be gone before we speak on it.
        invocation.exit_status = await container.finish(EXIT_GRACE if in_time else 0)
        if in_time:
            invocation.outcome = "no-answer"
            reason = f"the handler {describe_exit(invocation.exit_status)} without an answer"
            await self._speak(client, invocation, 502, reason)
        else:
            invocation.outcome = "timeout"
            await self._speak(client, invocation, 504, "the handler did not finish in time")

    async def _speak(self, client: socket.socket, invocation: Invocation, status: int, reason: str) -> None:
        """Answer the client unless the handler, or the client itself, left nothing to answer on."""
        invocation.reason = reason
        state = TcpState.of(client)
        if state.can_answer:
            invocation.status = status
            await answer(client, status, f"function {self.record.name}: {reason} (container {invocation.container})")
        state = TcpState.of(client)
        invocation.received, invocation.sent = state.received, state.sent

    # -- versions --

    def replace_version(self, version: Version) -> Version | None:
        """Make version the one for invocations that start from now on; return the one before."""
        before, self.version, self.error = self.version, version, ""
        return before

    def describe(self) -> dict:
        """Return everything that is known of the function, for the control API."""
        record, version = self.record, self.version
        document = {"name": record.name, "address": record.address, "state": self.state,
                    "version": record.version, "created": record.created, "updated": record.updated,
                    "running": self.running, "requests": self.requests, "errors": self.errors,
                    "options": asdict(record.options)}
        if version is None:
            return {**document, "error": self.error, "digest": "", "image": record.version, "command": [],
                    "user": "", "workdir": "", "size": 0}
        process = version.image["process"]
        return {**document, "digest": version.image["digest"], "image": version.image["tag"] or record.version,
                "command": version.command, "user": f"{process['uid']}:{process['gid']}", "workdir": process["cwd"],
                "size": version.image["size"]}


# ---------------------------------------------------------------------------------------------------------------------
# Registry: what survives a restart
# ---------------------------------------------------------------------------------------------------------------------


class Registry:
    """STATE_DIR/registry.json: every change replaces the file as a whole, so that it is never half written."""

    def __init__(self, path: Path):
        self._path = path

    def load(self) -> list[FunctionRecord]:
        """Return the functions. Raises FaasdError if the file is damaged or newer; it is never overwritten."""
        try:
            document = json.loads(self._path.read_text())
            if document["format"] != REGISTRY_FORMAT:
                raise FaasdError(f"{self._path} has format {document['format']!r}, this faasd knows "
                                 f"{REGISTRY_FORMAT}: use the faasd that wrote it")
            return [FunctionRecord(**{**entry, "options": Options.from_json(entry["options"])})
                    for entry in document["functions"]]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FaasdError(f"cannot read {self._path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FaasdError(f"{self._path} is damaged ({error}): restore it from a backup, or move it away to start "
                             "without functions") from error

    def save(self, records: Iterable[FunctionRecord]) -> None:
        """Write the functions to disk, for good. Raises FaasdError; the file is then as it was."""
        document = {"format": REGISTRY_FORMAT, "functions": [asdict(record) for record in records]}
        temporary = self._path.with_name(".registry.json.new")
        try:
            # Only for root: options have environment variables, which may be secrets.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)             # the rename itself
            finally:
                os.close(directory)
        except OSError as error:
            with contextlib.suppress(OSError):          # whatever is there does not get better by our trying
                temporary.unlink()
            raise storage_error(error, "writing the registry") from error


# ---------------------------------------------------------------------------------------------------------------------
# Logs: one file a function, and the daemon's own
# ---------------------------------------------------------------------------------------------------------------------


class FunctionLog:
    """STATE_DIR/logs/NAME.log: `TIME CONTAINER | text` for output, `TIME CONTAINER > key=value …` for an invocation.

    Written on the loop's thread only; any thread may read, and wait for more.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = None
        self._size = 0
        self._grown = threading.Condition()

    def write_output(self, container_id: str, text: str) -> None:
        self.write(container_id, "|", text)

    def write(self, container_id: str, mark: str, text: str) -> None:
        """Append a line; text has no control characters. Trouble with the disk must not end an invocation."""
        line = f"{now()} {container_id} {mark} {text}\n".encode("utf-8", "backslashreplace")
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                self._size = self._file.tell()
            if self._size + len(line) > LOG_FILE_SIZE:
                self.close()
                self.path.replace(self._previous)
                self._file = self.path.open("ab", buffering=0)
                self._size = 0
            self._size += self._file.write(line)
        except OSError as error:
            log.error("cannot write %s: %s", self.path, error.strerror)
        with self._grown:
            self._grown.notify_all()

    @property
    def _previous(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self._previous.unlink(missing_ok=True)

    def read(self, tail: int | None, since: str) -> tuple[list[bytes], BinaryIO | None]:
        """Return the last `tail` lines (None: all) from the time `since` (RFC 3339 UTC) on, and the log behind them.

        The open file, None if there is no log yet, is for follow(), or for the caller to close.
        """
        lines: collections.deque[bytes] = collections.deque(maxlen=tail)
        with contextlib.suppress(FileNotFoundError), self._previous.open("rb") as previous:
            lines.extend(line for line in previous if line >= since.encode())
        file = self._open()
        if file:
            lines.extend(line for line in file if line >= since.encode())
        return list(lines), file

    def follow(self, file: BinaryIO | None) -> Iterator[bytes]:
        """Yield what is appended to file and its successors, b"" now and then when there is nothing."""
        try:
            while True:
                with self._grown:       # taken to notify, so nothing is written unnoticed between read and wait
                    moved = self._moved(file)
                    data = file.read() if file else b""
                    if not data and not moved:
                        self._grown.wait(FOLLOW_SECONDS)
                yield data
                if moved:
                    if file:
                        file.close()
                    file = self._open()
        finally:
            if file:
                file.close()

    def _open(self) -> BinaryIO | None:
        try:
            return self.path.open("rb")
        except FileNotFoundError:
            return None

    def _moved(self, file: BinaryIO | None) -> bool:
        """Tell whether the log is another file by now than the one being read: rotated, or begun."""
        try:
            current = os.stat(self.path).st_ino
        except FileNotFoundError:
            return False
        return file is None or os.fstat(file.fileno()).st_ino != current


class LogFormatter(logging.Formatter):
    """`TIME LEVEL message` with control characters escaped, or a JSON object a line."""

    def __init__(self, as_json: bool):
        super().__init__("%(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if self._as_json:
            return json.dumps({"time": now(), "level": record.levelname.lower(), "message": message})
        return "\n".join(f"{now()} {record.levelname.lower()} {escape_controls(line)}" for line in message.split("\n"))


def configure_logging(as_json: bool, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(as_json))
    logging.getLogger().addHandler(handler)     # asyncio's warnings come the same way
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def notify_service_manager(state: str) -> None:
    """Tell systemd of a change, such as "READY=1" (sd_notify(3)); without systemd there is nobody to tell."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
            except OSError as error:
                log.warning("cannot notify the service manager: %s", error.strerror)


# ---------------------------------------------------------------------------------------------------------------------
# Control API: http.server on a Unix socket, a thread a request
# ---------------------------------------------------------------------------------------------------------------------


class ControlServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Listens on RUN_DIR/faasd.sock. The daemon's loop accepts, so that nothing here polls."""

    daemon_threads = True               # a client that never finishes must not keep the daemon from stopping
    block_on_close = False
    request_queue_size = 128

    def __init__(self, path: Path, daemon: Daemon):
        self.daemon = daemon
        self._path = path
        self._connections: set[socket.socket] = set()
        path.unlink(missing_ok=True)    # of a killed daemon; faasd.lock says that none runs
        before = os.umask(0o177)        # bind must not leave a moment in which anybody can connect
        try:
            super().__init__(str(path), ControlHandler)
        finally:
            os.umask(before)
        self._open_to_users()
        self.socket.setblocking(False)

    def _open_to_users(self) -> None:
        """Let in the user who ran sudo, and the group `faas` if there is one. Who may open this socket is root here."""
        try:
            group = grp.getgrnam("faas").gr_gid
        except KeyError:
            group = 0
        user = os.environ.get("SUDO_UID", "0")
        os.chown(self._path, int(user) if user.isdigit() else 0, group)
        os.chmod(self._path, 0o660)

    def accept(self) -> None:
        """Take one connection and answer it in a thread."""
        try:
            request, address = self.get_request()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("control API cannot accept: %s", error.strerror)
            return
        request.setblocking(True)
        self._connections.add(request)
        self.process_request(request, address)

    def shutdown_request(self, request) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def end_uploads(self) -> None:
        """Let threads that read from a client meet the end of file, so that they clean up before the daemon goes."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):          # the client was faster
                connection.shutdown(socket.SHUT_RD)

    def handle_error(self, request, client_address) -> None:
        log.exception("control API failed")

    def server_close(self) -> None:
        super().server_close()
        self._path.unlink(missing_ok=True)


class ControlHandler(http.server.BaseHTTPRequestHandler):
    """Answers one connection of the control API. Runs in a thread of its own; state is the loop's, reached by _call."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"    # not 0.9, which would answer nonsense without a status line
    server_version = f"faasd/{__version__}"
    timeout = MAX_HEADER_SECONDS
    server: ControlServer
    requestline = command = ""              # until http.server has read them; its own error answers may come before

    # -- plumbing --

    def setup(self) -> None:
        self.client_address = ("local", 0)      # http.server expects a host and a port
        super().setup()

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            log.info("control API: a client left in the middle of %r", self._subject())

    def _subject(self) -> str:
        # Without the query: it carries environment variables, which may be secrets.
        return self.requestline.partition("?")[0][:200]

    def log_message(self, format: str, *args) -> None:
        log.debug("control API: " + format, *args)

    def log_request(self, code="-", size="-") -> None:
        log.info("control API: %r %d", self._subject(), code)

    def _call(self, coroutine):
        """Run a coroutine on the daemon's loop and return its result. Ends it when the client leaves."""
        loop = self.server.daemon.loop
        started: list[asyncio.Task] = []
        future = asyncio.run_coroutine_threadsafe(run_to_end(coroutine, started), loop)
        watching = True
        while True:
            try:
                task = future.result(timeout=1.0)
                return task.result()
            except concurrent.futures.CancelledError:
                raise Stopping("faasd is stopping, or you left") from None
            except TimeoutError:
                if future.done():
                    raise
                if watching and self._client_left():    # once: what then runs is the task's cleaning
                    loop.call_soon_threadsafe(started[0].cancel)
                    watching = False

    def _client_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _reply(self, status: int, document: dict) -> None:
        body = json.dumps(document).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None) -> None:
        """Answer what http.server itself refuses in our own format."""
        self.close_connection = True
        self._reply(code, {"error": message or self.responses.get(code, ("error",))[0]})

    # -- routes --

    def _dispatch(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        try:
            query = urllib.parse.parse_qs(url.query, keep_blank_values=True, strict_parsing=bool(url.query),
                                          max_num_fields=10_000)
            method, arguments = self._route(parts)
            method(*arguments, query)
        except FaasdError as error:
            # What is left of a body is not worth reading: the next request would start in its middle.
            self.close_connection = True
            if error.status >= 500:
                log.error("control API: %s", error, exc_info=error.__cause__)
            self._reply(error.status, {"error": str(error), **({"output": error.output} if error.output else {})})
        except ValueError as error:
            self.close_connection = True
            self._reply(400, {"error": f"bad query: {error}"})

    do_GET = do_POST = do_DELETE = _dispatch

    def _route(self, parts: list[str]) -> tuple[Callable, list[str]]:
        """Return the method that answers, and its arguments. Raises NotFound, or FaasdError with status 405."""
        routes: dict[tuple, dict[str, Callable]] = {
            ("healthz",): {"GET": self._healthz},
            ("version",): {"GET": self._version},
            ("functions",): {"GET": self._list},
            ("functions", "*"): {"GET": self._show, "POST": self._deploy, "DELETE": self._remove},
            ("functions", "*", "logs"): {"GET": self._logs},
        }
        pattern = tuple("*" if i == 1 and part else part for i, part in enumerate(parts))
        if pattern not in routes:
            raise NotFound(f"no such resource: /{'/'.join(parts)}")
        methods = routes[pattern]
        if self.command not in methods:
            raise FaasdError(f"{self.command} is not possible here, {' or '.join(methods)} is", status=405)
        return methods[self.command], [check_name(part) for part in parts[1:2]]

    def _healthz(self, query: dict) -> None:
        self._reply(200, {"status": "ok"})

    def _version(self, query: dict) -> None:
        self._reply(200, {"faasd": __version__, "python": platform.python_version(),
                          "runtime": self.server.daemon.runtime_version, "kernel": platform.release()})

    def _list(self, query: dict) -> None:
        self._reply(200, {"functions": self._call(self.server.daemon.describe_all())})

    def _show(self, name: str, query: dict) -> None:
        self._reply(200, self._call(self.server.daemon.describe(name)))

    def _remove(self, name: str, query: dict) -> None:
        self._call(self.server.daemon.remove(name))
        self._reply(200, {"removed": name})

    def _deploy(self, name: str, query: dict) -> None:
        daemon = self.server.daemon
        options = Options.from_query(query)
        tag = query.get("tag", [""])[-1]
        self._call(daemon.begin_change(name, "deploy"))
        directory = None
        try:
            directory = Path(tempfile.mkdtemp(dir=daemon.settings.state_dir / "tmp"))
            archive = directory / "archive.tar"
            self._receive(archive)
            created, document = self._call(daemon.deploy(name, archive, tag, options))
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            raise storage_error(error, "receiving the image") from error
        finally:
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
            self._call(daemon.end_change(name))
        self._reply(201 if created else 200, document)

    def _receive(self, path: Path) -> None:
        """Write the request's body to path as it comes. Raises BadRequest if it is cut short, LimitExceeded."""
        limit = self.server.daemon.settings.max_image_size
        size = 0
        with path.open("wb") as file:
            for data in self._body():
                size += len(data)
                if size > limit:
                    raise LimitExceeded(f"the archive is over {limit} bytes (--max-image-size)")
                file.write(data)
        if size == 0:
            raise ImageError("the archive is empty: did the command before the pipe fail?")

    def _body(self) -> Iterator[bytes]:
        """Yield the request's body in pieces (RFC 9112, section 7). Raises BadRequest."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := self._chunk_size():
                yield from self._exactly(size)
                if self.rfile.readline(3) != b"\r\n":
                    raise BadRequest("the request's chunked encoding is broken")
            while self.rfile.readline(1024) not in (b"\r\n", b"\n", b""):     # trailers
                continue
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise FaasdError("the request needs a Content-Length or chunked encoding", status=411)
        yield from self._exactly(int(length))

    def _chunk_size(self) -> int:
        match = re.fullmatch(rb"([0-9a-fA-F]{1,15})(;[^\r\n]*)?\r?\n", self.rfile.readline(1024))
        if not match:
            raise BadRequest("the upload was cut short")
        return int(match[1], 16)

    def _exactly(self, count: int) -> Iterator[bytes]:
        while count:
            data = self.rfile.read(min(count, COPY_CHUNK))
            if not data:
                raise BadRequest("the upload was cut short")
            count -= len(data)
            yield data

    def _logs(self, name: str, query: dict) -> None:
        tail = parse_count(query["tail"][-1]) if "tail" in query else None
        since = parse_since(query["since"][-1]) if "since" in query else ""
        function_log = self._call(self.server.daemon.function_log(name))
        lines, file = function_log.read(tail, since)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._write_chunk(b"".join(lines))
        if query.get("follow", ["0"])[-1] not in ("", "0", "false"):
            for data in function_log.follow(file):
                self._write_chunk(data)
                if not data and self._client_left():
                    break
        elif file:
            file.close()
        self.wfile.write(b"0\r\n\r\n")

    def _write_chunk(self, data: bytes) -> None:
        if data:                        # an empty chunk would end the body
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


async def run_to_end(coroutine, started: list[asyncio.Task]) -> asyncio.Task:
    """Run a coroutine as a task and return the task when it is over, even if it is cancelled: then it has cleaned."""
    task = asyncio.ensure_future(coroutine)
    started.append(task)
    await asyncio.wait([task])
    return task


def parse_since(text: str) -> str:
    """Return a time as log lines begin with it, from RFC 3339 or from a duration before now. Raises BadRequest."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
    except ValueError:
        try:
            moment = datetime.now(timezone.utc) - timedelta(seconds=parse_duration(text))
        except (BadRequest, OverflowError):
            raise BadRequest(f"bad time {text!r}: write 10m, or 2026-01-31T12:00:00Z") from None
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]


# ---------------------------------------------------------------------------------------------------------------------
# Daemon and main
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The command line."""
    state_dir: Path
    run_dir: Path
    subnet: ipaddress.IPv4Network
    port: int
    runtime: str
    drain_timeout: float        # seconds
    max_image_size: int         # bytes
    max_image_entries: int
    log_format: str
    verbose: bool


class Daemon:
    """Owns the functions and takes them through deploy, restart, removal and stop."""

    def __init__(self, settings: Settings, network: Network):
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.runtime_version = ""
        self._network = network
        # By its full name: it is started with a PATH that may differ from ours.
        self._runtime = Runtime(shutil.which(settings.runtime) or settings.runtime, settings.run_dir / "runc")
        self._host = ContainerHost(settings.run_dir, self._runtime)
        self._registry = Registry(settings.state_dir / "registry.json")
        self._functions: dict[str, Function] = {}
        self._changes: dict[str, str] = {}              # name → what is being done to it; one thing at a time
        self._commit = asyncio.Lock()                   # from choosing an address to writing it down
        self._starts = asyncio.Semaphore(os.cpu_count() or 1)   # more starts at once only make each slower
        self._tasks: set[asyncio.Task] = set()          # deploys, removals and retirements under way
        self._stop_signals = asyncio.Queue()
        self._stopping = False

    @property
    def _images_dir(self) -> Path:
        return self.settings.state_dir / "images"

    # -- life --

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once. Raises FaasdError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop_signals.put_nowait, number)
        self.runtime_version = self._runtime.version()
        log.info("faasd %s, %s, Linux %s", __version__, self.runtime_version, platform.release())
        warning = runc_warning(self.runtime_version)
        if warning:
            log.warning("%s", warning)
        records = self._registry.load()
        self._clear_past(records)
        server = None
        try:
            for record in records:
                await self._restore(record)
            server = ControlServer(self.settings.run_dir / "faasd.sock", self)
            self.loop.add_reader(server, server.accept)
            log.info("ready: %d functions, subnet %s, control API at %s", len(records), self.settings.subnet,
                     server.server_address)
            notify_service_manager("READY=1")
            await self._stop_signals.get()
        finally:
            notify_service_manager("STOPPING=1")
            await self._stop(server)

    def _clear_past(self, records: list[FunctionRecord]) -> None:
        """Remove what a daemon that was killed left: containers, uploads, half-deployed images, addresses."""
        self._host.prepare()
        self._empty_tmp()
        kept = {(record.name, record.version) for record in records}
        for directory in self._images_dir.glob("*/*"):
            if (directory.parent.name, directory.name) not in kept:
                log.warning("removing an image without a function: %s", directory)
                shutil.rmtree(directory)
        for directory in self._images_dir.glob("*/"):
            if not any(directory.iterdir()):
                directory.rmdir()
        for path in (self.settings.state_dir / "logs").iterdir():
            if path.name.split(".")[0] not in {record.name for record in records}:
                path.unlink()
        for address in self._network.labelled():
            log.warning("removing address %s that a killed daemon left", address)
            self._network.remove(address)

    def _empty_tmp(self) -> None:
        for path in (self.settings.state_dir / "tmp").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    async def _restore(self, record: FunctionRecord) -> None:
        """Bring a function back on its address. One that cannot be is kept, marked as broken; the others go on."""
        function = self._functions[record.name] = self._make_function(record)
        try:
            function.replace_version(self._load_version(record))
            await self._open_function(function)
        except FaasdError as error:
            function.version, function.error = None, str(error)
            log.error("function=%s is broken: %s", record.name, error)

    async def _stop(self, server: ControlServer | None) -> None:
        """Stop accepting, drain, leave nothing behind."""
        self._stopping = True
        log.info("stopping: %d invocations running", sum(f.running for f in self._functions.values()))
        if server is not None:
            self.loop.remove_reader(server)
            server.server_close()
            server.end_uploads()
        for function in self._functions.values():
            function.stop_listening()
        for task in self._tasks:
            task.cancel()
        drain = asyncio.gather(*(f.drain(self.settings.drain_timeout) for f in self._functions.values()))
        second = asyncio.ensure_future(self._stop_signals.get())
        await asyncio.wait([drain, second], return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            log.warning("stopping at once")
            await asyncio.gather(*(f.drain(0) for f in self._functions.values()))
        second.cancel()
        await asyncio.gather(drain, *self._tasks, return_exceptions=True)
        deadline = self.loop.time() + UPLOAD_END_SECONDS
        while self._changes and self.loop.time() < deadline:
            await asyncio.sleep(0.01)
        for address in self._network.labelled():
            self._network.remove(address)
        self._host.dismantle()
        self._empty_tmp()
        log.info("stopped")

    # -- one change of a function at a time --

    async def begin_change(self, name: str, what: str) -> None:
        """Reserve a name for one deploy or removal. Raises Conflict, Stopping."""
        if self._stopping:
            raise Stopping("faasd is stopping")
        if name in self._changes:
            raise Conflict(f"function {name}: a {self._changes[name]} is under way, try again when it is done")
        self._changes[name] = what

    async def end_change(self, name: str) -> None:
        self._changes.pop(name, None)

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        """Have _stop cancel the running task and wait for its cleaning."""
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    # -- deploy --

    async def deploy(self, name: str, archive: Path, tag: str, options: Options) -> tuple[bool, dict]:
        """Unpack an archive, prove that its handler comes up, and make it the function's version.

        archive lies in a directory of its own below STATE_DIR/tmp, which the caller removes. Returns whether the
        function is new, and its description. On any error nothing has changed. Raises FaasdError.
        """
        with self._registered():
            image = await self._unpack(archive, tag)
            function = self._functions.get(name)
            changing = function.changing if function else asyncio.Lock()
            async with changing, self._placed(name, archive.parent / "image", image) as directory:
                version = Version(name, directory, image, options, self._host)
                await self._prove(name, version)
                async with self._commit:
                    created = function is None or function.version is None
                    if created:
                        function = await self._commit_new(name, version)
                    else:
                        await self._commit_replacement(function, version)
            function.log.write("-", ">", f"deployed version={version.image['version']} created={created}")
            log.info("function=%s version=%s deployed at %s", name, version.image["version"], function.record.address)
            return created, self._describe(function)

    async def _unpack(self, archive: Path, tag: str) -> dict:
        """Run the unpacking child; return image.json. Raises FaasdError with what the child said."""
        arguments = [str(archive), str(archive.parent / "image"), tag, str(self.settings.max_image_size),
                     str(self.settings.max_image_entries)]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-I", __file__, "unpack", *arguments,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            stdout, stderr = await child.communicate()
        except asyncio.CancelledError:
            child.kill()
            await child.wait()
            raise
        for line in stderr.decode("utf-8", "replace").splitlines():
            log.warning("unpack: %s", line)
        try:
            document = json.loads(stdout)
        except ValueError:
            raise FaasdError(f"unpacking ended with status {child.returncode}; faasd's log has the detail") from None
        if "error" in document:
            raise FaasdError(document["error"], status=document["status"])
        return document

    @contextlib.asynccontextmanager
    async def _placed(self, name: str, unpacked: Path, image: dict) -> AsyncIterator[Path]:
        """Move an unpacked image to where it belongs, and take it away again if what follows fails.

        An image that is there already stays: same digest, same content, and invocations may be running on it.
        """
        directory = self._images_dir / name / image["version"]
        try:
            present = (json.loads((directory / "image.json").read_text())["digest"] == image["digest"]
                       and (directory / "rootfs").is_dir())
        except (OSError, ValueError, KeyError):
            present = False
        if present:
            yield directory
            return
        try:
            if directory.exists():
                await asyncio.to_thread(shutil.rmtree, directory)
            directory.parent.mkdir(mode=0o700, exist_ok=True)
            unpacked.rename(directory)
        except OSError as error:
            raise storage_error(error, "storing the image") from error
        try:
            yield directory
        except BaseException:
            await asyncio.to_thread(self._remove_image, directory)
            raise

    def _remove_image(self, directory: Path) -> None:
        """Remove an image's directory, and that of its function if it was the last. Blocks."""
        shutil.rmtree(directory)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()    # not empty: the function has another version

    async def _prove(self, name: str, version: Version) -> None:
        """Start one container and end it again once its handler has connected. Raises DeployFailed."""
        container = Container(self._host, version.bundle, lambda container_id, text: None)
        try:
            async with self._starts:
                await container.start(version.options.start_timeout)
        except StartFailed as failure:
            raise DeployFailed(f"function {name} does not start: {failure}", failure.output) from failure
        finally:
            await container.finish(0)

    async def _commit_new(self, name: str, version: Version) -> Function:
        """Give a new function, or a broken one, its address and write it down; undo all of it on an error."""
        old = self._functions.get(name)
        taken = [function.record.address for function in self._functions.values()]
        address = old.record.address if old else self._network.lowest_free(taken)
        created = old.record.created if old else now()
        record = FunctionRecord(name, address, created, now(), version.image["version"], version.options)
        function = self._make_function(record)
        function.replace_version(version)
        await self._open_function(function)
        try:
            await self._save({**self._functions, name: function})
        except FaasdError:
            await self._close_function(function)
            raise
        if old:
            old.log.close()
        self._functions[name] = function
        return function

    async def _commit_replacement(self, function: Function, version: Version) -> None:
        """Make version the function's, for invocations that start from now on."""
        before = function.record
        function.record = FunctionRecord(before.name, before.address, before.created, now(),
                                         version.image["version"], version.options)
        try:
            await self._save(self._functions)
        except FaasdError:
            function.record = before
            raise
        old = function.replace_version(version)
        task = self.loop.create_task(self._retire(function, old))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, function: Function, old: Version) -> None:
        """Remove a replaced version's image once its last invocation has ended."""
        await old.unused.wait()
        async with function.changing:           # a deploy may be about to use the same image again
            current = function.version
            if (current is None or old.directory != current.directory) and old.directory.exists():
                await asyncio.to_thread(self._remove_image, old.directory)

    # -- functions --

    def _make_function(self, record: FunctionRecord) -> Function:
        return Function(record, self._host, self._starts,
                        FunctionLog(self.settings.state_dir / "logs" / f"{record.name}.log"))

    def _load_version(self, record: FunctionRecord) -> Version:
        """Return the version that a record names from the disk. Raises FaasdError."""
        directory = self._images_dir / record.name / record.version
        try:
            image = json.loads((directory / "image.json").read_text())
            if not (directory / "rootfs").is_dir():
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", "rootfs")
            return Version(record.name, directory, image, record.options, self._host)
        except (OSError, ValueError, KeyError) as error:
            raise FaasdError(f"its image in {directory} is damaged ({error}): deploy it again") from error

    async def _open_function(self, function: Function) -> None:
        """Put the function's address on lo and listen there; undo it on an error. Raises FaasdError."""
        address = function.record.address
        await asyncio.to_thread(self._network.add, address)
        try:
            function.listen(open_listener(address, self.settings.port))
        except BaseException:
            await asyncio.to_thread(self._network.remove, address)
            raise

    async def _close_function(self, function: Function) -> None:
        """Stop accepting, let invocations finish, take the address from lo: in that order, for they need it."""
        function.stop_listening()
        await function.drain(self.settings.drain_timeout)
        await asyncio.to_thread(self._network.remove, function.record.address)

    async def _forget_function(self, function: Function) -> None:
        async with self._commit:
            function.leaving = True
            try:
                await self._save(self._functions)
            except FaasdError:
                function.leaving = False
                raise

    async def _save(self, functions: dict[str, Function]) -> None:
        records = [function.record for function in functions.values() if not function.leaving]
        await asyncio.to_thread(self._registry.save, records)

    def _get(self, name: str) -> Function:
        if name not in self._functions:
            raise NotFound(f"no function {name!r}: `faas list` shows those there are")
        return self._functions[name]

    async def describe_all(self) -> list[dict]:
        return [self._describe(self._functions[name]) for name in sorted(self._functions)]

    async def describe(self, name: str) -> dict:
        return self._describe(self._get(name))

    def _describe(self, function: Function) -> dict:
        return {**function.describe(), "port": self.settings.port}

    async def function_log(self, name: str) -> FunctionLog:
        return self._get(name).log

    async def remove(self, name: str) -> None:
        """Drain a function and remove its address, images and log. Raises NotFound, Conflict."""
        function = self._get(name)
        await self.begin_change(name, "removal")
        try:
            with self._registered():
                # Written down first: what is removed from here on must not come back half after a crash.
                await self._forget_function(function)
                await self._close_function(function)
                del self._functions[name]
                async with function.changing:
                    await asyncio.to_thread(shutil.rmtree, self._images_dir / name, True)
                function.log.remove()
                log.info("function=%s removed", name)
        finally:
            await self.end_change(name)


def parse_arguments(argv: list[str]) -> Settings:
    """Return the settings of a command line; exits with status 2 and a line on bad usage, as argparse does."""
    parser = argparse.ArgumentParser(prog="faasd.py", description="A serverless runtime for one Linux machine.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--state-dir", type=resolved_path, default="/var/lib/faasd", help="images, registry and logs")
    parser.add_argument("--run-dir", type=resolved_path, default="/run/faasd", help="control socket and containers")
    parser.add_argument("--subnet", type=checked(parse_subnet), default="10.0.0.0/24", metavar="CIDR",
                        help="functions get its addresses, from .10 up")
    parser.add_argument("--port", type=checked(parse_port), default="80", help="the port functions listen on")
    parser.add_argument("--runtime", default="runc", metavar="PROGRAM", help="an OCI runtime with runc's command line")
    parser.add_argument("--drain-timeout", type=checked(parse_duration), default="30", metavar="TIME",
                        help="how long running invocations may go on after SIGTERM")
    parser.add_argument("--max-image-size", type=checked(parse_size), default="16g", metavar="SIZE",
                        help="limit for an archive and for what it unpacks to")
    parser.add_argument("--max-image-entries", type=checked(parse_count), default=str(MAX_IMAGE_ENTRIES), metavar="N",
                        help="limit for the files of an image")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="of the daemon's own log")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every invocation")
    parser.add_argument("--version", action="version", version=f"faasd {__version__}")
    return Settings(**vars(parser.parse_args(argv)))


def checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Return parse as a type for argparse, which shows the message of an ArgumentTypeError only."""
    def convert(text: str):
        try:
            return parse(text)
        except BadRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return convert


def resolved_path(text: str) -> Path:
    """Return an absolute path without links: runc takes paths relative to the bundle, the mount table has real ones."""
    return Path(text).resolve()


def parse_subnet(text: str) -> ipaddress.IPv4Network:
    """Return an IPv4 network with room for an address from .10 up. Raises BadRequest."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise BadRequest(f"bad subnet: {error}; write 10.0.0.0/24") from None
    if network.num_addresses < 16:
        raise BadRequest(f"subnet {text} is too small: addresses start at .{FIRST_HOST}, so use /28 or larger")
    return network


def parse_port(text: str) -> int:
    """Return a TCP port. Raises BadRequest."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise BadRequest(f"bad port {text!r}: write a number from 1 to 65535")
    return int(text)


def check_machine(settings: Settings) -> None:
    """Raise UsageError if faasd cannot run here."""
    if os.geteuid() != 0:
        raise UsageError("faasd needs root, for namespaces, addresses and file owners: sudo ./faasd.py")
    if shutil.which(settings.runtime) is None:
        raise UsageError(f"no {settings.runtime} on this machine: apt install {Path(settings.runtime).name}, "
                         "or name an OCI runtime with --runtime")
    if shutil.which("ip") is None:
        raise UsageError("no ip command on this machine: apt install iproute2")
    longest = len(os.fsencode(settings.run_dir / "containers" / ("0" * 12) / "control.sock"))
    if longest > 107:                   # sun_path in unix(7), less the final NUL
        raise UsageError(f"--run-dir {settings.run_dir} is too long for the name of a Unix socket")


def make_directories(settings: Settings) -> None:
    """Make the directories that faasd owns. Raises UsageError."""
    try:
        settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("images", "logs", "tmp"):
            (settings.state_dir / name).mkdir(exist_ok=True)
            (settings.state_dir / name).chmod(0o700)    # devices and setuid files of images are for nobody on the host
    except OSError as error:
        raise UsageError(f"cannot make {error.filename}: {error.strerror}") from error


def lock_directory(directory: Path) -> BinaryIO:
    """Lock DIRECTORY/faasd.lock until the process ends. Raises UsageError if another daemon has it."""
    file = (directory / "faasd.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"faasd is already running on {directory}: stop it, or choose another --state-dir "
                         "and --run-dir") from None
    return file


async def serve(settings: Settings, network: Network) -> None:
    await Daemon(settings, network).run()


def main(argv: list[str]) -> int:
    """Run the daemon; return its exit status: 0 stopped, 1 failed, 2 called in a way that cannot work."""
    if argv[:1] == ["unpack"]:
        configure_logging(as_json=False, verbose=False)
        return unpack_main(argv[1:])
    settings = parse_arguments(argv)
    configure_logging(settings.log_format == "json", settings.verbose)
    try:
        check_machine(settings)
        make_directories(settings)
        with lock_directory(settings.run_dir), lock_directory(settings.state_dir):
            network = Network(settings.subnet)
            network.claim()
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # three descriptors an invocation
            asyncio.run(serve(settings, network))
    except FaasdError as error:
        print(f"faasd: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
