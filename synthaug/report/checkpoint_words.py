"""Which checkpoint made which samples, where a release has samples of several; the same in the card and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from synthaug.records import AUDIT_FILE, SEEN_FILE, AuditReport, Checkpoint, Membership, SampleBatch, Source
from synthaug.report.membership_words import found, privacy_sentence

CHECKPOINT_COLUMNS = (
    "Checkpoint",
    "Classes",
    "Samples",
    "Real images it was trained on",
    "Membership attack, AUC (0.5 is guessing, lower is better)",
)
CHECKPOINT_CAPTION = "The checkpoints that the samples were drawn from, oldest first."
_MOST_CLASSES = 10


@dataclass(frozen=True)
class CheckpointUse:
    """What a release has of one checkpoint."""

    checkpoint: Checkpoint
    classes: tuple[str, ...]  # as the source has them: not yet escaped
    n_samples: int
    n_trained_on: int | None  # None: its list of images is gone
    auc: str  # of the membership attack when it was made, in words


def checkpoint_uses(
    source: Source,
    checkpoints: Sequence[Checkpoint],
    batches: Sequence[SampleBatch],
    report: AuditReport | None,
    memberships: Sequence[Membership],
) -> tuple[CheckpointUse, ...]:
    """What came from which checkpoint, oldest first; nothing where there is one.

    Args:
        batches: As they were given to the audit.
        report: Without one nothing is said to be released.
        memberships: Of each checkpoint, or none.
    """
    import pandas as pd

    if len(checkpoints) < 2:
        return ()
    released = pd.DataFrame({"batch": [], "label": []}, dtype="int64")
    if report is not None:
        audit = pd.read_parquet(report.directory / AUDIT_FILE, columns=["batch", "label", "rank"])
        wanted = {item.label: 0 if item.withheld else item.n_wanted for item in report.classes}
        released = audit[(audit["rank"] >= 0) & (audit["rank"] < audit["label"].map(wanted).fillna(0))]
    made_by = released["batch"].map({number: batch.checkpoint_digest for number, batch in enumerate(batches)})
    uses = []
    for number, checkpoint in enumerate(checkpoints):
        mine = released[made_by == checkpoint.digest]
        uses.append(
            CheckpointUse(
                checkpoint=checkpoint,
                classes=tuple(source.classes[label] for label in sorted(set(mine["label"]))),
                n_samples=len(mine),
                n_trained_on=_n_trained_on(checkpoint),
                auc=found(memberships[number].overall)[0] if len(memberships) == len(checkpoints) else "not tried",
            )
        )
    return tuple(uses)


def checkpoint_cells(use: CheckpointUse, names: Sequence[str]) -> tuple[str, ...]:
    """A row of the table; `names` are those of `use.classes`, escaped for where they stand."""
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    return (
        use.checkpoint.digest[:12],
        f"{', '.join(names[:_MOST_CLASSES])}{more}" or "none",
        f"{use.n_samples:,}",
        "unknown" if use.n_trained_on is None else f"{use.n_trained_on:,}",
        use.auc,
    )


def privacy_sentences(checkpoint: Checkpoint, uses: Sequence[CheckpointUse]) -> list[str]:
    """What was promised of each checkpoint."""
    if not uses:
        return [privacy_sentence(checkpoint)]
    return [f"{use.checkpoint.digest[:12]}: {privacy_sentence(use.checkpoint)}" for use in uses]


def trained_once(uses: Sequence[CheckpointUse]) -> str:
    """How far the figures of a verdict reach."""
    if not uses:
        return "All figures are of one generator, trained once: another can come out otherwise."
    return f"All figures are of these {len(uses)} checkpoints, each trained once: others can come out otherwise."


def attacked(uses: Sequence[CheckpointUse]) -> list[str]:
    """Of which checkpoint the membership attack's figures are, where there are several."""
    if not uses:
        return []
    return [
        f"The figures here are of the newest checkpoint, {uses[-1].checkpoint.digest[:12]}. Earlier ones were attacked "
        "when they were trained; what was found is in the table of checkpoints."
    ]


def _n_trained_on(checkpoint: Checkpoint) -> int | None:
    import pandas as pd

    try:
        seen = pd.read_parquet(checkpoint.directory / SEEN_FILE, columns=["use"])
    except (OSError, ValueError):  # pyarrow's own errors are these
        return None
    return int((seen["use"] == "train").sum())
