"""Arrays on disk whose room is taken before they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from synthaug.formats.reserved_array import reserved_array


def test_it_is_an_npy_file_of_zeros_with_its_blocks_taken(tmp_path: Path) -> None:
    array = reserved_array(tmp_path / "x.npy", np.uint8, (1000, 8, 8, 1))
    array[3] = 7
    array.flush()
    read = np.load(tmp_path / "x.npy")
    assert read.shape == (1000, 8, 8, 1)
    assert read[3].min() == 7
    assert read.sum() == 7 * 64
    status = (tmp_path / "x.npy").stat()
    assert status.st_blocks * 512 >= status.st_size


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        reserved_array(tmp_path / "x.npy", np.float32, (10, 3))
