"""What shards cost, and what workers bring, with a stand-in that sleeps in place of the network.

    python -m benchmarks.scale [--runners threads processes dask ray] [--shards 1000] [--seconds 0.5] [--live]

For every engine, in one flow run on a real Prefect server of its own (127.0.0.1, SQLite):

- cost: `--shards` shards that take no time at all, by one worker. What an engine, Prefect with its server and the
  shard's own files cost: seconds of the clock and of the processor (the whole tree of processes) by the number of
  shards. The share is that of the processor in the seconds that a shard has by default at least.
- speed: the sample stage itself, 40 micro-batches of `--seconds` in shards of one, by one worker and by two. A stand-in
  that sleeps takes no core from anybody, so the ratio is that of free cores.
- `--live`: 1,000 shards of the default's least seconds by 16 threads, against the seconds that were slept.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from synthaug import generators  # noqa: E402
from synthaug.config import Config, parse_config  # noqa: E402
from synthaug.records import Checkpoint, PixelSpec, SampleRequest, Source  # noqa: E402
from synthaug.sample import SampleShard, draw_shard, sample  # noqa: E402
from synthaug.scale import MapShards, ShardDone, Tick  # noqa: E402

_UNIT, _SIZE = 8, 8


class Sleeper:
    """Sleeps and draws noise; only what the sample stage asks of a generator. Its checkpoint says for how long."""

    solver = "noise"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @classmethod
    def load(cls, directory: Path, *, device: str) -> Sleeper:
        return cls(float((directory / "seconds").read_text()))

    def default_steps(self, guidance: float) -> int:
        return 8

    def sample(self, labels: Any, seeds: Any, *, steps: int, guidance: float) -> np.ndarray:
        time.sleep(self.seconds)
        return np.random.default_rng(int(seeds[0])).integers(0, 256, (len(seeds), _SIZE, _SIZE, 1), dtype=np.uint8)


def draw_asleep(shard: SampleShard, tick: Tick) -> ShardDone:
    """`draw_shard` for a worker that has not heard of the stand-in."""
    generators.REGISTRY["sleeper"] = "benchmarks.scale:Sleeper"
    return draw_shard(shard, tick)


class Asleep:
    """Hands `draw_asleep` to the engine in place of the stage's own work."""

    def __init__(self, engine: MapShards) -> None:
        self._engine = engine
        self.workers, self.parts = engine.workers, engine.parts
        self.least_seconds, self.most_seconds = engine.least_seconds, engine.most_seconds

    def __call__(self, work: Any, shards: Sequence[Any], tick: Tick) -> Iterator[ShardDone]:
        return self._engine(draw_asleep, shards, tick)


def draw(config: Config, engine: MapShards, place: Path, units: int, seconds: float) -> tuple[float, str]:
    """Run the sample stage; wall seconds and the digest of the images."""
    generators.REGISTRY["sleeper"] = "benchmarks.scale:Sleeper"
    (place / "pipeline").mkdir(parents=True)
    (place / "pipeline" / "seconds").write_text(str(seconds))
    spec = {"channels": 1, "dtype": "uint8", "colour": "grey", "low": 0, "high": 255, "size": _SIZE, "fit": "none"}
    edges = {"interpolation": "none", "smallest": (_SIZE, _SIZE), "largest": (_SIZE, _SIZE)}
    source = Source.model_construct(classes=("a", "b"), pixels=PixelSpec.model_validate({**spec, **edges}))
    checkpoint = Checkpoint.model_construct(directory=place, digest="0" * 64, generator="sleeper")
    started = time.monotonic()
    batch = sample(
        config, source, checkpoint, SampleRequest(ranges={1: (0, units * _UNIT)}), place, map_shards=Asleep(engine)
    )
    return time.monotonic() - started, batch.digest


def job(runner: str, workers: int) -> Config:
    return parse_config(
        {
            "name": "scale",
            "output": "unused",
            "dataset": {"format": "digits"},
            "image": {"size": _SIZE},
            "train": {"device": "cpu", "threads": 1},
            "sample": {"micro_batch": _UNIT, "threads": 1, "steps": 2},
            "scale": {"runner": runner, "workers": workers, "shard_images": _UNIT},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runners", nargs="+", default=["threads", "processes", "dask", "ray"])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--live", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as free:
        place = Path(temporary)
        os.environ["PREFECT_HOME"] = str(place / "prefect")
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        # Before Prefect is imported: threads of its own would not hear of it later.
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        from prefect import flow

        from flows.server import local_server
        from flows.shards import TaskShards, shards_of

        logging.getLogger("synthaug").setLevel(logging.WARNING)

        def timed(runner: str, workers: int, units: int, seconds: float) -> tuple[float, float]:
            """Seconds of clock and processor of the second stage of a run: workers are there, and know their work."""

            @flow(name="scale", persist_result=False)
            def measured() -> list[float]:
                name = f"{runner}-{workers}-{units}-{seconds}"
                with shards_of(job(runner, workers)) as engine:
                    # Every worker draws something first.
                    draw(job(runner, workers), engine, place / f"{name}-first", 4 * workers, 0.2)
                    before = processor()
                    took, _ = draw(job(runner, workers), engine, place / name, units, seconds)
                    return [took, processor() - before]

            took, busy = measured()
            return took, busy

        with local_server(port):
            print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {given.shards} shards")
            print("| engine | cost, ms | processor, ms | default shard, s | share | one worker, s | two, s | ratio |")
            print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
            for runner in given.runners:
                least = TaskShards(job(runner, 1)).least_seconds
                cost, busy = (value / given.shards for value in timed(runner, 1, given.shards, 0.0))
                one, two = (timed(runner, workers, 40, given.seconds)[0] for workers in (1, 2))
                print(
                    f"| {runner} | {1000 * cost:.0f} | {1000 * busy:.0f} | {least:.0f} | {busy / least:.2%} | "
                    f"{one:.1f} | {two:.1f} | {one / two:.2f} |",
                    flush=True,
                )
            if given.live:
                least = TaskShards(job("threads", 1)).least_seconds
                took, asleep = timed("threads", 16, given.shards, least)[0], given.shards * least / 16
                print(f"{given.shards} shards of {least:.0f} s by 16 threads: {took:.1f} s for {asleep:.1f} s of sleep")


def processor() -> float:
    """Seconds of processor of this process and all below it."""
    import psutil

    here = psutil.Process()
    times = [process.cpu_times() for process in [here, *here.children(recursive=True)]]
    return sum(item.user + item.system for item in times)


if __name__ == "__main__":
    # Workers know the module by its name.
    from benchmarks.scale import main as run

    run()
