"""The arms of the trial, in the order in which they are dropped from the end where time is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Loss = Literal["plain", "oversampling", "class weights", "balanced softmax"]
Added = Literal["none", "smote", "synthetic", "duplicates", "scrambled"]

# What the synthetic side is combined with is the best of these, by the real images alone.
LOSSES: tuple[Loss, ...] = ("oversampling", "balanced softmax", "class weights")

WEIGHT_DECAY = 0.05
_STRONG_DECAY = 0.3
# DiffuLT (NeurIPS 2024) gives synthetic images this weight in the loss.
_LOWER_WEIGHT = 0.3

_LOSS_WORDS: dict[Loss, str] = {
    "plain": "cross-entropy, images drawn as often as they are there",
    "oversampling": "every class drawn equally often",
    "class weights": "cross-entropy weighted by inverse class frequency",
    "balanced softmax": "balanced softmax, that is logit adjustment (Ren et al. 2020, Menon et al. 2021)",
}


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained. Steps, network and seeds are the same for all.

    Attributes:
        key: Short name, unique in a trial.
        words: What it does, for people.
        side: Which side of the trial it searches for; controls belong to neither and are made from a finalist.
        loss: What is done about the imbalance.
        strong: Stronger classical augmentation.
        mix: Images mixed in pairs: MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019).
        weight_decay: Of AdamW.
        added: Which images stand beside the real ones.
        dose: Label and number of added images, for the labels that get any.
        added_weight: Weight of added images in the loss; real ones have 1.
        pretrain: Half of the steps on all images, then half on the real ones alone.
        share: Share of the scarce classes' real images that is used (the learning curve).
    """

    key: str
    words: str
    side: Literal["real", "synthetic", "control"]
    loss: Loss = "plain"
    strong: bool = False
    mix: Literal["none", "mixup", "cutmix"] = "none"
    weight_decay: float = WEIGHT_DECAY
    added: Added = "none"
    dose: tuple[tuple[int, int], ...] = ()
    added_weight: float = 1.0
    pretrain: bool = False
    share: float = 1.0

    def plain(self) -> dict[str, Any]:
        """Plain data, for records and digests."""
        return asdict(self)

    @property
    def n_added(self) -> int:
        return sum(number for _, number in self.dose)

    @property
    def way(self) -> tuple[Any, ...]:
        """All that a classifier is trained by but the images."""
        return self.loss, self.strong, self.mix, self.weight_decay, self.added_weight, self.pretrain, self.share


def real_recipes(smote: Mapping[int, int], best_loss: Loss | None) -> list[Recipe]:
    """Arms without synthetic images; those after the losses need the best of them.

    Args:
        smote: Label to how many images SMOTE has made; empty where it can make none.
    """

    def arm(key: str, words: str, **settings: Any) -> Recipe:
        return Recipe(key, words, "real", **settings)

    first = [
        arm("real only", f"the real images alone; {_LOSS_WORDS['plain']}"),
        *(arm(loss, _LOSS_WORDS[loss], loss=loss) for loss in LOSSES),
    ]
    if best_loss is None:
        return first
    dose = _as_dose(smote)
    more = [
        arm(f"strong augmentation + {best_loss}", "stronger classical augmentation", loss=best_loss, strong=True),
        arm(f"mixup + {best_loss}", "MixUp of pairs of images", loss=best_loss, mix="mixup"),
        *([arm(f"smote + {best_loss}", "SMOTE of pixels", loss=best_loss, added="smote", dose=dose)] if dose else []),
        arm(f"cutmix + {best_loss}", "CutMix of pairs of images", loss=best_loss, mix="cutmix"),
        arm(f"weight decay + {best_loss}", "stronger weight decay", loss=best_loss, weight_decay=_STRONG_DECAY),
        arm(
            f"strong augmentation + mixup + {best_loss}",
            "stronger classical augmentation and MixUp",
            loss=best_loss,
            strong=True,
            mix="mixup",
        ),
        arm(
            f"strong augmentation + weight decay + {best_loss}",
            "stronger classical augmentation and weight decay",
            loss=best_loss,
            strong=True,
            weight_decay=_STRONG_DECAY,
        ),
        arm(
            f"cutmix + weight decay + {best_loss}",
            "CutMix and stronger weight decay",
            loss=best_loss,
            mix="cutmix",
            weight_decay=_STRONG_DECAY,
        ),
    ]
    return [*first, *more]


def synthetic_recipes(doses: Mapping[str, Mapping[int, int]], best_real: Recipe, best_loss: Loss) -> list[Recipe]:
    """Synthetic arms that are known before any of them has run.

    Most of them are the best real-only arm with samples beside its images: what differs then is the samples, and no
    arm of the real-only side has anything that they were not tried with.

    Args:
        doses: Name ('0.25x', '1x', '3x', 'plan') to label to number of images, in rising order.
        best_real: What the real-only side came to.
        best_loss: The loss that served the real images best.
    """

    def alone(name: str) -> Recipe:
        words = f"synthetic images, dose {name}; {_LOSS_WORDS['plain']}"
        return Recipe(f"synthetic {name}", words, "synthetic", added="synthetic", dose=_as_dose(doses[name]))

    def with_loss(name: str) -> Recipe:
        words = f"synthetic images, dose {name}; {_LOSS_WORDS[best_loss]}"
        return replace(alone(name), key=f"synthetic {name} + {best_loss}", words=words, loss=best_loss)

    most = list(doses)[-1]
    by_need = sorted(doses, key=lambda name: (name != "1x", name != most, list(doses).index(name)))
    beside = [_beside(best_real, name, doses[name]) for name in by_need]
    main = beside[by_need.index(most)]
    # Without 'real only', 'oversampling' and the like, which all of these have behind the dose.
    behind = main.key.removeprefix(f"synthetic {most}")
    pretrain = replace(
        main,
        key=f"synthetic {most}, then real only{behind}",
        words=f"trained on real and synthetic images (dose {most}), then on the real ones alone; {_way(best_real)}",
        pretrain=True,
    )
    lower = replace(
        main,
        key=f"synthetic {most} at weight {_LOWER_WEIGHT}{behind}",
        words=f"synthetic images (dose {most}) with a weight of {_LOWER_WEIGHT} in the loss; {_way(best_real)}",
        added_weight=_LOWER_WEIGHT,
    )
    return [
        *beside[:2],
        alone(by_need[0]),
        pretrain,
        *beside[2:],
        lower,
        *(with_loss(name) for name in by_need[:2]),
        *(alone(name) for name in by_need[1:]),
        *(with_loss(name) for name in by_need[2:]),
    ]


def combined_recipes(best: Recipe, best_real: Recipe, per_class: Mapping[int, int], best_loss: Loss) -> list[Recipe]:
    """Arms that follow from those tried: each class at its own best dose, and variations of the best dose.

    Where there are few doses, what the real-only side varies is varied with the best of them, so that neither side
    tries more.

    Args:
        best: The best of the synthetic arms tried that adds images and does nothing else with them.
        best_real: What the real-only side came to.
        per_class: Label to the number of images that served the class best.
    """
    own = [_beside(best_real, "per class", per_class)] if _as_dose(per_class) else []
    variations: list[tuple[str, dict[str, Any]]] = [
        ("strong augmentation", {"strong": True}),
        ("mixup", {"mix": "mixup"}),
        ("cutmix", {"mix": "cutmix"}),
        ("weight decay", {"weight_decay": _STRONG_DECAY}),
        ("strong augmentation + mixup", {"strong": True, "mix": "mixup"}),
        ("cutmix + weight decay", {"mix": "cutmix", "weight_decay": _STRONG_DECAY}),
    ]
    name = best.key.split(" + ")[0].removeprefix("synthetic ")
    varied = [
        Recipe(
            f"synthetic {name} + {how} + {best_loss}",
            f"synthetic images, dose {name}; {how}; {_LOSS_WORDS[best_loss]}",
            "synthetic",
            best_loss,
            added="synthetic",
            dose=best.dose,
            **settings,
        )
        for how, settings in variations
    ]
    return [*own, *varied]


def differs_in_samples_alone(recipe: Recipe, best_real: Recipe) -> bool:
    """Whether a synthetic arm is a real-only one with samples beside its images (in place of SMOTE's), and no more."""
    return recipe.added == "synthetic" and recipe.way == best_real.way


def _beside(best_real: Recipe, name: str, dose: Mapping[int, int]) -> Recipe:
    how = best_real.key.replace("smote + ", "")
    return replace(
        best_real,
        # 'real only' with samples is not real only.
        key=f"synthetic {name}" if best_real.loss == "plain" else f"synthetic {name} + {how}",
        words=f"synthetic images, dose {name}; {_way(best_real)}",
        side="synthetic",
        added="synthetic",
        dose=_as_dose(dose),
    )


def _way(best_real: Recipe) -> str:
    return f"otherwise as '{best_real.key}', the best real-only arm"


def control(recipe: Recipe, added: Literal["duplicates", "scrambled"]) -> Recipe:
    """A finalist with other images in place of the synthetic ones, as many of each class."""
    words = {
        "duplicates": "the same recipe with duplicates of real images in place of the synthetic ones",
        "scrambled": "the same recipe with content-free images (phase-scrambled real ones: same spectrum, no anatomy)",
    }
    return replace(recipe, key=f"control: {added}", words=words[added], side="control", added=added)


def fewer_real(recipe: Recipe, share: float) -> Recipe:
    """A real-only arm with a share of the scarce classes' real images, and none that SMOTE made of the others."""
    key = f"{recipe.key}, {share:g} of the scarce real images"
    return replace(recipe, key=key, side="control", added="none", dose=(), share=share)


def without_twins(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Drop arms that do the same as an earlier one."""
    kept: dict[tuple[Any, ...], Recipe] = {}
    for recipe in recipes:
        what = {name: value for name, value in recipe.plain().items() if name not in {"key", "words"}}
        kept.setdefault(tuple(sorted((name, repr(value)) for name, value in what.items())), recipe)
    return list(kept.values())


def _as_dose(numbers: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((int(label), int(number)) for label, number in sorted(numbers.items()) if number > 0)
