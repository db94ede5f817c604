"""The training loop: phases of steps, a moving average of the weights, held-out loss, and a state to go on from.

Everything random in a step follows from (seed, phase, step) alone, so that an interrupted run that goes on
from its last state does exactly what an uninterrupted one would have done.

The same loop runs in one process and in several (`synthaug.generators.processes`). Several take a slice each of the
batch that all of them draw; the first one keeps the moving average, evaluates and writes states, and tells the others
what decides how they go on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from synthaug.config import TrainConfig
from synthaug.diffusion.augment import N_HINTS, augment
from synthaug.diffusion.edm import denoising_loss, training_sigmas
from synthaug.diffusion.muon import muon
from synthaug.diffusion.network import predict
from synthaug.errors import TrainingError
from synthaug.formats.atomic import whole_file
from synthaug.generators.interface import TrainingData
from synthaug.progress import progress

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
EVALUATIONS_PER_PHASE = 12
LEAST_STEPS_BETWEEN_EVALUATIONS = 25
# States are large (five copies of the network); writing one must stay cheap beside the steps it saves. A long phase
# writes one by the clock, a short one by its share of the steps, so that a run that is killed repeats no more.
SECONDS_BETWEEN_STATES = 15.0
STATES_PER_PHASE = 10
_WARM_UP_SHARE = 0.05
_HELDOUT_DRAWS_PER_CLASS = 64
_LARGEST_GRADIENT_NORM = 1.0
_CALIBRATION_SECONDS = 6.0
_BUDGET_USED = "the budget was used"


@dataclass(frozen=True)
class Phase:
    name: str
    images: int
    learning_rate: float
    # A class with n images is drawn in proportion to n ** class_power: 1 as found, 0 all classes alike.
    class_power: float


@dataclass
class Result:
    weights: dict[str, Tensor]  # the moving average at the best held-out loss; empty if it broke down before any
    losses: dict[str, float]  # class name to held-out loss of `weights`
    images_seen: int
    stopped: str


def step_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from anything that names a place in the run."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class HeldOut:
    """A fixed set of held-out images, noise levels and noise; the same at every evaluation, so that
    differences between two losses are differences between two networks."""

    def __init__(self, data: TrainingData, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(step_seed(seed, "held-out"))
        images, labels, sigmas = [], [], []
        for label in np.unique(data.heldout_labels):
            rows = data.heldout_rows[data.heldout_labels == label]
            order = torch.randperm(len(rows), generator=generator).numpy()
            chosen = np.resize(rows[order], _HELDOUT_DRAWS_PER_CLASS)
            images.append(load_unit(data, chosen))
            labels.append(torch.full((len(chosen),), int(label)))
            sigmas.append(training_sigmas(len(chosen), generator))
        self.labels = torch.cat(labels).to(device)
        self.images = torch.cat(images).to(device)
        self.sigmas = torch.cat(sigmas).to(device)
        self.noise = torch.randn(self.images.shape, generator=generator).to(device)

    @torch.inference_mode()
    def losses(self, unet: UNet2DModel, classes: tuple[str, ...], sigma_data: float, fold: int) -> dict[str, float]:
        """Class name to mean loss."""
        loss = image_losses(unet, self.images, self.labels, self.noise, self.sigmas, sigma_data, fold).cpu()
        own = self.labels.cpu()
        return {classes[int(label)]: float(loss[own == label].mean()) for label in own.unique()}


@torch.inference_mode()
def image_losses(
    unet: UNet2DModel, images: Tensor, labels: Tensor, noise: Tensor, sigmas: Tensor, sigma_data: float, fold: int
) -> Tensor:
    """Return the denoising loss of each image as it is, [n], in pieces; the network is left in evaluation.

    Args:
        images: [n, channels, size, size] in [-1, 1].
        labels: [n].
        noise: Unit normal, of the images' shape or [1, channels, size, size] for all of them.
        sigmas: Noise levels [n].
    """
    unet.eval()
    noise = noise.expand_as(images)
    parts = []
    for start in range(0, len(labels), 256):
        piece = slice(start, start + 256)
        hints = torch.zeros(len(labels[piece]), N_HINTS, device=labels.device)
        network = partial(_predict_for, unet, labels[piece], hints, fold)
        parts.append(denoising_loss(network, images[piece], noise[piece], sigmas[piece], sigma_data))
    return torch.cat(parts)


def _predict_for(unet: Any, labels: Tensor, hints: Tensor, fold: int, scaled: Tensor, c_noise: Tensor) -> Tensor:
    # Mixed precision ends here: the loss is a small difference of large numbers.
    return predict(unet, scaled, c_noise, labels, hints, fold).float()


def load_unit(data: TrainingData, rows: np.ndarray) -> Tensor:
    """Rows of the images as float32 [n, channels, size, size] in [-1, 1]."""
    return torch.from_numpy(data.pixels.to_unit(data.images[rows])).permute(0, 3, 1, 2).contiguous()


def repeats(data: TrainingData, phases: Sequence[Phase]) -> np.ndarray:
    """How often the phases together draw an image of each class, [classes]; 0 for one without images."""
    drawn = np.zeros(len(data.rows))
    for phase in phases:
        share = _shares(data, phase.class_power)
        drawn += phase.images * share / share.sum()
    return np.array(
        [
            drawn[data.labels == label].mean() if (data.labels == label).any() else 0.0
            for label in range(len(data.classes))
        ]
    )


def _shares(data: TrainingData, power: float) -> np.ndarray:
    """Weight of each image in `data.rows` where a class with n images is drawn in proportion to n ** power."""
    counts = np.bincount(data.labels, minlength=len(data.classes)).astype(np.float64)
    # A class that is left out has no image, and no share that anything would read.
    return (np.maximum(counts, 1) ** (power - 1))[data.labels]


class Trainer:
    """Runs phases over one network. `workdir` holds the state to go on from."""

    def __init__(
        self,
        unet: UNet2DModel,
        data: TrainingData,
        settings: TrainConfig,
        *,
        seed: int,
        fold: int,
        sigma_data: float,
        accelerator: Accelerator,
        workdir: Path,
        begun: float | None = None,
    ) -> None:
        self.data, self.settings, self.seed, self.fold, self.sigma_data = data, settings, seed, fold, sigma_data
        self.accelerator, self.workdir = accelerator, workdir
        self.unet = unet.to(accelerator.device)
        # Once: what averages gradients between processes leaves its hooks in the network.
        self._model = self._prepared(self.unet)
        self.leads = accelerator.is_main_process
        self.holds_out = len(data.heldout_rows) > 0
        self.heldout = HeldOut(data, seed, accelerator.device) if self.holds_out and self.leads else None
        # Probability of augmentation by label; `plan` lowers it for classes that need none.
        self.augmented = torch.full((len(data.classes),), settings.augment.probability)
        self.log: list[dict[str, Any]] = []
        self.images_seen = 0
        # What earlier stretches of an interrupted training took, as far as it was kept; this one's begin.
        self.seconds_before = 0.0
        self._begun = time.monotonic() if begun is None else begun

    def seconds(self) -> float:
        """Seconds that the training took so far, all its stretches together."""
        return self.seconds_before + time.monotonic() - self._begun

    def plan(self, phases: Sequence[Phase]) -> None:
        """Say which phases will be run: classes whose images they draw too seldom are not augmented."""
        seldom = repeats(self.data, phases) < self.settings.augment.from_repeats
        self.augmented = torch.where(torch.from_numpy(seldom), 0.0, self.settings.augment.probability)

    def measure_rate(self) -> float:
        """Training images a second, from the median of a few steps on a copy that is thrown away."""
        unet = copy.deepcopy(self.unet)
        several = self.accelerator.num_processes > 1
        model = self._prepared(unet) if several or self.settings.compile is not None else unet
        optimizer, ema = self._optimizer(unet, 1e-4), EMAModel(unet.parameters(), foreach=True)
        phase = Phase("measurement", 0, 1e-4, 0.5)
        times: list[float] = []
        begun = time.monotonic()
        # The first step is slow; compiled ones are compiled in it, and recorded as a CUDA graph in the next.
        first = 1 if self.settings.compile is None else 4
        # A clock is one process's own: the first one's decides for all.
        while len(times) < first + 2 or self.agreed(
            time.monotonic() - begun < _CALIBRATION_SECONDS and len(times) < 40
        ):
            started = time.monotonic()
            self._step(model, optimizer, ema, phase, len(times))
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - started)
            if len(times) == first and self.settings.compile is not None:
                begun = time.monotonic()
        self.accelerator.free_memory()
        return self.settings.batch_size / float(np.median(times[first:]))

    def run(self, phase: Phase) -> Result:
        """Train through a phase and return the best weights by the held-out loss of the scarce classes."""
        settings = self.settings
        steps = max(1, math.ceil(phase.images / settings.batch_size))
        every = max(LEAST_STEPS_BETWEEN_EVALUATIONS, steps // EVALUATIONS_PER_PHASE)
        states = math.ceil(steps / STATES_PER_PHASE)
        unet, optimizer = self._model, self.accelerator.prepare(self._optimizer(self.unet, phase.learning_rate))
        ema = EMAModel(self._bare(unet).parameters(), foreach=True)
        averaged = copy.deepcopy(self._bare(unet)) if self.leads else None
        best = Result(weights={}, losses={}, images_seen=0, stopped=_BUDGET_USED)
        best_loss, without_gain, first = math.inf, 0, 0
        state = self._load_state(phase)
        if state is not None:
            first, best_loss, without_gain = state["step"], state["best_loss"], state["without_gain"]
            best.weights, best.losses = state["best"], state["losses"]
            self._restore(unet, optimizer, ema, state)
            logger.info("%s goes on from step %d of %d", phase.name, first, steps)
            if without_gain >= settings.patience:
                # It had ended already, before what came after it was kept.
                first, best.stopped = steps, _no_gain(without_gain, phase)

        saved, saved_step = time.monotonic(), first

        def keep(step: int) -> None:
            nonlocal saved, saved_step
            if step - saved_step >= states or time.monotonic() - saved >= SECONDS_BETWEEN_STATES:
                self._save_state(
                    phase, unet, optimizer, ema, step=step, best=best, best_loss=best_loss, gain=without_gain
                )
                saved, saved_step = time.monotonic(), step

        with progress(f"train, {phase.name}", steps * settings.batch_size, "images") as bar:
            bar.update(first * settings.batch_size)
            for step in range(first, steps):
                self._set_rate(optimizer, phase, step, steps)
                # Half of the average's weight lies in the last ema_half_life share of the phase so far.
                ema.decay = 0.5 ** (1 / max(1.0, settings.ema_half_life * (step + 1)))
                loss = self._step(unet, optimizer, ema, phase, step)
                if not math.isfinite(loss):
                    best.stopped = f"the loss was {loss} at step {step} of the {phase.name}"
                    break
                self.images_seen += settings.batch_size
                bar.update(settings.batch_size)
                if (step + 1) % every and step + 1 != steps:
                    keep(step + 1)
                    continue

                losses: dict[str, float] = {}
                if averaged is not None:
                    ema.copy_to(averaged.parameters())
                    losses = self._evaluate(averaged)
                judged = self.agreed(self._judged(losses))
                if not math.isfinite(judged):
                    best.stopped = f"the held-out loss was {judged} after step {step} of the {phase.name}"
                    break
                self.log.append(
                    {"phase": phase.name, "step": step + 1, "images": self.images_seen, "loss": loss}
                    | {"heldout": judged if self.holds_out else None, "learning_rate": optimizer.param_groups[0]["lr"]}
                )
                bar.note(f"held-out {judged:.4f}" if self.holds_out else f"loss {loss:.4f}")
                if judged < best_loss or not self.holds_out:
                    best_loss, without_gain = judged, 0
                    if averaged is not None:
                        best.weights = {name: value.clone() for name, value in averaged.state_dict().items()}
                        best.losses = losses
                else:
                    without_gain += 1
                keep(step + 1)
                if without_gain >= settings.patience:
                    best.stopped = _no_gain(without_gain, phase)
                    break
        if best.stopped != _BUDGET_USED:
            logger.warning("%s ended early: %s", phase.name, best.stopped)
        best.images_seen = self.images_seen
        return best

    def losses(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Held-out loss of given weights by class; empty without held-out images, and in all but the first process."""
        unet = copy.deepcopy(self.unet)
        unet.load_state_dict(weights)
        return self._evaluate(unet)

    def _evaluate(self, unet: UNet2DModel) -> dict[str, float]:
        if self.heldout is None:
            return {}
        return self.heldout.losses(unet, self.data.classes, self.sigma_data, self.fold)

    def agreed(self, value: float) -> float:
        """What the first process says `value` is, in all of them. Each must ask at the same place."""
        if self.accelerator.num_processes == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(broadcast(told, from_process=0).item())

    def _judged(self, losses: dict[str, float]) -> float:
        return judged_loss(losses, [self.data.classes[label] for label in self.data.scarce])

    def _step(self, unet: Any, optimizer: Any, ema: EMAModel, phase: Phase, step: int) -> float:
        """Take a step; return the loss. The network stays as it was where that is no number."""
        with _said_of_compiling(self.settings):
            loss = self._loss(unet, phase, step)
        # Of the whole batch: what one process breaks down at, all of them do.
        mean_loss = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if math.isfinite(mean_loss):
            with _said_of_compiling(self.settings):
                self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(unet.parameters(), _LARGEST_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if self.leads:
                ema.step(self._bare(unet).parameters())
        return mean_loss

    def _loss(self, unet: Any, phase: Phase, step: int) -> Tensor:
        settings, device = self.settings, self.accelerator.device
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        # For dropout, which knows no generator of its own; no two processes drop the same.
        own = [] if processes == 1 else [index]
        torch.manual_seed(step_seed(self.seed, phase.name, step, "dropout", *own))
        generator = torch.Generator().manual_seed(step_seed(self.seed, phase.name, step, "draws"))
        chosen = self._choose(phase.class_power, generator)
        # Several processes make the same draws and take a slice each: the batch does not depend on who draws what.
        whole, part = len(chosen), slice(index, None, processes)
        labels = torch.from_numpy(self.data.labels[chosen])
        images, hints = augment(
            load_unit(self.data, self.data.rows[chosen[part]]),
            self.augmented[labels],
            settings.augment.flips,
            generator,
            whole=whole,
            part=part,
        )
        nobody = torch.rand(whole, generator=generator) < settings.label_dropout
        labels = torch.where(nobody, torch.full_like(labels, len(self.data.classes)), labels)
        sigma = training_sigmas(whole, generator)
        noise = torch.randn((whole, *images.shape[1:]), generator=generator)
        images, hints, labels, sigma, noise = (
            tensor.to(device, non_blocking=True) for tensor in (images, hints, labels[part], sigma[part], noise[part])
        )
        unet.train()
        with self.accelerator.autocast():
            losses = denoising_loss(
                lambda x, c: predict(unet, x, c, labels, hints, self.fold).float(),
                images,
                noise,
                sigma,
                self.sigma_data,
            )
        return losses.mean()

    def _choose(self, power: float, generator: torch.Generator) -> np.ndarray:
        """Positions in `data.rows` of a batch: class in proportion to count ** power, image uniform within it."""
        cumulative = np.cumsum(_shares(self.data, power))
        draws = torch.rand(self.settings.batch_size, generator=generator, dtype=torch.float64).numpy()
        return np.searchsorted(cumulative, draws * cumulative[-1], side="right").clip(max=len(cumulative) - 1)

    def _optimizer(self, unet: UNet2DModel, rate: float) -> torch.optim.Optimizer:
        return muon(unet, rate)

    def _set_rate(self, optimizer: Any, phase: Phase, step: int, steps: int) -> None:
        warm_up = max(1.0, _WARM_UP_SHARE * steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * min(1.0, (step + 1) / warm_up) * cosine

    def _prepared(self, unet: UNet2DModel) -> Any:
        model = self.accelerator.prepare(unet)
        # Not by accelerate's own plugin: what its first use in a process says would hold for all trainings of it.
        return model if self.settings.compile is None else torch.compile(model, mode=self.settings.compile)

    def _bare(self, unet: Any) -> UNet2DModel:
        bare: UNet2DModel = self.accelerator.unwrap_model(unet, keep_torch_compile=False)
        return bare

    # -- the state of an interrupted phase: one safetensors file, its numbers in the header --

    def _save_state(
        self,
        phase: Phase,
        unet: Any,
        optimizer: Any,
        ema: EMAModel,
        *,
        step: int,
        best: Result,
        best_loss: float,
        gain: int,
    ) -> None:
        if not self.leads:
            return
        tensors = {f"unet.{name}": value for name, value in self._bare(unet).state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in best.weights.items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(ema.shadow_params)}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        numbers = {
            "phase": [phase.name, phase.images, phase.learning_rate],
            "step": step,
            "best_loss": best_loss,
            "without_gain": gain,
            "losses": best.losses,
            "images_seen": self.images_seen,
            "seconds": self.seconds(),
            "ema_step": ema.optimization_step,
            "log": self.log,
        }
        with whole_file(self.workdir / STATE_FILE) as path:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                path,
                metadata={"state": json.dumps(numbers)},
            )

    def _load_state(self, phase: Phase) -> dict[str, Any] | None:
        path = self.workdir / STATE_FILE
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            if state["phase"] != [phase.name, phase.images, phase.learning_rate]:
                return None
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        for group in ("unet", "best", "ema", "optimizer"):
            state[group] = {name[len(group) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{group}.")}
        self.images_seen, self.log = state["images_seen"], state["log"]
        self.seconds_before = state.get("seconds", 0.0)
        return state

    def _restore(self, unet: Any, optimizer: Any, ema: EMAModel, state: dict[str, Any]) -> None:
        self._bare(unet).load_state_dict(state["unet"])
        device = self.accelerator.device
        ema.shadow_params = [state["ema"][str(index)].to(device) for index in range(len(state["ema"]))]
        ema.optimization_step = state["ema_step"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = value
        plain = optimizer.state_dict()
        optimizer.load_state_dict({**plain, "state": moments})


def _no_gain(evaluations: int, phase: Phase) -> str:
    return f"no better held-out loss in {evaluations} evaluations of the {phase.name}"


@contextmanager
def _said_of_compiling(settings: TrainConfig) -> Iterator[None]:
    if settings.compile is None:
        yield
        return
    # Takes seconds to read, and nothing else wants it.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        words = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:300]
        raise TrainingError(
            f"train.compile is {settings.compile}, and torch could not compile the network here: {words}. Where a "
            "compiler is missing, install one (g++ or what CXX names; on a GPU Triton too), or leave train.compile out."
        ) from error


def judged_loss(losses: dict[str, float], scarce: list[str]) -> float:
    """The figure that decides between checkpoints: the mean over the scarce classes; over all if none is held out."""
    if not losses:
        return 0.0
    own = [losses[name] for name in scarce if name in losses]
    return float(np.mean(own or list(losses.values())))
