"""The audit on real digits: planted faults are found, collapse is withheld, later rounds change nothing before."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from synthaug import audit as module
from synthaug.audit import audit
from synthaug.config import ScaleConfig
from synthaug.errors import LeakError
from synthaug.judge import judge
from synthaug.records import AuditReport, Checkpoint, ClassAudit, Judge, SampleBatch
from synthaug.scale import one_by_one
from tests.quality_parts import World, digits_world, write_checkpoint
from tests.scale_parts import Mapped

FAST = {"train": {"threads": 1}, "audit": {"classifier_steps": 120, "planted": 5}}
SCARCE = (1, 3, 5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return digits_world(tmp_path_factory.mktemp("audit"), scarce=SCARCE, keep=20, **FAST)


@pytest.fixture(scope="module")
def judged(world: World) -> Judge:
    directory = world.root / "judge"
    directory.mkdir()
    return judge(world.config, world.source, world.splits, directory)


def _audit(
    world: World, judged: Judge, batches: Sequence[SampleBatch], checkpoint: Checkpoint | None = None
) -> AuditReport:
    directory = world.root / f"audit-{len(list(world.root.glob('audit-*')))}"
    directory.mkdir()
    return audit(
        world.config,
        world.source,
        world.splits,
        world.plan,
        [checkpoint or world.checkpoint],
        judged,
        batches,
        directory,
    )


def _table(report: AuditReport) -> pd.DataFrame:
    return pd.read_parquet(report.directory / "audit.parquet").set_index("sample_id")


def _class(report: AuditReport, label: int) -> ClassAudit:
    return next(item for item in report.classes if item.label == label)


def _honest(world: World, label: int) -> np.ndarray:
    """Real images of a class that nobody trained on: the best samples there can be."""
    cut = world.table[(world.table["label"] == label) & (world.table["held_back"] == "cut")]
    return world.images[cut["row"].to_numpy()]


@pytest.fixture(scope="module")
def planted(world: World, judged: Judge) -> tuple[AuditReport, pd.DataFrame]:
    images = _honest(world, 3)[:40].copy()
    training = world.images[world.rows("train", 3)]
    images[4] = 0
    images[5] = 200
    images[7] = images[6]
    images[8] = images[6][:, ::-1]
    images[9] = np.rint(images[6] * 0.9).astype(np.uint8)
    images[10] = training[0]
    images[11] = training[1][:, ::-1]
    images[12] = np.rint(training[2] * 0.85).astype(np.uint8)
    images[13] = np.clip(training[3].astype(int) + 6, 0, 255).astype(np.uint8)
    images[14:20] = world.images[world.rows("validation", 0)[:6]]
    report = _audit(world, judged, [world.batch(images, [3] * 40)])
    return report, _table(report)


def test_planted_faults_carry_their_reason(planted: tuple[AuditReport, pd.DataFrame]) -> None:
    table = planted[1]

    def reasons(first: int, last: int) -> list[str]:
        return [table.loc[f"s3-{i}", "reason"] for i in range(first, last + 1)]

    assert reasons(4, 5) == [module.BROKEN] * 2
    assert reasons(7, 9) == [module.DUPLICATE] * 3
    assert reasons(10, 11) == [module.COPY] * 2
    assert reasons(12, 13) == [module.NEAR_COPY] * 2
    assert reasons(14, 19).count(module.OTHER_CLASS) >= 5
    honest = table.drop([f"s3-{i}" for i in [4, 5, *range(7, 20)]])
    assert honest["accepted"].mean() > 0.8


def test_the_table_is_as_the_records_say(world: World, planted: tuple[AuditReport, pd.DataFrame]) -> None:
    report, table = planted
    raw = pd.read_parquet(report.directory / "audit.parquet")
    columns = "sample_id batch row label class_index accepted reason rank probability predicted distance distance_ratio"
    assert list(raw) == [*columns.split(), "nearest_id", "feature_distance"]
    assert (table["accepted"] == table["reason"].isna()).all()
    accepted = table[table["accepted"]].sort_values("class_index")
    assert accepted["rank"].tolist() == list(range(len(accepted)))
    assert (table.loc[~table["accepted"], "rank"] == -1).all()
    assert table.loc["s3-10", "nearest_id"] == world.table["image_id"][world.rows("train", 3)[0]]
    assert table.loc["s3-10", "distance"] < 0.02
    assert table.loc["s3-12", "distance_ratio"] < 0.33
    assert table.loc["s3-4", ["probability", "distance", "nearest_id"]].isna().all()
    item = _class(report, 3)
    assert item.n_candidates == 40
    assert item.n_accepted == len(accepted)
    assert item.n_missing == item.n_wanted - len(accepted)
    assert sum(item.rejected.values()) == 40 - len(accepted)
    assert list(item.rejected) == [reason for reason in module.REASONS if reason in item.rejected]
    # Nothing is left behind but the table, and the shards until the stage is recorded as done.
    assert {path.name for path in report.directory.iterdir()} == {"audit.parquet", "work"}


def test_no_division_changes_what_is_said(
    world: World, judged: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Pieces of 16 samples, so that there is something to divide.
    monkeypatch.setattr("synthaug.quality.arithmetic._MOST_IMAGES", 16)
    batches = [
        world.batch(_honest(world, 1)[:50], [1] * 50),
        world.batch(np.concatenate([_honest(world, 5)[:30], world.images[world.rows("train", 5)[:4]]]), [5] * 34),
    ]
    reports = []
    given = (world.source, world.splits, world.plan, [world.checkpoint], judged, batches)
    engines: list[tuple[Any, int | None]] = [(one_by_one, None), (Mapped(workers=3, seed=2), 16), (Mapped(), 48)]
    for number, (engine, size) in enumerate(engines):
        config = world.config.model_copy(update={"scale": ScaleConfig(shard_images=size)})
        (directory := tmp_path / str(number)).mkdir()
        if number == 2:
            # Killed after two shards of another size, with its scratch left behind.
            first = world.config.model_copy(update={"scale": ScaleConfig(shard_images=16)})
            with pytest.raises(KeyboardInterrupt):
                audit(first, *given, directory, map_shards=Mapped(last=2))
            (directory / ".scratch-killed").mkdir()
        reports.append(audit(config, *given, directory, map_shards=engine))
    assert len({report.digest for report in reports}) == 1
    assert len({(report.directory / "audit.parquet").read_bytes() for report in reports}) == 1
    # 50 and 34 samples are four and three pieces; of these two stood already.
    assert sorted(engines[1][0].ranges) == [(number, number + 1) for number in range(7)]
    assert engines[2][0].ranges == [(2, 5), (5, 7)]
    assert [path.name for path in reports[2].directory.glob(".scratch-*")] == []


def test_honest_samples_are_not_withheld(world: World, judged: Judge) -> None:
    images = [_honest(world, label)[:70] for label in SCARCE]
    labels = [label for label, some in zip(SCARCE, images, strict=True) for _ in some]
    report = _audit(world, judged, [world.batch(np.concatenate(images), labels)])
    for label in SCARCE:
        item = _class(report, label)
        assert item.withheld is None
        assert item.coverage is not None
        assert item.coverage_expected is not None
        assert item.coverage / item.coverage_expected > 0.5
        assert item.n_accepted / item.n_candidates > 0.75


def test_a_collapsed_class_is_withheld_aloud(world: World, judged: Judge, caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(0)
    withheld = 0
    for mode in range(6):
        # Enough noise to be no duplicate, and always the same digit.
        one = _honest(world, 5)[mode].astype(float)
        images = np.clip(one + random.normal(0, 40, (80, 8, 8, 1)), 0, 255).astype(np.uint8)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            report = _audit(world, judged, [world.batch(images, [5] * 80)])
        item = _class(report, 5)
        assert item.n_accepted >= 20
        assert item.coverage is not None
        assert item.coverage_expected is not None
        assert item.coverage / item.coverage_expected < 0.6
        if item.withheld is not None:
            withheld += 1
            assert "under audit.min_coverage 0.3" in item.withheld
            assert "class '5' is withheld" in caplog.text
            assert any("class '5' is withheld" in note for note in report.notes)
    # A noisy collapse onto one of the most typical of twenty images can stay a little above the floor.
    assert withheld >= 2


def test_a_class_that_loses_every_sample_says_so(world: World, judged: Judge) -> None:
    training = world.images[world.rows("train", 1)]
    report = _audit(world, judged, [world.batch(training, [1] * 20)])
    item = _class(report, 1)
    assert item.n_accepted == 0
    assert item.n_missing == item.n_wanted
    assert item.withheld is not None
    assert re.match(r"every one of its 20 samples was rejected \(.*\d+ copy of a training image\)\.", item.withheld)
    assert _class(report, 3).withheld is None
    assert any("'3'" in note and "none was drawn" in note for note in report.notes)


def test_a_filter_that_narrows_and_a_coverage_that_is_unknown_are_noted(world: World, judged: Judge) -> None:
    # Most are another class; too few remain to say anything of coverage.
    images = np.concatenate([_honest(world, 5)[:6], world.images[world.rows("validation", 0)[:20]]])
    report = _audit(world, judged, [world.batch(images, [5] * 26)])
    notes = " ".join(report.notes)
    assert "samples passed" in notes
    assert "coverage is unavailable with 20 real images" in notes
    assert _class(report, 5).coverage is None


def test_more_rounds_never_change_what_was_said_before(world: World, judged: Judge) -> None:
    first = {label: _honest(world, label)[:30] for label in SCARCE}
    later = {label: _honest(world, label)[25:60].copy() for label in SCARCE}
    later[3][10] = first[5][2]  # the same picture under another label, in a later round
    later[1][0] = later[1][20]
    batches = [
        world.batch(np.concatenate(list(first.values())), [k for k in SCARCE for _ in range(30)]),
        world.batch(
            np.concatenate(list(later.values())), [k for k in SCARCE for _ in range(35)], dict.fromkeys(SCARCE, 30)
        ),
    ]
    one, both = _table(_audit(world, judged, batches[:1])), _table(_audit(world, judged, batches))
    pd.testing.assert_frame_equal(one, both.loc[one.index])
    assert both.loc["s3-40", "reason"] == module.DUPLICATE
    assert both.loc["s1-50", "reason"] == module.DUPLICATE
    # The two rounds share five pictures of a class.
    assert both.loc["s5-30":"s5-34", "reason"].tolist() == [module.DUPLICATE] * 5
    for label in SCARCE:
        mine = both[both["label"] == label].sort_values("class_index")
        assert mine.loc[mine["accepted"], "rank"].tolist() == list(range(mine["accepted"].sum()))


def test_the_same_content_has_the_same_digest(world: World, judged: Judge) -> None:
    images = _honest(world, 3)[:30]
    one, same = (_audit(world, judged, [world.batch(images, [3] * 30)]) for _ in range(2))
    other = _audit(world, judged, [world.batch(images[::-1], [3] * 30)])
    assert one.digest == same.digest != other.digest


def test_without_threshold_only_exact_copies_are_found(world: World, judged: Judge) -> None:
    unknown = {"near_copy_threshold": None, "near_copies": (), "feature_test": None}
    blind = judged.model_copy(update={**unknown, "near_copy_note": "nothing to calibrate on"})
    training = world.images[world.rows("train", 3)]
    images = np.concatenate([training[:5], np.rint(training[5:10] * 0.9).astype(np.uint8)])
    report = _audit(world, blind, [world.batch(images, [3] * 10)])
    assert _class(report, 3).rejected == {module.COPY: 5}
    assert "nothing to calibrate on" in report.notes
    copies = _class(report, 3).copies
    assert copies is not None
    assert (copies.n_exact, copies.n_near, copies.n_in_features) == (5, 5, None)


def test_not_a_number_is_found(world: World, judged: Judge) -> None:
    images = _honest(world, 3)[:4].astype(np.float32)
    images[1, 2, 2] = np.nan
    images[2, 0, 0] = np.inf
    assert module._broken(images).tolist() == [False, True, True, False]
    flat = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    flat[..., 1] = 40
    flat[1, 3, 3, 2] = 1
    assert module._broken(flat).tolist() == [True, False]


def test_no_batches_is_no_crash(world: World, judged: Judge) -> None:
    report = _audit(world, judged, [])
    assert _table(report).empty
    assert all(item.n_candidates == 0 for item in report.classes)


def _ids(world: World, split: str) -> list[str]:
    return world.table["image_id"][world.rows(split)].tolist()


def test_a_generator_that_saw_what_it_must_not_is_refused_by_name(world: World, judged: Judge) -> None:
    batch = world.batch(_honest(world, 3)[:2], [3] * 2)
    trained, heldout, test = (_ids(world, split) for split in ("train", "validation", "test"))
    fine = write_checkpoint(world.root, trained, heldout)
    assert _audit(world, judged, [batch], fine)
    cases = {
        r"1 held-out images that judge the samples were trained on.*{}": ([*trained, heldout[4]], []),
        r"1 test images were used by the generator.*{}": ([*trained, test[2]], []),
        r"1 test images .*{}": (trained, [test[2]]),
    }
    named = [heldout[4], test[2], test[2]]
    for (message, (train, validation)), name in zip(cases.items(), named, strict=True):
        checkpoint = write_checkpoint(world.root, train, validation)
        with pytest.raises(LeakError, match=message.format(name)):
            _audit(world, judged, [batch], checkpoint)
    cut = world.table.loc[world.table["held_back"] == "cut", "image_id"].iloc[0]
    with pytest.raises(LeakError, match=f"copies of them could not be found.*{cut}"):
        _audit(world, judged, [batch], write_checkpoint(world.root, [*trained, cut]))


def test_of_several_generators_each_is_looked_at(world: World, judged: Judge, tmp_path: Path) -> None:
    batch = world.batch(_honest(world, 3)[:2], [3] * 2)
    trained, test = _ids(world, "train"), _ids(world, "test")
    fine, wrong = write_checkpoint(world.root, trained), write_checkpoint(world.root, [*trained, test[2]])
    stages = (world.config, world.source, world.splits, world.plan)
    for checkpoints in ([wrong, fine], [fine, wrong]):
        with pytest.raises(LeakError, match=f"1 test images were used by the generator.*{test[2]}"):
            audit(*stages, checkpoints, judged, [batch], tmp_path)
    both = audit(*stages, [fine, fine], judged, [batch], tmp_path)
    assert _table(both).equals(_table(_audit(world, judged, [batch], fine)))


def test_splits_that_moved_under_the_judge_are_refused(world: World, judged: Judge) -> None:
    moved = world.table.assign(split=world.table["split"].replace("validation", "test"))
    directory = world.root / "moved"
    directory.mkdir()
    moved.to_parquet(directory / "splits.parquet")
    other = World(**{**world.__dict__, "splits": world.splits.model_copy(update={"directory": directory})})
    with pytest.raises(LeakError, match="test images were used by the judge"):
        _audit(other, judged, [world.batch(_honest(world, 3)[:2], [3] * 2)])
