"""The order of the stages, reuse, the run folder and interruption, with stand-ins for the stages."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthaug.config import Config
from synthaug.errors import BusyError, OutputError, PlanError, SynthaugError, TrainingError, UsageError
from synthaug.pipeline import augment, plan_only
from synthaug.stage_keys import CODE_VERSIONS
from synthaug.workspace import open_workspace

MakeConfig = Callable[..., Config]
Command = Callable[..., subprocess.CompletedProcess[str]]

ONE_RUN = ["read", "split", "train", "judge", "membership", "sample", "audit", "sample", "audit", "release"]
TITLES = [
    "read", "split", "plan", "train", "judge", "membership", "sample round 1", "audit round 1", "sample round 2",
    "audit round 2", "release",
]  # fmt: skip


@pytest.fixture
def stand_in_config(tiny_config: MakeConfig) -> MakeConfig:
    def make(**changes: Any) -> Config:
        return tiny_config(**{"dataset": {"cut": {}}, "plan": {"target_ratio": 1.0}, **changes})

    return make


def test_the_stages_run_in_order_and_the_summary_tells(stages: list[str], stand_in_config: MakeConfig) -> None:
    summary = augment(stand_in_config())
    assert stages == ONE_RUN
    assert list(summary.seconds) == TITLES
    assert summary.reused == ()
    assert summary.counts["lynx\n[red]"] == {"real": 10, "synthetic": 30, "short": 0}
    assert summary.verdict is None
    assert summary.verdict_sentence == "not evaluated"
    assert summary.release.name == summary.release_digest[:12]
    assert (summary.run / "release").resolve() == summary.release
    assert os.readlink(summary.run / "release") == f"releases/{summary.release.name}"
    assert summary.contact_sheet.read_bytes().startswith(b"picture of")
    assert json.loads((summary.run / "run.json").read_text()) == summary.model_dump(mode="json")
    assert set(CODE_VERSIONS) == {*ONE_RUN, "plan", "adopt", "evaluate", "publish"}


def test_every_stage_goes_through_the_hook(stages: list[str], stand_in_config: MakeConfig) -> None:
    seen = []

    def hook(title: str, work: Callable[[], Any]) -> Any:
        seen.append(title)
        return work()

    augment(stand_in_config(), run_stage=hook)
    assert seen == TITLES


def test_a_second_run_reuses_everything(stages: list[str], stand_in_config: MakeConfig) -> None:
    first = augment(stand_in_config())
    before = {path: path.stat().st_mtime_ns for path in first.run.rglob("*") if "stages" in path.parts}
    stages.clear()
    second = augment(stand_in_config())
    assert stages == []
    assert list(second.reused) == TITLES
    assert second.release == first.release
    assert second.counts == first.counts
    assert {path: path.stat().st_mtime_ns for path in first.run.rglob("*") if "stages" in path.parts} == before


def test_a_plan_is_reused_by_the_run(stages: list[str], stand_in_config: MakeConfig) -> None:
    summary = plan_only(stand_in_config())
    assert stages == ["read", "split"]
    assert summary.plan.scarce == [1, 2]
    assert not (summary.run / "releases").exists()
    assert augment(stand_in_config()).reused == ("read", "split", "plan")


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"sample": {"guidance": 2.0}}, ["sample", "audit", "sample", "audit", "release"]),
        ({"audit": {"min_coverage": 0.2}}, ["audit", "audit", "release"]),
        ({"release": {"title": "Another"}}, ["release"]),
        # Who computes changes nothing.
        ({"scale": {"shard_images": 8}}, []),
        ({"name": "another"}, ["release"]),
        # The same classes are scarce: no training.
        ({"plan": {"target_ratio": 0.9}}, ["sample", "audit", "sample", "audit", "release"]),
        ({"train": {"images": 1024}}, ["train", "membership", "sample", "audit", "sample", "audit", "release"]),
        # The release names the configuration it was made with, though the same images were drawn.
        ({"dataset": {"cut": {"3": 9}}}, ["split", "release"]),
        ({"image": {"size": 16}}, ONE_RUN),
    ],
)
def test_a_change_redoes_what_hangs_on_it_and_no_more(
    stages: list[str], stand_in_config: MakeConfig, change: dict[str, Any], redone: list[str]
) -> None:
    augment(stand_in_config())
    stages.clear()
    augment(stand_in_config(**change))
    assert stages == redone


def test_a_release_is_told_which_one_stood_when_it_was_first_begun(
    stages: list[str], stand_in_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["synthaug.release"]
    told: list[Path | None] = []
    release = module.release

    def watched(*given: Any, previous: Path | None = None, **settings: Any) -> Any:
        told.append(previous)
        return release(*given, previous=previous, **settings)

    monkeypatch.setattr(module, "release", watched)
    first = augment(stand_in_config()).release
    # The second fails at first; a third comes between; then it is made, and made again when it was lost.
    monkeypatch.setenv("SYNTHAUG_STAND_IN", "release:fail")
    with pytest.raises(TrainingError):
        augment(stand_in_config(sample={"guidance": 2.0}))
    monkeypatch.delenv("SYNTHAUG_STAND_IN")
    third = augment(stand_in_config(sample={"guidance": 3.0})).release
    second = augment(stand_in_config(sample={"guidance": 2.0})).release
    (second / "release.bin").unlink()
    assert augment(stand_in_config(sample={"guidance": 2.0})).release == second
    assert told == [None, first, first, first, first]
    assert len({first, second, third}) == 3
    augment(stand_in_config(release={"append": False}))
    assert told[-1] is None


def test_going_back_to_old_settings_points_at_the_old_release(stages: list[str], stand_in_config: MakeConfig) -> None:
    first = augment(stand_in_config())
    old = {path: path.read_bytes() for path in first.release.rglob("*") if path.is_file()}
    sheet = first.contact_sheet.read_bytes()
    second = augment(stand_in_config(sample={"guidance": 2.0}))
    assert second.release != first.release
    assert second.contact_sheet.read_bytes() != sheet
    stages.clear()
    third = augment(stand_in_config())
    assert stages == []
    assert third.release == first.release == (third.run / "release").resolve()
    assert third.contact_sheet.read_bytes() == sheet
    assert {path: path.read_bytes() for path in first.release.rglob("*") if path.is_file()} == old
    assert second.release.is_dir()


@pytest.mark.parametrize("damage", ["remove", "truncate", "older record"])
def test_a_stage_without_a_whole_done_file_is_begun_again(
    stages: list[str], stand_in_config: MakeConfig, damage: str
) -> None:
    summary = augment(stand_in_config())
    (done,) = summary.run.glob("stages/judge-*/done.json")
    (done.parent / "left over").touch()
    if damage == "remove":
        done.unlink()
    elif damage == "truncate":
        done.write_bytes(done.read_bytes()[:100])
    else:
        values = json.loads(done.read_text())
        values["record"]["of_another_version"] = 1
        done.write_text(json.dumps(values))
    stages.clear()
    assert augment(stand_in_config()).release == summary.release
    assert stages == ["judge"]
    assert not (done.parent / "left over").exists()


def test_a_release_that_was_removed_is_made_again(stages: list[str], stand_in_config: MakeConfig) -> None:
    summary = augment(stand_in_config())
    for path in summary.release.iterdir():
        path.unlink()
    summary.release.rmdir()
    stages.clear()
    assert augment(stand_in_config()).release == summary.release
    assert stages == ["release"]
    assert summary.release.is_dir()


def test_a_run_folder_can_be_moved(stages: list[str], stand_in_config: MakeConfig, tmp_path: Path) -> None:
    first = augment(stand_in_config())
    first.run.rename(tmp_path / "moved")
    stages.clear()
    second = augment(stand_in_config(output=tmp_path / "moved"))
    assert stages == []
    assert second.release == tmp_path / "moved" / "releases" / first.release.name


@pytest.mark.parametrize("stage", [*ONE_RUN[:7], "evaluate", "release"])
@pytest.mark.parametrize("what", ["fail", "full", "oops"])
def test_a_stage_that_fails_leaves_what_was_complete_and_nothing_half(
    stages: list[str], stand_in_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stage: str, what: str
) -> None:
    config = stand_in_config(evaluate={"enabled": True})
    monkeypatch.setenv("SYNTHAUG_STAND_IN", f"{stage}:{what}")
    error = {"fail": TrainingError, "full": SynthaugError, "oops": ZeroDivisionError}[what]
    with pytest.raises(error):
        augment(config)
    folder = config.output_path
    assert not (folder / "release").exists()
    assert list(folder.glob("releases/*")) == []
    assert list(folder.glob("releases/.*")) == []
    # These go on from what they left behind; other directories without done.json are gone.
    left = [path.name.split("-")[0] for path in folder.glob("stages/*") if not (path / "done.json").exists()]
    assert left == ([stage] if stage in ("train", "sample", "audit", "evaluate", "release") else [])
    complete = list(stages[: stages.index(stage)])

    monkeypatch.delenv("SYNTHAUG_STAND_IN")
    stages.clear()
    summary = augment(config)
    whole_run = [*ONE_RUN[:-1], "evaluate", "release"]
    assert stages == [name for name in whole_run if name not in complete] or stage in ("sample", "audit")
    assert not set(complete) & set(stages) - {"sample", "audit"}
    assert summary.release_digest == _digest_of_an_undisturbed_run(stand_in_config, evaluate={"enabled": True})


def _digest_of_an_undisturbed_run(stand_in_config: MakeConfig, **changes: Any) -> str:
    output = stand_in_config().output_path / "beside"
    return augment(stand_in_config(name="tiny", output=output, **changes)).release_digest


def test_a_full_disk_says_so_and_what_to_do(
    stages: list[str], stand_in_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHAUG_STAND_IN", "sample:full")
    with pytest.raises(
        SynthaugError, match=r"disk full while working on 'sample round 1' \(No space left on device: /.*"
    ):
        augment(stand_in_config())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed: No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, OutputError])
def test_a_full_disk_is_known_in_every_library_s_words(
    stages: list[str],
    stand_in_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
) -> None:
    def train(*_: Any) -> Any:
        try:
            raise error
        except Exception as cause:
            raise kind("could not save the state") from cause

    monkeypatch.setattr(sys.modules["synthaug.train"], "train", train)
    with pytest.raises(SynthaugError, match="disk full while working on 'train'") as caught:
        augment(stand_in_config())
    assert not isinstance(caught.value, UsageError)
    assert ("could not save the state" in str(caught.value)) == (kind is OutputError)


def test_nothing_to_do_is_an_error_with_the_reason(stages: list[str], stand_in_config: MakeConfig) -> None:
    with pytest.raises(PlanError, match="nothing to do: no class is below its target"):
        augment(stand_in_config(plan={"target_ratio": 0.1}))
    with pytest.raises(PlanError, match="every class below its target is refused"):
        augment(stand_in_config(plan={"target_ratio": 1.0, "min_real": 40}))
    assert "train" not in stages


def test_a_push_is_checked_first_made_once_and_told(
    stages: list[str], stand_in_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stand_in_config(release={"include_real": False, "push": {"repo_id": "owner/name"}})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match="HF_TOKEN"):
        augment(config)
    assert stages == []
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    pushed = []

    def push(release: Path, settings: Any, *, checkpoint: Path | None = None, **_: Any) -> str:
        assert (release / "release.bin").is_file()
        pushed.append(settings.repo_id)
        return "https://hub/owner/name/commit/1"

    monkeypatch.setattr("synthaug.formats.hub.push", push)
    first, second = augment(config), augment(config)
    assert pushed == ["owner/name"]
    assert first.pushed_to == second.pushed_to == "https://hub/owner/name/commit/1"
    for path in first.run.rglob("*"):
        assert not path.is_file() or b"secret-token" not in path.read_bytes()


# ---- the run folder


def test_an_output_that_is_a_file_is_refused_before_any_work(
    stages: list[str], stand_in_config: MakeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match=r"output .*file is a file. Name a directory"):
        augment(stand_in_config(output=file))
    with pytest.raises(OutputError, match="cannot be written"):
        augment(stand_in_config(output=file / "below"))
    assert stages == []
    assert file.read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a place that not even root can write")
def test_an_output_that_cannot_be_written_is_refused(stages: list[str], stand_in_config: MakeConfig) -> None:
    with pytest.raises(OutputError, match=r"output /proc/synthaug cannot be written"):
        augment(stand_in_config(output="/proc/synthaug"))
    assert stages == []


def test_an_output_among_the_images_is_refused(stages: list[str], stand_in_config: MakeConfig, tmp_path: Path) -> None:
    data = {"format": "imagefolder", "path": str(tmp_path), "cut": {}}
    with pytest.raises(OutputError, match="lies inside the dataset"):
        augment(stand_in_config(dataset=data, output=tmp_path / "run"))


def test_a_damaged_release_is_made_again_and_kept_aside(stages: list[str], stand_in_config: MakeConfig) -> None:
    config = stand_in_config()
    first = augment(config)
    (first.release / "release.bin").write_bytes(b"short")
    stages.clear()
    again = augment(config)
    assert stages == ["release"]
    assert again.release == first.release
    assert (again.release / "release.bin").stat().st_size == 1000
    (aside,) = first.release.parent.glob("*.damaged-*")
    assert (aside / "release.bin").read_bytes() == b"short"


def test_a_pattern_that_would_find_the_output_is_refused(
    stages: list[str], stand_in_config: MakeConfig, tmp_path: Path
) -> None:
    data = {"format": "parquet", "path": str(tmp_path / "**" / "*.parquet"), "cut": {}}
    with pytest.raises(OutputError, match="lies inside the dataset"):
        augment(stand_in_config(dataset=data, output=tmp_path / "run"))


def test_a_release_link_that_is_not_ours_is_left_alone(stages: list[str], stand_in_config: MakeConfig) -> None:
    config = stand_in_config()
    (config.output_path / "release").mkdir(parents=True)
    with pytest.raises(OutputError, match="is not a symbolic link"):
        augment(config)
    assert (config.output_path / "release").is_dir()


def test_what_a_killed_run_left_staged_is_swept(stages: list[str], stand_in_config: MakeConfig) -> None:
    config = stand_in_config()
    left = config.output_path / "releases" / ".staging-abc"
    left.mkdir(parents=True)
    augment(config)
    assert not left.exists()


def test_a_second_run_stops_at_once_and_names_the_first(stages: list[str], stand_in_config: MakeConfig) -> None:
    config = stand_in_config()
    with open_workspace(config.output_path), pytest.raises(BusyError, match=rf"process {os.getpid()} on host "):
        augment(config)
    assert stages == []
    augment(config)


def test_the_lock_of_a_killed_run_is_stale(stand_in_config: MakeConfig, repository: Path) -> None:
    config = stand_in_config()
    program = (
        "import sys, time; from pathlib import Path; from synthaug.workspace import open_workspace\n"
        "with open_workspace(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(config.output_path)], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} on host"), open_workspace(config.output_path):
            pass
        holder.kill()
        holder.wait()
    with open_workspace(config.output_path):
        pass


# ---- signals, in a process of its own


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["read", "train", "release"])
def test_ctrl_c_and_sigterm_end_cleanly(
    tiny_file: Callable[..., Path], command: Command, repository: Path, stage: str, sign: signal.Signals, code: int
) -> None:
    path = tiny_file(dataset={"format": "digits", "cut": {}}, plan={"target_ratio": 1.0})
    folder = path.parent / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stand_ins", "run", str(path)],
        cwd=repository,
        env={**os.environ, "SYNTHAUG_STAND_IN": f"{stage}:sleep"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process, process.stderr:
        lines = []
        while not (lines and lines[-1] == f"{stage} sleeps\n"):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        started = time.monotonic()
        process.send_signal(sign)
        rest = process.stderr.read()
        assert process.wait(timeout=20) == code
    assert time.monotonic() - started < 10
    assert len(rest.splitlines()) == 1
    assert f"Every stage that was complete is kept in {folder}; run again to go on." in rest
    assert list(folder.glob("releases/*")) == list(folder.glob("releases/.*")) == []
    assert not (folder / "run.holder.json").exists()
    finished = command("run", path, "--json")
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["release"]
