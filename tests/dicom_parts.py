"""Small DICOM files, made with pydicom, with names and dates that must never be seen again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from synthaug.config import Config
from synthaug.digest import digest_json
from tests.small_sources import job

# What a search looks for: in tags, in names of files and folders.
SECRETS = {
    "PatientName": "Zyxwvut^Quentin", "PatientID": "PID-77341-Q", "PatientBirthDate": "19470331",
    "StudyDate": "20190817", "AccessionNumber": "ACC553918", "InstitutionName": "Saint Umbriel Clinic",
    "ReferringPhysicianName": "Okonkwo^Perpetua", "OtherPatientIDs": "SSN-908-77-1",
}  # fmt: skip


def fixed_key(path: Path) -> Path:
    """A key of pseudonyms that is the same in every run of the tests, and with it the splits of so few images."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_text("5" * 64 + "\n", encoding="ascii")
    return path


def key_place(root: Path, home: Path) -> Path:
    """Where the key of a dataset is looked for where no setting names it, with `home` as XDG_DATA_HOME."""
    return home / "synthaug" / "keys" / f"{digest_json(str(root.resolve()))[:16]}.key"


def dataset(pixels: np.ndarray | None = None, **changes: Any) -> Dataset:
    """A CT slice; `changes` are tags by keyword, None removes one."""
    pixels = np.zeros((8, 8), np.uint16) if pixels is None else pixels
    found = Dataset()
    found.SOPClassUID, found.SOPInstanceUID = CTImageStorage, generate_uid()
    found.Modality, found.PatientID, found.PatientName = "CT", "p1", "Doe^J"
    found.StudyInstanceUID, found.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    found.SamplesPerPixel = pixels.shape[-1] if pixels.ndim >= 3 and pixels.shape[-1] == 3 else 1
    found.PhotometricInterpretation = "MONOCHROME2" if found.SamplesPerPixel == 1 else "RGB"
    if found.SamplesPerPixel == 3:
        found.PlanarConfiguration = 0
    plane = pixels.shape[:-1] if found.SamplesPerPixel == 3 else pixels.shape
    found.Rows, found.Columns = plane[-2:]
    if len(plane) == 3:
        found.NumberOfFrames = plane[0]
    found.BitsAllocated = found.BitsStored = pixels.dtype.itemsize * 8
    found.HighBit, found.PixelRepresentation = found.BitsStored - 1, int(pixels.dtype.kind == "i")
    found.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    found["PixelData"].VR = "OW" if found.BitsAllocated > 8 else "OB"
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in changes.items():
        if value is None:
            del found[keyword]
        else:
            setattr(found, keyword, value)
    return found


def save(path: Path, found: Dataset | None = None, **changes: Any) -> Path:
    found = dataset(**changes) if found is None else found
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = found.file_meta
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = found.SOPClassUID, found.SOPInstanceUID
    pydicom.dcmwrite(path, found, enforce_file_format=True)
    return path


def slices(root: Path, counts: dict[str, int], *, per_patient: int = 1, size: int = 8, **changes: Any) -> Path:
    """One folder a class with so many 16-bit pictures of noise, `per_patient` of each patient."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        for number in range(count):
            pixels = generator.integers(0, 1 << 16, (size, size), dtype=np.uint16)
            patient = f"{name}-{number // per_patient}"
            save(root / name / f"{number}.dcm", dataset(pixels, PatientID=patient, **changes))
    return root


def dicom_job(root: Path, *, settings: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A configuration whose labels are folders unless `settings` say otherwise; the key lies beside the data."""
    given = {"key_file": str(root.parent / "private" / "data.key"), **(settings or {})}
    if not {"table", "label_tag"} & given.keys():
        given["folders"] = True
    dataset_section = {**sections.pop("dataset", {}), "dicom": given}
    return job("dicom", root, dataset=dataset_section, **sections)
