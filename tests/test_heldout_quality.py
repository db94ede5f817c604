"""The contest's samples against images that no method trained on: which those are, and what the figures prefer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.heldout_quality import Heldout, row, samples_of
from benchmarks.method.cells import Place, all_cells, config_of, prepare
from synthaug.formats.atomic import write_text
from synthaug.quality.classifier import train_classifier
from synthaug.records import SPLITS_FILE, Splits


@pytest.mark.slow
def test_held_out_images_are_of_no_training_and_no_test_and_copies_do_not_pass_for_them(tmp_path: Path) -> None:
    cell = next(cell for cell in all_cells(1) if cell.name == "peers.digits.r0.ddp-16.b5.make")
    place = Place(tmp_path / "results", tmp_path, tmp_path / "cache", 1, 1.0)
    real = Heldout(cell, place)
    assert sorted(real.source.classes[label] for label in real.counts) == ["1", "3", "6", "8"]
    table = pd.read_parquet(prepare(config_of(cell, place)).last(Splits).directory / SPLITS_FILE)
    outside = table["held_back"].isna() & (table["split"] == "validation")
    outside |= (table["held_back"] == "cut") & (table["split"] == "train")
    for label, count in real.counts.items():
        assert len(real.further[label]) == len(real.copies()[label]) == count
        assert len(real.further[label]) + len(real.heldout[label]) == (outside & (table["label"] == label)).sum()
        assert len(real.training[label]) == 10

    assert samples_of(cell, place, real) is None, "no record, no samples"
    images = np.concatenate(list(real.training.values()))
    classifier = train_classifier(
        images, np.repeat(list(real.training), 10), len(real.source.classes),
        low=real.source.pixels.low, high=real.source.pixels.high, steps=60, seed=0, threads=1,
    )  # fmt: skip
    further, copies = row(classifier, real, real.further), row(classifier, real, real.copies())
    assert further[0] == copies[0] == str(sum(real.counts.values()))
    assert float(further[1]) > float(copies[1]) + 0.3, "coverage of held-out images"
    assert float(further[2].split()[0]) < float(copies[2].split()[0]), "KID to held-out images"
    assert float(copies[4]) > float(further[4]) + 0.3, "coverage of training images is for copies to win"


@pytest.mark.slow
def test_what_a_cell_drew_is_read_by_class_and_is_none_where_it_lies_elsewhere(tmp_path: Path) -> None:
    from PIL import Image

    cell = next(cell for cell in all_cells(1) if cell.name == "peers.digits.r0.ddp-16.b5.make")
    place = Place(tmp_path / "results", tmp_path, tmp_path / "cache", 1, 1.0)
    real = Heldout(cell, place)
    write_text(place.result(cell.name), '{"result": {"samples": "work/here"}}\n')
    assert samples_of(cell, place, real) is None
    folder = place.results / "work" / "here" / "8"
    folder.mkdir(parents=True)
    for number, picture in enumerate(real.further[8][:3]):
        Image.fromarray(picture[..., 0]).save(folder / f"{number:06d}.png")
    found = samples_of(cell, place, real)
    assert found is not None
    assert list(found) == [8]
    assert np.array_equal(found[8], real.further[8][:3])
