"""A release in a training loop: what an epoch holds, that it comes again alike, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import datasets
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from synthaug.digest import digest_file
from synthaug.errors import LoaderError, VerificationError
from synthaug.formats.manifest import write_release_file
from synthaug.loaders import (
    ReleaseDataset,
    ReleaseStream,
    SyntheticReplace,
    as_arrays,
    as_frame,
    augment,
    balanced_loader,
    constant,
    decay_to_real,
    mix_then_real,
)
from synthaug.loaders import rows as rows_module
from synthaug.loaders.mixing import Draw, Mix
from synthaug.loaders.rows import open_rows
from synthaug.records import DONE_FILE, SPLITS_FILE
from tests.release_parts import CLASSES, N_REAL, Parts, make_parts
from tests.verdict_parts import make_verdict

# Real images per class, and synthetic ones in the release.
REAL, MADE = N_REAL["train"], (0, 18, 22)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def release(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.release(tmp_path_factory.mktemp("release") / "release").directory


@pytest.fixture(scope="module")
def without_real(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "release"
    return parts.release(folder, include_real=False).directory


@pytest.fixture(scope="module")
def loaded(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return datasets.load_dataset(str(release), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def copied(release: Path, tmp_path: Path) -> Path:
    shutil.copytree(release, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def verdict_release(parts: Parts, tmp_path: Path) -> Callable[..., Path]:
    """A release with a verdict; settings go into its recipe, `doses` into its classes."""

    def make(outcome: str = "helps", *, doses: tuple[int, ...] = (5, 40), best_real: str = "x", **recipe: Any) -> Path:
        settings = {"loss": "plain", "strong": False, "mix": "none", "weight_decay": 0.05, "pretrain": False, **recipe}
        verdict = make_verdict(
            outcome, names=list(CLASSES), recipe_settings={"added_weight": 1.0, **settings}, best_real=best_real,
            class_names=CLASSES, directory=tmp_path / "verdict",
        )  # fmt: skip
        classes = [item.model_copy(update={"dose": n}) for item, n in zip(verdict.classes, doses, strict=False)]
        verdict = verdict.model_copy(update={"classes": tuple(classes)})
        verdict.directory.mkdir(exist_ok=True)
        (verdict.directory / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
        return parts.release(tmp_path / "with-verdict", verdict=verdict).directory

    return make


def spotted() -> A.Compose:
    """Much randomness: every draw shows."""
    return A.Compose(
        [A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=1), A.GaussNoise(p=0.5), A.ToFloat(), ToTensorV2()]
    )


def with_global_generators(image: np.ndarray) -> torch.Tensor:
    """A function of the user's that draws from all three global generators."""
    noise = random.random() + np.random.rand() + torch.rand(1).item()  # noqa: NPY002
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / 255 + noise


def batches(loader: Any) -> list[Any]:
    return [[value.clone() if hasattr(value, "clone") else value for value in batch] for batch in loader]


def same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(ones, others, strict=True)
    )


# What there is


@pytest.mark.parametrize("pixels", ["grey8", "rgb8", "grey16", "rgb16", "channels", "float"])
def test_every_image_comes_out_as_it_was_stored(pixels: str, tmp_path: Path) -> None:
    made = make_parts(tmp_path / "in", pixels).release(tmp_path / "release").directory
    ours = ReleaseDataset(made, synthetic_ratio=math.inf, transform=lambda image: image, output="dict")
    table = datasets.load_dataset(str(made), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(ours) == len(table) == 90
    # `datasets` makes int64 of whole numbers in arrays.
    dtype = None if isinstance(table.features["image"], datasets.Image) else table.features["image"].dtype
    for item, row in zip((ours[i] for i in range(90)), table, strict=True):
        stored = np.asarray(row["image"], dtype)
        assert np.array_equal(item["image"], stored if stored.ndim == 3 else stored[..., None])
        assert item["image"].dtype == stored.dtype
        assert item["image"].flags.writeable
        assert (item["label"], item["is_synthetic"]) == (row["label"], row["is_synthetic"])
        assert item["sample_id"] == (row["sample_id"] if row["is_synthetic"] else row["source_id"])
    # The same from what `load_dataset` gives, and after a journey to another process.
    for other in (
        ReleaseDataset(table, synthetic_ratio=math.inf, transform=_same_image),
        pickle.loads(pickle.dumps(ReleaseDataset(made, synthetic_ratio=math.inf, transform=_same_image))),  # noqa: S301
    ):
        assert all(np.array_equal(other[i][0], ours[i]["image"]) for i in (0, 49, 50, 89))


def _same_image(image: np.ndarray) -> np.ndarray:
    return image


def test_shards_that_another_tool_wrote_anew_are_read_too(copied: Path, release: Path) -> None:
    import pyarrow.parquet as pq

    values = json.loads((copied / "release.json").read_text())
    values.pop("digest")
    for name in values["files"]:
        if name.startswith("data/"):
            pq.write_table(pq.read_table(copied / name), copied / name, compression="zstd", row_group_size=7)
            values["files"][name] = {"size": (copied / name).stat().st_size, "sha256": digest_file(copied / name)}
    write_release_file(copied, values)
    ours, others = ReleaseDataset(copied), ReleaseDataset(release)
    assert all(torch.equal(ours[i][0], others[i][0]) for i in range(len(others)))


@pytest.mark.parametrize("pixels", ["channels", "float"])
def test_arrays_that_are_more_than_is_kept_are_unpacked_once(
    pixels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_parts(tmp_path / "in", pixels).release(tmp_path / "release").directory
    kept = batches(balanced_loader(made))
    unpacked = []
    monkeypatch.setattr("synthaug.loaders.rows._KEPT_BYTES", 1)
    read = rows_module._unpacked
    monkeypatch.setattr(rows_module, "_unpacked", lambda *given: unpacked.append(given) or read(*given))
    loader = balanced_loader(made)
    for epoch in range(3):
        loader.set_epoch(0)
        assert same(batches(loader), kept), epoch
    assert len(unpacked) == 3  # the three shards have one row group each
    assert same(batches(balanced_loader(made, num_workers=2)), kept)
    monkeypatch.setattr("os.pwrite", _disk_is_full)
    with pytest.raises(LoaderError, match=r"cannot be unpacked into .*: No space left.*TMPDIR"):
        batches(balanced_loader(made))


def _disk_is_full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_without_a_transform_images_are_tensors_from_0_to_1(tmp_path: Path) -> None:
    for pixels in ("grey8", "grey16", "float"):
        parts = make_parts(tmp_path / pixels, pixels)
        release = parts.release(tmp_path / pixels / "release").directory
        image = ReleaseDataset(release)[0][0]
        native = ReleaseDataset(release).native(0)
        assert image.shape == (1, 8, 8)
        assert image.dtype == torch.float32
        expected = (parts.source.pixels.to_unit(native) + 1) / 2
        assert np.allclose(image.numpy().transpose(1, 2, 0), expected, atol=1e-6)


# Mixing


def mix_of(real: list[int], made: list[int], ratio: float = 1.0, **changes: Any) -> Mix:
    labels = np.repeat(np.arange(len(real)), real)
    names = tuple(f"class {i}" for i in range(len(real)))
    return Mix(names, labels, np.asarray(made), np.full(len(real), ratio), **changes)


COUNTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, ratio=st.floats(0, 5), less=st.floats(0, 1), epoch=st.integers(0, 20))
def test_doses_are_what_the_formula_says_and_smaller_ones_are_prefixes(
    counts: list[tuple[int, int]], ratio: float, less: float, epoch: int
) -> None:
    real, made = [n for n, _ in counts], [n for _, n in counts]
    mix, smaller = mix_of(real, made, ratio), mix_of(real, made, ratio * less)
    for label, (n_real, n_made) in enumerate(counts):
        assert mix.dose(epoch)[label] == min(n_made, math.floor(ratio * n_real + 0.5))
    members = mix.members(epoch).tolist()
    assert set(smaller.members(epoch).tolist()) <= set(members)
    assert members == sorted(set(members))
    first = sum(real)
    for label, n_made in enumerate(made):
        chosen = [m - first for m in members if first <= m < first + n_made]
        assert chosen == list(range(mix.dose(epoch)[label]))
        assert all(mix.label(first + m) == label for m in chosen)
        first += n_made


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, ratio=st.sampled_from([0.0, 1.0, math.inf]), epoch=st.integers(0, 3), weight=st.floats(0.1, 0.9))
def test_balanced_sampling_draws_classes_equally_and_images_evenly(
    counts: list[tuple[int, int]], ratio: float, epoch: int, weight: float
) -> None:
    mix = mix_of([n for n, _ in counts], [n for _, n in counts], ratio, sampling="balanced", seed=epoch)
    drawn, copies = mix.draws(epoch)
    assert len(drawn) == len(mix.members(epoch))
    per_class = Counter(mix.label(i) for i in drawn.tolist())
    assert max(per_class.values()) - min(per_class[label] for label in range(len(counts))) <= 1
    # Of a class every image comes once before any comes twice, and its copies are numbered.
    times = Counter(drawn.tolist())
    for label in range(len(counts)):
        mine = [times[m] for m in mix.members(epoch).tolist() if mix.label(m) == label]
        assert max(mine) - min(mine) <= 1
    assert len(set(zip(drawn.tolist(), copies.tolist(), strict=True))) == len(drawn)
    # A lower weight of synthetic images is in how often they are drawn.
    lighter = mix_of(
        [n for n, _ in counts], [n for _, n in counts], ratio, sampling="balanced", synthetic_weight=weight
    )
    drawn, _ = lighter.draws(epoch)
    n_real, dose = lighter.n_real, lighter.dose(epoch)
    for label in range(len(counts)):
        mine = drawn[[lighter.label(i) == label for i in drawn.tolist()]]
        share = (mine >= n_real.sum()).sum()
        expected = len(mine) * weight * dose[label] / (n_real[label] + weight * dose[label])
        assert abs(share - expected) <= 0.5 + 1e-9


def test_an_epoch_of_the_release(release: Path) -> None:
    loader = balanced_loader(release, batch_size=16, synthetic_ratio=1.0, output="dict")
    seen = [
        (label, made, name)
        for batch in loader
        for label, made, name in zip(
            batch["label"].tolist(), batch["is_synthetic"].tolist(), batch["sample_id"], strict=True
        )
    ]
    assert Counter((label, made) for label, made, _ in seen) == {
        (0, False): 30, (1, False): 12, (2, False): 8, (1, True): 12, (2, True): 8,
    }  # fmt: skip
    assert len({name for *_, name in seen}) == 70
    # The synthetic ones are those of the lowest ranks.
    manifest = _manifest(release)
    wanted = {row["sample_id"] for row in manifest if row["rank"] < REAL[row["label"]]}
    assert {name for _, made, name in seen if made} == wanted
    assert [row["n_synthetic"] for row in loader.table()] == [0, 12, 8]


def _manifest(release: Path) -> list[dict[str, Any]]:
    from synthaug.formats.manifest import read_manifest

    return list(read_manifest(release / "manifest.parquet"))


def test_ratios_by_class_and_all_there_are(release: Path) -> None:
    table = balanced_loader(release, synthetic_ratio={"two": 2.0}).table()
    assert [(row["n_synthetic"], row["short"]) for row in table] == [(0, False), (0, False), (16, False)]
    assert [row["n_synthetic"] for row in balanced_loader(release, synthetic_ratio=math.inf).table()] == list(MADE)
    table = balanced_loader(release, synthetic_ratio=3).table()
    assert [(row["n_synthetic"], row["short"]) for row in table] == [(0, False), (18, True), (22, True)]


def test_schedules(release: Path) -> None:
    def of(schedule: Any) -> list[int]:
        loader = balanced_loader(release, schedule=schedule)
        return [len({i for b in loader.batch_sampler for i in b}) - 50 for e in range(5) if not loader.set_epoch(e)]

    assert of(constant()) == [20] * 5
    assert of(constant(0.5)) == [10] * 5
    assert of(mix_then_real(2)) == [20, 20, 0, 0, 0]
    assert of(decay_to_real(4)) == [20, 15, 10, 5, 0]
    assert of(lambda epoch: epoch % 2) == [0, 20, 0, 20, 0]


def test_weights_are_those_of_the_trial(release: Path) -> None:
    loader = balanced_loader(release, synthetic_weight=0.5, class_weights=True, output="dict", batch_size=70)
    (batch,) = loader
    assert batch["weight"].dtype == torch.float32
    # Weighted counts 30, 12 + 6, 8 + 4; each class counts for as much.
    for label, count in enumerate((30, 18, 12)):
        mine = batch["label"] == label
        assert batch["weight"][mine].sum().item() == pytest.approx(20, rel=1e-5)
        real = batch["weight"][mine & ~batch["is_synthetic"]]
        assert real.tolist() == pytest.approx([60 / 3 / count] * len(real))
    prior = balanced_loader(release).log_prior().exp()
    assert prior.tolist() == pytest.approx([30 / 70, 24 / 70, 16 / 70])
    assert balanced_loader(release, sampling="balanced").log_prior().exp().tolist() == pytest.approx([1 / 3] * 3)


# The plain real dataset


def test_ratio_0_is_bit_for_bit_a_plain_loader_over_the_real_images(release: Path, loaded: Any) -> None:
    class PlainReal(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.rows = loaded["train"].filter(lambda row: not row["is_synthetic"])

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Any:
            row = self.rows[i]
            image = np.array(row["image"])[None]
            return torch.from_numpy(image).to(torch.float32) / 255, row["label"]

    ours = balanced_loader(release, batch_size=16, synthetic_ratio=0, seed=11)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(11 + epoch)
        plain = DataLoader(PlainReal(), 16, shuffle=True, generator=generator)
        assert same(batches(ours), batches(plain))
    ordered = balanced_loader(release, batch_size=16, synthetic_ratio=0, shuffle=False)
    assert same(batches(ordered), batches(DataLoader(PlainReal(), 16)))


# Again alike


@pytest.mark.parametrize("transform", [spotted(), with_global_generators], ids=["albumentations", "a function"])
def test_workers_change_nothing_and_epochs_differ(release: Path, transform: Any) -> None:
    def epochs(workers: int, seed: int = 5) -> list[Any]:
        loader = balanced_loader(release, batch_size=16, transform=transform, num_workers=workers, seed=seed)
        return [batches(loader), batches(loader)]

    none = epochs(0)
    assert not same(none[0], none[1])
    for workers in (1, 2):
        assert all(same(a, b) for a, b in zip(none, epochs(workers), strict=True))
    assert not same(none[0], epochs(0, seed=6)[0])


def test_an_image_is_augmented_alike_whatever_its_batch_and_differently_in_each_epoch(release: Path) -> None:
    by_id: dict[int, dict[str, torch.Tensor]] = {}
    for size in (7, 50):
        loader = balanced_loader(release, batch_size=size, transform=spotted(), output="dict")
        by_id[size] = {
            name: image for batch in loader for name, image in zip(batch["sample_id"], batch["image"], strict=True)
        }
    assert all(torch.equal(image, by_id[50][name]) for name, image in by_id[7].items())
    dataset = ReleaseDataset(release, transform=spotted())
    looks = [dataset[Draw(3, epoch, repeat)][0] for epoch in range(3) for repeat in range(3)]
    assert len({look.numpy().tobytes() for look in looks}) == 9


def test_persistent_workers_hear_of_the_epoch(release: Path) -> None:
    options = {"persistent_workers": True}
    stay = balanced_loader(
        release, transform=spotted(), num_workers=1, schedule=mix_then_real(1), loader_options=options
    )
    fresh = balanced_loader(release, transform=spotted(), schedule=mix_then_real(1))
    for _ in range(3):
        assert same(batches(stay), batches(fresh))


def test_a_pass_that_is_broken_off_leaves_persistent_workers_in_order(release: Path) -> None:
    options = {"persistent_workers": True}
    stay = balanced_loader(release, batch_size=8, transform=spotted(), num_workers=2, loader_options=options)
    next(iter(stay))
    fresh = balanced_loader(release, batch_size=8, transform=spotted())
    fresh.set_epoch(1)
    assert same(batches(stay), batches(fresh))


def test_global_generators_of_the_training_loop_are_left_alone(release: Path) -> None:
    dataset = ReleaseDataset(release, transform=with_global_generators)

    def state() -> tuple[Any, ...]:
        arrays = np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002
        return random.getstate(), *arrays

    before = state()
    assert not torch.equal(dataset[0][0], dataset[1][0])
    dataset.__getitems__([2, 3])
    # Without a generator of its own a DataLoader draws a seed from torch's.
    list(DataLoader(dataset, 8, generator=torch.Generator()))
    list(ReleaseStream(release, transform=with_global_generators))
    assert state() == before


def test_a_strict_pipeline_and_a_single_step_are_transforms_too(release: Path) -> None:
    strict = A.Compose([A.HorizontalFlip(p=1), A.ToFloat(), ToTensorV2()], strict=True)
    image = ReleaseDataset(release, transform=strict)[0][0]
    assert torch.allclose(image.flip(2), ReleaseDataset(release)[0][0])
    alone = ReleaseDataset(release, transform=A.HorizontalFlip(p=1))[0][0]
    assert np.array_equal(alone[:, ::-1], ReleaseDataset(release).native(0))


def test_the_users_own_transform_keeps_its_generators(release: Path) -> None:
    transform = A.Compose([A.RandomBrightnessContrast(p=1)], seed=4)
    image = np.full((8, 8, 1), 100, np.uint8)
    expected = [A.Compose([A.RandomBrightnessContrast(p=1)], seed=4)(image=image)["image"]]
    batches(balanced_loader(release, transform=transform))
    assert np.array_equal(transform(image=image)["image"], expected[0])


@pytest.mark.parametrize(("taken", "workers"), [(0, 0), (1, 0), (3, 0), (5, 0), (3, 2)])
def test_a_resumed_epoch_equals_an_uninterrupted_one(release: Path, workers: int, taken: int) -> None:
    def make() -> Any:
        return balanced_loader(
            release, batch_size=16, transform=spotted(), num_workers=workers, sampling="balanced", seed=2
        )

    whole = make()
    first, second, third = batches(whole), batches(whole), batches(whole)
    loader = make()
    assert same(batches(loader), first)
    under_way = iter(loader)
    for _ in range(taken):
        next(under_way)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    if taken < len(second):
        assert same(batches(resumed), second[taken:])
    assert same(batches(resumed), third)


def test_a_state_of_another_loader_is_refused(release: Path) -> None:
    state = balanced_loader(release, batch_size=16).state_dict()
    for changes in ({"batch_size": 8}, {"seed": 1}, {"synthetic_ratio": 0.5}, {"schedule": decay_to_real(3)}):
        with pytest.raises(LoaderError, match="another order"):
            balanced_loader(release, **{"batch_size": 16, **changes}).load_state_dict(state)
    with pytest.raises(LoaderError, match="not what state_dict"):
        balanced_loader(release).load_state_dict({})


def test_each_pass_is_the_next_epoch_also_after_one_that_was_broken_off(release: Path) -> None:
    loader, other = balanced_loader(release, batch_size=16), balanced_loader(release, batch_size=16)
    next(iter(loader))
    other.set_epoch(1)
    assert same(batches(loader), batches(other))
    assert (loader.epoch, loader.state_dict()["batch"]) == (2, 0)


def test_accelerate_passes_over_batches_and_prepares(release: Path) -> None:
    """What the Hugging Face Trainer does with a loader when it goes on in the middle of an epoch."""
    from accelerate import Accelerator, skip_first_batches

    def make() -> Any:
        return balanced_loader(release, batch_size=16, transform=spotted())

    plain = make()
    epochs = [batches(plain) for _ in range(3)]
    loader = make()
    loader.set_epoch(2)
    assert same(batches(skip_first_batches(loader, 2)), epochs[2][2:])
    prepared = Accelerator(cpu=True).prepare(make())
    for epoch in (0, 1):
        prepared.set_epoch(epoch)
        assert same(batches(prepared), epochs[epoch])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_an_epoch_and_no_image_comes_twice(release: Path, world_size: int) -> None:
    alone = [draw for batch in balanced_loader(release, batch_size=4).batch_sampler for draw in batch]
    left_out = set()
    for epoch in range(8):
        shares = []
        for rank in range(world_size):
            loader = balanced_loader(release, batch_size=4, rank=rank, world_size=world_size)
            loader.set_epoch(epoch)
            shares.append([draw.number for batch in loader.batch_sampler for draw in batch])
            assert len(loader) == len(list(loader.batch_sampler))
        together = [number for share in shares for number in share]
        assert len(set(together)) == len(together) == 70 // world_size * world_size
        assert len({len(share) for share in shares}) == 1
        left_out |= {draw.number for draw in alone} - set(together)
    # What is left over where it does not come out even changes from epoch to epoch.
    assert len(left_out) > 1 if 70 % world_size else not left_out


def test_rank_comes_from_torch_distributed(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as distributed

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch puts its own there and leaves it

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        sampler = balanced_loader(release).batch_sampler
        assert (sampler.rank, sampler.world_size) == (0, 1)
    finally:
        distributed.destroy_process_group()


# The verdict


def test_follow_verdict_takes_doses_and_recipe(verdict_release: Callable[..., Path]) -> None:
    # The trial chose a lower weight and class weights.
    folder = verdict_release(loss="class weights", added_weight=0.3, mix="mixup", strong=True)
    loader = balanced_loader(folder, follow_verdict=True, output="dict")
    assert [row["n_synthetic"] for row in loader.table()] == [0, 5, 22]  # of 40 there are 22
    assert loader.dataset.mix.class_weights
    assert loader.dataset.mix.synthetic_weight == 0.3
    assert any("mixup" in note for note in loader.left_to_you)
    with pytest.raises(LoaderError, match=r"samples have weights.*output='dict'"):
        balanced_loader(folder, follow_verdict=True)
    with pytest.raises(LoaderError, match=r"synthetic_ratio would change it"):
        balanced_loader(folder, follow_verdict=True, synthetic_ratio=1.0)


def test_a_verdict_that_the_release_does_not_list_is_another_one_s(
    parts: Parts, verdict_release: Callable[..., Path], tmp_path: Path
) -> None:
    other = parts.release(tmp_path / "without").directory
    shutil.copy(verdict_release() / "verdict.json", other / "verdict.json")
    with pytest.raises(LoaderError, match="carries no verdict"):
        balanced_loader(other, follow_verdict=True)


def test_a_recipe_that_ends_with_real_images_needs_the_number_of_epochs(verdict_release: Callable[..., Path]) -> None:
    folder = verdict_release(pretrain=True, loss="oversampling")
    with pytest.raises(LoaderError, match="say how many epochs"):
        balanced_loader(folder, follow_verdict=True)
    loader = balanced_loader(folder, follow_verdict=True, epochs=5)
    assert [int(loader.dataset.mix.dose(epoch).sum()) for epoch in range(5)] == [27, 27, 0, 0, 0]
    assert loader.dataset.mix.sampling == "balanced"


@pytest.mark.parametrize("outcome", ["no evidence", "harms"])
def test_a_verdict_that_does_not_help_takes_no_synthetic_image(
    verdict_release: Callable[..., Path], outcome: str
) -> None:
    folder = verdict_release(outcome, doses=(7, 7), best_real="strong augmentation + oversampling")
    loader = balanced_loader(folder, follow_verdict=True)
    assert sum(row["n_synthetic"] for row in loader.table()) == 0
    assert loader.dataset.mix.sampling == "balanced"
    assert "strong augmentation" in loader.left_to_you[0]


def test_a_class_that_the_verdict_does_not_speak_of(verdict_release: Callable[..., Path]) -> None:
    folder = verdict_release(doses=(7,))
    with pytest.raises(LoaderError, match=r"class 'two' has synthetic images, but the verdict .* does not speak of it"):
        balanced_loader(folder, follow_verdict=True)


def test_no_verdict(release: Path, loaded: Any, verdict_release: Callable[..., Path]) -> None:
    with pytest.raises(LoaderError, match="carries no verdict"):
        balanced_loader(release, follow_verdict=True)
    with pytest.raises(LoaderError, match="needs the release as a directory"):
        balanced_loader(loaded, follow_verdict=True)
    broken = verdict_release()
    (broken / "verdict.json").write_text("{" * (broken / "verdict.json").stat().st_size)
    with pytest.raises(VerificationError, match=r"verdict\.json cannot be read"):
        balanced_loader(broken, follow_verdict=True)


# Real images from elsewhere


def real_images(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    import pandas as pd

    table = pd.read_parquet(parts.splits.directory / SPLITS_FILE)
    table = table[(table["split"] == "train") & table["held_back"].isna()]
    return parts.images[table["row"]], table["label"].to_numpy()


class Own(torch.utils.data.Dataset[Any]):
    """A user's dataset; its classes are in an order of their own."""

    classes: Any = ("two", "zero", "one")

    def __init__(self, parts: Parts, form: Callable[[np.ndarray], Any] = lambda image: image) -> None:
        self.images, labels = real_images(parts)
        self.targets = [self.classes.index(CLASSES[label]) for label in labels]
        self.form = form

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.form(self.images[i]), self.targets[i]


def test_real_images_that_the_release_has_not(parts: Parts, release: Path, without_real: Path, tmp_path: Path) -> None:
    expected = ReleaseDataset(release, transform=_same_image)
    run = _run_folder(parts, without_real, tmp_path / "run")
    images, labels = real_images(parts)
    features = datasets.Features({"pic": datasets.Image(), "what": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"pic": [Image.fromarray(image[..., 0]) for image in images], "what": [CLASSES[label] for label in labels]},
        features=features,
    )
    for real, more in (
        (Own(parts), {}),
        (Own(parts, lambda image: Image.fromarray(image[..., 0])), {}),
        (Own(parts, lambda image: torch.from_numpy(image.transpose(2, 0, 1))), {}),
        (run, {}),
        (table, {"real_columns": ("pic", "what")}),
    ):
        found = ReleaseDataset(without_real, real=real, transform=_same_image, **more)
        assert len(found) == 70
        assert all(
            np.array_equal(a[0], b[0]) and a[1] == b[1]
            for a, b in zip((found[i] for i in range(70)), (expected[i] for i in range(70)), strict=True)
        )


def _run_folder(parts: Parts, release: Path, run: Path) -> Path:
    """The stages that a release was made from, as the pipeline leaves them."""
    digest = json.loads((release / "release.json").read_text())["digest"]
    for stage, folder, record in (
        ("read", parts.source.directory, parts.source),
        ("split", parts.splits.directory, parts.splits),
    ):
        shutil.copytree(folder, run / f"stages/{stage}-1")
        done = {"stage": stage, "record": json.loads(record.model_dump_json())}
        (run / f"stages/{stage}-1" / DONE_FILE).write_text(json.dumps(done))
    (run / "stages/release-1").mkdir()
    done = {
        "stage": "release",
        "record": {"digest": digest},
        "key_parts": ["release", 2, parts.source.digest, parts.splits.digest],
    }
    (run / "stages/release-1" / DONE_FILE).write_text(json.dumps(done))
    return run


def test_real_images_that_cannot_be_taken(
    parts: Parts, release: Path, without_real: Path, loaded: Any, tmp_path: Path
) -> None:
    with pytest.raises(LoaderError, match=r"holds no real images .* Give them as real="):
        balanced_loader(without_real)
    with pytest.raises(LoaderError, match="is not a run folder"):
        balanced_loader(without_real, real=tmp_path)
    with pytest.raises(LoaderError, match="did not come out of run folder"):
        balanced_loader(release, real=_run_folder(parts, without_real, tmp_path / "run"))
    nameless = Own(parts)
    nameless.classes = None
    with pytest.raises(LoaderError, match="labels are matched by name"):
        balanced_loader(without_real, real=nameless)
    assert len(balanced_loader(without_real, real=nameless, real_classes=["two", "zero", "one"]).dataset) == 70
    nameless.targets = np.array(nameless.targets)[:, None]  # as MedMNIST has them
    assert len(balanced_loader(without_real, real=nameless, real_classes=["two", "zero", "one"]).dataset) == 70
    with pytest.raises(LoaderError, match=r"'Two' and the release 'two'"):
        balanced_loader(without_real, real=nameless, real_classes=["Two", "zero", "one"])
    with pytest.raises(LoaderError, match="images of class 'three', which the release has not"):
        balanced_loader(without_real, real=nameless, real_classes=["two", "three", "one"])
    with pytest.raises(LoaderError, match=r"labels from 0 to 2, but 2 class names"):
        balanced_loader(without_real, real=nameless, real_classes=["two", "zero"])
    empty = Own(parts)
    empty.images, empty.targets = empty.images[:0], []
    with pytest.raises(LoaderError, match="0 real images"):
        balanced_loader(without_real, real=empty)
    some = Own(parts)
    some.images = some.images[[target != 0 for target in some.targets]]
    some.targets = [target for target in some.targets if target]
    with pytest.raises(LoaderError, match=r"class 'two' has 0 real images .* and 22 synthetic ones"):
        balanced_loader(without_real, real=some)
    assert len(balanced_loader(without_real, real=some, synthetic_ratio={"one": 1.0}).dataset) == 42 + 12
    scaled = Own(parts, lambda image: image / np.float32(255))
    with pytest.raises(LoaderError, match=r"real images are float32 \[8, 8, 1\] and the synthetic ones uint8"):
        balanced_loader(without_real, real=scaled, transform=lambda image: image.astype(np.float32))
    with pytest.raises(LoaderError, match="holds rows marked is_synthetic"):
        balanced_loader(without_real, real=loaded["train"])
    with pytest.raises(LoaderError, match="real= has the splits train, validation, test"):
        balanced_loader(without_real, real=loaded)
    with pytest.raises(LoaderError, match="has no column pic; it has image, label"):
        balanced_loader(without_real, real=loaded["train"], real_columns=("pic", "label"))
    with pytest.raises(LoaderError, match=r"item 0 of .* is not \(image, label\)"):
        balanced_loader(without_real, real=[1, 2], real_classes=list(CLASSES))
    with pytest.raises(LoaderError, match="A stream has no length"):
        balanced_loader(without_real, real=iter([]))
    large = Own(parts, lambda image: image.repeat(2, 0).repeat(2, 1))
    with pytest.raises(LoaderError, match=r"do not fit into one batch|they do not"):
        balanced_loader(without_real, real=large)


# A dataset of the user's


def test_augment_appends_and_keeps_everything_else(parts: Parts, release: Path) -> None:
    own = Own(parts)
    both = augment(own, release)
    assert len(both) == 50 + 40
    assert all(both[i][0] is not None and np.array_equal(both[i][0], own[i][0]) for i in range(50))
    assert Counter(both[i][1] for i in range(50, 90)) == {2: 18, 0: 22}
    ours = ReleaseDataset(release, synthetic_ratio=math.inf, transform=_same_image)
    assert all(np.array_equal(both[i][0], ours[i][0]) for i in range(50, 90))
    assert both.is_synthetic.sum() == 40
    assert len(batches(DataLoader(both, 16, num_workers=1))) == 6
    assert len(augment(own, release, synthetic_ratio=1.0)) == 50 + 12 + 8
    assert len(augment(own, release, synthetic_ratio=0)) == 50


def test_augment_gives_synthetic_images_the_form_of_the_datasets(parts: Parts, release: Path) -> None:
    pil = augment(Own(parts, lambda image: Image.fromarray(image[..., 0])), release)
    assert isinstance(pil[60][0], Image.Image)
    flat = augment(Own(parts, lambda image: image[..., 0]), release)
    assert flat[60][0].shape == (8, 8)
    tensor = augment(Own(parts, lambda image: torch.from_numpy(image.transpose(2, 0, 1))), release)
    assert tensor[60][0].dtype == torch.uint8
    scaled = Own(parts, lambda image: torch.from_numpy(image.transpose(2, 0, 1)) / 255)
    with pytest.raises(LoaderError, match=r"are a Tensor of shape \[1, 8, 8\], float32.*uint8"):
        augment(scaled, release)
    assert augment(scaled, release, transform=None)[60][0].dtype == torch.float32
    scaled.transform = lambda image: torch.from_numpy(np.array(image)[None] / np.float32(255))
    assert torch.equal(augment(scaled, release)[60][0], augment(scaled, release, transform=None)[60][0])


def test_augment_takes_only_classes_the_dataset_has(parts: Parts, release: Path) -> None:
    class Some(Own):
        classes = ("two", "zero", "one", "lynx")

    both = augment(Some(parts), release)
    assert len(both) == 90
    two = Own(parts)
    keep = [i for i, target in enumerate(two.targets) if target]
    two.images, two.targets, two.classes = two.images[keep], [two.targets[i] - 1 for i in keep], ("zero", "one")
    assert Counter(augment(two, release)[i][1] for i in range(42, 60)) == {1: 18}
    with pytest.raises(LoaderError, match=r"class 'cat'.*not there"):
        augment(two, release, classes=["cat", "dog"])
    with pytest.raises(LoaderError, match="names must match exactly"):
        augment(two, release, classes=["zero", "One"])
    with pytest.raises(LoaderError, match="not \\(image, label\\)"):
        augment([1, 2, 3], release, classes=["zero", "one"])
    with pytest.raises(LoaderError, match="takes a map-style dataset"):
        augment(iter([]), release)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthetic_ratio": -0.5}, r"synthetic_ratio is -0\.5; it must be a number of at least 0"),
        ({"synthetic_ratio": math.nan}, "synthetic_ratio is nan"),
        ({"synthetic_ratio": "1"}, "synthetic_ratio is '1'"),
        ({"synthetic_ratio": {"tow": 1.0}}, "class 'tow', which is not there; is 'two' meant"),
        ({"synthetic_ratio": {"two": -1}}, "the ratio of class 'two' is -1"),
        ({"synthetic_weight": math.inf}, "synthetic_weight is infinite"),
        ({"synthetic_weight": 0.5}, "samples have weights"),
        ({"schedule": lambda epoch: math.nan if epoch == 7 else 1}, "the schedule gives nan for epoch 7"),
        ({"schedule": lambda epoch: 1 / (5 - epoch)}, "the schedule failed for epoch 5: ZeroDivisionError"),
        ({"schedule": 3}, "not callable"),
        ({"schedule": decay_to_real(0)}, "at least one epoch"),
        ({"sampling": "even"}, "'natural' or 'balanced'"),
        ({"output": "tuple"}, "'pair' or 'dict'"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "dev"}, "split 'dev' is none of"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 100, "drop_last": True}, "leaves out the only batch"),
        ({"num_workers": 71}, "num_workers is 71, but an epoch has 70 images"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"rank": 0}, "given together"),
        ({"sampling": "balanced", "shuffle": False}, "draws at random"),
        ({"loader_options": {"sampler": None}}, "which the loader makes itself"),
        ({"loader_options": {"persistent_workers": True}}, "DataLoader refuses these loader_options"),
        ({"transform": lambda image: None}, "returned nothing"),
        ({"transform": lambda image: (image, 1)}, "returned a tuple of 2 instead of one image"),
        ({"transform": lambda image: [image, image]}, "returned a list of 2 instead of one image"),
        ({"transform": 3}, "cannot be called"),
        ({"transform": lambda image: image.nothing}, r"fails on the first real image \(a ndarray of shape \[8, 8, 1\]"),
        ({"transform": lambda image: image.shape[0] / 0}, "ZeroDivisionError"),
        ({"transform": lambda image: Image.fromarray(image[..., 0])}, "cannot be put into a batch"),
        ({"synthetic_transform": lambda image: image[:4]}, "do not"),
        ({"transform": lambda image: image, "transform_input": "jpeg"}, "auto, array, tensor and pil"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_at_once(release: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        balanced_loader(release, **changes)


def test_a_transform_that_changes_labels_is_refused(release: Path) -> None:
    class Relabel(A.ImageOnlyTransform):
        def __call__(self, *_: Any, **data: Any) -> Any:
            return {**data, "label": [data["label"]] * 2}

    with pytest.raises(LoaderError, match="changed the label of a sample from 0 to"):
        balanced_loader(release, transform=A.Compose([Relabel(p=1)]))

    class Forget(A.ImageOnlyTransform):
        def __call__(self, *_: Any, **data: Any) -> Any:
            return {**data, "image": None}

    with pytest.raises(LoaderError, match="returned no image"):
        balanced_loader(release, transform=A.Compose([Forget(p=1)]))


def test_a_release_that_is_missing_or_half_written(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="is not a directory"):
        balanced_loader(tmp_path / "none")
    with pytest.raises(LoaderError, match="not a int"):
        balanced_loader(3)
    shard = next((copied / "data").glob("train-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(VerificationError, match=r"train-\d+\.parquet has \d+ bytes, but \d+ were written"):
        balanced_loader(copied)
    shard.unlink()
    with pytest.raises(VerificationError, match="is missing"):
        balanced_loader(copied)
    shard.write_bytes(whole)
    stated = (copied / "release.json").read_bytes()
    (copied / "release.json").write_bytes(stated.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(VerificationError, match="does not agree with its own digest"):
        balanced_loader(copied)
    (copied / "release.json").unlink()
    with pytest.raises(VerificationError):
        balanced_loader(copied)


def test_a_shard_that_is_not_listed(copied: Path, tmp_path: Path) -> None:
    values = json.loads((copied / "release.json").read_text())
    values.pop("digest")
    values["splits"]["train"]["shards"][0] = "../elsewhere.parquet"
    write_release_file(copied, values)
    with pytest.raises(VerificationError, match=r"speaks of \.\./elsewhere\.parquet, but does not list it"):
        balanced_loader(copied)


def test_the_next_run_does_not_change_a_training_under_way(release: Path, copied: Path, tmp_path: Path) -> None:
    link = tmp_path / "release"
    link.symlink_to(release)
    loader = balanced_loader(link, output="dict")
    link.unlink()
    link.symlink_to(copied)
    shutil.rmtree(copied)
    assert len([name for batch in loader for name in batch["sample_id"]]) == 70


def test_damage_of_the_same_size_is_found_by_verify_or_when_it_is_read(copied: Path) -> None:
    """A flipped byte in a picture: nothing is decoded when a loader is made, and nothing damaged is handed out."""
    shard = sorted((copied / "data").glob("train-*"))[1]
    data = bytearray(shard.read_bytes())
    place = data.index(b"IDAT") + 12
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match="another SHA-256"):
        balanced_loader(copied, verify=True)
    with pytest.raises(VerificationError, match=r"train-00001\.parquet is damaged: .*checksum"):
        batches(balanced_loader(copied))


def test_a_manifest_of_other_rows_is_found_at_once(copied: Path, release: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(copied / "manifest.parquet")
    values = json.loads((copied / "release.json").read_text())
    values.pop("digest")
    row = table.schema.get_field_index("row")
    for changed in (
        table.slice(1),
        table.set_column(row, "row", pa.array([0] * len(table), pa.int64())),
        table.set_column(row, "row", pa.array([10**6] * len(table), pa.int64())),
        table.set_column(table.schema.get_field_index("shard"), "shard", pa.array(["data/x"] * len(table))),
    ):
        pq.write_table(changed, copied / "manifest.parquet")
        size = (copied / "manifest.parquet").stat().st_size
        values["files"]["manifest.parquet"] = {"size": size, "sha256": digest_file(copied / "manifest.parquet")}
        write_release_file(copied, values)
        with pytest.raises(VerificationError, match="manifest"):
            balanced_loader(copied)
    assert len(open_rows(release).labels) == 90


# Streams


@pytest.fixture
def streamed(release: Path) -> Any:
    return datasets.load_dataset(str(release), streaming=True)


def ids(stream: Any, **options: Any) -> list[str]:
    return [name for batch in DataLoader(stream, **options) for name in batch["sample_id"]]


def test_a_stream_holds_the_same_images(release: Path, streamed: Any) -> None:
    dataset = ReleaseDataset(release, output="dict", transform=spotted())
    images = {dataset[i]["sample_id"]: dataset[i] for i in range(len(dataset))}
    assert len(images) == 70
    local = ReleaseStream(release, output="dict", transform=spotted())
    remote = ReleaseStream(streamed, output="dict", transform=_same_image, buffer=30)
    found = {item["sample_id"]: item for item in local}
    assert found.keys() == images.keys()
    assert all(torch.equal(found[name]["image"], images[name]["image"]) for name in found)
    plain = ReleaseDataset(release, output="dict", transform=_same_image)
    native = {plain[i]["sample_id"]: plain[i] for i in range(len(plain))}
    found = {item["sample_id"]: item for item in remote}
    assert found.keys() == native.keys()
    assert all(np.array_equal(found[name]["image"], native[name]["image"]) for name in found)
    assert all(found[name]["label"] == native[name]["label"] for name in found)
    assert [item["sample_id"] for item in ReleaseStream(release, output="dict", shuffle=False)] == list(native)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_stream_is_divided_among_workers_and_processes(release: Path, streamed: Any, kind: str) -> None:
    source = release if kind == "local" else streamed

    def stream(**settings: Any) -> ReleaseStream:
        return ReleaseStream(source, output="dict", batch_size=4, **settings)

    none = ids(stream(), batch_size=4)
    assert len(none) == len(set(none)) == 70
    assert ids(stream(), batch_size=4, num_workers=2) == none
    shares = [ids(stream(rank=rank, world_size=3), batch_size=4) for rank in range(3)]
    together = [name for share in shares for name in share]
    assert len(set(together)) == len(together)
    assert len(together) == (69 if kind == "local" else 70)


def test_epochs_of_a_stream_differ_and_workers_hear_of_them(release: Path) -> None:
    stream = ReleaseStream(release, output="dict", schedule=mix_then_real(1))
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    first = [item["sample_id"] for item in loader]
    stream.set_epoch(1)
    second = [item["sample_id"] for item in loader]
    assert (len(first), len(second)) == (70, 50)
    assert [name for name in first if name in second] != second


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_stream_goes_on_where_it_was(release: Path, streamed: Any, kind: str) -> None:
    source = release if kind == "local" else streamed
    whole = [item["sample_id"] for item in ReleaseStream(source, output="dict")]
    stream = ReleaseStream(source, output="dict")
    under_way = iter(stream)
    for _ in range(23):
        next(under_way)
    resumed = ReleaseStream(source, output="dict")
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [item["sample_id"] for item in resumed] == whole[23:]
    assert [item["sample_id"] for item in resumed] == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_in_torchdatas_stateful_loader(release: Path, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def loader() -> Any:
        return stateful.StatefulDataLoader(
            ReleaseStream(release, output="dict", batch_size=8), batch_size=8, num_workers=workers
        )

    whole = [batch["sample_id"] for batch in loader()]
    one = loader()
    under_way = iter(one)
    for _ in range(3):
        next(under_way)
    state = one.state_dict()
    other = loader()
    other.load_state_dict(state)
    assert [batch["sample_id"] for batch in other] == whole[3:]


def test_streams_that_cannot_be(release: Path, streamed: Any, loaded: Any) -> None:
    with pytest.raises(LoaderError, match="balanced sampling is for balanced_loader"):
        ReleaseStream(release, sampling="balanced")
    with pytest.raises(LoaderError, match="is not a release"):
        ReleaseStream(streamed["train"].remove_columns("source_id"))
    with pytest.raises(LoaderError, match="the stream was shuffled"):
        list(ReleaseStream(loaded["train"].select(range(89, -1, -1)).to_iterable_dataset()))
    with pytest.raises(LoaderError, match="returned nothing"):
        ReleaseStream(streamed, transform=lambda image: None)
    with pytest.raises(LoaderError, match="take ReleaseStream"):
        balanced_loader(streamed["train"])
    with pytest.raises(LoaderError, match="buffer is 0"):
        ReleaseStream(streamed, buffer=0)


# Arrays and frames


def test_arrays_and_frames(release: Path) -> None:
    arrays = as_arrays(release, synthetic_ratio=1.0, synthetic_weight=0.5)
    assert arrays.images.shape == (70, 8, 8, 1)
    assert arrays.images.dtype == np.uint8
    assert arrays.weights[arrays.is_synthetic].tolist() == [0.5] * 20
    assert np.bincount(arrays.labels).tolist() == [30, 24, 16]
    flat = as_arrays(release, synthetic_ratio=1.0, flat=True)
    assert np.array_equal(flat.images, arrays.images.reshape(70, 64))
    frame = as_frame(release, synthetic_ratio=1.0)
    assert frame.groupby("class_name")["is_synthetic"].sum().to_dict() == {"one": 12, "two": 8, "zero": 0}
    assert all(np.array_equal(a, b) for a, b in zip(frame["image"], arrays.images, strict=True))
    balanced = as_arrays(release, sampling="balanced")
    assert np.bincount(balanced.labels).tolist() in ([24, 23, 23], [23, 24, 23], [23, 23, 24])
    assert len(as_arrays(release, split="test").labels) == 15
    sizes: Iterator[int] = iter(range(1, 10**6))
    with pytest.raises(LoaderError, match=r"different shapes|do not"):
        as_arrays(release, transform=lambda image: image.repeat(next(sizes), 0))


# In place, online


@pytest.mark.parametrize("in_memory", [False, True])
def test_synthetic_replace_draws_from_the_class_with_probability_p(release: Path, in_memory: bool) -> None:
    step = A.Compose([SyntheticReplace(release, p=0.3, in_memory=in_memory)], seed=1)
    rows = open_rows(release)
    of_class = {
        label: {rows.image(int(r)).tobytes() for r in np.flatnonzero(rows.synthetic & (rows.labels == label))}
        for label in range(3)
    }
    blank = np.full((8, 8, 1), 7, np.uint8)
    for label in (1, 2, "two"):
        made = [step(image=blank, label=label)["image"] for _ in range(1500)]
        replaced = [image.tobytes() for image in made if not np.array_equal(image, blank)]
        # 1500 draws at 0.3: five standard deviations.
        assert abs(len(replaced) - 450) < 5 * math.sqrt(1500 * 0.3 * 0.7)
        assert set(replaced) == of_class[2 if label == "two" else label]
    assert all(np.array_equal(step(image=blank, label=0)["image"], blank) for _ in range(50))
    again = [A.Compose([SyntheticReplace(release, p=0.3)], seed=9) for _ in range(2)]
    ones, others = ([one(image=blank, label=1)["image"] for _ in range(50)] for one in again)
    assert all(np.array_equal(a, b) for a, b in zip(ones, others, strict=True))


def test_synthetic_replace_in_a_loader_follows_the_sample(release: Path) -> None:
    transform = A.Compose([SyntheticReplace(release, p=0.5), A.HorizontalFlip(), A.ToFloat(), ToTensorV2()])
    loaders = [balanced_loader(release, synthetic_ratio=0, transform=transform, num_workers=n) for n in (0, 2)]
    assert same(batches(loaders[0]), batches(loaders[1]))
    plain = balanced_loader(release, synthetic_ratio=0, transform=A.Compose([A.ToFloat(), ToTensorV2()]))
    assert not same(batches(loaders[0]), batches(plain))


def test_synthetic_replace_that_cannot_be(release: Path, copied: Path, tmp_path: Path) -> None:
    first = SyntheticReplace(release, p=1, most_per_class={"two": 1})
    image = np.zeros((8, 8, 1), np.uint8)
    assert len({first(image=image, label=2)["image"].tobytes() for _ in range(20)}) == 1
    assert np.array_equal(first(image=image, label=1)["image"], image)
    named = SyntheticReplace(release, p=1, classes=["two", "zero"])
    assert not np.array_equal(named(image=image, label=0)["image"], image)
    assert np.array_equal(named(image=image, label=1)["image"], image)
    with pytest.raises(LoaderError, match=r"Put SyntheticReplace where images have the size"):
        first(image=np.zeros((16, 16, 1), np.uint8), label=2)
    with pytest.raises(LoaderError, match="label=5 is none of the 3 classes"):
        first(image=image, label=5)
    with pytest.raises(LoaderError, match="'three' is none of the classes"):
        first(image=image, label="three")
    with pytest.raises(ValueError, match="label"):
        first(image=image)
    with pytest.raises(LoaderError, match="most_per_class is -1"):
        SyntheticReplace(release, most_per_class=-1)
    with pytest.raises(LoaderError, match="not there"):
        SyntheticReplace(release, classes=["cat"])
    with pytest.raises(VerificationError, match="is not a directory"):
        SyntheticReplace(tmp_path / "none")
