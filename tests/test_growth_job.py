"""Twelve new images of one class, the real job: what is kept is kept byte for byte, and kill -9 changes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from synthaug.affected import affected
from synthaug.config import parse_config
from synthaug.pipeline import augment
from synthaug.remake import remake
from synthaug.status import status
from synthaug.verify import verify
from tests import kills
from tests.conftest import REPOSITORY, tiny_values

pytestmark = pytest.mark.slow

# Dies at the twelfth step of a warm training, and never again in the same folder.
_DYING = """
import os, signal, sys
from pathlib import Path
from synthaug.diffusion import training
died, loss = Path(sys.argv[2]), training.Trainer._loss
def dying(self, unet, phase, step):
    if step == 11 and not died.exists():
        died.write_text(phase.name)
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, unet, phase, step)
training.Trainer._loss = dying
from synthaug.cli import app
app(["run", sys.argv[1]])
"""
_N = {"1": 60, "3": 24, "8": 24}


def write_digits(folder: Path, **n_training: int) -> None:
    """Real scans, in folders of splits and classes; a larger number only adds."""
    import cv2
    from sklearn.datasets import load_digits

    data = load_digits()
    for name, n in n_training.items():
        images = np.rint(data.images[data.target == int(name)] * (255 / 16)).astype(np.uint8)
        parts = {"validation": images[:20], "test": images[20:40], "train": images[40 : 40 + n]}
        for split, chosen in parts.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(chosen):
                path = folder / split / name / f"{number:03d}.png"
                if not path.exists():
                    cv2.imwrite(str(path), image)


def values(images: Path, run: Path) -> dict[str, Any]:
    found = tiny_values(
        run,
        plan={"target_ratio": 0.9},
        train={"images": 1024, "fine_tune_share": 0.5},
        # On two dozen images the attack comes near its limit by chance; it has tests of its own.
        privacy={"max_membership_auc": None},
    )
    # Nobody cuts what is to grow.
    found["dataset"] = {"format": "imagefolder", "path": str(images)}
    return found


def manifest(release: Path) -> pd.DataFrame:
    return pd.read_parquet(release / "manifest.parquet").set_index("sample_id")


def test_twelve_new_images_of_one_class(tmp_path: Path) -> None:
    images, other = tmp_path / "images", tmp_path / "other" / "run"
    config = parse_config(values(images, tmp_path / "run"))
    write_digits(images, **_N)
    first = augment(config)
    before = manifest(first.release)
    (old,) = set(before["checkpoint_digest"])
    shutil.copytree(first.run, other, symlinks=True)
    write_digits(images, **{**_N, "8": _N["8"] + 12})

    # In the one folder nothing disturbs it.
    second = augment(config)
    after = manifest(second.release)
    assert any("class '8': 12 train images are new; trained for" in note for note in second.notes)
    of_class = after.groupby("class_name")["checkpoint_digest"].unique()
    assert list(of_class["3"]) == [old]
    assert len(of_class["8"]) == 1
    assert of_class["8"][0] != old
    kept = after.index.intersection(before.index)
    assert set(after.loc[kept, "class_name"]) == {"3"}
    assert len(kept) == (after["class_name"] == "3").sum() > 0
    assert (after.loc[kept, "pixel_hash"] == before.loc[kept, "pixel_hash"]).all()
    assert (after.loc[kept, "content_hash"] == before.loc[kept, "content_hash"]).all()
    result = verify(second.release)
    assert result.ok, result
    made = remake(second.release)
    assert made.ok
    assert made.n_identical == made.n_samples == len(after)
    assert len(made.checkpoints) == 2

    # Who withdraws a kept class's image has both releases and both checkpoints to think of.
    (source, *_) = (second.run / "stages").glob("train-*/seen.parquet")
    image = pd.read_parquet(source)["image_id"][0]
    found = affected([second.run], image=image).found
    assert sorted(item.kind for item in found) == ["checkpoint", "checkpoint", "release", "release"]

    # In the other it is killed inside of the warm training, and run again.
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values(images, other)), encoding="utf-8")
    command = [sys.executable, "-c", _DYING, str(path), str(tmp_path / "died")]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "died").read_text() == "fine-tuning"
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert kills.contents(other / "release") == kills.contents(second.release)
    assert kills.unfinished(other) == []

    told = status(second.run, config)
    assert told.why is not None
    assert {item.action for item in told.why} == {"reuse"}
    assert augment(config).release == second.release
