"""The package, its manual pages and completions, the systemd unit and the Grafana dashboard."""

import contextlib
import hashlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import unittest
from pathlib import Path

import support
from support import wait_until

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
        result = subprocess.run(["systemd-analyze", "verify", "--man=no", UNIT], capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_its_capabilities_are_enough(self):
        names = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)[1].lower().split()
        bounding = ",".join(["-all", *(f"+{name.removeprefix('cap_')}" for name in names)])
        wrapper = ("setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounding}")
        with support.Daemon(wrapper=wrapper) as daemon:
            address = daemon.deploy("f")
            self.assertEqual(support.get(address)[0], 200)
            self.assertEqual(support.get(address, "/exit?1")[0], 502)


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
