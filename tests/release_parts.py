"""Everything that a release is made of, built by hand: real digits, and digits with noise as pretended samples."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from synthaug.config import Config, parse_config
from synthaug.digest import digest_array, digest_file, digest_json
from synthaug.formats.samples import read_samples
from synthaug.records import (
    AUDIT_FILE,
    IMAGES_FILE,
    INDEX_FILE,
    PIPELINE_DIR,
    SAMPLES_FILE,
    SEEN_FILE,
    SPLITS_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    ClassPlan,
    CopyRates,
    Judge,
    Membership,
    PixelSpec,
    PlantedCopies,
    Release,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)

SIZE = 8
N_REAL = {"train": (30, 12, 8), "validation": (4, 4, 4), "test": (5, 5, 5)}
CLASSES = ("zero", "one", "two")
MICRO_BATCH = 10
_VERSIONS = ("torch", "diffusers", "numpy", "cpu_capability")
_SPECS: dict[str, dict[str, Any]] = {
    "grey8": {"channels": 1, "dtype": "uint8", "colour": "grey", "low": 0, "high": 255},
    "rgb8": {"channels": 3, "dtype": "uint8", "colour": "rgb", "low": 0, "high": 255},
    "grey16": {"channels": 1, "dtype": "uint16", "colour": "grey", "low": 0, "high": 65535},
    "rgb16": {"channels": 3, "dtype": "uint16", "colour": "rgb", "low": 0, "high": 65535},
    "channels": {"channels": 5, "dtype": "uint16", "colour": "channels", "low": 0, "high": 65535},
    "float": {"channels": 1, "dtype": "float32", "colour": "channels", "low": -1.5, "high": 3.0},
}


@dataclass(frozen=True)
class Parts:
    """The arguments of `release`, but for its directory."""

    config: Config
    source: Source
    splits: Splits
    plan: BalancePlan
    checkpoint: Checkpoint
    judge: Judge
    batches: tuple[SampleBatch, ...]
    report: AuditReport
    images: np.ndarray  # the real ones
    drawn: tuple[np.ndarray, ...]  # per batch
    earlier: tuple[Checkpoint, ...] = ()  # whose samples are in the batches too, oldest first
    memberships: tuple[Membership, ...] = ()

    def release(
        self,
        directory: Path,
        *,
        draw_sheet: bool = False,
        verdict: Verdict | None = None,
        previous: Path | None = None,
        **settings: Any,
    ) -> Release:
        """Make the release; `settings` take the place of those of the section release."""
        from synthaug.release import release

        config = self.config
        if settings:
            config = config.model_copy(update={"release": config.release.model_copy(update=settings)})
        directory.mkdir(parents=True)
        with nullcontext() if draw_sheet else plain_contact_sheet():
            return release(
                config, self.source, self.splits, self.plan, [*self.earlier, self.checkpoint], self.judge,
                self.batches, self.report, verdict, directory, memberships=self.memberships,
                previous=previous,
            )  # fmt: skip


@contextmanager
def plain_contact_sheet() -> Iterator[None]:
    """Keep the drawing of pictures out of tests that are not about them."""
    name = "synthaug.report.contact_sheet"
    kept = sys.modules.get(name)
    stand_in = ModuleType(name)

    def write_contact_sheet(source: Any, splits: Any, batches: Any, report: Any, path: Path, **_: Any) -> Path:
        path.write_bytes(b"\x89PNG pretended " * 50)
        return path

    stand_in.write_contact_sheet = write_contact_sheet  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if kept is None:
            del sys.modules[name]
        else:
            sys.modules[name] = kept


def make_parts(
    folder: Path,
    pixels: str = "grey8",
    classes: Sequence[str] = CLASSES,
    wanted: Sequence[int] = (0, 18, 22),
    withhold: int | None = None,
    **dataset: Any,
) -> Parts:
    """Build every input of a release below `folder`: 50 real training images and two rounds of samples."""
    classes = tuple(classes)
    spec = PixelSpec(
        **_SPECS[pixels], size=SIZE, fit="none", interpolation="none", smallest=(SIZE, SIZE), largest=(SIZE, SIZE)
    )
    source, splits, images = _real(folder, spec, classes)
    plan = BalancePlan(
        directory=_made(folder / "plan"),
        digest=digest_json(["plan", list(wanted)]),
        classes=tuple(
            ClassPlan(label=label, name=name, n_real=N_REAL["train"][label], n_target=N_REAL["train"][label] + n)
            for label, (name, n) in enumerate(zip(classes, wanted, strict=True))
        ),
    )
    checkpoint = _checkpoint(folder / "checkpoint", classes)
    seen_by(splits).to_parquet(checkpoint.directory / SEEN_FILE, index=False)
    batches, drawn = zip(*(_batch(folder, spec, checkpoint, images, number) for number in range(2)), strict=True)
    report = _report(folder / "audit", plan, batches, withhold)
    judge = Judge(
        directory=_made(folder / "judge"), digest=digest_json("judge"), n_train=50, validation_balanced_accuracy=0.9375,
        near_copy_threshold=0.1, near_copy_note="The threshold rests on 12 held-out real images.", n_heldout=12,
        seconds=1.0, planted=(
            PlantedCopies(alteration="exact", listed=True, n=50, n_caught=50, n_in_features=50),
            PlantedCopies(alteration="JPEG of quality 75", listed=True, n=50, n_caught=48, n_in_features=40),
            PlantedCopies(alteration="gamma 1.4", listed=False, n=50, n_caught=30, n_in_features=0),
        ),
    )  # fmt: skip
    config = parse_config(
        {
            "name": "digits-test",
            "output": str(folder / "run"),
            "dataset": {"format": "parquet", "path": str(folder / "source"), "licence": "CC-BY-4.0", **dataset},
            "image": {"size": SIZE},
            "sample": {"micro_batch": MICRO_BATCH},
            "release": {"images_per_shard": 40},
        }
    )
    return Parts(config, source, splits, plan, checkpoint, judge, batches, report, images, drawn)


def make_grown_parts(folder: Path, classes: Sequence[str] = CLASSES) -> Parts:
    """The same after a job that grew: class 0 was not there before, so the first checkpoint has classes 1 and 2 as 0
    and 1; of its samples those of class 1 are kept, class 2 was drawn again from a checkpoint that started from it."""
    parts = make_parts(folder, classes=classes)
    old = _checkpoint(folder / "earlier", parts.source.classes).model_copy(
        update={"digest": digest_json("earlier checkpoint"), "parameters": 1234}
    )
    new = parts.checkpoint.model_copy(update={"started_from": old.digest})
    seen_by(parts.splits, {"train": 13, "validation": 4}).to_parquet(old.directory / SEEN_FILE, index=False)
    spec, images, kept = parts.source.pixels, parts.images, []
    for number in range(2):
        batch, pixels = _batch(folder / "before", spec, old, images, number, labels={1: 0, 2: 1})
        settings = {
            "steps": 11,
            "guidance": 2.5,
            "threads": 1,
            "job_seed": 5,
            "environment": dict.fromkeys(_VERSIONS, "y"),
        }
        kept.append(
            (batch.model_copy(update={"digest": digest_json(["before", number]), **settings}).only({0: 1}), pixels)
        )
    again = [(batch.only({2: 2}), pixels) for batch, pixels in zip(parts.batches, parts.drawn, strict=True)]
    batches, drawn = zip(*kept, *again, strict=True)
    report = _report(folder / "audit-grown", parts.plan, batches, None)
    report = report.model_copy(update={"digest": digest_json("grown audit")})
    return replace(parts, checkpoint=new, earlier=(old,), batches=batches, drawn=drawn, report=report)


def make_unlearned_parts(folder: Path) -> Parts:
    """The same after a job whose common class grew: nothing was trained, and the checkpoint has seen 41 of the 50."""
    parts = make_parts(folder)
    seen_by(parts.splits, {"train": 41, "validation": 12}).to_parquet(
        parts.checkpoint.directory / SEEN_FILE, index=False
    )
    return parts


def seen_by(splits: Splits, first: Mapping[str, int] | None = None) -> pd.DataFrame:
    """What a checkpoint that was trained on the splits has seen, or on the first images of them."""
    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    table = table[table["held_back"].isna() & table["split"].isin(["train", "validation"])]
    if first is not None:
        table = pd.concat([table[table["split"] == use].head(n) for use, n in first.items()])
    return table.rename(columns={"split": "use"})[["image_id", "use"]]


def hub_cache(release: Path, cache: Path) -> Path:
    """A release as `huggingface_hub.snapshot_download` lays it down: relative links into a folder of contents."""
    repository = cache / "datasets--clinic--digits"
    snapshot = repository / "snapshots" / ("c" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    (release / ".gitattributes").write_text("*.parquet filter=lfs\n")
    for file in sorted(file for file in release.rglob("*") if file.is_file()):
        blob = repository / "blobs" / digest_file(file)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(release)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float64) / 16, digits.target


def _native(unit: np.ndarray, spec: PixelSpec, random: np.random.Generator) -> np.ndarray:
    """[n, 8, 8] in 0..1 to native values, each channel its own, all 16 bits in use."""
    weights = np.linspace(1, 0.4, spec.channels)
    values = np.clip(unit[..., None] * weights + random.uniform(0, 0.01, (*unit.shape, spec.channels)), 0, 1)
    return spec.from_unit(values * 2 - 1)


def _real(folder: Path, spec: PixelSpec, classes: tuple[str, ...]) -> tuple[Source, Splits, np.ndarray]:
    random = np.random.default_rng(7)
    units, targets = _digits()
    rows: list[dict[str, Any]] = []
    chosen = []
    for label in range(len(classes)):
        mine = np.flatnonzero(targets == label)
        start = 0
        for split, counts in N_REAL.items():
            for index in mine[start : start + counts[label]]:
                chosen.append(index)
                rows.append({"label": label, "split": split, "held_back": None})
            start += counts[label]
        # One more of each class that must not come out.
        chosen.append(mine[start])
        rows.append({"label": label, "split": "train", "held_back": ("cut", "synthetic", "duplicate")[label]})
    order = random.permutation(len(rows))
    images = _native(units[np.array(chosen)[order]], spec, random)
    table = pd.DataFrame([rows[i] for i in order])
    table.insert(0, "row", np.arange(len(table), dtype=np.int64))
    table.insert(1, "image_id", [f"real-{digest_array(image)[:12]}" for image in images])
    source_dir, splits_dir = _made(folder / "read"), _made(folder / "split")
    np.save(source_dir / IMAGES_FILE, images)
    table.assign(group_key=table["image_id"]).to_parquet(splits_dir / SPLITS_FILE, index=False)
    index = table.drop(columns=["split", "held_back"])
    index = index.assign(group=None, given_split=None, content_hash=table["image_id"], origin="x")
    index.assign(is_synthetic=table["held_back"] == "synthetic").to_parquet(source_dir / INDEX_FILE, index=False)
    source = Source(
        directory=source_dir, digest=digest_json(["read", spec.dtype]), name=f"parquet files in {folder / 'source'}",
        fingerprint="f", classes=classes, pixels=spec, n_images=len(table), n_set_aside=1,
        set_aside_reasons={"truncated": 1}, n_duplicates=1, n_synthetic=1,
    )  # fmt: skip
    splits = Splits(
        directory=splits_dir, digest=digest_json("split"), method="by near-duplicate cluster",
        counts={split: list(counts) for split, counts in N_REAL.items()}, held_back={"cut": 1}, n_groups=len(table),
    )  # fmt: skip
    return source, splits, images


def _checkpoint(directory: Path, classes: tuple[str, ...]) -> Checkpoint:
    pipeline = _made(directory / PIPELINE_DIR)
    (pipeline / "model_index.json").write_text("{}\n")
    (_made(pipeline / "unet") / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
    return Checkpoint(
        directory=directory, digest=digest_json("checkpoint"), generator="edm", parameters=123456, images_budget=5000,
        images_seen=4096, budget_from="images", kept="fine-tuned",
        heldout_loss_base={classes[1]: 0.25, classes[2]: 0.5},
        heldout_loss_tuned={classes[1]: 0.125, classes[2]: 0.375},
        scarce=list(classes[1:3]), stopped="budget",
        seconds=1.0, images_per_second=1.0, device="cpu",
    )  # fmt: skip


def _batch(
    folder: Path,
    spec: PixelSpec,
    checkpoint: Checkpoint,
    real: np.ndarray,
    number: int,
    labels: Mapping[int, int] | None = None,
) -> tuple[SampleBatch, np.ndarray]:
    """A round of samples of the digits 1 and 2, under the labels that the generator has for them."""
    random = np.random.default_rng(100 + number)
    units, targets = _digits()
    count, first = (20, 0) if number == 0 else (10, 20)
    rows, parts = [], []
    for label in (1, 2):
        mine = units[targets == label][first : first + count]
        parts.append(_native(np.clip(mine + random.normal(0, 0.05, mine.shape), 0, 1), spec, random))
        for index in range(first, first + count):
            rows.append(
                {
                    "row": len(rows),
                    "sample_id": f"syn-{digest_json([label, index, *([checkpoint.digest] if labels else [])])[:20]}",
                    "label": (labels or {}).get(label, label),
                    "class_index": index,
                    "seed": 2**62 + label * 1000 + index,
                    "micro_batch": index // MICRO_BATCH,
                    "position": index % MICRO_BATCH,
                }
            )
    directory = _made(folder / f"sample-{number}")
    drawn = np.concatenate(parts)
    np.save(directory / IMAGES_FILE, drawn)
    pd.DataFrame(rows).to_parquet(directory / SAMPLES_FILE, index=False)
    batch = SampleBatch(
        environment=dict.fromkeys(_VERSIONS, "x"),
        directory=directory, digest=digest_json(["sample", number]), checkpoint_digest=checkpoint.digest,
        n_samples=len(rows), counts={(labels or {}).get(label, label): count for label in (1, 2)},
        solver="dpm++ 2m", steps=20, guidance=1.5,
        micro_batch=MICRO_BATCH, threads=2, device="cpu", seconds=float(number),
    )  # fmt: skip
    return batch, drawn


def _report(directory: Path, plan: BalancePlan, batches: Sequence[SampleBatch], withhold: int | None) -> AuditReport:
    """Every seventh sample is refused; the others are accepted, more of them than the plan wants for class 1."""
    tables = [read_samples(batch).assign(batch=number) for number, batch in enumerate(batches)]
    table = pd.concat(tables).sort_values(["label", "class_index"], ignore_index=True)
    table["accepted"] = table["class_index"] % 7 != 3
    table["reason"] = np.where(table["accepted"], None, "another class")
    table["rank"] = (table["accepted"].groupby(table["label"]).cumsum() - 1).where(table["accepted"], -1)
    table["probability"] = 0.5 + table["class_index"] / 100
    table["predicted"] = table["label"]
    table["distance"] = 0.25
    table["distance_ratio"] = np.where(table["class_index"] == 0, np.nan, 0.75)
    table["nearest_id"] = "real-secret"
    columns = ["seed", "micro_batch", "position"]
    table.drop(columns=columns).to_parquet(_made(directory) / AUDIT_FILE, index=False)
    accepted = table.groupby("label")["accepted"].agg(["size", "sum"])
    audits = []
    for item in plan.classes:
        drawn, passed = (int(n) for n in accepted.loc[item.label]) if item.label in accepted.index else (0, 0)
        audits.append(
            ClassAudit(
                label=item.label, name=item.name, n_wanted=item.n_synthetic, n_candidates=drawn, n_accepted=passed,
                n_missing=max(0, item.n_synthetic - passed), coverage=0.8 if drawn else None,
                rejected={"another class": drawn - passed} if drawn else {}, coverage_expected=0.9 if drawn else None,
                copies=CopyRates(
                    n=drawn, n_exact=1, n_near=2, near_bounds=(0.01, 0.2), n_low_ratio=3, n_in_features=4,
                    n_accepted=passed, accepted_low_ratio=1, accepted_in_features=2,
                ) if drawn else None,
                withheld="its samples cover too little of the class" if item.label == withhold else None,
            )
        )  # fmt: skip
    digest = digest_json(["audit", withhold])
    return AuditReport(directory=directory, digest=digest, classes=tuple(audits), notes=("Planted copies: 12 of 12.",))


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
