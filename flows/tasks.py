"""What all flows have in common: stages as tasks, retries, and what the Prefect UI shows of a run."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

# Imported before Prefect: it turns off what calls home, by variables that Prefect reads at its import.
from synthaug import terminal

# Our log lines belong to the run in the UI; lines from outside of a run are no cause for a warning.
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "synthaug")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
# A first start makes the database; on a busy machine that takes longer than the 20 s Prefect would wait.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
if logging.getLogger("synthaug").level == logging.NOTSET:
    logging.getLogger("synthaug").setLevel(logging.INFO)

from prefect import Task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed
from prefect.tasks import exponential_backoff

from synthaug.config import Config
from synthaug.errors import SynthaugError, may_pass
from synthaug.progress import listening
from synthaug.records import BalancePlan, StageRecord
from synthaug.status import StageOutlook, look
from synthaug.summaries import RunSummary, VerdictSummary
from synthaug.workspace import Done

# A worker has imported Prefect before this module, and so before the variables above were there.
for _handler in logging.getLogger("prefect.extra").handlers:
    logging.getLogger("synthaug").addHandler(_handler)

logger = logging.getLogger("synthaug.flows")

T = TypeVar("T")
R = TypeVar("R", bound=StageRecord)

# What can pass (a hub, a storage) is tried again after 10, 20 and 40 seconds, a little more or less.
RETRIES = 3
RETRY_SECONDS = float(os.environ.get("SYNTHAUG_RETRY_SECONDS", "10"))
_SECONDS_BETWEEN_PROGRESS = 5.0


# Set by `serve` for the runs it starts: its process id.
SERVED_BY = "SYNTHAUG_SERVED_BY"
_SECONDS_TO_END = 15.0


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, even by SIGKILL, after which nobody else would."""
    try:
        while True:
            os.kill(parent, 0)
            time.sleep(0.5)
    except ProcessLookupError:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    # Prefect would go on telling a server that is gone. What was done is in the run folder.
    time.sleep(_SECONDS_TO_END)
    os._exit(terminal.TERMINATED)


if os.environ.get(SERVED_BY, str(os.getpid())) != str(os.getpid()):
    threading.Thread(target=_end_with, args=(int(os.environ[SERVED_BY]),), daemon=True).start()


def as_task(title: str, work: Callable[[], Done[R]]) -> Done[R]:
    """Run one stage as a Prefect task under its own name.

    Neither Prefect's cache nor its result storage is used: the run folder knows what is complete, and the
    records that stages hand on are small.
    """
    done = task_of(title, work)
    if isinstance(done.record, BalancePlan):
        _show_plan(done.record)
    return done


def task_of(title: str, work: Callable[[], T]) -> T:
    """Run `work` as a task: again with backoff where it fails by what can pass, once otherwise."""

    def watched() -> T:
        with listening(_Shown(title)):
            return told(work, raises=may_pass)

    task = Task(
        watched,
        name=title,
        task_run_name=title,
        persist_result=False,
        cache_policy=NO_CACHE,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(RETRY_SECONDS),
        retry_jitter_factor=0.2,
        retry_condition_fn=can_pass,
    )
    return task(return_state=True).result()


def can_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Prefect's question whether a task that failed is tried again."""
    try:
        state.result()
    except Exception as error:
        return may_pass(error)
    return False


def told(work: Callable[[], T], raises: Callable[[BaseException], bool] = lambda error: False) -> T:
    """Call `work`; an error that is meant for people ends the run in the words of the error, without a traceback.

    The state carries the error, and asking it for its result raises that. An error that `raises` says yes to is raised,
    for Prefect to try again.
    """
    try:
        return work()
    except SynthaugError as error:
        if raises(error):
            raise
        return cast(T, Failed(message=str(error), data=error))


def look_ahead(config: Config) -> tuple[StageOutlook, ...]:
    """A task that looks at the source and says of every stage what a run would do; a table of the UI."""
    outlook = task_of("look at the source", lambda: look(config))
    create_table_artifact(
        key="outlook",
        description=f"What a run of {terminal.shown(config.name)} would do",
        table=[{"stage": item.title, "does": item.action, "why": cell("; ".join(item.reasons))} for item in outlook],
    )
    return outlook


def show_release(summary: RunSummary) -> None:
    """The verdict, the counts and where everything lies. Pictures may show real images: they are named, not copied."""
    rows = [
        f"| {cell(name)} | {item['real']} | {item['synthetic']} | {item['short']} |"
        for name, item in summary.counts.items()
    ]
    files = {
        "release": summary.release,
        "contact sheet": summary.contact_sheet,
        "rejected samples": summary.rejected_sheet,
        "checkpoint": summary.checkpoint,
        "verdict": summary.verdict_file,
        "membership attack": summary.membership_file,
    }
    lines = [
        f"**Verdict: {cell(summary.verdict_sentence)}**",
        "",
        f"Membership attack: {cell(summary.membership_sentence)}",
        "",
        "| class | real | synthetic | short of plan |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        *(f"- {name}: {code(str(Path(path).absolute()))}" for name, path in files.items() if path),
        *([f"- published: {cell(summary.pushed_to)}"] if summary.pushed_to else []),
    ]
    create_markdown_artifact(key="verdict", markdown="\n".join(lines), description="Verdict and release")


def show_verdict(summary: VerdictSummary) -> None:
    paths = [summary.verdict_file, *summary.pictures]
    lines = [f"**Verdict: {cell(summary.verdict.sentence)}**", ""]
    lines += [f"- {code(str(path.absolute()))}" for path in paths]
    create_markdown_artifact(key="verdict", markdown="\n".join(lines), description="Verdict")


class _Shown:
    """Training and sampling as a progress artifact, brought up to date every few seconds."""

    def __init__(self, title: str) -> None:
        self._round = title if title.startswith("sample round") else None
        self._artifacts: dict[str, Any] = {}
        self._told = 0.0

    def __call__(self, title: str, done: int, total: int | None, note: str) -> None:
        if not total or not title.startswith(("train", "sample")):
            return
        title = self._round or title
        if title in self._artifacts and done < total and time.monotonic() - self._told < _SECONDS_BETWEEN_PROGRESS:
            return
        self._told = time.monotonic()
        share = min(100.0, 100.0 * done / total)
        words = f"{title}: {done} of {total} images{f', {note}' if note else ''}"
        try:
            if title in self._artifacts:
                update_progress_artifact(self._artifacts[title], share, words)
            else:
                key = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
                self._artifacts[title] = create_progress_artifact(share, key=key, description=words)
        except Exception as error:
            # A server that is away for a moment must not cost a training.
            logger.debug("the progress of %s could not be shown: %s", title, error)


def _show_plan(plan: BalancePlan) -> None:
    create_table_artifact(
        key="plan",
        description="Images per class in the training split",
        table=[
            {
                "class": cell(item.name),
                "real": item.n_real,
                "target": item.n_target,
                "synthetic": item.n_synthetic,
                "note": cell(item.refused or item.note or ""),
            }
            for item in plan.classes
        ],
    )


def cell(text: str) -> str:
    """A text that is no markup and no link, whatever a class is called; Prefect's pages read markup in tables too."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|#!~@])", r"\\\1", terminal.shown(text))
    return re.sub(r"(?i)(:)(?=//)|(?<=www)(\.)", r"\\\g<0>", escaped)


def code(path: str) -> str:
    """A path to copy. No link: a browser opens no file from a page of a server, which may be on another machine."""
    text = terminal.shown(path)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
