"""DICOM copies of samples: plainly synthetic, valid, the same each time, and read back with equal pixels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthaug.config import DicomCopies, parse_config
from synthaug.digest import digest_directory
from synthaug.errors import ConfigError
from synthaug.formats.dicom_out import DICOM_DIR, DicomSample, check_dicom, uid, write_dicom
from synthaug.records import PixelSpec
from tests.conftest import tiny_values
from tests.dicom_parts import dicom_job
from tests.small_sources import run

ROOT = "1.2.826.0.1.3680043.8.498"
FORMS = [("uint8", "grey"), ("uint16", "grey"), ("float32", "grey"), ("uint8", "rgb")]
CLASSES = ["benign\\ü", "malignant " * 20]


def spec_of(dtype: str, colour: str, size: int = 9) -> PixelSpec:
    low, high = (-1024.0, 3071.0) if dtype == "float32" else (0.0, float(np.iinfo(dtype).max))
    return PixelSpec(
        channels=3 if colour == "rgb" else 1, dtype=dtype, colour=colour, low=low, high=high, size=size,  # type: ignore[arg-type]
        fit="none", interpolation="none", smallest=(size, size), largest=(size, size),
        conversions={"modality LUT or rescale applied, values in HU": 3} if dtype == "float32" else {},
    )  # fmt: skip


def samples(spec: PixelSpec, checkpoint: str = "checkpoint", n: int = 4) -> list[DicomSample]:
    noise = np.random.default_rng(3).uniform(-1.1, 1.1, (n, spec.size, spec.size, spec.channels))
    return [
        DicomSample(
            image, f"syn-{number:020x}", number % 2, checkpoint_digest=checkpoint, drawn_label=number % 2,
            class_index=number // 2, version="0.1.0",
        )
        for number, image in enumerate(spec.from_unit(noise))
    ]  # fmt: skip


def write(
    folder: Path,
    spec: PixelSpec,
    sop_class: Literal["secondary-capture", "ct", "mr", "cr"] = "secondary-capture",
    root: str = ROOT,
    checkpoint: str = "checkpoint",
) -> list[Path]:
    folder.mkdir(parents=True)
    settings = DicomCopies(uid_root=root, sop_class=sop_class)
    write_dicom(settings, spec, CLASSES, "job", samples(spec, checkpoint), folder)
    return sorted((folder / DICOM_DIR).iterdir())


@pytest.mark.parametrize(("dtype", "colour"), FORMS)
def test_a_copy_says_what_it_is(tmp_path: Path, dtype: str, colour: str) -> None:
    files = write(tmp_path / "release", spec_of(dtype, colour))
    found = [pydicom.dcmread(file) for file in files]
    for file, one in zip(files, found, strict=True):
        assert one.SyntheticData == "YES"
        assert list(one.ImageType) == ["DERIVED", "SECONDARY"]
        assert one.SOPClassUID.name == "Secondary Capture Image Storage"
        assert one.ConversionType == "SYN"
        assert "SYNTHETIC" in str(one.PatientName)
        assert "SYNTHETIC" in one.PatientID
        assert file.stem in one.ImageComments
        assert one.ContributingEquipmentSequence[0].Manufacturer == "synthaug"
        assert one.ContributingEquipmentSequence[0].SoftwareVersions
        assert one.SOPInstanceUID.startswith(f"{ROOT}.")
    assert len({one.SOPInstanceUID for one in found}) == len({one.PatientID for one in found}) == len(found)
    assert len({one.SeriesInstanceUID for one in found}) == 2
    assert len({one.StudyInstanceUID for one in found}) == 1


def test_equal_samples_give_equal_bytes_and_others_other_uids(tmp_path: Path) -> None:
    spec = spec_of("uint16", "grey")
    first, again = write(tmp_path / "a", spec), write(tmp_path / "b", spec)
    assert digest_directory(tmp_path / "a") == digest_directory(tmp_path / "b")
    other = write(tmp_path / "c", spec, checkpoint="another checkpoint")
    uids = [{pydicom.dcmread(file).SOPInstanceUID for file in files} for files in (first, again, other)]
    assert uids[0] == uids[1]
    assert not uids[0] & uids[2]


@given(
    parts=st.lists(st.text(), min_size=1, max_size=4),
    root=st.sampled_from(["2.25", "1.2.840.99999", "1." + "9" * 38, "1.2"]),
)
def test_uids_are_valid(parts: list[str], root: str) -> None:
    made = pydicom.uid.UID(uid(root, *parts))
    assert made.is_valid
    assert made.startswith(f"{root}.")
    assert made == uid(root, *parts)


@pytest.mark.parametrize(("dtype", "colour"), FORMS)
def test_out_and_in_again(tmp_path: Path, dtype: str, colour: str) -> None:
    spec = spec_of(dtype, colour)
    for file in write(tmp_path / "release", spec):
        target = tmp_path / "data" / "ab"[int(file.stem[-1]) % 2] / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    config = dicom_job(tmp_path / "data", settings={"secondary_captures": True}, size=9)
    with pytest.raises(Exception, match="no class at all"):
        run(config, tmp_path / "read")
    # They say that they are synthetic, so a job takes none of them for real ones. As another tool's images they pass.
    from synthaug.read import read
    from synthaug.records import IMAGES_FILE

    (tmp_path / "again").mkdir()
    source = read(config, tmp_path / "again", foreign=True)
    assert source.n_synthetic == source.n_images == 4
    order = [0, 2, 1, 3]  # by class, then by name
    wanted = np.stack([samples(spec)[number].image for number in order])
    found = np.load(tmp_path / "again" / IMAGES_FILE)
    if dtype == "float32":
        assert np.abs(found - wanted).max() <= (spec.high - spec.low) / 131070 * 1.001
    else:
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "colour", "sop_class"),
    [
        *((*form, "secondary-capture") for form in FORMS),
        *((dtype, "grey", name) for dtype in ("uint16", "float32") for name in ("ct", "mr", "cr")),
    ],
)
def test_the_validator_finds_no_error(tmp_path: Path, dtype: str, colour: str, sop_class: Any) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian's dicom3tools) is not installed")
    spec = spec_of(dtype, colour)
    check_dicom(DicomCopies(uid_root=ROOT, sop_class=sop_class), spec)
    file = write(tmp_path / "release", spec, sop_class)[1]
    said = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, timeout=60).stderr
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    # Debian's program is older than Synthetic Data, which came into the standard in 2023.
    errors = [line for line in errors if "(0008,001c)" not in line]
    assert not errors
    assert {"secondary-capture": "SCImage", "ct": "CTImage", "mr": "MRImage", "cr": "CRImage"}[sop_class] in said


@pytest.mark.parametrize(
    ("dtype", "colour", "sop_class", "message"),
    [
        ("uint16", "rgb", "secondary-capture", "8-bit RGB"),
        ("uint8", "rgba", "secondary-capture", "8-bit RGB"),
        ("uint8", "grey", "ct", "more than 8 bits"),
        ("uint8", "rgb", "mr", "more than 8 bits"),
    ],
)
def test_what_dicom_cannot_hold_is_refused(dtype: str, colour: str, sop_class: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_dicom(DicomCopies(uid_root=ROOT, sop_class=sop_class), spec_of(dtype, colour))


def test_without_pydicom_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'synthaug\[dicom\]'"):
        check_dicom(DicomCopies(uid_root=ROOT))


@pytest.mark.parametrize("root", ["", "1.02.3", "3.1", "x", "1." + "9" * 60, "1.2."])
def test_a_root_that_is_none_is_refused(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uid_root"):
        parse_config(tiny_values(tmp_path, release={"dicom": {"uid_root": root}}))
