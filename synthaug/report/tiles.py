"""Images of any kind as small pictures, and words that a picture can hold."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from synthaug.records import PixelSpec
from synthaug.text import escaped, printable

# What common 8-bit images fill is stretched for others: 16-bit scans often use a small part of their range.
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Display:
    """How images of one source are shown: the same for real and synthetic, or comparing them would be unfair."""

    size: int
    low: float
    high: float
    channels: tuple[int, ...]
    note: str

    def side(self, wanted: int) -> int:
        """Side of a tile near `wanted`: a whole multiple of the image's side; half as much again for large ones."""
        return self.size * round(wanted / self.size) if 2 * self.size <= 3 * wanted else wanted * 3 // 2

    def scale_note(self, side: int) -> str:
        # Pillow's font has no ×.
        shown = f"{self.size} by {self.size} pixels"
        if side > self.size:
            return f"{shown}, enlarged {side // self.size} times"
        return f"{shown}, reduced to {side}" if side < self.size else shown

    def tile(self, image: np.ndarray, side: int) -> Image.Image:
        """[size, size, channels] native values to a picture of `side` pixels."""
        values = np.nan_to_num(image[..., list(self.channels)].astype(np.float64), nan=self.low)
        values = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        pixels = np.rint(values * 255).astype(np.uint8)
        picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
        return picture.resize((side, side), Image.Resampling.NEAREST if side >= self.size else Image.Resampling.BOX)


def display_for(pixels: PixelSpec, shown: np.ndarray) -> Display:
    """Choose how images are shown; `shown` [n, size, size, channels] are some of them, in native values."""
    notes = []
    channels: tuple[int, ...] = (0, 1, 2) if pixels.channels >= 3 else (0,)
    if pixels.colour == "rgba":
        notes.append("transparency is not shown")
    elif pixels.channels not in (1, 3):
        which = "first three as red, green and blue" if len(channels) == 3 else "first"
        notes.append(f"{pixels.channels} channels, of which the {which} shown")
        notes[-1] = notes[-1].replace("first shown", "first is shown").replace("blue shown", "blue are shown")
    low, high = pixels.low, pixels.high
    if pixels.dtype != "uint8":
        values = shown[..., list(channels)] if len(shown) else np.array([low, high])
        values = values[np.isfinite(values)] if pixels.dtype == "float32" else values
        if values.size:
            lowest, highest = (float(v) for v in np.percentile(values, _PERCENTILES))
            low, high = (lowest, highest) if highest > lowest else (low, high)
        notes.append(f"black is {low:g} or less and white {high:g} or more")
    return Display(pixels.size, low, high, channels, "; ".join(notes))


def shuffled(ids: Iterable[object]) -> np.ndarray:
    """Positions in an order by hash of the id: always the same, and blind to the content."""
    return np.argsort([hashlib.sha256(str(value).encode()).hexdigest() for value in ids], kind="stable")


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)


def fit(text: str, size: int, width: float, *, is_name: bool = False) -> str:
    """Cut a text to `width` pixels; a name from data is escaped first, with what the font has no shape for."""
    face = font(size)
    if is_name:
        text = "".join(_drawable(character, size) for character in printable(text, width=200))
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrap(text: str, size: int, width: float, most_lines: int) -> list[str]:
    """Break a text into lines of `width` pixels; the last is cut short where it does not fit."""
    face, lines = font(size), [""]
    words = text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == most_lines:
            lines[-1] = fit(" ".join([lines[-1], *words[i:]]), size, width)
            break
        else:
            lines.append(word)
    return [fit(line, size, width) for line in lines if line]


@lru_cache(maxsize=4096)
def _drawable(character: str, size: int) -> str:
    if character.isascii():
        return character
    face = font(size)
    # A character that no font has shows what "no shape" looks like.
    nothing = bytes(face.getmask("\U0010fffd"))
    if bytes(face.getmask(character)) != nothing:
        return character
    # Letters with accents keep the letter; everything else is written as its code.
    letter = unicodedata.normalize("NFKD", character)[0]
    return letter if letter.isascii() and letter.isprintable() else escaped(character)


class Page:
    """A picture that grows downward while it is drawn."""

    def __init__(self, width: int, margin: int, background: str = "white") -> None:
        self.width, self.margin, self.y = width, margin, margin
        self._background = background
        self._picture = Image.new("RGB", (width, 1024), background)

    @property
    def inside(self) -> int:
        """Width between the margins."""
        return self.width - 2 * self.margin

    def draw(self, until: int) -> ImageDraw.ImageDraw:
        """A pen that may go down to `until`."""
        self._reach(until)
        return ImageDraw.Draw(self._picture)

    def text(self, x: int, y: int, text: str, size: int, colour: str = "#222222") -> int:
        """Write one line; return where it ends."""
        self.draw(y + 2 * size).text((x, y), text, fill=colour, font=font(size))
        return x + round(font(size).getlength(text))

    def paste(self, tile: Image.Image, x: int, y: int) -> None:
        self._reach(y + tile.height)
        self._picture.paste(tile, (x, y))

    def finished(self) -> Image.Image:
        self._reach(self.y + self.margin)
        return self._picture.crop((0, 0, self.width, self.y + self.margin))

    def _reach(self, bottom: int) -> None:
        if bottom > self._picture.height:
            larger = Image.new("RGB", (self.width, max(bottom, 2 * self._picture.height)), self._background)
            larger.paste(self._picture, (0, 0))
            self._picture = larger
