"""Files that appear whole: what threads do beside each other, too."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from synthaug.formats import atomic
from synthaug.formats.atomic import umask, write_text


@pytest.mark.parametrize("told", [True, False])
def test_threads_leave_the_mask_as_it_is(told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if told and not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells the mask")
    if not told:
        monkeypatch.setattr(atomic, "_STATUS", tmp_path / "none")
    original = os.umask

    def slow(mask: int) -> int:
        before = original(mask)
        time.sleep(0.005)
        return before

    mine = original(0o027)
    try:
        monkeypatch.setattr(os, "umask", slow)
        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(lambda number: umask(), range(12)))
        write_text(tmp_path / "file", "text")
    finally:
        left = original(mine)
    assert (left, set(seen)) == (0o027, {0o027})
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
