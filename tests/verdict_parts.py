"""Example verdicts of any number of classes: helps, no evidence, harms; and two that have no figures.

The numbers are drawn from a fixed seed and hang together as those of a trial do; no trial is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from synthaug.records import (
    ArmResult,
    ClassVerdict,
    DosePoint,
    Figures,
    Interval,
    RealPoint,
    SampleQuality,
    SubgroupGain,
    Verdict,
)

GAINS = {"helps": 0.06, "no evidence": 0.004, "harms": -0.06}
SENTENCES = {
    "helps": "helps: +6.0 points [+4.0, +8.0] of balanced accuracy on test against 'oversampling'.",
    "no evidence": "no evidence: +0.4 points [-1.6, +2.4] of balanced accuracy on test against 'oversampling'.",
    "harms": "harms: -6.0 points [-8.0, -4.0] of balanced accuracy on test. Use the real images alone.",
}
DIRECTORY = Path("verdict")
DIGEST = "e" * 64


def make_verdict(
    outcome: Any = "helps", n_classes: int = 10, names: list[str] | None = None, seed: int = 0, **changes: Any
) -> Verdict:
    """A verdict with every part there is; the second half of the classes is scarce (all but the first of two)."""
    random = np.random.default_rng(seed)
    names = names or [f"class {k}" for k in range(n_classes)]
    scarce = range(len(names) // 2, len(names))
    gain = GAINS[outcome]
    keys = ("oversampling", "synthetic 1x + balanced softmax", "duplicates 1x", "phase-scrambled 1x")
    values: dict[str, Any] = {
        "directory": DIRECTORY,
        "digest": DIGEST,
        "outcome": outcome,
        "sentence": SENTENCES[outcome],
        "reasons": ("The interval against the best real-only arm decides.",),
        "metric": "balanced_accuracy",
        "best_real": keys[0],
        "recipe": keys[1],
        "recipe_settings": {"dose": "1x", "loss": "balanced softmax"},
        "arms": _arms(random, gain),
        "finalists": tuple(
            _figures(random, key, names, scarce, level)
            for key, level in zip(keys, (0.75, 0.75 + gain, 0.755, 0.74), strict=True)
        ),
        "differences": {
            against: {
                metric: _interval(random, gain * part, 0.02)
                for metric in ("balanced_accuracy", "macro_f1", "rare_auprc")
            }
            for against, part in (("real", 1.0), ("duplicates", 0.9), ("scrambled", 1.1))
        },
        "classes": tuple(_class(random, k, names[k], gain) for k in scarce),
        "subgroups": tuple(
            SubgroupGain(name=name, n_test=200, before=0.7, after=0.7 + gain, gain=_interval(random, gain, 0.05))
            for name in ("site A", "site B")
        ),
        "dose_curve": _dose_curve(random, gain),
        "learning_curve": tuple(
            RealPoint(share=part, n_real=int(400 * part), scores=_scores(random, 0.55 + 0.2 * part**0.5, 3))
            for part in (0.25, 0.5, 0.75, 1.0)
        ),
        "worth": "100 synthetic images did as much as about 12 more real ones would",
        "advice": ("More real images of the scarce classes would narrow the interval.",),
        "not_tried": {"3x with focal loss": "too little time", "FID": "meaningless with so few images"},
        "n_validation": 400,
        "n_test": 1234,
        "seeds": 5,
        "steps": 600,
        "trained_out": Interval(estimate=0.002, low=-0.004, high=0.008),
        "looks": 2,
        "test_digest": "f" * 64,
        "notes": ("The backbone was the judge's own.",),
    }  # fmt: skip
    return Verdict(**{**values, **changes})


def budget_verdict(**changes: Any) -> Verdict:
    """The time was too short for anything to be tried."""
    values: dict[str, Any] = {
        "sentence": "no evidence: evaluate.minutes is too short for a trial; it would take about 42 minutes.",
        "reasons": ("Two finalists with five seeds do not fit in 1 minute.",),
        "not_tried": {"all arms": "too little time"},
        "minutes_needed": 42.0,
        "n_validation": 400,
        "n_test": 1234,
    }
    return _bare(**{**values, **changes})


def refused_verdict(**changes: Any) -> Verdict:
    """The test split is too small to tell."""
    values: dict[str, Any] = {
        "sentence": "no evidence: the test split is too small: 'lynx' has 3 test images, and 10 are needed.",
        "reasons": ("Test images: lynx 3 of 10.",),
        "advice": ("Give the class more test images.",),
        "n_test": 23,
    }
    return _bare(**{**values, **changes})


def _bare(**values: Any) -> Verdict:
    return Verdict(directory=DIRECTORY, digest=DIGEST, outcome="no evidence", metric="balanced_accuracy", **values)


def _scores(random: np.random.Generator, level: float, n: int) -> tuple[float, ...]:
    return tuple(float(value) for value in np.clip(level + 0.012 * random.standard_normal(n), 0, 1))


def _interval(random: np.random.Generator, level: float, half: float) -> Interval:
    estimate = level + 0.2 * half * float(random.standard_normal())
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half * 1.1)


def _arms(random: np.random.Generator, gain: float) -> tuple[ArmResult, ...]:
    rows: tuple[tuple[str, Any, str, float, int, str | None], ...] = (
        ("no correction", "real", "plain cross-entropy", 0.66, 2, "after 2 seeds: behind by more than 2 errors"),
        ("oversampling", "real", "scarce classes drawn more often", 0.75, 5, None),
        ("balanced softmax", "real", "logits shifted by class size", 0.74, 3, "after 3 seeds: not the best"),
        ("synthetic 0.25x + oversampling", "synthetic", "a quarter", 0.74, 2, "after 2 seeds: not the best"),
        ("synthetic 1x + balanced softmax", "synthetic", "as many as real", 0.75 + gain, 5, None),
    )
    return tuple(
        ArmResult(key=key, side=side, words=words, scores=_scores(random, level, n), dropped=dropped)
        for key, side, words, level, n, dropped in rows
    )


def _figures(random: np.random.Generator, key: str, names: list[str], scarce: range, level: float) -> Figures:
    n = len(names)
    recall = np.clip(random.normal(level + 0.15, 0.04, n), 0.05, 0.99)
    recall[list(scarce)] -= 0.25
    confusion = random.dirichlet(np.full(n, 0.4), n) * (1 - recall[:, None])
    confusion[np.diag_indices(n)] += recall
    return Figures(
        key=key,
        words=f"the arm {key}",
        balanced_accuracy=level,
        macro_f1=level - 0.02,
        rare_auprc=level - 0.2,
        calibration_error=0.05,
        recall={name: float(value) for name, value in zip(names, np.diag(confusion), strict=True)},
        auprc={name: float(value) for name, value in zip(names, recall, strict=True)},
        spread=0.012,
        confusion=[[float(value) for value in row] for row in confusion],
    )


def _class(random: np.random.Generator, label: int, name: str, gain: float) -> ClassVerdict:
    n_real = int(random.integers(20, 90))
    kid = Interval(estimate=0.02, low=0.01, high=0.04)
    quality = SampleQuality(
        n_real=n_real, n_samples=n_real, precision=0.8, recall=0.6, density=0.9, coverage=0.7, kid=kid
    )
    return ClassVerdict(
        label=label,
        name=name,
        n_real=n_real,
        n_offered=4 * n_real,
        tried=n_real,
        dose=n_real if gain > 0 else 0,
        n_test=int(random.integers(15, 60)),
        recall_gain=_interval(random, 2 * gain, 0.08),
        auprc_gain=_interval(random, gain, 0.06),
        quality=quality if label % 3 else SampleQuality(n_real=3, n_samples=3, unavailable="too few images"),
        advice="keep the dose" if gain > 0 else "collect real images",
    )


def _dose_curve(random: np.random.Generator, gain: float) -> tuple[DosePoint, ...]:
    doses = (("0", 0, 0.0), ("0.25x", 100, 0.4), ("1x", 400, 1.0), ("3x", 1200, 0.7), ("plan", 900, 0.8))
    points = [
        DosePoint(loss=loss, dose=dose, n_synthetic=n, scores=_scores(random, level + gain * part, 3))
        for loss, level in (("cross-entropy", 0.72), ("balanced softmax", 0.745))
        for dose, n, part in doses
    ]
    return (
        *points,
        DosePoint(
            loss="balanced softmax", dose="per class", n_synthetic=350, scores=_scores(random, 0.75 + gain * 1.1, 3)
        ),
    )
