"""What the flow costs over the plain run of the same job, start-up aside.

    python benchmarks/flow.py [--rounds 3] [--images 3000] [--data ../shared/data/pneumoniamnist.npz]

The job is `configs/pneumoniamnist.yaml` with a fixed number of training images in place of minutes, so that both ways
do the same work, few samples and no trial. In one process that has imported everything and has its Prefect server
running: plain and as a flow in turn, each into an empty folder; both must make the same release. Prints for each pair
the seconds of wall and processor time and the machine's load, and in the end the medians of the ratios.

Where others use the machine, a ratio of two runs says little: they differ by more than the flow costs. So what the
flow adds is also measured where it is added, within a run: the seconds before, between and after the stages' own work
that a plain run does not have, those in which a stage waits for its progress to be shown, and the processor time of
Prefect's threads and of its server, which work beside the stages.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
_TICKS = os.sysconf("SC_CLK_TCK")


def job(output: Path, data: Path, images: int) -> dict[str, Any]:
    """The cut-down configuration, as plain data."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs/pneumoniamnist.yaml").read_text(encoding="utf-8"))
    values["output"] = str(output)
    values["dataset"]["path"] = str(data)
    values["train"] = {"images": images, "threads": 1}
    values["sample"] = {"threads": 1}
    values["plan"] = {"target_ratio": 0.05}
    values["audit"] = {"min_coverage": 0, "classifier_steps": 100, "planted": 20}
    values["evaluate"] = {"enabled": False}
    return values


def _seconds_of(stat: Path) -> tuple[str, float]:
    """Parent and processor time of a process or thread."""
    fields = stat.read_text().rpartition(")")[2].split()
    return fields[1], (int(fields[11]) + int(fields[12])) / _TICKS


def server_seconds() -> float:
    """Processor time of the processes that this one started and that still run: the server's."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, seconds = _seconds_of(path)
        except OSError:
            continue
        total += seconds if parent == str(os.getpid()) else 0.0
    return total


def thread_seconds() -> dict[int, float]:
    """Processor time of this process's threads of Python, but for the one that works."""
    others = [thread.native_id for thread in threading.enumerate() if thread is not threading.main_thread()]
    return {number: _seconds_of(Path(f"/proc/self/task/{number}/stat"))[1] for number in others if number is not None}


class Added:
    """What the flow adds to a run in the thread that works: seconds of wall and of processor time."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    @contextmanager
    def counted(self, sign: int) -> Iterator[None]:
        wall, processor = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            self.wall += sign * (time.monotonic() - wall)
            self.processor += sign * (time.thread_time() - processor)

    def around(self, function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def counted(*given: Any, **settings: Any) -> Any:
            with self.counted(sign):
                return function(*given, **settings)

        return counted


def _nothing() -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/pneumoniamnist.npz")
    parser.add_argument("--flow-alone", action="store_true", help="no plain runs: only what is measured within a flow")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        os.environ.pop("PREFECT_API_URL", None)

        import flows.augment as flow_module
        from flows import tasks
        from flows.server import use_guarded_server
        from synthaug import pipeline
        from synthaug.config import parse_config
        from tests.conftest import tiny_values

        logging.getLogger("prefect").setLevel(logging.WARNING)
        use_guarded_server()
        augment, as_task, show = pipeline.augment, tasks.as_task, tasks._Shown.__call__

        def as_flow(config: Any, added: Added) -> Any:
            # The whole flow, without the job in it; each task, without its work; and each progress that is shown.
            def stage(title: str, work: Callable[[], Any]) -> Any:
                return added.around(as_task, 1)(title, added.around(work, -1))

            flow_module.as_task = stage
            flow_module.pipeline.augment = added.around(augment, -1)
            tasks._Shown.__call__ = added.around(show, 1)  # type: ignore[method-assign]
            try:
                with added.counted(1):
                    return flow_module.augment(config)
            finally:
                flow_module.as_task, flow_module.pipeline.augment = as_task, augment
                tasks._Shown.__call__ = show  # type: ignore[method-assign]

        if given.flow_alone:
            flow_module.flow(_nothing, name="start")()  # the server's start; imports are the stages' own work
        else:
            as_flow(parse_config(tiny_values(folder / "first")), Added())
        ratios: list[tuple[float, ...]] = []
        for number in range(given.rounds):
            pair: tuple[str, ...] = ("plain", "flow") if number % 2 else ("flow", "plain")
            pair = ("flow",) if given.flow_alone else pair
            took: dict[str, tuple[float, float]] = {}
            digests = set()
            for name in pair:
                config = parse_config(job(folder / f"{name}-{number}", given.data, given.images))
                added, threads, server = Added(), thread_seconds(), server_seconds()
                wall, processor = time.monotonic(), time.process_time()
                summary = augment(config) if name == "plain" else as_flow(config, added)
                took[name] = (time.monotonic() - wall, time.process_time() - processor)
                digests.add(summary.release_digest)
                print(f"{name}: wall {took[name][0]:.1f} s, processor {took[name][1]:.1f} s; ", end="")
                print(f"load {os.getloadavg()[0]:.1f}", flush=True)
                if name == "flow":
                    beside = sum(seconds - threads.get(at, 0.0) for at, seconds in thread_seconds().items())
                    serving = server_seconds() - server
                    shares = (
                        added.wall / (took[name][0] - added.wall),
                        (added.processor + beside) / (took[name][1] - added.processor - beside),
                        (added.processor + beside + serving) / (took[name][1] - added.processor - beside),
                    )
                    print(
                        f"  added: wall {added.wall:.2f} s ({shares[0]:.2%}); processor {added.processor:.2f} s in the "
                        f"thread that works, {beside:.2f} s in Prefect's ({shares[1]:.2%}), {serving:.2f} s in the "
                        f"server (with it {shares[2]:.2%})",
                        flush=True,
                    )
            if given.flow_alone:
                continue
            assert len(digests) == 1, "the flow made another release than the plain run"
            ratios.append(tuple(took["flow"][at] / took["plain"][at] for at in (0, 1)))
            print(f"pair {number + 1}: flow over plain, wall {ratios[-1][0]:.3f}, processor {ratios[-1][1]:.3f}")
    for at, what in enumerate(("wall", "processor") if ratios else ()):
        column = [ratio[at] for ratio in ratios]
        print(
            f"median of flow over plain, {what}: {statistics.median(column):.3f} "
            f"({min(column):.3f} to {max(column):.3f})"
        )


if __name__ == "__main__":
    main()
