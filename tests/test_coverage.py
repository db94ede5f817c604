"""Coverage: the closed form against simulation and counting by hand, and what collapse does to it."""

from __future__ import annotations

import numpy as np
import pytest

from synthaug.quality.arithmetic import nearest
from synthaug.quality.coverage import LEAST_REAL, LEAST_SAMPLES, coverage, expected_coverage, neighbours_for


@pytest.mark.parametrize(("n_real", "n_samples", "k"), [(12, 25, 1), (12, 40, 2), (40, 20, 5), (30, 30, 3)])
def test_expectation_is_what_equal_distributions_reach(n_real: int, n_samples: int, k: int) -> None:
    random = np.random.default_rng(n_real + n_samples)
    values = []
    for _ in range(300):
        drawn = random.normal(size=(n_real + n_samples, 3)).astype(np.float32)
        found = coverage(drawn[:n_real], drawn[n_real:], k)
        assert found is not None
        values.append(found.value)
    error = np.std(values) / np.sqrt(len(values))
    assert np.mean(values) == pytest.approx(expected_coverage(n_real, n_samples, k), abs=4 * error)


def test_expectation_by_hand() -> None:
    # N = 3, k = 1: the nearest of the other 2 real and M samples is real with probability 2 / (M + 2).
    assert expected_coverage(3, 4, 1) == pytest.approx(1 - 2 / 6)
    assert expected_coverage(10, 0, 3) == 0
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        expected_coverage(5, 10, 5)


def test_coverage_by_hand() -> None:
    real = np.array([[0.0], [1.0], [3.0], [6.0], [10.0]], dtype=np.float32)  # radii, k = 1: 1, 1, 2, 3, 4
    samples = np.full((LEAST_SAMPLES, 1), 6.5, dtype=np.float32)  # distances: 6.5, 5.5, 3.5, 0.5, 3.5
    found = coverage(real, samples, k=1)
    assert found is not None
    assert found.value == pytest.approx(2 / 5)


@pytest.mark.parametrize("n_real", [10, 25, 200])
def test_a_collapsed_class_is_far_below_expectation_and_an_honest_one_near_it(n_real: int) -> None:
    random = np.random.default_rng(0)
    honest, collapsed = [], []
    for _ in range(20):
        real, fresh = random.normal(size=(n_real, 16)), random.normal(size=(60, 16))
        one_place = fresh[:1] + 0.01 * random.normal(size=(60, 16))
        for samples, values in ((fresh, honest), (one_place, collapsed)):
            found = coverage(real.astype(np.float32), samples.astype(np.float32))
            assert found is not None
            values.append(found.relative)
    assert np.mean(honest) == pytest.approx(1, abs=0.06)
    assert np.mean(collapsed) < 0.3


def test_unavailable_below_the_stated_counts() -> None:
    many = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    assert coverage(many[: LEAST_REAL - 1], many) is None
    assert coverage(many, many[: LEAST_SAMPLES - 1]) is None
    assert coverage(many[:LEAST_REAL], many[:LEAST_SAMPLES]) is not None


def test_neighbours_shrink_with_the_class() -> None:
    assert [neighbours_for(n) for n in (5, 39, 40, 99, 100, 1000)] == [1, 1, 2, 4, 5, 5]


def test_far_from_the_origin_the_same_figure() -> None:
    random = np.random.default_rng(3)
    real, samples = random.normal(size=(2, 50, 4)).astype(np.float32)
    near, far = coverage(real, samples), coverage(real + 1000, samples + 1000)
    assert near is not None
    assert far is not None
    assert far.value == pytest.approx(near.value, abs=0.021)


def test_nearest_is_exact_across_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthaug.quality.arithmetic._REFERENCE_TILE", 7)
    monkeypatch.setattr("synthaug.quality.arithmetic._QUERY_TILE", 5)
    points = np.random.default_rng(1).normal(size=(33, 6)).astype(np.float32)
    every = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2))
    np.fill_diagonal(every, np.inf)
    distances, rows = nearest(points, points, 4, exclude_self=True)
    np.testing.assert_allclose(distances, np.sort(every, 1)[:, :4], rtol=1e-5)
    np.testing.assert_array_equal(rows, np.argsort(every, 1)[:, :4])
    with pytest.raises(ValueError, match="33 nearest neighbours were asked for among 32"):
        nearest(points, points, 33, exclude_self=True)
