"""Sample: a checkpoint and a request in, images out, each from its own seed."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from synthaug.config import Config
from synthaug.digest import digest_array, digest_file, digest_json
from synthaug.errors import SynthaugError
from synthaug.formats.reserved_array import reserved_array
from synthaug.generators.canonical import draw_micro_batch, environment, micro_batch_indices, sample_id, sample_seed
from synthaug.progress import progress
from synthaug.records import (
    IMAGES_FILE,
    PIPELINE_DIR,
    SAMPLES_FILE,
    WORK_DIR,
    Checkpoint,
    PixelSpec,
    SampleBatch,
    SampleRequest,
    Source,
)
from synthaug.scale import (
    SHARDS_DIR,
    MapShards,
    Shard,
    ShardDone,
    Tick,
    check_stopped,
    computes_with,
    do_shard,
    do_shards,
    forgetting,
    kept,
    one_by_one,
)

logger = logging.getLogger(__name__)


class SampleShard(Shard):
    """Micro-batches of a request, for one worker."""

    generator: str
    pipeline: Path = Field(description="What `Generator.save` wrote; every worker reads it there.")
    checkpoint_digest: str
    pixels: PixelSpec
    seed: int
    steps: int
    guidance: float
    micro_batch: int
    threads: int
    micro_batches: tuple[tuple[int, str, int], ...] = Field(description="Label, class and index within the class.")

    @property
    def needs(self) -> tuple[Path, ...]:
        return (self.pipeline,)


def sample(
    config: Config,
    source: Source,
    checkpoint: Checkpoint,
    request: SampleRequest,
    directory: Path,
    *,
    map_shards: MapShards = one_by_one,
) -> SampleBatch:
    """Draw what is requested, in canonical micro-batches.

    See `synthaug.generators.canonical` for what makes a sample a property of its place. Micro-batches are drawn in
    shards, by `map_shards`. An interrupted call goes on with those that `directory`/work does not hold, if versions
    and device are still those that were drawn with.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        UsageError: A worker does not see the files of the run.
    """
    from synthaug.generators import generator_class, resolve_device

    settings = config.sample
    device = resolve_device(config.train.device)
    steps = settings.steps or _default_steps(checkpoint, settings.guidance)
    size = settings.micro_batch
    batches = [(label, source.classes[label], batch) for label, batch in _micro_batches(request, size)]
    spec = source.pixels
    images = _array(directory / IMAGES_FILE, spec.dtype, (len(batches) * size, spec.size, spec.size, spec.channels))
    made_with = _made_with(device)
    folder = directory / WORK_DIR / SHARDS_DIR
    shared = {
        "folder": folder,
        "made_with": made_with,
        "generator": checkpoint.generator,
        "pipeline": checkpoint.directory / PIPELINE_DIR,
        "checkpoint_digest": checkpoint.digest,
        "pixels": spec,
        "seed": config.seed,
        "steps": steps,
        **{name: getattr(settings, name) for name in ("guidance", "micro_batch", "threads")},
    }

    def part(first: int, last: int) -> SampleShard:
        return SampleShard(**shared, first=first, last=last, micro_batches=tuple(batches[first:last]))

    def file_of(done: ShardDone) -> Path:
        return folder / done.name / IMAGES_FILE

    def intact(done: ShardDone) -> bool:
        file = file_of(done)
        drawn = np.load(file, mmap_mode="r") if file.exists() else images[done.first * size : done.last * size]
        return digest_array(drawn) == done.digest

    def take(done: ShardDone) -> None:
        file = file_of(done)
        if file.exists():
            drawn = np.load(file, mmap_mode="r")
            if digest_array(drawn) != done.digest:
                raise SynthaugError(f"{file} does not hold what its worker wrote. Is the file system full or damaged?")
            images[done.first * size : done.last * size] = drawn
            # Held twice only until it is on the disk.
            images.flush()
            file.unlink()

    started = time.monotonic()
    with progress("sample", len(images), "images") as bar, forgetting():
        found = do_shards(
            draw_shard,
            part,
            folder=folder,
            units=len(batches),
            unit_size=size,
            made_with=made_with,
            settings=config.scale,
            map_shards=map_shards,
            intact=intact,
            take=take,
            tick=lambda number: bar.update(number * size),
        )
    seconds = time.monotonic() - started
    images.flush()
    table = _table(config, source, checkpoint, batches, steps)
    table.to_parquet(directory / SAMPLES_FILE, index=False)
    if found:
        logger.info("sampling went on after %d of %d micro-batches", found, len(batches))
    drawn_now = (len(batches) - found) * size
    logger.info("drew %d images at %.1f/s", drawn_now, drawn_now / max(seconds, 1e-9))
    return SampleBatch(
        directory=directory,
        digest=digest_json([digest_file(directory / IMAGES_FILE), table["sample_id"].tolist()]),
        checkpoint_digest=checkpoint.digest,
        n_samples=len(table),
        counts={int(label): int(count) for label, count in table["label"].value_counts(sort=False).items()},
        solver=generator_class(checkpoint.generator).solver,
        steps=steps,
        guidance=settings.guidance,
        micro_batch=settings.micro_batch,
        threads=settings.threads,
        device=device,
        environment=environment(),
        job_seed=config.seed,
        seconds=seconds,
    )


def draw_shard(shard: SampleShard, tick: Tick) -> ShardDone:
    """Draw the micro-batches of a shard, one after another; may be called on another machine.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        UsageError: The files of the run are not to be seen from here.
    """
    from synthaug.generators import generator_class
    from synthaug.quality.arithmetic import torch_threads

    device = shard.made_with["device"]

    def fill(folder: Path) -> tuple[str, float]:
        spec = shard.pixels
        shape = (len(shard.micro_batches) * shard.micro_batch, spec.size, spec.size, spec.channels)
        drawn = reserved_array(folder / IMAGES_FILE, spec.dtype, shape)
        generator = kept(
            ("generator", shard.generator, str(shard.pipeline), shard.checkpoint_digest, device),
            lambda: generator_class(shard.generator).load(shard.pipeline, device=device),
        )
        seconds = []
        for number, (label, name, batch) in enumerate(shard.micro_batches):
            check_stopped()
            started = time.monotonic()
            seeds = [sample_seed(shard.seed, name, index) for index in micro_batch_indices(batch, shard.micro_batch)]
            place = slice(number * shard.micro_batch, (number + 1) * shard.micro_batch)
            drawn[place] = draw_micro_batch(generator, label, seeds, steps=shard.steps, guidance=shard.guidance)
            seconds.append(time.monotonic() - started)
            tick(1)
        return digest_array(drawn), min(seconds)

    with torch_threads(shard.threads):
        return do_shard(shard, _made_with(device), fill)


def _made_with(device: str) -> dict[str, str]:
    return {**environment(), **computes_with(device), "device": device}


def _array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """The array to write into; with what an interrupted call left in it."""
    try:
        images: Any = np.load(path, mmap_mode="r+", allow_pickle=False)
        if images.shape == shape and images.dtype == np.dtype(dtype):
            return images
    except (OSError, ValueError):
        pass
    return reserved_array(path, dtype, shape)


def _default_steps(checkpoint: Checkpoint, guidance: float) -> int:
    from synthaug.generators import generator_class

    generator = generator_class(checkpoint.generator).load(checkpoint.directory / PIPELINE_DIR, device="cpu")
    return generator.default_steps(guidance)


def _table(
    config: Config, source: Source, checkpoint: Checkpoint, batches: list[tuple[int, str, int]], steps: int
) -> pd.DataFrame:
    """A row a sample, in the order of the images."""
    settings = config.sample
    rows: list[dict[str, object]] = []
    for label, name, batch in batches:
        for position, index in enumerate(micro_batch_indices(batch, settings.micro_batch)):
            rows.append(
                {
                    "row": len(rows),
                    "sample_id": sample_id(
                        checkpoint.digest,
                        config.seed,
                        name,
                        index,
                        steps=steps,
                        guidance=settings.guidance,
                        micro_batch=settings.micro_batch,
                        threads=settings.threads,
                    ),
                    "label": label,
                    "class_index": index,
                    "seed": sample_seed(config.seed, name, index),
                    "micro_batch": batch,
                    "position": position,
                }
            )
    return pd.DataFrame(rows)


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
