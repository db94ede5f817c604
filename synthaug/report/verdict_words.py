"""How a verdict's figures are written: the same in the terminal, in the card and in the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from synthaug.records import Interval

METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "rare_auprc": "rare AUPRC",
    "calibration_error": "calibration error",
}
# The arms that the chosen recipe is held against, in the order in which they are shown.
AGAINST = {
    "real": "the best real-only arm",
    "duplicates": "duplicates of real images in their place",
    "scrambled": "phase-scrambled images in their place",
}
UNAVAILABLE = "unavailable"


def metric_words(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def usable(interval: Interval | None) -> Interval | None:
    """The interval, or None where a number in it is not finite."""
    if interval is None or not all(map(math.isfinite, (interval.estimate, interval.low, interval.high))):
        return None
    return interval


def points(interval: Interval | None) -> str:
    """A difference of two shares in percentage points: '+3.1 [+0.8, +5.4]'."""
    if (known := usable(interval)) is None:
        return UNAVAILABLE
    return f"{signed(100 * known.estimate)} [{signed(100 * known.low)}, {signed(100 * known.high)}]"


def signed(value: float, digits: int = 1) -> str:
    """'+3.1', '-0.4', and '0.0' for what rounds to nothing."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def share(value: float | None, digits: int = 3) -> str:
    return UNAVAILABLE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def mean_and_spread(scores: Sequence[float]) -> str:
    """'0.812 ± 0.010': the standard deviation over the seeds, where there is more than one."""
    if not scores:
        return "not run"
    spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.3f}{spread}"


def count(n: int, what: str) -> str:
    """'1 seed', '5 seeds'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def look(looks: int) -> str:
    """How often this test split has been looked at: what is chosen after a look is no longer untouched by it."""
    return f"look no. {looks} at this test split"


def known_differences(differences: Mapping[str, Mapping[str, Interval]]) -> Iterable[tuple[str, str, str, Interval]]:
    """What the recipe was held against (key, in words), the metric and the difference: those with finite numbers."""
    for key in sorted(differences, key=lambda key: [*AGAINST, key].index(key)):
        for metric, interval in differences[key].items():
            if (known := usable(interval)) is not None:
                yield key, AGAINST.get(key, key), metric, known


def by_words(said: Mapping[str, str]) -> dict[str, list[str]]:
    """Name to words turned round: a hundred names may share the same words."""
    turned: dict[str, list[str]] = {}
    for name, words in said.items():
        turned.setdefault(words, []).append(name)
    return turned


def dose_order(dose: str) -> tuple[int, float, str]:
    """Multiples by size, then the plan, then doses of each class, then whatever else there may be."""
    try:
        return 0, float(dose.removesuffix("x")), dose
    except ValueError:
        return (1 if dose == "plan" else 2), 0.0, dose
