"""The images of a report page: each a small picture of its own, so that a page can wrap them to its width."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from synthaug.records import AUDIT_FILE, IMAGES_FILE, SPLITS_FILE, AuditReport, SampleBatch, Source, Splits
from synthaug.report.tiles import Display, display_for, shuffled
from synthaug.text import printable

# Images are shown at this many pixels, as near as a whole multiple of their own side comes to it, and are stored with
# this many at most.
_SHOWN_SIDE, _MOST_SIDE = 64, 96
# Real, synthetic and rejected images of a class, by the number of classes.
_NUMBERS = ((4, (36, 72, 24)), (16, (24, 48, 12)), (40, (16, 32, 8)), (10**9, (10, 20, 6)))
# Bytes of all pictures of a page together, before base64 makes them a third larger.
MOST_BYTES = 9_000_000
_JPEG_QUALITY = 90
# As the audit writes them; a page takes nothing from a stage.
_OTHER_CLASS = "judged another class"
_WITHHELD = "passed, but the class is withheld"


@dataclass(frozen=True)
class Tile:
    """One image of a page."""

    uri: str  # data:image/png;base64,…
    caption: str = ""
    nearest: str | None = None  # the training image that it repeats, as an address of the same kind


@dataclass(frozen=True)
class RejectedTiles:
    reason: str
    n: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class ClassTiles:
    """What is shown of a class."""

    real: tuple[Tile, ...] = ()
    synthetic: tuple[Tile, ...] = ()
    rejected: tuple[RejectedTiles, ...] = ()
    first_sample: str | None = None  # sample_id of the first synthetic one shown


@dataclass(frozen=True)
class PagePictures:
    classes: dict[int, ClassTiles] = field(default_factory=dict)  # by label
    side: int = _SHOWN_SIDE  # pixels of a page
    note: str = ""  # how the images are shown, in words


@dataclass(frozen=True)
class _Choice:
    """Rows of a class that may be shown, in the order in which they are."""

    real: np.ndarray
    synthetic: pd.DataFrame
    rejected: list[tuple[str, pd.DataFrame]]


def page_pictures(
    source: Source,
    splits: Splits,
    batches: Sequence[SampleBatch],
    report: AuditReport | None,
    *,
    internal: bool,
    include_real: bool,
    most_bytes: int = MOST_BYTES,
) -> PagePictures:
    """The images of every class as data addresses of `most_bytes` in all: PNG while that fits, then JPEG, then fewer.

    Real images are training images in an order by hash; synthetic ones the first accepted, in order of drawing. Without
    `internal` no training image stands beside a sample, and what was rejected as a copy, or because it might be one, is
    not shown at all: a near-copy of a patient's image is that image.

    Args:
        batches: As they were given to the audit.
        include_real: Show real training images.
    """
    names = source.classes
    table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["row", "image_id", "label", "split", "held_back"])
    training = table[(table["split"] == "train") & table["held_back"].isna()]
    choices = _choices(training, report, len(names), internal=internal, include_real=include_real)
    real: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
    drawn: list[np.ndarray] = [np.load(batch.directory / IMAGES_FILE, mmap_mode="r") for batch in batches]
    if include_real:
        shown = real[np.sort(np.concatenate([choice.real[:10] for choice in choices]))]
    else:
        some = pd.concat([choice.synthetic.iloc[:10] for choice in choices])
        shown = np.array([drawn[b][r] for b, r in some[["batch", "row"]].to_numpy()])
    display = display_for(source.pixels, shown)
    rows_of = dict(zip(training["image_id"], training["row"], strict=True)) if internal else {}
    numbers = next(numbers for most, numbers in _NUMBERS if len(choices) <= most)
    lossless = True
    while True:
        drawing = _Drawing(display, real, drawn, names, rows_of, lossless)
        classes = {label: drawing.of_class(choice, numbers) for label, choice in enumerate(choices)}
        if drawing.n_bytes <= most_bytes or (not lossless and numbers == (1, 1, 1)):
            break
        if lossless:
            lossless = False
        else:
            numbers = (max(1, numbers[0] // 2), max(1, numbers[1] // 2), max(1, numbers[2] // 2))
    notes = [display.scale_note(drawing.stored_side).replace(" by ", " × "), display.note]
    if not lossless:
        notes.append("stored here as JPEG, which changes them a little")
    return PagePictures(classes, display.side(_SHOWN_SIDE), "; ".join(note for note in notes if note))


def _choices(
    training: pd.DataFrame, report: AuditReport | None, n_classes: int, *, internal: bool, include_real: bool
) -> list[_Choice]:
    columns = [
        "sample_id",
        "batch",
        "row",
        "label",
        "class_index",
        "reason",
        "predicted",
        "distance",
        "nearest_id",
        "rank",
    ]
    columns = columns if internal else [name for name in columns if name != "nearest_id"]
    audit = (
        pd.DataFrame(columns=columns)
        if report is None
        else pd.read_parquet(report.directory / AUDIT_FILE, columns=columns)
    )
    audits = {} if report is None else {item.label: item for item in report.classes}
    choices = []
    for label in range(n_classes):
        mine = training[training["label"] == label]
        real = mine["row"].to_numpy()[shuffled(mine["image_id"])] if include_real else np.empty(0, np.int64)
        samples = audit[audit["label"] == label]
        item = audits.get(label)
        withheld = item is not None and item.withheld is not None
        accepted = samples[samples["rank"] >= 0].sort_values("rank")
        if item is not None and not withheld:
            accepted = accepted[accepted["rank"] < item.n_wanted]
        rejected: list[tuple[str, pd.DataFrame]] = []
        turned_away = samples[samples["reason"].notna()].sort_values("class_index")
        # Only what is turned away for this reason is known not to be a copy: reasons are looked for in an order.
        reasons = list(item.rejected if internal and item else [] if withheld else [_OTHER_CLASS])
        for reason in reasons:
            some = turned_away[turned_away["reason"] == reason]
            if len(some):
                rejected.append((reason, some))
        if withheld and internal and len(accepted):
            rejected.append((_WITHHELD, accepted))
        choices.append(_Choice(real, accepted.iloc[:0] if withheld else accepted, rejected))
    return choices


class _Drawing:
    """Turns rows into tiles, and counts their bytes."""

    def __init__(
        self,
        display: Display,
        real: np.ndarray,
        drawn: Sequence[np.ndarray],
        names: Sequence[str],
        rows_of: dict[str, int],
        lossless: bool,
    ) -> None:
        self._display, self._real, self._drawn, self._names = display, real, drawn, names
        self._rows_of, self._lossless = rows_of, lossless
        self.stored_side = min(display.size, _MOST_SIDE)
        self.n_bytes = 0

    def of_class(self, choice: _Choice, numbers: tuple[int, int, int]) -> ClassTiles:
        synthetic = choice.synthetic.iloc[: numbers[1]]
        return ClassTiles(
            real=tuple(Tile(self._uri(self._real[row])) for row in choice.real[: numbers[0]]),
            synthetic=tuple(Tile(self._sample(item)) for item in synthetic.itertuples()),
            rejected=tuple(
                RejectedTiles(reason, len(some), tuple(self._rejected(reason, item) for item in part.itertuples()))
                for reason, some in choice.rejected
                for part in [some.iloc[: numbers[2]]]
            ),
            first_sample=None if synthetic.empty else str(synthetic["sample_id"].iloc[0]),
        )

    def _rejected(self, reason: str, item: object) -> Tile:
        nearest = self._rows_of.get(getattr(item, "nearest_id", "")) if "copy" in reason else None
        predicted, distance = getattr(item, "predicted", -1), getattr(item, "distance", np.nan)
        if nearest is not None:
            return Tile(self._sample(item), f"distance {distance:.2f}", self._uri(self._real[nearest]))
        judged = reason in (_OTHER_CLASS, _WITHHELD) and 0 <= predicted < len(self._names)
        return Tile(self._sample(item), printable(self._names[int(predicted)], 40) if judged else "")

    def _sample(self, item: object) -> str:
        return self._uri(self._drawn[int(getattr(item, "batch"))][int(getattr(item, "row"))])  # noqa: B009

    def _uri(self, image: np.ndarray) -> str:
        picture = self._display.tile(np.asarray(image), self.stored_side)
        if len(self._display.channels) == 1:
            picture = picture.convert("L")
        buffer = io.BytesIO()
        if self._lossless:
            picture.save(buffer, format="PNG", compress_level=9)
        else:
            picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        self.n_bytes += buffer.tell()
        kind = "png" if self._lossless else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
