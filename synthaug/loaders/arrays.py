"""A mix as arrays or a pandas frame, for scikit-learn and whatever else takes all of it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from synthaug.errors import LoaderError

if TYPE_CHECKING:
    import pandas as pd


class Arrays(NamedTuple):
    """A mix in memory."""

    images: np.ndarray  # [n, height, width, channels] native values, or [n, features] where `flat`
    labels: np.ndarray  # int64 [n]
    weights: np.ndarray  # float64 [n], in the loss: sample_weight of an estimator's fit
    is_synthetic: np.ndarray  # bool [n]
    sample_ids: list[str]
    classes: list[str]  # by label


def _native(image: np.ndarray) -> np.ndarray:
    return image


def as_arrays(release: Any, *, epoch: int = 0, flat: bool = False, **settings: Any) -> Arrays:
    """All images of an epoch of a mix, decoded.

    Real images in their order, then synthetic ones by class and rank; with `sampling="balanced"` what the epoch draws,
    class by class. Without a `transform` the values are those stored.

    Args:
        release: Directory of a release, or what `datasets.load_dataset` gives of one.
        epoch: Whose mix and augmentation.
        flat: A row of numbers for each image.
        settings: Those of `ReleaseDataset` but for output.

    Raises:
        LoaderError: Images of different sizes; otherwise as `ReleaseDataset`.
        VerificationError: The release is missing, half-written or damaged.
    """
    from synthaug.loaders.dataset import ReleaseDataset
    from synthaug.loaders.mixing import Draw

    settings.setdefault("transform", _native)
    dataset = ReleaseDataset(release, output="dict", **settings)
    indices, copies = dataset.mix.draws(epoch, shuffle=False)
    images, rows = [], []
    for index, copy in zip(indices.tolist(), copies.tolist(), strict=True):
        item = dataset[Draw(index, epoch, copy)]
        images.append(np.asarray(item["image"]))
        rows.append((item["label"], item["weight"], item["is_synthetic"], item["sample_id"]))
    if len(shapes := {image.shape for image in images}) > 1:
        some = ", ".join(str(list(shape)) for shape in sorted(shapes)[:3])
        raise LoaderError(
            f"images have different shapes ({some}), which no array holds. Give a transform that resizes."
        )
    stacked = np.stack(images)
    labels, weights, synthetic, ids = zip(*rows, strict=True)
    return Arrays(
        images=stacked.reshape(len(stacked), -1) if flat else stacked,
        labels=np.asarray(labels, dtype=np.int64),
        weights=np.asarray(weights, dtype=np.float64),
        is_synthetic=np.asarray(synthetic, dtype=np.bool_),
        sample_ids=list(ids),
        classes=dataset.classes,
    )


def as_frame(release: Any, *, epoch: int = 0, **settings: Any) -> pd.DataFrame:
    """The same as a pandas frame: sample_id, label, class_name, is_synthetic, weight, image (an array in each row)."""
    import pandas as pd

    arrays = as_arrays(release, epoch=epoch, **settings)
    return pd.DataFrame(
        {
            "sample_id": arrays.sample_ids,
            "label": arrays.labels,
            "class_name": [arrays.classes[label] for label in arrays.labels],
            "is_synthetic": arrays.is_synthetic,
            "weight": arrays.weights,
            "image": list(arrays.images),
        }
    )
