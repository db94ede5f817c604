"""The peers: what they are, the environment that one of them needs, and how their programs are run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.errors import SynthaugError
from synthaug.formats.atomic import whole_directory, whole_file, write_text

PROGRAMS = Path(__file__).parent / "programs"
DDP = "denoising-diffusion-pytorch==2.3.4"
# torch: the CPU build that this project pins. Its package is installed without what it asks for: torchvision has no
# build that fits, and what is used of it needs none.
_DDP_NEEDS = ("torch==2.13.0", "numpy>=2.2,<3", "pillow>=12", "einops==0.8.2", "tqdm>=4.66", "ema-pytorch==0.8.3")
_RATES = (1e-4, 3e-4, 1e-3)


class PeerFailed(SynthaugError):
    """A peer's program or its environment failed."""


@dataclass(frozen=True)
class Peer:
    """One contestant beside ours."""

    name: str
    words: str
    program: str
    rates: tuple[float, ...] = (1e-4,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    at_our_size: bool = False
    own_environment: bool = False

    @property
    def learns(self) -> bool:
        return self.program != "run_pixels.py"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "ddp-16",
            "denoising-diffusion-pytorch, width 16, 50 DDIM steps, rate tuned",
            "run_ddp.py",
            _RATES,
            {"width": 16},
            own_environment=True,
        ),
        Peer(
            "ddp-64",
            "denoising-diffusion-pytorch, width 64 of its README, 50 DDIM steps, rate tuned",
            "run_ddp.py",
            _RATES,
            {"width": 64},
            own_environment=True,
        ),
        Peer(
            "diffusers-default",
            "diffusers' example, class-conditional, its own widths, 50 DDIM steps",
            "run_diffusers.py",
        ),
        Peer(
            "diffusers-ours",
            "diffusers' example at our parameter count, rate tuned, 50 DDIM steps",
            "run_diffusers.py",
            _RATES,
            at_our_size=True,
        ),
        Peer("smote", "SMOTE on pixels", "run_pixels.py", settings={"method": "smote"}),
        Peer("mixup", "mixup of two images of the class", "run_pixels.py", settings={"method": "mixup"}),
    )
}


def environment(cache: Path) -> Path:
    """The interpreter of denoising-diffusion-pytorch's own environment; made under `cache` once, in a minute or two.

    Raises:
        PeerFailed: pip could not install it.
    """
    folder = cache / DDP.replace("==", "-")
    python = folder / "bin" / "python"
    done = folder / "installed.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["needs"] == [DDP, *_DDP_NEEDS]:
        return python
    cache.mkdir(parents=True, exist_ok=True)
    print(f"making the environment of {DDP} in {folder}", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, *_DDP_NEEDS],
        [*pip, "--no-deps", DDP],
    ):
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise PeerFailed(
                f"the environment of {DDP} could not be made: {' '.join(command[1:4])} … ended with "
                f"{found.returncode}. {_last_lines(found.stderr)} Check the network or the index of pip, or leave its "
                "cells out with --cells."
            )
    write_text(done, json.dumps({"needs": [DDP, *_DDP_NEEDS]}) + "\n")
    return python


def write_images(
    path: Path,
    images: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    heldout: np.ndarray,
    heldout_labels: np.ndarray,
) -> None:
    """The training images for a peer, and the validation images by which it may choose its rate. No test image."""
    if images.dtype != np.uint8:
        raise PeerFailed(f"peers take images of 8 bits, and these are {images.dtype}. Leave the setting out.")
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            images=images[rows],
            labels=labels,
            heldout_images=images[heldout],
            heldout_labels=heldout_labels,
        )


def make_samples(
    peer: Peer, images: Path, classes: Sequence[str], counts: Mapping[int, int], out: Path, *, cache: Path, **job: Any
) -> dict[str, Any]:
    """Let a peer train and draw within its budget; PNGs lie in `out`/<class> then. Returns what it told.

    Args:
        job: minutes, threads, seed, and parameters where it is to be as large as ours.
    """
    with whole_directory(out) as folder:
        return run_program(
            peer,
            {
                "mode": "make",
                "images": str(images),
                "classes": list(classes),
                "counts": dict(counts),
                "out": str(folder),
            }
            | job,
            cache,
        )


def run_program(peer: Peer, job: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """Run a peer's program on a job and return its result.

    Raises:
        PeerFailed: It ended badly.
    """
    python = environment(cache) if peer.own_environment else Path(sys.executable)
    job = {"rates": list(peer.rates)} | dict(peer.settings) | dict(job)
    if not peer.at_our_size:
        job.pop("parameters", None)
    return run_script(PROGRAMS / peer.program, job, python=python, name=peer.name)


def run_script(script: Path, job: Mapping[str, Any], *, python: Path, name: str) -> dict[str, Any]:
    """Run one of the programs in a process of its own; it ends with this one."""
    with tempfile.TemporaryDirectory(prefix="synthaug-peer-") as folder:
        result = Path(folder) / "result.json"
        (Path(folder) / "job.json").write_text(json.dumps(dict(job) | {"result": str(result)}), encoding="utf-8")
        threads = str(job["threads"])
        # Contests are on the processor, also where there is a GPU.
        hidden = {} if job.get("device") == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [str(python), str(script), str(Path(folder) / "job.json")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **hidden},
        )
        try:
            _, said = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGKILL)
            process.wait()
            raise
        if process.returncode or not result.is_file():
            raise PeerFailed(f"{name}: its program ended with {process.returncode}. {_last_lines(said)}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " | ".join(lines[-3:])[:600]
