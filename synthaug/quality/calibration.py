"""How near is too near: a threshold from held-out real images, and how often it would be wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# A class with so many held-out groups has a threshold of its own; smaller ones share that of all of them.
LEAST_OWN = 200
# With fewer, a share of false alarms says nothing.
LEAST_MEASURED = 20
_DRAWS = 101
# One picture is another once more where it is this near, and so much nearer than to others it resembles. Both are
# needed: images of a class may all be near to each other, and of two far ones one is the nearer. Among 116 held-out
# images of BUSI, 20 had a contrast of 0.06 or less, the next 0.26; of 516 radiographs and 597 digits none is meant.
_SAME, _SAME_CONTRAST = 0.08, 0.1


class Calibration(NamedTuple):
    threshold: float
    n_groups: int
    alarms: np.ndarray  # [n] bool: called a copy, by the threshold that the images of all other groups give
    measured: bool  # is there more than one group?


def same_picture(distance: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """[n] bool: the nearest image is this one once more, moved or changed a little (see `copies.Matches`)."""
    same: np.ndarray = (distance < _SAME) & (contrast < _SAME_CONTRAST)
    return same


def calibrate(distances: np.ndarray, groups: np.ndarray, rate: float) -> Calibration:
    """A threshold under which an honest new image falls at the given rate at most, as far as held-out images can say.

    The k-th smallest of the distances of n groups, k = rate · (n + 1): a new image of a new group falls below it with
    probability k / (n + 1) (split conformal prediction; Vovk, Gammerman & Shafer 2005). Images of a group (patient) are
    not independent, so each group gives one, drawn anew 101 times; the threshold is the median (Dunn, Wasserman &
    Ramdas 2023, "Distribution-free prediction sets for two-layer hierarchical models"). With fewer than 1 / rate groups
    it is the smallest, and the probability 1 / (n + 1). The alarms are counted group by group, with the threshold that
    the other groups give, so that no image both sets and measures it.

    Args:
        distances: [n], n at least 1, of held-out real images to the nearest training image.
        groups: [n], what they have in common (patient), so that it is held out together.
        rate: 0..1.
    """
    _, group = np.unique(groups, return_inverse=True)
    n_groups = int(group.max()) + 1
    draws = _draws(distances, group, n_groups)
    order = np.sort(draws, 1)
    threshold = float(np.median(order[:, place(n_groups, rate) - 1]))
    if n_groups == 1:
        return Calibration(threshold, 1, np.zeros(len(distances), dtype=bool), measured=False)
    # The k-th smallest of the others is the k-th of all, or the next where the group's own is among the first k.
    k = place(n_groups - 1, rate)
    others = np.median(np.where(draws <= order[:, [k - 1]], order[:, [k]], order[:, [k - 1]]), axis=0)
    return Calibration(threshold, n_groups, distances < others[group], measured=True)


def _draws(distances: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """[draws, groups]: a distance of each group; a single draw where no group has more than one."""
    by_group = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=n_groups)
    starts = np.cumsum(sizes) - sizes
    number = 1 if sizes.max() == 1 else _DRAWS
    chosen = np.random.default_rng(0).integers(0, sizes, (number, n_groups))
    drawn: np.ndarray = distances[by_group[starts + chosen]]
    return drawn


def place(n: int, rate: float) -> int:
    """Rank of the threshold among n distances, 1 to n."""
    return min(n, max(1, int(rate * (n + 1))))


def clopper_pearson(hits: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share (Clopper & Pearson 1934); (0, 1) for n = 0."""
    from scipy.stats import beta

    if n == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high
