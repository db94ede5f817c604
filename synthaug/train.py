"""Train: real training images in, a checkpoint out."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from synthaug.config import Config, TrainConfig
from synthaug.digest import digest_directory
from synthaug.errors import ConfigError, LeakError, TrainingError
from synthaug.formats.atomic import whole_directory
from synthaug.records import (
    IMAGES_FILE,
    PIPELINE_DIR,
    SEEN_FILE,
    SPLITS_FILE,
    TRAINING_LOG_FILE,
    WORK_DIR,
    BalancePlan,
    Checkpoint,
    Source,
    Splits,
)

if TYPE_CHECKING:
    from synthaug.generators.interface import FitReport, Generator, TrainingData

logger = logging.getLogger(__name__)


def train(config: Config, source: Source, splits: Splits, plan: BalancePlan, directory: Path) -> Checkpoint:
    """Fit the generator of the configuration to the usable training images and keep it as a pipeline folder.

    Validation images stop the training and choose the checkpoint; test images are not read. An interrupted
    call goes on from `directory`/work, which stays until the stage is recorded as done.

    Raises:
        TrainingError: Training broke down before anything was worth keeping.
        CheckpointError: The base model given does not fit.
        LeakError: A test image would be read.
    """
    from synthaug.generators import generator_class
    from synthaug.generators.interface import TrainingData

    kind = generator_class(config.train.generator)
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    usable = table[table["held_back"].isna()]
    training, heldout = usable[usable["split"] == "train"], usable[usable["split"] == "validation"]
    seen = pd.concat(
        [training[["image_id"]].assign(use="train"), heldout[["image_id"]].assign(use="validation")]
    ).reset_index(drop=True)
    _refuse_test_images(seen, usable)
    scarce = plan.scarce
    data = TrainingData(
        images=np.load(source.directory / IMAGES_FILE, mmap_mode="r"),
        pixels=source.pixels,
        classes=source.classes,
        rows=training["row"].to_numpy(np.int64),
        labels=training["label"].to_numpy(np.int64),
        heldout_rows=heldout["row"].to_numpy(np.int64),
        heldout_labels=heldout["label"].to_numpy(np.int64),
        scarce=tuple(scarce),
    )
    if not len(data.rows):
        raise TrainingError("no usable training image is left, so there is nothing to train on.")
    dp = config.privacy.dp
    if dp is not None and not kind.trains_privately:
        raise ConfigError(f"privacy.dp: generator '{kind.name}' knows no differential privacy. Leave it out.")
    if dp is not None and source.pixels.dtype == "float32" and config.image.value_range is None:
        raise ConfigError(
            "privacy.dp needs image.value_range for floating-point images: a range measured on the images is not "
            "covered by epsilon."
        )
    work = directory / WORK_DIR
    work.mkdir(exist_ok=True)
    save, report = _fit(kind, data, config, work)
    if (directory / PIPELINE_DIR).exists():
        shutil.rmtree(directory / PIPELINE_DIR)
    with whole_directory(directory / PIPELINE_DIR) as folder:
        save(folder)
    seen.to_parquet(directory / SEEN_FILE, index=False)
    pd.DataFrame(report.log).to_csv(directory / TRAINING_LOG_FILE, index=False)
    figures = {name: value for name, value in asdict(report).items() if name != "log"}
    logger.info(
        "trained on %d images at %.0f/s; kept the %s model", report.images_seen, report.images_per_second, report.kept
    )
    return Checkpoint(
        directory=directory,
        digest=digest_directory(directory / PIPELINE_DIR),
        generator=kind.name,
        scarce=[source.classes[label] for label in scarce],
        **figures,
    )


def _fit(
    kind: type[Generator], data: TrainingData, config: Config, work: Path
) -> tuple[Callable[[Path], object], FitReport]:
    """What writes the trained generator into a folder, and the report."""
    if config.train.processes > 1:
        from synthaug.generators.processes import fit_in_processes

        saved, report = fit_in_processes(kind, data, config.train, seed=config.seed, workdir=work)
        return partial(shutil.copytree, saved, dirs_exist_ok=True), report
    dp = config.privacy.dp
    generator, report = kind.fit(
        data, config.train, seed=config.seed, workdir=work, **({} if dp is None else {"dp": dp})
    )
    return generator.save, report


def base_identity(settings: TrainConfig) -> str | None:
    """Return what tells a base from another at the same place: the digest of a folder, the commit of a hub id.

    Raises:
        ConfigError: A hub id without a commit, which could be another base tomorrow.
    """
    if settings.base is None:
        return None
    if Path(settings.base).is_dir():
        return digest_directory(Path(settings.base))
    if re.fullmatch(r"[0-9a-f]{40}", settings.base_revision or "") is None:
        raise ConfigError(
            f"train.base {settings.base!r} is no folder here, so it is taken for the id of a hub, and its "
            f"train.base_revision is {settings.base_revision!r}. Correct the path, or name a commit (40 hex digits)."
        )
    return settings.base_revision


def _refuse_test_images(seen: pd.DataFrame, usable: pd.DataFrame) -> None:
    test = set(usable.loc[usable["split"] == "test", "image_id"])
    shared = sorted(test & set(seen["image_id"]))
    if shared:
        raise LeakError(
            f"{len(shared)} test images are also among the training or validation images ({shared[0]}, …): the split "
            "is broken. Remove stages/split-* of the run folder, and the ledger they name, and run again."
        )
