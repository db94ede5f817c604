"""An .npy file that grows row by row, so that memory does not grow with it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

_PIECE_BYTES = 1 << 23


class GrowingArray:
    """Rows of one shape and dtype, appended to an .npy file: `with GrowingArray(path, shape, dtype) as rows:`.

    The header is right when the block ends; until then it says that there are no rows.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.count = 0
        self._row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._file: BinaryIO = path.open("w+b")
        self._start = self._write_header()

    def __enter__(self) -> GrowingArray:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._write_header()
        finally:
            self._file.close()

    def close(self) -> None:
        """Close the file as it is, for when the rows are no longer wanted."""
        self._file.close()

    def append(self, row: np.ndarray) -> None:
        """Add one row at the end."""
        if row.shape != self.shape or row.dtype != self.dtype:
            raise ValueError(f"row {row.dtype} {row.shape} does not fit rows of {self.dtype} {self.shape}")
        self._file.write(np.ascontiguousarray(row).data)
        self.count += 1

    def keep(self, mask: np.ndarray) -> None:
        """Remove the rows where `mask` (bool, one a row) is False; the others move together, in order."""
        if mask.all():
            return
        kept = np.flatnonzero(mask)
        target = 0
        # Runs of neighbours move together. A row never moves backwards past one that is still to be read.
        for run in np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1):
            for first in range(0, len(run), max(1, _PIECE_BYTES // self._row_bytes)):
                piece = run[first : first + max(1, _PIECE_BYTES // self._row_bytes)]
                self._file.seek(self._start + int(piece[0]) * self._row_bytes)
                data = self._file.read(len(piece) * self._row_bytes)
                self._file.seek(self._start + target * self._row_bytes)
                self._file.write(data)
                target += len(piece)
        self.count = target
        self._file.truncate(self._start + target * self._row_bytes)
        self._file.seek(0, 2)

    def digest(self) -> str:
        """SHA-256 over the shape, the dtype and all values."""
        state = hashlib.sha256(f"{(self.count, *self.shape)}{self.dtype.str}".encode())
        self._file.seek(self._start)
        while data := self._file.read(_PIECE_BYTES):
            state.update(data)
        return state.hexdigest()

    def _write_header(self) -> int:
        # NumPy leaves room in the header for the first axis to grow, so that a later one fits in the same place.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
