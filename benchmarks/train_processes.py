"""Images a second of training: one process with two threads against two processes with one, in turns.

    python benchmarks/train_processes.py --rounds 3 --images 960

Digits of scikit-learn at 28×28, the network that such images get (width 48, fold 2), batches of 32. The time is that
of `fit`, without the start of the processes, which is told beside it. The first line is the machine's load: figures of
a busy one compare within a round only, so ratios are of rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from synthaug.config import TrainConfig
from synthaug.generators.edm import EDMGenerator
from synthaug.generators.interface import TrainingData
from synthaug.generators.processes import fit_in_processes
from tests.generator_data import digits_data

WAYS = {"1 process × 2 threads": (1, 2), "2 processes × 1 thread": (2, 1), "1 process × 1 thread": (1, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=960)
    arguments = parser.parse_args()
    print("load", *(f"{value:.1f}" for value in os.getloadavg()), flush=True)
    data = enlarged(28)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    starts = []
    for number in range(arguments.rounds):
        for name, (processes, threads) in WAYS.items():
            rate, start = one_fit(data, arguments.images, processes, threads)
            rates[name].append(rate)
            starts += [start] if processes > 1 else []
        print(number + 1, *(f"{name}: {values[-1]:.1f}/s" for name, values in rates.items()), sep="  ", flush=True)
    first, *others = WAYS
    for name in others:
        ratios = [value / base for value, base in zip(rates[name], rates[first], strict=True)]
        spread = ", ".join(f"{value:.2f}" for value in ratios)
        print(f"{name} / {first}: median {statistics.median(ratios):.2f} ({spread})")
    print(f"starting and ending two processes: median {statistics.median(starts):.1f} s; load {os.getloadavg()[0]:.1f}")


def enlarged(size: int) -> TrainingData:
    data = digits_data(n=1000, n_classes=10)
    images = np.repeat(np.repeat(data.images, 4, 1), 4, 2)[:, 2 : 2 + size, 2 : 2 + size]
    pixels = data.pixels.model_copy(update={"size": size})
    return replace(data, images=np.ascontiguousarray(images), pixels=pixels)


def one_fit(data: TrainingData, images: int, processes: int, threads: int) -> tuple[float, float]:
    """Images a second, and seconds that were not training."""
    settings = TrainConfig(images=images, device="cpu", threads=threads, processes=processes)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        if processes > 1:
            _, report = fit_in_processes(EDMGenerator, data, settings, seed=0, workdir=Path(folder))
        else:
            _, report = EDMGenerator.fit(data, settings, seed=0, workdir=Path(folder))
        return report.images_per_second, time.monotonic() - begun - report.seconds


if __name__ == "__main__":
    main()
