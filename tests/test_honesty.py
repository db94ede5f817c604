"""The verdict is honest: worthless samples never help, good ones do, leaks are refused by name, looks are counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from synthaug.config import TrainConfig
from synthaug.errors import LeakError
from synthaug.evaluate import evaluate
from synthaug.generators.edm import EDMGenerator
from synthaug.generators.interface import TrainingData
from synthaug.records import Judge
from synthaug.trial import race
from synthaug.trial.data import scramble
from tests.honesty_parts import Gaussian, Job, digits_job, make_job, quick
from tests.quality_parts import write_checkpoint

WORTHLESS = {"no evidence", "harms"}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return digits_job(tmp_path_factory.mktemp("honesty") / "job")


def _spare(job: Job) -> dict[int, np.ndarray]:
    """Real images of the scarce classes that are in no split: the best samples there can be."""
    return {label: job.images(job.spare(label)) for label in job.scarce}


def _duplicates(job: Job) -> dict[int, np.ndarray]:
    return {label: job.images(np.resize(job.rows("train", label), 60)) for label in job.scarce}


def _noise(job: Job) -> dict[int, np.ndarray]:
    random, shape = np.random.default_rng(5), job.world.images.shape[1:]
    return {label: random.integers(0, 256, (60, *shape), dtype=np.uint8) for label in job.scarce}


def _mislabelled(job: Job) -> dict[int, np.ndarray]:
    """Real training images of the other classes under the name of a scarce one."""
    random = np.random.default_rng(6)
    others = np.concatenate([job.rows("train", k) for k in range(len(job.world.source.classes)) if k not in job.scarce])
    return {label: job.images(random.choice(others, 60)) for label in job.scarce}


def _scrambled(job: Job) -> dict[int, np.ndarray]:
    random = np.random.default_rng(1234)
    return {
        label: np.rint(scramble(images.astype(np.float64), 0, 255, random)).astype(np.uint8)
        for label, images in _duplicates(job).items()
    }


def _clouds(job: Job, workdir: Path) -> dict[int, np.ndarray]:
    """What the generator of this package draws after two steps of training."""
    world = job.world
    train, validation = world.rows("train"), world.rows("validation")
    labels = world.table["label"].to_numpy()
    data = TrainingData(
        images=world.images,
        pixels=world.source.pixels,
        classes=world.source.classes,
        rows=train,
        labels=labels[train],
        heldout_rows=validation,
        heldout_labels=labels[validation],
        scarce=tuple(job.scarce),
    )
    settings = TrainConfig(images=64, batch_size=32, width=16, device="cpu", threads=1)
    generator, _ = EDMGenerator.fit(data, settings, seed=0, workdir=workdir)
    return {
        label: generator.sample([label] * 60, list(range(100 * label, 100 * label + 60)), steps=4, guidance=1.0)
        for label in job.scarce
    }


@pytest.mark.slow
def test_duplicates_of_training_images_never_help(job: Job) -> None:
    verdict = job.try_samples(_duplicates(job))
    assert verdict.outcome in WORTHLESS, verdict.sentence
    assert all(item.dose == 0 for item in verdict.classes)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [_noise, _mislabelled, _scrambled])
def test_images_without_the_class_never_help(job: Job, samples: Any) -> None:
    verdict = job.try_samples(samples(job))
    assert verdict.outcome in WORTHLESS, verdict.sentence
    assert verdict.sentence.startswith(verdict.outcome)
    assert all(item.dose == 0 and item.advice for item in verdict.classes)


@pytest.mark.slow
def test_clouds_of_an_untrained_generator_never_help(job: Job, tmp_path: Path) -> None:
    verdict = job.try_samples(_clouds(job, tmp_path))
    assert verdict.outcome in WORTHLESS, verdict.sentence


@pytest.mark.slow
def test_further_real_images_help_and_get_a_dose(job: Job) -> None:
    verdict = job.try_samples(_spare(job))
    assert verdict.outcome == "helps", verdict.sentence
    assert {item.label for item in verdict.classes} == set(job.scarce)
    for item in verdict.classes:
        assert 0 < item.dose == item.tried <= item.n_offered == len(job.spare(item.label))
    for against in ("real", "duplicates", "scrambled"):
        assert verdict.differences[against]["balanced_accuracy"].low > 0
    assert verdict.differences["real"]["rare_auprc"].estimate >= 0


def _changed(job: Job, root: Path, splits: Any = None, index: Any = None) -> Job:
    """The job with tables of its own, changed by these functions."""
    world = job.world
    for record, file, change in ((world.splits, "splits.parquet", splits), (world.source, "index.parquet", index)):
        directory = shutil.copytree(record.directory, root / record.directory.name)
        if change is not None:
            table = pd.read_parquet(directory / file)
            change(table)
            table.to_parquet(directory / file)
        name = "splits" if record is world.splits else "source"
        world = replace(world, **{name: record.model_copy(update={"directory": directory})})
    return replace(job, world=world)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_images_that_judge_are_no_samples(job: Job, split: str, mirrored: bool) -> None:
    label = job.scarce[0]
    images = job.images(job.rows(split, label)[:3])
    offered = {label: np.concatenate([_spare(job)[label], images[:, :, ::-1] if mirrored else images])}
    with pytest.raises(LeakError, match=rf"3 samples are images of the {split} split"):
        job.try_samples(offered)


@pytest.mark.parametrize(
    ("column", "value", "table", "words"),
    [
        ("group_key", "patient 7", "splits", "1 groups in more than one split"),
        ("image_id", "scan 12", "splits", "1 images in more than one split"),
        ("content_hash", "abc123", "index", r"1 images \(equal pixels\) in more than one split"),
    ],
)
@pytest.mark.parametrize("places", [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_what_is_in_two_splits_is_refused_by_name(
    job: Job, tmp_path: Path, column: str, value: str, table: str, words: str, places: tuple[str, str]
) -> None:
    rows = [int(job.rows(split, 0)[0]) for split in places]

    def plant(found: pd.DataFrame) -> None:
        found.loc[found["row"].isin(rows), column] = value

    changed = _changed(job, tmp_path, **{table: plant})
    with pytest.raises(LeakError, match=words) as caught:
        changed.try_samples(_spare(job), tmp_path / "evaluate")
    assert value in str(caught.value)
    for place in places:
        assert place in str(caught.value)
    # Nothing was trained, and no look was taken.
    assert not list((tmp_path / "evaluate").iterdir())


@pytest.mark.parametrize("use", ["train", "validation"])
def test_a_test_image_that_the_generator_saw_is_refused_by_name(job: Job, tmp_path: Path, use: str) -> None:
    ids, world = job.world.table["image_id"], job.world
    trained, seen = list(ids[world.rows("train")]), ids[job.rows("test", 1)[3]]
    checkpoint = write_checkpoint(world.root, [*trained, *[seen] * (use == "train")], [seen] * (use == "validation"))
    fine = write_checkpoint(world.root, trained)
    # Of several generators each counts, the newest and those of earlier jobs.
    for checkpoints in ([checkpoint], [checkpoint, fine], [fine, checkpoint]):
        with pytest.raises(LeakError, match="1 test images were used by the generator") as caught:
            job.try_samples(_spare(job), tmp_path / "evaluate", checkpoints)
        assert seen in str(caught.value)


def test_too_few_test_images_are_counted_by_class(job: Job) -> None:
    verdict = job.with_settings(min_test=63).try_samples(_duplicates(job))
    assert verdict.outcome == "no evidence"
    assert "class 'class 3' has 60 test images and needs 63, 3 more" in verdict.sentence
    assert not verdict.arms
    assert verdict.looks == 0


def test_too_small_a_budget_says_what_it_takes(job: Job) -> None:
    verdict = job.with_settings(minutes=1e-3).try_samples(_duplicates(job))
    assert verdict.outcome == "no evidence"
    assert verdict.sentence.startswith("no evidence: budget: evaluate.minutes is 0.001")
    assert verdict.minutes_needed is not None
    assert 1e-3 < verdict.minutes_needed < 5
    assert verdict.looks == 0


def test_nothing_to_try_is_no_evidence(job: Job, tmp_path: Path) -> None:
    world = job.world
    verdict = evaluate(
        world.config, world.source, world.splits, world.plan, [], job.judged, [], None, tmp_path
    )  # fmt: skip
    assert verdict.outcome == "no evidence"
    assert "no sample to try" in verdict.sentence
    assert json.loads((tmp_path / "verdict.json").read_text())["outcome"] == "no evidence"


@pytest.mark.slow
def test_looks_are_counted_and_an_interrupted_trial_comes_to_the_same(job: Job, tmp_path: Path) -> None:
    fresh = digits_job(tmp_path / "job", judged=job.judged)
    samples = _duplicates(fresh)
    run_fit, calls = race.run_fit, 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        # Within the final, after the look was noted.
        if (fresh.world.root / "out" / "test_looks.json").exists() and calls % 7 == 0:
            raise KeyboardInterrupt
        return run_fit(*arguments)

    with mock.patch.object(race, "run_fit", killed), pytest.raises(KeyboardInterrupt):
        fresh.try_samples(samples, tmp_path / "first")
    fits = sorted((tmp_path / "first" / "fits").iterdir())
    assert not (tmp_path / "first" / "verdict.json").exists()
    # As if it had been killed earlier still, between any two fits.
    for path in fits[::2]:
        path.unlink()
    resumed = fresh.try_samples(samples, tmp_path / "first")
    another = fresh.try_samples({label: images[:40] for label, images in samples.items()})
    whole = fresh.try_samples(samples, tmp_path / "second")
    assert resumed.digest == whole.digest
    assert resumed.model_dump(exclude={"directory"}) == whole.model_dump(exclude={"directory"})
    assert another.test_digest == whole.test_digest
    assert [verdict.looks for verdict in (resumed, another, whole)] == [1, 2, 1]


@pytest.mark.slow
def test_only_finalists_meet_the_test_split(job: Job, tmp_path: Path) -> None:
    samples = _spare(job)
    verdict = job.try_samples(samples)
    with_test = [path for path in (verdict.directory / "fits").iterdir() if len(np.load(path)["test"])]
    assert len(with_test) == 4 * verdict.seeds
    # The same images in the splits, but which test label belongs to which test image is drawn by lot.
    world = job.world
    images, test = world.images.copy(), world.rows("test")
    images[test] = images[np.random.default_rng(0).permutation(test)]
    labels, split = world.table["label"].to_numpy(), world.table["split"].to_numpy()
    blind = make_job(tmp_path / "job", images, labels, split, tuple(job.scarce), 6, job.judged).try_samples(samples)
    assert blind.arms == verdict.arms
    assert (blind.best_real, blind.recipe, blind.recipe_settings) == (
        verdict.best_real,
        verdict.recipe,
        verdict.recipe_settings,
    )
    assert (blind.steps, blind.trained_out, blind.learning_curve) == (
        verdict.steps,
        verdict.trained_out,
        verdict.learning_curve,
    )
    assert verdict.outcome == "helps"
    assert blind.outcome != "helps"


@pytest.fixture(scope="module")
def gaussian_judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    with quick():
        return Gaussian().job(tmp_path_factory.mktemp("gaussian") / "job", 0, n_test=600, n_validation=200).judged


def _count_helps(judged: Judge, root: Path, worth: bool, seeds: range) -> int:
    """How often 90 samples 'help': further images of a class that has 12, or copies of these."""
    helps = 0
    for seed in seeds:
        job = Gaussian().job(root / str(seed), seed, n_test=600, n_validation=200, judged=judged)
        (label,) = job.scarce
        rows = job.spare(label)[:90] if worth else np.resize(job.rows("train", label), 90)
        helps += job.try_samples({label: job.images(rows)}).helps
    return helps


# Both with 200 repetitions, and what the samples are truly worth: `python -m benchmarks.verdict_honesty`.
@pytest.mark.slow
def test_help_is_rare_where_there_is_none(gaussian_judge: Judge, tmp_path: Path) -> None:
    helps = _count_helps(gaussian_judge, tmp_path, False, range(50, 55))
    assert binomtest(helps, 5, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.slow
def test_help_is_usual_where_there_is_some(gaussian_judge: Judge, tmp_path: Path) -> None:
    # Worth about four points of balanced accuracy. Of the three that do not help, one has a best real-only arm that is
    # not trained out, and one took another arm before a choice counted the chance of its images (docs/log.md).
    assert _count_helps(gaussian_judge, tmp_path, True, range(50, 60)) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pneumoniamnist", "breastmnist"])
@pytest.mark.parametrize("samples", [_duplicates, _noise, _mislabelled, _scrambled])
def test_worthless_samples_of_scans_never_help(shared_data: Path, tmp_path: Path, name: str, samples: Any) -> None:
    job = _scans(shared_data / f"{name}.npz", tmp_path)
    verdict = job.try_samples(samples(job))
    assert verdict.outcome in WORTHLESS, verdict.sentence


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "outcomes"), [(_spare, {"helps"}), (_duplicates, WORTHLESS)])
def test_further_real_photographs_help_and_duplicates_do_not(
    shared_data: Path, tmp_path: Path, samples: Any, outcomes: set[str]
) -> None:
    job = _garments(shared_data / "fashionmnist_lt100.npz", tmp_path)
    verdict = job.try_samples(samples(job))
    assert verdict.outcome in outcomes, verdict.sentence


def _garments(path: Path, root: Path) -> Job:
    """T-shirts, dresses and pullovers, of which 12 are left to train on; the official test split."""
    random = np.random.default_rng(0)
    images, labels, split = [], [], []
    with np.load(path, allow_pickle=False) as file:
        for label, kind in enumerate((0, 3, 2)):
            for part, use, number in (
                ("train", ["validation"] * 60 + ["train"] * 240, 300),
                ("test", ["test"] * 300, 300),
            ):
                rows = random.permutation(np.flatnonzero(file[f"{part}_labels"].ravel() == kind))[:number]
                images.append(file[f"{part}_images"][rows][..., None])
                labels += [label] * number
                split += use
    return make_job(root / "job", np.concatenate(images), np.array(labels), np.array(split, dtype=object), (2,), 12)


def _scans(path: Path, root: Path) -> Job:
    """Real scans with their own splits, the scarcer class cut to 20; of the rest 400 training images."""
    with np.load(path, allow_pickle=False) as file:
        images = np.concatenate([file[f"{split}_images"] for split in ("train", "val", "test")])[..., None]
        labels = np.concatenate([file[f"{split}_labels"].ravel() for split in ("train", "val", "test")])
        sizes = [len(file[f"{split}_labels"]) for split in ("train", "val", "test")]
    split = np.repeat(np.array(["train", "validation", "test"], dtype=object), sizes)
    train = np.flatnonzero(split == "train")
    scarce = int(np.argmin(np.bincount(labels[train])))
    left_out = [row for k in np.unique(labels) if k != scarce for row in train[labels[train] == k][400:]]
    kept = np.setdiff1d(np.arange(len(labels)), left_out)
    # Equal pixels in two splits would be refused.
    keys = pd.Series([images[row].tobytes() for row in kept])
    kept = kept[~keys.duplicated().to_numpy()]
    return make_job(root / "job", images[kept], labels[kept].astype(np.int64), split[kept], (scarce,), 20)
