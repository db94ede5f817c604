"""A dataset that grows, for the stand-ins: who is in which split is written in a file, and nothing is drawn.

`install` puts stages that read it in place of the plain stand-ins. They keep the promises that growth rests on: an
image keeps its id, a checkpoint says what it has seen, the ledger keeps a split.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.records import (
    PIPELINE_DIR,
    SEEN_FILE,
    SPLITS_FILE,
    BalancePlan,
    Checkpoint,
    PixelSpec,
    SampleBatch,
    SampleRequest,
    Source,
    Splits,
)
from tests import stand_ins

_VARIABLE = "SYNTHAUG_STAND_IN_IMAGES"
# Set: no warm training comes to better weights than those it began with.
KEEPS_BASE = "SYNTHAUG_STAND_IN_KEEPS_BASE"
Images = dict[str, dict[str, list[str]]]  # class to split to image ids

# What every training was given: the classes it was for, whether it started from a checkpoint, and its budget.
trainings: list[dict[str, Any]] = []
# Of every round that was drawn: the checkpoint, and class to the first index and the number.
draws: list[tuple[str, dict[str, tuple[int, int]]]] = []


def some_images(**n_training: int) -> Images:
    """So many training images of each class, and five held out on either side."""
    return {
        name: {
            "train": [f"{name}-{number}" for number in range(n)],
            "validation": [f"{name}-v{number}" for number in range(5)],
            "test": [f"{name}-t{number}" for number in range(5)],
        }
        for name, n in n_training.items()
    }


def write_images(path: Path, images: Images) -> None:
    """Make a dataset the one that is read from now on."""
    path.write_text(json.dumps(images), encoding="utf-8")
    os.environ[_VARIABLE] = str(path)


def _images() -> Images:
    found: Images = json.loads(Path(os.environ[_VARIABLE]).read_text(encoding="utf-8"))
    return found


def read(config: Config, directory: Path, *, foreign: bool = False) -> Source:
    stand_ins._begin("read", directory)
    images = _images()
    pixels = PixelSpec(
        channels=1, dtype="uint8", colour="grey", low=0, high=255, size=config.image.size, fit="none",
        interpolation="none", smallest=(8, 8), largest=(8, 8),
    )  # fmt: skip
    return Source(
        directory=directory, digest=digest_json(["read", images, config.image.size]), name="growing",
        fingerprint=digest_json(images), classes=tuple(sorted(images)), pixels=pixels, n_images=1, n_set_aside=0,
        set_aside_reasons={}, n_duplicates=0, n_synthetic=0,
    )  # fmt: skip


def split(config: Config, source: Source, directory: Path) -> Splits:
    stand_ins._begin("split", directory)
    images = _images()
    rows = [
        {"image_id": name, "label": label, "split": use, "held_back": None}
        for label, of in enumerate(source.classes)
        for use, names in images[of].items()
        for name in names
    ]
    table = pd.DataFrame(rows).assign(held_back=pd.Series([None] * len(rows), dtype="str"))
    table.to_parquet(directory / SPLITS_FILE, index=False)
    counts = {use: [len(images[name][use]) for name in source.classes] for use in ("train", "validation", "test")}
    return Splits(
        directory=directory, digest=digest_json(["split", rows]), method="by group", counts=counts, held_back={},
        n_groups=len(rows),
    )  # fmt: skip


def train(config: Config, source: Source, splits: Splits, plan: BalancePlan, directory: Path) -> Checkpoint:
    scarce = [source.classes[label] for label in plan.scarce]
    settings = config.train
    if settings.base is not None:
        assert (Path(settings.base) / "weights").is_file()
    trainings.append({"scarce": scarce, "warm": settings.base is not None, "images": settings.images})
    stand_ins._begin("train", directory)
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    seen = table[table["split"] != "test"].rename(columns={"split": "use"})[["image_id", "use"]]
    seen.to_parquet(directory / SEEN_FILE, index=False)
    base = None if settings.base is None else (Path(settings.base) / "weights").read_text(encoding="utf-8")
    weights = digest_json(["train", splits.digest, settings.images, scarce, base])
    if base is not None and os.environ.get(KEEPS_BASE):
        weights = base
    (directory / PIPELINE_DIR).mkdir(exist_ok=True)
    (directory / PIPELINE_DIR / "weights").write_text(weights, encoding="utf-8")
    return Checkpoint(
        directory=directory, digest=weights, generator="edm", parameters=1, images_budget=1, images_seen=1,
        budget_from="images", kept="base", heldout_loss_base={}, heldout_loss_tuned={}, scarce=scarce, stopped="budget",
        seconds=0.0, images_per_second=1.0, device="cpu",
    )  # fmt: skip


def sample(
    config: Config, source: Source, checkpoint: Checkpoint, request: SampleRequest, directory: Path, **_: Any
) -> SampleBatch:
    assert (checkpoint.directory / PIPELINE_DIR / "weights").is_file()
    draws.append((checkpoint.digest, {source.classes[label]: drawn for label, drawn in request.ranges.items()}))
    return stand_ins.sample(config, source, checkpoint, request, directory)


def install(replace: Callable[[str, ModuleType], Any]) -> None:
    """Put these stages in place of the plain stand-ins, which have to be there."""
    for function in (read, split, train, sample):
        module = ModuleType(f"synthaug.{function.__name__}")
        setattr(module, function.__name__, function)
        replace(module.__name__, module)
    sys.modules["synthaug.read"].source_fingerprint = lambda config: digest_json(_images())  # type: ignore[attr-defined]
    sys.modules["synthaug.train"].base_identity = lambda settings: None  # type: ignore[attr-defined]
    trainings.clear()
    draws.clear()
