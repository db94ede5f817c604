"""Sample: a checkpoint and a request in, images out, each from its own seed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_file, digest_json
from synthaug.formats.reserved_array import reserved_array
from synthaug.generators.canonical import draw_micro_batch, environment, micro_batch_indices, sample_id, sample_seed
from synthaug.progress import progress
from synthaug.records import IMAGES_FILE, PIPELINE_DIR, SAMPLES_FILE, Checkpoint, SampleBatch, SampleRequest, Source

logger = logging.getLogger(__name__)


def sample(
    config: Config, source: Source, checkpoint: Checkpoint, request: SampleRequest, directory: Path
) -> SampleBatch:
    """Draw what is requested, in canonical micro-batches.

    See `synthaug.generators.canonical` for what makes a sample a property of its place.

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
    images = reserved_array(directory / IMAGES_FILE, spec.dtype, shape)
    rows: list[dict[str, object]] = []
    started = time.monotonic()
    with progress("sample", shape[0], "images") as bar:
        for label, batch in batches:
            indices = micro_batch_indices(batch, settings.micro_batch)
            seeds = [sample_seed(config.seed, source.classes[label], index) for index in indices]
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
    seconds = time.monotonic() - started
    images.flush()
    table = pd.DataFrame(rows)
    table.to_parquet(directory / SAMPLES_FILE, index=False)
    logger.info("drew %d images at %.1f/s", len(rows), len(rows) / max(seconds, 1e-9))
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
        seconds=seconds,
    )


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
