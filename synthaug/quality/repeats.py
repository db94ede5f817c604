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
from synthaug.quality.calibration import SAME_PICTURE
from synthaug.quality.copies import fit_projection, nearest_earlier
from synthaug.records import PixelSpec

# With fewer images nobody can say how far apart different ones are.
_LEAST = 50
# The search takes time with the square of the number: minutes for so many, on two cores.
MOST_IMAGES = 100_000


def repeated_pairs(path: Path, rows: np.ndarray, spec: PixelSpec, threads: int) -> Pairs:
    """Pairs of images of which one explains the other far better than images of the set commonly do.

    Common is the median of the distances to the nearest of the earlier images, over the later half of them. Pairs
    nearer than a third of that count. In sets of fewer than 50 images, or more than `MOST_IMAGES`, none is looked for.

    Args:
        path: images.npy, `[n, size, size, channels]`.
        rows: Which of them are compared.

    Returns:
        Positions in `rows`, and distances as `synthaug.quality.alignment` defines them.
    """
    nothing = np.empty(0, np.int64)
    if not _LEAST <= len(rows) <= MOST_IMAGES:
        return Pairs(nothing, nothing, np.empty(0), 0.0)
    images: np.ndarray = np.load(path, mmap_mode="r")
    canvas = canvas_for(spec.size)
    with tempfile.TemporaryDirectory() as scratch, torch_threads(threads):
        pictures = reserved_array(Path(scratch) / "pictures.npy", np.uint16, (len(rows), canvas.side, canvas.side))
        for piece in chunks(len(rows), images.shape[1:]):
            pictures[piece] = shrink(images[rows[piece]], spec.low, spec.high)
        projection = fit_projection(pictures, canvas, 0)
        with progress("looking for moved duplicates", len(rows), "images") as bar:
            distance, earlier = nearest_earlier(pictures, np.arange(len(rows)), projection, canvas, threads, bar.update)
    limit = SAME_PICTURE * float(np.median(distance[len(rows) // 2 :].min(1)))
    later, place = np.nonzero(distance < limit)
    return Pairs(earlier[later, place], later, distance[later, place].astype(np.float64), limit)
