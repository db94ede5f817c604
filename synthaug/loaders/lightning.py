"""A Lightning DataModule over a release; needs `pip install 'synthaug[lightning]'`.

Lightning itself saves and restores where the training loader stands (it asks loaders for `state_dict`). With several
processes give the Trainer `use_distributed_sampler=False`: the loader divides the epoch itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from synthaug.errors import LoaderError
from synthaug.loaders.dataset import ReleaseDataset
from synthaug.loaders.loader import BalancedLoader, balanced_loader

try:
    from lightning.pytorch import LightningDataModule
except ImportError:
    try:
        from pytorch_lightning import LightningDataModule
    except ImportError:
        raise LoaderError("Lightning is not installed: pip install 'synthaug[lightning]'.") from None

_ALSO_OF_EVALUATION = ("real_columns", "real_classes", "transform_input", "output", "seed")


class ReleaseDataModule(LightningDataModule):
    """Training batches from `balanced_loader`; validation and test batches of the release's real images, in order.

    Args:
        release: Directory of a release, or what `datasets.load_dataset` gives of one.
        batch_size: Of each process.
        num_workers: Of each loader.
        evaluation_transform: For validation and test images; see `Step`.
        loader_options: Further arguments of `DataLoader`, for all loaders.
        settings: Those of `balanced_loader`.
    """

    def __init__(
        self,
        release: Any,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        evaluation_transform: Any = None,
        loader_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._release, self._batch_size, self._num_workers = release, batch_size, num_workers
        self._evaluation_transform, self._settings = evaluation_transform, settings
        self._options = dict(loader_options or {})
        # Now, so that what is wrong shows before a trainer is set up; processes are known when training begins.
        ReleaseDataset(
            release, **{k: v for k, v in settings.items() if k not in ("shuffle", "drop_last", "rank", "world_size")}
        )

    def train_dataloader(self) -> BalancedLoader:
        """The mix."""
        loader = balanced_loader(
            self._release,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            loader_options=self._options,
            **self._settings,
        )
        # From a checkpoint between epochs Lightning restores the number of the epoch and not the loader's state.
        if self.trainer is not None:
            loader.set_epoch(self.trainer.current_epoch)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Real images of the validation split."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Real images of the test split."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        kept = {name: value for name, value in self._settings.items() if name in _ALSO_OF_EVALUATION}
        dataset = ReleaseDataset(self._release, split=split, transform=self._evaluation_transform, **kept)
        return DataLoader(dataset, batch_size=self._batch_size, num_workers=self._num_workers, **self._options)
