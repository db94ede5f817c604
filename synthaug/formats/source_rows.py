"""What every input form is turned into: rows of a picture, a label and what belongs to them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.errors import DatasetError
from synthaug.formats.pixels import Picture
from synthaug.text import printable

Label = int | str | bool | float | list | None

_ALIASES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row of a source, its picture not decoded yet."""

    origin: str  # where the picture was found, in words that people can follow
    # An encoded picture, a file that holds one, its array, or what decodes it, given the most pixels it may have.
    content: bytes | Path | np.ndarray | Callable[[int], Picture] | None
    label: Label = None
    group: str | None = None
    subgroup: str | None = None
    split: str | None = None  # train, validation or test
    is_synthetic: bool = False
    problem: tuple[str, str] | None = None  # reason and detail, where the row cannot be used


@dataclass(frozen=True)
class Rows:
    """A source that was found and opened."""

    name: str  # words for where the data came from
    open: Callable[[], Iterator[Row]]  # the rows from the start, always in the same order
    total: int | None = None
    class_names: tuple[str, ...] | None = None  # names of the labels 0, 1, 2 …, where the source has them
    known_classes: tuple[str, ...] = ()  # names of classes that may have no picture at all: folders
    # The dtype of pictures given as whole-number arrays of more than 16 bits (or signed) is chosen from all values.
    wide_numbers: bool = False
    conversion: str | None = None  # what was done to every picture, in words
    licence: str | None = None
    citation: str | None = None
    note: str = ""  # a sentence for errors that name an origin: what helps to find it


def split_of(name: Any) -> str | None:
    """The split that a name stands for, or None where it stands for none."""
    return _ALIASES.get(str(name).strip().lower())


def given_split(name: Any, where: str) -> str:
    """The split that a name stands for.

    Raises:
        DatasetError: It stands for none.
    """
    split = split_of(name)
    if split is None:
        raise DatasetError(
            f"{where} names a split {printable(str(name))!r}, and nobody knows whether that may be trained on. "
            f"Known names: {', '.join(_ALIASES)}. Rename it, or remove it from the dataset."
        )
    return split


def is_missing(value: Any) -> bool:
    """None, NaN, or a text with nothing in it."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def group_of(value: Any) -> str | None:
    """A group or subgroup as text; 3, 3.0 and '3' are the same group."""
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return clean_text(str(value))


def is_truthy(value: Any) -> bool:
    """Whether a mark such as is_synthetic is set, however a table may spell it."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "t", "yes", "y", "1", "1.0")
    return not is_missing(value) and bool(value)


def clean_text(text: str) -> str:
    """The text with what cannot be written as UTF-8 (odd file names) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted; by value if all are whole numbers."""
    unique = sorted(set(names))
    return sorted(unique, key=int) if all(re.fullmatch(r"-?[0-9]+", name) for name in unique) else unique


def require_column(wanted: str, setting: str, columns: Iterable[str], where: str) -> None:
    """Refuse a column that is not there.

    Raises:
        DatasetError: With the nearest column named.
    """
    columns = list(columns)
    if wanted in columns:
        return
    near = difflib.get_close_matches(wanted, columns, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"It has: {', '.join(map(printable, columns)) or 'none'}."
    raise DatasetError(f"{where} has no column '{wanted}'. {hint} Set dataset.columns.{setting}.")


def local_file(name: str, folder: Path, roots: Iterable[Path]) -> Path | tuple[str, str]:
    """The file that `name` (relative to `folder`) stands for, or why it is not used: (reason, detail).

    Only files below one of the `roots` are used: a dataset must not be able to reach into the rest of the
    machine, by an absolute path, by '..' or by a symbolic link.
    """
    if "://" in name:
        return "not a local file", f"{name!r}; pictures are not fetched from addresses inside a dataset"
    if "\0" in name:
        return "missing file", repr(name)
    path = (folder / name).resolve()
    if not any(path.is_relative_to(root) for root in roots):
        return "outside the dataset", f"{name!r} leads to {path}"
    if path.is_dir():
        return "a folder, no file", f"{name!r}; links to folders are not followed"
    return path if path.is_file() else ("missing file", f"{name!r} does not exist")
