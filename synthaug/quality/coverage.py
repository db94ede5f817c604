"""Coverage of real images by samples, and what it would be if both came from one distribution (Naeem et al. 2020)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Simulated with equal distributions: below these counts chance alone puts more than 1 or 2 classes in 100 under a
# relative coverage of 0.3.
LEAST_REAL = 5
LEAST_SAMPLES = 20
MOST_NEIGHBOURS = 5


class Coverage(NamedTuple):
    """`value` and `expected` are in [0, 1], higher is better; k is the neighbour whose distance is the radius."""

    value: float
    expected: float
    k: int

    @property
    def relative(self) -> float:
        """1 where the samples cover the real images as another draw of real ones would."""
        return self.value / self.expected


def neighbours_for(n_real: int) -> int:
    """k = 5 as in the paper from 100 real images on, fewer for small classes.

    With k near n_real every ball holds most of the class, and one repeated image covers it. Measured on digits,
    20 real images a class, 80 copies of one unseen image under small changes: relative coverage 0.5 at k = 5, 0.14
    at k = 1, while 80 different unseen real images reach 1.0 at either.
    """
    return int(np.clip(n_real // 20, 1, MOST_NEIGHBOURS))


def expected_coverage(n_real: int, n_samples: int, k: int) -> float:
    """Expectation of coverage when real images and samples are drawn from one distribution.

    Among the other n_real - 1 real images and the n_samples samples around a real image, all orders of distance
    are equally likely; it is left uncovered when the k nearest are all real (Naeem et al. 2020, Lemma 2):

        1 - (N - 1)···(N - k) / ((M + N - 1)···(M + N - k))

    Args:
        n_real: N, more than k.
        n_samples: M, at least 0.
        k: The neighbour whose distance is the radius, at least 1.
    """
    if not 1 <= k < n_real:
        raise ValueError(f"k must be in 1..{n_real - 1} for {n_real} real images, not {k}.")
    step = np.arange(1, k + 1)
    return float(1 - np.prod((n_real - step) / (n_samples + n_real - step)))


def coverage(real: np.ndarray, samples: np.ndarray, k: int | None = None) -> Coverage | None:
    """Share of real images with a sample nearer than their k-th nearest real neighbour (Naeem et al. 2020, eq. 4).

    Args:
        real: Features of real images [n, d].
        samples: Features of samples [m, d].
        k: 1..n-1; `neighbours_for(n)` where not given.

    Returns:
        None with fewer than 5 real images or 20 samples: at such counts the figure is mostly chance.
    """
    from synthaug.quality.arithmetic import nearest

    if len(real) < LEAST_REAL or len(samples) < LEAST_SAMPLES:
        return None
    k = neighbours_for(len(real)) if k is None else k
    # Centred, since float32 loses the differences of features that lie far from the origin.
    centre = real.mean(0, dtype=np.float64).astype(np.float32)
    real, samples = real - centre, samples - centre
    radius = nearest(real, real, k, exclude_self=True)[0][:, -1]
    distance = nearest(real, samples, 1)[0][:, 0]
    return Coverage(float((distance < radius).mean()), expected_coverage(len(real), len(samples), k), k)
