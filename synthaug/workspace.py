"""The run folder: who may write in it, which stages are complete, and how a release appears in it.

```
<output>/run.lock                    held by the run that writes here; run.holder.json says who that is
<output>/run.steps.json              what the run that wrote here last has come to, stage by stage, and its error
<output>/stages/<stage>-<12 hex>/    named by the digest of what it is made from; done.json is written last
<output>/releases/<12 hex>/          staged beside, renamed whole, never changed afterwards
<output>/release, checkpoint         symbolic links to the newest release and its pipeline, each swapped in one step
<output>/contact_sheet.png, rejected.png, verdict.json, verdict_*.png, run.json, error.log
<output>/judged/<name>-<8 hex>/      what was found about another tool's samples
<output>/growth.json                 what each release was made of, and which one a later one grows from
```
The file system is the truth: a stage whose done.json can be read is complete, any other is begun again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from synthaug.digest import digest_json
from synthaug.errors import BusyError, OutputError, SynthaugError
from synthaug.formats.atomic import PART, flush, umask, whole_file, write_text
from synthaug.records import DONE_FILE, WORK_DIR, StageRecord

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=StageRecord)

LOCK_FILE, HOLDER_FILE, STEPS_FILE = "run.lock", "run.holder.json", "run.steps.json"
PREVIOUS_FILE = "previous.json"
_STAGING_PREFIX = ".staging-"
# Whoever asks if a run folder is held (`synthaug status`) has the lock for an instant; that must not stop a run.
_WAIT_FOR_THE_LOCK = 0.3
# Quota and file-size limits leave a run in the same place as a full disk.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("no space left on device", "disk quota exceeded", "file too large")


@dataclass(frozen=True)
class Done(Generic[R]):
    """What a stage came to, now or in an earlier run."""

    record: R
    directory: Path
    reused: bool
    seconds: float


class Workspace:
    """One run's folder, held by a lock. Made by `open_workspace`."""

    # A workspace in which nothing is made may be asked for records that are yet to be; see `synthaug.status`.
    looks_only = False

    def __init__(self, output: Path) -> None:
        self.output = output
        self.stages = output / "stages"
        self.releases = output / "releases"
        self.summary = output / "run.json"
        # What is kept of the release before this job, in sentences; see `synthaug.growth`.
        self.growth: tuple[str, ...] = ()
        self.growth_open = False  # it is not known yet, since the images are yet to be read
        self._steps: dict[str, Any] = {
            "pid": os.getpid(),
            "started": _now(),
            "ended": None,
            "error": None,
            "stages": [],
        }

    def stage(
        self,
        stage: str,
        title: str,
        key_parts: list[Any],
        record_class: type[R],
        function: Callable[[Path], R],
        *,
        resumes: bool = False,
        intact: Callable[[R], bool] | None = None,
        names: Sequence[str] = (),
    ) -> Done[R]:
        """Return the record of a stage: read from its directory if complete, otherwise made by `function`.

        Args:
            stage: Name of the stage, in the name of the directory.
            title: Name for people ("sample round 2").
            key_parts: Plain data; all that the result depends on. Its digest names the directory.
            function: Fills the directory it is given and returns the record.
            resumes: The stage goes on from what it left behind, so an incomplete directory is not emptied.
            intact: Says of a complete stage whether what it made elsewhere still stands; if not, it is made again.
            names: What people call the key parts, kept beside them.
        """
        with self._noted(stage, title) as note:
            done = self._stage(stage, title, key_parts, record_class, function, resumes, intact, names)
            note(done)
            return done

    def _stage(
        self,
        stage: str,
        title: str,
        key_parts: list[Any],
        record_class: type[R],
        function: Callable[[Path], R],
        resumes: bool,
        intact: Callable[[R], bool] | None,
        names: Sequence[str],
    ) -> Done[R]:
        started = time.monotonic()
        key = digest_json(key_parts)
        directory = self.stages / f"{stage}-{key[:12]}"
        record = self._load(directory, record_class)
        if record is not None and intact is not None and not intact(record):
            logger.warning("%s: done before, but what it made is damaged or gone; it is made again", title)
            if resumes:
                (directory / DONE_FILE).unlink()
            else:
                shutil.rmtree(directory)
            record = None
        if record is not None:
            shutil.rmtree(directory / WORK_DIR, ignore_errors=True)
            logger.info("%s: reused, nothing it is made from has changed", title)
            return Done(record, directory, True, time.monotonic() - started)
        with self.full_disk_explained(title):
            if not resumes:
                shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, exist_ok=True)
            try:
                record = function(directory)
                # What done.json vouches for is on the disk before it.
                _flush_files(directory)
                seconds = time.monotonic() - started
                _write_json(
                    directory / DONE_FILE,
                    {
                        "stage": stage,
                        "title": title,
                        "key": key,
                        "key_parts": key_parts,
                        "key_names": list(names),
                        "seconds": round(seconds, 3),
                        "location": os.path.relpath(record.directory, directory),
                        "record": record.model_dump(mode="json"),
                    },
                )
            except BaseException:
                if not resumes:
                    shutil.rmtree(directory, ignore_errors=True)
                raise
        # After done.json: whoever is killed in between has all that the stage needs to go on.
        shutil.rmtree(directory / WORK_DIR, ignore_errors=True)
        logger.info("%s: done in %.1f s", title, seconds)
        return Done(record, directory, False, seconds)

    @contextmanager
    def _noted(self, stage: str, title: str) -> Iterator[Callable[[Done[Any]], None]]:
        """Keep what becomes of a stage in run.steps.json, for whoever asks how the run stands."""
        entry: dict[str, Any] = {"stage": stage, "title": title, "state": "running", "started": _now()}
        self._steps["stages"].append(entry)
        self.write_steps()

        def note(done: Done[Any]) -> None:
            entry["state"] = "reused" if done.reused else "done"
            entry["seconds"] = round(done.seconds, 3)

        try:
            yield note
        except BaseException:
            entry["state"] = "failed"
            raise
        # Not written here: the next stage, or the end of the run, does.

    def write_steps(self, **changes: Any) -> None:
        self._steps |= changes
        _write_json(self.output / STEPS_FILE, self._steps)

    def _load(self, directory: Path, record_class: type[R]) -> R | None:
        try:
            done = json.loads((directory / DONE_FILE).read_text(encoding="utf-8"))
            # The record's files are beside done.json, but for a release, which has a folder of its own.
            location = Path(os.path.normpath(directory / done["location"]))
            record: R = record_class.from_plain(done["record"], location)
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        return record if location.is_dir() else None

    @contextmanager
    def staged_release(self) -> Iterator[Path]:
        """Yield an empty directory to build a release in; whatever `publish` did not take is removed."""
        self.releases.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=self.releases))
        try:
            staging.chmod(0o777 & ~umask())
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def publish(self, staging: Path, digest: str, intact: Callable[[Path], bool]) -> Path:
        """Flush a staged release and rename it whole to its place; an intact one that is there stays untouched.

        A damaged one is kept under another name: it may be all that somebody has.
        """
        final = self.releases / digest[:12]
        if final.exists() and not intact(final):
            aside = Path(tempfile.mkdtemp(prefix=f"{final.name}.damaged-", dir=self.releases))
            os.replace(final, aside)
            logger.warning("the damaged release %s is kept as %s", final, aside)
        if not final.exists():
            for path in [*sorted(staging.rglob("*")), staging]:
                flush(path)
            os.replace(staging, final)
            flush(self.releases)
        return final

    def release_before(self, directory: Path) -> Path | None:
        """The release that stood when the stage in `directory` was first begun: what its own may take shards from.

        Which one that is decides which shard a row is in, so it is settled once and written beside the stage's files:
        whoever is killed and runs again, or loses the release and has it made again, comes to the same bytes.
        """
        path, link = directory / PREVIOUS_FILE, self.output / "release"
        try:
            name = json.loads(path.read_text(encoding="utf-8"))["release"]
        except (OSError, ValueError, KeyError, TypeError):
            name = Path(os.readlink(link)).name if link.is_symlink() and link.is_dir() else None
            _write_json(path, {"release": name})
        return None if name is None else self.releases / Path(str(name)).name

    def point_at(self, name: str, target: Path) -> Path:
        """Make `<output>/<name>` a link to `target`, in one step, and return the link."""
        link = self.output / name
        if link.exists() and not link.is_symlink():
            raise OutputError(
                f"{link} is not a symbolic link, so it was not made by synthaug and is left alone. "
                f"Move it away and run again; the {name} itself is complete in {target}."
            )
        relative = os.path.relpath(target, self.output)
        if not (link.is_symlink() and os.readlink(link) == relative):
            temporary = self.output / f".{name}.{os.getpid()}{PART}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(relative, target_is_directory=True)
            os.replace(temporary, link)
        return link

    def show(self, file: Path, folder: str | None = None) -> Path:
        """Put a copy of a stage's file where people look for it: in the run folder itself, or in a folder of it."""
        shown = self.output / (folder or "") / file.name
        with whole_file(shown) as temporary:
            shutil.copyfile(file, temporary)
        return shown

    def unshow(self, pattern: str, folder: str | None = None) -> None:
        """Remove what an earlier run showed, so that it does not stand beside what is shown now."""
        for file in (self.output / (folder or "")).glob(pattern):
            file.unlink()

    def is_made(self, record: StageRecord) -> bool:
        """Is a record that of a stage that is done, not a stand-in for what it will come to?"""
        return True

    def write_summary(self, values: dict[str, Any]) -> None:
        _write_json(self.summary, values)

    def sweep(self) -> None:
        """Remove what a killed run left half written, releases and files. Only the holder of the lock may."""
        for path in self.releases.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
        left = [
            *self.output.glob(f".*{PART}"),
            *self.stages.rglob(f".*{PART}"),
            *self.output.glob(f"judged/*/.*{PART}"),
        ]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def full_disk_explained(self, doing: str) -> Iterator[None]:
        """Turn a full disk, however a library words it, into an error that says what to do."""
        try:
            yield
        except Exception as error:
            # A stage may have made an error of its own out of it; what that says (which file, say) is kept.
            ours = isinstance(error, SynthaugError)
            words = _disk_is_full((error.__cause__ or error.__context__) if ours else error)
            if words is None:
                raise
            raise SynthaugError(
                f"disk full while working on '{doing}' ({error if ours else words}). Every stage that was complete is "
                f"kept in {self.output}. Free some space and run again; it goes on from there."
            ) from error


@contextmanager
def open_workspace(folder: Path) -> Iterator[Workspace]:
    """Create and lock the run folder, before any work.

    Raises:
        OutputError: The folder is a file or cannot be written.
        BusyError: Another run holds it.
    """
    workspace = Workspace(folder)
    with workspace.full_disk_explained("opening the run folder"):
        _make_writable(folder)
    with _held(folder):
        workspace.sweep()
        try:
            yield workspace
        except BaseException as error:
            # A full disk may be the error.
            with suppress(OSError):
                workspace.write_steps(ended=_now(), error={"kind": type(error).__name__, "message": str(error)[:2000]})
            raise
        workspace.write_steps(ended=_now())


def held_by(folder: Path) -> str | None:
    """Who runs on a run folder now, in words; None if nobody does. Nothing is written.

    A lock file or a holder's name that a killed run left says nothing: the kernel let go of its lock.
    """
    try:
        import fcntl

        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _named(folder / HOLDER_FILE).removeprefix(": ") or "a process that has not said its name"
    finally:
        os.close(descriptor)
    return None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _make_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder} is a file. Name a directory with 'output:' or --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise OutputError(
            f"output {folder} cannot be written ({error.strerror or error}). Name another with 'output:' or --output."
        ) from None


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    # The lock belongs to the open file, so the kernel lets go of it when a run is killed; a lock file that
    # lies there says nothing. The holder's name is kept beside it, since opening a lock file empties it.
    lock = FileLock(folder / LOCK_FILE)
    holder = folder / HOLDER_FILE
    try:
        lock.acquire(timeout=_WAIT_FOR_THE_LOCK)
    except Timeout:
        raise BusyError(
            f"output {folder} is in use by another run{_named(holder)}. Wait for it to end, or give this run "
            "another output."
        ) from None
    try:
        _write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()})
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _named(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text(encoding="utf-8"))
        return f": process {int(who['pid'])} on host {who['host']}, since {who['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _disk_is_full(error: BaseException | None) -> str | None:
    """The system's words when an exception, or one that it came from, means there is no room to write."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            where = f": {error.filename}" if error.filename else ""
            return f"{os.strerror(error.errno or errno.ENOSPC)}{where}"
        # safetensors, pyarrow and torch write from native code and keep only the words.
        for words in _FULL_WORDS:
            if words in str(error).lower():
                return words
        error = error.__cause__ or error.__context__
    return None


def _flush_files(directory: Path) -> None:
    for path in [*sorted(directory.rglob("*")), directory]:
        if path == directory or WORK_DIR not in path.relative_to(directory).parts:
            flush(path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
