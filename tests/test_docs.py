"""What the documents say is held against the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from synthaug.cli import app
from synthaug.config import load_config, parse_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_accepted(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_the_example_of_the_readme_is_accepted() -> None:
    (example,) = code_blocks("yaml")
    assert parse_config(yaml.safe_load(example)).dataset.columns.group == "patient_id"


def test_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"^synthaug (\w+)", "\n".join(code_blocks("")), re.M))
    commands = {"plan", "run", "evaluate", "audit", "verify", "remake", "affected", "report", "status", "serve"}
    assert named == commands
    for name in named:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
    targets = re.findall(r"^make (\w+)", "\n".join(code_blocks("")), re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(targets) == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_the_file_tree_of_the_readme_names_what_is_there() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    missing, folder = [], ROOT
    for line in tree.strip().splitlines():
        head = re.match(r"(\s*)(\S+/)", line)
        if head:
            folder = ROOT / "synthaug" / head[2] if head[1] else ROOT / head[2]
            missing += [] if folder.is_dir() else [head[2]]
        missing += [name for name in re.findall(r"\b\w+\.(?:py|yaml|md)\b", line) if not _is_there(folder, name)]
    assert not missing
    modules = {path.name for path in (ROOT / "synthaug").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules <= set(re.findall(r"\w+\.py", tree)), "a module of synthaug/ is not in the tree"


def _is_there(folder: Path, name: str) -> bool:
    return any((place / name).is_file() for place in (folder, ROOT / "synthaug", ROOT))


def test_figures_name_scripts_that_exist() -> None:
    for name in re.findall(r"benchmarks/\w+\.py", README):
        assert (ROOT / name).is_file(), name
