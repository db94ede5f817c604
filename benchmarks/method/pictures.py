"""Pictures of the benchmark: gains by setting, ours against each peer, KID over time, the solver over its steps.

matplotlib's objects alone, as in `synthaug.report.verdict_pictures`: no pyplot, no display; the same figures give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.formats.atomic import whole_file
from synthaug.report.verdict_words import signed

_DPI = 120
# Of the palette of Okabe and Ito, which colour-blind people tell apart.
_BETTER, _WORSE, _UNCLEAR, _INK, _FAINT = "#0072B2", "#D55E00", "#777777", "#222222", "#DDDDDD"
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_METRICS = {"balanced_accuracy": "balanced accuracy", "rare_auprc": "rare AUPRC"}


def write_pictures(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write method_utility.png, method_peers.png, method_kid.png and method_solver.png; nothing gives no picture."""
    made: list[tuple[str, Callable[[Mapping[str, Any]], Any]]] = [
        ("method_utility.png", _utility),
        ("method_peers.png", _peers),
        ("method_kid.png", _kid),
        ("method_solver.png", _solver),
    ]
    written = []
    for name, draw in made:
        figure = draw(found)
        if figure is None:
            (folder / name).unlink(missing_ok=True)
            continue
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with whole_file(folder / name) as temporary, temporary.open("wb") as file:
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        written.append(folder / name)
    return written


def _utility(found: Mapping[str, Any]) -> Any:
    rows = [
        (
            row["setting"],
            [row[f"real/{metric}"] for metric in _METRICS],
            f"{row['compared']} of {row['replicates']} replicates",
        )
        for row in found["utility"]
    ]
    overall = found["overall"]["like these"]["real"]
    if len(rows) > 1:
        rows.append(("mean over settings", [overall[metric] for metric in _METRICS], ""))
    return _forest(rows, "Synthetic arm minus the best real-only arm on test, points with 95 % intervals")


def _peers(found: Mapping[str, Any]) -> Any:
    rows = [
        (
            row["method"] + (f", {row['minutes']:g} min" if row["minutes"] else ""),
            [row[metric] for metric in _METRICS],
            f"{row['trials']} trial{'' if row['trials'] == 1 else 's'}"
            + (f", {row['ours_of_then']} to ours of then" if row["ours_of_then"] else ""),
        )
        for row in found["contest"]
    ]
    return _forest(rows, "Ours minus each peer on test, same images and seeds, points with 95 % intervals")


def _forest(rows: Sequence[tuple[str, Sequence[Mapping[str, float] | None], str]], title: str) -> Any:
    """One panel a metric, one row an interval; blue above zero, orange below, grey across it."""
    from matplotlib.figure import Figure

    if not any(one is not None for _, intervals, _ in rows for one in intervals):
        return None
    figure = Figure(figsize=(10, 1.5 + 0.34 * len(rows)), dpi=_DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=_INK)
    panels = figure.subplots(1, len(_METRICS), sharey=True, squeeze=False)[0]
    for panel, words, column in zip(panels, _METRICS.values(), range(len(_METRICS)), strict=True):
        panel.axvline(0, color=_INK, linewidth=1)
        panel.grid(axis="x", color=_FAINT, linewidth=0.6)
        ends = [0.0]
        for y, (_, intervals, _) in enumerate(rows):
            if (one := intervals[column]) is None:
                continue
            low, middle, high = (100 * one[name] for name in ("low", "estimate", "high"))
            colour, marker = (_BETTER, "^") if low > 0 else (_WORSE, "v") if high < 0 else (_UNCLEAR, "o")
            panel.plot([low, high], [y, y], color=colour, linewidth=2)
            panel.plot([middle], [y], marker=marker, color=colour, markersize=6)
            panel.annotate(
                signed(middle),
                (middle, y),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=colour,
            )
            ends += [low, high]
        room = max(0.5, 0.08 * (max(ends) - min(ends)))
        panel.set(xlim=(min(ends) - room, max(ends) + room), ylim=(len(rows) - 0.4, -0.7))
        panel.set_xlabel(f"{words}, points", fontsize=9)
        panel.tick_params(labelsize=8)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    names = [name + (f"  ({note})" if note else "") for name, _, note in rows]
    panels[0].set_yticks(range(len(rows)), names, fontsize=8.5)
    return figure


def _kid(found: Mapping[str, Any]) -> Any:
    """KID and coverage over minutes, one column a setting: means of the replicates, and each of them small."""
    from matplotlib.figure import Figure

    rows = [row for row in found["peers"] if row["kid"] is not None and row["coverage"] is not None]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if not settings:
        return None
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(1.2 + 3.6 * len(settings) + 2, 6), dpi=_DPI, facecolor="white", layout="constrained")
    # Short, since with one setting the picture is narrow; which way is better stands at the axes.
    figure.suptitle(
        "Samples of the scarce classes against their training images", fontsize=10, x=0.01, ha="left", color=_INK
    )
    panels = figure.subplots(2, len(settings), squeeze=False, sharex="col")
    for column, setting in enumerate(settings):
        for line, what in enumerate(("kid", "coverage")):
            panel = panels[line][column]
            for number, method in enumerate(methods):
                own = [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
                if not own:
                    continue
                colour, marker = _LINES[number % 7], _MARKERS[number % 7]
                panel.plot(
                    [row["making_seconds"] / 60 for row in own], [row[what] for row in own], marker, color=colour,
                    markersize=3, alpha=0.5,
                )  # fmt: skip
                budgets = sorted({row["minutes"] for row in own})
                means = [
                    [float(np.mean([row[key] for row in own if row["minutes"] == budget])) / per for budget in budgets]
                    for key, per in (("making_seconds", 60), (what, 1))
                ]
                panel.plot(*means, color=colour, marker=marker, markersize=6, linewidth=1.2, label=method)
            panel.grid(color=_FAINT, linewidth=0.6)
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            if column == 0:
                panel.set_ylabel("KID, lower is better" if what == "kid" else "coverage, higher is better", fontsize=9)
        panels[0][column].set_title(setting, fontsize=9.5, color=_INK)
        panels[1][column].set_xlabel("minutes of training and sampling", fontsize=9)
    # Of all panels: no setting need have every method.
    handles = {name: line for panel in panels[0] for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    shown = [method for method in methods if method in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _solver(found: Mapping[str, Any]) -> Any:
    """KID over seconds of drawing, ours and DDIM."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    items = [item for item in found["speed"] if item["action"] == "solver"]
    items = [item for item in items if all(one["kid"] is not None for one in item["result"]["ours"])]
    if not items:
        return None
    figure = Figure(figsize=(5.2 * len(items), 4), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(items), squeeze=False)[0]
    for panel, item in zip(panels, items, strict=True):
        for number, (name, words) in enumerate((("ours", item["result"].get("solver", "ours")), ("ddim", "DDIM"))):
            own = item["result"][name]
            seconds, kid = [one["seconds"] for one in own], [one["kid"] for one in own]
            panel.plot(seconds, kid, color=_LINES[number], marker=_MARKERS[number], label=words, linewidth=1.4)
            for one in own:
                panel.annotate(
                    str(one["steps"]),
                    (one["seconds"], one["kid"]),
                    xytext=(3, 5),
                    textcoords="offset points",
                    fontsize=7,
                )
        panel.set_title(f"{item['setting']}: same weights and noise; steps beside the points", fontsize=9.5, color=_INK)
        panel.set_xlabel(f"seconds for {item['result']['samples']} samples", fontsize=9)
        panel.set_ylabel("KID, lower is better", fontsize=9)
        panel.set_xscale("log")
        # 1, 2 and 5 of each decade, as plain numbers.
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(color=_FAINT, linewidth=0.6)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return figure
