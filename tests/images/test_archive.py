"""From an uploaded archive to an image: rules E (streams, digests, limits) and F (layouts) of UNPACKING.md.

Cases run faasd.unpack_image on archives made in memory; what must not take the process down (bombs, a full disk, a
missing program) runs in the child that the daemon uses.
"""

import bz2
import importlib.util
import io
import json
import lzma
import os
import random
import shutil
import socket
import struct
import subprocess
import tarfile
import threading
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import faasd
import archives
from archives import (
    CANARY,
    FOREIGN,
    HOST,
    Image,
    Refused,
    Sandbox,
    add_cases,
    attestation,
    blob,
    descriptor,
    directory,
    dumps,
    file,
    gz,
    gnu_long,
    gz_members,
    hardlink,
    header,
    layer,
    oci_manifest,
    opaque,
    outer,
    padded,
    pax,
    sha256,
    sparse_gnu,
    sparse_pax,
    symlink,
    tagged,
    whiteout,
)

EXHAUSTIVE = "FAASD_SOAK_SECONDS" in os.environ
APP = Image()
TWICE = layer(file("again", "a"))
LAYERED = Image(layers=[layer(directory("d"), file("d/x", "1"), file("keep", "k")), TWICE,
                        layer(directory("d"), whiteout("d/x")), TWICE, layer()])
OTHER = Image(layers=[layer(file("other", "o"))], tags=("other:1",))
SAME_LAYER = Image(process={"Cmd": ["/else"]}, tags=("else:1",))
ABROAD = Image(architecture=FOREIGN)
LAYOUT = ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
# not the image's; test_process.py
PREPARED = {"dev", "proc", "sys", "tmp", "control.sock", "etc", "etc/hosts", "etc/hostname", "etc/resolv.conf"}
TREES = {"app": {"hello": "file hello\n"}, "layered": {"d": "dir", "keep": "file k", "again": "file a"},
         "other": {"other": "file o"}}


def of_the_image(tree: dict) -> dict:
    return {path: what for path, what in tree.items() if path not in PREPARED}


def index(*descriptors: dict) -> tuple[str, bytes]:
    return "index.json", dumps({"schemaVersion": 2, "manifests": list(descriptors)})


def platform(architecture: str = HOST, system: str = "linux") -> dict:
    return {"platform": {"os": system, "architecture": architecture}}


def manifest_json(*entries: dict) -> tuple[str, bytes]:
    return "manifest.json", dumps(list(entries))


def one_layer_oci(manifest: dict | bytes, *more: tuple[str, bytes], **described) -> bytes:
    """An OCI archive with that manifest document, and APP's config and layer."""
    data = manifest if isinstance(manifest, bytes) else dumps(manifest)
    return outer(LAYOUT, blob(APP.config), blob(APP.layers[0]), blob(data), *more, index(descriptor(data, **described)))


def nested(depth: int, image: Image = APP) -> bytes:
    """An OCI archive whose manifest lies below that many indexes (index.json not counted)."""
    manifest, members = oci_manifest(image)
    inner = descriptor(manifest, **platform())
    for _ in range(depth):
        data = dumps({"schemaVersion": 2, "manifests": [inner]})
        members.append(blob(data))
        inner = descriptor(data, "index")
    return outer(LAYOUT, *members, index(inner))


def several_in_oci(*descriptors: dict, images: tuple[Image, ...] = (APP, OTHER)) -> bytes:
    members = [member for image in images for member in oci_manifest(image)[1]]
    return outer(LAYOUT, *members, index(*descriptors))


def described(image: Image, **more) -> dict:
    return descriptor(oci_manifest(image)[0], **more)


def multi_platform(*images: Image, **annotations) -> bytes:
    """One tag, an image for each platform."""
    inner = dumps({"schemaVersion": 2, "manifests": [described(i, **platform(i.architecture)) for i in images]})
    members = [member for image in images for member in oci_manifest(image)[1]]
    return outer(LAYOUT, *members, blob(inner), index(descriptor(inner, "index", annotations=annotations)))


def archive_with_symlinks(*links: bytes) -> bytes:
    """A docker-archive whose only layer is called l0."""
    return outer(("config.json", APP.config), *links,
                 manifest_json({"Config": "config.json", "RepoTags": None, "Layers": ["l0"]}))


class Layouts(Sandbox):
    """F: which archive is which image."""

    def check(self, archive: bytes, expected, tag: str = "", digest: str = ""):
        """expected: a tree's name, or Refused."""
        if isinstance(expected, Refused):
            with self.refused(expected.status, expected.pattern):
                self.unpack(archive, tag)
            return
        document = self.unpack(archive, tag)
        self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES[expected])
        digest = digest or {"app": APP.digest, "layered": LAYERED.digest, "other": OTHER.digest}[expected]
        self.assertEqual((document["digest"], document["version"]), (digest, digest.removeprefix("sha256:")[:12]))
        self.assertEqual(document, json.loads((self.image / "image.json").read_text()))


FORMATS = {"docker before 25": archives.docker_old, "docker 25": archives.docker_new, "podman": archives.podman,
           "containerd": archives.containerd, "oci": archives.oci,
           "containerd without manifest.json": lambda image: archives.containerd(image, with_manifest_json=False),
           "oci gzip": lambda image: archives.oci(image, compress=gz),
           "oci zstd": lambda image: archives.oci(image, compress=archives.zstd),
           "docker 25 zstd": lambda image: archives.docker_new(image, compress=archives.zstd),
           "oci with ./ names": lambda image: archives.oci(image, prefix="./")}


class Formats(Sandbox):
    """F.1, F.2: every format, and each also compressed as a whole, gives the same rootfs and digest."""

    def check_format(self, write):
        for image, name in ((APP, "app"), (LAYERED, "layered")):
            archive = write(image)
            for how, data in (("plain", archive), ("gzip", gz(archive)), ("gzip members", gz_members(archive))):
                with self.subTest(how, image=name):
                    document = self.unpack(data)
                    self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES[name])
                    self.assertEqual(document["digest"], image.digest)
                    self.assertEqual(document["process"]["cmd"], ["/hello"])
                    self.assertIn(document["tag"], ("app:latest", "docker.io/library/app:latest"))


add_cases(Formats, [(f"F1 F2 {name}", write) for name, write in FORMATS.items()], "check_format")

CONFIG = {"schemaVersion": 2, "config": descriptor(APP.config, "config")}
GOOD = CONFIG | {"layers": [descriptor(APP.layers[0], "layer")]}

add_cases(Layouts, [
    ("F3 a tag of 600 characters", archives.podman(Image(tags=("t" * 600,))), Refused(400, "over 512 characters")),
    # F.1: names and links among the members
    ("F1 layers that are symbolic links to each other", archives.docker_old(LAYERED), "layered"),
    ("F1 links through several members",
     archive_with_symlinks(symlink("l0", "a/l1"), symlink("a/l1", "../l2"), symlink("l2", "./b/../l3"),
                           file("l3", APP.layers[0])), "app"),
    ("F1 hard link among the members",
     archive_with_symlinks(file("b/l1", APP.layers[0]), hardlink("l0", "b/l1")), "app"),
    ("F1 links in a circle", archive_with_symlinks(symlink("l0", "l1"), symlink("l1", "l0")),
     Refused(400, "link to itself")),
    *[(f"F1 link out of the archive to {target}", archive_with_symlinks(symlink("l0", target)),
       Refused(400, "lacks 'l0'"))
      for target in (f"{CANARY}/file", f"../../..{CANARY}/file", "..", "/etc/passwd")],
    *[(f"F1 layer named {name!r}, outside of the archive",
       outer(("config.json", APP.config), manifest_json({"Config": "config.json", "Layers": [name]})),
       Refused(400, "lacks")) for name in (f"{CANARY}/file", "../../etc/passwd", "", ".")],
    ("F1 config named outside of the archive",
     outer(file("l0", APP.layers[0]), manifest_json({"Config": "/etc/passwd", "Layers": ["l0"]})),
     Refused(400, "lacks")),
    ("F1 member with a host's name stays a name",
     outer(file(f"{CANARY}/file", APP.layers[0]), ("config.json", APP.config), symlink("x", CANARY),
           manifest_json({"Config": "config.json", "Layers": [f"{CANARY}/file"]})), "app"),
    ("F1 sparse and special members are no blobs",
     outer(("config.json", APP.config), sparse_gnu("l0", 5, [(0, b"x")]), header("fifo", b"6"),
           manifest_json({"Config": "config.json", "Layers": ["l0"]})), Refused(400, "lacks 'l0'")),
    ("F1 manifest.json before index.json", outer(*oci_manifest(OTHER)[1], index(described(OTHER)),
                                                 ("l0", APP.layers[0]),
     ("c", APP.config), manifest_json({"Config": "c", "Layers": ["l0"]})), "app"),
    ("F1 long member names", outer(("n" * 150 + "/c", APP.config), ("n" * 150 + "/l", APP.layers[0]),
     manifest_json({"Config": "n" * 150 + "/c", "Layers": ["n" * 150 + "/l"]})), "app"),
    ("F1 attestation and other platforms without their blobs", archives.containerd(APP, with_manifest_json=False),
     "app"),

    # F.2: OCI layouts
    *[(f"F2 {depth} nested indexes", nested(depth), "app") for depth in (0, 1, faasd.MAX_INDEX_DEPTH)],
    ("F2 nested too deep", nested(faasd.MAX_INDEX_DEPTH + 1), Refused(400, "MAX_INDEX_DEPTH")),
    ("F2 host platform among several", multi_platform(ABROAD, APP), "app"),
    ("F2 platform not said", several_in_oci(described(APP)), "app"),
    ("F2 unknown/unknown is skipped", several_in_oci(attestation(), described(APP, **platform())), "app"),
    ("F2 only other platforms", multi_platform(ABROAD),
     Refused(400, f"is for linux/{FOREIGN}; this machine is linux/{HOST}")),
    ("F2 only attestations and other platforms: the error does not speak of attestations",
     several_in_oci(attestation(), described(ABROAD, **platform(FOREIGN)), images=(ABROAD,)),
     Refused(400, f"the image is for linux/{FOREIGN}; this machine")),
    ("F2 only windows", several_in_oci(described(APP, **platform(system="windows"))), Refused(400, f"windows/{HOST}")),
    ("F2 index in itself cannot match its digest",
     outer(LAYOUT, ("blobs/sha256/" + "0" * 64, dumps({"manifests": [{"digest": "sha256:" + "0" * 64}]})),
           index({"digest": "sha256:" + "0" * 64})), Refused(400, "does not match its digest")),
    ("F2 manifest blob missing", outer(LAYOUT, index(descriptor(b"missing"))), Refused(400, "lacks 'blobs/sha256/")),
    ("F2 layer blob missing", outer(LAYOUT, blob(APP.config), blob(dumps(GOOD)), index(descriptor(dumps(GOOD)))),
     Refused(400, "lacks 'blobs/sha256/")),
    ("F2 index.json empty", outer(LAYOUT, index()), Refused(400, "no image")),
    ("F2 index.json without manifests", outer(LAYOUT, ("index.json", b"{}")), Refused(400, "no image")),
    ("F2 index.json null", outer(LAYOUT, ("index.json", b"null")), Refused(400, "index.json is not a JSON object")),
    ("F2 descriptor is a string", outer(LAYOUT, ("index.json", b'{"manifests": ["x"]}')),
     Refused(400, "not an object")),
    ("F2 manifests is an object", outer(LAYOUT, ("index.json", b'{"manifests": {}}')), Refused(400, "'manifests'")),
    ("F2 layer is a string", one_layer_oci(CONFIG | {"layers": ["x"]}), Refused(400, "a layer is not an object")),
    ("F2 platform is a string", one_layer_oci(GOOD, platform="linux"), Refused(400, "'platform'")),
    *[(f"F2 digest {digest[:12]!r}", outer(LAYOUT, index({"digest": digest})), Refused(400, "not sha256"))
      for digest in ("sha512:" + "0" * 128, "sha256:" + "0" * 63, "sha256:" + "A" * 64, "md5:x", "",
                     "sha256:../../../etc/passwd", "sha256:" + "0" * 64 + "\n")],
    ("F2 digest is missing", outer(LAYOUT, index({"size": 5})), Refused(400, "not sha256")),
    ("F2 digest is a number", outer(LAYOUT, index({"digest": 5})), Refused(400, "'digest' is not a str")),
    ("F2 config digest of a foreign algorithm",
     one_layer_oci({"config": {"digest": "sha512:" + "0" * 128}, "layers": []}), Refused(400, "not sha256")),
    ("F2 layer digest of a foreign algorithm", one_layer_oci(CONFIG | {"layers": [{"digest": "blake3:00"}]}),
     Refused(400, "not sha256")),
    ("F2 schema 1 manifest", one_layer_oci({"schemaVersion": 1, "fsLayers": [], "history": []}),
     Refused(400, "schema 1")),

    # F.3: the choice, and what is no image
    ("F3 index and manifest in one: layers", one_layer_oci(GOOD | {"manifests": []}), Refused(400, "CVE-2021-41190")),
    ("F3 index and manifest in one: config",
     one_layer_oci({"manifests": [described(APP)], "config": GOOD["config"]}), Refused(400, "CVE-2021-41190")),
    ("F3 index.json and manifest in one", outer(LAYOUT, ("index.json", dumps({"manifests": [], "layers": []}))),
     Refused(400, "CVE-2021-41190")),
    ("F3 several images in a docker-archive", archives.podman(APP, OTHER), Refused(400, "--tag: app:latest, other:1")),
    ("F3 several images in an OCI archive", archives.oci(APP, OTHER), Refused(400, "--tag: app:latest, other:1")),
    ("F3 several images without tags", archives.podman(replace(APP, tags=()), replace(OTHER, tags=())),
     Refused(400, "--tag: [0-9a-f]{12}, [0-9a-f]{12}")),
    ("F3 several images with the same layers", archives.podman(APP, SAME_LAYER), Refused(400, "--tag")),
    ("F3 one image with two tags in a docker-archive", archives.podman(replace(APP, tags=("a:1", "b:2"))), "app"),
    ("F3 one image listed twice", archives.podman(replace(APP, tags=("a:1",)), replace(APP, tags=("b:2",))), "app"),
    ("F3 one image with two tags in an OCI archive", archives.oci(replace(APP, tags=("a:1", "b:2"))), "app"),
    ("F3 no tag at all", archives.podman(replace(APP, tags=())), "app"),
    ("F3 images.json of nobody: empty list", outer(manifest_json()), Refused(400, "no image")),
    ("F3 manifest.json is an object", outer(("manifest.json", b"{}")), Refused(400, "not a JSON list")),
    ("F3 manifest.json holds a string", outer(("manifest.json", b'["x"]')), Refused(400, "not an object")),
    *[(f"F3 manifest.json with {field} {value!r}",
       outer(manifest_json({"Config": "c", "Layers": [], "RepoTags": [], field: value})), Refused(400, field))
      for field, value in (("Layers", "x"), ("Layers", [5]), ("Layers", ["a\0b"]), ("RepoTags", {}), ("Config", 5))],
    *[(f"F3 not JSON: {text[:8]!r}", outer(("manifest.json", text)), Refused(400, "manifest.json is not valid JSON"))
      for text in (b"", b"{", b"[" * 100_000, b"\xff\xfe\xfd", b"[1e", b"9" * 5000)],
    ("F3 wrong architecture", archives.podman(ABROAD), Refused(400, f"linux/{FOREIGN}; this machine is linux/{HOST}")),
    ("F3 wrong architecture in an OCI archive", archives.oci(ABROAD), Refused(400, f"is for linux/{FOREIGN}")),
    ("F3 wrong system", archives.podman(Image(changes={"os": "windows"})), Refused(400, f"windows/{HOST}")),
    ("F3 no platform in the config", archives.podman(Image(changes={"os": "", "architecture": None})), "app",
     "", Image(changes={"os": "", "architecture": None}).digest),
    ("F3 docker export",
     layer(directory("bin/"), directory("etc/"), file("etc/passwd", "x"), directory("usr/"), file("usr/x"),
           directory("var/")),
     Refused(400, "use `docker save`, not `docker export`")),
    ("F3 docker export with ./ names", layer(directory("./"), directory("./etc"), directory("./usr"),
                                             directory("./lib")),
     Refused(400, "docker export")),
    ("F3 some other tar", layer(file("readme", "x")), Refused(400, "no image.*docker save")),
    ("F3 tar of nothing", archives.END, Refused(400, "empty")),
    ("F3 empty", b"", Refused(400, "empty")),
    ("F3 gzip of nothing", gz(b""), Refused(400, "empty")),
    *[(f"F3 not a tar: {what}", data, Refused(400, "this is not an image archive: make one with `docker save"))
      for what, data in (("text", b"Error response from daemon: no such image\n"), ("html", b"<html>" * 200),
                         ("random", random.Random(1).randbytes(5000)), ("zip", b"PK\3\4" + bytes(2000)),
                         ("one byte", b"x"), ("511 bytes", bytes(511)), ("gzip of text", gz(b"hello")))],
    ("F3 extra files and names with ./", archives.oci(APP, prefix="./")[:-1024] +
     file("./README", "x" * 700) + symlink("./blobs/latest", CANARY) + header("fifo", b"6") + archives.END, "app"),

    # G.1 in manifests
    ("G1 null and absent fields", outer(("c", APP.config), ("l", APP.layers[0]), ("manifest.json", dumps(
        [{"Config": "c", "RepoTags": None, "Layers": ["l"], "LayerSources": {"x": {}}, "Parent": ""}]))), "app"),

    # E.3
    ("E3 fewer layers than diff_ids (docker 25.0.0)", one_layer_oci(CONFIG | {"layers": []}),
     Refused(400, "0 layers but 1 diff_ids")),
    ("E3 layers null (docker 25.0.0)", one_layer_oci(CONFIG | {"layers": None}),
     Refused(400, "0 layers but 1 diff_ids")),
    ("E3 more layers than diff_ids", archives.podman(Image(changes={"rootfs": {"diff_ids": []}})),
     Refused(400, "1 layers but 0 diff_ids")),
    ("E3 no rootfs in the config", archives.podman(Image(changes={"rootfs": None})), Refused(400, "1 layers but 0")),
    ("E3 diff_ids is a string", archives.podman(Image(changes={"rootfs": {"diff_ids": "x"}})),
     Refused(400, "diff_ids")),
    ("E3 diff_id of a foreign algorithm", archives.podman(Image(changes={"rootfs": {"diff_ids": ["sha512:00"]}})),
     Refused(400, "not sha256")),
    ("E3 layer without entries, layer twice", archives.podman(LAYERED), "layered"),

    # E.2
    ("E2 diff_id of another content", archives.podman(Image(changes={"rootfs": {"diff_ids": ["sha256:" + "0" * 64]}})),
     Refused(400, "does not match diff_id")),
    ("E2 layer damaged, same length", archives.podman(APP).replace(b"hello\n\0", b"hellO\n\0", 1),
     Refused(400, "does not match diff_id")),
    ("E2 blob damaged in an OCI archive", archives.oci(APP).replace(b"hello\n\0", b"hellO\n\0", 1),
     Refused(400, "does not match its digest")),
    ("E2 blob that is compressed, by the name of what it was before",
     outer(LAYOUT, *[(name, gz(data) if data == APP.layers[0] else data)
                     for name, data in archives.oci_manifest(APP)[1]],
           index(descriptor(archives.oci_manifest(APP)[0]))), Refused(400, "does not match its digest")),
    ("E2 config does not match its name", outer(("0" * 64 + ".json", APP.config), ("l", APP.layers[0]),
     manifest_json({"Config": "0" * 64 + ".json", "Layers": ["l"]})), Refused(400, "does not match its digest")),
    ("E2 manifest blob does not match its name", outer(LAYOUT, ("blobs/sha256/" + "0" * 64, dumps(GOOD)),
     blob(APP.config), blob(APP.layers[0]), index({"digest": "sha256:" + "0" * 64})), Refused(400, "match its digest")),
    ("E2 right content in a blob of another name",
     outer(("c", APP.config), ("blobs/sha256/" + "0" * 64, gz(APP.layers[0])),
           manifest_json({"Config": "c", "Layers": ["blobs/sha256/" + "0" * 64]})), Refused(400, "match its digest")),
    ("E2 what follows the end marker is hashed too",
     archives.podman(replace(APP, layers=[APP.layers[0] + bytes(20_000) + b"trailer"])), "app", "",
     replace(APP, layers=[APP.layers[0] + bytes(20_000) + b"trailer"]).digest),
    ("E2 what follows the end marker is damaged", archives.podman(
        replace(APP, layers=[APP.layers[0] + bytes(20_000) + b"trailer"])).replace(b"trailer", b"Trailer", 1),
     Refused(400, "does not match diff_id")),
    ("E2 iteration that would end early at a bad header",
     archives.podman(Image(layers=[file("a") + b"bad!" * 128 + layer(file("b"))])), Refused(400, "bad tar header")),
    ("E2 layer without an end marker", archives.podman(replace(APP, layers=[APP.layers[0][:-1024]])), "app", "",
     replace(APP, layers=[APP.layers[0][:-1024]]).digest),
], "check")

# Two names of one image, and two images with long tags: --tag.
TWO_TAGS = archives.oci(replace(APP, tags=("a:1", "b:2")))
TAGGED = replace(APP, tags=("registry.example:5000/team/app:latest", "app:1.2"))
add_cases(Layouts, [
    (f"F3 --tag {wanted!r} among {', '.join(image.tags)} in {kind}", write(image, OTHER), expected, wanted)
    for kind, write in (("docker", archives.podman), ("oci", archives.oci))
    for image, wanted, expected in [
        (APP, "app:latest", "app"), (APP, "app", "app"), (APP, "other:1", "other"),
        (APP, "other", Refused(400, "no image is tagged 'other': the archive has app:latest, other:1")),
        (APP, "pp:latest", Refused(400, "no image is tagged")), (APP, "APP", Refused(400, "no image is tagged")),
        (APP, "latest", Refused(400, "no image is tagged")), (APP, "app:", Refused(400, "no image is tagged")),
        (TAGGED, "app", "app"), (TAGGED, "team/app:latest", "app"), (TAGGED, "team/app", "app"),
        (TAGGED, "app:1.2", "app"),
        (TAGGED, "registry.example:5000/team/app:latest", "app"),
        (TAGGED, "am/app", Refused(400, "no image is tagged"))]
] + [
    ("F3 --tag names the first tag of one image in OCI", TWO_TAGS, "app", "a:1"),
    ("F3 --tag names the second tag of one image in OCI", TWO_TAGS, "app", "b:2"),
    ("F3 --tag names the second tag of one index in OCI", outer(
        LAYOUT, *oci_manifest(APP)[1], blob(dumps({"manifests": [described(APP, **platform())]})),
        index(*(descriptor(dumps({"manifests": [described(APP, **platform())]}), "index", annotations=tagged(tag))
                for tag in ("a:1", "b:2")))), "app", "b:2"),
    ("F3 --tag by containerd's annotation", archives.containerd(APP, with_manifest_json=False), "app", "app:latest"),
    ("F3 --tag by the reference name alone", archives.containerd(APP, with_manifest_json=False), "app", "latest"),
    ("F3 --tag fits two images", archives.podman(replace(APP, tags=("x/app:1",)), replace(OTHER, tags=("y/app:1",))),
     Refused(400, "choose one with --tag: x/app:1, y/app:1"), "app:1"),
    ("F3 --tag on an image without tags", archives.podman(replace(APP, tags=())),
     Refused(400, "no image is tagged 'app'"), "app"),
    ("F3 control characters in a tag stay off the terminal", archives.podman(replace(APP, tags=("\x1b[2Jevil\x9b",)),
                                                                             OTHER),
     Refused(400, "choose one")),
    ("F3 a thousand tags make no endless message",
     archives.podman(*(Image(process={"Cmd": [str(at)]}, tags=(f"app:{at}" + "x" * 100,)) for at in range(100))),
     Refused(400, "choose one")),
    ("F3 control characters in a platform", archives.podman(Image(changes={"os": "\x1b[31mx" * 400})),
     Refused(400, "for")),
    ("F3 a lone surrogate in a name", outer(("manifest.json", b'[{"Config": "\\ud800", "Layers": []}]')),
     Refused(400, "lacks")),
], "check")


class Staging(Sandbox):
    """What waits for its layer's turn: the order of layers in the archive is not the one in which they apply."""

    LAYERS = [layer(file("a", b"1" * 99_999, mode=0o4750, uid=5), file("b", b"2" * 20_000), file("small", "x"),
                    sparse_gnu("holes", 1 << 20, [(500_000, b"y" * 600)])),
              layer(archives.whiteout("b"), hardlink("link", "a"),
                    file("c", b"3" * 30_000, records={"SCHILY.xattr.user.x": "v"})),
              layer(file("a", b"4" * 50_000, mtime=5))]

    def check_order(self, *members: tuple[str, bytes], layers: list[bytes] = LAYERS, **limits):
        image = Image(layers=layers)
        names = [f"{sha256(data)}.tar" for data in layers]
        self.unpack(outer(*members, *([(name, data) for name, data in zip(names, layers, strict=True)][::-1]),
                          ("config", image.config), manifest_json({"Config": "config", "Layers": names})), **limits)
        self.assertEqual(sorted(os.listdir(self.image)), ["config.json", "image.json", "rootfs"])
        return self.made()

    def made(self) -> dict[str, tuple]:
        return {path: what for path, what in archives.full_tree(self.image / "rootfs").items()
                if path not in PREPARED | {"."}}

    def test_layers_in_any_order_with_members_that_nobody_wants(self):
        reference = self.unpack(archives.podman(Image(layers=self.LAYERS)))
        wanted = self.made()
        others = [("other.tar", layer(file("x", b"5" * 99_999), symlink("y", "y"), file("y/z"))),
                  ("x.gz", gz(b"x" * 9999)), ("broken.tar", self.LAYERS[0][:9000] + bytes(999) + b"?" * 9000),
                  ("y.gz", gz(b"y" * 9999)[:-9])]
        found = self.check_order(*others)
        self.assertEqual(found, wanted)
        self.assertEqual(json.loads((self.image / "image.json").read_text()), reference | {"tag": ""})
        rootfs = self.image / "rootfs"
        self.assertEqual((rootfs / "a").read_bytes(), b"4" * 50_000)
        self.assertEqual((rootfs / "link").read_bytes(), b"1" * 99_999)
        self.assertEqual([os.lstat(rootfs / name).st_nlink for name in ("a", "link", "c", "holes")], [1, 1, 1, 1])
        self.assertFalse((rootfs / "b").exists())

    def test_E3_layer_with_large_files_twice(self):
        first, second, third = self.LAYERS
        found = self.check_order(layers=[first, second, third, first])
        for name, what in self.check_order(layers=[first]).items():
            self.assertEqual(found[name], what)

    def test_E3_a_layer_is_not_forgotten_before_its_last_turn(self):
        """What was read for the last time is given back, file by file; here a layer is in many of them."""
        first, second, third = self.LAYERS
        layers = [first, second, third, first, second]
        wanted = {path: what for path, what in archives.full_tree(self.apply(*layers)).items() if path != "."}
        shutil.rmtree(self.rootfs)
        image = Image(layers=layers)
        config, names = ("config", image.config), ["l1", "./x/../l2", "x/l3", "x/hard", "/x/l4"]
        by_other_names = outer(config, ("l1", first), ("l2", second), symlink("x/l3", "../l3"), ("l3", third),
                               hardlink("x/hard", "l1"), symlink("x/l4", "l5"), hardlink("x/l5", "./l2"),
                               manifest_json({"Config": "config", "Layers": names}))
        for segment in (1000, 4096, 1 << 20):
            for name, archive in (("docker before 25", archives.docker_old(image)), ("podman", archives.podman(image)),
                                  ("docker", archives.docker_new(image)), ("OCI", archives.oci(image)),
                                  ("gzip", archives.oci(image, compress=gz)), ("other names", by_other_names)):
                with self.subTest(name, segment=segment), mock.patch.object(faasd, "SEGMENT", segment):
                    self.unpack(archive)
                    self.assertEqual(self.made(), wanted)
                    self.assertEqual(sorted(os.listdir(self.image)), ["config.json", "image.json", "rootfs"])

    def test_E4_what_nobody_wants_is_not_unpacked_and_counts_as_it_came(self):
        for name, other in (("large", layer(file("x", bytes(3 << 20)))),
                            ("sparse", layer(sparse_gnu("x", 1 << 40, [(0, b"y" * 600)]))),
                            ("many", layer(*(file(f"x{number}") for number in range(99)))),
                            ("damaged", b"x" * 9999)):
            with self.subTest(name):
                self.check_order(("other", gz(other)), layers=[], max_size=1 << 20, max_entries=50)
        large = outer(("other", layer(file("x", bytes(3 << 20)))))
        for archive in (large, gz(large)):
            with self.refused(413, "--max-image-size"):
                self.unpack(archive, max_size=1 << 20)

    def test_pieces_of_any_size(self):
        """What a pipe gives at a time means nothing."""
        class Pipe(io.BytesIO):
            def read(self, count: int = -1) -> bytes:
                return super().read(min(count, size))
        for size in (1, 100, 513):
            for archive in (archives.podman(LAYERED), gz(archives.oci(LAYERED, compress=gz))):
                with self.subTest(size=size):
                    shutil.rmtree(self.image, ignore_errors=True)
                    faasd.unpack_image(archives.pieces(Pipe(archive)), self.image, "", 1 << 20, 100, 0)
                    self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES["layered"])

    def test_pieces_of_a_connection(self):
        """They come one after the other in the same memory: what is in two of them is whole all the same."""
        archive = archives.podman(LAYERED)
        for size in (1, 100, 513):
            ours, theirs = socket.socketpair()
            with self.subTest(size=size), ours, theirs, mock.patch.object(faasd, "COPY_CHUNK", size):
                shutil.rmtree(self.image, ignore_errors=True)
                sender = threading.Thread(target=theirs.sendall, args=[archive])
                sender.start()
                body = faasd.request_body(faasd.ByteStream(faasd.receive(ours.fileno())), str(len(archive)), 1 << 20)
                faasd.unpack_image(body, self.image, "", 1 << 20, 100, 0)
                sender.join()
                self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES["layered"])


class PlainHeaders(unittest.TestCase):
    """The parser of our own says what tarfile says, or leaves the header to it."""

    def test_same_as_tarfile(self):
        chance = random.Random(7)
        seen = {True: 0, False: 0}
        fields = ("name", "type", "size", "mode", "uid", "gid", "mtime", "linkname", "devmajor", "devminor", "sparse",
                  "pax_headers")
        for _ in range(3000):
            block = bytearray(header(chance.choice(["a", "dir/", "ü" * 40, "n" * 100, b"\xff\xfe", "a\0b"]),
                                     chance.choice([b"0", b"0", b"1", b"2", b"5", b"\0", b"7", b"3"]),
                                     size=chance.choice([0, 1, 513, 8 ** 11 - 1, 8 ** 11]),
                                     mode=chance.randrange(8 ** 4), uid=chance.choice([0, 5, 8 ** 7]),
                                     gid=chance.randrange(9), gnu=chance.random() < 0.5,
                                     mtime=chance.choice([0, 5, -1]), target=chance.choice(["", "t", "t" * 100]),
                                     tail=b"prefix" if chance.random() < 0.1 else None))
            if chance.random() < 0.2:
                block[chance.randrange(512)] = chance.choice(b"\0 07x")
            found = faasd.parse_plain_header(bytes(block))
            seen[found is None] += 1
            if found:
                info = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
                self.assertEqual({name: getattr(found, name) for name in fields},
                                 {name: getattr(info, name) for name in fields})
        self.assertGreater(min(seen.values()), 300)


class Damage(Sandbox):
    """E.2, F.3: archives that were cut or damaged on their way."""

    def reference(self, archive: bytes) -> None:
        self.unpack(archive)
        self.whole = self.image_tree()

    def image_tree(self) -> dict:
        return {path: what for path, what in archives.full_tree(self.image / "rootfs").items()
                if path not in PREPARED | {"."}}

    def check_cuts(self, archive: bytes, needed: int):
        """Cut at block boundaries, one byte off them, and at odd places; up to needed bytes there is no success."""
        step = 512 if EXHAUSTIVE else 1536
        cuts = {0, 1, 2, 100, needed - 1, *range(0, needed, step), *range(1, needed, 2 * step),
                *range(511, needed, 2 * step), *range(0, needed, step - 181)}
        for cut in sorted(cuts):
            with self.subTest(cut=cut):
                self.assertIsNotNone(self.outcome_of(archive[:cut]), "a cut archive was taken for a whole one")
        self.assert_host_unchanged()

    def outcome_of(self, archive: bytes) -> str | None:
        shutil.rmtree(self.image, ignore_errors=True)
        try:
            document = faasd.unpack_image(archives.pieces(io.BytesIO(archive)), self.image, "", archives.MAX_IMAGE_SIZE,
                                          archives.MAX_IMAGE_ENTRIES, 0)
        except faasd.FaasdError as error:
            self.assert_clear(error)
            self.assertIn(error.status, (400, 413), error)
            return str(error)
        self.assertEqual(document["digest"], LAYERED.digest)
        self.assertEqual(self.image_tree(), self.whole)
        return None

    def test_E2_cut_archives(self):
        for name, write in FORMATS.items():
            if "zstd" in name:
                continue
            archive = write(LAYERED)
            self.reference(archive)
            end = len(archive.rstrip(b"\0"))
            with self.subTest(name):
                self.check_cuts(archive, end)

    def test_E2_cut_in_the_end_marker(self):
        """All content is there, and proved by digests; only zeros are missing. It may not be half an image."""
        archive = archives.podman(LAYERED)
        self.reference(archive)
        for cut in range(len(archive.rstrip(b"\0")), len(archive), 100):
            self.outcome_of(archive[:cut])
        self.assert_host_unchanged()

    def test_E2_cut_compressed_archives(self):
        archive = gz(archives.podman(LAYERED))
        self.reference(archives.podman(LAYERED))
        for cut in sorted({*range(1, len(archive), 23), *range(len(archive) - 12, len(archive))}):
            with self.subTest(cut=cut):
                self.assertIsNotNone(self.outcome_of(archive[:cut]))
        self.assert_host_unchanged()

    def test_E2_cut_zstd_archives(self):
        archive = archives.zstd(archives.podman(LAYERED))
        self.reference(archives.podman(LAYERED))
        for cut in (1, 3, 4, 5, 20, len(archive) // 2, len(archive) - 4, len(archive) - 1):
            with self.subTest(cut=cut):
                self.assertIsNotNone(self.outcome_of(archive[:cut]))
        self.assert_host_unchanged()

    def test_E2_a_changed_byte_is_noticed_or_does_not_matter(self):
        """Seeded, so that a failure can be repeated: the subtest names format, position and new value."""
        chance = random.Random(20240607)
        survived = 0
        for name in ("docker before 25", "podman", "docker 25", "containerd without manifest.json", "oci gzip"):
            archive = FORMATS[name](LAYERED)
            self.reference(archive)
            for _ in range(120 if EXHAUSTIVE else 40):
                at, value = chance.randrange(len(archive.rstrip(b"\0"))), chance.randrange(256)
                with self.subTest(format=name, at=at, value=value):
                    damaged = archive[:at] + bytes([value]) + archive[at + 1:]
                    survived += self.outcome_of(damaged) is None
        self.assertGreater(survived, 0)         # else nothing was ever compared
        self.assert_host_unchanged()

    def test_E2_a_changed_byte_of_a_compressed_archive(self):
        chance = random.Random(7)
        archive = gz(archives.podman(LAYERED))
        self.reference(archives.podman(LAYERED))
        for _ in range(100):
            at, value = chance.randrange(len(archive)), chance.randrange(256)
            with self.subTest(at=at, value=value):
                self.outcome_of(archive[:at] + bytes([value]) + archive[at + 1:])
        self.assert_host_unchanged()

    def test_E2_changed_headers_of_a_layer(self):
        """The layer's digest is made to fit, so that every changed header is really taken for what it says."""
        chance = random.Random(99)
        parts = layer(directory("d"), file("d/x", "1", records={"SCHILY.xattr.user.a": "b"}), symlink("d/l", CANARY),
                      hardlink("d/h", "d/x"), sparse_pax("s", 5000, [(0, b"a"), (4096, b"b")], "1.0"), whiteout("d/no"))
        for _ in range(250 if EXHAUSTIVE else 80):
            at, value = chance.randrange(len(parts) - 1024), chance.randrange(256)
            data = bytearray(parts)
            data[at] = value
            block = at // 512 * 512
            if data[block + 257:block + 262] == b"ustar":       # keep the checksum right
                data[block + 148:block + 156] = b" " * 8
                data[block + 148:block + 156] = b"%06o\0 " % sum(data[block:block + 512])
            with self.subTest(at=at, value=value):
                try:
                    self.unpack(archives.podman(Image(layers=[bytes(data)])))
                except faasd.FaasdError as error:
                    self.assertIn(error.status, (400, 413), error)


class Limits(Sandbox):
    """E.4: 413 and the limit's name; in this process, with limits that are small or named constants."""

    def check_limit(self, archive: bytes, pattern: str, limits: dict, status: int = 413):
        with self.refused(status, pattern):
            self.unpack(archive, **limits)


BIG_JSON = b"[" + b" " * faasd.MAX_JSON_SIZE + b"]"
BIG = Image(layers=[layer(file("big", "x" * 100_000))])

add_cases(Limits, [
    ("E4 files too large", archives.podman(BIG), "over 90000 bytes .--max-image-size", {"max_size": 90_000}),
    ("E4 gzip layer too large", archives.oci(BIG, compress=gz), "--max-image-size", {"max_size": 90_000}),
    ("E4 archive inflates too large", gz(archives.podman(BIG)), "--max-image-size", {"max_size": 90_000}),
    ("E4 archive inflates too large, but not its image", gz(archives.oci(APP)[:-1024] + file("README", bytes(200_000)) +
                                                             archives.END), "--max-image-size", {"max_size": 100_000}),
    ("E4 zeros behind the end marker", archives.oci(Image(layers=[APP.layers[0] + bytes(200_000)]), compress=gz),
     "--max-image-size", {"max_size": 100_000}),
    ("E4 layers together", archives.podman(Image(layers=[layer(file(f"f{at}", "x" * 40_000)) for at in range(3)])),
     "--max-image-size", {"max_size": 100_000}),
    ("E4 one layer twice counts twice", archives.podman(Image(layers=[layer(file("f", "x" * 40_000))] * 3)),
     "--max-image-size", {"max_size": 100_000}),
    ("E4 one layer of padded gzip, time and again", outer(("l", gz(APP.layers[0]) + bytes(60_000)), ("c", Image(
        layers=APP.layers * 3).config), manifest_json({"Config": "c", "Layers": ["l"] * 3})),
     "--max-image-size", {"max_size": 150_000}),
    ("E4 header says more than there is", archives.podman(Image(layers=[layer(header("f", size=1 << 50))])),
     "--max-image-size", {}),
    ("E4 entries", archives.podman(Image(layers=[layer(*(file(f"f{at}") for at in range(11)))])),
     "over 10 files .--max-image-entries", {"max_entries": 10}),
    ("E4 entries of all layers", archives.podman(Image(layers=[layer(*(file("f") for _ in range(6)))] * 2)),
     "--max-image-entries", {"max_entries": 10}),
    ("E4 whiteouts are entries too", archives.podman(Image(layers=[layer(*(whiteout("f") for _ in range(11)))])),
     "--max-image-entries", {"max_entries": 10}),
    ("E4 directories that are only implied are files too",
     archives.podman(Image(layers=[layer(*(file(f"{at}/" + "d/" * 30 + "f") for at in range(40)))])),
     "over 200 files .--max-image-entries", {"max_entries": 200}),
    ("E4 manifest.json too large", outer(("manifest.json", BIG_JSON)), "MAX_JSON_SIZE", {}),
    ("E4 index.json too large", outer(("index.json", BIG_JSON)), "MAX_JSON_SIZE", {}),
    ("E4 config too large", outer(("c", BIG_JSON), ("l", b""), manifest_json({"Config": "c", "Layers": ["l"]})),
     "MAX_JSON_SIZE", {}),
    ("E4 PAX header too large", archives.podman(Image(layers=[layer(file("f", records={"x": "y" * (1 << 20)}))])),
     "MAX_RECORD_SIZE", {}),
    ("E4 long name too large", archives.podman(Image(layers=[layer(archives.gnu_long("n" * (2 << 20)), file("f"))])),
     "MAX_RECORD_SIZE", {}),
    ("E4 PAX header of the archive itself", outer(pax({"x": "y" * (1 << 20)}) + file("manifest.json", "[]")),
     "MAX_RECORD_SIZE", {}),
    ("E4 long name that says it has a terabyte", archives.podman(Image(layers=[layer(header("f", b"L",
                                                                                            size=1 << 40))])),
     "MAX_RECORD_SIZE", {}),
    ("E4 extension headers one after the other, half a megabyte each",
     archives.podman(Image(layers=[layer(*(pax({"x": "y" * (1 << 19)}) for _ in range(5)), file("f"))])),
     "MAX_RECORD_SIZE", {}),
    ("E4 layers of the image", archives.podman(Image(layers=[layer()] * (faasd.MAX_LAYERS + 1))), "MAX_LAYERS", {}),
    ("E4 members of the archive", outer(*(header(f"m{at}") for at in range(faasd.MAX_ARCHIVE_MEMBERS + 1))),
     "MAX_ARCHIVE_MEMBERS", {}),
    ("E5 negative size in the outer archive", outer(header("x", size=-512), file("manifest.json", "[]")),
     "negative size|bad tar header|not an image archive", {}, 400),        # the last by Python 3.14
    ("E5 negative size of a sparse member", outer(header("x", b"S", size=-512, gnu=True), file("manifest.json", "[]")),
     "negative size|bad tar header|not an image archive", {}, 400),        # the last by Python 3.14
    ("E5 size that leads back to its own extension header",
     outer(pax({"GNU.sparse.realsize": "5"}) + header("x", size=-1536), file("manifest.json", "[]")),
     "negative size|bad tar header|not an image archive", {}, 400),        # the last by Python 3.14
    ("E5 size that leads behind the end", outer(header("x", size=1 << 60), file("manifest.json", "[]")), "cut short",
     {}, 400),
], "check_limit")


def skippable(number: int, data: bytes = b"4 by") -> bytes:
    """A zstd frame that a reader is to skip (RFC 8878, 3.1.2), as pzstd, zstd:chunked and signatures have."""
    return struct.pack("<II", 0x184D2A50 + number, len(data)) + data


# Compressions that no image format has. What is written by hand only has to begin like them.
OTHERS = {"xz": lzma.compress, "bzip2": bz2.compress,
          "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
          "lz4": lambda data: b"\x04\x22\x4d\x18\x64\x40\xa7" + data, "lzip": lambda data: b"LZIP\1\x0c" + data}


class Streams(Sandbox):
    """E.1: compression by the first bytes."""

    def test_E1_layers_in_other_compressions_are_named(self):
        for name, compress in OTHERS.items():
            for write in (archives.oci, archives.docker_new):
                with self.subTest(name), self.refused(400, f"a layer is compressed with {name}, .*with gzip or zstd"):
                    self.unpack(write(LAYERED, compress=compress))

    def test_E1_archives_in_other_compressions_are_named(self):
        for name, compress in OTHERS.items():
            with self.subTest(name), self.refused(400, f"archive is compressed with {name}.* {name} -dc FILE"):
                self.unpack(compress(archives.podman(LAYERED)))

    def test_E1_archives_in_known_compressions_deploy(self):
        archive = archives.podman(LAYERED)
        for data in (gz(archive), gz_members(archive), archives.zstd(archive), skippable(3) + archives.zstd(archive)):
            self.unpack(data)
            self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES["layered"])

    def test_E1_names_that_begin_like_a_compression(self):
        for name in ("]", "BZh9", "BZh91AY", "LZIP", "(", "\x1f"):
            with self.subTest(name):
                self.unpack(archives.podman(Image(layers=[layer(file(name, "x"))])))
                self.assertEqual((self.image / "rootfs" / name).read_text(), "x")

    def check_layer(self, compress):
        document = self.unpack(archives.docker_new(LAYERED, compress=compress))
        self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES["layered"])
        self.assertEqual(document["digest"], LAYERED.digest)

    def check_damaged(self, spoil, pattern: str):
        with self.refused(400, pattern):
            self.unpack(archives.docker_new(BIG, compress=lambda data: spoil(gz(data))))

    def test_E1_zstd_with_a_window_that_takes_too_much_memory(self):
        def compress(data: bytes) -> bytes:
            return subprocess.run(["zstd", "-cq", "--ultra", "--long=31"], input=data, capture_output=True,
                                  check=True).stdout
        with self.refused(400, "made with --long over 27|memory|window"):
            self.unpack(archives.docker_new(BIG, compress=compress))

    def test_E1_media_types_and_names_lie(self):
        """A gzip layer called tar, a plain one called tar+gzip."""
        named = {"config": descriptor(APP.config), "layers": [
            descriptor(gz(APP.layers[0]), mediaType="application/vnd.oci.image.layer.v1.tar")]}
        data = dumps(named)
        self.unpack(outer(LAYOUT, blob(APP.config), blob(gz(APP.layers[0])), blob(data), index(descriptor(data))))
        named["layers"] = [descriptor(APP.layers[0], mediaType="application/vnd.oci.image.layer.v1.tar+gzip")]
        data = dumps(named)
        self.unpack(outer(LAYOUT, blob(APP.config), blob(APP.layers[0]), blob(data), index(descriptor(data))))
        self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES["app"])

    def test_E1_large_layers_in_every_compression(self):
        data = random.Random(3).randbytes(3_000_000)
        image = Image(layers=[layer(file("big", data + bytes(3_000_000) + data))])
        for name, compress in (("plain", lambda data: data), ("gzip", gz),
                               ("members", lambda data: gz_members(data, 7)),
                               ("zstd", archives.zstd)):
            with self.subTest(name):
                self.unpack(archives.oci(image, compress=compress))
                self.assertEqual((self.image / "rootfs/big").read_bytes(), data + bytes(3_000_000) + data)


add_cases(Streams, [
    ("E1 plain", lambda data: data), ("E1 gzip", gz), ("E1 gzip of several members", gz_members),
    ("E1 gzip of a member per 20 bytes", lambda data: gz_members(data, max(1, len(data) // 20))),
    ("E1 gzip with zeros behind", lambda data: gz(data) + bytes(512)),
    ("E1 gzip with zeros between the members", lambda data: gz(data[:700]) + bytes(9) + gz(data[700:])),
    ("E1 gzip with an empty member", lambda data: gz(b"") + gz(data) + gz(b"")),
    ("E1 zstd", archives.zstd),
    ("E1 zstd of several frames", lambda data: archives.zstd(data[:700]) + archives.zstd(data[700:])),
    *[(f"E1 zstd behind a frame to skip, {name}", lambda data, skip=skip: skip + archives.zstd(data))
      for name, skip in {"magic 50": skippable(0), "magic 5F": skippable(15), "empty": skippable(0, b""),
                         "large": skippable(7, bytes(300_000)),
                         "three": skippable(1) + skippable(2) + skippable(3)}.items()],
    ("E1 zstd with frames to skip between and behind",
     lambda data: skippable(1) + archives.zstd(data[:700]) + skippable(2) + skippable(3) + archives.zstd(data[700:]) +
     skippable(4) + skippable(5, b"")),
], "check_layer")
add_cases(Streams, [
    ("E1 gzip cut in the trailer", lambda data: data[:-3], "cut short"),
    ("E1 gzip cut in the middle", lambda data: data[:-50], "cut short|damaged"),
    ("E1 gzip with a wrong checksum", lambda data: data[:-8] + b"\0\0\0\0" + data[-4:], "damaged"),
    ("E1 gzip with garbage behind", lambda data: data + b"garbage", "damaged"),
    ("E1 gzip magic alone", lambda data: b"\x1f\x8b", "cut short"),
    ("E1 zstd frame to skip that is cut short", lambda data: skippable(0, bytes(9))[:-2], "damaged|cut short"),
    ("E1 zstd frames to skip and nothing else", lambda data: skippable(0), "layer .* is damaged"),
    ("E1 zstd magic, no zstd", lambda data: b"\x28\xb5\x2f\xfd" + data, "damaged|zstd"),
], "check_damaged")


def random_layer(size: int, *entries: bytes) -> bytes:
    """Entries, then a file that does not compress."""
    return layer(*entries, file("random", random.Random(5).randbytes(size)))


class InChild(Sandbox):
    """What could take a process down, in the process that may be taken down."""

    def test_F_a_good_image(self):
        child = self.unpack_child(archives.podman(LAYERED))
        self.assertEqual((child.returncode, child.stderr), (0, ""))
        self.assertEqual(child.document["digest"], LAYERED.digest)
        self.assertEqual(of_the_image(archives.tree(self.image / "rootfs")), TREES["layered"])

    def check_refused(self, archive, status: int, pattern: str, limits: dict):
        archive = archive() if callable(archive) else archive
        self.assert_child_refused(self.unpack_child(archive, **limits), status, pattern)

    def test_E_does_nothing_for_a_daemon_that_has_died(self):
        child = self.unpack_child(archives.podman(LAYERED), parent="1")
        self.assertEqual((child.returncode, child.stdout, child.stderr), (1, "", ""))
        self.assertFalse(self.image.exists())

    def test_E4_no_memory_for_a_thread(self):
        """As when an image has taken nearly all of it when a layer begins."""
        stack = f"--stack={2 * faasd.CHILD_ADDRESS_SPACE}"
        child = self.unpack_child(archives.podman(LAYERED), before=("prlimit", stack))
        self.assert_child_refused(child, 413, "CHILD_ADDRESS_SPACE")

    def test_E1_zstd_without_the_program(self):
        archive = archives.oci(APP, compress=archives.zstd)
        empty = self.directory / "empty"
        empty.mkdir()
        child = self.unpack_child(archive, env={"PATH": str(empty)})
        if child.returncode == 0 and importlib.util.find_spec("compression"):
            self.skipTest("this Python has zstd")
        self.assert_child_refused(child, 400, "zstd.*(apt install zstd|install).*gzip")

    def test_E1_zstd_is_ended_when_the_layer_is_refused(self):
        """The program still has megabytes to say; nobody will read them, and nobody may wait for that.

        The refusal comes in the middle of the layer, when the pipes to and from the program are full.
        """
        chance = random.Random(5)
        image = Image(layers=[layer(file("before", chance.randbytes(8 << 20)), symlink("a", "a"), file("a/x"),
                                    file("behind", chance.randbytes(16 << 20)))])
        path = self.write(archives.oci(image, compress=archives.zstd))
        for _ in range(3):
            self.assert_child_refused(self.unpack_child(path, timeout=20), 400, "symbolic links")
            shutil.rmtree(self.image)

    def test_E1_zstd_of_the_archive_is_ended_when_the_disk_is_full(self):
        image = Image(layers=[random_layer(16 << 20)])
        child = self.on_small_disk(archives.zstd(archives.podman(image)), timeout=20)
        self.assert_child_refused(child, 507, "no space left")

    def test_E1_zstd_is_ended_at_a_limit(self):
        image = Image(layers=[random_layer(4 << 20)])
        for archive in (archives.oci(image, compress=archives.zstd), archives.zstd(archives.podman(image))):
            self.assert_child_refused(self.unpack_child(archive, max_size=1 << 20, timeout=20), 413, "--max-image-size")
            shutil.rmtree(self.image, ignore_errors=True)

    def test_E4_bombs_stay_small(self):
        """However much they promise, an honest limit answers, and the memory is that of any image."""
        zeros = gz(bytes(64 << 20))
        for name, compressed in (("gzip layer", zeros), ("gzip twice", gz(zeros))):
            config = dumps({"os": "linux", "architecture": HOST, "rootfs": {"diff_ids": ["sha256:" + "0" * 64]}})
            archive = outer(("c", config), ("l", compressed), manifest_json({"Config": "c", "Layers": ["l"]}))
            child = self.unpack_child(archive, max_size=32 << 20)
            with self.subTest(name):
                self.assert_child_refused(child, 413 if compressed is zeros else 400, "max-image-size|header|diff_id")
                self.assertLess(child.peak, 64 << 20)
            shutil.rmtree(self.image, ignore_errors=True)

    def test_E4_a_large_image_needs_little_memory(self):
        image = Image(layers=[layer(*(file(f"d{at % 10}/f{at}", bytes(4 << 20)) for at in range(16)),
                                    *(file(f"s/{at}", "x") for at in range(3000)))])
        child = self.unpack_child(archives.oci(image, compress=gz))
        self.assertEqual((child.returncode, child.stderr), (0, ""))
        self.assertLess(child.peak, 64 << 20)

    def on_small_disk(self, archive: bytes, options: str = "size=1m", timeout: float = 120):
        """Unpack onto a tmpfs of a mebibyte, mounted where nobody else sees it."""
        disk = self.directory / "disk"
        disk.mkdir()
        script = f'mount -t tmpfs -o {options} tmpfs "{disk}" && exec "$@"'
        child = self.unpack_child(archive, image=disk / "image", timeout=timeout,
                                  before=("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"))
        self.assertEqual(os.listdir(disk), [])
        self.assertNotIn(str(disk), Path("/proc/self/mountinfo").read_text())
        disk.rmdir()
        return child

    def test_E4_full_disk(self):
        large = Image(layers=[layer(file("big", bytes(3 << 20)))])
        for name, archive, options in (
                ("a file", archives.podman(large), "size=1m"),
                ("a gzip layer", archives.oci(large, compress=gz), "size=1m"),
                ("a compressed archive", gz(archives.podman(large)), "size=1m"),
                ("no inodes: files", archives.podman(Image(layers=[layer(*(file(f"f{at}") for at in range(99)))])),
                 "nr_inodes=50"),
                ("no inodes: implied directories", archives.podman(Image(layers=[layer(file("d/" * 99 + "f"))])),
                 "nr_inodes=50"),
                ("no inodes: links", archives.podman(Image(layers=[layer(*(symlink(f"f{at}", "x")
                                                                           for at in range(99)))])),
                 "nr_inodes=50"),
                ("no room for the rootfs", archives.podman(APP), "nr_inodes=2"),
                ("no room for what faasd adds", archives.podman(APP), "nr_inodes=6")):
            with self.subTest(name):
                self.assert_child_refused(self.on_small_disk(archive, options), 507, "no space left")

    def test_a_large_layer_does_not_take_twice_its_size_on_the_disk(self):
        """As much of the archive as has been unpacked is given back."""
        large = Image(layers=[layer(*(file(f"f{at}", bytes(16 << 20)) for at in range(10)))])
        child = self.on_small_disk(archives.podman(large), "size=256m")
        self.assertEqual((child.returncode, child.stderr), (0, ""), child)


class Cheap(Sandbox):
    """E.4: what costs much and weighs nothing is counted."""

    def check_cost(self, layers: list[bytes], pattern: str, limits: dict):
        with mock.patch.multiple(faasd, FREE_STEPS=5000, FREE_NUMBERS=5000), self.refused(413, pattern):
            self.unpack(archives.oci(Image(layers=layers), compress=gz), **limits)

    def test_E4_members_and_frames_are_counted(self):
        plain = layer(file("f", "x"))
        for name, compress, empty in (("gzip", gz, gz(b"")), ("zstd", archives.zstd, archives.zstd(b""))):
            for at in (0, len(plain)):
                few, many = (compress(plain[:at]) + empty * count + compress(plain[at:]) for count in (15, 21))
                with self.subTest(name, at=at):
                    self.unpack(archives.oci(Image(layers=[plain]), compress=lambda data, few=few: few), max_entries=10)
                    with self.refused(413, "over 20 pieces .*--max-image-entries"):
                        self.unpack(archives.oci(Image(layers=[plain]), compress=lambda data, many=many: many),
                                    max_entries=10)
                    with self.refused(413, "over 20 pieces"):
                        self.unpack(many, max_entries=10)

    def test_E4_millions_of_empty_members(self):
        """8 MB of them in 20 KB. Each must not be copied with all that follows: that took minutes."""
        members = gz(b"") * (faasd.FRAMES_PER_ENTRY * 200_000 + 1)
        result = self.unpack_child(members, max_entries=200_000, timeout=60)
        self.assert_child_refused(result, 413, "--max-image-entries")


LONG_WAY = [*(symlink(f"l{at}", "d/../" * 800 + f"l{at + 1}") for at in range(39)), directory("d"), directory("l39")]
add_cases(Cheap, [
    ("E4 paths through long links", [layer(*LONG_WAY, *(file(f"l0/{at}/f") for at in range(20)))],
     "STEPS_PER_ENTRY", {}),
    ("E4 whiteouts through long links", [layer(*LONG_WAY), layer(*(whiteout("l0/x") for at in range(20)))],
     "STEPS_PER_ENTRY", {}),
    ("E4 hard links through long links",
     [layer(*LONG_WAY, file("l39/x"), *(hardlink(f"h{at}", "l0/x") for at in range(20)))],
     "STEPS_PER_ENTRY", {}),
    ("E4 paths through links of slashes", [layer(*(symlink(f"l{at}", "/" * 4000 + f"l{at + 1}") for at in range(38)),
                                                *(whiteout("l0/x") for at in range(20)))], "STEPS_PER_ENTRY", {}),
    ("E4 directories that are only implied", [layer(*(file(f"{at}/" + "d/" * 250 + "f") for at in range(60)))],
     "STEPS_PER_ENTRY", {}),
    ("E4 one record again and again", [layer(pax(archives.record("a", "") * 7000) + file("f"))], "FREE_NUMBERS", {}),
    ("E4 headers again and again", [layer(*(gnu_long("x" * 50_000, b"K") + file(f"f{at}") for at in range(20)))],
     "FREE_NUMBERS", {}),
    ("E4 records whose names go on over all that follow", [layer(pax(b"2 " * 2000 + b"=x\n"), file("f"))],
     "FREE_NUMBERS", {}),
    ("E4 runs of digits", [layer(pax(b"7 a=bc\n" + (b"1" * 1000 + b"x") * 30), file("f"))], "FREE_NUMBERS", {}),
    ("E4 a map of holes", [sparse_pax("f", 5, [(at, b"") for at in range(4000)], "1.0")], "FREE_NUMBERS", {}),
    ("E4 opaque again and again",
     [layer(*(file(f"d/{at}") for at in range(1000)), *(opaque("d") for at in range(1000)))],
     "STEPS_PER_ENTRY", {}),
], "check_cost")


def many_keys(count: int) -> bytes:
    """PAX records that overlap: on Python 3.11 each takes all that follows for its name."""
    return archives.pax(b"2 " * count + b"=x\n")


def short_maps(count: int) -> bytes:
    return pax({"GNU.sparse.size": "5", "GNU.sparse.map": ",".join(["0,0"] * count)}) + file("f", "x")


BOMBS = [
    ("PAX header of 200,000 records", lambda: layer(pax(b"5 a=\n" * 200_000), file("f")), 0, ""),
    ("PAX records that overlap", lambda: layer(many_keys(500_000), file("f")), 413, ""),
    ("a thousand nested PAX headers", lambda: layer(*(pax({"a": "b"}) for _ in range(1000)), file("f")), 400, ""),
    ("a thousand nested long names", lambda: layer(*(archives.gnu_long("n") for _ in range(1000)), file("f")), 400, ""),
    ("nested global headers", lambda: layer(*(pax({"a": "b"}, b"g") for _ in range(1000)), file("f")), 400, ""),
    ("extension headers without end", lambda: layer(*(pax({"a": "b"}) for _ in range(100_000))), 400, ""),
    ("huge long name", lambda: layer(archives.gnu_long("n" * (64 << 20)), file("f")), 413, "MAX_RECORD_SIZE"),
    ("huge PAX header", lambda: layer(pax({"a": "b" * (64 << 20)}), file("f")), 413, "MAX_RECORD_SIZE"),
    ("sparse map of 200,000 pieces", lambda: layer(short_maps(200_000)), 0, ""),
    ("sparse blocks without end", lambda: layer(header("f", b"S", gnu=True, tail=bytes(137) + b"\1" + bytes(12)) +
                                                (bytes(504) + b"\1" + bytes(7)) * 100_000), 413, "MAX_RECORD_SIZE"),
    ("sparse 1.0 map without end", lambda: layer(pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) +
                                                 header("f",
                                                        size=64 << 20) + padded(b"9999999\n" + b"0\n" * (16 << 20))),
     413, "MAX_RECORD_SIZE"),
    ("sparse 1.0 map of one long number", lambda: layer(pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) +
                                                        header("f", size=64 << 20) + b"9" * (8 << 20)),
     400, ""),
    ("sparse file of an exabyte", lambda: layer(sparse_gnu("f", 1 << 60, [(0, b"x")])), 413, "--max-image-size"),
    ("PAX header of digits (CVE-2024-6232)", lambda: layer(pax(b"1" * 700_000), file("f")), 400, ""),
]


class Bombs(Sandbox):
    """E.4: small in the file, large in memory; in the child, as a layer and as the archive itself."""

    wrap = staticmethod(lambda data: archives.podman(Image(layers=[data])))

    def check_bomb(self, make, status: int, pattern: str):
        """An answer in JSON; status 0: what is large is valid. Never a traceback, a kill, or a hang."""
        child = self.unpack_child(self.wrap(make()), timeout=30)
        self.assertEqual(child.stderr, "")
        if status == 0:
            self.assertEqual(child.returncode, 0, child)
            return
        self.assertEqual(child.returncode, 1, child)
        self.assert_clear(child.document["error"])
        self.assertIn(child.document["status"], {400, 413}, child.document)
        if pattern:
            self.assertEqual(child.document["status"], status)
            self.assertRegex(child.document["error"], pattern)


add_cases(Bombs, [(f"E4 {name}", *case) for name, *case in BOMBS], "check_bomb")


class OuterBombs(Bombs):
    """The same as the archive itself, where nothing is written and so nothing is too large to write."""

    wrap = staticmethod(lambda data: data)

    def check_bomb(self, make, status: int, pattern: str):
        super().check_bomb(make, 400, "")


if __name__ == "__main__":
    unittest.main()
