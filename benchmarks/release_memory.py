"""Time and memory of a release of many samples, and of its verification.

    python benchmarks/release_memory.py --samples 100000 --size 64

Random smooth pictures stand in for the network's. They are made in one process, released in another and
verified in a third, so that each peak is its own. Memory is the peak above the interpreter with its libraries.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from synthaug.config import parse_config
from synthaug.records import (
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    ClassPlan,
    Judge,
    PixelSpec,
    SampleBatch,
    Source,
    Splits,
)

N_REAL = 200
CLASSES = ("common", "scarce")


def make_inputs(folder: Path, samples: int, size: int) -> None:
    """Files of the stages before the release, as their records describe them."""
    for name in ("read", "split", "sample", "audit", "plan", "checkpoint", "judge"):
        (folder / name).mkdir()
    _pictures(folder / "read/images.npy", N_REAL, size, seed=0)
    row = np.arange(N_REAL)
    index = pd.DataFrame({"row": row, "image_id": [f"img-{i:08d}" for i in row], "label": row % 2})
    index.assign(is_synthetic=False).to_parquet(folder / "read/index.parquet")
    split = np.where(row < N_REAL // 2, "train", np.where(row < 3 * N_REAL // 4, "validation", "test"))
    index.assign(split=split, held_back=None).to_parquet(folder / "split/splits.parquet")
    _pictures(folder / "sample/images.npy", samples, size, seed=1)
    row = np.arange(samples)
    drawn = pd.DataFrame({"row": row, "sample_id": [f"syn-{i:020d}" for i in row], "label": 1, "class_index": row})
    drawn.assign(seed=row + 2**40, micro_batch=row // 64, position=row % 64).to_parquet(
        folder / "sample/samples.parquet"
    )
    scores = {"probability": 0.9, "predicted": 1, "distance": 0.1, "distance_ratio": 0.8, "nearest_id": "img-00000001"}
    audit = drawn.assign(batch=0, accepted=True, reason=None, rank=row, **scores)
    audit.to_parquet(folder / "audit/audit.parquet")


def _pictures(path: Path, n: int, size: int, seed: int) -> None:
    import cv2

    random = np.random.default_rng(seed)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, size, size, 1))
    for start in range(0, n, 1000):
        count = min(1000, n - start)
        coarse = random.uniform(20, 235, (count, 5, 5)).astype(np.float32)
        smooth = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in coarse])
        noise = random.normal(0, 4, smooth.shape)
        images[start : start + count, ..., 0] = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    images.flush()


def inputs(folder: Path, samples: int, size: int) -> tuple[Any, ...]:
    """The arguments of `release` before the verdict, from what `make_inputs` wrote."""
    sides = (size, size)
    spec = PixelSpec(
        channels=1, dtype="uint8", colour="grey", low=0, high=255, size=size, fit="none", interpolation="none",
        smallest=sides, largest=sides,
    )  # fmt: skip
    source = Source(
        directory=folder / "read", digest="r", name="smooth pictures", fingerprint="f", classes=CLASSES, pixels=spec,
        n_images=N_REAL, n_set_aside=0, set_aside_reasons={}, n_duplicates=0, n_synthetic=0,
    )  # fmt: skip
    counts = {"train": [50, 50], "validation": [25, 25], "test": [25, 25]}
    splits = Splits(
        directory=folder / "split", digest="s", method="given", counts=counts, held_back={}, n_groups=N_REAL
    )
    plan = BalancePlan(
        directory=folder / "plan", digest="p",
        classes=tuple(
            ClassPlan(label=i, name=name, n_real=50, n_target=50 + i * samples) for i, name in enumerate(CLASSES)
        ),
    )  # fmt: skip
    checkpoint = Checkpoint(
        directory=folder / "checkpoint", digest="c", generator="edm", parameters=1, images_budget=1, images_seen=1,
        budget_from="images", kept="base", heldout_loss_base={}, heldout_loss_tuned={}, scarce=[], stopped="budget",
        seconds=1, images_per_second=1, device="cpu",
    )  # fmt: skip
    judge = Judge(
        directory=folder / "judge", digest="j", n_train=100, validation_balanced_accuracy=None,
        near_copy_threshold=None, near_copy_note="", n_heldout=0, seconds=1,
    )  # fmt: skip
    batch = SampleBatch(
        environment=dict.fromkeys(("torch", "diffusers", "numpy", "cpu_capability"), "x"),
        directory=folder / "sample", digest="b", checkpoint_digest="c", n_samples=samples, counts={1: samples},
        solver="heun", steps=20, guidance=1, micro_batch=64, threads=2, device="cpu", seconds=1,
    )  # fmt: skip
    audits = tuple(
        ClassAudit(
            label=i, name=name, n_wanted=i * samples, n_candidates=i * samples, n_accepted=i * samples, n_missing=0,
            rejected={}, coverage=None, coverage_expected=None,
        )
        for i, name in enumerate(CLASSES)
    )  # fmt: skip
    report = AuditReport(directory=folder / "audit", digest="a", classes=audits)
    config = parse_config(
        {"name": "bench", "output": "x", "dataset": {"format": "hub", "path": "a/b"}, "image": {"size": size}}
    )
    return config, source, splits, plan, checkpoint, judge, [batch], report


def make_release(folder: Path, samples: int, size: int) -> None:
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import torch  # noqa: F401

    from synthaug.formats import hub, manifest, shards  # noqa: F401
    from synthaug.release import release
    from synthaug.report.contact_sheet import write_contact_sheet  # noqa: F401

    (folder / "release").mkdir()
    parts = inputs(folder, samples, size)
    before, started = _peak(), time.monotonic()
    made = release(*parts, None, folder / "release")
    _report("release", started, before, sum(made.n_synthetic.values()))
    files = list((folder / "release").rglob("*.parquet"))
    print(f"{len(files)} parquet files, {sum(file.stat().st_size for file in files) / 2**20:.0f} MiB")


def check_release(folder: Path) -> None:
    from synthaug.formats import manifest, shards  # noqa: F401
    from synthaug.verify import verify

    before, started = _peak(), time.monotonic()
    result = verify(folder / "release")
    assert result.ok, result.problems
    _report("verify", started, before, result.n_rows)


def _report(what: str, started: float, before: float, n: int) -> None:
    seconds, peak = time.monotonic() - started, _peak()
    print(f"{what}: {n} images, {seconds:.1f} s, peak {peak:.0f} MiB, {peak - before:.0f} MiB above the libraries")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--step", choices=("inputs", "release", "verify"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="Where to put the files; a temporary folder otherwise.")
    options = parser.parse_args()
    if options.step == "inputs":
        make_inputs(options.folder, options.samples, options.size)
    elif options.step == "release":
        make_release(options.folder, options.samples, options.size)
    elif options.step == "verify":
        check_release(options.folder)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for step in ("inputs", "release", "verify"):
                shared = ["--samples", str(options.samples), "--size", str(options.size), "--folder", folder]
                subprocess.run([sys.executable, __file__, "--step", step, *shared], check=True)


if __name__ == "__main__":
    main()
