"""The dataset card: README.md of a release, with the front matter that `load_dataset` and the hub read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from synthaug.records import (
    AuditReport,
    BalancePlan,
    Checkpoint,
    Judge,
    Membership,
    PixelSpec,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)
from synthaug.report.audit_words import coverage_words
from synthaug.report.checkpoint_words import (
    CHECKPOINT_CAPTION,
    CHECKPOINT_COLUMNS,
    CheckpointUse,
    attacked,
    checkpoint_cells,
    privacy_sentences,
    trained_once,
)
from synthaug.report.copy_words import COPY_COLUMNS, NEAR_COLUMNS, copy_caveat, copy_lines, copy_rows, near_rows
from synthaug.report.limit_words import limit_lines
from synthaug.report.membership_words import found, membership_sentence, tested
from synthaug.report.verdict_words import (
    METRICS,
    by_words,
    count,
    known_differences,
    look,
    metric_words,
    points,
    share,
    signed,
    usable,
)
from synthaug.text import printable

# Licence identifiers that the hub knows; any other goes into license_name and license_details.
_LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0
    gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr unknown other
"""
KNOWN_LICENCES = frozenset(_LICENCES.split())
_SENTENCES = 1000  # characters of a reason or note that are shown at most
# The outcome in words; none of them says more than was measured.
_OUTCOMES = {
    "helps": "the synthetic images help",
    "no evidence": "no evidence that the synthetic images help",
    "harms": "the synthetic images do harm",
}
_PICTURES = {
    "verdict_gain.png": "What the synthetic images change on the test split, overall and per class",
    "verdict_dose.png": "The metric over the dose of synthetic images, on the validation split",
    "verdict_confusion.png": "Which classes are taken for which, without and with synthetic images",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_MORE_SIZES = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))


@dataclass(frozen=True)
class SplitOnDisk:
    """A split as the release holds it."""

    name: str
    shards: tuple[str, ...]
    n_real: tuple[int, ...]  # by label
    n_synthetic: tuple[int, ...]  # by label
    n_bytes: int  # in memory
    n_bytes_on_disk: int

    @property
    def n_rows(self) -> int:
        return sum(self.n_real) + sum(self.n_synthetic)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; everything but the records is what the release stage found out itself."""

    title: str
    source: Source  # its name without local paths
    splits: Splits
    plan: BalancePlan
    checkpoint: Checkpoint  # the newest
    judge: Judge
    batches: Sequence[SampleBatch]
    report: AuditReport
    on_disk: tuple[SplitOnDisk, ...]
    features: list[dict[str, Any]]  # as dataset_info spells them
    png: bool
    include_real: bool
    n_short: dict[int, int]  # label to samples that the plan asked for and did not get
    licence: str | None
    citation: str | None
    config_digest: str
    manifest_digest: str
    version: str
    verdict: Verdict | None = None
    verdict_pictures: tuple[str, ...] = ()  # files of the release: verdict_gain.png, verdict_dose.png, ...
    source_dataset: str | None = None  # id on the hub, where the source lies there
    membership: Membership | None = None  # of the newest checkpoint
    uses: Sequence[CheckpointUse] = ()  # where there are several checkpoints
    learned_earlier: str = ""  # what the newest checkpoint was trained on, where that is not this split


def render_card(facts: CardFacts) -> str:
    """README.md: YAML front matter, then Markdown. Every name that came from data is escaped."""
    parts = [
        f"---\n{_front_matter(facts)}---",
        f"# {markdown(facts.title)}",
        _verdict_first(facts.verdict, facts.uses),
        _opening(facts),
        "![Real images beside synthetic ones, per class](contact_sheet.png)"
        if facts.include_real
        else "![Synthetic images, per class](contact_sheet.png)",
        "## Load",
        _load(),
        "## Counts",
        *_counts(facts),
        "## How it was made",
        *_making(facts),
        "## Copies of training images",
        *_copies(facts),
        *(["## Verdict", *_verdict(facts.verdict, facts.verdict_pictures, facts.uses)] if facts.verdict else []),
        "## What the generator gives away",
        *attacked(facts.uses),
        *_membership(facts.membership),
        *privacy_sentences(facts.checkpoint, facts.uses),
        "## Limits",
        _limits(facts),
        "## Verify",
        _verify(facts),
        "## Source, licence and citation",
        *_provenance(facts),
    ]
    return "\n\n".join(parts) + "\n"


def markdown(name: str, width: int = 200) -> str:
    """A name for Markdown text or a table cell: one line, nothing in it is markup, HTML or a link."""
    text = printable(name, width).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$@^])", r"\\\1", text)
    # Neither list items, rules nor addresses that a viewer would make links of.
    text = re.sub(r"^(\d*)([-.])", r"\1\\\2", text)
    return re.sub(r"(?i)(https?|ftp|mailto)(:)", r"\1&#58;", text).replace("www.", "www&#46;")


def licence_fields(licence: str | None) -> dict[str, str]:
    """The licence as the hub's front matter has it."""
    if licence is None or not licence.strip():
        return {"license": "unknown"}
    licence = licence.strip()
    if licence.lower() in KNOWN_LICENCES:
        return {"license": licence.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")[:60] or "see-details"
    return {"license": "other", "license_name": name, "license_details": licence}


def _front_matter(facts: CardFacts) -> str:
    import yaml

    n_rows = sum(split.n_rows for split in facts.on_disk)
    size = next((name for limit, name in _SIZES + _MORE_SIZES if n_rows < limit), "n>1T")
    values: dict[str, Any] = {
        "pretty_name": printable(facts.title, width=200),
        **licence_fields(facts.licence),
        # The hub's own words: where labels came from, and what a dataset extends. A synthetic image has the label
        # that it was asked for; who labelled the real ones is the source's to tell.
        "annotations_creators": ["machine-generated", *(["found"] if facts.include_real else [])],
        "source_datasets": [f"extended|{facts.source_dataset}" if facts.source_dataset else "extended|other"],
        "task_categories": ["image-classification"],
        "size_categories": [size],
        "tags": ["synthetic", "synthaug", "class-imbalance", *(["diffusion"] if _is_diffusion(facts) else [])],
        # No field of the hub's says which part is synthetic and how it was made.
        "synthetic_data": _synthetic_data(facts),
        "dataset_info": {
            "features": facts.features,
            "splits": [
                {"name": split.name, "num_bytes": split.n_bytes, "num_examples": split.n_rows}
                for split in facts.on_disk
            ],
            "download_size": sum(split.n_bytes_on_disk for split in facts.on_disk),
            "dataset_size": sum(split.n_bytes for split in facts.on_disk),
        },
        # Every shard by its name, so that a missing one is an error and no other file is taken for data.
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split.name, "path": list(split.shards)} for split in facts.on_disk],
            }
        ],
    }

    class Dumper(yaml.SafeDumper):
        pass

    def quoted(dumper: yaml.SafeDumper, value: str) -> Any:
        # Outside of double quotes, line breaks of every kind (U+0085 and others too) are folded into spaces.
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')

    Dumper.add_representer(str, quoted)
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _is_diffusion(facts: CardFacts) -> bool:
    """Of a generator that a user has added nothing is known but its name."""
    return facts.checkpoint.generator == "edm"


def _synthetic_data(facts: CardFacts) -> dict[str, Any]:
    return {
        "marked_by": "is_synthetic",
        "splits": ["train"],
        "n_synthetic": sum(sum(split.n_synthetic) for split in facts.on_disk),
        "n_real": sum(sum(split.n_real) for split in facts.on_disk),
        "method": "class-conditional diffusion model" if _is_diffusion(facts) else "generator",
        "trained_on": (
            "real training images of an earlier state of the dataset"
            if facts.learned_earlier
            else "the real training images"
        ),
        "generator": printable(facts.checkpoint.generator, width=200),
        "checkpoint_digest": facts.checkpoint.digest,
        **({"checkpoint_digests": [use.checkpoint.digest for use in facts.uses]} if facts.uses else {}),
        "solver": sorted({batch.solver for batch in facts.batches}),
        "manifest_sha256": facts.manifest_digest,
        "provenance": "provenance.json",
    }


def _verdict_first(verdict: Verdict | None, uses: Sequence[CheckpointUse] = ()) -> str:
    """The verdict in words, whichever it is, with what it rests on."""
    if verdict is None:
        return (
            "**Verdict: not evaluated.** Whether training with these synthetic images helps was not measured. No claim "
            "is made that they are useful."
        )
    # The sentence may begin with the outcome, which stands there already.
    sentence = _sentence(verdict.sentence.removeprefix(f"{verdict.outcome}: "))
    parts = [f"**Verdict: {_OUTCOMES[verdict.outcome]}.** {sentence}"]
    interval = usable(verdict.differences.get("real", {}).get(verdict.metric))
    if interval is None:
        parts.append("No difference was measured on the test split, and no claim is made that they are useful.")
        return " ".join(parts)
    parts += [
        f"Measured on the test split ({_measured(verdict)}): {metric_words(verdict.metric)} (higher is better) with "
        "the synthetic images minus the best training on real images alone is "
        f"{signed(100 * interval.estimate)} percentage points, 95 % interval {signed(100 * interval.low)} to "
        f"{signed(100 * interval.high)}.",
        trained_once(uses),
    ]
    return " ".join(parts)


def _opening(facts: CardFacts) -> str:
    real = sum(sum(split.n_real) for split in facts.on_disk)
    synthetic = sum(sum(split.n_synthetic) for split in facts.on_disk)
    classes = len(facts.source.classes)
    generator = f"{len(facts.uses)} checkpoints of a generator" if facts.uses else "a generator"
    if facts.include_real:
        return (
            f"**{real + synthetic} images for image classification in {classes} classes: {real} real and "
            f"{synthetic} synthetic.** The synthetic images were drawn from {generator} that was trained on "
            f"{'' if facts.learned_earlier else 'the '}real training images, to raise the scarce classes. They are in "
            "the training split only, and `is_synthetic` marks them; validation and test hold real images only."
        )
    return (
        f"**{synthetic} synthetic images for image classification in {classes} classes, and no real ones.** They "
        f"were drawn from {generator} that was trained on real images, to raise the scarce classes. "
        "`is_synthetic` is true in every row."
    )


def _counts(facts: CardFacts) -> list[str]:
    audits = {audit.label: audit for audit in facts.report.classes}
    train = facts.on_disk[0]
    rows = []
    for item in facts.plan.classes:
        audit = audits.get(item.label)
        rejected = audit.rejected if audit else {}
        rows.append(
            [
                markdown(item.name),
                str(item.n_real),
                str(train.n_synthetic[item.label]),
                str(item.n_target),
                _short(facts, item.label, item.refused),
                ", ".join(f"{markdown(reason)}: {n}" for reason, n in sorted(rejected.items())) or "none",
                coverage_words(audit),
            ]
        )
    real = "Real (training)" if facts.include_real else "Real (training, not in this release)"
    table = _table(["Class", real, "Synthetic", "Target", "Short", "Rejected by the audit", "Coverage"], rows)
    splits = _table(
        ["Split", "Real", "Synthetic", "Rows"],
        [
            [f"`{split.name}`", str(sum(split.n_real)), str(sum(split.n_synthetic)), str(split.n_rows)]
            for split in facts.on_disk
        ],
    )
    notes = "\n".join(
        f"- {', '.join(markdown(name) for name in names)}: {markdown(words, _SENTENCES)}"
        for words, names in facts.plan.notes.items()
    )
    coverage = (
        "Coverage: share of the real training images that have an accepted sample near, higher is better, of what as "
        "many images of the same distribution would reach. `report.html` shows each class, with pictures and "
        "all figures."
    )
    return [table, *([notes] if notes else []), coverage, splits]


def _short(facts: CardFacts, label: int, refused: str | None) -> str:
    short = facts.n_short.get(label, 0)
    audit = next((audit for audit in facts.report.classes if audit.label == label), None)
    if refused is not None:
        return f"refused: {markdown(refused, _SENTENCES)}"
    if short == 0:
        return "0"
    if audit is not None and audit.withheld is not None:
        return f"{short}, withheld: {markdown(audit.withheld, _SENTENCES)}"
    return f"{short}, missing: too few samples passed the audit within the budget"


def _making(facts: CardFacts) -> list[str]:
    checkpoint, spec = facts.checkpoint, facts.source.pixels
    lines = [
        f"Pixels: {_pixels(spec, facts.png)}.",
        f"Split: {markdown(facts.splits.method)}; {_made_before(facts)}",
        f"{'The newest generator' if facts.uses else 'Generator'}: `{_code(checkpoint.generator)}`, "
        f"{checkpoint.parameters:,} parameters, trained on {checkpoint.images_seen:,} images drawn (with repeats) "
        f"from {'real training images' if facts.learned_earlier else 'the real training split'}; the weights kept are "
        f"those of the {checkpoint.kept} phase.",
        *([facts.learned_earlier] if facts.learned_earlier else []),
        f"Checkpoint digest: `{_code(checkpoint.digest)}`",
    ]
    drawn = sorted({(batch.solver, batch.steps, batch.guidance) for batch in facts.batches})
    lines += [
        f"Sampling: solver `{_code(solver)}`, {steps} evaluations of the network per image, guidance {guidance:g}."
        for solver, steps, guidance in drawn
    ]
    accuracy = facts.judge.validation_balanced_accuracy
    measured = "not measured (no validation images)" if accuracy is None else f"{accuracy:.3f}"
    lines += [
        "Audit: a classifier trained on the real training images only (balanced accuracy on real validation images, "
        f"higher is better: {measured}).",
        *(markdown(note, _SENTENCES) for note in facts.report.notes if note != facts.judge.near_copy_note),
    ]
    parts = ["\n".join(f"- {line}" for line in lines)]
    if facts.uses:
        rows = [checkpoint_cells(use, [markdown(name) for name in use.classes]) for use in facts.uses]
        parts += [CHECKPOINT_CAPTION, _table(CHECKPOINT_COLUMNS, [[f"`{digest}`", *rest] for digest, *rest in rows])]
    before, after = checkpoint.heldout_loss_base, checkpoint.heldout_loss_tuned
    if scarce := [name for name in checkpoint.scarce if name in before or name in after]:
        parts += [
            "Held-out denoising loss of the scarce classes before and after fine-tuning (lower is better):",
            _table(
                ["Class", "Before", "After"],
                [[markdown(name), _number(before.get(name)), _number(after.get(name))] for name in scarce],
            ),
        ]
    return parts


def _made_before(facts: CardFacts) -> str:
    if facts.learned_earlier:
        return "the images that the generator was trained on were divided before, and are where they were."
    return "made before the generator was trained."


def _verdict(verdict: Verdict, pictures: Sequence[str], uses: Sequence[CheckpointUse] = ()) -> list[str]:
    parts = [_trial(verdict, uses)]
    # Paths are written as they are, so only the names that a release gives are.
    parts += [f"![{words}]({name})" for name, words in _PICTURES.items() if name in pictures]
    if verdict.finalists:
        parts += [
            f"Finalists on the test split ({_measured(verdict)}). Higher is better; of the calibration error, lower.",
            _table(
                ["Arm", *(words[0].upper() + words[1:] for words in METRICS.values()), "Spread over seeds"],
                [
                    [
                        _arm(item.key, item.words),
                        *(share(getattr(item, metric)) for metric in METRICS),
                        share(item.spread),
                    ]
                    for item in verdict.finalists
                ],
            ),
        ]
    if differences := list(known_differences(verdict.differences)):
        parts += [
            f"{_code_or(verdict.recipe, 'The chosen recipe')} minus another arm on the test split, in percentage "
            "points with 95 % intervals, paired by seed and image. Higher is better.",
            _table(
                ["Minus", "Metric", "Difference"],
                [
                    [markdown(words), markdown(metric_words(metric)), points(interval)]
                    for _, words, metric, interval in differences
                ],
            ),
        ]
    if verdict.classes:
        parts += [
            "Classes that were offered synthetic images, with the dose that is recommended (0: none). Gains on the "
            "test split against the best real-only arm, in percentage points; higher is better.",
            _table(
                ["Class", "Real", "Test", "Offered", "Tried", "Recommended", "Gain in recall", "Gain in AUPRC"],
                [
                    [
                        markdown(item.name),
                        *(str(n) for n in (item.n_real, item.n_test, item.n_offered, item.tried, item.dose)),
                        points(item.recall_gain),
                        points(item.auprc_gain),
                    ]
                    for item in verdict.classes
                ],
            ),
        ]
    if verdict.subgroups:
        parts += [
            f"Subgroups of the test split: {metric_words(verdict.metric)}, higher is better; gain in percentage "
            "points.",
            _table(
                ["Subgroup", "Test", "Before", "After", "Gain"],
                [
                    [markdown(item.name), str(item.n_test), share(item.before), share(item.after), points(item.gain)]
                    for item in verdict.subgroups
                ],
            ),
        ]
    return parts


def _membership(membership: Membership | None) -> list[str]:
    """What was tested on the checkpoint and what was found, and what that is not."""
    if membership is None:
        return ["Whether the generator tells its training images from others was not tested."]
    lines = [*tested(membership), _sentence(membership_sentence(membership))]
    lines += [_sentence(note) for note in membership.notes]
    lines.append(
        "That an attack fails is no proof that none succeeds. This is not differential privacy and not anonymity."
    )
    parts = ["\n".join(f"- {line}" for line in lines)]
    if rows := [
        [markdown(item.name), str(item.n_members), str(item.n_heldout), *found(item)] for item in membership.classes
    ]:
        head = ["Class", "Training images", "Held-out images", "AUC (95 %)", "Told at 1 % false alarms (95 %)"]
        parts.append(_table(head, rows))
    if missing := by_words({item.name: item.unavailable for item in membership.classes if item.unavailable}):
        parts.append(
            "\n".join(
                f"- Unavailable for {', '.join(markdown(name) for name in names)}: {markdown(why, _SENTENCES)}."
                for why, names in missing.items()
            )
        )
    return parts


def _trial(verdict: Verdict, uses: Sequence[CheckpointUse]) -> str:
    """How the figures came about, and what is not among them."""
    lines = [_sentence(reason) for reason in verdict.reasons]
    if verdict.arms:
        sides = [sum(arm.side == side for arm in verdict.arms) for side in ("real", "synthetic")]
        lines.append(
            f"Chosen on the validation split ({count(verdict.n_validation, 'real image')}) by "
            f"{metric_words(verdict.metric)} out of {count(sides[0], 'arm')} with real images alone and "
            f"{count(sides[1], 'arm')} with synthetic ones: {_code_or(verdict.best_real, 'none')} and "
            f"{_code_or(verdict.recipe, 'none')}."
        )
    if verdict.finalists:
        earlier = " Earlier looks may have guided the settings: chance is the likelier for it."
        lines.append(
            f"Reported on the test split ({_measured(verdict)}), which this trial chose nothing on."
            f"{earlier if verdict.looks > 1 else ''}"
        )
        lines.append(
            f"Classifier: {markdown(verdict.classifier)}, {count(verdict.steps, 'optimizer step')} for every arm."
        )
    if verdict.trained_out is not None:
        lines.append(
            "What four times the steps would have given the best real-only arm, on validation: "
            f"{points(verdict.trained_out)} percentage points."
        )
    if verdict.worth:
        lines.append(f"What a synthetic image is worth: {markdown(verdict.worth, _SENTENCES)}")
    for why, names in by_words(verdict.not_tried).items():
        lines.append(f"Not tried: {', '.join(markdown(name) for name in names)}: {markdown(why, _SENTENCES)}")
    lines += [_sentence(note) for note in (*verdict.notes, *verdict.advice)]
    if verdict.finalists:
        lines.append(
            f"{f'{len(uses)} checkpoints, each' if uses else 'One generator,'} trained once, one split: the intervals "
            "hold the chance of the classifier's seeds and of the test images, and neither that of another generator "
            "nor of other training images."
        )
    return "\n".join(f"- {line}" for line in lines)


def _sentence(words: str) -> str:
    return markdown(words[:1].upper() + words[1:], _SENTENCES)


def _measured(verdict: Verdict) -> str:
    images, seeds = count(verdict.n_test, "real image"), count(verdict.seeds, "classifier seed")
    return f"{images}, {seeds}, {look(verdict.looks)}"


def _arm(key: str, words: str) -> str:
    return f"{markdown(key)}: {markdown(words)}" if words and words != key else markdown(key)


def _code_or(name: str | None, otherwise: str) -> str:
    return f"`{_code(name)}`" if name else otherwise


def _copies(facts: CardFacts) -> list[str]:
    lines = [*copy_lines(facts.judge), copy_caveat(facts.judge)]
    parts = ["\n".join(f"- {markdown(line, _SENTENCES)}" for line in lines)]
    looked_for = facts.judge.near_copy_threshold is not None
    for columns, rows in (
        (COPY_COLUMNS, copy_rows(facts.report.classes, looked_for=looked_for)),
        (NEAR_COLUMNS, near_rows(facts.judge) if looked_for else []),
    ):
        if rows:
            parts.append(_table(columns, [[markdown(name), *cells] for name, *cells in rows]))
    return parts


def _limits(facts: CardFacts) -> str:
    return "\n".join(f"- {line}" for line in limit_lines(facts.include_real))


def _load() -> str:
    return (
        "```python\n"
        'from datasets import load_dataset; data = load_dataset("path/of/this/directory")\n'
        "```\n\n"
        "It needs no network for a local directory, and `streaming=True` works as well. Columns: `image`, `label`, "
        "`is_synthetic`, `sample_id` (synthetic images; the key into `manifest.parquet`), `source_id` (real images)."
    )


def _verify(facts: CardFacts) -> str:
    texts = (
        " PNGs of synthetic images say `synthetic` and their `sample_id` in text chunks, which only a copy that keeps "
        "the file as it is carries along."
        if facts.png
        else ""
    )
    return (
        "```\nsynthaug verify path/of/this/directory\n```\n\n"
        "holds every file, row and synthetic image against `release.json` and `manifest.parquet`, which has a row for "
        "each synthetic image: class, seed, checkpoint, solver, audit scores, configuration and versions. "
        "`manifest.csv` is a copy of it for people. `provenance.json` (W3C PROV) ties every file to the dataset, the "
        "checkpoint and the steps that it came from. With the checkpoint at hand, `synthaug remake` makes images again "
        f"from their rows and compares.{texts}\n\n"
        f"- Digest of the manifest: `{facts.manifest_digest}`\n"
        f"- Digest of the configuration (`config.json`): `{facts.config_digest}`\n"
        f"- Made by synthaug {facts.version}"
    )


def _provenance(facts: CardFacts) -> list[str]:
    licence = markdown(facts.licence) if facts.licence else "unknown: find it out before you use or pass on the images"
    parts = [
        f"- Source: {markdown(facts.source.name)}\n"
        f"- Licence of the source, carried over: {licence}\n"
        f"- Images of the source: {facts.source.n_images}; set aside as unusable: {facts.source.n_set_aside}; exact "
        f"duplicates: {facts.source.n_duplicates}"
    ]
    if facts.citation:
        lines = facts.citation.strip().splitlines()
        text = "\n".join(printable(line, width=2000) if line.strip() else "" for line in lines)
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        parts.append(f"Cite the source as:\n\n{fence}\n{text}\n{fence}")
    return parts


def _pixels(spec: PixelSpec, png: bool) -> str:
    meaning = f"{spec.channels} channels" if spec.colour == "channels" else spec.colour
    fit = "as they came" if spec.fit == "none" else f"brought to a square by '{spec.fit}' ({spec.interpolation})"
    held = "PNG" if png else f"array of {spec.dtype}, [height, width, channels]"
    values = f", values {spec.low:g} to {spec.high:g}" if not png else ""
    converted = "; ".join(f"{markdown(what)}: {n} images" for what, n in sorted(spec.conversions.items()))
    return f"{spec.size} × {spec.size}, {meaning}, {spec.dtype}{values}, {held}; {fit}" + (
        f"; converted: {converted}" if converted else ""
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _code(name: str) -> str:
    return printable(name, width=200).replace("`", "'")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
