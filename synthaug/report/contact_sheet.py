"""One page to judge a job by: real training images beside accepted synthetic ones, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.formats.atomic import whole_file
from synthaug.records import (
    AUDIT_FILE,
    IMAGES_FILE,
    SPLITS_FILE,
    AuditReport,
    ClassAudit,
    SampleBatch,
    Source,
    Splits,
)
from synthaug.report.tiles import Display, Page, display_for, fit, shuffled, wrap

REAL, SYNTHETIC, WARNING, GREY = "#1d5c9e", "#b4510a", "#a3152a", "#666666"
_PALE = {REAL: "#dbe8f6", SYNTHETIC: "#fbe5d3"}
_WIDTH, _MARGIN, _GAP, _BETWEEN = 1280, 24, 3, 28
_TITLE, _HEADING, _TEXT = 22, 17, 14
# Side of a tile in pixels and rows a class gets, by the number of classes with synthetic images.
_LAYOUTS = ((4, 56, 4), (8, 56, 3), (16, 56, 2), (32, 56, 1), (10**9, 36, 1))
_COMPACT_SIDE = 32


@dataclass(frozen=True)
class _Class:
    audit: ClassAudit
    real_rows: np.ndarray  # rows of the source, in an order that has nothing to do with their content
    synthetic: pd.DataFrame  # batch and row of what may be released, in order of rank

    @property
    def n_synthetic(self) -> int:
        return len(self.synthetic)


def write_contact_sheet(
    source: Source,
    splits: Splits,
    batches: Sequence[SampleBatch],
    report: AuditReport,
    path: Path,
    *,
    include_real: bool = True,
) -> Path:
    """Write a PNG with one block a class; those that the plan raises come first, the others are small.

    Real images are training images, never validation or test. Synthetic ones are the first accepted, in order of
    drawing: nobody chose them. Of a withheld class nothing but the reason is shown.

    Args:
        batches: As they were given to the audit.
        include_real: Show real images; a release without them must not.
    """
    classes = _classes(splits, report)
    raised = [item for item in classes if item.audit.n_wanted]
    others = [item for item in classes if not item.audit.n_wanted and include_real]
    side, rows = next(layout[1:] for layout in _LAYOUTS if len(raised) <= layout[0])
    pictures = Pictures(source, batches, side, _some(raised, others), include_real)
    page = Page(_WIDTH, _MARGIN)
    _head(page, source, pictures, include_real)
    columns = _columns(page, pictures, raised, rows) if include_real else (0, _columns_in(page.inside, pictures))
    for item in raised:
        _raised_block(page, pictures, item, rows, columns)
    if not raised:
        page.text(_MARGIN, page.y, "No class is raised, so there are no synthetic images.", _TEXT, GREY)
        page.y += 30
    if others:
        _compact_blocks(page, pictures, others)
    with whole_file(path) as temporary:
        page.finished().save(temporary, format="PNG")
    return path


class Pictures:
    """Reads single images of source and batches, and shows them all in one way."""

    def __init__(
        self,
        source: Source,
        batches: Sequence[SampleBatch],
        wanted_side: int,
        examples: tuple[np.ndarray, pd.DataFrame],
        include_real: bool,
    ) -> None:
        self._real: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
        self._batches: list[np.ndarray] = [np.load(b.directory / IMAGES_FILE, mmap_mode="r") for b in batches]
        real_rows, synthetic = examples
        if include_real:
            shown = self._real[np.sort(real_rows)]
        else:
            shown = np.array([self._batches[b][r] for b, r in synthetic[["batch", "row"]].to_numpy()])
        self.display: Display = display_for(source.pixels, shown)
        self.side = self.display.side(wanted_side)
        self.compact_side = self.display.side(_COMPACT_SIDE)

    def real(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._real[row] for row in rows]

    def synthetic(self, table: pd.DataFrame) -> list[np.ndarray]:
        return [self._batches[b][r] for b, r in table[["batch", "row"]].to_numpy()]


def _classes(splits: Splits, report: AuditReport) -> list[_Class]:
    table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["row", "image_id", "label", "split", "held_back"])
    training = table[(table["split"] == "train") & table["held_back"].isna()]
    audit = pd.read_parquet(report.directory / AUDIT_FILE, columns=["batch", "row", "label", "rank"])
    audit = audit[audit["rank"] >= 0].sort_values(["label", "rank"])
    classes = []
    for item in report.classes:
        mine = training[training["label"] == item.label]
        synthetic = audit[(audit["label"] == item.label) & (audit["rank"] < item.n_wanted)]
        released = synthetic.iloc[:0] if item.withheld else synthetic
        classes.append(_Class(item, mine["row"].to_numpy()[shuffled(mine["image_id"])], released))
    return classes


def _some(raised: list[_Class], others: list[_Class]) -> tuple[np.ndarray, pd.DataFrame]:
    """Some real rows and synthetic rows of every class, to choose the display by."""
    real = [item.real_rows[:10] for item in (*raised, *others)]
    synthetic = [item.synthetic.iloc[:10] for item in raised]
    empty = pd.DataFrame({"batch": [], "row": []}, dtype="int64")
    return np.concatenate(real or [np.empty(0, dtype=np.int64)]), pd.concat(synthetic) if synthetic else empty


def _head(page: Page, source: Source, pictures: Pictures, include_real: bool) -> None:
    title = "Real images beside synthetic ones" if include_real else "Synthetic images"
    x = page.text(_MARGIN, page.y, title, _TITLE)
    page.text(x + 14, page.y + 6, fit(source.name, _TEXT, page.width - x - 40, is_name=True), _TEXT, GREY)
    page.y += _TITLE + 12
    lines = [pictures.display.scale_note(pictures.side), pictures.display.note]
    lines += ["Synthetic: the first that passed the audit, in order of drawing; none was picked by hand."]
    if include_real:
        lines.append("Real: training images only.")
    sentences = " ".join(line[0].upper() + line[1:].rstrip(".") + "." for line in lines if line)
    for line in wrap(sentences, _TEXT, page.inside, 3):
        page.text(_MARGIN, page.y, line, _TEXT, GREY)
        page.y += _TEXT + 5
    page.y += 14


def _columns_in(width: int, pictures: Pictures) -> int:
    return max(1, (width - _GAP) // (pictures.side + _GAP))


def _columns(page: Page, pictures: Pictures, raised: list[_Class], rows: int) -> tuple[int, int]:
    """Columns of real and of synthetic images: half each, unless the real ones need less."""
    both = max(2, _columns_in(page.inside - _BETWEEN - _GAP, pictures))
    needed = max((-(-len(item.real_rows) // rows) for item in raised), default=1)
    real = min(max(needed, 3), both // 2)
    return real, both - real


def _raised_block(page: Page, pictures: Pictures, item: _Class, rows: int, columns: tuple[int, int]) -> None:
    """Draw one class; `columns` are those of real and of synthetic images, 0 for none."""
    audit = item.audit
    x = page.text(_MARGIN, page.y, fit(audit.name, _HEADING, page.inside * 0.45, is_name=True), _HEADING)
    counts = [(f"{len(item.real_rows):,} real", REAL), (f"{item.n_synthetic:,} synthetic", SYNTHETIC)]
    if item.n_synthetic < audit.n_wanted:
        counts.append((f"{audit.n_wanted - item.n_synthetic:,} short of the plan", WARNING))
    if audit.coverage is not None and audit.coverage_expected is not None and not audit.withheld:
        counts.append((f"coverage {audit.coverage:.2f} (equal distributions: {audit.coverage_expected:.2f})", GREY))
    for text, colour in counts:
        x = page.text(x + 20, page.y + 2, text, _TEXT, colour)
    page.y += _HEADING + 9
    left, top, bottom = _MARGIN, page.y, page.y
    if columns[0]:
        shown = pictures.real(item.real_rows[: columns[0] * rows])
        bottom = _panel(page, pictures, shown, left, top, columns[0], REAL, "real, training")
        left += columns[0] * (pictures.side + _GAP) + _GAP + _BETWEEN
    if item.n_synthetic:
        shown = pictures.synthetic(item.synthetic.iloc[: columns[1] * rows])
        bottom = max(bottom, _panel(page, pictures, shown, left, top, columns[1], SYNTHETIC, "synthetic"))
    else:
        why = f"Withheld: {audit.withheld}" if audit.withheld else "No sample was accepted."
        y = top
        for line in wrap(why, _TEXT, page.width - _MARGIN - left, 4):
            page.text(left, y, line, _TEXT, WARNING)
            y += _TEXT + 5
        bottom = max(bottom, y)
    page.y = bottom + 20


def _panel(
    page: Page, pictures: Pictures, images: list[np.ndarray], x: int, y: int, columns: int, colour: str, label: str
) -> int:
    """Draw images on a tinted ground under a label; return where it ends."""
    side, step, strip = pictures.side, pictures.side + _GAP, 18
    used = max(1, -(-len(images) // columns))
    bottom = y + strip + used * step + _GAP
    page.draw(bottom).rectangle((x, y, x + columns * step + _GAP - 1, bottom - 1), fill=_PALE[colour])
    page.text(x + 5, y + 2, label, 12, colour)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        page.paste(pictures.display.tile(image, side), x + _GAP + column * step, y + strip + row * step)
    return bottom


def _compact_blocks(page: Page, pictures: Pictures, others: list[_Class]) -> None:
    page.text(_MARGIN, page.y, "Classes that are not raised (real training images)", _HEADING)
    page.y += _HEADING + 12
    half, side = (page.inside - _BETWEEN) // 2, pictures.compact_side
    height = 20 + side + 12
    for i, item in enumerate(others):
        row, column = divmod(i, 2)
        x, y = _MARGIN + column * (half + _BETWEEN), page.y + row * height
        end = page.text(x, y, fit(item.audit.name, _TEXT, half * 0.7, is_name=True), _TEXT)
        page.text(end + 12, y, f"{len(item.real_rows):,} real", _TEXT, REAL)
        for j, image in enumerate(pictures.real(item.real_rows[: half // (side + _GAP)])):
            page.paste(pictures.display.tile(image, side), x + j * (side + _GAP), y + 20)
    page.y += -(-len(others) // 2) * height
