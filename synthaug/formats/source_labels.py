"""Labels as sources spell them, turned into classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from synthaug.errors import DatasetError
from synthaug.formats.source_rows import Label, clean_text, is_missing, natural_order
from synthaug.text import printable

_KINDS = {bool: "true or false", int: "whole number", str: "text", float: "fraction"}


class Labels:
    """Checks labels one by one, and gives all of them an index in the end.

    Args:
        names: Names of the labels 0, 1, 2 … as the source has them (a ClassLabel).
        known: Classes that are there whether or not they have an image (folders).
        class_names: Names of whole-number labels, from the settings.
    """

    def __init__(
        self, names: Sequence[str] | None, known: Sequence[str] = (), class_names: Sequence[str] | None = None
    ) -> None:
        if class_names is not None and len(set(class_names)) < len(class_names):
            twice = [name for name, count in Counter(class_names).items() if count > 1]
            raise DatasetError(f"dataset.class_names has {printable(twice[0])!r} more than once. Names must differ.")
        if names is not None and class_names is not None and list(names) != list(class_names):
            raise DatasetError(
                f"the source names its classes itself ({', '.join(map(printable, names))}), and dataset.class_names "
                "says otherwise. Remove dataset.class_names."
            )
        self._from_source = names is not None
        given = names if names is not None else class_names
        self._names = None if given is None else tuple(clean_text(name) for name in given)
        self._known = tuple(clean_text(name) for name in known)
        self._kinds: Counter[str] = Counter()
        self._example: dict[str, Label] = {}

    def check(self, label: Label | bytes) -> tuple[int | str | bool | float | None, tuple[str, str] | None]:
        """The label in plain form, and why it cannot be used: (reason, detail), or None.

        Raises:
            DatasetError: The label is a list: several labels for one image.
        """
        if isinstance(label, (list, dict)):
            raise DatasetError(
                f"a label is {str(label)[:80]}: several labels for one image are not supported. Name a column with one "
                "class an image in dataset.columns.label."
            )
        if label is not None and not isinstance(label, (bool, int, float, str, bytes)):
            raise DatasetError(
                f"a label is {label!r:.80}, a {type(label).__name__}, and no class. Name a column with classes in "
                "dataset.columns.label."
            )
        plain = _plain(label)
        if plain is None or (self._from_source and plain == -1 and not isinstance(plain, bool)):
            return None, ("missing label", "the row has no label")
        kind = _KINDS[type(plain)]
        self._kinds[kind] += 1
        self._example.setdefault(kind, plain)
        if self._names is not None and not isinstance(plain, float):
            return plain, self._outside(plain)
        return plain, None

    def finish(self, labels: Sequence[int | str | bool | float]) -> tuple[tuple[str, ...], np.ndarray]:
        """The names of the classes, and for each of the labels its index in them (int64).

        Raises:
            DatasetError: Labels of several kinds, or fractions.
        """
        if len(self._kinds) > 1:
            counts = ", ".join(f"{n} × {kind} ({self._example[kind]!r:.40})" for kind, n in sorted(self._kinds.items()))
            raise DatasetError(f"the labels are of mixed type: {counts}. Spell all labels in one way.")
        if _KINDS[float] in self._kinds:
            value = self._example[_KINDS[float]]
            raise DatasetError(
                f"the labels are fractions, such as {value!r}, not classes. Name a column of classes in "
                "dataset.columns.label."
            )
        if self._names is not None:
            indices = [self._index(label) for label in labels]
            return self._names, np.array(indices, dtype=np.int64)
        texts = [_spelled(label) for label in labels]
        classes = natural_order([*texts, *(self._known if _KINDS[int] not in self._kinds else ())])
        position = {name: index for index, name in enumerate(classes)}
        return tuple(classes), np.array([position[text] for text in texts], dtype=np.int64)

    def _outside(self, label: int | str | bool) -> tuple[str, str] | None:
        assert self._names is not None
        index = self._index(label)
        if index is None:
            return "unknown label", f"{label!r:.80} is none of the {len(self._names)} names of classes"
        if not 0 <= index < len(self._names):
            return "label out of range", f"{index}; the {len(self._names)} classes are 0 to {len(self._names) - 1}"
        return None

    def _index(self, label: int | str | bool | float) -> int | None:
        assert self._names is not None
        if not isinstance(label, str):
            return int(label)
        if label in self._names:
            return self._names.index(label)
        # Folders and tables of text spell whole numbers as text.
        return int(label) if re.fullmatch(r"-?[0-9]+", label) else None


def _plain(label: Label | bytes) -> int | str | bool | float | None:
    if isinstance(label, bytes):
        label = label.decode("utf-8", "backslashreplace")
    if is_missing(label):
        return None
    if isinstance(label, str):
        return clean_text(label)
    if isinstance(label, float):
        # Tables turn whole numbers into floats as soon as one of them is missing.
        return int(label) if label.is_integer() else label
    assert isinstance(label, (int, bool))
    return label


def _spelled(label: int | str | bool | float) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)
