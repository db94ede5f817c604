"""A sample is a property of its place: class, index, seed and canonical micro-batch, nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthaug.config import Config, ScaleConfig, TrainConfig
from synthaug.digest import digest_directory
from synthaug.errors import LeakError
from synthaug.generators.edm import EDMGenerator
from synthaug.records import (
    IMAGES_FILE,
    SAMPLES_FILE,
    SPLITS_FILE,
    BalancePlan,
    Checkpoint,
    ClassPlan,
    SampleBatch,
    SampleRequest,
    Source,
    Splits,
)
from synthaug.sample import sample
from synthaug.train import train
from tests.generator_data import digits_data
from tests.scale_parts import Mapped

CONFIG = Config.model_validate(
    {
        "name": "t",
        "output": "unused",
        "dataset": {"format": "digits"},
        "image": {"size": 8},
        "train": {"images": 256, "batch_size": 32, "width": 16, "device": "cpu", "threads": 1},
        "sample": {"steps": 4, "micro_batch": 8, "threads": 1},
    }
)


def source_record(directory: Path) -> Source:
    data = digits_data()
    np.save(directory / IMAGES_FILE, data.images)
    return Source(
        directory=directory,
        digest="0" * 64,
        name="digits",
        fingerprint="f",
        classes=data.classes,
        pixels=data.pixels,
        n_images=len(data.images),
        n_set_aside=0,
        set_aside_reasons={},
        n_duplicates=0,
        n_synthetic=0,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Checkpoint]:
    folder = tmp_path_factory.mktemp("trained")
    generator, report = EDMGenerator.fit(digits_data(), CONFIG.train, seed=0, workdir=folder)
    # So short a training leaves it out; samples are mostly drawn by it.
    generator.pipeline.fit_solver()
    (folder / "pipeline").mkdir()
    generator.save(folder / "pipeline")
    checkpoint = Checkpoint(
        directory=folder,
        digest=digest_directory(folder / "pipeline"),
        generator="edm",
        scarce=["1"],
        **{name: value for name, value in report.__dict__.items() if name != "log"},
    )
    return source_record(folder), checkpoint


def draw(
    trained: tuple[Source, Checkpoint], folder: Path, ranges: dict[int, tuple[int, int]]
) -> tuple[SampleBatch, dict[str, bytes]]:
    folder.mkdir()
    batch = sample(CONFIG, *trained, SampleRequest(ranges=ranges), folder)
    images, table = np.load(folder / IMAGES_FILE), pd.read_parquet(folder / SAMPLES_FILE)
    return batch, {name: images[row].tobytes() for name, row in zip(table["sample_id"], table["row"], strict=True)}


def test_samples_do_not_depend_on_what_else_is_drawn(trained: tuple[Source, Checkpoint], tmp_path: Path) -> None:
    batch, together = draw(trained, tmp_path / "a", {0: (0, 16), 1: (0, 24)})
    assert batch.n_samples == len(together) == 40
    assert batch.counts == {0: 16, 1: 24}
    _, later = draw(trained, tmp_path / "b", {1: (16, 8)})
    _, first = draw(trained, tmp_path / "c", {1: (0, 8)})
    assert all(together[name] == image for name, image in (later | first).items())
    assert len(later | first) == 16


@pytest.mark.parametrize(("guidance", "steps"), [(1.0, 8), (1.5, 14)])
def test_a_number_of_steps_that_is_not_given_is_the_checkpoints(
    trained: tuple[Source, Checkpoint], tmp_path: Path, guidance: float, steps: int
) -> None:
    drawn = {}
    for name, asked in (("default", None), ("asked", steps)):
        changed = CONFIG.sample.model_copy(update={"steps": asked, "guidance": guidance})
        (tmp_path / name).mkdir()
        config = CONFIG.model_copy(update={"sample": changed})
        batch = sample(config, *trained, SampleRequest(ranges={1: (0, 8)}), tmp_path / name)
        assert batch.steps == steps
        drawn[name] = batch.digest
    assert drawn["default"] == drawn["asked"]


_WORKER = """
import json, sys
from pathlib import Path
from synthaug.config import Config
from synthaug.records import Checkpoint, SampleRequest, Source
from synthaug.sample import sample
config, source, checkpoint, root, out, requests = sys.argv[1:]
for number, (label, batch) in enumerate(json.loads(requests)):
    folder = Path(out) / str(number)
    folder.mkdir(parents=True)
    sample(Config.model_validate_json(config), Source(**json.loads(source), directory=Path(root)),
           Checkpoint(**json.loads(checkpoint), directory=Path(root)),
           SampleRequest(ranges={label: (8 * batch, 8)}), folder)
"""


@pytest.mark.slow
def test_three_workers_of_their_own_in_shuffled_order_draw_the_same_bits(
    trained: tuple[Source, Checkpoint], tmp_path: Path
) -> None:
    n_workers = 3
    _, here = draw(trained, tmp_path / "here", {0: (0, 24), 1: (0, 16), 2: (0, 24)})
    source, checkpoint = trained
    batches = [[label, batch] for label, n in ((0, 3), (1, 2), (2, 3)) for batch in range(n)]
    random.Random(n_workers).shuffle(batches)
    texts = [CONFIG.model_dump_json(), source.model_dump_json(), checkpoint.model_dump_json()]
    workers = []
    for number in range(n_workers):
        part = [*texts, str(checkpoint.directory), str(tmp_path / f"{number}"), json.dumps(batches[number::n_workers])]
        workers.append(subprocess.Popen([sys.executable, "-c", _WORKER, *part]))
    assert [worker.wait(timeout=120) for worker in workers] == [0] * n_workers
    there = {}
    for folder in sorted(tmp_path.glob("[0-9]/*")):
        images, table = np.load(folder / IMAGES_FILE), pd.read_parquet(folder / SAMPLES_FILE)
        there |= {name: images[row].tobytes() for name, row in zip(table["sample_id"], table["row"], strict=True)}
    assert there == here


def test_what_was_killed_and_begun_again_draws_the_same_bits(
    trained: tuple[Source, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = draw(trained, tmp_path / "whole", {0: (0, 16), 2: (0, 8)})
    original = EDMGenerator.sample
    calls: list[int] = []
    died: list[int] = []

    def dying(self: EDMGenerator, *arguments: Any, **settings: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2 and not died:
            died.append(1)
            raise KeyboardInterrupt
        return original(self, *arguments, **settings)

    monkeypatch.setattr(EDMGenerator, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        draw(trained, tmp_path / "killed", {0: (0, 16), 2: (0, 8)})
    calls.clear()
    drawn = np.load(tmp_path / "whole" / IMAGES_FILE)
    batch = sample(CONFIG, *trained, SampleRequest(ranges={0: (0, 16), 2: (0, 8)}), tmp_path / "killed")
    assert np.array_equal(np.load(tmp_path / "killed" / IMAGES_FILE), drawn)
    assert batch.n_samples == len(whole)
    # The probe of two micro-batches was not finished, so nothing of it counts.
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_beside_each_other_in_any_division_draw_the_same_bits(
    trained: tuple[Source, Checkpoint], tmp_path: Path, threads: int
) -> None:
    config = CONFIG.model_copy(update={"sample": CONFIG.sample.model_copy(update={"threads": threads})})
    request = SampleRequest(ranges={0: (0, 24), 2: (8, 24)})
    digests = []
    for number, (engine, size) in enumerate(((None, None), (Mapped(workers=3, seed=1), 8), (Mapped(workers=2), 16))):
        folder = tmp_path / str(number)
        folder.mkdir()
        divided = config.model_copy(update={"scale": ScaleConfig(shard_images=size)})
        more = {} if engine is None else {"map_shards": engine}
        digests.append(sample(divided, *trained, request, folder, **more).digest)
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.slow
@given(seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=12, unique=True), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_does_not_depend_on_batch_or_order(
    trained: tuple[Source, Checkpoint], seeds: list[int], data: st.DataObject
) -> None:
    pipeline = EDMGenerator.load(trained[1].directory / "pipeline", device="cpu").pipeline
    together = dict(zip(seeds, pipeline.noise(seeds), strict=True))
    order = data.draw(st.permutations(seeds))
    taken = order[: data.draw(st.integers(1, len(order)))]
    for seed, noise in zip(taken, pipeline.noise(taken), strict=True):
        assert noise.equal(together[seed])
        assert noise.equal(pipeline.noise([seed])[0])


def test_a_request_must_fill_micro_batches(trained: tuple[Source, Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fill micro-batches of 8"):
        sample(CONFIG, *trained, SampleRequest(ranges={0: (0, 12)}), tmp_path)


def splits_record(directory: Path, broken: bool = False) -> Splits:
    data = digits_data()
    ids = [f"id-{row}" for row in range(len(data.images))]
    split = np.full(len(ids), "test", dtype=object)
    split[data.rows], split[data.heldout_rows] = "train", "validation"
    labels = np.zeros(len(ids), np.int64)
    labels[data.rows], labels[data.heldout_rows] = data.labels, data.heldout_labels
    table = pd.DataFrame({"row": range(len(ids)), "image_id": ids, "label": labels, "split": split})
    table["group_key"], table["held_back"] = ids, None
    if broken:
        table.loc[len(ids) - 1, "image_id"] = f"id-{data.rows[0]}"
    table.to_parquet(directory / SPLITS_FILE)
    return Splits(directory=directory, digest="1" * 64, method="given", counts={}, held_back={}, n_groups=len(ids))


def plan_record(directory: Path) -> BalancePlan:
    classes = tuple(
        ClassPlan(label=label, name=str(label), n_real=80, n_target=100 if label == 1 else 80) for label in range(3)
    )
    return BalancePlan(directory=directory, digest="2" * 64, classes=classes)


def test_train_records_what_the_generator_saw(tmp_path: Path) -> None:
    source, splits, plan = source_record(tmp_path), splits_record(tmp_path), plan_record(tmp_path)
    out = tmp_path / "train"
    out.mkdir()
    checkpoint = train(CONFIG, source, splits, plan, out)
    seen, table = pd.read_parquet(out / "seen.parquet"), pd.read_parquet(tmp_path / SPLITS_FILE)
    test = set(table.loc[table["split"] == "test", "image_id"])
    assert test
    assert not test & set(seen["image_id"])
    assert set(seen.loc[seen["use"] == "train", "image_id"]) == set(table.loc[table["split"] == "train", "image_id"])
    assert checkpoint.digest == digest_directory(out / "pipeline")
    assert checkpoint.scarce == ["1"]
    assert set(checkpoint.heldout_loss_base) == {"0", "1", "2"}
    # What lets it go on stays until the stage is recorded as done.
    assert (out / "work").is_dir()


def test_train_refuses_a_test_image_among_its_own(tmp_path: Path) -> None:
    source, plan = source_record(tmp_path), plan_record(tmp_path)
    with pytest.raises(LeakError, match="1 test images are also among the training"):
        train(CONFIG, source, splits_record(tmp_path, broken=True), plan, tmp_path)


def test_train_settings_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        TrainConfig(batch_size=1)
