"""What the stages hand to each other: small frozen records of digests, counts and file names. No tensors.

Every stage writes into a directory of its own and returns one of these. `directory` is where its files
lie; it is filled in when a record is made or loaded and is never written down, so that a run folder can
be moved. `digest` speaks of the content: equal digests mean equal results.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from synthaug.digest import digest_json

SPLITS = ("train", "validation", "test")

# Files of the stages, named here once. Columns are listed with the record that owns the file.
IMAGES_FILE = "images.npy"
INDEX_FILE = "index.parquet"
SET_ASIDE_FILE = "set_aside.csv"
SPLITS_FILE = "splits.parquet"
PIPELINE_DIR = "pipeline"
SEEN_FILE = "seen.parquet"
TRAINING_LOG_FILE = "training.csv"
SAMPLES_FILE = "samples.parquet"
AUDIT_FILE = "audit.parquet"
VERDICT_FILE = "verdict.json"
MEMBERSHIP_FILE = "membership.json"
MEMBERSHIP_SCORES_FILE = "membership.parquet"
# Beside them, in every stage's directory: its record, and what it was made from. Written last.
DONE_FILE = "done.json"
# What lets an interrupted stage go on (states of a training, the count of samples drawn); gone once it is done.
WORK_DIR = "work"


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageRecord(Record):
    """What every stage's record has."""

    directory: Path = Field(exclude=True, description="Where the files of this stage lie; never written down.")
    digest: str = Field(description="SHA-256 over the content made by the stage.")

    @classmethod
    def from_plain(cls, values: dict[str, Any], directory: Path) -> Any:
        return cls.model_validate({**values, "directory": directory})


class PixelSpec(Record):
    """The record of the pixels; it travels with everything. Values outside `low`..`high` do not occur."""

    channels: int
    dtype: Literal["uint8", "uint16", "float32"]
    colour: Literal["grey", "rgb", "rgba", "channels"]
    low: float = Field(description="Value that the network sees as -1: 0 for whole-number images.")
    high: float = Field(description="Value that the network sees as +1: 255 or 65535 for whole-number images.")
    size: int = Field(description="Side of the square all images were brought to.")
    fit: Literal["stretch", "crop", "pad", "none"] = Field(description="'none': every image had the size already.")
    interpolation: str = Field(description="Name of the resampling, 'none' where there was none.")
    smallest: tuple[int, int] = Field(description="Height and width of the smallest source image.")
    largest: tuple[int, int] = Field(description="Height and width of the largest source image.")
    conversions: dict[str, int] = Field(
        default_factory=dict, description="What was converted, in words, with the number of images."
    )

    def to_unit(self, images: np.ndarray) -> np.ndarray:
        """Native values (any shape) to float32 in [-1, 1]."""
        scaled = (images.astype(np.float32) - np.float32(self.low)) / np.float32(self.high - self.low)
        return scaled * np.float32(2) - np.float32(1)

    def from_unit(self, images: np.ndarray) -> np.ndarray:
        """Float values in [-1, 1] (others are clipped) to native values, rounded to nearest for whole numbers."""
        clipped = np.clip((np.asarray(images, dtype=np.float64) + 1) / 2, 0, 1)
        values = clipped * (self.high - self.low) + self.low
        return values.astype(np.float32) if self.dtype == "float32" else np.rint(values).astype(self.dtype)


class Source(StageRecord):
    """The real images, decoded once.

    images.npy: [n, size, size, channels], the dtype of `pixels`; memory-mappable.
    index.parquet: row (int64, 0..n-1), image_id (str, unique, from the content of the picture, so it is the
        same when the dataset grows), label (int64, index in `classes`), group (str or null), subgroup (str or
        null), given_split (train/validation/test or null), content_hash (str, of the decoded pixels before
        resizing), origin (str, where the image was found), is_synthetic (bool).
    set_aside.csv: origin, reason, detail.
    """

    name: str = Field(description="Words for where the data came from.")
    fingerprint: str = Field(description="Cheap fingerprint of the source, taken before reading.")
    classes: tuple[str, ...]
    pixels: PixelSpec
    n_images: int
    n_set_aside: int
    set_aside_reasons: dict[str, int]
    n_duplicates: int = Field(description="Images beyond the first of each group of exactly equal ones.")
    n_synthetic: int = Field(description="Rows marked is_synthetic: never trained on by a generator, never test.")
    licence: str | None = None
    citation: str | None = None


class Splits(StageRecord):
    """Who is in which split.

    splits.parquet: row, image_id, label (int64), split (train/validation/test), group_key (str, pseudonymous),
        held_back (null, or why the row is used for nothing: 'cut', 'excluded', 'synthetic', 'duplicate').
    """

    method: str = Field(description="'given', 'by group', 'by near-duplicate cluster', or a mixture, in words.")
    counts: dict[str, list[int]] = Field(description="Split to number of usable images per class.")
    held_back: dict[str, int] = Field(description="Reason to number of images.")
    n_groups: int
    ledger: str | None = None


class ClassPlan(Record):
    label: int
    name: str
    n_real: int = Field(description="Usable training images.")
    n_target: int
    refused: str | None = Field(None, description="Why the class is not raised although it is scarce.")
    note: str | None = Field(None, description="What else there is to say: a cap that took hold, a class left out.")

    @property
    def n_synthetic(self) -> int:
        return max(0, self.n_target - self.n_real)


class BalancePlan(StageRecord):
    """How many images each class shall end with. Pure arithmetic; no file but the record."""

    classes: tuple[ClassPlan, ...]

    @property
    def scarce(self) -> list[int]:
        """Labels the plan raises."""
        return [item.label for item in self.classes if item.n_synthetic > 0]

    @property
    def notes(self) -> dict[str, list[str]]:
        """What there is to say, with the names of the classes it is said of: a hundred may share a note."""
        said: dict[str, list[str]] = {}
        for item in self.classes:
            if item.note:
                said.setdefault(item.note, []).append(item.name)
        return said


class PrivacyGuarantee(Record):
    """Differential privacy of a checkpoint: of the training images alone, each counted as one."""

    epsilon: float = Field(description="What the accountant says was spent; lower is stricter.")
    epsilon_asked: float
    delta: float
    accountant: str
    noise_multiplier: float = Field(description="Standard deviation of the noise, in norms that gradients are cut to.")
    max_grad_norm: float
    sample_rate: float = Field(description="Chance of every training image to be drawn in a step.")
    steps: int
    n_images: int


class Checkpoint(StageRecord):
    """A trained generator.

    pipeline/: what `Generator.save` wrote. seen.parquet: image_id (str) of every image trained on, and
    use ('train' for gradients, 'validation' for stopping). training.csv: the loss over time.
    """

    generator: str
    parameters: int
    images_budget: int = Field(description="Training images asked for, after minutes were turned into images.")
    images_seen: int
    budget_from: str = Field(description="'images', or how minutes were turned into images.")
    kept: Literal["base", "fine-tuned"]
    heldout_loss_base: dict[str, float] = Field(description="Class to held-out denoising loss after the base.")
    heldout_loss_tuned: dict[str, float] = Field(description="The same after fine-tuning.")
    scarce: list[str]
    stopped: str = Field(description="Why training ended.")
    seconds: float
    images_per_second: float
    device: str
    processes: int = Field(1, description="That trained together.")
    privacy: PrivacyGuarantee | None = Field(None, description="None: trained without differential privacy.")
    started_from: str | None = Field(
        None, description="Digest of the checkpoint that a warm training started from; None: from scratch, or a base."
    )


class SampleRequest(Record):
    """What to draw: label to (first index, number). Both are multiples of the micro-batch."""

    ranges: dict[int, tuple[int, int]]


class SampleBatch(StageRecord):
    """Images drawn from the generator, not yet judged.

    images.npy: [n, size, size, channels] native. samples.parquet: row, sample_id (str), label (int64),
    class_index (int64, position in the class's endless sequence), seed (int64), micro_batch (int64, index of
    the canonical micro-batch within the class), position (int64, within the micro-batch). Of another tool's images,
    taken in by `adopt`, seed, micro_batch and position are -1, checkpoint_digest is empty, solver and device 'none'.

    A later job may keep a part of a batch (`only`): the files stay what they are, and `labels` says which samples count
    and what their label is now. So the table is read by `synthaug.formats.samples.read_samples` and in no other way.
    """

    checkpoint_digest: str
    n_samples: int
    counts: dict[int, int]
    solver: str
    steps: int
    guidance: float
    micro_batch: int
    threads: int
    device: str
    seconds: float
    environment: dict[str, str] = Field(
        description="What computed them: versions of synthaug, torch, diffusers and numpy, and cpu_capability. Batches "
        "of before synthaug was one of them lack it."
    )
    job_seed: int | None = Field(None, description="Seed of the job that drew them; None: that of this job.")
    labels: dict[int, int] | None = Field(
        None,
        description="Label in samples.parquet, which is the generator's, to label of this job; samples of labels not "
        "named are not part of the batch. None: all of them, as they are.",
    )
    drawn_digest: str | None = Field(None, description="With `labels`: digest of the batch as it was drawn.")

    def only(self, labels: Mapping[int, int]) -> Self:
        """Return the part of the batch that a job keeps, under the labels that its classes have now.

        Args:
            labels: Label in this batch to label of the job. What it does not name is left out.

        Returns:
            A copy whose `counts`, `n_samples` and `digest` are those of the part; this batch itself where all labels
            stay what they are.

        Raises:
            ValueError: Two labels would become one.
        """
        kept = {old: labels[old] for old in sorted(self.counts) if old in labels}
        if len(set(kept.values())) < len(kept):
            raise ValueError(f"labels {labels} would make one class of several")
        if kept == {label: label for label in self.counts}:
            return self
        # Maps laid over each other are one map over the table, so the way to it does not show in the digest.
        own = self.labels or {label: label for label in self.counts}
        composed = {drawn: kept[label] for drawn, label in sorted(own.items()) if label in kept}
        counts = {new: self.counts[old] for old, new in kept.items()}
        drawn_digest = self.drawn_digest or self.digest
        return self.model_copy(
            update={
                "labels": composed,
                "counts": counts,
                "n_samples": sum(counts.values()),
                "drawn_digest": drawn_digest,
                "digest": digest_json([drawn_digest, sorted(composed.items())]),
            }
        )


class NearnessTest(Record):
    """Where 'too near to a training image' begins for a class, and how often that is wrong.

    A rate is unavailable (None) with fewer than 20 held-out images.
    """

    name: str | None = Field(description="Class; None: all classes together.")
    threshold: float | None = Field(description="Distance below which an image is a near-copy; None: nothing held out.")
    pooled: bool = Field(description="Is it the threshold of all classes, since the class has too few held-out images?")
    n_heldout: int = Field(description="Held-out real images of the class that measured it.")
    n_groups: int = Field(description="Groups (patients) they are from.")
    n_repeats: int = Field(description="Held-out images left out, since they are training images once more.")
    alarms: int = Field(description="Held-out real images called near-copies, by the threshold the others give.")
    alarm_rate: float | None
    alarm_bounds: tuple[float, float] | None = Field(
        description="95 % Clopper–Pearson interval of the rate, at the number of groups."
    )


class PlantedCopies(Record):
    """Altered copies of training images, and how many of them the audit would have found."""

    alteration: str
    listed: bool = Field(description="Is the comparison built for it?")
    n: int
    n_caught: int = Field(description="By hash or by picture: these would be rejected.")
    n_in_features: int = Field(description="Nearer in features than the threshold there; nothing is rejected by it.")


class Judge(StageRecord):
    """A classifier trained on the real training images only, and the calibrated near-copy distance.

    classifier.safetensors: its weights. Further files are the judge's own.
    """

    n_train: int
    validation_balanced_accuracy: float | None = Field(description="None where there are no validation images.")
    near_copy_threshold: float | None = Field(
        description="Distance for classes without one of their own; None where it could not be calibrated."
    )
    near_copy_note: str = Field(description="What the threshold rests on, in words.")
    near_copies: tuple[NearnessTest, ...] = Field((), description="All classes together, then each class.")
    feature_test: NearnessTest | None = Field(None, description="The same in features; it rejects nothing.")
    features: str = Field("the judge's classifier", description="What the features come from.")
    planted: tuple[PlantedCopies, ...] = Field((), description="How good the search for copies is on these images.")
    n_heldout: int
    seconds: float

    def threshold_of(self, name: str) -> float | None:
        """The near-copy distance for a class."""
        return next((test.threshold for test in self.near_copies if test.name == name), self.near_copy_threshold)


class CopyRates(Record):
    """How near a class's samples are to real training images, before the gate and after it."""

    n: int = Field(description="Samples that are pictures at all.")
    n_exact: int = Field(description="Copies of a training image, bit for bit, mirrored or not.")
    n_near: int = Field(description="Copies and near-copies.")
    near_bounds: tuple[float, float] = Field(description="95 % Clopper–Pearson interval of the share of near-copies.")
    n_low_ratio: int = Field(description="Three times nearer to one training image than to the next (d1/d2 < 1/3).")
    n_in_features: int | None = Field(description="Too near in features; None where that could not be calibrated.")
    n_accepted: int
    accepted_low_ratio: int
    accepted_in_features: int | None

    @property
    def near_rate(self) -> float | None:
        """Share of near-copies before the gate; after it there are none."""
        return self.n_near / self.n if self.n else None


class ClassAudit(Record):
    label: int
    name: str
    n_wanted: int
    n_candidates: int
    n_accepted: int
    n_missing: int
    rejected: dict[str, int] = Field(description="Reason to number of samples.")
    coverage: float | None = Field(description="Of real training images by accepted samples, 0 to 1; higher is better.")
    coverage_expected: float | None = Field(description="What equal distributions would reach at these counts.")
    copies: CopyRates | None = None
    withheld: str | None = Field(None, description="Why none of the class's samples are released.")


class AuditReport(StageRecord):
    """What became of every sample.

    audit.parquet: sample_id, batch (int64, position in the list of batches given), row (int64, in that batch),
    label, class_index, accepted (bool), reason (str or null), rank (int64 within the class among accepted, in
    order of class_index; -1 otherwise), probability (float, of its own class), predicted (int64), distance
    (float, to the training image that explains it best, 0 to 1), distance_ratio (float, nearest over second nearest),
    nearest_id (str), feature_distance (float).
    """

    classes: tuple[ClassAudit, ...]
    notes: tuple[str, ...] = ()


class Interval(Record):
    """An estimate with its 95 % interval; for a difference, positive speaks for the synthetic data."""

    estimate: float
    low: float
    high: float


class ArmResult(Record):
    """What one arm of the trial reached on the validation split, where arms are chosen."""

    key: str = Field(description="Short name, unique in a trial: 'oversampling', 'synthetic 1x + balanced softmax'.")
    side: Literal["real", "synthetic"]
    words: str = Field(description="What the arm does, for people.")
    scores: tuple[float, ...] = Field(description="The trial's metric on validation, one for each classifier seed.")
    dropped: str | None = Field(None, description="When and why it left the race; None for the side's finalist.")

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


class Figures(Record):
    """What a finalist reached on the test split: means over the classifier seeds."""

    key: str
    words: str
    balanced_accuracy: float = Field(description="Mean recall over classes, 0 to 1; higher is better.")
    macro_f1: float = Field(description="Mean F1 over classes, 0 to 1; higher is better.")
    rare_auprc: float = Field(description="Mean AUPRC over the scarce classes, 0 to 1; higher is better.")
    calibration_error: float = Field(
        description="Expected calibration error, 15 bins, temperature from validation; lower is better."
    )
    recall: dict[str, float] = Field(description="Class to recall, 0 to 1; higher is better.")
    auprc: dict[str, float] = Field(description="Class to AUPRC, one against the rest; higher is better.")
    spread: float = Field(description="Standard deviation of the trial's metric over the classifier seeds.")
    confusion: list[list[float]] = Field(
        description="Row: true class; column: predicted. Rows sum to 1, or are 0 for a class without test images."
    )


class SampleQuality(Record):
    """Samples of a class against its real training images, in the features of a classifier of real images."""

    n_real: int
    n_samples: int
    precision: float | None = Field(None, description="Share of samples among the real images; higher is better.")
    recall: float | None = Field(None, description="Share of real images among the samples; higher is better.")
    density: float | None = Field(None, description="How densely real images surround samples; 1 is like real.")
    coverage: float | None = Field(None, description="Share of real images with a sample near; higher is better.")
    kid: Interval | None = Field(None, description="Kernel inception distance; lower is better, 0 is like real.")
    unavailable: str | None = Field(None, description="Why there are no figures.")


class ClassVerdict(Record):
    """What the trial says of one class that was offered synthetic images."""

    label: int
    name: str
    n_real: int
    n_offered: int = Field(description="Synthetic images there were to choose from.")
    tried: int = Field(description="Synthetic images of the chosen recipe.")
    dose: int = Field(description="Synthetic images recommended; 0 is an answer.")
    n_test: int
    recall_gain: Interval | None = None
    auprc_gain: Interval | None = None
    quality: SampleQuality | None = None
    advice: str = ""


class SubgroupGain(Record):
    name: str
    n_test: int
    before: float
    after: float
    gain: Interval


class DosePoint(Record):
    """A dose on validation."""

    loss: str = Field(description="What the dose was tried in: a loss, or the key of the best real-only arm.")
    dose: str = Field(description="'0', '0.25x' … of the class's real images, 'plan', or 'per class'.")
    n_synthetic: int
    scores: tuple[float, ...]


class RealPoint(Record):
    """The best real-only arm with a share of the scarce classes' real images, on validation."""

    share: float
    n_real: int
    scores: tuple[float, ...]


class Verdict(StageRecord):
    """Whether the synthetic images help, at which dose. verdict.json holds this record; pictures lie beside it.

    Differences are of the chosen synthetic arm minus another arm, on the test split, paired by seed and image.
    """

    outcome: Literal["helps", "no evidence", "harms"]
    sentence: str = Field(description="The verdict in words.")
    reasons: tuple[str, ...] = Field(description="What the outcome rests on, or what was missing.")
    metric: Literal["balanced_accuracy", "macro_f1"]
    best_real: str | None = Field(None, description="Key of the best real-only arm.")
    recipe: str | None = Field(None, description="Key of the chosen synthetic arm.")
    recipe_settings: dict[str, Any] = Field(default_factory=dict, description="The chosen arm as plain data.")
    arms: tuple[ArmResult, ...] = ()
    finalists: tuple[Figures, ...] = Field((), description="Real-only, synthetic, then the two controls.")
    differences: dict[str, dict[str, Interval]] = Field(
        default_factory=dict, description="'real', 'duplicates', 'scrambled' to metric to the difference."
    )
    class_names: tuple[str, ...] = Field((), description="All classes, in order of label.")
    classes: tuple[ClassVerdict, ...] = ()
    subgroups: tuple[SubgroupGain, ...] = ()
    dose_curve: tuple[DosePoint, ...] = ()
    learning_curve: tuple[RealPoint, ...] = ()
    worth: str | None = Field(None, description="What a synthetic image is worth in real ones, in words.")
    advice: tuple[str, ...] = Field((), description="What would change the verdict.")
    not_tried: dict[str, str] = Field(default_factory=dict, description="Arm or measurement to why it was left out.")
    classifier: str = "small residual network"
    n_validation: int = 0
    n_test: int = 0
    seeds: int = 0
    steps: int = Field(0, description="Optimizer steps of every arm.")
    trained_out: Interval | None = Field(
        None,
        description="Gain of the best real-only arm from four times the steps, on validation, by seeds of its own.",
    )
    looks: int = Field(0, description="How many trials have looked at this test split so far, this one included.")
    test_digest: str | None = Field(None, description="Of the image ids of the test split.")
    minutes_needed: float | None = Field(None, description="Where the budget was too small: what it would take.")
    notes: tuple[str, ...] = ()

    @property
    def helps(self) -> bool:
        return self.outcome == "helps"


class MembershipFigures(Record):
    """How well the attack tells images that were trained on from others of their class."""

    n_members: int = Field(description="Training images looked at.")
    n_heldout: int = Field(description="Held-out images looked at.")
    auc: Interval | None = Field(
        None, description="Chance that a training image scores above a held-out one; 0.5 is guessing, lower is better."
    )
    true_positive_rate: Interval | None = Field(
        None,
        description="Share of training images told at 1 % false alarms at most; lower is better. None where too few "
        "images are held out to see so small a share.",
    )
    control_auc: Interval | None = Field(
        None, description="The AUC of the picture's roughness, which knows no generator; not 0.5: the splits differ."
    )
    unavailable: str | None = Field(None, description="Why there are no figures.")


class ClassMembership(MembershipFigures):
    label: int
    name: str


class Membership(StageRecord):
    """The denoising-loss attack on a checkpoint. membership.json holds this record; membership.parquet has the scores
    of the images and never leaves the run folder."""

    overall: MembershipFigures = Field(description="Within classes, over all of them.")
    classes: tuple[ClassMembership, ...]
    levels: tuple[float, ...] = Field(description="Noise levels, where images lie in [-1, 1].")
    draws: int = Field(description="Noises at each level.")
    most_of_a_class: int = Field(description="Images of a class that were looked at on either side, at most.")
    notes: tuple[str, ...] = ()
    seconds: float


class Release(StageRecord):
    """The dataset that came out; `directory` is the release itself."""

    n_real: dict[str, int] = Field(description="Class to real training images of the source.")
    n_synthetic: dict[str, int]
    n_short: dict[str, int] = Field(description="Class to how many samples the plan asked for and did not get.")
    manifest_digest: str
    pushed_to: str | None = None
