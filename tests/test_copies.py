"""Near-copy distances on real digits: planted copies are near, other real images are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthaug.quality.copies import describe, descriptor_length, match, mirror, near_duplicates, picture_hash


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]


@pytest.fixture(scope="module")
def pneumonia() -> tuple[np.ndarray, np.ndarray]:
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "pneumoniamnist.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here: PneumoniaMNIST is not part of the repository")
    arrays = np.load(path)
    training, heldout = arrays["train_images"][::4, ..., None], arrays["val_images"][..., None]
    known = {picture_hash(image) for image in training}
    return training, np.stack([image for image in heldout if picture_hash(image) not in known])


def _jpeg(images: np.ndarray) -> np.ndarray:
    result = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0]).save(buffer, "JPEG", quality=75)
        result.append(np.asarray(Image.open(buffer)))
    return np.stack(result)[..., None]


def _planted(images: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    values = images.astype(np.float64)
    return {
        "exact": images,
        "mirrored": images[:, :, ::-1],
        "darker": np.rint(values * 0.8).astype(np.uint8),
        "noisy": np.rint(np.clip(values + random.normal(0, 0.02 * 255, values.shape), 0, 255)).astype(np.uint8),
        "jpeg": _jpeg(images),
    }


def _caught(training: np.ndarray, heldout: np.ndarray) -> dict[str, float]:
    references = describe(training, 0, 255)
    threshold = np.percentile(match(describe(heldout, 0, 255), references, 1).distance, 1)
    return {
        name: float((match(describe(copies, 0, 255), references, 1).distance < threshold).mean())
        for name, copies in _planted(training[:150]).items()
    }


def test_planted_copies_of_digits_are_caught(digits: np.ndarray) -> None:
    caught = _caught(digits[:1200], digits[1200:])
    assert caught["exact"] == caught["mirrored"] == 1
    assert min(caught.values()) >= 0.99, caught


def test_planted_copies_of_radiographs_are_caught(pneumonia: tuple[np.ndarray, np.ndarray]) -> None:
    caught = _caught(*pneumonia)
    assert caught["exact"] == caught["mirrored"] == 1
    assert min(caught.values()) >= 0.99, caught


def test_match_names_the_nearest_and_the_ratio(digits: np.ndarray) -> None:
    references = describe(digits[:50], 0, 255)
    found = match(describe(digits[7:9, :, ::-1], 0, 255), references, 1)
    np.testing.assert_array_equal(found.row, [7, 8])
    assert (found.distance < 1e-5).all()
    assert (found.ratio < 1e-4).all()
    both = np.minimum(
        np.linalg.norm(references[:, None] - describe(digits[60:90], 0, 255), axis=2),
        np.linalg.norm(references[:, None] - describe(digits[60:90, :, ::-1], 0, 255), axis=2),
    )
    other = match(describe(digits[60:90], 0, 255), references, 1)
    np.testing.assert_allclose(other.distance, both.min(0), rtol=1e-5)
    two = np.sort(both, 0)[:2]
    np.testing.assert_allclose(other.ratio, two[0] / two[1], rtol=1e-4)
    assert match(references[:2], references[:1], 1).ratio.tolist() == [1, 1]


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 3), (33, 5), (64, 1)])
def test_mirror_of_the_descriptor_is_the_descriptor_of_the_mirror(size: int, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 65536, (3, size, size, channels)).astype(np.uint16)
    descriptors = describe(images, 0, 65535)
    assert descriptors.shape == (3, descriptor_length(size, channels))
    np.testing.assert_allclose(mirror(descriptors, channels), describe(images[:, :, ::-1], 0, 65535), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, rtol=1e-4)


def test_broken_and_constant_images_have_a_finite_descriptor() -> None:
    images = np.zeros((3, 8, 8, 1), dtype=np.float32)
    images[1], images[2] = np.nan, np.inf
    assert np.isfinite(describe(images, 0, 1)).all()


def test_hash_is_blind_to_mirroring_only(digits: np.ndarray) -> None:
    image = digits[3]
    assert picture_hash(image) == picture_hash(image[:, ::-1])
    assert picture_hash(image) != picture_hash(image[::-1])
    other = image.copy()
    other[0, 0] ^= 1
    assert picture_hash(image) != picture_hash(other)


def test_duplicates_are_marked_after_the_first_and_more_rows_change_nothing(
    digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthaug.quality.copies._DUPLICATE_TILE", 8)
    descriptors = describe(digits[:40], 0, 255)
    descriptors[20] = descriptors[3]
    descriptors[5] = mirror(descriptors[4:5], 1)[0]
    rows = np.arange(40)
    marked = near_duplicates(descriptors, rows, np.empty_like(descriptors), 1, 0.01)
    assert np.flatnonzero(marked).tolist() == [5, 20]
    for many in (4, 6, 21, 33):
        first = near_duplicates(descriptors, rows[:many], np.empty_like(descriptors[:many]), 1, 0.01)
        np.testing.assert_array_equal(first, marked[:many])
