"""BUSI with a split of its own: stratified by class, near-duplicates on one side. None is published with it."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.config import parse_config
from synthaug.formats.atomic import whole_directory
from synthaug.pipeline import plan_only
from synthaug.records import INDEX_FILE, SPLITS_FILE

VALIDATION, TEST = 0.15, 0.3
_SEED = 0


def stratified_busi(source: Path, prepared: Path) -> Path:
    """A copy of the folder with metadata.csv (file_name, label, split, group), made once.

    The groups are the pipeline's own clusters of near-duplicates (`split.moved_duplicates`). BUSI has no patient ids,
    so that images of one patient may still be on both sides: said wherever a figure of it is told.
    """
    folder = prepared / "busi64"
    if (folder / "metadata.csv").is_file():
        return folder
    run = prepared / "busi64-clusters"
    config = parse_config(
        {
            "name": "busi64-clusters",
            "output": str(run),
            "dataset": {"format": "imagefolder", "path": str(source)},
            "image": {"size": 64},
            # Not beside the published files.
            "split": {"ledger": str(prepared / "busi64-clusters.ledger.json")},
        }
    )
    plan_only(config)
    (splits,) = run.glob(f"stages/split-*/{SPLITS_FILE}")
    (index,) = run.glob(f"stages/read-*/{INDEX_FILE}")
    table = pd.read_parquet(splits)[["row", "label", "group_key"]].merge(
        pd.read_parquet(index)[["row", "origin"]], on="row", validate="one_to_one"
    )
    table["split"] = stratify(table["label"].to_numpy(), pd.factorize(table["group_key"])[0], seed=_SEED)
    with whole_directory(folder) as temporary:
        rows = [["file_name", "label", "split", "group"]]
        for item in table.itertuples():
            origin = Path(item.origin)
            path = origin if origin.is_absolute() else source / origin
            name = os.path.join(path.parent.name, path.name)
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / name)
            rows.append([name, path.parent.name, item.split, item.group_key])
        with (temporary / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def stratify(labels: np.ndarray, groups: np.ndarray, *, seed: int) -> np.ndarray:
    """train, validation or test of every image, [n] str; groups stay whole, each class has its share in every split.

    A group counts to its most frequent class. Within a class, groups in random order fill test up to its share of the
    class's images, then validation; the rest is for training.
    """
    table = pd.DataFrame({"label": labels, "group": groups})
    stratum = table.groupby("group")["label"].agg(lambda own: own.mode().iloc[0])
    size = table.groupby("group").size()
    random = np.random.default_rng(seed)
    place: dict[int, str] = {}
    for label in np.unique(stratum):
        members = random.permutation(stratum.index[stratum == label].to_numpy())
        upto = np.cumsum(size[members].to_numpy())
        n = upto[-1]
        for group, before in zip(members, upto - size[members].to_numpy(), strict=True):
            place[int(group)] = (
                "test" if before < TEST * n else "validation" if before < (TEST + VALIDATION) * n else "train"
            )
    return table["group"].map(place).to_numpy()
