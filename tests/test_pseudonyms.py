"""Pseudonyms: stable under their key, private files, nothing lost."""

from __future__ import annotations

import csv
import stat
import threading
from pathlib import Path

import pytest

from synthaug.errors import DatasetError, OutputError
from synthaug.formats.pseudonyms import Pseudonyms, open_pseudonyms


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return tmp_path / "private" / "data.key"


def opened(tmp_path: Path, key: Path | None) -> Pseudonyms:
    (tmp_path / "data").mkdir(exist_ok=True)
    return open_pseudonyms(tmp_path / "data", None if key is None else str(key), outside=(tmp_path / "data",))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def listed(path: Path) -> dict[str, tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["pseudonym"]: (row["kind"], row["stands for"]) for row in csv.DictReader(file)}


def test_equal_names_have_equal_pseudonyms_and_kinds_do_not_mix(tmp_path: Path, key: Path) -> None:
    first, second = opened(tmp_path, key), opened(tmp_path, key)
    assert first.of("patient", "Müller") == second.of("patient", "Müller")
    assert first.of("patient", "x").removeprefix("patient-") != first.of("file", "x").removeprefix("file-")


def test_another_key_gives_other_pseudonyms(tmp_path: Path, key: Path) -> None:
    assert opened(tmp_path, key).of("patient", "x") != opened(tmp_path, key.with_name("b.key")).of("patient", "x")


def test_key_and_list_are_for_their_owner_alone(tmp_path: Path, key: Path) -> None:
    pseudonyms = opened(tmp_path, key)
    name = pseudonyms.of("file", 'odd "name",\n with \udcff bytes.dcm')
    pseudonyms.save()
    assert mode(key) == mode(pseudonyms.list_file) == 0o600
    assert mode(key.parent) == 0o700
    assert listed(pseudonyms.list_file)[name] == ("file", 'odd "name",\n with \\udcff bytes.dcm')
    assert sorted(path.name for path in key.parent.iterdir()) == ["data.key", "data.pseudonyms.csv"]


def test_without_a_setting_they_lie_in_the_users_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    pseudonyms = opened(tmp_path, None)
    assert pseudonyms.list_file.parent == tmp_path / "share" / "synthaug" / "keys"
    assert opened(tmp_path, None).of("patient", "x") == pseudonyms.of("patient", "x")


def test_what_was_known_stays_in_the_list(tmp_path: Path, key: Path) -> None:
    first = opened(tmp_path, key)
    gone = first.of("patient", "who withdrew")
    first.save()
    second = opened(tmp_path, key)
    new = second.of("patient", "who came")
    second.save()
    assert listed(second.list_file).keys() == {gone, new}


@pytest.mark.parametrize("which", ["key", "list"])
def test_what_others_may_read_is_refused(tmp_path: Path, key: Path, which: str) -> None:
    pseudonyms = opened(tmp_path, key)
    pseudonyms.of("patient", "x")
    pseudonyms.save()
    (key if which == "key" else pseudonyms.list_file).chmod(0o640)
    with pytest.raises(DatasetError, match=r"mode 0640.*chmod 600"):
        opened(tmp_path, key).save()


@pytest.mark.parametrize("text", ["", "ab" * 31, "zz" * 32])
def test_a_damaged_key_is_refused_and_left_alone(tmp_path: Path, key: Path, text: str) -> None:
    key.parent.mkdir()
    key.write_text(text)
    key.chmod(0o600)
    with pytest.raises(DatasetError, match="not a key of pseudonyms"):
        opened(tmp_path, key)
    assert key.read_text() == text


def test_a_damaged_list_is_refused_and_left_alone(tmp_path: Path, key: Path) -> None:
    pseudonyms = opened(tmp_path, key)
    pseudonyms.list_file.write_text("something else\n")
    pseudonyms.list_file.chmod(0o600)
    with pytest.raises(DatasetError, match="not a list of pseudonyms"):
        pseudonyms.save()
    assert pseudonyms.list_file.read_text() == "something else\n"


def test_a_key_among_the_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.dicom\.key_file"):
        opened(tmp_path, tmp_path / "data" / "x.key")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"x\.key cannot be written"):
        opened(tmp_path, tmp_path / "file" / "x.key")


def test_runs_that_start_together_have_one_key(tmp_path: Path, key: Path) -> None:
    (tmp_path / "data").mkdir()
    found: list[str] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.append(opened(tmp_path, key).of("patient", "x"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
