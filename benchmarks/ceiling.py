"""What would further *real* images be worth in place of the samples? No generator can be expected to give more.

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

from benchmarks.method.cells import RESULTS, Caught, Place, prepare, records_of, verdict_figures
from benchmarks.method.settings import SETTINGS, UNCUT, make_config
from synthaug.formats.atomic import whole_directory, write_text
from synthaug.pipeline import evaluate_foreign
from synthaug.records import IMAGES_FILE, SPLITS_FILE, BalancePlan, Source, Splits


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
    for setting in given.settings:
        offered, classes, figures = tried(setting, given.replicate, place)
        real = figures["differences"].get("real", {})
        duplicates = figures["differences"].get("duplicates", {})
        print(
            f"| {setting} | {offered} ({classes}) | {figures['outcome']} | {told(real, 'balanced_accuracy')} | "
            f"{told(real, 'rare_auprc')} | {told(duplicates, 'balanced_accuracy')} | "
            f"{ours(setting, given.replicate, place)} |",
            flush=True,
        )


def tried(setting: str, replicate: int, place: Place) -> tuple[int, str, dict[str, Any]]:
    """Images offered, what of each class's cut-off ones they are, and the figures of their trial."""
    config = make_config(
        SETTINGS[setting], replicate=replicate, minutes=1, output=place.work / f"{setting}.r{replicate}",
        data=place.data, prepared=place.prepared, threads=place.threads, trial_minutes=place.trial_minutes,
    )  # fmt: skip
    stages = prepare(config)
    source, splits, plan = stages.last(Source), stages.last(Splits), stages.last(BalancePlan)
    folder = place.work / "samples" / f"{setting}.r{replicate}.real"
    shutil.rmtree(folder, ignore_errors=True)
    numbers = write_cut_images(source, splits, plan, replicate, folder)
    caught = Caught()
    figures = verdict_figures(evaluate_foreign(config, str(folder), run_stage=caught).verdict)
    write_text(place.results / "ceiling" / f"{setting}.r{replicate}.json", json.dumps(figures, indent=1) + "\n")
    return sum(taken for taken, _ in numbers), ", ".join(f"{taken} of {there}" for taken, there in numbers), figures


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


def told(differences: dict[str, Any], metric: str) -> str:
    found = differences.get(metric)
    if found is None:
        return "not compared"
    return f"{100 * found['estimate']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def ours(setting: str, replicate: int, place: Place) -> str:
    record = place.load(f"utility.{setting}.r{replicate}.b{SETTINGS[setting].minutes:g}.trial")
    if record is None:
        return "not run"
    return told(record["result"]["differences"].get("real", {}), "balanced_accuracy")


if __name__ == "__main__":
    main()
