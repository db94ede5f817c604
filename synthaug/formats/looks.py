"""The ledger of looks: a small JSON file that counts how many trials have looked at each test split.

Every trial that is read on a test split and acted upon wears the split out a little; a verdict therefore says how
many there were. The file holds digests, the names given to trials and days, never names of patients or files.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from synthaug.errors import BusyError, DatasetError, OutputError
from synthaug.formats.atomic import umask, write_text

logger = logging.getLogger(__name__)

_KIND, _VERSION = "synthaug test looks", 1
_NAME = "test_looks.json"
_SPLITS_SUFFIX, _SUFFIX = ".synthaug-splits.json", ".synthaug-looks.json"
_LONGEST_WAIT = 60.0  # seconds; the lock is held for the writing of one small file

Look = dict[str, str]  # trial, name, when


def looks_places(splits_ledger: str | None, output: Path) -> list[Path]:
    """Where looks may have been written down, the best place first.

    Beside the ledger of splits, so that runs with different outputs count together, and named like it where its
    name carries the dataset's: `faces.synthaug-splits.json` has `faces.synthaug-looks.json`. The run folder comes
    last. Where splits were given there is no ledger, and only runs with the same output count together.
    """
    fallback = output / _NAME
    if splits_ledger is None:
        return [fallback]
    ledger = Path(splits_ledger)
    dataset = ledger.name.removesuffix(_SPLITS_SUFFIX)
    beside = ledger.with_name(_NAME if dataset == ledger.name else dataset + _SUFFIX)
    return [fallback] if beside == fallback else [beside, fallback]


def looks_path(splits_ledger: str | None, output: Path) -> Path:
    """The first of `looks_places` that can be written; the run folder where none can, so that writing says why."""
    places = looks_places(splits_ledger, output)
    for path in places[:-1]:
        if _may_write(path.parent):
            return path
        logger.info("looks at the test split are counted in %s: %s cannot be written", places[-1], path.parent)
    return places[-1]


def register_look(path: Path, test_digest: str, trial: str, name: str, *, earlier: Sequence[Path] = ()) -> int:
    """Note that a trial looks at a test split, and return its number: how many trials had looked when it first did.

    A trial keeps its number for good, so one that was interrupted comes to the same count. Runs may share the file.

    Args:
        path: The ledger, made where there is none; `<path>.lock` is left beside it.
        test_digest: Digest of the test split.
        trial: Digest of the trial; the same digest is the same look.
        name: Words for the trial, for people who read the file.
        earlier: Other ledgers, `looks_places`, which are only read: their looks at this split that `path` lacks
            are taken over first. They are of use when a dataset's folder could be written at one time only.

    Returns:
        At least 1; this trial is included.

    Raises:
        BusyError: Another process has held the lock for a minute.
        DatasetError: A ledger is damaged or is another file; it is left as it is.
        OutputError: The ledger cannot be written.
    """
    from filelock import FileLock, Timeout

    # Looks are only ever added at the end and the file is replaced whole, so a known number needs neither lock nor
    # the right to write.
    known = _number(_read(path).get(test_digest, []), trial)
    if known is not None:
        return known
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # As writable as the user's other files: people who share a folder share the count.
        with FileLock(lock, timeout=_LONGEST_WAIT, mode=0o666 & ~umask()):
            tests = _read(path)
            looks = tests.setdefault(test_digest, [])
            for other in (_read(place).get(test_digest, []) for place in earlier if place != path):
                looks.extend(look for look in other if _number(looks, look["trial"]) is None)
            known = _number(looks, trial)
            if known is None:
                looks.append({"trial": trial, "name": name, "when": time.strftime("%Y-%m-%d")})
                known = len(looks)
            _write(path, tests)
            return known
    except Timeout as error:
        raise BusyError(
            f"another process has held {lock} for {_LONGEST_WAIT:g} seconds. Wait for it to end and run again."
        ) from error
    except OSError as error:
        raise OutputError(
            f"the ledger of looks {path} cannot be written: {error.strerror or error}. Make the folder {path.parent} "
            "writable and run again: a trial that is not counted would make the next verdict look better than it is."
        ) from error


def _write(path: Path, tests: dict[str, list[Look]]) -> None:
    text = json.dumps({"kind": _KIND, "version": _VERSION, "tests": tests}, indent=1)
    write_text(path, text + "\n")


def _number(looks: list[Look], trial: str) -> int | None:
    return next((number for number, look in enumerate(looks, start=1) if look["trial"] == trial), None)


def _read(path: Path) -> dict[str, list[Look]]:
    """Digest of a test split to its looks, in order of registration; empty where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] != _KIND or values["version"] != _VERSION:
            raise ValueError(f"kind {values['kind']!r}, version {values['version']!r}")
        tests = {str(digest): [_look(look) for look in looks] for digest, looks in values["tests"].items()}
        if any(len({look["trial"] for look in looks}) < len(looks) for looks in tests.values()):
            raise ValueError("a trial that is listed twice for one test split")
        return tests
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is not a ledger of looks that this version can read ({type(error).__name__}: {error}). Restore "
            "it; or move it away, and know that earlier looks at the test split are then not counted."
        ) from None


def _look(values: dict[str, str]) -> Look:
    look = {key: values[key] for key in ("trial", "name", "when")}
    if not all(isinstance(value, str) for value in look.values()):
        raise ValueError(f"a look with values that are no text: {look}")
    return look


def _may_write(folder: Path) -> bool:
    # As for the ledger of splits: a folder that nobody is given the right to write into is left alone, even by root.
    try:
        return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)
    except OSError as error:
        logger.debug("looks cannot be written to %s: %s", folder, error)
        return False
