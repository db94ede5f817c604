"""A stage's work in shards: divided here, computed by whoever is handed in, found again after a kill.

Shards are contiguous units of a stage: canonical micro-batches of a request, pieces of samples to be audited. A unit is
always computed whole and alone, so no division changes a bit. A shard is a small record of paths and numbers; whoever
computes it writes a directory that appears whole, in a folder that it and the stage both see.

Nothing here starts a thread or a process. `one_by_one` computes shards where the stage runs; `flows` has what hands
them to Prefect's task runners.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field, ValidationError

import synthaug
from synthaug.config import ScaleConfig
from synthaug.digest import digest_file, digest_json
from synthaug.errors import OutputError, SynthaugError, UsageError
from synthaug.formats.atomic import whole_directory
from synthaug.records import Record

logger = logging.getLogger(__name__)

SHARDS_DIR = "shards"
SHARD_FILE = "shard.json"
# A probe's second unit is timed: the first pays for what a library sets up at its first call.
_PROBED = 2


class Shard(Record):
    """Units `first` to `last` (not included) of a stage; a stage adds what its own shards need."""

    folder: Path = Field(description="Where the shard's directory is to appear.")
    first: int
    last: int
    made_with: dict[str, str] = Field(description="Versions and machine that the last bit can depend on.")

    @property
    def name(self) -> str:
        """Name of the shard's directory."""
        return _name(self.first, self.last)

    @property
    def needs(self) -> tuple[Path, ...]:
        """What its worker reads."""
        return ()


class ShardDone(Record):
    """What became of a shard; shard.json in its directory, and what its worker returns."""

    first: int
    last: int
    digest: str = Field(description="SHA-256 over what the shard holds.")
    seconds: float = Field(description="Of the fastest unit.")
    made_with: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the shard's directory."""
        return _name(self.first, self.last)


def _name(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}"


S = TypeVar("S", bound=Shard)
S_contra = TypeVar("S_contra", bound=Shard, contravariant=True)

Tick = Callable[[int], object]


class Work(Protocol[S_contra]):
    """Computes a shard; a function of a module, since it may be called in another process."""

    def __call__(self, shard: S_contra, tick: Tick) -> ShardDone: ...


class MapShards(Protocol):
    """How shards are computed: called with the stage's work and its shards, it yields them as they are finished.

    `tick` is told units as they are finished, where that can be known before the shard is.
    """

    workers: int  # as far as it is known
    least_seconds: float  # of a shard, so that handing it over costs little beside it
    most_seconds: float  # so that little is lost when a run is killed
    parts: int  # shards that a stage should have at least, whatever it takes

    def __call__(self, work: Work[S], shards: Sequence[S], tick: Tick) -> Iterator[ShardDone]: ...


class OneByOne:
    """Every shard here and now, in order."""

    workers = 1
    # A shard is flushed to the disk: that must stay cheap beside computing it, and a kill must not cost much.
    least_seconds = 0.0
    most_seconds = 5.0
    parts = 20

    def __call__(self, work: Work[S], shards: Sequence[S], tick: Tick) -> Iterator[ShardDone]:
        for shard in shards:
            yield work(shard, tick)


one_by_one = OneByOne()


def refuse_runner(config: ScaleConfig) -> None:
    """Raise where shards are to go to workers and nobody is there to hand them over.

    Raises:
        UsageError: `scale.runner` is not 'none'.
    """
    if config.runner != "none":
        raise UsageError(
            f"scale.runner: {config.runner} is for Prefect flows, and this command runs without Prefect. Run the job "
            "as a flow: python -m flows.augment CONFIG, or synthaug serve CONFIG; or set scale.runner: none, which "
            "gives the same result bit for bit."
        )


class Stopped(SynthaugError):
    """A shard was given up because its run has ended."""


# Threads cannot be ended from outside: they look here between units.
_stop = threading.Event()


def stop_shards() -> None:
    """Have the shards that threads of this process compute end at their next unit."""
    _stop.set()


def allow_shards() -> None:
    """Take `stop_shards` back."""
    _stop.clear()


def check_stopped() -> None:
    """Raise `Stopped` once `stop_shards` was called; for the loop over a shard's units."""
    if _stop.is_set():
        raise Stopped("the run that this shard belongs to has ended")


_kept = threading.local()
# diffusers and accelerate change torch.nn.Module for all threads while they load: two at a time leave it broken.
_loading = threading.Lock()


def kept(key: Any, make: Callable[[], Any]) -> Any:
    """Return what `make` gives, kept by this thread until another key of the same name (`key[0]`) is asked for.

    What a shard needs is loaded once per worker, not once per shard. Threads share nothing, since a network may keep a
    state; one at a time loads.
    """
    held = _kept.__dict__
    if held.get(key[0], (None,))[0] != key:
        with _loading:
            held[key[0]] = (key, make())
    return held[key[0]][1]


@contextmanager
def forgetting() -> Iterator[None]:
    """Let go of what this thread keeps when the block ends."""
    try:
        yield
    finally:
        _kept.__dict__.clear()


def computes_with(device: str) -> dict[str, str]:
    """What tells workers apart beyond the versions of libraries: this package, the processor, and the GPU if one draws.

    For shards alone, which must not be mixed; of a sample it says nothing that a manifest needs.
    """
    found = {"synthaug": f"{synthaug.__version__} ({_sources})", "processor": _processor()}
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return found


def _digest_of_sources(package: Path) -> str:
    digests = [[file.relative_to(package).as_posix(), digest_file(file)] for file in sorted(package.rglob("*.py"))]
    return digest_json(digests)[:12]


# Read at import: a process that was there before an update computes with the code of before.
_sources = _digest_of_sources(Path(__file__).parent)


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "model name" and value.strip():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def do_shard(shard: Shard, made_with: dict[str, str], fill: Callable[[Path], tuple[str, float]]) -> ShardDone:
    """Write a shard's directory, whole or not at all, and return its record.

    Args:
        made_with: What computes here; it must be what the stage asks for.
        fill: Writes into the directory it is given; returns the digest and the seconds of the fastest unit.

    Raises:
        OutputError: The folder of the run cannot be seen from here.
        SynthaugError: Here the last bit could be another one.
    """
    host = socket.gethostname()
    if hidden := [path for path in (shard.folder, *shard.needs) if not path.is_dir()]:
        raise OutputError(
            f"the worker on host {host} does not see {hidden[0]}: it is gone, or lies where this host cannot read. "
            "Workers need the run folder, the images and the checkpoint under the same paths as the process that runs "
            "the flow, on a shared file system."
        )
    if made_with != shard.made_with:
        differ = [
            f"{name} {made_with.get(name)} instead of {value}"
            for name, value in shard.made_with.items()
            if made_with.get(name) != value
        ]
        raise SynthaugError(
            f"the worker on host {host} computes with {', '.join(differ)}: the last bit of a result could be another "
            "one. Give all workers the versions, the files and the kind of processor of the process that runs the "
            "flow, and start anew those that were there before a change."
        )
    directory = shard.folder / shard.name
    try:
        with whole_directory(directory) as temporary:
            digest, seconds = fill(temporary)
            done = ShardDone(first=shard.first, last=shard.last, digest=digest, seconds=seconds, made_with=made_with)
            (temporary / SHARD_FILE).write_text(done.model_dump_json(), encoding="utf-8")
    except FileExistsError:
        # An engine that lost sight of a worker had the shard done twice; the other was first, with the same bits.
        return _read(directory)
    return done


def do_shards(
    work: Work[S],
    make: Callable[[int, int], S],
    *,
    folder: Path,
    units: int,
    unit_size: int,
    made_with: dict[str, str],
    settings: ScaleConfig,
    map_shards: MapShards,
    intact: Callable[[ShardDone], bool],
    take: Callable[[ShardDone], None],
    tick: Tick,
) -> int:
    """Have all units computed that are not there yet; returns how many were there.

    Args:
        work: Computes a shard that `make(first, last)` gives.
        folder: For the shards' directories, in the stage's work folder. What is whole there is not computed again.
        units: How many there are.
        unit_size: Images of a unit; the last may have fewer. `scale.shard_images` counts in these.
        made_with: Shards that were computed with something else are computed again.
        intact: Does what a shard made still stand, as its digest says?
        take: Called with every finished shard, in the stage's own process.
        tick: Told every unit that is finished, those that were there already included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    standing = _standing(folder, units, made_with, intact)
    for done in standing:
        take(done)
        tick(done.last - done.first)
    found = sum(done.last - done.first for done in standing)
    seconds = min((done.seconds for done in standing), default=None)
    ticked = 0

    def told(number: int) -> None:
        nonlocal ticked
        ticked += number
        tick(number)

    def run(ranges: list[tuple[int, int]]) -> list[ShardDone]:
        nonlocal ticked
        finished = []
        shards = [make(first, last) for first, last in ranges]
        results = map_shards(work, shards, told)
        try:
            for done in results:
                if not (folder / done.name).is_dir():
                    raise OutputError(
                        f"a worker says that it wrote {folder / done.name}, and it is not there. Workers need the "
                        "run folder on a file system that they share with the process that runs the flow."
                    )
                take(done)
                finished.append(done)
                late = sum(item.last - item.first for item in finished) - ticked
                if late > 0:
                    told(late)
        except BaseException as error:
            # Whoever hands shards over is told what ended it: the workers have what they were given.
            throw = getattr(results, "throw", None)
            if throw is not None:
                throw(error)
            raise
        ticked = 0
        return finished

    gaps = _gaps(standing, units)
    if settings.shard_images is not None:
        size = max(1, settings.shard_images // unit_size)
    else:
        if seconds is None and gaps:
            probes = _cut(gaps, _PROBED)[: map_shards.workers]
            finished = run(probes)
            seconds = min(done.seconds for done in finished)
            gaps = _gaps([*standing, *finished], units)
        size = shard_units(seconds or 0.0, sum(last - first for first, last in gaps), map_shards)
    if gaps:
        run(_cut(gaps, size))
    return found


def shard_units(seconds: float, units: int, map_shards: MapShards) -> int:
    """Units of a shard, where a unit takes so many seconds and so many are to be done.

    As many shards as there should be for every worker to have its part to the end; but not longer than
    `most_seconds`, and above all not shorter than `least_seconds`.
    """
    seconds = max(seconds, 1e-6)
    wanted = min(seconds * units / map_shards.parts, map_shards.most_seconds)
    wanted = max(wanted, map_shards.least_seconds)
    return max(1, min(units, math.ceil(wanted / seconds)))


def _standing(
    folder: Path, units: int, made_with: dict[str, str], intact: Callable[[ShardDone], bool]
) -> list[ShardDone]:
    """Shards that are whole, in order and apart; whatever else lies there is removed."""
    found: list[ShardDone] = []
    for directory in sorted(folder.iterdir()):
        try:
            done = _read(directory)
            ours = done.made_with == made_with and directory.name == done.name
            after = found[-1].last if found else 0
            if ours and after <= done.first < done.last <= units and intact(done):
                found.append(done)
                continue
        except (OSError, ValueError, KeyError, ValidationError):
            pass
        if directory.is_dir():
            shutil.rmtree(directory, ignore_errors=True)
        else:
            directory.unlink(missing_ok=True)
    return found


def _read(directory: Path) -> ShardDone:
    return ShardDone.model_validate(json.loads((directory / SHARD_FILE).read_text(encoding="utf-8")))


def _gaps(standing: Sequence[ShardDone], units: int) -> list[tuple[int, int]]:
    gaps, at = [], 0
    for first, last in [*sorted((done.first, done.last) for done in standing), (units, units)]:
        if first > at:
            gaps.append((at, first))
        at = max(at, last)
    return gaps


def _cut(gaps: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, last)) for first, last in gaps for at in range(first, last, size)]
