"""Training in several processes: the same again, on after a kill, and none left behind, however a run ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthaug.config import TrainConfig
from synthaug.diffusion.augment import augment
from synthaug.errors import CheckpointError, ConfigError, SynthaugError, TrainingError, may_pass
from synthaug.generators import processes
from synthaug.generators.edm import EDMGenerator
from synthaug.generators.processes import check_processes, fit_in_processes
from synthaug.progress import listening
from synthaug.workspace import open_workspace
from tests.generator_data import digits_data
from tests.test_generators import MixupGenerator

# No dropout: each process drops its own, and here several are held against one.
SETTINGS: dict[str, Any] = {
    "images": 1920, "batch_size": 32, "width": 16, "device": "cpu", "threads": 1, "dropout": 0.0, "processes": 2,
    "fit_solver_from": 0,
}  # fmt: skip


def test_a_batch_that_cannot_be_divided_evenly_is_refused(tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match="32 cannot be divided evenly among 3 processes; make batch_size a multiple of processes"
    ):
        tiny_config(train={"processes": 3})


def test_differential_privacy_is_refused_in_several_processes(tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"privacy.dp trains in one process, and train.processes is 2"):
        tiny_config(train={"processes": 2}, privacy={"dp": {"epsilon": 8}})


def test_a_generator_that_trains_in_one_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="generator 'mixup' trains in one process only"):
        check_processes(MixupGenerator, TrainConfig(processes=2))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"train.processes is 2, one for each GPU, and torch sees 1 here"):
        check_processes(EDMGenerator, TrainConfig(processes=2))
    assert check_processes(EDMGenerator, TrainConfig(processes=2, device="cpu")) == "cpu"


def test_the_number_of_processes_is_part_of_what_a_checkpoint_is_known_by(tmp_path: Path) -> None:
    """And one process leaves the key as it was before there could be several."""
    from synthaug.stage_keys import plain, without_a_say

    one, two = TrainConfig(images=64), TrainConfig(images=64, processes=2)
    assert "processes" not in plain(one, without=without_a_say(one))
    assert plain(two, without=without_a_say(two))["processes"] == 2


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_a_batch_are_augmented_as_the_whole_is(count: int) -> None:
    images = torch.rand(12, 1, 8, 8) * 2 - 1
    whole, hints = augment(images, 0.2, True, torch.Generator().manual_seed(3))
    assert hints.any(1).any()
    assert not hints.any(1).all()
    for index in range(count):
        part = slice(index, None, count)
        generator = torch.Generator().manual_seed(3)
        own, own_hints = augment(images[part], 0.2, True, generator, whole=12, part=part)
        assert torch.equal(own_hints, hints[part])
        assert torch.allclose(own, whole[part], atol=1e-6)


def test_images_are_read_where_they_lie_only_if_they_are_all_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1))
    images = np.load(path, mmap_mode="r")
    assert processes._file_of(images) == path
    for other in (images[1:], images[::-1], np.array(images), images.astype(np.float32)):
        assert processes._file_of(other) is None


def test_too_many_threads_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def nothing_is_started(*_: Any, **__: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(processes.subprocess, "Popen", nothing_is_started)
    settings = TrainConfig(**{**SETTINGS, "threads": 200})
    with caplog.at_level(logging.WARNING, "synthaug"), pytest.raises(OSError, match="not here"):
        fit_in_processes(EDMGenerator, digits_data(), settings, seed=0, workdir=tmp_path)
    assert "train.processes 2 times train.threads 200 (of each process) are more than" in caplog.text


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def workers(within: str | Path) -> list[int]:
    """Training processes that read or write below a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"synthaug.generators.worker" in words and str(within).encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return sorted(found)


def wait_until(there: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")
def test_processes_repeat_themselves_and_go_on_after_one_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SYNTHAUG_TEST", str(tmp_path))
    # Three, since a sum of three has an order, which a training that goes on must keep.
    data, settings = digits_data(), TrainConfig(**{**SETTINGS, "processes": 3, "batch_size": 30})
    heard: list[tuple[Any, ...]] = []
    with caplog.at_level(logging.INFO, "synthaug"), listening(lambda *words: heard.append(words)):
        whole, report = fit_in_processes(EDMGenerator, data, settings, seed=0, workdir=_new(tmp_path / "whole #1 %20"))
    assert (report.processes, report.device, report.images_seen) == (3, "cpu", 1950)
    # What the first process does is told by this one.
    assert {title for title, *_ in heard} == {"train, base", "train, fine-tuning", "fit solvers"}
    assert [done for title, done, total, _ in heard if title == "train, base"][-1] == 1350
    assert any("held-out" in note for *_, note in heard)
    assert "training in 3 processes on cpu" in caplog.text

    work = _new(tmp_path / "work")

    def kill_one() -> None:
        wait_until((work / "state.safetensors").exists)
        os.kill(workers(tmp_path)[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(TrainingError, match=r"training process \d of 3 was ended by SIGKILL .* Run again"):
        fit_in_processes(EDMGenerator, data, settings, seed=0, workdir=work)
    killer.join()
    assert workers(tmp_path) == []
    caplog.clear()
    with caplog.at_level(logging.INFO, "synthaug"):
        resumed, again = fit_in_processes(EDMGenerator, data, settings, seed=0, workdir=work)
    assert "goes on from step" in caplog.text
    assert workers(tmp_path) == []
    assert _same(weights(whole), weights(resumed))
    assert (again.log, again.heldout_loss_tuned) == (report.log, report.heldout_loss_tuned)

    # Not one process's bits, but its steps: they draw the same, and add up in another order.
    alone, single = EDMGenerator.fit(
        data, settings.model_copy(update={"processes": 1}), seed=0, workdir=_new(tmp_path / "alone")
    )
    own = alone.pipeline.unet.state_dict()
    assert not _same(weights(whole), own)
    assert single.heldout_loss_tuned == pytest.approx(report.heldout_loss_tuned, rel=0.02)
    assert [row["loss"] for row in single.log[:3]] == pytest.approx([row["loss"] for row in report.log[:3]], rel=0.02)

    # What is trained already starts no process.
    monkeypatch.setattr(processes, "_workers", None)
    assert fit_in_processes(EDMGenerator, data, settings, seed=0, workdir=work) == (resumed, again)


class _Gone:
    """A process that has ended, and what it said."""

    def __init__(self, rank: int, code: int, *said: str) -> None:
        self.rank, self.last, self.process = rank, list(said), SimpleNamespace(returncode=code)


def failed(error: str, message: str, **more: Any) -> dict[str, Any]:
    return {"error": error, "message": message, "ours": False, "errno": None, "may_pass": False} | more


def test_the_process_that_failed_by_itself_is_named_not_those_it_took_along() -> None:
    lost = failed("RuntimeError", "Connection closed by peer [127.0.0.1]:1")
    ours = failed("CheckpointError", "the base does not fit", ours=True)
    killed = processes._why([(_Gone(0, 1), lost), (_Gone(1, -9), None)], 2)
    assert "training process 2 of 2 was ended by SIGKILL" in str(killed)
    said = processes._why([(_Gone(0, 1), lost), (_Gone(1, 1), ours)], 2)
    assert (type(said), str(said)) == (CheckpointError, "the base does not fit")
    dead = processes._why([(_Gone(1, 3, "warming up", "no such library"), None), (_Gone(0, 1), lost)], 2)
    assert "training process 2 of 2 ended with exit code 3: warming up no such library." in str(dead)


def test_a_full_disk_and_what_can_pass_are_known_across_processes(tmp_path: Path) -> None:
    full = failed("OSError", "[Errno 28] No space left on device", errno=28)
    with (
        open_workspace(tmp_path / "run") as workspace,
        pytest.raises(SynthaugError, match="disk full while working on 'train'"),
        workspace.full_disk_explained("train"),
    ):
        raise processes._why([(_Gone(0, 1), full)], 2)
    assert not may_pass(processes._why([(_Gone(0, 1), full)], 2))
    away = failed("CheckpointError", "the hub did not answer", ours=True, may_pass=True)
    assert may_pass(processes._why([(_Gone(0, 1), away)], 2))


@pytest.mark.slow
def test_what_a_process_fails_by_ends_the_run_in_its_own_words(tmp_path: Path) -> None:
    settings = TrainConfig(**SETTINGS, base=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"the pipeline .*none cannot be loaded"):
        fit_in_processes(EDMGenerator, digits_data(), settings, seed=0, workdir=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_run_leaves_no_process(
    repository: Path, tmp_path: Path, tiny_file: Callable[..., Path], sign: signal.Signals
) -> None:
    path, run = tiny_file(train={"images": 16_000, "processes": 2}), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "synthaug", "run", str(path)],
        cwd=repository,
        env={**os.environ, "SYNTHAUG_TEST": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: any(run.glob("stages/train-*/work/state.safetensors")) or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        assert len(workers(tmp_path)) == 2
        process.send_signal(sign)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (143 if sign == signal.SIGTERM else -sign)
    assert "Traceback" not in said
    wait_until(lambda: not workers(tmp_path), seconds=30)


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
