"""The membership attack in words, the same in the card and on the terminal. No name from data is among them."""

from __future__ import annotations

from synthaug.records import Interval, Membership, MembershipFigures

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
