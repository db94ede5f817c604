"""Fitted solvers against a Gaussian, whose exact solution is known, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthaug.config import TrainConfig
from synthaug.diffusion import pipeline as pipeline_module
from synthaug.diffusion.edm import SIGMA_MAX
from synthaug.diffusion.pipeline import ClassConditionalPipeline
from synthaug.diffusion.solver import FITTED_STEPS, Fitted, _least_squares, fit, follow, levels_for
from synthaug.generators.edm import EDMGenerator
from tests.generator_data import digits_data
from tests.test_diffusion import MEAN, SPREAD, gaussian_pipeline

SHAPE = (1, 8, 8)


def gaussian(images: torch.Tensor, sigma: float, labels: torch.Tensor) -> torch.Tensor:
    """The best denoiser of independent N(m, SPREAD^2) pixels, m = MEAN for class 0 and -MEAN for class 1."""
    mean = torch.where(labels == 0, MEAN, -MEAN).view(-1, 1, 1, 1)
    return (SPREAD**2 * images + sigma**2 * mean) / (SPREAD**2 + sigma**2)


def exact(noise: torch.Tensor, labels: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the probability-flow ODE of that Gaussian is, having begun at noise * SIGMA_MAX."""
    mean = torch.where(labels == 0, MEAN, -MEAN).view(-1, 1, 1, 1)
    return mean + (noise * SIGMA_MAX - mean) * math.sqrt((SPREAD**2 + sigma**2) / (SPREAD**2 + SIGMA_MAX**2))


def noises(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 2


def fitted_to_the_gaussian(steps: int) -> Fitted:
    noise, labels = noises(16, seed=0)
    path = {float(level): exact(noise, labels, float(level)) for level in np.geomspace(SIGMA_MAX, 0.02, 60)}
    path = {SIGMA_MAX: noise * SIGMA_MAX} | {level: there for level, there in path.items() if level < 79}
    return fit(gaussian, path | {0.0: exact(noise, labels, 0.0)}, labels, steps, 8)


@pytest.mark.parametrize("steps", FITTED_STEPS)
def test_new_noise_lands_on_the_closed_form(steps: int) -> None:
    noise, labels = noises(32, seed=1)
    found = follow(gaussian, noise, labels, fitted_to_the_gaussian(steps))
    assert float((found - exact(noise, labels, 0.0)).abs().max()) < 0.004  # half a grey level of 8 bits


@pytest.mark.parametrize("steps", FITTED_STEPS)
def test_every_image_is_evaluated_once_a_level(steps: int) -> None:
    fitted, asked = fitted_to_the_gaussian(steps), []

    def counted(images: torch.Tensor, sigma: float, labels: torch.Tensor) -> torch.Tensor:
        asked.append((len(images), sigma))
        return gaussian(images, sigma, labels)

    noise, labels = noises(32, seed=1)
    follow(counted, noise, labels, fitted)
    alone = [n for n, sigma in asked if sigma == SIGMA_MAX]
    # What all images of a class share costs a few evaluations a class, whatever the number of images.
    assert alone == [8, 8]
    assert [item for item in asked if item[1] != SIGMA_MAX] == [(32, level) for level in fitted["levels"]]
    assert len(fitted["levels"]) == steps
    assert len(fitted["weights"]) == steps + 1


def test_an_image_does_not_depend_on_what_is_drawn_beside_it() -> None:
    noise, labels = noises(6, seed=2)
    fitted = fitted_to_the_gaussian(4)
    together = follow(gaussian, noise, labels, fitted)
    for place in range(6):
        alone = follow(gaussian, noise[place : place + 1], labels[place : place + 1], fitted)
        assert torch.allclose(alone[0], together[place], atol=1e-5)


@pytest.mark.parametrize("size", [4, 8, 28, 64, 256, 1024])
@pytest.mark.parametrize("steps", FITTED_STEPS)
def test_levels_descend_below_the_first_noise(steps: int, size: int) -> None:
    levels = levels_for(steps, size)
    assert len(levels) == steps
    assert levels[0] < SIGMA_MAX
    assert (np.diff(levels) < 0).all()
    assert levels[-1] > 0


def test_a_checkpoint_keeps_its_solvers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = gaussian_pipeline(monkeypatch)
    assert pipe.config.fitted == {}
    pipe.fit_solver()
    assert sorted(pipe.config.fitted) == sorted(map(str, FITTED_STEPS))
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert again.config.fitted == pipe.config.fitted
    # Without being told a number it takes the fitted one of eight.
    assert np.array_equal(again([0, 1], [5, 6]), pipe([0, 1], [5, 6], steps=8))


def test_fitting_is_of_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, other = gaussian_pipeline(monkeypatch), gaussian_pipeline(monkeypatch)
    pipe.fit_solver()
    torch.manual_seed(99)
    other.fit_solver()
    assert pipe.config.fitted == other.config.fitted


def test_what_comes_no_nearer_than_the_scheduler_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = gaussian_pipeline(monkeypatch)
    plain = pipe.solve(torch.tensor([0]), pipe.noise([3]), steps=4, guidance=1.0)

    def spoilt(*given: object) -> Fitted:
        found = fit(*given)  # type: ignore[arg-type]
        found["weights"][-1][0] += 5.0
        return found

    monkeypatch.setattr(pipeline_module, "fit", spoilt)
    pipe.fit_solver()
    assert pipe.config.fitted == {}
    assert torch.equal(pipe.solve(torch.tensor([0]), pipe.noise([3]), steps=4, guidance=1.0), plain)


def test_guidance_and_other_numbers_are_left_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = gaussian_pipeline(monkeypatch)
    labels, noise = torch.zeros(3, dtype=torch.long), pipe.noise(range(3))
    guided = pipe.solve(labels, noise, steps=8, guidance=2.0)
    seven = pipe.solve(labels, noise, steps=7, guidance=1.0)
    eight = pipe.solve(labels, noise, steps=8, guidance=1.0)
    pipe.fit_solver()
    assert torch.equal(pipe.solve(labels, noise, steps=8, guidance=2.0), guided)
    assert torch.equal(pipe.solve(labels, noise, steps=7, guidance=1.0), seven)
    assert not torch.equal(pipe.solve(labels, noise, steps=8, guidance=1.0), eight)


@pytest.mark.slow
def test_training_fits_it_unless_it_is_itself_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trained(folder: Path, **changes: Any) -> EDMGenerator:
        folder.mkdir()
        settings = TrainConfig(images=256, width=16, threads=1, device="cpu", **changes)
        return EDMGenerator.fit(digits_data(), settings, seed=0, workdir=folder)[0]

    short = trained(tmp_path / "short")
    assert short.pipeline.config.fitted == {}
    assert short.default_steps(1.0) == 14
    # By DPM-Solver++ with so few evaluations images are coarse: said once.
    for _ in range(2):
        short.sample([0], [0], steps=2, guidance=1.0)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "no solver of 2 evaluations is fitted to this checkpoint" in said
    assert trained(tmp_path / "never", fit_solver_from=None).pipeline.config.fitted == {}
    long = trained(tmp_path / "long", fit_solver_from=256)
    assert set(long.pipeline.config.fitted) <= set(map(str, FITTED_STEPS))
    assert "8" in long.pipeline.config.fitted
    assert long.default_steps(1.0) == 8
    assert long.default_steps(1.5) == 14
    caplog.clear()
    long.sample([0], [0], steps=8, guidance=1.0)
    short.sample([0], [0], steps=14, guidance=1.0)
    assert not caplog.records
    # What a base has seen is not in the budget of what starts from it.
    short.save(tmp_path / "saved")
    assert "8" in trained(tmp_path / "warm", base=str(tmp_path / "saved")).pipeline.config.fitted


def test_weights_are_those_of_least_squares() -> None:
    random = np.random.default_rng(0)
    for n_columns in (2, 3, 5):
        columns = [random.standard_normal(500) for _ in range(n_columns)]
        # Late estimates of an image are nearly the same.
        columns[-1] = columns[-2] + 1e-4 * columns[-1]
        target = random.standard_normal(500)
        expected = np.linalg.lstsq(np.stack(columns, 1), target)[0]
        assert np.allclose(_least_squares(columns, target), expected, rtol=1e-6)
