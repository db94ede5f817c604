"""report.html: a job on one page, for people. One file that asks no network for anything.

The same facts give the same bytes, so that the page in a release can be held against its digest: it has no times, no
paths of this machine, and no seconds. The page in the run folder has costs, and may show training images beside what
repeats them; it is not for publication.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthaug.formats.atomic import write_text
from synthaug.records import (
    TRAINING_LOG_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    ClassPlan,
    ClassVerdict,
    Figures,
    Interval,
    Judge,
    Membership,
    NearnessTest,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)
from synthaug.report import page_figures as figures
from synthaug.report.audit_words import coverage_words
from synthaug.report.copy_words import COPY_COLUMNS, copy_caveat, copy_lines, copy_rows
from synthaug.report.limit_words import limit_lines
from synthaug.report.membership_words import found, membership_sentence, privacy_sentence, tested
from synthaug.report.page_pictures import PagePictures
from synthaug.report.verdict_words import (
    METRICS,
    UNAVAILABLE,
    by_words,
    count,
    dose_order,
    known_differences,
    look,
    mean_and_spread,
    metric_words,
    points,
    share,
    usable,
)
from synthaug.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

NOT_EVALUATED = (
    "not evaluated: whether training with these synthetic images helps was not measured. No claim is made that they "
    "are useful."
)
_NAME, _SHORT_NAME, _SENTENCE = 200, 80, 1000  # characters that are shown at most
_MOST_OPEN = 12  # rows of a table that stands open; a longer one is folded
_MOST_UNFOLDED = 3  # classes whose sections stand open
# The columns of `copy_rows` in a class's own section.
_COPY_WORDS = (
    "Copies and near-copies before the gate (fewer is better)",
    "Copies and near-copies after the gate (fewer is better)",
    "Three times nearer to one training image than to the next, before → after the gate (fewer is better)",
    "Near to a training image in features, before → after the gate (fewer is better)",
)


@dataclass(frozen=True)
class Cost:
    """What a stage took."""

    title: str
    seconds: float
    n_images: int | None = None
    images_per_second: float | None = None


@dataclass(frozen=True)
class PageFacts:
    """What a page tells. Only what there is: a job that stopped half-way has the first of these."""

    title: str
    internal: bool  # for the run folder: costs, and training images beside what repeats them
    include_real: bool  # real images are shown
    source: Source  # of a release: its name without local paths
    splits: Splits | None = None
    plan: BalancePlan | None = None
    checkpoint: Checkpoint | None = None
    judge: Judge | None = None
    batches: Sequence[SampleBatch] = ()
    report: AuditReport | None = None
    verdict: Verdict | None = None
    membership: Membership | None = None
    pictures: PagePictures = field(default_factory=PagePictures)
    training_log: Sequence[Mapping[str, Any]] = ()  # rows of training.csv
    costs: Sequence[Cost] = ()
    missing: Sequence[str] = ()  # what is not there, in sentences
    released: bool = True  # there is a release to speak of
    licence: str | None = None
    citation: str | None = None
    config_digest: str | None = None
    manifest_digest: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row is its heading. Cells of the kind Markup are drawings of ours."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: int = 1  # columns from here on are set right
    name: str = ""  # where a section has several

    @property
    def folded(self) -> bool:
        return len(self.rows) > _MOST_OPEN


def write_page(facts: PageFacts, path: Path) -> Path:
    """Write the page, whole or not at all."""
    write_text(path, render_page(facts))
    return path


def render_page(facts: PageFacts) -> str:
    """The page as HTML. Every name that came from data is made printable and escaped; nothing is fetched."""
    sections = [item for item in _sections(facts) if item is not None]
    style = _text("page.css").replace("SIDE", str(facts.pictures.side))
    script = _text("page.js")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=printable(facts.title, _NAME),
            facts=facts,
            style=_trusted(style),
            script=_trusted(script),
            style_hash=_sha256(style),
            script_hash=_sha256(script),
            verdict=_verdict_box(facts),
            opening=_opening(facts),
            about=_about(facts),
            limits=limit_lines(not facts.released or facts.include_real),
            overview=_overview(facts),
            sections=sections,
            classes=_classes(facts),
            unfolded=len(facts.source.classes) <= _MOST_UNFOLDED,
            rejected_note=_rejected_note(facts),
        )
        + "\n"
    )


def training_log(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The rows of training.csv; a generator of one's own may have none."""
    import pandas as pd

    try:
        table = pd.read_csv(checkpoint.directory / TRAINING_LOG_FILE)
    except (OSError, ValueError):  # pandas' own errors are ValueErrors
        return []
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


# What stands at the top


def _verdict_box(facts: PageFacts) -> dict[str, Any]:
    verdict = facts.verdict
    if verdict is None:
        return {"kind": "none", "sentence": _capital(NOT_EVALUATED), "more": ""}
    kind = {"helps": "helps", "harms": "harms"}.get(verdict.outcome, "unclear")
    more = ""
    if verdict.finalists:
        more = (
            f"Measured on {_measured(verdict)}. All figures are of one generator, trained once: another can come out "
            "otherwise."
        )
    return {"kind": kind, "sentence": _sentence(verdict.sentence), "more": more}


def _opening(facts: PageFacts) -> list[str]:
    """What was made from what, in sentences."""
    sentences = []
    n_classes = len(facts.source.classes)
    real = None if facts.splits is None else sum(facts.splits.counts.get("train", []))
    made = sum(_n_synthetic(item) for item in facts.report.classes) if facts.report else None
    if made is not None and real is not None:
        raised = sum(1 for item in facts.report.classes if _n_synthetic(item)) if facts.report else 0
        sentences.append(
            f"{count(made, 'synthetic image')} of {_classes_in_words(raised)} {'were' if made != 1 else 'was'} made "
            f"from {count(real, 'real training image')} in {_classes_in_words(n_classes)}, to raise the scarce ones."
        )
    elif real is not None:
        sentences.append(f"{count(real, 'real training image')} in {_classes_in_words(n_classes)}; none was made yet.")
    else:
        sentences.append(f"{count(facts.source.n_images, 'real image')} in {_classes_in_words(n_classes)}.")
    if facts.report is not None:
        drawn = sum(item.n_candidates for item in facts.report.classes)
        accepted = sum(item.n_accepted for item in facts.report.classes)
        sentences.append(f"{drawn:,} samples were drawn and {accepted:,} passed the audit.")
    if facts.checkpoint is not None:
        sentences.append(
            f"Their generator ({printable(facts.checkpoint.generator)}, {facts.checkpoint.parameters:,} parameters) "
            "was trained on the real training images alone; validation and test hold real images only."
        )
    return sentences


def _about(facts: PageFacts) -> list[tuple[str, str]]:
    source, spec = facts.source, facts.source.pixels
    colour = f"{spec.channels} channels" if spec.colour == "channels" else spec.colour
    rows = [
        ("Source", printable(source.name, _SENTENCE)),
        ("Images", f"{spec.size} × {spec.size} pixels, {colour}, {spec.dtype}"),
    ]
    if facts.splits is not None:
        counts = facts.splits.counts
        rows.append(("Split", f"{printable(facts.splits.method, _SENTENCE)}; made before the generator was trained"))
        rows.append(("Real images", ", ".join(f"{sum(numbers):,} {name}" for name, numbers in counts.items())))
    aside = [f"{n:,} {printable(reason)}" for reason, n in sorted(source.set_aside_reasons.items())]
    rows.append(("Set aside as unusable", ", ".join(aside) or "none"))
    rows.append(("Licence of the source", printable(facts.licence, _NAME) if facts.licence else "unknown"))
    if facts.checkpoint is not None:
        rows.append(("Checkpoint", f"{facts.checkpoint.digest[:12]}, the {facts.checkpoint.kept} phase was kept"))
    if facts.manifest_digest:
        rows.append(("Digest of the manifest", facts.manifest_digest))
    if facts.config_digest:
        rows.append(("Digest of the configuration", facts.config_digest))
    if facts.version:
        rows.append(("Made by", f"synthaug {facts.version}"))
    return rows


def _overview(facts: PageFacts) -> dict[str, Any]:
    """One row a class: what it had, what it has, and what came of it."""
    plans, audits, verdicts = _by_label(facts)
    n_real = _n_real(facts)
    most = max([1, *(n_real[k] + _n_synthetic(audits.get(k)) for k in range(len(n_real)))])
    limits = figures.interval_limits([item.recall_gain for item in verdicts.values()])
    rows = []
    for label, name in enumerate(facts.source.classes):
        audit, verdict = audits.get(label), verdicts.get(label)
        made = _n_synthetic(audit)
        rows.append(
            {
                "label": label,
                "name": printable(name, _SHORT_NAME),
                "real": f"{n_real[label]:,}",
                "synthetic": f"{made:,}" if facts.report else "–",
                "after": f"{n_real[label] + made:,}" if facts.report else "–",
                "bar": figures.counts_bar(n_real[label], made, most),
                "rejected": f"{sum(audit.rejected.values()):,} of {audit.n_candidates:,}"
                if audit and audit.n_candidates
                else "–",
                "coverage": coverage_words(audit),
                "gain": points(verdict.recall_gain) if verdict and verdict.recall_gain else "–",
                "gain_bar": figures.interval_bar(verdict.recall_gain if verdict else None, limits),
                "dose": f"{verdict.dose:,}" if verdict else "–",
                "note": _short_note(plans.get(label), audit),
            }
        )
    return {"rows": rows, "has_verdict": bool(verdicts), "has_audit": facts.report is not None}


# Sections that follow the classes


def _sections(facts: PageFacts) -> Iterable[dict[str, Any] | None]:
    yield _trial(facts)
    yield _subgroups(facts)
    yield _copies(facts)
    yield _quality(facts)
    yield _membership(facts)
    yield _training(facts)
    yield _costs(facts)
    yield _again(facts)
    yield _notes(facts)


def _section(name: str, title: str, lines: Sequence[str] = (), parts: Sequence[Any] = ()) -> dict[str, Any]:
    """A section; parts are tables, or drawings with a heading and a caption."""
    return {"id": name, "title": title, "lines": list(lines), "parts": [part for part in parts if part is not None]}


def _drawing(heading: str, caption: str, svg: Any, table: Table | None = None) -> dict[str, Any] | None:
    return None if svg is None else {"heading": heading, "caption": caption, "svg": svg, "table": table}


def _trial(facts: PageFacts) -> dict[str, Any]:
    verdict = facts.verdict
    if verdict is None:
        return _section("trial", "Does it help?", [_capital(NOT_EVALUATED)])
    metric = metric_words(verdict.metric)
    lines = [_sentence(verdict.sentence), *map(_sentence, verdict.reasons)]
    if verdict.arms:
        sides = [sum(arm.side == side for arm in verdict.arms) for side in ("real", "synthetic")]
        lines.append(
            f"Chosen on the validation split ({count(verdict.n_validation, 'real image')}) by {metric} out of "
            f"{count(sides[0], 'arm')} with real images alone and {count(sides[1], 'arm')} with synthetic ones: "
            f"'{printable(verdict.best_real or 'none')}' and '{printable(verdict.recipe or 'none')}'."
        )
    if verdict.finalists:
        lines.append(
            f"Reported on the test split ({_measured(verdict)}), which this trial chose nothing on. Classifier: "
            f"{printable(verdict.classifier, _NAME)}, {count(verdict.steps, 'optimizer step')} for every arm."
        )
    if verdict.trained_out is not None:
        lines.append(
            "Four times the steps would have given the best real-only arm, on validation, "
            f"{points(verdict.trained_out)} percentage points."
        )
    if verdict.worth:
        lines.append(f"What a synthetic image is worth: {printable(verdict.worth, _SENTENCE)}")
    lines += [
        f"Not tried: {', '.join(printable(name) for name in names)}: {printable(why, _SENTENCE)}"
        for why, names in by_words(verdict.not_tried).items()
    ]
    lines += map(_sentence, (*verdict.notes, *verdict.advice))
    return _section("trial", "Does it help?", lines, list(_trial_parts(verdict, metric)))


def _trial_parts(verdict: Verdict, metric: str) -> Iterable[Any]:
    known = list(known_differences(verdict.differences))
    if known:
        limits = figures.interval_limits([interval for *_, interval in known])
        yield Table(
            f"{printable(verdict.recipe or 'The chosen recipe', _NAME)} minus another arm on the test split, in "
            "percentage points with 95 % intervals, paired by seed and image. Above zero is better.",
            ("Minus", "Metric", "Difference", "Interval"),
            [
                (words, metric_words(name), points(interval), figures.interval_bar(interval, limits))
                for _, words, name, interval in known
            ],
            numbers=2,
            name="Differences",
        )
    if verdict.finalists:
        yield Table(
            "Finalists on the test split, means over the classifier seeds. Higher is better; of the calibration error, "
            "and of the spread, lower.",
            ("Arm", *(_capital(words) for words in METRICS.values()), "Spread over seeds"),
            [
                (_arm(item), *(share(getattr(item, name)) for name in METRICS), share(item.spread))
                for item in verdict.finalists
            ],
            name="Finalists",
        )
    doses = sorted({item.dose for item in verdict.dose_curve}, key=dose_order)
    yield _drawing(
        "Dose curve",
        f"{_capital(metric)} on {count(verdict.n_validation, 'real validation image')} over the dose of synthetic "
        "images of all scarce classes; higher is better. Faint dots are single seeds. Below each dose: "
        "synthetic images.",
        figures.dose_plot(verdict),
        Table(
            f"{_capital(metric)} on validation, mean and standard deviation over the seeds; higher is better.",
            ("Dose", "Synthetic images", "Loss", "Result"),
            [
                (printable(item.dose), f"{item.n_synthetic:,}", printable(item.loss), mean_and_spread(item.scores))
                for dose in doses
                for item in verdict.dose_curve
                if item.dose == dose
            ],
        ),
    )
    yield _drawing(
        "What more real images would do",
        f"{_capital(metric)} on validation with a share of the scarce classes' real images; higher is better.",
        figures.learning_plot(verdict),
        Table(
            f"{_capital(metric)} on validation, mean and standard deviation over the seeds; higher is better.",
            ("Share of the real images", "Real images", "Result"),
            [
                (f"{item.share:.0%}", f"{item.n_real:,}", mean_and_spread(item.scores))
                for item in verdict.learning_curve
            ],
        ),
    )
    if verdict.arms:
        yield Table(
            f"Every arm of the race on validation: {metric}, mean and standard deviation over the seeds; higher is "
            "better.",
            ("Arm", "Side", "Result", "Left the race"),
            [
                (_arm(item), item.side, mean_and_spread(item.scores), printable(item.dropped or "finalist", _NAME))
                for item in verdict.arms
            ],
            numbers=9,
            name="Arms of the race",
        )


def _subgroups(facts: PageFacts) -> dict[str, Any]:
    rows = facts.verdict.subgroups if facts.verdict else ()
    if not rows:
        why = (
            "there is no verdict" if facts.verdict is None else "dataset.columns.subgroup names none, or none was tried"
        )
        return _section("subgroups", "Subgroups", [f"No subgroups were compared: {why}."])
    limits = figures.interval_limits([item.gain for item in rows])
    metric = metric_words(facts.verdict.metric) if facts.verdict else ""
    return _section(
        "subgroups",
        "Subgroups",
        ["Whether a site, sex or age group lost: a gain overall can hide a loss of some."],
        [
            Table(
                f"Subgroups of the test split: {metric} of the best real-only arm and of the chosen recipe, higher is "
                "better; gain in percentage points with 95 % intervals, above zero is better.",
                ("Subgroup", "Test images", "Before", "After", "Gain", "Interval"),
                [
                    (
                        printable(item.name, _NAME), f"{item.n_test:,}", share(item.before), share(item.after),
                        points(item.gain), figures.interval_bar(item.gain, limits),
                    )
                    for item in rows
                ],
            )
        ],
    )  # fmt: skip


def _looked_for(facts: PageFacts) -> bool:
    return facts.judge is None or facts.judge.near_copy_threshold is not None


def _copies(facts: PageFacts) -> dict[str, Any] | None:
    judge = facts.judge
    if judge is None:
        return None
    parts: list[Any] = []
    if facts.report is not None and (rows := copy_rows(facts.report.classes, looked_for=_looked_for(facts))):
        parts.append(
            Table(
                "Copies and near-copies of training images among the samples, before the gate and after it; fewer is "
                "better. d1/d2: distance to the nearest training image over that to the next.",
                COPY_COLUMNS,
                [(printable(name, _NAME), *cells) for name, *cells in rows],
                name="Copies by class",
            )
        )
    if judge.planted:
        parts.append(
            Table(
                "Planted copies: training images altered in these ways, and how many of them the search finds. More "
                "is better.",
                ("Alteration", "Built for", "Planted", "Found", "Near in features"),
                [
                    (
                        printable(item.alteration, _NAME), "yes" if item.listed else "no", f"{item.n:,}",
                        f"{item.n_caught:,} ({item.n_caught / item.n:.0%})" if item.n else "0",
                        f"{item.n_in_features:,}",
                    )
                    for item in judge.planted
                ], name="Planted copies",
)
        )  # fmt: skip
    tests = [*judge.near_copies, *([judge.feature_test] if judge.feature_test else [])]
    if tests:
        parts.append(
            Table(
                "Where 'too near' begins: distance below which a sample is called a near-copy (in features nothing is "
                "rejected), and how many held-out real images would be called so. Fewer false alarms are better.",
                ("Class", "Distance", "Held-out images", "Repeats left out", "False alarms (95 %)"),
                [_nearness(item, item is judge.feature_test) for item in tests],
                name="Where too near begins",
            )
        )
    lines = [*copy_lines(judge), copy_caveat(judge)]
    return _section("copies", "Copies of training images", [printable(line, _SENTENCE) for line in lines], parts)


def _nearness(item: NearnessTest, in_features: bool) -> tuple[str, ...]:
    name = "all classes" if item.name is None else printable(item.name, _NAME)
    rate = UNAVAILABLE
    if item.alarm_rate is not None and item.alarm_bounds is not None:
        low, high = item.alarm_bounds
        rate = f"{item.alarms} = {item.alarm_rate:.1%} ({low:.1%} to {high:.1%})"
    distance = UNAVAILABLE if item.threshold is None else f"{item.threshold:.3g}"
    shared = " (that of all classes)" if item.pooled and item.name is not None else ""
    return (
        f"{name}, in features" if in_features else name,
        distance + shared,
        f"{item.n_heldout:,}",
        f"{item.n_repeats:,}",
        rate,
    )


def _quality(facts: PageFacts) -> dict[str, Any] | None:
    audits = [item for item in facts.report.classes if item.n_candidates] if facts.report else []
    if not audits:
        return None
    parts: list[Any] = [
        Table(
            "Coverage: share of a class's real training images that have an accepted sample near. Higher is better; "
            "beside it what as many images of the same distribution would reach.",
            ("Class", "Accepted", "Coverage", "Equal distributions", "Outcome"),
            [
                (
                    printable(item.name, _NAME), f"{item.n_accepted:,}", share(item.coverage, 2),
                    share(item.coverage_expected, 2),
                    _sentence(f"withheld: {item.withheld}") if item.withheld else "kept",
                )
                for item in audits
            ], name="Coverage",
)
    ]  # fmt: skip
    known = [(item, item.quality) for item in facts.verdict.classes if item.quality] if facts.verdict else []
    if known:
        parts.append(
            Table(
                "Fidelity, in the features of a classifier of real images. Precision, recall and coverage: 0 to 1, "
                "higher is better. Density: 1 is like real. KID: lower is better, 0 is like real.",
                ("Class", "Real", "Samples", "Precision", "Recall", "Density", "Coverage", "KID (95 %)"),
                [
                    (
                        printable(item.name, _NAME), f"{quality.n_real:,}", f"{quality.n_samples:,}",
                        share(quality.precision, 2), share(quality.recall, 2), share(quality.density, 2),
                        share(quality.coverage, 2), _plain_interval(quality.kid),
                    )
                    for item, quality in known
                ], name="Fidelity",
)
        )  # fmt: skip
    accuracy = facts.judge.validation_balanced_accuracy if facts.judge else None
    lines = [
        "A class whose accepted samples cover too little of its real images is withheld: its generator repeats itself.",
        "The judge is a classifier trained on the real training images alone; its balanced accuracy on real validation "
        f"images, higher is better: {share(accuracy)}.",
    ]
    lines += [
        f"Fidelity is unavailable for {', '.join(printable(name) for name in names)}: {printable(why, _SENTENCE)}"
        for why, names in by_words(
            {item.name: quality.unavailable for item, quality in known if quality.unavailable}
        ).items()
    ]
    return _section("quality", "Coverage and fidelity", lines, parts)


def _membership(facts: PageFacts) -> dict[str, Any] | None:
    membership = facts.membership
    promised = [] if facts.checkpoint is None else [privacy_sentence(facts.checkpoint)]
    title = "What the generator gives away"
    if membership is None:
        if facts.checkpoint is None:
            return None
        return _section(
            "membership",
            title,
            ["Whether the generator tells its training images from others was not tested.", *promised],
        )
    lines = [*tested(membership), _sentence(membership_sentence(membership)), *map(_sentence, membership.notes)]
    lines.append(
        "That an attack fails is no proof that none succeeds. This is not differential privacy and not anonymity."
    )
    lines += promised
    lines += [
        f"Unavailable for {', '.join(printable(name) for name in names)}: {printable(why, _SENTENCE)}"
        for why, names in by_words(
            {item.name: item.unavailable for item in membership.classes if item.unavailable}
        ).items()
    ]
    rows: list[Sequence[Any]] = [
        (
            "all classes", f"{membership.overall.n_members:,}", f"{membership.overall.n_heldout:,}",
            *found(membership.overall), _plain_interval(membership.overall.control_auc),
        )
    ]  # fmt: skip
    rows += [
        (
            printable(item.name, _NAME), f"{item.n_members:,}", f"{item.n_heldout:,}", *found(item),
            _plain_interval(item.control_auc),
        )
        for item in membership.classes
    ]  # fmt: skip
    table = Table(
        "The membership attack: AUC with 95 % interval (0.5 is guessing, lower is better), share of training images "
        "told at 1 % false alarms (lower is better), and the same AUC of a measure that knows no generator (not 0.5: "
        "the splits differ).",
        ("Class", "Training images", "Held-out images", "AUC", "Told at 1 % false alarms", "Control AUC"),
        rows,
    )
    return _section("membership", title, lines, [table])


def _training(facts: PageFacts) -> dict[str, Any] | None:
    checkpoint = facts.checkpoint
    if checkpoint is None:
        return None
    lines = [
        f"Generator '{printable(checkpoint.generator)}', {checkpoint.parameters:,} parameters: "
        f"{checkpoint.images_seen:,} training images drawn (with repeats) of {checkpoint.images_budget:,} asked for. "
        f"{_sentence(checkpoint.stopped)}",
        f"The weights kept are those of the {checkpoint.kept} phase: the better by held-out denoising loss.",
    ]
    before, after = checkpoint.heldout_loss_base, checkpoint.heldout_loss_tuned
    scarce = [name for name in checkpoint.scarce if name in before or name in after]
    table = Table(
        "Held-out denoising loss of the scarce classes after the base and after fine-tuning; lower is better.",
        ("Class", "After the base", "After fine-tuning"),
        [(printable(name, _NAME), share(before.get(name), 4), share(after.get(name), 4)) for name in scarce],
    )
    drawing = _drawing(
        "Training curves",
        "Denoising loss over the training images drawn, on a logarithmic scale; lower is better. Held out: validation "
        "images, which nothing is learned from. The phases weigh the classes differently, so their losses do not "
        "compare.",
        _curves(facts.training_log),
    )
    if drawing is None:
        lines.append("Training curves: none were recorded.")
    return _section("training", "Training of the generator", lines, [drawing, table if scarce else None])


def _curves(log: Sequence[Mapping[str, Any]]) -> Any:
    series, start = [], 0.0
    phases = list(dict.fromkeys(str(row.get("phase", "training")) for row in log))[:3]
    for phase in phases:
        mine = [row for row in log if str(row.get("phase", "training")) == phase]
        places = [_real_number(row.get("images", row.get("step"))) for row in mine]
        # Each phase counts its images from zero, or goes on.
        offset = start if places and places[0] is not None and places[0] < start else 0.0
        for column, words in (("loss", "training"), ("heldout", "held out")):
            drawn = tuple(
                (offset + x, y)
                for x, row in zip(places, mine, strict=True)
                if x is not None and (y := _real_number(row.get(column))) is not None
            )
            if drawn:
                series.append(figures.Series(f"{printable(phase)}, {words}", drawn))
        start = max([start, *(offset + x for x in places if x is not None)])
    positive = all(y > 0 for one in series for _, y in one.points)
    return figures.plot(
        "Denoising loss over the training images drawn", series, "training images drawn", logarithmic=positive
    )


def _real_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _costs(facts: PageFacts) -> dict[str, Any] | None:
    if not facts.costs:
        return None
    rows = [
        (
            printable(item.title), _seconds(item.seconds), "–" if item.n_images is None else f"{item.n_images:,}",
            "–" if item.images_per_second is None else f"{item.images_per_second:,.1f}",
        )
        for item in facts.costs
    ]  # fmt: skip
    rows.append(("all of them", _seconds(sum(item.seconds for item in facts.costs)), "–", "–"))
    devices = [facts.checkpoint.device] if facts.checkpoint else []
    devices += [batch.device for batch in facts.batches]
    lines = [
        "Seconds by the clock when each stage was made, on whatever machine that was and with whatever else ran on it; "
        "a stage that was interrupted counts its last stretch. Fewer are better.",
        f"Device: {', '.join(printable(name) for name in dict.fromkeys(devices)) or 'none used yet'}. "
        "Processor energy: not measured.",
    ]
    table = Table(
        "What the stages took: fewer seconds, and more images per second, are better.",
        ("Stage", "Seconds", "Images", "Images per second"),
        rows,
    )
    return _section("costs", "Costs", lines, [table])


def _again(facts: PageFacts) -> dict[str, Any] | None:
    if facts.report is None or facts.checkpoint is None or not facts.released:
        return None
    place = "release" if facts.internal else "path/of/this/directory"
    first = next((item.first_sample for item in facts.pictures.classes.values() if item.first_sample), None)
    where = "In the run folder" if facts.internal else "With the release and its checkpoint at hand"
    lines = [
        f"{where}, these commands make samples again from their manifest rows and the checkpoint alone, and compare "
        "them with what was released. On the machine that drew them they are bit-identical; elsewhere the command says "
        "what differs.",
        *([] if facts.internal else ["Where the checkpoint lies elsewhere, name it with --checkpoint DIR."]),
        f"The checkpoint's digest is {facts.checkpoint.digest}.",
    ]
    commands = [
        *([("One sample", f"synthaug remake {place} --sample {first}")] if first else []),
        ("Twenty samples at random", f"synthaug remake {place} --random 20"),
        ("Hold every file and row against the manifest", f"synthaug verify {place}"),
    ]
    part = {"commands": commands}
    return _section("again", "Make a sample again", lines, [part])


def _notes(facts: PageFacts) -> dict[str, Any] | None:
    lines: list[str] = []
    if facts.plan is not None:
        lines += [
            f"{', '.join(printable(name) for name in names)}: {printable(words, _SENTENCE)}"
            for words, names in facts.plan.notes.items()
        ]
    if facts.report is not None:
        lines += [
            _sentence(note) for note in facts.report.notes if not facts.judge or note != facts.judge.near_copy_note
        ]
    if facts.citation:
        lines.append(f"Cite the source as: {printable(' '.join(facts.citation.split()), 2000)}")
    return _section("notes", "Notes", lines) if lines else None


# Classes


def _classes(facts: PageFacts) -> list[dict[str, Any]]:
    plans, audits, verdicts = _by_label(facts)
    n_real = _n_real(facts)
    rows = (
        {name: cells for name, *cells in copy_rows(facts.report.classes, looked_for=_looked_for(facts))}
        if facts.report
        else {}
    )
    attacked = {item.label: item for item in facts.membership.classes} if facts.membership else {}
    gains = [one for item in verdicts.values() for one in (item.recall_gain, item.auprc_gain)]
    limits = figures.interval_limits(gains)
    before, after = _finalists(facts.verdict)
    classes = []
    for label, name in enumerate(facts.source.classes):
        plan, audit, verdict = plans.get(label), audits.get(label), verdicts.get(label)
        tiles = facts.pictures.classes.get(label)
        made = _n_synthetic(audit)
        pairs: list[tuple[str, Any]] = [("Real training images", f"{n_real[label]:,}")]
        if plan is not None:
            pairs.append(("Target of the plan", f"{plan.n_target:,}"))
        if audit is not None:
            pairs.append(("Synthetic images", f"{made:,}"))
            pairs.append(("Training images after", f"{n_real[label] + made:,}"))
            if audit.n_candidates:
                pairs.append(("Samples drawn", f"{audit.n_candidates:,}"))
                pairs.append(("Passed the audit (more is better)", f"{audit.n_accepted:,}"))
                reasons = ", ".join(f"{n:,} {printable(why)}" for why, n in audit.rejected.items())
                pairs.append(("Rejected", reasons or "none"))
                pairs.append(("Coverage (higher is better)", coverage_words(audit)))
        if verdict is not None:
            pairs.append(("Recommended dose", f"{verdict.dose:,} of {count(verdict.n_offered, 'image')} offered"))
            if verdict.advice:
                pairs.append(("Advice", _sentence(verdict.advice)))
        pairs += _recalls(before, after, name, label, facts.source.classes)
        if verdict is not None and verdict.quality is not None:
            pairs.append(("Fidelity", _fidelity(verdict)))
        if name in rows:
            pairs += zip(_COPY_WORDS, rows[name][1:], strict=True)
        if facts.judge is not None and audit is not None and audit.n_candidates:
            threshold = facts.judge.threshold_of(name)
            pairs.append(("Near-copy distance", UNAVAILABLE if threshold is None else f"{threshold:.3g}"))
        if facts.checkpoint is not None and name in facts.checkpoint.scarce:
            values = facts.checkpoint.heldout_loss_base.get(name), facts.checkpoint.heldout_loss_tuned.get(name)
            if values != (None, None):
                text = f"{share(values[0], 4)} after the base, {share(values[1], 4)} after fine-tuning"
                pairs.append(("Held-out denoising loss (lower is better)", text))
        if label in attacked:
            pairs.append(("Membership attack, AUC (0.5 is guessing, lower is better)", found(attacked[label])[0]))
        if tiles and tiles.first_sample and facts.released:
            place = "release" if facts.internal else "path/of/this/directory"
            pairs.append(
                ("Make the first sample again", {"code": f"synthaug remake {place} --sample {tiles.first_sample}"})
            )
        classes.append(
            {
                "label": label,
                "name": printable(name, _NAME),
                "counts": f"{n_real[label]:,} real" + (f", {made:,} synthetic" if audit is not None else ""),
                "note": _short_note(plan, audit),
                "why": _why(plan, audit),
                "pairs": pairs,
                "gains": [
                    (words, points(interval), figures.interval_bar(interval, limits))
                    for words, interval in (("recall", verdict.recall_gain), ("AUPRC", verdict.auprc_gain))
                    if usable(interval)
                ]
                if verdict
                else [],
                "n_test": verdict.n_test if verdict else 0,
                "tiles": tiles,
            }
        )
    return classes


def _recalls(
    before: Figures | None, after: Figures | None, name: str, label: int, classes: Sequence[str]
) -> list[tuple[str, str]]:
    """Recall without and with synthetic images, and what the class is taken for when it is not recognised."""
    if before is None or after is None or name not in before.recall or name not in after.recall:
        return []
    pairs = [
        (
            "Recall on test, best real-only arm → chosen recipe (higher is better)",
            f"{share(before.recall[name])} → {share(after.recall[name])}",
        )
    ]
    if label < len(after.confusion) and len(after.confusion[label]) == len(classes) > 1:
        row = np.array(after.confusion[label], dtype=np.float64)
        row[label] = 0
        other = int(row.argmax())
        if row[other] > 0:
            pairs.append(
                ("Most often taken for", f"{printable(classes[other], _NAME)} ({row[other]:.0%} of its images)")
            )
    return pairs


def _finalists(verdict: Verdict | None) -> tuple[Figures | None, Figures | None]:
    known = {item.key: item for item in verdict.finalists} if verdict else {}
    return known.get(verdict.best_real or "") if verdict else None, known.get(verdict.recipe or "") if verdict else None


def _fidelity(verdict: ClassVerdict) -> str:
    quality = verdict.quality
    assert quality is not None
    if quality.unavailable:
        return f"unavailable: {printable(quality.unavailable, _SENTENCE)}"
    return (
        f"precision {share(quality.precision, 2)}, recall {share(quality.recall, 2)}, coverage "
        f"{share(quality.coverage, 2)} (higher is better), density {share(quality.density, 2)} (1 is like real), KID "
        f"{_plain_interval(quality.kid)} (lower is better)"
    )


def _short_note(plan: ClassPlan | None, audit: ClassAudit | None) -> str:
    if plan is not None and plan.refused:
        return "refused"
    if audit is not None and audit.withheld:
        return "withheld"
    return f"{audit.n_missing:,} short" if audit is not None and audit.n_missing else ""


def _why(plan: ClassPlan | None, audit: ClassAudit | None) -> str:
    """Why a class has not what was planned, in a sentence."""
    if plan is not None and plan.refused:
        return f"Refused: {printable(plan.refused, _SENTENCE)}"
    if audit is not None and audit.withheld:
        return f"Withheld: {printable(audit.withheld, _SENTENCE)}"
    if audit is not None and audit.n_missing:
        return f"{audit.n_missing:,} samples are missing: too few passed the audit within the budget."
    return ""


def _rejected_note(facts: PageFacts) -> str:
    if facts.internal:
        return (
            "Rejected samples are shown by reason. Beside a copy, framed: the training image that it repeats. This "
            "page is for the run folder and not for publication."
        )
    return (
        "Of rejected samples only those are shown that were taken for another class. Samples rejected as copies of "
        "training images are not, nor is any sample of a class that was withheld."
    )


# Words


def _by_label(facts: PageFacts) -> tuple[dict[int, ClassPlan], dict[int, ClassAudit], dict[int, ClassVerdict]]:
    return (
        {item.label: item for item in facts.plan.classes} if facts.plan else {},
        {item.label: item for item in facts.report.classes} if facts.report else {},
        {item.label: item for item in facts.verdict.classes} if facts.verdict else {},
    )


def _n_real(facts: PageFacts) -> list[int]:
    """Usable real training images, by label."""
    n_classes = len(facts.source.classes)
    counts = facts.splits.counts.get("train", []) if facts.splits else []
    return [counts[label] if label < len(counts) else 0 for label in range(n_classes)]


def _n_synthetic(audit: ClassAudit | None) -> int:
    """Samples of a class that a release holds."""
    return 0 if audit is None or audit.withheld else min(audit.n_accepted, audit.n_wanted)


def _measured(verdict: Verdict) -> str:
    images, seeds = count(verdict.n_test, "real test image"), count(verdict.seeds, "classifier seed")
    return f"{images}, {seeds}, {look(verdict.looks)}"


def _arm(item: Any) -> str:
    key, words = printable(item.key, _NAME), printable(item.words, _NAME) if item.words else ""
    return f"{key}: {words}" if words and words != key else key


def _plain_interval(interval: Interval | None) -> str:
    known = usable(interval)
    return UNAVAILABLE if known is None else f"{known.estimate:.3f} [{known.low:.3f}, {known.high:.3f}]"


def _classes_in_words(n: int) -> str:
    return f"{n:,} class{'' if n == 1 else 'es'}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}"


def _sentence(words: str) -> str:
    return printable(_capital(words), _SENTENCE)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


# The page itself


def _trusted(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names a style sheet or script that may be used."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


@cache
def _text(name: str) -> str:
    return files("synthaug.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        autoescape=True,
        loader=FunctionLoader(_text),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
