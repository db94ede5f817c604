"""Several jobs for a schedule, one after the other: each is refreshed, whatever becomes of the others."""

# No `from __future__ import annotations` here: Prefect needs the types of parameters themselves to check what a
# deployment gives.

import logging
from typing import Annotated

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .refresh import refresh  # isort: skip
from .tasks import cell, told  # isort: skip

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from synthaug.config import load_config
from synthaug.errors import SynthaugError

logger = logging.getLogger("synthaug.flows.watch")

ConfigFiles = Annotated[list[str], Field(min_length=1, description="Configuration files, on the worker's machine.")]


@flow(name="watch", persist_result=False)
def watch(configs: ConfigFiles) -> dict[str, str]:
    """Refresh several jobs. One that fails keeps no other from its turn; then the watch fails, and says which.

    Args:
        configs: Configuration files; every one names its dataset and its run folder.
    """

    def work() -> dict[str, str]:
        outcomes: dict[str, str] = {}
        failed = []
        for path in configs:
            try:
                summary = refresh(load_config(path))
                outcomes[path] = "nothing new" if summary is None else f"release {summary.release_digest[:12]}"
            except Exception as error:
                logger.warning("%s: %s", path, error)
                outcomes[path] = f"failed: {error}"
                failed.append(path)
        table = [{"job": cell(path), "outcome": cell(text)} for path, text in outcomes.items()]
        create_table_artifact(key="watch", description="What became of each job", table=table)
        if failed:
            raise SynthaugError(f"{len(failed)} of {len(configs)} jobs failed: {', '.join(failed)}.")
        return outcomes

    return told(work)
