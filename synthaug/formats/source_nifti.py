"""Slices of NIfTI volumes (NIfTI-1 and -2, .nii and .nii.gz), with labels from a table or folders, and pseudonyms.

A slice shows the front or the head up and the patient's left on the left, whatever order the file has its axes in. A
file is a patient where no column says otherwise. As with DICOM, no message quotes a file's name.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.config import DatasetConfig, NiftiConfig
from synthaug.errors import DatasetError
from synthaug.formats.pixels import Picture, Rejected, picture_from_array
from synthaug.formats.private_folder import (
    class_folders,
    class_of,
    file_keys,
    file_problem,
    labelled,
    private_fingerprint,
    read_table,
    walk,
)
from synthaug.formats.pseudonyms import Pseudonyms, open_pseudonyms
from synthaug.formats.source_rows import Row, Rows

logger = logging.getLogger(__name__)

_ENDINGS = (".nii.gz", ".nii")
# The axis that a plane cuts across, of the body's: left to right, back to front, feet to head.
_ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
_MOST_SLICES = 100_000
_MOST_CHANNELS = 64


def open_nifti(config: DatasetConfig) -> Rows:
    """Open a folder of NIfTI volumes.

    Args:
        config: Its section `nifti` is set.

    Raises:
        DatasetError: Not a folder, nibabel is not installed, or labels, key or table are not as the settings say.
        OutputError: Key or list of the pseudonyms cannot be written.
    """
    try:
        import nibabel  # noqa: F401
    except ImportError:
        raise DatasetError(
            "format 'nifti' needs nibabel, which is not installed. Install it with: pip install 'synthaug[nifti]'"
        ) from None
    settings, root, pseudonyms = _opened(config)
    names = walk(root, without=settings.table)
    table = None
    if settings.table is not None:
        table = read_table(settings.table, "nifti", config.columns, "file", settings.key_column)
    note = f"{pseudonyms.list_file} says what a pseudonym stands for."

    def rows() -> Iterator[Row]:
        keys, used = file_keys(names, _ENDINGS), set()
        made: list[Row] = []
        for name in names:
            pseudonym = pseudonyms.of("file", name)
            problem, count = _look(root, name, settings)
            label = class_of(name) if settings.folders else None
            row = Row(origin=pseudonym, content=None, label=label, group=pseudonym, problem=problem)
            if table is not None:
                key = next((key for key in keys(name) if key in table), None)
                used |= set() if key is None else {key}
                if problem is None:
                    row = labelled(config.columns, row, None if key is None else table[key], pseudonyms, "nifti")
            made += _slices(settings, root / name, count, row)
        missing = ("missing file", "the table speaks of it, and no file is it")
        for key in sorted((table or {}).keys() - used):
            made.append(Row(origin=pseudonyms.of("file", key), content=None, problem=missing))
        pseudonyms.save()
        return iter(made)

    return Rows(
        name="NIfTI volumes",
        open=rows,
        known_classes=tuple(class_folders(root)) if settings.folders else (),
        note=note,
    )


def nifti_fingerprint(config: DatasetConfig) -> str:
    """The fingerprint of names, sizes and times, under the key of the pseudonyms.

    Raises:
        DatasetError: The folder, the table or the key cannot be read.
        OutputError: A key cannot be made.
    """
    settings, root, pseudonyms = _opened(config)
    return private_fingerprint("nifti", root, walk(root, without=settings.table), settings.table, pseudonyms)


def _opened(config: DatasetConfig) -> tuple[NiftiConfig, Path, Pseudonyms]:
    settings = config.nifti
    assert config.path is not None
    assert settings is not None
    root = Path(config.path).resolve()
    if not root.is_dir():
        raise DatasetError("dataset.path is not a folder. Format 'nifti' takes a folder of NIfTI volumes.")
    return settings, root, open_pseudonyms(root, settings.key_file, outside=(root,))


def _look(root: Path, name: str, settings: NiftiConfig) -> tuple[tuple[str, str] | None, int]:
    """Why a file cannot be used, or None, and how many slices it has in the plane."""
    if (problem := file_problem(root, name)) is not None:
        return problem, 0
    if not name.lower().endswith(_ENDINGS):
        return ("not NIfTI", "its name ends in neither .nii nor .nii.gz"), 0
    try:
        volume = _open_volume(root / name)
        axis, _ = _axis(volume, _ACROSS[settings.plane])
        return None, int(volume.shape[axis])
    except Rejected as rejected:
        return (rejected.reason, rejected.detail), 0


def _open_volume(path: Path) -> Any:
    """The volume with its header read and its values not.

    Raises:
        Rejected: Not NIfTI, damaged, or no volume of numbers.
    """
    import nibabel

    try:
        if os.path.getsize(path) == 0:
            raise Rejected("empty file", "0 bytes")
        volume: Any = nibabel.load(path)
        if not isinstance(volume, nibabel.Nifti1Image):
            raise Rejected("not NIfTI", "its header is that of another format")
        shape, kind = volume.shape, volume.get_data_dtype().kind
        if len(shape) not in (3, 4) or not all(0 < side <= _MOST_SLICES for side in shape):
            raise Rejected("wrong shape", f"{list(shape)}; three axes, or four with several volumes, were expected")
        if kind not in "iuf":
            raise Rejected("unsupported values", "colours or complex numbers; plain numbers were expected")
        if not np.isfinite(volume.affine).all():
            raise Rejected("cannot be decoded", "its orientation is no number")
        return volume
    except Rejected:
        raise
    except Exception as error:  # a damaged file fails in every way; the words name it
        raise _rejected(error) from None


def _rejected(error: Exception) -> Rejected:
    cut = isinstance(error, EOFError | zlib.error) or "not enough data" in str(error).lower()
    return Rejected("truncated" if cut else "cannot be decoded", f"NIfTI ({type(error).__name__})")


def _axis(volume: Any, body_axis: int) -> tuple[int, bool]:
    """Which axis of the file is one of the body's, and whether it runs the other way."""
    import nibabel

    orientation = nibabel.io_orientation(volume.affine)
    for axis, (across, direction) in enumerate(orientation):
        if across == body_axis:
            return axis, bool(direction < 0)
    raise Rejected("cannot be decoded", "its orientation has fewer than three axes")


def _slices(settings: NiftiConfig, path: Path, count: int, row: Row) -> Iterator[Row]:
    """A row for each slice that is taken."""
    if row.problem is not None:
        yield row
        return
    named = {"first": [0], "middle": [(count - 1) // 2], "all": list(range(count))}
    wanted = named[settings.slices] if isinstance(settings.slices, str) else [n - 1 for n in settings.slices]
    for number in wanted:
        origin = f"{row.origin} slice {number + 1}"
        if number >= count:
            yield replace(row, origin=origin, problem=("no such slice", f"it has {count}"))
        else:
            yield replace(row, origin=origin, content=partial(decode_slice, path, number, settings))


def decode_slice(path: Path, number: int, settings: NiftiConfig, max_pixels: int) -> Picture:
    """Decode one slice of a volume; only what it takes is read.

    Args:
        number: Counted from 0 along the body's axis: from the left, the back or the feet.
        max_pixels: Most values of the slice, all channels together, checked by the header.

    Returns:
        Grey, or as many channels as there are volumes. uint8 and uint16 are kept where the file has them unscaled;
        everything else is float32.

    Raises:
        Rejected: The slice cannot be used.
    """
    volume = _open_volume(path)
    try:
        axes = [_axis(volume, body_axis) for body_axis in range(3)]
        across, reverse = axes[_ACROSS[settings.plane]]
        shape = volume.shape
        n_channels = shape[3] if len(shape) == 4 and settings.volumes == "channels" else 1
        size = int(np.prod([side for axis, side in enumerate(shape[:3]) if axis != across])) * n_channels
        if size > max_pixels or n_channels > _MOST_CHANNELS:
            raise Rejected("too large", f"{size} values in {n_channels} channels; image.max_pixels is {max_pixels}")
        take: list[Any] = [slice(None)] * 3 + ([slice(0, n_channels)] if len(shape) == 4 else [])
        take[across] = shape[across] - 1 - number if reverse else number
        values = np.asarray(volume.dataobj[tuple(take)])
        # Rows from top to bottom, columns from the patient's left: axes of the body in that order.
        rows, columns = [axes[body_axis] for body_axis in (2, 1, 0) if body_axis != _ACROSS[settings.plane]]
        if rows[0] > columns[0]:
            values = values.swapaxes(0, 1)
        if not rows[1]:
            values = values[::-1]  # rows run down, the body's axes run up
        if columns[1]:
            values = values[:, ::-1]
        if values.dtype.newbyteorder("=").name not in ("uint8", "uint16"):
            values = values.astype(np.float32)
        picture = picture_from_array(np.ascontiguousarray(values))
        return replace(picture, colour="channels") if n_channels > 1 else picture
    except Rejected:
        raise
    except Exception as error:  # as above
        raise _rejected(error) from None
