"""Sources that are arrays: the .npz of MedMNIST, and the digits inside scikit-learn."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.config import DatasetConfig
from synthaug.errors import DatasetError
from synthaug.formats.source_rows import (
    Row,
    Rows,
    given_split,
    group_of,
    is_missing,
    is_truthy,
    require_column,
    split_of,
)

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class _Member:
    """An array inside the archive, known by its header alone."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


@dataclass(frozen=True)
class _Part:
    """The arrays of one split, or of the whole where there are no splits."""

    split: str | None
    prefix: str
    images: _Member
    labels: np.ndarray
    groups: np.ndarray | None
    subgroups: np.ndarray | None
    splits: np.ndarray | None
    synthetic: np.ndarray | None


def open_medmnist(config: DatasetConfig) -> Rows:
    """Open an .npz with `<split>_images` [n, h, w] or [n, h, w, c] and `<split>_labels` [n] or [n, 1].

    Names without a split in front are taken too. Objects (pickles) are never loaded.

    Raises:
        DatasetError: Not an .npz, an array of objects, arrays missing or of lengths that do not agree, or
            several labels for an image.
    """
    assert config.path is not None
    path = Path(config.path)
    if not path.is_file():
        raise DatasetError(f"dataset.path {path} is not a file. Format 'medmnist' takes an .npz of MedMNIST.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            parts = [_part(archive, members, prefix, config, path) for prefix in _prefixes(members, config, path)]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as an .npz: {error}. Download it again.") from None
    return Rows(
        name=f"arrays of {path.name}",
        open=lambda: _rows(path, parts, config),
        total=sum(len(part.labels) for part in parts),
        wide_numbers=any(_is_wide(part.images.dtype) for part in parts),
    )


def open_digits(config: DatasetConfig) -> Rows:
    """Open the 1,797 handwritten digits, 8×8, that ship inside scikit-learn.

    Raises:
        DatasetError: The settings name a column of groups, subgroups or splits: the digits have none.
    """
    from sklearn.datasets import load_digits

    for setting in ("group", "subgroup", "split"):
        if (wanted := getattr(config.columns, setting)) is not None:
            require_column(wanted, setting, (), "the set of digits inside scikit-learn")
    bunch = load_digits()
    # 17 levels: each becomes a level of its own, so that nothing is lost.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)

    def rows() -> Iterator[Row]:
        for number, (image, label) in enumerate(zip(pixels, bunch.target, strict=True)):
            yield Row(origin=f"digits[{number}]", content=image, label=int(label))

    return Rows(
        name="handwritten digits inside scikit-learn",
        open=rows,
        total=len(pixels),
        class_names=tuple(map(str, range(10))),
        conversion="levels 0 to 16 to round(level · 255 / 16)",
        licence="cc-by-4.0",
        citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning "
        "Repository, 1998. https://doi.org/10.24432/C50P49",
    )


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, _Member]:
    members = {}
    for entry in archive.namelist():
        if not entry.endswith(".npy"):
            continue
        name = entry.removesuffix(".npy")
        with archive.open(entry) as file:
            shape, fortran, dtype = _header(file)
        if dtype.hasobject:
            raise DatasetError(
                f"array '{name}' of {path} holds pickled objects, which can run code when they are loaded. "
                "Save it again as numbers, without dtype=object."
            )
        members[name] = _Member(name, shape, dtype, fortran)
    return members


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"an array in version {version} of the .npy format")
    shape, fortran, dtype = read[version](file)
    return shape, fortran, dtype


def _prefixes(members: dict[str, _Member], config: DatasetConfig, path: Path) -> list[str]:
    image, label = _names(config)
    found = [name.removesuffix(image) for name in members if name.endswith(image)]
    prefixes = [prefix for prefix in found if prefix == "" or prefix.endswith("_")]
    if not prefixes:
        raise DatasetError(f"{path} has no array named '<split>_{image}' or '{image}'; it has: {', '.join(members)}.")
    for prefix in prefixes:
        if prefix:
            given_split(prefix[:-1], str(path))
        if prefix + label not in members:
            raise DatasetError(f"{path} has '{prefix}{image}' but no '{prefix}{label}'. Every image needs its label.")
    splits = [split_of(prefix[:-1]) for prefix in prefixes]
    if ("" in prefixes and len(prefixes) > 1) or len(set(splits)) < len(splits):
        raise DatasetError(f"{path} holds the same split twice: {', '.join(p + image for p in prefixes)}.")
    return prefixes


def _names(config: DatasetConfig) -> tuple[str, str]:
    """MedMNIST says images and labels; a setting of its own wins."""
    columns = config.columns
    image = "images" if columns.image == "image" else columns.image
    return image, "labels" if columns.label == "label" else columns.label


def _part(
    archive: zipfile.ZipFile, members: dict[str, _Member], prefix: str, config: DatasetConfig, path: Path
) -> _Part:
    image, label = _names(config)
    images = members[prefix + image]
    if len(images.shape) not in (3, 4):
        raise DatasetError(
            f"'{images.name}' of {path} has shape {list(images.shape)}; expected [n, height, width] or "
            "[n, height, width, channels]."
        )

    def column(name: str | None, required: bool) -> np.ndarray | None:
        if name is None or (not required and prefix + name not in members):
            return None
        if prefix + name not in members:
            raise DatasetError(f"{path} has no array '{prefix}{name}'; it has: {', '.join(members)}.")
        return _column(archive, members[prefix + name], images, path)

    labels = column(label, True)
    assert labels is not None
    return _Part(
        split=split_of(prefix[:-1]),
        prefix=prefix,
        images=images,
        labels=labels,
        groups=column(config.columns.group, True),
        subgroups=column(config.columns.subgroup, True),
        splits=column(config.columns.split, True),
        synthetic=column("is_synthetic", False),
    )


def _column(archive: zipfile.ZipFile, member: _Member, images: _Member, path: Path) -> np.ndarray:
    """A small array beside the images, flat: one value an image."""
    with archive.open(f"{member.name}.npy") as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
    if values.ndim == 2 and values.shape[1] > 1:
        raise DatasetError(
            f"'{member.name}' of {path} has {values.shape[1]} values an image (shape {list(values.shape)}). "
            "Several labels for one image are not supported: one class an image is needed."
        )
    if values.ndim == 0 or values.size != values.shape[0]:
        raise DatasetError(f"'{member.name}' of {path} has shape {list(values.shape)}; expected [n] or [n, 1].")
    if len(values) != images.shape[0]:
        raise DatasetError(
            f"'{member.name}' of {path} has {len(values)} entries for {images.shape[0]} images. They must agree."
        )
    return values.reshape(-1)


def _rows(path: Path, parts: list[_Part], config: DatasetConfig) -> Iterator[Row]:
    for part in parts:
        for number, image in enumerate(_stream(path, part.images)):
            split = part.split
            problem = None
            if part.splits is not None:
                given = part.splits[number].item()
                split = None if is_missing(given) else given_split(given, f"array '{config.columns.split}' of {path}")
                problem = ("no split", "the array of splits is empty here") if split is None else None
            yield Row(
                origin=f"{part.images.name}[{number}]",
                content=image,
                label=part.labels[number].item(),
                group=None if part.groups is None else group_of(part.groups[number].item()),
                subgroup=None if part.subgroups is None else group_of(part.subgroups[number].item()),
                split=split,
                is_synthetic=part.synthetic is not None and is_truthy(part.synthetic[number].item()),
                problem=problem,
            )


def _stream(path: Path, member: _Member) -> Iterator[np.ndarray]:
    """The images of an array one after the other, a few megabytes in memory at a time."""
    try:
        yield from _blocks(path, member)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DatasetError(f"array '{member.name}' of {path} is damaged: {error}. Download the file again.") from None


def _blocks(path: Path, member: _Member) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{member.name}.npy") as file:
        if member.fortran:
            # Its images do not lie one after the other: there is no way around loading it.
            yield from np.lib.format.read_array(file, allow_pickle=False)
            return
        _header(file)
        shape = member.shape[1:]
        one = int(np.prod(shape)) * member.dtype.itemsize
        if one == 0:
            yield from np.zeros((member.shape[0], *shape), member.dtype)
            return
        block, left = max(1, _BLOCK_BYTES // one), member.shape[0]
        while left:
            count = min(block, left)
            data = file.read(count * one)
            if len(data) < count * one:
                raise EOFError("it ends too early")
            yield from np.frombuffer(data, member.dtype).reshape(count, *shape)
            left -= count


def _is_wide(dtype: np.dtype) -> bool:
    return dtype.kind in "iu" and dtype.newbyteorder("=").name not in ("uint8", "uint16")
