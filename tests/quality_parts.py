"""Small worlds of real images for the tests of judge, audit and contact sheet: the files that other stages write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from synthaug.config import Config, parse_config
from synthaug.records import (
    BalancePlan,
    Checkpoint,
    ClassPlan,
    PixelSpec,
    SampleBatch,
    Source,
    Splits,
)


@dataclass
class World:
    config: Config
    source: Source
    splits: Splits
    plan: BalancePlan
    checkpoint: Checkpoint
    images: np.ndarray  # [n, size, size, channels]
    table: pd.DataFrame  # splits.parquet
    root: Path

    def rows(self, split: str, label: int | None = None) -> np.ndarray:
        usable = self.table[(self.table["split"] == split) & self.table["held_back"].isna()]
        return usable.loc[usable["label"] == label if label is not None else slice(None), "row"].to_numpy()

    def batch(self, images: np.ndarray, labels: Sequence[int], starts: dict[int, int] | None = None) -> SampleBatch:
        return write_batch(self.root, images, labels, starts)


def digits_world(root: Path, *, scarce: Sequence[int] = (), keep: int = 10, **settings: Any) -> World:
    """The 8×8 digits of scikit-learn, some classes cut."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return make_world(root, images, digits.target, [str(i) for i in range(10)], scarce, keep, settings)


def make_world(
    root: Path,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scarce: Sequence[int],
    keep: int,
    settings: dict[str, Any],
    split: np.ndarray | None = None,
) -> World:
    """Write what read, split and train would; `settings` are parts of the configuration."""
    root.mkdir(parents=True, exist_ok=True)
    labels = np.asarray(labels).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    if split is None:
        split = np.full(len(images), "train", dtype=object)
        split[order[: len(images) // 5]] = "validation"
        split[order[len(images) // 5 : len(images) * 2 // 5]] = "test"
    held_back = np.full(len(images), None, dtype=object)
    for label in scarce:
        members = order[(labels[order] == label) & (split[order] == "train")]
        held_back[members[keep:]] = "cut"
    ids = [f"id{i:06d}" for i in range(len(images))]
    source = _source(root / "read", images, labels, ids, classes)
    table = pd.DataFrame(
        {"row": np.arange(len(images)), "image_id": ids, "label": labels, "split": split, "group_key": ids}
    ).assign(held_back=pd.Series(held_back, dtype="str"))
    directory = _new(root / "split")
    table.to_parquet(directory / "splits.parquet")
    usable = table[table["held_back"].isna()]
    counts = {
        name: [int(((usable["split"] == name) & (usable["label"] == k)).sum()) for k in range(len(classes))]
        for name in ("train", "validation", "test")
    }
    splits = Splits(directory=directory, digest="s", method="given", counts=counts, held_back={}, n_groups=len(ids))
    most = max(counts["train"])
    plan = BalancePlan(
        directory=_new(root / "plan"),
        digest="p",
        classes=tuple(
            ClassPlan(
                label=k, name=name, n_real=counts["train"][k], n_target=most if k in scarce else counts["train"][k]
            )
            for k, name in enumerate(classes)
        ),
    )
    trained = usable.loc[usable["split"] == "train", "image_id"]
    config = parse_config(
        {
            "name": "tests",
            "output": str(root / "out"),
            "dataset": {"format": "digits"},
            "image": {"size": images.shape[1]},
            **settings,
        }
    )
    checkpoint = write_checkpoint(root, list(trained))
    return World(config, source, splits, plan, checkpoint, images, table, root)


def write_checkpoint(root: Path, trained: Sequence[str], validated: Sequence[str] = ()) -> Checkpoint:
    directory = _new(root / f"train-{len(list(root.glob('train-*')))}")
    seen = pd.DataFrame(
        {"image_id": [*trained, *validated], "use": ["train"] * len(trained) + ["validation"] * len(validated)}
    )
    seen.to_parquet(directory / "seen.parquet")
    return Checkpoint(
        directory=directory, digest="c", generator="edm", parameters=1, images_budget=1, images_seen=1,
        budget_from="images", kept="base", heldout_loss_base={}, heldout_loss_tuned={}, scarce=[], stopped="budget",
        seconds=0.0, images_per_second=1.0, device="cpu",
    )  # fmt: skip


def write_batch(
    root: Path, images: np.ndarray, labels: Sequence[int], starts: dict[int, int] | None = None
) -> SampleBatch:
    """Images as a generator's samples; class_index counts up from `starts` (0) within each class."""
    number = len(list(root.glob("sample-*")))
    directory = _new(root / f"sample-{number}")
    np.save(directory / "images.npy", images)
    labels = np.asarray(labels, dtype=np.int64)
    table = pd.DataFrame({"row": np.arange(len(images)), "label": labels})
    first = table["label"].map(starts or {}).fillna(0).astype("int64")
    table["class_index"] = table.groupby("label").cumcount() + first
    table["sample_id"] = [f"s{k}-{i}" for k, i in zip(table["label"], table["class_index"], strict=True)]
    table = table.assign(seed=0, micro_batch=0, position=0)
    table.to_parquet(directory / "samples.parquet")
    counts = {int(k): int(v) for k, v in table["label"].value_counts().items()}
    return SampleBatch(
        environment=dict.fromkeys(("torch", "diffusers", "numpy", "cpu_capability"), "x"),
        directory=directory, digest=hashlib.sha256(images.tobytes()).hexdigest(), checkpoint_digest="c",
        n_samples=len(images), counts=counts, solver="none", steps=1, guidance=1.0, micro_batch=64, threads=1,
        device="cpu", seconds=0.0,
    )  # fmt: skip


def perturbed(images: np.ndarray, random: np.random.Generator, strength: float = 0.25) -> np.ndarray:
    """Pretend samples: each real image mixed with another of those given, moved a little, and noisy."""
    top = 65535 if images.dtype == np.uint16 else 255 if images.dtype == np.uint8 else 1.0
    others = images[random.permutation(len(images))].astype(np.float64)
    share = random.uniform(0.3, 0.5, (len(images), 1, 1, 1))
    mixed = images * (1 - share) + others * share
    mixed = np.stack([np.roll(image, random.integers(-1, 2, 2), (0, 1)) for image in mixed])
    mixed = np.clip(mixed + random.normal(0, strength * top * 0.2, mixed.shape), 0, top)
    return mixed.astype(images.dtype) if images.dtype == np.float32 else np.rint(mixed).astype(images.dtype)


def _source(root: Path, images: np.ndarray, labels: np.ndarray, ids: list[str], classes: Sequence[str]) -> Source:
    directory = _new(root)
    np.save(directory / "images.npy", images)
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    pd.DataFrame({"row": np.arange(len(images)), "image_id": ids, "label": labels, "content_hash": hashes}).assign(
        group=None, subgroup=None, given_split=None, origin="x", is_synthetic=False
    ).to_parquet(directory / "index.parquet")
    size, channels = images.shape[1], images.shape[3]
    high = {"uint8": 255.0, "uint16": 65535.0}.get(images.dtype.name, 1.0)
    pixels = PixelSpec(
        channels=channels, dtype=images.dtype.name, colour={1: "grey", 3: "rgb", 4: "rgba"}.get(channels, "channels"),
        low=0.0, high=high, size=size, fit="none", interpolation="none", smallest=(size, size), largest=(size, size),
    )  # fmt: skip
    return Source(
        directory=directory, digest="r", name="tests", fingerprint="f", classes=tuple(classes), pixels=pixels,
        n_images=len(images), n_set_aside=0, set_aside_reasons={}, n_duplicates=0, n_synthetic=0,
    )  # fmt: skip


def _new(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory
