"""A release with samples of several checkpoints: each row names its own, and whoever reads it finds that one.

A class was added in front of the others, so that their labels moved: class 1 of the release is kept from the first
checkpoint, where it was 0, and class 2 was drawn again from the second, which started from the first.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthaug.affected import affected
from synthaug.config import Config, DicomCopies, PushConfig, parse_config
from synthaug.digest import digest_array, digest_directory
from synthaug.errors import CheckpointError, ReleaseError, VerificationError
from synthaug.formats.hub import push
from synthaug.formats.manifest import generator_label, read_release_file, stated_checkpoints, write_release_file
from synthaug.formats.provenance import PROVENANCE_FILE
from synthaug.generators import REGISTRY
from synthaug.generators.canonical import sample_id
from synthaug.loaders import ReleaseDataset
from synthaug.records import (
    AUDIT_FILE,
    MEMBERSHIP_FILE,
    PIPELINE_DIR,
    SEEN_FILE,
    ClassMembership,
    Interval,
    Membership,
    MembershipFigures,
    SampleBatch,
    SampleRequest,
)
from synthaug.remake import remake
from synthaug.sample import sample
from synthaug.verify import verify
from tests.conftest import tiny_values
from tests.loopback_hub import LoopbackHub
from tests.release_parts import Parts, _report, hub_cache, make_grown_parts, make_parts, make_unlearned_parts
from tests.test_provenance import complaints, ends, reached, values
from tests.test_provenance import read as read_provenance
from tests.verdict_parts import make_verdict

Command = Callable[..., subprocess.CompletedProcess[str]]


def found_by_attack(folder: Path, auc: float) -> Membership:
    interval = Interval(estimate=auc, low=auc - 0.05, high=auc + 0.05)
    figures = {"n_members": 40, "n_heldout": 20, "auc": interval}
    return Membership(
        directory=folder, digest=f"{auc}", overall=MembershipFigures(**figures),
        classes=(ClassMembership(label=1, name="one", **figures),), levels=(0.1,), draws=3, most_of_a_class=100,
        seconds=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("inputs")
    parts = make_grown_parts(folder)
    return replace(parts, memberships=(found_by_attack(folder, 0.625), found_by_attack(folder, 0.5)))


@pytest.fixture(scope="module")
def made(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.release(tmp_path_factory.mktemp("made") / "release", draw_sheet=True).directory


def digests(parts: Parts) -> list[str]:
    return [parts.earlier[0].digest, parts.checkpoint.digest]


# The release itself


def test_every_row_is_of_its_own_checkpoint(parts: Parts, made: Path) -> None:
    manifest = pd.read_parquet(made / "manifest.parquet")
    old, new = (manifest[manifest["checkpoint_digest"] == digest] for digest in digests(parts))
    assert len(old) + len(new) == len(manifest)
    assert (set(old["class_name"]), set(new["class_name"])) == ({"one"}, {"two"})
    assert (set(old["label"]), set(new["label"])) == ({1}, {2})
    columns = ["steps", "guidance", "threads", "job_seed", "torch_version", "diffusers_version", "cpu_capability"]
    assert old[columns].drop_duplicates().to_numpy().tolist() == [[11, 2.5, 1, 5, "y", "y", "y"]]
    assert new[columns].drop_duplicates().to_numpy().tolist() == [[20, 1.5, 2, 0, "x", "x", "x"]]
    # The images are those that were drawn: of a round, first all of the one class and then all of the other.
    for part, rounds, first in ((old, parts.drawn[:2], 0), (new, parts.drawn[2:], 1)):
        for row in part.itertuples():
            number, inside = (0, row.class_index) if row.class_index < 20 else (1, row.class_index - 20)
            half = len(rounds[number]) // 2
            assert row.pixel_hash == digest_array(rounds[number][first * half + inside])


def test_the_release_states_its_checkpoints_and_their_labels(parts: Parts, made: Path, tmp_path: Path) -> None:
    stated = read_release_file(made)
    old, new = digests(parts)
    assert stated_checkpoints(stated) == (old, new)
    assert stated["checkpoint_digest"] == new
    # Class 1 is the first checkpoint's 0; class 2 it had too, but nothing of it was kept.
    assert [generator_label(stated, old, label) for label in range(3)] == [None, 0, None]
    assert [generator_label(stated, new, label) for label in range(3)] == [0, 1, 2]
    one = read_release_file(make_parts(tmp_path / "in").release(tmp_path / "one").directory)
    assert stated_checkpoints(one) == (one["checkpoint_digest"],)
    assert not {"checkpoint_digests", "generator_labels"} & set(one)


def test_labels_of_one_checkpoint_are_put_together_from_all_its_rounds(tmp_path: Path) -> None:
    """A round whose classes all stay where they are has no map, and the other rounds' must not speak for it."""
    parts = make_parts(tmp_path / "in")
    first, second = parts.batches
    moved = replace(parts, batches=(first.only({1: 1, 2: 2}), second.only({1: 1})))
    from synthaug.release import _stated_checkpoints

    swapped = first.only({1: 0})
    stated = _stated_checkpoints([parts.checkpoint], [swapped, second.model_copy(update={"counts": {2: 10}})])
    digest = parts.checkpoint.digest
    assert [generator_label(stated, digest, label) for label in range(3)] == [1, None, 2]
    assert "generator_labels" not in _stated_checkpoints([parts.checkpoint], moved.batches)


def test_equal_inputs_give_equal_files(parts: Parts, made: Path, tmp_path: Path) -> None:
    again = parts.release(tmp_path / "again", draw_sheet=True).directory
    assert digest_directory(again) == digest_directory(made)


def test_it_is_verified_and_loads(parts: Parts, made: Path, tmp_path: Path) -> None:
    result = verify(made)
    assert (result.problems, result.n_images) == ((), 40)
    data = datasets.load_dataset(str(made), cache_dir=str(tmp_path))["train"]
    pairs = {(row["label"], row["sample_id"]) for row in data if row["is_synthetic"]}
    manifest = pd.read_parquet(made / "manifest.parquet")
    assert pairs == set(zip(manifest["label"], manifest["sample_id"], strict=True))
    ours = ReleaseDataset(made, synthetic_ratio=math.inf, verify=True)
    assert sorted(int(ours[row][1]) for row in range(len(ours))) == sorted(data["label"])


def test_a_row_of_a_checkpoint_that_the_release_does_not_state_is_told(
    parts: Parts, made: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "release"))
    stated = {name: value for name, value in read_release_file(copy).items() if name != "digest"}
    stated["checkpoint_digests"] = [stated["checkpoint_digest"], "f" * 64]
    write_release_file(copy, stated)
    problems = verify(copy).problems
    name = parts.earlier[0].digest[:12]
    told = f"manifest.parquet: row 0: drawn from checkpoint {name}, which release.json does not name"
    assert problems[0] == told
    assert sum("which release.json does not name" in text for text in problems) == 18
    assert f"{PROVENANCE_FILE}: does not name checkpoint ffffffffffff, which release.json does" in problems


@pytest.mark.parametrize(
    "change",
    [{"generator_labels": {"OLD": {"x": 1}}}, {"generator_labels": {"OLD": 5}}, {"checkpoint_digests": 7}],
)
def test_a_statement_that_is_none_is_no_traceback(
    parts: Parts, made: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    stated = {name: value for name, value in read_release_file(made).items() if name != "digest"}
    plain = json.dumps({**stated, **change}).replace("OLD", parts.earlier[0].digest)
    write_release_file(tmp_path, json.loads(plain))
    with pytest.raises(VerificationError, match="was not written by synthaug"):
        remake(tmp_path)


def test_samples_of_a_checkpoint_that_is_not_given_are_refused(parts: Parts, tmp_path: Path) -> None:
    name = parts.earlier[0].digest[:12]
    with pytest.raises(ReleaseError, match=f"drawn from checkpoint {name}, but the release is of checkpoint"):
        replace(parts, earlier=(), memberships=()).release(tmp_path / "release")


place = st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(["a", "b"]), st.integers(0, 50))


@given(place, place)
def test_ids_of_two_checkpoints_never_meet(one: tuple[int, int, str, int], other: tuple[int, int, str, int]) -> None:
    def named(checkpoint: int, seed: int, name: str, index: int) -> str:
        return sample_id(f"{checkpoint}" * 64, seed, name, index, steps=4, guidance=1.0, micro_batch=8, threads=1)

    assert (named(*one) == named(*other)) == (one == other)


# What it says of itself


def test_the_papers_say_what_came_from_which_checkpoint(parts: Parts, made: Path) -> None:
    old, new = (digest[:12] for digest in digests(parts))
    card = (made / "README.md").read_text(encoding="utf-8")
    assert f"| `{old}` | one | 18 | 13 | 0.625 [0.575, 0.675] |" in card
    assert f"| `{new}` | two | 22 | 50 | 0.500 [0.450, 0.550] |" in card
    assert "drawn from 2 checkpoints of a generator" in card
    assert f"{old}: The checkpoint was trained without differential privacy." in card
    assert f"The figures here are of the newest checkpoint, {new}." in card
    page = (made / "report.html").read_text(encoding="utf-8")
    assert 'id="checkpoints"' in page
    for cell in (old, "18", "13", "0.625 [0.575, 0.675]", new, "22", "50"):
        assert f">{cell}<" in page
    for text in (card, page):
        assert "one generator, trained once" not in text


def test_the_verdict_is_not_said_to_be_of_one_generator(parts: Parts, tmp_path: Path) -> None:
    verdict = make_verdict("helps").model_copy(update={"directory": tmp_path})
    (tmp_path / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    release = parts.release(tmp_path / "release", verdict=verdict).directory
    for name in ("README.md", "report.html"):
        text = (release / name).read_text(encoding="utf-8")
        assert "All figures are of these 2 checkpoints, each trained once: others can come out otherwise." in text
        assert "one generator, trained once" not in text.lower()


def test_provenance_has_both_trainings_and_what_came_of_what(parts: Parts, made: Path) -> None:
    assert complaints((made / PROVENANCE_FILE).read_text(encoding="utf-8")) == []
    document = read_provenance(made)
    from prov.model import ProvDerivation, ProvGeneration, ProvUsage

    old, new = (f"synthaug:checkpoint-{digest}" for digest in digests(parts))
    dataset = f"synthaug:dataset-{parts.source.digest}"
    for name in read_release_file(made)["files"]:
        if name != PROVENANCE_FILE:
            back = reached(document, f"release:{name}", ProvGeneration, ProvUsage)
            assert {old, new} <= back, name
    assert {old, dataset} <= reached(document, new, ProvDerivation)
    assert new not in reached(document, old, ProvDerivation)
    assert dataset in reached(document, old, ProvDerivation)
    kept, again = (f"synthaug:samples-{parts.batches[number].digest}" for number in (0, 2))
    assert new not in reached(document, kept, ProvDerivation)
    assert old in reached(document, kept, ProvDerivation)
    assert new in reached(document, again, ProvDerivation)
    made_by = dict(ends(document, ProvGeneration))
    assert len(made_by) == len(list(ends(document, ProvGeneration)))
    drawn = f"synthaug:samples-{parts.batches[0].drawn_digest}"
    assert values(document, made_by[drawn])["synthaug:seed"] == 5
    assert values(document, made_by[old])["synthaug:n_training_images"] == 13
    assert values(document, made_by[new])["synthaug:n_training_images"] == 50


@pytest.mark.parametrize("seen", ["41 of the 50", "all", "unknown"])
def test_the_papers_say_that_the_only_checkpoint_learned_from_an_earlier_state(tmp_path: Path, seen: str) -> None:
    parts = make_unlearned_parts(tmp_path / "in") if seen == "41 of the 50" else make_parts(tmp_path / "in")
    if seen == "unknown":
        (parts.checkpoint.directory / SEEN_FILE).unlink()
    release = parts.release(tmp_path / "release").directory
    told = (
        f"Checkpoint {parts.checkpoint.digest[:12]} was trained on an earlier state of the dataset, with 41 real "
        "training and 12 validation images; now there are 50 and 12. Nothing was trained on what came since."
    )
    card, page = ((release / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    for text in (card, page):
        assert (told in text) is (seen == "41 of the 50")
        assert ("made before the generator was trained" in text) is (seen != "41 of the 50")
    assert ("trained_on: the real training images" in card) is (seen != "41 of the 50")
    assert ("from 50 real training images" in page) is (seen != "41 of the 50")


def test_other_validation_images_are_another_state_too_and_other_test_images_are_not(tmp_path: Path) -> None:
    from synthaug.records import SPLITS_FILE
    from synthaug.report.checkpoint_words import earlier_state, learned

    parts = make_parts(tmp_path / "in")
    path = parts.splits.directory / SPLITS_FILE
    table = pd.read_parquet(path)
    for split, current in (("test", True), ("validation", False), ("train", False)):
        first = table.index[(table["split"] == split) & table["held_back"].isna()][0]
        table.drop(index=first).to_parquet(path)
        now = learned(parts.checkpoint, parts.splits)
        assert now is not None
        assert (now.n_train, now.n_validation, now.is_current) == (50, 12, current)
        assert (earlier_state(parts.checkpoint, parts.splits) == "") is current
    # An image that is held back now was learned from all the same.
    table.assign(held_back="cut").to_parquet(path)
    assert earlier_state(parts.checkpoint, parts.splits) != ""


# Kept samples stay what they are


def kept_copies(release: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (release / "dicom").iterdir()}


def test_dicom_copies_of_kept_samples_are_the_same_bytes_in_every_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pydicom

    parts = make_grown_parts(tmp_path / "in")
    versions = {"synthaug": "0.0.9"}
    drawn = tuple(item.model_copy(update={"environment": item.environment | versions}) for item in parts.batches)
    settings = DicomCopies(uid_root="2.25", sop_class="secondary-capture")
    first = replace(parts, batches=drawn).release(tmp_path / "first", dicom=settings).directory
    # The next job trained again, refused a kept sample and ran under another version.
    newer = parts.checkpoint.model_copy(update={"digest": "e" * 64, "started_from": parts.earlier[0].digest})
    again = tuple(item.model_copy(update={"checkpoint_digest": newer.digest}) for item in drawn[2:])
    audit = pd.read_parquet(parts.report.directory / AUDIT_FILE)
    mine = (audit["label"] == 1) & (audit["rank"] >= 0)
    audit.loc[mine, "rank"] -= 1
    audit.loc[mine & (audit["rank"] < 0), "accepted"] = False
    audit.to_parquet(parts.report.directory / AUDIT_FILE, index=False)
    monkeypatch.setattr("synthaug.__version__", "9.9.9")
    grown = replace(parts, checkpoint=newer, batches=(*drawn[:2], *again))
    second = grown.release(tmp_path / "second", dicom=settings).directory
    one, two = kept_copies(first), kept_copies(second)
    names = pd.read_parquet(first / "manifest.parquet").set_index("sample_id")["class_name"]
    kept = {f"{name}.dcm" for name in names.index[names == "one"]} & set(two)
    assert len(kept) == 17
    assert all(one[name] == two[name] for name in kept)
    # Those that another checkpoint drew are other images, though they look the same.
    found = [pydicom.dcmread(file) for file in sorted((second / "dicom").iterdir())]
    assert len({item.SOPInstanceUID for item in found}) == len(found)
    before = {pydicom.dcmread(first / "dicom" / name).SOPInstanceUID for name in set(one) - kept}
    assert not before & {item.SOPInstanceUID for item in found}
    # A series is of one study and one number, and no number of an image comes twice in it.
    series: dict[str, list[Any]] = {}
    for item in found:
        series.setdefault(item.SeriesInstanceUID, []).append(item)
    assert sorted(items[0].SeriesNumber for items in series.values()) == [1, 3]
    assert len({items[0].StudyInstanceUID for items in series.values()}) == 2
    for items in series.values():
        assert len({(item.StudyInstanceUID, item.SeriesNumber, item.SeriesDescription) for item in items}) == 1
        assert len({item.InstanceNumber for item in items}) == len(items)


def drawn_by_noise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Class 1 drawn from one checkpoint and class 2 from another, for real, but by a generator that learns nothing."""
    monkeypatch.setitem(REGISTRY, "noise", "tests.test_scale:Noise")
    parts = make_parts(folder)
    checkpoints, batches = [], []
    for name, ranges in (("old", {1: (0, 30)}), ("new", {2: (0, 30)})):
        pipeline = folder / name / PIPELINE_DIR
        pipeline.mkdir(parents=True)
        (pipeline / "weights").write_text(name)
        values = {"directory": pipeline.parent, "digest": digest_directory(pipeline), "generator": "noise"}
        checkpoints.append(parts.checkpoint.model_copy(update=values))
        place = folder / f"drawn-{name}"
        place.mkdir()
        batches.append(sample(parts.config, parts.source, checkpoints[-1], SampleRequest(ranges=ranges), place))
    report = _report(folder / "audit-noise", parts.plan, batches, None)
    return replace(parts, earlier=(checkpoints[0],), checkpoint=checkpoints[1], batches=tuple(batches), report=report)


def test_a_checkpoint_that_is_given_need_not_be_one_of_the_rows_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = drawn_by_noise(tmp_path / "in", monkeypatch)
    release = parts.release(tmp_path / "alone" / "made" / "release").directory
    old, new = (item.directory / PIPELINE_DIR for item in (*parts.earlier, parts.checkpoint))
    manifest = pd.read_parquet(release / "manifest.parquet").set_index("class_name")["sample_id"]
    for name, folder in (("one", old), ("two", new)):
        for folders in ([old, new], [new, old], [folder]):
            result = remake(release, samples=[manifest[name].iloc[0]], checkpoint=folders)
            assert (result.ok, result.n_identical, result.checkpoint) == (True, 1, folder)
            assert list(result.checkpoints.values()) == [folder]
    both = remake(release, checkpoint=[new, old])
    assert (both.ok, list(both.checkpoints.values())) == (True, [old, new])
    # The other one alone is no help, and one that the release does not state is still refused.
    told = rf"{parts.earlier[0].digest[:12]}, and it is not beside the release \(.*/new/pipeline has the digest "
    with pytest.raises(CheckpointError, match=told):
        remake(release, samples=[manifest["one"].iloc[0]], checkpoint=new)
    (tmp_path / "strange").mkdir()
    with pytest.raises(CheckpointError, match=r"strange has the digest .*: it is another one"):
        remake(release, samples=[manifest["one"].iloc[0]], checkpoint=[old, tmp_path / "strange"])


def test_a_row_names_the_version_that_drew_it_and_remake_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import synthaug

    parts = drawn_by_noise(tmp_path / "in", monkeypatch)
    drew = synthaug.__version__
    assert {batch.environment["synthaug"] for batch in parts.batches} == {drew}
    of_before = {name: value for name, value in parts.batches[1].environment.items() if name != "synthaug"}
    older = parts.batches[1].model_copy(update={"environment": of_before})
    monkeypatch.setattr("synthaug.__version__", "9.9.9")
    release = replace(parts, batches=(parts.batches[0], older)).release(tmp_path / "release").directory
    manifest = pd.read_parquet(release / "manifest.parquet").set_index("class_name")["synthaug_version"]
    # Of a batch that does not say it, it is the one that releases.
    assert (set(manifest["one"]), set(manifest["two"])) == ({drew}, {"9.9.9"})
    result = remake(release, checkpoint=[item.directory / PIPELINE_DIR for item in (*parts.earlier, parts.checkpoint)])
    assert result.n_identical == result.n_samples
    assert result.changes == (f"synthaug_version: {drew} → 9.9.9",)


# What is refused


def test_keys_tell_the_checkpoints_apart_and_find_what_was_kept_of_a_round(parts: Parts) -> None:
    from synthaug.stage_keys import key_part, names_of_parts

    old, new = parts.earlier[0], parts.checkpoint
    kept = parts.batches[0]
    named = names_of_parts("audit", [parts.source, old, new, parts.judge, kept, parts.batches[2], {}, 1, 0])
    assert named[3:5] == ["earlier checkpoint 1", "checkpoint"]
    assert len(set(named)) == len(named)
    assert key_part(kept) == {"samples": kept.drawn_digest, "labels": {"0": 1}}
    whole = make_whole(kept)
    assert key_part(whole) == whole.digest == kept.drawn_digest


def make_whole(batch: SampleBatch) -> SampleBatch:
    """The batch as it was drawn."""
    return batch.model_copy(update={"labels": None, "drawn_digest": None, "digest": batch.drawn_digest})


@pytest.mark.parametrize("worse", [0, 1])
def test_the_limit_of_the_attack_holds_for_every_checkpoint(parts: Parts, tmp_path: Path, worse: int) -> None:
    from synthaug.pipeline import _Job, _Made, call_directly
    from synthaug.workspace import open_workspace

    config = parse_config(tiny_values(tmp_path / "run", privacy={"max_membership_auc": 0.6}))
    folders = [tmp_path / name for name in ("old", "new")]
    attacks = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / MEMBERSHIP_FILE).write_text("{}", encoding="utf-8")
        attacks.append(found_by_attack(folder, 0.8 if number == worse else 0.5))
    checkpoints = (*parts.earlier, parts.checkpoint)
    with open_workspace(config.output_path) as workspace:
        job = _Job(config, workspace, call_directly)

        def refuse(memberships: list[Membership]) -> None:
            values = (parts.source, parts.splits, parts.plan, checkpoints, parts.judge, list(parts.batches))
            job.refuse_membership(_Made(*values, parts.report, tuple(memberships)))

        refuse([found_by_attack(folders[0], 0.5), found_by_attack(folders[1], 0.55)])
        which = "the checkpoint" if worse else f"checkpoint {checkpoints[0].digest[:12]} of an earlier job, .*,"
        with pytest.raises(ReleaseError, match=rf"{which} tells .* reaches an AUC of 0\.800 .* over all classes"):
            refuse(attacks)


# Published


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    import huggingface_hub.constants

    with LoopbackHub(token="hf_aVerySecretToken0123456789") as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_all_checkpoints_are_published_with_it_and_go_away_again(hub: LoopbackHub, parts: Parts, made: Path) -> None:
    old, new = parts.earlier[0], parts.checkpoint
    settings = PushConfig(repo_id="clinic/digits", checkpoint=True, real_images=True)
    folders = {old.digest: old.directory / PIPELINE_DIR}
    push(made, settings, checkpoint=new.directory / PIPELINE_DIR, earlier=folders)
    files = hub.repositories["clinic/digits"].commits[-1].files
    inner = f"checkpoint/{old.digest[:12]}/"
    assert {"checkpoint/model_index.json", f"{inner}model_index.json"} <= set(files)
    assert {name.removeprefix(inner) for name in files if name.startswith(inner)} == {
        file.relative_to(old.directory / PIPELINE_DIR).as_posix()
        for file in (old.directory / PIPELINE_DIR).rglob("*")
        if file.is_file()
    }
    with pytest.raises(ReleaseError, match=r"there is no checkpoint folder .*nowhere"):
        push(made, settings, checkpoint=new.directory / PIPELINE_DIR, earlier={old.digest: made / "nowhere"})
    push(made, settings.model_copy(update={"checkpoint": False}), checkpoint=None)
    files = hub.repositories["clinic/digits"].commits[-1].files
    assert not [name for name in files if name.startswith("checkpoint/")]


# Really trained: the first job knew the classes b and c, the second a too


def digit_folder(root: Path, counts: dict[str, int]) -> Path:
    """The digits 0, 1, 2 … as the classes named, so many of each."""
    from sklearn.datasets import load_digits

    from tests.small_sources import put

    digits = load_digits()
    for target, (name, number) in enumerate(sorted(counts.items(), reverse=True)):
        for row in np.flatnonzero(digits.target == target)[:number]:
            put(root / name / f"{row}.png", np.rint(digits.images[row] * (255 / 16)).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the job of the classes b, c and d, and then, with a in front and more of d, one that keeps the
    samples of c. Nobody may change it."""
    from synthaug.pipeline import augment

    folder = tmp_path_factory.mktemp("grown")
    run = folder / "run"

    def job_of(data: Path) -> Config:
        changes: dict[str, Any] = {
            "dataset": {"format": "imagefolder", "path": str(data), "cut": {}},
            "plan": {"target_ratio": 0.6, "min_real": 5},
            "train": {"images": 256},
        }
        return parse_config(tiny_values(run, **changes))

    data = digit_folder(folder / "data", {"d": 24, "c": 24, "b": 60})
    first = augment(job_of(data))

    digit_folder(data, {"d": 30, "c": 24, "b": 60, "a": 50})
    summary = augment(job_of(data))
    assert summary.release != first.release
    assert summary.counts["c"]["synthetic"] > 0
    assert summary.counts["d"]["synthetic"] > 0
    return run


@pytest.fixture
def run(grown: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(grown, tmp_path / "run", symlinks=True))


def trained(run: Path) -> dict[str, Path]:
    """Digest of each checkpoint of the release to its stage, oldest first."""
    stages = {json.loads((place / "done.json").read_text())["record"]["digest"]: place
              for place in (run / "stages").glob("train-*")}  # fmt: skip
    return {digest: stages[digest] for digest in stated_checkpoints(read_release_file(run / "release"))}


@pytest.mark.slow
def test_all_samples_of_both_are_made_again_bit_for_bit(grown: Path) -> None:
    assert verify(grown / "release").ok
    result = remake(grown / "release")
    assert (result.ok, result.n_identical, result.missing) == (True, result.n_samples, ())
    assert {item.class_name for item in result.samples} == {"c", "d"}
    old, new = trained(grown)
    assert list(result.checkpoints) == [old, new]
    assert (result.checkpoint, result.checkpoint_digest) == (grown / "checkpoint", new)


@pytest.mark.slow
def test_a_checkpoint_that_is_missing_is_named_and_the_others_are_used(
    run: Path, tmp_path: Path, command: Command
) -> None:
    old, new = trained(run)
    place = trained(run)[old] / PIPELINE_DIR
    elsewhere = Path(shutil.move(place, tmp_path / "elsewhere"))
    release = run / "release"
    result = remake(release)
    made = {item.class_name: item.outcome for item in result.samples}
    assert made == {"c": "could not be made", "d": "identical"}
    assert not result.ok
    assert result.missing[0].startswith(f"checkpoint {old[:12]} is not beside the release")
    assert all(old[:12] in item.why for item in result.samples if item.class_name == "c")
    # Given, it is found, and the other one still is; each may be given; one that is neither is refused.
    assert remake(release, checkpoint=elsewhere).ok
    assert remake(release, checkpoint=[run / "checkpoint", elsewhere]).ok
    with pytest.raises(CheckpointError, match=f"with the digests {old[:12]}, {new[:12]}, but .* has the digest"):
        remake(release, checkpoint=[elsewhere, run / "stages"])
    done = command("remake", release, "--all", real=True)
    assert done.returncode == 1, done.stderr
    assert f"missing: checkpoint {old[:12]}" in done.stdout
    shutil.rmtree(trained(run)[new] / PIPELINE_DIR)
    with pytest.raises(CheckpointError, match="and none of them is beside the release"):
        remake(release)
    assert remake(release, checkpoint=elsewhere).missing[0].startswith(f"checkpoint {new[:12]}")


def test_the_command_takes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from synthaug import cli
    from synthaug import remake as module

    asked: list[Any] = []

    def noted(release: Path, **settings: Any) -> None:
        asked.append(settings["checkpoint"])
        raise CheckpointError("enough")

    monkeypatch.setattr(module, "remake", noted)
    for words in ([], ["--checkpoint", "a"], ["--checkpoint", "a", "--checkpoint", "b"]):
        CliRunner().invoke(cli.app, ["remake", "release", "--all", *words])
    assert asked == [None, [Path("a")], [Path("a"), Path("b")]]


@pytest.mark.slow
def test_a_download_with_both_checkpoints_is_made_again(run: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree((run / "release").resolve(), tmp_path / "published"))
    (old, older_stage), (_, stage) = trained(run).items()
    shutil.copytree(stage / PIPELINE_DIR, release / "checkpoint")
    shutil.copytree(older_stage / PIPELINE_DIR, release / "checkpoint" / old[:12])
    snapshot = hub_cache(release, tmp_path / "hub")
    shutil.rmtree(release)
    assert verify(snapshot).ok
    result = remake(snapshot)
    assert (result.ok, result.n_identical) == (True, result.n_samples)
    assert list(result.checkpoints.values()) == [snapshot / "checkpoint" / old[:12], snapshot / "checkpoint"]


@pytest.mark.slow
def test_an_image_that_only_the_older_one_saw_still_affects_the_release(run: Path) -> None:
    (old, older_stage), (new, stage) = trained(run).items()
    seen = pd.read_parquet(stage / SEEN_FILE)
    image = str(pd.read_parquet(older_stage / SEEN_FILE)["image_id"].iloc[0])
    seen[seen["image_id"] != image].to_parquet(stage / SEEN_FILE)
    # As if the newer one had not started from the older one.
    warm = json.loads((stage / "done.json").read_text())
    assert warm["record"]["started_from"] == old
    alone = {**warm, "record": {**warm["record"], "started_from": None}}
    alone["key_parts"] = [None if part == old else part for part in warm["key_parts"]]
    (stage / "done.json").write_text(json.dumps(alone))
    newest = str((run / "release").resolve())

    def uses() -> dict[str, tuple[str, ...]]:
        found = affected([run], image=image).found
        assert new not in {item.digest for item in found}
        return {os.path.realpath(item.path): item.uses for item in found if item.kind == "release"}

    words = "samples of a checkpoint that saw it"
    assert words in uses()[newest]
    # The same by the record of its stage, when the release itself is deleted.
    shutil.rmtree(newest)
    assert words in uses()[newest]
    # And with the older training cleared away, by the split.
    moved = Path(shutil.move(older_stage, run.parent / "older"))
    assert "samples of a checkpoint that is gone; by its split it saw it" in uses()[newest]
    assert any(f"({old[:12]}) is in none of these run folders" in note for note in affected([run], image=image).notes)
    # One that started from it has learned what it had.
    shutil.move(moved, older_stage)
    (stage / "done.json").write_text(json.dumps(warm))
    through = {item.digest: item.uses for item in affected([run], image=image).found if item.kind == "checkpoint"}
    assert through[new] == ("trained from a base that saw it",)


@pytest.mark.slow
def test_the_report_of_the_run_tells_them_apart(run: Path) -> None:
    from synthaug.rebuild import rebuild

    page = (run / "report.html").read_bytes()
    assert rebuild(run).missing == ()
    assert (run / "report.html").read_bytes() == page
    text = page.decode()
    assert 'id="checkpoints"' in text
    old, new = trained(run)
    manifest = pd.read_parquet(run / "release" / "manifest.parquet")
    for digest in (old, new):
        n_samples = int((manifest["checkpoint_digest"] == digest).sum())
        n_seen = int((pd.read_parquet(trained(run)[digest] / SEEN_FILE)["use"] == "train").sum())
        row = text[text.index(f">{digest[:12]}<", text.index('id="checkpoints"')) :]
        cells = row[: row.index("</tr>")]
        assert f">{n_samples}<" in cells
        assert f">{n_seen}<" in cells
    # A round that was kept cost this job nothing.
    assert text.count("sample round 1") == 1
