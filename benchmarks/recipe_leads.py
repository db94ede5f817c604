"""Leads of the literature that the product does not follow, kept so that they can be measured again by
`python -m benchmarks.recipe`: another optimiser, another network, another loss, other ways to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from synthaug.diffusion.network import use_fast_dropout
from synthaug.diffusion.pipeline import ClassConditionalPipeline


def adam(_: Any, unet: nn.Module, rate: float) -> torch.optim.Optimizer:
    """What the training loop used before, at the same rate for all weights."""
    return torch.optim.Adam(unet.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)


class DiT(nn.Module):
    """A small diffusion transformer with adaptive normalisation (Peebles and Xie 2023, section 3.2) on folded pixels,
    called as the U-Net is."""

    def __init__(self, grid: int, inside: int, outside: int, n_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inside, width, 1)
        self.position = nn.Parameter(0.02 * torch.randn(grid * grid, width))
        self.class_embedding = nn.Embedding(n_classes + 1, width)
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last = nn.Linear(width, 2 * width)
        self.conv_out = nn.Conv2d(width, outside, 1)
        for layer in (self.last, self.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def device(self) -> torch.device:
        return self.position.device

    @property
    def dtype(self) -> torch.dtype:
        return self.position.dtype

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        side = x.shape[-1]
        frequencies = torch.exp(torch.linspace(0, -math.log(1e4), 64, device=x.device))
        angles = c_noise.expand(len(x))[:, None] * frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.class_embedding(labels)
        tokens = self.conv_in(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.last(condition)[:, None].chunk(2, 2)
        tokens = self.norm(tokens) * (1 + scale) + shift
        return (self.conv_out(tokens.transpose(1, 2).unflatten(2, (side, side))),)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.adapt = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adapt(nn.functional.silu(condition))[:, None].chunk(6, 2)
        n, length, width = x.shape
        q, k, v = (
            self.qkv(self.norms[0](x) * (1 + scale) + shift)
            .view(n, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + gate * self.out(seen)
        return x + gate2 * self.feed(self.norms[1](x) * (1 + scale2) + shift2)


class ForTheTail(nn.Module):
    """A convolution with more of low rank for images of the scarce class alone: low-rank capacity for the tail, here
    from the first step on."""

    def __init__(self, whole: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.whole = whole
        self.down = nn.Conv2d(whole.in_channels, rank, whole.kernel_size, whole.stride, whole.padding, bias=False)
        self.up = nn.Conv2d(rank, whole.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scarce: Tensor | None = None  # [n], 1 for an image of the tail

    def forward(self, x: Tensor) -> Tensor:
        assert self.scarce is not None, "the network tells it before every call"
        return self.whole(x) + self.scarce.view(-1, 1, 1, 1) * self.up(self.down(x))


def give_the_tail(unet: nn.Module, rank: int, scarce: int) -> nn.Module:
    """Put `ForTheTail` around the convolutions of every residual block of a U-Net."""
    for block in [module for module in unet.modules() if hasattr(module, "conv1") and hasattr(module, "conv2")]:
        block.conv1, block.conv2 = ForTheTail(block.conv1, rank), ForTheTail(block.conv2, rank)

    def tell(module: nn.Module, given: tuple[Any, ...]) -> None:
        for child in module.modules():
            if isinstance(child, ForTheTail):
                child.scarce = (given[2] == scarce).float()

    unet.register_forward_pre_hook(tell)
    return unet


def other_levels(unet: UNet2DModel, levels: int, width: int) -> UNet2DModel:
    """A U-Net as `build_unet` makes it, with another number of levels; attention in the last one."""
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    settings |= {
        "down_block_types": ("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        "block_out_channels": tuple(width * (1 + level) for level in range(levels)),
    }
    other: UNet2DModel = UNet2DModel.from_config(settings)
    use_fast_dropout(other)
    return other


def averaged(plain: Callable[..., float], averages: dict[float, Any]) -> Callable[..., float]:
    """A step of the training loop after which averages of these half-lives, as shares of the phase so far, move too.

    The loop's own average is of power-function form (Karras et al. 2024, arXiv 2312.02696, eq. 1). What can be chosen
    among these at the end is what their reconstruction after training would offer, without its error. diffusers holds
    the decay of step n to (1 + n) / (10 + n): in a short phase the longest ones come out alike.
    """

    def step(trainer: Any, unet: Any, optimizer: Any, ema: Any, phase: Any, number: int) -> float:
        loss = plain(trainer, unet, optimizer, ema, phase, number)
        # The measurement of the rate takes steps on a copy.
        if phase.name == "measurement":
            return loss
        for half_life in averages:
            if number == 0:
                averages[half_life] = EMAModel(unet.parameters(), foreach=True)
            averages[half_life].decay = 0.5 ** (1 / max(1.0, half_life * (number + 1)))
            averages[half_life].step(unet.parameters())
        return loss

    return step


def put(pipeline: ClassConditionalPipeline, average: EMAModel) -> None:
    """Give a pipeline the weights of an average, and solvers that are fitted to them."""
    average.copy_to(pipeline.unet.parameters())
    pipeline.fit_solver()


def contrastive(plain: Callable[..., Tensor], weight: float) -> Callable[..., Tensor]:
    """The loss of the training loop, and supervised contrast (Khosla et al. 2020, eq. 2, temperature 0.1) between the
    classes' mean features in the bottleneck (CORAL)."""

    def loss(trainer: Any, unet: Any, *rest: Any) -> Tensor:
        seen: dict[str, Tensor] = {}
        hooks = [
            unet.register_forward_pre_hook(lambda _, given: seen.update(labels=given[2])),
            unet.mid_block.register_forward_hook(lambda _, __, found: seen.update(features=found)),
        ]
        try:
            found = plain(trainer, unet, *rest)
        finally:
            for hook in hooks:
                hook.remove()
        known = seen["labels"] < len(trainer.data.classes)
        labels = seen["labels"][known]
        features = nn.functional.normalize(seen["features"].mean((2, 3))[known], dim=1)
        alone = torch.eye(len(labels), dtype=torch.bool)
        shares = (features @ features.T / 0.1).masked_fill(alone, -math.inf).log_softmax(1)
        alike = (labels[:, None] == labels) & ~alone
        own = -(shares.masked_fill(~alike, 0).sum(1) / alike.sum(1).clamp(min=1))[alike.any(1)]
        return found + weight * own.mean() if len(own) else found

    return loss


def augmented(plain: Callable[..., Any], base: float, tuning: float) -> Callable[..., Any]:
    """A phase of training in which all classes are augmented with the probability of that phase."""

    def run(trainer: Any, phase: Any) -> Any:
        trainer.augmented = torch.full_like(trainer.augmented, tuning if phase.name == "fine-tuning" else base)
        return plain(trainer, phase)

    return run


@torch.inference_mode()
def solve(
    pipeline: ClassConditionalPipeline,
    labels: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    low: float = 0.0,
    high: float = math.inf,
    weaker: ClassConditionalPipeline | None = None,
    start: Tensor | None = None,
    sigma: float = 80.0,
) -> Tensor:
    """As `ClassConditionalPipeline.solve`, with guidance inside [low, high] by the network without a class or by a
    weaker one (Karras et al. 2024, arXiv 2406.02507), and from real images noised to `sigma` (SDEdit, Meng et al.
    2022)."""
    from synthaug.diffusion.network import predict

    settings = dict(pipeline.scheduler.config) | ({} if start is None else {"sigma_max": sigma})
    scheduler = EDMDPMSolverMultistepScheduler.from_config(settings)
    scheduler.set_timesteps(steps)
    hints = torch.zeros(len(labels), pipeline.config.n_hints)
    nobody = torch.full_like(labels, len(pipeline.config.classes))
    images = noise * scheduler.init_noise_sigma if start is None else start + noise * sigma
    pipeline.unet.eval()
    for index, c_noise in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(images, c_noise)
        condition = c_noise.expand(len(labels))
        output = predict(pipeline.unet, scaled, condition, labels, hints, pipeline.config.fold)
        if guidance != 1.0 and low <= float(scheduler.sigmas[index]) <= high:
            other = nobody if weaker is None else labels
            network = pipeline.unet if weaker is None else weaker.unet.eval()
            plain = predict(network, scaled, condition, other, hints, pipeline.config.fold)
            output = plain + guidance * (output - plain)
        images = scheduler.step(output, c_noise, images, return_dict=False)[0]
    return images
