"""report.html: a job on one page, for people. One file that asks no network for anything.

The same facts give the same bytes, so that the page in a release can be held against its digest: it has no times, no
paths of this machine, and no seconds. The page in the run folder has costs, and may show training images beside what
repeats them; it is not for publication.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthaug.formats.atomic import write_text
from synthaug.records import (
    TRAINING_LOG_FILE,
    Checkpoint,
    ClassAudit,
    ClassPlan,
    ClassVerdict,
    Figures,
    Verdict,
)
from synthaug.report import page_figures as figures
from synthaug.report.audit_words import coverage_words
from synthaug.report.checkpoint_words import trained_once
from synthaug.report.copy_words import copy_rows
from synthaug.report.limit_words import limit_lines
from synthaug.report.membership_words import found
from synthaug.report.page_facts import (
    NAME,
    NOT_EVALUATED,
    SENTENCE,
    PageFacts,
    capital,
    looked_for,
    measured,
    n_synthetic,
    plain_interval,
    sentence,
)
from synthaug.report.page_sections import sections
from synthaug.report.verdict_words import UNAVAILABLE, count, points, share, usable
from synthaug.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

_SHORT_NAME = 80  # characters of a name in a table of all classes
_MOST_UNFOLDED = 3  # classes whose sections stand open
# The columns of `copy_rows` in a class's own section.
_COPY_WORDS = (
    "Copies and near-copies before the gate (fewer is better)",
    "Copies and near-copies after the gate (fewer is better)",
    "Three times nearer to one training image than to the next, before → after the gate (fewer is better)",
    "Near to a training image in features, before → after the gate (fewer is better)",
)


def write_page(facts: PageFacts, path: Path) -> Path:
    """Write the page, whole or not at all."""
    write_text(path, render_page(facts))
    return path


def render_page(facts: PageFacts) -> str:
    """The page as HTML. Every name that came from data is made printable and escaped; nothing is fetched."""
    parts = [item for item in sections(facts) if item is not None]
    style = _text("page.css").replace("SIDE", str(facts.pictures.side))
    script = _text("page.js")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=printable(facts.title, NAME),
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
            sections=parts,
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
        return {"kind": "none", "sentence": capital(NOT_EVALUATED), "more": ""}
    kind = {"helps": "helps", "harms": "harms"}.get(verdict.outcome, "unclear")
    more = ""
    if verdict.finalists:
        more = f"Measured on {measured(verdict)}. {trained_once(facts.uses)}"
    return {"kind": kind, "sentence": sentence(verdict.sentence), "more": more}


def _opening(facts: PageFacts) -> list[str]:
    """What was made from what, in sentences."""
    sentences = []
    n_classes = len(facts.source.classes)
    real = None if facts.splits is None else sum(facts.splits.counts.get("train", []))
    made = sum(n_synthetic(item) for item in facts.report.classes) if facts.report else None
    if made is not None and real is not None:
        raised = sum(1 for item in facts.report.classes if n_synthetic(item)) if facts.report else 0
        sentences.append(
            f"{count(made, 'synthetic image')} of {_classes_in_words(raised)} {'were' if made != 1 else 'was'} made "
            f"{'for' if facts.learned_earlier else 'from'} {count(real, 'real training image')} in "
            f"{_classes_in_words(n_classes)}, to raise the scarce ones."
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
        several = f"Drawn from {len(facts.uses)} checkpoints. " if facts.uses else ""
        sentences.append(
            f"{several}{'The newest' if several else 'Their generator'} ({printable(facts.checkpoint.generator)}, "
            f"{facts.checkpoint.parameters:,} parameters) was trained on {'' if facts.learned_earlier else 'the '}real "
            "training images alone; validation and test hold real images only."
        )
        if facts.learned_earlier:
            sentences.append(facts.learned_earlier)
    return sentences


def _about(facts: PageFacts) -> list[tuple[str, str]]:
    source, spec = facts.source, facts.source.pixels
    colour = f"{spec.channels} channels" if spec.colour == "channels" else spec.colour
    rows = [
        ("Source", printable(source.name, SENTENCE)),
        ("Images", f"{spec.size} × {spec.size} pixels, {colour}, {spec.dtype}"),
    ]
    if facts.splits is not None:
        counts = facts.splits.counts
        before = (
            "the images that the generator was trained on were divided before, and are where they were"
            if facts.learned_earlier
            else "made before the generator was trained"
        )
        rows.append(("Split", f"{printable(facts.splits.method, SENTENCE)}; {before}"))
        rows.append(("Real images", ", ".join(f"{sum(numbers):,} {name}" for name, numbers in counts.items())))
    aside = [f"{n:,} {printable(reason)}" for reason, n in sorted(source.set_aside_reasons.items())]
    rows.append(("Set aside as unusable", ", ".join(aside) or "none"))
    rows.append(("Licence of the source", printable(facts.licence, NAME) if facts.licence else "unknown"))
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
    most = max([1, *(n_real[k] + n_synthetic(audits.get(k)) for k in range(len(n_real)))])
    limits = figures.interval_limits([item.recall_gain for item in verdicts.values()])
    rows = []
    for label, name in enumerate(facts.source.classes):
        audit, verdict = audits.get(label), verdicts.get(label)
        made = n_synthetic(audit)
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


# Classes


def _classes(facts: PageFacts) -> list[dict[str, Any]]:
    plans, audits, verdicts = _by_label(facts)
    n_real = _n_real(facts)
    copied = copy_rows(facts.report.classes, looked_for=looked_for(facts)) if facts.report else []
    rows = {name: cells for name, *cells in copied}
    attacked = {item.label: item for item in facts.membership.classes} if facts.membership else {}
    gains = [one for item in verdicts.values() for one in (item.recall_gain, item.auprc_gain)]
    limits = figures.interval_limits(gains)
    before, after = _finalists(facts.verdict)
    classes = []
    for label, name in enumerate(facts.source.classes):
        plan, audit, verdict = plans.get(label), audits.get(label), verdicts.get(label)
        tiles = facts.pictures.classes.get(label)
        made = n_synthetic(audit)
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
                pairs.append(("Advice", sentence(verdict.advice)))
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
                "name": printable(name, NAME),
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
                ("Most often taken for", f"{printable(classes[other], NAME)} ({row[other]:.0%} of its images)")
            )
    return pairs


def _finalists(verdict: Verdict | None) -> tuple[Figures | None, Figures | None]:
    known = {item.key: item for item in verdict.finalists} if verdict else {}
    return known.get(verdict.best_real or "") if verdict else None, known.get(verdict.recipe or "") if verdict else None


def _fidelity(verdict: ClassVerdict) -> str:
    quality = verdict.quality
    assert quality is not None
    if quality.unavailable:
        return f"unavailable: {printable(quality.unavailable, SENTENCE)}"
    return (
        f"precision {share(quality.precision, 2)}, recall {share(quality.recall, 2)}, coverage "
        f"{share(quality.coverage, 2)} (higher is better), density {share(quality.density, 2)} (1 is like real), KID "
        f"{plain_interval(quality.kid)} (lower is better)"
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
        return f"Refused: {printable(plan.refused, SENTENCE)}"
    if audit is not None and audit.withheld:
        return f"Withheld: {printable(audit.withheld, SENTENCE)}"
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


def _classes_in_words(n: int) -> str:
    return f"{n:,} class{'' if n == 1 else 'es'}"


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
