"""Every command of the documents is run: here, or where COVERED says."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest

import archives
import support
import test_save

README = (support.TOP / "README.md").read_text()
DOCUMENTS = [README, *((support.TOP / name).read_text() for name in ("SECURITY.md", "RUNC.md", "docs/API.md"))]

# Commands that other tests or CI run as they are written.
COVERED = {
    "sudo ./faasd.py": "tests/lib/support.py starts it so, with directories of its own",
    "sudo ./faasd.py --subnet 10.20.0.0/24 --port 8080": "test_daemon_on_another_subnet_and_port below",
    "sudo ./faasd.py --port 81": "tests/serve/test_real_servers.py, behind nginx",
    "docker save test-handler | ./faas new test-handler": "tests/images/test_docker.py",
    "docker save nginx:alpine | ./faas new web": "tests/serve/test_real_servers.py, with Debian's nginx",
    "docker save alpine | ./faas new shout --contract stdio -- tr a-z A-Z": "tests/serve/test_server.py",
    "echo hello | nc -N 10.0.0.10 80": "the same",
    "./faas pack app.py --requirements requirements.txt | ./faas new app": "tests/images/test_pack.py",
    "./faas pack app.py --requirements requirements.txt -- gunicorn app:app | ./faas new app": "the same",
    'sudo install -d -o nobody -g nogroup /srv/notes': "tests/serve/test_volume.py, in a directory of its own",
    "docker save my-app | ./faas new notes --volume /srv/notes:/data": "the same",
    "docker build -t test-handler -f Dockerfile.test-handler .": "tests/images/test_docker.py",
    "(umask 077; head -c 24 /dev/urandom | base64 > token)": "test_control_over_the_network below",
    "sudo ./faasd.py --api 127.0.0.1:8000 --api-token-file token": "the same",
    "./faas --api http://127.0.0.1:8000 --token-file token list": "the same",
    "sudo ./faasd.py --state-dir /var/lib/faasd-2 --run-dir /run/faasd-2 --subnet 10.0.1.0/24":
        "test_several_daemons below",
    "./faas --socket /run/faasd-2/faasd.sock list": "the same",
    "docker save web | ./faas --node a --node b new web --publish 8080": "tests/cluster/test_cluster.py",
    "./faas --node a --node b list": "tests/manage/test_nodes.py",
    "skopeo copy docker://registry.example.org/web docker-archive:/dev/stdout | ./faas --node a --node b new web":
        "tests/cluster/test_cluster.py",
    "./faas --node a --node b proxy-config haproxy --domain example.org": "the same",
    "./faas exec -it NAME": "tests/manage/test_look.py",
    "curl http://10.0.0.10/": "tests/images/test_docker.py",
    "./faas export compose NAME > compose.yaml": "tests/images/test_docker.py",
    "./quickstart.sh": "tests/manage/test_quickstart.py",
    "sudo ./test.sh": ".ci/run",
    "packaging/build-deb": "tests/manage/test_packaging.py",
    "sudo apt install ./faasd_*_all.deb": "the same",
    "sudo ./install.sh": "the same",
    "sudo usermod -aG faas $USER": "test_group below",
    "iptables -I DOCKER-USER -i 'faas+' -j ACCEPT": "tests/serve/test_network.py",
    "iptables -I DOCKER-USER -o 'faas+' -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT": "the same",
    "sudo tar --numeric-owner --xattrs --acls -C /var/lib -cf faasd.tar faasd": "test_backup below",
    "sudo tar --numeric-owner --xattrs --xattrs-include='*' --acls -C /var/lib -xpf faasd.tar": "the same",
}
# What stands for something of the user's own.
PLACEHOLDERS = {"NAME": "my-function", "IMAGE": "image", "HANDLER.py": "test_handler.py", " ARGUMENT…": " one two"}


def commands() -> list[str]:
    """Return the commands of the documents' code blocks, without comments. What is fenced is no command."""
    found = []
    for text in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", "")
        found += re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return [re.split(r"\s{2,}#|\s+# →", line)[0].strip() for line in found]


def words_in_text() -> list[str]:
    """Return the commands in the documents' text that take a function as it is, or none."""
    name = "(faas (?:list|stats|version|(?:info|ip|logs|set|url|versions) NAME)[^`…]*)"
    found = re.findall(rf"`(?:\./)?{name}`", "\n".join(DOCUMENTS))
    return list(dict.fromkeys(found))


class Readme(unittest.TestCase):
    def test_commands(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        shutil.copy(support.TOP / "test_handler.py", directory)
        # As everywhere in tests, not compiled anew by each of 60 commands.
        (directory / "faas").write_text(f"#!/bin/sh\nexec {shlex.join(support.FAAS)} \"$@\"\n")
        (directory / "faas").chmod(0o755)
        run = [command for command in dict.fromkeys(commands()) if command not in COVERED]
        self.assertGreater(len(run), 9, "the README has lost its commands, or this test cannot find them")
        # Made first, for the commands before it take it. Another function comes last, after the address is free again.
        run.sort(key=lambda command: 2 if "pack script.sh" in command else "pack test_handler.py" not in command)
        with support.Daemon() as daemon:
            # The engine itself is tests/images/test_docker.py's; here its output is that of `faas pack`.
            env = {**os.environ, "FAAS_SOCKET": str(daemon.socket), "PATH": f"{directory}:{os.environ['PATH']}"}
            (directory / "other.py").write_text("# other\n" + (directory / "test_handler.py").read_text())
            (directory / "docker").write_text("#!/bin/sh\nexec ./faas pack other.py\n")
            (directory / "docker").chmod(0o755)
            (directory / "script.sh").write_text("#!/bin/sh\nread name\necho Hello, $name\n")
            for command in run:
                with self.subTest(command):
                    for placeholder, value in PLACEHOLDERS.items():
                        command = command.replace(placeholder, value)
                    command = command.replace("/run/faasd/faasd.sock", str(daemon.socket)).replace("curl ", "curl -f ")
                    if re.search("logs .* -f$|top$", command):
                        command = f"timeout 1 {command}; [ $? = 124 ]"      # it goes on until it is ended
                    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=directory, env=env,
                                            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
                    self.assertEqual(result.returncode, 0, f"{command}: {result.stderr}")
            self.assertEqual(daemon.faas("ip", "test-handler").stdout, "10.0.0.10\n")
            self.assertGreater(len(words_in_text()), 5)
            for command in words_in_text():
                with self.subTest(command):
                    daemon.faas(*command.replace("NAME", "test-handler").split()[1:])
            self.assertEqual(daemon.faas("list").stdout.count("\n"), 3)

    def test_what_is_said_to_be_covered_is_there(self):
        for command in COVERED:
            self.assertIn(command, commands())

    def test_daemon_on_another_subnet_and_port(self):
        with support.Daemon("--subnet", "10.20.0.0/24", "--port", "8080") as daemon:
            self.assertEqual(daemon.deploy("f"), "10.20.0.10")
            self.assertEqual(support.get("10.20.0.10", port=8080)[0], 200)
            self.assertEqual(daemon.info("f")["port"], 8080)

    def test_several_daemons(self):
        start, ask = (command.replace("/var/lib/faasd-2", "{state}").replace("/run/faasd-2", "{run}")
                      for command in COVERED if "faasd-2" in command)
        with support.Daemon() as one, support.Daemon(*start.partition("--run-dir {run} ")[2].split()) as two:
            addresses = one.deploy("f", support.small_image("1")), two.deploy("f", support.small_image("2"))
            self.assertEqual(addresses, ("10.0.0.10", "10.0.1.10"))
            self.assertEqual([support.get(address)[1] for address in addresses], ["1", "2"])
            listed = subprocess.run(ask.format(run=two.run_dir), shell=True, cwd=support.TOP, capture_output=True,
                                    text=True, check=True).stdout
            self.assertIn("10.0.1.10", listed)

    def test_options_of_new_are_those_of_the_program(self):
        out = subprocess.run([sys.executable, support.TOP / "faas", "new", "--help"], capture_output=True, text=True,
                             check=True).stdout
        for option in re.findall(r"^\| `(--?[a-z-]+)", README, re.MULTILINE):
            self.assertIn(option, out)

    def test_links_lead_somewhere(self):
        for path in [*support.TOP.glob("*.md"), *support.TOP.glob("docs/*.md")]:
            name, text = path.name, path.read_text()
            for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
                there = path.parent / target if target else path
                self.assertTrue(there.exists(), f"{name} links to {target}")
                if heading:
                    titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                    self.assertIn(heading, anchors, f"{name} links to {target}")
            for path in re.findall(r"`((?:tests|bench|\.ci)/[\w./]+)`", text):
                self.assertTrue((support.TOP / path).exists(), f"{name} names {path}")

    def test_names_in_the_architecture_are_those_of_the_program(self):
        """RUNC.md's table "To change X, look at Y", and the labels of its drawings."""
        program = ast.parse((support.TOP / "faasd.py").read_text())
        known = {node.id for node in ast.walk(program) if isinstance(getattr(node, "ctx", None), ast.Store)
                 and isinstance(node, ast.Name)}
        for node in program.body:
            if hasattr(node, "name"):
                known.add(node.name)
                known |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
        runc = (support.TOP / "RUNC.md").read_text()
        table = re.findall(r"^\|([^|]*)\|([^|]*)\|([^|]*)\|$", runc.partition("## To change")[2].partition("\n## ")[0],
                           re.MULTILINE)[2:]
        self.assertGreater(len(table), 15)
        for what, where, tests in table:
            names = [name for name in re.findall("`([^`]+)`", where) if name not in ("OPTIONS", "faas", "routes")]
            names = [name for name in names if not name.startswith("faas ")]
            self.assertTrue(names, what)
            self.assertLessEqual(set(names), known, what)
            for path in re.findall("`([^`]+)`", tests):
                self.assertTrue((support.TOP / "tests" / path).is_file(), path)
        for drawing in re.findall(r"\(docs/(\w+\.svg)\)", runc):
            labels = re.findall(r'class="code">([^<]+)<', (support.TOP / "docs" / drawing).read_text())
            self.assertGreater(len(labels), 4, drawing)
            self.assertLessEqual(set(labels), known, drawing)

    def test_paths_and_outcomes_are_those_of_the_program(self):
        program, document = ((support.TOP / name).read_text() for name in ("faasd.py", "docs/API.md"))
        routes = re.findall(r"^ {12}\(([^)]*)\): \{(.*?)\}", program, re.MULTILINE | re.DOTALL)
        known = {f"{method} /" + "/".join(re.findall('"([^"]+)"', path)).replace("*", "NAME")
                 for path, methods in routes for method in re.findall('"([A-Z]+)":', methods)}
        self.assertGreater(len(known), 10)
        self.assertEqual(set(re.findall(r"`((?:GET|POST|PATCH|DELETE) /\S*)`(?= \||, )", document)), known)
        outcomes = document.partition("| outcome | |\n")[2].partition("\n\n")[0]
        self.assertEqual(set(re.findall(r"^\| `([a-z-]+)` \|", outcomes, re.MULTILINE)), set(support.faasd.OUTCOMES))

    def test_group(self):
        """In a copy of /etc."""
        command, = (command for command in COVERED if "usermod" in command)
        script = ("mount -t tmpfs tmpfs /mnt && cp -a /etc /mnt && mount --bind /mnt/etc /etc && groupadd -f faas && "
                  f"USER=nobody && {command.removeprefix('sudo ')} && id -nG nobody")
        result = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True,
                                check=False)
        self.assertIn("faas", result.stdout.split(), result)

    def test_backup(self):
        """Of a daemon that runs; unpacked elsewhere all is there again, on the same address, and rolls back."""
        save, restore = (command.removeprefix("sudo ") for command in COVERED if "sudo tar" in command)
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        (directory / "secret").write_text("x")
        with support.Daemon() as daemon:
            for label in ("1", "2"):
                daemon.deploy("f", support.small_image(label))
            daemon.deploy("odd", support.handler_image(layers=[test_save.ODD], User="7:8"), "--user", "9:65535")
            daemon.faas("set", "odd", "--secret", f"pw={directory}/secret")
            save = save.replace("/var/lib", str(daemon.directory)).replace("tar faasd", "tar state")
            subprocess.run(["bash", "-c", save], cwd=directory, check=True)
            before = {part: archives.full_tree(daemon.state_dir / part) for part in ("images", "secrets")}
            daemon.remove("f", "odd")
        other = support.Daemon()
        subprocess.run(["bash", "-c", restore.replace("/var/lib", str(other.directory))], cwd=directory, check=True)
        for part, tree in before.items():
            there = archives.full_tree(other.state_dir / part)
            self.assertEqual({path for path in tree if tree[path] != there.get(path)}, set())
            self.assertEqual(there.keys(), tree.keys())
        self.assertTrue(any("security.capability" in dict(xattrs) for *_, xattrs in before["images"].values()))
        with other:
            self.assertEqual(support.get("10.0.0.10"), (200, "2"))
            other.faas("rollback", "f")
            self.assertEqual(support.get("10.0.0.10"), (200, "1"))
            self.assertEqual(support.get("10.0.0.11")[0], 200)
            self.assertEqual(other.info("odd")["secrets"], ["pw"])

    def test_control_over_the_network(self):
        make_token, start, ask = (command for command in COVERED if "token" in command)
        self.assertLess({make_token, start, ask}, set(commands()))
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        subprocess.run(["bash", "-c", make_token], cwd=directory, check=True)
        options = start.removeprefix("sudo ./faasd.py ").replace("token-file token", f"token-file {directory}/token")
        with support.Daemon(*options.split()) as daemon:
            daemon.deploy("my-function")
            shutil.copy(support.TOP / "faas", directory)
            listed = subprocess.run(["bash", "-c", ask], cwd=directory, capture_output=True, text=True, check=False)
            # This daemon stands for both nodes of "Several machines", too.
            nodes = re.search(r"(?ms)^```toml\n(.*?)^```", README)[1]
            (directory / ".config/faas").mkdir(parents=True)
            (directory / ".config/faas/nodes.toml").write_text(re.sub(r"192\.168\.1\.1[12]", "127.0.0.1", nodes))
            for name in re.findall('token-file = "(.*)"', nodes):
                shutil.copy(directory / "token", directory / ".config/faas" / name)
            command = "./faas --node a --node b list"
            both = subprocess.run(["bash", "-c", command], cwd=directory, env={**os.environ, "HOME": str(directory)},
                                  capture_output=True, text=True, check=False)
        self.assertIn("my-function", listed.stdout, listed)
        self.assertIn(command, commands())
        self.assertEqual(re.findall(r"(?m)^(\w) +my-function ", both.stdout), ["a", "b"], both)


if __name__ == "__main__":
    unittest.main()
