"""How a run folder stands: what is told of it is held against what a run then does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from synthaug.config import Config
from synthaug.errors import TrainingError, UsageError
from synthaug.pipeline import augment
from synthaug.status import look, status
from synthaug.workspace import open_workspace
from tests.test_pipeline import TITLES

MakeConfig = Callable[..., Config]


@pytest.fixture
def stand_in_config(tiny_config: MakeConfig) -> MakeConfig:
    def make(**changes: Any) -> Config:
        return tiny_config(**{"dataset": {"cut": {}}, "plan": {"target_ratio": 1.0}, **changes})

    return make


def tree(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sample": {"guidance": 2.0}},
        {"audit": {"min_coverage": 0.2}},
        {"release": {"title": "Another"}},
        {"plan": {"target_ratio": 0.9}},
        {"train": {"images": 1024}},
        {"image": {"size": 16}},
    ],
)
def test_what_is_told_beforehand_is_what_a_run_does(
    stages: list[str], stand_in_config: MakeConfig, change: dict[str, Any]
) -> None:
    augment(stand_in_config())
    changed = stand_in_config(**change)
    before, told = tree(changed.output_path), look(changed)
    assert tree(changed.output_path) == before
    summary = augment(changed)
    reused = [item.title for item in told if item.action == "reuse"]
    to_do = [item.title for item in told if item.action in ("redo", "begin")]
    # What is said to be reused is, whatever comes before it; what stays open may go either way.
    assert set(reused) <= set(summary.reused)
    assert not set(to_do) & set(summary.reused)
    assert [item.title for item in told] == TITLES
    assert (not to_do) == (change == {})
    assert all(item.reasons for item in told)


def test_the_reason_names_the_setting(stages: list[str], stand_in_config: MakeConfig) -> None:
    augment(stand_in_config())
    why = {item.title: item for item in look(stand_in_config(sample={"guidance": 2.0}))}
    assert why["train"].action == "reuse"
    assert why["sample round 1"].reasons == ("sample.guidance: 1.0 before, 2.0 now",)
    assert "samples of round 1: made anew before it" in why["audit round 1"].reasons
    assert "configuration.sample.guidance: 1.0 before, 2.0 now" in why["release"].reasons


def test_a_folder_where_nothing_was_done(stages: list[str], stand_in_config: MakeConfig, tmp_path: Path) -> None:
    told = look(stand_in_config())
    assert [(item.title, item.action, item.reasons) for item in told] == [("read", "begin", ("never done here",))]
    assert not stand_in_config().output_path.exists()
    with pytest.raises(UsageError, match="is no run folder"):
        status(tmp_path)


def test_a_damaged_release_is_told(stages: list[str], stand_in_config: MakeConfig) -> None:
    summary = augment(stand_in_config())
    (summary.release / "release.bin").write_bytes(b"short")
    told = look(stand_in_config())
    assert [item.title for item in told if item.action == "redo"] == ["release"]
    assert told[-1].reasons == ("what it made is damaged or gone",)


def test_an_error_is_told_and_what_is_next(
    stages: list[str], stand_in_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stand_in_config()
    monkeypatch.setenv("SYNTHAUG_STAND_IN", "train:fail")
    with pytest.raises(TrainingError):
        augment(config)
    found = status(config.output_path)
    assert found.error == "TrainingError: train broke down"
    assert found.last_run is not None
    assert found.last_run.startswith("ended in 'train' by an error")
    assert found.next == "train, which is not done"
    assert [(item.title, item.state) for item in found.stages] == [
        ("read", "done"), ("split", "done"), ("plan", "done"), ("train", "begun"),
    ]  # fmt: skip
    monkeypatch.delenv("SYNTHAUG_STAND_IN")
    summary = augment(config)
    found = status(config.output_path)
    assert found.error is None
    assert found.next == "nothing: the release is complete"
    assert found.release == summary.release.name
    assert [item.title for item in found.stages] == TITLES
    assert found.bytes >= sum(item.bytes for item in found.stages) + found.releases[summary.release.name] > 11_000
    assert found.seconds == pytest.approx(sum(item.seconds or 0 for item in found.stages))


def test_who_is_at_work_is_told_and_a_dead_run_is_not(stages: list[str], stand_in_config: MakeConfig) -> None:
    config = stand_in_config()
    augment(config)
    with open_workspace(config.output_path):
        found = status(config.output_path)
        assert found.running is not None
        assert found.running.startswith(f"process {os.getpid()} on host ")
    assert status(config.output_path).running is None
    # What a killed run leaves lying says nothing.
    (config.output_path / "run.holder.json").write_text(json.dumps({"pid": 1, "host": "h", "started": "s"}))
    assert (config.output_path / "run.lock").exists()
    assert status(config.output_path).running is None


def test_a_killed_run_is_told(tiny_file: Callable[..., Path], repository: Path) -> None:
    path = tiny_file(dataset={"format": "digits", "cut": {}}, plan={"target_ratio": 1.0})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stand_ins", "run", str(path)],
        cwd=repository,
        env={**os.environ, "SYNTHAUG_STAND_IN": "judge:sleep"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process, process.stderr:
        while process.stderr.readline() != "judge sleeps\n":
            assert process.poll() is None
        working = status(path.parent / "run")
        assert working.running is not None
        assert f"process {process.pid} " in working.running
        assert working.last_run is not None
        assert working.last_run.startswith("at work on 'judge'")
        process.kill()
        process.wait()
    found = status(path.parent / "run")
    assert found.running is None
    assert found.last_run is not None
    assert found.last_run.startswith("cut off in 'judge'")
    assert found.next == "judge, which is not done"


def test_the_command(
    stages: list[str], stand_in_config: MakeConfig, command: Callable[..., Any], tmp_path: Path
) -> None:
    config = stand_in_config()
    augment(config)
    path = tmp_path / "job.yaml"
    values = config.model_dump(mode="json") | {"output": "elsewhere", "sample": {"guidance": 3.0}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    result = command("status", config.output_path, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == status(config.output_path).model_dump(mode="json")
    result = command("status", config.output_path, "--why", path)
    assert result.returncode == 0, result.stderr
    # A narrow terminal breaks the cell.
    words = " ".join(result.stdout.replace("│", " ").split())
    assert "sample.guidance: 1.0 before, 3.0 now" in words
    assert "next: sample round 1" in result.stdout
    assert command("status", tmp_path / "none").returncode == 2
