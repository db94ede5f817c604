"""Which images an epoch holds, how often each is drawn, and in which order. Arithmetic only; no picture is touched.

The *pool* of a mix is every image it could ever hold, numbered once: real images 0..n_real-1 in their own order, then
the synthetic ones by class and rank. An epoch is a list of *draws* from it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from synthaug.errors import LoaderError
from synthaug.text import printable

Sampling = Literal["natural", "balanced"]
Schedule = Callable[[int], float]

# A schedule is asked for this many epochs when it is given, so that a fault shows then and not while training.
_PROBED_EPOCHS = 1000


class Draw(NamedTuple):
    """One image of one epoch: a key for `dataset[key]` that says all that its augmentation follows from."""

    number: int  # in the pool
    epoch: int
    repeat: int  # 0 for its first draw in the epoch, 1 for its second …


@dataclass(frozen=True)
class constant:
    """The same ratio in every epoch."""

    factor: float = 1.0

    def __call__(self, epoch: int) -> float:
        return self.factor


@dataclass(frozen=True)
class decay_to_real:
    """The ratio falls linearly, by 1/epochs of itself an epoch; from epoch number `epochs` on: real images only."""

    epochs: int

    def __call__(self, epoch: int) -> float:
        return max(0.0, 1.0 - epoch / self.epochs)


@dataclass(frozen=True)
class mix_then_real:
    """Pre-training on the mix in epochs 0..epochs-1, then real images only."""

    epochs: int

    def __call__(self, epoch: int) -> float:
        return 1.0 if epoch < self.epochs else 0.0


def check_schedule(schedule: Schedule | None) -> Schedule:
    """Ask a schedule for its first 1000 epochs.

    Raises:
        LoaderError: It is not callable, fails, or gives a negative number or NaN.
    """
    if schedule is None:
        return constant()
    if isinstance(schedule, decay_to_real | mix_then_real) and schedule.epochs < 1:
        raise LoaderError(f"{schedule!r}: a schedule lasts at least one epoch.")
    if not callable(schedule):
        raise LoaderError(f"schedule {schedule!r:.100} is not callable. Take decay_to_real(10), say.")
    for epoch in range(_PROBED_EPOCHS):
        try:
            factor = float(schedule(epoch))
        except Exception as error:
            raise LoaderError(
                f"the schedule failed for epoch {epoch}: {type(error).__name__}: {str(error)[:200]}. It takes the "
                "number of an epoch and returns the factor of the ratio."
            ) from error
        if not (math.isfinite(factor) and factor >= 0):
            raise LoaderError(f"the schedule gives {factor} for epoch {epoch}; a factor is a number of at least 0.")
    return schedule


def check_ratio(ratio: float | Mapping[str, float], classes: Sequence[str]) -> np.ndarray:
    """Ratios by label, float64 `[n_classes]`; classes that a mapping does not name get 0.

    Raises:
        LoaderError: A ratio is negative, NaN or no number, or a class is unknown.
    """
    if isinstance(ratio, Mapping):
        ratios = np.zeros(len(classes))
        for name, value in ratio.items():
            if name not in classes:
                raise LoaderError(f"synthetic_ratio names class '{printable(str(name))}'{nearest(str(name), classes)}")
            ratios[list(classes).index(name)] = number(value, f"the ratio of class '{printable(str(name))}'")
        return ratios
    return np.full(len(classes), number(ratio, "synthetic_ratio"))


def number(value: Any, what: str) -> float:
    """A number of at least 0, perhaps infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise LoaderError(f"{what} is {value!r:.60}; it must be a number of at least 0.")
    if math.isnan(value) or value < 0:
        raise LoaderError(f"{what} is {value}; it must be a number of at least 0 (0 is the real images alone).")
    return float(value)


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence about a class that is not there."""
    close = difflib.get_close_matches(name, names, n=1)
    shown = ", ".join(printable(item, 30) for item in list(names)[:10]) + (", …" if len(names) > 10 else "")
    return f", which is not there{f'; is {printable(close[0])!r} meant?' if close else '.'} The classes are: {shown}."


@dataclass(frozen=True, eq=False)
class Mix:
    """How real and synthetic images go together.

    In epoch e class c has all of its `n_real` images and, with f = schedule(e), the first

        min(n_available, floor(ratio[c] * f * n_real[c] + 1/2))

    of its synthetic ones by rank (where `doses` is given: min(n_available, floor(doses[c] * f + 1/2))). So every
    smaller dose is a prefix of every larger one, a class without synthetic images stays as it is, and a ratio of
    `math.inf` takes all there are.

    Attributes:
        real_labels: int64 [n_real].
        available: Synthetic images by label, int64 [n_classes].
        ratios: By label, float64 [n_classes].
        doses: By label, int64 [n_classes], in place of `ratios`; or None.
        sampling: 'natural': every image of the epoch once. 'balanced': as many draws, every class equally often (by
            one more for some where that does not come out even); of a class, all images once before any twice.
        synthetic_weight: Weight of a synthetic image in the loss; a real one has 1. Under balanced sampling it is in
            the draws instead (a synthetic image is drawn that much less often within its class), as in the trial.
        class_weights: Weights in the loss are multiplied by total / (n_classes * count), by weighted counts.
    """

    classes: tuple[str, ...]
    real_labels: np.ndarray
    available: np.ndarray
    ratios: np.ndarray
    doses: np.ndarray | None = None
    schedule: Schedule = constant()
    sampling: Sampling = "natural"
    synthetic_weight: float = 1.0
    class_weights: bool = False
    seed: int = 0
    n_real: np.ndarray = field(init=False, repr=False)  # int64 [n_classes]
    _first: np.ndarray = field(init=False, repr=False)  # where a class's synthetic images begin in the pool; the end
    _known: dict[int, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n_real = np.bincount(self.real_labels, minlength=len(self.classes)).astype(np.int64)
        object.__setattr__(self, "n_real", n_real)
        object.__setattr__(self, "_first", np.concatenate([[0], np.cumsum(self.available)]) + len(self.real_labels))
        object.__setattr__(self, "_known", {})

    @property
    def n_pool(self) -> int:
        return int(self._first[-1])

    def dose(self, epoch: int) -> np.ndarray:
        """Synthetic images by label in an epoch, int64 [n_classes]."""
        factor = float(self.schedule(epoch))
        if not (math.isfinite(factor) and factor >= 0):
            raise LoaderError(f"the schedule gives {factor} for epoch {epoch}; a factor is a number of at least 0.")
        if factor == 0:
            return np.zeros(len(self.classes), dtype=np.int64)
        wanted = np.floor(np.minimum(self._wanted() * factor + 0.5, 2.0**52)).astype(np.int64)
        return np.minimum(self.available, wanted)

    def _wanted(self) -> np.ndarray:
        """Synthetic images asked for by label before the schedule, float64, perhaps infinite."""
        if self.doses is not None:
            return self.doses.astype(np.float64)
        # Not 0 × inf, which is NaN.
        return np.where(self.n_real > 0, self.ratios, 0) * self.n_real

    def members(self, epoch: int) -> np.ndarray:
        """Indices in the pool of the images of an epoch, int64, in order."""
        parts = [np.arange(len(self.real_labels), dtype=np.int64)]
        for label, count in enumerate(self.dose(epoch)):
            parts.append(self._first[label] + np.arange(count, dtype=np.int64))
        return np.concatenate(parts)

    def label(self, index: int) -> int:
        """Label of an image of the pool."""
        if index < len(self.real_labels):
            return int(self.real_labels[index])
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def weights(self, epoch: int) -> np.ndarray:
        """Weights in the loss, float64 `[2, n_classes]`: of real images, of synthetic ones."""
        if epoch not in self._known:
            self._known.clear()
            base = np.ones((2, len(self.classes)))
            if self.sampling == "natural":
                base[1] = self.synthetic_weight
            if self.class_weights:
                counts = self.n_real + self.synthetic_weight * self.dose(epoch)
                present = counts > 0
                base *= np.where(present, counts.sum() / np.where(present, counts, 1) / present.sum(), 0)
            self._known[epoch] = base
        known: np.ndarray = self._known[epoch]
        return known

    def prior(self, epoch: int) -> np.ndarray:
        """Share of each class in what an epoch draws, weights in the loss included, float64 [n_classes]."""
        counts = self.n_real + self.synthetic_weight * self.dose(epoch)
        if self.sampling == "balanced" or self.class_weights:
            counts = (counts > 0).astype(np.float64)
        share: np.ndarray = counts / counts.sum()
        return share

    def draws(self, epoch: int, *, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The draws of an epoch in order: indices in the pool and copies, int64 [n] each.

        The order is `torch.randperm(n)` of a generator seeded with `seed + epoch`, after the number that a
        `torch.utils.data.DataLoader` takes from its generator for its workers. So with real images alone and natural
        sampling it is that of `DataLoader(real, shuffle=True, generator=torch.Generator().manual_seed(seed + epoch))`.
        """
        chosen, copies = self._balanced(epoch) if self.sampling == "balanced" else (self.members(epoch), None)
        if copies is None:
            copies = np.zeros(len(chosen), dtype=np.int64)
        if shuffle:
            import torch

            generator = torch.Generator().manual_seed(self.seed + epoch)
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            order = torch.randperm(len(chosen), generator=generator).numpy()
            chosen, copies = chosen[order], copies[order]
        return chosen, copies

    def _balanced(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        dose = self.dose(epoch)
        present = np.flatnonzero(self.n_real + dose)
        n = int(self.n_real.sum() + dose.sum())
        random = np.random.default_rng([self.seed, epoch, 0xBA1A])
        quota = dict.fromkeys(present.tolist(), n // len(present))
        for label in random.permutation(present)[: n % len(present)]:
            quota[int(label)] += 1
        by_label = np.argsort(self.real_labels, kind="stable")
        ends = np.cumsum(self.n_real)
        indices, copies = [], []
        for label in present:
            real = by_label[ends[label] - self.n_real[label] : ends[label]]
            made = self._first[label] + np.arange(dose[label], dtype=np.int64)
            wanted = quota[int(label)]
            if self.synthetic_weight == 1:
                groups = [(np.concatenate([real, made]), wanted)]
            else:
                weighted = self.synthetic_weight * len(made)
                share = weighted / (len(real) + weighted) if weighted else 0.0
                from_made = math.floor(wanted * share + 0.5)
                groups = [(real, wanted - from_made), (made, from_made)]
            for group, count in groups:
                if not count:
                    continue
                rounds = -(-count // len(group))
                indices.append(np.concatenate([random.permutation(group) for _ in range(rounds)])[:count])
                copies.append(np.arange(count, dtype=np.int64) // len(group))
        return np.concatenate(indices), np.concatenate(copies)

    def table(self, epoch: int) -> list[dict[str, Any]]:
        """A row for each class: what there is of it in an epoch."""
        dose, weights = self.dose(epoch), self.weights(epoch)
        wanted = self._wanted()
        return [
            {
                "class": name,
                "n_real": int(self.n_real[label]),
                "n_synthetic": int(dose[label]),
                "n_available": int(self.available[label]),
                "short": bool(self.available[label] and wanted[label] > self.available[label]),
                "weight_real": float(weights[0, label]),
                "weight_synthetic": float(weights[1, label]),
            }
            for label, name in enumerate(self.classes)
        ]


def sample_seed(seed: int, draw: Draw) -> bytes:
    """32 bytes that an image's augmentation follows from: BLAKE2b of seed, epoch, number, repeat as 64-bit integers."""
    return hashlib.blake2b(struct.pack("<qqqq", seed, draw.epoch, draw.number, draw.repeat), digest_size=32).digest()
