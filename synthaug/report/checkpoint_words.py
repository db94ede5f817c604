"""Which checkpoint made which samples, where a release has samples of several; the same in the card and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthaug.records import (
    AUDIT_FILE,
    SEEN_FILE,
    SPLITS_FILE,
    AuditReport,
    Checkpoint,
    Membership,
    SampleBatch,
    Source,
    Splits,
)
from synthaug.report.membership_words import found, privacy_sentence

if TYPE_CHECKING:
    import pandas as pd

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
class Learned:
    """The real images that a checkpoint was trained on, and held out with."""

    n_train: int
    n_validation: int
    is_current: bool  # the training and validation images of the split at hand, and no others


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
                n_trained_on=None if (seen := _seen(checkpoint)) is None else int((seen["use"] == "train").sum()),
                auc=found(memberships[number].overall)[0] if len(memberships) == len(checkpoints) else "not tried",
            )
        )
    return tuple(uses)


def learned(checkpoint: Checkpoint, splits: Splits) -> Learned | None:
    """What a checkpoint was trained on, held against a split; None: one of the lists is gone.

    Test images have no part in it: that others came to them leaves a checkpoint what it is.
    """
    import pandas as pd

    if (seen := _seen(checkpoint)) is None:
        return None
    try:
        table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["image_id", "split", "held_back"])
    except (OSError, ValueError):  # pyarrow's own errors are these
        return None
    table = table[table["held_back"].isna()]
    return Learned(
        n_train=int((seen["use"] == "train").sum()),
        n_validation=int((seen["use"] == "validation").sum()),
        is_current=all(
            set(seen["image_id"][seen["use"] == use]) == set(table["image_id"][table["split"] == use])
            for use in ("train", "validation")
        ),
    )


def earlier_state(checkpoint: Checkpoint, splits: Splits) -> str:
    """A sentence for a newest checkpoint that did not learn from the images of the split; otherwise nothing."""
    then = learned(checkpoint, splits)
    if then is None or then.is_current:
        return ""
    n_train, n_validation = (sum(splits.counts.get(name, [])) for name in ("train", "validation"))
    return (
        f"Checkpoint {checkpoint.digest[:12]} was trained on an earlier state of the dataset, with {then.n_train:,} "
        f"real training and {then.n_validation:,} validation images; now there are {n_train:,} and {n_validation:,}. "
        "Nothing was trained on what came since."
    )


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


def _seen(checkpoint: Checkpoint) -> pd.DataFrame | None:
    """Image id and use of all that a checkpoint was trained with; None: its list is gone."""
    import pandas as pd

    try:
        return pd.read_parquet(checkpoint.directory / SEEN_FILE, columns=["image_id", "use"])
    except (OSError, ValueError):  # pyarrow's own errors are these
        return None
