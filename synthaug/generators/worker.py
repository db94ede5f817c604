"""One of several processes that train a generator together; started by `synthaug.generators.processes`.

`python -m synthaug.generators.worker FOLDER RANK`, where FOLDER is what the parent wrote of the job. Standard input is
a pipe from the parent: when it closes, the parent is gone, for whatever reason, and so is this process. Standard output
is for the parent too, a line of JSON for each thing it is told; whatever else would print there goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from synthaug.config import TrainConfig
from synthaug.errors import SynthaugError, may_pass
from synthaug.formats.atomic import whole_directory
from synthaug.progress import listening

# Files of the folder that the parent writes, and what the processes find each other by.
JOB_FILE, ROWS_FILE, IMAGES_FILE, MEETING_FILE = "job.json", "rows.safetensors", "images.npy", "meeting"
# What the first process leaves in `workdir`: the generator as `save` writes it, beside the report.
TRAINED_DIR, GENERATOR_DIR, REPORT_FILE = "trained", "generator", "report.json"
ENDED_WITH_THE_PARENT = 143
_SECONDS_BETWEEN_PROGRESS = 0.2


def main() -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    parent = _Parent(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    try:
        _train(folder, rank, parent)
    except BaseException as error:
        traceback.print_exc()
        parent.tell(
            error=type(error).__name__,
            message=str(error),
            ours=isinstance(error, SynthaugError),
            errno=error.errno if isinstance(error, OSError) else None,
            may_pass=may_pass(error),
        )
        # Not by the interpreter's own way out: it may wait for a process that waits for this one.
        sys.stderr.flush()
        os._exit(1)


class _Parent:
    """The pipe to the parent: log lines, progress, an error."""

    def __init__(self, pipe: TextIO) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self._title, self._told = "", 0.0

    def tell(self, **words: Any) -> None:
        with self._lock:
            self._pipe.write(json.dumps(words) + "\n")
            self._pipe.flush()

    def hear(self, title: str, done: int, total: int | None, note: str) -> None:
        """A listener of `synthaug.progress`."""
        now = time.monotonic()
        if title == self._title and done != total and now - self._told < _SECONDS_BETWEEN_PROGRESS:
            return
        self._title, self._told = title, now
        self.tell(progress=title, done=done, total=total, note=note)


class _ToParent(logging.Handler):
    def __init__(self, parent: _Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        self._parent.tell(log=record.name, level=record.levelno, message=record.getMessage())


def _train(folder: Path, rank: int, parent: _Parent) -> None:
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    settings, workdir = TrainConfig.model_validate(job["settings"]), Path(job["workdir"])
    library = logging.getLogger("synthaug")
    library.propagate = False
    # What every process would say, the first one says; the parent has bars of its own.
    library.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    logging.getLogger("synthaug.progress").setLevel(logging.WARNING)
    library.addHandler(_ToParent(parent) if rank == 0 else logging.NullHandler())

    import torch
    from accelerate import PartialState

    from synthaug.generators import generator_class

    _connect(folder / MEETING_FILE, rank, settings)
    kind = generator_class(settings.generator)
    data = _data(folder, job)
    if rank == 0:
        with listening(parent.hear):
            generator, report = kind.fit(data, settings, seed=job["seed"], workdir=workdir)
        with whole_directory(workdir / TRAINED_DIR) as trained:
            (trained / GENERATOR_DIR).mkdir()
            generator.save(trained / GENERATOR_DIR)
            (trained / REPORT_FILE).write_text(json.dumps(asdict(report)), encoding="utf-8")
    else:
        kind.fit(data, settings, seed=job["seed"], workdir=workdir)
    PartialState().wait_for_everyone()
    torch.distributed.destroy_process_group()


def _connect(meeting: Path, rank: int, settings: TrainConfig) -> None:
    """Find the other processes by a file, which unlike a port nobody else can have taken."""
    import torch
    from accelerate import PartialState

    from synthaug.generators import resolve_device

    # Before anything is computed: the pools of threads are made once.
    torch.set_num_threads(settings.threads)
    PartialState(
        cpu=resolve_device(settings.device) == "cpu",
        store=torch.distributed.FileStore(str(meeting), settings.processes),  # type: ignore[attr-defined]
        rank=rank,
        world_size=settings.processes,
    )


def _data(folder: Path, job: dict[str, Any]) -> Any:
    import numpy as np
    from safetensors.numpy import load_file

    from synthaug.generators.interface import TrainingData
    from synthaug.records import PixelSpec

    return TrainingData(
        images=np.load(job["images"], mmap_mode="r", allow_pickle=False),
        pixels=PixelSpec.model_validate(job["pixels"]),
        classes=tuple(job["classes"]),
        scarce=tuple(job["scarce"]),
        **load_file(folder / ROWS_FILE),
    )


def _end_with_the_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(ENDED_WITH_THE_PARENT)


if __name__ == "__main__":
    main()
