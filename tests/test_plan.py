"""The plan's arithmetic: how far a class rises, what is sampled next."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthaug.config import Config, parse_config
from synthaug.errors import PlanError
from synthaug.plan import next_request, nothing_to_raise, plan_balance
from synthaug.records import AuditReport, BalancePlan, ClassAudit, ClassPlan, PixelSpec, Source, Splits

HERE = Path()


def config_with(plan: dict[str, Any] | None = None, sample: dict[str, Any] | None = None, **dataset: Any) -> Config:
    return parse_config(
        {
            "name": "x",
            "output": "x",
            "dataset": {"format": "digits", **dataset},
            "image": {"size": 8},
            "plan": plan or {},
            "sample": sample or {},
        }
    )


def plan_for(real: dict[str, int], /, **plan: Any) -> BalancePlan:
    return plan_with(config_with(plan), real)


def plan_with(config: Config, counts: dict[str, int]) -> BalancePlan:
    pixels = PixelSpec(
        channels=1, dtype="uint8", colour="grey", low=0, high=255, size=8, fit="none", interpolation="none",
        smallest=(8, 8), largest=(8, 8),
    )  # fmt: skip
    source = Source(
        directory=HERE, digest="s", name="s", fingerprint="f", classes=tuple(counts), pixels=pixels, n_images=1,
        n_set_aside=0, set_aside_reasons={}, n_duplicates=0, n_synthetic=0,
    )  # fmt: skip
    real = list(counts.values())
    splits = Splits(
        directory=HERE, digest="p", method="given", held_back={}, n_groups=1,
        counts={"train": real, "validation": [0] * len(real), "test": [0] * len(real)},
    )  # fmt: skip
    return plan_balance(config, source, splits, HERE)


def targets(plan: BalancePlan) -> dict[str, int]:
    return {item.name: item.n_target for item in plan.classes}


def test_full_balance_raises_every_class_to_the_largest() -> None:
    assert targets(plan_for({"cat": 100, "dog": 60, "lynx": 10})) == {"cat": 100, "dog": 100, "lynx": 100}


def test_the_ratio_rounds_up_and_never_lowers() -> None:
    assert targets(plan_for({"cat": 101, "dog": 60, "lynx": 10}, target_ratio=0.5)) == {
        "cat": 101,
        "dog": 60,
        "lynx": 51,
    }


@pytest.mark.parametrize(("share", "target"), [(0.95, 200), (0.9, 100), (0.5, 20), (0.0, 10)])
def test_the_cap_is_exact_in_decimals(share: float, target: int) -> None:
    # In binary fractions 10 / (1 - 0.95) is 199.99999999999983.
    plan = plan_for({"cat": 1000, "lynx": 10}, max_synthetic_share=share)
    assert targets(plan)["lynx"] == target
    assert plan.classes[1].note == (
        f"limited to {target} by plan.max_synthetic_share {share:g}; the target ratio asks 1000"
    )


def test_counts_override_the_ratio_and_the_cap_holds_and_says_so() -> None:
    plan = plan_for({"cat": 100, "dog": 60, "lynx": 10}, counts={"dog": 80, "lynx": 500, "cat": 50})
    assert targets(plan) == {"cat": 100, "dog": 80, "lynx": 200}
    assert [item.note for item in plan.classes] == [
        "plan.counts asks 50, and has 100: real images are never dropped",
        None,
        "limited to 200 by plan.max_synthetic_share 0.95; plan.counts asks 500",
    ]


def test_include_and_exclude() -> None:
    counts = {"cat": 100, "dog": 60, "lynx": 10}
    assert targets(plan_for(counts, exclude=["dog"])) == {"cat": 100, "dog": 60, "lynx": 100}
    assert targets(plan_for(counts, include=["dog"])) == {"cat": 100, "dog": 100, "lynx": 10}


def test_a_class_left_out_of_the_dataset_is_neither_raised_nor_the_measure() -> None:
    plan = plan_with(config_with(exclude=["cat"]), {"cat": 100, "dog": 60, "lynx": 10})
    assert targets(plan) == {"cat": 0, "dog": 60, "lynx": 60}


def test_too_few_real_images_are_refused_with_the_reason() -> None:
    plan = plan_for({"cat": 100, "one": 1, "four": 4, "five": 5}, max_synthetic_share=0.99)
    assert targets(plan) == {"cat": 100, "one": 1, "four": 4, "five": 100}
    assert plan.scarce == [3]
    assert plan.classes[1].refused == (
        "has 1 real image in the training split, fewer than plan.min_real (5): too little to learn from. "
        "Add images, or lower plan.min_real."
    )


def test_a_class_without_images_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"class 'lynx' has 0 real images in the training split.*exclude: \['lynx'\]"):
        plan_for({"cat": 100, "lynx": 0})
    assert targets(plan_for({"cat": 100, "dog": 50, "lynx": 0}, exclude=["lynx"]))["lynx"] == 0


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"counts": {"lyxn": 5}}, "plan.counts names 'lyxn', which is no class of the dataset; did you mean 'lynx'?"),
        ({"include": ["zebra"]}, "plan.include names 'zebra', .* the classes are 'cat', 'lynx'."),
        ({"exclude": ["Lynx"]}, "plan.exclude names 'Lynx', .* did you mean 'lynx'?"),
        ({"include": ["cat"], "exclude": ["cat"]}, "'cat' is in plan.include and in plan.exclude"),
        ({"counts": {"lynx": 50}, "exclude": ["lynx"]}, "a number for 'lynx', and plan.include or plan.exclude"),
        ({"counts": {"lynx": 50}, "include": ["cat"]}, "a number for 'lynx', and plan.include or plan.exclude"),
    ],
)
def test_names_are_checked(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words.replace("?", r"\?")):
        plan_for({"cat": 100, "lynx": 10}, **plan)


def test_nothing_to_raise_names_the_reasons() -> None:
    assert nothing_to_raise(plan_for({"cat": 100, "lynx": 10})) is None
    balanced = nothing_to_raise(plan_for({"cat": 10, "lynx": 10}))
    assert balanced is not None
    assert balanced.startswith("nothing to do: no class is below its target (real training images: 'cat' 10, 'lynx' 10")
    refused = nothing_to_raise(plan_for({"cat": 100, "lynx": 3}))
    assert refused is not None
    assert "every class below its target is refused" in refused
    assert "'lynx' has 3 real images" in refused
    capped = nothing_to_raise(plan_for({"cat": 100, "lynx": 10}, max_synthetic_share=0))
    assert capped is not None
    assert "class 'lynx': limited to 10 by plan.max_synthetic_share 0" in capped


def test_the_digest_speaks_of_the_numbers_alone() -> None:
    assert plan_for({"cat": 9, "lynx": 5}).digest == plan_for({"cat": 9, "lynx": 5}, target_ratio=0.99).digest
    assert plan_for({"cat": 9, "lynx": 5}).digest != plan_for({"cat": 9, "lynx": 5}, target_ratio=0.8).digest


shares = st.integers(0, 99).map(lambda n: n / 100)
ratios = st.integers(1, 100).map(lambda n: n / 100)


@given(real=st.lists(st.integers(5, 5000), min_size=2, max_size=8), share=shares, ratio=ratios)
def test_plan_properties(real: list[int], share: float, ratio: float) -> None:
    names = [f"class {n}" for n in range(len(real))]
    plan = plan_for(dict(zip(names, real, strict=True)), max_synthetic_share=share, target_ratio=ratio)
    percent = round(share * 100)
    for item, n_real in zip(plan.classes, real, strict=True):
        assert item.n_target >= n_real
        # At most `share` of the class is synthetic, in whole numbers.
        assert 100 * item.n_synthetic <= percent * item.n_target
        assert item.n_target <= max(real)
        # It rises as far as it may: one more would break the ratio or the cap.
        if item.n_target > n_real or item.n_synthetic == 0:
            one_more = item.n_target + 1
            above_ratio = 100 * one_more > round(ratio * 100) * max(real) + 99
            above_cap = 100 * (one_more - n_real) > percent * one_more
            assert above_ratio or above_cap or item.n_target == n_real >= ratio * max(real)
    again = plan_for(dict(zip(names, real, strict=True)), max_synthetic_share=share, target_ratio=ratio)
    assert again.digest == plan.digest


# ---- what to sample next


def balance(*wanted: int) -> BalancePlan:
    classes = tuple(
        ClassPlan(label=label, name=f"class {label}", n_real=10, n_target=10 + n) for label, n in enumerate(wanted)
    )
    return BalancePlan(directory=HERE, digest="b", classes=classes)


def audited(plan: BalancePlan, drawn: list[int], accepted: list[int], withheld: str | None = None) -> AuditReport:
    classes = tuple(
        ClassAudit(
            label=item.label,
            name=item.name,
            n_wanted=item.n_synthetic,
            n_candidates=d,
            n_accepted=a,
            n_missing=max(0, item.n_synthetic - a),
            rejected={},
            coverage=None,
            coverage_expected=None,
            withheld=withheld,
        )
        for item, d, a in zip(plan.classes, drawn, accepted, strict=True)
    )
    return AuditReport(directory=HERE, digest="a", classes=classes)


def ranges(plan: BalancePlan, report: AuditReport | None, **sample: Any) -> dict[int, tuple[int, int]]:
    request = next_request(config_with(sample=sample), plan, report)
    return {} if request is None else request.ranges


def test_the_first_request_oversamples_in_whole_micro_batches() -> None:
    assert ranges(balance(0, 100, 4), None) == {1: (0, 128), 2: (0, 64)}
    # 1.1 × 320 is 352 exactly; in binary fractions it is a little more and would take a micro-batch too many.
    assert ranges(balance(320), None, oversample=1.1, micro_batch=32) == {0: (0, 352)}


def test_the_first_request_stays_in_the_budget() -> None:
    assert ranges(balance(100), None, oversample=3, max_candidates=1, micro_batch=10) == {0: (0, 100)}


def test_further_requests_follow_the_share_that_passed() -> None:
    plan = balance(100, 100)
    report = audited(plan, [128, 128], [100, 64])
    # 36 are missing and half pass: 72 more, in whole micro-batches of 64.
    assert ranges(plan, report) == {1: (128, 128)}


def test_the_budget_ends_it() -> None:
    plan = balance(100)
    assert ranges(plan, audited(plan, [128], [1])) == {0: (128, 192)}
    assert ranges(plan, audited(plan, [320], [3])) == {}


def test_where_nothing_passed_the_rest_of_the_budget_is_tried() -> None:
    plan = balance(100)
    assert ranges(plan, audited(plan, [128], [0])) == {0: (128, 192)}


def test_a_withheld_class_with_enough_samples_gets_no_more() -> None:
    plan = balance(100)
    assert ranges(plan, audited(plan, [128], [110], withheld="its coverage has collapsed")) == {}


def test_no_scarce_class_asks_for_nothing() -> None:
    assert ranges(balance(0, 0), None) == {}


@given(
    wanted=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    unit=st.sampled_from([1, 7, 64, 256]),
    percent=st.lists(st.integers(0, 100), min_size=5, max_size=5),
    oversample=st.sampled_from([1.0, 1.1, 1.25, 3.0]),
    most=st.sampled_from([1.0, 2.5, 3.0, 20.0]),
)
def test_the_loop_ends_within_its_budget(
    wanted: list[int], unit: int, percent: list[int], oversample: float, most: float
) -> None:
    plan = balance(*wanted)
    config = config_with(sample={"micro_batch": unit, "oversample": oversample, "max_candidates": most})
    drawn = [0] * len(wanted)
    report, rounds = None, 0
    while (request := next_request(config, plan, report)) is not None:
        rounds += 1
        assert rounds <= 200
        for label, (start, number) in request.ranges.items():
            assert start == drawn[label]
            assert start % unit == 0
            assert number % unit == 0
            assert number > 0
            drawn[label] += number
        accepted = [n * percent[label] // 100 for label, n in enumerate(drawn)]
        report = audited(plan, drawn, accepted)
    for label, n in enumerate(wanted):
        budget = ceil(n * most / unit) * unit
        assert drawn[label] <= budget
        # Met, or the budget is spent.
        assert drawn[label] * percent[label] // 100 >= n or drawn[label] == budget
