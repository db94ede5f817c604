"""The class-conditional reading of diffusers' example for unconditional images, as a contestant.

As in `examples/unconditional_image_generation/train_unconditional.py`: UNet2DModel of widths 128, 128, 256, 256, 512,
512 with attention on the fifth level, DDPM with 1000 steps of linear beta, epsilon as target, AdamW (betas 0.95 and
0.999, weight decay 1e-6), rate 1e-4 with warm-up and cosine, batch 16, gradients clipped to 1, EMA with inverse gamma 1
and power 3/4 to 0.9999. Class-conditional by `num_class_embeds`, which the example lacks. Its warm-up of 500 steps is
cut to a tenth of the steps there is time for, or it would never end here. Six levels want a side that 32 divides:
images are padded and cropped again. With `parameters` in the job the network is as large as ours instead, with levels
that fit the image and no padding."""

from __future__ import annotations

from typing import Any

import torch
from contest import DDPM_STEPS, Learner, main
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

DEFAULT_WIDTHS = (128, 128, 256, 256, 512, 512)


class Example(Learner):
    def __init__(self, job: dict[str, Any], size: int, channels: int, n_classes: int) -> None:
        self.size, self.channels, self.n_classes = size, channels, n_classes
        self.small = job.get("parameters") is not None
        self.batch_size = 32 if self.small else 16
        # At our size it also gets our way of drawing scarce classes; the example draws them as found.
        self.power = 0.5 if self.small else 1.0
        self.side = size if self.small else -(-size // 32) * 32
        self.widths = _widths(size, channels, n_classes, job["parameters"]) if self.small else DEFAULT_WIDTHS
        self.noise = DDPMScheduler(num_train_timesteps=DDPM_STEPS)
        self.build(job["rates"][0], 1)

    def build(self, rate: float, steps: int) -> None:
        self.unet = make_unet(self.side, self.channels, self.n_classes, self.widths)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        warm_up = max(1, min(500, steps // 10))
        self.schedule = get_scheduler("cosine", self.optimizer, num_warmup_steps=warm_up, num_training_steps=steps)
        self.ema = EMAModel(self.unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = self._padded(images)
        noise = torch.randn_like(images)
        times = torch.randint(0, DDPM_STEPS, (len(images),))
        predicted = self.unet(self.noise.add_noise(images, noise, times), times, labels).sample
        return torch.nn.functional.mse_loss(predicted, noise)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.loss(images, labels).backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())

    def average(self) -> None:
        self.ema.copy_to(self.unet.parameters())
        self.unet.eval()

    @torch.inference_mode()
    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        sampler = DDIMScheduler.from_config(self.noise.config)
        sampler.set_timesteps(self.steps_per_sample)
        images = torch.randn(len(labels), self.channels, self.side, self.side)
        for time in sampler.timesteps:
            images = sampler.step(self.unet(images, time, labels).sample, time, images).prev_sample
        first = (self.side - self.size) // 2
        return images[:, :, first : first + self.size, first : first + self.size]

    @torch.inference_mode()
    def evaluate_once(self, labels: torch.Tensor) -> None:
        self.unet(torch.randn(len(labels), self.channels, self.side, self.side), 500, labels)

    def _padded(self, images: torch.Tensor) -> torch.Tensor:
        before = (self.side - self.size) // 2
        after = self.side - self.size - before
        return torch.nn.functional.pad(images, (before, after, before, after), value=-1.0)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())


def make_unet(side: int, channels: int, n_classes: int, widths: tuple[int, ...]) -> UNet2DModel:
    """Attention stands on the last level but one of six, as in the example, and on the last of fewer."""
    n = len(widths)
    attended = n - 2 if n == len(DEFAULT_WIDTHS) else n - 1
    down = ["AttnDownBlock2D" if level == attended else "DownBlock2D" for level in range(n)]
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        norm_num_groups=32 if all(width % 32 == 0 for width in widths) else 8,
        num_class_embeds=n_classes,
    )


def _widths(size: int, channels: int, n_classes: int, parameters: int) -> tuple[int, ...]:
    """Widths w, 2w, 2w … whose network comes nearest to this number of parameters."""
    levels = next(n for n in (4, 3, 2, 1) if size % 2 ** (n - 1) == 0 and size >> (n - 1) >= 4)

    def off(width: int) -> int:
        with torch.device("meta"):  # counted, not filled
            unet = make_unet(size, channels, n_classes, (width, *[2 * width] * (levels - 1)))
        return abs(sum(parameter.numel() for parameter in unet.parameters()) - parameters)

    width = min(range(16, 97, 8), key=off)
    return (width, *[2 * width] * (levels - 1))


if __name__ == "__main__":
    main(Example)
