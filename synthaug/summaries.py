"""What a command tells at its end, and prints with --json."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from synthaug.records import AuditReport, BalancePlan, CopyRates, Membership, Record, Verdict


class PlanSummary(Record):
    """What a dry run tells."""

    run: Path
    dataset: str
    plan: BalancePlan
    splits: dict[str, list[int]]
    set_aside: dict[str, int]
    held_back: dict[str, int]


class RunSummary(Record):
    """What a run came to; this is the object that `synthaug run --json` prints."""

    name: str
    run: Path
    release: Path
    release_digest: str
    checkpoint: Path
    heldout_loss: dict[str, dict[str, float | None]]
    counts: dict[str, dict[str, int]]
    copies: dict[str, CopyRates] = Field({}, description="Class to how near its samples are to training images.")
    verdict: str | None = None
    verdict_sentence: str = "not evaluated"
    verdict_file: Path | None = None
    membership: Membership | None = None
    membership_sentence: str = "not tried"
    membership_file: Path | None = None
    contact_sheet: Path
    rejected_sheet: Path
    report: Path | None = None
    pushed_to: str | None = None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float]
    reused: tuple[str, ...]


class VerdictSummary(Record):
    """What a trial came to."""

    run: Path
    verdict: Verdict
    verdict_file: Path
    pictures: tuple[Path, ...]
    seconds: dict[str, float]
    reused: tuple[str, ...]


class AuditSummary(Record):
    """What the audit says of another tool's samples."""

    run: Path
    report: AuditReport
    audit_file: Path
    rejected_sheet: Path
    seconds: dict[str, float]
    reused: tuple[str, ...]
