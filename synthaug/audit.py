"""Stage: say of every sample whether it may be released, and if not, why not."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from synthaug.config import AuditConfig, Config
from synthaug.digest import digest_array, digest_file, digest_json
from synthaug.errors import SynthaugError
from synthaug.formats.reserved_array import reserved_array
from synthaug.formats.samples import read_samples
from synthaug.progress import progress
from synthaug.records import (
    AUDIT_FILE,
    IMAGES_FILE,
    SEEN_FILE,
    WORK_DIR,
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    ClassPlan,
    CopyRates,
    Judge,
    PixelSpec,
    SampleBatch,
    Source,
    Splits,
)
from synthaug.scale import (
    SHARDS_DIR,
    MapShards,
    Shard,
    ShardDone,
    Tick,
    check_stopped,
    computes_with,
    do_shard,
    do_shards,
    forgetting,
    kept,
    one_by_one,
)
from synthaug.text import printable

if TYPE_CHECKING:
    from synthaug.quality.coverage import Coverage
    from synthaug.quality.reference import Reference

logger = logging.getLogger(__name__)

BROKEN = "not finite or constant image"
DUPLICATE = "duplicate of a sample"
COPY = "copy of a training image"
NEAR_COPY = "near-copy of a training image"
OTHER_CLASS = "judged another class"
# In the order they are looked for: a sample carries the first that fits.
REASONS = (BROKEN, DUPLICATE, COPY, NEAR_COPY, OTHER_CLASS)

UNKNOWN_ORIGIN = (
    "how these images were made is not known: whether their generator saw validation or test images cannot be checked"
)

# A class that loses more than this share of its samples is reported aloud.
_MUCH_REJECTED = 0.5
# So is one whose relative coverage changes by more than this through the filter.
_MUCH_NARROWED = 0.15
_SCORES = ["probability", "predicted_probability", "distance", "distance_ratio", "feature_distance"]
# A sample that is so much nearer to one training image than to the next repeats it, say Yoon et al. (2023),
# "Diffusion probabilistic models generalize when they fail to memorize".
_LOW_RATIO = 1 / 3
# Samples of a class are many and lie nearer to each other than to the few real images by which the near-copy distance
# was found: only what is within this share of it is a duplicate. Of 70 real images of the digit 1, whose class has
# 10 training images, 21 would be duplicates of each other by the whole distance.
_DUPLICATE_SHARE = 0.5
# Coverage is measured on this many real images and samples of a class at most, which bounds memory and time; its
# expectation is for the numbers used.
_MOST_COVERED = 10_000
# Files of a shard; scores.parquet has a row a sample: what it is known by, and `_SCORES`.
PICTURES_FILE, DEPTHS_FILE, SCORES_FILE = "pictures.npy", "depths.npy", "scores.parquet"
_SCRATCH = ".scratch-"


@dataclass
class _Candidates:
    """All samples of all batches: one row of scores each; the wide arrays lie on disk."""

    table: pd.DataFrame
    pictures: np.ndarray  # [n, side, side] uint16, memory-mapped
    depths: np.ndarray  # [n, f] float32, memory-mapped


@forgetting()
def audit(
    config: Config,
    source: Source,
    splits: Splits,
    plan: BalancePlan,
    checkpoints: Sequence[Checkpoint],
    judge: Judge,
    batches: Sequence[SampleBatch],
    directory: Path,
    *,
    map_shards: MapShards = one_by_one,
) -> AuditReport:
    """Judge every sample of every batch; write audit.parquet.

    A sample is rejected for the first of `REASONS` that fits it. What is said of a sample depends on itself and on
    samples before it alone, so that later rounds never change the rank of an earlier one. Images are looked at
    in shards, by `map_shards`; an interrupted call goes on with those that `directory`/work does not hold. Wide scores
    wait in a scratch file, so memory does not grow with the number of samples but for a few numbers each.

    Args:
        checkpoints: All that the samples were drawn from, oldest first; each must have kept clear of the images that
            judge it. None at all: the samples are another tool's. What its generator saw is not known, which the
            report says, and what was offered takes the place of what the plan asks for.

    Raises:
        LeakError: The generator was trained on images that judge it, or a test image was used.
        UsageError: A worker does not see the files of the run.
    """
    from synthaug.quality.arithmetic import torch_threads
    from synthaug.quality.reference import refuse_leaks

    reference = _reference(judge.directory, judge.digest, config.train.threads)
    if not checkpoints:
        refuse_leaks(splits, None, reference)
    for checkpoint in checkpoints:
        seen_file = checkpoint.directory / SEEN_FILE
        refuse_leaks(splits, pd.read_parquet(seen_file), reference, str(seen_file))
    # What a call that was killed has left.
    for left in directory.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=directory) as scratch, torch_threads(config.train.threads):
        candidates = _score(config, source, batches, judge, reference, directory, Path(scratch), map_shards)
        table = candidates.table
        _look_for_copies(table, source, reference, judge)
        duplicates = _duplicates(candidates, source, reference, judge, config.train.threads)
        table["reason"] = _reasons(table, duplicates, config.audit)
        table["accepted"] = table["reason"].isna()
        table["rank"] = _ranks(table)
        notes = [] if checkpoints else [UNKNOWN_ORIGIN]
        notes += [judge.near_copy_note] if judge.near_copy_threshold is None else []
        classes = tuple(
            _audit_class(item, candidates, reference, judge, config.audit, notes, ours=bool(checkpoints))
            for item in plan.classes
        )
        candidates.pictures = candidates.depths = np.empty(0)
    report_table = table[
        [
            *("sample_id", "batch", "row", "label", "class_index", "accepted", "reason", "rank"),
            *("probability", "predicted", "distance", "distance_ratio", "nearest_id", "feature_distance"),
        ]
    ]
    for note in notes:
        logger.warning("%s", note)
    logger.info("audit: %d of %d samples accepted", int(table["accepted"].sum()), len(table))
    return _write(report_table, classes, notes, directory)


class AuditShard(Shard):
    """Pieces of samples, for one worker. A piece is looked at in one go; its borders are the same in any division."""

    judge: Path = Field(description="The judge's directory; every worker reads it there.")
    judge_digest: str
    batches: tuple[SampleBatch, ...]
    pieces: tuple[tuple[int, int, int], ...] = Field(description="Batch, first and last sample (not included) of it.")
    backbone: str | None
    backbone_identity: str | None = Field(description="As the run has it: a worker may have imported another state.")
    pixels: PixelSpec
    n_classes: int
    threads: int

    @property
    def needs(self) -> tuple[Path, ...]:
        return (self.judge, *(self.batches[number].directory for number, _, _ in self.pieces))


def _score(
    config: Config,
    source: Source,
    batches: Sequence[SampleBatch],
    judge: Judge,
    reference: Reference,
    directory: Path,
    scratch: Path,
    map_shards: MapShards,
) -> _Candidates:
    """Look at every sample once: what the classifier says, the nearest training image, a hash."""
    from synthaug.quality.arithmetic import chunks
    from synthaug.trial.entry import loaded_identity

    form = (source.pixels.size, source.pixels.size, source.pixels.channels)
    totals = [len(_samples_of(batch)) for batch in batches]
    pieces = [(number, part.start, part.stop) for number, total in enumerate(totals) for part in chunks(total, form)]
    starts = np.cumsum([0, *(last - first for _, first, last in pieces)])
    piece = max((last - first for _, first, last in pieces), default=1)
    side, total = reference.canvas.side, sum(totals)
    pictures = _scratch_array(scratch / PICTURES_FILE, np.uint16, (total, side, side))
    depths = _scratch_array(scratch / DEPTHS_FILE, np.float32, (total, reference.depths.shape[1]))
    parts: dict[int, pd.DataFrame] = {}
    folder = directory / WORK_DIR / SHARDS_DIR
    identity = loaded_identity(config.evaluate.backbone)
    made_with = _made_with(identity)
    shared = {
        "folder": folder,
        "made_with": made_with,
        "judge": judge.directory,
        "judge_digest": judge.digest,
        "batches": tuple(batches),
        "backbone": config.evaluate.backbone,
        "backbone_identity": identity,
        "pixels": source.pixels,
        "n_classes": len(source.classes),
        "threads": config.train.threads,
    }

    def part(first: int, last: int) -> AuditShard:
        return AuditShard(**shared, first=first, last=last, pieces=tuple(pieces[first:last]))

    def take(done: ShardDone) -> None:
        made, place = folder / done.name, slice(int(starts[done.first]), int(starts[done.last]))
        if _digest_of(made) != done.digest:
            raise SynthaugError(f"{made} does not hold what its worker wrote. Is the file system full or damaged?")
        pictures[place] = np.load(made / PICTURES_FILE, mmap_mode="r")
        depths[place] = np.load(made / DEPTHS_FILE, mmap_mode="r")
        parts[done.first] = pd.read_parquet(made / SCORES_FILE)

    left = total

    def tick(number: int) -> None:
        nonlocal left
        # The last piece of a batch is smaller.
        done = min(left, number * piece)
        left -= done
        bar.update(done)

    with progress("audit", total, "samples") as bar:
        do_shards(
            score_shard,
            part,
            folder=folder,
            units=len(pieces),
            unit_size=piece,
            made_with=made_with,
            settings=config.scale,
            map_shards=map_shards,
            intact=lambda done: _digest_of(folder / done.name) == done.digest,
            take=take,
            tick=tick,
        )
    table = pd.concat([parts[first] for first in sorted(parts)], ignore_index=True) if parts else _no_scores()
    # Scores of what is not a picture would look like scores.
    table.loc[table["broken"], _SCORES] = np.nan
    table.loc[table["broken"], "predicted"] = -1
    table.loc[table["broken"], "nearest_id"] = None
    return _Candidates(table, pictures, depths)


def score_shard(shard: AuditShard, tick: Tick) -> ShardDone:
    """Look at the samples of a shard, piece by piece; may be called on another machine.

    Raises:
        UsageError: The files of the run are not to be seen from here.
    """
    from synthaug.quality.arithmetic import torch_threads
    from synthaug.trial.entry import loaded_identity

    def fill(folder: Path) -> tuple[str, float]:
        reference = _reference(shard.judge, shard.judge_digest, shard.threads)
        side, total = reference.canvas.side, sum(last - first for _, first, last in shard.pieces)
        pictures = _scratch_array(folder / PICTURES_FILE, np.uint16, (total, side, side))
        depths = _scratch_array(folder / DEPTHS_FILE, np.float32, (total, reference.depths.shape[1]))
        parts, seconds, done = [], [], 0
        for number, first, last in shard.pieces:
            check_stopped()
            started = time.monotonic()
            scores, canvases, deep = _look_at(shard, reference, number, slice(first, last))
            place = slice(done, done + len(scores))
            pictures[place], depths[place] = canvases, deep
            parts.append(scores)
            done += len(scores)
            seconds.append(time.monotonic() - started)
            tick(1)
        pd.concat(parts, ignore_index=True).to_parquet(folder / SCORES_FILE, index=False)
        return _digest_of(folder), min(seconds)

    with torch_threads(shard.threads):
        return do_shard(shard, _made_with(loaded_identity(shard.backbone)), fill)


def _made_with(backbone_identity: str | None) -> dict[str, str]:
    from synthaug.quality.arithmetic import arithmetic

    own = {} if backbone_identity is None else {"evaluate.backbone": backbone_identity}
    return {**arithmetic(), **computes_with("cpu"), **own}


def _look_at(
    shard: AuditShard, reference: Reference, number: int, piece: slice
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Scores, canvases and depths of a piece."""
    from synthaug.quality.alignment import shrink
    from synthaug.quality.arithmetic import nearest
    from synthaug.quality.copies import picture_hash

    batch = shard.batches[number]
    table = kept(("samples", batch.directory, batch.digest), lambda: _samples_of(batch))
    images: np.ndarray = np.load(batch.directory / IMAGES_FILE, mmap_mode="r")
    part = table.iloc[piece][["sample_id", "row", "label", "class_index"]]
    values = images[part["row"].to_numpy()]
    look = reference.classifier.predict(values)
    canvases = shrink(values, *reference.values)
    found = reference.search.find(canvases)
    look_in_features = _own_features(shard)
    features = look.depths if look_in_features is None else look_in_features(values, np.arange(len(part)))
    predicted = look.probabilities.argmax(1)
    rows = np.arange(len(part))
    scores = part.assign(
        batch=number,
        broken=_broken(values),
        picture_hash=[picture_hash(value) for value in values],
        probability=look.probabilities[rows, part["label"].to_numpy()],
        predicted=predicted,
        predicted_probability=look.probabilities[rows, predicted],
        distance=found.distance,
        distance_ratio=found.ratio,
        nearest_id=reference.training["image_id"].to_numpy()[found.row],
        feature_distance=nearest(features, reference.features, 1)[0][:, 0],
    )
    return scores, canvases, look.depths


def _samples_of(batch: SampleBatch) -> pd.DataFrame:
    return read_samples(batch).sort_values("row")


def _reference(judge: Path, digest: str, threads: int) -> Reference:
    from synthaug.quality.reference import load_reference

    found: Reference = kept(("reference", judge, digest, threads), lambda: load_reference(judge, threads))
    return found


def _own_features(shard: AuditShard) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """The user's own backbone, where there is one."""
    from synthaug.trial.backbone import backbone_features

    if (name := shard.backbone) is None:
        return None
    found: Callable[[np.ndarray, np.ndarray], np.ndarray] = kept(
        ("backbone", name, shard.backbone_identity, shard.judge_digest),
        lambda: backbone_features(name, shard.pixels, shard.n_classes, shard.threads),
    )
    return found


def _digest_of(made: Path) -> str:
    return digest_json([digest_file(made / name) for name in (PICTURES_FILE, DEPTHS_FILE, SCORES_FILE)])


def _scratch_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    if shape[0] == 0:
        return np.empty(shape, dtype=dtype)
    return reserved_array(path, dtype, shape)


def _no_scores() -> pd.DataFrame:
    whole = dict.fromkeys(("row", "label", "class_index", "batch", "predicted"), "int64")
    real = dict.fromkeys(_SCORES, "float32")
    words = dict.fromkeys(("sample_id", "picture_hash", "nearest_id"), "str")
    kinds = {**whole, **real, **words, "broken": "bool"}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})


def _broken(images: np.ndarray) -> np.ndarray:
    """[n] bool: a value is not finite, or every channel is one flat tone."""
    flat = images.reshape(len(images), -1, images.shape[3])
    result: np.ndarray = ~np.isfinite(flat).all((1, 2)) | (flat == flat[:, :1]).all((1, 2))
    return result


def _look_for_copies(table: pd.DataFrame, source: Source, reference: Reference, judge: Judge) -> None:
    """Add bool columns: copy (bit for bit), near_copy, low_ratio, in_features. None of these is what is no picture."""
    limits = {label: judge.threshold_of(name) for label, name in enumerate(source.classes)}
    feature_limit = judge.feature_test.threshold if judge.feature_test else None
    whole = ~table["broken"]
    table["copy"] = whole & table["picture_hash"].isin(set(reference.training["picture_hash"]))
    table["near_copy"] = whole & (table["distance"] < table["label"].map(limits).astype("float64"))
    table["low_ratio"] = whole & (table["distance_ratio"] < _LOW_RATIO)
    table["in_features"] = whole & (table["feature_distance"] < (np.nan if feature_limit is None else feature_limit))


def _duplicates(
    candidates: _Candidates, source: Source, reference: Reference, judge: Judge, threads: int
) -> np.ndarray:
    """[n] bool: an earlier sample is the same picture (any class), or nearer than half the threshold (own class)."""
    from synthaug.quality.copies import near_duplicates

    table = candidates.table
    marked = np.zeros(len(table), dtype=bool)
    whole = table[~table["broken"]]
    # Earlier: of an earlier batch, else of the lower place in its class. A later round changes nothing before it.
    ordered = whole.sort_values(["batch", "class_index", "label"])
    marked[ordered.index[ordered.duplicated("picture_hash")]] = True
    with progress("audit: duplicates", len(whole), "samples") as bar:
        for label, members in whole.groupby("label"):
            threshold = judge.threshold_of(source.classes[int(label)])  # type: ignore[call-overload]
            if threshold is None:
                continue
            rows = members.index[~marked[members.index]].to_numpy()
            rows = rows[np.argsort(table["class_index"].to_numpy()[rows], kind="stable")]
            found = near_duplicates(
                candidates.pictures,
                rows,
                reference.projection,
                reference.canvas,
                _DUPLICATE_SHARE * threshold,
                threads,
                bar.update,
            )
            marked[rows[found]] = True
    return marked


def _reasons(table: pd.DataFrame, duplicates: np.ndarray, settings: AuditConfig) -> pd.Series:
    other = (table["predicted"] != table["label"]) & (
        table["predicted_probability"] >= settings.third_class_probability
    )
    found = (table["broken"], duplicates, table["copy"], table["near_copy"], other)
    reasons = pd.Series(None, index=table.index, dtype="str")
    # Backwards, so that the first reason that fits is the one that stays.
    for reason, fits in reversed(list(zip(REASONS, found, strict=True))):
        reasons[fits] = reason
    return reasons


def _ranks(table: pd.DataFrame) -> np.ndarray:
    """Place among the accepted of its class in order of class_index; -1 for the rejected."""
    ranks = np.full(len(table), -1, dtype=np.int64)
    accepted = table[table["accepted"]].sort_values(["label", "class_index"])
    ranks[accepted.index] = accepted.groupby("label").cumcount()
    return ranks


def _audit_class(
    item: ClassPlan,
    candidates: _Candidates,
    reference: Reference,
    judge: Judge,
    settings: AuditConfig,
    notes: list[str],
    *,
    ours: bool,
) -> ClassAudit:
    """Count, measure coverage, and withhold a class that has collapsed. `notes` is added to.

    Of samples that are not `ours` none can be drawn again: all that were offered are wanted, and none is missing.
    """
    from synthaug.quality.coverage import coverage

    table = candidates.table
    mine = table[table["label"] == item.label]
    accepted = mine[mine["accepted"]]
    counts = mine["reason"].value_counts()
    rejected = {reason: int(counts[reason]) for reason in REASONS if reason in counts}
    name = f"class '{printable(item.name)}'"
    found: Coverage | None = None
    withheld = None
    if len(mine):
        real_rows = np.flatnonzero(reference.training["label"] == item.label)
        real = np.array(reference.depths[real_rows[:: max(1, -(-len(real_rows) // _MOST_COVERED))]])
        found = coverage(real, _first(candidates.depths, accepted))
        before = coverage(real, _first(candidates.depths, mine[~mine["broken"]]))
        withheld = _why_withheld(len(mine), len(accepted), rejected, found, settings, ours=ours)
        notes.extend(_remarks(name, len(real_rows), len(mine), len(accepted), rejected, found, before))
        if withheld is not None:
            notes.append(f"{name} is withheld: {withheld}")
    elif item.n_synthetic and ours:
        notes.append(f"{name}: {item.n_synthetic} samples are planned and none was drawn.")
    return ClassAudit(
        label=item.label,
        name=item.name,
        n_wanted=item.n_synthetic if ours else len(mine),
        n_candidates=len(mine),
        n_accepted=len(accepted),
        n_missing=max(0, item.n_synthetic - len(accepted)) if ours else 0,
        rejected=rejected,
        coverage=found.value if found else None,
        coverage_expected=found.expected if found else None,
        copies=_copy_rates(mine, judge) if len(mine) else None,
        withheld=withheld,
    )


def _copy_rates(mine: pd.DataFrame, judge: Judge) -> CopyRates:
    from synthaug.quality.calibration import clopper_pearson

    accepted, n = mine[mine["accepted"]], int((~mine["broken"]).sum())
    near = int((mine["copy"] | mine["near_copy"]).sum())
    by_features = judge.feature_test is not None and judge.feature_test.threshold is not None
    return CopyRates(
        n=n,
        n_exact=int(mine["copy"].sum()),
        n_near=near,
        near_bounds=clopper_pearson(near, n),
        n_low_ratio=int(mine["low_ratio"].sum()),
        n_in_features=int(mine["in_features"].sum()) if by_features else None,
        n_accepted=len(accepted),
        accepted_low_ratio=int(accepted["low_ratio"].sum()),
        accepted_in_features=int(accepted["in_features"].sum()) if by_features else None,
    )


def _first(depths: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    """Features of the first samples of a class in order of class_index."""
    return np.array(depths[table.sort_values("class_index").index[:_MOST_COVERED]])


def _why_withheld(
    n_candidates: int,
    n_accepted: int,
    rejected: dict[str, int],
    found: Coverage | None,
    settings: AuditConfig,
    *,
    ours: bool,
) -> str | None:
    if n_accepted == 0:
        return f"every one of its {n_candidates} samples was rejected ({_in_words(rejected)})."
    if found is not None and found.relative < settings.min_coverage:
        advice = (
            "Train longer, or leave the class out with plan.exclude." if ours else "Offer more varied images of it."
        )
        return (
            f"its {n_accepted} accepted samples cover {found.value:.0%} of the class's real images, where as many "
            f"honest ones would cover {found.expected:.0%}: {found.relative:.2f} of that, under audit.min_coverage "
            f"{settings.min_coverage:g}. The generator repeats itself, or the filter has narrowed the class"
            f"{f' (rejected: {_in_words(rejected)})' if rejected else ''}. {advice}"
        )
    return None


def _remarks(
    name: str,
    n_real: int,
    n_candidates: int,
    n_accepted: int,
    rejected: dict[str, int],
    found: Coverage | None,
    before: Coverage | None,
) -> list[str]:
    """What a reader of the report must not overlook."""
    from synthaug.quality.coverage import LEAST_REAL, LEAST_SAMPLES

    remarks = []
    if 0 < n_accepted < n_candidates * (1 - _MUCH_REJECTED):
        remarks.append(f"{name}: only {n_accepted} of {n_candidates} samples passed ({_in_words(rejected)}).")
    if n_accepted and found is None:
        remarks.append(
            f"{name}: coverage is unavailable with {n_real} real images and {n_accepted} accepted samples (at least "
            f"{LEAST_REAL} and {LEAST_SAMPLES} are needed), so a collapse could pass unseen."
        )
    if found is not None and before is not None and abs(found.relative - before.relative) > _MUCH_NARROWED:
        remarks.append(
            f"{name}: relative coverage is {before.relative:.2f} before the filter and {found.relative:.2f} after it "
            f"({n_candidates} and {n_accepted} samples)."
        )
    return remarks


def _in_words(rejected: dict[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in rejected.items())


def _write(table: pd.DataFrame, classes: tuple[ClassAudit, ...], notes: list[str], directory: Path) -> AuditReport:
    from synthaug.quality.reference import write_table

    write_table(table, directory / AUDIT_FILE)
    words = table[["sample_id", "reason", "nearest_id"]].astype(object)
    numbers = table.drop(columns=list(words)).astype({"accepted": "int64"})
    content = {
        "words": words.where(words.notna(), None).to_numpy().tolist(),
        "numbers": [[name, digest_array(numbers[name].to_numpy())] for name in numbers],
        "classes": [item.model_dump() for item in classes],
        "notes": notes,
    }
    return AuditReport(directory=directory, digest=digest_json(content), classes=classes, notes=tuple(notes))
