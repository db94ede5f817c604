"""The plug: every generator goes through one contract, and the trainer keeps its promises."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel

from synthaug.config import TrainConfig
from synthaug.diffusion import muon, training
from synthaug.diffusion.pipeline import build_solver
from synthaug.errors import CheckpointError, ConfigError, TrainingError
from synthaug.generators import REGISTRY, edm, generator_class, resolve_device
from synthaug.generators.contract import check_generator
from synthaug.generators.edm import BUDGET_FILE, EDMGenerator
from synthaug.generators.interface import FitReport, Generator, TrainingData
from synthaug.train import base_identity
from tests.generator_data import digits_data

TINY: dict[str, Any] = {"images": 1600, "batch_size": 32, "width": 16, "device": "cpu", "threads": 1}


class MixupGenerator(Generator):
    """A second, quite different generator: a mean of two training images of the class. Proves the plug is one."""

    name, solver = "mixup", "pixel mixup"

    def __init__(self, images: np.ndarray, labels: np.ndarray, n_classes: int) -> None:
        self.images, self.labels, self.n_classes = images, labels, n_classes

    @classmethod
    def fit(
        cls, data: TrainingData, settings: TrainConfig, *, seed: int, workdir: Path
    ) -> tuple[MixupGenerator, FitReport]:
        generator = cls(np.array(data.images[data.rows]), data.labels, len(data.classes))
        images = settings.images or 1
        return generator, FitReport(0, images, images, "images", "base", "done", 0.0, 0.0, "cpu")

    def save(self, directory: Path) -> None:
        np.savez(directory / "mixup.npz", images=self.images, labels=self.labels, n_classes=self.n_classes)

    @classmethod
    def load(cls, directory: Path, *, device: str) -> MixupGenerator:
        with np.load(directory / "mixup.npz", allow_pickle=False) as file:
            return cls(file["images"], file["labels"], int(file["n_classes"]))

    def default_steps(self, guidance: float) -> int:
        return 2

    def sample(self, labels: Any, seeds: Any, *, steps: int, guidance: float) -> np.ndarray:
        if any(not 0 <= label < self.n_classes for label in labels):
            raise ValueError("label out of range")
        drawn = []
        for label, seed in zip(labels, seeds, strict=True):
            pair = np.random.default_rng(seed).choice(np.flatnonzero(self.labels == label), 2)
            drawn.append(self.images[pair].mean(0).round().astype(np.uint8))
        return np.stack(drawn)


@pytest.mark.parametrize("kind", [pytest.param(EDMGenerator, marks=pytest.mark.slow), MixupGenerator])
def test_generators_keep_the_contract(kind: type[Generator], tmp_path: Path) -> None:
    check_generator(kind, digits_data(), TrainConfig(**TINY, fit_solver_from=0), tmp_path)


class _Forgetful(MixupGenerator):
    """Breaks the promise on seeds: the contract must notice."""

    def sample(self, labels: Any, seeds: Any, *, steps: int, guidance: float) -> np.ndarray:
        self.calls = getattr(self, "calls", 0) + 1
        return super().sample(labels, [seed + self.calls for seed in seeds], steps=steps, guidance=guidance)


class _Peeking(MixupGenerator):
    """Learns from rows it was not given."""

    @classmethod
    def fit(cls, data: TrainingData, settings: TrainConfig, *, seed: int, workdir: Path) -> Any:
        labels = np.resize(np.arange(len(data.classes)), len(data.images))
        images = settings.images or 1
        report = FitReport(0, images, images, "images", "base", "done", 0.0, 0.0, "cpu")
        return cls(np.array(data.images[::-1][:9]), labels[:9], len(data.classes)), report


class _Stepless(MixupGenerator):
    """Forgets how many steps it wants when it is loaded."""

    loaded = False

    @classmethod
    def load(cls, directory: Path, *, device: str) -> MixupGenerator:
        found = super().load(directory, device=device)
        found.loaded = True  # type: ignore[attr-defined]
        return found

    def default_steps(self, guidance: float) -> int:
        return 9 if self.loaded else 2


@pytest.mark.parametrize(
    ("kind", "promise"), [(_Forgetful, "other images"), (_Peeking, "do not list"), (_Stepless, "wants 9 steps")]
)
def test_the_contract_catches_broken_promises(kind: type[Generator], promise: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_generator(kind, digits_data(), TrainConfig(**TINY), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("from_repeats", "augmented"), [(0, {0, 1, 2}), (10, {2}), (1000, set())])
def test_classes_that_come_up_seldom_are_not_augmented(
    from_repeats: float, augmented: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = digits_data()
    # Ten images of the last class, each of which is drawn some twenty times; of the others, each three times.
    kept = np.concatenate([np.flatnonzero(data.labels != 2), np.flatnonzero(data.labels == 2)[:10]])
    data = replace(data, rows=data.rows[kept], labels=data.labels[kept])
    seen: set[int] = set()
    plain = training.predict

    def watch(unet: Any, scaled: Any, c_noise: Any, labels: torch.Tensor, hints: torch.Tensor, fold: int) -> Any:
        seen.update(labels[hints.any(1)].tolist())
        return plain(unet, scaled, c_noise, labels, hints, fold)

    monkeypatch.setattr(training, "predict", watch)
    settings = TrainConfig(
        **{**TINY, "images": 800, "label_dropout": 0},
        augment={"from_repeats": from_repeats, "probability": 0.3},
    )
    trained, _ = EDMGenerator.fit(data, settings, seed=0, workdir=_new(tmp_path / "work"))
    assert seen == augmented

    # What a base has drawn is not known: whatever starts from one is augmented.
    seen.clear()
    trained.save(_new(tmp_path / "base"))
    warm = settings.model_copy(update={"base": str(tmp_path / "base"), "fit_solver_from": None})
    EDMGenerator.fit(data, warm, seed=0, workdir=_new(tmp_path / "warm"))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("layers", [1, 3])
def test_the_network_has_as_many_blocks_a_level_as_the_setting_says(layers: int) -> None:
    """And one is what a job gets that says nothing of it."""
    settings = TrainConfig() if layers == 1 else TrainConfig(layers=layers)
    unet = edm._new_pipeline(digits_data(), settings).unet
    assert [len(block.resnets) for block in unet.down_blocks] == [layers, layers]
    assert [len(block.resnets) for block in unet.up_blocks] == [layers + 1, layers + 1]


def test_an_unknown_generator_is_refused_by_name() -> None:
    assert all(generator_class(name).name == name for name in REGISTRY)
    with pytest.raises(ConfigError, match="no generator is called 'gan'; known are edm"):
        generator_class("gan")


def weights(generator: EDMGenerator) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = generator.pipeline.unet.state_dict()
    return state


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "lose", "stopped"),
    [
        ({}, None, "the budget was used"),
        ({"patience": 1}, "gain", "no better held-out loss in 1 evaluations of the fine-tuning"),
        ({}, "loss", "the loss was nan at step 5 of the fine-tuning"),
        ({}, "held-out", "the held-out loss was nan after step 3 of the fine-tuning"),
    ],
)
def test_a_training_killed_at_its_end_reports_as_one_that_was_not(
    settings: dict[str, Any], lose: str | None, stopped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason to end, and seconds and rate over all stretches."""
    monkeypatch.setattr(training, "LEAST_STEPS_BETWEEN_EVALUATIONS", 2)
    monkeypatch.setattr(training, "_HELDOUT_DRAWS_PER_CLASS", 8)
    now, phases = [0.0], [""]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(edm, "time", clock)
    of_a_step, judged = training.Trainer._loss, training.Trainer._judged

    def slow(self: training.Trainer, unet: Any, phase: training.Phase, step: int) -> torch.Tensor:
        now[0] += 1
        phases[0] = f"{phase.name} {step}"
        loss = of_a_step(self, unet, phase, step)
        return loss * float("nan") if (lose, phases[0]) == ("loss", "fine-tuning 5") else loss

    def judge(self: training.Trainer, losses: dict[str, float]) -> float:
        if phases[0] == "fine-tuning 3" and lose in ("held-out", "gain"):
            return 9.0 if lose == "gain" else float("nan")
        return judged(self, losses)

    monkeypatch.setattr(training.Trainer, "_loss", slow)
    monkeypatch.setattr(training.Trainer, "_judged", judge)
    data, config = digits_data(), TrainConfig(**{**TINY, "images": 160, "batch_size": 8, **settings})
    _, report = EDMGenerator.fit(data, config, seed=0, workdir=_new(tmp_path / "whole"))
    assert report.stopped.startswith(stopped)
    assert report.seconds == now[0]

    work = _new(tmp_path / "work")
    with monkeypatch.context() as dying:
        # Once the base is kept, and again when all is trained and nothing of the fine-tuning but its last state.
        run = training.Trainer.run

        def killed(self: training.Trainer, phase: training.Phase) -> training.Result:
            if phase.name == "fine-tuning" and not (work / "again").exists():
                (work / "again").touch()
                raise Killed
            result = run(self, phase)
            if phase.name == "fine-tuning":
                raise Killed
            return result

        dying.setattr(training.Trainer, "run", killed)
        for _ in range(2):
            now[0] += 1000
            with pytest.raises(Killed):
                EDMGenerator.fit(data, config, seed=0, workdir=work)
    now[0] += 1000
    _, again = EDMGenerator.fit(data, config, seed=0, workdir=work)
    assert asdict(again) == asdict(report)


def test_a_state_that_knows_no_seconds_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainConfig(**{**TINY, "images": 64})
    EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    numbers = json.loads((tmp_path / "base" / "base.json").read_text())
    assert numbers.pop("seconds") > 0
    (tmp_path / "base" / "base.json").write_text(json.dumps(numbers))
    _, report = EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    assert 0 < report.seconds < 60


def test_the_steps_that_are_timed_do_all_that_a_step_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name, owner in (
        ("clip_grad_norm_", training.Accelerator),
        ("reduce", training.Accelerator),
        ("step", EMAModel),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, _name=name, _as=original, **more: (done.append(_name), _as(*given, **more))[1]
        )
    monkeypatch.setattr(training, "_CALIBRATION_SECONDS", 0.0)
    settings = TrainConfig(**{**TINY, "images": None}, minutes=0.01)
    monkeypatch.setattr(training.Trainer, "run", lambda self, phase: _stop())
    with pytest.raises(Killed):
        EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    assert done == ["reduce", "clip_grad_norm_", "step"] * 3


def _stop() -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("at", [30, 44])
def test_interrupted_training_goes_on_exactly(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed once in the base and once in the fine-tuning; the weights equal those of an undisturbed run."""
    monkeypatch.setattr(training, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(training, "LEAST_STEPS_BETWEEN_EVALUATIONS", 5)
    data, settings = digits_data(), TrainConfig(**TINY)
    whole, report = EDMGenerator.fit(data, settings, seed=0, workdir=_new(tmp_path / "whole"))

    steps = 0
    original = training.Trainer._loss

    def dying(self: training.Trainer, *arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == at:
            raise Killed
        return original(self, *arguments)

    work = _new(tmp_path / "work")
    monkeypatch.setattr(training.Trainer, "_loss", dying)
    with pytest.raises(Killed):
        EDMGenerator.fit(data, settings, seed=0, workdir=work)
    done_before = steps
    resumed, again = EDMGenerator.fit(data, settings, seed=0, workdir=work)
    assert steps - done_before <= 50 - at + 6, "more than the steps since the last state were repeated"
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert (again.images_seen, again.heldout_loss_tuned) == (report.images_seen, report.heldout_loss_tuned)
    assert again.log == report.log


@pytest.mark.slow
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LEAST_STEPS_BETWEEN_EVALUATIONS", 5)
    original = training.Trainer._loss

    def breaking(self: training.Trainer, unet: Any, phase: training.Phase, step: int) -> torch.Tensor:
        loss = original(self, unet, phase, step)
        return loss * float("nan") if phase.name == "fine-tuning" and step == 8 else loss

    monkeypatch.setattr(training.Trainer, "_loss", breaking)
    generator, report = EDMGenerator.fit(digits_data(), TrainConfig(**TINY), seed=0, workdir=tmp_path)
    assert report.stopped == "the loss was nan at step 8 of the fine-tuning"
    assert all(torch.isfinite(value).all() for value in weights(generator).values())


def test_a_loss_that_never_was_a_number_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Trainer, "_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainingError, match=r"broke down before the first checkpoint.*Lower train.learning_rate"):
        EDMGenerator.fit(digits_data(), TrainConfig(**TINY), seed=0, workdir=tmp_path)


@pytest.mark.slow
def test_the_better_of_base_and_fine_tuned_is_kept(tmp_path: Path) -> None:
    # A rate that wrecks what the base has learned.
    settings = TrainConfig(**TINY, fine_tune_learning_rate=0.05)
    _generator, report = EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    assert report.kept == "base"
    assert report.heldout_loss_tuned["1"] > report.heldout_loss_base["1"]


@pytest.mark.slow
def test_a_fine_tuning_that_breaks_down_at_once_keeps_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Orthogonal updates have a known length: at a rate that a configuration may name the loss was large, not nan.
    monkeypatch.setattr(muon, "MATRIX_RATIO", 1e30)
    settings = TrainConfig(**TINY, learning_rate=1e-33, fine_tune_learning_rate=0.9)
    generator, report = EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    assert report.kept == "base"
    assert "of the fine-tuning" in report.stopped
    assert all(torch.isfinite(value).all() for value in weights(generator).values())


@pytest.mark.slow
def test_minutes_become_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_CALIBRATION_SECONDS", 0.2)
    settings = TrainConfig(**{**TINY, "images": None}, minutes=0.02)
    _, first = EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    stored = json.loads((tmp_path / BUDGET_FILE).read_text())
    assert first.images_budget == stored["images"]
    assert "measured" in first.budget_from
    shutil.rmtree(tmp_path / "base")
    _, second = EDMGenerator.fit(digits_data(), settings, seed=0, workdir=tmp_path)
    assert second.images_budget == first.images_budget


@pytest.mark.slow
def test_a_base_given_by_the_user_is_taken_over_by_class_name(tmp_path: Path) -> None:
    base, _ = EDMGenerator.fit(digits_data(n_classes=2), TrainConfig(**TINY), seed=0, workdir=_new(tmp_path / "a"))
    base.save(_new(tmp_path / "base"))
    settings = TrainConfig(**{**TINY, "images": 64}, base=str(tmp_path / "base"))
    tuned, report = EDMGenerator.fit(digits_data(n_classes=3), settings, seed=1, workdir=_new(tmp_path / "b"))
    assert len(tuned.pipeline.config.classes) == 3
    assert set(report.heldout_loss_base) == {"0", "1", "2"}
    assert report.heldout_loss_base["0"] < 0.9, "the base had learned something of class 0"
    assert tuned.sample([2], [0], steps=4, guidance=1.0).shape == (1, 8, 8, 1)


@pytest.mark.slow
def test_a_base_of_before_is_drawn_by_the_solver_of_today(tmp_path: Path) -> None:
    settings = {**TINY, "images": 64}
    base, _ = EDMGenerator.fit(digits_data(), TrainConfig(**settings), seed=0, workdir=_new(tmp_path / "a"))
    base.pipeline.scheduler = EDMDPMSolverMultistepScheduler(sigma_data=0.4321)
    base.save(_new(tmp_path / "base"))
    own = TrainConfig(**settings, base=str(tmp_path / "base"))
    tuned, _ = EDMGenerator.fit(digits_data(), own, seed=1, workdir=_new(tmp_path / "b"))
    today, own_config = build_solver(0.4321).config, tuned.pipeline.scheduler.config
    assert {name: own_config[name] for name in today if name[0] != "_"} == {
        name: value for name, value in today.items() if name[0] != "_"
    }


@pytest.mark.slow
def test_a_base_leaves_no_trace_of_where_it_lay(tmp_path: Path) -> None:
    data = digits_data()
    base, _ = EDMGenerator.fit(data, TrainConfig(**{**TINY, "images": 64}), seed=0, workdir=_new(tmp_path / "a"))
    base.save(_new(tmp_path / "secret-place"))
    settings = TrainConfig(**{**TINY, "images": 64}, base=str(tmp_path / "secret-place"))
    tuned, _ = EDMGenerator.fit(data, settings, seed=0, workdir=_new(tmp_path / "b"))
    tuned.save(_new(tmp_path / "out"))
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"secret-place" not in file.read_bytes(), file


def test_a_base_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    settings = TrainConfig(base=str(tmp_path / "base"))
    before = base_identity(settings)
    (tmp_path / "base" / "model_index.json").write_text('{"a": 1}')
    assert base_identity(settings) != before
    assert base_identity(TrainConfig()) is None
    assert base_identity(TrainConfig(base="owner/name", base_revision="a" * 40)) == "a" * 40
    with pytest.raises(ConfigError, match="name a commit"):
        base_identity(TrainConfig(base="owner/name", base_revision="main"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        resolve_device("cuda")


def test_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = digits_data()
    for folder, words in [
        (tmp_path / "missing", "cannot be loaded"),
        (_new(tmp_path / "empty"), "no model_index.json"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            EDMGenerator.fit(data, TrainConfig(**TINY, base=str(folder)), seed=0, workdir=tmp_path)
    base, _ = EDMGenerator.fit(data, TrainConfig(**{**TINY, "images": 64}), seed=0, workdir=_new(tmp_path / "work"))
    base.save(_new(tmp_path / "base"))
    wide = data.pixels.model_copy(update={"channels": 3})
    rgb = TrainingData(**{**data.__dict__, "images": np.repeat(data.images, 3, 3), "pixels": wide})
    with pytest.raises(CheckpointError, match="channels 1, the data have 3"):
        EDMGenerator.fit(rgb, TrainConfig(**TINY, base=str(tmp_path / "base")), seed=0, workdir=tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    base, _ = EDMGenerator.fit(digits_data(), TrainConfig(**{**TINY, "images": 64}), seed=0, workdir=tmp_path)
    folder = _new(tmp_path / "saved")
    base.save(folder)
    weights_file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(base.pipeline.unet.state_dict(), weights_file.with_suffix(".bin"))
    weights_file.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        EDMGenerator.load(folder, device="cpu")


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
