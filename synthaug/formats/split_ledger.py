"""The ledger of splits: a small JSON file beside the source that remembers where every group went.

It holds keyed hashes only, never names of patients or files. The hashes keep honest people from reading names;
against someone who guesses names and knows the key (`split.seed`) they are no protection.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from synthaug.config import Config
from synthaug.errors import DatasetError, OutputError
from synthaug.formats.atomic import write_text
from synthaug.formats.source_arrow import fixed_part
from synthaug.records import SPLITS

logger = logging.getLogger(__name__)

_KIND, _VERSION = "synthaug split ledger", 1
_SUFFIX = ".synthaug-splits.json"
_DIGITS = 16  # of a hash that are kept: 64 bits


class Key:
    """Pseudonyms of groups and images under `split.seed`."""

    def __init__(self, seed: int) -> None:
        self._key = f"synthaug split {seed}".encode()

    def group(self, name: str) -> str:
        """Pseudonym of a group."""
        return self._hash("group", name)

    def image(self, content_hash: str) -> str:
        """Pseudonym of an image, and of the group it makes where it has no other."""
        return self._hash("image", content_hash)

    def check(self) -> str:
        """Tells whether two ledgers have the same key."""
        return self._hash("check", "")

    def _hash(self, kind: str, text: str) -> str:
        message = f"{kind}:{text}".encode("utf-8", "backslashreplace")
        return hmac.digest(self._key, message, hashlib.sha256).hex()[:_DIGITS]


@dataclass
class Ledger:
    """What is known from earlier runs, and what this one adds."""

    key: Key
    groups: dict[str, str] = field(default_factory=dict)  # pseudonym of a group to its split
    images: dict[str, str] = field(default_factory=dict)  # pseudonym of an image to that of its group
    added: int = 0

    def split_of_group(self, pseudonym: str) -> str | None:
        """Where an earlier run put the group."""
        return self.groups.get(pseudonym)

    def group_of_image(self, content_hash: str) -> str | None:
        """The group that this very picture was seen in."""
        return self.images.get(self.key.image(content_hash))

    def split_of_image(self, content_hash: str) -> str | None:
        """Where an earlier run put this very picture."""
        group = self.group_of_image(content_hash)
        return None if group is None else self.groups[group]

    def remember_group(self, pseudonym: str, split: str) -> None:
        """Add a group; one that is known keeps its split."""
        if pseudonym not in self.groups:
            self.groups[pseudonym] = split
            self.added += 1

    def remember_image(self, content_hash: str, group: str) -> None:
        """Add an image; one that is known keeps its group."""
        image = self.key.image(content_hash)
        if image not in self.images:
            self.images[image] = group
            self.added += 1


def load_ledger(config: Config) -> Ledger:
    """What earlier runs remembered; empty where there is nothing.

    Raises:
        DatasetError: A file that is no ledger, or one made with another `split.seed`.
    """
    ledger = Ledger(Key(config.split.seed))
    for path in _places(config):
        if path.is_file():
            _merge(ledger, path)
    return ledger


def save_ledger(ledger: Ledger, config: Config) -> Path:
    """Write the ledger whole, where it belongs, and return the place. Nothing is written if nothing is new.

    Raises:
        OutputError: It cannot be written, and no other place may be taken.
    """
    places = _places(config)
    if not ledger.added:
        existing = next((path for path in places if path.is_file()), None)
        if existing is not None:
            return existing
    text = json.dumps(
        {
            "kind": _KIND,
            "version": _VERSION,
            "key_check": ledger.key.check(),
            "groups": dict(sorted(ledger.groups.items())),
            "images": dict(sorted(ledger.images.items())),
        },
        indent=0,
    )
    for path in places[:-1]:
        if _try_to_write(path, text):
            return path
    try:
        write_text(places[-1], text + "\n")
    except OSError as error:
        raise OutputError(
            f"the ledger of splits {places[-1]} cannot be written: {error.strerror or error}. Name a file that can be "
            "in split.ledger: without it a grown dataset would be divided anew."
        ) from error
    if config.split.ledger is None:
        logger.info("the ledger of splits is kept in %s; keep it if the dataset is going to grow", places[-1])
    return places[-1]


def _try_to_write(path: Path, text: str) -> bool:
    # Root may write everywhere: a folder that nobody is given the right to write into is left alone all the same.
    try:
        if not path.parent.stat().st_mode & 0o222 or not os.access(path.parent, os.W_OK):
            return False
        write_text(path, text + "\n")
    except OSError as error:
        logger.debug("the ledger cannot be written to %s: %s", path, error)
        return False
    return True


def _places(config: Config) -> list[Path]:
    """Where the ledger may be, the best place first."""
    if config.split.ledger is not None:
        return [Path(config.split.ledger).expanduser()]
    fallback = config.output_path / "splits-ledger.json"
    beside = _beside(config)
    return [fallback] if beside is None else [beside, fallback]


def _beside(config: Config) -> Path | None:
    """Beside the source, never inside it, where it would be taken for data."""
    dataset = config.dataset
    if dataset.format in ("hub", "digits") or dataset.path is None:
        return None
    path = Path(dataset.path)
    if path.exists():
        path = path.resolve()
        return path.with_name(path.name + _SUFFIX) if path.name else None
    fixed = fixed_part(dataset.path)
    pattern = os.path.relpath(dataset.path, fixed)
    return fixed.resolve() / (re.sub(r"[^\w.-]+", "_", pattern) + _SUFFIX)


def _merge(ledger: Ledger, path: Path) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] != _KIND or values["version"] != _VERSION:
            raise ValueError(f"kind {values['kind']!r}, version {values['version']!r}")
        check, groups, images = values["key_check"], dict(values["groups"]), dict(values["images"])
        strange = set(groups.values()) - set(SPLITS)
        if strange or not set(images.values()) <= set(groups):
            raise ValueError("groups without a known split")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} is not a ledger of splits that this version can read ({type(error).__name__}: {error}). Restore "
            "it, or name another file in split.ledger to divide the dataset anew."
        ) from None
    if check != ledger.key.check():
        raise DatasetError(
            f"the ledger of splits {path} was made with another split.seed. Set the seed it was made with, so that "
            "every image keeps its split, or name another file in split.ledger to divide the dataset anew."
        )
    # The first place wins; later ones add what it does not know.
    ledger.groups = {**groups, **ledger.groups}
    ledger.images = {**images, **ledger.images}
