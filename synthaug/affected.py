"""Affected: every checkpoint and release that an image or a group went into, for the day a patient withdraws."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from synthaug.errors import UsageError, VerificationError
from synthaug.progress import progress
from synthaug.records import DONE_FILE, INDEX_FILE, SEEN_FILE, SPLITS_FILE, VERDICT_FILE, Record
from synthaug.text import printable

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_MOST_NAMED = 5
_TRAINED, _VALIDATION = "trained", "validation"
_THROUGH_BASE = "trained from a base that saw it"
_SAMPLES = "samples of a checkpoint that saw it"
_SAMPLES_GONE = "samples of a checkpoint that is gone; by its split it saw it"
_REAL = "released as a real image"
# What a key calls the checkpoints that a stage was made from; those of earlier jobs come first.
_CHECKPOINT_NAME = re.compile("(earlier )?checkpoint( [0-9]+)?")
_MEASURED = {"validation": "validation: arms were chosen on it", "test": "test: figures were measured on it"}


class Affected(Record):
    """A checkpoint or a release that an image went into."""

    kind: Literal["checkpoint", "release"]
    path: str
    digest: str
    uses: tuple[str, ...] = Field(description="How: 'trained', 'validation', 'test: …', 'released as a real image …'.")
    n_images: int = Field(description="Of the images asked for; 0 where it is affected through a checkpoint alone.")
    images: tuple[str, ...]
    gone: bool = Field(False, description="It is on record only: its folder was deleted.")
    published_to: tuple[str, ...] = Field((), description="Addresses of the commits that published it.")


class AffectedResult(Record):
    """What there is to withdraw."""

    asked_for: str
    images: tuple[str, ...] = Field(description="Ids that were looked for: of the image or group, and of exact copies.")
    copies: tuple[str, ...] = Field(description="Those of them that are exact copies only.")
    found: tuple[Affected, ...]
    notes: tuple[str, ...]
    unreadable: tuple[str, ...] = Field(description="Files that could not be read: what they hold is not known.")
    sentence: str


@dataclass(frozen=True)
class _Stage:
    """A complete stage of a run folder."""

    directory: Path
    digest: str
    key_parts: list[Any]
    values: dict[str, Any]  # done.json


@dataclass
class _Search:
    """What is looked for, and what was met on the way."""

    runs: tuple[Path, ...]
    stages: dict[str, list[_Stage]] = field(default_factory=dict)  # by name
    unfinished: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    copies: set[str] = field(default_factory=set)

    @property
    def ids(self) -> set[str]:
        return self.asked | self.copies

    def tables(self, stage: str, file: str, columns: Sequence[str]) -> Iterator[tuple[_Stage, pd.DataFrame]]:
        """The files of a stage wherever it ran; one that cannot be read is noted and passed over."""
        import pandas as pd

        for item in self.stages.get(stage, ()):
            try:
                yield item, pd.read_parquet(item.directory / file, columns=list(columns))
            except Exception as error:  # a damaged file fails in every way that there is
                self.cannot_read(item.directory / file, error)

    def cannot_read(self, path: Path, error: Exception) -> None:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        if (text := f"{path}: {words}") not in self.unreadable:
            self.unreadable.append(text)


def affected(runs: Sequence[Path], *, image: str | None = None, group: str | None = None) -> AffectedResult:
    """List every checkpoint and release of the run folders that an image, or the images of a group, went into.

    Releases that were deleted since are among them, by the record of their stage; what the folders do not know (the
    images of a base that was trained elsewhere, say) is in the notes. Images are known by their content, so what one
    run says of a group is looked for in all of them, and so are exact copies. Pixels are not compared: another picture
    of the same patient, or the same one resized, is another image.

    Args:
        runs: Run folders.
        image: An image_id.
        group: A group_key of splits.parquet, or the name of a group as the source has it.

    Raises:
        UsageError: Neither or both are given, a folder is no run folder, or none knows the image or group.
    """
    if (image is None) == (group is None):
        raise UsageError("say what to look for: either --image ID or --group KEY.")
    search = _Search(_run_folders(runs))
    asked_for = f"image {image}" if image is not None else f"group {group}"
    with progress("affected", len(search.runs) + 2, "steps") as bar:
        for run in search.runs:
            _read_stages(run, search)
            bar.update(1)
        _find_ids(search, image, group)
        bar.update(1)
        checkpoints = _checkpoints(search)
        found = [*checkpoints, *_releases(search, {item.digest for item in checkpoints})]
        bar.update(1)
    return AffectedResult(
        asked_for=asked_for,
        images=tuple(sorted(search.ids)),
        copies=tuple(sorted(search.copies)),
        found=tuple(found),
        notes=tuple(_notes(search)),
        unreadable=tuple(search.unreadable),
        sentence=_sentence(asked_for, search, found),
    )


def _run_folders(runs: Sequence[Path]) -> tuple[Path, ...]:
    folders = tuple(dict.fromkeys(Path(run) for run in runs))
    if not folders:
        raise UsageError("name at least one run folder to look through.")
    for run in folders:
        if not (run / "stages").is_dir():
            inner = [str(stages.parent) for stages in sorted(run.glob("*/stages")) if stages.is_dir()]
            # Somebody may have named a release, or the link to it.
            outer = [str(place) for place in run.resolve().parents[:2] if (place / "stages").is_dir()]
            near = f" Did you mean {' '.join((inner or outer)[:_MOST_NAMED])}?" if inner or outer else ""
            raise UsageError(f"{run} is not a run folder: it has no 'stages'. Name the 'output' of a job.{near}")
    # A folder and a link to it are one.
    return tuple({run.resolve(): run for run in reversed(folders)}.values())[::-1]


def _read_stages(run: Path, search: _Search) -> None:
    for folder in sorted((run / "stages").iterdir()):
        name = folder.name.rpartition("-")[0]
        if not folder.is_dir() or not name:
            continue
        path = folder / DONE_FILE
        if not path.is_file():
            search.unfinished.append(folder)
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            stage = _Stage(folder, str(values["record"]["digest"]), list(values["key_parts"]), values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            search.cannot_read(path, error)
            continue
        search.stages.setdefault(name, []).append(stage)


def _find_ids(search: _Search, image: str | None, group: str | None) -> None:
    """Fill in the ids to look for.

    Raises:
        UsageError: No run folder knows the image or group.
    """
    known: set[str] = set()
    hashes: dict[str, set[str]] = {}  # content to ids
    for _, table in search.tables("read", INDEX_FILE, ["image_id", "group", "content_hash"]):
        _match(search, known, table, image, group, "group")
        for name, content in zip(table["image_id"], table["content_hash"], strict=True):
            hashes.setdefault(str(content), set()).add(str(name))
    for _, table in search.tables("split", SPLITS_FILE, ["image_id", "group_key"]):
        _match(search, known, table, image, group, "group_key")
    if image is not None:
        # The stages before may have been cleared away; a checkpoint and a release have their own lists.
        for _, table in search.tables("train", SEEN_FILE, ["image_id"]):
            _match(search, known, table, image, None, None)
        for _, _, _, ids in _real_images(search):
            known |= ids
            search.asked |= {image} & ids
    if not search.asked:
        wanted = image if image is not None else str(group)
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
        words = f" The nearest are {', '.join(map(printable, near))}." if near else ""
        # What could not be read may be what knows it.
        lost = f" These files could not be read: {'; '.join(search.unreadable)}." if search.unreadable else ""
        what = "image_id" if image is not None else "group_key, or group,"
        where = ", ".join(map(str, search.runs))
        raise UsageError(f"no {what} '{printable(wanted)}' is known to {where}.{words}{lost}")
    for ids in hashes.values():
        if ids & search.asked:
            search.copies |= ids - search.asked


def _match(
    search: _Search, known: set[str], table: pd.DataFrame, image: str | None, group: str | None, column: str | None
) -> None:
    if image is not None:
        ids = {str(name) for name in table["image_id"]}
        known |= ids
        search.asked |= {image} & ids
    elif column is not None:
        known |= {str(name) for name in table[column].dropna()}
        search.asked |= {str(name) for name in table.loc[table[column] == group, "image_id"]}


def _checkpoints(search: _Search) -> list[Affected]:
    uses: dict[Path, dict[str, set[str]]] = {}  # directory to use to ids
    for stage, table in search.tables("train", SEEN_FILE, ["image_id", "use"]):
        for use, name in (("train", _TRAINED), ("validation", _VALIDATION)):
            if ids := search.ids & set(table.loc[table["use"] == use, "image_id"]):
                uses.setdefault(stage.directory, {})[_with_copies(search, name, ids)] = ids
    stages = search.stages.get("train", [])
    # A checkpoint that another one started from is named by its digest among what that one was made from.
    grew = True
    while grew:
        digests = {stage.digest for stage in stages if stage.directory in uses}
        through = [
            stage
            for stage in stages
            if _THROUGH_BASE not in uses.get(stage.directory, {})
            and any(part in digests for part in (*stage.key_parts, _started_from(stage)) if isinstance(part, str))
        ]
        for stage in through:
            uses.setdefault(stage.directory, {})[_THROUGH_BASE] = set()
        grew = bool(through)
    published = _published(search)
    return [
        _entry("checkpoint", stage.directory, stage.digest, uses[stage.directory]).model_copy(
            update={"published_to": published.get(stage.digest, ())}
        )
        for stage in stages
        if stage.directory in uses
    ]


def _started_from(stage: _Stage) -> str | None:
    """Digest of the checkpoint that a warm training started from, as its record has it."""
    record = stage.values["record"]
    return record.get("started_from") if isinstance(record, dict) else None


def _published(search: _Search) -> dict[str, tuple[str, ...]]:
    """Digest of a release, or of a checkpoint that was published with one, to the addresses of the commits."""
    found: dict[str, tuple[str, ...]] = {}
    for stage in search.stages.get("publish", ()):
        address = stage.values["record"].get("pushed_to")
        # What was published is named by its digest; the address of the hub's endpoint is none.
        for digest in {stage.digest, *(part for part in stage.key_parts if isinstance(part, str))} if address else ():
            found[digest] = (*found.get(digest, ()), str(address))
    return found


def _releases(search: _Search, checkpoints: set[str]) -> list[Affected]:
    splits = _splits_of_ids(search)
    known = {stage.digest for stage in search.stages.get("train", ())}
    uses: dict[Path, dict[str, set[str]]] = {}
    digests: dict[Path, str] = {}
    gone = set()
    for release, digest, drawn_from, include_real, verdict in _stated(search):
        digests[release] = digest
        found = uses.setdefault(release, {})
        ids_of = splits.get(_splits_digest(search, release), {})
        if checkpoints.intersection(drawn_from):
            found[_SAMPLES] = set()
        elif not (drawn_from and known.issuperset(drawn_from)) and (
            seen := ids_of.get("train", set()) | ids_of.get("validation", set())
        ):
            found[_SAMPLES_GONE] = seen
        for split, ids in ids_of.items():
            # Shards may have been deleted here and not where they were published.
            if include_real:
                found.setdefault(f"{_REAL} ({split})", set()).update(ids)
            if split in _MEASURED and verdict:
                found[_MEASURED[split]] = ids
        if not release.is_dir():
            gone.add(release)
    for release, _, split, ids in _real_images(search):
        if hits := ids & search.ids:
            uses.setdefault(release, {}).setdefault(f"{_REAL} ({split})", set()).update(hits)
    published = _published(search)
    entries = []
    for release, found in uses.items():
        if found:
            named = {_with_copies(search, use, ids): ids for use, ids in found.items()}
            entry = _entry("release", release, digests[release], named)
            more = {"published_to": published.get(digests[release], ()), "gone": release in gone}
            entries.append(entry.model_copy(update=more))
    return entries


def _stated(search: _Search) -> Iterator[tuple[Path, str, tuple[str, ...], bool, bool]]:
    """Release, digest, digests of its checkpoints, whether it holds real images, whether a verdict was made for it.

    Of every release that stands in a run folder, and of those that a stage made and that were deleted since: they may
    have been published or passed on before.
    """
    from synthaug.formats.manifest import stated_checkpoints

    seen = set()
    for release, stated in _release_files(search):
        seen.add(release.absolute())
        verdict = (release / VERDICT_FILE).is_file()
        yield release, stated["digest"], stated_checkpoints(stated), bool(stated.get("include_real")), verdict
    trained = {stage.digest for stage in search.stages.get("train", ())}
    judged = {stage.digest for stage in search.stages.get("evaluate", ())}
    for stage in search.stages.get("release", ()):
        location = _location(stage)
        if location.absolute() in seen:
            continue
        parts = {part for part in stage.key_parts if isinstance(part, str)}
        settings = next((part for part in stage.key_parts if isinstance(part, dict) and "release" in part), {})
        names = zip(stage.values.get("key_names") or (), stage.key_parts, strict=False)
        named = [part for name, part in names if isinstance(part, str) and _CHECKPOINT_NAME.fullmatch(str(name))]
        checkpoints = tuple(named or sorted(parts & trained))
        real = bool(dict(settings.get("release") or {}).get("include_real", True))
        yield location, stage.digest, checkpoints, real, bool(parts & judged)


def _splits_of_ids(search: _Search) -> dict[str | None, dict[str, set[str]]]:
    """Digest of a split stage to the ids looked for in each split of it, but for those that are held back."""
    found: dict[str | None, dict[str, set[str]]] = {}
    for stage, table in search.tables("split", SPLITS_FILE, ["image_id", "split", "held_back"]):
        mine = table[table["image_id"].isin(search.ids) & table["held_back"].isna()]
        found[stage.digest] = {str(split): set(part["image_id"]) for split, part in mine.groupby("split")}
    return found


def _splits_digest(search: _Search, release: Path) -> str | None:
    """Of the split that a release was made from, as its stage says."""
    known = {stage.digest for stage in search.stages.get("split", ())}
    for stage in search.stages.get("release", ()):
        if _location(stage).absolute() == release.absolute():
            return next((part for part in stage.key_parts if isinstance(part, str) and part in known), None)
    return None


def _location(stage: _Stage) -> Path:
    """Where a stage put what it made."""
    return Path(os.path.normpath(stage.directory / str(stage.values.get("location", "."))))


def _release_files(search: _Search) -> Iterator[tuple[Path, dict[str, Any]]]:
    from synthaug.formats.manifest import read_release_file

    for run in search.runs:
        for release in sorted((run / "releases").glob("*")):
            # Names with a dot in front are being built, or what a killed run left.
            if release.name.startswith(".") or not release.is_dir():
                continue
            try:
                yield release, read_release_file(release)
            except VerificationError as error:
                search.cannot_read(release, error)


def _real_images(search: _Search) -> Iterator[tuple[Path, str, str, set[str]]]:
    """Release, digest, split and the ids of the real images of a part of a shard."""
    from synthaug.formats.manifest import is_safe_name
    from synthaug.formats.shards import read_source_ids

    for release, stated in _release_files(search):
        for split, values in dict(stated.get("splits", {})).items():
            for name in values["shards"]:
                path = release / name
                if not is_safe_name(name):
                    continue
                try:
                    for ids in read_source_ids(path):
                        yield release, stated["digest"], split, {item for item in ids if item is not None}
                except Exception as error:  # a damaged file fails in every way that there is
                    if not (isinstance(error, FileNotFoundError) and _splits_digest(search, release)):
                        search.cannot_read(path, error)


def _with_copies(search: _Search, use: str, ids: set[str]) -> str:
    return f"{use} (an exact copy of it)" if ids and not ids & search.asked else use


def _entry(kind: Literal["checkpoint", "release"], path: Path, digest: str, uses: dict[str, set[str]]) -> Affected:
    ids = set[str]().union(*uses.values())
    return Affected(
        kind=kind, path=str(path), digest=digest, uses=tuple(uses), n_images=len(ids), images=tuple(sorted(ids))
    )


def _notes(search: _Search) -> list[str]:
    notes = []
    if search.copies:
        notes.append(f"exact copies were looked for too: {', '.join(map(printable, sorted(search.copies)))}")
    holders = [
        str(stage.directory)
        for stage, table in search.tables("read", INDEX_FILE, ["image_id"])
        if search.ids & set(table["image_id"])
    ]
    if holders:
        notes.append(f"decoded copies of it lie in {', '.join(holders)}")
    trained = {digest for digest, splits in _splits_of_ids(search).items() if digest and "train" in splits}
    for name, words in (("judge", "the judge's classifier"), ("evaluate", "the trial's classifiers")):
        for stage in search.stages.get(name, ()):
            if any(part in trained for part in stage.key_parts if isinstance(part, str)):
                notes.append(f"{words} in {stage.directory} learned from it")
    pictures = [
        str(run / name)
        for run in search.runs
        for name in ("contact_sheet.png", "rejected.png")
        if (run / name).is_file()
    ]
    if pictures:
        notes.append(f"it may be shown in {', '.join(pictures)}")
    for folder in search.unfinished:
        if folder.name.startswith("train-"):
            notes.append(f"{folder} is an unfinished training: what it has seen is not on record")
        elif folder.name.startswith("read-"):
            notes.append(f"{folder} is an unfinished reading: it may hold decoded copies")
    for run in search.runs:
        notes += [
            f"{folder} was left by a run that was stopped, or is being written: it may hold copies"
            for folder in sorted((run / "releases").glob(".*"))
            if folder.is_dir()
        ]
    return [*notes, *_unknown(search)]


def _unknown(search: _Search) -> Iterator[str]:
    """What the run folders do not know of themselves: silence about it would read like innocence."""
    trained = {stage.digest for stage in search.stages.get("train", ())}
    for stage in search.stages.get("train", ()):
        for settings, identity in pairwise(stage.key_parts):
            # The identity of a base stands behind the settings that name it.
            if isinstance(settings, dict) and settings.get("base") is not None and identity not in trained:
                base = printable(str(settings["base"]), 200)
                yield (
                    f"the checkpoint in {stage.directory} started from the base {base}, which is in none of these run "
                    "folders: what that has seen is not known here"
                )
    released = set()
    for release, digest, checkpoints, _, _ in _stated(search):
        released.add(digest)
        gone = [item for item in checkpoints if item not in trained]
        if gone or not checkpoints:
            which = f" ({', '.join(printable(item[:12]) for item in gone)})" if len(checkpoints) > 1 else ""
            yield (
                f"the checkpoint of {release}{which} is in none of these run folders: what it has seen is not known "
                "here, but for what its split says"
            )
    for digest in {stage.digest for stage in search.stages.get("publish", ())} - released:
        for address in _published(search).get(digest, ()):
            yield f"a release was published as {address} and is on record nowhere else: what it holds is not known here"


def _sentence(asked_for: str, search: _Search, found: list[Affected]) -> str:
    where = ", ".join(map(str, search.runs))
    name = asked_for if len(search.asked) == 1 else f"{asked_for} ({len(search.asked)} images)"
    if not found:
        unknown = " Not everything there is known, see the notes." if any(_unknown(search)) else ""
        return (
            f"{name} is known to {where}, but no checkpoint and no release there is on record as made from it.{unknown}"
        )
    n = {kind: sum(item.kind == kind for item in found) for kind in ("checkpoint", "release")}
    published = sum(bool(item.published_to) for item in found)
    also = f" {published} of them published." if published else ""
    return (
        f"{name} went into {n['checkpoint']} checkpoint{'s' * (n['checkpoint'] != 1)} and {n['release']} "
        f"release{'s' * (n['release'] != 1)} of {where}.{also}"
    )
