"""How a layer's entries become files: rules A (paths), B (whiteouts), C (objects), D (metadata) of UNPACKING.md.

A case is a line in a table: what the layers hold, and the whole tree that must come of it, or the refusal. Every case
is run with a canary outside of the rootfs (archives.CANARY), which must not change.
"""

import os
import stat
import struct
import subprocess
import unittest

import faasd
import archives
from archives import (
    CANARY,
    Refused,
    Sandbox,
    add_cases,
    device,
    directory,
    entry,
    fifo,
    file,
    gnu_long,
    hardlink,
    header,
    layer,
    opaque,
    padded,
    pax,
    record,
    sparse_gnu,
    sparse_pax,
    symlink,
    whiteout,
)

UP = "../" * 30
LOWER = layer(directory("d"), file("d/a", "lower"), file("d/b", "lower"), directory("d/sub"), file("d/sub/x", "lower"),
              file("top", "lower"))
LOWER_TREE = {"d": "dir", "d/a": "file lower", "d/b": "file lower", "d/sub": "dir", "d/sub/x": "file lower",
              "top": "file lower"}


def dirs(path: str) -> dict[str, str]:
    """The tree of a path's parent directories."""
    parts = path.strip("/").split("/")
    return {"/".join(parts[:count]): "dir" for count in range(1, len(parts))}


def without(tree: dict, *gone: str) -> dict:
    return {path: what for path, what in tree.items()
            if not any(path == name or path.startswith(name + "/") for name in gone)}


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32      # linux/posix_acl.h


def acl(*entries: tuple) -> bytes:
    """A POSIX access list as an extended attribute has it, of (tag, permissions[, id])."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *(*entry, 0xFFFFFFFF)[:3]) for entry in entries)


IN_CANARY = CANARY.strip("/")           # the canary's path, as it may appear inside of a rootfs


class Table(Sandbox):
    """Runs cases of (layers, expected tree or Refused)."""

    def check(self, layers, expected):
        if isinstance(expected, Refused):
            with self.refused(expected.status, expected.pattern):
                self.apply(*layers)
            if expected.tree is not None:
                self.assertEqual(archives.tree(self.rootfs), expected.tree)
        else:
            self.assertEqual(archives.tree(self.apply(*layers)), expected)


def chain(count: int) -> bytes:
    """Symbolic links of which the first needs count hops to reach the directory `end`."""
    return b"".join(symlink(f"l{at}", f"l{at + 1}" if at < count else "end") for at in range(1, count + 1))


class Paths(Table):
    """A. Paths stay inside the rootfs."""


ONE = {"x": "file in"}
WRITTEN = dirs(f"{IN_CANARY}/file") | {f"{IN_CANARY}/file": "file in"}
MADE = dirs(f"{IN_CANARY}/file")

add_cases(Paths, [
    *[(f"A1 name {name!r} is clamped", [layer(file(name, "in"))], ONE)
      for name in ["x", "./x", "/x", "//x", "../x", "/../x", "./../x", "a/../x", "a/../../../x",
                                 "../../../../x", ".//./x", UP + "x"]],
    ("A1 absolute name of a host file", [layer(file(f"{CANARY}/file", "in"))], WRITTEN),
    ("A1 dotdot name of a host file", [layer(file(UP + IN_CANARY + "/file", "in"))], WRITTEN),
    ("A1 name of a host file in PAX", [layer(file("x", "in", records={"path": f"{CANARY}/file"}))], WRITTEN),
    ("A1 name of a host file in a GNU long name", [layer(gnu_long(UP + IN_CANARY + "/file"), file("x", "in"))],
     WRITTEN),
    ("A1 name of a host file in GNU.sparse.name",
     [layer(sparse_pax(f"{CANARY}/file", 2, [(0, b"in")], "1.0"))], WRITTEN),
    ("A1 directory entry on a host directory", [layer(directory(f"../..{CANARY}/dir", mode=0o700, uid=7))],
     dirs(f"{IN_CANARY}/x") | {f"{IN_CANARY}/dir": "dir"}),
    ("A1 fifo, link and device by absolute name",
     [layer(fifo(f"{CANARY}/f"), symlink(f"{CANARY}/l", "t"), device(f"{CANARY}/c", b"3", 1, 3))],
     MADE | {f"{IN_CANARY}/l": "link t", f"{IN_CANARY}/c": "char 1:3"}),
    ("A1 whiteout of a host file", [layer(whiteout(f"../../..{CANARY}/file"), whiteout(f"{CANARY}/dir"))], {}),
    ("A1 opaque on a host directory", [layer(opaque(CANARY), opaque(UP + IN_CANARY))], {}),

    ("A2 link to slash then a file through it", [layer(symlink("link", "/"), file("link/x", "in"))],
     ONE | {"link": "link /"}),
    ("A2 link to slash across layers", [layer(symlink("link", "/")), layer(file("link/x", "in"))],
     ONE | {"link": "link /"}),
    ("A2 link to a host directory", [layer(symlink("link", CANARY), file("link/file", "in"))],
     WRITTEN | {"link": f"link {CANARY}"}),
    ("A2 link to a host directory across layers", [layer(symlink("link", CANARY)), layer(file("link/file", "in"))],
     WRITTEN | {"link": f"link {CANARY}"}),
    ("A2 link with dotdots to a host directory", [layer(symlink("a/link", UP + IN_CANARY), file("a/link/file", "in"))],
     WRITTEN | {"a": "dir", "a/link": f"link {UP}{IN_CANARY}"}),
    ("A2 link to a link to a host directory",
     [layer(symlink("one", "two"), symlink("two", CANARY), file("one/dir/inside", "in"))],
     dirs(f"{IN_CANARY}/dir/x") | {f"{IN_CANARY}/dir/inside": "file in", "one": "link two", "two": f"link {CANARY}"}),
    ("A2 last component is never followed: file", [layer(symlink("x", f"{CANARY}/file")), layer(file("x", "in"))], ONE),
    ("A2 last component is never followed: fifo", [layer(symlink("x", f"{CANARY}/file"), fifo("x"))], {}),
    ("A2 last component is never followed: missing host file",
     [layer(symlink("x", f"{CANARY}/new"), file("x", "in"))], ONE),
    ("A2 directory entry on a link to a host directory",
     [layer(symlink("x", f"{CANARY}/dir"), directory("x", mode=0o700, uid=9), file("x/inside", "in"))],
     {"x": "dir", "x/inside": "file in"}),
    ("A2 directory replaced by a link to the host before its time is set",
     [layer(directory("x"), directory("x/dir", mtime=5), symlink("x", CANARY))], {"x": f"link {CANARY}"}),
    ("A2 parent of a directory replaced by a link to slash before its time is set",
     [layer(directory("x"), directory(f"x{CANARY}/dir", mtime=5), symlink("x", "/"))], {"x": "link /"}),
    ("A2 resolved directory replaced by a link to the host, then written",
     [layer(directory("x"), file("x/file", "one"), symlink("x", CANARY), file("x/file", "in"))],
     WRITTEN | {"x": f"link {CANARY}"}),
    ("A2 resolved parent replaced in the next layer",
     [layer(file("x/y/z", "one")), layer(symlink("x/y", CANARY), file("x/y/file", "in"))],
     WRITTEN | {"x": "dir", "x/y": f"link {CANARY}"}),
    ("A2 link through a whited-out directory",
     [layer(file("x/dir/inside", "one")), layer(whiteout("x"), symlink("x", CANARY), file("x/dir/inside", "in"))],
     dirs(f"{IN_CANARY}/dir/x") | {f"{IN_CANARY}/dir/inside": "file in", "x": f"link {CANARY}"}),
    ("A2 dotdot after a link is the target's parent",
     [layer(directory("a/b"), symlink("l", "a/b/../c"), file("l/x", "in"))],
     {"a": "dir", "a/b": "dir", "a/c": "dir", "a/c/x": "file in", "l": "link a/b/../c"}),
    ("A2 dangling link is filled in", [layer(symlink("l", "no/such"), file("l/x", "in"))],
     {"l": "link no/such", "no": "dir", "no/such": "dir", "no/such/x": "file in"}),
    ("A2 loop of two links", [layer(symlink("a", "b"), symlink("b", "a"), file("a/x"))],
     Refused(400, "too many symbolic links in /a .*MAX_LINK_HOPS", {"a": "link b", "b": "link a"})),
    ("A2 link to itself", [layer(symlink("a", "a"), file("a/x"))], Refused(400, "too many symbolic links")),
    ("A2 link that grows", [layer(symlink("a", "a/a"), file("a/x"))], Refused(400, "too many symbolic links")),
    ("A2 loop met by a whiteout", [layer(symlink("a", "a"), whiteout("a/x"))], Refused(400, "too many symbolic links")),
    ("A2 loop met by a hard link", [layer(symlink("a", "a"), hardlink("h", "a/x"))],
     Refused(400, "too many symbolic links")),
    ("A2 forty hops are allowed", [layer(directory("end"), chain(40), file("l1/x", "in"))],
     {"end": "dir", "end/x": "file in", **{f"l{n}": f"link l{n + 1}" for n in range(1, 40)}, "l40": "link end"}),
    ("A2 forty-one hops are not", [layer(directory("end"), chain(41), file("l1/x", "in"))],
     Refused(400, "MAX_LINK_HOPS")),

    *[("A3 target is kept verbatim", [layer(symlink("l", target))], {"l": f"link {os.fsdecode(target)}"})
      for target in ["/etc/passwd", UP + "etc", f"{CANARY}/file", "./a//b/../c", "a b\n", b"\xff\xfe",
                                   "t" * 101, "t" * 4095]],
    ("A3 target in a GNU long link", [layer(gnu_long("t" * 300, b"K"), symlink("l", "x"))], {"l": "link " + "t" * 300}),
    ("A3 target too long", [layer(symlink("l", "t" * 4096))], Refused(400, "cannot unpack /?l", {})),
    ("A3 empty target", [layer(symlink("l", ""))], Refused(400, "cannot unpack /?l", {})),
    ("A3 target with NUL", [layer(symlink("l", "x", records={"linkpath": "a\0b"}))],
     Refused(400, "cannot unpack /?l", {})),

    *[(f"A4 root entry {name!r} may not be a {what}", [layer(file("keep", "k"), bad)],
       Refused(400, "root is not a directory", {"keep": "file k"}))
      for name in [".", "./", "a/.."]
      for what, bad in [("link", symlink(name, CANARY)), ("fifo", fifo(name)), ("hard link", hardlink(name, "keep")),
                        ("char", device(name, b"3", 1, 3)), ("unknown", entry(name, b"Z"))]],
    ("A4 root entry may not be a file", [layer(file(".", "x"))], Refused(400, "root is not a directory", {})),
    ("A4 dotdot entry may not be a link", [layer(symlink("../..", CANARY))],
     Refused(400, "root is not a directory", {})),

    ("A5 empty file name", [layer(file("keep"), file(""))], Refused(400, "empty name", {"keep": "file "})),
    ("A5 empty link name", [layer(symlink("", "x"))], Refused(400, "empty name", {})),
    ("A5 empty name in PAX", [layer(file("x", records={"path": ""}))], Refused(400, "empty name", {})),
    ("A5 NUL in a name", [layer(file("x", records={"path": "a\0b"}))], Refused(400, "NUL", {})),
    ("A5 component of 255 bytes", [layer(file("d/" + "n" * 255, "x"))], {"d": "dir", "d/" + "n" * 255: "file x"}),
    ("A5 component of 256 bytes", [layer(file("new/" + "n" * 256))], Refused(400, "over 255 bytes", {})),
    ("A5 component of 256 bytes in the middle", [layer(file("new/" + "n" * 256 + "/x"))],
     Refused(400, "over 255 bytes", {})),
    ("A5 component of 256 bytes through a link", [layer(symlink("l", "n" * 256 + "/y"), file("l/x"))],
     Refused(400, "cannot unpack /?l/x", {"l": "link " + "n" * 256 + "/y"})),
    ("A5 control characters in a refused name", [layer(file("\x1b[2J\n/" + "n" * 256))],
     Refused(400, "over 255 bytes")),
    ("A5 control characters in a name are just bytes", [layer(file("\x1b[2J\n", "x"))], {"\x1b[2J\n": "file x"}),
    ("A5 two hundred and fifty levels", [layer(file("d/" * 250 + "x"))],
     dirs("d/" * 250 + "x") | {"d/" * 250 + "x": "file "}),
    ("A5 deeper than MAX_PATH_DEPTH", [layer(file("d/" * 300 + "x"))], Refused(400, "MAX_PATH_DEPTH", {})),
    ("A5 deeper than PATH_MAX", [layer(file(("d" * 250 + "/") * 20 + "x"))], Refused(400, "cannot unpack")),

    ("A6 a parent that is a file", [layer(file("a", "f")), layer(file("a/b", "in"))], {"a": "dir", "a/b": "file in"}),
    ("A6 a parent that was a fifo", [layer(fifo("a"), file("a/b/c", "in"))],
     {"a": "dir", "a/b": "dir", "a/b/c": "file in"}),
    ("A6 a parent that is a device", [layer(device("a", b"4", 8, 0), file("a/b", "in"))],
     {"a": "dir", "a/b": "file in"}),
    ("A6 a parent below a link that is a file",
     [layer(symlink("l", "t"), file("t", "f")), layer(file("l/b", "in"))],
     {"l": "link t", "t": "dir", "t/b": "file in"}),
    ("A6 a directory with a time becomes a file's parent's file",
     [layer(directory("a"), directory("a/b", mtime=5), file("a", "now a file"))], {"a": "file now a file"}),
    ("A6 a directory with a time becomes what is below a link to itself",
     [layer(directory("a/b", mtime=5), symlink("a", "a"))], {"a": "link a"}),
], "check")


class PathMetadata(Sandbox):
    def test_A4_root_entry_sets_the_metadata_of_the_root(self):
        for name in (".", "./", "/", "a/.."):
            with self.subTest(name):
                subprocess.run(["rm", "-rf", self.rootfs], check=True)
                root = self.apply(layer(file("x"), directory(name, mode=0o2711, uid=5, gid=6, mtime=77)))
                status = os.stat(root)
                self.assertEqual((stat.S_IMODE(status.st_mode), *archives.owner(status), status.st_mtime_ns),
                                 (0o2711, 5, 6, 77 * 10**9))

    def test_A6_missing_parents_are_0755_root_whatever_the_umask(self):
        os.umask(0o777)
        root = self.apply(layer(file("a/b/c", uid=7, gid=7, mode=0o600), symlink("l", "made/by/link"), file("l/x")))
        for path in ("a", "a/b", "made", "made/by", "made/by/link"):
            status = os.stat(root / path)
            self.assertEqual((stat.S_IMODE(status.st_mode), *archives.owner(status)), (0o755, 0, 0), path)

    def test_A6_an_existing_parent_keeps_its_metadata(self):
        root = self.apply(layer(directory("d", mode=0o700, uid=4, gid=4)), layer(file("d/x")))
        status = os.stat(root / "d")
        self.assertEqual((stat.S_IMODE(status.st_mode), archives.owner(status)[0]), (0o700, 4))

    def test_A2_a_path_made_deep_by_links_is_refused_before_it_is_made(self):
        """A tree as deep as PATH_MAX allows cannot be removed by shutil.rmtree of Python 3.11 (RecursionError)."""
        with self.refused(400, "MAX_PATH_DEPTH|File name too long"):
            self.apply(layer(symlink("l", "a/" * 1800 + "a"), file("l/x")))
        deepest = max((path.count("/") for path in archives.tree(self.rootfs)), default=0)
        self.assertLessEqual(deepest, faasd.MAX_PATH_DEPTH + 1)

    def test_A7_the_image_lies_in_a_directory_that_only_root_can_list(self):
        """Who may pass it is decided above: tests/serve/test_isolation.py."""
        os.umask(0)
        self.unpack(archives.podman(archives.Image()))
        status = os.stat(self.image)
        self.assertEqual((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid), (0o711, 0, 0))
        self.assertEqual(stat.S_IMODE(os.stat(self.image / "rootfs").st_mode), 0o755)

    def test_A7_an_existing_directory_is_not_unpacked_into(self):
        self.image.mkdir(mode=0o755)
        child = self.unpack_child(archives.podman(archives.Image()))
        self.assertEqual((child.returncode, child.stderr), (1, ""), child)
        self.assertEqual(os.listdir(self.image), [])


class Whiteouts(Table):
    """B. Whiteouts."""


KEEP_OWN = {"d": "dir", "d/new": "file new"}

add_cases(Whiteouts, [
    ("B1 file", [LOWER, layer(whiteout("d/a"))], without(LOWER_TREE, "d/a")),
    ("B1 file at the root", [LOWER, layer(whiteout("top"))], without(LOWER_TREE, "top")),
    ("B1 directory with all below", [LOWER, layer(whiteout("d"))], {"top": "file lower"}),
    ("B1 nothing there", [LOWER, layer(whiteout("d/none"), whiteout("no/such/dir"))], LOWER_TREE),
    ("B1 parent is a file", [LOWER, layer(whiteout("top/x"))], LOWER_TREE),
    ("B1 a directory holding links out is removed without following them",
     [layer(directory("d"), symlink("d/out", CANARY), symlink("d/file", f"{CANARY}/file")), layer(whiteout("d"))], {}),
    ("B1 a directory holding a fifo, a device and hard links",
     [layer(directory("d"), fifo("d/f"), device("d/c", b"3", 1, 3), file("x", "x"), hardlink("d/h", "x")),
      layer(whiteout("d"))], {"x": "file x"}),
    *[(f"B1 type {kind} of the marker is ignored", [LOWER, layer(marker)], without(LOWER_TREE, "d/a"))
      for kind, marker in [("fifo", fifo("d/.wh.a")), ("link", symlink("d/.wh.a", CANARY)),
                           ("char", device("d/.wh.a", b"3", 0, 0)), ("hard link", hardlink("d/.wh.a", "top")),
                           ("directory", directory("d/.wh.a")), ("with data", file("d/.wh.a", "data" * 300))]],
    ("B1 in a layer of its own, then again there", [LOWER, layer(whiteout("d/a")), layer(file("d/a", "new"))],
     LOWER_TREE | {"d/a": "file new"}),
    ("B1 a name with wh in the middle is no marker", [layer(file("a.wh.b", "x"), file(".why", "y"))],
     {"a.wh.b": "file x", ".why": "file y"}),
    ("B1 non UTF-8 name", [layer(file(b"\xff", "x")), layer(file(b".wh.\xff"))], {}),

    ("B2 whiteout, then the new file", [LOWER, layer(whiteout("d/a"), file("d/a", "new"))],
     LOWER_TREE | {"d/a": "file new"}),
    ("B2 the new file, then the whiteout", [LOWER, layer(file("d/a", "new"), whiteout("d/a"))],
     LOWER_TREE | {"d/a": "file new"}),
    ("B2 whiteout, then a new directory", [LOWER, layer(whiteout("d"), directory("d"), file("d/new", "new"))],
     KEEP_OWN | {"top": "file lower"}),
    ("B2 a new directory, then the whiteout: only lower children go",
     [LOWER, layer(directory("d"), file("d/new", "new"), whiteout("d"))], KEEP_OWN | {"top": "file lower"}),
    ("B2 an implied new directory, then the whiteout",
     [LOWER, layer(file("d/sub/new", "new"), whiteout("d"))],
     {"d": "dir", "d/sub": "dir", "d/sub/new": "file new", "top": "file lower"}),
    ("B2 new symbolic link, then the whiteout", [LOWER, layer(symlink("d/a", CANARY), whiteout("d/a"))],
     LOWER_TREE | {"d/a": f"link {CANARY}"}),
    ("B2 new hard link, then the whiteout", [LOWER, layer(hardlink("d/a", "top"), whiteout("d/a"))],
     LOWER_TREE | {"d/a": "file lower"}),
    ("B2 file over a lower directory, then the whiteout", [LOWER, layer(file("d", "new"), whiteout("d"))],
     {"d": "file new", "top": "file lower"}),

    ("B3 opaque first", [LOWER, layer(directory("d"), opaque("d"), file("d/new", "new"))],
     KEEP_OWN | {"top": "file lower"}),
    ("B3 opaque last", [LOWER, layer(directory("d"), file("d/new", "new"), opaque("d"))],
     KEEP_OWN | {"top": "file lower"}),
    ("B3 opaque without an entry for its directory", [LOWER, layer(opaque("d"))], {"d": "dir", "top": "file lower"}),
    ("B3 implied parents stay, their lower children go",
     [LOWER, layer(file("d/sub/deep/new", "new"), opaque("d"))],
     {"d": "dir", "d/sub": "dir", "d/sub/deep": "dir", "d/sub/deep/new": "file new", "top": "file lower"}),
    ("B3 opaque between", [LOWER, layer(file("d/new", "new"), opaque("d"), file("d/a", "again"))],
     {"d": "dir", "d/new": "file new", "d/a": "file again", "top": "file lower"}),
    ("B3 missing directory", [LOWER, layer(opaque("none"))], LOWER_TREE),
    ("B3 on a file", [LOWER, layer(opaque("top"))], LOWER_TREE),
    ("B3 root", [LOWER, layer(file("new", "new"), opaque())], {"new": "file new"}),
    ("B3 two layers, only the lower one is hidden",
     [layer(file("d/one", "1")), layer(file("d/two", "2")), layer(opaque("d"), file("d/three", "3"))],
     {"d": "dir", "d/three": "file 3"}),
    ("B3 opaque of the same layer twice", [LOWER, layer(opaque("d"), file("d/new", "new"), opaque("d"))],
     KEEP_OWN | {"top": "file lower"}),
    ("B3 through a link", [layer(file("usr/lib/x", "x"), symlink("lib", "usr/lib")),
                           layer(file("lib/new", "new"), opaque("lib"))],
     {"usr": "dir", "usr/lib": "dir", "usr/lib/new": "file new", "lib": "link usr/lib"}),
    ("B3 links to the host among the hidden", [layer(symlink("d/out", CANARY)), layer(opaque("d"))], {"d": "dir"}),

    *[(f"B4 marker {marker!r} is refused", [LOWER, layer(directory("d"), file(marker))],
       Refused(400, "bad whiteout", LOWER_TREE))
      for marker in ["d/.wh.", "d/.wh..", "d/.wh...", ".wh.", ".wh..", ".wh...", "d/.wh..wh.x",
                                   "d/.wh..wh..opqx", "d/.wh..wh."]],
    *[(f"B4 marker {marker!r} is refused where its directory is missing", [layer(file(marker))],
       Refused(400, "bad whiteout", {})) for marker in ["no/.wh.", "no/.wh..", "no/.wh..."]],
    ("B4 bookkeeping of aufs at the root is skipped",
     [LOWER, layer(directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", "x"), file(".wh..wh.aufs"),
                   directory(".wh..wh.orph"))],
     LOWER_TREE),
    ("B4 entries below a marker", [LOWER, layer(file("d/.wh.a/x"))],
     Refused(400, "whiteout cannot be a dir", LOWER_TREE)),

    ("B5 through a link in the image", [layer(file("usr/lib/x", "x"), file("usr/lib/y", "y"),
                                              symlink("lib", "usr/lib")),
                                        layer(whiteout("lib/x"))],
     {"usr": "dir", "usr/lib": "dir", "usr/lib/y": "file y", "lib": "link usr/lib"}),
    ("B5 through a link to the host", [layer(symlink("l", CANARY)), layer(whiteout("l/file"), whiteout("l/dir"))],
     {"l": f"link {CANARY}"}),
    ("B5 opaque through a link to the host", [layer(symlink("l", CANARY)), layer(opaque("l"))],
     {"l": f"link {CANARY}"}),
    ("B5 a link itself", [layer(file("d/x", "x"), symlink("l", "d")), layer(whiteout("l"))],
     {"d": "dir", "d/x": "file x"}),
    ("B5 a link to the host itself", [layer(symlink("l", f"{CANARY}/dir")), layer(whiteout("l"))], {}),
    ("B5 new file through a link, whiteout by the real name",
     [layer(directory("usr/lib"), symlink("lib", "usr/lib")), layer(file("lib/x", "new"), whiteout("usr/lib/x"))],
     {"usr": "dir", "usr/lib": "dir", "usr/lib/x": "file new", "lib": "link usr/lib"}),
], "check")


class Objects(Table):
    """C. Objects."""


PAIRS = {"file": (file("x", "new"), "file new"), "link": (symlink("x", "t"), "link t"),
         "link to the host": (symlink("x", f"{CANARY}/dir"), f"link {CANARY}/dir"), "fifo": (fifo("x"), None),
         "char": (device("x", b"3", 1, 3), "char 1:3"), "block": (device("x", b"4", 7, 9), "block 7:9"),
         "directory": (directory("x"), "dir")}

add_cases(Objects, [
    *[(f"C1 {new} over {old} {where}", [layer(PAIRS[old][0], PAIRS[new][0])] if where == "in one layer"
       else [layer(PAIRS[old][0]), layer(PAIRS[new][0])], {"x": PAIRS[new][1]} if PAIRS[new][1] else {})
      for old in PAIRS for new in PAIRS for where in ("in one layer", "of the layer below")],
    *[(f"C1 {new} over a full directory", [layer(file("x/a/b", "old")), layer(PAIRS[new][0])],
       {"x": PAIRS[new][1]} if PAIRS[new][1] else {}) for new in PAIRS if new != "directory"],
    ("C1 directory over directory keeps the children", [layer(file("x/a", "old")), layer(directory("x", mode=0o700))],
     {"x": "dir", "x/a": "file old"}),
    ("C1 directory over a link to a directory of the image",
     [layer(file("real/a", "a"), symlink("x", "real")), layer(directory("x"))],
     {"real": "dir", "real/a": "file a", "x": "dir"}),
    ("C1 the directory replaced by a link, as docker save writes it: no whiteout",
     [layer(file("x/a", "old"), directory("y")), layer(symlink("x", "y"), file("x/b", "new"))],
     {"x": "link y", "y": "dir", "y/b": "file new"}),

    ("C2 file over a hard-linked file", [layer(file("a", "old"), hardlink("b", "a")), layer(file("a", "new"))],
     {"a": "file new", "b": "file old"}),
    ("C2 file over a hard-linked file in one layer", [layer(file("a", "old"), hardlink("b", "a"), file("b", "new"))],
     {"a": "file old", "b": "file new"}),
    ("C2 duplicate path: the last wins", [layer(file("a", "one"), file("./a", "two"), file("b/../a", "three"))],
     {"a": "file three"}),
    ("C2 duplicate path, shorter content", [layer(file("a", "a long content"), file("a", "x"))], {"a": "file x"}),

    ("C3 into a lower layer", [LOWER, layer(hardlink("h", "d/a"))], LOWER_TREE | {"h": "file lower"}),
    ("C3 into a lower layer whose name goes away, link first",
     [LOWER, layer(hardlink("h", "d/a"), whiteout("d/a"))], without(LOWER_TREE, "d/a") | {"h": "file lower"}),
    ("C3 absolute and dotdot targets are clamped",
     [layer(file("a", "in"), hardlink("b", "/a"), hardlink("c", "../../a"), hardlink("d/e", "../a"))],
     {"a": "file in", "b": "file in", "c": "file in", "d": "dir", "d/e": "file in"}),
    ("C3 to a host file by absolute name", [layer(file("keep", "k"), hardlink("keep", f"{CANARY}/file"))],
     Refused(400, "does not exist", {"keep": "file k"})),
    ("C3 to a host file by dotdots", [layer(hardlink("h", UP + IN_CANARY + "/file"))], Refused(400, "does not exist")),
    ("C3 to a host file through a link", [layer(symlink("l", CANARY), hardlink("h", "l/file"))],
     Refused(400, "does not exist", {"l": f"link {CANARY}"})),
    ("C3 to a link to a host file: the link itself",
     [layer(symlink("l", f"{CANARY}/file"), hardlink("h", "l"))],
     {"l": f"link {CANARY}/file", "h": f"link {CANARY}/file"}),
    ("C3 written through afterwards: never", [layer(symlink("l", f"{CANARY}/file"), hardlink("h", "l"),
                                                    file("h", "in"))],
     {"l": f"link {CANARY}/file", "h": "file in"}),
    ("C3 through a link in the way", [layer(file("real/a", "a"), symlink("l", "real"), hardlink("h", "l/a"))],
     {"real": "dir", "real/a": "file a", "l": "link real", "h": "file a"}),
    ("C3 to a device", [layer(device("c", b"3", 1, 3), hardlink("e", "c"))], {"c": "char 1:3", "e": "char 1:3"}),
    ("C3 to a fifo, which is left out",
     [layer(fifo("f"), hardlink("g", "f"), file("h", "old"), hardlink("h", "g"))], {}),
    ("C3 to a fifo of a lower layer", [layer(fifo("f")), layer(hardlink("g", "f"))], {}),
    ("C3 to a file that was a fifo", [layer(fifo("f"), file("f", "in"), hardlink("g", "f"))],
     {"f": "file in", "g": "file in"}),
    ("C3 over a directory", [layer(file("a", "a"), file("x/y", "old")), layer(hardlink("x", "a"))],
     {"a": "file a", "x": "file a"}),
    ("C3 over a link to the host", [layer(file("a", "a"), symlink("x", f"{CANARY}/file"), hardlink("x", "a"))],
     {"a": "file a", "x": "file a"}),
    ("C3 missing target leaves what is there", [layer(file("x", "old"), hardlink("x", "none"))],
     Refused(400, "/x points to /none, which does not exist", {"x": "file old"})),
    ("C3 missing target in a missing directory says so", [layer(file("x", "old"), hardlink("x", "no/ne"))],
     Refused(400, "/x points to /no/ne, which does not exist", {"x": "file old"})),
    ("C3 directory as a target", [LOWER, layer(hardlink("top", "d"))], Refused(400, "is a directory", LOWER_TREE)),
    ("C3 root as a target", [LOWER, layer(hardlink("top", "/"))], Refused(400, "is a directory", LOWER_TREE)),
    ("C3 empty target", [layer(file("x", "old"), hardlink("x", ""))], Refused(400, "directory", {"x": "file old"})),
    ("C3 to itself", [layer(file("x", "old"), hardlink("x", "x"))], Refused(400, "itself", {"x": "file old"})),
    ("C3 to itself by another spelling", [layer(file("d/x", "old"), symlink("l", "d"), hardlink("d/x", "l/../d/./x"))],
     Refused(400, "itself", {"d": "dir", "d/x": "file old", "l": "link d"})),
    ("C3 to itself through a link", [layer(file("d/x", "old"), symlink("l", "d"), hardlink("d/x", "l/x"))],
     Refused(400, "itself", {"d": "dir", "d/x": "file old", "l": "link d"})),
    ("C3 over the directory of its own target", [layer(file("x/y", "old")), layer(hardlink("x", "x/y"))],
     Refused(400, "itself", {"x": "dir", "x/y": "file old"})),
    ("C3 to another name of the same file", [layer(file("a", "a"), hardlink("b", "a"), hardlink("a", "b"))],
     {"a": "file a", "b": "file a"}),
    ("C3 target whited out before", [LOWER, layer(whiteout("top"), hardlink("h", "top"))],
     Refused(400, "does not exist", without(LOWER_TREE, "top"))),

    ("C4 devices, and a fifo, which is left out",
     [layer(fifo("f"), device("c", b"3", 511, 255), device("b", b"4", 8, 17))],
     {"c": "char 511:255", "b": "block 8:17"}),
    ("C4 whiteout device of overlayfs is just a device", [LOWER, layer(device("d/a", b"3", 0, 0))],
     LOWER_TREE | {"d/a": "char 0:0"}),
    *[(f"C4 unknown type {kind!r}", [layer(file("x", "old"), entry("y", kind))],
       Refused(400, "unknown tar type", {"x": "file old"}))
      for kind in [b"Z", b"8", b"\x01", b"\xff", b"M", b"V"]],
    *[(f"C4 type {kind!r} is a file", [layer(entry("x", kind, b"in"))], ONE)
      for kind in [b"0", b"\0", b"7"]],
    ("C4 old type with a slash at the end is a directory", [layer(entry("x/", b"\0"))], {"x": "dir"}),
    ("C4 global header is ignored",
     [layer(pax({"path": f"{CANARY}/file", "uid": "77", "SCHILY.xattr.trusted.g": "v", "mtime": "1"}, b"g"),
            file("x", "in"), file("y", "in"))], {"x": "file in", "y": "file in"}),
    ("C4 global header, then a local one", [layer(pax({"path": "g"}, b"g"), pax({"path": "x"}), file("n", "in"))], ONE),
    ("C4 Solaris extended header", [layer(pax({"path": "x"}, b"X"), file("n", "in"))], ONE),
    ("C4 device with a number no kernel takes", [layer(device("c", b"3", 1 << 40, 1))],
     Refused(400, "cannot unpack /?c")),
    ("C4 data on a directory, link and fifo is not data",
     [layer(directory("d", size=5), fifo("f", size=9), symlink("l", "t", size=700), file("x", "in"))],
     ONE | {"d": "dir", "l": "link t"}),

    ("C5 GNU long name", [layer(gnu_long("d/" + "n" * 200), file("short", "in"))],
     {"d": "dir", "d/" + "n" * 200: "file in"}),
    ("C5 GNU long name and long link", [layer(gnu_long("t" * 150, b"K"), gnu_long("n" * 150), symlink("s", "s"))],
     {"n" * 150: "link " + "t" * 150}),
    ("C5 PAX name", [layer(file("d/" + "n" * 200, "in"))], {"d": "dir", "d/" + "n" * 200: "file in"}),
    ("C5 PAX and GNU name together", [layer(pax({"path": "pax"}), gnu_long("gnu"), file("s", "in"))],
     {"pax": "file in"}),
    ("C5 ustar prefix", [layer(header("name", size=2, tail=b"pre/fix") + padded(b"in"))],
     {"pre": "dir", "pre/fix": "dir", "pre/fix/name": "file in"}),
    ("C5 name of exactly 100 bytes", [layer(file("n" * 100, "in"))], {"n" * 100: "file in"}),
    *[(f"C5 bytes of a name survive {how}", [layer(how_entry)], {os.fsdecode(b"\xff\xfe\x80caf\xe9"): "file in"})
      for how, how_entry in [("in the header", file(b"\xff\xfe\x80caf\xe9", "in")),
                             ("in PAX", file("x", "in", records={"path": b"\xff\xfe\x80caf\xe9"})),
                             ("in PAX with hdrcharset", file("x", "in", records={
                                 "hdrcharset": "BINARY", "path": b"\xff\xfe\x80caf\xe9"})),
                             ("in a GNU long name", gnu_long(b"\xff\xfe\x80caf\xe9") + file("x", "in"))]],
    ("C5 UTF-8 names, composed and decomposed", [layer(file("é", "1"), file("e\u0301", "2"))],
     {"é": "file 1", "e\u0301": "file 2"}),
    ("C5 hard link to a name that is not UTF-8", [layer(file(b"\xff", "in"), hardlink(b"\xfe", b"\xff"))],
     {os.fsdecode(b"\xff"): "file in", os.fsdecode(b"\xfe"): "file in"}),
], "check")


class SparseFiles(Sandbox):
    """C.4: sparse files in all four formats, hand-made and by GNU tar."""

    PIECES = ((0, b"start"), (8192, b"middle" * 100), (1 << 20, b"end"))
    SIZE = (1 << 20) + 5000

    @classmethod
    def content(cls) -> bytes:
        data = bytearray(cls.SIZE)
        for at, piece in cls.PIECES:
            data[at:at + len(piece)] = piece
        return bytes(data)

    def check_sparse(self, sparse: bytes):
        root = self.apply(layer(file("before", "1"), sparse, file("after", "2")))
        self.assertEqual(set(os.listdir(root)), {"before", "s", "after"})
        self.assertEqual((root / "s").read_bytes(), self.content())
        self.assertEqual((root / "after").read_text(), "2")
        self.assertLess(os.stat(root / "s").st_blocks * 512, self.SIZE)
        self.assertEqual(self.budget.bytes["files"], self.SIZE + 2)

    def check_real_tar(self, *options: str):
        source = self.directory / "source"
        source.mkdir()
        with open(source / "s", "wb") as out:
            for at, piece in self.PIECES:
                out.seek(at)
                out.write(piece)
            out.truncate(self.SIZE)
        data = subprocess.run(["tar", "-C", source, "--sparse", *options, "-cf", "-", "s"], capture_output=True,
                              check=True).stdout
        self.assertLess(len(data), 200_000, "tar made no sparse entry")
        self.assertEqual((self.apply(data) / "s").read_bytes(), self.content())

    def check_map(self, sparse: bytes, status: int, pattern: str):
        with self.refused(status, pattern):
            self.apply(layer(sparse), max_size=1 << 30)

    def test_C4_sparse_file_of_many_extension_blocks(self):
        pieces = [(at * 4096, b"%d" % at) for at in range(200)]
        root = self.apply(layer(sparse_gnu("s", 200 * 4096, pieces), file("after", "2")))
        data = (root / "s").read_bytes()
        self.assertTrue(all(data[at:at + len(piece)] == piece for at, piece in pieces))
        self.assertEqual((root / "after").read_text(), "2")

    def test_C4_sparse_file_that_is_one_hole(self):
        for name, sparse in [("gnu", sparse_gnu("s", 1 << 20, [])), ("1.0", sparse_pax("s", 1 << 20, [], "1.0")),
                             ("0.0", sparse_pax("s", 1 << 20, [(1 << 20, b"")], "0.0"))]:
            with self.subTest(name):
                root = self.apply(layer(sparse, file("after", "2")))
                self.assertEqual((root / "s").read_bytes(), bytes(1 << 20))
                self.assertEqual((root / "after").read_text(), "2")


add_cases(SparseFiles, [
    ("C4 sparse old GNU", sparse_gnu("s", SparseFiles.SIZE, SparseFiles.PIECES)),
    *[(f"C4 sparse PAX {version}", sparse_pax("s", SparseFiles.SIZE, SparseFiles.PIECES, version))
      for version in ("0.1", "1.0")],
    ("C4 sparse PAX 0.0", sparse_pax("s", SparseFiles.SIZE, SparseFiles.PIECES, "0.0")),
], "check_sparse")
add_cases(SparseFiles, [
    ("C4 sparse by tar, gnu format", "--format=gnu"),
    *[(f"C4 sparse by tar, PAX {version}", "--format=pax", f"--sparse-version={version}")
      for version in ("0.0", "0.1", "1.0")],
], "check_real_tar")
add_cases(SparseFiles, [
    ("E4 sparse size counts in full", sparse_gnu("s", 1 << 40, [(0, b"x")]), 413, "--max-image-size"),
    ("E4 sparse PAX size counts in full", sparse_pax("s", 1 << 40, [(0, b"x")], "1.0"), 413, "--max-image-size"),
    ("C4 sparse piece behind the end", sparse_gnu("s", 100, [(4096, b"x")]), 400, "sparse map"),
    ("C4 sparse piece over the end", sparse_pax("s", 100, [(98, b"xxxx")], "1.0"), 400, "sparse map"),
    ("C4 sparse map with a negative offset", sparse_gnu("s", 100, [(-5, b"x")]), 400, "sparse map|tar header"),
    ("C4 sparse map promises more than is stored",
     pax({"GNU.sparse.size": "5000", "GNU.sparse.name": "s", "GNU.sparse.map": "0,4900"}) + file("s", "x"), 400,
     "cut short|tar header"),
    ("C4 sparse map that is not numbers",
     pax({"GNU.sparse.size": "5", "GNU.sparse.map": "0,x"}) + file("s", "x"), 400, "tar header"),
    ("C4 sparse 1.0 map without an end", pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                              "GNU.sparse.realsize": "5"}) + file("s", "9" * 600), 400,
     "tar header|short"),
], "check_map")


class Metadata(Sandbox):
    """D. Metadata."""

    def status(self, path: str) -> os.stat_result:
        return os.lstat(self.rootfs / path)

    def mode(self, path: str) -> str:
        return oct(stat.S_IMODE(self.status(path).st_mode))

    def owner(self, path: str) -> tuple[int, int]:
        return archives.owner(self.status(path))

    def xattr(self, path: str) -> dict[str, bytes]:
        return archives.xattrs(self.rootfs / path)

    def test_C3_a_hard_link_is_the_same_inode_and_brings_no_metadata(self):
        self.apply(layer(file("a", "x", mode=0o600, uid=1, gid=2), symlink("l", "a", uid=3)),
                   layer(hardlink("h", "a", mode=0o4777, uid=9, gid=9, mtime=5,
                                  records={"SCHILY.xattr.trusted.x": "v"}), hardlink("m", "l", uid=9, mtime=5)))
        self.assertEqual(self.status("a").st_ino, self.status("h").st_ino)
        self.assertEqual(self.status("l").st_ino, self.status("m").st_ino)
        self.assertEqual((self.mode("a"), self.owner("a"), self.status("a").st_mtime_ns, self.xattr("a")),
                         (oct(0o600), (1, 2), archives.MTIME * 10**9, {}))
        self.assertEqual((self.owner("l"), self.status("l").st_mtime_ns), ((3, 0), archives.MTIME * 10**9))

    def test_C3_a_file_over_a_hard_linked_file_leaves_the_other_name_alone(self):
        self.apply(layer(file("a", "x", mode=0o600), hardlink("b", "a")), layer(file("a", "y", mode=0o777, uid=4)))
        self.assertEqual((self.mode("b"), self.owner("b"), self.status("b").st_nlink), (oct(0o600), (0, 0), 1))

    def test_D1_owners_are_numbers(self):
        """The names in the header exist on every host, with other numbers."""
        self.apply(layer(file("f", uid=1234, gid=4321, owner=b"root"), file("r", owner=b"daemon"),
                         directory("d", uid=7, gid=8), symlink("l", "f", uid=5, gid=6),
                         device("c", b"3", 1, 3, uid=2, gid=2)))
        self.assertEqual([self.owner(name) for name in "frdlc"], [(1234, 4321), (0, 0), (7, 8), (5, 6), (2, 2)])

    def test_D1_large_owners(self):
        """As large as a container has them."""
        self.apply(layer(file("f", uid=65535, gid=65534), file("pax", records={"uid": "65534", "gid": "65535"})))
        self.assertEqual((self.owner("f"), self.owner("pax")), ((65535, 65534), (65534, 65535)))

    def test_D1_owners_that_mean_nothing(self):
        for name, bad in [("negative", file("x", uid=-1)), ("PAX", file("x", records={"uid": "-1"}))]:
            with self.subTest(name), self.refused(400, "bad owner"):
                self.apply(layer(bad))

    def test_D1_owners_that_no_container_has_become_nobody(self):
        self.apply(layer(file("a", uid=1_516_583_083, gid=1), directory("b", gid=65536), symlink("c", "a", uid=1 << 40),
                         device("d", b"3", 1, 3, uid=0xFFFFFFFF), file("e", records={"uid": "9" * 900}),
                         file("f", uid=65535, gid=65535)), layer(file("large", "x" * 20_000, uid=65536)))
        self.assertEqual([self.owner(name) for name in "abcdef"],
                         [(65534, 1), (0, 65534), (65534, 0), (65534, 0), (65534, 0), (65535, 65535)])
        self.assertEqual(self.owner("large"), (65534, 0))
        self.assertEqual(self.losses, ["6 files are of users or groups from 65536 on, which containers do not have, "
                                       "and now of 65534 (first: a)"])

    def test_C4_fifos_are_left_out_with_one_warning(self):
        """Every container of a function would have the same one, and could read what another writes."""
        self.apply(layer(fifo("run/s6\x1b[2J"), fifo("b")), layer(hardlink("c", "b"), file("d", "x")))
        self.assertEqual(archives.tree(self.rootfs), {"run": "dir", "d": "file x"})
        self.assertEqual(self.losses, ["3 named pipes are left out: containers of a function would share them "
                                       "(first: /run/s6\\x1b[2J)"])

    def test_D1_setuid_and_capabilities_survive_the_change_of_owner(self):
        self.apply(layer(file("f", "x", mode=0o6755, uid=1000, gid=1000,
                              records={"SCHILY.xattr.security.capability": archives.CAPABILITY})))
        self.assertEqual((self.mode("f"), self.owner("f"), self.xattr("f")),
                         (oct(0o6755), (1000, 1000), {"security.capability": archives.CAPABILITY}))

    def test_D2_modes_are_exact_whatever_the_umask(self):
        modes = [0o4755, 0o2755, 0o1755, 0o7777, 0o000, 0o666, 0o777, 0o400]
        for umask in (0o000, 0o777):
            os.umask(umask)
            self.apply(layer(*(file(f"f{mode:o}", mode=mode) for mode in modes),
                             *(directory(f"d{mode:o}", mode=mode) for mode in modes),
                             *(device(f"c{mode:o}", b"3", 1, 3, mode=mode) for mode in modes)))
            for kind in "fdc":
                self.assertEqual([self.mode(f"{kind}{mode:o}") for mode in modes], [oct(mode) for mode in modes], kind)

    def test_D2_no_mode_is_applied_through_a_link(self):
        self.apply(layer(file("f", mode=0o600), symlink("l", "f", mode=0o4777), symlink("out", f"{CANARY}/file"),
                         symlink("dir", f"{CANARY}/dir", uid=3, mtime=5)))
        self.assertEqual(self.mode("f"), oct(0o600))

    def test_D2_extra_bits_of_the_mode_field_are_dropped(self):
        self.apply(layer(file("f", mode=0o100755), directory("d", mode=0o40700)))
        self.assertEqual((self.mode("f"), self.mode("d")), (oct(0o755), oct(0o700)))

    def test_D2_times_to_the_nanosecond(self):
        exact = {"mtime": "1700000001.123456789"}
        self.apply(layer(file("f", records=exact), symlink("l", "none", records=exact),
                         directory("d", records=exact), file("d/later"), file("whole", mtime=1_234_567_890),
                         device("c", b"3", 1, 3, records=exact)))
        for path in "fldc":
            self.assertEqual(self.status(path).st_mtime_ns, 1_700_000_001_123_456_789, path)
        self.assertEqual(self.status("whole").st_mtime_ns, 1_234_567_890 * 10**9)

    def test_D2_times_that_are_none(self):
        """Whatever they say, the entry is unpacked: no time is worth refusing an image."""
        for value in ("nan", "inf", "-inf", "1e400", "-1e400", "", "x", "9" * 900, "-1.5", "1e999999999"):
            with self.subTest(value[:20]):
                self.apply(layer(file("f", records={"mtime": value}), directory("d", records={"mtime": value})))
        self.apply(layer(file("neg", records={"mtime": "-1.5"}), file("base256", mtime=-2), file("big", mtime=1 << 60)))
        self.assertEqual(self.status("neg").st_mtime_ns, -1_500_000_000)
        self.assertEqual(self.status("base256").st_mtime_ns, -2 * 10**9)

    def test_D2_directory_times_hold_at_the_end_of_the_layer(self):
        self.apply(layer(directory("d", mtime=11), file("d/a"), directory("d/e", mtime=12), file("d/e/x"),
                         whiteout("d/no"),
                         hardlink("d/h", "d/a"), directory(".", mtime=13)),
                   layer(directory("d", mtime=21), whiteout("d/a"), file("d/late")))
        self.assertEqual([self.status(path).st_mtime_ns // 10**9 for path in ("d", "d/e", ".")], [21, 12, 13])

    def test_D2_time_of_a_directory_that_is_one_no_more(self):
        self.apply(layer(directory("a", mtime=1), file("a", mtime=2), directory("b", mtime=1),
                         symlink("b", CANARY, mtime=2)))
        self.assertEqual([self.status(path).st_mtime for path in "ab"], [2, 2])

    def test_D2_time_of_a_directory_that_came_back(self):
        self.apply(layer(directory("a", mtime=1), directory("a/b", mtime=1), file("a", mtime=2),
                         directory("a", mtime=3),
                         directory("a/b", mtime=4)))
        self.assertEqual([self.status(path).st_mtime for path in ("a", "a/b")], [3, 4])

    def test_D3_xattrs(self):
        value = bytes(range(256))
        records = {"SCHILY.xattr.user.text": "a=b\nc", "SCHILY.xattr.user.bytes": value,
                   "SCHILY.xattr.trusted.t": b"\xff\0", "SCHILY.xattr.user.ünï": "x"}
        wanted = {"user.text": b"a=b\nc", "user.bytes": value, "trusted.t": b"\xff\0", "user.ünï": b"x"}
        self.apply(layer(file("f", "x", mode=0o400, uid=5, records=records),
                         directory("d", mode=0o500, records=records)))
        self.assertEqual((self.xattr("f"), self.xattr("d")), (wanted, wanted))

    def test_D3_xattrs_of_links_and_special_files_do_not_reach_the_host(self):
        records = {"SCHILY.xattr.trusted.t": "v", "SCHILY.xattr.user.u": "skipped"}
        self.apply(layer(symlink("l", f"{CANARY}/file", records=records),
                         symlink("d", f"{CANARY}/dir", records=records),
                         device("c", b"3", 1, 3, records=records)))
        for path in "ldc":
            self.assertEqual(self.xattr(path), {"trusted.t": b"v"}, path)

    def test_D3_labels_of_selinux_and_of_overlayfs_are_the_hosts(self):
        self.apply(layer(file("f", records={"SCHILY.xattr.security.selinux": "image",
                                            "SCHILY.xattr.trusted.overlay.metacopy": "",
                                            "SCHILY.xattr.trusted.overlay.redirect": "/etc/shadow"})))
        self.assertEqual(self.xattr("f"), {})

    def test_D3_a_directory_keeps_the_label_that_the_host_gave_it(self):
        """On a host with SELinux every new directory has one, and nobody may remove it (EACCES)."""
        self.apply(layer(directory("d")))
        os.setxattr(self.rootfs / "d", "security.selinux", b"host")
        self.apply(layer(directory("d", records={"SCHILY.xattr.trusted.t": "v"})))
        self.assertEqual(self.xattr("d"), {"security.selinux": b"host", "trusted.t": b"v"})

    def test_D3_directory_over_directory_drops_the_old_xattrs(self):
        self.apply(layer(directory("d", records={"SCHILY.xattr.trusted.old": "v", "SCHILY.xattr.user.both": "old"})),
                   layer(directory("d", mode=0o711, uid=3, mtime=9, records={"SCHILY.xattr.user.both": "new"})))
        self.assertEqual((self.xattr("d"), self.mode("d"), self.owner("d")),
                         ({"user.both": b"new"}, oct(0o711), (3, 0)))

    def test_D3_ids_in_access_lists_are_moved(self):
        """user:1000:r and group:50:rw: the function's ids on the disk, not whoever has these on the host."""
        def listed(user: int, group: int) -> bytes:
            return acl((USER_OBJ, 6), (USER, 4, user), (GROUP_OBJ, 4), (GROUP, 6, group), (MASK, 6), (OTHER, 0))
        records = {f"SCHILY.xattr.system.posix_acl_{kind}": listed(1000, 50) for kind in ("access", "default")}
        self.apply(layer(file("f", mode=0o660, records={"SCHILY.xattr.system.posix_acl_access": listed(1000, 50)}),
                         file("large", "x" * 20_000, mode=0o660, records={
                             "SCHILY.xattr.system.posix_acl_access": listed(65536, 1 << 31)}),
                         directory("d", mode=0o660, records=records), file("d/inside", mode=0o600)))
        moved = listed(archives.FIRST_ID + 1000, archives.FIRST_ID + 50)
        nobody = archives.FIRST_ID + 65534
        self.assertEqual(self.xattr("f"), {"system.posix_acl_access": moved})
        self.assertEqual(self.xattr("d"), {"system.posix_acl_access": moved, "system.posix_acl_default": moved})
        self.assertEqual(self.xattr("large"), {"system.posix_acl_access": listed(nobody, nobody)})
        self.assertEqual(self.mode("d/inside"), oct(0o600))

    def test_D3_a_file_is_readable_for_whom_its_access_list_names(self):
        listed = acl((USER_OBJ, 6), (USER, 4, 1000), (GROUP_OBJ, 0), (MASK, 4), (OTHER, 0))
        self.apply(layer(file("f", "secret", mode=0o640, records={"SCHILY.xattr.system.posix_acl_access": listed})))
        self.directory.chmod(0o755)
        for uid, reads in ((archives.FIRST_ID + 1000, True), (1000, False), (archives.FIRST_ID + 1001, False)):
            read = subprocess.run(["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "cat",
                                   self.rootfs / "f"], capture_output=True, check=False)
            self.assertEqual(read.stdout, b"secret" if reads else b"", uid)

    def test_D3_access_lists_that_are_none(self):
        good = acl((USER_OBJ, 6), (USER, 4, 1000), (GROUP_OBJ, 0), (MASK, 4), (OTHER, 0))
        for name, bad in (("empty", b""), ("version 1", b"\1" + good[1:]), ("no version", good[4:]), ("cut", good[:-1]),
                          ("unknown tag", acl((3, 4, 5))), ("no mask", acl((USER_OBJ, 6), (USER, 4, 1), (GROUP_OBJ, 0),
                                                                          (OTHER, 0))), ("long", good + bytes(3))):
            for kind in ("access", "default"):
                with self.subTest(name, kind=kind), self.refused(400, "cannot unpack /?d"):
                    self.apply(layer(directory("d", records={f"SCHILY.xattr.system.posix_acl_{kind}": bad})))

    def test_D3_xattrs_that_the_file_system_does_not_know_are_lost_with_one_warning(self):
        self.apply(layer(*(file(f"f{at}", "x", records={"SCHILY.xattr.nosuch.space": "v"}) for at in range(5))))
        self.assertEqual(self.losses, ["5 extended attributes are lost: the state directory's file system has none of "
                                       "the kind (first: f0)"])
        self.assertEqual(len(os.listdir(self.rootfs)), 5)

    def test_D3_bad_xattr_names(self):
        for name in ("", "user.", "user." + "n" * 300, "user.a\0b"):
            with self.subTest(name[:20]), self.refused(400, "cannot unpack /?f"):
                self.apply(layer(file("f", records={"SCHILY.xattr." + name: "v"})))

    def test_D3_capabilities_that_nobody_could_read(self):
        """The kernel takes empty ones, and then lets nobody read them: neither faas save nor overlayfs."""
        for made in (file, directory, symlink):
            what = ("f", "t") if made is symlink else ("f",)
            with self.subTest(made.__name__), self.refused(400, "cannot unpack f: its capabilities are empty"):
                self.apply(layer(made(*what, records={"SCHILY.xattr.security.capability": ""})))

    def test_D3_xattrs_that_do_not_fit_are_not_a_full_disk(self):
        """ext4 says ENOSPC where an attribute does not fit beside the others; others take it, or have another word."""
        for name, records in (("one", {"SCHILY.xattr.user.a": "v" * 20_000}), ("too large for any", {
                "SCHILY.xattr.user.a": "v" * 70_000}), ("many",
                                                        {f"SCHILY.xattr.user.{n}": "v" * 50 for n in range(500)})):
            with self.subTest(name):
                try:
                    self.apply(layer(file("f", records=records)))
                except faasd.FaasdError as error:
                    self.assertEqual(error.status, 400, error)
                    self.assertRegex(str(error), "cannot unpack /?f")
                else:
                    self.assertEqual(len(self.xattr("f")), len(records))


class Damage(Sandbox):
    """What is not a tar, or only nearly one: E.2, E.5 as they show in a layer."""

    def check_bad(self, data: bytes, pattern: str, status: int = 400):
        with self.refused(status, pattern):
            self.apply(data)


def with_size(size: int, kind: bytes = b"0", records: dict | None = None) -> bytes:
    return layer(file("before", "1"), (pax(records) if records else b"") + header("x", kind, size=size), file("after"))


add_cases(Damage, [
    *[(f"E5 negative size {size} of type {kind!r}", with_size(size, kind), "negative size|tar header")
      for size, kind in [(-1, b"0"), (-512, b"0"), (-1024, b"0"), (-(1 << 60), b"0"), (-512, b"S"),
                                         (-512, b"x"), (-512, b"L"), (-512, b"K"), (-512, b"g"), (-512, b"5"),
                                         (-512, b"2"), (-1024, b"Z")]],
    *[(f"E5 negative size {size} in PAX", with_size(0, records={"size": size}), "negative size|tar header")
      for size in ("-1", "-512", "-4096")],
    ("E5 negative size behind a positive one",
     layer(pax({"GNU.sparse.realsize": "5"}) + header("x", size=-1536)), "negative size|tar header|cut short"),
    ("E2 bad checksum in the middle", layer(file("a"), header("b", checksum=1), file("c")),
     "bad tar header at byte 512"),
    ("E2 garbage in the middle", layer(file("a"), b"garbage!" * 64, file("c")), "bad tar header at byte 512"),
    ("E2 extension header at the end of the data", pax({"path": "x"}), "tar header"),
    ("E2 long name at the end of the data", gnu_long("x" * 200), "tar header"),
    ("E2 cut in a header", layer(file("a"))[:700], "cut short"),
    ("E2 cut in a file", layer(file("a", "x" * 5000))[:2048], "cut short"),
    ("E2 cut in the padding of a skipped entry", layer(entry(".wh.a", b"0", b"x" * 5000))[:2048], "cut short"),
    ("E2 PAX record without a length", layer(pax(b"path=x\n") + file("a", "x"), header("b", checksum=0)), "tar header"),
], "check_bad")


class Order(Sandbox):
    def test_C1_a_layer_after_another_sees_what_it_left(self):
        """Twelve steps as a Dockerfile makes them, replayed: no cache of one layer may outlive it."""
        root = self.apply(
            layer(directory("app"), file("app/one", "1"), symlink("current", "app")),
            layer(file("current/two", "2")),
            layer(whiteout("current"), directory("v2"), symlink("current", "v2"), file("current/three", "3")),
            layer(whiteout("app"), file("app/four", "4")),
            layer(symlink("app", "v2"), file("app/five", "5")))
        self.assertEqual(archives.tree(root), {
            "app": "link v2", "current": "link v2", "v2": "dir", "v2/three": "file 3", "v2/five": "file 5"})

    def test_E3_the_same_layer_twice_is_applied_twice(self):
        again = layer(file("d/x", "again"))
        root = self.apply(again, layer(whiteout("d/x")), again)
        self.assertEqual(archives.tree(root), {"d": "dir", "d/x": "file again"})

    def test_C5_record_counts_its_own_length(self):
        """The writer that the cases rely on: lengths of 9, 10, 99 and 100 bytes are where they go wrong."""
        for count in (1, 2, 3, 4, 90, 91, 92, 93, 94, 95, 990, 991, 992, 993):
            text = record("k", "v" * count)
            self.assertEqual(int(text.split(b" ")[0]), len(text))


if __name__ == "__main__":
    unittest.main()
