"""Where a sample has its place: class, index, seed and canonical micro-batch. What draws and what remakes agree here.

Sample i of a class belongs to micro-batch i // size, which is always computed whole and alone: so a sample's last
bit does not depend on what else is asked for, in which order or by whom.
"""

from __future__ import annotations

import hashlib

import numpy as np

import synthaug
from synthaug.digest import digest_json
from synthaug.generators.interface import Generator


def sample_seed(seed: int, class_name: str, class_index: int) -> int:
    """Return the seed of a sample, 0 to 2**63 - 1; a property of its place, not of when it is drawn."""
    text = f"synthaug sample\0{seed}\0{class_name}\0{class_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_id(
    checkpoint_digest: str,
    seed: int,
    class_name: str,
    class_index: int,
    *,
    steps: int,
    guidance: float,
    micro_batch: int,
    threads: int,
) -> str:
    """Return the id of a sample: a digest of all that its pixels follow from, but for the machine."""
    made_of = [checkpoint_digest, seed, class_name, class_index, steps, guidance, micro_batch, threads]
    return "syn-" + digest_json(made_of)[:20]


def micro_batch_indices(batch: int, size: int) -> range:
    """Indices, in the class's endless sequence, of the samples of a micro-batch."""
    return range(batch * size, (batch + 1) * size)


def draw_micro_batch(generator: Generator, label: int, seeds: list[int], *, steps: int, guidance: float) -> np.ndarray:
    """Draw one micro-batch, alone: native images [size, height, width, channels]."""
    return generator.sample([label] * len(seeds), seeds, steps=steps, guidance=guidance)


def environment() -> dict[str, str]:
    """What else the last bit of a sample can depend on: versions of synthaug and of libraries, and the processor's
    arithmetic. Whatever is drawn together is drawn with one of each.
    """
    import diffusers
    import torch

    return {
        "synthaug": synthaug.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
