"""Folders of DICOM files (PS3.10), with labels from a table, a tag or folders, and pseudonyms in place of names.

Files are found by walking the folder; a DICOMDIR is never followed. Every row's origin and group is a pseudonym, and
no message quotes a file's name or the value of a tag. Class names, subgroups and splits go into records as they are.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from synthaug.config import DatasetConfig, DicomConfig
from synthaug.errors import DatasetError
from synthaug.formats.dicom_pixels import (
    COLOURED,
    IMAGE_TAGS,
    LEVEL_TAGS,
    MONOCHROME,
    decode_frame,
    is_plain,
    quiet_pydicom,
    read_header,
)
from synthaug.formats.pixels import Picture, Rejected
from synthaug.formats.private_folder import (
    Record,
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
from synthaug.text import printable

logger = logging.getLogger(__name__)

_IDS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_KINDS = {
    "PatientID": "patient", "StudyInstanceUID": "study", "SeriesInstanceUID": "series", "SOPInstanceUID": "image",
    "file": "file",
}  # fmt: skip
# Not the tables and lists of frames of IMAGE_TAGS, which are long.
_HEADER_TAGS = [*_IDS, *IMAGE_TAGS[:12], *LEVEL_TAGS, "BurnedInAnnotation", "SyntheticData"]
_DICOMDIR = "1.2.840.10008.1.3.10"
# Kinds of values (PS3.5 6.2) that are codes and numbers, and tags of free text that speak of no person.
_HARMLESS_VR = {"CS", "IS", "US", "SS"}
_HARMLESS_TAGS = {"ContrastBolusAgent", "Manufacturer", "ManufacturerModelName", "ProtocolName"}
# Where names are burned in most often; files of these that do not say are counted.
_OFTEN_BURNED_IN = ("US", "OT", "SC", "XC", "ES")
_MOST_FRAMES = 100_000


def open_dicom(config: DatasetConfig) -> Rows:
    """Open a folder of DICOM files.

    Args:
        config: Its section `dicom` is set.

    Raises:
        DatasetError: Not a folder, pydicom is not installed, or labels, key or table are not as the settings say.
        OutputError: Key or list of the pseudonyms cannot be written.
    """
    quiet_pydicom()
    settings, root, pseudonyms = _opened(config)
    names = walk(root, without=settings.table)
    tag = None if settings.label_tag is None else _harmless_tag(settings.label_tag)
    table = None
    if settings.table is not None:
        table = read_table(settings.table, "dicom", config.columns, settings.key, settings.key_column)
    note = f"{pseudonyms.list_file} says what a pseudonym stands for."

    def rows() -> Iterator[Row]:
        found = _Headers(root, settings, tag).read(names)
        made = list(_rows(config, settings, root, found, table, pseudonyms))
        pseudonyms.save()
        if any(row.problem is not None for row in made):
            logger.info("which files are set aside: %s", note)
        return iter(made)

    return Rows(
        name="DICOM files",
        open=rows,
        known_classes=tuple(class_folders(root)) if settings.folders else (),
        note=note,
    )


def dicom_fingerprint(config: DatasetConfig) -> str:
    """The fingerprint of names, sizes and times, under the key of the pseudonyms: nobody else can try names out.

    Raises:
        DatasetError: The folder, the table or the key cannot be read.
        OutputError: A key cannot be made.
    """
    settings, root, pseudonyms = _opened(config)
    names = walk(root, without=settings.table)
    return private_fingerprint("dicom", root, names, settings.table, pseudonyms)


def _opened(config: DatasetConfig) -> tuple[DicomConfig, Path, Pseudonyms]:
    settings = config.dicom
    assert config.path is not None
    assert settings is not None
    root = Path(config.path).resolve()
    if not root.is_dir():
        raise DatasetError("dataset.path is not a folder. Format 'dicom' takes a folder of DICOM files.")
    return settings, root, open_pseudonyms(root, settings.key_file, outside=(root,))


def _harmless_tag(name: str) -> str:
    """The keyword of a tag that may be a class: a code or a number, never a name, an id or a date.

    Raises:
        DatasetError: No such tag, or one that may tell who somebody is.
    """
    from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

    number = re.fullmatch(r"\(?([0-9A-Fa-f]{4}),?\s*([0-9A-Fa-f]{4})\)?", name.strip())
    keyword = keyword_for_tag(int(number[1] + number[2], 16)) if number else name.strip()
    known = tag_for_keyword(keyword) if keyword else None
    if known is None:
        raise DatasetError(f"dataset.dicom.label_tag {printable(name)!r} is no tag of DICOM, such as BodyPartExamined.")
    if dictionary_VR(known) not in _HARMLESS_VR and keyword not in _HARMLESS_TAGS:
        raise DatasetError(
            f"dataset.dicom.label_tag {keyword} may tell who somebody is, and names of classes go into every record "
            "and release. Take a tag with codes, or a table."
        )
    return keyword


@dataclass
class _Header:
    """What the header of a file says; `problem` where it cannot be used."""

    name: str
    problem: tuple[str, str] | None = None
    ids: dict[str, str] | None = None
    label: Any = None
    photometric: str = ""
    frames: int = 1
    plain: bool = True
    synthetic: bool = False

    @property
    def coloured(self) -> bool:
        return self.photometric in COLOURED


class _Headers:
    """Reads headers and decides by them which files are images that may be taken."""

    def __init__(self, root: Path, settings: DicomConfig, label_tag: str | None) -> None:
        self._root, self._settings, self._label_tag = root, settings, label_tag
        self._silent = 0

    def read(self, names: list[str]) -> list[_Header]:
        headers = [self._one(name) for name in names]
        if self._silent:
            logger.warning(
                "%d files of kinds that often have names burned into the picture do not say whether they have: look at "
                "them before you pass on what is made from them", self._silent,
            )  # fmt: skip
        wanted = self._settings.photometric
        usable = [header for header in headers if header.problem is None]
        if wanted == "auto":
            n_coloured = sum(header.coloured for header in usable)
            wanted = "colour" if 2 * n_coloured > len(usable) else "monochrome"
        if wanted != "any":
            for header in usable:
                if header.coloured != (wanted == "colour"):
                    why = (
                        "as most files are"
                        if self._settings.photometric == "auto"
                        else "as dataset.dicom.photometric says"
                    )
                    detail = f"{header.photometric}; {wanted} images are taken, {why}"
                    header.problem = ("other photometric interpretation", detail)
        return headers

    def _one(self, name: str) -> _Header:
        header = _Header(name)
        try:
            if (problem := file_problem(self._root, name)) is not None:
                raise Rejected(*problem)
            self._fill(header, self._root / name)
        except Rejected as problem:
            header.problem = (problem.reason, problem.detail)
        except Exception as error:  # values of odd forms; the words may quote them
            header.problem = ("cannot be decoded", f"its header is damaged ({type(error).__name__})")
        return header

    def _fill(self, header: _Header, path: Path) -> None:
        from pydicom.uid import UID

        tags = [*_HEADER_TAGS, *([self._label_tag] if self._label_tag else [])]
        values = read_header(path, tags)
        meta = values.file_meta
        kind = UID(str(values.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""))
        header.ids = {name: text for name in _IDS if (text := str(values.get(name) or "").strip())}
        header.synthetic = values.get("SyntheticData") == "YES"
        if self._label_tag:
            header.label = _plain(values.get(self._label_tag))
        if kind == _DICOMDIR or meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
            raise Rejected("DICOMDIR", "a directory of a medium; what it refers to is never followed")
        # A private class has no name but its number, which may be somebody's.
        name = kind.name
        if not name or name == str(kind):
            raise Rejected("unknown SOP class", "none that PS3.4 knows")
        if "Image Storage" not in name:
            raise Rejected("no image", name)
        if not (values.get("Rows") and values.get("Columns")):
            raise Rejected("no image", f"{name} without rows and columns; it may have been cut short")
        if "Secondary Capture" in name and not self._settings.secondary_captures:
            raise Rejected("secondary capture", f"{name}; dataset.dicom.secondary_captures would take it")
        if values.get("BurnedInAnnotation") == "YES" and not self._settings.burned_in:
            raise Rejected("burned-in annotation", "it says so itself; dataset.dicom.burned_in would take it")
        self._silent += values.get("BurnedInAnnotation") != "NO" and (
            values.get("Modality") in _OFTEN_BURNED_IN and not header.synthetic
        )
        header.photometric = str(values.get("PhotometricInterpretation") or "")
        if header.photometric not in (*MONOCHROME, *COLOURED):
            raise Rejected("unsupported photometric interpretation", "neither monochrome nor a colour that is known")
        header.plain = header.coloured or is_plain(values)
        header.frames = int(values.get("NumberOfFrames") or 1)
        if not 1 <= header.frames <= _MOST_FRAMES:
            raise Rejected("cannot be decoded", f"its header speaks of {header.frames} frames")


def _plain(value: Any) -> Any:
    """A tag's value as a label."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    return "\\".join(str(part) for part in value) if hasattr(value, "__iter__") else str(value)


def _rows(
    config: DatasetConfig,
    settings: DicomConfig,
    root: Path,
    headers: list[_Header],
    table: dict[str, Record] | None,
    pseudonyms: Pseudonyms,
) -> Iterator[Row]:
    keys = _keys(settings, headers)
    # One form for all: in a folder of CT, one file may happen to need no rescale.
    as_float = not all(header.plain for header in headers if header.problem is None)
    used: set[str] = set()
    fallen_back: Counter[str] = Counter()
    for header in headers:
        record = None
        if table is not None:
            key = next((key for key in keys(header) if key in table), None)
            record = None if key is None else table[key]
            used |= set() if key is None else {key}
        group, instead = _group(settings, header, pseudonyms)
        if instead and header.problem is None:
            fallen_back[instead] += 1
        row = Row(
            origin=pseudonyms.of("file", header.name),
            content=None,
            label=header.label if settings.label_tag else class_of(header.name) if settings.folders else None,
            group=group,
            is_synthetic=header.synthetic,
            problem=header.problem,
        )
        if table is not None and row.problem is None:
            row = labelled(config.columns, row, record, pseudonyms, "dicom")
        yield from _frames(settings, root, header, as_float, row)
    _warn_of_placeholder(settings, headers)
    for instead, count in fallen_back.items():
        logger.warning("%d files have no %s: %s", count, settings.group, instead)
    for key in sorted((table or {}).keys() - used):
        problem = ("missing file", "the table speaks of it, and no file is it")
        yield Row(origin=pseudonyms.of(_KINDS[settings.key], key), content=None, problem=problem)


def _warn_of_placeholder(settings: DicomConfig, headers: list[_Header]) -> None:
    """One PatientID in many studies may be what a de-identifier wrote for everybody: nothing could be divided then."""
    ids = [header.ids or {} for header in headers if header.problem is None]
    patients, studies = ({item.get(name) for item in ids} for name in ("PatientID", "StudyInstanceUID"))
    if settings.group == "PatientID" and len(patients) == 1 and None not in patients and len(studies) > 1:
        logger.warning(
            "all %d files have one and the same PatientID, in %d studies. If it stands for several patients, set "
            "dataset.dicom.group: StudyInstanceUID, or name a column of patients", len(ids), len(studies),
        )  # fmt: skip


def _group(settings: DicomConfig, header: _Header, pseudonyms: Pseudonyms) -> tuple[str | None, str | None]:
    """The pseudonym of a file's group, and what was taken where the tag is empty, in words."""
    ids = header.ids or {}
    # A patient has studies, a study has series: where an id is missing, the next smaller whole is kept together.
    order = _IDS[_IDS.index(settings.group) : -1]
    for name in order:
        if name in ids:
            words = None if name == settings.group else f"{name} takes its place as their group"
            return pseudonyms.of(_KINDS[name], ids[name]), words
    return None, "they have no group, and near-duplicates among them are kept together"


def _frames(settings: DicomConfig, root: Path, header: _Header, as_float: bool, row: Row) -> Iterator[Row]:
    """A row for each frame that is taken."""
    if row.problem is not None:
        yield row
        return
    count = header.frames
    if count == 1 and not isinstance(settings.frames, list):
        wanted = [0]
    else:
        named = {"first": [0], "middle": [(count - 1) // 2], "all": list(range(count))}
        wanted = named[settings.frames] if isinstance(settings.frames, str) else [n - 1 for n in settings.frames]
    for frame in wanted:
        origin = row.origin if count == 1 else f"{row.origin} frame {frame + 1}"
        if frame >= count:
            yield replace(row, origin=origin, problem=("no such frame", f"it has {count}"))
            continue
        content: Callable[[int], Picture] = partial(decode_frame, root / header.name, frame, settings, as_float)
        yield replace(row, origin=origin, content=content)


def _keys(settings: DicomConfig, headers: list[_Header]) -> Callable[[_Header], list[str]]:
    """What a file may be called in the table."""
    if settings.key != "file":
        return lambda header: [key] if (key := (header.ids or {}).get(settings.key)) else []
    keys = file_keys(header.name for header in headers)
    return lambda header: keys(header.name)
