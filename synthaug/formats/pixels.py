"""Pictures as arrays: decoding with guards, colour, squares, and lossless PNG.

A decoded picture is `[height, width, channels]`, uint8, uint16 or float32, channels last, RGB order. Nothing
is changed in silence: whatever a decoder or a setting alters is named in `Picture.conversions`.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from synthaug.records import PixelSpec

Colour = Literal["grey", "rgb", "rgba", "channels", "grey with alpha", "cmyk", "ycbcr", "lab", "hsv"]

# Decoders that are let near unknown bytes. Others (EPS starts Ghostscript) stay shut.
_CONTAINERS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
# Endings of file names that are taken for pictures.
SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp",
    ".pgm", ".ppm", ".pbm", ".pnm",
})  # fmt: skip
KEPT_COLOURS: tuple[Colour, ...] = ("grey", "rgb", "rgba", "channels")
_BY_CHANNELS: dict[int, Colour] = {1: "grey", 3: "rgb"}
_ORIENTATION_TAG, _BITS_PER_SAMPLE_TAG = 0x0112, 258
# A compressed file larger than its largest allowed picture (8 bytes a pixel, and room for metadata) is no picture.
_BYTES_PER_PIXEL, _ROOM_FOR_METADATA = 8, 1 << 24
# The signature of a PNG and its first chunk, the header; what describes the picture may stand from there on.
_PNG_HEAD = 33


class Rejected(Exception):
    """A picture cannot be used; `reason` is counted, `detail` is kept beside it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    """A decoded picture and what was done to it on the way."""

    pixels: np.ndarray  # [height, width, channels] uint8 | uint16 | float32
    colour: Colour
    conversions: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        """Depth and colour in words: '8-bit grey', '16-bit rgb', 'float 7 channels'."""
        depth = {"uint8": "8-bit", "uint16": "16-bit", "float32": "float"}[self.pixels.dtype.name]
        return f"{depth} {self.pixels.shape[2]} channels" if self.colour == "channels" else f"{depth} {self.colour}"

    @property
    def kept_by_auto(self) -> bool:
        return self.colour in KEPT_COLOURS


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Have Pillow refuse pictures by the size in their header; its usual limits are restored at the end.

    To be entered in the main thread, around all decoding: Pillow's limit belongs to the whole process.
    """
    from PIL import Image, ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
    with warnings.catch_warnings():
        # The size is checked by us, and odd metadata is no news; warnings from threads would only garble the log.
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def largest_file(max_pixels: int) -> int:
    """Bytes that a file with a picture of `max_pixels` can need at most."""
    return _BYTES_PER_PIXEL * max_pixels + _ROOM_FOR_METADATA


def decode_picture(data: bytes, max_pixels: int) -> Picture:
    """Decode the bytes of a picture file completely.

    Palettes, single bits and big-endian words become plain pixels of the same value, the EXIF orientation is
    applied, and the conversions name it. 16 bits stay 16 bits, also in colour.

    Raises:
        Rejected: Empty, no picture, truncated, larger than `max_pixels`, more than one frame, or of a kind
            whose values could not be kept.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise Rejected("empty file", "0 bytes")
    if len(data) > largest_file(max_pixels):
        raise Rejected("too large", f"{len(data)} bytes; image.max_pixels is {max_pixels}")
    try:
        with Image.open(io.BytesIO(data), formats=_CONTAINERS) as image:
            _check_header(image, max_pixels)
            image.load()
            return _from_pillow(image, data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too large", f"{error}; image.max_pixels is {max_pixels}") from None
    except UnidentifiedImageError:
        raise Rejected("not a picture", f"no decoder knows it; it begins with {data[:8]!r}") from None
    except Rejected:
        raise
    except (
        Exception
    ) as error:  # decoders of unknown bytes fail in every way: OSError, SyntaxError, KeyError, zlib.error
        reason = "truncated" if "truncated" in str(error).lower() else "cannot be decoded"
        raise Rejected(reason, f"{type(error).__name__}: {error}") from None


def picture_from_array(array: np.ndarray, whole_numbers: str | None = None) -> Picture:
    """Take an array as a picture: `[h, w]` or `[h, w, channels]`.

    uint8, uint16 and float32 stay; bool becomes 0 and 255; other floats become float32; other whole numbers
    become `whole_numbers`, the dtype that was found to hold all values of the source.

    Raises:
        Rejected: Wrong number of axes, no pixels, channels first, or values that do not fit.
    """
    if array.ndim not in (2, 3) or array.size == 0:
        raise Rejected("wrong shape", f"{list(array.shape)}; expected [height, width] or [height, width, channels]")
    if array.ndim == 3 and array.shape[0] <= 4 < array.shape[2]:
        raise Rejected("wrong shape", f"{list(array.shape)} looks as if channels came first; they must come last")
    pixels, conversions = _to_native(array, whole_numbers)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
        raise Rejected("not finite", "the picture holds NaN or infinity")
    return Picture(np.ascontiguousarray(pixels), _BY_CHANNELS.get(pixels.shape[2], "channels"), conversions)


def to_colour(picture: Picture, colour: Literal["auto", "grey", "rgb"]) -> Picture:
    """Bring a picture to grey or RGB and say how; 'auto' leaves it as it is.

    Raises:
        Rejected: A picture of n channels has no colours to convert.
    """
    if colour == "auto" or colour == picture.colour:
        return picture
    if picture.colour == "channels":
        raise Rejected("colour unknown", f"{picture.pixels.shape[2]} channels cannot be made {colour}")
    plain = _without_alpha(picture)
    if plain.colour not in ("grey", "rgb"):
        plain = _to_rgb(plain)
    if plain.colour == colour:
        return plain
    import cv2

    if colour == "grey":
        pixels = cv2.cvtColor(plain.pixels, cv2.COLOR_RGB2GRAY)[:, :, None]
        words = "rgb to grey (ITU-R BT.601 luma)"
    else:
        pixels, words = np.repeat(plain.pixels, 3, axis=2), "grey to rgb (three equal channels)"
    return Picture(pixels, colour, (*plain.conversions, words))


def to_square(pixels: np.ndarray, size: int, fit: str) -> tuple[np.ndarray, frozenset[str]]:
    """Bring a picture to `size` × `size`; also return what was used: 'crop', 'pad', 'stretch', 'area', 'cubic'.

    Areas are averaged where an axis shrinks, a cubic interpolates where it grows; dtype and channels stay, and
    no value leaves the picture's own range (but for the zeros of a padding).
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels, frozenset()
    if height == width:
        resized, used = _resize(pixels, size, size)
        return resized, used
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        resized, used = _resize(pixels[top : top + side, left : left + side], size, size)
    elif fit == "pad":
        longest = max(height, width)
        inner, used = _resize(pixels, *(max(1, round(side * size / longest)) for side in (height, width)))
        resized = np.zeros((size, size, pixels.shape[2]), pixels.dtype)
        top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
        resized[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    else:
        resized, used = _resize(pixels, size, size)
    return np.ascontiguousarray(resized), used | {fit}


def encode_png(array: np.ndarray, spec: PixelSpec, text: Mapping[str, str] | None = None) -> bytes:
    """A picture as PNG, without loss; equal pixels and text give equal bytes.

    Args:
        array: `[h, w, channels]` uint8 or uint16; channels as in `spec`.
        text: Keyword (1 to 79 characters) to text, both Latin-1: written as tEXt chunks, in this order.

    Raises:
        ValueError: PNG cannot hold it (floats, channels that are not grey, RGB or RGBA, or such a text).
    """
    import cv2

    if spec.colour not in ("grey", "rgb", "rgba") or spec.dtype == "float32":
        raise ValueError(f"PNG cannot hold {spec.dtype} pictures of colour '{spec.colour}'")
    if array.ndim != 3 or array.shape[2] != spec.channels or array.dtype != spec.dtype:
        raise ValueError(f"array {array.dtype} {list(array.shape)} does not fit {spec.dtype}, {spec.channels} channels")
    done, encoded = cv2.imencode(".png", _swap_red_and_blue(array), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise ValueError("OpenCV could not encode the picture as PNG")
    data = bytes(encoded.tobytes())
    chunks = b"".join(_text_chunk(keyword, words) for keyword, words in (text or {}).items())
    return data[:_PNG_HEAD] + chunks + data[_PNG_HEAD:]


def _text_chunk(keyword: str, text: str) -> bytes:
    """A tEXt chunk: length, type, keyword, a zero, text, and the CRC of all but the length."""
    name, words = keyword.encode("latin-1"), text.encode("latin-1")
    if not 1 <= len(name) <= 79 or b"\0" in name + words:
        raise ValueError(f"{keyword!r:.100} cannot be a keyword of a PNG, or its text holds a zero byte")
    body = b"tEXt" + name + b"\0" + words
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def decode_png(data: bytes) -> np.ndarray:
    """The array `[h, w, channels]` that `encode_png` made the bytes from.

    Raises:
        Rejected: The bytes are not a whole PNG of grey, RGB or RGBA.
    """
    picture = decode_picture(data, max_pixels=1 << 28)
    if not picture.kept_by_auto:
        raise Rejected("unsupported colour", picture.form)
    return picture.pixels


def _check_header(image: Any, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("too large", f"{width} × {height} pixels; image.max_pixels is {max_pixels}")
    # The further pictures of a phone's MPO are previews of the first one.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Rejected("several frames", f"{image.n_frames} frames; a still picture was expected")
    if image.format == "PPM" and image.mode in ("L", "RGB"):
        details = image.tile[0].args
        if isinstance(details, tuple) and details[1] not in (1, 255):
            # Pillow would stretch these values to 8 bits without a word.
            raise Rejected("unsupported depth", f"a PPM whose largest value is {details[1]}")


def _from_pillow(image: Any, data: bytes) -> Picture:
    conversions: tuple[str, ...] = ("first picture of an MPO",) if image.format == "MPO" else ()
    if _holds_16_bit_colour(image, data):
        # Pillow keeps 8 of the 16 bits. It has decoded the file by now, so that it is known to be whole:
        # OpenCV returns what it has got of a truncated one.
        pixels, colour = _sixteen_bit_colour(data)
    else:
        image, more = _plain_mode(image)
        conversions += more
        pixels, colour = _pixels_of(image)
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if orientation in range(2, 9):
        pixels, conversions = _turn(pixels, orientation), (*conversions, "EXIF orientation applied")
    if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
        raise Rejected("not finite", "the picture holds NaN or infinity")
    return Picture(np.ascontiguousarray(pixels), colour, conversions)


def _holds_16_bit_colour(image: Any, data: bytes) -> bool:
    if image.format == "PNG":
        # Byte 24 of a PNG is its bit depth, byte 25 its colour type; type 0 is grey, which Pillow keeps.
        return data[24] == 16 and data[25] != 0
    if image.format == "TIFF" and image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;"):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE_TAG, (8,))) > 8
    return False


def _sixteen_bit_colour(data: bytes) -> tuple[np.ndarray, Colour]:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise Rejected("unsupported depth", "more than 8 bits a channel in a form that cannot be kept")
    pixels = _swap_red_and_blue(pixels)
    if data[:4] == b"\x89PNG" and data[25] == 4:
        return pixels[:, :, [0, 3]], "grey with alpha"
    return pixels, "rgb" if pixels.shape[2] == 3 else "rgba"


def _plain_mode(image: Any) -> tuple[Any, tuple[str, ...]]:
    """Palettes and the like as plain pixels of the same values."""
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        target = "RGBA" if image.mode in ("P", "RGB") else "LA"
        return image.convert(target), (f"{image.mode} with a transparent colour to {target}",)
    if image.mode not in _PLAIN:
        return image, ()
    target, words = _PLAIN[image.mode]
    return image.convert(target), (words,)


_PLAIN = {
    "1": ("L", "1-bit to 8-bit grey"),
    "P": ("RGB", "palette to rgb"),
    "PA": ("RGBA", "palette with alpha to rgba"),
}
_MODES: dict[str, Colour] = {
    "L": "grey", "F": "grey", "RGB": "rgb", "RGBA": "rgba", "LA": "grey with alpha",
    "CMYK": "cmyk", "YCbCr": "ycbcr", "LAB": "lab", "HSV": "hsv",
}  # fmt: skip


def _pixels_of(image: Any) -> tuple[np.ndarray, Colour]:
    """Pixels `[h, w, channels]` of a Pillow picture in one of its plain modes."""
    pixels = np.asarray(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise Rejected("unsupported depth", f"whole numbers from {low} to {high}; 16 bits hold 0 to 65535")
        return pixels.astype(np.uint16)[:, :, None], "grey"
    if image.mode not in _MODES:
        raise Rejected("unsupported colour", f"Pillow calls it mode '{image.mode}'")
    return (pixels[:, :, None] if pixels.ndim == 2 else pixels), _MODES[image.mode]


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (2 to 8) on `[h, w, channels]`."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _to_native(array: np.ndarray, whole_numbers: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    kind, name = array.dtype.kind, array.dtype.newbyteorder("=").name
    if name in ("uint8", "uint16", "float32"):
        return array.astype(name, copy=False), ()
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255), ("true and false to 255 and 0",)
    if kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32), (f"{name} to float32",)
    if kind in "iu" and whole_numbers is not None:
        return array.astype(whole_numbers), (f"{name} to {whole_numbers}",)
    raise Rejected("unsupported values", f"an array of {array.dtype}; numbers were expected")


def _without_alpha(picture: Picture) -> Picture:
    if picture.colour not in ("rgba", "grey with alpha"):
        return picture
    colour: Colour = "rgb" if picture.colour == "rgba" else "grey"
    words = f"alpha of {picture.colour.removesuffix(' with alpha')} dropped"
    return Picture(picture.pixels[:, :, :-1], colour, (*picture.conversions, words))


def _to_rgb(picture: Picture) -> Picture:
    """CMYK, YCbCr, LAB and HSV (8 bits) to RGB, as Pillow does it."""
    from PIL import Image, ImageCms

    mode = next(mode for mode, colour in _MODES.items() if colour == picture.colour)
    height, width = picture.pixels.shape[:2]
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(picture.pixels).tobytes())
    if mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    else:
        converted = image.convert("RGB")
    words = (*picture.conversions, f"{picture.colour} to rgb")
    return replace(picture, pixels=np.asarray(converted), colour="rgb", conversions=words)


def _resize(pixels: np.ndarray, height: int, width: int) -> tuple[np.ndarray, frozenset[str]]:
    """First the axes that shrink, then the axes that grow."""
    import cv2

    used = set()
    smaller = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    if smaller != pixels.shape[:2]:
        pixels = _resize_channels(pixels, *smaller, cv2.INTER_AREA)
        used.add("area")
    if smaller != (height, width):
        low, high = pixels.min(), pixels.max()
        pixels = np.clip(_resize_channels(pixels, height, width, cv2.INTER_CUBIC), low, high)
        used.add("cubic")
    return pixels, frozenset(used)


def _resize_channels(pixels: np.ndarray, height: int, width: int, method: int) -> np.ndarray:
    import cv2

    # OpenCV averages areas of no more than four channels at once.
    parts = [
        cv2.resize(np.ascontiguousarray(pixels[:, :, first : first + 4]), (width, height), interpolation=method)
        for first in range(0, pixels.shape[2], 4)
    ]
    return np.concatenate([part.reshape(height, width, -1) for part in parts], axis=2)


def _swap_red_and_blue(pixels: np.ndarray) -> np.ndarray:
    """OpenCV's order of channels to ours, and back."""
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(pixels.shape[2])
    return pixels if order is None else np.ascontiguousarray(pixels[:, :, order])
