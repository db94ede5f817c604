"""Arithmetic of a membership attack: does a score tell training images from held-out ones?

AUC is the chance that a training image scores above a held-out image of its class: 0.5 is guessing, 1 tells every one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, norm, rankdata

from synthaug.records import Interval, MembershipFigures

# A class with fewer has no figure of its own: an interval over so few would say next to nothing. Counted in groups
# (patients), since images of one resemble each other.
LEAST_MEMBERS = 10
LEAST_HELDOUT = 20
# The true-positive rate is taken at this share of false alarms at most; fewer held-out groups cannot show so small
# a share.
FALSE_ALARMS = 0.01
LEAST_HELDOUT_FOR_RATE = 99
_RESAMPLES = 1000
_LEVEL = 0.95


def combined_score(losses: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One score an image from its losses at several noise levels: the mean of its ranks within its class.

    No level is chosen by how well it attacks, and none outweighs another by its scale. Members and others are ranked
    together, so that ranking knows nothing of membership.

    Args:
        losses: [n, levels], lower for images that the generator knows better.
        labels: int [n].

    Returns:
        float64 [n] in (0, 1); higher for the likelier member.
    """
    score = np.empty(len(losses))
    for label in np.unique(labels):
        own = labels == label
        score[own] = (rankdata(-losses[own], axis=0).mean(1) - 0.5) / own.sum()
    return score


def roughness(images: np.ndarray) -> np.ndarray:
    """Mean squared difference of neighbouring pixels, [n]: how hard a picture is to denoise for anyone.

    The control of the attack. It knows no generator, so where it tells training images from held-out ones the two
    were different pictures to begin with.

    Args:
        images: [n, size, size, channels], size at least 2.
    """
    values = images.astype(np.float64)
    down, across = np.diff(values, axis=1), np.diff(values, axis=2)
    result: np.ndarray = np.square(down).mean((1, 2, 3)) + np.square(across).mean((1, 2, 3))
    return result


@dataclass(frozen=True)
class Attacked:
    """Images that the attack was tried on; all arrays are [n]."""

    score: np.ndarray  # float64, higher for the likelier member
    control: np.ndarray  # float64, a score that knows no generator
    member: np.ndarray  # bool
    labels: np.ndarray  # int64
    groups: np.ndarray  # str or int; images of one group are drawn together

    def only(self, chosen: np.ndarray) -> Attacked:
        parts = (self.score, self.control, self.member, self.labels, self.groups)
        return Attacked(*(part[chosen] for part in parts))


def figures(attacked: Attacked, seed: int) -> MembershipFigures:
    """What the attack comes to, within classes: a class that is easy to denoise is no membership.

    The AUC is the mean of those of the classes, weighted by m n / (m + n + 1) with m members and n held-out images
    (van Elteren 1960: the weights of the stratified Wilcoxon test). The true-positive rate is the share of members
    whose score is beaten or equalled by so few held-out images of their class that at most `FALSE_ALARMS` of images
    like those would be called members; only of classes with at least `LEAST_HELDOUT_FOR_RATE` held-out groups.
    Carlini et al. 2022 (arXiv 2112.03570) on why an AUC alone hides what is told of a few.

    Intervals are of 95 %. Of the AUC, the wider on either side of two: a bootstrap over groups within class and
    membership, and a score interval with the variance of Hanley & McNeil 1982 at the counts of groups, for a bootstrap
    has no width where every member is told. Of the rate: Clopper-Pearson at the number of groups, the threshold taken
    as given.

    Args:
        attacked: Of one class, or of several.
        seed: Of the bootstrap.

    Returns:
        Without figures, and with the reason, where there are too few groups.
    """
    member = attacked.member
    counts = {"n_members": int(member.sum()), "n_heldout": int((~member).sum())}
    groups = [len(np.unique(attacked.groups[side])) for side in (member, ~member)]
    if groups[0] < LEAST_MEMBERS or groups[1] < LEAST_HELDOUT:
        return MembershipFigures(
            **counts,
            unavailable=(
                f"{groups[0]} training and {groups[1]} held-out images (or groups of them) to compare; at least "
                f"{LEAST_MEMBERS} and {LEAST_HELDOUT} are needed"
            ),
        )
    strata = [_stratum(attacked.only(attacked.labels == label)) for label in np.unique(attacked.labels)]
    strata = [stratum for stratum in strata if stratum.n_members and stratum.n_heldout]
    if not strata:
        return MembershipFigures(**counts, unavailable="no class has both training and held-out images")
    rate = _rate([stratum for stratum in strata if stratum.heldout_groups.max() + 1 >= LEAST_HELDOUT_FOR_RATE])
    return MembershipFigures(
        **counts,
        auc=_auc([stratum.above for stratum in strata], strata, seed),
        control_auc=_auc([stratum.control_above for stratum in strata], strata, seed),
        true_positive_rate=rate,
    )


class _Stratum(NamedTuple):
    """One class: [m, n] of members against held-out images, 1 where the member scores higher, half where alike."""

    above: np.ndarray
    control_above: np.ndarray
    p_value: np.ndarray  # [m]: how likely an image like the held-out ones scores as high
    member_groups: np.ndarray  # int [m], 0 … number of groups - 1
    heldout_groups: np.ndarray  # int [n]

    @property
    def n_members(self) -> int:
        return len(self.member_groups)

    @property
    def n_heldout(self) -> int:
        return len(self.heldout_groups)

    @property
    def weight(self) -> float:
        return self.n_members * self.n_heldout / (self.n_members + self.n_heldout + 1)


def _stratum(own: Attacked) -> _Stratum:
    def above(score: np.ndarray) -> np.ndarray:
        members, heldout = score[own.member][:, None], score[~own.member][None]
        return (members > heldout).astype(np.float32) + np.float32(0.5) * (members == heldout)

    beaten = own.score[own.member][:, None] <= own.score[~own.member][None]
    return _Stratum(
        above=above(own.score),
        control_above=above(own.control),
        p_value=(1 + beaten.sum(1)) / (1 + (~own.member).sum()),
        member_groups=np.unique(own.groups[own.member], return_inverse=True)[1],
        heldout_groups=np.unique(own.groups[~own.member], return_inverse=True)[1],
    )


def _auc(tables: list[np.ndarray], strata: list[_Stratum], seed: int) -> Interval:
    weights = np.array([stratum.weight for stratum in strata])
    weights /= weights.sum()
    estimate = float(np.dot(weights, [table.mean(dtype=np.float64) for table in tables]))
    random = np.random.default_rng(seed)
    resampled = np.zeros(_RESAMPLES)
    for weight, table, stratum in zip(weights, tables, strata, strict=True):
        members, heldout = (_drawn(groups, random) for groups in (stratum.member_groups, stratum.heldout_groups))
        told = ((members @ table) * heldout).sum(1, dtype=np.float64)
        resampled += weight * told / (members.sum(1, dtype=np.float64) * heldout.sum(1, dtype=np.float64))
    sizes = [(stratum.member_groups.max() + 1, stratum.heldout_groups.max() + 1) for stratum in strata]
    scored = _score_interval(estimate, weights, np.array(sizes, dtype=np.float64))
    tail = (1 - _LEVEL) / 2
    boot = np.quantile(resampled, [tail, 1 - tail])
    # Sums of many weights can leave 0..1 by a rounding.
    low, high = np.clip([min(boot[0], scored[0], estimate), max(boot[1], scored[1], estimate)], 0, 1)
    return Interval(estimate=estimate, low=float(low), high=float(high))


def _drawn(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """How often each image is drawn, float32 [_RESAMPLES, n]: groups with replacement, as many as there are."""
    n = int(groups.max()) + 1
    times = random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float32)
    return times[:, groups]


def _score_interval(estimate: float, weights: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """All values that the estimate does not speak against, given the variance at that value (not at the estimate).

    Variance of an AUC a of m and n independent images (Hanley & McNeil 1982, eq. 2), the classes' added up:

        [a (1 - a) + (m - 1) (a / (2 - a) - a^2) + (n - 1) (2 a^2 / (1 + a) - a^2)] / (m n)
    """
    value = np.linspace(0, 1, 4001)[:, None]
    m, n = sizes.T
    spread = value * (1 - value) + (m - 1) * (value / (2 - value) - value**2)
    spread += (n - 1) * (2 * value**2 / (1 + value) - value**2)
    variance = (weights**2 * np.maximum(spread, 0) / (m * n)).sum(1)
    fits = (estimate - value[:, 0]) ** 2 <= norm.ppf((1 + _LEVEL) / 2) ** 2 * variance + 1e-12
    inside = value[fits, 0] if fits.any() else np.array([estimate])
    return float(inside.min()), float(inside.max())


def _rate(strata: list[_Stratum]) -> Interval | None:
    if not strata:
        return None
    told = np.concatenate([stratum.p_value <= FALSE_ALARMS for stratum in strata])
    n = sum(int(stratum.member_groups.max()) + 1 for stratum in strata)
    share = float(told.mean())
    tail = (1 - _LEVEL) / 2
    low = float(beta.ppf(tail, share * n, n - share * n + 1)) if share > 0 else 0.0
    high = float(beta.ppf(1 - tail, share * n + 1, n - share * n)) if share < 1 else 1.0
    return Interval(estimate=share, low=low, high=high)
