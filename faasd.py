#!/usr/bin/env python3
"""faasd: a serverless runtime for one Linux machine, in one process and one file.

An image is unpacked once into a plain directory. A function is an image, an address on `lo` and a few limits.
Every TCP connection accepted on that address is one invocation. By default it has a container of its own, started by
`runc run`. A handler gets the accepted socket itself over /control.sock with SCM_RIGHTS, a server from its own
accept(2), and any other program as its stdin and stdout (stdio). From then on client and program talk kernel to kernel;
faasd neither parses nor copies a byte of it.

    client            faasd                                 container (runc: own user, pid, mount, net, …)
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
    Entrance._accept       accept from a listener with TCP_DEFER_ACCEPT
    Invocation.serve       the rest of it, as one coroutine; what faasd itself answers is a Refusal
    Function.take_turn     in the queue; dispatch gives the client that waits longest a warm container, if there is one,
                           and Pool.reconcile starts whatever is missing
    Container.start        private directory, config.json, control.sock, runc run, wait for the connect
    Container.hand_over    one sendmsg with one descriptor
    Invocation._work       until Handover.said: end of file (or a READY byte) on the control connection, or runc's exit
    Invocation._conclude   no byte sent (TCP_INFO, which only Workers may ask)? then 502 or 504 on our duplicate
    Container.finish       the container exits or is killed, runc removes its cgroups, faasd its directory

One asyncio loop in the main thread owns listeners, containers, functions and the registry, so their state needs no
locks. What a container, a disk or the reader of our log can hold up is left to daemon threads (Workers, Supervisor,
Relay, Writer). The control API is a stdlib http.server with a thread for each connection, which calls into the loop. A
child process unpacks each image (unpack_main), or sends one (save_main): that is heavy, must not delay an invocation,
and is where hostile bytes are parsed.

SIGTERM drains and leaves nothing. SIGHUP leaves what serves a client to the next daemon. No container depends on the
daemon that started it, so after SIGHUP, and after a crash too, the next one finds them, takes duplicates of their
clients' sockets out of them (Leftovers.survivors), and goes on as if it had started them (Function.adopt).

On disk:
    STATE_DIR/registry.json                   functions and their addresses
    STATE_DIR/images/NAME/IMAGE/rootfs/       an unpacked image; IMAGE = first 12 hex digits of its digest
    STATE_DIR/images/NAME/IMAGE/image.json    what the image says about the process to run
    STATE_DIR/images/NAME/IMAGE/config.json   the image's config as it came, for `faas save`
    STATE_DIR/secrets/NAME/ID                 what --secret gave a function
    STATE_DIR/logs/NAME.log, NAME.log.1       output of the handlers and a line per invocation
    STATE_DIR/events.log, events.log.1        what became of functions, and by whom
    STATE_DIR/tmp/                            unpacking; emptied at start
    STATE_DIR/faasd.lock, RUN_DIR/faasd.lock  held by the one daemon of each
    RUN_DIR/faasd.sock                        control API
    RUN_DIR/net/NAME, resolv.conf.*           network namespaces of functions with --net egress, and their resolvers
    RUN_DIR/hosts/functions                   their names and addresses, as in hosts(5)
    RUN_DIR/program/                          this program, as the unpacking child runs it
    RUN_DIR/rootfs/                           where a container's root is mounted, in its runtime's mount namespace
    RUN_DIR/containers/ID/                    config.json, control.sock, output and note of one container, on a tmpfs
    RUN_DIR/runc/                             runc --root

Trusted: this host, and users who can open faasd.sock or have the token of --api (equivalent to root on this machine).
Not trusted: images, handlers and clients. Not done here: TLS, HTTP, load balancing, more than one machine.

Top to bottom, in the order in which a request meets it:
    Words                       units, errors, small tools
    What the user asks for      Options, FunctionRecord, Registry
    An invocation               Entrance, Function, Invocation, Refusal, TcpState
    The warm pool               Pool, Demand, Starter
    A container                 Container, Execution (a command of an operator's), OutputReader, Workers
    A server                    Supervisor, which answers accept(2), ClosedConnections
    What a container is made of its root, Bundle, seccomp, Runtime, Cgroups
    Its place on this machine   IdRanges, Addresses, ListenerStore, AddressGuard
    Networks                    EgressNetworks (--net egress), PublishedPorts (--publish)
    Where containers live       ContainerHost, the trial container at start, Leftovers of the daemon before
    Logs and metrics            FunctionLog, Events, Statistics
    Images                      Archive, LayerApplier, resolve_process in the unpacking child; SavedLayer in the saving
    Control API                 ControlServer, ControlHandler, Relay, Answers
    Deploys                     ImageStore, Attachments (addresses, networks), Deploys: deploy, change, remove
    The daemon                  Restart, Daemon: start and stop
    The command line            parse_arguments, what must be so at start, main
"""

from __future__ import annotations

import sys

# Before 3.8 Python cannot read this file. Its complaint shows the first line that it does not understand: this one.
if (needs_python_3_11_or_newer := sys.version_info) < (3, 11):
    print("faasd: needs Python 3.11 or newer, and this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import _thread
import argparse
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import ctypes
import decimal
import enum
import errno
import fcntl
import functools
import gc
import grp
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import platform
import posixpath
import pwd
import queue
import re
import resource
import secrets
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tarfile
import termios
import threading
import time
import tty
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tarfile import TarInfo
from typing import Any, BinaryIO, NamedTuple, NoReturn

__version__ = "0.2.0"               # and in faas; what is new is in CHANGELOG.md

log = logging.getLogger("faasd")
libc = ctypes.CDLL(None, use_errno=True)        # lets other threads run while it is called

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


# ---------------------------------------------------------------------------------------------------------------------
# Words: units, errors, and small tools that every part uses
# ---------------------------------------------------------------------------------------------------------------------

MAX_MESSAGE = 600                   # characters of an error message


class FaasdError(Exception):
    """Any failure that a user may see: str() is one line that says what is wrong and what to do."""

    status = 500                        # of the HTTP answer

    def __init__(self, message: str, output: Iterable[str] = (), status: int | None = None):
        # Names and tags out of an image go into messages: they must not move a cursor, nor fill a screen.
        line = escape_controls(" ".join(message.split()))
        super().__init__(line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "…")
        self.output = list(output)      # lines of a handler that explain it
        if status is not None:
            self.status = status


class UsageError(FaasdError):
    """The daemon cannot start as it was called; exit status 2."""


class BadRequest(FaasdError, argparse.ArgumentTypeError):
    """A text from a user is not what it should be. On the command line, argparse shows the message."""
    status = 400


class Conflict(FaasdError):
    """Not now, or not on this machine."""
    status = 409


class ImageError(FaasdError):
    """The archive is not an image that can run here."""
    status = 400


def storage_error(error: OSError, doing: str) -> FaasdError:
    """Return the error a user should see for a failed file operation: 507 if the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FaasdError(f"{doing}: no space left on the device; free some and try again", status=507)
    return FaasdError(f"{doing}: {error.strerror or error}")


def escape_controls(text: str) -> str:
    """Return text with controls and line separators, but not tab, escaped: it can forge no line and move no cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def quote(text: str, most: int) -> str:
    """Return text in quotes, cut if it is too long; nothing in it looks like the end of a field."""
    escaped = escape_controls(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{escaped}"' if len(escaped) <= most else f'"{escaped[:most]}…"'


def show(path: bytes) -> str:
    """Return a path of an image for a message, the beginning of a long one."""
    shown = path if len(path) <= MAX_NAME_LENGTH else path[:MAX_NAME_LENGTH] + "…".encode()
    return escape_controls(shown.decode("utf-8", "backslashreplace"))


SIZE_UNITS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB}
DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def reader(what: str, pattern: str, advice: str, value: Callable[[re.Match], Any] = re.Match.group,
           most: float = math.inf) -> Callable:
    """Return a function that reads a text of a pattern, and raises BadRequest for any other, and what is over most."""
    def read(text: str) -> Any:
        match = re.fullmatch(pattern, text)
        if not match or most < math.inf and value(match) > most:
            raise BadRequest(f"bad {what} {text!r}: {advice}")
        return value(match)
    return read


parse_size = reader("size", r"(?ai)\s*([0-9]{1,15})([bkmg]?)b?\s*", "write 512m, 1g or a number of bytes, "
                    "at most 1048576g", lambda match: int(match[1]) * SIZE_UNITS[match[2].lower()], 1 << 50)
parse_duration = reader("duration", r"(?ai)\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|)\s*",
                        "write 500ms, 30s, 5m or a number of seconds, at most 8760h",
                        lambda match: float(match[1]) * DURATION_UNITS[match[2].lower()], 8760 * 3600)
parse_count = reader("number", r"(?!0+$)[0-9]{1,12}", "write a whole number from 1 on", lambda match: int(match[0]))
parse_amount = reader("number", r"[0-9]{1,12}", "write a whole number from 0 on", lambda match: int(match[0]))
check_name = reader("function name", r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",         # a DNS label (RFC 1123)
                    "use 1 to 63 of a-z, 0-9 and '-', not at either end")


def read_text(path: str | Path) -> str:
    """Return a file's text, "" if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def try_remove(path: str | Path, remove: Callable[[str | Path], None] = os.unlink) -> None:
    """Remove a file, or with os.rmdir a directory, if it is there; failure is logged. Takes no descriptor."""
    try:
        with contextlib.suppress(FileNotFoundError):
            remove(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error.strerror)


def write_anew(path: Path, text: str, beside: Path | None = None) -> None:
    """Put a file at path as a whole, made in its directory, or in beside where somebody may read all of that."""
    new = (beside or path.parent) / (path.name + ".new")
    new.write_text(text)
    new.chmod(0o644)
    new.rename(path)                    # containers that have the one before keep it


def run_command(what: str, *argv: str, stdin: str = "") -> str:
    """Run a short-lived tool to its end and return what it prints. Raises FaasdError, which says what failed."""
    try:
        result = subprocess.run(argv, input=stdin, capture_output=True, text=True, errors="replace", timeout=30,
                                check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FaasdError(f"{what}: cannot run {argv[0]}: {error}") from error
    if result.returncode != 0:
        said = result.stderr.strip() or f"{argv[0]} exited with status {result.returncode}"
        raise FaasdError(f"{what}: {said.splitlines()[0]}")
    return result.stdout


@contextlib.contextmanager
def failure_logged(level: int = logging.ERROR) -> Iterator[None]:
    """Log the FaasdError that ends the block, if one does, instead of raising it."""
    try:
        yield
    except FaasdError as error:
        log.log(level, "%s", error)


def try_command(what: str, *argv: str) -> bool:
    """Run a tool and log its failure; return whether it succeeded."""
    with failure_logged(logging.WARNING):
        run_command(what, *argv)
        return True
    return False


def system_call(number: int, *arguments: int | bytes) -> int:
    """Make a system call that Python has no name for, with numbers and pointers to bytes. Raises OSError."""
    words = [ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_long(word) for word in arguments]
    return succeeded(libc.syscall(ctypes.c_long(number), *words))


def succeeded(result: int) -> int:
    """Return what a function of libc has returned. Raises OSError if it has failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextlib.contextmanager
def kept_open(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def opened(path: str | Path, flags: int, directory: int | None = None) -> contextlib.AbstractContextManager[int]:
    """Open a file, by no link at its end, for as long as the block takes. Raises OSError."""
    return kept_open(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))


def read_mountinfo(path: str = "/proc/self/mountinfo") -> Iterator[tuple[list[str], list[str]]]:
    """Yield the fields of each mount (proc_pid_mountinfo(5)), before and after the dash, in order of mounting.

    The kernel escapes space, tab, newline and backslash. The rest of a name is chosen by users who may mount (FUSE) and
    images with volumes: it may have what Python takes for the end of a line or of a word, or for no text at all.
    """
    for line in Path(path).read_bytes().split(b"\n")[:-1]:
        before, _, after = os.fsdecode(line).partition(" - ")
        yield ([re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in before.split(" ")],
               after.split(" "))


def read_mounts() -> list[tuple[str, str]]:
    """Return mount point and file system type of every mount, in order of mounting."""
    return [(before[4], after[0]) for before, after in read_mountinfo()]


def timestamp() -> str:
    """Return the time for people and machines: RFC 3339, UTC, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def is_readable(sock: socket.socket | int, seconds: float, events: int = select.POLLIN) -> bool:
    """Return whether there is something to read within so many seconds; select(2) takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(max(seconds, 0) * 1000))


def write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data):]


def settle(future: asyncio.Future, outcome: Any) -> None:
    """Give a future its result, or the exception that came instead, unless it is done: another may have come first."""
    if isinstance(outcome, Exception) and not future.done():
        future.set_exception(outcome)
    elif not future.done():
        future.set_result(outcome)


async def to_the_end(coroutine):
    """Run a coroutine and return its result, even if our task is cancelled meanwhile: half of it would be worse."""
    task = asyncio.ensure_future(coroutine)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    return task.result()


# ---------------------------------------------------------------------------------------------------------------------
# What the user asks for: options, functions, and the registry that keeps them
# ---------------------------------------------------------------------------------------------------------------------


def option(default: Any, read: Callable[[str], Any], fits: Callable[[Any], bool] = lambda value: True, must: str = ""
           ) -> Any:
    """Return a field of Options: its default, what reads a user's text, which values fit, and what to say of others."""
    return field(default=default, metadata={"read": read, "fits": fits, "must": must})


CPUS = os.cpu_count() or 1
# From 0.01 on. Only what a user asks for is held against this machine: a function may have moved.
read_cpus = reader("number of cpus", r"(?!0+(\.0|\.00[0-9]?)?$)[0-9]{1,4}(\.[0-9]{1,3})?",
                   f"write 0.5, 1 or 2; this machine has {CPUS}", lambda match: float(match[0]), CPUS)
read_pids = reader("number of pids", r"(?!0+$)[0-9]{1,12}", "write a whole number from 1 to 4194304, the kernel's most",
                   lambda match: int(match[0]), 1 << 22)
read_switch = reader("switch", "true|false", "write true or false", lambda match: match[0] == "true")


@dataclass(frozen=True)
class Options:
    """What a user chose for a function; the defaults are the product's.

    A new option is a line here, a row of OPTIONS in faas, and one of the table in README.md: test_units compares them.
    """
    memory: int = option(512 * MIB, parse_size,         # bytes, swap included; runc's own init runs inside the limit
                         lambda size: 6 * MIB <= size <= 1 << 50, "be at least 6m: less does not start a container")
    cpus: float = option(1.0, read_cpus)
    pids: int = option(64, read_pids)                   # processes and threads
    timeout: float = option(30.0, parse_duration)       # seconds from hand-over to the end of the handler; 0: none
    start_timeout: float = option(10.0, parse_duration, lambda seconds: seconds > 0, "be over 0")   # until the connect
    concurrency: int = option(64, parse_count)          # invocations at a time
    queue: int = option(1024, parse_amount)             # connections that wait for one of these to end
    queue_timeout: float = option(10.0, parse_duration, lambda seconds: seconds > 0, "be over 0")   # until the 503
    warm: int | None = option(None, reader("number", r"[0-9]{1,12}|auto", "write auto, or a whole number from 0 on",
                                           lambda match: None if match[0] == "auto" else int(match[0])))
    reuse: int = option(1, parse_amount)                # invocations that one container may serve; 0: no limit
    share: int = option(1, parse_count)                 # … at a time, of a server
    contract: str = option("auto", reader("contract", "auto|handler|server|stdio",
                                            "write auto, handler, server or stdio"))
    port: int | None = option(None, reader("port", r"auto|[0-9]{1,5}", "write auto, or a number from 1 to 65535",
                                           lambda match: None if match[0] == "auto" else int(match[0])),
                              lambda port: port is None or 0 < port < 1 << 16, "be from 1 to 65535")     # a server's
    speaks_first: bool = option(False, read_switch)     # the program; clients are let in before they say anything
    net: str = option("none", reader("net", "none|egress|host", "write none, egress or host"))
    publish: str = option("", lambda text: read_places(text))           # [ADDRESS:]PORT of this machine, by commas
    read_only: bool = option(False, read_switch)        # the root
    shm_size: int = option(64 * MIB, parse_size, lambda size: size > 0, "be over 0")        # of /dev/shm
    hostname: str = option("", reader("hostname", r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?|",
                                      "use letters, digits, '-' and '.', at most 64"))      # "": the function's name
    user: str = option("", str)                         # as an image's User; "": the image's
    workdir: str = option("", reader("workdir", r"(/.*)?", "write an absolute path"))       # "": the image's
    entrypoint: str = option("auto", str)               # instead of Entrypoint and Cmd; "": none; auto: the image's
    cap_add: str = option("", lambda text: read_capabilities(text))     # names, separated by commas
    cap_drop: str = option("", lambda text: read_capabilities(text))
    volume: str = option("", lambda text: read_volumes(text))           # HOST:PATH[:ro], separated by commas
    env: tuple[str, ...] = ()                           # KEY=value
    cmd: tuple[str, ...] = ()                           # in the place of the image's Cmd

    def changed(self, query: dict[str, list[str]]) -> Options:
        """Return the options with what a query names in the place of what was; env is merged. Raises BadRequest."""
        readers = {entry.name: entry.metadata["read"] for entry in fields(self) if entry.metadata}
        values: dict = {"cmd": ()} if "unset_cmd" in query else {}
        env = merge_env(self.env, query.get("env", []))
        for key, texts in query.items():
            if key in readers:
                values[key] = readers[key](texts[-1])
            elif key == "cmd":
                values[key] = tuple(texts)
            elif key == "unset_env":
                env = [entry for entry in env if entry.partition("=")[0] not in texts]
            elif key not in ("env", "unset_cmd"):
                raise BadRequest(f"unknown option {key!r}")
        return replace(self, env=tuple(env), **values).check()

    def chosen(self) -> dict:
        """Return what is not the default, as JSON."""
        defaults = Options().to_json()
        return {key: value for key, value in self.to_json().items() if value != defaults[key]}

    def kept(self, query: dict[str, list[str]]) -> dict:
        """Return what was chosen before the query that has changed options to these, and what it does not name."""
        named = {entry.partition("=")[0] for entry in query.get("env", [])}
        env = [entry for entry in self.env if entry.partition("=")[0] not in named]
        kept = {key: value for key, value in self.chosen().items() if key not in query and key != "env"}
        return kept | ({"env": env} if env else {})

    def check(self) -> Options:
        """Return self. Raises BadRequest for values that do not fit, TypeError for those of another type."""
        kinds = {"int": int, "float": (int, float), "int | None": (int, type(None)), "str": str, "bool": bool,
                 "tuple[str, ...]": tuple}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, kinds[entry.type]):
                raise TypeError(f"{entry.name} is {value!r}")
            if entry.metadata and not entry.metadata["fits"](value):
                raise BadRequest(f"{entry.name.replace('_', '-')} must {entry.metadata['must']}")
        for entry in self.env:
            if not re.fullmatch(r"[^=\0]+=[^\0]*", entry, re.DOTALL):
                raise BadRequest(f"bad environment entry {entry!r}: write KEY=value")
        if "\0" in "".join([self.entrypoint, *self.cmd]):
            raise BadRequest("the command has a NUL byte")
        if self.contract == "stdio" and (self.reuse, self.share) != (1, 1):
            raise BadRequest("with --contract stdio a container serves one client: leave out --reuse and --share")
        return self

    @classmethod
    def from_json(cls, document: dict) -> Options:
        """Return what to_json wrote. Raises TypeError, KeyError, and FaasdError for what a newer faasd wrote."""
        check_known(document, cls)
        chosen = {key: None if value == "auto" else value for key, value in document.items() if key in ("warm", "port")}
        return cls(**{**document, "env": tuple(document["env"]), "cmd": tuple(document["cmd"]), **chosen})

    def to_json(self) -> dict:
        return {key: "auto" if value is None else value for key, value in asdict(self).items()}

    def to_labels(self) -> dict[str, str]:
        """Return what differs from the defaults as labels of an image, for labelled."""
        def text(value: Any) -> str:
            if isinstance(value, float):
                return f"{value:.6f}".rstrip("0").rstrip(".")
            return str(value).lower() if isinstance(value, bool) else str(value)
        return {LABEL + name.replace("_", "-"): text(value) for name, value in self.chosen().items()
                if name in LABELLED + NOT_LABELLED}

    def labelled(self, labels: dict[str, str], known: Collection[str]) -> Options:
        """Return the options with what an image's labels choose, but for those that are known. Raises ImageError."""
        options = self
        for label, text in labels.items():
            name = label.removeprefix(LABEL).replace("-", "_")
            if not label.startswith(LABEL) or name in known or name not in LABELLED + NOT_LABELLED:
                continue
            if name in NOT_LABELLED:
                raise ImageError(f"the image's label {label} asks for {text!r}, which only you can give: say "
                                 f"--{name.replace('_', '-')}")
            try:
                options = options.changed({name: [text]})
            except BadRequest as error:
                raise ImageError(f"the image's label {label}: {error}") from None
        return options


def check_known(part: dict, kind: type) -> None:
    """Raise FaasdError for what a newer faasd wrote: it is neither damaged nor to be lost."""
    if unknown := part.keys() - {entry.name for entry in fields(kind)}:
        raise FaasdError(f"the registry has options that this faasd does not know ({', '.join(sorted(unknown))}): "
                         "use the faasd that wrote it")


LABEL = "faasd."                    # how labels begin that carry options of a function: faasd.memory
LABELLED = ("memory", "cpus", "pids", "timeout", "start_timeout", "concurrency", "queue", "queue_timeout", "warm",
            "reuse", "share", "contract", "port", "speaks_first", "read_only", "shm_size", "hostname", "cap_drop")
NOT_LABELLED = ("net", "cap_add")   # an image that comes from anywhere must not open its own sandbox

# What docker gives a container by itself (moby, oci/caps/defaults.go): of these a user may choose.
CAPABILITIES = """CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE
                  SYS_CHROOT KILL AUDIT_WRITE""".split()


def read_capabilities(text: str) -> str:
    """Return names of capabilities as we write them: docker takes CAP_ before them, ALL, and any case."""
    names = [name.strip().upper().removeprefix("CAP_") for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*CAPABILITIES, "ALL"):
            raise BadRequest(f"bad capability {name!r}: write ALL, or some of {', '.join(CAPABILITIES)}")
    return ",".join(dict.fromkeys(names))


def split_place(text: str) -> tuple[str, int]:
    """Return the address, "" for any, and the port of an [ADDRESS:]PORT here. Raises ValueError, BadRequest."""
    address, _, port = text.rpartition(":")
    return str(ipaddress.IPv4Address(address)) if address not in ("", "0.0.0.0") else "", parse_port(port)


def read_places(text: str) -> str:
    """Return what --publish names as we write it. Raises BadRequest."""
    try:
        places = [split_place(place) for place in text.split(",") if place]
    except (ValueError, BadRequest):
        raise BadRequest(f"bad place to publish {text!r}: write PORT, or ADDRESS:PORT of this machine") from None
    return ",".join(dict.fromkeys(f"{address}:{port}".removeprefix(":") for address, port in places))


def places_of(options: Options) -> list[tuple[str, int]]:
    return [split_place(place) for place in options.publish.split(",") if place]


@dataclass(frozen=True)
class Volume:
    """A directory or a file of the host's that containers have at a path (--volume)."""
    host: str
    path: str
    read_only: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.path}{':ro' if self.read_only else ''}"


def volumes_of(text: str) -> list[Volume]:
    volumes = []
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"(/[^:\0]*):(/[^:\0]*?)(:ro|:rw)?", entry)
        if not match:
            raise BadRequest(f"bad volume {entry!r}: write HOST:PATH or HOST:PATH:ro, both absolute, without : and ,")
        host, path = ("/" + posixpath.normpath(match[number]).lstrip("/") for number in (1, 2))
        volumes.append(Volume(host, path, match[3] == ":ro"))
    return volumes


def read_volumes(text: str) -> str:
    """Return what --volume names as we write it. Raises BadRequest."""
    return ",".join(dict.fromkeys(map(str, volumes_of(text))))


SECRET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_SECRET = 32 * KIB               # bytes; base64 of one fits in the head of a request
MAX_SECRETS = 64                    # of a function


def pop_secrets(query: dict[str, list[str]]) -> dict[str, bytes | None]:
    """Take a query's secrets out of it: their new values by name, None for one to remove. Raises BadRequest."""
    secrets: dict[str, bytes | None] = dict.fromkeys(query.pop("unset_secret", []))
    # They are NAME=BASE64, separated by commas, and come in a header: see ControlHandler.
    for entry in filter(None, ",".join(query.pop("secret", [])).split(",")):
        name, sign, text = entry.strip().partition("=")
        try:
            secrets[name] = value = base64.b64decode(text, validate=True)
        except ValueError:
            sign = ""
        if not sign:
            raise BadRequest("a secret is not NAME=BASE64")     # no more of it, for messages are logged
        if len(value) > MAX_SECRET:
            raise BadRequest(f"the secret {name[:63]} has {len(value)} bytes, over {MAX_SECRET} (MAX_SECRET)")
    for name in secrets:
        if not SECRET_NAME.fullmatch(name):
            raise BadRequest(f"bad name of a secret {name[:63]!r}: use 1 to 63 letters, digits, '.', '_' and '-'")
    return secrets


def merge_env(base: Iterable[str], overrides: Iterable[str]) -> list[str]:
    """Return entries KEY=value, each key once: where it comes first, with the value that comes last."""
    return list({entry.partition("=")[0]: entry for entry in (*base, *overrides)}.values())


@dataclass
class VersionRecord:
    """A version is an image with its options, which a function runs, or ran and can be rolled back to."""
    number: int                 # counts up from 1
    image: str                  # first 12 hex digits of its digest: its directory, which versions share
    deployed: str               # RFC 3339: when it last became the one that runs
    options: Options
    contract: str = "handler"   # how it takes its clients, handler, server or stdio, as was seen when it was proved
    port: int = 0               # a server's
    labelled: list[str] = field(default_factory=list)       # options that the image's labels chose, and no user
    named: list[str] = field(default_factory=list)          # options that a user chose, be it the default
    created: str = ""           # RFC 3339; "": an older faasd did not note it

    @property
    def chosen(self) -> Options:
        """What a user chose, whatever the image is."""
        defaults = Options()
        return replace(self.options, **{name: getattr(defaults, name) for name in self.labelled})


NO_VERSION = VersionRecord(0, "", "", Options())        # what a first deploy and --reset start from


@dataclass
class FunctionRecord:
    """What the registry keeps of a function."""
    name: str
    address: str
    first_id: int               # host id of its containers' root
    created: str                # RFC 3339
    updated: str
    versions: list[VersionRecord]       # the one that runs first, then those that ran before, latest first
    secrets: dict[str, str] = field(default_factory=dict)       # by name, the file that has it: see Secrets
    highest: int = 0            # number of any version, kept or not: none is used again

    def __post_init__(self):
        self.highest = max([self.highest, *(entry.number for entry in self.versions)])

    @classmethod
    def from_json(cls, document: dict) -> FunctionRecord:
        """Return what to_json wrote. Raises KeyError, TypeError, FaasdError."""
        for part, kind in ((document, cls), *((entry, VersionRecord) for entry in document["versions"])):
            check_known(part, kind)
        versions = [VersionRecord(**{**entry, "options": Options.from_json(entry["options"])})
                    for entry in document["versions"]]
        document = {"secrets": {}, "highest": 0, **document}        # an older faasd had none
        return cls(**{**{entry.name: document[entry.name] for entry in fields(cls)}, "versions": versions})

    def to_json(self) -> dict:
        versions = [{**asdict(entry), "options": entry.options.to_json()} for entry in self.versions]
        return {**asdict(self), "versions": versions}

    def check(self) -> FunctionRecord:
        """Return self. Raises BadRequest, ValueError, TypeError if somebody has edited it into no function of ours."""
        check_name(self.name)
        facts = [(str(ipaddress.IPv4Address(self.address)) == self.address, f"the address {self.address!r}"),
                 (self.versions, "no version"),
                 (isinstance(self.highest, int), f"the highest version {self.highest!r}"),
                 (isinstance(self.first_id, int) and self.first_id >= IDS, f"the ids {self.first_id!r}"),
                 (isinstance(self.created, str) and isinstance(self.updated, str), "a time that is no text")]
        facts += [(SECRET_NAME.fullmatch(secret) and CONTAINER_ID.fullmatch(file), f"a secret {secret!r} in {file!r}")
                  for secret, file in self.secrets.items()]
        for entry in self.versions:
            entry.options.check()
            facts += [(re.fullmatch(r"[0-9a-f]{12}", entry.image), f"the image {entry.image!r}"),
                      (isinstance(entry.number, int) and entry.number > 0, f"a version {entry.number!r}"),
                      (isinstance(entry.port, int), f"the port {entry.port!r}"),
                      (entry.contract in ("handler", "server", "stdio"), f"the contract {entry.contract!r}"),
                      ({*LABELLED}.issuperset(entry.labelled), f"options of labels {entry.labelled!r}"),
                      (all(isinstance(text, str) for text in (entry.created, entry.deployed, *entry.named)),
                       "a time or an option that is no text")]
        for fits, what in facts:
            if not fits:
                raise ValueError(f"function {self.name} has {what}")
        return self

    @property
    def version(self) -> int:
        return self.versions[0].number

    @property
    def options(self) -> Options:
        return self.versions[0].options


def upgraded(function: dict) -> dict:
    """Return a function of format 3, that of faasd 0.1.0, in ours: there a version was an image, and had no number."""
    versions = [{"number": number, "image": entry["version"], **{key: entry[key] for key in entry if key != "version"}}
                for number, entry in zip(itertools.count(len(function["versions"]), -1), function["versions"])]
    return {**function, "versions": versions}


class Registry:
    """STATE_DIR/registry.json: every change replaces the file as a whole, so that it is never half written."""
    FORMAT = 4

    def __init__(self, path: Path):
        self._path, self._new = path, path.with_name(f".{path.name}.new")

    def load(self) -> list[FunctionRecord]:
        """Return the functions. Raises FaasdError if the file is damaged or newer; it is never overwritten."""
        try:
            document = json.loads(self._path.read_text())
            written = document["format"]
            if written not in (3, self.FORMAT):
                raise FaasdError(f"{self._path} has format {written!r}, this faasd knows 3 and {self.FORMAT}: use the "
                                 "faasd that wrote it")
            functions = map(upgraded, document["functions"]) if written == 3 else document["functions"]
            records = [FunctionRecord.from_json(entry).check() for entry in functions]
            for what in ("name", "address", "first_id"):
                for value, count in collections.Counter(getattr(record, what) for record in records).items():
                    if count > 1:
                        raise ValueError(f"{count} functions have the {what} {value}")
            return records
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FaasdError(f"cannot read {self._path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BadRequest) as error:
            damage = f"no {error}" if isinstance(error, KeyError) else error
            raise FaasdError(f"{self._path} is damaged ({damage}): restore it from a backup, or move it away to start "
                             "without functions, which removes their images") from error

    def save(self, records: Iterable[FunctionRecord]) -> None:
        """Write the functions to disk, for good. Raises FaasdError; the file is then as it was."""
        document = {"format": self.FORMAT, "functions": [record.to_json() for record in records]}
        try:
            # Only for root: options have environment variables, which may be secrets.
            with open(os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            self._new.rename(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):      # whatever is there does not get better by our trying
                self._new.unlink()
            raise storage_error(error, "writing the registry") from None
        try:
            with opened(self._path.parent, os.O_RDONLY) as directory:
                os.fsync(directory)
        except OSError as error:            # to say that nothing was written would be wrong
            log.error("%s is written, but may be an older one after a power loss: %s", self._path, error.strerror)

    def clear(self) -> None:
        """Remove what a daemon that was killed had begun to write. Raises OSError."""
        self._new.unlink(missing_ok=True)


def sync_file_system(path: Path) -> None:
    """Return when all that was written to the file system of path is on its disk. Blocks. Raises FaasdError."""
    try:
        with opened(path, os.O_RDONLY) as descriptor:
            succeeded(libc.syncfs(descriptor))          # to fsync thousands of files takes ten times as long and more
    except OSError as error:
        raise storage_error(error, "writing the image to disk") from None


class Version:
    """What runs a version: made of its record, whose contract may be auto and port 0: not known yet."""

    def __init__(self, name: str, directory: Path, image: dict, record: VersionRecord, host: ContainerHost,
                 secrets: dict[str, str]):
        """secrets are the files that have them, by name."""
        self.image, self.record, self.options, self.secrets = image, record, record.options, secrets
        self.command = command_line(image["process"], record.options)
        self.bundle = Bundle(name, image, record.options, directory / "rootfs", host.run_dir, host.cgroups,
                             host.apparmor, (), record.contract, record.port, record.number)


# ---------------------------------------------------------------------------------------------------------------------
# An invocation: from accept to the end of the connection
# ---------------------------------------------------------------------------------------------------------------------


class Release(enum.Enum):
    """How a handler let go of a client, by its control connection; or why we no longer wait for that."""
    READY = "it could take another client"
    GONE = "it closed the connection, exited, or broke the protocol"
    UNTAKEN = "it closed the connection without having taken the client"
    OVERDUE = "it did not finish in time"
    STOPPED = "faasd is stopping, or the function is being removed"
    LEFT = "it is the next daemon's"


class Refusal(Exception):
    """An invocation ends without a handler's answer: how that is counted, and what faasd says, if there is a status."""

    def __init__(self, outcome: str, status: int = 0, reason: str = ""):
        super().__init__(reason)
        self.outcome, self.status, self.reason = outcome, status, reason


STOPPED = "stopped", 503, Release.STOPPED.value
# What a program did for which we end its container, though it serves a client.
OUT_OF_MEMORY = "out-of-memory", 502, "ran out of memory"
OVERDUE = "timeout", 504, "did not finish in time"


class Services(NamedTuple):
    """What all functions share."""
    host: ContainerHost
    starter: Starter
    limit: WarmLimit
    hangups: HangupWatch
    silent: Crowd               # clients that were accepted and have said nothing yet
    answering: Crowd            # clients that get an answer of our own
    lag: LoopLag
    logs: Writer                # of the functions' logs
    events: Events


class Tasks(set):
    """Tasks that are under way, held because the loop does not. One that fails is a fault of ours, and is logged."""

    def __init__(self, what: str):
        super().__init__()
        self._what = what

    def start(self, coroutine) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task) -> None:
        self.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed inside faasd", self._what, exc_info=error)

    def cancel(self) -> None:
        for task in self:
            task.cancel()

    async def finish(self) -> None:
        """Return when all are done."""
        while self:
            await asyncio.wait(self)


DEFER_ACCEPT_SECONDS = 15           # TCP_DEFER_ACCEPT; the kernel rounds up to its SYN-ACK retransmissions (tcp(7))
IP_MINTTL = 21                      # of a packet's TTL (linux/in.h)
SO_MEMINFO = 55                     # a socket's memory counters; the last is the number of packets it has dropped
ARRIVAL_SECONDS = 0.1               # for a client whose connection is there to say something, when we stop
SYN_SECONDS = 1.1                   # after which a client has asked again (TCP_TIMEOUT_INIT, linux/net/tcp.h)
FIRST_BYTE_SECONDS = 75             # for what is accepted without data; load balancers keep such ready for 60 s
ACCEPT_BATCH = 64                   # connections accepted before other events get their turn
ACCEPT_PAUSE = 0.5                  # seconds without accepting when descriptors have run out


class Entrance:
    """Accepts a function's connections, and lets in those on which a client has said something, unless it need not."""

    def __init__(self, function: Function):
        self._function = function
        self._loop = function.loop
        self._listener: socket.socket | None = None
        self._silent = Tasks(f"function={function.record.name} waiting for a request")

    def open(self, listener: socket.socket) -> None:
        """Take connections from a listening socket, which becomes ours."""
        self._listener = listener
        self.turn_away(False)           # a daemon that was killed may have done so
        self.defer()
        self._loop.add_reader(listener, self._accept)

    def turn_away(self, newcomers: bool = True) -> None:
        """Have the kernel drop what asks for a connection, but complete those that it has begun.

        That is packets that may have come by a router, to a socket that listens: what it accepts inherits the rule.
        """
        if self._listener is not None:
            self._listener.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 255 if newcomers else 0)

    @property
    def has_turned_away(self) -> bool:
        return self._listener is not None and any(self._listener.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)[32:])

    def defer(self) -> None:
        """Have the kernel show us connections with data only (tcp(7)), unless the program speaks first."""
        if self._listener is not None:
            seconds = 0 if self._function.record.options.speaks_first else DEFER_ACCEPT_SECONDS
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, seconds)

    def close(self, end: Callable[[socket.socket], None]) -> None:
        """Accept what the kernel has completed already, and no more; end closes the listening socket."""
        if self._listener is not None:
            while self._accept():
                continue
            self._loop.remove_reader(self._listener)
            end(self._listener)
            self._listener = None
        self._silent.cancel()

    def _accept(self) -> bool:
        """Take connections that are there; return whether there may be more."""
        listener, services = self._listener, self._function.services
        for _ in range(ACCEPT_BATCH):
            try:
                services.host.descriptors.check_client()
                client, (host, port) = listener.accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:
                continue
            except OSError as error:            # EMFILE, ENFILE, ENOBUFS, ENOMEM: trying again at once would spin
                log.error("function=%s cannot accept: %s", self._function.record.name, error.strerror)
                self._loop.remove_reader(listener)
                self._loop.call_later(ACCEPT_PAUSE, lambda: self._listener is listener and self.open(listener))
                return False
            client.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 0)      # a daemon that was killed may have turned away too
            services.lag.probe()
            self._receive(client, f"{host}:{port}")
        return True

    def _receive(self, client: socket.socket, peer: str) -> None:
        """Let in a client that has said something, or waits for the program to.

        TCP_DEFER_ACCEPT has normally waited for that. After its time, and when the kernel falls back to SYN cookies,
        a connection is accepted without data; it still costs no container until there is some.
        """
        request = peek(client)
        if request or self._function.record.options.speaks_first:
            self._function.begin(Invocation(self._function, client, peer, request or b"", self._loop.time()))
        elif request is None:
            self._silent.start(self._await_request(client, peer))
        else:
            client.close()

    async def _await_request(self, client: socket.socket, peer: str) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            if await self._function.services.silent.hear(client, peer, FIRST_BYTE_SECONDS):
                self._receive(client, peer)
                return
        client.close()


MAX_TRIES = 2                       # hand-overs of a client whose container dies before it has taken it
LONG_START_SECONDS = 1.0            # of waiting: such a client is served first when a daemon leaves
OFFER_SECONDS = 3.0                 # for a server to accept a client, when a daemon leaves: all newcomers wait for that
SCARCE_QUEUE = 16                   # connections that wait for one function while few descriptors are left


class Function:
    """Gives each client of one address a container of its own. Lives on the loop's thread."""

    def __init__(self, record: FunctionRecord, services: Services, log_: FunctionLog, addresses: Addresses):
        self.record, self._addresses = record, addresses
        self.log = log_
        self.pool: Pool | None = None           # None: it could not be brought back
        self.error = ""                         # why that is so, or not all of it was
        self.being_removed = False              # no longer written down
        self.draining = False                   # serves those it has accepted, and nobody else
        self.told_back_off = -math.inf          # loop time of the last back-off event
        self.demand = Demand()
        self.statistics = Statistics()
        self.services = services
        self.loop = services.host.loop
        self.entrance = Entrance(self)
        self.waiting: collections.OrderedDict[Invocation, None] = collections.OrderedDict()
        self.in_flight: set[Invocation] = set()         # a handler has, or had, the client, and we have it still
        self.executions: set[asyncio.Task] = set()      # commands of operators
        self._invocations = Tasks(f"function={record.name} an invocation")
        self.retirements = Tasks(f"function={record.name} a retirement")      # of versions, until no container is left
        self._warnings = Warnings(record.name, self.loop)

    @property
    def running(self) -> int:
        """Invocations that have not fully ended, other than those that wait."""
        return len(self._invocations) - len(self.waiting)

    @property
    def entitled(self) -> int:
        """How many of the clients that wait may be served now."""
        return max(0, min(len(self.waiting), self.record.options.concurrency - self.taken))

    @property
    def taken(self) -> int:
        """How many of the --concurrency places are in use."""
        return len(self.in_flight) + len(self.executions)

    @property
    def patient_until(self) -> float:
        """The loop time until which clients wait for a container to come back; -inf if none does."""
        if not self.waiting or self.record.options.reuse == 1:
            return -math.inf
        return next(iter(self.waiting)).accepted + self.demand.patience

    @property
    def wanted(self) -> int:
        """How many containers should be started, or be starting, for clients that wait."""
        if self.loop.time() < self.patient_until:
            return max(0, self.entitled - len(self.in_flight))
        share, reuse = self.record.options.share, self.record.options.reuse
        at_a_time = min(share, reuse or share) if self.record.versions[0].contract == "server" else 1
        return math.ceil(self.entitled / at_a_time)

    # -- clients --

    def begin(self, invocation: Invocation) -> None:
        self.statistics.requests += 1
        self._invocations.start(invocation.serve())

    def admit(self, invocation: Invocation) -> None:
        """Raise Refusal if a client cannot wait here."""
        if was_reset(invocation.client):        # after it had sent its request
            raise Refusal("abandoned")
        self.demand.arrived(invocation.accepted)
        options, waiting = self.record.options, len(self.waiting)
        if self.taken + waiting >= options.concurrency + options.queue:
            raise Refusal("queue-full", 503, f"the queue is full: all places of --concurrency {options.concurrency} "
                                             f"and --queue {options.queue} are taken")
        few = self.services.host.descriptors.limit * 3 // 4         # the client's was the lowest that was free
        if waiting >= SCARCE_QUEUE and invocation.client.fileno() >= few:
            raise Refusal("queue-full", 503, f"faasd has few descriptors left, and {waiting} connections wait already")

    async def take_turn(self, invocation: Invocation) -> None:
        """Return when a handler has the client. Raises Refusal if none will; one that has waited before goes first."""
        turn = invocation.turn = self.loop.create_future()
        self.waiting[invocation] = None
        if invocation.tries:
            self.waiting.move_to_end(invocation, last=False)
        self.dispatch()
        if not turn.done():
            self.services.hangups.watch(invocation.client, functools.partial(self._on_hangup, invocation))
            options = self.record.options
            until = invocation.accepted + options.queue_timeout
            timer = self.loop.call_at(until, self._on_timeout, invocation, turn, until + options.start_timeout)
            try:
                await turn
            finally:
                timer.cancel()
        turn.result()

    def _on_timeout(self, invocation: Invocation, turn: asyncio.Future[None], last: float) -> None:
        """Refuse a client that has waited for so long, or until `last` for the end of a start.

        The first ones have one under way, and may wait for its end; not for that of another after it.
        """
        if turn.done():
            return
        if self.loop.time() < last and invocation in itertools.islice(self.waiting, self.pool.starting):
            self.loop.call_at(last, self._on_timeout, invocation, turn, last)
        else:
            self._refuse(invocation, Refusal("queue-timeout", 503, "no container was free in time"))

    def dispatch(self) -> None:
        """Give clients that wait containers that wait, in order, and have the pool make what is missing."""
        limit, invocation = self.record.options.concurrency, None
        while self.waiting and self.taken < limit and (container := self.pool.take()):
            invocation = next(iter(self.waiting))
            invocation.tries += 1
            # First, for a server's thread may take it at once. A handler may hold the socket's lock, and end it too.
            on_hangup = self.services.hangups.forget(invocation.client)
            if handover := container.hand_over(invocation.client, invocation.peer):
                self.in_flight.add(invocation)
                self.pool.share(container)
                invocation.container, invocation.pool, invocation.handover = container, self.pool, handover
                invocation.handed = self.loop.time()
                del self.waiting[invocation]
                invocation.turn.set_result(None)
                continue
            if on_hangup:
                self.services.hangups.watch(invocation.client, on_hangup)
            self.pool.dismiss(container)
            if invocation.tries >= MAX_TRIES:
                self.pool.failed(StartFailed(f"{who(container.contract)} was ready, but takes no client", [], 502))
        self.pool.reconcile_at(self.loop.time() + (HEAD_START_SECONDS if invocation and not self.waiting else 0.0))

    def _refuse(self, invocation: Invocation, refusal: Refusal) -> None:
        del self.waiting[invocation]
        self.services.hangups.forget(invocation.client)
        invocation.turn.set_exception(refusal)

    def _on_hangup(self, invocation: Invocation, events: int) -> None:
        """Drop a client that gave up, so that it costs no container.

        One that has only closed its own direction looks the same as one that has left. Programs do that behind a
        request (`nc -N`), so it is giving up only if the request is not whole; where the program speaks first, it is.
        """
        serves = invocation.tries or self.record.options.speaks_first
        if not events & (select.EPOLLHUP | select.EPOLLERR) and (serves or is_whole(invocation.client)):
            self.services.hangups.allow_half_close(invocation.client)
        else:
            self._refuse(invocation, Refusal("abandoned"))

    def refuse_first(self, failure: StartFailed) -> bool:
        """Tell the client that waits longest that its container did not start; return False if there is none."""
        if not self.entitled:
            return False
        first = next(iter(self.waiting))
        first.failed = failure.container
        self._refuse(first, Refusal("start-failed", failure.status, str(failure)))
        return True

    def adopt(self, survivors: list[Survivor]) -> None:
        """Go on with invocations that the daemon before left; their containers will serve nobody else."""
        pool = Pool(self, self.pool.version)
        try:
            while survivors:            # what is left in the list after an error has not been adopted
                survivor, now = survivors[-1], self.loop.time()
                container = Container.adopt(self.services.host, survivor, self.log.write_output)
                survivors.pop()
                pool.containers.add(container)
                for client, peer in survivor.clients:   # when they began is not known: --timeout counts from now
                    invocation = Invocation(self, client, peer, b"", now, container, pool, handed=now,
                                            handover=container.take_up(client, self.record.address, peer))
                    self.in_flight.add(invocation)
                    self.begin(invocation)
        finally:
            self._retire(pool)

    async def execute(self, command: list[str], env: Iterable[str], terminal: bool, takes_input: bool,
                      size: tuple[int, int], started: Callable[[Streams], None]) -> tuple[int | None, str]:
        """Run a command of an operator's in a container of its own: see Execution.run. Raises FaasdError."""
        name, pool, task = self.record.name, self.pool, asyncio.current_task()
        if pool is None:
            raise Conflict(f"function {name} is broken: `faas info {name}` says why")
        if self.draining:
            raise FaasdError(Release.STOPPED.value, status=503)
        if self.taken >= (most := self.record.options.concurrency):
            raise Conflict(f"function {name} has no room: all {most} places of --concurrency are taken; try later")
        bundle = pool.version.bundle.for_command(command, env, terminal, size)
        execution = Execution(self.services.host, name, terminal, takes_input, size)
        self.services.events.add(name, "exec", container=execution.id, command=command[0])
        self.executions.add(task)
        pool.containers.add(execution)          # its image stays until it ends
        try:
            return await execution.run(bundle, pool.options.start_timeout, started)
        except StartFailed as failure:
            raise FaasdError(f"function {name}: {failure}", failure.output, 503) from failure
        finally:
            self.executions.discard(task)
            pool.remove(execution)
            self.dispatch()

    def write_down(self, invocation: Invocation) -> None:
        durations = invocation.durations
        self.statistics.record(invocation, durations)
        line = invocation.line(durations)
        container = invocation.container.id if invocation.container else invocation.failed or "-"
        self.log.write(container, ">", line)
        if invocation.outcome != "answered":
            self._warnings.add(container, line)
        elif log.isEnabledFor(logging.DEBUG):
            log.debug("function=%s container=%s %s", self.record.name, container, line)

    # -- end --

    def stop_accepting(self, end: Callable[[socket.socket], None]) -> None:
        """Accept what the kernel has completed already, and nobody after that; end closes the listening socket."""
        self.draining = True
        for task in self.executions:
            task.cancel()
        self.entrance.close(end)
        if self.pool:
            self.pool.reconcile()

    async def drain(self, timeout: float) -> None:
        """Let all invocations finish for timeout seconds, then end them; their clients get a 503."""
        try:
            async with asyncio.timeout(timeout):
                await self._invocations.finish()
        except TimeoutError:
            if self.pool:
                self.pool.close()               # an idle container may hold up one that should end
        await self._end(Release.STOPPED)

    async def pass_on(self, timeout: float) -> None:
        """Leave invocations to the next daemon, once each client has its program, or a 503 after timeout."""
        await asyncio.sleep(0)                  # those that were accepted last are about to wait
        begin = now = self.loop.time()
        while now < begin + timeout and (self.waiting or any(
                one.is_offered() and now < max(begin, one.handed) + OFFER_SECONDS for one in self.in_flight)):
            await asyncio.sleep(0.01)
            now = self.loop.time()
        await self._end(Release.LEFT)

    async def _end(self, why: Release) -> None:
        """End all invocations: none waits any longer for a container, or for one that serves it."""
        while self._invocations:                # again: one may have been on its way to another container
            for invocation in list(self.waiting):
                self._refuse(invocation, Refusal(*STOPPED))
            for invocation in list(self.in_flight):
                if not invocation.handled:
                    invocation.container.end_wait(invocation.handover, why)
            await asyncio.wait(self._invocations, timeout=1)
        if self.pool:
            self._retire(self.pool)
        patience = OFFER_SECONDS if why is Release.LEFT else None       # what takes longer, the next daemon ends
        await asyncio.wait([asyncio.ensure_future(self.retirements.finish())], timeout=patience)

    # -- versions --

    def replace_version(self, version: Version, container: Container | None = None) -> None:
        """Make version the one for invocations that start from now on; container is one of it that is ready."""
        if self.pool:
            self._retire(self.pool)
        self.pool, self.error = Pool(self, version), ""
        self.entrance.defer()
        if container:                           # it was started to prove a deploy
            self.demand.last_used = self.loop.time()
            container.write_line = self.log.write_output
            self.pool.put(container)
        else:
            self.dispatch()

    def _retire(self, pool: Pool) -> None:
        pool.close()
        self.retirements.start(pool.empty.wait())

    # -- for the control API --

    @property
    def state(self) -> dict[str, str]:
        """Return its state, and what is wrong with it, if anything is."""
        if self.record.address in self._addresses.missing:
            return {"state": "broken", "error": "somebody has taken its address from lo, and faasd cannot put it back"}
        if self.being_removed:
            return {"state": "removing"}
        if self.error:
            return {"state": "broken", "error": self.error}
        failing = self.pool.failure and not (self.pool.idle or self.in_flight)
        return {"state": "failing", "error": self.pool.failure} if failing else {"state": "ready"}

    def counts(self) -> dict:
        return {"running": self.running, "queued": len(self.waiting), "warm": len(self.pool.idle) if self.pool else 0,
                "starting": self.pool.starting if self.pool else 0, "requests": self.statistics.requests,
                "errors": self.statistics.errors}

    def _summary(self) -> dict:
        return {"name": self.record.name, "address": self.record.address, **self.state, **self.counts()}

    def describe_statistics(self) -> dict:
        counted = self.statistics
        return {**self._summary(), "rate": round(self.demand.rate(self.loop.time()), 3),
                "outcomes": dict(counted.outcomes),
                "latency": {name: histogram.percentiles() for name, histogram in counted.durations.items()}}

    def describe(self) -> dict:
        record = self.record
        document = {**self._summary(), "version": record.version, "created": record.created, "updated": record.updated,
                    "options": record.options.to_json(), "secrets": sorted(record.secrets)}
        if self.pool is None:
            return {**document, "digest": "", "image": record.versions[0].image, "command": [],
                    "user": "", "workdir": "", "size": 0}
        version, image, process = self.pool.version, self.pool.version.image, self.pool.version.image["process"]
        return {**document, "contract": version.record.contract, "server_port": version.record.port,
                "digest": image["digest"], "image": image["tag"] or version.record.image, "size": image["size"],
                "command": version.command, "user": f"{process['uid']}:{process['gid']}", "workdir": process["cwd"]}


MAX_REQUEST = 200                   # characters of a request's first line in our logs
DRAIN_SECONDS = 120.0               # for a client to take the rest of its answer from the kernel, without a --timeout
DRAIN_LOOKS = (0.01, 0.25)          # seconds between two looks whether it has, first and at most
LINGER_SECONDS = 2.0                # reading what the client still sends after our own 502 or 504
LINGER_BYTES = 16 * MIB             # of it, at most


@dataclass(eq=False, slots=True)
class Invocation:
    """One connection from accept to the last trace of its container. Times are the loop's."""
    function: Function
    client: socket.socket
    peer: str
    request: bytes                      # as much of it as was there
    accepted: float
    container: Container | None = None
    pool: Pool | None = None            # the container's
    turn: asyncio.Future[None] | None = None        # done when a handler has the client; a Refusal if none will
    handover: Handover | None = None    # the container's, of the client
    tries: int = 0                      # hand-overs; none by this daemon for an adopted one
    handed: float = 0.0                 # the client was handed over
    handled: float = 0.0                # the handler let go
    outcome: str = ""
    status: int = 0                     # of the answer that faasd itself gave, if it did
    reason: str = ""
    failed: str = ""                    # the container that did not start for it
    exit_status: int | None = None
    state: TcpState | None = None       # of the client's connection, as it was last known

    async def serve(self) -> None:
        """Wait for a container, let its handler work, and see to it that the client has an answer."""
        try:
            try:
                if self.container is None:              # else it is adopted
                    self.function.admit(self)
                    await self.function.take_turn(self)
                while (said := await self._work()) is Release.UNTAKEN and self.tries < MAX_TRIES:
                    await self._take_back()
                    await self.function.take_turn(self)
                if said is Release.LEFT and await self._leave():
                    return
                await self._conclude(said)
            except Refusal as refusal:
                await self._refuse(refusal)
            self.function.write_down(self)
        except Exception:               # a fault of ours, which Tasks logs: nobody else would end the container
            if self.container:
                self.pool.dismiss(self.container)
            raise
        finally:
            self._close()

    def is_offered(self) -> bool:
        """Whether its server has yet to accept it."""
        return bool(self.handover and self.handover.inode) and not self.handover.taken and not self.handled

    async def _work(self) -> Release:
        """Return how the handler has let go, or why it may not go on."""
        moment = self.handed + (self.pool.options.timeout or math.inf)
        timer = self.function.loop.call_at(moment, self.container.end_wait, self.handover, Release.OVERDUE)
        said = await self.handover.said
        timer.cancel()
        if said is Release.OVERDUE and self.handover.inode:
            self.handover.said = self.function.loop.create_future()     # first: the end may be reported meanwhile
            if not await self._take_from_server():
                said = await self._outlast_client()
        return said

    async def _outlast_client(self) -> Release:
        """Wait for a client that does not take what its server has left to the kernel; end its connection in time."""
        said, closed = self.handover.said, self.function.services.host.closed
        if not (await asyncio.wait([said], timeout=self.pool.options.timeout))[0]:
            await self._call(closed.destroy, self.handover, self.function.record.address)
            await asyncio.wait([said], timeout=EXIT_GRACE)
        closed.forget(self.handover)
        return said.result() if said.done() else Release.OVERDUE

    async def _take_back(self) -> None:
        """Take the client from a container that died before it took it. Others in it may have seen the socket."""
        log.info("function=%s container=%s died before it took its client", self.function.record.name,
                 self.container.id)
        self.container.handovers.discard(self.handover)
        await self.pool.end(self.container, self.container.kill)
        self.function.in_flight.discard(self)
        self.container, self.handover, self.handed = None, None, 0.0

    # -- the end --

    async def _leave(self) -> bool:
        """Leave it to the next daemon; return False if its server does not have its client yet."""
        if self.handover.inode and not await self._call(self.container.is_taken, self.handover):
            return False
        self.container.handovers.discard(self.handover)
        if not self.container.handovers:        # else the last of them does it
            await self.container.leave()
            self.pool.remove(self.container)
            log.info("function=%s container=%s serves a client and is left running", self.function.record.name,
                     self.container.id)
        return True

    def _call(self, call: Callable, *arguments) -> asyncio.Future:
        """Make a system call on the client's connection. A container that keeps us waiting is killed."""
        overdue = self.container.kill_soon if self.container else None
        return self.function.services.host.workers.run(call, *arguments, overdue=overdue)

    def _ask(self) -> asyncio.Future[TcpState]:
        return self._call(TcpState.of, self.client)

    def _ask_and_close(self) -> TcpState:
        """Close it too if the client has the whole answer of a handler that said so. In a worker: one way for both."""
        state = TcpState.of(self.client)
        if state.sent and not state.unacknowledged and not self.container.killed:
            os.close(self.client.detach())
        return state

    def _let_go(self) -> None:
        """Close our descriptor of the client's connection.

        It may be the last one. To close that takes the lock of each epoll set that the socket is in, and a handler can
        hold its own, in an epoll_wait(2) that sleeps in page faults.
        """
        descriptor = self.client.detach()
        if descriptor >= 0:
            self._call(os.close, descriptor)

    def _close(self) -> None:
        self._let_go()
        if self in self.function.in_flight:
            self.function.in_flight.discard(self)
            self.function.dispatch()

    async def _conclude(self, said: Release) -> None:
        """See to the end of an invocation whose handler has let go. Raises Refusal if the answer must be ours."""
        container, pool, function = self.container, self.pool, self.function
        self.handled = function.loop.time()
        container.handovers.discard(self.handover)
        pool.shared.pop(container, None)        # until it is known that it may serve another
        if said in (Release.OVERDUE, Release.STOPPED, Release.LEFT):
            container.spoiled = True
            if self.handover.inode and said is not Release.OVERDUE:
                await self._take_from_server()
            if not container.handovers:         # else it serves others still
                self.exit_status = await pool.end(container, container.kill)
            raise self._blame(*OVERDUE) if said is Release.OVERDUE else Refusal(*STOPPED)
        if self.handover.taken and self.handover.state is None:
            self.exit_status = await pool.end(container, container.finish)
            raise Refusal("closed", 0, "the kernel's report of how it ended was lost")
        state = self.state = self.handover.state or await self._answered(gone=said is not Release.READY)
        if self.handover.taken and not state.sent and await container.exits():  # the kernel has told the client
            self.exit_status = await pool.end(container, container.finish)
            if container.out_of_memory:
                raise self._blame(OUT_OF_MEMORY[0], 0, OUT_OF_MEMORY[2])
            raise self._blame("no-answer", 0, f"{container.describe_end(self.exit_status)} without an answer")
        self.outcome, self.reason = ("answered", "") if state.sent else ("closed", self._who_closed(state))
        function.demand.run.add(self.handled - self.handed)
        if not state.unacknowledged:            # first: what follows is nothing the client should wait for
            self._let_go()
            function.in_flight.discard(self)
        ending = None
        if container.handovers or said is Release.READY and state.sent and pool.may_reuse(container):
            pool.put(container)
        else:
            ending = pool.end(container, container.finish)
            function.dispatch()
        if state.unacknowledged:
            ending = ending and function.loop.create_task(ending)        # meanwhile
            await self._drain(state)
        if ending:
            ended = await ending
            if not (self.handover.taken and container.killed):      # a server ends because we kill it: that is no error
                self.exit_status = ended
        if container.out_of_memory:
            self.reason = "the container ran out of memory after its answer"

    async def _take_from_server(self) -> bool:
        """Take a client back from a server, so that we can answer; return whether the server had not closed it yet."""
        if await self._call(self.container.is_taken, self.handover):
            duplicate = self.function.services.host.cgroups.duplicate_socket
            self.client = await self._call(duplicate, self.container.cgroup, self.handover.inode) or self.client
        if self.client.fileno() >= 0:
            return True
        # It may be in flight in a Unix socket, say; one that is closed for good shows no inode any more.
        return self.handover.inode in await self._call(read_connections, [self.function.record.address])

    async def _answered(self, gone: bool) -> TcpState:
        """Return the client's state once its handler let go, or is gone. Raises Refusal if its answer is missing."""
        container = self.container
        if self.handover.inode:                 # a server that has ended
            await container.exits()
        if gone:
            container.look_for_memory()         # now: its cgroups are about to be removed
        asking = self._ask() if gone else self._call(self._ask_and_close)
        if not self.pool.may_reuse(container):
            container.close_sockets()           # with the same turn of the worker's
        state = await asking
        killed = container.killed and self.client.fileno() >= 0         # else after its answer was whole
        if state.can_answer or state.is_open and (
                killed or gone and (container.out_of_memory or container.may_have_run_out_of_memory)):
            # Once nobody in the container has the socket any more, and all is known of its memory.
            end = container.kill if killed or container.out_of_memory else container.finish
            self.exit_status = await self.pool.end(container, end)
            if gone and container.out_of_memory:
                raise self._blame(*OUT_OF_MEMORY)
            if killed:
                raise self._blame("no-answer", 502, "kept its client's connection locked, and was killed")
            if state.can_answer:
                # One that let go, but stayed until we killed it, has no exit to speak of.
                how = "let go" if container.killed else container.describe_end(self.exit_status)
                refusal = self._blame("no-answer", 502, f"{how} without an answer")
                if self.handover.inode and not self.handover.taken:     # a server that never got so far
                    self.pool.failure = str(refusal)
                raise refusal
        return state

    def _who_closed(self, state: TcpState) -> str:
        """Return who has ended a connection on which nothing was sent, as far as the kernel tells."""
        program = who(self.container.contract)
        if state.acknowledged or state.state in TCP_FIN_STATES:         # nothing but our FIN
            return f"{program} closed the connection without an answer"
        if self.handover.taken:                 # what it leaves unread makes its close a reset
            return f"before an answer, the client reset the connection, or {program} closed it without reading it all"
        return f"the client reset the connection before {program} had answered"

    def _blame(self, outcome: str, status: int, did: str) -> Refusal:
        return Refusal(outcome, status, f"{who(self.container.contract)} {did}")

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer the client, unless its handler, or the client itself, left nothing to answer on."""
        self.outcome, self.reason = refusal.outcome, refusal.reason
        if not refusal.status or self.client.fileno() < 0:
            return
        state = self.state = await self._ask()  # now: a reset makes the kernel forget it
        if state.can_answer:
            self.status = refusal.status
            container = f" (container {self.container.id})" if self.container else ""
            line = f"function {self.function.record.name}: {refusal.reason}{container}"
            with contextlib.suppress(OSError):          # the client has left
                await self._call(self.client.send, answer(refusal.status, line), socket.MSG_DONTWAIT)
                await self._linger()
            self.state = await self._ask()
        elif state.is_open:                     # we have cut its answer, which must not look whole
            await self._call(reset_connection, self.client)
        elif state.unacknowledged:              # the handler has ended its answer, and did not let go
            await self._drain(state)

    async def _linger(self) -> None:
        """End the answer, and read and drop what the client still sends. Raises OSError if it has left.

        To close a socket with unread data sends a reset, which can destroy the answer before the client has read it.
        """
        self.client.setblocking(False)
        await self._call(self.client.shutdown, socket.SHUT_WR)
        loop, crowd = self.function.loop, self.function.services.answering
        room, until = LINGER_BYTES, loop.time() + LINGER_SECONDS
        while room > 0 and await crowd.hear(self.client, self.peer, until - loop.time()):
            # A handler that has the socket still may have read it first, and made the socket a blocking one again.
            data = await self._call(self.client.recv, COPY_CHUNK, socket.MSG_DONTWAIT)
            if not data:
                break
            room -= len(data)

    async def _drain(self, state: TcpState) -> None:
        """Wait until the client has taken all of its answer, for that is memory charged to no container."""
        with contextlib.suppress(OSError):
            if state.unread:
                await self._linger()
            else:
                await self._call(self.client.shutdown, socket.SHUT_WR)
        pause, longest = DRAIN_LOOKS
        until = self.function.loop.time() + (self.pool.options.timeout or DRAIN_SECONDS)
        while (await self._ask()).unacknowledged and not self.function.draining:
            if self.function.loop.time() > until:
                await self._call(reset_connection, self.client)
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        self._close()

    # -- what is written of it --

    @property
    def durations(self) -> dict[str, float]:
        """How many seconds its stages took: those that there were, and that are known."""
        seconds = {}
        if self.handed and self.tries:
            seconds["queue"] = self.handed - self.accepted
        if self.container and self.container.served == 1:       # else it was started for another client
            seconds["start"] = self.container.start_seconds
        if self.handled:
            seconds.update(run=self.handled - self.handed, total=self.handled - self.accepted)
        return seconds

    def line(self, durations: dict[str, float]) -> str:
        """Return the invocation as key=value for the log."""
        first_line = self.request.partition(b"\n")[0].removesuffix(b"\r").decode("utf-8", "surrogateescape")
        parts = [f"outcome={self.outcome} client={self.peer} request={quote(first_line, MAX_REQUEST)}"]
        for key, name in (("wait", "queue"), ("start", "start"), ("run", "run")):
            parts.append(f"{key}={durations[name] * 1000:.1f}ms" if name in durations else f"{key}=-")
        received, sent = (self.state.received, self.state.sent) if self.state else ("-", "-")
        parts.append(f"received={received} sent={sent} exit={'-' if self.exit_status is None else self.exit_status}")
        if self.status:
            parts.append(f"status={self.status}")
        if self.reason:
            parts.append(f"reason={quote(self.reason, MAX_MESSAGE)}")
        return " ".join(parts)


def answer(status: int, line: str) -> bytes:
    body = f"faasd: {line}\n".encode()
    retry = "Retry-After: 1\r\n" if status == 503 else ""
    head = (f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n").encode()
    return head + body


PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def peek(client: socket.socket) -> bytes | None:
    """Return the first bytes of a request without taking them, or b"" if the client has left; None: nothing yet."""
    try:
        return client.recv(256, PEEK)           # of which the log shows the first line
    except BlockingIOError:
        return None
    except OSError:                             # reset
        return b""


def is_whole(client: socket.socket) -> bool:
    """Return whether a client that closed its direction has sent a whole HTTP/1 request, or no HTTP/1 at all."""
    try:
        there, = struct.unpack("i", fcntl.ioctl(client, termios.FIONREAD, bytes(4)))
        data = client.recv(min(there, MIB) or 1, PEEK)          # the rest of a long one is not looked at
    except OSError:                             # reset
        return False
    if not re.match(rb"[A-Z]+ [^ \r\n]+ HTTP/1\.[01]\r?\n", data):
        return bool(data) and not re.fullmatch(rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE|CONNECT) [^\n]*", data)
    end = re.search(rb"\r?\n\r?\n", data)
    if not end:
        return False
    head = data[:end.start()]
    if re.search(rb"(?i)\ntransfer-encoding:[^\n]*chunked", head):
        # No expression for all of it, chunk, trailer and end: a client could have us search for minutes.
        return there > len(data) or (data.endswith((b"\n\r\n", b"\n\n"))
                                     and bool(re.search(rb"\n0+\r?\n", data[end.end() - 1:])))
    length = re.search(rb"(?i)\ncontent-length:[ \t]*([0-9]{1,18})", head)
    return there >= end.end() + (int(length[1]) if length else 0)


def was_reset(client: socket.socket) -> bool:
    """Return whether a connection that no handler has yet was reset: it has no peer. Cheaper to ask than TcpState."""
    try:
        client.getpeername()
        return False
    except OSError:                             # ENOTCONN
        return True


TCP_ESTABLISHED, TCP_CLOSE_WAIT = 1, 8          # include/net/tcp_states.h
TCP_FIN_STATES = (4, 9, 11)          # FIN_WAIT1, LAST_ACK, CLOSING: we have closed, the FIN is not yet acknowledged
TCP_CONNECTED = (1, 4, 5, 6, 8, 9, 11)      # those states, FIN_WAIT2 and TIME_WAIT: of a socket that has a peer
TCP_INFO_ACKED, TCP_INFO_NOTSENT, TCP_INFO_SENT = 120, 144, 200    # offsets in struct tcp_info (linux/tcp.h)


class TcpState(NamedTuple):
    """What the kernel knows of a client's connection. To ask takes the socket's lock: see Workers."""
    state: int
    received: int       # bytes
    sent: int           # bytes handed to the kernel for sending, whether or not they have left
    unacknowledged: int = 0     # of these
    unread: int = 0     # bytes of the client's that nobody has read; asked for only if a reset could cost it something
    acknowledged: int = 0       # sequence numbers: our FIN takes one

    @classmethod
    def of(cls, client: socket.socket) -> TcpState:
        buffer, size = ctypes.create_string_buffer(256), ctypes.c_uint(256)
        # Not client.getsockopt, which keeps all threads waiting with its own.
        succeeded(libc.getsockopt(client.fileno(), socket.IPPROTO_TCP, socket.TCP_INFO, buffer, ctypes.byref(size)))
        known = cls.from_info(buffer.raw)
        if known.state not in TCP_CONNECTED:            # what it says of unsent data means nothing then
            return known
        waiting, = struct.unpack_from("I", buffer, TCP_INFO_NOTSENT)
        if waiting and known.state in TCP_FIN_STATES:
            waiting -= 1                                # the FIN takes a sequence number, and goes last
        sent = known.sent + waiting
        unacknowledged = max(0, sent - known.acknowledged)
        unread = unacknowledged and struct.unpack("i", fcntl.ioctl(client.fileno(), termios.FIONREAD, bytes(4)))[0]
        return known._replace(sent=sent, unacknowledged=unacknowledged, unread=unread)

    @classmethod
    def from_info(cls, info: bytes) -> TcpState:            # struct tcp_info
        acknowledged, received = struct.unpack_from("QQ", info, TCP_INFO_ACKED)
        sent, sent_again = struct.unpack_from("QQ", info, TCP_INFO_SENT)
        return cls(info[0], received, sent - sent_again, acknowledged=acknowledged)

    @property
    def is_open(self) -> bool:
        """Whether there is a client, and nobody has told it that the answer is over."""
        return self.state in (TCP_ESTABLISHED, TCP_CLOSE_WAIT)

    @property
    def can_answer(self) -> bool:
        """Whether nothing was said to the client yet and it still can be."""
        return self.sent == 0 and self.is_open


def reset_connection(client: socket.socket) -> None:
    """End a client's connection with a reset, no matter who else has it open; what is unsent is dropped."""
    libc.connect(client.fileno(), bytes(16), 16)        # AF_UNSPEC: connect(2)


MAX_WARNINGS, WARNING_SECONDS = 10, 1.0     # of one function's invocations in our own log; the others are counted


class Warnings:
    """Logs a function's failed invocations, so few lines that no client can fill a disk with them."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop):
        self._name, self._loop = name, loop
        self._count = 0                         # within WARNING_SECONDS

    def add(self, container_id: str, line: str) -> None:
        if self._count == 0:
            self._loop.call_later(WARNING_SECONDS, self._sum_up)
        self._count += 1
        if self._count <= MAX_WARNINGS:
            log.warning("function=%s container=%s %s", self._name, container_id, line)

    def _sum_up(self) -> None:
        if self._count > MAX_WARNINGS:
            log.warning("function=%s %d more such lines are in its own log only", self._name,
                        self._count - MAX_WARNINGS)
        self._count = 0


class HangupWatch:
    """Reports when a waiting client hangs up.

    A reader of the loop cannot: the request that nobody has read yet keeps the socket readable. So there is an epoll
    descriptor on which only the end of the connection counts, and a thread that waits for that. Not the loop: to put
    something into an epoll that is in another takes a lock of all the machine's, which a handler can hold for long.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._loop = loop
        self._handled = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def watch(self, client: socket.socket, callback: Callable[[int], None]) -> None:
        """Call callback with epoll's events when the client has closed, or half closed, its connection."""
        self._epoll.register(client, select.EPOLLRDHUP)
        self._callbacks[client.fileno()] = callback

    def allow_half_close(self, client: socket.socket) -> None:
        """Call back only when the client resets its connection, which epoll always reports."""
        self._epoll.modify(client, 0)

    def forget(self, client: socket.socket) -> Callable[[int], None] | None:
        """Call back no more; return what would have been called."""
        if callback := self._callbacks.pop(client.fileno(), None):
            self._epoll.unregister(client)
        return callback

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._epoll, select.POLLIN)
        with contextlib.suppress(RuntimeError):         # the loop is closed
            while poll.poll():
                self._handled.clear()
                self._loop.call_soon_threadsafe(self._notify)
                self._handled.wait()            # else it would be told again and again

    def _notify(self) -> None:
        try:
            for descriptor, events in self._epoll.poll(0):
                callback = self._callbacks.get(descriptor)
                if callback:                    # else a callback just before this one has ended the wait
                    callback(events)
        finally:
            self._handled.set()


MAX_SILENT = 1024                   # silent connections of all functions; one more, and Crowd gives one up
MAX_ANSWERING = 1024                # clients that are read while they read our own answer; likewise


class Crowd:
    """A bounded set of clients that are waited for. When it is full, one wait is abandoned: a newcomer has its chance.

    That is the oldest of the address that has most, so that one stranger with many connections takes none from others.
    """

    def __init__(self, most: int):
        self._most = most
        self._count = 0
        self._members: dict[str, dict[asyncio.Future[bool], None]] = {}     # by address; of each the oldest first

    async def hear(self, client: socket.socket, peer: str, seconds: float) -> bool:
        """Return whether a client sends something, or closes, in time; peer is its address and port."""
        loop = asyncio.get_running_loop()
        heard: asyncio.Future[bool] = loop.create_future()
        loop.add_reader(client, settle, heard, True)
        timer = loop.call_later(seconds, settle, heard, False)
        source = peer.partition(":")[0]
        self._members.setdefault(source, {})[heard] = None
        self._count += 1
        if self._count > self._most:            # a flood: it must cost no more than this
            largest = max(self._members.values(), key=len)
            settle(next((member for member in largest if not member.done()), heard), False)
        try:
            return await heard
        finally:
            timer.cancel()
            loop.remove_reader(client)
            self._count -= 1
            del self._members[source][heard]
            if not self._members[source]:
                del self._members[source]


# ---------------------------------------------------------------------------------------------------------------------
# The warm pool: containers that are there before their client
# ---------------------------------------------------------------------------------------------------------------------

SURPLUS_SECONDS = 20.0              # how long more containers than asked for may go on waiting
MAX_WARM_SECONDS = 3600.0           # age at which a container that waits is replaced by a new one
HEALTHY_SECONDS = 10.0              # a warm container that dies younger counts as a failed start
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0     # between failed starts that nobody waits for
BACK_OFF_EVENT_SECONDS = 60.0       # between two events of that of one function: it must not push out all others
HEAD_START_SECONDS = 0.002          # for a program that has just got a client, before the CPUs start its replacement


class Pool:
    """The containers of one version: those that wait for a client, those on their way, and what is left of others.

    reconcile() brings what is to what should be, like gunicorn's arbiter: a start under way for each client that
    waits, and ahead of them as many warm containers as the options or the traffic ask for. It is called whenever one
    of these may have changed, and by a timer that is set for the next moment at which time alone changes something.
    """

    def __init__(self, function: Function, version: Version):
        self.version = version
        self.options = version.options
        self.demand = function.demand
        self.idle: dict[Container, float] = {}          # since when (loop time) each waits, the longest first
        self.shared: dict[Container, None] = {}         # that serve clients, and could serve others at the same time
        self.containers: set[Container] = set()         # all that have not been removed completely
        self.empty = asyncio.Event()            # closed, and no container is left
        self._function = function
        self._services = function.services
        self._loop = function.loop
        self._starts = Tasks(f"function={function.record.name} a start")
        self._endings = Tasks(f"function={function.record.name} the end of a container")
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.failure = ""                       # why the last start failed, if it did
        self._failures = 0                      # in a row, of containers that nobody waited for
        self._retry_at = -math.inf              # loop time; until then none are made ahead
        self._services.limit.pools.add(self)

    # -- what should be --

    @property
    def starting(self) -> int:
        return len(self._starts)

    @property
    def ahead(self) -> int:
        """How many containers there are, or will be in a moment, for clients that have not come yet."""
        return len(self.idle) + max(0, self.starting - self._function.wanted)

    def _target(self, now: float) -> tuple[int, float]:
        """Return how many should be there for clients that have not come yet, and until when if nobody comes."""
        if self._function.draining:
            return 0, math.inf
        wanted, until, reused = self.options.warm, math.inf, self.options.reuse != 1
        if wanted is None:
            wanted, until = self.demand.target(now, reused)
        returning = len(self._function.in_flight) if reused else 0      # to serve others afterwards
        return max(0, min(wanted, self.options.concurrency) - returning), until

    def lacks_now(self) -> bool:
        return not self._closed and self._function.wanted > self.starting

    def lacks_ahead(self) -> bool:
        now = self._loop.time()
        if self._closed or now < self._retry_at:
            return False
        return self.ahead - self._old(now) < self._target(now)[0] and self._services.limit.make_room(self)

    def _old(self, now: float) -> int:
        """Return how many should be replaced by new ones."""
        return sum(1 for container in self.idle if now - container.ready_at >= MAX_WARM_SECONDS)

    def reconcile_at(self, moment: float) -> None:
        """Reconcile at a loop time, once for all clients that come and go until then."""
        # Later than needed is a mistake, earlier only a wake-up: a busy pool would otherwise set one for each client.
        if self._timer and self._timer.when() <= moment:
            return
        if self._timer:
            self._timer.cancel()
        self._timer = None if moment == math.inf else self._loop.call_at(moment, self.reconcile)

    def reconcile(self) -> None:
        """Start missing containers, end surplus ones, and set the timer for the next look."""
        if self._timer:
            self._timer = self._timer.cancel()
        if self._closed:
            return
        now = self._loop.time()
        target, until = self._target(now)
        self._end_surplus(now, target)
        if self._function.wanted > self.starting:
            self._services.starter.need(self, Pool.lacks_now)
        elif self.ahead - self._old(now) < target:
            self._services.starter.need(self, Pool.lacks_ahead)
        moments = [until]
        moments += [moment for moment in (self._retry_at, self._function.patient_until) if moment > now]
        if self.idle:
            oldest, since = next(iter(self.idle.items()))
            moments.append(max(oldest.ready_at + MAX_WARM_SECONDS, now + 1))
            if len(self.idle) > target:
                moments.append(since + SURPLUS_SECONDS)
        self.reconcile_at(min(moments) + 0.001)

    def _end_surplus(self, now: float, target: int) -> None:
        """End containers that nobody asks for any more, after a while in which somebody might."""
        lasting = (self.options.warm is None or self.options.reuse != 1) and not self._function.draining
        keep = SURPLUS_SECONDS if lasting else 0.0
        before = len(self.idle)
        while len(self.idle) > target:
            oldest, since = next(iter(self.idle.items()))
            if now - since < keep and now - oldest.ready_at < MAX_WARM_SECONDS:
                break
            self.give_up_one()
        if len(self.idle) < before:
            self._services.limit.freed()

    # -- containers --

    def start(self) -> asyncio.Task:
        return self._starts.start(self._start())

    async def _start(self) -> None:
        container = Container(self._services.host, self._function.record.name, self._function.log.write_output)
        self.containers.add(container)
        failure = None
        try:
            await container.start(self.version.bundle, self.options.start_timeout)
        except StartFailed as error:
            failure = error
            failure.container = container.id
        finally:
            self._starts.discard(asyncio.current_task())
            if not container.ready_at:          # then nothing of it is left
                self.remove(container)
        if failure:
            self.failed(failure)
        else:
            self.demand.start.add(container.start_seconds)
            self.failure = ""
            self.put(container)

    def failed(self, failure: StartFailed) -> None:
        """Tell the client that waits longest; where there is none, try again after a while that grows."""
        if self._closed:
            return                              # clients wait for the next version's
        self.failure = str(failure)
        if not self._function.refuse_first(failure):
            self._back_off(str(failure))
        self.reconcile()

    def _back_off(self, reason: str) -> None:
        now, function, self.failure = self._loop.time(), self._function, reason
        delay = min(FIRST_RETRY_SECONDS * 2 ** self._failures, MAX_RETRY_SECONDS)
        self._failures += 1
        self._retry_at = now + delay
        log.warning("function=%s has no warm container, next try in %g s: %s", function.record.name, delay, reason)
        if now - function.told_back_off >= BACK_OFF_EVENT_SECONDS:
            function.told_back_off = now
            self._services.events.add(function.record.name, "back-off", by="faasd", reason=reason)

    def put(self, container: Container) -> None:
        """Take a container that could serve somebody."""
        if container.handovers:                 # it serves others
            self.share(container)
            self._function.dispatch()
            return
        self.containers.add(container)
        if self._closed or not container.is_connected:
            self.dismiss(container)
            if container.served:
                self._function.dispatch()       # its place is free for another
            else:
                did = f"let go of {CONTROL_SOCKET}" if container.contract == "handler" else "ended"
                self.failed(StartFailed(f"{who(container.contract)} {did} before it had a client", [], 502))
            return
        self.idle[container] = self._loop.time()
        self._function.dispatch()
        if container in self.idle:              # nobody has waited for it
            container.listen().add_done_callback(functools.partial(self._lost, container))
            self._services.limit.trim()

    def take(self) -> Container | None:
        """Return a shared container with room, else the latest to wait, as its memory is the warmest; or None."""
        if not self.shared and not self.idle:
            return None
        self._failures = 0
        return (self.shared or self.idle).popitem()[0]

    def may_reuse(self, container: Container) -> bool:
        return (self is self._function.pool and container.is_connected and not container.spoiled
                and (self.options.reuse == 0 or container.served < self.options.reuse))

    def share(self, container: Container) -> None:
        """Keep a container that has just been given a client for others, as far as it may serve some at a time."""
        if len(container.handovers) in range(1, self.options.share) and self.may_reuse(container):
            self.shared[container] = None

    def _lost(self, container: Container, said: asyncio.Future[Release]) -> None:
        """A container that waited for a client is gone, or talks out of turn."""
        if self.idle.pop(container, None) is None:
            return
        self.dismiss(container)
        if self._loop.time() - container.ready_at < HEALTHY_SECONDS:
            self._back_off(f"container {container.id}: {said.result().value}")
        self.reconcile()

    def give_up_one(self) -> None:
        """End the container that has waited longest."""
        oldest = next(iter(self.idle))
        del self.idle[oldest]
        self.dismiss(oldest)

    def dismiss(self, container: Container) -> None:
        """End a container in the background. End of file tells its handler that there is no more work."""
        self._endings.start(self.end(container, container.finish))

    async def end(self, container: Container, end: Callable[[], Awaitable[int | None]]) -> int | None:
        """Give a container no more clients, end it by a method of its own, and return its exit status."""
        self.idle.pop(container, None)
        self.shared.pop(container, None)
        try:
            return await end()
        finally:
            self.remove(container)

    def remove(self, container: Container) -> None:
        """Forget a container that is completely gone."""
        self.containers.discard(container)
        if self._closed and not self.containers:
            self.empty.set()

    def close(self) -> None:
        """End all containers that serve nobody, at once; `empty` is set when those that do are gone too."""
        if self._closed:
            return
        self._closed = True
        self._services.limit.pools.discard(self)
        if self._timer:
            self._timer.cancel()
        self._starts.cancel()
        while self.idle:
            self.give_up_one()
        self.shared.clear()
        if not self.containers:
            self.empty.set()
        self._services.limit.freed()


WARM_SECONDS = 300.0                # a function used within these keeps at least one warm container
WARM_HEADROOM = 2.0                 # times as many as come in while one starts
RATE_SECONDS = 5.0                  # over which arrivals are averaged
FIRST_START_SECONDS = 0.05          # taken for the start of a container until some have started


class Demand:
    """What a function's traffic asks for: how many containers should be there for clients that have not come yet."""

    def __init__(self) -> None:
        self.last_used = -math.inf              # loop time
        self.start = Average(FIRST_START_SECONDS)       # from spawn to ready
        self.run = Average(0.0)                         # from hand-over to release
        self._rate = 0.0                        # arrivals a second at _time, an exponential average
        self._time = 0.0                        # loop time of the last arrival

    def arrived(self, now: float) -> None:
        self._rate = self.rate(now) + 1 / RATE_SECONDS
        self.last_used = self._time = now

    def rate(self, now: float) -> float:
        return self._rate * math.exp((self._time - now) / RATE_SECONDS)

    def target(self, now: float, reused: bool) -> tuple[int, float]:
        """Return how many containers should wait, and until which loop time that holds if nobody comes.

        None for a function nobody used for long, else 1 and those taken away at this rate, with headroom. A client
        takes a reused container away until it is back, any other one until another one has started.
        """
        if now - self.last_used >= WARM_SECONDS:
            return 0, math.inf
        taken = WARM_HEADROOM * self.rate(now) * (self.run if reused else self.start).seconds
        more = int(taken)
        until = now + RATE_SECONDS * math.log(taken / more) if more else self.last_used + WARM_SECONDS
        return 1 + more, until

    @property
    def patience(self) -> float:
        """How many seconds a client should rather wait for a container to come back than have another one started."""
        return 2 * self.start.seconds if self.run.seconds < self.start.seconds else 0.0


class Average:
    """A moving average of durations: each new one moves it by a tenth of the difference."""

    def __init__(self, first: float):
        self.seconds = first

    def add(self, seconds: float) -> None:
        self.seconds += (seconds - self.seconds) / 10


START_SLOT_SECONDS = 1.0            # how long a start counts against the starts allowed at a time


class Starter:
    """Starts containers for all pools: a few at a time, because more only makes each of them slower.

    There are two lines: pools whose clients wait, and pools that start ahead of theirs. The lines alternate, and within
    a line pools come in turn. One slot is for pools that have no start under way. So a flood on one function does not
    keep another from starting at once, be it for a client or to replace a warm container it has used.
    """

    def __init__(self, slots: int, loop: asyncio.AbstractEventLoop):
        """slots is how many starts there may be at a time, the one that is kept for others not counted."""
        self._most = slots + 1
        self._loop = loop
        # For each line, by the test whether a pool still needs a start: its pools. Whose turn is next comes first.
        self._lines: dict[Callable[[Pool], bool], dict[Pool, None]] = {Pool.lacks_now: {}, Pool.lacks_ahead: {}}
        self._slots: dict[asyncio.Task, asyncio.TimerHandle] = {}      # starts that are under way, and hold a slot

    def need(self, pool: Pool, lacks: Callable[[Pool], bool]) -> None:
        """Start a container for a pool when it is its turn, if it lacks one then."""
        self._lines[lacks].setdefault(pool)
        self._fill()

    def _fill(self) -> None:
        while len(self._slots) < self._most and (pool := self._next()):
            start = pool.start()        # one that takes long sleeps more than it computes, and frees its slot
            self._slots[start] = self._loop.call_later(START_SLOT_SECONDS, self._release, start)
            start.add_done_callback(self._release)

    def _next(self) -> Pool | None:
        for lacks, line in list(self._lines.items()):
            for pool in list(line):
                if len(self._slots) == self._most - 1 and pool.starting:
                    continue                    # the last slot is for others
                del line[pool]
                if lacks(pool):
                    line[pool] = None           # at the end: it may need another, but others have their turn first
                    self._lines[lacks] = self._lines.pop(lacks)
                    return pool
        return None

    def _release(self, start: asyncio.Task) -> None:
        if timer := self._slots.pop(start, None):
            timer.cancel()
            self._fill()


class WarmLimit:
    """How many containers may be warm in all pools together: a share for each pool when they are scarce."""

    def __init__(self, most: int):
        self.most = most
        self.pools: set[Pool] = set()
        self._refused: set[Pool] = set()

    def make_room(self, pool: Pool) -> bool:
        """Return whether pool may have one more. Where all places are taken, another pool may have to give one up.

        The coldest of those over their share gives, then the coldest of all; none gives to a pool colder than itself,
        and what a user asked for with a number is not taken away.
        """
        if sum(other.ahead for other in self.pools) < self.most:
            return True
        share = max(1, self.most // sum(1 for other in self.pools if other.ahead or other is pool))
        giver = self._giver(share, pool)
        entitled = pool.options.warm is not None or pool.ahead < share
        if giver and entitled and (giver.ahead > share or giver.demand.last_used <= pool.demand.last_used):
            giver.give_up_one()
            return True
        self._refused.add(pool)
        return False

    def _giver(self, share: int, but: Pool | None = None) -> Pool | None:
        return min((pool for pool in self.pools if pool is not but and pool.idle and pool.options.warm is None),
                   key=lambda pool: (pool.ahead <= share, pool.demand.last_used), default=None)

    def trim(self) -> None:
        """Enforce the limit: reused containers return to a pool and may exceed it."""
        while (sum(len(pool.idle) for pool in self.pools) > self.most
               and (giver := self._giver(self.most // len(self.pools)))):
            giver.give_up_one()

    def freed(self) -> None:
        """Let pools that were refused try again."""
        refused, self._refused = self._refused, set()
        for pool in refused:
            pool.reconcile()


CONTAINER_DESCRIPTORS = 9           # while one starts: a file or two, a socket, a pipe, a pidfd, a server's five
SPARE_DESCRIPTORS = 64              # left for ending what runs, and as many more for starting it


class Descriptors:
    """Whether there are descriptors enough: first clients that wait go without, then those that come, then starts.

    What is left after that is for ending what runs: without one, no container could be killed. The kernel gives the
    lowest number that is free, so a high one shows how many are taken.
    """

    def __init__(self) -> None:
        self.limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._spare = min(SPARE_DESCRIPTORS, self.limit // 16)
        self._probe = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def check_client(self) -> None:
        """Raise OSError if no connection should be accepted."""
        self._check(1, 2 * self._spare)

    def check_start(self) -> None:
        """Raise OSError if no container should be started."""
        self._check(CONTAINER_DESCRIPTORS, self._spare)

    def _check(self, needed: int, spare: int) -> None:
        taken: list[int] = []
        try:
            while len(taken) < needed:          # for what has ended has left holes below
                taken.append(os.dup(self._probe))
        finally:
            for descriptor in taken:
                os.close(descriptor)
        if taken[-1] >= self.limit - spare:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


# ---------------------------------------------------------------------------------------------------------------------
# A container: one run of the runtime, one control connection, its output, its end
# ---------------------------------------------------------------------------------------------------------------------

CONTAINER_ID = re.compile(r"[0-9a-f]{12}")


def who(contract: str) -> str:
    """Return what messages call a program: a handler is one that takes its clients from us (glossary)."""
    return "the handler" if contract == "handler" else "the program"


class StartFailed(Exception):
    """A container did not become ready; str() says why."""

    def __init__(self, reason: str, output: Iterable[str], status: int):
        super().__init__(reason)
        self.output = list(output)      # the last lines it printed
        self.status = status            # for its client: 502 and 504 blame the handler, 503 a machine that may recover
        self.container = ""             # its id, where a client is told


class RuntimeFailed(StartFailed):
    """The runtime made no container: its handler never ran."""


class EndedAtOnce(StartFailed):
    """A server listened, and ended."""


# What a program may print that was refused a process or thread, so that it is worth asking the kernel.
REFUSED_PROCESS = re.compile("thread|fork|clone|process|resource", re.IGNORECASE)
REFUSED_THREAD = re.compile("start new thread|temporarily unavailable|cannot fork", re.IGNORECASE)      # by itself
MAX_LOOKS = 100                     # at a container's pids.events: it prints what it likes
CONTROL_SOCKET = "/control.sock"
NOTIFY_SOCKET = "notify.sock"       # beside config.json: where the runtime sends what a server's calls are answered by
PORT_GRACE = 0.5                    # seconds for a server to listen on a better port than the first, and …
STAY_SECONDS = 0.2                  # … for one that is deployed to show that it does not go into the background then
SO_PASSRIGHTS = 83                  # Linux 6.16: whether a Unix socket takes descriptors
KILL_RETRY = 0.02                   # seconds between two rounds of killing one container, or two looks at its memory
MEMORY_LOOKS = 10                   # whether the kernel has killed anything, after it said that memory ran out
KILL_TIMEOUT = 10.0                 # seconds before runc itself is killed and its remains are deleted
EXIT_GRACE = 1.0                    # seconds a handler has between letting go of its client and being killed


class Container:
    """One container from spawn to the last trace. Lives on the loop's thread.

    start() returns once its handler is ready. From then on `said` is the future of its next Release: it comes when the
    handler says something on its control connection or is gone. There is a new one after each READY.
    """

    def __init__(self, host: ContainerHost, function: str, write_line: Callable[[str, str], None],
                 container_id: str = "", cgroup: str = ""):
        """write_line takes an id and a line of output, in any thread; id and cgroup are those of one that runs."""
        self.id = container_id or secrets.token_hex(6)
        self.cgroup = cgroup or host.cgroups.path(function, self.id)
        self.write_line = write_line
        self.said: asyncio.Future[Release] = host.loop.create_future()
        self.served = 0                                 # clients handed over
        self.killed = False                             # by us
        self.out_of_memory = False                      # it, or one of its processes, was killed for that
        self.ready_at = 0.0                             # loop time
        self.start_seconds = 0.0                        # from the spawn until it was ready
        self._host = host
        self._function = function
        self._directory = f"{host.containers_dir}/{self.id}"
        self._listener: socket.socket | None = None     # until the handler connects: it may connect once
        self._control: socket.socket | None = None      # from then on
        self._output: OutputReader | None = None
        self._spawning: asyncio.Future[int] | None = None       # of runc run, in a thread; None: it is adopted
        self._pid = 0                                   # of runc run
        self._pidfd = -1
        self._hit_pids = ""                             # what to say of --pids, as far as was seen
        self._looks = MAX_LOOKS                         # at pids.events that are left
        self._memory = -1                               # tells when it may have run out of memory
        self._memory_told = False                       # that it may have
        self._killed_before = host.cgroups.memory_kills(posixpath.dirname(self.cgroup))     # of its function's
        self.contract = ""                              # handler, server or stdio, once it is known
        self.port = 0                                   # a server's
        self.handovers: set[Handover] = set()           # a server's clients
        self.spoiled = False                            # it may serve nobody else
        self.kinds: list[str] = []                      # what it has listened on, in words
        self._ports: list[int] = []                     # those of them on which it may serve clients
        self._supervisor: Supervisor | None = None      # of what may be a server, until it ends
        self._bundle: Bundle | None = None              # … and that bundle
        self._left = False                              # to the next daemon
        self._connected: asyncio.Future[None] = host.loop.create_future()       # ready for clients
        self._exited: asyncio.Future[int | None] = host.loop.create_future()

    @classmethod
    def adopt(cls, host: ContainerHost, survivor: Survivor, write_line: Callable[[str, str], None]) -> Container:
        """Return a container that the daemon before has started, whose one release is GONE, at the end of runc.

        Its control connection ended with that daemon, and the handler meets the end of file when it is done.
        """
        container = cls(host, survivor.function, write_line, survivor.container_id, survivor.cgroup)
        container._pid, container.contract = survivor.pid, survivor.contract
        if survivor.notify >= 0:                # first: where no thread is to be had, all of the survivor is closed
            container._supervisor = Supervisor(container, host.loop, survivor.notify)
        container._watch_exit(survivor.pidfd)
        container._watch_memory()
        container._output = OutputReader(host.workers, survivor.output, container._on_output)       # last: it reads
        return container

    def take_up(self, client: socket.socket, address: str, peer: str) -> Handover:
        """Return the handover of a client of address that an adopted container has; we close our end of a server's."""
        if self.contract == "handler":
            return Handover(client, peer, self.said)
        handover = self._await_close(client, peer, address, taken=True)
        self._host.workers.run(os.close, client.detach())
        return handover

    # -- start --

    async def start(self, bundle: Bundle, timeout: float, must_stay: bool = False) -> None:
        """Start the container; return once it is ready, and stays. Raises StartFailed; then nothing of it is left."""
        # runc joins a user namespace first, and from there no network that the host has made.
        joins = bundle.options.net != "egress"
        user_namespace = await self._host.ids.user_namespace(bundle.first_id) if joins else ""
        begin = self._host.loop.time()
        try:
            self._host.descriptors.check_start()
            await asyncio.wait([self._spawn(bundle, user_namespace)], timeout=timeout)
            if not self._spawning.done():
                raise TimeoutError(errno.ETIMEDOUT, f"its root was not mounted within {timeout:g} s")
            self._watch_spawned()
            self._note(bundle)
            left = begin + timeout - self._host.loop.time()
            await asyncio.wait([self._connected, self._exited], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if self._connected.done():
                self._connected.result()
                self.ready_at = self._host.loop.time()
                self.start_seconds = self.ready_at - begin
                if not must_stay or not await self.exits(STAY_SECONDS):
                    return
        except OSError as error:
            await to_the_end(self.kill())
            raise StartFailed(f"cannot start a container: {error.strerror or error}", [], 503) from error
        except asyncio.CancelledError:
            await to_the_end(self.kill())
            raise
        timed_out = not self._exited.done()
        if timed_out and bundle.contract != "handler":
            self.kinds += await to_the_end(self._host.workers.run(self._host.cgroups.udp_ports, self.cgroup))
        out_of_memory = self.look_for_memory()
        error = self._runtime_error()
        status = await to_the_end(self.kill())
        tail = self._output.tail
        if error and not timed_out:
            if error not in "\n".join(tail):            # crun prints it to its log alone
                self.write_line(self.id, escape_controls(error))
                tail.append(escape_controls(error))
            fault = command_fault(bundle.program, error)
            why = fault[1] if fault else f"{self._host.runtime.name} could not make the container"
            raise RuntimeFailed(why, tail, 502)
        if timed_out and not out_of_memory:
            raise StartFailed(f"{who(bundle.contract)} did not {bundle.expected} within {timeout:g} s"
                              f"{self._listened(bundle)}", tail, 504)
        end = "ran out of memory" if out_of_memory else self.describe_end(status)
        if self._ports:                         # on any that would do
            advice = ": it must stay in the foreground" if status == 0 else ""
            raise EndedAtOnce(f"{who(bundle.contract)} {end} right after it had listened{advice}", tail, 502)
        did = re.sub("(listen|connect)(?= )", r"\1ed", bundle.expected).replace("begin", "began")
        raise StartFailed(f"{who(bundle.contract)} {end} before it {did}{self._listened(bundle, status)}", tail, 502)

    def _listened(self, bundle: Bundle, status: int | None = None) -> str:
        """Return what a program that might have listened has listened on, in words, and what to do about it."""
        if bundle.contract == "handler":
            return ""
        advice = ""
        if not self.kinds and status == 0 and bundle.contract != "stdio":
            advice = " (does it start its server? if it reads stdin and answers on stdout, say --contract stdio)"
        elif bundle.why_port and (others := [kind for kind in self.kinds if kind.startswith("port ")
                                             and kind != f"port {bundle.ports[0]}"]):
            advice = f": say --{others[0]}" + (", or --port auto" if bundle.options.port else "")
        kinds = ", ".join([*dict.fromkeys(self.kinds)][:8])         # as many as a line can do with
        return f"; it listened on {kinds or 'nothing'}{advice}"

    def _runtime_error(self) -> str:
        """Return why the runtime made no container, "" if it did: from its log, to which no handler can write."""
        error = ""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):      # it did not get so far
            with open(f"{self._directory}/runtime.log", encoding="utf-8", errors="replace") as file:
                rest = file.read(64 * KIB).lstrip()
            while rest:
                entry, end = json.JSONDecoder().raw_decode(rest)        # crun's take several lines
                rest = rest[end:].lstrip()
                error = entry["msg"] if entry["level"] in ("error", "fatal") else error
        return error

    def _spawn(self, bundle: Bundle, user_namespace: str) -> asyncio.Future[int]:
        os.mkdir(self._directory, 0o710)
        os.chown(self._directory, 0, bundle.first_id)   # runc mounts control.sock as the container's root
        with open(f"{self._directory}/config.json", "xb") as file:
            file.write(bundle.render(self.id, user_namespace))
        with contextlib.ExitStack() as undo:
            given = undo.enter_context(contextlib.ExitStack())
            files = self._open_files(bundle, given)
            self._spawning = self._host.begin_spawn(bundle, self._directory, self.id, files, given)
            undo.pop_all()
        return self._spawning

    def _open_files(self, bundle: Bundle, given: contextlib.ExitStack) -> list[tuple]:
        """Return what makes the runtime's descriptors, as posix_spawn does; given closes what it is given of ours."""
        if bundle.contract in ("auto", "handler"):
            self._listen()
        if bundle.contract != "handler":
            self._bundle = bundle
            self._supervisor = Supervisor(self, self._host.loop, path=f"{self._directory}/{NOTIFY_SOCKET}")
        output = f"{self._directory}/output"            # a name by which the next daemon finds it
        os.mkfifo(output)
        os.chmod(output, 0o666)         # the image's user may open /dev/stdout; others do not reach the directory
        self._output = OutputReader(self._host.workers, os.open(output, os.O_RDONLY | os.O_NONBLOCK), self._on_output)
        # Open for reading as well: should we die, what the handler prints still has a reader, itself. It waits when
        # the pipe is full, until the next daemon reads on, rather than die of SIGPIPE.
        files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, output, os.O_RDWR, 0),
                 (os.POSIX_SPAWN_DUP2, 1, 2)]
        if self._supervisor:            # the runtime keeps its deposit for us until it ends
            files.append((os.POSIX_SPAWN_DUP2, given.enter_context(self._supervisor.deposit.dup()).fileno(), DEPOSIT))
        return files

    def _note(self, bundle: Bundle) -> None:
        """Note all that the next daemon will believe of this container."""
        os.symlink(f"{self._pid} {start_time(self._pid)} {bundle.name} {bundle.image} {bundle.contract}",
                   f"{self._directory}/note")           # a link is one call, and never half written

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):              # ENOPROTOOPT: before Linux 6.16
            # What a handler sends would be ours to close.
            self._listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        path = f"{self._directory}/control.sock"
        self._listener.bind(path)
        os.chmod(path, 0o666)           # the image's user connects; on the host the directory keeps others out
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._host.loop.add_reader(self._listener.fileno(), self._on_connect)       # of a socket, asyncio makes a repr

    def on_listen(self, port: int) -> None:
        """The program listens; on a port that is not the one we would like best, it may yet do so on a better one."""
        if not self.contract and (port in self._bundle.ports or not self._bundle.only_port):
            self._ports.append(port)
            self._host.loop.call_later(0.0 if port == self._bundle.ports[0] else PORT_GRACE, self._settle)

    def _settle(self) -> None:
        if not self.contract and self._supervisor and not self._exited.done():
            self.contract = "server"
            self.port = next((port for port in self._bundle.ports if port in self._ports), self._ports[0])
            self._supervisor.settle(self.port)
            self.close_sockets()
            self._become_ready()

    def on_begin(self) -> None:
        """The program is about to be executed, and waits for a client to have for its standard input and output."""
        self.contract = "stdio"
        self._become_ready()

    def _become_ready(self) -> None:
        self._watch_memory()
        try_remove(f"{self._directory}/config.json")    # the room is for those that start
        settle(self._connected, None)

    def _on_connect(self) -> None:
        try:
            control, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:        # out of descriptors; trying again at once would spin
            self.close_sockets()
            self._connected.set_exception(error)
            return
        self._listener.shutdown(socket.SHUT_RD)         # a second connection is refused
        self.close_sockets()
        self.contract = "handler"
        self._control = control
        control.setblocking(False)
        # A handler may send out-of-band data, which keeps the connection readable, and no MSG_PEEK shows it.
        control.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._host.loop.add_reader(control.fileno(), self._on_control)
        self._become_ready()

    # -- work --

    def hand_over(self, client: socket.socket, peer: str) -> Handover | None:
        """Give a client to the program; return None if nobody is there to take it."""
        handler = self.contract == "handler"
        if handler and self._control is None or not self.is_connected:          # it connected and let go at once
            return None
        try:
            if handler:
                rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", client.fileno())
                self._control.sendmsg([b"\0"], [rights])
                handover = Handover(client, peer, self.listen())
            else:
                handover = self._await_close(client, peer, client.getsockname()[0])
        except OSError as error:        # EPIPE, ECONNRESET: it is gone; ETOOMANYREFS: the kernel takes no more
            log.log(logging.INFO if handler else logging.ERROR, "container=%s cannot be handed a client: %s", self.id,
                    error.strerror)
            return None
        self.served += 1
        if not handler:
            self._supervisor.offer(handover)
        return handover

    def _await_close(self, client: socket.socket, peer: str, address: str, taken: bool = False) -> Handover:
        """Return a server's handover of a client, whose connection's end is what the server says. Raises OSError."""
        handover = Handover(client, peer, self._host.loop.create_future(), os.fstat(client.fileno()).st_ino, taken)
        self._host.closed.watch(handover, address, functools.partial(self._on_closed, handover))
        self.handovers.add(handover)
        return handover

    def _on_closed(self, handover: Handover, state: TcpState | None) -> None:
        handover.state = state
        settle(handover.said, Release.GONE if self._exited.done() else Release.READY)

    def is_taken(self, handover: Handover) -> bool:
        """Return whether the program has a client; else it does not get it any more. May block."""
        if self._supervisor:
            self._supervisor.withdraw(handover)
        return handover.taken

    @property
    def is_connected(self) -> bool:
        """Whether the program could take a client."""
        return self._control is not None or (
            self._supervisor is not None and not self.killed and not self._exited.done())

    def listen(self) -> asyncio.Future[Release]:
        """Return the future of what it says next."""
        self.said = self._host.loop.create_future()
        return self.said

    def end_wait(self, handover: Handover, release: Release) -> None:
        """Stop waiting for the handler, unless it has let go: that may have come before our turn."""
        if self._control is not None:
            self._on_control()
        settle(handover.said, release)

    def _on_control(self) -> None:
        """Read what the handler says: one byte is READY, anything else is its end.

        Before Linux 6.16 it can send descriptors. To take them from the queue closes them, which can wait for the lock
        of its pipe, and so can closing the connection: that is done in a thread.
        """
        try:
            data, _, flags, _ = self._control.recvmsg(2, 0, socket.MSG_PEEK)
            release = Release.GONE
            if len(data) == 1 and not flags:    # MSG_CTRUNC: a descriptor is with it
                self._control.recv(1)
                release = Release.READY
        except BlockingIOError:
            return
        except ConnectionResetError:    # it closed the connection with our message still unread in it
            release = Release.UNTAKEN
        if release != Release.READY or self.said.done():        # done: it talks out of turn
            self.close_sockets()
        settle(self.said, release)

    def _on_output(self, text: str) -> None:
        """Log a line, and say so if it was printed for want of processes. Called by any thread."""
        self.write_line(self.id, text)
        if self._looks and REFUSED_PROCESS.search(text):        # now: once it has exited, its cgroups go at once
            self._looks -= 1
            if self._host.cgroups.refused_processes(self.cgroup):
                self._looks, self._hit_pids = 0, " after it had hit --pids"
                self.write_line(self.id, "(it has hit --pids: a process or thread was refused)")
            elif REFUSED_THREAD.search(text) and not self._host.cgroups.counts_processes(self.cgroup):
                self._hit_pids = " (did it hit --pids?)"

    def describe_end(self, status: int | None) -> str:
        return describe_exit(status) + self._hit_pids

    # -- memory --

    def _watch_memory(self) -> None:
        with contextlib.suppress(OSError):              # it has ended already
            self._memory = self._host.cgroups.watch_memory(self.cgroup)
            if self._memory >= 0:
                self._host.loop.add_reader(self._memory, self._on_memory)

    def _on_memory(self, looks: int = MEMORY_LOOKS) -> None:
        """One process is killed for want of memory: the others might wait for it for ever.

        The event comes before the kernel has chosen a victim and counted it; also where a cgroup above has run out,
        whose victim may be anybody's; and once more when the cgroup has been removed.
        """
        if self._memory < 0:                    # it has exited
            return
        if self.look_for_memory():
            self.kill_soon()
        elif looks and self._host.cgroups.counts_memory(self.cgroup):
            self._host.loop.call_later(KILL_RETRY, self._on_memory, looks - 1)

    def look_for_memory(self) -> bool:
        """Return whether a process of the container was killed for want of memory, as far as its cgroup is there."""
        if self._memory >= 0:
            with contextlib.suppress(BlockingIOError):          # nothing new
                events = os.eventfd_read(self._memory)
                self._memory_told = self._memory_told or events > 1 or self._host.cgroups.counts_memory(self.cgroup)
        self.out_of_memory = self.out_of_memory or self._host.cgroups.memory_kills(self.cgroup) > 0
        return self.out_of_memory

    @property
    def may_have_run_out_of_memory(self) -> bool:
        """Whether it, or a container of its function, has run out of memory since it was started."""
        return self._memory_told or self._counted_kills()

    def _counted_kills(self) -> bool:
        """Whether the kernel has killed a process of its function for that. Only v2 knows it of those that are gone."""
        return self._host.cgroups.memory_kills(posixpath.dirname(self.cgroup)) > self._killed_before

    # -- end --

    def _watch_spawned(self) -> None:
        self._watch_exit(os.pidfd_open(self._spawning.result()))
        self._pid = self._spawning.result()

    def _watch_exit(self, pidfd: int) -> None:
        self._pidfd = pidfd
        self._host.loop.add_reader(pidfd, self._on_exit)

    def _on_exit(self) -> None:
        # That of an adopted container is unknown: runc run is no child of ours.
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]) if self._spawning else None
        if not self.look_for_memory() and not self.killed:
            # Nobody but us and the kernel sends SIGKILL to a container's first process, and its cgroup may be gone.
            self.out_of_memory = self._counted_kills() if status is None else (
                status == 128 + signal.SIGKILL and self.may_have_run_out_of_memory)
        self._unwatch()
        self._exited.set_result(status)
        if self._control is not None:
            self._on_control()                  # UNTAKEN is worth knowing
        self.close_sockets()                    # somebody outside may have the other end, or runc alone was killed
        settle(self.said, Release.GONE)

    def _unwatch(self) -> None:
        for descriptor in (self._pidfd, self._memory):
            if descriptor >= 0:
                self._host.loop.remove_reader(descriptor)
                os.close(descriptor)
        self._pidfd = self._memory = -1

    def close_sockets(self) -> None:
        """Close what the handler connects to, or is connected to, in a thread: see _on_control."""
        for ours in filter(None, (self._listener, self._control)):
            self._host.loop.remove_reader(ours.fileno())
            self._host.workers.run(ours.close)
        self._listener = self._control = None

    def _stop_supervisor(self) -> Supervisor | None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor:
            supervisor.stop()
        return supervisor

    async def leave(self) -> None:
        """Let go of the container while its handler serves a client: the next daemon will adopt it.

        But not if it holds the lock of its output's pipe, or of a listener: our end, as a process, waits for that.
        """
        if self._exited.done():                 # just now
            await self.kill()
            return
        self._left = True
        self._unwatch()
        self.close_sockets()
        joined = True
        if supervisor := self._stop_supervisor():
            joining = self._host.workers.run(supervisor.join)
            await asyncio.wait([joining], timeout=2 * JOIN_SECONDS)
            joined = joining.done() and joining.result()
        if not await self._output.close() or not joined:
            log.warning("container=%s does not let go of its output or its listener: ending it", self.id)
            await self._host.killers.run(self._host.cgroups.kill, self.cgroup)

    async def exits(self, within: float = EXIT_GRACE) -> bool:
        """Return whether it exits by itself, in a moment: its sockets end before we hear of it."""
        await asyncio.wait([self._exited], timeout=0 if self.handovers else within)
        return self._exited.done()

    async def finish(self) -> int | None:
        """End a container whose handler is done: it has EXIT_GRACE to exit by itself. Returns what kill does."""
        self.close_sockets()                    # no more work
        if self._pid and (self.contract == "handler" or self.contract == "stdio" and self.served):  # others have no end
            await asyncio.wait([self._exited], timeout=EXIT_GRACE)
        return await self.kill()

    async def kill(self) -> int | None:
        """Kill what is left of the container and remove all of it. Does no harm to one that is gone.

        Returns the exit status of runc run, which is the handler's, or 128 + the signal that ended it; None for that
        of an adopted container.
        """
        if self._left:
            return None
        self.close_sockets()
        if not self._pid and self._spawning is not None:
            await self._catch_spawned()
        if self._pid:
            await self._kill_processes()
        if (supervisor := self._stop_supervisor()) and supervisor.accepting >= 0:
            self._host.workers.run(supervisor.join)
        if self._host.runtime.has_state(self.id) or self._host.cgroups.exists(self.cgroup):     # runc was killed
            await self._host.workers.run(self._host.remove_remains, self.id, self.cgroup)
        if self._output is not None:
            await self._output.close(takes_rest=True)
        for name in ("config.json", "control.sock", NOTIFY_SOCKET, "output", "note", "runtime.log"):
            try_remove(f"{self._directory}/{name}")     # not shutil.rmtree: there may be no descriptor left
        try_remove(self._directory, os.rmdir)
        self._host.count_ended(self._function)
        return self._exited.result() if self._exited.done() else -signal.SIGKILL

    async def _catch_spawned(self) -> None:
        """Watch the runtime of a start that did not get so far, so that it can be killed."""
        await asyncio.wait([self._spawning], timeout=EXIT_GRACE)
        if not self._spawning.done():           # a disk hangs: it will find no config.json
            self._spawning.add_done_callback(end_process)
        elif not self._spawning.exception():
            try:
                self._watch_spawned()
            except OSError:                     # out of descriptors: what cannot be watched must not run
                end_process(self._spawning)

    def kill_soon(self) -> None:
        """Kill the container's processes in the background; to remove it is still to come."""
        self._host.killings.start(self._kill_processes())

    async def _kill_processes(self) -> None:
        """Kill every process of the container until runc, which waits for the first of them, is done."""
        deadline = time.monotonic() + KILL_TIMEOUT
        self.killed = self.killed or not self._exited.done()
        while not self._exited.done() and time.monotonic() < deadline:
            # Again and again: while it starts it may have no process yet. It may have thousands.
            with contextlib.suppress(OSError):
                await self._host.killers.run(self._host.cgroups.kill, self.cgroup)
            await asyncio.wait([self._exited], timeout=KILL_RETRY)
        if not self._exited.done():
            log.error("container=%s runc does not end, killing it", self.id)
            if self._pidfd >= 0:                # else it was left to the next daemon
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                await self._exited


class Streams:
    """The stdin, stdout and stderr of a command that an operator runs: a terminal, or pipes. We have the other ends.

    The runtime copies between such a terminal and one in the container, the only one that the command sees.
    """

    def __init__(self, terminal: bool, takes_input: bool, size: tuple[int, int], given: contextlib.ExitStack):
        """size is a terminal's lines and columns; given closes what the runtime gets of ours. Raises OSError."""
        self.terminal = terminal
        self.input = -1                         # what is written there the command reads
        self.outputs: dict[int, int] = {}       # what can be read here, and as which of STDOUT and STDERR
        self.files: list[tuple] = []            # that the runtime gets
        self.given_up = False                   # the command is being ended: nobody needs the rest of its output
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if terminal:
                self._open_terminal(takes_input, size, given)
            else:
                self._open_pipes(takes_input, given)
            stack.pop_all()

    def _open_terminal(self, takes_input: bool, size: tuple[int, int], given: contextlib.ExitStack) -> None:
        try:
            ours, theirs = os.openpty()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "no terminal is left on this machine (kernel.pty.max)") from None
            raise
        self.outputs[ours] = STDOUT
        given.callback(os.close, theirs)
        os.set_blocking(ours, False)
        tty.setraw(theirs)                      # lines, echo and Ctrl-C are the inner one's
        self.resize(*size)
        if takes_input:
            self.input = os.dup(ours)
        # Opened anew: it becomes the terminal of the runtime's session, which is so told of its size.
        self.files = [(os.POSIX_SPAWN_OPEN, 0, f"/proc/self/fd/{theirs}", os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1),
                      (os.POSIX_SPAWN_DUP2, 0, 2)]

    def _open_pipes(self, takes_input: bool, given: contextlib.ExitStack) -> None:
        self.files = [] if takes_input else [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        for number in (STDIN, STDOUT, STDERR) if takes_input else (STDOUT, STDERR):
            reading, writing = os.pipe2(os.O_CLOEXEC)
            ours, theirs = (writing, reading) if number == STDIN else (reading, writing)
            if number == STDIN:
                self.input = ours
            else:
                self.outputs[ours] = number
            given.callback(os.close, theirs)
            os.set_blocking(ours, False)
            os.fchmod(theirs, 0o666)            # the image's user may open /dev/stdout
            self.files.append((os.POSIX_SPAWN_DUP2, theirs, number))

    def resize(self, lines: int, columns: int) -> None:
        for ours in self.outputs if self.terminal else ():
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def close_input(self) -> None:
        """Have the command meet the end of file; in a terminal nothing means that but Ctrl-D, as it is typed."""
        if self.input >= 0:
            os.close(self.input)
        self.input = -1

    def close(self) -> None:
        self.close_input()
        while self.outputs:
            os.close(self.outputs.popitem()[0])


class Execution(Container):
    """A container that runs an operator's command: no client, no log, and no note, so that the next daemon ends it."""

    def __init__(self, host: ContainerHost, function: str, terminal: bool, takes_input: bool, size: tuple[int, int]):
        super().__init__(host, function, lambda container_id, line: None)
        self._wanted = terminal, takes_input, size
        self._streams: Streams | None = None

    async def run(self, bundle: Bundle, timeout: float, started: Callable[[Streams], None]) -> tuple[int | None, str]:
        """Run it until its command ends; return its exit status, and what there is to say of its end.

        started gets the streams, to close them. Raises StartFailed.
        """
        try:
            await self.start(bundle, timeout)
        except BaseException:
            if self._streams:
                self._host.workers.run(self._streams.close)     # see ContainerHost.begin_spawn
            raise
        started(self._streams)
        try:
            await asyncio.wait([self._exited])
            error = escape_controls(self._runtime_error())
        finally:
            self._streams.given_up = not self._exited.done()    # or the runtime waits for room for the rest
            status = await to_the_end(self.kill())
        if error:
            return 127, error                   # as in a shell: it could not be started
        return status, "the command ran out of memory (--memory)" if self.out_of_memory else ""

    def _open_files(self, bundle: Bundle, given: contextlib.ExitStack) -> list[tuple]:
        self._streams = Streams(*self._wanted, given)
        return self._streams.files

    def _note(self, bundle: Bundle) -> None:
        self._connected.set_result(None)        # nobody waits for it to be ready
        self._watch_memory_soon()

    def _watch_memory_soon(self) -> None:
        """Watch its memory once the runtime has made its cgroup: no word of the command's tells when."""
        if not self._exited.done() and not self._host.cgroups.kills_whole:
            self._watch_memory()
            if self._memory < 0:
                self._host.loop.call_later(KILL_RETRY, self._watch_memory_soon)
            else:
                self._on_memory()               # it may have run out before we watched


def end_process(spawning: asyncio.Future[int]) -> None:
    """End a child that was just spawned, if it was."""
    if not spawning.exception():
        os.kill(spawning.result(), signal.SIGKILL)
        os.waitpid(spawning.result(), 0)


def describe_exit(status: int | None) -> str:
    """Return an exit status in words. runc reports death by a signal as 128 + its number, as a shell does."""
    if status is None:
        return "ended"
    if status < 0:
        return f"vanished with runc, killed by signal {-status}"
    if status <= 128:
        return f"exited with status {status}"
    name = next((known.name for known in signal.Signals if known == status - 128), f"signal {status - 128}")
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


PIPE_SIZE = MIB                     # what a pipe may have at most (pipe(7))
MAX_LINE = 8 * KIB                  # a longer line of a handler is cut into several
MAX_OUTPUT = MIB                    # bytes of log kept of one container's output; the rest is read and dropped
LINE_OVERHEAD = 48                  # bytes that the log adds to each line
OUTPUT_CHUNK = 4 * KIB              # bytes of output read at a time
FREE_READS = 16                     # of a container's output, until more of it gathers before each
LOG_DELAY = 0.02                    # seconds in which output gathers before it is read, and lines before writing
TAIL_LINES = 20                     # lines of output shown when a deploy fails


class OutputReader:
    """Reads a container's stdout and stderr from a pipe, line by line, for as long as anybody holds its other end.

    A process that writes to a pipe holds its lock, and can hold it for long: while what it writes is fetched from a
    disk, or when its CPU time is used up. So workers read, now and then, until the container is gone.
    """

    def __init__(self, workers: Workers, descriptor: int, write_line: Callable[[str], None]):
        """descriptor is a non-blocking one; write_line is called by any thread."""
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._workers = workers
        self._descriptor = descriptor
        self._write_line = write_line
        self._partial = b""                     # the beginning of a line
        self._room = MAX_OUTPUT
        self._stopping = False
        self._takes_rest = False                # before it stops
        self._wake = asyncio.Event()            # there is something to read, or it is stopping
        self._task = workers.loop.create_task(self._follow())

    async def _follow(self) -> None:
        """Read until nobody holds the other end, or we are stopped."""
        over, reads, pause_at = False, 0, MAX_OUTPUT - OUTPUT_CHUNK
        while not over and not self._stopping:
            try:
                self._workers.loop.add_reader(self._descriptor, self._wake.set)
                await self._wake.wait()
                self._workers.loop.remove_reader(self._descriptor)
                if self._stopping:
                    break
                self._wake.clear()
                reads, over = reads + 1, await self._workers.run(self._read)
            except (OSError, MemoryError):      # out of descriptors, or of memory: try again in a moment
                reads += FREE_READS
            if reads >= FREE_READS or self._room <= pause_at:       # it prints much: so that each read finds much
                pause_at = self._room - OUTPUT_CHUNK
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), LOG_DELAY)
        if not over:
            await self._workers.run(self._end)
        self._emit_partial()

    def _close(self) -> bool:
        os.close(self._descriptor)
        return True

    def _end(self) -> None:
        with contextlib.suppress(OSError, MemoryError):
            if self._takes_rest and self._read():       # what was read last may be from before the last was written
                return
        self._close()

    def _read(self) -> bool:
        """Take what is there; return whether that was the last, and our end is closed.

        A handler may write without end, and need not even copy what it writes (vmsplice(2)): it must not wait for a
        full pipe, nor fill the log, nor cost us a copy, or much at all, where the log takes no more.
        """
        rest = PIPE_SIZE
        with contextlib.suppress(BlockingIOError):
            while rest > 0 and self._room > 0:
                data = os.read(self._descriptor, OUTPUT_CHUNK)
                if not data:
                    return self._close()
                self._log(data)
                rest -= len(data)
            while self._room <= 0 and not self._stopping:
                with open(os.devnull, "wb") as null:
                    if not os.splice(self._descriptor, null.fileno(), PIPE_SIZE, flags=os.SPLICE_F_NONBLOCK):
                        return self._close()
                time.sleep(LOG_DELAY)
        return False

    def _log(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._partial) >= MAX_LINE or self._room <= 0:
            self._emit_partial()
        if self._room <= 0:
            with contextlib.suppress(OSError):          # so that it is large enough to be emptied now and then
                fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            self._write_line(f"(output over {MAX_OUTPUT} bytes is dropped)")

    def _emit(self, line: bytes) -> None:
        for start in range(0, len(line) or 1, MAX_LINE):
            part = line[start:start + MAX_LINE]
            self._room -= len(part) + LINE_OVERHEAD         # many short lines cost as much as a few long ones
            text = escape_controls(part.decode("utf-8", "backslashreplace").removesuffix("\r"))
            self.tail.append(text)
            self._write_line(text)

    def _emit_partial(self) -> None:
        if self._partial:
            self._emit(self._partial)
            self._partial = b""

    async def close(self, takes_rest: bool = False) -> bool:
        """Read no more: what is still in the pipe is for the next reader, or is taken if the container is gone.

        Return whether it is closed soon: another, to which the container sent its end, may hold the lock.
        """
        self._stopping, self._takes_rest = True, takes_rest
        self._wake.set()
        await asyncio.wait([self._task], timeout=EXIT_GRACE)
        return self._task.done()


STUCK_SECONDS = 0.005               # until more threads come in, where all are kept waiting
MAX_WORKERS = 4096                  # threads that wait; a container can keep a few waiting


class Workers:
    """Makes system calls that a container can keep waiting, in daemon threads: the loop must not wait, nor our end.

    A handler can hold the lock of its client's socket or of its output's pipe for as long as it likes, in a write that
    sleeps in page faults while others of its container take all the CPU it may have. Nothing ends the wait of another
    thread for that lock, not even SIGKILL, but the end of the container. So one call that does not come back must hold
    up nobody. Yet most do at once, and a thread for each would cost more than they: more come in only while all are
    kept waiting. Only calls that let go of Python's lock will do.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.pending: set[asyncio.Future] = set()
        self._calls: queue.SimpleQueue = queue.SimpleQueue()        # None ends a thread
        self._outcomes: collections.deque[tuple[asyncio.Future, Any]] = collections.deque()
        self._told = False                      # the loop, that there are some
        self._limits: dict[asyncio.Future, tuple[int, Callable[[], None]]] = {}         # in looks; the oldest first
        self._looks = 0
        self._threads = 0
        self._timer: asyncio.TimerHandle | None = None
        self._start(1)

    def run(self, function: Callable, *arguments, overdue: Callable[[], None] | None = None) -> asyncio.Future:
        """Call function in a thread; overdue, which should end the wait, if that takes longer than EXIT_GRACE.

        That is counted in looks, which are made every STUCK_SECONDS: none while this process is stopped. The
        descriptors that it works on must stay open until it is done, whatever becomes of the future.
        """
        future = self.loop.create_future()
        self.pending.add(future)
        if overdue:
            self._limits[future] = self._looks + int(EXIT_GRACE / STUCK_SECONDS), overdue
        self._calls.put((future, function, arguments))
        if self._timer is None:
            self._timer = self.loop.call_later(STUCK_SECONDS, self._look)
        return future

    def _start(self, threads: int) -> None:
        with contextlib.suppress(RuntimeError):         # there is none to be had: the next look tries again
            for _ in range(threads):
                threading.Thread(target=self._work, name="worker", daemon=True).start()
                self._threads += 1

    def _work(self) -> None:
        while call := self._calls.get():
            future, function, arguments = call
            try:
                outcome = function(*arguments)
            except Exception as error:              # for the caller
                outcome = error
            self._outcomes.append((future, outcome))
            if not self._told:
                self._told = True
                with contextlib.suppress(RuntimeError):         # the loop is closed
                    self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._told = False                      # first: what comes from now on may come too late for us
        while self._outcomes:
            future, outcome = self._outcomes.popleft()
            self.pending.discard(future)
            self._limits.pop(future, None)
            settle(future, outcome)
        if not self.pending and self._timer:            # most calls come back before the look
            self._timer = self._timer.cancel()
        spare = self._threads - len(self.pending) - 1
        if spare > 0 and self._calls.empty():
            self._threads -= spare
            for _ in range(spare):
                self._calls.put(None)

    def _look(self) -> None:
        """Bring in threads if all are kept waiting, and tell of calls that are overdue."""
        self._timer = None
        self._looks += 1
        for future, (last, overdue) in list(self._limits.items()):
            if self._looks < last:
                break
            del self._limits[future]
            overdue()
        queued = self._calls.qsize()
        if queued and self._threads <= len(self.pending) - queued:
            self._start(min(queued, max(1, self._threads), MAX_WORKERS - self._threads))
        if queued or self._limits:              # else there is nothing to wake up for
            self._timer = self.loop.call_later(STUCK_SECONDS, self._look)

    @staticmethod
    async def finished(futures: Collection[asyncio.Future]) -> set[asyncio.Future]:
        """Return those that are done once all are, or none more came back for EXIT_GRACE."""
        done, pending = set(), set(futures)
        while pending:
            came, pending = await asyncio.wait(pending, timeout=EXIT_GRACE, return_when=asyncio.FIRST_COMPLETED)
            if not came:
                break
            done |= came
        return done


# ---------------------------------------------------------------------------------------------------------------------
# A server: an unmodified program that listens on TCP gets the client's own socket from accept(2)
# ---------------------------------------------------------------------------------------------------------------------

SERVER_CALLS = ({49: "bind", 50: "listen", 43: "accept", 288: "accept4", 59: "execve"}
                if platform.machine() == "x86_64" else                                  # else asm-generic/unistd.h
                {200: "bind", 201: "listen", 202: "accept", 242: "accept4", 221: "execve"})
NOTIFICATION = struct.Struct("=QIIiIQ6Q")       # struct seccomp_notif (linux/seccomp.h): id, pid, flags; seccomp_data
RESPONSE = struct.Struct("=QqiI")               # struct seccomp_notif_resp: id, value, error, flags
ADDED_DESCRIPTOR = struct.Struct("=QIIII")      # struct seccomp_notif_addfd: id, flags, source, number, its flags
NOTIFY_RECEIVE, NOTIFY_SEND, NOTIFY_IS_VALID, NOTIFY_ADD = 0xC050_2100, 0xC018_2101, 0x4008_2102, 0x4018_2103
CONTINUE, ADD_AS_NUMBER, ADD_AND_SEND = 1, 1, 2         # flags: the call goes on in the kernel; the descriptor has
                                    # a number that we choose; it is the call's result
PIDFD_THREAD = os.O_EXCL            # pidfd_open(2)
SO_DOMAIN, SO_BUF_LOCK = 39, 72     # socket(7)
INHERITED_OPTIONS = (socket.TCP_NODELAY, socket.TCP_USER_TIMEOUT)       # of TCP, unless 0
KEEPALIVE_TIMES = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
INHERITED_BUFFERS = [(1, socket.SO_SNDBUF), (2, socket.SO_RCVBUF)]      # by the bit of SO_BUF_LOCK that says it was set
MAPPED_LOOPBACK = "::ffff:127.0.0.1"        # ipv6(7)
MAX_LISTENERS = 64                  # of one container that are known, those that it made last; and that are held
FREE_ANSWERS = 32                   # useless ones in a row, by which no client was served, before the next are delayed
ANSWER_PAUSE, MAX_ANSWER_PAUSE = 0.002, 0.1     # seconds of delay for each further one, and at most
FORGIVEN = 20.0                     # useless answers in a second
INTERNAL = 0.03                     # of one: what a server accepts behind another, and what a script has executed
MAX_HELD_CALLS = 1024               # of accept(2) on one listener
STOP = 1 << 32                      # added to what wakes a Supervisor: more than it has clients
JOIN_SECONDS = 1.0                  # for a thread to end that a container may hold up
DEPOSIT = 3                         # descriptor of the runtime, which closes all above 2 before a container's exec


@dataclass(eq=False)
class Handover:
    """A client's way through a container."""
    client: socket.socket
    peer: str
    said: asyncio.Future[Release]
    inode: int = 0                      # of the client's socket, by which it is found in a server; 0: for a handler
    taken: bool = False                 # by a server, from accept(2): nobody here has a descriptor of it any more
    state: TcpState | None = None       # of its connection, when the last descriptor of a server was gone
    cookie: int = 0                     # by which the kernel knows its connection


class Call(NamedTuple):
    """A system call that waits for our answer."""
    id: int
    thread: int
    name: str
    arguments: tuple[int, ...]


@dataclass
class HeldAccepts:
    """Calls of accept(2) on a blocking socket for which there is no client yet, with our duplicate of that socket."""
    listener: int
    calls: list[Call]


class Supervisor:
    """Answers a container's listen and accept (seccomp_unotify(2)) in a thread that it alone can hold up.

    When the program listens, it is ready. When it accepts, it gets a client's own socket for the result. What makes it
    accept is a doorbell: a connection to its listener, made in its own network, that we take off its queue again. A
    thread that waits in accept(2) needs none. faasd keeps no duplicate of a listener but for those: the program may
    close it and bind its port again.

    The descriptor that tells of calls must not be closed before the container ends: its calls would fail. So it is also
    put into the queue of a socket that the runtime has, for the daemon that comes after this one, however that ends.
    """

    def __init__(self, container: Container, loop: asyncio.AbstractEventLoop, notify: int = -1, path: str = ""):
        """notify is the descriptor that tells of calls, or path where the runtime connects to send it. Raises OSError.

        container is told, on the loop, of each port that it listens on, of clients that it leaves, and of a failure.
        """
        self._container, self._loop = container, loop
        self._notify = notify
        self._port = 0                          # clients' doorbells ring there; 0: not known yet
        self._clients: collections.deque[Handover] = collections.deque()       # that wait for an accept(2)
        self._giving = threading.Lock()         # held while one of them is on its way, or accepting changes
        self._asked: dict[int, int] = {}        # ports that were asked for in a network that others share, by inode
        self._ports: dict[int, int] = {}        # of listeners, as the program knows them, by inode
        self._addresses: dict[int, tuple] = {}  # of listeners, by inode
        self._bells: dict[bytes, socket.socket] = {}    # connections of ours to a listener, by their own address
        self._answered: list[socket.socket] = []        # those that the program has accepted
        self._silent: dict[int, socket.socket] = {}     # one that was such, to be so again, by address family
        self._held: dict[int, HeldAccepts] = {}         # by the listener's inode
        self._beginning: Call | None = None             # the execve of a program that begins with its client
        self._began = not path                          # that has come
        self.accepting = -1                     # a listener whose queue the thread may be waiting for
        self._in_network = False                # the thread has joined the container's
        self._useless = 0.0                     # answers in a row, weighted, by which no client was served
        self._turned = 0.0                      # when _useless was last reduced
        self._stopping = False
        self._poll = select.poll()
        with contextlib.ExitStack() as undo:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._wake)
            self._poll.register(self._wake, select.POLLIN)
            self._receiving = undo.enter_context(contextlib.ExitStack())        # what is closed when that has come
            if path:
                self._receiver = self._receiving.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                self._receiver.bind(path)
                self._receiver.listen(1)
                self._depositing, self.deposit = map(self._receiving.enter_context, socket.socketpair())
            try:
                self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
                self._thread.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, "no thread is to be had") from error
            undo.pop_all()

    # -- for the loop --

    def offer(self, handover: Handover) -> None:
        """Have the program get a client."""
        self._clients.append(handover)
        os.eventfd_write(self._wake, 1)

    def settle(self, port: int) -> None:
        """Serve clients on a port, and leave all others to the program."""
        self._port = port
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Answer no more. Calls that wait for a client go on in the kernel. Nothing may be called but join after it."""
        os.eventfd_write(self._wake, STOP)

    # -- for workers --

    def withdraw(self, handover: Handover) -> None:
        """Do not give a client to the program, unless it has it. May block."""
        with self._giving, contextlib.suppress(ValueError):
            self._clients.remove(handover)

    def join(self) -> bool:
        """Have the thread end, and return whether it has. Blocks, for long if a process holds its listener's lock."""
        with self._giving:                      # so that its number stays its own
            if self.accepting >= 0:
                libc.shutdown(self.accepting, socket.SHUT_RDWR)
        self._thread.join(JOIN_SECONDS)
        return not self._thread.is_alive()

    # -- the thread --

    def _run(self) -> None:
        try:
            if self._notify < 0:
                self._receive_descriptor()
            self._poll.register(self._notify, select.POLLIN)
            while not self._stopping and self._turn():
                continue
        except Exception as error:              # a container's doing, or descriptors have run out
            if not self._stopping:
                log.warning("container=%s its system calls are no longer answered: %r", self._container.id, error)
                self._tell(self._container.kill_soon)
        for call in [*filter(None, [self._beginning]), *(call for held in self._held.values() for call in held.calls)]:
            self._respond(call, flags=CONTINUE)
        for held in self._held.values():
            os.close(held.listener)
        self._receiving.close()
        for bell in (*self._bells.values(), *self._answered, *self._silent.values()):
            bell.close()
        if self._notify >= 0:
            os.close(self._notify)
        while self._clients or not self._stopping:      # until the loop writes nothing any more
            with self._giving:                  # else one is withdrawn meanwhile
                while self._clients:
                    self._tell(settle, self._clients.popleft().said, Release.UNTAKEN)
            if not self._stopping:
                self._hear()
        os.close(self._wake)

    def _tell(self, callback: Callable, *arguments) -> None:
        with contextlib.suppress(RuntimeError):         # the loop is closed
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _hear(self) -> None:
        self._stopping = os.eventfd_read(self._wake) >= STOP

    def _receive_descriptor(self) -> None:
        """Wait for the runtime, which sends the descriptor with the container's state (runtime-spec, config-linux)."""
        self._poll.register(self._receiver, select.POLLIN)
        while self._notify < 0:
            events = dict(self._poll.poll())
            if self._wake in events:
                self._hear()
                if self._stopping:
                    raise InterruptedError(errno.EINTR, "stopped")
            if self._receiver.fileno() in events:
                with self._receiver.accept()[0] as connection:
                    self._notify = receive_descriptor(connection)
        self._poll.unregister(self._receiver)
        socket.send_fds(self._depositing, [b"\0"], [self._notify])
        self._receiving.close()

    def _turn(self) -> bool:
        """Wait for something, and do it. Return whether there is a process left."""
        events, now = dict(self._poll.poll()), time.monotonic()
        self._useless, self._turned = max(0.0, self._useless - FORGIVEN * (now - self._turned)), now
        if self._wake in events:
            self._hear()
        for inode, held in list(self._held.items()):
            if self._clients or held.listener in events or not self._may_serve(inode):
                self._resume(inode)
        for address in [address for address, bell in self._bells.items() if bell.fileno() in events]:
            self._useless += 1
            self._silence(self._bells.pop(address))     # nobody took it: its listener is closed
        if events.get(self._notify, 0) & select.POLLIN:
            self._answer()
        elif self._notify in events:            # POLLHUP
            return False
        if self._beginning and self._clients:
            self._begin(self._beginning)
        while self._answered:                   # now: the client has not waited for that
            self._silence(self._answered.pop())
        self._ring()
        if self._useless > FREE_ANSWERS:        # its thread waits meanwhile
            is_readable(self._wake, min(ANSWER_PAUSE * (self._useless - FREE_ANSWERS), MAX_ANSWER_PAUSE))
        return True

    def _answer(self) -> None:
        """Answer one call."""
        try:
            received = fcntl.ioctl(self._notify, NOTIFY_RECEIVE, bytes(NOTIFICATION.size))
        except FileNotFoundError:               # its caller was killed, or met a signal, and calls again
            self._useless += 1
            return
        identity, thread, _, number, _, _, *arguments = NOTIFICATION.unpack(received)
        call = Call(identity, thread, SERVER_CALLS[number], tuple(arguments))
        if call.name == "execve":
            self._useless += INTERNAL
            self._execute(call)
            return
        self._useless += 1
        for held in self._held.values():        # a signal has ended the call before
            held.calls = [other for other in held.calls if other.thread != thread]
        try:
            duplicate = self._duplicate(call)
            try:
                answer = {"bind": self._bind, "listen": self._listen}.get(call.name, self._accept)(call, duplicate)
            finally:                            # first: the program may close its own next, and bind its port again
                if not any(held.listener == duplicate for held in self._held.values()):
                    os.close(duplicate)
            answer()
        except OSError as error:                # what the program's own call would have met, such as EBADF
            self._respond(call, error.errno or errno.EIO)

    def _respond(self, call: Call, error: int = 0, flags: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):            # it is gone
            fcntl.ioctl(self._notify, NOTIFY_SEND, RESPONSE.pack(call.id, 0, -error, flags))

    def _check(self, call: Call) -> None:
        """Raise FileNotFoundError if the caller is gone: what was looked up by its number may be another's."""
        fcntl.ioctl(self._notify, NOTIFY_IS_VALID, struct.pack("=Q", call.id))

    def _duplicate(self, call: Call) -> int:
        """Return a duplicate of the descriptor that a call is about. Raises OSError."""
        try:
            pidfd = os.pidfd_open(call.thread, PIDFD_THREAD)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            pidfd = os.pidfd_open(thread_group(call.thread))    # before Linux 6.9 there is none for a thread
        with kept_open(pidfd):
            self._check(call)
            return system_call(SYS_PIDFD_GETFD, pidfd, ctypes.c_int(call.arguments[0]).value, 0)

    # -- execve --

    def _execute(self, call: Call) -> None:
        """Have a program wait for a client, and those that it executes in its turn go on."""
        if not self._began:
            self._began, self._beginning = True, call
            self._tell(self._container.on_begin)
        elif self._beginning and call.thread == self._beginning.thread:     # runc's Go sends its threads signals
            self._beginning = call
        else:
            self._respond(call, flags=CONTINUE)

    def _begin(self, call: Call) -> None:
        """Execute a program with a client's socket for its standard input and output."""
        with self._giving:
            if not self._clients:               # it was withdrawn just now
                return
            handover = self._clients[0]
            os.set_blocking(handover.client.fileno(), True)
            try:
                for number in (0, 1):
                    fcntl.ioctl(self._notify, NOTIFY_ADD, ADDED_DESCRIPTOR.pack(
                        call.id, ADD_AS_NUMBER, handover.client.fileno(), number, 0))
            except FileNotFoundError:           # a signal has ended the call, and it comes again
                os.set_blocking(handover.client.fileno(), False)
                return
            self._clients.popleft()
            handover.taken, self._beginning = True, None
        os.close(handover.client.detach())
        self._respond(call, flags=CONTINUE)

    # -- bind and listen --

    def _bind(self, call: Call, unbound: int) -> Callable[[], None]:
        """Bind a server to a port of its own on the loopback interface, where it shares its network with others.

        They want the same port. Doorbells find the one that it got.
        """
        with self._memory(call) as memory:
            start = os.pread(memory, 4, call.arguments[1])
            (family,), (port,) = struct.unpack("=H2x", start), struct.unpack(">2xH", start)
        hosts = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: MAPPED_LOOPBACK}
        domain, kind = (get_option(unbound, socket.SOL_SOCKET, option) for option in (SO_DOMAIN, socket.SO_TYPE))
        if not port or family != domain or family not in hosts or kind != socket.SOCK_STREAM:
            return functools.partial(self._respond, call, flags=CONTINUE)
        with as_socket(unbound, domain) as held:
            if family == socket.AF_INET6:       # ::1 may not be there: IPv6 can be switched off
                set_option(unbound, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            held.bind((hosts[family], 0))
        self._asked[os.fstat(unbound).st_ino] = port
        if len(self._asked) > MAX_LISTENERS:
            del self._asked[next(iter(self._asked))]
        return functools.partial(self._respond, call)

    def _listen(self, call: Call, listener: int) -> Callable[[], None]:
        """Do what a call of listen(2) asks for. It is done here, so that the listener is there when we say so."""
        inode, domain = os.fstat(listener).st_ino, get_option(listener, socket.SOL_SOCKET, SO_DOMAIN)
        if domain not in (socket.AF_INET, socket.AF_INET6):
            self._note("a Unix socket" if domain == socket.AF_UNIX else "a socket of another kind")
            return functools.partial(self._respond, call, flags=CONTINUE)
        succeeded(libc.listen(listener, ctypes.c_int(call.arguments[1])))
        if inode not in self._addresses:
            self._join_network(call)
            if len(self._addresses) == MAX_LISTENERS:   # one that clients do not come by, if there is one
                self._forget(min(self._ports, key=lambda known: self._ports[known] == self._port))
            with as_socket(listener, domain) as held:
                self._addresses[inode] = held.getsockname()
            self._ports[inode] = self._asked.get(inode, self._addresses[inode][1])
            self._note(f"port {self._ports[inode]}")
        self._tell(self._container.on_listen, self._ports[inode])
        return functools.partial(self._respond, call)

    def _forget(self, inode: int) -> None:
        del self._addresses[inode], self._ports[inode]

    def _note(self, kind: str) -> None:
        if len(self._container.kinds) < MAX_LISTENERS:
            self._container.kinds.append(kind)

    def _join_network(self, call: Call) -> None:
        """Have this thread's sockets be in the container's network, where no process can leave it."""
        if not self._in_network:
            with kept_open(os.open(f"/proc/{call.thread}/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
                self._check(call)
                succeeded(libc.setns(namespace, CLONE_NEWNET))
            self._in_network = True

    # -- accept --

    def _accept(self, call: Call, listener: int) -> Callable[[], None]:
        """Answer an accept(2) as the kernel would: with what is in the queue, and clients in the place of doorbells.

        What it returns does it, once our duplicate of the listener is closed. A doorbell stays in the queue for as long
        as others wait whom it might ring in.
        """
        inode = os.fstat(listener).st_ino
        if not self._may_serve(inode):
            flags = call.arguments[3] if call.name == "accept4" else 0
            waits = os.get_blocking(listener) or is_readable(listener, 0)
            if (waits and not flags & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                    and get_option(listener, socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
                self._useless -= 1 - INTERNAL   # somebody is served, or will be
            return functools.partial(self._respond, call, flags=CONTINUE)
        while len(self._clients) <= 1 and is_readable(listener, 0):
            connection, address = self._take_from_queue(listener)
            with kept_open(connection):
                if address not in self._bells:  # the program has connected to itself
                    self._inject(call, connection, address)
                    self._useless -= 1 - INTERNAL
                    return lambda: None
            self._answered.append(self._bells.pop(address))
            if self._clients:
                break
        if self._clients:
            return functools.partial(self._give, call, inode, inherited_options(listener))
        if not os.get_blocking(listener):
            return functools.partial(self._respond, call, errno.EAGAIN)
        if inode in self._held:
            calls = self._held[inode].calls
            calls.append(call)
            if len(calls) > MAX_HELD_CALLS:     # most of their threads were killed
                return functools.partial(self._respond, calls.pop(0), flags=CONTINUE)
        elif len(self._held) < MAX_LISTENERS:
            self._held[inode] = HeldAccepts(listener, [call])
            self._poll.register(listener, select.POLLIN)
        else:
            return functools.partial(self._respond, call, flags=CONTINUE)
        return lambda: None

    def _take_from_queue(self, listener: int) -> tuple[int, bytes]:
        """Accept a connection; return it and its peer's address. It waits if others took it first, until stop()."""
        self.accepting = listener
        try:
            return with_address(libc.accept4, listener, os.O_CLOEXEC)
        finally:
            with self._giving:
                self.accepting = -1

    def _may_serve(self, inode: int) -> bool:
        """Whether a listener is one that clients may come by."""
        return inode in self._ports and self._port in (0, self._ports[inode])

    def _give(self, call: Call, inode: int, options: list[tuple[int, int, int]]) -> None:
        """Give the client that waits longest to a program that accepts; if that is gone, the client waits on."""
        with self._giving:
            if not self._clients:               # it was withdrawn just now
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            handover = self._clients[0]
            try:
                for option in options:
                    set_option(handover.client.fileno(), *option)
                host, port = handover.peer.rsplit(":", 1)
                port, host = struct.pack(">H", int(port)), socket.inet_aton(host)
                address = struct.pack("=H2s4s8x", socket.AF_INET, port, host)
                if len(self._addresses[inode]) == 4:    # IPv6: mapped (ip(7), ipv6(7))
                    address = struct.pack("=H2s14x2s4s4x", socket.AF_INET6, port, b"\xff\xff", host)
                self._inject(call, handover.client.fileno(), address)
            except OSError:
                os.set_blocking(handover.client.fileno(), False)
                raise
            self._clients.popleft()
            handover.taken = True
        self._useless = 0.0
        os.close(handover.client.detach())      # the program's close must be the last

    def _inject(self, call: Call, connection: int, address: bytes) -> None:
        """Make a connection, whose peer has that address, the result of an accept(2). Raises OSError."""
        flags = call.arguments[3] if call.name == "accept4" else 0
        os.set_blocking(connection, not flags & socket.SOCK_NONBLOCK)
        if call.arguments[1]:
            self._write_address(call, address)
        descriptor_flags = os.O_CLOEXEC if flags & socket.SOCK_CLOEXEC else 0
        fcntl.ioctl(self._notify, NOTIFY_ADD, ADDED_DESCRIPTOR.pack(
            call.id, ADD_AND_SEND, connection, 0, descriptor_flags))

    def _write_address(self, call: Call, address: bytes) -> None:
        """Write a peer's address where the caller wants it, cut to its room (accept(2)). Raises OSError."""
        family, = struct.unpack_from("=H", address)
        address = address[:28 if family == socket.AF_INET6 else 16]             # struct sockaddr_in6, sockaddr_in
        with self._memory(call) as memory:
            room, = struct.unpack("=i", os.pread(memory, 4, call.arguments[2]))
            if room < 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            os.pwrite(memory, address[:room], call.arguments[1])
            os.pwrite(memory, struct.pack("=i", len(address)), call.arguments[2])

    @contextlib.contextmanager
    def _memory(self, call: Call) -> Iterator[int]:
        """Open the caller's memory. Raises OSError: EFAULT for addresses that are none, as the call itself would.

        Once open, it is one process's for ever, whatever becomes of its number.
        """
        try:
            with opened(f"/proc/{call.thread}/mem", os.O_RDWR) as memory:
                self._check(call)
                yield memory
        except (OSError, OverflowError, struct.error) as error:
            if getattr(error, "errno", errno.EIO) != errno.EIO:
                raise
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from error

    # -- clients --

    def _resume(self, inode: int) -> None:
        """Answer calls that were kept waiting, except those that have to wait on."""
        held = self._held.pop(inode)
        self._poll.unregister(held.listener)
        while held.calls and (self._clients or not self._may_serve(inode) or is_readable(held.listener, 0)):
            call = held.calls.pop(0)
            try:
                answer = self._accept(call, held.listener)
                if inode in self._held:         # it has to wait on
                    held.calls.append(self._held.pop(inode).calls[0])
                    self._poll.unregister(held.listener)
                    break
                if not held.calls:              # first: see _answer
                    os.close(held.listener)
                answer()
            except OSError as error:
                self._respond(call, error.errno or errno.EIO)
        if held.calls:
            self._held[inode] = held
            self._poll.register(held.listener, select.POLLIN)

    def _ring(self) -> None:
        """Ring a doorbell for clients that wait: one for each listener that might be woken. Raises OSError."""
        while len(self._bells) < min(len(self._clients), len(self._ports)):
            inode = next((inode for inode, port in self._ports.items() if port == self._port), None)
            if inode is None:                   # its listeners are closed: --timeout ends the wait
                return
            address = self._addresses[inode]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
            family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
            bell = self._silent.pop(family, None) or socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                with contextlib.suppress(BlockingIOError):      # it is connected all the same
                    bell.connect((host, *address[1:]))
                with contextlib.suppress(OSError):      # the queue is full; or this one of several listeners is closed
                    bell.send(b"\0")            # TCP_DEFER_ACCEPT, where the program has set it, waits for that
                self._bells[with_address(libc.getsockname, bell.fileno())[1]] = bell
                self._poll.register(bell, 0)    # tells when it is reset
            except OSError:
                bell.close()
                if address[0] == "::":          # there is no ::1
                    self._addresses[inode] = (MAPPED_LOOPBACK, *address[1:])
                else:                           # the listener is closed
                    self._forget(inode)

    def _silence(self, bell: socket.socket) -> None:
        """End a doorbell, and keep it if there is no other: that is cheaper than a new one."""
        self._poll.unregister(bell)
        reset_connection(bell)
        if self._silent.setdefault(bell.family, bell) is not bell:
            bell.close()


def thread_group(thread: int) -> int:
    """Return the process of a thread. Raises OSError."""
    with opened(f"/proc/{thread}/status", os.O_RDONLY) as status:
        group = re.search(rb"^Tgid:\t([0-9]+)", os.pread(status, 256, 0), re.MULTILINE)
    return int(group[1]) if group else 0


def as_socket(descriptor: int, domain: int) -> socket.socket:
    """Return a socket of Python's with a duplicate of a descriptor.

    Given a descriptor, Python asks for its address, and the kernel for that waits for the socket's lock. A handler can
    hold that for as long as it lives, and Python would wait with all its threads. So it gets the descriptor later.
    """
    held = socket.socket(domain, socket.SOCK_STREAM)
    os.dup2(descriptor, held.fileno(), inheritable=False)
    return held


def with_address(call: Callable, descriptor: int, *flags: int) -> tuple[int, bytes]:
    """Return the result of a system call on a socket, and the address that it tells. Raises OSError."""
    address = ctypes.create_string_buffer(28)           # struct sockaddr_in6, the largest
    return succeeded(call(descriptor, address, ctypes.byref(ctypes.c_uint(len(address))), *flags)), address.raw


def inherited_options(listener: int) -> list[tuple[int, int, int]]:
    """Return level, name and value of options that the kernel would have copied from a listener. Raises OSError."""
    kept_alive = get_option(listener, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = [(socket.IPPROTO_TCP, option, value)
               for option in (*INHERITED_OPTIONS, *(KEEPALIVE_TIMES if kept_alive else ()))     # else ours stay
               if (value := get_option(listener, socket.IPPROTO_TCP, option))]
    locked = get_option(listener, socket.SOL_SOCKET, SO_BUF_LOCK)
    return options + [(socket.SOL_SOCKET, option, get_option(listener, socket.SOL_SOCKET, option) // 2)
                      for bit, option in INHERITED_BUFFERS if locked & bit]     # the kernel doubles what is set


def get_option(descriptor: int, level: int, option: int) -> int:
    """Return a number that is an option of a socket. Others may hold its lock, so not by Python: see TcpState.of."""
    value, size = ctypes.c_int(), ctypes.c_uint(4)
    succeeded(libc.getsockopt(descriptor, level, option, ctypes.byref(value), ctypes.byref(size)))
    return value.value


def set_option(descriptor: int, level: int, option: int, value: int) -> None:
    """Set an option of a socket, whose lock others may hold: see get_option. Raises OSError."""
    succeeded(libc.setsockopt(descriptor, level, option, ctypes.byref(ctypes.c_int(value)), 4))


NETLINK_SOCK_DIAG, SKNLGRP_INET_TCP_DESTROY, SOCK_DESTROY = 4, 1, 21    # linux/netlink.h, linux/sock_diag.h
NLM_F_REQUEST, NLM_F_ACK = 1, 4     # linux/netlink.h
SO_RCVBUFFORCE, SO_COOKIE = 33, 57  # socket(7)
DIAG_COOKIE, DIAG_ATTRIBUTES, DIAG_INFO = 60, 88, 2     # offsets in a message (linux/inet_diag.h); INET_DIAG_INFO
DIAG_ADDRESS = 24                   # of this end
DIAG_BUFFER = 8 * MIB               # for messages that wait for us


class ClosedConnections:
    """Says when the last descriptor of a client's connection is gone, and the kernel is done with it. On the loop.

    The kernel sends a message for each TCP socket of ours that it destroys (sock_diag(7)), with its cookie and
    tcp_info. A filter keeps those of other connections of this machine from waking us.
    """

    def __init__(self, workers: Workers, subnet: ipaddress.IPv4Network, port: int):
        """port is that of our end."""
        self._workers, self._loop, self._subnet, self._port = workers, workers.loop, subnet, port
        self._waiting: dict[int, tuple[int, str, Callable[[TcpState | None], None]]] = {}       # by cookie
        self._socket: socket.socket | None = None
        self._searching: asyncio.Task | None = None

    def watch(self, handover: Handover, address: str, callback: Callable[[TcpState | None], None]) -> None:
        """Call back when a client's connection to address is gone, with None if how is not known. Raises OSError.

        A container may have its socket, and hold its lock: it must be asked nothing that takes that.
        """
        if self._socket is None:
            self._open()
        handover.cookie, = struct.unpack("=Q", handover.client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
        self._waiting[handover.cookie] = handover.inode, address, callback

    def forget(self, handover: Handover) -> None:
        self._waiting.pop(handover.cookie, None)

    def destroy(self, handover: Handover, address: str) -> None:
        """Reset a client's connection to address (linux/inet_diag.h). May block. Failure is logged."""
        host, _, port = handover.peer.rpartition(":")
        request = struct.pack("=IHHIIBB2xI", 72, SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, 0, 0, socket.AF_INET,
                              socket.IPPROTO_TCP, INT)      # in any state
        request += struct.pack(">HH4s12x4s12x", self._port, int(port), socket.inet_aton(address),
                               socket.inet_aton(host)) + struct.pack("=IQ", 0, handover.cookie)
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
                diag.send(request)
                result, = struct.unpack_from("=i", diag.recv(KIB), 16)
            if result not in (0, -errno.ENOENT):        # it is gone
                raise OSError(-result, os.strerror(-result))
        except OSError as error:
            log.warning("cannot end the connection of %s, which takes no answer: %s", host, error.strerror)

    def _open(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, DIAG_BUFFER)
        attach_filter(self._socket, (
            (BPF_LOAD_WORD, 0, 0, DIAG_ADDRESS),
            (BPF_AND, 0, 0, int(self._subnet.netmask)),
            (BPF_JUMP_EQUAL, 0, 1, int(self._subnet.network_address)),
            (BPF_RETURN, 0, 0, 0xFFFF_FFFF),                                # all of the message
            (BPF_RETURN, 0, 0, 0)))                                         # none
        self._socket.bind((0, 1 << SKNLGRP_INET_TCP_DESTROY - 1))
        self._loop.add_reader(self._socket, self._on_messages)

    def _on_messages(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                data = self._socket.recv(COPY_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:            # ENOBUFS: there were more messages than the kernel keeps for us
                log.warning("missed messages of the kernel on closed connections: %s", error.strerror)
                if self._searching is None or self._searching.done():
                    self._searching = self._loop.create_task(self._find_gone())
                continue
            cookie, = struct.unpack_from("=Q", data, DIAG_COOKIE)
            if cookie in self._waiting:
                *_, callback = self._waiting.pop(cookie)
                info = self._attribute(data)
                callback(TcpState.from_info(info) if info else None)

    async def _find_gone(self) -> None:
        """Find out which connections are gone whose message was lost."""
        await asyncio.sleep(1)                  # others may be lost meanwhile
        waiting = list(self._waiting.items())
        addresses = {address for _, (_, address, _) in waiting}
        present = await self._workers.run(read_connections, addresses) if addresses else {}
        for cookie, (inode, _, callback) in waiting:
            if inode not in present and self._waiting.pop(cookie, None):
                callback(None)

    @staticmethod
    def _attribute(data: bytes) -> bytes:
        """Return the tcp_info of a message."""
        offset = DIAG_ATTRIBUTES
        while offset + 4 <= len(data):
            length, kind = struct.unpack_from("=HH", data, offset)
            if kind == DIAG_INFO:
                return data[offset + 4:offset + length]
            offset += max(4, length + 3 & ~3)
        return b""


# ---------------------------------------------------------------------------------------------------------------------
# What a container is made of: its root, config.json, seccomp, the runtime, cgroups
# ---------------------------------------------------------------------------------------------------------------------


MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32        # mount(2)
MS_BIND, MS_REC, MS_SLAVE, MS_SHARED = 1 << 12, 1 << 14, 1 << 19, 1 << 20
MNT_DETACH = 2                      # umount2(2)
CLONE_NEWNS = 0x2_0000              # unshare(2)


def mount_here(kind: str, source: str, target: str, flags: int, options: str = "") -> None:
    """Mount in the calling thread's mount namespace: mount(2) without a program. May block. Raises OSError."""
    try:
        succeeded(libc.mount(*map(os.fsencode, (source, target, kind)), ctypes.c_ulong(flags), os.fsencode(options)))
    except OSError as error:
        raise OSError(error.errno, f"mounting {kind or 'what is there'} on {target}: {error.strerror}") from None


def mount_root(place: str, bundle: Bundle) -> None:
    """Mount a root on place/root that looks like a bundle's and can be written, in memory. Raises OSError.

    It is there for the calling thread and the processes it makes, in a mount namespace that ends with them: nobody else
    sees these mounts, has to copy them, or finds them left. What is written counts as its writer's memory. That the
    image is not mounted nosuid and nodev does not matter. Propagation leads in and not out, so that what the host
    unmounts is not kept.
    """
    succeeded(libc.unshare(CLONE_NEWNS))
    mount_here("", "", "/", MS_REC | MS_SLAVE)
    memory = bundle.options.memory      # a file costs some too, so there may be one for each 4 KiB
    mount_here("tmpfs", "faasd", place, MS_NOSUID | MS_NODEV, f"mode=0711,size={memory},nr_inodes={memory // 4096}")
    for name in ("work", "root", f"upper{bundle.etc}"):
        os.makedirs(f"{place}/{name}")
    functions = "" if bundle.own_network else read_text(bundle.names)       # as they are named now
    hosts = f"{HOSTS}127.0.0.1\t{bundle.hostname}\n{functions}"
    for name, text in (("hosts", hosts), ("hostname", f"{bundle.hostname}\n")):
        with open(f"{place}/upper{bundle.etc}/{name}", "xb", 0) as file:
            os.fchown(file.fileno(), bundle.first_id, bundle.first_id)
            file.write(text.encode())
    # What is the container's own is there before the overlay, which would have to copy /etc and note what is replaced.
    for path in itertools.accumulate(bundle.etc.rstrip("/").split("/"), "{}/{}".format):
        image = os.stat(f"{bundle.rootfs}{path}")       # what the upper directory has is what shows
        os.chown(f"{place}/upper{path}", image.st_uid, image.st_gid)
        shutil.copystat(f"{bundle.rootfs}{path}", f"{place}/upper{path}")
    lower, upper, work = (re.sub(r"[\\,:]", r"\\\g<0>", path)
                           for path in (bundle.rootfs, f"{place}/upper", f"{place}/work"))
    mount_here("overlay", "faasd", f"{place}/root", MS_NOSUID | MS_NODEV,
               f"lowerdir={lower},upperdir={upper},workdir={work}")
    for path in bundle.process.get("image_volumes", ()) if bundle.options.read_only else ():    # older ones have none
        mount_here("", f"{place}/root{path}", f"{place}/root{path}", MS_BIND)       # as in docker, they stay writable


NAMES = "hosts/functions"           # in RUN_DIR, in a directory where dnsmasq's hostsdir finds nothing else
ROOT = "rootfs"                     # in RUN_DIR: where containers' roots are mounted, each in a namespace of its own
HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def mount_secrets(root: str, bundle: Bundle) -> None:
    """Put secrets on a tmpfs of their own, for the image's user alone to read. Raises OSError."""
    directory, = {posixpath.dirname(path) for path in bundle.secrets}
    Rootfs(root, bundle.first_id, Budget(0, 0)).make_directory(os.fsencode(directory))
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount_here("tmpfs", "faasd", f"{root}{directory}", flags,
               f"mode=0755,uid={bundle.first_id},gid={bundle.first_id},size={MAX_SECRETS * MAX_SECRET}")
    for path, value in bundle.secrets.items():
        with open(os.open(f"{root}{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
            os.fchown(file.fileno(), *(bundle.first_id + number for number in bundle.user))
            file.write(value)
    mount_here("", "", f"{root}{directory}", flags | MS_REMOUNT | MS_RDONLY | MS_BIND)


class Bundle:
    """A function's config.json, rendered once; for each container its id and the user namespace are filled in."""

    def __init__(self, name: str, image: dict, options: Options, rootfs: Path, run_dir: Path, cgroups: Cgroups,
                 apparmor: str = "", mounts: Iterable[dict] = (), contract: str = "handler", port: int = 0,
                 number: int = 0):
        """image is an image.json's content; mounts are what a rootfs that is no unpacked image is made of."""
        self.name, self.image, self.options, self.process = name, image["version"], options, image["process"]
        self.rootfs = str(rootfs)
        self.hostname, self.names = options.hostname or name, run_dir / NAMES
        self.etc = posixpath.dirname(self.process["resolv_conf"])           # its real path
        self.first_id: int = image["first_id"]          # host id of the containers' root
        self.contract = contract                # auto: what it does first decides
        env = dict(entry.split("=", 1) for entry in (*self.process["env"], *options.env))
        exposed = sorted(int(match[1]) for match in map(re.compile("([1-9][0-9]{0,4})(/tcp)?").fullmatch,
                                                        self.process.get("exposed_ports", [])) if match)
        default = int(env["PORT"]) if re.fullmatch("[0-9]{1,5}", env.get("PORT", "")) else DEFAULT_PORT
        self.ports = [port] if port else exposed or [default]       # that a server should listen on, the best first
        self.only_port = bool(port) or len(exposed) == 1        # the best: it is of no use on any other
        self.why_port = " (--port)" if options.port else " (EXPOSE)" if len(exposed) == 1 else ""   # … as somebody said
        self.own_network = options.net == "none"
        self.volumes: list[Volume] = self.process.get("volumes", [])        # by their real paths in the image
        self.user = self.process["uid"], self.process["gid"]
        self.secrets: dict[str, bytes] = self.process.get("secrets", {})    # by their real paths in the image
        self._mark = f"@{secrets.token_hex(16)}@"       # stands for the id; nothing a user writes contains it
        self._namespace_mark = f"@{secrets.token_hex(16)}@"
        spec = self._spec(run_dir, cgroups, apparmor, mounts, number)
        self._template, self.program = json.dumps(spec), spec["process"]["args"][0]
        check_sizes(spec["process"], len(self._template))

    def _spec(self, run_dir: Path, cgroups: Cgroups, apparmor: str, mounts: Iterable[dict], number: int) -> dict:
        """Return the OCI runtime configuration (runtime-spec config.md), with marks for what differs."""
        options, process = self.options, self.process
        default = [f"HOSTNAME={self.hostname}",
                   *([f"PORT={self.ports[0]}"] if self.contract in ("auto", "server") else [])]
        env = merge_env([*default, *process["env"]], [
            *options.env, f"FAAS_FUNCTION={self.name}", f"FAAS_VERSION={number}", f"FAAS_CONTAINER_ID={self._mark}"])
        ids = [{"containerID": 0, "hostID": self.first_id, "size": IDS}]
        soft, hard = MAX_OPEN_FILES
        seccomp = container_filter(self.volumes)
        if self.contract != "handler":
            calls = ["listen", "accept", "accept4", *(["bind"] if not self.own_network else [])]
            calls = ["execve"] if self.contract == "stdio" else calls
            seccomp = supervised(seccomp, calls, f"{run_dir}/containers/{self._mark}/{NOTIFY_SOCKET}")
        network = {"none": [{"type": "network"}], "host": [],       # none of its own
                   "egress": [{"type": "network", "path": str(namespace_path(run_dir, self.name))}]}[options.net]
        return {
            "ociVersion": "1.0.2",
            "hostname": self.hostname,
            "root": {"path": str(run_dir / ROOT / "root"), "readonly": options.read_only},
            "process": {
                "terminal": False, "cwd": process["cwd"], "args": command_line(process, options), "env": env,
                "user": {"uid": process["uid"], "gid": process["gid"], "additionalGids": process["groups"]},
                # Not what an operator gave us against the OOM killer; to lower what is higher takes a capability.
                "oomScoreAdj": max(0, int(read_text("/proc/self/oom_score_adj") or 0)),
                "noNewPrivileges": True, **({"apparmorProfile": apparmor} if apparmor else {}),
                **({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": soft, "hard": hard}]} if can_set_limits() else {}),
                "capabilities": capabilities(options, process, self.contract),
            },
            "mounts": [*mounts, *self._mounts(run_dir), *cgroups.mounts(self.name, self._mark)],
            "linux": {
                "namespaces": [*({"type": kind} for kind in NAMESPACES), *network,
                               {"type": "user", "path": self._namespace_mark}],
                "uidMappings": ids, "gidMappings": ids,
                # As docker has it: a program that is not root may listen on port 80. Others' networks are not its own.
                **({"sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"}} if self.own_network else {}),
                **({"seccomp": seccomp} if seccomp else {}),
                "cgroupsPath": cgroups.path(self.name, self._mark),
                "maskedPaths": [path for path in MASKED_PATHS if self.own_network or not path.startswith("/sys/")],
                "readonlyPaths": READONLY_PATHS,
                "resources": {
                    "devices": [{"allow": False, "access": "rwm"}],     # runc adds null, zero, tty and their like
                    "memory": {"limit": options.memory, **({"swap": options.memory} if cgroups.can_limit_swap else {})},
                    "cpu": {"quota": int(options.cpus * CPU_PERIOD), "period": CPU_PERIOD},
                    "pids": {"limit": options.pids},
                    **({"unified": {"memory.oom.group": "1"}} if cgroups.kills_whole else {}),
                },
            },
        }

    def _mounts(self, run_dir: Path) -> list[dict]:
        """Return the mounts of a container.

        The kernel gives a container sysfs only with a network namespace that its own user namespace made. One that
        joins another gets a /sys of its own: the host's, bound there, would show the host's interfaces.
        """
        mounts = [
            mount("/proc", "proc", "noexec", "nodev"),
            mount("/dev", "tmpfs", "noexec", "strictatime", "mode=755", "size=1m"),
            # All containers of a machine share some 3,000 terminals (kernel.pty.max).
            mount("/dev/pts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5", "max=16"),
            mount("/dev/shm", "tmpfs", "nodev", f"size={self.options.shm_size}", "noexec", "mode=1777"),
            mount("/dev/mqueue", "mqueue", "noexec", "nodev"),
        ]
        if self.contract in ("auto", "handler"):
            mounts.append(mount(CONTROL_SOCKET, "bind", "bind", "nodev", "noexec",
                                source=f"{run_dir}/containers/{self._mark}/control.sock"))
        if self.own_network:
            return [*mounts, mount("/sys", "sysfs", "noexec", "nodev", "ro")]
        return [*mounts, mount("/sys", "tmpfs", "nodev", "size=4k", "noexec", "ro", "mode=555"),
                mount(self.process["resolv_conf"], "bind", "bind", "ro", "nodev", "noexec",
                      source=str(resolv_conf_path(run_dir, self.options.net)))]

    @property
    def expected(self) -> str:
        """What a container has not done that did not become ready, in words that follow "did not"."""
        wanted = f"listen on port {self.ports[0]}{self.why_port}" if self.only_port else "listen on a TCP port"
        connect = f"connect to {CONTROL_SOCKET}"
        return {"server": wanted, "stdio": "begin", "auto": f"{wanted} or {connect}"}.get(self.contract, connect)

    def for_command(self, command: list[str], more_env: Iterable[str], terminal: bool, size: tuple[int, int]) -> Bundle:
        """Return the bundle of a container that runs a command instead, and takes no client; all else is the same."""
        spec, filter_ = json.loads(self._template), container_filter(self.volumes)
        process, linux = spec["process"], spec["linux"]
        process.update(args=command, terminal=terminal, env=merge_env(process["env"], more_env))
        if terminal:                    # crun takes its lines and columns from here, runc from its own terminal
            process["consoleSize"] = dict(zip(("height", "width"), size, strict=True))
        if terminal and not any(entry.startswith("TERM=") for entry in process["env"]):
            process["env"].append("TERM=xterm")         # as docker has it
        spec["mounts"] = [entry for entry in spec["mounts"] if entry["destination"] != CONTROL_SOCKET]
        linux.pop("seccomp", None)                      # a server's has somebody answer some of its calls
        linux.update({"seccomp": filter_} if filter_ else {})
        bundle = copy.copy(self)
        bundle.contract, bundle._template = "command", json.dumps(spec)
        check_sizes(process, len(bundle._template))
        return bundle

    def render(self, container_id: str, user_namespace: str = "") -> bytes:
        """user_namespace is the path of the one to join, or empty for a new one."""
        text = self._template.replace(self._mark, container_id)
        if user_namespace:
            return text.replace(self._namespace_mark, user_namespace).encode()
        return text.replace(f', "path": "{self._namespace_mark}"', "").encode()


# What would give the machine away, or another function's files: no volume is one of these, nor above one, …
GIVES_AWAY = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/root", "/run", "/sbin",
              "/sys", "/usr", "/var", "/var/lib", "/var/lib/containerd", "/var/lib/containers", "/var/lib/docker",
              "/var/run")
NOTHING_OF = ("/dev", "/proc", "/run", "/sys")     # … nor in one of these; the daemon's own directories are of both
# The same on every architecture: mount_setattr(2), Linux 5.12, the others older.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = range(428, 433)
SYS_OPENAT2, SYS_MOUNT_SETATTR = 437, 442
RESOLVE_NO_SYMLINKS, OPEN_TREE_CLONE, AT_EMPTY_PATH, AT_FDCWD, MS_PRIVATE = 4, 1, 0x1000, -100, 1 << 18
MOVE_MOUNT_EMPTY_PATHS = 0x44       # MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 1, 2, 4, 1 << 20


class Volumes:
    """Mounts directories and files of the host's in containers' roots.

    A mount shows other owners than the file system has (idmapped mounts): the owner of the volume is the image's user,
    and what the image's user makes is the owner's on the host. What other users of the image make belongs to the
    function's own ids. Everybody else's files show as nobody's. Root's ids are never among them: a container's files
    must not be root's. Methods block, and are for threads.
    """

    def __init__(self, private: Iterable[Path]):
        """private are directories of the daemon's own."""
        self._private = [str(path) for path in private]
        self._lock = threading.Lock()
        self._maps: dict[tuple[int, str, str], int] = {}        # user namespaces: first id, maps of users and groups

    def resolve(self, text: str) -> str:
        """Return what --volume names, without links: others may make one, and none is followed. Raises BadRequest."""
        volumes = [replace(volume, host=str(resolved_path(volume.host))) for volume in volumes_of(text)]
        for volume in volumes:
            try:
                os.close(self._open(volume))
            except OSError as error:
                raise BadRequest(f"volume {volume.host}: {error.strerror}") from None
        return read_volumes(",".join(map(str, volumes)))

    def _open(self, volume: Volume) -> int:
        """Return a descriptor (O_PATH) of what a volume is on the host. Raises OSError, also if it may not be one."""
        directory, name = os.path.split(volume.host)
        how = struct.pack("QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS)
        try:
            with kept_open(system_call(SYS_OPENAT2, AT_FDCWD, os.fsencode(directory), how, len(how))) as above:
                ancestors = set(identities(above))
                descriptor = os.open(name or ".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        except OSError as error:
            why = {errno.ENOENT: "it does not exist on this machine: create it first",
                   errno.ENOSYS: "it takes Linux 5.12",
                   errno.ELOOP: "there is a symbolic link on the way now"}.get(error.errno, error.strerror)
            raise OSError(error.errno, why) from None
        status = os.fstat(descriptor)
        refusal = ""
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            refusal = "it is neither a directory nor a file"
        elif self._gives_away(status, ancestors):
            refusal = "that would give this machine away: name a directory of its own"
        elif not volume.read_only and 0 in (status.st_uid, status.st_gid):
            what = "root's" if status.st_uid == 0 else "of root's group"
            refusal = (f"it is {what}, and a container must not write files of root's: chown it to USER:GROUP whose "
                       "data it is, or add :ro")
        if refusal:
            os.close(descriptor)
            raise OSError(errno.EPERM, refusal)
        return descriptor

    def _gives_away(self, status: os.stat_result, ancestors: set[tuple[int, int]]) -> bool:
        """Return whether something is, holds or lies in what no volume may be. Bind mounts give that other names."""
        for path in (*GIVES_AWAY, *self._private):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), \
                    kept_open(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
                itself, *above = identities(directory)
                if ((status.st_dev, status.st_ino) in (itself, *above)
                        or itself in ancestors and path in (*NOTHING_OF, *self._private)):
                    return True
        return False

    def mount(self, volume: Volume, bundle: Bundle, root: str) -> None:
        """Mount a volume below a container's root, in the calling thread's mount namespace. Raises OSError.

        Nothing is mounted in a volume, where containers may have made links, so no path leads out of the root. What the
        error says goes to clients, so it does not name the host's path.
        """
        try:
            with kept_open(self._open(volume)) as source:
                status = os.fstat(source)
                make_mount_point(Rootfs(root, bundle.first_id, Budget(0, 0)), os.fsencode(volume.path), status.st_mode)
                flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH
                with kept_open(system_call(SYS_OPEN_TREE, source, b"", flags)) as tree, \
                        kept_open(self._map(bundle, status)) as owners, \
                        opened(f"{root}{volume.path}", os.O_PATH) as place:
                    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_IDMAP
                    attributes |= MOUNT_ATTR_RDONLY if volume.read_only else 0
                    how = struct.pack("QQQQ", attributes, 0, MS_PRIVATE, owners)
                    system_call(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, how, len(how))
                    system_call(SYS_MOVE_MOUNT, tree, b"", place, b"", MOVE_MOUNT_EMPTY_PATHS)
        except OSError as error:
            why = {errno.ENOSYS: "it takes Linux 5.12",
                   errno.EINVAL: "its file system cannot show files as another user's (idmapped mounts), or only with "
                                 "a newer Linux: use ext4, XFS or btrfs"}
            raise OSError(error.errno, f"volume {volume.path}: {why.get(error.errno, error.strerror)}") from None

    def _map(self, bundle: Bundle, status: os.stat_result) -> int:
        """Return a descriptor of a user namespace whose maps lead from owners on the disk to those that show."""
        owners = (status.st_uid, status.st_gid) if status.st_uid else (0, 0)        # of root's no group is let in
        key = bundle.first_id, *(owner_map(bundle.first_id, user, owner) for user, owner in
                                 zip(bundle.user, owners, strict=True))
        with self._lock:
            if key not in self._maps:
                try:
                    self._maps[key] = make_user_namespace(*key)
                except FaasdError as error:
                    raise OSError(errno.EAGAIN, f"no user namespace for its owners: {error}") from None
            return os.dup(self._maps[key])              # ours may be closed meanwhile, and be another file's

    def forget(self, first_id: int) -> None:
        """Let go of what a function's volumes took, once none is mounted any more."""
        with self._lock:
            for key in [key for key in self._maps if key[0] == first_id]:
                os.close(self._maps.pop(key))


def make_mount_point(rootfs: Rootfs, path: bytes, mode: int) -> None:
    """Make a directory or file at a real path, if there is nothing. Raises OSError if there is the other of them."""
    there = rootfs.kind(path)
    if there and there != stat.S_IFMT(mode):
        raise OSError(errno.ENOTDIR, "of it and what the image has there, one is a file and the other is not")
    if stat.S_ISDIR(mode):
        rootfs.make_directory(path)
    elif not there:
        rootfs.write_file(path, b"")


def identities(directory: int) -> Iterator[tuple[int, int]]:
    """Yield device and inode of an open directory, and of those above it. Raises OSError."""
    with contextlib.ExitStack() as stack:
        for _ in range(4096):           # as many as a path can have (PATH_MAX)
            status = os.fstat(directory)
            yield status.st_dev, status.st_ino
            directory = stack.enter_context(kept_open(os.open("..", os.O_PATH | os.O_CLOEXEC, dir_fd=directory)))
            if os.path.samestat(os.fstat(directory), status):
                break


def owner_map(first_id: int, user: int, owner: int) -> str:
    """Return the map by which an owner on the disk shows as a user of an image, and a function's ids as themselves.

    Each line is a first id on the disk, a first id that shows instead, and a number of them (user_namespaces(7)).
    """
    if owner == 0 or first_id <= owner < first_id + IDS:
        return f"{first_id} {first_id} {IDS}\n"
    shown = first_id + user
    below, above = f"{first_id} {first_id} {user}\n", f"{shown + 1} {shown + 1} {IDS - user - 1}\n"
    return f"{owner} {shown} 1\n" + (below if user else "") + (above if user < IDS - 1 else "")


CPU_PERIOD = 100_000                # microseconds (cgroup cpu controller)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_PORT = 8080                 # what PORT says, where neither the image nor the user does, as on Cloud Run
MAX_OPEN_FILES = (1024, 4096)       # RLIMIT_NOFILE inside, soft and hard: low, because much that hangs on a descriptor
                                    # is the kernel's memory, charged to nobody
# What servers that begin as root need to become somebody else, and to listen.
SERVER_CAPABILITIES = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID NET_BIND_SERVICE".split()


def capabilities(options: Options, process: dict, contract: str) -> dict[str, list[str]]:
    """Return the capabilities of a process, within its own user namespace: a handler has those that a user adds."""
    added, dropped = (set(text.split(",")) for text in (options.cap_add, options.cap_drop))
    mine = SERVER_CAPABILITIES if contract == "server" and process["uid"] == 0 else ()
    if "ALL" in added:          # as in docker, what is dropped counts against ALL, but not against names
        added, mine = set(), CAPABILITIES
    held = [f"CAP_{name}" for name in CAPABILITIES if name in added or name in mine and not dropped & {name, "ALL"}]
    now = held if process["uid"] == 0 else []       # as in docker; but others cannot gain them, for no_new_privs
    return {"bounding": held, "effective": now, "inheritable": [], "permitted": now, "ambient": []}


MAX_ARGUMENT = 128 * KIB            # bytes of an argument or variable with its NUL (MAX_ARG_STRLEN, execve(2))
MAX_CONFIG_SIZE = 256 * KIB         # of a config.json; all containers' lie in one tmpfs


def check_sizes(process: dict, total: int) -> None:
    """Raise BadRequest for a process that execve(2) would refuse, or for a config.json that would fill RUN_DIR."""
    named = [*(("the command's argument", text) for text in process["args"]),
             *((f"the variable {text.partition('=')[0][:MAX_NAME_LENGTH]}", text) for text in process["env"])]
    for what, text in named:
        if (size := len(text.encode())) >= MAX_ARGUMENT:
            raise BadRequest(f"{what} has {size} bytes: one may have at most {MAX_ARGUMENT - 1}")
    if total > MAX_CONFIG_SIZE:         # a smaller one has no room for more than the 2 MiB that execve takes
        env, args = (sum(len(text.encode()) + 1 for text in process[key]) for key in ("env", "args"))
        raise BadRequest(f"the environment of {env} bytes and the command of {args} make a config.json of {total} "
                         f"bytes, over {MAX_CONFIG_SIZE} (MAX_CONFIG_SIZE): put what is large into a file of the image")


def command_line(process: dict, options: Options) -> list[str]:
    """Return argv: the image's Entrypoint and the user's command or the image's Cmd (G.1). Raises ImageError."""
    arguments = [*process["entrypoint"], *(options.cmd or process["cmd"])]
    if not arguments:
        raise ImageError("the image names no command to run: give one after `--`")
    return arguments


def can_set_limits() -> bool:
    """Return whether the runtime may set limits in a function's user namespace (capabilities(7)). Raises OSError."""
    status = Path("/proc/self/status").read_text()      # or an error: it must not leave the limits out
    capabilities = re.search(r"^CapEff:\t(\w+)", status, re.MULTILINE)[1]
    return bool(int(capabilities, 16) >> 24 & 1)        # CAP_SYS_RESOURCE (linux/capability.h)


def mount(destination: str, kind: str, *options: str, source: str = "") -> dict:
    return {"destination": destination, "type": kind, "source": source or kind, "options": ["nosuid", *options]}


def namespace_path(run_dir: Path, name: str) -> Path:
    return run_dir / "net" / name


def resolv_conf_path(run_dir: Path, net: str) -> Path:
    return run_dir / f"resolv.conf.{net}"


# What Docker masks and what it makes read-only: kernel interfaces that are not namespaced.
MASKED_PATHS = ["/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
                "/sys/devices/virtual/powercap", "/sys/firmware"]
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
NAMESPACES = ["pid", "mount", "ipc", "uts", "cgroup"]    # besides those of its network and of the function's users
APPARMOR_PROFILE = "faasd-default"  # packaging/apparmor-faasd-default


def apparmor_profile() -> str:
    """Return the AppArmor profile for containers, "" where the kernel has no AppArmor or the profile is not loaded."""
    with contextlib.suppress(FileNotFoundError):
        if f"\n{APPARMOR_PROFILE} (" in "\n" + Path("/sys/kernel/security/apparmor/profiles").read_text():
            return APPARMOR_PROFILE
        here, installed = f"packaging/apparmor-{APPARMOR_PROFILE}", f"/etc/apparmor.d/{APPARMOR_PROFILE}"
        log.warning("AppArmor profile %s is not loaded, so containers run without it: apparmor_parser -r %s, then "
                    "restart faasd", APPARMOR_PROFILE, installed if os.path.exists(installed) else here)
    return ""


def seccomp_profile(machine: str) -> dict | None:
    """Return the seccomp filter of every container (runtime-spec config-linux.md), None for a machine without one.

    For the machine's native system calls only: those of 32-bit programs end the process, and the filter takes a third
    of the time to load. clone3 has its flags where no filter can look, so it is said not to exist, and C libraries use
    clone.
    """
    if machine not in SECCOMP_ARCHITECTURES:
        return None
    return {
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.ENOSYS,
        "architectures": [SECCOMP_ARCHITECTURES[machine]],
        "syscalls": [
            {"names": ALLOWED_CALLS, "action": "SCMP_ACT_ALLOW"},
            {"names": REFUSED_CALLS, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
            allow("clone", compare(0, 0, CLONE_NAMESPACES)),
            *(refuse("clone", compare(0, 1 << bit, 1 << bit)) for bit in range(32) if CLONE_NAMESPACES >> bit & 1),
            # TCP Fast Open sends before there is a connection; said to be switched off.
            *(rule for name, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)) for rule in (
                allow(name, compare(flags, 0, socket.MSG_FASTOPEN)),
                refuse(name, compare(flags, socket.MSG_FASTOPEN, socket.MSG_FASTOPEN), error=errno.EOPNOTSUPP))),
            *socket_rules(), *option_rules(),
        ],
    }


def supervised(profile: dict | None, names: list[str], path: str) -> dict:
    """Return a seccomp filter that hands these calls over to a Supervisor, which has the socket of that path."""
    profile = profile or {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}
    rules = [*rules_without(names, profile), {"names": names, "action": "SCMP_ACT_NOTIFY"}]
    return {**profile, "syscalls": rules, "listenerPath": path}


def rules_without(names: Collection[str], profile: dict) -> list[dict]:
    return [{**rule, "names": [name for name in rule["names"] if name not in names]} for rule in profile["syscalls"]]


def container_filter(volumes: Iterable[Volume]) -> dict | None:
    """Return the seccomp filter of a container with these volumes, None where we have none."""
    profile = seccomp_profile(platform.machine())
    writable = any(not volume.read_only for volume in volumes)
    return refusing_set_id(profile) if profile and writable else profile


# Calls that give a file its mode, and which of their arguments that is.
MODE_CALLS = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mknod": 1, "mknodat": 2, "open": 2,
              "openat": 3}


def refusing_set_id(profile: dict) -> dict:
    """Return a seccomp filter that lets nobody make a file setuid or setgid, as systemd's RestrictSUIDSGID= does.

    On a volume such a file would run as the volume's owner, for anyone who finds it on the host. openat2 has its mode
    where no filter can look: it does not exist, and programs use openat.
    """
    rules = rules_without([*MODE_CALLS, "openat2"], profile)
    for name, index in MODE_CALLS.items():
        rules += [allow(name, compare(index, 0, 0o6000)), refuse(name, compare(index, 0o4000, 0o4000)),
                  refuse(name, compare(index, 0o2000, 0o6000))]
    return {**profile, "syscalls": rules}


SECCOMP_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64", "riscv64": "SCMP_ARCH_RISCV64"}

# What a handler may ask of the kernel, in the spirit of Docker's profile: what programs in Python, Node, Go, Java, Ruby
# or C need to compute, to talk and to use the files they are given. In groups, as the man pages have them; names of
# another architecture are passed over.
ALLOWED_CALLS = """
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
    fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fdatasync fgetxattr flistxattr flock fremovexattr
    fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr inotify_add_watch
    inotify_init inotify_init1 inotify_rm_watch lchown lgetxattr link linkat listxattr llistxattr lremovexattr
    lseek lsetxattr lstat memfd_create mkdir mkdirat mknod mknodat newfstatat open openat openat2 pread64 preadv preadv2
    pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr rename renameat renameat2 rmdir
    sendfile setxattr splice stat statfs statx symlink symlinkat sync sync_file_range sync_file_range2 syncfs tee
    truncate umask unlink unlinkat utime utimensat utimes vmsplice write writev

    brk madvise mincore mlock mlock2 mlockall mmap mprotect mremap msync munlock munlockall munmap pkey_alloc
    pkey_free pkey_mprotect

    alarm arch_prctl capget capset execve execveat exit exit_group fork getcpu getegid geteuid getgid getgroups
    getitimer getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
    gettid getuid ioprio_get ioprio_set kill pidfd_open pidfd_send_signal prlimit64 restart_syscall
    riscv_flush_icache rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_tgsigqueueinfo setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid
    setresgid setresuid setreuid setrlimit setsid setuid sigaltstack sysinfo tgkill times tkill uname vfork wait4 waitid

    futex futex_requeue futex_wait futex_waitv futex_wake get_robust_list membarrier rseq sched_get_priority_max
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_setaffinity sched_setparam sched_yield set_robust_list set_tid_address

    clock_getres clock_gettime clock_nanosleep gettimeofday nanosleep time timer_create timer_delete timer_getoverrun
    timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime

    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg shutdown

    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 pause pipe pipe2 poll
    ppoll pselect6 select signalfd signalfd4

    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd semctl semget
    semop semtimedop shmat shmctl shmdt shmget
""".split()

# What programs ask for and can be refused: EPERM. What is in neither list does not exist, ENOSYS, so that programs find
# another way than a call that is newer than this list, but do not take a forbidden mount for a kernel without any.
REFUSED_CALLS = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_adjtime64 clock_settime clock_settime64 delete_module
    fanotify_init finit_module fsconfig fsmount fsopen fspick init_module io_uring_enter io_uring_register
    io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl mbind modify_ldt mount mount_setattr move_mount
    move_pages name_to_handle_at nfsservctl open_by_handle_at open_tree perf_event_open personality pidfd_getfd
    pivot_root process_madvise process_vm_readv process_vm_writev ptrace quotactl quotactl_fd reboot request_key
    sched_setattr setdomainname sethostname setns settimeofday swapoff swapon syslog umount umount2 unshare uselib
    userfaultfd vhangup
""".split()
CLONE_NEWCGROUP, CLONE_NEWNET = 0x0200_0000, 0x4000_0000
CLONE_NAMESPACES = 0x7E02_0000          # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (clone(2))
EVERY_BIT = (1 << 64) - 1


def compare(index: int, value: int, mask: int = EVERY_BIT) -> dict:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def all_but(index: int, numbers: Collection[int], bits: int, seen: int = EVERY_BIT) -> list[dict]:
    """Return conditions that together match every number of so many bits but these; bits not in seen do not count."""
    # "Not equal" would not do: the kernel looks at 32 bits of most arguments, seccomp at 64.
    def within(first: int, bit: int) -> list[dict]:         # the numbers from first on that differ below this bit
        if not any(number >> bit == first >> bit for number in numbers):
            return [compare(index, first, seen >> bit << bit)]
        return within(first, bit - 1) + within(first + (1 << bit - 1), bit - 1) if bit else []
    return within(0, bits)


def allow(name: str, *conditions: dict) -> dict:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": list(conditions)}


def refuse(name: str, *conditions: dict, error: int = errno.EPERM) -> dict:
    return {"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": error, "args": list(conditions)}


def socket_rules() -> Iterator[dict]:
    """Yield the rules for making sockets: local ones, TCP, UDP, and the one of netlink that getifaddrs(3) asks.

    Others need a module of the kernel, or let a container fill the kernel's memory without its own being charged.
    """
    def above(index: int, number: int) -> dict:
        return {"index": index, "value": number, "op": "SCMP_CMP_GT"}
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
    yield from (refuse("socket", condition) for condition in [*all_but(0, families, 4), above(0, socket.AF_NETLINK)])
    yield from (allow(name, compare(0, socket.AF_UNIX)) for name in ("socket", "socketpair"))
    yield allow("socket", compare(0, socket.AF_NETLINK), compare(2, 0))
    # As a kernel without them says it: then PAM knows that there is no audit, and runuser, su and sshd go on.
    yield refuse("socket", compare(0, socket.AF_NETLINK), above(2, 0), error=errno.EPROTONOSUPPORT)
    internet = compare(0, socket.AF_INET, EVERY_BIT - (socket.AF_INET ^ socket.AF_INET6))       # either: a bit apart
    for kind, protocol in ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)):
        plain = compare(1, kind, EVERY_BIT - socket.SOCK_NONBLOCK - socket.SOCK_CLOEXEC)
        yield from (allow("socket", internet, plain, compare(2, number)) for number in (0, protocol))
        yield from (refuse("socket", internet, plain, other, error=errno.EPROTONOSUPPORT)
                    for other in (compare(2, socket.IPPROTO_ICMP), above(2, socket.IPPROTO_UDP)))
    yield refuse("socket", internet, compare(1, socket.SOCK_RAW, EVERY_BIT - socket.SOCK_CLOEXEC))


SO_ATTACH_FILTER, SO_LOCK_FILTER = 26, 44   # socket(7); the numbers are those of include/uapi/asm-generic/socket.h
REFUSED_OPTIONS = {             # by level (linux/in.h, in6.h, tcp.h); of IP's, those that a TCP socket may set as well
    # SO_LINGER; SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF and _REUSEPORT_EBPF; SO_BINDTODEVICE, SO_BINDTOIFINDEX
    socket.SOL_SOCKET: (socket.SO_LINGER, SO_ATTACH_FILTER, 50, 51, 52, 25, 62),
    # IP_OPTIONS, IP_MINTTL, IP_ADD_SOURCE_MEMBERSHIP, MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP
    socket.IPPROTO_IP: (4, IP_MINTTL, 39, 42, 46),
    socket.IPPROTO_IPV6: (73,),                         # IPV6_MINHOPCOUNT
    socket.IPPROTO_TCP: (14, 31, 32, 38, 39, 40, 41)}   # TCP_MD5SIG, TCP_ULP, TCP_MD5SIG_EXT, TCP_AO_…
INT = 0xFFFF_FFFF                   # musl's ioctl extends the sign of what it is asked for
IOCTLS_OF_MODULES = ((termios.TIOCSETD, 1), (0x8940, 2), (0x8980, 64))      # first, how many: SIOC…BR, SIOC…VLAN
PR_SET_SECCOMP, PR_SET_VMA, PR_SET_PTRACER = 22, 0x53564D41, 0x59616D61     # prctl(2)


def option_rules() -> Iterator[dict]:
    """Yield the rules for options of sockets, for ioctl, fcntl, prctl and scheduling.

    SO_LINGER only seems to be set: with it, close(2) waits until the peer has taken everything, and the last to close a
    client's socket is often faasd. Filters of sockets and of seccomp take from what the machine has for all of them
    (net.core.bpf_jit_limit); programs that would confine themselves find no seccomp (EINVAL). A lease on a file of the
    image would hold up every other container of the function, and F_NOTIFY reveals what they do. Threads of no weight
    can hold a lock for ever while others have the CPU. A client's socket, which is the host's, must not be bound to
    another device, where its bytes would go out, be routed elsewhere, or have the host join a multicast group. One that
    drops what comes, by its TTL or unsigned, has the other end keep its data for minutes after the last process. Line
    disciplines of terminals, TLS in TCP, bridges and VLANs are modules, which the kernel would load for anybody.
    """
    for level, numbers in REFUSED_OPTIONS.items():
        yield from (refuse("setsockopt", compare(1, level), compare(2, number),
                           error=0 if number == socket.SO_LINGER else errno.EPERM) for number in numbers)
        yield from (allow("setsockopt", compare(1, level), other) for other in all_but(2, numbers, 8))
    yield from (allow("setsockopt", condition) for condition in all_but(1, REFUSED_OPTIONS, 9))
    yield from (refuse("ioctl", compare(1, first, INT & -count)) for first, count in IOCTLS_OF_MODULES)
    numbers = [number for first, count in IOCTLS_OF_MODULES for number in range(first, first + count)]
    yield from (allow("ioctl", condition) for condition in all_but(1, numbers, 32, INT))
    yield from (refuse("fcntl", compare(1, number)) for number in (fcntl.F_SETLEASE, fcntl.F_NOTIFY))
    yield from (allow("fcntl", condition) for condition in all_but(1, [fcntl.F_SETLEASE, fcntl.F_NOTIFY], 11))
    yield refuse("prctl", compare(0, PR_SET_SECCOMP), error=errno.EINVAL)
    yield from (allow("prctl", condition) for condition in all_but(0, [PR_SET_SECCOMP], 7))
    yield from (allow("prctl", compare(0, number)) for number in (PR_SET_VMA, PR_SET_PTRACER))
    yield allow("sched_setscheduler", compare(1, os.SCHED_OTHER, 7))
    yield from (refuse("sched_setscheduler", compare(1, bit, bit)) for bit in (1, 2, 4))


class Runtime:
    """The OCI runtime program and its state directory."""

    def __init__(self, program: str, root: Path):
        self.program, self.root = program, root
        self.name = Path(program).name
        self._signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}       # that a program can handle

    def version(self) -> str:
        """Return the first line of `runc --version`. Raises FaasdError if it does not run."""
        printed = run_command(f"{self.program} --version failed", self.program, "--version")
        return (printed.splitlines() or ["unknown"])[0]

    def run_argv(self, bundle: str, container_id: str) -> list[str]:
        # A session keyring for each would limit a function to 200 containers (kernel.keys.maxkeys: of a user other than
        # root). Where the seccomp filter leaves no call that could use one, none is needed.
        keyring = ["--no-new-keyring"] if platform.machine() in SECCOMP_ARCHITECTURES else []
        return [self.program, "--root", str(self.root), "--log", f"{bundle}/runtime.log", "--log-format", "json", "run",
                *keyring, "--bundle", bundle, container_id]

    def spawn(self, bundle: str, container_id: str, files: list[tuple]) -> int:
        """Start `runc run`; files make its descriptors, as posix_spawn does. Return its pid. Raises OSError.

        posix_spawn takes half the time of subprocess.Popen, and the loop stands still for it. A session of its own:
        a Ctrl-C on our terminal is not for handlers. Python ignores SIGPIPE, nohup SIGHUP: no program expects that.
        """
        return os.posix_spawn(self.program, self.run_argv(bundle, container_id), {"PATH": DEFAULT_PATH}, setsid=True,
                              setsigdef=self._signals, file_actions=files)

    def containers(self) -> set[str]:
        return {path.name for path in self.root.glob("[!.]*")}      # crun has its .cache there

    def has_state(self, container_id: str) -> bool:
        return os.path.exists(f"{self.root}/{container_id}")

    def delete(self, container_id: str) -> None:
        """Remove a container by force. Blocks; failure is logged, for the caller removes what is left by hand."""
        try_command(f"container={container_id} {self.program} delete", self.program, "--root", str(self.root), "delete",
                    "--force", container_id)


def runc_warning(version: str, changelog: str = "") -> str | None:
    """Return a warning of known holes of a runc that its package's changelog does not name as fixed, or None (H.2)."""
    match = re.match(r"runc version ([0-9]+)\.([0-9]+)\.([0-9]+)", version)
    number = tuple(map(int, match.groups())) if match else (math.inf,)
    holes = {"CVE-2024-21626": "1.1.12"} if number < (1, 1, 12) else {}
    if not (1, 2, 8) <= number < (1, 3, 0) and number < (1, 3, 3):
        holes |= dict.fromkeys(("CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"), "1.2.8 and 1.3.3")
    named = [f"{hole}, fixed in {releases}" for hole, releases in holes.items() if hole not in changelog]
    return (f"{version} may have known holes ({'; '.join(named)}): upgrade it (a distribution may have fixed an older "
            "number)") if named else None


def package_changelog(program: str) -> str:
    """Return the changelog of the Debian or RPM package that a program is from, as far as this machine has it."""
    def ask(*argv: str) -> str:
        with contextlib.suppress(FaasdError):           # there is no such package manager, or it knows no such file
            return run_command("asking for a package", *argv)
        return ""
    path = os.path.realpath(program)
    package = os.path.basename(path)            # as good as always; a search of all packages takes 60 ms of each start
    if path not in ask("dpkg-query", "--listfiles", package).splitlines():
        package = ask("dpkg-query", "--search", path).partition(":")[0]
    if not package:
        return ask("rpm", "--query", "--changelog", "--file", program)
    with contextlib.suppress(OSError, zlib.error):              # minimal images leave it out
        packed = Path(f"/usr/share/doc/{package}/changelog.Debian.gz").read_bytes()
        return zlib.decompressobj(wbits=31).decompress(packed, MIB).decode(errors="replace")
    return ""


# Of cgroup v1 and v2 (kernel documentation, admin-guide/cgroup-v1 and cgroup-v2.rst).
LIMIT_FILES = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max", "memory.swap.max",
               "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.max", "pids.max", "devices.list")


class Cgroups:
    """The cgroups of this daemon's containers: PARENT/function-NAME/ID in every hierarchy, of v1 and v2.

    The parent is ours alone and named after the run-dir, so that containers are not nested in the cgroup faasd itself
    happens to run in, and two daemons do not meet. The runtime removes a container's cgroup, but the kernel keeps what
    it has of a memory cgroup, up to a megabyte, for as long as one page of a file is charged to it. What is left of one
    function's we reclaim from the cgroup above them (DyingCgroups).
    """

    def __init__(self, run_dir: Path):
        self.parent = f"/faasd{str(run_dir).replace('/', '-')}-{run_dir_mark(run_dir)}"
        mounts = dict(read_mounts())            # a later mount hides an earlier one
        self._hierarchies = [Path(mount) for mount, kind in mounts.items() if kind in ("cgroup", "cgroup2")]
        version_1 = [h for h in self._hierarchies if (h / "memory.limit_in_bytes").exists()]
        version_2 = [h for h in self._hierarchies if "memory" in read_text(h / "cgroup.controllers").split()]
        self._memory = next(iter(version_2 or version_1), Path("/"))        # /: see check_controllers
        self.kills_whole = bool(version_2)      # the kernel can be told to, of a container that runs out of memory
        # runc fails on a swap limit where a v1 kernel does not account for swap; on v2 it copes by itself.
        self.can_limit_swap = all((h / "memory.memsw.limit_in_bytes").exists() for h in version_1)
        # crun takes cgroup v1 for a hybrid with v2, and where no v2 is mounted it leaves plain files.
        litter = Path("/sys/fs/cgroup/unified")
        self._litter = [litter] if version_1 and litter not in self._hierarchies else []

    def group(self, function: str) -> str:
        """Return the path of the cgroup above all of a function's containers; no container's looks like it."""
        return f"{self.parent}/function-{function}"

    def path(self, function: str, container_id: str) -> str:
        """Return the cgroupsPath of a container, which is what the other methods know it by."""
        return f"{self.group(function)}/{container_id}"

    def mounts(self, function: str, container_id: str) -> list[dict]:
        """Return the mounts that show a container its own cgroup, by which programs size themselves, read-only."""
        if self.kills_whole:
            return [mount("/sys/fs/cgroup", "cgroup", "noexec", "nodev", "ro")]
        # Of version 1 no runtime makes all of it read-only; and nobody asks for more than these controllers.
        shown = [h for h in self._hierarchies if {"cpu", "cpuacct", "cpuset", "memory", "pids"} & {*h.name.split(",")}]
        return [mount("/sys/fs/cgroup", "tmpfs", "nodev", "size=4k", "noexec", "ro", "mode=555"),
                *(mount(f"/sys/fs/cgroup/{h.name}", "bind", "bind", "ro", "noexec", "nodev",
                        source=f"{h}{self.path(function, container_id)}") for h in shown)]

    def _directories(self, path: str) -> list[Path]:
        # Asked at the end of every container, and a machine may have a dozen of v1: so not by Path.is_dir().
        return [Path(h + path) for h in map(str, self._hierarchies) if os.access(h + path, os.F_OK)]

    def _traces(self, path: str) -> list[Path]:
        """Return the directories of a cgroup, and what crun has left of it, which may be all that there is."""
        return self._directories(path) + [Path(f"{place}{path}") for place in self._litter
                                          if os.path.isdir(f"{place}{path}")]

    def exists(self, path: str) -> bool:
        return bool(self._traces(path))

    def containers(self) -> dict[str, str]:
        """Return the paths of all containers that have a cgroup, by their ids. An older daemon has made PARENT/ID."""
        return {directory.name: f"{self.parent}/{directory.relative_to(parent)}"
                for parent in self._traces(self.parent) for pattern in ("*/", "function-*/*/")
                for directory in parent.glob(pattern) if CONTAINER_ID.fullmatch(directory.name)}

    def remove_groups(self, but: Collection[str] = ()) -> None:
        """Remove the cgroups of functions, which have no container any more, but for some functions'."""
        groups = {path.name for parent in self._traces(self.parent) for path in parent.glob("function-*/")}
        for name in groups - {f"function-{function}" for function in but}:
            self.remove(f"{self.parent}/{name}")

    def processes(self, path: str) -> set[int]:
        """Return the pids in a container's cgroups, but for 0: a process that our pid namespace does not see."""
        return {int(pid) for directory in self._directories(path)
                for pid in read_text(directory / "cgroup.procs").split()} - {0}

    def sockets(self, cgroup: str) -> Iterator[tuple[int, int, int]]:
        """Yield a pidfd, the number and the inode of each socket that a container's processes have."""
        searched = 0
        for pid, pidfd in self.members(cgroup):
            numbers: list[str] = []
            with contextlib.suppress(OSError):          # its process is gone
                numbers = os.listdir(f"/proc/{pid}/fd")
            for number in numbers:
                searched += 1
                if searched > 10_000:           # a container may have millions
                    return
                with contextlib.suppress(OSError):      # it is closed, or has a longer name than can be told
                    if target := re.fullmatch(r"socket:\[([0-9]+)\]", os.readlink(f"/proc/{pid}/fd/{number}")):
                        yield pidfd, int(number), int(target[1])

    def udp_ports(self, cgroup: str) -> list[str]:
        """Return the UDP ports on which a container waits, in words, as far as it says. May block."""
        own = {str(inode) for *_, inode in self.sockets(cgroup)}
        network = f"/proc/{next(iter(self.processes(cgroup)), 0)}/net"
        rows = map(str.split, (read_text(f"{network}/udp") + read_text(f"{network}/udp6")).splitlines())
        ports = {int(local[-4:], 16) for _, local, _, state, *_, inode, _, _, _ in rows
                 if state == "07" and inode in own}     # not connected (net/tcp_states.h)
        return [f"UDP port {port}" for port in sorted(ports)]

    def duplicate_socket(self, cgroup: str, inode: int) -> socket.socket | None:
        """Return a duplicate of a container's socket, None if there is none or the kernel gives us none. May block."""
        for pidfd, number, found in self.sockets(cgroup):
            if found == inode:
                with contextlib.suppress(OSError):      # it is gone
                    return duplicate_socket(pidfd, number, inode)
        return None

    def limit_sockets(self, path: str, size: int) -> None:
        """Limit what a container's sockets have in their buffers: v1 counts that apart, if told to before the first."""
        if not self.kills_whole:                # and no runtime tells it
            os.makedirs(f"{self._memory}{path}")
            with contextlib.suppress(FileNotFoundError), open(      # it is to go: then it is done without
                    f"{self._memory}{path}/memory.kmem.tcp.limit_in_bytes", "r+b", 0) as limit:
                limit.write(b"%d" % size)

    def watch_memory(self, path: str) -> int:
        """Return an eventfd that tells when memory may have run out (v1, memory.rst), else -1. Raises OSError."""
        if self.kills_whole:
            return -1
        directory = f"{self._memory}{path}"
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with open(f"{directory}/memory.oom_control", "rb", 0) as file:
                Path(f"{directory}/cgroup.event_control").write_text(f"{event} {file.fileno()}")
        except OSError:
            os.close(event)
            raise
        return event

    def counts_memory(self, path: str) -> bool:
        """Return whether a memory cgroup is still there. A runtime removes a container's cgroups one by one."""
        return os.path.exists(f"{self._memory}{path}")

    def memory_kills(self, path: str) -> int:
        """Return how many processes of a cgroup, on v2 of all below it, were killed for memory; 0 once it is gone."""
        file = "memory.events" if self.kills_whole else "memory.oom_control"
        with contextlib.suppress(OSError), open(f"{self._memory}{path}/{file}", "rb", 0) as fields:
            return int(re.search(rb"^oom_kill (\d+)|\Z", fields.read(KIB), re.MULTILINE)[1] or 0)
        return 0

    def refused_processes(self, path: str) -> bool:
        return any(read_fields(directory / "pids.events").get("max", "0") != "0"
                   for directory in self._directories(path))

    def counts_processes(self, path: str) -> bool:
        """Return whether a pids cgroup is still there, as counts_memory does for memory."""
        return any((directory / "pids.events").exists() for directory in self._directories(path))

    def limits(self, path: str) -> dict[str, str]:
        return {name: " ".join((directory / name).read_text().split())
                for name in LIMIT_FILES for directory in self._directories(path) if (directory / name).exists()}

    def members(self, path: str) -> Iterator[tuple[int, int]]:
        """Yield a pid, which may be another's by now, and a pidfd of each process of a container. Failure is logged."""
        for pid in self.processes(path):
            try:
                with kept_open(os.pidfd_open(pid)) as pidfd:
                    if path in Path(f"/proc/{pid}/cgroup").read_text():
                        yield pid, pidfd
            except OSError as error:
                self._complain(path, pid, error)

    def kill(self, path: str) -> None:
        """Send SIGKILL to every process of a container. Blocks. Failure is logged: callers try again."""
        for directory in self._directories(path):       # all at once, where the kernel can (v2, Linux 5.14)
            with contextlib.suppress(OSError):          # no such file; or runc is removing the directory
                (directory / "cgroup.kill").write_text("1")
        for pid, pidfd in self.members(path):
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except OSError as error:
                self._complain(path, pid, error)

    @staticmethod
    def _complain(path: str, pid: int, error: OSError) -> None:
        # Of a process that was reaped; EINVAL by pidfd_open of older kernels, such as 6.1, where the pid is still that
        # of a process group or a session.
        if error.errno not in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            log.warning("container=%s cannot kill its process %d: %s", path.rpartition("/")[2], pid, error.strerror)

    def remove(self, path: str) -> None:
        """Remove a cgroup directory in every hierarchy if it is empty."""
        for place in self._litter:
            shutil.rmtree(f"{place}{path}", ignore_errors=True)
        for directory in self._directories(path):
            try_remove(directory, os.rmdir)

    def dying(self, group: str) -> int:
        """Return how many memory cgroups below one, on v1 of the machine, were removed. Raises OSError, LookupError."""
        if self.kills_whole:
            return int(read_fields(f"{self._memory}{group}/cgroup.stat")["nr_dying_descendants"])
        return int(read_fields("/proc/cgroups")["memory"].split()[1]) - sum(1 for _ in os.walk(self._memory))

    def reclaim(self, group: str) -> None:
        """Have the kernel drop what is cached for containers of a cgroup, also for those that are gone.

        In a child that is killed after a second: on v1 the kernel goes on for as long as a container reads as fast. On
        v2 it takes the bytes to drop, since Linux 5.19, and drops as many as it can. Blocks. Raises OSError.
        """
        directory = f"{self._memory}{group}"
        file, value = "memory.force_empty", b"0"
        if self.kills_whole:
            file, value = "memory.reclaim", Path(f"{directory}/memory.current").read_bytes()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["tee", f"{directory}/{file}"], input=value, timeout=1, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, check=False)


def read_fields(path: str | Path) -> dict[str, str]:
    """Return the lines `name value` and `Name: value` of a file of the kernel's; none if it cannot be read."""
    return dict(re.findall(r"^(\w+):?[ \t]+(.*)$", read_text(path), re.MULTILINE))


def run_dir_mark(run_dir: Path) -> str:
    """Return what tells a run-dir from others in names that all daemons of a machine share, of cgroups, links, tables.

    It is made of the file system and the path there. The path alone would not do: another mount namespace can have
    another directory there. Nor would the inode: what is left running must be found when the directory was made anew.
    """
    there = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    with opened(there, os.O_PATH | os.O_DIRECTORY) as directory:
        device = os.fstat(directory).st_dev
        mount_id = read_fields(f"/proc/self/fdinfo/{directory}")["mnt_id"]
    # In a chroot that is no mount, the mount's own root cannot be seen.
    top, point = next((fields[3:5] for fields, _ in read_mountinfo() if fields[0] == mount_id), ("/", "/"))
    path = os.path.normpath(f"{top}/{os.path.relpath(run_dir, point)}")
    return hashlib.sha256(f"{device}:{path}".encode(errors="surrogateescape")).hexdigest()[:6]


MANY_ENDED = 32                     # containers of a function that end before we count the memory cgroups they left
MANY_DYING = 64                     # more than the fewest seen, which are worth losing what is cached of the image
MOST_DYING = 1024                   # the same at most, after that has done no good


class DyingCgroups:
    """What the ended containers of one function leave: memory cgroups to which a page of its image is charged.

    A handler can leave one each time, and the memory is nobody's. Any image leaves some, because the first reader of a
    page is charged with it; so what is cached is reclaimed only when there are many more than there have been. On v1
    they may belong to others, and live containers can keep them: if they stay, it takes twice as many the next time.
    """

    def __init__(self, cgroups: Cgroups, group: str, workers: Workers):
        self._cgroups = cgroups
        self._group = group
        self._workers = workers
        self._ended = 0                         # containers since the last look
        self._fewest: int | None = None         # dying that we have seen since we reclaimed
        self._before: float = math.inf          # that there were then
        self._many = MANY_DYING
        self._task: asyncio.Task | None = None  # held, for the loop does not

    def count(self) -> None:
        self._ended += 1
        if self._ended == MANY_ENDED:           # more end while we look
            self._task = self._workers.loop.create_task(self._look())

    async def _look(self) -> None:
        try:
            if self.are_many(await self._workers.run(self._cgroups.dying, self._group)):
                log.info("%s: reclaiming what ended containers keep", self._group)
                await self._workers.run(self._cgroups.reclaim, self._group)
        except (OSError, LookupError) as error:         # the function was removed, or there is no thread to be had
            log.info("%s: cannot reclaim: %r", self._group, error)
        finally:
            self._ended = 0

    def are_many(self, dying: int) -> bool:
        """Return whether it is time to reclaim; it is taken to be done then."""
        if self._fewest is None:
            in_vain = dying > self._before - self._many / 2
            self._many = min(2 * self._many, MOST_DYING) if in_vain else MANY_DYING
            self._fewest = dying
        self._fewest = min(self._fewest, dying)
        if dying - self._fewest < self._many:
            return False
        self._before, self._fewest = dying, None
        return True


def inspect_process(pid: int) -> dict:
    """Return how a process is isolated: what the kernel says in /proc (proc(5)). Raises OSError if it is gone."""
    process = Path(f"/proc/{pid}")
    status = read_fields(process / "status")        # a name in it is the process's own choice, and comes first
    namespaces = {entry.name: os.readlink(entry) for entry in (process / "ns").iterdir() if "_for_" not in entry.name}
    return {
        "namespaces": {kind: "own" if os.readlink(f"/proc/self/ns/{kind}") != name else "the host's"
                       for kind, name in sorted(namespaces.items())},
        "host_ids": [int(status[key].split()[0]) for key in ("Uid", "Gid")],
        **{name: " ".join((process / name).read_text().split()) for name in ("uid_map", "gid_map")},
        "capabilities": {key.lower(): status[key] for key in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")},
        "no_new_privs": status["NoNewPrivs"] == "1",
        "seccomp": {"0": "none", "1": "strict", "2": "filter"}[status["Seccomp"]],
        "apparmor": read_text(process / "attr/current").strip("\n\0"),     # unreadable without a security module
        "mounts": list({before[4]: {"target": before[4], "type": after[0], "options": before[5]}   # a later one hides
                        for before, after in read_mountinfo(f"{process}/mountinfo")}.values()),
        "interfaces": [line.partition(":")[0].strip() for line in (process / "net/dev").read_text().splitlines()[2:]],
        "rlimits": {line[:25].strip(): line[26:].split()[0] for line in
                    (process / "limits").read_text().splitlines()[1:]},
        "descriptors": sorted(os.readlink(entry)[:MAX_NAME_LENGTH] for entry in
                              itertools.islice((process / "fd").iterdir(), 256)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Its place on this machine: ids, addresses on lo, listeners on them
# ---------------------------------------------------------------------------------------------------------------------

SUBORDINATE_USER = "faasd"          # whose entry in /etc/subuid and /etc/subgid gives us other ids
IDS = 65_536                        # user ids, and group ids, that a container has
FIRST_ID, LAST_ID = 0x7000_0000, 0x7FFE_FFFF    # host ids for them where /etc/subuid has none for us: the ids that are
                                    # nobody's and that every program can hold (systemd's UIDS-GIDS.md)


def subordinate_ids(path: Path) -> range | None:
    """Return the ids that a file such as /etc/subuid gives us (subuid(5)), None if it has no entry for us."""
    entry = rf"^[ \t]*{SUBORDINATE_USER}:([0-9]{{1,10}}):([0-9]{{1,10}})[ \t]*$"
    match = re.search(entry, read_text(path), re.MULTILINE)
    return range(int(match[1]), int(match[1]) + int(match[2])) if match else None


def find_host_ids(directory: Path = Path("/etc")) -> range:
    """Return the host ids that containers may have. Raises UsageError for entries that cannot be meant."""
    users, groups = subordinate_ids(directory / "subuid"), subordinate_ids(directory / "subgid")
    if users is None and groups is None:
        return range(FIRST_ID, LAST_ID + 1)
    if users != groups or len(users) < IDS or users.start < IDS or users.stop > 1 << 32:
        raise UsageError(f"{directory}/subuid and subgid must give {SUBORDINATE_USER} the same ids, {IDS} for each "
                         f"function and from {IDS} on: change its line in both, or remove it from both")
    return users


class IdRanges:
    """Which function has which host ids: IDS of them from a first one on, so that no two functions share a user.

    A function keeps its range for as long as it exists, because its files on disk belong to these ids.
    """

    def __init__(self, ids: range):
        self._ids = ids
        self.first = ids.start
        self.taken: set[int] = set()            # by the first of each
        self._namespaces: dict[int, int] = {}   # user namespaces with the ids of a range: first id → descriptor
        self._making = asyncio.Lock()
        self.can_make = True                    # and the runtime joins what we make: see probe_machine

    def take(self) -> int:
        """Return the first id of a free range, which is taken from now on. Raises Conflict when there is none."""
        for first in range(self._ids.start, self._ids.stop - IDS + 1, IDS):
            if all(abs(first - other) >= IDS for other in self.taken):
                self.taken.add(first)
                return first
        raise Conflict(f"all {len(self._ids) // IDS} ranges of user ids are taken: remove a function, or give "
                       f"{SUBORDINATE_USER} more in /etc/subuid and /etc/subgid")

    def release(self, first: int) -> None:
        self.taken.discard(first)
        if first in self._namespaces:
            os.close(self._namespaces.pop(first))

    async def user_namespace(self, first: int) -> str:
        """Return the path of the user namespace of a range, made at first use; "" if only runc can make one here."""
        async with self._making:
            if not self.can_make:
                return ""
            if first not in self._namespaces:
                try:
                    self._namespaces[first] = await asyncio.to_thread(make_user_namespace, first)
                except (OSError, FaasdError) as error:
                    self.can_make = isinstance(error, OSError)         # out of descriptors or processes, for now
                    log.warning("user=%d cannot make a user namespace, so runc makes one for each container, and all "
                                "functions share root's limits of inotify, queues and timers: %s", first, error)
                    return ""
        # runc from 1.1.11 on looks up which ids a namespace has. For a path that begins with /proc/PID it takes those
        # of that process, which are ours, says "non-matching mapping", and gives the container's stdout to our root.
        # For any other path it asks the namespace itself.
        return f"//proc/{os.getpid()}/fd/{self._namespaces[first]}"


def make_user_namespace(first: int, *maps: str) -> int:
    """Return a descriptor of a user namespace with the ids from first on, made by the first of them. Blocks.

    maps are the users' and the groups', if they are not just these ids. The kernel charges what it counts by user,
    such as inotify instances, message queues and timers, to a container's user, and once more to the user who made the
    namespace. runc would make it as root: then one function could take all that is there for every function and for
    root's own programs. Raises OSError, FaasdError.
    """
    with subprocess.Popen(["unshare", "--user", "cat"], cwd="/", bufsize=0, user=first, group=first, extra_groups=[],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with process.stdin as stdin:            # its end is cat's
            with contextlib.suppress(BrokenPipeError):      # unshare has failed, and says why
                stdin.write(b".")
            if not process.stdout.read(1):      # from cat, so that it has been made
                raise FaasdError(process.stderr.read().decode(errors="replace").strip())
            for kind, text in zip(("uid_map", "gid_map"), maps or [f"0 {first} {IDS}\n"] * 2, strict=True):
                Path(f"/proc/{process.pid}/{kind}").write_text(text)
            return os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def ip_json(*arguments: str) -> list[dict]:
    """Return what `ip -j` prints for a query. Raises FaasdError."""
    try:
        return json.loads(run_command("cannot look at addresses", "ip", "-j", "-4", *arguments) or "[]")
    except (FaasdError, ValueError) as error:
        if isinstance(error, FaasdError) and not re.search("option|busybox", str(error), re.IGNORECASE):
            raise                       # it is the right one, and failed
        raise UsageError(f"faasd needs the ip of iproute2, not BusyBox's: apt install iproute2 ({error})") from error


def ip_addresses(*arguments: str) -> Iterator[tuple[str, dict]]:
    """Yield interface and description of the IPv4 addresses that `ip addr show` lists. Raises FaasdError."""
    for link in ip_json("addr", "show", *arguments):
        for entry in link.get("addr_info", []):
            yield link["ifname"], entry


def find_holder(subnet: ipaddress.IPv4Network, is_ours: Callable[[str, str], bool]) -> str | None:
    """Return what a part of subnet is assigned or routed to, None if nothing.

    An interface, or the label of an address, for which is_ours is true does not count. Raises FaasdError.
    """
    for interface, entry in ip_addresses():
        network = ipaddress.ip_network(f"{entry['local']}/{entry['prefixlen']}", strict=False)
        if network.overlaps(subnet) and not is_ours(interface, entry.get("label", "")):
            return f"{network} is assigned to {interface}"
    for route in ip_json("route", "show", "table", "all"):
        if route.get("type", "unicast") == "unicast" and route["dst"] != "default":
            network = ipaddress.ip_network(route["dst"], strict=False)
            # Shorter than /8 is a default route in pieces, as VPNs set it (0.0.0.0/1 and 128.0.0.0/1).
            if network.prefixlen >= 8 and network.overlaps(subnet) and not is_ours(route.get("dev", ""), ""):
                return f"{network} is routed to {route.get('dev', route.get('gateway', 'elsewhere'))}"
    return None


UCRED = struct.Struct("3i")         # struct ucred of unix(7): pid, uid, gid


def is_roots_listener(name: bytes) -> bool:
    """Return whether root listens on a Unix socket (SO_PEERCRED in unix(7)). One that answers nobody is nobody's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        probe.shutdown(socket.SHUT_RD)          # what it sends, such as a socket that lingers, would be ours to close
        try:
            probe.connect(name)
        except OSError:
            return False
        return UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))[1] == 0


MAX_CLAIMS = 10_000                 # sockets named like a daemon's whose owner is looked up at start
CLAIM_SECONDS = 1.0                 # to find them: names of one hash make the kernel's list of all sockets slow to read
CLAIM_PAUSE = 0.01                  # seconds between two that ask us
ADDRESS_LABEL = "lo:faas"           # marks our addresses; at most 15 bytes (IFNAMSIZ)
FIRST_HOST = 10                     # the first function's address is .10


class Addresses:
    """Addresses of one subnet on `lo`, one for each function.

    Each is a /32: a /24 on lo would swallow the user's LAN. The label tells them from everybody else's.
    """

    def __init__(self, subnet: ipaddress.IPv4Network):
        self.subnet = subnet
        self._claim: socket.socket | None = None
        self._wanted: set[str] = set()
        self._unwanted: set[str] = set()        # functions had them; some may still be on lo
        self.missing: set[str] = set()          # wanted, but somebody has taken them from lo
        self._lock = threading.Lock()           # held to change lo

    def claim(self) -> None:
        """Make sure that the subnet is nobody else's. Raises UsageError."""
        loopback = next((link for link in ip_json("addr", "show") if link.get("ifname") == "lo"), {})
        if "UP" not in loopback.get("flags", []):
            raise UsageError("the loopback interface is down: ip link set lo up")
        holder = find_holder(self.subnet, lambda interface, label: label == ADDRESS_LABEL) or self._find_rival()
        if holder:
            raise UsageError(f"subnet {self.subnet} is in use: {holder}; choose another with --subnet")

    def _find_rival(self) -> str | None:
        """Listen on an abstract Unix socket named after the subnet; return what other daemon has claimed a part of it.

        Such sockets are per network namespace, as addresses are. Any user can make one, of any name. So each of ours
        ends in a number that nobody can have taken, and another's counts only if the kernel says that root listens.
        """
        name = f"faasd/{self.subnet}/{secrets.token_hex(8)}".encode()
        self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._claim.bind(b"\0" + name)
        self._claim.listen()            # before looking for others: of two that start together, one sees the other
        sockets, late = bytearray(), time.monotonic() + CLAIM_SECONDS
        with open("/proc/net/unix", "rb", buffering=0) as file:
            while (more := file.read(MIB)) and time.monotonic() < late:
                sockets += more
        claims = re.findall(rb"@(faasd/([0-9./]{1,18})/[0-9a-f]{16})$", sockets, re.MULTILINE)
        if more or len(claims) > MAX_CLAIMS:
            log.warning("there are too many Unix sockets to look at, or to ask whether another faasd listens: if there "
                        "is another on %s, it may stay unseen", self.subnet)
        for other, subnet in claims[:MAX_CLAIMS]:
            with contextlib.suppress(ValueError):
                theirs = ipaddress.IPv4Network(subnet.decode())
                if other != name and theirs.overlaps(self.subnet) and is_roots_listener(b"\0" + other):
                    return f"another faasd uses {theirs}"
        return None

    def greet(self, workers: Workers) -> None:
        """From now on, close the connections of daemons that look for rivals: a full queue would take no more.

        One after the other, because anybody can ask; and in a thread, because closing a Unix socket may mean closing
        what was sent to it, for which a file system of a user's, or a peer that takes nothing, may wait for ever.
        """
        loop = workers.loop

        def accept() -> None:
            try:
                closing = workers.run(self._claim.accept()[0].close)
                closing.add_done_callback(lambda _: loop.call_later(CLAIM_PAUSE, loop.add_reader, self._claim, accept))
            except BlockingIOError:
                return
            except OSError as error:    # out of descriptors: trying again at once would spin
                log.error("cannot tell others that %s is ours: %s", self.subnet, error.strerror)
            loop.remove_reader(self._claim)
        loop.add_reader(self._claim, accept)

    def has(self, address: str) -> bool:
        return ipaddress.ip_address(address) in self.subnet

    def lowest_free(self, taken: Iterable[str]) -> str:
        """Return the lowest address from .10 up that no function has. Raises Conflict when there is none."""
        used = set(taken)
        for number in range(FIRST_HOST, self.subnet.num_addresses - 1):         # the last one is for broadcasts
            if str(self.subnet[number]) not in used:
                return str(self.subnet[number])
        raise Conflict(f"subnet {self.subnet} has no free address: remove a function, or start with a larger --subnet")

    def check(self, address: str) -> None:
        """Raise BadRequest if a function cannot have an address."""
        first, last = self.subnet[FIRST_HOST], self.subnet[-2]
        with contextlib.suppress(ValueError):
            if first <= ipaddress.IPv4Address(address) <= last:
                return
        raise BadRequest(f"a function cannot have the address {address!r}: ask for one from {first} to {last}")

    def moved(self, address: str, taken: Collection[str]) -> str:
        """Return what an address of another subnet is in this one: the same number, if free. Raises Conflict."""
        number = int(ipaddress.IPv4Address(address)) & int(self.subnet.hostmask)
        fits = FIRST_HOST <= number < self.subnet.num_addresses - 1 and str(self.subnet[number]) not in taken
        return str(self.subnet[number]) if fits else self.lowest_free(taken)

    def add(self, address: str) -> None:
        """Put a function's address on lo, where it may be already. Raises FaasdError."""
        with self._lock:
            self._put(address)
            self._wanted.add(address)
            self._unwanted.discard(address)

    def _put(self, address: str) -> None:
        run_command(f"cannot add {address} to lo", "ip", "addr", "replace", f"{address}/32", "dev", "lo", "label",
                    ADDRESS_LABEL)
        self.missing.discard(address)

    def restore(self) -> bool:
        """Put back the addresses that somebody has taken from lo; return whether they are there. Failure is logged."""
        with self._lock, failure_logged():
            self.missing = self._wanted - {entry["local"] for _, entry in ip_addresses("dev", "lo")}
            for address in sorted(self.missing):
                log.warning("somebody has taken %s from lo: putting it back", address)
                with failure_logged():          # the others may be luckier
                    self._put(address)
            return not self.missing
        return False

    def remove(self, *addresses: str) -> None:
        """Take addresses from lo that functions had; failure is logged, and the next removal tries again."""
        with self._lock, failure_logged():
            self._wanted.difference_update(addresses)
            self._unwanted.update(addresses)
            for address in sorted(self._unwanted & self._labelled()):
                try_command(f"cannot remove {address} from lo", "ip", "addr", "del", f"{address}/32", "dev", "lo",
                            "label", ADDRESS_LABEL)

    def remove_all(self) -> None:
        self.remove(*self._wanted)

    def remove_stale(self, known: set[str]) -> None:
        """Take addresses from lo that no function wants: with our label, and of our subnet or a function's.

        For when all functions are back. Those of a function stay on lo all along: connections run on them.
        """
        stale = {address for address in self._labelled() if address in known or self.has(address)} - self._wanted
        for address in stale:
            log.warning("removing address %s that the daemon before left", address)
        self.remove(*stale)

    @staticmethod
    def _labelled() -> set[str]:
        return {entry["local"] for _, entry in ip_addresses("dev", "lo") if entry.get("label") == ADDRESS_LABEL}


CLIENT_KEEPALIVE = (60, 10, 6)      # TCP_KEEPIDLE, _KEEPINTVL (seconds), _KEEPCNT: 2 min until a vanished host is gone


def notice_vanished_clients(listener: socket.socket) -> None:
    """Have the kernel probe the idle connections of a listener (tcp(7)); they inherit what is set here."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip((socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT), CLIENT_KEEPALIVE):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


def open_listener(address: str, port: int, mark: int | None) -> socket.socket:
    """Return a listening socket with our filter. Raises Conflict if the port is taken, FaasdError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        notice_vanished_clients(listener)
        listener.bind((address, port))
        attach_filter(listener, listener_filter(address, port, mark))
        listener.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
        listener.listen(int(Path("/proc/sys/net/core/somaxconn").read_text()))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} on {address} is taken by another program, perhaps one that listens on every "
                           "address: stop it, or start faasd with another --port") from None
        raise FaasdError(f"cannot listen on {address}:{port}: {error.strerror}") from None
    return listener


def notify_service_manager(state: str, *descriptors: int) -> None:
    """Tell systemd of a change, such as "READY=1" (sd_notify(3)); without systemd there is nobody to tell."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(FLUSH_SECONDS)      # it may be stuck, and we serve
            try:
                sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
                socket.send_fds(sock, [state.encode()], descriptors)
            except OSError as error:
                log.warning("cannot notify the service manager: %s", error)


class ListenerStore:
    """Opens listening sockets, which the service manager keeps while no daemon runs: nobody is refused meanwhile.

    This is systemd's file descriptor store (FileDescriptorStoreMax= in the unit). A socket goes there when it is made,
    comes back when the service is restarted (sd_listen_fds(3)), and is recognised by what it is bound to. Where nobody
    keeps sockets, they are only opened.
    """

    def __init__(self, mark: int | None) -> None:
        """mark is as listener_filter takes it."""
        self._mark = mark
        self._kept: dict[tuple[str, int], socket.socket] = {}
        count, names, pid = (os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"))
        if pid != str(os.getpid()):             # they were meant for somebody else
            return
        try:
            descriptors = range(3, 3 + int(count))
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
        except (ValueError, OSError) as error:
            log.warning("taking no sockets of the service manager, because LISTEN_FDS is %r: %s", count, error)
            return
        for descriptor, name in zip(descriptors, itertools.chain(names.split(":"), itertools.repeat("unknown"))):
            if listener := listener_of(descriptor):
                self._kept[listener.getsockname()[:2]] = listener
            else:
                log.warning("a descriptor %r of the service manager is no listening socket", name)
                os.close(descriptor)
                notify_service_manager(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def open(self, address: str, port: int) -> socket.socket:
        """Return a listening socket with our filter. Raises as open_listener does."""
        make = functools.partial(open_listener, address, port, self._mark)
        listener = self.take(address, port, make)
        if filter_of(listener) == listener_filter(address, port, self._mark):
            return listener
        log.warning("opening %s:%d anew: its filter is that of another --lan, or of an older faasd", address, port)
        refuse_connections(listener)            # its filter is locked
        self.forget(address, port)
        return self.take(address, port, make)

    def take(self, address: str, port: int, make: Callable[[], socket.socket]) -> socket.socket:
        """Return the listening socket that was kept, or what make returns, which is kept from now on."""
        if not (listener := self._kept.pop((address, port), None)):
            listener = make()
            notify_service_manager(f"FDSTORE=1\nFDNAME={address.replace(':', '.')}-{port}", listener.fileno())
        listener.setblocking(False)
        return listener

    def forget(self, address: str, port: int) -> None:
        """Tell the service manager to keep a socket no longer."""
        notify_service_manager(f"FDSTOREREMOVE=1\nFDNAME={address.replace(':', '.')}-{port}")

    def forget_unclaimed(self, wanted: Callable[[tuple[str, int]], bool] = lambda place: False) -> None:
        """Close the sockets that were kept, but have not been opened, and are not wanted."""
        for place in [place for place in self._kept if not wanted(place)]:
            log.warning("closing the listening socket of %s:%d, which nobody here needs any more", *place)
            refuse_connections(self._kept.pop(place))
            self.forget(*place)


def listener_of(descriptor: int) -> socket.socket | None:
    """Return the socket of a descriptor, None if it does not listen for connections by IP."""
    with contextlib.suppress(OSError):          # no socket
        listener = socket.socket(fileno=descriptor)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and listener.family in (socket.AF_INET, socket.AF_INET6):
            return listener
        listener.detach()
    return None


def refuse_connections(listener: socket.socket) -> None:
    """Close a listening socket even if others, such as the service manager, have descriptors of it."""
    listener.shutdown(socket.SHUT_RD)
    listener.close()


# bpf_common.h
BPF_LOAD_WORD, BPF_LOAD_HALF, BPF_LOAD_BYTE, BPF_AND, BPF_JUMP_EQUAL, BPF_RETURN = 0x20, 0x28, 0x30, 0x54, 0x15, 0x06
BPF_IP_HEADER = 0xFFF0_0000         # SKF_NET_OFF (linux/filter.h): what is loaded from here on is in the IP header
BPF_INTERFACE, BPF_MARK = 0xFFFF_F008, 0xFFFF_F014      # SKF_AD_OFF + SKF_AD_IFINDEX, SKF_AD_MARK: what a packet has
LOOPBACK_INDEX = 1                  # of `lo`, in every network namespace (LOOPBACK_IFINDEX)
SYN, ACK = 0x02, 0x10               # in the flags of a TCP header


def listener_filter(address: str, port: int, mark: int | None) -> list[tuple[int, int, int, int]]:
    """Return the filter of a listening socket, and of all that it accepts, as instructions (struct sock_filter).

    It costs an invocation nothing, and is locked: neither a handler nor another daemon can take it off.

    They receive nothing but what is sent to their address and port. A handler gets a socket of the host's network.
    connect(2) can dissolve its connection, and then it could go anywhere that the host can, or listen. Its new port
    would not be this one, so that it would hear nothing.

    Unless mark is None, connections have to begin on this machine: by lo, or by a packet with that mark, which our own
    rules give (--net egress, --publish). The address alone would not keep neighbours out, because Linux answers for it
    on every interface. A socket that is bound to lo would, but it would let another program have the same address on
    other interfaces.
    """
    return [
        (BPF_LOAD_HALF, 0, 0, 2),                                       # destination port, in the TCP header
        (BPF_JUMP_EQUAL, 0, 10, port),
        (BPF_LOAD_WORD, 0, 0, BPF_IP_HEADER + 16),                      # destination address
        (BPF_JUMP_EQUAL, 0, 8, int(ipaddress.IPv4Address(address))),
        (BPF_LOAD_BYTE, 0, 0, 13),                                      # flags of the TCP header
        (BPF_AND, 0, 0, 0 if mark is None else SYN | ACK),
        (BPF_JUMP_EQUAL, 0, 4, SYN),                                    # asks for a connection
        (BPF_LOAD_WORD, 0, 0, BPF_INTERFACE),
        (BPF_JUMP_EQUAL, 2, 0, LOOPBACK_INDEX),
        (BPF_LOAD_WORD, 0, 0, BPF_MARK),
        (BPF_JUMP_EQUAL, 0, 1, mark or 0),
        (BPF_RETURN, 0, 0, 0xFFFF_FFFF),                                # all of the packet
        (BPF_RETURN, 0, 0, 0)]                                          # none


def packet_mark(run_dir: Path) -> int:
    """Return the mark that rules of ours give packets from elsewhere which a function may have."""
    return 0xFA << 24 | int(run_dir_mark(run_dir), 16)


def attach_filter(sock: socket.socket, instructions: Iterable[tuple[int, int, int, int]]) -> None:
    """Have the kernel run a filter on what a socket receives. Raises OSError."""
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HP", len(program) // 8, ctypes.addressof(code))           # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)


def filter_of(sock: socket.socket) -> list[tuple[int, int, int, int]]:
    most = 4096                         # instructions (BPF_MAXINSNS): the kernel counts these, not bytes
    code, count = ctypes.create_string_buffer(8 * most), ctypes.c_uint32(most)
    succeeded(libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_ATTACH_FILTER, code, ctypes.byref(count)))
    return list(struct.iter_unpack("HBBI", code.raw[:8 * count.value]))


def mount_cgroup2() -> int:
    """Return a descriptor of the part of cgroup v2 that we are in, mounted nowhere. Raises OSError.

    To be called in a thread of its own: a mount made from the machine's own cgroup namespace would set the options of
    all mounts of cgroup v2 anew (nsdelegate, memory_recursiveprot).
    """
    succeeded(libc.unshare(CLONE_NEWCGROUP))
    with kept_open(system_call(SYS_FSOPEN, b"cgroup2", 1)) as context:    # FSOPEN_CLOEXEC
        system_call(SYS_FSCONFIG, context, 6, 0, 0, 0)                  # FSCONFIG_CMD_CREATE
        return system_call(SYS_FSMOUNT, context, 1, 0)                  # FSMOUNT_CLOEXEC


def top_cgroup() -> contextlib.AbstractContextManager[int]:
    """Open the top of cgroup v2, also where it is mounted nowhere that we see. Raises OSError."""
    tops = [mount for mount, kind in read_mounts() if kind == "cgroup2"]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return kept_open(os.open(tops[0], os.O_RDONLY) if tops else executor.submit(mount_cgroup2).result())


def bpf(command: int, layout: str, *values: int | bytes) -> int:
    """Make a call of bpf(2), its union bpf_attr laid out as in linux/bpf.h. Raises OSError."""
    size = struct.calcsize(layout)
    attributes = ctypes.create_string_buffer(struct.pack(layout, *values), size)
    number = 321 if platform.machine() == "x86_64" else 280             # asm-generic/unistd.h
    return system_call(number, command, ctypes.addressof(attributes), size)


SO_NETNS_COOKIE = 71                # Linux 5.14: the number of a socket's network namespace
BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_DETACH = 5, 8, 9              # commands of bpf(2) (linux/bpf.h)
BPF_PROG_GET_FD_BY_ID, BPF_OBJ_GET_INFO_BY_FD, BPF_PROG_QUERY = 13, 15, 16
BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_F_ALLOW_MULTI, BPF_CGROUP_MAX_PROGS = 18, 2, 64
GUARDED_CALLS = (8, 10)             # BPF_CGROUP_INET4_BIND, BPF_CGROUP_INET4_CONNECT


class AddressGuard:
    """Has the kernel refuse to connect or to bind a socket that has a function's address already (EPERM).

    A handler is given a socket of the host's network. Once connect(2) has dissolved its connection, it could go
    wherever the host can. But whatever a handler does, it keeps the address that its listener was bound to, and nobody
    else binds one of these and then connects. So two BPF programs on cgroup v2 know it by that, and by our network
    namespace. They are at the top of the hierarchy, where they see the sockets of a daemon that ran in another cgroup,
    too. They stay if we die, as containers do, and the next daemon knows them by their name.
    """

    def __init__(self, run_dir: Path, subnet: ipaddress.IPv4Network):
        self._name = f"faasd_{run_dir_mark(run_dir)}".encode()
        self._subnet = subnet

    def attach(self) -> None:
        """Guard the addresses of the subnet; take away what the daemon before has left. Raises OSError."""
        with top_cgroup() as cgroup:
            for kind in GUARDED_CALLS:
                with kept_open(self._load(kind)) as program:
                    bpf(BPF_PROG_ATTACH, "5I", cgroup, program, kind, BPF_F_ALLOW_MULTI, 0)
                    self._detach(cgroup, kind, but=self._describe(program)[0])

    def detach(self) -> None:
        """Take away what attach() has left. Raises OSError."""
        with top_cgroup() as cgroup:
            for kind in GUARDED_CALLS:
                self._detach(cgroup, kind)

    def _detach(self, cgroup: int, kind: int, but: int = 0) -> None:
        """Take away all programs of our name but the one of this id."""
        ids = (ctypes.c_uint32 * BPF_CGROUP_MAX_PROGS)()
        bpf(BPF_PROG_QUERY, "4IQ2I", cgroup, kind, 0, 0, ctypes.addressof(ids), len(ids), 0)
        for number in filter(None, ids):
            with contextlib.suppress(FileNotFoundError):        # another daemon has just taken its own away
                with kept_open(bpf(BPF_PROG_GET_FD_BY_ID, "3I", number, 0, 0)) as program:
                    if number != but and self._describe(program)[1] == self._name:
                        bpf(BPF_PROG_DETACH, "5I", cgroup, program, kind, 0, 0)

    @staticmethod
    def _describe(program: int) -> tuple[int, bytes]:
        """Return id and name of a program (struct bpf_prog_info)."""
        info = ctypes.create_string_buffer(80)
        bpf(BPF_OBJ_GET_INFO_BY_FD, "2IQ", program, len(info), ctypes.addressof(info))
        return struct.unpack_from("I", info, 4)[0], struct.unpack_from("16s", info, 64)[0].rstrip(b"\0")

    def _load(self, kind: int) -> int:
        """Return a descriptor of the program for one kind of call."""
        with socket.socket(socket.AF_UNIX) as ours:
            cookie, = struct.unpack("Q", ours.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))
        mask, network = (struct.unpack("=I", address.packed)[0]         # in the order of bytes that packets have
                         for address in (self._subnet.netmask, self._subnet.network_address))
        program = b"".join(struct.pack("=BBhI", *instruction) for instruction in (     # code, registers, jump, number
            (0xBF, 0x16, 0, 0),                                         # r6 = context
            (0x85, 0x00, 0, 122),                                       # r0 = bpf_get_netns_cookie(context)
            (0x18, 0x01, 0, cookie & 0xFFFF_FFFF), (0, 0, 0, cookie >> 32),             # r1 = ours
            (0x5D, 0x10, 6, 0),                                         # is another: to the end
            (0x79, 0x61, 64, 0), (0x61, 0x11, 24, 0),                   # r1 = context->sk->src_ip4
            (0x54, 0x01, 0, mask), (0x56, 0x01, 2, network),            # not of the subnet: to the end
            (0xB7, 0x00, 0, 0), (0x95, 0x00, 0, 0),                     # return 0: refused
            (0xB7, 0x00, 0, 1), (0x95, 0x00, 0, 0)))                    # return 1
        text, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"MIT")
        return bpf(BPF_PROG_LOAD, "2I2Q2IQ2I16s2I", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, len(program) // 8,
                   ctypes.addressof(text), ctypes.addressof(licence), 0, 0, 0, 0, 0, self._name, 0, kind)


NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7     # linux/netlink.h, linux/netfilter/nfnetlink.h
NETLINK_ROUTE, RTMGRP_IPV4_IFADDR, RTM_DELADDR = 0, 0x10, 21    # linux/rtnetlink.h
NFT_DELTABLE = 10 << 8 | 2                      # NFNL_SUBSYS_NFTABLES, NFT_MSG_DELTABLE (linux/netfilter/nf_tables.h)


class NetlinkWatch:
    """Calls back when the kernel reports one kind of change (netlink(7)), so that nothing polls. Lives on the loop.

    Firewalls that are reloaded flush everybody's tables (`nft flush ruleset` in Debian's nftables.conf), and a function
    must not meet the host's services from then on. Network managers flush addresses that are not theirs. No program can
    send us such a message in the kernel's place.
    """

    def __init__(self, protocol: int, groups: int, kind: int, mark: bytes, on_change: Callable[[], None]):
        """kind is the type of a message that counts, if mark is in it."""
        self._address, self._protocol = (0, groups), protocol
        self._kind, self._mark = kind, mark
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Watch from now on. Raises FaasdError."""
        if self._socket is not None:
            return
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, self._protocol)
            self._socket.bind(self._address)
        except OSError as error:
            self.close()
            raise FaasdError(f"cannot watch addresses, or the rules of net egress: {error.strerror}") from error
        self._loop.add_reader(self._socket, self._on_message)

    def close(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _on_message(self) -> None:
        try:
            data = self._socket.recv(COPY_CHUNK)
        except OSError as error:                # ENOBUFS: there were more messages than the kernel keeps for us
            log.info("missed messages of the kernel: %s", error.strerror)
            self._on_change()
            return
        while len(data) >= 16:                  # struct nlmsghdr
            length, kind = struct.unpack_from("=IH", data)
            if kind == self._kind and self._mark in data[:length]:
                self._on_change()
            data = data[max(16, length + 3 & ~3):]


# ---------------------------------------------------------------------------------------------------------------------
# Networks: --net egress and --publish
# ---------------------------------------------------------------------------------------------------------------------

LINK_PREFIX = "faas"                # the host's ends of veth pairs: faas, 6 digits that tell the run-dir, -, a number
MAX_LINKS = 9999                    # such numbers, so that a name keeps within 15 bytes (IFNAMSIZ)
METADATA_NETWORK = "169.254.0.0/16"     # link-local, where clouds hand out credentials
NFT_FAILED = "nft cannot load the rules of net egress"
RESOLV_CONFS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")    # the first that names a usable resolver


class EgressNetworks:
    """The networks of functions with `--net egress`: each a namespace, a veth pair to the host, a part in our rules.

        container            the function's namespace         host
        joins it by path     eth0 ADDRESS/32 <-- veth pair --> faas3f9a1c-7 GATEWAY/32 --> rules, masquerade --> outside

    A namespace is kept by a bind mount at RUN_DIR/net/NAME. All links have the same gateway address, and each function
    an address that goes by the number of its link: so there is nothing to write down, and a link that bears its
    function's name (as its alias, which is set last) is whole. Methods block, and must not run at the same time.
    """

    def __init__(self, run_dir: Path, subnet: ipaddress.IPv4Network, public: ipaddress.IPv4Network, port: int):
        mark = run_dir_mark(run_dir)
        self.table = f"faasd_{mark}"
        self._run_dir, self._directory = run_dir, namespace_path(run_dir, "x").parent
        self._subnet, self._public, self._port, self._mark = subnet, public, port, packet_mark(run_dir)
        self._gateway = str(subnet[1])
        self._prefix = f"{LINK_PREFIX}{mark}-"
        self._possible = range(1, min(MAX_LINKS, subnet.num_addresses - 3) + 1)     # less network, gateway, broadcast
        self._numbers: dict[str, int] = {}      # function → number of its link

    def has(self, name: str) -> bool:
        return name in self._numbers

    def provide(self, name: str) -> None:
        """Make a function's network if it has none yet. Raises FaasdError; then it has what it had.

        What all share is renewed in any case: the machine's resolvers may have changed.
        """
        self._check_machine()
        if name in self._numbers:
            self._load_rules()
            return
        if not self._numbers:
            self._warn_of_firewalls()
        number = next((number for number in self._possible if number not in self._numbers.values()), None)
        if number is None:
            raise Conflict(f"net egress: {self._subnet} has no free address: start faasd with a larger --egress-subnet")
        self._numbers[name] = number
        try:
            self._make_directory()
            self._load_rules()          # before the link: a packet from a link that they do not know is dropped
            self._make(name, number)
        except BaseException as error:
            self.remove(name)
            if isinstance(error, OSError):
                raise storage_error(error, f"making {namespace_path(self._run_dir, name)}") from error
            raise

    def _make_directory(self) -> None:
        """Make RUN_DIR/net a mount that is shared: what we unmount there, no container's runtime keeps. Raises OSError.

        See mount_root; `ip netns` does so too. It may be a directory that an older faasd has made and filled.
        """
        with contextlib.suppress(FileExistsError):
            self._directory.mkdir(mode=0o700)
            mount_here("", str(self._directory), str(self._directory), MS_BIND)
            mount_here("", "", str(self._directory), MS_SHARED)

    def remove(self, *names: str) -> None:
        """Remove functions' networks; what cannot be removed is logged."""
        ours = [name for name in names if name in self._numbers]
        for name in ours:
            self._delete_link(self._numbers.pop(name))
            self._delete_namespace(namespace_path(self._run_dir, name))
        if ours:
            self._settle()

    def remove_all(self) -> None:
        self.remove(*self._numbers)

    def recover(self, wanted: set[str]) -> None:
        """Take over the networks that a killed daemon left of functions that want one, and remove all others."""
        mounted = {mount for mount, kind in read_mounts() if kind == "nsfs"}
        links = self._links()
        for number, name in links.items():
            if name in wanted and str(namespace_path(self._run_dir, name)) in mounted and number in self._possible:
                self._numbers[name] = number
            else:
                self._delete_link(number)
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            if path.name not in self._numbers:
                log.warning("removing the network of %s that a killed daemon left", path.name)
                self._delete_namespace(path)
        if links or self._directory.is_dir():
            self._settle()

    def _links(self) -> dict[int, str]:
        """Return our links: number → function, or "" for one that is not whole, or of another subnet."""
        gateways = {interface for interface, entry in ip_addresses() if entry["local"] == self._gateway}
        return {int(match[1]): link.get("ifalias", "") if link["ifname"] in gateways else ""
                for link in ip_json("link", "show")
                if (match := re.fullmatch(f"{self._prefix}([0-9]+)", link["ifname"]))}

    # -- what must be so for any of them to work --

    def _check_machine(self) -> None:
        if shutil.which("nft") is None:
            raise Conflict("net egress needs the nft program: apt install nftables")
        holder = find_holder(self._subnet, lambda interface, label: interface.startswith(self._prefix))
        if not holder and self._subnet.overlaps(self._public):
            holder = f"functions listen on {self._public}"
        if holder:
            raise Conflict(f"net egress: {self._subnet} is in use: {holder}; start faasd with another --egress-subnet")
        # Answers come in by another interface than ours, so that one must forward. "all" is net.ipv4.ip_forward.
        forwarding = [path for path in Path("/proc/sys/net/ipv4/conf").glob("*/forwarding")
                      if path.parent.name not in ("lo", "default") and not path.parent.name.startswith(LINK_PREFIX)]
        if not any(read_text(path).strip() == "1" for path in forwarding):
            raise Conflict("net egress needs a machine that forwards packets, which this one does not: sysctl -w "
                           "net.ipv4.ip_forward=1, or net.ipv4.conf.X.forwarding=1 for the interface X that leads out")

    @staticmethod
    def _warn_of_firewalls() -> None:
        """Warn of a firewall that drops what we would forward: an accept in our table cannot overrule it."""
        listed = json.loads(run_command("cannot list the chains of nftables", "nft", "-j", "list", "chains") or "{}")
        for chain in [item["chain"] for item in listed.get("nftables", []) if "chain" in item]:
            if (chain.get("hook"), chain.get("policy")) == ("forward", "drop") and chain["family"] in ("ip", "inet"):
                log.warning("chain %s of nftables table %s %s drops what it does not know: have it accept packets from "
                            "and to %s*, or net egress leads nowhere", chain["name"], chain["family"], chain["table"],
                            LINK_PREFIX)

    # -- what they share --

    def _load_rules(self) -> None:
        def elements(items: Iterable[str]) -> str:
            text = ", ".join(dict.fromkeys(items))
            return f"elements = {{ {text} }}" if text else ""       # an empty list is a syntax error
        text, resolvers = fit_resolv_conf(map(read_text, RESOLV_CONFS))
        if not resolvers:
            log.warning("net egress: no resolver with an IPv4 address other than loopback in %s: functions cannot look "
                        "up names", " or ".join(RESOLV_CONFS))
        run_command(NFT_FAILED, "nft", "-f", "-", stdin=EGRESS_RULES.format(
            table=self.table, prefix=self._prefix, subnet=self._subnet, public=self._public, port=self._port,
            mark=self._mark, metadata=METADATA_NETWORK, resolvers=elements(resolvers), functions=elements(
                f'"{self._prefix}{number}" . {self._address(number)}' for number in self._numbers.values())))
        try:
            write_anew(resolv_conf_path(self._run_dir, "egress"), text)
        except OSError as error:
            raise storage_error(error, "writing resolv.conf") from error

    def restore_rules(self) -> None:
        """Load the rules again if somebody has flushed them; failure is logged."""
        if self._numbers and not try_command(f"somebody deleted nftables table inet {self.table}: loading the rules of "
                                             "net egress again", "nft", "list", "table", "inet", self.table):
            self._settle()

    def _settle(self) -> None:
        """Update the rules and files that all of them share; failure is logged."""
        with failure_logged():
            if self._numbers:
                self._load_rules()
                return
            resolv_conf_path(self._run_dir, "egress").unlink(missing_ok=True)
            if shutil.which("nft"):
                run_command(NFT_FAILED, "nft", "-f", "-",
                            stdin=f"add table inet {self.table}\ndelete table inet {self.table}\n")
            with contextlib.suppress(OSError):  # there is none, or not all could be removed from it
                if not os.listdir(self._directory):
                    libc.umount2(os.fsencode(self._directory), MNT_DETACH)
                self._directory.rmdir()         # last: the daemon that finds it after a crash does this again

    # -- one of them --

    def _address(self, number: int) -> str:
        return str(self._subnet[1 + number])

    def _make(self, name: str, number: int) -> None:
        def run(*argv: str, stdin: Iterable[str] = ()) -> None:
            run_command(f"cannot make a network for net egress: {argv[0]}", *argv, stdin="\n".join(stdin))
        def without_ipv6(link: str) -> list[str]:       # where the kernel has IPv6
            return [f"link set {link} addrgenmode none"] if os.path.isdir("/proc/sys/net/ipv6/conf") else []
        link, address = f"{self._prefix}{number}", self._address(number)
        namespace = namespace_path(self._run_dir, name)
        namespace.touch(mode=0o600)
        run("unshare", f"--net={namespace}", "ip", "link", "set", "lo", "up")
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(namespace))
        run("ip", "-batch", "-", stdin=[*without_ipv6(link), f"addr add {self._gateway}/32 dev {link}",
                                        f"link set {link} up", f"route add {address}/32 dev {link}"])
        try:
            Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").write_text("1")
        except OSError as error:
            raise FaasdError(f"cannot make {link} forward packets: {error.strerror}") from error
        run("nsenter", f"--net={namespace}", "ip", "-batch", "-", stdin=[
            *without_ipv6("eth0"), f"addr add {address}/32 dev eth0", "link set eth0 up",
            f"route add {self._gateway}/32 dev eth0", f"route add default via {self._gateway}"])
        run("ip", "link", "set", link, "alias", name)

    def _delete_link(self, number: int) -> None:
        link = f"{self._prefix}{number}"
        if link in (name for _, name in socket.if_nameindex()):
            try_command(f"cannot remove {link}", "ip", "link", "del", link)

    @staticmethod
    def _delete_namespace(path: Path) -> None:
        """Take away what keeps a namespace; it ends with the last process in it, which has no link to anybody."""
        libc.umount2(os.fsencode(path), MNT_DETACH)     # lazily: a starting runc may have it open
        try_remove(path)


# What egress means. Our own table, and only packets of our own links: others' rules are not ours to touch. Replaced as
# a whole, in one transaction, so the rules are never absent.
#   prerouting   a function speaks IPv4 from its own address on its own link, whatever its namespace might make up.
#   input        to this machine itself: only the functions' public addresses, and resolvers that happen to be here.
#   forward      to everybody else, but not to other functions' links, to cloud metadata, or to what other rules here
#                redirect, as Docker does to publish ports on the host's addresses. Nobody opens connections to a
#                function's link.
# Refused at once, TCP by a reset: ICMP errors are rate-limited, and a program should not wait for nothing.
EGRESS_RULES = """\
add table inet {table}
delete table inet {table}
table inet {table} {{
    set functions {{ type ifname . ipv4_addr; {functions} }}
    set resolvers {{ type ipv4_addr; {resolvers} }}
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{prefix}*" meta nfproto ipv6 drop
        iifname "{prefix}*" iifname . ip saddr != @functions drop
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname != "{prefix}*" accept
        ip daddr {public} tcp dport {port} meta mark set {mark}
        ct state vmap {{ established : accept, related : accept, invalid : drop }}
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr {public} tcp dport {port} accept
        goto refuse
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname != "{prefix}*" oifname != "{prefix}*" accept
        ct state vmap {{ established : accept, related : accept, invalid : drop }}
        oifname "{prefix}*" goto refuse
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr {metadata} goto refuse
        ct status dnat goto refuse
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{prefix}*" masquerade
    }}
    chain refuse {{ meta l4proto tcp reject with tcp reset; reject with icmpx type admin-prohibited; }}
}}
"""


class PublishedPorts:
    """Ports of this machine that lead to functions (--publish), by rules of nftables. Nothing of ours is in between.

    A function does not listen there itself: a handler that dissolves its client's connection keeps the address, and
    AddressGuard could not tell such a socket from the machine's own. So the kernel sends what comes to such a port on
    to the function's address; the client keeps its own. A socket that is bound, and does not listen, keeps everybody
    else from the port. Methods block, and must not run at the same time.
    """

    def __init__(self, run_dir: Path, subnet: ipaddress.IPv4Network, port: int):
        self.table = f"faasd_publish_{run_dir_mark(run_dir)}"
        self._subnet, self._port, self._mark = subnet, port, packet_mark(run_dir)
        self._published: dict[str, tuple[str, list[tuple[str, int]]]] = {}     # by function: its address, and places
        self._held: dict[tuple[str, int], tuple[str, socket.socket]] = {}      # by address and port, for a function
        self._loaded: list[str] | None = None       # the rules that the kernel has of us; None: those we found, if any
        self._before: list[tuple[str, int, str]] = []           # the latter: address, port, and address of the function

    def recover(self, published: dict[str, tuple[str, list[tuple[str, int]]]]) -> None:
        """Keep rules for functions, their addresses and places, that come back one after the other."""
        self._published.update(published)

    def hold(self, name: str, places: Iterable[tuple[str, int]]) -> None:
        """Take ports for a function. Raises FaasdError if one is another's; then it has those that it had."""
        try:
            if errors := self.hold_free(name, places):
                raise errors[0]
        except BaseException:
            self.give_back(name)
            raise

    def hold_free(self, name: str, places: Iterable[tuple[str, int]]) -> list[Conflict]:
        """Take those ports for a function that nobody else has; return what is wrong with the others."""
        errors = []
        for address, port in places:
            for own in self._addresses(address):
                holder, _ = self._held.get((own, port), ("", None))
                try:
                    if holder not in ("", name):
                        raise Conflict(f"cannot publish {own}:{port}: function {holder} already publishes it")
                    if not holder:
                        self._held[own, port] = name, bind_port(own, port)
                except Conflict as error:
                    errors.append(error)
        return errors

    def _addresses(self, address: str) -> list[str]:
        """Return the address itself, or all that this machine has if it is "". Raises FaasdError."""
        if shutil.which("nft") is None:
            raise Conflict("--publish needs the nft program: apt install nftables")
        if address and ipaddress.ip_address(address) in self._subnet:
            raise Conflict(f"cannot publish {address}: that is an address of functions")
        own = [address] if address else dict.fromkeys(entry["local"] for _, entry in ip_addresses())
        return [other for other in own if ipaddress.ip_address(other) not in self._subnet]

    def give_back(self, name: str) -> None:
        """Let go of ports that were held for a function, and that it does not publish."""
        for (address, port), (holder, held) in list(self._held.items()):
            if holder == name and not self._publishes(name, address, port):
                del self._held[address, port]
                held.close()

    def _publishes(self, name: str, address: str, port: int) -> bool:
        _, places = self._published.get(name, ("", []))
        return (address, port) in places or ("", port) in places

    def publish(self, name: str, address: str, places: list[tuple[str, int]]) -> None:
        """Have places that are held lead to a function, and no other. Raises FaasdError; then all is as before."""
        before = dict(self._published)
        self._published[name] = address, places
        if not places:
            del self._published[name]
        try:
            if places or name in before:        # else nothing changes, and there need be no nft
                self.load_rules(self._loaded)
        except FaasdError:
            self._published = before
            raise
        self.give_back(name)

    def load_rules(self, there: list[str] | None = None) -> None:
        """Replace our rules, unless these are there, or remove them with the last published port. Raises FaasdError."""
        if self._loaded is None:
            self._before = self._left_rules()
        rules = self._rules()
        if rules != there:
            self._load(rules or None)
            self._loaded = rules

    def _rules(self) -> list[str]:
        """Return a rule for each place that we hold, and for each that was led to the same function all along.

        Whoever has taken one of the latter while no daemon ran gets nothing of what comes there.
        """
        leads = {(own, port): address for name, (address, _) in self._published.items()
                 for own, port, to in self._before if to == address and self._publishes(name, own, port)}
        leads |= {place: self._published[holder][0] for place, (holder, _) in self._held.items()
                  if self._publishes(holder, *place)}
        return [f"ip daddr {own} tcp dport {port} dnat to {address}:{self._port}"
                for (own, port), address in sorted(leads.items())]

    def _left_rules(self) -> list[tuple[str, int, str]]:
        """Return the address and the port of each rule that another daemon has left, and the function's address."""
        try:
            text = run_command("there are no rules", "nft", "list", "table", "ip", self.table)
        except FaasdError:
            return []
        return [(own, int(port), address) for own, port, address in
                re.findall(r"ip daddr ([0-9.]+) tcp dport ([0-9]+) dnat to ([0-9.]+):", text)]

    def _load(self, rules: list[str] | None) -> None:
        """Replace our table by one with these rules, None: by none. In one transaction, so they are never absent."""
        text = PUBLISH_RULES.format(table=self.table, rules="\n        ".join(rules), subnet=self._subnet,
                                    port=self._port, mark=self._mark) if rules is not None else ""
        run_command("nft cannot load the rules of --publish", "nft", "-f", "-",
                    stdin=f"add table ip {self.table}\ndelete table ip {self.table}\n{text}")

    def turn_away(self) -> None:
        """Refuse newcomers from now on; failure is logged. The chains stay: they translate for those who are here."""
        if self._published:
            with failure_logged():
                self._load([])

    def restore_rules(self) -> None:
        """Load the rules again if somebody has flushed them; failure is logged."""
        if self._rules() and not try_command(f"somebody deleted nftables table ip {self.table}: loading the rules of "
                                             "--publish again", "nft", "list", "table", "ip", self.table):
            with failure_logged():
                self.load_rules()

    def remove_stale(self) -> None:
        """Remove the rules of the daemon before, if nothing is published any more; failure is logged."""
        if not self._published and self._left_rules():
            with failure_logged():
                self.load_rules()

    def remove_all(self) -> None:
        """Remove the rules; failure is logged."""
        if self._published:
            self._published.clear()
            with failure_logged():
                self.load_rules()


def bind_port(address: str, port: int) -> socket.socket:
    """Return a socket that keeps others from a port. Raises Conflict."""
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.bind((address, port))
    except OSError as error:
        held.close()
        reason = ("another program has it" if error.errno == errno.EADDRINUSE else
                  "this machine has no such address" if error.errno == errno.EADDRNOTAVAIL else error.strerror)
        raise Conflict(f"cannot publish {address}:{port}: {reason}") from None
    return held


# A rule for each address and port that we hold: what other programs listen on stays theirs. The kernel asks the first
# three chains for the first packet of a connection only. The last marks what they led here, for listener_filter.
PUBLISH_RULES = """\
table ip {table} {{
    chain published {{
        {rules}
    }}
    chain prerouting {{ type nat hook prerouting priority -100; policy accept; goto published; }}
    chain output {{ type nat hook output priority -100; policy accept; goto published; }}
    chain input {{
        type filter hook input priority 300; policy accept;
        ip daddr {subnet} tcp dport {port} ct status dnat meta mark set {mark}
    }}
}}
"""


def fit_resolv_conf(texts: Iterable[str]) -> tuple[str, list[str]]:
    """Return a resolv.conf for a network namespace of its own, and the resolvers in it; empty if there are none.

    It is made from the first of texts that names a resolver which can be reached from there: one with an IPv4 address
    that is not loopback, as those of stubs on the host are (127.0.0.53).
    """
    for text in texts:
        lines, resolvers = [], []
        for words in filter(None, map(str.split, text.splitlines())):
            if words[0] in ("search", "domain", "options"):
                lines.append(" ".join(words))
            elif words[0] == "nameserver" and len(words) > 1 and is_reachable(words[1]):
                lines.append(" ".join(words[:2]))
                resolvers.append(words[1])
        if resolvers:
            return "\n".join(lines) + "\n", resolvers
    return "", []


def is_reachable(resolver: str) -> bool:
    """Return whether text is an IPv4 address that means the same in every network namespace."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv4Address(resolver)
        return not (address.is_loopback or address.is_unspecified or address.is_multicast)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Where containers live: what they share, what the machine can do, and what the daemon before has left
# ---------------------------------------------------------------------------------------------------------------------


class ContainerHost:
    """What all containers of this daemon share: directories, runtime, cgroups, ids, and threads that wait for them."""

    def __init__(self, run_dir: Path, runtime: Runtime, ids: IdRanges, subnet: ipaddress.IPv4Network, port: int,
                 volumes: Volumes):
        self.run_dir = run_dir
        self.volumes = volumes
        self.containers_dir = run_dir / "containers"
        self.ids = ids
        self.runtime = runtime
        self.cgroups = Cgroups(run_dir)
        self.apparmor = apparmor_profile()
        self.descriptors = Descriptors()
        self.loop = asyncio.get_running_loop()
        self.workers = Workers(self.loop)
        self.closed = ClosedConnections(self.workers, subnet, port)
        self.killers = Workers(self.loop)       # apart, because killing a container is what ends the wait of workers
        self.killings = Tasks("killing a container")
        self.supervises = True                  # containers' calls can be answered here: see probe_machine
        self._dying: dict[str, DyingCgroups] = {}
        self._spawning: dict[str, set[asyncio.Future]] = collections.defaultdict(set)   # by function

    def prepare(self) -> None:
        """Make RUN_DIR/containers, on a tmpfs, and the place of containers' roots. Raises FaasdError."""
        self.containers_dir.mkdir(mode=0o711, exist_ok=True)
        (self.run_dir / NAMES).parent.mkdir(mode=0o755, exist_ok=True)
        mounts = dict(read_mounts())            # a later mount hides an earlier one
        mount = next(str(path) for path in (self.containers_dir, *self.containers_dir.parents) if str(path) in mounts)
        if mounts[mount] != "tmpfs":
            run_command(f"cannot mount a tmpfs on {self.containers_dir}", "mount", "-t", "tmpfs", "-o",
                        "mode=0711,nosuid,nodev,noexec,size=64m", "faasd", str(self.containers_dir))
        self.containers_dir.chmod(0o711)
        (self.run_dir / ROOT).mkdir(exist_ok=True)

    def begin_spawn(self, bundle: Bundle, directory: str, container_id: str, files: list[tuple],
                    given: contextlib.ExitStack) -> asyncio.Future:
        """Have a thread spawn a container. Raises OSError, also if a function's volume holds up too many already."""
        if len(self._spawning[bundle.name]) >= 64:      # threads
            raise OSError(errno.EAGAIN, "earlier starts of it wait for its files: does a volume hang?")
        future = self.loop.create_future()

        def work() -> None:
            try:
                outcome = self._spawn(bundle, directory, container_id, files)
            except Exception as error:                  # for the caller
                outcome = error
            with contextlib.suppress(RuntimeError):     # the loop is closed
                self.loop.call_soon_threadsafe(settle, future, outcome)
            given.close()       # last: if we were stopped, others of its network may hold the lock of a pipe by now
        try:
            _thread.start_new_thread(work, ())          # who starts a threading.Thread waits until it runs
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, "no thread is to be had") from error
        self._spawning[bundle.name].add(future)
        future.add_done_callback(self._spawning[bundle.name].discard)
        return future

    def _spawn(self, bundle: Bundle, directory: str, container_id: str, files: list[tuple]) -> int:
        """Start `runc run` in a thread in whose mount namespace the root is. Return its pid. Raises OSError."""
        place = str(self.run_dir / ROOT)
        mount_root(place, bundle)
        if bundle.secrets:
            mount_secrets(f"{place}/root", bundle)
        for volume in bundle.volumes:           # last: nothing is looked up where containers can make links
            self.volumes.mount(volume, bundle, f"{place}/root")
        cgroup = self.cgroups.path(bundle.name, container_id)
        try:
            self.cgroups.limit_sockets(cgroup, bundle.options.memory)
            return self.runtime.spawn(directory, container_id, files)
        except OSError:                         # a volume may have held us up until nobody waits for this container
            self.cgroups.remove(cgroup)
            raise

    def inspect(self, container: Container) -> dict:
        """Return how a running container is isolated. Blocks. Raises Conflict if it ends meanwhile."""
        try:
            for pid in self.cgroups.processes(container.cgroup):
                if re.search(r"^NSpid:.*\t1$", read_text(f"/proc/{pid}/status"), re.MULTILINE):
                    return {"container": container.id, **inspect_process(pid),
                            "limits": self.cgroups.limits(container.cgroup)}
        except (OSError, LookupError) as error:         # LookupError: of a file that could not be read
            log.info("container=%s inspecting it: %r", container.id, error)
        raise Conflict("the container that was being looked at has ended: try again")

    def kill_all(self, cgroup: str) -> None:
        """Kill every process of a container until none is left, or for KILL_TIMEOUT. Blocks."""
        deadline = time.monotonic() + KILL_TIMEOUT
        while self.cgroups.processes(cgroup) and time.monotonic() < deadline:
            self.cgroups.kill(cgroup)
            time.sleep(KILL_RETRY)

    def remove_remains(self, container_id: str, cgroup: str) -> None:
        """Remove a container without the runc that ran it. Blocks; what cannot be removed is logged."""
        self.kill_all(cgroup)
        if self.runtime.has_state(container_id):
            self.runtime.delete(container_id)
        self.cgroups.remove(cgroup)
        shutil.rmtree(self.containers_dir / container_id, ignore_errors=True)

    def count_ended(self, function: str) -> None:
        """Count a container that is gone, and reclaim memory once too many have left some."""
        first = DyingCgroups(self.cgroups, self.cgroups.group(function), self.workers)
        self._dying.setdefault(function, first).count()

    def forget(self, function: str) -> None:
        """Remove what all containers of a function had in common, once none is left. Blocks."""
        self._dying.pop(function, None)
        self.cgroups.remove(self.cgroups.group(function))

    def dismantle(self) -> None:
        """Remove what prepare made, once no container is left. Blocks."""
        self.cgroups.remove(self.cgroups.parent)
        shutil.rmtree(self.runtime.root / ".cache", ignore_errors=True)         # crun's, of seccomp filters
        mounts = dict(read_mounts())
        names = (self.run_dir / NAMES).parent
        for directory in (self.containers_dir, self.run_dir / ROOT, self.runtime.root, names):
            if str(directory) in mounts:
                # Lazily: a start that waits for a volume may have files open there for as long as we live.
                try_command(f"cannot unmount {directory}", "umount", "-l", str(directory))
            try_remove(directory, os.rmdir)


PROBE_SECONDS = 10.0                # for the container that shows at start whether any can run here
# What it runs instead of a handler: it opens its stdout as a program may that logs to a file.
PROBE = {"version": "", "process": {"env": [f"PATH={DEFAULT_PATH}"], "entrypoint": ["sh"], "cmd": ["-c", "echo works "
         ">/dev/stdout"], "cwd": "/", "uid": 0, "gid": 0, "groups": [], "resolv_conf": "/etc/resolv.conf"}}


async def probe_machine(host: ContainerHost) -> None:
    """Raise UsageError if no container starts; learn whether the runtime joins a user namespace, and hands over calls.

    A container's calls can be answered by one process alone, and where faasd itself runs in a container, as LXD's, that
    is another's already.
    """
    check_controllers()
    errors = [] if may_duplicate() else ["the kernel gives us no descriptors of other processes"]
    wanted = itertools.product((False,) if errors else (True, False), (True, False) if host.ids.can_make else (False,))
    for supervises, can_make in wanted:
        host.supervises, host.ids.can_make = supervises, can_make
        if error := await try_container(host):
            errors.append(error)
            continue
        if errors and not host.ids.can_make:
            log.warning("%s joins no user namespace, so it makes one for each container, and all functions share "
                        "root's limits of inotify, queues and timers: %s", host.runtime.name, errors[0])
        if not host.supervises:
            log.warning("faasd cannot answer containers' system calls on this machine, so servers do not run, only "
                        "handlers, which take their clients from %s: %s", CONTROL_SOCKET, errors[0])
        return
    raise unfit_machine(host.runtime, errors[-1])


def may_duplicate() -> bool:
    """Return whether the kernel gives us descriptors of other processes, as by Yama's ptrace_scope 3 it does not."""
    with subprocess.Popen(["sleep", "10"], stdin=subprocess.DEVNULL) as child:
        try:
            with kept_open(os.pidfd_open(child.pid)) as pidfd:
                os.close(system_call(SYS_PIDFD_GETFD, pidfd, 0, 0))
            return True
        except PermissionError:
            return False
        finally:
            child.kill()


async def try_container(host: ContainerHost) -> str:
    """Start a container as functions have them, of this machine's programs; return why none works, "" if one does."""
    rootfs = host.containers_dir / secrets.token_hex(6)
    try:
        bundle = Bundle("probe", {**PROBE, "first_id": host.ids.first}, Options(), rootfs, host.run_dir, host.cgroups,
                        host.apparmor, lay_out_probe(rootfs), "auto" if host.supervises else "handler")
        await Container(host, bundle.name, lambda container_id, line: None).start(bundle, PROBE_SECONDS)
    except StartFailed as failure:
        if failure.status == 504:               # a machine that has just booted may be slow, but not for long
            log.warning("%s has not started a container within %g s: going on without knowing what it can do",
                        host.runtime.name, PROBE_SECONDS)
            return ""
        return "" if "works" in failure.output else " ".join([str(failure), *failure.output])
    except OSError as error:
        raise storage_error(error, f"making a container in {rootfs}") from error
    finally:
        shutil.rmtree(rootfs, ignore_errors=True)
    raise AssertionError("nothing in a probe connects")


def lay_out_probe(rootfs: Path) -> list[dict]:
    """Make a rootfs in which this machine's programs run; return the mounts that it takes. Raises OSError."""
    mounts = []
    for name in ("dev", "etc", "proc", "sys", "tmp"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / CONTROL_SOCKET[1:]).touch()
    for entry in (entry for entry in Path("/").iterdir() if re.fullmatch(r"bin|lib.*|usr|nix|gnu", entry.name)):
        if entry.is_symlink():
            (rootfs / entry.name).symlink_to(os.readlink(entry))
        elif entry.is_dir():
            (rootfs / entry.name).mkdir()
            # Not read-only: that takes a remount, which may fail where no function would. Nothing in there is its own.
            mounts.append({"destination": str(entry), "type": "bind", "source": str(entry), "options": ["rbind"]})
    return mounts


def check_controllers() -> None:
    """Raise UsageError where a limit cannot be set. crun would not notice: it writes limits to plain files then."""
    there: set[str] = set()
    for before, after in read_mountinfo():
        if after[0] == "cgroup":
            there.update(after[2].split(","))
        elif after[0] == "cgroup2":
            there.update(read_text(Path(before[4]) / "cgroup.controllers").split())
    for controller in ("memory", "pids", "cpu"):
        if controller not in there:
            raise UsageError(f"this machine cannot limit what containers use of {controller}: boot the kernel with "
                             f"cgroup_enable={controller}, or mount the {controller} controller of cgroups")


def unfit_machine(runtime: Runtime, error: str) -> UsageError:
    """Return what to raise where no container starts; error is what the runtime says."""
    mounts, mend = read_mounts(), ""
    version_1, version_2 = ({mount for mount, kind in mounts if kind == name} for name in ("cgroup", "cgroup2"))
    if read_text("/proc/sys/user/max_user_namespaces").strip() == "0":
        mend = "user namespaces are switched off, sysctl user.max_user_namespaces=15000 switches them on: "
    elif version_1 and version_2 and "cgroup" in error:
        mend = f"it has cgroups of v1 and of v2, umount {' '.join(version_2)} or choose another --runtime: "
    elif "mounting overlay" in error and not re.search(r"\boverlay$", read_text("/proc/filesystems"), re.MULTILINE):
        mend = "the kernel has no overlay file system, modprobe overlay loads it where it is a module: "
    elif 'mounting "proc"' in error:    # mount_namespaces(7)
        mend = ("a part of /proc is hidden from faasd, as a container or a unit with ProtectKernelLogs= or "
                "ProtectKernelTunables= does, so that the kernel gives no other user namespace a /proc: ")
    return UsageError(f"{runtime.name} cannot start a container on this machine: {mend}{error}")


class Survivor(NamedTuple):
    """A container that serves a client since before this daemon was started."""
    container_id: str
    cgroup: str
    function: str
    image: str
    contract: str
    pid: int                    # of runc run
    pidfd: int
    output: int                 # the reading end of its output
    notify: int                 # reports a server's calls; -1 for a handler
    clients: list[tuple[socket.socket, str]]    # our duplicates, and the clients' addresses
    held: contextlib.ExitStack  # closes all these descriptors, if nobody adopts it


class Leftovers:
    """What the daemon before has left: containers that serve clients, which survive, and all others, which end."""

    def __init__(self, host: ContainerHost):
        self._host = host

    async def survivors(self, addresses: dict[str, str]) -> list[Survivor]:
        """Return the containers that serve clients, and end all others; addresses are the functions'.

        Only what a daemon has noted, in a directory where only root can write, makes a survivor. One that keeps us
        waiting is none.
        """
        host, survivors = self._host, []
        connections, cgroups = read_connections(addresses.values()), host.cgroups.containers()
        looking = {host.workers.run(self._survivor, container_id, cgroups, addresses, connections): container_id
                   for container_id in filter(CONTAINER_ID.fullmatch, os.listdir(host.containers_dir))}
        finished = await host.workers.finished(looking)
        for future, container_id in looking.items():
            if future not in finished:
                log.warning("container=%s cannot be taken over, because it keeps its output locked", container_id)
                future.add_done_callback(lambda late: late.exception() or host.workers.run(late.result().held.close))
            elif future.exception():
                log.debug("container=%s does not go on: %r", container_id, future.exception())
            else:
                survivors.append(future.result())
                log.info("function=%s container=%s serves a client and goes on", survivors[-1].function, container_id)
        self._kill_runtimes({survivor.pid for survivor in survivors})
        await self.remove(EXIT_GRACE, survivors)
        return survivors

    def _survivor(self, container_id: str, cgroups: dict[str, str], addresses: dict[str, str],
                  connections: dict[int, tuple[str, str]]) -> Survivor:
        """Return a container if it serves a client of an existing function. Raises OSError, ValueError, KeyError.

        The process's file does not matter: pid and start time name the process, and the runtime may have been upgraded.
        Blocks: to open a pipe takes its lock, and to duplicate a descriptor may wait for the end of an execve(2).
        """
        place = self._host.containers_dir / container_id
        with opened(place, os.O_PATH | os.O_DIRECTORY) as directory, contextlib.ExitStack() as held:
            number, started, name, image, *contract = os.readlink("note", dir_fd=directory).split(" ")
            pid = int(number)
            # Not kept_open(): whoever adopts it drops `held`, and a generator closes what it has when it is dropped.
            pidfd = os.pidfd_open(pid)
            held.callback(os.close, pidfd)
            if not is_roots(pid) or start_time(pid) != started:
                raise ProcessLookupError(errno.ESRCH, "its runtime has ended")
            signal.pidfd_send_signal(pidfd, 0)          # it is there still, so what was read was read of it
            with opened("output", os.O_PATH, directory) as pipe:        # so far nothing is opened
                if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
                    raise ValueError("its output is no pipe of ours")
                output = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            held.callback(os.close, output)
            notify = -1
            if contract and contract != ["handler"]:
                notify = take_deposit(pidfd)
                held.callback(os.close, notify)
            found = self._clients_of(cgroups[container_id], addresses[name], connections)
            most = 1024 if notify >= 0 else 1           # with --net host it may have connected to its own address
            clients = [(held.enter_context(client), peer) for client, peer in itertools.islice(found, most)]
            if not clients:
                raise KeyError(addresses[name])
            return Survivor(container_id, cgroups[container_id], name, image, *(contract or ["handler"]), pid,
                            pidfd, output, notify, clients, held.pop_all())

    def _clients_of(self, cgroup: str, address: str,
                    connections: dict[int, tuple[str, str]]) -> Iterator[tuple[socket.socket, str]]:
        """Yield duplicates of a container's sockets that are connected to clients of address, and those clients."""
        seen = set()
        for pidfd, number, inode in self._host.cgroups.sockets(cgroup):
            host, peer = connections.get(inode, ("", ""))
            if host == address and inode not in seen:
                try:
                    duplicate = duplicate_socket(pidfd, number, inode)
                except PermissionError:         # see machine_warnings: one without a connection stands for it
                    duplicate, inode = socket.socket(), 0
                except OSError:                 # it is gone
                    continue
                seen.add(inode)
                yield duplicate, peer

    def _kill_runtimes(self, survivors: set[int]) -> None:
        """Kill runtimes that a daemon before has started, but for survivors': they could still start a container.

        No daemon is there to start more, and one that is missed here finds no config.json.
        """
        for pid in set(map(int, filter(str.isdigit, os.listdir("/proc")))) - survivors:
            with contextlib.suppress(OSError), kept_open(os.pidfd_open(pid)) as pidfd:       # OSError: it has ended
                if self._is_our_runtime(pid):
                    log.warning("killing orphaned %s, pid %d", self._host.runtime.program, pid)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _is_our_runtime(self, pid: int) -> bool:
        """Return whether a process is a runtime that a daemon of this run-dir has started. Raises OSError.

        Anybody can choose a command line, so it counts only for a process of root's, and is read only then: reading it
        waits for the process's memory, which a user may have put where it never comes. The same path can be another
        daemon's directory in another mount namespace. A runtime that copies itself, or that a script starts, is another
        file than --runtime; but what it prints goes to a pipe of ours.
        """
        if not is_roots(pid):
            return False
        host = self._host
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if (argv[1:3] != [b"--root", os.fsencode(host.runtime.root)]
                or not os.path.samestat(os.stat(f"/proc/{pid}/root{host.run_dir}"), os.stat(host.run_dir))):
            return False
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")           # it was upgraded
        output = os.stat(f"/proc/{pid}/fd/1")
        return (program == os.path.realpath(host.runtime.program)
                or stat.S_ISFIFO(output.st_mode) and output.st_dev == os.stat(host.containers_dir).st_dev)

    async def end_holders(self, port: int) -> bool:
        """End containers that have taken a port of this machine, or may have; return whether there are any."""
        def holds(cgroup: str) -> bool:
            return any(has_port(pidfd, number, port) for pidfd, number, _ in self._host.cgroups.sockets(cgroup))
        run, finished = self._host.workers.run, self._host.workers.finished
        asking = {run(holds, cgroup): (container_id, cgroup)
                  for container_id, cgroup in self._host.cgroups.containers().items()}
        answered = await finished(asking)
        holders = [container for future, container in asking.items()
                   if future not in answered or future.exception() or future.result()]
        for container_id, _ in holders:
            log.warning("container=%s has taken port %d, which is ours: ending it", container_id, port)
        await finished([run(self._host.kill_all, cgroup) for _, cgroup in holders])
        return bool(holders)

    async def remove(self, seconds: float, survivors: Collection[Survivor] = ()) -> None:
        """Remove the remains of all containers except survivors, or return after so long, while threads go on.

        All at once: a container may take seconds to end, for which nobody should wait, to close its million files.
        """
        host, cgroups = self._host, self._host.cgroups.containers()
        left = {*os.listdir(host.containers_dir), *host.runtime.containers(), *cgroups}
        left = set(filter(CONTAINER_ID.fullmatch, left)) - {entry.container_id for entry in survivors}
        for container_id in left:
            log.warning("container=%s removing what the daemon before left of it", container_id)
        removing = [host.workers.run(host.remove_remains, container_id, cgroups.get(
            container_id, host.cgroups.path("", container_id))) for container_id in left]
        ended, going_on = await asyncio.wait(removing, timeout=seconds) if removing else ((), ())
        failed = [error for error in (future.exception() for future in ended) if error]
        for error in failed:
            log.error("a container that the daemon before left cannot be removed: %s", error)
        if not failed and not going_on:
            host.cgroups.remove_groups({survivor.function for survivor in survivors})

    def end(self, survivor: Survivor) -> None:
        """End a container that nobody adopts. Blocks."""
        log.warning("function=%s container=%s cannot go on: its function is broken", survivor.function,
                    survivor.container_id)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(survivor.pidfd, signal.SIGKILL)
        self._host.remove_remains(survivor.container_id, survivor.cgroup)
        for client, _ in survivor.clients:
            reset_connection(client)            # half an answer must not look whole
        survivor.held.close()


def is_roots(pid: int) -> bool:
    """Return whether a process's real user is root, in our user and pid namespaces. Raises OSError if it is gone.

    In a user namespace of its own a process can have 65,536 groups: to read its status, even a part, lists them all.
    """
    if any(os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "pid")):
        return False
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:        # not by Path: users may have many thousands
        return b"\nUid:\t0\t" in file.read(KIB)       # the real one: a setuid program has that of whoever runs it


def start_time(pid: int) -> str:
    """Return when a process started, as proc_pid_stat(5) has it: with its pid it names one process since the boot."""
    with open(f"/proc/{pid}/stat", "rb", 0) as file:
        return file.read(KIB).rpartition(b")")[2].split()[19].decode()


SYS_PIDFD_GETFD = 438               # the same on every architecture (pidfd_getfd(2), Linux 5.6)


def duplicate_socket(pidfd: int, number: int, inode: int = 0) -> socket.socket:
    """Return a duplicate of another process's descriptor as if it were a TCP socket.

    Raises OSError, also if the descriptor is no longer that of the file of an inode.
    """
    with kept_open(system_call(SYS_PIDFD_GETFD, pidfd, number, 0)) as duplicate:
        if inode and os.fstat(duplicate).st_ino != inode:       # the process has put another file there
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return as_socket(duplicate, socket.AF_INET)


def take_deposit(pidfd: int) -> int:
    """Return the descriptor that a runtime keeps for us: see Supervisor. It keeps it. Raises OSError, ValueError."""
    with kept_open(system_call(SYS_PIDFD_GETFD, pidfd, DEPOSIT, 0)) as descriptor:
        with as_socket(descriptor, socket.AF_UNIX) as deposit:
            return receive_descriptor(deposit, socket.MSG_PEEK | socket.MSG_DONTWAIT)


def receive_descriptor(sock: socket.socket, flags: int = 0) -> int:
    """Return the descriptor that comes with a message. Raises OSError, ValueError if none does.

    No program that we start gets it. Python's recv_fds takes no heed of flags.
    """
    _, ancillary, _, _ = sock.recvmsg(64 * KIB, socket.CMSG_LEN(4), flags | socket.MSG_CMSG_CLOEXEC)
    (_, _, data), = ancillary
    return struct.unpack("i", data)[0]


def read_connections(addresses: Iterable[str]) -> dict[int, tuple[str, str]]:
    """Return the inodes of the sockets of this network namespace on one of these addresses, each with it and its peer.

    A container's own connections, in its own network, are not among them. Any user can add a hundred thousand lines,
    nearly all in TIME_WAIT (06), so only the pattern looks at those.
    """
    def decode(number: bytes) -> str:                   # the address as the number that it is in memory
        return socket.inet_ntoa(struct.pack("=I", int(number, 16)))
    ours = "|".join("%08X" % struct.unpack("=I", socket.inet_aton(address)) for address in addresses)
    line = rf"^ *[0-9]+: ({ours}):.{{4}} (.{{8}}):(?!0000)(.{{4}}) (?!06)..(?: +[^ ]+){{5}} +([0-9]+)"
    return {int(inode): (decode(host), f"{decode(peer)}:{int(port, 16)}") for host, peer, port, inode in
            re.findall(line.encode(), Path("/proc/net/tcp").read_bytes(), re.MULTILINE) if ours}


def has_port(pidfd: int, number: int, port: int) -> bool:
    """Return whether a process's descriptor is a socket on a port of this network namespace. May wait for its lock."""
    with contextlib.suppress(OSError):          # it is gone
        with duplicate_socket(pidfd, number) as candidate, socket.socket() as ours:
            theirs, cookie = (sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8) for sock in (candidate, ours))
            return theirs == cookie and candidate.getsockname()[1:2] == (port,)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Logs and metrics: one log a function, the daemon's own, and what is counted
# ---------------------------------------------------------------------------------------------------------------------


class Writer:
    """A thread that writes what comes: a disk can hang, and whoever reads our stderr can stop (a pager, Ctrl-S).

    So nobody waits for it: at most a limited number of items wait, others are dropped and counted, and the process ends
    without it.
    """

    def __init__(self, write: Callable[[list, int], None], most: int, delay: float = 0.0):
        """write takes items in their order, and how many were dropped; they are gathered for delay seconds."""
        self._write, self._most, self._delay = write, most, delay
        self._items = queue.SimpleQueue()
        self._dropped = 0
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, item) -> None:
        """Have an item written soon. In any thread."""
        if self._items.qsize() < self._most:
            self._items.put(item)
        else:
            self._dropped += 1

    def flushed(self) -> concurrent.futures.Future:
        """Return a future that is done when all that was added before is written; wait for it with a limit."""
        done = concurrent.futures.Future()
        self._items.put(done)
        return done

    async def flush(self) -> None:
        """Return when all that was added before is written, or the disk takes too long."""
        await asyncio.wait([asyncio.wrap_future(self.flushed())], timeout=FLUSH_SECONDS)

    def _run(self) -> None:
        told = 0
        while True:
            items = [self._items.get()]
            time.sleep(self._delay)
            items += [self._items.get() for _ in range(self._items.qsize())]
            dropped = self._dropped - told
            told += dropped
            self._write([item for item in items if not isinstance(item, concurrent.futures.Future)], dropped)
            for item in items:
                if isinstance(item, concurrent.futures.Future):
                    item.set_result(None)


FLUSH_SECONDS = 5.0                 # to wait for lines on their way, when they are wanted or when we end


def write_logs(items: list[tuple[FunctionLog, bytes]], dropped: int) -> None:
    if dropped:
        log.error("the disk is too slow for the functions' logs: %d lines were dropped", dropped)
    batches: dict[FunctionLog, list[bytes]] = {}
    for function_log, line in items:
        batches.setdefault(function_log, []).append(line)
    for function_log, batch in batches.items():
        function_log.append(batch)


FOLLOW_SECONDS = 15.0               # how often `logs --follow` looks whether its client is still there


class FunctionLog:
    """STATE_DIR/logs/NAME.log: `TIME CONTAINER | text` for output, `TIME CONTAINER > key=value …` for an invocation.

    Lines are added on the loop's thread and written on the writer's; any thread may read, and wait for more.
    """

    def __init__(self, path: Path, writer: Writer):
        self.path = path
        self._previous = path.with_name(path.name + ".1")
        self._writer = writer
        self._failing = False
        self._ended = False
        self._to_remove = False
        self._grown = threading.Condition()     # held to change the file

    def write_output(self, container_id: str, text: str) -> None:
        self.write(container_id, "|", text)

    def write(self, container_id: str, mark: str, text: str) -> None:
        """Add a line; text has no control characters."""
        line = f"{timestamp()} {container_id} {mark} {text}\n"
        self._writer.add((self, line.encode("utf-8", "backslashreplace")))

    def append(self, lines: list[bytes]) -> None:
        """Write lines to the file. Trouble with the disk must not end an invocation. On the writer's thread."""
        with self._grown:
            try:
                while lines and not self._ended:
                    self._append_part(lines)
                    self._failing = False
            except OSError as error:
                if not self._failing:           # the daemon's own log may be on the same disk
                    log.error("cannot write %s: %s; lines are lost until it can be", self.path, error.strerror)
                self._failing = True
            if self._to_remove:
                self._to_remove = False         # once: the next are another's
                for path in (self.path, self._previous):
                    try_remove(path)            # or the next start does
            self._grown.notify_all()

    def _append_part(self, lines: list[bytes]) -> None:
        """Write as many of the lines as fit into the file and take them off the list; rotate it if none does."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)       # somebody may clear the logs
        # Only for root: events.log lies in a directory that everybody may pass, and names users and their commands.
        with open(self.path, "ab", buffering=0, opener=functools.partial(os.open, mode=0o600)) as file:
            size = file.tell()
            ends = itertools.accumulate(map(len, lines), initial=size)
            count = sum(end <= 8 * MIB for end in ends) - 1     # so a function keeps at most twice as much
            if size and count < 1:
                self.path.replace(self._previous)
                return
            data = b"".join(lines[:max(count, 1)])
            del lines[:max(count, 1)]               # first: what cannot be written now is not tried again and again
            try:
                write_all(file.fileno(), memoryview(data))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)       # no half line, to which the next would be added
                raise

    def end(self, remove: bool = False) -> None:
        """End followers; lines that are still on their way are dropped.

        The writer's thread wakes them: it may hold the lock for as long as a disk hangs. It removes the files before it
        writes anything of a function that gets the name anew.
        """
        self._ended, self._to_remove = True, remove or self._to_remove      # in this order: nothing is written then
        self._writer.add((self, b""))

    def read(self, tail: int | None, since: str, choose: Callable[[Iterable[bytes]], Iterable[bytes]] = iter
             ) -> tuple[list[bytes], BinaryIO | None]:
        """Return the last `tail` lines (None: all) since a time that choose yields; the file, if any, for follow()."""
        lines: collections.deque[bytes] = collections.deque(maxlen=tail)
        with contextlib.suppress(FileNotFoundError), self._previous.open("rb") as previous:
            lines.extend(line for line in choose(previous) if line >= since.encode())
        file = self._open()
        if file:
            lines.extend(line for line in choose(file) if line >= since.encode())
        return list(lines), file

    def follow(self, file: BinaryIO | None) -> Iterator[bytes]:
        """Yield what is appended to file and its successors, whole lines; b"" now and then when there is nothing."""
        try:
            while True:
                with self._grown:       # taken to write, so nothing is written unnoticed between read and wait
                    moved = self._moved(file)
                    data = file.read() if file else b""
                    if not data and not moved:
                        if self._ended:
                            return
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
        with contextlib.suppress(FileNotFoundError):
            return self.path.open("rb")
        return None

    def _moved(self, file: BinaryIO | None) -> bool:
        """Return whether the log is another file by now than the one being read: rotated, or begun."""
        with contextlib.suppress(FileNotFoundError):
            current = os.stat(self.path)
            return file is None or not os.path.samestat(current, os.fstat(file.fileno()))
        return False


class Events(FunctionLog):
    """STATE_DIR/events.log: `TIME FUNCTION > event key=value …` for whatever becomes of functions."""

    def add(self, function: str, event: str, **values: str) -> None:
        """Add an event. Without by= it is what REQUESTER does."""
        values.setdefault("by", REQUESTER.get())
        self.write(function, ">", " ".join([event, *(f"{key}={plain(value)}" for key, value in values.items())]))


# Who asked for what a task does, for the event that is written at its end.
REQUESTER = contextvars.ContextVar("requester", default="faasd")


def plain(value: str) -> str:
    return value if re.fullmatch(r"[\w.:@+\[\]-]+", value, re.ASCII) else quote(value, MAX_MESSAGE)


def parse_fields(text: str) -> dict[str, str]:
    """Return the fields key=value of a line; control characters in them stay escaped."""
    return {key: re.sub(r'\\(["\\])', r"\1", value[1:-1]) if value.startswith('"') else value
            for key, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', text)}       # as `quote` writes them


def split_line(line: bytes) -> tuple[str, str, str, str]:
    """Return time, second column, mark and text of a line. A power failure may have left one that is none."""
    text = line.decode("utf-8", "backslashreplace").rstrip("\n")
    match = re.fullmatch(r"(\S+) (\S+) ([|>]) (.*)", text, re.DOTALL)
    return match.groups() if match else ("", "-", "|", text)


def log_document(function: str, line: bytes) -> dict:
    """Return a line of a function's log for programs: output has text, an invocation its fields, a change an event."""
    moment, container, mark, text = split_line(line)
    document = {"time": moment, "function": function, "container": None if container == "-" else container}
    if mark == "|":
        return {**document, "text": text}
    fields = parse_fields(text)
    if "outcome" not in fields:
        return {**document, "event": text}

    def number(key: str, kind: Callable = int) -> float | None:
        value = fields.get(key, "").removesuffix("ms")
        return kind(value) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value) else None
    queue, start, run = (number(key, lambda text: round(float(text) / 1000, 4)) for key in ("wait", "start", "run"))
    return {**document, "outcome": fields["outcome"], "status": number("status"), "queue": queue, "start": start,
            "run": run, "received": number("received"), "sent": number("sent"), "exit": number("exit"),
            "peer": fields.get("client"), "request": fields.get("request"), "reason": fields.get("reason")}


def event_document(line: bytes) -> dict:
    """Return a line of the events for programs."""
    moment, function, _, text = split_line(line)
    fields = {key: int(value) if key == "version" and value.isdecimal() else value
              for key, value in parse_fields(text).items()}
    return {"time": moment, "function": function, "event": text.partition(" ")[0], **fields}


class Failures:
    """Chooses the invocations that `errors` counts from a function's log, each after what its container printed."""

    def __init__(self) -> None:
        self._printed: collections.OrderedDict[str, collections.deque[bytes]] = collections.OrderedDict()

    def __call__(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            _, container, mark, text = split_line(line)
            if mark == "|":
                self._printed.setdefault(container, collections.deque(maxlen=TAIL_LINES)).append(line)
                if len(self._printed) > 128:            # invocations that have not ended yet
                    self._printed.popitem(last=False)
            elif text.startswith("outcome="):
                printed, fields = self._printed.pop(container, ()), parse_fields(text)
                if fields["outcome"] != "answered" or fields.get("exit", "-") not in ("-", "0"):
                    yield from printed
                    yield line

    @staticmethod
    def last(lines: list[bytes], count: int) -> list[bytes]:
        """Return the last invocations of chosen lines, each with what its container printed."""
        ends = [0, *(place for place, line in enumerate(lines, 1) if split_line(line)[2] == ">")]
        return lines[ends[-count - 1]:] if count < len(ends) else lines


BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)   # seconds


class Histogram:
    """Durations: counted by upper bound since the start, the last ones kept exactly."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0                          # seconds
        self._recent: collections.deque[float] = collections.deque(maxlen=1000)

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds
        self._recent.append(seconds)

    def percentiles(self) -> dict[str, float] | None:
        """Return p50, p95 and p99 of the last samples in seconds, None if there are none."""
        ordered = sorted(self._recent)
        return {f"p{n}": round(ordered[len(ordered) * n // 100], 6) for n in (50, 95, 99)} if ordered else None

    def expose(self, name: str, labels: str = "") -> Iterator[str]:
        """Yield the samples in Prometheus' text format; labels are such as `function="a"`."""
        comma = "," if labels else ""
        for bound, total in zip([*map(repr, BUCKETS), "+Inf"], itertools.accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self.sum:.9g}"
        yield f"{name}_count{braces} {sum(self.counts)}"


OUTCOMES = ("answered", "closed", "no-answer", "out-of-memory", "timeout", "start-failed", "queue-full",
            "queue-timeout", "abandoned", "stopped")


class Statistics:
    """What is counted of a function's invocations since the daemon started."""

    def __init__(self) -> None:
        self.requests = 0                       # connections that asked for something
        self.errors = 0                         # of these: no answer of the handler's, or a bad exit
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.durations = {"queue": Histogram(), "start": Histogram(), "run": Histogram(), "total": Histogram()}

    def record(self, invocation: Invocation, durations: dict[str, float]) -> None:
        self.outcomes[invocation.outcome] += 1
        if invocation.outcome != "answered" or invocation.exit_status:
            self.errors += 1
        for name, seconds in durations.items():
            self.durations[name].add(seconds)


class LoopLag:
    """How late the loop runs timers. The one that shows it is set by clients alone: an idle daemon does not wake up."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.histogram = Histogram()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def probe(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(0.1, self._measure)

    def _measure(self) -> None:
        self.histogram.add(max(0.0, self._loop.time() - self._timer.when()))
        self._timer = None


def metric_header(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}.", f"# TYPE {name} {kind}"


def process_metrics() -> Iterator[str]:
    """Yield the process metrics that every Prometheus client exports."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    started = (time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
               + int(start_time(os.getpid())) / os.sysconf("SC_CLK_TCK"))
    for name, kind, value, text in (
            ("process_cpu_seconds_total", "counter", time.process_time(), "CPU time used"),
            ("process_resident_memory_bytes", "gauge", resident, "Resident memory"),
            ("process_open_fds", "gauge", len(os.listdir("/proc/self/fd")) - 1, "Open file descriptors"),
            ("process_start_time_seconds", "gauge", started, "Start time since the epoch")):
        yield from metric_header(name, kind, text)
        yield f"{name} {value}"


def function_metrics(functions: list[Function]) -> Iterator[str]:
    """Yield the metrics of each function; a function's name needs no escapes."""
    yield from metric_header("faasd_invocations_total", "counter", "Connections that asked for something, by outcome")
    for function in functions:
        for outcome, count in function.statistics.outcomes.items():
            yield f'faasd_invocations_total{{function="{function.record.name}",outcome="{outcome}"}} {count}'
    for key, text in (("queue", "Time from accept until a container was at hand"),
                      ("start", "Time from spawning a container until its handler was ready"),
                      ("run", "Time from hand-over until the handler let go")):
        yield from metric_header(f"faasd_{key}_seconds", "histogram", text)
        for function in functions:
            yield from function.statistics.durations[key].expose(f"faasd_{key}_seconds",
                                                                 f'function="{function.record.name}"')
    for key, name, text in (("warm", "faasd_warm_containers", "Containers that wait for a client"),
                            ("starting", "faasd_starting_containers", "Containers being started"),
                            ("running", "faasd_running_invocations", "Invocations that have not fully ended"),
                            ("queued", "faasd_queued_connections", "Connections that wait for a container"),
                            ("ready", "faasd_function_ready", "0 if a function is broken, failing or being removed")):
        yield from metric_header(name, "gauge", text)
        for function in functions:
            values = {**function.counts(), "ready": int(function.state["state"] == "ready")}
            yield f'{name}{{function="{function.record.name}"}} {values[key]}'


PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class LogFormatter(logging.Formatter):
    """`TIME LEVEL message` with control characters escaped, or a JSON object a line.

    For systemd's journal a line begins with `<PRIORITY>` (sd-daemon(3)), which it takes off, and it knows the time.
    """

    def __init__(self, as_json: bool, for_journal: bool = False):
        super().__init__("%(message)s")
        self._as_json, self._for_journal = as_json, for_journal

    def format(self, record: logging.LogRecord) -> str:
        message, level = super().format(record), record.levelname.lower()
        priority = f"<{PRIORITIES[record.levelno]}>" if self._for_journal else ""
        if self._as_json:
            return priority + json.dumps({"time": timestamp(), "level": level, "message": message})
        head = priority or f"{timestamp()} {level} "
        return "\n".join(head + escape_controls(line) for line in message.split("\n"))


MAX_UNWRITTEN_MESSAGES = 10_000     # of our own log, on their way to stderr


class StderrHandler(logging.Handler):
    """Writes to stderr in a thread of its own, and says how much was lost while nobody read it."""

    def __init__(self, as_json: bool):
        super().__init__()
        status = os.fstat(2)            # systemd.exec(5)
        self._for_journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        self.setFormatter(LogFormatter(as_json, self._for_journal))
        self.writer = Writer(self._write, MAX_UNWRITTEN_MESSAGES)

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.add(self.format(record))

    def refuse(self, error: Exception) -> None:
        """Say why we do not start, or go on no more, as a command line program does."""
        self.writer.add(f"{'<3>' if self._for_journal else ''}faasd: {error}")

    def _write(self, lines: list[str], dropped: int) -> None:
        if dropped:
            text = f"{dropped} lines of this log were dropped: nobody has read it"
            lines.append(self.format(log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)))
        with contextlib.suppress(OSError):      # nobody reads it any more
            write_all(2, memoryview("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")))

    def flush(self) -> None:
        """Called by logging when the process ends."""
        with contextlib.suppress(TimeoutError):
            self.writer.flushed().result(FLUSH_SECONDS)


# ---------------------------------------------------------------------------------------------------------------------
# Images: which layers and which config an archive has. Runs in the unpacking child
# ---------------------------------------------------------------------------------------------------------------------

CUT_SHORT = "the archive is cut short: did the command before the pipe fail?"
COPY_CHUNK = 256 * KIB              # bytes read or written at a time


class ByteStream:
    """Bytes that come in pieces, read once and forward; a piece may change once the next one is asked for."""

    def __init__(self, pieces: Generator[bytes], cut_short: str = CUT_SHORT):
        """cut_short is what an ImageError says where data should be and is not."""
        self._pieces = pieces
        self._cut_short = cut_short
        self._rest = memoryview(b"")    # of the last piece
        self.position = 0               # bytes that have been taken

    def take(self, count: int) -> memoryview:
        """Return between 1 and count bytes without copying them; none at the end."""
        while not self._rest and (data := next(self._pieces, None)) is not None:
            self._rest = memoryview(data)
        taken, self._rest = self._rest[:count], self._rest[count:]
        self.position += len(taken)
        return taken

    def take_all(self, count: int) -> Iterator[memoryview]:
        """Yield the next count bytes in pieces. Raises ImageError if there are fewer."""
        while count:
            piece = self.take(count)
            if not piece:
                raise ImageError(self._cut_short)
            count -= len(piece)
            yield piece

    def read(self, count: int) -> bytes:
        """Return count bytes, fewer only at the end."""
        parts = [bytes(self.take(count))]
        while parts[-1] and (count := count - len(parts[-1])):
            parts.append(bytes(self.take(count)))
        return b"".join(parts)

    def drain(self) -> None:
        while self.take(COPY_CHUNK):
            continue

    def close(self) -> None:
        """End what the pieces come from."""
        self._pieces.close()


# The header of a file, a link or a directory in ustar or GNU format whose numbers are octal, and that has no prefix.
PLAIN_HEADER = re.compile(rb"(.{100})([0-7]{7})[\0 ]([0-7]{7})[\0 ]([0-7]{7})[\0 ]([0-7]{11})[\0 ]([0-7]{11})[\0 ]"
                          rb"([0-7]{6})\0 ([0125])(.{100})ustar(?:\x0000|  \0).{80}\0.{166}", re.DOTALL)


def parse_plain_header(block: bytes) -> TarInfo | None:
    """Parse what nearly all entries have, in a quarter of tarfile's time; None for all other headers."""
    match = PLAIN_HEADER.fullmatch(block)
    if not match:
        return None
    name, mode, uid, gid, size, mtime, checksum, kind, target = match.groups()
    # The lower half of Adler-32 is one more than the sum of all bytes, modulo 65521 (RFC 1950), and far cheaper.
    total = zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xffff
    if total != (int(checksum, 8) + 1) % 65521:
        return None
    path = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    entry = TarInfo(path.rstrip("/") if kind == tarfile.DIRTYPE else path)
    entry.type, entry.size, entry.mode, entry.mtime = kind, int(size, 8), int(mode, 8), int(mtime, 8)
    entry.uid, entry.gid = int(uid, 8), int(gid, 8)
    entry.linkname = target.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return entry


MAX_RECORD_SIZE = MIB               # all headers of one tar entry: PAX records, long names, sparse maps


class TarReader:
    """Iterates over the entries of a tar stream, taking tarfile as a parser and nothing else.

    TarFile itself stops silently at a damaged header, keeps every entry in memory, and loops for ever on a negative
    size (CVE-2025-8194). So the iteration is ours, and TarInfo's fromtarfile, which parses one entry with all its
    extension headers, is shown this object in the place of a TarFile. Everything it reads comes through read(), which
    bounds what the headers of one entry may cost whatever the parser is talked into (rules E.4, E.5).
    """

    encoding, errors = "utf-8", "surrogateescape"       # so that any bytes in a name survive (rule C.5)

    def __init__(self, stream: ByteStream, image: Budget, no_tar: str = ""):
        """no_tar is what to say if not even the first header is one."""
        self.fileobj, self._no_tar = self, no_tar
        self.offset = 0                 # of the next header; set by the parser
        self.ended = False              # saw the end-of-archive marker, rather than the end of the data
        self._stream, self._image = stream, image
        self._budget = 0                # bytes that the headers of this entry may still have
        self._block = b""               # a header that was read and is to be read again by the parser

    @property
    def pax_headers(self) -> dict[str, str]:
        return {}                       # a new one each time: global PAX headers are ignored (rule C.4)

    def read(self, count: int) -> bytes:
        if self._block:
            block, self._block = self._block, b""
            return block
        if count < 0:
            raise ImageError("bad tar header: negative size")
        if count > self._budget:
            raise FaasdError(f"a tar entry's headers are over {MAX_RECORD_SIZE} bytes (MAX_RECORD_SIZE)", status=413)
        self._budget -= count
        data = self._stream.read(count)
        numbers = re.findall(rb"[0-9]+", data)          # each record and each hole has one, which takes time to parse
        # Until Python 3.12.6 the parser's time is quadratic in the length of a run of digits (CVE-2024-6232), and each
        # record's name goes on to the next "=", be it over thousands of other records.
        slow = 4 * sum(len(number) ** 2 for number in numbers)
        slow += len(re.findall(rb"[0-9] ", data)) * max(map(len, data.split(b"=")))
        self._image.spend_numbers(len(numbers) + count // BYTES_PER_NUMBER + slow // KIB)
        return data

    def tell(self) -> int:
        return self._stream.position

    def __iter__(self) -> Iterator[TarInfo]:
        while True:
            for _ in self._stream.take_all(max(self.offset - self._stream.position, 0)):
                continue
            block = self._stream.read(tarfile.BLOCKSIZE)
            if entry := parse_plain_header(block):
                blocks = 1 + (-(-entry.size // tarfile.BLOCKSIZE) if entry.type == tarfile.REGTYPE else 0)
                self.offset += blocks * tarfile.BLOCKSIZE
            elif (entry := self._parse_header(block)) is None:
                return
            yield entry

    def _parse_header(self, block: bytes) -> TarInfo | None:
        """Parse whatever headers the next entry has, whose first block has been read already; None at the end."""
        self._block, self._budget = block, MAX_RECORD_SIZE
        at = self.offset
        try:
            entry = TarInfo.fromtarfile(self)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError) as end:
            self.ended = isinstance(end, tarfile.EOFHeaderError)
            return None
        except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
            wrong = ("the tar stream is cut short in the middle of a header"
                     if isinstance(error, tarfile.TruncatedHeaderError) else f"bad tar header at byte {at}: {error}")
            raise ImageError(not at and self._no_tar or wrong) from None
        if entry.size < 0 or self.offset < self.tell():     # either would lead back, and round for ever
            raise ImageError(f"bad tar header at byte {at}: negative size")
        return entry


MAX_ARCHIVE_MEMBERS = 100_000       # members of the outer archive
MAX_LAYERS = 1000                   # of an image: docker makes 127 at most, and an empty one may cost a process
MAX_JSON_SIZE = 4 * MIB             # one manifest, index or config; the OCI distribution spec asks for 4 MiB
SEGMENT = 64 * MIB                  # bytes of an archive in one file
WINDOW = MIB                        # … and of such a file in our memory
MAX_LINK_HOPS = 40                  # symbolic links followed for one path, as the kernel does (path_resolution(7))


class Archive:
    """The members of an image archive by name, copied from a stream to files as they are.

    Which of them are layers, and in which order they apply, is not known before manifest.json or index.json has come,
    which are usually last. Nothing is unpacked that these do not name.
    A file that was read for the last time is closed: what is written next gets its memory and its place on the disk.
    A hole in a single file would give these back too, but only after a wait for the disk (XFS, btrfs, older ext4).
    """

    def __init__(self, stream: ByteStream, directory: Path, files: contextlib.ExitStack, budget: Budget):
        """Our files are made in directory, and closed with files. Raises FaasdError, OSError."""
        self._directory, self._files = directory, files
        self._segments: list[BinaryIO] = []     # SEGMENT bytes each, the last one fewer
        self._size = 0                  # bytes of all of them
        self._members: dict[str, tuple[int, int]] = {}      # name → offset in the segments, size
        self._links: dict[str, str] = {}        # docker before 25 writes repeated layers as symbolic links (F.1)
        self.top: set[str] = set()              # first components, to recognise what is not an image
        reader = TarReader(stream, budget, "this is not an image archive: make one with `docker save` or `faas pack`")
        for count, entry in enumerate(reader, 1):
            if count > MAX_ARCHIVE_MEMBERS:
                raise FaasdError(f"the archive has over {MAX_ARCHIVE_MEMBERS} members (MAX_ARCHIVE_MEMBERS)",
                                 status=413)
            name = self._normalise(entry.name)
            self.top.add(name.split("/")[0])
            if entry.isreg() and entry.sparse is None:
                self._members[name] = self._size, entry.size
                for piece in stream.take_all(entry.size):
                    self._append(piece)
            elif entry.issym() or entry.islnk():
                base = posixpath.dirname(name) if entry.issym() else ""
                self._links[name] = self._normalise(posixpath.join(base, entry.linkname))
        if not self.top:
            raise ImageError("the archive is empty: did the command before the pipe fail?")
        if not reader.ended:
            raise ImageError(CUT_SHORT)
        stream.drain()

    def _append(self, data: memoryview) -> None:
        while data:
            at = self._size % SEGMENT
            if at == 0:
                file = self._files.enter_context((self._directory / "archive").open("x+b", buffering=0))
                os.unlink(file.name)
                self._segments.append(file)
            written = os.write(self._segments[-1].fileno(), data[:SEGMENT - at])
            self._size += written
            data = data[written:]

    @staticmethod
    def _normalise(name: str) -> str:
        return posixpath.normpath(name).lstrip("/")

    def find(self, name: str) -> tuple[int, int] | None:
        """Return where the member of that name is, following links among them; None if there is none."""
        name = self._normalise(name)
        for _ in range(MAX_LINK_HOPS):
            if name in self._members or name not in self._links:
                return self._members.get(name)
            name = self._links[name]
        raise ImageError(f"the archive's member {name!r} is a link to itself")

    def read(self, name: str, forget: bool = False) -> Iterator[memoryview]:
        """Yield a member in pieces. Raises ImageError if there is none. With forget, it may not be read again."""
        place = self.find(name)
        if place is None:
            raise ImageError(f"the archive lacks {name!r}")
        at, end = place[0], sum(place)
        while at < end:
            segment, offset = self._segments[at // SEGMENT], at % SEGMENT
            count = min(end - at, WINDOW, SEGMENT - offset)
            begin = offset % mmap.ALLOCATIONGRANULARITY
            # The file's own pages spare a copy. It stays, without a name, for as long as anybody has the last of them.
            yield memoryview(mmap.mmap(segment.fileno(), begin + count, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE,
                                       prot=mmap.PROT_READ, offset=offset - begin))[begin:]
            at += count
            if forget and at % SEGMENT == 0 and at - SEGMENT >= place[0]:       # else another member is in it too
                segment.close()

    def read_document(self, name: str) -> bytes:
        """Return the bytes of a small member, checked against the digest in its name where it has one (E.2)."""
        _, size = self.find(name) or (0, 0)
        if size > MAX_JSON_SIZE:
            raise FaasdError(f"{name!r} has {size} bytes, over {MAX_JSON_SIZE} (MAX_JSON_SIZE)", status=413)
        data = b"".join(self.read(name))
        match = re.search(r"(?:^|/)([0-9a-f]{64})(?:\.json)?$", name)
        if match and hashlib.sha256(data).hexdigest() != match[1]:
            raise ImageError(f"{name!r} is damaged: its content does not match its digest")
        return data


class Layer(NamedTuple):
    """One layer to apply: which member, and what its bytes must hash to."""
    member: str
    diff_id: str                    # sha256 hex of the uncompressed tar
    blob_digest: str | None         # sha256 hex of the member as it is, where the format names it


class Image(NamedTuple):
    """What was chosen from an archive."""
    digest: str                     # sha256 hex of the config: the same for every archive format
    tag: str
    raw: bytes                      # the config as it came
    config: dict
    layers: list[Layer]


class Candidate(NamedTuple):
    """One image that the archive offers."""
    tags: tuple[str, ...]
    config: str                     # member name
    layers: tuple[str, ...]         # member names


def parse_json(data: bytes, kind: type, what: str):
    """Return a JSON document of that type, else raise ImageError."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(document, kind):
        raise ImageError(f"{what} is not a JSON {'list' if kind is list else 'object'}")
    return document


def json_field(document: dict, key: str, kind: type, what: str):
    """Return document[key], or an empty kind() where it is null or absent (G.1); ImageError if it is another type."""
    value = document.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ImageError(f"{what}: {key!r} is not a {kind.__name__}")
    return value


def json_strings(document: dict, key: str, what: str) -> list[str]:
    """Return document[key] as a list of strings that a process can be given."""
    values = json_field(document, key, list, what)
    if not all(isinstance(value, str) for value in values):
        raise ImageError(f"{what}: {key!r} is not a list of strings")
    for value in values:
        encode_text(value, f"{what}: {key!r}")
    return values


def check_objects(values: list, what: str) -> list[dict]:
    """Return a list of a JSON document. Raises ImageError unless all in it are objects."""
    if not all(isinstance(value, dict) for value in values):
        raise ImageError(f"{what} is not an object")
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


DIGEST_PATTERN = re.compile(r"sha256:([0-9a-f]{64})")


def blob_name(descriptor: dict) -> str:
    """Return the member that holds a descriptor's content (OCI image-layout.md)."""
    match = DIGEST_PATTERN.fullmatch(json_field(descriptor, "digest", str, "a descriptor"))
    if not match:
        raise ImageError("a descriptor's digest is not sha256:…; other algorithms are not supported")
    return f"blobs/sha256/{match[1]}"


def docker_candidates(archive: Archive) -> list[Candidate]:
    """Return the images of a docker-archive's manifest.json."""
    what = "manifest.json"
    entries = check_objects(parse_json(archive.read_document(what), list, what), f"{what}: an entry")
    return [Candidate(tuple(json_strings(entry, "RepoTags", what)), json_field(entry, "Config", str, what),
                      tuple(json_strings(entry, "Layers", what))) for entry in entries]


MAX_INDEX_DEPTH = 4                 # OCI indexes inside indexes


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
            annotations = json_field(descriptor, "annotations", dict, "a descriptor")
            tags = tuple(annotations[key] for key in ("io.containerd.image.name", "org.opencontainers.image.ref.name")
                         if isinstance(annotations.get(key), str))
            found += [candidate._replace(tags=tags) for candidate in self._resolve(blob_name(descriptor), 1)]
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
            layers = check_objects(json_field(document, "layers", list, member), f"{member}: a layer")
            found = [Candidate(tags=(), config=blob_name(json_field(document, "config", dict, member)),
                               layers=tuple(map(blob_name, layers)))]
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
        descriptors = json_field(self._document(member), "manifests", list, member)
        for descriptor in check_objects(descriptors, f"{member}: an entry"):
            platform_ = json_field(descriptor, "platform", dict, "a descriptor")
            name = f"{platform_.get('os')}/{platform_.get('architecture')}"
            # Without a platform the config will tell; unknown/unknown are attestations (docker buildx).
            if not platform_ or name == f"linux/{self._architecture}":
                yield descriptor
            elif name != "unknown/unknown":
                self._others.append(name)


def choose_candidate(candidates: list[Candidate], tag: str) -> Candidate:
    """Return the one image meant, else raise an ImageError that lists the choice (F.3).

    `app` fits `app:latest` and `localhost/app:latest`.
    """
    def list_tags(some: list[Candidate]) -> str:
        return ", ".join(sorted({name for c in some for name in c.tags or (posixpath.basename(c.config)[:12],)}))

    if not candidates:
        raise ImageError("the archive holds no image")
    fitting = [c for c in candidates if not tag or any(f"/{name}".endswith((f"/{tag}", f"/{tag}:latest"))
                                                       for name in c.tags)]
    if not fitting:
        raise ImageError(f"no image is tagged {tag!r}: the archive has {list_tags(candidates)}")
    if len({(c.config, c.layers) for c in fitting}) > 1:
        raise ImageError(f"the archive holds several images, choose one with --tag: {list_tags(fitting)}")
    return fitting[0]


ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386",
                 "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}      # uname -m → GOARCH


def host_architecture() -> str:
    """Return this machine's architecture in the words of image configs (GOARCH)."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


MAX_NAME_LENGTH = 255               # bytes of one component (NAME_MAX)
MAX_TAG_LENGTH = 512                # characters; a registry's host, a name of 255 and a tag of 128 (OCI distribution)


def choose_image(archive: Archive, tag: str) -> Image:
    """Return the image to unpack from an archive: docker-archive first, then OCI layout (rules F)."""
    architecture, what = host_architecture(), "the image config"
    if archive.find("manifest.json"):
        candidates = docker_candidates(archive)
    elif archive.find("index.json"):
        candidates = OciIndex(archive, architecture).candidates()
    elif len(archive.top & {"bin", "etc", "usr", "lib", "var", "dev", "proc"}) >= 3:
        raise ImageError("this is a bare file system, not an image: use `docker save`, not `docker export`")
    else:
        raise ImageError("this tar holds no image: neither manifest.json nor index.json; use `docker save`")
    chosen = choose_candidate(candidates, tag)
    data = archive.read_document(chosen.config)
    config = parse_json(data, dict, what)
    system = json_field(config, "os", str, what) or "linux"
    machine = json_field(config, "architecture", str, what) or architecture
    if (system, machine) != ("linux", architecture):
        raise ImageError(f"the image is for {system}/{machine}; this machine is linux/{architecture}")
    tag = tag or (chosen.tags[0] if chosen.tags else "")
    if len(tag) > MAX_TAG_LENGTH:
        raise ImageError(f"the image's tag is over {MAX_TAG_LENGTH} characters: {tag[:MAX_NAME_LENGTH]}…")
    return Image(hashlib.sha256(data).hexdigest(), tag, data, config, pair_layers(chosen, config))


def pair_layers(chosen: Candidate, config: dict) -> list[Layer]:
    """Return the layers with the digests that the config promises for them (E.3)."""
    if len(chosen.layers) > MAX_LAYERS:
        raise FaasdError(f"the image has over {MAX_LAYERS} layers (MAX_LAYERS)", status=413)
    diff_ids = json_strings(json_field(config, "rootfs", dict, "the image config"), "diff_ids", "the image config")
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
# Images: layers, decompressed, verified, applied. Runs in the unpacking child
# ---------------------------------------------------------------------------------------------------------------------

# How compressed streams begin (RFC 1952, 8878). A zstd stream may begin with frames that are to be skipped.
GZIP_MAGIC = re.compile(rb"\x1f\x8b")
ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
ZSTD_BEGINNINGS = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
OTHER_MAGIC = re.compile(rb"(?P<xz>\xfd7zXZ\0)|(?P<bzip2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|(?P<lzip>LZIP\x01)|"
                         rb"(?P<lz4>[\x02\x04][\x21\x22][\x4c\x4d]\x18)|(?P<lzma>\x5d\0\0(?:[^\0]\0|\0[^\0]))")
MAGIC_SIZE = 16                         # bytes in which all of these are
PADDING = re.compile(rb"\0*")


def decompress(pieces: Iterator[bytes], budget: Budget, refusal: str) -> Iterator[bytes]:
    """Yield what comes in pieces, decompressed if it begins like gzip or zstd: names and media types lie (E.1).

    refusal says that it has a compression {name} which no image format has. Raises ImageError.
    """
    head = b""
    while len(head) < MAGIC_SIZE and (data := next(pieces, b"")):
        head += data
    del data                            # which keeps a file of the archive
    if match := OTHER_MAGIC.match(head):
        raise ImageError(refusal.format(name=match.lastgroup))
    whole = itertools.chain([head], pieces)
    if GZIP_MAGIC.match(head):
        yield from decompress_frames(whole, "gzip", lambda: zlib.decompressobj(wbits=31), zlib.error, budget)
    elif not ZSTD_MAGIC.match(head):
        yield from whole
    else:
        try:
            from compression import zstd
        except ImportError:                 # before Python 3.14
            yield from unzstd_by_program(whole, budget)
        else:
            yield from decompress_frames(whole, "zstd", zstd.ZstdDecompressor, zstd.ZstdError, budget)


FIRST_CHUNK = 2 * KIB               # bytes of a compressed frame that are looked at first


def decompress_frames(compressed: Iterator[bytes], what: str, begin: Callable, failure: type[Exception],
                      budget: Budget) -> Iterator[bytes]:
    """Decompress any number of gzip members or zstd frames, in pieces of bounded size (E.1).

    gzip.GzipFile does not count the members, and copies what follows an empty one for each of millions.
    """
    frame, size = None, 0
    for data in compressed:
        at = 0
        while True:
            if frame is None:
                if what == "gzip":      # gzip(1) ignores padding between members too
                    at = PADDING.match(data, at).end()
                if at == len(data):
                    break
                budget.spend_frame()
                frame, size = begin(), FIRST_CHUNK
            hungry = getattr(frame, "needs_input", True)        # zstd keeps what it was given, zlib returns it
            given = memoryview(data)[at:at + size] if hungry else b""
            if hungry and not given:
                break
            try:
                piece = frame.decompress(given, COPY_CHUNK)
            except failure as error:
                raise ImageError(f"{what} data in the archive is damaged: {error}") from None
            if piece:
                yield piece
            at += len(given) - len(frame.unused_data if frame.eof else getattr(frame, "unconsumed_tail", b""))
            # What a frame leaves over is copied, so a short one is given little.
            frame, size = None if frame.eof else frame, min(2 * size, COPY_CHUNK)
    if frame is not None:
        raise ImageError(f"{what} data in the archive is cut short")


def unzstd_by_program(compressed: Iterator[bytes], budget: Budget) -> Iterator[bytes]:
    """Decompress zstd with the `zstd` program, fed by a thread, which counts frames by what all of them begin with."""
    if not (program := shutil.which("zstd")):
        raise ImageError("a layer is compressed with zstd and this machine has no zstd program: "
                         "install it (apt install zstd), or save the image with gzip layers")

    def feed(pipe) -> None:
        with pipe:
            for data in map(bytes, compressed):
                budget.spend_frame(sum(map(data.count, ZSTD_BEGINNINGS)))
                pipe.write(data)

    with subprocess.Popen([program, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as child, concurrent.futures.ThreadPoolExecutor(1) as feeder:
        fed = feeder.submit(feed, child.stdin)
        try:
            while data := child.stdout.read(COPY_CHUNK):
                yield data
        except BaseException:
            child.kill()
            raise
    if isinstance(fed.exception(), FaasdError):         # the data ends
        raise fed.exception()
    if child.returncode != 0 or fed.exception():        # zstd went away, or says so
        raise ImageError("zstd data in the archive is damaged, is cut short, or was made with --long over 27")


FREE_STEPS = 100_000                # components of paths that an image may have us look at, and …
STEPS_PER_ENTRY = 128               # … so many more for each entry
STEPS_PER_DIRECTORY = 16            # a directory that an entry only implies counts as so many of them
FREE_NUMBERS = 1_000_000            # in PAX records, sparse maps and the like of an image, and STEPS_PER_ENTRY more …
BYTES_PER_NUMBER = 64               # … for each entry; so many bytes count as one number
FREE_DIRECTORIES = 1000             # that entries only imply, besides --max-image-entries files in all
FRAMES_PER_ENTRY = 2                # gzip members or zstd frames, for each of --max-image-entries; estargz has as many


class Budget:
    """What one image may still use (E.4)."""

    def __init__(self, max_size: int, max_entries: int):
        self._max_size, self._max_entries = max_size, max_entries
        self.bytes: collections.Counter[str] = collections.Counter()    # of what
        self.entries = 0
        self._directories = 0           # that no entry names
        self._frames = 0                # gzip members and zstd frames
        self._numbers = 0               # in headers of more than one block
        self._steps = 0                 # components of paths that were looked at, and what costs as much

    def spend_bytes(self, of: str, count: int) -> None:
        """Raise FaasdError for more bytes than there may be of an archive, of its layers or of their files."""
        self.bytes[of] += count
        if self.bytes[of] > self._max_size:
            raise FaasdError(f"the unpacked image is over {self._max_size} bytes (--max-image-size)", status=413)

    def spend_entry(self, count: int = 1) -> None:
        self.entries += count
        if max(self.entries, self.entries + self._directories - FREE_DIRECTORIES) > self._max_entries:
            raise FaasdError(f"the image has over {self._max_entries} files (--max-image-entries)", status=413)

    def spend_directory(self) -> None:
        """Count a directory that an entry only implies: a disk may run out of inodes before it is full."""
        self._directories += 1
        self.spend_steps(STEPS_PER_DIRECTORY)
        self.spend_entry(0)

    def spend_frame(self, count: int = 1) -> None:
        self._frames += count
        if self._frames > FRAMES_PER_ENTRY * self._max_entries:
            raise FaasdError(f"the image is compressed in over {FRAMES_PER_ENTRY * self._max_entries} pieces "
                             "(FRAMES_PER_ENTRY × --max-image-entries)", status=413)

    def spend_numbers(self, count: int) -> None:
        self._numbers += count
        if self._numbers > FREE_NUMBERS + STEPS_PER_ENTRY * self.entries:
            raise FaasdError("the image's tar headers hold too much (FREE_NUMBERS)", status=413)

    def spend_steps(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > FREE_STEPS + STEPS_PER_ENTRY * self.entries:
            raise FaasdError("the image's paths lead through too many links and directories (STEPS_PER_ENTRY)",
                             status=413)


HASH_AHEAD = 4                      # of these chunks may wait for the thread that hashes them


class Sha256Thread:
    """SHA-256 in a thread of its own: it lets go of the GIL, and unpacking takes a sixth longer without it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._updates: collections.deque[concurrent.futures.Future] = collections.deque()

    def update(self, data: bytes) -> None:
        self._updates.append(self._thread.submit(self._hash.update, data))
        if len(self._updates) > HASH_AHEAD:
            self._updates.popleft().result()

    def hexdigest(self) -> str:
        """Return the digest; no update may come after it."""
        self._thread.shutdown()
        return self._hash.hexdigest()


class LayerStream(ByteStream):
    """The uncompressed bytes of one layer, hashed on both sides of the decompression."""

    def __init__(self, layer: Layer, pieces: Iterator[bytes], budget: Budget):
        self._layer = layer
        self._budget = budget
        self._diff_hash = self._blob_hash = Sha256Thread()
        super().__init__(self._uncompressed(pieces), "a layer is cut short in the middle of a file")

    def _compressed(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for number, data in enumerate(pieces):
            if number == 0 and self._layer.blob_digest and (GZIP_MAGIC.match(data) or ZSTD_MAGIC.match(data)):
                self._blob_hash = Sha256Thread()        # else both are one
            if self._blob_hash is not self._diff_hash:
                self._blob_hash.update(data)
            self._budget.spend_bytes("compressed layers", len(data))       # once for each time one is listed
            yield data

    def _uncompressed(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        refusal = "a layer is compressed with {name}, which no image format has: save it again with gzip or zstd"
        for data in decompress(self._compressed(pieces), self._budget, refusal):
            self._diff_hash.update(data)
            self._budget.spend_bytes("layers", len(data))
            yield data

    def verify(self) -> None:
        """Read to the end, and compare the digests with those that the layer should have. Raises ImageError (E.2)."""
        self.drain()
        layer = self._layer
        if layer.blob_digest and self._blob_hash.hexdigest() != layer.blob_digest:
            raise ImageError(f"layer {layer.member} is damaged: its content does not match its digest")
        if self._diff_hash.hexdigest() != layer.diff_id:
            raise ImageError(f"layer {layer.member} is damaged: its content does not match diff_id "
                             f"sha256:{layer.diff_id[:12]}…")

    def close(self) -> None:
        """End the decompression, the program that does it, and the hashing."""
        super().close()
        self._diff_hash.hexdigest()
        self._blob_hash.hexdigest()


# Errors that are not the image's.
HOST_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def unpack_error(path: bytes, error: OSError) -> FaasdError:
    """Return what to raise for a path that the kernel refused to make."""
    if error.errno in HOST_FAULTS:
        return storage_error(error, "unpacking the image")
    return ImageError(f"cannot unpack {show(path)}: {error.strerror}")


MAX_PATH_DEPTH = 256                # directories above an entry; keeps recursive removal far from its limits


class Rootfs:
    """A directory as the root of an image: paths in it are resolved as if chrooted, links and all (rules A).

    Paths are bytes, start with a slash and have no trailing one; the root itself is b"". Nobody else writes here (it
    lies below a 0700 directory), so what was looked at cannot change before it is used.
    """

    def __init__(self, path: str | Path, first_id: int, budget: Budget):
        """first_id is the host id that the image's root is: everything that is made belongs to it unless said."""
        self.path = os.fsencode(path)
        self.first_id = first_id
        self._budget = budget
        self._resolved: dict[bytes, bytes] = {}         # directory as named → as it really is
        self.followed: list[bytes] = []                 # links on the way to what was found last
        self.added: set[bytes] = set()                  # what no entry asked for

    def host(self, path: bytes) -> bytes:
        """Return the host's name of a resolved path."""
        return self.path + path

    def new_file(self, path: bytes) -> int:
        """Open a file for writing that only root can read, in the place of whatever is at a resolved path."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.host(path), flags, 0o600)
        except FileExistsError:
            self.remove(path)
            return os.open(self.host(path), flags, 0o600)

    def make_directory(self, path: bytes) -> bytes:
        """Return the real path of a directory, made 0755 root:root with its parents where it is missing (A.6)."""
        if path not in self._resolved:
            self._resolved[path] = self._walk(path, self._imply_directory)
        return self._resolved[path]

    def _imply_directory(self, path: bytes) -> None:
        self._budget.spend_directory()
        self.place_directory(path)
        self.added.add(path)

    def trace_directory(self, path: bytes, what: str) -> bytes:
        """Return the real path that a directory has or would have. Raises ImageError for a file, as Docker does."""
        def check(here: bytes) -> None:
            if self.kind(here):
                raise ImageError(f"{what}: {show(here)} of the image is not a directory")
        return self._walk(path, check)

    def trace_path(self, path: bytes) -> bytes:
        """Return the real path that anything has or would have. Raises NotADirectoryError for a path below a file."""
        return self._walk(path, lambda here: None)

    def find_directory(self, path: bytes) -> bytes:
        """Return the real path of a directory. Raises NotADirectoryError if the path does not lead to one."""
        def refuse(here: bytes) -> None:
            raise NotADirectoryError(here)
        return self._walk(path, refuse)

    def _walk(self, path: bytes, repair: Callable[[bytes], None]) -> bytes:
        """Follow path from the root; repair is called where something else than a directory is in the way."""
        real, hops, self.followed = b"", 0, []
        ahead = path.split(b"/")[::-1]
        while ahead:
            name = ahead.pop()
            self._budget.spend_steps()          # for "." and "" too: a link may have thousands of them
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
                self.followed.append(here)
                target = os.readlink(self.host(here))
                if target.startswith(b"/"):
                    real = b""
                ahead += target.split(b"/")[::-1]
                continue
            if kind != stat.S_IFDIR:
                repair(here)
            real = here
            if real.count(b"/") > MAX_PATH_DEPTH:       # links may lead deeper than the name shows
                raise ImageError(f"a path in the image is over {MAX_PATH_DEPTH} directories deep (MAX_PATH_DEPTH)")
        return real

    def is_directory(self, path: bytes) -> bool:
        """Return whether a path that was once resolved still is: no component of it has become a link since."""
        real = b""
        for name in path.split(b"/")[1:]:               # from the top: never look below a link
            real += b"/" + name
            self._budget.spend_steps()
            if self.kind(real) != stat.S_IFDIR:
                return False
        return True

    def kind(self, path: bytes) -> int:
        """Return the file type (S_IFMT) of the last component itself, 0 if there is none."""
        try:
            return stat.S_IFMT(os.lstat(self.host(path)).st_mode)
        except FileNotFoundError:
            return 0

    def place_directory(self, path: bytes) -> None:
        """Put a new directory, 0755 root:root, in the place of whatever is there."""
        self.remove(path)
        os.mkdir(self.host(path))
        os.chown(self.host(path), self.first_id, self.first_id)
        os.chmod(self.host(path), 0o755)                # whatever the umask is

    def remove(self, path: bytes) -> None:
        """Remove whatever is there, with all below it and without following a link; nothing there is fine."""
        kind = self.kind(path)
        if kind in (stat.S_IFDIR, stat.S_IFLNK):
            self._resolved.clear()
        if kind == stat.S_IFDIR:
            shutil.rmtree(self.host(path))
        elif kind:
            os.unlink(self.host(path))

    def read_file(self, path: bytes, limit: int) -> bytes:
        """Return the content of a small regular file, b"" if there is none; never follows a final link (G.3)."""
        directory, _, name = path.rpartition(b"/")
        try:
            real = self.find_directory(directory) + b"/" + name
            end = self.trace_path(real)
        except (NotADirectoryError, ImageError):        # ImageError: its links go round in circles
            return b""
        if end.startswith(b"/dev/") and end != b"/dev/null":
            raise ImageError(f"{show(path)} of the image leads to {show(end)}, which the runtime would read for it")
        if self.kind(real) != stat.S_IFREG:
            return b""
        with open(self.host(real), "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise FaasdError(f"{show(path)} of the image is over {limit} bytes (MAX_ACCOUNTS_SIZE)", status=413)
        return data

    def write_file(self, path: bytes, data: bytes) -> None:
        """Put a plain 0644 file at path, in the place of whatever is there."""
        directory, _, name = path.rpartition(b"/")
        real = self.make_directory(directory) + b"/" + name
        self.added.add(real)
        with open(self.new_file(real), "wb") as file:
            file.write(data)
            os.fchown(file.fileno(), self.first_id, self.first_id)
            os.fchmod(file.fileno(), 0o644)


XATTR_RECORD = "SCHILY.xattr."           # + name: how PAX headers carry extended attributes
SELINUX_XATTR = "security.selinux"      # labels are the host's affair
OVERLAY_XATTRS = "trusted.overlay."     # how their names begin: overlayfs would do in a container's root what they say
EARLIEST_TIME, LATEST_TIME = -1 << 31, (1 << 34) - 1    # what ext4 can hold, in seconds since 1970
ACL_XATTRS = ("system.posix_acl_access", "system.posix_acl_default")
ACL_VERSION, ACL_NO_ID = 2, 0xFFFF_FFFF                 # linux/posix_acl_xattr.h; and linux/posix_acl.h:
ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def shift_acl(value: bytes, shift: Callable[[int], int]) -> bytes:
    """Return a POSIX access list (struct posix_acl_xattr) with shifted ids. Raises ValueError for any other data."""
    if value[:4] != struct.pack("<I", ACL_VERSION) or len(value) % 8 != 4:
        raise ValueError("its access list is malformed")
    return value[:4] + b"".join(
        struct.pack("<HHI", tag, permissions, shift(number) if tag in (ACL_USER, ACL_GROUP) else number)
        for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]))


NOBODY = 65_534                     # the id for files of users from IDS on (user_namespaces(7))


def host_id(number: int, first_id: int) -> int:
    """Return the host's id for an image's: containers have none from IDS on."""
    return first_id + (number if number < IDS else NOBODY)


class Losses:
    """What of the image containers will not have, counted for one line of warning of each kind."""

    def __init__(self) -> None:
        self._found: dict[str, list] = {}       # text, with {count} → how often, and the name of the first
        self.pipes: set[bytes] = set()          # where one was left out

    def note(self, text: str, name: str) -> None:
        self._found.setdefault(text, [0, name])[0] += 1

    def lines(self) -> list[str]:
        return [f"{text.format(count=count)} (first: {show(os.fsencode(name))})"
                for text, (count, name) in self._found.items()]


LARGE_FILE = MIB                    # bytes; files from this size on go to the disk at once
SYNC_FILE_RANGE_WRITE = 2           # sync_file_range(2)


class LayerApplier:
    """Applies one layer's entries to a rootfs (rules A to D)."""

    def __init__(self, stream: LayerStream, rootfs: Rootfs, budget: Budget, losses: Losses):
        self._stream, self._rootfs = stream, rootfs
        self._budget, self._losses = budget, losses
        self._own: set[bytes] = set()                   # paths of this layer and their parents: no whiteout hides them
        self._directory_times: dict[bytes, int] = {}    # set at the end, when nothing writes into them any more

    def apply(self) -> None:
        """Apply all entries. Raises FaasdError."""
        for entry in TarReader(self._stream, self._budget):
            self._budget.spend_entry()
            name = entry.name.encode("utf-8", "surrogateescape")
            try:
                self._apply_entry(entry, self._clean(entry, name))
            except OSError as error:
                raise unpack_error(name, error) from None
            except (OverflowError, ValueError) as error:        # a number that no system call takes
                raise ImageError(f"cannot unpack {show(name)}: {error}") from None
        for path, mtime in self._directory_times.items():
            # A parent may have become a link to the host meanwhile, and utime would follow it there.
            if self._rootfs.is_directory(path):
                os.utime(self._rootfs.host(path), ns=(mtime, mtime))

    @staticmethod
    def _clean(entry: TarInfo, name: bytes) -> bytes:
        """Return an entry's path, clamped to the root and checked (A.1, A.5)."""
        if b"\0" in name or (not name and not entry.isdir()):
            raise ImageError("a layer's entry has an empty name or one with a NUL byte")
        path = b"/" + name.strip(b"/")
        if b"//" in path or b"/." in path:              # otherwise it is normal already, and most are
            path = posixpath.normpath(path)
        path = path.rstrip(b"/")
        if path.count(b"/") > MAX_PATH_DEPTH + 1:
            raise ImageError(f"a path in the image is over {MAX_PATH_DEPTH} directories deep (MAX_PATH_DEPTH)")
        if len(path) > MAX_NAME_LENGTH and any(len(component) > MAX_NAME_LENGTH for component in path.split(b"/")):
            raise ImageError(f"a name in the image is over {MAX_NAME_LENGTH} bytes: {show(name)}")
        return path

    def _apply_entry(self, entry: TarInfo, path: bytes) -> None:
        directory, _, name = path.rpartition(b"/")
        if b"/.wh." in path:
            self._apply_whiteout(directory, name, path)
            return
        if not path and not entry.isdir():
            raise ImageError("the image's root is not a directory (CVE-2021-29136)")
        real = self._rootfs.make_directory(directory) + b"/" + name if path else b""
        if entry.isreg():
            self._create_file(entry, real)
        elif entry.islnk():
            self._create_hardlink(entry, real)
        elif entry.isdir():
            self._apply_directory(entry, real)
        else:
            self._create_special(entry, real)
        while real not in self._own:
            self._own.add(real)
            real = real.rpartition(b"/")[0]

    # -- whiteouts --

    def _apply_whiteout(self, directory: bytes, name: bytes, path: bytes) -> None:
        if path.startswith(b"/.wh..wh.") and path != b"/.wh..wh..opq":
            return                                      # bookkeeping of aufs at the root (B.4)
        if b"/.wh." in directory:
            raise ImageError(f"{show(path)}: a whiteout cannot be a directory")
        hidden = name.removeprefix(b".wh.")
        opaque = hidden == b".wh..opq"
        if not opaque and (hidden in (b"", b".", b"..") or hidden.startswith(b".wh.")):
            raise ImageError(f"bad whiteout {show(directory)}/.wh.{show(hidden)}")
        try:
            real = self._rootfs.find_directory(directory)
        except NotADirectoryError:
            return
        target = real if opaque else real + b"/" + hidden
        if opaque or target in self._own:               # same layer has it too: only what lies below is hidden (B.2)
            self._hide_lower_children(target)
        else:
            self._rootfs.remove(target)

    def _hide_lower_children(self, path: bytes) -> None:
        if self._rootfs.kind(path) != stat.S_IFDIR:
            return
        for name in os.listdir(self._rootfs.host(path)):
            self._budget.spend_steps()                  # as often as a layer says that it is opaque
            child = path + b"/" + name
            if child in self._own:
                self._hide_lower_children(child)
            else:
                self._rootfs.remove(child)

    # -- objects --

    def _apply_directory(self, entry: TarInfo, path: bytes) -> None:
        """Make a directory, or take over a lower layer's with its content, but not its metadata (C.1, D.3)."""
        host = self._rootfs.host(path)
        if self._rootfs.kind(path) != stat.S_IFDIR:
            self._rootfs.place_directory(path)
        for name in os.listxattr(host, follow_symlinks=False):
            if name != SELINUX_XATTR:                   # the host's own label
                os.removexattr(host, name, follow_symlinks=False)
        self._set_metadata(host, entry)
        self._directory_times[path] = modification_time(entry)

    def _create_special(self, entry: TarInfo, path: bytes) -> None:
        host = self._rootfs.host(path)
        self._rootfs.remove(path)
        if entry.isfifo():              # all containers of the function would share it: a way from one to the other
            self._leave_out_pipe(path)
            return
        if entry.issym():
            os.symlink(entry.linkname.encode("utf-8", "surrogateescape"), host)     # verbatim (A.3)
        elif entry.ischr() or entry.isblk():
            kind = stat.S_IFCHR if entry.ischr() else stat.S_IFBLK
            os.mknod(host, kind | 0o600, os.makedev(entry.devmajor, entry.devminor))
        else:
            raise ImageError(f"{show(path)} is of the unknown tar type {entry.type!r}")
        self._set_metadata(host, entry)

    def _leave_out_pipe(self, path: bytes) -> None:
        self._losses.pipes.add(path)
        self._losses.note("{count} named pipes are left out: containers of a function would share them",
                          os.fsdecode(path))

    def _create_hardlink(self, entry: TarInfo, path: bytes) -> None:
        """Link to a file of this or a lower layer; the entry's own metadata counts for nothing (C.3)."""
        target = posixpath.normpath(b"/" + entry.linkname.encode("utf-8", "surrogateescape").lstrip(b"/"))
        directory, _, name = target.rpartition(b"/")
        kind = stat.S_IFDIR if not name else 0          # the root itself
        with contextlib.suppress(NotADirectoryError):
            real = self._rootfs.find_directory(directory) + b"/" + name
            kind = self._rootfs.kind(real)
            if kind == 0 and real in self._losses.pipes:
                self._rootfs.remove(path)
                self._leave_out_pipe(path)
                return
        if kind in (0, stat.S_IFDIR):
            raise ImageError(f"hard link {show(path)} points to {show(target)}, "
                             f"which {'is a directory' if kind else 'does not exist'}")
        if real == path or real.startswith(path + b"/"):
            raise ImageError(f"hard link {show(path)} points to itself")
        self._rootfs.remove(path)
        os.link(self._rootfs.host(real), self._rootfs.host(path), follow_symlinks=False)

    def _create_file(self, entry: TarInfo, path: bytes) -> None:
        """Make a new file; holes stay holes. What is there is removed, not written through (C.1, C.2)."""
        self._budget.spend_bytes("files", entry.size)
        file = self._rootfs.new_file(path)
        try:
            for offset, count in [(0, entry.size)] if entry.sparse is None else entry.sparse:
                if offset < 0 or count < 0 or offset + count > entry.size:
                    raise ImageError(f"{entry.name!r} has a bad sparse map")
                if entry.sparse is not None:
                    os.lseek(file, offset, os.SEEK_SET)
                for piece in self._stream.take_all(count):
                    write_all(file, piece)
            if entry.sparse is not None:
                os.truncate(file, entry.size)
            if entry.size >= LARGE_FILE:
                # The disk can begin with it: in the end, a deploy waits for the disk. For small files it is no gain.
                libc.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)
            self._set_metadata(file, entry)
        finally:
            os.close(file)

    # -- metadata --

    def _set_metadata(self, host: bytes | int, entry: TarInfo) -> None:
        """Set owner, extended attributes, mode and time, in this order (D.1), of a path or, faster, an open file."""
        follow = isinstance(host, int)      # what Python insists on for descriptors, though there is nothing to follow
        os.chown(host, *self._owner(entry), follow_symlinks=follow)         # clears setuid and capabilities
        self._set_xattrs(host, follow, entry)
        if not entry.issym():
            os.chmod(host, entry.mode & 0o7777)
        mtime = modification_time(entry)
        os.utime(host, ns=(mtime, mtime), follow_symlinks=follow)

    def _owner(self, entry: TarInfo) -> tuple[int, int]:
        """Return the host ids of an entry's owner: the image's, moved into the function's range."""
        if min(entry.uid, entry.gid) < 0:
            raise ImageError(f"{entry.name!r} has a bad owner {entry.uid}:{entry.gid}")
        if max(entry.uid, entry.gid) >= IDS:
            self._losses.note(f"{{count}} files are of users or groups from {IDS} on, which containers do not have, "
                              f"and now of {NOBODY}", entry.name)
        return host_id(entry.uid, self._rootfs.first_id), host_id(entry.gid, self._rootfs.first_id)

    def _set_xattrs(self, host: bytes | int, follow: bool, entry: TarInfo) -> None:
        for key, value in entry.pax_headers.items():
            name = key.removeprefix(XATTR_RECORD)
            if name in (key, SELINUX_XATTR) or name.startswith(OVERLAY_XATTRS):
                continue
            if name.startswith("user.") and not (entry.isreg() or entry.isdir()):
                continue                                # xattr(7): only files and directories carry them
            data = value.encode("utf-8", "surrogateescape")
            if name in ACL_XATTRS:
                data = shift_acl(data, lambda number: host_id(number, self._rootfs.first_id))
            if name == "security.capability" and not data:     # which the kernel takes, and lets nobody read
                raise ValueError("its capabilities are empty")
            try:
                os.setxattr(host, name, data, follow_symlinks=follow)
            except OSError as error:
                if error.errno == errno.ENOSPC and os.statvfs(self._rootfs.path).f_bavail > len(value):
                    raise ImageError(f"cannot unpack {entry.name}: extended attribute {name} is too large for this "
                                     "machine's file system") from None     # ENOSPC says that too (setxattr(2))
                if error.errno != errno.ENOTSUP:
                    raise
                self._losses.note("{count} extended attributes are lost: the state directory's file system has none "
                                  "of the kind", entry.name)


def modification_time(entry: TarInfo) -> int:
    """Return an entry's mtime in nanoseconds, exact where a PAX record has it, within what a file system can hold."""
    seconds = entry.mtime
    if text := entry.pax_headers.get("mtime"):
        exact = decimal.Context(traps=[]).create_decimal(text)      # NaN for what is no number
        seconds = exact if exact.is_finite() else 0
    return int(min(max(seconds, EARLIEST_TIME), LATEST_TIME) * 1_000_000_000)


# ---------------------------------------------------------------------------------------------------------------------
# Images: what they say about the process to run; the child itself
# ---------------------------------------------------------------------------------------------------------------------


class Account(NamedTuple):
    """The user and groups that a process runs as."""
    uid: int
    gid: int
    groups: list[int]
    home: str


def is_id(text: str) -> bool:
    return re.fullmatch("[0-9]{1,10}", text) is not None and int(text) < IDS


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
        raise ImageError(f"the image's {what} {text[:12]} is too large: containers have the ids 0 to {IDS - 1}")
    return int(text)


def find_account(lines: Iterator[list[str]], text: str, what: str, file: str) -> tuple[int, list[str] | None]:
    """Return the id that a name or number stands for, and its line if it has one. Raises ImageError."""
    number = parse_id(text, what)
    line = next((line for line in lines if (line[0] == text if number is None else int(line[2]) == number)), None)
    if number is None and line is None:
        raise ImageError(f"the image's {what} {text!r} is not in its {file}, or has an id from {IDS} on")
    return int(line[2]) if line else number, line


def resolve_user(user: str, passwd: bytes, group: bytes) -> Account:
    """Return the account that an image's User means (G.3).

    user is "", "name", "uid", "name:group", "uid:gid" or mixed; passwd and group are the image's own files. An explicit
    group brings no supplementary groups, as in Docker. Raises ImageError for a name that is in neither file.
    """
    name, _, group_name = user.partition(":")
    uid, account = find_account(account_lines(passwd, 6), name or "0", "user", "/etc/passwd")
    home = (account[5] if account else "") or "/"
    if group_name:
        gid, _ = find_account(account_lines(group, 3), group_name, "group", "/etc/group")
        return Account(uid, gid, [], home)
    if account is None:
        return Account(uid, 0, [], home)
    own = parse_id(account[3], "group") or 0
    members = [int(line[2]) for line in account_lines(group, 4) if account[0] in line[3].split(",")]
    return Account(uid, own, sorted(set(members) - {own}), home)


MAX_PATH_LENGTH = 3072              # bytes of a path in an image config: PATH_MAX less what the rootfs is below


def config_path(text: str, what: str) -> bytes:
    """Return a path of an image config, normalised, without a slash at its end: b"" is the root. Raises ImageError."""
    path = encode_text(text, what)
    if not path.startswith(b"/"):
        raise ImageError(f"{what} {text!r} is not an absolute path")
    path = b"/" + posixpath.normpath(path).lstrip(b"/")
    if len(path) > MAX_PATH_LENGTH or any(len(component) > MAX_NAME_LENGTH for component in path.split(b"/")):
        raise ImageError(f"{what} is too long")
    return path.rstrip(b"/")


RESERVED_TARGETS = ("/dev", "/proc", "/sys", CONTROL_SOCKET)       # mounted in every container


def check_working_directory(rootfs: Rootfs, text: str, what: str) -> str:
    """Return the real path of a directory for a process to start in, which need not be there (G.2).

    So the runtime follows no link of the image. Raises ImageError.
    """
    path = config_path(text or "/", what)
    real = rootfs.trace_directory(path, what)
    seen = map(os.fsdecode, (path, real, *rootfs.followed))     # as it is written, where links lead, and by which
    for directory, target in itertools.product(seen, RESERVED_TARGETS):
        if is_within(directory, target):
            raise ImageError(f"{what} {text!r} lies in {target}, where a container has other things than the image "
                             "(CVE-2024-21626)")
    return encode_text(os.fsdecode(real), f"what {what} {text!r} leads to").decode() or "/"


SECRETS_DIRECTORY = "/run/secrets"


def place_volumes(rootfs: Rootfs, volumes: list[Volume], process: dict) -> list[Volume]:
    """Return volumes with the real paths where they go in an image. Raises ImageError.

    Nobody may mount, make or enter anything below a volume on the way to a start: containers that have it can exchange
    what is there for a link at any time (CVE-2021-30465, CVE-2024-21626).
    """
    reserved = (*RESERVED_TARGETS, SECRETS_DIRECTORY, process["resolv_conf"])
    placed: list[Volume] = []
    for volume in volumes:
        what = f"the volume {volume.path}"
        path = config_path(volume.path, what)
        try:
            real = rootfs.trace_path(path)
        except NotADirectoryError:
            raise ImageError(f"{what}: something on the way is a file of the image") from None
        if target := in_the_way((path, real, *rootfs.followed), reserved):
            raise ImageError(f"{what} and {target} are in each other's way: choose another path")
        if in_the_way((real,), [other.path for other in placed]):
            raise ImageError(f"{what} lies in another volume, or another in it: mount the directory above both")
        if process["cwd"] != os.fsdecode(real) and is_within(process["cwd"], os.fsdecode(real)):
            raise ImageError(f"the working directory {process['cwd']} lies in {what}, where containers could replace "
                             "it: choose the volume itself with --workdir")
        placed.append(replace(volume, path=os.fsdecode(real)))
    return placed


def place_secrets(rootfs: Rootfs, values: dict[str, bytes], process: dict) -> dict[str, bytes]:
    """Return secrets by their real paths in an image, where nothing else is mounted. Raises ImageError."""
    if not values:
        return {}
    real = rootfs.trace_directory(SECRETS_DIRECTORY.encode(), "the secrets")
    targets = *RESERVED_TARGETS, process["resolv_conf"], *(volume.path for volume in process["volumes"])
    if target := in_the_way((real, *rootfs.followed), targets):
        raise ImageError(f"the image links {SECRETS_DIRECTORY} to {os.fsdecode(real) or '/'}, which is in the way of "
                         f"each container's own {target}: change the link or the volume, or use no secrets")
    return {f"{os.fsdecode(real)}/{name}": value for name, value in values.items()}


def in_the_way(seen: Iterable[bytes], targets: Iterable[str]) -> str:
    """Return the first target that a path seen is, lies in or holds; "" if none does."""
    return next((target for path in map(os.fsdecode, seen) for target in targets
                 if is_within(target, path) or is_within(path, target)), "")


def is_within(path: str, directory: str) -> bool:
    """Return whether a normalised path is a directory or lies in it."""
    return f"{path}/".startswith(f"{directory.rstrip('/')}/")


MAX_ACCOUNTS_SIZE = MIB             # /etc/passwd and /etc/group of an image
MAX_IMAGE_VOLUMES = 64              # of an image with --read-only: each is a mount of each container's


def prepare_mount_targets(rootfs: Rootfs) -> str:
    """Put real directories and plain files where every container gets a mount; return the real path of resolv.conf.

    An image with a symbolic link there made runc touch the host (CVE-2026-41579, rule H.1), and a target that runc
    has to make itself is written into a rootfs that other containers share.
    """
    for target in (b"/dev", b"/proc", b"/sys", b"/tmp"):
        if rootfs.kind(target) != stat.S_IFDIR:
            rootfs.place_directory(target)
            rootfs.added.add(target)
    os.chmod(rootfs.host(b"/tmp"), 0o1777)      # for images from scratch
    for path in (CONTROL_SOCKET, "/etc/hosts", "/etc/hostname"):            # every container has its own of these
        rootfs.write_file(os.fsencode(path), b"")
    resolv_conf = rootfs.make_directory(b"/etc") + b"/resolv.conf"          # a function without a network keeps it
    if rootfs.kind(resolv_conf) != stat.S_IFREG:
        rootfs.write_file(resolv_conf, b"")
    return os.fsdecode(resolv_conf)


def find_user(rootfs: Rootfs, user: str) -> Account:
    return resolve_user(user, *(rootfs.read_file(path, MAX_ACCOUNTS_SIZE) for path in (b"/etc/passwd", b"/etc/group")))


def choose_process(process: dict, options: Options, rootfs: Rootfs) -> dict:
    """Return an image's process with what a user chose in the place of its own, as docker run does.

    Nothing is made in the rootfs, on which containers may be running: the runtime makes a working directory that is
    missing. Raises ImageError, OSError.
    """
    chosen: dict = {}
    if options.read_only and len(process.get("image_volumes", ())) > MAX_IMAGE_VOLUMES:
        raise ImageError(f"leave out --read-only: the image has over {MAX_IMAGE_VOLUMES} volumes (MAX_IMAGE_VOLUMES)")
    if options.entrypoint != "auto":
        chosen.update(entrypoint=list(filter(None, [options.entrypoint])), cmd=[])
    if options.workdir:
        chosen["cwd"] = check_working_directory(rootfs, options.workdir, "the workdir")
    chosen["volumes"] = place_volumes(rootfs, volumes_of(options.volume), {**process, **chosen})
    if options.user:
        account = find_user(rootfs, options.user)
        chosen.update(uid=account.uid, gid=account.gid, groups=account.groups)
        if not process.get("has_home", True):           # True: as an older faasd unpacked it
            chosen["env"] = merge_env(process["env"], [f"HOME={account.home}"])
    return {**process, **chosen}


def resolve_process(config: dict, rootfs: Rootfs) -> dict:
    """Return what an image config says about its process, with users and volumes looked up in the rootfs (rules G)."""
    what = "the image config"
    settings = json_field(config, "config", dict, what)
    account = find_user(rootfs, json_field(settings, "User", str, what))
    cwd = check_working_directory(rootfs, json_field(settings, "WorkingDir", str, what), "the image's WorkingDir")
    rootfs.make_directory(cwd.encode())
    env = [entry for entry in json_strings(settings, "Env", what) if entry.find("=") > 0]      # runc refuses others
    named = {entry.partition("=")[0] for entry in env}      # of these HOME stays, whoever its user is
    env += [f"{key}={value}" for key, value in (("PATH", DEFAULT_PATH), ("HOME", account.home)) if key not in named]
    volumes = sorted({rootfs.trace_directory(config_path(f"/{text}", "the image's volume"), "the image's volume")
                      for text in json_field(settings, "Volumes", dict, what)})
    for path in volumes:                # which it may write as it may all of its root (G.4)
        rootfs.make_directory(path)
    labels = json_field(settings, "Labels", dict, what)
    if not all(isinstance(value, str) for value in labels.values()):
        raise ImageError(f"{what} has a label that is no text")
    return {
        "entrypoint": json_strings(settings, "Entrypoint", what), "cmd": json_strings(settings, "Cmd", what),
        "env": env, "has_home": "HOME" in named, "cwd": cwd, "uid": account.uid, "gid": account.gid,
        "groups": account.groups, "labels": labels, "stop_signal": json_field(settings, "StopSignal", str, what),
        "exposed_ports": sorted(json_field(settings, "ExposedPorts", dict, what)),
        "image_volumes": [os.fsdecode(path) for path in volumes if not in_the_way([path], RESERVED_TARGETS)],
    }


MAX_BODY_SECONDS = 600.0            # between bytes of an archive: `docker save` may take its time before a pipe


def receive(descriptor: int) -> Iterator[memoryview]:
    """Yield what comes on a client's connection, which does not block; its end is one too early. Raises FaasdError."""
    buffer = memoryview(bytearray(COPY_CHUNK))          # one for all: memory that is new costs more than the copy
    while is_readable(descriptor, MAX_BODY_SECONDS):
        try:
            count = os.readv(descriptor, [buffer])
        except ConnectionError:
            count = 0
        if not count:
            raise BadRequest("the upload was cut short")
        yield buffer[:count]
    raise FaasdError(f"no data came for {MAX_BODY_SECONDS:g} s during the upload", status=408)


def request_body(stream: ByteStream, length: str, limit: int) -> Iterator[memoryview]:
    """Yield the body of a request, of a length or "chunked" (RFC 9112, section 7). Raises FaasdError."""
    size = 0
    for count in chunk_sizes(stream) if length == "chunked" else [int(length)]:
        size += count
        if size > limit:
            raise FaasdError(f"the archive is over {limit} bytes (--max-image-size)", status=413)
        yield from stream.take_all(count)


MAX_CHUNK_LINE = KIB                # bytes of the line before a chunk


def chunk_sizes(stream: ByteStream) -> Iterator[int]:
    """Yield how many bytes the next chunk has, to be read before it goes on. Raises BadRequest."""
    broken = BadRequest("the request's chunked encoding is broken")
    size = None
    while size != 0:
        line = b""
        while len(line) < MAX_CHUNK_LINE and not line.endswith(b"\n"):
            line += stream.read(1)
        match = re.fullmatch(rb"([0-9a-fA-F]{1,15})(;[^\r\n]*)?\r?\n", line)
        if not match:
            raise broken
        if size := int(match[1], 16):
            yield size
        # Behind the last one trailers may come. Nobody reads them: the connection ends with its upload.
        if stream.read(2) != b"\r\n" and size:
            raise broken


def read_archive(pieces: Iterator[bytes], budget: Budget) -> Iterator[bytes]:
    """Yield the tar that comes in pieces, which may be compressed: `docker load` takes that too."""
    for data in decompress(pieces, budget, "the archive is compressed with {name}: decompress it first, "
                                           "{name} -dc FILE | faas new NAME, or make one with `docker save IMAGE`"):
        budget.spend_bytes("archive", len(data))
        yield data


MAX_DESCRIPTION = MIB               # bytes of an image.json


def unpack_image(pieces: Iterator[bytes], directory: Path, tag: str, max_size: int, max_entries: int,
                 first_id: int) -> dict:
    """Unpack the image archive that comes in pieces to directory/rootfs; return what directory/image.json then says.

    directory must not exist yet, and nobody but root may be able to reach it. first_id is the host id of the image's
    root. After an error the caller has to remove the directory. Raises FaasdError.
    """
    try:
        rootfs_path = directory / "rootfs"
        for path, mode in (directory, 0o711), (rootfs_path, 0o755):
            path.mkdir()
            path.chmod(mode)
        os.chown(rootfs_path, first_id, first_id)
        budget, losses = Budget(max_size, max_entries), Losses()
        with contextlib.ExitStack() as files:
            with contextlib.closing(ByteStream(read_archive(pieces, budget))) as stream:
                archive = Archive(stream, directory, files, budget)
            image = choose_image(archive, tag)
            rootfs = Rootfs(rootfs_path, first_id, budget)
            ahead = [archive.find(layer.member) for layer in image.layers]      # two names may be one member
            for layer in image.layers:
                pieces = archive.read(layer.member, forget=ahead.pop(0) not in ahead)
                with contextlib.closing(LayerStream(layer, pieces, budget)) as stream:
                    LayerApplier(stream, rootfs, budget, losses).apply()
                    stream.verify()
        try:
            rootfs.added.clear()                # of what its layers have implied
            process = resolve_process(image.config, rootfs)
            process["resolv_conf"] = prepare_mount_targets(rootfs)
            process["image_volumes"] = [path for path in process["image_volumes"]       # in whose place no file is now
                                        if os.path.isdir(f"{rootfs_path}{path}")]
            find_user(rootfs, "")           # again: /dev may have been a link of the image's, and led past the check
        except OSError as error:            # of the target of a link, say, which may be any text
            path = os.fsencode(error.filename or "").removeprefix(rootfs.path)
            raise unpack_error(path, error) from None
        document = {"digest": f"sha256:{image.digest}", "version": image.digest[:12], "tag": image.tag,
                    "first_id": first_id, "size": budget.bytes["files"], "entries": budget.entries, "process": process,
                    "warnings": losses.lines(), "added": sorted(map(os.fsdecode, rootfs.added))}
        text = json.dumps(document, indent=1)
        if len(text) > MAX_DESCRIPTION:         # the daemon reads it at each start
            raise FaasdError(f"the image's config takes {len(text)} bytes, over {MAX_DESCRIPTION} (MAX_DESCRIPTION)",
                             status=413)
        (directory / "image.json").write_text(text)
        (directory / "config.json").write_bytes(image.raw)      # for a save
        return document
    except OSError as error:
        raise storage_error(error, "unpacking the image") from error


PR_SET_PDEATHSIG = 1                    # prctl(2)
GC_THRESHOLD = 100_000              # objects; entries make no reference cycles, and to look for them takes 10 %
CHILD_ADDRESS_SPACE = GIB           # bytes; RLIMIT_AS of such a child, whatever a parser is talked into


# A child of the daemon imports this program, because Python keeps the byte code of what is imported.
CHILD = ("import sys; sys.path.insert(0, sys.argv[2]); import faasd; "
         "getattr(faasd, sys.argv[1] + '_main')(*sys.argv[3:])")


def begin_child(daemon: str) -> None:
    """Make this process the child of a daemon, of that pid, that works on an image."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)        # when the daemon dies: not to work for nobody
    if os.getppid() != int(daemon):     # it has died already
        os._exit(1)
    os.nice(10)                         # invocations come first
    os.umask(0o022)
    gc.set_threshold(GC_THRESHOLD)
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_ADDRESS_SPACE, CHILD_ADDRESS_SPACE))


def end_child(document: dict) -> NoReturn:
    """Tell the daemon how it went, and exit."""
    print(json.dumps(document), flush=True)
    os._exit("error" in document)       # to take the interpreter apart takes 30 ms


def unpack_main(daemon: str, directory: str, tag: str, length: str, *limits: str) -> NoReturn:
    """Be the child of a daemon, of that pid: unpack what comes on standard input, print JSON, exit with status 0 or 1.

    Standard input is the client's connection, behind the head of a request whose body is the archive, of that length
    (see request_body). limits are the largest size and number of entries, and the first id.
    """
    begin_child(daemon)
    try:
        archive = request_body(ByteStream(receive(0)), length, int(limits[0]))
        document = unpack_image(archive, Path(directory), tag, *map(int, limits))
    except FaasdError as error:
        document = {"error": str(error), "status": error.status}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "new thread" not in str(error):
            raise
        document = {"error": "the image's archive needs too much memory to read (CHILD_ADDRESS_SPACE)", "status": 413}
    end_child(document)


# ---------------------------------------------------------------------------------------------------------------------
# Images: back to an archive. Runs in the saving child
# ---------------------------------------------------------------------------------------------------------------------

TAR_TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
             stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE}
TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def to_block(size: int) -> int:
    """Return how many bytes are missing to a whole block of a tar."""
    return -size % tarfile.BLOCKSIZE


def make_header(entry: TarInfo) -> bytes:
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def make_member(name: str, data: bytes) -> bytes:
    entry = TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    return make_header(entry) + data + bytes(to_block(len(data)))


def data_extents(path: bytes, size: int) -> list[tuple[int, int]]:
    """Return offset and length of each part of a file that is not a hole (lseek(2))."""
    extents, end = [], 0
    with opened(path, os.O_RDONLY) as file, contextlib.suppress(OSError):       # ENXIO: only a hole follows
        while end < size:
            start = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, start, os.SEEK_HOLE)
            extents.append((start, end - start))
    return extents


class SavedLayer:
    """The rootfs in the working directory as the tar of one layer, from which LayerApplier makes the same rootfs.

    Sorted, so that the same files give the same bytes. Nobody writes there, but it may be removed at any time.
    """

    def __init__(self, first_id: int, added: set[bytes]):
        """added is what is ours and not the image's."""
        self._first_id, self._added = first_id, added
        self.size = len(TAR_END)
        for header, _, extents in self._entries():      # the archive has to say so before the layer comes
            data = sum(count for _, count in extents)
            self.size += len(header) + data + to_block(data)

    def pieces(self) -> Iterator[bytes]:
        """Yield the tar. Raises OSError."""
        for header, path, extents in self._entries():
            yield header
            if extents:
                with opened(path, os.O_RDONLY) as file:
                    yield from self._read(file, extents)
        yield TAR_END

    @staticmethod
    def _read(file: int, extents: list[tuple[int, int]]) -> Iterator[bytes]:
        for offset, count in extents:
            end = offset + count
            while offset < end:
                data = os.pread(file, min(COPY_CHUNK, end - offset), offset)
                if not data:
                    raise OSError(errno.EIO, "a file of the image became shorter")
                offset += len(data)
                yield data
        yield bytes(to_block(sum(count for _, count in extents)))

    def _entries(self) -> Iterator[tuple[bytes, bytes, list[tuple[int, int]]]]:
        """Yield each entry's header, its path, and which extents of the file follow the header."""
        links: dict[int, str] = {}                      # inode → its first name
        ahead = [b"."]
        while ahead:
            path = ahead.pop()
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                names = sorted(os.listdir(path), reverse=True)
                ahead += names if path == b"." else [path + b"/" + name for name in names]
            if stat.S_IFMT(status.st_mode) not in TAR_TYPES or b"/" + path in self._added:
                continue
            entry = self._describe(path, status)
            if status.st_nlink > 1 and not entry.isdir() and links.setdefault(status.st_ino, entry.name) != entry.name:
                entry.type, entry.size, entry.linkname = tarfile.LNKTYPE, 0, links[status.st_ino]
            extents = [(0, entry.size)] if entry.size else []
            if status.st_blocks * 512 < entry.size:     # whatever the file system's blocks are (stat(2))
                found = data_extents(path, entry.size)
                if found != extents and len(found) < 1000:      # more than that others do not read
                    yield self._sparse_header(entry, found), path, found
                    continue
            yield make_header(entry), path, extents

    def _describe(self, path: bytes, status: os.stat_result) -> TarInfo:
        entry = TarInfo(path.decode("utf-8", "surrogateescape"))
        entry.type, entry.mode = TAR_TYPES[stat.S_IFMT(status.st_mode)], stat.S_IMODE(status.st_mode)
        entry.uid, entry.gid = self._image_id(status.st_uid), self._image_id(status.st_gid)
        entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        entry.mtime = status.st_mtime_ns // 10**9
        if entry.mtime * 10**9 != status.st_mtime_ns:
            entry.pax_headers["mtime"] = f"{decimal.Decimal(status.st_mtime_ns).scaleb(-9):f}"
        if entry.isreg():
            entry.size = status.st_size
        elif entry.issym():
            entry.linkname = os.readlink(path).decode("utf-8", "surrogateescape")
        for name in sorted(os.listxattr(path, follow_symlinks=False)):
            if name != SELINUX_XATTR:
                data = os.getxattr(path, name, follow_symlinks=False)
                data = shift_acl(data, self._image_id) if name in ACL_XATTRS else data
                entry.pax_headers[XATTR_RECORD + name] = data.decode("utf-8", "surrogateescape")
        return entry

    def _image_id(self, number: int) -> int:
        """Return the image's id for a host's. Raises ValueError for one that no container has."""
        if not 0 <= number - self._first_id < IDS:
            raise ValueError(f"a file of the image belongs to the host's id {number}")
        return number - self._first_id

    @staticmethod
    def _sparse_header(entry: TarInfo, extents: list[tuple[int, int]]) -> bytes:
        """Return the header with the map of a sparse file behind it (GNU tar's manual, PAX Format, Version 1.0)."""
        pairs = [*extents, (entry.size, 0)]
        text = b"".join(b"%d\n" % number for number in (len(pairs), *itertools.chain(*pairs)))
        table = text + bytes(to_block(len(text)))
        entry.pax_headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": entry.name,
                              "GNU.sparse.realsize": str(entry.size)}
        entry.name, entry.size = "GNUSparseFile.0/sparse", len(table) + sum(count for _, count in extents)
        return make_header(entry) + table


def saved_settings(settings: dict, options: Options) -> dict:
    """Return an image config's settings with a function's options: in the image's own terms, else as labels."""
    chosen: dict = {}
    if options.entrypoint != "auto":
        chosen.update(Entrypoint=list(filter(None, [options.entrypoint])), Cmd=[])
    if options.env:
        chosen["Env"] = merge_env(settings.get("Env") or [], options.env)
    named = {"Cmd": list(options.cmd), "User": options.user, "WorkingDir": options.workdir}
    chosen |= {key: value for key, value in named.items() if value}
    labels = {key: text for key, text in (settings.get("Labels") or {}).items() if not key.startswith(LABEL)}
    return {**settings, **chosen, "Labels": {**labels, **options.to_labels()}}


def save_image(directory: Path, first_id: int, tag: str, options: Options) -> Iterator[bytes]:
    """Yield a docker-archive of an unpacked image, in one layer, with its options. Raises OSError, ValueError."""
    config = json.loads((directory / "config.json").read_bytes())
    added = json.loads((directory / "image.json").read_bytes()).get("added", [CONTROL_SOCKET])  # older ones have none
    os.chdir(directory / "rootfs")      # names in there may be as long as names can be
    layer, digest = SavedLayer(first_id, set(map(os.fsencode, added))), Sha256Thread()
    head = TarInfo("layer.tar")
    head.size, head.mode = layer.size, 0o644
    yield make_header(head)
    for piece in layer.pieces():
        digest.update(piece)
        yield piece
    data = json.dumps({
        **config, "config": saved_settings(config.get("config") or {}, options),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest.hexdigest()}"]},
        "history": [{"created": config.get("created") or "1970-01-01T00:00:00Z", "created_by": "faas save"}],
    }).encode()
    name = f"{hashlib.sha256(data).hexdigest()}.json"
    yield make_member(name, data)
    yield make_member("manifest.json", json.dumps([
        {"Config": name, "RepoTags": [tag], "Layers": [head.name]}]).encode())
    yield TAR_END


def send_archive(client: socket.socket, pieces: Iterator[bytes]) -> None:
    """Answer with an archive in chunks (RFC 9112, section 7) of a bearable size. Raises OSError."""
    client.settimeout(MAX_WRITE_SECONDS)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\nTransfer-Encoding: chunked\r\n"
                   b"Connection: close\r\n\r\n")
    waiting = bytearray()
    for piece in itertools.chain(pieces, [b""]):
        waiting += piece
        if len(waiting) >= COPY_CHUNK or waiting and not piece:
            client.sendall(b"%x\r\n%s\r\n" % (len(waiting), waiting))
            waiting.clear()
    client.sendall(b"0\r\n\r\n")


def save_main(daemon: str, directory: str, first_id: str, tag: str, options: str) -> NoReturn:
    """Be the child of a daemon, of that pid: answer the client on standard input with an image, print JSON, and exit.

    options is a descriptor: among them are variables, and anyone can read a command line. Where an answer has begun,
    the JSON has no "error", but says why it was "cut": all that is left is to close the connection.
    """
    begin_child(daemon)
    failure = "error"
    try:
        with open(int(options), "rb") as file:
            pieces = save_image(Path(directory), int(first_id), tag, Options.from_json(json.load(file)))
        first = next(pieces)            # by now all files have been looked at
        failure = "cut"
        send_archive(socket.socket(fileno=0), itertools.chain([first], pieces))
        document: dict = {}
    except TimeoutError:
        document = {failure: f"the client did not take a piece within {MAX_WRITE_SECONDS:g} s", "status": 500}
    except FileNotFoundError:
        document = {failure: "its image is gone, or an older faasd has unpacked it: deploy it again", "status": 409}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        document = {failure: f"saving the image: {str(error) or repr(error)}", "status": 500}
    end_child(document)


# ---------------------------------------------------------------------------------------------------------------------
# Control API: http.server on a Unix socket and, if asked for, over TCP; a thread a connection
# ---------------------------------------------------------------------------------------------------------------------

# What http.server lets pass and other programs understand in another way (RFC 9112, sections 3 and 5): other blanks, a
# carriage return within a line, blanks before the colon, continued lines.
REQUEST_LINE = re.compile(rb"[A-Za-z]+ [!-~\x80-\xff]+ HTTP/[1-9]\.[0-9]\r?\n")
HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r?\n")


class Refused(FaasdError):
    """A request that this API does not take, with headers that say how else."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message, status=status)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Cancelled(FaasdError):
    """What a client asked for was given up."""
    status = 503


MAX_CONNECTIONS = 128               # at a time, of each listener; more are closed at once


class ControlServer:
    """A listener of the control API. The daemon's loop accepts, so that nothing here polls.

    This one is on RUN_DIR/faasd.sock. Anyone who can open it has full control: besides root, the user who ran sudo, and
    the group `faas` if there is one. The log records who did.
    """

    def __init__(self, path: Path, answers: Answers):
        self._name = str(path)
        path.unlink(missing_ok=True)    # of a killed daemon; faasd.lock says that none runs
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._name)
        self._watch = -1                # reports files of /etc as they are written or replaced (inotify(7))
        try:                            # first: no change of the group is missed
            self._watch = succeeded(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            succeeded(libc.inotify_add_watch(self._watch, b"/etc", 0x88))       # IN_CLOSE_WRITE, IN_MOVED_TO
        except OSError as error:
            log.warning("users who join the group faas from now on must log in again to use the socket: %s", error)
        self._admitting = threading.Lock()      # of two access lists, the newer must be the one that stays
        self._admit_members()
        self._listen(listener, answers)         # last: nobody can connect to what does not listen yet
        if self._watch >= 0:
            answers.loop.add_reader(self._watch, self._look_at_group)

    def _look_at_group(self) -> None:
        """Let in the present members if /etc/group was replaced. In a thread: a directory service may name them too."""
        if b"group\0" in os.read(self._watch, 64 * KIB):
            threading.Thread(target=self._admit_members, daemon=True).start()

    def _admit_members(self) -> None:
        """Let the user who ran sudo and the group `faas` open the socket: its members by name too.

        A process has the groups that its user had at login. By an access list a new member need not log in anew.
        """
        with self._admitting, contextlib.suppress(FileNotFoundError):       # the daemon has ended meanwhile
            try:
                group = grp.getgrnam("faas")
            except KeyError:
                group = grp.struct_group(("", "", 0, []))
            members = set()
            for name in group.gr_mem:
                with contextlib.suppress(KeyError):     # there is no such user
                    members.add(pwd.getpwnam(name).pw_uid)
            entries = [(ACL_USER_OBJ, 6, ACL_NO_ID), *((ACL_USER, 6, uid) for uid in sorted(members)),
                       (ACL_GROUP_OBJ, 6, ACL_NO_ID), (ACL_MASK, 6, ACL_NO_ID), (ACL_OTHER, 0, ACL_NO_ID)]
            os.chown(self._name, sudo_id("UID"), group.gr_gid)
            try:
                os.setxattr(self._name, ACL_XATTRS[0], struct.pack("<I", ACL_VERSION) + b"".join(
                    struct.pack("<HHI", *entry) for entry in entries))
            except OSError:                     # such as a file system without access lists
                os.chmod(self._name, 0o660)

    def _listen(self, listener: socket.socket, answers: Answers) -> None:
        self.answers, self._listener = answers, listener
        self.connections: set[socket.socket] = set()
        self._time = self._count = 0            # of lines about those who are not admitted
        listener.listen()
        listener.setblocking(False)

    def __str__(self) -> str:
        return self._name

    def note(self, line: str, admitted: bool) -> None:
        """Log what a client did: of those who are not admitted so few lines that they cannot fill a disk."""
        if self._time != (now := int(time.monotonic() / WARNING_SECONDS)):
            self._time, self._count = now, 0
        self._count += not admitted
        if admitted or self._count <= MAX_WARNINGS:
            log.info("control API: %s", line)
        elif self._count == MAX_WARNINGS + 1:
            log.warning("control API: further lines about clients that are not admitted are left out for a second")

    def check(self, headers: http.client.HTTPMessage, connection: socket.socket) -> None:
        """Raise Refused unless the sender of these headers may use the API."""

    def name_client(self, client: str) -> str:
        """Return the name for events of a described client. May block: users can be in a directory service."""
        uid = int(re.search("uid=([0-9]+)", client)[1])
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(uid).pw_name
        return f"uid:{uid}"

    def describe_client(self, connection: socket.socket, address: Any) -> str:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        return "pid={} uid={} gid={}".format(*UCRED.unpack(credentials))

    def open(self) -> None:
        """Accept from now on, unless it is closed already."""
        if self._listener.fileno() >= 0:
            self.answers.loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:        # out of descriptors: trying again at once would spin
            log.error("control API cannot accept: %s", error.strerror)
            self.answers.loop.remove_reader(self._listener)
            self.answers.loop.call_later(ACCEPT_PAUSE, self.open)
            return
        client = self.describe_client(connection, address)
        if len(self.connections) >= MAX_CONNECTIONS:
            self.note(f"{client} turned away: over {MAX_CONNECTIONS} connections", admitted=False)
            connection.close()
            return
        self.connections.add(connection)
        try:
            # A daemon thread: a client that never finishes must not keep us from stopping.
            threading.Thread(target=self._answer, args=(connection, client), daemon=True).start()
        except RuntimeError as error:   # no more threads
            log.error("control API: %s", error)
            self.connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, client: str) -> None:
        """Answer a client, in a thread. What it still sends is dropped, so that a reset cannot destroy our answer."""
        try:
            ControlHandler(connection, client, self)
        except Exception:
            log.exception("control API failed")
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            deadline, room = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
            while (room > 0 and is_readable(connection, deadline - time.monotonic())
                   and (data := connection.recv(COPY_CHUNK))):
                room -= len(data)
        self.connections.discard(connection)
        connection.close()

    def close(self, end: Callable[[socket.socket], None]) -> None:
        """Accept no more. Threads that read from a client meet the end of file, so that they clean up before we go."""
        self.answers.loop.remove_reader(self._listener)
        if self._listener.family == socket.AF_UNIX:
            Path(self._name).unlink(missing_ok=True)
            if self._watch >= 0:
                self.answers.loop.remove_reader(self._watch)
                os.close(self._watch)
        end(self._listener)
        for connection in list(self.connections):
            with contextlib.suppress(OSError):          # the client was faster
                connection.shutdown(socket.SHUT_RD)


class TcpControlServer(ControlServer):
    """Listens on a TCP address. Every request has to bring the token, and to name us as our clients do.

    A page that a browser on this machine shows can make it send requests here: it knows no token. Nor can its server
    give its own name our address to become of one origin with us (DNS rebinding): the Host header still says that name.
    """

    def __init__(self, address: tuple[str, int], token: bytes, names: Iterable[str], answers: Answers,
                 listeners: ListenerStore):
        """listeners keeps the port over a restart: whoever had it in between would be sent the token."""
        self._name = ("http://[{}]:{}" if ":" in address[0] else "http://{}:{}").format(*address)
        self._token, self._names = token, names
        try:                            # of one family alone: clients of IPv4 do not come from ::ffff:127.0.0.1
            listener = listeners.take(*address, lambda: socket.create_server(
                address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET))
        except OSError as error:
            raise UsageError(f"cannot listen on {self}: {os.strerror(error.errno)}; "
                             "choose another --api HOST:PORT") from error
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)          # its connections inherit this
        notice_vanished_clients(listener)               # such as those that follow a log
        self._listen(listener, answers)

    def name_client(self, client: str) -> str:
        return f"token@{client.removeprefix('peer=')}"

    def describe_client(self, connection: socket.socket, address: Any) -> str:
        return "peer=[{}]:{}".format(*address[:2]) if ":" in address[0] else "peer={}:{}".format(*address)

    def check(self, headers: http.client.HTTPMessage, connection: socket.socket) -> None:
        scheme, _, token = ",".join(headers.get_all("Authorization", [])).partition(" ")
        if not hmac.compare_digest(token.strip().encode(), self._token) or scheme.lower() != "bearer":
            raise Refused(401, "this needs `Authorization: Bearer TOKEN`, the token of the daemon's --api-token-file",
                          WWW_Authenticate="Bearer")
        host = ",".join(headers.get_all("Host", []))
        if not self._is_our_name(host, connection.getsockname()[0]):
            raise Refused(421, f"{host!r} in the Host header is no name of this API; --api-host NAME makes it one")

    def _is_our_name(self, host: str, local_end: str) -> bool:
        """Return whether a Host header names this server: by the connection's own address, or as --api-host says.

        The port does not matter: an attacker can choose it, and it may be the near end of an ssh tunnel.
        """
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host.strip().lower())
        if not match:
            return False
        name, own = match[1].strip("[]"), ipaddress.ip_address(local_end.partition("%")[0])
        if name in self._names:
            return True
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address("127.0.0.1" if name == "localhost" else name)
            return address == own or address.is_loopback and own.is_loopback
        return False


MAX_HEADER_SECONDS = 20.0           # from the end of one answer to the end of the next request's headers


class ConnectionReader(io.RawIOBase):
    """Reads from a connection, but no further than to the end of a line: what follows a head is for somebody else."""

    def __init__(self, connection: socket.socket):
        self.deadline: float | None = None      # for all reads together; None: the socket's own timeout, for each
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self.deadline is not None and not is_readable(self._connection, self.deadline - time.monotonic()):
            raise TimeoutError(f"no whole request within {MAX_HEADER_SECONDS:g} s")
        count = self._connection.recv_into(buffer, flags=socket.MSG_PEEK)
        return self._connection.recv_into(buffer, bytes(buffer[:count]).find(b"\n") + 1 or count)


MAX_HEADERS_SIZE = 64 * KIB         # bytes of a request's headers; http.server allows as many for its first line
MAX_HEADERS = 100                   # lines of them; http.server's own limit
MAX_WRITE_SECONDS = 60.0            # for a client to take a piece of its answer
SECRETS_HEADER = "Faasd-Secrets"    # NAME=BASE64,…; an address would show in logs of proxies
ARCHIVE_TYPES = ("application/x-tar", "application/octet-stream")
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")     # CORS-safelisted (Fetch)


FRAMES = "faasd-frames"             # the protocol of a connection on which a command runs, for Upgrade
FRAME = struct.Struct(">BI")        # head of a frame: what it is, and how many bytes follow
STDIN, STDOUT, STDERR, RESIZE, END = range(5)   # data, none ends stdin; lines and columns (">2H"); its end (JSON)
MAX_FRAME = 64 * KIB                # bytes in a frame
DEFAULT_COMMAND = "/bin/sh"
# What runc and crun say of a command that they cannot execute; in colours on a terminal, and crun in JSON too.
COMPLAINT = re.compile(rb"""(?isx) (?:\x1b\[1;31m)? (?:\{\s*"msg":\ ?")? (?:(?!exec:)[a-z\ ]+:\ )*
    ((?:exec|executable\ file|the\ path) [\ :] [^\n]*?) (?:no\ such\ file\ or\ directory|not\ found\ in\ \$PATH|
    permission\ denied|not\ permitted|exec\ format\ error|(?:is|not)\ a\ directory) (?:",.*)? (?:\x1b\[0m)? \s*""")
FAULTS = (                          # what of it means what, and an exit status as in a shell
    (r'\Aexec [^:"]*: no such file', 127, "its interpreter (the #! line), or what loads it, is not in the image"),
    ("exec format error", 126, "it is no program for this machine, and has no #! line"),
    ("permission denied|not executable|is a directory|not a regular", 126, "it is not executable, or is a directory"),
    (r"in \$PATH", 127, "it is not in the image's PATH"), ("", 127, "it is not in the image"))


def command_fault(command: str, said: str) -> tuple[int, str] | None:
    """Return the exit status and a line for a command that the runtime could not run; else None."""
    complaint = COMPLAINT.fullmatch(said.encode())
    name = posixpath.basename(command).encode()     # a shell says much the same of what it executes
    # An image chooses it, and most of what was said: no search may take long, nor hold up the loop.
    end = b"" if len(name) > MAX_NAME_LENGTH else rb'\\?["`:]'
    if not complaint or not re.search(rb'["`/ ]%b%b' % (re.escape(name[:MAX_NAME_LENGTH]), end), complaint[1]):
        return None
    said = said[complaint.start(1):]
    status, words = next(fault for pattern, *fault in FAULTS if re.search(pattern, said, re.IGNORECASE))
    return status, f"cannot run {command!r}: {words}"


LEFT_SECONDS = 1.0                  # between two looks whether a command's client is still there


class Relay(threading.Thread):
    """Carries frames between a command's client and its streams.

    In a thread of its own, for the command can hold the lock of its pipes (OutputReader). Nothing is read that the
    other side has no room for, so a slow side holds up nobody else, and a flood fills nothing. Output begins with
    the client's first frame: until then it may not have read the head of our answer.
    """

    def __init__(self, connection: socket.socket, streams: Streams, command: str):
        super().__init__(name="relay", daemon=True)
        self.command, self.over = command, threading.Event()
        self._connection, self.streams = connection, streams
        self._wake = io.FileIO(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "r+")   # told to by other threads
        self._finishing = self._given_up = False
        self._received = self._input = self._output = b""       # frames; the command's input from them; frames
        self.last = b""                 # of the output
        self.held: bytes | None = b""   # frames, while all there is may be the runtime's complaint of the command
        self._begun = False

    def begin(self) -> None:
        try:
            self.start()
        except RuntimeError:            # no more threads
            self._end()

    def finish(self, give_up: bool = False) -> None:
        """The command is over, or is to be: end once its client has the rest of its output, or give that up."""
        self._finishing, self._given_up = True, self._given_up or give_up
        os.eventfd_write(self._wake.fileno(), 1)

    def say(self, kind: int, data: bytes) -> None:
        """Send a last frame, once it is over; a client that takes nothing does not get it."""
        with contextlib.suppress(OSError):
            self._connection.settimeout(2)
            self._connection.sendall(self._output + (self.held or b"") + FRAME.pack(kind, len(data)) + data)

    def run(self) -> None:
        try:
            self._connection.setblocking(False)
            while not self._given_up and self._carry():
                pass
        except (OSError, ValueError) as error:          # ValueError: what comes is no frame
            log.info("control API: a command's client: %r", error)
        finally:
            self._end()

    def _end(self) -> None:
        self.streams.close()
        self.over.set()

    def _carry(self) -> bool:
        """Wait until something can be carried, and do it; return False when all is done."""
        poll, streams, connection = select.poll(), self.streams, self._connection.fileno()
        poll.register(self._wake, select.POLLIN)
        wanted = (0 if self._input else select.POLLIN) | (select.POLLOUT if self._output else 0)
        if wanted:                      # nothing is said of a connection on which we wait for nothing
            poll.register(connection, wanted)
        if self._input and streams.input >= 0:
            poll.register(streams.input, select.POLLOUT)
        sources = streams.outputs if self._begun and not self._output else {}
        for source in sources:
            poll.register(source, select.POLLIN)
        drained = self._finishing and bool(sources or not streams.outputs) and not self._output
        ready = dict(poll.poll(0 if drained else 2_000 if self.held else None))
        if self.held and not ready and not drained:     # after a complaint the runtime would have ended by now
            self._output, self.held = self.held, None
        if ready.pop(self._wake.fileno(), None):
            os.eventfd_read(self._wake.fileno())
        if drained and not ready.keys() & sources.keys():
            return False
        if ready.get(connection, 0) & select.POLLOUT:
            self._output = self._output[self._connection.send(self._output):]
        elif connection in ready:
            if not (data := self._connection.recv(MAX_FRAME)):
                return False
            self._received += data
        if streams.input in ready:
            self._write()
        self._take_frames()
        for source in ready.keys() & sources.keys():
            self._read(source)
        return True

    def _read(self, source: int) -> None:
        try:
            data = os.read(source, MAX_FRAME // 2)
        except BlockingIOError:
            return
        except OSError:                 # EIO: nobody has the terminal any more
            data = b""
        if data:
            self.last = (self.last + data)[-KIB:]
            frame = FRAME.pack(self.streams.outputs[source], len(data)) + data
            text = self.last.decode(errors="replace")
            if self.held is not None and len(self.held) < KIB and command_fault(self.command, text):
                self.held += frame
            else:
                self._output, self.held = self._output + (self.held or b"") + frame, None
        else:
            del self.streams.outputs[source]
            os.close(source)

    def _write(self) -> None:
        """Give the command what it takes of its input; one that has closed it misses the rest."""
        try:
            self._input = self._input[os.write(self.streams.input, self._input):]
        except BlockingIOError:
            pass
        except OSError:
            self._input = b""
            self.streams.close_input()

    def _take_frames(self) -> None:
        """Do what whole frames say, one after the other. Raises ValueError."""
        while not self._input and len(self._received) >= FRAME.size:
            kind, size = FRAME.unpack_from(self._received)
            if size > MAX_FRAME or kind not in (STDIN, RESIZE) or kind == RESIZE and size != 4:
                raise ValueError(f"kind {kind} of {size} bytes")
            if len(self._received) < FRAME.size + size:
                return
            data = self._received[FRAME.size:FRAME.size + size]
            self._received, self._begun = self._received[FRAME.size + size:], True
            if kind == RESIZE:
                self.streams.resize(*struct.unpack(">2H", data))
            elif not data and not self.streams.terminal:
                self.streams.close_input()
            elif self.streams.input >= 0:
                self._input = data


def has_hung_up(connection: socket.socket) -> bool:
    """Return whether the other end will send nothing any more, which a command's client does not do in its life."""
    return is_readable(connection, 0, select.POLLRDHUP)


class ControlHandler(http.server.BaseHTTPRequestHandler):
    """Answers one connection of the control API. Runs in a thread of its own; state is the loop's, reached by _call."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"    # not 0.9, which would answer nonsense without a status line
    server_version = f"faasd/{__version__}"
    timeout = MAX_WRITE_SECONDS
    server: ControlServer
    client_address: str                     # as the log shows it
    requestline = command = ""              # until http.server has read them; its own error answers may come before
    _admitted = False                       # whether who sent it may use the API

    # -- the head of a request --

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = ConnectionReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.server.note(f"{self.client_address} left in the middle of {self._subject()!r}", self._admitted)

    def handle_one_request(self) -> None:
        self._reader.deadline, self._admitted = time.monotonic() + MAX_HEADER_SECONDS, False
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Have http.server parse a head that is well-formed, and check its sender. False: it is answered already."""
        rfile = self.rfile
        self.requestline, self.request_version = self.raw_requestline.decode("latin-1").rstrip("\r\n"), "HTTP/1.1"
        self._continue_expected = False
        try:
            self.rfile = io.BytesIO(self._read_headers())
            if not super().parse_request():
                return False
            self._admit()
            return True
        except FaasdError as error:
            self._refuse(error)
            return False
        finally:
            self.rfile, self._reader.deadline = rfile, None

    def _read_headers(self) -> bytes:
        """Return the lines after the first, to the empty one. Raises FaasdError with status 400 or 431."""
        if not REQUEST_LINE.fullmatch(self.raw_requestline):
            raise BadRequest(f"bad request line {self.requestline[:100]!r}")
        lines, size = [], 0
        while (line := self.rfile.readline(MAX_HEADERS_SIZE)) not in (b"\r\n", b"\n"):
            lines.append(line)
            size += len(line)
            if size >= MAX_HEADERS_SIZE or len(lines) > MAX_HEADERS:
                raise FaasdError(f"over {MAX_HEADERS} headers, or {MAX_HEADERS_SIZE} bytes of them", status=431)
            if not HEADER_LINE.fullmatch(line):
                raise BadRequest(f"bad header {line[:100].decode('latin-1')!r}")
        return b"".join([*lines, b"\r\n"])

    def handle_expect_100(self) -> bool:
        self._continue_expected = True          # answered later: first check the sender and the request
        return True

    def _admit(self) -> None:
        """Raise FaasdError unless we may answer this request, and know where it ends."""
        self.server.check(self.headers, self.connection)
        self._admitted = True
        if "Origin" in self.headers or "Sec-Fetch-Site" in self.headers:       # sent by browsers alone
            raise Refused(403, "this API is not for web pages")
        if "Content-Type" in self.headers and self.headers.get_content_type() in FORM_TYPES:
            raise Refused(415, "a web form's Content-Type is refused: for an archive say application/x-tar")
        if not self.path.startswith("/"):
            raise BadRequest(f"bad address {self.path[:100]!r}: it has to begin with a slash")
        lengths, encodings = self.headers.get_all("Content-Length", []), self.headers.get_all("Transfer-Encoding", [])
        # What two programs may read differently can hide one request inside another.
        if len(lengths) > 1 or lengths and (encodings or not re.fullmatch(r"[0-9]{1,18}[ \t]*", lengths[0])):
            raise BadRequest("the request needs one Content-Length, in digits, or chunked encoding")
        if encodings and self.request_version == "HTTP/1.0":
            raise BadRequest("there is no Transfer-Encoding in HTTP/1.0")
        if encodings and [encoding.strip().lower() for encoding in encodings] != ["chunked"]:
            raise Refused(501, "the only Transfer-Encoding known here is chunked")

    # -- answers --

    def _dispatch(self) -> None:
        try:
            url = urllib.parse.urlsplit(self.path)
            parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
            query = urllib.parse.parse_qs(url.query, keep_blank_values=True, strict_parsing=bool(url.query),
                                          max_num_fields=10_000)
            route = self._route(parts)
            names = [check_name(part) for part in parts[1:2]]
            if "secret" in query:
                raise BadRequest(f"a secret does not belong in an address: send it in the header {SECRETS_HEADER}")
            if SECRETS_HEADER in self.headers:
                query["secret"] = self.headers.get_all(SECRETS_HEADER)
            if "volume" in query:               # here, for a disk may hold up this thread
                query["volume"] = [self.server.answers.volumes.resolve(query["volume"][-1])]
            if "Transfer-Encoding" in self.headers or int(self.headers.get("Content-Length", "0")) > 0:
                self.close_connection = True            # nobody knows how much of the body will be read
            if route in ControlHandler.own_routes:
                route(self, *names, query)
            else:
                self._reply(200, self._call(route(*names, query=query)))
        except FaasdError as error:
            self._refuse(error)
        except ValueError as error:
            self._refuse(BadRequest(f"bad address or query: {error}"))

    do_GET = do_POST = do_PATCH = do_DELETE = do_OPTIONS = _dispatch

    def _route(self, parts: list[str]) -> Callable:
        """Return what answers. Raises FaasdError: 404, or 405."""
        pattern = tuple("*" if i == 1 and part else part for i, part in enumerate(parts))
        methods = self.server.answers.routes.get(pattern)
        if not methods:
            raise FaasdError(f"no such resource: /{'/'.join(parts)}", status=404)
        if self.command not in methods:
            raise Refused(405, f"{self.command} is not possible here, {' or '.join(methods)} is",
                          Allow=", ".join(methods))
        return methods[self.command]

    def deploy(self, name: str, query: dict) -> None:
        """Have a child unpack the body, which it reads from the connection itself."""
        tag, reset = query.pop("tag", [""])[-1], read_switch(query.pop("reset", ["false"])[-1])
        address = query.pop("ip", [""])[-1]
        secrets = pop_secrets(query)
        Options().changed(query)        # refuse wrong options before the archive is sent
        if self.headers.get_content_type() not in ARCHIVE_TYPES:        # none at all is what a page can send, too
            raise Refused(415, f"an archive needs `Content-Type: {ARCHIVE_TYPES[0]}`")
        length = "chunked" if "Transfer-Encoding" in self.headers else self.headers.get("Content-Length")
        if not length:
            raise Refused(411, "the request needs a Content-Length or chunked encoding")
        if self._continue_expected:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            deploys = self.server.answers.deploys
            created, document = self._call(deploys.deploy(name, self.connection, length, tag, address, reset,
                                                                query, secrets))
        except OSError as error:
            raise storage_error(error, "storing the image") from error
        self._reply(201 if created else 200, document)

    def logs(self, name: str, query: dict) -> None:
        choose = Failures() if is_set(query, "failed") else iter
        source = self._call(self.server.answers.log_of(name))
        self._send_lines(source, functools.partial(log_document, name), query, choose)

    def events(self, query: dict) -> None:
        wanted = query.get("function")
        choose = functools.partial(filter, lambda line: split_line(line)[1] in wanted) if wanted else iter
        self._send_lines(self._call(self.server.answers.log_of()), event_document, query, choose)

    def execute(self, name: str, query: dict) -> None:
        """Run a command; what it reads and writes goes over this connection, which becomes one of frames: see Relay."""
        if self.headers.get("Upgrade", "").lower() != FRAMES:
            raise Refused(426, f"this needs `Upgrade: {FRAMES}`, which a proxy on the way may drop", Upgrade=FRAMES)
        size = tuple(parse_amount(query.get(key, ["0"])[-1]) & 0xFFFF for key in ("lines", "columns"))
        env = Options().changed({"env": query.get("env", [])}).env
        command = query.get("cmd") or [DEFAULT_COMMAND]
        started = concurrent.futures.Future()           # with the command's streams
        result, cancel = self._begin(self.server.answers.deploys.execute(
            name, command, env, is_set(query, "tty"), is_set(query, "stdin"), size, started.set_result))
        while not concurrent.futures.wait([started, result], LEFT_SECONDS, concurrent.futures.FIRST_COMPLETED).done:
            if has_hung_up(self.connection):
                cancel()
        self.close_connection = True
        if not started.done():
            self._result_of(result)     # raises
        streams = started.result()
        try:
            relay = Relay(self.connection, streams, command[0])
        except OSError as error:        # out of descriptors
            streams.close()
            cancel()
            raise FaasdError(f"cannot carry what the command prints: {error.strerror}", status=503) from error
        self._relay(relay, result, cancel)

    def _relay(self, relay: Relay, result: concurrent.futures.Future, cancel: Callable[[], None]) -> None:
        """End a command when its client leaves, and tell the client how it ended."""
        try:
            self.connection.sendall(f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: {FRAMES}\r\n"
                                    "Connection: Upgrade\r\n\r\n".encode())
        except OSError:                 # it has left
            relay.finish(give_up=True)
        self.log_request(101)
        relay.begin()
        result.add_done_callback(lambda _: relay.finish())
        while not (relay.over.wait(timeout=LEFT_SECONDS) and result.done()):
            if relay.over.is_set() or relay.streams.given_up or has_hung_up(self.connection):
                relay.finish(give_up=True)
                cancel()
                concurrent.futures.wait([result], timeout=LEFT_SECONDS)
                if result.done() and not relay.over.wait(timeout=LEFT_SECONDS):
                    return              # a container of its network holds the lock of a pipe
        try:
            status, error = self._result_of(result)
        except FaasdError:
            status, error = None, f"the command was ended: {Release.STOPPED.value}"
        said = error or (relay.last.decode(errors="replace") if relay.held else "")
        if fault := status and command_fault(relay.command, said):
            (status, error), relay.held = fault, b""
            error += ": say faas exec NAME -- PROGRAM" if relay.command == DEFAULT_COMMAND else ""
        elif error[:MAX_REQUEST].encode() in relay.last:        # the runtime has said so itself
            error = ""
        relay.say(END, json.dumps({"status": status, "error": error}).encode())

    def image(self, name: str, query: dict) -> None:
        """Have a child answer with the archive, which it writes to the connection itself."""
        if self.request_version == "HTTP/1.0":
            raise Refused(505, "the archive comes in chunks, which HTTP/1.0 does not know")
        self.close_connection = True
        try:
            said = self._call(self.server.answers.deploys.save(name, self.connection, query))
        except Cancelled as error:      # an answer may have begun
            said = {"cut": str(error)}
        self.log_request(200)
        if "cut" in said:
            log.warning("control API: %s did not get the whole image of %s: %s", self.client_address, name, said["cut"])

    own_routes = (deploy, logs, events, execute, image)        # that answer by themselves

    def _send_lines(self, source: FunctionLog, describe: Callable[[bytes], dict], query: dict,
                    choose: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """Answer with the lines of a log that choose yields, as text or as a JSON object a line."""
        tail = parse_count(query["tail"][-1]) if "tail" in query else None
        since = parse_since(query["since"][-1]) if "since" in query else ""
        as_json = query.get("format", ["text"])[-1] == "json"

        def encode(lines: Iterable[bytes]) -> bytes:
            return b"".join(json.dumps(describe(line)).encode() + b"\n" if as_json else line for line in lines)
        failed = isinstance(choose, Failures)
        lines, file = source.read(None if failed else tail, since, choose)
        lines = choose.last(lines, tail) if failed and tail else lines
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson" if as_json else "text/plain; charset=utf-8")
        if self.request_version == "HTTP/1.0":          # which knows no chunks
            self.close_connection = True
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._write_chunk(encode(lines))
        if is_set(query, "follow"):
            for data in source.follow(file):
                self._write_chunk(encode(choose(data.splitlines(keepends=True))))
                if not data and self._client_left():
                    break
        elif file:
            file.close()
        if self.request_version != "HTTP/1.0":
            self.wfile.write(b"0\r\n\r\n")

    def _write_chunk(self, data: bytes) -> None:
        for at in range(0, len(data), COPY_CHUNK):      # the timeout is that of one write; an empty chunk would end all
            piece = data[at:at + COPY_CHUNK]
            self.wfile.write(piece if self.request_version == "HTTP/1.0" else b"%x\r\n%s\r\n" % (len(piece), piece))

    def _begin(self, coroutine) -> tuple[concurrent.futures.Future, Callable[[], None]]:
        """Run a coroutine on the daemon's loop; return the future of its result, and what cancels it, once."""
        running: list[asyncio.Task] = []
        requester = "" if self.command == "GET" else self.server.name_client(self.client_address)

        async def run():
            running.append(asyncio.current_task())
            REQUESTER.set(requester)
            return await coroutine
        loop = self.server.answers.loop
        result = asyncio.run_coroutine_threadsafe(run(), loop)
        return result, lambda: loop.call_soon_threadsafe(running.pop().cancel) if running else None

    def _call(self, coroutine):
        """Run a coroutine on the daemon's loop and return its result. Cancels it when the client leaves."""
        result, cancel = self._begin(coroutine)
        seconds_gone = 0                # how long ago the client has left
        while not concurrent.futures.wait([result], timeout=1.0).done:
            seconds_gone = seconds_gone + 1 if self._client_left() else 0
            if seconds_gone > 4:        # after the unpacking child could say how its body was cut
                cancel()
        return self._result_of(result)

    @staticmethod
    def _result_of(result: concurrent.futures.Future):
        try:
            return result.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("faasd is stopping, or you left") from None

    def _client_left(self) -> bool:
        """Return whether the client has closed and all that it sent is read; read nothing, for a child may."""
        return has_hung_up(self.connection) and not any(fcntl.ioctl(self.connection, termios.FIONREAD, bytes(4)))

    def _reply(self, status: int, document: dict | str, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON, or with text in Prometheus' format."""
        kind = "text/plain; version=0.0.4; charset=utf-8" if isinstance(document, str) else "application/json"
        body = (document if isinstance(document, str) else json.dumps(document) + "\n").encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        if self.close_connection:
            self.send_header("Connection", "close")
        super().end_headers()

    def _refuse(self, error: FaasdError) -> None:
        # What is left of a body is not worth reading: the next request would start in its middle.
        self.close_connection = True
        if error.status >= 500:
            log.error("control API: %s", error, exc_info=error.__cause__ if error.status == 500 else None)
        headers = error.headers if isinstance(error, Refused) else {}
        if error.status == 503:
            headers["Retry-After"] = "5"
        self._reply(error.status, {"error": str(error), **({"output": error.output} if error.output else {})}, headers)

    def send_error(self, code, message=None, explain=None) -> None:
        """Answer what http.server itself refuses in our own format."""
        if code == 414:                 # http.server's own limit
            message = "name, command and environment are over 64 KiB together: put large values into the image"
        self._refuse(Refused(code, message or self.responses.get(code, ("error",))[0]))

    def _subject(self) -> str:
        # Without the query: it carries environment variables, which may be secrets.
        return self.requestline.partition("?")[0][:200]

    def log_message(self, format: str, *args) -> None:
        log.debug("control API: " + format, *args)

    def log_request(self, code="-", size="-") -> None:
        self.server.note(f"{self.client_address} {self._subject()!r} {int(code)}", self._admitted)


def is_set(query: dict[str, list[str]], key: str) -> bool:
    return query.get(key, ["0"])[-1] not in ("", "0", "false")


def parse_since(text: str) -> str:
    """Return a time as log lines begin with it, from RFC 3339 or from a duration before now. Raises BadRequest."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
    except ValueError:
        try:
            moment = datetime.now(timezone.utc) - timedelta(seconds=parse_duration(text))
        except BadRequest:
            raise BadRequest(f"bad time {text!r}: write 10m, or 2026-01-31T12:00:00Z") from None
    try:
        return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
    except OverflowError:
        raise BadRequest(f"bad time {text!r}: out of range") from None


class Answers:
    """What the control API answers. Lives on the loop; a query is the part after the ? of a request's address."""

    def __init__(self, settings: Settings, services: Services, deploys: Deploys, runtime: str):
        self.loop, self.volumes = services.host.loop, services.host.volumes
        self.deploys = deploys
        self._settings, self._services = settings, services
        self._runtime = runtime         # its name and version
        # For a path, in which "*" is a function's name, what answers a method.
        self.routes: dict[tuple[str, ...], dict[str, Callable]] = {
            ("healthz",): {"GET": self.health},
            ("version",): {"GET": self.version},
            ("metrics",): {"GET": self.metrics},
            ("stats",): {"GET": self.statistics},
            ("events",): {"GET": ControlHandler.events},
            ("usage",): {"GET": deploys.usage},
            ("prune",): {"POST": deploys.prune},
            ("functions",): {"GET": self.functions},
            ("functions", "*"): {"GET": self.function, "POST": ControlHandler.deploy, "PATCH": deploys.change,
                                 "DELETE": deploys.remove},
            ("functions", "*", "stats"): {"GET": self.statistics},
            ("functions", "*", "versions"): {"GET": self.versions},
            ("functions", "*", "isolation"): {"GET": deploys.inspect},
            ("functions", "*", "rollback"): {"POST": deploys.roll_back},
            ("functions", "*", "logs"): {"GET": ControlHandler.logs},
            ("functions", "*", "exec"): {"POST": ControlHandler.execute},
            ("functions", "*", "image"): {"GET": ControlHandler.image},
        }

    async def health(self, query: dict) -> dict:
        return {"status": "ok"}

    async def version(self, query: dict) -> dict:
        return {"faasd": __version__, "python": platform.python_version(), "runtime": self._runtime,
                "kernel": platform.release()}

    async def functions(self, query: dict) -> dict:
        return {"functions": [self.deploys.describe(function) for function in self.deploys.in_order()]}

    async def function(self, name: str, query: dict) -> dict:
        return self.deploys.describe(self.deploys.get(name))

    async def log_of(self, name: str = "") -> FunctionLog:
        """Return a function's log, or that of events, once all that has happened so far is in it."""
        source = self.deploys.get(name).log if name else self._services.events
        await self._services.logs.flush()
        return source

    async def versions(self, name: str, query: dict) -> dict:
        """Return the versions of a function, the one that runs first."""
        versions, look = self.deploys.get(name).record.versions, functools.partial(self.deploys.images.look, name)
        images = {image: await asyncio.to_thread(look, image) for image in {entry.image for entry in versions}}
        return {"versions": [{
            "version": entry.number, "digest": images[entry.image]["digest"], "size": images[entry.image]["size"],
            "image": images[entry.image]["tag"] or entry.image, "deployed": entry.deployed,
            "created": entry.created or entry.deployed, "current": entry is versions[0],
            "options": entry.options.to_json(), "chosen": entry.options.chosen()} for entry in versions]}

    async def statistics(self, *names: str, query: dict) -> dict:
        """Return counts and percentiles of the named functions, or of all."""
        functions = [self.deploys.get(name) for name in names] or self.deploys.in_order()
        return {"time": round(time.time(), 3), "functions": [function.describe_statistics() for function in functions]}

    async def metrics(self, query: dict) -> str:
        """Return everything that is counted in Prometheus' text format, version 0.0.4."""
        functions = self.deploys.in_order()
        build = f'version="{__version__}",python="{platform.python_version()}",runtime="{self._runtime}"'
        lines = [*function_metrics(functions),
                 *metric_header("faasd_loop_lag_seconds", "histogram", "How late the event loop comes to a timer"),
                 *self._services.lag.histogram.expose("faasd_loop_lag_seconds"),
                 *metric_header("faasd_functions", "gauge", "Functions deployed"), f"faasd_functions {len(functions)}",
                 *metric_header("faasd_warm_containers_limit", "gauge", "Most warm containers of all functions"),
                 f"faasd_warm_containers_limit {self._settings.max_warm}",
                 *metric_header("faasd_build_info", "gauge", "What runs here"), f"faasd_build_info{{{build}}} 1",
                 *process_metrics()]
        return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Deploys: from an archive to a function that serves; other options, rollback, removal
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_FIELDS = {"digest": str, "tag": str, "size": int, "first_id": int, "process": dict}
PROCESS_FIELDS = {"cwd": str, "resolv_conf": str, "uid": int, "gid": int, "entrypoint": list, "cmd": list, "env": list}
DISCARD_SECONDS = 3.0               # that a start, a stop or a change waits for files to be removed
Undo = contextlib.AsyncExitStack    # takes back what was made for a change that fails


class Secrets:
    """Functions' secrets, in STATE_DIR/secrets/NAME/ID, which only root can read.

    The registry has their names and these ids, so that a change of several is made as a whole. Methods block.
    """

    def __init__(self, directory: Path):
        self._directory = directory

    def write(self, function: str, values: dict[str, bytes]) -> dict[str, str]:
        """Write secrets to the disk; return the ids of their files by name. Raises OSError."""
        directory, files = self._directory / function, {name: secrets.token_hex(6) for name in values}
        directory.mkdir(0o700, exist_ok=True)
        for name, value in values.items():
            with open(os.open(directory / files[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(value)
        sync_file_system(directory)
        return files

    def read(self, function: str, files: dict[str, str]) -> dict[str, bytes]:
        """Return secrets by name. Raises FaasdError."""
        try:
            return {name: (self._directory / function / file).read_bytes() for name, file in files.items()}
        except OSError as error:
            raise FaasdError(f"its secrets cannot be read: {error.strerror}: set them again") from None

    def remove(self, function: str, files: Iterable[str]) -> None:
        """Remove files of a function. Failure is logged: the next start tries again."""
        for path in (self._directory / function / file for file in files):
            try_remove(path)

    def keep(self, function: str, files: Collection[str]) -> None:
        """Remove all files of a function but these. Failure is logged: the next start tries again."""
        directory = self._directory / function
        try:
            self.remove(function, {path.name for path in directory.glob("*")} - {*files})
            if not files and directory.exists():
                directory.rmdir()
        except OSError as error:
            log.error("cannot remove %s: %s", error.filename, error.strerror)

    def clear(self, files: dict[str, Collection[str]]) -> None:
        """Remove all but these files, by function."""
        for directory in self._directory.glob("*/"):
            self.keep(directory.name, files.get(directory.name, ()))


def check_fields(document: dict, kinds: dict[str, type]) -> None:
    """Raise ImageError unless fields of an image.json, which may be edited, are of these kinds; lists of text."""
    for key, kind in kinds.items():
        value = document.get(key)
        if not isinstance(value, kind) or kind is list and not all(isinstance(entry, str) for entry in value):
            raise ImageError(f"image.json has no valid {key!r}")


def size_of(name: str | Path, directory: int | None = None) -> int:
    """Return the size of a file, or of all below a directory, where an image's layers may make links at any time."""
    with contextlib.suppress(FileNotFoundError):
        try:
            with opened(name, os.O_RDONLY | os.O_DIRECTORY, directory) as below:
                return sum(size_of(entry, below) for entry in os.listdir(below))
        except OSError:                 # no directory, or not any more
            return os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
    return 0


class ImageStore:
    """The unpacked images, STATE_DIR/images/NAME/IMAGE. They come from STATE_DIR/tmp, and go there, by one rename."""

    def __init__(self, settings: Settings, host: ContainerHost):
        self._settings, self._host = settings, host
        self._images, self._tmp = settings.state_dir / "images", settings.state_dir / "tmp"
        self._program = settings.run_dir / "program"
        self.secrets = Secrets(settings.state_dir / "secrets")

    async def clear(self, kept: Collection[tuple[str, str]]) -> None:
        """Remove uploads, and all images but these (function, version); copy our program. Raises OSError."""
        # A child runs what this process runs, whatever becomes of the source meanwhile: an upgrade replaces it.
        self.remove_program()
        self._program.mkdir(mode=0o700)
        shutil.copyfile(__file__, self._program / "faasd.py")
        for directory in self._images.glob("*/*"):
            if (directory.parent.name, directory.name) not in kept:
                log.warning("removing an image without a function: %s", directory)
                directory.rename(self.unused_path())
        for directory in self._images.glob("*/"):
            if not any(directory.iterdir()):
                directory.rmdir()
        await self.empty_tmp()

    def remove_program(self) -> None:
        shutil.rmtree(self._program, ignore_errors=True)

    def unused_path(self) -> Path:
        """Return a path in STATE_DIR/tmp."""
        return self._tmp / secrets.token_hex(8)

    async def unpack(self, connection: socket.socket, length: str, directory: Path, tag: str, first_id: int) -> dict:
        """Have a child unpack an archive to a directory (see unpack_main); return image.json. Raises FaasdError."""
        return await self._run_child("unpack", "unpacking the image", connection, directory, tag, length,
                                     self._settings.max_image_size, self._settings.max_image_entries, first_id)

    async def save(self, name: str, entry: VersionRecord, connection: socket.socket, with_env: bool) -> dict:
        """Have a child send the archive of a version, as save_main does; return what it said. Raises FaasdError."""
        first_id = self.load(name, entry.image)["first_id"]
        options = entry.options if with_env else replace(entry.options, env=())
        with kept_open(os.memfd_create("options")) as file:
            write_all(file, memoryview(json.dumps(options.to_json()).encode()))
            os.lseek(file, 0, os.SEEK_SET)
            return await self._run_child(
                "save", "saving the image", connection, self._images / name / entry.image, first_id, f"{name}:latest",
                file, pass_fds=[file])

    async def _run_child(self, of: str, doing: str, connection: socket.socket, *arguments: Path | str | int,
                         pass_fds: Collection[int] = ()) -> dict:
        """Run a child of that main function on a client's connection; return what it prints. Raises FaasdError."""
        try:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-c", CHILD, of, *map(str, (self._program, os.getpid(), *arguments)),
                stdin=connection, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                pass_fds=pass_fds)
        except OSError as error:        # out of processes, memory, descriptors
            raise FaasdError(f"{doing} cannot begin: {error.strerror}", status=503) from error
        try:
            stdout, stderr = await child.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):       # it has ended just now
                child.kill()
            await child.wait()
            raise
        for line in stderr.decode("utf-8", "replace").splitlines():
            log.warning("%s: %s", of, line)
        try:
            document = json.loads(stdout)
        except ValueError:
            end = (describe_exit(128 - child.returncode) if child.returncode < 0 else
                   f"ended with status {child.returncode}; faasd's log has the detail")
            raise FaasdError(f"{doing} {end}") from None
        if "error" in document:
            raise FaasdError(document["error"], status=document["status"])
        return document

    async def put(self, name: str, unpacked: Path, image: dict, undo: Undo) -> asyncio.Future:
        """Move an unpacked image to where it belongs; return what ends once it is on disk. FaasdError, OSError."""
        directory = self._images / name / image["version"]
        digest = self.look(name, image["version"])["digest"]
        if digest not in ("", image["digest"]):         # somebody has looked for a pair of them
            raise Conflict(f"function {name} has an image with another digest that begins like this one's: {digest}")
        if digest:      # it may be running, so its root stays, the rest is whole at any time, and as before on an error
            undo.callback(write_anew, directory / "image.json", (directory / "image.json").read_text())
            await asyncio.to_thread(sync_file_system, unpacked)
            (unpacked / "config.json").rename(directory / "config.json")        # an older faasd kept none
            (unpacked / "image.json").rename(directory / "image.json")
            await self.discard(unpacked)
        else:
            await self.remove(name, [image["version"]])
            directory.parent.mkdir(exist_ok=True)
            # For its containers alone: it has devices and setuid files. Their root mounts it, and passes as the group.
            os.chown(directory.parent, 0, image["first_id"])
            directory.parent.chmod(0o710)
            unpacked.rename(directory)
            undo.push_async_callback(self.remove, name, [image["version"]])
        written = asyncio.ensure_future(asyncio.to_thread(sync_file_system, directory))
        written.add_done_callback(lambda done: done.cancelled() or done.exception())    # nobody may wait for it
        return written

    async def remove(self, name: str, versions: Iterable[str]) -> None:
        """Remove images of a function, and its directory if it has no other. Failure is logged."""
        discarded = []
        for directory in (self._images / name / version for version in versions):
            try:
                discarded.append(directory.rename(self.unused_path()))
            except FileNotFoundError:
                continue
            except OSError as error:            # the next start tries again
                log.error("cannot remove %s: %s", directory, error.strerror)
        with contextlib.suppress(OSError):      # it is not empty, or there is none
            (self._images / name).rmdir()
        if discarded:
            await self.discard(*discarded)

    async def keep(self, name: str, versions: Collection[str]) -> None:
        """Remove all images of a function but these."""
        await self.remove(name, [path.name for path in (self._images / name).glob("*") if path.name not in versions])

    async def discard(self, *paths: Path) -> None:
        """Remove what is in STATE_DIR/tmp; what takes over DISCARD_SECONDS goes on in a thread, or at a start."""
        def discard() -> None:
            for path in paths:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        removal = self._host.workers.run(discard)
        await asyncio.wait([removal], timeout=DISCARD_SECONDS)
        if removal.done() and (error := removal.exception()):
            log.warning("cannot empty %s: %s", self._tmp, error)

    async def empty_tmp(self) -> None:
        await self.discard(*self._tmp.iterdir())

    def usage(self, records: Iterable[FunctionRecord]) -> dict:
        """Return how many bytes images, logs and STATE_DIR/tmp take. Blocks."""
        functions = [{"name": record.name, "images": self._images_of(record), "logs": sum(
            size_of(self._settings.state_dir / "logs" / f"{record.name}.log{end}") for end in ("", ".1"))}
            for record in records]
        tmp, room = size_of(self._tmp), os.statvfs(self._tmp)
        return {"functions": functions, "tmp": tmp, "free": room.f_bavail * room.f_frsize, "total": tmp + sum(
            entry["logs"] + sum(image["size"] for image in entry["images"]) for entry in functions)}

    def _images_of(self, record: FunctionRecord) -> list[dict]:
        there = (path.name for path in (self._images / record.name).glob("*"))    # also what a container still runs on
        return [{"image": name, "size": self.look(record.name, name)["size"],
                 "current": name == record.versions[0].image,
                 "versions": [entry.number for entry in record.versions if entry.image == name]}
                for name in dict.fromkeys([*(entry.image for entry in record.versions), *there])]

    def look(self, name: str, version: str) -> dict:
        """Return what load does; of an image that is damaged or gone, that nothing is known."""
        try:
            return self.load(name, version)
        except FaasdError:
            return {"digest": "", "tag": "", "size": 0}

    def load(self, name: str, version: str) -> dict:
        """Return the image.json of a version. Raises FaasdError if the image is not what it was."""
        directory = self._images / name / version
        try:
            image = parse_json((directory / "image.json").read_bytes(), dict, "image.json")
            os.scandir(directory / "rootfs").close()
            check_fields(image, IMAGE_FIELDS)
            check_fields(image["process"], PROCESS_FIELDS)
            return image
        except (OSError, ImageError) as error:
            raise FaasdError(f"its image in {directory} is damaged ({error}): deploy it again") from None

    def version(self, name: str, entry: VersionRecord, secrets: dict[str, str]) -> Version:
        """Return what runs for a record, with secrets by name. Blocks. Raises FaasdError if its image is damaged."""
        image, directory = self.load(name, entry.image), self._images / name / entry.image
        try:
            rootfs = Rootfs(directory / "rootfs", image["first_id"], Budget(0, 0))
            image["process"] = choose_process(image["process"], entry.options, rootfs)
            image["process"]["secrets"] = place_secrets(rootfs, self.secrets.read(name, secrets), image["process"])
            return Version(name, directory, image, entry, self._host, secrets)
        except OSError as error:
            raise FaasdError(f"its image {entry.image} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FaasdError(f"its image {entry.image} is damaged ({error!r}): deploy it again") from None


PORT_RETRY_SECONDS = 5.0            # between attempts to publish a port that somebody else has at a start


class Attachments:
    """What ties functions to this machine's network: addresses on lo with listeners, egress networks, published ports.

    Whatever runs a command does so in a thread. What others take away is put back.
    """

    def __init__(self, settings: Settings, addresses: Addresses, workers: Workers):
        self._settings = settings
        self._loop = workers.loop
        self.addresses = addresses
        self.listeners = ListenerStore(packet_mark(settings.run_dir) if settings.lan == "deny" else None)
        self._guard = AddressGuard(settings.run_dir, settings.subnet)
        self._address_lost = asyncio.Event()
        self._address_watch = NetlinkWatch(NETLINK_ROUTE, RTMGRP_IPV4_IFADDR, RTM_DELADDR, b"", self._address_lost.set)
        self._keeper = self._loop.create_task(self._keep_addresses())
        self.egress = EgressNetworks(settings.run_dir, settings.egress_subnet, settings.subnet, settings.port)
        self._network_thread = concurrent.futures.ThreadPoolExecutor(1)     # one thing after the other, in order
        self.published = PublishedPorts(settings.run_dir, settings.subnet, settings.port)
        self._rules_watch = NetlinkWatch(       # of both, whose tables end in this
            NETLINK_NETFILTER, 1 << NFNLGRP_NFTABLES - 1, NFT_DELTABLE, f"_{run_dir_mark(settings.run_dir)}\0".encode(),
            self._restore_rules)
        addresses.greet(workers)
        self._address_watch.open()

    def close(self) -> None:
        """Put nothing back any more."""
        self._rules_watch.close()
        self._address_watch.close()
        self._keeper.cancel()

    def _restore_rules(self) -> None:
        """Put back the rules that somebody has deleted. Replacing our own triggers this as well."""
        self.run(self.egress.restore_rules)
        self.run(self.published.restore_rules)

    async def finish(self) -> None:
        """Return once nothing of egress networks is being changed: what comes now is the next daemon's."""
        await asyncio.to_thread(self._network_thread.shutdown)

    async def remove_all(self) -> None:
        try:
            await asyncio.to_thread(self._guard.detach)
        except OSError as error:
            log.info("cannot remove the guard of the addresses: %s", error.strerror)
        self.addresses.remove_all()
        await self.run(self.egress.remove_all)
        await self.run(self.published.remove_all)
        for path in self._settings.run_dir.glob("resolv.conf.*"):
            path.unlink()
        (self._settings.run_dir / NAMES).unlink(missing_ok=True)

    def guard(self) -> None:
        """Keep handlers from using their client's socket for anything else, and warn if that cannot be. Blocks."""
        port = self._settings.port
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        if first <= port <= last:
            log.warning("port %d is in net.ipv4.ip_local_port_range: any program, a handler too, may be given it while "
                        "its function does not listen; choose another --port", port)
        try:
            self._guard.attach()
        except OSError as error:
            log.warning("cannot guard the addresses of functions, which takes cgroup v2, CONFIG_CGROUP_BPF and Linux "
                        "5.14: a handler can send from its client's socket, and take ports of this machine, with any "
                        "--net (SECURITY.md, Networks): %s", error.strerror)
            if port >= int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()):
                log.warning("port %d is not privileged, so a handler can even use this machine's network while its "
                            "function does not listen: choose a --port below 1024", port)

    async def listen(self, address: str) -> socket.socket:
        """Put an address on lo and listen there; undo it on an error. Raises FaasdError."""
        await asyncio.to_thread(self.addresses.add, address)
        try:
            return self.listeners.open(address, self._settings.port)
        except BaseException:
            await asyncio.to_thread(self.addresses.remove, address)
            raise

    async def release(self, address: str) -> None:
        """Take an address from lo, on which nobody listens any more."""
        self.listeners.forget(address, self._settings.port)
        await asyncio.to_thread(self.addresses.remove, address)

    async def _keep_addresses(self) -> None:
        """Put back what somebody takes from lo, and try again for as long as that fails."""
        while await self._address_lost.wait():
            self._address_lost.clear()
            try:
                restored = await asyncio.to_thread(self.addresses.restore)
            except RuntimeError as error:       # there is no thread to be had
                log.error("cannot look for our addresses: %s", error)
                restored = False
            if not restored:
                self._loop.call_later(1, self._address_lost.set)

    async def provide(self, name: str, options: Options) -> None:
        """Make what a function's containers need of the network. Raises FaasdError."""
        if options.net == "egress":
            self._rules_watch.open()
            await self.run(self.egress.provide, name)
        elif options.net == "host":
            path = resolv_conf_path(self._settings.run_dir, "host")
            try:
                await asyncio.to_thread(write_anew, path, read_text(RESOLV_CONFS[0]))
            except OSError as error:
                raise storage_error(error, f"writing {path}") from error

    async def hold(self, name: str, options: Options) -> None:
        """Hold the ports that a function is to publish. Raises FaasdError; then it has those that it had."""
        if options.publish:
            self._rules_watch.open()
            await self.run(self.published.hold, name, places_of(options))

    async def republish(self, record: FunctionRecord) -> list[str]:
        """Publish those ports of a function that are free; return what is wrong with the others."""
        if not record.options.publish:
            return []
        try:
            self._rules_watch.open()
            errors = await self.run(self.published.hold_free, record.name, places_of(record.options))
            await self.publish(record.name, record)
        except FaasdError as error:
            return [str(error)]
        return [str(error) for error in errors]

    async def publish(self, name: str, record: FunctionRecord | None) -> None:
        """Have the ports that a function (None: it is gone) publishes lead to it, and no others. Raises FaasdError."""
        places = places_of(record.options) if record else []
        await self.run(self.published.publish, name, record.address if record else "", places)

    def withdraw(self, name: str) -> asyncio.Future:
        """Remove a function's egress network, if it has one, before any other is made."""
        return self.run(self.egress.remove, name)

    def run(self, function: Callable, *arguments) -> asyncio.Future:
        """Do something with egress networks or published ports, in their thread."""
        return self._loop.run_in_executor(self._network_thread, function, *arguments)


MAX_VERSIONS_KEPT = 10              # versions kept of one image


class Deploys:
    """The functions there are, and the only way in which they change: proved first, then written down, then in service.

    One change at a time goes on for each name. What is made for one is taken back, in reverse order, if it fails.
    """

    def __init__(self, settings: Settings, services: Services, addresses: Addresses):
        self.functions: dict[str, Function] = {}
        self.images = ImageStore(settings, services.host)
        self.attachments = Attachments(settings, addresses, services.host.workers)
        self.registry = Registry(settings.state_dir / "registry.json")
        self._settings, self._services, self._host = settings, services, services.host
        self.events = services.events
        self.changes: dict[str, str] = {}              # name → what is being done to it
        self._claimed: dict[str, str] = {}              # name → the address that it will have
        self._commit = asyncio.Lock()                   # from choosing an address to writing it down
        self._tasks = Tasks("a change")                 # and inspections, and removals of what is old
        self._stopping = False

    def in_order(self) -> list[Function]:
        return [self.functions[name] for name in sorted(self.functions)]

    def get(self, name: str) -> Function:
        if name not in self.functions:
            raise FaasdError(f"no function {name!r}: `faas list` shows the existing ones", status=404)
        return self.functions[name]

    def make_function(self, record: FunctionRecord) -> Function:
        path = self._settings.state_dir / "logs" / f"{record.name}.log"
        return Function(record, self._services, FunctionLog(path, self._services.logs), self.attachments.addresses)

    def describe(self, function: Function) -> dict:
        port = self._settings.port
        url = f"http://{function.record.address}" + (f":{port}" if port != 80 else "")
        return {**function.describe(), "port": port, "url": url}

    # -- changes --

    async def deploy(self, name: str, connection: socket.socket, length: str, tag: str, address: str, reset: bool,
                     query: dict[str, list[str]], secrets: dict[str, bytes | None]) -> tuple[bool, dict]:
        """Make an archive what a function runs, with its options, or the defaults, changed as a query says.

        connection and length are as unpack_main takes them; address is the one asked for, or "". Returns whether the
        function is new, and its description. Raises FaasdError, OSError.
        """
        before = self.functions[name].record if name in self.functions else None
        async with self._changing(name, "deploy") as undo:
            self._claim(name, before, address)
            now = before.versions[0] if before and not reset else NO_VERSION
            options = now.chosen.changed(query)
            kept, named = options.kept(query), sorted({*query, *options.chosen(), *now.named})
            self._check_warm(name, options)
            unpacked = self.images.unused_path()
            undo.push_async_callback(self.images.discard, unpacked)
            first_id = before.first_id if before else self._host.ids.take()
            if not before:
                undo.push_async_callback(self._forget, name, first_id)
            image = await self.images.unpack(connection, length, unpacked, tag, first_id)
            options = options.labelled(image["process"]["labels"], named)
            labelled = {key: value for key, value in options.chosen().items() if key in {*LABELLED} - {*named}}
            written = await self.images.put(name, unpacked, image, undo)
            files = await self._write_secrets(name, before.secrets if before else {}, secrets, undo)
            entry = self._next_version(before, image["version"], options, labelled=[*labelled], named=named)
            try:
                document = await self._install(name, entry, files, "replaced" if before else "deployed", undo, written)
            except FaasdError as error:
                hints = [f"from the image's labels: {', '.join(labelled)}"] * bool(labelled)
                hints += [f"kept from before: {', '.join(kept)}; `--reset` starts from the defaults"] * bool(kept)
                if hints and (error.status in (400, 422) or str(error).startswith("warm ")):
                    raise FaasdError(f"{error} ({'; '.join(hints).replace('_', '-')})", error.output,
                                     error.status) from error
                raise
            for line in image["warnings"]:
                log.warning("function=%s image: %s", name, line)
            return not before, {**document, "warnings": image["warnings"], "replaced": bool(before), "kept": kept,
                                "labelled": labelled}

    def _claim(self, name: str, before: FunctionRecord | None, address: str) -> None:
        """Keep the address that a new function asks for from others, until its deploy ends. Raises FaasdError."""
        if not address or before and address == before.address:
            return
        if before:
            raise Conflict(f"function {name} has {before.address} already: remove it to give it another address")
        self.attachments.addresses.check(address)
        taken = {other.record.address: other.record.name for other in self.functions.values()}
        taken |= {claimed: other for other, claimed in self._claimed.items()}
        if address in taken:
            raise Conflict(f"function {taken[address]} has {address}: ask for another address, or for none")
        self._claimed[name] = address

    async def _write_secrets(self, name: str, before: dict[str, str], changes: dict[str, bytes | None], undo: Undo
                             ) -> dict[str, str]:
        """Write the secrets that change; return the files of all that a function has, by name. Raises FaasdError."""
        kept = {key: file for key, file in before.items() if key not in changes}
        new = {key: value for key, value in changes.items() if value is not None}
        if len(kept) + len(new) > MAX_SECRETS:
            raise BadRequest(f"a function has at most {MAX_SECRETS} secrets (MAX_SECRETS)")
        if not new:
            return kept
        writing = self._host.workers.run(self.images.secrets.write, name, new)
        undo.push_async_callback(self._host.workers.run, self.images.secrets.keep, name, before.values())
        undo.push_async_callback(asyncio.wait, [writing])       # first: if we are cancelled, it goes on
        try:
            return kept | await asyncio.shield(writing)
        except OSError as error:
            raise storage_error(error, "writing secrets") from error

    @staticmethod
    def _next_version(before: FunctionRecord | None, image: str, options: Options, **choices: list[str]
                      ) -> VersionRecord:
        """Return the version that an image and options are: the one that a function runs, or a new one."""
        if before and (before.versions[0].image, before.versions[0].options) == (image, options):
            return replace(before.versions[0], **choices)
        return VersionRecord(1 + before.highest if before else 1, image, "", options, **choices)

    async def _forget(self, name: str, first_id: int) -> None:
        """Let go of what all containers of a function had in common."""
        self._host.ids.release(first_id)
        await asyncio.to_thread(self._host.volumes.forget, first_id)
        await asyncio.to_thread(self._host.forget, name)

    async def save(self, name: str, connection: socket.socket, query: dict[str, list[str]]) -> dict:
        """Send a client the image of a function, with its variables if a query has env=1. Raises FaasdError."""
        entry = self.get(name).record.versions[0]
        with self._until_stop():
            return await self.images.save(name, entry, connection, is_set(query, "env"))

    async def change(self, name: str, query: dict[str, list[str]]) -> dict:
        """Change options of a function as a query names them, which makes a version too. Raises FaasdError."""
        if not query:
            raise BadRequest("nothing to change: name an option")
        reset, function = read_switch(query.pop("reset", ["false"])[-1]), self.get(name)
        secrets = pop_secrets(query)
        async with self._changing(name, "change") as undo:
            image, now = function.record.versions[0].image, NO_VERSION if reset else function.record.versions[0]
            entry = self._next_version(function.record, image, now.options.changed(query), labelled=[
                key for key in now.labelled if key not in query], named=sorted({*query, *now.named}))
            files = await self._write_secrets(name, function.record.secrets, secrets, undo)
            return await self._install(name, entry, files, "set", undo)

    async def roll_back(self, name: str, query: dict[str, list[str]]) -> dict:
        """Go back to the version that a query names by number or image, or to the one before. Raises FaasdError."""
        wanted = query.get("version", [""])[-1]
        function = self.get(name)
        async with self._changing(name, "rollback") as undo:
            current, *others = function.record.versions
            if wanted == str(current.number):
                raise Conflict(f"function {name} runs version {wanted} already")
            if not others:
                raise Conflict(f"function {name} has no earlier version to go back to")
            found = next((entry for entry in others if wanted in ("", str(entry.number), entry.image)), None)
            if not found:
                raise FaasdError(f"function {name} has no version {wanted!r} to go back to: `faas versions {name}` "
                                 "shows the existing ones", status=404)
            return await self._install(name, found, function.record.secrets, "rolled back", undo)

    async def usage(self, query: dict) -> dict:
        """Return what functions take of the disk."""
        return await self._host.workers.run(self.images.usage, [function.record for function in self.in_order()])

    async def prune(self, query: dict) -> dict:
        """Remove the images that functions do not run, and with them the versions to go back to. Raises FaasdError."""
        usage, removed, busy = await self.usage({}), [], []
        for entry in usage["functions"]:
            old = [{"function": entry["name"], **image} for image in entry["images"]
                   if image["versions"] and not image["current"]]
            try:
                if old and await self._forget_versions(entry["name"], {image["image"] for image in old}):
                    removed += old
            except Conflict:
                busy.append(entry["name"])      # a change may need what it has
        if not self.changes:                   # else it is theirs
            await self.images.empty_tmp()
        changed = [self.functions[name] for name in {image["function"] for image in removed} & {*self.functions}]
        if tasks := [task for function in changed for task in function.retirements]:
            await asyncio.wait(tasks, timeout=DISCARD_SECONDS)
        holding = {function.record.name for function in changed if function.retirements}   # an image that is removed
        held = sum(image["size"] for image in removed if image["function"] in holding)
        return {"removed": removed, "busy": busy, "held": held,
                "freed": sum(image["size"] for image in removed) - held + (0 if self.changes else usage["tmp"])}

    async def _forget_versions(self, name: str, images: Collection[str]) -> bool:
        """Forget a function's versions with these images, which are then removed. Raises FaasdError."""
        async with self._changing(name, "prune"):
            if name not in self.functions:
                return False
            record = self.functions[name].record
            if record.versions[0].image in images:      # it was rolled back meanwhile
                raise Conflict(f"function {name} has changed")
            kept = replace(record, versions=[entry for entry in record.versions if entry.image not in images])
            await to_the_end(self._replace_record(kept))
        return True

    async def _replace_record(self, record: FunctionRecord) -> None:
        async with self._commit:
            await self._save(record.name, record)
            self.functions[record.name].record = record

    async def remove(self, name: str, query: dict) -> dict:
        """Drain a function and remove its address, images and log. Raises FaasdError."""
        function = self.get(name)
        async with self._changing(name, "removal"):
            await to_the_end(self._remove(function))        # a client that leaves must not leave it half removed
        return {"removed": name}

    async def _remove(self, function: Function) -> None:
        name, record = function.record.name, function.record
        async with self._commit:
            try:                        # they would lead to the function that has its address next
                await self.attachments.publish(name, None)
            except FaasdError as error:
                raise FaasdError(f"function {name} stays, because its ports cannot be taken from it: {error}") from None
            try:                        # what is removed from here on must not come back half after a crash
                await self._save(name, None)
            except BaseException:
                await self.republish(function)
                raise
            function.being_removed = True
        # In this order: invocations need the address until they end.
        function.stop_accepting(refuse_connections)
        await function.drain(self._settings.drain_timeout)
        await self.attachments.release(record.address)
        await self.attachments.withdraw(name)
        del self.functions[name]
        await self.images.keep(name, ())
        await self._host.workers.run(self.images.secrets.keep, name, ())
        await self._forget(name, record.first_id)
        function.log.end(remove=True)
        await self._services.logs.flush()
        log.info("function=%s removed", name)
        self.events.add(name, "removed")

    @contextlib.asynccontextmanager
    async def _changing(self, name: str, what: str) -> AsyncIterator[Undo]:
        """Have a name for one change; yield what takes it back if it fails. Raises FaasdError: 409, 503."""
        with self._until_stop():
            if name in self.changes:
                raise Conflict(f"function {name}: a {self.changes[name]} is under way, try again when it is done")
            if what == "deploy" and list(self.changes.values()).count(what) >= self._settings.max_uploads:
                raise FaasdError(f"{self._settings.max_uploads} deploys are under way already (--max-uploads): "
                                 "try again later", status=503)
            self.changes[name] = what
            undo = Undo()
            try:
                yield undo
            finally:
                try:
                    await to_the_end(undo.aclose())
                finally:
                    del self.changes[name]
                    self._claimed.pop(name, None)
                    self.remove_old_soon(name)

    @contextlib.contextmanager
    def _until_stop(self) -> Iterator[None]:
        """Have stop() cancel the running task and wait for its cleaning. Raises FaasdError: 503."""
        self._refuse_if_stopping()
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise FaasdError("faasd is stopping", status=503)

    def _check_warm(self, name: str, options: Options) -> None:
        """Raise Conflict if more warm containers are asked for than the daemon may have."""
        free = self._settings.max_warm - self.promised(name)
        if options.warm and options.warm > free:
            raise Conflict(f"warm {options.warm}: only {max(free, 0)} of {self._settings.max_warm} warm containers are "
                           "not promised to other functions; take fewer, or start faasd with a larger --max-warm")

    def promised(self, but: str = "") -> int:
        """Return how many warm containers functions have been promised, but for one of them."""
        return sum(f.record.options.warm or 0 for name, f in self.functions.items() if name != but)

    # -- the one way to run a version --

    async def _install(self, name: str, entry: VersionRecord, secrets: dict[str, str], what: str, undo: Undo,
                       *written: asyncio.Future) -> dict:
        """Prove a version, while its image is written, and make it the function's; describe that. Raises FaasdError."""
        self._check_warm(name, entry.options)
        contract = entry.options.contract
        if not self._host.supervises:
            if contract in ("server", "stdio"):
                raise FaasdError("faasd cannot answer containers' system calls on this machine, so servers and "
                                 "--contract stdio do not work: see the daemon's log", status=422)
            contract = "handler"
        entry = replace(entry, contract=contract, port=entry.options.port or 0 if contract in ("auto", "server") else 0)
        if not self.attachments.egress.has(name):
            undo.push_async_callback(self.attachments.withdraw, name)
        undo.push_async_callback(self.attachments.run, self.attachments.published.give_back, name)
        await self.attachments.hold(name, entry.options)
        await self.attachments.provide(name, entry.options)
        version, container, output = await self._prove(name, entry, secrets)
        undo.push_async_callback(container.kill)        # once more does no harm where its pool was closed
        await asyncio.gather(*written)  # a disk that loses its power keeps things in whatever order it likes
        function = await to_the_end(self._make_current(name, version, container, undo))
        for line in output:
            function.log.write_output(container.id, line)
        record = function.record
        function.log.write("-", ">", f"{what} version={record.version}")
        document = self.describe(function)
        endpoint = document["url"].removeprefix("http://")
        log.info("function=%s version=%s %s at %s", name, record.version, what, endpoint)
        self.events.add(name, what.replace(" ", "-"), version=str(record.version), address=endpoint)
        return document

    async def _prove(self, name: str, entry: VersionRecord, secrets: dict[str, str]
                     ) -> tuple[Version, Container, list[str]]:
        """Start one container; return it once it is ready, with what it runs and what it printed. Raises FaasdError.

        What it turns out to be is proved by another, which is what all others will be. It takes no place among the
        starts allowed at a time: a deploy should not wait for a flood to end.
        """
        version = await self._host.workers.run(self.images.version, name, entry, secrets)
        output: list[str] = []
        container = Container(self._host, name, lambda container_id, text: output.append(text))
        try:
            await container.start(version.bundle, version.options.start_timeout, entry.contract == "server")
        except StartFailed as failure:
            exited = failure.status == 502 and not isinstance(failure, RuntimeFailed)
            retries = failure.status == 504 and not container.kinds     # what it may not do, as some do for ever
            if entry.contract == "auto" and version.image["process"]["uid"] == 0 and (exited or retries):
                try:                    # it may need the capabilities of a server to begin
                    return await self._prove(name, replace(entry, contract="server"), secrets)
                except FaasdError as error:     # of the two failures, that for which we have refused it less
                    if isinstance(error.__cause__, EndedAtOnce):
                        raise
                    if error.status == 422 and exited:
                        raise FaasdError(f"{error}; it did not connect to {CONTROL_SOCKET} either", error.output,
                                         422) from None
            # By now the machine may be to blame, not the image.
            if isinstance(failure, RuntimeFailed) and (error := await try_container(self._host)):
                raise unfit_machine(self._host.runtime, error) from None
            raise FaasdError(f"function {name} does not start: {failure}", failure.output, 422) from failure
        known = replace(entry, contract=container.contract, port=container.port)
        if known == entry:
            return version, container, output
        await to_the_end(container.kill())
        return await self._prove(name, known, secrets)

    async def _make_current(self, name: str, version: Version, container: Container, undo: Undo) -> Function:
        """Make a version the function's, on disk and in service. Undoes what it did if it cannot be written down."""
        async with self._commit:
            self._refuse_if_stopping()          # stop() waits for the lock, and then for nobody else
            self._check_warm(name, version.options)     # again: another may have been promised them meanwhile
            function = self.functions.get(name)
            record = self._next_record(name, function, version)
            listener = None
            if function and function.pool:      # else it is new, or broken
                await asyncio.to_thread(self.attachments.addresses.add, record.address)  # somebody may have taken it
            else:
                listener = await self.attachments.listen(record.address)
            try:
                await self.attachments.publish(name, record)
                await self._save(name, record)
            except BaseException:
                if listener:                    # first: what follows may fail, as the rules may just have done
                    refuse_connections(listener)
                    await self.attachments.release(record.address)
                await self.attachments.publish(name, function and function.record)
                raise
            undo.pop_all()                      # what is written down stays
            function = self.functions.setdefault(name, function or self.make_function(record))
            # What runs has what it has read; a change that comes now writes files with other names.
            replaced = {*function.record.secrets.values()} - {*record.secrets.values()}
            self._host.workers.run(self.images.secrets.remove, name, replaced)
            function.record, function.being_removed = record, False     # True: a removal has failed in its middle
            function.replace_version(version, container)
            if listener:
                function.entrance.open(listener)
            return function

    def _next_record(self, name: str, function: Function | None, version: Version) -> FunctionRecord:
        """Return the record of a function with a version on top of its older ones. Raises Conflict."""
        before, now = function.record if function else None, timestamp()
        addresses = self.attachments.addresses
        taken = [*(other.record.address for other in self.functions.values()), *self._claimed.values()]
        address = (before.address if before and addresses.has(before.address) else
                   self._claimed.get(name) or addresses.lowest_free(taken))
        entry = replace(version.record, deployed=now, created=version.record.created or version.record.deployed or now)
        others = [other for other in (before.versions if before else []) if other.number != entry.number]
        return FunctionRecord(name, address, version.bundle.first_id, before.created if before else now, now,
                              self._worth_keeping([entry, *others]), version.secrets, before.highest if before else 0)

    def _worth_keeping(self, versions: list[VersionRecord]) -> list[VersionRecord]:
        """Return the versions of the images used last, and of each image those that ran last: images take room."""
        images = list(dict.fromkeys(entry.image for entry in versions))[:self._settings.keep_versions]
        last = {image: [entry for entry in versions if entry.image == image][:MAX_VERSIONS_KEPT] for image in images}
        return [entry for entry in versions if entry in last.get(entry.image, ())]

    async def _save(self, name: str, record: FunctionRecord | None) -> None:
        """Write the functions down, one with this record, or without it. Raises FaasdError; then all is as before."""
        records = {function.record.name: function.record for function in self.functions.values()
                   if not function.being_removed} | {name: record}
        kept = list(filter(None, records.values()))
        await asyncio.to_thread(self.registry.save, kept)
        await self.write_names(kept)

    async def republish(self, function: Function) -> None:
        """Publish a function's ports after a start. Some may be taken, or an address not be there yet: go on trying."""
        name, errors = function.record.name, await self.attachments.republish(function.record)
        if errors:
            log.warning("function=%s %s; trying again", name, "; ".join(errors))
            self._tasks.start(self._republish_later(function))

    async def _republish_later(self, function: Function) -> None:
        name = function.record.name
        while True:
            await asyncio.sleep(PORT_RETRY_SECONDS)
            async with self._commit:            # so that its record stays, and with it what it publishes
                if self.functions.get(name) is not function or function.being_removed:
                    return
                if not await self.attachments.republish(function.record):
                    log.info("function=%s all its ports are published again", name)
                    return

    async def write_names(self, records: Iterable[FunctionRecord]) -> None:
        """Put the functions' names where resolvers and containers find them; failure is logged."""
        text = "".join(f"{record.address}\t{record.name}.{self._settings.domain}\n" for record in records)
        try:
            await asyncio.to_thread(write_anew, self._settings.run_dir / NAMES, text, self._settings.run_dir)
        except OSError as error:
            log.error("cannot write the names of functions: %s", error)

    # -- what is old --

    def remove_old_soon(self, name: str) -> None:
        """Remove images and a network that a function does not need, once no container runs on a replaced version."""
        if not self._stopping:
            self._tasks.start(self._remove_old(name))

    async def _remove_old(self, name: str) -> None:
        if function := self.functions.get(name):
            await function.retirements.finish()
            # What a change under way may need stays: it comes here again when it ends. So there is no await in between.
            if self.functions.get(name) is function and name not in self.changes:
                if function.record.options.net != "egress":
                    self.attachments.withdraw(name)
                await self.images.keep(name, [entry.image for entry in function.record.versions])

    # -- for the daemon --

    async def inspect(self, name: str, query: dict) -> dict:
        """Return how a container of a function is isolated: one that is there, or one that is started for it."""
        pool = self.get(name).pool
        if pool is None:
            raise Conflict(f"function {name} is broken: `faas info {name}` says why")
        with self._until_stop():
            if pool.idle:
                return await self._host.workers.run(self._host.inspect, next(reversed(pool.idle)))
            _, container, _ = await self._prove(name, self.get(name).record.versions[0], self.get(name).record.secrets)
            try:
                return await self._host.workers.run(self._host.inspect, container)
            finally:
                await to_the_end(container.kill())

    async def execute(self, name: str, *arguments) -> tuple[int | None, str]:
        """Run a command as Function.execute does, until stop()."""
        function = self.get(name)
        with self._until_stop():
            return await function.execute(*arguments)

    async def stop(self) -> list[asyncio.Task]:
        """Begin no more changes; cancel those under way, unless being written down, and return their tasks."""
        self._stopping = True
        async with self._commit:
            pass
        self._tasks.cancel()
        return list(self._tasks)


# ---------------------------------------------------------------------------------------------------------------------
# The daemon: restart, life, stop
# ---------------------------------------------------------------------------------------------------------------------


class Restart:
    """What the daemon before left: containers that serve clients go on, functions come back, all else is removed."""

    def __init__(self, settings: Settings, host: ContainerHost, deploys: Deploys):
        self._settings, self._host, self._deploys = settings, host, deploys
        self.leftovers = Leftovers(host)
        self._records: list[FunctionRecord] = []
        self.survivors: list[Survivor] = []     # the containers that serve clients

    async def clear(self) -> None:
        """Find what goes on, and remove what was left half done: containers, images, uploads. Raises FaasdError."""
        self._records = self._deploys.registry.load()
        names = {record.name for record in self._records}
        self._host.ids.taken.update(record.first_id for record in self._records)
        try:
            self._host.prepare()
            self.survivors = await self.leftovers.survivors({record.name: record.address for record in self._records})
            self._deploys.registry.clear()
            kept = {(record.name, entry.image) for record in self._records for entry in record.versions}
            kept |= {(survivor.function, survivor.image) for survivor in self.survivors}
            await self._deploys.images.clear(kept)
            self._deploys.images.secrets.clear({record.name: record.secrets.values() for record in self._records})
            for path in (self._settings.state_dir / "logs").glob("*.log*"):
                if path.name.split(".")[0] not in names:
                    path.unlink()
            self._deploys.attachments.egress.recover({one.name for one in self._records if one.options.net == "egress"})
        except OSError as error:
            raise storage_error(error, f"clearing what an earlier faasd left at {error.filename}") from error

    async def restore(self) -> None:
        """Bring all functions back on their addresses, with their containers that serve clients."""
        known = {record.address for record in self._records}
        await self._move()
        self._deploys.attachments.published.recover({
            one.name: (one.address, places_of(one.options)) for one in self._records if one.options.publish})
        for record in self._records:
            await self._restore(record, [entry for entry in self.survivors if entry.function == record.name])
        if self._deploys.promised() > self._settings.max_warm:
            log.warning("functions were promised %d warm containers, and --max-warm is %d: some get fewer",
                        self._deploys.promised(), self._settings.max_warm)
        await self._deploys.attachments.run(self._deploys.attachments.published.remove_stale)
        await self._deploys.write_names(self._records)
        self._deploys.attachments.listeners.forget_unclaimed()
        self._deploys.attachments.addresses.remove_stale(known)

    async def _move(self) -> None:
        """Give functions an address of this subnet if theirs is of another. Clients that they serve there are cut."""
        addresses, moved = self._deploys.attachments.addresses, set()
        for record in [record for record in self._records if not addresses.has(record.address)]:
            with contextlib.suppress(Conflict):         # there is no free one, which _restore says
                before, record.address = record.address, addresses.moved(
                    record.address, [other.address for other in self._records])
                log.warning("function=%s its address is %s now: %s is not in %s", record.name, record.address,
                            before, self._settings.subnet)
                moved.add(record.name)
        for survivor in [survivor for survivor in self.survivors if survivor.function in moved]:
            self.survivors.remove(survivor)
            await self._host.workers.finished([self._host.workers.run(self.leftovers.end, survivor)])
        if moved:
            try:
                await asyncio.to_thread(self._deploys.registry.save, self._records)
            except FaasdError as error:         # the next start moves them again
                log.error("the new addresses are not written down: %s", error)

    async def _restore(self, record: FunctionRecord, survivors: list[Survivor]) -> None:
        """Bring a function back. Whatever the reason why it cannot be, it is kept, as broken, and the others go on."""
        name = record.name
        function = self._deploys.functions[name] = self._deploys.make_function(record)
        try:
            if not self._deploys.attachments.addresses.has(record.address):
                raise FaasdError(f"its address {record.address} is not in {self._settings.subnet}, which has no free "
                                 "one: start faasd with a larger --subnet")
            version = await self._host.workers.run(
                self._deploys.images.version, name, record.versions[0], record.secrets)
            await self._deploys.attachments.provide(name, record.options)
            listener = await self.bind(lambda: self._deploys.attachments.listen(record.address), self._settings.port)
            function.replace_version(version)
            function.entrance.open(listener)
            await self._deploys.republish(function)
            if survivors:
                self._deploys.remove_old_soon(name)
                function.adopt(survivors)
        except Exception as error:
            function.error = str(error) if isinstance(error, FaasdError) else f"{error!r}; faasd's log has the detail"
            log.error("function=%s is broken: %s", name, function.error,
                      exc_info=None if isinstance(error, FaasdError) else error)
            self._deploys.events.add(name, "broken", by="faasd", reason=function.error)
        for survivor in survivors:              # adopt takes them off the list
            await self._host.workers.finished([self._host.workers.run(self.leftovers.end, survivor)])

    async def bind(self, open_: Callable, port: int):
        """Return what open_ opens. If a container of ours has taken the port, end it and try again."""
        try:
            return await open_()
        except (Conflict, UsageError):
            if not await self.leftovers.end_holders(port):
                raise
        return await open_()


STOP_SECONDS = 20.0                 # that each step of a stop waits for what should have ended long ago


class Daemon:
    """The life of this process: it puts all parts together, serves until a signal comes, and stops."""

    def __init__(self, settings: Settings, addresses: Addresses, ids: IdRanges):
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        # By its full name: it is started with a PATH that may differ from ours.
        self._runtime = Runtime(shutil.which(settings.runtime) or settings.runtime, settings.run_dir / "runc")
        self._host = ContainerHost(settings.run_dir, self._runtime, ids, settings.subnet, settings.port,
                                   Volumes((settings.state_dir, settings.run_dir)))
        eighth, logs = self._host.descriptors.limit // 8, Writer(write_logs, 100_000, LOG_DELAY)
        self._services = Services(
            self._host, Starter(CPUS, self._loop), WarmLimit(settings.max_warm),
            HangupWatch(self._loop), Crowd(min(MAX_SILENT, eighth)), Crowd(min(MAX_ANSWERING, eighth)),
            LoopLag(self._loop), logs, Events(settings.state_dir / "events.log", logs))
        self._deploys = Deploys(settings, self._services, addresses)
        self._restart = Restart(settings, self._host, self._deploys)
        self._servers: list[ControlServer] = []
        self._stop_signals: asyncio.Queue[int] = asyncio.Queue()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain, or until SIGHUP, then pass invocations on. Raises FaasdError."""
        token = read_token(self._settings.api_token_file) if self._settings.api else b""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()      # by nohup(1)
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} - ignored:
            self._loop.add_signal_handler(number, self._stop_signals.put_nowait, number)
        runtime = self._runtime.version()
        log.info("faasd %s, %s, Linux %s", __version__, runtime, platform.release())
        warning = runc_warning(runtime) and runc_warning(
            runtime, await asyncio.to_thread(package_changelog, self._runtime.program))
        for line in filter(None, (warning, *machine_warnings())):
            log.warning("%s", line)
        await self._restart.clear()
        stop = self._pass_on if self._restart.survivors else self._drain        # if this daemon cannot start
        try:
            await probe_machine(self._host)
            await asyncio.to_thread(self._deploys.attachments.guard)
            await self._serve(Answers(self._settings, self._services, self._deploys, runtime), token)
            stop = self._pass_on if await self._stop_signals.get() == signal.SIGHUP else self._drain
        finally:
            longest = 2 * self._settings.drain_timeout + 5 * STOP_SECONDS  # that clients and handlers can make it last
            notify_service_manager(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={longest * 1e6:.0f}")
            await stop()

    async def _serve(self, answers: Answers, token: bytes) -> None:
        """Bring the functions back, and let clients in."""
        api, attachments = self._settings.api, self._deploys.attachments
        attachments.listeners.forget_unclaimed(         # those of another --api or --port may be in the way of ours
            lambda place: place == api or place[1] == self._settings.port and attachments.addresses.has(place[0]))
        if api:                         # clients wait until we are ready
            self._servers.append(await self._restart.bind(lambda: asyncio.to_thread(
                TcpControlServer, api, token, self._settings.api_host, answers, attachments.listeners), api[1]))
        await self._restart.restore()
        self._servers.insert(0, ControlServer(self._settings.run_dir / "faasd.sock", answers))
        for server in self._servers:
            server.open()
        log.info("ready: %d functions, subnet %s, control API at %s", len(self._deploys.functions),
                 self._settings.subnet, ", ".join(map(str, self._servers)))
        notify_service_manager("READY=1")

    async def _drain(self) -> None:
        """Stop: let all invocations finish, and leave nothing behind."""
        changes = await self._deploys.stop()
        await self._deploys.attachments.run(self._deploys.attachments.published.turn_away)
        asked_again = await self._turn_away()
        await self._end("stopping", changes, set())
        await asyncio.sleep(asked_again - self._loop.time())
        await self._restart.leftovers.remove(STOP_SECONDS)      # there should be none
        await self._deploys.attachments.remove_all()
        await self._deploys.attachments.finish()
        self._host.dismantle()
        self._deploys.images.remove_program()
        log.info("stopped")

    async def _pass_on(self) -> None:
        """Stop: leave what serves a client, and all that it needs, to the next daemon."""
        changes = await self._deploys.stop()
        left = {function for function in self._deploys.functions.values() if not function.being_removed}
        if "NOTIFY_SOCKET" in os.environ:               # the service manager keeps the sockets
            # Where clients wait for the end of an invocation, or of a long start. The other functions go on meanwhile.
            long = self._loop.time() - LONG_START_SECONDS
            first = {one for one in left if any(not one.entitled or client.accepted < long for client in one.waiting)}
            for function in first:
                function.stop_accepting(socket.socket.close)
            await self._end_invocations(first, first, [])
        else:
            await self._turn_away()
        await self._end("leaving", changes, left)
        await self._deploys.attachments.finish()
        log.info("left")

    async def _turn_away(self) -> float:
        """Let no connection begin any more, and wait for clients who have one to say something.

        They would be reset if nobody listened then: a balancer could not tell that nobody has read what they said, and
        must not send a POST to anybody else. Return the loop time by which newcomers have asked again: they are refused
        then, as long as the addresses are there, or met by the next daemon.
        """
        entrances = [function.entrance for function in self._deploys.functions.values()]
        for entrance in entrances:
            entrance.turn_away()
        await asyncio.sleep(ARRIVAL_SECONDS if entrances else 0)
        return self._loop.time() + (SYN_SECONDS if any(entrance.has_turned_away for entrance in entrances) else 0)

    async def _end(self, what: str, changes: list[asyncio.Task], left: set[Function]) -> None:
        """Let nobody in any more; end everything except the invocations of functions that are left."""
        functions = self._deploys.functions
        for server in self._servers:
            server.close(socket.socket.close if what == "leaving" else refuse_connections)
        for function in functions.values():
            function.stop_accepting(socket.socket.close if function in left else refuse_connections)
        running = sum(function.running for function in functions.values())
        log.info("%s: %d invocation%s running", what, running, "" if running == 1 else "s")
        await self._end_invocations(functions.values(), left, changes)
        await self._host.workers.finished(self._host.workers.pending)           # output that was being read
        await self._services.logs.flush()
        for one in (*(function.log for function in functions.values()), self._services.events):
            one.end()
        deadline = self._loop.time() + 5        # by which everybody has their answer
        while ((self._deploys.changes or any(server.connections for server in self._servers))
               and self._loop.time() < deadline):
            await asyncio.sleep(0.01)
        self._deploys.attachments.close()
        await self._deploys.images.empty_tmp()

    async def _end_invocations(self, functions: Collection[Function], left: set[Function], changes: list) -> None:
        """Drain functions, or leave them; until a second signal, clients have the drain timeout."""
        ends = Tasks("the end of a function")
        def end_all(timeout: float) -> asyncio.Future:
            for one in functions:
                ends.start(one.pass_on(timeout) if one in left else one.drain(timeout))
            return asyncio.ensure_future(ends.finish())
        first = end_all(self._settings.drain_timeout)
        second = asyncio.ensure_future(self._stop_signals.get())
        limit = self._settings.drain_timeout + STOP_SECONDS
        await asyncio.wait([first, second], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        at_once = second.done() or not first.done()
        second.cancel()
        if at_once:
            self._stop_signals.put_nowait(signal.SIGTERM)       # for the functions that come after these
        if not first.done():
            log.warning("stopping at once")
            await asyncio.wait([end_all(0)], timeout=STOP_SECONDS)
        if (await asyncio.wait([first, *changes], timeout=STOP_SECONDS))[1]:
            log.error("not everything has ended: what is left of it is removed, or is for the next daemon")


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and what must be so before the daemon runs
# ---------------------------------------------------------------------------------------------------------------------


class Settings(argparse.Namespace):
    """What parse_arguments makes of the command line: an attribute for each option."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"faasd: {escape_controls(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; packaging/generate makes the manual page from it."""
    parser = Parser(prog=os.path.basename(sys.argv[0]), description="A serverless runtime for one Linux machine.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, none = parser.add_argument, argparse.SUPPRESS          # a default that --help does not show
    add("--state-dir", type=resolved_path, default="/var/lib/faasd", help="images, registry and logs")
    add("--run-dir", type=resolved_path, default="/run/faasd", help="control socket and containers")
    add("--subnet", type=parse_subnet, default="10.0.0.0/24", metavar="CIDR",
        help="network that functions get addresses from, starting at .10")
    add("--port", type=parse_port, default="80", help="the port functions listen on")
    # Of RFC 2544's range for tests of network equipment: routed nowhere, and hardly ever anybody's network, unlike
    # 10/8, 172.16/12, 192.168/16 (LANs, VPNs, Docker), 100.64/10 (carriers, Tailscale), 169.254/16 (which we block).
    add("--egress-subnet", type=parse_egress_subnet, default="198.18.0.0/20", metavar="CIDR",
        help="network for functions with --net egress, which only this machine sees")
    add("--domain", type=parse_domain, default="faas", metavar="NAME",
        help="domain of the functions' names in RUN_DIR/hosts/functions, such as NAME.faas")
    add("--lan", choices=["allow", "deny"], default="deny",
        help="whether other machines reach functions if they route --subnet here; they always reach published ports")
    add("--runtime", default="runc", metavar="PROGRAM", help="runc, or an OCI runtime that takes the same command line")
    add("--drain-timeout", type=parse_duration, default="30s", metavar="TIME",
        help="how long running invocations may go on after SIGTERM, and waiting clients after SIGHUP")
    add("--max-image-size", type=parse_size, default="16g", metavar="SIZE",
        help="size limit for an archive, for its uncompressed layers, and for their files")
    add("--max-image-entries", type=parse_count, default="1000000", metavar="N",
        help="how many files an image may have")
    add("--max-warm", type=parse_amount, default=none, metavar="N",
        help="how many containers of all functions together may wait for clients (default: 16 for each CPU, or "
             "one for each 64 MiB of memory if that is fewer)")
    add("--max-uploads", type=parse_count, default="8", metavar="N",
        help="how many images may be received and unpacked at a time")
    add("--keep-versions", type=parse_count, default="3", metavar="N",
        help="images kept of each function for rollback, with the options that they ran with")
    add("--api", type=parse_endpoint, default=none, metavar="HOST:PORT",
        help="serve the control API on TCP too, for instance at 127.0.0.1:9000")
    add("--api-token-file", type=Path, default=none, metavar="FILE",
        help="a file with the token that its clients must send")
    add("--api-host", type=str.lower, action="append", default=none, metavar="NAME",
        help="another name by which clients reach it: a proxy's, or a translated address")
    add("--log-format", choices=["text", "json"], default="text", help="format of the daemon's own log")
    add("-v", "--verbose", action="store_true", help="log every invocation")
    add("--check", action="store_true", help="check these options and what is installed, and exit")
    add("--version", action="version", version=f"faasd {__version__}")
    return parser


def parse_arguments(argv: list[str]) -> Settings:
    """Return the settings of a command line; exits with status 2 and a line on bad usage, as argparse does."""
    parser = build_parser()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    settings = parser.parse_args(argv, Settings(
        api=None, api_token_file=None, api_host=[], max_warm=max(1, min(16 * CPUS, memory // (64 * MIB)))))
    if settings.api and not settings.api_token_file:
        parser.error(f"--api needs --api-token-file FILE; {MAKE_TOKEN}")
    if settings.api_token_file and not settings.api:
        parser.error("--api-token-file is of use with --api HOST:PORT only")
    if settings.api == ("0.0.0.0", settings.port):
        parser.error(f"--api 0.0.0.0:{settings.port} takes --port {settings.port} from functions: change one of them")
    return settings


parse_domain = reader("domain", r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*",
                      "write names of a-z, 0-9 and '-', with dots between")


def resolved_path(text: str) -> Path:
    """Return an absolute path without links: runc takes paths relative to the bundle, the mount table has real ones.

    Raises BadRequest for a link of another user's, such as there may be in /tmp: they would choose the directory.
    """
    path, rest, links = Path("/"), [*reversed(Path(text).absolute().parts[1:])], 0
    while rest:
        name = rest.pop()
        path = path.parent if name == ".." else path / name
        with contextlib.suppress(OSError), opened(path, os.O_PATH) as component:
            status = os.fstat(component)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > MAX_LINK_HOPS or status.st_uid not in (0, sudo_id("UID")):
                    raise BadRequest(f"{path} is a link that leads nowhere, or another user's: name the directory "
                                     "itself")
                target = Path(os.readlink("", dir_fd=component))
                path = Path("/") if target.is_absolute() else path.parent
                rest += [name for name in reversed(target.parts) if name != "/"]
    return path


def sudo_id(kind: str) -> int:
    """Return the UID or GID of the user who ran sudo to start us, 0 if nobody did."""
    number = os.environ.get(f"SUDO_{kind}", "0")
    return int(number) if number.isdecimal() else 0


def parse_subnet(text: str, least: int = 16, advice: str = f"addresses start at .{FIRST_HOST}, so use /28 or larger"
                 ) -> ipaddress.IPv4Network:
    """Return an IPv4 network of so many addresses at least. Raises BadRequest."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise BadRequest(f"bad subnet: {error}; write 10.0.0.0/24") from None
    if network.num_addresses < least:
        raise BadRequest(f"subnet {text} is too small: {advice}")
    return network


# With room for a gateway and a function.
parse_egress_subnet = functools.partial(parse_subnet, least=4, advice="use /30 or larger")

parse_port = reader("port", r"(?!0+$)[0-9]{1,5}", "write a number from 1 to 65535", lambda match: int(match[0]), 65535)


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return address and port of `127.0.0.1:9000` or `[::1]:9000`. Raises BadRequest."""
    host, colon, port = text.rpartition(":")
    try:
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ValueError
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))), parse_port(port)
    except ValueError:
        raise BadRequest(f"bad address {text!r}: write 127.0.0.1:9000 or [::1]:9000") from None


MAKE_TOKEN = "make one with: (umask 077; head -c 24 /dev/urandom | base64 > FILE)"
MIN_TOKEN_LENGTH = 16               # characters


def read_token(path: Path) -> bytes:
    """Return the token in a file that nobody else can read. Raises UsageError."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:     # it may be a FIFO
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"--api-token-file {path} is no regular file; {MAKE_TOKEN}")
            mend = [*([f"chown root {path}"] if status.st_uid not in (0, sudo_id("UID")) else []),
                    *([f"chmod 600 {path}"] if status.st_mode & 0o077 else [])]
            if mend:
                raise UsageError(f"--api-token-file {path} is open to others: {' && '.join(mend)}")
            token = file.read(4 * KIB).strip()
    except OSError as error:
        raise UsageError(f"cannot read --api-token-file {path}: {error.strerror}; {MAKE_TOKEN}") from error
    if not re.fullmatch(rb"[!-~]+", token) or len(token) < MIN_TOKEN_LENGTH:
        raise UsageError(f"--api-token-file {path} needs {MIN_TOKEN_LENGTH} characters or more, in one word of ASCII; "
                         f"{MAKE_TOKEN}")
    return token


STATE_DIRECTORIES = {"images": 0o711, "logs": 0o700, "secrets": 0o700, "tmp": 0o700}   # below STATE_DIR, their modes
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
CONTAINER_LIMITS = {            # what the kernel gives the first process, but for core dumps; the rest has cgroups
    resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_FSIZE: UNLIMITED, resource.RLIMIT_CPU: UNLIMITED,
    resource.RLIMIT_DATA: UNLIMITED, resource.RLIMIT_AS: UNLIMITED, resource.RLIMIT_MEMLOCK: (8 * MIB, 8 * MIB),
    resource.RLIMIT_STACK: (8 * MIB, resource.RLIM_INFINITY), resource.RLIMIT_NICE: (0, 0),
    resource.RLIMIT_RTPRIO: (0, 0)}


def check_machine(settings: Settings) -> None:
    """Raise UsageError if faasd cannot run here."""
    if shutil.which(settings.runtime) is None:
        raise UsageError(f"no {settings.runtime} on this machine: apt install {Path(settings.runtime).name}, "
                         "or name an OCI runtime with --runtime")
    if shutil.which("ip") is None:
        raise UsageError("no ip command on this machine: apt install iproute2")
    longest = len(os.fsencode(settings.run_dir / "containers" / ("0" * 12) / "control.sock"))
    if longest > 107:                   # sun_path in unix(7), less the final NUL
        raise UsageError(f"--run-dir {settings.run_dir} is too long for the name of a Unix socket")


def machine_warnings() -> Iterator[str]:
    """Yield a line for each thing of this machine that faasd has to do without."""
    if read_text("/proc/sys/kernel/yama/ptrace_scope").strip() == "3":
        yield ("kernel.yama.ptrace_scope is 3, so what serves clients over a restart goes on, but we cannot answer in "
               "its place: boot with a lower one if that matters")
    if read_text("/proc/sys/net/ipv4/tcp_syncookies").strip() in ("", "0"):
        yield ("SYN cookies are off, so clients that say nothing can keep others from connecting: "
               "sysctl net.ipv4.tcp_syncookies=1")
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors < 4096:              # a function may need 4 * 64 + 1024 (its defaults)
        yield (f"only {descriptors} file descriptors are allowed, too few for many clients: raise the hard limit "
               "(ulimit -Hn, LimitNOFILE)")


@contextlib.contextmanager
def unless_refused(settings: Settings) -> Iterator[None]:
    """Remove the parts of RUN_DIR and STATE_DIR that the block makes, if it fails; but no function."""
    made = [(directory, top) for directory in (settings.state_dir, settings.run_dir)
            for top in [path for path in (directory, *directory.parents) if not os.path.lexists(path)][-1:]]
    try:
        yield
    except FaasdError:
        registry = settings.state_dir / "registry.json"
        for directory, top in made:
            if not (registry.is_relative_to(top) and os.path.lexists(registry)):
                with contextlib.suppress(FaasdError), lock_directory(directory):    # unless another has just taken it
                    shutil.rmtree(top, ignore_errors=True)
        raise


def take_directories(settings: Settings) -> None:
    """Make RUN_DIR and STATE_DIR, and make sure that they are ours. Changes nothing in them. Raises UsageError."""
    state = settings.state_dir
    for name, directory, mode in (("--state-dir", state, 0o711), ("--run-dir", settings.run_dir, 0o755)):
        try:
            directory.mkdir(mode, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {error.filename}: {error.strerror}") from error
        check_directory(name, directory)
    if os.statvfs(state).f_flag & os.ST_NOEXEC:
        mount = next(path for path in [state, *state.parents] if os.path.ismount(path))
        raise UsageError(f"--state-dir {state} has the images, whose programs cannot be run on {mount}, which "
                         f"is mounted noexec: mount -o remount,exec {mount}, or choose another directory")
    taken = [name for name in STATE_DIRECTORIES if os.path.lexists(state / name)]
    if taken and not any((state / name).exists() for name in ("faasd.lock", "registry.json")):
        raise UsageError(f"--state-dir {state} has a directory {taken[0]} already, and not from faasd, which would "
                         "empty its own: choose another directory")


def lay_out(state: Path) -> None:
    """Make the directories in STATE_DIR, which is locked. Raises UsageError."""
    try:
        # Containers, whose root is an unprivileged user of the host, pass through to their image.
        state.chmod(stat.S_IMODE(state.stat().st_mode) | stat.S_IXGRP | stat.S_IXOTH)
        for name, mode in STATE_DIRECTORIES.items():
            (state / name).mkdir(exist_ok=True)
            (state / name).chmod(mode)
    except OSError as error:
        raise UsageError(f"cannot make {error.filename}: {error.strerror}") from error


def check_directory(option: str, directory: Path) -> None:
    """Raise UsageError if another user could replace a directory of ours, or put files of their own in it.

    The path has no links: if there is one now, somebody has just made it. Nobody else can change a path that passes.
    """
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{option} {directory} is open to others than root, who could replace its files: "
                         f"chown root {directory} && chmod go-w {directory}")
    for parent in directory.parents:
        status = parent.lstat()
        mode = status.st_mode
        writers = stat.S_IWOTH if status.st_gid in (0, sudo_id("GID")) else stat.S_IWOTH | stat.S_IWGRP
        with contextlib.suppress(OSError):      # no access list; what it allows shows as the group's (acl(5))
            writers |= stat.S_IWGRP if os.getxattr(parent, ACL_XATTRS[0]) else 0
        if mode & writers and not mode & stat.S_ISVTX:
            raise UsageError(f"{option} {directory}: not only root can rename what is in {parent}: chmod go-w "
                             f"{parent}, or choose another directory")
        if not stat.S_ISDIR(mode) or status.st_uid not in (0, sudo_id("UID")):
            raise UsageError(f"{option} {directory}: {parent} belongs to another user (uid {status.st_uid}), who can "
                             f"rename what is in it: chown root {parent}, or choose another directory")
        if not mode & stat.S_IXOTH:
            raise UsageError(f"{option} {directory}: containers run as unprivileged users, which {parent} does not "
                             f"let pass: chmod o+x {parent}, or choose another directory")


def lock_directory(directory: Path) -> BinaryIO:
    """Lock DIRECTORY/faasd.lock until the process ends. Raises UsageError if another daemon has it.

    Whoever can open a file can lock it (flock(2)), so ours is root's alone. One that others can open counts only while
    root holds it. We replace it: others may have it open still.
    """
    path = directory / "faasd.lock"
    try:
        while True:
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "ab")
            status = os.fstat(file.fileno())
            private = status.st_uid == 0 and status.st_mode & 0o077 == 0
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = lock_holder(path)
                if private or holder and is_roots(holder):
                    ours = "/faasd.service\n" in read_text(f"/proc/{holder}/cgroup")
                    service = " as a service (systemctl status faasd)" if ours else ""
                    raise UsageError(f"faasd is already running on {directory}{service}: stop it, or choose another "
                                     "--state-dir and --run-dir") from None
            with contextlib.suppress(FileNotFoundError):
                if private and os.path.samestat(status, path.lstat()):      # else somebody has replaced it meanwhile
                    with contextlib.suppress(OSError):          # a full disk: then nobody can say whose lock it is
                        os.pwrite(file.fileno(), b"%-10d" % os.getpid(), 0)
                    return file
            file.close()
            if not private:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {directory}: {error.strerror}") from error


def lock_holder(path: Path) -> int:
    """Return the pid of the process that has locked a file: the last to do so has written it there. Raises OSError.

    0 if none has. /proc/locks has everybody's: whoever reads it waits half a minute for a user who makes 200,000. So
    only a lock that others can open, of faasd 0.1.0, is looked up there.
    """
    status = path.stat()
    if status.st_mode & 0o077 == 0:
        return int(path.read_text() or 0)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    holder = re.search(rf"FLOCK .* ([0-9]+) {file} ", Path("/proc/locks").read_text())
    return int(holder[1]) if holder else 0


def is_dead_with_lock(path: Path) -> bool:
    """Return whether a process was killed, and still has a file locked because not all of its threads have ended."""
    with contextlib.suppress(OSError), path.open() as file:         # there is no such file, or no such process
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Path(f"/proc/{lock_holder(path)}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    return False


def outlive_containers(run_dir: Path) -> None:
    """End the containers of a killed daemon that keep a thread of it, and so its locks, in the kernel (see Workers)."""
    begin, cgroups = time.monotonic(), Cgroups(run_dir)
    while is_dead_with_lock(run_dir / "faasd.lock") and (passed := time.monotonic() - begin) < STOP_SECONDS:
        if passed > EXIT_GRACE:                 # else it is about to end
            for container_id, cgroup in cgroups.containers().items():
                log.warning("container=%s may keep the previous daemon from ending: ending it", container_id)
                cgroups.kill(cgroup)
        time.sleep(KILL_RETRY)


class EventsFirst(selectors.EpollSelector):
    """Has the loop see what came while we were stopped, or had no CPU, before its timers run out.

    epoll_wait(2) that is interrupted by SIGSTOP may return nothing after its time, though much has happened.
    """

    def select(self, timeout: float | None = None) -> list:
        return super().select(timeout) or (super().select(0) if timeout else [])


async def serve(settings: Settings, addresses: Addresses, ids: IdRanges) -> None:
    await Daemon(settings, addresses, ids).run()


def leave_behind_the_shell() -> None:
    """Undo what we inherited from the shell, and containers would from us: a nice value, blocked signals, …

    Their limits are ours but for open files: to set them in a function's user namespace takes CAP_SYS_RESOURCE (see
    can_set_limits). We need four descriptors an invocation.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # ignored, it would take exit statuses away
    os.umask(0o022)
    # As far as /usr/sbin from a PATH of su or cron.
    os.environ["PATH"] = f"{os.environ.get('PATH') or DEFAULT_PATH}:{DEFAULT_PATH}"
    try:
        os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))       # with those that are offline now
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except OSError as error:
        log.warning("containers keep our priority or CPUs, because we lack CAP_SYS_NICE: %s", error.strerror)
    set_limits()


def set_limits() -> None:
    """Set the limits of CONTAINER_LIMITS, as far as we may, and of descriptors and processes the most that we may."""
    hard = {kind: resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)}
    hard[resource.RLIMIT_NOFILE] = min(65_536, hard[resource.RLIMIT_NOFILE])
    for kind, limits in {**CONTAINER_LIMITS, **{kind: (most, most) for kind, most in hard.items()}}.items():
        try:
            resource.setrlimit(kind, limits)
        except ValueError as error:         # a hard limit is lower, which takes CAP_SYS_RESOURCE to raise
            resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)
            log.warning("containers keep our limit %d of resource %d (getrlimit(2)): %s", resource.getrlimit(kind)[1],
                        kind, error)


def main(argv: list[str]) -> int:
    """Run the daemon; return its exit status: 0 stopped, 1 failed, 2 called in a way that cannot work."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:      # what is closed of stdin, stdout and stderr must
        continue                                                    # not become a file of ours
    os.close(descriptor)
    settings = parse_arguments(argv)
    stderr = StderrHandler(settings.log_format == "json")
    logging.getLogger().addHandler(stderr)      # asyncio's warnings come the same way
    log.setLevel(logging.DEBUG if settings.verbose else logging.INFO)
    try:
        if os.geteuid() != 0:
            raise UsageError("faasd needs root, for namespaces, addresses and file owners: sudo ./faasd.py")
        leave_behind_the_shell()
        check_machine(settings)
        if settings.check:
            if settings.api:
                read_token(settings.api_token_file)
            return 0
        ids = IdRanges(find_host_ids())
        with unless_refused(settings):
            take_directories(settings)
            outlive_containers(settings.run_dir)
            with lock_directory(settings.run_dir), lock_directory(settings.state_dir):
                lay_out(settings.state_dir)
                addresses = Addresses(settings.subnet)
                addresses.claim()
                with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(EventsFirst())) as runner:
                    runner.run(serve(settings, addresses, ids))
    except FaasdError as error:
        stderr.refuse(error)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
