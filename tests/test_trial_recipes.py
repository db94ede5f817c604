"""The arms of the trial: as many on either side, none twice, controls that differ in the images alone."""

from __future__ import annotations

import pytest

from synthaug.trial.recipes import (
    LOSSES,
    Loss,
    Recipe,
    combined_recipes,
    control,
    differs_in_samples_alone,
    fewer_real,
    real_recipes,
    synthetic_recipes,
    without_twins,
)

DOSES = {"0.25x": {2: 3, 3: 2}, "1x": {2: 12, 3: 8}, "3x": {2: 36, 3: 24}, "plan": {2: 40, 3: 90}}
PLANNED = {2: 40, 3: 90}


def _real(way: str, best_loss: Loss = "oversampling") -> Recipe:
    """The real-only arm of this key, before the loss."""
    return next(recipe for recipe in real_recipes(PLANNED, best_loss) if recipe.key == f"{way}{best_loss}")


def _synthetic(
    best_loss: Loss = "oversampling", way: str = "", doses: dict[str, dict[int, int]] = DOSES
) -> list[Recipe]:
    return synthetic_recipes(doses, _real(way, best_loss), best_loss)


def _changed(one: Recipe, other: Recipe) -> set[str]:
    other_values = other.plain()
    return {name for name, value in one.plain().items() if value != other_values[name]}


def _keys(recipes: list[Recipe]) -> list[str]:
    return [recipe.key for recipe in recipes]


@pytest.mark.parametrize("best_loss", LOSSES)
def test_both_sides_have_ten_arms_or_more_and_no_two_alike(best_loss: Loss) -> None:
    real = real_recipes(PLANNED, best_loss)
    assert without_twins(real) == real
    for best_real in real:
        synthetic = without_twins(synthetic_recipes(DOSES, best_real, best_loss))
        assert min(len(real), len(synthetic)) >= 10
        keys = _keys([*real, *synthetic])
        assert len(keys) == len(set(keys))
        assert {recipe.side for recipe in real} == {"real"}
        assert {recipe.side for recipe in synthetic} == {"synthetic"}


def test_real_arms_see_no_synthetic_image_and_synthetic_arms_do() -> None:
    real, synthetic = real_recipes(PLANNED, "class weights"), _synthetic("class weights")
    assert {recipe.added for recipe in real} == {"none", "smote"}
    assert {recipe.added for recipe in synthetic} == {"synthetic"}
    assert all(recipe.n_added == 0 for recipe in real if recipe.added == "none")
    assert [dict(recipe.dose) for recipe in real if recipe.added == "smote"] == [PLANNED]


def test_real_arms_begin_with_the_losses_and_go_on_with_the_best_of_them() -> None:
    first = real_recipes(PLANNED, None)
    assert [recipe.loss for recipe in first] == ["plain", *LOSSES]
    whole = real_recipes(PLANNED, "balanced softmax")
    assert whole[: len(first)] == first
    assert {recipe.loss for recipe in whole[len(first) :]} == {"balanced softmax"}
    assert {recipe.mix for recipe in whole} == {"none", "mixup", "cutmix"}
    assert any(recipe.strong for recipe in whole)


def test_every_dose_is_tried_with_the_best_loss_and_with_none() -> None:
    synthetic = without_twins(_synthetic())
    plainly = [recipe for recipe in synthetic if not recipe.pretrain and recipe.added_weight == 1]
    for loss in ("oversampling", "plain"):
        assert sorted(dict(recipe.dose)[3] for recipe in plainly if recipe.loss == loss) == [2, 8, 24, 90]
    # What is dropped first, where time is short, stands last: the dose 1x and the largest are needed most.
    assert _keys(synthetic[:2]) == ["synthetic 1x + oversampling", "synthetic plan + oversampling"]
    others = [recipe for recipe in synthetic if recipe not in plainly]
    assert [(recipe.pretrain, recipe.added_weight, dict(recipe.dose)) for recipe in others] == [
        (True, 1.0, PLANNED),
        (False, 0.3, PLANNED),
    ]


def test_every_dose_is_tried_in_the_best_real_only_arm_first() -> None:
    best_real = _real("mixup + ")
    synthetic = synthetic_recipes(DOSES, best_real, "oversampling")
    beside = [recipe for recipe in synthetic if differs_in_samples_alone(recipe, best_real)]
    assert sorted(recipe.dose for recipe in beside) == sorted(tuple(sorted(dose.items())) for dose in DOSES.values())
    for recipe in beside:
        assert _changed(best_real, recipe) == {"key", "words", "side", "added", "dose"}
    # The places that are left where time is shortest: the dose 1x and the largest, one without the arm, one before it.
    assert _keys(synthetic[:4]) == [
        "synthetic 1x + mixup + oversampling",
        "synthetic plan + mixup + oversampling",
        "synthetic 1x",
        "synthetic plan, then real only + mixup + oversampling",
    ]
    more = [recipe for recipe in synthetic if recipe.pretrain or recipe.added_weight != 1]
    assert {recipe.mix for recipe in more} == {"mixup"}
    assert "synthetic 1x + oversampling" in _keys(synthetic)


def test_samples_beside_real_images_alone_are_not_called_real_only() -> None:
    best_real = real_recipes(PLANNED, None)[0]
    assert best_real.key == "real only"
    synthetic = without_twins(synthetic_recipes(DOSES, best_real, "oversampling"))
    assert _keys(synthetic[:2]) == ["synthetic 1x", "synthetic plan"]
    assert _keys(synthetic[2:3]) == ["synthetic plan, then real only"]


def test_the_same_order_whatever_the_order_of_labels() -> None:
    shuffled = {name: dict(reversed(dose.items())) for name, dose in DOSES.items()}
    assert _synthetic(doses=shuffled) == _synthetic()
    assert real_recipes({3: 90, 2: 40}, "oversampling") == real_recipes(PLANNED, "oversampling")


def test_a_dose_is_sorted_and_leaves_out_classes_without_images() -> None:
    (recipe, *_) = _synthetic(doses={"1x": {5: 4, 1: 0, 0: 2}})
    assert recipe.dose == ((0, 2), (5, 4))
    assert recipe.n_added == 6


def test_doses_that_are_equal_are_tried_once() -> None:
    twice = {"1x": {3: 8}, "3x": {3: 8}, "plan": {3: 20}}
    arms = _synthetic(doses=twice)
    kept = without_twins(arms)
    assert len(kept) < len(arms)
    plainly = [recipe for recipe in kept if not recipe.pretrain and recipe.added_weight == 1]
    tried = [(recipe.loss, dict(recipe.dose)[3]) for recipe in plainly]
    assert sorted(tried) == [("oversampling", 8), ("oversampling", 20), ("plain", 8), ("plain", 20)]
    # The first of two stays, in its place.
    assert kept == without_twins([recipe for recipe in arms if "3x" not in recipe.key])


def test_twins_are_told_by_what_they_do_not_by_their_names() -> None:
    one = Recipe("a", "x", "synthetic", added="synthetic", dose=((1, 2),))
    renamed = Recipe("b", "y", "synthetic", added="synthetic", dose=((1, 2),))
    different = Recipe("a", "x", "synthetic", added="synthetic", dose=((1, 3),))
    assert without_twins([one, renamed, different]) == [one, different]


@pytest.mark.parametrize("added", ["duplicates", "scrambled"])
def test_a_control_differs_in_the_added_images_alone(added: str) -> None:
    for recipe in _synthetic("balanced softmax", "mixup + "):
        made = control(recipe, added)  # type: ignore[arg-type]
        assert _changed(recipe, made) == {"key", "words", "side", "added"}
        assert (made.added, made.side, made.dose) == (added, "control", recipe.dose)


def test_fewer_real_images_change_nothing_else() -> None:
    recipe = real_recipes(PLANNED, "oversampling")[5]
    less = fewer_real(recipe, 0.25)
    assert _changed(recipe, less) == {"key", "side", "share"}
    assert less.share == 0.25
    assert less.key != fewer_real(recipe, 0.5).key


def test_combined_arms_are_a_dose_for_each_class_and_the_ways_of_the_real_only_side() -> None:
    best_real = _real("mixup + ")
    best = _synthetic()[1]
    per_class, *varied = combined_recipes(best, best_real, {2: 12, 3: 0}, "oversampling")
    assert (per_class.dose, per_class.side) == (((2, 12),), "synthetic")
    assert differs_in_samples_alone(per_class, best_real)
    # What the real-only side varies is varied with the best dose.
    for recipe in varied:
        assert _changed(best, recipe) <= {"key", "words", "loss", "strong", "mix", "weight_decay"}
        assert recipe.dose == best.dose
    ways = [(recipe.strong, recipe.mix, recipe.weight_decay) for recipe in varied]
    real = [r for r in real_recipes(PLANNED, "oversampling")[4:] if r.added == "none"]
    assert set(ways) <= {(recipe.strong, recipe.mix, recipe.weight_decay) for recipe in real}


@pytest.mark.parametrize("way", ["", "cutmix + weight decay + "])
def test_one_dose_is_enough_for_as_many_arms_as_the_real_only_side_has(way: str) -> None:
    order, best_real = _synthetic(way=way, doses={"plan": {2: 12}}), _real(way)
    arms = without_twins([*order, *combined_recipes(order[0], best_real, {2: 12}, "oversampling")])
    assert len(arms) >= 10
    assert len(set(_keys(arms))) == len(arms)


def test_where_no_class_is_served_by_any_dose_there_is_no_dose_per_class() -> None:
    order = _synthetic()
    arms = combined_recipes(order[0], _real(""), {2: 0, 3: 0}, "oversampling")
    assert not any("per class" in recipe.key for recipe in arms)
    assert all(recipe.n_added for recipe in arms)


def test_smote_gives_way_to_synthetic_images() -> None:
    smote = _real("smote + ")
    for recipe in _synthetic(way="smote + "):
        assert recipe.added == "synthetic"
        assert "smote" not in recipe.key
    assert differs_in_samples_alone(_synthetic(way="smote + ")[0], smote)
    assert not differs_in_samples_alone(smote, smote)
