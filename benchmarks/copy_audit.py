"""How good and how fast is the search for copies?

    python -m benchmarks.copy_audit                       # planted copies of three real sets, as a table
    python -m benchmarks.copy_audit --scale 100000        # that many samples against that many training images, 64 px

The sets are read from `--data` (../shared/data); BUSI and PneumoniaMNIST are left out where they are absent. Copies
are altered in every way that `synthaug.quality.alterations` knows, written as PNG and read again. Thresholds come from
held-out images as in a run; false alarms are counted group by group.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from synthaug.config import parse_config
from synthaug.judge import judge, near_copy_note
from synthaug.quality.alignment import canvas_for, shrink
from synthaug.quality.alterations import alterations, planted
from synthaug.quality.arithmetic import chunks
from synthaug.quality.calibration import calibrate, clopper_pearson, same_picture
from synthaug.quality.copies import CopySearch, encode, fit_projection
from synthaug.read import read
from synthaug.records import PixelSpec
from synthaug.split import split

_RATE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--copies", type=int, default=500, help="Planted copies of each alteration.")
    parser.add_argument("--scale", type=int, help="Samples and training images of the large trial.")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.scale:
        scale(arguments.data, arguments.scale, arguments.copies, arguments.threads)
    else:
        table(arguments.data, arguments.copies, arguments.threads)


def table(data: Path, copies: int, threads: int) -> None:
    """Run read, split and judge on each set, and print what the judge says of its planted copies."""
    sets = {
        "digits 8": {"dataset": {"format": "digits"}, "image": {"size": 8}},
        "PneumoniaMNIST 28": {
            "dataset": {"format": "medmnist", "path": str(data / "pneumoniamnist.npz")},
            "image": {"size": 28},
        },
        "BUSI 64": {"dataset": {"format": "imagefolder", "path": str(data / "busi64")}, "image": {"size": 64}},
    }
    for name, settings in sets.items():
        path = settings["dataset"].get("path")
        if path is not None and not Path(path).exists():
            print(f"{name}: {path} is not here", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            values = {
                "name": "copies",
                "output": str(root / "out"),
                **settings,
                "split": {"ledger": str(root / "ledger")},
                "audit": {"planted": copies, "classifier_steps": 100},
                "train": {"threads": threads},
            }
            config = parse_config(values)
            places = [root / stage for stage in ("read", "split", "judge")]
            for place in places:
                place.mkdir()
            source = read(config, places[0])
            splits = split(config, source, places[1])
            found = judge(config, source, splits, places[2])
        print(f"\n{name}: {near_copy_note(found.near_copies[0], found.n_train, _RATE)}")
        print(f"| {'alteration':34} | built for | caught | in features |\n|---|---|---|---|")
        for item in found.planted:
            caught, near = item.n_caught / item.n, item.n_in_features / item.n
            print(f"| {item.alteration:34} | {_yes(item.listed)} | {caught:.1%} of {item.n} | {near:.1%} |")


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def scale(data: Path, number: int, copies: int, threads: int) -> None:
    """Search for copies of as many made-up pictures as there are samples; print time, memory and the copies found.

    Pictures are real ones turned, cropped and laid over each other at random, so that all of them differ.
    """
    size = 64
    spec = PixelSpec(
        channels=1, dtype="uint8", colour="grey", low=0.0, high=255.0, size=size, fit="none", interpolation="none",
        smallest=(size, size), largest=(size, size),
    )  # fmt: skip
    every = alterations(size)
    copies = min(copies, number // (2 * len(every)))
    base = _real_pictures(data, size)
    with tempfile.TemporaryDirectory() as scratch:
        images = np.lib.format.open_memmap(f"{scratch}/t.npy", "w+", np.uint8, (number, size, size, 1))
        samples = np.lib.format.open_memmap(f"{scratch}/s.npy", "w+", np.uint8, (number, size, size, 1))
        for seed, array in enumerate((images, samples)):
            _mix(base, array, seed)
        chosen = np.sort(np.random.default_rng(5).permutation(number)[:copies])
        places = np.random.default_rng(6).permutation(number)[: len(every) * copies].reshape(len(every), copies)
        for item, rows in zip(every, places, strict=True):
            samples[rows] = planted(np.asarray(images[chosen]), spec, item, 0)
        started = time.monotonic()
        canvas = canvas_for(size)
        pictures = np.lib.format.open_memmap(f"{scratch}/p.npy", "w+", np.uint16, (number, canvas.side, canvas.side))
        for piece in chunks(number, images.shape[1:]):
            pictures[piece] = shrink(images[piece], 0, 255)
        projection = fit_projection(pictures, canvas, 0)
        search = CopySearch(pictures, encode(pictures, projection, canvas), projection, canvas, threads)
        print(f"built in {time.monotonic() - started:.0f} s", file=sys.stderr)
        distance, contrast = np.empty((2, number), np.float32)
        row = np.empty(number, np.int64)
        for piece in chunks(number, samples.shape[1:]):
            found = search.find(shrink(samples[piece], 0, 255))
            distance[piece], contrast[piece], row[piece] = found.distance, found.contrast, found.row
            if piece.stop % 10_240 < 512:
                print(f"{piece.stop} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        seconds = time.monotonic() - started
    fresh = np.setdiff1d(np.arange(number), places.ravel())
    honest, new = np.split(fresh, 2)
    again = same_picture(distance, contrast)
    held = distance[honest][~again[honest]]
    threshold = calibrate(held, np.arange(len(held)), _RATE).threshold
    new = new[~again[new]]
    alarms = int((distance[new] < threshold).sum())
    low, high = clopper_pearson(alarms, len(new))
    print(
        f"{number} samples against {number} training images at {size} px: {seconds:.0f} s with {threads} threads, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB at most"
    )
    print(f"false alarms {alarms} of {len(new)}: {alarms / len(new):.2%} [{low:.2%}, {high:.2%}]")
    print(f"| {'alteration':34} | built for | caught | its own image named |\n|---|---|---|---|")
    for item, rows in zip(every, places, strict=True):
        caught, named = (distance[rows] < threshold).mean(), (row[rows] == chosen).mean()
        print(f"| {item.name:34} | {_yes(item.listed)} | {caught:.1%} | {named:.1%} |")


def _real_pictures(data: Path, size: int) -> np.ndarray:
    parts = []
    for file in sorted((data / "busi64").rglob("*.png")):
        parts.append(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))
    for name in ("pneumoniamnist.npz", "breastmnist.npz", "fashionmnist_lt100.npz"):
        if (data / name).exists():
            parts += list(np.load(data / name)["train_images"][:4000])
    if not parts:
        raise SystemExit(f"{data} holds none of the sets this trial is made from.")
    return np.stack([cv2.resize(np.ascontiguousarray(part.squeeze()), (size, size)) for part in parts])


def _mix(base: np.ndarray, out: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    size = out.shape[1]
    middle = (size - 1) / 2
    for i in range(len(out)):
        views = []
        for picture in base[random.integers(0, len(base), 2)]:
            matrix = cv2.getRotationMatrix2D((middle, middle), random.uniform(0, 360), random.uniform(1, 1.8))
            matrix[:, 2] += random.uniform(-size / 8, size / 8, 2)
            views.append(cv2.warpAffine(picture, matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101))
        share = random.uniform(0.5, 0.75)
        out[i, ..., 0] = cv2.addWeighted(views[0], share, views[1], 1 - share, 0)


if __name__ == "__main__":
    main()
