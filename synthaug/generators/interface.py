"""The plug that every generator fits into: fit, save, load, sample.

`synthaug.generators.contract.check_generator` holds any implementation against what is promised here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from synthaug.config import DPConfig, TrainConfig
from synthaug.records import PixelSpec, PrivacyGuarantee


@dataclass(frozen=True)
class TrainingData:
    """What a generator may learn from. Test images are not in it."""

    images: np.ndarray  # [n, size, size, channels], native values; may be memory-mapped, larger than memory
    pixels: PixelSpec
    classes: tuple[str, ...]
    rows: np.ndarray  # int64 [n_train], rows of `images` for gradients
    labels: np.ndarray  # int64 [n_train]
    heldout_rows: np.ndarray  # int64 [n_heldout], rows of `images` for stopping; disjoint from `rows`
    heldout_labels: np.ndarray  # int64 [n_heldout]
    scarce: tuple[int, ...]  # labels the plan raises


@dataclass(frozen=True)
class FitReport:
    """What training did. Losses are class name to mean, lower is better; empty where nothing was held out."""

    parameters: int
    images_budget: int
    images_seen: int
    budget_from: str
    kept: Literal["base", "fine-tuned"]
    stopped: str
    seconds: float
    images_per_second: float
    device: str
    processes: int = 1
    privacy: PrivacyGuarantee | None = None
    heldout_loss_base: dict[str, float] = field(default_factory=dict)
    heldout_loss_tuned: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # one row an evaluation


class Generator(ABC):
    """A class-conditional generator of images."""

    name: ClassVar[str]
    solver: ClassVar[str]  # what the manifest says made the images
    # Noise levels of `denoising_losses`, as standard deviations where images lie in [-1, 1]; empty for a generator
    # that does not denoise, which the membership attack cannot be tried on.
    loss_levels: ClassVar[tuple[float, ...]] = ()
    # Whether `fit` knows differential privacy; `dp` is passed to no other.
    trains_privately: ClassVar[bool] = False
    # Whether `fit` may be called in several processes at once, which accelerate has connected before; they share
    # `workdir`, the first one's generator counts, and `settings.batch_size` is of all of them together.
    trains_in_processes: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fit(
        cls, data: TrainingData, settings: TrainConfig, *, seed: int, workdir: Path, dp: DPConfig | None = None
    ) -> tuple[Self, FitReport]:
        """Train on `data`, reading no rows but those it lists.

        The same arguments with `settings.images` set give the same generator on the same machine. `workdir` is
        for whatever lets an interrupted call go on; a later call with the same arguments continues from it. Neither
        holds with `dp`, whose noise nobody may know.

        Raises:
            TrainingError: Training broke down before anything was worth keeping.
            CheckpointError: A base model given by the settings does not fit.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the generator into an empty directory: safetensors and JSON, nothing that must be unpickled."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, *, device: str) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: Something is missing or is not what `save` writes.
        """

    @abstractmethod
    def default_steps(self, guidance: float) -> int:
        """Return the `steps` to draw with, 2 to 1000, where a user gives none."""

    @abstractmethod
    def sample(self, labels: Sequence[int], seeds: Sequence[int], *, steps: int, guidance: float) -> np.ndarray:
        """Return native images [n, size, size, channels], one for each label and seed.

        The same call gives the same bits on the same machine at the same number of threads, however many calls
        went before. Image i follows from labels[i] and seeds[i] alone, up to rounding in the network.

        Raises:
            ValueError: A label is out of range, or the lengths differ.
        """

    def denoising_losses(self, images: np.ndarray, labels: Sequence[int], *, draws: int, seed: int) -> np.ndarray:
        """Return how badly each image is made out under noise, float32 [n, len(loss_levels)]; lower is better.

        The loss of training, at each level of `loss_levels`, the mean over `draws` fixed noises, with dropout and
        augmentation off. All images meet the same noises (common random numbers), which follow from `seed` alone:
        an image's losses depend on no other image, up to rounding. A generator with no `loss_levels` has none.

        Args:
            images: Native, [n, size, size, channels].
            labels: Of each image.
            draws: Noises at each level, at least 1.
            seed: 0 to 2**63 - 1.

        Raises:
            ValueError: A label is out of range, or there are not as many as images.
        """
        raise NotImplementedError(f"generator '{self.name}' has no denoising loss")
