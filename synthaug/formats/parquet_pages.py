"""Where the values of a plainly stored parquet column lie in the file, so that one of them can be read alone.

pyarrow reads whole row groups. Our shards store PNGs without compression and without a dictionary, so each lies in its
file as it is, and a training loop that jumps about needs one read of a few hundred bytes for it.

Source: https://parquet.apache.org/docs/file-format/ (PageHeader of parquet.thrift in Thrift's compact protocol, PLAIN
encoding of BYTE_ARRAY, RLE hybrid of definition levels). What is stored in any other way is not read here.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

_DATA_PAGE, _PLAIN = 0, 0
_STRUCT, _LISTS, _MAP, _BINARY, _DOUBLE, _BYTE = 12, (9, 10), 11, 8, 7, 3


class NotPlainError(ValueError):
    """A column is stored in a way that this module does not read."""


class DamagedPageError(ValueError):
    """A page does not agree with its checksum, or is cut short."""


@dataclass(frozen=True)
class Chunk:
    """A column's part of a row group."""

    start: int  # in the file, bytes
    size: int
    n_values: int
    max_level: int  # definition level of a value that is there


def plain_chunks(metadata: Any, column: str) -> list[Chunk] | None:
    """The chunks of a column, one for each row group; None if it is compressed or in a dictionary.

    Args:
        metadata: `pyarrow.parquet.FileMetaData`.
        column: Path of a column of bytes, `image.bytes`.
    """
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if column not in paths:
        return None
    index = paths.index(column)
    schema = metadata.schema.column(index)
    if schema.physical_type != "BYTE_ARRAY" or schema.max_repetition_level:
        return None
    chunks = []
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group).column(index)
        if found.compression != "UNCOMPRESSED" or found.has_dictionary_page:
            return None
        chunks.append(
            Chunk(
                found.data_page_offset, found.total_compressed_size, found.num_values, schema.max_definition_level
            )
        )  # fmt: skip
    return chunks


def value_spans(data: bytes, chunk: Chunk) -> np.ndarray:
    """Where each value of a chunk lies: int64 `[n_values, 2]` of its start in the file and its size, both in bytes.

    Args:
        data: The chunk's bytes, all of them.

    Raises:
        DamagedPageError: A page does not agree with its checksum, or the chunk is cut short.
        NotPlainError: A value is null, or a page is stored in another way.
    """
    if len(data) != chunk.size:
        raise DamagedPageError(f"{len(data)} of {chunk.size} bytes are there")
    view = memoryview(data)
    spans = np.empty((chunk.n_values, 2), dtype=np.int64)
    place = done = 0
    try:
        while done < chunk.n_values:
            header, place = _read_struct(data, place)
            size, page = header[3], header.get(5, {})
            if header.get(1) != _DATA_PAGE or page.get(2) != _PLAIN:
                raise NotPlainError(f"a page of type {header.get(1)}, encoding {page.get(2)}")
            body = view[place : place + size]
            if len(body) != size:
                raise DamagedPageError("a page is cut short")
            if 4 in header and zlib.crc32(body) != header[4] & 0xFFFFFFFF:
                raise DamagedPageError("a page does not agree with its checksum")
            n = page[1]
            _values_of_page(data, place, size, n, chunk, spans[done : done + n])
            place += size
            done += n
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise DamagedPageError(f"a page header cannot be read ({type(error).__name__})") from None
    return spans


def _values_of_page(data: bytes, start: int, size: int, n: int, chunk: Chunk, spans: np.ndarray) -> None:
    end, place = start + size, start
    if chunk.max_level:
        length = int.from_bytes(data[place : place + 4], "little")
        _all_present(data[place + 4 : place + 4 + length], n, chunk.max_level)
        place += 4 + length
    for row in range(n):
        length = int.from_bytes(data[place : place + 4], "little")
        place += 4
        spans[row] = chunk.start + place, length
        place += length
    if len(spans) != n or place != end:
        raise DamagedPageError("the lengths of its values do not add up to a page")


def _all_present(levels: bytes, n: int, level: int) -> None:
    """Runs of one level only, and that of a value that is there. Bit-packed runs occur where values are missing."""
    place = seen = 0
    width = (level.bit_length() + 7) // 8
    while seen < n and place < len(levels):
        header, place = _varint(levels, place)
        if header & 1:
            # Writers also pack short runs of equal levels: unpack them.
            bits, groups = level.bit_length(), header >> 1
            packed = int.from_bytes(levels[place : place + groups * bits], "little")
            found = [packed >> (bits * i) & ((1 << bits) - 1) for i in range(min(groups * 8, n - seen))]
            if any(value != level for value in found):
                raise NotPlainError("a value is missing")
            place, seen = place + groups * bits, seen + groups * 8
        else:
            if int.from_bytes(levels[place : place + width], "little") != level:
                raise NotPlainError("a value is missing")
            place, seen = place + width, seen + (header >> 1)
    if seen < n:
        raise DamagedPageError("its levels end early")


def _read_struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol, as field number to value; strings and lists are passed over."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[place]) != 0:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            coded, place = _varint(data, place)
            number = _signed(coded)
        fields[number], place = _read_value(data, place, head & 15)
    return fields, place + 1


def _read_value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, place
    if kind == _STRUCT:
        return _read_struct(data, place)
    if kind == _BINARY:
        length, place = _varint(data, place)
        return None, place + length
    if kind == _DOUBLE:
        return None, place + 8
    if kind == _BYTE:
        return data[place], place + 1
    if kind in _LISTS or kind == _MAP:
        raise NotPlainError("a list in a page header")
    coded, place = _varint(data, place)
    return _signed(coded), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def _signed(coded: int) -> int:
    return (coded >> 1) ^ -(coded & 1)
