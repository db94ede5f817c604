"""The real job, small: all stages on real images, repeated, changed, interrupted and out of room."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY, tiny_values

pytestmark = pytest.mark.slow


def synthaug(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "synthaug", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder / "run", **changes)), encoding="utf-8")
    return path


def run(path: Path) -> dict[str, Any]:
    result = synthaug("run", path, "--json")
    assert result.returncode == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One finished run: its configuration file and what it printed. Tests may only add to it."""
    path = write_config(tmp_path_factory.mktemp("job"))
    return path, run(path)


def test_the_release_is_what_the_plan_asked(job: tuple[Path, dict[str, Any]]) -> None:
    _, summary = job
    release = Path(summary["release"])
    assert (release / "README.md").is_file()
    assert Path(summary["contact_sheet"]).read_bytes().startswith(b"\x89PNG")
    for name in ("3", "8"):
        counts = summary["counts"][name]
        assert counts["real"] == 12
        assert counts["synthetic"] + counts["short"] == 27
        assert counts["synthetic"] > 0
    result = synthaug("verify", Path(summary["run"]) / "release", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["ok"] is True


def test_load_dataset_in_a_process_of_its_own(job: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, summary = job
    program = (
        "import sys, collections, json, datasets\n"
        "data = datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])\n"
        "train = data['train']\n"
        "names = train.features['label'].names\n"
        "counts = collections.Counter(names[n] for n, made in zip(train['label'], train['is_synthetic']) if made)\n"
        "assert not any(any(data[split]['is_synthetic']) for split in ('validation', 'test'))\n"
        "assert data['train'][0]['image'].size == (8, 8)\n"
        "print(json.dumps(counts))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, summary["release"], str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    made = {name: item["synthetic"] for name, item in summary["counts"].items() if item["synthetic"]}
    assert json.loads(result.stdout) == made


def test_a_damaged_release_is_told_and_repaired(job: tuple[Path, dict[str, Any]]) -> None:
    path, summary = job
    (shard,) = (Path(summary["release"]) / "data").glob("test-*.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    result = synthaug("verify", summary["release"])
    assert result.returncode == 1
    assert shard.name in result.stdout
    assert "unexpected" not in result.stderr
    again = run(path)
    assert again["release"] == summary["release"]
    assert shard.read_bytes() == whole
    assert synthaug("verify", summary["release"]).returncode == 0


def test_a_second_run_does_no_work(job: tuple[Path, dict[str, Any]]) -> None:
    path, first = job
    # Processor time: the clock says what else the machine does.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    second = run(path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert set(second["reused"]) == set(first["seconds"])
    assert second["release"] == first["release"]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_another_guidance_trains_nothing(job: tuple[Path, dict[str, Any]]) -> None:
    path, first = job
    changed = path.with_name("guidance.yaml")
    changed.write_text(yaml.safe_dump(tiny_values(path.parent / "run", sample={"guidance": 2.0})), encoding="utf-8")
    second = run(changed)
    assert set(second["reused"]) == {"read", "split", "plan", "train", "judge", "membership"}
    assert second["release"] != first["release"]
    assert Path(first["release"]).is_dir()
    assert synthaug("verify", first["release"]).returncode == 0


def test_interrupted_in_every_stage_it_ends_at_the_same_release(
    job: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, undisturbed = job
    path = write_config(tmp_path)
    folder = tmp_path / "run"
    last = ("sample", "audit", "release")
    for stage in ("read", "train", "judge", *last):
        process = subprocess.Popen(
            [sys.executable, "-m", "synthaug", "run", str(path)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
        )
        with process:
            while process.poll() is None and not list(folder.glob(f"stages/{stage}-*")):
                time.sleep(0.005)
            # Inside of training, not in its first imports.
            time.sleep(2.0 if stage == "train" else 0.02)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            stderr = process.stderr.read()
        # The last ones are over in a moment and may have won the race. A process that the signal finds in Python's own
        # last moments ends by it: a shell calls that 130 as well.
        assert process.returncode in ({0, 130, -signal.SIGINT} if stage in last else {130, -signal.SIGINT}), stderr
        assert "Traceback" not in stderr
        assert "KeyboardInterrupt" not in stderr
        assert list(folder.glob("releases/.*")) == []
    assert run(path)["release_digest"] == undisturbed["release_digest"]


def test_no_room_to_write(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the system refuses the write in the same way."""
    path = write_config(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    result = synthaug("run", path, preexec_fn=limit)
    assert result.returncode == 1
    assert "disk full while working on 'read'" in result.stderr
    assert "Traceback" not in result.stderr
    again = synthaug("plan", path)
    assert again.returncode == 0, again.stderr


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk takes root on Linux")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_values(disk / "run")), encoding="utf-8")
        result = synthaug("run", path)
        assert result.returncode == 1
        assert "disk full while working on" in result.stderr
        assert "No space left on device" in result.stderr or "no space left on device" in result.stderr
        assert "Traceback" not in result.stderr
        # What was complete is kept: with room it goes on from there.
        subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
        assert "read" in run(path)["reused"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_pneumoniamnist_plan(shared_data: Path, tmp_path: Path, repository: Path) -> None:
    config = yaml.safe_load((repository / "configs" / "pneumoniamnist.yaml").read_text(encoding="utf-8"))
    config["dataset"]["path"] = str(shared_data / "pneumoniamnist.npz")
    path = tmp_path / "pneumonia.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = synthaug("plan", path, "--json", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    classes = {item["name"]: item for item in values["classes"]}
    assert classes["normal"]["real"] == 60
    # Exact duplicates are used once.
    assert classes["pneumonia"]["real"] == 3494 - values["held_back"]["duplicate"]
    assert classes["normal"]["target"] == 1200
    # The cut applies to the training split only.
    assert values["splits"]["test"] == [234, 390]
    assert values["splits"]["validation"] == [135, 389]
