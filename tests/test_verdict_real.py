"""The verdict of real small jobs: as a stage of a run, as a command, of another tool's images, killed in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import REPOSITORY, tiny_values

pytestmark = pytest.mark.slow

# A classifier that is trained in milliseconds; the default network has tests of its own.
FAST = {"enabled": True, "classifier": "sklearn.naive_bayes:GaussianNB", "workers": 1}


def synthaug(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "synthaug", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder / "run", **{"evaluate": FAST, **changes})), encoding="utf-8")
    return path


def printed(*arguments: object) -> dict[str, Any]:
    result = synthaug(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = write_config(tmp_path_factory.mktemp("job"))
    return path, printed("run", path)


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tool's images of the class 3, as a folder of classes: noise, so that no test image is among them."""
    folder = tmp_path_factory.mktemp("offered") / "3"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(30):
        pixels = random.integers(0, 255, size=(8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder.parent


def test_a_run_ends_with_a_verdict_that_its_release_carries(job: tuple[Path, dict[str, Any]]) -> None:
    _, summary = job
    verdict = json.loads(Path(summary["verdict_file"]).read_text())
    assert verdict["outcome"] == summary["verdict"]
    # Samples of a generator that has hardly been trained are of no use to a classifier.
    assert verdict["outcome"] in ("no evidence", "harms")
    assert [item["dose"] for item in verdict["classes"]] == [0, 0]
    assert verdict["looks"] == 1
    assert {item["key"] for item in verdict["finalists"]} >= {"control: duplicates", "control: scrambled"}
    release = Path(summary["release"])
    assert json.loads((release / "verdict.json").read_text()) == verdict
    assert (release / "verdict_gain.png").read_bytes().startswith(b"\x89PNG")
    card = (release / "README.md").read_text()
    words = {"harms": "do harm", "no evidence": "no evidence"}[verdict["outcome"]]
    assert words in card.split("\n---\n")[1][:400].lower()
    assert synthaug("verify", release).returncode == 0
    (release / "verdict.json").write_text("{}")
    assert synthaug("verify", release).returncode == 1


def test_killed_in_the_trial_it_ends_at_the_same_release(job: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    done, undisturbed = job
    path = write_config(tmp_path)
    # All up to the trial is done, and no look was taken.
    shutil.copytree(done.parent / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "test_looks.json").unlink()
    for trace in ("stages/evaluate-*", "stages/release-*", "releases"):
        for folder in (tmp_path / "run").glob(trace):
            shutil.rmtree(folder)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-m", "synthaug", "run", str(path), "-q"], cwd=REPOSITORY)
        fits = tmp_path.glob("run/stages/evaluate-*/fits/*.npz")
        before = len(list(fits))
        while process.poll() is None and len(list(tmp_path.glob("run/stages/evaluate-*/fits/*.npz"))) < before + 4:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    again = printed("run", path)
    assert again["release_digest"] == undisturbed["release_digest"]
    assert json.loads(Path(again["verdict_file"]).read_text())["looks"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_run(job: tuple[Path, dict[str, Any]], tmp_path: Path, how: signal.Signals) -> None:
    path, _ = job
    values = yaml.safe_load(path.read_text())
    # The default network, two fits at a time.
    values["evaluate"] = {"enabled": True, "workers": 2, "steps": 400, "minutes": 60}
    slower = tmp_path / "slower.yaml"
    slower.write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "synthaug", "evaluate", str(slower), "-q", "--output", str(path.parent / "run")],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        while process.poll() is None and len(_session(process.pid)) < 3:
            time.sleep(0.1)
        time.sleep(3)
        assert len(_session(process.pid)) >= 3
        os.kill(process.pid, how)
        process.wait(timeout=60)
        deadline = time.monotonic() + 20
        while _session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert _session(process.pid) == []
        if how == signal.SIGINT:
            assert process.returncode in (130, -signal.SIGINT)
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()


def _session(leader: int) -> list[int]:
    """Processes of the session that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def test_another_tools_images_are_tried_and_audited(job: tuple[Path, dict[str, Any]], offered: Path) -> None:
    path, _ = job
    verdict = printed("evaluate", path, "--synthetic", offered)
    assert verdict["outcome"] in ("no evidence", "harms")
    assert [(item["name"], item["n_offered"], item["dose"]) for item in verdict["classes"]] == [("3", 30, 0)]
    # Another trial, another look at the same test split.
    assert verdict["looks"] == 2
    assert "judged" in verdict["verdict_file"]
    audit = printed("audit", path, "--synthetic", offered)
    (found,) = (item for item in audit["report"]["classes"] if item["n_candidates"])
    assert found["name"] == "3"
    assert found["n_missing"] == 0
    assert any("not known" in note for note in audit["report"]["notes"])


def test_images_of_the_test_split_are_refused(job: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = job
    digits = load_digits()
    folder = tmp_path / "theirs" / "8"
    folder.mkdir(parents=True)
    for number in np.flatnonzero(digits.target == 8):
        pixels = np.rint(digits.images[number] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for command in ("evaluate", "audit"):
        result = synthaug(command, path, "--synthetic", tmp_path / "theirs")
        assert result.returncode == 1
        assert "test" in result.stderr
        assert "Traceback" not in result.stderr
    missing = synthaug("evaluate", path, "--synthetic", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert "nowhere" in missing.stderr
