"""Splitting: nothing is ever on both sides of the line, and nothing moves when the dataset grows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthaug.errors import DatasetError, LeakError, OutputError
from synthaug.formats.near_duplicates import Pairs, near_pairs
from synthaug.formats.split_groups import place_groups, without_giants
from synthaug.records import IMAGES_FILE, INDEX_FILE, SPLITS, PixelSpec, Source, Splits
from synthaug.split import split
from tests.small_sources import folder, job, picture, put, run

SPEC = PixelSpec(
    channels=1, dtype="uint8", colour="grey", low=0, high=255, size=8, fit="none", interpolation="none",
    smallest=(8, 8), largest=(8, 8),
)  # fmt: skip


class Bench:
    """Sources made of columns, divided again and again with one ledger."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.number = 0
        self.ledger = directory / "ledger.json"

    def source(
        self,
        labels: Sequence[int],
        *,
        groups: Sequence[str | None] | None = None,
        given: Sequence[str | None] | None = None,
        pictures: Sequence[int] | None = None,
        synthetic: Sequence[bool] | None = None,
        images: np.ndarray | None = None,
    ) -> Source:
        """A source in which equal numbers in `pictures` are equal images."""
        self.number += 1
        directory = self.directory / f"source{self.number}"
        directory.mkdir()
        n = len(labels)
        pictures = range(n) if pictures is None else pictures
        if images is None:
            images = np.stack([picture(seed) for seed in pictures])[..., None]
        np.save(directory / IMAGES_FILE, images)
        index = pd.DataFrame({
            "row": np.arange(n), "image_id": [f"id{k}" for k in range(n)], "label": np.asarray(labels, np.int64),
            "group": pd.array([None] * n if groups is None else list(groups), "str"),
            "given_split": pd.array([None] * n if given is None else list(given), "str"),
            "content_hash": [f"content{seed}" for seed in pictures], "origin": "",
            "is_synthetic": [False] * n if synthetic is None else list(synthetic),
        })  # fmt: skip
        index.to_parquet(directory / INDEX_FILE, index=False)
        classes = tuple(f"class{k}" for k in range(max(labels) + 1))
        return Source(
            directory=directory, digest=f"digest{self.number}", name="made", fingerprint="", classes=classes,
            pixels=SPEC, n_images=n, n_set_aside=0, set_aside_reasons={}, n_duplicates=0, n_synthetic=0,
        )  # fmt: skip

    def split(self, source: Source, *, grouped: bool = False, **sections: Any) -> tuple[Splits, pd.DataFrame]:
        self.number += 1
        directory = self.directory / f"split{self.number}"
        directory.mkdir()
        columns = {"columns": {"group": "patient"}} if grouped else {}
        dataset = {**columns, **sections.pop("dataset", {})}
        options = {"ledger": str(self.ledger), **sections.pop("split", {})}
        record = split(job("digits", dataset=dataset, split=options, **sections), source, directory)
        table = pd.read_parquet(directory / "splits.parquet")
        assert table.columns.tolist() == ["row", "image_id", "label", "split", "group_key", "held_back"]
        assert table["row"].tolist() == list(range(len(table)))
        assert set(table["split"]) <= set(SPLITS)
        return record, table


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def usable(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["held_back"].isna()]


# ---------------------------------------------------------------- properties


GROUPED = st.integers(2, 40).flatmap(
    lambda n_groups: st.lists(
        st.tuples(st.integers(0, n_groups - 1), st.integers(0, 2), st.integers(0, 150)), min_size=1, max_size=120
    )
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=GROUPED, extra=GROUPED, with_groups=st.booleans())
def test_groups_and_copies_are_never_divided_and_old_images_never_move(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int]],
    extra: list[tuple[int, int, int]],
    with_groups: bool,
) -> None:
    bench = Bench(tmp_path_factory.mktemp("split"))
    # A picture has one label: contradictions were set aside by the reading.
    everything = [(f"p{group}", (seed % 3), seed) for group, _, seed in rows + extra]
    old: dict[int, str] = {}
    for count in (len(rows), len(everything)):
        part = everything[:count]
        groups = [group for group, _, _ in part] if with_groups else None
        source = bench.source([0, 1, 2] + [k for _, k, _ in part], groups=groups and ["a", "b", "c", *groups],
                              pictures=[1000, 1001, 1002] + [seed for _, _, seed in part])  # fmt: skip
        _, table = bench.split(source, grouped=with_groups)
        table["content"] = pd.read_parquet(source.directory / INDEX_FILE)["content_hash"]
        table["group"] = pd.read_parquet(source.directory / INDEX_FILE)["group"]
        used = usable(table)
        assert (used.groupby("group_key")["split"].nunique() == 1).all()
        assert (used.groupby("content")["split"].nunique() == 1).all()
        assert (used.groupby("content")["group_key"].nunique() == 1).all()
        if with_groups:
            assert (table.groupby("group")["split"].nunique() == 1).all()
        now = dict(zip(used["content"], used["split"], strict=True))
        assert all(now[content] == where for content, where in old.items() if content in now)
        assert set(old) <= set(table["content"])
        old = now


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    validation=st.floats(0, 0.4), test=st.floats(0, 0.4), seed=st.integers(0, 9),
)  # fmt: skip
def test_shares_are_met_in_every_class(counts: list[int], validation: float, test: float, seed: int) -> None:
    classes = [{label: 1} for label, count in enumerate(counts) for _ in range(count)]
    keys = [f"{np.random.default_rng([seed, number]).integers(1 << 62):016x}" for number in range(len(classes))]
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    splits = place_groups(classes, [None] * len(classes), keys, shares)
    for label, count in enumerate(counts):
        for name, share in shares.items():
            got = sum(where == name for where, group in zip(splits, classes, strict=True) if label in group)
            # One image off by rounding, one by the wish that validation has an image of every class.
            assert abs(got - share * count) < 2.01
        assert "train" in {where for where, group in zip(splits, classes, strict=True) if label in group}


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=20, max_size=80), seed=st.integers(0, 99))
def test_shares_are_near_with_groups_of_any_size(sizes: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = [{int(random.integers(0, 3)): size} for size in sizes]
    keys = [f"{key:016x}" for key in random.integers(0, 1 << 62, len(sizes))]
    shares = {"train": 0.7, "validation": 0.15, "test": 0.15}
    splits = place_groups(classes, [None] * len(sizes), keys, shares)
    for label in range(3):
        total = sum(group.get(label, 0) for group in classes)
        for name, share in shares.items():
            got = sum(group.get(label, 0) for group, where in zip(classes, splits, strict=True) if where == name)
            assert abs(got - share * total) <= 12


def test_the_same_data_give_the_same_splits_in_any_order(bench: Bench) -> None:
    labels, groups = [k % 2 for k in range(60)], [f"p{k // 3}" for k in range(60)]
    first, table = bench.split(bench.source(labels, groups=groups), grouped=True)
    order = np.random.default_rng(0).permutation(60)
    mixed = bench.source([labels[k] for k in order], groups=[groups[k] for k in order], pictures=order.tolist())
    _, again = bench.split(mixed, grouped=True, split={"ledger": str(bench.directory / "b.json")})
    assert again["split"].tolist() == table["split"].to_numpy()[order].tolist()
    assert first.method == "by group"
    assert first.n_groups == 20


def test_the_seed_decides(bench: Bench) -> None:
    source = bench.source([k % 2 for k in range(60)])
    tables = [
        bench.split(source, split={"seed": seed, "ledger": str(bench.directory / f"{seed}.json")})[1] for seed in (1, 2)
    ]
    assert tables[0]["split"].tolist() != tables[1]["split"].tolist()
    assert set(tables[0]["group_key"]).isdisjoint(tables[1]["group_key"])


# ---------------------------------------------------------------- growth and the ledger


def test_a_grown_dataset_keeps_every_image_where_it_was_and_stays_near_the_shares(bench: Bench) -> None:
    old: dict[int, str] = {}
    for n in (40, 41, 90, 200):
        # New rows come first, so that every number of a row changes.
        seeds = list(range(n))[::-1]
        _, table = bench.split(bench.source([seed % 2 for seed in seeds], pictures=seeds))
        now = dict(zip(seeds, table["split"], strict=True))
        assert all(now[seed] == where for seed, where in old.items())
        old = now
        shares = table["split"].value_counts(normalize=True)
        assert abs(shares["train"] - 0.7) < 0.06
        assert abs(shares["test"] - 0.15) < 0.06


def test_without_the_ledger_growth_could_move_images(bench: Bench) -> None:
    """The oracle of the test above: the ledger is what keeps them."""
    tables = []
    for n in (40, 200):
        source = bench.source([k % 2 for k in range(n)])
        tables.append(bench.split(source, split={"ledger": str(bench.directory / f"{n}.json")})[1])
    assert tables[0]["split"].tolist() != tables[1]["split"].tolist()[:40]


def test_a_copy_of_a_known_image_brings_its_new_group_along(bench: Bench) -> None:
    labels, groups = [k % 2 for k in range(40)], [f"p{k}" for k in range(40)]
    _, table = bench.split(bench.source(labels, groups=groups), grouped=True)
    for row in range(40):
        # The patient comes back under another name, with one old picture and one new one.
        source = bench.source([*labels, row % 2, row % 2], groups=[*groups, f"q{row}", f"q{row}"],
                              pictures=[*range(40), row, 500 + row])  # fmt: skip
        _, grown = bench.split(source, grouped=True)
        assert grown["split"][40] == grown["split"][41] == table["split"][row]
        assert grown["group_key"][40] == grown["group_key"][row]


def test_a_new_image_that_ties_two_splits_together_is_held_back(bench: Bench) -> None:
    labels, groups = [k % 2 for k in range(40)], [f"p{k}" for k in range(40)]
    _, table = bench.split(bench.source(labels, groups=groups), grouped=True)
    train, test = (int(np.flatnonzero(table["split"] == name)[0]) for name in ("train", "test"))
    source = bench.source([*labels, train % 2], groups=[*groups, f"p{test}"], pictures=[*range(40), train])
    record, grown = bench.split(source, grouped=True)
    assert grown["held_back"][:40].isna().all()
    assert grown["held_back"][40] == "duplicate"
    assert grown["split"][:40].tolist() == table["split"].tolist()
    assert record.held_back == {"duplicate": 1}


def test_the_ledger_holds_no_names(bench: Bench) -> None:
    groups = [f"Erika Mustermann {k}" for k in range(20)]
    record, table = bench.split(bench.source([k % 2 for k in range(20)], groups=groups), grouped=True)
    assert record.ledger == str(bench.ledger)
    text = bench.ledger.read_text()
    assert "Erika" not in text
    assert "content" not in text
    assert not table["group_key"].str.contains("Erika").any()
    values = json.loads(text)
    assert len(values["groups"]) == len(values["images"]) == 20


def test_another_seed_does_not_silently_divide_anew(bench: Bench) -> None:
    source = bench.source([k % 2 for k in range(20)])
    bench.split(source)
    with pytest.raises(DatasetError, match=r"made with another split.seed"):
        bench.split(source, split={"seed": 5})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "synthaug split ledger", "version": 9}', "\x00"])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(bench: Bench, text: str) -> None:
    bench.ledger.write_text(text)
    with pytest.raises(DatasetError, match="is not a ledger of splits"):
        bench.split(bench.source([k % 2 for k in range(20)]))
    assert bench.ledger.read_text() == text


def test_a_ledger_is_not_written_again_without_news(bench: Bench) -> None:
    source = bench.source([k % 2 for k in range(20)])
    first, _ = bench.split(source)
    before = bench.ledger.stat().st_mtime_ns
    again, _ = bench.split(source)
    assert bench.ledger.stat().st_mtime_ns == before
    assert again.digest == first.digest


def test_the_ledger_lies_beside_the_folder_never_inside(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 6, "b": 6})
    config = job("imagefolder", root, output=tmp_path / "output")
    source, _, _ = run(config, tmp_path / "read")
    (tmp_path / "split").mkdir()
    record = split(config, source, tmp_path / "split")
    assert record.ledger == str(tmp_path / "data.synthaug-splits.json")
    assert sorted(path.name for path in root.iterdir()) == ["a", "b"]


def test_a_folder_without_the_right_to_write_sends_the_ledger_to_the_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path / "locked" / "data", {"a": 6, "b": 6})
    config = job("imagefolder", root, output=tmp_path / "output")
    source, _, _ = run(config, tmp_path / "read")
    root.parent.chmod(0o555)
    tables = []
    try:
        for number in range(2):
            (tmp_path / f"split{number}").mkdir()
            with caplog.at_level(logging.INFO):
                record = split(config, source, tmp_path / f"split{number}")
            assert record.ledger == str(tmp_path / "output" / "splits-ledger.json")
            tables.append(record.digest)
    finally:
        root.parent.chmod(0o755)
    assert tables[0] == tables[1]
    assert "splits-ledger.json; keep it" in caplog.text
    assert not (tmp_path / "locked" / "data.synthaug-splits.json").exists()


def test_a_ledger_that_cannot_be_written_is_an_error(bench: Bench) -> None:
    (bench.directory / "file").write_text("")
    with pytest.raises(OutputError, match=r"ledger of splits .* cannot be written"):
        bench.split(bench.source([0, 1] * 10), split={"ledger": str(bench.directory / "file" / "x.json")})


# ---------------------------------------------------------------- given splits


def test_given_splits_are_kept_and_need_no_ledger(bench: Bench) -> None:
    where = ["train"] * 10 + ["validation"] * 4 + ["test"] * 6
    record, table = bench.split(bench.source([0, 1] * 10, given=where))
    assert table["split"].tolist() == where
    assert (record.method, record.ledger) == ("given", None)
    assert record.counts == {"train": [5, 5], "validation": [2, 2], "test": [3, 3]}
    assert not bench.ledger.exists()


def test_what_is_missing_is_taken_from_train_by_group(bench: Bench) -> None:
    where = ["train"] * 60 + ["test"] * 20
    groups = [f"p{k // 3}" for k in range(60)] + [f"t{k}" for k in range(20)]
    record, table = bench.split(bench.source([0, 1] * 40, groups=groups, given=where), grouped=True)
    assert (table["split"][60:] == "test").all()
    assert (table["split"] == "test").sum() == 20
    assert (table["split"] == "validation").sum() == 9
    assert (table.groupby("group_key")["split"].nunique() == 1).all()
    assert record.method == "given; validation taken from train by group"
    grown_groups = [*groups, "new"]
    _, grown = bench.split(bench.source([0, 1] * 40 + [0], groups=grown_groups, given=[*where, "train"]), grouped=True)
    assert grown["split"][:80].tolist() == table["split"].tolist()


def test_train_alone_is_divided_like_no_splits_at_all(bench: Bench) -> None:
    record, table = bench.split(bench.source([0, 1] * 20, given=["train"] * 40))
    assert record.method == "by near-duplicate cluster"
    assert set(table["split"]) == set(SPLITS)


def test_no_train_among_the_given_is_refused(bench: Bench) -> None:
    with pytest.raises(DatasetError, match="gives the splits test, validation and no train"):
        bench.split(bench.source([0, 1] * 4, given=["test", "validation"] * 4))


def test_a_group_in_two_given_splits_is_a_leak(bench: Bench) -> None:
    groups = ["Erika", "Erika", "Max", "Max", "x", "y"]
    where = ["train", "test", "train", "train", "validation", "validation"]
    with pytest.raises(LeakError, match=r"1 of 4 groups of column 'patient' .* 1 in train, 1 in test") as caught:
        bench.split(bench.source([0, 1] * 3, groups=groups, given=where), grouped=True)
    assert "Erika" not in str(caught.value)


def test_of_copies_in_given_splits_test_keeps_its_own(bench: Bench) -> None:
    where = ["train", "train", "validation", "test", "train", "validation", "train", "train"]
    record, table = bench.split(bench.source([0, 0, 0, 0, 1, 1, 1, 0], given=where, pictures=[1, 1, 1, 1, 2, 2, 3, 4]))
    held = table["held_back"].notna().tolist()
    assert held == [True, True, True, False, True, False, False, False]
    assert record.held_back == {"duplicate": 4}


def test_copies_within_a_split_stay(bench: Bench) -> None:
    where = ["train"] * 4 + ["test"] * 2
    source = bench.source([0, 0, 1, 1, 0, 1], given=where, pictures=[1, 1, 2, 2, 3, 4])
    record, _ = bench.split(source, split={"validation": 0})
    assert record.held_back == {}
    record, table = bench.split(bench.source([0, 0, 1, 1] * 8, pictures=[k // 2 for k in range(32)]))
    assert record.held_back == {}
    assert (table["split"][::2].to_numpy() == table["split"][1::2].to_numpy()).all()


def test_a_ledger_that_contradicts_the_given_test_set_is_a_leak(bench: Bench) -> None:
    _, table = bench.split(bench.source([0, 1] * 20))
    tested = int(np.flatnonzero(table["split"] == "test")[0])
    where = ["train"] * 40 + ["test"] * 2
    source = bench.source([*([0, 1] * 20), 0, 1], given=where, pictures=[*range(40), 90, 91])
    assert tested < 40
    with pytest.raises(LeakError, match="has put images into test that the source now gives as train"):
        bench.split(source)


# ---------------------------------------------------------------- near-duplicates


def shifted(base: np.ndarray, by: int) -> np.ndarray:
    return np.clip(base.astype(int) + by, 0, 255).astype(np.uint8)


def test_a_picture_moved_or_flipped_stays_with_itself(bench: Bench) -> None:
    """As in ultrasound sets, which hold a view twice: far apart pixel by pixel, and a leak all the same."""
    from sklearn.datasets import load_digits

    digits = load_digits().images[::17][:100]
    pictures = np.rint(digits * (255 / 16)).astype(np.uint8)
    again = np.stack(
        [
            np.clip(np.roll(picture[:, ::-1] if k % 2 else picture, (1, -1), (0, 1)) * 0.9 + 12, 0, 255)
            for k, picture in enumerate(pictures[:30])
        ]
    ).astype(np.uint8)
    images = np.concatenate([pictures, again])[..., None]
    _, table = bench.split(bench.source([k % 2 for k in range(130)], images=images))
    keys = table["group_key"].to_numpy()
    assert (keys[:30] == keys[100:]).all()
    assert (table["split"].to_numpy()[:30] == table["split"].to_numpy()[100:]).all()
    assert len(set(keys)) > 95
    apart = {"moved_duplicates": False, "ledger": str(bench.directory / "apart.json")}
    _, alone = bench.split(bench.source([k % 2 for k in range(130)], images=images), split=apart)
    assert alone["group_key"].nunique() == 130


def test_near_duplicates_stay_together(bench: Bench) -> None:
    images = np.stack([shifted(picture(k // 4), k % 4) for k in range(160)])[..., None]
    record, table = bench.split(bench.source([k // 4 % 2 for k in range(160)], images=images))
    assert (table["split"].to_numpy().reshape(40, 4) == table["split"].to_numpy()[::4, None]).all()
    assert record.n_groups == 40
    assert record.method == "by near-duplicate cluster"
    _, apart = bench.split(
        bench.source([k // 4 % 2 for k in range(160)], images=images),
        split={
            "near_duplicate_distance": 0,
            "moved_duplicates": False,
            "ledger": str(bench.directory / "apart.json"),
        },
    )
    assert apart["group_key"].nunique() == 160


def test_a_new_image_between_two_splits_is_held_back(bench: Bench) -> None:
    # Forty pictures, each in two shades that are no near-duplicates; then a shade between each two, near to both.
    dark = np.stack([picture(k) // 2 for k in range(40)])[..., None]
    old = np.concatenate([dark, dark + np.uint8(8)])
    options = {"near_duplicate_distance": 5 / 255, "moved_duplicates": False}
    _, table = bench.split(bench.source([0, 1] * 40, images=old), split=options)
    assert table["group_key"].nunique() == 80
    new = np.concatenate([old, dark + np.uint8(4)])
    _, grown = bench.split(bench.source([0, 1] * 60, images=new), split=options)
    assert grown["split"][:80].tolist() == table["split"].tolist()
    assert grown["held_back"][:80].isna().all()
    first, second, between = (grown["split"][start : start + 40].to_numpy() for start in (0, 40, 80))
    torn = first != second
    assert torn.any()
    assert (grown["held_back"][80:].eq("duplicate") == torn).all()
    assert (between[~torn] == first[~torn]).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 60), size=st.sampled_from([8, 9, 20]), channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]), limit=st.sampled_from([0.005, 0.02, 0.1]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_connected_is_what_comparing_all_with_all_connects(
    tmp_path_factory: pytest.TempPathFactory, n: int, size: int, channels: int, dtype: str, limit: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    high = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}[dtype]
    centres = random.random((5, size, size, channels))
    unit = np.clip(centres[random.integers(0, 5, n)] + random.normal(0, limit * 0.7, (n, size, size, channels)), 0, 1)
    images = (unit * high).astype(dtype)
    path = tmp_path_factory.mktemp("pairs") / IMAGES_FILE
    np.save(path, images)
    spec = SPEC.model_copy(update={"channels": channels, "dtype": dtype, "high": high, "size": size})
    rows = np.sort(random.choice(n, max(2, n - 3), replace=False))
    found = near_pairs(path, rows, spec, limit)
    scaled = images[rows].astype(np.float64) / high
    distance = np.sqrt(((scaled[:, None] - scaled[None]) ** 2).mean(axis=(2, 3, 4)))
    assert found.limit == limit
    assert len(found.first) < len(rows)
    np.testing.assert_allclose(found.distance, distance[found.first, found.second], atol=1e-4)
    for bound in (limit, limit / 2, limit / 8):
        kept = found.closer_than(bound)
        ours = components(len(rows), zip(kept.first, kept.second, strict=True))
        # Distances within rounding of the bound may fall on either side.
        some = components(len(rows), zip(*np.nonzero(distance <= bound - 1e-4), strict=True))
        more = components(len(rows), zip(*np.nonzero(distance <= bound + 1e-4), strict=True))
        assert len(set(zip(some, ours, strict=True))) == len(set(some))
        assert len(set(zip(ours, more, strict=True))) == len(set(ours))


def components(count: int, pairs: Any) -> list[int]:
    """The smallest member of each one's component, the slow way."""
    least = list(range(count))
    pairs = list(pairs)
    for _ in range(count):
        for a, b in pairs:
            least[a] = least[b] = min(least[a], least[b])
    return least


def test_too_much_work_narrows_the_search_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthaug.formats.near_duplicates._WORK", 1e5)
    monkeypatch.setattr("synthaug.formats.near_duplicates._SEARCH_ROWS", 16)
    images = np.stack([shifted(np.full((8, 8, 1), 100), k % 3) for k in range(200)])
    np.save(tmp_path / IMAGES_FILE, images)
    found = near_pairs(tmp_path / IMAGES_FILE, np.arange(200), SPEC, 0.1)
    assert found.limit < 0.1
    assert (found.distance <= found.limit).all()


def test_a_chain_through_everything_is_broken_and_reported(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    steps = np.stack([np.full((8, 8, 1), k, np.uint8) for k in range(200)])
    twins = np.stack([shifted(picture(k // 2), k % 2) for k in range(40)])[..., None]
    source = bench.source([k % 2 for k in range(240)], images=np.concatenate([steps, twins]))
    record, table = bench.split(source)
    assert "lowered" in record.method
    assert "too many images resemble each other" in caplog.text
    assert table["split"].value_counts()["train"] == pytest.approx(168, abs=4)
    # Clusters that hold few images are not touched by that.
    assert (table["group_key"][200::2].to_numpy() == table["group_key"][201::2].to_numpy()).all()


def test_clusters_of_a_reasonable_size_are_left_whole() -> None:
    first = np.arange(19)
    pairs = Pairs(first, first + 1, np.full(19, 0.01), 0.02)
    kept, least = without_giants(pairs, 100)
    assert len(kept.first) == 19
    assert least == 0.02


# ---------------------------------------------------------------- cut, exclude, marks, small classes


def test_a_cut_keeps_the_first_of_a_seeded_shuffle_of_train_alone(bench: Bench) -> None:
    labels = [0, 1] * 50
    where = (["train"] * 4 + ["validation"] * 2 + ["test"] * 4) * 10
    cut = {"cut": {"class1": 7}, "cut_seed": 3}
    record, table = bench.split(bench.source(labels, given=where), dataset=cut)
    members = [row for row in range(100) if labels[row] == 1 and where[row] == "train"]
    kept = np.array(members)[np.random.default_rng(3).permutation(len(members))[:7]]
    assert set(
        np.flatnonzero((table["held_back"] != "cut") & (table["split"] == "train") & (table["label"] == 1))
    ) == set(kept)
    assert record.counts == {"train": [20, 7], "validation": [10, 10], "test": [20, 20]}
    assert record.held_back == {"cut": 13}


def test_a_cut_does_not_change_who_is_in_which_split(bench: Bench) -> None:
    source = bench.source([0, 1] * 50)
    plain = bench.split(source, split={"ledger": str(bench.directory / "a.json")})[1]
    cut = bench.split(source, dataset={"cut": {"class0": 3}}, split={"ledger": str(bench.directory / "b.json")})[1]
    assert cut["split"].tolist() == plain["split"].tolist()


def test_a_cut_above_what_is_there_is_reported(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    record, _ = bench.split(bench.source([0, 1] * 10), dataset={"cut": {"class0": 99}})
    assert record.held_back == {}
    assert "class class0 is cut to 99 images, but has only 7 in train" in " ".join(caplog.text.split())


@pytest.mark.parametrize("setting", [{"cut": {"clas1": 2}}, {"exclude": ["clas1"]}])
def test_an_unknown_class_is_refused_with_the_nearest(bench: Bench, setting: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"class 'clas1', which the data do not have\. Did you mean 'class1'"):
        bench.split(bench.source([0, 1] * 10), dataset=setting)


def test_excluded_classes_are_held_back_everywhere(bench: Bench) -> None:
    record, table = bench.split(bench.source([0, 1, 2] * 10), dataset={"exclude": ["class2"]})
    assert (table["held_back"].eq("excluded") == table["label"].eq(2)).all()
    assert record.held_back == {"excluded": 10}
    assert all(counts[2] == 0 for counts in record.counts.values())
    with pytest.raises(DatasetError, match="fewer than two classes"):
        bench.split(bench.source([0, 1, 2] * 10), dataset={"exclude": ["class1", "class2"]})


def test_synthetic_rows_are_used_for_nothing(bench: Bench) -> None:
    synthetic = [k % 4 == 0 for k in range(40)]
    record, table = bench.split(bench.source([k // 2 % 2 for k in range(40)], synthetic=synthetic))
    assert (table["held_back"].eq("synthetic") == np.array(synthetic)).all()
    assert record.held_back == {"synthetic": 10}
    assert not (set(table.loc[synthetic, "image_id"]) & set(usable(table)["image_id"]))
    assert (table.loc[synthetic, "split"] == "train").all()


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [2, 1, 0]), (4, [2, 1, 1])])
def test_small_classes_go_to_train_first_then_validation(
    bench: Bench, caplog: pytest.LogCaptureFixture, count: int, expected: list[int]
) -> None:
    record, _ = bench.split(bench.source([0, 1] * 30 + [2] * count))
    assert [record.counts[name][2] for name in SPLITS] == expected
    assert ("class class2 has no image in validation" in caplog.text) == (count == 1)


def test_a_class_that_is_one_group_goes_to_train_and_is_reported(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    groups = [f"p{k}" for k in range(60)] + ["lonely"] * 6
    record, _ = bench.split(bench.source([0, 1] * 30 + [2] * 6, groups=groups), grouped=True)
    assert [record.counts[name][2] for name in SPLITS] == [6, 0, 0]
    assert "class class2 has no image in validation" in caplog.text


def test_groups_may_hold_several_classes(bench: Bench) -> None:
    groups = [f"p{k // 5}" for k in range(300)]
    random = np.random.default_rng(0)
    record, table = bench.split(bench.source(random.integers(0, 3, 300).tolist(), groups=groups), grouped=True)
    assert (table.groupby("group_key")["split"].nunique() == 1).all()
    for label in range(3):
        total = sum(record.counts[name][label] for name in SPLITS)
        assert record.counts["validation"][label] == pytest.approx(0.15 * total, abs=5)


def test_images_without_a_group_count_as_one_each(bench: Bench) -> None:
    groups = ["p0"] * 5 + [None] * 35
    record, table = bench.split(bench.source([0, 1] * 20, groups=groups), grouped=True)
    assert record.n_groups == 36
    assert table["group_key"][:5].nunique() == 1


def test_no_shares_mean_all_in_train(bench: Bench) -> None:
    record, table = bench.split(bench.source([0, 1] * 10), split={"validation": 0, "test": 0})
    assert (table["split"] == "train").all()
    assert (record.method, record.ledger) == ("all in train", None)


def test_reading_and_splitting_a_folder_with_copies(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 20, "b": 20})
    for number in range(10):
        put(root / "a" / f"copy{number}.png", picture(number))
    config = job("imagefolder", root)
    source, _, index = run(config, tmp_path / "read")
    (tmp_path / "split").mkdir()
    record = split(config, source, tmp_path / "split")
    table = pd.read_parquet(tmp_path / "split" / "splits.parquet")
    assert (table.groupby(index["content_hash"])["split"].nunique() == 1).all()
    assert record.n_groups == 40
    assert record.held_back == {}
