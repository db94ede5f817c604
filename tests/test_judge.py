"""The judge on real digits: what it learns, what it rests its distance on, and what it never reads."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthaug.errors import DatasetError
from synthaug.judge import calibrate_threshold, judge
from synthaug.quality.reference import load_reference
from synthaug.records import Judge
from tests.quality_parts import World, digits_world

FAST = {"train": {"threads": 1}, "audit": {"classifier_steps": 80}}


def _judge(world: World, name: str) -> Judge:
    directory = world.root / name
    directory.mkdir()
    return judge(world.config, world.source, world.splits, directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return digits_world(tmp_path_factory.mktemp("judge"), scarce=(1, 5), **FAST)


@pytest.fixture(scope="module")
def judged(world: World) -> Judge:
    return _judge(world, "judge")


def test_learns_the_classes_and_calibrates_on_held_out_images(world: World, judged: Judge) -> None:
    assert judged.validation_balanced_accuracy is not None
    assert judged.validation_balanced_accuracy > 0.7
    assert judged.n_train == len(world.rows("train"))
    assert judged.n_heldout == len(world.rows("validation")) == 359
    reference = load_reference(judged.directory, 1)
    distances = reference.heldout["distance"]
    assert judged.near_copy_threshold == pytest.approx(np.percentile(distances, 1))
    assert (distances < judged.near_copy_threshold).mean() <= 0.0112
    assert "359 held-out real images" in judged.near_copy_note
    assert len(reference.descriptors) == len(reference.depths) == judged.n_train
    assert np.isfinite(reference.depths).all()


def test_reads_training_and_validation_images_only(world: World, judged: Judge, tmp_path: Path) -> None:
    """With every other image overwritten, the judge comes out the same."""
    used = np.concatenate([world.rows("train"), world.rows("validation")])
    images = np.full_like(world.images, 77)
    images[used] = world.images[used]
    np.save(tmp_path / "images.npy", images)
    other = world.source.model_copy(update={"directory": tmp_path})
    (tmp_path / "judge").mkdir()
    again = judge(world.config, other, world.splits, tmp_path / "judge")
    assert again.digest == judged.digest
    assert set(load_reference(judged.directory, 1).training["row"]) == set(world.rows("train"))


def test_held_out_copies_of_training_images_measure_nothing(tmp_path: Path) -> None:
    world = digits_world(tmp_path, **FAST)
    images = world.images.copy()
    training, heldout = world.rows("train"), world.rows("validation")
    images[heldout[:10]] = images[training[:10]][:, :, ::-1]
    np.save(world.source.directory / "images.npy", images)
    found = _judge(world, "judge")
    assert found.n_heldout == len(heldout) - 10
    assert "10 held-out images are copies" in found.near_copy_note
    assert found.near_copy_threshold is not None
    assert found.near_copy_threshold > 0.1


def test_without_validation_images_the_threshold_is_none_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = digits_world(tmp_path, **{**FAST, "audit": {"classifier_steps": 10}})
    table = world.table.assign(split=world.table["split"].replace("validation", "test"))
    table.to_parquet(world.splits.directory / "splits.parquet")
    with caplog.at_level(logging.WARNING):
        found = _judge(world, "judge")
    assert found.near_copy_threshold is None
    assert found.validation_balanced_accuracy is None
    assert found.n_heldout == 0
    assert "only exact and mirrored copies are found" in found.near_copy_note
    assert "could not be measured" in caplog.text


def test_no_training_image_is_refused(tmp_path: Path) -> None:
    world = digits_world(tmp_path, **FAST)
    world.table.assign(held_back="cut").to_parquet(world.splits.directory / "splits.parquet")
    with pytest.raises(DatasetError, match="no usable image"):
        _judge(world, "judge")


def test_a_classifier_that_guesses_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = digits_world(tmp_path, **{**FAST, "audit": {"classifier_steps": 10}})
    scrambled = np.random.default_rng(0).permutation(world.table["label"])
    world.table.assign(label=scrambled).to_parquet(world.splits.directory / "splits.parquet")
    with caplog.at_level(logging.WARNING):
        _judge(world, "judge")
    assert "cannot tell the classes apart" in caplog.text


def test_few_held_out_images_are_said_to_be_few() -> None:
    distances = np.linspace(0.2, 0.9, 30)
    threshold, note = calibrate_threshold(distances, 100, 1.0)
    assert threshold == pytest.approx(np.percentile(distances, 1))
    assert "about 1 in 31 honest images" in note
    assert "So few" not in calibrate_threshold(np.linspace(0.2, 0.9, 300), 100, 1.0)[1]


def test_files_are_plain_tables(judged: Judge) -> None:
    heldout = pd.read_parquet(judged.directory / "heldout.parquet")
    assert list(heldout) == ["row", "image_id", "label", "predicted", "probability", "distance"]
    assert {path.suffix for path in judged.directory.iterdir()} == {".safetensors", ".json", ".parquet", ".npy"}
