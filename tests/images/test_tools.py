"""Images as skopeo, podman, buildah and umoci really write them: every archive of one image gives the same rootfs.

No network, and nothing is left: each tool runs in a mount namespace of its own, in which /run and /var/lib are empty
tmpfs, and keeps its storage in the test's directory. What umoci unpacks is the reference for what faasd unpacks.
"""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
import unittest
from pathlib import Path

import faasd
import archives
from test_archive import of_the_image

# Mounts in front of a tool; its own arguments follow.
PRIVATE = ("unshare", "--mount", "--propagation", "private", "sh", "-c",
           'mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && exec "$@"', "sh")
CONFIG = ["--entrypoint", '["/bin/tool", "-x"]', "--cmd", "serve now", "--env", "A=b c", "--env", "PATH=/bin",
          "--workingdir", "/srv/app", "--user", "app", "--label", "l=v", "--port", "80", "--volume", "/data"]


def populate(root: Path) -> None:
    """The first layer: one of each."""
    for path in ("bin", "etc", "lib", "data", "usr/share/gone/deep", "usr/share/swapped"):
        (root / path).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:\napp:x:1000:1001::/home/app:\n")
    (root / "etc/group").write_text("app:x:1001:\nextra:x:30:app\n")
    (root / "bin/tool").write_bytes(os.urandom(200_000) + bytes(300_000))
    (root / "bin/tool").chmod(0o4755)
    os.link(root / "bin/tool", root / "bin/other-name")
    (root / "lib/link").symlink_to("../bin/tool")
    (root / "lib/absolute").symlink_to("/etc/passwd")
    (root / "lib/dangling").symlink_to("/no/such")
    os.mkfifo(root / "data/fifo", 0o620)
    os.mknod(root / "data/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "data/owned").write_text("x")
    os.chown(root / "data/owned", 1000, 1001)
    (root / "data/sticky").mkdir()
    (root / "data/sticky").chmod(0o1777)
    (root / "data" / ("long-name-" * 20)).write_text("long")
    (root / "data/ünï cödé").write_text("u")
    (root / "data/empty").touch()
    (root / "usr/share/gone/deep/file").write_text("goes away")
    (root / "usr/share/swapped/file").write_text("goes away")
    (root / "data/changed").write_text("old")
    os.setxattr(root / "bin/tool", "security.capability", archives.CAPABILITY)
    os.setxattr(root / "data/owned", "user.note", b"kept")
    age(root)


def change(root: Path) -> None:
    """The second layer: removals, a directory that becomes a link, a file that becomes a directory."""
    shutil.rmtree(root / "usr/share/gone")
    shutil.rmtree(root / "usr/share/swapped")
    (root / "usr/share/swapped").symlink_to("../../data")
    (root / "data/changed").unlink()
    (root / "data/changed").mkdir()
    (root / "data/changed/inside").write_text("new")
    (root / "data/empty").unlink()
    os.chown(root / "data/owned", 7, 8)
    for path in ("data/changed/inside", "data/changed", "usr/share/swapped", "usr/share", "data"):
        os.utime(root / path, (1_650_000_000, 1_650_000_000), follow_symlinks=False)


def age(root: Path) -> None:
    for number, path in enumerate([*sorted(archives.walk(root), reverse=True), root]):
        os.utime(path, (1_500_000_000 + number,) * 2, follow_symlinks=False)


def missing(*tools: str) -> str:
    """The reason why a test that needs these tools cannot run, or nothing."""
    if os.geteuid() != 0:
        return "not root"
    absent = [tool for tool in tools if not shutil.which(tool)]
    return f"not installed: {', '.join(absent)}" if absent else ""


class Tools(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        if reason := missing("buildah", "unshare"):
            raise unittest.SkipTest(reason)
        cls.directory = Path(tempfile.mkdtemp(prefix="faasd-tools.", dir="/var/tmp"))
        cls.addClassCleanup(subprocess.run, ["rm", "-rf", "--one-file-system", cls.directory], check=True)
        for name in ("tmp", "home", "root", "runroot"):
            (cls.directory / name).mkdir()
        cls.policy = cls.directory / "policy.json"
        cls.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        cls.storage = ("--root", cls.directory / "root", "--runroot", cls.directory / "runroot", "--storage-driver",
                       "vfs")
        cls.store = f"containers-storage:[vfs@{cls.directory}/root+{cls.directory}/runroot]"
        for kind in ("docker", "oci"):
            cls.build(kind)

    @classmethod
    def run_tool(cls, *command) -> str:
        env = {"PATH": os.environ["PATH"], "HOME": str(cls.directory / "home"), "TMPDIR": str(cls.directory / "tmp"),
               "LANG": "C.UTF-8", "BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run([*PRIVATE, *command], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=120, cwd=cls.directory, check=False)
        if done.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    @classmethod
    def buildah(cls, *arguments) -> str:
        return cls.run_tool("buildah", *cls.storage, *arguments)

    @classmethod
    def build(cls, kind: str) -> None:
        """An image of two layers in that manifest format, tagged localhost/app:KIND."""
        base = cls.buildah("from", "--name", f"base-{kind}", "scratch")
        populate(Path(cls.buildah("mount", base)))
        cls.buildah("commit", "--format", kind, "--quiet", base, f"localhost/base:{kind}")
        work = cls.buildah("from", "--name", f"work-{kind}", f"localhost/base:{kind}")
        change(Path(cls.buildah("mount", work)))
        cls.buildah("config", *CONFIG, work)
        cls.buildah("commit", "--format", kind, "--quiet", work, f"localhost/app:{kind}")

    def unpack(self, archive: Path) -> tuple[dict, dict]:
        """Return image.json and the listing of the rootfs, less what faasd adds."""
        with self.unpacked(archive) as (image, document):
            return document, self.listing(image / "rootfs")

    @contextlib.contextmanager
    def unpacked(self, archive: Path):
        """Unpack an archive; yield the directory, and image.json."""
        image = Path(tempfile.mkdtemp(dir=self.directory))
        try:
            with archive.open("rb", buffering=0) as source:
                yield image / "image", faasd.unpack_image(
                    archives.pieces(source), image / "image", "", archives.MAX_IMAGE_SIZE, archives.MAX_IMAGE_ENTRIES,
                    archives.FIRST_ID)
        finally:
            shutil.rmtree(image)

    def check_saved(self, archive: Path) -> None:
        """Save what was unpacked: the same comes of it again, directly and by way of skopeo."""
        saved = self.path("saved.tar")
        with self.unpacked(archive) as (image, document):
            files = self.listing(image / "rootfs")
            config = json.loads((image / "config.json").read_bytes())
            saved.write_bytes(archives.save(image, archives.FIRST_ID))
            self.assertEqual(archives.save(image, archives.FIRST_ID), saved.read_bytes())
        ways = [saved]
        if shutil.which("skopeo"):
            ways.append(self.path("again.tar"))
            self.run_tool("skopeo", "--insecure-policy", "copy", "--quiet", f"docker-archive:{saved}",
                          f"oci-archive:{ways[-1]}:saved")
        for way in ways:
            with self.subTest(way.name), self.unpacked(way) as (image, again):
                self.assertEqual(self.listing(image / "rootfs"), files)
                self.assertEqual(again["process"], document["process"])
                ours = json.loads((image / "config.json").read_bytes())
                self.assertEqual(*({key: value for key, value in document["config"].items() if value}
                                   for document in (ours, config)))      # OCI knows none of docker's empty fields

    @staticmethod
    def listing(root: Path) -> dict:
        """Without srv/app (the working directory, made at unpack), times of its parents, and named pipes."""
        return {path: what for path, what in of_the_image(archives.full_tree(root)).items()
                if path.split("/")[0] not in ("srv", ".") and what[0] != "fifo"}

    def path(self, name: str) -> Path:
        path = self.directory / name
        self.addCleanup(path.unlink, missing_ok=True)
        return path

    def reference(self, kind: str) -> dict:
        """What is in the storage: the directory that buildah itself would run."""
        return self.listing(Path(self.buildah("mount", f"work-{kind}")))

    def check(self, archive: Path, kind: str) -> dict:
        document, listing = self.unpack(archive)
        self.assertEqual(listing, self.reference(kind))
        self.assertRegex("".join(document["warnings"]), "^1 named pipes are left out.*data/fifo")
        self.assertGreater(len(listing), 15)
        process = document["process"]
        self.assertEqual((process["entrypoint"], process["cmd"], process["env"]),
                         (["/bin/tool", "-x"], ["serve", "now"], ["A=b c", "PATH=/bin", "HOME=/home/app"]))
        self.assertEqual((process["uid"], process["gid"], process["groups"], process["cwd"]),
                         (1000, 1001, [30], "/srv/app"))
        self.assertEqual((process["labels"]["l"], process["exposed_ports"]), ("v", ["80"]))
        self.assertIn("data", listing)
        self.check_saved(archive)
        return document

    def config_digest(self, kind: str) -> str:
        """The image's id, which is its config's digest."""
        return "sha256:" + json.loads(self.buildah("inspect", "--type", "image",
                                                   f"localhost/app:{kind}"))["FromImageID"]

    def tar(self, layout: Path) -> Path:
        archive = self.path(f"{layout.name}.tar")
        subprocess.run(["tar", "-C", layout, "-cf", archive, "."], check=True)
        shutil.rmtree(layout)
        return archive

    # -- one test for each way an archive comes about --

    def test_F1_buildah_docker_archive(self):
        archive = self.path("a.tar")
        self.buildah("push", "--signature-policy", self.policy, "localhost/app:docker",
                     f"docker-archive:{archive}:app:1")
        document = self.check(archive, "docker")
        self.assertEqual((document["digest"], document["tag"]),
                         (self.config_digest("docker"), "docker.io/library/app:1"))

    def test_F2_buildah_oci_archive(self):
        archive = self.path("a.tar")
        self.buildah("push", "--signature-policy", self.policy, "localhost/app:oci", f"oci-archive:{archive}:app")
        self.assertEqual(self.check(archive, "oci")["digest"], self.config_digest("oci"))

    def podman_save(self, kind: str, *arguments) -> Path:
        if reason := missing("podman"):
            self.skipTest(reason)
        archive = self.path("a.tar")
        self.run_tool("podman", *self.storage, "--tmpdir", self.directory / "tmp", "save", "--quiet", *arguments, "-o",
                      archive,
                      f"localhost/app:{kind}")
        return archive

    def test_F1_podman_docker_archive(self):
        document = self.check(self.podman_save("docker", "--format", "docker-archive"), "docker")
        self.assertEqual((document["digest"], document["tag"]), (self.config_digest("docker"), "localhost/app:docker"))

    def test_F2_podman_oci_archive(self):
        document = self.check(self.podman_save("oci", "--format", "oci-archive"), "oci")
        self.assertEqual(document["digest"], self.config_digest("oci"))

    def test_F1_podman_two_images(self):
        archive = self.podman_save("docker", "--multi-image-archive", "--format", "docker-archive",
                                   "localhost/base:docker")
        with self.assertRaisesRegex(faasd.ImageError, "--tag: localhost/app:docker, localhost/base:docker"):
            self.unpack(archive)
        image = Path(tempfile.mkdtemp(dir=self.directory))
        self.addCleanup(shutil.rmtree, image)
        with archive.open("rb", buffering=0) as source:
            document = faasd.unpack_image(archives.pieces(source), image / "image", "app:docker", 1 << 30, 1000, 0)
        self.assertEqual(document["digest"], self.config_digest("docker"))

    def skopeo(self, kind: str, target: str, *arguments) -> None:
        if reason := missing("skopeo"):
            self.skipTest(reason)
        self.run_tool("skopeo", "--insecure-policy", "copy", "--quiet", *arguments,
                      f"{self.store}localhost/app:{kind}", target)

    def test_F1_skopeo_docker_archive(self):
        archive = self.path("a.tar")
        self.skopeo("docker", f"docker-archive:{archive}:app:1", "--additional-tag", "app:2")
        self.assertEqual(self.check(archive, "docker")["digest"], self.config_digest("docker"))

    def test_F1_skopeo_docker_archive_of_an_oci_image(self):
        """Another config, so another digest; the same files."""
        archive = self.path("a.tar")
        self.skopeo("oci", f"docker-archive:{archive}")
        self.check(archive, "oci")

    def test_F2_skopeo_oci_archive(self):
        archive = self.path("a.tar")
        self.skopeo("oci", f"oci-archive:{archive}:app")
        self.assertEqual(self.check(archive, "oci")["digest"], self.config_digest("oci"))

    def test_F2_skopeo_oci_layout_in_each_compression(self):
        for algorithm, magic in (("gzip", b"\x1f\x8b"), ("zstd", b"\x28\xb5\x2f\xfd")):
            with self.subTest(algorithm):
                if algorithm == "zstd" and (reason := missing("zstd")):
                    self.skipTest(reason)
                layout = self.directory / "layout"
                self.skopeo("oci", f"oci:{layout}:app", "--dest-compress-format", algorithm)
                self.assertIn(magic, {blob.read_bytes()[:len(magic)] for blob in (layout / "blobs/sha256").iterdir()})
                self.assertEqual(self.check(self.tar(layout), "oci")["digest"], self.config_digest("oci"))

    def test_F2_umoci_unpacks_the_same(self):
        """The same layout by another unpacker, whose order of things the rules were taken from."""
        if reason := missing("umoci", "skopeo"):
            self.skipTest(reason)
        layout, bundle = self.directory / "layout", self.directory / "bundle"
        self.skopeo("oci", f"oci:{layout}:app")
        self.run_tool("umoci", "unpack", "--image", f"{layout}:app", bundle)
        theirs = self.listing(bundle / "rootfs")
        shutil.rmtree(bundle)
        _, ours = self.unpack(self.tar(layout))
        self.assertEqual(ours, theirs)

    def test_F2_umoci_image(self):
        """Made by umoci alone: init, new, unpack, repack twice, config, a second tag; then the layout in a tar."""
        if reason := missing("umoci"):
            self.skipTest(reason)
        layout, bundle = self.directory / "umoci", self.directory / "bundle"
        self.run_tool("umoci", "init", "--layout", layout)
        self.run_tool("umoci", "new", "--image", f"{layout}:app")
        for step in (populate, change):
            self.run_tool("umoci", "unpack", "--image", f"{layout}:app", bundle)
            step(bundle / "rootfs")
            made = self.listing(bundle / "rootfs")
            self.run_tool("umoci", "repack", "--image", f"{layout}:app", bundle)
            shutil.rmtree(bundle)
        self.run_tool("umoci", "config", "--image", f"{layout}:app", "--config.entrypoint", "/bin/tool",
                      "--config.user", "app", "--config.workingdir", "/srv/app")
        self.run_tool("umoci", "tag", "--image", f"{layout}:app", "second")
        archive = self.tar(layout)
        document, listing = self.unpack(archive)
        self.assertEqual(listing, made)
        self.check_saved(archive)
        self.assertEqual((document["process"]["entrypoint"], document["process"]["uid"]), (["/bin/tool"], 1000))
        for tag in ("app", "second"):
            image = Path(tempfile.mkdtemp(dir=self.directory))
            self.addCleanup(shutil.rmtree, image)
            with self.subTest(tag=tag), archive.open("rb", buffering=0) as source:
                again = faasd.unpack_image(archives.pieces(source), image / "image", tag, 1 << 30, 1000, 0)
                self.assertEqual(again["digest"], document["digest"])


if __name__ == "__main__":
    unittest.main()
