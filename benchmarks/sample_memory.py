"""Memory of sampling many images, with a stand-in for the network.

    python benchmarks/sample_memory.py --samples 100000 --size 64

Noise takes the place of the network's images; requests, seeds, files and records are the real ones.
Memory is the peak above the interpreter with its libraries.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401

from synthaug import generators
from synthaug.config import parse_config
from synthaug.records import Checkpoint, PixelSpec, SampleRequest, Source
from synthaug.sample import sample


class Noise:
    """Draws noise; only what the sample stage asks of a generator."""

    solver = "noise"
    shape: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def load(cls, directory: Path, *, device: str) -> Noise:
        return cls()

    def default_steps(self, guidance: float) -> int:
        return 8

    def sample(self, labels: Any, seeds: Any, *, steps: int, guidance: float) -> np.ndarray:
        return np.random.default_rng(int(seeds[0])).integers(0, 256, (len(seeds), *self.shape), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    size = arguments.size
    Noise.shape = (size, size, 1)
    generators.REGISTRY["noise"] = f"{__name__}:Noise"
    values = {"name": "x", "output": "x", "dataset": {"format": "digits"}, "image": {"size": size}}
    config = parse_config({**values, "train": {"generator": "noise", "device": "cpu"}})
    unit = config.sample.micro_batch
    spec = {"channels": 1, "dtype": "uint8", "colour": "grey", "low": 0, "high": 255, "size": size, "fit": "none"}
    pixels = PixelSpec.model_validate(
        {**spec, "interpolation": "none", "smallest": (size, size), "largest": (size, size)}
    )
    with tempfile.TemporaryDirectory() as place:
        made = {"directory": Path(place), "digest": "0" * 64}
        (Path(place) / "pipeline").mkdir()
        source = Source.model_construct(**made, classes=("a", "b"), pixels=pixels)
        checkpoint = Checkpoint.model_construct(**made, generator="noise")
        request = SampleRequest(ranges={1: (0, -(-arguments.samples // unit) * unit)})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        batch = sample(config, source, checkpoint, request, Path(place))
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{batch.n_samples} samples of {size}x{size}: {seconds:.1f} s, peak {peak / 1024:.0f} MiB above the "
        f"libraries' {before / 1024:.0f} MiB (the pages of the file that the kernel keeps count too)"
    )


if __name__ == "__main__":
    main()
