"""A release as a stream: for training loops over iterables, and for releases that are not downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from synthaug.errors import LoaderError
from synthaug.loaders.dataset import SAME, Output, ReleaseDataset, _or, _Same
from synthaug.loaders.loader import _place
from synthaug.loaders.mixing import Draw, Mix, Schedule, check_ratio, check_schedule, number, sample_seed
from synthaug.loaders.rows import decode_any
from synthaug.loaders.transforms import Given, Step, generators_kept
from synthaug.text import printable

# Images that lie beside each other are read together; order is mixed among and within windows of so many blocks.
_BLOCK, _WINDOW = 512, 16
_READ_AHEAD = 64
_COLUMNS = ("image", "label", "is_synthetic", "sample_id", "source_id")


class ReleaseStream(IterableDataset[Any]):
    """A split of a release as an iterable dataset, real and synthetic images mixed.

    Of a release on disk it is the mix of `ReleaseDataset` in an order that reads neighbours together: blocks of 512
    images in an order seeded by (seed, epoch), and all images of 16 such blocks in an order of their own. Of what
    `load_dataset(..., streaming=True)` gives it is one pass through the rows, with a buffer of `buffer` of them out of
    which rows are drawn; a release stores the real images first, so let the buffer hold most of the synthetic ones.

    Every process of a distributed training and every worker walks the same order and reads only its own part; no image
    is handed out twice. Batches of `batch_size` go to the workers in turn: given that of the `DataLoader`, batches are
    the same for any number of workers (the last round may differ in order). Where processes do not come out even, the
    images that are left over are left out (of a stream without a length they are handed out: lengths then differ by
    up to one).

    Call `set_epoch` before each epoch; workers that live on hear of it too. `state_dict` and `load_state_dict` are
    those of torchdata's StatefulDataLoader, which keeps one for each worker; passing over rows reads none on disk.

    Args:
        release: Directory of a release, or a split of what `load_dataset(..., streaming=True)` gives of one.
        batch_size: Of the `DataLoader` that reads it, for several workers.
        buffer: Rows to draw from, of a streamed release.
        shuffle: False: in stored order.
        settings: Of a release on disk: those of `ReleaseDataset` but for sampling. Of a streamed one: synthetic_ratio,
            transform, synthetic_transform, transform_input, schedule, synthetic_weight, output, seed.

    Raises:
        LoaderError, VerificationError: As `ReleaseDataset`.
    """

    def __init__(
        self,
        release: Any,
        *,
        batch_size: int = 1,
        buffer: int = 10_000,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        **settings: Any,
    ) -> None:
        import torch

        for name, value in (("batch_size", batch_size), ("buffer", buffer)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LoaderError(f"{name} is {value!r:.60}; it is a whole number of at least 1.")
        self._batch_size, self._buffer, self._shuffle = batch_size, buffer, shuffle
        self.rank, self.world_size = _place(rank, world_size)
        if isinstance(release, dict):
            split = settings.pop("split", "train")
            if split not in release:
                raise LoaderError(f"the release has no split {split!r}; it has {printable(', '.join(release))}.")
            release = release[split]
        self._source: _Local | _Remote
        if hasattr(release, "features") and not hasattr(release, "__len__"):
            self._source = _Remote(release, buffer, **settings)
        else:
            if settings.get("sampling") == "balanced":
                raise LoaderError("a stream passes through its images once: balanced sampling is for balanced_loader.")
            self._source = _Local(ReleaseDataset(release, **settings))
        # Shared, so that workers that live on see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._done = 0
        self._start = 0

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return self._source.classes

    def set_epoch(self, epoch: int) -> None:
        """Go through this epoch next."""
        if epoch < 0:
            raise LoaderError(f"epoch is {epoch}; epochs begin with 0.")
        self._epoch.fill_(int(epoch))

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and how many images this worker has handed out of it."""
        return {"epoch": int(self._epoch), "images": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after as many images."""
        try:
            epoch, images = int(state["epoch"]), int(state["images"])
        except (KeyError, TypeError, ValueError):
            raise LoaderError("this is not what state_dict() of a ReleaseStream gave.") from None
        self.set_epoch(epoch)
        self._start = images

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number_of, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start, self._start = self._start, 0
        self._done = 0
        seen = -1
        for seen_by_process, key in enumerate(self._own_keys()):
            if seen_by_process // self._batch_size % n_workers != number_of:
                continue
            seen += 1
            if seen < start:
                self._done = seen + 1
                continue
            item = self._source.item(key)
            self._done = seen + 1
            yield item

    def _own_keys(self) -> Iterator[Any]:
        keys = self._source.keys(int(self._epoch), shuffle=self._shuffle)
        length = self._source.length(int(self._epoch))
        end = None if length is None else length // self.world_size * self.world_size
        for place, key in enumerate(keys):
            if end is not None and place >= end:
                return
            if place % self.world_size == self.rank:
                yield key


class _Local:
    """A release on disk: an order of draws."""

    def __init__(self, dataset: ReleaseDataset) -> None:
        self.dataset = dataset
        self.classes = dataset.classes

    def length(self, epoch: int) -> int | None:
        return int(self.dataset.mix.n_real.sum() + self.dataset.mix.dose(epoch).sum())

    def keys(self, epoch: int, *, shuffle: bool) -> Iterator[Draw]:
        members = self.dataset.mix.members(epoch)
        if not shuffle:
            for index in members.tolist():
                yield Draw(index, epoch, 0)
            return
        random = np.random.default_rng([self.dataset.mix.seed, epoch, 0x57E4])
        blocks = random.permutation(-(-len(members) // _BLOCK))
        for first in range(0, len(blocks), _WINDOW):
            window = np.concatenate(
                [members[block * _BLOCK : (block + 1) * _BLOCK] for block in blocks[first : first + _WINDOW]]
            )
            for index in random.permutation(window).tolist():
                yield Draw(index, epoch, 0)

    def item(self, draw: Draw) -> Any:
        return self.dataset[draw]


class _Remote:
    """What `datasets` streams: rows in stored order, none of them decoded before it is kept."""

    def __init__(
        self,
        table: Any,
        buffer: int,
        *,
        synthetic_ratio: float | Mapping[str, float] | None = None,
        transform: Any = None,
        synthetic_transform: Any = SAME,
        transform_input: Given = "auto",
        schedule: Schedule | None = None,
        synthetic_weight: float | None = None,
        output: Output = "pair",
        seed: int = 0,
    ) -> None:
        import datasets

        features = table.features or {}
        if missing := [name for name in _COLUMNS if name not in features]:
            raise LoaderError(f"the stream has no column {missing[0]}: it is not a release of synthaug.")
        self.classes = list(features["label"].names)
        self._png = isinstance(features["image"], datasets.Image)
        self._dtype = None if self._png else np.dtype(features["image"].dtype)
        self._table = table.cast_column("image", datasets.Image(decode=False)) if self._png else table
        self._buffer, self._seed, self._output = buffer, seed, output
        self._ratios = check_ratio(_or(synthetic_ratio, 1.0), self.classes)
        self._schedule = check_schedule(schedule)
        self._weight = np.float32(number(_or(synthetic_weight, 1.0), "synthetic_weight"))
        if output not in ("pair", "dict"):
            raise LoaderError(f"output is {output!r}; it is 'pair' or 'dict'.")
        if self._weight != 1 and output == "pair":
            raise LoaderError("samples have weights in the loss here: take output='dict', whose items have 'weight'.")
        other = transform if isinstance(synthetic_transform, _Same) else synthetic_transform
        self._steps = (Step(transform, None, transform_input), Step(other, None, transform_input))
        first = next(iter(self.keys(0, shuffle=False)), None)
        if first is None:
            raise LoaderError("the stream has no rows.")
        self.item(first)

    def length(self, epoch: int) -> int | None:
        return None

    def keys(self, epoch: int, *, shuffle: bool) -> Iterator[tuple[Draw, dict[str, Any]]]:
        rows = self._kept(epoch)
        if not shuffle:
            yield from rows
            return
        random = np.random.default_rng([self._seed, epoch, 0x57E5])
        buffer: list[tuple[Draw, dict[str, Any]]] = []
        for row in rows:
            if len(buffer) < self._buffer:
                buffer.append(row)
                continue
            place = int(random.integers(self._buffer))
            buffer[place], row = row, buffer[place]
            yield row
        for place in random.permutation(len(buffer)).tolist():
            yield buffer[place]

    def _kept(self, epoch: int) -> Iterator[tuple[Draw, dict[str, Any]]]:
        real: list[int] = []
        ranks = np.zeros(len(self.classes), dtype=np.int64)
        dose: np.ndarray | None = None
        number_of = 0
        # Not `iter(table)`: in a worker that would give this worker some of the files only.
        for piece in self._table.iter(batch_size=_READ_AHEAD):
            for values in zip(*(piece[name] for name in _COLUMNS), strict=True):
                row = dict(zip(_COLUMNS, values, strict=True))
                draw = Draw(number_of, epoch, 0)
                number_of += 1
                if not row["is_synthetic"]:
                    if dose is not None:
                        raise LoaderError(
                            "a real image comes after synthetic ones: the stream was shuffled. Give it as it is "
                            "loaded; ReleaseStream shuffles."
                        )
                    real.append(row["label"])
                    yield draw, row
                    continue
                if dose is None:
                    everything = np.full(len(self.classes), 2**40)
                    labels = np.asarray(real, dtype=np.int64)
                    dose = Mix(tuple(self.classes), labels, everything, self._ratios, schedule=self._schedule).dose(
                        epoch
                    )
                rank, ranks[row["label"]] = ranks[row["label"]], ranks[row["label"]] + 1
                if rank < dose[row["label"]]:
                    yield draw, row

    def item(self, key: tuple[Draw, dict[str, Any]]) -> Any:
        draw, row = key
        synthetic, label = bool(row["is_synthetic"]), int(row["label"])
        value = row["image"]
        image = decode_any(value, f"the stream, row {draw.number}") if self._png else np.array(value, self._dtype)
        with generators_kept(self._steps):
            made = self._steps[synthetic](image, label, sample_seed(self._seed, draw))
        if self._output == "pair":
            return made, label
        return {
            "image": made,
            "label": label,
            "is_synthetic": synthetic,
            "weight": self._weight if synthetic else np.float32(1),
            "sample_id": row["sample_id"] if synthetic else row["source_id"],
        }
