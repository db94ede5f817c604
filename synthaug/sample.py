"""Sample: a checkpoint and a request in, images out, each from its own seed."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_file, digest_json
from synthaug.formats.atomic import write_text
from synthaug.formats.reserved_array import reserved_array
from synthaug.generators.canonical import draw_micro_batch, environment, micro_batch_indices, sample_id, sample_seed
from synthaug.progress import progress
from synthaug.records import (
    IMAGES_FILE,
    PIPELINE_DIR,
    SAMPLES_FILE,
    WORK_DIR,
    Checkpoint,
    SampleBatch,
    SampleRequest,
    Source,
)

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
# A piece is counted when its pixels are on the disk; flushing must stay cheap beside drawing.
SECONDS_BETWEEN_PIECES = 5.0
PIECES = 20


def sample(
    config: Config, source: Source, checkpoint: Checkpoint, request: SampleRequest, directory: Path
) -> SampleBatch:
    """Draw what is requested, in canonical micro-batches.

    See `synthaug.generators.canonical` for what makes a sample a property of its place. An interrupted call goes on
    after the last piece that `directory`/work counts, if versions and device are still those it was drawn with.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
    """
    import torch

    from synthaug.generators import generator_class, resolve_device

    settings = config.sample
    torch.set_num_threads(settings.threads)
    device = resolve_device(config.train.device)
    kind = generator_class(checkpoint.generator)
    generator = kind.load(checkpoint.directory / PIPELINE_DIR, device=device)
    batches = _micro_batches(request, settings.micro_batch)
    spec = source.pixels
    shape = (len(batches) * settings.micro_batch, spec.size, spec.size, spec.channels)
    made_with = {**environment(), "device": device}
    images, first = _begun(directory, spec.dtype, shape, made_with)
    rows: list[dict[str, object]] = []
    started = counted = time.monotonic()
    piece = -(-len(batches) // PIECES)
    with progress("sample", shape[0], "images") as bar:
        for number, (label, batch) in enumerate(batches):
            indices = micro_batch_indices(batch, settings.micro_batch)
            seeds = [sample_seed(config.seed, source.classes[label], index) for index in indices]
            if number >= first:
                drawn = draw_micro_batch(generator, label, seeds, steps=settings.steps, guidance=settings.guidance)
                images[len(rows) : len(rows) + len(seeds)] = drawn
            for position, (index, seed) in enumerate(zip(indices, seeds, strict=True)):
                rows.append(
                    {
                        "row": len(rows),
                        "sample_id": sample_id(
                            checkpoint.digest,
                            config.seed,
                            source.classes[label],
                            index,
                            steps=settings.steps,
                            guidance=settings.guidance,
                            micro_batch=settings.micro_batch,
                            threads=settings.threads,
                        ),
                        "label": label,
                        "class_index": index,
                        "seed": seed,
                        "micro_batch": batch,
                        "position": position,
                    }
                )
            bar.update(len(seeds))
            late = time.monotonic() - counted >= SECONDS_BETWEEN_PIECES
            if number >= first and (late or (number + 1 - first) % piece == 0):
                images.flush()
                _count(directory, number + 1, len(batches), made_with)
                counted = time.monotonic()
    seconds = time.monotonic() - started
    images.flush()
    table = pd.DataFrame(rows)
    table.to_parquet(directory / SAMPLES_FILE, index=False)
    drawn_now = len(rows) - first * settings.micro_batch
    logger.info("drew %d images at %.1f/s", drawn_now, drawn_now / max(seconds, 1e-9))
    return SampleBatch(
        directory=directory,
        digest=digest_json([digest_file(directory / IMAGES_FILE), table["sample_id"].tolist()]),
        checkpoint_digest=checkpoint.digest,
        n_samples=len(rows),
        counts={int(label): int(count) for label, count in table["label"].value_counts(sort=False).items()},
        solver=kind.solver,
        steps=settings.steps,
        guidance=settings.guidance,
        micro_batch=settings.micro_batch,
        threads=settings.threads,
        device=device,
        environment=environment(),
        job_seed=config.seed,
        seconds=seconds,
    )


def _begun(
    directory: Path, dtype: npt.DTypeLike, shape: tuple[int, ...], made_with: dict[str, str]
) -> tuple[np.memmap, int]:
    """The array to write into, and how many micro-batches of it are drawn already."""
    path = directory / IMAGES_FILE
    try:
        found = json.loads((directory / WORK_DIR / PROGRESS_FILE).read_text(encoding="utf-8"))
        images: Any = np.load(path, mmap_mode="r+", allow_pickle=False)
        if found["made_with"] == made_with and images.shape == shape and images.dtype == np.dtype(dtype):
            first = int(found["micro_batches"])
            logger.info("sampling goes on after %d of %d micro-batches", first, found["of"])
            return images, first
    except (OSError, ValueError, KeyError, TypeError):
        pass
    # Counted anew before the array is: a count must never stand beside an array it does not speak of.
    (directory / WORK_DIR / PROGRESS_FILE).unlink(missing_ok=True)
    return reserved_array(path, dtype, shape), 0


def _count(directory: Path, done: int, total: int, made_with: dict[str, str]) -> None:
    values = {"micro_batches": done, "of": total, "made_with": made_with}
    write_text(directory / WORK_DIR / PROGRESS_FILE, json.dumps(values, indent=1) + "\n")


def _micro_batches(request: SampleRequest, size: int) -> list[tuple[int, int]]:
    """Label and index of every micro-batch asked for, in order.

    Raises:
        ValueError: A range does not begin and end at a micro-batch.
    """
    batches = []
    for label, (start, count) in sorted(request.ranges.items()):
        if start % size or count % size:
            raise ValueError(f"label {label}: samples {start} to {start + count} do not fill micro-batches of {size}")
        batches += [(label, index) for index in range(start // size, (start + count) // size)]
    return batches
