"""The true Docker path: docker build, docker save | ./faas new, curl, with a Docker engine of our own.

The engine (ci/docker_engine.sh) has its data, state and sockets in one temporary directory and no network. The base
image is Debian made by ci/base_image.sh, since no registry can be counted on. Skipped, with the reason, where either is
missing.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time
import unittest
from pathlib import Path

import archives
import faasd
import support
import test_quickstart
import test_save
import test_tools

BASE_IMAGE = Path("/var/cache/faasd-ci/base.tar")

# Layers that do to each other what Dockerfiles do; each step is one rule of how layers stack.
LAYERED = r"""
ARG BASE
FROM $BASE
RUN mkdir -p /t/dir/sub /t/gone/deep && echo one > /t/one && echo two > /t/two && echo old > /t/dir/sub/old \
 && ln -s two /t/link && ln -s dir /t/dirlink && ln /t/two /t/hard && echo x > /t/gone/deep/file
RUN rm /t/one && rm -r /t/gone
RUN ln -snf /t/dir/sub /t/link && rm -r /t/dir/sub && mkdir /t/dir/sub && echo new > /t/dir/sub/new
RUN rm /t/dirlink && mkdir /t/dirlink && echo in > /t/dirlink/inside
RUN mv /t/dir /t/moved && ln -s moved /t/dir && echo more >> /t/two
RUN ln /t/two /t/hard2 && chown 1000:1001 /t/two && chmod 4750 /t/two && mkfifo /t/fifo && mkdir -m 1777 /t/sticky \
    && touch "/t/ünï cödé"
RUN mkdir /t/gone && echo back > /t/gone/again
RUN true
WORKDIR /t/work
COPY test_handler.py /handler.py
ENV GREETING="a b" EMPTY=
USER 1000
CMD ["python3", "/handler.py"]
"""
# What Docker puts into a container's root and faasd prepares for runc: not part of the image.
NOT_THE_IMAGES = (".dockerenv", "dev", "proc", "sys", "tmp", "control.sock", "etc/hostname", "etc/hosts",
                  "etc/resolv.conf", "etc/mtab")


def why_not() -> str:
    """The reason why these tests cannot run here, or nothing."""
    if os.geteuid() != 0:
        return "not root"
    if missing := [name for name in ("docker", "dockerd", "containerd", "runc", "curl") if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)}"
    if not BASE_IMAGE.exists():
        return f"no {BASE_IMAGE}; tests/ci/base_image.sh makes it"
    return "" if support.IN_PRIVATE_NETWORK else "not in a network namespace of its own: run ./test.sh"


class Engine:
    """A running Docker engine, all of it in one directory."""

    def __init__(self, configuration: str):
        self.directory = Path(tempfile.mkdtemp(prefix=f"{support.PREFIX}docker.", dir="/var/tmp"))
        self.directory.chmod(0o711)     # for containers
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{self.directory}/docker.sock", "DOCKER_BUILDKIT": "0",
                    "DOCKER_CONFIG": str(self.directory / "client")}
        for name in ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_API_VERSION"):
            self.env.pop(name, None)
        (self.directory / "daemon.json").write_text(configuration)
        self.process = subprocess.Popen([support.TOP / "tests/ci/docker_engine.sh", self.directory],
                                        stdin=subprocess.PIPE)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.directory / "docker.sock").exists() or self.docker("version", check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self.directory / "dockerd.log"
                last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
                raise unittest.SkipTest(f"dockerd does not run here: {' '.join(last)}")
            time.sleep(0.1)

    def docker(self, *arguments, check: bool = True, **options) -> subprocess.CompletedProcess:
        done = subprocess.run(["docker", *arguments], env=self.env, stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, timeout=120, **options)
        if check and done.returncode != 0:
            command = " ".join(map(str, arguments))
            raise AssertionError(f"docker {command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def build_images(self) -> None:
        self.build("test-handler", support.TOP / "Dockerfile.test-handler", support.TOP)
        context = self.directory / "context"
        context.mkdir()
        shutil.copy(support.TOP / "test_handler.py", context)
        (context / "Dockerfile").write_text(LAYERED)
        self.build("layered", context / "Dockerfile", context)

    def build(self, tag: str, dockerfile: Path | str, context: Path, base: str = "faasd-base") -> None:
        self.docker("build", "--network=none", "--build-arg", f"BASE={base}", "-f", dockerfile, "-t", tag, context)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()         # takes the engine's pid namespace with it
            self.process.wait()
        shutil.rmtree(self.directory)


def describe_file(path: str, mode: int, uid: int, gid: int, content: str) -> tuple:
    return path, oct(mode), uid, gid, content


def tree_of_archive(stream) -> set[tuple]:
    """What a `docker export` holds: path, type and mode, owner, and the content's digest or the link's target."""
    kinds = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.REGTYPE: stat.S_IFREG,
             tarfile.FIFOTYPE: stat.S_IFIFO, tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK}
    tree, by_path = set(), {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            path = entry.name.removeprefix("./").rstrip("/")
            if entry.islnk():
                what = by_path[entry.linkname.removeprefix("./")]
            else:
                content = (hashlib.sha256(archive.extractfile(entry).read()).hexdigest() if entry.isreg()
                           else entry.linkname if entry.issym() else "")
                mode = kinds[entry.type] | (0o777 if entry.issym() else entry.mode)
                what = (mode, entry.uid, entry.gid, content)
            by_path[path] = what
            tree.add(describe_file(path, *what))
    return tree


def tree_of_directory(root: Path) -> set[tuple]:
    """The same of an unpacked image, never following a link; owners as the image has them."""
    tree = set()
    first_id = json.loads((Path(root).parent / "image.json").read_text())["first_id"]
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content = ""
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            owner = status.st_uid - first_id, status.st_gid - first_id
            tree.add(describe_file(os.path.relpath(path, root), status.st_mode, *owner, content))
    return tree


def of_the_image(tree: set[tuple]) -> set[tuple]:
    return {entry for entry in tree if entry[0] not in ("", ".")
            and not any(entry[0] == name or entry[0].startswith(name + "/") for name in NOT_THE_IMAGES)}


@functools.cache
def shared_engine(configuration: str) -> Engine:
    """Return the engine with that daemon.json, and the base image in it: started once, it ends with the file."""
    engine = Engine(configuration)
    unittest.addModuleCleanup(engine.close)
    engine.wait_until_ready()
    engine.docker("import", BASE_IMAGE, "faasd-base")
    return engine


@unittest.skipIf(why_not(), why_not())
class EngineTest(unittest.TestCase):
    configuration = "{}"                # daemon.json

    @classmethod
    def setUpClass(cls):
        cls.engine = shared_engine(cls.configuration)


class DockerPath(EngineTest):
    """With the store that Docker has had for years: archives are those of `docker save` before and after 25."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.engine.build_images()
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)

    def setUp(self):
        """Leave nothing, so that the first function is always at .10."""
        self.addCleanup(self.daemon.remove_all)

    def faas(self, *arguments, stdin) -> subprocess.CompletedProcess:
        return subprocess.run([*support.FAAS, "--socket", self.daemon.socket, *arguments],
                              stdin=stdin, capture_output=True, text=True, timeout=120)

    def save_into_faas(self, images: list[str], *arguments) -> subprocess.CompletedProcess:
        """`docker save IMAGES | ./faas ARGUMENTS`"""
        save = subprocess.Popen(["docker", "save", *images], env=self.engine.env, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with save:
            return self.faas(*arguments, stdin=save.stdout)

    def assert_deployed(self, done: subprocess.CompletedProcess, name: str, address: str) -> None:
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.strip().splitlines()[-1:], [f"✓ Deployed {name} at {address}"], done)

    def assert_refused(self, done: subprocess.CompletedProcess, *words: str) -> None:
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr, r"\Afaas: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, done.stderr)
        self.assertEqual(json.loads(self.daemon.faas("--json", "list").stdout), [])
        self.assertEqual(list((self.daemon.state_dir / "images").glob("*")), [])

    def test_build_save_new_curl(self):
        self.assert_deployed(self.save_into_faas(["test-handler"], "new", "test-handler"), "test-handler", "10.0.0.10")
        answer = support.curl("http://10.0.0.10/path?x=1")
        self.assertIn("Hello from FaaS handler!", answer)
        self.assertIn("GET /path?x=1", answer)

    def test_layers_stack_as_docker_stacks_them(self):
        self.assert_deployed(self.save_into_faas(["layered"], "new", "layered"), "layered", "10.0.0.10")
        self.assertIn("Hello from FaaS handler!", support.curl("http://10.0.0.10/path?x=1"))
        container = self.engine.docker("create", "layered").stdout.strip()
        with subprocess.Popen(["docker", "export", container], env=self.engine.env, stdout=subprocess.PIPE) as export:
            docker = of_the_image(tree_of_archive(export.stdout))
        rootfs = self.daemon.rootfs("layered")
        ours = of_the_image(tree_of_directory(rootfs))
        self.assertGreater(len(docker), 1000)
        self.assertEqual([path for path, *_ in sorted(ours ^ docker)], ["t/fifo"])      # named pipes are left out
        self.assertTrue(any(path == "t/gone/again" for path, *_ in ours))
        self.assertEqual(os.stat(rootfs / "t/two").st_ino, os.stat(rootfs / "t/hard2").st_ino)

    def test_save_load_run(self):
        """`faas save | docker load | docker run`: the same files and configuration as those of Docker's own image."""
        done = self.save_into_faas(["layered"], "new", "saved", "--memory", "100m", "-e", "SECRET=1")
        self.assert_deployed(done, "saved", "10.0.0.10")
        archive = self.daemon.directory / "saved.tar"
        with archive.open("wb") as file:
            subprocess.run([*support.FAAS, "--socket", self.daemon.socket, "save", "saved"], stdout=file, check=True)
        self.engine.docker("load", "-i", archive)
        trees = {}
        for image in ("layered", "saved"):
            container = self.engine.docker("create", image).stdout.strip()
            with subprocess.Popen(["docker", "export", container], env=self.engine.env,
                                  stdout=subprocess.PIPE) as export:
                trees[image] = of_the_image(tree_of_archive(export.stdout))
            self.engine.docker("rm", container)
        self.assertEqual([path for path, *_ in sorted(trees["layered"] ^ trees["saved"])], ["t/fifo"])
        theirs, ours = (json.loads(self.engine.docker("image", "inspect", image).stdout)[0]["Config"]
                        for image in ("layered", "saved"))
        self.assertEqual(ours.pop("Labels"), {**(theirs.pop("Labels") or {}), "faasd.memory": "104857600"})
        self.assertEqual(*({key: value for key, value in config.items() if value} for config in (ours, theirs)))
        done = self.engine.docker("run", "--rm", "--network=none", "saved", "sh", "-c",
                                  "id -u; pwd; echo $GREETING; ls")
        self.assertEqual(done.stdout.split("\n")[:3], ["1000", "/t/work", "a b"])

    def test_large_layer_that_is_there_twice(self):
        """`docker save` has it once. Its bytes are given back as they are unpacked, but not before the last turn."""
        large = b"as it was\n" * (faasd.SEGMENT // 8)
        twice, between = support.layer({"large": large}), support.layer({"large": "other", "more": "more"})
        archive = self.engine.directory / "twice.tar"
        archive.write_bytes(support.docker_archive(
            [twice, support.python_layer(), support.layer({"handler.py": support.HANDLER.read_bytes()}), between,
             twice],
            {"Entrypoint": [support.PYTHON, "/handler.py"]}, "twice:latest"))
        self.engine.docker("load", "-i", archive)
        archive.unlink()
        self.assert_deployed(self.save_into_faas(["twice"], "new", "twice"), "twice", "10.0.0.10")
        rootfs = self.daemon.rootfs("twice")
        self.assertTrue((rootfs / "large").read_bytes() == large)
        self.assertEqual((rootfs / "more").read_text(), "more")

    def test_two_images_in_one_archive(self):
        images = ["test-handler", "layered"]
        self.assert_refused(self.save_into_faas(images, "new", "two"), "test-handler:latest", "layered:latest")
        done = self.save_into_faas(images, "new", "two", "--tag", "test-handler:latest")
        self.assert_deployed(done, "two", "10.0.0.10")

    def test_two_tags_of_one_image(self):
        self.engine.docker("tag", "test-handler", "test-handler:again")
        done = self.save_into_faas(["test-handler", "test-handler:again"], "new", "one")
        self.assert_deployed(done, "one", "10.0.0.10")

    def test_docker_save_of_an_unknown_image(self):
        self.assert_refused(self.save_into_faas(["nosuch"], "new", "nosuch"), "empty")

    def test_docker_export_is_not_an_image(self):
        container = self.engine.docker("create", "test-handler").stdout.strip()
        with subprocess.Popen(["docker", "export", container], env=self.engine.env, stdout=subprocess.PIPE) as export:
            self.assert_refused(self.faas("new", "exported", stdin=export.stdout), "docker save")


# What every image of SavedImages prints when it runs, and `docker build` and others have as entrypoint.
PRINTS = 'id; pwd; env; cat /proc/self/cmdline'
BUSYBOX = ["/bin/busybox", "sh", "-c", PRINTS, "-"]
# What a container sees of its root, by a Python of this machine's: for each path all that `docker export` loses too.
MANIFEST = r"""
import hashlib, json, os, stat, sys

def text(data):
    return os.fsencode(data).hex() if isinstance(data, str) else data.hex()

def content(path, status):
    if stat.S_ISLNK(status.st_mode):
        return text(os.readlink(path))
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return status.st_rdev

found, first = {}, {}
device = os.lstat("/").st_dev
for directory, names, files in os.walk("/"):
    for name in names + files:
        path = os.path.join(directory, name)
        status = os.lstat(path)
        same = first.setdefault(status.st_ino, path) if not stat.S_ISDIR(status.st_mode) else path
        attributes = {key: text(os.getxattr(path, key, follow_symlinks=False))
                      for key in sorted(os.listxattr(path, follow_symlinks=False))}
        found[path[1:]] = [oct(status.st_mode), status.st_uid, status.st_gid, content(path, status), same,
                           status.st_mtime_ns, attributes]
    names[:] = [name for name in names if os.path.join(directory, name) not in
                ("/proc", "/sys", "/dev", "/.host")]
json.dump(found, sys.stdout)
"""
TIME = 5                        # in such a row
DOCKERFILES = {
    "layers": LAYERED,
    "scratch": r"""
FROM scratch
COPY busybox /bin/busybox
USER 12345:54321
WORKDIR /made/on the way
ENV A="b c" PATH=/bin:/x
LABEL l=v
STOPSIGNAL SIGINT
HEALTHCHECK --interval=9s CMD ["/bin/busybox", "true"]
VOLUME /data
EXPOSE 81/udp 80
""",
    "stages": r"""
ARG BASE
FROM $BASE AS first
RUN mkdir -p /o/dir/sub "/o/a b" && echo 1 > /o/dir/sub/one && echo s > /o/setuid && chmod 6755 /o/setuid \
 && ln /o/setuid /o/linked && chown 4321:65000 /o/dir && ln -s /nowhere /o/dangling && touch -d 1999-01-01 /o/dir \
 && touch -d 2001-01-01 /o/dir/sub/one && mkdir -m 3770 /o/shared && touch "$(printf '/o/back\\134slash\\nline')"
FROM $BASE
COPY busybox /bin/busybox
COPY --from=first --chown=7:8 /o /copied
COPY --from=first /o /kept
ADD added.tar.gz /added
RUN rm -r /kept/dir && mkdir /kept/dir && echo new > /kept/dir/new && chmod 0 /kept/setuid && rm /etc/passwd-
USER nobody:staff
""",
}


def small_base() -> bytes:
    """Return a root file system on which Dockerfiles can run ordinary commands, for `docker import`.

    Debian's has two thousand files, which Docker and faasd take a dozen times for each image; three makers use it.
    """
    programs = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    users = "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
    return archives.layer(
        archives.file("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
        *(archives.symlink(f"bin/{name}", "busybox") for name in programs if name != "busybox"),
        archives.file("etc/passwd", users), archives.file("etc/passwd-", users),
        archives.file("etc/group", "root:x:0:\nstaff:x:50:\n"))


class SavedImages(EngineTest):
    """`faas save | docker load`: for images of other makers, a container of what comes back is one of the original."""

    maxDiff = 3000

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tools = test_tools.Tools
        cls.tools.setUpClass()          # or skip all
        cls.addClassCleanup(cls.tools.doClassCleanups)
        cls.context = cls.engine.directory / "makers"
        cls.context.mkdir(mode=0o755)
        shutil.copy("/bin/busybox", cls.context)
        shutil.copy(support.TOP / "test_handler.py", cls.context)
        with tarfile.open(cls.context / "added.tar.gz", "w:gz") as tar:
            tar.add(support.TOP / "test_handler.py", "deep/er/file")
        (cls.context / "base.tar").write_bytes(small_base())
        cls.engine.docker("import", cls.context / "base.tar", "small-base")
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)

    # -- makers: each returns the archive that faas new takes --

    def dockers(self, tag: str) -> Path:
        return self.file(lambda path: self.engine.docker("save", "-o", path, tag))

    def file(self, write) -> Path:
        path = self.context / "image.tar"
        path.unlink(missing_ok=True)
        write(path)
        return path

    def build(self, tag: str) -> Path:
        entrypoint = "" if tag == "layers" else f"ENTRYPOINT {json.dumps(BUSYBOX)}\nCMD [\"said\", \"a b\"]\n"
        (self.context / "Dockerfile").write_text(DOCKERFILES[tag] + entrypoint)
        self.engine.build(tag, self.context / "Dockerfile", self.context, "small-base" if entrypoint else "faasd-base")
        return self.dockers(tag)

    def commit(self, tag: str) -> Path:
        changes = ("rm -r /etc/skel /etc/alternatives; mkdir /etc/alternatives; echo x > /etc/alternatives/x; "
                   "cp -a /bin/sh /su; chmod u+s /su; ln /su /su2; chown 99:65535 /su; mkfifo /pipe; rm /usr/bin/head; "
                   "mknod /null c 1 3; touch \"$(printf 'a\\377b')\"; ln -s su2 /link")
        self.engine.docker("run", "--name", tag, "--network=none", "faasd-base", "sh", "-c", changes)
        self.engine.docker("commit", "--change", f"ENTRYPOINT {json.dumps(['sh', '-c', PRINTS])}", "--change",
                           "ENV G=h", "--change", "WORKDIR /usr", tag, tag)
        self.engine.docker("rm", tag)
        return self.dockers(tag)

    def import_(self, tag: str) -> Path:
        self.engine.docker("import", "--change", f"CMD {json.dumps(['sh', '-c', PRINTS])}", "--change", "USER daemon",
                           BASE_IMAGE, tag)
        return self.dockers(tag)

    def odd(self, tag: str) -> Path:
        """Attributes, capabilities, ACLs, holes, devices, names: no maker in particular."""
        tools = support.layer({"bin/busybox": Path("/bin/busybox").read_bytes()})
        image = support.docker_archive([tools, test_save.ODD], {"Entrypoint": BUSYBOX, "User": "7:8"}, f"{tag}:latest")
        return self.file(lambda path: path.write_bytes(image))

    def buildah(self, tag: str) -> Path:
        kind = "oci" if tag == "buildah-oci" else "docker"
        self.tools.buildah("from", "--name", tag, f"localhost/app:{kind}")
        shutil.copy("/bin/busybox", Path(self.tools.buildah("mount", tag)) / "bin/busybox")
        self.tools.buildah("config", "--entrypoint", json.dumps(BUSYBOX), tag)
        self.tools.buildah("commit", "--format", kind, "--quiet", tag, f"localhost/{tag}:1")
        name = f"oci-archive:{{}}:{tag}" if kind == "oci" else f"docker-archive:{{}}:{tag}:latest"
        return self.file(lambda path: self.tools.buildah(
            "push", "--signature-policy", self.tools.policy, f"localhost/{tag}:1", name.format(path)))

    def podman(self, tag: str) -> Path:
        (self.context / "Dockerfile").write_text(
            f"FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n"
            "RUN mkdir -m 2775 /d && echo 1 > /d/1 && ln /d/1 /d/2 && chown 5:6 /d/1\nRUN rm -r /d/2\nUSER 5\n"
            f"ENTRYPOINT {json.dumps(BUSYBOX)}\nENV A=1\n")
        podman = ("podman", *self.tools.storage, "--tmpdir", self.tools.directory / "tmp", "--cgroup-manager=cgroupfs")
        self.tools.run_tool(*podman, "build", "--signature-policy", self.tools.policy, "--tag", f"localhost/{tag}:1",
                            # Newer ones ask for more than this machine may give.
                            "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", self.context)
        return self.file(lambda path: self.tools.run_tool(
            *podman, "save", "--quiet", "--format", "oci-archive", "-o", path, f"localhost/{tag}:1"))

    def umoci(self, tag: str) -> Path:
        layout, bundle = self.context / "umoci", self.context / "bundle"
        self.tools.run_tool("umoci", "init", "--layout", layout)
        self.tools.run_tool("umoci", "new", "--image", f"{layout}:{tag}")
        for step in (test_tools.populate, test_tools.change):
            self.tools.run_tool("umoci", "unpack", "--image", f"{layout}:{tag}", bundle)
            step(bundle / "rootfs")
            shutil.copy("/bin/busybox", bundle / "rootfs/bin/busybox")
            self.tools.run_tool("umoci", "repack", "--image", f"{layout}:{tag}", bundle)
            shutil.rmtree(bundle)
        words = [word for argument in BUSYBOX for word in ("--config.entrypoint", argument)]
        self.tools.run_tool("umoci", "config", "--image", f"{layout}:{tag}", *words, "--config.user", "app",
                            "--config.workingdir", "/srv/app", "--config.env", "A=b c")
        return self.file(lambda path: subprocess.run(["tar", "-C", layout, "-cf", path, "."], check=True))

    def skopeo(self, tag: str) -> Path:
        """Docker's own, by way of an OCI layout with layers in zstd."""
        self.build("stages")
        self.engine.docker("tag", "stages", tag)
        docker, layout = self.dockers(tag), self.context / "layout"
        self.tools.run_tool("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-compress-format", "zstd",
                            f"docker-archive:{docker}", f"oci:{layout}:{tag}")
        return self.file(lambda path: subprocess.run(["tar", "-C", layout, "-cf", path, "."], check=True))

    # -- what Docker makes of an image --

    def manifest(self, image: str) -> dict:
        loader, = {path.name for path in Path("/usr").glob("lib*/ld-linux*")}
        libraries = [path for path in ("/.host/lib/" + os.uname().machine + "-linux-gnu", "/.host/lib64")]
        done = self.engine.docker(
            "run", "--rm", "--network=none", "--user=0", "--volume=/usr:/.host:ro",
            "--env=PYTHONHOME=/.host", f"--entrypoint={libraries[0]}/{loader}", image,
            "--library-path", libraries[0], f"/.host/bin/{Path(os.path.realpath('/usr/bin/python3')).name}", "-I", "-S",
            "-c", MANIFEST)
        return {path: what for path, what in json.loads(done.stdout).items()
                if path.split("/")[0] != ".host" and (path == "tmp" or of_the_image({(path,)}))}

    def config(self, image: str) -> dict:
        config = json.loads(self.engine.docker("image", "inspect", image).stdout)[0]["Config"]
        return {key: value for key, value in config.items() if value and key not in ("Hostname", "Image")}

    def prints(self, image: str) -> str:
        done = self.engine.docker("run", "--rm", "--network=none", "--hostname=h", image, check=False,
                                  errors="surrogateescape")
        return done.stdout + done.stderr

    def load(self, tag: str, archive: Path) -> None:
        """Have Docker take the original; of OCI's archives it knows nothing before 25."""
        with tarfile.open(archive) as tar:
            names = tar.getnames()
        if "manifest.json" not in names:
            docker = self.context / "docker.tar"
            docker.unlink(missing_ok=True)
            self.tools.run_tool("skopeo", "--insecure-policy", "copy", "--quiet", f"oci-archive:{archive}",
                                f"docker-archive:{docker}:{tag}:latest")
            archive = docker
        self.engine.docker("load", "-i", archive)

    def check(self, tag: str, make, left_out: set[str]) -> None:
        archive, made = make(tag), time.time_ns()
        if make not in (self.build, self.commit, self.import_, self.skopeo):
            self.load(tag, archive)
        with archive.open("rb") as file:
            subprocess.run([*support.FAAS, "--socket", self.daemon.socket, "new", tag, "--contract", "stdio"],
                           stdin=file, check=True, capture_output=True)
        saved = self.file(lambda path: path.write_bytes(subprocess.run(
            [*support.FAAS, "--socket", self.daemon.socket, "save", tag], stdout=subprocess.PIPE, check=True).stdout))
        self.daemon.remove(tag)
        before, config, prints = self.manifest(tag), self.config(tag), self.prints(tag)
        self.engine.docker("rmi", tag)
        self.engine.docker("load", "-i", saved)
        after = self.manifest(tag)
        self.assertGreater(len(before), 5)
        self.assertEqual(before.keys() - after.keys(), left_out)
        for path in before.keys() - left_out:
            if before[path][TIME] > made:           # Docker's, as it unpacks or starts a container
                before[path][TIME] = after[path][TIME]
        different = [path for path in after if before.get(path) != after[path]]
        self.assertEqual(*({path: tree.get(path) for path in different} for tree in (after, before)))
        ours = self.config(tag)
        labels = {key: value for key, value in ours.pop("Labels", {}).items() if not key.startswith("faasd.")}
        self.assertEqual((labels, ours), (config.pop("Labels", {}), config))
        self.assertEqual(self.prints(tag), prints)
        self.assertTrue(prints)

    def test_ten_makers(self):
        for tag, make, left_out in (
                ("skopeo", self.skopeo, set()), ("stages", self.build, set()),
                ("layers", self.build, {"t/fifo"}), ("scratch", self.build, set()),
                ("commit", self.commit, {"pipe"}), ("import", self.import_, set()), ("odd", self.odd, set()),
                ("buildah-docker", self.buildah, {"data/fifo"}), ("buildah-oci", self.buildah, {"data/fifo"}),
                ("podman", self.podman, set()), ("umoci", self.umoci, {"data/fifo"})):
            with self.subTest(tag):
                self.check(tag, make, left_out)


# A server that tells what it is given.
TELLING = """
import json, os, socket
names = "GREETING PORT PATH".split()
read = lambda path: open(path).read()
listener = socket.create_server(("", int(os.environ["PORT"])))
while True:
    client, _ = listener.accept()
    with client:
        client.recv(1000)
        status = dict(line.split(":\\t") for line in read("/proc/self/status").splitlines() if ":\\t" in line)
        try:
            open("/new", "w")
            writes = True
        except OSError:
            writes = False
        body = json.dumps([
            os.getuid(), os.getgid(), os.getcwd(), read("/proc/self/cmdline"), read("/data/file"),
            read("/run/secrets/pass.word"), writes, os.uname().nodename,
            {name: status[name] for name in ("CapEff", "NoNewPrivs", "Seccomp")},
            os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
            {name: os.environ.get(name) for name in names}])
        client.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
"""


class ComposePath(EngineTest):
    def test_export_compose_up(self):
        """`faas export compose`: the engine runs the image as faasd does, in what a program sees of it."""
        if not shutil.which("docker-compose"):
            self.skipTest("not installed: docker-compose")
        directory = self.engine.directory / "compose"
        (directory / "data").mkdir(parents=True)
        (directory / "data/file").write_text("of the volume")
        (directory / "pass.word").write_text("a secret")
        image = support.handler_image(TELLING)
        with support.Daemon() as daemon:
            address = daemon.deploy(
                "web", image, "--memory", "96m", "--cpus", "0.5", "--pids", "20", "--user", "7:8",
                "--hostname", "inside", "--workdir", "/tmp/w", "--read-only", "true", "--shm-size", "1m",
                "--entrypoint", support.PYTHON, "--volume", f"{directory}/data:/data:ro", "-e", "PORT=8123",
                "-e", "GREETING=$HOME ${x} $$ \"q\" ü:\n#", "--", "-S", "/handler.py", "$x")
            daemon.faas("set", "web", "--secret", f"pass.word={directory}/pass.word")
            expected = json.loads(support.curl(f"http://{address}/"))
            (directory / "compose.yaml").write_text(daemon.faas("export", "compose", "web").stdout)
            with (directory / "image.tar").open("wb") as file:
                subprocess.run([*support.FAAS, "--socket", daemon.socket, "save", "web"], stdout=file, check=True)
        self.engine.docker("load", "-i", directory / "image.tar")

        def compose(*arguments: str) -> str:
            done = subprocess.run(["docker-compose", "--project-name", "exported", *arguments], cwd=directory,
                                  env=self.engine.env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done)
            return done.stdout.strip()
        self.addCleanup(compose, "down", "--timeout", "1")
        compose("up", "--detach")
        place = compose("port", "web", "8123")
        self.assertRegex(place, "^127.0.0.1:")
        answer = support.wait_until(lambda: support.curl(f"http://{place}/", check=False), "the server answers")
        self.assertEqual(json.loads(answer), expected)
        host = json.loads(self.engine.docker("inspect", compose("ps", "--quiet")).stdout)[0]["HostConfig"]
        self.assertEqual([host[key] for key in ("Memory", "MemorySwap", "NanoCpus", "PidsLimit")],
                         [96 << 20, 96 << 20, 500_000_000, 20])


class DaemonSetTest(EngineTest):
    """faasd in a container, as packaging/kubernetes has it: with the node's network, state-dir and run-dir.

    Of what privileged gives it has what it needs, in which the capabilities are those of packaging/faasd.service: not
    every machine that runs tests has all of them to give.
    """

    def test_faasd_in_a_container(self):
        node, packaging = self.engine.directory / "node", support.TOP / "packaging"
        text = (packaging / "kubernetes/faasd.yaml").read_text()
        arguments, places = re.findall(r"- (--\S+)", text), re.findall(r"mountPath: (\S+)", text)
        self.assertEqual((arguments, places), (["--subnet=10.250.0.0/24"], ["/var/lib/faasd", "/run/faasd"]))
        unit = (packaging / "faasd.service").read_text()
        wanted = re.search("^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)[1].split()
        if not faasd.can_set_limits():
            wanted.remove("CAP_SYS_RESOURCE")
        for place in places:
            (node / place.lstrip("/")).mkdir(parents=True)
        mounts = [f"{node}{place}:{place}" for place in places]
        mounts += ["/sys/fs/cgroup:/sys/fs/cgroup", "/usr:/usr:ro", f"{support.TOP}:/src:ro"]
        self.engine.docker(
            "run", "--detach", "--name=faasd", "--network=host", "--cgroupns=host", "--cap-drop=ALL",
            *(f"--cap-add={name}" for name in wanted),
            *(f"--security-opt={kind}=unconfined" for kind in ("seccomp", "apparmor", "systempaths")),
            *(f"--volume={mount}" for mount in mounts), "faasd-base", "/src/faasd.py", *arguments)
        self.addCleanup(self.engine.docker, "rm", "--force", "faasd")

        def faas(*words: str, stdin=subprocess.DEVNULL) -> bool:
            done = subprocess.run(["docker", "exec", "--interactive", "faasd", "/src/faas", *words], stdin=stdin,
                                  env=self.engine.env, capture_output=True, text=True)
            return done.returncode == 0

        def answers() -> bool:
            return support.curl("http://10.250.0.10/", check=False) == "1"
        support.wait_until(lambda: (node / "run/faasd/faasd.sock").exists() and faas("list"), "faasd answers")
        (node / "image.tar").write_bytes(support.small_image("1"))
        with (node / "image.tar").open("rb") as image:
            self.assertTrue(faas("new", "f", "--publish", "8080", stdin=image))
        self.assertTrue(answers())
        self.assertEqual(support.curl("http://127.0.0.1:8080/"), "1")
        for way in (("restart", "--time=45"), ("kill",)):
            self.engine.docker(*way, "faasd")
            self.engine.docker("start", "faasd")
            support.wait_until(answers, f"the function is there again after {way}")
        self.engine.docker("stop", "--time=45", "faasd")
        self.assertEqual(support.addresses("10.250.0.0/24"), [])


class ContainerdStore(DockerPath):
    """The same with images in containerd, the default of new installations since Docker 29."""

    configuration = '{"features": {"containerd-snapshotter": true}}'

    @classmethod
    def setUpClass(cls):
        version = subprocess.run(["dockerd", "--version"], capture_output=True, text=True, check=True).stdout
        if int(re.search(r"version (\d+)", version)[1]) < 25:
            raise unittest.SkipTest(f"no containerd image store in this Docker: {version.strip()}")
        super().setUpClass()


class QuickstartWithDocker(EngineTest):
    def test_docker_build(self):
        self.engine.docker("tag", "faasd-base", "python:3.13-alpine")       # what Dockerfile.test-handler builds on
        output = test_quickstart.run_quickstart(self, self.engine.env)
        self.assertIn("docker save test-handler", output)
        self.assertNotIn("faas pack", output)
        self.assertIn("docker rmi test-handler", output)


if __name__ == "__main__":
    unittest.main()
