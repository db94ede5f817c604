"""The race on validation: every arm once, the better ones more often, the best of each side to the final.

Where time is short, things are left out in this order: the learning curve; seeds of the finalists beyond five; places
in the second round; arms from the end of the stated order (see `recipes`), as many on either side; then there is no
verdict.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, overload

import numpy as np

from synthaug.errors import TrainingError
from synthaug.progress import progress
from synthaug.trial import statistics
from synthaug.trial.learners import Fit, Scores, run_fit
from synthaug.trial.recipes import (
    LOSSES,
    Loss,
    Recipe,
    combined_recipes,
    control,
    differs_in_samples_alone,
    fewer_real,
    real_recipes,
    synthetic_recipes,
    without_twins,
)

logger = logging.getLogger(__name__)

# Seeds of the race. The check on training and the final have seeds of their own: the winner of a race owes something to
# the luck of its seeds, and would look nearer to its best than it is.
FIRST_SEED, MORE_SEEDS = 0, (1, 2)
CHECK_SEEDS = (10, 11, 12)
FINAL_SEED = 100
# At most this many arms a side, and of them this many in the second round.
MOST_ARMS, MOST_KEPT = 12, 4
LEAST_ARMS, LEAST_KEPT = 4, 2
SHARES = (0.25, 0.5)
# The real-only finalist must be within this of what four times the steps reach.
TRAINED_OUT = 0.01
TIMES_STEPS = 4
MOST_DOUBLINGS = 3
# The arms that costs are measured on are the cheapest ones.
_DEARER = 1.2
# Real-only, synthetic and two controls.
_N_FINALISTS = 4
# Ten seeds narrow the intervals, five are the least (docs/log.md, the honesty of the verdict).
LEAST_SEEDS = 5
# The rest of the budget is for starting processes, resampling, sample quality and pictures.
_SHARE_FOR_FITS = 0.85


class OutOfTime(Exception):
    """The least that a verdict rests on does not fit into the budget."""

    def __init__(self, minutes: float) -> None:
        super().__init__(f"about {minutes:.1f} minutes are needed")
        self.minutes = minutes


@dataclass(eq=False)
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
    cost: float  # seconds of the budget that a fit takes
    seeds: int  # for the finalists
    left_out: Mapping[str, str]

    @property
    def is_trained_out(self) -> bool:
        return self.trained_out[0] <= TRAINED_OUT


@dataclass(frozen=True)
class Rules:
    """What all arms of a trial have in common."""

    directory: Path
    metric: statistics.Metric
    labels: np.ndarray  # of the validation images
    clusters: np.ndarray  # of the validation images: those of one group share a number
    fit: Fit  # recipe and seed are replaced
    workers: int
    seeds: int  # of the finalists, where there is time
    seconds: float  # budget
    possible: Callable[[Recipe], str | None]  # why a recipe cannot be tried
    smote: Mapping[int, int]  # label to number of images that SMOTE made
    doublings: int = MOST_DOUBLINGS  # how often the steps may be doubled
    # Seconds of each series of fits, counted by what the fits took and not by the clock, so that an interrupted trial
    # comes to the same decisions when it goes on.
    spent: list[float] = field(default_factory=list)

    def elapsed(self) -> float:
        return sum(self.spent)

    def score(self, scores: Scores) -> float:
        return statistics.METRICS[self.metric](self.labels, scores.validation.argmax(1))

    def left(self) -> float:
        return _SHARE_FOR_FITS * self.seconds - self.elapsed()


def race(rules: Rules, doses: Mapping[str, Mapping[int, int]]) -> Course:
    """Find the best real-only and the best synthetic arm on validation.

    Args:
        doses: See `synthetic_recipes`.

    Raises:
        OutOfTime: Not even the least fits into the budget.
    """
    before: Course | None = None
    for _ in range(rules.doublings + 1):
        begun = rules.elapsed()
        try:
            course = _race_once(rules, doses)
        except OutOfTime:
            if before is None:
                raise
            return before
        # Twice the steps take twice the time, and so does the final after them.
        needed = 2 * (rules.elapsed() - begun + _N_FINALISTS * course.seeds * course.cost)
        if course.is_trained_out or rules.left() < needed:
            return course
        logger.info(
            "trial: the best real-only arm gains %.1f points from %d times the steps; all again with %d steps",
            100 * course.trained_out[0], TIMES_STEPS, 2 * course.steps,
        )  # fmt: skip
        before, rules = course, replace(rules, fit=replace(rules.fit, steps=2 * course.steps))
    return course


def final(rules: Rules, course: Course) -> dict[str, list[Scores]]:
    """Train the finalists and the two controls with seeds of their own, and look at the test split."""
    recipes = {
        "real": course.real.recipe,
        "synthetic": course.synthetic.recipe,
        "duplicates": control(course.synthetic.recipe, "duplicates"),
        "scrambled": control(course.synthetic.recipe, "scrambled"),
    }
    seeds = range(FINAL_SEED, FINAL_SEED + course.seeds)
    fits = [
        replace(rules.fit, recipe=recipe, seed=seed, steps=course.steps, test=True)
        for seed in seeds
        for recipe in recipes.values()
    ]
    found = iter(_run(rules, fits, "trial: finalists on test"))
    together = [[next(found) for _ in recipes] for _ in seeds]
    return {name: [scores[number] for scores in together] for number, name in enumerate(recipes)}


def _race_once(rules: Rules, doses: Mapping[str, Mapping[int, int]]) -> Course:
    left_out: dict[str, str] = {}
    real: list[Lane] = []
    begun = rules.elapsed()
    first = _enter(rules, real, real_recipes(rules.smote, None), LEAST_ARMS, left_out)
    by_loss = {lane.recipe.loss: lane for lane in _running(first) if lane.recipe.loss in LOSSES}
    best_loss: Loss = max(by_loss, key=lambda loss: by_loss[loss].mean) if by_loss else "oversampling"
    cost = _DEARER * (rules.elapsed() - begun) / max(1, len(first))
    more = _possible(rules, real_recipes(rules.smote, best_loss)[len(real_recipes(rules.smote, None)) :], left_out)
    most = min(len(first) + len(more), MOST_ARMS)
    n_arms, n_kept, seeds, curve = _what_fits(rules, cost, len(first), most, left_out)
    _enter(rules, real, more, n_arms - len(first), left_out)
    # The real-only side runs to its end first: what it comes to is what samples are added to.
    best_real = _last_round(rules, real, n_kept, "real")

    synthetic: list[Lane] = []
    known = _possible(rules, without_twins(synthetic_recipes(doses, best_real.recipe, best_loss)), left_out)
    # A place is kept for the arm that follows from the doses.
    _enter(rules, synthetic, known, n_arms - int(n_arms > LEAST_ARMS), left_out)
    ran = [lane.recipe for lane in synthetic]
    combined = _combined(rules, best_real, synthetic, best_loss)
    rest = without_twins([*ran, *combined[:1], *known, *combined[1:]])[len(ran) :]
    _enter(rules, synthetic, _possible(rules, rest, left_out), n_arms - len(synthetic), left_out)
    best_synthetic = _last_round(rules, synthetic, n_kept, "synthetic", best_real)

    lanes = (*real, *synthetic)
    names = {lane.recipe.key for lane in lanes}
    for recipe in [*more, *known]:
        if recipe.key not in names:
            left_out.setdefault(
                recipe.key, "left out for time" if n_arms < most else f"more than {MOST_ARMS} arms a side"
            )
    return Course(
        lanes=lanes,
        real=best_real,
        synthetic=best_synthetic,
        best_loss=best_loss,
        steps=rules.fit.steps,
        trained_out=_check_training(rules, best_real),
        curve=_learning_curve(rules, best_real) if curve else (),
        cost=cost,
        seeds=seeds,
        left_out=left_out,
    )


def _last_round(rules: Rules, lanes: Sequence[Lane], n_kept: int, side: str, best_real: Lane | None = None) -> Lane:
    """Let the best arms of a side run with more seeds, and choose one.

    Args:
        best_real: For the synthetic side: the arm that differs from this one in the samples alone has a place in this
            round, and is chosen unless another leads by more than the standard error of the difference, over seeds and
            validation images (the rule of Breiman et al. 1984, section 3.4.3, for what one standard error cannot tell
            apart). Of a dozen arms the first owes its place to luck, and what the real-only arm has beside is lost
            with it.
    """

    def plainly(lane: Lane) -> bool:
        return best_real is not None and differs_in_samples_alone(lane.recipe, best_real.recipe)

    order = sorted(_running(lanes), key=lambda lane: -lane.mean)
    kept = order[:n_kept]
    if not any(map(plainly, kept)) and (found := next(filter(plainly, order), None)) is not None:
        kept[-1] = found
    for lane in order:
        if lane not in kept:
            lane.dropped = "after the first round"
    _race_on(rules, kept, MORE_SEEDS, f"trial: second round, {side}")
    running = _running(kept)
    chosen = best = max(running, key=lambda lane: lane.mean)
    why = "after the second round"
    if not plainly(best) and (own := [lane for lane in running if plainly(lane)]):
        candidate = max(own, key=lambda lane: lane.mean)
        lead = best.mean - candidate.mean
        error = statistics.standard_error(
            np.stack(best.probabilities),
            np.stack(candidate.probabilities),
            rules.labels,
            rules.clusters,
            rules.metric,
        )
        if lead <= error:
            chosen = candidate
            best.dropped = (
                f"after the second round: ahead of '{candidate.recipe.key}' by {100 * lead:.1f} points, which neither "
                "seeds nor images of validation tell from chance, and further from the best real-only arm"
            )
    for lane in running:
        if lane is not chosen and lane.dropped is None:
            lane.dropped = why
    return chosen


def _combined(rules: Rules, best_real: Lane, lanes: Sequence[Lane], best_loss: Loss) -> list[Recipe]:
    """The arms that follow from the doses tried."""
    running = sorted(_running(lanes), key=lambda lane: -lane.mean)
    added = [lane for lane in running if not lane.recipe.pretrain and lane.recipe.added_weight == 1]
    if not added:
        return []
    per_class = _dose_per_class(rules, best_real, added)
    return combined_recipes(added[0].recipe, best_real.recipe, per_class, best_loss)


def _what_fits(
    rules: Rules, cost: float, n_done: int, most: int, left_out: dict[str, str]
) -> tuple[int, int, int, bool]:
    """Arms a side, arms of a side in the second round, seeds of the finalists, whether there is a learning curve."""
    n_race_seeds = 1 + len(MORE_SEEDS)
    few = min(rules.seeds, LEAST_SEEDS)

    def seconds(n_arms: int, n_kept: int, n_seeds: int, curve: bool) -> float:
        fits = 2 * n_arms - n_done + 2 * n_kept * len(MORE_SEEDS)
        fits += (TIMES_STEPS + 1) * len(CHECK_SEEDS) + _N_FINALISTS * n_seeds
        return cost * (fits + (len(SHARES) * n_race_seeds if curve else 0))

    least = min(LEAST_ARMS, most)
    choices = [(most, MOST_KEPT, rules.seeds, True), (most, MOST_KEPT, rules.seeds, False)]
    choices += [(most, n_kept, few, False) for n_kept in (MOST_KEPT, LEAST_KEPT)]
    choices += [(n_arms, LEAST_KEPT, few, False) for n_arms in range(most - 1, least - 1, -1)]
    for n_arms, n_kept, n_seeds, curve in choices:
        if seconds(n_arms, n_kept, n_seeds, curve) <= rules.left():
            if not curve:
                left_out["learning curve"] = "left out for time"
            if n_seeds < rules.seeds:
                left_out["seeds of the finalists"] = f"{n_seeds} instead of {rules.seeds}, for time"
            if n_kept < MOST_KEPT:
                left_out["second round"] = f"{n_kept} instead of {MOST_KEPT} arms of each side, for time"
            return n_arms, min(n_kept, n_arms), n_seeds, curve
    raise OutOfTime((rules.elapsed() + seconds(least, LEAST_KEPT, few, False)) / _SHARE_FOR_FITS / 60)


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
    """Let arms run; one that cannot be trained (its loss is not a number, say) is dropped and the others go on."""
    fits = [replace(rules.fit, recipe=lane.recipe, seed=seed) for seed in seeds for lane in lanes]
    for number, scores in enumerate(_run(rules, fits, title, may_fail=True)):
        lane = lanes[number % len(lanes)]
        if isinstance(scores, TrainingError):
            lane.dropped = f"could not be trained: {scores}"
            continue
        lane.scores.append(rules.score(scores))
        lane.probabilities.append(scores.validation)


def _running(lanes: Sequence[Lane]) -> list[Lane]:
    running = [lane for lane in lanes if lane.dropped is None]
    if not running:
        raise TrainingError(f"no arm of the trial could be trained; the first {lanes[0].dropped}")
    return running


def _check_training(rules: Rules, lane: Lane) -> tuple[float, float]:
    """How much the real-only finalist gains from more steps: mean over seeds of its own, and its standard error."""
    pair = [
        replace(rules.fit, recipe=lane.recipe, seed=seed, steps=times * rules.fit.steps)
        for times in (TIMES_STEPS, 1)
        for seed in CHECK_SEEDS
    ]
    found = [rules.score(scores) for scores in _run(rules, pair, f"trial: {TIMES_STEPS} times the steps")]
    gains = np.subtract(found[: len(CHECK_SEEDS)], found[len(CHECK_SEEDS) :])
    return float(np.mean(gains)), float(np.std(gains, ddof=1) / np.sqrt(len(gains)))


def _learning_curve(rules: Rules, lane: Lane) -> tuple[tuple[float, tuple[float, ...]], ...]:
    seeds = (FIRST_SEED, *MORE_SEEDS)
    # The last is the arm itself, unless SMOTE is taken out of it; its fits are there already then.
    shares = (*SHARES, 1.0)
    points = [Lane(fewer_real(lane.recipe, share)) for share in shares]
    _race_on(rules, points, seeds, "trial: fewer real images")
    return tuple((share, tuple(point.scores)) for share, point in zip(shares, points, strict=True))


def _dose_per_class(rules: Rules, best_real: Lane, lanes: Iterable[Lane]) -> dict[int, int]:
    """The dose at which each class's own F1 on validation was best; the lower of equals, and zero is one of them."""
    tried = [lane for lane in lanes if differs_in_samples_alone(lane.recipe, best_real.recipe)]
    tried.sort(key=lambda lane: lane.recipe.n_added)
    # With SMOTE's images the best real-only arm is no dose of zero of these.
    zero = [best_real] if best_real.recipe.added == "none" else []
    labels = sorted({label for lane in tried for label, _ in lane.recipe.dose})
    best: dict[int, int] = {}
    for label in labels:
        scores = [(_f1(rules.labels, lane.probabilities[0].argmax(1), label), lane) for lane in (*zero, *tried)]
        top = max(score for score, _ in scores)
        best[label] = dict(next(lane for score, lane in scores if score == top).recipe.dose).get(label, 0)
    return best


def _f1(labels: np.ndarray, predicted: np.ndarray, label: int) -> float:
    hit = int(((labels == label) & (predicted == label)).sum())
    return 2 * hit / max(1, int((labels == label).sum()) + int((predicted == label).sum()))


@overload
def _run(rules: Rules, fits: Sequence[Fit], title: str) -> list[Scores]: ...
@overload
def _run(
    rules: Rules, fits: Sequence[Fit], title: str, *, may_fail: Literal[True]
) -> Sequence[Scores | TrainingError]: ...
def _run(rules: Rules, fits: Sequence[Fit], title: str, *, may_fail: bool = False) -> Sequence[Scores | TrainingError]:
    """Run fits, several at a time, and return their scores in order; what was run before is read."""
    waiting = [fit for fit in fits if not (rules.directory / "fits" / fit.file_name).is_file()]
    failed: dict[str, TrainingError] = {}
    if waiting:
        with progress(title, len(waiting), "fits") as bar:
            for name, problem in _side_by_side(rules, waiting):
                if problem is not None and not may_fail:
                    raise TrainingError(problem)
                if problem is not None:
                    logger.warning("%s", problem)
                    failed[name] = TrainingError(problem)
                bar.update(1)
    found = [failed.get(fit.file_name) or run_fit(rules.directory, fit) for fit in fits]
    seconds = [scores.seconds for scores in found if isinstance(scores, Scores)]
    # A series takes as long as its longest fit, however many workers there are.
    rules.spent.append(max(sum(seconds) / rules.workers, max(seconds, default=0.0)))
    return found


def _side_by_side(rules: Rules, fits: Sequence[Fit]) -> Iterable[tuple[str, str | None]]:
    """Names of fits with what went wrong, as they are done."""
    if rules.workers == 1 or len(fits) == 1:
        return (_fit(rules.directory, fit) for fit in fits)
    from joblib import Parallel, delayed

    # Processes, since a fit is full of small steps that one interpreter would run after each other.
    return Parallel(n_jobs=min(rules.workers, len(fits)), return_as="generator_unordered", batch_size=1)(
        delayed(_fit_in_worker)(rules.directory, fit, os.getpid()) for fit in fits
    )


def _fit(directory: Path, fit: Fit) -> tuple[str, str | None]:
    """Scores go through the file."""
    try:
        run_fit(directory, fit)
    except TrainingError as error:
        return fit.file_name, str(error)
    return fit.file_name, None


def _fit_in_worker(directory: Path, fit: Fit, parent: int) -> tuple[str, str | None]:
    """A worker ends with the process that it works for, also when that was killed."""
    global _watched
    if _watched != parent and os.getpid() != parent:
        _watched = parent
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    return _fit(directory, fit)


_watched: int | None = None


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
