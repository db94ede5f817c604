"""Digests: one spelling of "the same" for files, arrays and settings. All are SHA-256 in lower-case hex."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np


def digest_json(value: Any) -> str:
    """Digest of plain data: keys sorted, no white space, UTF-8; NaN is refused with ValueError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_array(array: np.ndarray) -> str:
    """Digest of an array's shape, type and values (little-endian, C order)."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    state = hashlib.sha256(f"{array.shape}{array.dtype.str.lstrip('<|=')}".encode())
    state.update(array.data if array.size else b"")
    return state.hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_directory(path: Path, *, without: re.Pattern[str] | None = None) -> str:
    """Digest of every file below a directory: relative names and contents, in order of name.

    Args:
        without: Folders directly below it that are left out: those whose whole name is matched.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if without is not None:
        files = [file for file in files if not without.fullmatch(file.relative_to(path).parts[0])]
    return digest_json([[file.relative_to(path).as_posix(), digest_file(file)] for file in files])
