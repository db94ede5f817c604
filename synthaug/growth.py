"""Growth: what a job takes over from the release before it, when images have come since.

A generation is a job's images with the settings of its training. It is decided once which release a generation
grows from, and `growth.json` of the run folder says so before anything is trained: a run that was killed, or is
repeated, grows from the same one and comes to the same samples. Each class that the plan raises has one checkpoint
that its samples are drawn from; those whose images are as they were keep theirs, and the samples with it.

Nothing is trained or read from images here; what is taken over lies in the stages of the run folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, ValidationError

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import SynthaugError
from synthaug.formats.atomic import write_text
from synthaug.records import (
    DONE_FILE,
    PIPELINE_DIR,
    SEEN_FILE,
    SPLITS_FILE,
    BalancePlan,
    Checkpoint,
    Record,
    SampleRequest,
    Source,
    Splits,
    StageRecord,
)
from synthaug.text import printable

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=StageRecord)

GROWTH_FILE = "growth.json"
_KIND, _VERSION = "synthaug growth", 1
_LEARNED_FROM = ("train", "validation")
_MOST_NAMED = 8
_UNKNOWN = "no checkpoint that is kept has learned from all of its images"


class Pinned(Record):
    """A stage that a later generation takes over."""

    folder: str = Field(description="Its directory below stages.")
    record: dict[str, Any] = Field(description="Its record as plain values, so that its files may be cleared away.")

    @classmethod
    def of(cls, record: StageRecord) -> Pinned:
        return cls(folder=record.directory.name, record=record.model_dump(mode="json"))

    def load(self, stages: Path, record_class: type[R]) -> R:
        loaded: R = record_class.from_plain(self.record, stages / self.folder)
        return loaded


class Origin(Record):
    """A checkpoint that samples were drawn from, and the images that it was trained on."""

    generation: int = Field(description="In which it was trained, from 1.")
    checkpoint: Pinned
    source: Pinned
    splits: Pinned

    def has_learned(self, name: str, counts: Mapping[str, int]) -> bool:
        """Were there training images of a class, and no fewer than now of what it may learn from and be stopped by?

        No image that it saw is gone, or nothing would be kept: so equal numbers are equal images.

        Args:
            counts: Split to the number of the class's images now.
        """
        classes = list(self.source.record["classes"])
        if name not in classes:
            return False
        label, then = classes.index(name), self.splits.record["counts"]
        return then["train"][label] > 0 and all(then[use][label] == counts[use] for use in _LEARNED_FROM)


class Round(Record):
    """Samples drawn together from one checkpoint, and the classes of which a release has use for them."""

    origin: int = Field(description="Position among the origins.")
    ranges: dict[int, tuple[int, int]] = Field(description="The whole request, in labels of the checkpoint.")
    classes: tuple[str, ...]

    @property
    def request(self) -> SampleRequest:
        return SampleRequest(ranges=self.ranges)


class Released(Record):
    """What a release was made of, for whoever grows from it."""

    release: str = Field(description="Name of its folder.")
    generation: int
    settings: str = Field(description="Digest of what training depends on beside the images.")
    drawing: str = Field(description="Digest of what sampling depends on beside checkpoint and request.")
    source: Pinned
    splits: Pinned
    origins: tuple[Origin, ...] = Field(description="Oldest first.")
    owners: dict[str, int] = Field(description="Class to the origin of its samples.")
    rounds: tuple[Round, ...]


class Generation(Record):
    """What is decided of a generation, once."""

    key: str = Field(description="Digest of its images, splits and settings of training.")
    number: int = Field(1, description="1: made from nothing; otherwise one more than what it grows from.")
    parent: Released | None = Field(None, description="What it grows from; None: everything is made from all images.")
    changed: dict[str, str] = Field({}, description="Class whose images changed since, and how, in words.")
    why_anew: str | None = Field(None, description="Why it grows from nothing although there is a release.")
    too_much: float | None = Field(None, description="growth.max_new_share, where it was that which decided so.")


class _Lineage(Record):
    """growth.json."""

    kind: str = _KIND
    version: int = _VERSION
    generations: tuple[Generation, ...] = ()
    released: tuple[Released, ...] = ()


@dataclass(frozen=True)
class Shares:
    """Which checkpoint each class is drawn from. Origins are numbered as those of the parent, a new one after them."""

    due: tuple[str, ...]  # classes that a checkpoint has to be trained for
    owners: dict[str, int]  # class that the plan raises to its origin
    kept: tuple[Round, ...]  # samples that stay, with the classes of which they do


def generation_of(
    config: Config, source: Source, splits: Splits, *, key: str, settings: str, output: Path, write: bool
) -> Generation:
    """Return what was decided of a generation, or decide it: by the release that the run folder's link names.

    Args:
        config: Its section `growth` matters, and that it asks for no differential privacy.
        key: See `Generation.key`.
        settings: See `Released.settings`.
        output: The run folder.
        write: Keep the decision. Not for whoever only looks.
    """
    lineage = _load(output)
    known = next((item for item in lineage.generations if item.key == key), None)
    if config.growth.samples == "remake":
        # A setting that may be taken back; so nothing is decided.
        newest = _newest(lineage, output)
        asked = newest is not None and not _same_images(source, splits, newest)
        return Generation(key=key, why_anew="growth.samples is 'remake'" if asked else None)
    stages = output / "stages"
    # Of this generation, if it has come to a release.
    made = next((item for item in reversed(lineage.released) if _is_of(item, source, splits, settings)), None)
    if known is not None and known.too_much not in (None, config.growth.max_new_share) and made is None:
        known = None  # another limit is given, and nothing rests on what was decided by the old one
    if known is not None:
        lost = None if known.parent is None else _lost(known.parent, stages)
        # What it grew from may be cleared away when no sample is drawn from it any more.
        if lost is None or (made is not None and _lost(made, stages) is None):
            return known
        decided = Generation(key=key, why_anew=lost)
    else:
        parent = _newest(lineage, output)
        if parent is None and any((output / "releases").glob("*")):
            logger.warning(
                "growth: %s does not say what the releases here were made of, so nothing is taken over from one",
                output / GROWTH_FILE,
            )
        decided = _decide(config, source, splits, key, settings, parent, stages)
    if write:
        others = tuple(item for item in lineage.generations if item.key != key)
        _save(output, lineage.model_copy(update={"generations": (*others, decided)}))
    return decided


def may_grow(config: Config, *, settings: str, output: Path) -> str | None:
    """The release that a generation may grow from whose images are yet to be read; None: there is none."""
    newest = _newest(_load(output), output)
    if newest is None or config.growth.samples == "remake" or _never(config, settings, newest) is not None:
        return None
    return newest.release


def shares(generation: Generation, raised: Mapping[str, Mapping[str, int]], drawing: str) -> Shares:
    """Say what each class that is to be raised is drawn from.

    A class is trained for where its images changed, also in a generation that did not raise it; any other keeps its
    checkpoint, or has the newest where it has none of its own. Samples stay where the settings of sampling do.

    Args:
        raised: Class that the plan raises to split to the number of its images.
        drawing: See `Released.drawing`.
    """
    parent = generation.parent
    if parent is None:
        return Shares(tuple(raised), dict.fromkeys(raised, 0), ())
    new = len(parent.origins)
    due = tuple(
        name
        for name in raised
        if name in generation.changed
        or not parent.origins[parent.owners.get(name, new - 1)].has_learned(name, raised[name])
    )
    newest = new if due else new - 1
    owners = {name: new if name in due else parent.owners.get(name, newest) for name in raised}
    kept = []
    for item in parent.rounds if parent.drawing == drawing else ():
        classes = tuple(name for name in item.classes if owners.get(name) == item.origin)
        if classes:
            kept.append(item.model_copy(update={"classes": classes}))
    return Shares(due, owners, tuple(kept))


def remember(output: Path, released: Released) -> None:
    """Keep what a release was made of. To be called before the run folder's link names it."""
    lineage = _load(output)
    if released not in lineage.released:
        others = tuple(item for item in lineage.released if item.release != released.release)
        _save(output, lineage.model_copy(update={"released": (*others, released)}))


def only_for(plan: BalancePlan, names: Iterable[str]) -> BalancePlan:
    """The plan with no other class to be raised: a warm training is for the classes that changed."""
    chosen = set(names)
    classes = (
        item if item.name in chosen else item.model_copy(update={"n_target": item.n_real}) for item in plan.classes
    )
    return plan.model_copy(update={"classes": tuple(classes)})


def warm_start(config: Config, base: Checkpoint) -> Config:
    """The configuration of a warm training: from a checkpoint, with the share of the budget that tuning has."""
    settings = config.train
    share = settings.fine_tune_share
    images = None if settings.images is None else max(settings.batch_size, int(share * settings.images))
    changes: dict[str, Any] = {
        "base": str(base.directory / PIPELINE_DIR),
        "base_revision": None,
        "images": images,
        "minutes": share * settings.minutes,
    }
    return config.model_copy(update={"train": settings.model_copy(update=changes)})


def made_from(stages: Path, item: Pinned) -> tuple[list[Any], list[str]]:
    """The key of a stage that is taken over, and what people call its parts.

    Raises:
        OSError, ValueError, KeyError: Its record is gone or damaged.
    """
    done = json.loads((stages / item.folder / DONE_FILE).read_text(encoding="utf-8"))
    return list(done["key_parts"]), list(done.get("key_names") or [])


def told(generation: Generation, chosen: Shares, drawing: str) -> tuple[str, ...]:
    """What is kept, trained for and sampled again, in sentences; nothing for a first generation."""
    parent = generation.parent
    if parent is None:
        return () if generation.why_anew is None else (f"everything is made from all images: {generation.why_anew}",)
    said = [f"generation {generation.number} grows from release {parent.release} (generation {parent.generation})"]
    if chosen.due:
        said += [
            f"class {_named([name])}: {generation.changed.get(name, _UNKNOWN)}; trained for, from the newest "
            "checkpoint of that release, and sampled again"
            for name in chosen.due
        ]
    else:
        said.append("no class that is to be raised has other images than before: nothing is trained")
    others = [name for name in generation.changed if name not in chosen.owners]
    if others:
        said.append(
            f"not to be raised, so nothing is trained for them: {_named(others)} ({_counted(generation, others)})"
        )
    kept = {name for item in chosen.kept for name in item.classes}
    if kept:
        said.append(f"samples are kept and audited again: {_named(name for name in chosen.owners if name in kept)}")
    elsewhere = [name for name in chosen.owners if name not in kept and name not in chosen.due]
    if elsewhere:
        reason = "the settings of sampling changed" if parent.drawing != drawing else "there are no samples of them"
        said.append(f"{reason}; sampled from a checkpoint that is there: {_named(elsewhere)}")
    return tuple(said)


def described(output: Path) -> tuple[str, ...]:
    """Which checkpoint each class of the newest release is drawn from; nothing where there is only one."""
    newest = _newest(_load(output), output)
    if newest is None or len(newest.origins) < 2:
        return ()
    return tuple(
        f"checkpoint of generation {item.generation} (stages/{item.checkpoint.folder}): samples of "
        f"{_named(name for name, owner in newest.owners.items() if owner == number)}"
        for number, item in enumerate(newest.origins)
    )


# ---- the decision


def _decide(
    config: Config, source: Source, splits: Splits, key: str, settings: str, parent: Released | None, stages: Path
) -> Generation:
    if parent is None or _same_images(source, splits, parent):
        # Without new images it is the stages that say what is made again.
        return Generation(key=key)
    try:
        before = parent.source.load(stages, Source)
        reason = _never(config, settings, parent) or _not_alike(source, before) or _lost(parent, stages)
        if reason is not None:
            return Generation(key=key, why_anew=reason)
        old, new = _learned_from(parent.splits.load(stages, Splits), before), _learned_from(splits, source)
        reason, changed = _compare(old, new, source, before, parent, stages)
        if reason is None and (much := _too_much(config, old, new)) is not None:
            return Generation(key=key, why_anew=much, too_much=config.growth.max_new_share)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError) as error:
        words = printable(" ".join(str(error).split()), 200) or type(error).__name__
        reason, changed = f"what release {parent.release} was made of is gone or damaged ({words})", {}
    except OSError as error:
        raise _unreadable(error) from error
    if reason is not None:
        return Generation(key=key, why_anew=reason)
    return Generation(key=key, number=parent.generation + 1, parent=parent, changed=changed)


def _is_of(item: Released, source: Source, splits: Splits, settings: str) -> bool:
    return item.settings == settings and _same_images(source, splits, item)


def _same_images(source: Source, splits: Splits, parent: Released) -> bool:
    return (source.digest, splits.digest) == (parent.source.record["digest"], parent.splits.record["digest"])


def _never(config: Config, settings: str, parent: Released) -> str | None:
    """Why a job cannot grow from a release, whatever its images are."""
    if config.privacy.dp is not None:
        return "with privacy.dp a checkpoint's guarantee is of one training"
    if config.train.fine_tune_share == 0:
        return "train.fine_tune_share is 0, so there is no budget for a warm training"
    if parent.settings != settings:
        return f"the settings of training or of the images are not those of release {parent.release}"
    return None


def _not_alike(source: Source, before: Source) -> str | None:
    if _form(source) != _form(before):
        return "the form of the images (values, channels or size) has changed"
    gone = [name for name in before.classes if name not in source.classes]
    if gone:
        return f"classes are gone: {_named(gone)}"
    return None


def _too_much(config: Config, old: pd.DataFrame, new: pd.DataFrame) -> str | None:
    """Whether more is new than may be, in words; the tables are of `_learned_from`."""
    training = new.index[new["split"] == "train"]
    fresh = (~training.isin(old.index)).sum()
    # Compared as a share of all, so that a set may grow again and again.
    if fresh <= config.growth.max_new_share * len(training):
        return None
    share = f"growth.max_new_share {config.growth.max_new_share:g}"
    return f"{fresh} of {len(training)} training images are new, more than {share}"


def _unreadable(error: OSError) -> SynthaugError:
    """What could not be read may be whole: nothing is decided for good by a storage that did not answer."""
    problem = SynthaugError(f"what an earlier release was made of cannot be read ({error}). Run again when it can be.")
    problem.may_pass = True
    return problem


def _compare(
    old: pd.DataFrame, new: pd.DataFrame, source: Source, before: Source, parent: Released, stages: Path
) -> tuple[str | None, dict[str, str]]:
    """Why nothing can be kept, or which classes have other images than the parent had, in words."""
    import pandas as pd

    shared = old.index.intersection(new.index)
    relabelled = int((old.loc[shared, "name"] != new.loc[shared, "name"]).sum())
    if relabelled:
        return f"of {_number(relabelled, 'image')} the class is another one now", {}
    usable = new["split"].to_dict()
    for item in parent.origins:
        seen = pd.read_parquet(stages / item.checkpoint.folder / SEEN_FILE, columns=["image_id", "use"])
        lacking = [name for name, use in zip(seen["image_id"], seen["use"], strict=True) if usable.get(name) != use]
        if lacking:
            what = f"{_number(len(lacking), 'image')} that the checkpoint of generation {item.generation} learned from"
            return f"{what} may not be used any more, or not as it was", {}
    changed = {}
    added = new[~new.index.isin(old.index)]
    for name in source.classes:
        numbers = added.loc[added["name"] == name, "split"].value_counts()
        counts = [f"{int(numbers[use])} {use}" for use in _LEARNED_FROM if use in numbers]
        if counts:
            first = "a new class, " if name not in before.classes else ""
            changed[name] = f"{first}{' and '.join(counts)} images are new"
    return None, changed


def _learned_from(splits: Splits, source: Source) -> pd.DataFrame:
    """Image id to split and class, of the images that a generator may learn from or be stopped by."""
    import pandas as pd

    table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["image_id", "label", "split", "held_back"])
    table = table[table["held_back"].isna() & table["split"].isin(_LEARNED_FROM)].drop_duplicates("image_id")
    names = dict(enumerate(source.classes))
    return table.assign(name=table["label"].map(names)).set_index("image_id")[["split", "name"]]


def _form(source: Source) -> dict[str, Any]:
    return source.pixels.model_dump(include={"channels", "dtype", "colour", "low", "high", "size"})


def _lost(parent: Released, stages: Path) -> str | None:
    """Which checkpoint that should be taken over is not there any more."""
    for item in parent.origins:
        if not is_whole(item, stages):
            return (
                f"the checkpoint of generation {item.generation} ({stages / item.checkpoint.folder}) is gone or damaged"
            )
    return None


def is_whole(item: Origin, stages: Path) -> bool:
    """Whether a checkpoint that should be taken over is there as it was."""
    folder = stages / item.checkpoint.folder
    try:
        key_parts, _ = made_from(stages, item.checkpoint)
        known = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))["record"]
        same = Checkpoint.from_plain(known, folder) == item.checkpoint.load(stages, Checkpoint)
        whole = same and folder.name == f"train-{digest_json(key_parts)[:12]}"
        # Records of another version of synthaug cannot be taken over either.
        item.source.load(stages, Source)
        item.splits.load(stages, Splits)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    except OSError as error:
        raise _unreadable(error) from error
    return whole and (folder / PIPELINE_DIR).is_dir() and (folder / SEEN_FILE).is_file()


# ---- the file


def _load(output: Path) -> _Lineage:
    path = output / GROWTH_FILE
    try:
        lineage = _Lineage.model_validate_json(path.read_text(encoding="utf-8"))
        if (lineage.kind, lineage.version) != (_KIND, _VERSION):
            raise ValueError(f"kind {lineage.kind!r}, version {lineage.version}")
    except FileNotFoundError:
        return _Lineage()
    except (OSError, ValueError, ValidationError) as error:
        words = printable(" ".join(str(error).split()), 200)
        logger.warning("%s cannot be read, so nothing of earlier generations is taken over (%s)", path, words)
        return _Lineage()
    return lineage


def _save(output: Path, lineage: _Lineage) -> None:
    write_text(output / GROWTH_FILE, lineage.model_dump_json(indent=1) + "\n")


def _newest(lineage: _Lineage, output: Path) -> Released | None:
    """What the release that the link names was made of."""
    name = (output / "release").resolve().name
    return next((item for item in reversed(lineage.released) if item.release == name), None)


def _counted(generation: Generation, names: Sequence[str]) -> str:
    return "; ".join(generation.changed[name] for name in names[:_MOST_NAMED])


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return ", ".join(f"'{printable(name)}'" for name in listed[:_MOST_NAMED]) + more


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
