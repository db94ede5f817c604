"""The configurations for a GPU: what they describe trains and draws, here on the processor and with a few images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthaug.config import load_config
from synthaug.errors import ConfigError
from synthaug.generators import resolve_device
from synthaug.generators.edm import EDMGenerator
from synthaug.generators.interface import TrainingData
from tests.generator_data import digits_spec

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("gpu*.yaml"))


def test_there_is_one_for_128_and_one_for_256_pixels() -> None:
    assert [load_config(path).image.size for path in CONFIGS] == [128, 256]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which nothing refuses")
def test_without_a_gpu_it_is_refused_in_words(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.device is cuda.*Set train\.device"):
        resolve_device(load_config(path).train.device)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_network_trains_saves_and_draws(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    size = config.image.size
    random = np.random.default_rng(0)
    data = TrainingData(
        images=random.integers(0, 256, (6, size, size, 1)).astype(np.uint8),
        pixels=digits_spec(size=size, smallest=(size, size), largest=(size, size)),
        classes=("common", "scarce"),
        rows=np.arange(6),
        labels=np.array([0, 0, 0, 0, 1, 1]),
        heldout_rows=np.array([], dtype=np.int64),
        heldout_labels=np.array([], dtype=np.int64),
        scarce=(1,),
    )
    few = {"device": "cpu", "images": 4, "batch_size": 2, "processes": 1}
    (tmp_path / "work").mkdir()
    generator, report = EDMGenerator.fit(data, config.train.model_copy(update=few), seed=0, workdir=tmp_path / "work")
    assert report.images_seen >= 4
    (tmp_path / "saved").mkdir()
    generator.save(tmp_path / "saved")
    again = EDMGenerator.load(tmp_path / "saved", device="cpu")
    drawn = again.sample([1], [7], steps=2, guidance=config.sample.guidance)
    assert drawn.shape == (1, size, size, 1)
    assert np.array_equal(drawn, generator.sample([1], [7], steps=2, guidance=config.sample.guidance))
