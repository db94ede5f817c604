"""Real images in place of samples: only such as the cut set aside, as many as the plan asks for, nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.ceiling import told, write_cut_images
from benchmarks.method.cells import prepare
from benchmarks.method.settings import SETTINGS, make_config
from synthaug.records import IMAGES_FILE, SPLITS_FILE, BalancePlan, Source, Splits


@pytest.mark.slow
def test_only_training_images_that_the_cut_set_aside_are_offered(tmp_path: Path) -> None:
    config = make_config(
        SETTINGS["digits"], replicate=0, minutes=1, output=tmp_path / "run", data=tmp_path, prepared=tmp_path,
        threads=1, trial_minutes=1,
    )  # fmt: skip
    stages = prepare(config)
    source, splits, plan = stages.last(Source), stages.last(Splits), stages.last(BalancePlan)
    # Of one class fewer than there are.
    classes = [
        item.model_copy(update={"n_target": item.n_real + 5}) if item.name == "3" else item for item in plan.classes
    ]
    plan = plan.model_copy(update={"classes": tuple(classes)})
    numbers = write_cut_images(source, splits, plan, 0, tmp_path / "offered")
    written = {path.name: sorted(path.glob("*.png")) for path in (tmp_path / "offered").iterdir()}
    assert sorted(written) == ["1", "3", "6", "8"]
    assert sorted(map(len, written.values())) == sorted(taken for taken, _ in numbers)
    assert len(written["3"]) == 5
    table = pd.read_parquet(splits.directory / SPLITS_FILE).set_index("row")
    images = np.load(source.directory / IMAGES_FILE)
    for name, paths in written.items():
        rows = table.loc[[int(path.stem) for path in paths]]
        assert set(rows["held_back"]) == {"cut"}
        assert set(rows["split"]) == {"train"}
        assert {source.classes[label] for label in rows["label"]} == {name}
    path = written["8"][0]
    assert np.array_equal(np.asarray(Image.open(path)), images[int(path.stem), :, :, 0])


def test_what_was_not_compared_is_said() -> None:
    assert told({"differences": {}}) == ["not compared"] * 3
    found = {"real": {"balanced_accuracy": {"estimate": 0.0712, "low": -0.001, "high": 0.15}}}
    assert told({"differences": found}) == ["+7.1 [-0.1, +15.0]", "not compared", "not compared"]
