"""Few evaluations: a linear multistep solver whose weights are fitted to the network that it solves for.

A general solver such as DPM-Solver++ moves images by weights that hold for any network. Here the weights of every step
are those that bring this network's images nearest to its own exact solution, by least squares over a few dozen noises,
in the spirit of S4S (Frankel et al. 2025, arXiv 2502.17423), which learns them by gradients. No image of the data is
looked at. docs/log.md has what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from synthaug.diffusion.edm import SIGMA_MAX

# (noisy images [n, c, h, w], noise level, labels [n]) -> estimate of the clean images, of the images' shape.
Denoiser = Callable[[Tensor, float, Tensor], Tensor]

# Numbers of evaluations that a checkpoint is fitted for; any other number is solved by its scheduler.
FITTED_STEPS = (2, 3, 4, 6, 8)
# Noises that weights are fitted to, and others that they have to prove themselves on.
FIT_NOISES, CHECK_NOISES = 16, 8
# The solution that is come near to: the scheduler's at this many evaluations (docs/log.md: its error falls with the
# third power, and is half a grey level of 8 bits at 14).
EXACT_STEPS = 40
# The latest estimates that a step may weigh.
_LATEST = 4
# Above SIGMA_PER_PIXEL times the side of an image the noise hides even its mean brightness, and all images of a class
# have one estimate: what is found there is shared.
_SIGMA_PER_PIXEL = 0.36
# With so few evaluations none can be spared for what little is told there; and what comes after the last one is below
# what few steps can do (docs/log.md has the distances that these levels were chosen by).
_FEW_PER_PIXEL = {2: 0.16, 3: 0.25}
_LAST = {2: 0.5, 3: 0.15, 4: 0.1, 6: 0.06}
_LAST_OF_MANY = 0.03
_SHARED_NOISES = 8


class Fitted(TypedDict):
    """A solver for one number of evaluations.

    Its first step leads from SIGMA_MAX to the first level, the last one to the image: one step more than levels. Each
    has the weight of the images so far, then those of the latest estimates, oldest first.
    """

    levels: list[float]
    weights: list[list[float]]


def levels_for(steps: int, size: int) -> np.ndarray:
    """Noise levels of the evaluations, [steps], descending and even in ln sigma, for images of `size` pixels a side."""
    first = min(0.9 * SIGMA_MAX, _FEW_PER_PIXEL.get(steps, _SIGMA_PER_PIXEL) * size)
    last = _LAST.get(steps, _LAST_OF_MANY)
    return np.geomspace(max(first, 4 * last), last, steps)


def shared_noise(shape: Sequence[int]) -> Tensor:
    """The noises of the estimate that all images of a class share, [k, c, h, w]; the same for ever."""
    drawn = np.random.Generator(np.random.Philox(key=0)).standard_normal((_SHARED_NOISES, *shape), np.float32)
    return torch.from_numpy(drawn)


def shared_estimate(denoise: Denoiser, labels: Tensor, shape: Sequence[int]) -> Tensor:
    """What is known of each image at SIGMA_MAX: the mean estimate of its class, [n, c, h, w]."""
    noise = shared_noise(shape).to(labels.device)
    known, place = labels.unique(return_inverse=True)
    found = [denoise(noise * SIGMA_MAX, SIGMA_MAX, label.expand(len(noise))).mean(0) for label in known]
    return torch.stack(found)[place]


def follow(denoise: Denoiser, noise: Tensor, labels: Tensor, fitted: Fitted) -> Tensor:
    """Return images [n, c, h, w] of unit normal noise [n, c, h, w]: as many evaluations of each as there are levels."""
    images = noise * SIGMA_MAX
    found = [shared_estimate(denoise, labels, noise.shape[1:])]
    for weights, level in zip(fitted["weights"], [*fitted["levels"], None], strict=True):
        images = _move(images, found, weights)
        if level is not None:
            found.append(denoise(images, level, labels))
    return images


def fit(denoise: Denoiser, exact: Mapping[float, Tensor], labels: Tensor, steps: int, size: int) -> Fitted:
    """Fit the weights of `steps` evaluations, step by step, each to where the exact solution is by then.

    Args:
        exact: The exact solution: noise level to images [n, c, h, w], from SIGMA_MAX, where they are unit normal noise
            times SIGMA_MAX, down to 0, the images themselves. The nearest of its levels are taken.
        labels: Of the images, [n].
        size: Pixels of a side.
    """
    known = np.array([level for level in exact if 0 < level < SIGMA_MAX * 0.99])
    levels = [float(known[np.abs(np.log(known / level)).argmin()]) for level in levels_for(steps, size)]
    images = exact[max(exact)]
    found = [shared_estimate(denoise, labels, images.shape[1:])]
    weights: list[list[float]] = []
    for level in [*levels, 0.0]:
        columns = [_flat(item) for item in (images, *found[-_LATEST:])]
        weights.append(_least_squares(columns, _flat(exact[level])))
        images = _move(images, found, weights[-1])
        if level:
            found.append(denoise(images, level, labels))
    return Fitted(levels=levels, weights=weights)


def _move(images: Tensor, found: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    moved = weights[0] * images
    for weight, estimate in zip(weights[1:], found[-(len(weights) - 1) :], strict=True):
        moved = moved + weight * estimate
    return moved


def _flat(images: Tensor) -> np.ndarray:
    return images.flatten().double().cpu().numpy()


def _least_squares(columns: Sequence[np.ndarray], target: np.ndarray) -> list[float]:
    """Weights of the columns that come nearest to the target, by Gram-Schmidt (modified, twice).

    LAPACK's last bits change with where in memory a matrix lies, and a checkpoint has to be the same again.
    """
    basis: list[np.ndarray] = []
    triangle = np.zeros((len(columns), len(columns)))
    for place, column in enumerate(columns):
        left = column.copy()
        for _ in range(2):
            for row, direction in enumerate(basis):
                share = _dot(direction, left)
                triangle[row, place] += share
                left -= share * direction
        triangle[place, place] = max(_dot(left, left) ** 0.5, 1e-12)
        basis.append(left / triangle[place, place])
    weights = [0.0] * len(columns)
    for place in reversed(range(len(columns))):
        known = sum(triangle[place, later] * weights[later] for later in range(place + 1, len(columns)))
        weights[place] = float((_dot(basis[place], target) - known) / triangle[place, place])
    return weights


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.add.reduce(a * b))
