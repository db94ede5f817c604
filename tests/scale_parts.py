"""Ways to have shards computed that are no engine of ours: in any order, beside each other, or not to the end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from synthaug.scale import ShardDone, Tick


class Mapped:
    """Shards in an order of its own, on threads of its own; dies after `last` of them where that is given."""

    least_seconds, most_seconds = 0.0, 1.0

    def __init__(self, *, workers: int = 1, parts: int = 5, seed: int | None = None, last: int | None = None) -> None:
        self.workers, self.parts = workers, parts
        self._seed, self._last = seed, last
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, work: Any, shards: Sequence[Any], tick: Tick) -> Iterator[ShardDone]:
        shards = list(shards)
        if self._seed is not None:
            random.Random(self._seed).shuffle(shards)
        with ThreadPoolExecutor(self.workers) as pool:
            for number, future in enumerate([pool.submit(work, shard, _nobody) for shard in shards[: self._last]]):
                self.ranges.append((shards[number].first, shards[number].last))
                yield future.result()
        if self._last is not None:
            raise KeyboardInterrupt


def _nobody(number: int) -> None:
    pass
