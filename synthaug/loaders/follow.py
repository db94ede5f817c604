"""What a release's verdict says a training should do, as settings of a mix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthaug.errors import LoaderError, VerificationError
from synthaug.formats.manifest import read_release_file
from synthaug.loaders.mixing import Sampling, Schedule, constant, mix_then_real
from synthaug.loaders.rows import Rows
from synthaug.records import VERDICT_FILE, Verdict
from synthaug.text import printable

_LOSSES = ("oversampling", "class weights", "balanced softmax")


@dataclass(frozen=True)
class Followed:
    """Settings of a mix, and what of the recipe a loader cannot do by itself."""

    verdict: Verdict
    recipe: str
    doses: np.ndarray  # int64 [n_classes]
    sampling: Sampling
    class_weights: bool
    synthetic_weight: float
    schedule: Schedule
    left_to_you: tuple[str, ...]


def follow(rows: Rows, epochs: int | None) -> Followed:
    """Dose and recipe from the verdict of a release.

    Where the outcome is `helps`: the dose of each class, the loss' sampling or class weights, the weight of synthetic
    images and pre-training on the mix are those of the recipe. Any other outcome: no synthetic images, and of the best
    real-only arm what concerns sampling and class weights.

    Args:
        epochs: How many epochs the training has; pre-training on the mix takes the first half.

    Raises:
        LoaderError: The release has no verdict, its verdict does not speak of a class that has synthetic images, or
            the recipe needs `epochs`.
        VerificationError: The verdict cannot be read.
    """
    verdict = read_verdict(rows)
    if verdict.class_names and tuple(verdict.class_names) != rows.classes:
        raise LoaderError(f"the verdict of {rows.name} speaks of other classes than the release has. Make it again.")
    doses = np.zeros(len(rows.classes), dtype=np.int64)
    judged = {item.name: item for item in verdict.classes}
    if not verdict.helps:
        loss = _loss_of(verdict.best_real)
        recipe, settings = verdict.best_real or "the real images alone", {"loss": loss}
        left = [f"the rest of the best real-only arm: {recipe}"] if loss != recipe and verdict.best_real else []
    else:
        for label in np.unique(rows.labels[rows.synthetic]).tolist():
            name = rows.classes[label]
            if name not in judged:
                raise LoaderError(
                    f"class '{printable(name)}' has synthetic images, but the verdict of {rows.name} does not speak of "
                    f"it. Say the dose yourself: synthetic_ratio={{{name!r}: 1.0}} without follow_verdict."
                )
            doses[label] = judged[name].dose
        recipe, settings = verdict.recipe or "", verdict.recipe_settings
        left = _left(settings)
    loss = settings.get("loss", "plain")
    if loss == "balanced softmax":
        left.insert(0, "balanced softmax: add loader.log_prior() to the logits in the training loss")
    schedule: Schedule = constant()
    if settings.get("pretrain"):
        if epochs is None or epochs < 2:
            raise LoaderError(
                f"the verdict's recipe '{printable(recipe)}' trains on the mix for the first half, then on real images "
                "alone: say how many epochs there are (at least 2) with epochs=."
            )
        schedule = mix_then_real(epochs // 2)
    return Followed(
        verdict=verdict,
        recipe=recipe,
        doses=doses,
        sampling="balanced" if loss == "oversampling" else "natural",
        class_weights=loss == "class weights",
        synthetic_weight=float(settings.get("added_weight", 1.0)),
        schedule=schedule,
        left_to_you=tuple(left),
    )


def read_verdict(rows: Rows) -> Verdict:
    """The verdict that a release carries.

    Raises:
        LoaderError: It carries none.
        VerificationError: It cannot be read.
    """
    if rows.root is None:
        raise LoaderError(
            "follow_verdict needs the release as a directory, where verdict.json lies; a loaded dataset has none. "
            "Download the release (huggingface_hub.snapshot_download) and give its path."
        )
    path = rows.root / VERDICT_FILE
    # One that lies there and is not listed is of another release.
    if VERDICT_FILE not in read_release_file(rows.root)["files"] or not path.is_file():
        raise LoaderError(
            f"{rows.name} carries no verdict (evaluate.enabled was false). Make it with 'synthaug evaluate' and "
            "release again, or say the ratio yourself with synthetic_ratio=."
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Written without its directory, and by some without its digest.
        verdict: Verdict = Verdict.model_validate({"digest": "", **values, "directory": rows.root})
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path} cannot be read: {printable(str(error), width=200)}.") from None
    return verdict


def _loss_of(key: str | None) -> str:
    last = (key or "").split(" + ")[-1]
    return last if last in _LOSSES else "plain"


def _left(settings: dict[str, Any]) -> list[str]:
    left = []
    if settings.get("strong"):
        left.append("stronger classical augmentation: in transform=")
    if settings.get("mix", "none") != "none":
        left.append(f"{settings['mix']} of each batch: in the training step")
    if "weight_decay" in settings:
        left.append(f"AdamW with a weight decay of {settings['weight_decay']:g}")
    return left
