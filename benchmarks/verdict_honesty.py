"""How often is the verdict right? Many trials of samples whose worth is known, through the real stage.

    python -m benchmarks.verdict_honesty --repetitions 200

Every repetition draws new images of four classes (8×8, a pattern of each class and white noise), of which one has
12 real training images and the others 150, and tries

    duplicates    36 copies of those 12: worth nothing
    held-out      36 further real images of the class: worth about three points of balanced accuracy
    elsewhere     36 further real images of a class that has 150: worth next to nothing

with the classifier and the shortcuts of `tests.honesty_parts`. What the samples are truly worth is measured, not
assumed: the same finalists on 8000 further images, whatever the verdict says. Prints for each kind how often each
verdict came out, the binomial probability of so many 'helps' if they came in 5 of 100 trials, the true worth, and how
often the intervals held it. A second or three a repetition on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from synthaug.records import Judge
from tests.honesty_parts import Gaussian, Job, Watched, quick, watched_verdict

SCARCE, PLENTIFUL = 3, 0
AGAINST = ("real", "duplicates", "scrambled")
OUTCOMES = ("helps", "no evidence", "harms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["duplicates", "held-out"])
    parser.add_argument("--samples", type=int, default=36)
    parser.add_argument("--n-test", type=int, default=1200, help="test images of all classes")
    parser.add_argument("--n-validation", type=int, default=240, help="validation images of all classes")
    parser.add_argument("--real", type=int, default=12, help="real training images of the scarce class")
    arguments = parser.parse_args()
    gaussian, random = Gaussian(), np.random.default_rng([arguments.seed, 2])
    labels = np.repeat(np.arange(gaussian.n_classes), 2000)
    many = np.concatenate([gaussian.draw(k, 2000, random) for k in range(gaussian.n_classes)])
    print(
        f"{arguments.real} real images of the scarce class, {arguments.samples} samples, {arguments.n_test} test and "
        f"{arguments.n_validation} validation images, seed {arguments.seed}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as kept:
        judged: Judge | None = None
        for kind in arguments.kinds:
            found: list[Watched] = []
            started = time.monotonic()
            for repetition in range(arguments.repetitions):
                seed = 10_000 * arguments.seed + repetition
                sizes = {"keep": arguments.real, "n_test": arguments.n_test, "n_validation": arguments.n_validation}
                if judged is None:
                    judged = gaussian.job(Path(kept) / "judge", seed, **sizes).judged
                with tempfile.TemporaryDirectory() as folder, quick():
                    job = gaussian.job(Path(folder) / "job", seed, judged=judged, **sizes)
                    samples = KINDS[kind](job, gaussian, arguments.samples, np.random.default_rng([seed, 3]))
                    found.append(watched_verdict(job, samples, many, labels))
                if (repetition + 1) % 20 == 0:
                    counts = Counter(one.verdict.outcome for one in found)
                    print(f"  {kind} {repetition + 1}: {dict(counts)}, {time.monotonic() - started:.0f} s", flush=True)
            show(kind, found, time.monotonic() - started)


def duplicates(job: Job, gaussian: Gaussian, number: int, random: np.random.Generator) -> dict[int, np.ndarray]:
    return {SCARCE: np.resize(job.images(job.rows("train", SCARCE)), (number, 8, 8, 1))}


def held_out(job: Job, gaussian: Gaussian, number: int, random: np.random.Generator) -> dict[int, np.ndarray]:
    return {SCARCE: gaussian.draw(SCARCE, number, random)}


def elsewhere(job: Job, gaussian: Gaussian, number: int, random: np.random.Generator) -> dict[int, np.ndarray]:
    return {PLENTIFUL: gaussian.draw(PLENTIFUL, number, random)}


KINDS = {"duplicates": duplicates, "held-out": held_out, "elsewhere": elsewhere}


def show(kind: str, found: list[Watched], seconds: float) -> None:
    n = len(found)
    counts = Counter(one.verdict.outcome for one in found)
    print(f"\n{kind}: {n} trials, {seconds / n:.1f} s each")
    print("  " + ", ".join(f"{name} {counts[name]} ({counts[name] / n:.1%})" for name in OUTCOMES))
    false = binomtest(counts["helps"], n, 0.05, alternative="greater")
    exact = binomtest(counts["helps"], n).proportion_ci(0.95, "exact")
    print(f"  'helps' 95 % interval {exact.low:.1%} to {exact.high:.1%}; p against at most 5 %: {false.pvalue:.3g}")
    for against in AGAINST:
        truth = np.array([one.truth[against] for one in found])
        intervals = [one.verdict.differences[against]["balanced_accuracy"] for one in found]
        held = np.mean([item.low <= value <= item.high for item, value in zip(intervals, truth, strict=True)])
        above = np.mean([item.low > 0 for item in intervals])
        width = np.median([(item.high - item.low) / 2 for item in intervals])
        estimate = np.mean([item.estimate for item in intervals])
        print(
            f"  against {against:10}: true worth {100 * truth.mean():+.2f} points (sd {100 * truth.std():.2f}), "
            f"estimated {100 * estimate:+.2f}; interval ± {100 * width:.1f}, holds the truth {held:.1%}, "
            f"above zero {above:.1%}"
        )
    ranking = np.array([one.ranking for one in found])
    estimates = np.array([one.verdict.differences["real"]["rare_auprc"].estimate for one in found])
    print(
        f"  AUPRC of the scarce class against real: true {100 * ranking.mean():+.2f} points, estimated below zero in "
        f"{np.mean(estimates < 0):.1%}"
    )
    # The least of the three is what a 'helps' asks for.
    least = np.array([min(one.truth.values()) for one in found])
    helps = np.array([one.verdict.helps for one in found])
    edges = [-np.inf, 0, 0.01, 0.02, 0.03, 0.04, np.inf]
    print("  least of the three true worths -> 'helps':")
    for low, high in pairwise(edges):
        here = (least >= low) & (least < high)
        if here.any():
            print(f"    {100 * low:4.0f} to {100 * high:4.0f} points: {int(helps[here].sum())} of {int(here.sum())}")
    harms = np.array([one.verdict.outcome == "harms" for one in found])
    real = np.array([one.truth["real"] for one in found])
    print(
        f"  'helps' where the least is not above zero in truth: {int((helps & (least <= 0)).sum())}; 'harms' where the "
        f"worth against real is not below zero: {int((harms & (real >= 0)).sum())} of {int(harms.sum())}"
    )
    missing = Counter(part for one in found for part in _missing(one))
    print("  missing where it did not help: " + "; ".join(f"{part}: {k}" for part, k in missing.most_common()))
    pairs = Counter(one.verdict.best_real for one in found)
    print("  best real-only arms: " + ", ".join(f"{key} {k}" for key, k in pairs.most_common(5)) + "\n", flush=True)


def _missing(one: Watched) -> list[str]:
    sentence = one.verdict.sentence
    return sentence.rpartition("Missing: ")[2].rstrip(".").split("; ") if "Missing: " in sentence else []


if __name__ == "__main__":
    main()
