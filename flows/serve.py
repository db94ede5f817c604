"""A job on a schedule, without a worker or a deployment file: `synthaug serve configs/x.yaml --cron "0 2 * * *"`.

Serves the flow `refresh` (or another) of one configuration, at most one run at a time. Runs are started by this process
and end with it. Where PREFECT_API_URL is set, that server is used; otherwise one of its own is started on this machine,
with a scheduler and the UI, and stopped at the end. A token for a hub is taken from the environment by the runs, which
inherit it; it is no parameter and is stored nowhere.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .augment import augment  # isort: skip
from .evaluate import evaluate  # isort: skip
from .refresh import refresh  # isort: skip
from .server import local_server  # isort: skip
from .tasks import SERVED_BY  # isort: skip

from prefect import Flow

from synthaug import terminal
from synthaug.config import load_config
from synthaug.errors import SynthaugError, UsageError

FLOWS: dict[str, Flow[Any, Any]] = {"refresh": refresh, "augment": augment, "evaluate": evaluate}
DEFAULT_PORT = 4200
_SECONDS_FOR_RUNS = 15.0
# The server is ended after the runs; the tracker of multiprocessing ends by itself, and minds no signal.
_OTHERS = re.compile(r"server\.py|resource_tracker")


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
    os.environ[SERVED_BY] = str(os.getpid())
    # Prefect's runner has a way of its own to end by SIGTERM, and does not leave it by an exception.
    handler = signal.getsignal(signal.SIGTERM)
    # asyncio ends its tasks in order by Ctrl-C, but only where the handler is Python's own.
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
            # A second signal must not keep this from being done: Prefect's runner leaves a run behind that is at work.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _end_runs()
            signal.signal(signal.SIGTERM, handler)
            signal.signal(signal.SIGINT, interrupt)


def _end_runs() -> None:
    """End the runs that are at work, while there is a server yet that they can tell."""
    runs = _runs()
    for process in runs:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_FOR_RUNS
    while runs := [process for process in runs if _is_alive(process)]:
        if time.monotonic() > deadline:
            for process in runs:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return
        time.sleep(0.1)


def _runs() -> list[int]:
    """Processes below this one but for the server; `ps` is everywhere, /proc is not."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=False)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found = {os.getpid()}
    below: list[int] = []
    # Prefect starts a run directly or below a process that looks after it.
    while new := [
        int(row[0])
        for row in rows
        if len(row) == 3 and int(row[1]) in found and int(row[0]) not in found and not _OTHERS.search(row[2])
    ]:
        found.update(new)
        below += new
    return below


def _is_alive(process: int) -> bool:
    try:
        ended, _ = os.waitpid(process, os.WNOHANG)
        return ended == 0
    except ChildProcessError:
        pass  # not a child but a child's, or reaped already
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


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
