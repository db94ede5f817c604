"""Training in several processes of this machine, which accelerate connects: gloo on processors, NCCL on GPUs.

`accelerate launch` starts several processes on processors through MPI only, and its launchers for notebooks fork, which
a thread of a Prefect flow must not do. So the processes are started here, with the variables that accelerate reads
(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), each a new interpreter; the flow and the command line have it alike.
None outlives the run: each reads a pipe from it, and ends when that closes, even by SIGKILL.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

import synthaug
from synthaug import errors
from synthaug.config import TrainConfig
from synthaug.errors import ConfigError, SynthaugError, TrainingError
from synthaug.generators import resolve_device
from synthaug.generators.interface import FitReport, Generator, TrainingData
from synthaug.generators.worker import (
    GENERATOR_DIR,
    IMAGES_FILE,
    JOB_FILE,
    REPORT_FILE,
    ROWS_FILE,
    TRAINED_DIR,
)
from synthaug.progress import Bar, progress
from synthaug.records import PrivacyGuarantee

logger = logging.getLogger(__name__)

JOB_DIR = "processes"
_LINES_KEPT = 40
# One process that ends takes the others with it; what they say of that comes a moment later, and matters less.
_SECONDS_TO_SAY_MORE = 1.0
_SECONDS_TO_END = 5.0


def fit_in_processes(
    kind: type[Generator], data: TrainingData, settings: TrainConfig, *, seed: int, workdir: Path
) -> tuple[Path, FitReport]:
    """`kind.fit` in `settings.processes` processes at once; return the folder it was saved in, and its report.

    A repeat gives the same generator, as `fit` promises, and so does a call that goes on from `workdir` after one that
    was interrupted. It is not that of another number of processes: gradients are added up in another order, and
    dropout is drawn in each process.

    Args:
        workdir: Shared by all processes. The folder returned lies in it.

    Raises:
        ConfigError: The generator trains in one process only, or there are fewer GPUs than processes.
        TrainingError: A process ended before it was done, or training broke down.
        SynthaugError: What else `fit` raises, in its own words.
    """
    device = check_processes(kind, settings)
    trained = workdir / TRAINED_DIR
    if not trained.exists():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if settings.processes * settings.threads > cores:
            logger.warning(
                "train.processes %d times train.threads %d (of each process) are more than the %d cores here: they "
                "will wait for each other. Lower one of them.",
                settings.processes, settings.threads, cores,
            )  # fmt: skip
        logger.info("training in %d processes on %s", settings.processes, device)
        folder = workdir / JOB_DIR
        # What a run that was killed has left: the processes would meet at the wrong place.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            _write_job(folder, data, settings, seed, workdir)
            with _workers(folder, settings) as workers:
                _attend(workers)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not trained.exists():
            raise TrainingError("the training processes ended without a generator. Run again with --debug.")
    values = json.loads((trained / REPORT_FILE).read_text(encoding="utf-8"))
    if values["privacy"] is not None:
        values["privacy"] = PrivacyGuarantee.model_validate(values["privacy"])
    return trained / GENERATOR_DIR, FitReport(**values)


def check_processes(kind: type[Generator], settings: TrainConfig) -> str:
    """Return the device, 'cpu' or 'cuda', that `settings.processes` processes would train on.

    Raises:
        ConfigError: See `fit_in_processes`.
    """
    if not kind.trains_in_processes:
        raise ConfigError(
            f"train.processes is {settings.processes}, and generator '{kind.name}' trains in one process only. "
            "Leave it out."
        )
    device = resolve_device(settings.device)
    if device == "cuda":
        import torch

        if settings.processes > (there := torch.cuda.device_count()):
            raise ConfigError(
                f"train.processes is {settings.processes}, one for each GPU, and torch sees {there} here. Lower it, or "
                "let the run see more (CUDA_VISIBLE_DEVICES)."
            )
    return device


def _write_job(folder: Path, data: TrainingData, settings: TrainConfig, seed: int, workdir: Path) -> None:
    from safetensors.numpy import save_file

    names = ("rows", "labels", "heldout_rows", "heldout_labels")
    save_file({name: np.ascontiguousarray(getattr(data, name)) for name in names}, folder / ROWS_FILE)
    images = _file_of(data.images)
    if images is None:
        images = folder / IMAGES_FILE
        np.save(images, data.images, allow_pickle=False)
    job = {
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "workdir": str(workdir.absolute()),
        "images": str(images),
        "pixels": data.pixels.model_dump(mode="json"),
        "classes": list(data.classes),
        "scarce": [int(label) for label in data.scarce],
    }
    (folder / JOB_FILE).write_text(json.dumps(job), encoding="utf-8")


def _file_of(images: np.ndarray) -> Path | None:
    """The .npy file that all of `images` is mapped from, if it is."""
    name = getattr(images, "filename", None)
    if name is None or Path(name).suffix != ".npy":
        return None
    whole = np.load(name, mmap_mode="r", allow_pickle=False)
    same = (whole.shape, whole.dtype, whole.strides) == (images.shape, images.dtype, images.strides)
    return Path(name).absolute() if same else None


class _Worker:
    """One process, and threads that read what it says."""

    def __init__(self, folder: Path, rank: int, settings: TrainConfig, said: queue.SimpleQueue[Any]) -> None:
        self.rank, self.said, self.last = rank, said, deque[str](maxlen=_LINES_KEPT)
        source = Path(synthaug.__file__).resolve().parent.parent
        count = str(settings.processes)
        self.process = subprocess.Popen(
            # -P: the working directory must not come before installed packages.
            [sys.executable, "-P", "-m", "synthaug.generators.worker", str(folder), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The terminal's Ctrl-C is for the run, which ends its processes.
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")])),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "OMP_NUM_THREADS": str(settings.threads),
                # Nothing of it is for the network.
                **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback()),
            },
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=target, args=(pipe,), daemon=True)
            for target, pipe in ((self._read, self.process.stdout), (self._read_rest, self.process.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            with suppress(ValueError):
                self.said.put((self, json.loads(line)))
        self.process.wait()
        self.said.put((self, None))

    def _read_rest(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            text = line.decode(errors="replace").rstrip()
            self.last.append(text)
            logger.debug("process %d: %s", self.rank + 1, text)

    def let_go(self) -> None:
        """Close the pipe that it lives by."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def end(self, deadline: float) -> None:
        try:
            self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(timeout=1.0)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextmanager
def _workers(folder: Path, settings: TrainConfig) -> Iterator[list[_Worker]]:
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    workers: list[_Worker] = []
    try:
        for rank in range(settings.processes):
            workers.append(_Worker(folder, rank, settings, said))
        yield workers
    finally:
        for worker in workers:
            worker.let_go()
        deadline = time.monotonic() + _SECONDS_TO_END
        for worker in workers:
            worker.end(deadline)


def _attend(workers: list[_Worker]) -> None:
    """Pass on what the processes say until all are done.

    Raises:
        SynthaugError: What one of them raised, or how it ended.
    """
    said, left = workers[0].said, len(workers)
    failures: list[tuple[_Worker, dict[str, Any] | None]] = []
    deadline = float("inf")
    with _Bars() as bars:
        while left and time.monotonic() < deadline:
            try:
                # Not for ever: a signal is taken between two calls.
                worker, words = said.get(timeout=0.2)
            except queue.Empty:
                continue
            if words is None:
                left -= 1
                if worker.process.returncode and worker not in [failed for failed, _ in failures]:
                    failures.append((worker, None))
            elif "error" in words:
                failures.append((worker, words))
            elif "log" in words:
                logging.getLogger(words["log"]).log(words["level"], "%s", words["message"])
            elif "progress" in words:
                bars.show(words["progress"], words["done"], words["total"], words["note"])
            if failures:
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_SAY_MORE)
    if failures:
        raise _why(failures, len(workers))


def _why(failures: list[tuple[_Worker, dict[str, Any] | None]], count: int) -> SynthaugError:
    """The error of the process that failed by itself: the others then fail by the connection to it."""
    for _, words in failures:
        if words is not None and words["ours"]:
            kind = getattr(errors, words["error"], SynthaugError)
            ours: SynthaugError = kind(words["message"])
            ours.may_pass = words["may_pass"]
            return ours
    for worker, words in failures:
        if words is None and worker.process.returncode < 0:
            number = -worker.process.returncode
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            hint = " (where memory ran out, the system does that)" if number == signal.SIGKILL else ""
            return TrainingError(
                f"training process {worker.rank + 1} of {count} was ended by {name}{hint}, and the others with it. Run "
                "again, and training goes on from its last state; with fewer train.processes it takes less memory."
            )
    worker, words = failures[0]
    if words is None:
        last = " ".join(list(worker.last)[-3:]) or "it said nothing"
        what = f"ended with exit code {worker.process.returncode}: {last}"
    else:
        what = f"failed by {words['error']}: {' '.join(str(words['message']).split())}"
    error = TrainingError(
        f"training process {worker.rank + 1} of {count} {what}. Run again, and training goes on from its last state; "
        "--verbose shows all that the process said."
    )
    if words is not None:
        error.may_pass = words["may_pass"]
        if words["errno"] is not None:
            # A full disk is told by it.
            error.__cause__ = OSError(words["errno"], os.strerror(words["errno"]))
    return error


class _Bars:
    """The bars of the first process, shown by this one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._title: str | None = None
        self._bar: Bar | None = None
        self._done = 0

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, title: str, done: int, total: int | None, note: str) -> None:
        if title != self._title:
            self._stack.close()
            self._title, self._done = title, 0
            self._bar = self._stack.enter_context(progress(title, total, "images"))
        assert self._bar is not None
        if note:
            self._bar.note(note)
        self._bar.update(done - self._done)
        self._done = done


def _loopback() -> str:
    return "lo" if sys.platform.startswith("linux") else "lo0"
