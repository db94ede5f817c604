"""denoising-diffusion-pytorch 2.3.4 as a contestant: its classifier-free-guidance U-Net, in an environment of its own.

Settings are those of its README and Trainer (batch 32, Adam with betas 0.9 and 0.99, EMA 0.995 every 10 steps,
gradients clipped to 1); the learning rate is chosen from a few. Its own guidance of 6 makes little but the typical
image: 1 unless the job says otherwise, as ours draws, which is one evaluation a step. Its sampler crashes there (its
network returns one value where two are unpacked); `Unet` returns both."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch
from contest import Learner, main

NAME = "denoising_diffusion_pytorch"


def _package() -> None:
    """Make the package importable without running its __init__, which wants torchvision (no fitting CPU build)."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None, f"{NAME} is not installed here"
    package = types.ModuleType(NAME)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[NAME] = package


_package()
from denoising_diffusion_pytorch import classifier_free_guidance as theirs  # noqa: E402
from ema_pytorch import EMA  # noqa: E402

# Their samplers show a bar for every batch.
theirs.tqdm = lambda steps, **_: steps


class Unet(theirs.Unet):
    """Theirs, whose sampler also takes a guidance of 1.

    A subclass, not a function set on the network: the averaged weights are a copy of it, whose function would be the
    original's.
    """

    def forward_with_cond_scale(self, *args: Any, cond_scale: float = 1.0, **kwargs: Any) -> Any:
        found = super().forward_with_cond_scale(*args, cond_scale=cond_scale, **kwargs)
        # The second, without a class, is read by CFG++ alone, which is off: None, so that it fails if it is on.
        return (found, None) if cond_scale == 1 else found


class Guided(Learner):
    batch_size = 32
    power = 0.5

    def __init__(self, job: dict[str, Any], size: int, channels: int, n_classes: int) -> None:
        self.size, self.channels, self.n_classes = size, channels, n_classes
        self.width, self.guidance = job["width"], job.get("guidance", 1.0)
        self.build(job["rates"][0], 1)

    def build(self, rate: float, steps: int) -> None:
        # Their own users of MNIST take three levels at 28 pixels, since four do not divide it.
        levels = next(n for n in (4, 3, 2, 1) if self.size % 2 ** (n - 1) == 0 and self.size >> (n - 1) >= 4)
        unet = Unet(dim=self.width, num_classes=self.n_classes, dim_mults=(1, 2, 4, 8)[:levels], channels=self.channels)
        self.diffusion = theirs.GaussianDiffusion(
            unet, image_size=self.size, timesteps=1000, sampling_timesteps=self.steps_per_sample
        )
        # As their Trainer sets it.
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=rate, betas=(0.9, 0.99))

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.diffusion((images + 1) / 2, classes=labels)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.loss(images, labels).backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def average(self) -> None:
        self.diffusion = self.ema.ema_model
        self.diffusion.eval()

    @torch.inference_mode()
    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        return self.diffusion.sample(labels, cond_scale=self.guidance) * 2 - 1

    @torch.inference_mode()
    def evaluate_once(self, labels: torch.Tensor) -> None:
        images = torch.randn(len(labels), self.channels, self.size, self.size)
        times = torch.full((len(labels),), 500, dtype=torch.long)
        self.diffusion.model_predictions(images, times, labels, cond_scale=self.guidance)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.diffusion.model.parameters())


if __name__ == "__main__":
    main(Guided)
