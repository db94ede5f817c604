"""What the audit turned away, by class and reason, to see whether it was right. For the run folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.formats.atomic import whole_file
from synthaug.records import AUDIT_FILE, SPLITS_FILE, AuditReport, ClassAudit, SampleBatch, Source, Splits
from synthaug.report.contact_sheet import GREY, REAL, SYNTHETIC, WARNING, Pictures
from synthaug.report.tiles import Page, fit, shuffled, wrap

_WIDTH, _MARGIN, _GAP = 1280, 24, 10
_TITLE, _HEADING, _TEXT, _SMALL = 22, 17, 14, 11
_SIDE = 56
_LINES = 2
# As the audit writes it; a page takes nothing from a stage.
_OTHER_CLASS = "judged another class"
_WITHHELD = "passed, but the class is withheld"


def write_rejected_sheet(
    source: Source,
    splits: Splits,
    batches: Sequence[SampleBatch],
    report: AuditReport,
    path: Path,
) -> Path:
    """Write a PNG of rejected samples: for every class one block, for every reason two lines of examples.

    Under a sample stands what the classifier took it for. Beside samples rejected as copies stands the training
    image they repeat, so this sheet must never go into a release.
    """
    columns = ["batch", "row", "label", "class_index", "reason", "predicted", "distance", "nearest_id", "rank"]
    table = pd.read_parquet(report.directory / AUDIT_FILE, columns=columns)
    for item in report.classes:
        if item.withheld:
            table.loc[(table["label"] == item.label) & (table["rank"] >= 0), "reason"] = _WITHHELD
    rejected = table[table["reason"].notna()].sort_values(["label", "class_index"])
    rows_of = _training_rows(splits)
    some = np.array(sorted(rows_of.values()), dtype=np.int64)
    examples = some[shuffled(pd.Series(some))[:100]] if len(some) else some
    pictures = Pictures(source, batches, _SIDE, (examples, rejected.iloc[:0]), include_real=True)
    page = Page(_WIDTH, _MARGIN)
    page.text(_MARGIN, page.y, "Samples that the audit rejected", _TITLE)
    page.y += _TITLE + 12
    words = f"{len(rejected):,} of {len(table):,} samples. {pictures.display.scale_note(pictures.side)}. "
    words += f"{pictures.display.note[:1].upper()}{pictures.display.note[1:]}. " if pictures.display.note else ""
    words += "Beside a copy, framed in blue: the training image it repeats. Not for publication."
    for line in wrap(words, _TEXT, page.inside, 3):
        page.text(_MARGIN, page.y, line, _TEXT, GREY)
        page.y += _TEXT + 5
    page.y += 14
    names = [item.name for item in report.classes]
    for item in report.classes:
        mine = rejected[rejected["label"] == item.label]
        if len(mine):
            _class_block(page, pictures, item, mine, names, rows_of)
    with whole_file(path) as temporary:
        page.finished().save(temporary, format="PNG")
    return path


def _training_rows(splits: Splits) -> dict[str, int]:
    """Image id to row, of usable training images only: no other real image is ever shown."""
    table = pd.read_parquet(splits.directory / SPLITS_FILE, columns=["row", "image_id", "split", "held_back"])
    training = table[(table["split"] == "train") & table["held_back"].isna()]
    return dict(zip(training["image_id"], training["row"], strict=True))


def _class_block(
    page: Page, pictures: Pictures, item: ClassAudit, mine: pd.DataFrame, names: list[str], rows_of: dict[str, int]
) -> None:
    x = page.text(_MARGIN, page.y, fit(item.name, _HEADING, page.inside * 0.5, is_name=True), _HEADING)
    text = f"{item.n_candidates - item.n_accepted:,} of {item.n_candidates:,} rejected"
    x = page.text(x + 20, page.y + 2, text, _TEXT, WARNING)
    if item.withheld:
        page.text(x + 20, page.y + 2, fit(f"withheld: {item.withheld}", _TEXT, page.width - x - 50), _TEXT, WARNING)
    page.y += _HEADING + 10
    order = [*item.rejected, _WITHHELD]
    for reason in order:
        some = mine[mine["reason"] == reason]
        if len(some):
            judged = reason in (_OTHER_CLASS, _WITHHELD)
            taken = " (under each: what the classifier takes it for)" if judged else ""
            page.text(_MARGIN, page.y, f"{reason}: {len(some):,}{taken}", _TEXT, SYNTHETIC)
            page.y += _TEXT + 7
            _examples(page, pictures, some, names if judged else [], rows_of if "copy" in reason else {})
    page.y += 14


def _examples(page: Page, pictures: Pictures, some: pd.DataFrame, names: list[str], rows_of: dict[str, int]) -> None:
    side, pair = pictures.side, bool(rows_of)
    step = (2 * side + 2 if pair else side) + _GAP
    columns = max(1, (page.inside + _GAP) // step)
    some = some.iloc[: columns * _LINES]
    height = side + _SMALL + 10
    for i, (image, sample) in enumerate(zip(pictures.synthetic(some), some.itertuples(), strict=True)):
        row, column = divmod(i, columns)
        x, y = _MARGIN + column * step, page.y + row * height
        page.paste(pictures.display.tile(image, side), x, y)
        nearest = rows_of.get(sample.nearest_id) if pair else None
        if nearest is not None:
            left = x + side + 2
            page.paste(pictures.display.tile(pictures.real(np.array([nearest]))[0], side), left, y)
            page.draw(y + side).rectangle((left, y, left + side - 1, y + side - 1), outline=REAL, width=2)
            caption = f"distance {sample.distance:.2f}"
        else:
            caption = names[sample.predicted] if 0 <= sample.predicted < len(names) else ""
        if caption:
            page.text(x, y + side + 2, fit(caption, _SMALL, step - _GAP, is_name=True), _SMALL, GREY)
    page.y += -(-len(some) // columns) * height + 4
