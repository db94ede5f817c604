"""Images of another tool: how they are found, which become samples, what is refused, what the audit says of them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthaug import audit as audit_module
from synthaug.adopt import adopt, foreign_config
from synthaug.audit import audit
from synthaug.config import Config
from synthaug.errors import DatasetError, LeakError
from synthaug.judge import judge
from synthaug.read import read
from synthaug.records import SampleBatch, Source
from synthaug.report.contact_sheet import write_contact_sheet
from synthaug.report.rejected_sheet import write_rejected_sheet
from tests.quality_parts import World, digits_world, perturbed
from tests.small_sources import folder, job, picture, png, put

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    settings = {"train": {"threads": 1}, "audit": {"classifier_steps": 60, "planted": 5}}
    return digits_world(tmp_path_factory.mktemp("adopt"), scarce=(1, 3), keep=20, **settings)


def _folder(root: Path, images: dict[str, Any]) -> Path:
    """One folder a class; images are [8, 8] or [8, 8, 3]."""
    for name, pictures in images.items():
        for number, pixels in enumerate(pictures):
            put(root / name / f"{number:02}.png", np.squeeze(pixels))
    return root


def _read(config: Config, path: Path | str, directory: Path) -> Source:
    directory.mkdir(parents=True)
    return read(foreign_config(config, str(path)), directory, foreign=True)


def _adopt(world: World, path: Path, out: Path, config: Config | None = None) -> SampleBatch:
    """Read and adopt what lies at `path`."""
    foreign = _read(config or world.config, path, out / "foreign")
    (out / "samples").mkdir()
    return adopt(config or world.config, world.source, world.splits, foreign, out / "samples")


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _written(batch: SampleBatch) -> tuple[np.ndarray, pd.DataFrame]:
    return np.load(batch.directory / "images.npy"), pd.read_parquet(batch.directory / "samples.parquet")


# ---------------------------------------------------------------- what becomes a sample


def test_images_become_samples_of_the_class_of_their_name(world: World, tmp_path: Path) -> None:
    pictures = {"3": [picture(k) for k in range(4)], "7": [picture(10 + k) for k in range(2)]}
    batch = _adopt(world, _folder(tmp_path / "data", pictures), tmp_path)
    images, table = _written(batch)
    columns = ["row", "sample_id", "label", "class_index", "seed", "micro_batch", "position"]
    assert list(table) == columns
    assert table["row"].tolist() == list(range(6))
    assert table["label"].tolist() == [3, 3, 3, 3, 7, 7]
    assert table["class_index"].tolist() == [0, 1, 2, 3, 0, 1]
    assert (table[["seed", "micro_batch", "position"]] == -1).all(axis=None)
    assert table["sample_id"].is_unique
    assert table["sample_id"].str.match(r"foreign-[0-9a-f]{16}$").all()
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[..., 0], np.stack([*pictures["3"], *pictures["7"]]))
    assert (batch.n_samples, batch.counts) == (6, {3: 4, 7: 2})
    assert (batch.checkpoint_digest, batch.solver, batch.steps, batch.environment) == ("", "none", 0, {})
    assert sorted(path.name for path in batch.directory.iterdir()) == ["images.npy", "samples.parquet"]


def test_equal_images_have_an_equal_digest_and_other_classes_another(world: World, tmp_path: Path) -> None:
    pictures = [picture(k) for k in range(4)]
    one = _adopt(world, _folder(tmp_path / "a", {"1": pictures}), tmp_path / "one")
    same = _adopt(world, _folder(tmp_path / "b", {"1": pictures}), tmp_path / "same")
    other = _adopt(world, _folder(tmp_path / "c", {"2": pictures}), tmp_path / "other")
    assert one.digest == same.digest != other.digest


def test_duplicates_and_all_splits_are_kept(world: World, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        _folder(tmp_path / "data" / split, {"3": [picture(1), picture(2)], "4": [picture(3)]})
    batch = _adopt(world, tmp_path / "data", tmp_path)
    _, table = _written(batch)
    assert batch.counts == {3: 6, 4: 3}
    assert table["sample_id"].is_unique
    assert table.groupby("label")["class_index"].apply(list).to_dict() == {3: list(range(6)), 4: list(range(3))}


def test_many_images_are_copied_in_pieces(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthaug.quality.arithmetic._MOST_IMAGES", 3)
    pictures = [picture(k) for k in range(10)]
    images, _ = _written(_adopt(world, _folder(tmp_path / "data", {"3": pictures}), tmp_path))
    np.testing.assert_array_equal(images[..., 0], np.stack(pictures))


def _marked(path: Path, labels: list[int], synthetic: list[bool], names: list[str]) -> Path:
    from datasets import ClassLabel, Dataset, Features, Image, Value

    path.parent.mkdir(parents=True)
    features = Features({"image": Image(), "label": ClassLabel(names=names), "is_synthetic": Value("bool")})
    cells = [{"bytes": png(picture(k)), "path": None} for k in range(len(labels))]
    Dataset.from_dict({"image": cells, "label": labels, "is_synthetic": synthetic}, features=features).to_parquet(path)
    return path


def test_of_a_release_of_ours_only_the_synthetic_images_count(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = tmp_path / "release"
    synthetic = [False, True, False, True, True, False]
    _marked(release / "data" / "train-00000-of-00001.parquet", [0, 1, 2, 0, 1, 2], synthetic, ["3", "5", "9"])
    (release / "release.json").write_text("{}")
    pq.write_table(pa.table({"sample_id": ["x"]}), release / "manifest.parquet")
    # The columns of a release are its own, whatever those of the source are called.
    config = world.config.model_copy(
        update={"dataset": job("parquet", "x", dataset={"columns": {"image": "i", "label": "l"}}).dataset}
    )
    with caplog.at_level(logging.INFO):
        batch = _adopt(world, release, tmp_path / "out", config)
    images, table = _written(batch)
    assert batch.counts == {3: 1, 5: 2}
    np.testing.assert_array_equal(images[..., 0], np.stack([picture(1), picture(3), picture(4)]))
    assert table["label"].tolist() == [5, 3, 5]
    assert "3 images of parquet data are marked is_synthetic; the other 3 are left out" in caplog.text


def test_a_set_without_any_real_image_is_taken_whole(world: World, tmp_path: Path) -> None:
    path = _marked(tmp_path / "data" / "train.parquet", [0, 0, 1], [True] * 3, ["3", "5"])
    assert _adopt(world, path, tmp_path).counts == {3: 2, 5: 1}


def test_classes_left_out_of_the_dataset_are_left_out_here(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _with(world.config, dataset={"exclude": ["7"]})
    path = _folder(tmp_path / "data", {"3": [picture(1)], "7": [picture(2), picture(3)]})
    assert _adopt(world, path, tmp_path / "out", config).counts == {3: 1}
    assert "2 images of image folder data are left out: their class is in dataset.exclude" in caplog.text
    with pytest.raises(DatasetError, match="no image of image folder only is left to try"):
        _adopt(world, _folder(tmp_path / "only", {"7": [picture(2)]}), tmp_path / "none", config)


# ---------------------------------------------------------------- classes


def _named(world: World, names: list[str], class_names: list[str] | None = None) -> World:
    """The same world with other names of classes, given by the settings where `class_names` says so."""
    source = world.source.model_copy(update={"classes": (*names, *CLASSES[len(names) :])})
    config = _with(world.config, dataset={"class_names": class_names})
    return World(**{**world.__dict__, "source": source, "config": config})


def test_unknown_classes_are_refused_with_the_nearest(world: World, tmp_path: Path) -> None:
    named = _named(world, ["normal", "benign"])
    path = _folder(tmp_path / "data", {"normal": [picture(0)], "benin": [picture(1), picture(2)], "qq": [picture(3)]})
    words = r"3 images of image folder data .*has not: 'benin' \(did you mean 'benign'\?\), 'qq'\. It has: normal, "
    with pytest.raises(DatasetError, match=words):
        _adopt(named, path, tmp_path)


def test_an_empty_folder_of_another_class_is_no_matter(world: World, tmp_path: Path) -> None:
    path = _folder(tmp_path / "data", {"3": [picture(1)]})
    (path / "unheard of").mkdir()
    assert _adopt(world, path, tmp_path).counts == {3: 1}


def _arrays(path: Path, labels: list[int], **changes: Any) -> Path:
    values = {"images": np.stack([picture(k) for k in range(len(labels))]), "labels": labels, **changes}
    np.savez(path, **values)
    return path


def test_numbers_stand_for_the_classes_that_the_settings_name(world: World, tmp_path: Path) -> None:
    names = ["grade 1", "grade 2", *CLASSES[2:]]
    named = _named(world, names[:2], names)
    assert _adopt(named, _arrays(tmp_path / "a.npz", [1, 1, 0]), tmp_path).counts == {0: 1, 1: 2}
    with pytest.raises(DatasetError, match=r"1 images of arrays of b.npz .* has not: '10'.*dataset.class_names"):
        _adopt(named, _arrays(tmp_path / "b.npz", [1, 10, 0]), tmp_path / "b")
    # Names of classes, where they are there, count for themselves.
    path = _folder(tmp_path / "data", {"grade 2": [picture(0)]})
    assert _adopt(named, path, tmp_path / "c").counts == {1: 1}
    put(tmp_path / "data" / "grade 3" / "0.png", picture(5))
    with pytest.raises(DatasetError, match=r"'grade 3' \(did you mean 'grade [12]'\?\)"):
        _adopt(named, tmp_path / "data", tmp_path / "d")


def test_names_inside_a_table_go_before_those_of_the_settings(world: World, tmp_path: Path) -> None:
    names = ["grade 1", "grade 2", *CLASSES[2:]]
    path = _marked(tmp_path / "data" / "a.parquet", [0, 0, 1], [False] * 3, ["grade 2", "9"])
    assert _adopt(_named(world, names[:2], names), path, tmp_path).counts == {1: 2, 9: 1}


def test_numbers_that_nobody_named_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"'0', '1'\. .*a number stands for a class only through"):
        _adopt(_named(world, ["normal", "ill"]), _arrays(tmp_path / "a.npz", [0, 1]), tmp_path)


# ---------------------------------------------------------------- pixels


def test_colours_that_differ_are_refused_and_converted_on_request(world: World, tmp_path: Path) -> None:
    path = _folder(tmp_path / "data", {"3": [picture(k, 8, 8, 3) for k in range(3)]})
    words = r"are uint8 rgb, 8×8, 0.0 to 255.0, and the real images are uint8 grey, .* Set image.colour to grey"
    with pytest.raises(DatasetError, match=words):
        _adopt(world, path, tmp_path)
    batch = _adopt(world, path, tmp_path / "grey", _with(world.config, image={"colour": "grey"}))
    assert _written(batch)[0].shape == (3, 8, 8, 1)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([picture(k, dtype=np.uint16) for k in range(2)], "uint16 grey.* in the depth of the real images first"),
        ([picture(k, dtype=np.float32) for k in range(2)], "float32 grey.* in the depth of the real images first"),
        ([picture(k, 8, 8, 5) for k in range(2)], "uint8 5 channels.* with the channels of the real images first"),
    ],
)
def test_other_pixels_are_refused(world: World, tmp_path: Path, images: list[np.ndarray], words: str) -> None:
    path = _arrays(tmp_path / "a.npz", [3, 3], images=np.stack(images))
    with pytest.raises(DatasetError, match=words):
        _adopt(world, path, tmp_path)


def test_another_size_or_range_is_refused_with_the_setting_that_helps(world: World, tmp_path: Path) -> None:
    path = _folder(tmp_path / "data", {"3": [picture(k) for k in range(3)]})
    with pytest.raises(DatasetError, match=r"16×16.*8×8.*the same image.size"):
        _adopt(world, path, tmp_path / "large", _with(world.config, image={"size": 16}))
    real = [picture(k, dtype=np.float32) for k in range(4)]
    source = read(job("medmnist", _arrays(tmp_path / "real.npz", [3, 4] * 2, images=real)), _new(tmp_path / "read"))
    other = World(**{**world.__dict__, "source": source})
    path = _arrays(tmp_path / "a.npz", [3, 3], images=np.stack(real[:2]) / 2)
    with pytest.raises(DatasetError, match=r"Set image.value_range to \[") as refusal:
        _adopt(other, path, tmp_path / "low")
    found = re.search(r"image.value_range to \[(.*), (.*)\], the range", str(refusal.value))
    assert found
    low, high = float(found[1]), float(found[2])
    # As advised; there is nothing in validation or test of the other world that is among these images.
    config = _with(world.config, image={"value_range": (low, high)})
    foreign = _read(config, path, tmp_path / "advised")
    assert (foreign.pixels.low, foreign.pixels.high) == (source.pixels.low, source.pixels.high)


def _new(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


# ---------------------------------------------------------------- leaks


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_images_that_measure_are_refused_by_name(world: World, tmp_path: Path, split: str, mirrored: bool) -> None:
    held_out = world.images[world.rows(split)[:4]]
    pictures = [picture(0), *(image[:, ::-1] if mirrored else image for image in held_out)]
    words = rf"4 images of its {split} split \(the first: 3/01.png, 3/02.png, 3/03.png\)\. Nothing"
    with pytest.raises(LeakError, match=words):
        _adopt(world, _folder(tmp_path / "data", {"3": pictures}), tmp_path)


def test_both_splits_are_named(world: World, tmp_path: Path) -> None:
    images = [*world.images[world.rows("validation")[:2]], *world.images[world.rows("test")[:1]]]
    with pytest.raises(LeakError, match=r"1 images of its test split .* and 2 images of its validation split"):
        _adopt(world, _folder(tmp_path / "data", {"3": images}), tmp_path)


def test_training_images_and_images_used_for_nothing_are_no_leak(world: World, tmp_path: Path) -> None:
    # A copy of a training image is the audit's to find.
    images = world.images[[*world.rows("train")[:3], *world.table.index[world.table["held_back"] == "cut"][:3]]]
    assert _adopt(world, _folder(tmp_path / "data", {"3": images}), tmp_path).n_samples == 6


def test_an_image_of_one_tone_is_nobodys_secret(world: World, tmp_path: Path) -> None:
    row = world.rows("test")[0]
    images = world.images.copy()
    images[row] = 0
    np.save(_new(tmp_path / "read") / "images.npy", images)
    (tmp_path / "read" / "index.parquet").write_bytes((world.source.directory / "index.parquet").read_bytes())
    source = world.source.model_copy(update={"directory": tmp_path / "read"})
    dark = World(**{**world.__dict__, "source": source})
    path = _folder(tmp_path / "data", {"3": [picture(0), np.zeros((8, 8), np.uint8)]})
    assert _adopt(dark, path, tmp_path).n_samples == 2


# ---------------------------------------------------------------- what lies at a path


def _tables(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [png(picture(0))], "label": ["3"]}), root / name)
    return root


def _saved(root: Path) -> Path:
    (root / "train").mkdir(parents=True)
    (root / "dataset_dict.json").write_text("{}")
    return root


def _described(root: Path) -> Path:
    put(root / "train" / "0.png", picture(0))
    (root / "train" / "metadata.csv").write_text("file_name,label\n0.png,3\n")
    return root


def _card(root: Path) -> Path:
    put(root / "README.md", b"A card.")
    put(root / "contact_sheet.png", picture(0))
    return _tables(root, "data/train.parquet")


def _with_papers(root: Path) -> Path:
    put(root / "LICENSE", b"free")
    put(root / "README.md", b"pictures")
    put(root / ".cache" / "x.parquet", b"x")
    return folder(root, {"3": 1})


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda root: _arrays(root.with_suffix(".npz"), [3]), "medmnist"),
        (lambda root: _tables(root, "a.parquet") / "a.parquet", "parquet"),
        (lambda root: _tables(root, "a.parquet", "deeper/b.pq"), "parquet"),
        (_saved, "disk"),
        (lambda root: folder(root, {"3": 1}), "imagefolder"),
        (_described, "imagefolder"),
        (_with_papers, "imagefolder"),
        (_card, "huggingface"),
        (lambda root: put(root / "rows.jsonl", b"{}").parent, "huggingface"),
    ],
)
def test_the_form_is_told_from_what_lies_there(world: World, tmp_path: Path, make: Any, form: str) -> None:
    path = make(tmp_path / "data")
    dataset = foreign_config(world.config, str(path)).dataset
    assert (dataset.format, dataset.path) == (form, str(path))


def test_what_concerns_the_real_images_alone_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"image": "scan", "label": "kind", "group": "patient", "subgroup": "site", "split": "part"}
    real = {
        "columns": columns, "class_names": ["a", "b"], "cut": {"a": 3}, "exclude": ["b"], "citation": "us",
        "licence": "mit", "revision": "v1",
    }  # fmt: skip
    config = job("hub", "owner/real", size=16, image={"colour": "rgb", "fit": "pad"}, dataset=real)
    folder(tmp_path / "data", {"a": 1})
    monkeypatch.chdir(tmp_path)
    found = foreign_config(config, "data")
    assert found.image == config.image
    assert found.dataset == job(
        "imagefolder", tmp_path / "data",
        dataset={"columns": {"image": "scan", "label": "kind"}, "class_names": ["a", "b"]},
    ).dataset  # fmt: skip
    assert config.dataset.revision == "v1"


def test_what_is_not_here_and_looks_like_an_id_is_on_the_hub(world: World) -> None:
    dataset = foreign_config(world.config, "owner/some.name-2").dataset
    assert (dataset.format, dataset.path) == ("hub", "owner/some.name-2")


@pytest.mark.parametrize(
    "path", ["nowhere", "./no/where", "../no", "/no/where", "no/where.npz", "no/x.parquet", "a/b/c"]
)
def test_a_path_to_nothing_is_refused(world: World, path: str) -> None:
    with pytest.raises(DatasetError, match=f"{path.lstrip('./')}: it does not exist. Check the path"):
        foreign_config(world.config, path)


@pytest.mark.parametrize("path", ["", "  ", "a\0b"])
def test_a_path_that_is_none_is_refused(world: World, path: str) -> None:
    with pytest.raises(DatasetError, match="names nothing"):
        foreign_config(world.config, path)


def test_what_is_no_dataset_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no images to try"):
        foreign_config(world.config, str(_new(tmp_path / "empty")))
    put(tmp_path / "papers" / "README.md", b"to come")
    with pytest.raises(DatasetError, match="holds no images to try"):
        foreign_config(world.config, str(tmp_path / "papers"))
    for name in ("one.png", "data.zip"):
        with pytest.raises(DatasetError, match=f"{name} is no dataset"):
            foreign_config(world.config, str(put(tmp_path / name, b"x")))


def test_conflicting_labels_alone_leave_nothing(world: World, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="every picture in it carries different labels"):
        _adopt(world, _folder(tmp_path / "data", {"3": [picture(0)], "4": [picture(0)]}), tmp_path)


# ---------------------------------------------------------------- the audit of them


@pytest.mark.slow
def test_the_audit_judges_them_and_says_what_it_cannot_know(world: World, tmp_path: Path) -> None:
    judged = judge(world.config, world.source, world.splits, _new(tmp_path / "judge"))
    random = np.random.default_rng(0)
    # Class 3 is one the plan raises, 6 one it does not; 1 is raised and not offered.
    training = {label: world.images[world.rows("train", label)] for label in (0, 3, 6)}
    images = {str(label): list(perturbed(training[label][:20], random)) for label in (3, 6)}
    images["3"] += [training[3][0], training[3][1][:, ::-1], images["3"][0], np.zeros((8, 8), np.uint8)]
    images["6"] += list(training[0][:1])
    batch = _adopt(world, _folder(tmp_path / "data", images), tmp_path)
    report = audit(world.config, world.source, world.splits, world.plan, [], judged, [batch], _new(tmp_path / "audit"))
    assert report.notes[0] == audit_module.UNKNOWN_ORIGIN
    assert not any("planned and none was drawn" in note for note in report.notes)
    by_label = {item.label: item for item in report.classes}
    assert (by_label[3].n_wanted, by_label[3].n_candidates, by_label[3].n_missing) == (24, 24, 0)
    assert (by_label[6].n_wanted, by_label[6].n_candidates, by_label[6].n_missing) == (21, 21, 0)
    assert (by_label[1].n_wanted, by_label[1].n_candidates, by_label[1].n_missing) == (0, 0, 0)
    assert by_label[6].n_accepted > 0
    rejected = by_label[3].rejected
    assert rejected[audit_module.COPY] == 2
    assert rejected[audit_module.DUPLICATE] >= 1
    assert rejected[audit_module.BROKEN] == 1
    for write in (write_rejected_sheet, write_contact_sheet):
        path = write(world.source, world.splits, [batch], report, tmp_path / "sheet.png")
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_class_that_repeats_itself_is_withheld_with_advice_for_whoever_made_it(world: World, tmp_path: Path) -> None:
    judged = judge(world.config, world.source, world.splits, _new(tmp_path / "judge"))
    random = np.random.default_rng(0)
    images = perturbed(world.images[world.rows("train", 6)[:60]], random)
    config = _with(world.config, audit={"min_coverage": 1.0})
    batch = _adopt(world, _folder(tmp_path / "data", {"6": images}), tmp_path, config)
    report = audit(config, world.source, world.splits, world.plan, [], judged, [batch], _new(tmp_path / "audit"))
    withheld = next(item.withheld for item in report.classes if item.label == 6)
    assert withheld is not None
    assert "under audit.min_coverage 1." in withheld
    assert withheld.endswith("Offer more varied images of it.")


@pytest.mark.slow
def test_a_judge_that_used_test_images_judges_nobody(world: World, tmp_path: Path) -> None:
    judged = judge(world.config, world.source, world.splits, _new(tmp_path / "judge"))
    moved = world.table.assign(split=world.table["split"].replace("validation", "test"))
    moved.to_parquet(_new(tmp_path / "moved") / "splits.parquet")
    splits = world.splits.model_copy(update={"directory": tmp_path / "moved"})
    with pytest.raises(LeakError, match="test images were used by the judge"):
        audit(world.config, world.source, splits, world.plan, [], judged, [], _new(tmp_path / "audit"))
