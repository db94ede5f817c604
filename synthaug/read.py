"""Stage 1: every image is decoded once, checked, brought to one square form and numbered."""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from synthaug.config import Config, ImageConfig
from synthaug.digest import digest_json
from synthaug.errors import DatasetError
from synthaug.formats import sources
from synthaug.formats.decoding import Image, SetAside, decode_rows
from synthaug.formats.growing_array import GrowingArray
from synthaug.formats.pixels import KEPT_COLOURS, Colour, pillow_limits
from synthaug.formats.source_labels import Labels
from synthaug.formats.source_rows import Rows
from synthaug.progress import progress
from synthaug.records import IMAGES_FILE, INDEX_FILE, SET_ASIDE_FILE, PixelSpec, Source
from synthaug.text import printable

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_CONFLICT = "conflicting labels"


def source_fingerprint(config: Config) -> str:
    """A cheap fingerprint of the source: names, sizes and times of its files, or the commit on the hub.

    Raises:
        DatasetError: The source is missing, or the hub cannot be asked.
    """
    return sources.fingerprint(config.dataset)


def read(config: Config, directory: Path, *, foreign: bool = False) -> Source:
    """Decode every image once and write what the other stages work from.

    Memory does not grow with the pixels: images go to the file as they come.

    Args:
        config: Its sections `dataset` and `image` matter here.
        directory: Exists, empty; receives images.npy, index.parquet and set_aside.csv, as `Source` tells.
        foreign: The images are another tool's samples. One class, or no real image at all, is then enough, and
            dataset.class_names serves only where they have no names of their own.

    Raises:
        DatasetError: The source is missing or damaged, nothing in it is usable, it has one class only, its
            labels are of mixed type, or its images come in forms that must not be mixed.
    """
    _check_value_range(config.image)
    fingerprint = source_fingerprint(config)
    rows = sources.open_source(config.dataset, fingerprint)
    class_names = None if foreign and rows.class_names else config.dataset.class_names
    labels = Labels(rows.class_names, rows.known_classes, class_names)
    found = _Found()
    with pillow_limits(config.image.max_pixels):
        array = _gather(rows, labels, config.image, directory / IMAGES_FILE, found)
    with array:
        classes, indices = labels.finish(found.label)
        keep = _without_conflicts(found, indices)
        _set_conflicts_aside(found, keep, indices, classes)
        array.keep(keep)
        pixels_digest = array.digest()
    index = _index(found, indices, keep)
    if not foreign:
        _check_classes(index, classes)
    elif index.empty:
        raise DatasetError(f"nothing in {rows.name} is usable: every picture in it carries different labels.")
    spec = _pixel_spec(found, keep, config.image, array, rows.conversion)
    index.to_parquet(directory / INDEX_FILE, index=False)
    _write_set_aside(found.set_aside, directory / SET_ASIDE_FILE)
    return Source(
        directory=directory,
        digest=digest_json([_identity(index), pixels_digest, list(classes), spec.model_dump(mode="json")]),
        name=rows.name,
        fingerprint=fingerprint,
        classes=classes,
        pixels=spec,
        n_images=len(index),
        n_set_aside=len(found.set_aside),
        set_aside_reasons=found.reasons(),
        n_duplicates=int(index["content_hash"].duplicated().sum()),
        n_synthetic=int(index["is_synthetic"].sum()),
        licence=config.dataset.licence or rows.licence,
        citation=config.dataset.citation or rows.citation,
    )


@dataclass
class _Found:
    """What the one pass over the images gathers: a list a column, an entry an image."""

    set_aside: list[SetAside] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)
    label: list[Any] = field(default_factory=list)
    group: list[str | None] = field(default_factory=list)
    subgroup: list[str | None] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    synthetic: list[bool] = field(default_factory=list)
    content_hash: list[str] = field(default_factory=list)
    size: list[tuple[int, int]] = field(default_factory=list)  # height, width before resizing
    done: list[tuple[frozenset[str], tuple[str, ...]]] = field(default_factory=list)  # fitting, conversions
    span: list[tuple[float, float]] = field(default_factory=list)  # lowest and highest value, of floats
    forms: Counter[str] = field(default_factory=Counter)
    form_example: dict[str, str] = field(default_factory=dict)
    form_colour: dict[str, Colour] = field(default_factory=dict)

    def note_form(self, image: Image) -> None:
        self.forms[image.form] += 1
        self.form_example.setdefault(image.form, image.row.origin)
        self.form_colour.setdefault(image.form, image.colour)

    def add(self, image: Image) -> None:
        self.origin.append(image.row.origin)
        self.label.append(image.row.label)
        self.group.append(image.row.group)
        self.subgroup.append(image.row.subgroup)
        self.split.append(image.row.split)
        self.synthetic.append(image.row.is_synthetic)
        self.content_hash.append(image.content_hash)
        self.size.append((image.height, image.width))
        self.done.append((image.fitted, image.conversions))
        if image.pixels.dtype == np.float32:
            self.span.append((float(image.pixels.min()), float(image.pixels.max())))

    def reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(item.reason for item in self.set_aside).items()))


def _gather(rows: Rows, labels: Labels, image: ImageConfig, path: Path, found: _Found) -> GrowingArray:
    """Decode everything; pixels go to the file, the rest into `found`. The array is returned open."""
    array: GrowingArray | None = None
    try:
        # Closed at once if anything goes wrong, so that no thread goes on decoding.
        with closing(decode_rows(rows, labels, image)) as decoded, progress("reading", rows.total, "images") as bar:
            for item in decoded:
                bar.update()
                if isinstance(item, SetAside):
                    found.set_aside.append(item)
                    continue
                found.note_form(item)
                array = array or GrowingArray(path, item.pixels.shape, item.pixels.dtype)
                # A second form ends in an error, once all are counted.
                if len(found.forms) == 1:
                    array.append(item.pixels)
                    found.add(item)
        _check_something_usable(found, rows)
        _check_forms(found, image, rows)
    except BaseException:
        if array is not None:
            array.close()
        raise
    assert array is not None
    return array


def _check_value_range(image: ImageConfig) -> None:
    if image.value_range is not None and not image.value_range[0] < image.value_range[1]:
        raise DatasetError(f"image.value_range is {list(image.value_range)}; the first value must be the lower one.")


def _check_something_usable(found: _Found, rows: Rows) -> None:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in found.reasons().items())
    if not found.forms and not found.set_aside:
        raise DatasetError(f"the dataset is empty: {rows.name} holds no rows. Check dataset.path.")
    if not found.forms:
        first = found.set_aside[0]
        raise DatasetError(
            f"nothing in {rows.name} is usable: of {len(found.set_aside)} rows, {reasons}. The first is "
            f"{printable(first.origin)}: {printable(first.detail, 200)}.{_spaced(rows.note)}"
        )
    if reasons:
        logger.warning("%d rows are set aside: %s; %s names them", len(found.set_aside), reasons, SET_ASIDE_FILE)


def _check_forms(found: _Found, image: ImageConfig, rows: Rows) -> None:
    """One form for all; 'auto' also refuses colours that cannot be kept."""
    if len(found.forms) == 1 and set(found.form_colour.values()) <= set(KEPT_COLOURS):
        return
    listed = "; ".join(
        f"{count} {form} (for example {printable(found.form_example[form])})"
        for form, count in found.forms.most_common()
    )
    depths = {form.split()[0] for form in found.forms}
    if len(depths) > 1:
        advice = "Bring the files to one depth first: values are never cut or stretched here."
    elif "channels" in found.form_colour.values():
        advice = "Bring the files to one number of channels first."
    else:
        advice = "Set image.colour to grey or rgb to convert them; the record will say so."
    what = "come in several forms" if len(found.forms) > 1 else "come in a form that cannot be kept as it is"
    raise DatasetError(f"the images {what}: {listed}. {advice} (image.colour is '{image.colour}'.){_spaced(rows.note)}")


def _spaced(note: str) -> str:
    return f" {note}" if note else ""


def _check_classes(index: pd.DataFrame, classes: tuple[str, ...]) -> None:
    present = sorted(index.loc[~index["is_synthetic"], "label"].unique())
    if len(present) < 2:
        name = f"only class {printable(classes[present[0]])!r}" if present else "no class at all"
        raise DatasetError(
            f"the dataset has real images of {name}, and balancing takes two. Check dataset.path and "
            "dataset.columns.label, or add images of another class."
        )


def _without_conflicts(found: _Found, indices: np.ndarray) -> np.ndarray:
    """False for every real image that the source holds several times with different labels."""
    import pandas as pd

    table = pd.DataFrame({"hash": found.content_hash, "label": indices, "real": ~np.array(found.synthetic, dtype=bool)})
    several = table[table["real"]].groupby("hash")["label"].nunique()
    conflicting = set(several[several > 1].index)
    return ~(table["hash"].isin(conflicting) & table["real"]).to_numpy()


def _set_conflicts_aside(found: _Found, keep: np.ndarray, indices: np.ndarray, classes: tuple[str, ...]) -> None:
    for row in np.flatnonzero(~keep):
        name = classes[indices[row]]
        detail = f"here {name!r}, elsewhere another class; content {found.content_hash[row][:16]}"
        found.set_aside.append(SetAside(found.origin[row], _CONFLICT, detail))
    if not keep.all():
        logger.warning("%d images are set aside: the same picture carries different labels", int((~keep).sum()))


def _index(found: _Found, indices: np.ndarray, keep: np.ndarray) -> pd.DataFrame:
    """The table index.parquet; its columns are those of `Source`."""
    import pandas as pd

    text = pd.StringDtype(na_value=np.nan)
    table = pd.DataFrame({
        "label": indices.astype(np.int64),
        "group": pd.array(found.group, dtype=text),
        "subgroup": pd.array(found.subgroup, dtype=text),
        "given_split": pd.array(found.split, dtype=text),
        "content_hash": pd.array(found.content_hash, dtype=text),
        "origin": pd.array(found.origin, dtype=text),
        "is_synthetic": np.array(found.synthetic, dtype=bool),
    })[keep].reset_index(drop=True)  # fmt: skip
    table.insert(0, "row", np.arange(len(table), dtype=np.int64))
    table.insert(1, "image_id", _image_ids(table["content_hash"]))
    return table


def _identity(index: pd.DataFrame) -> list[list[Any]]:
    """What of the table tells one source from another."""
    columns = ["image_id", "label", "group", "given_split", "is_synthetic"]
    # Only where there are any: a source without subgroups is the same as it was before there were subgroups.
    if index["subgroup"].notna().any():
        columns.append("subgroup")
    identity = index[columns].astype(object)
    table: list[list[Any]] = identity.where(identity.notna(), None).to_numpy().tolist()
    return table


def _image_ids(hashes: Iterable[str]) -> list[str]:
    """The first 16 digits of the content; copies get -1, -2 … in order."""
    seen: Counter[str] = Counter()
    ids = []
    for content in hashes:
        short = content[:16]
        ids.append(f"{short}-{seen[short]}" if seen[short] else short)
        seen[short] += 1
    return ids


def _pixel_spec(
    found: _Found, keep: np.ndarray, image: ImageConfig, array: GrowingArray, conversion: str | None
) -> PixelSpec:
    kept = np.flatnonzero(keep)
    done = Counter(found.done[row] for row in kept)
    conversions: Counter[str] = Counter({conversion: len(kept)} if conversion else {})
    fitted: set[str] = set()
    for (steps, words), count in done.items():
        fitted |= steps
        for word in words:
            conversions[word] += count
    sizes = [found.size[row] for row in kept]
    (colour,) = found.form_colour.values()
    low, high = _range(found, kept, image, array.dtype)
    resampling = [name for name in ("area", "cubic") if name in fitted]
    dtype: Any = array.dtype.name
    fit: Literal["stretch", "crop", "pad", "none"] = image.fit if fitted else "none"
    return PixelSpec(
        channels=array.shape[2],
        dtype=dtype,
        colour=colour,  # type: ignore[arg-type]  # checked: one that can be kept
        low=low,
        high=high,
        size=image.size,
        fit=fit,
        interpolation=" and ".join(resampling) or "none",
        smallest=min(sizes, key=math.prod),
        largest=max(sizes, key=math.prod),
        conversions=dict(sorted(conversions.items())),
    )


def _range(found: _Found, kept: np.ndarray, image: ImageConfig, dtype: np.dtype) -> tuple[float, float]:
    if dtype != np.float32:
        if image.value_range is not None:
            logger.warning("image.value_range is for floating-point images; these are %s, and it is not used", dtype)
        return 0.0, float(np.iinfo(dtype).max)
    if image.value_range is not None:
        # As float32, like the values that were clipped to it.
        return float(np.float32(image.value_range[0])), float(np.float32(image.value_range[1]))
    low, high = min(found.span[row][0] for row in kept), max(found.span[row][1] for row in kept)
    if low == high:
        raise DatasetError(f"every pixel of every image is {low}. There is nothing to learn from them.")
    return low, high


def _write_set_aside(items: list[SetAside], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["origin", "reason", "detail"])
        writer.writerows((item.origin, item.reason, item.detail) for item in items)
