"""faas save: the image back as an archive, with its options. What other tools make of it: test_tools, test_docker."""

import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import tarfile
import unittest
from pathlib import Path
from unittest import mock

import faasd
import archives
import support
from archives import directory, file, hardlink, layer, symlink

ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in (
    (0x01, 7, 0xffffffff), (0x02, 5, 1000), (0x04, 4, 0xffffffff), (0x08, 1, 1001), (0x10, 7, 0xffffffff),
    (0x20, 0, 0xffffffff)))
ODD = layer(
    directory("odd", mode=0o1777, uid=7, gid=65_535), directory("odd/empty", mtime=5),
    file("odd/setuid", "s", mode=0o4750, uid=1000, gid=1001), 
    hardlink("odd/second", "odd/setuid", mode=0o4750, uid=1000, gid=1001),
    file("odd/able", "c", records={"SCHILY.xattr.security.capability": archives.CAPABILITY,
                                   "SCHILY.xattr.user.binary": b"\xff\0\n=\xfe", "SCHILY.xattr.user.text": "ü"}),
    hardlink("odd/able too", "odd/able",
             records={"SCHILY.xattr.security.capability": archives.CAPABILITY}),     # Docker does what links say
    file("odd/acl", "a", mode=0o770, records={"SCHILY.xattr.system.posix_acl_access": ACL}),
    directory("odd/acls", records={"SCHILY.xattr.system.posix_acl_default": ACL}),
    file("odd/exact", "t", records={"mtime": "1500000000.123456789"}),
    file("odd/early", "t", records={"mtime": "-5.5"}),
    file(b"odd/\xff\xfe not UTF-8", "n"), file("odd/ünï cödé\n", "u"), file("odd/" + "long" * 60, "l"),
    file("odd/large", os.urandom(700_001)), file("odd/empty file"),
    archives.sparse_pax("odd/holes", 5 << 20, [(1 << 20, b"x" * 4096), (3 << 20, b"y" * 8192)], "1.0"),
    archives.sparse_pax("odd/hole", 1 << 20, [], "1.0"),
    symlink("odd/link", "../etc/passwd", uid=5, gid=6), symlink(b"odd/link\xff", b"\xfd/" + b"t" * 200),
    file("odd/late/x", "x"), directory("odd/late", mode=0o700),         # which its file has implied
    archives.device("odd/null", b"3", 1, 3, mode=0o666), archives.device("odd/block", b"4", 7, 0))
CONFIG = {"Labels": {"l": "v", "faasd.memory": "300m", "faasd.x": "of another's"}, "Env": ["A=b c"],
          "StopSignal": "INT",
          "ExposedPorts": {"81/tcp": {}}, "Volumes": {"/data": {}}, "Healthcheck": {"Test": ["NONE"]}}


def image_tree(daemon: support.Daemon, name: str) -> dict[str, tuple]:
    """All that is in a function's rootfs, as its image has it."""
    rootfs = daemon.rootfs(name)
    first_id = json.loads((rootfs.parent / "image.json").read_text())["first_id"]
    tree = {}
    for path, (what, mode, _, _, *rest, xattrs) in archives.full_tree(rootfs).items():
        status = os.lstat(rootfs / path)
        shifted = {key: faasd.shift_acl(value, lambda number: number - first_id) if key in faasd.ACL_XATTRS else value
                   for key, value in xattrs}
        tree[path] = (what, mode, status.st_uid - first_id, status.st_gid - first_id, *rest, shifted)
    return tree


def saved_config(archive: bytes) -> dict:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        manifest, = json.load(tar.extractfile("manifest.json"))
        return json.load(tar.extractfile(manifest["Config"]))


class SaveTest(support.SharedDaemonCase):
    def save(self, name: str, *options: str) -> bytes:
        done = subprocess.run([support.TOP / "faas", "--socket", self.daemon.socket, "save", name, *options],
                              stdin=subprocess.DEVNULL, capture_output=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return done.stdout

    def new(self, name: str, archive: bytes, *options: str) -> str:
        """Deploy without options but these; return the exit status."""
        done = subprocess.run([support.TOP / "faas", "--socket", self.daemon.socket, "new", name, *options],
                              input=archive, capture_output=True, check=False)
        self.said, self.printed = done.stderr.decode(), done.stdout.decode()
        return done.returncode

    def test_save_new_gives_the_same(self):
        """Files, owners, modes, times, attributes, holes, configuration, options; and the same bytes each time."""
        self.daemon.deploy("f", support.handler_image(layers=[ODD], **CONFIG), "--memory", "256m", "--timeout", "2.5",
                           "--cap-drop", "CHOWN", "--user", "7:8", "--workdir", "/odd", "-e", "S=secret",
                           "--reuse", "3")
        archive = self.save("f")
        self.assertEqual(self.save("f"), archive)
        self.assertNotIn(b"S=secret", archive)
        self.assertIn(b"S=secret", self.save("f", "--env"))
        self.assertEqual(self.new("g", archive), 0, self.said)
        self.assertRegex(self.printed, r"Deployed g at [0-9.]+ \(from the image: memory 256m, timeout 2500ms, .*\)\n")
        before, after = image_tree(self.daemon, "f"), image_tree(self.daemon, "g")
        added = json.loads(self.daemon.rootfs("f").with_name("image.json").read_text())["added"]
        self.assertLessEqual({"/control.sock", "/tmp", "/etc/hosts"}, set(added))
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            layer_file = tar.extractfile("layer.tar")
            with tarfile.open(fileobj=layer_file) as saved:
                self.assertEqual({f"/{name}" for name in saved.getnames()} & set(added), set())
        ours = {".", *(path[1:] for path in added)}         # made anew, with its directory's time
        self.assertEqual({path for path in before if before[path] != after.get(path) and path not in ours}, set())
        self.assertEqual((before.keys(), before["odd/holes"][2:4]), (after.keys(), (0, 0)))
        self.assertEqual(len([path for path in before if path.startswith("odd/")]), 22)
        self.assertEqual((before["odd/late"], after["odd/late"][1]), (after["odd/late"], "0o40700"))
        for name in ("holes", "hole"):
            self.assertLess(os.stat(self.daemon.rootfs("g") / "odd" / name).st_blocks * 512, 1 << 19)
        f, g = self.daemon.info("f"), self.daemon.info("g")
        different = {key for key in f["options"] if f["options"][key] != g["options"][key]}
        self.assertEqual(different, {"user", "workdir", "env"})         # these are the image's own now
        config = saved_config(archive)["config"]
        self.assertEqual((config["User"], config["WorkingDir"], config["Env"]), ("7:8", "/odd", ["A=b c"]))
        for key in ("StopSignal", "ExposedPorts", "Volumes", "Healthcheck"):
            self.assertEqual(config[key], CONFIG[key])
        self.assertEqual({key: text for key, text in config["Labels"].items() if not key.startswith("faasd.")},
                         {"l": "v"})
        self.assertNotIn("faasd.x", config["Labels"])
        self.assertEqual(saved_config(self.save("g"))["config"], config)

    def test_an_images_labels_choose_less_than_a_user(self):
        labels = {"faasd.memory": "100m", "faasd.start-timeout": "15s", "faasd.warm": "0", "faasd.unheard-of": "x"}
        archive = support.handler_image(Labels=labels)
        self.assertEqual(self.new("f", archive, "--memory", "200m"), 0, self.said)
        options = self.daemon.info("f")["options"]
        self.assertEqual((options["memory"], options["start_timeout"], options["pids"]), (200 << 20, 15, 64))
        for label, text, status in (
                ("net", "host", 1), ("cap-add", "ALL", 1), ("memory", "much", 1), ("memory", "9999999g", 1),
                ("pids", "99999999999", 1), ("start-timeout", "99999999h", 1), ("shm-size", "99999999g", 1),
                ("cpus", "9999", 1), ("port", "70000", 1), ("hostname", "-", 1), ("contract", "none", 1)):
            with self.subTest(label):
                archive = support.handler_image(Labels={**labels, f"faasd.{label}": text})
                self.assertEqual(self.new("g", archive), status)
                self.assertRegex(self.said, rf"^faas: the image's label faasd\.{label}[: ][^\n]+\n$")
                self.assertEqual(len(json.loads(self.daemon.api("GET", "/functions")[1])["functions"]), 1)
        self.assertEqual(self.new("g", support.handler_image(Labels={"faasd.net": "host"}), "--net", "none"), 0,
                         self.said)
        self.assertEqual(self.daemon.info("g")["options"]["net"], "none")
        self.assertEqual(self.new("h", support.handler_image(Labels={"faasd.warm": "9999", "faasd.cpus": "1"})), 1)
        self.assertRegex(self.said, r"^faas: warm 9999: only [^\n]+ \(from the image's labels: warm\)\n$")

    def test_what_a_user_names_wins_whatever_the_value(self):
        archive = support.handler_image(Labels={"faasd.memory": "100m", "faasd.pids": "70", "faasd.net": "host"})
        self.assertEqual(self.new("f", archive, "--memory", "512m", "--net", "none"), 0, self.said)
        self.daemon.faas("set", "f", "--pids", "64")
        self.daemon.stop()
        self.daemon.start()
        for _ in range(2):
            self.assertEqual(self.new("f", archive), 0, self.said)
            options = self.daemon.info("f")["options"]
            self.assertEqual((options["memory"], options["pids"], options["net"]), (512 << 20, 64, "none"))
        self.assertEqual(self.new("f", archive, "--reset", "--net", "none"), 0, self.said)
        self.assertEqual(self.daemon.info("f")["options"]["pids"], 70)

    def test_labels_of_the_next_image_replace_those_before(self):
        def image(label: str, **labels: str) -> bytes:
            return support.handler_image(Labels={"label": label, **{f"faasd.{key}": labels[key] for key in labels}})
        self.assertEqual(self.new("f", image("1", memory="100m", pids="70", warm="0"), "--queue", "7"), 0, self.said)
        self.assertIn("(from the image: memory 100m, pids 70 and warm 0)\n", self.printed)
        self.daemon.faas("set", "f", "--pids", "71")            # which is the user's choice from then on
        self.daemon.stop()
        self.daemon.start()
        self.assertEqual(self.new("f", image("2", pids="72", warm="0")), 0, self.said)
        self.assertIn("(version 3; kept pids 71 and queue 7; from the image: warm 0)\n", self.printed)
        options = self.daemon.info("f")["options"]
        self.assertEqual([options[key] for key in ("memory", "pids", "queue", "warm")], [512 << 20, 71, 7, 0])
        self.daemon.faas("rollback", "f", "1")                  # the same as then, and the same are the image's
        self.assertEqual(self.new("f", image("3", warm="1")), 0, self.said)
        self.assertIn("(version 4; kept queue 7; from the image: warm 1)\n", self.printed)

    def test_what_cannot_be_saved(self):
        done = self.daemon.faas("save", "nosuch", check=False)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, "^faas: no function 'nosuch'[^\n]*\n$")
        self.daemon.deploy("f")
        (self.daemon.rootfs("f").parent / "config.json").unlink()       # as an older faasd left it
        done = self.daemon.faas("save", "f", check=False)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, "^faas: [^\n]*deploy it again\n$")
        self.daemon.deploy("f")         # the same digest, over a root that stays
        self.assertTrue(self.save("f"))

    # -- clients that are slow, or leave --

    def begin(self, name: str) -> socket.socket:
        """Ask for an image, and read no more than the beginning."""
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.settimeout(support.READY_SECONDS)
        client.connect(str(self.daemon.socket))
        client.sendall(f"GET /functions/{name}/image HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.assertEqual(client.recv(12, socket.MSG_WAITALL), b"HTTP/1.1 200")
        return client

    def savers(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:             # it has ended
                continue
            if b"save" in words and str(self.daemon.process.pid).encode() in words:
                found.append(process.name)
        return found

    def test_clients_that_are_slow_or_leave_hold_up_nobody(self):
        large = [layer(file("large", os.urandom(8 << 20)), file("later", "x"))]
        address = self.daemon.deploy("f", support.handler_image(layers=large))
        leaves, slow = self.begin("f"), self.begin("f")
        self.assertEqual(len(self.savers()), 2)
        self.assertIn("HTTP/1.1 200", support.curl("-i", f"http://{address}/"))
        self.daemon.set("f", "--memory", "200m")
        self.assertEqual(hashlib.sha256(self.save("f")).digest(), hashlib.sha256(self.save("f")).digest())
        leaves.close()
        support.wait_until(lambda: len(self.savers()) == 1, "the child of a client that left has ended")
        self.daemon.remove("f")         # while it is being read
        data = b""
        while piece := slow.recv(1 << 20):
            data += piece
        self.assertFalse(data.endswith(b"0\r\n\r\n"))
        support.wait_until(lambda: not self.savers(), "no child is left")
        self.daemon.wait_log("did not get the whole image of f: its image is gone")

    def test_a_cut_image_is_a_failure_of_the_command(self):
        self.daemon.deploy("f", support.handler_image(
            layers=[layer(file("large", os.urandom(8 << 20)), file("z", "x"))]))
        save = subprocess.Popen([support.TOP / "faas", "--socket", self.daemon.socket, "save", "f"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with save:
            self.assertTrue(save.stdout.read(1))
            self.daemon.remove("f")
            save.stdout.read()
            self.assertRegex(save.stderr.read().decode(), "^faas: faasd went away before it had answered[^\n]*\n$")
        self.assertEqual(save.returncode, 1)


class SendTest(unittest.TestCase):
    def test_a_client_that_takes_nothing_is_given_up(self):
        ours, theirs = socket.socketpair()
        with ours, theirs, mock.patch.object(faasd, "MAX_WRITE_SECONDS", 0.01):
            with self.assertRaises(TimeoutError):
                faasd.send_archive(ours, iter([bytes(64 << 20)]))


if __name__ == "__main__":
    unittest.main()
