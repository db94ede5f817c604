"""From the records of cells to the figures of the tables. Differences are shares; the tables say points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import special

from benchmarks.method.settings import SETTINGS
from synthaug.records import Interval

if TYPE_CHECKING:
    from benchmarks.method.cells import Cell, Place

METRICS = ("balanced_accuracy", "macro_f1", "rare_auprc")
AGAINST = ("real", "duplicates", "scrambled")
_RESAMPLES = 4000
# Of the recommended dose: where the verdict does not say 'helps' the recommendation is none, and nothing is lost by it.
_NONE = Interval(estimate=0.0, low=0.0, high=0.0)


class Replicate(NamedTuple):
    """One trial of one generator: differences to another arm, by metric."""

    setting: str
    replicate: int
    found: Mapping[str, Interval]


@dataclass(frozen=True)
class Pooled:
    """A mean over settings, or over the replicates of one."""

    interval: Interval
    n_settings: int
    n_replicates: int  # the fewest of a setting


def pool(found: Mapping[str, Sequence[Interval]], *, these: bool = False, seed: int = 0) -> Pooled | None:
    """Mean over settings of the mean over replicates, with a 95 % interval of a hierarchical bootstrap.

    Resample r draws the settings with replacement, and of each drawn setting its replicates; every draw of a setting
    also gets a normal error of the mean standard error of its own trials: test images and classifier seeds. Replicates
    share their test images, so their spread does not hold that, and it is not made less by their number. As seeds are
    in `synthaug.trial.statistics.paired_differences`, settings and replicates are pulled apart by
    c = sqrt(n / (n - 1)) · t(0.975, n - 1) / 1.96, since drawing from few understates the variance of their mean
    (Davison & Hinkley 1997, sec. 3.8). With one setting the interval speaks of that setting; with one replicate it
    holds the chance of its test images and classifier seeds alone, and says nothing of another generator.

    Args:
        found: Setting to the differences of its replicates, each with its interval.
        these: Of these very settings, which are not drawn again; otherwise of settings like these.

    Returns:
        None where there is nothing.
    """
    found = {name: list(own) for name, own in found.items() if own}
    if not found:
        return None
    random = np.random.default_rng(seed)
    means = np.array([np.mean([item.estimate for item in own]) for own in found.values()])
    drawn = np.stack([_of_setting(own, random) for own in found.values()])  # [S, B]
    n = len(means)
    if n == 1 or these:
        values = drawn.mean(0)
    else:
        shares = random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).T / n  # [S, B]
        within = (shares * (drawn - means[:, None])).sum(0)
        values = means.mean() + within + _pull(n) * ((shares - 1 / n) * means[:, None]).sum(0)
    low, high = np.quantile(values, [0.025, 0.975])
    estimate = float(means.mean())
    return Pooled(
        Interval(estimate=estimate, low=min(float(low), estimate), high=max(float(high), estimate)),
        n,
        min(len(own) for own in found.values()),
    )


def _of_setting(own: Sequence[Interval], random: np.random.Generator) -> np.ndarray:
    """Draws of a setting's mean, [B]."""
    estimates = np.array([item.estimate for item in own])
    error = float(np.mean([(item.high - item.low) / (2 * special.ndtri(0.975)) for item in own]))
    values = estimates.mean() + error * random.standard_normal(_RESAMPLES)
    n = len(own)
    if n > 1:
        shares = random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
        values = values + _pull(n) * (shares - 1 / n) @ estimates
    return values


def _pull(n: int) -> float:
    return float(np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, 0.975) / special.ndtri(0.975))


def utility(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the utility table, one a setting, from the cells' records.

    A trial of ours that compared nothing counts as `differences` says, and is named in `failed`.
    """
    records = list(records)
    withheld = {
        (item["cell"]["setting"], item["cell"]["replicate"], item["cell"]["minutes"]): sorted(
            item["result"]["withheld"]
        )
        for item in records
        if item["cell"]["part"] == "utility" and item["cell"]["action"] == "make"
    }
    rows = []
    trials = [item for item in records if item["cell"]["part"] == "utility" and item["cell"]["action"] == "trial"]
    for name in SETTINGS:
        own = [item for item in trials if item["cell"]["setting"] == name]
        if not own:
            continue
        row: dict[str, Any] = {
            "setting": name,
            "replicates": len(own),
            "compared": sum(has_compared(item["result"]) for item in own),
            "failed": [
                {
                    "replicate": item["cell"]["replicate"],
                    "why": item["result"]["sentence"],
                    "withheld": withheld.get((name, item["cell"]["replicate"], item["cell"]["minutes"]), []),
                }
                for item in own
                if not has_compared(item["result"])
            ],
            "by_other_code": sum(item.get("stale", False) for item in own),
            "outcomes": [item["result"]["outcome"] for item in own],
            "dose": [item["result"]["dose"] for item in own],
            "offered": [item["result"]["offered"] for item in own],
            "coverage": _mean(item["result"]["coverage"] for item in own),
            "kid": _mean(item["result"]["kid"] for item in own),
            "sentences": [item["result"]["sentence"] for item in own],
        }
        for against in AGAINST:
            for metric in METRICS:
                pooled = pool({name: differences(own, against, metric)})
                row[f"{against}/{metric}"] = None if pooled is None else pooled.interval.model_dump()
        row["recommended"] = _mean(recommended(item["result"]).estimate for item in own)
        rows.append(row)
    return rows


def overall(records: Iterable[Mapping[str, Any]], against: str, metric: str, *, these: bool = False) -> Pooled | None:
    """The mean over settings; see `pool`."""
    trials = [item for item in records if item["cell"]["part"] == "utility" and item["cell"]["action"] == "trial"]
    by_setting: dict[str, list[Interval]] = {}
    for name in SETTINGS:
        by_setting[name] = differences([one for one in trials if one["cell"]["setting"] == name], against, metric)
    return pool(by_setting, these=these)


def compared(records: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Of the utility trials those that compared something, and all."""
    found = [
        has_compared(item["result"])
        for item in records
        if item["cell"]["part"] == "utility" and item["cell"]["action"] == "trial"
    ]
    return sum(found), len(found)


def has_compared(result: Mapping[str, Any]) -> bool:
    """Whether a trial came to a difference: not where every class was withheld, or time or images were missing."""
    return bool(result["differences"].get("real"))


def differences(trials: Iterable[Mapping[str, Any]], against: str, metric: str) -> list[Interval]:
    """Of trials of ours. One that compared nothing and recommends no dose has a difference of 0, certain: whoever
    follows it has the best real-only arm. Left out, a generator that failed would raise the mean of those that did not.
    """
    found = []
    for item in trials:
        result = item["result"]
        if (own := result["differences"].get(against, {}).get(metric)) is not None:
            found.append(Interval.model_validate(own))
        elif not has_compared(result) and not result["dose"]:
            found.append(_NONE)
    return found


def recommended(result: Mapping[str, Any]) -> Interval:
    """The balanced accuracy that whoever follows the verdict gains: that of the dose, or nothing where it is zero."""
    own = result["differences"].get("real", {}).get("balanced_accuracy")
    return Interval.model_validate(own) if result["dose"] and own is not None else _NONE


def makes(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of what our pipeline's runs took and what the audit said, one a cell."""
    return [
        {
            "cell": item["cell"]["name"],
            "setting": item["cell"]["setting"],
            "replicate": item["cell"]["replicate"],
            "budget": item["cell"]["minutes"],
            "load": item["machine"]["load_before"],
            "stale": item.get("stale", False),
            **{
                key: item["result"][key]
                for key in (
                    "making_seconds",
                    "training_seconds",
                    "sampling_seconds",
                    "training_images",
                    "training_images_per_second",
                    "near_copies",
                    "near_copies_of",
                    "heldout_near_copies",
                    "heldout_near_copies_of",
                    "withheld",
                    "stages",
                )
            },
        }
        for item in records
        if item["cell"]["part"] == "utility" and item["cell"]["action"] == "make"
    ]


def against_peers(cells: Sequence[Cell], place: Place) -> list[dict[str, Any]]:
    """Rows of the contest: each method's trial, and ours minus it on the same test images and seeds."""
    rows = []
    contest = [cell for cell in cells if cell.part == "peers" and cell.action == "trial"]
    for cell in contest:
        record, made = place.load(cell.name), place.load(cell.needs[0])
        if record is None or made is None:
            continue
        result, making = record["result"], made["result"]
        row: dict[str, Any] = {
            "setting": cell.setting,
            "replicate": cell.replicate,
            "method": cell.method,
            "minutes": cell.minutes,
            "stale": place.stale(cell),
            "outcome": result["outcome"],
            "compared": has_compared(result),
            "sentence": result["sentence"],
            "to_best_real": result["differences"].get("real", {}).get("balanced_accuracy"),
            "coverage": result["coverage"],
            "kid": result["kid"],
            "offered": result["offered"],
            "making_seconds": making["making_seconds"],
            "training_images": making.get("training_images", 0),
            "samples_per_second": making["samples_per_second"],
            "load": made["machine"]["load_before"],
            "rate": making.get("rate"),
            "short": making.get("n_wanted", 0) - making.get("n_drawn", 0) if cell.method != "ours" else 0,
        }
        if cell.method != "ours" and (ours := ours_beside(cell, contest)) is not None:
            beside = place.load(ours)
            row["ours_done"] = beside is not None
            row["ours_failed"] = beside is not None and not has_compared(beside["result"])
            if row["ours_failed"] and row["compared"]:
                row["ours_minus"] = as_lost(result)
            elif (found := paired(place, ours, cell.name)) is not None:
                row["ours_minus"] = found
            else:
                # In another clone the probabilities are not there, and the record has what came of them.
                row["ours_minus"] = result.get("ours_minus")
                row["ours_of_then"] = beside is not None and beside.get("sources") != record.get("sources")
            row["ours_coverage"] = None if beside is None else beside["result"]["coverage"]
        rows.append(row)
    return rows


def ours_beside(cell: Cell, contest: Sequence[Cell]) -> str | None:
    """Our trial at the same budget; at our smallest for methods that learn nothing and take no time."""
    ours = [
        one
        for one in contest
        if (one.part, one.action) == ("peers", "trial")
        and (one.method, one.setting, one.replicate) == ("ours", cell.setting, cell.replicate)
        and cell.minutes in (0, one.minutes)
    ]
    return min(ours, key=lambda one: one.minutes).name if ours else None


def paired(place: Place, ours: str, other: str) -> dict[str, dict[str, float]] | None:
    """Our chosen synthetic arm minus that of another method: same test images, same classifier seeds.

    None where one of them had no final. Of different numbers of seeds the common ones are taken.
    """
    from synthaug.trial.statistics import paired_differences

    files = place.finals(ours), place.finals(other)
    if not all(path.is_file() for path in files):
        return None
    with np.load(files[0], allow_pickle=False) as a, np.load(files[1], allow_pickle=False) as b:
        if not np.array_equal(a["labels"], b["labels"]):
            return None
        seeds = min(len(a["synthetic"]), len(b["synthetic"]))
        found = paired_differences(
            a["synthetic"][:seeds],
            b["synthetic"][:seeds],
            a["labels"],
            a["clusters"],
            rare=sorted({*a["rare"].tolist(), *b["rare"].tolist()}),
            recall_labels=[],
            auprc_labels=[],
        )
    return {metric: found[metric].model_dump() for metric in METRICS if metric in found}


def as_lost(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Ours minus a method, where our trial compared nothing: the best real-only arm minus it, never above 0."""
    return {
        metric: Interval(
            estimate=min(0.0, -own["estimate"]), low=min(0.0, -own["high"]), high=min(0.0, -own["low"])
        ).model_dump()
        for metric, own in result["differences"]["real"].items()
        if metric in METRICS
    }


def _why_not_compared(row: Mapping[str, Any]) -> str:
    if not row["compared"]:
        return f"its trial compared nothing: {row['sentence']}"
    if not row.get("ours_done"):
        return "ours is not done"
    return "the probabilities of both on the same test images are not there"


def contest(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours minus each method over settings and replicates, and how often the interval lay above or below zero.

    A trial of ours that compared nothing is a loss (`as_lost`), counted below zero; one of the method's is not
    compared, and named.
    """
    result = []
    for method, minutes in dict.fromkeys((row["method"], row["minutes"]) for row in rows if row["method"] != "ours"):
        tried = [row for row in rows if (row["method"], row["minutes"]) == (method, minutes)]
        own = [row for row in tried if row.get("ours_minus")]
        one: dict[str, Any] = {
            "method": method,
            "minutes": minutes,
            "trials": len(own),
            "ours_failed": sum(row["ours_failed"] for row in own),
            "ours_of_then": sum(row.get("ours_of_then", False) for row in own),
            "not_compared": [
                {"setting": row["setting"], "replicate": row["replicate"], "why": _why_not_compared(row)}
                for row in tried
                if not row.get("ours_minus")
            ],
        }
        for metric in METRICS:
            by_setting: dict[str, list[Interval]] = {}
            for row in own:
                if metric in row["ours_minus"]:
                    found = Interval.model_validate(row["ours_minus"][metric])
                    by_setting.setdefault(row["setting"], []).append(found)
            pooled = pool(by_setting)
            one[metric] = None if pooled is None else pooled.interval.model_dump()
        one["above"] = sum(row["ours_minus"]["balanced_accuracy"]["low"] > 0 for row in own)
        one["below"] = sum(row["ours_failed"] or row["ours_minus"]["balanced_accuracy"]["high"] < 0 for row in own)
        known = [
            (row["ours_coverage"] or 0.0, row["coverage"])
            for row in own
            if row["coverage"] is not None and (row["ours_failed"] or row["ours_coverage"] is not None)
        ]
        one["coverage_ahead"], one["coverage_of"] = sum(a > b for a, b in known), len(known)
        result.append(one)
    return result


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
