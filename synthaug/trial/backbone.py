"""Features of images by a network of the user's own, for the quality of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from synthaug.errors import ConfigError
from synthaug.records import PixelSpec, Source
from synthaug.trial.entry import build, load_entry

_PIECE = 128


def own_backbone(backbone: str, form: tuple[int, int, int]) -> Any:
    """The user's torch module, ready to look; `form`: channels, size, n_classes.

    Raises:
        ConfigError: It cannot be made, or is no torch module.
    """
    import torch

    made = load_entry(backbone, "evaluate.backbone")
    try:
        network = build(made, *form)
    except Exception as error:
        raise ConfigError(
            f"evaluate.backbone {backbone} failed when it was called with channels, size, n_classes = {form}: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise ConfigError(f"evaluate.backbone {backbone} gave a {type(network).__name__}; a torch module is wanted.")
    network.eval()
    return network


def features_by(
    backbone: str | None, source: Source, threads: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """`backbone_features` for images of `source`; None where no backbone is named."""
    return None if backbone is None else backbone_features(backbone, source.pixels, len(source.classes), threads)


def backbone_features(
    backbone: str, pixels: PixelSpec, n_classes: int, threads: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function (images, rows) to features [len(rows), n_features] float32.

    Args:
        backbone: See `evaluate.backbone`.
        pixels: Form of the images; the network gets [n, channels, size, size] in [-1, 1].

    Raises:
        ConfigError: It is of no use (see `own_backbone`), or gives no [n, n_features].
    """
    import torch

    from synthaug.quality.arithmetic import torch_threads

    network = own_backbone(backbone, (pixels.channels, pixels.size, n_classes))

    def look(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found = []
        with torch_threads(threads), torch.no_grad():
            for start in range(0, len(rows), _PIECE):
                values = pixels.to_unit(images[rows[start : start + _PIECE]])
                try:
                    features = network(torch.from_numpy(values).permute(0, 3, 1, 2).contiguous())
                except Exception as error:
                    raise ConfigError(
                        f"evaluate.backbone {backbone} failed on images [n, {pixels.channels}, {pixels.size}, "
                        f"{pixels.size}]: {type(error).__name__}: {error}."
                    ) from error
                if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(values):
                    shape = tuple(getattr(features, "shape", ()))
                    raise ConfigError(
                        f"evaluate.backbone {backbone} turned {len(values)} images into {type(features).__name__} of "
                        f"shape {shape}; [n, n_features] is wanted."
                    )
                if not torch.isfinite(features).all():
                    raise ConfigError(f"evaluate.backbone {backbone} gave features that are not numbers.")
                found.append(features.float().numpy())
        return np.concatenate(found)

    return look
