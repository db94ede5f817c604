"""A release is what was read and accepted, no more and no less, and `load_dataset` opens it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from synthaug.digest import digest_array
from synthaug.errors import LeakError, ReleaseError
from synthaug.records import INDEX_FILE, SAMPLES_FILE, SPLITS_FILE, VERDICT_FILE
from tests.release_parts import CLASSES, N_REAL, Parts, make_parts
from tests.verdict_parts import make_verdict

HOSTILE = ("../../x\nCON", "😀 \"quoted\" 'too' | # <b>&amp;</b>", "{{ x }}: - *y* \u202e\x85")

# Opens each release plainly and streaming, in a process that has nothing of ours and no network.
_LOADER = """
import json, sys
import datasets, numpy as np
sys.path.insert(0, sys.argv[1])
from synthaug.digest import digest_array

def rows(split):
    found = []
    for row in split:
        pixels = np.asarray(row["image"])
        if isinstance(row["image"], list):
            pixels = pixels.astype(split.features["image"].dtype)
        image = digest_array(pixels.reshape(*pixels.shape[:2], -1))
        found.append([row["label"], row["is_synthetic"], row["sample_id"], row["source_id"], image])
    return found

found = {}
for path in sys.argv[2:]:
    try:
        plain = datasets.load_dataset(path)
        streamed = datasets.load_dataset(path, streaming=True)
        names = plain["train"].features["label"].names
        assert streamed["train"].features == plain["train"].features
        found[path] = {
            "names": names,
            "plain": {name: rows(split) for name, split in plain.items()},
            "streamed": {name: rows(split) for name, split in streamed.items()},
        }
    except Exception as error:
        found[path] = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def made(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.release(tmp_path_factory.mktemp("made") / "release").directory


@pytest.mark.slow
def test_load_dataset_gives_back_every_pixel_offline_plain_and_streaming(tmp_path: Path) -> None:
    variants = {
        "grey8": {"classes": HOSTILE},
        "rgb8": {},
        "grey16": {},
        "rgb16": {},
        "channels": {"classes": HOSTILE},
        "float": {},
    }
    expected = {}
    for pixels, settings in variants.items():
        parts = make_parts(tmp_path / "in" / pixels, pixels, **settings)
        release = parts.release(tmp_path / pixels)
        expected[str(release.directory)] = {"names": list(parts.source.classes), **_expected_rows(parts)}
    alone = make_parts(tmp_path / "in/alone").release(tmp_path / "alone", include_real=False).directory
    cut = make_parts(tmp_path / "in/cut").release(tmp_path / "cut").directory
    (cut / "data/train-00001.parquet").unlink()

    found = _load(tmp_path, [*expected, str(alone), str(cut)])

    for path, rows in expected.items():
        assert found[path] == rows, path
    grey8 = expected[str(tmp_path / "grey8")]["plain"]["train"]
    without_names = {split: [row[:4] for row in rows] for split, rows in found[str(alone)]["plain"].items()}
    assert without_names == {"train": [row[:4] for row in grey8 if row[1]]}
    assert "train-00001.parquet" in found[str(cut)]["error"]


def test_a_release_carries_its_verdict_and_its_pictures(parts: Parts, tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    verdict = make_verdict("no evidence").model_copy(update={"directory": found})
    (found / VERDICT_FILE).write_text(verdict.model_dump_json(), encoding="utf-8")
    (found / "verdict_gain.png").write_bytes(b"picture")
    release = parts.release(tmp_path / "release", verdict=verdict)
    assert (release.directory / VERDICT_FILE).read_bytes() == (found / VERDICT_FILE).read_bytes()
    listed = json.loads((release.directory / "release.json").read_text())["files"]
    assert {VERDICT_FILE, "verdict_gain.png"} <= set(listed)
    card = (release.directory / "README.md").read_text()
    assert "](verdict_gain.png)" in card
    assert "](verdict_dose.png)" not in card
    assert release.digest != parts.release(tmp_path / "other").digest


def _load(tmp_path: Path, paths: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, str(Path(__file__).parents[1]), *paths],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _expected_rows(parts: Parts) -> dict[str, Any]:
    """What the inputs say that a release holds, found another way than `release` does."""
    table = pd.read_parquet(parts.splits.directory / SPLITS_FILE)
    rows: dict[str, list[Any]] = {split: [] for split in N_REAL}
    for item in table[table["held_back"].isna()].itertuples():
        rows[item.split].append([item.label, False, None, item.image_id, digest_array(parts.images[item.row])])
    for label, n in ((1, 18), (2, 22)):
        taken = [index for index in range(30) if index % 7 != 3][:n]
        for index in taken:
            batch, position = divmod(index, 20)
            row = position + (20 if batch == 0 else 10) * (label - 1)
            drawn = pd.read_parquet(parts.batches[batch].directory / SAMPLES_FILE).iloc[row]
            assert (drawn["label"], drawn["class_index"]) == (label, index)
            rows["train"].append([label, True, drawn["sample_id"], None, digest_array(parts.drawn[batch][row])])
    return {"plain": rows, "streamed": rows}


def test_counts_of_the_record(parts: Parts, tmp_path: Path) -> None:
    release = parts.release(tmp_path / "release")
    assert release.n_real == {"zero": 30, "one": 12, "two": 8}
    assert release.n_synthetic == {"zero": 0, "one": 18, "two": 22}
    assert release.n_short == {}


def test_manifest_has_a_row_for_each_sample_and_no_word_of_real_images(parts: Parts, made: Path) -> None:
    manifest = pd.read_parquet(made / "manifest.parquet")
    assert manifest["label"].tolist() == [1] * 18 + [2] * 22
    assert manifest["rank"].tolist() == [*range(18), *range(22)]
    assert manifest["class_name"].tolist() == ["one"] * 18 + ["two"] * 22
    assert set(manifest["shard"]) == {"data/train-00002.parquet"}
    assert manifest["row"].tolist() == [*range(40)]
    assert manifest["seed"].tolist()[:2] == [2**62 + 1000, 2**62 + 1001]
    assert set(manifest["checkpoint_digest"]) == {parts.checkpoint.digest}
    assert set(manifest["solver"]) == {"dpm++ 2m"}
    assert np.isnan(manifest["distance_ratio"][0])
    assert manifest["pixel_hash"][0] == digest_array(parts.drawn[0][0])
    for name in ("torch_version", "diffusers_version", "numpy_version", "cpu_capability", "synthaug_version"):
        assert manifest[name].str.len().min() > 0
    assert not [name for name in manifest.columns if "nearest" in name]


def test_a_png_says_that_it_is_synthetic_and_real_ones_say_nothing(parts: Parts, made: Path, tmp_path: Path) -> None:
    import io

    from PIL import Image

    n_synthetic = 0
    for shard in sorted((made / "data").glob("*.parquet")):
        for row in pq.read_table(shard).to_pylist():
            data = row["image"]["bytes"]
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                text = {"synthetic": "true", "sample_id": row["sample_id"], "generator": "synthaug"}
                assert image.text == (text if row["is_synthetic"] else {})
            # The pixels are not touched, whoever decodes them.
            if row["is_synthetic"]:
                assert data.count(b"tEXt") == 3
                n_synthetic += 1
    assert n_synthetic == 40


@pytest.mark.parametrize("pixels", ["grey8", "rgb8", "grey16", "rgb16", "channels", "float"])
def test_single_images_are_read_back(tmp_path: Path, pixels: str) -> None:
    from synthaug.formats.shards import content_hash, read_image, read_source_ids

    parts = make_parts(tmp_path / "in", pixels)
    release = parts.release(tmp_path / "out").directory
    manifest = pd.read_parquet(release / "manifest.parquet")
    for row in manifest.iloc[[0, 17, 18, 39]].itertuples():
        image = read_image(release / row.shard, row.row)
        assert digest_array(image) == row.pixel_hash
        assert content_hash(image, parts.source.pixels, row.sample_id) == row.content_hash
    assert [item for ids in read_source_ids(release / "data/train-00002.parquet") for item in ids] == [None] * 40
    shard = release / "data/train-00000.parquet"
    assert None not in [item for ids in read_source_ids(shard) for item in ids]
    with pytest.raises(IndexError, match="has 40 rows; there is no row 40"):
        read_image(shard, 40)


FORMULAS = ("=1+1", "@SUM(A1)\tx", '-2+3, "quoted"')


def test_the_manifest_for_people_is_the_manifest_and_no_cell_is_a_formula(tmp_path: Path) -> None:
    import csv

    release = make_parts(tmp_path / "in", classes=FORMULAS).release(tmp_path / "out").directory
    with (release / "manifest.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    manifest = pq.read_table(release / "manifest.parquet").to_pylist()
    assert [list(row) for row in rows[:1]] == [list(row) for row in manifest[:1]]
    for row, wanted in zip(rows, manifest, strict=True):
        assert row.pop("class_name") == f"'{wanted.pop('class_name')}"
        assert row == {name: "" if value is None else str(value) for name, value in wanted.items()}
    stated = json.loads((release / "release.json").read_text())
    assert "manifest.csv" in stated["files"]


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_a_cell_that_begins_like_a_formula_is_prefixed(first: str) -> None:
    from synthaug.formats.manifest import safe_cell

    assert safe_cell(f"{first}1") == f"'{first}1"
    assert safe_cell(f"1{first}") == f"1{first}"
    assert safe_cell(None) == ""


def test_nothing_of_this_machine_or_of_the_nearest_images_is_in_any_file(parts: Parts, made: Path) -> None:
    folder = str(parts.source.directory.parent).encode()
    for file in made.rglob("*"):
        if file.is_file():
            # Pages are not compressed where it matters: ids and names stand in the clear in the shards.
            assert folder not in file.read_bytes(), file
            assert b"real-secret" not in file.read_bytes(), file
    config = json.loads((made / "config.json").read_text())
    assert config["dataset"]["path"] == "source"
    assert "output" not in config


def test_equal_inputs_give_equal_files(parts: Parts, made: Path, tmp_path: Path) -> None:
    again = make_parts(tmp_path / "elsewhere").release(tmp_path / "again").directory
    assert _content(again) == _content(made)


@pytest.mark.parametrize("pixels", ["grey8", "channels"])
def test_the_contact_sheet_is_a_picture_and_the_same_each_time(tmp_path: Path, pixels: str) -> None:
    from PIL import Image

    one, two = (
        make_parts(tmp_path / name / "in", pixels).release(tmp_path / name / "out", draw_sheet=True).directory
        for name in ("a", "b")
    )
    assert _content(one) == _content(two)
    with Image.open(one / "contact_sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 100


def test_other_samples_give_another_digest(parts: Parts, made: Path, tmp_path: Path) -> None:
    digest = json.loads((made / "release.json").read_text())["digest"]
    assert make_parts(tmp_path / "in", wanted=(0, 18, 21)).release(tmp_path / "out").digest != digest


def test_a_smaller_dose_is_a_prefix(made: Path, tmp_path: Path) -> None:
    smaller = make_parts(tmp_path / "in", wanted=(0, 6, 9)).release(tmp_path / "out").directory
    more, less = (pd.read_parquet(folder / "manifest.parquet") for folder in (made, smaller))
    for label, n in ((1, 6), (2, 9)):
        ids = less[less["label"] == label]["sample_id"].tolist()
        assert ids == more[more["label"] == label]["sample_id"].tolist()[:n]


def test_pages_carry_checksums_and_row_groups_are_small(parts: Parts, tmp_path: Path) -> None:
    from synthaug.formats import shards

    release = parts.release(tmp_path / "release").directory
    file = pq.ParquetFile(release / "data/train-00000.parquet")
    assert file.metadata.row_group(0).num_rows <= shards._GROUP_ROWS
    shard = release / "data/validation-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OSError, match="checksum"):
        list(shards.read_shard(shard))


def _manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    from synthaug.formats.manifest import ManifestWriter

    folder.mkdir()
    with ManifestWriter(folder) as writer:
        for row in rows:
            writer.add(row)
    return folder / "manifest.parquet"


def test_the_manifest_is_canonical(made: Path, tmp_path: Path) -> None:
    from synthaug.formats.manifest import MANIFEST_SCHEMA, read_manifest

    first = list(read_manifest(made / "manifest.parquet"))
    # Equal rows give equal bytes, in whatever order their columns come.
    assert _manifest(tmp_path / "a", first).read_bytes() == (made / "manifest.parquet").read_bytes()
    turned = [dict(reversed(row.items())) for row in first]
    assert _manifest(tmp_path / "b", turned).read_bytes() == (made / "manifest.parquet").read_bytes()
    other = [{**first[0], "distance": 0.26}, *first[1:]]
    assert _manifest(tmp_path / "c", other).read_bytes() != (made / "manifest.parquet").read_bytes()
    # The groups of rows have a fixed size.
    many = [{**first[n % 40], "row": n} for n in range(10_001)]
    path = _manifest(tmp_path / "d", many)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [5000, 5000, 1]
    assert list(read_manifest(path)) == many
    assert pq.read_schema(path).equals(MANIFEST_SCHEMA)


def test_a_flipped_byte_of_a_manifest_page_is_refused_by_the_reader(made: Path, tmp_path: Path) -> None:
    from synthaug.formats.manifest import read_manifest

    data = (made / "manifest.parquet").read_bytes()
    metadata = pq.ParquetFile(made / "manifest.parquet").metadata.row_group(0)
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        # The last byte of a column's last page is page content, which only the page's own checksum covers.
        place = start + column.total_compressed_size - 1
        damaged = tmp_path / "damaged.parquet"
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(OSError, match="checksum"):
            list(read_manifest(damaged))


def test_a_withheld_class_is_short_and_the_card_says_why(tmp_path: Path) -> None:
    release = make_parts(tmp_path / "in", withhold=1).release(tmp_path / "out")
    assert release.n_synthetic == {"zero": 0, "one": 0, "two": 22}
    assert release.n_short == {"one": 18}
    card = (release.directory / "README.md").read_text()
    assert "| one | 12 | 0 | 30 | 18, withheld: its samples cover too little of the class |" in card


def test_a_class_that_could_not_be_filled_is_short(tmp_path: Path) -> None:
    release = make_parts(tmp_path / "in", wanted=(0, 18, 50)).release(tmp_path / "out")
    assert release.n_short == {"two": 24}
    assert "24, missing: too few samples passed" in (release.directory / "README.md").read_text()


def test_samples_alone(parts: Parts, tmp_path: Path) -> None:
    release = parts.release(tmp_path / "release", include_real=False).directory
    assert sorted(path.name for path in (release / "data").iterdir()) == ["train-00000.parquet"]
    assert pq.read_table(release / "data/train-00000.parquet")["is_synthetic"].to_pylist() == [True] * 40
    card = (release / "README.md").read_text()
    assert "and no real ones" in card
    assert "None are in this release" in card


def test_samples_alone_without_a_sample_is_refused(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in", wanted=(0, 0, 0))
    with pytest.raises(ReleaseError, match="nothing to release"):
        parts.release(tmp_path / "out", include_real=False)
    assert parts.release(tmp_path / "real").n_synthetic == dict.fromkeys(CLASSES, 0)


def test_a_source_row_marked_synthetic_is_never_released_as_real(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    path = parts.source.directory / INDEX_FILE
    pd.read_parquet(path).assign(is_synthetic=True).to_parquet(path)
    with pytest.raises(LeakError, match="marked is_synthetic"):
        parts.release(tmp_path / "out")


def test_stages_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    other = [batch.model_copy(update={"checkpoint_digest": "0" * 64}) for batch in parts.batches]
    with pytest.raises(ReleaseError, match="drawn from checkpoint 000000000000"):
        _with(parts, batches=tuple(other)).release(tmp_path / "a")
    with pytest.raises(ReleaseError, match="accepted samples are not in"):
        _with(parts, batches=parts.batches[::-1]).release(tmp_path / "b")
    with pytest.raises(ReleaseError, match="speaks of batch 1, but 1 batches"):
        _with(parts, batches=parts.batches[:1]).release(tmp_path / "c")


def test_a_full_disk_is_said_as_it_is_and_leaves_nothing_outside(parts: Parts, tmp_path: Path) -> None:
    with _largest_file(6000), pytest.raises(OSError, match="File too large"):
        parts.release(tmp_path / "staging")
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]


def test_a_truncated_images_file_is_named(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    path = parts.batches[1].directory / "images.npy"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ReleaseError, match="cut short"):
        parts.release(tmp_path / "out")


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def _with(parts: Parts, **changes: Any) -> Parts:
    from dataclasses import replace

    return replace(parts, **changes)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
