"""Verification finds whatever changed after a release was written, and says where."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthaug.digest import digest_file
from synthaug.errors import VerificationError
from synthaug.formats.manifest import write_release_file
from synthaug.verify import verify
from tests.release_parts import make_parts

SHARD = "data/train-00001-of-00003.parquet"  # rows 10 to 39 are synthetic


@pytest.fixture(scope="module", params=["grey8", "channels"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_parts(folder / "in", request.param).release(folder / "release").directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "release")
    return tmp_path / "release"


def test_a_release_as_written_is_in_order(made: Path) -> None:
    result = verify(made)
    assert result.problems == ()
    assert (result.ok, result.n_files, result.n_rows, result.n_images) == (True, 11, 117, 40)
    assert result.digest == json.loads((made / "release.json").read_text())["digest"]


def test_one_flipped_bit_anywhere_is_found_and_its_file_named(copy: Path) -> None:
    chance = random.Random(4)
    files = sorted(file for file in copy.rglob("*") if file.is_file())
    for trial in range(60):
        file = files[trial % len(files)]
        data = file.read_bytes()
        place = chance.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        if file.name == "release.json":
            with pytest.raises(VerificationError, match=r"release\.json is damaged"):
                verify(copy)
        else:
            problems = verify(copy).problems
            assert any(text.startswith(file.relative_to(copy).as_posix()) for text in problems), (file, place)
        file.write_bytes(data)
    assert verify(copy).ok


def test_a_missing_shard(copy: Path) -> None:
    (copy / SHARD).unlink()
    assert verify(copy).problems == (f"{SHARD}: missing",)


def test_a_truncated_shard(copy: Path) -> None:
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[: len(data) // 2])
    problems = verify(copy).problems
    assert problems[0] == f"{SHARD}: {len(data) // 2} bytes, but {len(data)} were written"
    assert problems[1].startswith(f"{SHARD}: cannot be read to its end")


def test_a_file_that_nobody_listed(copy: Path) -> None:
    shutil.copy(copy / SHARD, copy / "data/train-00003-of-00003.parquet")
    (copy / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (copy / ".cache/huggingface").mkdir(parents=True)
    (copy / ".cache/huggingface/x.metadata").write_text("x")
    (copy / "checkpoint").mkdir()
    (copy / "checkpoint/model_index.json").write_text("{}")
    text = "not part of the release: release.json does not list it"
    assert verify(copy).problems == (f"data/train-00003-of-00003.parquet: {text}",)


def test_an_edited_card(copy: Path) -> None:
    card = copy / "README.md"
    card.write_text(card.read_text().replace("not evaluated", "useful it is!"))
    (problem,) = verify(copy).problems
    assert problem.startswith("README.md: ")
    assert "the card was edited" in problem


def test_a_removed_manifest_row(copy: Path) -> None:
    _rewrite(copy / "manifest.parquet", lambda table: pa.concat_tables([table[:5], table[6:]]))
    for text in (_unsigned(copy), _signed(copy)):
        assert f"{SHARD}: row 15: sample " in text
        assert "has no row in manifest.parquet" in text


def test_a_removed_data_row(copy: Path) -> None:
    _rewrite(copy / SHARD, lambda table: table[:-1])
    for text in (_unsigned(copy), _signed(copy)):
        assert f"is not in {SHARD} row 39" in text
        assert "split train: 89 rows, but 90 were written" in text
        assert "split train: class 'two' has 21 synthetic images, but 22 were written" in text


def test_a_swapped_label(copy: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        labels = table["label"].to_pylist()
        labels[12] = 2
        return table.set_column(1, table.field(1), pa.array(labels, pa.int64()))

    _rewrite(copy / SHARD, swap)
    for text in (_unsigned(copy), _signed(copy)):
        assert f"{SHARD}: row 12: label 2, but manifest.parquet has 1" in text


def test_swapped_images(copy: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        order = [*range(20), 21, 20, *range(22, 40)]
        return table.set_column(0, table.field(0), table["image"].take(order))

    _rewrite(copy / SHARD, swap)
    for text in (_unsigned(copy), _signed(copy)):
        for row in (20, 21):
            assert f"{SHARD}: row {row}: the image is not the one in manifest.parquet" in text


def test_a_swapped_row_keeps_its_image_but_not_its_id(copy: Path) -> None:
    _rewrite(copy / SHARD, lambda table: table.take([*range(20), 21, 20, *range(22, 40)]))
    text = _signed(copy)
    assert f"{SHARD}: row 20: sample id syn-" in text


def test_a_synthetic_image_in_validation(copy: Path) -> None:
    train = pq.read_table(copy / SHARD)
    _rewrite(
        copy / "data/validation-00000-of-00001.parquet", lambda table: pa.concat_tables([table[:-1], train[30:31]])
    )
    text = _signed(copy)
    assert "row 11: a synthetic image in the validation split" in text


def test_a_sample_passed_off_as_real(copy: Path) -> None:
    def pass_off(table: pa.Table) -> pa.Table:
        flags = table["is_synthetic"].to_pylist()
        flags[30] = False
        return table.set_column(2, table.field(2), pa.array(flags))

    _rewrite(copy / SHARD, pass_off)
    text = _signed(copy)
    assert f"{SHARD}: row 30: is_synthetic, sample_id and source_id contradict each other" in text


def test_renamed_classes(copy: Path) -> None:
    def rename(table: pa.Table) -> pa.Table:
        return table.replace_schema_metadata(
            {b"huggingface": table.schema.metadata[b"huggingface"].replace(b'"one"', b'"two!"')}
        )

    _rewrite(copy / SHARD, rename)
    assert f"{SHARD}: its class names are not those of the release" in _signed(copy)


def test_a_list_that_leads_out_of_the_release(copy: Path) -> None:
    (copy.parent / "secret").write_text("x")
    values = json.loads((copy / "release.json").read_text())
    del values["digest"]
    values["files"]["../secret"] = {"size": 1, "sha256": "0" * 64}
    write_release_file(copy, values)
    assert verify(copy).problems == ("release.json: lists ../secret, which lies outside of the release",)


def test_of_many_problems_the_first_are_told(copy: Path) -> None:
    def mix_up(table: pa.Table) -> pa.Table:
        return table.set_column(1, table.field(1), pa.array([0] * len(table), pa.int64()))

    _rewrite(copy / SHARD, mix_up)
    problems = [text for text in verify(copy).problems if text.startswith(SHARD)]
    assert len(problems) == 21
    assert problems[-1] == f"{SHARD}: and 11 more problems"


def test_a_download_is_verified_through_its_links(copy: Path, tmp_path: Path) -> None:
    # The hub's cache has a folder of links into a folder of contents.
    snapshot = tmp_path / "snapshot"
    for number, file in enumerate(sorted(file for file in copy.rglob("*") if file.is_file())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(copy)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    assert verify(snapshot).ok


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "release.json").unlink(), "it is not a release, or only a part of one"),
        (lambda folder: (folder / "release.json").write_text("{"), "it is not JSON"),
        (lambda folder: (folder / "release.json").write_text("[]\n"), "was edited"),
        (lambda folder: (folder / "release.json").write_bytes(b"\xff\xfe"), "it is not JSON"),
        (lambda folder: write_release_file(folder, {"format": 99}), "format 99"),
        (lambda folder: write_release_file(folder, {"format": 1}), "was not written by synthaug"),
        (shutil.rmtree, "is not a directory"),
    ],
)
def test_what_is_no_release_is_refused(copy: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(copy)
    with pytest.raises(VerificationError, match=words):
        verify(copy)


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def _unsigned(release: Path) -> str:
    result = verify(release)
    assert not result.ok
    return "\n".join(result.problems)


def _signed(release: Path) -> str:
    """Problems that are still found when whoever changed the files has also put new digests in release.json."""
    values = json.loads((release / "release.json").read_text())
    del values["digest"]
    values["files"] = {
        name: {"size": (release / name).stat().st_size, "sha256": digest_file(release / name)}
        for name in values["files"]
    }
    values["manifest_digest"] = values["files"]["manifest.parquet"]["sha256"]
    write_release_file(release, values)
    result = verify(release)
    assert not result.ok
    return "\n".join(result.problems)
