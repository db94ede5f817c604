"""kill -9: whenever it comes, running again ends at the release of a run that nothing disturbed, byte for byte."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from synthaug.config import parse_config
from synthaug.pipeline import augment
from tests import kills
from tests.conftest import REPOSITORY, tiny_values

pytestmark = pytest.mark.slow

# Counts steps of training in a file, a line a step, and dies at the beginning of the one that is asked for.
_COUNTED = """
import os, signal, sys
from pathlib import Path
from synthaug.diffusion import training
steps, last, loss = Path(sys.argv[2]), int(sys.argv[3]), training.Trainer._loss
def counted(self, unet, phase, step):
    with steps.open("a") as file:
        file.write(f"{phase.name} {step}\\n")
    if len(steps.read_text().splitlines()) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, unet, phase, step)
training.Trainer._loss = counted
from synthaug.cli import app
app(["run", sys.argv[1]])
"""


def whole_job(folder: Path) -> dict[str, Any]:
    """With a solver that is fitted to the checkpoint, and draws."""
    return tiny_values(folder / "run", train={"fit_solver_from": 0}, sample={"steps": None})


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    found = augment(parse_config(whole_job(folder)))
    assert set(pd.read_parquet(found.release / "manifest.parquet")["steps"].dropna()) == {8}
    return kills.contents(found.release)


def test_killed_once_at_every_named_point_of_writing(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    log = tmp_path / "points"
    command = [sys.executable, "-m", "tests.kills", str(write_config(tmp_path, whole_job(tmp_path))), str(log), "few"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    points = log.read_text(encoding="utf-8").splitlines()
    for name in ("read", "split", "plan", "train", "judge", "membership", "sample", "audit", "release"):
        for moment in ("half", "whole", "renamed"):
            assert f"rename stages/{name}-*/done.json, {moment}" in points
    for point in (
        "rename stages/train-*/work/state.safetensors, half",
        "rename stages/train-*/work/base, whole",
        "rename stages/train-*/pipeline, renamed",
        "remove stages/train-*/work, after",
        "rename stages/sample-*/work/shards/-*, whole",
        "rename stages/sample-*/work/shards/-*, renamed",
        "rename stages/audit-*/work/shards/-*, renamed",
        "flush drawn images, before",
        "rename splits-ledger.json, half",
        "rename releases/-*, whole",
        "rename release, renamed",
        "rename run.json, half",
    ):
        assert point in points
    assert kills.contents(tmp_path / "run" / "release") == undisturbed
    assert kills.unfinished(tmp_path / "run") == []


def test_killed_in_a_release_that_takes_over_shards(tmp_path: Path) -> None:
    few, more = {"plan": {"target_ratio": 0.85}}, {"plan": {"target_ratio": 1.0}}
    shards = {"release": {"images_per_shard": 130}}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    augment(parse_config(tiny_values(undisturbed / "run", **few, **shards)))
    shutil.copytree(undisturbed / "run", killed / "run", symlinks=True)
    older = kills.contents(undisturbed / "run" / "release")
    wanted = kills.contents(augment(parse_config(tiny_values(undisturbed / "run", **more, **shards))).release)
    # Real images fill three shards, and all samples lay in a fourth; those that came since are in one of their own.
    train = [name for name in wanted if name.startswith("data/train-")]
    assert [older.get(name) == wanted[name] for name in sorted(train)] == [True] * 4 + [False]

    log = tmp_path / "points"
    config = write_config(killed, tiny_values(killed / "run", **more, **shards))
    command = [
        sys.executable,
        "-m",
        "tests.kills",
        str(config),
        str(log),
        "only=previous|releases/|release-.*done|release$",
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    points = log.read_text(encoding="utf-8").splitlines()
    for point in (
        "rename stages/release-*/previous.json, half",
        "rename stages/release-*/previous.json, renamed",
        "rename releases/-*, renamed",
        "rename stages/release-*/done.json, whole",
        "rename release, renamed",
    ):
        assert point in points
    assert kills.contents(killed / "run" / "release") == wanted
    assert kills.unfinished(killed / "run") == []


def test_killed_at_any_moment(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    draws, log = random.Random(0), tmp_path / "killed"
    stages = ("read", "split", "train", "train", "judge", "membership", "sample", "release")
    longest = {"train": 2.5, "split": 1.0, "judge": 1.0, "membership": 1.0}
    moments = ",".join(f"{stage}:{draws.uniform(0, longest.get(stage, 0.3)):.3f}" for stage in stages)
    config = str(write_config(tmp_path, whole_job(tmp_path)))
    command = [sys.executable, "-m", "tests.kills", config, str(log), f"moments={moments}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(log.read_text(encoding="utf-8").splitlines()) >= 5
    assert kills.contents(tmp_path / "run" / "release") == undisturbed
    assert kills.unfinished(tmp_path / "run") == []


def test_little_of_a_training_is_repeated(tmp_path: Path) -> None:
    values, steps = tiny_values(tmp_path / "run", train={"images": 2048}), tmp_path / "steps"
    path = write_config(tmp_path, values)
    whole = 65  # of 32 images: 45 for the base, 20 for the tuning
    command = [sys.executable, "-c", _COUNTED, str(path), str(steps)]
    first = subprocess.run([*command, str(round(0.9 * whole))], cwd=REPOSITORY, capture_output=True, timeout=300)
    assert first.returncode == -9, first.stderr
    second = subprocess.run([*command, "0"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    trained = steps.read_text(encoding="utf-8").splitlines()
    assert len(set(trained)) == whole
    assert 0 < len(trained) - whole <= 0.15 * whole
