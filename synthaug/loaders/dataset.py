"""A release as a map-style torch dataset, mixed with real images; and synthetic images beside a user's dataset."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
from torch.utils.data import Dataset

from synthaug.errors import LoaderError
from synthaug.loaders.follow import Followed, follow
from synthaug.loaders.mixing import (
    Draw,
    Mix,
    Sampling,
    Schedule,
    check_ratio,
    check_schedule,
    number,
    sample_seed,
)
from synthaug.loaders.real import as_array, by_name, check_classes, labels_of, names_of, open_real
from synthaug.loaders.rows import Rows, open_rows
from synthaug.loaders.transforms import Given, Step, describe, generators_kept
from synthaug.text import printable

logger = logging.getLogger(__name__)

Output = Literal["pair", "dict"]
_MOST_SEED = 2**62


class _Same:
    """Stands for "the same as the real images'"."""

    def __repr__(self) -> str:
        return "the same as transform"


SAME = _Same()


class ReleaseDataset(Dataset[Any]):
    """A split of a release as a map-style dataset: its real images, then the synthetic ones of the mix.

    `dataset[i]` is item i of the epoch that was set last (0 at first): real images in their own order, then synthetic
    ones by class and rank. `len(dataset)` is their number. Nothing is decoded before it is asked for, but for one
    image of each kind, on which transforms are tried.

    Items are `(image, label)`; with `output="dict"` they are `image`, `label`, `is_synthetic`, `weight` (float32, in
    the loss) and `sample_id`.

    Args:
        release: Directory of a release, or what `datasets.load_dataset` gives of one (from the hub, say).
        split: train, validation or test; synthetic images are in train only.
        synthetic_ratio: Synthetic images per real one of the same class, 1.0 where nothing is said; or class name to
            ratio, where classes that are not named get none. See `Mix` for the arithmetic. 0 is exactly the real
            images; `math.inf` takes all there are.
        real: Real images to mix with; None takes those in the release. A `datasets.Dataset`, a torch map-style dataset
            of (image, label) with untransformed images, or the run folder. Labels are matched by name.
        real_columns: Names of the image and label columns of a `datasets.Dataset`.
        real_classes: Names of the labels 0, 1, 2 … of `real`, where it does not say them.
        transform: See `Step`; for real images, and for synthetic ones where nothing else is said.
        synthetic_transform: For synthetic images.
        transform_input: What a plain callable is given: 'array', 'tensor' or 'pil'.
        schedule: Epoch to the factor of the ratio: `decay_to_real(10)`, `mix_then_real(5)`, any function.
        sampling: 'natural' or 'balanced'; what an epoch of `MixSampler` draws.
        synthetic_weight: Weight of a synthetic image in the loss, 1.0 where nothing is said.
        class_weights: Weights in the loss by inverse class frequency.
        follow_verdict: Take dose, sampling, weights and schedule from the release's verdict; an outcome other than
            `helps` takes no synthetic image. `left_to_you` lists what of the recipe is not a loader's to do.
        epochs: Length of the training, for a verdict's recipe that ends with real images alone.
        output: 'pair' or 'dict'.
        seed: Of the order and of augmentation; what is drawn follows from (seed, epoch, image) alone.
        verify: Hold every byte against its SHA-256 now. Otherwise sizes, release.json's own digest and the rows
            against the manifest are checked, and page checksums when a row group is first read.

    Raises:
        LoaderError: Settings that cannot be carried out; labels that do not match; a transform that returns nothing or
            changes labels; a class with synthetic images and without real ones.
        VerificationError: The release is missing, half-written or damaged.
    """

    def __init__(
        self,
        release: Any,
        *,
        split: str = "train",
        synthetic_ratio: float | Mapping[str, float] | None = None,
        real: Any = None,
        real_columns: tuple[str, str] = ("image", "label"),
        real_classes: Sequence[str] | None = None,
        transform: Any = None,
        synthetic_transform: Any = SAME,
        transform_input: Given = "auto",
        schedule: Schedule | None = None,
        sampling: Sampling | None = None,
        synthetic_weight: float | None = None,
        class_weights: bool | None = None,
        follow_verdict: bool = False,
        epochs: int | None = None,
        output: Output = "pair",
        seed: int = 0,
        verify: bool = False,
    ) -> None:
        if output not in ("pair", "dict"):
            raise LoaderError(f"output is {output!r}; it is 'pair' or 'dict'.")
        if sampling not in (None, "natural", "balanced"):
            raise LoaderError(f"sampling is {sampling!r}; it is 'natural' or 'balanced'.")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < _MOST_SEED:
            raise LoaderError(f"seed is {seed!r:.60}; it is a whole number from 0 to 2**62 - 1.")
        ours = {
            "synthetic_ratio": synthetic_ratio,
            "schedule": schedule,
            "sampling": sampling,
            "synthetic_weight": synthetic_weight,
            "class_weights": class_weights,
        }
        if follow_verdict and (given := [name for name, value in ours.items() if value is not None]):
            raise LoaderError(
                f"follow_verdict takes the recipe from the verdict, and {', '.join(given)} would change it. "
                "Leave out the one or the other."
            )
        if not isinstance(synthetic_ratio, Mapping):
            check_ratio(_or(synthetic_ratio, 1.0), ())
        schedule = check_schedule(schedule)
        weight = number(_or(synthetic_weight, 1.0), "synthetic_weight")
        if math.isinf(weight):
            raise LoaderError("synthetic_weight is infinite; it must be a number of at least 0.")

        self.rows: Rows = open_rows(release, split, verify=verify)
        self.classes = list(self.rows.classes)
        self._real = open_real(real, self.rows, split=split, columns=real_columns, classes=real_classes)
        self._made = rank_order(self.rows)
        available = np.bincount(self.rows.labels[self._made], minlength=len(self.classes)).astype(np.int64)
        self.followed: Followed | None = follow(self.rows, epochs) if follow_verdict else None
        settings: dict[str, Any] = {
            "schedule": schedule,
            "sampling": sampling or "natural",
            "synthetic_weight": weight,
            "class_weights": bool(class_weights),
        }
        if self.followed is not None:
            settings = {name: getattr(self.followed, name) for name in (*settings, "doses")}
        ratios = check_ratio(_or(synthetic_ratio, 1.0), self.classes)
        labels = self._real.labels
        asked = settings.get("doses", ratios)
        offered = {label: int(n) for label, n in enumerate(available) if asked[label] > 0}
        check_classes(labels, offered, self.classes, self._real.name)
        self.mix = Mix(tuple(self.classes), labels, available, ratios, seed=int(seed), **settings)
        self.epoch = 0
        self._members: np.ndarray | None = None
        self.output = output
        weighted = self.mix.class_weights or (
            self.mix.synthetic_weight != 1 and self.mix.sampling == "natural" and bool(available.sum())
        )
        if weighted and output == "pair":
            raise LoaderError(
                "samples have weights in the loss here, and (image, label) has no place for them. Take output='dict', "
                "whose items have 'weight'."
            )
        self._steps = (
            Step(transform, self.rows.pixels, transform_input),
            Step(
                transform if isinstance(synthetic_transform, _Same) else synthetic_transform,
                self.rows.pixels,
                transform_input,
            ),
        )
        if output == "dict" and hasattr(self.rows, "load_ids"):
            self.rows.load_ids()
        self._probe()
        self._tell()

    @property
    def left_to_you(self) -> tuple[str, ...]:
        """What of the verdict's recipe a loader cannot do."""
        return () if self.followed is None else self.followed.left_to_you

    def set_epoch(self, epoch: int) -> None:
        """Hold the mix of this epoch. Worker processes that live on do not hear of it; `MixSampler` tells them."""
        if epoch < 0:
            raise LoaderError(f"epoch is {epoch}; epochs begin with 0.")
        self.epoch, self._members = int(epoch), None

    def __len__(self) -> int:
        return len(self._current())

    def __getitem__(self, item: SupportsIndex | Draw) -> Any:
        """Item number `item` of the current epoch, or the one that a `Draw` names."""
        with generators_kept(self._steps):
            return self._item(self._draw(item))

    def __getitems__(self, items: Iterable[SupportsIndex | Draw]) -> list[Any]:
        """Several items, as `DataLoader` asks for them."""
        with generators_kept(self._steps):
            return [self._item(self._draw(item)) for item in items]

    def native(self, index: int) -> np.ndarray:
        """An image of the pool as it is stored, `[height, width, channels]`."""
        n_real = len(self.mix.real_labels)
        if index < n_real:
            image: np.ndarray = self._real.image(index)
            return image
        return self.rows.image(int(self._made[index - n_real]))

    def sample_id(self, index: int) -> str:
        """Id of an image of the pool; of a real one from elsewhere, `real-` and its number."""
        n_real = len(self.mix.real_labels)
        if index < n_real:
            return self._real.sample_id(index)
        return self.rows.sample_id(int(self._made[index - n_real]))

    def _current(self) -> np.ndarray:
        if self._members is None:
            self._members = self.mix.members(self.epoch)
        return self._members

    def _draw(self, item: SupportsIndex | Draw) -> Draw:
        if isinstance(item, Draw):
            return item
        members, place = self._current(), item.__index__()
        if not -len(members) <= place < len(members):
            raise IndexError(f"the epoch has {len(members)} images; there is no number {place}")
        return Draw(int(members[place]), self.epoch, 0)

    def _item(self, draw: Draw) -> Any:
        label = self.mix.label(draw.number)
        synthetic = draw.number >= len(self.mix.real_labels)
        step = self._steps[synthetic]
        seed = b"" if step.kind == "none" else sample_seed(self.mix.seed, draw)
        image = step(self.native(draw.number), label, seed)
        if self.output == "pair":
            return image, label
        return {
            "image": image,
            "label": label,
            "is_synthetic": synthetic,
            "weight": np.float32(self.mix.weights(draw.epoch)[int(synthetic), label]),
            "sample_id": self.sample_id(draw.number),
        }

    def _probe(self) -> None:
        """Try the transforms on one image of each kind, so that what is wrong with them shows now."""
        n_real = len(self.mix.real_labels)
        indices = [0]
        most = next((epoch for epoch in range(1000) if self.mix.dose(epoch).any()), None)
        if most is not None:
            indices.append(int(self.mix.members(most)[n_real]))
            real, synthetic = self.native(indices[0]), self.native(indices[1])
            if real.dtype != synthetic.dtype or real.shape[-1] != synthetic.shape[-1]:
                raise LoaderError(
                    f"the real images are {real.dtype} {list(real.shape)} and the synthetic ones {synthetic.dtype} "
                    f"{list(synthetic.shape)}: they would mean different things to a transform. Give real images as "
                    "they are stored, before any transform, in the colour that the job has made of them."
                )
        made = []
        for index in indices:
            kind = "synthetic" if index >= n_real else "real"
            try:
                item = self[Draw(index, 0, 0)]
            except LoaderError:
                raise
            except Exception as error:
                image = self.native(index)
                raise LoaderError(
                    f"the transform fails on the first {kind} image ({describe(image)}): {type(error).__name__}: "
                    f"{printable(str(error), width=300)}"
                ) from error
            made.append(item["image"] if self.output == "dict" else item[0])
        if len(made) == 2 and _form(made[0]) != _form(made[1]):
            raise LoaderError(
                f"a real image comes out as {describe(made[0])} and a synthetic one as {describe(made[1])}: they do "
                "not fit into one batch. Resize and convert both in the transforms."
            )

    def _tell(self) -> None:
        short = [row["class"] for row in self.mix.table(0) if row["short"] and math.isfinite(self._asked(row["class"]))]
        if short:
            shown = ", ".join(printable(name, 30) for name in short[:10])
            logger.info("loader: fewer synthetic images than asked for of %s: all there are are taken", shown)

    def _asked(self, name: str) -> float:
        return float(self.mix.ratios[self.classes.index(name)])


def rank_order(rows: Rows) -> np.ndarray:
    """Rows of the synthetic images by class and rank, int64 [n]."""
    made = np.flatnonzero(rows.synthetic)
    order: np.ndarray = made[np.lexsort((rows.ranks[made], rows.labels[made]))]
    return order


class AugmentedDataset(Dataset[Any]):
    """A dataset of the user's with synthetic images behind its own; made by `augment`."""

    def __init__(self, dataset: Any, rows: Rows, places: np.ndarray, labels: np.ndarray, form: Any, seed: int) -> None:
        self.dataset = dataset
        self.classes = getattr(dataset, "classes", None)
        self._rows, self._places, self._form, self._seed = rows, places, form, seed
        self._labels = labels  # of the synthetic images, in the user's numbers
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Give the transform of synthetic images other randomness in each epoch."""
        self.epoch = int(epoch)

    @property
    def is_synthetic(self) -> np.ndarray:
        """Which items are synthetic, bool [n]."""
        return np.arange(len(self)) >= len(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset) + len(self._places)

    def __getitem__(self, item: SupportsIndex) -> Any:
        place, n_real = item.__index__(), len(self.dataset)
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} images; there is no number {place}")
        place %= len(self)
        if place < n_real:
            return self.dataset[place]
        row = int(self._places[place - n_real])
        label = int(self._rows.labels[row])
        with generators_kept((self._form,) if isinstance(self._form, Step) else ()):
            seed = sample_seed(self._seed, Draw(place, self.epoch, 0))
            image = self._form(self._rows.image(row), label, seed)
        return image, int(self._labels[place - n_real])


def augment(
    dataset: Any,
    release: Any,
    *,
    synthetic_ratio: float | Mapping[str, float] = math.inf,
    classes: Sequence[str] | None = None,
    transform: Any = SAME,
    transform_input: Given = "auto",
    seed: int = 0,
    verify: bool = False,
) -> AugmentedDataset:
    """Append a release's synthetic images to a dataset of the user's, which stays as it is.

    Items below `len(dataset)` are `dataset[i]` themselves; the synthetic images follow by class and rank, as
    `(image, label)` with the dataset's own label numbers. Classes that the dataset has not are passed over, and so are
    the real images of the release.

    Args:
        dataset: A torch map-style dataset of (image, label). Names of its labels: its `classes`, or `classes=`.
        release: Directory of a release, or what `datasets.load_dataset` gives of one.
        synthetic_ratio: Per image of the class in `dataset`; all there are where nothing is said.
        classes: Names of the labels 0, 1, 2 … of the dataset, spelt as in the release.
        transform: For synthetic images, see `Step`. Where nothing is said: the dataset's own `transform` on a PIL
            image, as torchvision's datasets have it; without one, the type that the dataset's images have (array,
            PIL or a tensor of the release's dtype).
        transform_input: What a plain callable is given: 'array', 'tensor' or 'pil'.
        seed: Of the transform's randomness; `set_epoch` changes it from epoch to epoch.
        verify: Hold every byte of the release against its SHA-256 first.

    Raises:
        LoaderError: Names do not match, a ratio is negative or NaN, or a synthetic image does not come out in the form
            of the dataset's images.
        VerificationError: The release is missing, half-written or damaged.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise LoaderError(f"augment takes a map-style dataset, with len() and [i]; this is a {type(dataset).__name__}.")
    if not isinstance(synthetic_ratio, Mapping):
        check_ratio(synthetic_ratio, ())
    rows = open_rows(release, "train", verify=verify)
    what = f"the {type(dataset).__name__} to augment"
    if not len(dataset):
        raise LoaderError(f"{what} has 0 images, so there is nothing to augment.")
    names = names_of(dataset, classes, what)
    known = by_name(names, rows.classes, what)
    labels = labels_of(dataset, len(names), what)
    own = np.full(len(rows.classes), -1, dtype=np.int64)
    own[known[known >= 0]] = np.flatnonzero(known >= 0)
    counts = np.zeros(len(rows.classes), dtype=np.int64)
    shared = known[labels] >= 0
    counts += np.bincount(known[labels[shared]], minlength=len(rows.classes))
    made = rank_order(rows)
    available = np.bincount(rows.labels[made], minlength=len(rows.classes)).astype(np.int64)
    available[own < 0] = 0
    ratios = check_ratio(synthetic_ratio, rows.classes)
    check_classes(
        known[labels[shared]], {i: int(n) for i, n in enumerate(available) if ratios[i] > 0}, rows.classes, what
    )
    mix = Mix(rows.classes, known[labels[shared]], available, ratios)
    chosen = np.concatenate(
        [made[rows.labels[made] == label][:count] for label, count in enumerate(mix.dose(0))] or [made[:0]]
    )
    first = dataset[0]
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise LoaderError(f"item 0 of {what} is not (image, label), but a {type(first).__name__}.")
    form = _form_of(dataset, first[0], transform, transform_input, rows)
    result = AugmentedDataset(dataset, rows, chosen, own[rows.labels[chosen]], form, seed)
    if len(chosen):
        try:
            image = result[len(dataset)][0]
        except LoaderError:
            raise
        except Exception as error:
            raise LoaderError(
                f"the transform fails on a synthetic image ({describe(rows.image(int(chosen[0])))}): "
                f"{type(error).__name__}: {printable(str(error), width=300)}. Give one for them with transform=."
            ) from error
        if _form(image) != _form(first[0]):
            raise LoaderError(
                f"images of {what} are {describe(first[0])}, and a synthetic one comes out as {describe(image)}. Give "
                "a transform= for the synthetic images that brings them to the same form."
            )
    return result


class _AsTheirs:
    """Synthetic images in the type of the dataset's."""

    def __init__(self, kind: str, flat: bool) -> None:
        self._kind, self._flat = kind, flat

    def __call__(self, image: np.ndarray, label: int, seed: bytes) -> Any:
        if self._kind == "tensor":
            import torch

            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))
        if self._kind == "pil":
            from PIL import Image

            return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return image[..., 0] if self._flat else image


def _form_of(dataset: Any, first: Any, transform: Any, given: Given, rows: Rows) -> Any:
    if not isinstance(transform, _Same):
        return Step(transform, rows.pixels, given)
    own = getattr(dataset, "transform", None)
    if callable(own):
        return Step(own, rows.pixels, "pil" if given == "auto" else given)
    if hasattr(first, "detach"):
        return _AsTheirs("tensor", flat=False)
    if hasattr(first, "getexif"):
        return _AsTheirs("pil", flat=False)
    return _AsTheirs("array", flat=isinstance(first, np.ndarray) and first.ndim == 2)


def _form(image: Any) -> tuple[Any, ...]:
    """What two images must share to go into one batch."""
    if hasattr(image, "detach") or isinstance(image, np.ndarray):
        return type(image).__name__, tuple(image.shape), str(image.dtype)
    if hasattr(image, "getexif"):
        return "PIL", as_array(image).shape, image.mode
    return (type(image).__name__,)


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value
