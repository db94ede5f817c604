"""Is a picture a copy? Exact hashes, and a search for the real image that explains it best.

For each picture a shortlist is drawn by a short code, in which a small move of a picture changes little and another
picture much (Fisher's linear discriminant: every real image is a class, its small moves are the members). The
shortlist is then compared by `synthaug.quality.alignment`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from synthaug.formats.atomic import whole_file
from synthaug.quality.alignment import Canvas, best_shift, blur, to_floats, unexplained
from synthaug.quality.arithmetic import own_threads, torch_threads

_CODE_LENGTH = 40
# Of a picture, in all its flips, so many candidates are shifted over it ...
_SHORTLIST = 20
# ... and so many of them laid over it in earnest: the first by code, then the best by correlation. A turned copy
# correlates badly and codes well, a copy with a black corner the other way round.
_FIRST_BY_CODE, _COMPARED = 4, 6
_FIT_IMAGES, _FIT_MOVES = 1000, 24
_TILE = 256
# Queries that a thread takes at a time, and so many of them are compared at once.
_PART, _BLOCK = 64, 16
# More codes are searched by cells: at 100,000 the exact search took two thirds of the time.
_MOST_EXACT, _LEAST_CELLS = 20_000, 16
_DUPLICATE_TILE = 1024


class Matches(NamedTuple):
    """For each query, of the references it was compared with: how near the nearest is, alone and against others."""

    distance: np.ndarray  # [m] float32, 0..1, see `alignment.unexplained`; 1 where there is no reference
    ratio: np.ndarray  # [m] float32, 0..1; 1 where there is no second reference
    contrast: np.ndarray  # [m] float32, 0..1: nearest over farthest compared; 1 where there is no second reference
    row: np.ndarray  # [m] int64; -1 where there is no reference


class Projection(NamedTuple):
    """From a window of a canvas to its code."""

    mean: np.ndarray  # [pixels] float32
    axes: np.ndarray  # [pixels, code length] float32

    def save(self, path: Path) -> None:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate([self.mean[:, None], self.axes], 1))

    @staticmethod
    def load(path: Path) -> Projection:
        both: np.ndarray = np.load(path)
        return Projection(both[:, 0].copy(), both[:, 1:].copy())


def picture_hash(image: np.ndarray) -> str:
    """Hash of an image's values [size, size, channels], the same for its mirror images (left-right, upside down)."""
    views = (image, image[:, ::-1], image[::-1], image[::-1, ::-1])
    return min(hashlib.blake2b(np.ascontiguousarray(view).tobytes(), digest_size=16).hexdigest() for view in views)


def fit_projection(pictures: np.ndarray, canvas: Canvas, seed: int) -> Projection:
    """Find the axes that tell pictures apart by what small moves do not change.

    Args:
        pictures: [n, side, side] uint16, n at least 1; a thousand of them, drawn by `seed`, are used.
    """
    random = np.random.default_rng(seed)
    some = np.sort(random.permutation(len(pictures))[:_FIT_IMAGES])
    values = to_floats(np.asarray(pictures[some]))
    still = _window(values, canvas, 0, 0)
    mean = still.mean(0)
    within = torch.zeros(still.shape[1], still.shape[1])
    for _ in range(_FIT_MOVES):
        moved = _moved(values, canvas, random)
        change = _window(moved, canvas, 0, 0) - still
        within += change.T @ change / (len(values) * _FIT_MOVES)
    within += torch.eye(len(within)) * (1e-2 * within.trace() / len(within))
    between = (still - mean).T @ (still - mean) / len(still)
    # The generalised eigenproblem between·v = λ·within·v, through the Cholesky factor of `within`.
    root = torch.linalg.cholesky(within.double())
    half = torch.linalg.solve_triangular(root, between.double(), upper=False)
    white = torch.linalg.solve_triangular(root, half.T, upper=False)
    _, vectors = torch.linalg.eigh((white + white.T) / 2)
    length = min(_CODE_LENGTH, vectors.shape[1])
    axes = torch.linalg.solve_triangular(root.T, vectors[:, -length:], upper=True)
    return Projection(mean.numpy(), axes.float().numpy())


def _moved(pictures: torch.Tensor, canvas: Canvas, random: np.random.Generator) -> torch.Tensor:
    """All pictures turned, scaled and shifted alike, by less than half a step of the views; sometimes noisy too."""
    angle, scale = math.radians(random.uniform(-8, 8)), random.uniform(0.9, 1.14)
    reach = 0.75 * canvas.margin * 2 / canvas.side
    theta = torch.tensor(
        [
            [math.cos(angle) / scale, -math.sin(angle) / scale, random.uniform(-reach, reach)],
            [math.sin(angle) / scale, math.cos(angle) / scale, random.uniform(-reach, reach)],
        ],
        dtype=torch.float32,
    )
    shape = [len(pictures), 1, canvas.side, canvas.side]
    grid = functional.affine_grid(theta.expand(len(pictures), 2, 3), shape, align_corners=False)
    moved = functional.grid_sample(pictures[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    if random.random() < 1 / 3:
        moved = moved + torch.from_numpy(random.normal(0, 0.02, moved.shape).astype(np.float32))
    return moved


def _window(pictures: torch.Tensor, canvas: Canvas, down: int, right: int) -> torch.Tensor:
    """[n, pixels]: the window at that shift, blurred, without its mean, of length 1."""
    margin, width = canvas.margin, canvas.window
    cut = pictures[:, margin + down : margin + down + width, margin + right : margin + right + width]
    flat = blur(cut, canvas.sigma).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(0.02 * math.sqrt(flat.shape[1]))


def encode(pictures: np.ndarray, projection: Projection, canvas: Canvas) -> np.ndarray:
    """Codes [n, code length] float32 of canvases [n, side, side]."""
    codes = np.empty((len(pictures), projection.axes.shape[1]), dtype=np.float32)
    for start in range(0, len(pictures), _TILE):
        values = to_floats(np.asarray(pictures[start : start + _TILE]))
        codes[start : start + _TILE] = _codes(values, projection, canvas, 0, 0).numpy()
    return codes


def _codes(pictures: torch.Tensor, projection: Projection, canvas: Canvas, down: int, right: int) -> torch.Tensor:
    window = _window(pictures, canvas, down, right) - torch.from_numpy(projection.mean)
    return window @ torch.from_numpy(projection.axes)


def _flips(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (pictures, pictures.flip(2), pictures.flip(1), pictures.flip((1, 2)))


def _views(canvas: Canvas) -> list[tuple[int, int]]:
    """Shifts at which a query is coded; what lies between them, the code forgives."""
    if canvas.margin == 1:
        return [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return [(0, 0), *((step * down, step * right) for step in (1, 2) for down in (-1, 1) for right in (-1, 1))]


class CopySearch:
    """Real images to look for copies of.

    Args:
        pictures: [n, side, side] uint16 by `alignment.shrink`; may be memory-mapped.
        codes: [n, code length] by `encode`.
        threads: Queries are looked at by so many at a time.
    """

    def __init__(
        self, pictures: np.ndarray, codes: np.ndarray, projection: Projection, canvas: Canvas, threads: int = 1
    ) -> None:
        self._pictures, self._projection, self._canvas, self._threads = pictures, projection, canvas, threads
        self._index = _CodeIndex(codes.shape[1])
        self._index.add(np.ascontiguousarray(codes, dtype=np.float32))

    def find(self, queries: np.ndarray, tick: Callable[[int], object] | None = None) -> Matches:
        """The nearest reference of each query, in any flip.

        The second nearest, for the ratio, and the farthest, for the contrast, are those of the few that are compared.

        Args:
            queries: [m, side, side] uint16.
            tick: Called with the number of queries just finished.
        """
        distance, ratio, contrast = np.ones((3, len(queries)), np.float32)
        found = Matches(distance, ratio, contrast, np.full(len(queries), -1, np.int64))
        if self._index.count == 0:
            return found

        def look(part: slice) -> None:
            some = to_floats(np.asarray(queries[part]))
            keys = self._shortlist(some)
            for first in range(0, len(some), _BLOCK):
                block = _compare(
                    some[first : first + _BLOCK], self._pictures, keys[first : first + _BLOCK], self._canvas
                )
                for whole, piece in zip(found, block, strict=True):
                    whole[part][first : first + _BLOCK] = piece
            if tick is not None:
                tick(len(some))

        _side_by_side(look, [slice(i, i + _PART) for i in range(0, len(queries), _PART)], self._threads)
        return found

    def neighbours(self, tick: Callable[[int], object] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each of the real images, the others that explain it best.

        Returns:
            Distances [n, c] float32 (1 where there are fewer others), their rows [n, c] int64, and each distance over
            the farthest [n, c].
        """
        n = len(self._pictures)
        distances, rows = np.ones((n, _COMPARED), np.float32), np.zeros((n, _COMPARED), np.int64)
        contrast = np.ones((n, _COMPARED), np.float32)

        def look(part: slice) -> None:
            some = to_floats(np.asarray(self._pictures[part]))
            keys = self._shortlist(some)
            other = keys // 4 != np.arange(part.start, part.start + len(some))[:, None]
            for first in range(0, len(some), _BLOCK):
                block = slice(first, first + _BLOCK)
                found, at = _lay(some[block], self._pictures, keys[block], self._canvas, valid=other[block])
                here = slice(part.start + first, part.start + first + len(found))
                distances[here, : found.shape[1]], rows[here, : found.shape[1]] = found.numpy(), at.numpy()
                contrast[here, : found.shape[1]] = _contrast(found, at).numpy()
            if tick is not None:
                tick(len(some))

        _side_by_side(look, [slice(i, min(i + _PART, n)) for i in range(0, n, _PART)], self._threads)
        return distances, rows, contrast

    def _shortlist(self, queries: torch.Tensor) -> np.ndarray:
        """[m, at most _SHORTLIST] int64: 4 · row + flip of the candidates, nearest code first."""
        n = self._index.count
        if 4 * n <= _SHORTLIST:
            return np.tile(np.arange(4 * n), (len(queries), 1))
        views = [
            _codes(flip, self._projection, self._canvas, down, right)
            for flip in _flips(queries)
            for down, right in _views(self._canvas)
        ]
        codes = torch.stack(views, 1).flatten(0, 1).contiguous().numpy()
        distances, rows = self._index.search(codes, min(_SHORTLIST, n))
        per_flip = len(_views(self._canvas)) * rows.shape[1]
        flips = np.repeat(np.arange(4), per_flip)
        distances, rows = distances.reshape(len(queries), -1), rows.reshape(len(queries), -1)
        return _first_of_each(4 * rows + flips, distances, _SHORTLIST)


def _side_by_side(work: Callable[[slice], None], parts: Sequence[slice], threads: int) -> None:
    """Do parts at the same time, each with arithmetic on one thread.

    The arrays of a part are small: shared among threads, most of the time would go into waiting for each other.
    """
    # Each thread has a number of its own, and takes at its first call whichever was set last, by whomever.
    with torch_threads(1), ThreadPoolExecutor(threads, initializer=own_threads, initargs=(1,)) as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()


class _CodeIndex:
    """Nearest codes: exact up to `_MOST_EXACT` of them, then in the cells around a query alone.

    The cells (an inverted file, faiss) are made from the codes that are there when their number first is larger, so
    what is added later changes nothing that was found before.
    """

    def __init__(self, length: int) -> None:
        import faiss

        self._index: Any = faiss.IndexFlatL2(length)
        self._cells = 0

    @property
    def count(self) -> int:
        return int(self._index.ntotal)

    def add(self, codes: np.ndarray) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self._index.add(codes)
        if self._cells or self.count <= _MOST_EXACT:
            return
        held = self._index.reconstruct_n(0, self.count)
        self._cells = round(math.sqrt(self.count))
        quantizer = faiss.IndexFlatL2(held.shape[1])
        index = faiss.IndexIVFFlat(quantizer, held.shape[1], self._cells)
        index.own_fields = False
        self._quantizer = quantizer  # Kept alive: the index holds no reference that Python sees.
        index.cp.min_points_per_centroid = 1
        index.train(held)
        index.add(held)
        index.nprobe = max(_LEAST_CELLS, self._cells // 16)
        self._index = index

    def search(self, codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances [m, k], infinite where the cells held fewer, and rows [m, k] (then 0)."""
        import faiss

        # Each thread has its own setting.
        faiss.omp_set_num_threads(1)
        distances, rows = self._index.search(codes, k)
        return np.where(rows < 0, np.inf, distances), np.maximum(rows, 0)


def _first_of_each(keys: np.ndarray, distances: np.ndarray, number: int) -> np.ndarray:
    """Per line the `number` different keys of the smallest distances, smallest first.

    Where there are fewer, some come twice.
    """
    order = np.argsort(distances, axis=1, kind="stable")
    keys, distances = np.take_along_axis(keys, order, 1), np.take_along_axis(distances, order, 1)
    by_key = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, by_key, 1)
    again = np.concatenate([np.zeros((len(keys), 1), bool), ordered[:, 1:] == ordered[:, :-1]], 1)
    repeated = np.zeros_like(again)
    np.put_along_axis(repeated, by_key, again, 1)
    best = np.argsort(np.where(repeated, np.inf, distances), axis=1, kind="stable")[:, :number]
    return np.take_along_axis(keys, best, 1)


def _compare(queries: torch.Tensor, pictures: np.ndarray, keys: np.ndarray, canvas: Canvas) -> Matches:
    """The nearest of the candidates (4 · row + flip) [m, k] of each query [m, side, side]."""
    distance, row = _lay(queries, pictures, keys, canvas)
    nearest, place = distance.min(1)
    best = row.gather(1, place[:, None])
    second = torch.where(row == best, torch.inf, distance).amin(1)
    ratio = torch.where(torch.isfinite(second) & (second > 0), nearest / second, torch.ones(()))
    contrast = _contrast(distance, row).amin(1)
    return Matches(nearest.numpy(), ratio.clamp(0, 1).numpy(), contrast.numpy(), best[:, 0].numpy())


def _contrast(distance: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[m, c]: each distance over that of the farthest other row; 1 where no other row was compared."""
    best = row.gather(1, distance.argmin(1)[:, None])
    farthest = torch.where(row == best, -torch.inf, distance).amax(1, keepdim=True)
    return torch.where(farthest > 0, distance / farthest, torch.ones(())).clamp(0, 1)


def _lay(
    queries: torch.Tensor, pictures: np.ndarray, keys: np.ndarray, canvas: Canvas, valid: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance [m, c] and row [m, c] of the most likely candidates; those that are not `valid` have distance 1."""
    m, k = keys.shape
    rows, flips = torch.from_numpy(keys // 4), torch.from_numpy(keys % 4)
    turned = torch.stack(_flips(queries), 1)
    query = turned[torch.arange(m)[:, None], flips].flatten(0, 1)
    reference = to_floats(np.asarray(pictures[rows.flatten().numpy()]))
    correlation, shift = best_shift(query, reference, canvas)
    correlation = correlation.view(m, k)
    correlation[:, :_FIRST_BY_CODE] += 2
    if valid is not None:
        correlation[torch.from_numpy(~valid)] = -torch.inf
    picked = correlation.topk(min(_COMPARED, k), 1).indices
    flat = (picked + torch.arange(m)[:, None] * k).flatten()
    distance = unexplained(query[flat], reference[flat], shift[flat], canvas).view(m, -1)
    if valid is not None:
        distance[~torch.from_numpy(valid).gather(1, picked)] = 1.0
    return distance, rows.gather(1, picked)


def near_duplicates(
    pictures: np.ndarray, rows: Sequence[int] | np.ndarray, projection: Projection, canvas: Canvas, threshold: float,
    threads: int = 1, tick: Callable[[int], object] | None = None,
) -> np.ndarray:  # fmt: skip
    """Mark every row whose picture lies nearer than `threshold` to that of an earlier row.

    Rows are taken in the order given, so that what comes later never changes what was said of earlier rows.

    Args:
        pictures: [n, side, side] uint16; may be memory-mapped.
        rows: [m] rows of `pictures`.

    Returns:
        [m] bool.
    """
    marked: np.ndarray = nearest_earlier(pictures, rows, projection, canvas, threads, tick)[0].min(1) < threshold
    return marked


def nearest_earlier(
    pictures: np.ndarray, rows: Sequence[int] | np.ndarray, projection: Projection, canvas: Canvas, threads: int = 1,
    tick: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """For each row, the rows before it that explain its picture best.

    Args:
        pictures: [n, side, side] uint16; may be memory-mapped.
        rows: [m] rows of `pictures`, in the order that says what is earlier.

    Returns:
        Distances [m, c] float32 (1 where there are fewer before it), and which rows of `pictures` [m, c] int64.
    """
    rows = np.asarray(rows, dtype=np.int64)
    distances = np.ones((len(rows), _COMPARED), dtype=np.float32)
    which = np.zeros((len(rows), _COMPARED), dtype=np.int64)
    index = _CodeIndex(projection.axes.shape[1])
    for start in range(0, len(rows), _DUPLICATE_TILE):
        members = rows[start : start + _DUPLICATE_TILE]
        cut = np.asarray(pictures[members])
        own, tile = encode(cut, projection, canvas), to_floats(cut)

        def look(part: slice, own: np.ndarray = own, tile: torch.Tensor = tile, start: int = start) -> None:
            some = tile[part]
            keys = _earlier(index, own[: part.start + len(some)], some, projection, canvas)
            for first in range(0, len(some), _BLOCK):
                block = keys[first : first + _BLOCK]
                found, at = _lay(
                    some[first : first + _BLOCK],
                    pictures,
                    np.where(block < 0, 0, 4 * rows[block // 4] + block % 4),
                    canvas,
                    valid=block >= 0,
                )
                here = slice(start + part.start + first, start + part.start + first + len(block))
                distances[here, : found.shape[1]], which[here, : found.shape[1]] = found.numpy(), at.numpy()

        _side_by_side(look, [slice(i, i + _PART) for i in range(0, len(members), _PART)], threads)
        index.add(own)
        if tick is not None:
            tick(len(members))
    return distances, which


def _earlier(
    index: _CodeIndex, own: np.ndarray, some: torch.Tensor, projection: Projection, canvas: Canvas
) -> np.ndarray:
    """What comes before each of some pictures and has the nearest codes: in the index, or in its own tile.

    Args:
        own: Codes of the tile as far as these pictures, which are its last.
        some: [t, side, side].

    Returns:
        [t, k] 4 · place + flip; -1 where there is none.
    """
    keys, distances = [], []
    for flip, flipped in enumerate(_flips(some)):
        for down, right in _views(canvas):
            codes = _codes(flipped, projection, canvas, down, right).contiguous()
            squared = torch.cdist(codes, torch.from_numpy(own)) ** 2
            squared[torch.ones_like(squared, dtype=torch.bool).triu(len(own) - len(some))] = torch.inf
            near, places = squared.topk(min(_SHORTLIST, len(own)), 1, largest=False)
            keys.append(np.where(torch.isfinite(near), 4 * (places + index.count) + flip, -1))
            distances.append(near.numpy())
            if index.count:
                before, rows = index.search(codes.numpy(), min(_SHORTLIST, index.count))
                keys.append(4 * rows + flip)
                distances.append(before)
    key, distance = np.concatenate(keys, 1), np.concatenate(distances, 1)
    return _first_of_each(key, distance, min(_SHORTLIST, key.shape[1]))
