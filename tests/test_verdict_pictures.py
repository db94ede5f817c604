"""Pictures and tables of a verdict: what they show, and that hostile names do no harm."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthaug.records import Figures, Interval, SampleQuality, Verdict
from synthaug.report import verdict_pictures
from synthaug.report.verdict_pictures import write_verdict_pictures
from synthaug.report.verdict_words import count, mean_and_spread, points, share, signed
from synthaug.terminal import Session, show_run, show_verdict
from tests.verdict_parts import budget_verdict, make_verdict, refused_verdict

NAMES = ["verdict_gain.png", "verdict_dose.png", "verdict_confusion.png"]
HOSTILE = [
    "../../x", "$x^2$", r"\frac{1}{", "$", "\U0001f408 cat", "two\nlines", "\x1b[31mred", "\u202eright to left",
    "a" * 500, "", " ", "猫の写真" * 30, "e\u0301\u0301\u0301\u0301", "\ud800", "%s {0} \\n",
]  # fmt: skip


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.text == {}
        return np.asarray(picture.convert("RGB"))


def _inside(page: np.ndarray) -> bool:
    """Whether the margins are empty: nothing is cut off."""
    edges = (page[:10], page[-10:], page[:, :10], page[:, -10:])
    return all(bool((edge == 255).all()) for edge in edges)


def _confusion_of(names: Sequence[str], table: np.ndarray, key: str) -> Figures:
    shares = {name: float(table[k, k]) for k, name in enumerate(names)}
    return Figures(
        key=key, words=key, balanced_accuracy=0.5, macro_f1=0.5, rare_auprc=0.5, calibration_error=0.1, recall=shares,
        auprc=shares, spread=0.0, confusion=table.tolist(),
    )  # fmt: skip


@pytest.mark.parametrize(("outcome", "n"), [("helps", 2), ("no evidence", 10), ("harms", 25), ("helps", 100)])
def test_every_picture_is_whole_and_of_a_sensible_size(tmp_path: Path, outcome: str, n: int) -> None:
    paths = write_verdict_pictures(make_verdict(outcome, n), tmp_path)
    assert [path.name for path in paths] == NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for path in paths:
        page = _pixels(path)
        assert page.shape[1] == 1200
        assert 400 < page.shape[0] < 2500
        assert _inside(page)
        assert page.std() > 10
    if n == 100:
        assert _pixels(paths[0]).shape[0] > 50 * 20


@pytest.mark.slow
def test_the_same_verdict_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        paths = write_verdict_pictures(make_verdict("helps", 10), tmp_path / name)
        pages.append([path.read_bytes() for path in paths])
    assert pages[0] == pages[1]
    other = write_verdict_pictures(make_verdict("harms", 10), tmp_path / "three")
    assert all(path.read_bytes() != page for path, page in zip(other, pages[0], strict=True))


def test_pictures_are_drawn_beside_the_main_thread_and_leave_no_global_state(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    errors: list[BaseException] = []

    def draw() -> None:
        try:
            write_verdict_pictures(make_verdict("helps", 3), tmp_path)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert errors == []
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("verdict", [budget_verdict(), refused_verdict()], ids=["budget", "refused"])
def test_nothing_is_drawn_of_nothing(tmp_path: Path, verdict: Verdict) -> None:
    assert write_verdict_pictures(verdict, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_picture_is_left_out_alone(tmp_path: Path) -> None:
    whole = make_verdict("helps", 3)
    parts: list[tuple[dict[str, Any], list[str]]] = [
        ({"differences": {}, "classes": ()}, ["verdict_dose.png", "verdict_confusion.png"]),
        ({"dose_curve": (), "learning_curve": ()}, ["verdict_gain.png", "verdict_confusion.png"]),
        ({"dose_curve": (), "finalists": ()}, ["verdict_gain.png", "verdict_dose.png"]),
        ({"learning_curve": (), "finalists": whole.finalists[:1]}, ["verdict_gain.png", "verdict_dose.png"]),
        ({"differences": {}}, NAMES),
        ({"classes": (), "arms": (), "worth": None}, NAMES),
    ]
    for i, (changes, names) in enumerate(parts):
        paths = write_verdict_pictures(whole.model_copy(update=changes), tmp_path / str(i))
        assert [path.name for path in paths] == names
        assert all(_inside(_pixels(path)) for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, len(HOSTILE)])
def test_hostile_names_do_no_harm(tmp_path: Path, n: int) -> None:
    """Warnings are errors here: a character without a shape would be one."""
    verdict = make_verdict(names=HOSTILE[-n:])
    odd = "$\\int\n\U0001f408" * 40
    changes: dict[str, Any] = {
        "recipe": odd,
        "best_real": odd + "!",
        "worth": odd,
        "finalists": (
            verdict.finalists[0].model_copy(update={"key": odd + "!"}),
            verdict.finalists[1].model_copy(update={"key": odd}),
        ),
        "dose_curve": tuple(
            item.model_copy(update={"loss": item.loss + odd, "dose": item.dose + odd}) for item in verdict.dose_curve
        ),
        "differences": {**verdict.differences, odd: {odd: Interval(estimate=0, low=-1, high=1)}},
    }
    for item in (verdict, verdict.model_copy(update=changes)):
        paths = write_verdict_pictures(item, tmp_path)
        assert [path.name for path in paths] == NAMES
        for path in paths:
            page = _pixels(path)
            assert page.shape[1] == 1200
            assert _inside(page)


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    nan = Interval(estimate=math.nan, low=-math.inf, high=0)
    verdict = make_verdict("helps", 4)
    table = np.full((4, 4), 0.25)
    table[1] = np.nan
    names = list(verdict.finalists[0].recall)
    changes: dict[str, Any] = {
        "differences": {"real": {"macro_f1": nan, "balanced_accuracy": Interval(estimate=0, low=0, high=0)}},
        "classes": tuple(
            item.model_copy(update={"recall_gain": nan, "auprc_gain": None if i else item.auprc_gain})
            for i, item in enumerate(verdict.classes)
        ),
        "dose_curve": tuple(item.model_copy(update={"scores": (math.nan, 0.5)}) for item in verdict.dose_curve),
        "learning_curve": verdict.learning_curve[:1],
        "finalists": tuple(_confusion_of(names, table, verdict.finalists[k].key) for k in (0, 1)),
    }
    paths = write_verdict_pictures(verdict.model_copy(update=changes), tmp_path)
    assert [path.name for path in paths] == NAMES
    assert all(_inside(_pixels(path)) for path in paths)


@pytest.mark.slow
def test_the_sign_of_a_gain_is_seen_in_its_colour(tmp_path: Path) -> None:
    blue, orange = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in ("#0072B2", "#D55E00"))

    def coloured(outcome: str) -> tuple[int, int]:
        changes = {"dose_curve": (), "learning_curve": (), "finalists": ()}
        (path,) = write_verdict_pictures(make_verdict(outcome, 10, **changes), tmp_path / outcome)
        page = _pixels(path)
        return int((page == blue).all(axis=2).sum()), int((page == orange).all(axis=2).sum())

    assert coloured("helps")[0] > 500
    assert coloured("helps")[1] == 0
    assert coloured("harms")[1] > 500
    assert coloured("harms")[0] == 0
    assert coloured("no evidence") == (0, 0)


def test_titles_say_what_is_better_where_it_was_measured_and_how_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, list[str]] = {}
    real_init = verdict_pictures._Picture.__init__

    def spy(self: Any, height: int, title: str, lines: Sequence[str]) -> None:
        written[title] = list(lines)
        real_init(self, height, title, lines)

    monkeypatch.setattr(verdict_pictures._Picture, "__init__", spy)
    write_verdict_pictures(make_verdict("helps", 3), tmp_path)
    gain, dose, confusion = ((title, " ".join(lines)) for title, lines in written.items())
    assert "higher is better" in gain[0]
    assert "higher is better" in dose[0]
    assert "a strong diagonal is better" in confusion[0]
    for title, lines in (gain, confusion):
        assert "test split" in title
        assert "1,234 real test images, 5 classifier seeds; look no. 2 at this test split." in lines
    assert "400 real validation images" in dose[1]
    assert "3 seeds a point" in dose[1]


def test_more_classes_than_a_picture_holds_are_cut_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict_pictures, "_MOST_CLASSES", 3)
    verdict = make_verdict("helps", 12, dose_curve=(), learning_curve=(), finalists=())
    (cut,) = write_verdict_pictures(verdict, tmp_path / "cut")
    monkeypatch.undo()
    (full,) = write_verdict_pictures(verdict, tmp_path / "full")
    assert _pixels(cut).shape[0] == _pixels(full).shape[0] - 3 * 23 + 21


def test_figures_in_words() -> None:
    assert points(Interval(estimate=0.0312, low=0.0084, high=0.0541)) == "+3.1 [+0.8, +5.4]"
    assert points(Interval(estimate=-0.0001, low=-0.02, high=0.0001)) == "0.0 [-2.0, 0.0]"
    assert points(None) == points(Interval(estimate=math.nan, low=0, high=0)) == "unavailable"
    assert signed(-0.04) == "0.0"
    assert signed(2.6, 0) == "+3"
    assert share(0.8125) == "0.812"
    assert share(None) == share(math.inf) == "unavailable"
    assert mean_and_spread((0.8,)) == "0.800"
    assert mean_and_spread((0.8, 0.82)) == "0.810 ± 0.014"
    assert mean_and_spread(()) == "not run"
    assert count(1, "seed") == "1 seed"
    assert count(1234, "real image") == "1,234 real images"


# --- in the terminal


def _said(verdict: Verdict, as_json: bool = False, pictures: Sequence[Path] = (), path: Path | None = None) -> str:
    results = io.StringIO()
    show_verdict(Session(as_json, results), verdict, pictures, path)
    return results.getvalue()


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_the_tables_of_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    interval = Interval(estimate=0.031, low=0.008, high=0.054)
    kid = Interval(estimate=0.02, low=-0.001, high=0.04)
    base = make_verdict("helps", names=["a", "b", "[red]c\x1b[31m"])
    quality = SampleQuality(n_real=40, n_samples=80, precision=0.8, recall=0.6, coverage=0.7, kid=kid)
    item = base.classes[1].model_copy(
        update={
            "n_real": 40, "n_test": 35, "tried": 80, "dose": 60, "recall_gain": interval, "auprc_gain": None,
            "quality": quality, "advice": "keep the dose",
        }
    )  # fmt: skip
    verdict = base.model_copy(update={"classes": (item,), "differences": {"real": {"macro_f1": interval}}})
    text = _said(verdict, pictures=[Path("/v/verdict_gain.png")], path=Path("/v/verdict.json"))
    rows = _rows(text)
    name = "[red]c\\x1b[31m"
    assert [name, "40", "35", "80", "60", "+3.1 [+0.8, +5.4]", "unavailable"] in rows
    assert [name, "80", "0.80", "0.60", "0.70", "0.020 [-0.001, 0.040]"] in rows
    assert ["oversampling", "0.750", "0.730", "0.550", "0.050"] in rows
    assert ["the best real-only arm", "macro-F1", "+3.1 [+0.8, +5.4]"] in rows
    arms = {row[0]: row[1:] for row in rows if row[1] in ("real", "synthetic")}
    assert len(arms) == len(verdict.arms)
    assert arms["oversampling"][0::2] == ["real", "5"]
    assert arms["oversampling"][3] == "finalist"
    assert arms["no correction"][2:] == ["2", "after 2 seeds: behind by more than 2 errors"]
    assert " ± " in arms["oversampling"][1]
    assert "Finalists on 1,234 test images, 5 seeds, look no. 2 at this test split (higher is better" in text
    assert "lower is better" in text
    assert ["site A", "200", "0.700", "0.760"] in [row[:4] for row in rows]
    lines = text.splitlines()
    assert f"advice: {name}: keep the dose" in lines
    assert "worth: 100 synthetic images did as much as about 12 more real ones would" in lines
    assert "not tried: FID: meaningless with so few images" in lines
    assert "note: The backbone was the judge's own." in lines
    assert lines[-3:-1] == ["picture: /v/verdict_gain.png", "verdict file: /v/verdict.json"]
    assert lines[-1] == f"verdict: {verdict.sentence}"
    assert "\x1b" not in text


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    results = io.StringIO()
    rows = [("7", "+3.1 [+0.8, +5.4]", "0.812 ± 0.010", "12 of 30", ""), ("10", "unavailable", "0.8", "none", "")]
    Session(False, results).table("t", ("class", "gain", "score", "words", "empty"), rows)
    line = next(line for line in results.getvalue().splitlines() if "unavailable" in line)
    assert line == "│ 10    │       unavailable │           0.8 │ none     │       │"


def test_a_verdict_without_figures_prints_no_table() -> None:
    for verdict in (budget_verdict(), refused_verdict()):
        text = _said(verdict)
        assert "│" not in text
        assert text.endswith(f"verdict: {verdict.sentence}\n")
        assert f"reason: {verdict.reasons[0]}" in text
    assert "minutes it would take: 42" in _said(budget_verdict())


def test_a_hundred_classes_share_their_advice() -> None:
    text = _said(make_verdict("helps", 100))
    (line,) = [line for line in text.splitlines() if line.startswith("advice: ")]
    assert line.endswith("and 38 more: keep the dose")


def test_a_verdict_as_json_is_one_object_of_finite_numbers() -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(name)

    bad = Interval(estimate=math.nan, low=-math.inf, high=math.inf)
    for verdict in (make_verdict("helps", 3), make_verdict(differences={"real": {"macro_f1": bad}}), budget_verdict()):
        text = _said(verdict, True, [Path("/v/verdict_gain.png")], Path("/v/verdict.json"))
        (line,) = text.splitlines()
        values = json.loads(line, parse_constant=no_constant)
        assert values["outcome"] == verdict.outcome
        assert values["verdict_file"] == "/v/verdict.json"
        assert values["pictures"] == ["/v/verdict_gain.png"]
        assert "directory" not in values
    assert json.loads(_said(budget_verdict(), True))["verdict_file"] is None


@pytest.mark.parametrize("file", [None, Path("/r/verdict.json")])
def test_a_run_ends_with_its_verdict(file: Path | None) -> None:
    from types import SimpleNamespace

    summary: Any = SimpleNamespace(
        counts={}, heldout_loss={}, copies={}, membership=None, membership_sentence="not tried", membership_file=None,
        seconds={}, reused=(), notes=(), release="/r/release", checkpoint="/r/checkpoint", contact_sheet="/r/c.png",
        rejected_sheet="/r/x.png", report="/r/report.html", pushed_to=None, verdict="no evidence",
        verdict_sentence="no evidence: \x1b[31m too few test images.", verdict_file=file,
    )  # fmt: skip
    results = io.StringIO()
    show_run(Session(False, results), summary)
    lines = results.getvalue().splitlines()
    assert "verdict: no evidence: \\x1b[31m too few test images." in lines
    assert [line for line in lines if line.startswith("verdict file: ")] == ([f"verdict file: {file}"] if file else [])
