"""Training with differential privacy: DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1). Experimental.

Every step draws each training image with the same probability (Poisson sampling), clips the gradient of each image,
adds Gaussian noise to their sum and divides by the expected number of images. The accountant is that of Opacus.
Gradients of single images are taken by `torch.func`: with the hooks of Opacus 1.6.0 eleven convolutions of this U-Net
got gradients of zero (docs/log.md).
"""

from __future__ import annotations

import copy
import logging
import math
import secrets
import warnings
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.func import functional_call, grad, vmap

from synthaug.config import DPConfig, TrainConfig
from synthaug.diffusion.augment import augment
from synthaug.diffusion.edm import SIGMA_LOG_MEAN, SIGMA_LOG_STD, denoising_loss
from synthaug.diffusion.network import predict
from synthaug.diffusion.training import EVALUATIONS_PER_PHASE, HeldOut, Result, judged_loss, load_unit
from synthaug.errors import ConfigError, TrainingError
from synthaug.generators.interface import TrainingData
from synthaug.progress import progress
from synthaug.records import PrivacyGuarantee

logger = logging.getLogger(__name__)

# The paper's value for pictures; what would be measured on the training images is not covered by epsilon.
PRIVATE_SIGMA_DATA = 0.5
# Under it the noise that a useful epsilon takes drowns the gradients (docs/log.md).
LEAST_IMAGES = 1000
_PIECE = 16
# Where torch keeps the 624 words of the Mersenne twister in a generator's state, each in eight bytes: after the seed,
# two counters and a place.
_STATE_START, _STATE_WORDS = 24, 624
_WARM_UP_SHARE = 0.05


def plan_privacy(n: int, settings: TrainConfig, dp: DPConfig) -> PrivacyGuarantee:
    """Return the noise that `dp.epsilon` takes, and what the accountant then says.

    Args:
        n: Training images. It, the classes and their names are taken as known to everybody.

    Raises:
        ConfigError: There are too few images, delta is no promise, a setting would void epsilon, or Opacus is missing.
    """
    if n < LEAST_IMAGES:
        raise ConfigError(
            f"privacy.dp is refused: there are {n} training images, and with fewer than {LEAST_IMAGES} the noise that "
            "it takes leaves nothing of use. Leave privacy.dp out, or bring more images."
        )
    delta = dp.delta if dp.delta is not None else 1 / (10 * n)
    if delta >= 1 / n:
        raise ConfigError(
            f"privacy.dp.delta: {delta:g} is no promise for {n} training images, since giving one of them away whole "
            f"would keep it. Set it well under {1 / n:.2g}, or leave it out for {1 / (10 * n):.2g}."
        )
    if settings.images is None:
        raise ConfigError("privacy.dp needs train.images: how many steps are taken decides the noise. Set it.")
    if settings.base is not None:
        raise ConfigError(
            "privacy.dp and train.base: epsilon would say nothing of the images that the base was trained on. Leave "
            "one of them out."
        )
    if settings.batch_size > n:
        raise ConfigError(f"privacy.dp: train.batch_size {settings.batch_size} is more than the {n} training images.")
    rate, steps = settings.batch_size / n, max(1, math.ceil(settings.images / settings.batch_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations at import, and of orders at the end of a list
        try:
            from opacus.accountants import RDPAccountant
            from opacus.accountants.utils import get_noise_multiplier
        except ImportError:
            raise ConfigError('privacy.dp needs Opacus: pip install "synthaug[dp]".') from None
        try:
            noise = get_noise_multiplier(
                target_epsilon=dp.epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
            )
        except ValueError as error:
            raise ConfigError(f"privacy.dp.epsilon: {dp.epsilon:g} cannot be reached: {error}.") from None
        accountant = RDPAccountant()
        accountant.history = [(noise, rate, steps)]
        epsilon = float(accountant.get_epsilon(delta=delta))
    return PrivacyGuarantee(
        epsilon=epsilon,
        epsilon_asked=dp.epsilon,
        delta=delta,
        accountant="RDP (Opacus)",
        noise_multiplier=float(noise),
        max_grad_norm=dp.max_grad_norm,
        sample_rate=rate,
        steps=steps,
        n_images=n,
    )


def image_gradients(
    unet: UNet2DModel,
    images: Tensor,
    noise: Tensor,
    sigma: Tensor,
    labels: Tensor,
    hints: Tensor,
    *,
    sigma_data: float,
    fold: int,
) -> dict[str, Tensor]:
    """Parameter name to the gradient of each image's own loss, [n, ...]; all arguments have n first."""

    def loss(weights: dict[str, Tensor], *one: Tensor) -> Tensor:
        image, noise_, level, label, hint = (item[None] for item in one)

        def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
            called: Any = lambda *a, **k: functional_call(unet, weights, a, k)  # noqa: E731
            return predict(called, scaled, c_noise, label, hint, fold)

        return denoising_loss(network, image, noise_, level, sigma_data).sum()

    weights = {name: value.detach() for name, value in unet.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap tells that attention is computed image by image
        found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0, 0), randomness="different")(
            weights, images, noise, sigma, labels, hints
        )
    return found


def clipped_sum(gradients: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Sum over images after each image's whole gradient is brought to a norm of at most `largest`."""
    squares: Any = sum(value.flatten(1).square().sum(1) for value in gradients.values())
    factor = (largest / (squares.sqrt() + 1e-12)).clamp(max=1.0)
    # A gradient that is not a number must not get past the clipping.
    factor = torch.where(torch.isfinite(squares), factor, torch.zeros_like(factor))
    return {name: torch.einsum("n,n...->...", factor, torch.nan_to_num(value)) for name, value in gradients.items()}


def system_generator() -> torch.Generator:
    """A generator whose whole state (19,937 bits) comes from the system's randomness.

    `manual_seed` keeps 32 bits of a seed on a processor: four thousand million series of noise, which can be tried out.
    """
    generator = torch.Generator()
    state = generator.get_state().numpy().copy()
    words = np.frombuffer(secrets.token_bytes(4 * _STATE_WORDS), dtype=np.uint32)
    state[_STATE_START : _STATE_START + 8 * _STATE_WORDS].view(np.uint64)[:] = words
    generator.set_state(torch.from_numpy(state))
    return generator


def train_private(
    unet: UNet2DModel,
    data: TrainingData,
    settings: TrainConfig,
    guarantee: PrivacyGuarantee,
    *,
    seed: int,
    fold: int,
    device: torch.device,
) -> tuple[Result, list[dict[str, Any]]]:
    """Train by DP-SGD and return the weights with the best held-out loss, and the log.

    One phase, in which all images are drawn alike: a class-balanced one would draw the images of small classes more
    often and would have to be accounted for at their rate. Which images a step draws and the noise come from the
    system's randomness and not from `seed`, for who knows the noise can take it away again; so two runs differ, and an
    interrupted run begins again. The stop and the choice of weights read the validation images, which epsilon says
    nothing of.

    Raises:
        TrainingError: No evaluation gave a number.
    """
    random = system_generator()
    torch.manual_seed(secrets.randbits(63))  # for dropout
    unet = unet.to(device).train()
    parameters = dict(unet.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99))
    ema, averaged = EMAModel(unet.parameters(), foreach=True), copy.deepcopy(unet)
    heldout = HeldOut(data, seed, device) if len(data.heldout_rows) else None
    scarce = [data.classes[label] for label in data.scarce]
    steps, every = guarantee.steps, max(1, guarantee.steps // EVALUATIONS_PER_PHASE)
    best, best_loss, log, seen = Result({}, {}, 0, "the budget was used"), math.inf, [], 0
    spread = guarantee.noise_multiplier * guarantee.max_grad_norm
    with progress("train, private", steps, "steps") as bar:
        for step in range(steps):
            drawn = torch.rand(len(data.rows), generator=random, dtype=torch.float64) < guarantee.sample_rate
            chosen = np.flatnonzero(drawn.numpy())
            total = {name: torch.zeros_like(value) for name, value in parameters.items()}
            for start in range(0, len(chosen), _PIECE):
                own = _gradients_of(unet, data, chosen[start : start + _PIECE], settings, fold, random, device)
                for name, value in clipped_sum(own, guarantee.max_grad_norm).items():
                    total[name] += value
            for name, value in parameters.items():
                noise = torch.randn(value.shape, generator=random).to(device)
                value.grad = (total[name] + spread * noise) / settings.batch_size
            warm = min(1.0, (step + 1) / max(1.0, _WARM_UP_SHARE * steps))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            ema.decay = 0.5 ** (1 / max(1.0, settings.ema_half_life * (step + 1)))
            ema.step(unet.parameters())
            seen += len(chosen)
            bar.update(1)
            if (step + 1) % every and step + 1 != steps:
                continue
            ema.copy_to(averaged.parameters())
            losses = {} if heldout is None else heldout.losses(averaged, data.classes, PRIVATE_SIGMA_DATA, fold)
            judged = judged_loss(losses, scarce)
            # The training loss is not written down: it is computed from the images without noise.
            log.append({"phase": "private", "step": step + 1, "images": seen, "heldout": judged if losses else None})
            if math.isfinite(judged) and (judged < best_loss or not losses):
                best_loss = judged
                best.weights = {name: value.clone() for name, value in averaged.state_dict().items()}
                best.losses = losses
    if not best.weights:
        raise TrainingError(
            f"private training never had a held-out loss that is a number. Lower train.learning_rate "
            f"(now {settings.learning_rate})."
        )
    best.images_seen = seen
    return best, log


def _gradients_of(
    unet: UNet2DModel,
    data: TrainingData,
    chosen: np.ndarray,
    settings: TrainConfig,
    fold: int,
    random: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    """Each image with draws of its own: nothing here may depend on which others were drawn."""
    images, hints = augment(
        load_unit(data, data.rows[chosen]), settings.augment.probability, settings.augment.flips, random
    )
    labels = torch.from_numpy(data.labels[chosen])
    nobody = torch.rand(len(labels), generator=random) < settings.label_dropout
    labels = torch.where(nobody, torch.full_like(labels, len(data.classes)), labels)
    # Not the stratified levels of ordinary training, where one image's level tells of the others'.
    sigma = (SIGMA_LOG_MEAN + SIGMA_LOG_STD * torch.randn(len(labels), generator=random)).exp()
    noise = torch.randn(images.shape, generator=random)
    images, noise, sigma, labels, hints = (item.to(device) for item in (images, noise, sigma, labels, hints))
    return image_gradients(unet, images, noise, sigma, labels, hints, sigma_data=PRIVATE_SIGMA_DATA, fold=fold)
