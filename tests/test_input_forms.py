"""The whole job, small, on the same real digits in every form that can be read, and in other kinds of pixels."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from synthaug.config import parse_config
from synthaug.pipeline import augment
from synthaug.verify import verify
from tests.conftest import REPOSITORY, tiny_values
from tests.loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow


def scans(n: int = 400, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Real scans, uint8 [n, 8, 8], and their labels."""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target < n_classes)[:n]
    return np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen]


def encode(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def hugging_face(n: int = 400) -> datasets.Dataset:
    images, labels = scans(n)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one", "two"])}
    )
    rows = {"image": [{"bytes": encode(image), "path": None} for image in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def image_folder(root: Path) -> dict[str, Any]:
    for number, (image, label) in enumerate(zip(*scans(), strict=True)):
        place = root / "data" / f"digit {label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(encode(image))
    return {"format": "imagefolder", "path": str(root / "data")}


def image_folder_with_metadata(root: Path) -> dict[str, Any]:
    (root / "data").mkdir()
    images, labels = scans()
    names = [f"{number}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (root / "data" / name).write_bytes(encode(image))
    table = {"file_name": names, "kind": [f"digit {label}" for label in labels]}
    table["writer"] = [f"w{number % 57}" for number in range(len(names))]
    pd.DataFrame(table).to_csv(root / "data" / "metadata.csv", index=False)
    columns = {"label": "kind", "group": "writer"}
    return {"format": "imagefolder", "path": str(root / "data"), "columns": columns}


def saved_to_disk(root: Path) -> dict[str, Any]:
    hugging_face().save_to_disk(root / "data")
    return {"format": "disk", "path": str(root / "data")}


def directory_for_load_dataset(root: Path) -> dict[str, Any]:
    (root / "data").mkdir()
    hugging_face(300).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return {"format": "huggingface", "path": str(root / "data")}


def parquet_files(root: Path) -> dict[str, Any]:
    hugging_face().to_parquet(root / "data.parquet")
    return {"format": "parquet", "path": str(root / "data.parquet")}


def medmnist(root: Path, images: np.ndarray | None = None) -> dict[str, Any]:
    grey, labels = scans()
    images = grey if images is None else images
    parts = {"train": slice(0, 280), "val": slice(280, 340), "test": slice(340, 400)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": labels[part, None] for name, part in parts.items()}
    np.savez(root / "data.npz", **arrays)
    return {"format": "medmnist", "path": str(root / "data.npz"), "class_names": ["a", "b", "c"]}


def sixteen_bit(root: Path) -> dict[str, Any]:
    return medmnist(root, scans()[0].astype(np.uint16) * 257 + 3)


def colour(root: Path) -> dict[str, Any]:
    grey = scans()[0]
    return medmnist(root, np.stack([grey, grey // 2, 255 - grey], -1))


def five_channels(root: Path) -> dict[str, Any]:
    grey = scans()[0]
    return medmnist(root, np.stack([np.roll(grey, shift, 2) for shift in range(5)], -1))


def floating_point(root: Path) -> dict[str, Any]:
    return medmnist(root, scans()[0].astype(np.float32) / 100 - 1)


FORMS: list[Callable[[Path], dict[str, Any]]] = [
    image_folder,
    image_folder_with_metadata,
    saved_to_disk,
    directory_for_load_dataset,
    parquet_files,
    medmnist,
    sixteen_bit,
    colour,
    five_channels,
    floating_point,
]


def job(root: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    values = tiny_values(root / "run", plan={"target_ratio": 1.0}, train={"images": 256})
    return {**values, "dataset": dataset}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_whole_job_on_every_form(form: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    dataset = form(tmp_path)
    values = job(tmp_path, dataset)
    # The first class is made scarce, whatever it is called here.
    first = {"imagefolder": "digit 0", "medmnist": "a"}.get(dataset["format"], "zero")
    values["dataset"] = {**dataset, "cut": {first: 12}}
    values["plan"] = {"counts": {first: 30}, "include": [first]}
    summary = augment(parse_config(values))
    assert not verify(summary.release).problems
    train = datasets.load_dataset(str(summary.release), split="train", cache_dir=str(tmp_path / "cache"))
    made = train.filter(lambda row: row["is_synthetic"])
    assert len(made) == summary.counts[first]["synthetic"] > 0
    assert {train.features["label"].names[label] for label in made["label"]} == {first}
    real = train.filter(lambda row: not row["is_synthetic"])
    one, other = (np.asarray(rows[0]["image"]) for rows in (real, made))
    assert one.shape == other.shape
    assert one.dtype == other.dtype


def test_the_whole_job_on_a_dataset_of_the_hub(tmp_path: Path) -> None:
    hugging_face().to_parquet(tmp_path / "data.parquet")
    values = job(tmp_path, {"format": "hub", "path": "owner/name", "revision": "main", "cut": {"one": 12}})
    values["plan"] = {"counts": {"one": 30}, "include": ["one"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with LoopbackHub() as hub:
        hub.add_dataset("owner/name", {"data/train-00000-of-00001.parquet": (tmp_path / "data.parquet").read_bytes()})
        result = subprocess.run(
            [sys.executable, "-m", "synthaug", "run", str(tmp_path / "job.yaml"), "--json"],
            cwd=REPOSITORY,
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["counts"]["one"]["real"] == 12
    assert summary["counts"]["one"]["synthetic"] > 0


def test_real_breast_ultrasound(shared_data: Path, tmp_path: Path) -> None:
    dataset = {"format": "medmnist", "path": str(shared_data / "breastmnist.npz")}
    values = job(tmp_path, {**dataset, "class_names": ["malignant", "other"]})
    values |= {"image": {"size": 28}, "plan": {"counts": {"malignant": 160}, "include": ["malignant"]}}
    summary = augment(parse_config(values))
    counts = summary.counts["malignant"]
    assert counts["synthetic"] + counts["short"] == 160 - counts["real"]
    assert not verify(summary.release).problems
