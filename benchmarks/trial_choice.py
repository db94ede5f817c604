"""Which of several rules chooses the synthetic arm best? Trials that are done, looked at again on validation alone.

    python -m benchmarks.trial_choice --data FOLDER --cells 'utility.*.trial' 'peers.*.trial'
    python -m benchmarks.trial_choice --data FOLDER --real --cells 'utility.*.r0.*'

takes the trials that `python -m benchmarks.method` (with `--real`: `python -m benchmarks.ceiling`, which offers real
images in place of samples) left in its results, of this very code, and trains the arms of their second rounds with
further seeds. The validation images are cut in two at random, many times: each rule
chooses by one half and the seeds of the race, and what it chose is measured on the other half with the further seeds,
against the best real-only arm. Neither the luck of an image nor of a seed that an arm was chosen by is in its figure,
and no test image is read. The rules:

    first              the best on validation
    one error          the arm that differs from the best real-only one in the samples alone, unless another is ahead of
                       it by more than a standard error over seeds and images (what `synthaug.trial.race` does)
    one error of seeds the same with the chance of the seeds alone
    samples alone      always the best of the arms that differ in the samples alone
    any use of them    always the best of the arms that are the best real-only one with samples, whatever is done with
                       these (a lower weight, training on real images alone after them)

Prints a line a trial, points of balanced accuracy, and the mean over the trials with its standard error. A choice by
half of the images is a noisier one than a trial's own. One thread; a minute a trial at 28 px, several at 64.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.ceiling import real_images
from benchmarks.method.cells import RESULTS, Cell, Place, all_cells, records_of
from synthaug.pipeline import evaluate, evaluate_foreign
from synthaug.trial.learners import run_fit
from synthaug.trial.race import FIRST_SEED, MORE_SEEDS, Course, Lane, Rules
from synthaug.trial.recipes import differs_in_samples_alone
from synthaug.trial.statistics import METRICS, standard_error

FURTHER_SEED = 1000
RULES = ("first", "one error", "one error of seeds", "samples alone", "any use of them")

# Of an arm: balanced accuracy of each seed on the images of a mask.
Scores = Callable[[Lane, np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cells", nargs="+", default=["utility.*.trial"], metavar="PATTERN")
    parser.add_argument("--real", action="store_true", help="trials of real images that the cut set aside")
    parser.add_argument("--replicates", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5, help="further seeds of each arm")
    parser.add_argument("--halves", type=int, default=400)
    given = parser.parse_args()
    # Threads and minutes as the benchmark's own: they are part of what a stage is known by.
    place = Place(
        given.results.resolve(), given.data.resolve(), Path("cache"), 2, 10.0, records=records_of(given.results)
    )  # fmt: skip
    cells = [
        cell
        for cell in all_cells(given.replicates)
        if any(fnmatch.fnmatch(cell.name, pattern) for pattern in given.cells)
        and cell.name.endswith(".trial")
        and (
            cell.part == "utility" and real_images(cell, place).is_dir()
            if given.real
            else place.load(cell.name) is not None and not place.stale(cell) and place.at_hand(cell.needs[0])
        )
    ]
    if not cells:
        program = "benchmarks.ceiling" if given.real else "benchmarks.method"
        parser.error(f"no trial of this code in {place.results} has such a name; python -m {program} makes them")
    print("| trial | arms | " + " | ".join(RULES) + " | rules differ in |")
    print("|---|---:|" + "---:|" * (len(RULES) + 1))
    rows = []
    for cell in cells:
        gains, differ, n_arms = one_trial(cell, place, given.seeds, given.halves, given.real)
        rows.append(gains)
        told = " | ".join(f"{gain:+.2f}" for gain in gains)
        print(f"| {cell.name.removesuffix('.trial')} | {n_arms} | {told} | {differ:.0%} |", flush=True)
    means = np.mean(rows, 0)
    print("| mean | | " + " | ".join(f"{mean:+.2f}" for mean in means) + " | |")
    for number, name in enumerate(RULES[1:], start=1):
        better = np.subtract([row[number] for row in rows], [row[0] for row in rows])
        error = np.std(better, ddof=1) / np.sqrt(len(better)) if len(better) > 1 else float("nan")
        print(f"{name} minus first: {better.mean():+.2f} ± {error:.2f} (standard error over {len(better)} trials)")


def one_trial(cell: Cell, place: Place, n_seeds: int, n_halves: int, real: bool) -> tuple[list[float], float, int]:
    """Gain of each rule's choices on images and seeds that it did not choose by, in points; the share of halves in
    which the first two choose differently; the number of synthetic arms to choose from."""
    with tempfile.TemporaryDirectory() as kept:
        rules, course = again(cell, place, Path(kept), real)
        n_race = 1 + len(MORE_SEEDS)
        lanes = [lane for lane in course.lanes if len(lane.scores) == n_race and lane.recipe.side == "synthetic"]
        fit = replace(rules.fit, steps=course.steps)
        further = {
            lane.recipe.key: [
                run_fit(rules.directory, replace(fit, recipe=lane.recipe, seed=FURTHER_SEED + k)).validation
                for k in range(n_seeds)
            ]
            for lane in [course.real, *lanes]
        }
    labels, random = rules.labels, np.random.default_rng([FIRST_SEED, 3])
    metric = METRICS[rules.metric]

    def scores(probabilities: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
        return np.array([metric(labels[mask], found[mask].argmax(1)) for found in probabilities])

    gains: list[list[float]] = []
    differ = []
    for _ in range(n_halves):
        half = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            mine = random.permutation(np.flatnonzero(labels == label))
            # Of an odd number the last goes to either side by chance.
            half[mine[: (len(mine) + int(random.integers(2))) // 2]] = True
        by = {lane.recipe.key: scores(lane.probabilities, half) for lane in lanes}
        chosen = choices(lanes, by, course.real, rules, half)
        differ.append(chosen[0] is not chosen[1])
        without = scores(further[course.real.recipe.key], ~half).mean()
        gains.append([100 * (scores(further[lane.recipe.key], ~half).mean() - without) for lane in chosen])
    return np.mean(gains, 0).tolist(), float(np.mean(differ)), len(lanes)


def choices(
    lanes: Sequence[Lane], scores: dict[str, np.ndarray], real: Lane, rules: Rules, half: np.ndarray
) -> list[Lane]:
    """What each of `RULES` chooses by half of the images; the second is that of `synthaug.trial.race._last_round`."""
    order = sorted(lanes, key=lambda lane: -scores[lane.recipe.key].mean())
    own = [lane for lane in order if differs_in_samples_alone(lane.recipe, real.recipe)]
    best, plain = order[0], own[0] if own else order[0]
    lead = scores[best.recipe.key] - scores[plain.recipe.key]
    by_seeds = plain if lead.mean() <= lead.std(ddof=1) / np.sqrt(len(lead)) else best
    found = (np.stack(lane.probabilities)[:, half] for lane in (best, plain))
    error = standard_error(*found, labels=rules.labels[half], clusters=rules.clusters[half], metric=rules.metric)
    used = [lane for lane in order if real.recipe.way == replace(lane.recipe, added_weight=1.0, pretrain=False).way]
    return [best, plain if lead.mean() <= error else best, by_seeds, plain, used[0] if used else best]


class _Found(Exception):
    pass


def again(cell: Cell, place: Place, folder: Path, real: bool) -> tuple[Rules, Course]:
    """The race of a finished trial, from the fits that it left, in a folder of its own."""
    from benchmarks.method.cells import _samples, config_of
    from synthaug import pipeline
    from synthaug.evaluate import evaluate as stage
    from synthaug.trial import race as races

    config = config_of(cell, place)
    found: list[Any] = []

    def caught(_: Any, made: Any) -> Any:
        found.append(made)
        raise _Found

    def raced(rules: Rules, doses: Any) -> Course:
        course = race(rules, doses)
        found.append((rules, course))
        raise _Found

    with mock.patch.object(pipeline._Job, "evaluate", caught), contextlib.suppress(_Found):
        if real:
            evaluate_foreign(config, str(real_images(cell, place)))
        elif cell.method == "ours":
            evaluate(config)
        else:
            evaluate_foreign(config, str(_samples(cell, place)))
    (made,) = found
    (folder / "fits").mkdir()
    # Named by all that they follow from, so those of other samples do no harm.
    for path in (config.output_path / "stages").glob("evaluate-*/fits"):
        shutil.copytree(path, folder / "fits", dirs_exist_ok=True)
    before = len(list((folder / "fits").iterdir()))
    race = races.race
    given = (made.source, made.splits, made.plan, made.checkpoints, made.judge, made.batches, made.report)
    with mock.patch.object(races, "race", raced), contextlib.suppress(_Found):
        stage(config, *given, folder)
    rules, course = found[-1]
    assert len(list((folder / "fits").iterdir())) == before, "the race was run again: its fits were not found"
    return rules, course


if __name__ == "__main__":
    main()
