"""Deployments on a real Prefect server of this machine: by schedule, by hand, with retries, progress and a form."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml

from synthaug.config import load_config, parse_config
from synthaug.status import status
from synthaug.workspace import open_workspace
from tests.test_flow import no_server_left, query

pytestmark = pytest.mark.slow

MakeFile = Callable[..., Path]
TOKEN = "hf_planted0123456789abcdefSECRET"


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_HOME": str(home), "PREFECT_RUNNER_POLL_FREQUENCY": "2", **more}


def program(repository: Path, home: Path, code: str, *arguments: object, **more: str) -> str:
    """Run a program in a process of its own, without or with a server; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=repository,
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def served(
    repository: Path, home: Path, log: Path, config: Path, *arguments: object, **more: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`synthaug serve` with a server of its own; yields the process and the API's address."""
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "synthaug", "serve", str(config), "--port", str(port), *map(str, arguments)],
            cwd=repository,
            env=environment(home, **more),
            stdout=file,
            stderr=file,
        )
        try:
            yield process, f"http://127.0.0.1:{port}/api"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until(happened: Callable[[], bool], log: Path, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
        time.sleep(0.5)


def runs(home: Path, state: str) -> int:
    ((number,),) = query(home, f"select count(*) from flow_run where state_type = '{state}'")
    return int(str(number))


def found_nothing_new(home: Path) -> bool:
    return any("nothing new, nothing done" in str(row[0]) for row in query(home, "select message from log"))


def test_a_job_on_a_schedule_runs_once_and_then_finds_nothing_new(
    repository: Path, prefect_home: Path, tmp_path: Path, tiny_file: MakeFile
) -> None:
    home, log = prefect_home, tmp_path / "log"
    path = tiny_file(release={"include_real": True})
    with served(repository, home, log, path, "--interval", 5, HF_TOKEN=TOKEN) as (process, _):
        wait_until(lambda: found_nothing_new(home) or runs(home, "FAILED") > 0, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, 143), log.read_text(errors="replace")[-4000:]
    # No server, no worker: nothing that was started under this PREFECT_HOME is left.
    assert no_server_left(home)
    assert left_over(home) == []
    # One release, one training; the second run looked, and did nothing, in seconds.
    assert len(list((tmp_path / "run").glob("releases/*"))) == 1
    tasks = [row[0] for row in query(home, "select name from task_run")]
    assert tasks.count("train") == 1
    assert tasks.count("look at the source") >= 2
    assert found_nothing_new(home)
    # What the UI shows: the plan, what is to be done, training's progress, the verdict.
    artifacts = query(home, "select key, type, data, description from artifact")
    kinds = {str(key): str(kind) for key, kind, _, _ in artifacts}
    assert kinds["plan"] == kinds["outlook"] == "table"
    assert kinds["verdict"] == "markdown"
    assert kinds["train-base"] == kinds["sample-round-1"] == "progress"
    assert [float(str(data)) for key, _, data, _ in artifacts if key == "sample-round-1"] == [100.0]
    ((markdown,),) = query(home, "select data from artifact where key = 'verdict'")
    assert "contact sheet" in str(markdown)
    assert f"`{tmp_path / 'run' / 'contact_sheet.png'}`" in str(markdown)
    # One run at a time on an output.
    ((limit,),) = query(home, 'select "limit" from concurrency_limit_v2')
    assert limit == 1
    # The token is in no log, artifact, database or run folder.
    leaks = [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert leaks == []


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_middle_of_a_training_leaves_no_process_and_what_was_done(
    repository: Path, prefect_home: Path, tmp_path: Path, tiny_file: MakeFile, sign: signal.Signals
) -> None:
    home, log, run = prefect_home, tmp_path / "log", tmp_path / "run"
    path = tiny_file(train={"images": 20_000})
    with served(repository, home, log, path, "--interval", 5) as (process, _):
        wait_until(lambda: any(run.glob("stages/train-*/work/state.safetensors")), log)
        assert status(run).running is not None
        process.send_signal(sign)
        process.wait(timeout=90)
    assert no_server_left(home)
    assert left_over(home) == []
    found = status(run)
    assert found.running is None
    assert [item.title for item in found.stages if item.state == "done"] == ["read", "split", "plan"]
    assert found.next == "train, which is not done"
    assert list(run.glob("stages/train-*/work/state.safetensors"))


def test_a_second_run_through_a_flow_stops_at_once_and_names_the_first(
    repository: Path, prefect_home: Path, tmp_path: Path, tiny_file: MakeFile
) -> None:
    path = tiny_file()
    with open_workspace(tmp_path / "run"):
        result = subprocess.run(
            [sys.executable, "-m", "flows.augment", str(path)],
            cwd=repository,
            env=environment(prefect_home),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 1
    assert f"is in use by another run: process {os.getpid()} on host" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Retrying" not in result.stderr


def test_a_token_is_told_to_nobody_where_publishing_fails(
    repository: Path, prefect_home: Path, tmp_path: Path, tiny_file: MakeFile, finished_run: Path
) -> None:
    home, run = prefect_home, tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    # Nobody listens there: publishing is tried again, and then given up.
    path = tiny_file(release={"include_real": False, "push": {"repo_id": "owner/name"}})
    result = subprocess.run(
        [sys.executable, "-m", "flows.augment", str(path), "--debug"],
        cwd=repository,
        env=environment(
            home,
            HF_TOKEN=TOKEN,
            HF_ENDPOINT=f"http://127.0.0.1:{free_port()}",
            HF_HUB_OFFLINE="0",
            SYNTHAUG_RETRY_SECONDS="0.2",
            PREFECT_LOGGING_LEVEL="DEBUG",
        ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 1, result.stderr[-3000:]
    assert "could not be reached" in result.stderr
    ((tries,),) = query(home, "select run_count from task_run where name = 'publish'")
    assert tries == 4
    assert TOKEN not in result.stdout + result.stderr
    assert [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()] == []


def processes(home: Path) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def left_over(home: Path, seconds: float = 30) -> list[str]:
    """Processes that stay: what ends in a moment by itself (multiprocessing's tracker, say) is waited for."""
    deadline = time.monotonic() + seconds
    while processes(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    return processes(home)


_RUN_DEPLOYMENT = """
import sys
from prefect.deployments import run_deployment
run = run_deployment(sys.argv[1], timeout=150, poll_interval=1)
print(run.state.type.value, run.state.message)
"""


def test_a_deployment_by_hand_and_the_form_of_its_parameters(
    repository: Path, prefect_home: Path, tmp_path: Path, tiny_file: MakeFile
) -> None:
    home, log = prefect_home, tmp_path / "log"
    with served(repository, home, log, tiny_file(), "--flow", "augment") as (_, address):
        wait_until(lambda: "is being served" in log.read_text(errors="replace"), log)
        told = program(repository, home, _RUN_DEPLOYMENT, "augment/tiny", PREFECT_API_URL=address)
        assert told.startswith("COMPLETED"), log.read_text(errors="replace")[-4000:]
    assert (tmp_path / "run" / "release" / "manifest.parquet").is_file()
    ((schema, parameters),) = query(home, "select parameter_openapi_schema, parameters from deployment")
    assert json.loads(str(schema))["definitions"]["PlanConfig"]["properties"]["target_ratio"]["maximum"] == 1
    assert json.loads(str(parameters))["config"]["name"] == "tiny"


_FLAKY = """
import sys
from flows.tasks import task_of
from flows.server import use_guarded_server
from prefect import flow
from synthaug.errors import DatasetError, ReleaseError
use_guarded_server()
tried = []
def hub():
    tried.append("hub")
    if len(tried) < 3:
        problem = ReleaseError("the hub answered 503")
        problem.may_pass = True
        raise problem
    return "published"
def storage():
    tried.append("storage")
    if tried.count("storage") < 2:
        raise OSError(5, "Input/output error")
    return "read"
def wrong():
    tried.append("wrong")
    raise DatasetError("dataset.path x does not exist")
@flow
def job():
    assert task_of("hub", hub) == "published"
    assert task_of("storage", storage) == "read"
    try:
        task_of("wrong", wrong)
    except DatasetError:
        pass
job()
print(" ".join(tried))
"""


def test_what_can_pass_is_tried_again_and_what_cannot_is_not(repository: Path, prefect_home: Path) -> None:
    told = program(repository, prefect_home, _FLAKY, SYNTHAUG_RETRY_SECONDS="0.1")
    assert told.split() == ["hub"] * 3 + ["storage"] * 2 + ["wrong"]


_WATCH = """
import sys
from flows.watch import watch
from flows.server import use_guarded_server
from tests import stand_ins
stand_ins.install()
use_guarded_server()
for _ in range(2):
    state = watch(sys.argv[1:], return_state=True)
    print(state.type.value, state.message)
"""


def test_a_watch_goes_on_after_a_job_that_fails(
    repository: Path, prefect_home: Path, tmp_path: Path, tiny_file: MakeFile
) -> None:
    good = tiny_file(dataset={"format": "digits", "cut": {}}, plan={"target_ratio": 1.0})
    told = program(repository, prefect_home, _WATCH, tmp_path / "none.yaml", good).splitlines()
    assert told[0].startswith("FAILED 1 of 2 jobs failed")
    assert "none.yaml" in told[1]
    tables = [
        str(row[0]) for row in query(prefect_home, "select data from artifact where key = 'watch' order by created")
    ]
    assert "does not exist" in tables[0]
    assert "release " in tables[0]
    # The second time there is nothing new for the good one.
    assert "nothing new" in tables[1]


def test_the_example_for_a_gpu_worker_is_a_job_of_this_package(repository: Path) -> None:
    text = (repository / "docs" / "gpu-worker" / "prefect.yaml").read_text(encoding="utf-8")
    (deployment,) = yaml.safe_load(text)["deployments"]
    job = parse_config(deployment["parameters"]["config"])
    gpus = deployment["work_pool"]["job_variables"]["env"]["CUDA_VISIBLE_DEVICES"].split(",")
    assert (job.train.device, job.train.processes) == ("cuda", len(gpus))
    assert Path(job.output).is_absolute()
    assert Path(str(job.dataset.path)).is_absolute()
    assert deployment["concurrency_limit"]["limit"] == 1
    assert (repository / deployment["entrypoint"].partition(":")[0]).is_file()


@pytest.mark.parametrize(
    "name", ["a_b", "*x*", "<b>x</b>", "a|b", "`t`", "~~s~~", "[l](http://x)", "www.x.org", "a@b.c"]
)
def test_a_name_in_the_ui_is_no_markup(name: str) -> None:
    from markdown_it import MarkdownIt

    from flows.tasks import cell, code

    # What GitHub's flavour adds, which Prefect's pages read: tables, strikethrough; its links are told by sight.
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for text in (f"| class |\n|---|\n| {cell(name)} |", code(f"/runs/{name}/x.png")):
        kinds = [part.type for token in reader.parse(text) for part in token.children or []]
        assert set(kinds) <= {"text", "text_special", "code_inline"}, kinds
        shown = "".join(part.content for token in reader.parse(text) for part in token.children or [])
        assert shown.removeprefix("class") in {name, f"/runs/{name}/x.png"}
    assert "http://" not in cell(name)
    assert "www." not in cell(name)


def test_prefect_yaml_is_what_prefect_reads(repository: Path) -> None:
    from prefect.cli.deploy._config import _load_deploy_configs_and_actions
    from rich.console import Console

    # Where something is wrong Prefect says so on the console, and goes on with nothing.
    console = Console(record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    deployments, actions = _load_deploy_configs_and_actions(repository / "prefect.yaml", console=console)
    console.file.close()
    assert console.export_text() == ""
    assert {item["name"] for item in deployments} == {"quickstart-nightly", "quickstart", "quickstart-verdict", "watch"}
    assert actions["pull"]
    job = load_config(repository / "configs" / "quickstart.yaml")
    for item in deployments:
        assert item["concurrency_limit"]["limit"] == 1
        assert item["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
        if "config" in item["parameters"]:
            raw = yaml.safe_load((repository / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
            assert item["parameters"]["config"] == raw
    assert job.name == "quickstart"


_LOAD = """
import sys, yaml
from prefect.flows import load_flow_from_entrypoint
for item in yaml.safe_load(open("prefect.yaml"))["deployments"]:
    flow = load_flow_from_entrypoint(item["entrypoint"], use_placeholder_flow=False)
    flow.validate_parameters(item["parameters"])
    print(flow.name)
"""


def test_every_deployment_of_prefect_yaml_can_be_loaded_with_its_parameters(repository: Path, tmp_path: Path) -> None:
    assert program(repository, tmp_path, _LOAD).split() == ["refresh", "augment", "evaluate", "watch"]


def test_prefect_deploy_takes_the_file(repository: Path, prefect_home: Path) -> None:
    """`prefect deploy --all` against a server; what it registers is asked of the database."""
    code = (
        "import subprocess, sys, os\nfrom flows.server import local_server\n"
        "with local_server(int(sys.argv[1])) as address:\n"
        "    env = {**os.environ, 'PREFECT_API_URL': address}\n"
        "    pool = ['work-pool', 'create', 'synthaug', '--type', 'process']\n"
        "    for words in (pool, ['--no-prompt', 'deploy', '--all']):\n"
        "        subprocess.run([sys.executable, '-m', 'prefect', *words], env=env, check=True, stdout=sys.stderr)\n"
    )
    program(repository, prefect_home, code, free_port(), SYNTHAUG_REPOSITORY=str(repository))
    found = query(prefect_home, "select name, entrypoint, work_queue_id is not null from deployment order by name")
    assert [row[0] for row in found] == ["quickstart", "quickstart-nightly", "quickstart-verdict", "watch"]
    crons = [str(row[0]) for row in query(prefect_home, "select schedule from deployment_schedule")]
    assert len(crons) == 2
    assert any("0 2 * * *" in cron for cron in crons)
    assert no_server_left(prefect_home)


def test_a_wrong_schedule_is_refused_before_a_server_is_started(
    repository: Path, tmp_path: Path, tiny_file: MakeFile
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "synthaug", "serve", str(tiny_file()), "--cron", "every night"],
        cwd=repository,
        env=environment(tmp_path / "prefect"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "--cron 'every night' is no schedule" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_told(repository: Path, tmp_path: Path, tiny_file: MakeFile) -> None:
    with closing(socket.socket()) as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        port = place.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "synthaug", "serve", str(tiny_file()), "--port", str(port)],
            cwd=repository,
            env=environment(tmp_path / "prefect"),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 1
    assert f"port {port} is taken" in result.stderr
    assert "Traceback" not in result.stderr
