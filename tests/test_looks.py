"""The ledger of looks: it counts trials once each, in order, from several runs at a time, and never loses count."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from filelock import FileLock

from synthaug.errors import BusyError, DatasetError, OutputError
from synthaug.formats import looks
from synthaug.formats.looks import looks_path, looks_places, register_look

GOOD = {"trial": "t1", "name": "first", "when": "2026-01-31"}


def text_of(tests: object, **others: object) -> str:
    return json.dumps({"kind": "synthaug test looks", "version": 1, "tests": tests, **others})


def test_every_trial_counts_once_and_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "new" / "test_looks.json"
    assert [register_look(path, "test", f"trial{n}", "x") for n in range(4)] == [1, 2, 3, 4]
    assert [register_look(path, "test", f"trial{n}", "another name") for n in (2, 0, 3)] == [3, 1, 4]
    assert register_look(path, "test", "trial4", "x") == 5


def test_test_splits_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "test_looks.json"
    assert [register_look(path, "a", "t1", "x"), register_look(path, "a", "t2", "x")] == [1, 2]
    assert [register_look(path, "b", "t2", "x"), register_look(path, "a", "t3", "x")] == [1, 3]


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "test_looks.json"
    before = time.strftime("%Y-%m-%d")
    register_look(path, "digest", "t1", "Größe \udc80")
    values = json.loads(path.read_text(encoding="utf-8"))
    when = values["tests"]["digest"][0].pop("when")
    assert before <= when <= time.strftime("%Y-%m-%d")
    assert values == {
        "kind": "synthaug test looks",
        "version": 1,
        "tests": {"digest": [{"trial": "t1", "name": "Größe \udc80"}]},
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["test_looks.json", "test_looks.json.lock"]


def test_a_known_look_writes_nothing_and_needs_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "test_looks.json"
    register_look(path, "test", "t1", "x")
    before = path.stat().st_mtime_ns
    with FileLock(f"{path}.lock"):
        assert register_look(path, "test", "t1", "x") == 1
    assert path.stat().st_mtime_ns == before


def _many(path: Path, who: str, number: int) -> list[int]:
    return [register_look(path, "test", f"{who}{n}", who) for n in range(number)]


def test_two_processes_at_once_lose_no_look(tmp_path: Path) -> None:
    path = tmp_path / "test_looks.json"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.starmap(_many, [(path, "one", 15), (path, "two", 15)], chunksize=1)
    assert sorted(one + two) == list(range(1, 31))
    assert (one, two) == (sorted(one), sorted(two))
    assert (_many(path, "one", 15), _many(path, "two", 15)) == (one, two)


def test_a_lock_that_is_never_given_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "_LONGEST_WAIT", 0.1)
    path = tmp_path / "test_looks.json"
    with FileLock(f"{path}.lock"), pytest.raises(BusyError, match=r"has held .*test_looks.json.lock for 0.1 seconds"):
        register_look(path, "test", "t1", "x")
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\x00",
        text_of({})[:-4],
        text_of({}, kind="synthaug split ledger"),
        text_of({}, version=2),
        text_of([]),
        text_of({"test": "t1"}),
        text_of({"test": [{"trial": "t1"}]}),
        text_of({"test": [{**GOOD, "trial": 1}]}),
        text_of({"other": [GOOD, GOOD]}),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "test_looks.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=r"test_looks.json is not a ledger of looks .* Restore it"):
        register_look(path, "test", "t1", "x")
    assert path.read_text() == text
    with pytest.raises(DatasetError, match="is not a ledger of looks"):
        register_look(tmp_path / "own.json", "test", "t1", "x", earlier=[path])
    assert path.read_text() == text
    assert not (tmp_path / "own.json").exists()


def test_other_test_splits_in_the_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "test_looks.json"
    path.write_text(text_of({"other": [GOOD]}))
    assert register_look(path, "test", "t2", "x") == 1
    assert json.loads(path.read_text())["tests"]["other"] == [GOOD]
    assert register_look(path, "other", "t2", "x") == 2


def test_a_place_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"ledger of looks .*test_looks.json cannot be written: .* Make the folder"):
        register_look(tmp_path / "file" / "test_looks.json", "test", "t1", "x")


# ---------------------------------------------------------------- the place


def test_the_place_is_beside_the_ledger_of_splits_and_named_like_it(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert looks_path(str(tmp_path / "faces.synthaug-splits.json"), output) == tmp_path / "faces.synthaug-looks.json"
    assert looks_path(str(tmp_path / "named.json"), output) == tmp_path / "test_looks.json"
    assert looks_path(str(output / "splits-ledger.json"), output) == output / "test_looks.json"
    assert looks_path(None, output) == output / "test_looks.json"


def test_a_dataset_on_a_read_only_medium_is_counted_in_the_run_folder(tmp_path: Path) -> None:
    output, medium = tmp_path / "output", tmp_path / "medium"
    medium.mkdir()
    ledger = str(medium / "faces.synthaug-splits.json")
    medium.chmod(0o555)
    try:
        assert looks_path(ledger, output) == output / "test_looks.json"
        assert register_look(looks_path(ledger, output), "test", "t1", "x") == 1
        assert list(medium.iterdir()) == []
    finally:
        medium.chmod(0o755)
    assert looks_path(str(tmp_path / "gone" / "faces.synthaug-splits.json"), output) == output / "test_looks.json"


def test_looks_from_before_the_place_changed_still_count(tmp_path: Path) -> None:
    output, medium = tmp_path / "output", tmp_path / "medium"
    medium.mkdir()
    ledger = str(medium / "faces.synthaug-splits.json")
    places = looks_places(ledger, output)
    assert places == [medium / "faces.synthaug-looks.json", output / "test_looks.json"]
    assert register_look(places[0], "test", "t1", "x") == 1
    assert register_look(places[0], "other", "t9", "x") == 1
    text = places[0].read_text()
    assert register_look(places[1], "test", "t2", "x", earlier=places) == 2  # the medium became read-only
    assert places[0].read_text() == text
    assert register_look(places[1], "test", "t1", "x", earlier=places) == 1
    assert [register_look(places[0], "test", trial, "x", earlier=places) for trial in ("t3", "t2", "t1")] == [3, 2, 1]
    assert register_look(places[1], "other", "t8", "x") == 1
