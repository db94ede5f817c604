"""Folders of DICOM files (PS3.10), with labels from a table, a tag or folders, and pseudonyms in place of names.

Files are found by walking the folder; a DICOMDIR is never followed. Every row's origin and group is a pseudonym, and
no message quotes a file's name or the value of a tag. Class names, subgroups and splits go into records as they are.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from synthaug.config import DatasetConfig, DicomConfig
from synthaug.digest import digest_json
from synthaug.errors import DatasetError
from synthaug.formats.dicom_pixels import (
    COLOURED,
    IMAGE_TAGS,
    MONOCHROME,
    decode_frame,
    quiet_pydicom,
    read_header,
)
from synthaug.formats.pixels import Picture, Rejected
from synthaug.formats.pseudonyms import Pseudonyms, open_pseudonyms
from synthaug.formats.source_rows import (
    Row,
    Rows,
    clean_text,
    given_split,
    group_of,
    is_missing,
    is_truthy,
    require_column,
)
from synthaug.text import printable

logger = logging.getLogger(__name__)

_IDS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_KINDS = {
    "PatientID": "patient", "StudyInstanceUID": "study", "SeriesInstanceUID": "series", "SOPInstanceUID": "image",
    "file": "file",
}  # fmt: skip
_HEADER_TAGS = [*_IDS, *IMAGE_TAGS[:12], "BurnedInAnnotation", "SyntheticData"]
_DICOMDIR = "1.2.840.10008.1.3.10"
# Kinds of values (PS3.5 6.2) that are codes and numbers, and tags of free text that speak of no person.
_HARMLESS_VR = {"CS", "IS", "US", "SS"}
_HARMLESS_TAGS = {"ContrastBolusAgent", "Manufacturer", "ManufacturerModelName", "ProtocolName"}
# Where names are burned in most often; files of these that do not say are counted.
_OFTEN_BURNED_IN = ("US", "OT", "SC", "XC", "ES")
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
_MOST_FRAMES = 100_000

Record = dict[str, Any]


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
    names = _walk(root)
    if settings.table is not None:
        # A table that lies among the images is no image.
        table_file = Path(settings.table).resolve()
        names = [name for name in names if (root / name).resolve() != table_file]
    if not names:
        raise DatasetError("the folder of DICOM files in dataset.path holds no files.")
    tag = None if settings.label_tag is None else _harmless_tag(settings.label_tag)
    table = None if settings.table is None else _read_table(config, settings)
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
        known_classes=tuple(_class_folders(root)) if settings.folders else (),
        note=note,
    )


def dicom_fingerprint(config: DatasetConfig) -> str:
    """The fingerprint of names, sizes and times, under the key of the pseudonyms: nobody else can try names out.

    Raises:
        DatasetError: The folder, the table or the key cannot be read.
        OutputError: A key cannot be made.
    """
    settings, root, pseudonyms = _opened(config)
    entries = [[clean_text(name), *_size_and_time(root / name)] for name in _walk(root)]
    table = None if settings.table is None else [clean_text(settings.table), *_size_and_time(_table_file(settings))]
    return f"dicom:{pseudonyms.digest('fingerprint', digest_json([clean_text(str(root)), entries, table]))}"


def _opened(config: DatasetConfig) -> tuple[DicomConfig, Path, Pseudonyms]:
    settings = config.dicom
    assert config.path is not None
    assert settings is not None
    root = Path(config.path).resolve()
    if not root.is_dir():
        raise DatasetError("dataset.path is not a folder. Format 'dicom' takes a folder of DICOM files.")
    return settings, root, open_pseudonyms(root, settings.key_file, outside=(root,))


def _walk(root: Path) -> list[str]:
    """Names of all visible files below the root, relative to it, in order; links to folders are among them."""
    unreadable: list[OSError] = []
    found: list[str] = []
    for place, folders, names in os.walk(root, followlinks=False, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(name for name in folders if not _hidden(name) and name not in links)
        below = os.path.relpath(place, root)
        found += [os.path.normpath(os.path.join(below, name)) for name in [*names, *links] if not _hidden(name)]
    if unreadable:
        # Their names may be those of patients.
        raise DatasetError(
            f"{len(unreadable)} folders below dataset.path cannot be read: {unreadable[0].strerror}. Give yourself the "
            "right to read them, or take them out."
        )
    return sorted(found)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1  # a dangling link; it is set aside when it is read
    return found.st_size, found.st_mtime_ns


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(
            clean_text(entry.name) for entry in entries
            if not _hidden(entry.name) and entry.is_dir(follow_symlinks=False)
        )  # fmt: skip


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
            path = self._root / name
            if not path.resolve().is_relative_to(self._root):
                raise Rejected("outside the dataset", "a symbolic link leads out of dataset.path")
            if path.is_dir():
                raise Rejected("a folder, no file", "links to folders are not followed")
            if not path.is_file():
                raise Rejected("missing file", "a link to nothing, or no plain file")
            self._fill(header, path)
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
            label=header.label if settings.label_tag else _class_of(header.name) if settings.folders else None,
            group=group,
            is_synthetic=header.synthetic,
            problem=header.problem,
        )
        if table is not None and row.problem is None:
            row = _labelled(config, row, record, pseudonyms)
        yield from _frames(settings, root, header, row)
    for instead, count in fallen_back.items():
        logger.warning("%d files have no %s: %s", count, settings.group, instead)
    for key in sorted((table or {}).keys() - used):
        problem = ("missing file", "the table speaks of it, and no file is it")
        yield Row(origin=pseudonyms.of(_KINDS[settings.key], key), content=None, problem=problem)


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


def _labelled(config: DatasetConfig, row: Row, record: Record | None, pseudonyms: Pseudonyms) -> Row:
    if record is None:
        return replace(row, problem=("not in the table", "the table of labels does not list it"))
    columns = config.columns
    label = record.get(columns.label)
    split = None
    problem = row.problem
    if columns.split is not None:
        if is_missing(given := record.get(columns.split)):
            problem = ("no split", f"column '{columns.split}' is empty")
        else:
            split = given_split(given, f"column '{columns.split}' of dataset.dicom.table")
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


def _frames(settings: DicomConfig, root: Path, header: _Header, row: Row) -> Iterator[Row]:
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
        content: Callable[[int], Picture] = partial(decode_frame, root / header.name, frame, settings)
        yield replace(row, origin=origin, content=content)


def _class_of(name: str) -> str | None:
    first, separator, _ = name.partition(os.sep)
    return first if separator else None


def _keys(settings: DicomConfig, headers: list[_Header]) -> Callable[[_Header], list[str]]:
    """What a file may be called in the table. A bare name counts only where one file alone has it."""
    if settings.key != "file":
        return lambda header: [key] if (key := (header.ids or {}).get(settings.key)) else []
    several = Counter(os.path.basename(header.name) for header in headers)

    def keys(header: _Header) -> list[str]:
        base = os.path.basename(header.name)
        paths = [clean_text(header.name)]
        if several[base] == 1:
            paths += [clean_text(base), clean_text(os.path.splitext(base)[0])]
        return paths

    return keys


def _table_file(settings: DicomConfig) -> Path:
    assert settings.table is not None
    file = Path(settings.table)
    if not file.is_file():
        raise DatasetError("the file in dataset.dicom.table does not exist. Check the path in the configuration.")
    return file


def _read_table(config: DatasetConfig, settings: DicomConfig) -> dict[str, Record]:
    """Key to the record of a table of labels.

    Raises:
        DatasetError: It cannot be read, lacks a column, or says two things of one key. Rows are named by number.
    """
    file, columns, where = _table_file(settings), config.columns, "the table in dataset.dicom.table"
    head, records = _read_excel(file, where) if file.suffix.lower() in (".xlsx", ".xlsm") else _read_csv(file, where)
    key_column = settings.key_column or settings.key
    if key_column not in head:
        raise DatasetError(
            f"{where} has no column '{key_column}' with what its rows speak of. It has: "
            f"{', '.join(map(printable, head)) or 'none'}. Set dataset.dicom.key and key_column."
        )
    for setting in ("label", "group", "subgroup", "split"):
        if (wanted := getattr(columns, setting)) is not None:
            require_column(wanted, setting, head, where)
    labels = [record[columns.label] for record in records if not is_missing(record.get(columns.label))]
    if labels and all(isinstance(label, str) and re.fullmatch(r"-?[0-9]+", label) for label in labels):
        # A table of text cannot say what is a number.
        for record in records:
            record[columns.label] = None if is_missing(record[columns.label]) else int(record[columns.label])
    table: dict[str, Record] = {}
    first: dict[str, int] = {}
    for number, record in enumerate(records, start=2):
        key = group_of(record.get(key_column))
        if key is None:
            raise DatasetError(f"row {number} of {where} has nothing in column '{key_column}'. Every row needs a key.")
        key = key.strip()
        if settings.key == "file":
            key = os.path.normpath(key.replace("\\", "/"))
        if key in table and table[key] != record:
            raise DatasetError(f"rows {first[key]} and {number} of {where} say two different things of one key.")
        table[key], first[key] = record, first.get(key, number)
    return table


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
