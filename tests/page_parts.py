"""Run folders for reports: every record and file of a job of any number of classes, made in milliseconds by no stage.

Images are squares of a shade of their own, so that each can be found in a page by its pixels.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from synthaug.digest import digest_json
from synthaug.records import (
    AUDIT_FILE,
    IMAGES_FILE,
    SPLITS_FILE,
    TRAINING_LOG_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    ClassMembership,
    ClassPlan,
    CopyRates,
    Interval,
    Judge,
    Membership,
    MembershipFigures,
    NearnessTest,
    PixelSpec,
    PlantedCopies,
    Release,
    SampleBatch,
    Source,
    Splits,
    StageRecord,
    Verdict,
)
from synthaug.workspace import open_workspace
from tests.verdict_parts import make_verdict

HOSTILE = (
    "<script>alert(1)</script>", "\"quoted' & <b>", "\u202eright to left\u202c", "x" * 200, "two\nlines", "",
    "{{ 7*7 }}", "-->", "شبكية", "javascript:alert(1)",
)  # fmt: skip
REASONS = (
    "not finite or constant image",
    "duplicate of a sample",
    "copy of a training image",
    "near-copy of a training image",
    "judged another class",
)
N_REAL, N_DRAWN, N_WANTED, N_REJECTED = 8, 20, 9, 2  # of a class; N_REJECTED for each reason
STAGES = ("read", "split", "plan", "train", "judge", "membership", "sample", "audit", "evaluate", "release")


class Run:
    """A run folder with its records; `until` names the last stage that is complete."""

    def __init__(
        self,
        output: Path,
        names: Sequence[str],
        *,
        size: int = 8,
        channels: int = 1,
        until: str = "release",
        verdict: bool | Verdict = True,
        membership: bool = True,
        heldout: bool = True,
        withhold: int | None = None,
    ) -> None:
        self.output, self.names, self.size, self.channels, self.heldout = output, tuple(names), size, channels, heldout
        n = len(self.names)
        # The first class is not raised, the last not real-poor: each has its own random pictures.
        random = np.random.default_rng(1)
        self.real = random.integers(0, 256, (n * N_REAL + 3, size, size, channels), dtype=np.uint8)
        self.samples = random.integers(0, 256, ((n - 1) * N_DRAWN, size, size, channels), dtype=np.uint8)
        self.withheld = withhold
        stages = STAGES[: STAGES.index(until) + 1]
        self.records: dict[str, StageRecord] = {}
        wanted = {
            "read": self._read, "split": self._split, "plan": self._plan, "train": self._train, "judge": self._judge,
            "membership": self._membership, "sample": self._sample, "audit": self._audit, "evaluate": self._evaluate,
            "release": self._release,
        }  # fmt: skip
        self._verdict = verdict
        with open_workspace(output) as workspace:
            self._workspace = workspace
            for name in stages:
                if (name == "evaluate" and verdict is False) or (name == "membership" and not membership):
                    continue
                wanted[name]()

    def _stage(self, name: str, title: str, values: type[StageRecord], made_from: Sequence[Any], make: Any) -> None:
        digest = digest_json([name, *made_from])
        done = self._workspace.stage(
            name, title, [name, 1, *made_from], values, lambda directory: make(directory, digest)
        )
        self.records[name] = done.record

    def _digests(self, *names: str) -> list[str]:
        return [self.records[name].digest for name in names if name in self.records]

    def _read(self) -> None:
        def make(directory: Path, digest: str) -> Source:
            np.save(directory / IMAGES_FILE, self.real)
            pixels = PixelSpec(
                channels=self.channels, dtype="uint8", colour="rgb" if self.channels == 3 else "grey", low=0, high=255,
                size=self.size, fit="none", interpolation="none", smallest=(8, 8), largest=(8, 8),
            )  # fmt: skip
            return Source(
                directory=directory, digest=digest, name="squares", fingerprint="f", classes=self.names, pixels=pixels,
                n_images=len(self.real), n_set_aside=1, set_aside_reasons={"truncated": 1}, n_duplicates=0,
                n_synthetic=0, licence="CC-BY-4.0", citation="Doe, J. (2020). Squares.",
            )  # fmt: skip

        self._stage("read", "read", Source, ["f", {"format": "parquet"}, {"size": self.size}], make)

    def _split(self) -> None:
        def make(directory: Path, digest: str) -> Splits:
            n = len(self.names)
            rows = np.arange(len(self.real))
            table = pd.DataFrame({"row": rows, "image_id": [f"real-{row}" for row in rows]})
            table["label"] = [*np.repeat(np.arange(n), N_REAL), 0, 0, 0]
            table["split"] = ["train"] * (n * N_REAL) + ["validation", "test", "train"]
            table["held_back"] = pd.Series([None] * (len(rows) - 1) + ["duplicate"], dtype="str")
            table.to_parquet(directory / SPLITS_FILE, index=False)
            counts = {"train": [N_REAL] * n, "validation": [1, *[0] * (n - 1)], "test": [1, *[0] * (n - 1)]}
            return Splits(
                directory=directory, digest=digest, method="by group", counts=counts, held_back={"duplicate": 1},
                n_groups=n,
            )  # fmt: skip

        self._stage("split", "split", Splits, [*self._digests("read"), {"exclude": []}], make)

    def _plan(self) -> None:
        def make(directory: Path, digest: str) -> BalancePlan:
            classes = [
                ClassPlan(label=label, name=name, n_real=N_REAL, n_target=N_REAL + (N_WANTED if label else 0))
                for label, name in enumerate(self.names)
            ]
            return BalancePlan(directory=directory, digest=digest, classes=tuple(classes))

        self._stage("plan", "plan", BalancePlan, [*self._digests("read", "split"), {"target_ratio": 1}], make)

    def _train(self) -> None:
        def make(directory: Path, digest: str) -> Checkpoint:
            log = ["phase,step,images,loss,heldout,learning_rate"]
            log += [
                f"{phase},{step},{start + 32 * step},{2 / step},{3 / step if self.heldout else ''},0.001"
                for phase, start in (("base", 0), ("fine-tuned", 320))
                for step in range(1, 11)
            ]
            (directory / TRAINING_LOG_FILE).write_text("\n".join(log) + "\n")
            losses = dict.fromkeys(self.names[1:], 0.5) if self.heldout else {}
            return Checkpoint(
                directory=directory, digest=digest, generator="edm", parameters=1000, images_budget=700,
                images_seen=640, budget_from="images", kept="base", heldout_loss_base=losses, heldout_loss_tuned=losses,
                scarce=list(self.names[1:]), stopped="the budget was used", seconds=12.5, images_per_second=51.2,
                device="cpu",
            )  # fmt: skip

        self._stage("train", "train", Checkpoint, [*self._digests("read", "split"), [1], {"images": 700}], make)

    def _judge(self) -> None:
        def make(directory: Path, digest: str) -> Judge:
            tests = [
                NearnessTest(
                    name=name, threshold=0.12, pooled=name is not None, n_heldout=30, n_groups=12, n_repeats=1,
                    alarms=2, alarm_rate=2 / 30, alarm_bounds=(0.01, 0.22),
                )
                for name in (None, *self.names)
            ]  # fmt: skip
            planted = (
                PlantedCopies(alteration="turned by 5 degrees", listed=True, n=40, n_caught=39, n_in_features=20),
                PlantedCopies(alteration="a half repeated", listed=False, n=40, n_caught=3, n_in_features=1),
            )
            return Judge(
                directory=directory, digest=digest, n_train=N_REAL * len(self.names),
                validation_balanced_accuracy=0.9 if self.heldout else None,
                near_copy_threshold=0.12 if self.heldout else None,
                near_copy_note="It rests on 30 held-out images." if self.heldout else "No image is held out.",
                near_copies=tuple(tests) if self.heldout else (), planted=planted if self.heldout else (),
                n_heldout=30 if self.heldout else 0, seconds=1.0,
            )  # fmt: skip

        self._stage("judge", "judge", Judge, [*self._digests("read", "split"), {"classifier_steps": 1}], make)

    def _membership(self) -> None:
        def make(directory: Path, digest: str) -> Membership:
            auc = Interval(estimate=0.55, low=0.48, high=0.62)
            values: dict[str, Any] = (
                {"auc": auc, "true_positive_rate": None, "control_auc": auc}
                if self.heldout
                else {"unavailable": "nothing is held out"}
            )
            classes = [
                ClassMembership(label=label, name=name, n_members=N_REAL, n_heldout=30, **values)
                for label, name in enumerate(self.names)
            ]
            return Membership(
                directory=directory, digest=digest, classes=tuple(classes), levels=(0.1, 0.4), draws=4,
                overall=MembershipFigures(n_members=80, n_heldout=30, **values), most_of_a_class=500, seconds=3.0,
            )  # fmt: skip

        self._stage("membership", "membership", Membership, [*self._digests("read", "split", "train")], make)

    def _sample(self) -> None:
        def make(directory: Path, digest: str) -> SampleBatch:
            np.save(directory / IMAGES_FILE, self.samples)
            return SampleBatch(
                directory=directory, digest=digest, checkpoint_digest=self.records["train"].digest,
                n_samples=len(self.samples), counts=dict.fromkeys(range(1, len(self.names)), N_DRAWN),
                solver="heun", steps=20, guidance=1.5, micro_batch=10, threads=1, device="cpu", seconds=4.0,
                environment=dict.fromkeys(("torch", "diffusers", "numpy", "cpu_capability"), "x"),
            )  # fmt: skip

        self._stage("sample", "sample round 1", SampleBatch, [*self._digests("read", "train"), {"steps": 20}], make)

    def _audit(self) -> None:
        def make(directory: Path, digest: str) -> AuditReport:
            reasons = [reason for reason in REASONS for _ in range(N_REJECTED)]
            reasons_of = [*reasons, *[None] * (N_DRAWN - len(reasons))]
            n = len(self.names)
            table = pd.DataFrame({"label": np.repeat(np.arange(1, n), N_DRAWN)})
            table["row"], table["batch"] = table.index, 0
            table["sample_id"] = [f"syn-{row}" for row in table.index]
            table["class_index"] = table.groupby("label").cumcount()
            table["reason"] = pd.Series(reasons_of * (n - 1), dtype="str")
            table["accepted"] = table["reason"].isna()
            table["rank"] = table[table["accepted"]].groupby("label").cumcount()
            table["rank"] = table["rank"].fillna(-1).astype("int64")
            table = table.assign(probability=0.5, predicted=0, distance=0.05, distance_ratio=0.2)
            table["nearest_id"] = [f"real-{label * N_REAL + index % N_REAL}" for label, index in zip(
                table["label"], table["class_index"], strict=True)]  # fmt: skip
            table.to_parquet(directory / AUDIT_FILE)
            accepted = N_DRAWN - len(reasons)
            classes = [
                ClassAudit(
                    label=label, name=name, n_wanted=N_WANTED if label else 0, n_candidates=N_DRAWN if label else 0,
                    n_accepted=accepted if label else 0, n_missing=0, coverage=0.7 if label else None,
                    rejected=dict.fromkeys(REASONS, N_REJECTED) if label else {},
                    coverage_expected=0.9 if label else None,
                    copies=CopyRates(
                        n=N_DRAWN, n_exact=2, n_near=4, near_bounds=(0.06, 0.44), n_low_ratio=4, n_in_features=None,
                        n_accepted=accepted, accepted_low_ratio=0, accepted_in_features=None,
                    ) if label else None,
                    withheld="it covers too little" if label == self.withheld else None,
                )
                for label, name in enumerate(self.names)
            ]  # fmt: skip
            return AuditReport(directory=directory, digest=digest, classes=tuple(classes), notes=("A note.",))

        made_from = self._digests("read", "split", "plan", "train", "judge", "sample")
        self._stage("audit", "audit round 1", AuditReport, [*made_from, {"planted": 1}], make)

    def _evaluate(self) -> None:
        def make(directory: Path, digest: str) -> Verdict:
            verdict = self._verdict if isinstance(self._verdict, Verdict) else make_verdict(names=list(self.names))
            return verdict.model_copy(update={"directory": directory, "digest": digest})

        made_from = self._digests("read", "split", "plan", "train", "judge", "sample", "audit")
        self._stage("evaluate", "evaluate", Verdict, [*made_from, {"minutes": 10}], make)

    def _release(self) -> None:
        made_from = self._digests("read", "split", "plan", "train", "judge", "sample", "audit")
        made_from += self._digests("evaluate") or ["not evaluated"]
        config = {"name": "squares", "dataset": {"licence": None, "citation": None}, "release": {"title": None}}

        def make(directory: Path, digest: str) -> Release:
            folder = self.output / "releases" / digest[:12]
            folder.mkdir(parents=True)
            return Release(
                directory=folder, digest=digest, n_real={}, n_synthetic={}, n_short={}, manifest_digest="d" * 64,
            )  # fmt: skip

        self._stage("release", "release", Release, [*made_from, *self._digests("membership"), config], make)
        self._workspace.point_at("release", self.records["release"].directory)

    def values(self) -> dict[str, Any]:
        """The records as `PageFacts` names them."""
        get = self.records.get
        return {
            "source": get("read"), "splits": get("split"), "plan": get("plan"), "checkpoint": get("train"),
            "judge": get("judge"), "membership": get("membership"), "report": get("audit"), "verdict": get("evaluate"),
            "batches": tuple(self.records[name] for name in ("sample",) if name in self.records),
        }  # fmt: skip


class Page(HTMLParser):
    """A page, held against what HTML asks for while it is read: every element is closed, in its order."""

    EMPTY = ("meta", "img", "input", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        self.wrong += [f"{tag}: {name} twice" for name in set(names) if names.count(name) > 1]
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"closed out of order: {tag} at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def said(self) -> str:
        """All text, spaces made one."""
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[np.ndarray]:
        """The pixels of every image, [side, side] or [side, side, 3]."""
        found = []
        for image in self.named("img"):
            head, _, data = str(image["src"]).partition(",")
            assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                found.append(np.asarray(picture))
        return found


def shown(page: Page, images: np.ndarray) -> list[int]:
    """Which of the images [n, side, side, channels] stand on the page, pixel for pixel."""
    there = {picture.tobytes() for picture in page.pictures()}
    return [k for k, image in enumerate(images) if image.tobytes() in there]
