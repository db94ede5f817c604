"""The whole job as a Prefect flow: `python -m flows.augment configs/quickstart.yaml`.

The order of the stages is that of `synthaug run`, taken from `synthaug.pipeline`; here every stage becomes a
task of its own name. Nothing has to be set up: where no PREFECT_API_URL is set, a server of its own (SQLite,
this machine only) is started for the run and stopped after it, however the run ends. Like every Prefect
script it then keeps its history in PREFECT_HOME (~/.prefect); `make demo` uses runs/.prefect. What is
complete is known from the run folder, not from Prefect: a run repeated reuses it, on any server.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

# Imported before Prefect: it turns off what calls home, by variables that Prefect reads at its import.
from synthaug import terminal

# Our log lines belong to the run in the UI; lines from outside of a run are no cause for a warning.
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "synthaug")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
# A first start makes the database; on a busy machine that takes longer than the 20 s Prefect would wait.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
if logging.getLogger("synthaug").level == logging.NOTSET:
    logging.getLogger("synthaug").setLevel(logging.INFO)

from prefect import Task, flow
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from synthaug import pipeline
from synthaug.config import Config, load_config
from synthaug.errors import SynthaugError
from synthaug.records import BalancePlan, StageRecord
from synthaug.workspace import Done

T = TypeVar("T")
R = TypeVar("R", bound=StageRecord)


@flow(name="augment", flow_run_name="augment {config.name}", persist_result=False)
def augment(config: Config) -> pipeline.RunSummary:
    """From a long-tailed labelled image dataset to a balanced release."""
    return _told(lambda: pipeline.augment(config, run_stage=as_task))


def as_task(title: str, work: Callable[[], Done[R]]) -> Done[R]:
    """Run one stage as a Prefect task under its own name.

    Neither Prefect's cache nor its result storage is used: the run folder knows what is complete, and the
    records that stages hand on are small.
    """
    stage = Task(lambda: _told(work), name=title, task_run_name=title, persist_result=False, cache_policy=NO_CACHE)
    done = stage(return_state=True).result()
    if isinstance(done.record, BalancePlan):
        _show_plan(done.record)
    return done


def _told(work: Callable[[], T]) -> T:
    """Call `work`; an error that is meant for people ends the run in the words of the error, without a traceback.

    The state carries the error, and asking it for its result raises that.
    """
    try:
        return work()
    except SynthaugError as error:
        return cast(T, Failed(message=str(error), data=error))


def _show_plan(plan: BalancePlan) -> None:
    create_table_artifact(
        key="plan",
        description="Images per class in the training split",
        table=[
            {
                "class": terminal.shown(item.name),
                "real": item.n_real,
                "target": item.n_target,
                "synthetic": item.n_synthetic,
                "note": terminal.shown(item.refused or item.note or ""),
            }
            for item in plan.classes
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the flow on a configuration file; exit codes are those of `synthaug run`."""
    # Relative, since this package has two names; and here, since Prefect may load this file without any.
    from .server import use_guarded_server

    parser = argparse.ArgumentParser(prog="python -m flows.augment", description="The whole job as a Prefect flow.")
    parser.add_argument("config", help="the job: a YAML file")
    parser.add_argument("--output", help="run folder, in place of 'output:'")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; logs stay on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    with terminal.session(as_json=given.json, debug=given.debug, logs=False) as here:
        config = load_config(given.config, output=given.output)
        use_guarded_server()
        here.output = config.output_path
        terminal.show_run(here, augment(config))


if __name__ == "__main__":
    main()
