"""What an arm reached on the test split, and 95 % intervals for the difference of two arms.

Labels are int [n] in 0..K-1, probabilities float [n, K]; S arms by seed are stacked to [S, n, K]. B is the number of
resamples, W their weights: how often each image was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse, special

from synthaug.records import Interval

Metric = Literal["balanced_accuracy", "macro_f1"]
Measure = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]

LEAST_GROUP_IMAGES = 10
LEAST_TEMPERATURE_IMAGES = 20
# Of one temporary; a handful live at a time. Weights beside it are uint16 [B, n]: 40 MB at 2000 x 10,000.
_CHUNK_BYTES = 32 * 2**20
_SMALLEST = float(np.finfo(np.float32).tiny)


class GroupDifference(NamedTuple):
    """The metric within a subgroup, means over the seeds, and the difference after - before."""

    n: int
    before: float
    after: float
    gain: Interval


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall over the classes present in `labels`, 0 to 1; higher is better. Both are int [n]."""
    return float(_mean_of_present(_counts_of(labels, predicted).recall)[0])


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 over the classes present in `labels`, 0 to 1; higher is better. Both are int [n]."""
    return float(_mean_of_present(_counts_of(labels, predicted).f1)[0])


METRICS: dict[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
}


def auprc(positive: np.ndarray, score: np.ndarray) -> float:
    """Average precision, 0 to 1; higher is better: precision at each threshold, weighted by the recall it adds.

    Equal scores share a threshold, as in `sklearn.metrics.average_precision_score`.

    Args:
        positive: bool [n].
        score: float [n], higher for likelier positives.

    Returns:
        nan without a positive.
    """
    return float(_auprc(np.asarray(positive, dtype=bool), np.asarray(score), np.ones((len(score), 1)))[0])


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top class, 0 to 1; lower is better (Guo et al. 2017, eq. 3).

    Bins are of equal width and closed on the right: (0, 1/15], (1/15, 2/15] …
    """
    confidence = np.asarray(probabilities, dtype=np.float64).max(1)
    correct = np.argmax(probabilities, 1) == labels
    place = np.clip(np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True) - 1, 0, bins - 1)
    # |accuracy - confidence| of a bin, times its share of the images: the counts cancel.
    return float(np.abs(np.bincount(place, correct - confidence, minlength=bins)).sum() / len(labels))


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature in 0.2..5 with the least negative log-likelihood (Guo et al. 2017, sec. 4.2).

    Over 1 it makes the classifier less sure. 1 with fewer than 20 images: such a fit is mostly chance.
    """
    if len(labels) < LEAST_TEMPERATURE_IMAGES:
        return 1.0
    rows = np.arange(len(labels))
    grid = np.geomspace(0.2, 5, 60)
    losses = [-_log_softened(probabilities, temperature)[rows, labels].mean() for temperature in grid]
    return float(grid[int(np.argmin(losses))])


def apply_temperature(probabilities: np.ndarray, t: float) -> np.ndarray:
    """probabilities**(1/t), each row brought to sum 1: softmax(logits / t). Any shape [..., K]; float64."""
    return np.exp(_log_softened(probabilities, t))


def confusion(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """[K, K] float64; row: true class, column: predicted. Rows sum to 1, those of absent classes to 0."""
    code = np.asarray(labels, dtype=np.int64) * n_classes + predicted
    counts = np.bincount(code, minlength=n_classes**2).reshape(n_classes, n_classes)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def resample_weights(labels: np.ndarray, clusters: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each resample of a cluster bootstrap, stratified by class.

    Clusters (patients) stay whole, since their images resemble each other. A cluster belongs to the stratum of its
    most frequent label, the lowest among equals; within a stratum clusters are drawn with replacement, as many as
    there are. So a class keeps images in every resample where clusters hold one class each.

    Args:
        labels: int [n], at least 0.
        clusters: int [n].
        n_resamples: B.
        seed: Equal seeds give equal weights.

    Returns:
        uint16 [B, n].
    """
    names, cluster = np.unique(clusters, return_inverse=True)
    n_classes = int(labels.max()) + 1
    holds = np.bincount(cluster * n_classes + labels, minlength=len(names) * n_classes).reshape(len(names), n_classes)
    stratum = holds.argmax(1)
    random = np.random.default_rng(seed)
    drawn = np.empty((n_resamples, len(names)), dtype=np.uint16)
    for label in np.unique(stratum):
        members = np.flatnonzero(stratum == label)
        for part in _chunks(n_resamples, 8 * len(members)):
            rows = part.stop - part.start
            picks = random.integers(0, len(members), size=(rows, len(members)))
            picks += len(members) * np.arange(rows)[:, None]
            drawn[part, members] = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
    return drawn[:, cluster]


def paired_differences(
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    *,
    rare: Sequence[int],
    n_resamples: int = 2000,
    seed: int = 0,
    recall_labels: Sequence[int] | None = None,
    auprc_labels: Sequence[int] | None = None,
) -> dict[str, Interval]:
    """Metrics of arm a minus arm b, paired by test image and classifier seed, with 95 % intervals.

    The estimate is the mean over seeds of metric(a_s) - metric(b_s) on the whole test set. The interval is the
    percentile interval of a hierarchical bootstrap over clusters of test images and over seeds. With d_s the difference
    of seed s on the whole test set, d_s(r) in resample r, and D the seeds drawn for it with replacement, the value of
    resample r is

        mean_s d_s(r) + c · (mean_{s in D} d_s - mean_s d_s),   c = sqrt(S / (S - 1)) · t(0.975, S - 1) / 1.96

    c, since drawing from S seeds understates the variance of their mean by (S - 1) / S, which is much for few
    (Davison & Hinkley 1997, sec. 3.8, on hierarchical data), and since so few tell their own spread only roughly:
    the quantile of Student's t is for that. With one seed the interval holds the chance of the test images alone.

    The seeds' part is taken from the whole test set: taken within each resample it would count the chance of single
    predictions twice more (simulated, 5 seeds, no true difference: held in 99.0 and above zero in 0.5 of 100 trials,
    against 97.2 and 1.6 as it is here). It enters once through the images and once through the seeds all the same, so
    the intervals err on the wide side. With two seeds they are too wide to show anything, and with one they held the
    truth in 54 to 72 of 100 only, since they then speak of two trained classifiers and not of two ways to train.

    Strata are not widened in this way: an interval that rests on a class with few clusters is too narrow, and a
    class with a single one adds nothing to it. For such a class alone there would be no interval at all, so that
    'recall/<label>' and 'auprc/<label>' are left out.

    Args:
        a: Class probabilities of the arm that should be better [S, n, K].
        b: Of the other arm, by the same seeds, on the same images [S, n, K].
        labels: int [n].
        clusters: int [n]; images that share one are drawn together.
        rare: Labels behind 'rare_auprc'.
        n_resamples: B.
        seed: Equal seeds give equal intervals.
        recall_labels: Labels to give 'recall/<label>' of; all where not given.
        auprc_labels: Labels to give 'auprc/<label>' of; those of `rare` where not given.

    Returns:
        'balanced_accuracy', 'macro_f1', 'rare_auprc' (mean AUPRC of the labels of `rare` that have test images, not
        there if none has), and for labels with at least two clusters 'recall/<label>' and 'auprc/<label>'.

    Raises:
        ValueError: The arms or the labels do not fit each other, or there is no image or no seed.
    """
    _check(a, b, labels, clusters)
    present = np.unique(labels).tolist()
    several = {label for label in present if len(np.unique(clusters[labels == label])) > 1}
    rare = [label for label in present if label in set(rare)]
    recalls = [label for label in (present if recall_labels is None else recall_labels) if label in several]
    areas = [label for label in (rare if auprc_labels is None else auprc_labels) if label in several]

    def measure(probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = _counts(labels, probabilities.argmax(1), weights, probabilities.shape[1])
        recall = counts.recall
        values = {"balanced_accuracy": _mean_of_present(recall), "macro_f1": _mean_of_present(counts.f1)}
        area = {label: _auprc(labels == label, probabilities[:, label], weights) for label in {*rare, *areas}}
        if rare:
            values["rare_auprc"] = _mean_of_present(np.stack([area[label] for label in rare]))
        values |= {f"recall/{label}": recall[label] for label in recalls}
        return values | {f"auprc/{label}": area[label] for label in areas}

    return _differences(a, b, labels, clusters, measure, n_resamples, seed)


def standard_error(
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    metric: Metric,
    *,
    n_resamples: int = 500,
    seed: int = 0,
) -> float:
    """Of the mean over seeds of metric(a_s) - metric(b_s): by what chance of images and of seeds it would be another.

    The root of the variance over resamples of the images, of the mean over seeds, and of the variance over seeds, on
    all images, divided by their number; the latter is 0 with one seed. Errs on the high side, as the intervals do.

    Args:
        a, b, labels, clusters, n_resamples, seed: As in `paired_differences`.
        metric: Of which the difference is.
    """
    _check(a, b, labels, clusters)
    differences = _resampled(a, b, labels, clusters, _measure_of(labels, metric), n_resamples, seed)[metric]
    images = float(np.nanvar(differences[:, 1:].mean(0), ddof=1))
    seeds = float(np.var(differences[:, 0], ddof=1)) / len(a) if len(a) > 1 else 0.0
    return float(np.sqrt(images + seeds))


def group_differences(
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    groups: np.ndarray,
    metric: Metric,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, GroupDifference], dict[str, str]]:
    """The difference of `paired_differences` within each subgroup, b being before and a after.

    The metric is over the classes that the subgroup has.

    Args:
        a, b, labels, clusters, n_resamples, seed: As in `paired_differences`.
        groups: Names of subgroups, str or None [n]; None (or nan, as pandas has it) belongs to no subgroup.
        metric: The trial's metric.

    Returns:
        Name to result, for subgroups with at least 10 images, 2 classes and 2 clusters; and name to why it was left
        out, in words, for the others. Both by name.
    """
    _check(a, b, labels, clusters)
    whole = METRICS[metric]
    found: dict[str, GroupDifference] = {}
    left_out: dict[str, str] = {}
    for name in sorted({name for name in groups if isinstance(name, str)}):
        rows = np.flatnonzero(groups == name)
        own = labels[rows]
        if len(rows) < LEAST_GROUP_IMAGES:
            left_out[name] = f"{_many(len(rows), 'test image')}, fewer than {LEAST_GROUP_IMAGES}"
            continue
        if len(np.unique(own)) < 2:
            left_out[name] = "test images of one class only"
            continue
        if len(np.unique(clusters[rows])) < 2:
            left_out[name] = "all test images belong together, such as those of one patient"
            continue
        arms = a[:, rows], b[:, rows]
        after, before = (float(np.mean([whole(own, one.argmax(1)) for one in arm])) for arm in arms)
        gain = _differences(*arms, own, clusters[rows], _measure_of(own, metric), n_resamples, seed)[metric]
        found[name] = GroupDifference(len(rows), before, after, gain)
    return found, left_out


def _measure_of(labels: np.ndarray, metric: Metric) -> Measure:
    def measure(probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = _counts(labels, probabilities.argmax(1), weights, probabilities.shape[1])
        return {metric: _mean_of_present(counts.recall if metric == "balanced_accuracy" else counts.f1)}

    return measure


class _Counts(NamedTuple):
    """Weighted numbers of images by class and resample, float64 [K, B]."""

    true: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray

    @property
    def recall(self) -> np.ndarray:
        """[K, B]; nan where the resample lacks the class."""
        return _ratio(self.correct, self.true)

    @property
    def f1(self) -> np.ndarray:
        """[K, B]; nan where the resample lacks the class, even if it is predicted."""
        return _ratio(2 * self.correct, np.where(self.true > 0, self.true + self.predicted, 0))


def _counts(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, n_classes: int) -> _Counts:
    """For weights [n, B]."""
    of_correct = np.where(predicted == labels, labels, n_classes)
    return _Counts(*(_sums(weights, codes, n_classes).astype(np.float64) for codes in (labels, predicted, of_correct)))


def _counts_of(labels: np.ndarray, predicted: np.ndarray) -> _Counts:
    """For the images as they are: B = 1."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    return _counts(labels, predicted, np.ones((len(labels), 1)), int(max(labels.max(), predicted.max())) + 1)


def _sums(weights: np.ndarray, codes: np.ndarray, n_codes: int) -> np.ndarray:
    """Sums of the rows of weights [n, B] that share a code, [n_codes, B]; codes [n] of n_codes and above are dropped.

    A sparse product reads the weights once, whatever the number of codes: at [10,000, 2000] 12 ms on one core, where
    `np.add.reduceat` on sorted rows took 60 to 130.
    """
    rows = np.flatnonzero(codes < n_codes)
    ones = np.ones(len(rows), dtype=weights.dtype)
    return sparse.csr_array((ones, (codes[rows], rows)), shape=(n_codes, len(weights))) @ weights


def _auprc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of weighted images: [B] float64 for weights [n, B], nan where no positive has weight.

    Only thresholds with a positive add recall, so only they are summed: their number is small for a rare class.
    """
    _, tie = np.unique(-score, return_inverse=True)  # 0 for the highest score
    has_positive = np.bincount(tie, positive) > 0
    # The threshold at which an image is first among those called positive; images below the last get n_thresholds.
    threshold: np.ndarray = (np.cumsum(has_positive) - has_positive)[tie]
    n_thresholds = int(has_positive.sum())
    gained = _sums(weights, np.where(positive, threshold, n_thresholds), n_thresholds)
    called = np.cumsum(_sums(weights, threshold, n_thresholds), axis=0)
    total = gained.sum(0, dtype=np.float64)
    # Float32 counts are exact up to 2**24. Where nothing is called yet, nothing is gained either.
    precision = np.cumsum(gained, axis=0)
    np.divide(precision, called, out=precision, where=called > 0)
    return _ratio(np.einsum("tb,tb->b", gained, precision, dtype=np.float64), total)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, nan where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """[K, B] to [B]: means that leave nan out, nan where all are."""
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0).sum(0), present.sum(0))


def _differences(
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    measure: Measure,
    n_resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """The estimates and intervals of `paired_differences`, for what measure([n, K], weights [n, B]) names."""
    pull = _seed_pull(len(a), n_resamples, seed)
    differences = _resampled(a, b, labels, clusters, measure, n_resamples, seed)
    return {name: _interval(values, pull) for name, values in differences.items()}


def _resampled(
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    measure: Measure,
    n_resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """measure(a_s) - measure(b_s), [S, 1 + B] by name: of all images, then of each resample of their clusters."""
    drawn = resample_weights(labels, clusters, n_resamples, seed)
    by_seed: dict[str, list[np.ndarray]] = {}
    for part in _chunks(n_resamples + 1, 4 * len(labels)):
        # Column 0 of all is the images as they are. Transposed, sums of rows run over memory in order.
        weights = np.ones((len(labels), part.stop - part.start), dtype=np.float32)
        offset = 1 if part.start == 0 else 0
        weights[:, offset:] = drawn[part.start + offset - 1 : part.stop - 1].T
        pieces = [(measure(one, weights), measure(other, weights)) for one, other in zip(a, b, strict=True)]
        for name in pieces[0][0]:
            by_seed.setdefault(name, []).append(np.stack([one[name] - other[name] for one, other in pieces]))
    return {name: np.concatenate(values, axis=1) for name, values in by_seed.items()}


def _seed_pull(n_seeds: int, n_resamples: int, seed: int) -> np.ndarray:
    """[S, B]: c times (share of the seed among S drawn with replacement - 1/S); rows 0 with one seed."""
    if n_seeds == 1:
        return np.zeros((1, n_resamples))
    # A stream of its own, so that seeds and images are drawn independently.
    random = np.random.default_rng([seed, 1])
    shares = random.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples).T / n_seeds
    c = np.sqrt(n_seeds / (n_seeds - 1)) * special.stdtrit(n_seeds - 1, 0.975) / special.ndtri(0.975)
    return c * (shares - 1 / n_seeds)


def _interval(differences: np.ndarray, pull: np.ndarray) -> Interval:
    """From differences [S, 1 + B], the first of all images. Resamples without the class are left out."""
    resampled = differences[:, 1:]
    values = resampled.mean(0) + (pull * differences[:, :1]).sum(0)
    low, high = np.quantile(values[~np.isnan(values)], [0.025, 0.975])
    return Interval(estimate=float(differences[:, 0].mean()), low=float(low), high=float(high))


def _log_softened(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax(log p / T). A probability of 0 counts as the smallest of float32, so that no loss is endless."""
    scaled = np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), _SMALLEST)) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def _check(a: np.ndarray, b: np.ndarray, labels: np.ndarray, clusters: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"Two arms [seeds, images, classes] must have one shape, not {a.shape} and {b.shape}.")
    if 0 in a.shape:
        raise ValueError(f"There is nothing to compare in arms of the shape {a.shape}.")
    if labels.shape != (a.shape[1],) or clusters.shape != labels.shape:
        raise ValueError(f"{a.shape[1]} images need as many labels and clusters, not {labels.shape}, {clusters.shape}.")
    if not 0 <= labels.min() <= labels.max() < a.shape[2]:
        raise ValueError(f"Labels must be in 0..{a.shape[2] - 1}, not {labels.min()}..{labels.max()}.")


def _chunks(total: int, bytes_each: int) -> Iterator[slice]:
    """Slices that cover 0..total, of things that are this large; each slice stays near 32 MiB."""
    step = max(1, _CHUNK_BYTES // bytes_each)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
