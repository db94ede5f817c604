"""Small trials of real digits: what `write_trial` writes, with every use in a file of its own or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from synthaug.trial.data import (
    SCRAMBLED_FILE,
    SMOTE_FILE,
    Part,
    TrialData,
    write_scrambled,
    write_smote,
    write_trial,
)
from synthaug.trial.learners import Fit
from synthaug.trial.recipes import Recipe

N_CLASSES = 4
REAL = {0: 30, 1: 30, 2: 30, 3: 8}
# Real digits that no other use has stand for good synthetic images.
OFFERED = {2: 20, 3: 40}
HELD_OUT = 25
REAL_ONLY = Recipe("real only", "the real images alone", "real")


@dataclass(frozen=True)
class Trial:
    directory: Path
    parts: dict[str, list[Part]]

    @property
    def data(self) -> TrialData:
        return TrialData(self.directory)

    def pixels(self, use: str) -> np.ndarray:
        """Images of a use in order of rank."""
        return np.concatenate([np.load(part.path)[part.rows] for part in self.parts[use]])

    def labels(self, use: str) -> np.ndarray:
        return np.concatenate([part.labels for part in self.parts[use]])


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 8×8 scans of scikit-learn: images [n, 8, 8, 1] uint8 and labels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None], loaded.target.astype(np.int64)


def digits_trial(
    root: Path,
    *,
    real: Mapping[int, int] = REAL,
    offered: Mapping[int, int] = OFFERED,
    n_classes: int = N_CLASSES,
    held_out: int = HELD_OUT,
) -> Trial:
    """Digits 0 to `n_classes` - 1; `real` says how many of each are for training, and test images lie apart.

    Train and validation share a file, synthetic images are in two: what several stages leave.
    """
    directory = root / "trial"
    directory.mkdir(parents=True)
    images, labels = digits()
    waiting = {label: list(np.flatnonzero(labels == label)) for label in range(n_classes)}

    def take(numbers: Mapping[int, int]) -> np.ndarray:
        return np.array([waiting[label].pop() for label, number in numbers.items() for _ in range(number)], np.int64)

    def part(use: str, file: str, rows: np.ndarray, random: np.random.Generator) -> Part:
        """Rows in any order, since nothing may rest on it."""
        np.save(directory / file, images)
        rows = random.permutation(rows) if use != "synthetic" else rows
        return Part(use, directory / file, rows, labels[rows])

    random = np.random.default_rng(0)
    held = dict.fromkeys(range(n_classes), held_out)
    synthetic = take(offered)
    parts = {
        "train": [part("train", "source.npy", take(real), random)],
        "validation": [part("validation", "source.npy", take(held), random)],
        "test": [part("test", "test.npy", take(held), random)],
        "synthetic": [
            part("synthetic", f"samples-{number}.npy", rows, random) for number, rows in enumerate(halves(synthetic))
        ],
    }
    train = parts["train"][0]
    parts["scrambled"] = [write_scrambled(train, offered, directory / SCRAMBLED_FILE, 0, 255, 0)]
    parts["smote"] = [write_smote(train, offered, directory / SMOTE_FILE, 0)]
    write_trial(
        directory,
        [part for found in parts.values() for part in found],
        low=0,
        high=255,
        size=8,
        channels=1,
        n_classes=n_classes,
        scarce=offered,
    )
    return Trial(directory, parts)


def halves(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every second one."""
    return rows[::2], rows[1::2]


def fit_of(recipe: Recipe = REAL_ONLY, **changes: object) -> Fit:
    """A fit of a second."""
    return Fit(**{"recipe": recipe, "seed": 0, "steps": 40, "batch_size": 32, **changes})  # type: ignore[arg-type]


def accuracy(trial: Trial, probabilities: np.ndarray, use: str = "validation") -> float:
    return float((probabilities.argmax(1) == trial.labels(use)).mean())


def recall(trial: Trial, probabilities: np.ndarray, label: int, use: str = "validation") -> float:
    return float((probabilities.argmax(1)[trial.labels(use) == label] == label).mean())
