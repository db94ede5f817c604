"""Trained on synthetic images alone: how near does a classifier come to one trained on as many real images?

    python benchmarks/synthetic_only.py configs/pneumoniamnist.yaml

Takes the checkpoint of a finished run, draws as many images of every class as its training split has real ones
(with `--per-class N` also N of each), trains the same small classifier on real and on synthetic images
with the same steps and seeds, and prints the balanced accuracy on the test split: mean, standard deviation over
the seeds, and the ratio. No sample is filtered. The test split is looked at for this report and for no choice.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pandas as pd

from synthaug.config import load_config
from synthaug.generators import generator_class
from synthaug.generators.canonical import sample_seed
from synthaug.generators.interface import Generator
from synthaug.quality.classifier import train_classifier
from synthaug.records import DONE_FILE, IMAGES_FILE, PIPELINE_DIR, SPLITS_FILE, Checkpoint, Source, Splits

# Apart from the indices a run itself draws, so that no image of a release is judged here.
FIRST_INDEX = 10_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--per-class", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    stages = config.output_path / "stages"
    source, splits, checkpoint = (
        newest(stages, name, kind) for name, kind in (("read", Source), ("split", Splits), ("train", Checkpoint))
    )
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    table = table[table["held_back"].isna()]
    images = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
    training, test = table[table["split"] == "train"], table[table["split"] == "test"]
    counts = training["label"].value_counts().sort_index()
    generator = generator_class(checkpoint.generator).load(checkpoint.directory / PIPELINE_DIR, device="cpu")
    real = images[training["row"].to_numpy()], training["label"].to_numpy()
    targets = images[test["row"].to_numpy()], test["label"].to_numpy()

    def judge(name: str, pictures: np.ndarray, labels: np.ndarray) -> float:
        scores = []
        for seed in range(arguments.seeds):
            classifier = train_classifier(
                pictures,
                labels,
                len(source.classes),
                low=source.pixels.low,
                high=source.pixels.high,
                steps=arguments.steps,
                seed=seed,
                threads=config.train.threads,
            )
            found = classifier.probabilities(targets[0]).argmax(1)
            scores.append(np.mean([np.mean(found[targets[1] == k] == k) for k in np.unique(targets[1])]))
        mean, spread = float(np.mean(scores)), float(np.std(scores, ddof=1))
        print(f"{name:48} {mean:.3f} +- {spread:.3f}   ({', '.join(f'{score:.3f}' for score in scores)})", flush=True)
        return mean

    base = judge(f"real, {counts.to_dict()}", *real)
    same = draw(generator, config, source, counts.to_dict())
    print(f"  ratio {judge('synthetic, the same numbers', *same) / base:.3f}")
    if arguments.per_class:
        more = draw(generator, config, source, dict.fromkeys(counts.index.tolist(), arguments.per_class))
        print(f"  ratio {judge(f'synthetic, {arguments.per_class} of each', *more) / base:.3f}")


def draw(generator: Generator, config, source: Source, counts: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Images and labels, `counts[label]` of each class."""
    pictures, labels = [], []
    guidance = config.sample.guidance
    steps = config.sample.steps or generator.default_steps(guidance)
    for label, count in counts.items():
        for start in range(0, count, 128):
            n = min(128, count - start)
            seeds = [sample_seed(config.seed, source.classes[label], FIRST_INDEX + start + k) for k in range(n)]
            pictures.append(generator.sample([label] * n, seeds, steps=steps, guidance=guidance))
            labels += [label] * n
    return np.concatenate(pictures), np.array(labels)


def newest(stages, name: str, kind):  # type: ignore[no-untyped-def]
    """The record of the stage that finished last."""
    done = max(stages.glob(f"{name}-*/{DONE_FILE}"), key=lambda path: path.stat().st_mtime)
    return kind.from_plain(json.loads(done.read_text())["record"], done.parent)


if __name__ == "__main__":
    main()
