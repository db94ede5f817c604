"""Generators that learn nothing: SMOTE (imbalanced-learn) and mixup of two images of a class, both on pixels."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from contest import _peak, _write, _write_pictures


def main() -> None:
    imported = _peak()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with np.load(job["images"], allow_pickle=False) as found:
        images, labels = found["images"].astype(np.float32), found["labels"]
    random, started = np.random.default_rng(job["seed"]), time.monotonic()
    make = {"smote": smote, "mixup": mixup}[job["method"]]
    made, whose = [], []
    for label, number in ((int(label), int(number)) for label, number in job["counts"].items() if number > 0):
        made.append(make(images[labels == label], number, random))
        whose += [label] * number
    seconds = time.monotonic() - started
    values = np.concatenate(made).transpose(0, 3, 1, 2) / 127.5 - 1
    _write_pictures(values, whose, job["classes"], Path(job["out"]))
    result: dict[str, Any] = {
        "training_seconds": 0.0,
        "sampling_seconds": seconds,
        "n_wanted": len(whose),
        "n_drawn": len(whose),
        "samples_per_second": len(whose) / max(seconds, 1e-9),
        "parameters": 0,
        "peak_bytes": _peak(),
        "peak_bytes_of_imports": imported,
    }
    _write(Path(job["result"]), json.dumps(result))


def smote(own: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Chawla et al. 2002, by imbalanced-learn, with five neighbours."""
    from imblearn.over_sampling import SMOTE

    flat = own.reshape(len(own), -1)
    # It wants two classes and looks for neighbours in one alone.
    both = np.concatenate([flat, np.full_like(flat[:1], -1)])
    sampler = SMOTE(
        sampling_strategy={1: len(own) + number},
        k_neighbors=min(5, len(own) - 1),
        random_state=int(random.integers(2**31)),
    )
    made = sampler.fit_resample(both, np.array([1] * len(own) + [0]))[0][len(both) :]
    return made.reshape(number, *own.shape[1:])


def mixup(own: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Two different images of the class, the share of the first uniform in 0 to 1 (Zhang et al. 2018 with alpha 1)."""
    first = random.integers(len(own), size=number)
    second = (first + random.integers(1, len(own), size=number)) % len(own)
    share = random.random((number, 1, 1, 1)).astype(np.float32)
    return share * own[first] + (1 - share) * own[second]


if __name__ == "__main__":
    main()
