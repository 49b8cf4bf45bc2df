#!/usr/bin/env python3
"""Deploy a large image: time against `tar -x` of the same layers, and peak memory: sudo bench/deploy.py [MIB]

The image has one layer of MIB mebibytes (2048 by default) in files of 8 MiB and 20,000 small files, uncompressed as
`docker save` writes it, and a layer with the test handler. The deploy includes upload, digests and the proof. Runs in a
network namespace of its own; needs root and nine times the size in /var/tmp.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import lab

FILE_SIZE, SMALL_FILES = 8 << 20, 20_000


def add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o755
    tar.addfile(entry, io.BytesIO(data))


def make_image(directory: Path, mebibytes: int) -> tuple[Path, list[Path]]:
    """Write the image; return it and its layers."""
    packed = directory / "packed.tar"
    with packed.open("wb") as file:
        subprocess.run([sys.executable, lab.TOP / "faas", "pack", lab.TOP / "test_handler.py"], stdout=file, check=True)
    with tarfile.open(packed) as archive:
        manifest = json.load(archive.extractfile("manifest.json"))[0]
        config = json.load(archive.extractfile(manifest["Config"]))
        layers = []
        for name in manifest["Layers"]:
            layers.append(directory / name)
            layers[-1].write_bytes(archive.extractfile(name).read())
    big = directory / "big.tar"
    with tarfile.open(big, "w") as tar:
        for number in range((mebibytes << 20) // FILE_SIZE):
            add_bytes(tar, f"data/{number}", os.urandom(FILE_SIZE))
        for number in range(SMALL_FILES):
            add_bytes(tar, f"small/{number % 100}/{number}", b"%d" % number)
    layers.insert(1, big)
    digests = [hashlib.file_digest(layer.open("rb"), "sha256").hexdigest() for layer in layers]
    config["rootfs"]["diff_ids"] = [f"sha256:{digest}" for digest in digests]
    config_bytes = json.dumps(config).encode()
    names = [f"{digest}.tar" for digest in digests]
    config_name = f"{hashlib.sha256(config_bytes).hexdigest()}.json"
    image = directory / "image.tar"
    with tarfile.open(image, "w") as archive:
        for layer, name in zip(layers, names, strict=True):
            archive.add(layer, name)
        add_bytes(archive, config_name, config_bytes)
        add_bytes(archive, "manifest.json",
                  json.dumps([{"Config": config_name, "RepoTags": ["big:latest"], "Layers": names}]).encode())
    return image, layers


class MemoryWatch(threading.Thread):
    """Reads the peak resident memory (VmHWM) of the daemon and its unpacking child."""

    def __init__(self, daemon: int):
        super().__init__(daemon=True)
        self._daemon = daemon
        self.peaks: dict[str, int] = {"daemon": 0, "child": 0}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            children = Path(f"/proc/{self._daemon}/task/{self._daemon}/children").read_text().split()
            for pid in [str(self._daemon), *children]:
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
                except (OSError, TypeError):
                    continue            # it ended
                who = "daemon" if pid == str(self._daemon) else "child" if b"unpack" in words else None
                if who:
                    self.peaks[who] = max(self.peaks[who], peak)


def untar(layers: list[Path], directory: Path) -> float:
    """Return the seconds that tar takes for the same files, on the same disk."""
    directory.mkdir()
    start = time.perf_counter()
    for layer in layers:
        subprocess.run(["tar", "-x", "-f", layer, "-C", directory], check=True)
    return time.perf_counter() - start


def measure(directory: Path, mebibytes: int, rounds: int) -> dict:
    """Return the seconds of deploys and of tar, alternating, and the peak resident memory in bytes.

    Nothing is removed on the way: ext4 without a journal is slow to make files where others have just been deleted.
    """
    figures: dict = {"deploy": [], "tar": []}
    image, layers = make_image(directory, mebibytes)
    with lab.Faasd(directory) as daemon:
        watch = MemoryWatch(daemon.process.pid)
        watch.start()
        for number in range(rounds):
            os.sync()
            start = time.perf_counter()
            daemon.deploy(f"big{number}", image)
            figures["deploy"].append(time.perf_counter() - start)
            os.sync()
            figures["tar"].append(untar(layers, directory / f"untar{number}"))
        watch.done.set()
    return {**figures, "size": image.stat().st_size, "peak": watch.peaks}


def main(mebibytes: int) -> None:
    with lab.scratch("/var/tmp") as directory:
        figures = measure(directory, mebibytes, 3)
    print(f"image of {figures['size'] >> 20} MiB, alternating    deploy s   tar -x s   ratio")
    for deploy, tar in zip(figures["deploy"], figures["tar"], strict=True):
        print(f"                                    {deploy:9.2f}  {tar:9.2f}  {deploy / tar:6.2f}")
    print(f"peak resident memory: daemon {figures['peak']['daemon'] / (1 << 20):.1f} MiB, "
          f"unpacking child {figures['peak']['child'] / (1 << 20):.1f} MiB")


if __name__ == "__main__":
    lab.in_own_network()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
