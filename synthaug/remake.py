"""Remake: images made again from their manifest rows and the checkpoint alone, held against what was released."""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from synthaug.digest import digest_array, digest_directory, digest_file
from synthaug.errors import CheckpointError, ConfigError, UsageError, VerificationError
from synthaug.progress import progress
from synthaug.records import DONE_FILE, PIPELINE_DIR, PixelSpec, Record
from synthaug.text import printable

if TYPE_CHECKING:
    from synthaug.generators.interface import Generator

logger = logging.getLogger(__name__)

# Largest difference of a pixel, as a share of the range of values, that another machine or thread count may make.
# Whole-number pixels are given one step more (see `allowed`): a value between two may be rounded to either.
# Measured by benchmarks/remake.py (docs/log.md): 0 between one and two threads and between AVX512 and AVX2, 3.6e-7 to
# plain arithmetic, before rounding. Room for larger networks is left; on a GPU it has not been measured.
TOLERANCE = 1e-4
# A checkpoint that was published with a release, or that a run folder shows.
_CHECKPOINT_NAMES = ("checkpoint", PIPELINE_DIR)
# Checkpoints of earlier jobs are published inside of the newest one's folder, under the first digits of their digests.
_EARLIER = re.compile("[0-9a-f]{12}")

Outcome = Literal["identical", "within tolerance", "differs", "could not be made"]


class Remade(Record):
    """What became of one sample."""

    sample_id: str
    class_name: str
    class_index: int | None
    outcome: Outcome
    png_identical: bool | None = Field(description="The bytes of the PNG too; None where none is stored, or none made.")
    largest_difference: float | None = Field(
        description="Of a pixel, as a share of the range of values, against the released image; None: not measured."
    )
    why: str = Field("", description="Why it could not be made, or how it differs.")
    changes: tuple[str, ...] = Field((), description="What computes here otherwise than when it was drawn.")


class RemakeResult(Record):
    """What became of all samples asked for."""

    ok: bool
    release: Path
    checkpoint: Path = Field(description="Folder of the newest checkpoint that samples were made with.")
    checkpoint_digest: str
    checkpoints: dict[str, Path] = Field(description="Digest to folder of all that were needed and found.")
    missing: tuple[str, ...] = Field(
        (), description="Which checkpoints were not found, and where they were looked for."
    )
    n_samples: int
    n_identical: int
    n_within_tolerance: int
    n_differ: int
    n_not_made: int
    n_micro_batches: int = Field(description="Computed, each whole and once.")
    tolerance: float = Field(description="Largest difference of a pixel that is within tolerance, of the value range.")
    random_seed: int | None = Field(description="Of --random; None where samples were named.")
    samples: tuple[Remade, ...]
    changes: tuple[str, ...] = Field(description="All changes of the environment that were met.")
    notes: tuple[str, ...]
    seconds: float


class _Row(Record):
    """What of a manifest row a sample is made from, with the bounds of the configuration."""

    sample_id: str
    content_hash: str
    pixel_hash: str
    shard: str
    row: Annotated[int, Field(ge=0)]
    label: Annotated[int, Field(ge=0)]
    class_name: str
    class_index: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    job_seed: Annotated[int, Field(ge=0)]
    micro_batch: Annotated[int, Field(ge=0)]
    position: Annotated[int, Field(ge=0)]
    checkpoint_digest: str
    generator: str
    solver: str
    steps: Annotated[int, Field(ge=2, le=1000)]
    guidance: Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)]
    threads: Annotated[int, Field(ge=1, le=256)]
    device: Literal["cpu", "cuda"]
    synthaug_version: str
    torch_version: str
    diffusers_version: str
    numpy_version: str
    cpu_capability: str

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Equal for samples that are computed together."""
        return (
            self.class_name, self.label, self.micro_batch, self.micro_batch_size, self.job_seed, self.steps,
            self.guidance, self.threads, self.device, self.generator, self.checkpoint_digest,
        )  # fmt: skip


def allowed(spec: PixelSpec) -> float:
    """The tolerance for such pixels, as a share of their range: a value that lay between two may go to either."""
    step = 0.0 if spec.dtype == "float32" else 1.0
    return TOLERANCE + step / (spec.high - spec.low)


def remake(
    release: Path,
    *,
    samples: Sequence[str] | None = None,
    draw: int | None = None,
    seed: int = 0,
    checkpoint: Path | Sequence[Path] | None = None,
    threads: int | None = None,
) -> RemakeResult:
    """Make samples of a release again and compare. Reads release.json, the manifest and the checkpoint.

    Shards are read only to measure by how much an image differs, and may be missing. Each sample's micro-batch is
    computed whole with the seeds, settings, threads and device of its row, once for all samples of it.

    Args:
        release: Directory of a release, or what is left of one.
        samples: Ids; None with `draw` None means all.
        draw: Take so many at random instead, the same ones for the same release and seed; all, if it has fewer.
        seed: Of that draw.
        checkpoint: Folder of the checkpoint, or of several; each must be one that the release states.
            What is not given is looked for beside the release and in the run folder that it lies in.
        threads: In place of those of the rows, to see what that changes.

    Raises:
        UsageError: The release has no such sample, or none at all.
        CheckpointError: No checkpoint of the rows' digests is found, one that was given is none of them, or one cannot
            be loaded. Where only some are missing, their samples could not be made.
        VerificationError: The manifest or release.json is missing or damaged.
    """
    from synthaug.formats.manifest import (
        MANIFEST_FILE,
        RELEASE_FILE,
        generator_label,
        read_release_file,
        stated_checkpoints,
    )

    started = time.monotonic()
    release = Path(release)
    stated = read_release_file(release)
    try:
        classes, manifest_digest = tuple(stated["classes"]), str(stated["manifest_digest"])
        spec = PixelSpec.model_validate(stated["pixels"])
        for digest in stated_checkpoints(stated):
            generator_label(stated, digest, 0)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # those of pydantic are ValueErrors
        raise VerificationError(f"{release / RELEASE_FILE} was not written by synthaug: {error}") from None
    notes = []
    wanted = _choose(release, samples, draw, seed)
    if digest_file(release / MANIFEST_FILE) != manifest_digest:
        notes.append(
            f"{MANIFEST_FILE} is not the one that {RELEASE_FILE} speaks of: it was changed. See 'synthaug verify'."
        )
    known = stated_checkpoints(stated)
    folders, missing = _find_checkpoints(release, _checkpoint_digests(release, wanted, known), known, checkpoint)
    maker = _Maker(release, spec, classes, stated, folders, threads)
    found: list[Remade] = []
    with progress("remake", len(wanted), "samples") as bar:
        for batch in _batches(release, wanted):
            found += maker.batch(batch)
            bar.update(len(batch))
    counts = {name: sum(item.outcome == name for item in found) for name in Outcome.__args__}  # type: ignore[attr-defined]
    good = counts["identical"] + counts["within tolerance"]
    return RemakeResult(
        ok=good == len(found) and not notes,
        release=release,
        checkpoint=folders[(newest := list(folders)[-1])],
        checkpoint_digest=newest,
        checkpoints=folders,
        missing=missing,
        n_samples=len(found),
        n_identical=counts["identical"],
        n_within_tolerance=counts["within tolerance"],
        n_differ=counts["differs"],
        n_not_made=counts["could not be made"],
        n_micro_batches=maker.n_batches,
        tolerance=allowed(spec),
        random_seed=None if draw is None else seed,
        samples=tuple(found),
        changes=tuple(dict.fromkeys(change for item in found for change in item.changes)),
        notes=tuple(notes),
        seconds=round(time.monotonic() - started, 3),
    )


def _read(release: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Manifest rows, with what goes wrong in words.

    Raises:
        VerificationError: The manifest is missing or damaged, or older than `remake`.
    """
    from synthaug.formats.manifest import MANIFEST_FILE, read_manifest

    path = release / MANIFEST_FILE
    try:
        yield from read_manifest(path, columns)
    except FileNotFoundError:
        raise VerificationError(f"{path} is missing. Samples are made again from its rows; restore it.") from None
    except KeyError as error:
        raise VerificationError(
            f"{path} has {error.args[0]}: it was written by another version of synthaug, or by something else. Make "
            "the release again with 'synthaug run'."
        ) from None
    except Exception as error:  # a damaged file fails in every way that there is
        words = printable(str(error), width=200)
        raise VerificationError(f"{path} is damaged: {words}. Restore it, or make the release again.") from None


def _choose(release: Path, samples: Sequence[str] | None, draw: int | None, seed: int) -> set[str]:
    ids = [str(row["sample_id"]) for row in _read(release, ["sample_id"])]
    if not ids:
        raise UsageError(f"release {release} holds no synthetic images, so there is nothing to make again.")
    if draw is not None:
        if draw < 1:
            raise UsageError(f"--random {draw}: give the number of samples to make again, at least 1.")
        # From the ids alone, so that a release gives the same ones wherever it lies.
        return set(random.Random(f"synthaug remake {seed}").sample(sorted(ids), min(draw, len(ids))))
    known = set(ids)
    if samples is None:
        return known
    for name in samples:
        if name not in known:
            # An id that was cut short is none of difflib's near ones: those that begin with it come first.
            near = [item for item in ids if item.startswith(name)][:3] if name else []
            near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.3)
            words = (
                f"The nearest are {', '.join(map(printable, near))}" if near else f"The first is {printable(ids[0])}"
            )
            raise UsageError(
                f"release {release} has no sample '{printable(name)}' among its {len(ids)}. {words}; all are in the "
                "column sample_id of its manifest."
            )
    return set(samples)


def _checkpoint_digests(release: Path, wanted: set[str], stated: Sequence[str]) -> list[str]:
    """The checkpoints of the release that the wanted rows name, oldest first; others could not be trusted to be its."""
    named = {
        str(row["checkpoint_digest"])
        for row in _read(release, ["sample_id", "checkpoint_digest"])
        if row["sample_id"] in wanted and row["checkpoint_digest"]
    }
    if found := [digest for digest in stated if digest in named]:
        return found
    raise VerificationError(f"no row of the manifest of {release} names its checkpoint. See 'synthaug verify'.")


def _find_checkpoints(
    release: Path, digests: Sequence[str], stated: Sequence[str], given: Path | Sequence[Path] | None
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Digest to folder, in the order of the digests, of those found; and of the others a sentence each.

    What is given may hold others of those that the release states: the rows asked for need not be of all of them.
    """
    found: dict[str, Path] = {}
    others: list[str] = []
    for place in [given] if isinstance(given, Path) else given or ():
        mine, tried = _look([*_given(place, stated)], stated)
        if not mine:
            seen = "; ".join(tried) if tried else f"{place} is no folder"
            raise CheckpointError(
                f"{_drawn(release, stated)}, but {seen}: it is another one, or it was changed. Give the one it was."
            )
        found |= {digest: folder for digest, folder in mine.items() if digest in digests}
        others += [f"{folder} has the digest {digest[:12]}" for digest, folder in mine.items() if digest not in digests]
    rest = [digest for digest in digests if digest not in found]
    beside, tried = _look(_beside(release, rest), rest) if rest else ({}, [])
    found |= beside
    tried = list(dict.fromkeys([*others, *tried]))
    seen = f" ({'; '.join(tried)}: another one, or changed)" if tried else ""
    missing = [digest for digest in digests if digest not in found]
    if not found:
        raise CheckpointError(
            f"{_drawn(release, missing)}, and it is not beside the release{seen}. Name its folder with --checkpoint."
            if len(missing) == 1
            else f"{_drawn(release, missing)}, and none of them is beside the release{seen}. Name their folders with "
            "--checkpoint, once for each."
        )
    return {digest: found[digest] for digest in digests if digest in found}, tuple(
        f"checkpoint {printable(digest[:12])} is not beside the release{seen}. Name its folder with --checkpoint."
        for digest in missing
    )


def _drawn(release: Path, digests: Sequence[str]) -> str:
    several = len(digests) > 1
    listed = ", ".join(printable(digest[:12]) for digest in digests)
    return (
        f"the samples of release {release} were drawn from the checkpoint{'s' * several} with the "
        f"digest{'s' * several} {listed}"
    )


def _look(folders: Iterable[Path], digests: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Which folders hold the checkpoints of the digests, and what the others turned out to be."""
    found: dict[str, Path] = {}
    tried: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            continue
        try:
            digest = digest_directory(folder, without=_EARLIER)
        except OSError as error:
            tried.append(f"{folder} cannot be read ({error.strerror or error})")
            continue
        if digest in digests:
            found.setdefault(digest, folder)
        else:
            tried.append(f"{folder} has the digest {digest[:12]}")
        if len(found) == len(digests):
            break
    return found, tried


def _given(given: Path, digests: Sequence[str]) -> Iterator[Path]:
    """The folder itself, or the checkpoints in it, where it is a run folder, a stage of one, or a published one."""
    if (given / DONE_FILE).is_file() or (given / "stages").is_dir():
        places = [given / name for name in _CHECKPOINT_NAMES if (given / name).is_dir()]
        places += _stages(given, digests)
    else:
        places = [given]
    yield from _with_earlier(places, digests)


def _beside(release: Path, digests: Sequence[str]) -> Iterator[Path]:
    """Where a checkpoint may lie: published with the release, shown in the run folder, or in a stage of it."""
    places = [release.resolve(), release.resolve().parent.parent, release.absolute().parent]
    seen: set[Path] = set()
    for place in dict.fromkeys(places):
        folders = [place / _CHECKPOINT_NAMES[0], *_stages(place, digests)]
        for folder in _with_earlier(folders, digests):
            if (real := folder.resolve()) not in seen:
                seen.add(real)
                yield folder


def _with_earlier(folders: Iterable[Path], digests: Sequence[str]) -> Iterator[Path]:
    for folder in folders:
        yield folder
        names = [digest[:12] for digest in digests if _EARLIER.fullmatch(digest[:12])]
        yield from (folder / name for name in names if (folder / name).is_dir())


def _stages(run: Path, digests: Sequence[str]) -> list[Path]:
    """Trained checkpoints of a run folder that say they have one of the digests."""
    found = []
    for done in sorted(run.glob(f"stages/train-*/{DONE_FILE}")):
        try:
            if json.loads(done.read_text(encoding="utf-8"))["record"]["digest"] in digests:
                found.append(done.parent / PIPELINE_DIR)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _batches(release: Path, wanted: set[str]) -> Iterator[list[_Row | Remade]]:
    """Wanted rows in order of the manifest, those of a micro-batch together; what is no usable row, alone."""

    def rows() -> Iterator[_Row | Remade]:
        for values in _read(release, list(_Row.model_fields)):
            if values["sample_id"] not in wanted:
                continue
            try:
                yield _Row.model_validate(values)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                why = f"its row has {where} {printable(str(values.get(where)))}: {first['msg']}"
                yield _not_made(values["sample_id"], str(values.get("class_name")), None, why)

    for _, batch in groupby(rows(), lambda row: row.batch_key if isinstance(row, _Row) else ("", row.sample_id)):
        yield list(batch)


def _not_made(sample_id: str, class_name: str, index: int | None, why: str, changes: tuple[str, ...] = ()) -> Remade:
    return Remade(
        sample_id=sample_id,
        class_name=class_name,
        class_index=index,
        outcome="could not be made",
        png_identical=None,
        largest_difference=None,
        why=why,
        changes=changes,
    )


class _Maker:
    """Makes micro-batches of a release and compares them."""

    def __init__(
        self,
        release: Path,
        spec: PixelSpec,
        classes: tuple[str, ...],
        stated: Mapping[str, Any],
        folders: Mapping[str, Path],
        threads: int | None,
    ) -> None:
        self._release, self._spec, self._classes = release, spec, classes
        self._stated, self._folders, self._threads = stated, folders, threads
        self._loaded: tuple[tuple[str, str, str], Generator] | None = None
        self.n_batches = 0

    def batch(self, rows: Sequence[_Row | Remade]) -> list[Remade]:
        """Make the micro-batch that all `rows` belong to."""
        good = [row for row in rows if isinstance(row, _Row)]
        if not good:
            return [row for row in rows if isinstance(row, Remade)]
        first = good[0]
        if (why := self._refusal(first)) is not None:
            return [_not_made(row.sample_id, row.class_name, row.class_index, why) for row in good]
        try:
            images, computed = self._draw(first, {row.position: row.seed for row in good if _fits(row)})
        except CheckpointError:
            raise
        except Exception as error:  # a generator of the user's own, or a machine without the memory
            why = f"{type(error).__name__}: {printable(str(error), width=200)}"
            return [_not_made(row.sample_id, row.class_name, row.class_index, why) for row in good]
        self.n_batches += 1
        return [self._compare(row, images, computed) for row in good]

    def _refusal(self, row: _Row) -> str | None:
        from synthaug.formats.manifest import generator_label, stated_checkpoints

        if row.checkpoint_digest not in self._folders:
            known = row.checkpoint_digest in stated_checkpoints(self._stated)
            why = "which is not here" if known else "which release.json does not name"
            return f"it was drawn from another checkpoint, {printable(row.checkpoint_digest[:12])}, {why}"
        if generator_label(self._stated, row.checkpoint_digest, row.label) is None:
            return f"its row has label {row.label}, which release.json does not know of its checkpoint"
        if row.label >= len(self._classes) or self._classes[row.label] != row.class_name:
            return f"its row has label {row.label} and class '{printable(row.class_name)}', which are not one"
        return None

    def _draw(self, row: _Row, seeds: dict[int, int]) -> tuple[np.ndarray, dict[str, str]]:
        """The whole micro-batch of a row, and what computed it, by the names of the row's columns."""
        import torch

        from synthaug.formats.manifest import generator_label
        from synthaug.generators import generator_class, resolve_device
        from synthaug.generators.canonical import draw_micro_batch, environment, micro_batch_indices, sample_seed

        try:
            device = resolve_device(row.device)
        except ConfigError:
            device = "cpu"
        kind = generator_class(row.generator)
        # Rows of a class, and mostly those of all classes in turn, have one checkpoint: one at a time is in memory.
        key = (row.checkpoint_digest, row.generator, device)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = (key, kind.load(self._folders[row.checkpoint_digest], device=device))
        label = generator_label(self._stated, row.checkpoint_digest, row.label)
        assert label is not None, "a row that its checkpoint does not know is refused before"
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or row.threads)
        try:
            here = environment()
            now = {
                "torch_version": here["torch"],
                "diffusers_version": here["diffusers"],
                "numpy_version": here["numpy"],
                "cpu_capability": here["cpu_capability"],
                "synthaug_version": here["synthaug"],
                "solver": kind.solver,
                "threads": str(torch.get_num_threads()),
                "device": device,
            }
            indices = micro_batch_indices(row.micro_batch, row.micro_batch_size)
            # Of the samples that are not asked for, or were never released, the seeds follow from the job's.
            drawn = draw_micro_batch(
                self._loaded[1],
                label,
                [
                    seeds.get(position, sample_seed(row.job_seed, row.class_name, index))
                    for position, index in enumerate(indices)
                ],
                steps=row.steps,
                guidance=row.guidance,
            )
        finally:
            torch.set_num_threads(before)
        return drawn, now

    def _compare(self, row: _Row, images: np.ndarray, computed: dict[str, str]) -> Remade:
        from synthaug.formats.shards import content_hash, stored_as_png

        changes = tuple(
            f"{name}: {printable(then)} → {now}"
            for name, now in computed.items()
            if (then := str(getattr(row, name))) != now
        )
        if not _fits(row):
            why = (
                f"its row contradicts itself: index {row.class_index} is not at position {row.position} of "
                f"micro-batch {row.micro_batch} of {row.micro_batch_size}"
            )
            return _not_made(row.sample_id, row.class_name, row.class_index, why, changes)
        image = images[row.position]
        identical = digest_array(image) == row.pixel_hash
        png: bool | None = None
        if stored_as_png(self._spec) and image.dtype == np.dtype(self._spec.dtype):
            png = content_hash(image, self._spec, row.sample_id) == row.content_hash
        outcome: Outcome = "identical"
        difference: float | None = 0.0
        why = self._odd(row)
        if not identical:
            difference, words = self._difference(row, image)
            within = difference is not None and difference <= allowed(self._spec)
            outcome = "within tolerance" if changes and within and not why else "differs"
            why = "; ".join(text for text in (why, words) if text)
        elif why:
            outcome = "differs"
        elif png is False:
            # Identical is what has the hash that was released, byte for byte.
            outcome = "within tolerance"
            why = "the pixels are equal, the bytes of the PNG are not: another encoder, or another hash in the row"
        return Remade(
            sample_id=row.sample_id,
            class_name=row.class_name,
            class_index=row.class_index,
            outcome=outcome,
            png_identical=png,
            largest_difference=difference,
            why=why,
            changes=changes,
        )

    def _odd(self, row: _Row) -> str:
        """What of a row does not follow from the rest of it."""
        from synthaug.generators.canonical import sample_id, sample_seed

        if row.seed != sample_seed(row.job_seed, row.class_name, row.class_index):
            return "its row has a seed that does not follow from the job's seed, the class and the index"
        expected = sample_id(
            row.checkpoint_digest,
            row.job_seed,
            row.class_name,
            row.class_index,
            steps=row.steps,
            guidance=row.guidance,
            micro_batch=row.micro_batch_size,
            threads=row.threads,
        )
        return "" if row.sample_id == expected else "its id does not follow from its row"

    def _difference(self, row: _Row, image: np.ndarray) -> tuple[float | None, str]:
        """Largest difference from the released image as a share of the value range, and words."""
        from synthaug.formats.manifest import is_safe_name
        from synthaug.formats.shards import read_image

        path = self._release / row.shard
        if not is_safe_name(row.shard) or not path.is_file():
            return None, "another hash of the pixels; the shard is not here, so by how much is not known"
        try:
            released = read_image(path, row.row)
        except Exception as error:  # a damaged file fails in every way that there is
            why = printable(str(error), width=200)
            return None, f"another hash of the pixels; the released image cannot be read: {why}"
        if released.shape != image.shape or released.dtype != image.dtype:
            return None, f"{image.dtype} {list(image.shape)}, but {released.dtype} {list(released.shape)} was released"
        gap = np.abs(released.astype(np.float64) - image.astype(np.float64))
        largest = float(gap.max() / (self._spec.high - self._spec.low))
        other = digest_array(released) != row.pixel_hash
        also = "; the released image is not the one of the manifest either" if other else ""
        return (
            largest,
            f"differs by up to {largest:.4f} of the value range in {np.mean(gap > 0):.0%} of the values{also}",
        )


def _fits(row: _Row) -> bool:
    """Whether index, micro-batch and position of a row belong together."""
    return (
        row.class_index == row.micro_batch * row.micro_batch_size + row.position and row.position < row.micro_batch_size
    )
