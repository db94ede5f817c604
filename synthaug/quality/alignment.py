"""How much of a picture another one does not explain, once it has been laid over it as well as it goes.

A copy hides behind a shift, a small turn or crop, another brightness, blur or noise. So a picture is compared with
another one that is moved (six numbers of an affine map), and whose tones and sharpness are changed (gain, offset, a
bend of the tones, a Laplacian), all fitted by Gauss–Newton steps: the Lucas–Kanade method with appearance variation
(Baker & Matthews, "Lucas–Kanade 20 years on", IJCV 56, 2004; part 3 for the linear appearance). What remains is
the distance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from synthaug.quality.arithmetic import chunks
from synthaug.records import PixelSpec

# Pictures are compared at 32 pixels a side at most. Finer detail costs time and tells little: noise and JPEG sit there.
_SIDE = 32
# Contrast (standard deviation, of the value range) under which a picture is as good as flat.
_FLAT = 0.02
_STEPS = 3
# The worst of 3×3 blocks is left out of the fit: a marker, a black corner or a changed spot must not hide a copy ...
_BLOCKS = 3
# ... but only where the rest still holds most of the picture.
_LEAST_REST = 0.5
# White noise that a query has more of than its reference is taken off the remainder, up to this standard deviation.
_MOST_NOISE = 0.03
# Share of its own square by which a coefficient is held back, so that a column without content takes no part.
_RIDGE = 1e-3
_MOST_WARP = 0.2
_PAIRS = 96
_RANGE_IMAGES = 500


class Canvas(NamedTuple):
    """The square pictures are compared on."""

    side: int
    margin: int  # largest shift that is looked for, in canvas pixels; so wide a border is not compared
    sigma: float  # of the blur before comparison, in canvas pixels
    pixel: int  # image pixels of a canvas pixel

    @property
    def window(self) -> int:
        return self.side - 2 * self.margin

    @property
    def detailed(self) -> bool:
        """Is there enough in the window to fit sharpness and to leave a block out?"""
        return self.window >= 12


def canvas_for(size: int) -> Canvas:
    """The canvas for images of `size` pixels: shifts of 1 pixel at 8, 2 at 28, 4 at 64 are found."""
    pixel = math.ceil(size / _SIDE)
    side = size // pixel
    return Canvas(side, max(1, round(side / 14)), max(0.5, side / 28), pixel)


def shrink(images: np.ndarray, low: float, high: float) -> np.ndarray:
    """Bring images [n, size, size, channels] in low..high to grey canvases [n, side, side] uint16.

    Channels are averaged, so that a change of colours hides nothing. Values that are not finite count as `low`.
    """
    side = canvas_for(images.shape[1]).side
    result = np.empty((len(images), side, side), dtype=np.uint16)
    for piece in chunks(len(images), images.shape[1:]):
        scaled = (images[piece].astype(np.float32) - np.float32(low)) / np.float32(high - low)
        values = np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0, 1).mean(3)
        small = functional.adaptive_avg_pool2d(torch.from_numpy(values), side)
        result[piece] = np.rint(small.numpy() * 65535).astype(np.uint16)
    return result


def used_values(images: np.ndarray, rows: np.ndarray, spec: PixelSpec, seed: int) -> tuple[float, float]:
    """The values that images make use of, a little wider: low and high for `shrink`.

    Twelve bits in a file of sixteen, or one hot pixel, leave most of the range empty, and contrasts are shares of it.
    """
    chosen = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:_RANGE_IMAGES])]
    ends = np.array([np.nanquantile(np.asarray(images[row], np.float64), (0.005, 0.995)) for row in chosen])
    low, high = np.nanquantile(ends[:, 0], 0.05), np.nanquantile(ends[:, 1], 0.95)
    room = 0.1 * (high - low)
    if not high > low:
        return spec.low, spec.high
    return float(max(spec.low, low - room)), float(min(spec.high, high + room))


def to_floats(pictures: np.ndarray) -> torch.Tensor:
    """Canvases as float32 in 0..1."""
    return torch.from_numpy(pictures.astype(np.float32) / np.float32(65535))


def blur(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of [..., width, width], borders repeated."""
    matrix = _blur_matrix(pictures.shape[-1], sigma)
    blurred: torch.Tensor = matrix @ (pictures @ matrix.T)
    return blurred


def _kernel(sigma: float) -> torch.Tensor:
    reach = math.ceil(2.5 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float32) ** 2) / (2 * sigma**2))
    return kernel / kernel.sum()


@cache
def _blur_matrix(width: int, sigma: float) -> torch.Tensor:
    kernel = _kernel(sigma)
    reach = len(kernel) // 2
    matrix, places = torch.zeros(width, width), torch.arange(width)
    for step, weight in zip(range(-reach, reach + 1), kernel, strict=True):
        matrix[places, (places + step).clamp(0, width - 1)] += weight
    return matrix


def best_shift(queries: torch.Tensor, references: torch.Tensor, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
    """Try all whole shifts up to the margin.

    Args:
        queries, references: [pairs, side, side].

    Returns:
        The largest correlation of the query's window with a window of the reference [pairs], and that window's shift
        (down, right) [pairs, 2].
    """
    margin, width = canvas.margin, canvas.window
    pixels = width * width
    query = queries[:, margin : margin + width, margin : margin + width].reshape(-1, 1, pixels)
    query = query - query.mean(2, keepdim=True)
    windows = references.unfold(1, width, 1).unfold(2, width, 1).reshape(len(references), -1, pixels)
    products = (windows @ query.transpose(1, 2))[:, :, 0]
    mean = functional.avg_pool2d(references[:, None], width, 1)
    square = functional.avg_pool2d(references[:, None] ** 2, width, 1)
    spread = (square - mean**2).clamp_min(_FLAT**2).flatten(1).mul(pixels).sqrt()
    correlation, place = (products / spread).max(1)
    count = 2 * margin + 1
    shift = torch.stack([place // count - margin, place % count - margin], 1).float()
    return correlation / query[:, 0].norm(dim=1).clamp_min(_FLAT * math.sqrt(pixels)), shift


def unexplained(queries: torch.Tensor, references: torch.Tensor, shift: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Distance of each query to its reference, which is laid over it.

    Args:
        queries, references: [pairs, side, side] in 0..1.
        shift: [pairs, 2], where the search for the best map begins.

    Returns:
        [pairs] in 0..1: the root of the share of the query's variance that is left. 0: a copy. 1: nothing in common,
        or a query that is as good as flat.
    """
    fits = [_unexplained(queries[piece], references[piece], shift[piece], canvas) for piece in _pieces(len(queries))]
    return torch.cat(fits) if fits else torch.empty(0)


def _pieces(total: int) -> Iterator[slice]:
    # As many as stay in a processor's cache.
    for start in range(0, total, _PAIRS):
        yield slice(start, start + _PAIRS)


def _unexplained(queries: torch.Tensor, references: torch.Tensor, shift: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    count, margin, width = len(queries), canvas.margin, canvas.window
    pixels = width * width
    blurring = _blur_matrix(width, canvas.sigma)
    window = queries[:, margin : margin + width, margin : margin + width]
    query = (blurring @ (window @ blurring.T)).reshape(count, pixels)
    noise = (_noise_variance(queries) - _noise_variance(references)).clamp(0, _MOST_NOISE**2)
    noise = noise * float((_kernel(canvas.sigma) ** 2).sum()) ** 2
    layers = _layers(references, detailed=canvas.detailed)
    along = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    down, right = (places.flatten() for places in torch.meshgrid(along, along, indexing="ij"))
    member = _blocks(width)
    eye = torch.eye(2)
    warp, move = eye.repeat(count, 1, 1), shift.clone()
    weight = torch.ones(count, pixels)
    best = torch.ones(count)
    for step in range(_STEPS + 1):
        at = torch.stack(
            [
                warp[:, 1, 0, None] * down + warp[:, 1, 1, None] * right + move[:, 1, None],
                warp[:, 0, 0, None] * down + warp[:, 0, 1, None] * right + move[:, 0, None],
            ],
            2,
        )
        at = at[:, None] / ((canvas.side - 1) / 2)
        laid = functional.grid_sample(layers, at, mode="bilinear", padding_mode="border", align_corners=True)
        # Blurred after it was moved, so that what a shift brought in at the border does not spread.
        laid = (blurring @ (laid.view(-1, width, width) @ blurring.T)).view(count, -1, pixels)
        value, slope_down, slope_right = laid[:, 0], laid[:, 1], laid[:, 2]
        columns = [value, value**2, *([laid[:, 3]] if canvas.detailed else [])]
        looks = len(columns)
        if step < _STEPS:
            columns += [slope_down, slope_right]
            columns += [slope_down * down, slope_down * right, slope_right * down, slope_right * right]
        design = torch.stack(columns, 1)
        total = weight.sum(1)
        design = design - (design @ weight[:, :, None]) / total[:, None, None]
        target = query - ((query * weight).sum(1) / total)[:, None]
        weighted = design * weight[:, None]
        normal, product = weighted @ design.transpose(1, 2), weighted @ target[:, :, None]
        appearance = _solve(normal, product, looks, pixels)
        residual = (target - (appearance.transpose(1, 2) @ design[:, :looks])[:, 0]) ** 2
        left = _share_left(residual, target, weight, noise)
        if canvas.detailed:
            kept = torch.ones(count, _BLOCKS**2).scatter_(1, (residual @ member).topk(1).indices, 0) @ member.T
            enough = (target**2 * kept).sum(1) > _LEAST_REST * (target**2).sum(1)
            # The first fit is too crude to say which block is the odd one.
            if step:
                left = torch.where(enough, left.minimum(_share_left(residual, target, kept, noise)), left)
            weight = torch.where(enough[:, None], kept, torch.ones(()))
        # A negative is another picture.
        best = best.minimum(torch.where(appearance[:, 0, 0] > 0, left, torch.ones(())))
        if step < _STEPS:
            all_of_it = _solve(normal, product, len(columns), pixels)[:, :, 0]
            gain = all_of_it[:, 0].abs().clamp_min(1e-3) * torch.where(all_of_it[:, 0] < 0, -1.0, 1.0)
            change = all_of_it[:, looks:] / gain[:, None]
            move = (move + change[:, :2].clamp(-1, 1)).clamp(-margin - 1, margin + 1)
            warp = eye + (warp + change[:, 2:].clamp(-0.1, 0.1).view(-1, 2, 2) - eye).clamp(-_MOST_WARP, _MOST_WARP)
    return best.clamp_min(0).sqrt()


def _layers(references: torch.Tensor, *, detailed: bool) -> torch.Tensor:
    """[pairs, 3 or 4, side, side]: the picture, its slopes down and right, and its Laplacian."""
    wide = functional.pad(references[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    above, below, before, behind = wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]
    layers = [references, (below - above) / 2, (behind - before) / 2]
    if detailed:
        layers.append(above + below + before + behind - 4 * references)
    return torch.stack(layers, 1)


def _blocks(width: int) -> torch.Tensor:
    """[width², 9]: 1 where a pixel lies in a block."""
    edges = torch.linspace(0, width, _BLOCKS + 1).round().long()[1:-1]
    owner = torch.bucketize(torch.arange(width), edges, right=True)
    return functional.one_hot((owner[:, None] * _BLOCKS + owner).flatten(), _BLOCKS**2).float()


def _solve(normal: torch.Tensor, product: torch.Tensor, columns: int, pixels: int) -> torch.Tensor:
    square = normal[:, :columns, :columns]
    ridge = _RIDGE * (square.diagonal(dim1=1, dim2=2) + _FLAT**2 * pixels)
    solution: torch.Tensor = torch.linalg.solve(square + torch.diag_embed(ridge), product[:, :columns])
    return solution


def _share_left(
    residual: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    energy, pixels = (target**2 * weight).sum(1), weight.sum(1)
    least = energy.clamp_min(_FLAT**2 * residual.shape[1])
    # What a flat query lacks of a picture counts as not explained.
    return (((residual * weight).sum(1) - noise * pixels).clamp_min(0) + least - energy) / least


def _noise_variance(pictures: torch.Tensor) -> torch.Tensor:
    """[pairs]: variance of white noise (Immerkær, "Fast noise variance estimation", CVIU 64, 1996)."""
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    rough = functional.conv2d(pictures[:, None], mask[None, None]).abs().mean((1, 2, 3))
    return (rough * (math.sqrt(math.pi / 2) / 6)) ** 2
