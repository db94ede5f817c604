"""Whole jobs on DICOM files: nothing that names a patient is in what they write or say."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
import yaml

from synthaug.formats.shards import read_image
from tests.conftest import REPOSITORY, tiny_values
from tests.dicom_parts import SECRETS, dataset, fixed_key, key_place, save

pytestmark = pytest.mark.slow

# Names of folders and files, as scanners and people give them, and what else was planted.
FOLDER, FILE = "Vandersloot_Ignatius", "MRN-660912_Haverbrook"
PLANTED = [
    *(part for value in SECRETS.values() for part in value.split("^")),
    "Vandersloot",
    "Haverbrook",
    "MRN-660912",
]


def synthaug(*arguments: object, home: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "synthaug", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=600,
        env={**os.environ, "XDG_DATA_HOME": str(home)},
    )


def hospital(root: Path, n: int = 24) -> Path:
    """Two classes by a tag; names, ids and dates in tags, and in the names of files and folders."""
    generator = np.random.default_rng(1)
    for number in range(n):
        pixels = np.clip(generator.normal(2000 + 900 * (number % 3 == 0), 300, (16, 16)), 0, 4095).astype(np.uint16)
        made = dataset(pixels, **SECRETS, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024)
        made.PatientID = f"{SECRETS['PatientID']}-{number // 2}"
        made.BodyPartExamined = "CHEST" if number % 3 == 0 else "HEAD"
        place = root / f"{FOLDER}_{number // 2}" / f"{FILE}_{number}.dcm"
        save(place, made)
    # What is set aside has names too.
    save(root / FOLDER / f"{FILE}.dcm", dataset(**SECRETS, BurnedInAnnotation="YES"))
    (root / FOLDER / f"{FILE}.txt").write_text(" ".join(PLANTED))
    cut = save(root / FOLDER / f"{FILE}_cut.dcm", dataset(**SECRETS)).read_bytes()
    (root / FOLDER / f"{FILE}_cut.dcm").write_bytes(cut[:-40])
    (root / FOLDER / f"{FILE}_odd.dcm").write_bytes(cut.replace(b"MONOCHROME2 ", b"Okonkwo     "))
    return root


def settings(tmp_path: Path, root: Path, dicom: dict[str, Any], **changes: Any) -> Path:
    values = tiny_values(
        tmp_path / "run",
        dataset={"format": "dicom", "path": str(root), "dicom": dicom},
        image={"size": 16},
        split={"validation": 0.2, "test": 0.2},
        plan={"target_ratio": 1.0, "min_real": 2},
        release={"dicom": {"uid_root": "2.25"}},
        **changes,
    )
    values["dataset"].pop("cut")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def everything_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every name and every byte below a folder, also as it is before compression."""
    for path in sorted(folder.rglob("*")):
        yield "a name", str(path.relative_to(folder)).encode()
        if path.is_symlink():
            yield str(path), os.readlink(path).encode()
        elif path.is_file():
            yield from (((str(path)), data) for data in unpacked(path.read_bytes()))


def unpacked(data: bytes) -> Iterator[bytes]:
    yield data
    if data[:4] == b"PAR1":
        for name, column in pq.read_table(io.BytesIO(data)).to_pydict().items():
            yield name.encode()
            for value in column:
                if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
                    yield from unpacked(value["bytes"])
                else:
                    yield str(value).encode()
    elif data[:4] == b"\x89PNG":
        at = 8
        while at + 8 <= len(data):
            size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            body = data[at + 8 : at + 8 + size]
            if kind == b"zTXt":
                yield zlib.decompress(body.split(b"\0", 1)[1][1:])
            at += size + 12
    elif data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            for name in packed.namelist():
                yield name.encode()
                yield from unpacked(packed.read(name))
    elif data[:2] == b"\x1f\x8b":
        with tarfile.open(fileobj=io.BytesIO(data)) as packed:
            yield " ".join(packed.getnames()).encode()


def given_away(data: bytes) -> list[str]:
    low = data.lower()
    words = [*PLANTED, *(value for value in SECRETS.values() if "^" in value)]
    return [
        word for word in words
        if any(word.lower().encode(code) in low for code in ("utf-8", "utf-16-le", "utf-16-be"))
    ]  # fmt: skip


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    """In plain files, parquet with compression, text of PNGs, names of files: else its silence would mean nothing."""
    pd.DataFrame({"a": ["x", "the Vandersloot case"] * 500}).to_parquet(tmp_path / "a.parquet", compression="zstd")
    (tmp_path / "Haverbrook.txt").write_text("ssn-908-77-1")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("c", "19470331" * 10)
    found = {word for _, data in everything_in(tmp_path) for word in given_away(data)}
    assert found == {"Vandersloot", "Haverbrook", "SSN-908-77-1", "19470331"}


def test_nothing_that_names_a_patient_is_written_or_said(tmp_path: Path) -> None:
    root, home = hospital(tmp_path / "data"), tmp_path / "home"
    fixed_key(key_place(root, home))
    path = settings(tmp_path, root, {"label_tag": "BodyPartExamined"})
    result = synthaug("run", path, "--json", home=home)
    assert result.returncode == 0, result.stderr
    again = synthaug("run", path, home=home)
    summary = json.loads(result.stdout)
    group = pd.read_parquet(next(tmp_path.glob("run/stages/read-*/index.parquet")))["group"].iloc[0]
    affected = synthaug("affected", "--group", group, tmp_path / "run", home=home)
    verified = synthaug("verify", summary["release"], home=home)
    assert again.returncode == affected.returncode == verified.returncode == 0
    for said in (result, again, affected, verified):
        assert not given_away(said.stdout + said.stderr)
    places = {where: found for where, data in everything_in(tmp_path / "run") if (found := given_away(data))}
    assert not places
    # The ledger of splits lies beside the data and may be passed on.
    ledger = next(tmp_path.glob("data.synthaug-splits.json"))
    assert not given_away(ledger.read_bytes())
    # Who is who stands in one private file.
    (listed,) = home.rglob("*.pseudonyms.csv")
    assert listed.stat().st_mode & 0o777 == 0o600
    assert group in listed.read_text()
    assert {"Vandersloot", "PID-77341-Q"} <= set(given_away(listed.read_bytes()))


@pytest.mark.parametrize(
    "fault", ["nothing usable", "unknown tag", "bad table", "output inside", "key inside", "mixed"]
)
def test_errors_give_nothing_away(tmp_path: Path, fault: str) -> None:
    root, home = hospital(tmp_path / "data", 6), tmp_path / "home"
    dicom: dict[str, Any] = {"label_tag": "BodyPartExamined"}
    if fault == "nothing usable":
        for file in root.rglob("*.dcm"):
            file.write_bytes(file.read_bytes()[:-100])
    elif fault == "unknown tag":
        dicom = {"label_tag": "PatientName"}
    elif fault == "bad table":
        table = tmp_path / "labels.csv"
        table.write_text(f"PatientID,label\n{SECRETS['PatientID']}-0,a\n{SECRETS['PatientID']}-0,b\n")
        dicom = {"table": str(table), "key": "PatientID"}
    elif fault == "key inside":
        dicom["key_file"] = str(tmp_path / "run" / "x.key")
    elif fault == "mixed":
        colour = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        save(root / FOLDER / f"{FILE}_colour.dcm", dataset(colour, **SECRETS, BodyPartExamined="HEAD"))
        dicom["photometric"] = "any"
    path = settings(tmp_path, root, dicom)
    output = ["--output", root / "run"] if fault == "output inside" else []
    result = synthaug("run", path, *output, home=home)
    assert result.returncode == 2, result.stderr
    assert not given_away(result.stdout + result.stderr)
    assert b"Traceback" not in result.stderr
    run = root / "run" if fault == "output inside" else tmp_path / "run"
    assert not [found for _, data in everything_in(run) if (found := given_away(data))]


def test_a_release_loads_without_its_dicom_copies_and_they_hold_the_same_pixels(tmp_path: Path) -> None:
    root, home = hospital(tmp_path / "data"), tmp_path / "home"
    fixed_key(key_place(root, home))
    path = settings(tmp_path, root, {"label_tag": "BodyPartExamined", "window": [1000, 3000]})
    # Every sample is let through.
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["split"]["validation"] = 0
    values["audit"]["third_class_probability"] = 1.0
    values["privacy"] = {"max_membership_auc": None, "max_near_copy_rate": None}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    result = synthaug("run", path, "--json", home=home)
    assert result.returncode == 0, result.stderr
    release = Path(json.loads(result.stdout)["release"])
    manifest = pd.read_parquet(release / "manifest.parquet")
    files = sorted((release / "dicom").iterdir())
    assert [file.stem for file in files] == sorted(manifest["sample_id"])
    for row in manifest.itertuples():
        stored = read_image(release / row.shard, row.row)
        copy = pydicom.dcmread(release / "dicom" / f"{row.sample_id}.dcm")
        assert np.array_equal(copy.pixel_array, stored[:, :, 0])
    data = datasets.load_dataset(str(release), cache_dir=str(tmp_path / "cache"))
    assert sum(data["train"]["is_synthetic"]) == len(files)
    # One of them changed, or gone, is no whole release any more.
    files[0].write_bytes(files[0].read_bytes()[:-2] + b"\1\1")
    files[1].unlink()
    checked = synthaug("verify", release, "--json", home=home)
    assert checked.returncode == 1
    problems = "\n".join(json.loads(checked.stdout)["problems"])
    assert files[0].name in problems
    assert files[1].name in problems


def test_the_ct_configuration_from_end_to_end(tmp_path: Path, shared_data: Path) -> None:
    """configs/dicom.yaml with a tiny budget."""
    if not (shared_data / "dicom-ct").is_dir():
        pytest.skip(f"{shared_data / 'dicom-ct'} is absent")
    values = yaml.safe_load((REPOSITORY / "configs" / "dicom.yaml").read_text(encoding="utf-8"))
    values["dataset"]["path"] = str(shared_data / "dicom-ct")
    values["dataset"]["dicom"]["table"] = str(shared_data / "dicom-ct" / "labels.csv")
    values["train"] = {"images": 64, "batch_size": 8, "width": 32, "threads": 1}
    values["sample"] = {"steps": 2, "micro_batch": 8, "threads": 1}
    values["audit"] = {"classifier_steps": 10, "min_coverage": 0, "third_class_probability": 1.0}
    fixed_key(key_place(shared_data / "dicom-ct", tmp_path / "home"))
    path = tmp_path / "dicom.yaml"
    path.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "run")}), encoding="utf-8")
    result = synthaug("run", path, "--json", home=tmp_path / "home")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["counts"]["no_contrast"]["synthetic"] > 0
    spec = json.loads((Path(summary["release"]) / "release.json").read_text())["pixels"]
    assert (spec["dtype"], spec["size"], spec["colour"]) == ("uint16", 64, "grey")
    index = pd.read_parquet(next(tmp_path.glob("run/stages/read-*/index.parquet")))
    splits = pd.read_parquet(next(tmp_path.glob("run/stages/split-*/splits.parquet")))
    together = splits.merge(index[["row", "group"]], on="row").groupby("group")["split"].nunique()
    assert len(together) == 19
    assert together.max() == 1
    said = result.stdout + result.stderr
    # Names of files (with ages) and of patients.
    assert b"TCGA" not in said
    assert b"AGE_0" not in said
    for where, data in everything_in(tmp_path / "run"):
        assert b"AGE_0" not in data, where
        assert b"TCGA-" not in data, where
    if shutil.which("dciodvfy") is not None:
        file = next((Path(summary["release"]) / "dicom").iterdir())
        checked = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, timeout=60)
        errors = [line for line in checked.stderr.splitlines() if line.startswith("Error")]
        assert not [line for line in errors if "(0008,001c)" not in line]
