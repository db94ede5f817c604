"""What was looked for and found of copies of training images, in words and rows, for every report alike."""

from __future__ import annotations

from collections.abc import Sequence

from synthaug.records import ClassAudit, Judge, PlantedCopies
from synthaug.text import printable

COPY_COLUMNS = (
    "Class",
    "Samples",
    "Copies and near-copies before the gate (95 %)",
    "After",
    "d1/d2 < 1/3, before → after",
    "Near in features, before → after",
)


NEAR_COLUMNS = (
    "Class",
    "Near-copy under",
    "Held-out images (groups)",
    "Training images again",
    "Called near",
)


def near_rows(judge: Judge) -> list[list[str]]:
    """A row for each class, as `NEAR_COLUMNS` names them: its distance, and how often that is wrong on real images."""
    rows = []
    for test in judge.near_copies[1:]:
        shared = " (shared)" if test.pooled else ""
        rate = (
            "unavailable"
            if test.alarm_rate is None or test.alarm_bounds is None
            else f"{test.alarms} = {test.alarm_rate:.1%} ({test.alarm_bounds[0]:.1%} to {test.alarm_bounds[1]:.1%})"
        )
        near = "unavailable" if test.threshold is None else f"{test.threshold:.3g}{shared}"
        rows.append([test.name or "", near, f"{test.n_heldout} ({test.n_groups})", str(test.n_repeats), rate])
    return rows


def copy_rows(classes: Sequence[ClassAudit], *, looked_for: bool = True) -> list[list[str]]:
    """A row for each class that has samples, as `COPY_COLUMNS` names them; the class's name is as it is.

    Args:
        looked_for: Was there a distance for near-copies? Otherwise only exact ones are counted, which is said.
    """
    rows = []
    for item in classes:
        rates = item.copies
        if rates is None:
            continue
        share = "none" if rates.near_rate is None else f"{rates.near_rate:.1%}"
        low, high = rates.near_bounds
        near = f"{rates.n_near} = {share} ({low:.1%} to {high:.1%}), {rates.n_exact} of them exact"
        features = (
            "unavailable"
            if rates.n_in_features is None or rates.accepted_in_features is None
            else f"{_share(rates.n_in_features, rates.n)} → {_share(rates.accepted_in_features, rates.n_accepted)}"
        )
        rows.append(
            [
                item.name,
                str(rates.n),
                near if looked_for else f"{rates.n_exact} exact; near-copies not looked for",
                "0" if looked_for else "0 exact",
                f"{_share(rates.n_low_ratio, rates.n)} → {_share(rates.accepted_low_ratio, rates.n_accepted)}",
                features,
            ]
        )
    return rows


def copy_lines(judge: Judge) -> list[str]:
    """What the search for copies is, what it rests on, and how much it finds of what is planted."""
    if judge.near_copy_threshold is None:
        return [
            "Duplicates and exact copies of training images were dropped. Near-copies were not looked for: the "
            f"distance for it could not be calibrated. {judge.near_copy_note}"
        ]
    lines = [
        "Every sample was held against every training image, flipped, shifted, turned, cropped, brighter or darker, "
        "blurred or noisy. Exact copies, and samples of which another image leaves less than "
        f"{judge.near_copy_threshold:.3g} unexplained (root of the share of variance), were dropped, and duplicates "
        f"among the samples with them. {judge.near_copy_note}"
    ]
    own = [test for test in judge.near_copies if test.name is not None and not test.pooled]
    if own:
        lines.append(
            f"{len(own)} of {len(judge.near_copies) - 1} classes have a distance of their own; what is said above of "
            "false alarms counts each image by the distance of its class."
        )
    if judge.planted:
        lines.append(
            f"Planted: altered copies of {judge.planted[0].n} training images, written as released and read again. "
            + " ".join(
                _planted(words, [item for item in judge.planted if item.listed is listed])
                for words, listed in (("ways that the search is built for", True), ("ways that it is not", False))
            )
        )
    return lines


def copy_caveat(judge: Judge) -> str:
    """What the audit must not be taken for."""
    return (
        "A copy that was changed in another way, or that repeats a part of an image, can pass. This is not "
        "differential privacy and not anonymity."
        if judge.near_copy_threshold is not None
        else "This is not differential privacy and not anonymity."
    )


def most_false_alarms(judge: Judge) -> float:
    """Upper end of the share of honest images that would be called near-copies: much, where few are held out."""
    from synthaug.quality.calibration import clopper_pearson

    if judge.near_copy_threshold is None or not judge.near_copies:
        return 0.0
    together = judge.near_copies[0]
    # Unmeasured: one of so many falls below the distance, by the way it is chosen.
    return together.alarm_bounds[1] if together.alarm_bounds else clopper_pearson(1, max(1, together.n_groups))[1]


def too_many_copies(limit: float | None, judge: Judge, classes: Sequence[ClassAudit]) -> str | None:
    """What to say where a class has more copies and near-copies than `privacy.max_near_copy_rate` allows; else None."""
    honest = most_false_alarms(judge)
    rates = [(item.name, item.copies) for item in classes if item.copies is not None]
    above = [
        f"{rate.n_near} of {rate.n} ({rate.near_rate:.1%}) of class '{printable(name)}'"
        for name, rate in rates
        # A sample or two of a few are no evidence: the interval must lie above what honest images may come to.
        if limit is not None and rate.near_rate is not None and rate.near_rate > limit and rate.near_bounds[0] > honest
    ]
    if limit is None or not above:
        return None
    more = f"; and {len(above) - 5} more classes" if len(above) > 5 else ""
    return (
        "no release is made: the generator repeats its training images. Copies or near-copies are "
        f"{'; '.join(above[:5])}{more}, and privacy.max_near_copy_rate allows {limit:.1%}. They would be dropped, but "
        "what is left comes from the same checkpoint. Train shorter (train.images or train.minutes), give it more real "
        "images, or set another privacy.max_near_copy_rate (null: none)."
    )


def _planted(words: str, items: Sequence[PlantedCopies]) -> str:
    if not items:
        return ""
    caught, n = sum(item.n_caught for item in items), sum(item.n for item in items)
    worst = min(items, key=lambda item: item.n_caught / item.n)
    return (
        f"Of {len(items)} {words}, {caught / n:.1%} were found (the fewest of '{worst.alteration}': "
        f"{worst.n_caught / worst.n:.0%})."
    )


def _share(count: int, n: int) -> str:
    return f"{count} of {n}"
