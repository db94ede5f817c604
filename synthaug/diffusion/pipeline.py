"""The checkpoint as a diffusers pipeline: a folder of safetensors and JSON that loads with one line.

from synthaug.diffusion.pipeline import ClassConditionalPipeline
images = ClassConditionalPipeline.from_pretrained("…/pipeline")(["pneumonia"] * 4, seeds=[0, 1, 2, 3])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, UNet2DModel
from torch import Tensor

from synthaug.diffusion.edm import SIGMA_MAX, denoise
from synthaug.diffusion.network import predict
from synthaug.diffusion.solver import CHECK_NOISES, EXACT_STEPS, FIT_NOISES, FITTED_STEPS, Fitted, fit, follow
from synthaug.progress import progress
from synthaug.records import PixelSpec

logger = logging.getLogger(__name__)

# Guidance outside the middle of the noise range costs diversity or does nothing (Kynkäänniemi et al. 2024,
# arXiv 2404.07724, who use 0.28 to 5.42 at 512 pixels with unit-variance latents).
GUIDANCE_SIGMAS = (0.28, 5.42)

# The last noise level before the images. Below it the steps move less than images of 8 bits can hold (docs/log.md).
LAST_SIGMA = 0.02


def build_solver(sigma_data: float) -> EDMDPMSolverMultistepScheduler:
    """DPM-Solver++(3M) (Lu et al. 2022, arXiv 2211.01095) over levels that are evenly spaced in ln sigma.

    Of the schedulers of diffusers nearest to the exact solution at 14 to 20 evaluations (docs/log.md).

    Args:
        sigma_data: Root mean square of the training images.
    """
    return EDMDPMSolverMultistepScheduler(
        sigma_min=LAST_SIGMA,
        sigma_max=SIGMA_MAX,
        sigma_data=sigma_data,
        sigma_schedule="exponential",
        solver_order=3,
    )


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of given classes, each from its own seed, by a deterministic solver.

    Args:
        unet: Network of `build_unet`.
        scheduler: Solver; its sigma_data is the root mean square of the training images.
        classes: Names, in order of label.
        pixels: `PixelSpec` as plain data; says what the images' values mean.
        fold: Side of the pixel block folded into channels.
        n_hints: Input planes that tell the augmentation; zero when sampling.
        fitted: Number of evaluations, as a string, to the solver fitted for it (`fit_solver`).
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: EDMDPMSolverMultistepScheduler,
        classes: list[str] | None = None,
        pixels: dict[str, Any] | None = None,
        fold: int = 1,
        n_hints: int = 0,
        # Of solver.Fitted, which diffusers cannot check a value against.
        fitted: dict[str, Any] | None = None,
    ) -> None:
        # The defaults tell diffusers that these are settings, not modules; without them nothing works.
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            classes=list(classes or []), pixels=pixels, fold=fold, n_hints=n_hints, fitted=fitted or {}
        )
        self._warned = False

    @property
    def spec(self) -> PixelSpec:
        """What the values of the images mean."""
        return PixelSpec.model_validate(self.config.pixels)

    def __call__(
        self, classes: Sequence[str | int], seeds: Sequence[int], *, steps: int | None = None, guidance: float = 1.0
    ) -> np.ndarray:
        """Return native images, [n, size, size, channels] of the training images' dtype.

        An image follows from its class, its seed and the settings; its last bit also from the number of images
        computed together and the threads, since torch promises no equality across batch shapes.

        Args:
            classes: Name or label of each image.
            seeds: Seed of each image, 0 to 2**63 - 1.
            steps: Evaluations of the network; twice as many inside the guidance interval when guided. None is
                `default_steps`.
            guidance: 1 is none.

        Raises:
            ValueError: A class is unknown, or there are not as many seeds as classes.
        """
        if len(classes) != len(seeds):
            raise ValueError(f"{len(classes)} classes and {len(seeds)} seeds; each image needs one of both")
        if steps is None:
            steps = self.default_steps(guidance)
        elif guidance == 1.0 and steps in FITTED_STEPS and str(steps) not in self.config.fitted and not self._warned:
            self._warned = True
            logger.warning(
                "no solver of %d evaluations is fitted to this checkpoint (train.fit_solver_from, or DPM-Solver++ was "
                "as near): images are drawn by DPM-Solver++, whose default is %d, and with fewer come out coarse.",
                steps, self.default_steps(2.0),
            )  # fmt: skip
        labels = torch.tensor([self._label(item) for item in classes], dtype=torch.long, device=self.device)
        unit = self.solve(labels, self.noise(seeds), steps=steps, guidance=guidance)
        return self.spec.from_unit(unit.permute(0, 2, 3, 1).cpu().numpy())

    def default_steps(self, guidance: float) -> int:
        """8 by the fitted solver; where there is none, or with guidance, 14, or 20 for a checkpoint whose scheduler is
        that of before, of second order over other levels."""
        if guidance == 1.0 and "8" in self.config.fitted:
            return 8
        return 14 if self.scheduler.config.sigma_schedule == "exponential" else 20

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Unit normal noise, [n, channels, size, size], each image's from its own generator on the processor."""
        spec = self.spec
        shape = (spec.channels, spec.size, spec.size)
        # Philox takes all 64 bits of a seed; torch's own generator on the processor would drop the upper half, and
        # among 100,000 samples two would share their noise.
        drawn = [
            np.random.Generator(np.random.Philox(key=int(seed))).standard_normal(shape, np.float32) for seed in seeds
        ]
        return torch.from_numpy(np.stack(drawn))

    @torch.inference_mode()
    def solve(self, labels: Tensor, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
        """Follow the probability-flow ODE from noise to images, [n, channels, size, size] float32, about [-1, 1].

        One evaluation a step, by the solver that was fitted for so many where there is one, and the checkpoint's
        scheduler (`build_solver`) otherwise and with guidance, which makes another ODE of it.
        """
        fitted = self.config.fitted.get(str(steps)) if guidance == 1.0 else None
        if fitted is None:
            return self._by_scheduler(labels, noise, steps=steps, guidance=guidance)
        was_training = self.unet.training
        self.unet.eval()
        images = follow(self._denoise, noise.to(self.device), labels, fitted)
        self.unet.train(was_training)
        return images

    @torch.inference_mode()
    def fit_solver(self) -> None:
        """Fit solvers of `FITTED_STEPS` evaluations to this network; to be called again when its weights change.

        One is kept where it comes nearer to the exact solution than the scheduler does with as many evaluations, on
        noises that it was not fitted to. Takes some 1,700 evaluations of a single image; no image of the data.
        """
        n = FIT_NOISES + CHECK_NOISES
        labels = torch.arange(n, device=self.device) % len(self.config.classes)
        # Seeds of samples are 63 bits of a digest: none of these is likely among them. 0 is that of `shared_noise`.
        noise = self.noise(range(1, n + 1)).to(self.device)
        used, others = slice(FIT_NOISES), slice(FIT_NOISES, None)
        exact = {SIGMA_MAX: noise * SIGMA_MAX}
        kept: dict[str, Fitted] = {}
        was_training = self.unet.training
        # A large network on a processor takes minutes.
        with progress("fit solvers", n * (EXACT_STEPS + sum(FITTED_STEPS)), "images") as bar:

            def watch(level: float, images: Tensor) -> None:
                exact.setdefault(level, images)
                bar.update(n)

            final = self._by_scheduler(labels, noise, steps=EXACT_STEPS, guidance=1.0, watch=watch)
            exact[0.0] = final
            self.unet.eval()
            path = {level: images[used] for level, images in exact.items()}
            for steps in FITTED_STEPS:
                found = fit(self._denoise, path, labels[used], steps, self.spec.size)
                own = follow(self._denoise, noise[others], labels[others], found)
                plain = self._by_scheduler(labels[others], noise[others], steps=steps, guidance=1.0)
                errors = [float((images - final[others]).square().mean().sqrt()) for images in (own, plain)]
                if errors[0] < errors[1]:
                    kept[str(steps)] = found
                logger.debug("%d evaluations: fitted %.4f from the exact solution, scheduler %.4f", steps, *errors)
                bar.update(n * steps)
        self.unet.train(was_training)
        self.register_to_config(fitted=kept)

    def _denoise(self, images: Tensor, sigma: float, labels: Tensor) -> Tensor:
        hints = torch.zeros(len(labels), self.config.n_hints, device=self.device)
        return denoise(
            lambda scaled, c_noise: predict(self.unet, scaled, c_noise, labels, hints, self.config.fold),
            images,
            torch.full((len(labels),), sigma, device=self.device),
            self.scheduler.config.sigma_data,
        )

    def _by_scheduler(
        self,
        labels: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        watch: Callable[[float, Tensor], Any] | None = None,
    ) -> Tensor:
        """As `solve`, by the scheduler. `watch` is told each noise level and the images there, before they are
        denoised."""
        # A scheduler keeps the place of its last call: a copy makes calls independent of each other.
        scheduler = EDMDPMSolverMultistepScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        hints = torch.zeros(len(labels), self.config.n_hints, device=self.device)
        nobody = torch.full_like(labels, len(self.config.classes))
        images = noise.to(self.device) * scheduler.init_noise_sigma
        low, high = GUIDANCE_SIGMAS
        was_training = self.unet.training
        self.unet.eval()
        for index, c_noise in enumerate(scheduler.timesteps):
            if watch is not None:
                watch(float(scheduler.sigmas[index]), images)
            scaled = scheduler.scale_model_input(images, c_noise)
            condition = c_noise.to(self.device).expand(len(labels))
            output = predict(self.unet, scaled, condition, labels, hints, self.config.fold)
            if guidance != 1.0 and low <= float(scheduler.sigmas[index]) <= high:
                plain = predict(self.unet, scaled, condition, nobody, hints, self.config.fold)
                output = plain + guidance * (output - plain)
            images = scheduler.step(output, c_noise, images, return_dict=False)[0]
        self.unet.train(was_training)
        return images

    def _label(self, item: str | int) -> int:
        classes = list(self.config.classes)
        if isinstance(item, str):
            if item not in classes:
                raise ValueError(f"class {item!r} is unknown to this checkpoint; it knows {classes}")
            return classes.index(item)
        if not 0 <= int(item) < len(classes):
            raise ValueError(f"label {item} is out of range; this checkpoint has labels 0 to {len(classes) - 1}")
        return int(item)
