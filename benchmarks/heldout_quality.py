"""Are the contest's samples like images that nobody trained on? Coverage and KID against held-out images.

    python -m benchmarks.heldout_quality --data FOLDER --setting digits      # after its cells, on the same machine

The contest's own coverage and KID (docs/method.md) are the trial's, against the few training images of a scarce class:
what repeats those looks best by it. Here the same samples, before any gate, are held against validation images and
those that `dataset.cut` sets aside, which no method trained on, in the features of the judge's classifier. `coverage`
is relative: 1 is what as many further real images would reach. Beside the methods stand the training images
themselves, copied, and further real images in place of samples. Means over the scarce classes; the interval of KID is
the mean of the classes' own. The test split is never read. Samples stay on the machine that drew them, so that a method
whose cells ran elsewhere is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.method.cells import PEER_SETTINGS, RESULTS, Cell, Place, all_cells, config_of, prepare, records_of
from benchmarks.synthetic_only import draw
from synthaug.errors import SynthaugError
from synthaug.generators import generator_class
from synthaug.quality.classifier import Classifier
from synthaug.quality.coverage import coverage
from synthaug.quality.fidelity import kernel_distance
from synthaug.quality.reference import load_reference
from synthaug.records import IMAGES_FILE, SPLITS_FILE, BalancePlan, Source, Splits

COLUMNS = ("method", "budget, min", "samples", "coverage", "KID", "as class", "training images: coverage", "KID")


class Heldout:
    """Scarce classes of a setting: images trained on, held out, and further ones, as many as samples are asked for."""

    def __init__(self, cell: Cell, place: Place) -> None:
        stages = prepare(config_of(cell, place))
        self.source: Source = stages.last(Source)
        plan: BalancePlan = stages.last(BalancePlan)
        table = pd.read_parquet(stages.last(Splits).directory / SPLITS_FILE)
        images: np.ndarray = np.load(self.source.directory / IMAGES_FILE, mmap_mode="r")
        usable, cut = table["held_back"].isna(), (table["held_back"] == "cut") & (table["split"] == "train")
        random = np.random.default_rng([cell.replicate, 11])
        self.counts = {item.label: item.n_synthetic for item in plan.classes if item.n_synthetic}
        self.training, self.heldout, self.further = {}, {}, {}
        for label, count in self.counts.items():
            here = table["label"] == label
            rows = random.permutation(table.loc[here & (cut | usable & (table["split"] == "validation")), "row"])
            # At most half: there are classes with few more than that.
            count = min(count, len(rows) // 2)
            self.further[label], self.heldout[label] = images[np.sort(rows[:count])], images[np.sort(rows[count:])]
            self.training[label] = images[table.loc[here & usable & (table["split"] == "train"), "row"].to_numpy()]

    def copies(self) -> dict[int, np.ndarray]:
        """Training images over and over, as many as samples are asked for."""
        return {label: own[np.arange(self.counts[label]) % len(own)] for label, own in self.training.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--setting", choices=PEER_SETTINGS, default="pneumonia-60")
    parser.add_argument("--replicate", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1, help="of ours: a row of mean and standard deviation over them")
    given = parser.parse_args()
    if given.draws < 1:
        parser.error(f"--draws is at least 1, not {given.draws}")
    results = given.results.resolve()
    place = Place(results, given.data.resolve(), Path("cache"), 2, 10.0, records=records_of(results))
    cells = [
        cell
        for cell in all_cells(given.replicate + 1)
        if (cell.part, cell.action, cell.setting, cell.replicate) == ("peers", "make", given.setting, given.replicate)
    ]
    judge = next(
        (
            results / record["result"]["judge"]
            for record in (place.load(cell.name) for cell in cells if cell.method == "ours")
            if record is not None and (results / record["result"]["judge"]).is_dir()
        ),
        None,
    )
    if judge is None:
        parser.error(
            f"no run of ours of {given.setting}, replicate {given.replicate}, lies in {results}; "
            f"python -m benchmarks.method --cells 'peers.{given.setting}.r{given.replicate}.ours.*' makes one"
        )
    classifier = load_reference(judge, place.threads).classifier
    real = Heldout(cells[0], place)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for cell in cells:
        samples = samples_of(cell, place, real, given.draws if cell.method == "ours" else 1)
        if samples is not None:
            named = (cell.method, f"{cell.minutes:g}")
            print(f"| {' | '.join((*named, *row(classifier, real, first(samples, real))))} |", flush=True)
            if given.draws > 1 and cell.method == "ours":
                print(f"| {' | '.join((*named, *over_draws(classifier, real, samples, given.draws)))} |", flush=True)
    for name, images in (("training images, copied", real.copies()), ("further real images", real.further)):
        print(f"| {' | '.join((name, '', *row(classifier, real, images)))} |", flush=True)


def first(samples: dict[int, np.ndarray], real: Heldout) -> dict[int, np.ndarray]:
    """As many samples of each class as the contest asks for."""
    return {label: pictures[: real.counts[label]] for label, pictures in samples.items()}


def over_draws(classifier: Classifier, real: Heldout, samples: dict[int, np.ndarray], draws: int) -> list[str]:
    """Cells of a row of coverage and KID against held-out images: mean and standard deviation over draws of the
    contest's size."""
    found = []
    for number in range(draws):
        one = {label: np.split(pictures, draws)[number] for label, pictures in samples.items()}
        if (figures := compared(classifier, real.heldout, one)) is not None:
            found.append(figures)
    if not found:
        return [f"{draws} draws", *[""] * 5]
    (covered, kid, _), (covered_sd, kid_sd, _) = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
    return [f"{draws} draws", f"{covered:.2f} (sd {covered_sd:.2f})", f"{kid:.4f} (sd {kid_sd:.4f})", "", "", ""]


def compared(classifier: Classifier, real: dict[int, np.ndarray], samples: dict[int, np.ndarray]) -> list[float] | None:
    """Relative coverage, KID and half its interval, means over the classes; classes with fewer than 20 samples have
    none, and None where all are such."""
    found = []
    for label, pictures in samples.items():
        own, drawn = classifier.features(real[label]), classifier.features(pictures)
        covered = coverage(own, drawn)
        if covered is not None:
            kid = kernel_distance(own, drawn)
            found.append((covered.relative, kid.estimate, (kid.high - kid.low) / 2))
    return list(np.mean(found, axis=0)) if found else None


def samples_of(cell: Cell, place: Place, real: Heldout, draws: int = 1) -> dict[int, np.ndarray] | None:
    """What a contest's cell drew, by label, [n, h, w, c] as the source's images are; None where it is not here. Of ours
    the checkpoint is kept, and `draws` times as many are drawn from it."""
    record = place.load(cell.name)
    if record is None:
        return None
    if cell.method == "ours":
        checkpoint = place.results / record["result"]["checkpoint"]
        if not checkpoint.is_dir():
            return None
        generator = generator_class("edm").load(checkpoint, device="cpu")
        wanted = {label: draws * count for label, count in real.counts.items()}
        drawn, labels = draw(generator, config_of(cell, place), real.source, wanted)
        return {label: drawn[labels == label] for label in real.counts}
    folder = place.results / record["result"]["samples"]
    if not folder.is_dir():
        return None
    shape = (-1, real.source.pixels.size, real.source.pixels.size, real.source.pixels.channels)
    found = {}
    for label in real.counts:
        pictures = [
            np.asarray(Image.open(path)) for path in sorted((folder / real.source.classes[label]).glob("*.png"))
        ]
        if pictures:
            found[label] = np.stack(pictures).reshape(shape)
    return found


def row(classifier: Classifier, real: Heldout, samples: dict[int, np.ndarray]) -> list[str]:
    """Cells of a method's row."""
    told = []
    for images in (real.heldout, real.training):
        found = compared(classifier, images, samples)
        told.append(["", ""] if found is None else [f"{found[0]:.2f}", f"{found[1]:.4f} ± {found[2]:.4f}"])
    right = [np.mean(classifier.probabilities(pictures).argmax(1) == label) for label, pictures in samples.items()]
    return [str(sum(map(len, samples.values()))), *told[0], f"{np.mean(right):.2f}", *told[1]]


if __name__ == "__main__":
    try:
        main()
    except SynthaugError as error:
        # A cell that is at work holds the run folder of its setting.
        raise SystemExit(str(error)) from None
