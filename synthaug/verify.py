"""Verify: hold a release against release.json and its manifest, in memory that does not grow with it."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from synthaug.digest import digest_file, digest_json
from synthaug.errors import VerificationError
from synthaug.progress import Bar, progress
from synthaug.records import Record
from synthaug.text import printable

if TYPE_CHECKING:
    from synthaug.formats.shards import ReadRow

logger = logging.getLogger(__name__)

_MOST_PROBLEMS = 20  # of one file; the rest are counted
# What the hub or a file manager puts beside a release. A checkpoint may be published with it.
_NOT_OURS = ("checkpoint/",)


class VerifyResult(Record):
    """What became of a verification."""

    ok: bool
    release: Path
    digest: str = Field(description="Digest of the release: of release.json.")
    manifest_digest: str
    n_files: int = Field(description="Files listed in release.json, which are all but itself.")
    n_rows: int = Field(description="Rows read from the shards.")
    n_images: int = Field(description="Synthetic images held against their hash in the manifest.")
    problems: tuple[str, ...] = Field(description="Each names the file, the row where there is one, and what is wrong.")


class _Problems:
    """Collects problems; of one file, only the first ones in full."""

    def __init__(self) -> None:
        self._by_file: dict[str, list[str]] = {}

    def add(self, file: str, text: str) -> None:
        self._by_file.setdefault(file, []).append(text if len(self._by_file.get(file, ())) < _MOST_PROBLEMS else "")

    def texts(self) -> tuple[str, ...]:
        lines = []
        for file, texts in self._by_file.items():
            lines += [f"{printable(file, width=200)}: {text}" for text in texts[:_MOST_PROBLEMS]]
            if (more := len(texts) - _MOST_PROBLEMS) > 0:
                lines.append(f"{printable(file, width=200)}: and {more} more problems")
        return tuple(lines)


def verify(release: Path) -> VerifyResult:
    """Check every file, row and synthetic image of a release, local or downloaded.

    Files: each one listed is there with its size and SHA-256, and no other lies beside them. Manifest and shards:
    every manifest row has its shard row and every synthetic shard row its manifest row, with the same sample id,
    label and image, as stored and as decoded. Splits: rows per class as stated, validation and test without synthetic
    images. Checkpoints: rows name none that release.json does not. Papers: card and report quote the manifest's digest,
    manifest.csv is the manifest, and config.json and provenance.json are of this release. Where a page of a shard is
    damaged, its rows are looked at one by one.

    Raises:
        VerificationError: There is no release to verify, or its release.json is damaged.
    """
    from synthaug.formats.manifest import MANIFEST_FILE, RELEASE_FILE, read_release_file, stated_checkpoints

    release = Path(release)
    stated = read_release_file(release)
    problems = _Problems()
    try:
        files: dict[str, dict[str, Any]] = dict(stated["files"])
        splits: dict[str, dict[str, Any]] = dict(stated["splits"])
        shards = {name: split for split, values in splits.items() for name in values["shards"]}
        classes: list[str] = list(stated["classes"])
        _check_files(release, files, problems)
        for name in [*shards, MANIFEST_FILE]:
            if name not in files:
                problems.add(RELEASE_FILE, f"{printable(name)} is spoken of but not listed")
        if MANIFEST_FILE in files and files[MANIFEST_FILE]["sha256"] != stated["manifest_digest"]:
            problems.add(RELEASE_FILE, "the manifest's digest is not that of the file listed")
        n_rows, n_images, has_manifest = _check_rows(release, splits, classes, stated_checkpoints(stated), problems)
        _check_papers(release, stated, files, has_manifest, problems)
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{release / RELEASE_FILE} lacks {error}: it was not written by synthaug.") from error
    texts = problems.texts()
    for text in texts:
        logger.warning("verify: %s", text)
    return VerifyResult(
        ok=not texts,
        release=release,
        digest=stated["digest"],
        manifest_digest=stated["manifest_digest"],
        n_files=len(files),
        n_rows=n_rows,
        n_images=n_images,
        problems=texts,
    )


def _check_files(release: Path, files: dict[str, dict[str, Any]], problems: _Problems) -> None:
    from synthaug.formats.manifest import CARD_FILE, RELEASE_FILE, is_safe_name

    with progress("verify files", len(files), "files") as bar:
        for name, stated in files.items():
            bar.update(1)
            if not is_safe_name(name):
                problems.add(RELEASE_FILE, f"lists {printable(name)}, which lies outside of the release")
                continue
            path = release / name
            try:
                size = path.stat().st_size
                if not path.is_file():
                    problems.add(name, "not a file")
                elif size != stated["size"]:
                    problems.add(name, f"{size} bytes, but {stated['size']} were written")
                elif digest_file(path) != stated["sha256"]:
                    edited = " (or the card was edited)" if name == CARD_FILE else ""
                    problems.add(name, f"its content has changed since it was written: another SHA-256{edited}")
            except FileNotFoundError:
                problems.add(name, "missing")
            except OSError as error:
                problems.add(name, f"cannot be read: {error.strerror or error}")
    for path in sorted(release.rglob("*")):
        name = path.relative_to(release).as_posix()
        # Names that begin with a dot are the hub's (.gitattributes, .cache) or a file manager's.
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name in files or name == RELEASE_FILE or hidden or name.startswith(_NOT_OURS) or path.is_dir():
            continue
        problems.add(name, "not part of the release: release.json does not list it")


def _check_rows(
    release: Path,
    splits: dict[str, dict[str, Any]],
    classes: list[str],
    checkpoints: tuple[str, ...],
    problems: _Problems,
) -> tuple[int, int, bool]:
    """Hold shards against the manifest, both read once and side by side.

    Returns:
        Rows and synthetic images seen, and whether the manifest could be read to its end.
    """
    from synthaug.formats.manifest import is_safe_name

    manifest = _Manifest(release, classes, checkpoints, problems)
    n_rows = n_images = 0
    with progress("verify rows", sum(int(values["n_rows"]) for values in splits.values()), "rows") as bar:
        for split, stated in splits.items():
            counts = _Counts([0] * len(classes), [0] * len(classes))
            whole = True
            for name in stated["shards"]:
                # A file that is missing is said so with the files; what the manifest has of its rows is passed over.
                there = is_safe_name(name) and (release / name).is_file()
                shard = _Shard(release / name, name, split, classes, counts, manifest, problems, bar)
                if not there or not _guarded(shard.check, name, problems):
                    manifest.skip(name)
                    whole = False
                whole = whole and shard.whole
            n_rows += counts.n_rows
            n_images += sum(counts.synthetic)
            if whole:
                _check_counts(split, stated, counts, classes, problems)
    manifest.end()
    return n_rows, n_images, not manifest.broken


@dataclass
class _Counts:
    real: list[int]  # by label
    synthetic: list[int]
    n_rows: int = 0


class _Shard:
    """One shard while it is read."""

    def __init__(
        self,
        path: Path,
        name: str,
        split: str,
        classes: list[str],
        counts: _Counts,
        manifest: _Manifest,
        problems: _Problems,
        bar: Bar,
    ) -> None:
        self._path, self._name, self._split, self._classes = path, name, split, classes
        self._counts, self._manifest, self._problems, self._bar = counts, manifest, problems, bar
        self.whole = True  # every row could be read

    def check(self) -> None:
        from synthaug.formats.shards import read_classes, read_shard

        if read_classes(self._path) != self._classes:
            self._problems.add(self._name, "its class names are not those of the release")
        for row in read_shard(self._path, self._damaged):
            self._bar.update(1)
            self._check_row(row)
        self._manifest.end_of(self._name)

    def _damaged(self, first: int, end: int, readable: bool, error: Exception) -> None:
        words = printable(str(error), width=200)
        if readable:
            more = "its rows were looked at one by one, and those known to be wrong follow"
        else:
            more = "they cannot be told apart"
            self.whole = False
            self._manifest.skip(self._name, end)
        self._problems.add(self._name, f"rows {first} to {end - 1}: damaged, {more} ({words})")

    def _check_row(self, row: ReadRow) -> None:
        counts, problems, name, here = self._counts, self._problems, self._name, f"row {row.row}"
        counts.n_rows += 1
        if row.label is None or not 0 <= row.label < len(self._classes):
            problems.add(name, f"{here}: label {row.label} is none of the {len(self._classes)} classes")
        else:
            (counts.synthetic if row.is_synthetic else counts.real)[row.label] += 1
        if (row.sample_id is None) == row.is_synthetic or (row.source_id is None) != row.is_synthetic:
            problems.add(name, f"{here}: is_synthetic, sample_id and source_id contradict each other")
        if not row.whole:
            problems.add(name, f"{here}: the image is damaged: its PNG does not agree with its own checksums")
        if row.is_synthetic:
            if self._split != "train":
                problems.add(name, f"{here}: a synthetic image in the {self._split} split")
            self._manifest.check(name, row)


def _check_counts(split: str, stated: dict[str, Any], counts: _Counts, classes: list[str], problems: _Problems) -> None:
    place = f"split {split}"
    if counts.n_rows != stated["n_rows"]:
        problems.add(place, f"{counts.n_rows} rows, but {stated['n_rows']} were written")
    kinds = (("real", counts.real, stated["n_real"]), ("synthetic", counts.synthetic, stated["n_synthetic"]))
    for kind, found, wanted in kinds:
        for label, name in enumerate(classes):
            if found[label] != wanted[label]:
                text = f"has {found[label]} {kind} images, but {wanted[label]} were written"
                problems.add(place, f"class '{printable(name)}' {text}")


def _check_papers(
    release: Path, stated: dict[str, Any], files: dict[str, dict[str, Any]], has_manifest: bool, problems: _Problems
) -> None:
    """What a release says in several places is the same in all of them.

    One flipped byte is found by the SHA-256 of its file; this finds papers of another release, or rewritten ones,
    under a release.json that was made to fit them.
    """
    from synthaug.formats import manifest as names
    from synthaug.formats.provenance import PROVENANCE_FILE

    checks: dict[str, Callable[[], None]] = {
        names.CARD_FILE: lambda: _check_card(release / names.CARD_FILE, stated["manifest_digest"], problems),
        names.REPORT_FILE: lambda: _check_report(release / names.REPORT_FILE, stated["manifest_digest"], problems),
        names.CONFIG_FILE: lambda: _check_config(release / names.CONFIG_FILE, stated["config_digest"], problems),
        PROVENANCE_FILE: lambda: _check_provenance(release / PROVENANCE_FILE, stated, files, problems),
    }
    if has_manifest:
        checks[names.MANIFEST_CSV_FILE] = lambda: _check_csv(release, problems)
    for name, check in checks.items():
        # An older release has fewer of them; one that is missing is told with the files.
        if name in files and (release / name).is_file():
            _guarded(check, name, problems)


def _check_card(path: Path, manifest_digest: str, problems: _Problems) -> None:
    if f"`{manifest_digest}`" not in path.read_text(encoding="utf-8"):
        problems.add(path.name, "does not quote the digest of the manifest: it is the card of another release")


def _check_report(path: Path, manifest_digest: str, problems: _Problems) -> None:
    if f">{manifest_digest}<" not in path.read_text(encoding="utf-8"):
        problems.add(path.name, "does not quote the digest of the manifest: it is the report of another release")


def _check_config(path: Path, config_digest: str, problems: _Problems) -> None:
    if digest_json(json.loads(path.read_text(encoding="utf-8"))) != config_digest:
        problems.add(path.name, "is another configuration: its digest is not the one stated")


def _check_csv(release: Path, problems: _Problems) -> None:
    from synthaug.formats.manifest import MANIFEST_CSV_FILE, MANIFEST_FILE, csv_lines

    path = release / MANIFEST_CSV_FILE
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, (found, wanted) in enumerate(zip_longest(csv.reader(file), csv_lines(release / MANIFEST_FILE))):
            if found != wanted:
                where = "the column names" if number == 0 else f"row {number - 1}"
                problems.add(path.name, f"{where}: not what {MANIFEST_FILE} has there")
                if found is None or wanted is None:
                    return


def _check_provenance(
    path: Path, stated: dict[str, Any], files: dict[str, dict[str, Any]], problems: _Problems
) -> None:
    from synthaug.formats.manifest import stated_checkpoints
    from synthaug.formats.provenance import names_checkpoint, stated_digests, stated_manifest

    graph = json.loads(path.read_text(encoding="utf-8"))
    if stated_manifest(graph) != stated["manifest_digest"]:
        problems.add(path.name, "speaks of another manifest")
    for digest in stated_checkpoints(stated):
        if not names_checkpoint(graph, digest):
            problems.add(path.name, f"does not name checkpoint {printable(digest[:12])}, which release.json does")
    told = dict(stated_digests(graph))
    shards = {name for split in stated["splits"].values() for name in split["shards"]}
    for name in sorted({*told, *shards}):
        if told.get(name) != files.get(name, {}).get("sha256"):
            problems.add(path.name, f"has another digest of {printable(name)} than release.json")


def _guarded(check: Callable[[], None], name: str, problems: _Problems) -> bool:
    """Run a check; a damaged file becomes a problem. Returns whether it came to its end."""
    try:
        check()
    except Exception as error:  # a damaged file fails in every way that there is
        problems.add(name, f"cannot be read to its end: {printable(str(error), width=200)}")
        return False
    return True


class _Manifest:
    """The manifest, walked through beside the shards: both are in the order of (shard, row)."""

    def __init__(self, release: Path, classes: list[str], checkpoints: tuple[str, ...], problems: _Problems) -> None:
        from synthaug.formats.manifest import MANIFEST_FILE

        self._file, self._classes, self._problems = MANIFEST_FILE, classes, problems
        self._checkpoints = set(checkpoints)
        self._rows = self._read(release)
        self._number = -1
        self._row: dict[str, Any] | None = None
        self.broken = False
        self._ranks: dict[int, tuple[int, int]] = {}  # label: last rank and class index
        self._advance()

    def _read(self, release: Path) -> Iterator[dict[str, Any]]:
        from synthaug.formats.manifest import read_manifest

        columns = [
            "sample_id",
            "content_hash",
            "pixel_hash",
            "shard",
            "row",
            "label",
            "class_name",
            "class_index",
            "rank",
            "checkpoint_digest",
        ]
        yield from read_manifest(release / self._file, columns)

    def _advance(self) -> None:
        def step() -> None:
            self._row = next(self._rows, None)
            self._number += 1

        self._row = None
        if not self.broken and not _guarded(step, self._file, self._problems):
            self.broken = True
        if self._row is not None:
            self._check_row(self._row)

    def _check_row(self, row: dict[str, Any]) -> None:
        label, rank, index = row["label"], row["rank"], row["class_index"]
        here = f"row {self._number}"
        if row["checkpoint_digest"] not in self._checkpoints:
            name = printable(str(row["checkpoint_digest"])[:12])
            self._problems.add(self._file, f"{here}: drawn from checkpoint {name}, which release.json does not name")
        if label is None or not 0 <= label < len(self._classes) or row["class_name"] != self._classes[label]:
            self._problems.add(self._file, f"{here}: label {label} and class name do not belong together")
            return
        last_rank, last_index = self._ranks.get(label, (-1, -1))
        if rank != last_rank + 1 or index is None or index <= last_index:
            name = printable(self._classes[label])
            self._problems.add(self._file, f"{here}: rank {rank} of class '{name}' is out of order")
        if isinstance(rank, int) and isinstance(index, int):
            self._ranks[label] = (rank, index)

    def check(self, shard: str, row: Any) -> None:
        """Hold a synthetic shard row against the manifest row that speaks of it."""
        while self._row is not None and self._row["shard"] == shard and _before(self._row["row"], row.row):
            self._lost()
        stated = self._row
        if stated is None or stated["shard"] != shard or stated["row"] != row.row:
            if not self.broken:
                name = printable(str(row.sample_id))
                self._problems.add(shard, f"row {row.row}: sample {name} has no row in {self._file}")
            return
        for what, found, wanted in (
            ("sample id", row.sample_id, stated["sample_id"]),
            ("label", row.label, stated["label"]),
        ):
            if found != wanted:
                text = f"{what} {printable(str(found))}, but {self._file} has {printable(str(wanted))}"
                self._problems.add(shard, f"row {row.row}: {text}")
        if row.content_hash != stated["content_hash"]:
            self._problems.add(shard, f"row {row.row}: the image is not the one in {self._file}: another SHA-256")
        elif row.pixel_hash != stated["pixel_hash"]:
            text = f"row {row.row}: the image is stored as {self._file} says, but its pixels have another hash"
            self._problems.add(shard, text)
        self._advance()

    def _lost(self) -> None:
        row = self._row or {}
        self._problems.add(
            self._file,
            f"row {self._number}: sample {printable(str(row['sample_id']))} is not in "
            f"{printable(str(row['shard']))} row {row['row']}",
        )
        self._advance()

    def end_of(self, shard: str) -> None:
        """The shard has no more rows."""
        while self._row is not None and self._row["shard"] == shard:
            self._lost()

    def skip(self, shard: str, end: int | None = None) -> None:
        """Pass over what the manifest says of rows (before `end`) that cannot be read; that is said elsewhere."""
        while self._row is not None and self._row["shard"] == shard and (end is None or _before(self._row["row"], end)):
            self._advance()

    def end(self) -> None:
        """There are no more shards."""
        while self._row is not None:
            self._lost()


def _before(row: Any, other: int) -> bool:
    return not isinstance(row, int) or row < other
