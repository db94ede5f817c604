"""Shards: any division gives the same bits, what is whole is not done again, and what is not is."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthaug import generators
from synthaug.audit import AuditShard, _made_with, score_shard
from synthaug.config import Config, ScaleConfig, parse_config
from synthaug.errors import ConfigError, OutputError, SynthaugError, UsageError
from synthaug.formats.manifest import public_config
from synthaug.generators.canonical import environment
from synthaug.pipeline import augment, plan_only
from synthaug.quality.arithmetic import arithmetic, own_threads
from synthaug.records import IMAGES_FILE, Checkpoint, PixelSpec, SampleRequest, Source
from synthaug.sample import sample
from synthaug.scale import (
    MapShards,
    OneByOne,
    Shard,
    ShardDone,
    Stopped,
    Tick,
    _digest_of_sources,
    allow_shards,
    check_stopped,
    computes_with,
    do_shard,
    do_shards,
    forgetting,
    kept,
    one_by_one,
    shard_units,
    stop_shards,
)
from synthaug.trial.entry import entry_identity, load_entry, loaded_identity
from tests.conftest import tiny_values
from tests.scale_parts import Mapped

MADE_WITH = {"arithmetic": "of a test"}
MakeFile = Callable[..., Path]


def write_numbers(shard: Shard, tick: Tick) -> ShardDone:
    """A unit is its own number, written to a file."""

    def fill(folder: Path) -> tuple[str, float]:
        for unit in range(shard.first, shard.last):
            (folder / str(unit)).write_text(str(unit))
            tick(1)
        return f"{shard.first}+{shard.last}", 0.01

    return do_shard(shard, MADE_WITH, fill)


def run(folder: Path, units: int, engine: MapShards, scale: ScaleConfig | None = None) -> tuple[list[int], int, int]:
    """Units in the order in which they were taken, how many were ticked, how many were there before."""
    taken: list[int] = []
    ticks: list[int] = []
    found = do_shards(
        write_numbers,
        lambda first, last: Shard(folder=folder, first=first, last=last, made_with=MADE_WITH),
        folder=folder,
        units=units,
        unit_size=4,
        made_with=MADE_WITH,
        settings=scale or ScaleConfig(),
        map_shards=engine,
        intact=lambda done: all((folder / done.name / str(n)).exists() for n in range(done.first, done.last)),
        take=lambda done: taken.extend(range(done.first, done.last)),
        tick=ticks.append,
    )
    return taken, sum(ticks), found


divisions = st.builds(
    lambda size, seed, workers: (ScaleConfig(shard_images=size), Mapped(seed=seed, workers=workers)),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(0, 99),
    st.integers(1, 3),
)


@given(units=st.integers(0, 40), first=divisions, again=divisions, last=st.integers(0, 6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_unit_is_taken_once_whatever_was_there_before(
    units: int, first: Any, again: Any, last: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("division") / "shards"
    dying = Mapped(seed=first[1]._seed, last=last)
    with contextlib.suppress(KeyboardInterrupt):
        run(folder, units, dying, first[0])
    standing = sorted(folder.iterdir())
    for broken in data.draw(st.lists(st.sampled_from(standing), unique=True) if standing else st.just([])):
        what = data.draw(st.sampled_from(["unit", "record", "other versions"]))
        if what == "unit":
            next(path for path in broken.iterdir() if path.name != "shard.json").unlink()
        elif what == "record":
            (broken / "shard.json").write_text("{")
        else:
            text = (broken / "shard.json").read_text()
            (broken / "shard.json").write_text(text.replace("of a test", "of another"))
        standing.remove(broken)
    # What was being written when a worker was killed.
    (folder / ".00000000-00000001.xyz.part").mkdir()
    whole = sum(1 for path in standing for _ in path.glob("[0-9]*"))
    taken, ticked, found = run(folder, units, again[1], again[0])
    assert sorted(taken) == list(range(units))
    assert ticked == units
    assert found == whole
    assert sum(last - first for first, last in again[1].ranges) == units - whole
    assert not list(folder.glob(".*"))
    # A third time there is nothing to do.
    idle = Mapped()
    assert run(folder, units, idle) == (sorted(taken), units, units)
    assert idle.ranges == []


@given(seconds=st.floats(1e-5, 60), units=st.integers(1, 100_000), workers=st.integers(1, 64), least=st.floats(0, 20))
def test_a_shard_is_neither_too_small_nor_too_large(seconds: float, units: int, workers: int, least: float) -> None:
    engine = OneByOne()
    engine.least_seconds, engine.most_seconds, engine.parts = least, 30.0, 4 * workers  # type: ignore[misc]
    size = shard_units(seconds, units, engine)
    assert 1 <= size <= units
    # Scheduling stays cheap, unless there is not enough to do for a shard of that length.
    assert size * seconds >= min(least, units * seconds) * 0.999
    # Beyond that every worker has its part, and a kill costs no more than half a minute or one unit.
    assert (size - 1) * seconds <= max(least, min(30.0, units * seconds / engine.parts)) * 1.001


def test_what_lies_elsewhere_or_computes_otherwise_is_named(tmp_path: Path) -> None:
    shard = Shard(folder=tmp_path / "shared", first=0, last=2, made_with={"torch": "2", "cpu_capability": "AVX2"})
    with pytest.raises(OutputError, match=rf"worker on host {os.uname().nodename} does not see {tmp_path}/shared"):
        do_shard(shard, shard.made_with, lambda folder: ("", 0.0))
    shard.folder.mkdir()
    with pytest.raises(SynthaugError, match="computes with cpu_capability NEON instead of AVX2: the last bit"):
        do_shard(shard, {"torch": "2", "cpu_capability": "NEON"}, lambda folder: ("", 0.0))
    assert list(shard.folder.iterdir()) == []

    def astray(work: Any, shards: Any, tick: Tick) -> Any:
        for item in shards:
            yield ShardDone(first=item.first, last=item.last, digest="", seconds=1.0, made_with=MADE_WITH)

    mapped = Mapped()
    mapped.__class__ = type("Astray", (Mapped,), {"__call__": lambda self, *given: astray(*given)})
    with pytest.raises(OutputError, match=r"says that it wrote .*00000000-00000002, and it is not there"):
        run(tmp_path / "here", 10, mapped)


def test_another_synthaug_or_machine_is_named_and_its_shards_are_done_again(
    noise: type[Noise], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Mapped):
        """Its workers have changed since the run began."""

        def __call__(self, work: Any, shards: Any, tick: Tick) -> Any:
            monkeypatch.setattr("synthaug.scale._sources", "edited")
            monkeypatch.setattr("synthaug.scale._processor", lambda: "abacus")
            return super().__call__(work, shards, tick)

    with pytest.raises(SynthaugError, match=r"computes with synthaug 0.* \(edited\) instead of .*, processor abacus"):
        draw(tmp_path, Elsewhere(), shard_images=8)
    assert not (tmp_path / "work" / "shards" / "00000000-00000001").exists()
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, Mapped(last=8), shard_images=8)
    monkeypatch.undo()
    monkeypatch.setitem(generators.REGISTRY, "noise", f"{__name__}:Noise")
    engine = Mapped()
    draw(tmp_path, engine, shard_images=8)
    assert len(engine.ranges) == 11


def test_what_computes_is_told_by_its_code_and_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert computes_with("cuda")["gpu"] == "GPU of cuda"
    assert "gpu" not in computes_with("cpu")
    assert all(computes_with("cpu").values())
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("one = 1")
    before = _digest_of_sources(tmp_path)
    (tmp_path / "inner" / "a.py").write_text("one = 2")
    assert _digest_of_sources(tmp_path) != before


def test_a_worker_with_another_backbone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imported the module before it was edited, so the file is no witness."""
    module = tmp_path / "backbone_of_a_test.py"
    module.write_text("network = 1")
    monkeypatch.syspath_prepend(tmp_path)
    entry = "backbone_of_a_test:network"
    before = entry_identity(entry)
    load_entry(entry, "evaluate.backbone")
    module.write_text("network = 22")
    run = _made_with(entry_identity(entry))
    assert (loaded_identity(entry), loaded_identity(entry) != entry_identity(entry)) == (before, True)
    given = {
        "folder": tmp_path,
        "first": 0,
        "last": 1,
        "made_with": run,
        "judge": tmp_path,
        "batches": (),
        "pieces": (),
    }
    shard = AuditShard.model_construct(**given, backbone=entry, threads=1)
    with pytest.raises(SynthaugError, match=rf"computes with evaluate.backbone {before} instead of .* start anew"):
        score_shard(shard, lambda number: None)
    monkeypatch.delitem(sys.modules, "backbone_of_a_test")
    load_entry(entry, "evaluate.backbone")
    assert loaded_identity(entry) == entry_identity(entry) != before
    del sys.modules["backbone_of_a_test"]


def test_a_shard_that_was_done_twice_stays_as_it_was_done_first(tmp_path: Path) -> None:
    shard = Shard(folder=tmp_path, first=0, last=2, made_with=MADE_WITH)
    first = write_numbers(shard, lambda number: None)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    assert write_numbers(shard, lambda number: None) == first
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_threads_keep_what_they_loaded_and_stop_when_they_are_told() -> None:
    made: list[str] = []

    def load(name: str) -> str:
        return kept(("thing", name), lambda: made.append(name) or name)

    with forgetting():
        assert [load(name) for name in "aabba"] == list("aabba")
        assert made == ["a", "b", "a"]
        other = threading.Thread(target=load, args=("a",))
        other.start()
        other.join()
        assert made == ["a", "b", "a", "a"]
    load("a")
    assert len(made) == 5
    check_stopped()
    stop_shards()
    with pytest.raises(Stopped):
        check_stopped()
    allow_shards()
    check_stopped()


def test_a_thread_computes_with_the_number_of_threads_it_was_given() -> None:
    """Without asking first, the first call of a thread takes the number that was set last, by whomever."""
    before = torch.get_num_threads()
    set_here, seen = threading.Event(), []

    def compute() -> None:
        own_threads(1)
        set_here.wait(10)
        torch.ones(100, 100) @ torch.ones(100, 100)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    try:
        thread.start()
        time.sleep(0.05)
        torch.set_num_threads(3)
        set_here.set()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


class Noise:
    """A generator that draws what its seeds say, and nothing else."""

    solver = "noise"
    loaded = 0

    @classmethod
    def load(cls, directory: Path, *, device: str) -> Noise:
        cls.loaded += 1
        return cls()

    def default_steps(self, guidance: float) -> int:
        return 8

    def sample(self, labels: Any, seeds: Any, *, steps: int, guidance: float) -> np.ndarray:
        # As bound to the whole micro-batch as a network's last bit is.
        mixed = np.random.default_rng([*map(int, seeds), *labels])
        return mixed.integers(0, 256, (len(seeds), 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> type[Noise]:
    monkeypatch.setitem(generators.REGISTRY, "noise", f"{__name__}:Noise")
    monkeypatch.setattr(Noise, "loaded", 0)
    return Noise


def draw(place: Path, engine: MapShards, **scale: Any) -> tuple[str, bytes]:
    place.mkdir(exist_ok=True)
    (place / "pipeline").mkdir(exist_ok=True)
    config = parse_config(tiny_values(place / "run", train={"device": "cpu"}, scale=scale))
    spec = {"channels": 1, "dtype": "uint8", "colour": "grey", "low": 0, "high": 255, "size": 8, "fit": "none"}
    pixels = PixelSpec.model_validate({**spec, "interpolation": "none", "smallest": (8, 8), "largest": (8, 8)})
    source = Source.model_construct(classes=("a", "b", "c"), pixels=pixels)
    checkpoint = Checkpoint.model_construct(directory=place, digest="0" * 64, generator="noise")
    request = SampleRequest(ranges={0: (0, 40), 2: (16, 48)})
    batch = sample(config, source, checkpoint, request, place, map_shards=engine)
    return batch.digest, (place / IMAGES_FILE).read_bytes()


@given(division=divisions, last=st.none() | st.integers(0, 5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_division_changes_a_bit_of_the_samples(
    noise: type[Noise], division: Any, last: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undivided = draw(tmp_path_factory.mktemp("whole"), one_by_one, shard_images=1000)
    place = tmp_path_factory.mktemp("divided")
    size, engine = division[0].shard_images, division[1]
    if last is not None:
        with contextlib.suppress(KeyboardInterrupt):
            draw(place, Mapped(seed=1, last=last), shard_images=8)
    assert draw(place, engine, shard_images=size) == undivided


def test_a_generator_is_loaded_once_and_a_damaged_image_drawn_again(noise: type[Noise], tmp_path: Path) -> None:
    whole = draw(tmp_path / "a", one_by_one, shard_images=8)
    assert noise.loaded == 1
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "b", Mapped(last=8), shard_images=8)
    noise.loaded = 0
    # All but the last three stand; of these one is not what its digest says.
    images = np.load(tmp_path / "b" / IMAGES_FILE, mmap_mode="r+")
    images[9] ^= 1
    images.flush()
    engine = Mapped()
    assert draw(tmp_path / "b", engine, shard_images=8) == whole
    assert engine.ranges == [(1, 2), (8, 9), (9, 10), (10, 11)]


def test_other_versions_draw_all_of_it_again(
    noise: type[Noise], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, Mapped(last=8), shard_images=8)
    other = {"torch": "9", "diffusers": "9", "numpy": "9", "cpu_capability": "abacus"}
    monkeypatch.setattr("synthaug.sample.environment", lambda: other)
    engine = Mapped()
    draw(tmp_path, engine, shard_images=8)
    assert len(engine.ranges) == 11


def test_another_version_of_synthaug_draws_all_of_it_again_and_no_worker_has_another(
    noise: type[Noise], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, Mapped(last=8), shard_images=8)
    monkeypatch.setattr("synthaug.__version__", "9.9.9")
    engine = Mapped()
    draw(tmp_path, engine, shard_images=8)
    assert len(engine.ranges) == 11
    told = r"computes with synthaug 9\.9\.9 instead of 0\.1\.0"
    shard = Shard(folder=tmp_path, first=0, last=2, made_with={**environment(), "synthaug": "0.1.0"})
    with pytest.raises(SynthaugError, match=told):
        do_shard(shard, environment(), lambda folder: ("", 0.0))
    shard = shard.model_copy(update={"made_with": {**arithmetic(), "synthaug": "0.1.0"}})
    with pytest.raises(SynthaugError, match=told):
        do_shard(shard, arithmetic(), lambda folder: ("", 0.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"runner": "slurm"}, "scale.runner"),
        ({"runner": "processes", "workers": 0}, "scale.workers"),
        ({"runner": "threads", "address": "tcp://10.0.0.1:8786"}, "scale.address is for runner 'dask' or 'ray'"),
        ({"runner": "dask", "address": "tcp://10.0.0.1:8786", "workers": 2}, "give one"),
        ({"runner": "dask", "address": "tcp://user:password@host:1"}, "scale.address"),
        ({"shard_images": 0}, "scale.shard_images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(tiny_values(tmp_path, scale=values))


def test_without_prefect_workers_are_refused_by_name(
    tmp_path: Path, tiny_config: Callable[..., Config], tiny_file: MakeFile, command: Any, stages: list[str]
) -> None:
    config = tiny_config(scale={"runner": "dask"})
    with pytest.raises(UsageError, match=r"scale.runner: dask is for Prefect flows.*python -m flows.augment"):
        augment(config)
    assert not (tmp_path / "run").exists()
    # What needs no worker minds nothing.
    assert plan_only(config).plan.classes
    result: subprocess.CompletedProcess[str] = command("run", tiny_file(scale={"runner": "threads"}))
    assert result.returncode == 2
    assert "scale.runner: threads is for Prefect flows" in result.stderr
    assert "Traceback" not in result.stderr


def test_who_computes_is_not_in_the_release(tmp_path: Path) -> None:
    plain = parse_config(tiny_values(tmp_path))
    scaled = parse_config(tiny_values(tmp_path, scale={"runner": "dask", "address": "tcp://10.0.0.1:8786"}))
    assert public_config(scaled) == public_config(plain)
    assert "scale" not in public_config(plain)
