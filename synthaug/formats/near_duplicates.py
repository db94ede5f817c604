"""Images that are nearly the same, among very many, in bounded memory and time.

The distance of two images is the root of their mean square difference, as a share of the value range. Means over
blocks can only bring images nearer (Jensen's inequality), so that a search among 64 block means misses no pair;
the pairs it finds are then measured on the images themselves. Of the near pairs only a minimum spanning forest is
kept: it connects the same images as all pairs do, at every smaller distance too, and has fewer edges than images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthaug.progress import progress
from synthaug.records import PixelSpec

logger = logging.getLogger(__name__)

_BLOCKS_A_SIDE = 8
_SEARCH_ROWS = 1024
_PIECE_BYTES = 1 << 25
# Multiplications before the distance is halved: some minutes. Only sets in which everything resembles everything
# come near; there are no clusters to be found in them.
_WORK = 2e12
# After that much more work it is halved again, and after so many halvings only exact copies count.
_MORE_WORK, _HALVINGS = 0.1, 6
# Room for rounding in float32 where squared distances come out of a matrix product.
_SLACK = 1e-6


@dataclass(frozen=True)
class Pairs:
    """Near pairs: positions `first[k] < second[k]` in the list of rows given, and how far apart they are."""

    first: np.ndarray  # int64
    second: np.ndarray  # int64
    distance: np.ndarray  # float64, at most `limit`
    limit: float  # images up to this distance are connected; lower than asked for where that took too long

    def closer_than(self, limit: float) -> Pairs:
        """The pairs that remain with a lower limit."""
        near = self.distance <= limit
        return Pairs(self.first[near], self.second[near], self.distance[near], limit)


def near_pairs(path: Path, rows: np.ndarray, spec: PixelSpec, limit: float) -> Pairs:
    """Connect all images that are not farther apart than `limit`.

    Args:
        path: images.npy, `[n, size, size, channels]`.
        rows: Which of them are compared.
        limit: Largest distance, as a share of the value range.

    Returns:
        A minimum spanning forest of the near pairs. `Pairs.limit` is lower than `limit` where too many images
        resembled each other for all of them to be measured.
    """
    nothing = np.empty(0, np.int64)
    found = Pairs(nothing, nothing, np.empty(0), limit)
    if limit <= 0 or len(rows) < 2:
        return found
    points = _block_means(path, rows, spec)
    order, key = _order_along_main_axis(points)
    points, values, work = points[order], spec.size * spec.size * spec.channels, 0.0
    with progress("looking for near-duplicates", len(rows), "images") as bar:
        for start in range(0, len(rows), _SEARCH_ROWS):
            # Points cannot be nearer than their places on one axis are.
            stop = min(start + _SEARCH_ROWS, len(rows)) - 1
            last = int(np.searchsorted(key, key[stop] + found.limit + np.sqrt(_SLACK), side="right"))
            for left in range(start, last, _SEARCH_ROWS):
                first, second = _candidates(points, start, left, found.limit)
                if len(first) == 0 or found.limit == 0:
                    continue
                work += float(len(np.unique(first))) * len(np.unique(second)) * values
                more = _measure(path, rows, spec, order[first], order[second], found.limit)
                found = _spanning_forest(_join(found, more), len(rows))
                if work > _WORK:
                    work -= _MORE_WORK * _WORK
                    lower = found.limit / 2 if found.limit > limit / 2**_HALVINGS else 0.0
                    found = found.closer_than(lower)
            bar.update(min(_SEARCH_ROWS, len(rows) - start))
    return found


def _block_means(path: Path, rows: np.ndarray, spec: PixelSpec) -> np.ndarray:
    """Means over blocks, `[rows, blocks]` float32, so weighted that plain distances are those of the images."""
    edges = np.unique(np.linspace(0, spec.size, _BLOCKS_A_SIDE + 1).astype(int))
    sides = np.diff(edges) / spec.size
    weights = np.sqrt(np.outer(sides, sides)).reshape(-1)
    areas = np.outer(np.diff(edges), np.diff(edges)) * spec.channels
    means = np.empty((len(rows), len(weights)), np.float32)
    for piece in _pieces(len(rows), spec):
        images = _load(path, rows[piece], spec).sum(axis=3)
        sums = np.add.reduceat(np.add.reduceat(images, edges[:-1], axis=1), edges[:-1], axis=2)
        means[piece] = (sums / areas).reshape(len(images), -1) * weights
    return means - means.mean(axis=0)


def _order_along_main_axis(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the points along the direction of their largest spread, and their places on it."""
    covariance = points.T.astype(np.float64) @ points / len(points)
    axis = np.linalg.eigh(covariance)[1][:, -1]
    place = points @ axis.astype(np.float32)
    order = np.argsort(place, kind="stable")
    return order, place[order]


def _candidates(points: np.ndarray, start: int, left: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs near in block means: one in the block of rows from `start`, one later and in that from `left`."""
    block, others = points[start : start + _SEARCH_ROWS], points[left : left + _SEARCH_ROWS]
    first, second = np.nonzero(_squared_distances(block, others) <= limit**2 + _SLACK)
    later = second + left > first + start
    return first[later] + start, second[later] + left


def _squared_distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances `[m, n]` of points `[m, d]` and `[n, d]`."""
    squares = np.einsum("ij,ij->i", some, some)[:, None] + np.einsum("ij,ij->i", others, others)
    return np.maximum(squares - 2 * (some @ others.T), 0)


def _measure(
    path: Path, rows: np.ndarray, spec: PixelSpec, first: np.ndarray, second: np.ndarray, limit: float
) -> Pairs:
    """Measure candidates on the images; those within the limit remain."""
    some, one = np.unique(first, return_inverse=True)
    others, other = np.unique(second, return_inverse=True)
    squared = np.zeros((len(some), len(others)), np.float64)
    # Bands of the images, so that large images need no more memory than small ones.
    band = max(1, _PIECE_BYTES // (4 * (len(some) + len(others)) * spec.size * spec.channels))
    for top in range(0, spec.size, band):
        part = slice(top, top + band)
        here = _load(path, rows[some], spec, part).reshape(len(some), -1)
        there = _load(path, rows[others], spec, part).reshape(len(others), -1)
        # Rounding is smallest about the middle of the points.
        centre = here.mean(axis=0)
        squared += _squared_distances(here - centre, there - centre)
    distance = np.sqrt(squared[one, other] / (spec.size * spec.size * spec.channels))
    return Pairs(np.minimum(first, second), np.maximum(first, second), distance, limit).closer_than(limit)


def _spanning_forest(pairs: Pairs, count: int) -> Pairs:
    """As few of the pairs as connect the same images at every distance, in order of distance."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    # The routine takes 0 for "no edge".
    weights = np.maximum(pairs.distance, np.finfo(float).tiny)
    tree = minimum_spanning_tree(coo_array((weights, (pairs.first, pairs.second)), shape=(count, count))).tocoo()
    first, second = (part.astype(np.int64) for part in tree.coords)
    order = np.lexsort((second, first, tree.data))
    return Pairs(first[order], second[order], tree.data[order], pairs.limit)


def _join(pairs: Pairs, more: Pairs) -> Pairs:
    return Pairs(
        np.concatenate([pairs.first, more.first]),
        np.concatenate([pairs.second, more.second]),
        np.concatenate([pairs.distance, more.distance]),
        pairs.limit,
    )


def _load(path: Path, rows: np.ndarray, spec: PixelSpec, band: slice = slice(None)) -> np.ndarray:
    """Images, or a band of their lines, as float32 shares of the value range.

    The file is opened anew each time: pages that are mapped count as memory of the process.
    """
    images = np.load(path, mmap_mode="r")[rows, band].astype(np.float32)
    return (images - np.float32(spec.low)) / np.float32(spec.high - spec.low)


def _pieces(count: int, spec: PixelSpec) -> Iterator[slice]:
    step = max(1, _PIECE_BYTES // (4 * spec.size * spec.size * spec.channels))
    for start in range(0, count, step):
        yield slice(start, start + step)
