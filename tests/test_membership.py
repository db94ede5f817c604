"""The membership attack: its arithmetic against oracles, and real checkpoints that should and should not be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from synthaug.config import Config, parse_config
from synthaug.diffusion.training import Trainer
from synthaug.errors import ConfigError, LeakError, ReleaseError
from synthaug.membership import membership, refuse_membership
from synthaug.pipeline import augment
from synthaug.quality.membership import Attacked, combined_score, figures, roughness
from synthaug.records import (
    MEMBERSHIP_FILE,
    MEMBERSHIP_SCORES_FILE,
    SEEN_FILE,
    Checkpoint,
    ClassMembership,
    Interval,
    Membership,
    MembershipFigures,
    Source,
    Splits,
)
from synthaug.report.membership_words import membership_sentence


def attacked(score: np.ndarray, member: np.ndarray, labels: Any = 0, groups: Any = None) -> Attacked:
    n = len(score)
    return Attacked(
        score=np.asarray(score, dtype=np.float64),
        control=np.zeros(n),
        member=np.asarray(member, dtype=bool),
        labels=np.broadcast_to(labels, n).astype(np.int64),
        groups=np.arange(n) if groups is None else groups,
    )


def auc(given: Attacked, seed: int = 0) -> Interval:
    found = figures(given, seed).auc
    assert found is not None
    return found


# ---- arithmetic


def test_the_auc_of_one_class_is_the_known_one_with_ties_at_half() -> None:
    random = np.random.default_rng(0)
    member = np.arange(150) < 60
    score = (random.normal(size=150) + 0.7 * member).round(1)  # many ties
    assert auc(attacked(score, member)).estimate == pytest.approx(roc_auc_score(member, score), abs=1e-6)
    assert auc(attacked(np.zeros(150), member)).estimate == 0.5
    assert auc(attacked(-score, member)).estimate == pytest.approx(1 - roc_auc_score(member, score), abs=1e-6)


def test_a_class_that_is_easy_to_denoise_is_no_membership() -> None:
    """Members are mostly of the easy class; within a class they score like the others."""
    random = np.random.default_rng(1)
    labels = np.repeat([0, 0, 1, 1], [300, 50, 50, 300])
    member = np.repeat([True, False, True, False], [300, 50, 50, 300])
    score = random.normal(size=700) + 3 * (labels == 0)
    assert roc_auc_score(member, score) > 0.8
    found = auc(attacked(score, member, labels))
    assert found.low < 0.5 < found.high


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "spread"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (2.5, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(shift: float, spread: float) -> None:
    """100 draws of 30 members and 60 others; with `spread`, of ten and twenty groups' worth of each resembling."""
    truth = norm.cdf(shift / np.sqrt(2 * (1 + spread**2)))
    member = np.repeat([True, False], [60, 120])
    groups = np.arange(180) // 3 if spread else np.arange(180)
    held = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        score = random.normal(size=180) + shift * member + spread * random.normal(size=180)[groups]
        found = auc(attacked(score, member, groups=groups), seed)
        held += found.low <= truth <= found.high
    # 89 of 100 or fewer come by chance in 1 of 90 at a true 95 %.
    assert held >= 90


def test_an_interval_has_a_width_where_every_member_is_told() -> None:
    member = np.arange(40) < 15
    found = auc(attacked(member.astype(float), member))
    assert (found.estimate, found.high) == (1, 1)
    assert 0.8 < found.low < 0.97


def test_images_of_one_group_do_not_make_the_interval_narrow() -> None:
    random = np.random.default_rng(2)
    score, member = random.normal(size=60), np.arange(60) < 30
    once = auc(attacked(score, member))
    copied = auc(attacked(np.repeat(score, 6), np.repeat(member, 6), groups=np.repeat(np.arange(60), 6)))
    assert copied.estimate == pytest.approx(once.estimate)
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    as_if_alone = auc(attacked(np.repeat(score, 6), np.repeat(member, 6)))
    assert as_if_alone.high - as_if_alone.low < 0.6 * (once.high - once.low)


def test_too_few_images_or_groups_are_unavailable_with_the_numbers() -> None:
    member = np.arange(40) < 15
    for groups, words in [
        (None, None),
        (np.where(member, np.arange(40) % 9, np.arange(40) + 100), "9 training and 25 held-out"),
        (np.where(member, np.arange(40), 100 + np.arange(40) % 19), "15 training and 19 held-out"),
    ]:
        found = figures(attacked(np.zeros(40), member, groups=groups), 0)
        assert (found.auc is None) == (words is not None)
        assert words is None or words in (found.unavailable or "")
        assert (found.n_members, found.n_heldout) == (15, 25)


def test_the_rate_shows_what_the_auc_hides() -> None:
    """A tenth of the members is known by heart, the others not at all."""
    random = np.random.default_rng(3)
    member = np.arange(800) < 400
    score = random.normal(size=800)
    before = figures(attacked(score, member), 0)
    assert before.true_positive_rate is not None
    assert before.true_positive_rate.low <= 0.01
    score[:40] = 9
    after = figures(attacked(score, member), 0)
    assert after.auc is not None
    assert after.auc.estimate < 0.6
    assert after.true_positive_rate is not None
    assert 0.1 <= after.true_positive_rate.estimate < 0.13
    assert after.true_positive_rate.low > 0.07
    few = figures(attacked(score[:498], member[:498]), 0)
    assert few.auc is not None
    assert few.true_positive_rate is None, "98 held-out images cannot show one false alarm in a hundred"


def test_levels_count_alike_whatever_their_scale() -> None:
    random = np.random.default_rng(4)
    losses, labels = random.random((50, 3)), np.repeat([0, 1], 25)
    score = combined_score(losses, labels)
    assert np.array_equal(score, combined_score(losses * [1, 1e4, 1e-4] + [0, 5, 0], labels))
    best = np.array(losses)
    best[7] = 0
    assert combined_score(best, labels)[:25].argmax() == 7
    assert ((score > 0) & (score < 1)).all()


def test_roughness_knows_smooth_from_rough() -> None:
    images = np.zeros((3, 8, 8, 1), np.uint8)
    images[1, :, 4:] = 255
    images[2, ::2] = 255
    flat, edge, stripes = roughness(images)
    assert flat == 0 < edge < stripes


# ---- the limit


def found(estimate: float | None, *classes: tuple[float, float], unavailable: str | None = None) -> Membership:
    def interval(value: float | None, low: float) -> Interval | None:
        return None if value is None else Interval(estimate=value, low=low, high=1)

    return Membership(
        directory=Path(),
        digest="d",
        overall=MembershipFigures(n_members=1, n_heldout=1, auc=interval(estimate, 0.5), unavailable=unavailable),
        classes=tuple(
            ClassMembership(label=i, name=f"lynx\n{i}", n_members=1, n_heldout=1, auc=interval(*item))
            for i, item in enumerate(classes)
        ),
        levels=(0.1,),
        draws=1,
        most_of_a_class=1,
        seconds=0,
    )


def test_an_auc_above_the_limit_is_refused_with_figure_limit_and_advice(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(privacy={"max_membership_auc": 0.8})
    refuse_membership(config, found(0.8, (0.8, 0.6)), Path("x"))
    with pytest.raises(ReleaseError, match=r"AUC of 0\.810 \(95 % 0\.500.* over all classes.*allows 0\.8\..*x\.$"):
        refuse_membership(config, found(0.81), Path("x"))
    with pytest.raises(ReleaseError, match=r"0\.900 .*for class 'lynx\\n1'"):
        refuse_membership(config, found(0.6, (0.6, 0.4), (0.9, 0.51)), Path("x"))
    # So few images come out anywhere by chance.
    refuse_membership(config, found(0.6, (0.9, 0.5)), Path("x"))
    refuse_membership(tiny_config(privacy={"max_membership_auc": None}), found(1.0, (1.0, 1.0)), Path("x"))


def test_what_could_not_be_measured_fails_a_limit_that_the_user_set(tiny_config: Callable[..., Config]) -> None:
    unknown = found(None, unavailable="3 training and 0 held-out images")
    refuse_membership(tiny_config(), unknown, Path("x"))
    with pytest.raises(ReleaseError, match=r"is unavailable: 3 training and 0 held-out images\. A larger validation"):
        refuse_membership(tiny_config(privacy={"max_membership_auc": 0.95}), unknown, Path("x"))


@pytest.mark.parametrize("value", [0.49, 1.01, "high"])
def test_limits_that_mean_nothing_are_refused(tiny_config: Callable[..., Config], value: Any) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.max_membership_auc"):
        tiny_config(privacy={"max_membership_auc": value})


# ---- real checkpoints


def stage_record(kind: Any, run: Path, name: str) -> Any:
    (folder,) = run.glob(f"stages/{name}-*")
    return kind.from_plain(json.loads((folder / "done.json").read_text())["record"], folder)


@pytest.mark.slow
def test_a_lightly_trained_checkpoint_is_not_told_and_the_release_says_what_was_tested(finished_run: Path) -> None:
    summary = json.loads((finished_run / "run.json").read_text())
    interval = summary["membership"]["overall"]["auc"]
    assert interval["low"] <= 0.5 <= interval["high"]
    assert summary["membership_sentence"].startswith("no evidence that the checkpoint tells")
    shown = json.loads((finished_run / MEMBERSHIP_FILE).read_text())
    assert shown["overall"]["auc"] == interval
    card = (finished_run / "release" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "membership attack on the checkpoint" in card
    assert "not differential privacy and not anonymity" in card
    assert f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]" in card
    # Whether a single image was trained on is nobody's business.
    assert not [file for file in (finished_run / "release").rglob("*") if file.name.startswith("membership")]
    record = stage_record(Membership, finished_run, "membership")
    scores = pd.read_parquet(record.directory / MEMBERSHIP_SCORES_FILE)
    assert len(scores) == record.overall.n_members + record.overall.n_heldout
    assert {item.name for item in record.classes if item.auc is not None} >= {"3", "8"}, "twelve are enough"


@pytest.mark.slow
def test_the_attack_repeats_exactly_and_never_reads_test_images(finished_run: Path, tmp_path: Path) -> None:
    source, splits, checkpoint, first = (
        stage_record(kind, finished_run, name)
        for kind, name in [(Source, "read"), (Splits, "split"), (Checkpoint, "train"), (Membership, "membership")]
    )
    config = parse_config(json.loads(json.dumps(_values(finished_run))))
    again = membership(config, source, splits, checkpoint, _new(tmp_path / "again"))
    assert again.digest == first.digest
    table = pd.read_parquet(splits.directory / "splits.parquet")
    test = table.loc[(table["split"] == "test") & table["held_back"].isna(), "image_id"].iloc[:1]
    assert not set(pd.read_parquet(again.directory / MEMBERSHIP_SCORES_FILE)["image_id"]) & set(test)
    seen = pd.read_parquet(checkpoint.directory / SEEN_FILE)
    leaked = checkpoint.model_copy(update={"directory": _new(tmp_path / "leaked")})
    pd.concat([seen, pd.DataFrame({"image_id": test, "use": "train"})]).to_parquet(leaked.directory / SEEN_FILE)
    with pytest.raises(LeakError, match="1 test images are among those the checkpoint has seen"):
        membership(config, source, splits, leaked, _new(tmp_path / "refused"))


@pytest.mark.slow
def test_a_checkpoint_overtrained_on_20_images_is_blocked(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole job on twenty images, trained past the point where the held-out loss would have stopped it."""
    monkeypatch.setattr(Trainer, "_judged", lambda self, losses: -float(self.images_seen))
    config = tiny_config(
        dataset={"cut": {"3": 8, "8": 12}, "exclude": [str(digit) for digit in range(10) if digit not in (3, 8)]},
        plan={"target_ratio": 1.0},
        # Its samples are near-copies too, and that limit would speak first.
        privacy={"max_near_copy_rate": None},
        train={
            "images": 8_000,
            "batch_size": 40,
            "width": 32,
            "learning_rate": 3e-3,
            "fine_tune_share": 0,
            "dropout": 0,
            "augment": {"probability": 0},
        },
    )
    with pytest.raises(ReleaseError, match="the checkpoint tells its training images from others") as caught:
        augment(config)
    assert "privacy.max_membership_auc allows 0.95" in str(caught.value)
    assert not (config.output_path / "release").exists()
    shown = json.loads((config.output_path / MEMBERSHIP_FILE).read_text())
    assert shown["overall"]["n_members"] == 20
    assert shown["overall"]["auc"]["estimate"] > 0.97
    record = Membership.from_plain(shown, Path())
    assert "better than guessing" in membership_sentence(record)
    # The same checkpoint goes out where the user lifts the limit, and the card says what was found.
    privacy = config.privacy.model_copy(update={"max_membership_auc": None, "max_near_copy_rate": None})
    released = augment(config.model_copy(update={"privacy": privacy}))
    assert "train" in released.reused
    assert "better than guessing" in (released.release / "README.md").read_text(encoding="utf-8").replace("\\", "")


def _values(run: Path) -> dict[str, Any]:
    from tests.conftest import tiny_values

    return tiny_values(run)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
