"""The network: a U-Net of `diffusers` on folded pixels.

A processor spends its time on the number of places a convolution visits. Blocks of fold x fold pixels
become channels (`pixel_unshuffle`), so that the U-Net works on a grid of 8 to 16 places a side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

if TYPE_CHECKING:
    from diffusers import UNet2DModel

LARGEST_GRID = 16

# The sinusoidal embedding of diffusers is made for time steps of 0 to 1000; c_noise = ln(sigma)/4 lies
# within -1.6 and 1.1, where its fast half would hardly move.
NOISE_CONDITION_SCALE = 100.0


def choose_fold(size: int) -> int:
    """Return the smallest block whose grid has at most LARGEST_GRID places a side, an even number if there is one."""
    divisors = [fold for fold in range(1, size + 1) if size % fold == 0 and size // fold <= LARGEST_GRID]
    even = [fold for fold in divisors if (size // fold) % 2 == 0 and size // fold >= 4]
    return (even or divisors)[0]


def choose_width(size: int) -> int:
    """Return the channels of the first level; docs/log.md has the measurements."""
    return 32 if size <= 32 else 48


def build_unet(
    *, size: int, channels: int, n_classes: int, n_hints: int, fold: int, width: int, dropout: float, layers: int = 1
) -> UNet2DModel:
    """Return a class-conditional U-Net for images of [channels, size, size].

    Label `n_classes` is the class left out, for classifier-free guidance. The first `n_hints` input channels
    are constant planes that tell which augmentation was applied. A level has `layers` residual blocks on its way down,
    and one more on its way up.
    """
    from diffusers import UNet2DModel

    grid = size // fold
    folded = channels * fold * fold
    levels = 2 if grid % 2 == 0 and grid >= 4 else 1
    plain_down, plain_up = ["DownBlock2D"] * (levels - 1), ["UpBlock2D"] * (levels - 1)
    unet = UNet2DModel(
        sample_size=grid,
        in_channels=folded + n_hints,
        out_channels=folded,
        down_block_types=(*plain_down, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *plain_up),
        block_out_channels=tuple(width * (1 + level) for level in range(levels)),
        layers_per_block=layers,
        norm_num_groups=16,
        # Must divide the channels of every level, or diffusers drops heads in silence.
        attention_head_dim=32 if width % 32 == 0 else 16,
        dropout=dropout,
        num_class_embeds=n_classes + 1,
        resnet_time_scale_shift="scale_shift",
    )
    use_fast_dropout(unet)
    return unet


class FastDropout(nn.Dropout):
    """Dropout (Hinton et al. 2012) that draws a byte a value on a processor, where torch's costs a tenth of a step.

    The probability is rounded to a 256th. Elsewhere, and where nothing is dropped, it is torch's own.
    """

    def forward(self, values: Tensor) -> Tensor:
        dropped = min(255, round(256 * self.p))
        if not self.training or not dropped or values.device.type != "cpu":
            return super().forward(values)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-values.numel() // 8),))
        drawn = words.view(torch.uint8)[: values.numel()].view_as(values)
        return torch.where(drawn >= dropped, values * (256 / (256 - dropped)), 0.0)


def use_fast_dropout(network: nn.Module) -> None:
    """Put `FastDropout` in place of every dropout of a network. It has no weights: checkpoints know nothing of it."""
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p))


def predict(unet: UNet2DModel, images: Tensor, c_noise: Tensor, labels: Tensor, hints: Tensor, fold: int) -> Tensor:
    """Run the U-Net on folded images.

    Args:
        images: [n, channels, size, size].
        c_noise: [n], ln(sigma) / 4.
        labels: [n], in 0..n_classes; n_classes means no class.
        hints: [n, n_hints], all zero for an image that was not augmented.

    Returns:
        [n, channels, size, size].
    """
    folded = pixel_unshuffle(images, fold) if fold > 1 else images
    planes = hints[:, :, None, None].expand(-1, -1, *folded.shape[2:])
    out = unet(torch.cat([planes, folded], 1), c_noise * NOISE_CONDITION_SCALE, labels, return_dict=False)[0]
    return pixel_shuffle(out, fold) if fold > 1 else out
