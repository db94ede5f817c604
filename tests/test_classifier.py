"""The classifier: learns real digits in seconds, repeats exactly, keeps its word through a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from synthaug.errors import CheckpointError, TrainingError
from synthaug.quality.classifier import Classifier, train_classifier


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None], loaded.target


def _train(images: np.ndarray, labels: np.ndarray, n_classes: int, steps: int = 4, **settings: float) -> Classifier:
    values = {"low": 0, "high": 255, "seed": 0, "threads": 1, "batch_size": 32, "width": 8} | settings
    return train_classifier(images, labels, n_classes, steps=steps, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(digits: tuple[np.ndarray, np.ndarray]) -> Classifier:
    images, labels = digits
    return _train(images[:1200], labels[:1200], 10, steps=120, batch_size=64, width=16)


def test_recognises_held_out_digits(digits: tuple[np.ndarray, np.ndarray], trained: Classifier) -> None:
    images, labels = digits
    prediction = trained.predict(images[1200:])
    assert (prediction.probabilities.argmax(1) == labels[1200:]).mean() > 0.85
    np.testing.assert_allclose(prediction.probabilities.sum(1), 1, rtol=1e-5)
    assert prediction.features.shape == (597, trained.n_features)
    assert prediction.depths.shape == (597, trained.n_depths)


def test_depths_have_equal_weight(digits: tuple[np.ndarray, np.ndarray], trained: Classifier) -> None:
    depths = trained.predict(digits[0][:1200]).depths
    width = trained.settings.width
    parts = np.split(depths, np.cumsum([4 * width, 8 * width]), axis=1)
    assert [float(part.var(0).sum()) for part in parts] == pytest.approx([1, 1, 1], rel=0.1)


def test_calibration_raises_the_likelihood_of_held_out_images(
    digits: tuple[np.ndarray, np.ndarray], trained: Classifier
) -> None:
    images, labels = digits[0][1200:], digits[1][1200:]
    calibrated = trained.calibrate(images, labels)

    def likelihood(classifier: Classifier) -> float:
        own = classifier.probabilities(images)[np.arange(len(labels)), labels]
        return float(np.mean([np.log(own[labels == label]).mean() for label in range(10)]))

    assert likelihood(calibrated) >= likelihood(trained) - 1e-3
    # With few images nothing is claimed.
    assert trained.calibrate(images[:20], labels[:20]) is trained


def test_same_seed_same_weights_other_seed_others(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    one, same, other = (_train(images, labels, 10, seed=seed).probabilities(images) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_saved_and_loaded_it_says_the_same(
    digits: tuple[np.ndarray, np.ndarray], trained: Classifier, tmp_path: Path
) -> None:
    images, labels = digits[0][1200:1300], digits[1][1200:1300]
    calibrated = trained.calibrate(images, labels)
    path = tmp_path / "classifier.safetensors"
    calibrated.save(path)
    loaded = Classifier.load(path)
    assert loaded.settings == calibrated.settings
    for saved, read in zip(calibrated.predict(images), loaded.predict(images), strict=True):
        np.testing.assert_array_equal(saved, read)
    # Weights under settings of another network are refused by name.
    settings = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**settings, "width": 48}))
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors cannot be loaded"):
        Classifier.load(path)


@pytest.mark.parametrize(
    ("size", "channels", "dtype", "high"),
    [(8, 1, "uint8", 255), (28, 5, "uint16", 65535), (33, 3, "float32", 2.5), (256, 2, "uint8", 255)],
)
def test_any_size_channels_and_type(size: int, channels: int, dtype: str, high: float) -> None:
    random = np.random.default_rng(0)
    images = (random.random((12, size, size, channels)) * high).astype(dtype)
    classifier = _train(images, np.arange(12) % 2, 2, steps=2, batch_size=8, high=high)
    prediction = classifier.predict(images)
    assert np.isfinite(prediction.probabilities).all()
    assert np.isfinite(prediction.depths).all()


def test_classes_without_images_get_no_probability(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    kept = np.flatnonzero(np.isin(labels, [2, 7]))[:60]
    probabilities = _train(images, labels[kept], 12, rows=kept).probabilities(images[:50])
    assert probabilities.shape == (50, 12)
    assert (np.delete(probabilities, [2, 7], axis=1) == 0).all()


def test_rare_classes_are_drawn_as_often_as_common_ones(digits: tuple[np.ndarray, np.ndarray]) -> None:
    from synthaug.quality.classifier import ClassifierSettings, _batches

    images, labels = digits
    kept = np.concatenate([np.flatnonzero(labels == 0)[:170], np.flatnonzero(labels == 1)[:3]])
    settings = ClassifierSettings(8, 1, 2, 0, 255, present=(0, 1), steps=30, batch_size=64)
    batches = _batches(images, kept, labels[kept], settings)
    drawn = np.concatenate([next(batches)[1].numpy() for _ in range(30)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(TrainingError, match="0 images and 0 labels"):
        _train(np.empty((0, 8, 8, 1), dtype=np.uint8), np.empty(0, dtype=np.int64), 2)
