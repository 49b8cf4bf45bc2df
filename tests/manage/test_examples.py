"""examples/: what each Dockerfile says is built on what this machine has of its base image, deployed, and asked.

No registry can be counted on, and a Docker engine would copy hundreds of megabytes for each: the last stage of a
Dockerfile is read here. What is installed by its RUN is in the base already.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import support
import test_real_servers

EXAMPLES = support.TOP / "examples"


def read_dockerfile(name: str, built: dict[str, Path] | None = None) -> tuple[bytes, dict]:
    """Return the layer and the configuration that the last stage of an example adds to its base."""
    files, config = {}, {"Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
    for line in (EXAMPLES / name / "Dockerfile").read_text().rpartition("\nFROM ")[2].splitlines()[1:]:
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *sources, target = rest.replace("--from=builder", "").split()
            for source in sources:
                path = built[source] if built else EXAMPLES / name / source
                files[target.lstrip("/") + (path.name if target.endswith("/") else "")] = path.read_bytes()
        elif word in ("CMD", "ENTRYPOINT"):
            config[word.capitalize()] = json.loads(rest)
        elif word == "WORKDIR":
            config["WorkingDir"] = rest
        elif word != "RUN":
            raise AssertionError(f"{name}/Dockerfile: this test does not know {word}")
    return support.layer(files), config


def programs(*paths: str) -> bytes:
    """Return a layer with programs of this machine and their shared libraries."""
    return support.layer({file.lstrip("/"): Path(file).read_bytes()
                          for path in paths for file in (path, *support.libraries(path))})


class Examples(support.SharedDaemonCase):
    def deploy(self, layers: list[bytes], config: dict, deployed: str, *options: str) -> None:
        out = self.daemon.faas("new", "hello", *options, stdin=support.docker_archive(layers, config)).stdout
        self.assertEqual(out, f"✓ Deployed hello at 10.0.0.10{deployed}\n")

    def assert_answers(self, body: str) -> None:
        for _ in range(2):
            status, answer = support.get("10.0.0.10")
            self.assertEqual(status, 200)
            self.assertRegex(answer, rf"\A(?s:{body})\Z")

    def test_each_has_a_dockerfile_and_a_line(self):
        names = sorted(path.name for path in EXAMPLES.iterdir())
        self.assertEqual(names, ["flask", "go", "handler", "node", "shell", "static"])
        for name in names:
            self.assertEqual((EXAMPLES / name / "README.md").read_text().count("\n"), 1, name)
            self.assertRegex((EXAMPLES / name / "Dockerfile").read_text(), r"\AARG \w+=\S+\nFROM \$")

    def test_handler(self):
        layer, config = read_dockerfile("handler")
        python3 = os.path.join(os.path.dirname(support.PYTHON), "python3")
        config["Env"] = [f"PATH={os.path.dirname(python3)}"]
        self.deploy([support.python_layer(), programs(python3), layer], config, "")
        self.assert_answers(r"Hello, 10\.0\.0\.10, from a handler!\n")

    def test_shell(self):
        layer, config = read_dockerfile("shell")
        self.deploy([programs("/bin/sh"), layer], config, " (stdio)", "--contract", "stdio")
        self.assert_answers("Hello from a shell, where you asked for /!\n")

    def test_shell_without_docker(self):
        packed = subprocess.run([support.TOP / "faas", "pack", EXAMPLES / "shell/hello.sh"], check=True,
                                stdout=subprocess.PIPE)
        self.daemon.faas("new", "hello", "--contract", "stdio", stdin=packed.stdout)
        self.assert_answers("Hello from a shell, where you asked for /!\n")

    @unittest.skipUnless(shutil.which("node"), "node is not installed")
    def test_node(self):
        layer, config = read_dockerfile("node")
        library = {str(path).lstrip("/"): path.read_bytes()         # what is not in Debian's binary, of node's own
                   for path in Path("/usr/share/nodejs").glob("**/*.js") if path.is_file()}
        self.deploy([programs(shutil.which("node")), support.layer(library), layer], config, " (server, port 8080)")
        self.assert_answers(r"Hello, 10\.0\.0\.10, from Node!\n")

    @unittest.skipUnless(shutil.which("go"), "go is not installed")
    def test_go(self):
        directory = support.temporary_directory()
        self.addCleanup(shutil.rmtree, directory)
        build = re.search("^RUN (.*)$", (EXAMPLES / "go/Dockerfile").read_text(), re.MULTILINE)[1]
        build = build.replace("/server", f"{directory}/server").replace("/src", str(EXAMPLES / "go"))
        subprocess.run(build, shell=True, check=True, env={**os.environ, "GOCACHE": f"{directory}/cache"})
        layer, config = read_dockerfile("go", {"/server": directory / "server"})
        self.deploy([layer], config, " (server, port 8080)")
        self.assert_answers(r"Hello, 10\.0\.0\.10:\d+, from Go!\n")

    @unittest.skipUnless(test_real_servers.LAYER.exists(), "tests/ci/servers_image.sh has made no image")
    def test_static_and_flask(self):
        """One image, for their base is the same, and large; the command says which of them runs."""
        layer, config = read_dockerfile("static")
        flask, flask_config = read_dockerfile("flask")
        with tempfile.NamedTemporaryFile(dir="/var/tmp", prefix=support.PREFIX) as archive:
            test_real_servers.write_image(archive, [layer, flask], **config)
            out = self.daemon.faas("new", "hello", "-f", archive.name).stdout
        self.assertEqual(out, "✓ Deployed hello at 10.0.0.10 (server, port 80)\n")
        self.assert_answers(".*<p>Hello from nginx!</p>\n")
        self.daemon.faas("set", "hello", "--workdir", flask_config["WorkingDir"], "--", *flask_config["Cmd"])
        self.assert_answers(r"Hello, 10\.0\.0\.10, from Flask!\n")
        self.daemon.remove("hello")             # large, and removing it goes on behind the answer
        support.wait_until(lambda: not list((self.daemon.state_dir / "tmp").iterdir()), "its image is gone",
                           test_real_servers.REMOVAL_SECONDS)


if __name__ == "__main__":
    unittest.main()
