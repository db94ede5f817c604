"""One fit of the trial: repeatable to the bit, every recipe does what it says, the user's own classifiers take part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthaug.errors import ConfigError, TrainingError
from synthaug.trial.data import Part, write_trial
from synthaug.trial.entry import load_entry
from synthaug.trial.learners import Fit, Scores, _draws, _mix, applicable, own_classifier, run_fit
from synthaug.trial.recipes import LOSSES, Recipe, control, real_recipes, synthetic_recipes, without_twins
from tests.trial_parts import (
    HELD_OUT,
    N_CLASSES,
    OFFERED,
    REAL_ONLY,
    Trial,
    accuracy,
    digits,
    digits_trial,
    fit_of,
    recall,
)

FORM = (1, 8, N_CLASSES)
DOSES = {"1x": {2: 15, 3: 8}, "plan": OFFERED}
STEPS = 24

OWN = """
import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

seen = []


def small(channels, size, n_classes):
    inside = channels * size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inside, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, n_classes))


class Watching(nn.Module):
    def __init__(self, channels, size, n_classes):
        super().__init__()
        self.inside = small(channels, size, n_classes)

    def forward(self, x):
        if self.training:
            seen.append((tuple(x.shape), float(x.min()), float(x.max())))
        return self.inside(x)


class NotANumber(Watching):
    def forward(self, x):
        return super().forward(x) * float("nan")


class OneLogit(Watching):
    def forward(self, x):
        return super().forward(x)[:, :1]


class NotANumberLater(Watching):
    def forward(self, x):
        return super().forward(x) * (1 if self.training else float("nan"))


class Broken(Watching):
    def forward(self, x):
        raise RuntimeError("the fuse is blown")


def forest():
    # Its random state lies inside the pipeline.
    return make_pipeline(StandardScaler(), RandomForestClassifier(5))


logistic = LogisticRegression(C=0.1, tol=1e-3, max_iter=1000)


def nearest():
    return KNeighborsClassifier(5, weights="distance")


class BrokenBayes(GaussianNB):
    def predict_proba(self, x):
        raise ValueError("no opinion")


class NotANumberBayes(GaussianNB):
    def predict_proba(self, x):
        return super().predict_proba(x) * np.nan


class Duck:
    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        return x


def raising(channels, size, n_classes):
    raise OSError("no weights here")


number = 3
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return digits_trial(tmp_path_factory.mktemp("learners"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN, encoding="utf-8")
    return path


def _own_fit(own: Path, name: str, recipe: Recipe = REAL_ONLY, **changes: Any) -> Fit:
    entry = f"{own}:{name}"
    return fit_of(recipe, **{"steps": 1, "classifier": entry, "classifier_identity": entry, **changes})


def _again(trial: Trial, fit: Fit) -> Scores:
    """Run a fit that has run before."""
    (trial.directory / "fits" / fit.file_name).unlink()
    return run_fit(trial.directory, fit)


def _probabilities(trial: Trial, recipe: Recipe, seed: int = 0, **changes: Any) -> np.ndarray:
    return run_fit(trial.directory, fit_of(recipe, **{"seed": seed, "steps": STEPS, **changes})).validation


def _arms() -> list[Recipe]:
    synthetic = synthetic_recipes(DOSES, real_recipes(OFFERED, None)[3], "class weights")
    finalist = next(recipe for recipe in synthetic if recipe.pretrain)
    controls = [control(finalist, "duplicates"), control(finalist, "scrambled")]
    return [*real_recipes(OFFERED, "balanced softmax"), *without_twins(synthetic), *controls]


def _is_distribution(probabilities: np.ndarray, n: int, n_classes: int = N_CLASSES) -> bool:
    return (
        probabilities.shape == (n, n_classes)
        and probabilities.dtype == np.float32
        and bool((probabilities >= 0).all())
        and bool(np.allclose(probabilities.sum(1), 1, atol=1e-4))
    )


@pytest.mark.slow
def test_every_arm_learns_digits_in_a_few_steps_and_no_two_do_the_same(trial: Trial) -> None:
    found = {arm.key: _probabilities(trial, arm) for arm in _arms()}
    for key, probabilities in found.items():
        assert _is_distribution(probabilities, N_CLASSES * HELD_OUT), key
        # Guessing gives a quarter.
        assert accuracy(trial, probabilities) > 0.6, key
    assert len({probabilities.tobytes() for probabilities in found.values()}) == len(found) == len(_arms())


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_the_same_fit_gives_the_same_scores_to_the_bit(trial: Trial, mix: Any) -> None:
    recipe = replace(REAL_ONLY, mix=mix, strong=mix == "mixup", added="synthetic", dose=((3, 10),))
    fit = fit_of(recipe, steps=6, seed=4, test=True)
    first = run_fit(trial.directory, fit)
    # What a caller does with the global generator is of no account.
    torch.rand(3)
    second = _again(trial, fit)
    np.testing.assert_array_equal(first.validation, second.validation)
    np.testing.assert_array_equal(first.test, second.test)
    assert (run_fit(trial.directory, replace(fit, seed=5)).validation != first.validation).any()


def test_a_fit_leaves_the_random_state_and_the_threads_of_its_caller(trial: Trial) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_fit(trial.directory, fit_of(steps=2, seed=77))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_fits_in_processes_side_by_side_say_the_same_as_one_alone(tmp_path: Path, own: Path) -> None:
    from joblib import Parallel, delayed

    fits = [fit_of(arm, steps=6, seed=1, test=True) for arm in _arms()[4:8]]
    fits += [_own_fit(own, name, seed=1) for name in ("forest", "logistic")] + [_own_fit(own, "small", steps=6)]
    alone, beside = digits_trial(tmp_path / "alone"), digits_trial(tmp_path / "beside")
    expected = [run_fit(alone.directory, fit) for fit in fits]
    Parallel(n_jobs=2, batch_size=1)(delayed(run_fit)(beside.directory, fit) for fit in fits)
    for fit, scores in zip(fits, expected, strict=True):
        assert (beside.directory / "fits" / fit.file_name).is_file()
        found = run_fit(beside.directory, fit)
        np.testing.assert_array_equal(found.validation, scores.validation)
        np.testing.assert_array_equal(found.test, scores.test)


def test_scores_are_read_where_the_fit_ran_before(trial: Trial) -> None:
    fit = fit_of(steps=2, seed=50, test=True)
    scores = run_fit(trial.directory, fit)
    path = trial.directory / "fits" / fit.file_name
    with np.load(path) as written:
        left = dict(written)
    np.testing.assert_array_equal(left["validation"], scores.validation)
    np.savez(path, **{**left, "validation": np.ones((1, 2), np.float32), "test": np.zeros((1, 2), np.float32)})
    found = run_fit(trial.directory, fit)
    assert found.validation.tolist() == [[1, 1]]
    assert found.test.tolist() == [[0, 0]]
    # With what it took, so that a trial that goes on counts its time on.
    assert found.seconds == scores.seconds > 0


def test_scores_are_written_whole_or_not_at_all(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"PK half a file")
        raise OSError(28, "No space left on device")

    fit = fit_of(steps=2, seed=51)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            run_fit(trial.directory, fit)
    assert not (trial.directory / "fits" / fit.file_name).exists()
    assert not list((trial.directory / "fits").glob(".*"))
    assert run_fit(trial.directory, fit).validation.shape == (N_CLASSES * HELD_OUT, N_CLASSES)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 41},
        {"batch_size": 16},
        {"classifier_identity": "own.py:x:abc"},
        {"device": "cuda"},
        {"test": True},
        *({"recipe": replace(REAL_ONLY, **change)} for change in (
            {"loss": "oversampling"}, {"strong": True}, {"mix": "mixup"}, {"weight_decay": 0.1}, {"added": "smote"},
            {"dose": ((1, 2),)}, {"added_weight": 0.5}, {"pretrain": True}, {"share": 0.5},
        )),
    ],
)  # fmt: skip
def test_a_result_has_a_name_of_its_own(changes: dict[str, Any]) -> None:
    assert replace(fit_of(), **changes).file_name != fit_of().file_name


def test_words_about_an_arm_are_not_part_of_its_result() -> None:
    renamed = replace(REAL_ONLY, key="other", words="other", side="control")
    assert fit_of(renamed).file_name == fit_of().file_name


def test_a_finalist_says_the_same_of_validation_and_recognises_test_images(trial: Trial) -> None:
    fit = fit_of(steps=STEPS)
    chosen, finalist = run_fit(trial.directory, fit), run_fit(trial.directory, replace(fit, test=True))
    np.testing.assert_array_equal(chosen.validation, finalist.validation)
    assert _is_distribution(finalist.test, N_CLASSES * HELD_OUT)
    assert accuracy(trial, finalist.test, "test") > 0.75
    assert chosen.test.shape == (0, N_CLASSES)


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A trial of two classes that overlap, ten to one, and the validation labels: here the prior decides."""
    directory, random = tmp_path_factory.mktemp("ambiguous"), np.random.default_rng(0)
    labels = np.repeat([0, 1, 0, 1], [150, 15, 100, 100])
    images = 100 + 12 * random.standard_normal((len(labels), 8, 8, 1))
    patch = 25 * (1.5 * labels + random.standard_normal(len(labels)))
    images[:, 2:6, 2:6] += patch[:, None, None, None]
    np.save(directory / "images.npy", np.clip(np.rint(images), 0, 255).astype(np.uint8))
    parts = [
        Part(use, directory / "images.npy", rows, labels[rows])
        for use, rows in (("train", np.arange(165)), ("validation", np.arange(165, 365)))
    ]
    write_trial(directory, parts, low=0, high=255, size=8, channels=1, n_classes=2, scarce=[1])
    return directory, labels[165:]


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["network", "logistic"])
def test_what_is_done_about_imbalance_raises_the_recall_of_the_scarce_class(
    ambiguous: tuple[Path, np.ndarray], own: Path, learner: str
) -> None:
    directory, labels = ambiguous

    def found(loss: Any) -> float:
        recipe = replace(REAL_ONLY, loss=loss)
        fit = fit_of(recipe, steps=60) if learner == "network" else _own_fit(own, learner, recipe)
        return float((run_fit(directory, fit).validation.argmax(1) == labels)[labels == 1].mean())

    plain = found("plain")
    for loss in LOSSES:
        assert found(loss) > plain + 0.08, loss


@pytest.mark.parametrize("learner", ["network", "logistic"])
def test_added_images_of_little_weight_do_little(trial: Trial, tmp_path: Path, own: Path, learner: str) -> None:
    # Zeros that are called threes: as many as it takes to believe them.
    images, labels = digits()
    wrong = np.flatnonzero(labels == 0)[:90]
    train, validation = trial.parts["train"][0], trial.parts["validation"][0]
    np.save(tmp_path / "wrong.npy", images)
    parts = [train, validation, Part("synthetic", tmp_path / "wrong.npy", wrong, np.full(len(wrong), 3))]
    write_trial(tmp_path, parts, low=0, high=255, size=8, channels=1, n_classes=N_CLASSES, scarce=[3])
    believed = replace(REAL_ONLY, added="synthetic", dose=((3, 90),))

    def zeros(recipe: Recipe) -> float:
        fit = _own_fit(own, learner, recipe) if learner != "network" else fit_of(recipe, steps=STEPS)
        return recall(trial, run_fit(tmp_path, fit).validation, 0)

    assert zeros(believed) < 0.5
    assert zeros(replace(believed, added_weight=0.01)) > 0.9


@pytest.mark.slow
def test_a_class_without_training_images_gets_no_probability(tmp_path: Path, own: Path) -> None:
    trial = digits_trial(tmp_path, real={0: 30, 1: 30, 3: 8}, offered={3: 10}, n_classes=5)
    present = np.isin(trial.labels("validation"), [0, 1, 3])
    pretrain = next(
        recipe
        for recipe in synthetic_recipes({"1x": {3: 8}}, real_recipes({3: 10}, None)[3], "class weights")
        if recipe.pretrain
    )
    fits = [fit_of(recipe, steps=STEPS) for recipe in (*real_recipes({3: 10}, None), pretrain)]
    fits += [_own_fit(own, "logistic", replace(REAL_ONLY, loss=loss)) for loss in ("plain", "balanced softmax")]
    fits += [_own_fit(own, "small", steps=60)]
    for fit in fits:
        probabilities = run_fit(trial.directory, fit).validation
        assert _is_distribution(probabilities, 5 * HELD_OUT, 5), fit
        assert not probabilities[:, [2, 4]].any(), fit
        right = probabilities[present].argmax(1) == trial.labels("validation")[present]
        assert right.mean() > 0.75, fit


def test_values_that_are_no_numbers_do_not_spoil_a_fit(tmp_path: Path) -> None:
    images, labels = digits()
    kept = np.flatnonzero(labels < 2)[:120]
    values = images[kept].astype(np.float32) / 255 * 5 - 2
    for number, value in enumerate((np.nan, np.inf, -np.inf)):
        values[number::30, :2] = value
    np.save(tmp_path / "images.npy", values)
    rows = np.arange(120)
    parts = [
        Part(use, tmp_path / "images.npy", mine, labels[kept][mine])
        for use, mine in (("train", rows[:80]), ("validation", rows[80:]))
    ]
    write_trial(tmp_path, parts, low=-2, high=3, size=8, channels=1, n_classes=2, scarce=[])
    probabilities = run_fit(tmp_path, fit_of(steps=STEPS)).validation
    assert (probabilities.argmax(1) == labels[kept][80:]).mean() > 0.8


def test_oversampling_draws_every_class_equally_often_and_other_arms_every_image(trial: Trial) -> None:
    random = np.random.default_rng(0)
    recipe = replace(REAL_ONLY, added="synthetic", dose=((3, 2),))
    chosen = trial.data.training(recipe, seed=0)
    draws = _draws(chosen, replace(recipe, loss="oversampling"), random)
    assert np.bincount(chosen.labels[draws(400)]).tolist() == [100] * N_CLASSES
    draws = _draws(chosen, recipe, random)
    # In whole rounds, however many are asked for at a time.
    drawn = np.concatenate([draws(number) for number in (70, 30, 45, 5 * len(chosen) - 145)])
    assert np.bincount(drawn).tolist() == [5] * len(chosen)
    assert sorted(drawn[: len(chosen)]) == list(range(len(chosen)))


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_images_are_mixed_by_the_share_their_labels_get(how: str) -> None:
    random = np.random.default_rng(0)
    # Images of one value each: the mean of a mixture tells the shares.
    values = torch.arange(6, dtype=torch.float32)
    shares = []
    for _ in range(60):
        x = values[:, None, None, None].expand(6, 2, 9, 9).contiguous()
        mixed, share, partner = _mix(x, how, random)
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), share * values + (1 - share) * values[partner], atol=1e-5)
        np.testing.assert_array_equal(x.mean((1, 2, 3)), values)
        if how == "cutmix":
            assert all(set(image.unique().tolist()) <= {float(k), float(partner[k])} for k, image in enumerate(mixed))
        assert 0 <= share <= 1
        shares.append(share)
    assert np.std(shares) > 0.1


def test_every_arm_takes_as_many_steps_of_as_many_images(trial: Trial, own: Path) -> None:
    seen = load_entry(f"{own}:seen", "here")
    for arm in _arms():
        seen.clear()
        run_fit(trial.directory, _own_fit(own, "Watching", arm, steps=11, batch_size=16))
        assert [shape for shape, _, _ in seen] == [(16, 1, 8, 8)] * 11, arm.key
        assert min(low for _, low, _ in seen) >= -1
        assert max(high for _, _, high in seen) <= 1
        assert min(low for _, low, _ in seen) < -0.9


@pytest.mark.parametrize("name", ["small", "Watching"])
def test_a_torch_module_of_the_users_own_learns_and_repeats(trial: Trial, own: Path, name: str) -> None:
    fit = _own_fit(own, name, steps=80)
    first = run_fit(trial.directory, fit)
    assert accuracy(trial, first.validation) > 0.75
    np.testing.assert_array_equal(_again(trial, fit).validation, first.validation)
    assert (run_fit(trial.directory, replace(fit, seed=1)).validation != first.validation).any()


@pytest.mark.parametrize("entry", ["{own}:logistic", "{own}:forest", "{own}:nearest", "sklearn.naive_bayes:GaussianNB"])
def test_estimators_of_any_form_learn_and_repeat(trial: Trial, own: Path, entry: str) -> None:
    entry = entry.format(own=own)
    fit = fit_of(steps=1, classifier=entry, classifier_identity=entry)
    first = run_fit(trial.directory, fit)
    assert _is_distribution(first.validation, N_CLASSES * HELD_OUT)
    assert accuracy(trial, first.validation) > 0.75
    np.testing.assert_array_equal(_again(trial, fit).validation, first.validation)
    assert (run_fit(trial.directory, replace(fit, seed=1)).validation != first.validation).any()


@pytest.mark.slow
def test_an_estimator_takes_every_arm_that_is_applicable(trial: Trial) -> None:
    entry = "sklearn.naive_bayes:GaussianNB"
    possible = [arm for arm in _arms() if applicable(arm, own_classifier(entry, FORM)) is None]
    assert {arm.mix for arm in possible} == {"none", "mixup", "cutmix"}
    assert {arm.loss for arm in possible} == {"plain", *LOSSES}
    assert any(arm.strong for arm in possible)
    fits = {arm.key: fit_of(arm, steps=1, classifier=entry, classifier_identity=entry) for arm in possible}
    found = {key: run_fit(trial.directory, fit).validation for key, fit in fits.items()}
    for key, probabilities in found.items():
        assert _is_distribution(probabilities, N_CLASSES * HELD_OUT), key
        assert accuracy(trial, probabilities) > 0.6, key
    assert len({probabilities.tobytes() for probabilities in found.values()}) == len(found)


def test_the_users_own_estimator_is_not_changed_by_a_fit(trial: Trial, own: Path) -> None:
    run_fit(trial.directory, _own_fit(own, "logistic", seed=60))
    estimator = own_classifier(f"{own}:logistic", FORM)
    assert not hasattr(estimator, "classes_")
    assert estimator.get_params()["random_state"] is None


def test_applicable_says_what_an_estimator_cannot_do(own: Path) -> None:
    weighted = {
        "class weights": replace(REAL_ONLY, loss="class weights"),
        "mixup": replace(REAL_ONLY, mix="mixup"),
        "cutmix": replace(REAL_ONLY, mix="cutmix"),
        "weight": replace(REAL_ONLY, added_weight=0.3),
    }
    for name, recipe in weighted.items():
        why = applicable(recipe, own_classifier(f"{own}:nearest", FORM))
        assert why == "KNeighborsClassifier takes no sample_weight", name
        assert applicable(recipe, own_classifier(f"{own}:logistic", FORM)) is None, name
    for loss in ("plain", "oversampling", "balanced softmax"):
        assert applicable(replace(REAL_ONLY, loss=loss), own_classifier(f"{own}:nearest", FORM)) is None
    assert "in one go" in str(applicable(replace(REAL_ONLY, pretrain=True), own_classifier(f"{own}:logistic", FORM)))
    assert "regularisation" in str(
        applicable(replace(REAL_ONLY, weight_decay=0.3), own_classifier(f"{own}:logistic", FORM))
    )
    for arm in _arms():
        assert applicable(arm, own_classifier(f"{own}:small", FORM)) is None
        assert applicable(arm, None) is None


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("NotANumber", r"the loss of the trial's arm 'real only' is nan at step 1 of 10"),
        ("Broken", r"own\.py:Broken failed in the arm 'real only': RuntimeError: the fuse is blown"),
        ("OneLogit", r"own\.py:OneLogit failed in the arm 'real only'.*32 images gave logits of shape \(32, 1\)"),
        ("NotANumberLater", r"own\.py:NotANumberLater gave probabilities that are not numbers.*arm 'real only'"),
        ("BrokenBayes", r"own\.py:BrokenBayes failed in the arm 'real only': ValueError: no opinion"),
        ("NotANumberBayes", r"own\.py:NotANumberBayes gave probabilities that are not numbers.*arm 'real only'"),
    ],
)
def test_a_classifier_that_fails_is_named_with_the_arm_and_leaves_no_scores(
    trial: Trial, own: Path, name: str, what: str
) -> None:
    fit = _own_fit(own, name, steps=10 if "Bayes" not in name else 1)
    with pytest.raises(TrainingError, match=what):
        run_fit(trial.directory, fit)
    assert not (trial.directory / "fits" / fit.file_name).exists()


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("{own}:raising", r"raising failed when it was called with .* \(1, 8, 4\): OSError: no weights here"),
        ("{own}:number", "gave a int: a torch module, or a scikit-learn estimator"),
        ("{own}:Duck", "gave a Duck: .*get_params"),
        ("sklearn.svm:LinearSVC", "gave a LinearSVC: .*predict_proba"),
        ("{own}:nothing", "has no 'nothing'"),
    ],
)
def test_what_is_no_classifier_is_refused_by_name(own: Path, entry: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        own_classifier(entry.format(own=own), FORM)
