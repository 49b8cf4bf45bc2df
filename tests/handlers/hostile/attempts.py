"""What the hostile image tries, one row each: what is tried, and how it has to fail.

Runs inside the container (handler.py); tests/hold/test_hostile.py imports the same table for what is expected. An
attempt returns, or raises OSError; its outcome is the name of the errno, "killed-SIGNAL", or the text of what it
returned, "done" for nothing.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

MACHINE = platform.machine()
SECONDS = 10            # for one attempt
BLOCKED = "EPERM"       # by the seccomp filter, before the kernel looks at an argument
LIBC = ctypes.CDLL(None, use_errno=True)

# name: (x86_64, aarch64), from the kernel's syscall tables; one number where both are the same, None where one has none
NUMBERS = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "clone": (56, 220), "clone3": 435, "unshare": (272, 97), "setns": (308, 268),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": 438,
    "kcmp": (312, 272), "seccomp": (317, 277), "process_madvise": 440,
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "io_uring_setup": 425, "userfaultfd": (323, 282),
    "fanotify_init": (300, 262), "io_setup": (206, 0),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "personality": (135, 92), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "quotactl": (179, 60),
    "vhangup": (153, 58), "move_pages": (279, 239), "mbind": (237, 235), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "uselib": (134, None), "nfsservctl": (180, 42),
    "landlock_create_ruleset": 444, "cachestat": 451, "map_shadow_stack": 453, "listmount": 458, "mseal": 462,
    "no such call": 999, "sched_setattr": (314, 274),
    "mknodat": (259, 33), "ioctl": (16, 29), "setsockopt": (54, 208), "getpid": (39, 172),
}
CLONE = {"NEWNS": 0x20000, "NEWCGROUP": 0x2000000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000, "NEWUSER": 0x10000000,
         "NEWPID": 0x20000000, "NEWNET": 0x40000000}       # clone(2)
CLONE_NEWTIME = 0x80            # of unshare and clone3; in clone these bits are the exit signal
IP, IPV6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
TIOCSTI, SIOCGSKNS, SIOCSIFFLAGS, TUNSETIFF = 0x5412, 0x894C, 0x8914, 0x400454CA


@dataclass(frozen=True)
class Attempt:
    """One thing tried."""
    action: Callable[..., object]
    expected: frozenset[str]    # outcomes that are as they should be
    stopped_by: str             # what is in the way


ATTEMPTS: dict[str, Attempt] = {}


def attempt(expected: str, stopped_by: str, name: str = ""):
    """Enter a function into the table; expected are outcomes, separated by spaces."""
    def enter(action):
        key = name or action.__name__
        assert key not in ATTEMPTS, key
        ATTEMPTS[key] = Attempt(action, frozenset(expected.split()), stopped_by)
        return action
    return enter


def number_of(name: str) -> int | None:
    number = NUMBERS[name]
    return number if isinstance(number, int) else number[MACHINE == "aarch64"]


def syscall(name: str, *arguments) -> int:
    """Make a system call without a C library's opinion of it. Raises OSError."""
    words = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(number_of(name)), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def outcome_of(action: Callable, *arguments) -> str:
    """Run an attempt in a child process and return how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.write(writing, try_it(action, *arguments).encode())
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], SECONDS)
    text = os.read(reading, 65536).decode() if ready else "timeout"
    if not ready:
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text or (f"killed-{signal.Signals(-status).name}" if status < 0 else f"exit-{status}")


def try_it(action: Callable, *arguments) -> str:
    try:
        result = action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, repr(error))
    except Exception as error:
        return repr(error)
    return "done" if result is None else str(result)


def run_all() -> dict[str, str]:
    return {name: outcome_of(a.action) for name, a in ATTEMPTS.items()}


# -- system calls that no handler needs: one row for each --

FILTER = "seccomp filter"
PLAIN_CALLS = {
    "mount": (b"none", b"/tmp", b"tmpfs", 0, b""), "umount2": (b"/tmp", 0), "pivot_root": (b"/tmp", b"/tmp"),
    "chroot": (b"/tmp",), "open_tree": (-100, b"/", 1), "move_mount": (-1, b"", -100, b"/tmp", 4),
    "fsopen": (b"tmpfs", 0), "fsconfig": (-1, 6, 0, 0, 0), "fsmount": (-1, 0, 0), "fspick": (-100, b"/", 0),
    "mount_setattr": (-100, b"/", 0, 0, 0), "setns": (0, 0),
    "ptrace": (0, 0, 0, 0), "process_vm_readv": (1, 0, 0, 0, 0, 0), "process_vm_writev": (1, 0, 0, 0, 0, 0),
    "pidfd_getfd": (-1, 0, 0), "kcmp": (1, 1, 0, 0, 0), "process_madvise": (-1, 0, 0, 0, 0),
    "add_key": (b"user", b"a", b"b", 1, -3), "request_key": (b"user", b"a", 0, -3), "keyctl": (0, -3, 1),
    "bpf": (0, 0, 0), "perf_event_open": (0, 0, -1, -1, 0), "io_uring_setup": (1, 0), "userfaultfd": (1,),
    "fanotify_init": (0, 0),
    "kexec_load": (0, 0, 0, 0), "kexec_file_load": (-1, -1, 0, 0, 0), "init_module": (0, 0, 0),
    "finit_module": (-1, 0, 0), "delete_module": (b"x", 0), "open_by_handle_at": (-100, 0, 0),
    "name_to_handle_at": (-100, b"/", 0, 0, 0), "personality": (0x0040000,), "settimeofday": (0, 0),
    "clock_settime": (0, 0), "clock_adjtime": (0, 0), "adjtimex": (0,),
    "reboot": (0xFEE1DEAD, 672274793, 0x89ABCDEF, 0),           # Ctrl-Alt-Del is switched on
    "swapon": (b"/tmp/x", 0), "swapoff": (b"/tmp/x",), "acct": (b"/tmp/x",), "sethostname": (b"evil", 4),
    "setdomainname": (b"evil", 4), "syslog": (3, 0, 0), "quotactl": (0, 0, 0, 0), "vhangup": (),
    "move_pages": (0, 0, 0, 0, 0, 0), "mbind": (0, 0, 0, 0, 0, 0), "iopl": (3,), "ioperm": (0x70, 2, 1),
    "modify_ldt": (0, 0, 0), "uselib": (b"/x",), "nfsservctl": (0, 0, 0),
}
for call, values in PLAIN_CALLS.items():
    if number_of(call) is not None:
        attempt(BLOCKED, FILTER, call)(lambda call=call, values=values: syscall(call, *values))
for kind, flag in CLONE.items():
    attempt(BLOCKED, FILTER, f"unshare {kind}")(lambda flag=flag: syscall("unshare", flag))
    attempt(BLOCKED, FILTER, f"clone {kind}")(lambda flag=flag: clone(flag))
attempt(BLOCKED, FILTER, "unshare NEWTIME")(lambda: syscall("unshare", CLONE_NEWTIME))


def clone(flags: int) -> None:
    if syscall("clone", flags | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)


attempt("ENOSYS", FILTER, "seccomp")(lambda: syscall("seccomp", 1, 0, 0))
attempt("ENOSYS", FILTER, "io_setup")(lambda: syscall("io_setup", 1, 0))
# What is newer than the filter is not there, rather than forbidden: programs then find another way.
for call in ("landlock_create_ruleset", "cachestat", "map_shadow_stack", "mseal", "listmount", "no such call"):
    attempt("ENOSYS", FILTER, call)(lambda call=call: syscall(call, 0, 0, 0, 0))


@attempt("ENOSYS", FILTER)
def clone3_of_a_user_namespace():
    arguments = ctypes.create_string_buffer(struct.pack("11Q", CLONE["NEWUSER"], 0, 0, 0, signal.SIGCHLD, *[0] * 6))
    if syscall("clone3", ctypes.addressof(arguments), len(arguments) - 1) == 0:
        os._exit(0)


if MACHINE == "x86_64":
    @attempt("killed-SIGSYS", FILTER)
    def call_of_x32():
        return LIBC.syscall(ctypes.c_long(NUMBERS["getpid"][0] | 0x40000000))

    @attempt("killed-SIGSYS", FILTER)
    def call_of_i386():
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")         # mov $20 (getpid), %eax; int $0x80; ret
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


# -- sockets --

for label, family, kind in (("packet socket", 17, socket.SOCK_RAW), ("AF_VSOCK", 40, socket.SOCK_STREAM),
                            ("AF_ALG", 38, socket.SOCK_SEQPACKET), ("AF_KEY", 15, socket.SOCK_RAW),
                            ("AF_BLUETOOTH", 31, socket.SOCK_RAW), ("AF_CAN", 29, socket.SOCK_RAW),
                            ("AF_TIPC", 30, socket.SOCK_STREAM), ("AF_XDP", 44, socket.SOCK_RAW),
                            ("AF_RDS", 21, socket.SOCK_SEQPACKET), ("AF_SMC", 43, socket.SOCK_STREAM)):
    attempt(BLOCKED, FILTER, label)(lambda family=family, kind=kind: socket.socket(family, kind))
for family in (IP, IPV6):
    for protocol in (1, 6, 255):
        attempt(BLOCKED, FILTER, f"raw socket of protocol {protocol}, {family.name}")(
            lambda family=family, protocol=protocol: socket.socket(family, socket.SOCK_RAW, protocol))
    for label, kind, protocol in (("ping socket", socket.SOCK_DGRAM, 1), ("ICMPv6", socket.SOCK_DGRAM, 58),
                                  ("UDP-Lite", socket.SOCK_DGRAM, 136), ("SCTP", socket.SOCK_STREAM, 132),
                                  ("MPTCP", socket.SOCK_STREAM, 262), ("L2TP", socket.SOCK_DGRAM, 115)):
        attempt("EPROTONOSUPPORT", FILTER, f"{label}, {family.name}")(
            lambda family=family, kind=kind, protocol=protocol: socket.socket(family, kind, protocol))
for protocol in (2, 3, 4, 9, 12, 15, 16, 20):       # NETLINK_USERSOCK queues what no cgroup counts; others need modules
    attempt("EPROTONOSUPPORT", FILTER, f"netlink protocol {protocol}")(
        lambda protocol=protocol: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol))
attempt("ENOSYS", FILTER, "a pair of sockets that are not local")(lambda: socket.socketpair(30, socket.SOCK_STREAM))


def attach_filter(option: int):
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF))         # ret -1: all
    with socket.socket(IP, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", 1, ctypes.addressof(code)))


for label, option in (("SO_ATTACH_FILTER", 26), ("SO_ATTACH_BPF", 50), ("SO_ATTACH_REUSEPORT_CBPF", 51),
                      ("SO_ATTACH_REUSEPORT_EBPF", 52)):
    attempt(BLOCKED, FILTER, label)(lambda option=option: attach_filter(option))

# With these, a connection drops what comes, and the other end of it keeps its data when all processes are gone.
for label, level, option, value in (
        ("a least TTL", socket.IPPROTO_IP, 21, b"\xff\0\0\0"),
        ("a least hop limit", socket.IPPROTO_IPV6, 73, b"\xff\0\0\0"),
        ("TCP-MD5", socket.IPPROTO_TCP, 14, bytes(216)), ("TCP-MD5 of a network", socket.IPPROTO_TCP, 32, bytes(216))):
    attempt(BLOCKED, FILTER, label)(lambda level=level, option=option, value=value: syscall(
        "setsockopt", socket.socket(socket.AF_INET6).detach(), level, option, value, len(value)))
attempt("ENOSYS", FILTER, "a least TTL, with other bits")(lambda: syscall(
    "setsockopt", socket.socket().detach(), socket.IPPROTO_IP, 21 + (1 << 32), b"\xff\0\0\0", 4))


# -- what has the kernel load a module --

for label, option, value in (("TLS in TCP", 31, b"tls"), ("TCP-AO", 38, bytes(288))):
    attempt(BLOCKED, FILTER, label)(
        lambda option=option, value=value: socket.socket().setsockopt(socket.IPPROTO_TCP, option, value))
for label, request in (("bridges", 0x8940), ("bridges", 0x8941), ("a new bridge", 0x89A0), ("VLANs", 0x8982),
                       ("VLANs, extended as by musl", 0x8982 - (1 << 32))):
    attempt(BLOCKED, FILTER, f"{label}, {request:#x}")(
        lambda request=request: syscall("ioctl", socket.socket(UNIX).detach(), request, 0))
attempt(BLOCKED, FILTER, "a line discipline")(lambda: fcntl.ioctl(os.openpty()[1], 0x5423, struct.pack("i", 0)))


@attempt("ENOTSUP", FILTER, "TCP Fast Open, by sendto")
def fast_open():
    with socket.socket() as sock:
        sock.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", 9))


@attempt("ENOTSUP", FILTER, "TCP Fast Open, by sendmsg")
def fast_open_message():
    with socket.socket() as sock:
        sock.sendmsg([b"x"], [], socket.MSG_FASTOPEN, ("127.0.0.1", 9))


@attempt("EINVAL", FILTER, "a seccomp filter of its own")
def add_seccomp_filter():
    assert LIBC.prctl(38, 1, 0, 0, 0) == 0                                              # PR_SET_NO_NEW_PRIVS
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))         # SECCOMP_RET_ALLOW
    program = ctypes.create_string_buffer(struct.pack("HP", 1, ctypes.addressof(code)))
    if LIBC.prctl(22, 2, program, 0, 0) < 0:                                            # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "prctl")


# -- what would hold up the other containers of the function, whose files are the same --

@attempt(BLOCKED, FILTER, "a lease on a file of the image")
def take_a_lease():
    with open("/handler.py") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)


@attempt(BLOCKED, FILTER, "watching a directory of the image")
def watch_a_directory():
    fcntl.fcntl(os.open("/", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS)


for label, action in {
        "SCHED_IDLE": lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)),
        "SCHED_BATCH, reset on fork": lambda: os.sched_setscheduler(
            0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0)),
        "sched_setattr": lambda: syscall("sched_setattr", 0, 0, 0),
}.items():
    attempt(BLOCKED, FILTER, label)(action)


def configure_interface(client: socket.socket | None = None):
    with client or socket.socket(IP) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", 0))


attempt("EPERM", "no CAP_NET_ADMIN", "take lo down")(configure_interface)


@attempt("EPERM", "no CAP_NET_ADMIN")
def add_an_address_by_netlink():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        body = struct.pack("BBBBI", IP, 8, 0, 0, 1) + struct.pack("HH4s", 8, 2, socket.inet_aton("10.9.9.9"))
        sock.send(struct.pack("IHHII", 16 + len(body), 20, 0x605, 1, 0) + body)     # RTM_NEWADDR
        raise OSError(-struct.unpack_from("i", sock.recv(4096), 16)[0], "nack")


@attempt("ENETUNREACH", "network namespace", "metadata address")
def connect_to_metadata():
    socket.create_connection(("169.254.169.254", 80), 2)


@attempt("ENETUNREACH", "network namespace", "link-local address")
def connect_to_link_local():
    socket.create_connection(("169.254.1.1", 80), 2)


@attempt("ENETUNREACH", "network namespace", "the internet, by UDP")
def send_to_internet():
    with socket.socket(IP, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("192.0.2.1", 53))


# -- devices --

for label, major, minor, kind in (("memory", 1, 1, 0o020000), ("console", 5, 1, 0o020000), ("kmsg", 1, 11, 0o020000),
                                  ("disk", 8, 0, 0o060000), ("fuse", 10, 229, 0o020000)):
    attempt("EPERM", "user namespace: no CAP_MKNOD", f"mknod {label}")(
        lambda kind=kind, device=os.makedev(major, minor): os.mknod("/tmp/node", kind | 0o666, device))
for label in ("memory", "kmsg", "disk", "fuse", "tun", "null", "zero", "full", "random", "urandom", "tty", "ptmx",
              "pts"):
    attempt("EACCES", "the image is mounted nodev", f"the image's own {label} device")(
        lambda label=label: os.close(os.open(f"/nodes/{label}", os.O_RDWR)))
for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/fuse", "/dev/kvm", "/dev/net/tun", "/dev/vda",
             "/dev/sda", "/dev/console", "/dev/loop-control"):
    attempt("ENOENT", "a /dev of its own", f"open {path}")(lambda path=path: os.close(os.open(path, os.O_RDONLY)))


@attempt("EPERM EACCES", "no CAP_NET_ADMIN; newer runc: device cgroup")
def make_an_interface_from_the_image_s_own_tun_device():
    fcntl.ioctl(os.open("/nodes/tun", os.O_RDWR), TUNSETIFF, struct.pack("16sH22x", b"tun0", 1))        # IFF_TUN


@attempt("ENXIO", "no terminal")
def push_input_into_the_terminal():
    fcntl.ioctl(os.open("/dev/tty", os.O_RDWR), TIOCSTI, b"x")


@attempt("EIO ENOTTY EPERM", "stdin, stdout and stderr are no terminals", "TIOCSTI on stdin")
def push_input_into_stdin():
    for descriptor in (0, 1, 2):
        fcntl.ioctl(descriptor, TIOCSTI, b"x")


# -- privileges --

def status_of(*argv: str) -> str:
    """Return user id and effective capabilities of a program, which prints its /proc/self/status."""
    text = subprocess.run([*argv, "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(":", 1) for line in text.splitlines())
    ids, capabilities = set(fields["Uid"].split()), {fields[key].strip() for key in ("CapPrm", "CapEff", "CapAmb")}
    return "same" if (ids, capabilities) == ({str(os.getuid())}, {"0" * 16}) else f"{ids} {capabilities}"


for program in ("setuid-root", "setuid-other", "setgid-root"):
    attempt("same", "no_new_privs", f"a program of the image, {program}")(
        lambda program=program: status_of(f"/nodes/{program}"))
attempt("same", "the image is mounted nosuid, so it gains nothing",
        "a program of the image with capabilities")(
    lambda: status_of("/nodes/capable"))
for label, action in {
        "setuid": lambda: os.setuid(12345),
        "setgid": lambda: os.setgid(12345),
        "setgroups": lambda: os.setgroups([0, 12345]),
        "chown": lambda: chown_own_file(12345),
        "nice": lambda: os.nice(-5),
        "real-time scheduling": lambda: os.sched_setscheduler(0, 1, os.sched_param(50)),
        "raise descriptor limit": lambda: raise_limit("RLIMIT_NOFILE"),
        "raise core limit": lambda: raise_limit("RLIMIT_CORE"),
        "capset": lambda: capset(),
        "lock memory for ever": lambda: raise_limit("RLIMIT_MEMLOCK", above=1 << 40),
}.items():
    attempt("EPERM EACCES", "no capabilities", label)(action)


def chown_own_file(user: int) -> None:
    open("/tmp/mine", "w").close()
    os.chown("/tmp/mine", user, user)


def raise_limit(name: str, above: int = 0) -> None:
    kind = getattr(resource, name)
    wanted = max(resource.getrlimit(kind)[1], above) + 1
    try:
        resource.setrlimit(kind, (wanted, wanted))
    except ValueError as error:                 # Python's word for EPERM
        raise PermissionError(errno.EPERM, str(error)) from error


def capset() -> None:
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    if LIBC.capset(header, ctypes.create_string_buffer(struct.pack("6I", *[0xFFFFFFFF] * 6))) < 0:
        raise OSError(ctypes.get_errno(), "capset")


@attempt("no", "RLIMIT_CORE 0")
def core_dump():
    pid = os.fork()
    if pid == 0:
        os.chdir("/tmp")
        os.abort()
    os.waitpid(pid, 0)
    return [name for name in os.listdir("/tmp") if name.startswith("core")] or "no"


# -- files --

def write(path: str, data: bytes = b"1", flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags)
    os.write(descriptor, data)


# What changes the image, as far as the container sees: tests/serve/test_root.py.
for label, action in {
        "remove control.sock": lambda: os.unlink("/control.sock"),
        "write /sys": lambda: write("/sys/kernel/uevent_seqnum"),
}.items():
    attempt("EROFS EACCES EPERM EBUSY", "mounts", label)(action)


@attempt("same", "private mappings are copied")
def write_a_library_through_own_memory():
    """/proc/self/mem writes where mprotect would not: into a copy of ours, or into everybody's file?"""
    with open("/handler.py", "rb") as file:
        before = file.read()
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        start = next(int(line.split("-")[0], 16) for line in open("/proc/self/maps") if line.endswith("/handler.py\n"))
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(b"EVIL")
        assert mapped[:4] == b"EVIL"
        file.seek(0)
        return "same" if file.read() == before else "changed"


KERNEL = "read-only /proc, user namespace"
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/kernel/shmmax",
             "/proc/sys/vm/drop_caches", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/user/max_user_namespaces",
             "/proc/sys/fs/binfmt_misc/register", "/proc/sys/kernel/modprobe", "/proc/sysrq-trigger",
             "/proc/irq/default_smp_affinity", "/proc/mtrr", "/proc/kmsg", "/proc/bus/pci/00/00.0"):
    attempt("EROFS EACCES EPERM ENOENT", KERNEL, f"write {path}")(lambda path=path: write(path))
for path, data in (("uid_map", b"0 0 1"), ("gid_map", b"0 0 1"), ("setgroups", b"allow"),
                   ("oom_score_adj", b"-1000"), ("timens_offsets", b"monotonic 1 0"), ("attr/current", b"unconfined"),
                   ("autogroup", b"-20")):
    attempt("EPERM EACCES ENOENT EINVAL", "no capabilities", f"write /proc/self/{path}")(
        lambda path=path, data=data: write(f"/proc/self/{path}", data))
for path in ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/interrupts", "/proc/acpi",
             "/proc/asound", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/latency_stats"):
    attempt("nothing ENOENT EACCES", "masked paths", f"read {path}")(lambda path=path: read_anything(path))
for path in ("/proc/kmsg", "/proc/kpagecount", "/proc/kpageflags", "/proc/vmallocinfo", "/proc/slabinfo",
             "/proc/kallsyms", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/fs/bpf", "/sys/kernel/security",
             "/sys/fs/pstore"):
    attempt("nothing ENOENT EACCES EPERM zeros", "no capabilities", f"read {path}")(
        lambda path=path: read_anything(path))


def read_anything(path: str) -> str:
    if os.path.isdir(path):
        return "nothing" if not os.listdir(path) else f"lists {os.listdir(path)[:3]}"
    with open(path, "rb", buffering=0) as file:
        os.set_blocking(file.fileno(), False)
        data = file.read(4096)
    if path == "/proc/kallsyms" and data and all(line.split()[0] == b"0" * 16 for line in data.splitlines()[:-1]):
        return "zeros"
    return f"reads {data[:40]!r}" if data else "nothing"


@attempt("own", "cgroup namespace, read-only mounts", "cgroups in /sys/fs/cgroup")
def change_cgroups():
    """Return "own" if the container's own cgroup shows, and none above, beside or below it, nothing can be changed."""
    seen, hierarchies = set(), []
    for top, _, names in os.walk("/sys/fs/cgroup"):
        if "cgroup.procs" in names:
            hierarchies.append(top)
        for action, path in (*((lambda path: open(path, "r+b"), f"{top}/{name}") for name in names),
                             (os.mkdir, f"{top}/new"), (os.rmdir, top)):
            try:
                action(path)
            except OSError as error:
                seen.add(errno.errorcode[error.errno])
            else:
                return f"changes {path}"
    for top in hierarchies:
        with open(f"{top}/cgroup.procs") as file:
            strangers = [pid for pid in map(int, file) if not os.path.exists(f"/proc/{pid}")]
        if strangers or top.rpartition("/")[0] in hierarchies:
            return f"{top} shows {strangers}"
    assert hierarchies and seen <= {"EROFS", "EACCES", "EBUSY", "ENOENT"}, seen
    return "own"


@attempt("own", "pid and mount namespaces", "other processes in /proc")
def see_processes():
    """Return "own" if pid 1 is this container's handler, and all processes are its children."""
    assert b"handler.py" in open("/proc/1/cmdline", "rb").read()
    strangers = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid not in (1, os.getpid())]
    return f"strangers {strangers}" if strangers else "own"


@attempt("ESRCH", "pid namespace", "signal host processes")
def signal_host_processes():
    for pid in (2, 100, os.getpid() + 1, 30_000):
        try:
            os.kill(pid, signal.SIGKILL)
            return f"killed {pid}"
        except ProcessLookupError:
            continue
    raise ProcessLookupError(errno.ESRCH, "none of them")


@attempt("EPERM ESRCH", "pid namespace", "signal everybody")
def signal_everybody():
    """kill(-1) reaches every process but the sender and pid 1, so within a namespace nobody here."""
    os.kill(-1, signal.SIGTERM)


@attempt("pid-1-runs", "the kernel ignores it for the init of a pid namespace", "stop pid 1")
def stop_pid_1():
    os.kill(1, signal.SIGSTOP)
    time.sleep(0.05)
    state = open("/proc/1/stat").read().rpartition(")")[2].split()[0]
    return "pid-1-runs" if state in "SR" else state


@attempt("1", "network namespace", "interfaces")
def count_interfaces():
    return len(socket.if_nameindex())


@attempt("none", "network namespace", "abstract sockets of others")
def see_abstract_sockets():
    return [line.split()[-1] for line in open("/proc/net/unix") if "@" in line] or "none"


@attempt("none", "ipc namespace", "System V memory of others")
def see_shared_memory():
    return len(open("/proc/sysvipc/shm").readlines()) - 1 or "none"


@attempt("none", "ipc namespace", "message queues of others")
def see_message_queues():
    return os.listdir("/dev/mqueue") or "none"


@attempt("ECONNREFUSED", "faasd takes one connection and closes the listener", "a second connect to control.sock")
def second_connect():
    socket.socket(UNIX).connect("/control.sock")
