"""Time and memory of reading and splitting a large image folder.

    python benchmarks/read_memory.py --images 100000 --size 64

Makes a folder of smooth random RGB pictures as PNG, ten classes, and reads and splits it in a process of its own.
Memory is the peak above the interpreter with its libraries.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from synthaug.config import parse_config


def make_folder(folder: Path, images: int, size: int) -> None:
    import cv2

    rng = np.random.default_rng(0)
    for number in range(images):
        place = folder / f"class{number % 10}"
        place.mkdir(exist_ok=True)
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(place / f"{number:06d}.png"), cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC))


def measure(folder: Path, output: Path, size: int) -> None:
    import cv2  # noqa: F401
    import datasets  # noqa: F401
    import sklearn.neighbors  # noqa: F401

    from synthaug.read import read
    from synthaug.split import split

    config = parse_config(
        {
            "name": "large",
            "output": str(output),
            "dataset": {"format": "imagefolder", "path": str(folder)},
            "image": {"size": size},
            "split": {"ledger": str(output / "ledger.json")},
        }
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("read", "split"):
        (output / name).mkdir(parents=True)
    started = time.monotonic()
    source = read(config, output / "read")
    between = time.monotonic()
    split(config, source, output / "split")
    ended = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{source.n_images} images: read {between - started:.1f} s, split {ended - between:.1f} s, "
        f"peak {peak / 1024:.0f} MiB above the libraries' {before / 1024:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("FOLDER", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.size)
        return
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "images", Path(place) / "output"
        folder.mkdir()
        make_folder(folder, arguments.images, arguments.size)
        command = [sys.executable, __file__, "--size", str(arguments.size), "--measure", str(folder), str(output)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
