"""What the forms of medical files share: folders and tables that may name patients, in messages that never do.

Class names, subgroups and splits are the user's choice and are quoted; names of files, keys of a table, paths are not.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthaug.config import Columns
from synthaug.digest import digest_json
from synthaug.errors import DatasetError
from synthaug.formats.pseudonyms import Pseudonyms
from synthaug.formats.source_rows import Row, clean_text, given_split, group_of, is_missing, is_truthy, require_column
from synthaug.text import printable

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}

Record = dict[str, Any]


def walk(root: Path, *, without: str | None = None) -> list[str]:
    """Names of all visible files below the root, relative to it, in order; links to folders are among them.

    Args:
        without: A file that is left out: a table that lies among the images.

    Raises:
        DatasetError: A folder cannot be read, or there are no files.
    """
    unreadable: list[OSError] = []
    found: list[str] = []
    for place, folders, names in os.walk(root, followlinks=False, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(name for name in folders if not _hidden(name) and name not in links)
        below = os.path.relpath(place, root)
        found += [os.path.normpath(os.path.join(below, name)) for name in [*names, *links] if not _hidden(name)]
    if unreadable:
        raise DatasetError(
            f"{len(unreadable)} folders below dataset.path cannot be read: {unreadable[0].strerror}. Give yourself the "
            "right to read them, or take them out."
        )
    if without is not None:
        table = Path(without).resolve()
        found = [name for name in found if (root / name).resolve() != table]
    if not found:
        raise DatasetError("the folder in dataset.path holds no files that could be read.")
    return sorted(found)


def private_fingerprint(form: str, root: Path, names: Iterable[str], table: str | None, pseudonyms: Pseudonyms) -> str:
    """The fingerprint of names, sizes and times, under the key of the pseudonyms: nobody else can try names out."""
    entries = [[clean_text(name), *_size_and_time(root / name)] for name in names]
    extra = None if table is None else [clean_text(table), *_size_and_time(table_file(table, form))]
    return f"{form}:{pseudonyms.digest('fingerprint', digest_json([clean_text(str(root)), entries, extra]))}"


def class_folders(root: Path) -> list[str]:
    """Names of the folders directly below the root."""
    with os.scandir(root) as entries:
        return sorted(
            clean_text(entry.name)
            for entry in entries
            if not _hidden(entry.name) and entry.is_dir(follow_symlinks=False)
        )


def class_of(name: str) -> str | None:
    """The folder directly below the root that a file lies in, or None."""
    first, separator, _ = name.partition(os.sep)
    return first if separator else None


def file_problem(root: Path, name: str) -> tuple[str, str] | None:
    """Why a name that was found is no file to read, or None."""
    path = root / name
    if not path.resolve().is_relative_to(root):
        return "outside the dataset", "a symbolic link leads out of dataset.path"
    if path.is_dir():
        return "a folder, no file", "links to folders are not followed"
    if not path.is_file():
        return "missing file", "a link to nothing, or no plain file"
    return None


def file_keys(names: Iterable[str], endings: tuple[str, ...] = ()) -> Callable[[str], list[str]]:
    """What a file may be called in a table: its path, or its bare name, with its ending or not, where one alone has it.

    Args:
        endings: Endings of two parts, such as .nii.gz.
    """
    several = Counter(os.path.basename(name) for name in names)

    def keys(name: str) -> list[str]:
        base = os.path.basename(name)
        if several[base] > 1:
            return [clean_text(name)]
        ending = next((ending for ending in endings if base.lower().endswith(ending)), os.path.splitext(base)[1])
        return [clean_text(name), clean_text(base), clean_text(base[: len(base) - len(ending)])]

    return keys


def labelled(columns: Columns, row: Row, record: Record | None, pseudonyms: Pseudonyms, form: str) -> Row:
    """A row with what a table says of it."""
    if record is None:
        return replace(row, problem=("not in the table", "the table of labels does not list it"))
    label, split, problem = record.get(columns.label), None, row.problem
    if columns.split is not None:
        if is_missing(given := record.get(columns.split)):
            problem = ("no split", f"column '{columns.split}' is empty")
        else:
            split = given_split(given, f"column '{columns.split}' of dataset.{form}.table")
    group = row.group
    if columns.group is not None:
        name = group_of(record.get(columns.group))
        group = None if name is None else pseudonyms.of("group", name)
    return replace(
        row,
        label=clean_text(label) if isinstance(label, str) else label,
        group=group,
        subgroup=group_of(record.get(columns.subgroup)) if columns.subgroup else None,
        split=split,
        is_synthetic=row.is_synthetic or is_truthy(record.get("is_synthetic")),
        problem=problem,
    )


def table_file(table: str, form: str) -> Path:
    """The file of a table.

    Raises:
        DatasetError: It does not exist.
    """
    file = Path(table)
    if not file.is_file():
        raise DatasetError(f"the file in dataset.{form}.table does not exist. Check the path in the configuration.")
    return file


def read_table(table: str, form: str, columns: Columns, key: str, key_column: str | None) -> dict[str, Record]:
    """Key to the record of a table of labels, CSV or Excel.

    Args:
        form: Name of the section of the settings that names the table.
        key: 'file', or the tag whose values are the keys.
        key_column: Column with the keys; named like `key` where it is None.

    Raises:
        DatasetError: It cannot be read, lacks a column, or says two things of one key. Rows are named by number.
    """
    file, where = table_file(table, form), f"the table in dataset.{form}.table"
    head, records = _read_excel(file, where) if file.suffix.lower() in (".xlsx", ".xlsm") else _read_csv(file, where)
    key_column = key_column or key
    if key_column not in head:
        raise DatasetError(
            f"{where} has no column '{key_column}' with what its rows speak of. It has: "
            f"{', '.join(map(printable, head)) or 'none'}. Set dataset.{form}.key_column."
        )
    for setting in ("label", "group", "subgroup", "split"):
        if (wanted := getattr(columns, setting)) is not None:
            require_column(wanted, setting, head, where)
    labels = [record[columns.label] for record in records if not is_missing(record.get(columns.label))]
    if labels and all(isinstance(label, str) and re.fullmatch(r"-?[0-9]+", label) for label in labels):
        # A table of text cannot say what is a number.
        for record in records:
            record[columns.label] = None if is_missing(record[columns.label]) else int(record[columns.label])
    found: dict[str, Record] = {}
    first: dict[str, int] = {}
    for number, record in enumerate(records, start=2):
        name = group_of(record.get(key_column))
        if name is None:
            raise DatasetError(f"row {number} of {where} has nothing in column '{key_column}'. Every row needs a key.")
        name = name.strip()
        if key == "file":
            name = os.path.normpath(name.replace("\\", "/"))
        if name in found and found[name] != record:
            raise DatasetError(f"rows {first[name]} and {number} of {where} say two different things of one key.")
        found[name], first[name] = record, first.get(name, number)
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1  # a dangling link; it is set aside when it is read
    return found.st_size, found.st_mtime_ns


def _read_csv(file: Path, where: str) -> tuple[list[str], list[Record]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            head = list(reader.fieldnames or [])
            return head, [dict(record) for record in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        name = type(error).__name__
        raise DatasetError(f"{where} is not a table of comma-separated values in UTF-8 ({name}).") from None
    except OSError as error:
        raise DatasetError(f"{where} cannot be read: {error.strerror}.") from None


def _read_excel(file: Path, where: str) -> tuple[list[str], list[Record]]:
    try:
        import openpyxl
    except ImportError:
        raise DatasetError(
            f"{where} is an Excel file, which takes openpyxl. Install it with: pip install 'synthaug[excel]', or save "
            "the table as CSV."
        ) from None
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        try:
            rows = [list(row) for row in book.worksheets[0].iter_rows(values_only=True)]
        finally:
            book.close()
    except Exception as error:  # not a zip, not a workbook, not whole; the words may quote cells
        raise DatasetError(f"{where} is not an Excel workbook that can be read ({type(error).__name__}).") from None
    rows = [row for row in rows if not all(is_missing(value) for value in row)]
    if not rows:
        return [], []
    head = ["" if value is None else str(value) for value in rows[0]]
    return head, [dict(zip(head, row, strict=False)) for row in rows[1:]]
