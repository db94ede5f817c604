"""The wheel, installed alone: the same commands, and no top-level module but `synthaug`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from synthaug import __version__
from tests.conftest import REPOSITORY, tiny_values

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("synthaug", "flows"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies, and without the repository."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    # The dependencies as they are installed here. Links to the repository in that folder (.pth) are not followed.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def call(*command: object, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTHON"))}
    environment["PREFECT_HOME"] = str(cwd / "prefect")
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"synthaug", f"synthaug-{__version__}.dist-info"}
    sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "synthaug").rglob("*.py")}
    sources |= {f"synthaug/{path.relative_to(REPOSITORY).as_posix()}" for path in (REPOSITORY / "flows").rglob("*.py")}
    assert sources <= names
    assert {f"synthaug/report/page.{kind}" for kind in ("html.j2", "css", "js")} <= names
    assert f"synthaug-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_commands_work(python: Path, tmp_path: Path) -> None:
    command = python.parent / "synthaug"
    assert call(command, "--version", cwd=tmp_path).stdout == f"synthaug {__version__}\n"
    where = call(python, "-c", "import synthaug; print(synthaug.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(python.parent.parent))
    assert "No module named 'flows'" in call(python, "-c", "import flows", cwd=tmp_path).stderr
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tmp_path / "run")), encoding="utf-8")
    plan = call(command, "plan", path, "--json", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["problem"] is None
    flow = call(python, "-m", "synthaug.flows.augment", path, "--json", cwd=tmp_path)
    assert flow.returncode == 0, flow.stderr
    summary = json.loads(flow.stdout)
    assert summary["reused"] == ["read", "split", "plan"]
    again = call(command, "run", path, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    # The flow and the command line do the same job.
    assert set(json.loads(again.stdout)["reused"]) == set(summary["seconds"])
    verified = call(command, "verify", summary["release"], cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert call(python, "-m", "synthaug", "run", "none.yaml", cwd=tmp_path).returncode == 2


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {Requirement(line).name.lower().replace("_", "-"): line for line in lines if line and line[0] != "#"}
    assert all("==" in line for line in pins.values())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        wanted = Requirement(text)
        pin = Requirement(pins[wanted.name.lower().replace("_", "-")])
        (version,) = (item.version for item in pin.specifier)
        assert wanted.specifier.contains(version), f"{text} against {pin}"
    assert pins["torch"] == "torch==2.13.0"
    assert pins["prefect"] == "prefect==3.8.8"
