"""Stage: learn what real images look like, so that samples can be judged. Only training and validation are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_array, digest_file, digest_json
from synthaug.errors import DatasetError
from synthaug.formats.reserved_array import reserved_array
from synthaug.progress import progress
from synthaug.records import IMAGES_FILE, SPLITS_FILE, Judge, NearnessTest, PlantedCopies, Source, Splits
from synthaug.text import printable

if TYPE_CHECKING:
    from synthaug.quality.classifier import Classifier
    from synthaug.quality.reference import Reference

logger = logging.getLogger(__name__)

# Images [n, size, size, channels] and rows of them to features [rows, f] float32.
Look = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Share of the planted copies of a listed alteration under which the search is said to miss them.
_LEAST_CAUGHT = 0.9
# Alterations of which none may be missed.
SURE = ("exact", "mirrored", "upside down")
# With fewer held-out distances the percentile lies at or near the smallest of them, and the note says so.
_FEW_HELDOUT = 100


def judge(config: Config, source: Source, splits: Splits, directory: Path) -> Judge:
    """Train a classifier on the real training images, measure it on validation, calibrate the near-copy distance.

    Writes the files that `synthaug.quality.reference` names. Validation images serve three things here: the accuracy
    that is reported, the classifier's temperature, and the distance. Test images are never read. Altered copies of
    training images are planted at last, to see how many of them the calibrated distance finds.

    Raises:
        DatasetError: No usable training image.
        TrainingError: The classifier's loss is not a number.
    """
    from synthaug.quality.arithmetic import torch_threads
    from synthaug.quality.classifier import train_classifier
    from synthaug.quality.reference import (
        CLASSIFIER_FILE,
        HELDOUT_FILE,
        PROJECTION_FILE,
        TRAINING_FILE,
        load_reference,
        usable_rows,
        write_table,
    )

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
        classifier.save(directory / CLASSIFIER_FILE)
        write_table(training[["row", "image_id", "label", "picture_hash"]], directory / TRAINING_FILE)
        look, features = _features(config, source, classifier)
        _describe_training(classifier, look, images, training["row"].to_numpy(), source, config, directory)
        write_table(heldout, directory / HELDOUT_FILE)  # For the reference to be whole; written again below.
        reference = load_reference(directory, config.train.threads)
        heldout = _measure(reference, look, images, heldout, source)
        rate = config.audit.near_copy_percentile / 100
        tests = _calibrate(heldout, "distance", source.classes, rate)
        feature_test = _calibrate(heldout, "feature_distance", (), rate)[0]
        found = Judge(
            directory=directory,
            digest="",
            n_train=len(training),
            validation_balanced_accuracy=_balanced_accuracy(labels, heldout["predicted"].to_numpy()),
            near_copy_threshold=tests[0].threshold,
            near_copy_note=near_copy_note(tests[0], len(training), rate, n_copies),
            near_copies=tests,
            feature_test=feature_test,
            features=features,
            n_heldout=len(heldout),
            seconds=0.0,
        )
        found = found.model_copy(
            update={"planted": plant_copies(found, reference, look, images, source, config.audit.planted, config.seed)}
        )
    write_table(heldout.drop(columns="group_key"), directory / HELDOUT_FILE)
    _say_what_repeats(heldout, source)
    if found.near_copy_threshold is None or n_copies or tests[0].n_heldout < _FEW_HELDOUT:
        logger.warning("%s", found.near_copy_note)
    if missed := missed_copies(found.planted):
        logger.warning("%s", missed)
    _say_how_good(found.validation_balanced_accuracy, labels, source)
    content = {
        "classifier": [digest_file((directory / CLASSIFIER_FILE).with_suffix(s)) for s in (".safetensors", ".json")],
        "training": list(training["image_id"]),
        "heldout": list(heldout["image_id"]),
        "distances": digest_array(heldout["distance"].to_numpy()),
        "projection": digest_file(directory / PROJECTION_FILE),
        "record": found.model_dump(mode="json", exclude={"directory", "seconds", "digest"}),
    }
    return found.model_copy(update={"digest": digest_json(content), "seconds": round(time.monotonic() - started, 3)})


def missed_copies(planted: Sequence[PlantedCopies]) -> str | None:
    """What to say where the search misses copies it is built for: exact or flipped ones, or a tenth of any other."""
    missed = [
        f"'{item.alteration}' {item.n_caught} of {item.n}"
        for item in planted
        if item.listed and item.n_caught < (1.0 if item.alteration in SURE else _LEAST_CAUGHT) * item.n
    ]
    if not missed:
        return None
    return (
        f"The search for copies misses many that were planted here ({', '.join(missed[:4])}"
        f"{', …' if missed[4:] else ''}): near-copies may pass the audit. Images of little contrast in their range of "
        "values, or a validation split that holds training images again, are the usual reasons."
    )


def near_copy_note(test: NearnessTest, n_train: int, rate: float, n_copies: int = 0) -> str:
    """What the near-copy distance rests on, in words.

    Args:
        test: Of all classes together.
        rate: Of honest images that may be called near-copies, 0 to 1.
        n_copies: Held-out images that were left out as exact copies of training images.
    """
    from synthaug.quality.calibration import LEAST_MEASURED, place

    left_out = f" {n_copies} held-out images are copies of training images and were left out of it." if n_copies else ""
    if test.n_repeats:
        left_out += (
            f" {test.n_repeats} more are training images once more, moved or changed a little, and were left out too."
        )
    if test.threshold is None:
        return (
            "There is no held-out real image to calibrate the near-copy distance on: only exact and mirrored copies "
            f"are found.{left_out} A validation split (split.validation) would allow it."
        )
    expected = place(test.n_groups, rate) / (test.n_groups + 1)
    of = "" if test.n_groups == test.n_heldout else f" in {test.n_groups} groups"
    note = (
        f"Chosen so that about {expected:.1%} of honest images would be called near-copies, by the distances of "
        f"{test.n_heldout} held-out real images{of} (validation) to the nearest of {n_train} training images."
    )
    if test.alarm_rate is not None and test.alarm_bounds is not None:
        note += (
            f" Of these, {test.alarms} ({test.alarm_rate:.1%}; 95 % interval {test.alarm_bounds[0]:.1%} to "
            f"{test.alarm_bounds[1]:.1%}) would be, each judged by the distance that the others give."
        )
    else:
        note += f" How many of these would be is unavailable under {LEAST_MEASURED} images or groups."
    note += left_out
    if expected > 1.05 * rate:
        least = f"{round(1 / rate) - 1}" if rate else "more than any number of"
        note += f" So few cannot show a share as small as {rate:.1%}: that takes {least} held-out images or groups."
    return note


def plant_copies(
    judge: Judge, reference: Reference, look: Look, images: np.ndarray, source: Source, number: int, seed: int
) -> tuple[PlantedCopies, ...]:
    """Alter training images in every way of `synthaug.quality.alterations` and count how many are found again.

    Args:
        number: Training images of each alteration, drawn by `seed`; all, where there are fewer.
    """
    from synthaug.quality.alignment import shrink
    from synthaug.quality.alterations import alterations, planted
    from synthaug.quality.arithmetic import chunks

    if number == 0 or judge.near_copy_threshold is None:
        return ()
    random, training = np.random.default_rng(seed), reference.training
    chosen = np.sort(random.permutation(len(training))[:number])
    rows, labels = training["row"].to_numpy()[chosen], training["label"].to_numpy()[chosen]
    thresholds = np.array([judge.threshold_of(source.classes[label]) for label in labels])
    known = set(training["picture_hash"])
    limit = judge.feature_test.threshold if judge.feature_test else None
    every = alterations(source.pixels.size)
    results = []
    with progress("judge: planted copies", len(every) * len(chosen), "images") as bar:
        for alteration in every:
            caught = in_features = 0
            for piece in chunks(len(rows), images.shape[1:]):
                copies = planted(
                    np.asarray(images[rows[piece]]), source.pixels, alteration, seed, reference.values, piece.start
                )
                distance = reference.search.find(shrink(copies, *reference.values)).distance
                exact = np.array([value in known for value in _hash(copies, np.arange(len(copies)))])
                caught += int(((distance < thresholds[piece]) | exact).sum())
                if limit is not None:
                    feature = _feature_distances(look(copies, np.arange(len(copies))), reference)
                    in_features += int((feature < limit).sum())
                bar.update(len(copies))
            results.append(
                PlantedCopies(
                    alteration=alteration.name,
                    listed=alteration.listed,
                    n=len(chosen),
                    n_caught=caught,
                    n_in_features=in_features,
                )
            )
    return tuple(results)


def _features(config: Config, source: Source, classifier: Classifier) -> tuple[Look, str]:
    """What gives the features of images, and its name."""
    from synthaug.trial.backbone import features_by

    own = features_by(config.evaluate.backbone, source, config.train.threads)
    if own is not None and config.evaluate.backbone is not None:
        return own, Path(config.evaluate.backbone).name
    return lambda images, rows: classifier.predict(images, rows).depths, "the judge's classifier"


def _feature_distances(features: np.ndarray, reference: Reference) -> np.ndarray:
    from synthaug.quality.arithmetic import nearest

    return nearest(features, reference.features, 1)[0][:, 0]


def _hash(images: np.ndarray, rows: np.ndarray) -> list[str]:
    from synthaug.quality.copies import picture_hash

    return [picture_hash(images[row]) for row in rows]


def _drop_copies(images: np.ndarray, heldout: pd.DataFrame, training: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Without held-out images that are training images, as they are or mirrored: they measure nothing."""
    known = set(training["picture_hash"])
    copies = np.array([value in known for value in _hash(images, heldout["row"].to_numpy())], dtype=bool)
    return heldout[~copies].reset_index(drop=True), int(copies.sum())


def _describe_training(
    classifier: Classifier,
    look: Look,
    images: np.ndarray,
    rows: np.ndarray,
    source: Source,
    config: Config,
    directory: Path,
) -> None:
    """Write canvases, codes and features of the training images, piece by piece."""
    from synthaug.quality.alignment import canvas_for, shrink, used_values
    from synthaug.quality.arithmetic import chunks
    from synthaug.quality.copies import encode, fit_projection
    from synthaug.quality.reference import (
        CODES_FILE,
        DEPTHS_FILE,
        FEATURES_FILE,
        PICTURES_FILE,
        PROJECTION_FILE,
        VALUES_FILE,
    )

    canvas, used = canvas_for(source.pixels.size), used_values(images, rows, source.pixels, config.seed)
    np.save(directory / VALUES_FILE, np.array(used, dtype=np.float64))
    pictures = reserved_array(directory / PICTURES_FILE, np.uint16, (len(rows), canvas.side, canvas.side))
    depths = reserved_array(directory / DEPTHS_FILE, np.float32, (len(rows), classifier.n_depths))
    own: np.memmap | None = None
    if config.evaluate.backbone is not None:
        length = look(images, rows[:1]).shape[1]
        own = reserved_array(directory / FEATURES_FILE, np.float32, (len(rows), length))
    with progress("judge: training images", len(rows), "images") as bar:
        for piece in chunks(len(rows), images.shape[1:]):
            values = images[rows[piece]]
            pictures[piece] = shrink(values, *used)
            depths[piece] = classifier.predict(values).depths
            if own is not None:
                own[piece] = look(values, np.arange(len(values)))
            bar.update(len(values))
    projection = fit_projection(pictures, canvas, config.seed)
    projection.save(directory / PROJECTION_FILE)
    codes = reserved_array(directory / CODES_FILE, np.float32, (len(rows), projection.axes.shape[1]))
    for piece in chunks(len(rows), pictures.shape[1:]):
        codes[piece] = encode(pictures[piece], projection, canvas)
    for array in (pictures, depths, codes, *(() if own is None else (own,))):
        array.flush()


def _measure(
    reference: Reference, look: Look, images: np.ndarray, heldout: pd.DataFrame, source: Source
) -> pd.DataFrame:
    """The held-out table with what the classifier says and how near the nearest training image is."""
    from synthaug.quality.alignment import shrink
    from synthaug.quality.arithmetic import chunks
    from synthaug.quality.calibration import same_picture

    classifier = reference.classifier
    rows, ids = heldout["row"].to_numpy(), reference.training["image_id"].to_numpy()
    numbers = {
        name: np.empty(len(rows), dtype=np.float32)
        for name in ("probability", "distance", "distance_ratio", "contrast", "feature_distance")
    }
    predicted, nearest = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=object)
    with progress("judge: held-out images", len(rows), "images") as bar:
        for piece in chunks(len(rows), images.shape[1:]):
            values = images[rows[piece]]
            probabilities = classifier.probabilities(values)
            predicted[piece] = probabilities.argmax(1)
            numbers["probability"][piece] = probabilities[np.arange(len(values)), heldout["label"].to_numpy()[piece]]
            found = reference.search.find(shrink(values, *reference.values), tick=bar.update)
            numbers["distance"][piece], numbers["distance_ratio"][piece] = found.distance, found.ratio
            numbers["contrast"][piece] = found.contrast
            nearest[piece] = ids[found.row]
            numbers["feature_distance"][piece] = _feature_distances(look(values, np.arange(len(values))), reference)
    return heldout[["row", "image_id", "label", "group_key"]].assign(
        predicted=predicted,
        nearest_id=pd.Series(nearest, dtype="str"),
        **numbers,
        repeats=same_picture(numbers["distance"], numbers["contrast"]),
    )


def _calibrate(heldout: pd.DataFrame, column: str, classes: Sequence[str], rate: float) -> tuple[NearnessTest, ...]:
    """The test of all classes together, then of each."""
    from synthaug.quality.calibration import LEAST_MEASURED, LEAST_OWN, calibrate, clopper_pearson

    honest = heldout[~heldout["repeats"]]
    labels, repeated = honest["label"].to_numpy(), heldout.loc[heldout["repeats"], "label"].to_numpy()
    distances, groups = honest[column].to_numpy(), honest["group_key"].to_numpy()
    together = calibrate(distances, groups, rate) if len(honest) else None
    thresholds = np.full(len(honest), np.nan if together is None else together.threshold)
    alarms = np.zeros(len(honest), dtype=bool) if together is None else together.alarms.copy()
    own = np.zeros(len(classes), dtype=bool)
    for label in range(len(classes)):
        mine = labels == label
        if len(np.unique(groups[mine])) >= LEAST_OWN:
            found = calibrate(distances[mine], groups[mine], rate)
            thresholds[mine], alarms[mine], own[label] = found.threshold, found.alarms, True

    def test(name: str | None, mine: np.ndarray, threshold: float | None, pooled: bool, n_repeats: int) -> NearnessTest:
        n, n_groups, hits = int(mine.sum()), len(np.unique(groups[mine])), int(alarms[mine].sum())
        enough = n_groups >= LEAST_MEASURED and together is not None and together.measured
        # Images of a group stand and fall together: the interval is that of as many images as there are groups.
        bounds = clopper_pearson(hits * n_groups / n, n_groups) if enough else None
        return NearnessTest(
            name=name, threshold=threshold, pooled=pooled, n_heldout=n, n_groups=n_groups, n_repeats=n_repeats,
            alarms=hits, alarm_rate=hits / n if enough else None, alarm_bounds=bounds,
        )  # fmt: skip

    shared = None if together is None else together.threshold
    tests = [test(None, np.ones(len(honest), dtype=bool), shared, False, len(repeated))]
    for label, name in enumerate(classes):
        mine = labels == label
        threshold = float(thresholds[mine][0]) if own[label] else shared
        tests.append(test(name, mine, threshold, not own[label], int((repeated == label).sum())))
    return tuple(tests)


def _say_what_repeats(heldout: pd.DataFrame, source: Source) -> None:
    """Held-out images that are training images again mean that the splits leak."""
    repeats = heldout[heldout["repeats"]]
    if len(repeats):
        some = ", ".join(f"{a} of {b}" for a, b in repeats[["image_id", "nearest_id"]].head(3).to_numpy())
        logger.warning(
            "%d of %d validation images of %s are training images once more, moved or changed a little: the splits "
            "leak (%s). A column that groups them (dataset.columns.group) would keep them together.",
            len(repeats), len(heldout), printable(source.name), some,
        )  # fmt: skip


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
