"""benchmarks.recipe: how a variant is read, and what its coverage is the mean of."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import recipe
from synthaug.diffusion import edm


def test_a_variant_is_settings_and_constants() -> None:
    text = "augment={from_repeats: 150};dropout=0;synthaug.diffusion.edm:SIGMA_LOG_MEAN=-0.2"
    settings, constants = recipe.parse_variant(text)
    assert settings == {"augment": {"from_repeats": 150}, "dropout": 0}
    assert constants == {"synthaug.diffusion.edm:SIGMA_LOG_MEAN": -0.2}
    assert recipe.parse_variant("") == ({}, {})


def test_a_variant_ends_where_it_ends() -> None:
    before = edm.SIGMA_LOG_MEAN
    with recipe.taken_for({}, {"synthaug.diffusion.edm:SIGMA_LOG_MEAN": before + 1}):
        assert before + 1 == edm.SIGMA_LOG_MEAN
    assert before == edm.SIGMA_LOG_MEAN


@pytest.mark.parametrize("variant", ["optimizer=sgd", "network=gan:3"])
def test_an_unknown_lead_is_said_by_name(variant: str) -> None:
    with pytest.raises(SystemExit, match=variant), recipe.taken_for(*recipe.parse_variant(variant)):
        pass


@pytest.mark.parametrize(("samples", "draws"), [(1200, 6), (400, 2), (250, 1), (30, 1), (10, 0)])
def test_coverage_is_of_draws_of_two_hundred(samples: int, draws: int) -> None:
    random = np.random.default_rng(0)
    real, drawn = (random.normal(size=(count, 4)).astype(np.float32) for count in (600, samples))
    found = recipe._coverages(real, drawn)
    assert len(found) == draws
    # Of one distribution it is 1 but for chance, however many there are.
    assert not found or abs(np.mean(found) - 1) < 0.2
