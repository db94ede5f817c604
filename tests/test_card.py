"""The card says plainly what the dataset is, and no name that came from data can break out of its place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from synthaug.formats.shards import features_as_yaml
from synthaug.report.card import CardFacts, SplitOnDisk, licence_fields, markdown, render_card
from synthaug.text import printable
from tests.release_parts import make_parts

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
            SplitOnDisk("train", ("data/train-00000-of-00001.parquet",), (30, 12, 8), (0, 16, 0), 5000, 6000),
            SplitOnDisk("validation", ("data/validation-00000-of-00001.parquet",), (4, 4, 4), (0, 0, 0), 500, 600),
            SplitOnDisk("test", ("data/test-00000-of-00001.parquet",), (5, 5, 5), (0, 0, 0), 700, 800),
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
    assert files == {"split": "train", "path": ["data/train-00000-of-00001.parquet"]}
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
