"""The mathematics against closed forms: a Gaussian's score is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from synthaug.diffusion import pipeline as pipeline_module
from synthaug.diffusion.augment import N_HINTS, augment
from synthaug.diffusion.edm import SIGMA_LOG_MEAN, SIGMA_LOG_STD, SIGMA_MAX, denoise, denoising_loss, training_sigmas
from synthaug.diffusion.network import build_unet, choose_fold, predict
from synthaug.diffusion.pipeline import ClassConditionalPipeline, build_solver
from synthaug.diffusion.training import Phase, repeats
from synthaug.generators.interface import TrainingData
from tests.generator_data import digits_spec

MEAN, SPREAD, SIGMA_DATA = 0.3, 0.2, 0.5


def perfect_network(scaled: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
    """F for images whose pixels are independent N(MEAN, SPREAD^2): the best denoiser, solved for F."""
    sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
    total = (sigma**2 + SIGMA_DATA**2).sqrt()
    noisy = scaled * total
    best = (SPREAD**2 * noisy + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)
    return (best - (SIGMA_DATA / total) ** 2 * noisy) * total / (sigma * SIGMA_DATA)


def test_denoise_inverts_the_preconditioning() -> None:
    noisy, sigma = torch.randn(5, 1, 4, 4), torch.tensor([0.01, 0.1, 1.0, 10.0, 80.0])
    level = sigma.view(-1, 1, 1, 1)
    expected = (SPREAD**2 * noisy + level**2 * MEAN) / (SPREAD**2 + level**2)
    assert torch.allclose(denoise(perfect_network, noisy, sigma, SIGMA_DATA), expected, atol=1e-4)


def test_loss_of_the_perfect_network_is_the_posterior_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = torch.full((400,), 0.7)
    clean = MEAN + SPREAD * torch.randn(400, 1, 8, 8, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    loss = denoising_loss(perfect_network, clean, noise, sigma, SIGMA_DATA).mean()
    posterior = SPREAD**2 * 0.7**2 / (SPREAD**2 + 0.7**2)
    weight = (0.7**2 + SIGMA_DATA**2) / (0.7 * SIGMA_DATA) ** 2
    assert float(loss) == pytest.approx(weight * posterior, rel=0.02)


@pytest.mark.parametrize("n", [1, 7, 512])
def test_training_sigmas_follow_their_distribution(n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logs = torch.cat([training_sigmas(n, generator) for _ in range(max(1, 4096 // n))]).log()
    assert float(logs.mean()) == pytest.approx(SIGMA_LOG_MEAN, abs=0.1)
    assert float(logs.std()) == pytest.approx(SIGMA_LOG_STD, abs=0.1)


def gaussian_pipeline(monkeypatch: pytest.MonkeyPatch) -> ClassConditionalPipeline:
    unet = build_unet(size=8, channels=1, n_classes=2, n_hints=N_HINTS, fold=1, width=16, dropout=0.0)
    monkeypatch.setattr(pipeline_module, "predict", lambda _unet, x, c, _labels, _hints, _fold: perfect_network(x, c))
    return ClassConditionalPipeline(
        unet, build_solver(SIGMA_DATA), ["a", "b"], digits_spec().model_dump(mode="json"), 1, N_HINTS
    )


def solver_errors(pipe: ClassConditionalPipeline, *steps: int) -> list[float]:
    """Largest difference to the closed form, where images lie in [-1, 1]."""
    noise = pipe.noise(range(16))
    start = noise.double() * math.sqrt(SIGMA_MAX**2 + 1)
    exact = MEAN + (start - MEAN) * SPREAD / math.sqrt(SPREAD**2 + SIGMA_MAX**2)
    labels = torch.zeros(16, dtype=torch.long)
    return [
        float((pipe.solve(labels, noise, steps=number, guidance=1.0).double() - exact).abs().max()) for number in steps
    ]


def test_solver_comes_within_half_a_grey_level_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = solver_errors(gaussian_pipeline(monkeypatch), 14, 20, 40, 160)
    assert errors[0] < 0.03
    assert max(errors[1:]) < 1 / 255


def test_solver_is_of_third_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = gaussian_pipeline(monkeypatch)
    # What stops at a noise level is no error of the steps.
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, sigma_min=1e-4)
    errors = solver_errors(pipe, 40, 80)
    # Twice the steps: second order would leave a quarter.
    assert errors[1] < errors[0] / 4.5


def test_a_checkpoint_is_drawn_with_as_many_steps_as_its_solver_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = gaussian_pipeline(monkeypatch)
    calls: list[float] = []
    counted = pipeline_module.predict
    monkeypatch.setattr(pipeline_module, "predict", lambda *given: calls.append(0) or counted(*given))
    pipe(["a"], [1])
    assert len(calls) == 14
    # As checkpoints were saved before.
    pipe.scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA)
    pipe(["a"], [1])
    assert len(calls) == 14 + 20


def test_guidance_of_equal_predictions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = gaussian_pipeline(monkeypatch)
    labels, noise = torch.zeros(3, dtype=torch.long), pipe.noise([1, 2, 3])
    plain = pipe.solve(labels, noise, steps=12, guidance=1.0)
    assert torch.allclose(pipe.solve(labels, noise, steps=12, guidance=2.0), plain, atol=1e-5)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_noise_of_a_sample_depends_on_its_seed_alone(seeds: list[int], shift: int) -> None:
    unet = build_unet(size=8, channels=1, n_classes=2, n_hints=N_HINTS, fold=1, width=16, dropout=0.0)
    scheduler = EDMDPMSolverMultistepScheduler()
    pipe = ClassConditionalPipeline(unet, scheduler, ["a", "b"], digits_spec().model_dump(mode="json"), 1, N_HINTS)
    turned = seeds[shift % len(seeds) :] + seeds[: shift % len(seeds)]
    together = pipe.noise(turned)
    assert not torch.equal(pipe.noise([seeds[0]]), pipe.noise([seeds[0] ^ (1 << 40)])), "the upper half is dropped"
    assert all(torch.equal(together[index], pipe.noise([seed])[0]) for index, seed in enumerate(turned))


@pytest.mark.parametrize(("size", "fold"), [(8, 1), (16, 1), (28, 2), (32, 2), (64, 4), (128, 8), (100, 10), (31, 31)])
def test_fold_keeps_the_grid_small(size: int, fold: int) -> None:
    assert choose_fold(size) == fold


@pytest.mark.parametrize(("size", "channels", "fold"), [(8, 1, 1), (28, 3, 2), (28, 5, 4), (30, 1, 2)])
def test_network_takes_any_channels_and_fold(size: int, channels: int, fold: int) -> None:
    unet = build_unet(size=size, channels=channels, n_classes=4, n_hints=N_HINTS, fold=fold, width=16, dropout=0.0)
    images, hints = torch.randn(2, channels, size, size), torch.zeros(2, N_HINTS)
    out = predict(unet, images, torch.zeros(2), torch.tensor([0, 4]), hints, fold)
    assert out.shape == images.shape


def test_augment_tells_what_it_did() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(64, 2, 12, 12) * 2 - 1
    changed, hints = augment(images, 0.3, True, generator)
    untouched = hints.abs().sum(1) == 0
    assert 0 < int(untouched.sum()) < 64
    assert torch.equal(changed[untouched], images[untouched])
    differs = (changed != images).flatten(1).any(1)
    assert bool(differs[~untouched].all())
    assert changed.abs().max() <= 1 + 1e-6
    same, none = augment(images, 0.0, True, generator)
    assert torch.equal(same, images)
    assert not none.any()


def test_a_mirror_alone_is_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(400, 1, 8, 8)
    changed, hints = augment(images, 0.2, True, generator)
    only_mirror = (hints[:, 0] == 1) & (hints[:, 1:].abs().sum(1) == 0)
    assert int(only_mirror.sum()) > 5
    assert torch.allclose(changed[only_mirror], images[only_mirror].flip(3), atol=1e-5)


def test_the_checkpoint_loads_with_the_documented_line(tmp_path: object) -> None:
    unet = build_unet(size=8, channels=1, n_classes=2, n_hints=N_HINTS, fold=1, width=16, dropout=0.0)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=0.4)
    names = ["normal", "new\nline"]
    pipe = ClassConditionalPipeline(unet, scheduler, names, digits_spec().model_dump(mode="json"), 1, N_HINTS)
    pipe.save_pretrained(str(tmp_path))
    loaded = ClassConditionalPipeline.from_pretrained(str(tmp_path))
    one, two = pipe(["new\nline"] * 3, [1, 2, 3], steps=4), loaded(["new\nline"] * 3, [1, 2, 3], steps=4)
    assert one.shape == (3, 8, 8, 1)
    assert one.dtype == np.uint8
    assert np.array_equal(one, two)
    with pytest.raises(ValueError, match="class 'lynx' is unknown"):
        loaded(["lynx"], [0])


def test_augmentation_of_some_images_leaves_the_others() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(64, 1, 12, 12) * 2 - 1
    some = (torch.arange(64) % 2 == 0).float()
    changed, hints = augment(images, 0.5 * some, True, generator)
    assert torch.equal(changed[1::2], images[1::2])
    assert not hints[1::2].any()
    assert int((hints[::2].abs().sum(1) > 0).sum()) > 20


@given(images=st.lists(st.integers(1, 400), min_size=1, max_size=4), powers=st.lists(st.floats(0, 1), min_size=1))
def test_repeats_add_up_to_what_the_phases_draw(images: list[int], powers: list[float]) -> None:
    data = _labelled(images)
    phases = [Phase("any", 1000 * (k + 1), 1e-3, power) for k, power in enumerate(powers)]
    found = repeats(data, phases)
    assert (found * images).sum() == pytest.approx(sum(phase.images for phase in phases))
    # The fewer images a class has, the more often each comes up, whatever the power below 1.
    assert np.all(np.diff(found[np.argsort(images, kind="stable")]) <= 1e-6 * found.max())


def test_repeats_by_hand() -> None:
    data = _labelled([400, 100])
    # By the root of the count: two thirds and a third; then half and half.
    phases = [Phase("base", 700, 1e-3, 0.5), Phase("fine-tuning", 300, 1e-3, 0.0)]
    assert repeats(data, phases) == pytest.approx([(700 * 2 / 3 + 150) / 400, (700 / 3 + 150) / 100])


def _labelled(counts: list[int]) -> TrainingData:
    labels = np.repeat(np.arange(len(counts)), counts)
    return TrainingData(
        images=np.zeros((len(labels), 8, 8, 1), np.uint8),
        pixels=digits_spec(),
        classes=tuple(map(str, range(len(counts)))),
        rows=np.arange(len(labels)),
        labels=labels,
        heldout_rows=np.array([], np.int64),
        heldout_labels=np.array([], np.int64),
        scarce=(0,),
    )
