"""Folders of pictures: one folder a class, below folders of splits or not, or described by metadata files."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthaug.config import DatasetConfig
from synthaug.errors import DatasetError
from synthaug.formats.pixels import SUFFIXES
from synthaug.formats.source_rows import (
    Row,
    Rows,
    clean_text,
    given_split,
    group_of,
    is_missing,
    is_truthy,
    local_file,
    natural_order,
    require_column,
    split_of,
)
from synthaug.text import printable

_METADATA = ("metadata.csv", "metadata.jsonl")
# Left behind by desktops and archivers; nobody's pictures.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}

Record = dict[str, Any]


def open_folder(config: DatasetConfig) -> Rows:
    """Open a folder of pictures.

    The class of a picture is the name of the folder directly below the root (or below the split's folder),
    however deep the picture lies in it, unless a metadata file gives a label.

    Raises:
        DatasetError: Not a folder, folders of splits and of classes mixed, or metadata that cannot be read.
    """
    assert config.path is not None
    root = Path(config.path).resolve()
    if not root.is_dir():
        raise DatasetError(f"dataset.path {root} is not a folder. Format 'imagefolder' takes a folder of pictures.")
    parts = _parts(root, config)
    files = {part: _walk(folder, root) for part, folder in parts.items()}
    tables = {part: _metadata(folder, config) for part, folder in parts.items()}
    _check_metadata(tables, config, root)
    if not any(files.values()):
        raise DatasetError(f"the folder {root} holds no files. Put one folder of pictures per class into it.")

    def rows() -> Iterator[Row]:
        for part, folder in parts.items():
            yield from _rows(config, root, folder, part, files[part], tables[part])

    labelled = any(table and config.columns.label in next(iter(table.values())) for table in tables.values())
    return Rows(
        name=f"image folder {root.name}",
        open=rows,
        total=sum(map(len, files.values())),
        known_classes=() if labelled else tuple(_class_folders(parts)),
    )


def _parts(root: Path, config: DatasetConfig) -> dict[str | None, Path]:
    """Split to folder; the root itself under None where the folders directly below it are classes."""
    folders = _visible_folders(root)
    splits = {name: split_of(name) for name in folders}
    if not any(splits.values()):
        return {None: root}
    if _has_metadata(root):
        if config.columns.split is None:
            raise DatasetError(
                f"{root} has one metadata file for all splits, which does not say who is in which. Put one into the "
                "folder of each split, or name its column of splits in dataset.columns.split."
            )
        return {None: root}
    divided = [name for name in folders if splits[name] and _is_divided(root / name)]
    if all(splits.values()) and len(divided) == len(folders):
        if len(set(splits.values())) < len(splits):
            raise DatasetError(f"{root} has two folders for one split: {', '.join(folders)}. Join them.")
        return {given_split(name, str(root)): root / name for name in folders}
    if not divided and not all(splits.values()):
        return {None: root}  # 'train' beside 'car' and 'plane' is a class of pictures of trains
    strange = [name for name in folders if name not in divided]
    raise DatasetError(
        f"{root} mixes folders of splits ({', '.join(map(printable, divided)) or 'none with classes in it'}) and "
        f"others ({', '.join(map(printable, strange))}). Either every folder in it is a split with one folder a class "
        f"(or a metadata file) inside, or every folder is a class."
    )


def _is_divided(folder: Path) -> bool:
    return bool(_visible_folders(folder)) or _has_metadata(folder)


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _METADATA)


def _visible_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries
            if not _hidden(entry.name) and entry.is_dir(follow_symlinks=False)
        )  # fmt: skip


def _class_folders(parts: dict[str | None, Path]) -> list[str]:
    return natural_order(clean_text(name) for folder in parts.values() for name in _visible_folders(folder))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _walk(folder: Path, root: Path) -> list[str]:
    """Names of all visible files below a folder, relative to it, in order; metadata files at its top left out."""
    found: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=False, onerror=_refuse):
        below = os.path.relpath(place, folder)
        # A symbolic link to a folder is not walked into (it may lead out, or round in a circle); it becomes a
        # row of its own, so that the record says what was not read.
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(name for name in folders if not _hidden(name) and name not in links)
        for name in [*names, *links]:
            if not _hidden(name) and not (below == "." and name in _METADATA):
                found.append(name if below == "." else os.path.join(below, name))
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DatasetError(f"the folder {error.filename} cannot be read: {error.strerror}.") from error


def _metadata(folder: Path, config: DatasetConfig) -> dict[str, Record]:
    """File name to the record that a metadata file holds about it; empty without one."""
    present = [folder / name for name in _METADATA if (folder / name).is_file()]
    if not present:
        return {}
    if len(present) > 1:
        raise DatasetError(f"{folder} holds both {' and '.join(_METADATA)}. Keep one of them.")
    read = _read_csv if present[0].suffix == ".csv" else _read_json_lines
    records = read(present[0], config)
    table: dict[str, Record] = {}
    for number, record in enumerate(records, start=1):
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise DatasetError(f"record {number} of {present[0]} has no file_name. Every record needs one.")
        name = os.path.normpath(name) if not name.startswith(("/", "..")) and "://" not in name else name
        if name in table and table[name] != record:
            raise DatasetError(f"{present[0]} says two different things about {printable(name)!r}. Keep one of them.")
        table[name] = record
    return table


def _read_csv(path: Path, config: DatasetConfig) -> list[Record]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            require_column("file_name", "image", reader.fieldnames or [], str(path))
            records: list[Record] = [dict(record) for record in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not a table of comma-separated values in UTF-8: {error}.") from None
    label = config.columns.label
    labels = [record[label] for record in records if not is_missing(record.get(label))]
    # A table of text cannot say what is a number: a column of nothing but whole numbers is one of numbers.
    if labels and all(re.fullmatch(r"-?[0-9]+", value) for value in labels):
        for record in records:
            record[label] = None if is_missing(record.get(label)) else int(record[label])
    return records


def _read_json_lines(path: Path, config: DatasetConfig) -> list[Record]:
    records = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DatasetError(f"line {number} of {path} is not a JSON object.")
                records.append(record)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"line {len(records) + 1} of {path} is not JSON: {error}.") from None
    return records


def _check_metadata(tables: dict[str | None, dict[str, Record]], config: DatasetConfig, root: Path) -> None:
    """Columns that the settings name must be there."""
    columns = {name for table in tables.values() for record in table.values() for name in record}
    for setting in ("group", "subgroup", "split"):
        wanted = getattr(config.columns, setting)
        if wanted is not None:
            require_column(wanted, setting, columns, f"the metadata of {root}")


def _rows(
    config: DatasetConfig, root: Path, folder: Path, part: str | None, files: list[str], table: dict[str, Record]
) -> Iterator[Row]:
    for name in files:
        row = _row(config, root, folder, part, name, table.get(name), walked=True)
        if table and name not in table and row.problem is None:
            row = replace(row, problem=("not in the metadata", "the metadata file does not list it"))
        yield row
    for name in sorted(table.keys() - set(files)):
        yield _row(config, root, folder, part, name, table[name], walked=False)


def _row(
    config: DatasetConfig, root: Path, folder: Path, part: str | None, name: str, record: Record | None, *, walked: bool
) -> Row:
    columns, record = config.columns, record or {}
    path = folder / name
    # What the walk met is below the root; only links, and names out of a metadata file, can lead elsewhere.
    found = path if walked and not path.is_symlink() else local_file(name, folder, [root])
    problem = found if isinstance(found, tuple) else None
    if problem is None and os.path.splitext(name)[1].lower() not in SUFFIXES:
        problem = ("not an image file", f"its name ends in {os.path.splitext(name)[1]!r}")
    label = record.get(columns.label) if columns.label in record else _class_of(name)
    split, given = part, record.get(columns.split) if columns.split else None
    if not is_missing(given):
        split = given_split(given, f"column '{columns.split}' of {folder}")
    elif columns.split and problem is None:
        problem = ("no split", f"column '{columns.split}' is empty")
    origin = os.path.relpath(path, root) if part is not None else name
    return Row(
        origin=clean_text(origin),
        content=None if isinstance(found, tuple) else found,
        label=clean_text(label) if isinstance(label, str) else label,
        group=group_of(record.get(columns.group)) if columns.group else None,
        subgroup=group_of(record.get(columns.subgroup)) if columns.subgroup else None,
        split=split,
        is_synthetic=is_truthy(record.get("is_synthetic")),
        problem=problem,
    )


def _class_of(name: str) -> str | None:
    first, separator, _ = name.partition(os.sep)
    return first if separator else None
