"""The Prefect flow: the same job, its own server, and no process left behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.test_pipeline import TITLES

MakeFile = Callable[..., Path]

# A server of its own takes 5 to 20 seconds to start.
pytestmark = pytest.mark.slow


@pytest.fixture
def job(tiny_file: MakeFile) -> Path:
    return tiny_file(dataset={"format": "digits", "cut": {}}, plan={"target_ratio": 1.0})


@contextmanager
def flow(repository: Path, home: Path, *arguments: object, stand_in: str = "") -> Iterator[subprocess.Popen[str]]:
    """The flow with stand-ins in a session of its own, like a terminal's foreground job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stand_ins", "flow", *map(str, arguments)],
        cwd=repository,
        env={**kept, "PREFECT_HOME": str(home), "SYNTHAUG_STAND_IN": stand_in},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            yield process
    finally:
        process.kill()


def servers(home: Path) -> list[str]:
    """Command lines of the servers that were started under this PREFECT_HOME."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if "server" in line or "uvicorn" in line]


def no_server_left(home: Path) -> bool:
    for _ in range(80):
        if not servers(home):
            return True
        time.sleep(0.1)
    return False


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    lines = []
    while not (lines and words in lines[-1]):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)


def query(home: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        return list(database.execute(statement))


def test_the_job_as_a_flow(repository: Path, prefect_home: Path, job: Path) -> None:
    with flow(repository, prefect_home, job, "--json") as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    summary = json.loads(stdout)
    assert list(summary["seconds"]) == TITLES
    assert Path(summary["release"]).is_dir()
    assert no_server_left(prefect_home)
    # In the run: a task for every stage by its name, our log lines, the plan as a table, the settings.
    tasks = [row[0] for row in query(prefect_home, "select name from task_run order by start_time")]
    assert tasks == TITLES
    logged = [row[0] for row in query(prefect_home, "select message from log where name like 'synthaug.%'")]
    assert any(str(line).startswith("train: done in") for line in logged)
    ((table,),) = query(prefect_home, "select data from artifact where key = 'plan'")
    assert "lynx" in str(table)
    ((parameters,),) = query(prefect_home, "select parameters from flow_run")
    assert json.loads(str(parameters))["config"]["name"] == "tiny"
    # Nothing large or pickled is kept.
    storage = prefect_home / "storage"
    assert sum(path.stat().st_size for path in storage.rglob("*")) < 10_000 if storage.exists() else True


@pytest.mark.parametrize(
    ("stand_in", "code", "words"),
    [
        ("train:fail", 1, "synthaug: train broke down"),
        ("train:full", 1, "disk full while working on 'train'"),
        ("train:oops", 1, "unexpected ZeroDivisionError"),
    ],
)
def test_a_failure(repository: Path, prefect_home: Path, job: Path, stand_in: str, code: int, words: str) -> None:
    with flow(repository, prefect_home, job, stand_in=stand_in) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert words in stderr
    # An error made for people is told in its words; a fault of the program keeps its traceback.
    assert ("Traceback" in stderr) == (stand_in == "train:oops")
    assert no_server_left(prefect_home)


def test_settings_are_refused_without_starting_a_server(repository: Path, prefect_home: Path, tmp_path: Path) -> None:
    with flow(repository, prefect_home, tmp_path / "none.yaml") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "does not exist" in stderr
    assert "server" not in stderr


@pytest.mark.parametrize(
    ("sign", "code", "whole_group"),
    [
        # What Ctrl-C in a terminal does: the signal goes to every process in the foreground.
        (signal.SIGINT, 130, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGKILL, -9, False),
    ],
)
@pytest.mark.parametrize("moment", ["train sleeps", "Starting temporary server"])
def test_no_server_is_left(
    repository: Path, prefect_home: Path, job: Path, sign: signal.Signals, code: int, whole_group: bool, moment: str
) -> None:
    with flow(repository, prefect_home, job, stand_in="train:sleep") as process:
        wait_for(process, moment)
        if moment == "train sleeps":
            assert servers(prefect_home)
        else:
            time.sleep(1.5)
        started = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, sign)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(timeout=30) == code
    assert time.monotonic() - started < 20
    assert "Traceback" not in rest
    assert no_server_left(prefect_home)
    assert not list((job.parent / "run").glob("releases/*"))


def test_the_form_of_the_parameters_can_be_drawn(repository: Path) -> None:
    program = (
        "import json\nfrom flows.augment import augment\n"
        "schema = augment.parameters.model_dump()\n"
        "print(json.dumps(schema))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True, timeout=60
    )
    definitions = json.loads(result.stdout)["definitions"]
    assert definitions["PlanConfig"]["properties"]["target_ratio"]["maximum"] == 1
    assert definitions["Config"]["properties"]["dataset"]["description"] == "The real images."
