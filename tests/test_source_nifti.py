"""NIfTI volumes: the slice that was asked for, upright, with its values, and no names given away."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest

from synthaug.config import parse_config
from synthaug.errors import ConfigError, DatasetError
from synthaug.pipeline import augment
from synthaug.records import SET_ASIDE_FILE, Source
from synthaug.verify import verify
from tests.conftest import tiny_values
from tests.dicom_parts import fixed_key
from tests.small_sources import job, run

# One of each kind of orientation: axes in another order, and running the other way.
AFFINES = {
    "RAS": np.diag([1.0, 1, 1, 1]),
    "LPS": np.diag([-1.0, -1, 1, 1]),
    "LPI": np.diag([-1.0, -1, -1, 1]),
    "ASR": np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
    "SLP": np.array([[0, -1.0, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
}


def volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, AFFINES["RAS"] if affine is None else affine), path)
    return path


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 12, shape).astype(np.int16)


def read(root: Path, tmp_path: Path, *, size: int = 8, **settings: Any) -> tuple[Source, np.ndarray, pd.DataFrame]:
    given = {"key_file": str(tmp_path / "private" / "x.key"), **settings}
    if "table" not in given:
        given["folders"] = True
    return run(job("nifti", root, dataset={"nifti": given}, size=size), tmp_path / "read")


def upright(values: np.ndarray, affine: np.ndarray, plane: str, number: int) -> np.ndarray:
    """The slice of a volume that nibabel has turned to RAS: rows from the top, columns from the patient's left."""
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine)).get_fdata()
    cut = np.take(turned, number, {"sagittal": 0, "coronal": 1, "axial": 2}[plane])
    return cut.T[::-1]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", AFFINES)
def test_slices_are_upright_whatever_the_order_of_the_axes(tmp_path: Path, name: str, plane: str) -> None:
    values = noise(1, 8, 8, 8)
    volume(tmp_path / "data" / "a" / "x.nii.gz", values, AFFINES[name])
    volume(tmp_path / "data" / "b" / "x.nii", noise(2, 8, 8, 8))
    _, images, _ = read(tmp_path / "data", tmp_path, plane=plane, slices=[2, 5])
    for number, image in zip((1, 4), images[:2], strict=True):
        assert np.array_equal(image[:, :, 0], upright(values, AFFINES[name], plane, number).astype(np.float32))


@pytest.mark.parametrize(("dtype", "kept"), [("uint8", "uint8"), ("uint16", "uint16"), ("int16", "float32")])
def test_values_keep_their_depth(tmp_path: Path, dtype: str, kept: str) -> None:
    values = (noise(1, 8, 8, 3) % 200).astype(dtype)
    for name in "ab":
        volume(tmp_path / "data" / name / "x.nii", values + np.array(ord(name) % 2, dtype))
    _, images, _ = read(tmp_path / "data", tmp_path)
    assert images.dtype == kept
    assert images.min() >= values.min()


def test_a_scale_in_the_header_is_applied(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(-50, 20, (8, 8, 1)).astype(np.float64)
    made = nibabel.Nifti1Image(values, AFFINES["RAS"])
    made.header.set_data_dtype(np.int16)
    (tmp_path / "data" / "a").mkdir(parents=True)
    nibabel.save(made, tmp_path / "data" / "a" / "x.nii")
    volume(tmp_path / "data" / "b" / "x.nii", noise(2, 8, 8, 1))
    _, images, _ = read(tmp_path / "data", tmp_path)
    assert np.abs(images[0, :, :, 0] - values[:, :, 0].T[::-1]).max() < 0.01


def test_labels_from_a_table_and_a_file_is_a_patient(tmp_path: Path) -> None:
    for number in range(3):
        volume(tmp_path / "data" / f"Quentin{number}.nii.gz", noise(number, 8, 8, 4))
    (tmp_path / "labels.csv").write_text("file,label\nQuentin0,ill\nQuentin1.nii.gz,well\nZyxwvut,well\n")
    source, _, index = read(tmp_path / "data", tmp_path, table=str(tmp_path / "labels.csv"), slices="all")
    assert [source.classes[label] for label in index["label"]] == ["ill"] * 4 + ["well"] * 4
    assert index["group"].nunique() == 2
    assert source.set_aside_reasons == {"missing file": 1, "not in the table": 1}
    written = (tmp_path / "read" / SET_ASIDE_FILE).read_text() + index.to_csv()
    assert "Quentin" not in written
    assert "Zyxwvut" not in written
    assert "Quentin0.nii.gz" in (tmp_path / "private" / "x.pseudonyms.csv").read_text()


def test_what_cannot_be_used_is_set_aside_by_reason(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in "ab":
        volume(root / name / "good.nii", noise(ord(name), 8, 8, 3))
    whole = volume(root / "b" / "cut.nii.gz", noise(5, 32, 32, 32)).read_bytes()
    (root / "b" / "cut.nii.gz").write_bytes(whole[: len(whole) // 3])
    (root / "b" / "short.nii").write_bytes(gzip.decompress(whole)[:2000])
    (root / "b" / "empty.nii").touch()
    (root / "b" / "junk.nii").write_bytes(b"junk" * 200)
    (root / "b" / "notes.txt").write_text("x")
    volume(root / "b" / "flat.nii", noise(6, 8, 8))
    source, _, _ = read(root, tmp_path)
    assert source.n_images == 2
    reasons = source.set_aside_reasons
    assert {name: reasons[name] for name in ("empty file", "not NIfTI", "wrong shape", "truncated")} == {
        "empty file": 1, "not NIfTI": 1, "wrong shape": 1, "truncated": 2,
    }  # fmt: skip
    assert sum(reasons.values()) == 6


def test_a_header_that_claims_too_much_is_not_decoded(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in "ab":
        volume(root / name / "good.nii", noise(ord(name), 8, 8, 3))
    made = bytearray((root / "b" / "good.nii").read_bytes())
    made[42:48] = b"".join(side.to_bytes(2, "little") for side in (30000, 30000, 3))
    (root / "b" / "wide.nii").write_bytes(made)
    source, _, _ = read(root, tmp_path)
    assert source.set_aside_reasons == {"too large": 1}


@pytest.mark.parametrize("section", [None, {}, {"folders": True, "table": "x.csv"}])
def test_settings_that_contradict_each_other_are_refused(section: Any) -> None:
    dataset = {"format": "nifti", "path": "x", **({} if section is None else {"nifti": section})}
    with pytest.raises(ConfigError, match=r"dataset\.nifti"):
        parse_config({"name": "n", "output": "o", "image": {"size": 8}, "dataset": dataset})


def test_without_nibabel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume(tmp_path / "data" / "a" / "x.nii", noise(1, 8, 8, 1))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(DatasetError, match=r"pip install 'synthaug\[nifti\]'"):
        read(tmp_path / "data", tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DatasetError, match="holds no files"):
        read(tmp_path / "data", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n_volumes", [2, 4, 7])
def test_n_channels_from_end_to_end(tmp_path: Path, n_volumes: int) -> None:
    """Volumes of one body as channels of an image, through training, samples, audit and release."""
    for number in range(36):
        brightness = 1000 * (number % 3 == 0)
        values = noise(number, 8, 8, 3, n_volumes) + np.int16(brightness)
        volume(tmp_path / "data" / ("ill" if number % 3 == 0 else "well") / f"{number}.nii.gz", values)
    nifti = {"folders": True, "volumes": "channels", "key_file": str(fixed_key(tmp_path / "private" / "x.key"))}
    values = tiny_values(
        tmp_path / "run",
        dataset={"format": "nifti", "path": str(tmp_path / "data"), "nifti": nifti},
        plan={"target_ratio": 1.0},
        train={"images": 64},
    )
    del values["dataset"]["cut"]
    summary = augment(parse_config(values))
    assert verify(summary.release).ok
    assert summary.counts["ill"]["synthetic"] > 0
    import datasets

    train = datasets.load_dataset(str(summary.release), split="train", cache_dir=str(tmp_path / "cache"))
    shapes = {np.asarray(row["image"]).shape for row in train}
    assert shapes == {(8, 8, n_volumes)}
