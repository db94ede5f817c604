"""Stage: learn what real images look like, so that samples can be judged. Only training and validation are read."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_array, digest_file, digest_json
from synthaug.errors import DatasetError
from synthaug.formats.reserved_array import reserved_array
from synthaug.progress import progress
from synthaug.records import IMAGES_FILE, SPLITS_FILE, Judge, Source, Splits

if TYPE_CHECKING:
    from synthaug.quality.classifier import Classifier

logger = logging.getLogger(__name__)

# With fewer held-out distances the percentile lies at or near the smallest of them, and the note says so.
_FEW_HELDOUT = 100


def judge(config: Config, source: Source, splits: Splits, directory: Path) -> Judge:
    """Train a classifier on the real training images, measure it on validation, calibrate the near-copy distance.

    Writes classifier.safetensors and .json, training.parquet, descriptors.npy, depths.npy and heldout.parquet (see
    `synthaug.quality.reference`). Validation images serve three things here: the accuracy that is reported, the
    classifier's temperature, and the distance. Test images are never read.

    Raises:
        DatasetError: No usable training image.
        TrainingError: The classifier's loss is not a number.
    """
    from synthaug.quality.arithmetic import torch_threads
    from synthaug.quality.classifier import train_classifier
    from synthaug.quality.reference import CLASSIFIER_FILE, HELDOUT_FILE, TRAINING_FILE, usable_rows, write_table

    started = time.monotonic()
    images: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    training, heldout = usable_rows(table, "train"), usable_rows(table, "validation")
    if training.empty:
        raise DatasetError("the training split has no usable image, so there is nothing to judge samples by.")
    classifier = train_classifier(
        images,
        training["label"].to_numpy(),
        len(source.classes),
        low=source.pixels.low,
        high=source.pixels.high,
        steps=config.audit.classifier_steps,
        seed=config.seed,
        threads=config.train.threads,
        rows=training["row"].to_numpy(),
    )
    with torch_threads(config.train.threads):
        training["picture_hash"] = _hash(images, training["row"].to_numpy())
        heldout, n_copies = _drop_copies(images, heldout, training)
        rows, labels = heldout["row"].to_numpy(), heldout["label"].to_numpy()
        if len(heldout):
            classifier = classifier.calibrate(images, labels, rows)
        _describe_training(classifier, images, training["row"].to_numpy(), source, directory)
        heldout = _measure(classifier, images, heldout, source, directory)
    threshold, note = calibrate_threshold(
        heldout["distance"].to_numpy(), len(training), config.audit.near_copy_percentile, n_copies
    )
    if n_copies or len(heldout) < _FEW_HELDOUT:
        logger.warning("%s", note)

    classifier.save(directory / CLASSIFIER_FILE)
    write_table(training[["row", "image_id", "label", "picture_hash"]], directory / TRAINING_FILE)
    write_table(heldout, directory / HELDOUT_FILE)
    accuracy = _balanced_accuracy(labels, heldout["predicted"].to_numpy())
    _say_how_good(accuracy, labels, source)
    content = {
        "classifier": [digest_file((directory / CLASSIFIER_FILE).with_suffix(s)) for s in (".safetensors", ".json")],
        "training": list(training["image_id"]),
        "heldout": list(heldout["image_id"]),
        "distances": digest_array(heldout["distance"].to_numpy()),
        "threshold": threshold,
        "accuracy": accuracy,
    }
    return Judge(
        directory=directory,
        digest=digest_json(content),
        n_train=len(training),
        validation_balanced_accuracy=accuracy,
        near_copy_threshold=threshold,
        near_copy_note=note,
        n_heldout=len(heldout),
        seconds=round(time.monotonic() - started, 3),
    )


def calibrate_threshold(
    distances: np.ndarray, n_train: int, percentile: float, n_copies: int = 0
) -> tuple[float | None, str]:
    """Return the near-copy threshold and what it rests on.

    An honest new image is as near to the training images as held-out real images are. What is nearer than the
    given percentile of those, pooled over classes, is called a near-copy; so about that percentage of honest
    images is called one by mistake.

    Args:
        distances: Of held-out real images to their nearest training image of any class.
        percentile: 0..50.
        n_copies: Held-out images that were left out as copies of training images, for the note.

    Returns:
        None for the threshold where there is no held-out image: only exact copies can be found then.
    """
    left_out = f" {n_copies} held-out images are copies of training images and were left out of it." if n_copies else ""
    if len(distances) == 0:
        return None, (
            "There is no held-out real image to calibrate the near-copy distance on: only exact and mirrored copies "
            f"are found.{left_out} A validation split (split.validation) would allow it."
        )
    note = (
        f"Percentile {percentile:g} of the distances of {len(distances)} held-out real images (validation, all classes "
        f"pooled) to the nearest of {n_train} training images, mirrored or not.{left_out}"
    )
    if len(distances) < _FEW_HELDOUT:
        note += (
            f" So few say little about a percentile that low: about 1 in {len(distances) + 1} honest images may be "
            f"called a near-copy. With {_FEW_HELDOUT} held-out images or more it would be firmer."
        )
    return float(np.percentile(distances, percentile)), note


def _hash(images: np.ndarray, rows: np.ndarray) -> list[str]:
    from synthaug.quality.copies import picture_hash

    return [picture_hash(images[row]) for row in rows]


def _drop_copies(images: np.ndarray, heldout: pd.DataFrame, training: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Without held-out images that are training images, as they are or mirrored: they measure nothing."""
    known = set(training["picture_hash"])
    copies = np.array([value in known for value in _hash(images, heldout["row"].to_numpy())], dtype=bool)
    return heldout[~copies].reset_index(drop=True), int(copies.sum())


def _describe_training(
    classifier: Classifier, images: np.ndarray, rows: np.ndarray, source: Source, directory: Path
) -> None:
    """Write descriptors and features of the training images, piece by piece."""
    from synthaug.quality.arithmetic import chunks
    from synthaug.quality.copies import describe, descriptor_length
    from synthaug.quality.reference import DEPTHS_FILE, DESCRIPTORS_FILE

    pixels = source.pixels
    length = descriptor_length(pixels.size, pixels.channels)
    descriptors = reserved_array(directory / DESCRIPTORS_FILE, np.float32, (len(rows), length))
    depths = reserved_array(directory / DEPTHS_FILE, np.float32, (len(rows), classifier.n_depths))
    with progress("judge: training images", len(rows), "images") as bar:
        for piece in chunks(len(rows), images.shape[1:]):
            values = images[rows[piece]]
            descriptors[piece] = describe(values, pixels.low, pixels.high)
            depths[piece] = classifier.predict(values).depths
            bar.update(len(values))
    descriptors.flush()
    depths.flush()


def _measure(
    classifier: Classifier, images: np.ndarray, heldout: pd.DataFrame, source: Source, directory: Path
) -> pd.DataFrame:
    """The held-out table with what the classifier says and the distance to the nearest training image."""
    from synthaug.quality.arithmetic import chunks
    from synthaug.quality.copies import describe, match
    from synthaug.quality.reference import DESCRIPTORS_FILE

    pixels = source.pixels
    references: np.ndarray = np.load(directory / DESCRIPTORS_FILE, mmap_mode="r")
    rows = heldout["row"].to_numpy()
    predicted = np.empty(len(rows), dtype=np.int64)
    probability = np.empty(len(rows), dtype=np.float32)
    distance = np.empty(len(rows), dtype=np.float32)
    with progress("judge: held-out images", len(rows), "images") as bar:
        for piece in chunks(len(rows), images.shape[1:]):
            values = images[rows[piece]]
            probabilities = classifier.probabilities(values)
            predicted[piece] = probabilities.argmax(1)
            probability[piece] = probabilities[np.arange(len(values)), heldout["label"].to_numpy()[piece]]
            distance[piece] = match(
                describe(values, pixels.low, pixels.high), references, pixels.channels, tick=bar.update
            ).distance
    return heldout[["row", "image_id", "label"]].assign(predicted=predicted, probability=probability, distance=distance)


def _balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float | None:
    """Mean over classes of the share of their images that were recognised."""
    if len(labels) == 0:
        return None
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


def _say_how_good(accuracy: float | None, labels: np.ndarray, source: Source) -> None:
    chance = 1 / len(source.classes)
    if accuracy is None:
        logger.warning("the judge's classifier could not be measured: there is no validation image.")
    elif accuracy < 1.5 * chance:
        logger.warning(
            "the judge's classifier reaches a balanced accuracy of %.2f on %d validation images, where guessing "
            "reaches %.2f: it cannot tell the classes apart, so class agreement means little.",
            accuracy, len(labels), chance,
        )  # fmt: skip
    else:
        logger.info("judge: balanced accuracy %.3f on %d validation images", accuracy, len(labels))
