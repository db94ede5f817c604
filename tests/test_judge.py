"""The judge on real digits: what it learns, what it rests its distance on, and what it never reads."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthaug.errors import DatasetError
from synthaug.judge import judge, near_copy_note
from synthaug.quality.reference import load_reference
from synthaug.records import Judge, NearnessTest
from tests.quality_parts import World, digits_world

FAST = {"train": {"threads": 1}, "audit": {"classifier_steps": 80, "planted": 20}}


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
    honest = reference.heldout[~reference.heldout["repeats"]]
    assert judged.near_copy_threshold == pytest.approx(sorted(honest["distance"])[2])  # 1 % of 350 or so
    assert f"{len(honest)} held-out real images" in judged.near_copy_note
    together = judged.near_copies[0]
    assert together.n_heldout == len(honest)
    assert together.n_repeats == judged.n_heldout - len(honest)
    assert together.alarm_rate is not None
    assert together.alarm_rate <= 0.01
    assert together.alarm_bounds is not None
    assert together.alarm_bounds[0] <= together.alarm_rate <= together.alarm_bounds[1] < 0.03
    assert len(reference.depths) == judged.n_train
    assert np.isfinite(reference.depths).all()


def test_classes_with_few_held_out_images_share_a_distance(judged: Judge) -> None:
    together, *classes = judged.near_copies
    assert [test.name for test in classes] == [str(i) for i in range(10)]
    assert all(test.pooled and test.threshold == together.threshold for test in classes)
    assert sum(test.n_heldout for test in classes) == together.n_heldout
    assert sum(test.alarms for test in classes) == together.alarms
    assert judged.threshold_of("3") == judged.threshold_of("of no such class") == together.threshold


def test_planted_copies_are_counted(judged: Judge) -> None:
    found = {item.alteration: item for item in judged.planted}
    assert all(item.n == 20 for item in judged.planted)
    for name in ("exact", "mirrored", "upside down", "shifted by 1 px", "noise of 0.02"):
        assert found[name].listed
        assert found[name].n_caught == 20, name
    assert not found["gamma 1.4"].listed
    assert found["exact"].n_in_features == 20


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert found.near_copy_threshold > 0.05


def test_without_validation_images_the_threshold_is_none_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = digits_world(tmp_path, **{**FAST, "audit": {"classifier_steps": 10, "planted": 5}})
    table = world.table.assign(split=world.table["split"].replace("validation", "test"))
    table.to_parquet(world.splits.directory / "splits.parquet")
    with caplog.at_level(logging.WARNING):
        found = _judge(world, "judge")
    assert found.near_copy_threshold is None
    assert found.validation_balanced_accuracy is None
    assert found.n_heldout == 0
    assert "only exact and mirrored copies are found" in found.near_copy_note
    assert found.planted == ()
    assert [test.alarm_rate for test in found.near_copies] == [None] * 11
    assert "could not be measured" in caplog.text


def test_no_training_image_is_refused(tmp_path: Path) -> None:
    world = digits_world(tmp_path, **FAST)
    world.table.assign(held_back="cut").to_parquet(world.splits.directory / "splits.parquet")
    with pytest.raises(DatasetError, match="no usable image"):
        _judge(world, "judge")


def test_a_classifier_that_guesses_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = digits_world(tmp_path, **{**FAST, "audit": {"classifier_steps": 10, "planted": 5}})
    scrambled = np.random.default_rng(0).permutation(world.table["label"])
    world.table.assign(label=scrambled).to_parquet(world.splits.directory / "splits.parquet")
    with caplog.at_level(logging.WARNING):
        _judge(world, "judge")
    assert "cannot tell the classes apart" in caplog.text


@pytest.mark.slow
def test_held_out_images_that_are_training_images_moved_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where two pictures of a patient came apart: a leak that a hash does not see."""
    world = digits_world(tmp_path, **FAST)
    images = world.images.copy()
    training, heldout = world.rows("train"), world.rows("validation")
    images[heldout[:10]] = np.clip(np.roll(images[training[:10]], 1, axis=2).astype(float) * 0.9, 0, 255).astype("u1")
    np.save(world.source.directory / "images.npy", images)
    with caplog.at_level(logging.WARNING):
        found = _judge(world, "judge")
    table = load_reference(found.directory, 1).heldout.set_index("row")
    assert table.loc[heldout[:10], "repeats"].all()
    ids = dict(zip(world.table["row"], world.table["image_id"], strict=True))
    assert list(table.loc[heldout[:10], "nearest_id"]) == [ids[row] for row in training[:10]]
    assert found.near_copies[0].n_repeats >= 10
    assert "training images once more" in caplog.text
    assert "dataset.columns.group" in caplog.text
    assert found.near_copy_threshold is not None
    assert found.near_copy_threshold > 0.05


def test_few_held_out_images_are_said_to_be_few() -> None:
    few = NearnessTest(
        name=None, threshold=0.2, pooled=False, n_heldout=30, n_groups=30, n_repeats=0, alarms=1, alarm_rate=1 / 30,
        alarm_bounds=(0.001, 0.17),
    )  # fmt: skip
    note = near_copy_note(few, 100, 0.01)
    assert "1 (3.3%; 95 % interval 0.1% to 17.0%)" in note
    assert "about 3.2% of honest images" in note
    assert "that takes 99 held-out images or groups" in note
    assert "So few" not in near_copy_note(few.model_copy(update={"n_heldout": 300, "n_groups": 300}), 100, 0.01)
    assert "more than any number of held-out images" in near_copy_note(few, 100, 0.0)


def test_files_are_plain_tables(judged: Judge) -> None:
    heldout = pd.read_parquet(judged.directory / "heldout.parquet")
    names = (
        "row image_id label predicted nearest_id probability distance distance_ratio contrast feature_distance repeats"
    )
    assert list(heldout) == names.split()
    assert {path.suffix for path in judged.directory.iterdir()} == {".safetensors", ".json", ".parquet", ".npy"}
