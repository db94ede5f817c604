"""Stage 2: who is in which split, so that nothing that learns ever sees what it is measured on."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import DatasetError, LeakError
from synthaug.formats.near_duplicates import Pairs, near_pairs
from synthaug.formats.split_groups import copies_held_back, form_groups, place_groups, without_giants
from synthaug.formats.split_ledger import Key, Ledger, load_ledger, save_ledger
from synthaug.records import IMAGES_FILE, INDEX_FILE, SPLITS, SPLITS_FILE, Source, Splits
from synthaug.text import printable

logger = logging.getLogger(__name__)


def split(config: Config, source: Source, directory: Path) -> Splits:
    """Keep the splits that are given and make those that are missing.

    A group (or, without groups, a cluster of near-duplicates) is never divided, no image is in two splits, and
    what an earlier run placed stays where it was: the ledger beside the source remembers.

    Args:
        config: Its sections `dataset` (columns, cut, exclude) and `split` matter here.
        directory: Exists, empty; receives splits.parquet.

    Raises:
        DatasetError: An unknown class is cut or excluded, fewer than two classes are left, there is nothing to
            train on, or the ledger cannot be used.
        LeakError: The given splits divide a group.
        OutputError: The ledger cannot be written.
    """
    _check_names(config, source.classes)
    rows = _load(source)
    given = _given_splits(rows)
    key = Key(config.split.seed)
    _refuse_divided_groups(rows, config, key)
    rows.hold_back_copies(ledger=None)
    missing = [name for name in SPLITS[1:] if name not in given and getattr(config.split, name) > 0]
    ledger_path, made = None, ""
    if missing:
        ledger = load_ledger(config)
        made = _place(rows, config, source, ledger, missing, given)
        rows.hold_back_copies(ledger)
        rows.remember(ledger)
        ledger_path = save_ledger(ledger, config)
    rows.name_the_rest(key)
    _exclude_and_cut(rows, config, source.classes)
    counts = {name: rows.counts(name, len(source.classes)) for name in SPLITS}
    _report_gaps(counts, rows, config, source.classes)
    return _record(rows, directory, counts, _method(given, missing, made), ledger_path, source)


@dataclass
class _Rows:
    """The columns that matter, an entry an image."""

    image_id: list[str]
    label: np.ndarray  # int64
    group: list[str | None]
    content: list[str]
    given: list[str | None]
    split: list[str | None]
    held_back: list[str | None]
    key: list[str | None]
    placed: np.ndarray  # bool: the split is made here, not given

    def usable(self) -> np.ndarray:
        return np.array([reason is None for reason in self.held_back], dtype=bool)

    def counts(self, name: str, n_classes: int) -> list[int]:
        here = self.usable() & np.array([value == name for value in self.split], dtype=bool)
        return [int(n) for n in np.bincount(self.label[here], minlength=n_classes)]

    def hold_back_copies(self, ledger: Ledger | None) -> None:
        """Exact copies in two splits: one split keeps its own."""
        rows = [row for row in np.flatnonzero(self.usable()) if self.split[row] is not None]
        splits = [str(self.split[row]) for row in rows]
        content = [self.content[row] for row in rows]
        known = [ledger is not None and ledger.split_of_image(self.content[row]) == self.split[row] for row in rows]
        for row, copy in zip(rows, copies_held_back(content, splits, known), strict=True):
            if copy:
                self.held_back[row] = "duplicate"

    def remember(self, ledger: Ledger) -> None:
        for row in np.flatnonzero(self.placed):
            name, key, where = self.group[row], self.key[row], self.split[row]
            assert key is not None
            assert where is not None
            ledger.remember_group(key, where)
            if name is not None:
                ledger.remember_group(ledger.key.group(name), where)
            if self.held_back[row] is None:
                ledger.remember_image(self.content[row], key)

    def name_the_rest(self, key: Key) -> None:
        """Pseudonyms and splits for rows that took no part in the placing."""
        for row, name in enumerate(self.group):
            self.split[row] = self.split[row] or "train"
            if self.key[row] is None:
                self.key[row] = key.image(self.content[row]) if name is None else key.group(name)


def _load(source: Source) -> _Rows:
    import pandas as pd

    index = pd.read_parquet(source.directory / INDEX_FILE)
    if index["row"].tolist() != list(range(len(index))):
        raise DatasetError(f"{source.directory / INDEX_FILE} is not in order of its rows; read the dataset again.")
    text = index[["group", "given_split"]].astype(object)
    text = text.where(text.notna(), None)
    return _Rows(
        image_id=index["image_id"].tolist(),
        label=index["label"].to_numpy(np.int64),
        group=text["group"].tolist(),
        content=index["content_hash"].tolist(),
        given=text["given_split"].tolist(),
        split=text["given_split"].tolist(),
        held_back=["synthetic" if synthetic else None for synthetic in index["is_synthetic"]],
        key=[None] * len(index),
        placed=np.zeros(len(index), dtype=bool),
    )


def _given_splits(rows: _Rows) -> set[str]:
    """The splits that real rows say they are in.

    Raises:
        DatasetError: None of them is train, though there are some.
    """
    real = np.flatnonzero(rows.usable())
    given = {rows.given[row] for row in real}
    if given == {None}:
        return set()
    if None in given:
        lacking = sum(rows.given[row] is None for row in real)
        raise DatasetError(f"{lacking} of {len(real)} images have no split while others do. Give all or none a split.")
    if "train" not in given:
        raise DatasetError(
            f"the source gives the splits {', '.join(sorted(map(str, given)))} and no train, so there is nothing to "
            "learn from. Add the training images, or remove dataset.columns.split to divide all images anew."
        )
    return {str(name) for name in given}


def _refuse_divided_groups(rows: _Rows, config: Config, key: Key) -> None:
    """Groups in several given splits are a leak that we did not make and must not pass on."""
    where: dict[str, Counter[str]] = {}
    for row in np.flatnonzero(rows.usable()):
        name, given = rows.group[row], rows.given[row]
        if name is not None and given is not None:
            where.setdefault(name, Counter())[given] += 1
    divided = {name: splits for name, splits in where.items() if len(splits) > 1}
    if divided:
        first, splits = min((key.group(name), splits) for name, splits in divided.items())
        counts = ", ".join(f"{splits[name]} in {name}" for name in SPLITS if splits[name])
        raise LeakError(
            f"{len(divided)} of {len(where)} groups of column '{config.dataset.columns.group}' lie in more than one of "
            f"the given splits; group {first} (pseudonym) has {counts}. Give each group one split in the source, or "
            "remove the given splits (dataset.columns.split) to divide by group."
        )


def _place(rows: _Rows, config: Config, source: Source, ledger: Ledger, missing: list[str], given: set[str]) -> str:
    """Divide what has no split (or only 'train', where others are missing); returns by what, in words."""
    open_rows = np.array([
        row for row in np.flatnonzero(rows.usable()) if rows.given[row] in (None, "train")
    ], dtype=np.int64)  # fmt: skip
    content, names = [rows.content[row] for row in open_rows], [rows.group[row] for row in open_rows]
    pairs, words = None, "by group"
    if config.dataset.columns.group is None:
        pairs, words = _near_duplicates(open_rows, content, config, source)
    elif None in names:
        logger.info("%d images have no group; each of them counts as one", names.count(None))
    groups = form_groups(content, names, ledger, pairs)
    fixed = set(groups.pins) - {None, "train", *missing} - ({"validation", "test"} - given)
    if fixed:
        raise LeakError(
            f"the ledger of splits has put images into {', '.join(sorted(map(str, fixed)))} that the source now gives "
            "as train. Name another file in split.ledger to begin anew, and trust no older result on those images."
        )
    classes: list[Counter[int]] = [Counter() for _ in groups.keys]
    for position, row in enumerate(open_rows):
        if groups.held_back[position]:
            rows.held_back[row] = "duplicate"
        else:
            classes[groups.group[position]][int(rows.label[row])] += 1
    shares = {name: getattr(config.split, name) for name in missing}
    splits = place_groups(classes, groups.pins, groups.keys, {"train": 1 - sum(shares.values()), **shares})
    for position, row in enumerate(open_rows):
        rows.split[row] = splits[groups.group[position]]
        rows.key[row] = groups.keys[groups.group[position]]
    rows.placed[open_rows] = True
    pinned = sum(pin is not None for pin in groups.pins)
    if pinned:
        logger.info("%d of %d groups keep the split of an earlier run", pinned, len(groups.keys))
    return words


def _near_duplicates(open_rows: np.ndarray, content: list[str], config: Config, source: Source) -> tuple[Pairs, str]:
    """Near pairs as positions in `open_rows`, and how the groups were found, in words."""
    # Exact copies are joined by their content; comparing one of each is enough.
    first = np.array(list({item: position for position, item in reversed(list(enumerate(content)))}.values())[::-1])
    asked = config.split.near_duplicate_distance
    found = near_pairs(source.directory / IMAGES_FILE, open_rows[first], source.pixels, asked)
    searched = found.limit
    if config.split.moved_duplicates:
        found = _with_moved(found, open_rows[first], config, source)
    kept, least = without_giants(found, len(first))
    least *= searched / found.limit if found.limit else 0.0
    words = "by near-duplicate cluster"
    if least < asked:
        logger.warning(
            "at split.near_duplicate_distance %g too many images resemble each other to be divided; it was lowered, "
            "to %g at the least, and only nearer ones are sure to stay together there", asked, least,
        )  # fmt: skip
        words += f" (distance lowered from {asked:g} to {least:g} where too many resemble each other)"
    return Pairs(first[kept.first], first[kept.second], kept.distance, kept.limit), words


def _with_moved(pairs: Pairs, rows: np.ndarray, config: Config, source: Source) -> Pairs:
    """Add the pairs of which one is the other once more. Distances become shares of what either search allows."""
    from synthaug.quality.repeats import MOST_IMAGES, repeated_pairs

    if len(rows) > MOST_IMAGES:
        logger.warning(
            "moved duplicates are not looked for among %d images (%d at most). Give a group column "
            "(dataset.columns.group) where images belong together.", len(rows), MOST_IMAGES,
        )  # fmt: skip
        return pairs
    moved = repeated_pairs(source.directory / IMAGES_FILE, rows, source.pixels, config.train.threads)
    known = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    more = set(zip(moved.first.tolist(), moved.second.tolist(), strict=True)) - known
    if more:
        logger.info("%d pairs of images are the same picture moved or changed a little: kept together", len(more))
    scale = pairs.limit or 1.0
    return Pairs(
        np.concatenate([pairs.first, moved.first]),
        np.concatenate([pairs.second, moved.second]),
        np.concatenate([pairs.distance / scale, moved.distance / moved.limit]),
        1.0,
    )


def _check_names(config: Config, classes: tuple[str, ...]) -> None:
    for setting, names in (("cut", list(config.dataset.cut)), ("exclude", config.dataset.exclude)):
        for name in names:
            if name in classes:
                continue
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
            hint = f"Did you mean '{printable(near[0])}'?" if near else f"There are: {_listed(classes)}."
            raise DatasetError(f"dataset.{setting} names class '{printable(name)}', which the data do not have. {hint}")
    if len(set(classes) - set(config.dataset.exclude)) < 2:
        raise DatasetError("dataset.exclude leaves fewer than two classes, and balancing takes two. Exclude fewer.")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(printable, names))


def _exclude_and_cut(rows: _Rows, config: Config, classes: tuple[str, ...]) -> None:
    excluded = {classes.index(name) for name in config.dataset.exclude}
    for row in np.flatnonzero(rows.usable()):
        if int(rows.label[row]) in excluded:
            rows.held_back[row] = "excluded"
    usable = rows.usable() & np.array([name == "train" for name in rows.split], dtype=bool)
    for name, keep in config.dataset.cut.items():
        members = np.flatnonzero(usable & (rows.label == classes.index(name)))
        if keep > len(members):
            logger.warning(
                "class %s is cut to %d images, but has only %d in train", printable(name), keep, len(members)
            )
        shuffled = members[np.random.default_rng(config.dataset.cut_seed).permutation(len(members))]
        for row in shuffled[keep:]:
            rows.held_back[row] = "cut"


def _report_gaps(counts: dict[str, list[int]], rows: _Rows, config: Config, classes: tuple[str, ...]) -> None:
    """Refuse a split with nothing to train on; say which classes cannot be measured."""
    if not any(counts["train"]):
        raise DatasetError("no image is left for training. Lower split.validation and split.test, or add images.")
    for label, name in enumerate(classes):
        if name in config.dataset.exclude:
            continue
        if not counts["train"][label]:
            logger.warning("class %s has no image in train", printable(name))
        elif config.split.validation > 0 and not counts["validation"][label]:
            logger.warning("class %s has no image in validation: its images are too few, or one group", printable(name))


def _method(given: set[str], missing: list[str], made: str) -> str:
    if not missing:
        return "given" if given else "all in train"
    return f"given; {' and '.join(missing)} taken from train {made}" if len(given) > 1 else made


def _record(
    rows: _Rows, directory: Path, counts: dict[str, list[int]], method: str, ledger: Path | None, source: Source
) -> Splits:
    import pandas as pd

    table = pd.DataFrame({
        "row": np.arange(len(rows.label), dtype=np.int64),
        "image_id": rows.image_id,
        "label": rows.label,
        "split": rows.split,
        "group_key": rows.key,
        "held_back": pd.array(rows.held_back, dtype=pd.StringDtype(na_value=np.nan)),
    })  # fmt: skip
    table.to_parquet(directory / SPLITS_FILE, index=False)
    usable = rows.usable()
    lines = [
        list(line)
        for line in zip(rows.image_id, rows.label.tolist(), rows.split, rows.key, rows.held_back, strict=True)
    ]
    return Splits(
        directory=directory,
        digest=digest_json([source.digest, lines]),
        method=method,
        counts=counts,
        held_back=dict(sorted(Counter(reason for reason in rows.held_back if reason).items())),
        n_groups=len({key for key, used in zip(rows.key, usable, strict=True) if used}),
        ledger=None if ledger is None else str(ledger),
    )
