"""Classical augmentation by albumentations: small changes under which an image stays what it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def augmenter(seed: int, *, strong: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that shifts, scales, turns and brightens an image: a little, or `strong`ly.

    Strong is more of the same, with blur, noise, elastic bending and pieces blanked out: what a careful user would
    try before synthetic images.

    It takes and returns [size, size, channels] float32 in [0, 1], any number of channels. No flips: a mirrored digit
    or organ may be another class. The same seed gives the same series of changes.
    """
    # Imported late (two seconds), and after `synthaug` has set NO_ALBUMENTATIONS_UPDATE.
    import albumentations
    import cv2

    bent = cv2.BORDER_REFLECT_101
    stronger = [
        albumentations.Affine(
            scale=(0.8, 1.2),
            translate_percent=(-0.12, 0.12),
            rotate=(-20, 20),
            shear=(-8, 8),
            border_mode=bent,
            p=0.9,
        ),
        albumentations.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.25, p=0.8),
        albumentations.ElasticTransform(alpha=8, sigma=4, border_mode=bent, p=0.2),
        albumentations.OneOf(
            [
                albumentations.GaussianBlur(blur_limit=(3, 3), p=1.0),
                albumentations.GaussNoise(std_range=(0.01, 0.05), p=1.0),
            ],
            p=0.3,
        ),
        albumentations.CoarseDropout(num_holes_range=(1, 2), hole_height_range=(0.1, 0.25), p=0.3),
    ]
    change = albumentations.Compose(
        stronger
        if strong
        else [
            albumentations.Affine(
                scale=(0.92, 1.08),
                translate_percent=(-0.07, 0.07),
                rotate=(-8, 8),
                border_mode=bent,
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
