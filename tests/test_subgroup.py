"""The column of subgroups: carried from every form that has columns, refused where it does not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import DatasetError
from synthaug.formats.growing_array import GrowingArray
from synthaug.read import read
from tests.small_sources import folder, job, picture, png, put, run

SITES = ["north", "south", None, "north", "", "south"]
READ = ["north", "south", "-", "north", "-", "south"]
AGES = [40.0, 40.0, float("nan"), 60.0, float("nan"), 40.5]


def _names(subgroup: str | None = "site", **more: str) -> dict[str, Any]:
    return {"columns": {**({"subgroup": subgroup} if subgroup else {}), **more}}


def _parquet(root: Path, **columns: Any) -> Path:
    rows = {"image": [png(picture(k)) for k in range(6)], "label": [0, 1] * 3, "site": SITES, **columns}
    pq.write_table(pa.table(rows), root / "data.parquet")
    return root / "data.parquet"


def _as_parquet(root: Path, subgroup: str) -> Config:
    return job("parquet", _parquet(root), dataset=_names(subgroup))


def _as_csv(root: Path, subgroup: str) -> Config:
    lines = ["file_name,label,site", *(f"{k}.png,{k % 2},{site or ''}" for k, site in enumerate(SITES))]
    return _with_metadata(root, "metadata.csv", lines, subgroup)


def _as_json_lines(root: Path, subgroup: str) -> Config:
    lines = [json.dumps({"file_name": f"{k}.png", "label": k % 2, "site": site}) for k, site in enumerate(SITES)]
    return _with_metadata(root, "metadata.jsonl", lines, subgroup)


def _with_metadata(root: Path, name: str, lines: list[str], subgroup: str) -> Config:
    for number in range(6):
        put(root / "data" / f"{number}.png", picture(number))
    (root / "data" / name).write_text("\n".join(lines))
    return job("imagefolder", root / "data", dataset=_names(subgroup))


def _as_npz(root: Path, subgroup: str) -> Config:
    sites = np.array([site or "" for site in SITES])
    arrays = {"train_images": np.stack([picture(k) for k in range(6)]), "train_labels": [0, 1] * 3}
    np.savez(root / "data.npz", **arrays, train_site=sites)
    return job("medmnist", root / "data.npz", dataset=_names(subgroup))


def _as_saved(root: Path, subgroup: str) -> Config:
    from datasets import Dataset

    table = Dataset.from_dict({"image": [{"bytes": png(picture(k)), "path": None} for k in range(6)],
                               "label": [0, 1] * 3, "site": SITES})  # fmt: skip
    table.save_to_disk(root / "data")
    return job("disk", root / "data", dataset=_names(subgroup))


FORMS = [_as_parquet, _as_csv, _as_json_lines, _as_npz, _as_saved]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("form", FORMS)
def test_it_is_carried(form: Any, tmp_path: Path) -> None:
    _, _, index = run(form(tmp_path, "site"), tmp_path / "out")
    assert index["subgroup"].fillna("-").tolist() == READ
    assert index["group"].isna().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_is_no_column_is_refused(form: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DatasetError, match="sites"):
        read(form(tmp_path, "sites"), tmp_path / "out")


def test_the_refusal_names_the_nearest_column_and_the_setting(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    words = r"no column 'sit'. Did you mean 'site'\? Set dataset.columns.subgroup"
    with pytest.raises(DatasetError, match=words):
        read(_as_parquet(tmp_path, "sit"), tmp_path / "out")


@pytest.mark.parametrize("setting", ["group", "subgroup"])
def test_sources_without_columns_have_none_to_name(tmp_path: Path, setting: str) -> None:
    root = folder(tmp_path / "data", {"a": 2, "b": 2})
    (tmp_path / "out").mkdir()
    for config in (
        job("imagefolder", root, dataset={"columns": {setting: "site"}}),
        job("digits", dataset={"columns": {setting: "site"}}),
    ):
        with pytest.raises(DatasetError, match=f"has no column 'site'. It has: none. Set dataset.columns.{setting}"):
            read(config, tmp_path / "out")


def test_numbers_are_spelled_one_way(tmp_path: Path) -> None:
    path = _parquet(tmp_path, age=AGES)
    _, _, index = run(job("parquet", path, dataset=_names("age")), tmp_path / "out")
    assert index["subgroup"].fillna("-").tolist() == ["40", "40", "-", "60", "-", "40.5"]


def test_one_column_can_be_group_and_subgroup(tmp_path: Path) -> None:
    config = job("parquet", _parquet(tmp_path), dataset=_names(group="site"))
    _, _, index = run(config, tmp_path / "out")
    pd.testing.assert_series_equal(index["group"], index["subgroup"], check_names=False)


def test_subgroups_are_part_of_the_digest_only_where_there_are_any(tmp_path: Path) -> None:
    path = _parquet(tmp_path, empty=[None] * 6)
    plain, images, index = run(job("parquet", path, dataset=_names(None)), tmp_path / "plain")
    assert index["subgroup"].isna().all()
    # As it was before there were subgroups: what is finished under that digest can be used again.
    table = [[row.image_id, int(row.label), None, None, False] for row in index.itertuples()]
    pixels = GrowingArray(tmp_path / "again.npy", images.shape[1:], images.dtype)
    with pixels:
        for image in images:
            pixels.append(image)
        pixels.keep(np.ones(6, dtype=bool))
        digest = pixels.digest()
    assert plain.digest == digest_json([table, digest, list(plain.classes), plain.pixels.model_dump(mode="json")])
    assert run(job("parquet", path, dataset=_names("empty")), tmp_path / "empty")[0].digest == plain.digest
    sites = run(job("parquet", path, dataset=_names()), tmp_path / "sites")[0]
    ages = run(job("parquet", _parquet(tmp_path, age=AGES), dataset=_names("age")), tmp_path / "ages")[0]
    assert len({plain.digest, sites.digest, ages.digest}) == 3
