"""Stage: take in images that another tool made, as samples to be judged and tried like our own."""

from __future__ import annotations

import difflib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from synthaug.config import Columns, Config, DatasetConfig
from synthaug.digest import digest_file, digest_json
from synthaug.errors import DatasetError, LeakError
from synthaug.formats.pixels import SUFFIXES
from synthaug.formats.reserved_array import reserved_array
from synthaug.progress import progress
from synthaug.records import (
    IMAGES_FILE,
    INDEX_FILE,
    SAMPLES_FILE,
    SET_ASIDE_FILE,
    PixelSpec,
    SampleBatch,
    Source,
    Splits,
)
from synthaug.text import printable

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Format = Literal["hub", "huggingface", "disk", "imagefolder", "parquet", "medmnist"]

# As on the hub; one segment alone could be anything.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TABLES = (".parquet", ".pq")
_METADATA = ("metadata.csv", "metadata.jsonl")
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
# Files from which load_dataset makes rows of its own, pictures beside them or not.
_DATA = (*_TABLES, ".arrow", ".tar", ".zip")
# Files that are no data: a card, a licence.
_PAPERS = ("", ".md", ".txt")
_RELEASE_FILE, _RELEASE_DATA = "release.json", "data"
# Reasons of the reading for which a class was named that there is none of.
_NO_CLASS = ("unknown label", "label out of range")
_MOST_NAMED = 10
_NOT_DRAWN = -1


def foreign_config(config: Config, path: str) -> Config:
    """The configuration under which `read.read(…, foreign=True)` takes in another tool's images at `path`.

    The section `image` and the names of the columns of image and label are the job's own; the form of the dataset
    is told from what lies there. All splits of it are read, and nothing is cut or excluded.

    Args:
        path: File or directory, relative to where the command is called; else the id of a dataset of the hub.

    Raises:
        DatasetError: Nothing is there, or nothing that looks like a dataset.
    """
    if not path.strip() or "\0" in path:
        raise DatasetError(f"the path of the images to try is {path!r}, which names nothing.")
    place = Path(path).expanduser().resolve()
    columns = Columns(image=config.dataset.columns.image, label=config.dataset.columns.label)
    form: Format
    if (place / _RELEASE_FILE).is_file() and (place / _RELEASE_DATA).is_dir():
        # One of our own: beside its shards lies the manifest, a table too, which is no data.
        place, form, columns = place / _RELEASE_DATA, "parquet", Columns()
    elif place.is_dir():
        form = _form_of_folder(place)
    elif place.exists():
        form = _form_of_file(place)
    elif _HUB_ID.fullmatch(path) and not path.lower().endswith((".npz", *_DATA, *SUFFIXES)):
        form = "hub"
    else:
        raise DatasetError(
            f"the images to try are not at {place}: it does not exist. Check the path, or give the id of a dataset of "
            "the hub as 'owner/name'."
        )
    dataset = DatasetConfig(
        format=form,
        path=path if form == "hub" else str(place),
        columns=columns,
        class_names=config.dataset.class_names,
    )
    return config.model_copy(update={"dataset": dataset})


def _form_of_file(file: Path) -> Format:
    if file.suffix.lower() == ".npz":
        return "medmnist"
    if file.suffix.lower() in _TABLES:
        return "parquet"
    raise DatasetError(
        f"{file} is no dataset: a single file must be a .parquet, or an .npz with arrays of images and labels. "
        "Pictures are taken as a folder with one folder a class."
    )


def _form_of_folder(folder: Path) -> Format:
    if any((folder / name).is_file() for name in _SAVED):
        return "disk"
    kinds = _kinds(folder)
    if kinds and kinds <= set(_TABLES):
        return "parquet"
    described = any(
        (part / name).is_file()
        for part in (folder, *(entry for entry in folder.iterdir() if entry.is_dir()))
        for name in _METADATA
    )
    if described or (kinds & SUFFIXES and not kinds & set(_DATA)):
        return "imagefolder"
    if kinds - set(_PAPERS):
        return "huggingface"
    raise DatasetError(
        f"the folder {folder} holds no images to try. Put one folder of pictures per class into it, or give a "
        "dataset in another form that can be read."
    )


def _kinds(folder: Path) -> set[str]:
    """The suffixes of all visible files below a folder."""
    kinds: set[str] = set()
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        kinds |= {os.path.splitext(name)[1].lower() for name in names if not name.startswith(".")}
    return kinds


def adopt(config: Config, source: Source, splits: Splits, foreign: Source, directory: Path) -> SampleBatch:
    """Take images that another tool made as samples of the classes of `source`; write images.npy, samples.parquet.

    Classes are matched by name; a part of them is enough. Where some images are marked is_synthetic, as in a release
    of ours, the others are left out. Pixels are copied in pieces, so memory does not grow with them.

    Args:
        config: `dataset.exclude` and `image` matter here.
        foreign: What `read.read(foreign_config(…), …, foreign=True)` made of them.
        directory: Exists, empty.

    Raises:
        DatasetError: They name a class that the source has not, their pixels have another form, or none is left.
        LeakError: Some are validation or test images of the source, as they are or mirrored.
    """
    import pandas as pd

    from synthaug.quality.reference import held_out_pictures

    started = time.monotonic()
    _check_pixels(source.pixels, foreign)
    _check_labels_read(source.classes, foreign)
    index = pd.read_parquet(foreign.directory / INDEX_FILE).sort_values("row")
    index = _without_real(index, foreign)
    index = _without_excluded(_relabelled(index, source.classes, foreign), config, source.classes, foreign)
    table = pd.DataFrame(
        {
            "row": np.arange(len(index), dtype=np.int64),
            "sample_id": [f"foreign-{image_id}" for image_id in index["image_id"]],
            "label": index["label"].to_numpy(np.int64),
            "class_index": index.groupby("label").cumcount().to_numpy(np.int64),
            # There is no sequence of samples that they have a place in.
            **{name: np.full(len(index), _NOT_DRAWN, np.int64) for name in ("seed", "micro_batch", "position")},
        }
    )
    leaked = _copy(index["row"].to_numpy(), foreign, held_out_pictures(source, splits), directory / IMAGES_FILE)
    _refuse_leaks(leaked, index["origin"].to_numpy(), source, foreign)
    table.to_parquet(directory / SAMPLES_FILE, index=False)
    logger.info("%d images of %s are taken as samples", len(table), foreign.name)
    return SampleBatch(
        directory=directory,
        digest=digest_json(
            [digest_file(directory / IMAGES_FILE), table["sample_id"].tolist(), table["label"].tolist()]
        ),
        checkpoint_digest="",
        n_samples=len(table),
        counts={int(label): int(count) for label, count in sorted(Counter(table["label"]).items())},
        solver="none",
        steps=0,
        guidance=0.0,
        micro_batch=0,
        threads=0,
        device="none",
        environment={},
        seconds=time.monotonic() - started,
    )


def _check_pixels(ours: PixelSpec, foreign: Source) -> None:
    theirs = foreign.pixels
    if theirs.dtype != ours.dtype:
        advice = "Save them in the depth of the real images first: values are never cut or stretched here."
    elif (theirs.colour, theirs.channels) != (ours.colour, ours.channels):
        if "channels" in (theirs.colour, ours.colour):
            advice = "Save them with the channels of the real images first."
        elif ours.colour == "rgba":
            advice = "Set image.colour to rgb, which converts both."
        else:
            advice = f"Set image.colour to {ours.colour}: the real images have it, and these are then converted."
    elif theirs.size != ours.size:
        advice = "Read both with the same image.size."
    elif (theirs.low, theirs.high) != (ours.low, ours.high):
        advice = (
            f"Set image.value_range to [{ours.low!r}, {ours.high!r}], the range of the real images, if these are on "
            "the same scale, and bring them to it first if they are not."
        )
    else:
        return
    raise DatasetError(
        f"the images of {foreign.name} are {_form(theirs)}, and the real images are {_form(ours)}: they cannot stand "
        f"in for each other. {advice}"
    )


def _form(spec: PixelSpec) -> str:
    colour = f"{spec.channels} channels" if spec.colour == "channels" else spec.colour
    return f"{spec.dtype} {colour}, {spec.size}×{spec.size}, {spec.low!r} to {spec.high!r}"


def _check_labels_read(classes: tuple[str, ...], foreign: Source) -> None:
    """Labels that the reading set aside since dataset.class_names does not have them."""
    import pandas as pd

    number = sum(foreign.set_aside_reasons.get(reason, 0) for reason in _NO_CLASS)
    if not number:
        return
    table = pd.read_csv(foreign.directory / SET_ASIDE_FILE, dtype="str", keep_default_na=False)
    details = table.loc[table["reason"].isin(_NO_CLASS), "detail"].unique()
    # The detail begins with the label, as Python spells it.
    names = [re.split(r" is none of |; the ", detail)[0].strip("'\"") for detail in details]
    raise DatasetError(_no_class(names, f"{number} images of {foreign.name}", classes))


def _no_class(names: Collection[str], what: str, classes: tuple[str, ...]) -> str:
    listed = []
    for name in list(names)[:_MOST_NAMED]:
        near = difflib.get_close_matches(name, classes, n=1)
        listed.append(f"{printable(name)!r}{f' (did you mean {printable(near[0])!r}?)' if near else ''}")
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    known = ", ".join(printable(name) for name in classes[:_MOST_NAMED]) + (", …" if len(classes) > _MOST_NAMED else "")
    advice = "Name their classes as the real images do"
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        advice += "; a number stands for a class only through dataset.class_names"
    return f"{what} are of classes that the dataset has not: {', '.join(listed)}{more}. It has: {known}. {advice}."


def _without_real(index: pd.DataFrame, foreign: Source) -> pd.DataFrame:
    if not foreign.n_synthetic or foreign.n_synthetic == len(index):
        return index
    logger.info(
        "%d images of %s are marked is_synthetic; the other %d are left out",
        foreign.n_synthetic, foreign.name, len(index) - foreign.n_synthetic,
    )  # fmt: skip
    return index[index["is_synthetic"]]


def _relabelled(index: pd.DataFrame, classes: tuple[str, ...], foreign: Source) -> pd.DataFrame:
    """The same rows with labels of the source."""
    labels = {name: label for label, name in enumerate(classes)}
    # Classes without an image (a folder that is empty, a name in a list) are no matter.
    present = [foreign.classes[label] for label in sorted(index["label"].unique())]
    if strange := [name for name in present if name not in labels]:
        number = int(index["label"].map(lambda label: foreign.classes[label] in strange).sum())
        raise DatasetError(_no_class(strange, f"{number} images of {foreign.name}", classes))
    return index.assign(label=[labels[foreign.classes[label]] for label in index["label"]])


def _without_excluded(index: pd.DataFrame, config: Config, classes: tuple[str, ...], foreign: Source) -> pd.DataFrame:
    excluded = {label for label, name in enumerate(classes) if name in config.dataset.exclude}
    kept = index[~index["label"].isin(excluded)]
    if len(kept) < len(index):
        logger.warning(
            "%d images of %s are left out: their class is in dataset.exclude", len(index) - len(kept), foreign.name
        )
    if kept.empty:
        raise DatasetError(f"no image of {foreign.name} is left to try: all are of classes in dataset.exclude.")
    return kept


def _copy(rows: np.ndarray, foreign: Source, held_out: dict[str, str], path: Path) -> list[tuple[int, str]]:
    """Write the images of these rows; returns the position and the split of each that is a held-out image."""
    from synthaug.quality.arithmetic import chunks
    from synthaug.quality.copies import picture_hash

    images: np.ndarray = np.load(foreign.directory / IMAGES_FILE, mmap_mode="r")
    copied = reserved_array(path, images.dtype, (len(rows), *images.shape[1:]))
    found = []
    with progress("adopt", len(rows), "images") as bar:
        for piece in chunks(len(rows), images.shape[1:]):
            values = images[rows[piece]]
            copied[piece] = values
            for position, value in enumerate(values, start=piece.start):
                if (split := held_out.get(picture_hash(value))) is not None:
                    found.append((position, split))
            bar.update(len(values))
    copied.flush()
    return found


def _refuse_leaks(leaked: Iterable[tuple[int, str]], origins: np.ndarray, source: Source, foreign: Source) -> None:
    where: dict[str, list[str]] = {}
    for position, split in leaked:
        where.setdefault(split, []).append(origins[position])
    if not where:
        return
    parts = [
        f"{len(where[split])} images of its {split} split (the first: "
        f"{', '.join(printable(origin) for origin in where[split][:3])})"
        for split in ("test", "validation")
        if split in where
    ]
    raise LeakError(
        f"{foreign.name} holds images that {source.name} keeps for measuring, exact or mirrored: "
        f"{' and '.join(parts)}. Nothing can be told from a trial on them. Make the images from the training split "
        "alone, or take these out."
    )
