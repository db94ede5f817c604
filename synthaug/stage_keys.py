"""What a stage is known by: the parts of its key, the version of its code, and what people call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from synthaug.config import Config, TrainConfig
from synthaug.records import AuditReport, BalancePlan, Checkpoint, SampleBatch, Source, StageRecord

# Raise a stage's number when its code comes to a different result from the same inputs: what older code
# left behind is then made again instead of being reused.
CODE_VERSIONS = {
    "read": 2,
    "split": 2,
    "plan": 1,
    "train": 3,
    "judge": 2,
    "membership": 1,
    "sample": 1,
    "adopt": 1,
    "audit": 2,
    "evaluate": 3,
    "release": 7,
    "publish": 1,
}

# What people call the parts of a stage's key that are no record of another stage, in their order; with these
# `synthaug status --why` tells what has changed.
PART_NAMES: dict[str, tuple[str, ...]] = {
    "read": ("the source's fingerprint", "dataset", "image", "role"),
    "split": ("dataset (cut, exclude)", "split"),
    "plan": ("plan", "dataset.exclude"),
    "train": ("scarce classes", "train", "content of train.base", "seed"),
    "judge": ("audit (judge)", "evaluate.backbone", "train.threads", "seed"),
    "membership": ("train.threads", "train.device", "seed"),
    "sample": ("sample", "train.device", "seed", "request"),
    "adopt": ("what was set aside", "dataset.exclude"),
    "audit": ("audit", "train.threads", "seed"),
    "evaluate": ("evaluate", "content of evaluate.classifier and backbone", "evaluate.workers", "train.device", "seed"),
    "release": ("configuration", "what the card says of the source"),
    "publish": ("release.push", "what is pushed of the checkpoint", "HF_ENDPOINT"),
}

_RECORD_NAMES: dict[type[StageRecord], str] = {
    Source: "images",
    BalancePlan: "balance plan",
    AuditReport: "audit report",
}


@dataclass(frozen=True)
class Part:
    """A part of a key under a name of its own, where it may be a record or none."""

    name: str
    value: Any


def key_part(item: Any) -> Any:
    """What a key has of a part; of a batch of which a part is kept, also what lets `rebuild` find it."""
    if isinstance(item, SampleBatch) and item.labels is not None:
        return {"samples": item.drawn_digest, "labels": {str(label): now for label, now in item.labels.items()}}
    return item.digest if isinstance(item, StageRecord) else item


def names_of_parts(stage: str, made_from: Sequence[Any]) -> list[str]:
    """What people call each part of a key: records by what they are, settings by their section."""
    rest = iter(PART_NAMES[stage])
    batches, earlier = 0, 0
    newest = next((item for item in reversed(made_from) if isinstance(item, Checkpoint)), None)
    names = ["stage", "version of the code"]
    for item in made_from:
        if isinstance(item, Part):
            names.append(item.name)
        elif isinstance(item, SampleBatch):
            batches += 1
            names.append(f"samples of round {batches}")
        elif isinstance(item, Checkpoint) and item is not newest:
            earlier += 1
            names.append(f"earlier checkpoint {earlier}")
        elif isinstance(item, StageRecord):
            names.append(_RECORD_NAMES.get(type(item), type(item).__name__.lower()))
        else:
            names.append(next(rest, "another part"))
    return names


def train_settings(config: Config) -> dict[str, Any]:
    """Minutes have no say where a number of images is set, and draws of an image none in private training."""
    settings: dict[str, Any] = plain(config.train, without=without_a_say(config.train))
    if config.privacy.dp is not None:
        # Trained again, the same images would be told of twice.
        del settings["augment"]["from_repeats"]
    return settings


def sample_settings(config: Config) -> list[Any]:
    """What sampling depends on beside checkpoint and request, which says itself how many candidates may be drawn."""
    return [plain(config.sample, without={"oversample", "max_candidates"}), config.train.device, config.seed]


def without_a_say(settings: TrainConfig) -> set[str]:
    """Minutes where a number of images is set; and one process, not compiled, which is how checkpoints were made
    before."""
    said = {"minutes": settings.images is None, "processes": settings.processes > 1, "compile": bool(settings.compile)}
    return {name for name, has_a_say in said.items() if not has_a_say}


def plain(part: BaseModel, *, only: set[str] | None = None, without: set[str] | None = None) -> Any:
    return part.model_dump(mode="json", include=only, exclude=without)
