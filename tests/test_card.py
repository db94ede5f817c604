"""The card says plainly what the dataset is, and no name that came from data can break out of its place."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from synthaug.formats.shards import features_as_yaml
from synthaug.records import Interval, Verdict
from synthaug.report.card import CardFacts, SplitOnDisk, licence_fields, markdown, render_card
from synthaug.text import printable
from tests.release_parts import make_parts
from tests.verdict_parts import budget_verdict, make_verdict, refused_verdict

GOLDEN = Path(__file__).parent / "golden/card.md"
NAMES = ("zero", "melanoma_in_situ", "../../x\n| <b>*odd*</b> [a](http://b)")


def facts(folder: Path, classes: tuple[str, ...] = NAMES, **changes: Any) -> CardFacts:
    parts = make_parts(folder, classes=classes, withhold=2, citation="Doe, J. (2020).\n```\nA set of digits.")
    plan = parts.plan.model_copy(
        update={
            "classes": (
                parts.plan.classes[0].model_copy(update={"refused": "only 4 images to learn from"}),
                parts.plan.classes[1].model_copy(update={"note": "capped at 60 % synthetic"}),
                *parts.plan.classes[2:],
            )
        }
    )
    values: dict[str, Any] = {
        "title": "Digits, balanced",
        "source": parts.source.model_copy(update={"name": "parquet files in source"}),
        "splits": parts.splits,
        "plan": plan,
        "checkpoint": parts.checkpoint,
        "judge": parts.judge,
        "batches": parts.batches,
        "report": parts.report,
        "on_disk": (
            SplitOnDisk("train", ("data/train-00000.parquet",), (30, 12, 8), (0, 16, 0), 5000, 6000),
            SplitOnDisk("validation", ("data/validation-00000.parquet",), (4, 4, 4), (0, 0, 0), 500, 600),
            SplitOnDisk("test", ("data/test-00000.parquet",), (5, 5, 5), (0, 0, 0), 700, 800),
        ),
        "features": features_as_yaml(parts.source.pixels, classes),
        "png": True,
        "include_real": True,
        "n_short": {0: 0, 1: 2, 2: 22},
        "licence": "CC-BY-4.0",
        "citation": parts.config.dataset.citation,
        "config_digest": "c" * 64,
        "manifest_digest": "a" * 64,
        "version": "0.1.0",
    }
    return CardFacts(**{**values, **changes})


def test_golden_card(tmp_path: Path) -> None:
    card = render_card(facts(tmp_path))
    if os.environ.get("SYNTHAUG_BLESS") == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(card, encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8"), (
        "if this change is wanted: SYNTHAUG_BLESS=1 pytest tests/test_card.py"
    )


def test_what_it_is_stands_in_the_first_lines(tmp_path: Path) -> None:
    body = render_card(facts(tmp_path)).split("\n---\n", 1)[1]
    first = body[:900]
    assert "81 real and 16 synthetic" not in first
    assert "93 images for image classification in 3 classes: 77 real and 16 synthetic." in first
    assert "Verdict: not evaluated" in first
    assert "validation and test hold real images only" in first
    assert body.index("Verdict: not evaluated") < body.index("93 images")
    assert "## Verdict" not in body


def _first_paragraph(card: str) -> str:
    title, first = card.split("\n---\n", 1)[1].strip().split("\n\n")[:2]
    assert title == "# Digits, balanced"
    return first


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("helps", "**Verdict: the synthetic images help.** "),
        ("no evidence", "**Verdict: no evidence that the synthetic images help.** "),
        ("harms", "**Verdict: the synthetic images do harm.** "),
    ],
)
def test_the_verdict_comes_first_whichever_it_is(tmp_path: Path, outcome: str, words: str) -> None:
    verdict = make_verdict(outcome, differences={"real": {"balanced_accuracy": _interval(0.031, 0.008, 0.0541)}})
    card = render_card(replace(facts(tmp_path), verdict=verdict))
    first = _first_paragraph(card)
    assert first.startswith(words)
    assert f"** {outcome}:" not in first
    assert "+3.1 percentage points, 95 % interval +0.8 to +5.4" in first
    assert "higher is better" in first
    assert "1,234 real images, 5 classifier seeds, look no. 2 at this test split" in first
    assert "All figures are of one generator" in first
    assert "not evaluated" not in card


@pytest.mark.parametrize("verdict", [budget_verdict(), refused_verdict()], ids=["budget", "refused"])
def test_a_verdict_without_figures_claims_nothing(tmp_path: Path, verdict: Verdict) -> None:
    card = render_card(replace(facts(tmp_path), verdict=verdict))
    first = _first_paragraph(card)
    assert first.startswith("**Verdict: no evidence that the synthetic images help.** ")
    assert "no claim is made that they are useful" in first
    section = _section(card)
    assert verdict.reasons[0] in section
    assert "|" not in section
    assert "look no." not in card


def test_the_section_tells_how_it_was_found_and_what_was_not_tried(tmp_path: Path) -> None:
    verdict = make_verdict("helps", names=["a", "b", "c_d"])
    section = _section(render_card(replace(facts(tmp_path), verdict=verdict)))
    assert "Chosen on the validation split (400 real images) by balanced accuracy out of 3 arms with real" in section
    assert "`oversampling` and `synthetic 1x + balanced softmax`" in section
    assert "Reported on the test split (1,234 real images, 5 classifier seeds, look no. 2" in section
    assert "Earlier looks may have guided the settings" in section
    assert "Classifier: small residual network, 600 optimizer steps for every arm." in section
    assert "Not tried: 3x with focal loss: too little time" in section
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    item = verdict.classes[1]
    (row,) = [row for row in rows if row[0] == "c\\_d"]
    assert row[1:6] == [str(n) for n in (item.n_real, item.n_test, item.n_offered, item.tried, item.dose)]
    assert all(re.fullmatch(r"[+-]?\d+\.\d \[[+-]?\d+\.\d, [+-]?\d+\.\d\]", cell) for cell in row[6:])
    assert [row[1:5] for row in rows if row[0].startswith("oversampling")] == [["0.750", "0.730", "0.550", "0.050"]]
    assert ["the best real-only arm", "rare AUPRC"] in [row[:2] for row in rows]
    assert ["site B", "200"] in [row[:2] for row in rows]


def test_a_first_look_is_not_reproached(tmp_path: Path) -> None:
    assert "Earlier looks" not in render_card(replace(facts(tmp_path), verdict=make_verdict(looks=1)))


def test_only_pictures_that_the_release_holds_are_shown(tmp_path: Path) -> None:
    base = replace(facts(tmp_path), verdict=make_verdict())
    assert "verdict_gain.png" not in render_card(base)
    card = render_card(replace(base, verdict_pictures=("verdict_gain.png", "verdict_dose.png", "a](b).png")))
    assert re.findall(r"!\[[^]]+\]\(([^)]*)\)", card) == ["contact_sheet.png", "verdict_gain.png", "verdict_dose.png"]


def test_nothing_of_a_verdict_breaks_out_of_its_place(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    odd = "x | <b>`*y*` [a](http://b)\n# z"
    verdict = make_verdict(names=["a", odd])
    changes = {
        "sentence": odd, "reasons": (odd,), "worth": odd, "notes": (odd,), "advice": (odd,), "not_tried": {odd: odd},
        "classifier": odd, "best_real": odd, "recipe": odd,
        "finalists": tuple(item.model_copy(update={"key": odd, "words": odd}) for item in verdict.finalists),
        "subgroups": tuple(item.model_copy(update={"name": odd}) for item in verdict.subgroups),
        "differences": {**verdict.differences, odd: {odd: _interval(0, 0, 0)}},
    }  # fmt: skip
    base = facts(tmp_path, verdict=verdict)
    body, changed = (
        render_card(replace(base, verdict=item)).split("\n---\n", 1)[1]
        for item in (verdict, verdict.model_copy(update=changes))
    )
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    kinds = [{child.type for token in parser.parse(text) for child in token.children or []} for text in (body, changed)]
    assert kinds[1] <= {*kinds[0], "text_special"}
    assert not kinds[1] & {"html_inline", "link_open"}
    headings = [[t.tag for t in parser.parse(text) if t.type == "heading_open"] for text in (body, changed)]
    assert headings[0] == headings[1]
    # Every row has the cells of its head.
    widths = [line.count(" | ") for line in _section(changed).splitlines() if line.startswith("|")]
    tables = [len(table.splitlines()) for table in _section(changed).split("\n\n") if table.startswith("|")]
    for size in tables:
        assert len({widths.pop(0) for _ in range(size)}) == 1


def test_figures_that_are_no_numbers_are_unavailable(tmp_path: Path) -> None:
    verdict = make_verdict(differences={"real": {"balanced_accuracy": _interval(float("nan"), 0, 0)}})
    card = render_card(replace(facts(tmp_path), verdict=verdict))
    assert not re.search(r"\bnan\b", card)
    assert "No difference was measured" in _first_paragraph(card)


def _interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate=estimate, low=low, high=high)


def _section(card: str) -> str:
    return card.split("\n## Verdict\n", 1)[1].split("\n## ", 1)[0]


def test_limits_are_plain(tmp_path: Path) -> None:
    assert "not differential privacy and not anonymity" in render_card(facts(tmp_path))


def test_front_matter_is_read_back_by_datasets(tmp_path: Path) -> None:
    import datasets
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    given_facts = facts(tmp_path)
    values = yaml.safe_load(render_card(given_facts).split("---\n")[1])
    data = DatasetCardData(**values)
    info = datasets.info.DatasetInfosDict.from_dataset_card_data(data)["default"]
    assert info.features["label"].names == list(NAMES)
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 66,
        "validation": 12,
        "test": 15,
    }
    (files,) = MetadataConfigs.from_dataset_card_data(data)["default"]["data_files"][:1]
    assert files == {"split": "train", "path": ["data/train-00000.parquet"]}
    assert values["size_categories"] == ["n<1K"]
    assert values["license"] == "cc-by-4.0"
    assert "synthetic" in values["tags"]


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("MIT", {"license": "mit"}),
        (None, {"license": "unknown"}),
        ("  ", {"license": "unknown"}),
        (
            "Ask the Hospital! (2020)",
            {
                "license": "other",
                "license_name": "ask-the-hospital-2020",
                "license_details": "Ask the Hospital! (2020)",
            },
        ),
        ("秘密", {"license": "other", "license_name": "see-details", "license_details": "秘密"}),
    ],
)
def test_licences(licence: str | None, fields: dict[str, str]) -> None:
    assert licence_fields(licence) == fields


def test_every_name_of_a_class_survives_the_front_matter(tmp_path: Path) -> None:
    base = facts(tmp_path)

    @given(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=3, max_size=3, unique=True)
    )
    @settings(max_examples=60, deadline=None)
    def check(names: list[str]) -> None:
        features = features_as_yaml(base.source.pixels, names)
        values = yaml.safe_load(render_card(replace(base, features=features)).split("---\n")[1])
        label = next(item for item in values["dataset_info"]["features"] if item["name"] == "label")
        assert list(label["dtype"]["class_label"]["names"].values()) == names

    check()


@given(st.text(max_size=30) | st.text("<>&|`*_[]()!#+-.~$\\/:w ht\n\t0", max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_name_in_a_table_is_text_and_nothing_else(name: str) -> None:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(f"| Class | n |\n| --- | ---: |\n| {markdown(name)} | 7 |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert [cell.content for cell in cells[:2]] == ["Class", "n"]
    assert len(cells) == 4
    assert cells[3].content == "7"
    kinds = {child.type for child in cells[2].children or []}
    assert kinds <= {"text", "text_special"}
    assert "".join(child.content for child in cells[2].children or []).strip() == printable(name, width=200).strip()


@given(st.text(max_size=20) | st.text("<>&|`*_[]()!#+-.~$\\/:= 0123", max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_name_in_a_list_is_text_and_nothing_else(name: str) -> None:
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).parse(f"- {markdown(name)}\n- end\n")
    assert [token.type for token in tokens if token.type.endswith("_open")] == [
        "bullet_list_open",
        *["list_item_open", "paragraph_open"] * 2,
    ]


def test_an_audit_without_a_near_copy_distance_is_not_praised(tmp_path: Path) -> None:
    base = facts(tmp_path)
    judge = base.judge.model_copy(update={"near_copy_threshold": None, "near_copy_note": "too few held-out images"})
    report = base.report.model_copy(update={"notes": ("too few held-out images",)})
    card = render_card(replace(base, judge=judge, report=report))
    assert "Near-copies were not looked for" in card
    assert card.count("too few held-out images") == 1


def test_samples_alone(tmp_path: Path) -> None:
    base = facts(tmp_path)
    train = replace(base.on_disk[0], n_real=(0, 0, 0))
    card = render_card(replace(base, include_real=False, on_disk=(train,)))
    assert "16 synthetic images for image classification in 3 classes, and no real ones." in card
    assert "Real (training, not in this release)" in card
    assert "validation" not in yaml.safe_load(card.split("---\n")[1])["configs"][0]["data_files"][0]["split"]
