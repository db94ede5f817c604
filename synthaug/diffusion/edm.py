"""Denoising after Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".

One small function an idea, under the number of its equation in the paper (arXiv 2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Mean and spread of ln sigma in training. The paper's Table 1 has -1.2 and 1.2 for colour photographs at
# 32 pixels; docs/log.md has the measurements behind the values used here.
SIGMA_LOG_MEAN = -0.8
SIGMA_LOG_STD = 1.2
SIGMA_MAX = 80.0

# What a network F is: (scaled noisy images, noise condition) -> prediction of the images' shape.
Network = Callable[[Tensor, Tensor], Tensor]


def denoise(network: Network, noisy: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Return D(x; sigma), the estimate of the clean images (Eq. 7 with the coefficients of Table 1).

    Args:
        network: F, called with c_in * x [n, c, h, w] and c_noise [n].
        noisy: x, clean images plus noise of standard deviation sigma, [n, c, h, w].
        sigma: [n], each positive.
        sigma_data: Root mean square of the clean images.
    """
    level = sigma.view(-1, *[1] * (noisy.ndim - 1))
    total = (level**2 + sigma_data**2).sqrt()
    predicted = network(noisy / total, 0.25 * sigma.log())
    return (sigma_data / total) ** 2 * noisy + level * sigma_data / total * predicted


def denoising_loss(network: Network, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Return the weighted squared error of every image, [n] (Eq. 2 with lambda(sigma) of Table 1)."""
    level = sigma.view(-1, *[1] * (clean.ndim - 1))
    denoised = denoise(network, clean + level * noise, sigma, sigma_data)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoised - clean).square().flatten(1).mean(1)


def training_sigmas(n: int, generator: torch.Generator) -> Tensor:
    """Draw n noise levels, ln sigma ~ N(SIGMA_LOG_MEAN, SIGMA_LOG_STD^2), stratified over the batch.

    One draw from each of n equally likely intervals, in random order: the same distribution, but a batch's
    loss varies less, so small batches waste less.
    """
    uniform = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    normal = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4).double()).float()
    return (SIGMA_LOG_MEAN + SIGMA_LOG_STD * normal).exp()
