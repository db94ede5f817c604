"""The verdict as a Prefect flow: on the job's own samples, or on images that are there already."""

# No `from __future__ import annotations` here: Prefect needs the types of parameters themselves to check what a
# deployment gives.

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .tasks import as_task, show_verdict, told  # isort: skip
from .shards import shards_of  # isort: skip

from prefect import flow

from synthaug import pipeline
from synthaug.config import Config
from synthaug.summaries import VerdictSummary


@flow(name="evaluate", flow_run_name="evaluate {config.name}", persist_result=False)
def evaluate(config: Config, synthetic: str | None = None) -> VerdictSummary:
    """Do the synthetic images help? Runs what is missing of the job up to the verdict, and releases nothing.

    Args:
        config: The job; what its run folder holds is reused.
        synthetic: A folder, file or dataset of images to be judged in place of the job's own.
    """

    def work() -> VerdictSummary:
        with shards_of(config) as map_shards:
            if synthetic is None:
                summary = pipeline.evaluate(config, run_stage=as_task, map_shards=map_shards)
            else:
                summary = pipeline.evaluate_foreign(config, synthetic, run_stage=as_task, map_shards=map_shards)
        show_verdict(summary)
        return summary

    return told(work)
