"""Images that are another image of the set once more: moved, flipped, turned, cropped, or with other light.

Ultrasound and microscopy sets hold the same view twice, a few pixels apart: the mean square difference of such a
pair is large, and it must not be divided among splits all the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from synthaug.formats.near_duplicates import Pairs
from synthaug.formats.reserved_array import reserved_array
from synthaug.progress import progress
from synthaug.quality.alignment import canvas_for, shrink
from synthaug.quality.arithmetic import chunks, torch_threads
from synthaug.quality.calibration import same_picture
from synthaug.quality.copies import CopySearch, encode, fit_projection
from synthaug.records import PixelSpec

# The search takes minutes for so many, on two cores, and its time grows faster than their number.
MOST_IMAGES = 100_000


def repeated_pairs(path: Path, rows: np.ndarray, spec: PixelSpec, threads: int) -> Pairs:
    """Pairs of images of which one is the other once more, as `calibration.same_picture` has it.

    Args:
        path: images.npy, `[n, size, size, channels]`.
        rows: Which of them are compared; more than `MOST_IMAGES` are not.

    Returns:
        Positions in `rows`, and distances as `synthaug.quality.alignment` defines them.
    """
    nothing = np.empty(0, np.int64)
    if not 2 < len(rows) <= MOST_IMAGES:
        return Pairs(nothing, nothing, np.empty(0), 1.0)
    images: np.ndarray = np.load(path, mmap_mode="r")
    canvas = canvas_for(spec.size)
    with tempfile.TemporaryDirectory() as scratch, torch_threads(1):
        pictures = reserved_array(Path(scratch) / "pictures.npy", np.uint16, (len(rows), canvas.side, canvas.side))
        for piece in chunks(len(rows), images.shape[1:]):
            pictures[piece] = shrink(images[rows[piece]], spec.low, spec.high)
        projection = fit_projection(pictures, canvas, 0)
        search = CopySearch(pictures, encode(pictures, projection, canvas), projection, canvas, threads)
        with progress("looking for moved duplicates", len(rows), "images") as bar:
            distance, other, contrast = search.neighbours(bar.update)
    # Not the nearest alone: a picture may be there more than twice. (Where it is there seven times, nothing else is
    # among the few that are compared, and no contrast is seen.)
    one, place = np.nonzero(same_picture(distance, contrast))
    two = other[one, place]
    first, second = np.minimum(one, two), np.maximum(one, two)
    return Pairs(first, second, distance[one, place].astype(np.float64), 1.0)
