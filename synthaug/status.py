"""How a run folder stands: what is done, what it cost, what comes next, and why a stage would be reused or redone.

Nothing is written and no lock is kept, so it may be asked while a run is at work.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import SynthaugError, UsageError
from synthaug.growth import described
from synthaug.pipeline import explain
from synthaug.records import DONE_FILE, WORK_DIR, Record, StageRecord
from synthaug.workspace import STEPS_FILE, Done, Workspace, held_by

R = TypeVar("R", bound=StageRecord)

# The whole job's stages in order; what a round of samples is followed by is known only when it was audited.
_ORDER = ("read", "split", "plan", "train", "judge", "membership", "sample", "audit", "evaluate", "release")
_TO_COME = "to be made: "
_MOST_WORDS = 80
# What a job may keep of the release before it.
_GROWS = ("train", "membership", "sample")


class StageStatus(Record):
    """One directory of a stage."""

    title: str
    directory: str
    state: Literal["done", "begun"]
    seconds: float | None = Field(None, description="Wall time that it took; None while it is not done.")
    bytes: int
    finished: str | None = None


class StageOutlook(Record):
    """What a run would do with a stage."""

    title: str
    action: Literal["reuse", "redo", "go on", "begin", "open"] = Field(
        description="go on: from what an interrupted run left; open: hangs on what a stage before it comes to."
    )
    reasons: tuple[str, ...]
    seconds: float | None = Field(None, description="What it took the last time.")


class RunStatus(Record):
    """How a run folder stands; this is the object that `synthaug status --json` prints."""

    run: Path
    running: str | None = Field(description="Who is at work here now, in words; None: nobody.")
    stages: tuple[StageStatus, ...] = Field(description="Every stage's directory, the oldest first.")
    releases: dict[str, int] = Field(description="Release to its bytes.")
    release: str | None = Field(description="The newest release.")
    verdict: str | None = None
    published: str | None = None
    seconds: float = Field(description="Of all stages that are done.")
    bytes: int = Field(description="Of the whole run folder.")
    last_run: str | None = Field(None, description="What the last run came to, in words.")
    error: str | None = Field(None, description="What ended the last run, if it did not end well.")
    next: str
    why: tuple[StageOutlook, ...] | None = Field(None, description="Given a configuration: stage by stage.")
    growth: tuple[str, ...] = Field(
        (),
        description="Given a configuration: what of the newest release would be kept, which classes trained for, and "
        "why. Otherwise the checkpoints of the newest release, where there are several.",
    )


def status(run: Path, config: Config | None = None) -> RunStatus:
    """Look at a run folder.

    Args:
        run: The run folder.
        config: The job that would be run there; explains every stage's reuse or redo.

    Raises:
        UsageError: `run` is no run folder.
    """
    if not (run / "stages").is_dir():
        raise UsageError(f"{run} is no run folder: it has no folder 'stages'. Name the directory of 'output:'.")
    stages = tuple(_stages(run))
    steps = _read(run / STEPS_FILE) or {}
    running = held_by(run)
    summary = _read(run / "run.json") or {}
    link = run / "release"
    error = steps.get("error")
    why, growth = (None, described(run)) if config is None else _look(config, run)
    return RunStatus(
        run=run,
        running=running,
        stages=stages,
        releases={path.name: _size(path) for path in sorted(run.glob("releases/*")) if path.is_dir()},
        release=Path(os.readlink(link)).name if link.is_symlink() and link.exists() else None,
        verdict=summary.get("verdict_sentence"),
        published=summary.get("pushed_to"),
        seconds=round(sum(item.seconds or 0.0 for item in stages), 3),
        bytes=_size(run),
        last_run=_last_run(steps, running),
        error=None if error is None or running else f"{error['kind']}: {error['message']}",
        next=_next(steps, running, why),
        why=why,
        growth=growth,
    )


def look(config: Config, run: Path | None = None) -> tuple[StageOutlook, ...]:
    """What `augment(config)` would do with every stage, without doing it.

    A stage that would be redone stands in with what it came to the last time, under a digest that is yet to be made: so
    what hangs on it is redone as well, and what does not is still told from that. The plan is worked out. After a stage
    that was never done, nothing can be said.

    Raises:
        SynthaugError: What `augment` would raise before any work (no dataset, a plan that asks for nothing).
    """
    return _look(config, run or config.output_path)[0]


def _look(config: Config, run: Path) -> tuple[tuple[StageOutlook, ...], tuple[str, ...]]:
    workspace = _Looking(run)
    with suppress(_NothingToGoBy):
        explain(config, workspace)
    return tuple(workspace.outlook), workspace.growth


class _NothingToGoBy(SynthaugError):
    """A stage was never done, so that what follows cannot be told."""


class _Looking(Workspace):
    """A run folder in which stages are looked for and never made."""

    looks_only = True

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.outlook: list[StageOutlook] = []
        # The stage whose outcome decides what is asked of those after it, where it is not known.
        self._open: str | None = None

    def is_made(self, record: StageRecord) -> bool:
        return not record.digest.startswith(_TO_COME)

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
        key = digest_json(key_parts)
        directory = self.stages / f"{stage}-{key[:12]}"
        record = self._load(directory, record_class)
        done = _read(directory / DONE_FILE) or {}
        if record is None and stage in _GROWS and self.growth_open:
            before = self._nearest(stage, title, key_parts, names)
            self._tell(title, "open", ["hangs on what can be kept of the newest release"], before or {})
            found = None if before is None else self._load(Path(before["directory"]), record_class)
            if found is None:
                raise _NothingToGoBy(title)
            return Done(self._stand_in(found, key), directory, False, 0.0)
        if record is not None and (intact is None or intact(record)):
            if self._open and stage == "sample":
                self._tell(title, "open", [f"hangs on what {self._open} comes to"], done)
            else:
                self._tell(title, "reuse", ["nothing it is made from has changed"], done)
            return Done(record, directory, True, 0.0)
        if record is not None:
            self._tell(title, "redo", ["what it made is damaged or gone"], done)
            return Done(self._stand_in(record, key), directory, False, 0.0)
        before = self._nearest(stage, title, key_parts, names)
        reasons = _changes(before, key_parts, names) if before else ["never done here"]
        if resumes and (directory / WORK_DIR).is_dir():
            self._tell(title, "go on", ["it was cut off, and left what lets it go on"], before or {})
        else:
            self._tell(title, "redo" if before else "begin", reasons, before or {})
        known = not any(str(part).startswith(_TO_COME) for part in key_parts)
        if stage == "plan" and known:
            with tempfile.TemporaryDirectory() as temporary:
                planned = function(Path(temporary))
            return Done(planned.model_copy(update={"digest": _TO_COME + key}), directory, False, 0.0)
        found = None if before is None else self._load(Path(before["directory"]), record_class)
        if found is None:
            raise _NothingToGoBy(title)
        if stage in ("plan", "audit"):
            self._open = self._open or title
        return Done(self._stand_in(found, key), directory, False, 0.0)

    def _stand_in(self, record: R, key: str) -> R:
        return record.model_copy(update={"digest": _TO_COME + key})

    def _nearest(self, stage: str, title: str, parts: list[Any], names: Sequence[str]) -> dict[str, Any] | None:
        """The stage done here that has most of its parts in common, the newest of equals."""
        found = []
        for path in self.stages.glob(f"{stage}-*/{DONE_FILE}"):
            values = _read(path)
            if values is not None and isinstance(values.get("key_parts"), list):
                equal = len(parts) - len(_changes(values, parts, names))
                same_round = values.get("title") == title
                found.append((same_round, equal, path.stat().st_mtime, {**values, "directory": str(path.parent)}))
        return max(found, key=lambda item: item[:3])[3] if found else None

    def _tell(self, title: str, action: Any, reasons: Sequence[str], done: dict[str, Any]) -> None:
        seconds = done.get("seconds")
        self.outlook.append(StageOutlook(title=title, action=action, reasons=tuple(reasons), seconds=seconds))


def _changes(before: dict[str, Any], parts: list[Any], names: Sequence[str]) -> list[str]:
    """What differs between the key of a stage that is done and the key that is asked for, in words."""
    old_parts = before["key_parts"]
    old_names = before.get("key_names") or [*names[: len(old_parts)]]
    old = dict(zip(old_names, old_parts, strict=False))
    new = dict(zip(names, parts, strict=False))
    found = []
    for name, value in new.items():
        if name not in old:
            found.append(f"{name}: was no part of it")
        elif old[name] != value:
            found += _difference(name, old[name], value)
    return found + [f"{name}: is no part of it any more" for name in old if name not in new]


def _difference(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(new, str) and new.startswith(_TO_COME):
        return [f"{name}: made anew before it"]
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                found += _difference(f"{name}.{key}", old.get(key), new.get(key))
        return found
    # Digests say nothing to anybody.
    if any(isinstance(value, str) and len(value) == 64 for value in (old, new)):
        return [f"{name}: changed"]
    return [f"{name}: {_short(old)} before, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_WORDS else text[: _MOST_WORDS - 1] + "…"


def _stages(run: Path) -> Iterator[StageStatus]:
    found = []
    for directory in run.glob("stages/*-*"):
        done = _read(directory / DONE_FILE)
        try:
            at = (directory / DONE_FILE if done else directory).stat().st_mtime
        except OSError:
            continue
        found.append((at, directory, done))
    for at, directory, done in sorted(found, key=lambda item: item[:2]):
        yield StageStatus(
            title=directory.name.rsplit("-", 1)[0] if done is None else str(done["title"]),
            directory=directory.name,
            state="begun" if done is None else "done",
            seconds=None if done is None else done["seconds"],
            bytes=_size(directory),
            finished=None if done is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)),
        )


def _last_run(steps: dict[str, Any], running: str | None) -> str | None:
    stages = steps.get("stages") or []
    if not stages:
        return None
    last = stages[-1]["title"]
    if running:
        return f"at work on '{last}', since {stages[-1]['started']}"
    if steps.get("ended") is None:
        return f"cut off in '{last}', begun {stages[-1]['started']}"
    if steps.get("error"):
        return f"ended in '{last}' by an error, {steps['ended']}"
    return f"ended well after '{last}', {steps['ended']}"


def _next(steps: dict[str, Any], running: str | None, why: tuple[StageOutlook, ...] | None) -> str:
    if why is not None:
        to_do = [item.title for item in why if item.action != "reuse"]
        return ", ".join(to_do) if to_do else "nothing: all of it is reused"
    stages = steps.get("stages") or []
    if not stages:
        return "not known; give --why CONFIG"
    last = stages[-1]
    finished = last["state"] in ("done", "reused")
    if not finished and not running:
        return f"{last['title']}, which is not done"
    if last["stage"] in ("release", "publish"):
        return "nothing: the release is complete"
    position = _ORDER.index(last["stage"]) + 1 if last["stage"] in _ORDER else len(_ORDER)
    if last["stage"] == "audit":
        return "another round of samples if the plan is not met, then evaluate and release"
    return _ORDER[position] if position < len(_ORDER) else "not known; give --why CONFIG"


def _size(folder: Path) -> int:
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue  # a run may be at work
    return total


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
