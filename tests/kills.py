"""Killing a run on purpose: at named points of writing, and at any moment.

`python -m tests.kills CONFIG LOG moments=STAGE:SECONDS,...` kills a run at each of these moments, seconds after the
stage has begun, and then lets one end; LOG gets a line for each that was still going on.

`python -m tests.kills CONFIG LOG [few] [only=PATTERN]` runs `synthaug run CONFIG` again and again, each time in a fork
of a process that has imported everything, and each time killed (SIGKILL, by its own hand) at the first point of writing
where none was killed before, until a run ends by itself. LOG gets a line a kill. A point is a file or directory that
appears by a rename, at one of three moments: half of it written, all of it written and not yet renamed, just renamed.
The removal of what is no longer needed is a point too, before and after, and so is every flush of images that are being
drawn. `few` leaves moments out inside of stages that are begun again anyway: there a kill costs the whole stage. `only`
keeps to points whose names match.

Nothing in synthaug knows of this: the system's calls are replaced in the process that is to be killed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# No run has half as many points; a name that is new every time must not go on for ever.
_MOST_KILLS, _NO_END = 300, 99
_BEGUN_AGAIN = re.compile(r"stages/(judge|membership|audit)-\*(?!/done\.json|/work/)")
_CHANGING = re.compile(r"-[0-9a-f]{12}\b|(?<=releases/)[0-9a-f]{12}\b|(?<=scratch)-\w+|(?<=staging)-\w+|\d{8}-\d{8}")


def contents(release: Path) -> dict[str, bytes]:
    """Every file of a release by its name: shards with their images, manifest, card and all."""
    return {str(path.relative_to(release)): path.read_bytes() for path in sorted(release.rglob("*")) if path.is_file()}


def unfinished(run: Path) -> list[Path]:
    """What an interrupted run may leave and a finished one must not."""
    half = [path for path in run.rglob("*") if path.name.endswith(".part") or path.name.startswith(".staging-")]
    return [*half, *run.glob("stages/*/work")]


def _install(die: Callable[[str, str], None]) -> None:
    """Call `die(point, moment)` at every point of writing of this process."""
    import numpy as np

    replace, rmtree, flush = os.replace, shutil.rmtree, np.memmap.flush

    def named(path: Any) -> str:
        text = os.fspath(path)
        inside = re.search(r"/run/(.*)$", text)
        return _CHANGING.sub("-*", inside[1] if inside else Path(text).name)

    def dying_replace(source: Any, target: Any, **options: Any) -> None:
        point = f"rename {named(target)}"
        die(point, "whole")
        replace(source, target, **options)
        die(point, "renamed")

    def dying_rmtree(path: Any, *arguments: Any, **options: Any) -> None:
        known = os.path.isdir(path) and "/run/" in os.fspath(path) and ".part" not in os.fspath(path)
        if known:
            die(f"remove {named(path)}", "before")
        rmtree(path, *arguments, **options)
        if known:
            die(f"remove {named(path)}", "after")

    def dying_flush(array: Any) -> None:
        die("flush drawn images", "before")
        flush(array)
        die("flush drawn images", "after")

    from synthaug.formats import atomic

    flush_file = atomic.flush

    def dying_file_flush(path: Path) -> None:
        if path.name.endswith(".part") and path.is_file():
            # The name without the dot in front, the random part and ".part".
            point = f"rename {named(path.with_name(path.name[1:].rsplit('.', 2)[0]))}"
            size = path.stat().st_size
            die(point, f"half:{path}:{size // 2}")
        flush_file(path)

    os.replace = dying_replace
    shutil.rmtree = dying_rmtree
    np.memmap.flush = dying_flush  # type: ignore[method-assign]
    atomic.flush = dying_file_flush


def _run_once(config: str, log: Path, few: bool, only: str) -> None:
    seen = set(log.read_text(encoding="utf-8").splitlines()) if log.exists() else set()

    def die(point: str, moment: str) -> None:
        word, _, rest = moment.partition(":")
        line = f"{point}, {word}"
        if line in seen or not re.search(only, point) or (few and word != "whole" and _BEGUN_AGAIN.search(point)):
            return
        if word == "half":
            path, _, size = rest.rpartition(":")
            os.truncate(path, int(size))
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    _install(die)
    from synthaug.cli import app

    app(["run", config], standalone_mode=True)


def _import_everything() -> None:
    import datasets  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import synthaug.audit
    import synthaug.diffusion.pipeline
    import synthaug.generators.edm
    import synthaug.pipeline
    import synthaug.quality.classifier
    import synthaug.release
    import synthaug.report.contact_sheet  # noqa: F401


def _forked(work: Callable[[], None]) -> int:
    """Process id of a fork that does this and ends with the code of its SystemExit."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def _chain(config: str, log: Path, few: bool, only: str) -> int:
    _import_everything()
    for _ in range(_MOST_KILLS):
        _, status = os.waitpid(_forked(lambda: _run_once(config, log, few, only)), 0)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
    return _NO_END


def _at_moments(config: str, log: Path, moments: list[str]) -> int:
    from synthaug.cli import app
    from synthaug.config import load_config

    def whole() -> None:
        app(["run", config], standalone_mode=True)

    _import_everything()
    run = load_config(Path(config)).output_path
    for moment in moments:
        stage, _, seconds = moment.partition(":")
        child = _forked(whole)
        place = "releases/*" if stage == "release" else f"stages/{stage}-*"
        ended = 0
        while not ended and not any(run.glob(place)):
            time.sleep(0.005)
            ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            continue
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            with log.open("a", encoding="utf-8") as file:
                file.write(moment + "\n")
    _, status = os.waitpid(_forked(whole), 0)
    return os.waitstatus_to_exitcode(status)


def _main(config: str, log: str, *words: str) -> int:
    told = dict(word.split("=", 1) for word in words if "=" in word)
    if "moments" in told:
        return _at_moments(config, Path(log), told["moments"].split(","))
    return _chain(config, Path(log), "few" in words, told.get("only", ""))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
