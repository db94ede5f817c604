"""Sources that are Arrow tables: parquet files, and Hugging Face datasets from the hub or from disk."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.config import Columns, DatasetConfig
from synthaug.errors import DatasetError
from synthaug.formats.source_rows import (
    Row,
    Rows,
    given_split,
    group_of,
    is_missing,
    is_truthy,
    local_file,
    require_column,
    split_of,
)

# Rows taken out of a table at once. Few, since pictures can be large.
_BATCH = 32
_PARQUET = (".parquet", ".pq")
_STREAMED: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
_SYNTHETIC = "is_synthetic"


@dataclass(frozen=True)
class _Place:
    """What the rows of one table have in common."""

    name: str
    split: str | None
    folder: Path  # where relative names of picture files start
    roots: tuple[Path, ...]  # folders that picture files may lie in


# ---------------------------------------------------------------- parquet


def open_parquet(config: DatasetConfig) -> Rows:
    """Open parquet files: one, all below a directory, or those that a pattern (`*`, `**`) matches.

    Where there are several files and all of them (or their folders) are named after splits, as in
    `train-00000-of-00002.parquet`, those are the given splits.

    Raises:
        DatasetError: No file, a damaged file, a column missing, or only some of the names speak of splits.
    """
    import pyarrow.parquet as pq

    assert config.path is not None
    base, files = parquet_files(config.path)
    if not files:
        raise DatasetError(f"no parquet file at {config.path}. Give a .parquet file, a directory of them or a pattern.")
    splits = _splits_of_files(base, files, config)
    total, features, wide = 0, None, False
    for file in files:
        with _readable(file), pq.ParquetFile(file) as table:
            total += table.metadata.num_rows
            schema = table.schema_arrow
        _require(config.columns, schema.names, str(file))
        features = features or _features(schema)
        wide = wide or _is_wide(schema.field(config.columns.image).type)

    def rows() -> Iterator[Row]:
        for file, split in zip(files, splits, strict=True):
            place = _Place(os.path.relpath(file, base), split, file.parent, (base,))
            # Row groups are streamed, not loaded; checksums of pages are held against them where there are any.
            with _readable(file), pq.ParquetFile(file, **_STREAMED) as table:
                present = [name for name in _wanted(config.columns) if name in table.schema_arrow.names]
                yield from _from_batches(table.iter_batches(batch_size=_BATCH, columns=present), config.columns, place)

    return Rows(
        name=f"parquet {Path(config.path).name}",
        open=rows,
        total=total,
        class_names=_class_names(features, config.columns.label),
        wide_numbers=wide,
        licence=_licence_of(base / "README.md"),
    )


def parquet_files(path: str) -> tuple[Path, list[Path]]:
    """The directory that the files lie below, and the files, in order."""
    place = Path(path)
    if place.is_file():
        return place.parent.resolve(), [place.resolve()]
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.suffix.lower() in _PARQUET]
        base = place
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if name.lower().endswith(_PARQUET)]
        base = fixed_part(path)
    hidden = [file for file in found if any(part.startswith(".") for part in file.relative_to(base).parts)]
    return base.resolve(), sorted(file.resolve() for file in set(found) - set(hidden) if file.is_file())


def fixed_part(pattern: str) -> Path:
    """The directory before the first wildcard of a pattern."""
    parts = Path(pattern).parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed]) if fixed else Path()


def _splits_of_files(base: Path, files: list[Path], config: DatasetConfig) -> list[str | None]:
    if config.columns.split is not None or len(files) == 1:
        return [None] * len(files)
    splits = [_split_of_file(base, file) for file in files]
    if None in splits and any(splits):
        odd = os.path.relpath(files[splits.index(None)], base)
        raise DatasetError(
            f"some parquet files below {base} are named after splits, but '{odd}' is not. Rename it, remove it, or "
            "name the column of splits in dataset.columns.split."
        )
    return splits


def _split_of_file(base: Path, file: Path) -> str | None:
    folder = file.parent.name if file.parent != base else ""
    return split_of(re.split(r"[-_.]", file.stem, maxsplit=1)[0]) or split_of(folder)


class _readable:
    """Turn what Arrow says about a damaged file into a DatasetError that names it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowException, OSError)):
            raise DatasetError(f"parquet file {self.file} cannot be read: {error}. Fetch or write it again.") from error


def _features(schema: Any) -> Any:
    """What the Hugging Face metadata of a parquet file says about its columns, if it has any."""
    if not schema.metadata or b"huggingface" not in schema.metadata:
        return None
    from datasets import Features

    return Features.from_arrow_schema(schema)


# ---------------------------------------------------------------- Hugging Face


def open_hub(config: DatasetConfig, commit: str) -> Rows:
    """Open a dataset of the hub at a commit. No code of the dataset is ever run.

    Raises:
        DatasetError: It cannot be fetched (and is not in the cache), or its columns or splits do not fit.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    assert config.path is not None
    loaded = _load(config.path, f"dataset {config.path} of the hub", name=config.name, revision=commit)
    roots = (Path(constants.HF_HUB_CACHE).resolve(), *_caches())
    rows = _from_datasets(config, loaded, f"{config.path} at {commit[:12]} of the hub", roots)
    card = try_to_load_from_cache(config.path, "README.md", revision=commit, repo_type="dataset")
    return replace(rows, licence=rows.licence or (_licence_of(Path(card)) if isinstance(card, str) else None))


def open_directory(config: DatasetConfig) -> Rows:
    """Open a directory that `load_dataset` understands."""
    folder = _existing_folder(config, "a directory for load_dataset")
    loaded = _load(str(folder), f"directory {folder}", name=config.name)
    if set(_columns(loaded)) == {config.columns.image}:
        # load_dataset takes a folder of pictures with one class folder for one without classes.
        loaded = _load(str(folder), f"directory {folder}", name=config.name, drop_labels=False)
    return _from_datasets(config, loaded, f"dataset directory {folder.name}", (folder, *_caches()), folder)


def open_saved(config: DatasetConfig) -> Rows:
    """Open a directory that `save_to_disk` wrote."""
    from datasets import load_from_disk

    folder = _existing_folder(config, "a directory of save_to_disk")
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # Arrow, JSON and OS errors, depending on which file is damaged
        raise DatasetError(f"{folder} cannot be opened as a directory of save_to_disk: {_words(error)}") from error
    return _from_datasets(config, loaded, f"saved dataset {folder.name}", (folder,), folder)


def _existing_folder(config: DatasetConfig, what: str) -> Path:
    assert config.path is not None
    folder = Path(config.path).resolve()
    if not folder.is_dir():
        raise DatasetError(f"dataset.path {folder} is not a directory. Format '{config.format}' takes {what}.")
    return folder


def _load(path: str, what: str, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, **options)
    except Exception as error:  # connection, hub, builder, Arrow and OS errors have no class in common
        raise DatasetError(f"{what} cannot be loaded: {_words(error)}") from error


def _columns(loaded: Any) -> list[str]:
    from datasets import DatasetDict

    tables = loaded.values() if isinstance(loaded, DatasetDict) else [loaded]
    return [name for table in tables for name in table.column_names]


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def _caches() -> tuple[Path, ...]:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(datasets.config.DOWNLOADED_DATASETS_PATH).resolve())


def _from_datasets(
    config: DatasetConfig, loaded: Any, name: str, roots: tuple[Path, ...], folder: Path | None = None
) -> Rows:
    from datasets import DatasetDict

    tables: dict[str | None, Any] = loaded if isinstance(loaded, DatasetDict) else {None: loaded}
    splits: dict[str | None, str | None] = {}
    for key, table in tables.items():
        _require(config.columns, table.column_names, name)
        splits[key] = None if key is None or config.columns.split else given_split(key, name)
    taken = [split for split in splits.values() if split]
    if len(set(taken)) < len(taken):
        raise DatasetError(f"{name} has two splits for one: {', '.join(map(str, tables))}. Remove or rename one.")
    features = [table.features for table in tables.values()]
    first = next(iter(tables.values()))
    names = {_class_names(item, config.columns.label) for item in features}
    if len(names) > 1:
        raise DatasetError(f"the splits of {name} name their classes differently. Save it with one list of names.")

    def rows() -> Iterator[Row]:
        for key, table in tables.items():
            place = _Place(str(key or "rows"), splits[key], folder or roots[0], roots)
            present = [column for column in _wanted(config.columns) if column in table.column_names]
            batches = table.select_columns(present).with_format("arrow").iter(batch_size=_BATCH)
            yield from _from_batches(batches, config.columns, place)

    return Rows(
        name=name,
        open=rows,
        total=sum(len(table) for table in tables.values()),
        class_names=names.pop(),
        wide_numbers=any(_is_wide(item.arrow_schema.field(config.columns.image).type) for item in features),
        licence=first.info.license or (_licence_of(folder / "README.md") if folder else None),
        citation=first.info.citation or None,
    )


def _licence_of(card: Path) -> str | None:
    """The licence that a dataset card states."""
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        licence = (metadata_load(card) or {}).get("license")
    except Exception:  # a README that is no card is no reason to stop
        return None
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)


# ---------------------------------------------------------------- rows out of tables


def _require(columns: Columns, present: list[str], where: str) -> None:
    for setting in ("image", "label", "group", "subgroup", "split"):
        wanted = getattr(columns, setting)
        if wanted is not None:
            require_column(wanted, setting, present, where)


def _wanted(columns: Columns) -> list[str]:
    names = [columns.image, columns.label, columns.group, columns.subgroup, columns.split, _SYNTHETIC]
    return list(dict.fromkeys(name for name in names if name is not None))


def _class_names(features: Any, label: str) -> tuple[str, ...] | None:
    feature = None if features is None else features.get(label)
    names = getattr(feature, "names", None)
    return tuple(names) if names else None


def _from_batches(batches: Iterable[Any], columns: Columns, place: _Place) -> Iterator[Row]:
    number = 0
    for batch in batches:
        values = {name: batch.column(name).to_pylist() for name in batch.schema.names if name != columns.image}
        images = batch.column(columns.image)
        for row in range(batch.num_rows):
            origin = f"{place.name}[{number}]"
            yield _row(origin, images[row], {name: column[row] for name, column in values.items()}, columns, place)
            number += 1


def _row(origin: str, image: Any, values: dict[str, Any], columns: Columns, place: _Place) -> Row:
    content, problem = _content(image, place)
    split = place.split
    if columns.split is not None:
        given = values[columns.split]
        split = None if is_missing(given) else given_split(given, f"column '{columns.split}'")
        if split is None and problem is None:
            problem = ("no split", f"column '{columns.split}' is empty")
    return Row(
        origin=origin,
        content=content,
        label=values[columns.label],
        group=group_of(values[columns.group]) if columns.group else None,
        subgroup=group_of(values[columns.subgroup]) if columns.subgroup else None,
        split=split,
        is_synthetic=is_truthy(values.get(_SYNTHETIC)),
        problem=problem,
    )


def _content(value: Any, place: _Place) -> tuple[Any, tuple[str, str] | None]:
    """The picture in one cell of a table: bytes, a file or an array; or why there is none."""
    import pyarrow as pa

    kind = value.type
    if isinstance(kind, pa.ExtensionType):
        value, kind = value.value, kind.storage_type
    if value is None or not value.is_valid:
        return None, ("no picture", "the cell is empty")
    if pa.types.is_struct(kind):
        cell = value.as_py()
        if cell.get("bytes") is not None:
            return cell["bytes"], None
        return _file(cell.get("path"), place)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return value.as_py(), None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _file(value.as_py(), place)
    if _is_list(kind):
        return _array(value)
    raise DatasetError(
        f"the column of images holds {kind}, which is no picture. Expected an Image, encoded bytes, or lists of "
        "numbers. Set dataset.columns.image."
    )


def _file(name: str | None, place: _Place) -> tuple[Path | None, tuple[str, str] | None]:
    if not name:
        return None, ("no picture", "the cell is empty")
    found = local_file(name, place.folder, place.roots)
    return (None, found) if isinstance(found, tuple) else (found, None)


def _array(value: Any) -> tuple[np.ndarray | None, tuple[str, str] | None]:
    """Nested lists of numbers as an array, without a detour over Python's numbers."""
    import pyarrow.compute as pc

    cells, shape = value.values, [len(value.values)]
    while _is_list(cells.type):
        lengths = pc.unique(pc.list_value_length(cells))
        if len(lengths) > 1 or cells.null_count:
            return None, ("wrong shape", "its lists are of different lengths")
        if len(lengths) == 0:
            return None, ("wrong shape", "its lists are empty")
        cells = cells.flatten()
        shape.append(lengths[0].as_py())
    if cells.null_count:
        return None, ("missing values", f"{cells.null_count} values of the picture are null")
    return cells.to_numpy(zero_copy_only=False).reshape(shape), None


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_wide(kind: Any) -> bool:
    """Whether pictures are lists of whole numbers of a type that no picture has."""
    import pyarrow as pa

    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    while _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) and kind not in (pa.uint8(), pa.uint16()))
