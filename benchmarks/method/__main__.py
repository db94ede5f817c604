"""The method against every peer: one command, cell by cell, that goes on where it was.

    python -m benchmarks.method --list                    # all cells, with minutes and what is done
    python -m benchmarks.method --only utility            # some; without --only all but gpu
    python -m benchmarks.method --cells '*digits*'        # those whose name fits, and what they need; '*gpu*' too
    python -m benchmarks.method --report                  # docs/method.md, method.json and pictures of what is there

Each cell runs in a process of its own, at most 20 minutes, and leaves a record in benchmarks/method/records, which is
committed: another clone goes on from there. What cells make lies in --results (runs/method, not committed). Kill the
command and run it again. Figures belong to an idle machine: every record has the load before and after.
A cell that other code made is marked in the list and the report, and done again only with --redo-stale.
`--minutes` sets one budget for all, for trying; such cells have names of their own and are told only by `--report
--minutes`. Exit code 0: all asked for is done; 1: a cell failed (the others went on); 2: wrong use; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.method.cells import (
    LIMIT_MINUTES,
    PARTS,
    REPOSITORY,
    RESULTS,
    Cell,
    Place,
    all_cells,
    records_of,
    refuse_without_gpu,
    run_cell,
)
from benchmarks.method.settings import MissingData
from benchmarks.method.speed import default_data
from synthaug.errors import BusyError, SynthaugError, UsageError
from synthaug.formats.atomic import write_text

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted; run the command again to go on", file=sys.stderr)
        return _INTERRUPTED
    except SynthaugError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.method", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--only", nargs="+", choices=PARTS, help="Parts of the benchmark; all but gpu where not given.")
    found.add_argument("--cells", nargs="+", metavar="PATTERN", help="Names of cells, * and ? allowed.")
    found.add_argument("--replicates", type=int, default=3, help="Rare subset and generator seed, 0 to this (3).")
    found.add_argument("--minutes", type=float, help="One budget of training and sampling for all cells, for trying.")
    found.add_argument("--trial-minutes", type=float, default=10.0, help="evaluate.minutes of every trial (10).")
    found.add_argument("--threads", type=int, default=2, help="Threads of ours and of every peer (2).")
    found.add_argument("--seconds", type=float, default=20.0, help="Of each measurement of speed (20).")
    found.add_argument("--results", type=Path, default=RESULTS, help="Folder of what cells make.")
    found.add_argument("--records", type=Path, help="Folder of the records; of other --results, inside them.")
    found.add_argument("--data", type=Path, default=default_data(), help="Folder of the published files.")
    found.add_argument("--docs", type=Path, default=REPOSITORY / "docs", help="Where --report writes.")
    found.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "synthaug-benchmarks", help="Environments of peers."
    )
    found.add_argument("--list", action="store_true", help="Print the cells, and run none.")
    found.add_argument("--report", action="store_true", help="Write the tables and pictures, and run nothing.")
    found.add_argument("--redo-stale", action="store_true", help="Do cells again that were made by other code.")
    found.add_argument("--one", help=argparse.SUPPRESS)  # this very cell, in this process
    return found


def _run(options: argparse.Namespace) -> int:
    for name in ("replicates", "threads", "trial_minutes", "seconds", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}, and must be above 0.")
    records = options.records or records_of(options.results)
    place = Place(
        options.results.resolve(), options.data.resolve(), options.cache.resolve(), options.threads,
        options.trial_minutes, options.seconds, records and records.resolve(),
    )  # fmt: skip
    cells = all_cells(options.replicates, options.minutes)
    if options.one is not None:
        return _one(next(cell for cell in cells if cell.name == options.one), place)
    chosen = choose(cells, options.only, options.cells)
    if options.list:
        show(chosen, place)
        return 0
    if options.report:
        from benchmarks.method.report import write_report

        for path in write_report(cells, place, options.docs.resolve()):
            print(path)
        return 0
    if any(cell.part == "gpu" for cell in chosen):
        refuse_without_gpu()
    with _held(place.results):
        return _all(chosen, place, options)


def choose(cells: Sequence[Cell], only: Sequence[str] | None, patterns: Sequence[str] | None) -> list[Cell]:
    """Cells that were asked for, with what they need before them.

    Raises:
        UsageError: A pattern fits no cell.
    """
    parts = set(only or {*PARTS} - {"gpu"})

    def asked_for(cell: Cell) -> bool:
        if not patterns:
            return cell.part in parts and not cell.optional
        # '*pneumonia-60*' on a machine without a GPU means what can be run there.
        return any(
            fnmatch.fnmatchcase(cell.name, one) and (cell.part in parts or (not only and "gpu" in one))
            for one in patterns
        )

    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in cells):
            raise UsageError(
                f"--cells {pattern!r} fits no cell. `python -m benchmarks.method --list` prints their names."
            )
    wanted = [cell for cell in cells if asked_for(cell)]
    needed = {name for cell in wanted for name in cell.needs} | {cell.name for cell in wanted}
    return [cell for cell in cells if cell.name in needed]


def show(cells: Sequence[Cell], place: Place) -> None:
    """Names, minutes on two idle cores, and what is done."""
    left = 0.0
    for cell in cells:
        done = place.load(cell.name)
        left += 0 if done else cell.estimate
        state = f"done in {done['seconds'] / 60:.1f} min" if done else ""
        state += ", made by other code" if place.stale(cell) else ""
        print(f"{cell.name:52} {cell.estimate:5.1f} min  {state}".rstrip())
    print(f"{len(cells)} cells, about {left / 60:.1f} hours left on two idle cores")


def _all(cells: Sequence[Cell], place: Place, options: argparse.Namespace) -> int:
    failed, by_name, kept = 0, {cell.name: cell for cell in cells}, []

    def done(cell: Cell) -> bool:
        return place.load(cell.name) is not None and not (options.redo_stale and place.stale(cell))

    # Done on another machine, a cell has to be done again for those that go on from what it made.
    missed = {
        name
        for cell in cells
        if not done(cell)
        for name in cell.needs
        if done(by_name[name]) and not place.at_hand(name)
    }
    for number, cell in enumerate(cells, start=1):
        stale = place.stale(cell)
        if done(cell) and cell.name not in missed:
            kept += [cell.name] if stale else []
            continue
        if missing := [name for name in cell.needs if place.load(name) is None]:
            print(f"{cell.name}: left out, since {', '.join(missing)} is not done", flush=True)
            failed += 1
            continue
        if others := [name for name in cell.needs if place.stale(by_name[name])]:
            # Its stages lie in that code's folder, and a figure of two states of the code is one of neither.
            print(
                f"{cell.name}: left out, since {', '.join(others)} was made by other code; --redo-stale makes it again",
                flush=True,
            )
            failed += 1
            continue
        print(f"{time.strftime('%H:%M:%S')} {number} of {len(cells)} {cell.name}", flush=True)
        if (problem := _in_process(cell, place, options)) is not None:
            print(f"{cell.name}: {problem}", flush=True)
            failed += 1
    if kept:
        print(f"{len(kept)} cells made by other code are kept as they are; --redo-stale makes them again", flush=True)
    return 1 if failed else 0


def _in_process(cell: Cell, place: Place, options: argparse.Namespace) -> str | None:
    """Run a cell in a process of its own; what went wrong, or None. Its words are kept beside its result."""
    command = [sys.executable, "-m", "benchmarks.method", "--one", cell.name]
    for name in ("replicates", "trial_minutes", "threads", "seconds", "results", "records", "data", "cache", "minutes"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value.resolve() if isinstance(value, Path) else value)]
    log = place.results / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(place.threads)}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=REPOSITORY, start_new_session=True
        )
        try:
            code = process.wait(60 * LIMIT_MINUTES)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"stopped after {LIMIT_MINUTES:g} minutes; run the command again and it goes on. {log} has its words"
        except BaseException:
            _end(process)
            raise
    if code == 0 and place.load(cell.name) is not None:
        return None
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"failed with {code}: {said[-1][:400] if said else 'no words'} ({log})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """A cell and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _one(cell: Cell, place: Place) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        run_cell(cell, place)
    except MissingData as error:
        print(f"MissingData: {error}", file=sys.stderr)
        return 1
    return 0


def _end_with(parent: int) -> None:
    """A cell ends, with all it started, when the command that runs it is gone, also when that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


@contextlib.contextmanager
def _held(results: Path) -> Iterator[None]:
    """One command at a time in a results folder: two would share the cores, and no figure would mean anything."""
    results.mkdir(parents=True, exist_ok=True)
    ignored = results / ".gitignore"
    if not ignored.exists():
        write_text(ignored, "*\n")
    with (results / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"another benchmark runs in {results}. Wait for it, or give another --results.") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
