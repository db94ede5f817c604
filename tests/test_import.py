"""Importing the package and its upper floors is light: no torch, no prefect, nothing that calls home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "accelerate", "albumentations", "cv2", "datasets", "diffusers", "huggingface_hub", "pandas", "prefect",
    "pyarrow", "scipy", "sklearn", "torch",
}  # fmt: skip


def loaded_after(program: str, without: tuple[str, ...] = (), **environment: str) -> set[str]:
    kept = {name: value for name, value in os.environ.items() if name not in without}
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"],
        cwd=Path(__file__).parent.parent,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["synthaug", "config", "records", "plan", "workspace", "pipeline", "terminal", "cli"]
)
def test_light(module: str) -> None:
    name = module if module == "synthaug" else f"synthaug.{module}"
    assert loaded_after(f"import {name}") & HEAVY == set()


def test_the_command_line_answers_without_the_library() -> None:
    assert loaded_after("import synthaug.cli") & {"numpy", "pydantic_core", "yaml", "rich"} == set()


def test_nothing_calls_home() -> None:
    names = (
        "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "NO_ALBUMENTATIONS_UPDATE", "PREFECT_SERVER_ANALYTICS_ENABLED",
        "PREFECT_SERVER_UI_V2_ENABLED",
    )  # fmt: skip
    program = f"import os, synthaug; assert [os.environ[n] for n in {names}] == ['1', '1', '1', 'false', 'false']"
    loaded_after(program, without=names)
    loaded_after("import os, synthaug; assert os.environ['DO_NOT_TRACK'] == '0'", DO_NOT_TRACK="0")
