"""Our own training and sampling loop, timed beside the machine's matrix product; and its profile.

Run with the project's libraries and the repository on PYTHONPATH. The job is as in `contest`, with "mode": "speed",
"profile" or "gpu", and "device".
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from contest import _flops, _peak, _write

from benchmarks.method.solvers import solver_words
from synthaug.config import TrainConfig
from synthaug.diffusion.augment import N_HINTS
from synthaug.diffusion.edm import denoising_loss
from synthaug.diffusion.network import predict
from synthaug.errors import TrainingError
from synthaug.generators.edm import EDMGenerator
from synthaug.generators.interface import TrainingData
from synthaug.records import PixelSpec

# What a run draws with where nothing is said.
SAMPLE_STEPS = 8
# As few as the checkpoint has a solver for; what they are worth is told by the cell of the solver.
FEWEST_STEPS = 2
_ROWS = 15


def main() -> None:
    imported = _peak()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    found = {"speed": speed, "profile": profile}[job["mode"]](job)
    found |= {"peak_bytes": _peak(), "peak_bytes_of_imports": imported, "torch": torch.__version__}
    _write(Path(job["result"]), json.dumps(found))


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Training and samples a second, each between two measurements of the matrix product."""
    data, device = _data(job), job.get("device", "cpu")
    rates = [matrix_rate(device, job["seconds"] / 4)]
    settings = _settings(job)
    generator, report, training, beside = _timed_fit(data, settings, job["seconds"])
    rates.append(matrix_rate(device, job["seconds"] / 4))
    unet, pipeline = generator.pipeline.unet, generator.pipeline
    if device == "cuda":
        unet.to("cuda")
    # Apart from the training, whose seconds would hold it on fast machines alone.
    pipeline.fit_solver()
    batch = job["sample_batch"]
    samples = batch / _timed_draw(generator, batch, SAMPLE_STEPS, job["seconds"])
    fewest = batch / _timed_draw(generator, batch, FEWEST_STEPS, job["seconds"] / 2)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    compiled = [_compiled(mode, data, settings, generator, job) for mode in job.get("compile", ())]
    rates.append(matrix_rate(device, job["seconds"] / 4))
    per_image = _training_flops(pipeline)
    per_sample = _flops_of_network(pipeline) * SAMPLE_STEPS
    rate = float(np.median(rates))
    found = {
        "matrix_flops_per_second": rate,
        "matrix_flops_per_second_each": rates,
        "matrix_of": "bfloat16, 8192 squared" if device == "cuda" else "float32, 1024 squared",
        "batch_size": settings.batch_size,
        "training_images": report.images_seen,
        "training_images_per_second": training,
        "whole_short_training_images_per_second": report.images_per_second,
        "training_flops_per_image": per_image,
        "training_flops_per_second": per_image * training,
        "training_share": per_image * training / rate,
        "samples_per_second": samples,
        "fewest_steps": FEWEST_STEPS,
        "samples_per_second_by_fewest_steps": fewest,
        "sampler": (
            f"{SAMPLE_STEPS} steps of {solver_words(pipeline.scheduler.config, pipeline.config.fitted)}, "
            f"{batch} at a time"
        ),
        "sampling_flops_per_second": per_sample * samples,
        "sampling_share": per_sample * samples / rate,
        "training_seconds_beside_steps": beside,
        "compiled": compiled,
        "parameters": report.parameters,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    if peak is not None:
        found["peak_gpu_bytes"] = peak
    return found


def _timed_fit(data: TrainingData, settings: TrainConfig, seconds: float) -> tuple[Any, Any, float, float]:
    """Generator, report, training images a second, and the seconds that the training took beside its steps.

    Told minutes, a training measures its own steps first: the median of a few, as the peers' are measured. The rest of
    so short a training (building, held-out loss, states) would be far more than its share of a long one.
    """
    started = time.monotonic()
    generator, report = _fit(data, settings.model_copy(update={"minutes": seconds / 60, "fit_solver_from": None}))
    measured = re.search(r"at (\d+) images/s", report.budget_from)
    assert measured is not None, f"the budget is told in other words now: {report.budget_from}"
    rate = float(measured[1])
    return generator, report, rate, time.monotonic() - started - report.images_seen / rate


def _timed_draw(generator: Any, batch: int, steps: int, seconds: float, warm_up: int = 1) -> float:
    """Seconds of a batch."""
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < warm_up + 1 or time.monotonic() - begun < seconds:
        started = time.monotonic()
        generator.sample([0] * batch, list(range(batch)), steps=steps, guidance=1.0)
        times.append(time.monotonic() - started)
    return float(np.median(times[warm_up:]))


def _compiled(mode: str, data: TrainingData, settings: TrainConfig, generator: Any, job: dict[str, Any]) -> Any:
    """The same with the network compiled in a mode of torch.compile, and what the first batch of each took longer; or
    why it could not be."""
    batch, plain = job["sample_batch"], generator.pipeline.unet
    # Nothing is found that another mode, or another day, has compiled.
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}),
    ):
        try:
            torch._dynamo.reset()
            _, _, training, beside = _timed_fit(data, settings.model_copy(update={"compile": mode}), job["seconds"])
            torch._dynamo.reset()
            generator.pipeline.unet = torch.compile(plain, mode=mode)
            started = time.monotonic()
            generator.sample([0] * batch, list(range(batch)), steps=SAMPLE_STEPS, guidance=1.0)
            first = time.monotonic() - started
            # The recording of CUDA graphs takes some evaluations more.
            seconds = _timed_draw(generator, batch, SAMPLE_STEPS, job["seconds"], warm_up=2)
        except (TrainingError, RuntimeError) as error:
            return {"mode": mode, "failed": " ".join(str(error).split())[:300]}
        finally:
            generator.pipeline.unet = plain
    return {
        "mode": mode,
        "training_images_per_second": training,
        "training_seconds_beside_steps": beside,
        "samples_per_second": batch / seconds,
        "first_draw_seconds": first,
    }


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Where the time goes, by operation: torch.profiler over a short training and over drawing one batch."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    data, settings = _data(job), _settings(job)
    generator, _ = _fit(data, settings.model_copy(update={"images": 2 * settings.batch_size}))
    generator.pipeline.fit_solver()

    def table(work: Any) -> dict[str, Any]:
        started = time.monotonic()
        with watched(activities=[ProfilerActivity.CPU]) as seen:
            work()
        seconds = time.monotonic() - started
        averages = seen.key_averages()
        total = sum(item.self_cpu_time_total for item in averages)
        rows = sorted(averages, key=lambda item: -item.self_cpu_time_total)[:_ROWS]
        return {
            "seconds": seconds,
            "seconds_in_operations": total / 1e6,
            "rows": [
                {"operation": item.key, "share": item.self_cpu_time_total / max(total, 1e-9), "calls": item.count}
                for item in rows
            ],
        }

    steps = max(2, int(job.get("steps", 20)))
    return {
        "training": table(lambda: _fit(data, settings.model_copy(update={"images": steps * settings.batch_size}))),
        "sampling": table(lambda: generator.sample([0] * 64, list(range(64)), steps=SAMPLE_STEPS, guidance=1.0)),
        "training_steps": steps,
    }


def matrix_rate(device: str, seconds: float) -> float:
    """Floating-point operations a second of a large matrix product, by the fastest of many: the machine's measure."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best, begun, n = float("inf"), time.monotonic(), 0
    while n < 5 or time.monotonic() - begun < seconds:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best, n = min(best, time.perf_counter() - started), n + 1
    return 2 * size**3 / best


def _training_flops(pipeline: Any) -> float:
    """Of one image, forwards and backwards, by torch's counter."""
    unet, spec, fold = pipeline.unet, pipeline.spec, pipeline.config.fold
    device = pipeline.device
    images = torch.zeros(2, spec.channels, spec.size, spec.size, device=device)
    labels, hints = torch.zeros(2, dtype=torch.long, device=device), torch.zeros(2, N_HINTS, device=device)

    def once() -> None:
        denoising_loss(
            lambda x, c: predict(unet, x, c, labels, hints, fold).float(),
            images,
            torch.randn_like(images),
            torch.ones(2, device=device),
            0.5,
        ).mean().backward()

    return _flops(once) / 2


def _flops_of_network(pipeline: Any) -> float:
    """Of one image, one evaluation."""
    spec, fold, device = pipeline.spec, pipeline.config.fold, pipeline.device
    images = torch.zeros(2, spec.channels, spec.size, spec.size, device=device)
    labels, hints = torch.zeros(2, dtype=torch.long, device=device), torch.zeros(2, N_HINTS, device=device)
    with torch.inference_mode():
        found = _flops(lambda: predict(pipeline.unet, images, torch.zeros(2, device=device), labels, hints, fold))
    return found / 2


def _fit(data: TrainingData, settings: TrainConfig) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return EDMGenerator.fit(data, settings, seed=0, workdir=Path(folder))


def _settings(job: dict[str, Any]) -> TrainConfig:
    return TrainConfig(threads=job["threads"], device=job.get("device", "cpu"), **job.get("train", {}))


def _data(job: dict[str, Any]) -> TrainingData:
    with np.load(job["images"], allow_pickle=False) as found:
        own, labels = found["images"], found["labels"]
        heldout, heldout_labels = found["heldout_images"], found["heldout_labels"]
    images = np.concatenate([own, heldout])
    size, channels = images.shape[1], images.shape[3]
    spec = PixelSpec(
        channels=channels, dtype="uint8", colour="grey" if channels == 1 else "rgb", low=0, high=255, size=size,
        fit="none", interpolation="none", smallest=(size, size), largest=(size, size),
    )  # fmt: skip
    return TrainingData(
        images=images,
        pixels=spec,
        classes=tuple(job["classes"]),
        rows=np.arange(len(own)),
        labels=labels,
        heldout_rows=np.arange(len(own), len(images)),
        heldout_labels=heldout_labels,
        scarce=tuple(job["scarce"]),
    )


if __name__ == "__main__":
    main()
