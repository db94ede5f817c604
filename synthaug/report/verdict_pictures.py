"""Pictures of a verdict: what the synthetic images change, at which dose, and which classes are taken for which.

matplotlib is imported where it is used, since that takes a second, and only its objects are: no pyplot, no display,
nothing global. Every place is given in pixels, and text is drawn with matplotlib's own font, so that the same
verdict gives the same bytes.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthaug.formats.atomic import whole_file
from synthaug.records import ClassVerdict, DosePoint, Interval, Verdict
from synthaug.report.verdict_words import (
    count,
    dose_order,
    known_differences,
    look,
    metric_words,
    points,
    signed,
    usable,
)
from synthaug.text import escaped, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ft2font import FT2Font

GAIN_FILE = "verdict_gain.png"
DOSE_FILE = "verdict_dose.png"
CONFUSION_FILE = "verdict_confusion.png"

_DPI = 120
_WIDTH, _MARGIN = 1200, 28
_LARGE, _HEADING, _TEXT, _SMALL = 14.0, 10.5, 9.0, 8.5  # points
_ROW = 23
# Of the palette of Okabe and Ito, which colour-blind people tell apart.
_BETTER, _WORSE, _UNCLEAR, _INK, _FAINT = "#0072B2", "#D55E00", "#777777", "#222222", "#DDDDDD"
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MOST_CLASSES = 400  # rows of the gain picture: a PNG of matplotlib has at most 65,535
_MOST_NAMED, _MOST_NUMBERED = 30, 12  # classes of a confusion matrix with names beside, and with numbers within
_MOST_CHANGES = 18
_MOST_WITHOUT_SCALE = 25  # classes of the gain picture; more have the scale above as well


def write_verdict_pictures(verdict: Verdict, directory: Path) -> list[Path]:
    """Write verdict_gain.png, verdict_dose.png and verdict_confusion.png; a picture of nothing is left out.

    Returns:
        The pictures written.
    """
    made: list[tuple[str, Callable[[Verdict], _Picture | None]]] = [
        (GAIN_FILE, _gain),
        (DOSE_FILE, _dose),
        (CONFUSION_FILE, _confusion),
    ]
    written = []
    for name, draw in made:
        picture = draw(verdict)
        if picture is not None:
            with whole_file(directory / name) as temporary:
                picture.save(temporary)
            written.append(directory / name)
    return written


class _Picture:
    """A page of fixed size that is filled from the top; all measures are pixels."""

    def __init__(self, height: int, title: str, lines: Sequence[str]) -> None:
        """Set the title and the lines under it; `height` is that of what follows them."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        wrapped = [part for line in lines for part in _wrapped(line, _TEXT, _WIDTH - 2 * _MARGIN)]
        self.y = _MARGIN + 44 + 21 * len(wrapped)
        self.height = self.y + height + _MARGIN
        self.figure = Figure(figsize=(_WIDTH / _DPI, self.height / _DPI), dpi=_DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self.figure)
        self.text(_MARGIN, _MARGIN + 12, _fit(title, _LARGE, _WIDTH - 2 * _MARGIN), _LARGE)
        for i, line in enumerate(wrapped):
            self.text(_MARGIN, _MARGIN + 44 + 21 * i, line, _TEXT, "#555555")

    def text(self, x: float, y: float, text: str, size: float, colour: str = _INK, align: str = "left") -> None:
        """Write one line, `y` being its middle. What comes from data must have gone through `_drawable`."""
        self.figure.text(
            x / _WIDTH,
            1 - y / self.height,
            text,
            color=colour,
            fontproperties=_properties(size),
            horizontalalignment=align,
            verticalalignment="center_baseline",
            parse_math=False,
        )

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """An empty panel; `y` is its upper edge."""
        axes = self.figure.add_axes(
            (x / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height), facecolor="white"
        )
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color=_UNCLEAR, linewidth=0.8)
        axes.set(xticks=[], yticks=[])
        return axes

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            self._canvas.print_png(file, metadata={"Software": None})


def _gain(verdict: Verdict) -> _Picture | None:
    """Differences overall, then those of each class: estimate, interval and the numbers beside."""
    overall: list[tuple[str, Interval | None]] = []
    heading = ""
    for against, words, metric, interval in known_differences(verdict.differences):
        if against != heading:
            heading = against
            which = f" ({_drawable(verdict.best_real, 40)})" if against == "real" and verdict.best_real else ""
            overall.append((f"minus {_drawable(words, 60)}{which}", None))
        overall.append((_drawable(metric_words(metric), 40), interval))
    classes = [item for item in verdict.classes if usable(item.recall_gain) or usable(item.auprc_gain)]
    if not overall and not classes:
        return None
    shown = classes[:_MOST_CLASSES]
    recipe = f"'{_drawable(verdict.recipe, 60)}'" if verdict.recipe else "the chosen recipe"
    lines = [
        f"{recipe} minus another arm, in percentage points with 95 % intervals, paired by seed and image. "
        f"{_test(verdict)}",
        "Triangle up, blue: the interval is above zero. Triangle down, orange: below. Grey: it includes zero.",
    ]
    if len(classes) > len(shown):
        lines.append(f"The first {len(shown)} of {len(classes)} classes are shown.")
    upper = 46 + _ROW * len(overall) + 58 if overall else 0
    lower = _head(shown) + _ROW * len(shown) + 30 if shown else 0
    picture = _Picture(upper + lower, "What the synthetic images change on the test split: higher is better", lines)
    top = picture.y
    if overall:
        picture.text(_MARGIN, top + 14, "All classes", _HEADING)
        _forest(picture, [item for _, item in overall], (440, top + 46, 540))
        picture.text(
            440 + 540 / 2, top + 46 + _ROW * len(overall) + 38, "difference in points", _SMALL, "#555555", "center"
        )
        for i, (text, one) in enumerate(overall):
            y = top + 46 + _ROW * (i + 0.5)
            if one is None:
                picture.text(_MARGIN, y, _fit(text, _SMALL, 400), _SMALL, "#555555")
            else:
                picture.text(_MARGIN + 20, y, _fit(text, _SMALL, 380), _SMALL)
    if shown:
        _gain_by_class(picture, shown, top + upper)
    return picture


def _head(shown: Sequence[ClassVerdict]) -> int:
    """Height of what stands over the classes: many of them have the scale above as well."""
    return 52 if len(shown) <= _MOST_WITHOUT_SCALE else 78


def _gain_by_class(picture: _Picture, shown: Sequence[ClassVerdict], top: float) -> None:
    title = "Each class that was offered synthetic images, against the best real-only arm"
    picture.text(_MARGIN, top + 14, title, _HEADING)
    # The names get what the numbers leave.
    counts = [f"{item.n_real:,} + {item.tried:,}, {item.n_test:,}" for item in shown]
    heading = "real + synthetic, test"
    wide = max(_width(text, _SMALL) for text in (*counts, heading))
    end, first = 344, top + _head(shown)
    picture.text(end, top + 40, heading, _SMALL, "#555555", "right")
    for i, (item, numbers) in enumerate(zip(shown, counts, strict=True)):
        y = first + _ROW * (i + 0.5)
        picture.text(_MARGIN, y, _fit(_drawable(item.name, 60), _SMALL, end - wide - 14 - _MARGIN, ends=True), _SMALL)
        picture.text(end, y, numbers, _SMALL, "#555555", "right")
    columns = [[item.recall_gain for item in shown], [item.auprc_gain for item in shown]]
    limits = _limits([usable(one) for column in columns for one in column])
    beside = 12 + max(_width(points(one), _SMALL) for column in columns for one in column)
    left = end + 18.0
    width = (_WIDTH - _MARGIN - left - 2 * beside - 26) / 2
    for column, what in zip(columns, ("gain in recall, points", "gain in AUPRC, points"), strict=True):
        picture.text(left, top + 40, what, _SMALL, "#555555")
        above = len(shown) > _MOST_WITHOUT_SCALE
        _forest(picture, column, (left, first, width), limits, missing="not measured", above=above)
        left += width + beside + 26


def _forest(
    picture: _Picture,
    intervals: Sequence[Interval | None],
    place: tuple[float, float, float],
    limits: tuple[float, float] | None = None,
    *,
    missing: str = "",
    above: bool = False,
) -> None:
    """Draw one interval a row with its numbers to the right; None is an empty row that says `missing`."""
    x, y, width = place
    known = [usable(item) for item in intervals]
    axes = picture.axes(x, y, width, _ROW * len(intervals))
    low, high = limits or _limits(known)
    axes.set(xlim=(low, high), ylim=(len(intervals), 0))
    axes.spines["left"].set_visible(False)
    ticks = _ticks(low, high, max(3, int(width // 55)))
    _label(axes, "x", ticks, [signed(tick, _digits(ticks)) for tick in ticks], above=above)
    for i in range(0, len(intervals), 2):
        axes.axhspan(i, i + 1, color="#F5F5F5", linewidth=0, zorder=0)
    for tick in ticks:
        axes.axvline(tick, color=_FAINT, linewidth=0.6, zorder=1)
    axes.axvline(0, color=_INK, linewidth=1.1, zorder=2)
    for i, item in enumerate(known):
        text, colour = missing, _UNCLEAR
        if item is not None:
            better, worse = item.low > 0, item.high < 0
            colour, marker = (_BETTER, "^") if better else (_WORSE, "v") if worse else (_UNCLEAR, "o")
            axes.plot([100 * item.low, 100 * item.high], [i + 0.5] * 2, color=colour, linewidth=1.8, zorder=3)
            axes.plot([100 * item.estimate], [i + 0.5], marker=marker, color=colour, markersize=5.5, zorder=4)
            text, colour = points(item), colour if better or worse else "#555555"
        picture.text(x + width + 12, y + _ROW * (i + 0.5), text, _SMALL, colour)


def _limits(intervals: Sequence[Interval | None]) -> tuple[float, float]:
    """Points from the lowest to the highest end of all intervals; zero is always within, and not at the edge."""
    ends = [100 * end for item in intervals if item is not None for end in (item.low, item.high, item.estimate)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = max(0.06 * (high - low), 0.5)
    return low - room, high + room


def _dose(verdict: Verdict) -> _Picture | None:
    """The dose curve, and beside it what more real images do."""
    curve = [item for item in verdict.dose_curve if _finite(item.scores)]
    real = sorted((item for item in verdict.learning_curve if _finite(item.scores)), key=lambda item: item.n_real)
    if not curve and not real:
        return None
    arms = {arm.key: _finite(arm.scores) for arm in verdict.arms}
    best, recipe = (arms.get(key or "") for key in (verdict.best_real, verdict.recipe))
    points_of = [*(_finite(item.scores) for item in curve), *(_finite(item.scores) for item in real)]
    seeds = sorted({len(scores) for scores in points_of})
    spread = count(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    metric = metric_words(verdict.metric)
    lines = [
        f"{metric[0].upper()}{metric[1:]}, 0 to 1, on {count(verdict.n_validation, 'real validation image')}, "
        f"where arms are chosen; {spread} a point. Faint dots are single seeds.",
    ]
    if verdict.worth and real:
        lines.append(f"What a synthetic image is worth: {_drawable(verdict.worth, 300)}.")
    if verdict.recipe:
        lines.append(f"Chosen recipe: '{_drawable(verdict.recipe, 60)}'.")
    title = "How much synthetic data: higher is better" if curve else "How much real data: higher is better"
    losses = list(dict.fromkeys(item.loss for item in curve))
    rows = max(len(losses) + (best is not None), 2 if real else 0)
    height = 400
    picture = _Picture(38 + height + 78 + 24 * rows, title, lines)
    top, left = picture.y + 38, 92
    values = [score for scores in points_of for score in scores]
    values += [float(np.mean(scores)) for scores in (best, recipe) if scores]
    low, high = _around(values)
    width = 650 if curve and real else 1080
    if curve:
        axes = _metric_panel(picture, left, top, width, height, (low, high), "Dose of synthetic images")
        _dose_lines(picture, axes, curve, losses, (left, top, width, height))
        if best:
            _level(axes, best, _INK)
            key = f"best real-only arm: {_drawable(verdict.best_real or '', 60)}"
            _key(picture, left, top + height + 78 + 24 * len(losses), key, _INK, None, width)
    if real:
        x = left + width + 84 if curve else left
        wide = _WIDTH - _MARGIN - x
        axes = _metric_panel(picture, x, top, wide, height, (low, high), "Real images of the scarce classes")
        _real_line(picture, axes, verdict, (x, top, wide, height))
        if recipe:
            _level(axes, recipe, _LINES[3])
            _key(picture, x, top + height + 102, "chosen recipe, all real images", _LINES[3], None, wide)
    return picture


def _metric_panel(
    picture: _Picture,
    x: float,
    y: float,
    width: float,
    height: float,
    limits: tuple[float, float],
    heading: str,
) -> Axes:
    picture.text(x, y - 20, heading, _HEADING)
    axes = picture.axes(x, y, width, height)
    axes.set(ylim=limits)
    ticks = _ticks(*limits, 7)
    _label(axes, "y", ticks, [f"{tick:.{_digits(ticks)}f}" for tick in ticks])
    for tick in ticks:
        axes.axhline(tick, color=_FAINT, linewidth=0.6, zorder=0)
    return axes


def _dose_lines(
    picture: _Picture,
    axes: Axes,
    curve: Sequence[DosePoint],
    losses: Sequence[str],
    place: tuple[float, float, float, float],
) -> None:
    left, top, width, height = place
    doses = sorted(dict.fromkeys(item.dose for item in curve), key=dose_order)
    axes.set(xlim=(-0.5, len(doses) - 0.5))
    room = width / len(doses) - 8
    labels = []
    for dose in doses:
        numbers = sorted({item.n_synthetic for item in curve if item.dose == dose})
        total = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
        labels.append("\n".join(_fit(text, _SMALL, room) for text in (_drawable(dose, 20), f"{total} images")))
    _label(axes, "x", range(len(doses)), labels)
    for k, loss in enumerate(losses):
        colour, marker = _LINES[k % len(_LINES)], _MARKERS[k % len(_MARKERS)]
        aside = 0.1 * (k - (len(losses) - 1) / 2)
        mine = sorted((item for item in curve if item.loss == loss), key=lambda item: dose_order(item.dose))
        for item in mine:
            scores = _finite(item.scores)
            at = doses.index(item.dose) + aside
            axes.plot([at] * len(scores), scores, "o", color=colour, alpha=0.3, markersize=4, linewidth=0, zorder=3)
            axes.plot([at], [np.mean(scores)], marker, color=colour, markersize=7, zorder=5)
        # Only doses that are multiples lie on a scale; the plan and a dose for each class stand beside it.
        steps = [item for item in mine if dose_order(item.dose)[0] == 0]
        at_steps = [doses.index(item.dose) + aside for item in steps]
        axes.plot(at_steps, [np.mean(_finite(item.scores)) for item in steps], color=colour, linewidth=1.8, zorder=4)
        _key(picture, left, top + height + 78 + 24 * k, _drawable(loss, 60), colour, marker, width)


def _real_line(picture: _Picture, axes: Axes, verdict: Verdict, place: tuple[float, float, float, float]) -> None:
    x, top, width, height = place
    real = sorted((item for item in verdict.learning_curve if _finite(item.scores)), key=lambda item: item.n_real)
    numbers = [item.n_real for item in real]
    room = max(0.08 * (numbers[-1] - numbers[0]), 1)
    axes.set(xlim=(numbers[0] - room, numbers[-1] + room))
    # Not every point can have its number where shares are close to each other.
    ticks: list[int] = []
    scale = width / (numbers[-1] - numbers[0] + 2 * room)
    for n in reversed(numbers):
        if not ticks or (ticks[-1] - n) * scale > 60:
            ticks.append(n)
    shares = {item.n_real: item.share for item in real}
    _label(axes, "x", ticks, [f"{n:,}\n{100 * shares[n]:.0f} %" for n in ticks])
    for item in real:
        scores = _finite(item.scores)
        axes.plot([item.n_real] * len(scores), scores, "o", color=_INK, alpha=0.3, markersize=4, linewidth=0, zorder=3)
    means = [float(np.mean(_finite(item.scores))) for item in real]
    axes.plot(numbers, means, marker="o", color=_INK, linewidth=1.8, markersize=7, zorder=4)
    key = f"real images alone: {_drawable(verdict.best_real or 'the best real-only arm', 60)}"
    _key(picture, x, top + height + 78, key, _INK, "o", width)


def _level(axes: Axes, scores: Sequence[float], colour: str) -> None:
    axes.axhline(float(np.mean(scores)), color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)


def _key(picture: _Picture, x: float, y: float, text: str, colour: str, marker: str | None, width: float) -> None:
    """A line of the legend: a piece of the line, then what it stands for."""
    from matplotlib.lines import Line2D

    height = 1 - y / picture.height
    picture.figure.add_artist(
        Line2D(
            [x / _WIDTH, (x + 17) / _WIDTH, (x + 34) / _WIDTH],
            [height] * 3,
            color=colour,
            linewidth=1.8,
            linestyle="-" if marker else (0, (5, 3)),
            marker=marker,
            markersize=6,
            markevery=[1],
        )
    )
    picture.text(x + 46, y, _fit(text, _SMALL, width - 46), _SMALL)


def _confusion(verdict: Verdict) -> _Picture | None:
    """Which classes are taken for which, before and after, and what has changed."""
    by_key = {item.key: item for item in verdict.finalists}
    before, after = (by_key.get(key or "") for key in (verdict.best_real, verdict.recipe))
    if before is None or after is None or before is after:
        return None
    tables = [np.asarray(item.confusion, dtype=np.float64) for item in (before, after)]
    n = len(tables[0])
    if n == 0 or any(table.shape != (n, n) for table in tables):
        return None
    names = _class_names(verdict, n)
    lines = [
        f"Share of the images of a class (row) taken for a class (column), in per cent. {_test(verdict)}",
        "Before and after: more on the diagonal is better. Difference: blue is more, orange is less; blue on the "
        "diagonal and orange elsewhere are better.",
    ]
    if n > _MOST_NAMED:
        lines.append("Numbers beside are places in the list of classes, from 0.")
    title = "Which classes are taken for which, on the test split: a strong diagonal is better"
    titles = (
        f"Before: {_drawable(before.key, 60)}",
        f"After: {_drawable(after.key, 60)}",
        "Difference: after minus before",
    )
    panels = list(zip((*tables, tables[1] - tables[0]), titles, strict=True))
    if n <= _MOST_NUMBERED:
        return _confusion_row(n, names, panels, title, lines)
    return _confusion_square(n, names, panels, title, lines)


_Panels = Sequence[tuple[np.ndarray, str]]


def _confusion_row(n: int, names: Sequence[str], panels: _Panels, title: str, lines: Sequence[str]) -> _Picture:
    """Three panels side by side with numbers in the cells; the names of the rows stand once."""
    aside = max(_width(_fit(name, _SMALL, 150, ends=True), _SMALL) for name in names) + 14
    side = (_WIDTH - 2 * _MARGIN - aside - 2 * 22) / 3
    upright = any(_width(name, _SMALL) > side / n - 6 for name in names)
    below = _below(names, 150) if upright else 24
    picture = _Picture(round(40 + side + 16 + below), title, lines)
    for k, (table, words) in enumerate(panels):
        x = _MARGIN + aside + k * (side + 22)
        axes = _heat(picture, table, words, (x, picture.y + 40, side), difference=k == 2)
        _label(axes, "x", range(n), [_fit(name, _SMALL, 150, ends=True) for name in names], upright=upright)
        if k == 0:
            _label(axes, "y", range(n), [_fit(name, _SMALL, 150, ends=True) for name in names])
        size = min(_HEADING, side / n / 3.8)
        largest = _largest(table) if k == 2 else 1.0
        for (row, column), value in np.ndenumerate(table):
            if math.isfinite(value):
                dark = abs(value) / largest > 0.6
                text = signed(100 * value, 0) if k == 2 else f"{100 * value:.0f}"
                axes.text(
                    column,
                    row,
                    text,
                    color="white" if dark else _INK,
                    fontproperties=_properties(size),
                    horizontalalignment="center",
                    verticalalignment="center",
                    parse_math=False,
                )
    return picture


def _confusion_square(n: int, names: Sequence[str], panels: _Panels, title: str, lines: Sequence[str]) -> _Picture:
    """Before and after above, the difference below, and beside it the largest changes in words."""
    named = n <= _MOST_NAMED
    aside = max(_width(_fit(name, _SMALL, 110, ends=True), _SMALL) for name in names) + 14 if named else 36
    below = _below(names, 110) + 14 if named else 30
    bar = 64
    side = (_WIDTH - 2 * _MARGIN) / 2 - aside - bar - 10
    step = 40 + side + 16 + below
    picture = _Picture(round(2 * step), title, lines)
    ticks = (
        list(range(n))
        if named
        else list(range(0, n, next(step for step in (10, 20, 50, 100, 200, 500, n) if n <= 10 * step)))
    )
    for k, (table, words) in enumerate(panels):
        x = _MARGIN + aside + (k % 2) * (_WIDTH / 2 - _MARGIN + 10)
        y = picture.y + 40 + (k // 2) * step
        axes = _heat(picture, table, words, (x, y, side), difference=k == 2, bar=True)
        labels = [_fit(name, _SMALL, 110, ends=True) for name in names] if named else [str(tick) for tick in ticks]
        _label(axes, "x", ticks, labels, upright=named)
        _label(axes, "y", ticks, labels)
    _largest_changes(picture, panels[2][0], names, _WIDTH / 2 + 10, picture.y + step + 22)
    return picture


def _largest_changes(picture: _Picture, change: np.ndarray, names: Sequence[str], x: float, y: float) -> None:
    picture.text(x, y, "Largest changes, in points: true class → taken for", _HEADING)
    sizes = np.nan_to_num(np.abs(change)).ravel()
    room = _WIDTH - _MARGIN - x - 70
    for i, place in enumerate(np.argsort(-sizes, kind="stable")[:_MOST_CHANGES]):
        if sizes[place] < 0.0005:
            break
        row, column = divmod(int(place), len(names))
        value = float(change[row, column])
        line = y + 32 + _ROW * i
        good = (value > 0) == (row == column)
        picture.text(x + 52, line, signed(100 * value), _SMALL, _BETTER if value > 0 else _WORSE, "right")
        taken = "itself" if row == column else _fit(names[column], _SMALL, room / 2 - 30, ends=True)
        text = f"{_fit(names[row], _SMALL, room / 2 - 30, ends=True)} → {taken} ({'better' if good else 'worse'})"
        picture.text(x + 66, line, _fit(text, _SMALL, room), _SMALL)


def _heat(
    picture: _Picture,
    table: np.ndarray,
    words: str,
    place: tuple[float, float, float],
    *,
    difference: bool,
    bar: bool = False,
) -> Axes:
    """A square panel of a table; a difference is blue where it is above zero and orange below."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm

    x, y, side = place
    size = _HEADING if _width(words, _HEADING) <= side else _SMALL
    picture.text(x, y - 18, _fit(words, size, side + (40 if bar else 10)), size)
    axes = picture.axes(x, y, side, side)
    if difference:
        colours = LinearSegmentedColormap.from_list("difference", [_WORSE, "white", _BETTER])
        norm: Normalize = Normalize(-_largest(table), _largest(table))
    else:
        colours = LinearSegmentedColormap.from_list("share", ["white", "#56B4E9", "#003B5C"])
        # Where no number stands in a cell, the colours of small shares are drawn apart.
        norm = PowerNorm(0.5, 0, 1) if bar else Normalize(0, 1)
    axes.imshow(np.ma.masked_invalid(table), cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    for spine in axes.spines.values():
        spine.set_visible(True)
    if bar:
        scale = picture.axes(x + side + 10, y, 12, side)
        low, high = (-_largest(table), _largest(table)) if difference else (0.0, 1.0)
        steps = np.linspace(high, low, 256)[:, None]
        scale.imshow(steps, cmap=colours, norm=norm, extent=(0, 1, low, high), aspect="auto")
        ticks = _ticks(low, high, 6)
        labels = [signed(100 * tick, _digits(ticks, 100)) if difference else f"{100 * tick:.0f}" for tick in ticks]
        _label(scale, "y", ticks, labels, right=True)
    return axes


def _largest(table: np.ndarray) -> float:
    return max(float(np.nan_to_num(np.abs(table)).max()), 0.01)


def _class_names(verdict: Verdict, n: int) -> list[str]:
    names = verdict.class_names if len(verdict.class_names) == n else [str(k) for k in range(n)]
    return [_drawable(name, 60) for name in names]


def _below(names: Sequence[str], most: float) -> int:
    """Height of upright names under a panel."""
    return round(max(_width(_fit(name, _SMALL, most, ends=True), _SMALL) for name in names)) + 14


def _test(verdict: Verdict) -> str:
    images = count(verdict.n_test, "real test image")
    sentence = f"{images}, {count(verdict.seeds, 'classifier seed')}; {look(verdict.looks)}."
    return sentence[0].upper() + sentence[1:]


def _label(
    axes: Axes,
    which: str,
    ticks: Sequence[float],
    labels: Sequence[str],
    *,
    upright: bool = False,
    above: bool = False,
    right: bool = False,
) -> None:
    """Set the ticks of an axis and what is written at them."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(list(ticks))
    kind: dict[str, Any] = {"fontproperties": _properties(_SMALL), "color": _INK, "parse_math": False}
    axis.set_ticklabels(list(labels), **kind, rotation=90 if upright else 0)
    axis.set_tick_params(length=3, width=0.8, color=_UNCLEAR, pad=4)
    if above:
        axis.set_tick_params(labeltop=True)
        # The labels above are texts of their own.
        for tick in axis.get_major_ticks():
            tick.label2.set(**kind)
    if right:
        axis.set_tick_params(left=False, right=True, labelleft=False, labelright=True)
        for tick in axis.get_major_ticks():
            tick.label2.set(**kind)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values within the limits."""
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def _digits(ticks: Sequence[float], scale: float = 1) -> int:
    """Decimals that tell the ticks apart."""
    if len(ticks) < 2:
        return 2
    step = scale * (ticks[1] - ticks[0])
    return next((n for n in range(6) if abs(step * 10**n - round(step * 10**n)) < 1e-6 * max(1, step * 10**n)), 6)


def _around(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.005)
    return low - room, high + room


def _finite(scores: Sequence[float]) -> list[float]:
    return [score for score in scores if math.isfinite(score)]


def _drawable(text: str, width: int) -> str:
    """A text from data on one line, what the font has no shape for written as its code."""
    known = _shapes()
    parts = []
    for character in printable(text, width=width):
        if ord(character) in known:
            parts.append(character)
            continue
        # Letters with accents keep the letter.
        letter = unicodedata.normalize("NFKD", character)[0]
        parts.append(letter if letter.isascii() and letter.isprintable() else escaped(character))
    return "".join(parts)


def _fit(text: str, size: float, width: float, *, ends: bool = False) -> str:
    """Cut a text to `width` pixels; with `ends`, names that begin alike keep what tells them apart."""
    if _width(text, size) <= width:
        return text

    def cut(n: int) -> str:
        last = n // 3 if ends else 0
        return text[: n - last] + "…" + text[len(text) - last :]

    # The most characters that fit: the width grows with every one.
    return cut(bisect_right(range(1, len(text)), width, key=lambda n: _width(cut(n), size)))


def _wrapped(text: str, size: float, width: float) -> list[str]:
    """Break a text into lines of `width` pixels."""
    characters = len(text)
    while characters > 20:
        lines = textwrap.wrap(text, characters)
        if all(_width(line, size) <= width for line in lines):
            return lines
        characters -= max(1, characters // 30)
    return [_fit(line, size, width) for line in textwrap.wrap(text, 20)]


def _width(text: str, size: float) -> float:
    font = _font()
    font.set_size(size, _DPI)
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64


@cache
def _font_file() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _shapes() -> frozenset[int]:
    """The characters that the font has."""
    return frozenset(_font().get_charmap())


def _font() -> FT2Font:
    from matplotlib.font_manager import get_font

    return get_font(str(_font_file()))


def _properties(size: float) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=str(_font_file()), size=size)
