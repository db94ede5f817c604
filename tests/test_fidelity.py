"""Fidelity: figures against brute force, what collapse and distance do to them, how often the interval of KID holds."""

from __future__ import annotations

import numpy as np
import pytest

from synthaug.quality import fidelity
from synthaug.quality.coverage import LEAST_REAL, LEAST_SAMPLES, expected_coverage, neighbours_for
from synthaug.quality.fidelity import kernel_distance, sample_quality


def normal(seed: int, n: int, d: int = 8, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(2))


def radii(points: np.ndarray, k: int) -> np.ndarray:
    return np.sort(distances(points, points), 1)[:, k]  # place 0 is the point itself


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(np.float64) @ b.astype(np.float64) / len(a) + 1) ** 3)

    xx = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [kernel(a, b) for a in x for b in y]
    return float(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy))


@pytest.mark.parametrize(("n", "m", "shift"), [(5, 20, 0.0), (23, 41, 0.5), (47, 30, 0.3), (120, 60, 1.0)])
def test_figures_are_those_of_brute_force(n: int, m: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_TILE", 7)  # several tiles, the last one short
    real, samples = normal(n, n) + 3, normal(m, m, shift=shift) + 3
    found = sample_quality(real, samples)
    k, apart = neighbours_for(n), distances(real, samples)
    in_real, in_samples = apart <= radii(real, k)[:, None], apart <= radii(samples, k)[None]
    assert (found.n_real, found.n_samples, found.unavailable) == (n, m, None)
    assert found.precision == pytest.approx(in_real.any(0).mean())
    assert found.recall == pytest.approx(in_samples.any(1).mean())
    assert found.density == pytest.approx(in_real.sum() / (k * m))
    assert found.coverage == pytest.approx(in_real.any(1).mean())
    assert found.kid is not None
    assert found.kid.estimate == pytest.approx(plain_kid(real, samples), rel=1e-6, abs=1e-6)
    assert found.kid.low <= found.kid.estimate <= found.kid.high


def test_tiles_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    real, samples = normal(1, 40), normal(2, 33, shift=0.2)
    whole = kernel_distance(real, samples)
    monkeypatch.setattr(fidelity, "_TILE", 9)
    tiled = kernel_distance(real, samples)
    np.testing.assert_allclose(list(tiled.model_dump().values()), list(whole.model_dump().values()), rtol=1e-9)


def test_samples_from_the_distribution_of_the_real_images_look_real() -> None:
    found = sample_quality(normal(1, 400, d=4), normal(2, 400, d=4))
    assert found.precision is not None
    assert found.precision > 0.93
    assert found.recall is not None
    assert found.recall > 0.93
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.coverage == pytest.approx(expected_coverage(400, 400, 5), abs=0.04)
    assert found.kid is not None
    assert found.kid.low <= 0 < found.kid.high
    assert abs(found.kid.estimate) < 0.05


def test_one_image_repeated_has_precision_but_no_recall_and_no_coverage() -> None:
    real = normal(3, 100)
    samples = real[:1] + 1e-3 * normal(4, 60)
    found = sample_quality(real, samples)
    assert found.precision == 1
    assert found.recall is not None
    assert found.recall <= 0.01
    assert found.coverage is not None
    assert found.coverage < 0.15
    assert found.kid is not None
    assert found.kid.low > 0


def test_exact_copies_of_one_image_are_measured_without_a_warning() -> None:
    real = normal(3, 100)
    found = sample_quality(real, np.repeat(real[:1], 60, axis=0))
    assert (found.precision, found.recall) == (1, 0.01)  # balls of radius 0 hold the one image alone
    same = np.ones((20, 4), dtype=np.float32)
    found = sample_quality(same, same)
    assert found.kid is not None
    assert [found.kid.low, found.kid.estimate, found.kid.high] == pytest.approx([0, 0, 0], abs=1e-6)


def test_far_samples_have_nothing_in_common_with_real_images() -> None:
    found = sample_quality(normal(5, 60), normal(6, 60, shift=20))
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)
    assert found.kid is not None
    assert found.kid.low > 0


def test_balls_do_not_care_where_the_origin_is() -> None:
    real, samples = normal(7, 60), normal(8, 60, shift=0.3)
    near, far = sample_quality(real, samples), sample_quality(real + 1000, samples + 1000)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(far, name) == pytest.approx(getattr(near, name), abs=0.02)


# ---------------------------------------------------------------- the interval of KID


def draw(kind: str, random: np.random.Generator, n: int, shift: float) -> np.ndarray:
    if kind == "normal":  # many directions: the scatter of KID is nearly normal
        return random.normal(size=(n, 32)) + shift
    if kind == "rectified":  # few directions, like features of a small network
        mixing = np.random.default_rng(7).normal(size=(4, 32))
        return np.maximum((random.normal(size=(n, 4)) + shift) @ mixing, 0)
    hump = 3 * random.integers(0, 2, size=(n, 1))  # one direction: the scatter is as skewed as it can be
    return np.maximum(hump + 0.5 * random.normal(size=(n, 16)) + shift, 0)


@pytest.mark.parametrize("kind", ["normal", "rectified", "humps"])
@pytest.mark.parametrize(("n", "m"), [(12, 40), (60, 80)])
def test_the_interval_covers_0_in_about_95_of_100_cases(kind: str, n: int, m: int) -> None:
    random, repeats = np.random.default_rng([n, m]), 300
    covered, above = 0, 0
    for _ in range(repeats):
        kid = kernel_distance(draw(kind, random, n, 0), draw(kind, random, m, 0))
        covered += kid.low <= 0 <= kid.high
        above += kid.low > 0
    assert 0.91 <= covered / repeats <= 0.99
    assert covered + above == repeats  # KID is not negative, so no interval lies wholly below 0


@pytest.mark.parametrize(("kind", "shift"), [("normal", 0.3), ("rectified", 0.5)])
def test_the_interval_covers_a_distance_that_is_not_0(kind: str, shift: float) -> None:
    random = np.random.default_rng(11)
    truth = np.mean(
        [kernel_distance(draw(kind, random, 1000, 0), draw(kind, random, 1000, shift)).estimate for _ in range(4)]
    )
    found = [kernel_distance(draw(kind, random, 40, 0), draw(kind, random, 60, shift)) for _ in range(300)]
    assert np.mean([kid.low <= truth <= kid.high for kid in found]) >= 0.90
    assert np.mean([kid.low > 0 for kid in found]) > 0.5
    # The estimate has no bias, whatever the counts.
    error = np.std([kid.estimate for kid in found]) / len(found) ** 0.5
    assert np.mean([kid.estimate for kid in found]) == pytest.approx(truth, abs=4 * error)


def test_the_interval_narrows_with_the_number_of_images() -> None:
    wide, narrow = (kernel_distance(normal(1, n, shift=0.3), normal(2, n)) for n in (30, 300))
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2


# ---------------------------------------------------------------- what is refused, left out, or cut


def test_unavailable_with_the_numbers_below_the_stated_counts() -> None:
    few = sample_quality(normal(0, LEAST_REAL - 1), normal(1, LEAST_SAMPLES))
    assert few.unavailable == "4 real images and 20 samples; at least 5 and 20 are needed"
    assert (few.precision, few.recall, few.density, few.coverage, few.kid) == (None,) * 5
    assert sample_quality(normal(0, LEAST_REAL), normal(1, LEAST_SAMPLES - 1)).unavailable is not None
    assert sample_quality(normal(0, 0), normal(1, 0)).n_real == 0
    assert sample_quality(normal(0, LEAST_REAL), normal(1, LEAST_SAMPLES)).unavailable is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    whole, broken = normal(0, 30), normal(1, 30)
    broken[7, 2] = value
    with pytest.raises(ValueError, match="features of samples are not finite in 1 of 30 rows, first in row 7"):
        sample_quality(whole, broken)
    with pytest.raises(ValueError, match="features of real images are not finite"):
        sample_quality(broken, whole)


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="features of real images have 8 values, those of samples 5"):
        sample_quality(normal(0, 30), normal(1, 30, d=5))
    with pytest.raises(ValueError, match=r"features of samples have shape \[30\]; it must be \[n, d\]"):
        sample_quality(normal(0, 30), normal(1, 30)[:, 0])


def test_many_rows_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "MOST_ROWS", 50)
    real, samples = normal(0, 100), normal(1, 150)
    found = sample_quality(real, samples)
    assert found == sample_quality(real[::2], samples[::3])
    assert (found.n_real, found.n_samples) == (50, 50)


def test_the_same_figures_again_and_the_features_untouched() -> None:
    real, samples = normal(0, 50), normal(1, 50)
    copies = real.copy(), samples.copy()
    assert sample_quality(real, samples, seed=1) == sample_quality(real, samples, seed=2)
    np.testing.assert_array_equal(real, copies[0])
    np.testing.assert_array_equal(samples, copies[1])
