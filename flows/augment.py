"""The whole job as a Prefect flow: `python -m flows.augment configs/quickstart.yaml`.

The order of the stages is that of `synthaug run`, taken from `synthaug.pipeline`; here every stage becomes a
task of its own name. Nothing has to be set up: where no PREFECT_API_URL is set, a server of its own (SQLite,
this machine only) is started for the run and stopped after it, however the run ends. Like every Prefect
script it then keeps its history in PREFECT_HOME (~/.prefect); `make demo` uses runs/.prefect. What is
complete is known from the run folder, not from Prefect: a run repeated reuses it, on any server.
"""

# No `from __future__ import annotations` here: Prefect needs the types of parameters themselves to check what a
# deployment gives.

import argparse
from collections.abc import Sequence

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .tasks import as_task, show_release, told  # isort: skip
from .shards import shards_of  # isort: skip

from prefect import flow

from synthaug import pipeline, terminal
from synthaug.config import Config, load_config
from synthaug.summaries import RunSummary


@flow(name="augment", flow_run_name="augment {config.name}", persist_result=False)
def augment(config: Config) -> RunSummary:
    """From a long-tailed labelled image dataset to a balanced release."""

    def work() -> RunSummary:
        with shards_of(config) as map_shards:
            summary = pipeline.augment(config, run_stage=as_task, map_shards=map_shards)
        show_release(summary)
        return summary

    return told(work)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the flow on a configuration file; exit codes are those of `synthaug run`."""
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
