"""The race: who is chosen, what is left out for time and in which order, what happens to an arm that breaks.

Fits are stood in for by a table of what each arm is worth; the arithmetic of the race is the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from synthaug.errors import TrainingError
from synthaug.trial import race as module
from synthaug.trial.learners import Fit, Scores
from synthaug.trial.race import CHECK_SEEDS, FINAL_SEED, LEAST_SEEDS, Course, OutOfTime, Rules, final, race
from synthaug.trial.recipes import WEIGHT_DECAY, Recipe, differs_in_samples_alone

LABELS = np.repeat([0, 1], 500)
DOSES = {"0.25x": {1: 5}, "1x": {1: 20}, "3x": {1: 60}, "plan": {1: 200}}
SMOTE = {1: 200}
Worth = Callable[[Fit], float]


@pytest.fixture
def ran() -> list[Fit]:
    """Every fit that was asked for."""
    return []


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[Fit]) -> Callable[..., Rules]:
    """`rules(worth, seconds=1)`: a fit of `seconds` recognises the share `worth(fit)` of class 1, the first of its
    images; samples alone the first ones from image `others` on."""

    def make(worth: Worth, seconds: float = 1.0, minutes: float = 1e6, others: int = 0, **changes: object) -> Rules:
        def run_fit(directory: Path, fit: Fit) -> Scores:
            ran.append(fit)
            share = worth(fit)
            found = np.zeros((len(LABELS), 2), np.float32)
            found[:500, 0] = 1
            first = others if fit.recipe.key == "synthetic 1x" else 0
            found[500:, 1] = (np.arange(500) - first) % 500 < round(500 * share)
            found[500:, 0] = 1 - found[500:, 1]
            return Scores(found, found if fit.test else found[:0], seconds * fit.steps / 100)

        monkeypatch.setattr(module, "run_fit", run_fit)
        values = {
            "directory": tmp_path,
            "metric": "balanced_accuracy",
            "labels": LABELS,
            "clusters": np.arange(len(LABELS)),
            "fit": Fit(Recipe("", "", "real"), 0, 100, 64),
            "workers": 1,
            "seeds": 10,
            "seconds": 60 * minutes,
            "possible": lambda recipe: None,
            "smote": SMOTE,
            **changes,
        }
        return Rules(**values)  # type: ignore[arg-type]

    return make


def by_key(**worth: float) -> Worth:
    """What arms are worth by a part of their key; 0.5 for the others."""
    table = {key.replace("_", " "): value for key, value in worth.items()}
    return lambda fit: max([value for key, value in table.items() if key in fit.recipe.key], default=0.5)


def keys(course: Course, side: str) -> list[str]:
    return [lane.recipe.key for lane in course.lanes if lane.recipe.side == side]


def test_the_best_of_each_side_is_chosen(rules: Callable[..., Rules]) -> None:
    course = race(rules(by_key(cutmix=0.7, synthetic_3x=0.8)), DOSES)
    assert course.real.recipe.mix == "cutmix"
    assert course.synthetic.recipe.dose == ((1, 60),)
    assert course.is_trained_out
    assert len(course.real.scores) == len(course.synthetic.scores) == 3
    kept = [lane for lane in course.lanes if len(lane.scores) == 3]
    assert len(kept) == 8
    assert [lane.dropped for lane in course.lanes].count(None) == 2
    assert {len(keys(course, side)) for side in ("real", "synthetic")} == {12}
    assert course.curve[-1] == (1.0, tuple(course.real.scores))


def test_the_loss_that_serves_the_real_images_best_is_taken_for_the_synthetic_ones(
    rules: Callable[..., Rules],
) -> None:
    course = race(rules(by_key(class_weights=0.6)), DOSES)
    assert course.best_loss == "class weights"
    assert {lane.recipe.loss for lane in course.lanes if lane.recipe.side == "synthetic"} == {"plain", "class weights"}


def test_samples_are_tried_in_what_the_real_only_side_came_to(rules: Callable[..., Rules]) -> None:
    def worth(fit: Fit) -> float:
        # CutMix wins the first round, and MixUp by more seeds.
        recipe = fit.recipe
        if recipe.added != "none" or recipe.strong or recipe.weight_decay != WEIGHT_DECAY:
            return 0.5
        return {"cutmix": 0.8 if fit.seed == 0 else 0.3, "mixup": 0.7}.get(recipe.mix, 0.5)

    course = race(rules(worth), DOSES)
    assert course.real.recipe.mix == "mixup"
    beside = [lane for lane in course.lanes if differs_in_samples_alone(lane.recipe, course.real.recipe)]
    assert sorted(lane.recipe.n_added for lane in beside) == [5, 20, 60, 200]
    mixed = {lane.recipe.mix for lane in course.lanes if lane.recipe.side == "synthetic"}
    assert mixed == {"none", "mixup"}


def _with_a_lead(leads: tuple[float, float, float]) -> Worth:
    """MixUp serves the real images; samples alone are ahead of samples with MixUp by these, seed by seed."""

    def worth(fit: Fit) -> float:
        recipe = fit.recipe
        if recipe.added == "none":
            return 0.6 if recipe.mix == "mixup" and not recipe.strong else 0.5
        if recipe.key == "synthetic 1x":
            return 0.7 + (leads[fit.seed] if fit.seed < 3 else 0)
        if recipe.key == "synthetic 1x + mixup + oversampling":
            return 0.7
        # Enough of these to fill the second round, all of them ahead of the one with MixUp at the first seed.
        return 0.72 if fit.seed == 0 and recipe.mix == "none" else 0.4

    return worth


@pytest.mark.parametrize(
    ("leads", "chosen"),
    [
        # Means 0.02, 0.02, 0, −0.02; standard errors 0.0306, 0, 0, 0.012.
        ((0.08, 0.0, -0.02), "synthetic 1x + mixup + oversampling"),
        ((0.02, 0.02, 0.02), "synthetic 1x"),
        ((0.0, 0.0, 0.0), "synthetic 1x + mixup + oversampling"),
        ((-0.02, 0.0, -0.04), "synthetic 1x + mixup + oversampling"),
    ],
)
def test_what_seeds_cannot_tell_apart_is_decided_for_the_best_real_only_arm_with_samples(
    rules: Callable[..., Rules], leads: tuple[float, float, float], chosen: str
) -> None:
    course = race(rules(_with_a_lead(leads)), DOSES)
    assert course.real.recipe.key == "mixup + oversampling"
    assert course.synthetic.recipe.key == chosen
    dropped = {lane.recipe.key: lane.dropped for lane in course.lanes if lane.dropped}
    assert chosen not in dropped
    if leads[0] == 0.08:
        assert "ahead of 'synthetic 1x + mixup + oversampling' by 1.0 points" in str(dropped["synthetic 1x"])


@pytest.mark.parametrize(("others", "chosen"), [(0, "synthetic 1x"), (100, "synthetic 1x + mixup + oversampling")])
def test_what_validation_images_cannot_tell_apart_is_decided_like_it(
    rules: Callable[..., Rules], others: int, chosen: str
) -> None:
    # Ahead by 0.01 at every seed: 10 images more of the same ones, or 110 others for 100.
    course = race(rules(_with_a_lead((0.02, 0.02, 0.02)), others=others), DOSES)
    assert course.synthetic.recipe.key == chosen


def test_a_class_gets_the_dose_that_served_it(rules: Callable[..., Rules]) -> None:
    doses = {"1x": {0: 10, 1: 20}, "plan": {0: 50, 1: 200}}

    def worth(fit: Fit) -> float:
        # Class 1 gains by the largest dose; class 0 is recognised in full anyway and gets none.
        return 0.5 + 0.3 * (dict(fit.recipe.dose).get(1, 0) == 200) * (fit.recipe.loss == "oversampling")

    course = race(rules(worth), doses)
    mixed = [lane.recipe.dose for lane in course.lanes if lane.recipe.key.startswith("synthetic per class")]
    assert mixed in ([], [((1, 200),)], [((0, 50), (1, 200))])


def test_only_finalists_look_at_test_and_with_seeds_of_their_own(rules: Callable[..., Rules], ran: list[Fit]) -> None:
    given = rules(by_key())
    course = race(given, DOSES)
    assert not any(fit.test for fit in ran)
    assert {fit.seed for fit in ran} == {0, 1, 2, *CHECK_SEEDS}
    ran.clear()
    found = final(given, course)
    assert {fit.seed for fit in ran} == set(range(FINAL_SEED, FINAL_SEED + 10))
    assert all(fit.test for fit in ran)
    assert set(found) == {"real", "synthetic", "duplicates", "scrambled"}
    assert {len(scores) for scores in found.values()} == {10}
    by_added = {fit.recipe.added: fit.recipe.dose for fit in ran if fit.recipe.side == "control"}
    assert by_added == dict.fromkeys(("duplicates", "scrambled"), course.synthetic.recipe.dose)


@pytest.mark.parametrize(
    ("minutes", "left_out", "seeds", "arms"),
    [
        (1000, set(), 10, 12),
        (2.3, {"learning curve"}, 10, 12),
        (2.0, {"learning curve", "seeds of the finalists"}, 5, 12),
        (1.5, {"learning curve", "seeds of the finalists", "second round"}, 5, None),
    ],
)
def test_what_is_left_out_for_time(
    rules: Callable[..., Rules], minutes: float, left_out: set[str], seeds: int, arms: int | None
) -> None:
    given = rules(by_key(), minutes=minutes)
    course = race(given, DOSES)
    assert left_out <= set(course.left_out)
    assert ("learning curve" in course.left_out) == ("learning curve" in left_out)
    assert ("second round" in course.left_out) == ("second round" in left_out)
    assert course.seeds == seeds
    assert (course.curve == ()) == ("learning curve" in left_out)
    found = {side: len(keys(course, side)) for side in ("real", "synthetic")}
    assert found["real"] == found["synthetic"]
    if arms:
        assert found["real"] == arms
    else:
        assert 4 <= found["real"] < 12
        # Dropped from the end of the stated order: the losses and the main doses stay.
        assert keys(course, "real")[:4] == ["real only", "oversampling", "balanced softmax", "class weights"]
    final(given, course)
    assert given.elapsed() <= 60 * minutes


def test_where_the_least_does_not_fit_it_says_what_it_takes(rules: Callable[..., Rules]) -> None:
    with pytest.raises(OutOfTime) as caught:
        race(rules(by_key(), minutes=0.5), DOSES)
    needed = caught.value.minutes
    assert 0.5 < needed < 2
    assert race(rules(by_key(), minutes=needed * 1.01), DOSES).seeds == LEAST_SEEDS


def test_an_arm_that_is_not_trained_out_is_given_more_steps(rules: Callable[..., Rules]) -> None:
    def worth(fit: Fit) -> float:
        return min(0.9, 0.5 + 0.1 * np.log2(fit.steps / 100))

    course = race(rules(worth), DOSES)
    assert course.steps == 800
    # Without the time for it the course stands, and says so.
    short = race(rules(worth, minutes=3), DOSES)
    assert short.steps == 100
    assert not short.is_trained_out
    assert short.trained_out[0] == pytest.approx(0.1)
    assert race(rules(worth, doublings=0), DOSES).steps == 100


def test_more_minutes_never_lose_the_course(rules: Callable[..., Rules]) -> None:
    for minutes in np.arange(2, 14, 0.5):
        given = rules(lambda fit: 0.5 + 0.05 * np.log2(fit.steps / 100), minutes=float(minutes), seeds=20)
        course = race(given, DOSES)
        final(given, course)
        assert given.elapsed() <= 60 * minutes * 1.2


def test_an_arm_that_cannot_be_trained_is_dropped_and_the_others_go_on(
    rules: Callable[..., Rules], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rules(by_key(mixup=0.9))
    works = module.run_fit

    def breaks(directory: Path, fit: Fit) -> Scores:
        if fit.recipe.mix == "mixup":
            raise TrainingError("the loss is nan")
        return works(directory, fit)

    monkeypatch.setattr(module, "run_fit", breaks)
    course = race(given, DOSES)
    broken = [lane for lane in course.lanes if lane.recipe.mix == "mixup"]
    assert broken
    assert {lane.dropped for lane in broken} == {"could not be trained: the loss is nan"}
    assert course.real.recipe.mix != "mixup"

    def all_break(directory: Path, fit: Fit) -> Scores:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(module, "run_fit", all_break)
    with pytest.raises(TrainingError, match="no arm of the trial could be trained"):
        race(given, DOSES)


def test_time_is_that_of_the_fits_shared_by_the_workers(rules: Callable[..., Rules], tmp_path: Path) -> None:
    (tmp_path / "fits").mkdir()
    for workers, seconds in ((1, 3.0), (2, 1.5), (100, 1.0)):
        given = rules(by_key(), workers=workers)
        lane = module.Lane(Recipe("a", "", "real"))
        # Fits that are there already are read in this process, whatever the number of workers.
        for seed in (0, 1, 2):
            fit = replace(given.fit, recipe=lane.recipe, seed=seed)
            (tmp_path / "fits" / fit.file_name).touch()
        module._race_on(given, [lane], (0, 1, 2), "")
        assert given.elapsed() == seconds
