"""The day a patient withdraws: what an image went into is listed, and nothing is passed over in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from synthaug.affected import Affected, AffectedResult, affected
from synthaug.errors import UsageError

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


def splits(run: Path) -> pd.DataFrame:
    (stage,) = (run / "stages").glob("split-*")
    return pd.read_parquet(stage / "splits.parquet")


def images(run: Path, split: str, held_back: bool = False) -> list[str]:
    table = splits(run)
    mine = table[(table["split"] == split) & (table["held_back"].notna() == held_back)]
    return [str(name) for name in mine["image_id"]]


def by_kind(result: AffectedResult) -> dict[str, Affected]:
    found = {item.kind: item for item in result.found}
    assert len(found) == len(result.found)
    return found


@pytest.mark.parametrize(
    ("split", "checkpoint", "release"),
    [
        ("train", ("trained",), ("samples of a checkpoint that saw it", "released as a real image (train)")),
        (
            "validation",
            ("validation",),
            ("samples of a checkpoint that saw it", "released as a real image (validation)"),
        ),
        ("test", None, ("released as a real image (test)",)),
    ],
)
def test_where_an_image_of_each_split_went(
    finished_run: Path, split: str, checkpoint: tuple[str, ...] | None, release: tuple[str, ...]
) -> None:
    name = images(finished_run, split)[0]
    found = by_kind(affected([finished_run], image=name))
    assert found["release"].uses == release
    assert found["release"].path == str((finished_run / "release").resolve())
    assert found["release"].images == (name,)
    assert (found["checkpoint"].uses if "checkpoint" in found else None) == checkpoint


def test_an_image_that_went_nowhere_is_no_error(finished_run: Path, command: Command) -> None:
    table = splits(finished_run)
    name = str(table.loc[table["held_back"] == "cut", "image_id"].iloc[0])
    result = affected([finished_run], image=name)
    assert result.found == ()
    assert "no checkpoint and no release there is on record as made from it" in result.sentence
    assert any("decoded copies of it lie in" in note for note in result.notes)
    done = command("affected", "--image", name, finished_run, real=True)
    assert (done.returncode, "is known to" in done.stdout) == (0, True)


def test_a_group_by_its_key_and_by_its_name(run: Path) -> None:
    table = splits(run)
    usable = table[table["held_back"].isna() & (table["split"] == "train")]
    key = str(usable["group_key"].iloc[0])
    mine = set(table.loc[table["group_key"] == key, "image_id"])
    found = affected([run], group=key)
    assert set(found.images) - set(found.copies) == mine
    (stage,) = (run / "stages").glob("read-*")
    index = pd.read_parquet(stage / "index.parquet")
    chosen = [images(run, "train")[0], images(run, "test")[0]]
    index["group"] = index["image_id"].map(lambda name: "patient 7" if name in chosen else None)
    index.to_parquet(stage / "index.parquet", index=False)
    result = affected([run], group="patient 7")
    assert set(result.images) - set(result.copies) == set(chosen)
    assert by_kind(result)["release"].n_images == 2
    assert "(2 images) went into 1 checkpoint and 1 release" in result.sentence


def test_exact_copies_are_looked_for_too(run: Path) -> None:
    (stage,) = (run / "stages").glob("read-*")
    index = pd.read_parquet(stage / "index.parquet")
    table = splits(run)
    cut = str(table.loc[table["held_back"] == "cut", "image_id"].iloc[0])
    used = images(run, "train")[0]
    content = index.loc[index["image_id"] == used, "content_hash"].iloc[0]
    index.loc[index["image_id"] == cut, "content_hash"] = content
    index.to_parquet(stage / "index.parquet", index=False)
    result = affected([run], image=cut)
    assert result.copies == (used,)
    assert by_kind(result)["checkpoint"].uses == ("trained (an exact copy of it)",)


def test_a_checkpoint_that_grew_out_of_another_and_where_it_was_published(run: Path) -> None:
    (train,) = (run / "stages").glob("train-*")
    done = json.loads((train / "done.json").read_text())
    child = Path(shutil.copytree(train, run / "stages" / "train-000000000000"))
    pd.read_parquet(train / "seen.parquet").iloc[:0].to_parquet(child / "seen.parquet")
    later = {**done, "key_parts": [*done["key_parts"][:-2], done["record"]["digest"], 0]}
    later["record"] = {**done["record"], "digest": "e" * 64}
    (child / "done.json").write_text(json.dumps(later))
    (release,) = (run / "stages").glob("release-*")
    publish = Path(shutil.copytree(release, run / "stages" / "publish-000000000000"))
    values = json.loads((publish / "done.json").read_text())
    values["record"]["pushed_to"] = "https://hub/commit/1"
    (publish / "done.json").write_text(json.dumps(values))
    found = affected([run], image=images(run, "train")[0]).found
    uses = {item.digest[:4]: item.uses for item in found}
    assert uses["eeee"] == ("trained from a base that saw it",)
    assert found[-1].published_to == ("https://hub/commit/1",)


def test_a_release_that_was_deleted_since_is_still_on_record(run: Path, command: Command) -> None:
    shutil.rmtree((run / "release").resolve())
    (release,) = (run / "stages").glob("release-*")
    for number in (1, 2):
        publish = Path(shutil.copytree(release, run / "stages" / f"publish-00000000000{number}"))
        values = json.loads((publish / "done.json").read_text())
        values["record"]["pushed_to"] = f"https://hub/commit/{number}"
        values["key_parts"] = ["publish", 1, values["record"]["digest"], {}, None, ""]
        (publish / "done.json").write_text(json.dumps(values))
    for split in ("train", "test"):
        entry = by_kind(affected([run], image=images(run, split)[0]))["release"]
        assert entry.gone
        assert entry.published_to == ("https://hub/commit/1", "https://hub/commit/2")
        assert f"released as a real image ({split})" in entry.uses
    assert (
        "samples of a checkpoint that saw it" in by_kind(affected([run], image=images(run, "train")[0]))["release"].uses
    )
    done = command("affected", "--image", images(run, "train")[0], run, real=True)
    assert "(deleted since)" in " ".join(done.stdout.replace("│", " ").split())
    # Its stage gone as well: what was published is still spoken of.
    shutil.rmtree(release)
    result = affected([run], image=images(run, "test")[0])
    assert result.found == ()
    assert "Not everything there is known" in result.sentence
    assert [note for note in result.notes if "published as https://hub/commit/2 and is on record nowhere" in note]


def test_a_checkpoint_that_was_published_says_where(run: Path) -> None:
    (train,) = (run / "stages").glob("train-*")
    digest = json.loads((train / "done.json").read_text())["record"]["digest"]
    (release,) = (run / "stages").glob("release-*")
    publish = Path(shutil.copytree(release, run / "stages" / "publish-000000000000"))
    values = json.loads((publish / "done.json").read_text())
    values["record"]["pushed_to"] = "https://hub/commit/1"
    values["key_parts"] = ["publish", 1, values["record"]["digest"], {"checkpoint": True}, digest, ""]
    (publish / "done.json").write_text(json.dumps(values))
    found = by_kind(affected([run], image=images(run, "train")[0]))
    assert found["checkpoint"].published_to == found["release"].published_to == ("https://hub/commit/1",)


def test_a_checkpoint_whose_training_was_cleared_away(run: Path) -> None:
    (train,) = (run / "stages").glob("train-*")
    shutil.rmtree(train)
    result = affected([run], image=images(run, "train")[0])
    assert by_kind(result)["release"].uses == (
        "samples of a checkpoint that is gone; by its split it saw it",
        "released as a real image (train)",
    )
    assert any("is in none of these run folders: what it has seen is not known here" in note for note in result.notes)
    # A test image was no part of the training, whatever became of the checkpoint.
    assert by_kind(affected([run], image=images(run, "test")[0]))["release"].uses == (
        "released as a real image (test)",
    )


def test_a_base_from_elsewhere_is_not_passed_over_in_silence(run: Path) -> None:
    (train,) = (run / "stages").glob("train-*")
    done = json.loads((train / "done.json").read_text())
    (settings,) = [part for part in done["key_parts"] if isinstance(part, dict)]
    settings["base"] = "/elsewhere/checkpoint"
    done["key_parts"][done["key_parts"].index(None)] = "b" * 64
    (train / "done.json").write_text(json.dumps(done))
    table = splits(run)
    cut = str(table.loc[table["held_back"] == "cut", "image_id"].iloc[0])
    result = affected([run], image=cut)
    assert result.found == ()
    assert "Not everything there is known, see the notes." in result.sentence
    assert any(
        "started from the base /elsewhere/checkpoint, which is in none of these" in note for note in result.notes
    )


def test_what_a_stopped_run_left_is_mentioned(run: Path) -> None:
    (run / "releases" / ".staging-x").mkdir()
    (run / "stages" / "read-abc").mkdir()
    notes = affected([run], image=images(run, "train")[0]).notes
    assert any(".staging-x was left by a run that was stopped" in note for note in notes)
    assert any("read-abc is an unfinished reading" in note for note in notes)
    assert any("it may be shown in" in note and "rejected.png" in note for note in notes)


def test_a_folder_that_is_named_twice_counts_once(finished_run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(finished_run)
    name = images(finished_run, "train")[0]
    assert len(affected([finished_run, link, finished_run], image=name).found) == 2
    with pytest.raises(UsageError, match=rf"Did you mean {link}\?"):
        affected([tmp_path], image=name)
    with pytest.raises(UsageError, match=rf"Did you mean {finished_run.resolve()}\?"):
        affected([finished_run / "release"], image=name)


def test_shards_that_were_deleted_do_not_hide_a_real_image(run: Path) -> None:
    shutil.rmtree((run / "release").resolve() / "data")
    result = affected([run], image=images(run, "test")[0])
    assert by_kind(result)["release"].uses == ("released as a real image (test)",)
    assert result.unreadable == ()


@pytest.mark.parametrize("file", ["stages/train-*/seen.parquet", "stages/train-*/done.json", "releases/*/release.json"])
def test_what_cannot_be_read_is_told_and_fails(run: Path, command: Command, file: str) -> None:
    (path,) = run.glob(file)
    path.write_bytes(path.read_bytes()[:50])
    done = command("affected", "--image", images(run, "train")[0], run, "--json", real=True)
    assert done.returncode == 1
    values: dict[str, Any] = json.loads(done.stdout)
    assert any(path.name in text or path.parent.name in text for text in values["unreadable"])


def test_an_unfinished_training_is_mentioned(run: Path) -> None:
    (run / "stages" / "train-abc").mkdir()
    notes = affected([run], image=images(run, "train")[0]).notes
    assert any("train-abc is an unfinished training" in note for note in notes)


def test_wrong_use(finished_run: Path, tmp_path: Path, command: Command) -> None:
    known = images(finished_run, "train")[0]
    with pytest.raises(UsageError, match=f"no image_id '{known[:-1]}' is known to .*The nearest are .*{known}"):
        affected([finished_run], image=known[:-1])
    with pytest.raises(UsageError, match="no group_key, or group, 'nobody' is known"):
        affected([finished_run], group="nobody")
    for arguments in ([], ["--image", "a", "--group", "b"]):
        assert command("affected", *arguments, finished_run, real=True).returncode == 2
    assert "is not a run folder" in command("affected", "--image", known, tmp_path, real=True).stderr
    done = command("affected", "--image", known, finished_run, real=True)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    assert "went into 1 checkpoint and 1 release" in done.stdout
