"""The settings of the benchmark: which images, which class is scarce, and the configuration a user would write for
them.

A replicate k draws another rare subset (`dataset.cut_seed` k) and another generator (`seed` k); the classifiers of its
trial have ten seeds. Sets without a cut (BreastMNIST, all of BUSI, Fashion-MNIST-LT, whose tail is as published) have
one rare subset, and their replicates differ by the generator alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.method.busi import stratified_busi
from synthaug.config import Config, parse_config

# Share of the budget that our training is told: sampling gets the rest.
OUR_SHARE = 0.9
# Samples of a scarce class in the contest with peers, as a multiple of its real images: most peers draw so slowly that
# the whole plan would not fit into the budget.
PEER_DOSE = 3


class MissingData(Exception):
    """The images of a setting are not on this machine."""


@dataclass(frozen=True)
class Setting:
    """One rare-class setting."""

    name: str
    family: str  # sets of one family share images: nothing trained on one is tested on another
    size: int
    minutes: float  # of training and sampling in the utility cells
    trial_minutes: float  # what a trial takes on two idle cores, for the list of cells
    scarce: tuple[str, ...]
    n_rare: int  # real training images of a scarce class, the median where they differ
    file: str | None = None
    words: str = ""


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("digits", "digits", 8, 2, 2, ("1", "3", "6", "8"), 10, words="four of ten digits cut to 10, 8 px"),
        Setting("pneumonia-60", "chest X-ray", 28, 5, 3, ("normal",), 60, "pneumoniamnist.npz", "normal = 60, 28 px"),
        Setting("pneumonia-20", "chest X-ray", 28, 5, 3, ("normal",), 20, "pneumoniamnist.npz", "normal = 20, 28 px"),
        Setting(
            "pneumonia-200", "chest X-ray", 28, 5, 4, ("normal",), 200, "pneumoniamnist.npz", "normal = 200, 28 px"
        ),
        Setting("busi-30", "breast ultrasound", 64, 15, 9, ("normal",), 30, "busi64", "normal = 30, 64 px"),
        Setting("busi-all", "breast ultrasound", 64, 15, 9, ("malignant", "normal"), 110, "busi64", "as it is, 64 px"),
        Setting(
            "breastmnist", "breast ultrasound", 28, 5, 4, ("malignant",), 147, "breastmnist.npz", "as it is, 28 px"
        ),
        Setting(
            "fashion-lt100", "clothes", 28, 5, 10, (), 166, "fashionmnist_lt100.npz", "long tail 6000 to 60, 28 px"
        ),
    )
}

_FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
_NAMES = {
    "pneumoniamnist.npz": ["normal", "pneumonia"],
    "breastmnist.npz": ["malignant", "other"],
    "fashionmnist_lt100.npz": _FASHION,
}


def make_config(
    setting: Setting,
    *,
    replicate: int,
    minutes: float,
    output: Path,
    data: Path,
    prepared: Path,
    threads: int,
    trial_minutes: float,
    dose: int | None = None,
    device: str = "cpu",
) -> Config:
    """The configuration of a replicate.

    Args:
        minutes: For training and sampling together.
        output: Run folder; peers of the same replicate share it, so that split and judge are the same.
        data: Folder of the published files.
        prepared: Folder for what is made of them (the stratified split of BUSI).
        dose: Samples of a scarce class per real one; None: the plan that a user gets.
        device: Where training and sampling run, "cpu" or "cuda"; the recipe is the same.

    Raises:
        MissingData: The file is not in `data`.
    """
    dataset: dict[str, Any] = {"format": "digits"}
    values: dict[str, Any] = {
        "name": setting.name,
        "output": str(output),
        "seed": replicate,
        "dataset": dataset,
        "image": {"size": setting.size},
        "train": {"minutes": OUR_SHARE * minutes, "threads": threads, "device": device},
        "sample": {"threads": threads},
        "evaluate": {"minutes": trial_minutes},
        # Measured and reported all the same; a refusal would hide the figure.
        "privacy": {"max_membership_auc": None, "max_near_copy_rate": None},
    }
    if setting.file is not None:
        path = data / setting.file
        if not path.exists():
            raise MissingData(f"{path} is not there; --data names the folder of the published files")
        if setting.file == "busi64":
            dataset |= {
                "format": "imagefolder",
                "path": str(stratified_busi(path, prepared)),
                "columns": {"split": "split", "group": "group"},
            }
        else:
            dataset |= {"format": "medmnist", "path": str(path), "class_names": _NAMES[setting.file]}
    cut = dict.fromkeys(setting.scarce, setting.n_rare) if setting.name not in UNCUT else {}
    if cut:
        dataset |= {"cut": cut, "cut_seed": replicate}
    plan: dict[str, Any] = {}
    if setting.name == "digits":
        plan["include"] = list(setting.scarce)
    elif setting.name == "fashion-lt100":
        plan["target_ratio"] = 0.1  # 600 of each class: full balance would ask for 40,000 images
    values["plan"] = plan
    config = parse_config(values, where=f"the benchmark's configuration of {setting.name}")
    return config if dose is None else with_dose(config, dose)


def with_dose(config: Config, dose: int) -> Config:
    """At most `dose` samples per real image of a scarce class, told to the plan as its share of synthetic images.

    n_target = floor(n_real / (1 - share)) with share = dose / (1 + dose), nudged so that rounding keeps the last image.
    """
    share = min(config.plan.max_synthetic_share, dose / (1 + dose) + 1e-9)
    return config.model_copy(update={"plan": config.plan.model_copy(update={"max_synthetic_share": share})})


# Their scarce classes are as they were published.
UNCUT = ("busi-all", "breastmnist", "fashion-lt100")
