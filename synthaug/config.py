"""The configuration: YAML in, one frozen pydantic object out.

Unknown keys are refused with the nearest known key named; every field is described and bounded,
so that a form can be drawn from `Config.model_json_schema()`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from synthaug.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Section(BaseModel):
    """A part of the configuration: frozen, closed, NaN refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Columns(Section):
    """Names of the columns (or features) that carry what the job needs."""

    image: str = Field("image", description="Column with the image.")
    label: str = Field("label", description="Column with the class: a ClassLabel, a whole number or a name.")
    group: str | None = Field(
        None, description="Column with the patient, lesion or site. A group is never divided between splits."
    )
    subgroup: str | None = Field(
        None, description="Column with the site, sex or age group: the verdict says whether one of them lost."
    )
    split: str | None = Field(
        None, description="Column with the split of a row, where the splits are not given by the format."
    )


Frames = Literal["first", "middle", "all"] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class DicomConfig(Section):
    """How a folder of DICOM files is read. Labels come from a table, from a tag or from folders: say which."""

    table: str | None = Field(
        None,
        description=(
            "CSV or Excel (.xlsx) file with the labels; dataset.columns names its columns of label, group, subgroup "
            "and split."
        ),
    )
    key: Literal["file", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID"] = Field(
        "file", description="What a row of the table speaks of: a file by its name or path, or a tag's value."
    )
    key_column: str | None = Field(None, description="Column of the table with it; named like `key` where not given.")
    label_tag: str | None = Field(
        None, description="Tag that holds the class, as a keyword (BodyPartExamined) or a number (0018,0015)."
    )
    folders: bool = Field(
        False,
        description=(
            "The folders directly below the path are the classes. Their names go into every record, so they must not "
            "be patients."
        ),
    )
    group: Literal["PatientID", "StudyInstanceUID", "SeriesInstanceUID"] = Field(
        "PatientID",
        description="Tag whose images are never divided between splits; a column dataset.columns.group comes first.",
    )
    window: Literal["none", "tag"] | tuple[float, Annotated[float, Field(ge=1)]] = Field(
        "none",
        description=(
            "none: values as they are, in the modality's unit (of CT: HU), floating point where 8 or 16 bits do not "
            "hold them exactly; tag: the first window, or VOI LUT, of each file; [center, width]: one for all. A "
            "window's range fills 16 bits; what lies outside is clipped."
        ),
    )
    frames: Frames = Field(
        "middle", description="Frames that are taken of a multi-frame file; a list counts from 1, as DICOM does."
    )
    photometric: Literal["auto", "monochrome", "colour", "any"] = Field(
        "auto",
        description=(
            "Which images are taken; others are set aside. auto: monochrome or colour, whichever most files are; any: "
            "both, which takes image.colour to bring them to one form."
        ),
    )
    secondary_captures: bool = Field(
        False, description="Take secondary captures: screenshots and scans, often with names burned in."
    )
    burned_in: bool = Field(False, description="Take images whose BurnedInAnnotation says YES.")
    key_file: str | None = Field(
        None,
        description=(
            "File with the secret key of the pseudonyms, made where it is missing; the private list of what they "
            "stand for lies beside it. In the user's data directory where not given; never in a run folder."
        ),
    )

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> DicomConfig:
        given = [name for name in ("table", "label_tag", "folders") if getattr(self, name)]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else "has none of them"
            raise ValueError(
                f"dataset.dicom takes one source of labels, table, label_tag or folders: true, and {found}"
            )
        if self.table is None and (self.key != "file" or self.key_column is not None):
            raise ValueError("dataset.dicom.key and key_column are for a table, and there is none")
        return self


class NiftiConfig(Section):
    """How slices are taken out of a folder of NIfTI volumes. Labels come from a table or from folders: say which."""

    table: str | None = Field(
        None, description="CSV or Excel (.xlsx) file with the labels; dataset.columns names its columns."
    )
    key_column: str | None = Field(None, description="Column of the table with names of files; 'file' where not given.")
    folders: bool = Field(False, description="The folders directly below the path are the classes, no patients.")
    plane: Literal["axial", "coronal", "sagittal"] = Field("axial", description="The plane of the slices.")
    slices: Frames = Field(
        "middle",
        description="Slices that are taken; a list counts from 1, from the feet, the back or the left.",
    )
    volumes: Literal["first", "channels"] = Field(
        "first", description="Of a file with several volumes: the first, or all of them as channels of one image."
    )
    key_file: str | None = Field(None, description="As dataset.dicom.key_file.")

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> NiftiConfig:
        if (self.table is None) != self.folders:
            raise ValueError("dataset.nifti takes one source of labels: table, or folders: true")
        return self


class DatasetConfig(Section):
    """Where the real images come from."""

    format: Literal["hub", "huggingface", "disk", "imagefolder", "parquet", "medmnist", "digits", "dicom", "nifti"] = (
        Field(
            description=(
                "hub: a dataset id on the Hugging Face hub; huggingface: a directory for load_dataset; disk: a "
                "directory of save_to_disk; imagefolder: one folder a class, or metadata.csv/.jsonl; parquet: "
                "files or a directory of them; medmnist: an .npz of MedMNIST; digits: the scans inside scikit-learn; "
                "dicom: a folder of DICOM files; nifti: slices of a folder of NIfTI volumes."
            )
        )
    )
    path: str | None = Field(
        None,
        description="File, directory or hub id; relative paths start at this file, in a deployment at its directory.",
    )
    revision: str | None = Field(None, description="hub only: commit, tag or branch. A commit is the safe choice.")
    name: str | None = Field(None, description="hub and huggingface only: name of the dataset's configuration.")
    columns: Columns = Field(default_factory=Columns, description="Names of the columns.")
    dicom: DicomConfig | None = Field(None, description="dicom only: labels, windows, frames, pseudonyms.")
    nifti: NiftiConfig | None = Field(None, description="nifti only: labels, slices, pseudonyms.")
    class_names: list[str] | None = Field(
        None, min_length=2, description="Names for whole-number labels 0, 1, 2 … where the source has none."
    )
    licence: str | None = Field(None, description="The source's licence (an SPDX or hub identifier), for the card.")
    citation: str | None = Field(None, description="How the source asks to be cited, for the card.")
    exclude: list[str] = Field(default_factory=list, description="Classes that are left out altogether.")
    cut: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Class name to number of images kept in the training split; makes a class scarce on purpose.",
    )
    cut_seed: Seed = Field(0, description="Seed of the shuffle that chooses which images a cut keeps.")

    @property
    def private(self) -> DicomConfig | NiftiConfig | None:
        """The section of a form whose files may be named after patients."""
        return self.dicom or self.nifti

    @model_validator(mode="after")
    def _path_goes_with_format(self) -> DatasetConfig:
        if self.format == "digits":
            if self.path is not None:
                raise ValueError("format 'digits' ships inside scikit-learn and takes no path: remove dataset.path")
        elif not self.path:
            raise ValueError(f"format '{self.format}' needs dataset.path")
        if self.revision is not None and self.format != "hub":
            raise ValueError(f"dataset.revision is for format 'hub', not '{self.format}'")
        for form, section, labels in (
            ("dicom", self.dicom, "table, label_tag or folders"),
            ("nifti", self.nifti, "table or folders"),
        ):
            if section is not None and self.format != form:
                raise ValueError(f"dataset.{form} is for format '{form}', not '{self.format}'")
            if section is None and self.format == form:
                raise ValueError(f"format '{form}' needs dataset.{form}, which says where the labels are: {labels}")
        return self


class ImageConfig(Section):
    """What an image is brought to before anything is done with it."""

    size: Annotated[int, Field(ge=8, le=512)] = Field(description="Side of the square, in pixels.")
    fit: Literal["stretch", "crop", "pad"] = Field(
        "crop",
        description="How a picture that is not square becomes one: crop its centre, pad with zeros, or stretch.",
    )
    colour: Literal["auto", "grey", "rgb"] = Field(
        "auto",
        description=(
            "auto keeps what the files hold and refuses a mixture; grey and rgb convert, and the record says so."
        ),
    )
    max_pixels: Annotated[int, Field(ge=64)] = Field(
        50_000_000, description="A picture with more pixels than this is set aside undecoded (decompression bomb)."
    )
    value_range: tuple[float, float] | None = Field(
        None, description="Lowest and highest value of floating-point images; measured on the data where not given."
    )


class SplitConfig(Section):
    """How the images are divided, where the source does not say."""

    validation: Share = Field(0.15, description="Share of the groups for validation.")
    test: Share = Field(0.15, description="Share of the groups for test.")
    seed: Seed = Field(0, description="Key of the hash that places a group.")
    near_duplicate_distance: Share = Field(
        0.02,
        description=(
            "Without a group column: images nearer than this (root mean square difference, as a share of the "
            "value range) count as one group."
        ),
    )
    moved_duplicates: bool = Field(
        True,
        description=(
            "Without a group column: images that are another image moved, flipped, turned, cropped or with other "
            "light count as one group too. Looked for in sets of 50 to 100,000 images."
        ),
    )
    ledger: str | None = Field(
        None, description="File that remembers the split of every group; beside the source where not given."
    )

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("split.validation + split.test must stay under 1, or nothing is left to train on")
        return self


class PlanConfig(Section):
    """How far each class is raised."""

    target_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Minority-to-majority ratio to reach; 1 is full balance."
    )
    counts: dict[str, Count] = Field(
        default_factory=dict, description="Class name to number of images it shall end with; overrides the ratio."
    )
    max_synthetic_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.95, description="No class may be more synthetic than this share."
    )
    include: list[str] | None = Field(None, description="Only these classes are raised; all where not given.")
    exclude: list[str] = Field(default_factory=list, description="These classes are never raised.")
    min_real: Annotated[int, Field(ge=2)] = Field(
        5, description="A class with fewer real training images is refused: there is too little to learn from."
    )


class AugmentConfig(Section):
    """Non-leaky augmentation: the network is told what was done, so that it never samples it."""

    probability: Share = Field(0.12, description="Probability of each transformation (Karras et al. 2022 use 0.12).")
    from_repeats: Annotated[float, Field(ge=0)] = Field(
        150,
        description=(
            "Classes are augmented whose images the training draws at least so often each: fewer draws learn them by "
            "heart less than the augmentation distracts. 0 augments every class; so does a training that starts from a "
            "base, which has drawn nobody knows what, and a private one."
        ),
    )
    flips: bool = Field(True, description="Horizontal flips are among the transformations.")


class TrainConfig(Section):
    """The generator. One dial matters most: minutes, or images for an exact repeat."""

    generator: str = Field("edm", description="Name of the generator; 'edm' is the diffusion model of this package.")
    minutes: Annotated[float, Field(gt=0, le=60 * 24 * 30)] = Field(
        3.0, description="Time for training. Turned into a number of images once, by a short measurement."
    )
    images: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Number of training images in place of minutes; a run repeats exactly with it."
    )
    fine_tune_share: Share = Field(
        0.3, description="Share of the budget for the class-balanced joint fine-tuning after the base."
    )
    batch_size: Annotated[int, Field(ge=2, le=4096)] = Field(
        32, description="Images per optimizer step. Small budgets want many steps: see docs/log.md."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1e-3, description="Highest rate of the base; matrices move ten times as far, but not in private training."
    )
    fine_tune_learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(3e-4, description="Highest rate after it.")
    width: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] | None = Field(
        None, description="Channels of the network's first level; chosen from the size of the images where not given."
    )
    layers: Annotated[int, Field(ge=1, le=8)] = Field(
        1,
        description=(
            "Residual blocks of each level of the network on its way down; one more on its way up. More of them learn "
            "less in the same minutes: for long trainings, and GPUs."
        ),
    )
    fold: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="Side of the pixel block folded into channels; chosen from the image size where not given."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Dropout inside the network.")
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of steps' images trained without their class, for classifier-free guidance."
    )
    ema_half_life: Share = Field(
        0.05, description="Half-life of the weights' moving average, as a share of the images trained so far."
    )
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Non-leaky augmentation.")
    patience: Annotated[int, Field(ge=1)] = Field(
        4, description="Evaluations without a better held-out denoising loss before a phase is ended."
    )
    fit_solver_from: Annotated[int, Field(ge=0)] | None = Field(
        6000,
        description=(
            "Trainings of at least so many images, and all that start from a base, fit solvers of few evaluations to "
            "their network, which takes as long as 600 images. 0 always; null never, as for wide networks on a "
            "processor."
        ),
    )
    base: str | None = Field(
        None, description="Folder or hub id of a diffusers pipeline (safetensors) to start from; no base phase then."
    )
    base_revision: str | None = Field(None, description="Revision of a base from the hub.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where training and sampling run.")
    threads: Annotated[int, Field(ge=1, le=256)] = Field(
        2, description="Processor threads for the arithmetic, of each process."
    )
    compile: Literal["default", "reduce-overhead"] | None = Field(
        None,
        description=(
            "Mode of torch.compile for the network in training; reduce-overhead draws a GPU's kernels into one CUDA "
            "graph. Compiling takes about a minute beside the budget and wants a C++ compiler. Another mode is another "
            "training, and so may be another machine's compiler; drawing is not compiled, so that samples can be made "
            "again anywhere."
        ),
    )
    processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description=(
            "Processes that train together through accelerate, each on its part of every batch: one a GPU, or on the "
            "processor. Another number is another training."
        ),
    )

    @model_validator(mode="after")
    def _what_is_compiled_trains_in_one_process(self) -> TrainConfig:
        if self.compile is not None and self.processes > 1:
            raise ValueError(
                f"compile is {self.compile} and processes is {self.processes}; the network is compiled in one process "
                "only, so leave one out"
            )
        return self

    @model_validator(mode="after")
    def _a_batch_is_divided_evenly(self) -> TrainConfig:
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided evenly among {self.processes} processes; make "
                "batch_size a multiple of processes"
            )
        return self


class SampleConfig(Section):
    """How images are drawn from the generator."""

    steps: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        None,
        description=(
            "Evaluations of the network per image. Where not given, 8 by the solver that is fitted to the checkpoint; "
            "14 by DPM-Solver++ with guidance, or where the checkpoint has none (train.fit_solver_from). 2, 3, 4 and 6 "
            "are fitted too."
        ),
    )
    guidance: Annotated[float, Field(ge=0, le=20)] = Field(
        1.0, description="Classifier-free guidance scale; 1 is none, higher is more typical and less diverse."
    )
    micro_batch: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="Images computed together. Part of what makes a sample, so changing it changes the samples."
    )
    threads: Annotated[int, Field(ge=1, le=256)] = Field(
        2, description="Processor threads for the arithmetic. Recorded, since it can change the last bit."
    )
    oversample: Annotated[float, Field(ge=1, le=3)] = Field(
        1.25, description="Candidates drawn at first, as a multiple of what the plan asks."
    )
    max_candidates: Annotated[float, Field(ge=1, le=20)] = Field(
        3.0, description="Candidates drawn at most, as a multiple of what the plan asks; then a class stays short."
    )


class AuditConfig(Section):
    """What a synthetic image must pass."""

    classifier_steps: Annotated[int, Field(ge=10)] = Field(400, description="Optimizer steps of the classifier.")
    third_class_probability: Share = Field(
        0.9, description="A sample is dropped when the classifier gives another class at least this probability."
    )
    min_coverage: Share = Field(
        0.3,
        description=(
            "Least coverage of a class's real images by its samples, relative to what equal distributions would "
            "reach. A class below is withheld: it has collapsed, or the filter has narrowed it."
        ),
    )
    near_copy_percentile: Annotated[float, Field(ge=0, le=50)] = Field(
        1.0,
        description="A sample nearer to a training image than this percentage of held-out real images is a near-copy.",
    )
    planted: Annotated[int, Field(ge=0, le=100_000)] = Field(
        100, description="Training images that are altered in every known way, to see how many copies are found."
    )


class EvaluateConfig(Section):
    """The fair trial: does the synthetic data help, against what anyone could do for free?"""

    enabled: bool = Field(True, description="Try the samples before they are released; false: no verdict.")
    minutes: Annotated[float, Field(gt=0, le=60 * 24 * 30)] = Field(
        10.0, description="Time for the trial. Where it is short, arms are dropped in a stated order, and said."
    )
    metric: Literal["balanced_accuracy", "macro_f1"] = Field(
        "balanced_accuracy", description="What arms are chosen by on validation and the verdict rests on."
    )
    seeds: Annotated[int, Field(ge=5, le=100)] = Field(
        10, description="Classifier seeds of the finalists; five where the minutes do not suffice for more."
    )
    doses: list[Annotated[float, Field(gt=0, le=1000)]] = Field(
        [0.25, 1.0, 3.0], min_length=1, description="Synthetic images of a class per real one; the plan is tried too."
    )
    steps: Annotated[int, Field(ge=10)] | None = Field(
        None, description="Optimizer steps of every arm; chosen from the images where not given. Not for estimators."
    )
    batch_size: Annotated[int, Field(ge=8, le=4096)] = Field(64, description="Images per optimizer step.")
    min_test: Annotated[int, Field(ge=2)] = Field(
        20,
        description="Test images (of different groups, where there are any) that every class needs for a verdict.",
    )
    classifier: str | None = Field(
        None,
        description=(
            "Your own classifier, 'package.module:name' or 'file.py:name' beside this file: a scikit-learn estimator "
            "(class, object or factory) or a factory (channels, size, n_classes) of a torch module that returns logits."
        ),
    )
    backbone: str | None = Field(
        None,
        description=(
            "Features for sample quality, named the same way: a factory of a torch module that takes "
            "[n, channels, size, size] in -1..1 and returns [n, features]. It loads its weights from your disk."
        ),
    )
    workers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None,
        description="Fits at a time, each on one thread; train.threads where not given. More fit into the minutes.",
    )


class DPConfig(Section):
    """Differential privacy of the checkpoint. Experimental; it costs most of what a small dataset could teach."""

    epsilon: Annotated[float, Field(gt=0, le=100)] = Field(description="Most that may be spent; lower is stricter.")
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Under 1 / training images; a tenth of that where not given."
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="Norm that the gradient of each image is clipped to."
    )


class PrivacyConfig(Section):
    """What a checkpoint may give away. No limit here makes a release anonymous."""

    max_membership_auc: Annotated[float, Field(ge=0.5, le=1)] | None = Field(
        0.95,
        description=(
            "No release when an attack tells the generator's training images from held-out ones with an AUC above "
            "this, over all classes or in one (0.5 is guessing); null: measured and reported all the same."
        ),
    )
    max_near_copy_rate: Share | None = Field(
        0.25,
        description=(
            "No release when more than this share of a class's samples are copies or near-copies before they are "
            "dropped; null: measured and reported all the same."
        ),
    )
    dp: DPConfig | None = Field(
        None, description="Train with differential privacy (experimental; needs synthaug[dp] and train.images)."
    )


class PushConfig(Section):
    """Publishing on the Hugging Face hub."""

    repo_id: str = Field(description="Dataset repository, 'owner/name'.")
    private: bool = Field(True, description="Private unless told otherwise.")
    real_images: bool = Field(False, description="Publish the real images too. You must be allowed to.")
    checkpoint: bool = Field(False, description="Publish the checkpoint too. It may hold traces of its images.")


class DicomCopies(Section):
    """Copies of the synthetic images as DICOM files, in the release's folder `dicom`."""

    uid_root: Annotated[str, Field(pattern=r"^[012](\.(0|[1-9][0-9]*))+$", max_length=40)] = Field(
        description="Root of the new UIDs, one that you own; 2.25 for UIDs that are made of UUIDs and need no root."
    )
    sop_class: Literal["secondary-capture", "ct", "mr", "cr"] = Field(
        "secondary-capture",
        description="Class of the copies: Secondary Capture, or the grey images of a modality: CT, MR, CR.",
    )


class ReleaseConfig(Section):
    """The dataset that comes out."""

    include_real: bool = Field(True, description="Real images beside the synthetic ones; false: synthetic alone.")
    images_per_shard: Annotated[int, Field(ge=1)] = Field(5000, description="Rows of a parquet shard.")
    append: bool = Field(
        True,
        description="Take over the shards of the run folder's last release that hold the same rows, and write the rest "
        "into new ones, so that little is published again; false: write all of them.",
    )
    title: str | None = Field(None, description="Title of the dataset card.")
    require: Literal["helps"] | None = Field(
        None, description="'helps': make no release unless the verdict says that the synthetic data helps."
    )
    dicom: DicomCopies | None = Field(
        None, description="Also write the synthetic images as DICOM files; none when absent."
    )
    push: PushConfig | None = Field(None, description="Where to publish; nowhere when absent.")


class ScaleConfig(Section):
    """Who computes sampling and audit in a flow. The result is the same bit for bit, so nothing is made again by it."""

    runner: Literal["none", "threads", "processes", "dask", "ray"] = Field(
        "none",
        description=(
            "none: the process that runs the job; threads, processes, dask, ray: workers of a Prefect task runner (a "
            "flow is needed; dask and ray are extras)."
        ),
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Workers that are started; as many as there are cores for sample.threads where not given."
    )
    address: str | None = Field(
        None,
        pattern=r"^[^\s@]+$",
        description="dask and ray only: a scheduler that is running, in place of workers on this machine.",
    )
    shard_images: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Images of a shard, in whole micro-batches; chosen by a short measurement where not given."
    )

    @model_validator(mode="after")
    def _an_address_needs_an_engine(self) -> ScaleConfig:
        if self.address is not None and self.runner not in ("dask", "ray"):
            raise ValueError(f"scale.address is for runner 'dask' or 'ray', not '{self.runner}'")
        if self.address is not None and self.workers is not None:
            raise ValueError("scale.workers are started here, and scale.address names workers that run: give one")
        return self


class GrowthConfig(Section):
    """What is kept of the release before, when images have come since."""

    samples: Literal["keep", "remake"] = Field(
        "keep",
        description=(
            "keep: only classes whose images changed are trained for, from the last checkpoint, and sampled again; "
            "remake: everything is made anew from all images."
        ),
    )
    max_new_share: Share = Field(
        0.5,
        description=(
            "Everything is made anew where more than this share of the training images is new. Decided once for a set "
            "of images."
        ),
    )


class Config(Section):
    """One augmentation job."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(description="Name of the job.")
    output: str = Field(
        description="Directory of the run; relative to where the command is called, in a deployment to its directory."
    )
    seed: Seed = Field(0, description="Seed of everything that has no seed of its own.")
    dataset: DatasetConfig = Field(description="The real images.")
    image: ImageConfig = Field(description="The form images are brought to.")
    split: SplitConfig = Field(default_factory=SplitConfig, description="Train, validation, test.")
    plan: PlanConfig = Field(default_factory=PlanConfig, description="How many images each class shall have.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="The generator.")
    sample: SampleConfig = Field(default_factory=SampleConfig, description="Drawing samples.")
    audit: AuditConfig = Field(default_factory=AuditConfig, description="What a sample must pass.")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="The verdict on the samples.")
    growth: GrowthConfig = Field(default_factory=GrowthConfig, description="What new images leave as it is.")
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig, description="What a checkpoint may give away.")
    release: ReleaseConfig = Field(default_factory=ReleaseConfig, description="The dataset that comes out.")
    scale: ScaleConfig = Field(default_factory=ScaleConfig, description="Who computes sampling and audit in a flow.")

    @model_validator(mode="after")
    def _a_demand_needs_a_verdict(self) -> Config:
        if self.release.require is not None and not self.evaluate.enabled:
            raise ValueError("release.require: helps needs a verdict: set evaluate.enabled to true")
        return self

    @model_validator(mode="after")
    def _private_training_is_plain(self) -> Config:
        if self.privacy.dp is not None and self.train.compile is not None:
            raise ValueError(
                f"privacy.dp takes the gradient of every image by itself, which is not compiled, and train.compile is "
                f"{self.train.compile}; leave one out"
            )
        if self.privacy.dp is not None and self.train.processes > 1:
            raise ValueError(
                f"privacy.dp trains in one process, and train.processes is {self.train.processes}; leave one out"
            )
        return self

    @field_validator("output")
    @classmethod
    def _output_is_a_path(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise ValueError("output must name a directory")
        return value

    @property
    def output_path(self) -> Path:
        """The run folder, absolute."""
        return Path(self.output).expanduser().absolute()


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. A key given twice is refused: YAML would let the second win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen[repr(key) if isinstance(key, dict | list) else key] = None
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, *, output: str | None = None) -> Config:
    """Read a YAML file into a `Config`; `output` takes the place of the file's own.

    Relative dataset and base paths are taken from the file's folder, a relative output from the working directory.

    Raises:
        ConfigError: The file is missing or not plain YAML, a key is unknown, or a value is refused.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}.") from None
    try:
        values = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # a date like 2024-13-45 is a ValueError of its constructor
        raise ConfigError(f"configuration {path} is not plain YAML: {_one_line(error)}.") from None
    except RecursionError:
        raise ConfigError(f"configuration {path} is nested too deeply to be a configuration.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} holds {type(values).__name__}, not keys and values.")
    if output is not None:
        values["output"] = output
    return parse_config(values, where=str(path), folder=path.resolve().parent)


def parse_config(values: dict[str, Any], *, where: str = "configuration", folder: Path | None = None) -> Config:
    """Validate plain values into a `Config`; `where` names them in errors, `folder` anchors relative paths.

    Raises:
        ConfigError: Every problem found, one a line.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(item)}" for item in error.errors())
        raise ConfigError(f"{where} is refused:\n{problems}") from None
    if folder is None:
        return config
    try:
        return _anchor(config, folder)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"{where} names a path that no file system takes: {_one_line(error)}.") from None


def _anchor(config: Config, folder: Path) -> Config:
    def anchored(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    dataset, split, train = config.dataset, config.split, config.train
    if dataset.path is not None and dataset.format != "hub":
        dataset = dataset.model_copy(update={"path": anchored(dataset.path)})
    if (private := dataset.private) is not None:
        files = {name: getattr(private, name) for name in ("table", "key_file")}
        given = {name: anchored(file) for name, file in files.items() if file is not None}
        dataset = dataset.model_copy(update={dataset.format: private.model_copy(update=given)})
    if split.ledger is not None:
        split = split.model_copy(update={"ledger": anchored(split.ledger)})
    # What is no folder here is taken for the id of a hub.
    if train.base is not None and Path(anchored(train.base)).exists():
        train = train.model_copy(update={"base": anchored(train.base)})
    evaluate = config.evaluate.model_copy(
        update={
            name: f"{anchored(file)}:{attribute}"
            for name in ("classifier", "backbone")
            for file, _, attribute in [(getattr(config.evaluate, name) or "").rpartition(":")]
            if file.endswith(".py")
        }
    )
    return config.model_copy(update={"dataset": dataset, "split": split, "train": train, "evaluate": evaluate})


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "(top level)"
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        return f"{place}: no such setting; {_advice(parents, str(key))}"
    if item["type"] == "missing":
        return f"{place}: this setting is required."
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{place}: {message}"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        # YAML reads 3, 1e5, no and on as numbers and truth values; classes are often called so.
        return f"{place.removesuffix('.[key]')}: a name is wanted, and YAML reads {item['input']!r}; put it in quotes"
    return f"{place}: {message} (got {item['input']!r:.80})"


def _advice(parents: list[Any], key: str) -> str:
    known = _known_keys(parents)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    elsewhere = [path for path in _all_keys(Config) if path.split(".")[-1] == key]
    if elsewhere:
        return f"did you mean {' or '.join(repr(path) for path in elsewhere)}?"
    return f"known here: {', '.join(known)}."


def _known_keys(parents: list[Any]) -> list[str]:
    model: Any = Config
    for name in parents:
        field = getattr(model, "model_fields", {}).get(name)
        if field is None:
            return []
        model = _section(field.annotation)
    return sorted(getattr(model, "model_fields", {}))


def _all_keys(model: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        if (section := _section(field.annotation)) is not None:
            keys += _all_keys(section, f"{prefix}{name}.")
    return keys


def _section(annotation: Any) -> type[Section] | None:
    """The section among an annotation's alternatives, if any."""
    options = [annotation, *get_args(annotation)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
