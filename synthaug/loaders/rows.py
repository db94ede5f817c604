"""The rows of a release, indexed and not decoded: labels, ranks, and where each picture lies.

A PNG is read alone, with one read of its bytes (`formats.parquet_pages`). Typed arrays, and shards that another tool
wrote anew, are read a row group at a time, some of which are kept. Where arrays are more than that, each row group is
unpacked once into a nameless temporary file, which is gone with the process.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synthaug.digest import digest_file
from synthaug.errors import LoaderError, VerificationError
from synthaug.records import SPLITS, PixelSpec
from synthaug.text import printable

_ADVICE = "Make the release again with 'synthaug run', or download it again."
# Files of a release held open at a time by one process, and bytes of unpacked row groups kept by one split.
_OPEN_FILES = 128
_KEPT_BYTES = 256 * 2**20
_THREADS = 4
_OF_A_PROCESS = ("_files", "_spans", "_kept", "_unpacked", "_unpacked_groups")


class Rows(Protocol):
    """The rows of one split of a release, in the order in which they are stored."""

    name: str  # for messages
    root: Path | None  # the release's directory, where it has one
    classes: tuple[str, ...]
    pixels: PixelSpec | None  # None where nothing but the pictures says what they are
    labels: np.ndarray  # int32 [n]
    synthetic: np.ndarray  # bool [n]
    ranks: np.ndarray  # int32 [n]; -1 for real images

    def image(self, row: int) -> np.ndarray:
        """The picture `[height, width, channels]`, native values."""

    def sample_id(self, row: int) -> str:
        """Id of a synthetic sample, or of the real image."""


def open_rows(release: Any, split: str = "train", *, verify: bool = False) -> Rows:
    """Open a split of a release without decoding anything.

    Held against each other at once, in about a second for a million rows: release.json and its own digest, that every
    file is there with its size, the rows of the shards and those of the manifest. `verify` reads every byte and holds
    it against its SHA-256. Damage that came after is found when a row group is first read, by page checksums.

    Args:
        release: Directory of a release; or what `datasets.load_dataset` gives of one, a `Dataset` or a `DatasetDict`.
        split: train, validation or test.

    Raises:
        LoaderError: There is no such split, or `release` is nothing that can be read.
        VerificationError: The release is missing, half-written or damaged.
    """
    if split not in SPLITS:
        raise LoaderError(f"split {split!r} is none of {', '.join(SPLITS)}.")
    if isinstance(release, str | os.PathLike):
        return StoredRows(Path(release).expanduser(), split, verify=verify)
    if isinstance(release, dict):  # a DatasetDict is one
        if split not in release:
            raise LoaderError(f"the release has no split {split!r}; it has {printable(', '.join(release))}.")
        release = release[split]
    if not hasattr(release, "features") or not hasattr(release, "select_columns") or not hasattr(release, "__len__"):
        raise LoaderError(
            f"a release is the path of its directory or what datasets.load_dataset gives of it, not a "
            f"{type(release).__name__}. For a streamed one take ReleaseStream."
        )
    if verify:
        raise LoaderError("verify=True needs the release as a directory: a loaded dataset has no digests any more.")
    return TableRows(release, split)


class StoredRows:
    """Rows of a release on disk. It goes to worker processes as paths and numbers; files are opened there."""

    def __init__(self, root: Path, split: str, *, verify: bool = False) -> None:
        from synthaug.formats.manifest import RELEASE_FILE, read_release_file

        self.name = f"release {root}"
        # `runs/x/release` is a link that the next run points elsewhere, perhaps while this one is trained on.
        root = root.resolve()
        stated = read_release_file(root)
        self.root: Path | None = root
        self.digest: str = stated["digest"]
        try:
            self.classes = tuple(stated["classes"])
            self.spec = PixelSpec.model_validate(stated["pixels"])
            self.pixels: PixelSpec | None = self.spec
            counts = stated["splits"].get(split, {"n_rows": 0, "shards": []})
            shards: list[str] = list(counts["shards"])
            if unlisted := [name for name in shards if name not in stated["files"]]:
                raise VerificationError(f"{self.name} speaks of {printable(unlisted[0])}, but does not list it.")
            _check_files(root, stated["files"], verify=verify)
            n_rows = int(counts["n_rows"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise VerificationError(f"{root / RELEASE_FILE} lacks {error}: it was not written by synthaug.") from error
        self._shards = [root / name for name in shards]
        with ThreadPoolExecutor(_THREADS) as pool:
            columns = list(pool.map(partial(_read_columns, classes=self.classes), self._shards))
        self.labels = _join([item.labels for item in columns], np.int32)
        self.synthetic = _join([item.synthetic for item in columns], np.bool_)
        # Row groups of all shards in one list: where each begins, and in which shard it is.
        self._starts: list[int] = []
        self._groups: list[tuple[int, int, Any]] = []  # shard, number in it, its chunk of PNGs or None
        first, beginnings = 0, {}
        for number, item in enumerate(columns):
            beginnings[shards[number]] = first
            for group, size in enumerate(item.group_rows):
                self._starts.append(first)
                self._groups.append((number, group, item.chunks[group] if item.chunks else None))
                first += size
        if len(self.labels) != n_rows:
            raise VerificationError(
                f"{self.name}: split {split} has {len(self.labels)} rows, but {n_rows} were written. {_ADVICE}"
            )
        self.ranks = self._ranks(split, beginnings, len(columns))
        self._ids: Any = None
        self._reset()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors mean nothing in another process, and what was read is read there again.
        return {key: value for key, value in self.__dict__.items() if key not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._spans: dict[int, np.ndarray] = {}
        self._kept: OrderedDict[int, list[Any]] = OrderedDict()
        self._unpacked: _Descriptor | None = None
        self._unpacked_groups: set[int] = set()

    def image(self, row: int) -> np.ndarray:
        group = bisect_right(self._starts, row) - 1
        inside = row - self._starts[group]
        value = self._value(group, inside)
        if isinstance(value, np.ndarray):
            return value.copy()  # transforms may write in it, and may not in what was read
        image = decode_stored(value, self.spec)
        if image is None:
            shard = self._shards[self._groups[group][0]]
            raise VerificationError(f"{shard}, row group {group}: row {row} holds no picture of the release. {_ADVICE}")
        return image

    def sample_id(self, row: int) -> str:
        if self._ids is None:
            self.load_ids()
        return str(self._ids[row].as_py())

    def load_ids(self) -> None:
        """Read the ids of all rows; before workers begin, so that they share them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._ids is None:
            columns = []
            for shard in self._shards:
                with _damage_named(shard):
                    table = _parquet(shard).read(columns=["sample_id", "source_id"], use_threads=False)
                    columns.append(pc.coalesce(table["sample_id"], table["source_id"]))
            chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
            self._ids = pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())

    def _value(self, group: int, inside: int) -> Any:
        """A PNG's bytes, or the unpacked array."""
        spans = self._spans.get(group)
        if spans is None and group not in self._kept and group not in self._unpacked_groups:
            spans = self._open_group(group)
        if spans is not None:
            start, size = spans[inside]
            return os.pread(self._file(self._groups[group][0]), int(size), int(start))
        if group in self._unpacked_groups and self._unpacked is not None:
            shape = (self.spec.size, self.spec.size, self.spec.channels)
            size = self._array_bytes
            data = os.pread(self._unpacked.number, size, (self._starts[group] + inside) * size)
            return np.frombuffer(data, self.spec.dtype).reshape(shape)
        self._kept.move_to_end(group)
        return self._kept[group][inside]

    @property
    def _array_bytes(self) -> int:
        return self.spec.size**2 * self.spec.channels * np.dtype(self.spec.dtype).itemsize

    def _open_group(self, group: int) -> np.ndarray | None:
        from synthaug.formats.parquet_pages import DamagedPageError, NotPlainError, value_spans

        number, inside, chunk = self._groups[group]
        shard = self._shards[number]
        if chunk is not None:
            data = os.pread(self._file(number), chunk.size, chunk.start)
            try:
                self._spans[group] = value_spans(data, chunk)
                return self._spans[group]
            except DamagedPageError as error:
                raise VerificationError(f"{shard} is damaged: {error}. {_ADVICE}") from None
            except NotPlainError:
                pass  # another tool wrote it anew: pyarrow reads it
        with _damage_named(shard):
            values = _unpacked(_parquet(shard), inside)
        if isinstance(values[0], np.ndarray) and len(self) * self._array_bytes > _KEPT_BYTES:
            self._unpack(group, values)
        else:
            self._keep(group, values)
        return None

    def _unpack(self, group: int, values: list[Any]) -> None:
        try:
            if self._unpacked is None:
                number, name = tempfile.mkstemp(prefix="synthaug-loader-")
                self._unpacked = _Descriptor(number)
                os.unlink(name)
            # Where processes share the file, each writes the same at the same place.
            data, place = np.stack(values).tobytes(), self._starts[group] * self._array_bytes
            while data:
                written = os.pwrite(self._unpacked.number, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            raise LoaderError(
                f"images cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}. They take "
                f"{len(self) * self._array_bytes / 2**20:,.0f} MiB there; TMPDIR can name another place."
            ) from None
        self._unpacked_groups.add(group)

    def _keep(self, group: int, values: list[Any]) -> None:
        self._kept[group] = values
        while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > _KEPT_BYTES:
            self._kept.popitem(last=False)

    def _file(self, number: int) -> int:
        file = self._files.get(number)
        if file is None:
            try:
                file = self._files[number] = _Descriptor(os.open(self._shards[number], os.O_RDONLY))
            except OSError as error:
                raise VerificationError(f"{self._shards[number]} cannot be read: {error.strerror}. {_ADVICE}") from None
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file.number

    def _ranks(self, split: str, beginnings: dict[str, int], n_shards: int) -> np.ndarray:
        import pyarrow.parquet as pq

        from synthaug.formats.manifest import MANIFEST_FILE

        assert self.root is not None
        ranks = np.full(len(self.labels), -1, dtype=np.int32)
        if split != "train" or not n_shards:
            if self.synthetic.any():
                raise VerificationError(f"{self.name}: there are synthetic images in split {split}. {_ADVICE}")
            return ranks
        path = self.root / MANIFEST_FILE
        with _damage_named(path):
            table = pq.read_table(
                path,
                columns=["shard", "row", "label", "rank"],
                read_dictionary=["shard"],
                page_checksum_verification=True,
                use_threads=False,
            )
        shards = table["shard"].combine_chunks()
        names = shards.dictionary.to_pylist() if table.num_rows else []
        if unknown := [name for name in names if name not in beginnings]:
            raise VerificationError(f"{path} speaks of shard {printable(unknown[0])}, which is not there. {_ADVICE}")
        if table.num_rows:
            first = np.array([beginnings[name] for name in names], dtype=np.int64)
            places = first[shards.indices.to_numpy(zero_copy_only=False)] + table["row"].to_numpy()
            inside = (places >= 0) & (places < len(ranks))
            if inside.all():
                ranks[places] = table["rank"].to_numpy()
            wrong = not inside.all() or (self.labels[places] != table["label"].to_numpy()).any()
        else:
            wrong = False
        if wrong or table.num_rows != self.synthetic.sum() or ((ranks >= 0) != self.synthetic).any():
            raise VerificationError(
                f"{self.name}: the manifest has {table.num_rows} samples, the shards {int(self.synthetic.sum())}, or "
                f"they are not the same. 'synthaug verify' names the rows. {_ADVICE}"
            )
        return ranks


class TableRows:
    """Rows of a release that `datasets.load_dataset` has loaded, from the hub, say."""

    root: Path | None = None
    pixels: PixelSpec | None = None

    def __init__(self, table: Any, split: str) -> None:
        import datasets

        wanted = {"image", "label", "is_synthetic", "sample_id", "source_id"}
        label = table.features.get("label")
        if wanted - set(table.features) or not isinstance(label, datasets.ClassLabel):
            raise LoaderError(
                f"the dataset has the columns {printable(', '.join(table.features), width=200)}, which are not those "
                f"of a release of synthaug ({', '.join(sorted(wanted))}). Real images go to real=."
            )
        self.name = f"the loaded dataset, split {split}"
        self.classes = tuple(label.names)
        marks = table.select_columns(["label", "is_synthetic"]).with_format("numpy")[:]
        self.labels = np.asarray(marks["label"], dtype=np.int32)
        self.synthetic = np.asarray(marks["is_synthetic"], dtype=np.bool_)
        self.ranks = ranks_in_order(self.labels, self.synthetic)
        self._ids = table.select_columns(["sample_id", "source_id"])
        images = table.select_columns(["image"])
        self._png = isinstance(table.features["image"], datasets.Image)
        # `datasets` makes int64 of whole numbers.
        self._dtype = None if self._png else np.dtype(table.features["image"].dtype)
        self._images = (
            images.cast_column("image", datasets.Image(decode=False)) if self._png else images.with_format("numpy")
        )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> np.ndarray:
        value = self._images[int(row)]["image"]
        return decode_any(value, f"{self.name}, row {row}") if self._png else np.array(value, self._dtype)

    def sample_id(self, row: int) -> str:
        found = self._ids[int(row)]
        return str(found["sample_id"] if found["sample_id"] is not None else found["source_id"])


def ranks_in_order(labels: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Ranks of samples that have lost their manifest: a release stores those of a class in order of rank."""
    ranks = np.full(len(labels), -1, dtype=np.int32)
    for label in np.unique(labels[synthetic]):
        mine = np.flatnonzero(synthetic & (labels == label))
        ranks[mine] = np.arange(len(mine))
    return ranks


def decode_stored(data: bytes, spec: PixelSpec) -> np.ndarray | None:
    """A PNG that `encode_png` made of such an image, `[size, size, channels]`; None if it is another.

    OpenCV decodes these forms exactly, in half of Pillow's time; the bytes agreed with their checksum before.
    """
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if image is None:
        return None
    if image.ndim == 2:
        image = image[:, :, None]
    elif spec.channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    elif spec.channels == 4:
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)
    if image.shape != (spec.size, spec.size, spec.channels) or image.dtype != spec.dtype:
        return None
    return image


def decode_any(value: Any, where: str) -> np.ndarray:
    """A picture as a column of `datasets.Image(decode=False)` holds it, `[height, width, channels]`."""
    from synthaug.formats.pixels import Rejected, decode_picture

    try:
        if not isinstance(value, dict) or (value.get("bytes") is None and value.get("path") is None):
            raise Rejected("no picture", "the row has none")
        data = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        pixels = decode_picture(data, max_pixels=1 << 28).pixels
        return pixels if pixels.flags.writeable else pixels.copy()
    except (Rejected, OSError) as error:
        raise LoaderError(f"the picture of {where} cannot be decoded: {error}.") from None


class _Descriptor:
    """A file held open for as long as somebody has this."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True)
class _Columns:
    """What is read of a shard before any training."""

    labels: np.ndarray  # int32 [n]
    synthetic: np.ndarray  # bool [n]
    group_rows: list[int]
    chunks: list[Any] | None  # `Chunk`s of PNGs, one for each row group


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise VerificationError(f"{path} is damaged: {printable(str(error), width=200)}. {_ADVICE}") from error


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


def _read_columns(path: Path, classes: tuple[str, ...]) -> _Columns:
    from synthaug.formats.parquet_pages import plain_chunks

    with _damage_named(path), _parquet(path) as file:
        table = file.read(columns=["label", "is_synthetic"], use_threads=False)
        metadata = file.metadata
        labels = table["label"].to_numpy()
        if table["label"].null_count or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
            raise ValueError(f"a label is none of the {len(classes)} classes")
        return _Columns(
            labels.astype(np.int32),
            table["is_synthetic"].to_numpy().astype(np.bool_),
            [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)],
            plain_chunks(metadata, "image.bytes"),
        )


def _unpacked(file: Any, group: int) -> list[Any]:
    """Bytes or arrays of a row group."""
    import pyarrow as pa

    with file:
        column = file.read_row_group(group, columns=["image"], use_threads=False)["image"]
    values: list[Any] = []
    for chunk in column.chunks:
        if pa.types.is_struct(chunk.type):
            values += chunk.field("bytes").to_pylist()
        else:
            flat = chunk.storage
            for _ in chunk.type.shape:
                flat = flat.flatten()
            values += list(flat.to_numpy(zero_copy_only=False).reshape(len(chunk), *chunk.type.shape))
    return values


def _size(values: list[Any]) -> int:
    first = values[0] if values else b""
    return len(values) * (first.nbytes if isinstance(first, np.ndarray) else len(first or b"") + 64)


def _join(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


def _check_files(root: Path, files: dict[str, dict[str, Any]], *, verify: bool) -> None:
    from synthaug.formats.manifest import is_safe_name

    for name, stated in files.items():
        shown = printable(name, width=200)
        if not is_safe_name(name):
            raise VerificationError(f"release {root} lists {shown}, which lies outside of it. {_ADVICE}")
        try:
            size = (root / name).stat().st_size
            if size != stated["size"]:
                raise VerificationError(
                    f"release {root}: {shown} has {size} bytes, but {stated['size']} were written. {_ADVICE}"
                )
            if verify and digest_file(root / name) != stated["sha256"]:
                raise VerificationError(
                    f"release {root}: the content of {shown} has changed since it was written: another SHA-256. "
                    f"'synthaug verify' says more. {_ADVICE}"
                )
        except FileNotFoundError:
            raise VerificationError(f"release {root}: {shown} is missing. {_ADVICE}") from None
        except OSError as error:
            raise VerificationError(f"release {root}: {shown} cannot be read: {error.strerror}.") from None
