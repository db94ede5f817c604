"""`provenance.json`: which dataset, checkpoint and steps the files of a release came from, as W3C PROV in JSON.

The words are those of PROV-DM (https://www.w3.org/TR/prov-dm/), the spelling is PROV-JSON
(https://www.w3.org/submissions/prov-json/), which general tools read and draw. What the stages made is named by its
digest, so that the graphs of two releases of one checkpoint meet in it. It holds counts and digests: no id of a real
image, no path, and no time, since equal inputs give equal files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synthaug.records import (
    AuditReport,
    Checkpoint,
    Judge,
    SampleBatch,
    Source,
    Splits,
    Verdict,
)
from synthaug.text import printable

PROVENANCE_FILE = "provenance.json"
# Neither is an address: nothing is looked up there.
_OURS = "urn:synthaug:prov:"
_RELEASE = "urn:synthaug:release:"
_COLLECTION = "release:dataset"


@dataclass(frozen=True)
class StoredFile:
    """A file of the release."""

    name: str  # relative, with forward slashes
    size: int
    sha256: str
    n_real: int | None = None  # of a shard: real images, and samples by number of their batch
    from_batches: Mapping[int, int] | None = None


@dataclass(frozen=True)
class ProvenanceFacts:
    """What the release stage knows of where its files came from."""

    name: str
    version: str  # of synthaug
    seed: int
    source: Source  # its name without local paths
    licence: str | None
    splits: Splits
    checkpoints: Sequence[Checkpoint]  # of the batches, oldest first
    # By digest: real images that each was trained on, where its list is there, and which of them learned from the
    # training images of these splits.
    n_trained_on: Mapping[str, int]
    learned_from_these: Collection[str]
    base: tuple[str, str | None] | None  # name and revision of what a training from no checkpoint of ours started from
    judge: Judge
    batches: Sequence[SampleBatch]
    report: AuditReport
    verdict: Verdict | None
    config_digest: str
    manifest_digest: str
    files: Sequence[StoredFile]


def provenance(facts: ProvenanceFacts) -> dict[str, Any]:
    """The graph of a release as plain data, PROV-JSON.

    Entities: the dataset as it was read, its split, the checkpoint, each round of samples, judge, audit, verdict,
    and every file but release.json and this one. Activities: the stages. Agents: the programs. A shard is derived
    from the rounds whose samples it holds, and from the dataset where it holds real images; all files are generated
    by the release, which used all of these. A checkpoint of an earlier job, also one that nothing was trained after,
    was trained before the dataset was what it is: what it learned from is an entity of its own, a part of the dataset.
    One that a warm training started from stands behind the one that came of it.
    """
    graph = _Graph(facts.version)
    source, splits = facts.source, facts.splits
    dataset = graph.entity(
        "dataset", source.digest, f"real images: {printable(source.name, 200)}", type="Dataset",
        fingerprint=source.digest, n_images=source.n_images, n_classes=len(source.classes),
        licence=printable(facts.licence or "unknown", 200),
    )  # fmt: skip
    split = graph.entity(
        "split", splits.digest, f"split of the real images: {printable(splits.method, 200)}", type="Split",
        **{f"n_{name}": sum(counts) for name, counts in splits.counts.items()},
    )  # fmt: skip
    graph.activity("split", splits.digest, used=[dataset], made=[split])
    generators = {}
    for item in facts.checkpoints:
        n_images = facts.n_trained_on.get(item.digest)
        current = item.digest in facts.learned_from_these
        used = [dataset, split] if current else [_earlier_images(graph, item, n_images, dataset)]
        if facts.base is not None and item.started_from in (None, item.digest):
            used.append(_base(graph, item, *facts.base))
        generators[item.digest] = _generator(graph, item, used, facts.seed, n_images)
    judge = graph.entity("judge", facts.judge.digest, "classifier of real images, near-copy distance", type="Model")
    graph.activity("judge", facts.judge.digest, used=[dataset, split], made=[judge])
    rounds = [
        _samples(graph, batch, number, generators[batch.checkpoint_digest], facts.seed)
        for number, batch in enumerate(facts.batches)
    ]
    report = graph.entity(
        "audit", facts.report.digest, "audit of the samples", type="Audit",
        n_candidates=sum(item.n_candidates for item in facts.report.classes),
        n_accepted=sum(item.n_accepted for item in facts.report.classes),
    )  # fmt: skip
    graph.activity("audit", facts.report.digest, used=[dataset, split, judge, *rounds], made=[report])
    config = graph.entity("configuration", facts.config_digest, "configuration of the job", type="Plan")
    released_from = [dataset, split, *generators.values(), *rounds, report, config]
    if facts.verdict is not None:
        verdict = graph.entity(
            "verdict", facts.verdict.digest, "verdict on the samples", type="Verdict", outcome=facts.verdict.outcome
        )
        graph.activity("evaluate", facts.verdict.digest, used=[dataset, split, report, *rounds], made=[verdict])
        released_from.append(verdict)
    _release(graph, facts, dataset, rounds, released_from)
    return graph.values(facts.manifest_digest)


def _generator(graph: _Graph, checkpoint: Checkpoint, used: Sequence[str], seed: int, n_images: int | None) -> str:
    """A checkpoint and its training, and the checkpoint that a warm one started from."""
    generator = graph.entity(
        "checkpoint", checkpoint.digest, f"generator '{printable(checkpoint.generator)}'", type="Model",
        generator=checkpoint.generator, parameters=checkpoint.parameters, kept=checkpoint.kept,
    )  # fmt: skip
    # A warm training that came to nothing better gave back what it started from.
    if checkpoint.started_from not in (None, checkpoint.digest):
        used = [
            *used,
            graph.known_entity("checkpoint", checkpoint.started_from, "checkpoint of an earlier job", "Model"),
        ]
    graph.activity(
        "train", checkpoint.digest, used=used, made=[generator], seed=seed, n_training_images=n_images,
        images_drawn=checkpoint.images_seen,
    )  # fmt: skip
    for item in used:
        graph.derived(generator, item)
    return generator


def _base(graph: _Graph, checkpoint: Checkpoint, name: str, revision: str | None) -> str:
    """The model of others that a checkpoint's training started from."""
    return graph.add_entity(
        f"synthaug:base-of-{checkpoint.digest}", f"model that training started from: {printable(name, 200)}",
        type="Model", revision=revision,
    )  # fmt: skip


def _earlier_images(graph: _Graph, checkpoint: Checkpoint, n_images: int | None, dataset: str) -> str:
    """What an earlier checkpoint was trained on."""
    images = graph.add_entity(
        f"synthaug:images-of-{checkpoint.digest}",
        "real training images" if n_images is None else "real training images of an earlier job",
        type="Dataset", n_images=n_images,
    )  # fmt: skip
    graph.derived(images, dataset)
    return images


def _samples(graph: _Graph, batch: SampleBatch, number: int, generator: str, seed: int) -> str:
    """A round of samples, drawn from the checkpoint by the programs that its record names."""
    samples = graph.entity(
        "samples", batch.digest, f"samples of round {number + 1}", type="Collection", n_samples=batch.n_samples
    )
    made, digest = samples, batch.digest
    if batch.drawn_digest is not None:
        # Under the digest that releases of the job that drew them have.
        digest = batch.drawn_digest
        made = graph.known_entity("samples", digest, "samples of an earlier job, of which some were kept", "Collection")
        graph.derived(samples, made)
    seed = seed if batch.job_seed is None else batch.job_seed
    drawing = graph.activity(
        "sample", digest, used=[generator], made=[made], seed=seed, solver=batch.solver, steps=batch.steps,
        guidance=batch.guidance, micro_batch=batch.micro_batch, threads=batch.threads, device=batch.device,
        cpu_capability=batch.environment.get("cpu_capability"), version=batch.environment.get("synthaug"),
    )  # fmt: skip
    for name in ("torch", "diffusers", "numpy"):
        if name in batch.environment:
            graph.associated(drawing, graph.software(name, batch.environment[name]))
    graph.derived(made, generator)
    return samples


def _release(graph: _Graph, facts: ProvenanceFacts, dataset: str, rounds: list[str], released_from: list[str]) -> None:
    real = sum(file.n_real or 0 for file in facts.files)
    synthetic = sum(sum((file.from_batches or {}).values()) for file in facts.files)
    collection = graph.add_entity(
        _COLLECTION, f"release '{printable(facts.name, 200)}'", type="Collection",
        manifest_sha256=facts.manifest_digest, config_digest=facts.config_digest, n_real=real, n_synthetic=synthetic,
    )  # fmt: skip
    names = []
    for file in facts.files:
        held = file.from_batches or {}
        counts = {} if file.n_real is None else {"n_real": file.n_real, "n_synthetic": sum(held.values())}
        name = graph.add_entity(
            f"release:{file.name}", None, type="File" if file.n_real is None else "Shard", sha256=file.sha256,
            size=file.size, **counts,
        )  # fmt: skip
        for number in sorted(held):
            graph.derived(name, rounds[number])
        if file.n_real:
            graph.derived(name, dataset)
        graph.member(collection, name)
        names.append(name)
    graph.activity("release", facts.manifest_digest, used=released_from, made=[collection, *names])


class _Graph:
    """Collects PROV records; an entity, activity or agent that is named twice is one."""

    def __init__(self, version: str) -> None:
        self._records: dict[str, dict[str, dict[str, Any]]] = {}
        self._version = version

    def entity(self, kind: str, digest: str, label: str, **facts: Any) -> str:
        return self.add_entity(_name(kind, digest), label, **facts, digest=digest)

    def known_entity(self, kind: str, digest: str, label: str, what: str) -> str:
        """One of which the digest is known; what was said of it before stays."""
        name = _name(kind, digest)
        known = name in self._records.get("entity", {})
        return name if known else self.entity(kind, digest, label, type=what)

    def add_entity(self, name: str, label: str | None, **facts: Any) -> str:
        self._records.setdefault("entity", {})[name] = _attributes(label, facts)
        return name

    def activity(
        self,
        kind: str,
        digest: str,
        *,
        used: Sequence[str],
        made: Sequence[str],
        version: str | None = None,
        **facts: Any,
    ) -> str:
        """A stage. The release's is of this version of synthaug; of others it is said where their record has it."""
        name = _name(f"{kind}-stage", digest)
        self._records.setdefault("activity", {})[name] = _attributes(kind, {"type": "Stage", **facts})
        for entity in used:
            self._relate("used", {"prov:activity": name, "prov:entity": entity})
        for entity in made:
            self._relate("wasGeneratedBy", {"prov:entity": entity, "prov:activity": name})
        self.associated(name, self.software("synthaug", self._version if kind == "release" else version))
        return name

    def software(self, name: str, version: str | None) -> str:
        agent = f"synthaug:software-{name}"
        values: dict[str, Any] = {"prov:type": _typed("prov:SoftwareAgent"), "prov:label": name}
        if version is not None:
            agent += "-" + re.sub("[^A-Za-z0-9.]+", "-", version)
            values["synthaug:version"] = version
        self._records.setdefault("agent", {})[agent] = values
        return agent

    def associated(self, activity: str, agent: str) -> None:
        self._relate("wasAssociatedWith", {"prov:activity": activity, "prov:agent": agent})

    def derived(self, made: str, source: str) -> None:
        self._relate("wasDerivedFrom", {"prov:generatedEntity": made, "prov:usedEntity": source})

    def member(self, collection: str, entity: str) -> None:
        self._relate("hadMember", {"prov:collection": collection, "prov:entity": entity})

    def _relate(self, relation: str, ends: dict[str, Any]) -> None:
        found = self._records.setdefault(relation, {})
        found[f"_:{relation}{len(found)}"] = ends

    def values(self, manifest_digest: str) -> dict[str, Any]:
        prefixes = {"synthaug": _OURS, "release": f"{_RELEASE}{manifest_digest}:"}
        return {"prefix": prefixes, **self._records}


def _name(kind: str, digest: str) -> str:
    return f"synthaug:{kind}-{digest}"


def _typed(name: str) -> dict[str, str]:
    return {"$": name, "type": "prov:QUALIFIED_NAME"}


def _attributes(label: str | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Attributes of our own under their prefix; those without a value are left out."""
    kind = facts.pop("type")
    # Two of our kinds are PROV's own.
    values: dict[str, Any] = {
        "prov:type": _typed(f"prov:{kind}" if kind in ("Collection", "Plan") else f"synthaug:{kind}")
    }
    if label is not None:
        values["prov:label"] = label
    return values | {f"synthaug:{name}": value for name, value in facts.items() if value is not None}


def stated_digests(graph: Any) -> Iterator[tuple[str, Any]]:
    """File of the release and SHA-256, as a provenance.json has them.

    Raises:
        KeyError, TypeError, AttributeError: It has another form.
    """
    for name, values in graph["entity"].items():
        prefix, _, file = name.partition(":")
        if prefix == "release" and name != _COLLECTION:
            yield file, values["synthaug:sha256"]


def stated_manifest(graph: Any) -> Any:
    """Digest of the manifest that a provenance.json speaks of; see `stated_digests`."""
    return graph["entity"][_COLLECTION]["synthaug:manifest_sha256"]


def names_checkpoint(graph: Any, digest: str) -> bool:
    """Whether a provenance.json names a checkpoint; see `stated_digests`."""
    return _name("checkpoint", digest) in graph["entity"]
