"""The scripts of docs/loaders run as they are, each in a process of its own, on a real release."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.release_parts import make_parts
from tests.test_import import HEAVY, loaded_after

pytestmark = pytest.mark.slow

NEEDS = {
    "train_torch": None,
    "train_lightning": "lightning",
    "train_transformers": "transformers",
    "train_sklearn": None,
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    return make_parts(folder / "in").release(folder / "release").directory


def run(repository: Path, script: str, *arguments: object) -> str:
    if (needed := NEEDS[script]) is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'synthaug[{needed}]'")
    ended = subprocess.run(
        [sys.executable, f"docs/loaders/{script}.py", *map(str, arguments)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_script_is_run_here(repository: Path) -> None:
    assert {path.stem for path in (repository / "docs" / "loaders").glob("*.py")} == set(NEEDS)


def test_plain_pytorch(repository: Path, release: Path, tmp_path: Path) -> None:
    whole = run(repository, "train_torch", release, "--epochs", 6)
    assert "one: 12 real, 12 synthetic" in whole
    assert [int(n) for n in re.findall(r"epoch \d: (\d+) images", whole)] == [70, 70, 70, 50, 50, 50]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", whole)]
    assert losses[-1] < losses[0]
    # Broken off after three epochs and gone on with: the same to the last digit shown, with workers too.
    state = tmp_path / "state.pt"
    schedule = ["--schedule-epochs", 6, "--state", state]
    first = run(repository, "train_torch", release, "--epochs", 3, *schedule)
    second = run(repository, "train_torch", release, "--epochs", 6, "--workers", 1, *schedule)
    assert re.findall(r"epoch.*", first + second) == re.findall(r"epoch.*", whole)


def test_lightning(repository: Path, release: Path) -> None:
    found = run(repository, "train_lightning", release, "--epochs", 8)
    assert float(re.findall(r"accuracy ([\d.]+)", found)[0]) > 0.4


def test_transformers(repository: Path, release: Path) -> None:
    found = run(repository, "train_transformers", release, "--epochs", 8)
    assert float(re.findall(r"validation accuracy ([\d.]+)", found)[0]) > 0.4


def test_scikit_learn(repository: Path, release: Path) -> None:
    found = run(repository, "train_sklearn", release)
    assert "real images alone: 50 images" in found
    assert "as many synthetic as real: 70 images" in found
    assert re.search(r"^one +12 +12$", found, re.M)


def test_the_package_is_light_until_a_name_is_asked_for() -> None:
    assert loaded_after("import synthaug.loaders") & HEAVY == set()


def test_a_lightning_module_that_cannot_be_says_so_before_training(release: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'synthaug[lightning]'")
    program = f"""
from synthaug.errors import LoaderError
from synthaug.loaders.lightning import ReleaseDataModule
try:
    ReleaseDataModule({str(release)!r}, synthetic_ratio=-1)
except LoaderError as error:
    assert "synthetic_ratio is -1" in str(error)
else:
    raise SystemExit(1)
"""
    loaded_after(program)
