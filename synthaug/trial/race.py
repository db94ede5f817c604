"""The race on validation: every arm once, the better ones more often, the best of each side to the final.

Where time is short, things are left out in this order: the learning curve; seeds of the second round (fewer arms
enter it); arms from the end of the stated order (see `recipes`), as many on either side; then there is no verdict.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.progress import progress
from synthaug.trial.learners import Fit, Scores, run_fit
from synthaug.trial.recipes import (
    LOSSES,
    Loss,
    Recipe,
    combined_recipes,
    control,
    fewer_real,
    real_recipes,
    synthetic_recipes,
    without_twins,
)

logger = logging.getLogger(__name__)

# Seeds of the race. The final has seeds of its own, so that no arm is there for a lucky one.
FIRST_SEED, MORE_SEEDS = 0, (1, 2)
FINAL_SEED = 100
# At most this many arms a side, and of them this many in the second round.
MOST_ARMS, MOST_KEPT = 12, 4
LEAST_ARMS, LEAST_KEPT = 4, 2
SHARES = (0.25, 0.5)
# The real-only finalist must be within this of what four times the steps reach.
TRAINED_OUT = 0.01
TIMES_STEPS = 4
MOST_DOUBLINGS = 3
# The rest of the budget is for starting processes, resampling, sample quality and pictures.
_SHARE_FOR_FITS = 0.85


class OutOfTime(Exception):
    """The least that a verdict rests on does not fit into the budget."""

    def __init__(self, minutes: float) -> None:
        super().__init__(f"about {minutes:.1f} minutes are needed")
        self.minutes = minutes


@dataclass
class Lane:
    """One arm in the race."""

    recipe: Recipe
    scores: list[float] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    dropped: str | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Course:
    """What a race came to."""

    lanes: tuple[Lane, ...]
    real: Lane
    synthetic: Lane
    best_loss: Loss
    steps: int
    trained_out: tuple[float, float]  # gain of the real-only finalist from more steps, and its standard error
    curve: tuple[tuple[float, tuple[float, ...]], ...]  # share of real images, scores
    left_out: Mapping[str, str]

    @property
    def is_trained_out(self) -> bool:
        gain, error = self.trained_out
        return gain - error <= TRAINED_OUT


@dataclass(frozen=True)
class Rules:
    """What all arms of a trial have in common."""

    directory: Path
    metric: Callable[[np.ndarray, np.ndarray], float]  # labels, predicted labels
    labels: np.ndarray  # of the validation images
    fit: Fit  # recipe and seed are replaced
    workers: int
    seeds: int  # of the finalists
    seconds: float  # budget
    possible: Callable[[Recipe], str | None]  # why a recipe cannot be tried
    doublings: int = MOST_DOUBLINGS  # how often the steps may be doubled
    # Fits of this trial to their seconds. Time is counted by them and not by the clock, so that an interrupted trial
    # comes to the same decisions when it goes on.
    spent: dict[str, float] = field(default_factory=dict)

    def elapsed(self) -> float:
        return sum(self.spent.values()) / self.workers

    def left(self) -> float:
        return _SHARE_FOR_FITS * self.seconds - self.elapsed()


def race(rules: Rules, doses: Mapping[str, Mapping[int, int]], planned: Mapping[int, int]) -> Course:
    """Find the best real-only and the best synthetic arm on validation.

    Args:
        doses: See `synthetic_recipes`.
        planned: Label to number of images that SMOTE may add.

    Raises:
        OutOfTime: Not even the least fits into the budget.
    """
    for doubling in range(rules.doublings + 1):
        begun = rules.elapsed()
        course = _race_once(rules, doses, planned)
        took = rules.elapsed() - begun
        # Twice the steps take twice the time, and the final is still to come.
        if course.is_trained_out or doubling == rules.doublings or rules.left() < 2.5 * took:
            return course
        logger.info(
            "trial: the best real-only arm gains %.1f points from %d times the steps; all again with %d steps",
            100 * course.trained_out[0], TIMES_STEPS, 2 * course.steps,
        )  # fmt: skip
        rules = replace(rules, fit=replace(rules.fit, steps=2 * course.steps))
    raise AssertionError("the last doubling returns")


def final(rules: Rules, course: Course) -> dict[str, list[Scores]]:
    """Train the finalists and the two controls with seeds of their own, and look at the test split."""
    recipes = {
        "real": course.real.recipe,
        "synthetic": course.synthetic.recipe,
        "duplicates": control(course.synthetic.recipe, "duplicates"),
        "scrambled": control(course.synthetic.recipe, "scrambled"),
    }
    seeds = range(FINAL_SEED, FINAL_SEED + rules.seeds)
    fits = [
        replace(rules.fit, recipe=recipe, seed=seed, steps=course.steps, test=True)
        for seed in seeds
        for recipe in recipes.values()
    ]
    found = iter(_run(rules, fits, "trial: finalists on test"))
    together = [[next(found) for _ in recipes] for _ in seeds]
    return {name: [scores[number] for scores in together] for number, name in enumerate(recipes)}


def _race_once(rules: Rules, doses: Mapping[str, Mapping[int, int]], planned: Mapping[int, int]) -> Course:
    left_out: dict[str, str] = {}
    lanes: dict[str, list[Lane]] = {"real": [], "synthetic": []}
    begun = rules.elapsed()
    first = _enter(rules, lanes["real"], real_recipes(planned, None), LEAST_ARMS, left_out)
    by_loss = {lane.recipe.loss: lane for lane in first if lane.recipe.loss in LOSSES}
    best_loss: Loss = max(by_loss, key=lambda loss: by_loss[loss].mean) if by_loss else "oversampling"
    cost = (rules.elapsed() - begun) / max(1, len(first))

    real = _possible(rules, real_recipes(planned, best_loss)[len(real_recipes(planned, None)) :], left_out)
    synthetic = _possible(rules, without_twins(synthetic_recipes(doses, best_loss)), left_out)
    # Two places are kept for arms that follow from the doses.
    most = min(len(first) + len(real), len(synthetic) + 2, MOST_ARMS)
    n_arms, n_kept, curve = _what_fits(rules, cost, len(first), most, left_out)
    _enter(rules, lanes["real"], real, n_arms - len(first), left_out)
    n_combined = min(2, max(0, n_arms - LEAST_ARMS))
    _enter(rules, lanes["synthetic"], synthetic, n_arms - n_combined, left_out)
    if n_combined:
        tried = [lane.recipe for lane in sorted(lanes["synthetic"], key=lambda lane: -lane.mean)]
        best_real = max(lanes["real"], key=lambda lane: lane.mean).recipe
        per_class = _dose_per_class(rules, by_loss.get(best_loss, first[0]), lanes["synthetic"], best_loss)
        known = [lane.recipe for lane in lanes["synthetic"]]
        combined = without_twins([*known, *combined_recipes(tried, best_real, per_class, best_loss)])[len(known) :]
        rest = [recipe for recipe in synthetic if recipe.key not in {item.key for item in known}]
        more = _possible(rules, without_twins([*known, *combined[:n_combined], *rest])[len(known) :], left_out)
        _enter(rules, lanes["synthetic"], more, n_arms - len(lanes["synthetic"]), left_out)
    ran = {lane.recipe.key for runners in lanes.values() for lane in runners}
    for recipe in [*real, *synthetic]:
        if recipe.key not in ran:
            why = "left out for time" if n_arms < most else "left out, to search both sides equally hard"
            left_out.setdefault(recipe.key, why)

    finalists = {}
    for side, runners in lanes.items():
        order = sorted(runners, key=lambda lane: -lane.mean)
        for lane in order[n_kept:]:
            lane.dropped = "after the first round"
        _race_on(rules, order[:n_kept], MORE_SEEDS, f"trial: second round, {side}")
        best_lane = max(order[:n_kept], key=lambda lane: lane.mean)
        for lane in order[:n_kept]:
            if lane is not best_lane:
                lane.dropped = "after the second round"
        finalists[side] = best_lane
    trained_out = _check_training(rules, finalists["real"])
    return Course(
        lanes=(*lanes["real"], *lanes["synthetic"]),
        real=finalists["real"],
        synthetic=finalists["synthetic"],
        best_loss=best_loss,
        steps=rules.fit.steps,
        trained_out=trained_out,
        curve=_learning_curve(rules, finalists["real"]) if curve else (),
        left_out=left_out,
    )


def _what_fits(rules: Rules, cost: float, n_done: int, most: int, left_out: dict[str, str]) -> tuple[int, int, bool]:
    """Arms a side, arms of a side in the second round, and whether there is time for the learning curve."""
    n_race_seeds = 1 + len(MORE_SEEDS)

    def seconds(n_arms: int, n_kept: int, curve: bool) -> float:
        fits = 2 * n_arms - n_done + 2 * n_kept * len(MORE_SEEDS)
        fits += TIMES_STEPS * n_race_seeds + 4 * rules.seeds
        return cost * (fits + (len(SHARES) * n_race_seeds if curve else 0))

    least = min(LEAST_ARMS, most)
    choices = [(most, MOST_KEPT, True), (most, MOST_KEPT, False), (most, LEAST_KEPT, False)]
    choices += [(n_arms, LEAST_KEPT, False) for n_arms in range(most - 1, least - 1, -1)]
    for n_arms, n_kept, curve in choices:
        if seconds(n_arms, n_kept, curve) <= rules.left():
            if not curve:
                left_out["learning curve"] = "left out for time"
            if n_kept < MOST_KEPT:
                left_out["second round"] = f"{n_kept} instead of {MOST_KEPT} arms of each side, for time"
            return n_arms, min(n_kept, n_arms), curve
    raise OutOfTime((rules.elapsed() + seconds(least, LEAST_KEPT, False)) / _SHARE_FOR_FITS / 60)


def _possible(rules: Rules, recipes: Sequence[Recipe], left_out: dict[str, str]) -> list[Recipe]:
    possible = []
    for recipe in recipes:
        if (why := rules.possible(recipe)) is None:
            possible.append(recipe)
        else:
            left_out[recipe.key] = why
    return possible


def _enter(
    rules: Rules, lanes: list[Lane], recipes: Sequence[Recipe], number: int, left_out: dict[str, str]
) -> list[Lane]:
    """Let the first `number` recipes run once."""
    entered = [Lane(recipe) for recipe in _possible(rules, recipes, left_out)[: max(0, number)]]
    side = entered[0].recipe.side if entered else ""
    _race_on(rules, entered, (FIRST_SEED,), f"trial: first round, {side}")
    lanes.extend(entered)
    return entered


def _race_on(rules: Rules, lanes: Sequence[Lane], seeds: Sequence[int], title: str) -> None:
    fits = [replace(rules.fit, recipe=lane.recipe, seed=seed) for seed in seeds for lane in lanes]
    for number, scores in enumerate(_run(rules, fits, title)):
        lane = lanes[number % len(lanes)]
        lane.scores.append(rules.metric(rules.labels, scores.validation.argmax(1)))
        lane.probabilities.append(scores.validation)


def _check_training(rules: Rules, lane: Lane) -> tuple[float, float]:
    """How much the real-only finalist gains from more steps: mean over the race's seeds, and its standard error."""
    longer = [
        replace(rules.fit, recipe=lane.recipe, seed=seed, steps=TIMES_STEPS * rules.fit.steps)
        for seed in (FIRST_SEED, *MORE_SEEDS)
    ]
    found = _run(rules, longer, f"trial: {TIMES_STEPS} times the steps")
    gains = [
        rules.metric(rules.labels, scores.validation.argmax(1)) - before
        for scores, before in zip(found, lane.scores, strict=True)
    ]
    return float(np.mean(gains)), float(np.std(gains, ddof=1) / np.sqrt(len(gains)))


def _learning_curve(rules: Rules, lane: Lane) -> tuple[tuple[float, tuple[float, ...]], ...]:
    seeds = (FIRST_SEED, *MORE_SEEDS)
    # The last is the arm itself, unless SMOTE is taken out of it; its fits are there already then.
    shares = (*SHARES, 1.0)
    points = [Lane(fewer_real(lane.recipe, share)) for share in shares]
    _race_on(rules, points, seeds, "trial: fewer real images")
    return tuple((share, tuple(point.scores)) for share, point in zip(shares, points, strict=True))


def _dose_per_class(rules: Rules, zero: Lane, lanes: Sequence[Lane], best_loss: Loss) -> dict[int, int]:
    """The dose at which each class's own F1 on validation was best; the lower of equals, and zero is one of them."""
    tried = [
        lane
        for lane in lanes
        if lane.recipe.loss == best_loss and not lane.recipe.pretrain and lane.recipe.added_weight == 1
    ]
    tried.sort(key=lambda lane: lane.recipe.n_added)
    labels = sorted({label for lane in tried for label, _ in lane.recipe.dose})
    best: dict[int, int] = {}
    for label in labels:
        scores = [(_f1(rules.labels, lane.probabilities[0].argmax(1), label), lane) for lane in (zero, *tried)]
        top = max(score for score, _ in scores)
        best[label] = dict(next(lane for score, lane in scores if score == top).recipe.dose).get(label, 0)
    return best


def _f1(labels: np.ndarray, predicted: np.ndarray, label: int) -> float:
    hit = int(((labels == label) & (predicted == label)).sum())
    return 2 * hit / max(1, int((labels == label).sum()) + int((predicted == label).sum()))


def _run(rules: Rules, fits: Sequence[Fit], title: str) -> list[Scores]:
    """Run fits, several at a time, and return their scores in order; what was run before is read."""
    waiting = [fit for fit in fits if not (rules.directory / "fits" / fit.file_name).is_file()]
    if waiting:
        with progress(title, len(waiting), "fits") as bar:
            if rules.workers == 1 or len(waiting) == 1:
                for fit in waiting:
                    run_fit(rules.directory, fit)
                    bar.update(1)
            else:
                for _ in _side_by_side(rules, waiting):
                    bar.update(1)
    found = [run_fit(rules.directory, fit) for fit in fits]
    rules.spent.update({fit.file_name: scores.seconds for fit, scores in zip(fits, found, strict=True)})
    return found


def _side_by_side(rules: Rules, fits: Sequence[Fit]) -> Any:
    from joblib import Parallel, delayed

    # Processes, since a fit is full of small steps that one interpreter would run after each other.
    return Parallel(n_jobs=min(rules.workers, len(fits)), return_as="generator_unordered", batch_size=1)(
        delayed(_fit_in_worker)(rules.directory, fit, os.getpid()) for fit in fits
    )


def _fit_in_worker(directory: Path, fit: Fit, parent: int) -> None:
    """Scores go through the file. A worker ends with the process that it works for, also when that was killed."""
    global _watched
    if _watched != parent and os.getpid() != parent:
        _watched = parent
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    run_fit(directory, fit)


_watched: int | None = None


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
