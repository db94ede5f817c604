"""What of an older release goes into a new one as it is: whole shards, byte for byte, under their names.

A shard is taken over where every row of it is in the new release, with the same image, label and id. Rows of the new
release that are in no such shard go into new ones, numbered after the highest number that the older release had. So
twelve new images cost one new shard, and who publishes the release uploads that one (`formats.hub`).

A release holds the samples of a class in order of rank, and a stream has no other word for their ranks. So a shard
of samples is taken over only where the ranks of each class go on in it from those of the shards before: behind a shard
with a sample that is gone, those of the same class are written again too.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from synthaug.digest import digest_file
from synthaug.errors import VerificationError
from synthaug.formats.pixels import Rejected
from synthaug.formats.shards import StoredRow, lay_out, read_ids, read_stored, shard_name, shard_number
from synthaug.records import PixelSpec
from synthaug.text import printable

logger = logging.getLogger(__name__)

# Below this share of rows that could be kept, and below this share of the rows that shards may have where there are
# more of them than this, everything is written anew: as if there were no older release.
_LEAST_KEPT = 1 / 3
_LEAST_FULL, _FEW_SHARDS = 1 / 4, 8
# What the form of a stored image depends on. That the values are the same is looked at one by one.
_FORM = ("channels", "dtype", "colour", "size")


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split of the new release: real images, then samples in order of label and rank."""

    ids: Sequence[str]  # source_id of real images, sample_id of samples
    labels: np.ndarray  # int64 [n]
    synthetic: np.ndarray  # bool [n]
    image: Callable[[int], np.ndarray]  # position to [height, width, channels]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Shard:
    """A shard of the new release, taken over or yet to be written."""

    name: str
    positions: np.ndarray  # int64 [n], in the split's rows
    # Of one that was taken over: content and pixel hash of each row, uint8 [n, 2, 32], and its bytes as a table.
    hashes: np.ndarray | None = None
    n_bytes: int = 0

    @property
    def is_new(self) -> bool:
        return self.hashes is None

    def stored(self) -> Iterator[StoredRow]:
        """What `ShardWriter.write` yields of one that it writes."""
        assert self.hashes is not None, "only what was taken over is stored already"
        for row, (content, pixels) in enumerate(self.hashes):
            yield StoredRow(self.name, row, content.tobytes().hex(), pixels.tobytes().hex())


class OlderRelease:
    """An intact older release, from which shards may be taken over. Nothing of it is changed."""

    def __init__(self, directory: Path, stated: dict[str, Any]) -> None:
        self._directory, self._stated = directory, stated
        self._name = str(stated["digest"])[:12]
        self._shards: list[Shard] = []

    def take_over(self, split: str, rows: SplitRows, release: Path, rows_per_shard: int) -> list[Shard]:
        """Copy the shards that stand unchanged into `release`; returns all shards of the split, in their order.

        Args:
            split: train, validation or test.
            rows: What the new release holds of the split.
            release: Directory of the new release.
            rows_per_shard: The most that a shard may have.
        """
        old = self._stated["splits"].get(split, {}).get("shards", [])
        numbers = {number: name for name in old if (number := shard_number(split, name)) is not None}
        walk = _Walk(rows)
        kept: list[Shard] = []
        for _, name in sorted(numbers.items()):
            shard = self._taken(name, walk, rows, release, rows_per_shard)
            if shard is not None:
                walk.take(shard.positions)
                kept.append(shard)
        first = max(numbers, default=-1) + 1
        shards = _in_order(kept + _new_shards(split, rows, rows_per_shard, walk.left, first), rows)
        n_kept = sum(len(shard.positions) for shard in kept)
        why = None
        if n_kept < _LEAST_KEPT * len(rows):
            why = f"only {n_kept} of its {len(rows)} images stand in shards that could be kept"
        elif len(shards) > _FEW_SHARDS and len(rows) < _LEAST_FULL * rows_per_shard * len(shards):
            why = f"its {len(rows)} images would lie in {len(shards)} shards"
        if why is not None:
            for shard in kept:
                (release / shard.name).unlink()
            if old and len(rows):
                logger.info("release: split %s is written anew: %s", split, why)
            shards = shards_of(split, rows, rows_per_shard)
        self._shards += shards
        return shards

    def tell(self) -> None:
        """Say in the log what was taken over."""
        kept = [shard for shard in self._shards if not shard.is_new]
        logger.info(
            "release: %d of %d shards, with %d of %d images, are those of release %s",
            *(len(kept), len(self._shards)),
            *(sum(len(shard.positions) for shard in some) for some in (kept, self._shards)),
            self._name,
        )

    def _taken(self, name: str, walk: _Walk, rows: SplitRows, release: Path, rows_per_shard: int) -> Shard | None:
        target = release / name
        try:
            positions = walk.fits(self._directory / name, rows_per_shard)
            if positions is None:
                return None
            target.parent.mkdir(parents=True, exist_ok=True)
            # Not a link, which would change with the older one.
            shutil.copyfile(self._directory / name, target)
            shard = _compared(name, target, positions, rows)
        except (pa.ArrowException, KeyError, TypeError, ValueError, Rejected) as error:
            words = printable(str(error), width=200)
            logger.warning("%s of release %s is not taken over: %s", name, self._name, words)
            shard = None
        if shard is None:
            target.unlink(missing_ok=True)
        return shard


def _compared(name: str, path: Path, positions: np.ndarray, rows: SplitRows) -> Shard | None:
    """A copied shard whose ids and labels fit, if its images do too."""
    hashes = np.empty((len(positions), 2, 32), dtype=np.uint8)
    n_bytes = row = 0
    for table, images in read_stored(path):
        n_bytes += table.nbytes
        for image, content, pixels in images:
            new = rows.image(int(positions[row]))
            if new.dtype != image.dtype or new.shape != image.shape or new.tobytes() != image.tobytes():
                return None
            hashes[row] = np.frombuffer(bytes.fromhex(content + pixels), np.uint8).reshape(2, 32)
            row += 1
    return Shard(name, positions, hashes, n_bytes)


class _Walk:
    """Which rows are placed while the shards of an older release are walked through in their order."""

    def __init__(self, rows: SplitRows) -> None:
        self._rows = rows
        self._where: dict[bool, dict[str, int]] = {False: {}, True: {}}
        for at, (synthetic, name) in enumerate(zip(rows.synthetic.tolist(), rows.ids, strict=True)):
            self._where[synthetic][name] = at
        self.left = np.ones(len(rows), dtype=bool)
        # Label to the position of the sample that has to come next.
        made = np.flatnonzero(rows.synthetic)
        labels, first = np.unique(rows.labels[made], return_index=True)
        self._next = dict(zip(labels.tolist(), made[first].tolist(), strict=True))

    def fits(self, path: Path, most: int) -> np.ndarray | None:
        """Where the rows of a shard are in the split, if all of them can stand as they do; None otherwise."""
        positions: list[int] = []
        kinds = set()
        following = dict(self._next)
        for label, synthetic, name in read_ids(path):
            at = self._where[synthetic].get(str(name))
            if at is None or not self.left[at] or self._rows.labels[at] != label or len(positions) == most:
                return None
            kinds.add(synthetic)
            if synthetic:
                if following[label] != at:
                    return None
                following[label] += 1
            positions.append(at)
        # Shards of older layouts may hold both kinds; a stream needs real images before all samples.
        if len(kinds) != 1 or len(set(positions)) != len(positions):
            return None
        return np.array(positions, dtype=np.int64)

    def take(self, positions: np.ndarray) -> None:
        self.left[positions] = False
        for at in positions[self._rows.synthetic[positions]].tolist():
            self._next[int(self._rows.labels[at])] = at + 1


def open_older(directory: Path | None, spec: PixelSpec, classes: Sequence[str]) -> OlderRelease | None:
    """Open an older release to take shards from; None, with a line in the log, where nothing of it can be used.

    Args:
        directory: Of the older release; None where there is none.
        spec: Pixels of the new release.
        classes: Names of the new release, by label. Shards carry them all, so they have to be the same.
    """
    from synthaug.formats.manifest import is_safe_name, read_release_file

    if directory is None:
        return None
    try:
        stated = read_release_file(directory)
        for name in [name for split in stated["splits"].values() for name in split["shards"]]:
            if not is_safe_name(name) or digest_file(directory / name) != stated["files"][name]["sha256"]:
                raise VerificationError(f"{printable(name)} has changed since it was written")
        older_classes, older_pixels = list(stated["classes"]), dict(stated["pixels"])
    except (VerificationError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        words = printable(str(error), width=300)
        logger.warning("the last release is damaged or gone, so no shard of it is taken over: %s: %s", directory, words)
        return None
    why = None
    if older_classes != list(classes):
        why = "it has other classes, or the same ones in another order, and every shard names them all"
    else:
        pixels = spec.model_dump(mode="json")
        if other := [name for name in _FORM if older_pixels.get(name) != pixels[name]]:
            why = f"its images have another {', '.join(other)}"
    if why is not None:
        logger.info("all shards are written anew; nothing of the last release %s can stand: %s", directory.name, why)
        return None
    return OlderRelease(directory, stated)


def shards_of(split: str, rows: SplitRows, rows_per_shard: int) -> list[Shard]:
    """The shards of a split where there is no older release."""
    return _new_shards(split, rows, rows_per_shard, np.ones(len(rows), dtype=bool), 0)


def _new_shards(split: str, rows: SplitRows, rows_per_shard: int, left: np.ndarray, first: int) -> list[Shard]:
    here = np.flatnonzero(left)
    parts = lay_out(rows.labels[here], rows.synthetic[here], rows_per_shard)
    return [Shard(shard_name(split, first + number), here[part]) for number, part in enumerate(parts)]


def _in_order(shards: list[Shard], rows: SplitRows) -> list[Shard]:
    """Real images before samples, whatever numbers their shards have: a stream learns from them what dose to give."""
    return sorted(shards, key=lambda shard: bool(rows.synthetic[shard.positions[0]]))
