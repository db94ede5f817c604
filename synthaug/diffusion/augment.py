"""Non-leaky augmentation (Karras et al. 2022, appendix F.2): the network is told what was done to an image,
so that it can be asked for images to which nothing was done."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

# Mirror, ln scale, cosine - 1 and sine of the rotation, shift across and down: all zero when nothing is done.
N_HINTS = 6

_LOG2_SCALE_SPREAD = 0.2
_LARGEST_SHIFT = 0.125


def augment(
    images: Tensor,
    probability: float | Tensor,
    flips: bool,
    generator: torch.Generator,
    *,
    whole: int | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Transform each image with its own draw of mirror, scale, rotation and shift.

    Args:
        images: [n, c, h, w] in [-1, 1].
        probability: Of each kind of transformation, for all images or for each, [n] of the whole batch; 0 leaves an
            image untouched.
        flips: Whether mirroring is among the kinds.
        generator: Where the draws come from (on the processor).
        whole: Images of the batch that `images` are a part of, where they are: each gets its draw of that batch.
        part: Which of them `images` are.

    Returns:
        The images, edges reflected, and the hints [n, N_HINTS] that say what was done.
    """
    n = len(images) if whole is None else whole

    def sometimes(values: Tensor) -> Tensor:
        return torch.where(torch.rand(n, generator=generator) < probability, values, torch.zeros(n))

    mirror = sometimes(torch.ones(n)) if flips else torch.zeros(n)
    log_scale = sometimes(torch.randn(n, generator=generator) * _LOG2_SCALE_SPREAD * math.log(2))
    angle = sometimes((torch.rand(n, generator=generator) * 2 - 1) * math.pi / 8)
    across, down = (sometimes((torch.rand(n, generator=generator) * 2 - 1) * _LARGEST_SHIFT) for _ in range(2))
    hints = torch.stack([mirror, log_scale, angle.cos() - 1, angle.sin(), across, down], 1)[part].to(images.device)

    changed = hints.abs().sum(1) > 0
    if not changed.any():
        return images, hints
    scale, mirrored = log_scale.exp(), 1 - 2 * mirror
    # From places in the result to places in the image, both in [-1, 1]; a shift of 1 is the whole side.
    rows = [
        torch.stack([mirrored * angle.cos() / scale, angle.sin() / scale, 2 * across], 1),
        torch.stack([-mirrored * angle.sin() / scale, angle.cos() / scale, 2 * down], 1),
    ]
    affine = torch.stack(rows, 1)[part].to(images.device)[changed]
    result = images.clone()
    grid = affine_grid(affine, list(images[changed].shape), align_corners=False)
    result[changed] = grid_sample(images[changed], grid, padding_mode="reflection", align_corners=False)
    return result, hints
