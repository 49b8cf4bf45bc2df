"""The package, its manual pages and completions, the systemd unit and the Grafana dashboard."""

import contextlib
import gzip
import hashlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import termios
import unittest
from pathlib import Path

import support
from support import get, wait_until
from test_restart import Client, Systemd, skip_unless_systemd_runs, steady_load

import faasd

UNIT = support.TOP / "packaging" / "faasd.service"
DASHBOARD = support.TOP / "packaging" / "grafana-dashboard.json"


def run(*argv: str | Path, **more) -> str:
    """Run a program that must succeed; return what it prints."""
    result = subprocess.run(argv, capture_output=True, text=True, check=False, **more)
    if result.returncode != 0:
        raise AssertionError(f"{argv}: {result.returncode}: {result.stdout}{result.stderr}")
    return result.stdout


def needs(program: str, package: str | None = None):
    return unittest.skipUnless(shutil.which(program), f"{program} is not installed: apt install {package or program}")


class PackagingCase(unittest.TestCase):
    def directory(self) -> Path:
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        return directory


@needs("dpkg-deb", "dpkg")
class Package(PackagingCase):
    def build(self, umask: int = 0o022, **env: str) -> Path:
        directory = self.directory()
        run(support.TOP / "packaging/build-deb", directory, umask=umask, env={**os.environ, **env})
        deb, = directory.glob("faasd_*_all.deb")
        return deb

    def test_same_input_same_bytes(self):
        first, second = self.build(), self.build(umask=0o077, TZ="Asia/Tokyo", HOME="/nonexistent")
        self.assertEqual(*(hashlib.sha256(deb.read_bytes()).hexdigest() for deb in (first, second)))
        self.assertEqual(first.name, second.name)

    def test_what_is_in_it(self):
        deb = self.build()
        version = faasd.__version__
        fields = dict(line.split(": ", 1) for line in run("dpkg-deb", "--field", deb).splitlines() if line[0] != " ")
        self.assertEqual((fields["Package"], fields["Version"]), ("faasd", version))
        newest = re.search(r"(?m)^## (\S+) ", (support.TOP / "CHANGELOG.md").read_text())[1]
        self.assertEqual(newest, version)
        self.assertIn(f"faas {version},", subprocess.run([support.TOP / "faas", "version"], capture_output=True,
                                                         text=True, check=False).stdout)
        modes = {line.split()[5]: line.split()[:2] for line in run("dpkg-deb", "--contents", deb).splitlines()}
        self.assertEqual({owner for _, owner in modes.values()}, {"root/root"})
        self.assertEqual({path for path, (mode, _) in modes.items() if mode[0] == "-" and "x" in mode},
                         {"./usr/bin/faas", "./usr/sbin/faasd"})
        self.assertEqual({mode for mode, _ in modes.values()}, {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"})
        root = self.directory() / "root"
        run("dpkg-deb", "--raw-extract", deb, root)
        self.assertEqual(run(root / "usr/sbin/faasd", "--version"), f"faasd {version}\n")
        for line in (root / "DEBIAN/conffiles").read_text().splitlines():
            self.assertTrue((root / line[1:]).is_file(), line)
        for script in ("postinst", "prerm", "postrm"):
            run("sh", "-n", root / "DEBIAN" / script)
        documents = root / "usr/share/doc/faasd"
        links = {(str(path.relative_to(documents)), link) for path in documents.rglob("*.md")
                 for link in re.findall(r"\]\(([^)#:]+)[#)]", path.read_text())}
        self.assertIn(("README.md", "SECURITY.md"), links)
        self.assertEqual([(name, link) for name, link in sorted(links)
                          if not (documents / name).parent.joinpath(link).exists()], [])

    def test_versions_that_differ_are_refused(self):
        copy = self.directory() / "copy"
        copy.mkdir()
        for name in ("packaging", "faas", "faasd.py", "CHANGELOG.md", "README.md", "LICENSE"):
            run("cp", "-a", support.TOP / name, copy)
        text = (copy / "faas").read_text()
        (copy / "faas").write_text(text.replace(f'__version__ = "{faasd.__version__}"', '__version__ = "9.9.9"'))
        result = subprocess.run([copy / "packaging/build-deb", copy], capture_output=True, text=True, check=False)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("faas 9.9.9", result.stderr)


class Generated(PackagingCase):
    """What packaging/generate makes, beside what the programs themselves say."""

    @classmethod
    def setUpClass(cls):
        cls.made = support.temporary_directory()
        cls.addClassCleanup(shutil.rmtree, cls.made)
        run(sys.executable, support.TOP / "packaging/generate", cls.made)
        faas = [sys.executable, support.TOP / "faas"]
        lines = run(*faas, "--help").partition("COMMAND\n")[2].splitlines()
        cls.commands = [match[1] for line in lines if (match := re.match(r"    ([a-z]+)( |$)", line))]
        cls.helps = {command: run(*faas, command, "--help") for command in cls.commands}
        cls.helps[""] = run(*faas, "--help")
        cls.daemon_help = run(sys.executable, support.TOP / "faasd.py", "--help")

    @staticmethod
    def options(help_: str) -> set[str]:
        """Return the options that a --help lists, in the column where argparse puts them."""
        lists = [re.split(r" {2,}", line.strip())[0] for line in help_.splitlines() if re.match(r"  +-", line)]
        return {word for names in lists for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", names)}

    def test_manual_pages_have_all_options_and_texts(self):
        self.assertGreater(len(self.commands), 10)
        for name, helps in (("faas.1", list(self.helps.values())), ("faasd.8", [self.daemon_help])):
            page = (self.made / name).read_text().replace("\\-", "-")
            for option in set().union(*map(self.options, helps)):
                self.assertRegex(page, rf"\\fB{option}\\fR", name)
        page = (self.made / "faas.1").read_text()
        for command in self.commands:
            self.assertRegex(page, rf'(?m)^\.SS "faas {command} ')
        self.assertLess(page.index("version\\fR"), page.index("Every command takes"))        # those do not take it
        self.assertRegex(page, r"(?s)\.SH EXIT STATUS\n.*the command\\\(aqs own; 126 .*, 127 .*\.SH ENVIRONMENT")
        self.assertNotIn("SUPPRESS", page)              # argparse's word for an argument that is not shown

    @needs("mandoc")
    def test_mandoc_finds_no_fault(self):
        run("mandoc", "-T", "lint", "-W", "warning", self.made / "faas.1", self.made / "faasd.8")

    @needs("groff", "groff-base")
    def test_groff_finds_no_fault(self):
        for name in ("faas.1", "faasd.8"):
            result = subprocess.run(["groff", "-man", "-ww", "-z", "-Tutf8", self.made / name], capture_output=True,
                                    text=True, check=False)
            self.assertEqual((result.returncode, result.stderr), (0, ""))

    def check_shell(self, complete) -> None:
        """Check what complete(line) offers for the last word of a line, all commands and options of --help."""
        self.assertLessEqual(set(self.commands), complete("faas "))
        for command in ("new", "logs", "rollback", "pack"):
            self.assertLessEqual({name for name in self.options(self.helps[command]) if name[:2] == "--"},
                                 complete(f"faas {command} --"), command)
        self.assertLessEqual({name for name in self.options(self.daemon_help) if name[:2] == "--"},
                             complete("faasd --"))
        self.assertEqual(complete("faas new --net "), {"none", "egress", "host"})
        self.assertEqual(complete("faas export k"), {"kubernetes", "knative"})
        self.assertEqual(complete("faas proxy-config nginx w"), {"web", "worker"})
        self.assertEqual(complete("faas logs w"), {"web", "worker"})
        self.assertEqual(complete("faas rm web wo"), {"worker"})
        self.assertIn("faas.fish", {os.path.basename(name) for name in complete(f"faas pack {self.made}/faas.f")})

    @contextlib.contextmanager
    def environment(self):
        """Run a daemon with functions; the value is an environment in which `faas` finds it."""
        programs = self.directory()
        (programs / "faas").symlink_to(support.TOP / "faas")
        with support.Daemon() as daemon:
            for name in ("web", "worker", "other"):
                daemon.deploy(name)
            yield {**os.environ, "FAAS_SOCKET": str(daemon.socket), "PATH": f"{programs}:{os.environ['PATH']}",
                   "TERM": "dumb", "LC_ALL": "C.UTF-8"}

    def test_completions(self):
        """In bash, and in what else there is of zsh and fish."""
        with self.environment() as env:
            with self.subTest("bash"):
                self.check_shell(lambda line: self.ask_bash(line, env))
            with self.subTest("fish"):
                if not shutil.which("fish"):
                    self.skipTest("fish is not installed: apt install fish")
                self.check_shell(lambda line: self.ask_fish(line, env))
            with self.subTest("zsh"):
                if not shutil.which("zsh"):
                    self.skipTest("zsh is not installed: apt install zsh")
                with self.zsh(env) as complete:
                    self.check_shell(complete)

    def ask_bash(self, line: str, env: dict) -> set[str]:
        words = line.split(" ")
        script = ('source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _"$1"; printf "%s\n" "${COMPREPLY[@]}"')
        return set(run("bash", "-c", script, self.made / f"{words[0]}.bash", *words, env=env).split())

    def ask_fish(self, line: str, env: dict) -> set[str]:
        script = f"source {self.made}/{line.split(' ')[0]}.fish; complete -C {line!r}"
        offered = run("fish", "--no-config", "-c", script, env={**env, "HOME": str(self.made)}).splitlines()
        return {entry.split("\t")[0] for entry in offered}

    ZSH = """
        PS1= LISTMAX=0
        fpath=($HOME $fpath)
        autoload -U compinit
        compinit -u -D
        compadd() {                     # tells what it is asked to offer
            local -a offered
            if (( ! ${@[(I)-[OAD]]} )); then
                builtin compadd -O offered "$@"
                print -rl -- $offered >>$HOME/offered
            fi
            builtin compadd "$@"
        }
        list() {
            zle list-choices
            : >$HOME/ready
        }
        zle -N list
        bindkey '^X' list
        : >$HOME/ready
    """

    @contextlib.contextmanager
    def zsh(self, env: dict):
        """Have a zsh on a terminal complete; the value does what ask_bash does."""
        home = self.directory()
        for name in ("faas", "faasd"):
            shutil.copy(self.made / f"{name}.zsh", home / f"_{name}")
        (home / ".zshrc").write_text(self.ZSH)
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvpe("zsh", ["zsh", "-o", "NO_GLOBAL_RCS", "-i"], {**env, "HOME": str(home), "ZDOTDIR": str(home)})
        termios.tcsetwinsize(terminal, (500, 200))          # else it asks before it lists much
        said = bytearray()

        def there(name: str) -> bool:
            if select.select([terminal], [], [], 0)[0]:
                with contextlib.suppress(OSError):          # it has ended
                    said.extend(os.read(terminal, 65536))
            return (home / name).exists()

        def complete(line: str) -> set[str]:
            for name in ("offered", "ready"):
                (home / name).unlink(missing_ok=True)
            os.write(terminal, f"\x15{line}\x18".encode())      # ^U takes the last line back, ^X lists
            wait_until(lambda: there("ready"), f"zsh has listed: {said}")
            return set((home / "offered").read_text().split()) if (home / "offered").exists() else set()
        try:
            wait_until(lambda: there("ready"), f"zsh is ready: {said}")
            yield complete
        finally:
            os.close(terminal)
            os.waitpid(pid, 0)


class Unit(unittest.TestCase):
    def test_systemd_finds_no_fault(self):
        if shutil.which("systemd-analyze") is None:
            self.skipTest("systemd-analyze is not installed: apt install systemd")
        result = subprocess.run(["systemd-analyze", "verify", "--man=no", UNIT], capture_output=True, text=True,
                                check=False)
        self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_its_capabilities_are_enough(self):
        names = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)[1].lower().split()
        bounding = ",".join(["-all", *(f"+{name.removeprefix('cap_')}" for name in names)])
        wrapper = ("setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounding}")
        with support.Daemon(wrapper=wrapper) as daemon:
            address = daemon.deploy("f")
            self.assertEqual(support.get(address)[0], 200)
            self.assertEqual(support.get(address, "/exit?1")[0], 502)


SOURCES = ("packaging", "faas", "faasd.py", "install.sh", "LICENSE", "test_handler.py", "Dockerfile.test-handler",
           "docs", "examples", "bench", "tests", *(path.name for path in support.TOP.glob("*.md")))
NEXT = "99.0.0"


def copy_sources(directory: Path, version: str = "") -> Path:
    """Copy what a package is made of, as another version if one is named."""
    directory.mkdir()
    for name in SOURCES:
        run("cp", "-a", support.TOP / name, directory)
    if version:
        for name in ("faas", "faasd.py"):
            text = (directory / name).read_text()
            (directory / name).write_text(text.replace(f'__version__ = "{faasd.__version__}"',
                                                       f'__version__ = "{version}"'))
        changes = (directory / "CHANGELOG.md").read_text()
        (directory / "CHANGELOG.md").write_text(f"## {version} (2099-01-01)\n\n{changes}")
    return directory


def installed_files(root: Path = Path("/")) -> set[str]:
    """Return the paths in a system, less what installing anything leaves."""
    passed_by = ("var/lib/dpkg", "var/lib/apt", "var/cache", "var/log", "var/lib/systemd", "root", "tmp", "run")
    found = run("find", root, "-xdev", *(word for path in passed_by for word in ("-path", root / path, "-prune", "-o")),
                "-print").splitlines()
    # shadow-utils and systemd keep backups of these, and Python what it has compiled.
    return {path for path in found if not re.search(r"/etc/(group|gshadow|passwd|shadow|subuid|subgid)-$|__pycache__|"
                                                    r"/etc/(\.pwd\.lock|\.updated|machine-id)$|/var/\.updated$", path)}


APT = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-q", "-o", "Dpkg::Use-Pty=0")


class Machine(Systemd):
    """A whole Debian in namespaces and cgroups of its own, but in our network namespace; init is systemd or nothing."""

    NO_SYSTEMD = "while true; do sleep 1000; done"

    BOOT = """
        mount --make-rprivate /
        root=ROOT
        mount --bind $root $root
        mount -t proc proc $root/proc
        mount -t sysfs sysfs $root/sys
        mount -t tmpfs -o mode=755 tmpfs $root/sys/fs/cgroup
        awk '$5 ~ "^/sys/fs/cgroup" { for (i = 6; i < NF; i++)
            if ($i == "-" && $(i + 1) ~ "^cgroup") print $5, $(i + 1), $(i + 3) }' /proc/self/mountinfo |
        while read -r path kind options; do
            mkdir -p "$root$path"
            mount -t "$kind" -o "$(echo "$options" | sed 's/^r[wo],\\?//')" "$kind" "$root$path"
        done
        mount -t tmpfs -o mode=755 tmpfs $root/dev
        for name in null zero full random urandom tty; do
            : >$root/dev/$name
            mount --bind /dev/$name $root/dev/$name
        done
        mkdir $root/dev/pts
        mount -t devpts -o newinstance,ptmxmode=666 devpts $root/dev/pts
        ln -s pts/ptmx $root/dev/ptmx
        ln -s /proc/self/fd $root/dev/fd
        mount -t tmpfs -o mode=755 tmpfs $root/run
        mount -t tmpfs -o mode=1777 tmpfs $root/tmp
        mkdir $root/run/old
        cd $root
        pivot_root . run/old
        umount --lazy run/old
        rmdir run/old
        exec env -i container=test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin INIT
    """

    def __init__(self, root: Path, systemd: bool):
        init = '"$2" --system --show-status=no' if systemd else f"sh -c '{self.NO_SYSTEMD}'"
        self.BOOT = self.BOOT.replace("ROOT", str(root)).replace("INIT", init)
        super().__init__()
        self.enter = ("nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc", "--cgroup")
        up = ("systemctl", "is-active", "multi-user.target") if systemd else (
            "sh", "-c", "[ -e /root/sources ] && [ ! -e /run/old ]")
        try:
            wait_until(lambda: self.try_run(*up).returncode == 0, "it is up")
        except AssertionError as error:
            said = self.daemon.log()
            self.close()
            raise AssertionError(f"{error}: {said[-2000:]}") from None

    def start(self, program: str) -> None:
        """Start a daemon by hand."""
        self.daemon.command = lambda: [*self.enter, "sh", "-c", f"{program} & echo $! >/run/pid; wait $!"]
        self.daemon.give_byte_code = lambda: None
        self.daemon.start()

    def end(self, signal_: str) -> None:
        """End the daemon that was started by hand."""
        self.run("sh", "-c", f"kill -{signal_} $(cat /run/pid)")
        self.daemon.process.wait(support.READY_SECONDS * 2)
        self.daemon.log_file.close()

    def try_run(self, *argv: str) -> subprocess.CompletedProcess:
        return subprocess.run([*self.enter, *argv], capture_output=True, text=True, check=False)

    def run(self, *argv: str) -> str:
        result = self.try_run(*argv)
        if result.returncode != 0:
            journal = self.try_run("journalctl", "-n", "40", "--no-pager", "-o", "cat").stdout
            raise AssertionError(f"{argv}: {result.returncode}: {result.stdout}{result.stderr}\n{journal}")
        return result.stdout

    def reboot(self) -> None:
        self.try_run("systemctl", "--no-block", "reboot")
        self._process.wait(support.READY_SECONDS * 2)
        self.close()


class Installed(PackagingCase):
    """The package, and install.sh, in a copy of the bare Debian that this system is."""

    @classmethod
    def setUpClass(cls):
        if "FAASD_TEST_BARE" not in os.environ:
            raise unittest.SkipTest("this is no bare Debian: sudo tests/ci/userland.sh bookworm --newcomer")
        if support.RUNTIME != "runc":
            raise unittest.SkipTest("the package brings runc")
        cls.root = Path(tempfile.mkdtemp(prefix=support.PREFIX, dir="/var/tmp"))
        cls.addClassCleanup(shutil.rmtree, cls.root)
        cls.root.chmod(0o755)
        run("bash", "-o", "pipefail", "-c",
            'tar -C / --one-file-system --exclude=./root/faasd --exclude=./usr/share/doc '
            '--exclude=./usr/share/locale -c . | tar -C "$0" -x', cls.root)
        for version in ("", NEXT):
            sources = copy_sources(cls.root / f"root/sources{version}", version)
            run(sources / "packaging/build-deb", cls.root / "root")
        cls.this, cls.next = (f"/root/faasd_{version}_all.deb" for version in (faasd.__version__, NEXT))
        cls.before = installed_files(cls.root)
        cls.compiled_profile = cls.root / "var/cache/apparmor/0123abcd.0/faasd-default"

    def boot(self, systemd: bool) -> Machine:
        # As a boot leaves it where the kernel has AppArmor.
        self.compiled_profile.parent.mkdir(parents=True, exist_ok=True)
        self.compiled_profile.touch()
        machine = Machine(self.root, systemd)
        self.addCleanup(lambda: machine.daemon.directory.exists() and machine.close())
        return machine

    def set_options(self, options: str) -> None:
        (self.root / "etc/default/faasd").write_text(f'FAASD_OPTIONS="{options}"\n')

    def check_nothing_left(self, machine: Machine) -> None:
        self.assertEqual(installed_files(self.root) ^ self.before, set())
        self.assertFalse(self.compiled_profile.exists())
        self.assertFalse(machine.daemon.run_dir.exists())
        self.assertNotIn("\nfaas:", (self.root / "etc/group").read_text())
        cgroups = [path for parent in support.cgroup_directories(machine.name) for path in support.tree(Path(parent))]
        self.assertEqual([path for path in cgroups if "run-faasd" in path], [])
        self.assertEqual(support.addresses(), [])
        self.assertNotIn("/run/faasd", machine.run("cat", "/proc/self/mountinfo"))

    def test_without_systemd(self):
        """Install, run the examples of the manual page, upgrade, crash, purge."""
        machine = self.boot(systemd=False)
        hiding = self.root / "etc/systemd/system/faasd.service"
        hiding.write_text("[Service]\n")
        self.assertIn("faasd.service hides the unit of this package", machine.run("sh", "-c", " ".join(
            [*APT, "install", self.this, "2>&1"])))
        hiding.unlink()
        machine.start("/usr/sbin/faasd")
        page = gzip.decompress((self.root / "usr/share/man/man1/faas.1.gz").read_bytes()).decode().replace("\\-", "-")
        examples = re.search(r"\.SH EXAMPLES\n\.nf\n\.RS\n(.*?)\.RE", page, re.DOTALL)[1]
        self.assertIn("Hello from FaaS handler!", machine.run(
            "bash", "-eo", "pipefail", "-c", f"cp /root/sources/test_handler.py /tmp/handler.py; cd /tmp; {examples}"))
        address = machine.daemon.deploy("f", support.small_image(), "--warm", "1")
        machine.run(*APT, "install", self.next)
        machine.end("HUP")
        machine.start("/usr/sbin/faasd")
        self.assertIn(f"faasd {NEXT}", machine.run("faas", "version"))
        self.assertEqual(get(address), (200, "1"))
        self.assertIn("still runs, so /var/lib/faasd and /run/faasd are left", machine.run("sh", "-c", " ".join(
            [*APT, "purge", "faasd", "2>&1"])))
        self.assertEqual(get(address), (200, "1"))
        machine.run(*APT, "install", self.next)
        machine.daemon.wait_warm("f", 1)
        machine.end("KILL")
        self.assertIn("still runs", machine.try_run("flock", "/var/lib/faasd/faasd.lock", "sh",
                                                    "/var/lib/dpkg/info/faasd.postrm", "purge").stderr)
        machine.run(*APT, "purge", "faasd")
        self.check_nothing_left(machine)

    def test_install_script_without_systemd(self):
        machine = self.boot(systemd=False)
        machine.run("/root/sources/install.sh")
        machine.start("/usr/local/sbin/faasd")
        address = machine.daemon.deploy("f", support.small_image())
        self.set_options("--keep-versions 5")
        machine.run(f"/root/sources{NEXT}/install.sh")
        self.assertIn("5", (self.root / "etc/default/faasd").read_text())
        self.assertEqual(get(address), (200, "1"))
        machine.end("TERM")
        machine.run("/root/sources/install.sh", "--uninstall")
        self.assertFalse((self.root / "usr/local/sbin/faasd").exists())
        self.assertTrue((self.root / "var/lib/faasd/images/f").exists())
        machine.run("/root/sources/install.sh")
        machine.run("/root/sources/install.sh", "--purge")
        self.check_nothing_left(machine)

    def test_under_systemd(self):
        """Install, deploy, join the group, reload, reboot, upgrade, remove, purge; then the same by install.sh."""
        skip_unless_systemd_runs(self)
        machine = self.boot(systemd=True)
        machine.run(*APT, "install", self.this)
        address = machine.daemon.deploy("f", support.small_image(), "--warm", "2")
        self.check_messages(machine)
        with self.in_flight(machine, address, "reloaded"):
            self.check_reload(machine, address)
        machine.reboot()
        machine = self.boot(systemd=True)
        wait_until(machine.daemon.socket.exists, "it has started by itself")
        self.assertEqual(get(address), (200, "1"))
        self.check_upgrade(machine, address, *APT, "install", self.next)
        machine.run(*APT, "remove", "faasd")
        self.check_only_functions_left(machine)
        machine.run(*APT, "purge", "faasd")
        self.check_nothing_left(machine)
        self.check_install_script(machine)

    def check_install_script(self, machine: Machine) -> None:
        machine.run("/root/sources/install.sh")
        self.assertEqual(machine.run("systemctl", "is-enabled", "faasd"), "enabled\n")
        address = machine.daemon.deploy("f", support.small_image())
        self.check_upgrade(machine, address, f"/root/sources{NEXT}/install.sh")
        machine.run("/root/sources/install.sh", "--uninstall")
        self.check_only_functions_left(machine)
        machine.run("/root/sources/install.sh")
        self.assertEqual(get(address), (200, "1"))
        machine.run("/root/sources/install.sh", "--purge")
        self.check_nothing_left(machine)
        self.assertEqual(machine.show("LoadState"), "not-found")

    @contextlib.contextmanager
    def in_flight(self, machine: Machine, address: str, key: str):
        """Have an invocation that goes on over what is done meanwhile."""
        client = Client(address, f"/work?{key}")
        self.addCleanup(client.socket.close)
        client.read_number()
        yield
        client.read_number()
        machine.daemon.release("f", key)
        self.assertTrue(client.rest().endswith("done\n"), client.received[-200:])

    def check_upgrade(self, machine: Machine, address: str, *install: str) -> None:
        """Install the next version while four clients ask without a pause and a fifth one is being served."""
        with self.in_flight(machine, address, "upgraded"), steady_load([address] * 4) as failures:
            machine.run(*install)
        self.assertEqual(failures, [])
        self.assertIn(f"faasd {NEXT}", machine.run("faas", "version"))

    def check_only_functions_left(self, machine: Machine) -> None:
        self.assertEqual(machine.try_run("systemctl", "is-active", "faasd").stdout, "inactive\n")
        self.assertTrue((self.root / "var/lib/faasd/images/f").exists())
        self.assertEqual(support.addresses(), [])

    def check_messages(self, machine: Machine) -> None:
        said = machine.try_run("faasd")
        self.assertEqual(said.returncode, 2)
        self.assertIn("already running on /run/faasd as a service (systemctl status faasd): stop it", said.stderr)
        machine.run("useradd", "somebody")
        uid = machine.run("id", "-u", "somebody").strip()

        def ask() -> subprocess.CompletedProcess:       # always the same session: without the group
            return machine.try_run("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "faas", "list")
        said = ask()
        self.assertEqual(said.returncode, 1)
        self.assertIn("may not open /run/faasd/faasd.sock: only root", said.stderr)
        self.assertIn("sudo usermod -aG faas $USER", said.stderr)
        machine.run("usermod", "-aG", "faas", "somebody")
        wait_until(lambda: ask().returncode == 0, "a new member may use it")
        machine.run("userdel", "somebody")
        machine.run("systemctl", "stop", "faasd")
        self.assertIn("(is it running? systemctl status faasd; sudo systemctl start faasd)",
                      machine.try_run("faas", "list").stderr)
        machine.run("systemctl", "start", "faasd")

    def check_reload(self, machine: Machine, address: str) -> None:
        pid = machine.show("MainPID")
        self.set_options("--nonsense")
        self.assertNotEqual(machine.try_run("systemctl", "reload", "faasd").returncode, 0)
        self.assertEqual((machine.show("MainPID"), get(address)), (pid, (200, "1")))
        self.set_options("--max-warm 1")
        machine.run("systemctl", "reload", "faasd")
        self.assertNotEqual(machine.show("MainPID"), pid)
        self.assertEqual(get(address), (200, "1"))

        def journal(*more: str) -> str:
            return machine.run("journalctl", "--no-pager", "-u", "faasd", "-o", "cat", *more)
        wait_until(lambda: "functions were promised 2 warm containers" in journal("-p", "warning"),
                   "a warning is there")
        self.assertNotIn("ready: ", journal("-p", "warning"))
        self.assertRegex(journal(), r"(?m)^ready: 1 functions, ")
        self.assertIn("\nfaasd\n", "\n" + machine.run("journalctl", "-u", "faasd", "-F", "SYSLOG_IDENTIFIER"))
        self.set_options("")


class Dashboard(unittest.TestCase):
    def test_every_metric_it_shows_is_there(self):
        with support.Daemon() as daemon:
            daemon.deploy("f")
            there = set(re.findall(r"^(\w+)", daemon.api("GET", "/metrics")[1].decode(), re.MULTILINE))
        shown = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
        used = set(re.findall(r"\b((?:faasd|process)_\w+)", " ".join(shown)))
        self.assertGreater(len(used), 8)
        self.assertEqual(used - there, set())


if __name__ == "__main__":
    unittest.main()
