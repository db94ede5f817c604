"""What a report page tells, and the words that its parts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from synthaug.records import (
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    Interval,
    Judge,
    Membership,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)
from synthaug.report.checkpoint_words import CheckpointUse
from synthaug.report.page_pictures import PagePictures
from synthaug.report.verdict_words import UNAVAILABLE, count, look, usable
from synthaug.text import printable

NOT_EVALUATED = (
    "not evaluated: whether training with these synthetic images helps was not measured. No claim is made that they "
    "are useful."
)
NAME, SENTENCE = 200, 1000  # characters of a name, and of a reason or note, that are shown at most


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
    checkpoint: Checkpoint | None = None  # the newest
    judge: Judge | None = None
    batches: Sequence[SampleBatch] = ()
    report: AuditReport | None = None
    verdict: Verdict | None = None
    membership: Membership | None = None  # of the newest checkpoint
    uses: Sequence[CheckpointUse] = ()  # where there are several checkpoints
    learned_earlier: str = ""  # what the newest checkpoint was trained on, where that is not these splits
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


def n_synthetic(audit: ClassAudit | None) -> int:
    """Samples of a class that a release holds."""
    return 0 if audit is None or audit.withheld else min(audit.n_accepted, audit.n_wanted)


def measured(verdict: Verdict) -> str:
    images, seeds = count(verdict.n_test, "real test image"), count(verdict.seeds, "classifier seed")
    return f"{images}, {seeds}, {look(verdict.looks)}"


def plain_interval(interval: Interval | None) -> str:
    known = usable(interval)
    return UNAVAILABLE if known is None else f"{known.estimate:.3f} [{known.low:.3f}, {known.high:.3f}]"


def sentence(words: str) -> str:
    return printable(capital(words), SENTENCE)


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def looked_for(facts: PageFacts) -> bool:
    """Was there a distance for near-copies?"""
    return facts.judge is None or facts.judge.near_copy_threshold is not None
