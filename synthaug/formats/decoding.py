"""Rows in, decoded squares out: in order, on a few threads, with little in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from synthaug.config import ImageConfig
from synthaug.digest import digest_array
from synthaug.errors import DatasetError
from synthaug.formats.pixels import (
    Colour,
    Rejected,
    decode_picture,
    largest_file,
    picture_from_array,
    to_colour,
    to_square,
)
from synthaug.formats.source_labels import Labels
from synthaug.formats.source_rows import Row, Rows

_CHUNK_ROWS, _CHUNK_BYTES = 32, 1 << 23
_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Image:
    """A row whose picture has been decoded and brought to the square."""

    row: Row
    pixels: np.ndarray  # [size, size, channels]
    form: str
    colour: Colour
    content_hash: str
    conversions: tuple[str, ...]
    fitted: frozenset[str]
    height: int
    width: int


@dataclass(frozen=True)
class SetAside:
    origin: str
    reason: str
    detail: str


def decode_rows(rows: Rows, labels: Labels, image: ImageConfig) -> Generator[Image | SetAside]:
    """All rows decoded, in their order, a few ahead on other threads (decoders let go of Python's lock).

    To be run inside `pillow_limits`. What is wrong with a single row makes it a `SetAside`.

    Raises:
        DatasetError: The source is damaged as a whole, or its labels cannot be made sense of.
    """
    whole_numbers = _whole_numbers(rows) if rows.wide_numbers else None

    def work(chunk: list[Row]) -> list[Image | SetAside]:
        return [_prepare(row, image, whole_numbers) for row in chunk]

    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
    pending: deque[Future[list[Image | SetAside]]] = deque()
    try:
        for chunk in _chunks(_checked(rows.open(), labels)):
            pending.append(pool.submit(work, chunk))
            if len(pending) > 2 * _WORKERS:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _without_equal_channels(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] with three equal channels as [h, w, 1]: grey stored as RGB is the same picture as grey."""
    if pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., :1]
    return pixels


def _prepare(row: Row, image: ImageConfig, whole_numbers: str | None) -> Image | SetAside:
    """Decode one row; never raises for what is wrong with it."""
    try:
        if row.problem is not None:
            raise Rejected(*row.problem)
        if isinstance(row.content, np.ndarray):
            if row.content.shape[0] * row.content.shape[min(1, row.content.ndim - 1)] > image.max_pixels:
                raise Rejected("too large", f"{list(row.content.shape)}; image.max_pixels is {image.max_pixels}")
            native = picture_from_array(row.content, whole_numbers)
        elif callable(row.content):
            native = row.content(image.max_pixels)
        else:
            native = decode_picture(_bytes_of(row.content, image.max_pixels), image.max_pixels)
        # The identity of an image is that of its own pixels: settings of colour and size do not change it.
        content_hash = digest_array(_without_equal_channels(native.pixels))
        picture = to_colour(native, image.colour)
        height, width = picture.pixels.shape[:2]
        pixels, fitted = to_square(picture.pixels, image.size, image.fit)
        conversions = picture.conversions
        if image.value_range is not None and pixels.dtype == np.float32:
            low, high = image.value_range
            clipped = np.clip(pixels, np.float32(low), np.float32(high))
            if not np.array_equal(clipped, pixels):
                pixels, conversions = clipped, (*conversions, "values outside image.value_range clipped")
        return Image(
            replace(row, content=None), pixels, picture.form, picture.colour, content_hash, conversions, fitted,
            height, width,
        )  # fmt: skip
    except Rejected as problem:
        return SetAside(row.origin, problem.reason, problem.detail)


def _bytes_of(content: bytes | Path | None, max_pixels: int) -> bytes:
    if content is None:
        raise Rejected("no picture", "the row has none")
    if isinstance(content, bytes):
        return content
    try:
        size = content.stat().st_size
        if size > largest_file(max_pixels):
            raise Rejected("too large", f"{size} bytes; image.max_pixels is {max_pixels}")
        return content.read_bytes()
    except OSError as error:
        raise Rejected("cannot be read", str(error.strerror or error)) from None


def _checked(rows: Iterable[Row], labels: Labels) -> Iterator[Row]:
    """Rows with their labels in plain form; those that cannot be used carry the problem."""
    for row in rows:
        if row.problem is not None:
            yield row
            continue
        label, problem = labels.check(row.label)
        yield replace(row, label=label, problem=problem)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of few, and of few bytes, so that what waits for a decoder stays small."""
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row.content, bytes):
            size += len(row.content)
        elif isinstance(row.content, np.ndarray):
            size += row.content.nbytes
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _whole_numbers(rows: Rows) -> str:
    """The dtype that holds all whole numbers of the source's pictures.

    Int64 tells nothing of a picture's depth, and one image tells nothing of the others: a dark 16-bit one fits
    in 8 bits. So all are looked at first.
    """
    low, high = 0, 0
    for row in rows.open():
        if isinstance(row.content, np.ndarray) and row.content.size:
            low, high = min(low, int(row.content.min())), max(high, int(row.content.max()))
    if low >= 0 and high <= 65535:
        return "uint8" if high <= 255 else "uint16"
    if max(-low, high) <= 1 << 24:  # the whole numbers that float32 holds exactly
        return "float32"
    raise DatasetError(
        f"the pictures are whole numbers from {low} to {high}, more than 16 bits or a float32 hold. Rescale them first."
    )
