"""Parquet shards with Hugging Face features: written and read a row group at a time, page checksums on.

A PNG is stored where a reader gets back exactly what was stored: 8-bit grey, RGB and RGBA, and 16-bit grey.
Everything else (other channel counts, floating point, and 16-bit colour, which Pillow would silently cut to
8 bits on reading) is stored as a typed array.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synthaug.digest import digest_array
from synthaug.errors import ReleaseError
from synthaug.records import PixelSpec

DATA_DIR = "data"
# A row group is what a reader has to hold at least: so many raw pixel bytes, and so many rows, at most.
_GROUP_BYTES = 16 * 2**20
_GROUP_ROWS = 500


@dataclass(frozen=True)
class ShardRow:
    """One image on its way into a shard."""

    image: np.ndarray  # [height, width, channels], native values
    label: int
    sample_id: str | None  # set for synthetic images
    source_id: str | None  # set for real images

    @property
    def is_synthetic(self) -> bool:
        return self.sample_id is not None


@dataclass(frozen=True)
class StoredRow:
    """Where a row went, and the digests of what was stored there."""

    shard: str  # relative to the release, with forward slashes
    row: int  # in the shard
    content_hash: str  # of the PNG's bytes, or of the array where it is stored as one
    pixel_hash: str  # of the array


@dataclass(frozen=True)
class ReadRow:
    """A row as a shard holds it."""

    row: int
    label: int | None
    is_synthetic: bool
    sample_id: str | None
    source_id: str | None
    content_hash: str | None  # None for real images, and where the image is missing
    pixel_hash: str | None = None  # None for real images, and where the image cannot be decoded
    whole: bool = True  # False: the checks inside of its own PNG fail; looked at where a page is damaged only


def stored_as_png(spec: PixelSpec) -> bool:
    """Whether a PNG holds such images and `datasets` (that is, Pillow) reads them back unchanged."""
    if spec.colour == "channels":
        return False
    return (spec.dtype == "uint8" and spec.channels in (1, 3, 4)) or (spec.dtype == "uint16" and spec.channels == 1)


def png_text(sample_id: str | None) -> dict[str, str]:
    """What a PNG says of itself wherever it is copied to; of a real image (None), nothing."""
    return {} if sample_id is None else {"synthetic": "true", "sample_id": sample_id, "generator": "synthaug"}


def content_hash(image: np.ndarray, spec: PixelSpec, sample_id: str | None) -> str:
    """Digest of an image as a shard stores it: of the PNG's bytes, or of the array where it is stored as one.

    Args:
        image: `[height, width, channels]`, native values.
    """
    if not stored_as_png(spec):
        return digest_array(image)
    from synthaug.formats.pixels import encode_png

    return hashlib.sha256(encode_png(image, spec, png_text(sample_id))).hexdigest()


def shard_features(spec: PixelSpec, classes: Sequence[str]) -> datasets.Features:
    """The columns of a shard."""
    image = (
        datasets.Image()
        if stored_as_png(spec)
        else datasets.Array3D(shape=(spec.size, spec.size, spec.channels), dtype=spec.dtype)
    )
    return datasets.Features(
        {
            "image": image,
            "label": datasets.ClassLabel(names=list(classes)),
            "is_synthetic": datasets.Value("bool"),
            "sample_id": datasets.Value("string"),
            "source_id": datasets.Value("string"),
        }
    )


def features_as_yaml(spec: PixelSpec, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The same columns as the `features` of a card's `dataset_info`."""
    kept: list[dict[str, Any]] = shard_features(spec, classes)._to_yaml_list()
    return kept


def shard_name(split: str, number: int) -> str:
    """Name of a shard, which says nothing of how many there are: it stays what it is when others are added."""
    return f"{DATA_DIR}/{split}-{number:05d}.parquet"


def shard_number(split: str, name: str) -> int | None:
    """The number in a name that `shard_name` gave; None for any other."""
    match = re.fullmatch(rf"{DATA_DIR}/{split}-(\d{{5,9}})\.parquet", name)
    return int(match[1]) if match and shard_name(split, int(match[1])) == name else None


def lay_out(labels: np.ndarray, synthetic: np.ndarray, rows_per_shard: int) -> list[np.ndarray]:
    """Which rows go into which new shard, so that rows that come or go later touch few of them.

    No shard holds real and synthetic images; those of real ones come first, filled in the order of the rows. Of a class
    each `rows_per_shard` samples fill a shard of their own. What is left of each class stays together, and the classes'
    rests share shards, in order of label, as far as they fit. So a class that is sampled again has shards of its own
    and one more, and every two neighbours of those that are shared hold more than one shard could.

    Args:
        labels: int64 `[n]`.
        synthetic: bool `[n]`; real images first, then the samples in order of label.

    Returns:
        Positions in `labels`, int64, each once; they ascend in a shard, and those of a class from shard to shard.
    """
    real = np.flatnonzero(~synthetic)
    shards = [real[start : start + rows_per_shard] for start in range(0, len(real), rows_per_shard)]
    shared: list[np.ndarray] = []
    made = np.flatnonzero(synthetic)
    for rows in np.split(made, np.flatnonzero(np.diff(labels[made])) + 1) if len(made) else []:
        whole = len(rows) - len(rows) % rows_per_shard
        shards += [rows[start : start + rows_per_shard] for start in range(0, whole, rows_per_shard)]
        if len(rest := rows[whole:]):
            if sum(map(len, shared)) + len(rest) > rows_per_shard:
                shards.append(np.concatenate(shared))
                shared = []
            shared.append(rest)
    return [*shards, np.concatenate(shared)] if shared else shards


class ShardWriter:
    """Writes shards into a release and keeps count of the bytes."""

    def __init__(self, release: Path, spec: PixelSpec, classes: Sequence[str]) -> None:
        self._release, self._spec = release, spec
        self._schema: pa.Schema = shard_features(spec, classes).arrow_schema
        self._png = stored_as_png(spec)
        raw = spec.size * spec.size * spec.channels * np.dtype(spec.dtype).itemsize
        self._group_rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // raw))
        self.n_bytes = 0  # as a table in memory: what a card calls num_bytes

    def write(self, name: str, rows: Iterable[ShardRow]) -> Iterator[StoredRow]:
        """Write a shard; yields, for each row in its order, where it is stored. Exhaust it."""
        path = self._release / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, done = iter(rows), 0
        with _open_writer(path, self._schema, png=self._png) as writer:
            while group := list(islice(rows, self._group_rows)):
                table, stored = self._pack(group, name, done)
                writer.write_table(table, row_group_size=len(group))
                self.n_bytes += table.nbytes
                done += len(group)
                yield from stored

    def _pack(self, group: list[ShardRow], name: str, first: int) -> tuple[pa.Table, list[StoredRow]]:
        pixel_hashes = [digest_array(row.image) for row in group]
        if self._png:
            from synthaug.formats.pixels import encode_png

            encoded = [encode_png(row.image, self._spec, png_text(row.sample_id)) for row in group]
            hashes = [hashlib.sha256(data).hexdigest() for data in encoded]
            # No path: a file name would tell nothing that sample_id and source_id do not.
            image = pa.StructArray.from_arrays(
                [pa.array(encoded, pa.binary()), pa.nulls(len(group), pa.string())],
                fields=list(self._schema.field("image").type),
            )
        else:
            hashes = pixel_hashes
            image_type = self._schema.field("image").type
            images = np.stack([row.image for row in group])
            image = pa.ExtensionArray.from_storage(image_type, _nest(images, image_type.storage_type))
        table = pa.Table.from_arrays(
            [
                image,
                pa.array([row.label for row in group], pa.int64()),
                pa.array([row.is_synthetic for row in group], pa.bool_()),
                pa.array([row.sample_id for row in group], pa.string()),
                pa.array([row.source_id for row in group], pa.string()),
            ],
            schema=self._schema,
        )
        stored = [
            StoredRow(name, first + i, content, pixels)
            for i, (content, pixels) in enumerate(zip(hashes, pixel_hashes, strict=True))
        ]
        return table, stored


def _open_writer(path: Path, schema: pa.Schema, *, png: bool) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        compression="none" if png else "zstd",  # a PNG is compressed already, and it is nearly all there is
        use_dictionary=False,
        write_statistics=["label", "is_synthetic"],
        write_page_checksum=True,
        write_page_index=True,
    )


Damaged = Callable[[int, int, bool, Exception], None]


def read_shard(path: Path, damaged: Damaged | None = None) -> Iterator[ReadRow]:
    """Iterate over a shard's rows with their hashes, one row group in memory, every page's checksum checked.

    Args:
        damaged: Called for a row group that is damaged, with its first row, the row after its last, whether its rows
            come all the same, unchecked, so that the wrong ones can be told from the others, and what is wrong. None
            raises that instead.

    Raises:
        pyarrow.ArrowException, OSError: The file is damaged.
        KeyError, ValueError, TypeError: It is not a shard of a release.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if missing := {"image", "label", "is_synthetic", "sample_id", "source_id"} - set(file.schema_arrow.names):
            raise KeyError(f"no column {', '.join(sorted(missing))}")
        row = 0
        for index in range(file.metadata.num_row_groups):
            n_rows = file.metadata.row_group(index).num_rows
            try:
                rows = _rows_of(file.read_row_group(index, use_threads=False), row, look_inside=False)
            except Exception as error:  # a damaged file fails in every way that there is
                if damaged is None:
                    raise
                rows = _unchecked_rows(path, index, row)
                damaged(row, row + n_rows, bool(rows), error)
            yield from rows
            row += n_rows


def _unchecked_rows(path: Path, index: int, first: int) -> list[ReadRow]:
    """Rows of a row group whose checksums are wrong, as far as they can be read at all; none where they cannot."""
    try:
        with pq.ParquetFile(path) as file:
            return _rows_of(file.read_row_group(index, use_threads=False), first, look_inside=True)
    except Exception:  # a damaged file fails in every way that there is
        return []


def _rows_of(table: pa.Table, first: int, *, look_inside: bool) -> list[ReadRow]:
    synthetic = [bool(value) for value in table["is_synthetic"].to_pylist()]
    hashes = _hashes(table["image"], synthetic, look_inside=look_inside)
    columns = [table[name].to_pylist() for name in ("label", "sample_id", "source_id")]
    return [
        ReadRow(first + i, label, synthetic[i], sample_id, source_id, *hashes[i])
        for i, (label, sample_id, source_id) in enumerate(zip(*columns, strict=True))
    ]


def read_stored(path: Path) -> Iterator[tuple[pa.Table, list[tuple[np.ndarray, str, str]]]]:
    """Iterate over the row groups of a shard: the table, and of each row the image with its content and pixel hash.

    Raises:
        pyarrow.ArrowException, OSError, Rejected: The file or an image is damaged.
    """
    from synthaug.formats.pixels import decode_png

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for index in range(file.metadata.num_row_groups):
            table = file.read_row_group(index, use_threads=False)
            # A column without a missing value is read with a mask that was not there when it was written.
            table = table.set_column(1, table.field(1), pa.array(table["label"].to_pylist(), pa.int64()))
            found = []
            for chunk in table["image"].chunks:
                for i in range(len(chunk)):
                    if pa.types.is_struct(chunk.type):
                        data = chunk.field("bytes")[i].as_py()
                        image = decode_png(data)
                        found.append((image, hashlib.sha256(data).hexdigest(), digest_array(image)))
                    else:
                        image = _array_of(chunk, i)
                        found.append((image, digest := digest_array(image), digest))
            yield table, found


def read_ids(path: Path) -> Iterator[tuple[int | None, bool, str | None]]:
    """Label, is_synthetic and id of each row of a shard, without its image."""
    columns = ["label", "is_synthetic", "sample_id", "source_id"]
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for index in range(file.metadata.num_row_groups):
            table = file.read_row_group(index, columns=columns, use_threads=False)
            for label, synthetic, sample_id, source_id in zip(
                *(table[name].to_pylist() for name in columns), strict=True
            ):
                yield label, bool(synthetic), sample_id if synthetic else source_id


def read_image(path: Path, row: int) -> np.ndarray:
    """The image of one row of a shard, `[height, width, channels]`; its row group is read, page checksums checked.

    Raises:
        pyarrow.ArrowException, OSError, Rejected: The file or the image is damaged.
        IndexError: It has no such row.
        KeyError, TypeError: It is not a shard of a release.
    """
    from synthaug.formats.pixels import decode_png

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        first = 0
        for index in range(file.metadata.num_row_groups):
            n_rows = file.metadata.row_group(index).num_rows
            if first <= row < first + n_rows:
                column = file.read_row_group(index, columns=["image"], use_threads=False)["image"]
                chunk = next(chunk for chunk in column.slice(row - first, 1).chunks if len(chunk))
                if pa.types.is_struct(chunk.type):
                    return decode_png(chunk.field("bytes")[0].as_py())
                return _array_of(chunk, 0)
            first += n_rows
    raise IndexError(f"{path.name} has {first} rows; there is no row {row}")


def read_source_ids(path: Path) -> Iterator[list[str | None]]:
    """The ids of the real images of a shard, a row group at a time; None for a synthetic image.

    Raises:
        pyarrow.ArrowException, OSError: The file is damaged.
        KeyError: It is not a shard of a release.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if "source_id" not in file.schema_arrow.names:
            raise KeyError("no column source_id")
        for index in range(file.metadata.num_row_groups):
            yield file.read_row_group(index, columns=["source_id"], use_threads=False)["source_id"].to_pylist()


def read_classes(path: Path) -> list[str]:
    """Class names of a shard."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(path))
    return list(features["label"].names)


def _hashes(
    column: pa.ChunkedArray, wanted: list[bool], *, look_inside: bool
) -> list[tuple[str | None, str | None, bool]]:
    """Content hash, pixel hash and wholeness of each image; hashes of those that are wanted only."""
    found: list[tuple[str | None, str | None, bool]] = []
    for chunk in column.chunks:
        png = pa.types.is_struct(chunk.type)
        values = chunk.field("bytes") if png else chunk
        for i in range(len(chunk)):
            if not png:
                digest = digest_array(_array_of(chunk, i)) if wanted[len(found)] else None
                found.append((digest, digest, True))
                continue
            data = values[i].as_buffer() if wanted[len(found)] or look_inside else None
            whole = data is None or not look_inside or _is_whole_png(data)
            if data is None or not wanted[len(found)]:
                found.append((None, None, whole))
            else:
                found.append((hashlib.sha256(data).hexdigest(), _pixel_hash(data), whole))
    return found


def _pixel_hash(data: pa.Buffer) -> str | None:
    from synthaug.formats.pixels import decode_png

    try:
        return digest_array(decode_png(data.to_pybytes()))
    except Exception:  # a damaged picture fails in every way that there is
        return None


def _is_whole_png(data: pa.Buffer) -> bool:
    """Whether every chunk of a PNG has the CRC that stands behind it (PNG specification, 5.4) and the end is there."""
    view, place = memoryview(data), 8
    if bytes(view[:8]) != b"\x89PNG\r\n\x1a\n":
        return False
    while place + 12 <= len(view):
        size = int.from_bytes(view[place : place + 4], "big")
        body, crc = view[place + 4 : place + 8 + size], bytes(view[place + 8 + size : place + 12 + size])
        if len(crc) != 4 or zlib.crc32(body) != int.from_bytes(crc, "big"):
            return False
        place += 12 + size
        if bytes(body[:4]) == b"IEND":
            return place == len(view)
    return False


def _array_of(chunk: pa.ExtensionArray, i: int) -> np.ndarray:
    flat = chunk.storage.slice(i, 1)
    for _ in chunk.type.shape:
        flat = flat.flatten()
    image: np.ndarray = flat.to_numpy(zero_copy_only=False).reshape(chunk.type.shape)
    return image


def _nest(images: np.ndarray, storage: pa.DataType) -> pa.Array:
    """[n, a, b, c] to an array of lists of lists of lists, without a Python loop over values."""
    if not pa.types.is_list(storage):
        return pa.array(images, type=storage)
    n, side = images.shape[:2]
    inner = _nest(images.reshape(n * side, *images.shape[2:]), storage.value_type)
    offsets = pa.array(np.arange(0, (n + 1) * side, side, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, inner, type=storage)


class StoredImages:
    """Single images out of an images.npy, read with the file's own calls: no mapping that grows in memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, self.dtype = read(self._file)
            if fortran or len(self.shape) != 4 or self.dtype.hasobject:
                raise ValueError("it is not a plain array of images in C order")
        except ValueError as error:
            self._file.close()
            raise ReleaseError(f"{path} cannot be used: {error}. Make its stage again.") from None
        self._start = self._file.tell()
        self._step = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self._path = path

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < self.shape[0]:
            raise ReleaseError(f"{self._path} has {self.shape[0]} images; there is no row {row}.")
        data = os.pread(self._file.fileno(), self._step, self._start + row * self._step)
        if len(data) != self._step:
            raise ReleaseError(f"{self._path} ends before row {row}: it was cut short. Make its stage again.")
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])

    def __enter__(self) -> StoredImages:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
