"""Shards of sampling and audit as Prefect tasks, in threads, processes, Dask or Ray, as the job's `scale` says.

The engine is Prefect's task runner of that name; here it is started when the first shard comes, handed shards a few
ahead of its workers, and ended with the run, whatever way that ends. `synthaug.scale` says what a shard is.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any

# Relative, since this package has two names; first, since it turns off what calls home before Prefect is imported.
from .tasks import RETRIES, RETRY_SECONDS, can_pass, told  # isort: skip

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from synthaug.config import Config, ScaleConfig
from synthaug.errors import SynthaugError, UsageError, may_pass
from synthaug.scale import MapShards, S, Shard, ShardDone, Tick, Work, allow_shards, one_by_one, stop_shards

logger = logging.getLogger("synthaug.flows.shards")

# What Prefect takes for a shard, all in all, and the share of sampling that it may cost: see benchmarks/scale.py. In a
# process of its own a task sets up its client anew.
SECONDS_PER_TASK = {"threads": 0.06, "processes": 0.2, "dask": 0.2, "ray": 0.2}
_SHARE = 0.02
_MOST_SECONDS = 30.0
_PARTS_PER_WORKER = 4
# Shards that are handed over ahead, for each worker; of a cluster whose workers nobody has counted, in all.
_AHEAD = 3
_UNCOUNTED = 16
_SECONDS_TO_ANSWER = 5.0
_RAY_STORE_BYTES = 100 * 2**20
# Errors of the engines whose worker is gone; their modules may not be there.
_LOST = (
    "BrokenProcessPool",
    "KilledWorker",
    "WorkerCrashedError",
    "NodeDiedError",
    "OutOfMemoryError",
    "CancelledError",
)
_EXTRAS = {"dask": "prefect_dask", "ray": "prefect_ray"}


@task(
    name="shard",
    task_run_name="{title}: {first} to {last}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(RETRY_SECONDS),
    retry_jitter_factor=0.2,
    retry_condition_fn=can_pass,
)
def compute_shard(title: str, first: int, last: int, work: Work[Any], shard: Shard) -> ShardDone:
    """Compute one shard; on the worker, wherever that is."""
    return told(lambda: work(shard, _nobody), raises=may_pass)


def _nobody(number: int) -> None:
    """Units are told when their shard is finished: nobody listens to a worker."""


@contextmanager
def shards_of(config: Config) -> Iterator[MapShards]:
    """Yield what computes the shards of a job, as its `scale` says; inside of a flow run.

    Raises:
        UsageError: The engine is not installed, or nobody answers at `scale.address`.
    """
    # An abandoned run before it, in this process, has told all shards to end.
    allow_shards()
    if config.scale.runner == "none":
        yield one_by_one
        return
    _check_engine(config.scale)
    mapped = TaskShards(config)
    try:
        yield mapped
    except BaseException:
        mapped.abandon()
        raise
    mapped.close()


class TaskShards:
    """`synthaug.scale.MapShards` by one of Prefect's task runners, which is started when it is first needed."""

    def __init__(self, config: Config) -> None:
        self._settings = config.scale
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        fitting = max(1, cores // max(config.sample.threads, config.train.threads))
        self.workers = config.scale.workers or (fitting if config.scale.address is None else _UNCOUNTED)
        self.least_seconds = SECONDS_PER_TASK[config.scale.runner] / _SHARE
        self.most_seconds = _MOST_SECONDS
        self.parts = _PARTS_PER_WORKER * self.workers
        self._runner: TaskRunner[Any] | None = None
        # The context of the flow run and of none of its stages: what is sent along to workers holds no stage's work.
        # Where the server is the run's own, no setting names it, and every worker would start another.
        with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
            self._context = copy_context()
        self._others: set[int | None] = set()

    def __call__(self, work: Work[S], shards: Sequence[S], tick: Tick) -> Iterator[ShardDone]:
        runner = self._started()
        title = task_run.name or "shard"
        waiting: deque[Any] = deque()
        try:
            for shard in shards:
                given = {"title": title, "first": shard.first, "last": shard.last, "work": work, "shard": shard}
                waiting.append(self._context.run(runner.submit, compute_shard, given))
                if len(waiting) > _AHEAD * self.workers:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        except Exception as error:
            # Also what the stage failed by when it took a shard.
            for future in waiting:
                _cancel(future)
            if may_pass(error):
                # The stage is tried again, and must not meet what is left of this time.
                for future in waiting:
                    with suppress(Exception):
                        self._context.run(future.wait)
            raise

    def close(self) -> None:
        """End the workers; all that was asked for is done."""
        if self._runner is not None:
            self._context.run(self._runner.__exit__, None, None, None)
            self._runner = None

    def abandon(self) -> None:
        """End the workers at once. What they have not finished leaves no trace that is taken for whole."""
        if self._runner is None:
            return
        stop_shards()
        if isinstance(self._runner, ProcessPoolTaskRunner):
            # Prefect would wait for what they are at. Whoever is killed may hold a lock that others wait for.
            with suppress(AttributeError):
                self._runner._subprocess_message_queue.cancel_join_thread()  # type: ignore[union-attr]
            for process in multiprocessing.active_children():
                if process.pid not in self._others:
                    process.kill()
            # Before Python 3.11.5 a pool whose workers have died waits for ever for what it was writing to them, since
            # it holds the other end of the pipe too (cpython gh-94777).
            with suppress(AttributeError, OSError):
                self._runner._executor._call_queue._reader.close()  # type: ignore[union-attr]
        try:
            self.close()
        except Exception as error:
            logger.debug("the workers did not end well: %s", error)
        # None is left that would look: the next job in this process computes shards of its own.
        allow_shards()

    def _started(self) -> TaskRunner[Any]:
        if self._runner is None:
            self._others = {process.pid for process in multiprocessing.active_children()}
            handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
            runner = _runner(self._settings, self.workers)
            try:
                self._context.run(runner.__enter__)
            finally:
                # Ray takes SIGTERM for itself; how a run ends is not its business.
                if threading.current_thread() is threading.main_thread():
                    for sign, handler in handlers.items():
                        if handler is not None:
                            signal.signal(sign, handler)
            self._runner = runner
            logger.info("shards are computed by %s", _words(self._settings, self.workers))
        return self._runner

    def _result(self, future: Any) -> ShardDone:
        try:
            result: ShardDone = self._context.run(future.result)
            return result
        except Exception as error:
            if type(error).__name__ not in _LOST:
                raise
            raise SynthaugError(
                f"a worker of scale.runner: {self._settings.runner} ended before its shard was finished "
                f"({type(error).__name__}). Often its memory ran out: give fewer workers, or smaller shards with "
                "scale.shard_images. What is finished is kept; run again to go on."
            ) from error


def _cancel(future: Any) -> None:
    """Have a shard not begun. Dask and Ray would call one cancelled that is under way still: they are waited for."""
    wrapped = getattr(future, "wrapped_future", None)
    if isinstance(wrapped, Future):
        wrapped.cancel()


def _runner(settings: ScaleConfig, workers: int) -> TaskRunner[Any]:
    if settings.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)
    if settings.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=workers, initializer=_end_with, initargs=(os.getpid(),))
    if settings.runner == "dask":
        from prefect_dask.task_runners import DaskTaskRunner

        logging.getLogger("distributed").setLevel(logging.WARNING)
        if settings.address is not None:
            return DaskTaskRunner(address=settings.address)
        local = {"n_workers": workers, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        # A shard holds little: no need for Dask to watch its workers' memory.
        return DaskTaskRunner(cluster_kwargs={**local, "processes": True, "memory_limit": 0})
    # Read when Ray is imported: it would call home.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from prefect_ray.task_runners import RayTaskRunner

    quiet = {"log_to_driver": False, "configure_logging": False}
    if settings.address is not None:
        return RayTaskRunner(address=settings.address, init_kwargs=quiet)
    # Results are small, so little memory is set aside for them.
    own = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _RAY_STORE_BYTES}
    return RayTaskRunner(init_kwargs={**quiet, **own, "_node_ip_address": "127.0.0.1"})


def _words(settings: ScaleConfig, workers: int) -> str:
    if settings.address is not None:
        return f"the workers of {settings.runner} at {settings.address}"
    return (
        f"{workers} {settings.runner if settings.runner in ('threads', 'processes') else settings.runner + ' workers'}"
    )


def _check_engine(settings: ScaleConfig) -> None:
    package = _EXTRAS.get(settings.runner)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"scale.runner: {settings.runner} needs {package}, which is not installed: pip install "
            f"'synthaug[{settings.runner}]'. threads and processes need nothing more."
        )
    place = re.fullmatch(r"(?:[a-z]+://)?\[?([^/]+?)\]?:(\d+)/?", settings.address or "")
    if place is None:
        return
    # Asked now: after the training would be late.
    try:
        socket.create_connection((place[1], int(place[2])), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"nobody answers at scale.address {settings.address} ({error}). Start the {settings.runner} cluster, or "
            "leave the address out for workers on this machine."
        ) from None


def _end_with(parent: int) -> None:
    """Have this worker end when the run is gone, even by SIGKILL, after which nobody else would end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
