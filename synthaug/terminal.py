"""What a person or a script sees: log lines on stderr, results on stdout, exit codes.

| code | means |
| --- | --- |
| 0 | done |
| 1 | could not be finished through no fault of its settings, or `verify` found problems |
| 2 | the request itself cannot be carried out: settings, command line or data |
| 130 | Ctrl-C |
| 143 | SIGTERM |
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from synthaug.errors import SynthaugError, UsageError

if TYPE_CHECKING:
    from synthaug.pipeline import PlanSummary, RunSummary
    from synthaug.verify import VerifyResult

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
ERROR_LOG = "error.log"

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """SIGTERM, on the same way out as Ctrl-C, so that everything is cleaned up."""


class Session:
    """One command: where its results go, and the run folder once it is known."""

    def __init__(self, as_json: bool, results: TextIO) -> None:
        self.as_json = as_json
        self.output: Path | None = None
        self._results = results

    def emit(self, values: dict[str, Any]) -> None:
        """Print the one object of --json."""
        self._results.write(json.dumps(values, allow_nan=False) + "\n")
        self._results.flush()

    def say(self, text: str) -> None:
        self._results.write(text + "\n")
        self._results.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; numbers to the right. Nothing in a cell is taken for markup or terminal control."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # Not the table's own title, which is broken at the width of the columns.
        self.say(shown(title))
        table = Table()
        for position, name in enumerate(columns):
            numbers = all(isinstance(row[position], int | float) for row in rows)
            table.add_column(name, justify="right" if numbers else "left", no_wrap=position == 0, overflow="fold")
        for row in rows:
            table.add_row(*(Text(f"{cell:.1f}" if isinstance(cell, float) else shown(str(cell))) for cell in row))
        Console(file=self._results, highlight=False).print(table)


@contextmanager
def session(*, as_json: bool = False, verbosity: int = 0, debug: bool = False, logs: bool = True) -> Iterator[Session]:
    """Run a command's body; leave by SystemExit with the code that fits what was raised.

    Inside, whatever prints to stdout (a library, say) goes to stderr: stdout is for the result alone.
    """
    for stream in (sys.stdout, sys.stderr):
        # A class name must not be able to end a run because the terminal cannot spell it.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if logs:
        log_to_stderr(verbosity)
    here = Session(as_json, sys.stdout)
    try:
        with sigterm_interrupts(), redirect_stdout(sys.stderr):
            yield here
    except KeyboardInterrupt as error:
        # A second Ctrl-C must not turn the last line into a traceback.
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        where = f" in {here.output}" if here.output else ""
        happened = "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"
        _complain(here, error, f"{happened}. Every stage that was complete is kept{where}; run again to go on.")
        raise SystemExit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None
    except SynthaugError as error:
        if debug:
            traceback.print_exc()
        _complain(here, error, str(error))
        raise SystemExit(exit_code(error)) from None
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`); there is no one to tell, now or at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(FAILED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        _complain(here, error, f"unexpected {type(error).__name__}: {_one_line(error)}. {_keep_traceback(here, debug)}")
        raise SystemExit(FAILED) from None


def exit_code(error: BaseException) -> int:
    return REFUSED if isinstance(error, UsageError) else FAILED


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the main thread while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def log_to_stderr(verbosity: int) -> None:
    """Show the library's log lines: warnings at -1, information at 0, all at 1."""
    library = logging.getLogger("synthaug")
    library.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(max(verbosity, -1), logging.DEBUG))
    if not any(isinstance(handler.formatter, _Plain) for handler in library.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain("%(asctime)s %(message)s", "%H:%M:%S"))
        library.addHandler(handler)


def shown(text: str) -> str:
    """`text` without anything that a terminal would act on."""
    from synthaug.text import printable

    bare = text.strip()
    # `printable` is for names: it marks outer spaces and cuts long ones short.
    return text[: len(text) - len(text.lstrip())] + printable(bare, width=100_000) if bare else ""


def show_plan(here: Session, summary: PlanSummary, problem: str | None) -> None:
    plan = summary.plan
    if here.as_json:
        here.emit(
            {
                "run": str(summary.run),
                "dataset": summary.dataset,
                "classes": [
                    {
                        "name": item.name,
                        "real": item.n_real,
                        "target": item.n_target,
                        "synthetic": item.n_synthetic,
                        "refused": item.refused,
                        "note": item.note,
                    }
                    for item in plan.classes
                ],
                "splits": summary.splits,
                "set_aside": summary.set_aside,
                "held_back": summary.held_back,
                "problem": problem,
            }
        )
        return
    rows = [
        (item.name, item.n_real, item.n_target, item.n_synthetic, _plan_note(item.refused, item.note))
        for item in plan.classes
    ]
    here.table(f"Plan for {summary.dataset}", ("class", "real", "target", "synthetic", "note"), rows)
    for word, numbers in (("set aside", summary.set_aside), ("held back", summary.held_back)):
        if numbers:
            here.say(f"{word}: " + ", ".join(f"{shown(reason)} {n}" for reason, n in numbers.items()))


def show_run(here: Session, summary: RunSummary) -> None:
    if here.as_json:
        here.emit(summary.model_dump(mode="json"))
        return
    rows = [(name, item["real"], item["synthetic"], item["short"]) for name, item in summary.counts.items()]
    here.table(
        "Training images: real ones of the source, synthetic ones of the release",
        ("class", "real", "synthetic", "short of plan"),
        rows,
    )
    losses = [
        (name, *("unavailable" if value is None else f"{value:.4f}" for value in item.values()))
        for name, item in summary.heldout_loss.items()
    ]
    title = "Held-out denoising loss of the scarce classes (lower is better)"
    here.table(title, ("class", "after the base", "after fine-tuning"), losses)
    times = [(name, float(s), "reused" if name in summary.reused else "") for name, s in summary.seconds.items()]
    here.table("Stages", ("stage", "seconds", "note"), times)
    for note in summary.notes:
        here.say(f"note: {shown(note)}")
    here.say(f"verdict: {summary.verdict or summary.verdict_note}")
    here.say(f"release: {summary.release}")
    here.say(f"checkpoint: {summary.checkpoint}")
    here.say(f"contact sheet: {summary.contact_sheet}")
    here.say(f"rejected samples: {summary.rejected_sheet}")
    if summary.pushed_to:
        here.say(f"published: {shown(summary.pushed_to)}")


def show_verify(here: Session, result: VerifyResult) -> None:
    if here.as_json:
        here.emit(result.model_dump(mode="json"))
    elif result.ok:
        here.say(
            f"{result.release}: as its manifest says. {result.n_files} files, {result.n_rows} rows, "
            f"{result.n_images} synthetic images, digest {result.digest[:12]}."
        )
    else:
        here.say(f"{result.release}: does not agree with its manifest.")
        for problem in result.problems:
            here.say(f"  {shown(problem)}")


class _Plain(logging.Formatter):
    """A log line stays one line of plain text, whatever a file or a class is called."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, self.datefmt)} {level}{shown(record.getMessage())}"


def _plan_note(refused: str | None, note: str | None) -> str:
    return f"refused: {refused}" if refused else note or ""


def _complain(here: Session, error: BaseException, message: str) -> None:
    lines = "\n".join(shown(line) for line in message.splitlines())
    sys.stderr.write(f"synthaug: {lines}\n")
    if here.as_json:
        here.emit({"error": message, "kind": type(error).__name__})


def _keep_traceback(here: Session, debug: bool) -> str:
    if not debug and here.output is not None and here.output.is_dir():
        path = here.output / ERROR_LOG
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{traceback.format_exc()}\n")
            return f"The traceback is in {path}."
    return "" if debug else "Run again with --debug for the traceback."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
