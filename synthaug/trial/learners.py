"""One fit: a classifier trained by a recipe, and what it says of validation (and, for finalists, test) images.

The same arguments give the same result, however many fits run beside it: a fit on the processor has one thread.
On a GPU the last bits may differ.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from synthaug.digest import digest_json
from synthaug.errors import ConfigError, TrainingError
from synthaug.formats.atomic import whole_file
from synthaug.trial.data import Chosen, TrialData, load_trial
from synthaug.trial.entry import build, load_entry
from synthaug.trial.recipes import WEIGHT_DECAY, Recipe

# Augmented copies made at once, and how often each is used, so that two cores keep up with the network.
_POOL_IMAGES = 2048
_POOL_BYTES = 96 * 2**20
_POOL_USES = 3
_PIECE = 256
_WIDTH = 16
_LEARNING_RATE = 4e-3
# Fine-tuning on real images starts this much lower, so that it does not forget what it was pre-trained for.
_SECOND_RATE = 0.3
_MIXUP_ALPHA, _CUTMIX_ALPHA = 0.4, 1.0
# An estimator is given this many drawn images for every real training image, within bounds; the same in every arm.
_DRAWS_PER_IMAGE = 2
_LEAST_DRAWS, _MOST_DRAWS = 1000, 20_000
# All of them are in memory at once, and four times as many in the check on training.
_DRAW_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Fit:
    """One classifier to be trained; everything its result depends on but the images themselves."""

    recipe: Recipe
    seed: int
    steps: int
    batch_size: int
    trial: str = ""  # digest of the images of the trial
    classifier: str | None = None  # the user's own, see `synthaug.trial.entry`
    classifier_identity: str | None = None
    device: str = "cpu"
    test: bool = False  # finalists only

    @property
    def file_name(self) -> str:
        # Words about an arm may change without changing what it does.
        recipe = {name: value for name, value in self.recipe.plain().items() if name not in {"key", "words", "side"}}
        rest = [self.trial, self.seed, self.steps, self.batch_size, self.classifier_identity, self.device, self.test]
        return f"{digest_json([recipe, *rest])[:24]}.npz"


class Scores(NamedTuple):
    """Class probabilities, float32; `test` has no rows where the fit was not a finalist's."""

    validation: np.ndarray  # [n, n_classes]
    test: np.ndarray  # [n, n_classes]
    seconds: float = 0.0  # what the fit took, kept with it so that an interrupted trial counts its time on


def run_fit(directory: Path, fit: Fit) -> Scores:
    """Train and predict, or read what an earlier call left in `directory`/fits.

    Raises:
        TrainingError: The loss or a probability is not a number, or the user's classifier failed.
    """
    path = directory / "fits" / fit.file_name
    if path.is_file():
        with np.load(path, allow_pickle=False) as found:
            return Scores(found["validation"], found["test"], float(found["seconds"]))
    data = load_trial(directory)
    _import_first()
    started = time.monotonic()
    # An estimator's own threads would get in the way of the fits beside it, and change the last bits.
    with threadpool_limits(1):
        scores = _scores(data, fit)
    scores = scores._replace(seconds=time.monotonic() - started)
    if not all(np.isfinite(found).all() for found in scores):
        who = "the classifier" if fit.classifier is None else f"evaluate.classifier {fit.classifier}"
        raise TrainingError(
            f"{who} gave probabilities that are not numbers in the trial's arm '{fit.recipe.key}'. Look for extreme "
            "values in the images, and set image.value_range for floating-point ones."
        )
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, validation=scores.validation, test=scores.test, seconds=scores.seconds)
    return scores


def _import_first() -> None:
    """The seconds of a fit are a measure for the next one's; those of the imports come once a process."""
    import albumentations  # noqa: F401
    import torch  # noqa: F401


def applicable(recipe: Recipe, learner: Any) -> str | None:
    """Why a recipe cannot be tried with the user's classifier; None if it can, or where `learner` is None."""
    if learner is None or is_network(learner):
        return None
    if recipe.pretrain:
        return "a scikit-learn estimator is trained in one go"
    if recipe.weight_decay != WEIGHT_DECAY:
        return "a scikit-learn estimator has regularisation of its own"
    # Oversampling draws images of a lower weight less often, and needs no weights for it.
    weighted = recipe.added_weight != 1 and recipe.loss != "oversampling"
    if (recipe.loss == "class weights" or recipe.mix != "none" or weighted) and not _takes_weights(learner):
        return f"{type(learner).__name__} takes no sample_weight"
    return None


def estimator_draws(n_train: int, size: int, channels: int) -> int:
    """How many drawn images an estimator is trained on, in every arm."""
    most = min(_MOST_DRAWS, _DRAW_BYTES // (4 * size**2 * channels))
    return int(np.clip(_DRAWS_PER_IMAGE * n_train, min(_LEAST_DRAWS, most), most))


def own_classifier(classifier: str, form: tuple[int, int, int]) -> Any:
    """The user's torch module or scikit-learn estimator, new.

    Raises:
        ConfigError: It cannot be imported, or is neither.
    """
    try:
        learner = build(load_entry(classifier, "evaluate.classifier"), *form)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"evaluate.classifier {classifier} failed when it was called with channels, size, n_classes = {form}: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not is_network(learner) and not all(hasattr(learner, name) for name in ("fit", "predict_proba", "get_params")):
        raise ConfigError(
            f"evaluate.classifier {classifier} gave a {type(learner).__name__}: a torch module, or a scikit-learn "
            "estimator with fit, predict_proba and get_params, is wanted."
        )
    return learner


def is_network(learner: Any) -> bool:
    from torch import nn

    return isinstance(learner, nn.Module)


Predict = Callable[[str], np.ndarray]


def _scores(data: TrialData, fit: Fit) -> Scores:
    def by(predict: Predict) -> Scores:
        test = predict("test") if fit.test else np.empty((0, data.n_classes), np.float32)
        return Scores(predict("validation"), test)

    if fit.classifier is None:
        return by(_train_network(data, fit, None))
    learner = own_classifier(fit.classifier, (data.channels, data.size, data.n_classes))
    try:
        return by(_train_network(data, fit, learner) if is_network(learner) else _train_estimator(data, fit, learner))
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(
            f"evaluate.classifier {fit.classifier} failed in the arm '{fit.recipe.key}': {type(error).__name__}: "
            f"{error}."
        ) from error


def _train_network(data: TrialData, fit: Fit, network: Any) -> Predict:
    import torch

    from synthaug.quality.arithmetic import torch_threads
    from synthaug.quality.classifier import ResidualNetwork

    recipe = fit.recipe
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        if network is None:
            network = ResidualNetwork(data.channels, data.size, data.n_classes, _WIDTH)
        elif fit.classifier is not None:
            # A factory may hand out one and the same module, which no fit may leave trained to the next.
            network = copy.deepcopy(own_classifier(fit.classifier, (data.channels, data.size, data.n_classes)))
        network = network.to(fit.device)
        random = np.random.default_rng([fit.seed, 0x7A1])
        first = fit.steps // 2 if recipe.pretrain else fit.steps
        chosen = data.training(recipe, fit.seed)
        _optimise(network, data, fit, chosen, first, _LEARNING_RATE, random)
        if recipe.pretrain:
            real = data.training(recipe, fit.seed, real_only=True)
            _optimise(network, data, fit, real, fit.steps - first, _LEARNING_RATE * _SECOND_RATE, random)
    network.eval()
    present = np.unique(chosen.labels)
    columns = torch.from_numpy(present).to(fit.device)

    def predict(use: str) -> np.ndarray:
        everything = data.everything(use)
        found = np.zeros((len(everything), data.n_classes), dtype=np.float32)
        with torch_threads(1), torch.no_grad():
            for start in range(0, len(everything), _PIECE):
                positions = np.arange(start, min(start + _PIECE, len(everything)))
                logits = network(_to_tensor(_to_float(data, everything, positions)).to(fit.device))[:, columns]
                found[positions[:, None], present] = torch.softmax(logits.float(), 1).cpu().numpy()
        return found

    return predict


def _optimise(
    network: Any, data: TrialData, fit: Fit, chosen: Chosen, steps: int, rate: float, random: np.random.Generator
) -> None:
    import torch
    from torch.nn import functional

    recipe = fit.recipe
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    counts = np.bincount(chosen.labels, weights=chosen.weights, minlength=data.n_classes)
    # A class without an image is left out of the loss, as it is left out of what is predicted.
    present, targets = np.unique(chosen.labels, return_inverse=True)
    counts = counts[present]
    prior = torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32)).to(fit.device)
    columns = torch.from_numpy(present).to(fit.device)
    class_weights = torch.from_numpy((counts.sum() / counts / len(counts)).astype(np.float32)).to(fit.device)
    in_loss = _weights_in_loss(chosen, recipe)
    batches = _batches(data, chosen, recipe, fit, steps, random)
    for step in range(steps):
        images, positions = next(batches)
        x = _to_tensor(images).to(fit.device)
        y = torch.from_numpy(targets[positions]).to(fit.device)
        weights = torch.from_numpy(in_loss[positions]).to(fit.device)
        share, partner = 1.0, None
        if recipe.mix != "none":
            x, share, partner = _mix(x, recipe.mix, random)
        logits = network(x)
        if tuple(logits.shape) != (len(x), data.n_classes):
            raise ValueError(f"{len(x)} images gave logits of shape {tuple(logits.shape)}, not [n, {data.n_classes}]")
        logits = logits[:, columns]
        if recipe.loss == "balanced softmax":
            logits = logits + prior

        def losses(target: Any, weight: Any, logits: Any = logits) -> Any:
            loss = functional.cross_entropy(logits, target, reduction="none")
            if recipe.loss == "class weights":
                weight = weight * class_weights[target]
            return (loss * weight).sum() / weight.sum()

        loss = losses(y, weights)
        if partner is not None:
            loss = share * loss + (1 - share) * losses(y[partner], weights[partner])
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of the trial's arm '{recipe.key}' is {loss.item()} at step {step + 1} of {steps}. "
                "Look for extreme values in the images, and set image.value_range for floating-point ones."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _mix(x: Any, how: str, random: np.random.Generator) -> tuple[Any, float, Any]:
    """Mix a batch with itself in another order; returns the images, the share of the first ones, and the order."""
    import torch

    partner = torch.from_numpy(random.permutation(len(x))).to(x.device)
    if how == "mixup":
        share = float(random.beta(_MIXUP_ALPHA, _MIXUP_ALPHA))
        return share * x + (1 - share) * x[partner], share, partner
    share, size = float(random.beta(_CUTMIX_ALPHA, _CUTMIX_ALPHA)), x.shape[-1]
    side = size * np.sqrt(1 - share)
    (top, left), x = random.integers(size, size=2), x.clone()
    rows = slice(max(0, int(top - side / 2)), min(size, int(top + side / 2)))
    columns = slice(max(0, int(left - side / 2)), min(size, int(left + side / 2)))
    x[:, :, rows, columns] = x[partner][:, :, rows, columns]
    return x, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / size**2, partner


def _batches(
    data: TrialData, chosen: Chosen, recipe: Recipe, fit: Fit, steps: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of augmented images with their positions in `chosen`, out of pools used a few times."""
    from synthaug.quality.warps import augmenter

    shape = (data.size, data.size, data.channels)
    augment = augmenter(int(random.integers(2**31)), strong=recipe.strong)
    draws, size = _draws(chosen, recipe, random), fit.batch_size
    limit = int(np.clip(_POOL_BYTES // (4 * int(np.prod(shape))), size, _POOL_IMAGES))
    pool_size = max(size, min(limit, steps * size // _POOL_USES) // size * size)
    while True:
        drawn = draws(pool_size)
        pool = _augmented(data, chosen, drawn, augment)
        for _ in range(_POOL_USES):
            order = random.permutation(pool_size)
            for start in range(0, pool_size, size):
                picked = order[start : start + size]
                yield pool[picked], drawn[picked]


def _draws(chosen: Chosen, recipe: Recipe, random: np.random.Generator) -> Callable[[int], np.ndarray]:
    """A function that draws positions: every class equally often, or every image equally often."""
    if recipe.loss != "oversampling":
        # Whole rounds in random order, so that no image waits longer than a round for its turn.
        waiting = np.empty(0, dtype=np.int64)

        def natural(number: int) -> np.ndarray:
            nonlocal waiting
            while len(waiting) < number:
                waiting = np.concatenate([waiting, random.permutation(len(chosen))])
            drawn, waiting = waiting[:number], waiting[number:]
            return drawn

        return natural
    members = [np.flatnonzero(chosen.labels == label) for label in np.unique(chosen.labels)]
    # Where all weights of a class are equal, whole numbers are drawn: faster, and the same draws as ever.
    shares = [None if np.ptp(w := chosen.weights[mine]) == 0 else w.astype(np.float64) for mine in members]

    def balanced(number: int) -> np.ndarray:
        classes = random.permutation(np.arange(number) % len(members))
        drawn = np.empty(number, dtype=np.int64)
        for position, mine in enumerate(members):
            here = classes == position
            number_here, share = int(here.sum()), shares[position]
            drawn[here] = (
                mine[random.integers(len(mine), size=number_here)]
                if share is None
                else random.choice(mine, size=number_here, p=share / share.sum())
            )
        return drawn

    return balanced


def _weights_in_loss(chosen: Chosen, recipe: Recipe) -> np.ndarray:
    """Under oversampling weights are in the draws: in the loss they would make the class count less than the others."""
    return np.ones_like(chosen.weights) if recipe.loss == "oversampling" else chosen.weights


def _augmented(
    data: TrialData, chosen: Chosen, drawn: np.ndarray, augment: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    pool = np.empty((len(drawn), data.size, data.size, data.channels), dtype=np.float32)
    for start in range(0, len(drawn), _PIECE):
        values = _to_float(data, chosen, drawn[start : start + _PIECE])
        for number, image in enumerate(values):
            pool[start + number] = augment(image)
    return pool


def _train_estimator(data: TrialData, fit: Fit, learner: Any) -> Predict:
    from sklearn.base import clone

    from synthaug.quality.warps import augmenter

    recipe, random = fit.recipe, np.random.default_rng([fit.seed, 0x7A1])
    learner = clone(learner)
    # Those inside a pipeline as well.
    random_states = [name for name in learner.get_params() if name.split("__")[-1] == "random_state"]
    learner.set_params(**dict.fromkeys(random_states, fit.seed))
    chosen = data.training(recipe, fit.seed)
    number = estimator_draws(len(data.labels("train")), data.size, data.channels)
    # The number of draws is to an estimator what steps are to a network; only the check on training asks for more.
    drawn = _draws(chosen, recipe, random)(number * fit.steps)
    x = _augmented(data, chosen, drawn, augmenter(int(random.integers(2**31)), strong=recipe.strong))
    y, weights = chosen.labels[drawn], _weights_in_loss(chosen, recipe)[drawn].astype(np.float64)
    counts = np.bincount(chosen.labels, weights=chosen.weights, minlength=data.n_classes)
    if recipe.mix != "none":
        x, y, weights = _mixed_rows(x, y, weights, recipe.mix, random)
    if recipe.loss == "class weights":
        weights = weights / counts[y]
    arguments = {} if np.ptp(weights) == 0 else {"sample_weight": weights * len(weights) / weights.sum()}
    learner.fit(x.reshape(len(x), -1), y, **arguments)
    columns = np.asarray(learner.classes_, dtype=np.int64)

    def predict(use: str) -> np.ndarray:
        everything = data.everything(use)
        found = np.zeros((len(everything), data.n_classes), dtype=np.float64)
        for start in range(0, len(everything), _PIECE):
            positions = np.arange(start, min(start + _PIECE, len(everything)))
            flat = _to_float(data, everything, positions).reshape(len(positions), -1)
            found[positions[:, None], columns] = learner.predict_proba(flat)
        if recipe.loss == "balanced softmax":
            # The same adjustment after training (Menon et al. 2021, eq. 9).
            found /= np.maximum(counts / counts.sum(), 1e-9)
            found /= np.maximum(found.sum(1, keepdims=True), 1e-12)
        return found.astype(np.float32)

    return predict


def _mixed_rows(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, how: str, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixed images twice, once under each of their labels, weighted by its share."""
    import torch

    first = np.empty_like(x)
    shares, partners = np.empty(len(x)), np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), 64):
        here = slice(start, min(start + 64, len(x)))
        mixed, share, partner = _mix(torch.from_numpy(x[here]).permute(0, 3, 1, 2), how, random)
        first[here] = mixed.permute(0, 2, 3, 1).numpy()
        shares[here], partners[here] = share, start + partner.numpy()
    return (
        np.concatenate([first, first]),
        np.concatenate([y, y[partners]]),
        np.concatenate([weights * shares, weights[partners] * (1 - shares)]),
    )


def _takes_weights(learner: Any) -> bool:
    from sklearn.utils.validation import has_fit_parameter

    return bool(has_fit_parameter(learner, "sample_weight"))


def _to_float(data: TrialData, chosen: Chosen, positions: np.ndarray) -> np.ndarray:
    """Images in [0, 1], float32; what is not finite becomes 0, as the audit sees it."""
    scaled = (data.images(chosen, positions).astype(np.float32) - np.float32(data.low)) / np.float32(
        data.high - data.low
    )
    return np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)


def _to_tensor(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous().mul_(2).sub_(1)
