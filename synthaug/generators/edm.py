"""The generator of this package: a diffusion model with the preconditioning of EDM on a folded U-Net.

A base is trained on all classes (or taken from the user), then tuned with all classes drawn alike: the scarce
ones come up more often, but never alone, since a network tuned on a few dozen images learns them by heart.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthaug.config import DPConfig, TrainConfig
from synthaug.diffusion.augment import N_HINTS
from synthaug.diffusion.network import build_unet, choose_fold, choose_width, use_fast_dropout
from synthaug.diffusion.pipeline import ClassConditionalPipeline, build_solver
from synthaug.diffusion.training import Phase, Trainer, image_losses, judged_loss, load_unit, step_seed
from synthaug.errors import CheckpointError, TrainingError
from synthaug.formats.atomic import whole_directory, write_text
from synthaug.generators import resolve_device
from synthaug.generators.interface import FitReport, Generator, TrainingData
from synthaug.records import PixelSpec

logger = logging.getLogger(__name__)

BUDGET_FILE = "budget.json"
BASE_DIR = "base"
# Share of the minutes that goes into steps; the rest is evaluation, checkpoints and loading.
_SHARE_FOR_STEPS = 0.9
# The base draws a class with n images in proportion to n ** 0.5: as found, 60 images among 3,500 would be seen
# too rarely to be learned at all.
_BASE_CLASS_POWER = 0.5


class EDMGenerator(Generator):
    name: ClassVar[str] = "edm"
    # By the weights that the checkpoint holds for that number of evaluations, or by those of DPM-Solver++.
    solver: ClassVar[str] = "LinearMultistep"
    trains_privately: ClassVar[bool] = True
    trains_in_processes: ClassVar[bool] = True
    loss_levels: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.4)

    def __init__(self, pipeline: ClassConditionalPipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def fit(
        cls, data: TrainingData, settings: TrainConfig, *, seed: int, workdir: Path, dp: DPConfig | None = None
    ) -> tuple[Self, FitReport]:
        started = time.monotonic()
        accelerator = _accelerator(settings)
        if dp is not None:
            return cls._fit_privately(data, settings, dp, seed, accelerator.device)
        torch.manual_seed(step_seed(seed, "weights"))
        if settings.base is None:
            pipeline = _new_pipeline(data, settings)
        else:
            pipeline = _adopt(_load_pipeline(settings.base, settings.base_revision), data, settings.base)
        trainer = Trainer(
            pipeline.unet,
            data,
            settings,
            seed=seed,
            fold=pipeline.config.fold,
            sigma_data=pipeline.scheduler.config.sigma_data,
            accelerator=accelerator,
            workdir=workdir,
            begun=started,
        )
        budget, budget_from = _budget(trainer, settings, workdir)
        tune_images = budget if settings.base is not None else int(settings.fine_tune_share * budget)
        base = Phase("base", budget - tune_images, settings.learning_rate, _BASE_CLASS_POWER)
        tuning = Phase("fine-tuning", tune_images, settings.fine_tune_learning_rate, 0.0)
        if settings.base is None:
            # A base has drawn images too, these or others, and nothing says how often.
            trainer.plan([base, tuning])
        base_weights, base_losses, stopped = _base(trainer, settings, base, workdir)
        weights, losses, kept = base_weights, base_losses, "base"
        tuned_losses: dict[str, float] = {}
        if tune_images:
            pipeline.unet.load_state_dict(base_weights)
            tuned = trainer.run(tuning)
            tuned_losses, stopped = tuned.losses, tuned.stopped
            scarce = [data.classes[label] for label in data.scarce]
            if tuned.weights and (not losses or judged_loss(tuned_losses, scarce) < judged_loss(losses, scarce)):
                weights, losses, kept = tuned.weights, tuned_losses, "fine-tuned"
        pipeline.unet.load_state_dict(weights)
        if trainer.leads and _fits_solver(settings, budget):
            pipeline.fit_solver()
        seconds = trainer.seconds()
        report = FitReport(
            parameters=sum(parameter.numel() for parameter in pipeline.unet.parameters()),
            images_budget=budget,
            images_seen=trainer.images_seen,
            budget_from=budget_from,
            kept="fine-tuned" if kept == "fine-tuned" else "base",
            stopped=stopped,
            seconds=seconds,
            images_per_second=trainer.images_seen / seconds,
            # accelerate numbers the processor among several processes, as if it were one of many.
            device="cpu" if accelerator.device.type == "cpu" else str(accelerator.device),
            processes=accelerator.num_processes,
            heldout_loss_base=base_losses,
            heldout_loss_tuned=tuned_losses,
            log=trainer.log,
        )
        return cls(pipeline), report

    @classmethod
    def _fit_privately(
        cls, data: TrainingData, settings: TrainConfig, dp: DPConfig, seed: int, device: torch.device
    ) -> tuple[Self, FitReport]:
        from synthaug.diffusion.private import PRIVATE_SIGMA_DATA, plan_privacy, train_private

        started = time.monotonic()
        guarantee = plan_privacy(len(data.rows), settings, dp)
        logger.warning(
            "training with differential privacy: epsilon %.3g, delta %.2g, noise %.3g times the clipped gradient, %d "
            "steps on %d images. It is experimental, slow, and with so few images most of what they show is lost.",
            guarantee.epsilon, guarantee.delta, guarantee.noise_multiplier, guarantee.steps, guarantee.n_images,
        )  # fmt: skip
        torch.manual_seed(step_seed(seed, "weights"))
        pipeline = _new_pipeline(data, settings, PRIVATE_SIGMA_DATA)
        result, log = train_private(
            pipeline.unet, data, settings, guarantee, seed=seed, fold=pipeline.config.fold, device=device
        )
        pipeline.unet.load_state_dict(result.weights)
        if _fits_solver(settings, settings.images or 0):
            # Looks at no image, so it takes nothing from the guarantee.
            pipeline.fit_solver()
        seconds = time.monotonic() - started
        report = FitReport(
            parameters=sum(parameter.numel() for parameter in pipeline.unet.parameters()),
            images_budget=settings.images or 0,
            images_seen=result.images_seen,
            budget_from="images",
            kept="base",
            stopped=result.stopped,
            seconds=seconds,
            images_per_second=result.images_seen / seconds,
            device=str(device),
            privacy=guarantee,
            heldout_loss_base=result.losses,
            log=log,
        )
        return cls(pipeline), report

    def save(self, directory: Path) -> None:
        self.pipeline.save_pretrained(directory, safe_serialization=True)

    @classmethod
    def load(cls, directory: Path, *, device: str) -> Self:
        pipeline = _load_pipeline(str(directory), None)
        pipeline.unet.to(device)
        return cls(pipeline)

    def default_steps(self, guidance: float) -> int:
        return self.pipeline.default_steps(guidance)

    def sample(self, labels: Sequence[int], seeds: Sequence[int], *, steps: int, guidance: float) -> np.ndarray:
        return self.pipeline([int(label) for label in labels], seeds, steps=steps, guidance=guidance)

    def denoising_losses(self, images: np.ndarray, labels: Sequence[int], *, draws: int, seed: int) -> np.ndarray:
        pipeline, n_classes = self.pipeline, len(self.pipeline.config.classes)
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels; each image needs one")
        if strange := [label for label in labels if not 0 <= label < n_classes]:
            raise ValueError(f"label {strange[0]} is out of range; this checkpoint has labels 0 to {n_classes - 1}")
        device = pipeline.device
        unit = torch.from_numpy(pipeline.spec.to_unit(images)).permute(0, 3, 1, 2).contiguous().to(device)
        own = torch.tensor([int(label) for label in labels], dtype=torch.long, device=device)
        result = torch.empty(len(images), len(self.loss_levels))
        sigma_data = pipeline.scheduler.config.sigma_data
        for column, level in enumerate(self.loss_levels):
            sigmas = torch.full((len(images),), level, device=device)
            total = torch.zeros(len(images), device=device)
            for draw in range(draws):
                generator = torch.Generator().manual_seed(step_seed(seed, "membership", f"{level:g}", draw))
                noise = torch.randn((1, *unit.shape[1:]), generator=generator).to(device)
                total += image_losses(pipeline.unet, unit, own, noise, sigmas, sigma_data, pipeline.config.fold)
            result[:, column] = (total / draws).cpu()
        return result.numpy()


def _fits_solver(settings: TrainConfig, budget: int) -> bool:
    """Whether a training of so many images is long enough; what its base has seen is not in the budget."""
    least = settings.fit_solver_from
    return least is not None and (settings.base is not None or budget >= least)


def _accelerator(settings: TrainConfig) -> Accelerator:
    torch.set_num_threads(settings.threads)
    cpu = resolve_device(settings.device) == "cpu"
    # Not that anything were unused: gradients are put into buckets anew after a first step otherwise, in which a run
    # that goes on from a state would add them up in another order than the one that was not interrupted.
    averaging = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=cpu, mixed_precision="no" if cpu else "bf16", kwargs_handlers=[averaging])


def untrained_unet(pixels: PixelSpec, n_classes: int, settings: TrainConfig) -> UNet2DModel:
    """The network that these settings train for images of this form.

    Raises:
        CheckpointError: train.fold does not divide the image size.
    """
    return build_unet(
        size=pixels.size,
        channels=pixels.channels,
        n_classes=n_classes,
        n_hints=N_HINTS,
        fold=_fold(pixels, settings),
        width=settings.width or choose_width(pixels.size),
        layers=settings.layers,
        dropout=settings.dropout,
    )


def _fold(pixels: PixelSpec, settings: TrainConfig) -> int:
    fold = settings.fold or choose_fold(pixels.size)
    if pixels.size % fold:
        raise CheckpointError(
            f"train.fold: {fold} does not divide image.size {pixels.size}; choose a divisor, or leave it out."
        )
    return fold


def _new_pipeline(
    data: TrainingData, settings: TrainConfig, sigma_data: float | None = None
) -> ClassConditionalPipeline:
    unet = untrained_unet(data.pixels, len(data.classes), settings)
    solver = build_solver(_root_mean_square(data) if sigma_data is None else sigma_data)
    pixels = data.pixels.model_dump(mode="json")
    return ClassConditionalPipeline(unet, solver, list(data.classes), pixels, _fold(data.pixels, settings), N_HINTS)


def _root_mean_square(data: TrainingData) -> float:
    """Of up to 2,000 training images as the network sees them; sigma_data of the paper, without its zero mean."""
    chosen = data.rows[np.linspace(0, len(data.rows) - 1, min(len(data.rows), 2000)).astype(int)]
    return float(load_unit(data, chosen).square().mean().sqrt().clamp(min=0.05))


def _budget(trainer: Trainer, settings: TrainConfig, workdir: Path) -> tuple[int, str]:
    """Training images, and where the number is from. Minutes are measured once and then remembered."""
    if settings.images is not None:
        return settings.images, "images"
    path = workdir / BUDGET_FILE
    if not trainer.agreed(path.exists()):
        rate = trainer.agreed(trainer.measure_rate())
        images = max(settings.batch_size, int(settings.minutes * 60 * _SHARE_FOR_STEPS * rate))
        words = f"{settings.minutes:g} minutes at {rate:.0f} images/s measured"
        if trainer.leads:
            write_text(path, json.dumps({"images": images, "from": words}))
        trainer.accelerator.wait_for_everyone()
        logger.info("the budget is %d images: %s", images, words)
    stored = json.loads(path.read_text(encoding="utf-8"))
    return int(stored["images"]), str(stored["from"])


def _base(
    trainer: Trainer, settings: TrainConfig, phase: Phase, workdir: Path
) -> tuple[dict[str, Tensor], dict[str, float], str]:
    """Weights, held-out losses and the reason the phase ended; a finished base is kept in `workdir`."""
    folder = workdir / BASE_DIR
    if settings.base is not None:
        weights = {name: value.clone() for name, value in trainer.unet.state_dict().items()}
        return weights, trainer.losses(weights), "a base was given"
    found = bool(trainer.agreed(folder.exists()))
    if not found:
        result = trainer.run(phase)
        if trainer.leads and not result.weights:
            raise TrainingError(
                f"training broke down before the first checkpoint: {result.stopped}. Lower train.learning_rate "
                f"(now {settings.learning_rate}) or look at the images for values out of line."
            )
        numbers: dict[str, Any] = {
            "losses": result.losses,
            "stopped": result.stopped,
            "images_seen": trainer.images_seen,
            "seconds": trainer.seconds(),
            "log": trainer.log,
        }
        if trainer.leads:
            weights = {name: value.cpu().contiguous() for name, value in result.weights.items()}
            with whole_directory(folder) as temporary:
                save_file(weights, temporary / "weights.safetensors")
                (temporary / "base.json").write_text(json.dumps(numbers), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
    numbers = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    trainer.images_seen, trainer.log = numbers["images_seen"], numbers["log"]
    if found:
        trainer.seconds_before = numbers.get("seconds", 0.0)
    return load_file(folder / "weights.safetensors"), numbers["losses"], numbers["stopped"]


def _load_pipeline(source: str, revision: str | None) -> ClassConditionalPipeline:
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} holds no model_index.json: it is not a diffusers pipeline folder.")
    # Two files need no bar of their own; a user's own setting is put back.
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(
            source, revision=revision, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the pipeline {source} cannot be loaded as a ClassConditionalPipeline with safetensors weights: {words}"
        ) from error
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
    return pipeline


def _adopt(base: ClassConditionalPipeline, data: TrainingData, source: str) -> ClassConditionalPipeline:
    """A base as a start for these classes: the network as it is, class embeddings carried over by name."""
    if base.config.pixels is None or base.config.n_hints != N_HINTS:
        raise CheckpointError(
            f"train.base {source} is not a checkpoint of this generator. Give the pipeline folder of a run "
            "(<output>/checkpoint), or leave train.base out."
        )
    theirs, ours = base.spec, data.pixels
    for what in ("channels", "size"):
        if getattr(theirs, what) != getattr(ours, what):
            raise CheckpointError(
                f"train.base {source} makes images with {what} {getattr(theirs, what)}, the data have "
                f"{getattr(ours, what)}. Choose another base, or set image.size and image.colour to match."
            )
    old, names = base.unet, list(base.config.classes)
    # Keys with an underscore say where the base lay, which is nobody's business.
    settings = {name: value for name, value in old.config.items() if not name.startswith("_")}
    settings["num_class_embeds"] = len(data.classes) + 1
    unet = UNet2DModel.from_config(settings)
    use_fast_dropout(unet)
    weights = old.state_dict()
    known = weights["class_embedding.weight"]
    # A class the base never saw starts where "no class" stands: at the average of what it knows.
    rows = [known[names.index(name)] if name in names else known[len(names)] for name in data.classes]
    weights["class_embedding.weight"] = torch.stack([*rows, known[len(names)]])
    unet.load_state_dict(weights)
    logger.info("base %s: %d of %d classes are known to it", source, len(set(names) & set(data.classes)), len(rows))
    return ClassConditionalPipeline(
        unet,
        # Its own may be of before, and needs more evaluations than a job asks for.
        build_solver(base.scheduler.config.sigma_data),
        list(data.classes),
        ours.model_dump(mode="json"),
        base.config.fold,
        base.config.n_hints,
    )
