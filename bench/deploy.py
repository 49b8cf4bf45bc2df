#!/usr/bin/env python3
"""Deploy a large image: time against `tar -x` of the same layers, and peak memory: sudo bench/deploy.py [MIB]

The image has one layer of MIB mebibytes (2048 by default) in files of 8 MiB and 20,000 small files, uncompressed as
`docker save` writes it, and a layer with the test handler. The deploy includes upload, digests and the proof. Runs in a
network namespace of its own; needs root and three times the size in /var/tmp.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
FILE_SIZE, SMALL_FILES = 8 << 20, 20_000


def add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o755
    tar.addfile(entry, io.BytesIO(data))


def make_image(directory: Path, mebibytes: int) -> tuple[Path, list[Path]]:
    """Write the image; return it and its layers."""
    packed = directory / "packed.tar"
    with packed.open("wb") as file:
        subprocess.run([sys.executable, TOP / "faas", "pack", TOP / "test_handler.py"], stdout=file, check=True)
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
    """Return the seconds that tar takes for the same files, written to the same disk."""
    directory.mkdir()
    start = time.perf_counter()
    for layer in layers:
        subprocess.run(["tar", "-x", "-f", layer, "-C", directory], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(directory)
    return seconds


def main(mebibytes: int) -> None:
    directory = Path(tempfile.mkdtemp(prefix="faasd-bench.", dir="/var/tmp"))
    image, layers = make_image(directory, mebibytes)
    faas = [sys.executable, TOP / "faas", "--socket", directory / "run/faasd.sock"]
    daemon = subprocess.Popen([sys.executable, TOP / "faasd.py", "--state-dir", directory / "state", "--run-dir",
                               directory / "run"], stderr=(directory / "log").open("wb"))
    try:
        while "ready: " not in (directory / "log").read_text():
            time.sleep(0.01)
        watch = MemoryWatch(daemon.pid)
        watch.start()
        print(f"image of {image.stat().st_size >> 20} MiB, alternating    deploy s   tar -x s   ratio")
        for number in range(3):
            os.sync()
            start = time.perf_counter()
            subprocess.run([*faas, "new", f"big{number}", "-f", image], check=True, stdout=subprocess.DEVNULL)
            deploy = time.perf_counter() - start
            subprocess.run([*faas, "rm", f"big{number}"], check=True, stdout=subprocess.DEVNULL)
            os.sync()
            tar = untar(layers, directory / "untar")
            print(f"  round {number + 1}                              {deploy:9.2f}  {tar:9.2f}  {deploy / tar:6.2f}")
        watch.done.set()
        print(f"peak resident memory: daemon {watch.peaks['daemon'] / (1 << 20):.1f} MiB, "
              f"unpacking child {watch.peaks['child'] / (1 << 20):.1f} MiB")
    finally:
        daemon.terminate()
        daemon.wait()
        shutil.rmtree(directory)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--inside"]:
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable,
                              sys.argv[0], "--inside", *sys.argv[1:]])
    main(int(sys.argv[2]) if len(sys.argv) > 2 else 2048)
