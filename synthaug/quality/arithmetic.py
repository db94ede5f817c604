"""Small helps for arithmetic with torch: a fixed thread count, pieces that fit in memory, exact nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

import synthaug

_CHUNK_BYTES = 32 * 2**20
_MOST_IMAGES = 512
_QUERY_TILE = 512
_REFERENCE_TILE = 4096


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block with this many torch threads, then restore the old number. It can change the last bit of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_threads(threads: int) -> None:
    """Set the number of torch threads of the Python thread that calls, until that ends."""
    # Asked for first: the first call of a thread would take the number that was set last in the process instead.
    torch.get_num_threads()
    torch.set_num_threads(threads)


def arithmetic() -> dict[str, str]:
    """What the last bit of a score can depend on: versions of synthaug and libraries, the processor's arithmetic."""
    import faiss

    return {
        "synthaug": synthaug.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "faiss": str(faiss.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def chunks(total: int, shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that cover 0..total; as float32, a chunk of arrays of this shape stays near 32 MiB."""
    step = int(np.clip(_CHUNK_BYTES // (4 * int(np.prod(shape, dtype=np.int64))), 1, _MOST_IMAGES))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def nearest(
    queries: np.ndarray,
    references: np.ndarray,
    k: int,
    *,
    exclude_self: bool = False,
    tick: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each query, by brute force in tiles: exact, and in bounded memory.

    Args:
        queries: [m, d] float32; may be memory-mapped.
        references: [n, d] float32; may be memory-mapped.
        k: At most n (n - 1 with `exclude_self`).
        exclude_self: `queries` are the `references`; none is its own neighbour.
        tick: Called with the number of queries just finished.

    Returns:
        Euclidean distances [m, k] float32, ascending, and the rows of `references` [m, k] int64.

    Raises:
        ValueError: k is more than there are references.
    """
    available = len(references) - (1 if exclude_self else 0)
    if not 1 <= k <= available:
        raise ValueError(f"{k} nearest neighbours were asked for among {available} references.")
    distances = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), _QUERY_TILE):
        stop = min(start + _QUERY_TILE, len(queries))
        query = torch.from_numpy(np.array(queries[start:stop], dtype=np.float32))
        found = _nearest_of_tile(query, references, k, start if exclude_self else None)
        # |q|² + |r|² - 2qr cancels badly for near-copies, which are the point: the few found are measured again.
        picked = torch.from_numpy(np.asarray(references[found.numpy().ravel()], dtype=np.float32))
        exact = (query[:, None] - picked.view(*found.shape, -1)).pow_(2).sum(2).sqrt_()
        exact, order = exact.sort(dim=1, stable=True)
        distances[start:stop] = exact.numpy()
        rows[start:stop] = found.gather(1, order).numpy()
        if tick is not None:
            tick(stop - start)
    return distances, rows


def _nearest_of_tile(query: torch.Tensor, references: np.ndarray, k: int, self_from: int | None) -> torch.Tensor:
    best = torch.full((len(query), k), torch.inf)
    rows = torch.zeros((len(query), k), dtype=torch.int64)
    for start in range(0, len(references), _REFERENCE_TILE):
        reference = torch.from_numpy(np.array(references[start : start + _REFERENCE_TILE], dtype=np.float32))
        # |q|² is the same for all references of a query, so the order does not need it.
        squared = reference.pow(2).sum(1) - 2 * (query @ reference.T)
        if self_from is not None:
            own = torch.arange(self_from, self_from + len(query)) - start
            inside = (own >= 0) & (own < len(reference))
            squared[inside.nonzero()[:, 0], own[inside]] = torch.inf
        near, near_rows = squared.topk(min(k, len(reference)), dim=1, largest=False)
        best, order = torch.cat([best, near], 1).topk(k, dim=1, largest=False)
        rows = torch.cat([rows, near_rows + start], 1).gather(1, order)
    return rows
