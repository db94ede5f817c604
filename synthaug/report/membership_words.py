"""The membership attack and differential privacy in words, the same everywhere. No name from data is among them."""

from __future__ import annotations

from synthaug.records import Checkpoint, Interval, Membership, MembershipFigures

UNAVAILABLE = "unavailable"


def membership_sentence(membership: Membership | None) -> str:
    """What was found, in one sentence."""
    if membership is None:
        return "not tried"
    overall = membership.overall
    if overall.auc is None:
        return f"unavailable: {overall.unavailable}"
    within = overall.auc.low <= 0.5
    verdict = (
        "no evidence that the checkpoint tells its training images from held-out ones"
        if within
        else "the checkpoint tells its training images from held-out ones better than guessing"
    )
    text = f"{verdict}: AUC {_interval(overall.auc)}, 0.5 is guessing"
    classes = [item for item in membership.classes if item.auc is not None]
    if len(classes) > 1:
        worst = max(classes, key=lambda item: item.auc.estimate if item.auc else 0.0)
        assert worst.auc is not None
        text += f"; in the class that is told best {_interval(worst.auc)}"
    if (rate := overall.true_positive_rate) is not None:
        text += f"; of its training images {_percent(rate)} are told at 1 % false alarms"
    return text


def privacy_sentence(checkpoint: Checkpoint) -> str:
    """What was promised of the checkpoint, and what that is not."""
    told = checkpoint.privacy
    if told is None:
        return "The checkpoint was trained without differential privacy."
    return (
        f"The checkpoint was trained with differential privacy (experimental): epsilon {told.epsilon:.3g} at delta "
        f"{told.delta:.2g}, by the {told.accountant} accountant: noise {told.noise_multiplier:.4g} times the clipping "
        f"norm {told.max_grad_norm:g}, {told.steps} steps that draw each of {told.n_images} training images with a "
        f"chance of {told.sample_rate:.4g}. It speaks of the checkpoint alone and of its training images, each counted "
        "as one; not of the validation images that chose the weights. The released samples were filtered against "
        "the real images, which voids it for them, and this release holds no promise of it."
    )


def tested(membership: Membership) -> list[str]:
    """What was done, in sentences."""
    overall = membership.overall
    if not membership.levels:
        return []
    levels = ", ".join(f"{level:g}" for level in membership.levels)
    return [
        f"Tested: a membership attack on the checkpoint by its denoising loss, with {overall.n_members} training "
        f"images against {overall.n_heldout} held-out real ones of the same classes, at noise levels {levels} (images "
        f"in -1 to 1), {membership.draws} noises each, levels combined by mean rank.",
        "AUC is the chance that a training image is made out better than a held-out one of its class: 0.5 is guessing, "
        "1 tells every one. Lower is better.",
    ]


def found(item: MembershipFigures) -> tuple[str, str]:
    """AUC and true-positive rate as table cells."""
    auc = UNAVAILABLE if item.auc is None else _interval(item.auc)
    rate = UNAVAILABLE if item.true_positive_rate is None else _percent(item.true_positive_rate)
    return auc, rate


def _interval(value: Interval) -> str:
    return f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _percent(value: Interval) -> str:
    return f"{100 * value.estimate:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
