"""Kill `synthaug run` at random moments over all stages, and hold every release against an undisturbed one.

    python benchmarks/kills.py [--kills 30] [--seed 0]

A kill is SIGKILL to a real process of the small job of the tests, at a random moment of each stage in turn. A
run folder is killed until its run ends; then its release is compared, byte for byte, with that of an undisturbed run,
and a new folder begins. Prints a line a kill and what it came to.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import kills
from tests.conftest import tiny_values

STAGES = ("read", "split", "train", "judge", "membership", "sample", "audit", "release")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draws = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = job(folder / "undisturbed")
        finish(config)
        wanted = kills.contents(config.parent / "run" / "release")
        seconds = {
            path.parent.name.split("-")[0]: json.loads(path.read_text(encoding="utf-8"))["seconds"]
            for path in config.parent.glob("run/stages/*/done.json")
        }
        print("undisturbed, seconds: " + ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in STAGES))
        killed = compared = folders = 0
        while killed < given.kills:
            folders += 1
            config = job(folder / str(folders))
            run = config.parent / "run"
            # In the order of the job, so that every kill of a folder finds its stage still to be done.
            for stage in STAGES:
                with kills.start(config) as process:
                    if not kills.wait_for_stage(process, run, stage):
                        break
                    moment = draws.uniform(0, seconds[stage])
                    time.sleep(moment)
                    ended = process.poll() is not None
                    process.kill()
                if ended:
                    break
                killed += 1
                print(f"kill {killed}: folder {folders}, {moment:.2f} s into {stage}", flush=True)
            finish(config)
            if kills.contents(run / "release") != wanted or kills.unfinished(run):
                sys.exit(f"folder {folders} differs: {kills.unfinished(run)}")
            compared += 1
    print(f"{killed} kills in {folders} folders; {compared} of {compared} releases byte for byte the undisturbed one")


def job(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder / "run")), encoding="utf-8")
    return path


def finish(config: Path) -> None:
    with kills.start(config) as process:
        _, stderr = process.communicate()
    if process.returncode:
        sys.exit(stderr)


if __name__ == "__main__":
    main()
