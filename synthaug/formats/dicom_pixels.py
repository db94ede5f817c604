"""Pixels of DICOM files (PS3.3 C.7.6.3, C.11.1, C.11.2), through pydicom's own functions.

No message here quotes a file's name or the value of a tag: either may name a patient. pydicom's warnings do; they are
held back by `pixels.pillow_limits`, inside which all reading is done.
"""

from __future__ import annotations

import logging
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from synthaug.config import DicomConfig
from synthaug.errors import DatasetError
from synthaug.formats.pixels import Colour, Picture, Rejected

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# What of a file is looked at; everything else stays unread.
IMAGE_TAGS = [
    "SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth", "LossyImageCompression",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip
# What decides whether the values are changed on their way to the modality's unit.
LEVEL_TAGS = [
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
COLOURED = (
    "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT",
)  # fmt: skip

_DEFLATED = "1.2.840.10008.1.2.1.99"
_FULL = 65535
# A deflated header that unpacks to more than this is no image of a size that would be read.
_MOST_UNPACKED = 1 << 28
_PIECE = 1 << 20
# How decoders say that there is less than there should be; numpy cannot reshape it.
_TRUNCATED = ("less than", "truncated", "cannot reshape", "match the expected amount", "unexpected end")
# Bytes that may follow the marker that ends a compressed picture.
_AFTER_THE_END = 64


def quiet_pydicom() -> None:
    """Import pydicom and keep it from speaking: its warnings and log messages quote values, names of patients too.

    Raises:
        DatasetError: It is not installed.
    """
    try:
        from pydicom import config
    except ImportError:
        raise DatasetError(
            "format 'dicom' needs pydicom, which is not installed. Install it with: pip install 'synthaug[dicom]'"
        ) from None
    config.settings.reading_validation_mode = config.IGNORE
    for name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def read_header(path: Path, tags: list[str]) -> Dataset:
    """The named tags of a DICOM file, its pixels not read. The DICM prefix is a must: nothing is forced.

    Raises:
        Rejected: Not DICOM, or damaged.
    """
    import pydicom

    try:
        with path.open("rb") as file:
            head = file.read(132)
            if not head:
                raise Rejected("empty file", "0 bytes")
            if head[128:] != b"DICM":
                raise Rejected("not DICOM", "it lacks the prefix DICM of PS3.10")
            syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
            if syntax is None:
                raise Rejected("cannot be decoded", "its header names no transfer syntax")
            if syntax == _DEFLATED:
                _check_deflated(path)
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
            # Values are parsed when they are asked for: now, where it is known what a failure means.
            for tag in tags:
                header.get(tag)
            return header
    except Rejected:
        raise
    except OSError as error:
        raise Rejected("cannot be read", error.strerror or type(error).__name__) from None
    except Exception as error:  # a damaged file fails in every way that there is; the words may quote it
        raise Rejected("cannot be decoded", f"its header is damaged ({type(error).__name__})") from None


def decode_frame(path: Path, frame: int, settings: DicomConfig, as_float: bool, max_pixels: int) -> Picture:
    """Decode one frame of a DICOM file.

    The modality's LUT or rescale is applied (of CT: values in HU), then a window where the settings ask for one, and
    MONOCHROME1 is inverted, so that more is always brighter. Pixel padding becomes the lowest value of the others.

    Args:
        frame: Counted from 0.
        as_float: Without a window, make 16-bit values floating point too, as other files of the source have to be.
        max_pixels: Most pixels of a frame, checked by the header and by that of the compressed data before decoding.

    Returns:
        Grey or RGB. uint8 or uint16 where these hold the values as they are, and for a window, whose range becomes 0
        to 65535; float32 otherwise.

    Raises:
        Rejected: The frame cannot be used.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise Rejected("cannot be read", error.strerror or type(error).__name__) from None
    header = _header_of(path, found.st_size, found.st_mtime_ns)
    try:
        stored = _stored(path, header, frame, max_pixels)
        if header.PhotometricInterpretation in MONOCHROME:
            return _grey(stored, _with_frame_groups(header, frame), settings, as_float)
        return _coloured(stored, header)
    except Rejected:
        raise
    except Exception as error:  # as above
        raise _rejected(error, header) from None


@lru_cache(maxsize=4)
def _header_of(path: Path, size: int, time: int) -> Dataset:
    """The header of a file, kept for its next frames: an enhanced one speaks of each of them. Not to be changed."""
    return read_header(path, IMAGE_TAGS)


def is_plain(header: Dataset) -> bool:
    """Whether a grey file's values fit into 8 or 16 bits as they are: unsigned, and nothing is applied to them."""
    groups = header.get("SharedFunctionalGroupsSequence") or header.get("PerFrameFunctionalGroupsSequence")
    bits = int(header.get("BitsStored") or 0)
    return not groups and not header.get("PixelRepresentation") and _is_identity(header) and (bits <= 8 or bits == 16)


def _is_identity(header: Dataset) -> bool:
    if header.get("ModalityLUTSequence"):
        return False
    return _number(header.get("RescaleSlope"), 1.0) == 1.0 and _number(header.get("RescaleIntercept"), 0.0) == 0.0


def _rejected(error: Exception, header: Dataset) -> Rejected:
    words, name = str(error).lower(), type(error).__name__
    syntax = header.file_meta.TransferSyntaxUID
    known = syntax.name if not syntax.is_private and syntax.name != str(syntax) else "an unknown transfer syntax"
    if isinstance(error, NotImplementedError) or "missing dependencies" in words or "no available" in words:
        return Rejected("unsupported compression", f"{known}; the extra 'dicom' installs all decoders there are")
    if "no pixel data" in words or "no 'pixel data'" in words:
        return Rejected("no pixel data", "the header speaks of an image, and there is none")
    if any(part in words for part in _TRUNCATED):
        return Rejected("truncated", f"{known} ({name})")
    return Rejected("cannot be decoded", f"{known} ({name})")


def _stored(path: Path, header: Dataset, frame: int, max_pixels: int) -> np.ndarray:
    """Stored values `[rows, columns]` or `[rows, columns, 3]` of a frame; YBR is RGB already."""
    import pydicom
    from pydicom.pixels import pixel_array

    rows, columns, samples = (int(header.get(name) or 0) for name in ("Rows", "Columns", "SamplesPerPixel"))
    if rows * columns > max_pixels:
        raise Rejected("too large", f"{columns} × {rows} pixels; image.max_pixels is {max_pixels}")
    if rows * columns == 0 or samples not in (1, 3):
        raise Rejected("wrong shape", f"{columns} × {rows} pixels with {samples} samples each")
    syntax = header.file_meta.TransferSyntaxUID
    source: Any = path
    if syntax == _DEFLATED:
        source = pydicom.dcmread(path)
    elif syntax.is_compressed:
        with path.open("rb") as file:
            _check_codestream(file, frame, max_pixels)
    array = pixel_array(source, index=frame)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.shape != ((rows, columns) if samples == 1 else (rows, columns, samples)):
        raise Rejected(
            "cannot be decoded", f"{list(array.shape)} was decoded; the header says {[rows, columns, samples]}"
        )
    return array


def _check_deflated(path: Path) -> None:
    """Unpack a deflated data set piece by piece, keeping nothing, to learn its size.

    Raises:
        Rejected: It is larger than any image that would be read, or damaged.
    """
    with path.open("rb") as file:
        file.seek(132)
        # (0002,0000), UL, 4 bytes: the length of the rest of the group, which is followed by what is deflated.
        head = file.read(12)
        if head[:8] != b"\x02\x00\x00\x00UL\x04\x00":
            raise Rejected("cannot be decoded", "its header does not tell its own length")
        file.seek(int.from_bytes(head[8:], "little"), 1)
        unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        left = b""
        while not unpacker.eof and (left or (left := file.read(_PIECE))):
            size += len(unpacker.decompress(left, _PIECE))
            left = unpacker.unconsumed_tail
            if size > _MOST_UNPACKED:
                raise Rejected("too large", f"it unpacks to more than {_MOST_UNPACKED} bytes")


def _check_codestream(file: BinaryIO, frame: int, max_pixels: int) -> None:
    """Refuse a compressed frame whose own header speaks of more pixels than may be decoded, or that was cut short.

    Raises:
        Rejected: Too large, or truncated.
    """
    import pydicom
    from pydicom.encaps import get_frame

    names = ["NumberOfFrames", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(names))
    # Tag, VR, two zeros and the undefined length: encapsulated data are always in explicit VR (PS3.5 A.4).
    if len(file.read(12)) < 12:
        raise Rejected("no pixel data", "the header speaks of an image, and there is none")
    offsets = (header.get(names[1]), header.get(names[2]))
    data = get_frame(
        file,
        frame,
        extended_offsets=offsets if all(offsets) else None,
        number_of_frames=int(header.get("NumberOfFrames") or 1),
    )
    size = _codestream_size(data)
    if size is not None and size[0] * size[1] > max_pixels:
        raise Rejected("too large", f"{size[0]} × {size[1]} compressed pixels; image.max_pixels is {max_pixels}")
    # Some decoders make up what is missing. EOI of T.81 and EOC of T.800 are the same two bytes.
    if size is not None and b"\xff\xd9" not in data[-_AFTER_THE_END:]:
        raise Rejected("truncated", "its compressed picture has no end")


def _codestream_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG, JPEG-LS or JPEG 2000 stream says it has; None of another one (RLE has none).

    Frame headers are SOF0 to SOF15 but DHT, JPG and DAC (ITU-T T.81, B.2.2), SOF55 (T.87), and SIZ (T.800, A.5.1).
    """
    if data[:2] == b"\xff\xd8":
        place = 2
        while place + 9 <= len(data) and data[place] == 0xFF:
            marker = data[place + 1]
            if marker == 0xFF:
                place += 1
                continue
            if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 5, place + 7))
                return width, height
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        return None
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 24:
        return None
    right, bottom, left, top = (int.from_bytes(data[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
    return right - left, bottom - top


def _with_frame_groups(header: Dataset, frame: int) -> Dataset:
    """The header with what an enhanced multi-frame object says of this frame's values where others say it at once."""
    groups = []
    if shared := header.get("SharedFunctionalGroupsSequence"):
        groups.append(shared[0])
    if (own := header.get("PerFrameFunctionalGroupsSequence")) and frame < len(own):
        groups.append(own[frame])
    if groups:
        header = _copy(header)
    for group in groups:
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(sequence) or ():
                for element in item:
                    if element.keyword in IMAGE_TAGS:
                        header[element.tag] = element
    return header


def _copy(header: Dataset) -> Dataset:
    from pydicom.dataset import Dataset

    copied = Dataset(header)
    copied.file_meta = header.file_meta
    return copied


def _grey(stored: np.ndarray, header: Dataset, settings: DicomConfig, as_float: bool) -> Picture:
    from pydicom.pixels import apply_modality_lut

    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    padding = _padding(stored, header)
    words = _compression(header)
    identity = _is_identity(header)
    if identity:
        values = stored
    else:
        values = apply_modality_lut(stored, header)
        words += ("modality LUT or rescale applied" + (", values in HU" if _is_hounsfield(header) else ""),)
    if settings.window == "none":
        ends = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if signed else [0, (1 << bits) - 1], stored.dtype)
        low, high = (float(end) for end in (ends if identity else apply_modality_lut(ends, header)))
        pixels, more = _unwindowed(values, identity and not signed and not (as_float and bits == 16), bits)
    else:
        pixels, more = _windowed(values, header, settings.window)
        low, high = 0.0, float(_FULL)
    words += more
    if header.PhotometricInterpretation == "MONOCHROME1":
        if settings.window == "none" and pixels.dtype == np.uint8 and bits == 1:
            low, high = 0.0, 255.0
        pixels = (low + high - pixels.astype(np.float64)).astype(pixels.dtype)
        words += ("MONOCHROME1 inverted",)
    if padding is not None and padding.any() and not padding.all():
        pixels = pixels.copy()
        pixels[padding] = pixels[~padding].min()
        words += ("pixel padding set to the lowest value of the others",)
    if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
        raise Rejected("not finite", "the picture holds NaN or infinity")
    return Picture(np.ascontiguousarray(pixels[:, :, None]), "grey", words)


def _unwindowed(values: np.ndarray, plain: bool, bits: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if plain and bits == 1:
        return (values > 0).astype(np.uint8) * np.uint8(255), ("1-bit to 8-bit grey",)
    if plain and bits <= 8:
        return values.astype(np.uint8), ()
    if plain and bits == 16:
        return values.astype(np.uint16), ()
    exact = values.astype(np.float32)
    if np.issubdtype(values.dtype, np.integer) and not np.array_equal(exact.astype(np.float64), values):
        raise Rejected("unsupported depth", f"whole numbers of {bits} bits, more than a float32 holds")
    return exact, ("values kept as floating point",)


def _windowed(values: np.ndarray, header: Dataset, window: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values of the modality through a window (PS3.3 C.11.2) to 0..65535, rounded to nearest."""
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_voi, apply_windowing

    # Such an output range is what pydicom gives to unsigned 16-bit values without a rescale.
    view = Dataset()
    view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 16, 0
    if window != "tag":
        view.WindowCenter, view.WindowWidth = window
        words = f"window {window[0]:g}/{window[1]:g} (center/width) applied, its range made 16 bits"
    elif _first(header.get("WindowCenter")) is not None and _first(header.get("WindowWidth")) is not None:
        view.WindowCenter, view.WindowWidth = (_first(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
        if header.get("VOILUTFunction"):
            view.VOILUTFunction = header.VOILUTFunction
        words = "first window of the file applied, its range made 16 bits"
    elif header.get("VOILUTSequence"):
        depth = int(header.VOILUTSequence[0].LUTDescriptor[2])
        looked_up = apply_voi(np.rint(values).astype(np.int64), header).astype(np.float64)
        return np.rint(looked_up / ((1 << depth) - 1) * _FULL).astype(np.uint16), (
            "first VOI LUT of the file applied, its range made 16 bits",
        )
    else:
        raise Rejected("no window", "dataset.dicom.window is 'tag', and the file has neither window nor VOI LUT")
    return np.rint(apply_windowing(values, view)).astype(np.uint16), (words,)


def _coloured(stored: np.ndarray, header: Dataset) -> Picture:
    from pydicom.pixels import apply_color_lut

    words = _compression(header)
    photometric, bits = str(header.PhotometricInterpretation), int(header.BitsStored)
    pixels = stored
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(stored, header)[:, :, :3]
        words += ("palette to rgb",)
        bits = pixels.dtype.itemsize * 8
    elif photometric != "RGB":
        words += (f"{photometric} to rgb",)
    if header.PixelRepresentation or pixels.dtype not in (np.uint8, np.uint16):
        raise Rejected("unsupported depth", f"colours of {pixels.dtype}")
    if 8 < bits < 16:
        pixels, words = pixels.astype(np.float32), (*words, "values kept as floating point")
    colour: Colour = "rgb"
    return Picture(np.ascontiguousarray(pixels), colour, words)


def _padding(stored: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Which stored values are padding (PS3.3 C.7.5.1.1.2), or None."""
    first = header.get("PixelPaddingValue")
    if first is None or not isinstance(first, int) or stored.dtype.kind not in "iu":
        return None
    last = header.get("PixelPaddingRangeLimit")
    # Writers spell negative values as unsigned ones, and the other way round.
    bits = stored.dtype.itemsize * 8
    ends = []
    for value in (first, last if isinstance(last, int) else first):
        value &= (1 << bits) - 1
        ends.append(value - (1 << bits) if stored.dtype.kind == "i" and value >= 1 << bits - 1 else value)
    found: np.ndarray = (stored >= min(ends)) & (stored <= max(ends))
    return found


def _compression(header: Dataset) -> tuple[str, ...]:
    return ("the file was compressed with loss before",) if header.get("LossyImageCompression") == "01" else ()


def _is_hounsfield(header: Dataset) -> bool:
    unit = header.get("RescaleType")
    return unit == "HU" or (not unit and header.get("Modality") == "CT")


def _number(value: Any, otherwise: float) -> float:
    return otherwise if value is None or value == "" else float(value)


def _first(value: Any) -> float | None:
    with suppress(TypeError):
        value = next(iter(value), None)
    return None if value is None or value == "" else float(value)
