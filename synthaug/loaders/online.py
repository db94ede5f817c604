"""An albumentations step: now and then a synthetic image in place of a real one of the same class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import albumentations
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema
from pydantic import ConfigDict

from synthaug.errors import LoaderError
from synthaug.loaders.dataset import rank_order
from synthaug.loaders.real import by_name
from synthaug.loaders.rows import open_rows
from synthaug.text import printable


class SyntheticReplace(albumentations.ImageOnlyTransform):
    """Replace an image, with probability p, by a synthetic image of its class; of a class without any, never.

    ```python
    train = A.Compose([SyntheticReplace("runs/x/release", p=0.3), A.HorizontalFlip()])
    image = train(image=image, label=label)["image"]
    ```
    Put it first, or behind what brings images to the size of the release: it hands on what is stored there. Which
    image comes is drawn by the pipeline's own generators (`A.Compose(..., seed=)`), evenly from the class.

    Args:
        release: Directory of a release, or what `datasets.load_dataset` gives of one.
        p: Probability, 0 to 1.
        classes: Names of the labels 0, 1, 2 … that are passed as `label=`; those of the release where nothing is said.
            `label=` may also be a name.
        in_memory: Hold the synthetic images decoded. Otherwise their index is held, and each is read when it is drawn.
        most_per_class: Take the first so many by rank only: the dose.
        verify: Hold every byte of the release against its SHA-256 first.

    Raises:
        LoaderError: There are no synthetic images, or names do not match; while training: a label that is not there,
            or an image of another size or dtype than the release's.
        VerificationError: The release is missing, half-written or damaged.
    """

    class InitSchema(BaseTransformInitSchema):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        release: Any
        classes: Any
        in_memory: bool
        most_per_class: Any
        verify: bool

    def __init__(
        self,
        release: Any,
        p: float = 0.5,
        *,
        classes: Sequence[str] | None = None,
        in_memory: bool = False,
        most_per_class: int | Mapping[str, int] | None = None,
        verify: bool = False,
    ) -> None:
        super().__init__(p=p)
        self.release, self.classes, self.in_memory, self.verify = release, classes, in_memory, verify
        self.most_per_class = most_per_class
        self._rows = open_rows(release, "train", verify=verify)
        made = rank_order(self._rows)
        if not len(made):
            raise LoaderError(f"{self._rows.name} has no synthetic images, so there is nothing to replace with.")
        labels = self._rows.labels[made]
        known = self._rows.classes
        self._of = {name: made[labels == label][: self._most(name)] for label, name in enumerate(known)}
        names = list(known if classes is None else classes)
        by_name(names, known, "classes=")
        self._names = names
        self._images: dict[int, np.ndarray] | None = None
        if in_memory:
            self._images = {int(row): self._rows.image(int(row)) for rows in self._of.values() for row in rows}

    @property
    def targets_as_params(self) -> list[str]:
        """What must be passed beside the image."""
        return ["label"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw a synthetic image of the label's class."""
        rows = self._of.get(self._name_of(data["label"]), np.empty(0, np.int64))
        if not len(rows):
            return {"replacement": None}
        row = int(rows[self.py_random.randrange(len(rows))])
        return {"replacement": self._rows.image(row) if self._images is None else self._images[row]}

    def apply(self, img: np.ndarray, replacement: np.ndarray | None = None, **params: Any) -> np.ndarray:
        """The drawn image in the place of `img`, `[height, width]` or `[height, width, channels]`."""
        if replacement is None:
            return img
        other = replacement[..., 0] if img.ndim == 2 and replacement.shape[2] == 1 else replacement
        if other.shape != img.shape or other.dtype != img.dtype:
            raise LoaderError(
                f"the image is {img.dtype} {list(img.shape)}, a synthetic one {other.dtype} {list(other.shape)}. Put "
                "SyntheticReplace where images have the size and dtype of the release, behind A.Resize, say."
            )
        return other.copy()

    def _name_of(self, label: Any) -> str:
        if isinstance(label, str):
            if label not in self._names:
                raise LoaderError(f"label={printable(label)!r} is none of the classes.")
            return label
        try:
            number = int(label)
        except (TypeError, ValueError):
            raise LoaderError(f"label= is a {type(label).__name__}; it is a number or a class name.") from None
        if not 0 <= number < len(self._names):
            raise LoaderError(f"label={number} is none of the {len(self._names)} classes.")
        return self._names[number]

    def _most(self, name: str) -> int | None:
        most = self.most_per_class
        found = most.get(name, 0) if isinstance(most, Mapping) else most
        if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
            raise LoaderError(f"most_per_class is {found!r:.60} for '{printable(name)}'; it is a whole number or None.")
        return found
