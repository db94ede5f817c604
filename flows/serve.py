"""A job on a schedule, without a worker or a deployment file: `synthaug serve configs/x.yaml --cron "0 2 * * *"`.

Serves the flow `refresh` (or another) of one configuration, at most one run at a time. Runs are started by this process
and end with it. Where PREFECT_API_URL is set, that server is used; otherwise one of its own is started on this machine,
with a scheduler and the UI, and stopped at the end. A token for a hub is taken from the environment by the runs, which
inherit it; it is no parameter and is stored nowhere.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .augment import augment  # isort: skip
from .evaluate import evaluate  # isort: skip
from .refresh import refresh  # isort: skip
from .server import local_server  # isort: skip

from prefect import Flow

from synthaug import terminal
from synthaug.config import load_config
from synthaug.errors import SynthaugError, UsageError

FLOWS: dict[str, Flow[Any, Any]] = {"refresh": refresh, "augment": augment, "evaluate": evaluate}
DEFAULT_PORT = 4200


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; exit codes are those of `synthaug run`."""
    parser = argparse.ArgumentParser(prog="synthaug serve", description="A job on a schedule, as a Prefect flow.")
    parser.add_argument("config", help="the job: a YAML file")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--cron", help='when to run: "0 2 * * *" is every night at two; without, runs are asked for')
    when.add_argument("--interval", type=float, metavar="SECONDS", help="run again and again, in place of --cron")
    parser.add_argument("--flow", choices=FLOWS, default="refresh", help="what is run (default: refresh)")
    parser.add_argument("--output", help="run folder, in place of 'output:'")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"of the server that is started (default: {DEFAULT_PORT})"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    with terminal.session(debug=given.debug, logs=False) as here:
        config = load_config(given.config, output=given.output)
        if given.cron is not None:
            _check_cron(given.cron)
        here.output = config.output_path
        here.output.mkdir(parents=True, exist_ok=True)
        schedule: dict[str, Any] = {}
        if given.cron is not None:
            schedule = {"cron": given.cron}
        elif given.interval is not None:
            schedule = {"interval": given.interval}
        own = not os.environ.get("PREFECT_API_URL")
        try:
            with local_server(given.port) if own else nullcontext(os.environ["PREFECT_API_URL"]) as address:
                _serve(given.flow, config, schedule, address)
        except OSError as error:
            raise SynthaugError(f"the job is not served: {error}.") from error


def _serve(name: str, config: Any, schedule: dict[str, Any], address: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.types.entrypoint import EntrypointType

    # The processes of the runs read it from their environment.
    os.environ["PREFECT_API_URL"] = address
    # Prefect's runner has a way of its own to end by SIGTERM, and does not leave it by an exception.
    handler = signal.getsignal(signal.SIGTERM)
    with temporary_settings({PREFECT_API_URL: address}):
        try:
            FLOWS[name].serve(
                name=config.name,
                parameters={"config": config.model_dump(mode="json")},
                # One run at a time on an output; one that comes due meanwhile waits.
                limit=1,
                global_limit=1,
                entrypoint_type=EntrypointType.MODULE_PATH,
                **schedule,
            )
        finally:
            signal.signal(signal.SIGTERM, handler)


def _check_cron(text: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=text)
    except ValidationError as error:
        raise UsageError(
            f'--cron {text!r} is no schedule ({error.errors()[0]["msg"]}). "0 2 * * *" is every night at two.'
        ) from None


if __name__ == "__main__":
    main()
