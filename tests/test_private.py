"""Differential privacy: the accountant against independent figures, and the gradients against their definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthaug.config import Config, DPConfig, TrainConfig
from synthaug.diffusion import private
from synthaug.diffusion.edm import denoising_loss
from synthaug.diffusion.network import build_unet, predict
from synthaug.errors import ConfigError
from synthaug.generators.edm import EDMGenerator
from synthaug.stage_keys import train_settings
from tests.generator_data import digits_data

pytest.importorskip("opacus", reason='the extra "dp" is not installed')


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"images": 12_800, "batch_size": 64, "width": 16, "device": "cpu", "threads": 1, **changes})


def renyi_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of the sampled Gaussian mechanism at whole orders, written down from the papers.

    Mironov, Talwar & Zhang 2019 (arXiv 1908.10530), eq. for integer alpha in section 3.3; the conversion of
    Canonne, Kamath & Steinke 2020 (arXiv 2004.00010), proposition 12.
    """
    best = math.inf
    for alpha in (*range(2, 11), *range(12, 64)):  # the whole orders that Opacus tries
        terms = [
            math.lgamma(alpha + 1) - math.lgamma(k + 1) - math.lgamma(alpha - k + 1)
            + (k * math.log(rate) if k else 0.0)
            + ((alpha - k) * math.log1p(-rate) if rate < 1 else (0.0 if k == alpha else -math.inf))
            + (k * k - k) / (2 * noise**2)
            for k in range(alpha + 1)
        ]  # fmt: skip
        renyi = steps * np.logaddexp.reduce(terms) / (alpha - 1)
        best = min(best, renyi + math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1))
    return best


@pytest.mark.parametrize(("n", "epsilon"), [(1000, 8.0), (5000, 3.0), (50_000, 1.0)])
def test_epsilon_is_what_an_independent_account_says_and_at_most_what_was_asked(n: int, epsilon: float) -> None:
    told = private.plan_privacy(n, settings(), DPConfig(epsilon=epsilon))
    assert (told.sample_rate, told.steps, told.delta) == (64 / n, 200, 1 / (10 * n))
    assert 0.95 * epsilon < told.epsilon <= epsilon
    ours = renyi_epsilon(told.noise_multiplier, told.sample_rate, told.steps, told.delta)
    # Opacus tries orders between the whole ones too, so it may find a little less, and never more.
    assert told.epsilon <= ours * (1 + 1e-6)
    assert told.epsilon == pytest.approx(ours, rel=0.08)
    # A tenth less noise is not enough.
    assert renyi_epsilon(0.9 * told.noise_multiplier, told.sample_rate, told.steps, told.delta) > epsilon


@pytest.mark.parametrize(
    ("n", "dp", "changes", "words"),
    [
        (999, {"epsilon": 8}, {}, "there are 999 training images, and with fewer than 1000"),
        (1000, {"epsilon": 8, "delta": 0.001}, {}, r"privacy\.dp\.delta: 0\.001 is no promise for 1000"),
        (1000, {"epsilon": 8}, {"images": None}, r"needs train\.images"),
        (1000, {"epsilon": 8}, {"base": "x"}, "nothing of the images that the base was trained on"),
        (1000, {"epsilon": 8}, {"batch_size": 1001}, "more than the 1000 training images"),
    ],
)
def test_what_would_void_or_waste_it_is_refused_before_training(
    n: int, dp: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        private.plan_privacy(n, settings(**changes), DPConfig(**dp))


def test_the_gradient_of_every_parameter_is_each_image_s_own() -> None:
    torch.manual_seed(0)
    unet = build_unet(size=8, channels=1, n_classes=3, n_hints=6, fold=1, width=16, dropout=0.0)
    images, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    sigma, labels, hints = torch.rand(3) + 0.1, torch.arange(3), torch.zeros(3, 6)
    got = private.image_gradients(unet, images, noise, sigma, labels, hints, sigma_data=0.5, fold=1)
    for index in range(3):
        one = slice(index, index + 1)

        def network(x: Any, c: Any, one: slice = one) -> Any:
            return predict(unet, x, c, labels[one], hints[one], 1)

        unet.zero_grad()
        denoising_loss(network, images[one], noise[one], sigma[one], 0.5).sum().backward()
        for name, value in unet.named_parameters():
            assert value.grad is not None
            assert torch.allclose(got[name][index], value.grad, rtol=1e-3, atol=1e-4), name
    assert len(got) == len(list(unet.named_parameters()))


def test_no_image_moves_the_sum_by_more_than_the_norm_whatever_its_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    gradients = {"a": torch.randn(5, 3, 4, generator=random), "b": torch.randn(5, 7, generator=random)}
    gradients["a"][1] *= 1e6
    gradients["b"][2] = float("nan")
    gradients["a"][3] *= 1e-3
    gradients["b"][3] *= 1e-3
    whole = private.clipped_sum(gradients, 0.5)
    for index in range(5):
        others = [i for i in range(5) if i != index]
        without = private.clipped_sum({name: value[others] for name, value in gradients.items()}, 0.5)
        moved = math.sqrt(sum(float((whole[name] - without[name]).square().sum()) for name in whole))
        assert moved <= 0.5 + 1e-5
    small = private.clipped_sum({name: value[3:4] for name, value in gradients.items()}, 0.5)
    assert torch.allclose(small["a"], gradients["a"][3]), "what is short enough is left as it is"


def test_what_private_training_does_not_look_at_trains_nothing_again(tiny_config: Callable[..., Config]) -> None:
    def key(from_repeats: float, **more: Any) -> dict[str, Any]:
        return train_settings(tiny_config(train={"augment": {"from_repeats": from_repeats}}, **more))

    private_job: dict[str, Any] = {"privacy": {"dp": {"epsilon": 8}}}
    assert key(0, **private_job) == key(150, **private_job)
    assert key(0) != key(150)


@pytest.mark.slow
def test_a_private_checkpoint_says_so_and_its_noise_is_nobody_s_to_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "LEAST_IMAGES", 100)
    data, small = digits_data(), settings(images=96, batch_size=16, fit_solver_from=0)
    (first, told), (second, _) = (
        EDMGenerator.fit(data, small, seed=0, workdir=tmp_path, dp=DPConfig(epsilon=8)) for _ in range(2)
    )
    assert told.privacy is not None
    assert told.privacy.epsilon <= 8
    assert (told.privacy.steps, told.privacy.n_images, told.kept) == (6, len(data.rows), "base")
    assert told.heldout_loss_tuned == {}
    assert all("loss" not in row for row in told.log), "the training loss would give away what epsilon does not count"
    assert first.pipeline.config.fitted, "noise tells nothing of an image: a solver may be fitted"
    weights = [list(generator.pipeline.unet.state_dict().values()) for generator in (first, second)]
    assert any(not torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert first.pipeline.scheduler.config.sigma_data == private.PRIVATE_SIGMA_DATA


def test_the_noise_has_the_whole_state_for_a_seed() -> None:
    """A seed of 32 bits could be tried out, and the noise taken away again."""
    first, second = private.system_generator(), private.system_generator()
    assert len(set(first.get_state().numpy()[24:5016].view("u8").tolist())) > 600
    one, other = torch.randn(20_000, generator=first), torch.randn(20_000, generator=second)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.05
    assert abs(float(one.mean())) < 0.03
    assert abs(float(one.std()) - 1) < 0.03
    # Reproducible from its state, as any generator.
    state = first.get_state()
    drawn = torch.randn(5, generator=first)
    first.set_state(state)
    assert torch.equal(drawn, torch.randn(5, generator=first))
