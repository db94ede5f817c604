"""Tiny datasets for the tests of reading and splitting."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from synthaug.config import Config, parse_config
from synthaug.read import read
from synthaug.records import IMAGES_FILE, INDEX_FILE, Source


def job(form: str, path: Path | str | None = None, *, size: int = 8, **sections: Any) -> Config:
    """A configuration of which only `dataset`, `image` and `split` matter; `sections` add to them."""
    dataset = {"format": form, **({"path": str(path)} if path is not None else {}), **sections.pop("dataset", {})}
    image = {"size": size, **sections.pop("image", {})}
    output = sections.pop("output", "unused")
    return parse_config({"name": "small", "output": str(output), "dataset": dataset, "image": image, **sections})


def picture(seed: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    """Noise: no two seeds are near-duplicates."""
    values = np.random.default_rng(seed).random(shape or (8, 8))
    high = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (values * high).astype(dtype)


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def put(path: Path, content: bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else png(content))
    return path


def folder(root: Path, counts: dict[str, int], *, first_seed: int = 0) -> Path:
    """One folder a class, with so many pictures."""
    seed = first_seed
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            put(root / name / f"{number}.png", picture(seed))
            seed += 1
    return root


def run(config: Config, directory: Path) -> tuple[Source, np.ndarray, pd.DataFrame]:
    """Read; also return the images and the index."""
    directory.mkdir(parents=True, exist_ok=True)
    source = read(config, directory)
    return source, np.load(directory / IMAGES_FILE), pd.read_parquet(directory / INDEX_FILE)
