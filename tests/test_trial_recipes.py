"""The arms of the trial: as many on either side, none twice, controls that differ in the images alone."""

from __future__ import annotations

import pytest

from synthaug.trial.recipes import (
    LOSSES,
    Loss,
    Recipe,
    combined_recipes,
    control,
    fewer_real,
    real_recipes,
    synthetic_recipes,
    without_twins,
)

DOSES = {"0.25x": {2: 3, 3: 2}, "1x": {2: 12, 3: 8}, "3x": {2: 36, 3: 24}, "plan": {2: 40, 3: 90}}
PLANNED = {2: 40, 3: 90}


def _changed(one: Recipe, other: Recipe) -> set[str]:
    other_values = other.plain()
    return {name for name, value in one.plain().items() if value != other_values[name]}


def _keys(recipes: list[Recipe]) -> list[str]:
    return [recipe.key for recipe in recipes]


@pytest.mark.parametrize("best_loss", LOSSES)
def test_both_sides_have_ten_arms_or_more_and_no_two_alike(best_loss: Loss) -> None:
    real, synthetic = real_recipes(PLANNED, best_loss), synthetic_recipes(DOSES, best_loss)
    assert min(len(real), len(synthetic)) >= 10
    keys = _keys([*real, *synthetic])
    assert len(keys) == len(set(keys))
    assert without_twins([*real, *synthetic]) == [*real, *synthetic]
    assert {recipe.side for recipe in real} == {"real"}
    assert {recipe.side for recipe in synthetic} == {"synthetic"}


def test_real_arms_see_no_synthetic_image_and_synthetic_arms_do() -> None:
    real, synthetic = real_recipes(PLANNED, "class weights"), synthetic_recipes(DOSES, "class weights")
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
    synthetic = synthetic_recipes(DOSES, "oversampling")
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


def test_the_same_order_whatever_the_order_of_labels() -> None:
    shuffled = {name: dict(reversed(dose.items())) for name, dose in DOSES.items()}
    assert synthetic_recipes(shuffled, "oversampling") == synthetic_recipes(DOSES, "oversampling")
    assert real_recipes({3: 90, 2: 40}, "oversampling") == real_recipes(PLANNED, "oversampling")


def test_a_dose_is_sorted_and_leaves_out_classes_without_images() -> None:
    (recipe, *_) = synthetic_recipes({"1x": {5: 4, 1: 0, 0: 2}}, "oversampling")
    assert recipe.dose == ((0, 2), (5, 4))
    assert recipe.n_added == 6


def test_doses_that_are_equal_are_tried_once() -> None:
    twice = {"1x": {3: 8}, "3x": {3: 8}, "plan": {3: 20}}
    arms = synthetic_recipes(twice, "oversampling")
    kept = without_twins(arms)
    assert len(kept) < len(arms)
    plainly = [recipe for recipe in kept if not recipe.pretrain and recipe.added_weight == 1]
    tried = [(recipe.loss, dict(recipe.dose)[3]) for recipe in plainly]
    assert sorted(tried) == [("oversampling", 8), ("oversampling", 20), ("plain", 8), ("plain", 20)]
    # The first of two stays, in its place.
    assert kept == [recipe for recipe in arms if "3x" not in recipe.key]


def test_one_dose_alone_gives_arms_without_twins() -> None:
    arms = synthetic_recipes({"plan": {3: 8}}, "oversampling")
    assert len(arms) == 4
    assert without_twins(arms) == arms


def test_twins_are_told_by_what_they_do_not_by_their_names() -> None:
    one = Recipe("a", "x", "synthetic", added="synthetic", dose=((1, 2),))
    renamed = Recipe("b", "y", "synthetic", added="synthetic", dose=((1, 2),))
    different = Recipe("a", "x", "synthetic", added="synthetic", dose=((1, 3),))
    assert without_twins([one, renamed, different]) == [one, different]


@pytest.mark.parametrize("added", ["duplicates", "scrambled"])
def test_a_control_differs_in_the_added_images_alone(added: str) -> None:
    for recipe in synthetic_recipes(DOSES, "balanced softmax"):
        made = control(recipe, added)  # type: ignore[arg-type]
        assert _changed(recipe, made) == {"key", "words", "side", "added"}
        assert (made.added, made.side, made.dose) == (added, "control", recipe.dose)


def test_fewer_real_images_change_nothing_else() -> None:
    recipe = real_recipes(PLANNED, "oversampling")[5]
    less = fewer_real(recipe, 0.25)
    assert _changed(recipe, less) == {"key", "side", "share"}
    assert less.share == 0.25
    assert less.key != fewer_real(recipe, 0.5).key


def test_combined_arms_give_good_doses_the_ways_of_the_best_real_arm() -> None:
    order = synthetic_recipes(DOSES, "oversampling")
    best_real = next(recipe for recipe in real_recipes(PLANNED, "oversampling") if recipe.mix == "mixup")
    plainly = [recipe for recipe in order if not recipe.pretrain and recipe.added_weight == 1]
    per_class, *more = combined_recipes(order, best_real, {2: 12, 3: 0}, "oversampling")
    with_ways, varied = more[: len(plainly)], more[len(plainly) :]
    assert (per_class.dose, per_class.loss, per_class.side) == (((2, 12),), "oversampling", "synthetic")
    for recipe in with_ways:
        assert _changed(best_real, recipe) == {"key", "words", "side", "added", "dose"}
        assert recipe.added == "synthetic"
    # In the order of the doses they are made of; arms that do more than add images give none.
    assert [recipe.dose for recipe in with_ways] == [recipe.dose for recipe in plainly]
    once = without_twins(with_ways)
    assert len(_keys(once)) == len(set(_keys(once))) == len(DOSES)
    # What the real-only side varies is varied with the best dose.
    for recipe in varied:
        assert _changed(plainly[0], recipe) <= {"key", "words", "loss", "strong", "mix", "weight_decay"}
        assert recipe.dose == plainly[0].dose
    ways = [(recipe.strong, recipe.mix, recipe.weight_decay) for recipe in varied]
    real = [r for r in real_recipes(PLANNED, "oversampling")[4:] if r.added == "none"]
    assert set(ways) <= {(recipe.strong, recipe.mix, recipe.weight_decay) for recipe in real}


def test_one_dose_is_enough_for_as_many_arms_as_the_real_only_side_has() -> None:
    order = synthetic_recipes({"plan": {2: 12}}, "oversampling")
    best_real = real_recipes(PLANNED, "oversampling")[-1]
    arms = without_twins([*order, *combined_recipes(order, best_real, {2: 12}, "oversampling")])
    assert len(arms) >= 10


def test_combined_arms_where_no_class_is_served_by_any_dose_have_no_dose_per_class() -> None:
    order = synthetic_recipes(DOSES, "oversampling")[:1]
    only, *_ = combined_recipes(order, real_recipes(PLANNED, None)[1], {2: 0, 3: 0}, "oversampling")
    # It is what was tried, under the same name, so nobody runs it again.
    assert only.key == order[0].key
    assert without_twins([*order, only]) == order


def test_smote_gives_way_to_synthetic_images() -> None:
    order = synthetic_recipes(DOSES, "oversampling")[:1]
    smote = next(recipe for recipe in real_recipes(PLANNED, "oversampling") if recipe.added == "smote")
    only, *_ = combined_recipes(order, smote, {}, "oversampling")
    assert (only.added, only.dose) == ("synthetic", order[0].dose)
    assert "smote" not in only.key
