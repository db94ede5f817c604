"""What a training step spends beside the network's own arithmetic, and what other optimisers would spend.

    python -m benchmarks.step --size 28 --batch 32 --threads 2

Parts are timed in turns, so that a machine that slows down slows all of them; a row is the median over the rounds and
its share of a whole step. `read` is what a cache of the images as floating-point numbers would save, `fold` what one of
folded images would save too where nothing is augmented.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn.functional import pixel_unshuffle

from synthaug.config import TrainConfig
from synthaug.diffusion.augment import N_HINTS, augment
from synthaug.diffusion.muon import muon
from synthaug.diffusion.network import build_unet, choose_fold, choose_width
from synthaug.diffusion.training import Phase, Trainer, load_unit
from synthaug.generators.interface import TrainingData
from synthaug.records import PixelSpec


def made_up(size: int, n: int = 2048) -> TrainingData:
    """Pictures of noise, two classes: content changes no time."""
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 1)).astype(np.uint8)
    spec = PixelSpec(
        channels=1, dtype="uint8", colour="grey", low=0, high=255, size=size, fit="none", interpolation="none",
        smallest=(size, size), largest=(size, size),
    )  # fmt: skip
    rows, labels = np.arange(n), np.arange(n) % 2
    nothing = np.array([], dtype=np.int64)
    return TrainingData(images, spec, ("a", "b"), rows, labels, nothing, nothing, (0,))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=28, help="Pixels a side (28).")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="Milliseconds as JSON in place of the table.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = timed(parts(options.size, options.batch), options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    whole = found["a whole step"]
    print(
        f"{options.size} px, batches of {options.batch}, {options.threads} threads, {options.rounds} rounds in turns\n"
    )
    print("| part | ms | share of a step |\n|---|---:|---:|")
    for name, milliseconds in found.items():
        print(f"| {name} | {milliseconds:.2f} | {milliseconds / whole:.1%} |")


def parts(size: int, batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. Optimisers move copies of one network by the same gradients."""
    data, fold, recipe = made_up(size), choose_fold(size), TrainConfig()
    shape = {"size": size, "channels": 1, "n_classes": 2, "n_hints": N_HINTS, "fold": fold}

    def network() -> Any:
        torch.manual_seed(0)
        unet = build_unet(**shape, width=choose_width(size), layers=recipe.layers, dropout=recipe.dropout)
        for parameter in unet.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        return unet

    def trainer(probability: float) -> Callable[[], Any]:
        settings = TrainConfig(batch_size=batch, augment={"probability": probability})
        accelerator, workdir = Accelerator(cpu=True), Path(tempfile.gettempdir())
        found = Trainer(
            network(), data, settings, seed=0, fold=fold, sigma_data=0.5, accelerator=accelerator, workdir=workdir
        )
        optimizer, ema = muon(found.unet, 1e-4), EMAModel(found.unet.parameters(), foreach=True)
        return lambda: found._step(found.unet, optimizer, ema, Phase("measured", 0, 1e-4, 0.5), 0)

    rows = np.arange(batch)
    images, probability = load_unit(data, rows), torch.full((batch,), recipe.augment.probability)
    learners = {name: network() for name in ("muon", "fused", "foreach", "loop")}
    optimizers = {
        "Muon, its rest by fused Adam (the recipe)": muon(learners["muon"], 1e-4),
        "Adam for all, fused": torch.optim.Adam(learners["fused"].parameters(), 1e-4, fused=True),
        "Adam for all, foreach": torch.optim.Adam(learners["foreach"].parameters(), 1e-4, foreach=True),
        "Adam for all, a loop": torch.optim.Adam(learners["loop"].parameters(), 1e-4, foreach=False, fused=False),
    }
    averaged = network()
    average = {
        f"moving average, {'foreach' if foreach else 'a loop'}": EMAModel(averaged.parameters(), foreach=foreach)
        for foreach in (True, False)
    }
    return {
        "a whole step": trainer(recipe.augment.probability),
        "a whole step, nothing augmented": trainer(0.0),
        "read: integers to [-1, 1]": lambda: load_unit(data, rows),
        "augment": lambda: augment(images, probability, False, torch.Generator().manual_seed(0)),
        "fold": lambda: pixel_unshuffle(images, fold),
        "noise": lambda: torch.randn(images.shape, generator=torch.Generator().manual_seed(0)),
        **{name: optimizer.step for name, optimizer in optimizers.items()},
        **{name: lambda one=one: one.step(averaged.parameters()) for name, one in average.items()},
    }


def timed(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, the median of its rounds; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, do in work.items():
            started = time.perf_counter()
            do()
            if number:
                found[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
