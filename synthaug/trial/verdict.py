"""From the finals of a trial to its verdict: the rule, the figures and the words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import special

from synthaug.records import (
    ArmResult,
    ClassVerdict,
    DosePoint,
    Figures,
    Interval,
    RealPoint,
    SampleQuality,
    SubgroupGain,
    Verdict,
)
from synthaug.report.verdict_words import AGAINST, metric_words, points
from synthaug.text import printable
from synthaug.trial import statistics
from synthaug.trial.learners import Scores
from synthaug.trial.race import CHECK_SEEDS, Course, Rules
from synthaug.trial.recipes import Recipe, control

# Under this slope of the learning curve (metric per doubling), real images tell nothing that a synthetic one is worth.
_LEAST_SLOPE = 0.003
# Fewer test images of a class than this are mentioned.
_FEW_TEST = 50


@dataclass(frozen=True)
class Setting:
    """What the verdict speaks of, whatever comes out."""

    classes: tuple[str, ...]
    n_real: dict[int, int]
    n_test: dict[int, int]
    offered: dict[int, int]
    rare: tuple[int, ...]
    metric: Literal["balanced_accuracy", "macro_f1"]
    base: Verdict  # with what is known before the trial


def no_evidence(setting: Setting, reason: str, quality: Mapping[int, SampleQuality] | None = None) -> Verdict:
    """The verdict where there was no trial to the end."""
    classes = tuple(
        item.model_copy(update={"quality": (quality or {}).get(item.label)}) for item in setting.base.classes
    )
    return setting.base.model_copy(
        update={"sentence": f"no evidence: {reason}.", "reasons": (reason,), "classes": classes}
    )


def reach_verdict(
    test: pd.DataFrame,
    setting: Setting,
    course: Course,
    finals: dict[str, list[Scores]],
    quality: dict[int, SampleQuality],
    looks: tuple[int, str],
    rules: Rules,
    seed: int,
) -> Verdict:
    """Compare the finalists on the test split.

    Args:
        test: label, group_key and, where there is one, subgroup of the test images, in the order of the scores.
        finals: 'real', 'synthetic', 'duplicates' and 'scrambled' to the scores of each classifier seed.
        quality: Label to the quality of its samples.
        looks: Number of the look at the test split, and the digest of the split.
        seed: Of the resampling.
    """
    labels, clusters = test["label"].to_numpy(np.int64), pd.factorize(test["group_key"])[0]
    stacked = {name: np.stack([scores.test for scores in found]) for name, found in finals.items()}
    differences: dict[str, dict[str, Interval]] = {}
    for name in ("real", "duplicates", "scrambled"):
        found = statistics.paired_differences(
            stacked["synthetic"],
            stacked[name],
            labels,
            clusters,
            rare=setting.rare,
            seed=seed,
            recall_labels=list(setting.offered) if name == "real" else [],
            auprc_labels=list(setting.offered) if name == "real" else [],
        )
        differences[name] = found
    outcome, missing, reasons = _outcome(differences, setting, course)
    own = differences["real"]
    classes = tuple(
        _class_verdict(item, setting, course, own, quality.get(item.label), outcome) for item in setting.base.classes
    )
    recipes = {
        "real": course.real.recipe,
        "synthetic": course.synthetic.recipe,
        "duplicates": control(course.synthetic.recipe, "duplicates"),
        "scrambled": control(course.synthetic.recipe, "scrambled"),
    }
    figures = tuple(
        _figures(recipes[name].key, recipes[name].words, found, rules.labels, labels, setting)
        for name, found in finals.items()
    )
    subgroups, notes = _subgroups(test, stacked, labels, clusters, setting, seed)
    worth, advice = _worth(outcome, course, setting)
    kept = {name: {key: value for key, value in found.items() if "/" not in key} for name, found in differences.items()}
    return setting.base.model_copy(
        update={
            "outcome": outcome,
            "sentence": _sentence(outcome, missing, differences, setting, course, classes),
            "reasons": tuple(reasons),
            "best_real": course.real.recipe.key,
            "recipe": course.synthetic.recipe.key,
            "recipe_settings": course.synthetic.recipe.plain(),
            "arms": tuple(
                ArmResult(
                    key=lane.recipe.key,
                    side="real" if lane.recipe.side == "real" else "synthetic",
                    words=lane.recipe.words,
                    scores=tuple(lane.scores),
                    dropped=lane.dropped,
                )
                for lane in course.lanes
            ),
            "finalists": figures,
            "differences": kept,
            "classes": classes,
            "subgroups": subgroups,
            "dose_curve": _dose_curve(course),
            "learning_curve": tuple(
                RealPoint(
                    share=share,
                    n_real=sum(max(1, round(share * setting.n_real[label])) for label in setting.rare),
                    scores=scores,
                )
                for share, scores in course.curve
            ),
            "worth": worth,
            "advice": tuple(advice),
            "not_tried": dict(course.left_out),
            "seeds": course.seeds,
            "steps": course.steps,
            "trained_out": _with_error(*course.trained_out),
            "looks": looks[0],
            "test_digest": looks[1],
            "notes": (*notes, *_caveats(setting)),
        }
    )


def _outcome(
    differences: dict[str, dict[str, Interval]], setting: Setting, course: Course
) -> tuple[Literal["helps", "no evidence", "harms"], list[str], list[str]]:
    """The rule of the verdict, the one place where it stands: the outcome, what is missing in short, and why at length.

    It helps where the interval of the difference lies above zero against the best real-only arm and both controls,
    AUPRC of the scarce classes is not lower, and the real-only arm was trained out. It harms where the interval
    against the best real-only arm lies below zero.
    """
    name = metric_words(setting.metric)
    found = {against: differences[against][setting.metric] for against in AGAINST}
    why = [f"{name}: {points(interval)} points against {AGAINST[against]}" for against, interval in found.items()]
    if found["real"].high < 0:
        return "harms", [], why
    not_above = [AGAINST[against] for against in found if found[against].low <= 0]
    missing = [f"an interval above zero against {' and '.join(not_above)}"] if not_above else []
    ranking = differences["real"].get("rare_auprc")
    if ranking is not None and ranking.estimate < 0:
        missing.append("an AUPRC of the scarce classes that is not lower")
        why.append(
            f"AUPRC of the scarce classes: {points(ranking)} points; the threshold may have moved, not the ranking"
        )
    if not course.is_trained_out:
        gain, error = course.trained_out
        missing.append("a best real-only arm that is trained out")
        why.append(
            f"{AGAINST['real']} still gains {100 * gain:.1f} points (standard error {100 * error:.1f}) from four "
            "times the steps; a larger evaluate.minutes or evaluate.steps would settle it"
        )
    return ("no evidence" if missing else "helps"), missing, why


def _sentence(
    outcome: str,
    missing: Sequence[str],
    differences: dict[str, dict[str, Interval]],
    setting: Setting,
    course: Course,
    classes: Sequence[ClassVerdict],
) -> str:
    metric, real = metric_words(setting.metric), differences["real"][setting.metric]
    against = f"{points(real)} points of {metric} on test against the best real-only arm ({course.real.recipe.key})"
    if outcome == "helps":
        given = [f"{item.tried} of '{printable(item.name)}'" for item in classes if item.tried]
        doses, more = ", ".join(given[:5]), ", …" if len(given) > 5 else ""
        return (
            f"helps: with synthetic images ({doses}{more}) by '{course.synthetic.recipe.key}': {against}; they "
            "beat duplicates of real images and content-free ones as well."
        )
    if outcome == "harms":
        return f"harms: {against}. Use the real images alone."
    return f"no evidence: {against}. Missing: {'; '.join(missing)}."


def _class_verdict(
    item: ClassVerdict,
    setting: Setting,
    course: Course,
    own: dict[str, Interval],
    quality: SampleQuality | None,
    outcome: str,
) -> ClassVerdict:
    tried = dict(course.synthetic.recipe.dose).get(item.label, 0)
    recall, auprc = own.get(f"recall/{item.label}"), own.get(f"auprc/{item.label}")
    dose, advice = (tried if outcome == "helps" else 0), ""
    if dose and recall is not None and recall.high < 0:
        advice = "the recipe helps over all, and this class lost recall by it; without its samples it was not tried"
    elif not dose:
        more = max(20, item.n_real)
        advice = f"{item.n_real} real images; {more} more real images are likely worth more than synthetic ones"
    return item.model_copy(
        update={
            "tried": tried,
            "dose": dose,
            "recall_gain": recall,
            "auprc_gain": auprc,
            "quality": quality,
            "advice": advice,
        }
    )


def _figures(
    key: str,
    words: str,
    found: Sequence[Scores],
    validation_labels: np.ndarray,
    labels: np.ndarray,
    setting: Setting,
) -> Figures:
    present = [int(label) for label in np.unique(labels)]
    predicted = [scores.test.argmax(1) for scores in found]
    auprc = {
        setting.classes[k]: _mean(statistics.auprc(labels == k, scores.test[:, k]) for scores in found) for k in present
    }
    confusions = np.mean([statistics.confusion(labels, p, len(setting.classes)) for p in predicted], axis=0)
    accuracy = [statistics.balanced_accuracy(labels, p) for p in predicted]
    f1 = [statistics.macro_f1(labels, p) for p in predicted]
    errors = [
        statistics.calibration_error(
            labels,
            statistics.apply_temperature(scores.test, statistics.fit_temperature(validation_labels, scores.validation)),
        )
        for scores in found
    ]
    main = accuracy if setting.metric == "balanced_accuracy" else f1
    return Figures(
        key=key,
        words=words,
        balanced_accuracy=_mean(accuracy),
        macro_f1=_mean(f1),
        rare_auprc=_mean(auprc[setting.classes[k]] for k in setting.rare if k in present),
        calibration_error=_mean(errors),
        recall={setting.classes[k]: float(confusions[k, k]) for k in present},
        auprc=auprc,
        spread=float(np.std(main, ddof=1)),
        confusion=[[round(float(value), 6) for value in row] for row in confusions],
    )


def _with_error(estimate: float, error: float) -> Interval:
    """A mean over the seeds of the check as a 95 % interval (Student's t)."""
    half = float(special.stdtrit(len(CHECK_SEEDS) - 1, 0.975)) * error
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _subgroups(
    test: pd.DataFrame,
    stacked: dict[str, np.ndarray],
    labels: np.ndarray,
    clusters: np.ndarray,
    setting: Setting,
    seed: int,
) -> tuple[tuple[SubgroupGain, ...], list[str]]:
    if "subgroup" not in test or test["subgroup"].isna().all():
        return (), []
    groups = test["subgroup"].astype(object).where(test["subgroup"].notna(), None).to_numpy()
    found, left_out = statistics.group_differences(
        stacked["synthetic"], stacked["real"], labels, clusters, groups, setting.metric, seed=seed
    )
    gains = tuple(
        SubgroupGain(name=name, n_test=item.n, before=item.before, after=item.after, gain=item.gain)
        for name, item in found.items()
    )
    return gains, [f"subgroup '{printable(name)}': {why}" for name, why in left_out.items()]


def _dose_curve(course: Course) -> tuple[DosePoint, ...]:
    """All doses that were tried and nothing beside them, by what they were tried in: the best real-only arm, the loss
    that serves the real images best, and none of both. The dose 0 is a real-only arm."""
    simple = {Recipe("", "", "real", loss).way for loss in (course.best_loss, "plain")}
    found = []
    for lane in course.lanes:
        recipe = lane.recipe
        if not lane.scores or recipe.added not in {"none", "synthetic"}:
            continue
        if recipe.way in simple:
            tried_in: str = recipe.loss
        elif recipe.way == course.real.recipe.way:
            tried_in = course.real.recipe.key
        else:
            continue
        dose = recipe.key.removeprefix("synthetic ").split(" + ")[0] if recipe.added == "synthetic" else "0"
        found.append(DosePoint(loss=tried_in, dose=dose, n_synthetic=recipe.n_added, scores=tuple(lane.scores)))
    return tuple(sorted(found, key=lambda point: (point.loss, point.n_synthetic, point.dose)))


def _worth(outcome: str, course: Course, setting: Setting) -> tuple[str | None, list[str]]:
    """What synthetic images did in terms of real ones, by the learning curve on validation."""
    names = ", ".join(f"'{printable(setting.classes[label])}'" for label in setting.rare[:5])
    n_real = sum(setting.n_real[label] for label in setting.rare)
    counts = [max(1.0, share * n_real) for share, _ in course.curve]
    if len(set(counts)) < 2:
        return None, []
    means = [float(np.mean(scores)) for _, scores in course.curve]
    slope = float(np.polyfit(np.log2(counts), means, 1)[0])
    shape = f"from {counts[0]:.0f} to {counts[-1]:.0f} real images of {names}, validation rises by {100 * slope:+.1f} "
    shape += "points a doubling"
    if slope < _LEAST_SLOPE:
        return f"unavailable: {shape}, too little to measure a synthetic image by", []
    advice = [f"{n_real} more real images of {names} (a doubling) are likely worth about {100 * slope:+.1f} points"]
    gain = course.synthetic.mean - course.real.mean
    # Both means are those of winners on validation: without a gain on test they say nothing.
    if outcome != "helps" or gain <= 0:
        return f"nothing was shown: {shape}, and the synthetic images gave no gain that holds on test", advice
    equal = n_real * (2 ** min(gain / slope, 10) - 1)
    n_synthetic = max(1, course.synthetic.recipe.n_added)
    return (
        f"{shape}; {n_synthetic} synthetic images did as much as about {equal:.0f} more real ones would, so one is "
        f"worth about {equal / n_synthetic:.2g} of a real one (extrapolated, three seeds)",
        advice,
    )


def _caveats(setting: Setting) -> list[str]:
    notes = [
        "intervals are 95 %, over test images (or their groups) and classifier seeds, for this one generator and this "
        "one draw of the scarce classes; intervals of single classes are not corrected for their number"
    ]
    small = [
        f"'{printable(setting.classes[k])}' ({setting.n_test.get(k, 0)})"
        for k in setting.rare
        if setting.n_test.get(k, 0) < _FEW_TEST
    ]
    if small:
        notes.append(
            f"few test images of {', '.join(small[:10])}: intervals may be too narrow, and only a large gain could show"
        )
    return notes
