"""Writing that appears whole or not at all: into a neighbour first, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How the names of unfinished files and directories end; they begin with a dot.
PART = ".part"
# Where Linux tells the mask without setting it.
_STATUS = Path("/proc/self/status")
_setting_umask = threading.Lock()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` if the block ends well, removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes private files; what we write is as readable as the user's other files.
        temporary.chmod(0o666 & ~umask())
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; it is renamed to `path` if the block ends well, removed if not.

    Raises:
        FileExistsError: `path` exists and is not an empty directory; nothing of it is touched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=PART, dir=path.parent))
    try:
        temporary.chmod(0o777 & ~umask())
        yield temporary
        for file in sorted(temporary.rglob("*")):
            flush(file)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists already")
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have the system write a file or directory to disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """Return the process's file mode mask."""
    try:
        for line in _STATUS.read_bytes().splitlines():
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    # Elsewhere there is no way to read the mask without setting it, and two threads at a time would leave ours.
    with _setting_umask:
        mask = os.umask(0o022)
        os.umask(mask)
    return mask
