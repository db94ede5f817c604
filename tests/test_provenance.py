"""provenance.json is W3C PROV that a public tool accepts, and leads from every file to the dataset and checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pyarrow.parquet as pq
import pytest
from prov.model import (
    ProvActivity,
    ProvAgent,
    ProvAssociation,
    ProvDerivation,
    ProvDocument,
    ProvEntity,
    ProvGeneration,
    ProvMembership,
    ProvRecord,
    ProvUsage,
)

from synthaug.digest import digest_file
from synthaug.formats.provenance import PROVENANCE_FILE
from synthaug.records import SEEN_FILE, VERDICT_FILE
from tests.release_parts import Parts, make_grown_parts, make_parts, make_unlearned_parts
from tests.verdict_parts import make_verdict

HOSTILE = ("zero", "a\nb \x1b[31m", '../../x "</script>')


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("inputs"), classes=HOSTILE)


@pytest.fixture(scope="module", params=["with real images", "samples alone", "with a verdict", "none accepted"])
def release(request: pytest.FixtureRequest, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    if request.param == "none accepted":
        return make_parts(folder / "in", wanted=(0, 0, 0)).release(folder / "release").directory
    if request.param == "with a verdict":
        verdict = make_verdict("harms").model_copy(update={"directory": folder})
        (folder / VERDICT_FILE).write_text(verdict.model_dump_json(), encoding="utf-8")
        return parts.release(folder / "release", verdict=verdict).directory
    return parts.release(folder / "release", include_real=request.param != "samples alone").directory


def read(release: Path) -> ProvDocument:
    return ProvDocument.deserialize(str(release / PROVENANCE_FILE), format="json")


def ends(document: ProvDocument, relation: type[ProvRecord]) -> Iterator[tuple[str, str]]:
    for record in document.get_records(relation):
        first, second = [str(value) for _, value in record.formal_attributes][:2]
        yield first, second


def reached(document: ProvDocument, start: str, *relations: type[ProvRecord]) -> set[str]:
    """Everything on the ways back from `start`."""
    steps: dict[str, set[str]] = {}
    for relation in relations:
        for made, source in ends(document, relation):
            steps.setdefault(made, set()).add(source)
    found, new = {start}, {start}
    while new:
        new = set().union(*(steps.get(name, set()) for name in new)) - found
        found |= new
    return found


def values(document: ProvDocument, name: str) -> dict[str, Any]:
    (record,) = document.get_record(name)
    return {str(key): value for key, value in record.extra_attributes}


def complaints(text: str) -> list[str]:
    """What the schema of the PROV-JSON submission and the package `prov` have against it."""
    schema = json.loads((files("prov.tests") / "schemas" / "prov-json.schema.json").read_text(encoding="utf-8"))
    found = [
        str(error.message)
        for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(json.loads(text))
    ]
    try:
        document = ProvDocument.deserialize(content=text, format="json")
        # Uniqueness of PROV-CONSTRAINTS (W3C, section 6): what is said twice of one name must agree.
        document.unified()
        if ProvDocument.deserialize(content=document.serialize(format="json"), format="json") != document:
            found.append("it does not come back as it was")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def test_the_public_tool_and_the_schema_of_the_submission_accept_it(release: Path) -> None:
    assert complaints((release / PROVENANCE_FILE).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph.update(shard={}),
        lambda graph: graph["used"]["_:used0"].pop("prov:entity"),
        lambda graph: graph["prefix"].pop("release"),
        lambda graph: graph["entity"].update({next(iter(graph["activity"])): {}}),
        lambda graph: graph["wasDerivedFrom"].update({"_:x": {"prov:generatedEntity": "nowhere:x"}}),
    ],
)
def test_a_broken_graph_would_be_refused(release: Path, change: Any) -> None:
    graph = json.loads((release / PROVENANCE_FILE).read_text(encoding="utf-8"))
    change(graph)
    assert complaints(json.dumps(graph))


def test_every_name_that_a_relation_has_is_there_and_of_its_kind(release: Path) -> None:
    document = read(release)
    names = {kind: {str(item.identifier) for item in document.get_records(kind)} for kind in _KINDS}
    for relation, (first, second) in _RELATIONS.items():
        for one, other in ends(document, relation):
            assert one in names[first], (relation, one)
            assert other in names[second], (relation, other)
    generated = [made for made, _ in ends(document, ProvGeneration)]
    assert len(generated) == len(set(generated))
    for made, source in ends(document, ProvDerivation):
        assert made not in reached(document, source, ProvDerivation), "nothing is made from itself"


_KINDS = (ProvEntity, ProvActivity, ProvAgent)
_RELATIONS = {
    ProvUsage: (ProvActivity, ProvEntity),
    ProvGeneration: (ProvEntity, ProvActivity),
    ProvDerivation: (ProvEntity, ProvEntity),
    ProvAssociation: (ProvActivity, ProvAgent),
    ProvMembership: (ProvEntity, ProvEntity),
}


def test_from_every_file_there_is_a_way_to_the_dataset_and_the_checkpoint(release: Path, parts: Parts) -> None:
    document = read(release)
    stated = json.loads((release / "release.json").read_text(encoding="utf-8"))
    members = {file for _, file in ends(document, ProvMembership)}
    names = {f"release:{name}" for name in stated["files"] if name != PROVENANCE_FILE}
    assert members == names
    dataset, checkpoint = (
        f"synthaug:dataset-{parts.source.digest}",
        f"synthaug:checkpoint-{stated['checkpoint_digest']}",
    )
    for name in names:
        back = reached(document, name, ProvGeneration, ProvUsage)
        assert {dataset, checkpoint} <= back, name
        assert values(document, name)["synthaug:sha256"] == digest_file(release / name.removeprefix("release:"))
        assert any(agent == "synthaug:software-synthaug-0.1.0" for agent in _agents(document, name))


def _agents(document: ProvDocument, name: str) -> set[str]:
    activities = {activity for made, activity in ends(document, ProvGeneration) if made == name}
    return {agent for activity, agent in ends(document, ProvAssociation) if activity in activities}


def test_a_shard_is_derived_from_what_it_holds_and_from_nothing_else(release: Path, parts: Parts) -> None:
    document = read(release)
    manifest = pd.read_parquet(release / "manifest.parquet")
    dataset = f"synthaug:dataset-{parts.source.digest}"
    rounds = [f"synthaug:samples-{batch.digest}" for batch in parts.batches]
    derived: dict[str, set[str]] = {}
    for made, source in ends(document, ProvDerivation):
        derived.setdefault(made, set()).add(source)
    for path in sorted((release / "data").glob("*.parquet")):
        name = f"data/{path.name}"
        flags = pq.read_table(path)["is_synthetic"].to_pylist()
        mine = manifest[manifest["shard"] == name]
        # Round 0 drew the indices 0 to 19 of each class, round 1 the others.
        expected = {rounds[int(index >= 20)] for index in mine["class_index"]}
        if not all(flags):
            expected.add(dataset)
        assert derived.get(f"release:{name}", set()) == expected
        facts = values(document, f"release:{name}")
        assert (facts["synthaug:n_real"], facts["synthaug:n_synthetic"]) == (flags.count(False), flags.count(True))
        if len(mine):
            assert f"synthaug:checkpoint-{parts.checkpoint.digest}" in reached(
                document, f"release:{name}", ProvDerivation
            )


def test_the_facts_of_the_steps(release: Path, parts: Parts) -> None:
    document = read(release)
    dataset = values(document, f"synthaug:dataset-{parts.source.digest}")
    assert dataset["synthaug:licence"] == "CC-BY-4.0"
    assert dataset["synthaug:fingerprint"] == parts.source.digest
    assert dataset["synthaug:n_images"] == parts.source.n_images
    training = values(document, f"synthaug:train-stage-{parts.checkpoint.digest}")
    assert (training["synthaug:n_training_images"], training["synthaug:images_drawn"]) == (50, 4096)
    for batch in parts.batches:
        drawing = values(document, f"synthaug:sample-stage-{batch.digest}")
        assert (drawing["synthaug:seed"], drawing["synthaug:steps"], drawing["synthaug:guidance"]) == (0, 20, 1.5)
        assert drawing["synthaug:solver"] == "dpm++ 2m"
    collection = values(document, "release:dataset")
    assert collection["synthaug:manifest_sha256"] == digest_file(release / "manifest.parquet")
    if (release / VERDICT_FILE).exists():
        (verdict,) = [e for e in document.get_records(ProvEntity) if "verdict-" in str(e.identifier)]
        assert values(document, str(verdict.identifier))["synthaug:outcome"] == "harms"


def test_no_image_id_no_path_and_no_time(release: Path, parts: Parts) -> None:
    text = (release / PROVENANCE_FILE).read_text(encoding="utf-8")
    assert "real-" not in text
    assert "syn-" not in text
    assert str(parts.source.directory.parent) not in text
    assert not re.search(r"startTime|endTime|20\d\d-\d\d|seconds", text)


def test_a_base_is_named_without_its_folder(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    (tmp_path / "secret" / "digits-base").mkdir(parents=True)
    settings = parts.config.train.model_copy(update={"base": str(tmp_path / "secret" / "digits-base")})
    made = Parts(**{**parts.__dict__, "config": parts.config.model_copy(update={"train": settings})})
    release = made.release(tmp_path / "release").directory
    assert "secret" not in (release / PROVENANCE_FILE).read_text(encoding="utf-8")
    document = read(release)
    base = f"synthaug:base-of-{parts.checkpoint.digest}"
    assert values(document, base)["prov:label"] == "model that training started from: digits-base"
    # Samples lie in the third shard, real images in the others.
    assert base in reached(document, "release:data/train-00002.parquet", ProvDerivation)
    for shard in ("release:data/train-00001.parquet", "release:data/test-00000.parquet"):
        assert base not in reached(document, shard, ProvDerivation)


# What a job takes over from an earlier one


def trained_with(document: ProvDocument, digest: str) -> set[str]:
    """What the training of a checkpoint used itself."""
    return {entity for stage, entity in ends(document, ProvUsage) if stage == f"synthaug:train-stage-{digest}"}


def test_a_checkpoint_that_nothing_was_trained_after_did_not_use_the_images_that_came_since(tmp_path: Path) -> None:
    parts = make_unlearned_parts(tmp_path / "in")
    release = parts.release(tmp_path / "release").directory
    assert complaints((release / PROVENANCE_FILE).read_text(encoding="utf-8")) == []
    document, digest = read(release), parts.checkpoint.digest
    images = f"synthaug:images-of-{digest}"
    assert trained_with(document, digest) == {images}
    assert values(document, f"synthaug:train-stage-{digest}")["synthaug:n_training_images"] == 41
    assert values(document, images)["synthaug:n_images"] == 41
    # They are some of the dataset's; and the same training on these splits would have used them whole.
    dataset, split = f"synthaug:dataset-{parts.source.digest}", f"synthaug:split-{parts.splits.digest}"
    assert dataset in reached(document, f"synthaug:checkpoint-{digest}", ProvDerivation)
    trained = make_parts(tmp_path / "in").release(tmp_path / "trained").directory
    assert trained_with(read(trained), digest) == {dataset, split}


def test_of_a_checkpoint_whose_list_of_images_is_gone_nothing_is_claimed(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    (parts.checkpoint.directory / SEEN_FILE).unlink()
    document = read(parts.release(tmp_path / "release").directory)
    digest = parts.checkpoint.digest
    assert trained_with(document, digest) == {f"synthaug:images-of-{digest}"}
    assert "synthaug:n_training_images" not in values(document, f"synthaug:train-stage-{digest}")


def based(parts: Parts) -> Parts:
    settings = parts.config.train.model_copy(update={"base": "clinic/base", "base_revision": "c" * 40})
    return replace(parts, config=parts.config.model_copy(update={"train": settings}))


def test_a_base_belongs_to_the_training_that_started_from_it(tmp_path: Path) -> None:
    parts = based(make_grown_parts(tmp_path / "in"))
    document = read(parts.release(tmp_path / "release").directory)
    (old,), new = parts.earlier, parts.checkpoint
    base = f"synthaug:base-of-{old.digest}"
    assert base in trained_with(document, old.digest)
    assert trained_with(document, new.digest) == {
        f"synthaug:dataset-{parts.source.digest}",
        f"synthaug:split-{parts.splits.digest}",
        f"synthaug:checkpoint-{old.digest}",
    }
    assert base in reached(document, f"synthaug:checkpoint-{new.digest}", ProvDerivation)
    assert len([item for item in document.get_records(ProvEntity) if "base-of-" in str(item.identifier)]) == 1


def test_a_warm_training_that_came_to_nothing_better_made_nothing_from_itself(tmp_path: Path) -> None:
    parts = based(make_parts(tmp_path / "in"))
    digest = parts.checkpoint.digest
    same = replace(parts, checkpoint=parts.checkpoint.model_copy(update={"started_from": digest}))
    release = same.release(tmp_path / "release").directory
    assert complaints((release / PROVENANCE_FILE).read_text(encoding="utf-8")) == []
    document, checkpoint = read(release), f"synthaug:checkpoint-{digest}"
    assert all(made != source for made, source in ends(document, ProvDerivation))
    assert checkpoint not in trained_with(document, digest)
    # The weights are those that came of the base.
    assert f"synthaug:base-of-{digest}" in trained_with(document, digest)


def test_who_drew_the_samples_is_said_with_the_version_where_it_is_known(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    first, second = parts.batches
    first = first.model_copy(update={"environment": {**first.environment, "synthaug": "0.0.9"}})
    document = read(replace(parts, batches=(first, second)).release(tmp_path / "release").directory)
    agents = {
        digest: {a for stage, a in ends(document, ProvAssociation) if stage == f"synthaug:sample-stage-{digest}"}
        for digest in (first.digest, second.digest)
    }
    assert "synthaug:software-synthaug-0.0.9" in agents[first.digest]
    assert "synthaug:software-synthaug" in agents[second.digest]
