"""Stage: a fair trial of the samples against what anyone could do for free, and the verdict."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from synthaug.config import Config
from synthaug.digest import digest_file, digest_json
from synthaug.errors import LeakError
from synthaug.formats.atomic import write_text
from synthaug.formats.samples import read_samples
from synthaug.records import (
    AUDIT_FILE,
    IMAGES_FILE,
    INDEX_FILE,
    SEEN_FILE,
    SPLITS_FILE,
    VERDICT_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassVerdict,
    Judge,
    SampleBatch,
    SampleQuality,
    Source,
    Splits,
    Verdict,
)
from synthaug.text import printable

if TYPE_CHECKING:
    from synthaug.trial.data import Part
    from synthaug.trial.race import Course, Rules
    from synthaug.trial.verdict import Setting

logger = logging.getLogger(__name__)

# Validation images that every class needs: arms are chosen by them.
MIN_VALIDATION = 5
_MOST_PROBLEMS = 20
_LEAST_STEPS, _MOST_STEPS = 200, 800
# A larger set needs more steps; the check on training has the last word.
_PASSES = 2
_MOST_QUALITY = 5000


def check_evaluation(config: Config, source: Source | None = None) -> None:
    """Refuse a classifier or backbone of the user's that cannot be used: before any work, and again before training.

    Args:
        source: Without it they are imported only; their factories are called when the form of the images is known.

    Raises:
        ConfigError: One cannot be imported or is of no use.
    """
    settings = config.evaluate
    form = None if source is None else (source.pixels.channels, source.pixels.size, len(source.classes))
    for entry, setting in ((settings.classifier, "classifier"), (settings.backbone, "backbone")):
        if entry is None:
            continue
        if form is None:
            from synthaug.trial.entry import load_entry

            load_entry(entry, f"evaluate.{setting}")
        elif setting == "classifier":
            from synthaug.trial.learners import own_classifier

            own_classifier(entry, form)
        else:
            from synthaug.trial.backbone import own_backbone

            own_backbone(entry, form)


def code_identity(config: Config) -> list[str | None]:
    """What the verdict depends on beside the settings: the user's own files."""
    from synthaug.trial.entry import entry_identity

    return [entry_identity(config.evaluate.classifier), entry_identity(config.evaluate.backbone)]


def evaluate(
    config: Config,
    source: Source,
    splits: Splits,
    plan: BalancePlan,
    checkpoints: Sequence[Checkpoint],
    judge: Judge,
    batches: Sequence[SampleBatch],
    report: AuditReport | None,
    directory: Path,
) -> Verdict:
    """Try the samples and write verdict.json and its pictures.

    Arms are trained with equal steps, network, seeds and augmentation, raced on validation (`synthaug.trial.race`),
    and the best of each side and two controls are trained again with other seeds and measured on test.

    Args:
        checkpoints: All that made the samples, oldest first; empty for another tool's.
        report: The audit, of which the accepted samples up to the plan are tried; None: all samples are.

    Raises:
        LeakError: An image, group or copy is on both sides of a line.
        TrainingError: An arm's loss is not a number, or the user's own classifier failed.
        ConfigError: The user's own classifier or backbone is of no use.
    """
    from synthaug.report.verdict_pictures import write_verdict_pictures

    table = _usable(splits, source)
    _refuse_leaks(table, checkpoints, splits, judge, config)
    parts = _parts(source, table, batches, report, plan)
    _refuse_held_out_samples(parts, source, splits)
    verdict = _try(config, source, splits, plan, judge, table, parts, batches, directory, report is not None)
    verdict = verdict.model_copy(
        update={"digest": digest_json(verdict.model_dump(mode="json", exclude={"digest", "minutes_needed"}))}
    )
    write_text(
        directory / VERDICT_FILE,
        json.dumps(verdict.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    write_verdict_pictures(verdict, directory)
    logger.info("verdict: %s", verdict.sentence)
    return verdict


def _usable(splits: Splits, source: Source) -> pd.DataFrame:
    """Usable images of all splits with what the trial asks of them."""
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    index = pd.read_parquet(source.directory / INDEX_FILE)
    wanted = [name for name in ("content_hash", "origin", "subgroup") if name in index]
    table = table[table["held_back"].isna()].merge(index[["row", *wanted]], on="row", validate="one_to_one")
    return table.sort_values("row", ignore_index=True)


def _refuse_leaks(
    table: pd.DataFrame, checkpoints: Sequence[Checkpoint], splits: Splits, judge: Judge, config: Config
) -> None:
    from synthaug.quality.reference import load_reference, refuse_leaks

    for column, what in (
        ("image_id", "images"),
        ("content_hash", "images (equal pixels)"),
        ("group_key", "groups"),
    ):
        places = table.groupby(column)["split"].agg(lambda split: tuple(sorted(set(split))))
        if len(found := places[places.map(len) > 1]):
            some = "; ".join(f"{key} in {' and '.join(where)}" for key, where in list(found.items())[:3])
            raise LeakError(
                f"{len(found)} {what} in more than one split, so a test would flatter what learned them: {some}. "
                "Make the splits again (another split.ledger, or a group column), and trust no figure from these."
            )
    reference = load_reference(judge.directory, config.train.threads)
    if not checkpoints:
        refuse_leaks(splits, None, reference)
    for checkpoint in checkpoints:
        seen_file = checkpoint.directory / SEEN_FILE
        refuse_leaks(splits, pd.read_parquet(seen_file), reference, str(seen_file))


def _refuse_held_out_samples(parts: Sequence[Part], source: Source, splits: Splits) -> None:
    """Refuse samples that are images of the splits they would be judged by, mirrored or not."""
    from synthaug.quality.copies import picture_hash
    from synthaug.quality.reference import held_out_pictures

    held = held_out_pictures(source, splits)
    for part in parts:
        if part.use != "synthetic":
            continue
        images: np.ndarray = np.load(part.path, mmap_mode="r")
        found = [(int(row), held[key]) for row in part.rows if (key := picture_hash(images[row])) in held]
        if found:
            row, split = found[0]
            raise LeakError(
                f"{len(found)} samples are images of the {split} split (the first: row {row} of {part.path}). A trial "
                "would flatter them: leave out what is not synthetic."
            )


def _parts(
    source: Source,
    table: pd.DataFrame,
    batches: Sequence[SampleBatch],
    report: AuditReport | None,
    plan: BalancePlan,
) -> list[Part]:
    from synthaug.trial.data import Part

    images = source.directory / IMAGES_FILE
    parts = []
    for split in ("train", "validation", "test"):
        mine = table[table["split"] == split]
        parts.append(Part(split, images, mine["row"].to_numpy(np.int64), mine["label"].to_numpy(np.int64)))
    if report is None:
        for batch in batches:
            drawn = read_samples(batch).sort_values(["label", "class_index"])
            parts.append(_synthetic(batch, drawn))
        return parts
    wanted = {item.label: item.n_synthetic for item in plan.classes}
    withheld = {item.label for item in report.classes if item.withheld is not None}
    audit = pd.read_parquet(report.directory / AUDIT_FILE)
    audit = audit[audit["accepted"] & (audit["rank"] < audit["label"].map(wanted)) & ~audit["label"].isin(withheld)]
    for number, part in audit.sort_values(["label", "rank"]).groupby("batch"):
        parts.append(_synthetic(batches[int(number)], part))
    return parts


def _synthetic(batch: SampleBatch, drawn: pd.DataFrame) -> Part:
    from synthaug.trial.data import Part

    path = batch.directory / IMAGES_FILE
    return Part("synthetic", path, drawn["row"].to_numpy(np.int64), drawn["label"].to_numpy(np.int64))


def _try(
    config: Config,
    source: Source,
    splits: Splits,
    plan: BalancePlan,
    judge: Judge,
    table: pd.DataFrame,
    parts: list[Part],
    batches: Sequence[SampleBatch],
    directory: Path,
    planned_only: bool,
) -> Verdict:
    from synthaug.trial.race import OutOfTime, final, race
    from synthaug.trial.verdict import no_evidence, reach_verdict

    settings = config.evaluate
    setting = _setting(config, source, plan, table, parts, directory)
    if (reason := _why_no_trial(setting, table, settings.min_test)) is not None:
        return no_evidence(setting, reason)
    rules = _rules(config, source, table, parts, batches, setting, directory)
    problem, minutes = None, None
    try:
        course = race(rules, _doses(setting, settings.doses, planned_only))
    except OutOfTime as error:
        minutes = round(error.minutes, 2)
        problem = (
            f"budget: evaluate.minutes is {settings.minutes:g}, and the least that a verdict rests on takes about "
            f"{error.minutes:.1f} minutes here"
        )
    quality = _quality(config, source, judge, parts, setting)
    if problem is not None:
        return no_evidence(setting, problem, quality).model_copy(update={"minutes_needed": minutes})
    looks = _look(config, splits, table, batches, rules, course)
    finals = final(rules, course)
    test = table[table["split"] == "test"]
    verdict = reach_verdict(test, setting, course, finals, quality, looks, rules, config.seed)
    return verdict.model_copy(update={"notes": (*verdict.notes, *_about_draws(config, source, parts))})


def _about_draws(config: Config, source: Source, parts: Sequence[Part]) -> list[str]:
    """What an estimator was trained on, since it knows no steps."""
    from synthaug.trial.learners import estimator_draws, is_network, own_classifier

    pixels, entry = source.pixels, config.evaluate.classifier
    form = (pixels.channels, pixels.size, len(source.classes))
    if entry is None or is_network(own_classifier(entry, form)):
        return []
    draws = estimator_draws(len(parts[0].rows), pixels.size, pixels.channels)
    return [
        f"every fit of the estimator was given {draws} drawn and augmented images; evaluate.steps says nothing to it"
    ]


def _setting(
    config: Config, source: Source, plan: BalancePlan, table: pd.DataFrame, parts: Sequence[Part], directory: Path
) -> Setting:
    from synthaug.trial.verdict import Setting

    def counts(use: str) -> dict[int, int]:
        labels = [part.labels for part in parts if part.use == use]
        found = np.bincount(np.concatenate(labels) if labels else [], minlength=len(source.classes))
        return {label: int(number) for label, number in enumerate(found) if number}

    offered, n_real = counts("synthetic"), counts("train")
    scarce = {item.label for item in plan.classes if item.n_synthetic > 0}
    rare = tuple(sorted(scarce & set(offered))) or tuple(sorted(offered))
    n_test = counts("test")
    settings = config.evaluate
    base = Verdict(
        directory=directory,
        digest="",
        outcome="no evidence",
        sentence="",
        reasons=(),
        metric=settings.metric,
        class_names=source.classes,
        classes=tuple(
            ClassVerdict(
                label=label,
                name=source.classes[label],
                n_real=n_real.get(label, 0),
                n_offered=number,
                tried=0,
                dose=0,
                n_test=n_test.get(label, 0),
            )
            for label, number in offered.items()
        ),
        classifier=Path(settings.classifier).name if settings.classifier else "small residual network",
        n_validation=sum(counts("validation").values()),
        n_test=sum(n_test.values()),
    )
    return Setting(source.classes, n_real, n_test, offered, rare, settings.metric, base)


def _why_no_trial(setting: Setting, table: pd.DataFrame, min_test: int) -> str | None:
    if not setting.offered:
        return "there is no sample to try: none was accepted, or every class was withheld"
    if unknown := [label for label in setting.offered if label not in setting.n_real]:
        return (
            f"class '{printable(setting.classes[unknown[0]])}' has no real training image, so there is nothing to "
            "compare its samples with"
        )
    problems = []
    # Of one patient there is one chance, however many images: on test groups count, since intervals are over them.
    for split, least, column in (("test", min_test, "group_key"), ("validation", MIN_VALIDATION, "image_id")):
        mine = table[table["split"] == split]
        found = mine.groupby("label")[column].nunique()
        images = mine["label"].value_counts()
        for label in setting.n_real:
            number = int(found.get(label, 0))
            if number >= least:
                continue
            named = f"class '{printable(setting.classes[label])}' has"
            what = "image" if number == int(images.get(label, 0)) else "group (patient)"
            plural = "" if number == 1 else "s"
            problems.append(f"{named} {number} {split} {what}{plural} and needs {least}, {least - number} more")
    if not problems:
        return None
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    return "too few images to judge by: " + "; ".join(problems[:_MOST_PROBLEMS]) + more


def _doses(setting: Setting, multiples: Sequence[float], planned_only: bool) -> dict[str, dict[int, int]]:
    """Name of a dose to label to number of images, in rising order; what equals another is left out."""
    doses = {
        f"{multiple:g}x": {
            label: min(number, max(1, math.ceil(multiple * setting.n_real[label])))
            for label, number in setting.offered.items()
        }
        for multiple in sorted(multiples)
    }
    different: dict[str, dict[int, int]] = {}
    # All there is comes first: a multiple that there were too few images for is no multiple.
    whole = {"plan" if planned_only else "all": dict(setting.offered)}
    for name, dose in {**whole, **doses}.items():
        if dose not in different.values():
            different[name] = dose
    return dict(sorted(different.items(), key=lambda item: sum(item[1].values())))


def _rules(
    config: Config,
    source: Source,
    table: pd.DataFrame,
    parts: list[Part],
    batches: Sequence[SampleBatch],
    setting: Setting,
    directory: Path,
) -> Rules:
    """Lay out the images of the trial and what all of its arms have in common."""
    from synthaug.generators import resolve_device
    from synthaug.trial.data import SCRAMBLED_FILE, SMOTE_FILE, TABLE_FILE, write_scrambled, write_smote, write_trial
    from synthaug.trial.entry import entry_identity
    from synthaug.trial.learners import Fit, applicable, is_network, own_classifier
    from synthaug.trial.race import MOST_DOUBLINGS, Rules
    from synthaug.trial.recipes import Recipe

    settings, pixels = config.evaluate, source.pixels
    form = (pixels.channels, pixels.size, len(source.classes))
    train = parts[0]
    scrambled = write_scrambled(
        train, setting.offered, directory / SCRAMBLED_FILE, pixels.low, pixels.high, config.seed
    )
    made = [scrambled]
    # As many as there are samples; of a single image SMOTE can make none.
    smote = {label: number for label, number in setting.offered.items() if setting.n_real[label] > 1}
    if smote:
        made.append(write_smote(train, smote, directory / SMOTE_FILE, config.seed))
    write_trial(
        directory,
        [*parts, *made],
        low=pixels.low,
        high=pixels.high,
        size=pixels.size,
        channels=pixels.channels,
        n_classes=len(source.classes),
        scarce=setting.rare,
    )
    learner = None if settings.classifier is None else own_classifier(settings.classifier, form)
    estimator = learner is not None and not is_network(learner)
    passes = round(_PASSES * len(train.rows) / settings.batch_size)
    steps = 1 if estimator else settings.steps or int(np.clip(passes, _LEAST_STEPS, _MOST_STEPS))
    device = "cpu" if estimator else str(resolve_device(config.train.device))
    validation = table[table["split"] == "validation"]
    return Rules(
        directory=directory,
        metric=setting.metric,
        labels=parts[1].labels,
        clusters=pd.factorize(validation["group_key"])[0],
        fit=Fit(
            recipe=Recipe("", "", "real"),
            seed=0,
            steps=steps,
            batch_size=settings.batch_size,
            trial=digest_json([source.digest, digest_file(directory / TABLE_FILE), *(item.digest for item in batches)]),
            classifier=settings.classifier,
            classifier_identity=entry_identity(settings.classifier),
            device=device,
        ),
        # One process drives a GPU.
        workers=1 if device != "cpu" else settings.workers or config.train.threads,
        seeds=settings.seeds,
        seconds=60 * settings.minutes,
        possible=lambda recipe: applicable(recipe, learner),
        smote=smote,
        # An estimator holds all it is trained on in memory: more of it than the check asks for is no way out.
        doublings=0 if estimator else MOST_DOUBLINGS,
    )


def _look(
    config: Config,
    splits: Splits,
    table: pd.DataFrame,
    batches: Sequence[SampleBatch],
    rules: Rules,
    course: Course,
) -> tuple[int, str]:
    """Note the look at the test split before it is taken; a trial that is repeated as it was is no further look."""
    from synthaug.formats.looks import looks_path, looks_places, register_look

    test_digest = digest_json(sorted(table.loc[table["split"] == "test", "image_id"]))
    images = pd.read_parquet(rules.directory / "images.parquet")
    trial = digest_json(
        [
            test_digest,
            [batch.digest for batch in batches],
            [lane.recipe.plain() for lane in (course.real, course.synthetic)],
            [lane.scores for lane in course.lanes],
            images["use"].value_counts().sort_index().to_dict(),
            course.seeds,
            course.steps,
        ]
    )
    place = (splits.ledger, config.output_path)
    looks = register_look(looks_path(*place), test_digest, trial, config.name, earlier=looks_places(*place))
    return looks, test_digest


def _quality(
    config: Config, source: Source, judge: Judge, parts: Sequence[Part], setting: Setting
) -> dict[int, SampleQuality]:
    """Per class, samples against real training images, in features of the judge's classifier or the user's backbone."""
    from synthaug.quality.fidelity import sample_quality

    look = _look_by(config, source, judge)

    def features(use: str, label: int) -> np.ndarray:
        found = [
            look(np.load(part.path, mmap_mode="r"), part.rows[part.labels == label][:_MOST_QUALITY])
            for part in parts
            if part.use == use and (part.labels == label).any()
        ]
        return np.concatenate(found)[:_MOST_QUALITY]

    return {
        label: sample_quality(features("train", label), features("synthetic", label), seed=config.seed)
        for label in setting.offered
    }


def _look_by(config: Config, source: Source, judge: Judge) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    from synthaug.trial.backbone import features_by

    own = features_by(config.evaluate.backbone, source, config.train.threads)
    if own is not None:
        return own
    from synthaug.quality.reference import load_reference

    classifier = load_reference(judge.directory, config.train.threads).classifier
    return lambda images, rows: classifier.predict(images, rows).depths
