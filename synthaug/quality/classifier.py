"""A small residual network that learns the classes of real images within seconds, on any number of channels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from synthaug.errors import CheckpointError, TrainingError
from synthaug.formats.atomic import whole_file, write_text
from synthaug.progress import progress
from synthaug.quality.arithmetic import chunks, torch_threads
from synthaug.quality.warps import augmenter

# The network's grid: larger images are strided down to it by the first convolution.
_GRID = 16
# Augmented copies made at once and how often each is used, so that two cores keep up with the network.
_POOL_IMAGES = 4096
_POOL_BYTES = 128 * 2**20
_POOL_USES = 3
_TEMPERATURES = np.geomspace(0.3, 4.0, 40)
# Fewer held-out images than this say too little about confidence; temperature stays 1.
_LEAST_TO_CALIBRATE = 50
# Images that the scale of each depth is measured on.
_SCALE_IMAGES = 1024


class Prediction(NamedTuple):
    """What a classifier says of n images, float32."""

    probabilities: np.ndarray  # [n, n_classes]
    features: np.ndarray  # [n, n_features], what the last layer sees
    depths: np.ndarray  # [n, n_depths], see `Classifier.predict`


@dataclass(frozen=True)
class ClassifierSettings:
    """What is needed to build the network again and to read its output."""

    size: int
    channels: int
    n_classes: int
    low: float
    high: float
    present: tuple[int, ...]  # labels it was trained on; the others get probability 0
    width: int = 24
    steps: int = 0
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    seed: int = 0
    temperature: float = 1.0
    depth_scales: tuple[float, ...] = (1.0, 1.0, 1.0)


class _Block(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm_first = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm_second = nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm_first(self.first(x)))
        return functional.relu(self.norm_second(self.second(hidden)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """Three residual blocks on a grid of at most 16×16; images [n, channels, size, size] in [-1, 1] to logits."""

    def __init__(self, channels: int, size: int, n_classes: int, width: int) -> None:
        super().__init__()
        stride = math.ceil(size / _GRID)
        # One pixel of overlap on each side, so that a shift by a pixel does not change what a cell sees abruptly.
        self.stem = nn.Conv2d(channels, width, stride + 2, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, n_classes)

    def look(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[n, channels, size, size] in [-1, 1] to features [n, 4 width] and one summary of each depth."""
        hidden = functional.relu(self.norm(self.stem(x)))
        grids = []
        for block in self.blocks:
            hidden = block(hidden)
            grids.append(hidden)
        features = hidden.mean((2, 3))
        return features, [functional.adaptive_avg_pool2d(grid, 2).flatten(1) for grid in grids[:-1]] + [features]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.look(x)[0])
        return logits


class Classifier:
    """A trained network. Images go in as the source stores them: [n, size, size, channels], low..high."""

    def __init__(self, settings: ClassifierSettings, network: ResidualNetwork, threads: int = 1) -> None:
        self.settings = settings
        self.threads = threads
        self._network = network.eval()

    @property
    def n_features(self) -> int:
        return 4 * self.settings.width

    @property
    def n_depths(self) -> int:
        return (4 + 8 + 4) * self.settings.width

    def predict(self, images: np.ndarray, rows: np.ndarray | None = None) -> Prediction:
        """Look at images once; `rows` picks from `images`, which may be memory-mapped.

        `depths` joins what every level of the network sees, each scaled to a total variance of 1 on real images.
        For distances between images it serves better than `features`: the last layer draws the few training
        images of a scarce class together, so that other real images of the class look far away (measured on
        digits, 10 training images a class: held-out images cover 0.2 to 0.7 of them there, k = 2, and 0.5 to 1 here).
        """
        rows = np.arange(len(images)) if rows is None else rows
        features = np.empty((len(rows), self.n_features), dtype=np.float32)
        depths = np.empty((len(rows), self.n_depths), dtype=np.float32)
        with torch_threads(self.threads), torch.no_grad():
            for piece in chunks(len(rows), images.shape[1:]):
                found, levels = self._network.look(_to_tensor(to_float(images[rows[piece]], self.settings)))
                features[piece] = found.numpy()
                scaled = [level / scale for level, scale in zip(levels, self.settings.depth_scales, strict=True)]
                depths[piece] = torch.cat(scaled, 1).numpy()
        return Prediction(self._probabilities(self._logits(features)), features, depths)

    def probabilities(self, images: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Probabilities [n, n_classes], float32, rows summing to 1."""
        return self.predict(images, rows).probabilities

    def features(self, images: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """What the last layer sees: [n, n_features], float32."""
        return self.predict(images, rows).features

    def calibrate(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray | None = None) -> Classifier:
        """Return this classifier with the temperature (Guo et al. 2017) that suits held-out images best.

        The loss weighs all classes alike, as training did. With fewer than 50 images nothing is changed.
        """
        if len(labels) < _LEAST_TO_CALIBRATE:
            return self
        logits = self._logits(self.features(images, rows))
        # A class it never saw has no probability to speak of.
        kept = np.isin(labels, self.settings.present)
        if not kept.any():
            return self
        weights = 1 / np.bincount(labels[kept])[labels[kept]]
        own = (np.flatnonzero(kept), labels[kept])
        losses = [
            float(np.average(-np.log(np.maximum(self._probabilities(logits, t)[own], 1e-12)), weights=weights))
            for t in _TEMPERATURES
        ]
        best = float(_TEMPERATURES[int(np.argmin(losses))])
        return Classifier(replace(self.settings, temperature=best), self._network, self.threads)

    def save(self, path: Path) -> None:
        """Write the weights to `path` (safetensors) and the settings beside it (.json); no pickle."""
        from safetensors.torch import save

        with whole_file(path) as temporary:
            temporary.write_bytes(save({k: v.contiguous() for k, v in self._network.state_dict().items()}))
        write_text(path.with_suffix(".json"), json.dumps(asdict(self.settings), indent=1, sort_keys=True) + "\n")

    @staticmethod
    def load(path: Path, threads: int = 1) -> Classifier:
        """Read what `save` wrote.

        Raises:
            CheckpointError: A file is missing or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            settings = ClassifierSettings(
                **{**values, "present": tuple(values["present"]), "depth_scales": tuple(values["depth_scales"])}
            )
            network = _network(settings)
            network.load_state_dict(load(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"the classifier at {path} cannot be loaded: {error}. Remove its directory to train it again."
            ) from None
        return Classifier(settings, network, threads)

    def _logits(self, features: np.ndarray) -> np.ndarray:
        with torch_threads(self.threads), torch.no_grad():
            logits: np.ndarray = self._network.head(torch.from_numpy(features)).numpy()
        absent = np.setdiff1d(np.arange(self.settings.n_classes), self.settings.present)
        logits[:, absent] = -np.inf
        return logits

    def _probabilities(self, logits: np.ndarray, temperature: float | None = None) -> np.ndarray:
        scaled = logits / (temperature or self.settings.temperature)
        scaled = np.exp(scaled - scaled.max(1, keepdims=True, initial=-1e30))
        return (scaled / scaled.sum(1, keepdims=True)).astype(np.float32)


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    *,
    low: float,
    high: float,
    steps: int,
    seed: int,
    threads: int,
    rows: np.ndarray | None = None,
    batch_size: int = 128,
    width: int = 24,
) -> Classifier:
    """Train on real images, every class drawn equally often, with small label-preserving changes.

    Label smoothing (Szegedy et al. 2016) keeps its confidence near its accuracy. The same arguments give the same
    weights on the same machine.

    Args:
        images: [n, size, size, channels], any number type; may be memory-mapped.
        labels: Whole numbers in 0..n_classes-1, one for each of `rows`. Classes without an image get probability 0.
        n_classes: Length of the output.
        low, high: Values of `images` that become 0 and 1 (255 or 65535 for whole numbers).
        steps: Optimizer steps.
        seed: Of weights, draws and changes.
        threads: Of torch.
        rows: Rows of `images` that are trained on; all where not given.

    Raises:
        TrainingError: There is nothing to train on, or the loss is not a number.
    """
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    labels = np.asarray(labels, dtype=np.int64)
    if len(rows) == 0 or len(rows) != len(labels):
        raise TrainingError(f"the classifier was given {len(rows)} images and {len(labels)} labels to train on.")
    settings = ClassifierSettings(
        size=images.shape[1],
        channels=images.shape[3],
        n_classes=n_classes,
        low=float(low),
        high=float(high),
        present=tuple(int(label) for label in np.unique(labels)),
        width=width,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    with torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(settings)
        batches = _batches(images, rows, labels, settings)
        with progress("classifier", steps, "steps") as bar:
            _optimise(network, settings, batches, bar.update)
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(_SCALE_IMAGES, len(rows))).astype(np.int64))]
        unscaled = Classifier(settings, network, threads).predict(images, some).depths
        ends = np.cumsum([4 * width, 8 * width, 4 * width])[:-1]
        scales = [float(np.sqrt(level.var(0).sum())) for level in np.split(unscaled, ends, axis=1)]
    return Classifier(replace(settings, depth_scales=tuple(max(s, 1e-6) for s in scales)), network, threads)


def to_float(images: np.ndarray, settings: ClassifierSettings) -> np.ndarray:
    """Native values to float32 in [0, 1]; what is not finite becomes 0, so that it can be looked at."""
    scaled = (images.astype(np.float32) - np.float32(settings.low)) / np.float32(settings.high - settings.low)
    return np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous().mul_(2).sub_(1)


def _network(settings: ClassifierSettings) -> ResidualNetwork:
    return ResidualNetwork(settings.channels, settings.size, settings.n_classes, settings.width)


def _optimise(
    network: ResidualNetwork,
    settings: ClassifierSettings,
    batches: Iterator[tuple[Tensor, Tensor]],
    tick: Callable[[int], object],
) -> None:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.15
    )
    present = torch.tensor(settings.present)
    position = torch.full((settings.n_classes,), -1)
    position[present] = torch.arange(len(present))
    for step in range(settings.steps):
        x, y = next(batches)
        # Absent classes stay out of the loss, so that label smoothing spends nothing on them.
        loss = functional.cross_entropy(network(x)[:, present], position[y], label_smoothing=settings.label_smoothing)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of the classifier is {loss.item()} at step {step + 1} of {settings.steps}. "
                "Look for extreme values in the images, and set image.value_range for floating-point ones."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        tick(1)


def _batches(
    images: np.ndarray, rows: np.ndarray, labels: np.ndarray, settings: ClassifierSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless class-balanced batches out of pools of augmented copies, each copy used a few times."""
    shape = images.shape[1:]
    random = np.random.default_rng([settings.seed, 0x5A11])
    augment = augmenter(settings.seed)
    members = [np.flatnonzero(labels == label) for label in settings.present]
    size = settings.batch_size
    pool_size = int(np.clip(_POOL_BYTES // (4 * int(np.prod(shape))), size, _POOL_IMAGES))
    pool_size = min(pool_size, max(size, settings.steps * size // _POOL_USES))
    while True:
        classes = random.permutation(np.arange(pool_size) % len(members))
        drawn = np.array([members[c][random.integers(len(members[c]))] for c in classes])
        pool = np.empty((pool_size, *shape), dtype=np.float32)
        for piece in chunks(pool_size, shape):
            values = to_float(images[rows[drawn[piece]]], settings)
            pool[piece] = np.stack([augment(image) for image in values])
        y = torch.from_numpy(labels[drawn])
        for _ in range(_POOL_USES):
            order = random.permutation(pool_size)
            for start in range(0, pool_size - size + 1, size):
                chosen = order[start : start + size]
                yield _to_tensor(pool[chosen]), y[torch.from_numpy(chosen)]
