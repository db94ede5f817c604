"""The sections of a report page that follow the classes: tables, drawings and sentences, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synthaug.records import Checkpoint, NearnessTest, Verdict
from synthaug.report import page_figures as figures
from synthaug.report.checkpoint_words import (
    CHECKPOINT_CAPTION,
    CHECKPOINT_COLUMNS,
    attacked,
    checkpoint_cells,
    privacy_sentences,
)
from synthaug.report.copy_words import COPY_COLUMNS, copy_caveat, copy_lines, copy_rows
from synthaug.report.membership_words import found, membership_sentence, tested
from synthaug.report.page_facts import (
    NAME,
    NOT_EVALUATED,
    SENTENCE,
    PageFacts,
    capital,
    looked_for,
    measured,
    plain_interval,
    sentence,
)
from synthaug.report.verdict_words import (
    METRICS,
    UNAVAILABLE,
    by_words,
    count,
    dose_order,
    known_differences,
    mean_and_spread,
    metric_words,
    points,
    share,
)
from synthaug.text import printable

_MOST_OPEN = 12  # rows of a table that stands open; a longer one is folded


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


def sections(facts: PageFacts) -> Iterable[dict[str, Any] | None]:
    yield _trial(facts)
    yield _subgroups(facts)
    yield _copies(facts)
    yield _quality(facts)
    yield _membership(facts)
    yield _checkpoints(facts)
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
        return _section("trial", "Does it help?", [capital(NOT_EVALUATED)])
    metric = metric_words(verdict.metric)
    lines = [sentence(verdict.sentence), *map(sentence, verdict.reasons)]
    if verdict.arms:
        sides = [sum(arm.side == side for arm in verdict.arms) for side in ("real", "synthetic")]
        lines.append(
            f"Chosen on the validation split ({count(verdict.n_validation, 'real image')}) by {metric} out of "
            f"{count(sides[0], 'arm')} with real images alone and {count(sides[1], 'arm')} with synthetic ones: "
            f"'{printable(verdict.best_real or 'none')}' and '{printable(verdict.recipe or 'none')}'."
        )
    if verdict.finalists:
        lines.append(
            f"Reported on the test split ({measured(verdict)}), which this trial chose nothing on. Classifier: "
            f"{printable(verdict.classifier, NAME)}, {count(verdict.steps, 'optimizer step')} for every arm."
        )
    if verdict.trained_out is not None:
        lines.append(
            "Four times the steps would have given the best real-only arm, on validation, "
            f"{points(verdict.trained_out)} percentage points."
        )
    if verdict.worth:
        lines.append(f"What a synthetic image is worth: {printable(verdict.worth, SENTENCE)}")
    lines += [
        f"Not tried: {', '.join(printable(name) for name in names)}: {printable(why, SENTENCE)}"
        for why, names in by_words(verdict.not_tried).items()
    ]
    lines += map(sentence, (*verdict.notes, *verdict.advice))
    return _section("trial", "Does it help?", lines, list(_trial_parts(verdict, metric)))


def _trial_parts(verdict: Verdict, metric: str) -> Iterable[Any]:
    known = list(known_differences(verdict.differences))
    if known:
        limits = figures.interval_limits([interval for *_, interval in known])
        yield Table(
            f"{printable(verdict.recipe or 'The chosen recipe', NAME)} minus another arm on the test split, in "
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
            ("Arm", *(capital(words) for words in METRICS.values()), "Spread over seeds"),
            [
                (_arm(item), *(share(getattr(item, name)) for name in METRICS), share(item.spread))
                for item in verdict.finalists
            ],
            name="Finalists",
        )
    doses = sorted({item.dose for item in verdict.dose_curve}, key=dose_order)
    yield _drawing(
        "Dose curve",
        f"{capital(metric)} on {count(verdict.n_validation, 'real validation image')} over the dose of synthetic "
        "images of all scarce classes; higher is better. Faint dots are single seeds. Below each dose: "
        "synthetic images.",
        figures.dose_plot(verdict),
        Table(
            f"{capital(metric)} on validation, mean and standard deviation over the seeds; higher is better.",
            ("Dose", "Synthetic images", "Tried in", "Result"),
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
        f"{capital(metric)} on validation with a share of the scarce classes' real images; higher is better.",
        figures.learning_plot(verdict),
        Table(
            f"{capital(metric)} on validation, mean and standard deviation over the seeds; higher is better.",
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
                (_arm(item), item.side, mean_and_spread(item.scores), printable(item.dropped or "finalist", NAME))
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
                        printable(item.name, NAME), f"{item.n_test:,}", share(item.before), share(item.after),
                        points(item.gain), figures.interval_bar(item.gain, limits),
                    )
                    for item in rows
                ],
            )
        ],
    )  # fmt: skip


def _copies(facts: PageFacts) -> dict[str, Any] | None:
    judge = facts.judge
    if judge is None:
        return None
    parts: list[Any] = []
    if facts.report is not None and (rows := copy_rows(facts.report.classes, looked_for=looked_for(facts))):
        parts.append(
            Table(
                "Copies and near-copies of training images among the samples, before the gate and after it; fewer is "
                "better. d1/d2: distance to the nearest training image over that to the next.",
                COPY_COLUMNS,
                [(printable(name, NAME), *cells) for name, *cells in rows],
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
                        printable(item.alteration, NAME), "yes" if item.listed else "no", f"{item.n:,}",
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
                ("Class", "Distance", "Held-out images (groups)", "Repeats left out", "False alarms (95 %)"),
                [_nearness(item, item is judge.feature_test) for item in tests],
                name="Where too near begins",
            )
        )
    lines = [*copy_lines(judge), copy_caveat(judge)]
    return _section("copies", "Copies of training images", [printable(line, SENTENCE) for line in lines], parts)


def _nearness(item: NearnessTest, in_features: bool) -> tuple[str, ...]:
    name = "all classes" if item.name is None else printable(item.name, NAME)
    rate = UNAVAILABLE
    if item.alarm_rate is not None and item.alarm_bounds is not None:
        low, high = item.alarm_bounds
        rate = f"{item.alarms} = {item.alarm_rate:.1%} ({low:.1%} to {high:.1%})"
    distance = UNAVAILABLE if item.threshold is None else f"{item.threshold:.3g}"
    shared = " (that of all classes)" if item.pooled and item.name is not None else ""
    return (
        f"{name}, in features" if in_features else name,
        distance + shared,
        f"{item.n_heldout:,} ({item.n_groups:,})",
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
                    printable(item.name, NAME), f"{item.n_accepted:,}", share(item.coverage, 2),
                    share(item.coverage_expected, 2),
                    sentence(f"withheld: {item.withheld}") if item.withheld else "kept",
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
                        printable(item.name, NAME), f"{quality.n_real:,}", f"{quality.n_samples:,}",
                        share(quality.precision, 2), share(quality.recall, 2), share(quality.density, 2),
                        share(quality.coverage, 2), plain_interval(quality.kid),
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
        f"Fidelity is unavailable for {', '.join(printable(name) for name in names)}: {printable(why, SENTENCE)}"
        for why, names in by_words(
            {item.name: quality.unavailable for item, quality in known if quality.unavailable}
        ).items()
    ]
    return _section("quality", "Coverage and fidelity", lines, parts)


def _membership(facts: PageFacts) -> dict[str, Any] | None:
    membership = facts.membership
    promised = [] if facts.checkpoint is None else privacy_sentences(facts.checkpoint, facts.uses)
    title = "What the generator gives away"
    if membership is None:
        if facts.checkpoint is None:
            return None
        return _section(
            "membership",
            title,
            ["Whether the generator tells its training images from others was not tested.", *promised],
        )
    lines = [*attacked(facts.uses), *tested(membership), sentence(membership_sentence(membership))]
    lines += map(sentence, membership.notes)
    lines.append(
        "That an attack fails is no proof that none succeeds. This is not differential privacy and not anonymity."
    )
    lines += promised
    lines += [
        f"Unavailable for {', '.join(printable(name) for name in names)}: {printable(why, SENTENCE)}"
        for why, names in by_words(
            {item.name: item.unavailable for item in membership.classes if item.unavailable}
        ).items()
    ]
    rows: list[Sequence[Any]] = [
        (
            "all classes", f"{membership.overall.n_members:,}", f"{membership.overall.n_heldout:,}",
            *found(membership.overall), plain_interval(membership.overall.control_auc),
        )
    ]  # fmt: skip
    rows += [
        (
            printable(item.name, NAME), f"{item.n_members:,}", f"{item.n_heldout:,}", *found(item),
            plain_interval(item.control_auc),
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


def _checkpoints(facts: PageFacts) -> dict[str, Any] | None:
    if not facts.uses:
        return None
    rows = [checkpoint_cells(use, [printable(name, NAME) for name in use.classes]) for use in facts.uses]
    lines = [
        "Samples of classes that did not change were kept from the job that drew them, and audited again with all "
        "others. Each row of the manifest names its own checkpoint."
    ]
    return _section("checkpoints", "Checkpoints", lines, [Table(CHECKPOINT_CAPTION, CHECKPOINT_COLUMNS, rows)])


def _training(facts: PageFacts) -> dict[str, Any] | None:
    checkpoint = facts.checkpoint
    if checkpoint is None:
        return None
    lines = [
        f"Generator '{printable(checkpoint.generator)}', {checkpoint.parameters:,} parameters: "
        f"{checkpoint.images_seen:,} training images drawn (with repeats) of {checkpoint.images_budget:,} asked for. "
        f"{sentence(checkpoint.stopped)}",
        *([_side_by_side(checkpoint)] if checkpoint.processes > 1 else []),
        f"The weights kept are those of the {checkpoint.kept} phase: the better by held-out denoising loss.",
    ]
    before, after = checkpoint.heldout_loss_base, checkpoint.heldout_loss_tuned
    scarce = [name for name in checkpoint.scarce if name in before or name in after]
    table = Table(
        "Held-out denoising loss of the scarce classes after the base and after fine-tuning; lower is better.",
        ("Class", "After the base", "After fine-tuning"),
        [(printable(name, NAME), share(before.get(name), 4), share(after.get(name), 4)) for name in scarce],
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
    if facts.learned_earlier:
        lines.insert(0, facts.learned_earlier)
    if facts.uses:
        lines.insert(0, f"What follows is of the newest checkpoint, {checkpoint.digest[:12]}.")
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


def _side_by_side(checkpoint: Checkpoint) -> str:
    return (
        f"Trained by {checkpoint.processes} processes together, the first on {printable(checkpoint.device)}; the same "
        "number gives the same checkpoint again, another number another one."
    )


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
        *(
            [f"The checkpoints' digests are {', '.join(use.checkpoint.digest for use in facts.uses)}."]
            if facts.uses
            else [f"The checkpoint's digest is {facts.checkpoint.digest}."]
        ),
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
            f"{', '.join(printable(name) for name in names)}: {printable(words, SENTENCE)}"
            for words, names in facts.plan.notes.items()
        ]
    if facts.report is not None:
        lines += [
            sentence(note) for note in facts.report.notes if not facts.judge or note != facts.judge.near_copy_note
        ]
    if facts.citation:
        lines.append(f"Cite the source as: {printable(' '.join(facts.citation.split()), 2000)}")
    return _section("notes", "Notes", lines) if lines else None


def _arm(item: Any) -> str:
    key, words = printable(item.key, NAME), printable(item.words, NAME) if item.words else ""
    return f"{key}: {words}" if words and words != key else key


def _seconds(value: float) -> str:
    return f"{value:,.1f}"
