"""The command line: what it prints where, exit codes, and errors that stay one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from synthaug import __version__
from synthaug.errors import CheckpointError
from synthaug.terminal import session
from tests import stand_ins

Command = Callable[..., subprocess.CompletedProcess[str]]
MakeFile = Callable[..., Path]


@pytest.fixture
def job(tiny_file: MakeFile) -> Path:
    return tiny_file(dataset={"format": "digits", "cut": {}}, plan={"target_ratio": 1.0})


def test_help_answers_at_once(command: Command) -> None:
    # The bound is 0.5 s; a machine that other tests keep busy gets three tries and some slack.
    times = []
    for _ in range(3):
        started = time.monotonic()
        result = command("--help", real=True)
        times.append(time.monotonic() - started)
        assert result.returncode == 0
        assert "plan" in result.stdout
        assert "verify" in result.stdout
    assert min(times) < 1.0


def test_version(command: Command) -> None:
    assert command("--version", real=True).stdout == f"synthaug {__version__}\n"


def test_plan_prints_a_table_and_leaves_the_terminal_alone(command: Command, job: Path) -> None:
    result = command("plan", job)
    assert result.returncode == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    # The class is called "lynx\n[red]": neither a new line nor markup.
    assert rows == [
        ["cat", "40", "40", "0", ""],
        ["dog", "30", "40", "10", ""],
        ["lynx\\n[red]", "10", "40", "30", ""],
    ]
    assert "set aside: truncated 1" in result.stdout
    assert "read: done in" in result.stderr


def test_plan_as_json(command: Command, job: Path) -> None:
    result = command("plan", job, "--json", "-q")
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert values["classes"][2] == {
        "name": stand_ins.CLASSES[2],
        "real": 10,
        "target": 40,
        "synthetic": 30,
        "refused": None,
        "note": None,
    }
    assert values["problem"] is None


def test_a_plan_that_raises_nothing_is_shown_and_refused(command: Command, tiny_file: MakeFile) -> None:
    path = tiny_file(dataset={"format": "digits", "cut": {}}, plan={"target_ratio": 0.1})
    for name in ("plan", "run"):
        result = command(name, path)
        assert result.returncode == 2
        assert "nothing to do: no class is below its target" in result.stderr
    assert "lynx" in command("plan", path).stdout
    result = command("plan", path, "--json", "-q")
    assert result.returncode == 2
    assert json.loads(result.stdout)["problem"].startswith("nothing to do")


def test_run_as_json_prints_one_object(command: Command, job: Path, tmp_path: Path) -> None:
    result = command("run", job, "--json", "--output", tmp_path / "elsewhere")
    assert result.returncode == 0
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert values["run"] == str(tmp_path / "elsewhere")
    assert Path(values["release"]).is_dir()
    assert Path(values["contact_sheet"]).is_file()
    assert values["counts"]["dog"] == {"real": 30, "synthetic": 10, "short": 0}
    assert values["verdict"] is None
    assert values["verdict_sentence"] == "not evaluated"
    assert set(values["seconds"]) >= {"read", "train", "sample round 1", "release"}
    assert values["reused"] == []
    assert "train: done in" in result.stderr
    again = json.loads(command("run", job, "--json", "--output", tmp_path / "elsewhere").stdout)
    assert set(again["reused"]) == set(values["seconds"])
    assert again["release"] == values["release"]


def test_run_prints_tables_and_where_things_are(command: Command, job: Path) -> None:
    result = command("run", job, "-q")
    assert result.returncode == 0
    assert result.stderr == ""
    assert f"release: {job.parent / 'run' / 'releases'}" in result.stdout
    assert f"contact sheet: {job.parent / 'run' / 'contact_sheet.png'}" in result.stdout
    assert "verdict: not evaluated" in result.stdout
    assert "sample round 2" in result.stdout


def test_verbosity(command: Command, job: Path) -> None:
    assert command("plan", job, "-q").stderr == ""
    assert "reused" in command("plan", job).stderr


@pytest.mark.parametrize(
    ("stand_in", "code", "words"),
    [
        ("train:fail", 1, "synthaug: train broke down"),
        ("train:full", 1, "disk full while working on 'train'"),
        ("train:oops", 1, "unexpected ZeroDivisionError: in stage train. The traceback is in"),
    ],
)
def test_exit_codes_and_one_line_of_error(command: Command, job: Path, stand_in: str, code: int, words: str) -> None:
    result = command("run", job, "-q", stand_in=stand_in)
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert result.stdout == ""


def test_an_error_is_an_object_too(command: Command, job: Path) -> None:
    result = command("run", job, "--json", "-q", stand_in="train:fail")
    assert json.loads(result.stdout) == {"error": "train broke down", "kind": "TrainingError"}


def test_the_traceback_is_kept_or_shown(command: Command, job: Path) -> None:
    command("run", job, stand_in="train:oops")
    log = (job.parent / "run" / "error.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError" in log
    result = command("run", job, "--debug", stand_in="train:oops")
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_makes_an_error_of_is_still_one(
    sign: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        try:
            signal.raise_signal(sign)
        except BaseException as error:
            raise CheckpointError("the checkpoint cannot be loaded") from error

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended, session(logs=False):
            load()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert "run again to go on" in line


def test_settings_that_are_refused(command: Command, tmp_path: Path) -> None:
    missing = command("run", tmp_path / "none.yaml")
    assert missing.returncode == 2
    assert (
        missing.stderr
        == f"synthaug: configuration {tmp_path / 'none.yaml'} does not exist. Give the path of a YAML file.\n"
    )
    path = tmp_path / "typo.yaml"
    path.write_text("name: x\noutput: x\ndataset: {format: digits}\nimage: {size: 8}\ntrian: {minutes: 1}\n")
    typo = command("run", path)
    assert typo.returncode == 2
    assert "trian: no such setting; did you mean 'train'?" in typo.stderr
    assert command("run", path, "--no-such-option").returncode == 2
    assert command("run").returncode == 2
    assert command("no-such-command").returncode == 2


def test_an_output_in_use(command: Command, job: Path) -> None:
    from synthaug.workspace import open_workspace

    with open_workspace(job.parent / "run"):
        result = command("run", job)
    assert result.returncode == 1
    assert "is in use by another run: process" in result.stderr


def test_output_override_is_checked(command: Command, job: Path) -> None:
    result = command("run", job, "--output", " ")
    assert result.returncode == 2
    assert "output: output must name a directory" in result.stderr


def test_a_reader_that_goes_away_is_no_crash(job: Path, repository: Path) -> None:
    result = subprocess.run(
        f"{sys.executable} -m tests.stand_ins plan {job} | head -c 1",
        shell=True,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_verify_of_no_release(command: Command, tmp_path: Path) -> None:
    result = command("verify", tmp_path, real=True)
    assert result.returncode in (1, 2)
    assert result.stderr.startswith("synthaug: ")
    assert "Traceback" not in result.stderr
