"""Drawings of a report page as inline SVG: intervals, counts, the dose curve, training curves.

Colours are classes of the page's style sheet, so that they follow light and dark; names from data stand beside a
drawing as text of the page, or are escaped. Numbers are written with fixed decimals: equal figures give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from synthaug.records import DosePoint, Interval, Verdict
from synthaug.report.verdict_words import dose_order, metric_words, usable
from synthaug.text import printable

if TYPE_CHECKING:
    from markupsafe import Markup

# Measures of a plot, in units of its own; a phone shows about 0.8 pixels for one.
_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 58
_BAR_WIDTH, _BAR_HEIGHT = 120, 18
MOST_SERIES = 6  # the palette of the page
_MARKS = 120  # points of a curve: more cannot be told apart


@dataclass(frozen=True)
class Series:
    """A line of a plot."""

    words: str
    points: tuple[tuple[float, float], ...]
    singles: tuple[tuple[float, float], ...] = ()  # single seeds, drawn faintly
    beside: tuple[tuple[float, float], ...] = ()  # points that the line does not join


def interval_limits(intervals: Sequence[Interval | None]) -> tuple[float, float]:
    """The ends of a scale that holds all intervals and zero."""
    ends = [end for item in intervals if (known := usable(item)) for end in (known.low, known.high)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = max(0.06 * (high - low), 0.002)
    return low - room, high + room


def interval_bar(interval: Interval | None, limits: tuple[float, float]) -> Markup | None:
    """A difference with its interval on a scale; the numbers stand beside it, so readers aloud pass over it."""
    from markupsafe import Markup

    if (known := usable(interval)) is None:
        return None

    def x(value: float) -> str:
        return f"{(value - limits[0]) / (limits[1] - limits[0]) * _BAR_WIDTH:.1f}"

    middle = _BAR_HEIGHT / 2
    kind = "better" if known.low > 0 else "worse" if known.high < 0 else "unclear"
    at = float(x(known.estimate))
    marks = {
        "better": f'<path d="M{at - 5:.1f} {middle + 4:.1f}h10l-5 -9z"/>',
        "worse": f'<path d="M{at - 5:.1f} {middle - 4:.1f}h10l-5 9z"/>',
        "unclear": f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4"/>',
    }
    return Markup(
        f'<svg class="bar {kind}" viewBox="0 0 {_BAR_WIDTH} {_BAR_HEIGHT}" aria-hidden="true" focusable="false">'
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{_BAR_HEIGHT}"/>'
        f'<line class="line" x1="{x(known.low)}" x2="{x(known.high)}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
        f"{marks[kind]}</svg>"
    )


def counts_bar(n_real: int, n_synthetic: int, most: int) -> Markup:
    """Real and synthetic images of a class, on the scale of the largest class; the numbers stand beside it."""
    from markupsafe import Markup

    real = _BAR_WIDTH * n_real / max(1, most)
    synthetic = _BAR_WIDTH * n_synthetic / max(1, most)
    return Markup(
        f'<svg class="bar" viewBox="0 0 {_BAR_WIDTH} {_BAR_HEIGHT}" aria-hidden="true" focusable="false">'
        f'<rect class="real" x="0" y="3" width="{real:.1f}" height="12"/>'
        f'<rect class="synthetic" x="{real:.1f}" y="3" width="{synthetic:.1f}" height="12"/></svg>'
    )


def plot(
    title: str,
    series: Sequence[Series],
    x_words: str,
    *,
    x_labels: Sequence[tuple[float, str]] | None = None,
    level: tuple[str, float] | None = None,
    logarithmic: bool = False,
) -> Markup | None:
    """Lines over a scale, with a key below; None where there is nothing to draw.

    Args:
        title: What readers aloud say of it.
        x_labels: Places and words along x; numbers where it is None.
        level: Words and height of a dashed line.
        logarithmic: Scale of y.
    """
    from markupsafe import Markup, escape

    ys = [y for one in series for _, y in (*one.points, *one.singles, *one.beside)] + ([level[1]] if level else [])
    xs = [x for one in series for x, _ in (*one.points, *one.singles, *one.beside)] + [x for x, _ in x_labels or ()]
    if not any(one.points or one.beside for one in series) or (logarithmic and min(ys) <= 0):
        return None
    scale = math.log10 if logarithmic else float
    heights = [scale(y) for y in ys]
    room = max(0.06 * (max(heights) - min(heights)), 0.01 if logarithmic else 0.004)
    low, high = min(heights) - room, max(heights) + room
    aside = 0.5 if x_labels else 0.0
    first, last = min(xs) - aside, max(xs) + aside
    last = last if last > first else first + 1
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[str, str]:
        return (
            f"{_LEFT + (x - first) / (last - first) * width:.1f}",
            f"{_TOP + (high - scale(y)) / (high - low) * height:.1f}",
        )

    bottom, right = _TOP + height, _WIDTH - _RIGHT
    parts = []
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high, 5)
    for tick in ticks:
        y = at(first, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{float(y) + 4:.1f}">{_number(tick, ticks)}</text>')
    if x_labels is None:
        places = _ticks(first, last, 4)
        x_labels = [(tick, f"{tick:,.0f}") for tick in places]
    for x, words in x_labels:
        for row, line in enumerate(words.split("\n")):
            parts.append(
                f'<text class="middle" x="{at(x, 10**low if logarithmic else low)[0]}" y="{bottom + 16 + 14 * row}">'
                f"{escape(line)}</text>"
            )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="middle" x="{_LEFT + width / 2:.0f}" y="{_HEIGHT - 8}">{escape(x_words)}</text>')
    if level is not None:
        y = at(first, level[1])[1]
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
    for k, one in enumerate(series[:MOST_SERIES]):
        drawn = [at(x, y) for x, y in _thinned(one.points)]
        parts += ['<circle class="single s{}" cx="{}" cy="{}" r="2.5"/>'.format(k, *at(x, y)) for x, y in one.singles]
        if len(drawn) > 1:
            parts.append(f'<polyline class="line s{k}" points="{" ".join(",".join(point) for point in drawn)}"/>')
        if len(drawn) <= 40:
            parts += [_mark(k, float(x), float(y)) for x, y in drawn]
        parts += [_mark(k, *map(float, at(x, y))) for x, y in one.beside]
    key = [
        f'<li><svg class="mark" viewBox="0 0 22 12" aria-hidden="true" focusable="false">'
        f'<line class="line s{k}" x1="0" x2="22" y1="6" y2="6"/>{_mark(k, 11, 6)}</svg>{escape(one.words)}</li>'
        for k, one in enumerate(series[:MOST_SERIES])
        if one.points or one.beside
    ]
    if level is not None:
        key.append(
            '<li><svg class="mark" viewBox="0 0 22 12" aria-hidden="true" focusable="false"><line class="level" x1="0" '
            f'x2="22" y1="6" y2="6"/></svg>{escape(level[0])}</li>'
        )
    return Markup(
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'</svg><ul class="key">{"".join(key)}</ul>'
    )


def dose_plot(verdict: Verdict) -> Markup | None:
    """The metric over the dose of synthetic images, on validation."""
    curve = [item for item in verdict.dose_curve if finite(item.scores)]
    doses = sorted(dict.fromkeys(item.dose for item in curve), key=dose_order)
    n_scaled = sum(dose_order(dose)[0] == 0 for dose in doses)
    series = []
    for loss in dict.fromkeys(item.loss for item in curve):
        mine = sorted((item for item in curve if item.loss == loss), key=lambda item: dose_order(item.dose))
        scores = [(float(doses.index(item.dose)), finite(item.scores)) for item in mine]
        series.append(
            Series(
                printable(loss),
                # Only doses that are multiples lie on a scale; the plan and a dose for each class stand beside it.
                tuple((x, float(np.mean(values))) for x, values in scores if x < n_scaled),
                tuple((x, value) for x, values in scores for value in values),
                tuple((x, float(np.mean(values))) for x, values in scores if x >= n_scaled),
            )
        )
    best = next((finite(arm.scores) for arm in verdict.arms if arm.key == verdict.best_real), [])
    return plot(
        f"{metric_words(verdict.metric)} on validation over the dose of synthetic images; the figures are in the table",
        series,
        "dose: synthetic images per real one of each class",
        x_labels=[(float(k), f"{printable(dose, 10)}\n{_images(curve, dose)}") for k, dose in enumerate(doses)],
        level=(f"best arm with real images alone: {printable(verdict.best_real or '')}", float(np.mean(best)))
        if best
        else None,
    )


def learning_plot(verdict: Verdict) -> Markup | None:
    """The metric over the number of real images of the scarce classes, on validation."""
    known = sorted((item for item in verdict.learning_curve if finite(item.scores)), key=lambda item: item.n_real)
    scores = [(float(item.n_real), finite(item.scores)) for item in known]
    recipe = next((finite(arm.scores) for arm in verdict.arms if arm.key == verdict.recipe), [])
    points = tuple((x, float(np.mean(values))) for x, values in scores)
    singles = tuple((x, value) for x, values in scores for value in values)
    return plot(
        f"{metric_words(verdict.metric)} on validation over the number of real images; the figures are in the table",
        [Series("the best arm with real images alone", points, singles)],
        "real images of the scarce classes",
        level=("chosen recipe with synthetic images, all real ones", float(np.mean(recipe))) if recipe else None,
    )


def finite(scores: Sequence[float]) -> list[float]:
    return [score for score in scores if math.isfinite(score)]


def _images(curve: Sequence[DosePoint], dose: str) -> str:
    numbers = [item.n_synthetic for item in curve if item.dose == dose]
    return f"{max(numbers):,}"


def _mark(k: int, x: float, y: float) -> str:
    """A shape of its own for each line, so that no one needs colours to tell them apart."""
    shapes = (
        f'<circle class="s{k}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        f'<rect class="s{k}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>',
        f'<path class="s{k}" d="M{x - 4.5:.1f} {y + 3.5:.1f}h9l-4.5 -8z"/>',
        f'<path class="s{k}" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>',
        f'<path class="s{k}" d="M{x - 4.5:.1f} {y - 3.5:.1f}h9l-4.5 8z"/>',
        f'<path class="s{k}" d="M{x - 4:.1f} {y - 1.5:.1f}h8v3h-8z"/>',
    )
    return shapes[k % len(shapes)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, the last among them."""
    if len(points) <= _MARKS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (_MARKS - 1))] for i in range(_MARKS)]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values within the limits, `most` at most."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 2.5, 5, 10, 20) if (high - low) / (step * k) <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2, 5 of every power of ten within the exponents, or fewer where these are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for leads in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        found = [lead * 10.0**power for power in powers for lead in leads if low <= math.log10(lead) + power <= high]
        if len(found) <= 6:
            break
    return found


def _number(tick: float, ticks: Sequence[float]) -> str:
    """A tick with the decimals that tell it from the next."""
    step = min((b - a for a, b in pairwise(ticks)), default=abs(tick) or 1)
    return f"{tick:,.{max(0, min(6, math.ceil(-math.log10(step) - 1e-9) + (round(step * 1000) in (25, 250))))}f}"
