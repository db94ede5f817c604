"""How much a remade sample may differ: a release made again, as it was drawn and with other threads or processors.

    python benchmarks/remake.py runs/quickstart/release --threads 1 2 --capability default avx2

Prints, for the threads of the rows and for each variant: time, share of samples that are identical, and the largest
difference of a pixel as a share of the range of values; then the same difference before rounding, of two micro-batches
a class. `--capability` has torch compute as on another processor (ATEN_CPU_CAPABILITY).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.generators.canonical import micro_batch_indices, sample_seed
from synthaug.remake import remake


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[])
    parser.add_argument("--capability", nargs="*", default=[])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads = arguments.threads[0] if arguments.child and arguments.threads else None
    if arguments.child:
        tell(arguments.release, threads)
        np.save(arguments.child, unrounded(arguments.release, threads))
        return
    variants = [(None, None), *((n, None) for n in arguments.threads), *((None, name) for name in arguments.capability)]
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for number, (threads, capability) in enumerate(variants):
            path = Path(folder) / f"{number}.npy"
            command = [sys.executable, __file__, str(arguments.release), "--child", str(path)]
            command += ["--threads", str(threads)] if threads else []
            changed = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
            subprocess.run(command, check=True, env={**os.environ, **changed})
            drawn = np.load(path)
            first = drawn if first is None else first
            print(f"  before rounding: largest difference {np.abs(drawn - first).max() / 2:.2e} of the range")


def tell(release: Path, threads: int | None) -> None:
    result = remake(release, threads=threads)
    largest = max(item.largest_difference or 0.0 for item in result.samples)
    print(
        f"{', '.join(result.changes) or 'as drawn'}: {result.n_identical} of {result.n_samples} identical, largest "
        f"difference {largest:.5f}, {result.n_micro_batches} micro-batches, {result.seconds:.1f} s",
        flush=True,
    )


def unrounded(release: Path, threads: int | None) -> np.ndarray:
    """Samples of two micro-batches a class as the network gives them, about [-1, 1]."""
    import torch

    from synthaug.diffusion.pipeline import ClassConditionalPipeline

    rows = pd.read_parquet(release / "manifest.parquet").drop_duplicates(["label", "micro_batch"])
    pipeline = ClassConditionalPipeline.from_pretrained(remake(release, draw=1).checkpoint)
    parts = []
    for row in rows.groupby("label").head(2).itertuples():
        torch.set_num_threads(threads or row.threads)
        indices = micro_batch_indices(row.micro_batch, row.micro_batch_size)
        noise = pipeline.noise([sample_seed(row.job_seed, row.class_name, index) for index in indices])
        labels = torch.full((len(indices),), row.label)
        parts.append(pipeline.solve(labels, noise, steps=row.steps, guidance=row.guidance).numpy())
    return np.clip(np.concatenate(parts), -1, 1)


if __name__ == "__main__":
    main()
