"""A user's transform, called the same way whatever it is, and with randomness that follows from the sample alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from synthaug.errors import LoaderError
from synthaug.records import PixelSpec

Given = Literal["auto", "array", "tensor", "pil"]


class Step:
    """One image in, what the network is to see out.

    - None: a float32 tensor `[channels, height, width]` in [0, 1], by the range of values of the release.
    - An albumentations transform: called with `image=` (`[height, width, channels]`, native values) and `label=`
      (the number); what it makes of `image` is taken. Its generators are set for each sample.
    - Another callable: called with the image alone, as `given` says: 'array' (`[height, width, channels]`), 'tensor'
      (`[channels, height, width]`, same values and dtype) or 'pil'. 'auto' is 'tensor' for a `torch.nn.Module` and for
      what comes from torchvision, otherwise 'array'. Python's, numpy's global and torch's CPU generator are set for
      each sample, and in the process of the training loop put back afterwards.
    """

    def __init__(self, transform: Any, pixels: PixelSpec | None, given: Given) -> None:
        self._pixels = pixels
        self.kind = _kind(transform)
        if given not in ("auto", "array", "tensor", "pil"):
            raise LoaderError(f"transform_input is {given!r}; it is one of auto, array, tensor and pil.")
        if given == "auto":
            from_torch = type(transform).__module__.partition(".")[0] in ("torchvision", "torch")
            given = "tensor" if from_torch or _is_module(transform) else "array"
        self._given = given
        self.transform = transform
        if self.kind == "albumentations":
            # Its generators are replaced: the user's own object is left alone.
            self.transform = copy.deepcopy(transform)
            self._numpy = np.random.Generator(np.random.PCG64(0))
            self._python = random.Random(0)
            self.transform.set_random_state(self._numpy, self._python)
            # A strict pipeline refuses what none of its steps knows.
            self._with_label = not getattr(transform, "strict", False) or "label" in transform.available_keys

    @property
    def needs_global_seeds(self) -> bool:
        return self.kind == "callable"

    def __call__(self, image: np.ndarray, label: int, seed: bytes) -> Any:
        """Apply the transform with the randomness of `seed`, 32 bytes."""
        if self.kind == "none":
            return to_tensor(image, self._pixels)
        if self.kind == "albumentations":
            self._numpy.bit_generator.state = {
                "bit_generator": "PCG64",
                "state": {"state": int.from_bytes(seed[:16], "little"), "inc": _INCREMENT},
                "has_uint32": 0,
                "uinteger": 0,
            }
            self._python.seed(int.from_bytes(seed[16:24], "little"))
            data = {"image": image, "label": label} if self._with_label else {"image": image}
            made = self.transform(**data)
            if not isinstance(made, dict) or made.get("image") is None:
                raise LoaderError(f"{self._name} returned no image.")
            if self._with_label and made.get("label") != label:
                raise LoaderError(
                    f"{self._name} changed the label of a sample from {label} to {made.get('label')!r:.40}. A loader "
                    "keeps labels: mix labels (MixUp, CutMix) in the training step, with whole batches."
                )
            return made["image"]
        random.seed(int.from_bytes(seed[16:24], "little"))
        np.random.seed(int.from_bytes(seed[24:28], "little"))  # noqa: NPY002 - users' transforms draw from it
        if _torch_is_there():
            import torch

            torch.default_generator.manual_seed(int.from_bytes(seed[:7], "little"))
        made = self.transform(self._as_given(image))
        if made is None:
            raise LoaderError(f"{self._name} returned nothing. A transform returns the image it has made.")
        if isinstance(made, tuple | list | dict):
            raise LoaderError(
                f"{self._name} returned a {type(made).__name__} of {len(made)} instead of one image. The loader keeps "
                "the labels, one for each image: mix images or labels in the training step, with whole batches."
            )
        return made

    @property
    def _name(self) -> str:
        name = getattr(self.transform, "__name__", type(self.transform).__name__)
        return f"the transform {name}"

    def _as_given(self, image: np.ndarray) -> Any:
        if self._given == "array":
            return image
        if self._given == "tensor":
            import torch

            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))
        from PIL import Image

        if image.dtype == np.float32 or image.shape[2] not in (1, 3, 4):
            raise LoaderError(
                f"a {image.dtype} image of {image.shape[2]} channels cannot be a PIL image; take 'array'."
            )
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


# Any odd number: the stream of PCG64; samples differ in its state.
_INCREMENT = 0xDA3E39CB94B95BDB


def to_tensor(image: np.ndarray, pixels: PixelSpec | None) -> Any:
    """A float32 tensor `[channels, height, width]` in [0, 1], where 0 and 1 are the ends of the range of values.

    Raises:
        LoaderError: Floating-point images whose range nobody has stated.
    """
    import torch

    low, high = _range(image, pixels)
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(torch.float32, copy=True)
    return (tensor.sub_(low) if low else tensor).div_(high - low)


def _range(image: np.ndarray, pixels: PixelSpec | None) -> tuple[float, float]:
    if pixels is not None and image.dtype == pixels.dtype:
        return pixels.low, pixels.high
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2:
        return 0.0, float(np.iinfo(image.dtype).max)
    raise LoaderError(
        f"the range of values of {image.dtype} images is not known here: give a transform that scales them, or open "
        "the release by its directory, which states it."
    )


@contextmanager
def generators_kept(steps: tuple[Step, ...]) -> Iterator[None]:
    """Put the global generators back afterwards, where transforms have them set and a training loop uses them too."""
    if not any(step.needs_global_seeds for step in steps) or _in_a_worker():
        yield
        return
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_kept = None
    if _torch_is_there():
        import torch

        torch_kept = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        if torch_kept is not None:
            torch.set_rng_state(torch_kept)


def describe(image: Any) -> str:
    """Type, shape and values of what a transform returned, in words."""
    shape = getattr(image, "shape", getattr(image, "size", None))
    words = f"a {type(image).__name__}"
    if shape is not None and not callable(shape):
        words += f" of shape {list(shape)}"
    dtype = getattr(image, "dtype", getattr(image, "mode", None))
    return f"{words}, {str(dtype).removeprefix('torch.')}" if dtype is not None else words


def _kind(transform: Any) -> Literal["none", "albumentations", "callable"]:
    if transform is None:
        return "none"
    if hasattr(transform, "set_random_state") and hasattr(transform, "available_keys"):
        return "albumentations"
    if callable(transform):
        return "callable"
    raise LoaderError(
        f"transform is a {type(transform).__name__}, which cannot be called. Give an albumentations transform or a "
        "function of one image."
    )


def _is_module(transform: Any) -> bool:
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(transform, torch.nn.Module)


def _torch_is_there() -> bool:
    import sys

    return "torch" in sys.modules


def _in_a_worker() -> bool:
    import sys

    if "torch" not in sys.modules:
        return False
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None
