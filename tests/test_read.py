"""Reading: every input form, what is kept, what is set aside, what is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from synthaug.errors import DatasetError
from synthaug.formats.growing_array import GrowingArray
from synthaug.formats.source_rows import Row, Rows
from synthaug.read import read, source_fingerprint
from synthaug.records import SET_ASIDE_FILE
from tests.loopback_hub import LoopbackHub
from tests.small_sources import folder, job, picture, png, put, run

LABELS = [0, 1, 2] * 4
PICTURES = [picture(seed) for seed in range(len(LABELS))]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what `datasets` prepares out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def frame(**columns: Any) -> dict[str, Any]:
    return {"image": [{"bytes": png(pixels), "path": None} for pixels in PICTURES], "label": LABELS, **columns}


# ---------------------------------------------------------------- one dataset in every form


def as_folder(root: Path) -> Any:
    for number, (pixels, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        put(root / "data" / str(label) / f"{number:02}.png", pixels)
    return job("imagefolder", root / "data")


def as_metadata_csv(root: Path) -> Any:
    lines = ["file_name,label"]
    for number, (pixels, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        put(root / "data" / f"{number:02}.png", pixels)
        lines.append(f"{number:02}.png,{label}")
    (root / "data" / "metadata.csv").write_text("\n".join(lines))
    return job("imagefolder", root / "data")


def as_metadata_jsonl(root: Path) -> Any:
    config = as_metadata_csv(root)
    (root / "data" / "metadata.csv").unlink()
    table = pd.DataFrame({"file_name": [f"{number:02}.png" for number in range(len(LABELS))], "label": LABELS})
    table.to_json(root / "data" / "metadata.jsonl", orient="records", lines=True)
    return config


def as_parquet(root: Path) -> Any:
    pq.write_table(pa.table(frame()), root / "data.parquet")
    return job("parquet", root / "data.parquet")


def as_parquet_of_bytes(root: Path) -> Any:
    (root / "data").mkdir()
    table = pa.table({"picture": [png(pixels) for pixels in PICTURES], "label": [float(label) for label in LABELS]})
    pq.write_table(table.slice(0, 5), root / "data" / "a.parquet")
    pq.write_table(table.slice(5), root / "data" / "b.parquet")
    return job("parquet", root / "data", dataset={"columns": {"image": "picture"}})


def as_parquet_of_lists(root: Path) -> Any:
    table = pa.table({"image": [pixels.tolist() for pixels in PICTURES], "label": LABELS})
    pq.write_table(table, root / "a.parquet", row_group_size=5)
    return job("parquet", root / "*.parquet")


def as_npz(root: Path) -> Any:
    np.savez_compressed(root / "data.npz", images=np.stack(PICTURES), labels=np.array(LABELS)[:, None])
    return job("medmnist", root / "data.npz")


def as_saved(root: Path) -> Any:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["0", "1", "2"])})
    Dataset.from_dict(frame(), features=features).save_to_disk(root / "data")
    return job("disk", root / "data")


def as_array_feature(root: Path) -> Any:
    from datasets import Array2D, Dataset, Features, Value

    features = Features({"image": Array2D((8, 8), "uint8"), "label": Value("int64")})
    Dataset.from_dict({"image": PICTURES, "label": LABELS}, features=features).save_to_disk(root / "data")
    return job("disk", root / "data")


def as_directory(root: Path) -> Any:
    (root / "data").mkdir()
    pq.write_table(pa.table(frame()), root / "data" / "train.parquet")
    return job("huggingface", root / "data")


FORMS = [
    as_folder, as_metadata_csv, as_metadata_jsonl, as_parquet, as_parquet_of_bytes, as_parquet_of_lists, as_npz,
    as_saved, as_array_feature, as_directory,
]  # fmt: skip


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: Callable[[Path], Any], tmp_path: Path, out: Path) -> None:
    config = form(tmp_path)
    source, images, index = run(config, out)
    assert source.classes == ("0", "1", "2")
    assert (source.n_images, source.n_set_aside, source.n_duplicates) == (12, 0, 0)
    assert source.pixels.model_dump(exclude={"conversions"}) == {
        "channels": 1, "dtype": "uint8", "colour": "grey", "low": 0, "high": 255, "size": 8, "fit": "none",
        "interpolation": "none", "smallest": (8, 8), "largest": (8, 8),
    }  # fmt: skip
    expected = {pixels.tobytes(): label for pixels, label in zip(PICTURES, LABELS, strict=True)}
    assert {image.tobytes(): label for image, label in zip(images, index["label"], strict=True)} == expected
    assert index["row"].tolist() == list(range(12))
    assert index["image_id"].tolist() == [content[:16] for content in index["content_hash"]]
    assert source.fingerprint == source_fingerprint(config)


def test_identities_do_not_depend_on_the_form(tmp_path: Path) -> None:
    ids = []
    for form in (as_folder, as_parquet, as_parquet_of_lists, as_npz):
        (tmp_path / form.__name__).mkdir()
        _, _, index = run(form(tmp_path / form.__name__), tmp_path / f"{form.__name__}-out")
        ids.append(set(index["image_id"]))
    assert ids[0] == ids[1] == ids[2] == ids[3]


def test_digits_are_brought_to_8_bits_without_loss(out: Path) -> None:
    from sklearn.datasets import load_digits

    source, images, index = run(job("digits"), out)
    digits = load_digits()
    np.testing.assert_array_equal(np.rint(images[..., 0] * (16 / 255)), digits.images)
    np.testing.assert_array_equal(index["label"], digits.target)
    assert source.classes == tuple("0123456789")
    assert source.pixels.conversions == {"levels 0 to 16 to round(level · 255 / 16)": 1797}
    assert source.licence == "cc-by-4.0"


def test_the_same_source_gives_the_same_digest_and_a_changed_one_another(tmp_path: Path) -> None:
    config = as_folder(tmp_path)
    first, again = run(config, tmp_path / "a")[0], run(config, tmp_path / "b")[0]
    assert first.digest == again.digest
    put(tmp_path / "data" / "1" / "01.png", picture(99))
    changed = run(config, tmp_path / "c")[0]
    assert changed.digest != first.digest
    assert changed.fingerprint != first.fingerprint


def test_identities_stay_when_the_dataset_grows_and_with_other_settings(tmp_path: Path) -> None:
    config = as_folder(tmp_path)
    before = set(run(config, tmp_path / "a")[2]["image_id"])
    put(tmp_path / "data" / "0" / "000.png", picture(99))
    assert before < set(run(config, tmp_path / "b")[2]["image_id"])
    other = job("imagefolder", tmp_path / "data", size=16, image={"colour": "rgb"})
    assert before < set(run(other, tmp_path / "c")[2]["image_id"])


# ---------------------------------------------------------------- given splits, groups, marks


def test_folders_of_splits_give_the_splits(tmp_path: Path, out: Path) -> None:
    for number, part in enumerate(("train", "val", "test")):
        folder(tmp_path / "data" / part, {"a": 2, "b": 2}, first_seed=10 * number)
    source, _, index = run(job("imagefolder", tmp_path / "data"), out)
    assert source.classes == ("a", "b")
    assert index["given_split"].value_counts().to_dict() == {"train": 4, "validation": 4, "test": 4}
    assert index["origin"][0] == "test/a/0.png"


def test_train_beside_other_classes_is_a_class(tmp_path: Path, out: Path) -> None:
    source, _, index = run(job("imagefolder", folder(tmp_path / "data", {"train": 2, "plane": 2})), out)
    assert source.classes == ("plane", "train")
    assert index["given_split"].isna().all()


def test_folders_of_splits_and_others_together_are_refused(tmp_path: Path, out: Path) -> None:
    folder(tmp_path / "data" / "train", {"a": 1, "b": 1})
    folder(tmp_path / "data" / "extra", {"a": 1, "b": 1}, first_seed=5)
    with pytest.raises(DatasetError, match=r"mixes folders of splits \(train\) and others \(extra\)"):
        read(job("imagefolder", tmp_path / "data"), out)


def test_one_metadata_file_over_folders_of_splits_is_refused(tmp_path: Path, out: Path) -> None:
    folder(tmp_path / "data" / "train", {"a": 1, "b": 1})
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label\ntrain/a/0.png,x\n")
    with pytest.raises(DatasetError, match="does not say who is in which"):
        read(job("imagefolder", tmp_path / "data"), out)


def test_columns_of_groups_splits_and_marks_are_carried(tmp_path: Path, out: Path) -> None:
    columns = frame(
        patient=[3.0, 3.0, None, *range(9)], part=["train"] * 6 + ["dev"] * 3 + ["test"] * 2 + [None],
        is_synthetic=[True] + [False] * 11,
    )  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    names = {"columns": {"group": "patient", "split": "part"}}
    source, _, index = run(job("parquet", tmp_path / "data.parquet", dataset=names), out)
    assert index["group"].fillna("-").tolist()[:4] == ["3", "3", "-", "0"]
    assert index["given_split"].value_counts().to_dict() == {"train": 6, "validation": 3, "test": 2}
    assert source.n_synthetic == 1
    assert source.set_aside_reasons == {"no split": 1}


def test_parquet_files_named_after_splits_give_the_splits(tmp_path: Path, out: Path) -> None:
    (tmp_path / "data").mkdir()
    table = pa.table(frame())
    pq.write_table(table.slice(0, 8), tmp_path / "data" / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(8), tmp_path / "data" / "test-00000-of-00001.parquet")
    _, _, index = run(job("parquet", tmp_path / "data"), out)
    assert index["given_split"].value_counts().to_dict() == {"train": 8, "test": 4}
    pq.write_table(table.slice(0, 1), tmp_path / "data" / "more.parquet")
    with pytest.raises(DatasetError, match=r"named after splits, but 'more.parquet' is not"):
        read(job("parquet", tmp_path / "data"), out)


def test_medmnist_splits_are_kept(tmp_path: Path, out: Path) -> None:
    arrays = {}
    for number, part in enumerate(("train", "val", "test")):
        arrays[f"{part}_images"] = np.stack([picture(10 * number + k, 8, 8, 3) for k in range(4)])
        arrays[f"{part}_labels"] = np.array([[0], [1], [0], [1]], dtype=np.uint8)
    np.savez(tmp_path / "data.npz", **arrays)
    config = job("medmnist", tmp_path / "data.npz", dataset={"class_names": ["normal", "ill"]})
    source, images, index = run(config, out)
    assert source.classes == ("normal", "ill")
    assert source.pixels.colour == "rgb"
    assert index["given_split"].value_counts().to_dict() == {"train": 4, "validation": 4, "test": 4}
    np.testing.assert_array_equal(images[:4], arrays["train_images"])


@pytest.mark.usefixtures("caches")
def test_an_unknown_split_is_refused_by_name(tmp_path: Path, out: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_dict(frame())
    DatasetDict({"train": table, "unsupervised": table}).save_to_disk(tmp_path / "data")
    with pytest.raises(DatasetError, match="names a split 'unsupervised'"):
        read(job("disk", tmp_path / "data"), out)


# ---------------------------------------------------------------- pixels


def test_pixels_of_16_bits_and_floats_stay(tmp_path: Path) -> None:
    for dtype, high in ((np.uint16, 65535), (np.float32, None)):
        pixels = np.stack([picture(seed, 8, 8, 5, dtype=dtype) for seed in range(4)])
        np.savez(tmp_path / "data.npz", images=pixels, labels=[0, 1, 0, 1])
        source, images, _ = run(job("medmnist", tmp_path / "data.npz"), tmp_path / np.dtype(dtype).name)
        np.testing.assert_array_equal(images, pixels)
        spec = source.pixels
        assert (spec.colour, spec.channels, spec.dtype) == ("channels", 5, np.dtype(dtype).name)
        assert (spec.low, spec.high) == ((0, high) if high else (pixels.min(), pixels.max()))
        np.testing.assert_allclose(spec.from_unit(spec.to_unit(images)), images, rtol=1e-5)


def test_wide_whole_numbers_take_the_depth_that_holds_all_of_them(tmp_path: Path, out: Path) -> None:
    pixels = np.stack([picture(seed, 8, 8, dtype=np.uint16) for seed in range(4)]).astype(np.int64)
    pixels[0] //= 256  # a dark one, which alone would look like 8 bits
    np.savez(tmp_path / "data.npz", images=pixels, labels=[0, 1, 0, 1])
    source, images, _ = run(job("medmnist", tmp_path / "data.npz"), out)
    np.testing.assert_array_equal(images[..., 0], pixels)
    assert source.pixels.dtype == "uint16"
    assert source.pixels.conversions == {"int64 to uint16": 4}


def test_negative_whole_numbers_become_floats(tmp_path: Path, out: Path) -> None:
    pixels = np.stack([picture(seed, 8, 8, dtype=np.int16) for seed in range(4)]) - np.int16(1000)
    np.savez(tmp_path / "data.npz", images=pixels, labels=[0, 1, 0, 1])
    source, images, _ = run(job("medmnist", tmp_path / "data.npz", image={"value_range": [-500, 20000]}), out)
    np.testing.assert_array_equal(images[..., 0], np.clip(pixels, -500, 20000).astype(np.float32))
    assert (source.pixels.low, source.pixels.high) == (-500, 20000)
    assert source.pixels.conversions["values outside image.value_range clipped"] == 4


def test_images_of_different_sizes_become_one_square_and_the_record_says_how(tmp_path: Path, out: Path) -> None:
    shapes = {"a": [(8, 8), (4, 12)], "b": [(40, 20), (16, 16)]}
    for name, sizes in shapes.items():
        for number, size in enumerate(sizes):
            put(tmp_path / "data" / name / f"{number}.png", picture(number, *size))
    source, images, _ = run(job("imagefolder", tmp_path / "data", image={"fit": "pad"}), out)
    assert images.shape == (4, 8, 8, 1)
    spec = source.pixels
    assert (spec.fit, spec.interpolation) == ("pad", "area")
    assert (spec.smallest, spec.largest) == ((4, 12), (40, 20))


def test_a_mixture_of_colours_is_refused_with_counts_and_converted_on_request(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 3, "b": 3})
    put(root / "b" / "colour.png", picture(50, 8, 8, 3))
    put(root / "b" / "clear.png", picture(51, 8, 8, 4))
    refused = tmp_path / "refused"
    refused.mkdir()
    with pytest.raises(DatasetError, match=r"6 8-bit grey .*1 8-bit rgba? \(for example b/c.*image.colour to grey"):
        read(job("imagefolder", root), refused)
    for colour, channels in (("grey", 1), ("rgb", 3)):
        source, images, _ = run(job("imagefolder", root, image={"colour": colour}), tmp_path / colour)
        assert images.shape == (8, 8, 8, channels)
        assert source.pixels.colour == colour
        assert source.pixels.conversions["alpha of rgba dropped"] == 1
        assert sum(source.pixels.conversions.values()) == (3 if colour == "grey" else 7)


def test_a_mixture_of_depths_is_refused(tmp_path: Path, out: Path) -> None:
    root = folder(tmp_path / "data", {"a": 3, "b": 3})
    put(root / "b" / "deep.png", picture(50, 8, 8, dtype=np.uint16))
    with pytest.raises(DatasetError, match=r"1 16-bit grey .*one depth first"):
        read(job("imagefolder", root, image={"colour": "grey"}), out)


def test_alpha_over_grey_needs_a_setting(tmp_path: Path, out: Path) -> None:
    for number in range(4):
        image = Image.fromarray(picture(number, 8, 8, 4)).convert("LA")
        put(tmp_path / "data" / "ab"[number % 2] / f"{number}.png", png(np.asarray(image)))
    with pytest.raises(DatasetError, match="cannot be kept as it is: 4 8-bit grey with alpha"):
        read(job("imagefolder", tmp_path / "data"), out)


# ---------------------------------------------------------------- rows set aside


def test_bad_files_are_set_aside_by_name_and_the_rest_is_used(tmp_path: Path, out: Path) -> None:
    root = folder(tmp_path / "data", {"a": 3, "b": 3})
    whole = png(picture(1, 60, 60))
    put(root / "a" / "cut.png", whole[: len(whole) // 2])
    put(root / "a" / "empty.png", b"")
    put(root / "a" / "text.png", b"not an image at all")
    put(root / "a" / "notes.txt", b"notes")
    put(root / "a" / ".hidden.png", b"")
    put(root / "b" / "huge.png", png(np.zeros((10_001, 10_000), np.uint8)))
    put(root / "loose.png", picture(77))
    (root / "b" / "out.png").symlink_to(put(tmp_path / "secret.png", picture(78)))
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "b" / "again").symlink_to(root / "a")
    source, _, index = run(job("imagefolder", root), out)
    assert source.n_images == len(index) == 6
    assert source.set_aside_reasons == {
        "truncated": 1, "empty file": 1, "not a picture": 1, "not an image file": 1, "too large": 1,
        "missing label": 1, "outside the dataset": 1, "missing file": 1, "a folder, no file": 1,
    }  # fmt: skip
    table = pd.read_csv(out / SET_ASIDE_FILE)
    assert table.columns.tolist() == ["origin", "reason", "detail"]
    reasons = dict(zip(table["origin"], table["reason"], strict=True))
    assert reasons["a/cut.png"] == "truncated"
    assert reasons["b/out.png"] == "outside the dataset"
    assert source.n_set_aside == len(table) == 9


def test_metadata_cannot_reach_out_of_the_folder(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "data"
    for number in range(4):
        put(root / f"{number}.png", picture(number))
    put(tmp_path / "secret.png", picture(9))
    put(root / "unlisted.png", picture(10))
    names = [
        "0.png",
        "1.png",
        "./2.png",
        "3.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "http://x/y.png",
        "no.png",
    ]
    (root / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n},{k % 2}\n" for k, n in enumerate(names)))
    source, _, _ = run(job("imagefolder", root), out)
    assert source.n_images == 4
    assert source.set_aside_reasons == {
        "outside the dataset": 2, "not a local file": 1, "missing file": 1, "not in the metadata": 1,
    }  # fmt: skip


def test_paths_in_parquet_stay_beside_the_file(tmp_path: Path, out: Path) -> None:
    (tmp_path / "data").mkdir()
    secret = put(tmp_path / "secret.png", picture(9))
    for number in range(2):
        put(tmp_path / "data" / f"{number}.png", picture(number))
    paths = ["0.png", "1.png", str(secret), "../secret.png", "https://example.org/a.png", None]
    cells = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": cells, "label": [0, 1] * 3}), tmp_path / "data" / "a.parquet")
    source, _, _ = run(job("parquet", tmp_path / "data" / "a.parquet"), out)
    assert source.n_images == 2
    assert source.set_aside_reasons == {"outside the dataset": 2, "not a local file": 1, "no picture": 1}


def test_missing_and_impossible_labels_are_set_aside(tmp_path: Path, out: Path) -> None:
    labels = [0, 1, None, 0, 1, 2, -1, 7, 0, 1, 0, 1]
    pq.write_table(pa.table(frame(label=labels)), tmp_path / "data.parquet")
    config = job("parquet", tmp_path / "data.parquet", dataset={"class_names": ["no", "yes", "perhaps"]})
    source, _, index = run(config, out)
    assert source.set_aside_reasons == {"label out of range": 2, "missing label": 1}
    assert index["label"].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1]


@pytest.mark.usefixtures("caches")
def test_minus_one_is_missing_under_a_classlabel_and_an_empty_class_stays_known(tmp_path: Path, out: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["x", "y", "lynx"])})
    labels = [-1, 0, 1, None, *([0, 1] * 4)]
    Dataset.from_dict(frame(label=labels), features=features).save_to_disk(tmp_path / "data")
    source, _, index = run(job("disk", tmp_path / "data"), out)
    assert source.classes == ("x", "y", "lynx")
    assert source.set_aside_reasons == {"missing label": 2}
    assert index["label"].tolist() == [0, 1] * 5


def test_copies_are_counted_and_numbered_and_contradictions_set_aside(tmp_path: Path, out: Path) -> None:
    root = folder(tmp_path / "data", {"a": 3, "b": 3})
    put(root / "a" / "copy1.png", picture(0))
    put(root / "a" / "copy2.png", picture(0))
    put(root / "a" / "torn.png", picture(60))
    put(root / "b" / "torn.png", picture(60))
    source, images, index = run(job("imagefolder", root), out)
    assert source.n_duplicates == 2
    assert source.set_aside_reasons == {"conflicting labels": 2}
    ids = index.set_index("origin")["image_id"]
    assert ids["a/copy1.png"] == f"{ids['a/0.png']}-1"
    assert ids["a/copy2.png"] == f"{ids['a/0.png']}-2"
    assert index["image_id"].is_unique
    # What was removed in the middle of the file left no gap.
    for row, origin in enumerate(index["origin"]):
        np.testing.assert_array_equal(images[row, ..., 0], np.asarray(Image.open(root / origin)))


def test_floats_that_are_not_finite_are_set_aside(tmp_path: Path, out: Path) -> None:
    pixels = np.stack([picture(seed, 8, 8, dtype=np.float32) for seed in range(6)])
    pixels[0, 0, 0], pixels[1, 0, 0] = np.nan, np.inf
    np.savez(tmp_path / "data.npz", images=pixels, labels=[0, 1, 0, 1, 0, 1])
    source, _, _ = run(job("medmnist", tmp_path / "data.npz"), out)
    assert source.set_aside_reasons == {"not finite": 2}


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_class_with_few_images_is_read(tmp_path: Path, out: Path, count: int) -> None:
    source, _, index = run(job("imagefolder", folder(tmp_path / "data", {"a": 4, "b": 4, "lynx": count})), out)
    assert source.classes == ("a", "b", "lynx")
    assert (index["label"] == 2).sum() == count


ODD_NAMES = ["x\\..\\x", "CON", "😀 smile", "two\nlines", "a'b\"c", "nul.txt", " outer ", "-rf"]


def test_odd_names_of_classes_are_data(tmp_path: Path, out: Path) -> None:
    root = folder(tmp_path / "data", dict.fromkeys(ODD_NAMES, 2))
    source, _, index = run(job("imagefolder", root), out)
    assert source.classes == tuple(sorted(ODD_NAMES))
    assert index["label"].tolist() == [k for k in range(len(ODD_NAMES)) for _ in range(2)]
    assert sorted(path.name for path in out.iterdir()) == sorted(["images.npy", "index.parquet", "set_aside.csv"])


def test_names_that_look_like_paths_are_data(tmp_path: Path, out: Path) -> None:
    names = ["../../x", "/etc/passwd", "CON"]
    pq.write_table(pa.table(frame(label=names * 4)), tmp_path / "data.parquet")
    source, _, _ = run(job("parquet", tmp_path / "data.parquet"), out)
    assert source.classes == tuple(sorted(names))


def test_a_folder_name_that_is_no_utf8_is_escaped(tmp_path: Path, out: Path) -> None:
    root = folder(tmp_path / "data", {"a": 2})
    odd = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(odd)
    for number in range(2):
        with open(odd + f"/{number}.png".encode(), "wb") as file:
            file.write(png(picture(40 + number)))
    source, _, _ = run(job("imagefolder", root), out)
    assert source.classes == ("a", "caf\\udce9")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 100] * 4, ("9", "10", "100")),
        (["b", "a", "C"] * 4, ("C", "a", "b")),
        (["10", "9", "100"] * 4, ("9", "10", "100")),
        ([True, False, True] * 4, ("false", "true")),
        ([b"x", b"y", b"z"] * 4, ("x", "y", "z")),
    ],
)
def test_order_of_classes(tmp_path: Path, out: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    pq.write_table(pa.table(frame(label=labels)), tmp_path / "data.parquet")
    source, _, index = run(job("parquet", tmp_path / "data.parquet"), out)
    assert source.classes == classes
    spelled = [label.decode() if isinstance(label, bytes) else str(label) for label in labels]
    assert [source.classes[label].lower() for label in index["label"]] == [name.lower() for name in spelled]


# ---------------------------------------------------------------- refused as a whole


def refuse(config: Any, directory: Path, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        read(config, directory)


@pytest.mark.parametrize("form", ["imagefolder", "parquet", "medmnist", "disk", "huggingface"])
def test_a_missing_path_is_refused(tmp_path: Path, out: Path, form: str) -> None:
    refuse(job(form, tmp_path / "nowhere"), out, "does not exist. Check the path")
    with pytest.raises(DatasetError, match="does not exist"):
        source_fingerprint(job(form, tmp_path / "nowhere"))


def test_an_empty_folder_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "data").mkdir()
    refuse(job("imagefolder", tmp_path / "data"), out, "holds no files")
    (tmp_path / "data" / "a").mkdir()
    refuse(job("imagefolder", tmp_path / "data"), out, "holds no files")


def test_a_table_without_rows_is_refused(tmp_path: Path, out: Path) -> None:
    pq.write_table(pa.table(frame()).slice(0, 0), tmp_path / "data.parquet")
    refuse(job("parquet", tmp_path / "data.parquet"), out, "the dataset is empty")


def test_nothing_usable_says_why(tmp_path: Path, out: Path) -> None:
    put(tmp_path / "data" / "a" / "0.png", b"")
    put(tmp_path / "data" / "b" / "0.png", b"text")
    refuse(job("imagefolder", tmp_path / "data"), out, "of 2 rows, 1 × empty file, 1 × not a picture")


def test_a_single_class_keeps_its_name_in_the_refusal(tmp_path: Path, out: Path) -> None:
    refuse(job("imagefolder", folder(tmp_path / "data", {"lynx": 4})), out, "only class 'lynx'")


@pytest.mark.usefixtures("caches")
def test_load_dataset_does_not_lose_the_name_of_a_single_class(tmp_path: Path, out: Path) -> None:
    refuse(job("huggingface", folder(tmp_path / "data", {"lynx": 4})), out, "only class 'lynx'")


@pytest.mark.usefixtures("caches")
def test_load_dataset_reads_folders_of_pictures(tmp_path: Path, out: Path) -> None:
    for number, part in enumerate(("train", "test")):
        folder(tmp_path / "data" / part, {"a": 2, "b": 2}, first_seed=10 * number)
    source, _, index = run(job("huggingface", tmp_path / "data"), out)
    assert source.classes == ("a", "b")
    assert index["given_split"].value_counts().to_dict() == {"train": 4, "test": 4}


@pytest.mark.usefixtures("caches")
def test_nothing_is_left_of_a_directory_that_load_dataset_cannot_read(tmp_path: Path, out: Path) -> None:
    put(tmp_path / "data" / "script.py", b"raise SystemExit('run')")
    refuse(job("huggingface", tmp_path / "data"), out, r"directory .*data cannot be loaded: ")


def test_labels_of_mixed_type_are_refused_with_counts(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "data"
    for number in range(4):
        put(root / f"{number}.png", picture(number))
    labels = ["0", "1", '"0"', '"1"']
    lines = [f'{{"file_name": "{number}.png", "label": {label}}}' for number, label in enumerate(labels)]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    refuse(job("imagefolder", root), out, r"mixed type: 2 × text \('0'\), 2 × whole number \(0\)")


def test_fractions_are_no_labels(tmp_path: Path, out: Path) -> None:
    pq.write_table(pa.table(frame(label=[0.5, 0.25, 0.75] * 4)), tmp_path / "data.parquet")
    refuse(job("parquet", tmp_path / "data.parquet"), out, "fractions, such as 0.5")


def test_lists_are_no_labels(tmp_path: Path, out: Path) -> None:
    pq.write_table(pa.table(frame(label=[[0, 1]] * 12)), tmp_path / "data.parquet")
    refuse(job("parquet", tmp_path / "data.parquet"), out, "several labels for one image")


def test_a_wrong_name_of_a_column_names_the_nearest(tmp_path: Path, out: Path) -> None:
    pq.write_table(pa.table(frame()), tmp_path / "data.parquet")
    config = job("parquet", tmp_path / "data.parquet", dataset={"columns": {"label": "labels"}})
    refuse(config, out, "has no column 'labels'. Did you mean 'label'")


def test_damaged_files_are_refused_by_name(tmp_path: Path, out: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing of the kind")
    refuse(job("parquet", tmp_path / "bad.parquet"), out, "bad.parquet cannot be read")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    refuse(job("medmnist", tmp_path / "bad.npz"), out, r"bad.npz cannot be read as an \.npz")
    (tmp_path / "bad").mkdir()
    refuse(job("disk", tmp_path / "bad"), out, "cannot be opened as a directory of save_to_disk")


def test_a_cut_npz_is_refused(tmp_path: Path, out: Path) -> None:
    np.savez(tmp_path / "whole.npz", images=np.stack(PICTURES), labels=LABELS)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "cut.npz", "w") as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[: -1 if name.startswith("images") else None])
    refuse(job("medmnist", tmp_path / "cut.npz"), out, "array 'images' of .*cut.npz is damaged")


class _Exploding:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_pickles_are_never_loaded(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.empty(2, dtype=object)
    objects[:] = [_Exploding(), _Exploding()]
    np.savez(tmp_path / "data.npz", images=np.stack(PICTURES), labels=LABELS, more=objects)
    refuse(job("medmnist", tmp_path / "data.npz"), out, "'more' of .* holds pickled objects")
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(_Exploding()))
    refuse(job("medmnist", tmp_path / "raw.npz"), out, "cannot be read")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 8, 8)), "labels": np.zeros((4, 14))}, "14 values an image .* Several labels"),
        ({"images": np.zeros((4, 8, 8)), "labels": np.zeros(3)}, "3 entries for 4 images"),
        ({"images": np.zeros((4, 8)), "labels": np.zeros(4)}, "expected \\[n, height, width\\]"),
        ({"images": np.zeros((4, 8, 8))}, "has 'images' but no 'labels'"),
        ({"extra_images": np.zeros((4, 8, 8)), "extra_labels": np.zeros(4)}, "names a split 'extra'"),
        ({"pictures": np.zeros((4, 8, 8))}, "no array named '<split>_images'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, out: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    refuse(job("medmnist", tmp_path / "data.npz"), out, words)


def test_class_names_that_contradict_are_refused(tmp_path: Path, out: Path) -> None:
    refuse(job("digits", dataset={"class_names": ["a", "b"]}), out, "names its classes itself")
    pq.write_table(pa.table(frame()), tmp_path / "data.parquet")
    config = job("parquet", tmp_path / "data.parquet", dataset={"class_names": ["a", "b", "a"]})
    refuse(config, out, "'a' more than once")


# ---------------------------------------------------------------- the hub


READ = """
import sys
from pathlib import Path
from synthaug.errors import SynthaugError
from synthaug.formats.growing_array import GrowingArray
from synthaug.formats.source_rows import Row, Rows
from synthaug.read import read
from tests.small_sources import job
for number, revision in enumerate(sys.argv[2:]):
    directory = Path(sys.argv[1]) / str(number)
    directory.mkdir(parents=True)
    try:
        source = read(job("hub", "owner/name", dataset={"revision": revision}), directory)
        print(source.n_images, source.fingerprint, source.licence, ",".join(source.classes))
    except SynthaugError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_the_hub_is_read_at_a_commit_and_from_the_cache_when_it_is_gone(tmp_path: Path, repository: Path) -> None:
    pq.write_table(pa.table(frame()), tmp_path / "a.parquet")
    card = b"---\nlicense: cc-by-4.0\n---\nA card.\n"
    files = {"README.md": card, "data/train-00000-of-00001.parquet": (tmp_path / "a.parquet").read_bytes()}

    def answers(name: str, *revisions: str, **extra: str) -> list[str]:
        arguments = [sys.executable, "-c", READ, str(tmp_path / name), *revisions]
        environment = {**os.environ, **hub.environment(tmp_path / "home"), **extra, "PYTHONPATH": str(repository)}
        return subprocess.run(
            arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()

    with LoopbackHub() as hub:
        commit = hub.add_dataset("owner/name", files)
        read_there, unknown = answers("online", "main", "v9")
    assert read_there == f"12 hub:owner/name@{commit} cc-by-4.0 0,1,2"
    assert "has no revision 'v9'" in unknown
    cached, gone = answers("offline", commit, "v9", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert cached == read_there
    assert "cannot be asked for 'owner/name' at 'v9'" in gone


def test_a_folder_does_not_stand_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="also a path here"):
        source_fingerprint(job("hub", "owner/name"))
    with pytest.raises(DatasetError, match="not an id of the hub"):
        source_fingerprint(job("hub", "http://example.org/x"))


# ---------------------------------------------------------------- memory, real data


def test_few_images_are_in_memory_at_a_time(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, written, most = 0, 0, 0
    append = GrowingArray.append

    def rows() -> Iterator[Row]:
        nonlocal taken, most
        for number in range(3000):
            taken, most = taken + 1, max(most, taken - written)
            yield Row(str(number), picture(number), number % 2)

    def count(self: GrowingArray, row: np.ndarray) -> None:
        nonlocal written
        append(self, row)
        written += 1

    monkeypatch.setattr(GrowingArray, "append", count)
    monkeypatch.setattr("synthaug.formats.sources.open_source", lambda *_: Rows("numbers", rows))
    source, images, _ = run(job("digits"), out)
    assert source.n_images == written == 3000
    assert most <= 400
    np.testing.assert_array_equal(images[2999, ..., 0], picture(2999))


@pytest.mark.parametrize(
    ("form", "name", "size", "counts"),
    [
        ("medmnist", "pneumoniamnist.npz", 28, [1583, 4273]),
        ("medmnist", "breastmnist.npz", 28, [209, 569]),
        ("imagefolder", "busi64", 64, [436, 209, 133]),
    ],
)
def test_real_data(shared_data: Path, out: Path, form: str, name: str, size: int, counts: list[int]) -> None:
    if not (shared_data / name).exists():
        pytest.skip(f"{name} is not among the development data")
    _, _, index = run(job(form, shared_data / name, size=size), out)
    assert index["label"].value_counts().sort_index().tolist() == counts


def test_one_picture_as_grey_and_as_rgb_is_one_picture(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10)):
        for number in range(3):
            put(tmp_path / "data" / name / f"{number}.png", picture(first + number))
    grey = picture(0)
    put(tmp_path / "data" / "a" / "again.png", np.stack([grey] * 3, -1))
    source, _, index = run(job("imagefolder", tmp_path / "data", image={"colour": "grey"}), tmp_path / "out")
    assert source.n_duplicates == 1
    assert index["content_hash"].nunique() == 6
