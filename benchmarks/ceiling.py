"""What would further *real* images be worth in place of the samples? Image for image, no generator gives better ones.

    python -m benchmarks.ceiling --data FOLDER                           # all five; --settings pneumonia-20 for one

Settings of `benchmarks.method` in which the scarce classes were cut have real training images that the cut set aside.
As many of them as the plan asks for samples (or as there are) are offered as samples, and the same trial says what they
are worth on test: same split, arms, seeds, doses and controls as with our own. One line a setting, in points with the
trial's 95 % intervals, and beside it what the benchmark's record has for our samples. Every trial is a look at its test
images, counted as any other. Two threads; as long as a trial takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.method.cells import (
    RESULTS,
    Cell,
    Place,
    all_cells,
    config_of,
    finite,
    prepare,
    records_of,
    verdict_figures,
)
from benchmarks.method.settings import SETTINGS, UNCUT
from synthaug.formats.atomic import whole_directory, write_text
from synthaug.pipeline import evaluate_foreign
from synthaug.records import IMAGES_FILE, SPLITS_FILE, BalancePlan, Interval, Source, Splits
from synthaug.report.verdict_words import points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    cut = [name for name in SETTINGS if name not in UNCUT]
    parser.add_argument("--settings", nargs="+", choices=cut, default=cut)
    parser.add_argument("--replicate", type=int, default=0)
    given = parser.parse_args()
    place = Place(
        given.results.resolve(), given.data.resolve(), Path("cache"), 2, 10.0, records=records_of(given.results)
    )
    columns = ("setting", "real images offered (of cut ones)", "verdict", "minus the best real-only arm")
    more = ("… rare AUPRC", "minus duplicates", "our samples minus the best real-only arm")
    print(f"| {' | '.join((*columns, *more))} |\n|{'---|' * 7}")
    # By the cells of our own trials: split, plan and minutes are one for both.
    wanted = {("utility", "trial", given.replicate, setting) for setting in given.settings}
    for cell in all_cells(given.replicate + 1):
        if (cell.part, cell.action, cell.replicate, cell.setting) not in wanted:
            continue
        offered, found = tried(cell, place)
        ours = place.load(cell.name)
        row = [cell.setting, offered, found["outcome"], *told(found)]
        row.append("not run" if ours is None else told(ours["result"])[0])
        print(f"| {' | '.join(row)} |", flush=True)


def tried(cell: Cell, place: Place) -> tuple[str, dict[str, Any]]:
    """What is offered, in words, and the figures of its trial."""
    config = config_of(cell, place)
    stages = prepare(config)
    folder = real_images(cell, place)
    shutil.rmtree(folder, ignore_errors=True)
    numbers = write_cut_images(
        stages.last(Source), stages.last(Splits), stages.last(BalancePlan), cell.replicate, folder
    )
    figures = verdict_figures(evaluate_foreign(config, str(folder)).verdict)
    path = place.results / "ceiling" / f"{cell.setting}.r{cell.replicate}.json"
    write_text(path, json.dumps(finite(figures), indent=1) + "\n")
    each = ", ".join(f"{taken} of {there}" for taken, there in numbers)
    return f"{sum(taken for taken, _ in numbers)} ({each})", figures


def real_images(cell: Cell, place: Place) -> Path:
    return place.work / "samples" / f"{cell.setting}.r{cell.replicate}.real"


def write_cut_images(
    source: Source, splits: Splits, plan: BalancePlan, seed: int, folder: Path
) -> list[tuple[int, int]]:
    """Write PNGs `folder`/CLASS/ROW.png of real training images that the cut set aside, drawn by `seed`, at most as
    many of each class as its plan asks for. Returns how many of how many, a pair a raised class."""
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    table = table[(table["held_back"] == "cut") & (table["split"] == "train")]
    images: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
    random, numbers = np.random.default_rng([seed, 7]), []
    with whole_directory(folder) as temporary:
        for item in plan.classes:
            rows = table.loc[table["label"] == item.label, "row"].to_numpy(np.int64)
            if not item.n_synthetic or not len(rows):
                continue
            chosen = random.permutation(rows)[: item.n_synthetic]
            (temporary / source.classes[item.label]).mkdir()
            for row in chosen:
                picture = Image.fromarray(images[row].squeeze(-1) if images.shape[-1] == 1 else images[row])
                picture.save(temporary / source.classes[item.label] / f"{row}.png")
            numbers.append((len(chosen), len(rows)))
    return numbers


def told(figures: dict[str, Any]) -> list[str]:
    """Against the best real-only arm: balanced accuracy, rare AUPRC; against duplicates: balanced accuracy."""
    compared = (("real", "balanced_accuracy"), ("real", "rare_auprc"), ("duplicates", "balanced_accuracy"))
    found = [figures["differences"].get(against, {}).get(metric) for against, metric in compared]
    return ["not compared" if item is None else points(Interval(**item)) for item in found]


if __name__ == "__main__":
    main()
