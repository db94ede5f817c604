"""Images per second of a loader over a release against a plain one over the real images alone; start of a large one.

    python benchmarks/loaders.py --images 20000 --size 64
    python benchmarks/loaders.py --start 1000000

Speed: a release of smooth random pictures, half of each class's images real. Both loaders decode PNGs out of the same
shards and apply the same transform. Plain is what one writes by hand: `load_dataset`, the real rows, Pillow's decoder,
`torch.utils.data.DataLoader`. Harder is the same with the PNGs in memory as bytes and OpenCV as decoder, so
without any file. Each round goes through all in turn, so that what else the machine does meets all of them; the table
has the median of the rounds' ratios. An epoch is drawn whole, workers' start included. On a machine that does other
work the clock says little: processor time is what each loader needs.

Start: from the call of `balanced_loader` to the loader, in a process of its own, and its peak of memory above the
interpreter with its libraries. Small pictures: nothing of them is read.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("common", "scarce")


def write_release(folder: Path, n_real: int, n_synthetic: int, size: int, channels: int) -> None:
    """A release as `synthaug.release` writes one, without a job: a thousand pictures, over and over."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    from synthaug.digest import digest_file
    from synthaug.formats.manifest import MANIFEST_FILE, MANIFEST_SCHEMA, write_release_file
    from synthaug.formats.pixels import encode_png
    from synthaug.formats.shards import _open_writer, png_text, shard_features, shard_name
    from synthaug.records import PixelSpec

    colour = "rgb" if channels == 3 else "grey"
    spec = PixelSpec(
        channels=channels, dtype="uint8", colour=colour, low=0, high=255, size=size, fit="none", interpolation="none",
        smallest=(size, size), largest=(size, size),
    )  # fmt: skip
    pictures = _pictures(1000, size, channels)
    real = [encode_png(image, spec) for image in pictures]
    made = [encode_png(image, spec, png_text(f"syn-{i:020d}")) for i, image in enumerate(pictures)]
    hashes = [hashlib.sha256(data).hexdigest() for data in made]
    schema = shard_features(spec, CLASSES).arrow_schema
    n, per_shard, group = n_real + n_synthetic, 5000, 500
    names = [shard_name("train", number) for number in range(-(-n // per_shard))]
    (folder / "data").mkdir(parents=True)
    for number, name in enumerate(names):
        with _open_writer(folder / name, schema, png=True) as writer:
            for start in range(number * per_shard, min(n, (number + 1) * per_shard), group):
                rows = np.arange(start, min(start + group, n))
                synthetic = rows >= n_real
                images = [(made if s else real)[row % 1000] for row, s in zip(rows, synthetic, strict=True)]
                struct = pa.StructArray.from_arrays(
                    [pa.array(images, pa.binary()), pa.nulls(len(rows), pa.string())],
                    fields=list(schema.field("image").type),
                )
                ids = [f"syn-{row:020d}" if s else None for row, s in zip(rows, synthetic, strict=True)]
                source = [None if s else f"img-{row:020d}" for row, s in zip(rows, synthetic, strict=True)]
                labels = pa.array(_labels(rows, n_real, n_synthetic))
                columns = [
                    struct, labels, pa.array(synthetic), pa.array(ids, pa.string()), pa.array(source, pa.string()),
                ]  # fmt: skip
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(rows))
    rows = np.arange(n_real, n)
    labels = _labels(rows, n_real, n_synthetic)
    ranks = np.concatenate([np.arange((labels == label).sum()) for label in range(2)])
    values: dict[str, Any] = {
        "sample_id": [f"syn-{row:020d}" for row in rows],
        "content_hash": [hashes[row % 1000] for row in rows],
        "shard": [names[row // per_shard] for row in rows],
        "row": rows % per_shard,
        "label": labels,
        "class_name": [CLASSES[label] for label in labels],
        "class_index": ranks,
        "rank": ranks,
    }
    empty = {field.name: pa.nulls(len(rows), field.type) for field in MANIFEST_SCHEMA}
    table = pa.table(
        {name: pa.array(values[name], empty[name].type) if name in values else empty[name] for name in empty},
        schema=MANIFEST_SCHEMA,
    )
    pq.write_table(table, folder / MANIFEST_FILE, compression="zstd", write_page_checksum=True, row_group_size=5000)
    files = [*names, MANIFEST_FILE]
    counts = [
        np.bincount(_labels(part, n_real, n_synthetic), minlength=2).tolist() for part in (np.arange(n_real), rows)
    ]
    write_release_file(
        folder,
        {
            "format": 1,
            "classes": list(CLASSES),
            "pixels": spec.model_dump(mode="json"),
            "splits": {"train": {"n_rows": n, "n_real": counts[0], "n_synthetic": counts[1], "shards": names}},
            "manifest_digest": digest_file(folder / MANIFEST_FILE),
            "files": {
                name: {"size": (folder / name).stat().st_size, "sha256": digest_file(folder / name)} for name in files
            },
        },
    )


def _labels(rows: np.ndarray, n_real: int, n_synthetic: int) -> np.ndarray:
    """Real images in turn; synthetic ones by class, as a release has them."""
    return np.where(rows < n_real, rows % 2, (rows - n_real >= n_synthetic // 2).astype(np.int64))


def _pictures(n: int, size: int, channels: int) -> np.ndarray:
    import cv2

    random = np.random.default_rng(0)
    coarse = random.uniform(20, 235, (n, 5, 5, channels)).astype(np.float32)
    smooth = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in coarse])
    smooth = smooth.reshape(n, size, size, channels) + random.normal(0, 4, (n, size, size, channels))
    return np.clip(smooth, 0, 255).astype(np.uint8)


class Plain:
    """What one writes by hand over the real images of the release."""

    def __init__(self, release: Path, cache: Path, transform: Any) -> None:
        import datasets

        data = datasets.load_dataset("parquet", data_files=str(release / "data/*.parquet"), cache_dir=str(cache))
        synthetic = data["train"].with_format("numpy")["is_synthetic"]
        self._rows = data["train"].select(np.flatnonzero(~np.asarray(synthetic)))
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        row = self._rows[i]
        return _apply(self._transform, np.array(row["image"])), row["label"]


class InMemory:
    """The same without a file: encoded PNGs in a list."""

    def __init__(self, release: Path, transform: Any) -> None:
        import pyarrow.parquet as pq

        self._pngs: list[bytes] = []
        self._labels: list[int] = []
        for path in sorted((release / "data").glob("*.parquet")):
            table = pq.read_table(path, columns=["image", "label", "is_synthetic"])
            for image, label, synthetic in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                if not synthetic:
                    self._pngs.append(image["bytes"])
                    self._labels.append(label)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pngs)

    def __getitem__(self, i: int) -> Any:
        import cv2

        image = cv2.imdecode(np.frombuffer(self._pngs[i], np.uint8), cv2.IMREAD_UNCHANGED)
        if image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return _apply(self._transform, image), self._labels[i]


def _apply(transform: Any, image: np.ndarray) -> Any:
    import torch

    image = image if image.ndim == 3 else image[:, :, None]
    if transform is None:
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div(255)
    return transform(image=image)["image"]


def make_transform() -> Any:
    """Flip, shift and contrast, as in many a training."""
    import albumentations
    from albumentations.pytorch import ToTensorV2

    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Affine(translate_percent=0.05, rotate=10, p=1),
            albumentations.RandomBrightnessContrast(p=0.5),
            albumentations.Normalize(mean=0.5, std=0.25),
            ToTensorV2(),
        ]
    )


def rate(loader: Iterable[Any]) -> tuple[float, float]:
    """Images per second of one pass, and per second of processor time, that of the workers included."""
    before, start, n = sum(os.times()[:4]), time.perf_counter(), 0
    for _, labels in loader:
        n += len(labels)
    seconds = time.perf_counter() - start
    gc.collect()  # workers have ended, and count, when nothing holds their iterator
    return n / seconds, n / (sum(os.times()[:4]) - before)


def speed(folder: Path, images: int, size: int, channels: int, rounds: int) -> None:
    import torch
    from torch.utils.data import DataLoader

    from synthaug.loaders import balanced_loader

    torch.set_num_threads(1)
    release = folder / "release"
    write_release(release, images // 2, images // 2, size, channels)
    print(
        f"{images // 2} real and as many synthetic images of {size}×{size}×{channels}, {rounds} rounds, batches of 64"
    )
    print("| | | | by the clock | | by processor time | | |")
    print(
        "| transform | workers | plain, images/s | mix / plain | ratio 0 / plain | mix / plain | ratio 0 / plain | "
        "mix / memory |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for words, transform in (("none (to a tensor)", None), ("albumentations, 4 steps", make_transform())):
        plain, memory = Plain(release, folder / "cache", transform), InMemory(release, transform)
        for workers in (0, 1, 2):
            by_hand = {"batch_size": 64, "shuffle": True, "num_workers": workers}
            ours = {"batch_size": 64, "transform": transform, "num_workers": workers}
            contenders: dict[str, Callable[[], Iterable[Any]]] = {
                "plain": partial(DataLoader, plain, **by_hand),
                "memory": partial(DataLoader, memory, **by_hand),
                "mix": partial(balanced_loader, release, synthetic_ratio=1.0, **ours),
                "real": partial(balanced_loader, release, synthetic_ratio=0, **ours),
            }
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            for _ in range(rounds):
                for name, make in contenders.items():
                    rates[name].append(rate(make()))
            cells = [f"{statistics.median(x for x, _ in rates['plain']):,.0f}"]
            clock, processor = 0, 1
            for a, b, which in (
                ("mix", "plain", clock),
                ("real", "plain", clock),
                ("mix", "plain", processor),
                ("real", "plain", processor),
                ("mix", "memory", processor),
            ):
                ratios = [x[which] / y[which] for x, y in zip(rates[a], rates[b], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f}")
            print(f"| {words} | {workers} | {' | '.join(cells)} |", flush=True)


def start(release: Path) -> None:
    import albumentations  # noqa: F401
    import cv2  # noqa: F401
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    import synthaug.formats.shards
    import synthaug.loaders.loader  # noqa: F401
    from synthaug.loaders import balanced_loader

    before = _resident("VmRSS")
    # Has the kernel forget the peak of the imports, which would hide what comes now.
    Path("/proc/self/clear_refs").write_text("5")
    clock = time.perf_counter()
    loader = balanced_loader(release, batch_size=64, synthetic_ratio=1.0)
    seconds = time.perf_counter() - clock
    peak = _resident("VmHWM") - before
    clock = time.perf_counter()
    next(iter(loader))
    first = time.perf_counter() - clock
    more = _resident("VmHWM") - before
    print(json.dumps({"rows": len(loader.dataset), "seconds": seconds, "mib": peak, "first": first, "mib_first": more}))


def _resident(which: str) -> float:
    """Memory of this process in MiB, now (VmRSS) or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(which)).split()[1]) / 1024


def start_of(folder: Path, rows: int) -> None:
    release = folder / "release"
    write_release(release, rows // 2, rows // 2, 28, 1)
    n_bytes = sum(file.stat().st_size for file in release.rglob("*") if file.is_file())
    print(f"{rows:,} rows, {n_bytes / 2**20:,.0f} MiB on disk, five starts in processes of their own:")
    results = []
    for _ in range(5):
        ended = subprocess.run(
            [sys.executable, __file__, "--start-inner", str(release)], stdout=subprocess.PIPE, text=True, check=True
        )
        results.append(json.loads(ended.stdout))
    for name, words in (("seconds", "start, s"), ("mib", "memory, MiB"), ("first", "first batch, s")):
        values = sorted(item[name] for item in results)
        print(f"{words}: {statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})")
    print(f"memory with the first batch, MiB: {max(item['mib_first'] for item in results):.0f} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", type=int, metavar="ROWS", help="measure the start over so many rows instead")
    parser.add_argument("--start-inner", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start_inner is not None:
        start(arguments.start_inner)
        return
    with tempfile.TemporaryDirectory(prefix="loaders-") as folder:
        if arguments.start is not None:
            start_of(Path(folder), arguments.start)
        else:
            speed(Path(folder), arguments.images, arguments.size, arguments.channels, arguments.rounds)


if __name__ == "__main__":
    main()
