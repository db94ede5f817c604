"""The verdict as a stage of the job and as a command, with stand-ins for the stages."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthaug.config import Config
from synthaug.errors import ConfigError, ReleaseError
from synthaug.pipeline import audit_foreign, augment, evaluate, evaluate_foreign

MakeConfig = Callable[..., Config]
Command = Callable[..., subprocess.CompletedProcess[str]]

SAMPLED = ["read", "split", "train", "judge", "membership", "sample", "audit", "sample", "audit"]


@pytest.fixture
def judged(tiny_config: MakeConfig) -> MakeConfig:
    """A job of stand-ins with the verdict on, as it is where nothing is said."""

    def make(**changes: Any) -> Config:
        base = {"dataset": {"cut": {}}, "plan": {"target_ratio": 1.0}, "evaluate": {"enabled": True}}
        return tiny_config(**{**base, **changes})

    return make


def test_a_verdict_is_reached_unless_told_otherwise() -> None:
    assert Config.model_fields["evaluate"].default_factory().enabled  # type: ignore[call-arg, misc]


def test_the_verdict_comes_before_the_release_and_is_told(stages: list[str], judged: MakeConfig) -> None:
    summary = augment(judged())
    assert stages == [*SAMPLED, "evaluate", "release"]
    assert summary.verdict == "no evidence"
    assert summary.verdict_sentence == "no evidence: stand-ins were tried."
    assert summary.verdict_file == summary.run / "verdict.json"
    assert json.loads(summary.verdict_file.read_text())["outcome"] == "no evidence"
    assert (summary.run / "verdict_gain.png").read_bytes() == b"picture"
    stages.clear()
    assert augment(judged()).reused == tuple(summary.seconds)
    assert stages == []


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"workers": 7}, ["evaluate", "release"]),  # more fits into the minutes
        ({"minutes": 3.0}, ["evaluate", "release"]),
        ({"metric": "macro_f1"}, ["evaluate", "release"]),
        ({"enabled": False}, ["release"]),
    ],
)
def test_what_a_change_tries_again(
    stages: list[str], judged: MakeConfig, change: dict[str, Any], redone: list[str]
) -> None:
    augment(judged())
    stages.clear()
    augment(judged(evaluate={"enabled": True, **change}))
    assert stages == redone


def test_evaluate_releases_nothing_and_run_goes_on_from_it(stages: list[str], judged: MakeConfig) -> None:
    summary = evaluate(judged())
    assert stages == [*SAMPLED, "evaluate"]
    assert summary.verdict.outcome == "no evidence"
    assert summary.verdict_file.is_file()
    assert [path.name for path in summary.pictures] == ["verdict_gain.png"]
    assert not (summary.run / "release").exists()
    stages.clear()
    augment(judged())
    assert stages == ["release"]


def test_a_release_that_must_help_is_not_made_otherwise(
    stages: list[str], judged: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = judged(release={"require": "helps"})
    for outcome in ("no evidence", "harms"):
        monkeypatch.setenv("SYNTHAUG_STAND_IN_VERDICT", outcome)
        stages.clear()
        with pytest.raises(ReleaseError, match=rf"asks for 'helps', and the verdict is {outcome}: stand-ins.*json"):
            augment(config)
        assert "release" not in stages
        assert not (config.output_path / "release").exists()
        assert json.loads((config.output_path / "verdict.json").read_text())["outcome"] == outcome
        for stage in (config.output_path / "stages").glob("evaluate-*/done.json"):
            stage.unlink()
    monkeypatch.setenv("SYNTHAUG_STAND_IN_VERDICT", "helps")
    assert augment(config).verdict == "helps"


def test_a_demand_without_a_trial_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"needs a verdict: set evaluate\.enabled to true"):
        tiny_config(release={"require": "helps"})


def test_another_tools_samples_are_tried_without_training(
    stages: list[str], judged: MakeConfig, tmp_path: Path
) -> None:
    summary = evaluate_foreign(judged(), str(tmp_path / "theirs <x>"))
    assert stages == ["read", "split", "read", "adopt", "judge", "evaluate"]
    assert summary.verdict_file.parent.parent == summary.run / "judged"
    assert summary.verdict_file.parent.name.startswith("theirs-x-")
    # The job's own verdict is another file.
    assert not (summary.run / "verdict.json").exists()
    stages.clear()
    report = audit_foreign(judged(), str(tmp_path / "theirs <x>"))
    assert stages == ["audit"]
    assert report.audit_file.is_file()
    assert report.rejected_sheet.is_file()


def test_own_code_is_refused_before_any_work(judged: MakeConfig) -> None:
    config = judged(evaluate={"enabled": True, "classifier": "no_such_module:thing"})
    with pytest.raises(ConfigError, match=r"evaluate.classifier: importing no_such_module failed"):
        augment(config)
    assert not list((config.output_path / "stages").glob("*"))


@pytest.mark.slow
def test_the_commands(command: Command, tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    job = tiny_file(dataset={"cut": {}}, plan={"target_ratio": 1.0}, evaluate={"enabled": True})
    result = command("evaluate", job, "-q")
    assert result.returncode == 0, result.stderr
    assert "verdict: no evidence: stand-ins were tried." in result.stdout
    values = json.loads(command("evaluate", job, "--json", "-q").stdout)
    assert values["outcome"] == "no evidence"
    assert values["verdict_file"] == str(tmp_path / "run" / "verdict.json")
    ran = command("run", job, "-q").stdout
    assert "verdict: no evidence: stand-ins were tried." in ran
    theirs = command("evaluate", job, "--synthetic", tmp_path, "-q")
    assert theirs.returncode == 0, theirs.stderr
    audited = command("audit", job, "--synthetic", tmp_path, "-q")
    assert audited.returncode == 0, audited.stderr
    assert "lynx" in audited.stdout
    assert command("audit", job).returncode == 2
    values = json.loads(command("audit", job, "--synthetic", tmp_path, "--json", "-q").stdout)
    assert os.path.isfile(values["audit_file"])
