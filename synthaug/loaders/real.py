"""Where the real images of a mix come from: the release itself, or what the user has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synthaug.errors import LoaderError
from synthaug.loaders.mixing import nearest
from synthaug.loaders.rows import Rows, decode_any
from synthaug.records import DONE_FILE, IMAGES_FILE, SPLITS_FILE
from synthaug.text import printable


class Real(Protocol):
    """Real images with the labels of the release."""

    name: str
    labels: np.ndarray  # int64 [n], in the release's classes

    def image(self, row: int) -> Any:
        """The picture, `[height, width, channels]` in native values."""

    def sample_id(self, row: int) -> str:
        """What tells the image from others."""


def open_real(real: Any, rows: Rows, *, split: str, columns: tuple[str, str], classes: Sequence[str] | None) -> Real:
    """The real images to mix with.

    Args:
        real: None: those of the release. A `datasets.Dataset`; a torch map-style dataset of (image, label); or the
            path of the run folder that the release came out of, whose `split` is taken.
        columns: Names of the image and label columns of a `datasets.Dataset`.
        classes: Names of the labels 0, 1, 2 … of `real`, where it does not say them itself.

    Raises:
        LoaderError: There are no real images, or their labels cannot be matched with the release's by name.
    """
    if real is None:
        if rows.synthetic.all():
            raise LoaderError(
                f"{rows.name} holds no real images in split {split} (release.include_real was false). Give them as "
                "real=: a datasets.Dataset, a torch dataset of (image, label), or the run folder."
            )
        return ReleaseReal(rows)
    if isinstance(real, str | os.PathLike):
        return RunReal(Path(real).expanduser(), rows, split)
    if isinstance(real, dict):
        raise LoaderError(f"real= has the splits {printable(', '.join(map(str, real)))}: give one of them.")
    if hasattr(real, "features") and hasattr(real, "select_columns"):
        return TableReal(real, rows, columns, classes)
    if hasattr(real, "__getitem__") and hasattr(real, "__len__"):
        return TorchReal(real, rows, classes)
    raise LoaderError(
        f"real= is a {type(real).__name__}; it must be a datasets.Dataset, a torch map-style dataset of (image, "
        "label), or the path of a run folder. A stream has no length to mix by."
    )


def by_name(names: Sequence[str], classes: Sequence[str], what: str) -> np.ndarray:
    """Labels of the release for labels 0, 1, 2 … of other data, int64 `[len(names)]`; -1 for names it has not.

    Raises:
        LoaderError: No name is shared, or names differ in case or spaces alone, which is hardly meant.
    """
    known = {name: label for label, name in enumerate(classes)}
    folded = {name.casefold().strip(): name for name in classes}
    for name in names:
        twin = folded.get(name.casefold().strip())
        if name not in known and twin is not None:
            raise LoaderError(
                f"{what} has class '{printable(name)}' and the release '{printable(twin)}': names must match exactly. "
                "Give the names as classes=[…], spelt as in the release."
            )
    found = np.array([known.get(name, -1) for name in names], dtype=np.int64)
    if not (found >= 0).any():
        raise LoaderError(f"{what} has class '{printable(names[0]) if names else ''}'{nearest(str(names[0]), classes)}")
    return found


def names_of(dataset: Any, classes: Sequence[str] | None, what: str) -> list[str]:
    """Class names of a dataset: those given, or its `classes` as torchvision's have them, or its ClassLabel's.

    Raises:
        LoaderError: It does not say.
    """
    found = classes if classes is not None else getattr(dataset, "classes", None)
    if found is None or isinstance(found, str) or not all(isinstance(name, str) for name in found):
        raise LoaderError(
            f"{what} does not say what its labels are called, and labels are matched by name. Give the names of labels "
            "0, 1, 2 … as classes=[…]."
        )
    if len(set(found)) != len(found):
        raise LoaderError(f"{what}: a class name occurs twice in {printable(', '.join(found), width=200)}.")
    return list(found)


def labels_of(dataset: Any, n_classes: int, what: str) -> np.ndarray:
    """Labels of a map-style dataset, int64 `[n]`: its `targets` or `labels`, or else every item is read once.

    Raises:
        LoaderError: An item is not (image, label), or a label is not 0..n_classes-1.
    """
    n = len(dataset)
    stated = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if stated is None:
        stated = []
        for row in range(n):
            item = dataset[row]
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise LoaderError(f"item {row} of {what} is not (image, label), but a {type(item).__name__}.")
            stated.append(item[1])
    try:
        # One label an image, also where each is an array of one, as MedMNIST has them.
        labels = np.asarray([int(np.asarray(label).item()) for label in stated], dtype=np.int64)
    except (TypeError, ValueError):
        raise LoaderError(f"the labels of {what} are not whole numbers (first: {stated[0]!r:.60}).") from None
    if len(labels) != n:
        raise LoaderError(f"{what} has {n} items and {len(labels)} labels.")
    if n and not 0 <= labels.min() <= labels.max() < n_classes:
        raise LoaderError(
            f"{what} has labels from {labels.min()} to {labels.max()}, but {n_classes} class names: labels are the "
            "positions of their names."
        )
    return labels


def as_array(image: Any) -> np.ndarray:
    """A picture as `[height, width, channels]`: of a PIL image, an array, or a tensor with channels first."""
    if hasattr(image, "detach") and hasattr(image, "numpy"):
        array = image.detach().cpu().numpy()
        return np.moveaxis(array, 0, -1) if array.ndim == 3 else array[..., None]
    array = image if isinstance(image, np.ndarray) else np.array(image)
    return array[..., None] if array.ndim == 2 else array


class ReleaseReal:
    """The real rows of the release."""

    def __init__(self, rows: Rows) -> None:
        self.name = rows.name
        self._rows = rows
        self._places = np.flatnonzero(~rows.synthetic)
        self.labels = rows.labels[self._places].astype(np.int64)

    def image(self, row: int) -> np.ndarray:
        return self._rows.image(int(self._places[row]))

    def sample_id(self, row: int) -> str:
        return self._rows.sample_id(int(self._places[row]))


class TableReal:
    """A `datasets.Dataset` of the user's."""

    def __init__(self, table: Any, rows: Rows, columns: tuple[str, str], classes: Sequence[str] | None) -> None:
        import datasets

        image, label = columns
        self.name = "the dataset given as real="
        if missing := [name for name in columns if name not in table.features]:
            raise LoaderError(
                f"{self.name} has no column {printable(missing[0])}; it has "
                f"{printable(', '.join(table.features), width=200)}. Name them as real_columns=('image', 'label')."
            )
        if "is_synthetic" in table.features and any(table.select_columns(["is_synthetic"])[:]["is_synthetic"]):
            raise LoaderError(f"{self.name} holds rows marked is_synthetic. Filter them out: real= takes real images.")
        feature, values = table.features[label], table.select_columns([label])[:][label]
        if classes is None and isinstance(feature, datasets.ClassLabel):
            classes = feature.names
        if classes is None and all(isinstance(value, str) for value in values):
            classes = sorted(set(values))
            values = [classes.index(value) for value in values]
        found = by_name(names_of(None, classes, self.name), rows.classes, self.name)
        self.labels = _known(found, np.asarray(values), list(classes or ()), self.name)
        self._column = image
        self._images = table.select_columns([image])
        self._png = isinstance(table.features[image], datasets.Image)
        # `datasets` makes int64 of whole numbers; what an array column says of itself is what was stored.
        self._dtype = getattr(table.features[image], "dtype", None) if not self._png else None
        self._images = (
            self._images.cast_column(image, datasets.Image(decode=False))
            if self._png
            else self._images.with_format("numpy")
        )

    def image(self, row: int) -> np.ndarray:
        value = self._images[int(row)][self._column]
        return decode_any(value, f"{self.name}, row {row}") if self._png else as_array(np.array(value, self._dtype))

    def sample_id(self, row: int) -> str:
        return f"real-{row}"


class TorchReal:
    """A torch map-style dataset of (image, label), the image untransformed."""

    def __init__(self, dataset: Any, rows: Rows, classes: Sequence[str] | None) -> None:
        self.name = f"the {type(dataset).__name__} given as real="
        names = names_of(dataset, classes, self.name)
        labels = labels_of(dataset, len(names), self.name)
        self.labels = _known(by_name(names, rows.classes, self.name), labels, names, self.name)
        self._dataset = dataset

    def image(self, row: int) -> np.ndarray:
        return as_array(self._dataset[row][0])

    def sample_id(self, row: int) -> str:
        return f"real-{row}"


class RunReal:
    """A split of the source of a run, as its stages have left it."""

    def __init__(self, run: Path, rows: Rows, split: str) -> None:
        import pandas as pd

        self.name = f"run folder {run}"
        source, splits = self._stages(run, rows)
        if tuple(source["record"]["classes"]) != rows.classes:
            raise LoaderError(f"the classes of {self.name} are not those of {rows.name}.")
        table = pd.read_parquet(splits["directory"] / SPLITS_FILE)
        table = table[(table["split"] == split) & table["held_back"].isna()].sort_values("row")
        self.labels = table["label"].to_numpy(np.int64)
        self._rows, self._ids = table["row"].to_numpy(np.int64), table["image_id"].tolist()
        self._path = source["directory"] / IMAGES_FILE
        self._images: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}

    def __del__(self) -> None:
        if getattr(self, "_images", None) is not None:
            self._images.__exit__()

    def image(self, row: int) -> np.ndarray:
        if self._images is None:
            from synthaug.formats.shards import StoredImages

            self._images = StoredImages(self._path)
        image: np.ndarray = self._images[int(self._rows[row])].copy()
        return image

    def sample_id(self, row: int) -> str:
        return str(self._ids[row])

    def _stages(self, run: Path, rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
        """The read and split stages that the release was made from, by their digests in the release stage's key."""
        done = []
        for path in sorted(run.glob(f"stages/*/{DONE_FILE}")):
            try:
                done.append({**json.loads(path.read_text(encoding="utf-8")), "directory": path.parent})
            except (OSError, ValueError):
                continue
        if not done:
            raise LoaderError(f"{run} is not a run folder: no finished stage lies in {run / 'stages'}.")
        digest = getattr(rows, "digest", None)
        try:
            for item in done:
                if item["stage"] == "release" and item["record"]["digest"] == digest:
                    wanted = item["key_parts"][2:4]
                    found = [
                        next(other for other in done if other["stage"] == stage and other["record"]["digest"] == known)
                        for stage, known in zip(("read", "split"), wanted, strict=True)
                    ]
                    return found[0], found[1]
        except (KeyError, IndexError, StopIteration, TypeError, ValueError):
            pass
        raise LoaderError(
            f"{rows.name} did not come out of {self.name}, or the stages it was made from are gone. Give the folder of "
            "its run, or the real images as a dataset."
        )


def _known(found: np.ndarray, labels: np.ndarray, names: Sequence[str], what: str) -> np.ndarray:
    """Labels in the release's numbers; a class that it has not is refused, since its images would have no number."""
    labels = np.asarray(labels, dtype=np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise LoaderError(f"{what} has labels from {labels.min()} to {labels.max()}, but {len(names)} class names.")
    mapped = found[labels]
    if (mapped < 0).any():
        strange = names[int(labels[np.flatnonzero(mapped < 0)[0]])]
        raise LoaderError(
            f"{what} has images of class '{printable(strange)}', which the release has not. Leave them out, or take "
            "augment(dataset, release), which keeps your classes and their numbers."
        )
    return mapped


def check_classes(labels: np.ndarray, offered: Mapping[int, int], classes: Sequence[str], what: str) -> None:
    """Refuse synthetic images of a class without real ones: there is nothing that a ratio could be of.

    Raises:
        LoaderError: A class has synthetic images and no real one, or there is no real image at all.
    """
    if not len(labels):
        raise LoaderError(f"{what} has 0 real images, so there is nothing to balance.")
    counts = np.bincount(labels, minlength=len(classes))
    for label, n in offered.items():
        if n and not counts[label]:
            raise LoaderError(
                f"class '{printable(classes[label])}' has 0 real images in {what} and {n} synthetic ones in the "
                "release. A ratio is of the real images of a class: add some, or leave its synthetic images out "
                "with synthetic_ratio={'class': ratio, …}."
            )
