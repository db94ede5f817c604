"""What reports say of copies: plain, complete, and no more than was tested."""

from __future__ import annotations

from pathlib import Path

from synthaug.records import ClassAudit, CopyRates, Judge, NearnessTest, PlantedCopies
from synthaug.report.copy_words import (
    COPY_COLUMNS,
    copy_caveat,
    copy_lines,
    copy_rows,
    most_false_alarms,
    too_many_copies,
)


def rates(n: int, near: int, **changes: int | None) -> CopyRates:
    values: dict[str, object] = {
        "n": n, "n_exact": near // 2, "n_near": near, "near_bounds": (0.01, 0.5), "n_low_ratio": 3, "n_in_features": 2,
        "n_accepted": n - near, "accepted_low_ratio": 1, "accepted_in_features": 1, **changes,
    }  # fmt: skip
    return CopyRates.model_validate(values)


def audited(name: str, copies: CopyRates | None) -> ClassAudit:
    return ClassAudit(
        label=0, name=name, n_wanted=9, n_candidates=9, n_accepted=9, n_missing=0, rejected={}, coverage=None,
        coverage_expected=None, copies=copies,
    )  # fmt: skip


def judge(threshold: float | None = 0.1, **changes: object) -> Judge:
    return Judge(
        directory=Path("j"), digest="j", n_train=9, validation_balanced_accuracy=None, near_copy_threshold=threshold,
        near_copy_note="It rests on 9 images.", n_heldout=9, seconds=0.0, **changes,
    )  # fmt: skip


def test_rows_tell_rates_before_the_gate_and_after() -> None:
    rows = copy_rows([audited("a", rates(100, 10)), audited("b", None), audited("c", rates(0, 0, n_in_features=None))])
    assert [row[0] for row in rows] == ["a", "c"]
    assert all(len(row) == len(COPY_COLUMNS) for row in rows)
    assert rows[0][2:] == [
        "10 = 10.0% (1.0% to 50.0%), 5 of them exact", "0", "3 of 100 → 1 of 90", "2 of 100 → 1 of 90",
    ]  # fmt: skip
    assert rows[1][-1] == "unavailable"


def test_lines_say_what_planting_found_and_what_was_not_built_for() -> None:
    own = NearnessTest(
        name="a", threshold=0.2, pooled=False, n_heldout=300, n_groups=300, n_repeats=0, alarms=3, alarm_rate=0.01,
        alarm_bounds=(0.0, 0.03),
    )  # fmt: skip
    planted = (
        PlantedCopies(alteration="exact", listed=True, n=50, n_caught=50, n_in_features=50),
        PlantedCopies(alteration="turned", listed=True, n=50, n_caught=45, n_in_features=50),
        PlantedCopies(alteration="corner", listed=False, n=50, n_caught=10, n_in_features=0),
    )
    text = " ".join(copy_lines(judge(near_copies=(own.model_copy(update={"name": None}), own), planted=planted)))
    assert "It rests on 9 images." in text
    assert "1 of 1 classes have a distance of their own" in text
    assert "Of 2 ways that the search is built for, 95.0% were found (the fewest of 'turned': 90%)." in text
    assert "Of 1 ways that it is not, 20.0% were found (the fewest of 'corner': 20%)." in text
    assert judge(near_copies=(own,)).threshold_of("a") == 0.2
    blind = judge(None)
    assert "Near-copies were not looked for" in copy_lines(blind)[0]
    for some in (blind, judge()):
        assert "not differential privacy and not anonymity" in copy_caveat(some)


def test_a_class_above_the_limit_is_named_with_its_figures() -> None:
    measured = NearnessTest(
        name=None, threshold=0.1, pooled=False, n_heldout=900, n_groups=900, n_repeats=0, alarms=1, alarm_rate=0.001,
        alarm_bounds=(0.0, 0.006),
    )  # fmt: skip
    sure = judge(near_copies=(measured,))
    # Four held-out images: one in five honest ones falls below the nearest of them.
    few = measured.model_copy(update={"n_groups": 4, "alarm_rate": None, "alarm_bounds": None})
    assert most_false_alarms(judge(near_copies=(few,))) > 0.7
    assert most_false_alarms(sure) == 0.006
    assert most_false_alarms(judge(None)) == 0.0
    classes = [audited("fine", rates(100, 25)), audited("bad\x1b[31m", rates(10, 3)), audited("none", rates(0, 0))]
    problem = too_many_copies(0.25, sure, classes)
    assert problem is not None
    assert "3 of 10 (30.0%) of class 'bad\\x1b[31m'" in problem
    assert "fine" not in problem
    assert "privacy.max_near_copy_rate allows 25.0%" in problem
    assert too_many_copies(0.3, sure, classes) is None
    assert too_many_copies(None, sure, classes) is None
    # Few samples whose interval reaches down to what honest images come to are no evidence.
    assert too_many_copies(0.25, judge(near_copies=(few,)), classes) is None
    many = too_many_copies(0.0, sure, [audited(f"class {i}", rates(10, 3)) for i in range(7)])
    assert many is not None
    assert "; and 2 more classes" in many
