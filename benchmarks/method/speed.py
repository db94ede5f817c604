"""Cells of speed: all in turns in one run, the solver over its steps, and a GPU."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from benchmarks.method import peers
from benchmarks.method.settings import SETTINGS, make_config
from benchmarks.method.solvers import solver_words
from synthaug.formats.atomic import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.method.cells import Cell, Place
    from synthaug.diffusion.pipeline import ClassConditionalPipeline

OURS = peers.PROGRAMS / "run_ours.py"
ROUNDS = 3
# Images that each method draws at a time.
SAMPLE_BATCH = 64
# Each measurement's share of `Place.seconds`, and the time for the example's 1000 steps.
DDPM_SECONDS_SHARE = 2.0
OUR_STEPS = (2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 26, 35)
DDIM_STEPS = (10, 20, 50, 100)
SOLVER_SAMPLES = 256
# Modes of torch.compile that are timed on a GPU; the second one draws its kernels into CUDA graphs.
COMPILED = ("default", "reduce-overhead")
# Apart from the indices that any run draws.
_FIRST_INDEX = 20_000_000
# Two figures this near, as a share of the half-width of the interval of DDIM's, count as equal: with the same weights
# and noise both solvers end at one KID, and the last of the difference is chance.
EQUAL_WITHIN = 0.1


def rates(cell: Cell, place: Place) -> dict[str, Any]:
    """Ours and the learned peers, each in a process of its own, `ROUNDS` times in turns; all rounds are kept."""
    from benchmarks.method.cells import our_parameters, prepare, sources, write_training_images
    from synthaug.records import BalancePlan, Source

    setting = SETTINGS[cell.setting]
    config = make_config(
        setting, replicate=0, minutes=1, output=place.work / f"{cell.setting}.r0", data=place.data,
        prepared=place.prepared, threads=place.threads, trial_minutes=place.trial_minutes,
    )  # fmt: skip
    stages = prepare(config)
    source, plan = stages.last(Source), stages.last(BalancePlan)
    images = place.work / f"{cell.setting}.r0.images.npz"
    write_training_images(stages, images)
    job = {
        "mode": "speed", "images": str(images), "classes": list(source.classes), "scarce": list(plan.scarce),
        "threads": place.threads, "seconds": place.seconds, "seed": 0, "parameters": our_parameters(source),
        "sample_batch": SAMPLE_BATCH,
    }  # fmt: skip
    learned = [peer for peer in peers.PEERS.values() if peer.learns]
    # Kept as they come: a run that is cut short goes on with the next one. Rounds of other code are measured again.
    kept = place.work / f"{cell.name}.rounds.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    found: list[dict[str, Any]] = before["rounds"] if before.get("sources") == sources() else []
    for number, name in itertools.product(range(ROUNDS), ["ours", *(peer.name for peer in learned)]):
        if number == len(found):
            found.append({})
        if name in found[number]:
            continue
        if name == "ours":
            found[number][name] = run_ours(job)
        else:
            peer = peers.PEERS[name]
            # Once is enough for what takes a thousand steps.
            extra = {"ddpm_seconds": DDPM_SECONDS_SHARE * place.seconds} if number == 0 and _is_example(peer) else {}
            found[number][name] = peers.run_program(peer, job | extra, place.cache)
        write_text(kept, json.dumps({"sources": sources(), "rounds": found}))
    return {"rounds": found, "ratios": ratios(found)}


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over each peer, medians over the rounds: training images and samples a second, peak memory."""
    result: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        if name == "ours":
            continue

        def ratio(key: str, name: str = name) -> float:
            return statistics.median(one["ours"][key] / one[name][key] for one in rounds)

        result[name] = {
            "training_images_per_second": ratio("training_images_per_second"),
            "samples_per_second": ratio("samples_per_second"),
            "peak_bytes": ratio("peak_bytes"),
        }
        ddpm = rounds[0][name].get("ddpm")
        if ddpm is not None:
            ours = statistics.median(one["ours"]["samples_per_second"] for one in rounds)
            result[name]["samples_per_second_by_1000_steps"] = ours / ddpm["samples_per_second"]
    return result


def _is_example(peer: peers.Peer) -> bool:
    return peer.program == "run_diffusers.py"


def profile(cell: Cell, place: Place) -> dict[str, Any]:
    from benchmarks.method.cells import prepare, write_training_images
    from synthaug.records import BalancePlan, Source

    config = make_config(
        SETTINGS[cell.setting], replicate=0, minutes=1, output=place.work / f"{cell.setting}.r0", data=place.data,
        prepared=place.prepared, threads=place.threads, trial_minutes=place.trial_minutes,
    )  # fmt: skip
    stages = prepare(config)
    images = place.work / f"{cell.setting}.r0.images.npz"
    write_training_images(stages, images)
    return run_ours(
        {
            "mode": "profile",
            "images": str(images),
            "classes": list(stages.last(Source).classes),
            "scarce": list(stages.last(BalancePlan).scarce),
            "threads": place.threads,
            "steps": place.seconds,
        }
    )


def gpu(size: int, place: Place) -> dict[str, Any]:
    """Our loops on a GPU, on made-up pictures: their content changes no speed."""
    from benchmarks.method.cells import refuse_without_gpu

    refuse_without_gpu()
    return run_ours(gpu_job(size, place) | {"device": "cuda"})


def gpu_job(size: int, place: Place) -> dict[str, Any]:
    path = place.work / f"gpu.{size}.images.npz"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (1024, size, size, 1)).astype(np.uint8)
    labels = np.repeat(np.arange(2), 512)
    peers.write_images(path, images, np.arange(0, 1024, 2), labels[::2], np.arange(1, 1024, 2), labels[1::2])
    # Larger batches than on a processor: a GPU waits for small ones.
    return {
        "mode": "speed", "images": str(path), "classes": ["a", "b"], "scarce": [0], "threads": place.threads,
        "seconds": place.seconds, "train": {"batch_size": 256}, "sample_batch": SAMPLE_BATCH, "compile": COMPILED,
    }  # fmt: skip


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.method.cells import REPOSITORY, python

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *([before] if before else [])])
    try:
        return peers.run_script(OURS, job, python=python(), name="ours")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


# -- the solver --


def solver(cell: Cell, place: Place) -> dict[str, Any]:
    """KID, coverage and seconds of our solver and of DDIM over the number of steps: same weights, same noise."""
    import torch

    from synthaug.digest import digest_json
    from synthaug.generators.edm import EDMGenerator
    from synthaug.quality.fidelity import sample_quality
    from synthaug.quality.reference import load_reference
    from synthaug.records import IMAGES_FILE, SPLITS_FILE

    made = place.load(cell.needs[0])
    assert made is not None, "what a cell needs is done before it"
    folders = {name: place.results / made["result"][name] for name in ("checkpoint", "judge", "source", "splits")}
    torch.set_num_threads(place.threads)
    pipeline = EDMGenerator.load(folders["checkpoint"], device="cpu").pipeline
    classifier = load_reference(folders["judge"], place.threads).classifier
    images: np.ndarray = np.load(folders["source"] / IMAGES_FILE, mmap_mode="r")
    table = pd.read_parquet(folders["splits"] / SPLITS_FILE)
    table = table[table["held_back"].isna() & (table["split"] == "train")]
    # The scarcest class: the one that the samples are for.
    label = int(table["label"].value_counts().idxmin())
    rows = table.loc[table["label"] == label, "row"].to_numpy(np.int64)
    real = classifier.predict(images, rows).depths
    seeds = [int(digest_json(["solver", _FIRST_INDEX + k])[:15], 16) for k in range(SOLVER_SAMPLES)]
    labels = torch.full((SAMPLE_BATCH,), label, dtype=torch.long)

    def judged(draw: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        started, drawn = time.monotonic(), []
        for start in range(0, len(seeds), SAMPLE_BATCH):
            noise = pipeline.noise(seeds[start : start + SAMPLE_BATCH])
            unit = draw(labels[: len(noise)], noise)
            drawn.append(pipeline.spec.from_unit(unit.permute(0, 2, 3, 1).numpy()))
        seconds = time.monotonic() - started
        features = classifier.predict(np.concatenate(drawn)).depths
        found = sample_quality(real, features)
        kid = found.kid
        return {
            "seconds": seconds,
            "kid": None if kid is None else kid.estimate,
            "kid_half_width": None if kid is None else (kid.high - kid.low) / 2,
            "coverage": found.coverage,
        }

    judged(lambda own, noise: pipeline.solve(own, noise, steps=2, guidance=1.0))
    sweep: dict[str, list[dict[str, Any]]] = {"ours": [], "ddim": []}
    for steps in OUR_STEPS:
        one = judged(lambda own, noise, steps=steps: pipeline.solve(own, noise, steps=steps, guidance=1.0))
        sweep["ours"].append({"steps": steps} | one)
    for steps in DDIM_STEPS:
        one = judged(lambda own, noise, steps=steps: ddim(pipeline, own, noise, ddim_sigmas(steps)))
        sweep["ddim"].append({"steps": steps} | one)
    return {
        **sweep, "solver": solver_words(pipeline.scheduler.config, pipeline.config.fitted),
        "class": pipeline.config.classes[label], "samples": SOLVER_SAMPLES, "n_real": len(rows),
        **equal_quality(sweep["ours"], sweep["ddim"]),
    }  # fmt: skip


def equal_quality(ours: list[dict[str, Any]], others: list[dict[str, Any]], steps: int = 50) -> dict[str, Any]:
    """The fewest of our steps from which on KID is no worse than DDIM's at `steps`, and how much faster they are.

    None where our KID never gets there.
    """
    other = next(item for item in others if item["steps"] == steps)
    if other["kid"] is None or any(item["kid"] is None for item in ours):
        return {"equal_steps": None, "times_faster": None}
    limit = other["kid"] + EQUAL_WITHIN * other["kid_half_width"]
    reached = None
    for item in sorted(ours, key=lambda item: -item["steps"]):
        if item["kid"] > limit:
            break
        reached = item
    if reached is None:
        return {"equal_steps": None, "times_faster": None}
    return {"equal_steps": reached["steps"], "times_faster": other["seconds"] / reached["seconds"]}


def ddim_sigmas(steps: int) -> np.ndarray:
    """Noise levels of DDIM with that many of 1000 linear-beta steps, float64 [steps + 1], the last 0.

    sigma = sqrt((1 - a) / a) with a the running product of 1 - beta (Song et al. 2021, arXiv 2010.02502, eq. 14); steps
    are evenly spaced from the last one of training down ("trailing"), beta from 1e-4 to 0.02.
    """
    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    chosen = np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1
    return np.append(np.sqrt((1 - alpha[chosen]) / alpha[chosen]), 0.0)


def ddim(pipeline: ClassConditionalPipeline, labels: Tensor, noise: Tensor, sigmas: np.ndarray) -> Tensor:
    """Deterministic DDIM of our network, [n, c, h, w]: in x / sqrt(a) and sigma it is Euler's step (eq. 13 there).

    x <- x + (sigma_next - sigma) · (x - D(x; sigma)) / sigma
    """
    import torch

    from synthaug.diffusion.edm import denoise
    from synthaug.diffusion.network import predict

    hints = torch.zeros(len(labels), pipeline.config.n_hints)
    pipeline.unet.eval()
    images = noise * float(sigmas[0])
    with torch.inference_mode():
        for sigma, after in itertools.pairwise(sigmas):
            level = torch.full((len(labels),), float(sigma))
            clean = denoise(
                lambda x, c: predict(pipeline.unet, x, c, labels, hints, pipeline.config.fold),
                images,
                level,
                pipeline.scheduler.config.sigma_data,
            )
            images = images + float(after - sigma) / float(sigma) * (images - clean)
    return images


def time_to_kid(points: dict[str, list[tuple[float, float]]]) -> dict[str, float | None]:
    """Smallest budget in minutes at which each method's KID is at most that of ours at its smallest budget.

    Args:
        points: Method to (minutes, KID), 'ours' among them.
    """
    if not points.get("ours"):
        return {}
    limit = min(points["ours"])[1]
    return {
        name: min((minutes for minutes, kid in found if kid <= limit), default=None) for name, found in points.items()
    }


def default_data() -> Path:
    """As the tests have it: beside the repository, or where SYNTHAUG_SHARED_DATA says."""
    return Path(os.environ.get("SYNTHAUG_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
