"""Fixtures that several test modules share. Small real images (8×8 scans), no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from synthaug.config import Config, parse_config
from tests import stand_ins

REPOSITORY = Path(__file__).resolve().parent.parent


# A worker takes a file at a time (`make slow`): these take longest, and one that is taken last leaves the others idle.
LONGEST = (
    "test_kills",
    "test_deployments",
    "test_shards",
    "test_verdict_real",
    "test_job",
    "test_processes",
    "test_flow",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real datasets for development, beside the repository or where SYNTHAUG_SHARED_DATA says."""
    path = Path(os.environ.get("SYNTHAUG_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"the development data are not at {path}; SYNTHAUG_SHARED_DATA can name another place")
    return path


# Training images of each digit; there are some 125 of them.
FEW = {str(digit): 12 if digit in (3, 8) else 39 for digit in range(10)}


def tiny_values(output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a whole job that takes seconds; `changes` are merged in, section by section."""
    values: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "dataset": {"format": "digits", "cut": FEW},
        "image": {"size": 8},
        "plan": {"target_ratio": 1.0},
        # One thread: tests run beside each other, and threads that wait for each other's cores are slow.
        # The narrowest network there is.
        "train": {"images": 512, "batch_size": 32, "threads": 1, "width": 16},
        "sample": {"steps": 4, "micro_batch": 8, "threads": 1},
        # So little training gives samples that cover nothing; here they are released all the same.
        "audit": {"classifier_steps": 30, "min_coverage": 0, "planted": 5},
        # A trial has tests of its own.
        "evaluate": {"enabled": False},
    }
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return values


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one finished real job. Nobody may change it: `shutil.copytree(..., symlinks=True)`."""
    from synthaug.pipeline import augment

    folder = tmp_path_factory.mktemp("finished") / "run"
    augment(parse_config(tiny_values(folder)))
    return folder


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Config]:
    """`tiny_config(train={"images": 64})` gives a `Config` whose output is in `tmp_path`."""

    def make(output: Path | None = None, **changes: Any) -> Config:
        return parse_config(tiny_values(output or tmp_path / "run", **changes))

    return make


@pytest.fixture
def tiny_file(tmp_path: Path) -> Callable[..., Path]:
    """The same as a YAML file."""

    def make(output: Path | None = None, **changes: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_values(output or tmp_path / "run", **changes)), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's database with nothing in it: making one is most of what a server's first start takes."""
    home = tmp_path_factory.mktemp("prefect-template")
    subprocess.run(
        [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"],
        env={**os.environ, "PREFECT_HOME": str(home)},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return home / "prefect.db"


@pytest.fixture
def prefect_home(tmp_path: Path, prefect_database: Path) -> Path:
    """A PREFECT_HOME of the test's own, in which no server has run."""
    home = tmp_path / "prefect"
    home.mkdir()
    shutil.copy(prefect_database, home)
    return home


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put stand-ins in place of the stages; the list names every call of one."""
    stand_ins.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    monkeypatch.setattr(stand_ins, "calls", [])
    return stand_ins.calls


@pytest.fixture
def command(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("run", path)` runs the command line in a process of its own; `stand_in` misbehaves as told."""

    def run(*arguments: Any, stand_in: str | None = None, real: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "synthaug" if real else "tests.stand_ins", *map(str, arguments)],
            cwd=repository,
            env={**os.environ, "SYNTHAUG_STAND_IN": stand_in or ""},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
