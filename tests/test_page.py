"""The report: a page that is well formed and safe, says what the records say, and shows nobody's images by mistake."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthaug.records import Interval
from synthaug.report.page import render_page, training_log
from synthaug.report.page_facts import PageFacts
from synthaug.report.page_figures import Series, interval_bar, interval_limits, plot
from synthaug.report.page_pictures import page_pictures
from synthaug.text import printable
from tests.page_parts import HOSTILE, N_REAL, N_WANTED, Page, Run, shown
from tests.release_parts import make_parts
from tests.verdict_parts import budget_verdict, refused_verdict


def page_of(run: Run, *, internal: bool = False, include_real: bool = True, **changes: Any) -> Page:
    values = run.values()
    pictures = page_pictures(
        values["source"], values["splits"], values["batches"], values["report"], internal=internal,
        include_real=include_real,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "title": "squares", "internal": internal, "include_real": include_real, "pictures": pictures,
        "training_log": training_log(values["checkpoint"]), **values, **changes,
    }  # fmt: skip
    return Page(render_page(PageFacts(**facts)))


def check(page: Page) -> None:
    """What every page must be: well formed, usable without a mouse or eyes, and asking no network for anything."""
    assert not page.wrong
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.tags:
        for reference in ("href", "src", "xlink:href", "action", "srcset", "data", "poster", "background"):
            if reference in attributes:
                value = str(attributes[reference])
                assert re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", value) or value[1:] in ids, value[:80]
        assert not [key for key in attributes if key.startswith("on")], name
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    assert {name for name, _ in page.tags} >= {"header", "nav", "main", "footer", "h1"}
    assert all("alt" in image for image in page.named("img"))
    assert all("scope" in heading for heading in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(drawing.get("role") == "img" or drawing.get("aria-hidden") == "true" for drawing in page.named("svg"))
    assert page.named("html")[0]["lang"] == "en"
    assert not re.search(r"url\(|@import|<link|<iframe|<object|<base", page.text)
    assert "nan" not in re.findall(r"\w+", page.said)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("page") / "run", ["cat", "dog", "lynx"])


@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_any_number_of_classes_makes_a_sound_page(tmp_path: Path, n_classes: int, internal: bool) -> None:
    run = Run(tmp_path / "run", [f"class {k}" for k in range(n_classes)])
    page = page_of(run, internal=internal)
    check(page)
    assert len(page.text) < 15_000_000
    sections = [attributes for attributes in page.named("details") if attributes.get("class") == "class"]
    assert len(sections) == n_classes
    for label in range(n_classes):
        assert {"href": f"#class-{label}"} in page.named("a")


@pytest.mark.parametrize("internal", [True, False])
def test_names_from_data_are_text_and_nothing_else(tmp_path: Path, internal: bool) -> None:
    run = Run(tmp_path / "run", HOSTILE)
    page = page_of(run, internal=internal, title="<img src=x onerror=alert(1)>", licence="</style><b>", citation="<i>")
    check(page)
    for name in HOSTILE:
        assert " ".join(printable(name, 200).split()) in page.said
    assert len(page.named("script")) == 1
    assert not {"b", "i"} & {name for name, _ in page.tags}
    assert "\u202e" not in page.text
    assert "{{ 7*7 }}" in page.said


def test_a_policy_forbids_every_address_and_every_script_but_ours(run: Run) -> None:
    page = page_of(run)
    (policy,) = [tag["content"] for tag in page.named("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not [attributes for _, attributes in page.tags if "style" in attributes]


def test_it_says_what_the_records_say(run: Run) -> None:
    page = page_of(run, internal=True)
    said = page.said
    assert "Verdict: Helps: +6.0 points" in said
    assert f"{2 * N_WANTED} synthetic images of 2 classes were made from {3 * N_REAL} real training images" in said
    assert "40 samples were drawn and 20 passed the audit." in said
    assert "turned by 5 degrees yes 40 39 (98%) 20" in said
    assert "AUC 0.550 [0.480, 0.620]" in said
    assert "site A 200 0.700 0.760" in said
    assert "4 = 20.0% (6.0% to 44.0%), 2 of them exact" in said
    assert "synthaug remake release --sample syn-10" in said
    assert "0.70 of 0.90" in said
    assert "The checkpoint was trained without differential privacy." in said


def test_beside_copies_stand_training_images_in_the_run_folder_alone(run: Run) -> None:
    """With real images left out, what is on the page tells which were put beside samples."""
    copies = run.samples[4:8]  # of class 1: two copies, two near-copies
    nearest = run.real[[N_REAL + k for k in (4, 5, 6, 7)]]
    inside = page_of(run, internal=True, include_real=False)
    assert shown(inside, copies) == [0, 1, 2, 3]
    assert shown(inside, nearest) == [0, 1, 2, 3]
    released = page_of(run, internal=False, include_real=False)
    assert shown(released, run.real) == []
    assert shown(released, copies) == []
    assert shown(released, run.samples[2:4]) == []  # duplicates may be copies as well
    assert shown(released, run.samples[8:10]) == [0, 1]  # judged another class
    assert shown(released, run.samples[10:19]) == list(range(9))


def test_processes_that_trained_together_are_told(run: Run) -> None:
    checkpoint = run.values()["checkpoint"]
    words = "Trained by 2 processes together, the first on"
    assert words not in page_of(run).said
    assert words in page_of(run, checkpoint=checkpoint.model_copy(update={"processes": 2})).said


def test_real_images_are_those_of_training(run: Run) -> None:
    page = page_of(run)
    assert shown(page, run.real) == list(range(3 * N_REAL))  # not validation, test, or what was held back
    assert not [tile for tile in page.named("img") if "training image" in str(tile["alt"])]


def test_without_real_images_none_is_read(run: Run, tmp_path: Path) -> None:
    before = page_of(run, include_real=False).text
    folder = tmp_path / "read"
    folder.mkdir()
    np.save(folder / "images.npy", np.full_like(run.real, 77))
    source = run.values()["source"].model_copy(update={"directory": folder})
    values = run.values()
    pictures = page_pictures(
        source, values["splits"], values["batches"], values["report"], internal=False, include_real=False
    )
    assert page_of(run, include_real=False, pictures=pictures).text == before


def test_a_withheld_class_shows_its_reason_and_outside_no_sample(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["cat", "dog", "lynx"], withhold=2)
    released, inside = page_of(run, include_real=False), page_of(run, internal=True, include_real=False)
    assert "Withheld: it covers too little" in released.said
    assert shown(released, run.samples[20:]) == []
    assert len(shown(inside, run.samples[20:])) == 20
    assert f"{N_WANTED} synthetic images of 1 class were made" in released.said


def test_the_page_of_a_release_tells_no_time_and_no_place(run: Run) -> None:
    page = page_of(run)
    assert str(run.output) not in page.text
    assert not re.search(r"\bseconds\b|/tmp|\d\d:\d\d", page.said)
    assert "Costs" not in page.said
    assert "not for publication" not in page.said


@pytest.mark.parametrize("verdict", [None, budget_verdict(), refused_verdict()])
@pytest.mark.parametrize("membership", [True, False])
@pytest.mark.parametrize("heldout", [True, False])
def test_what_was_not_measured_is_said(tmp_path: Path, verdict: Any, membership: bool, heldout: bool) -> None:
    run = Run(tmp_path / "run", ["cat", "dog"], verdict=verdict or False, membership=membership, heldout=heldout)
    page = page_of(run)
    check(page)
    assert (
        "Whether the generator tells its training images from others was not tested." in page.said
    ) is not membership
    assert ("No claim is made that they are useful." in page.said) is (verdict is None)
    assert ("Near-copies were not looked for" in page.said) is not heldout


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    pages = [page_of(Run(tmp_path / name, ["cat", "dog"]), internal=True).text for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_too_many_pictures_become_jpeg_and_then_fewer(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["cat", "dog", "lynx"], size=48, channels=3)
    values = run.values()
    sizes, kinds, numbers = [], [], []
    for most in (10_000_000, 400_000, 150_000):
        pictures = page_pictures(
            values["source"], values["splits"], values["batches"], values["report"], internal=True, include_real=True,
            most_bytes=most,
        )  # fmt: skip
        page = page_of(run, internal=True, pictures=pictures)
        check(page)
        uris = [str(image["src"]) for image in page.named("img")]
        sizes.append(sum(len(uri) for uri in uris) * 3 / 4)
        kinds.append({uri.split(";")[0] for uri in uris})
        numbers.append(len(uris))
        assert ("stored here as JPEG" in page.said) is ("data:image/jpeg" in kinds[-1])
    assert kinds == [{"data:image/png"}, {"data:image/jpeg"}, {"data:image/jpeg"}]
    assert sizes[1] < 405_000
    assert sizes[2] < 155_000
    assert numbers[0] == numbers[1] > numbers[2] > 0


def test_a_release_carries_its_page_and_no_secret(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    for include_real in (True, False):
        first, second = (tmp_path / f"{name}-{include_real}" for name in ("one", "two"))
        one, two = (parts.release(folder, include_real=include_real) for folder in (first, second))
        assert one.digest == two.digest
        page = Page((first / "report.html").read_text(encoding="utf-8"))
        check(page)
        assert page.text == (second / "report.html").read_text(encoding="utf-8")
        assert str(tmp_path) not in page.text
        assert "real-secret" not in page.text
        assert bool(shown(page, parts.images)) is include_real
        assert one.manifest_digest in page.said
        shutil.rmtree(first)


def test_a_log_of_another_generator_makes_no_trouble(run: Run, tmp_path: Path) -> None:
    for log, said in (
        ([], "none were recorded"),
        ([{"loss": "?", "images": "x"}], "none were recorded"),
        ([{"step": 1, "loss": -1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": -2.0}], "Training curves"),
        ([{"images": 5, "loss": 1.0}], "Training curves"),
    ):
        page = page_of(run, training_log=log)
        check(page)
        assert said in page.said


def test_drawings_stay_within_their_frame() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        scale = 10.0 ** random.integers(-6, 7)
        points = tuple((float(x), float(y)) for x, y in zip(range(9), random.uniform(0.1, 1, 9) * scale, strict=True))
        for logarithmic in (False, True):
            svg = str(plot("t", [Series("a", points)], "x", logarithmic=logarithmic))
            (line,) = re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
            at = np.array([[float(v) for v in point.split(",")] for point in line.split()])
            assert (at[:, 0] >= 52).all()
            assert (at[:, 0] <= 430).all()
            assert (at[:, 1] >= 12).all()
            assert (at[:, 1] <= 212).all()
            assert len(re.findall('class="grid"', svg)) >= 1
    interval = Interval(estimate=0.03, low=-0.01, high=0.07)
    assert 'class="bar unclear"' in str(interval_bar(interval, interval_limits([interval])))
    assert interval_bar(None, (0, 1)) is None


def _contrast(one: str, two: str) -> float:
    """WCAG 2.2, relative luminance of two colours."""
    light = []
    for colour in (one, two):
        wide = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        parts = [int(wide[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_everything_can_be_read_in_the_light_in_the_dark_and_on_paper(run: Run) -> None:
    (style,) = re.findall("<style>(.*?)</style>", page_of(run).text, re.S)
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(schemes) == 3
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", scheme))
        texts = [("ink", "page"), ("soft", "page"), ("link", "page"), ("ink", "box"), ("soft", "box"), ("bad", "page")]
        texts += [("real", "page"), ("synthetic", "page"), ("good", "good-ground"), ("bad", "bad-ground")]
        texts += [("ink", "rejected-ground")]
        lines = [(name, "page") for name in ("better", "worse", "unclear", *(f"s{k}" for k in range(6)))]
        assert all(_contrast(colours[one], colours[two]) >= 4.5 for one, two in texts)
        assert all(_contrast(colours[one], colours[two]) >= 3 for one, two in lines)
