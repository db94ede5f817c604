"""Release: what was read and what was accepted, as a dataset that `load_dataset` opens, with its manifest."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import synthaug
from synthaug.config import Config
from synthaug.digest import digest_file, digest_json
from synthaug.errors import LeakError, ReleaseError
from synthaug.formats.samples import read_samples
from synthaug.progress import Bar, progress
from synthaug.records import (
    AUDIT_FILE,
    IMAGES_FILE,
    INDEX_FILE,
    SPLITS,
    SPLITS_FILE,
    VERDICT_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    Judge,
    Membership,
    Release,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)

if TYPE_CHECKING:
    import pandas as pd

    from synthaug.formats.append import OlderRelease
    from synthaug.formats.provenance import StoredFile
    from synthaug.formats.shards import StoredRow
    from synthaug.report.card import SplitOnDisk

logger = logging.getLogger(__name__)

_AUDIT_COLUMNS = [
    # nearest_id is not among them: a release never says which real image a sample is nearest to.
    "sample_id",
    "batch",
    "row",
    "label",
    "class_index",
    "accepted",
    "rank",
    "probability",
    "predicted",
    "distance",
    "distance_ratio",
]


@dataclass(frozen=True)
class _RealRows:
    rows: np.ndarray  # int64 [n], in images.npy of the source
    labels: np.ndarray  # int64 [n]
    image_ids: list[str]


def release(
    config: Config,
    source: Source,
    splits: Splits,
    plan: BalancePlan,
    checkpoints: Sequence[Checkpoint],
    judge: Judge,
    batches: Sequence[SampleBatch],
    report: AuditReport,
    verdict: Verdict | None,
    directory: Path,
    *,
    memberships: Sequence[Membership] = (),
    previous: Path | None = None,
) -> Release:
    """Write a release into `directory`, which exists and is empty; nothing outside of it is touched.

    Training holds the real training images, then of each class the accepted samples of rank 0 up to what the plan
    asks for. Validation and test hold real images only. `release.include_real: false` leaves the samples alone.
    Nothing written depends on when or where: equal inputs give equal files, and `previous` is one of them: a release
    whose shards are taken over where every row of them stands unchanged in the new one (`formats.append`). It decides
    which shard a row is in, and nothing else. Where it is damaged, it is passed over with a warning.

    Args:
        checkpoints: All whose samples are in the batches, oldest first, at least one. Every manifest row names its own;
            the last is the one that this job trained, or found to be enough.
        memberships: The attack on each of them, in their order; empty: nobody asked.

    Raises:
        ReleaseError: The stages do not agree with each other, or there is nothing to release.
        LeakError: A synthetic image of the source was to be released as a real one.
        OSError: It cannot be written (the disk is full, say).
    """
    from synthaug.formats import manifest as files
    from synthaug.formats import shards
    from synthaug.formats.append import open_older
    from synthaug.formats.provenance import PROVENANCE_FILE, ProvenanceFacts, provenance
    from synthaug.report.card import CardFacts, render_card
    from synthaug.report.checkpoint_words import checkpoint_uses, earlier_state, learned
    from synthaug.report.contact_sheet import write_contact_sheet
    from synthaug.report.page import training_log, write_page
    from synthaug.report.page_facts import PageFacts
    from synthaug.report.page_pictures import page_pictures

    settings = config.release
    # The contact sheet and the card show the name.
    source = source.model_copy(update={"name": _without_path(source.name, config)})
    real = _real_rows(source, splits) if settings.include_real else {}
    own = _own_checkpoints(checkpoints, batches)
    checkpoint = checkpoints[-1]
    accepted = _accepted(plan, batches, report)
    if not settings.include_real and accepted.empty:
        raise ReleaseError(
            "there is nothing to release: release.include_real is false, and no synthetic image was asked for or "
            "passed the audit. Set release.include_real to true, or look at the audit's reasons."
        )
    config_values = files.public_config(config)
    config_digest = digest_json(config_values)
    total = len(accepted) + sum(len(item.rows) for item in real.values())
    with progress("release", total, "images") as bar:
        older = open_older(previous, source.pixels, source.classes)
        writing = _Writing(config, source, own, batches, config_digest, directory, bar, older)
        names = SPLITS if settings.include_real else SPLITS[:1]
        on_disk = [
            writing.write(split, real.get(split), accepted if split == "train" else accepted[:0]) for split in names
        ]
    if older is not None:
        older.tell()
    if settings.dicom is not None:
        _write_dicom(config, source, batches, accepted, directory)
    (directory / files.CONFIG_FILE).write_text(files.canonical_json(config_values), encoding="utf-8")
    write_contact_sheet(
        source, splits, batches, report, directory / files.CONTACT_SHEET_FILE, include_real=settings.include_real
    )
    uses = checkpoint_uses(source, checkpoints, batches, report, memberships)
    learned_earlier = earlier_state(checkpoint, splits)
    known = {item.digest: found for item in checkpoints if (found := learned(item, splits)) is not None}
    pictures = _copy_verdict(verdict, directory)
    manifest_digest = digest_file(directory / files.MANIFEST_FILE)
    made = on_disk[0].n_synthetic
    n_short = {item.label: item.n_synthetic - made[item.label] for item in plan.classes}
    card = render_card(
        CardFacts(
            title=settings.title or config.name,
            source=source,
            splits=splits,
            plan=plan,
            checkpoint=checkpoint,
            judge=judge,
            batches=batches,
            report=report,
            # A split without rows has no shard, and `datasets` has no way to say that it is empty.
            on_disk=tuple(split for split in on_disk if split.n_rows or split.name == "train"),
            features=shards.features_as_yaml(source.pixels, source.classes),
            png=shards.stored_as_png(source.pixels),
            include_real=settings.include_real,
            n_short=n_short,
            licence=config.dataset.licence or source.licence,
            citation=config.dataset.citation or source.citation,
            config_digest=config_digest,
            manifest_digest=manifest_digest,
            version=synthaug.__version__,
            verdict=verdict,
            verdict_pictures=pictures,
            source_dataset=config.dataset.path if config.dataset.format == "hub" else None,
            membership=memberships[-1] if memberships else None,
            uses=uses,
            learned_earlier=learned_earlier,
        )
    )
    (directory / files.CARD_FILE).write_text(card, encoding="utf-8")
    write_page(
        PageFacts(
            title=settings.title or config.name,
            internal=False,
            include_real=settings.include_real,
            source=source,
            splits=splits,
            plan=plan,
            checkpoint=checkpoint,
            judge=judge,
            batches=batches,
            report=report,
            verdict=verdict,
            membership=memberships[-1] if memberships else None,
            uses=uses,
            learned_earlier=learned_earlier,
            pictures=page_pictures(source, splits, batches, report, internal=False, include_real=settings.include_real),
            training_log=training_log(checkpoint),
            licence=config.dataset.licence or source.licence,
            citation=config.dataset.citation or source.citation,
            config_digest=config_digest,
            manifest_digest=manifest_digest,
            version=synthaug.__version__,
        ),
        directory / files.REPORT_FILE,
    )
    graph = provenance(
        ProvenanceFacts(
            name=config.name,
            version=synthaug.__version__,
            seed=config.seed,
            source=source,
            licence=config.dataset.licence or source.licence,
            splits=splits,
            checkpoints=checkpoints,
            n_trained_on={digest: item.n_train for digest, item in known.items()},
            learned_from_these={digest for digest, item in known.items() if item.is_current},
            base=None if config.train.base is None else (config_values["train"]["base"], config.train.base_revision),
            judge=judge,
            batches=batches,
            report=report,
            verdict=verdict,
            config_digest=config_digest,
            manifest_digest=manifest_digest,
            files=[_stored_file(directory, file, writing.held) for file in _all_files(directory)],
        )
    )
    (directory / PROVENANCE_FILE).write_text(files.canonical_json(graph), encoding="utf-8")
    digest = files.write_release_file(
        directory,
        {
            "format": files.FORMAT,
            "name": config.name,
            "synthaug_version": synthaug.__version__,
            "classes": list(source.classes),
            "pixels": source.pixels.model_dump(mode="json"),
            "include_real": settings.include_real,
            "splits": {
                split.name: {
                    "n_rows": split.n_rows,
                    "n_real": list(split.n_real),
                    "n_synthetic": list(split.n_synthetic),
                    "shards": list(split.shards),
                }
                for split in on_disk
            },
            **_stated_checkpoints(checkpoints, batches),
            "config_digest": config_digest,
            "manifest_digest": manifest_digest,
            "files": {
                file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": digest_file(file)}
                for file in _all_files(directory)
            },
        },
    )
    logger.info("release: %d synthetic of %d images, digest %s", sum(made), total, digest[:12])
    return Release(
        directory=directory,
        digest=digest,
        n_real={item.name: item.n_real for item in plan.classes},
        n_synthetic={item.name: made[item.label] for item in plan.classes},
        n_short={item.name: n_short[item.label] for item in plan.classes if n_short[item.label]},
        manifest_digest=manifest_digest,
    )


def _all_files(directory: Path) -> list[Path]:
    return [file for file in sorted(directory.rglob("*")) if file.is_file()]


def _stored_file(directory: Path, file: Path, held: dict[str, Counter[int | None]]) -> StoredFile:
    from synthaug.formats.provenance import StoredFile

    name = file.relative_to(directory).as_posix()
    counts = held.get(name)
    return StoredFile(
        name=name,
        size=file.stat().st_size,
        sha256=digest_file(file),
        n_real=None if counts is None else counts[None],
        from_batches=None if counts is None else {batch: n for batch, n in counts.items() if batch is not None},
    )


def _write_dicom(
    config: Config,
    source: Source,
    batches: Sequence[SampleBatch],
    accepted: pd.DataFrame,
    directory: Path,
) -> None:
    """Write the synthetic images once more, as DICOM files."""
    from synthaug.formats.dicom_out import DicomSample, check_dicom, write_dicom
    from synthaug.formats.shards import StoredImages

    assert config.release.dicom is not None
    check_dicom(config.release.dicom, source.pixels)
    with ExitStack() as stack:
        drawn = [stack.enter_context(StoredImages(batch.directory / IMAGES_FILE)) for batch in batches]
        # A class has its own number in each checkpoint.
        drawn_as = [{now: label for label, now in (batch.labels or {}).items()} for batch in batches]
        samples = (
            DicomSample(
                image=drawn[item.batch][item.row],
                sample_id=item.sample_id,
                label=item.label,
                checkpoint_digest=batches[item.batch].checkpoint_digest,
                drawn_label=drawn_as[item.batch].get(item.label, item.label),
                class_index=int(item.class_index),
                version=_drawn_by(batches[item.batch]),
            )
            for item in accepted.itertuples(index=False)
        )
        write_dicom(config.release.dicom, source.pixels, source.classes, config.name, samples, directory)


def _copy_verdict(verdict: Verdict | None, directory: Path) -> tuple[str, ...]:
    """Let the release carry its verdict; returns the names of the pictures."""
    if verdict is None:
        return ()
    pictures = sorted(verdict.directory.glob("verdict_*.png"))
    for path in [verdict.directory / VERDICT_FILE, *pictures]:
        shutil.copyfile(path, directory / path.name)
    return tuple(path.name for path in pictures)


def _real_rows(source: Source, splits: Splits) -> dict[str, _RealRows]:
    """Usable real images per split, in order of the source."""
    import pandas as pd

    table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["row", "image_id", "label", "split", "held_back"])
    index = pd.read_parquet(source.directory / INDEX_FILE, columns=["row", "is_synthetic"])
    table = (
        table[table["held_back"].isna()].merge(index, on="row", how="left", validate="one_to_one").sort_values("row")
    )
    if len(unmarked := table[table["is_synthetic"].isna()]):
        raise ReleaseError(f"the split names row {unmarked['row'].iloc[0]}, which the source has not. Make it again.")
    if len(leaked := table[table["is_synthetic"].astype(bool)]):
        raise LeakError(
            f"{len(leaked)} images of the source are marked is_synthetic and were to be released as real ones (first: "
            f"{leaked['image_id'].iloc[0]}). The split must hold them back."
        )
    parts = {split: table[table["split"] == split] for split in SPLITS}
    return {
        split: _RealRows(part["row"].to_numpy(np.int64), part["label"].to_numpy(np.int64), part["image_id"].tolist())
        for split, part in parts.items()
    }


def _own_checkpoints(checkpoints: Sequence[Checkpoint], batches: Sequence[SampleBatch]) -> list[Checkpoint]:
    """The checkpoint of each batch."""
    if not checkpoints:
        raise ReleaseError("a release needs the checkpoint that its samples were drawn from: another tool's have none.")
    known = {checkpoint.digest: checkpoint for checkpoint in checkpoints}
    if strange := [batch for batch in batches if batch.checkpoint_digest not in known]:
        raise ReleaseError(
            f"samples in {strange[0].directory} were drawn from checkpoint {strange[0].checkpoint_digest[:12]}, but "
            f"the release is of checkpoint {', '.join(digest[:12] for digest in known)}. Draw them again."
        )
    return [known[batch.checkpoint_digest] for batch in batches]


def _stated_checkpoints(checkpoints: Sequence[Checkpoint], batches: Sequence[SampleBatch]) -> dict[str, Any]:
    """What release.json says of the checkpoints; see `formats.manifest.stated_checkpoints` and `generator_label`."""
    stated: dict[str, Any] = {"checkpoint_digest": checkpoints[-1].digest}
    if len(checkpoints) > 1:
        stated["checkpoint_digests"] = [checkpoint.digest for checkpoint in checkpoints]
    labels: dict[str, dict[str, int]] = {}
    for batch in batches:
        own = batch.labels if batch.labels is not None else {label: label for label in batch.counts}
        labels.setdefault(batch.checkpoint_digest, {}).update({str(label): now for label, now in own.items()})
    moved = {digest: own for digest, own in labels.items() if any(int(label) != now for label, now in own.items())}
    return {**stated, "generator_labels": moved} if moved else stated


def _accepted(plan: BalancePlan, batches: Sequence[SampleBatch], report: AuditReport) -> pd.DataFrame:
    """The samples to release, in order of class and rank, with where each was drawn."""
    import pandas as pd

    wanted = {item.label: item.n_synthetic for item in plan.classes}
    withheld = {audit.label for audit in report.classes if audit.withheld is not None}
    audit = pd.read_parquet(report.directory / AUDIT_FILE, columns=_AUDIT_COLUMNS)
    most = audit["label"].map(wanted).fillna(0)
    audit = audit[audit["accepted"] & (audit["rank"] >= 0) & (audit["rank"] < most) & ~audit["label"].isin(withheld)]
    audit = audit.sort_values(["label", "rank"], kind="stable", ignore_index=True)
    for label, ranks in audit.groupby("label")["rank"]:
        if ranks.tolist() != list(range(len(ranks))):
            raise ReleaseError(f"the ranks of label {label} in the audit are not 0, 1, 2 …: make the audit again.")
    columns = ["row", "sample_id", "label", "class_index", "seed", "micro_batch", "position"]
    parts = []
    for number, part in audit.groupby("batch"):
        if not 0 <= int(number) < len(batches):
            raise ReleaseError(f"the audit speaks of batch {number}, but {len(batches)} batches were given.")
        batch = batches[int(number)]
        drawn = read_samples(batch, columns)
        found = part.reset_index().merge(drawn, on=columns[:4], how="inner", validate="one_to_one").set_index("index")
        if len(found) != len(part):
            raise ReleaseError(
                f"{len(part) - len(found)} accepted samples are not in {batch.directory} as the audit has "
                "them. Make the samples and the audit again."
            )
        parts.append(found)
    if not parts:
        return audit.assign(seed=pd.Series(dtype="int64"), micro_batch=0, position=0)
    accepted: pd.DataFrame = pd.concat(parts).sort_index()
    if accepted["sample_id"].duplicated().any():
        raise ReleaseError("a sample id occurs twice among the accepted samples. Make the samples again.")
    return accepted


@dataclass(frozen=True)
class _Writing:
    """What the splits of one release have in common while they are written."""

    config: Config
    source: Source
    checkpoints: Sequence[Checkpoint]  # of each batch
    batches: Sequence[SampleBatch]
    config_digest: str
    directory: Path
    bar: Bar
    older: OlderRelease | None
    # What each shard holds: rows by number of their batch, None for real images.
    held: dict[str, Counter[int | None]] = field(default_factory=dict)

    def write(self, split: str, real: _RealRows | None, synthetic: pd.DataFrame) -> SplitOnDisk:
        """Write the shards of a split, and for the training split the manifest as its samples are stored."""
        from synthaug.formats.append import SplitRows, shards_of
        from synthaug.formats.manifest import ManifestWriter
        from synthaug.formats.shards import ShardRow, ShardWriter, StoredImages
        from synthaug.report.card import SplitOnDisk

        source, classes = self.source, self.source.classes
        writer = ShardWriter(self.directory, source.pixels, classes)
        n_real = 0 if real is None else len(real.rows)
        constants = [
            _constants(batch, checkpoint, self.config, self.config_digest)
            for batch, checkpoint in zip(self.batches, self.checkpoints, strict=True)
        ]
        most = self.config.release.images_per_shard
        with ExitStack() as stack:
            originals = stack.enter_context(StoredImages(source.directory / IMAGES_FILE)) if n_real else None
            drawn = [stack.enter_context(StoredImages(batch.directory / IMAGES_FILE)) for batch in self.batches]
            places = synthetic[["batch", "row"]].to_numpy(np.int64)

            def image(position: int) -> np.ndarray:
                if position < n_real and real is not None and originals is not None:
                    return originals[int(real.rows[position])]
                batch, row = places[position - n_real]
                return drawn[batch][int(row)]

            rows = SplitRows(
                ids=[*(() if real is None else real.image_ids), *synthetic["sample_id"]],
                labels=np.concatenate([_labels_of(real), synthetic["label"].to_numpy(np.int64)]),
                synthetic=np.arange(n_real + len(synthetic)) >= n_real,
                image=image,
            )

            def row(position: int) -> ShardRow:
                made, name = bool(rows.synthetic[position]), rows.ids[position]
                names = (name, None) if made else (None, name)
                return ShardRow(image(position), int(rows.labels[position]), *names)

            if self.older is None:
                shards = shards_of(split, rows, most)
            else:
                shards = self.older.take_over(split, rows, self.directory, most)
            manifest = stack.enter_context(ManifestWriter(self.directory)) if split == "train" else None
            for shard in shards:
                made = shard.positions[rows.synthetic[shard.positions]] - n_real
                samples = synthetic.iloc[made].itertuples(index=False)
                held = self.held.setdefault(shard.name, Counter())
                stored_rows = writer.write(shard.name, map(row, shard.positions)) if shard.is_new else shard.stored()
                for position, stored in zip(shard.positions, stored_rows, strict=True):
                    self.bar.update(1)
                    if manifest is None or not rows.synthetic[position]:
                        held[None] += 1
                    else:
                        item = next(samples)
                        held[int(item.batch)] += 1
                        manifest.add(
                            {**constants[item.batch], **_manifest_row(item, stored), "class_name": classes[item.label]}
                        )
        names = tuple(shard.name for shard in shards)
        return SplitOnDisk(
            name=split,
            shards=names,
            n_real=_per_label(_labels_of(real), len(classes)),
            n_synthetic=_per_label(synthetic["label"].to_numpy(np.int64), len(classes)),
            n_bytes=writer.n_bytes + sum(shard.n_bytes for shard in shards),
            n_bytes_on_disk=sum((self.directory / name).stat().st_size for name in names),
        )


def _labels_of(real: _RealRows | None) -> np.ndarray:
    return np.empty(0, np.int64) if real is None else real.labels


def _manifest_row(item: Any, stored: StoredRow) -> dict[str, Any]:
    """The columns of the manifest that are a sample's own; `item` is a row of what `_accepted` returns."""
    return {
        "sample_id": item.sample_id,
        "content_hash": stored.content_hash,
        "pixel_hash": stored.pixel_hash,
        "shard": stored.shard,
        "row": stored.row,
        "label": item.label,
        "class_index": item.class_index,
        "rank": item.rank,
        "seed": item.seed,
        "micro_batch": item.micro_batch,
        "position": item.position,
        "probability": _or_none(item.probability),
        "predicted": _or_none(item.predicted),
        "distance": _or_none(item.distance),
        "distance_ratio": _or_none(item.distance_ratio),
    }


def _or_none(score: Any) -> Any:
    """A score, or None where the audit has none (pandas spells that as a value unlike itself)."""
    return score if score == score else None


def _drawn_by(batch: SampleBatch) -> str:
    """The version of synthaug that drew a batch; this one where the batch is of before it was recorded."""
    return batch.environment.get("synthaug", synthaug.__version__)


def _constants(batch: SampleBatch, checkpoint: Checkpoint, config: Config, config_digest: str) -> dict[str, Any]:
    """The columns of the manifest that all samples of a batch share."""
    return {
        "job_seed": config.seed if batch.job_seed is None else batch.job_seed,
        "checkpoint_digest": batch.checkpoint_digest,
        "generator": checkpoint.generator,
        "solver": batch.solver,
        "steps": batch.steps,
        "guidance": batch.guidance,
        "micro_batch_size": batch.micro_batch,
        "threads": batch.threads,
        "device": batch.device,
        "config_digest": config_digest,
        "synthaug_version": _drawn_by(batch),
        "torch_version": batch.environment["torch"],
        "diffusers_version": batch.environment["diffusers"],
        "numpy_version": batch.environment["numpy"],
        "cpu_capability": batch.environment["cpu_capability"],
    }


def _per_label(labels: np.ndarray, n_classes: int) -> tuple[int, ...]:
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ReleaseError(f"a label lies outside 0 to {n_classes - 1}. Read the source again.")
    return tuple(int(n) for n in np.bincount(labels, minlength=n_classes))


def _without_path(name: str, config: Config) -> str:
    """The source's name with a local path reduced to its last part."""
    path = config.dataset.path
    if path is None or config.dataset.format == "hub":
        return name
    short = Path(path).name
    return name.replace(str(Path(path).resolve()), short).replace(path, short)
