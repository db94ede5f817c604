"""Rebuild: write the report of a run folder from its records alone. Nothing is trained, drawn or judged."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, ValidationError

from synthaug.errors import UsageError
from synthaug.records import (
    DONE_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    Judge,
    Membership,
    Record,
    Release,
    SampleBatch,
    Source,
    Splits,
    StageRecord,
    Verdict,
)
from synthaug.text import printable

if TYPE_CHECKING:
    from synthaug.report.checkpoint_words import CheckpointUse
    from synthaug.report.page_facts import Cost

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=StageRecord)

# In the order in which a job makes them. Of samples and audits there are rounds.
_RECORDS: dict[str, type[StageRecord]] = {
    "read": Source,
    "split": Splits,
    "plan": BalancePlan,
    "train": Checkpoint,
    "judge": Judge,
    "membership": Membership,
    "sample": SampleBatch,
    "audit": AuditReport,
    "evaluate": Verdict,
    "release": Release,
}
# What is said of a stage that is not there. Of a verdict and an attack the page says itself that there is none.
_ABSENT = {
    "split": "The images have not been divided into training, validation and test.",
    "plan": "There is no plan: how many images each class shall have is not known.",
    "train": "No generator has been trained.",
    "judge": "There is no judge, so nothing could be audited.",
    "sample": "No samples have been drawn.",
    "audit": "No samples have been audited.",
    "release": "There is no release.",
}


class RebuildResult(Record):
    """What became of a report."""

    run: Path
    report: Path
    missing: tuple[str, ...] = Field(description="What the report cannot tell, in sentences; empty for a whole job.")


@dataclass(frozen=True)
class _Stage:
    """A complete stage, as its done.json has it."""

    name: str
    directory: Path
    location: Path  # of the record's files
    digest: str
    key_parts: list[Any]
    values: dict[str, Any]
    order: tuple[int, float, str]  # newer ones later

    @property
    def parts(self) -> list[str]:
        """Digests among the parts of the key, in their order; of samples that are kept in part, as they were drawn."""
        plain = [
            part.get("samples") if isinstance(part, dict) and "labels" in part else part for part in self.key_parts
        ]
        return [part for part in plain if isinstance(part, str)]

    @property
    def made_from(self) -> set[str]:
        return set(self.parts)


def rebuild(run: Path) -> RebuildResult:
    """Write report.html into a run folder, from what its stages have recorded.

    It speaks of the release that the folder's link names; of a folder without one, of the stages that came furthest,
    the newest of them, and says what is missing. The same records give the same bytes.

    Raises:
        UsageError: It is no run folder, or not even reading is done, or was done by another version of synthaug.
        OSError: The report cannot be written.
    """
    from synthaug.formats.manifest import REPORT_FILE
    from synthaug.report.checkpoint_words import earlier_state
    from synthaug.report.page import training_log, write_page
    from synthaug.report.page_facts import PageFacts
    from synthaug.report.page_pictures import PagePictures, page_pictures

    run = Path(run)
    stages = _read_stages(run)
    chosen = _chosen(run, stages)
    missing: list[str] = []

    def record(name: str, record_class: type[R]) -> R | None:
        found = [item for item in chosen if item.name == name]
        if not found and name in _ABSENT:
            missing.append(_ABSENT[name])
        return _load(found[-1], record_class, missing) if found else None

    source = record("read", Source)
    if source is None:
        raise UsageError(
            f"{run} has nothing to report: {' '.join(missing) or 'no dataset has been read.'} "
            "Run 'synthaug run CONFIG' with this output; what is complete is reused."
        )
    splits, plan = record("split", Splits), record("plan", BalancePlan)
    checkpoint, judge = record("train", Checkpoint), record("judge", Judge)
    membership = record("membership", Membership)
    drawn = [_load(item, SampleBatch, missing) for item in chosen if item.name == "sample"]
    if not drawn:
        missing.append(_ABSENT["sample"])
    kept = _kept(chosen)
    batches = [batch.only(kept.get(batch.digest, _all(batch))) for batch in drawn if batch is not None]
    report = record("audit", AuditReport) if len(batches) == len(drawn) else None
    verdict = record("evaluate", Verdict)
    released = record("release", Release)
    uses = _uses(chosen, source, batches, report, missing)
    learned_earlier = "" if checkpoint is None or splits is None else earlier_state(checkpoint, splits)
    pictures = PagePictures()
    if splits is not None:
        try:
            pictures = page_pictures(source, splits, batches, report, internal=True, include_real=True)
        except Exception as error:  # damaged and cleared-away files fail in every way that there is
            words = printable(" ".join(str(error).split()), 200) or type(error).__name__
            missing.append(f"The images of the stages cannot be read, so none are shown ({words}).")
    config = _config(chosen)
    settings, dataset = config.get("release", {}), config.get("dataset", {})
    path = write_page(
        PageFacts(
            title=settings.get("title") or config.get("name") or run.resolve().name,
            internal=True,
            include_real=True,
            source=source,
            splits=splits,
            plan=plan,
            checkpoint=checkpoint,
            judge=judge,
            batches=batches,
            report=report,
            verdict=verdict,
            membership=membership,
            uses=uses,
            learned_earlier=learned_earlier,
            pictures=pictures,
            training_log=training_log(checkpoint) if checkpoint is not None else (),
            costs=_costs(_of_this_job(chosen, batches, checkpoint), stages, checkpoint, batches),
            missing=missing,
            released=released is not None,
            licence=dataset.get("licence") or source.licence,
            citation=dataset.get("citation") or source.citation,
            manifest_digest=None if released is None else released.manifest_digest,
        ),
        run / REPORT_FILE,
    )
    for line in missing:
        logger.warning("report: %s", line)
    return RebuildResult(run=run, report=path, missing=tuple(missing))


def _read_stages(run: Path) -> list[_Stage]:
    """All complete stages; what is half done or cannot be read at all is passed over."""
    if not (run / "stages").is_dir():
        inner = sorted(str(stages.parent) for stages in run.glob("*/stages") if stages.is_dir())
        outer = [str(place) for place in run.resolve().parents[:2] if (place / "stages").is_dir()]
        near = f" Did you mean {' '.join((inner or outer)[:5])}?" if inner or outer else ""
        what = "is not a run folder: it has no 'stages'" if run.is_dir() else "is not there"
        raise UsageError(f"{run} {what}. Name the 'output' of a job.{near}")
    found = []
    for folder in sorted((run / "stages").iterdir()):
        name = folder.name.rpartition("-")[0]
        path = folder / DONE_FILE
        if name not in _RECORDS or not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            key_parts = list(values["key_parts"])
            location = Path(os.path.normpath(folder / values["location"]))
            digest, version = str(values["record"]["digest"]), int(key_parts[1])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            logger.warning("report: %s cannot be read and is passed over", path)
            continue
        order = (version, path.stat().st_mtime, folder.name)
        found.append(_Stage(name, folder, location, digest, key_parts, values, order))
    return sorted(found, key=lambda item: item.order)


def _chosen(run: Path, stages: list[_Stage]) -> list[_Stage]:
    """The stages of one job, rounds in their order: all that its furthest stage was made from, directly or not."""
    # Images of another tool are judged beside the job, and are not a part of it.
    foreign = {item.digest for item in stages if item.name == "read" and "foreign" in item.key_parts}
    ours = [
        item
        for item in stages
        if item.digest not in foreign
        and not item.made_from & foreign
        and (item.name not in ("audit", "evaluate") or _of_ours(item, stages))
    ]
    by_digest = {(item.name, item.digest): item for item in ours}  # the newest of equal ones
    head = _head(run, ours)
    if head is None:
        return []
    digests, known = {head.digest}, {item.digest for item in ours}
    chosen = {(head.name, head.digest): head}
    grown = True
    while grown:
        parts = {part for item in chosen.values() for part in item.parts}
        more = {key: item for key, item in by_digest.items() if key[1] in parts and key not in chosen}
        # A release and its publication share a digest; nothing is made from either.
        more = {key: item for key, item in more.items() if key[0] != "release"}
        chosen |= more
        digests |= {item.digest for item in more.values()}
        grown = bool(more)
        if not grown and head.name != "release":
            # What stands beside the furthest stage: made from nothing but what was chosen.
            for name in _RECORDS:
                beside = [item for item in ours if item.name == name and item.made_from & known <= digests]
                if name not in {key[0] for key in chosen} and name not in ("release", "read") and beside:
                    chosen[(name, beside[-1].digest)] = beside[-1]
                    digests.add(beside[-1].digest)
                    grown = True
                    break
    order = list(_RECORDS)
    places = list(head.parts)
    # Rounds stand in the key in the order in which the audit was given them.
    audits = [item for item in chosen.values() if item.name == "audit"]
    places += [part for item in audits for part in item.parts]

    def place(item: _Stage) -> tuple[int, int, tuple[int, float, str]]:
        return order.index(item.name), places.index(item.digest) if item.digest in places else -1, item.order

    return sorted(chosen.values(), key=place)


def _of_ours(item: _Stage, stages: list[_Stage]) -> bool:
    """Is it of samples of the job's own generator? Their key names its checkpoint."""
    return bool(item.made_from & {stage.digest for stage in stages if stage.name == "train"})


def _head(run: Path, stages: list[_Stage]) -> _Stage | None:
    """The stage that the report is of: the release that the link names, or else the newest of those furthest on."""
    release = (run / "release").resolve()
    for item in reversed(stages):
        if item.name == "release" and item.location.resolve() == release:
            return item
    for name in reversed([name for name in _RECORDS if name != "release"]):
        found = [item for item in stages if item.name == name]
        if found:
            return max(found, key=lambda item: item.order)
    return None


def _load(item: _Stage, record_class: type[R], missing: list[str]) -> R | None:
    try:
        record: R = record_class.from_plain(item.values["record"], item.location)
    except (ValidationError, TypeError):
        missing.append(
            f"What stage '{item.name}' recorded (stages/{item.directory.name}) was written by another version of "
            "synthaug and cannot be read: run 'synthaug run CONFIG' again, which makes it again."
        )
        return None
    return record


def _kept(chosen: list[_Stage]) -> dict[str, dict[int, int]]:
    """Digest of samples as they were drawn to the labels that are kept of them, where the audit was given a part."""
    found = {}
    for item in chosen:
        for part in item.key_parts if item.name == "audit" else ():
            if isinstance(part, dict) and "samples" in part and "labels" in part:
                found[str(part["samples"])] = {int(label): int(now) for label, now in dict(part["labels"]).items()}
    return found


def _of_this_job(chosen: list[_Stage], batches: list[SampleBatch], checkpoint: Checkpoint | None) -> list[_Stage]:
    """Without the rounds of earlier jobs: what was kept of them cost this one nothing."""
    if checkpoint is None:
        return chosen
    earlier = {batch.directory for batch in batches if batch.checkpoint_digest != checkpoint.digest}
    return [item for item in chosen if item.name != "sample" or item.location not in earlier]


def _all(batch: SampleBatch) -> dict[int, int]:
    return {label: label for label in batch.counts}


def _uses(
    chosen: list[_Stage], source: Source, batches: list[SampleBatch], report: AuditReport | None, missing: list[str]
) -> tuple[CheckpointUse, ...]:
    """Which checkpoint made what, where the samples are of several."""
    from synthaug.report.checkpoint_words import checkpoint_uses

    drawn_from = {batch.checkpoint_digest for batch in batches}
    trained = [item for item in chosen if item.name == "train" and item.digest in drawn_from]
    checkpoints = [item for item in (_load(stage, Checkpoint, missing) for stage in trained) if item is not None]
    if len(checkpoints) < 2:
        return ()
    attacks = [_attack(chosen, checkpoint) for checkpoint in checkpoints]
    known = [item for item in (_load(stage, Membership, missing) for stage in attacks if stage) if item is not None]
    try:
        return checkpoint_uses(source, checkpoints, batches, report, known)
    except Exception as error:  # damaged and cleared-away files fail in every way that there is
        words = printable(" ".join(str(error).split()), 200) or type(error).__name__
        missing.append(f"The table of the audit cannot be read, so the checkpoints are not told apart ({words}).")
        return ()


def _attack(chosen: list[_Stage], checkpoint: Checkpoint) -> _Stage | None:
    return next((item for item in chosen if item.name == "membership" and checkpoint.digest in item.made_from), None)


def _config(chosen: list[_Stage]) -> dict[str, Any]:
    """The configuration that a release was made with, as its key has it; empty without a release."""
    for item in chosen:
        for part in item.key_parts if item.name == "release" else ():
            if isinstance(part, dict) and "dataset" in part and "release" in part:
                return part
    return {}


def _costs(
    chosen: list[_Stage], stages: list[_Stage], checkpoint: Checkpoint | None, batches: list[SampleBatch]
) -> list[Cost]:
    """Seconds of each stage that the job went through, the audits of earlier rounds among them."""
    from synthaug.report.page_facts import Cost

    digests = {item.digest for item in chosen}
    known = {item.digest for item in stages}
    rounds = {item.digest for item in chosen if item.name == "sample"}
    inner = [
        item
        for item in stages
        if item.name == "audit" and item.made_from & rounds and item.made_from & known <= digests
    ]
    newest = {str(item.values.get("title", item.name)): item for item in (*inner, *chosen)}
    drawn = {batch.digest: batch for batch in batches}
    costs = []
    for name in ("read", "split", "plan", "train", "judge", "membership", "rounds", "evaluate", "release"):
        names = ("sample", "audit") if name == "rounds" else (name,)
        mine = [(title, item) for title, item in newest.items() if item.name in names]
        mine.sort(key=lambda pair: (len(pair[1].made_from & rounds) or _round(pair[0]), pair[1].name != "sample"))
        for title, item in mine:
            n_images, rate = None, None
            seconds = float(item.values.get("seconds", 0))
            if checkpoint is not None and item.name == "train":
                n_images, rate = checkpoint.images_seen, checkpoint.images_per_second
            elif (batch := drawn.get(item.digest)) is not None and item.name == "sample":
                n_images = batch.n_samples
                rate = batch.n_samples / batch.seconds if batch.seconds else None
            costs.append(Cost(title, seconds, n_images, rate))
    return costs


def _round(title: str) -> int:
    last = title.rpartition(" ")[2]
    return int(last) if last.isdecimal() else 0
