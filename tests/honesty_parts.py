"""Jobs whose right verdict is known, for the trial as it is: small images, a quick classifier, samples made by hand.

A verdict takes about seventy fits. Two things bring that to two seconds: the classifier is a logistic regression of few
iterations, and `quick` has a stand-in for albumentations, which takes 0.1 ms an image and nine tenths of the time;
it also draws no pictures and does not wait for the disk. All else is the stage itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from synthaug.evaluate import evaluate
from synthaug.judge import judge
from synthaug.records import BalancePlan, Checkpoint, Judge, Verdict
from tests.quality_parts import World, make_world

QUICK = "tests.honesty_parts:QuickLogistic"
# Classes of digits that are taken for each other; the last two are scarce.
DIGITS = (1, 5, 9, 3, 8)


class QuickLogistic(LogisticRegression):
    """Stopped early on purpose: near enough for a comparison of images, and quick."""

    def __init__(self, max_iter: int = 15, random_state: int | None = None) -> None:
        super().__init__(max_iter=max_iter, random_state=random_state)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> QuickLogistic:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().fit(X, y, sample_weight)


@contextmanager
def quick() -> Iterator[None]:
    """Brightness and a little noise instead of the real augmentation of the trial; no pictures, no flushing."""

    def augmenter(seed: int, *, strong: bool = False) -> Callable[[np.ndarray], np.ndarray]:
        random, strength = np.random.default_rng(seed), 2 if strong else 1

        def augment(image: np.ndarray) -> np.ndarray:
            noise = random.standard_normal(image.size + 1, dtype=np.float32) * np.float32(0.03 * strength)
            return np.clip(image * (1 + noise[0]) + noise[1:].reshape(image.shape), 0, 1)

        return augment

    with (
        mock.patch("synthaug.quality.warps.augmenter", augmenter),
        mock.patch("synthaug.report.verdict_pictures.write_verdict_pictures"),
        mock.patch("synthaug.formats.atomic.flush"),
    ):
        yield


@dataclass(frozen=True)
class Job:
    """Real images with few of the scarce classes; `spare` real images of these are in no split."""

    world: World
    judged: Judge

    @property
    def scarce(self) -> list[int]:
        return [item.label for item in self.world.plan.classes if item.n_synthetic]

    def rows(self, split: str, label: int) -> np.ndarray:
        return self.world.rows(split, label)

    def spare(self, label: int) -> np.ndarray:
        table = self.world.table
        return table.loc[(table["label"] == label) & (table["held_back"] == "cut"), "row"].to_numpy()

    def images(self, rows: np.ndarray) -> np.ndarray:
        return self.world.images[rows]

    def try_samples(
        self, images: dict[int, np.ndarray], directory: Path | None = None, checkpoints: Sequence[Checkpoint] = ()
    ) -> Verdict:
        """Verdict on all of these images, by label; `directory` may hold what an interrupted trial left."""
        batch = self.world.batch(
            np.concatenate(list(images.values())), [label for label, some in images.items() for _ in some]
        )
        if directory is None:
            directory = self.world.root / f"evaluate-{len(list(self.world.root.glob('evaluate-*')))}"
        directory.mkdir(exist_ok=True)
        world = self.world
        return evaluate(
            world.config,
            world.source,
            world.splits,
            world.plan,
            checkpoints,
            self.judged,
            [batch],
            None,
            directory,
        )

    def with_settings(self, **evaluation: Any) -> Job:
        config = self.world.config
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=evaluation)})
        return replace(self, world=replace(self.world, config=config))

    def with_plan(self, plan: BalancePlan) -> Job:
        return replace(self, world=replace(self.world, plan=plan))


def make_job(
    root: Path,
    images: np.ndarray,
    labels: np.ndarray,
    split: np.ndarray,
    scarce: tuple[int, ...],
    keep: int,
    judged: Judge | None = None,
    **evaluation: Any,
) -> Job:
    """A job of these images; a judge of equal rows and ids may be used again, as only sample quality rests on it."""
    settings = {
        "train": {"threads": 1},
        "audit": {"classifier_steps": 20, "planted": 5},
        "evaluate": {"classifier": QUICK, **evaluation},
    }
    classes = [f"class {label}" for label in range(int(labels.max()) + 1)]
    world = make_world(root, images, labels, classes, scarce, keep, settings, split)
    if judged is None:
        (root / "judge").mkdir()
        judged = judge(world.config, world.source, world.splits, root / "judge")
    return Job(world, judged)


def lay_out(per_class: dict[str, int], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and splits of as many images of every class: equal layouts give equal ids."""
    labels = np.repeat(np.arange(n_classes), sum(per_class.values()))
    return labels, np.tile(np.repeat(np.array(list(per_class), dtype=object), list(per_class.values())), n_classes)


def digits_job(
    root: Path, seed: int = 0, *, keep: int = 6, n_test: int = 60, judged: Judge | None = None, **evaluation: Any
) -> Job:
    """Five kinds of real digits, two of them cut to `keep` training images. The seed says which are cut and tested."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    everything = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    random = np.random.default_rng(seed)
    labels, split = lay_out({"train": 174 - 30 - n_test, "validation": 30, "test": n_test}, len(DIGITS))
    images = np.concatenate([everything[random.permutation(np.flatnonzero(digits.target == k))[:174]] for k in DIGITS])
    return make_job(root, images, labels, split, (3, 4), keep, judged, **evaluation)


@dataclass(frozen=True)
class Gaussian:
    """Classes of 8×8 'images' with known distributions: a pattern of each class and white noise.

    So there are as many more images as one likes, and what a classifier is truly worth can be measured on them.
    """

    n_classes: int = 4
    separation: float = 0.35
    noise: float = 32.0

    def draw(self, label: int, number: int, random: np.random.Generator) -> np.ndarray:
        """uint8 [number, 8, 8, 1]"""
        pattern = np.random.default_rng(7).standard_normal((self.n_classes, 8, 8, 1))[label]
        values = random.standard_normal((number, 8, 8, 1)) + self.separation * pattern
        return np.clip(np.rint(128 + self.noise * values), 0, 255).astype(np.uint8)

    def job(
        self,
        root: Path,
        seed: int,
        *,
        keep: int = 12,
        n_test: int = 1200,
        n_validation: int = 240,
        n_train: int = 150,
        judged: Judge | None = None,
        **evaluation: Any,
    ) -> Job:
        """The last class is cut to `keep`; n_test and n_validation are of all classes, n_train is of each."""
        random = np.random.default_rng([seed, 1])
        sizes = {"train": n_train, "validation": n_validation // self.n_classes, "test": n_test // self.n_classes}
        labels, split = lay_out(sizes, self.n_classes)
        images = np.concatenate([self.draw(k, sum(sizes.values()), random) for k in range(self.n_classes)])
        return make_job(root, images, labels, split, (self.n_classes - 1,), keep, judged, **evaluation)


@dataclass(frozen=True)
class Watched:
    """A verdict, and what its finalists reach on many more images than its test split has."""

    verdict: Verdict
    truth: dict[str, float]  # synthetic minus 'real', 'duplicates', 'scrambled': balanced accuracy, mean over seeds
    ranking: float  # synthetic minus real: mean AUPRC of the scarce classes


def watched_verdict(job: Job, samples: dict[int, np.ndarray], images: np.ndarray, labels: np.ndarray) -> Watched:
    """Try samples, then train the same finalists again and measure them on these images."""
    from synthaug.trial import race, statistics
    from synthaug.trial.data import TABLE_FILE, TRIAL_FILE

    caught: list[tuple[race.Rules, race.Course]] = []
    final = race.final

    def noting(rules: race.Rules, course: race.Course) -> Any:
        caught.append((rules, course))
        return final(rules, course)

    with mock.patch.object(race, "final", noting):
        verdict = job.try_samples(samples)
    rules, course = caught[0]
    again = rules.directory.with_name(rules.directory.name + "-again")
    again.mkdir()
    # The same trial with another test split: the training images, and so the classifiers, are the same.
    values = pd.read_json(rules.directory / TRIAL_FILE, typ="series")
    np.save(again / "many.npy", images)
    for name in ("smote.npy", "scrambled.npy"):
        if (rules.directory / name).exists():
            (again / name).symlink_to(rules.directory / name)
    values["files"] = [*values["files"], "many.npy"]
    (again / TRIAL_FILE).write_text(values.to_json())
    table = pd.read_parquet(rules.directory / TABLE_FILE)
    many = pd.DataFrame({"file": len(values["files"]) - 1, "row": np.arange(len(labels)), "label": labels})
    pd.concat([table[table["use"] != "test"], many.assign(use="test")]).to_parquet(again / TABLE_FILE, index=False)
    found = final(replace(rules, directory=again), course)
    reached = {
        name: float(np.mean([statistics.balanced_accuracy(labels, one.test.argmax(1)) for one in scores]))
        for name, scores in found.items()
    }
    areas = {
        name: np.mean([statistics.auprc(labels == k, one.test[:, k]) for one in found[name] for k in job.scarce])
        for name in ("real", "synthetic")
    }
    truth = {name: reached["synthetic"] - reached[name] for name in ("real", "duplicates", "scrambled")}
    return Watched(verdict, truth, float(areas["synthetic"] - areas["real"]))
