"""What a copy may have gone through: altered copies of real images are planted to see whether the audit finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from synthaug.formats.pixels import decode_png, encode_png
from synthaug.quality.alignment import canvas_for
from synthaug.records import PixelSpec

# [size, size, channels] float32 in 0..1, and chance, to the same.
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


# Values are moved, not changed: no float may lose its last bit.
_FLIPS = ("exact", "mirrored", "upside down")


class Alteration(NamedTuple):
    name: str
    listed: bool  # is it of those the comparison was built for?
    change: Change


def alterations(size: int) -> tuple[Alteration, ...]:
    """All alterations for images of `size` pixels, those that the comparison was built for first."""
    canvas = canvas_for(size)
    far, blur = canvas.margin * canvas.pixel, size / 28
    corner = size // 4
    listed: dict[str, Change] = {
        "exact": lambda image, random: image,
        "mirrored": lambda image, random: image[:, ::-1],
        "upside down": lambda image, random: image[::-1],
        "shifted by 1 px": lambda image, random: _shifted(image, 1, random),
        f"shifted by {far} px both ways": lambda image, random: _shifted(image, far, random, both=True),
        "turned by 5 degrees": lambda image, random: _warped(image, angle=5 * _side(random)),
        "cropped to 90 %": lambda image, random: _warped(image, scale=1 / 0.9),
        "20 % brighter": lambda image, random: image * 1.2,
        "20 % darker": lambda image, random: image * 0.8,
        "20 % more contrast": lambda image, random: (image - 0.5) * 1.2 + 0.5,
        "20 % less contrast": lambda image, random: (image - 0.5) * 0.8 + 0.5,
        f"blurred by {blur:.2g} px": lambda image, random: cv2.GaussianBlur(image, (0, 0), blur),
        "noise of 0.02": lambda image, random: _noisy(image, 0.02, random),
        "JPEG of quality 75": lambda image, random: _jpeg(image, 75),
    }
    others: dict[str, Change] = {
        "perspective of 5 %": lambda image, random: _leaning(image, 0.05),
        "gamma 1.4": lambda image, random: np.clip(image, 0, 1) ** 1.4,
        "gamma 0.7": lambda image, random: np.clip(image, 0, 1) ** 0.7,
        f"black corner of {corner} px": lambda image, random: _black_corner(image, corner),
        "turned by 10 degrees": lambda image, random: _warped(image, angle=10 * _side(random)),
        "shifted by 1 px and darker": lambda image, random: _shifted(image, 1, random) * 0.8,
        "turned by 5 degrees and noisy": lambda image, random: _noisy(
            _warped(image, angle=5 * _side(random)), 0.02, random
        ),
        "mirrored, cropped and JPEG": lambda image, random: _jpeg(_warped(image[:, ::-1], scale=1 / 0.95), 75),
    }
    return tuple(
        Alteration(name, names is listed, change) for names in (listed, others) for name, change in names.items()
    )


def planted(
    images: np.ndarray,
    spec: PixelSpec,
    alteration: Alteration,
    seed: int,
    values: tuple[float, float] | None = None,
    first: int = 0,
) -> np.ndarray:
    """Altered copies as they would be released: of the same dtype, written as PNG (where one holds them) and read.

    Args:
        images: [n, size, size, channels] in `spec.low..spec.high`.
        values: What 0 and 1 of an alteration are (20 % brighter, noise of 0.02); the whole range where not given.
        first: Place of the first image among all that are altered.
    """
    low, high = values or (spec.low, spec.high)
    result = np.empty_like(images)
    for i, image in enumerate(images):
        # A series of its own for every alteration and image, so that a new one changes no other.
        random = np.random.default_rng([seed, first + i, *alteration.name.encode()])
        if alteration.name in _FLIPS:
            result[i] = _as_released(alteration.change(image, random), spec)
            continue
        unit = (image.astype(np.float32) - np.float32(low)) / np.float32(high - low)
        changed = np.asarray(alteration.change(unit, random), dtype=np.float32).reshape(image.shape)
        native = (changed.astype(np.float64) * (high - low) + low - spec.low) / (spec.high - spec.low)
        result[i] = _as_released(spec.from_unit(np.clip(native, 0, 1) * 2 - 1), spec)
    return result


def _as_released(image: np.ndarray, spec: PixelSpec) -> np.ndarray:
    if spec.dtype == "float32" or spec.colour not in ("grey", "rgb", "rgba"):
        return image
    return decode_png(encode_png(np.ascontiguousarray(image), spec))


def _side(random: np.random.Generator) -> int:
    return int(random.choice((-1, 1)))


def _shifted(image: np.ndarray, pixels: int, random: np.random.Generator, *, both: bool = False) -> np.ndarray:
    """Moved one way (or both ways), what comes in repeating the border."""
    moves = (pixels * _side(random), pixels * _side(random))
    if not both:
        moves = (moves[0], 0) if random.random() < 0.5 else (0, moves[1])
    return _warped(image, move=moves)


def _warped(image: np.ndarray, *, angle: float = 0.0, scale: float = 1.0, move: tuple[int, int] = (0, 0)) -> np.ndarray:
    size = image.shape[0]
    middle = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, scale)
    matrix[:, 2] += move
    return _by_channel(
        image, lambda plane: cv2.warpAffine(plane, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
    )


def _leaning(image: np.ndarray, share: float) -> np.ndarray:
    last = image.shape[0] - 1
    edge = share * last
    before = np.array([[0, 0], [last, 0], [last, last], [0, last]], dtype=np.float32)
    after = np.array([[edge, 0], [last - edge, edge / 2], [last, last], [0, last - edge / 2]], dtype=np.float32)
    matrix = cv2.getPerspectiveTransform(before, after)
    return _by_channel(
        image,
        lambda plane: cv2.warpPerspective(plane, matrix, (last + 1, last + 1), borderMode=cv2.BORDER_REPLICATE),
    )


def _by_channel(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    # OpenCV takes four channels at most.
    planes = [change(np.ascontiguousarray(image[..., channel])) for channel in range(image.shape[2])]
    return np.stack(planes, 2)


def _noisy(image: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    noise: np.ndarray = image + random.normal(0, sigma, image.shape)
    return noise


def _black_corner(image: np.ndarray, side: int) -> np.ndarray:
    image = image.copy()
    image[:side, :side] = 0
    return image


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """As an 8-bit JPEG: colour where there are three channels, else channel by channel."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]

    def through(plane: np.ndarray) -> np.ndarray:
        eight = np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8)
        done, data = cv2.imencode(".jpg", eight, settings)
        if not done:
            raise ValueError("OpenCV could not encode the picture as JPEG")
        read = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        if read is None:
            raise ValueError("OpenCV could not read its own JPEG")
        return read.astype(np.float32) / 255

    return through(image) if image.shape[2] == 3 else _by_channel(image, through)
