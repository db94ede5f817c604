"""docs/method.md, docs/method.json and pictures, from the records of the cells that are done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.method import peers, summary
from benchmarks.method.cells import Cell, Place
from benchmarks.method.pictures import write_pictures
from benchmarks.method.settings import PEER_DOSE, SETTINGS
from benchmarks.method.speed import time_to_kid
from synthaug.formats.atomic import write_text
from synthaug.records import Interval
from synthaug.report.verdict_words import points, signed
from synthaug.text import printable

MARKDOWN, JSON = "method.md", "method.json"
# Beside a figure of a cell that is stale.
_OTHER = "made by other code"
# A run that took longer than this, as a share of its budget, is marked; peers may run over by as much.
_OVER = 1.1
_WORDS = {"ours": "synthaug"} | {name: peer.words for name, peer in peers.PEERS.items()}


def collect(cells: Sequence[Cell], place: Place) -> dict[str, Any]:
    """All figures of the tables, as plain data."""
    records = [record | {"stale": place.stale(cell)} for cell in cells if (record := place.load(cell.name)) is not None]
    rows = summary.against_peers(cells, place)
    means = {
        name: {
            against: {
                metric: _plain(summary.overall(records, against, metric, these=these)) for metric in summary.METRICS
            }
            for against in summary.AGAINST
        }
        for name, these in (("like these", False), ("these", True))
    }
    speed = [
        {"cell": record["cell"]["name"], "setting": record["cell"]["setting"], "action": record["cell"]["action"],
         "machine": record["machine"], "stale": record["stale"], "result": record["result"]}
        for record in records
        if record["cell"]["part"] == "speed" or record["cell"]["action"] == "gpu"
    ]  # fmt: skip
    # The same tables of what a GPU made.
    on_gpu = [
        record | {"cell": record["cell"] | {"part": "utility"}}
        for record in records
        if record["cell"]["part"] == "gpu" and record["cell"]["action"] != "gpu"
    ]
    return {
        "cells_done": len(records),
        "stale": [record["cell"]["name"] for record in records if record["stale"]],
        "cells": sum(not cell.optional for cell in cells),
        "left": [cell.name for cell in cells if not cell.optional and place.load(cell.name) is None],
        "left_minutes": sum(
            cell.estimate
            for cell in cells
            if not cell.optional and cell.part != "gpu" and place.load(cell.name) is None
        ),
        "machines": sorted(
            {
                f"{one['machine']['processor']}, {one['machine']['cores']} cores"
                + (f" and {one['machine']['gpu']}" if "gpu" in one["machine"] else "")
                for one in records
            }
        ),
        "commits": sorted({one["commit"] for one in records}),
        "versions": records[-1]["versions"] if records else {},
        "threads": sorted({one["threads"] for one in records}),
        "dates": sorted({one["started"][:10] for one in records}),
        "load": [min(loads), max(loads)] if (loads := [one["machine"]["load_before"] for one in records]) else None,
        "utility": summary.utility(records),
        "compared": dict(zip(("trials", "of"), summary.compared(records), strict=True)),
        "overall": means,
        "makes": summary.makes(records),
        "gpu": {"utility": summary.utility(on_gpu), "makes": summary.makes(on_gpu)},
        "peers": rows,
        "contest": summary.contest(rows),
        "speed": speed,
    }


def write_report(cells: Sequence[Cell], place: Place, docs: Path) -> list[Path]:
    """Write the tables and pictures; returns their paths."""
    found = collect(cells, place)
    docs.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(found, docs)
    write_text(docs / JSON, json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(docs / MARKDOWN, markdown(found, cells, [path.name for path in pictures]))
    return [docs / MARKDOWN, docs / JSON, *pictures]


def markdown(found: Mapping[str, Any], cells: Sequence[Cell], pictures: Sequence[str]) -> str:
    parts = ["# The method against every peer", "", _head(found), ""]
    parts += [*(f"![{name}]({name})" for name in pictures), ""] if pictures else []
    parts += _utility(found) + _makes(found) + _peers(found) + _speed(found) + _utility_on_gpu(found)
    parts += _stale(found) + _cells(cells, found)
    return "\n".join(parts).rstrip() + "\n"


def _head(found: Mapping[str, Any]) -> str:
    if not found["cells_done"]:
        return "Written by `python -m benchmarks.method --report`. No cell has been run yet."
    low, high = found["load"]
    return (
        f"Written by `python -m benchmarks.method --report`: {found['cells_done']} cells done, {len(found['left'])} of "
        f"{found['cells']} left. {'; '.join(found['machines'])}; {', '.join(map(str, found['threads']))} threads; "
        f"{', '.join(found['dates'])}; load of the machine before the cells {low:.1f} to {high:.1f} (figures of time "
        f"want "
        f"less than 1); commits {', '.join(found['commits'])}; torch {found['versions'].get('torch', '?')}.\n\n"
        + (
            f"{len(found['stale'])} of these cells were made by other code than this ({_OTHER}); they are named below, "
            "and figures of both states of the code stand side by side until `--redo-stale` has made them again.\n\n"
            if found["stale"]
            else ""
        )
        + "Differences are in percentage points with 95 % intervals. BUSI has no patient ids and holds "
        "near-duplicates, which "
        "are kept on one side; BreastMNIST was made from it, and nothing trained on one is tested on the other."
    )


def _utility(found: Mapping[str, Any]) -> list[str]:
    if not found["utility"]:
        return []
    lines = [
        "## Utility: the best arm with synthetic images minus other arms, on test",
        "",
        "Each trial chooses its arms on validation; one generator and one rare subset a replicate. Intervals: "
        "hierarchical "
        "bootstrap over replicates with the test images' and classifier seeds' own (`benchmarks/method/summary.py`); "
        "with one "
        "replicate they say nothing of another generator. A trial that compared nothing and recommends no dose counts "
        "as 0 in every mean: its user has the best real-only arm.",
        "",
        *_utility_rows(found["utility"]),
    ]
    lines += [
        "",
        f"Mean over the settings; {found['compared']['trials']} of {found['compared']['of']} trials compared. "
        '"Like these": settings are drawn again too. "These": they are not.',
        "",
        "| against | interval for settings | balanced accuracy | macro-F1 | rare AUPRC | settings, fewest replicates |",
        "|---|---|---|---|---|---|",
    ]
    words = {"real": "the best real-only arm", "duplicates": "duplicates", "scrambled": "content-free images"}
    for name, means in found["overall"].items():
        for against, values in means.items():
            counts = next((f"{one['settings']}, {one['replicates']}" for one in values.values() if one), "")
            shown = " | ".join(_points(values[metric]) for metric in summary.METRICS)
            lines.append(f"| {words[against]} | {name} | {shown} | {counts} |")
    return [*lines, ""]


def _utility_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| setting | replicates compared | verdicts | against the best real-only arm: balanced accuracy | macro-F1 | "
        "rare AUPRC | against duplicates | against content-free | recommended dose gains | coverage | KID |",
        "|---|---|---|---|---|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            f"{row['setting']} ({SETTINGS[row['setting']].words})",
            f"{row['compared']} of {row['replicates']}"
            + (f", {row['by_other_code']} {_OTHER}" if row["by_other_code"] else ""),
            ", ".join(_counted(row["outcomes"])),
            *(_points(row[f"real/{metric}"]) for metric in summary.METRICS),
            _points(row["duplicates/balanced_accuracy"]),
            _points(row["scrambled/balanced_accuracy"]),
            "" if row["recommended"] is None else signed(100 * row["recommended"]),
            _number(row["coverage"], 2),
            _number(row["kid"], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [
        f"{row['setting']}, replicate {one['replicate']}"
        + (f" (withheld: {', '.join(map(printable, one['withheld']))})" if one["withheld"] else "")
        + f": {one['why'].rstrip('.')}"
        for row in rows
        for one in row["failed"]
    ]
    return [*lines, *(["", f"Compared nothing: {'; '.join(failed)}."] if failed else [])]


def _makes(found: Mapping[str, Any]) -> list[str]:
    if not found["makes"]:
        return []
    lines = [
        "## What our runs took, and near-copies before the gate",
        "",
        *_makes_rows(found["makes"]),
    ]
    withheld = [
        f"{row['setting']}, replicate {row['replicate']}: {name} ({why.partition(':')[0]})"
        for row in found["makes"]
        for name, why in row["withheld"].items()
    ]
    return [*lines, "", *([f"Withheld by the audit: {'; '.join(withheld)}.", ""] if withheld else [])]


def _makes_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| run | budget, min | training and sampling, s | of it sampling | training images, a second | near-copies "
        "before the gate | held-out real images by the same test | load |",
        "|---|---:|---:|---:|---:|---|---|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['setting']}, replicate {row['replicate']}{_marked(row)} | {row['budget']:g} | "
            f"{_took(row['making_seconds'], row['budget'])} | "
            f"{row['sampling_seconds']:.0f} | {row['training_images']:,}, {row['training_images_per_second']:.0f} | "
            f"{_share(row['near_copies'], row['near_copies_of'])} | "
            f"{_share(row['heldout_near_copies'], row['heldout_near_copies_of'])} | {row['load']:.1f} |"
        )
    return lines


def _utility_on_gpu(found: Mapping[str, Any]) -> list[str]:
    gpu = found["gpu"]
    if not gpu["makes"] and not gpu["utility"]:
        return []
    lines = [
        "## The same minutes on a GPU",
        "",
        "The recipe of the tables above on a GPU: trained in half-width floating point (bf16), so many more images in "
        "the same minutes; the classifiers of the trial run there too.",
        "",
    ]
    lines += [*_utility_rows(gpu["utility"]), ""] if gpu["utility"] else []
    return lines + ([*_makes_rows(gpu["makes"]), ""] if gpu["makes"] else [])


def _peers(found: Mapping[str, Any]) -> list[str]:
    if not found["peers"]:
        return []
    lines = [
        "## Peers at equal wall time",
        "",
        f"Same training images, {PEER_DOSE} samples for each real image of a scarce class, the same trial. The "
        "budget is for training and sampling on the same threads; a method that draws so slowly that half of it does "
        "not "
        "suffice offers fewer. The tuning of a peer's rate is beside its budget. Ours passes its audit first, as a "
        "user's "
        "samples do.",
        "",
        "| setting, replicate | method | budget, min | took, s | training images | samples a second | offered | "
        "verdict | "
        "to the best real-only arm | coverage | KID | ours minus it: balanced accuracy | rare AUPRC |",
        "|---|---|---:|---:|---:|---:|---:|---|---|---:|---:|---|---|",
    ]
    for row in found["peers"]:
        minus = row.get("ours_minus") or {}
        cells = [
            f"{row['setting']}, {row['replicate']}{_marked(row)}",
            _WORDS[row["method"]],
            f"{row['minutes']:g}" if row["minutes"] else "none",
            _took(row["making_seconds"], row["minutes"]),
            f"{row['training_images']:,}",
            f"{row['samples_per_second']:.3g}",
            str(row["offered"]) + (f" ({row['short']} short)" if row["short"] else ""),
            row["outcome"],
            _points(row["to_best_real"]),
            _number(row["coverage"], 2),
            _number(row["kid"], 3),
            _points(minus.get("balanced_accuracy")) + (" (to ours of then)" if row.get("ours_of_then") else ""),
            _points(minus.get("rare_auprc")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if found["contest"]:
        lines += [
            "",
            "| ours minus | budget, min | trials (of them ours failed; to ours of then; not compared) | "
            "balanced accuracy | macro-F1 | "
            "rare AUPRC | intervals above, below zero | coverage ahead |",
            "|---|---:|---:|---|---|---|---|---|",
        ]
        for row in found["contest"]:
            lines.append(
                f"| {_WORDS[row['method']]} | {format(row['minutes'], 'g') if row['minutes'] else 'none'} | "
                f"{row['trials']} ({row['ours_failed']}; {row['ours_of_then']}; {len(row['not_compared'])}) | "
                f"{' | '.join(_points(row[metric]) for metric in summary.METRICS)} | {row['above']}, {row['below']} | "
                f"{row['coverage_ahead']} of {row['coverage_of']} |"
            )
        said = [
            f"{_WORDS[row['method']]}{', ' + format(row['minutes'], 'g') + ' min' if row['minutes'] else ''}, "
            f"{one['setting']}, replicate {one['replicate']}: {one['why'].rstrip('.')}"
            for row in found["contest"]
            for one in row["not_compared"]
        ]
        lines += [
            "",
            "Where our own trial compared nothing, ours counts as the best real-only arm, never above the other "
            "method, and as below zero. Where this machine has not the scores of both, a difference is to ours as it "
            "was when the other method's cell ran: to ours of then, where other code has made ours since. Verdict, "
            "coverage and KID in the row of ours are of ours as it is.",
        ]
        lines += ["", f"Not compared: {'; '.join(said)}."] if said else []
    reached = _reached(found["peers"])
    return [*lines, "", *([*reached, ""] if reached else [])]


def _reached(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """When each method's KID came to that of ours at its smallest budget."""
    by_setting: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["minutes"] and row["kid"] is not None and row["replicate"] == 0:
            by_setting.setdefault(row["setting"], {}).setdefault(row["method"], []).append((row["minutes"], row["kid"]))
    lines = []
    for setting, points_of in by_setting.items():
        found = time_to_kid(points_of)
        if len(found) < 2:
            continue
        said = [
            name + (" not within its budgets" if minutes is None else f" by {minutes:g} min")
            for name, minutes in found.items()
        ]
        lines.append(f"KID of ours at its smallest budget, {setting}: reached by {', '.join(said)}.")
    return lines


def _speed(found: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for item in found["speed"]:
        if item["action"] == "rates":
            lines += _rates(item)
        elif item["action"] == "solver":
            lines += _solver(item)
        elif item["action"] == "profile":
            lines += _profile(item)
        else:
            lines += _gpu(item)
    return ["## Speed", "", *lines] if lines else []


def _rates(item: Mapping[str, Any]) -> list[str]:
    rounds, ratios = item["result"]["rounds"], item["result"]["ratios"]
    ours = [one["ours"] for one in rounds]
    lines = [
        f"### {item['setting']}: all in turns, {len(rounds)} rounds (load before {item['machine']['load_before']:.1f})"
        f"{_marked(item)}",
        "",
        f"Matrix product ({ours[0]['matrix_of']}) beside ours: "
        f"{_median(one['matrix_flops_per_second'] for one in ours) / 1e9:.0f} GFLOP/s. Ours reaches "
        f"{_median(one['training_share'] for one in ours):.0%} of it in training (its steps) and "
        f"{_median(one['sampling_share'] for one in ours):.0%} in sampling.",
        "",
        "| method | parameters | training images/s | ours times | samples/s | ours times | GFLOP/s training, sampling "
        "| peak "
        "memory, MiB (of it imports) |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name in rounds[0]:
        own = [one[name] for one in rounds]
        ratio = ratios.get(name, {})
        lines.append(
            f"| {_WORDS[name]} | {own[0]['parameters']:,} | "
            f"{_median(one['training_images_per_second'] for one in own):.3g} | "
            f"{_times(ratio.get('training_images_per_second'))} | "
            f"{_median(one['samples_per_second'] for one in own):.3g} | {_times(ratio.get('samples_per_second'))} | "
            f"{_median(one['training_flops_per_second'] for one in own) / 1e9:.0f}, "
            f"{_median(one['sampling_flops_per_second'] for one in own) / 1e9:.0f} | "
            f"{max(one['peak_bytes'] for one in own) / 2**20:.0f} "
            f"({own[0]['peak_bytes_of_imports'] / 2**20:.0f}) |"
        )
        ddpm = own[0].get("ddpm")
        if ddpm is not None:
            marked = (
                f"extrapolated from {ddpm['steps_timed']} of {ddpm['steps']} steps" if ddpm["extrapolated"] else "timed"
            )
            lines.append(
                f"| {_WORDS[name].replace('50 DDIM steps', 'its 1000 steps')} ({ddpm['samples']} samples, {marked}) | "
                f"| | "
                f"| {ddpm['samples_per_second']:.3g} | {_times(ratio.get('samples_per_second_by_1000_steps'))} | | |"
            )
    return [*lines, "", *_fewest(rounds)]


def _fewest(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours by as few evaluations as a checkpoint has a solver for, against the peers by their own samplers."""
    if "samples_per_second_by_fewest_steps" not in rounds[0]["ours"]:
        return []
    ours = _median(one["ours"]["samples_per_second_by_fewest_steps"] for one in rounds)
    times = []
    for name, first in rounds[0].items():
        if name == "ours":
            continue
        theirs = _median(one[name]["samples_per_second"] for one in rounds)
        times.append(f"{_times(ours / theirs)} times {_WORDS[name]}")
        if (ddpm := first.get("ddpm")) is not None:
            times.append(f"{_times(ours / ddpm['samples_per_second'])} times its 1000 steps")
    return [
        f"Ours by {rounds[0]['ours']['fewest_steps']} evaluations draws {ours:.3g} samples/s: {'; '.join(times)}.",
        "",
    ]


def _solver(item: Mapping[str, Any]) -> list[str]:
    result = item["result"]
    lines = [
        f"### {item['setting']}: our solver against DDIM, same weights and noise{_marked(item)}",
        "",
        f"{result['samples']} samples of '{result['class']}' against its {result['n_real']} training images. "
        + (
            f"From {result['equal_steps']} steps on ours is no worse than 50-step DDIM, {result['times_faster']:.1f} "
            f"times as fast."
            if result["equal_steps"] is not None
            else _not_from_any(result)
        ),
        "",
        "| solver | steps | seconds | KID | coverage |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, words in (("ours", result.get("solver", "ours, not named in its record")), ("ddim", "DDIM")):
        for one in result[name]:
            lines.append(
                f"| {words} | {one['steps']} | {one['seconds']:.1f} | {_number(one['kid'], 4)} | "
                f"{_number(one['coverage'], 2)} |"
            )
    return [*lines, ""]


def _not_from_any(result: Mapping[str, Any]) -> str:
    """There is no number of steps from which on ours is no worse; which numbers are so by themselves."""
    ddim = next(one for one in result["ddim"] if one["steps"] == 50)
    if ddim["kid"] is None:
        return "KID could not be measured."
    nearer = [one for one in result["ours"] if one["kid"] is not None and one["kid"] <= ddim["kid"]]
    said = "There is no number of steps from which on ours is at the KID of 50-step DDIM"
    if not nearer:
        return said + ", and none that was tried is."
    each = ", ".join(f"{one['steps']} ({ddim['seconds'] / one['seconds']:.1f} times as fast)" for one in nearer)
    return (
        f"{said}; by themselves these are: {each}. Few steps draw towards the mean of the training images, which KID "
        "against them takes for quality."
    )


def _profile(item: Mapping[str, Any]) -> list[str]:
    lines = [f"### {item['setting']}: where the time goes (torch.profiler){_marked(item)}", ""]
    for what in ("training", "sampling"):
        one = item["result"][what]
        lines += [
            f"{what.capitalize()}: {one['seconds']:.1f} s watched, {one['seconds_in_operations']:.1f} s of processor "
            f"time in "
            "operations.",
            "",
            "| operation | share | calls |",
            "|---|---:|---:|",
            *(f"| `{row['operation']}` | {row['share']:.1%} | {row['calls']:,} |" for row in one["rows"]),
            "",
        ]
    return lines


def _gpu(item: Mapping[str, Any]) -> list[str]:
    one = item["result"]
    return [
        f"### {one['device']}, {item['setting']} px, bf16, batches of {one['batch_size']}{_marked(item)}",
        "",
        f"{one['training_images_per_second']:.0f} training images/s ({one['training_share']:.1%} of the measured "
        f"product, "
        f"{one['matrix_of']}, {one['matrix_flops_per_second'] / 1e12:.0f} TFLOP/s), {one['samples_per_second']:.0f} "
        f"samples/s "
        f"({one['sampling_share']:.1%}), {one['peak_gpu_bytes'] / 2**20:.0f} MiB of its memory.",
        "",
        *_compiled(one),
    ]


def _compiled(one: Mapping[str, Any]) -> list[str]:
    """What torch.compile made of it."""
    if not one.get("compiled"):
        return []
    lines = [
        "| torch.compile | training images/s | samples/s | seconds beside the steps of a short training | of a first "
        "draw |",
        "|---|---:|---:|---:|---:|",
        f"| not | {one['training_images_per_second']:.0f} | {one['samples_per_second']:.0f} | "
        f"{one['training_seconds_beside_steps']:.0f} | |",
    ]
    for mode in one["compiled"]:
        if "failed" in mode:
            lines.append(f"| {mode['mode']} | failed: {printable(mode['failed'])} | | | |")
            continue
        lines.append(
            f"| {mode['mode']} | {mode['training_images_per_second']:.0f} | {mode['samples_per_second']:.0f} | "
            f"{mode['training_seconds_beside_steps']:.0f} | {mode['first_draw_seconds']:.0f} |"
        )
    return [*lines, ""]


def _cells(cells: Sequence[Cell], found: Mapping[str, Any]) -> list[str]:
    left = set(found["left"])
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell.name in left:
            groups.setdefault((cell.part, cell.setting, cell.method), []).append(cell)
    if not groups:
        return []
    lines = [
        "## Cells that are left",
        "",
        f"About {found['left_minutes'] / 60:.1f} hours on two idle cores, gpu aside; `--list` names each.",
        "",
        "| part | setting | method | cells | minutes |",
        "|---|---|---|---:|---:|",
    ]
    for (part, setting, method), own in groups.items():
        lines.append(f"| {part} | {setting} | {method} | {len(own)} | {sum(cell.estimate for cell in own):.0f} |")
    return [*lines, ""]


def _stale(found: Mapping[str, Any]) -> list[str]:
    if not found["stale"]:
        return []
    return ["## Cells made by other code", "", *(f"- `{name}`" for name in found["stale"]), ""]


def _marked(item: Mapping[str, Any]) -> str:
    return f" ({_OTHER})" if item["stale"] else ""


def _took(seconds: float, minutes: float) -> str:
    over = seconds / (60 * minutes) if minutes else 0.0
    return f"{seconds:.0f}" + (f" (**{over:.2f} of its budget**)" if over > _OVER else "")


def _counted(outcomes: Sequence[str]) -> list[str]:
    return [f"{outcome} {outcomes.count(outcome)}" for outcome in dict.fromkeys(outcomes)]


def _plain(found: summary.Pooled | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**found.interval.model_dump(), "settings": found.n_settings, "replicates": found.n_replicates}


def _points(item: Mapping[str, float] | None) -> str:
    if item is None:
        return ""
    return points(Interval(estimate=item["estimate"], low=item["low"], high=item["high"]))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(number: int | None, of: int | None) -> str:
    return f"{number} of {of} ({number / of:.1%})" if of and number is not None else "not measured"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _median(values: Iterable[float]) -> float:
    import statistics

    return statistics.median(values)
