"""Real digits (scikit-learn's) as training data for generators, at a size that trains in seconds."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from synthaug.generators.interface import TrainingData
from synthaug.records import PixelSpec


def digits_spec(**changes: object) -> PixelSpec:
    values: dict[str, object] = {
        "channels": 1,
        "dtype": "uint8",
        "colour": "grey",
        "low": 0.0,
        "high": 255.0,
        "size": 8,
        "fit": "none",
        "interpolation": "none",
        "smallest": (8, 8),
        "largest": (8, 8),
    }
    return PixelSpec.model_validate(values | changes)


def digits_data(n: int = 300, n_classes: int = 3, n_unlisted: int = 20) -> TrainingData:
    """The first `n` digits of the first classes; the last rows are listed nowhere."""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target < n_classes)[:n]
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target[chosen].astype(np.int64)
    listed = np.arange(len(chosen) - n_unlisted)
    heldout = listed % 5 == 0
    return TrainingData(
        images=images,
        pixels=digits_spec(),
        classes=tuple(str(label) for label in range(n_classes)),
        rows=listed[~heldout],
        labels=labels[listed[~heldout]],
        heldout_rows=listed[heldout],
        heldout_labels=labels[listed[heldout]],
        scarce=(1,),
    )
