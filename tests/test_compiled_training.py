"""`train.compile`: the same training, compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from synthaug.config import TrainConfig, parse_config
from synthaug.diffusion import training
from synthaug.errors import ConfigError, TrainingError
from synthaug.generators.edm import BUDGET_FILE, EDMGenerator
from synthaug.generators.interface import FitReport
from synthaug.stage_keys import plain, without_a_say
from tests.generator_data import digits_data

# The compiler's own modules use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

# Nothing is dropped: what compiled code draws is not what eager code draws.
SETTINGS: dict[str, Any] = {
    "images": 1280, "batch_size": 32, "width": 16, "device": "cpu", "threads": 1, "dropout": 0.0,
    "fit_solver_from": None,
}  # fmt: skip


def fit(folder: Path, **settings: Any) -> tuple[EDMGenerator, FitReport]:
    from torch._inductor import config

    folder.mkdir(exist_ok=True)
    # g++ takes two thirds of the time for code without vector instructions, and it is most of these tests.
    with config.patch({"cpp.simdlen": 1}):
        return EDMGenerator.fit(digits_data(), TrainConfig(**SETTINGS | settings), seed=3, workdir=folder)


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile wants a C++ compiler, and there is no g++ here"
)


@pytest.mark.slow
@needs_compiler
def test_compiled_training_is_the_same_training(tmp_path: Path) -> None:
    _, eager = fit(tmp_path / "eager")
    generator, compiled = fit(tmp_path / "compiled", compile="default")
    for one, other in zip(eager.log, compiled.log, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["heldout"] == pytest.approx(one["heldout"], rel=1e-3)

    # Nothing of the compiler is in the checkpoint, which loads and draws as any does.
    generator.save(tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in weights if "_orig_mod" in name]
    loaded = EDMGenerator.load(tmp_path / "checkpoint", device="cpu")
    assert loaded.sample([0, 1], [5, 6], steps=4, guidance=1.0).shape == (2, 8, 8, 1)


@pytest.mark.slow
@needs_compiler
def test_compiled_training_with_dropout_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told minutes, of which it makes images by steps that are compiled too."""
    minutes: dict[str, Any] = {"images": None, "minutes": 0.05, "dropout": 0.1, "compile": "default"}
    generator, report = fit(tmp_path / "whole", **minutes)
    assert report.budget_from.startswith("0.05 minutes at ")
    step = training.Trainer._step

    def killed(self: Any, unet: Any, optimizer: Any, ema: Any, phase: Any, number: int) -> float:
        if phase.name == "fine-tuning" and number == 3:
            raise KeyboardInterrupt
        return step(self, unet, optimizer, ema, phase, number)

    (tmp_path / "killed").mkdir()
    # What the other one measured.
    shutil.copy(tmp_path / "whole" / BUDGET_FILE, tmp_path / "killed")
    monkeypatch.setattr(training.Trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", **minutes)
    monkeypatch.setattr(training.Trainer, "_step", step)
    again, _ = fit(tmp_path / "killed", **minutes)
    for name, value in again.pipeline.unet.state_dict().items():
        assert value.equal(generator.pipeline.unet.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
def test_without_a_compiler_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch._inductor import config

    # Nothing of what was compiled before is found again.
    torch._dynamo.reset()
    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    with pytest.raises(
        TrainingError, match=r"train\.compile is default, .*No working C\+\+ compiler.*leave train\.compile out"
    ):
        fit(tmp_path / "run", compile="default")


def test_the_mode_is_part_of_what_a_checkpoint_is_known_by() -> None:
    """And no compilation leaves the key as it was before there could be one."""
    one, two = TrainConfig(images=64), TrainConfig(images=64, compile="reduce-overhead")
    assert "compile" not in plain(one, without=without_a_say(one))
    assert plain(two, without=without_a_say(two))["compile"] == "reduce-overhead"


def test_several_processes_are_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"compile is default and processes is 2; .* leave one out"):
        TrainConfig(compile="default", processes=2)


def test_private_training_is_not_compiled() -> None:
    values: dict[str, Any] = {
        "name": "private",
        "output": "run",
        "dataset": {"format": "digits"},
        "image": {"size": 8},
        "train": {"images": 640, "compile": "reduce-overhead"},
        "privacy": {"dp": {"epsilon": 8}},
    }
    with pytest.raises(ConfigError, match=r"train\.compile is reduce-overhead; leave one out"):
        parse_config(values, where="a test")
