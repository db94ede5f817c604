"""The cells of the benchmark: what each does, what it needs, and how its result is kept.

A cell is run in a process of its own, at most 20 minutes, and leaves one JSON file in the results folder, written last;
what is there is not run again. A cell that is killed goes on where it was, as the stages of the pipeline do; but
training and sampling, whose seconds are of one stretch, are begun again. A record keeps the digest of the code that
made it, and what a cell goes on from lies in a folder by that digest: figures of two states of the code are told apart,
and no cell mixes them. Cells:

    utility.<setting>.r<k>.b<minutes>.make     our pipeline on replicate k, up to samples and audit
    utility.<setting>.r<k>.b<minutes>.trial    the trial of those samples, on the test split
    peers.<setting>.r<k>.<method>.b<minutes>.make    a method's samples, as many of each scarce class, in equal wall
    time peers.<setting>.r<k>.<method>.b<minutes>.trial   the same trial of them, and the audit (ours: the trial after
    it) speed.<setting>.rates      training images and samples a second of all, in turns, beside the matrix product
    speed.<setting>.profile    where the time of our loops goes
    speed.<setting>.solver     our solver against DDIM with the same weights, over the number of steps
    gpu.<size>                 our loops on a GPU, as they are and compiled
    gpu.utility.<setting>.r<k>.b<minutes>.make and .trial    as `utility`, trained and drawn on a GPU
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from benchmarks.method import peers
from benchmarks.method.settings import PEER_DOSE, SETTINGS, Setting, make_config
from synthaug.config import Config
from synthaug.digest import digest_file, digest_json
from synthaug.errors import UsageError
from synthaug.formats.atomic import write_text
from synthaug.records import (
    DONE_FILE,
    IMAGES_FILE,
    PIPELINE_DIR,
    SPLITS_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    Judge,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)
from synthaug.workspace import Done

logger = logging.getLogger(__name__)

Part = Literal["utility", "peers", "speed", "gpu"]
PARTS: tuple[Part, ...] = ("utility", "peers", "speed", "gpu")
LIMIT_MINUTES = 20.0
BUDGETS = (5.0, 15.0)
# Where all peers are tried; the others can be named with --cells.
PEER_SETTINGS = ("digits", "pneumonia-60", "busi-30")
SPEED_SETTINGS = ("pneumonia-60", "busi-30")
GPU_SIZES = (32, 64)
GPU_SETTINGS = ("pneumonia-60", "pneumonia-20", "busi-30", "busi-all")
FINALS_FILE = "finals.npz"
REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "runs" / "method"
# What cells came to, kept with the code: a benchmark of many hours goes on in another clone, on another machine.
RECORDS = Path(__file__).resolve().parent / "records"
# What runs cells and tells of them changes no figure of theirs, nor does what the package shows people or hands on.
_OF_NO_FIGURE = (
    *(f"benchmarks/method/{name}.py" for name in ("__main__", "report", "pictures", "summary")),
    *(f"synthaug/{name}" for name in ("cli.py", "terminal.py", "loaders/", "report/")),
)
# Folders that a cell hands on, relative to the results; they are not kept with its record.
_HANDED_ON = ("checkpoint", "judge", "source", "splits", "samples")


def records_of(results: Path) -> Path | None:
    """The folder of records, as `Place` wants it: cells that are tried elsewhere leave theirs there."""
    return RECORDS if results.resolve() == RESULTS else None


@functools.cache
def sources() -> str:
    """Digest of the code that makes the figures: synthaug and this benchmark, as they were when the process began."""
    files = {
        path.relative_to(REPOSITORY).as_posix(): path
        for folder in ("benchmarks/method", "synthaug")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and RECORDS not in path.parents
    }
    counted = sorted(name for name in files if not name.startswith(_OF_NO_FIGURE))
    return digest_json([[name, digest_file(files[name])] for name in counted])


@dataclass(frozen=True)
class Cell:
    """One piece of the benchmark."""

    name: str
    part: Part
    action: str
    setting: str
    replicate: int = 0
    method: str = "ours"
    minutes: float = 0.0  # budget of training and sampling
    estimate: float = 1.0  # minutes on two idle cores
    needs: tuple[str, ...] = ()
    optional: bool = False  # run only where --cells names it


@dataclass(frozen=True)
class Place:
    """Where a benchmark reads and writes, and what holds for all of its cells."""

    results: Path
    data: Path
    cache: Path
    threads: int
    trial_minutes: float
    seconds: float = 20.0  # of each measurement of speed
    records: Path | None = None  # of cells that are done; None: in the results

    @property
    def work(self) -> Path:
        """What cells of this very code share and go on from."""
        return self.results / "work" / sources()[:12]

    @property
    def prepared(self) -> Path:
        return self.work / "data"

    def result(self, name: str) -> Path:
        return (self.records or self.results / "cells") / f"{name}.json"

    def finals(self, name: str) -> Path:
        return self.results / "cells" / f"{name}.npz"

    def load(self, name: str) -> dict[str, Any] | None:
        """A cell's record, or None where it is not done."""
        try:
            found: dict[str, Any] = json.loads(self.result(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def at_hand(self, name: str) -> bool:
        """Whether a cell is done, and what it hands on is on this machine: others can go on from it."""
        record = self.load(name)
        if record is None:
            return False
        folders = [record["result"][kind] for kind in _HANDED_ON if kind in record["result"]]
        return bool(folders) and all((self.results / folder).exists() for folder in folders)

    def stale(self, cell: Cell) -> bool:
        """Whether a cell is done, and it or what it was made from was made by other code than this."""
        if self.load(cell.name) is None:
            return False
        found = (self.load(name) for name in (cell.name, *cell.needs))
        return any(record is not None and record.get("sources") != sources() for record in found)


def all_cells(replicates: int, minutes: float | None = None) -> list[Cell]:
    """Every cell in the order it is run: the first replicate of everything comes before the second.

    Args:
        minutes: One budget for all, in place of the benchmark's own; cells of another budget have other names.
    """
    cells: list[Cell] = []
    for replicate in range(replicates):
        for setting in SETTINGS.values():
            cells += _utility(setting, replicate, minutes or setting.minutes)
        for name, setting in SETTINGS.items():
            for budget in (minutes,) if minutes else BUDGETS:
                cells += _peers(setting, replicate, budget, optional=name not in PEER_SETTINGS)
            cells += _pixels(setting, replicate, optional=name not in PEER_SETTINGS)
    for name in SPEED_SETTINGS:
        make = _utility(SETTINGS[name], 0, minutes or SETTINGS[name].minutes)[0].name
        cells.append(Cell(f"speed.{name}.rates", "speed", "rates", name, estimate=16))
        cells.append(Cell(f"speed.{name}.profile", "speed", "profile", name, estimate=1))
        cells.append(Cell(f"speed.{name}.solver", "speed", "solver", name, estimate=6, needs=(make,)))
    cells += [Cell(f"gpu.{size}", "gpu", "gpu", str(size), estimate=4) for size in GPU_SIZES]
    for name in GPU_SETTINGS:
        cells += _utility(SETTINGS[name], 0, minutes or SETTINGS[name].minutes, part="gpu")
    return cells


def _utility(
    setting: Setting, replicate: int, minutes: float, *, part: Literal["utility", "gpu"] = "utility"
) -> list[Cell]:
    stem = f"{'gpu.' if part == 'gpu' else ''}utility.{setting.name}.r{replicate}.b{minutes:g}"
    make = Cell(f"{stem}.make", part, "make", setting.name, replicate, minutes=minutes, estimate=minutes + 1.5)
    trial = Cell(
        f"{stem}.trial", part, "trial", setting.name, replicate, minutes=minutes,
        estimate=setting.trial_minutes, needs=(make.name,),
    )  # fmt: skip
    return [make, trial]


def _peers(setting: Setting, replicate: int, minutes: float, *, optional: bool) -> list[Cell]:
    cells = []
    for method in ("ours", *(name for name, peer in peers.PEERS.items() if peer.learns)):
        rates = len(peers.PEERS[method].rates) if method != "ours" else 1
        # The tuning is beside the budget.
        tuning = min(0.1 * minutes, 1.0) * rates if rates > 1 else 0
        cells += _contest(setting, replicate, method, minutes, minutes + tuning + 1, optional or method == "ddp-64")
    return cells


def _pixels(setting: Setting, replicate: int, *, optional: bool) -> list[Cell]:
    return [
        cell
        for method, peer in peers.PEERS.items()
        if not peer.learns
        for cell in _contest(setting, replicate, method, 0, 0.5, optional)
    ]


def _contest(
    setting: Setting, replicate: int, method: str, minutes: float, estimate: float, optional: bool
) -> list[Cell]:
    stem = f"peers.{setting.name}.r{replicate}.{method}.b{minutes:g}"
    shared: dict[str, Any] = {
        "part": "peers", "setting": setting.name, "replicate": replicate, "method": method, "minutes": minutes,
        "optional": optional,
    }  # fmt: skip
    make = Cell(f"{stem}.make", action="make", estimate=estimate, **shared)
    return [
        make,
        Cell(f"{stem}.trial", action="trial", estimate=setting.trial_minutes + 0.5, needs=(make.name,), **shared),
    ]


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Do a cell's work and keep its record.

    Raises:
        SynthaugError: It cannot be done.
        MissingData: The images are not there.
    """
    started, load = time.time(), os.getloadavg()[0]
    begun = time.monotonic()
    code = sources()
    result = ACTIONS[cell.action](cell, place)
    record = {
        "cell": asdict(cell),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started)),
        "seconds": round(time.monotonic() - begun, 1),
        "threads": place.threads,
        "machine": machine(cell.part) | {"load_before": load, "load_after": os.getloadavg()[0]},
        "versions": versions(),
        "commit": commit(),
        "sources": code,
        "result": finite(result),
    }
    write_text(place.result(cell.name), json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def finite(value: Any) -> Any:
    """The same with None where a number is none: JSON has no other word for it."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- our pipeline and its trial --


def _make(cell: Cell, place: Place) -> dict[str, Any]:
    if cell.part == "gpu":
        refuse_without_gpu()
    if cell.method != "ours":
        return _make_by_peer(cell, place)
    from synthaug.pipeline import augment

    config = config_of(cell, place)
    stages = Caught()
    drop_unfinished(Path(config.output))
    # A release without a verdict: what is wanted of it is everything up to the audit, as `synthaug run` does it.
    augment(
        config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"enabled": False})}),
        run_stage=stages,
    )
    checkpoint, report, judge = (stages.last(kind) for kind in (Checkpoint, AuditReport, Judge))
    batches = stages.every(SampleBatch)
    seconds = stages.seconds()
    making = seconds["train"] + sum(value for title, value in seconds.items() if title.startswith("sample"))
    return {
        "stages": seconds,
        "making_seconds": making,
        "training_seconds": seconds["train"],
        "sampling_seconds": making - seconds["train"],
        "training_images": checkpoint.images_seen,
        "training_images_per_second": checkpoint.images_per_second,
        "samples_per_second": sum(batch.n_samples for batch in batches) / max(1e-9, making - seconds["train"]),
        "n_drawn": sum(batch.n_samples for batch in batches),
        "parameters": checkpoint.parameters,
        "kept": checkpoint.kept,
        "stopped": checkpoint.stopped,
        "heldout_loss": checkpoint.heldout_loss_tuned or checkpoint.heldout_loss_base,
        "checkpoint": os.path.relpath(checkpoint.directory / PIPELINE_DIR, place.results),
        "judge": os.path.relpath(judge.directory, place.results),
        "source": os.path.relpath(stages.last(Source).directory, place.results),
        "splits": os.path.relpath(stages.last(Splits).directory, place.results),
        **_audit_figures(report, judge),
    }


def drop_unfinished(run: Path) -> None:
    """Remove what a killed cell left of training and sampling: gone on from, they would tell the last stretch's seconds
    for all of it, and be held against a budget that they had more than once."""
    for kind in ("train", "sample"):
        for stage in (run / "stages").glob(f"{kind}-*"):
            if not (stage / DONE_FILE).is_file():
                shutil.rmtree(stage)


def _trial(cell: Cell, place: Place) -> dict[str, Any]:
    from synthaug.pipeline import audit_foreign, evaluate, evaluate_foreign

    config, stages = config_of(cell, place), Caught()
    audited: dict[str, Any] = {}
    with keeping_finals():
        if cell.method == "ours":
            verdict = evaluate(config, run_stage=stages).verdict
        else:
            samples = str(_samples(cell, place))
            audit = audit_foreign(config, samples, run_stage=stages).report
            audited = _audit_figures(audit, stages.last(Judge))
            verdict = evaluate_foreign(config, samples, run_stage=stages).verdict
    _keep_finals(verdict, stages.last(Source), stages.last(Splits), place.finals(cell.name))
    return {"stages": stages.seconds(), **verdict_figures(verdict), **audited, **_ours_minus(cell, place)}


def _ours_minus(cell: Cell, place: Place) -> dict[str, Any]:
    """Ours minus another method, for the record: the probabilities it follows from stay on this machine."""
    from benchmarks.method.summary import ours_beside, paired

    if cell.part != "peers" or cell.method == "ours":
        return {}
    # Tried with one budget for all (`--minutes`), methods that learn nothing have no budget to find ours by.
    ours = ours_beside(cell, all_cells(cell.replicate + 1))
    found = None if ours is None else paired(place, ours, cell.name)
    return {} if found is None else {"ours_minus": found}


def verdict_figures(verdict: Verdict) -> dict[str, Any]:
    """What the tables need of a verdict."""
    intervals = {
        against: {metric: interval.model_dump() for metric, interval in found.items()}
        for against, found in verdict.differences.items()
    }
    quality = [item.quality for item in verdict.classes if item.quality is not None]

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "outcome": verdict.outcome,
        "sentence": verdict.sentence,
        "best_real": verdict.best_real,
        "recipe": verdict.recipe,
        "differences": intervals,
        "finalists": [item.model_dump(exclude={"confusion"}) for item in verdict.finalists],
        "classes": [
            item.model_dump(include={"name", "n_real", "n_offered", "tried", "dose", "n_test"})
            for item in verdict.classes
        ],
        "offered": sum(item.n_offered for item in verdict.classes),
        "dose": sum(item.dose for item in verdict.classes),
        "seeds": verdict.seeds,
        "steps": verdict.steps,
        "trained_out": None if verdict.trained_out is None else verdict.trained_out.model_dump(),
        "not_tried": verdict.not_tried,
        "looks": verdict.looks,
        "coverage": mean([item.coverage for item in quality if item.coverage is not None]),
        "kid": mean([item.kid.estimate for item in quality if item.kid is not None]),
        "kid_half_width": mean([(item.kid.high - item.kid.low) / 2 for item in quality if item.kid is not None]),
        "precision": mean([item.precision for item in quality if item.precision is not None]),
    }


def _audit_figures(report: AuditReport, judge: Judge) -> dict[str, Any]:
    """Near-copies before the gate, beside held-out real images by the same test."""
    rates = [item.copies for item in report.classes if item.copies is not None]
    overall = next((test for test in judge.near_copies if test.name is None), None)
    return {
        "near_copies": sum(item.n_near for item in rates),
        "near_copies_of": sum(item.n for item in rates),
        "heldout_near_copies": None if overall is None else overall.alarms,
        "heldout_near_copies_of": None if overall is None else overall.n_heldout,
        "withheld": {item.name: item.withheld for item in report.classes if item.withheld is not None},
        "accepted": sum(item.n_accepted for item in report.classes),
        "candidates": sum(item.n_candidates for item in report.classes),
    }


class Caught:
    """Runs stages and remembers what they came to."""

    def __init__(self) -> None:
        self.found: dict[str, Done[Any]] = {}

    def __call__(self, title: str, work: Callable[[], Done[Any]]) -> Done[Any]:
        self.found[title] = done = work()
        return done

    def last(self, kind: type) -> Any:
        return self.every(kind)[-1]

    def every(self, kind: type) -> list[Any]:
        return [done.record for done in self.found.values() if isinstance(done.record, kind)]

    def seconds(self) -> dict[str, float]:
        """What each stage took when it was made, now or before."""
        return {
            title: float(json.loads((done.directory / DONE_FILE).read_text(encoding="utf-8"))["seconds"])
            for title, done in self.found.items()
        }


@contextmanager
def keeping_finals() -> Iterator[None]:
    """Have the trial leave its finalists' probabilities on test beside the verdict.

    The verdict holds means and intervals against its own real-only arm. To compare two methods by the same images and
    seeds takes the probabilities, and nothing of the pipeline wants them kept.
    """
    from synthaug.trial import race

    final = race.final

    def kept(rules: race.Rules, course: race.Course) -> Any:
        found = final(rules, course)
        arms = {name: np.stack([scores.test for scores in found[name]]) for name in ("real", "synthetic")}
        with (rules.directory / FINALS_FILE).open("wb") as file:
            np.savez(file, **arms)
        return found

    race.final = kept
    try:
        yield
    finally:
        race.final = final


def _keep_finals(verdict: Verdict, source: Source, splits: Splits, path: Path) -> None:
    """Copy the finalists' probabilities [seeds, n, K] to the results, with labels and clusters of the test images
    [n]."""
    found = verdict.directory / FINALS_FILE
    if not verdict.differences or not found.is_file():
        path.unlink(missing_ok=True)
        return
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    test = table[table["held_back"].isna() & (table["split"] == "test")].sort_values("row")
    rare = [item.label for item in verdict.classes]
    path.parent.mkdir(parents=True, exist_ok=True)
    with np.load(found, allow_pickle=False) as arms, path.open("wb") as file:
        np.savez_compressed(
            file,
            real=arms["real"].astype(np.float32),
            synthetic=arms["synthetic"].astype(np.float32),
            labels=test["label"].to_numpy(np.int64),
            clusters=pd.factorize(test["group_key"])[0],
            rare=np.array(rare, dtype=np.int64),
        )


def config_of(cell: Cell, place: Place) -> Config:
    # The budget is part of the folder's name only for what trains: split and judge are shared by all methods anyway,
    # since they depend on nothing of it, but a folder is held by one run at a time.
    on_gpu = cell.part == "gpu"
    return make_config(
        SETTINGS[cell.setting],
        replicate=cell.replicate,
        minutes=cell.minutes or 1.0,
        output=place.work / f"{'gpu.' if on_gpu else ''}{cell.setting}.r{cell.replicate}",
        data=place.data,
        prepared=place.prepared,
        threads=place.threads,
        trial_minutes=place.trial_minutes,
        dose=PEER_DOSE if cell.part == "peers" else None,
        device="cuda" if on_gpu else "cpu",
    )


# -- peers --


def _samples(cell: Cell, place: Place) -> Path:
    return place.work / "samples" / f"{cell.setting}.r{cell.replicate}.{cell.method}.b{cell.minutes:g}"


def _make_by_peer(cell: Cell, place: Place) -> dict[str, Any]:
    stages = prepare(config_of(cell, place))
    source, plan = stages.last(Source), stages.last(BalancePlan)
    samples = _samples(cell, place)
    images = place.work / f"{cell.setting}.r{cell.replicate}.images.npz"
    write_training_images(stages, images)
    # Without its result the folder is of a cell that was killed between the two.
    shutil.rmtree(samples, ignore_errors=True)
    found = peers.make_samples(
        peers.PEERS[cell.method],
        images,
        source.classes,
        {item.label: item.n_synthetic for item in plan.classes},
        samples,
        cache=place.cache,
        minutes=cell.minutes,
        threads=place.threads,
        seed=cell.replicate,
        parameters=our_parameters(source),
    )
    making = found["training_seconds"] + found["sampling_seconds"]
    return found | {"making_seconds": making, "samples": os.path.relpath(samples, place.results)}


def prepare(config: Config) -> Caught:
    """Read, split and plan."""
    from synthaug.pipeline import plan_only

    stages = Caught()
    plan_only(config, run_stage=stages)
    return stages


def write_training_images(stages: Caught, path: Path) -> None:
    source, splits = stages.last(Source), stages.last(Splits)
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    table = table[table["held_back"].isna()]
    training, heldout = table[table["split"] == "train"], table[table["split"] == "validation"]
    peers.write_images(
        path,
        np.load(source.directory / IMAGES_FILE, mmap_mode="r"),
        training["row"].to_numpy(np.int64),
        training["label"].to_numpy(np.int64),
        heldout["row"].to_numpy(np.int64),
        heldout["label"].to_numpy(np.int64),
    )


def our_parameters(source: Source) -> int:
    """Parameters of our network for these images, at its defaults."""
    from synthaug.config import TrainConfig
    from synthaug.generators.edm import untrained_unet

    unet = untrained_unet(source.pixels, len(source.classes), TrainConfig())
    return sum(parameter.numel() for parameter in unet.parameters())


# -- speed and GPU --


def _rates(cell: Cell, place: Place) -> dict[str, Any]:
    from benchmarks.method.speed import rates

    return rates(cell, place)


def _profile(cell: Cell, place: Place) -> dict[str, Any]:
    from benchmarks.method.speed import profile

    return profile(cell, place)


def _solver(cell: Cell, place: Place) -> dict[str, Any]:
    from benchmarks.method.speed import solver

    return solver(cell, place)


def _gpu(cell: Cell, place: Place) -> dict[str, Any]:
    from benchmarks.method.speed import gpu

    return gpu(int(cell.setting), place)


ACTIONS: dict[str, Callable[[Cell, Place], dict[str, Any]]] = {
    "make": _make,
    "trial": _trial,
    "rates": _rates,
    "profile": _profile,
    "solver": _solver,
    "gpu": _gpu,
}


def refuse_without_gpu() -> None:
    """
    Raises:
        UsageError: torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "the part 'gpu' needs a GPU, and torch.cuda.is_available() says there is none here. Leave it out: "
            "--only utility peers speed."
        )


# -- what a result says of where it was made --


def machine(part: Part) -> dict[str, Any]:
    """Processor and system; the card too for what runs on one."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    found = {"processor": name, "cores": os.cpu_count(), "system": platform.system()}
    if part == "gpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    from synthaug import __version__
    from synthaug.generators.canonical import environment

    return {**environment(), "python": platform.python_version(), "synthaug": __version__}


def commit() -> str:
    """The commit of the repository, with '+' where files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + ("+" if status.stdout.strip() else "")


def python() -> Path:
    return Path(sys.executable)
