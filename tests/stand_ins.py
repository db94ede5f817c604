"""Stand-ins for the stages: the signatures of docs/design.md, a few bytes of work.

The order of the stages, reuse, interruption and exit codes are tested with these in milliseconds; slow tests
run the real job. `install()` puts them in place of the modules before the pipeline imports them.

`python -m tests.stand_ins run configs/x.yaml` is the command line with stand-ins. The variable
SYNTHAUG_STAND_IN makes a stage misbehave: "train:sleep" (prints "train sleeps" and waits), "train:fail",
"train:full" (a full disk), "train:oops" (a fault of the program).
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from synthaug.digest import digest_json
from synthaug.errors import TrainingError
from synthaug.records import (
    AUDIT_FILE,
    MEMBERSHIP_FILE,
    VERDICT_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    ClassAudit,
    Judge,
    Membership,
    MembershipFigures,
    PixelSpec,
    Release,
    SampleBatch,
    SampleRequest,
    Source,
    Splits,
    Verdict,
)

NAMES = ("read", "split", "train", "judge", "membership", "sample", "adopt", "audit", "evaluate", "release")
CLASSES = ("cat", "dog", "lynx\n[red]")
REAL = [40, 30, 10]

# Every call of a stand-in, by name; a test clears and reads it.
calls: list[str] = []
# Half of all candidates pass.
ACCEPTED_SHARE = 0.5


def read(config: Any, directory: Path, *, foreign: bool = False) -> Source:
    _begin("read", directory)
    pixels = PixelSpec(
        channels=1, dtype="uint8", colour="grey", low=0, high=255, size=8, fit="none", interpolation="none",
        smallest=(8, 8), largest=(8, 8),
    )  # fmt: skip
    return Source(
        directory=directory, digest=digest_json(["read", config.image.size, foreign]), name="stand-ins",
        fingerprint="f", classes=CLASSES, pixels=pixels, n_images=80, n_set_aside=1, set_aside_reasons={"truncated": 1},
        n_duplicates=0, n_synthetic=0,
    )  # fmt: skip


def split(config: Any, source: Source, directory: Path) -> Splits:
    _begin("split", directory)
    counts = {"train": REAL, "validation": [5, 5, 5], "test": [5, 5, 5]}
    digest = digest_json(["split", source.digest, config.split.seed])
    return Splits(directory=directory, digest=digest, method="by group", counts=counts, held_back={}, n_groups=80)


def train(config: Any, source: Source, splits: Splits, plan: BalancePlan, directory: Path) -> Checkpoint:
    _begin("train", directory)
    return Checkpoint(
        directory=directory, digest=digest_json(["train", splits.digest, config.train.images]), generator="edm",
        parameters=1, images_budget=1, images_seen=1, budget_from="images", kept="base", heldout_loss_base={},
        heldout_loss_tuned={}, scarce=[], stopped="budget", seconds=0.0, images_per_second=1.0, device="cpu",
    )  # fmt: skip


def judge(config: Any, source: Source, splits: Splits, directory: Path) -> Judge:
    _begin("judge", directory)
    return Judge(
        directory=directory, digest=digest_json(["judge", splits.digest]), n_train=80,
        validation_balanced_accuracy=None, near_copy_threshold=None, near_copy_note="", n_heldout=0, seconds=0.0,
    )  # fmt: skip


def membership(
    config: Any, source: Source, splits: Splits, checkpoint: Checkpoint, directory: Path
) -> Membership:  # fmt: skip
    _begin("membership", directory)
    found = Membership(
        directory=directory, digest=digest_json(["membership", checkpoint.digest]), classes=(), levels=(), draws=0,
        overall=MembershipFigures(n_members=80, n_heldout=0, unavailable="stand-ins tell nothing"), most_of_a_class=0,
        seconds=0.0,
    )  # fmt: skip
    (directory / MEMBERSHIP_FILE).write_text(found.model_dump_json(), encoding="utf-8")
    return found


def sample(
    config: Any, source: Source, checkpoint: Checkpoint, request: SampleRequest, directory: Path,
    *, map_shards: Any = None,
) -> SampleBatch:  # fmt: skip
    _begin("sample", directory)
    ranges = {label: list(value) for label, value in request.ranges.items()}
    counts = {label: number for label, (_start, number) in request.ranges.items()}
    return SampleBatch(
        environment=dict.fromkeys(("torch", "diffusers", "numpy", "cpu_capability"), "x"),
        directory=directory, digest=digest_json(["sample", checkpoint.digest, config.sample.guidance, str(ranges)]),
        checkpoint_digest=checkpoint.digest, n_samples=sum(counts.values()), counts=counts, solver="none", steps=1,
        guidance=1.0, micro_batch=config.sample.micro_batch, threads=1, device="cpu", seconds=0.0,
    )  # fmt: skip


def adopt(config: Any, source: Source, splits: Splits, foreign: Source, directory: Path) -> SampleBatch:
    _begin("adopt", directory)
    return SampleBatch(
        environment={}, directory=directory, digest=digest_json(["adopt", foreign.digest]), checkpoint_digest="",
        n_samples=20, counts={2: 20}, solver="none", steps=0, guidance=0.0, micro_batch=0, threads=1, device="none",
        seconds=0.0,
    )  # fmt: skip


def audit(
    config: Any, source: Source, splits: Splits, plan: BalancePlan, checkpoints: Sequence[Checkpoint], judge: Judge,
    batches: Sequence[SampleBatch], directory: Path, *, map_shards: Any = None,
) -> AuditReport:  # fmt: skip
    _begin("audit", directory)
    classes = []
    for item in plan.classes:
        drawn = sum(batch.counts.get(item.label, 0) for batch in batches)
        accepted = int(drawn * ACCEPTED_SHARE)
        missing = max(0, item.n_synthetic - accepted)
        classes.append(
            ClassAudit(
                label=item.label,
                name=item.name,
                n_wanted=item.n_synthetic,
                n_candidates=drawn,
                n_accepted=accepted,
                n_missing=missing,
                rejected={},
                coverage=None,
                coverage_expected=None,
            )
        )
    (directory / AUDIT_FILE).write_bytes(b"table")
    digest = digest_json(["audit", [batch.digest for batch in batches]])
    return AuditReport(directory=directory, digest=digest, classes=tuple(classes), notes=("stand-ins judged",))


def evaluate(
    config: Any, source: Source, splits: Splits, plan: BalancePlan, checkpoints: Sequence[Checkpoint], judge: Judge,
    batches: Sequence[SampleBatch], report: AuditReport | None, directory: Path,
) -> Verdict:  # fmt: skip
    _begin("evaluate", directory)
    outcome = os.environ.get("SYNTHAUG_STAND_IN_VERDICT", "no evidence")
    verdict = Verdict(
        directory=directory, digest=digest_json(["evaluate", [batch.digest for batch in batches], outcome]),
        outcome=outcome, sentence=f"{outcome}: stand-ins were tried.", reasons=(), metric=config.evaluate.metric,
    )  # fmt: skip
    (directory / VERDICT_FILE).write_text(verdict.model_dump_json(), encoding="utf-8")
    (directory / "verdict_gain.png").write_bytes(b"picture")
    return verdict


def release(
    config: Any, source: Source, splits: Splits, plan: BalancePlan, checkpoints: Sequence[Checkpoint], judge: Judge,
    batches: Sequence[SampleBatch], report: AuditReport, verdict: Verdict | None, directory: Path,
    *, memberships: Sequence[Membership] = (), previous: Path | None = None,
) -> Release:  # fmt: skip
    _begin("release", directory)
    digest = digest_json(["release", report.digest, verdict.digest if verdict else None])
    return Release(
        directory=directory, digest=digest, n_real=dict(zip(CLASSES, REAL, strict=True)),
        n_synthetic={item.name: item.n_wanted - item.n_missing for item in report.classes},
        n_short={item.name: item.n_missing for item in report.classes}, manifest_digest=digest,
    )  # fmt: skip


def is_whole(release: Path) -> Any:
    """A release of the stand-ins is intact while its one file has its length."""
    file = release / "release.bin"
    return SimpleNamespace(ok=file.is_file() and file.stat().st_size == 1000)


def write_sheet(source: Any, splits: Any, batches: Any, report: Any, path: Path) -> Path:
    path.write_bytes(b"picture of " + report.digest.encode())
    return path


def install(replace: Callable[[str, ModuleType], Any] = sys.modules.__setitem__) -> None:
    """Put the stand-ins where the pipeline looks for stages."""
    for name in NAMES:
        module = ModuleType(f"synthaug.{name}")
        setattr(module, name, globals()[name])
        replace(f"synthaug.{name}", module)
    sys.modules["synthaug.read"].source_fingerprint = lambda config: "f"  # type: ignore[attr-defined]
    sys.modules["synthaug.audit"].too_many_copies = lambda config, report: None  # type: ignore[attr-defined]
    sys.modules["synthaug.train"].base_identity = lambda settings: None  # type: ignore[attr-defined]
    sys.modules["synthaug.membership"].refuse_membership = lambda *_: None  # type: ignore[attr-defined]
    judged = sys.modules["synthaug.evaluate"]
    judged.check_evaluation = lambda config, source=None: None  # type: ignore[attr-defined]
    judged.code_identity = lambda config: []  # type: ignore[attr-defined]
    sys.modules["synthaug.adopt"].foreign_config = lambda config, samples: config  # type: ignore[attr-defined]
    verifying = ModuleType("synthaug.verify")
    verifying.verify = is_whole  # type: ignore[attr-defined]
    replace("synthaug.verify", verifying)
    for name in ("contact_sheet", "rejected_sheet"):
        sheet = ModuleType(f"synthaug.report.{name}")
        setattr(sheet, f"write_{name}", write_sheet)
        replace(f"synthaug.report.{name}", sheet)
    from synthaug.report import page_pictures

    # The stages of the stand-ins hold no images; the page itself is the real one.
    without = ModuleType(page_pictures.__name__)
    without.__dict__.update(vars(page_pictures))
    without.page_pictures = lambda *_, **__: page_pictures.PagePictures()  # type: ignore[attr-defined]
    replace(page_pictures.__name__, without)


def _begin(name: str, directory: Path) -> None:
    calls.append(name)
    (directory / f"{name}.bin").write_bytes(b"x" * 1000)
    stage, _, what = os.environ.get("SYNTHAUG_STAND_IN", "").partition(":")
    if stage != name:
        return
    if what == "sleep":
        sys.stderr.write(f"{name} sleeps\n")
        sys.stderr.flush()
        time.sleep(60)
    elif what == "fail":
        raise TrainingError(f"{name} broke down")
    elif what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    elif what == "oops":
        raise ZeroDivisionError(f"in\nstage {name}")


if __name__ == "__main__":
    # Under `python -m` this file is `__main__`; the pipeline must meet one copy only.
    from tests import stand_ins

    stand_ins.install()
    if sys.argv[1] == "flow":
        from flows.augment import main as flow_main

        flow_main(sys.argv[2:])
    else:
        from synthaug.cli import main

        main()
