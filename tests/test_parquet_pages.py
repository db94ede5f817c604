"""Values of a parquet column found in the file without pyarrow, held against pyarrow."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthaug.formats.parquet_pages import Chunk, DamagedPageError, NotPlainError, plain_chunks, value_spans

PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}


def written(path: Path, values: list[bytes | None], *, group: int = 7, **options: Any) -> Path:
    pq.write_table(pa.table({"x": pa.array(values, pa.binary())}), path, row_group_size=group, **{**PLAIN, **options})
    return path


def read(path: Path) -> list[bytes]:
    """All values by their spans."""
    chunks, data = plain_chunks(pq.ParquetFile(path).metadata, "x"), path.read_bytes()
    assert chunks is not None
    spans = [tuple(span) for chunk in chunks for span in value_spans(part_of(data, chunk), chunk).tolist()]
    return [data[start : start + size] for start, size in spans]


def part_of(data: bytes, chunk: Chunk) -> bytes:
    return data[chunk.start : chunk.start + chunk.size]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.binary(max_size=200), min_size=1, max_size=60),
    page=st.sampled_from([64, 300, 1 << 20]),
    group=st.integers(1, 40),
    statistics=st.booleans(),
    checksum=st.booleans(),
)
def test_every_value_is_found_whatever_the_pages(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[bytes],
    page: int,
    group: int,
    statistics: bool,
    checksum: bool,
) -> None:
    path = tmp_path_factory.mktemp("pages") / "x.parquet"
    options = {"data_page_size": page, "write_statistics": statistics, "write_page_checksum": checksum}
    written(path, list(values), group=group, **options)
    assert read(path) == values


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": True}])
def test_what_is_not_stored_plainly_is_said_so(tmp_path: Path, options: dict[str, Any]) -> None:
    path = written(tmp_path / "x.parquet", [b"one", b"two"], **options)
    assert plain_chunks(pq.ParquetFile(path).metadata, "x") is None
    assert plain_chunks(pq.ParquetFile(path).metadata, "other") is None


@pytest.mark.parametrize("options", [{"data_page_version": "2.0"}, {"column_encoding": {"x": "DELTA_BYTE_ARRAY"}}])
def test_other_pages_and_encodings_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    path = written(tmp_path / "x.parquet", [b"one", b"two"], **options)
    with pytest.raises(NotPlainError):
        read(path)


def test_a_missing_value_is_refused(tmp_path: Path) -> None:
    for values in ([b"a", None, b"c"], [None] * 20, [b"a"] * 20 + [None] * 20):
        with pytest.raises(NotPlainError, match="missing"):
            read(written(tmp_path / "x.parquet", list(values), group=100))


def test_one_flipped_bit_never_goes_unseen(tmp_path: Path) -> None:
    chance = random.Random(3)
    values = [chance.randbytes(40) for _ in range(50)]
    path = written(tmp_path / "x.parquet", list(values), group=50, data_page_size=500)
    data = path.read_bytes()
    (chunk,) = plain_chunks(pq.ParquetFile(path).metadata, "x") or []
    wrong = 0
    for _ in range(300):
        flipped = bytearray(part_of(data, chunk))
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        try:
            spans = value_spans(bytes(flipped), chunk)
        except (DamagedPageError, NotPlainError):
            continue
        found = [bytes(flipped)[start - chunk.start : start - chunk.start + size] for start, size in spans.tolist()]
        # Only a header's own fields that mean nothing to us (statistics, say) may change without harm.
        wrong += found != values
    assert wrong == 0


def test_a_chunk_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    path = written(tmp_path / "x.parquet", [b"x" * 30] * 20, group=20)
    (chunk,) = plain_chunks(pq.ParquetFile(path).metadata, "x") or []
    data = part_of(path.read_bytes(), chunk)
    for length in (0, 5, len(data) - 1):
        with pytest.raises(DamagedPageError):
            value_spans(data[:length], chunk)
