"""Synthetic images as DICOM files (PS3.3, PS3.10): what they are stands in tags that any viewer shows.

A copy is a Secondary Capture (PS3.3 A.8.1) or an image of a modality (A.2 CR, A.3 CT, A.4 MR), in explicit VR little
endian, not compressed. Equal samples give equal bytes: UIDs are hashes, and there are no dates. The patient is no
person, each sample is one of its own, and nothing of the real files is taken over.

uint8 and uint16 are stored as they are. float32 is stored as 16 bits with a rescale (RescaleSlope, RescaleIntercept)
from `PixelSpec.low` to `high`, so it comes back within half a step, 1/131070 of the range.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthaug.config import DicomCopies
from synthaug.errors import ConfigError
from synthaug.records import PixelSpec

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DICOM_DIR = "dicom"
# SOP class and modality of the copies.
_CLASSES = {
    "secondary-capture": ("1.2.840.10008.5.1.4.1.1.7", "OT"),
    "ct": ("1.2.840.10008.5.1.4.1.1.2", "CT"),
    "mr": ("1.2.840.10008.5.1.4.1.1.4", "MR"),
    "cr": ("1.2.840.10008.5.1.4.1.1.1", "CR"),
}
_FULL = 65535
_LONGEST_UID = 64
_LONGEST_LO = 64


@dataclass(frozen=True)
class DicomSample:
    """One synthetic image on its way into a file."""

    image: np.ndarray  # [size, size, channels], native values
    sample_id: str
    label: int
    # Of the drawing, so that a copy is the same in every release that keeps the sample.
    checkpoint_digest: str
    drawn_label: int  # the checkpoint's own number of the class
    class_index: int  # from 0, in the class's endless sequence
    version: str  # of synthaug


def check_dicom(settings: DicomCopies, spec: PixelSpec | None = None) -> None:
    """Refuse copies that cannot be made: before any work, and again when the form of the images is known.

    Raises:
        ConfigError: pydicom is not installed, or DICOM cannot hold such images in that class.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ConfigError(
            "release.dicom needs pydicom, which is not installed. Install it with: pip install 'synthaug[dicom]'"
        ) from None
    if spec is None:
        return
    if spec.colour not in ("grey", "rgb") or (spec.colour == "rgb" and spec.dtype != "uint8"):
        raise ConfigError(
            f"release.dicom takes grey images and 8-bit RGB, and these are {spec.dtype}, {spec.channels} channels, "
            f"'{spec.colour}'. Set image.colour, or take release.dicom out."
        )
    if settings.sop_class != "secondary-capture" and (spec.colour != "grey" or spec.dtype == "uint8"):
        raise ConfigError(
            f"release.dicom.sop_class: {settings.sop_class} takes grey images of more than 8 bits, and these are "
            f"{spec.dtype} '{spec.colour}'. Set it to secondary-capture."
        )


def write_dicom(
    settings: DicomCopies,
    spec: PixelSpec,
    classes: Sequence[str],
    job: str,
    samples: Iterable[DicomSample],
    release: Path,
) -> None:
    """Write a file `dicom/<sample_id>.dcm` for each sample into a release that is being made.

    Args:
        spec: Of the images; `check_dicom` has passed it.
        classes: Names by label. A study holds what was drawn from one checkpoint, a series one class of that.
        job: Its name; with the checkpoint it tells these samples from others in the UIDs.

    Raises:
        OSError: It cannot be written.
    """
    folder = release / DICOM_DIR
    folder.mkdir()
    for sample in samples:
        dataset = _dataset(settings, spec, classes[sample.label], job, sample)
        dataset.save_as(folder / f"{sample.sample_id}.dcm", enforce_file_format=True)


def uid(root: str, *parts: str) -> str:
    """A UID below a root (PS3.5 9), the same for the same parts; below 2.25 it is that of a UUID (PS3.5 B.2)."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    if root == "2.25":
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"
    room = _LONGEST_UID - len(root) - 1
    # A component of a UID does not begin with 0.
    return f"{root}.{1 + int.from_bytes(digest, 'big') % (10**room - 1)}"[:_LONGEST_UID]


def _dataset(settings: DicomCopies, spec: PixelSpec, class_name: str, job: str, sample: DicomSample) -> Dataset:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    sop_class, modality = _CLASSES[settings.sop_class]

    def new(*parts: str) -> str:
        return uid(settings.uid_root, "synthaug", job, sample.checkpoint_digest, *parts)

    found = Dataset()
    found.SpecificCharacterSet = "ISO_IR 192"
    found.SOPClassUID = sop_class
    found.SOPInstanceUID = new("image", sample.sample_id, hashlib.sha256(sample.image.tobytes()).hexdigest())
    found.SyntheticData = "YES"
    found.ImageType = ["DERIVED", "SECONDARY"]
    found.Modality = modality
    found.Manufacturer = found.ManufacturerModelName = "synthaug"
    found.SoftwareVersions = sample.version
    # Patient: no person, and plainly so.
    found.PatientName = "SYNTHETIC^NOT A PERSON"
    found.PatientID = _text(f"SYNTHETIC {sample.sample_id}")
    found.PatientBirthDate = found.PatientSex = ""
    found.PatientComments = "Synthetic image. There is no such patient."
    # Study and series.
    found.StudyInstanceUID, found.SeriesInstanceUID = new("study"), new("series", class_name)
    found.StudyDate = found.StudyTime = found.ReferringPhysicianName = found.AccessionNumber = ""
    found.StudyID, found.StudyDescription = "SYNTHETIC", "Synthetic images"
    found.SeriesNumber, found.SeriesDescription, found.Laterality = sample.drawn_label + 1, _text(class_name), ""
    # Gaps are allowed (PS3.3 C.7.6.1: "a number that identifies this image"): where samples were not released.
    found.InstanceNumber, found.PatientOrientation = sample.class_index + 1, None
    found.BurnedInAnnotation = "NO"
    found.ImageComments = f"Synthetic image made by synthaug {sample.version}, sample {sample.sample_id}"
    found.DerivationDescription = f"Drawn from a generator trained on real images; sample {sample.sample_id}"
    found.ContributingEquipmentSequence = [_equipment(sample)]
    _add_class(found, settings.sop_class, new, sample.sample_id)
    _add_pixels(found, spec, sample.image, settings.sop_class)
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = sop_class
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    return found


def _equipment(sample: DicomSample) -> Dataset:
    """Who made it (PS3.3 C.12.1.1.5), with its purpose out of context group 7005."""
    from pydicom.dataset import Dataset

    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = "109102", "DCM", "Processing Equipment"
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.Manufacturer = item.ManufacturerModelName = "synthaug"
    item.SoftwareVersions = sample.version
    item.ContributionDescription = f"Drew the image from a generative model: sample {sample.sample_id}"
    return item


def _add_class(found: Dataset, sop_class: str, new: Any, sample_id: str) -> None:
    """What the class asks for beyond the rest. There is no scanner and no body, so nothing is told of either."""
    if sop_class == "secondary-capture":
        found.ConversionType = "SYN"  # "synthetic image", a defined term of C.8.6.1
        return
    if sop_class == "cr":
        found.BodyPartExamined = found.ViewPosition = ""
        return
    found.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if sop_class == "ct" else "OTHER"]
    # Distances are wanted; one millimetre a pixel, in a space that each sample has for itself.
    found.PixelSpacing = [1, 1]
    found.ImageOrientationPatient, found.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    found.FrameOfReferenceUID = new("frame", sample_id)
    found.PositionReferenceIndicator = found.PatientPosition = ""
    found.SliceThickness = found.AcquisitionNumber = None
    if sop_class == "ct":
        found.KVP = None
    else:
        found.ScanningSequence, found.SequenceVariant, found.ScanOptions = "RM", "NONE", ""
        found.MRAcquisitionType = ""
        found.RepetitionTime = found.EchoTime = found.EchoTrainLength = None


def _add_pixels(found: Dataset, spec: PixelSpec, image: np.ndarray, sop_class: str) -> None:
    from pydicom.valuerep import format_number_as_ds

    rescaled = spec.dtype == "float32"
    values = image
    if rescaled:
        step = (spec.high - spec.low) / _FULL
        values = np.rint(np.clip((image.astype(np.float64) - spec.low) / step, 0, _FULL)).astype(np.uint16)
        found.RescaleSlope, found.RescaleIntercept = format_number_as_ds(step), format_number_as_ds(float(spec.low))
    elif sop_class == "ct":
        found.RescaleSlope, found.RescaleIntercept = "1", "0"
    if "RescaleSlope" in found and sop_class != "mr":
        hounsfield = rescaled and sop_class == "ct" and any("values in HU" in words for words in spec.conversions)
        found.RescaleType = "HU" if hounsfield else "US"  # unspecified
    bits = values.dtype.itemsize * 8
    found.Rows, found.Columns, found.SamplesPerPixel = values.shape
    found.PhotometricInterpretation = "MONOCHROME2" if spec.colour == "grey" else "RGB"
    if spec.colour == "rgb":
        found.PlanarConfiguration = 0
    found.BitsAllocated = found.BitsStored = bits
    found.HighBit, found.PixelRepresentation = bits - 1, 0
    found.LossyImageCompression = "00"
    data = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    found.PixelData = data + b"\0" * (len(data) % 2)
    found["PixelData"].VR = "OW" if bits > 8 else "OB"


def _text(words: str) -> str:
    """A name as a Long String (LO): no backslash, which separates values, no control characters, 64 bytes at most.

    The standard counts 64 characters; readers of before UTF-8 count bytes.
    """
    from synthaug.text import printable

    text = printable(words, width=_LONGEST_LO).replace("\\", "/")
    while len(text.encode()) > _LONGEST_LO:
        text = text[:-2] + "…"
    return text
