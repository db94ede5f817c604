"""The order of the stages, written once. The command line and the Prefect flow both take it from here.

A stage is known by the digest of all it is made from: what came before it, its part of the configuration
and the version of its code. What is complete under that digest is reused.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import OutputError, PlanError, ReleaseError
from synthaug.growth import (
    Generation,
    Origin,
    Pinned,
    Released,
    Round,
    generation_of,
    is_whole,
    made_from,
    may_grow,
    only_for,
    remember,
    shares,
    told,
    warm_start,
)
from synthaug.records import (
    AUDIT_FILE,
    MEMBERSHIP_FILE,
    PIPELINE_DIR,
    VERDICT_FILE,
    AuditReport,
    BalancePlan,
    Checkpoint,
    Judge,
    Membership,
    Release,
    SampleBatch,
    SampleRequest,
    Source,
    Splits,
    StageRecord,
    Verdict,
)
from synthaug.scale import MapShards, one_by_one, refuse_runner
from synthaug.stage_keys import CODE_VERSIONS, Part, key_part, names_of_parts, plain, sample_settings, train_settings
from synthaug.summaries import AuditSummary, PlanSummary, RunSummary, VerdictSummary
from synthaug.workspace import Done, Workspace, open_workspace

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=StageRecord)

# Pictures for the run folder: real beside synthetic, and what the audit turned away.
CONTACT_SHEET_FILE = "contact_sheet.png"
REJECTED_SHEET_FILE = "rejected.png"


class RunStage(Protocol):
    """How a stage is run: called with its title ("sample round 1") and the work, whose result it returns."""

    def __call__(self, title: str, work: Callable[[], Done[R]]) -> Done[R]: ...


def call_directly(title: str, work: Callable[[], Done[R]]) -> Done[R]:
    """Run a stage here and now."""
    return work()


def plan_only(config: Config, *, run_stage: RunStage = call_directly) -> PlanSummary:
    """Read, split and plan; train nothing."""
    with _job(config, run_stage, one_by_one) as job:
        source, splits, plan = job.prepare()
        return PlanSummary(
            run=job.workspace.output,
            dataset=source.name,
            plan=plan,
            splits=splits.counts,
            set_aside=source.set_aside_reasons,
            held_back=splits.held_back,
        )


def augment(config: Config, *, run_stage: RunStage = call_directly, map_shards: MapShards | None = None) -> RunSummary:
    """Run the whole job: from the dataset that the configuration names to a balanced release.

    Args:
        run_stage: Runs each stage; where it is.
        map_shards: Has the shards of sampling and audit computed, as `config.scale` says. None: nobody is there but
            this process, and a configuration that asks for workers is refused.

    Raises:
        SynthaugError: What a user can meet; see `synthaug.errors`.
    """

    if config.release.push is not None:
        from synthaug.formats.hub import check_push_allowed

        check_push_allowed(config)
    with _job(config, run_stage, map_shards) as job:
        made = job.make()
        job.refuse_copies(made)
        job.refuse_membership(made)
        verdict = job.evaluate(made) if config.evaluate.enabled else None
        if config.release.require is not None and (verdict is None or verdict.outcome != config.release.require):
            assert verdict is not None, "the configuration does not allow a demand without a verdict"
            raise ReleaseError(
                f"no release is made: release.require asks for '{config.release.require}', and the verdict is "
                f"{verdict.sentence} It is in {job.show_verdict(verdict)[0]}."
            )
        release = job.release(made, verdict)
        summary = job.finish(made, verdict, release)
        return job.publish(summary, release.record, made.checkpoints)


def evaluate(
    config: Config, *, run_stage: RunStage = call_directly, map_shards: MapShards | None = None
) -> VerdictSummary:
    """The whole job up to the verdict; nothing is released.

    Raises:
        SynthaugError: What a user can meet; see `synthaug.errors`.
    """
    with _job(config, run_stage, map_shards) as job:
        return job.verdict_summary(job.evaluate(job.make()))


def evaluate_foreign(
    config: Config, samples: str, *, run_stage: RunStage = call_directly, map_shards: MapShards | None = None
) -> VerdictSummary:
    """The verdict on images that another tool made; no generator is trained.

    Args:
        samples: A folder, file or dataset of images with the classes of the configuration's dataset.
    """
    from synthaug.evaluate import check_evaluation

    with _job(config, run_stage, map_shards) as job:
        check_evaluation(config)
        source, splits, plan = job.prepare()
        check_evaluation(config, source)
        batch = job.adopt(source, splits, samples)
        judge = job.judge(source, splits)
        verdict = job.evaluate(_Made(source, splits, plan, (), judge, [batch], None))
        return job.verdict_summary(verdict, folder=_name_for(samples, verdict.digest))


def audit_foreign(
    config: Config, samples: str, *, run_stage: RunStage = call_directly, map_shards: MapShards | None = None
) -> AuditSummary:
    """The audit of images that another tool made; see `evaluate_foreign`."""
    with _job(config, run_stage, map_shards) as job:
        source, splits, plan = job.prepare()
        batch = job.adopt(source, splits, samples)
        judge = job.judge(source, splits)
        report = job.audit(source, splits, plan, (), judge, [batch])
        return job.audit_summary(source, splits, batch, report, folder=_name_for(samples, report.digest))


def explain(config: Config, workspace: Workspace) -> None:
    """Ask `workspace` for every stage of the whole job in order, as `augment` does, and make nothing beside it.

    For a workspace that only looks; see `synthaug.status`.
    """
    job = _Job(config, workspace, call_directly)
    made = job.make()
    verdict = job.evaluate(made) if config.evaluate.enabled else None
    release = job.release(made, verdict).record
    if config.release.push is not None:
        job.pushed(release, made.checkpoints)


@dataclass(frozen=True)
class _Made:
    """All that stands when sampling is over; what judges it needs all of it."""

    source: Source
    splits: Splits
    plan: BalancePlan
    checkpoints: tuple[Checkpoint, ...]  # of `batches`, oldest first; none: another tool's samples
    judge: Judge
    batches: list[SampleBatch]
    report: AuditReport | None
    memberships: tuple[Membership, ...] = ()  # of each checkpoint, in their order; none: another tool's, or not asked
    line: _Line | None = None  # None: another tool's samples
    rounds: tuple[Round, ...] = ()  # what each of `batches` is

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest: what this job has trained."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def membership(self) -> Membership | None:
        """The attack on the newest."""
        return self.memberships[-1] if self.memberships else None

    @property
    def parts(self) -> list[StageRecord | None]:
        """Every record, for the key of what depends on all of them."""
        checkpoints = self.checkpoints or (None,)
        return [self.source, self.splits, self.plan, *checkpoints, self.judge, *self.batches, self.report]


@dataclass(frozen=True)
class _Origin:
    """A checkpoint with the images that it was trained on, whose classes have the numbers that it knows."""

    generation: int
    checkpoint: Checkpoint
    source: Source
    splits: Splits


@dataclass(frozen=True)
class _Line:
    """The checkpoints that a job draws samples from, and what it keeps of those that were drawn; see `growth`."""

    generation: Generation
    origins: tuple[_Origin, ...]  # oldest first
    owners: dict[str, int]  # class that the plan raises to its origin
    kept: tuple[Round, ...]
    settings: str
    drawing: str

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Oldest first. A warm training may come to no better weights than those it began with: that is one."""
        newest = {item.checkpoint.digest: number for number, item in enumerate(self.origins)}
        return tuple(self.origins[number].checkpoint for number in sorted(newest.values()))

    def divided(self, request: SampleRequest, classes: Sequence[str]) -> list[Round]:
        """A request by the checkpoints that it is for, in their numbers of the classes."""
        rounds = []
        for number, origin in enumerate(self.origins):
            wanted = {classes[label]: drawn for label, drawn in request.ranges.items()}
            mine = {name: drawn for name, drawn in wanted.items() if self.owners[name] == number}
            ranges = {origin.source.classes.index(name): drawn for name, drawn in mine.items()}
            if ranges:
                rounds.append(Round(origin=number, ranges=ranges, classes=tuple(mine)))
        return rounds

    def title(self, stage: str, number: int, item: Round | None = None) -> str:
        """Rounds of a grown job say of which generation they are; so they differ from those that are kept."""
        generation = self.generation.number
        if generation == 1:
            return f"{stage} round {number}"
        drawn = "" if item is None else f", checkpoint of generation {self.origins[item.origin].generation}"
        return f"{stage} round {number} (generation {generation}{drawn})"


class _Job:
    """One run: every stage with what its result depends on. Stages are imported when their turn comes."""

    def __init__(
        self, config: Config, workspace: Workspace, run_stage: RunStage, map_shards: MapShards = one_by_one
    ) -> None:
        self.config = config
        self.workspace = workspace
        self._run_stage = run_stage
        self._map_shards = map_shards
        self._seconds: dict[str, float] = {}
        self._reused: list[str] = []

    def prepare(self) -> tuple[Source, Splits, BalancePlan]:
        source = self._read()
        splits = self._split(source)
        return source, splits, self._plan(source, splits)

    def make(self) -> _Made:
        """Everything up to the samples and their audit, in rounds until the plan is met or the budget ends."""
        from synthaug.evaluate import check_evaluation
        from synthaug.formats.dicom_out import check_dicom
        from synthaug.plan import next_request, nothing_to_raise

        if self.config.evaluate.enabled:
            check_evaluation(self.config)
        if self.config.release.dicom is not None:
            check_dicom(self.config.release.dicom)
        source, splits, plan = self.prepare()
        if self.config.evaluate.enabled:
            check_evaluation(self.config, source)
        if self.config.release.dicom is not None:
            check_dicom(self.config.release.dicom, source.pixels)
        if (reason := nothing_to_raise(plan)) is not None:
            raise PlanError(reason)
        line = self._line(source, splits, plan)
        judge = self.judge(source, splits)
        memberships = self._memberships(line)
        rounds, batches = list(line.kept), []
        for number, item in enumerate(line.kept, 1):
            title = f"kept samples {number} (checkpoint of generation {line.origins[item.origin].generation})"
            batches.append(self._draw(line, source, item, title))
        report: AuditReport | None = None
        number = 0
        if batches:
            # What was kept meets images that are new: it is judged before anything is added to it.
            report = self._audit_of(line, source, splits, plan, judge, batches, number)
            if not self.workspace.is_made(report):
                report = _likely(report, plan, {name for item in line.kept for name in item.classes})
        asked: list[SampleRequest] = []
        while (request := next_request(self.config, plan, report)) is not None and request not in asked:
            number += 1
            asked.append(request)  # is asked again where a report only stands in for one that is to be made
            for item in line.divided(request, source.classes):
                batches.append(self._draw(line, source, item, line.title("sample", number, item)))
                rounds.append(item)
            report = self._audit_of(line, source, splits, plan, judge, batches, number)
        assert report is not None, "a plan that raises a class asks for samples"
        return _Made(
            source, splits, plan, line.checkpoints, judge, batches, report, memberships, line=line, rounds=tuple(rounds)
        )

    def _line(self, source: Source, splits: Splits, plan: BalancePlan) -> _Line:
        """Which checkpoint each class is drawn from: trains what has to be, and takes over what can be."""
        from synthaug.train import base_identity

        config, workspace = self.config, self.workspace
        dp = None if config.privacy.dp is None else plain(config.privacy.dp)
        # All that training depends on beside the images; with them it names the generation.
        learning = [CODE_VERSIONS["train"], train_settings(config), base_identity(config.train), config.seed, dp]
        settings = digest_json([*learning, plain(config.image)])
        drawing = digest_json([CODE_VERSIONS["sample"], *sample_settings(config)])
        key = digest_json([settings, source.digest, splits.digest])
        if workspace.is_made(source) and workspace.is_made(splits):
            generation = generation_of(
                config,
                source,
                splits,
                key=key,
                settings=settings,
                output=workspace.output,
                write=not workspace.looks_only,
            )
        else:
            generation = Generation(key=key)
            if (release := may_grow(config, settings=settings, output=workspace.output)) is not None:
                workspace.growth_open = True
                workspace.growth = (
                    f"what can be kept of release {release} is known when the images are read and divided: "
                    "'synthaug plan CONFIG' does that and trains nothing",
                )
        raised = {
            item.name: {use: splits.counts[use][item.label] for use in ("train", "validation")}
            for item in plan.classes
            if item.n_synthetic > 0
        }
        chosen = shares(generation, raised, drawing)
        if not workspace.growth_open:
            workspace.growth = told(generation, chosen, drawing)
            for sentence in workspace.growth:
                logger.info("growth: %s", sentence)
        # In the numbers of `chosen`: what is taken over, then what is trained now.
        parents = () if generation.parent is None else generation.parent.origins
        used = set(chosen.owners.values())
        known = {number: self._origin(item) for number, item in enumerate(parents) if number in used}
        if chosen.due:
            base = None if not parents else known.get(len(parents) - 1) or self._base(parents[-1])
            checkpoint = self.train(source, splits, plan, chosen.due, base)
            known[len(parents)] = _Origin(generation.number, checkpoint, source, splits)
        numbers = sorted(set(chosen.owners.values()))
        place = {number: position for position, number in enumerate(numbers)}
        return _Line(
            generation=generation,
            origins=tuple(known[number] for number in numbers),
            owners={name: place[number] for name, number in chosen.owners.items()},
            kept=tuple(item.model_copy(update={"origin": place[item.origin]}) for item in chosen.kept),
            settings=settings,
            drawing=drawing,
        )

    def _base(self, item: Origin) -> _Origin:
        """What a warm training starts from, or started from: after it, it may be cleared away."""
        stages = self.workspace.stages
        if is_whole(item, stages):
            return self._origin(item)
        checkpoint = item.checkpoint.load(stages, Checkpoint)
        return _Origin(item.generation, checkpoint, item.source.load(stages, Source), item.splits.load(stages, Splits))

    def _origin(self, item: Origin) -> _Origin:
        """A checkpoint of an earlier generation, which is a stage that is complete."""
        stages = self.workspace.stages
        key_parts, names = made_from(stages, item.checkpoint)

        def gone(directory: Path) -> Checkpoint:
            raise OutputError(f"{directory} was there a moment ago and is not any more. Run again.")

        title = f"checkpoint of generation {item.generation} (kept)"
        done = self._run_stage(
            title,
            lambda: self.workspace.stage("train", title, key_parts, Checkpoint, gone, resumes=True, names=names),
        )
        self._note(title, done)
        return _Origin(item.generation, done.record, item.source.load(stages, Source), item.splits.load(stages, Splits))

    def _memberships(self, line: _Line) -> tuple[Membership, ...]:
        """The attack on each checkpoint, among the images that it was trained with."""
        found = []
        for checkpoint in line.checkpoints:
            item = next(origin for origin in reversed(line.origins) if origin.checkpoint.digest == checkpoint.digest)
            kept = item.generation != line.generation.number
            title = f"membership of the checkpoint of generation {item.generation}" if kept else None
            found.append(self.membership(item.source, item.splits, checkpoint, title))
        return tuple(found)

    def _draw(self, line: _Line, source: Source, item: Round, title: str) -> SampleBatch:
        """Samples of one checkpoint, under the labels that their classes have in this job."""
        origin = line.origins[item.origin]
        batch = self.sample(origin.source, origin.checkpoint, item.request, title)
        return batch.only({origin.source.classes.index(name): source.classes.index(name) for name in item.classes})

    def _audit_of(
        self,
        line: _Line,
        source: Source,
        splits: Splits,
        plan: BalancePlan,
        judge: Judge,
        batches: list[SampleBatch],
        number: int,
    ) -> AuditReport:
        title = line.title("audit", number)
        return self.audit(source, splits, plan, line.checkpoints, judge, batches, title)

    def remember(self, made: _Made, release: Release) -> None:
        """Keep what a release was made of, for whoever grows from it."""
        line = made.line
        assert line is not None, "only samples of our own are released"
        origins = tuple(
            Origin(
                generation=item.generation,
                checkpoint=Pinned.of(item.checkpoint),
                source=Pinned.of(item.source),
                splits=Pinned.of(item.splits),
            )
            for item in line.origins
        )
        remember(
            self.workspace.output,
            Released(
                release=release.directory.name,
                generation=line.generation.number,
                settings=line.settings,
                drawing=line.drawing,
                source=Pinned.of(made.source),
                splits=Pinned.of(made.splits),
                origins=origins,
                owners=line.owners,
                rounds=made.rounds,
            ),
        )

    def adopt(self, source: Source, splits: Splits, samples: str) -> SampleBatch:
        from synthaug.adopt import adopt, foreign_config

        foreign = self._read(foreign_config(self.config, samples))
        return self._do(
            "adopt",
            SampleBatch,
            lambda directory: adopt(self.config, source, splits, foreign, directory),
            source,
            splits,
            foreign,
            # Images of unknown classes are set aside in reading and refused here, and no digest tells of them.
            foreign.set_aside_reasons,
            list(self.config.dataset.exclude),
        )

    def _read(self, foreign: Config | None = None) -> Source:
        """Read the dataset of the job, or another tool's samples."""
        from synthaug.read import read, source_fingerprint

        config = foreign or self.config
        with self.workspace.full_disk_explained("read"):
            fingerprint = source_fingerprint(config)
        # Which classes are left out or cut is the business of the split: changing it reads nothing again.
        dataset = plain(config.dataset, without={"cut", "cut_seed", "exclude", "dicom", "nifti"})
        if (private := config.dataset.private) is not None:
            # Folders and tables of patients may be named after them; the fingerprint speaks of these under its key.
            dataset["path"] = None
            dataset[config.dataset.format] = plain(private, without={"table", "key_file"})
        return self._do(
            "read",
            Source,
            lambda directory: read(config, directory, foreign=foreign is not None),
            fingerprint,
            dataset,
            plain(config.image),
            *([] if foreign is None else ["foreign"]),
            title=None if foreign is None else "read samples",
        )

    def _split(self, source: Source) -> Splits:
        from synthaug.split import split

        config = self.config
        cut = plain(config.dataset, only={"cut", "cut_seed", "exclude"})
        return self._do(
            "split",
            Splits,
            lambda directory: split(config, source, directory),
            source,
            cut,
            plain(config.split),
            # A ledger that was lost is written again before the dataset can grow without it.
            intact=lambda record: record.ledger is None or Path(record.ledger).exists(),
        )

    def _plan(self, source: Source, splits: Splits) -> BalancePlan:
        from synthaug.plan import plan_balance

        config = self.config
        return self._do(
            "plan",
            BalancePlan,
            lambda directory: plan_balance(config, source, splits, directory),
            source,
            splits,
            plain(config.plan),
            list(config.dataset.exclude),
        )

    def train(
        self, source: Source, splits: Splits, plan: BalancePlan, due: Sequence[str], warm: _Origin | None = None
    ) -> Checkpoint:
        """A checkpoint for the classes that are due; `warm`: one of an earlier generation that it starts from."""
        from synthaug.train import base_identity, train

        config = self.config if warm is None else warm_start(self.config, warm.checkpoint)
        settings, base = train_settings(self.config), base_identity(self.config.train)
        if warm is not None:
            plan, base = only_for(plan, due), warm.checkpoint.digest
            # Where it lies is no part of it.
            settings |= {"base": "the checkpoint of an earlier generation", "base_revision": None}

        def work(directory: Path) -> Checkpoint:
            made = train(config, source, splits, plan, directory)
            return made if warm is None else made.model_copy(update={"started_from": warm.checkpoint.digest})

        return self._do(
            "train",
            Checkpoint,
            work,
            source,
            splits,
            # Training asks the plan which classes are scarce and nothing else: other numbers train nothing again.
            plan.scarce,
            settings,
            base,
            config.seed,
            *([] if config.privacy.dp is None else [plain(config.privacy.dp)]),
            resumes=True,
        )

    def judge(self, source: Source, splits: Splits) -> Judge:
        from synthaug.judge import judge
        from synthaug.trial.entry import entry_identity

        config = self.config
        return self._do(
            "judge",
            Judge,
            lambda directory: judge(config, source, splits, directory),
            source,
            splits,
            plain(config.audit, only={"classifier_steps", "near_copy_percentile", "planted"}),
            entry_identity(config.evaluate.backbone),
            config.train.threads,
            config.seed,
        )

    def membership(
        self, source: Source, splits: Splits, checkpoint: Checkpoint, title: str | None = None
    ) -> Membership:
        from synthaug.membership import membership

        config = self.config

        def work(directory: Path) -> Membership:
            for record in (source, splits):
                if not record.directory.is_dir():
                    raise OutputError(
                        f"the membership attack on the checkpoint {checkpoint.directory} has to be made again, and the "
                        f"images that it was trained on ({record.directory}) were cleared away. Make everything anew "
                        "with growth.samples: remake."
                    )
            return membership(config, source, splits, checkpoint, directory)

        return self._do(
            "membership",
            Membership,
            work,
            source,
            splits,
            checkpoint,
            config.train.threads,
            config.train.device,
            config.seed,
            title=title,
        )

    def refuse_copies(self, made: _Made) -> None:
        """Raise where more samples repeat training images than the configuration allows; they are there to look at."""
        from synthaug.report.copy_words import too_many_copies

        assert made.report is not None, "only audited samples are released"
        privacy = self.config.privacy
        asked = privacy.max_near_copy_rate is not None and "max_near_copy_rate" in privacy.model_fields_set
        if asked and made.judge.near_copy_threshold is None:
            raise ReleaseError(
                f"no release is made: privacy.max_near_copy_rate is {privacy.max_near_copy_rate:g}, and near-copies "
                f"could not be looked for. {made.judge.near_copy_note}"
            )
        problem = too_many_copies(privacy.max_near_copy_rate, made.judge, made.report.classes)
        if problem is not None:
            sheet = self.rejected_sheet(made.source, made.splits, made.batches, made.report)
            raise ReleaseError(f"{problem} They stand beside what they repeat in {self.workspace.show(sheet)}.")

    def rejected_sheet(self, source: Source, splits: Splits, batches: list[SampleBatch], report: AuditReport) -> Path:
        from synthaug.report.rejected_sheet import write_rejected_sheet

        sheet = report.directory / REJECTED_SHEET_FILE
        if not sheet.exists():
            write_rejected_sheet(source, splits, batches, report, sheet)
        return sheet

    def refuse_membership(self, made: _Made) -> None:
        """Raise where a checkpoint gives away more than the configuration allows: the newest, then earlier ones."""
        from synthaug.membership import refuse_membership

        if made.membership is not None:
            refuse_membership(self.config, made.membership, self.show_membership(made.membership))
        for checkpoint, found in zip(made.checkpoints[:-1], made.memberships[:-1], strict=bool(made.memberships)):
            refuse_membership(self.config, found, found.directory / MEMBERSHIP_FILE, checkpoint.digest)

    def show_membership(self, membership: Membership) -> Path:
        return self.workspace.show(membership.directory / MEMBERSHIP_FILE)

    def sample(self, source: Source, checkpoint: Checkpoint, request: SampleRequest, title: str) -> SampleBatch:
        from synthaug.sample import sample

        config = self.config
        return self._do(
            "sample",
            SampleBatch,
            lambda directory: sample(config, source, checkpoint, request, directory, map_shards=self._map_shards),
            source,
            checkpoint,
            *sample_settings(config),
            plain(request),
            title=title,
            resumes=True,
        )

    def audit(
        self,
        source: Source,
        splits: Splits,
        plan: BalancePlan,
        checkpoints: Sequence[Checkpoint],
        judge: Judge,
        batches: list[SampleBatch],
        title: str | None = None,
    ) -> AuditReport:
        from synthaug.audit import audit

        config, batches = self.config, list(batches)
        return self._do(
            "audit",
            AuditReport,
            lambda directory: audit(
                config, source, splits, plan, checkpoints, judge, batches, directory, map_shards=self._map_shards
            ),
            source,
            splits,
            plan,
            *(checkpoints or (None,)),
            judge,
            *batches,
            plain(config.audit),
            config.train.threads,
            config.seed,
            title=title or f"audit round {len(batches)}",
            resumes=True,
        )

    def evaluate(self, made: _Made) -> Verdict:
        from synthaug.evaluate import code_identity, evaluate

        config = self.config
        return self._do(
            "evaluate",
            Verdict,
            lambda directory: evaluate(
                config,
                made.source,
                made.splits,
                made.plan,
                made.checkpoints,
                made.judge,
                made.batches,
                made.report,
                directory,
            ),
            *made.parts,
            # The user's own code is in the key with its content.
            plain(config.evaluate, without={"enabled", "workers", "classifier", "backbone"}),
            code_identity(config),
            # How many fits run at a time decides what fits into the minutes.
            config.evaluate.workers or config.train.threads,
            config.train.device,
            config.seed,
            resumes=True,
        )

    def release(self, made: _Made, verdict: Verdict | None) -> Done[Release]:
        from synthaug.formats.manifest import public_config
        from synthaug.release import release
        from synthaug.report.contact_sheet import write_contact_sheet
        from synthaug.report.rejected_sheet import write_rejected_sheet

        config, source, splits, batches = self.config, made.source, made.splits, made.batches
        report = made.report
        assert made.checkpoints, "only samples of our own are released"
        assert report is not None, "only audited samples are released"

        def work(directory: Path) -> Release:
            write_contact_sheet(source, splits, batches, report, directory / CONTACT_SHEET_FILE)
            write_rejected_sheet(source, splits, batches, report, directory / REJECTED_SHEET_FILE)
            with self.workspace.staged_release() as staging:
                result = release(
                    config,
                    source,
                    splits,
                    made.plan,
                    made.checkpoints,
                    made.judge,
                    batches,
                    report,
                    verdict,
                    staging,
                    memberships=made.memberships,
                    previous=self.workspace.release_before(directory) if config.release.append else None,
                )
                final = self.workspace.publish(staging, result.digest, _is_intact)
            return result.model_copy(update={"directory": final})

        # The manifest of a release names the configuration it was made with, so all of that is in the key.
        return self._do_whole(
            "release",
            Release,
            work,
            *made.parts,
            Part("verdict", verdict if verdict is not None else "not evaluated"),
            *(Part(f"membership of earlier checkpoint {n}", item) for n, item in enumerate(made.memberships[:-1], 1)),
            Part("membership", made.membership),
            public_config(config),
            # What the card says of the source beside its images: licence, citation, what was set aside.
            plain(source),
            resumes=True,
            intact=lambda record: _is_intact(record.directory),
        )

    def show_verdict(self, verdict: Verdict, folder: str | None = None) -> tuple[Path, tuple[Path, ...]]:
        """Put a verdict and its pictures into the run folder; returns where they are."""
        self.workspace.unshow("verdict_*.png", folder)
        show = self.workspace.show
        pictures = tuple(show(path, folder) for path in sorted(verdict.directory.glob("verdict_*.png")))
        return show(verdict.directory / VERDICT_FILE, folder), pictures

    def verdict_summary(self, verdict: Verdict, folder: str | None = None) -> VerdictSummary:
        file, pictures = self.show_verdict(verdict, folder)
        return VerdictSummary(
            run=self.workspace.output,
            verdict=verdict,
            verdict_file=file,
            pictures=pictures,
            seconds=self._seconds,
            reused=tuple(self._reused),
        )

    def audit_summary(
        self, source: Source, splits: Splits, batch: SampleBatch, report: AuditReport, folder: str
    ) -> AuditSummary:
        sheet = self.rejected_sheet(source, splits, [batch], report)
        return AuditSummary(
            run=self.workspace.output,
            report=report,
            audit_file=self.workspace.show(report.directory / AUDIT_FILE, folder),
            rejected_sheet=self.workspace.show(sheet, folder),
            seconds=self._seconds,
            reused=tuple(self._reused),
        )

    def publish(self, summary: RunSummary, release: Release, checkpoints: Sequence[Checkpoint]) -> RunSummary:
        """Push a finished release where the configuration says; what was pushed there already is not pushed again."""
        if self.config.release.push is None:
            return summary
        pushed = self.pushed(release, checkpoints)
        return self._keep(
            summary.model_copy(update={"pushed_to": pushed, "seconds": self._seconds, "reused": tuple(self._reused)})
        )

    def pushed(self, release: Release, checkpoints: Sequence[Checkpoint]) -> str | None:
        from synthaug.formats.hub import push

        settings = self.config.release.push
        assert settings is not None, "only what the configuration names is pushed"
        assert checkpoints, "only samples of our own are released"
        *earlier, newest = checkpoints

        def work(directory: Path) -> Release:
            folders = {item.digest: item.directory / PIPELINE_DIR for item in earlier}
            url = push(release.directory, settings, checkpoint=newest.directory / PIPELINE_DIR, earlier=folders)
            return release.model_copy(update={"pushed_to": url})

        digests = [item.digest if settings.checkpoint else None for item in checkpoints]
        endpoint = os.environ.get("HF_ENDPOINT", "")
        more = [Part(f"what is pushed of earlier checkpoint {n}", item) for n, item in enumerate(digests[:-1], 1)]
        return self._do("publish", Release, work, release, plain(settings), digests[-1], endpoint, *more).pushed_to

    def finish(self, made: _Made, verdict: Verdict | None, release: Done[Release]) -> RunSummary:
        from synthaug.rebuild import rebuild
        from synthaug.report.membership_words import membership_sentence

        workspace, released, plan = self.workspace, release.record, made.plan
        checkpoint, report = made.checkpoint, made.report
        assert checkpoint is not None, "only samples of our own are released"
        assert report is not None, "only audited samples are released"
        self.remember(made, released)
        workspace.point_at("release", released.directory)
        if verdict is None:
            workspace.unshow("verdict*")
        contact_sheet = workspace.show(release.directory / CONTACT_SHEET_FILE)
        rejected_sheet = workspace.show(release.directory / REJECTED_SHEET_FILE)
        counts = {
            item.name: {
                "real": released.n_real.get(item.name, 0),
                "synthetic": released.n_synthetic.get(item.name, 0),
                "short": released.n_short.get(item.name, 0),
            }
            for item in plan.classes
        }
        notes = [f"{item.name}: refused, {item.refused}" for item in plan.classes if item.refused]
        notes += [f"{', '.join(names)}: {words}" for words, names in plan.notes.items()]
        summary = RunSummary(
            name=self.config.name,
            run=workspace.output,
            release=released.directory,
            release_digest=released.digest,
            checkpoint=workspace.point_at("checkpoint", checkpoint.directory / PIPELINE_DIR),
            heldout_loss=_heldout_loss(checkpoint),
            counts=counts,
            copies={item.name: item.copies for item in report.classes if item.copies is not None},
            verdict=None if verdict is None else verdict.outcome,
            verdict_sentence="not evaluated" if verdict is None else verdict.sentence,
            verdict_file=None if verdict is None else self.show_verdict(verdict)[0],
            membership=made.membership,
            membership_sentence=membership_sentence(made.membership),
            membership_file=None if made.membership is None else self.show_membership(made.membership),
            contact_sheet=contact_sheet,
            rejected_sheet=rejected_sheet,
            report=rebuild(workspace.output).report,
            notes=(
                *notes,
                *workspace.growth,
                *report.notes,
                *(() if made.membership is None else made.membership.notes),
            ),
            seconds=self._seconds,
            reused=tuple(self._reused),
        )
        return self._keep(summary)

    def _keep(self, summary: RunSummary) -> RunSummary:
        self.workspace.write_summary(summary.model_dump(mode="json"))
        return summary

    def _do(
        self,
        stage: str,
        record_class: type[R],
        function: Callable[[Path], R],
        *made_from: Any,
        title: str | None = None,
        resumes: bool = False,
        intact: Callable[[R], bool] | None = None,
    ) -> R:
        done = self._do_whole(stage, record_class, function, *made_from, title=title, resumes=resumes, intact=intact)
        return done.record

    def _do_whole(
        self,
        stage: str,
        record_class: type[R],
        function: Callable[[Path], R],
        *made_from: Any,
        title: str | None = None,
        resumes: bool = False,
        intact: Callable[[R], bool] | None = None,
    ) -> Done[R]:
        title = title or stage
        names = names_of_parts(stage, made_from)
        values = [item.value if isinstance(item, Part) else item for item in made_from]
        parts = [key_part(item) for item in values]
        key_parts = [stage, CODE_VERSIONS[stage], *parts]
        done = self._run_stage(
            title,
            lambda: self.workspace.stage(
                stage, title, key_parts, record_class, function, resumes=resumes, intact=intact, names=names
            ),
        )
        self._note(title, done)
        return done

    def _note(self, title: str, done: Done[Any]) -> None:
        self._seconds[title] = round(done.seconds, 3)
        if done.reused:
            self._reused.append(title)


def _likely(report: AuditReport, plan: BalancePlan, kept: set[str]) -> AuditReport:
    """A report of earlier samples in place of that of kept ones, which is to be made: only of classes that are kept."""
    labels = {item.name: item.label for item in plan.classes}
    classes = (
        item.model_copy(update={"label": labels[item.name]}) for item in report.classes if item.name in kept & {*labels}
    )
    return report.model_copy(update={"classes": tuple(classes)})


def _heldout_loss(checkpoint: Checkpoint) -> dict[str, dict[str, float | None]]:
    """Of the scarce classes, before and after fine-tuning; lower is better."""
    base, tuned = checkpoint.heldout_loss_base, checkpoint.heldout_loss_tuned
    return {name: {"base": base.get(name), "fine-tuned": tuned.get(name)} for name in checkpoint.scarce}


def _is_intact(release: Path) -> bool:
    from synthaug.errors import VerificationError
    from synthaug.verify import verify

    try:
        return verify(release).ok
    except VerificationError:
        return False


@contextmanager
def _job(config: Config, run_stage: RunStage, map_shards: MapShards | None) -> Iterator[_Job]:
    if map_shards is None:
        refuse_runner(config.scale)
        map_shards = one_by_one
    _refuse_output_among_the_images(config)
    with open_workspace(config.output_path) as workspace:
        yield _Job(config, workspace, run_stage, map_shards)


def _refuse_output_among_the_images(config: Config) -> None:
    if config.dataset.path is None or config.dataset.format == "hub":
        return
    from synthaug.formats.source_arrow import fixed_part

    path = config.dataset.path
    pattern = config.dataset.format == "parquet" and not Path(path).exists()
    key = None if config.dataset.private is None else config.dataset.private.key_file
    if key is not None and Path(key).expanduser().resolve().is_relative_to(config.output_path.resolve()):
        raise OutputError(
            f"dataset.{config.dataset.format}.key_file {key} lies inside the run folder {config.output_path}, and that "
            "may be passed on. Name a private place outside of it."
        )
    output, data = config.output_path.resolve(), (fixed_part(path) if pattern else Path(path)).resolve()
    if data.is_dir() and output.is_relative_to(data) and (not pattern or "**" in path):
        raise OutputError(
            f"output {output} lies inside the dataset {data}: the next run would read its pictures as real ones. "
            "Name a directory outside of it with 'output:' or --output."
        )


def _name_for(samples: str, digest: str) -> str:
    """Folder for what is said of another tool's samples: the name of theirs, and a part of what was found."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(samples).name).strip("-.")[:60] or "samples"
    return f"judged/{name}-{digest[:8]}"
