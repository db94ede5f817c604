"""A dataset that grows keeps its shards, byte for byte, where their rows stand; and no row that should be gone."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthaug.digest import digest_file, digest_json
from synthaug.formats.append import OlderRelease, SplitRows, open_older, shards_of
from synthaug.formats.manifest import FORMAT, write_release_file
from synthaug.formats.shards import ShardRow, ShardWriter, lay_out, read_ids, read_stored, shard_number
from synthaug.records import AUDIT_FILE, IMAGES_FILE, SAMPLES_FILE, SPLITS_FILE, PixelSpec
from synthaug.verify import verify
from tests.release_parts import Parts, make_parts

SPEC = PixelSpec(
    channels=1, dtype="uint8", colour="grey", low=0, high=255, size=2, fit="none", interpolation="none",
    smallest=(2, 2), largest=(2, 2),
)  # fmt: skip
CLASSES = ("a", "b", "c")


@dataclass
class Dataset:
    """What a release holds, in the order that `release` has it in: real images, then samples by class and rank."""

    real: list[tuple[str, int]] = field(default_factory=list)  # id, label
    samples: list[list[str]] = field(default_factory=lambda: [[] for _ in CLASSES])  # ids by label and rank
    changed: dict[str, int] = field(default_factory=dict)  # id to how often its image was changed
    n_named: int = 0

    def names(self, n: int, kind: str) -> list[str]:
        self.n_named += n
        return [f"{kind}-{self.n_named - i:04d}" for i in range(n)]

    @property
    def ids(self) -> list[str]:
        return [name for name, _ in self.real] + [name for names in self.samples for name in names]

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self.real] + [label for label, names in enumerate(self.samples) for _ in names]

    def image(self, name: str) -> np.ndarray:
        seed = hashlib.sha256(f"{name} {self.changed.get(name, 0)}".encode()).digest()
        return np.frombuffer(seed[:4], np.uint8).reshape(2, 2, 1)

    def rows(self) -> SplitRows:
        ids = self.ids
        synthetic = np.arange(len(ids)) >= len(self.real)
        return SplitRows(ids, np.array(self.labels, np.int64), synthetic, lambda at: self.image(ids[at]))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["add real", "remove real", "add samples", "make a class again", "drop a sample", "change", "relabel"]
        ),
        st.integers(0, 2),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=3,
)


def changed(dataset: Dataset, steps: Iterable[tuple[str, int, int]]) -> Dataset:
    new = replace(
        dataset,
        real=list(dataset.real),
        samples=[list(names) for names in dataset.samples],
        changed=dict(dataset.changed),
    )
    for step, label, n in steps:
        names = new.samples[label]
        if step == "add real":
            # In the middle too, as a folder's new files are.
            for name in new.names(n, "real"):
                new.real.insert((n * 7) % (len(new.real) + 1), (name, label))
        elif step == "remove real":
            del new.real[n : n + label + 1]
        elif step == "add samples":
            names += new.names(n, "syn")
        elif step == "make a class again":
            new.samples[label] = new.names(len(names), "syn")
        elif step == "drop a sample":
            del names[n : n + 1]
        elif step == "change" and new.ids:
            name = new.ids[n % len(new.ids)]
            new.changed[name] = new.changed.get(name, 0) + 1
        elif step == "relabel" and new.real:
            at = n % len(new.real)
            new.real[at] = (new.real[at][0], label)
    return new


def write(dataset: Dataset, folder: Path, older: OlderRelease | None, rows_per_shard: int) -> list[str]:
    """As much of a release as shards need; returns the names of its shards, in order."""
    (folder / "data").mkdir(parents=True)
    rows = dataset.rows()
    if older is None:
        shards = shards_of("train", rows, rows_per_shard)
    else:
        shards = older.take_over("train", rows, folder, rows_per_shard)
    writer = ShardWriter(folder, SPEC, CLASSES)
    for shard in shards:
        if shard.is_new:
            made = [bool(rows.synthetic[at]) for at in shard.positions]
            ids = [rows.ids[at] for at in shard.positions]
            stored = list(
                writer.write(
                    shard.name,
                    (
                        ShardRow(rows.image(at), int(rows.labels[at]), *((name, None) if syn else (None, name)))
                        for at, name, syn in zip(shard.positions, ids, made, strict=True)
                    ),
                )
            )
        else:
            stored = list(shard.stored())
        assert [(row.shard, row.row) for row in stored] == [(shard.name, n) for n in range(len(shard.positions))]
        found = [image for _, images in read_stored(folder / shard.name) for image in images]
        for at, row, (image, content, pixels) in zip(shard.positions, stored, found, strict=True):
            assert np.array_equal(image, rows.image(at))
            assert (row.content_hash, row.pixel_hash) == (content, pixels)
    names = [shard.name for shard in shards]
    write_release_file(
        folder,
        {
            "format": FORMAT,
            "classes": list(CLASSES),
            "pixels": SPEC.model_dump(mode="json"),
            "splits": {"train": {"shards": names}},
            "files": {name: {"sha256": digest_file(folder / name)} for name in names},
        },
    )
    return names


def held(folder: Path, name: str) -> list[tuple[int | None, bool, str | None]]:
    return list(read_ids(folder / name))


@settings(max_examples=12, deadline=None)
@given(sequence=st.lists(STEPS, min_size=1, max_size=3), rows_per_shard=st.integers(3, 9))
def test_whatever_comes_and_goes_shards_that_stand_are_kept(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[Any], rows_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("grown")
    dataset = changed(Dataset(), [("add real", 0, 10), ("add samples", 1, 12), ("add samples", 2, 5)])
    before = write(dataset, folder / "0", None, rows_per_shard)
    for number, steps in enumerate(sequence, start=1):
        old, (older, here) = dataset, (folder / str(number - 1), folder / str(number))
        dataset = changed(dataset, steps)
        names = write(dataset, here, open_older(older, SPEC, CLASSES), rows_per_shard)

        # It holds what it should, each row once, real images first and each class in order of rank.
        rows = [row for name in names for row in held(here, name)]
        assert sorted(name for _, _, name in rows) == sorted(dataset.ids)
        assert dict(zip(dataset.ids, dataset.labels, strict=True)) == {name: label for label, _, name in rows}
        kinds = [made for _, made, _ in rows]
        assert kinds == sorted(kinds)
        for label, wanted in enumerate(dataset.samples):
            assert [name for at, made, name in rows if made and at == label] == wanted
        sizes = [len(held(here, name)) for name in names]
        assert max(sizes, default=0) <= rows_per_shard
        assert len(names) <= 8 or sum(sizes) >= rows_per_shard * len(names) / 4

        # A name that both have is the same file, and what is new has higher numbers; or everything was written anew.
        same = [name for name in names if name in before and digest_file(here / name) == digest_file(older / name)]
        highest = max((shard_number("train", name) or 0 for name in before), default=-1)
        grown = all(name in same or (shard_number("train", name) or 0) > highest for name in names)
        anew = not grown
        if anew:
            scratch = folder / f"{number} from scratch"
            assert write(dataset, scratch, None, rows_per_shard) == names
            assert all(digest_file(here / name) == digest_file(scratch / name) for name in names)

        # Nothing that could stand is written again: real images that are as they were, and the first of each class.
        if not anew:
            was, now = (
                {(name, label, item.changed.get(name)) for name, label in zip(item.ids, item.labels, strict=True)}
                for item in (old, dataset)
            )
            fine = {name for name, _, _ in was & now}
            begun = Counter[int]()
            for name in before:
                content = held(older, name)
                stands = all(row[2] in fine for row in content)
                ranks = Counter(begun)
                for label, made, row_name in content if stands else []:
                    if made:
                        assert label is not None
                        stands = stands and dataset.samples[label][ranks[label] :][:1] == [row_name]
                        ranks[label] += 1
                if stands:
                    begun = ranks
                assert stands == (name in same), name

        before = names
    # The same again, from itself, is itself.
    assert write(dataset, folder / "again", open_older(here, SPEC, CLASSES), rows_per_shard) == before
    assert all(digest_file(here / name) == digest_file(folder / "again" / name) for name in before)
    shutil.rmtree(folder)


@given(
    n_real=st.integers(0, 40),
    per_class=st.lists(st.integers(1, 40), max_size=12),
    rows_per_shard=st.integers(1, 20),
)
def test_a_layout_places_each_row_once_and_fills_its_shards(
    n_real: int, per_class: list[int], rows_per_shard: int
) -> None:
    labels = np.array([0] * n_real + [label for label, n in enumerate(per_class) for _ in range(n)], np.int64)
    synthetic = np.arange(len(labels)) >= n_real
    shards = lay_out(labels, synthetic, rows_per_shard)
    assert sorted(np.concatenate([[], *shards]).tolist()) == list(range(len(labels)))
    assert all(0 < len(shard) <= rows_per_shard for shard in shards)
    assert all(len(set(synthetic[shard])) == 1 for shard in shards)
    # Real images in their order, and each class in its own.
    order = np.concatenate([np.empty(0, np.int64), *shards])
    for rows in [order[:n_real], *([at for at in order[n_real:] if labels[at] == label] for label in range(12))]:
        assert list(rows) == sorted(rows)
    # A class lies in as few shards as it can, and one at most is not its own.
    for label, n in enumerate(per_class):
        mine = [shard for shard in shards if any(synthetic[shard] & (labels[shard] == label))]
        assert len(mine) == -(-n // rows_per_shard)
        assert sum(len(set(labels[shard])) > 1 for shard in mine) <= 1
    assert len(shards) <= 8 or len(labels) >= rows_per_shard * len(shards) / 4


# ---------------------------------------------------------------- whole releases


def grown(parts: Parts, folder: Path, held_back: Sequence[int] = (), again: Sequence[int] = ()) -> Parts:
    """The same inputs without some real training images, and with the samples of some classes made again."""
    splits, audit = folder / "split", folder / "audit"
    table = pd.read_parquet(parts.splits.directory / SPLITS_FILE)
    train = table[(table["split"] == "train") & table["held_back"].isna()]["row"].to_numpy()
    table.loc[table["row"].isin(train[list(held_back)]), "held_back"] = "cut"
    splits.mkdir(parents=True)
    table.to_parquet(splits / SPLITS_FILE, index=False)
    judged = pd.read_parquet(parts.report.directory / AUDIT_FILE)
    batches = []
    for number, batch in enumerate(parts.batches):
        target = folder / f"sample-{number}"
        target.mkdir()
        samples = pd.read_parquet(batch.directory / SAMPLES_FILE)
        images = np.load(batch.directory / IMAGES_FILE)
        mine = samples["label"].isin(list(again)).to_numpy()
        samples.loc[mine, "sample_id"] = [f"again-{name}" for name in samples.loc[mine, "sample_id"]]
        images[mine] = images[mine][:, ::-1]
        samples.to_parquet(target / SAMPLES_FILE, index=False)
        np.save(target / IMAGES_FILE, images)
        batches.append(batch.model_copy(update={"directory": target, "digest": digest_json([batch.digest, *again])}))
    mine = judged["label"].isin(list(again))
    judged.loc[mine, "sample_id"] = "again-" + judged.loc[mine, "sample_id"]
    audit.mkdir()
    judged.to_parquet(audit / AUDIT_FILE, index=False)
    return replace(
        parts,
        splits=parts.splits.model_copy(update={"directory": splits}),
        batches=tuple(batches),
        report=parts.report.model_copy(update={"directory": audit}),
    )


def table_of(release: Path) -> dict[str, Any]:
    """Rows by id with label, split and image; the manifest without places."""
    stated = json.loads((release / "release.json").read_text())
    rows = {}
    for split, values in stated["splits"].items():
        for name in values["shards"]:
            images = [pixels for _, images in read_stored(release / name) for _, _, pixels in images]
            for (label, made, row), pixels in zip(read_ids(release / name), images, strict=True):
                rows[row] = (split, label, made, pixels)
    manifest = pd.read_parquet(release / "manifest.parquet").drop(columns=["shard", "row"])
    counts = {
        split: {name: value for name, value in values.items() if name != "shards"}
        for split, values in stated["splits"].items()
    }
    return {"rows": rows, "manifest": manifest.sort_values(["label", "rank"]).to_dict("list"), "counts": counts}


@pytest.mark.parametrize("pixels", ["grey8", pytest.param("channels", marks=pytest.mark.slow)])
def test_a_dataset_that_grows_is_read_by_everything_that_reads_one(pixels: str, tmp_path: Path) -> None:
    import datasets

    from synthaug.loaders.rows import open_rows
    from synthaug.loaders.stream import ReleaseStream

    (tmp_path / "in").mkdir()
    more = make_parts(tmp_path / "in" / "more", pixels)
    less = make_parts(tmp_path / "in" / "less", pixels, wanted=(0, 12, 20))
    steps = [
        grown(less, tmp_path / "in" / "a", held_back=range(3)),
        grown(more, tmp_path / "in" / "b"),  # three real images and eight samples more
        grown(more, tmp_path / "in" / "c", again=[2]),
        grown(more, tmp_path / "in" / "d", held_back=[0, 30], again=[2]),
    ]
    kept = []
    last: Path | None = None
    for number, parts in enumerate(steps):
        release = parts.release(tmp_path / str(number), images_per_shard=12, previous=last).directory
        assert verify(release).problems == ()
        scratch = parts.release(tmp_path / f"{number} from scratch", images_per_shard=12).directory
        found, wanted = table_of(release), table_of(scratch)
        np.testing.assert_equal(found, wanted)
        if last is not None:
            kept.append(unchanged(last, release))
        last = release
    # Of 10, 12 and 12 shards: all; all but three with samples of class 2; all but two with a real image that is gone.
    assert [len(names) for names in kept] == [10, 9, 10]

    assert last is not None
    # Equal inputs, the older release among them, give equal files.
    again = steps[-1].release(tmp_path / "again", images_per_shard=12, previous=tmp_path / "2").directory
    assert [path.read_bytes() for path in files(again)] == [path.read_bytes() for path in files(last)]
    data = datasets.load_dataset(str(last), cache_dir=str(tmp_path / "cache"))
    stored = {split: open_rows(last, split) for split in data}
    for split, rows in stored.items():
        assert data[split]["label"] == rows.labels.tolist()
        assert data[split]["is_synthetic"] == rows.synthetic.tolist()
        # What has lost its manifest knows the ranks by the order.
        assert open_rows(data, split).ranks.tolist() == rows.ranks.tolist()
    streamed = datasets.load_dataset(str(last), split="train", streaming=True)
    taken = [item["sample_id"] for item in ReleaseStream(streamed, output="dict", synthetic_ratio=100.0)]
    assert sorted(taken) == sorted(stored["train"].sample_id(row) for row in range(len(stored["train"].labels)))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def unchanged(older: Path, newer: Path) -> list[str]:
    """Shards of the older release that the newer one has byte for byte; files of their own, not links."""
    same = []
    for path in files(older / "data"):
        other = newer / "data" / path.name
        if other.is_file() and other.read_bytes() == path.read_bytes():
            assert other.stat().st_ino != path.stat().st_ino
            assert not other.is_symlink()
            same.append(path.name)
    return same


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def made(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.release(tmp_path_factory.mktemp("made") / "release").directory


@pytest.mark.parametrize("damage", ["shard", "release.json", "gone", "cut short"])
def test_a_damaged_older_release_is_passed_over_with_a_warning(
    parts: Parts, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    older = tmp_path / "older"
    if damage != "gone":
        shutil.copytree(made, older)
    if damage in ("shard", "release.json"):
        path = older / ("data/train-00001.parquet" if damage == "shard" else "release.json")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut short":
        (older / "data/train-00002.parquet").write_bytes(b"PAR1")
    with caplog.at_level(logging.WARNING):
        release = parts.release(tmp_path / "release", previous=older).directory
    assert "the last release is damaged or gone, so no shard of it is taken over" in caplog.text
    assert [path.read_bytes() for path in files(release)] == [path.read_bytes() for path in files(made)]


def test_nothing_of_other_classes_or_other_pixels_is_taken_over(
    parts: Parts, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, settings_, words in (
        ("classes", {"classes": ("before", "zero", "one")}, "it has other classes, or the same ones in another order"),
        ("pixels", {"pixels": "rgb8"}, "its images have another channels, colour"),
    ):
        caplog.clear()
        other = make_parts(tmp_path / name / "in", **settings_)
        release = other.release(tmp_path / name / "out", previous=made).directory
        assert words in caplog.text
        assert "all shards are written anew" in caplog.text
        scratch = other.release(tmp_path / name / "scratch").directory
        assert [path.read_bytes() for path in files(release)] == [path.read_bytes() for path in files(scratch)]


def test_a_smaller_shard_size_breaks_up_what_is_larger(parts: Parts, made: Path, tmp_path: Path) -> None:
    release = parts.release(tmp_path / "release", images_per_shard=20, previous=made).directory
    assert max(len(list(read_ids(path))) for path in files(release / "data")) <= 20
    assert verify(release).ok


def test_the_log_says_what_was_kept(parts: Parts, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = json.loads((made / "release.json").read_text())["digest"][:12]
    caplog.set_level(logging.INFO)
    parts.release(tmp_path / "release", title="Another title", previous=made)
    assert f"release: 5 of 5 shards, with 117 of 117 images, are those of release {digest}" in caplog.text
