"""The job for a schedule: looks at the source, and does something only where something is new."""

# No `from __future__ import annotations` here: Prefect needs the types of parameters themselves to check what a
# deployment gives.

import logging

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .tasks import as_task, look_ahead, show_release, told  # isort: skip
from .shards import shards_of  # isort: skip

from prefect import flow

from synthaug import pipeline
from synthaug.config import Config
from synthaug.summaries import RunSummary

# Below `synthaug`, whose lines Prefect shows, whatever this package is called.
logger = logging.getLogger("synthaug.flows.refresh")


@flow(name="refresh", flow_run_name="refresh {config.name}", persist_result=False)
def refresh(config: Config) -> RunSummary | None:
    """Run the whole job if the source, the configuration or the code is new, or if something is missing.

    Otherwise nothing is done. The fingerprint of the source (names, sizes and times of its files, or the hub's commit)
    is what is looked at, and the keys of all stages.
    """

    def work() -> RunSummary | None:
        outlook = look_ahead(config)
        to_do = [item for item in outlook if item.action != "reuse"]
        complete = config.output_path.joinpath("release").exists() and any(item.title == "release" for item in outlook)
        if complete and not to_do:
            logger.info("%s: nothing new, nothing done", config.name)
            return None
        first = to_do[0] if to_do else None
        if first is not None:
            logger.info("%s: %s is to be done: %s", config.name, first.title, "; ".join(first.reasons))
        with shards_of(config) as map_shards:
            summary = pipeline.augment(config, run_stage=as_task, map_shards=map_shards)
        show_release(summary)
        return summary

    return told(work)
