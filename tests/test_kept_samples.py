"""A part of a batch that a later job keeps: which samples count, and under which label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthaug.formats.samples import read_samples
from synthaug.records import IMAGES_FILE, SAMPLES_FILE, SampleBatch

COUNTS = {0: 3, 1: 2, 4: 5}


def make_batch(folder: Path, counts: dict[int, int] | None = None) -> SampleBatch:
    counts = COUNTS if counts is None else counts
    labels = [label for label, number in counts.items() for _ in range(number)]
    table = pd.DataFrame({"row": range(len(labels)), "label": labels, "sample_id": [f"s{n}" for n in labels]})
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / SAMPLES_FILE, index=False)
    np.save(folder / IMAGES_FILE, np.array(labels))
    return SampleBatch(
        environment={}, directory=folder, digest="d" * 64, checkpoint_digest="c", n_samples=len(labels), counts=counts,
        solver="s", steps=1, guidance=1.0, micro_batch=1, threads=1, device="cpu", seconds=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> SampleBatch:
    return make_batch(tmp_path_factory.mktemp("batch"))


def test_what_is_kept_has_the_labels_of_the_job_and_its_own_images(batch: SampleBatch) -> None:
    part = batch.only({0: 1, 4: 0})
    assert (part.counts, part.n_samples) == ({1: 3, 0: 5}, 8)
    table, images = read_samples(part), np.load(part.directory / IMAGES_FILE)
    assert table["label"].value_counts().to_dict() == part.counts
    # The images stand under the labels they were drawn with.
    assert [{0: 1, 4: 0}[int(label)] for label in images[table["row"]]] == table["label"].tolist()
    assert list(read_samples(part, ["label", "row"])) == ["label", "row"]
    assert SampleBatch.from_plain(part.model_dump(mode="json"), part.directory) == part


def test_all_labels_as_they_are_are_the_batch_itself(batch: SampleBatch) -> None:
    assert batch.only({0: 0, 1: 1, 4: 4, 9: 7}) is batch
    part = batch.only({1: 2})
    assert part.only({2: 2, 0: 1}) is part
    assert len(read_samples(batch)) == batch.n_samples


def test_nothing_kept_is_an_empty_batch(batch: SampleBatch) -> None:
    part = batch.only({})
    assert (part.n_samples, part.counts, len(read_samples(part))) == (0, {}, 0)
    assert read_samples(part)["label"].dtype == "int64"


def test_two_classes_never_become_one(batch: SampleBatch) -> None:
    with pytest.raises(ValueError, match="would make one class of several"):
        batch.only({0: 3, 1: 3})


maps = st.permutations(range(6)).flatmap(
    lambda new: st.sets(st.integers(0, 5)).map(lambda kept: {old: new[old] for old in kept})
)


@given(maps, maps)
def test_maps_laid_over_each_other_are_one(batch: SampleBatch, first: dict[int, int], second: dict[int, int]) -> None:
    twice = batch.only(first).only(second)
    once = batch.only({old: second[new] for old, new in first.items() if new in second})
    if twice.labels == once.labels:
        assert twice == once
    else:  # all of it, there and back again
        assert once is batch
    assert read_samples(twice).equals(read_samples(once))
    assert (twice.counts, twice.n_samples) == (once.counts, once.n_samples)


@given(maps, maps)
def test_digests_tell_parts_from_each_other(batch: SampleBatch, first: dict[int, int], second: dict[int, int]) -> None:
    one, other = batch.only(first), batch.only(second)
    assert (one.digest == other.digest) == (one == other)
