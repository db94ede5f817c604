"""An .npy file of known size, written in any order through memory, with its room on the disk taken first."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt


def reserved_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """Create `path` as an .npy file of zeros, mapped into memory for writing.

    A mapped file is sparse at first, and a disk that is full when a page is written ends the process by a
    signal (SIGBUS), without a word. Here the blocks are taken at once, so a full disk is an OSError.
    """
    array: np.memmap = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # macOS has no such call; there a full disk keeps its bad manners.
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
