"""The loader for a training loop: epochs that are drawn again alike, divided among processes, and gone on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from synthaug.digest import digest_json
from synthaug.errors import LoaderError
from synthaug.loaders.dataset import ReleaseDataset
from synthaug.loaders.mixing import Draw

_OURS = ("sampler", "batch_sampler", "generator", "dataset")


class MixSampler(Sampler[list[Draw]]):
    """Batches of an epoch of a `ReleaseDataset`, for any `DataLoader` as its `batch_sampler`.

    Every process of a distributed training has the same order, seeded by (seed, epoch), and takes every
    `world_size`-th draw of it beginning with `rank`. No draw is taken twice. What is left over when the number of draws
    does not come out even (at most world_size - 1 of them, others in each epoch) is left out of the epoch, so that all
    processes have equally many batches.

    Args:
        dataset: The mix.
        batch_size: Of each process.
        shuffle: False: in the order of the dataset.
        drop_last: Leave out a last batch that is not full.
        rank, world_size: This process and how many there are; of `torch.distributed` where it is initialised.

    Raises:
        LoaderError: A setting is out of range, or there are fewer images than processes.
    """

    def __init__(
        self,
        dataset: ReleaseDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise LoaderError(f"batch_size is {batch_size!r:.60}; it is a whole number of at least 1.")
        if not shuffle and dataset.mix.sampling == "balanced":
            raise LoaderError("balanced sampling draws at random, and shuffle=False asks for the order of the dataset.")
        self.rank, self.world_size = _place(rank, world_size)
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, int(batch_size), shuffle, drop_last
        self.epoch = 0
        self._start = 0
        if self.n_draws(0) < 1:
            raise LoaderError(
                f"an epoch has {len(dataset.mix.members(0))} images, fewer than the {self.world_size} processes."
            )
        if not len(self):
            raise LoaderError(
                f"an epoch has {self.n_draws(0)} images in this process, fewer than batch_size {batch_size}, and "
                "drop_last leaves out the only batch."
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw this epoch next; `start` batches of it are passed over, without reading them."""
        self.epoch, self._start = int(epoch), int(start)

    def n_draws(self, epoch: int) -> int:
        """Draws of this process in an epoch."""
        mix = self.dataset.mix
        return int(mix.n_real.sum() + mix.dose(epoch).sum()) // self.world_size

    def __len__(self) -> int:
        n = self.n_draws(self.epoch)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, start, self._start = self.epoch, self._start, 0
        n = self.n_draws(epoch)
        indices, copies = self.dataset.mix.draws(epoch, shuffle=self.shuffle)
        mine = slice(self.rank, n * self.world_size, self.world_size)
        indices, copies = indices[mine], copies[mine]
        for batch in range(start, len(self)):
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            pairs = zip(indices[part].tolist(), copies[part].tolist(), strict=True)
            yield [Draw(index, epoch, copy) for index, copy in pairs]


class BalancedLoader(DataLoader[Any]):
    """A `torch.utils.data.DataLoader` over a `ReleaseDataset`; made by `balanced_loader`.

    Each `iter(loader)` is the next epoch, as with a plain loader; one that was broken off counts as had. `set_epoch`
    says which one is next. `state_dict` and `load_state_dict` are those of torchdata's StatefulDataLoader: a loader
    that was made alike goes on after the last batch that was handed out, whatever the number of workers.
    """

    dataset: ReleaseDataset
    batch_sampler: MixSampler

    def __init__(self, dataset: ReleaseDataset, sampler: MixSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=sampler, **options)  # type: ignore[arg-type]
        self.epoch = 0
        self._begun = False
        self._done = 0  # batches handed out of the epoch
        self._start = 0

    def __iter__(self) -> Any:
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if self._begun:
            self.epoch += 1
        self._begun, self._done, self._start = True, self._start, 0
        self.batch_sampler.set_epoch(self.epoch, self._done)
        for batch in super().__iter__():
            self._done += 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass with this epoch."""
        if epoch < 0:
            raise LoaderError(f"epoch is {epoch}; epochs begin with 0.")
        self.epoch, self._begun, self._done, self._start = int(epoch), False, 0, 0
        self.batch_sampler.set_epoch(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers and a digest of what it was made from."""
        return {"epoch": self.epoch, "batch": self._done, "made_from": self._made_from()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader that was made alike stood.

        Raises:
            LoaderError: The state is of another mix, or is no state.
        """
        try:
            epoch, batch, made_from = int(state["epoch"]), int(state["batch"]), state["made_from"]
        except (KeyError, TypeError, ValueError):
            raise LoaderError("this is not what state_dict() of a BalancedLoader gave.") from None
        if made_from != self._made_from():
            raise LoaderError(
                "the state is of a loader with another release, mix, seed, batch size or number of processes: it would "
                "go on in another order. Make the loader as it was made then."
            )
        self.set_epoch(epoch)
        if batch >= len(self.batch_sampler):
            self.set_epoch(epoch + 1)
        else:
            self._done = self._start = batch

    def table(self, epoch: int | None = None) -> list[dict[str, Any]]:
        """A row for each class: real and synthetic images of an epoch, and weights in the loss."""
        return self.dataset.mix.table(self.epoch if epoch is None else epoch)

    def log_prior(self, epoch: int | None = None) -> Any:
        """Logarithm of each class's share in an epoch, float32 tensor `[n_classes]`.

        Added to the logits in the training loss, and left out otherwise, it is balanced softmax (Ren et al. 2020,
        eq. 3), that is logit adjustment (Menon et al. 2021, eq. 10 with tau 1). A class without images has -inf.
        """
        import torch

        with np.errstate(divide="ignore"):
            prior = np.log(self.dataset.mix.prior(self.epoch if epoch is None else epoch))
        return torch.from_numpy(prior.astype(np.float32))

    @property
    def left_to_you(self) -> tuple[str, ...]:
        """What of the verdict's recipe a loader cannot do."""
        return self.dataset.left_to_you

    def _made_from(self) -> str:
        mix, sampler = self.dataset.mix, self.batch_sampler
        doses = mix.ratios if mix.doses is None else mix.doses
        return digest_json(
            [
                getattr(self.dataset.rows, "digest", ""),
                mix.n_real.tolist(),
                mix.available.tolist(),
                [repr(float(value)) for value in doses],
                [float(mix.schedule(epoch)) for epoch in range(100)],
                mix.sampling,
                mix.synthetic_weight,
                mix.seed,
                sampler.batch_size,
                sampler.world_size,
                sampler.shuffle,
                sampler.drop_last,
            ]
        )


def balanced_loader(
    release: Any,
    *,
    batch_size: int = 32,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    loader_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> BalancedLoader:
    """A loader for a training loop over a release, mixed and balanced as said.

    ```python
    loader = balanced_loader("runs/x/release", batch_size=64, synthetic_ratio=1.0, transform=my_albumentations)
    ```

    What an epoch holds, its order and each image's augmentation follow from (seed, epoch, image) alone; the number of
    workers changes nothing. With `synthetic_ratio=0` the batches of epoch e are bit for bit those of
    `DataLoader(real, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed + e))`.

    Args:
        release: Directory of a release, or what `datasets.load_dataset` gives of one.
        batch_size: Of each process.
        shuffle: False: real images in their order, then synthetic ones by class and rank.
        drop_last: Leave out a last batch that is not full.
        num_workers: Worker processes; no more than there are images.
        rank, world_size: See `MixSampler`.
        loader_options: Further arguments of `DataLoader`: pin_memory, collate_fn, persistent_workers …
        settings: Those of `ReleaseDataset`: synthetic_ratio, real, transform, schedule, sampling, follow_verdict,
            output, seed …

    Raises:
        LoaderError: Settings that cannot be carried out; see `ReleaseDataset`. All of it now, nothing in a worker.
        VerificationError: The release is missing, half-written or damaged.
    """
    options = dict(loader_options or {})
    if strange := [name for name in _OURS if name in options]:
        raise LoaderError(f"loader_options has {strange[0]}, which the loader makes itself.")
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise LoaderError(f"num_workers is {num_workers!r:.60}; it is a whole number of at least 0.")
    dataset = ReleaseDataset(release, **settings)
    sampler = MixSampler(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=world_size)
    if num_workers > sampler.n_draws(0):
        raise LoaderError(
            f"num_workers is {num_workers}, but an epoch has {sampler.n_draws(0)} images in this process: there would "
            "be workers without any. Take fewer."
        )
    try:
        loader = BalancedLoader(dataset, sampler, num_workers=num_workers, **options)
    except (TypeError, ValueError) as error:
        raise LoaderError(f"DataLoader refuses these loader_options: {str(error)[:300]}") from error
    _collates(loader)
    return loader


def _collates(loader: BalancedLoader) -> None:
    """Put one image into a batch, as the loader will."""
    from synthaug.loaders.transforms import describe

    item = loader.dataset[Draw(0, 0, 0)]
    try:
        loader.collate_fn([item])
    except Exception as error:
        image = item["image"] if isinstance(item, dict) else item[0]
        raise LoaderError(
            f"what the transform returns ({describe(image)}) cannot be put into a batch: {type(error).__name__}: "
            f"{str(error)[:200]}. Let it end with a tensor or an array, or give a collate_fn in loader_options."
        ) from error


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise LoaderError("rank and world_size are given together, or neither (then torch.distributed says them).")
    if rank is None or world_size is None:
        import torch.distributed as distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
    if world_size < 1 or not 0 <= rank < world_size:
        raise LoaderError(f"rank is {rank} of world_size {world_size}; ranks are 0 to world_size - 1.")
    return rank, world_size
