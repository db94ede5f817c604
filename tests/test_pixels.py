"""Pictures: what is kept, what is converted and named, what is refused."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from synthaug.formats.pixels import (
    Picture,
    Rejected,
    decode_picture,
    decode_png,
    encode_png,
    picture_from_array,
    pillow_limits,
    to_colour,
    to_square,
)
from synthaug.records import PixelSpec

LIMIT = 10_000


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    high = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (np.random.default_rng(seed).random(shape) * high).astype(dtype)


def decode(data: bytes) -> Picture:
    with pillow_limits(LIMIT):
        return decode_picture(data, LIMIT)


def spec(channels: int, dtype: str, colour: str) -> PixelSpec:
    return PixelSpec(
        channels=channels, dtype=dtype, colour=colour, low=0, high=255, size=8, fit="none", interpolation="none",
        smallest=(8, 8), largest=(8, 8),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("channels", "colour"), [(1, "grey"), (3, "rgb"), (4, "rgba")])
def test_png_holds_every_form_exactly_and_with_the_same_bytes(dtype: str, channels: int, colour: str) -> None:
    pixels = noise(9, 7, channels, dtype=np.dtype(dtype).type)
    data = encode_png(pixels, spec(channels, dtype, colour))
    assert data == encode_png(pixels.copy(), spec(channels, dtype, colour))
    back = decode_png(data)
    assert back.dtype == pixels.dtype
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize(("channels", "dtype", "colour"), [(5, "uint8", "channels"), (1, "float32", "grey")])
def test_png_refuses_what_it_cannot_hold(channels: int, dtype: str, colour: str) -> None:
    with pytest.raises(ValueError, match="PNG cannot hold"):
        encode_png(np.zeros((4, 4, channels), dtype), spec(channels, dtype, colour))


def test_png_refuses_an_array_that_is_not_what_the_record_says() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_png(np.zeros((4, 4, 3), np.uint8), spec(1, "uint8", "grey"))


def test_png_is_read_by_others_with_the_same_colours() -> None:
    pixels = noise(6, 5, 3)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(encode_png(pixels, spec(3, "uint8", "rgb"))))), pixels
    )


@pytest.mark.parametrize(
    ("mode", "form", "conversion"),
    [
        ("L", "8-bit grey", ()),
        ("RGB", "8-bit rgb", ()),
        ("RGBA", "8-bit rgba", ()),
        ("LA", "8-bit grey with alpha", ()),
        ("1", "8-bit grey", ("1-bit to 8-bit grey",)),
        ("P", "8-bit rgb", ("palette to rgb",)),
    ],
)
def test_each_mode_of_png_keeps_its_values(mode: str, form: str, conversion: tuple[str, ...]) -> None:
    image = Image.fromarray(noise(6, 5, 3 if mode == "P" else 4)).convert(mode)
    picture = decode(encoded(image))
    assert (picture.form, picture.conversions) == (form, conversion)
    plain = {"1": "L", "P": "RGB"}.get(mode, mode)
    expected = np.asarray(image.convert(plain))
    np.testing.assert_array_equal(picture.pixels, expected.reshape(6, 5, -1))


def test_a_palette_with_transparency_keeps_its_alpha() -> None:
    image = Image.fromarray(noise(6, 5, 3)).convert("P")
    picture = decode(encoded(image, transparency=3))
    assert picture.form == "8-bit rgba"
    assert "transparent colour" in picture.conversions[0]


def test_cmyk_is_kept_apart_until_a_colour_is_asked_for() -> None:
    picture = decode(encoded(Image.fromarray(noise(8, 8, 3)).convert("CMYK"), "TIFF"))
    assert picture.form == "8-bit cmyk"
    assert not picture.kept_by_auto
    rgb = to_colour(picture, "rgb")
    assert (rgb.form, rgb.conversions) == ("8-bit rgb", ("cmyk to rgb",))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_stays_16_bit(kind: str) -> None:
    pixels = noise(6, 5, dtype=np.uint16)
    picture = decode(encoded(Image.fromarray(pixels), kind))
    assert picture.form == "16-bit grey"
    np.testing.assert_array_equal(picture.pixels[..., 0], pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("channels", "colour"), [(3, "rgb"), (4, "rgba")])
def test_16_bit_colour_stays_16_bit(suffix: str, channels: int, colour: str) -> None:
    pixels = noise(6, 5, channels, dtype=np.uint16)
    order = [2, 1, 0, 3][:channels]
    data = cv2.imencode(suffix, pixels[..., order])[1].tobytes()
    picture = decode(data)
    assert picture.form == f"16-bit {colour}"
    np.testing.assert_array_equal(picture.pixels, pixels)


def test_16_bit_grey_with_alpha_keeps_both() -> None:
    pixels = noise(3, 4, 2, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 4, 3, 16, 4, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    picture = decode(data)
    assert picture.form == "16-bit grey with alpha"
    np.testing.assert_array_equal(picture.pixels, pixels)


def test_floating_point_tiff_stays_floating_point() -> None:
    pixels = noise(6, 5, dtype=np.float32)
    picture = decode(encoded(Image.fromarray(pixels), "TIFF"))
    assert picture.form == "float grey"
    np.testing.assert_array_equal(picture.pixels[..., 0], pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(orientation: int) -> None:
    image = Image.fromarray(noise(6, 5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    picture = decode(data)
    np.testing.assert_array_equal(picture.pixels, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert picture.conversions == (() if orientation == 1 else ("EXIF orientation applied",))


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


FRAMES = [Image.fromarray(noise(6, 5, seed=seed)) for seed in range(3)]
WIDE = noise(40, 40, 3, dtype=np.uint16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text file", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
        (_cut(encoded(Image.fromarray(noise(40, 40)))), "truncated"),
        (_cut(encoded(Image.fromarray(noise(40, 40, 3)), "JPEG")), "truncated"),
        (_cut(cv2.imencode(".png", WIDE)[1].tobytes()), "truncated"),
        (encoded(Image.fromarray(noise(101, 100))), "too large"),
        (encoded(Image.new("L", (20_000, 20_000))), "too large"),
        (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "several frames"),
        (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "several frames"),
        (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "several frames"),
        (b"P6 2 2 65535\n" + bytes(24), "unsupported depth"),
        (encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "unsupported depth"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "not finite"),
        (b"\0" * (1 << 25), "too large"),
    ],
)
def test_bad_files_are_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_limits_of_pillow_are_put_back() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pillow_limits(5):
        assert Image.MAX_IMAGE_PIXELS == 5
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("array", "dtype", "colour"),
    [
        (noise(4, 5), "uint8", "grey"),
        (noise(4, 5, 3).astype(">u2"), "uint16", "rgb"),
        (noise(6, 5, 7, dtype=np.float32), "float32", "channels"),
        (noise(4, 5, 4), "uint8", "channels"),
        (noise(4, 5) > 100, "uint8", "grey"),
        (noise(4, 5).astype(np.float64), "float32", "grey"),
        (noise(4, 5).astype(np.int64), "uint8", "grey"),
    ],
)
def test_arrays_become_pictures_with_the_same_values(array: np.ndarray, dtype: str, colour: str) -> None:
    picture = picture_from_array(array, "uint8")
    assert (picture.pixels.dtype.name, picture.colour) == (dtype, colour)
    scale = 255 if array.dtype == bool else 1
    np.testing.assert_array_equal(picture.pixels.reshape(array.shape), array.astype(dtype) * scale)
    native = array.dtype.newbyteorder("=").name
    assert bool(picture.conversions) == (native != dtype)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4,)), "wrong shape"),
        (np.zeros((0, 4)), "wrong shape"),
        (np.zeros((3, 32, 32)), "wrong shape"),
        (np.array([[1.0, np.inf], [0, 0]]), "not finite"),
        (np.array([["a", "b"]]), "unsupported values"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array: np.ndarray, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        picture_from_array(array, "uint8")
    assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_every_colour_converts_and_says_so(mode: str, colour: str) -> None:
    if mode == "LAB":
        picture = Picture(noise(4, 5, 3), "lab")
    else:
        image = Image.fromarray(noise(4, 5, 3)).convert(mode)
        names = {"L": "grey", "LA": "grey with alpha", "YCbCr": "ycbcr"}
        picture = Picture(np.asarray(image).reshape(4, 5, -1), names.get(mode, mode.lower()))  # type: ignore[arg-type]
    converted = to_colour(picture, colour)  # type: ignore[arg-type]
    assert converted.pixels.shape == (4, 5, 1 if colour == "grey" else 3)
    assert bool(converted.conversions) == (picture.colour != colour)
    assert to_colour(picture, "auto") is picture


def test_grey_of_16_bit_colour_keeps_16_bits() -> None:
    converted = to_colour(Picture(np.full((4, 4, 3), 40_000, np.uint16), "rgb"), "grey")
    assert (converted.pixels == 40_000).all()


def test_channels_without_colours_are_not_converted() -> None:
    with pytest.raises(Rejected, match="cannot be made grey"):
        to_colour(Picture(noise(4, 5, 7), "channels"), "grey")


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), channels=st.sampled_from([1, 3, 4, 7]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]), fit=st.sampled_from(["crop", "pad", "stretch"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_squares_have_the_size_the_dtype_and_values_within_the_range(
    height: int, width: int, channels: int, dtype: type, fit: str, seed: int
) -> None:
    pixels = noise(height, width, channels, dtype=dtype, seed=seed)
    square, used = to_square(pixels, 16, fit)
    assert square.shape == (16, 16, channels)
    assert square.dtype == pixels.dtype
    assert square.max() <= pixels.max()
    assert square.min() >= (0 if fit == "pad" else pixels.min())
    assert used <= {"crop", "pad", "stretch", "area", "cubic"}
    assert (fit in used) == (height != width)
    assert bool(used) == ((height, width) != (16, 16))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_square_of_the_size_is_not_touched(fit: str) -> None:
    pixels = noise(16, 16, 3)
    square, used = to_square(pixels, 16, fit)
    assert square is pixels
    assert not used


def test_halving_takes_means_of_areas() -> None:
    pixels = noise(16, 16, 6, dtype=np.float32)
    square, used = to_square(pixels, 8, "crop")
    np.testing.assert_allclose(square, pixels.reshape(8, 2, 8, 2, 6).mean(axis=(1, 3)), rtol=1e-5)
    assert used == {"area"}


def test_cropping_takes_the_centre_and_padding_puts_zeros_beside() -> None:
    pixels = np.zeros((8, 16, 1), np.uint8)
    pixels[:, 4:12] = 9
    crop, _ = to_square(pixels, 8, "crop")
    assert (crop == 9).all()
    pad, _ = to_square(np.full((8, 16, 1), 9, np.uint8), 16, "pad")
    assert (pad[:4] == 0).all()
    assert (pad[4:12] == 9).all()
    assert (pad[12:] == 0).all()
