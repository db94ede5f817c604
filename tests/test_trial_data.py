"""The images of a trial: what an arm trains on, what it never sees, and the images that are made for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from synthaug.trial.data import Chosen, Part, TrialData, scramble, write_scrambled, write_smote, write_trial
from synthaug.trial.learners import run_fit
from synthaug.trial.recipes import Recipe, control, fewer_real, real_recipes, synthetic_recipes
from tests.trial_parts import HELD_OUT, N_CLASSES, OFFERED, REAL, REAL_ONLY, Trial, digits, digits_trial, fit_of

DOSES = {"0.25x": {2: 8, 3: 2}, "1x": {2: 15, 3: 8}, "plan": OFFERED}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return digits_trial(tmp_path_factory.mktemp("data"))


def _synthetic(**dose: int) -> Recipe:
    labels = {int(name[1:]): number for name, number in dose.items()}
    return Recipe("synthetic", "", "synthetic", added="synthetic", dose=tuple(sorted(labels.items())))


def _picked(data: TrialData, recipe: Recipe, seed: int = 0, label: int | None = None) -> list[tuple[int, int]]:
    """File and row of the added images, in order."""
    chosen = data.training(recipe, seed)
    kept = chosen.added & (chosen.labels == label if label is not None else True)
    return list(zip(chosen.files[kept].tolist(), chosen.rows[kept].tolist(), strict=True))


def _counts(labels: np.ndarray) -> dict[int, int]:
    return {int(label): int(number) for label, number in zip(*np.unique(labels, return_counts=True), strict=True)}


def _everything(chosen: Chosen) -> np.ndarray:
    return np.arange(len(chosen))


def _same(one: Chosen, other: Chosen) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Chosen.__dataclass_fields__)


def test_every_arm_trains_on_the_real_images_and_its_dose(trial: Trial) -> None:
    data = trial.data
    arms = [
        *real_recipes(OFFERED, "oversampling"),
        *synthetic_recipes(DOSES, real_recipes(OFFERED, None)[1], "oversampling"),
    ]
    arms += [control(arm, added) for arm in arms[-3:] for added in ("duplicates", "scrambled")]  # type: ignore[arg-type]
    for arm in arms:
        chosen = data.training(arm, seed=3)
        dose = dict(arm.dose)
        assert _counts(chosen.labels) == {label: REAL[label] + dose.get(label, 0) for label in REAL}, arm.key
        assert _counts(chosen.labels[~chosen.added]) == REAL, arm.key
        assert len(chosen) == sum(REAL.values()) + arm.n_added == len(chosen.weights)


def test_an_image_comes_with_its_own_label(trial: Trial) -> None:
    images, labels = digits()
    data = trial.data
    chosen = data.training(_synthetic(k2=20, k3=40), seed=0)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found = data.images(chosen, _everything(chosen))
    assert [known[image.tobytes()] for image in found] == chosen.labels.tolist()


def test_added_images_have_their_weight_and_real_ones_one(trial: Trial) -> None:
    chosen = trial.data.training(replace(_synthetic(k3=10), added_weight=0.3), seed=0)
    assert set(chosen.weights[chosen.added].tolist()) == {np.float32(0.3)}
    assert set(chosen.weights[~chosen.added].tolist()) == {1.0}
    assert chosen.weights.dtype == np.float32


def test_the_doses_of_a_seed_hold_each_other(trial: Trial) -> None:
    data = trial.data
    for label, numbers in ((2, (2, 9, 20)), (3, (5, 17, 40))):
        picked = [_picked(data, _synthetic(**{f"k{label}": number}), seed=7, label=label) for number in numbers]
        assert picked[2][: numbers[0]] == picked[0]
        assert picked[2][: numbers[1]] == picked[1]
        assert len(set(picked[2])) == numbers[2]


def test_a_class_draws_the_same_whatever_the_other_classes_get(trial: Trial) -> None:
    data = trial.data
    alone, together = _synthetic(k3=10), _synthetic(k2=5, k3=10)
    assert _picked(data, alone, label=3) == _picked(data, together, label=3)


def test_seeds_draw_different_images_and_one_seed_the_same(trial: Trial) -> None:
    data = trial.data
    drawn = [frozenset(_picked(data, _synthetic(k3=10), seed)) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert drawn == [frozenset(_picked(trial.data, _synthetic(k3=10), seed)) for seed in range(5)]


def test_samples_of_several_batches_are_all_within_reach(trial: Trial) -> None:
    data = trial.data
    files = {file for file, _ in _picked(data, _synthetic(k3=40))}
    assert len(files) == len(trial.parts["synthetic"]) == 2


def test_a_dose_beyond_what_there_is_gives_what_there_is(trial: Trial) -> None:
    picked = _picked(trial.data, _synthetic(k2=1000))
    assert len(picked) == len(set(picked)) == OFFERED[2]


def test_duplicates_are_real_training_images_in_whole_rounds(trial: Trial) -> None:
    data = trial.data
    recipe = control(_synthetic(k2=20, k3=3 * REAL[3] + 5), "duplicates")
    picked = _picked(data, recipe, label=3)
    real = data.everything("train")
    own = set(zip(real.files[real.labels == 3].tolist(), real.rows[real.labels == 3].tolist(), strict=True))
    n = REAL[3]
    for start in (0, n, 2 * n):
        assert set(picked[start : start + n]) == own
    assert len(picked) == 3 * n + 5
    assert len(set(picked[3 * n :])) == 5
    # Where one round is more than enough, none comes twice.
    assert len(set(_picked(data, recipe, label=2))) == 20


def test_a_share_keeps_that_share_of_scarce_classes_alone(trial: Trial) -> None:
    data = trial.data
    whole = data.training(REAL_ONLY, seed=0)
    for share, expected in ((0.5, {2: 15, 3: 4}), (0.25, {2: 8, 3: 2}), (0.01, {2: 1, 3: 1})):
        chosen = data.training(fewer_real(REAL_ONLY, share), seed=0)
        assert _counts(chosen.labels) == {**REAL, **expected}
        assert set(chosen.rows.tolist()) < set(whole.rows.tolist())
    rows = [frozenset(data.training(fewer_real(REAL_ONLY, 0.5), seed).rows.tolist()) for seed in range(4)]
    assert len(set(rows)) == 4


def test_a_smaller_share_is_part_of_a_larger_one(trial: Trial) -> None:
    quarter, half = (set(trial.data.training(fewer_real(REAL_ONLY, s), 1).rows.tolist()) for s in (0.25, 0.5))
    assert quarter < half


def test_the_second_half_of_pretraining_has_the_real_images_alone(trial: Trial) -> None:
    data = trial.data
    chosen = data.training(_synthetic(k3=10), seed=0, real_only=True)
    assert _same(chosen, data.training(REAL_ONLY, seed=0))
    assert not chosen.added.any()


def test_held_out_images_are_in_no_training_set(trial: Trial) -> None:
    data = trial.data
    held_out = {image.tobytes() for use in ("validation", "test") for image in trial.pixels(use)}
    arms = [
        *real_recipes(OFFERED, "oversampling"),
        *synthetic_recipes(DOSES, real_recipes(OFFERED, None)[1], "oversampling"),
    ]
    arms += [control(arms[-1], "duplicates"), control(arms[-1], "scrambled")]
    for arm in arms:
        chosen = data.training(arm, seed=1)
        assert not held_out & {image.tobytes() for image in data.images(chosen, _everything(chosen))}, arm.key
    assert len(data.labels("test")) == N_CLASSES * HELD_OUT


def test_a_fit_that_is_no_finalists_never_opens_the_test_images(tmp_path: Path) -> None:
    trial = digits_trial(tmp_path)
    (trial.directory / "test.npy").unlink()
    fit = fit_of(steps=10)
    scores = run_fit(trial.directory, fit)
    assert scores.validation.shape == (N_CLASSES * HELD_OUT, N_CLASSES)
    assert scores.test.shape == (0, N_CLASSES)
    # A finalist's does open them, so it was the right file.
    with pytest.raises(FileNotFoundError, match=r"test\.npy"):
        run_fit(trial.directory, replace(fit, test=True))


def test_labels_and_images_keep_the_order_they_were_given_in(trial: Trial) -> None:
    data = trial.data
    for use in ("train", "validation", "test", "synthetic"):
        np.testing.assert_array_equal(data.labels(use), trial.labels(use))
        chosen = data.everything(use)
        np.testing.assert_array_equal(data.images(chosen, _everything(chosen)), trial.pixels(use))


def test_images_of_several_files_come_in_the_order_asked(trial: Trial) -> None:
    data = trial.data
    chosen = data.training(_synthetic(k2=20, k3=40), seed=0)
    files = trial.parts["train"] + trial.parts["synthetic"]
    by_name = {str(part.path): np.load(part.path) for part in files}
    assert len(by_name) == 3
    order = np.random.default_rng(0).permutation(np.tile(_everything(chosen), 2))
    paths = [str(path) for path in data._paths]
    expected = [by_name[paths[chosen.files[k]]][chosen.rows[k]] for k in order]
    np.testing.assert_array_equal(data.images(chosen, order), np.stack(expected))


def test_a_use_without_images_is_empty(tmp_path: Path) -> None:
    images, labels = digits()
    np.save(tmp_path / "images.npy", images[:10])
    part = Part("train", tmp_path / "images.npy", np.arange(10), labels[:10])
    write_trial(tmp_path, [part], low=0, high=255, size=8, channels=1, n_classes=10, scarce=[])
    data = TrialData(tmp_path)
    assert len(data.everything("synthetic")) == len(data.labels("smote")) == 0
    assert len(data.training(_synthetic(k3=5), seed=0)) == 10


def test_a_trial_can_be_moved_with_the_files_inside_it(tmp_path: Path) -> None:
    trial = digits_trial(tmp_path)
    recipe = _synthetic(k3=10)
    before = trial.data.training(recipe, seed=0)
    pixels = trial.data.images(before, _everything(before))
    moved = trial.directory.rename(tmp_path / "elsewhere")
    data = TrialData(moved)
    assert _same(data.training(recipe, seed=0), before)
    np.testing.assert_array_equal(data.images(before, _everything(before)), pixels)


def test_files_outside_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "away").mkdir()
    np.save(tmp_path / "source.npy", digits()[0][:10])
    monkeypatch.chdir(tmp_path)
    part = Part("train", Path("source.npy"), np.arange(10), digits()[1][:10])
    write_trial(tmp_path / "trial", [part], low=0, high=255, size=8, channels=1, n_classes=10, scarce=[])
    monkeypatch.chdir(tmp_path / "away")
    data = TrialData(tmp_path / "trial")
    chosen = data.everything("train")
    np.testing.assert_array_equal(data.images(chosen, _everything(chosen)), digits()[0][:10])


def _smooth(n: int, size: int, channels: int, low: float, high: float) -> np.ndarray:
    """Blobs of little contrast around the middle of the range: whatever their phases, nothing is clipped."""
    random = np.random.default_rng(0)
    places = np.arange(size)
    centre = random.uniform(0.2 * size, 0.8 * size, (n, channels, 2))
    squared = (places[:, None] - centre[..., 0, None, None]) ** 2 + (places - centre[..., 1, None, None]) ** 2
    blobs = np.exp(-squared / (2 * (size / 8) ** 2))
    return np.moveaxis(low + (high - low) * (0.45 + 0.1 * blobs), 1, 3)


def _amplitudes(images: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.fft2(images, axes=(1, 2)))


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(1, keepdims=True) for x in (one, other))
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def test_scrambled_images_keep_amplitudes_and_mean_and_lose_content() -> None:
    images = _smooth(40, 28, 1, 0, 255)
    scrambled = scramble(images, 0, 255, np.random.default_rng(0))
    np.testing.assert_allclose(_amplitudes(scrambled), _amplitudes(images), atol=1e-8)
    np.testing.assert_allclose(scrambled.mean((1, 2)), images.mean((1, 2)))
    np.testing.assert_allclose(scrambled.std((1, 2)), images.std((1, 2)))
    correlation = _correlation(scrambled, images)
    assert abs(correlation.mean()) < 0.1
    assert np.abs(correlation).max() < 0.7
    # Images of one class have lost each other as well.
    assert abs(_correlation(scrambled[:20], scrambled[20:]).mean()) < 0.15


def test_clipped_scrambled_digits_keep_the_spectrum_nearly(trial: Trial) -> None:
    real = digits()[0][:300].astype(np.float64)
    scrambled = scramble(real, 0, 255, np.random.default_rng(0))
    assert scrambled.min() >= 0
    assert scrambled.max() <= 255
    amplitudes = _amplitudes(scrambled).mean(0), _amplitudes(real).mean(0)
    assert np.corrcoef(np.ravel(amplitudes[0]), np.ravel(amplitudes[1]))[0, 1] > 0.98
    assert abs(_correlation(scrambled, real).mean()) < 0.1


def test_the_channels_of_an_image_are_turned_alike() -> None:
    images = _smooth(5, 16, 3, 0, 1)
    scrambled = scramble(images, 0, 1, np.random.default_rng(0))
    before, after = (np.fft.fft2(x, axes=(1, 2)) for x in (images, scrambled))
    turns = after / before
    np.testing.assert_allclose(turns[..., 1], turns[..., 0], atol=1e-6)
    np.testing.assert_allclose(turns[..., 2], turns[..., 0], atol=1e-6)
    # Equal channels stay equal: a grey picture does not become a coloured one.
    grey = np.repeat(images[..., :1], 3, axis=3)
    turned = scramble(grey, 0, 1, np.random.default_rng(0))
    np.testing.assert_allclose(turned[..., 1], turned[..., 0], atol=1e-12)
    # And images are not turned alike.
    assert not np.allclose(turns[0], turns[1])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_made_images_have_the_type_and_range_of_the_real_ones(tmp_path: Path, dtype: str, channels: int) -> None:
    low, high = {"uint8": (0, 255), "uint16": (0, 65535), "float32": (-2.0, 3.0)}[dtype]
    values = _smooth(12, 8, channels, low, high)
    images = values.astype(dtype) if dtype == "float32" else np.rint(values).astype(dtype)
    np.save(tmp_path / "images.npy", images)
    real = Part("train", tmp_path / "images.npy", np.arange(12), np.arange(12) % 2)
    scrambled = write_scrambled(real, {1: 7}, tmp_path / "scrambled.npy", low, high, 0)
    smote = write_smote(real, {1: 7}, tmp_path / "smote.npy", 0)
    for part in (scrambled, smote):
        made = np.load(part.path)
        assert (made.dtype, made.shape) == (np.dtype(dtype), (7, 8, 8, channels))
        assert made.min() >= low
        assert made.max() <= high
        # Whole numbers are rounded, so the mean of an image is off by half a step at the most.
        means = images[1::2].astype(np.float64).mean((1, 2))
        slack = 0.5 if dtype != "float32" else 1e-5
        assert made.mean((1, 2), dtype=np.float64).min() >= means.min() - slack
        assert made.mean((1, 2), dtype=np.float64).max() <= means.max() + slack


def test_scrambled_images_are_made_of_real_ones_of_their_class_in_whole_rounds(tmp_path: Path) -> None:
    # The mean is kept, so it tells which image a scrambled one was made of.
    images = np.rint(_smooth(9, 16, 1, 0, 255)).astype(np.float32) + np.arange(9, dtype=np.float32)[:, None, None, None]
    np.save(tmp_path / "images.npy", images)
    real = Part("train", tmp_path / "images.npy", np.arange(9)[::-1], np.arange(9)[::-1] % 3)
    part = write_scrambled(real, {0: 7, 2: 2}, tmp_path / "scrambled.npy", -1000, 1000, 0)
    np.testing.assert_array_equal(part.labels, [0] * 7 + [2] * 2)
    np.testing.assert_array_equal(part.rows, np.arange(9))
    means = images.mean((1, 2, 3))
    origin = np.abs(np.load(part.path).mean((1, 2, 3))[:, None] - means).argmin(1)
    assert (origin % 3).tolist() == part.labels.tolist()
    assert set(origin[:3]) == set(origin[3:6]) == {0, 3, 6}
    # Rounds repeat images, not phases.
    made = np.load(part.path)
    first = made[:3][origin[:3] == origin[3]][0]
    assert np.abs(first - made[3]).max() > 1


def test_scrambled_and_smote_images_repeat_by_seed(trial: Trial, tmp_path: Path) -> None:
    real = trial.parts["train"][0]
    for write, extra in ((write_scrambled, (0, 255)), (write_smote, ())):
        made = []
        for number, seed in enumerate((5, 5, 6)):
            part = write(real, {3: 12, 2: 300}, tmp_path / f"{number}.npy", *extra, seed)  # type: ignore[operator]
            made.append(np.load(part.path))
        np.testing.assert_array_equal(made[0], made[1])
        assert (made[0] != made[2]).any()


def test_smote_images_lie_between_two_real_images_of_their_class(trial: Trial) -> None:
    (part,) = trial.parts["smote"]
    assert _counts(part.labels) == OFFERED
    made = np.load(part.path).astype(np.float64)
    real, labels = trial.pixels("train").astype(np.float64), trial.labels("train")
    for label in OFFERED:
        own = real[labels == label].reshape(-1, 64)
        starts, ends = (own[k] for k in np.triu_indices(len(own), 1))
        length = ((ends - starts) ** 2).sum(1)
        for image in made[part.labels == label].reshape(-1, 64):
            share = np.clip(((image - starts) * (ends - starts)).sum(1) / length, 0, 1)
            off = np.abs(starts + share[:, None] * (ends - starts) - image).max(1)
            # Half a step of rounding, and the share found from rounded values.
            assert off.min() < 1


def test_smote_is_new_images_and_not_the_old_ones_again(trial: Trial) -> None:
    (part,) = trial.parts["smote"]
    made = {image.tobytes() for image in np.load(part.path)}
    real = {image.tobytes() for image in trial.pixels("train")}
    assert len(made) > 0.8 * len(part.labels)
    assert len(made & real) < 0.2 * len(made)


@pytest.mark.parametrize("n_real", [2, 3, 40])
def test_smote_works_with_few_neighbours_and_with_many(tmp_path: Path, n_real: int) -> None:
    images, labels = digits()
    rows = np.concatenate([np.flatnonzero(labels == 5)[:n_real], np.flatnonzero(labels == 6)[:10]])
    np.save(tmp_path / "images.npy", images)
    part = write_smote(Part("train", tmp_path / "images.npy", rows, labels[rows]), {5: 30}, tmp_path / "smote.npy", 0)
    assert part.labels.tolist() == [5] * 30
    assert np.load(part.path).any((1, 2, 3)).all()


def test_smote_leaves_out_a_class_of_one_image(tmp_path: Path) -> None:
    images, labels = digits()
    rows = np.concatenate([np.flatnonzero(labels == 5)[:1], np.flatnonzero(labels == 6)[:10]])
    np.save(tmp_path / "images.npy", images)
    real = Part("train", tmp_path / "images.npy", rows, labels[rows])
    part = write_smote(real, {5: 30, 6: 4, 7: 0}, tmp_path / "smote.npy", 0)
    assert part.labels.tolist() == [6] * 4
    assert len(np.load(part.path)) == 4
