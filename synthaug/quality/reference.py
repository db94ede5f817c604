"""What the judge leaves for the audit: real training images as canvases and features, and who was held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.errors import LeakError
from synthaug.formats.atomic import whole_file
from synthaug.quality.alignment import Canvas, canvas_for
from synthaug.quality.classifier import Classifier
from synthaug.quality.copies import CopySearch, Projection, picture_hash
from synthaug.records import IMAGES_FILE, SPLITS_FILE, Source, Splits

CLASSIFIER_FILE = "classifier.safetensors"
TRAINING_FILE = "training.parquet"  # row, image_id, label, picture_hash
# row, image_id, label, predicted, probability, distance, distance_ratio, nearest_id, feature_distance, repeats (bool)
HELDOUT_FILE = "heldout.parquet"
# Rows of the following as in training.parquet.
PICTURES_FILE = "pictures.npy"  # [n, side, side] uint16, see `synthaug.quality.alignment.shrink`
CODES_FILE = "codes.npy"  # [n, c] float32, see `synthaug.quality.copies.encode`
DEPTHS_FILE = "depths.npy"  # [n, f] float32
FEATURES_FILE = "features.npy"  # [n, g] float32, of the user's backbone, where there is one
VALUES_FILE = "values.npy"  # [2] float64: the values that canvases are shares of, see `alignment.used_values`
PROJECTION_FILE = "projection.npy"  # see `synthaug.quality.copies.Projection`


@dataclass(frozen=True)
class Reference:
    """The real training images, as the audit sees them."""

    classifier: Classifier
    training: pd.DataFrame
    heldout: pd.DataFrame
    depths: np.ndarray  # [n, f], memory-mapped
    features: np.ndarray  # [n, g], memory-mapped; the depths where there is no backbone of the user's
    values: tuple[float, float]
    canvas: Canvas
    projection: Projection
    search: CopySearch


def load_reference(directory: Path, threads: int) -> Reference:
    """Read what a judge wrote into its directory."""
    depths: np.ndarray = np.load(directory / DEPTHS_FILE, mmap_mode="r")
    own = directory / FEATURES_FILE
    classifier = Classifier.load(directory / CLASSIFIER_FILE, threads)
    canvas, projection = canvas_for(classifier.settings.size), Projection.load(directory / PROJECTION_FILE)
    values: np.ndarray = np.load(directory / VALUES_FILE)
    return Reference(
        classifier=classifier,
        training=pd.read_parquet(directory / TRAINING_FILE),
        heldout=pd.read_parquet(directory / HELDOUT_FILE),
        depths=depths,
        features=np.load(own, mmap_mode="r") if own.exists() else depths,
        values=(float(values[0]), float(values[1])),
        canvas=canvas,
        projection=projection,
        search=CopySearch(
            np.load(directory / PICTURES_FILE, mmap_mode="r"),
            np.load(directory / CODES_FILE, mmap_mode="r"),
            projection,
            canvas,
            threads,
        ),
    )


def usable_rows(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """Rows of one split that are held back for nothing, in order of row."""
    return table[(table["split"] == split) & table["held_back"].isna()].sort_values("row").reset_index(drop=True)


def held_out_pictures(source: Source, splits: Splits) -> dict[str, str]:
    """Hash of every usable validation and test image, the same for its mirror image, to its split.

    Images of one flat tone are left out: there is no picture that could be known again.
    """
    table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["row", "split", "held_back"])
    images: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
    # An image that is in both, mirrored, counts as test.
    return {
        picture_hash(images[row]): split
        for split in ("validation", "test")
        for row in usable_rows(table, split)["row"]
        if not _one_tone(images[row])
    }


def _one_tone(image: np.ndarray) -> bool:
    flat = image.reshape(-1, image.shape[2])
    return bool((flat == flat[0]).all())


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as parquet, whole or not at all."""
    with whole_file(path) as temporary:
        table.to_parquet(temporary, index=False)


def refuse_leaks(splits: Splits, seen: pd.DataFrame | None, reference: Reference, where: str = "") -> None:
    """Refuse to judge a generator by images it learned from, or with images of the test split.

    Args:
        seen: image_id and use ('train' or 'validation') of every image the generator met. None where nobody knows
            them: what the judge itself used is then all there is to check.
        where: The file `seen` was read from, for the error.

    Raises:
        LeakError: An image is on both sides of a line.
    """
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    test = set(table.loc[table["split"] == "test", "image_id"])
    if seen is None:
        seen = pd.DataFrame({"image_id": [], "use": []}, dtype="str")
    trained = set(seen.loc[seen["use"] == "train", "image_id"])
    heldout, training = set(reference.heldout["image_id"]), set(reference.training["image_id"])
    again = "Remove that directory and run again, so that it is made from the splits as they are now."
    lines = (
        (test & set(seen["image_id"]), f"test images were used by the generator, says {where}. {again}"),
        (test & (heldout | training), "test images were used by the judge. Remove its directory and run again."),
        (heldout & training, "images the judge was trained on are among those it was measured on. Run it again."),
        (heldout & trained, f"held-out images that judge the samples were trained on, says {where}. {again}"),
        (
            trained - training,
            f"images the generator trained on are not in the judge's training images, says {where}, so copies of "
            f"them could not be found. {again}",
        ),
    )
    for found, problem in lines:
        if found:
            some = ", ".join(sorted(found)[:3])
            raise LeakError(f"{len(found)} {problem} The first: {some}.")
