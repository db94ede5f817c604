"""Contact sheets: which images are shown, that names cannot break them, that any kind of image can be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from synthaug.records import AuditReport, ClassAudit
from synthaug.report.contact_sheet import write_contact_sheet
from synthaug.report.rejected_sheet import write_rejected_sheet
from synthaug.report.tiles import display_for, fit, font, wrap
from synthaug.text import printable
from tests.quality_parts import World, digits_world, make_world, perturbed

HOSTILE = ["../../x", "CON", "\U0001f408 cat", "two\nlines", "\x1b[31mred", "\u202eright to left", "a" * 500, "", " "]


def _report(world: World, labels: list[int], rejected: dict[int, str], **changes: Any) -> AuditReport:
    """The audit of one batch with these labels; `rejected` are rows with their reason."""
    directory = world.root / f"audit-{len(list(world.root.glob('audit-*')))}"
    directory.mkdir()
    table = pd.DataFrame({"sample_id": [f"s{i}" for i in range(len(labels))], "label": labels, "batch": 0})
    table["row"] = table.index
    table["class_index"] = table.groupby("label").cumcount()
    table["reason"] = pd.Series([rejected.get(i) for i in table.index], dtype="str")
    table["accepted"] = table["reason"].isna()
    table["rank"] = table[table["accepted"]].groupby("label").cumcount()
    table["rank"] = table["rank"].fillna(-1).astype("int64")
    training = world.table["image_id"][world.rows("train")[0]]
    table = table.assign(probability=0.5, predicted=0, distance=0.1, distance_ratio=0.5, nearest_id=training)
    table.to_parquet(directory / "audit.parquet")
    classes = []
    for item in world.plan.classes:
        mine = table[table["label"] == item.label]
        accepted = int(mine["accepted"].sum())
        values = {
            "n_wanted": item.n_synthetic, "n_candidates": len(mine), "n_accepted": accepted,
            "n_missing": max(0, item.n_synthetic - accepted), "coverage": 0.5, "coverage_expected": 0.9,
            "rejected": {k: int(v) for k, v in mine["reason"].value_counts().items()},
        } | changes  # fmt: skip
        classes.append(ClassAudit(label=item.label, name=item.name, **values))
    return AuditReport(directory=directory, digest="a", classes=tuple(classes))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return digits_world(tmp_path, scarce=(1, 3), keep=6)


def _samples(world: World, labels: list[int]) -> np.ndarray:
    rows = np.array([world.rows("train", label)[0] for label in labels])
    return perturbed(world.images[rows], np.random.default_rng(0))


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def _holds(page: np.ndarray, image: np.ndarray, side: int) -> bool:
    """Whether an 8×8 image is on the page, enlarged to `side`."""
    grey, cell = page[..., 0], side // 8
    found = np.ones((grey.shape[0] - side + 1, grey.shape[1] - side + 1), dtype=bool)
    for (row, column), value in np.ndenumerate(image[..., 0]):
        y, x = row * cell, column * cell
        found &= grey[y : y + found.shape[0], x : x + found.shape[1]] == value
    return bool(found.any())


def test_shows_training_images_and_accepted_samples_only(world: World, tmp_path: Path) -> None:
    labels = [1] * 20 + [3] * 20
    samples = _samples(world, labels)
    batch = world.batch(samples, labels)
    report = _report(world, labels, {2: "judged another class"})
    path = write_contact_sheet(world.source, world.splits, [batch], report, tmp_path / "sheet.png")
    page = _pixels(path)
    assert _holds(page, samples[0], 56)
    assert _holds(page, samples[25], 56)
    assert not _holds(page, samples[2], 56)
    assert all(_holds(page, world.images[row], 56) for row in world.rows("train", 1))
    for split in ("validation", "test"):
        for row in world.rows(split, 1)[:5]:
            assert not _holds(page, world.images[row], 56)
            assert not _holds(page, world.images[row], 32)


def test_needs_no_real_image_but_those_of_training(world: World, tmp_path: Path) -> None:
    """Everything else is overwritten, and the page is the same to the byte."""
    labels = [1] * 5
    batch = world.batch(_samples(world, labels), labels)
    report = _report(world, labels, {1: "near-copy of a training image"})
    images = np.full_like(world.images, 77)
    images[world.rows("train")] = world.images[world.rows("train")]
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "images.npy", images)
    other = world.source.model_copy(update={"directory": tmp_path / "other"})
    for write in (write_contact_sheet, write_rejected_sheet):
        one = write(world.source, world.splits, [batch], report, tmp_path / "one.png").read_bytes()
        assert one == write(other, world.splits, [batch], report, tmp_path / "two.png").read_bytes()


def test_without_real_images_no_real_image_is_read(world: World, tmp_path: Path) -> None:
    labels = [1] * 12
    samples = _samples(world, labels)
    batch, report = world.batch(samples, labels), _report(world, labels, {})
    pages = []
    for _ in range(2):
        path = tmp_path / "s.png"
        write_contact_sheet(world.source, world.splits, [batch], report, path, include_real=False)
        pages.append(path.read_bytes())
        np.save(world.source.directory / "images.npy", np.full_like(world.images, 77))
    assert pages[0] == pages[1]
    assert _holds(_pixels(path), samples[0], 56)


def test_a_withheld_class_shows_its_reason_and_no_sample(world: World, tmp_path: Path) -> None:
    labels = [1] * 12
    samples = _samples(world, labels)
    report = _report(world, labels, {}, withheld="it has collapsed")
    batch = world.batch(samples, labels)
    page = _pixels(write_contact_sheet(world.source, world.splits, [batch], report, tmp_path / "s.png"))
    assert not _holds(page, samples[0], 56)
    # They are kept apart for looking at.
    rejected = _pixels(write_rejected_sheet(world.source, world.splits, [batch], report, tmp_path / "r.png"))
    assert _holds(rejected, samples[0], 56)


def test_rejected_samples_are_kept_apart_with_the_image_they_copy(world: World, tmp_path: Path) -> None:
    labels = [1] * 12
    samples = _samples(world, labels)
    reasons = {3: "near-copy of a training image", 5: "judged another class"}
    report, batch = _report(world, labels, reasons), world.batch(samples, labels)
    nearest = world.images[world.rows("train")[0]]
    page = _pixels(write_rejected_sheet(world.source, world.splits, [batch], report, tmp_path / "r.png"))
    assert _holds(page, samples[3], 56)
    assert _holds(page, samples[5], 56)
    assert not _holds(page, samples[4], 56)
    assert (page[..., 2] == 0x9E).sum() > 4 * 50  # the blue frame
    assert _holds(page, nearest, 56)


def test_nothing_rejected_and_nothing_drawn_still_make_a_page(world: World, tmp_path: Path) -> None:
    report = _report(world, [], {})
    for write in (write_contact_sheet, write_rejected_sheet):
        assert _pixels(write(world.source, world.splits, [], report, tmp_path / "p.png")).shape[1] == 1280


@pytest.mark.parametrize(
    ("dtype", "size", "channels"),
    [("uint8", 28, 3), ("uint16", 16, 1), ("float32", 8, 5), ("uint8", 96, 2), ("uint8", 200, 4), ("uint16", 33, 2)],
)
def test_any_kind_of_image(tmp_path: Path, dtype: str, size: int, channels: int) -> None:
    top = {"uint8": 255, "uint16": 4000, "float32": 1}[dtype]
    images = (np.random.default_rng(0).random((40, size, size, channels)) * top).astype(dtype)
    world = make_world(tmp_path / "w", images, np.arange(40) % 2, ["a", "b"], (1,), 4, {})
    batch, report = world.batch(images[:6], [1] * 6), _report(world, [1] * 6, {0: "copy of a training image"})
    for write in (write_contact_sheet, write_rejected_sheet):
        page = _pixels(write(world.source, world.splits, [batch], report, tmp_path / "p.png"))
        assert page.std() > 20


def test_what_is_shown_is_said() -> None:
    random = np.random.default_rng(0)
    world_pixels = {
        "size": 8,
        "low": 0.0,
        "fit": "none",
        "interpolation": "none",
        "smallest": (8, 8),
        "largest": (8, 8),
    }
    from synthaug.records import PixelSpec

    deep = PixelSpec(channels=1, dtype="uint16", colour="grey", high=65535.0, **world_pixels)
    display = display_for(deep, random.integers(100, 4000, (9, 8, 8, 1)).astype(np.uint16))
    assert 100 <= display.low < 400
    assert 3700 < display.high <= 4000
    assert "black is" in display.note
    many = PixelSpec(channels=7, dtype="uint8", colour="channels", high=255.0, **world_pixels)
    assert "7 channels, of which the first three" in display_for(many, np.zeros((1, 8, 8, 7), dtype=np.uint8)).note
    two = PixelSpec(channels=2, dtype="uint8", colour="channels", high=255.0, **world_pixels)
    assert "the first is shown" in display_for(two, np.zeros((1, 8, 8, 2), dtype=np.uint8)).note
    assert display.side(56) == 56
    assert display.scale_note(56) == "8 by 8 pixels, enlarged 7 times"


def test_a_hundred_classes_with_hostile_names(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 1)).astype(np.uint8)
    names = HOSTILE + [f"class {i}" for i in range(100 - len(HOSTILE))]
    world = make_world(tmp_path / "w", images, np.arange(1000) % 100, names, range(60), 3, {})
    labels = [k for k in range(60) for _ in range(4)]
    batch = world.batch(images[: len(labels)], labels)
    path = write_contact_sheet(world.source, world.splits, [batch], _report(world, labels, {}), tmp_path / "p.png")
    page = _pixels(path)
    assert page.shape[1] == 1280
    assert page.shape[0] < 8000
    # Nothing is written over the right margin.
    assert (page[:, -10:] == 255).all()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_fit_one_line(name: str) -> None:
    text = printable(name, width=40)
    assert 0 < len(text) <= 40
    assert text.isprintable()
    short = fit(name, 14, 100, is_name=True)
    assert font(14).getlength(short) <= 101


def test_printable_escapes_and_bounds() -> None:
    assert printable("a\nb\t\0") == "a\\nb\\t\\0"
    assert printable("\x1b[31m") == "\\x1b[31m"
    assert printable("\u202e\u200b") == "\\u202e\\u200b"
    assert printable("\ud800") == "\\ud800"
    assert printable("naïve 猫 \U0001f408") == "naïve 猫 \U0001f408"
    assert printable(" x") == "' x'"
    assert printable("") == "(empty)"
    assert printable("x" * 61) == "x" * 59 + "…"
    assert printable("x" * 60) == "x" * 60
    assert printable("e" + "\u0301" * 50, width=30).count("\u0301") == 2


def test_what_the_font_cannot_draw_is_written_as_its_code() -> None:
    assert fit("\U0001f408", 14, 500, is_name=True) == "\\U0001f408"
    assert fit("naïve 猫", 14, 500, is_name=True) == "naive \\u732b"


def test_wrapping_keeps_to_the_lines_it_is_given() -> None:
    lines = wrap("word " * 100, 14, 200, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font(14).getlength(line) <= 201 for line in lines)
    assert wrap("", 14, 100, 2) == []
