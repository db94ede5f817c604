"""Classical augmentation by albumentations: small changes under which an image stays what it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def augmenter(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that shifts, scales, turns and brightens an image a little.

    It takes and returns [size, size, channels] float32 in [0, 1], any number of channels. No flips: a mirrored digit
    or organ may be another class. The same seed gives the same series of changes.
    """
    # Imported late (two seconds), and after `synthaug` has set NO_ALBUMENTATIONS_UPDATE.
    import albumentations
    import cv2

    change = albumentations.Compose(
        [
            albumentations.Affine(
                scale=(0.92, 1.08),
                translate_percent=(-0.07, 0.07),
                rotate=(-8, 8),
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.9,
            ),
            albumentations.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=0.7),
        ],
        seed=seed,
    )

    def augment(image: np.ndarray) -> np.ndarray:
        changed: np.ndarray = change(image=image)["image"]
        return np.clip(changed.reshape(image.shape), 0, 1)

    return augment
