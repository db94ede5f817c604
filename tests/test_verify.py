"""Verification finds whatever changed after a release was written, and says where."""

from __future__ import annotations

import json
import random
import runpy
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
from synthaug.records import VERDICT_FILE
from synthaug.verify import verify
from tests.conftest import REPOSITORY
from tests.release_parts import hub_cache, make_parts
from tests.verdict_parts import make_verdict

SHARD = "data/train-00002.parquet"  # all 40 samples; real images are in the two before it


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
    assert (result.ok, result.n_files, result.n_rows, result.n_images) == (True, 12, 117, 40)
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


@pytest.fixture(scope="module", params=["grey8", pytest.param("channels", marks=pytest.mark.slow)])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with every file that there can be: a drawn contact sheet, a verdict and its pictures."""
    folder = tmp_path_factory.mktemp(f"full-{request.param}")
    verdict = make_verdict("no evidence").model_copy(update={"directory": folder})
    (folder / VERDICT_FILE).write_text(verdict.model_dump_json(), encoding="utf-8")
    for name in ("verdict_gain.png", "verdict_dose.png", "verdict_confusion.png"):
        (folder / name).write_bytes(random.Random(name).randbytes(400))
    return (
        make_parts(folder / "in", request.param).release(folder / "release", draw_sheet=True, verdict=verdict).directory
    )


@pytest.mark.slow
def test_200_random_flipped_bytes_and_five_in_each_file_are_caught(full: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree(full, tmp_path / "release"))
    chance = random.Random(200)
    files = sorted(file for file in release.rglob("*") if file.is_file())
    assert {file.name for file in files} >= {
        "README.md", "config.json", "contact_sheet.png", "manifest.csv", "manifest.parquet", "provenance.json",
        "release.json", "train-00002.parquet", "verdict.json", "verdict_gain.png",
    }  # fmt: skip
    # Bytes drawn alike over all files; then five of each file, its first and its last among them.
    aims = [(file, None) for file in chance.choices(files, [file.stat().st_size for file in files], k=200)]
    for file in files:
        aims += [(file, place) for place in (0, file.stat().st_size - 1)] + [(file, None)] * 3
    missed = []
    for file, aim in aims:
        data = file.read_bytes()
        place = chance.randrange(len(data)) if aim is None else aim
        flipped = bytearray(data)
        flipped[place] ^= chance.randrange(1, 256)
        file.write_bytes(flipped)
        try:
            found = verify(release).problems
        except VerificationError as error:
            found = (str(error),)
        if not any(file.relative_to(release).as_posix() in text for text in found):
            missed.append((file.name, place))
        if file.suffix != ".parquet":
            # Nor is another file blamed for it. (Of manifest and shards, either may be the wrong one.)
            assert all(text.startswith(file.name) or file.name == "release.json" for text in found), found
        file.write_bytes(data)
    assert missed == []
    assert verify(release).ok


def test_a_flipped_byte_in_a_picture_is_told_with_its_row(tmp_path: Path) -> None:
    release = make_parts(tmp_path / "in").release(tmp_path / "release").directory
    for name, n_rows in ((SHARD, 40), ("data/test-00000.parquet", 15)):
        whole = (release / name).read_bytes()
        pictures = [item["bytes"] for item in pq.read_table(release / name)["image"].to_pylist()]
        for row in range(0, n_rows, 3):
            at = whole.index(pictures[row])
            for place in (at + 3, at + len(pictures[row]) // 2, at + len(pictures[row]) - 1):
                flipped = bytearray(whole)
                flipped[place] ^= 0x10
                (release / name).write_bytes(flipped)
                problems = verify(release).problems
                assert problems[0].startswith(f"{name}: its content has changed"), problems
                assert problems[1].startswith(f"{name}: rows 0 to {n_rows - 1}: damaged, its rows were looked at")
                # This row and no other, and nothing said of it that is not so.
                assert {text.split(": ")[1] for text in problems[2:]} == {f"row {row}"}, problems
        (release / name).write_bytes(whole)
    assert verify(release).ok


def test_a_page_that_cannot_be_read_at_all_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    release = make_parts(tmp_path / "in", "channels").release(tmp_path / "release").directory
    whole = bytearray((release / SHARD).read_bytes())
    column = pq.ParquetFile(release / SHARD).metadata.row_group(0).column(0)
    place = whole.index(b"\x28\xb5\x2f\xfd", column.data_page_offset)  # where a zstd frame begins
    whole[place : place + 4] = bytes(4)
    (release / SHARD).write_bytes(whole)
    problems = verify(release).problems
    assert len(problems) == 2
    assert problems[1].startswith(f"{SHARD}: rows 0 to 39: damaged, they cannot be told apart")


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
    shutil.copy(copy / SHARD, copy / "data/train-00003.parquet")
    (copy / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (copy / ".cache/huggingface").mkdir(parents=True)
    (copy / ".cache/huggingface/x.metadata").write_text("x")
    (copy / "checkpoint").mkdir()
    (copy / "checkpoint/model_index.json").write_text("{}")
    text = "not part of the release: release.json does not list it"
    assert verify(copy).problems == (f"data/train-00003.parquet: {text}",)


def test_an_edited_card(copy: Path) -> None:
    card = copy / "README.md"
    card.write_text(card.read_text().replace("not evaluated", "useful it is!"))
    (problem,) = verify(copy).problems
    assert problem.startswith("README.md: ")
    assert "the card was edited" in problem


def test_a_removed_manifest_row(copy: Path) -> None:
    _rewrite(copy / "manifest.parquet", lambda table: pa.concat_tables([table[:5], table[6:]]))
    for text in (_unsigned(copy), _signed(copy)):
        assert f"{SHARD}: row 5: sample " in text
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


def test_a_manifest_that_cannot_be_read_is_not_laid_at_the_door_of_its_copy(copy: Path) -> None:
    path = copy / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    problems = verify(copy).problems
    assert all(text.startswith("manifest.parquet: ") for text in problems), problems
    path.unlink()
    assert verify(copy).problems[0] == "manifest.parquet: missing"
    assert all(text.startswith("manifest.parquet: ") for text in verify(copy).problems)


def test_manifest_rows_out_of_order(copy: Path) -> None:
    _rewrite(copy / "manifest.parquet", lambda table: table.take([1, 0, *range(2, 40)]))
    text = _signed(copy)
    assert "manifest.parquet: row 0: rank 1 of class 'one' is out of order" in text
    assert f"{SHARD}: row 0: sample " in text


def test_a_pixel_hash_that_is_not_of_the_picture(copy: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[7]["pixel_hash"] = "0" * 64
        return pa.Table.from_pylist(rows, schema=table.schema)

    _rewrite(copy / "manifest.parquet", change)
    assert f"{SHARD}: row 7: the image is stored as manifest.parquet says, but its pixels have another" in _signed(copy)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("README.md", lambda text: text.replace("Digest of the manifest: `", "Digest of the manifest: `0"),
         "README.md: does not quote the digest of the manifest"),
        ("report.html", lambda text: text.replace("manifest</dt><dd><bdi>", "manifest</dt><dd><bdi>0"),
         "report.html: does not quote the digest of the manifest"),
        ("config.json", lambda text: text.replace('"seed": 0', '"seed": 1', 1),
         "config.json: is another configuration"),
        ("manifest.csv", lambda text: text.replace("dpm++ 2m", "heun", 1),
         "manifest.csv: row 0: not what manifest.parquet has there"),
        ("manifest.csv", lambda text: "\r\n".join(text.split("\r\n")[:-2]),
         "manifest.csv: row 39: not what manifest.parquet has there"),
        ("manifest.csv", lambda text: text.replace("sample_id", "sample", 1),
         "manifest.csv: the column names: not what manifest.parquet has there"),
        ("provenance.json", lambda text: text.replace('manifest_sha256": "', 'manifest_sha256": "0'),
         "provenance.json: speaks of another manifest"),
        ("provenance.json", lambda text: "{}", "provenance.json: cannot be read to its end"),
    ],
)  # fmt: skip
def test_papers_that_were_rewritten_under_a_fitting_release_file(
    copy: Path, file: str, change: Callable[[str], str], words: str
) -> None:
    path = copy / file
    text = path.read_bytes().decode()
    path.write_bytes(change(text).encode())
    assert path.read_bytes().decode() != text
    assert words in _signed(copy)


def test_a_shard_that_was_exchanged_is_not_the_one_of_the_provenance(copy: Path) -> None:
    _rewrite(copy / "data/test-00000.parquet", lambda table: table)
    assert "provenance.json: has another digest of data/test-00000.parquet than release.json" in _signed(copy)


def test_a_swapped_row_keeps_its_image_but_not_its_id(copy: Path) -> None:
    _rewrite(copy / SHARD, lambda table: table.take([*range(20), 21, 20, *range(22, 40)]))
    text = _signed(copy)
    assert f"{SHARD}: row 20: sample id syn-" in text


def test_a_synthetic_image_in_validation(copy: Path) -> None:
    train = pq.read_table(copy / SHARD)
    _rewrite(copy / "data/validation-00000.parquet", lambda table: pa.concat_tables([table[:-1], train[30:31]]))
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
    assert problems[-1] == f"{SHARD}: and 21 more problems"


def test_a_download_is_verified_through_its_links(copy: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(copy, tmp_path / "hub")
    assert verify(snapshot).ok
    with pytest.raises(VerificationError, match=rf"the hub's folder of downloads; name one of them: {snapshot}"):
        verify(snapshot.parent.parent)
    # A byte of a content, and a content that was swept away.
    blob = (snapshot / SHARD).resolve()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    problems = verify(snapshot).problems
    assert problems
    assert all(text.startswith(f"{SHARD}: ") for text in problems)
    blob.unlink()
    assert verify(snapshot).problems == (f"{SHARD}: missing",)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_release(tmp_path: Path) -> None:
    """Three times the rows: the peaks of what Python and arrow hold stay where they were."""
    import tracemalloc

    program = runpy.run_path(str(REPOSITORY / "benchmarks" / "release_memory.py"))
    peaks = []
    for n in (5500, 16500):  # more than a row group of the manifest in both
        folder = tmp_path / str(n)
        folder.mkdir()
        program["make_inputs"](folder, n, 8)
        program["make_release"](folder, n, 8)
        default = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(default)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            result = verify(folder / "release")
            peaks.append((tracemalloc.get_traced_memory()[1], pool.max_memory()))
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(default)
        assert (result.ok, result.n_images) == (True, n)
        assert peaks[-1][1] > 100_000, "what arrow held was counted"
    (python, arrow), (more_python, more_arrow) = peaks
    assert more_python < 1.2 * python + 2**20
    assert more_arrow < 1.2 * arrow + 2**20


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
