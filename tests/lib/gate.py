#!/usr/bin/env python3
"""Stand at the gate of the kernel: see each system call of a daemon that changes something, before it happens.

    gate = Gate(decide)
    daemon = support.Daemon(wrapper=gate.wrapper)

decide(call) is called for each such call, one at a time, while the caller's thread waits in the kernel: it returns
None to let the call happen, or an errno for it to fail with; killing the daemon from it is a crash between two calls.

This is seccomp's user notification (seccomp_unotify(2)): the wrapper, which is this file run as a program, sets a
filter and becomes the daemon; the daemon knows nothing of it. strace's fault injection does not do here: it counts
for each thread by itself, so the third unlink of a daemon whose threads take turns has no number, and it costs a stop
at every other system call as well. Children inherit the filter; whose call it is, call.of says.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable

# name → its number on x86_64 and on arm64 (None: not there), and which arguments are paths.
CALLS = {"rename": (82, None, (0, 1)), "renameat": (264, 38, (1, 3)), "renameat2": (316, 276, (1, 3)),
         "mkdir": (83, None, (0,)), "mkdirat": (258, 34, (1,)), "rmdir": (84, None, (0,)),
         "unlink": (87, None, (0,)), "unlinkat": (263, 35, (1,)), "openat": (257, 56, (1,)),
         "fsync": (74, 82, ()), "fdatasync": (75, 83, ()), "syncfs": (306, 267, ()),
         "chmod": (90, None, (0,)), "mount": (165, 40, (1,)), "umount2": (166, 39, (0,)), "bind": (49, 200, ()),
         "listen": (50, 201, ()), "sendmsg": (46, 211, ()), "vfork": (58, None, ()), "clone": (56, 220, ()),
         "clone3": (435, 435, ()), "pidfd_send_signal": (424, 424, ()), "kill": (62, 129, ())}
MACHINE = os.uname().machine
COLUMN, AUDIT_ARCH, SECCOMP = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}.get(MACHINE, (0, 0, 0))
NUMBERS = {numbers[COLUMN]: name for name, numbers in CALLS.items() if numbers[COLUMN] is not None}

# linux/seccomp.h, linux/filter.h
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 1 << 3
SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
LOAD, JUMP_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x45, 0x06
OFFSET_NR, OFFSET_ARCH, OFFSET_FLAGS = 0, 4, 32     # in struct seccomp_data; the third argument is openat's flags
PIDFD_GETFD = 438
CLONE_THREAD = 0x10000
libc = ctypes.CDLL(None, use_errno=True)


class Call:
    """One system call that waits at the gate."""

    def __init__(self, name: str, pid: int, of: str, arguments: tuple[int, ...]):
        """pid is the thread's; of is "daemon", "unpack" for its unpacking child, or the name of another program."""
        self.name, self.pid, self.of, self.arguments = name, pid, of, arguments

    @functools.cached_property
    def paths(self) -> list[str]:
        """The paths among the arguments, and that behind the descriptor of an fsync."""
        if self.name in ("fsync", "fdatasync", "syncfs"):
            return [os.readlink(f"/proc/{self.pid}/fd/{self.arguments[0]}")]
        return [self._text(self.arguments[index]) for index in CALLS[self.name][2]]

    def _text(self, address: int) -> str:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(4096 - address % 4096).partition(b"\0")[0].decode(errors="replace")

    @functools.cached_property
    def starts_thread(self) -> bool:
        if self.name == "clone3":
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(self.arguments[0])
                return bool(struct.unpack("Q", memory.read(8))[0] & CLONE_THREAD)
        return self.name == "clone" and bool(self.arguments[0] & CLONE_THREAD)

    def __str__(self) -> str:
        return f"{self.of}: {self.name}({', '.join(self.paths)})"


class Gate:
    """Serves the calls of one daemon after the other that is started through wrapper."""

    def __init__(self, decide: Callable[[Call], int | None]):
        self.decide = decide
        self.daemon = 0                                 # pid
        import tempfile     # here: a wrapper, which is started with each daemon, does without it
        self._directory = tempfile.TemporaryDirectory(prefix="gate.")
        path = f"{self._directory.name}/gate"
        self.wrapper = (sys.executable, "-I", "-S", __file__, path)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen()
        self._wake, self._woken = socket.socketpair()
        self._listeners: list[int] = []
        self._mistake: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="gate")
        self._thread.start()

    def close(self) -> None:
        """Leave the gate, once all daemons are gone: who comes to it later gets ENOSYS."""
        self._wake.close()
        self._thread.join()
        for descriptor in (self._server, self._woken):
            descriptor.close()
        for listener in self._listeners:
            os.close(listener)
        self._directory.cleanup()
        if self._mistake:
            raise self._mistake

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._server, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            for descriptor, event in poll.poll():
                if descriptor == self._woken.fileno():
                    return
                if descriptor == self._server.fileno():
                    poll.register(self._accept(), select.POLLIN)
                elif event & select.POLLIN:
                    self._answer(descriptor)
                else:                                   # the last process under the filter is gone
                    poll.unregister(descriptor)
                    self._listeners.remove(descriptor)
                    os.close(descriptor)

    def _accept(self) -> int:
        """Fetch the listener of a wrapper, which cannot send it itself: sendmsg is a call that waits at the gate."""
        with self._server.accept()[0] as wrapper:
            self.daemon, _, _ = struct.unpack("3i", wrapper.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            pidfd = os.pidfd_open(self.daemon)
            listener = libc.syscall(PIDFD_GETFD, pidfd, int(wrapper.recv(16)), 0)
            os.close(pidfd)
            self._listeners.append(listener)
            wrapper.send(b"\0")
        return listener

    def _answer(self, listener: int) -> None:
        buffer = bytearray(80)                          # struct seccomp_notif
        try:
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):      # it was killed, or got a signal and comes again
                return
            raise
        number, pid, _, nr, _, _, *arguments = struct.unpack("QIIiIQ6Q", buffer)
        failure = None
        try:
            failure = self.decide(Call(NUMBERS[nr], pid, self._whose(pid), tuple(arguments)))
        except (FileNotFoundError, ProcessLookupError):         # it was killed meanwhile
            pass
        except Exception as error:                              # a mistake in the test, which close() tells
            self._mistake = self._mistake or error
        flags = 0 if failure else SECCOMP_USER_NOTIF_FLAG_CONTINUE
        try:
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, struct.pack("QqiI", number, 0, -(failure or 0), flags))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def _whose(self, pid: int) -> str:
        if os.path.exists(f"/proc/{self.daemon}/task/{pid}"):
            return "daemon"
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().split(b"\0")
        return "unpack" if b"unpack" in command[:6] else os.path.basename(command[0]).decode() or "?"


def install_filter() -> int:
    """Have the kernel ask about the calls of this process and its children; return the listener's descriptor."""
    openat = next(number for number, name in NUMBERS.items() if name == "openat")
    others = [number for number in NUMBERS if number != openat]
    rules = [(LOAD, 0, 0, OFFSET_ARCH), (JUMP_EQUAL, 0, len(others) + 4, AUDIT_ARCH), (LOAD, 0, 0, OFFSET_NR)]
    rules += [(JUMP_EQUAL, len(others) - index + 3, 0, number) for index, number in enumerate(others)]
    rules += [(JUMP_EQUAL, 0, 2, openat), (LOAD, 0, 0, OFFSET_FLAGS), (JUMP_SET, 1, 0, os.O_CREAT),
              (RETURN, 0, 0, SECCOMP_RET_ALLOW), (RETURN, 0, 0, SECCOMP_RET_USER_NOTIF)]
    return load(rules)


def load(rules: list[tuple[int, int, int, int]]) -> int:
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(memory))
    listener = libc.syscall(SECCOMP, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def main(path: str, *command: str) -> None:
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(path)
        gate.send(b"%d" % install_filter())
        gate.recv(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
