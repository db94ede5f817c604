"""What a release says about itself: `manifest.parquet`, `manifest.csv`, `release.json` and `config.json`.

manifest.parquet has a row for each synthetic sample, in the order of the shards: by (shard, row), in row groups of a
fixed size, with a checksum on every page: equal rows give equal bytes. manifest.csv is a copy of it for people; only
verification reads it.
release.json lists every other file with its size and SHA-256 and is where verification starts. It is written
in one spelling only and carries a digest over itself, so that no byte of it can change unseen.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import VerificationError

MANIFEST_FILE = "manifest.parquet"
MANIFEST_CSV_FILE = "manifest.csv"
RELEASE_FILE = "release.json"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
REPORT_FILE = "report.html"
CONTACT_SHEET_FILE = "contact_sheet.png"
FORMAT = 1

MANIFEST_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("content_hash", pa.string()),  # SHA-256 of the PNG in the shard; of the array where it is stored as one
        ("pixel_hash", pa.string()),  # synthaug.digest.digest_array of the pixels, [height, width, channels]
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("label", pa.int64()),
        ("class_name", pa.string()),
        ("class_index", pa.int64()),  # position in the class's endless sequence of samples
        ("rank", pa.int64()),  # position among the accepted ones: every smaller dose is a prefix
        ("seed", pa.int64()),
        ("job_seed", pa.int64()),  # what `seed` follows from; the micro-batch's other seeds do too, released or not
        ("micro_batch", pa.int64()),
        ("position", pa.int64()),
        ("checkpoint_digest", pa.string()),
        ("generator", pa.string()),
        ("solver", pa.string()),
        ("steps", pa.int64()),
        ("guidance", pa.float64()),
        ("micro_batch_size", pa.int64()),
        ("threads", pa.int64()),
        ("device", pa.string()),
        ("probability", pa.float64()),  # of its own class, by the judge
        ("predicted", pa.int64()),
        ("distance", pa.float64()),  # to the nearest training image; which one that is is never published
        ("distance_ratio", pa.float64()),
        ("config_digest", pa.string()),
        ("synthaug_version", pa.string()),
        ("torch_version", pa.string()),
        ("diffusers_version", pa.string()),
        ("numpy_version", pa.string()),
        ("cpu_capability", pa.string()),
    ],
    metadata={"synthaug": f'{{"manifest": {FORMAT}}}'},
)
_GROUP_ROWS = 5000
# A spreadsheet takes a cell that begins so for a formula, also in the wide forms of East Asian keyboards.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class ManifestWriter:
    """Writes manifest rows as they come, a row group at a time, and the copy for people beside them."""

    def __init__(self, release: Path) -> None:
        # The byte order mark tells spreadsheets that names are UTF-8.
        self._csv_file = (release / MANIFEST_CSV_FILE).open("w", encoding="utf-8-sig", newline="")
        self._csv = csv.writer(self._csv_file)
        self._csv.writerow(MANIFEST_SCHEMA.names)
        self._writer = pq.ParquetWriter(
            release / MANIFEST_FILE,
            MANIFEST_SCHEMA,
            version="2.6",
            compression="zstd",
            write_page_checksum=True,
        )
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=MANIFEST_SCHEMA))
            self._csv.writerows(_csv_line(row, MANIFEST_SCHEMA.names) for row in self._rows)
            self._rows = []

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
        finally:
            self._csv_file.close()


def safe_cell(value: Any) -> str:
    """A value as a spreadsheet's cell that is never taken for a formula: an apostrophe stands before what would be.

    >>> safe_cell("=1+1")
    "'=1+1"
    """
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _csv_line(row: dict[str, Any], columns: list[str]) -> list[str]:
    return [safe_cell(row.get(name)) for name in columns]


def csv_lines(manifest: Path) -> Iterator[list[str]]:
    """The lines that manifest.csv has beside a manifest, the names of the columns first; raises as `read_manifest`."""
    with pq.ParquetFile(manifest) as file:
        columns = file.schema_arrow.names
    yield columns
    for row in read_manifest(manifest, columns):
        yield _csv_line(row, columns)


def read_manifest(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Iterate over manifest rows, one row group in memory, every page's checksum checked.

    Raises:
        pyarrow.ArrowException, OSError: The file is damaged.
        KeyError: It is not a manifest.
    """
    wanted = columns or MANIFEST_SCHEMA.names
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if missing := set(wanted) - set(file.schema_arrow.names):
            raise KeyError(f"no column {', '.join(sorted(missing))}")
        for index in range(file.metadata.num_row_groups):
            yield from file.read_row_group(index, columns=wanted, use_threads=False).to_pylist()


def public_config(config: Config) -> dict[str, Any]:
    """The effective configuration as plain data, without what is only true of this machine or this upload.

    Local paths are reduced to their last part, of medical files to nothing; `output` and `release.push`
    are left out.
    """
    values: dict[str, Any] = config.model_dump(mode="json")
    del values["output"]
    del values["release"]["push"]
    if config.dataset.path is not None and config.dataset.format != "hub":
        values["dataset"]["path"] = _last_part(config.dataset.path)
    if config.dataset.private is not None:
        # Folders and tables of patients may be named after them.
        values["dataset"]["path"] = "(private)"
        section = values["dataset"][config.dataset.format]
        section.update({name: "(private)" for name in ("table", "key_file") if section[name] is not None})
    if config.split.ledger is not None:
        values["split"]["ledger"] = _last_part(config.split.ledger)
    base = config.train.base
    if base is not None and (base.startswith(("/", "~", ".")) or "\\" in base or Path(base).exists()):
        values["train"]["base"] = _last_part(base)
    return values


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or "."


def canonical_json(values: dict[str, Any]) -> str:
    """The one spelling that our JSON files have."""
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def write_release_file(release: Path, values: dict[str, Any]) -> str:
    """Write release.json with a digest over itself; returns the digest."""
    digest = digest_json(values)
    (release / RELEASE_FILE).write_text(canonical_json({**values, "digest": digest}), encoding="utf-8")
    return digest


def read_release_file(release: Path) -> dict[str, Any]:
    """Read release.json and hold it against its own digest.

    Raises:
        VerificationError: It is missing, cannot be read, or any byte of it has changed.
    """
    path = release / RELEASE_FILE
    if not release.is_dir():
        raise VerificationError(f"release {release} is not a directory. Give the directory of a release.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise VerificationError(
            f"{release} has no {RELEASE_FILE}, so it is not a release, or only a part of one. "
            f"Make it again with 'synthaug run', or download it again.{_snapshots(release)}"
        ) from None
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror or error}.") from None
    advice = "Make the release again with 'synthaug run', or download it again."
    try:
        values = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path} is damaged: it is not JSON ({str(error)[:100]}). {advice}") from None
    try:
        digest = values.pop("digest")
        intact = digest == digest_json(values) and raw == canonical_json({**values, "digest": digest}).encode()
    except (AttributeError, KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise VerificationError(f"{path} is damaged or was edited: it does not agree with its own digest. {advice}")
    if values.get("format") != FORMAT:
        raise VerificationError(
            f"{path} has format {values.get('format')!r:.40}; this version of synthaug reads {FORMAT}. Update synthaug."
        )
    return {**values, "digest": digest}


def stated_checkpoints(stated: Mapping[str, Any]) -> tuple[str, ...]:
    """Digests of the checkpoints whose samples a release holds, as its release.json has them: oldest first.

    A release of one checkpoint has `checkpoint_digest` alone; with several that is the newest, and `checkpoint_digests`
    has all.
    """
    newest = stated.get("checkpoint_digest")
    return tuple(map(str, stated.get("checkpoint_digests") or ([newest] if newest else [])))


def generator_label(stated: Mapping[str, Any], checkpoint_digest: str, label: int) -> int | None:
    """The label that a checkpoint has for a class of the release; None where it is said to know no such class.

    Classes are numbered in the order of their names, so one that was added later moves those behind it. Where that
    happened, `generator_labels` of release.json has for the checkpoint's digest its own label to the one of the
    release.
    """
    moved = dict(stated.get("generator_labels") or {}).get(checkpoint_digest)
    if moved is None:
        return label
    labels = {int(own): int(now) for own, now in dict(moved).items()}
    return next((own for own, now in labels.items() if now == label), None)


def _snapshots(folder: Path) -> str:
    """Advice to whoever names a dataset's folder in the hub's cache, where downloads lie one level further down."""
    found = sorted(str(path.parent) for path in (folder / "snapshots").glob(f"*/{RELEASE_FILE}"))
    return f" It is the hub's folder of downloads; name one of them: {', '.join(found[:3])}." if found else ""


def is_safe_name(name: str) -> bool:
    """Whether a file name from release.json stays inside the release."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
