"""`synthaug report`: the page of a run folder again, from its records alone, whole or half."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from synthaug.config import Config
from synthaug.errors import UsageError
from synthaug.pipeline import augment
from synthaug.rebuild import rebuild
from synthaug.records import SEEN_FILE
from synthaug.remake import remake
from tests.page_parts import STAGES, Page, Run
from tests.test_page import check

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stand_in_config(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        trial = {"evaluate": {"enabled": True}}
        return tiny_config(**{"dataset": {"cut": {}}, "plan": {"target_ratio": 1.0}, **trial, **changes})

    return make


def test_what_a_run_wrote_is_written_again(stages: list[str], stand_in_config: Any) -> None:
    summary = augment(stand_in_config())
    assert summary.report is not None
    written = summary.report.read_bytes()
    summary.report.unlink()
    (summary.run / "run.json").unlink()
    stages.clear()
    result = rebuild(summary.run)
    assert result.report.read_bytes() == written
    assert result.missing == ()
    assert stages == []
    check(Page(written.decode()))


def test_a_second_run_with_other_settings_has_a_page_of_its_own(stages: list[str], stand_in_config: Any) -> None:
    first = augment(stand_in_config())
    assert first.report is not None
    page = first.report.read_bytes()
    second = augment(stand_in_config(evaluate={"enabled": False}))
    assert second.report == first.report
    other = second.report.read_bytes()
    assert b"No claim is made" in other
    assert b"No claim is made" not in page
    assert augment(stand_in_config()).report == first.report
    assert "Verdict: No evidence" in Page(first.report.read_text()).said


def test_a_whole_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["cat", "dog", "lynx"])
    result = rebuild(run.output)
    page = Page(result.report.read_text(encoding="utf-8"))
    check(page)
    assert result.missing == ()
    assert "train " in page.said
    assert "sample round 1 0.0 40 10.0" in page.said
    assert "Processor energy: not measured." in page.said
    # Somewhere else, it is the same page but for what a copy cannot keep.
    copy = Path(shutil.copytree(run.output, tmp_path / "elsewhere", symlinks=True))
    (copy / "report.html").unlink()
    assert rebuild(copy).report.read_bytes() == result.report.read_bytes()


def test_a_checkpoint_that_nothing_was_trained_after_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["cat", "dog", "lynx"])
    seen = pd.DataFrame({"image_id": ["real-0", "real-1", "real-24"], "use": ["train", "train", "validation"]})
    seen.to_parquet(run.records["train"].directory / SEEN_FILE)
    said = Page(rebuild(run.output).report.read_text(encoding="utf-8")).said
    assert (
        "an earlier state of the dataset, with 2 real training and 1 validation images; now there are 24 and 1" in said
    )


@pytest.mark.parametrize("until", STAGES[:-1])
def test_half_a_run_says_what_is_missing(tmp_path: Path, until: str) -> None:
    run = Run(tmp_path / "run", ["cat", "dog"], until=until)
    result = rebuild(run.output)
    page = Page(result.report.read_text(encoding="utf-8"))
    check(page)
    assert "There is no release." in result.missing
    assert ("No generator has been trained." in result.missing) is (STAGES.index(until) < STAGES.index("train"))
    assert ("No samples have been audited." in result.missing) is (STAGES.index(until) < STAGES.index("audit"))
    assert all(line in page.said for line in result.missing)
    assert "synthaug remake" not in page.said


def test_images_that_were_cleared_away_are_missed_and_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["cat", "dog"])
    (run.records["read"].directory / "images.npy").unlink()
    result = rebuild(run.output)
    assert [line for line in result.missing if line.startswith("The images of the stages cannot be read")]
    check(Page(result.report.read_text(encoding="utf-8")))


def test_records_of_another_version_name_the_stage_to_run_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["cat", "dog"])
    file = run.records["judge"].directory / "done.json"
    done = json.loads(file.read_text())
    del done["record"]["near_copy_note"]
    file.write_text(json.dumps(done))
    (line,) = rebuild(run.output).missing
    assert line.startswith(f"What stage 'judge' recorded (stages/{file.parent.name}) was written by another version")
    assert "run 'synthaug run CONFIG' again" in line


def test_the_newest_of_what_is_furthest_on_is_told(tmp_path: Path) -> None:
    """Without a release, another split of the same images stands beside; the page is of one line of stages."""
    run = Run(tmp_path / "run", ["cat", "dog"], until="audit")
    before = rebuild(run.output).report.read_bytes()
    old = run.records["train"].directory
    lost = old.parent / "train-000000000000"
    shutil.copytree(old, lost)
    done = json.loads((lost / "done.json").read_text())
    done["record"]["digest"], done["key_parts"][2] = "0" * 64, "1" * 64
    (lost / "done.json").write_text(json.dumps(done))
    os.utime(lost / "done.json", (2**31, 2**31))
    assert rebuild(run.output).report.read_bytes() == before


def test_another_tools_images_are_no_part_of_the_job(stages: list[str], stand_in_config: Any, tmp_path: Path) -> None:
    from synthaug.pipeline import evaluate_foreign

    config = stand_in_config()
    summary = augment(config)
    assert summary.report is not None
    page = summary.report.read_bytes()
    evaluate_foreign(config, str(tmp_path / "samples"))
    assert rebuild(summary.run).report.read_bytes() == page


@pytest.mark.parametrize("what", ["nothing", "empty", "file", "inside"])
def test_no_run_folder(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    if what == "empty":
        (folder / "stages").mkdir(parents=True)
    elif what == "file":
        folder.write_text("x")
    elif what == "inside":
        (folder / "run" / "stages").mkdir(parents=True)
    with pytest.raises(UsageError, match="has nothing to report" if what == "empty" else "folder") as error:
        rebuild(folder)
    assert ("Did you mean" in str(error.value)) is (what == "inside")
    assert not (folder / "report.html").exists()


def test_on_the_command_line(tmp_path: Path, command: Command) -> None:
    run = Run(tmp_path / "run", ["cat", "dog"])
    done = command("report", run.output, "--json", real=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["report"] == str(run.output / "report.html")
    refused = command("report", tmp_path / "no", real=True)
    assert refused.returncode == 2
    assert "is not there" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_real_run_is_told_in_its_folder_and_in_its_release(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    written = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    (run / "run.json").unlink()
    assert rebuild(run).report.read_bytes() == written
    page, released = Page(written.decode()), Page((run / "release" / "report.html").read_text(encoding="utf-8"))
    for one in (page, released):
        check(one)
        assert "Training curves" in one.said
        assert "12 real" in one.said
    assert "report.html" in json.loads((run / "release" / "release.json").read_text())["files"]
    assert str(finished_run) not in released.text
    sample = re.search(r"synthaug remake release --sample (\S+)", page.said)
    assert sample is not None
    done = remake(run / "release", samples=[sample[1]], draw=None, seed=0, checkpoint=None)
    assert done.ok
