"""How near is too near: a threshold from held-out real images, and how often it would be wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# A class with so many held-out images has a threshold of its own; smaller ones share that of all of them.
LEAST_OWN = 200
# With fewer, a share of false alarms says nothing.
LEAST_MEASURED = 20
# A held-out image this much nearer to a training image than held-out images commonly are is that image once more.
SAME_PICTURE = 1 / 3


class Calibration(NamedTuple):
    threshold: float
    n: int  # held-out images it rests on
    alarms: np.ndarray  # [n] bool: called a copy, by the threshold that the images of all other groups give


def same_picture(distances: np.ndarray) -> np.ndarray:
    """[n] bool: held-out images that repeat a training image, and so cannot say how near an honest new one is."""
    if len(distances) == 0:
        return np.zeros(0, dtype=bool)
    near: np.ndarray = distances < SAME_PICTURE * np.median(distances)
    return near


def calibrate(distances: np.ndarray, groups: np.ndarray, rate: float) -> Calibration:
    """A threshold under which an honest new image falls at the given rate at most, as far as held-out images can say.

    The k-th smallest of n distances, k = rate · (n + 1): a new image that is like them falls below it with
    probability k / (n + 1) (split conformal prediction; Vovk, Gammerman & Shafer 2005). With fewer than 1 / rate
    of them it is the smallest, and the probability 1 / (n + 1). The alarms are counted group by group, with the
    threshold that the other groups give, so that no image both sets and measures it.

    Args:
        distances: [n], n at least 1, of held-out real images to the nearest training image.
        groups: [n], what they have in common (patient), so that it is held out together.
        rate: 0..1.
    """
    threshold = float(np.partition(distances, _place(len(distances), rate) - 1)[_place(len(distances), rate) - 1])
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]])
    sorted_distances = np.sort(distances)
    alarms = np.zeros(len(distances), dtype=bool)
    for members in np.split(order, starts[1:]):
        others = len(distances) - len(members)
        # Without the group the threshold is no larger than with the group at its far end.
        highest = min(_place(others, rate) + len(members), len(distances)) - 1 if others else 0
        if others == 0 or distances[members].min() > sorted_distances[highest]:
            continue
        rest = np.delete(distances, members)
        own = np.partition(rest, _place(others, rate) - 1)[_place(others, rate) - 1]
        alarms[members] = distances[members] < own
    return Calibration(threshold, len(distances), alarms)


def _place(n: int, rate: float) -> int:
    """Rank of the threshold among n distances, 1 to n."""
    return min(n, max(1, int(rate * (n + 1))))


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share (Clopper & Pearson 1934); (0, 1) for n = 0."""
    from scipy.stats import beta

    if n == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high
