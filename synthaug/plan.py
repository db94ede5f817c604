"""How many images each class shall end with, and what to sample next. Pure arithmetic, no pictures.

Shares and ratios are taken as the decimals a person wrote (0.95 is 95/100 exactly), so that no result
hangs on the last bit of a binary fraction.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

from synthaug.config import Config, PlanConfig
from synthaug.digest import digest_json
from synthaug.errors import PlanError
from synthaug.records import AuditReport, BalancePlan, ClassPlan, SampleRequest, Source, Splits

logger = logging.getLogger(__name__)


def plan_balance(config: Config, source: Source, splits: Splits, directory: Path) -> BalancePlan:
    """Return how many images each class should end with, from its usable training images.

    A class rises toward `target_ratio` of the largest class, or to its number in `plan.counts`, but never so
    far that more than `max_synthetic_share` of it is synthetic, and never below what it has:

        n_target = max(n_real, min(ceil(target_ratio * n_max), floor(n_real / (1 - max_synthetic_share))))

    A scarce class with fewer than `plan.min_real` images keeps what it has and carries the reason.

    Raises:
        PlanError: A name in `plan` is no class, the settings contradict each other, or a class that is to
            be raised has no real image at all.
    """
    settings = config.plan
    _check_names(settings, source.classes)
    left_out = set(config.dataset.exclude)
    real = list(splits.counts["train"])
    largest = max((n for n, name in zip(real, source.classes, strict=True) if name not in left_out), default=0)
    classes = []
    for label, (name, n_real) in enumerate(zip(source.classes, real, strict=True)):
        if name in left_out:
            item = ClassPlan(label=label, name=name, n_real=0, n_target=0, note="left out by dataset.exclude")
        elif name in settings.exclude or (settings.include is not None and name not in settings.include):
            item = ClassPlan(label=label, name=name, n_real=n_real, n_target=n_real, note="not to be raised")
        else:
            item = _plan_class(settings, label, name, n_real, largest)
        classes.append(item)
        if item.refused:
            logger.warning("class %r is not raised: %s", name, item.refused)
    return BalancePlan(
        directory=directory,
        digest=digest_json([item.model_dump(mode="json") for item in classes]),
        classes=tuple(classes),
    )


def nothing_to_raise(plan: BalancePlan) -> str | None:
    """Why a plan raises no class, in words; None where it raises one."""
    if plan.scarce:
        return None
    refused = [f"class {item.name!r} {item.refused}" for item in plan.classes if item.refused]
    if refused:
        return "nothing to do: every class below its target is refused.\n  " + "\n  ".join(refused)
    counts = ", ".join(f"{item.name!r} {item.n_real}" for item in plan.classes)
    limits = "".join(f"\n  class {item.name!r}: {item.note}" for item in plan.classes if item.note)
    return (
        f"nothing to do: no class is below its target (real training images: {counts}). "
        f"Raise plan.target_ratio, or name the numbers wanted in plan.counts.{limits}"
    )


def next_request(config: Config, plan: BalancePlan, report: AuditReport | None) -> SampleRequest | None:
    """Return what to sample next, or None when the plan is met or the budget of candidates is spent.

    First `sample.oversample` times what the plan asks of each class; then, from the share of candidates that
    passed the audit, what is still missing. Never more than `sample.max_candidates` times what the plan asks.
    Everything is rounded up to whole micro-batches, so every range begins where a micro-batch begins.
    """
    unit = config.sample.micro_batch
    audited = {} if report is None else {item.label: item for item in report.classes}
    ranges = {}
    for label, wanted in ((item.label, item.n_synthetic) for item in plan.classes if item.n_synthetic > 0):
        budget = _whole(_exact(config.sample.max_candidates) * wanted, unit)
        item = audited.get(label)
        drawn, accepted = (item.n_candidates, item.n_accepted) if item else (0, 0)
        # No report yet, or one of samples that were kept, none of them of this class.
        if not drawn:
            ranges[label] = (0, min(budget, _whole(_exact(config.sample.oversample) * wanted, unit)))
            continue
        # A class can be withheld although enough of its samples passed (its coverage has collapsed, say):
        # more of the same would not help, so only what is missing in number is drawn again.
        missing = wanted - accepted
        if missing <= 0:
            continue
        # Where nothing passed there is no rate to go by; the rest of the budget is the only honest try.
        likely = _whole(Fraction(missing * drawn, accepted), unit) if accepted else budget
        number = min(likely, budget - drawn)
        if number > 0:
            ranges[label] = (drawn, number)
    return SampleRequest(ranges=ranges) if ranges else None


def _plan_class(settings: PlanConfig, label: int, name: str, n_real: int, largest: int) -> ClassPlan:
    asked = settings.counts.get(name)
    wanted = ceil(_exact(settings.target_ratio) * largest) if asked is None else asked
    if n_real == 0 and wanted > 0:
        raise PlanError(
            f"class {name!r} has 0 real images in the training split, so there is nothing to learn it from. "
            f"Leave it out with dataset.exclude: [{name!r}], or add at least {settings.min_real} images."
        )
    limit = floor(n_real / (1 - _exact(settings.max_synthetic_share)))
    target = max(n_real, min(wanted, limit))
    refused = note = None
    if wanted > n_real and n_real < settings.min_real:
        target = n_real
        refused = (
            f"has {n_real} real image{'s' if n_real != 1 else ''} in the training split, fewer than plan.min_real "
            f"({settings.min_real}): too little to learn from. Add images, or lower plan.min_real."
        )
    elif target < wanted:
        source = "plan.counts asks" if asked is not None else "the target ratio asks"
        note = f"limited to {target} by plan.max_synthetic_share {settings.max_synthetic_share:g}; {source} {wanted}"
    elif asked is not None and asked < n_real:
        note = f"plan.counts asks {asked}, and has {n_real}: real images are never dropped"
    return ClassPlan(label=label, name=name, n_real=n_real, n_target=target, refused=refused, note=note)


def _check_names(settings: PlanConfig, classes: Sequence[str]) -> None:
    for key, names in (
        ("plan.counts", settings.counts),
        ("plan.include", settings.include or []),
        ("plan.exclude", settings.exclude),
    ):
        for name in names:
            if name not in classes:
                raise PlanError(f"{key} names {name!r}, which is no class of the dataset; {_nearest(name, classes)}")
    both = sorted(set(settings.include or []) & set(settings.exclude))
    if both:
        raise PlanError(f"{both[0]!r} is in plan.include and in plan.exclude; remove it from one of them.")
    for name in settings.counts:
        if name in settings.exclude or (settings.include is not None and name not in settings.include):
            raise PlanError(
                f"plan.counts gives a number for {name!r}, and plan.include or plan.exclude say it is not "
                "raised; remove one of the two."
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(map(repr, known[:20]))}."


def _exact(value: float) -> Fraction:
    """The decimal a person wrote, not its nearest binary fraction."""
    return Fraction(repr(value))


def _whole(number: Fraction | int, unit: int) -> int:
    """`number` rounded up to a multiple of `unit`."""
    return ceil(Fraction(number) / unit) * unit
