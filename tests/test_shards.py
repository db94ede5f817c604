"""Shards as Prefect tasks on a real server: in threads, processes, Dask and Ray the same bits; faults and signals."""

from __future__ import annotations

import importlib.util
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from synthaug.config import load_config
from synthaug.pipeline import augment
from tests.conftest import tiny_values
from tests.test_deployments import environment, free_port, processes, program

pytestmark = pytest.mark.slow

_SERVER = """
import sys
from flows.server import local_server
with local_server(int(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, prefect_database: Path
) -> Iterator[tuple[Path, str]]:
    """PREFECT_HOME and the address of a server."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    shutil.copy(prefect_database, home)
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(port)],
        cwd=repository,
        env=environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield home, f"http://127.0.0.1:{port}/api"
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run without its samples and what hangs on them."""
    shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    unmake(tmp_path / "run")
    return tmp_path / "run"


def unmake(run: Path) -> None:
    for stage in ("sample", "audit"):
        for folder in run.glob(f"stages/{stage}-*"):
            shutil.rmtree(folder)


def made(run: Path) -> dict[str, bytes]:
    files = [*run.glob("stages/sample-*/images.npy"), *run.glob("stages/audit-*/audit.parquet")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


_RUN = """
import sys
from flows.augment import augment
from synthaug.config import load_config
for path in sys.argv[1:]:
    summary = augment(load_config(path))
    print(*summary.reused, sep=",")
"""


def write_job(run: Path, **changes: object) -> Path:
    path = run.parent / f"job-{len(list(run.parent.glob('job-*')))}.yaml"
    path.write_text(yaml.safe_dump(tiny_values(run, **changes)), encoding="utf-8")
    return path


@pytest.mark.parametrize("runner", ["threads", "processes", "dask", "ray"])
def test_every_engine_makes_the_same_bits(
    repository: Path, server: tuple[Path, str], finished_run: Path, run: Path, runner: str
) -> None:
    if runner in ("dask", "ray") and importlib.util.find_spec(f"prefect_{runner}") is None:
        pytest.skip(f"prefect-{runner} is not installed; it is the extra synthaug[{runner}]")
    home, address = server
    job = write_job(run, scale={"runner": runner, "workers": 2, "shard_images": 16})
    told = program(repository, home, _RUN, job, PREFECT_API_URL=address).splitlines()
    assert made(run) == made(finished_run)
    # What was released before is what these samples and their audit come to.
    assert told[-1].split(",") == ["read", "split", "plan", "train", "judge", "membership", "release"]
    # The server and its guard carry the same home; no worker is left beside them.
    deadline = time.monotonic() + 30
    while (left := [line for line in processes(home) if not re.search(r"server\.py|local_server", line)]) != []:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


_TWICE = """
import sys, time
from prefect.client.orchestration import get_client
from flows.augment import augment
from synthaug.config import load_config
from synthaug.errors import CheckpointError
from tests.test_shards import unmake
config = load_config(sys.argv[1])
def tasks(word):
    with get_client(sync_client=True) as client:
        return sum(run.name.startswith(word + " round 1: ") for run in client.read_task_runs())
before = tasks("sample"), tasks("audit")
for _ in range(2):
    unmake(config.output_path)
    print(*augment(config).reused, sep=",")
deadline = time.monotonic() + 20
while tasks("audit") - before[1] < 2 and time.monotonic() < deadline:
    time.sleep(0.2)
print(tasks("sample") - before[0], tasks("audit") - before[1])
unmake(config.output_path)
weights = next(config.output_path.glob("stages/train-*/pipeline/unet/*.safetensors"))
kept = weights.read_bytes()
weights.write_bytes(kept[:100])
try:
    augment(config)
except CheckpointError as error:
    print(error)
weights.write_bytes(kept)
print(*augment(load_config(sys.argv[2])).reused, sep=",")
"""


def test_two_runs_in_a_row_and_one_with_a_shard_that_fails(
    repository: Path, server: tuple[Path, str], finished_run: Path, run: Path
) -> None:
    home, address = server
    job = write_job(run, scale={"runner": "threads", "workers": 2, "shard_images": 8})
    plain = write_job(run)
    told = program(repository, home, _TWICE, job, plain, PREFECT_API_URL=address).splitlines()
    first, second, tasks, error, alone = told
    # The last is of a job with no runner, in the process of the one that failed.
    assert first == second == alone == "read,split,plan,train,judge,membership,release"
    # A task a shard, twice: micro-batches of 8, and one piece of samples.
    (images,) = finished_run.glob("stages/sample-*/images.npy")
    assert tasks == f"{2 * len(np.load(images)) // 8} 2"
    # The words of the error, from the worker.
    assert "cannot be loaded as a ClassConditionalPipeline" in error


_ABANDONED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Event, Timer
from types import SimpleNamespace
from prefect.futures import PrefectConcurrentFuture
from prefect.task_runners import ThreadPoolTaskRunner
from uuid import uuid4
from flows.shards import TaskShards, shards_of
from synthaug.config import load_config
from synthaug.scale import Shard, check_stopped, do_shards, stop_shards

def engine(runner):
    made = TaskShards.__new__(TaskShards)
    made.workers, made.parts, made.least_seconds, made.most_seconds = 1, 1, 0.0, 1.0
    made._runner, made._context, made._others = runner, copy_context(), set()
    return made

with ThreadPoolTaskRunner(max_workers=1) as runner:
    engine(runner).abandon()
check_stopped()
stop_shards()
config = load_config(sys.argv[1])
with shards_of(config):
    check_stopped()
print("allowed")

begun, ended, free = [], [], Event()
def work(given):
    shard = given["shard"]
    begun.append(shard.first)
    if shard.first:
        free.wait(20)
    ended.append(shard.first)
    return SimpleNamespace(first=shard.first, last=shard.last, name=".", seconds=1.0)
def take(done):
    Timer(0.3, free.set).start()
    raise TimeoutError("the storage did not answer")
folder = config.output_path / "shards"
with ThreadPoolExecutor(1) as pool:
    submit = lambda task, given: PrefectConcurrentFuture(uuid4(), pool.submit(work, given))
    mapped = engine(SimpleNamespace(submit=submit))
    mapped._result = lambda future: future.wrapped_future.result()
    try:
        do_shards(
            None, lambda first, last: Shard(folder=folder, first=first, last=last, made_with={}), folder=folder,
            units=8, unit_size=1, made_with={}, settings=config.scale, map_shards=mapped, intact=None, take=take,
            tick=lambda number: None,
        )
    except TimeoutError:
        print(ended == begun, len(begun) < 4)
"""


def test_what_an_abandoned_stage_leaves_does_not_meet_the_next(
    repository: Path, prefect_home: Path, tmp_path: Path
) -> None:
    """Neither the word to stop, nor shards that are under way or were handed over ahead."""
    job = write_job(tmp_path / "run", scale={"shard_images": 1})
    told = program(repository, prefect_home, _ABANDONED, job).splitlines()
    assert told == ["allowed", "True True"]


_FULL = """
import time
from contextvars import copy_context
from prefect.task_runners import ProcessPoolTaskRunner
from flows.shards import TaskShards

mapped = TaskShards.__new__(TaskShards)
runner = ProcessPoolTaskRunner(max_workers=1)
mapped._runner, mapped._context, mapped._others = runner, copy_context(), set()
runner.__enter__()
runner._executor.submit(time.sleep, 600)
# More than a pipe holds: whoever writes it waits for a worker that takes it.
for _ in range(3):
    runner._executor.submit(len, bytes(4_000_000))
time.sleep(1)
mapped.abandon()
print("ended")
"""


def test_workers_are_abandoned_while_something_is_being_written_to_them(repository: Path, prefect_home: Path) -> None:
    assert program(repository, prefect_home, _FULL).splitlines() == ["ended"]


def test_a_signal_leaves_no_worker_and_the_shards_that_were_whole(
    repository: Path, server: tuple[Path, str], run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, address = tmp_path / "prefect", server[1]
    # So many steps that a micro-batch takes a while.
    job = write_job(run, sample={"steps": 60}, scale={"runner": "processes", "workers": 2, "shard_images": 8})
    for sign, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = len(list(run.glob("stages/sample-*/work/shards/*/shard.json")))
        log = (tmp_path / f"log-{code}").open("wb")
        with (
            log,
            subprocess.Popen(
                [sys.executable, "-m", "flows.augment", str(job)],
                cwd=repository,
                env=environment(home, PREFECT_API_URL=address),
                stdout=log,
                stderr=log,
            ) as process,
        ):
            deadline = time.monotonic() + 200
            while len(list(run.glob("stages/sample-*/work/shards/*/shard.json"))) <= before:
                assert time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
                assert process.poll() is None, Path(log.name).read_text()[-3000:]
                time.sleep(0.02)
            process.send_signal(sign)
            try:
                assert process.wait(timeout=60) == code, Path(log.name).read_text()[-3000:]
            finally:
                process.kill()
        assert "Traceback" not in Path(log.name).read_text()
        deadline = time.monotonic() + 30
        while processes(home):
            assert time.monotonic() < deadline, processes(home)
            time.sleep(0.2)
    whole = list(run.glob("stages/sample-*/work/shards/*/shard.json"))
    assert len(whole) >= 2
    # Whoever goes on: here this process alone.
    plain = load_config(write_job(run, sample={"steps": 60}))
    with caplog.at_level(logging.INFO, "synthaug"):
        augment(plain)
    assert f"sampling went on after {len(whole)} of" in caplog.text
    drawn = made(run)
    unmake(run)
    augment(plain)
    assert made(run) == drawn
