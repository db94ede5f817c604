"""Publishing: one commit, private, nothing that was not asked for, and the token nowhere. The hub is on 127.0.0.1."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synthaug.config import Config, PushConfig
from synthaug.errors import ConfigError, ReleaseError, UsageError, VerificationError
from synthaug.formats.hub import check_push_allowed, push
from tests.loopback_hub import LoopbackHub
from tests.release_parts import Parts, make_parts
from tests.verdict_parts import make_verdict

# What huggingface_hub 2.4 does with its HTTP library; it stops uploads where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_aVerySecretToken0123456789"
REPO = "clinic/digits"

_READER = """
import json, sys
from pathlib import Path
import datasets
from huggingface_hub import snapshot_download
sys.path.insert(0, sys.argv[1])
from synthaug.verify import verify
repo, revision = sys.argv[2:4]
data = datasets.load_dataset(repo, revision=revision)
streamed = datasets.load_dataset(repo, revision=revision, streaming=True)
print(json.dumps({
    "rows": {name: split.num_rows for name, split in data.items()},
    "names": data["train"].features["label"].names,
    "ids": data["train"]["sample_id"][:],
    "streamed": [row["sample_id"] for row in streamed["train"]],
    "size": data["train"][0]["image"].size,
    "problems": verify(Path(snapshot_download(repo, repo_type="dataset", revision=revision))).problems,
}))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("inputs"), classes=("zero", "a\nb", "../../x"))


@pytest.fixture(scope="module")
def alone(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.release(tmp_path_factory.mktemp("alone") / "release", include_real=False).directory


@pytest.fixture(scope="module")
def with_real(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.release(tmp_path_factory.mktemp("real") / "release").directory


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    import huggingface_hub.constants

    with LoopbackHub(token=TOKEN) as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        # Read from the environment when it is first imported, which has happened by now.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.mark.slow
def test_pushed_and_read_back(hub: LoopbackHub, parts: Parts, with_real: Path, tmp_path: Path) -> None:
    before = _content(with_real)
    url = push(with_real, PushConfig(repo_id=REPO, real_images=True, private=False))
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2  # the hub's own first one, and ours
    assert url == f"{hub.url}/datasets/{REPO}/commit/{repository.commits[-1].sha}"
    assert _content(with_real) == before
    assert set(repository.commits[-1].files) == {*before, ".gitattributes"}

    done = subprocess.run(
        [sys.executable, "-c", _READER, str(Path(__file__).parents[1]), REPO, repository.commits[-1].sha],
        env={**os.environ, **hub.environment(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == {"train": 90, "validation": 12, "test": 15}
    assert found["names"] == list(parts.source.classes)
    assert found["streamed"] == found["ids"]
    assert sum(identifier is not None for identifier in found["ids"]) == 40
    assert found["size"] == [8, 8]
    assert found["problems"] == []
    assert TOKEN not in done.stdout + done.stderr


def test_private_without_real_images_or_checkpoint_unless_told_otherwise(
    hub: LoopbackHub, alone: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    push(alone, PushConfig(repo_id=REPO))
    output = capfd.readouterr()
    assert "published in one commit: 9 of 9 files uploaded" in caplog.text
    assert TOKEN not in caplog.text + output.out + output.err
    repository = hub.repositories[REPO]
    assert repository.private
    assert sorted(repository.commits[-1].files) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "contact_sheet.png",
        "data/train-00000.parquet",
        "manifest.csv",
        "manifest.parquet",
        "provenance.json",
        "release.json",
        "report.html",
    ]


def test_real_images_need_a_setting(hub: LoopbackHub, with_real: Path) -> None:
    with pytest.raises(ReleaseError, match=r"holds 77 real images and release\.push\.real_images is false"):
        push(with_real, PushConfig(repo_id=REPO))
    assert hub.requests == []


def test_checkpoint_goes_along_and_goes_away_again(hub: LoopbackHub, parts: Parts, alone: Path) -> None:
    pipeline = parts.checkpoint.directory / "pipeline"
    push(alone, PushConfig(repo_id=REPO, checkpoint=True), checkpoint=pipeline)
    hub.repositories[REPO].commits[-1].files.update({"notes.txt": b"mine", "data/train-00007.parquet": b"old"})
    assert "checkpoint/unet/diffusion_pytorch_model.safetensors" in hub.repositories[REPO].commits[-1].files
    push(alone, PushConfig(repo_id=REPO), checkpoint=pipeline)
    files = hub.repositories[REPO].commits[-1].files
    assert not [name for name in files if name.startswith("checkpoint/")]
    assert "data/train-00007.parquet" not in files
    assert files["notes.txt"] == b"mine"


def test_what_is_there_is_not_uploaded_again(
    hub: LoopbackHub, parts: Parts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "synthaug.formats.hub")
    pipeline, settings = parts.checkpoint.directory / "pipeline", PushConfig(repo_id=REPO, checkpoint=True)
    fewer = make_parts(tmp_path / "in", wanted=(0, 12, 16), classes=parts.source.classes)
    first = fewer.release(tmp_path / "first", include_real=False, images_per_shard=12).directory
    push(first, settings, checkpoint=pipeline)
    commits = hub.repositories[REPO].commits
    held = _content(first)
    assert commits[-1].touched == sorted([*held, *(f"checkpoint/{name}" for name in _content(pipeline))])

    # Nothing new: no byte of a file, and no commit.
    hub.received.clear()
    url = push(first, settings, checkpoint=pipeline)
    assert url.endswith(commits[-1].sha)
    assert len(commits) == 2
    assert hub.received["lfs"] == 0
    assert "published in no commit, since nothing is new: 0 of 13 files uploaded (0.0 kB), 13 were there" in caplog.text

    # Twelve more samples: a new shard, and what speaks of them.
    second = parts.release(tmp_path / "second", include_real=False, images_per_shard=12, previous=first).directory
    now = _content(second)
    new = {name for name, data in now.items() if held.get(name) != data}
    shards = {name for name in new if name.startswith("data/")}
    assert shards == {"data/train-00003.parquet"}
    assert new - shards == {
        "README.md", "manifest.csv", "manifest.parquet", "provenance.json", "release.json", "report.html",
    }  # fmt: skip
    push(second, settings, checkpoint=pipeline)
    assert commits[-1].touched == sorted(new)
    assert hub.received["lfs"] == sum(len(now[name]) for name in new)
    assert re.search(
        r"published in one commit: 7 of 14 files uploaded \(\S+ k?M?B\), 7 were there already", caplog.text
    )
    assert {name: data for name, data in commits[-1].files.items() if name in now} == now

    # A shard with a sample that is gone is deleted in the commit that brings the others.
    third = fewer.release(tmp_path / "third", include_real=False, images_per_shard=12, previous=second).directory
    push(third, settings, checkpoint=pipeline)
    assert {name for name in commits[-1].files if name.startswith("data/")} == {
        name for name in _content(third) if name.startswith("data/")
    }
    assert "data/train-00003.parquet" not in commits[-1].files


def test_a_verdict_of_the_last_push_does_not_stand_beside_this_release(
    hub: LoopbackHub, parts: Parts, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "verdict"
    folder.mkdir()
    verdict = make_verdict(class_names=parts.source.classes, directory=folder)
    (folder / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    (folder / "verdict_arms.png").write_bytes(b"a picture")
    push(parts.release(tmp_path / "judged", include_real=False, verdict=verdict).directory, PushConfig(repo_id=REPO))
    commits = hub.repositories[REPO].commits
    commits[-1].files["notes.md"] = b"somebody else's"
    assert {"verdict.json", "verdict_arms.png"} <= set(commits[-1].files)
    push(alone, PushConfig(repo_id=REPO))
    assert set(commits[-1].files) - set(_content(alone)) - {".gitattributes"} == {"notes.md"}


def test_a_change_in_between_is_not_overwritten(hub: LoopbackHub, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    push(alone, PushConfig(repo_id=REPO))
    repository, real = hub.repositories[REPO], HfApi.list_repo_tree

    def meanwhile(*given: Any, **settings: Any) -> Any:
        found = list(real(*given, **settings))
        repository.add("somebody else's", {**repository.commits[-1].files, "data/more.parquet": b"theirs"})
        return [entry for entry in found if not entry.path.endswith("README.md")]

    monkeypatch.setattr(HfApi, "list_repo_tree", meanwhile)
    with pytest.raises(ReleaseError, match="somebody else changed it meanwhile"):
        push(alone, PushConfig(repo_id=REPO))
    assert repository.commits[-1].message == "somebody else's"


def test_checkpoint_that_is_not_there(hub: LoopbackHub, alone: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="there is no checkpoint folder"):
        push(alone, PushConfig(repo_id=REPO, checkpoint=True), checkpoint=tmp_path / "none")
    assert hub.requests == []


def test_a_public_repository_does_not_get_what_was_to_be_private(hub: LoopbackHub, alone: Path) -> None:
    hub.add_dataset(REPO, {"README.md": b"theirs"})
    with pytest.raises(ReleaseError, match="exists and is public"):
        push(alone, PushConfig(repo_id=REPO))
    assert len(hub.repositories[REPO].commits) == 1


def test_data_of_others_are_not_deleted(hub: LoopbackHub, alone: Path) -> None:
    hub.add_dataset(REPO, {"data/train.parquet": b"theirs"}, private=True)
    with pytest.raises(ReleaseError, match="holds data that no release of synthaug put there"):
        push(alone, PushConfig(repo_id=REPO))


def test_a_damaged_release_is_not_published(hub: LoopbackHub, parts: Parts, tmp_path: Path) -> None:
    release = parts.release(tmp_path / "release", include_real=False).directory
    (release / "manifest.parquet").unlink()
    with pytest.raises(ReleaseError, match=r"is damaged \('manifest\.parquet'\)"):
        push(release, PushConfig(repo_id=REPO))
    (release / "release.json").unlink()
    with pytest.raises(VerificationError, match="only a part"):
        push(release, PushConfig(repo_id=REPO))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "HF_TOKEN does not give write access"),
        (412, "somebody else changed it meanwhile"),
        (500, "the hub answered 500"),
    ],
)
def test_a_refusal_is_explained_and_keeps_the_token_to_itself(
    hub: LoopbackHub,
    alone: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    status: int,
    words: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.refuse_commit = (status, f"no commit for Bearer {TOKEN}")
    with pytest.raises(ReleaseError, match=words) as caught:
        push(alone, PushConfig(repo_id=REPO))
    assert "complete and unchanged" in str(caught.value)
    assert len(hub.repositories[REPO].commits) == 1
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("synthaug"))
    output = capfd.readouterr()
    assert TOKEN not in str(caught.value) + ours + output.out + output.err


def test_a_failed_upload_is_explained_by_its_cause(hub: LoopbackHub, alone: Path) -> None:
    hub.refuse_upload = (403, f"signature of {TOKEN} has expired")
    with pytest.raises(ReleaseError, match="HF_TOKEN does not give write access") as caught:
        push(alone, PushConfig(repo_id=REPO))
    assert TOKEN not in str(caught.value)


def test_a_wrong_token(hub: LoopbackHub, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ReleaseError, match="HF_TOKEN does not give write access"):
        push(alone, PushConfig(repo_id=REPO))
    assert hub.repositories == {}


def test_nobody_answers(alone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with LoopbackHub(token=TOKEN) as gone:
        environment = gone.environment(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ReleaseError, match="could not be reached or refused"):
        push(alone, PushConfig(repo_id=REPO))


def test_offline(hub: LoopbackHub, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ReleaseError, match="HF_HUB_OFFLINE forbids the network"):
        push(alone, PushConfig(repo_id=REPO))
    assert hub.requests == []


def _config(parts: Parts, include_real: bool = True, **settings: Any) -> Config:
    settings = {"repo_id": REPO, **settings}
    release = parts.config.release.model_copy(update={"include_real": include_real, "push": PushConfig(**settings)})
    return parts.config.model_copy(update={"release": release})


def test_what_must_not_be_published_is_refused_before_any_work(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push_allowed(parts.config)
    check_push_allowed(_config(parts, include_real=False))
    check_push_allowed(_config(parts, real_images=True))
    with pytest.raises(ConfigError, match="would publish the real images on clinic/digits"):
        check_push_allowed(_config(parts))
    for name in ("digits", "a/b/c", "../x", "a/b c", ""):
        with pytest.raises(ConfigError, match="is refused"):
            check_push_allowed(_config(parts, real_images=True, repo_id=name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE forbids"):
        check_push_allowed(_config(parts, real_images=True))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="needs a token"):
        check_push_allowed(_config(parts, real_images=True))
    check_push_allowed(parts.config)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
