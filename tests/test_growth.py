"""A dataset that grows: what is kept of the release before, what is trained for and why, with stand-ins for stages."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthaug.config import Config
from synthaug.errors import OutputError, SynthaugError, TrainingError, may_pass
from synthaug.growth import GROWTH_FILE, Generation, Origin, Pinned, Released, Round, shares
from synthaug.pipeline import augment, plan_only
from synthaug.status import look, status
from synthaug.summaries import RunSummary
from tests import growth_parts
from tests.conftest import REPOSITORY
from tests.growth_parts import Images, draws, some_images, trainings

# Birds are common; twelve images of a lynx are an eighth of all.
FIRST = some_images(bird=40, cat=30, lynx=10)


@pytest.fixture(autouse=True)
def growing(stages: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv(growth_parts._VARIABLE, str(tmp_path / "images.json"))
    growth_parts.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    # Whether the disk has it in a power cut is tested elsewhere, and would take most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return stages


@pytest.fixture
def job(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., RunSummary]:
    """`job(images, plan=…)` runs the job on these images."""

    def run(images: Images, output: Path | None = None, **changes: Any) -> RunSummary:
        growth_parts.write_images(tmp_path / "images.json", images)
        return augment(settings(tiny_config, output, **changes))

    return run


def settings(tiny_config: Callable[..., Config], output: Path | None = None, **changes: Any) -> Config:
    # Half of what the stand-ins draw passes.
    fixed: dict[str, Any] = {"dataset": {"cut": {}}, "plan": {"target_ratio": 1.0}, "evaluate": {"enabled": True}}
    for key, value in changes.items():
        fixed[key] = {**fixed.get(key, {}), **value} if isinstance(value, dict) else value
    return tiny_config(**({} if output is None else {"output": output}), **fixed)


def more(images: Images, **n: int) -> Images:
    """The images and so many new training images of each class."""
    grown = copy.deepcopy(images)
    for name, number in n.items():
        of = grown.setdefault(name, {"train": [], "validation": [f"{name}-v"], "test": [f"{name}-t"]})
        of["train"] += [f"{name}-new{len(of['train']) + item}" for item in range(number)]
    return grown


def without(images: Images, name: str, use: str = "train") -> Images:
    less = copy.deepcopy(images)
    less[name][use].pop()
    return less


def moved(images: Images, name: str, start: str, end: str) -> Images:
    changed = copy.deepcopy(images)
    changed[name][end].append(changed[name][start].pop())
    return changed


def clear(stages: list[str]) -> None:
    stages.clear()
    trainings.clear()
    draws.clear()


def sampled() -> dict[str, set[str]]:
    """Class to the checkpoints that it was drawn from."""
    found: dict[str, set[str]] = {}
    for checkpoint, ranges in draws:
        for name in ranges:
            found.setdefault(name, set()).add(checkpoint)
    return found


# ---- the table of the README: what each kind of change makes again

CHANGES: dict[str, tuple[Images, dict[str, Any]]] = {
    "nothing": (FIRST, {}),
    "twelve images of a scarce class": (more(FIRST, lynx=12), {}),
    "images of a common class": (more(FIRST, bird=6), {}),
    "a new class": (more(FIRST, ant=12), {}),
    "an image is withdrawn": (without(FIRST, "cat"), {}),
    "`sample.guidance`": (FIRST, {"sample": {"guidance": 2.0}}),
    "`plan.target_ratio`": (FIRST, {"plan": {"target_ratio": 0.9}}),
    "the card's text": (FIRST, {"release": {"title": "Another"}}),
    "`train`": (FIRST, {"train": {"images": 1024}}),
    "`evaluate`": (FIRST, {"evaluate": {"minutes": 5}}),
}
_ALL = ("read", "split", "judge", "membership", "audit", "evaluate", "release")


def row_of(change: str, stages: list[str]) -> str:
    """The change's row in the table, from what the stages were asked for."""
    assert len(trainings) <= 1
    if not trainings:
        trained = "nothing"
    else:
        names = ", ".join(trainings[0]["scarce"])
        trained = f"{names}, from the last checkpoint" if trainings[0]["warm"] else "everything"
    drawn = set(sampled())
    new = {name for _, ranges in draws for name, (start, _) in ranges.items() if start == 0}
    if not drawn:
        words = "nothing"
    elif new >= {"cat", "lynx"}:
        words = "everything"
    else:
        words = ", ".join([*sorted(new), *(f"more of {name}" for name in sorted(drawn - new))])
    others = ", ".join(name for name in _ALL if name in stages) or "nothing"
    return f"| {change} | {trained} | {words} | {others} |"


@pytest.mark.parametrize("change", CHANGES)
def test_the_table_of_the_readme(growing: list[str], job: Callable[..., RunSummary], change: str) -> None:
    images, changes = CHANGES[change]
    job(FIRST)
    clear(growing)
    job(images, **changes)
    assert row_of(change, growing) in (REPOSITORY / "README.md").read_text(encoding="utf-8")


# ---- what is kept


def test_the_class_that_changed_is_trained_for_and_the_others_are_kept(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    first = job(FIRST)
    (old,) = {checkpoint for checkpoint, _ in draws}
    clear(growing)
    second = job(more(FIRST, lynx=12))
    # 0.3 of 512 images: what a fine-tuning has.
    assert trainings == [{"scarce": ["lynx"], "warm": True, "images": 153}]
    assert set(sampled()) == {"lynx"}
    assert old not in sampled()["lynx"]
    assert second.release != first.release
    assert second.counts["lynx"]["synthetic"] == 18
    assert second.counts["cat"]["synthetic"] == first.counts["cat"]["synthetic"] == 10
    assert "kept samples 1 (checkpoint of generation 1)" in second.reused
    assert second.checkpoint.resolve() != first.checkpoint.resolve() or second.checkpoint == first.checkpoint
    told = " ".join(second.notes)
    assert f"generation 2 grows from release {first.release.name}" in told
    assert "class 'lynx': 12 train images are new; trained for" in told
    assert "samples are kept and audited again: 'cat'" in told
    # The new images are judged by, and judged: nothing that looks at real images is taken over.
    assert {"judge", "membership", "audit", "evaluate", "release"} <= set(growing)


def test_what_was_kept_is_audited_before_anything_is_added(growing: list[str], job: Callable[..., RunSummary]) -> None:
    job(FIRST)
    clear(growing)
    summary = job(more(FIRST, bird=6))
    titles = [title for title in summary.seconds if title.startswith(("kept", "sample", "audit"))]
    assert titles[:3] == [
        "kept samples 1 (checkpoint of generation 1)",
        "kept samples 2 (checkpoint of generation 1)",
        "audit round 0 (generation 2)",
    ]
    assert titles[3] == "sample round 1 (generation 2, checkpoint of generation 1)"
    assert trainings == []
    # Each class goes on where its endless sequence was left.
    assert all(start > 0 for _, ranges in draws for start, _ in ranges.values())
    assert summary.counts["cat"]["synthetic"] == 16


def test_a_grown_job_again_does_nothing(growing: list[str], job: Callable[..., RunSummary]) -> None:
    job(FIRST)
    grown = more(FIRST, lynx=12)
    first = job(grown)
    lineage = (first.run / GROWTH_FILE).read_bytes()
    clear(growing)
    second = job(grown)
    assert growing == []
    assert second.release == first.release
    assert set(second.reused) == set(second.seconds)
    assert (first.run / GROWTH_FILE).read_bytes() == lineage


def test_two_folders_come_to_the_same(job: Callable[..., RunSummary], tmp_path: Path) -> None:
    digests = []
    for output in (tmp_path / "a", tmp_path / "b"):
        job(FIRST, output)
        digests.append(job(more(FIRST, lynx=12), output).release_digest)
    assert digests[0] == digests[1]


def test_a_new_class_in_front_moves_the_numbers_and_not_the_samples(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    first = job(FIRST)
    clear(growing)
    second = job(more(FIRST, ant=12))
    assert trainings[0]["scarce"] == ["ant"]
    assert set(sampled()) == {"ant"}
    assert second.counts["cat"] == first.counts["cat"]
    assert second.counts["lynx"] == first.counts["lynx"]
    assert second.counts["ant"]["synthetic"] == 28


def test_growing_twice_names_three_checkpoints(growing: list[str], job: Callable[..., RunSummary]) -> None:
    images = some_images(bird=60, cat=30, dog=20, lynx=10)
    job(images)
    images = more(images, lynx=12)
    job(images)
    clear(growing)
    images = more(images, dog=8)
    third = job(images)
    assert trainings[0]["scarce"] == ["dog"]
    assert set(sampled()) == {"dog"}
    lines = status(third.run).growth
    assert [line.partition(" (")[0] for line in lines] == [f"checkpoint of generation {n}" for n in (1, 2, 3)]
    assert [line.rpartition(": samples of ")[2] for line in lines] == ["'cat'", "'lynx'", "'dog'"]
    memberships = [title for title in third.seconds if title.startswith("membership")]
    assert memberships == [
        "membership of the checkpoint of generation 1", "membership of the checkpoint of generation 2", "membership",
    ]  # fmt: skip
    assert set(memberships[:2]) <= set(third.reused)
    # And back to the first images, and to the last: nothing is made twice.
    clear(growing)
    job(some_images(bird=60, cat=30, dog=20, lynx=10))
    assert job(images).release == third.release
    assert growing == []


def test_a_class_that_is_raised_for_the_first_time_has_the_newest_checkpoint(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    images = some_images(bird=40, cat=40, lynx=10)
    job(images)
    clear(growing)
    job(more(images, bird=4, lynx=2))
    assert trainings[0]["scarce"] == ["lynx"]
    assert sampled()["cat"] == sampled()["lynx"]
    clear(growing)
    images = some_images(bird=40, cat=40, lynx=10)
    job(images, name="again")
    job(more(images, bird=4), name="again")
    assert trainings == []
    assert len(sampled()["cat"]) == 1


def test_a_class_that_no_kept_checkpoint_has_learned_is_trained_for(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    job(FIRST)
    # As large as the largest, so that it is not raised when it comes.
    grown = more(FIRST, ant=40)
    job(grown)
    assert len(trainings) == 1
    clear(growing)
    job(more(grown, bird=4))
    assert [item["scarce"] for item in trainings] == [["ant"]]
    assert trainings[0]["warm"]


def test_a_class_that_grew_while_it_was_not_raised_is_trained_for_when_it_is(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    spared = {"plan": {"exclude": ["lynx"]}}
    job(FIRST, **spared)
    grown = more(FIRST, lynx=12)
    job(grown, **spared)
    clear(growing)
    third = job(more(grown, cat=3))
    assert [sorted(item["scarce"]) for item in trainings] == [["cat", "lynx"]]
    assert third.counts["lynx"]["synthetic"] > 0


def test_what_a_job_grew_from_may_be_cleared_away_where_no_sample_is_drawn_from_it(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    first = job(FIRST)
    grown = more(FIRST, cat=4, lynx=12)
    second = job(grown)
    for path in first.run.glob("stages/train-*"):
        if path != second.checkpoint.resolve().parent:
            shutil.rmtree(path)
    clear(growing)
    assert job(grown).release == second.release
    assert growing == []


def test_another_limit_decides_anew_what_has_come_to_no_release(
    growing: list[str], job: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    job(FIRST)
    grown = more(FIRST, bird=100, lynx=4)
    monkeypatch.setenv("SYNTHAUG_STAND_IN", "train:fail")
    with pytest.raises(TrainingError):
        job(grown)
    monkeypatch.delenv("SYNTHAUG_STAND_IN")
    clear(growing)
    job(grown, growth={"max_new_share": 0.9})
    assert [item["warm"] for item in trainings] == [True]
    # Once there is a release it stays what it was made by.
    other = more(grown, bird=400, lynx=4)
    first = job(other, growth={"max_new_share": 0.1})
    assert not trainings[-1]["warm"]
    assert job(other, growth={"max_new_share": 0.9}).counts == first.counts
    assert not trainings[-1]["warm"]


def test_a_storage_that_does_not_answer_decides_nothing(
    growing: list[str], job: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    job(FIRST)
    grown = more(FIRST, lynx=12)
    read = pd.read_parquet

    def away(path: Any, *given: Any, **settings: Any) -> Any:
        if str(path).endswith("seen.parquet"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *given, **settings)

    monkeypatch.setattr(pd, "read_parquet", away)
    with pytest.raises(SynthaugError, match="cannot be read") as caught:
        job(grown)
    assert may_pass(caught.value)
    monkeypatch.setattr(pd, "read_parquet", read)
    clear(growing)
    job(grown)
    assert [item["warm"] for item in trainings] == [True]


def test_a_warm_training_that_comes_to_nothing_better_is_no_second_checkpoint(
    growing: list[str], job: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    job(FIRST)
    (old,) = {checkpoint for checkpoint, _ in draws}
    monkeypatch.setenv(growth_parts.KEEPS_BASE, "1")
    clear(growing)
    summary = job(more(FIRST, lynx=12))
    assert trainings[0]["warm"]
    assert sampled() == {"lynx": {old}}
    # What it has seen is what the warm training saw, so it is attacked with that.
    assert [title for title in summary.seconds if title.startswith("membership")] == ["membership"]
    assert "membership" in growing
    clear(growing)
    third = job(more(more(FIRST, lynx=12), cat=2))
    assert set(sampled()) == {"cat"}
    assert third.counts["cat"]["short"] == 0


def test_another_guidance_of_a_grown_job_trains_nothing(growing: list[str], job: Callable[..., RunSummary]) -> None:
    job(FIRST)
    grown = more(FIRST, lynx=12)
    first = job(grown)
    own = {name: checkpoint for checkpoint, ranges in draws for name in ranges}
    clear(growing)
    second = job(grown, sample={"guidance": 2.0})
    assert trainings == []
    assert sampled() == {name: {checkpoint} for name, checkpoint in own.items()}
    assert any("the settings of sampling changed" in note for note in second.notes)
    clear(growing)
    assert job(grown).release == first.release
    assert growing == []


# ---- when nothing may be kept


@pytest.mark.parametrize(
    ("images", "changes", "reason"),
    [
        (without(FIRST, "cat"), {}, "1 image that the checkpoint of generation 1 learned from may not be used"),
        (without(FIRST, "cat", "validation"), {}, "may not be used any more"),
        (moved(FIRST, "cat", "train", "test"), {}, "or not as it was"),
        ({**FIRST, "lynx": FIRST["cat"], "cat": FIRST["lynx"]}, {}, "of 50 images the class is another one now"),
        ({name: FIRST[name] for name in ("bird", "lynx")}, {}, "classes are gone: 'cat'"),
        (more(FIRST, lynx=100), {}, "100 of 180 training images are new, more than growth.max_new_share 0.5"),
        (more(FIRST, lynx=5), {"growth": {"max_new_share": 0.01}}, "more than growth.max_new_share 0.01"),
        (more(FIRST, lynx=5), {"growth": {"samples": "remake"}}, "growth.samples is 'remake'"),
        (more(FIRST, lynx=5), {"train": {"images": 64}}, "the settings of training or of the images are not those"),
        (more(FIRST, lynx=5), {"image": {"size": 16}}, "the settings of training or of the images are not those"),
        (more(FIRST, lynx=5), {"train": {"fine_tune_share": 0}}, "train.fine_tune_share is 0"),
        (more(FIRST, lynx=5), {"privacy": {"dp": {"epsilon": 8}}}, "with privacy.dp a checkpoint's guarantee"),
    ],
)  # fmt: skip
def test_everything_is_made_anew_and_the_reason_is_said(
    growing: list[str],
    job: Callable[..., RunSummary],
    caplog: pytest.LogCaptureFixture,
    images: Images,
    changes: dict[str, Any],
    reason: str,
) -> None:
    job(FIRST)
    clear(growing)
    with caplog.at_level("INFO"):
        summary = job(images, **changes)
    assert [item["warm"] for item in trainings] == [False]
    assert not any(title.startswith("kept") for title in summary.seconds)
    for said in (" ".join(summary.notes), caplog.text):
        assert re.search(f"everything is made from all images: .*{re.escape(reason)}", said)


def test_nothing_of_the_test_split_is_ever_taken_for_training(job: Callable[..., RunSummary]) -> None:
    """The same image in two places: what a kept checkpoint learned from is never measured on."""
    job(FIRST)
    grown = moved(more(FIRST, lynx=12), "lynx", "train", "test")
    job(grown)
    # The image that moved is one of the new ones, which no checkpoint has seen.
    assert [item["warm"] for item in trainings] == [False, True]
    job(moved(grown, "lynx", "test", "validation"))
    assert [item["warm"] for item in trainings] == [False, True, True]
    job(moved(grown, "lynx", "train", "test"))
    assert [item["warm"] for item in trainings] == [False, True, True, False]


# ---- cut off, cleared away, damaged


def test_a_run_that_was_cut_off_goes_on_with_what_was_decided(
    growing: list[str], job: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grown = more(FIRST, lynx=12)
    job(FIRST, tmp_path / "undisturbed")
    undisturbed = job(grown, tmp_path / "undisturbed").release_digest
    first = job(FIRST)
    monkeypatch.setenv("SYNTHAUG_STAND_IN", "train:fail")
    with pytest.raises(TrainingError):
        job(grown)
    monkeypatch.delenv("SYNTHAUG_STAND_IN")
    lineage = json.loads((first.run / GROWTH_FILE).read_text(encoding="utf-8"))
    assert lineage["generations"][-1]["parent"]["release"] == first.release.name
    # A release that comes in between is newer, and is not what was decided.
    between = job(FIRST, sample={"guidance": 2.0})
    assert (first.run / "release").resolve() == between.release != first.release
    clear(growing)
    assert job(grown).release_digest == undisturbed
    assert trainings[0]["warm"]


def test_kept_samples_that_were_cleared_away_are_drawn_again_from_their_checkpoint(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    summary = job(FIRST)
    (old,) = {checkpoint for checkpoint, _ in draws}
    for path in summary.run.glob("stages/sample-*"):
        shutil.rmtree(path)
    # Decoded images are the most of a run folder; what was made from them does not need them.
    for path in summary.run.glob("stages/read-*"):
        shutil.rmtree(path)
    clear(growing)
    grown = more(FIRST, lynx=12)
    second = job(grown)
    assert sampled()["cat"] == {old}
    assert trainings[0]["warm"]
    for path in summary.run.glob("stages/sample-*"):
        shutil.rmtree(path)
    clear(growing)
    assert job(grown).release == second.release
    assert trainings == []
    assert set(sampled()) == {"cat", "lynx"}


@pytest.mark.parametrize(
    ("damage", "decided"),
    [("stage", True), ("weights", False), ("record", True), ("record", False), ("seen", True), ("lineage", True),
     ("lineage", False), ("link", True), ("link", False)],
)  # fmt: skip
def test_a_checkpoint_that_is_gone_means_everything_anew(
    growing: list[str], job: Callable[..., RunSummary], damage: str, decided: bool
) -> None:
    first = job(FIRST)
    grown = more(FIRST, lynx=12)
    folder = first.checkpoint.resolve().parent
    if decided:
        job(grown)
    if damage == "stage":
        shutil.rmtree(folder)
    elif damage == "weights":
        shutil.rmtree(folder / "pipeline")
    elif damage == "record":
        (folder / "done.json").write_text("{", encoding="utf-8")
    elif damage == "seen":
        (folder / "seen.parquet").unlink()
    elif damage == "lineage":
        (first.run / GROWTH_FILE).write_text("[]", encoding="utf-8")
    else:
        (first.run / "release").unlink()
    clear(growing)
    summary = job(grown)
    assert (first.run / "release").resolve() == summary.release
    if decided and damage == "link":
        assert growing == []
        return
    assert [item["warm"] for item in trainings] == [False]
    if damage not in ("lineage", "link"):
        assert any("checkpoint of generation 1" in note and "gone or damaged" in note for note in summary.notes)
    clear(growing)
    assert job(grown).release == summary.release
    assert growing == []


def test_an_attack_that_cannot_be_made_again_is_an_error_that_helps(
    growing: list[str], job: Callable[..., RunSummary]
) -> None:
    summary = job(FIRST)
    for name in ("read", "membership"):
        for path in summary.run.glob(f"stages/{name}-*"):
            shutil.rmtree(path)
    with pytest.raises(OutputError, match=r"were cleared away\. Make everything anew with growth\.samples: remake"):
        job(more(FIRST, lynx=12))
    assert job(more(FIRST, lynx=12), growth={"samples": "remake"}).release.is_dir()


# ---- told beforehand


@pytest.mark.parametrize("change", CHANGES)
def test_status_tells_what_a_run_then_does(
    growing: list[str], job: Callable[..., RunSummary], tiny_config: Callable[..., Config], tmp_path: Path, change: str
) -> None:
    images, changes = CHANGES[change]
    job(FIRST)
    growth_parts.write_images(tmp_path / "images.json", images)
    config = settings(tiny_config, **changes)
    plan_only(config)
    before = {path: path.lstat().st_mtime_ns for path in config.output_path.rglob("*")}
    found = status(config.output_path, config)
    assert {path: path.lstat().st_mtime_ns for path in config.output_path.rglob("*")} == before
    assert found.why is not None
    clear(growing)
    summary = augment(config)
    reused = {item.title for item in found.why if item.action == "reuse"}
    to_do = {item.title for item in found.why if item.action in ("redo", "begin")}
    assert reused <= set(summary.reused)
    assert not to_do & set(summary.reused)
    assert ("train" in to_do) == bool(trainings)
    assert all(sentence in summary.notes for sentence in found.growth)
    assert bool(found.growth) == (images != FIRST)


def test_before_the_images_are_read_it_is_open_what_can_be_kept(
    job: Callable[..., RunSummary], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    first = job(FIRST)
    growth_parts.write_images(tmp_path / "images.json", more(FIRST, lynx=12))
    config = settings(tiny_config)
    actions = {item.title: item.action for item in look(config)}
    assert actions["read"] == actions["judge"] == "redo"
    assert actions["train"] == actions["membership"] == actions["sample round 1"] == "open"
    (line,) = status(first.run, config).growth
    assert line == (
        f"what can be kept of release {first.release.name} is known when the images are read and divided: "
        "'synthaug plan CONFIG' does that and trains nothing"
    )


# ---- the arithmetic alone

_NAMES = ("a", "b", "c", "d")


def _pinned(**record: Any) -> Pinned:
    return Pinned(folder="x", record=record)


@st.composite
def _parents(draw: st.DrawFn) -> Released:
    n = draw(st.integers(1, 3))
    learned = [draw(st.lists(st.booleans(), min_size=4, max_size=4)) for _ in range(n)]
    origins = tuple(
        Origin(
            generation=number + 1,
            checkpoint=_pinned(),
            source=_pinned(classes=list(_NAMES)),
            splits=_pinned(counts={"train": [5 * known for known in learned[number]], "validation": [2] * 4}),
        )
        for number in range(n)
    )
    owners = {name: draw(st.integers(0, n - 1)) for name in _NAMES if draw(st.booleans())}
    rounds = tuple(
        Round(origin=origin, ranges={0: (0, 8)}, classes=mine)
        for origin in range(n)
        for mine in [tuple(name for name, owner in owners.items() if owner == origin)]
        if mine
    )
    return Released(
        release="r", generation=n, settings="s", drawing="now", source=_pinned(), splits=_pinned(), origins=origins,
        owners=owners, rounds=rounds,
    )  # fmt: skip


@given(
    parent=_parents(),
    changed=st.sets(st.sampled_from(_NAMES)),
    raised=st.sets(st.sampled_from(_NAMES), min_size=1),
    larger=st.sets(st.sampled_from(_NAMES)),
    drawing=st.sampled_from(["now", "other"]),
)
def test_every_class_has_one_checkpoint_that_knows_it(
    parent: Released, changed: set[str], raised: set[str], larger: set[str], drawing: str
) -> None:
    generation = Generation(key="k", number=2, parent=parent, changed=dict.fromkeys(changed, "more"))
    counts = {name: {"train": 5 + 3 * (name in larger), "validation": 2} for name in sorted(raised)}
    found = shares(generation, counts, drawing)
    new = len(parent.origins)
    assert set(found.owners) == raised
    assert changed & raised <= set(found.due) <= raised
    for name, owner in found.owners.items():
        assert (owner == new) == (name in found.due or (bool(found.due) and name not in parent.owners))
        assert owner == new or parent.origins[owner].has_learned(name, counts[name])
        assert owner == new or name not in larger
    kept = [(name, item.origin) for item in found.kept for name in item.classes]
    # Nothing of a class that changed, nothing of another checkpoint, nothing of other settings, and all of the rest.
    own = {(name, owner) for name, owner in parent.owners.items() if found.owners.get(name) == owner}
    assert set(kept) == (own if drawing == "now" else set())
    assert len(kept) == len(set(kept))
