"""Pseudonyms of patients and their files: keyed hashes, with the key and the list of what they stand for kept apart.

A pseudonym is the first 64 bits of HMAC-SHA256 (RFC 2104, FIPS 180-4) under a random key of 256 bits, one a dataset.
Key and list are files that only their owner can read (mode 0600), in the user's data directory or where
`dataset.dicom.key_file` says; never in a run folder. Whoever has neither can tell no name from a pseudonym, nor try
names out. Without the key the same patients get other pseudonyms: keep it as long as the dataset may grow.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from synthaug.digest import digest_json
from synthaug.errors import DatasetError, OutputError
from synthaug.formats.atomic import flush

_KEY_BYTES = 32
_DIGITS = 16  # of a hash that are kept: 64 bits
_LIST_SUFFIX = ".pseudonyms.csv"
_HEAD = ["pseudonym", "kind", "stands for"]


class Pseudonyms:
    """Gives pseudonyms under one key and remembers what they stand for. Made by `open_pseudonyms`."""

    def __init__(self, key: bytes, key_file: Path) -> None:
        self._key = key
        self.list_file = key_file.with_name(key_file.name.removesuffix(".key") + _LIST_SUFFIX)
        self._known: dict[str, tuple[str, str]] = {}  # pseudonym: kind, what it stands for

    def of(self, kind: str, name: str) -> str:
        """The pseudonym of a name, `<kind>-<16 hex digits>`; equal names of one kind have equal pseudonyms."""
        pseudonym = f"{kind}-{self.digest(kind, name)[:_DIGITS]}"
        self._known[pseudonym] = (kind, name)
        return pseudonym

    def digest(self, kind: str, text: str) -> str:
        """HMAC-SHA256 of a text, 64 hex digits; nothing is remembered."""
        message = f"{kind}:{text}".encode("utf-8", "backslashreplace")
        return hmac.digest(self._key, message, hashlib.sha256).hex()

    def save(self) -> None:
        """Write the list; what earlier runs wrote stays in it, so that a file that was removed can still be named.

        Raises:
            DatasetError: The list that is there cannot be read, or others may read it.
            OutputError: It cannot be written.
        """
        earlier = {}
        if self.list_file.exists():
            _refuse_open_doors(self.list_file)
            try:
                with self.list_file.open(encoding="utf-8", newline="") as file:
                    head, *rows = csv.reader(file, strict=True)
                if head != _HEAD or any(len(row) != len(_HEAD) for row in rows):
                    raise ValueError
            except (OSError, ValueError, csv.Error):
                raise DatasetError(
                    f"{self.list_file} is not a list of pseudonyms that this version can read. Restore it, or move it "
                    "away to have it written anew."
                ) from None
            earlier = {row[0]: (row[1], row[2]) for row in rows}
        known = {**earlier, **self._known}
        if known == earlier and earlier:
            return
        with _private_file(self.list_file) as temporary:
            with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(_HEAD)
                writer.writerows((pseudonym, *known[pseudonym]) for pseudonym in sorted(known))
            flush(temporary)
            os.replace(temporary, self.list_file)


def open_pseudonyms(dataset: Path, key_file: str | None, *, outside: tuple[Path, ...] = ()) -> Pseudonyms:
    """The pseudonyms of a dataset, under its key; a key is made where there is none.

    Args:
        dataset: The dataset's folder; its place is what the key is named after where `key_file` is None.
        key_file: Where the key is, or will be.
        outside: Folders that the key must not lie in.

    Raises:
        DatasetError: The key is damaged, may be read by others, or lies in one of the folders.
        OutputError: It cannot be written.
    """
    path = Path(key_file) if key_file is not None else _home() / f"{digest_json(str(dataset.resolve()))[:16]}.key"
    path = path.expanduser().absolute()
    for folder in outside:
        if path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(
                f"the key of the pseudonyms, {path}, lies inside {folder}, which is passed on or read as data. Name "
                "another place in dataset.dicom.key_file."
            )
    if not path.exists():
        _make_key(path)
    _refuse_open_doors(path)
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        raise DatasetError(
            f"{path} is not a key of pseudonyms: 64 hexadecimal digits were expected. Restore it, or name another file "
            "in dataset.dicom.key_file; with another key every patient gets another pseudonym."
        )
    return Pseudonyms(key, path)


def _home() -> Path:
    """The user's data directory (XDG Base Directory Specification)."""
    given = os.environ.get("XDG_DATA_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "share"
    return base / "synthaug" / "keys"


def _make_key(path: Path) -> None:
    with _private_file(path) as temporary:
        temporary.write_text(secrets.token_hex(_KEY_BYTES) + "\n", encoding="ascii")
        flush(temporary)
        try:
            # Unlike a renaming, a link never takes the place of a key that another run has made meanwhile.
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:
            os.replace(temporary, path)  # a file system without links


@contextmanager
def _private_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that only its owner can read; it is removed at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
        flush(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Pseudonyms need a private place: name one in "
            "dataset.dicom.key_file."
        ) from None


def _refuse_open_doors(path: Path) -> None:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from None
    if mode & 0o077:
        raise DatasetError(
            f"{path} may be read by others than its owner (mode {mode:04o}), and whoever has it can tell patients from "
            f"pseudonyms. Call chmod 600 on it and run again."
        )
