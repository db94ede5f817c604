"""What a person or a script sees: log lines on stderr, results on stdout, exit codes.

| code | means |
| --- | --- |
| 0 | done |
| 1 | could not be finished through no fault of its settings, or `verify` or `remake` found problems |
| 2 | the request itself cannot be carried out: settings, command line or data |
| 130 | Ctrl-C |
| 143 | SIGTERM |
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
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
    from synthaug.affected import AffectedResult
    from synthaug.rebuild import RebuildResult
    from synthaug.records import CopyRates, Verdict
    from synthaug.remake import RemakeResult
    from synthaug.status import RunStatus
    from synthaug.summaries import AuditSummary, PlanSummary, RunSummary
    from synthaug.verify import VerifyResult

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
ERROR_LOG = "error.log"
_MOST_LISTED = 20
# What begins with a number, a sign or not, and goes on with no word: '0.812', '+3.1 [+0.8, +5.4]', '0.812 ± 0.010'.
_NUMERIC = re.compile(r"[+-]?\d[^A-Za-z]*")

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """SIGTERM, on the same way out as Ctrl-C, so that everything is cleaned up."""


class Session:
    """One command: where its results go, and the run folder once it is known."""

    def __init__(self, as_json: bool, results: TextIO) -> None:
        self.as_json = as_json
        self.output: Path | None = None
        self.told: KeyboardInterrupt | None = None  # by a signal, to end
        self._results = results

    def emit(self, values: dict[str, Any]) -> None:
        """Print the one object of --json."""
        self._results.write(json.dumps(values, allow_nan=False) + "\n")
        self._results.flush()

    def say(self, text: str) -> None:
        self._results.write(text + "\n")
        self._results.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; numbers, and texts that are nothing else, to the right.

        Nothing in a cell is taken for markup or terminal control.
        """
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # Not the table's own title, which is broken at the width of the columns.
        self.say(shown(title))
        table = Table()
        for position, name in enumerate(columns):
            numbers = _are_numbers([row[position] for row in rows], is_name=position == 0)
            table.add_column(name, justify="right" if numbers else "left", no_wrap=position == 0, overflow="fold")
        for row in rows:
            table.add_row(*(Text(f"{cell:.1f}" if isinstance(cell, float) else shown(str(cell))) for cell in row))
        # Where no one's window ends, in a file or a pipe, there is room enough for intervals.
        known = self._results.isatty() or "COLUMNS" in os.environ
        Console(file=self._results, highlight=False, width=None if known else 120).print(table)


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
        with _signals_interrupt(here), redirect_stdout(sys.stderr):
            yield here
    except KeyboardInterrupt as error:
        raise SystemExit(_interrupted(here, error)) from None
    except Exception as error:
        # A library that takes whatever is raised inside it for a failure of its own makes an error of a signal.
        raise SystemExit(_failed(here, error, debug) if here.told is None else _interrupted(here, here.told)) from None


def exit_code(error: BaseException) -> int:
    return REFUSED if isinstance(error, UsageError) else FAILED


def _interrupted(here: Session, error: KeyboardInterrupt) -> int:
    # A second Ctrl-C must not turn the last line into a traceback.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    where = f" in {here.output}" if here.output else ""
    happened = "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"
    _complain(here, error, f"{happened}. Every stage that was complete is kept{where}; run again to go on.")
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def _failed(here: Session, error: Exception, debug: bool) -> int:
    if isinstance(error, BrokenPipeError):
        # The reader of stdout has gone (`| head`); there is no one to tell, now or at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    if debug:
        traceback.print_exc()
    if isinstance(error, SynthaugError):
        _complain(here, error, str(error))
        return exit_code(error)
    _complain(here, error, f"unexpected {type(error).__name__}: {_one_line(error)}. {_keep_traceback(here, debug)}")
    return FAILED


@contextmanager
def _signals_interrupt(here: Session) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise in the main thread while the block runs, and be remembered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: Any) -> None:
        here.told = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise here.told

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    # Where it is ignored, in a shell's background say, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    _show_copies(here, summary.copies)
    times = [(name, float(s), "reused" if name in summary.reused else "") for name, s in summary.seconds.items()]
    here.table("Stages", ("stage", "seconds", "note"), times)
    for note in summary.notes:
        here.say(f"note: {shown(note)}")
    here.say(f"membership attack: {shown(summary.membership_sentence)}")
    here.say(f"verdict: {shown(summary.verdict_sentence)}")
    if summary.verdict_file:
        here.say(f"verdict file: {summary.verdict_file}")
    here.say(f"release: {summary.release}")
    here.say(f"checkpoint: {summary.checkpoint}")
    here.say(f"contact sheet: {summary.contact_sheet}")
    here.say(f"rejected samples: {summary.rejected_sheet}")
    here.say(f"report: {summary.report}")
    if summary.pushed_to:
        here.say(f"published: {shown(summary.pushed_to)}")


def show_rebuild(here: Session, result: RebuildResult) -> None:
    if here.as_json:
        here.emit(result.model_dump(mode="json"))
        return
    # What is missing was said by the log already, and stands on the page.
    here.say(f"report: {result.report}")


def show_verdict(here: Session, verdict: Verdict, pictures: Sequence[Path], path: Path | None) -> None:
    """What a trial came to: how arms did on validation, finalists and classes on test, and the sentence last."""
    if here.as_json:
        values = _finite(verdict.model_dump(mode="json"))
        files = {"verdict_file": str(path) if path else None, "pictures": [str(picture) for picture in pictures]}
        here.emit({**values, **files})
        return
    _show_arms(here, verdict)
    _show_finalists(here, verdict)
    _show_classes(here, verdict)
    _show_rest(here, verdict)
    for picture in pictures:
        here.say(f"picture: {shown(str(picture))}")
    if path is not None:
        here.say(f"verdict file: {shown(str(path))}")
    here.say(f"verdict: {shown(verdict.sentence)}")


def _show_arms(here: Session, verdict: Verdict) -> None:
    from synthaug.report.verdict_words import count, mean_and_spread, metric_words

    rows = [
        (_name(arm.key, 40), arm.side, mean_and_spread(arm.scores), len(arm.scores), arm.dropped or "finalist")
        for arm in verdict.arms
    ]
    title = (
        f"Arms on {count(verdict.n_validation, 'validation image')}: {metric_words(verdict.metric)}, mean ± standard "
        "deviation over the seeds (higher is better)"
    )
    _table(here, title, ("arm", "side", "score", "seeds", "note"), rows)


def _show_finalists(here: Session, verdict: Verdict) -> None:
    from synthaug.report.verdict_words import METRICS, count, known_differences, look, metric_words, points, share

    figures = [
        (_name(item.key, 40), *(share(getattr(item, metric)) for metric in METRICS)) for item in verdict.finalists
    ]
    where = f"{count(verdict.n_test, 'test image')}, {count(verdict.seeds, 'seed')}, {look(verdict.looks)}"
    title = f"Finalists on {where} (higher is better; calibration error: lower is better)"
    _table(here, title, ("arm", *METRICS.values()), figures)
    rows: list[tuple[str, str, str]] = []
    before = ""
    for _, words, metric, interval in known_differences(verdict.differences):
        rows.append((words if words != before else "", metric_words(metric), points(interval)))
        before = words
    recipe = _name(verdict.recipe or "the chosen recipe", 60)
    title = f"{recipe} minus another arm on the test split, in points with 95 % intervals (higher is better)"
    _table(here, title, ("minus", "metric", "difference"), rows)


def _show_classes(here: Session, verdict: Verdict) -> None:
    from synthaug.report.verdict_words import by_words, points, share, usable

    rows = [
        (
            _name(item.name),
            item.n_real,
            item.n_test,
            item.tried,
            item.dose,
            points(item.recall_gain),
            points(item.auprc_gain),
        )
        for item in verdict.classes
    ]
    title = (
        "Classes that were offered synthetic images; dose: how many are recommended; gains on the test split in points"
    )
    columns = ("class", "real", "test", "tried", "dose", "recall gain", "AUPRC gain")
    _table(here, f"{title} (higher is better)", columns, rows)
    quality = []
    for item in verdict.classes:
        if (found := item.quality) is not None and found.unavailable is None:
            kid = usable(found.kid)
            spelled = f"{kid.estimate:.3f} [{kid.low:.3f}, {kid.high:.3f}]" if kid else share(None)
            figures = [share(value, 2) for value in (found.precision, found.recall, found.coverage)]
            quality.append((_name(item.name), found.n_samples, *figures, spelled))
    title = "Samples against real training images (higher is better; KID, kernel inception distance: lower is better)"
    _table(here, title, ("class", "samples", "precision", "recall", "coverage", "KID"), quality)
    missing = {item.name: item.quality.unavailable for item in verdict.classes if item.quality}
    for why, names in by_words({name: why for name, why in missing.items() if why}).items():
        here.say(f"sample quality unavailable: {_names(names)}: {shown(why)}")
    for words, names in by_words({item.name: item.advice for item in verdict.classes if item.advice}).items():
        here.say(f"advice: {_names(names)}: {shown(words)}")
    gains = [
        (_name(item.name), item.n_test, share(item.before), share(item.after), points(item.gain))
        for item in verdict.subgroups
    ]
    title = "Subgroups of the test split (higher is better; gain in points)"
    _table(here, title, ("subgroup", "test", "before", "after", "gain"), gains)


def _show_rest(here: Session, verdict: Verdict) -> None:
    from synthaug.report.verdict_words import by_words, points

    if verdict.worth:
        here.say(f"worth: {shown(verdict.worth)}")
    if verdict.trained_out is not None:
        here.say(
            f"four times the steps for the best real-only arm, on validation: {points(verdict.trained_out)} points"
        )
    for why, names in by_words(verdict.not_tried).items():
        here.say(f"not tried: {_names(names)}: {shown(why)}")
    lists = (("note", verdict.notes), ("reason", verdict.reasons), ("what would change it", verdict.advice))
    for word, lines in lists:
        for line in lines:
            here.say(f"{word}: {shown(line)}")
    if verdict.minutes_needed is not None and math.isfinite(verdict.minutes_needed):
        here.say(f"minutes it would take: {verdict.minutes_needed:.0f}")


def _table(here: Session, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table unless it is empty."""
    if rows:
        here.table(title, columns, rows)


def _are_numbers(cells: Sequence[Any], is_name: bool) -> bool:
    """Whether a column goes to the right; a class may be called 7, and what was not measured has no number."""
    from synthaug.report.verdict_words import UNAVAILABLE

    if is_name or all(isinstance(cell, int | float) for cell in cells):
        return all(isinstance(cell, int | float) for cell in cells)
    known = [cell for cell in cells if cell not in ("", UNAVAILABLE)]
    return bool(known) and all(isinstance(cell, int | float) or _NUMERIC.fullmatch(cell) for cell in known)


def _name(name: str, width: int = 28) -> str:
    from synthaug.text import printable

    return printable(name, width=width)


def _names(names: Sequence[str]) -> str:
    """Names in a row; a hundred are not read."""
    listed = ", ".join(_name(name) for name in names[:12])
    return listed if len(names) <= 12 else f"{listed} and {len(names) - 12} more"


def _finite(values: Any) -> Any:
    """Plain data with null in place of numbers that JSON does not have."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _show_copies(here: Session, copies: dict[str, CopyRates]) -> None:
    here.table(
        "Samples that repeat training images, before they are dropped",
        ("class", "samples", "copies and near-copies", "95 % interval", "d1/d2 < 1/3"),
        [
            (name, rates.n, rates.n_near, "{:.1%} to {:.1%}".format(*rates.near_bounds), rates.n_low_ratio)
            for name, rates in copies.items()
        ],
    )


def show_audit(here: Session, summary: AuditSummary) -> None:
    """What the audit says of another tool's samples."""
    if here.as_json:
        here.emit(_finite(summary.model_dump(mode="json")))
        return
    rows = [
        (
            item.name,
            item.n_candidates,
            item.n_accepted,
            "unavailable" if item.coverage is None else f"{item.coverage:.2f} of {item.coverage_expected:.2f}",
            ", ".join(f"{number} {reason}" for reason, number in item.rejected.items()),
        )
        for item in summary.report.classes
        if item.n_candidates
    ]
    here.table(
        "Samples by class; coverage of the real training images, of what as many honest samples would reach (higher is "
        "better)",
        ("class", "offered", "passed", "coverage", "rejected"),
        rows,
    )
    _show_copies(here, {item.name: item.copies for item in summary.report.classes if item.copies is not None})
    for note in summary.report.notes:
        here.say(f"note: {shown(note)}")
    here.say(f"audit: {summary.audit_file}")
    here.say(f"rejected samples: {summary.rejected_sheet}")


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


def show_remake(here: Session, result: RemakeResult) -> None:
    """What became of samples that were made again: counts by class, then those that are not as they were."""
    if here.as_json:
        here.emit(_finite(result.model_dump(mode="json")))
        return
    outcomes = ("identical", "within tolerance", "differs", "could not be made")
    counts: dict[str, dict[str, int]] = {}
    for item in result.samples:
        counts.setdefault(item.class_name, dict.fromkeys(outcomes, 0))[item.outcome] += 1
    rows = [(_name(name), sum(found.values()), *found.values()) for name, found in counts.items()]
    here.table("Samples made again from their manifest rows and the checkpoint", ("class", "samples", *outcomes), rows)
    # A few are listed whoever they are: those drawn by --random, say. Of many, those that are not as they were.
    few = len(result.samples) <= _MOST_LISTED
    listed = [item for item in result.samples if few or item.outcome != "identical" or item.why]
    details = [
        (
            _name(item.sample_id),
            item.outcome,
            "unavailable" if item.largest_difference is None else f"{item.largest_difference:.4f}",
            {True: "identical", False: "differs", None: ""}[item.png_identical],
            item.why,
        )
        for item in listed[:_MOST_LISTED]
    ]
    title = f"Largest difference of a pixel, as a share of the range of values; {result.tolerance:.4f} is tolerated"
    _table(here, title, ("sample", "outcome", "difference", "PNG", "why"), details)
    if len(listed) > _MOST_LISTED:
        here.say(f"and {len(listed) - _MOST_LISTED} more; --json lists all")
    for change in result.changes:
        here.say(f"changed since they were drawn: {shown(change)}")
    for note in result.notes:
        here.say(f"note: {shown(note)}")
    for folder in result.checkpoints.values():
        here.say(f"checkpoint: {shown(str(folder))}")
    for sentence in result.missing:
        here.say(f"missing: {shown(sentence)}")
    tolerated = f", {result.n_within_tolerance} within tolerance" if result.n_within_tolerance else ""
    here.say(
        f"{shown(str(result.release))}: {result.n_identical} of {result.n_samples} samples identical{tolerated}, in "
        f"{result.seconds:.1f} s"
    )


def show_affected(here: Session, result: AffectedResult) -> None:
    """Where an image or group went, or a plain sentence that it went nowhere."""
    if here.as_json:
        here.emit(result.model_dump(mode="json"))
        return
    rows = [
        (
            item.kind,
            item.digest[:12],
            ", ".join(item.uses),
            item.n_images,
            f"{item.path}{' (deleted since)' if item.gone else ''}",
            ", ".join(item.published_to),
        )
        for item in result.found
    ]
    columns = ("what", "digest", "how", "images", "where", "published")
    _table(here, f"What {shown(result.asked_for)} went into", columns, rows)
    for note in result.notes:
        here.say(f"note: {shown(note)}")
    for path in result.unreadable:
        here.say(f"could not be read, so it may be affected: {shown(path)}")
    here.say(shown(result.sentence))


def show_status(here: Session, status: RunStatus) -> None:
    if here.as_json:
        here.emit(status.model_dump(mode="json"))
        return
    stages = [
        (item.title, item.state, "" if item.seconds is None else f"{item.seconds:.1f}", _megabytes(item.bytes))
        for item in status.stages
    ]
    _table(here, f"Stages in {shown(str(status.run))}", ("stage", "state", "seconds", "MB"), stages)
    if status.why is not None:
        outlook = [
            (item.title, item.action, "" if item.seconds is None else f"{item.seconds:.1f}", "; ".join(item.reasons))
            for item in status.why
        ]
        _table(here, "What a run would do", ("stage", "does", "seconds last time", "why"), outlook)
    for line in status.growth:
        here.say(f"growth: {shown(line)}")
    releases = [
        (name, "newest" if name == status.release else "", _megabytes(n)) for name, n in status.releases.items()
    ]
    _table(here, "Releases", ("release", "", "MB"), releases)
    here.say(f"cost: {status.seconds:.1f} s in stages that are done, {_megabytes(status.bytes)} MB on disk")
    here.say(f"at work now: {shown(status.running) if status.running else 'nobody'}")
    for word, text in (
        ("last run", status.last_run),
        ("last error", status.error),
        ("verdict", status.verdict),
        ("published", status.published),
        ("next", status.next),
    ):
        if text:
            here.say(f"{word}: {shown(text)}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


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
