"""Which recipe makes the best samples? Variants of training and sampling, each trained for the same time, on images
that no choice of a user's rests on.

    python -m benchmarks.recipe --data FOLDER --setting pneumonia-60 --minutes 3 "batch_size=16" "width=32,fold=2"
    python -m benchmarks.recipe --data FOLDER --setting pneumonia-60 --checkpoint NAME "guidance=1.5,low=0.3,high=5"

A variant is a list of `key=value`, separated by commas (by semicolons where a value holds commas). Keys are settings
of `train`; a key with a colon, `synthaug.diffusion.edm:SIGMA_LOG_MEAN=-1.2`, is a constant of a module;
`optimizer=adam`, `network=dit:192:6` (width, depth), `network=tail:4:0` (rank of what the U-Net has for class 0
alone), `network=levels:1` (of the U-Net), `contrast=0.1` and `augmented=0/0.12` (probability in base and
fine-tuning, for all classes) are leads of `benchmarks.recipe_leads`; so is `averages=0.01/0.05/0.2`, moving averages of
these half-lives beside each other in one training, each measured by itself as it is at the end. With `--checkpoint`
they are ways to draw from it:
`steps` alone as a run draws; `guidance`, `low`, `high`, `weaker`, `start` and `sigma` by `recipe_leads.solve`;
`solver=ddim` with `steps`, and `filter=prototype`; `samples=real` takes images that `dataset.cut` sets aside in place
of samples. The empty variant is the default recipe. Each is measured on the scarce classes by

- the mean denoising loss of held-out images at fixed noise levels, and `told`: by how much it tells training images
  from them (AUC; 0.5 is guessing),
- KID and coverage in the features of the classifier trained on the real training images; coverage is the mean over
  draws of 200 samples, `coverage_sd` the standard deviation of one (`--samples 1200` has six),
- the share of samples that it judges to be of their class,
- the share that is nearer to a training image than 99 % of held-out images of the class are,
- what a small classifier gains from the samples (three a real image) over the same recipe on real images alone.

The held-out images are the validation split and those training images that `dataset.cut` sets aside, which nothing is
trained on. The test split is never read. Variants run with one thread each, so that two can run side by side; one row
of JSON a variant is appended to `runs/recipe/results.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks import recipe_leads
from benchmarks.method.settings import SETTINGS, make_config
from benchmarks.method.speed import ddim, ddim_sigmas
from synthaug.config import Config
from synthaug.diffusion import training
from synthaug.generators import edm, generator_class
from synthaug.generators.canonical import sample_seed
from synthaug.generators.interface import Generator, TrainingData
from synthaug.quality.alignment import shrink
from synthaug.quality.coverage import coverage
from synthaug.quality.fidelity import kernel_distance
from synthaug.quality.reference import Reference, load_reference
from synthaug.records import IMAGES_FILE, SPLITS_FILE, Source

OUTPUT = Path("runs/recipe")
SAMPLES = 400
# Drawn at once.
_BATCH = 100
# Coverage is the mean over draws of so many: a single one of them differs by 0.04 from the next.
_OF_A_DRAW = 200
LOSSES = ("oversampling", "balanced softmax")


class Prepared:
    """A setting, read, divided and judged once; and the images that measure a variant."""

    def __init__(self, config: Config, source: Source, splits: Path, reference: Reference, scarce: list[int]) -> None:
        self.config, self.source, self.reference, self.scarce = config, source, reference, scarce
        self.images: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
        table = pd.read_parquet(splits / SPLITS_FILE)
        usable = table[table["held_back"].isna()]
        self.training = usable[usable["split"] == "train"].sort_values("row")
        validation = usable[usable["split"] == "validation"].sort_values("row")
        spare = table[(table["held_back"] == "cut") & (table["split"] == "train")]
        self.real_scores: dict[str, np.ndarray] = {}  # of arms without samples, the same for all variants
        # Half for each use would be cleaner still; but they are looked at for recipes only, never for a verdict.
        self.heldout = pd.concat([validation, spare]).sort_values("row")
        self.data = TrainingData(
            images=self.images,
            pixels=source.pixels,
            classes=source.classes,
            rows=self.training["row"].to_numpy(np.int64),
            labels=self.training["label"].to_numpy(np.int64),
            heldout_rows=validation["row"].to_numpy(np.int64),
            heldout_labels=validation["label"].to_numpy(np.int64),
            scarce=tuple(scarce),
        )


def prepare(setting: str, replicate: int, data: Path, output: Path, size: int | None = None) -> Prepared:
    from benchmarks.method.cells import Caught
    from synthaug.judge import judge
    from synthaug.pipeline import augment
    from synthaug.records import BalancePlan, Splits

    class Enough(Exception):
        pass

    class UpToThePlan(Caught):
        def __call__(self, title: str, work: Any) -> Any:
            if title.startswith("train"):
                raise Enough
            return super().__call__(title, work)

    config = make_config(
        SETTINGS[setting], replicate=replicate, minutes=1, output=output / "run", data=data,
        prepared=output / "data", threads=1, trial_minutes=1,
    )  # fmt: skip
    if size is not None:
        config = config.model_copy(update={"image": config.image.model_copy(update={"size": size})})
    stages = UpToThePlan()
    with contextlib.suppress(Enough):
        augment(config, run_stage=stages)
    source, splits, plan = (stages.last(kind) for kind in (Source, Splits, BalancePlan))
    folder = output / "judge"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        judge(config, source, splits, folder)
        (folder / "done").touch()
    return Prepared(config, source, splits.directory, load_reference(folder, 1), plan.scarce)


def parse_variant(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and constants of a variant."""
    settings: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for item in filter(None, text.split(";" if ";" in text else ",")):
        key, _, value = item.partition("=")
        (constants if ":" in key else settings)[key.strip()] = yaml.safe_load(value)
    return settings, constants


@contextlib.contextmanager
def taken_for(settings: dict[str, Any], constants: dict[str, Any]) -> Iterator[dict[float, Any]]:
    """Other constants, another optimiser or network, for one variant only: the next one starts from the defaults.

    Gives the averages that training keeps beside its own, by half-life.
    """
    averages: dict[float, Any] = {}
    with contextlib.ExitStack() as stack:
        for key, value in constants.items():
            module, _, name = key.partition(":")
            # Refuses a name that the module does not have.
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, value))
        if (optimizer := settings.pop("optimizer", "muon")) == "adam":
            stack.enter_context(mock.patch.object(training.Trainer, "_optimizer", recipe_leads.adam))
        elif optimizer != "muon":
            raise SystemExit(f"optimizer={optimizer} is unknown; muon and adam are there")
        if (network := settings.pop("network", None)) is not None:
            builders = {"tail": _tail, "dit": _dit, "levels": _levels}
            if (name := network.partition(":")[0]) not in builders:
                raise SystemExit(f"network={network} is unknown; {', '.join(builders)} are there")
            build = builders[name](network)
            stack.enter_context(mock.patch.object(edm, "build_unet", build))
        if (phases := settings.pop("augmented", None)) is not None:
            base, tuning = (float(value) for value in str(phases).split("/"))
            run = recipe_leads.augmented(training.Trainer.run, base, tuning)
            stack.enter_context(mock.patch.object(training.Trainer, "run", run))
        if (weight := settings.pop("contrast", None)) is not None:
            loss = recipe_leads.contrastive(training.Trainer._loss, weight)
            stack.enter_context(mock.patch.object(training.Trainer, "_loss", loss))
        if (half_lives := settings.pop("averages", None)) is not None:
            averages.update({float(value): None for value in str(half_lives).split("/")})
            step = recipe_leads.averaged(training.Trainer._step, averages)
            stack.enter_context(mock.patch.object(training.Trainer, "_step", step))
        yield averages


def _tail(network: str) -> Any:
    rank, scarce = (int(number) for number in network.removeprefix("tail:").split(":"))
    plain = edm.build_unet
    return lambda **shape: recipe_leads.give_the_tail(plain(**shape), rank, scarce)


def _levels(network: str) -> Any:
    levels = int(network.removeprefix("levels:"))
    plain = edm.build_unet
    return lambda **shape: recipe_leads.other_levels(plain(**shape), levels, shape["width"])


def _dit(network: str) -> Any:
    width, depth = (int(number) for number in network.removeprefix("dit:").split(":"))

    def build(*, size: int, channels: int, n_classes: int, n_hints: int, fold: int, **_: Any) -> recipe_leads.DiT:
        folded = channels * fold * fold
        return recipe_leads.DiT(size // fold, folded + n_hints, folded, n_classes, width, depth)

    return build


def draw(
    prepared: Prepared, generator: Generator, settings: dict[str, Any], folder: Path, samples: int
) -> dict[int, np.ndarray]:
    """Samples of each scarce class, a multiple of 100 of them, from seeds that no run draws."""
    # What goes through `recipe_leads.solve` is drawn by DPM-Solver++, as everything with guidance is.
    plain = not set(settings) - {"steps"}
    options = {"steps": prepared.config.sample.steps or generator.default_steps(1.0 if plain else 2.0)} | settings
    if weaker := options.pop("weaker", None):
        options["weaker"] = type(generator).load(folder / "checkpoints" / weaker, device="cpu").pipeline  # type: ignore[attr-defined]
    begin, pipeline, drawn = options.pop("start", None), generator.pipeline, {}  # type: ignore[attr-defined]
    if (solver := options.pop("solver", None)) not in (None, "ddim"):
        raise SystemExit(f"solver={solver} is unknown; ddim is there")
    if solver == "ddim" and (set(options) - {"steps"} or begin is not None):
        raise SystemExit("solver=ddim takes steps, and no other setting of drawing")
    labels = prepared.training["label"].to_numpy()
    for label in prepared.scarce:
        name, parts = prepared.source.classes[label], []
        # From images of the other classes into this one, or from its own.
        pool = prepared.training["row"].to_numpy()[(labels == label) == (begin == "tail")]
        for first in range(0, samples, _BATCH):
            noise = pipeline.noise([sample_seed(0, name, 10_000_000 + first + k) for k in range(_BATCH)])
            if begin is not None:
                rows = np.random.default_rng([label, first]).choice(pool, _BATCH)
                unit = prepared.source.pixels.to_unit(prepared.images[rows])
                options["start"] = torch.from_numpy(unit).permute(0, 3, 1, 2).contiguous()
            labelled = torch.full((_BATCH,), label)
            if solver == "ddim":
                unit = ddim(pipeline, labelled, noise, ddim_sigmas(options["steps"]))
            elif set(options) == {"steps"}:
                # As a run does it: by the checkpoint's own solver where it has one for so many.
                unit = pipeline.solve(labelled, noise, steps=options["steps"], guidance=1.0)
            else:
                unit = recipe_leads.solve(pipeline, labelled, noise, **options)
            parts.append(prepared.source.pixels.from_unit(unit.permute(0, 2, 3, 1).numpy()))
        drawn[label] = np.concatenate(parts)
    return drawn


def real_images(prepared: Prepared) -> dict[int, np.ndarray]:
    """Images of the scarce classes that the cut sets aside, in place of samples: what a perfect generator would add."""
    held, found = prepared.heldout, {}
    for label in prepared.scarce:
        rows = held["row"].to_numpy()[held["label"] == label]
        # The first ones judge what the last ones are worth.
        if len(rows) < 2 * SAMPLES:
            raise SystemExit(
                f"samples=real needs {2 * SAMPLES} held-out images of '{prepared.source.classes[label]}', here are "
                f"{len(rows)}; choose a setting that is cut from a larger class"
            )
        found[label] = prepared.images[rows[-SAMPLES:]]
    return found


def near_the_prototype(prepared: Prepared, drawn: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Samples no further from the mean feature of their class than 95 % of its real training images are."""
    classifier, kept = prepared.reference.classifier, {}
    for label, samples in drawn.items():
        own = prepared.images[prepared.training["row"].to_numpy()[prepared.training["label"] == label]]
        real, features = classifier.features(own), classifier.features(samples)
        limit = np.quantile(np.linalg.norm(real - real.mean(0), axis=1), 0.95)
        kept[label] = samples[np.linalg.norm(features - real.mean(0), axis=1) <= limit]
    return kept


def measure(prepared: Prepared, generator: Generator | None, drawn: dict[int, np.ndarray]) -> dict[str, float]:
    classifier, found = prepared.reference.classifier, []
    for label, samples in drawn.items():
        here = prepared.heldout["label"].to_numpy() == label
        real = prepared.images[prepared.heldout["row"].to_numpy()[here][:1000]]
        own = prepared.images[prepared.training["row"].to_numpy()[prepared.training["label"] == label]]
        prediction = classifier.predict(samples)
        features, learned = classifier.features(real), classifier.features(own)
        covered = _coverages(features, prediction.features)
        kid = kernel_distance(features, prediction.features)
        row = {
            "kid": kid.estimate,
            "kid_half_width": (kid.high - kid.low) / 2,
            "kid_train": kernel_distance(learned, prediction.features).estimate,
            "coverage": float(np.mean(covered)) if covered else float("nan"),
            "coverage_sd": float(np.std(covered, ddof=1)) if len(covered) > 1 else float("nan"),
            "as_class": float((prediction.probabilities.argmax(1) == label).mean()),
            "near": float((_distance(prepared, samples) < np.quantile(_distance(prepared, real), 0.01)).mean()),
        }
        if generator is not None:
            few = own, real[:200]
            known, unseen = (generator.denoising_losses(part, [label] * len(part), draws=4, seed=1) for part in few)
            member = np.repeat([True, False], [len(known), len(unseen)])
            for level, ours, others in zip(generator.loss_levels, known.T, unseen.T, strict=True):
                row[f"loss_{level:g}"] = float(others.mean())
                row[f"told_{level:g}"] = float(roc_auc_score(member, -np.concatenate([ours, others])))
        found.append(row)
    return {name: float(pd.Series([row[name] for row in found]).mean()) for name in found[0]}


def _coverages(real: np.ndarray, samples: np.ndarray) -> list[float]:
    """Relative coverage by each draw of 200 samples, or by all where they are fewer; none where they are too few."""
    draws = np.array_split(samples, max(1, len(samples) // _OF_A_DRAW))
    return [found.relative for draw in draws if (found := coverage(real, draw)) is not None]


def _distance(prepared: Prepared, images: np.ndarray) -> np.ndarray:
    """To the nearest training image, as the audit measures it."""
    reference = prepared.reference
    return reference.search.find(shrink(images, *reference.values)).distance


def utility(prepared: Prepared, drawn: dict[int, np.ndarray], folder: Path, seeds: int, dose: str) -> dict[str, Any]:
    """Points of balanced accuracy and of the scarce classes' AUPRC that samples add, mean over seeds and the standard
    error of the mean; each synthetic arm against the best of the real-only ones of this list."""
    from synthaug.trial.data import Part, load_trial, write_trial
    from synthaug.trial.learners import Fit, run_fit
    from synthaug.trial.recipes import Recipe

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "fits").mkdir(parents=True)
    own = prepared.source.directory / IMAGES_FILE
    np.save(folder / "synthetic.npy", np.concatenate(list(drawn.values())))
    labels = np.concatenate([np.full(len(found), label) for label, found in drawn.items()])
    held = prepared.heldout
    # The last ones are what `samples=real` draws from.
    kept = [part.iloc[:-SAMPLES] if len(part) >= 2 * SAMPLES else part for _, part in held.groupby("label")]
    validation = pd.concat(part.head(1200) for part in kept).sort_values("row")
    parts = [
        Part("train", own, prepared.training["row"].to_numpy(np.int64), prepared.training["label"].to_numpy(np.int64)),
        Part("validation", own, validation["row"].to_numpy(np.int64), validation["label"].to_numpy(np.int64)),
        Part("synthetic", folder / "synthetic.npy", np.arange(len(labels)), labels.astype(np.int64)),
    ]
    spec = prepared.source.pixels
    write_trial(
        folder, parts, low=spec.low, high=spec.high, size=spec.size, channels=spec.channels,
        n_classes=len(prepared.source.classes), scarce=prepared.scarce,
    )  # fmt: skip
    # It keeps what the variant before wrote to this folder.
    load_trial.cache_clear()
    counts = prepared.training["label"].value_counts()
    most = max(counts[label] for label in prepared.scarce) + SAMPLES // 4
    amounts = tuple(
        (label, int(min(most - counts[label] if dose == "even" else float(dose) * counts[label], SAMPLES)))
        for label in prepared.scarce
    )
    n_real, n_added = sum(counts[label] for label in prepared.scarce), sum(number for _, number in amounts)
    real, synthetic = [], []
    for loss in LOSSES:
        for mix in ("none", "mixup"):
            real.append(Recipe(f"{mix} {loss}", "", "real", loss, mix=mix))
            synthetic.append(
                Recipe(
                    # Added images get half of the draws of the scarce classes, whatever the dose.
                    f"{mix} {loss} half", "", "synthetic", loss, mix=mix, added="synthetic", dose=amounts,
                    added_weight=n_real / n_added,
                )
            )  # fmt: skip
            for pretrain in (False, True):
                synthetic.append(
                    Recipe(
                        f"{mix} {loss} {'then real' if pretrain else 'mixed'}", "", "synthetic", loss, mix=mix,
                        added="synthetic", dose=amounts, pretrain=pretrain,
                    )
                )  # fmt: skip
    truth = validation["label"].to_numpy()
    done = prepared.real_scores

    def score(recipe: Recipe) -> np.ndarray:
        rows = []
        for seed in range(seeds):
            found = run_fit(folder, Fit(recipe, seed, 200, 64, trial=folder.name)).validation
            guess = found.argmax(1)
            accuracy = np.mean([np.mean(guess[truth == label] == label) for label in np.unique(truth)])
            precision = np.mean([average_precision_score(truth == label, found[:, label]) for label in prepared.scarce])
            rows.append((accuracy, precision))
        return 100 * np.array(rows)

    done.update({recipe.key: score(recipe) for recipe in real if recipe.key not in done})
    scores = done | {recipe.key: score(recipe) for recipe in synthetic}
    best_real = max((recipe.key for recipe in real), key=lambda key: scores[key][:, 0].mean())
    best = max((recipe.key for recipe in synthetic), key=lambda key: scores[key][:, 0].mean())
    gain = scores[best] - scores[best_real]
    pairs = [
        scores[recipe.key] - scores[recipe.key.rsplit(" ", 2 if recipe.pretrain else 1)[0]] for recipe in synthetic
    ]
    error = gain.std(0, ddof=1) / np.sqrt(seeds)
    return {
        "real": scores[best_real].mean(0).round(2).tolist(),
        "amounts": [number for _, number in amounts],
        "best_real": best_real,
        "best": best,
        "all": {key: found.mean(0).round(2).tolist() for key, found in scores.items()},
        "gain": gain.mean(0).round(2).tolist(),
        "error": error.round(2).tolist(),
        # Same loss and mixing with and without samples, mean over all pairs: less chosen, less noisy.
        "paired": np.mean([pair.mean(0) for pair in pairs], 0).round(2).tolist(),
    }


def _dose(text: str) -> str:
    if text != "even" and not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is neither 'even' nor above 0")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--setting", choices=list(SETTINGS), default="pneumonia-60")
    parser.add_argument("--replicate", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--images", type=int)
    parser.add_argument("--part", default="0/1", help="this process takes every n-th variant: 0/2 and 1/2")
    parser.add_argument("--checkpoint", help="sample variants of this one of runs/recipe/SETTING-rK/checkpoints")
    parser.add_argument("--seeds", type=int, default=5, help="classifier seeds; 0: no classifier")
    parser.add_argument(
        "--dose", type=_dose, default="3", help="samples a real image; even: all scarce classes to one number"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="drawn of each scarce class (without classifier)")
    parser.add_argument("--size", type=int, help="pixels a side, in place of the setting's own")
    parser.add_argument("--name", help="keep the checkpoint under this name (one variant)")
    arguments = parser.parse_args()
    if arguments.samples % _BATCH or arguments.samples <= 0 or (arguments.seeds and arguments.samples != SAMPLES):
        parser.error(f"--samples is a multiple of {_BATCH}, and {SAMPLES} where a classifier is trained (--seeds)")
    resized = "" if arguments.size is None else f"-{arguments.size}px"
    output = OUTPUT / f"{arguments.setting}{resized}-r{arguments.replicate}"
    output.mkdir(parents=True, exist_ok=True)
    prepared = prepare(arguments.setting, arguments.replicate, arguments.data, output, arguments.size)
    part, _, parts = arguments.part.partition("/")
    for text in arguments.variants[int(part) :: int(parts)]:
        settings, constants = parse_variant(text)
        with taken_for(settings, constants) as averages:
            rows = run_variant(prepared, settings, averages, arguments, output)
        for row in rows:
            words = json.dumps({"variant": text, "setting": output.name} | row)
            with (OUTPUT / "results.jsonl").open("a") as file:
                file.write(words + "\n")
            print(words, flush=True)


def run_variant(
    prepared: Prepared,
    settings: dict[str, Any],
    averages: dict[float, Any],
    arguments: argparse.Namespace,
    output: Path,
) -> list[dict[str, Any]]:
    """Train with these settings, or draw by them from a checkpoint, and measure what comes out of the kept weights and
    of each average."""
    kind, part = generator_class("edm"), arguments.part.partition("/")[0]
    drawing: dict[str, Any] = {}
    if arguments.checkpoint:
        if averages:
            raise SystemExit("averages are kept by a training; --checkpoint trains nothing")
        drawing = settings
        generator = kind.load(output / "checkpoints" / arguments.checkpoint, device="cpu")
        row: dict[str, Any] = {"checkpoint": arguments.checkpoint}
    else:
        values = {"minutes": arguments.minutes, "images": arguments.images, "threads": 1} | settings
        train = prepared.config.train.model_validate(prepared.config.train.model_dump() | values)
        work = output / f"work-{part}-{time.time_ns()}"
        work.mkdir()
        generator, report = kind.fit(prepared.data, train, seed=arguments.replicate, workdir=work)
        shutil.rmtree(work)
        row = {
            "minutes": arguments.minutes, "images": report.images_seen, "rate": round(report.images_per_second, 1),
            "kept": report.kept, "parameters": report.parameters, "seconds": round(report.seconds),
            "stopped": report.stopped,
        }  # fmt: skip
        if arguments.name:
            target = output / "checkpoints" / arguments.name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            generator.save(target)
    rows = [row | judge_drawn(prepared, generator, drawing, arguments, output)]
    for half_life, average in averages.items():
        recipe_leads.put(generator.pipeline, average)  # type: ignore[attr-defined]
        rows.append(row | {"average": half_life} | judge_drawn(prepared, generator, drawing, arguments, output))
    return rows


def judge_drawn(
    prepared: Prepared, generator: Generator, settings: dict[str, Any], arguments: argparse.Namespace, output: Path
) -> dict[str, Any]:
    """Draw by these settings, and measure."""
    drawing, part = dict(settings), arguments.part.partition("/")[0]
    row: dict[str, Any] = {}
    chosen_by = drawing.pop("filter", None)
    if drawing.pop("samples", None) == "real":
        drawn = real_images(prepared)
    else:
        drawn = draw(prepared, generator, drawing, output, arguments.samples)
    if chosen_by == "prototype":
        drawn = near_the_prototype(prepared, drawn)
        row["kept_samples"] = sum(map(len, drawn.values()))
    row |= {name: round(value, 5) for name, value in measure(prepared, generator, drawn).items()}
    if arguments.seeds:
        row |= utility(prepared, drawn, output / f"trial-{part}", arguments.seeds, arguments.dose)
    return row


if __name__ == "__main__":
    main()
