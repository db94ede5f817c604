"""What the programs of the learned peers have in common: the budget, drawing batches, tuning, timing, writing PNGs.

Imported as a sibling of the script that is run, since an environment of a peer has no synthaug; torch, numpy and Pillow
are all it takes. A job is a JSON file, written by `benchmarks.method.peers`:

    mode            "make": train, draw and write the samples within the budget; "speed": time a few steps of both
    images          .npz: images uint8 [n, h, w, c], labels int64 [n], heldout_images, heldout_labels
    classes         names, in order of label
    counts          label to number of samples wanted
    minutes         of training and sampling together (make)
    seconds         of each measurement (speed)
    sample_batch    images drawn at a time (speed), the same for all
    rates           learning rates to choose from by held-out loss; with one there is nothing to choose
    threads, seed
    out             folder for <class>/<number>.png (make)
    result          JSON file for what there is to tell
and what the method itself takes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A class with n images is drawn in proportion to n ** power: 1 as found. 0.5 is what our own base uses.
HELDOUT_IMAGES = 256
# Of the budget, for each learning rate that is tried; beside the budget, to the peer's advantage.
TUNING_SHARE, MOST_TUNING_SECONDS = 0.1, 60.0
# Sampling takes at most this share of the budget; what cannot be drawn then is missing, and told.
MOST_FOR_SAMPLING = 0.5
# What sampling takes is estimated from one step. Beside the margin, the last batches may run over the budget by this
# share: one that is short by a few samples would be short for no reason of the method's.
_MARGIN, _MOST_OVER = 1.1, 0.1
# Measuring a step may take this share of the time, three seconds at most; a batch of samples a tenth of the budget.
_SHARE_FOR_MEASURING, _MOST_SECONDS_OF_MEASURING, _MOST_OF_A_BATCH = 0.02, 3.0, 0.1
DDPM_STEPS, DDIM_STEPS = 1000, 50


class Learner:
    """A peer's own network, loss and sampler; the contest calls these and nothing else."""

    batch_size: int
    power: float
    sample_batch = 16
    steps_per_sample = DDIM_STEPS

    def __init__(self, job: dict[str, Any], size: int, channels: int, n_classes: int) -> None:
        raise NotImplementedError

    def build(self, rate: float, steps: int) -> None:
        """A new network with its optimizer, made for this many steps."""
        raise NotImplementedError

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimizer step on images [n, c, h, w] in [-1, 1]."""
        raise NotImplementedError

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss; its random numbers are torch's own."""
        raise NotImplementedError

    def average(self) -> None:
        """Take the averaged weights from here on."""
        raise NotImplementedError

    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        """Images [n, c, h, w], about [-1, 1]."""
        raise NotImplementedError

    def evaluate_once(self, labels: torch.Tensor) -> None:
        """What one step of the sampler asks of the network."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        raise NotImplementedError


def main(kind: type[Learner]) -> None:
    imported = _peak()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    data = Data(job)
    learner = kind(job, data.size, data.channels, len(job["classes"]))
    found = {"make": _make, "speed": _speed}[job["mode"]](learner, data, job)
    found |= {"parameters": learner.parameters, "peak_bytes": _peak(), "peak_bytes_of_imports": imported}
    found["torch"] = torch.__version__
    _write(Path(job["result"]), json.dumps(found))


class Data:
    def __init__(self, job: dict[str, Any]) -> None:
        with np.load(job["images"], allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
            heldout, heldout_labels = found["heldout_images"], found["heldout_labels"]
        self.images, self.labels = _unit(images), torch.from_numpy(labels)
        order = np.random.default_rng(job["seed"]).permutation(len(heldout))[:HELDOUT_IMAGES]
        self.heldout, self.heldout_labels = _unit(heldout[order]), torch.from_numpy(heldout_labels[order])
        self.size, self.channels = images.shape[1], images.shape[3]

    def batch(self, size: int, power: float) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.bincount(self.labels).double()
        shares = counts[self.labels] ** (power - 1)
        rows = torch.multinomial(shares, size, replacement=True)
        return self.images[rows], self.labels[rows]


def _unit(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def _make(learner: Learner, data: Data, job: dict[str, Any]) -> dict[str, Any]:
    budget = 60 * job["minutes"]
    rates, tuned, tuning = list(job["rates"]), {}, 0.0
    if len(rates) > 1:
        started = time.monotonic()
        each = min(TUNING_SHARE * budget, MOST_TUNING_SECONDS)
        tuned = {rate: _try_rate(learner, data, rate, each) for rate in rates}
        tuning = time.monotonic() - started
    rate = min(tuned, key=lambda one: tuned[one]) if tuned else rates[0]
    begun = time.monotonic()
    wanted = _in_turn(job["counts"])
    first = wanted[: learner.sample_batch]
    once = _seconds_of(lambda: learner.evaluate_once(first), _measuring(budget), least=1)
    per_sample = once * learner.steps_per_sample / len(first)
    size = max(1, min(learner.sample_batch, int(_MOST_OF_A_BATCH * budget / max(per_sample, 1e-9))))
    reserve = min(_MARGIN * per_sample * len(wanted), MOST_FOR_SAMPLING * budget)
    steps, images = _train(learner, data, rate, budget - reserve - (time.monotonic() - begun))
    trained = time.monotonic()
    learner.average()
    drawn = []
    for start in range(0, len(wanted), size):
        labels = wanted[start : start + size]
        # The first batch is drawn whatever it takes, and no other is begun that the budget has no time for.
        if start and time.monotonic() - begun + per_sample * len(labels) > (1 + _MOST_OVER) * budget:
            break
        before = time.monotonic()
        drawn.append(learner.draw(labels).numpy())
        per_sample = max(per_sample, (time.monotonic() - before) / len(labels))
    ended = time.monotonic()
    values = np.concatenate(drawn)
    _write_pictures(values, wanted[: len(values)].tolist(), job["classes"], Path(job["out"]))
    return {
        "rate": rate,
        "tuned": {str(one): loss if np.isfinite(loss) else None for one, loss in tuned.items()},
        "tuning_seconds": tuning,
        "training_seconds": trained - begun,
        "sampling_seconds": ended - trained,
        "training_steps": steps,
        "training_images": images,
        "n_wanted": len(wanted),
        "n_drawn": len(values),
        "samples_per_second": len(values) / (ended - trained),
        "sampler_steps": learner.steps_per_sample,
    }


def _measuring(seconds: float) -> float:
    return min(_MOST_SECONDS_OF_MEASURING, _SHARE_FOR_MEASURING * seconds)


def _in_turn(counts: dict[str, int]) -> torch.Tensor:
    """Labels of the samples, classes in turn, so that each has its share where time is short."""
    left = {int(label): int(number) for label, number in counts.items() if number > 0}
    labels = []
    while left:
        for label in list(left):
            labels.append(label)
            left[label] -= 1
            if not left[label]:
                del left[label]
    return torch.tensor(labels, dtype=torch.long)


def _train(learner: Learner, data: Data, rate: float, seconds: float) -> tuple[int, int]:
    """Train until the time is over; returns steps and images. The steps for the schedule are counted from a few."""
    started = time.monotonic()
    learner.build(rate, 10)
    own = _seconds_of(lambda: learner.step(*data.batch(learner.batch_size, learner.power)), _measuring(seconds))
    left = seconds - (time.monotonic() - started)
    total = max(1, int(left / own))
    learner.build(rate, total)
    done = 0
    while done < total and time.monotonic() - started < seconds:
        learner.step(*data.batch(learner.batch_size, learner.power))
        done += 1
    return done, done * learner.batch_size


def _try_rate(learner: Learner, data: Data, rate: float, seconds: float) -> float:
    """Held-out loss after a short training at this rate, averaged weights; endless where it is not a number."""
    torch.manual_seed(0)
    _train(learner, data, rate, seconds)
    learner.average()
    torch.manual_seed(1)
    with torch.inference_mode():
        parts = [
            float(learner.loss(data.heldout[start : start + 64], data.heldout_labels[start : start + 64]))
            for _ in range(4)
            for start in range(0, len(data.heldout), 64)
        ]
    found = float(np.mean(parts)) if parts else 0.0
    return found if np.isfinite(found) else float("inf")


def _speed(learner: Learner, data: Data, job: dict[str, Any]) -> dict[str, Any]:
    learner.build(job["rates"][0], 100)
    batch = data.batch(learner.batch_size, learner.power)
    step = _seconds_of(lambda: learner.step(*data.batch(learner.batch_size, learner.power)), job["seconds"], least=2)
    flops = _flops(lambda: learner.loss(*batch).backward()) / learner.batch_size
    learner.average()
    labels = torch.zeros(job["sample_batch"], dtype=torch.long)
    once = _seconds_of(lambda: learner.evaluate_once(labels), job["seconds"], least=2)
    with torch.inference_mode():
        flops_once = _flops(lambda: learner.evaluate_once(labels[:2])) / 2
    per_second = len(labels) / (once * learner.steps_per_sample)
    found = {
        "batch_size": learner.batch_size,
        "training_images_per_second": learner.batch_size / step,
        "training_flops_per_image": flops,
        "training_flops_per_second": flops * learner.batch_size / step,
        "samples_per_second": per_second,
        "sampler": f"{learner.steps_per_sample} DDIM steps, from steps of {len(labels)} images",
        "sampling_flops_per_second": flops_once * len(labels) / once,
    }
    if job.get("ddpm_seconds"):
        found["ddpm"] = _ancestral(learner, labels, job["ddpm_seconds"])
    return found


def _ancestral(learner: Learner, labels: torch.Tensor, seconds: float) -> dict[str, Any]:
    """A batch by the 1000-step sampler: as many of its steps as there is time for, the rest extrapolated."""
    done, started = 0, time.monotonic()
    while done < DDPM_STEPS and (time.monotonic() - started < seconds or done < 2):
        learner.evaluate_once(labels)
        done += 1
    taken = time.monotonic() - started
    return {
        "samples": len(labels),
        "steps": DDPM_STEPS,
        "steps_timed": done,
        "seconds_timed": taken,
        "extrapolated": done < DDPM_STEPS,
        "samples_per_second": len(labels) / (taken / done * DDPM_STEPS),
    }


def _seconds_of(work: Callable[[], Any], seconds: float, *, least: int = 2) -> float:
    """Median seconds of a call, the first one left out."""
    work()
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < least or (time.monotonic() - begun < seconds and len(times) < 200):
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return float(np.median(times))


def _flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of a call by torch's counter: two for each multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _write_pictures(values: np.ndarray, labels: list[int], classes: list[str], out: Path) -> None:
    from PIL import Image

    pixels = np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = out / re.sub(r"[/\0]", "_", classes[label])
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(folder / f"{number:06d}.png")


def _peak() -> int:
    """Bytes of memory at most so far. Not of getrusage, which goes on from the process that started this one."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
