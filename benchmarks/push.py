"""How many bytes a push of a release uploads: the first one, the same again, grown by a little, with another card.

    python -m benchmarks.push [--images 20000]

Random smooth pictures of 64×64 stand in for the network's, a hub on 127.0.0.1 (tests/loopback_hub.py) for the real one.
What it receives is counted there: contents of files, not what requests say beside them.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.loopback_hub import LoopbackHub

REPO = "clinic/pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, LoopbackHub(token="hf_benchmark") as hub:
        folder = Path(temporary)
        # Read when the library is first imported.
        os.environ.update(hub.environment(folder / "home"))
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from benchmarks.release_memory import inputs, make_inputs
        from synthaug.config import PushConfig
        from synthaug.formats.hub import push
        from synthaug.release import release

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        settings = PushConfig(repo_id=REPO, real_images=True)

        def made(name: str, samples: int, previous: Path | None, **changes: Any) -> Path:
            (folder / f"{name}-in").mkdir()
            (folder / name).mkdir()
            make_inputs(folder / f"{name}-in", samples, 64)
            config, *parts = inputs(folder / f"{name}-in", samples, 64)
            config = config.model_copy(update={"release": config.release.model_copy(update=changes)})
            return release(config, *parts, None, folder / name, previous=previous).directory

        def pushed(what: str, directory: Path) -> None:
            before = hub.received["lfs"]
            push(directory, settings)
            commits = hub.repositories[REPO].commits
            sizes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            print(f"| {what} | {sizes / 1e6:.2f} | {(hub.received['lfs'] - before) / 1e6:.2f} | {len(commits) - 1} |")

        print("| push | release, MB | uploaded, MB | commits so far |\n|---|---:|---:|---:|")
        first = made("first", given.images, None)
        pushed("first", first)
        pushed("nothing new", first)
        second = made("second", given.images + 12, first)
        pushed("twelve more samples", second)
        pushed("another title", made("third", given.images + 12, second, title="Another title"))
        pushed("all of it in other shards (append: false)", made("fourth", given.images + 24, None))


if __name__ == "__main__":
    main()
