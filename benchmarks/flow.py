"""What the flow costs over the plain run of the same job, start-up aside.

    python benchmarks/flow.py [--rounds 5] [--images 4096]

The small job of the tests, in one process that has imported everything and has its Prefect server running: plain and as
a flow in turn, each into an empty folder. Prints seconds of wall time and the median of the ratios.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4096)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        os.environ.pop("PREFECT_API_URL", None)
        from flows.augment import augment as as_flow
        from flows.server import use_guarded_server
        from synthaug.config import parse_config
        from synthaug.pipeline import augment
        from tests.conftest import tiny_values

        logging.getLogger("prefect").setLevel(logging.WARNING)
        use_guarded_server()

        def seconds(run: object, name: str) -> float:
            config = parse_config(tiny_values(folder / name, train={"images": given.images}))
            started = time.monotonic()
            run(config)  # type: ignore[operator]
            return time.monotonic() - started

        # Imports, and the server's start.
        seconds(as_flow, "first")
        ratios = []
        for number in range(given.rounds):
            pair = [("plain", augment), ("flow", as_flow)]
            took = {}
            for name, run in pair if number % 2 else pair[::-1]:
                took[name] = seconds(run, f"{name}-{number}")
            ratios.append(took["flow"] / took["plain"])
            print(f"plain {took['plain']:.2f} s, flow {took['flow']:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
