"""The configuration: what is refused, in which words, and that every field can be drawn in a form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from synthaug.config import Config, load_config, parse_config
from synthaug.errors import ConfigError

LEAST: dict[str, Any] = {"name": "x", "output": "runs/x", "dataset": {"format": "digits"}, "image": {"size": 8}}


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**LEAST, **changes})
    return str(caught.value)


def test_the_least_configuration_has_the_documented_defaults() -> None:
    config = parse_config(LEAST)
    assert config.plan.target_ratio == 1
    assert config.train.minutes == 3
    assert config.release.include_real
    assert config.release.push is None


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_config(LEAST).train.minutes = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trian": {}}, "trian: no such setting; did you mean 'train'?"),
        ({"train": {"minuts": 3}}, "train.minuts: no such setting; did you mean 'minutes'?"),
        ({"train": {"augment": {"flip": True}}}, "train.augment.flip: no such setting; did you mean 'flips'?"),
        (
            {"dataset": {"format": "digits", "columns": {"grp": "x"}}},
            "dataset.columns.grp: no such setting; did you mean 'group'?",
        ),
        (
            {"release": {"push": {"repo_id": "a/b", "privat": True}}},
            "release.push.privat: no such setting; did you mean 'private'?",
        ),
        ({"minutes": 3}, "minutes: no such setting; did you mean 'train.minutes' or 'evaluate.minutes'?"),
        ({"threads": 3}, "threads: no such setting; did you mean 'train.threads' or 'sample.threads'?"),
        ({"split": {"xyzzy": 1}}, "split.xyzzy: no such setting; known here: ledger, moved_duplicates,"),
        ({"image": {}}, "image.size: this setting is required."),
        ({"plan": {"counts": {"lynx": -5}}}, "plan.counts.lynx: Input should be greater than or equal to 0 (got -5)"),
        ({"plan": {"target_ratio": 0}}, "plan.target_ratio: Input should be greater than 0 (got 0)"),
        ({"plan": {"max_synthetic_share": 1}}, "plan.max_synthetic_share: Input should be less than 1 (got 1)"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: Input should be a finite number (got nan)"),
        ({"train": {"minutes": "soon"}}, "train.minutes: Input should be a valid number"),
        ({"dataset": {"format": "hub"}}, "dataset: format 'hub' needs dataset.path"),
        ({"dataset": {"format": "digits", "path": "x"}}, "remove dataset.path"),
        ({"dataset": {"format": "zip"}}, "dataset.format: Input should be 'hub', 'huggingface'"),
        ({"dataset": {"format": "digits", "cut": {3: 10}}}, "a name is wanted, and YAML reads 3; put it in quotes"),
        ({"plan": {"exclude": [False]}}, "plan.exclude.0: a name is wanted, and YAML reads False; put it in quotes"),
        ({"split": {"validation": 0.5, "test": 0.5}}, "split.validation + split.test must stay under 1"),
        ({"name": "../x"}, "name: String should match pattern"),
        ({"output": "  "}, "output: output must name a directory"),
        ({"output": "a\0b"}, "output: output must name a directory"),
    ],
)
def test_refusals_name_the_place_the_value_and_the_way_out(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(changes)


def test_every_problem_is_told_at_once() -> None:
    text = refusal({"trian": {}, "plan": {"target_ratio": 2}, "seed": -1})
    assert len(text.splitlines()) == 4
    assert text.startswith("configuration is refused:\n  ")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "base").mkdir(parents=True)
    path = write(
        tmp_path / "configs" / "x.yaml",
        "name: x\noutput: runs/x\ndataset: {format: medmnist, path: ../data/x.npz}\nimage: {size: 28}\n"
        "train: {base: base}\n",
    )
    monkeypatch.chdir(tmp_path / "configs")
    config = load_config("x.yaml")
    assert config.dataset.path == str(tmp_path / "data" / "x.npz")
    assert config.train.base == str(tmp_path / "configs" / "base")
    assert config.output == "runs/x"
    assert config.output_path == tmp_path / "configs" / "runs" / "x"
    assert load_config(path, output="/elsewhere").output == "/elsewhere"


def test_a_hub_id_is_no_path(tmp_path: Path) -> None:
    text = (
        "name: x\noutput: x\ndataset: {format: hub, path: owner/name}\nimage: {size: 8}\ntrain: {base: owner/model}\n"
    )
    config = load_config(write(tmp_path / "x.yaml", text))
    assert config.dataset.path == "owner/name"
    assert config.train.base == "owner/model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: !!python/object/apply:os.system ['true']\n", "could not determine a constructor for the tag"),
        ("name: [\n", "is not plain YAML"),
        ("name: x\nname: y\n", "the key 'name' is given twice"),
        ("train:\n  minutes: 1\n  minutes: 2\n", "the key 'minutes' is given twice"),
        ("- a\n- b\n", "holds list, not keys and values"),
        ("", "holds NoneType, not keys and values"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("? [a, b]\n: 1\n", "is"),
        ("name: 2024-13-45\n", "is not plain YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        load_config(path)
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist\. Give the path of a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "latin")


def test_an_alias_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    values = yaml.safe_dump(LEAST)
    assert load_config(write(tmp_path / "x.yaml", "\ufeff" + values)) == parse_config(LEAST)
    text = values + "train: &a {minutes: 1}\nsample: {steps: 5}\n"
    assert load_config(write(tmp_path / "y.yaml", text)).train.minutes == 1


def test_every_file_in_configs_is_valid(repository: Path) -> None:
    files = sorted((repository / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        assert load_config(file).name == file.stem


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in [schema, *schema["$defs"].values()]:
        for name, value in section["properties"].items():
            # A section described in the very words of its class is described there alone.
            target = schema["$defs"].get(value.get("$ref", "").removeprefix("#/$defs/"), {})
            yield f"{section['title']}.{name}", {"description": target.get("description"), **value}


def test_every_field_is_described_and_every_number_bounded() -> None:
    bounds = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}
    seen = 0
    for name, value in properties(Config.model_json_schema()):
        seen += 1
        assert value.get("description"), f"{name} has no description"
        for option in [value, *value.get("anyOf", [])]:
            if option.get("type") in ("integer", "number"):
                assert bounds & set(option), f"{name} is a number without bounds"
    assert seen > 50


@pytest.mark.parametrize("path", ["~nosuchuser/b", "a\0b"])
def test_paths_that_no_file_system_takes_are_refused(tmp_path: Path, path: str) -> None:
    values = {**LEAST, "dataset": {"format": "imagefolder", "path": path}}
    with pytest.raises(ConfigError, match="no file system takes"):
        parse_config(values, folder=tmp_path)


def test_a_ledger_is_found_from_wherever_the_command_is_called(tmp_path: Path) -> None:
    config = parse_config({**LEAST, "split": {"ledger": "led.json"}}, folder=tmp_path)
    assert config.split.ledger == str(tmp_path / "led.json")
