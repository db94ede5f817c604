"""Samples made again from their manifest rows and the checkpoint are what was released, or it is said."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthaug.config import parse_config
from synthaug.errors import CheckpointError, UsageError, VerificationError
from synthaug.formats.manifest import MANIFEST_FILE
from synthaug.generators import canonical
from synthaug.remake import allowed, remake
from synthaug.verify import verify
from tests.conftest import REPOSITORY, tiny_values
from tests.generator_data import digits_spec
from tests.release_parts import hub_cache

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bare(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of a run when its shards are deleted: manifest, release.json and the checkpoint."""
    run = tmp_path_factory.mktemp("bare") / "run"
    (run / "release").mkdir(parents=True)
    for name in (MANIFEST_FILE, "release.json"):
        shutil.copy(finished_run / "release" / name, run / "release")
    shutil.copytree(finished_run / "checkpoint", run / "checkpoint")
    return run / "release"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


def ids(release: Path) -> list[str]:
    return [str(name) for name in pq.read_table(release / MANIFEST_FILE)["sample_id"].to_pylist()]


def tamper(release: Path, row: int, **values: Any) -> str:
    """Change a manifest row and leave all else; returns its sample id."""
    path = release / MANIFEST_FILE
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row].update(values)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return str(rows[row]["sample_id"])


def test_every_sample_is_identical(finished_run: Path) -> None:
    result = remake(finished_run / "release")
    assert result.ok
    assert result.n_identical == result.n_samples == len(ids(finished_run / "release"))
    assert {item.png_identical for item in result.samples} == {True}
    assert (result.changes, result.notes) == ((), ())
    assert result.checkpoint == finished_run / "checkpoint"
    # Each micro-batch once, whatever number of its samples was released.
    table = pq.read_table(finished_run / "release" / MANIFEST_FILE).to_pylist()
    assert result.n_micro_batches == len({(row["label"], row["micro_batch"]) for row in table})


def test_with_the_shards_deleted_too(bare: Path) -> None:
    assert sorted(path.name for path in bare.iterdir()) == [MANIFEST_FILE, "release.json"]
    result = remake(bare)
    assert result.ok
    assert result.n_identical == len(ids(bare))


def test_three_workers_in_shuffled_order_and_one_sample_alone(bare: Path) -> None:
    names = ids(bare)
    random.Random(3).shuffle(names)
    parts = [names[0:1], names[1::2], names[2::2]]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "synthaug", "remake", str(bare), "--json", "-q"]
            + [word for name in part for word in ("--sample", name)],
            cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        )
        for part in parts
    ]  # fmt: skip
    for worker, part in zip(workers, parts, strict=True):
        values = json.loads(worker.communicate(timeout=300)[0])
        assert (worker.returncode, values["n_identical"]) == (0, len(part))
        assert {item["sample_id"] for item in values["samples"]} == set(part)


@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_samples_in_any_order_are_identical(bare: Path, data: st.DataObject) -> None:
    names = data.draw(st.permutations(ids(bare)))
    chosen = names[: data.draw(st.integers(1, len(names)))]
    result = remake(bare, samples=chosen)
    assert (result.ok, result.n_identical, result.n_samples) == (True, len(chosen), len(chosen))
    assert {item.png_identical for item in result.samples} == {True}
    assert {item.sample_id for item in result.samples} == set(chosen)


def _killed_while_sampling(job: Path, run: Path) -> None:
    """Start a run and end it with SIGKILL as soon as its first samples are on the disk."""
    process = subprocess.Popen([sys.executable, "-m", "synthaug", "run", str(job), "-q"], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(
            np.load(path, mmap_mode="r")[:1].any() for path in run.glob("stages/sample-*/images.npy") if _whole(path)
        ):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(run.glob("stages/sample-*/done.json")), "it was killed too late"


def _whole(path: Path) -> bool:
    """Whether the file has its full length: its header is written then."""
    return path.stat().st_size > 128


def test_what_was_killed_while_it_drew_and_resumed_is_the_same_and_is_remade(
    finished_run: Path, tmp_path: Path
) -> None:
    from synthaug.pipeline import augment

    # Training and judge of the finished run are reused; so many steps that a kill finds it at work.
    whole, run = (Path(shutil.copytree(finished_run, tmp_path / name, symlinks=True)) for name in ("whole", "killed"))
    for folder in (*whole.glob("stages/sample-*"), *run.glob("stages/sample-*")):
        shutil.rmtree(folder)
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(tiny_values(run, sample={"steps": 40})), encoding="utf-8")
    _killed_while_sampling(path, run)
    for folder in (whole, run):
        reused = augment(parse_config(tiny_values(folder, sample={"steps": 40}))).reused
        assert {"train", "judge"} <= set(reused)
        assert "sample round 1" not in reused
    one, two = ((folder / "release" / MANIFEST_FILE).read_bytes() for folder in (whole, run))
    assert one == two
    shutil.rmtree((run / "release").resolve() / "data")
    result = remake(run / "release")
    assert (result.ok, result.n_identical) == (True, len(ids(run / "release")))
    assert result.checkpoint == run / "checkpoint"


def test_a_download_with_its_checkpoint_is_made_again(run: Path, tmp_path: Path) -> None:
    """What the hub's cache holds of a release that was published with its checkpoint: links into blobs."""
    release = Path(shutil.copytree((run / "release").resolve(), tmp_path / "published"))
    shutil.copytree((run / "checkpoint").resolve(), release / "checkpoint")
    snapshot = hub_cache(release, tmp_path / "hub")
    shutil.rmtree(release)
    assert verify(snapshot).ok
    result = remake(snapshot, draw=4)
    assert (result.ok, result.n_identical, result.checkpoint) == (True, 4, snapshot / "checkpoint")


def test_equal_pixels_in_another_png_are_not_called_identical(bare: Path, tmp_path: Path) -> None:
    release = shutil.copytree(bare, tmp_path / "release")
    name = tamper(release, 4, content_hash="0" * 64)
    (item,) = remake(release, samples=[name], checkpoint=bare.parent / "checkpoint").samples
    assert (item.outcome, item.png_identical, item.largest_difference) == ("within tolerance", False, 0.0)
    assert "the bytes of the PNG are not" in item.why


def test_random_ones_are_the_same_each_time(bare: Path, command: Command) -> None:
    first, again, other = (remake(bare, draw=3, seed=seed) for seed in (0, 0, 1))
    assert first.n_samples == 3
    names = [item.sample_id for item in first.samples]
    assert names == [item.sample_id for item in again.samples] != [item.sample_id for item in other.samples]
    assert remake(bare, draw=10_000).n_samples == len(ids(bare))
    result = command("remake", bare, "--random", 3, real=True)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in names)
    assert "3 of 3 samples identical" in result.stdout


@pytest.mark.parametrize("file", ["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_changed_byte_of_the_checkpoint_is_refused(bare: Path, tmp_path: Path, command: Command, file: str) -> None:
    folder = shutil.copytree(bare.parent / "checkpoint", tmp_path / "checkpoint")
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"were drawn from the checkpoint with the digest .*it was changed"):
        remake(bare, checkpoint=folder)
    result = command("remake", bare, "--all", "--checkpoint", folder, real=True)
    assert result.returncode == 2
    assert result.stderr.startswith("synthaug: the samples of release")


def test_a_checkpoint_is_found_where_it_lies(run: Path, bare: Path, tmp_path: Path) -> None:
    (run / "checkpoint").unlink()
    (stage,) = (run / "stages").glob("train-*")
    for folder in (None, run, stage, stage / "pipeline"):
        if folder == run:
            (run / "checkpoint").symlink_to(stage / "pipeline")
        assert remake(run / "release", draw=1, checkpoint=folder).checkpoint.resolve() == stage / "pipeline"
    alone = shutil.copytree(bare, tmp_path / "alone" / "release")
    with pytest.raises(CheckpointError, match=r"not beside the release\. Name its folder with --checkpoint"):
        remake(alone)
    with pytest.raises(CheckpointError, match="is no folder"):
        remake(alone, checkpoint=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [
        ({"seed": 5}, "differs", "a seed that does not follow"),
        ({"class_index": 3, "position": 3}, "differs", "a seed that does not follow"),
        ({"steps": 7}, "differs", "its id does not follow from its row"),
        ({"pixel_hash": "0" * 64}, "differs", "the shard is not here"),
        ({"position": 4}, "could not be made", "its row contradicts itself"),
        ({"micro_batch_size": 10**9}, "could not be made", "its row has micro_batch_size 1000000000"),
        ({"steps": None}, "could not be made", "its row has steps None"),
        ({"class_name": "none\x1b[0m"}, "could not be made", r"class 'none\x1b[0m', which are not one"),
        ({"generator": "gan"}, "could not be made", "no generator is called 'gan'"),
        ({"checkpoint_digest": "f" * 64}, "could not be made", "drawn from another checkpoint, ffffffffffff"),
    ],
)
def test_a_tampered_row_is_told(bare: Path, tmp_path: Path, change: dict[str, Any], outcome: str, words: str) -> None:
    release = shutil.copytree(bare, tmp_path / "release")
    rows = pq.read_table(release / MANIFEST_FILE).to_pylist()
    name = tamper(release, 5, **change)
    # Not the sample whose place the tampered row claims: two rows of one place are one drawing.
    others = [row["sample_id"] for row in rows[:5] if row["position"] != change.get("position")][:3]
    result = remake(release, samples=[name, *others], checkpoint=bare.parent / "checkpoint")
    assert not result.ok
    by_id = {item.sample_id: item for item in result.samples}
    assert by_id[name].outcome == outcome
    assert words in by_id[name].why
    assert {by_id[other].outcome for other in others} == {"identical"}
    assert "manifest.parquet is not the one that release.json speaks of" in result.notes[0]


def test_a_row_whose_image_is_another_is_told_by_the_command(run: Path, command: Command) -> None:
    name = tamper(run / "release", 0, seed=5)
    result = command("remake", run / "release", "--sample", name, real=True)
    assert result.returncode == 1
    assert "differs" in result.stdout
    assert "0 of 1 samples identical" in result.stdout


def test_a_difference_is_tolerated_only_where_something_changed(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = finished_run / "release"
    original = canonical.draw_micro_batch

    def nudged(by: int) -> None:
        def draw(*arguments: Any, **settings: Any) -> np.ndarray:
            images = original(*arguments, **settings).copy()
            images[:, 0, 0] = np.where(images[:, 0, 0] < 100, images[:, 0, 0] + by, images[:, 0, 0] - by)
            return images

        monkeypatch.setattr(canonical, "draw_micro_batch", draw)

    nudged(1)
    same = remake(release, draw=2)
    assert (same.ok, same.n_differ) == (False, 2)
    assert [item.largest_difference for item in same.samples] == pytest.approx([1 / 255] * 2)
    other = remake(release, draw=2, threads=2)
    assert (other.ok, other.n_within_tolerance, other.changes) == (True, 2, ("threads: 1 → 2",))
    nudged(2)
    assert not remake(release, draw=2, threads=2).ok


def test_other_threads_stay_within_tolerance(finished_run: Path) -> None:
    result = remake(finished_run / "release", threads=2)
    assert result.ok
    assert result.changes == ("threads: 1 → 2",)


def test_what_is_tolerated() -> None:
    assert 1 / 255 < allowed(digits_spec()) < 2 / 255
    assert allowed(digits_spec(dtype="float32", low=-2.0, high=2.0)) < 1e-3


def test_unknown_samples_and_wrong_use(bare: Path, tmp_path: Path, command: Command) -> None:
    first = ids(bare)[0]
    for wrong in (first[:-1], first[:9], first[:-1] + "x"):
        with pytest.raises(UsageError, match=rf"has no sample '{wrong}' among its \d+\. The nearest are .*{first}"):
            remake(bare, samples=[wrong])
    with pytest.raises(UsageError, match="at least 1"):
        remake(bare, draw=0)
    for arguments in ([], ["--all", "--random", "2"], ["--sample", "no"]):
        result = command("remake", bare, *arguments, real=True)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert command("remake", tmp_path, "--all", real=True).returncode == 1
    (tmp_path / "release").mkdir()
    shutil.copy(bare / "release.json", tmp_path / "release")
    with pytest.raises(VerificationError, match="is missing"):
        remake(tmp_path / "release")
    (tmp_path / "release" / MANIFEST_FILE).write_bytes(b"PAR1")
    with pytest.raises(VerificationError, match="is damaged"):
        remake(tmp_path / "release")
    pq.write_table(pq.read_table(bare / MANIFEST_FILE).drop_columns("job_seed"), tmp_path / "release" / MANIFEST_FILE)
    with pytest.raises(VerificationError, match="no column job_seed: it was written by another version"):
        remake(tmp_path / "release", checkpoint=bare.parent / "checkpoint")


def test_200_flipped_bytes_over_all_files_of_a_release_are_caught(run: Path) -> None:
    release = (run / "release").resolve()
    assert verify(release).ok
    files = sorted(file for file in release.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    chance = random.Random(200)
    for trial in range(200):
        # Each file has its turn; after that, bytes are drawn alike, and large files have more of them.
        file = files[trial] if trial < len(files) else chance.choices(files, sizes)[0]
        data = file.read_bytes()
        place = chance.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= chance.randrange(1, 256)
        file.write_bytes(flipped)
        try:
            found = verify(release).problems
        except VerificationError as error:
            found = (str(error),)
        assert any(file.relative_to(release).as_posix() in text for text in found), (file, place)
        file.write_bytes(data)
    assert verify(release).ok
