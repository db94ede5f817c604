"""The arms of the trial, in the order in which they are dropped from the end where time is short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def synthetic_recipes(doses: Mapping[str, Mapping[int, int]], best_loss: Loss) -> list[Recipe]:
    """Arms with synthetic images, whose loss is known before them.

    Args:
        doses: Name ('0.25x', '1x', '3x', 'plan') to label to number of images, in rising order.
    """

    def arm(name: str, loss: Loss, **settings: Any) -> Recipe:
        how = "" if loss == "plain" else f" + {loss}"
        words = f"synthetic images, dose {name}; {_LOSS_WORDS[loss]}"
        return Recipe(
            f"synthetic {name}{how}",
            words,
            "synthetic",
            loss,
            added="synthetic",
            dose=_as_dose(doses[name]),
            **settings,
        )

    most = list(doses)[-1]
    by_need = sorted(doses, key=lambda name: (name != "1x", name != most, list(doses).index(name)))
    with_loss = [arm(name, best_loss) for name in by_need]
    alone = [arm(name, "plain") for name in by_need]
    pretrain = replace(
        with_loss[by_need.index(most)],
        key=f"synthetic {most}, then real only + {best_loss}",
        words=f"trained on real and synthetic images (dose {most}), then on the real ones alone",
        pretrain=True,
    )
    lower = replace(
        with_loss[by_need.index(most)],
        key=f"synthetic {most} at weight {_LOWER_WEIGHT} + {best_loss}",
        words=f"synthetic images (dose {most}) with a weight of {_LOWER_WEIGHT} in the loss",
        added_weight=_LOWER_WEIGHT,
    )
    return [*with_loss[:2], alone[0], pretrain, *with_loss[2:], lower, *alone[1:]]


def combined_recipes(
    order: Sequence[Recipe], best_real: Recipe, per_class: Mapping[int, int], best_loss: Loss
) -> Iterator[Recipe]:
    """Arms that follow from those tried: each class at its own best dose, and good doses in the best real-only arm.

    Without the latter the synthetic images would be tried without MixUp, say, where the real ones have it. Where there
    are few doses, what the real-only side varies is varied with the best of them, so that neither side tries more.

    Args:
        order: Synthetic arms tried, the best first.
        best_real: The best real-only arm.
        per_class: Label to the number of images that served the class best.
    """
    if dose := _as_dose(per_class):
        yield Recipe(
            f"synthetic per class + {best_loss}",
            f"synthetic images, each class at the dose that served it best; {_LOSS_WORDS[best_loss]}",
            "synthetic",
            best_loss,
            added="synthetic",
            dose=dose,
        )
    how = best_real.key.replace("smote + ", "")
    plain = [recipe for recipe in order if not recipe.pretrain and recipe.added_weight == 1]
    for recipe in plain:
        name = recipe.key.split(" + ")[0]
        yield replace(
            best_real,
            key=f"{name} + {how}",
            words=f"{recipe.words.split(';')[0]}; otherwise as '{how}'",
            side="synthetic",
            added="synthetic",
            dose=recipe.dose,
        )
    variations: list[tuple[str, dict[str, Any]]] = [
        ("strong augmentation", {"strong": True}),
        ("mixup", {"mix": "mixup"}),
        ("cutmix", {"mix": "cutmix"}),
        ("weight decay", {"weight_decay": _STRONG_DECAY}),
        ("strong augmentation + mixup", {"strong": True, "mix": "mixup"}),
        ("cutmix + weight decay", {"mix": "cutmix", "weight_decay": _STRONG_DECAY}),
    ]
    for how, settings in variations if plain else []:
        name = plain[0].key.split(" + ")[0]
        words = f"{plain[0].words.split(';')[0]}; {how}; {_LOSS_WORDS[best_loss]}"
        key = f"{name} + {how} + {best_loss}"
        yield replace(plain[0], key=key, words=words, loss=best_loss, **settings)


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
