"""Sample: a checkpoint and a request in, images out, each from its own seed."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_file, digest_json
from synthaug.formats.reserved_array import reserved_array
from synthaug.progress import progress
from synthaug.records import IMAGES_FILE, PIPELINE_DIR, SAMPLES_FILE, Checkpoint, SampleBatch, SampleRequest, Source

logger = logging.getLogger(__name__)


def sample_seed(seed: int, class_name: str, class_index: int) -> int:
    """Return the seed of a sample, 0 to 2**63 - 1; a property of its place, not of when it is drawn."""
    text = f"synthaug sample\0{seed}\0{class_name}\0{class_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample(
    config: Config, source: Source, checkpoint: Checkpoint, request: SampleRequest, directory: Path
) -> SampleBatch:
    """Draw what is requested, in canonical micro-batches.

    Sample i of a class belongs to micro-batch i // sample.micro_batch, which is always computed whole and alone:
    so a sample's last bit does not depend on what else is asked for, in which order or by whom.

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
            first = batch * settings.micro_batch
            indices = range(first, first + settings.micro_batch)
            seeds = [sample_seed(config.seed, source.classes[label], index) for index in indices]
            drawn = generator.sample([label] * len(seeds), seeds, steps=settings.steps, guidance=settings.guidance)
            images[len(rows) : len(rows) + len(seeds)] = drawn
            for position, (index, seed) in enumerate(zip(indices, seeds, strict=True)):
                rows.append(
                    {
                        "row": len(rows),
                        "sample_id": _sample_id(config, checkpoint, source.classes[label], index),
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
        environment=_environment(),
        seconds=seconds,
    )


def _environment() -> dict[str, str]:
    """What else the last bit of a sample can depend on."""
    import diffusers
    import torch

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "numpy": np.__version__}
    return {**versions, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


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


def _sample_id(config: Config, checkpoint: Checkpoint, class_name: str, index: int) -> str:
    settings = config.sample
    made_of = [checkpoint.digest, config.seed, class_name, index, settings.steps, settings.guidance]
    return "syn-" + digest_json([*made_of, settings.micro_batch, settings.threads])[:20]
