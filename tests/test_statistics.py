"""Statistics of the trial: metrics against scikit-learn, resamples by brute force, intervals by simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix, f1_score

from synthaug.records import Interval
from synthaug.trial import statistics
from synthaug.trial.statistics import (
    apply_temperature,
    auprc,
    balanced_accuracy,
    calibration_error,
    confusion,
    fit_temperature,
    group_differences,
    macro_f1,
    paired_differences,
    resample_weights,
    standard_error,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def macro_f1_oracle(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))


@pytest.fixture
def arms() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two arms [3, 90, 4] with coarse probabilities (many ties), labels without class 2, clusters of 1 to 3 images."""
    random = np.random.default_rng(4)
    clusters = np.repeat(np.arange(45), np.tile([1, 2, 3], 15))
    labels = np.repeat(random.choice([0, 1, 3], 45, p=[0.6, 0.25, 0.15]), np.tile([1, 2, 3], 15))
    truth = np.eye(4)[labels]
    a, b = (np.round(softmax(random.normal(size=(3, 90, 4)) + gain * truth), 1) for gain in (1.5, 0.5))
    return a, b, labels, clusters


# Metrics


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("present", [(0, 1, 2, 3), (1, 3), (2,)])
def test_metrics_agree_with_scikit_learn(present: tuple[int, ...]) -> None:
    random = np.random.default_rng(len(present))
    labels = random.choice(present, 60)
    predicted = random.integers(0, 4, 60)  # also classes that have no image
    expected = balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(labels, predicted) == pytest.approx(expected)
    assert macro_f1(labels, predicted) == pytest.approx(macro_f1_oracle(labels, predicted))
    counted = confusion_matrix(labels, predicted, labels=range(4), normalize="true")
    np.testing.assert_allclose(confusion(labels, predicted, 4), counted)


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_auprc_agrees_with_scikit_learn(levels: int) -> None:
    random = np.random.default_rng(levels)
    for share in (0.02, 0.3, 1.0):
        positive = random.random(150) < share
        positive[7] = True
        score = random.integers(0, levels, 150) / levels + 0.3 * positive
        assert auprc(positive, score) == pytest.approx(average_precision_score(positive, score), abs=1e-12)


def test_auprc_by_hand() -> None:
    # Thresholds: {yes}, then {yes, no, no} that share a score, then {no}: half at precision 1, half at 2/4.
    positive = np.array([True, False, True, False, False])
    assert auprc(positive, np.array([0.9, 0.5, 0.5, 0.5, 0.1])) == pytest.approx(0.75)
    assert np.isnan(auprc(np.zeros(3, dtype=bool), np.arange(3.0)))


@pytest.mark.parametrize("levels", [3, 10**6])
def test_weighted_metrics_are_those_of_repeated_rows(levels: int) -> None:
    random = np.random.default_rng(levels)
    labels, predicted = random.choice(3, 40, p=[0.7, 0.2, 0.1]), random.integers(0, 4, 40)
    score = random.integers(0, levels, 40).astype(np.float32)
    weights = random.poisson(1, (6, 40))
    weights[5, labels == 2] = 0
    weights[:5, np.flatnonzero(labels == 2)[0]] += 1
    counts = statistics._counts(labels, predicted, weights.T.astype(np.float32), 4)
    area = statistics._auprc(labels == 2, score, weights.T.astype(np.float32))
    assert np.isnan(area[5])
    for column, times in enumerate(weights):
        rows = np.repeat(np.arange(40), times)
        assert statistics._mean_of_present(counts.recall)[column] == pytest.approx(
            np.mean([(predicted[rows] == k)[labels[rows] == k].mean() for k in np.unique(labels[rows])])
        )
        assert statistics._mean_of_present(counts.f1)[column] == pytest.approx(
            macro_f1_oracle(labels[rows], predicted[rows])
        )
        if column < 5:
            repeated = average_precision_score(labels[rows] == 2, score[rows])
            assert area[column] == pytest.approx(repeated, abs=1e-6)
            assert area[column] == pytest.approx(average_precision_score(labels == 2, score, sample_weight=times))


def test_calibration_error_by_hand() -> None:
    # Two bins of five. (0.6, 0.8]: two images, 0.7 and 0.8 sure, one right: 0.5 against 0.75. (0.8, 1]: one image,
    # 0.9 sure, wrong: 0.9. A confidence of exactly 0.8 belongs to the lower bin.
    probabilities = np.array([[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]])
    labels = np.array([0, 0, 1])
    assert calibration_error(labels, probabilities, bins=5) == pytest.approx((2 * 0.25 + 0.9) / 3)
    # With one bin: one of three right, 0.8 sure on average.
    assert calibration_error(labels, probabilities, bins=1) == pytest.approx(0.8 - 1 / 3)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_temperature_recovers_known_confidence(factor: float) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=(4000, 3)) * 1.5
    honest = softmax(logits)
    labels = (random.random((4000, 1)) > honest.cumsum(1)).sum(1)
    stated = softmax(factor * logits)
    t = fit_temperature(labels, stated)
    assert t == pytest.approx(factor, rel=0.12)
    np.testing.assert_allclose(apply_temperature(stated, factor), honest, atol=1e-9)
    assert calibration_error(labels, apply_temperature(stated, t)) < 0.03
    if factor != 1:
        assert calibration_error(labels, stated) > 0.06


def test_temperature_at_the_edges() -> None:
    labels = np.zeros(20, dtype=np.int64)
    sure_and_wrong = np.tile([0.0, 1.0], (20, 1))
    assert fit_temperature(labels, sure_and_wrong) == pytest.approx(5)
    assert fit_temperature(labels, sure_and_wrong[:, ::-1]) < 1
    assert fit_temperature(labels[:19], sure_and_wrong[:19]) == 1
    np.testing.assert_allclose(
        apply_temperature(np.array([[0.0, 1.0], [0.5, 0.5]]), 0.2), [[0, 1], [0.5, 0.5]], atol=1e-99
    )


# Resamples


def test_clusters_stay_whole_and_classes_keep_their_number() -> None:
    random = np.random.default_rng(0)
    clusters = random.permutation(np.repeat(np.arange(100, 160), 3))
    labels = np.where(clusters < 140, 0, np.where(clusters < 157, 2, 1))  # 40, 17 and 3 patients
    weights = resample_weights(labels, clusters, 400, 3)
    assert weights.shape == (400, 180)
    assert weights.dtype == np.uint16
    for cluster in np.unique(clusters):
        own = weights[:, clusters == cluster]
        assert (own == own[:, :1]).all()
    for label, n_images in enumerate([120, 9, 51]):
        assert (weights[:, labels == label].sum(1) == n_images).all()
    # Drawn with replacement: multiplicities are binomial, mean 1 and variance 1 - 1/m, and patients are equally likely.
    one_each = weights[:, np.unique(clusters, return_index=True)[1]].astype(float)
    assert one_each[:, :40].var(0).mean() == pytest.approx(1 - 1 / 40, rel=0.05)
    np.testing.assert_allclose(one_each.mean(0), 1, atol=5 / np.sqrt(400))
    assert (weights == resample_weights(labels, clusters, 400, 3)).all()
    assert (weights != resample_weights(labels, clusters, 400, 4)).any()


def test_a_mixed_cluster_belongs_to_its_most_frequent_label() -> None:
    # Cluster 7 is mostly of class 1, cluster 8 is even and so of class 0; each is alone in its stratum.
    labels, clusters = np.array([0, 1, 1, 1, 0]), np.array([7, 7, 7, 8, 8])
    assert (resample_weights(labels, clusters, 50, 0) == 1).all()


# Differences


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_estimates_and_intervals_agree_with_brute_force(
    arms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    a, b, labels, clusters = arms
    metrics: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "balanced_accuracy": lambda own, p: float(balanced_accuracy_score(own, p.argmax(1))),
        "macro_f1": lambda own, p: macro_f1_oracle(own, p.argmax(1)),
        "rare_auprc": lambda own, p: float(np.mean([average_precision_score(own == k, p[:, k]) for k in (1, 3)])),
        "recall/3": lambda own, p: float((p.argmax(1) == 3)[own == 3].mean()),
        "auprc/1": lambda own, p: float(average_precision_score(own == 1, p[:, 1])),
    }
    found = paired_differences(
        a, b, labels, clusters, rare=[1, 2, 3], n_resamples=25, seed=6, recall_labels=[2, 3], auprc_labels=[1]
    )
    assert set(found) == set(metrics)  # nothing of class 2, which has no test image
    weights = resample_weights(labels, clusters, 25, 6)
    # c for three seeds, with the quantile of Student's t from a table.
    draws = np.random.default_rng([6, 1]).multinomial(3, [1 / 3] * 3, size=25)
    c = np.sqrt(3 / 2) * 4.302653 / 1.959964
    for name, metric in metrics.items():
        assert found[name].estimate == pytest.approx(
            np.mean([metric(labels, one) - metric(labels, other) for one, other in zip(a, b, strict=True)]),
            abs=1e-6,
        )
        values = []
        whole = np.array([metric(labels, one) - metric(labels, other) for one, other in zip(a, b, strict=True)])
        for times, draw in zip(weights, draws, strict=True):
            rows = np.repeat(np.arange(len(labels)), times)
            own = labels[rows]
            d = np.array([metric(own, one[rows]) - metric(own, other[rows]) for one, other in zip(a, b, strict=True)])
            values.append(d.mean() + c * (np.repeat(whole, draw).mean() - whole.mean()))
        low, high = np.quantile(values, [0.025, 0.975])
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=1e-5)


def test_pieces_of_resamples_do_not_change_the_interval(
    arms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = paired_differences(*arms, rare=[3], n_resamples=40)
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 4 * 90 * 7)
    assert paired_differences(*arms, rare=[3], n_resamples=40) == whole
    assert paired_differences(*arms, rare=[3], n_resamples=40, seed=1) != whole


def test_equal_arms_differ_by_nothing(arms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, labels, clusters = arms
    found = paired_differences(a, a.copy(), labels, clusters, rare=[1, 3], n_resamples=100)
    assert set(found) == {
        "balanced_accuracy", "macro_f1", "rare_auprc", "recall/0", "recall/1", "recall/3", "auprc/1", "auprc/3"
    }  # fmt: skip
    assert set(found.values()) == {Interval(estimate=0, low=0, high=0)}
    forth = paired_differences(a, b, labels, clusters, rare=[1], n_resamples=100)["balanced_accuracy"]
    back = paired_differences(b, a, labels, clusters, rare=[1], n_resamples=100)["balanced_accuracy"]
    assert (back.estimate, back.low, back.high) == pytest.approx((-forth.estimate, -forth.high, -forth.low))
    assert forth.low < forth.estimate < forth.high


def test_a_class_of_one_patient_gets_no_interval_of_its_own(
    arms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    a, b, labels, clusters = arms
    clusters = np.where(labels == 3, 1000, clusters)
    found = paired_differences(a, b, labels, clusters, rare=[2, 3], n_resamples=20)
    assert set(found) == {"balanced_accuracy", "macro_f1", "rare_auprc", "recall/0", "recall/1"}
    assert "rare_auprc" not in paired_differences(a, b, labels, clusters, rare=[2], n_resamples=20)


def test_bad_input_is_refused(arms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, labels, clusters = arms
    with pytest.raises(ValueError, match="must have one shape"):
        paired_differences(a[:2], b, labels, clusters, rare=[])
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_differences(a[:0], b[:0], labels, clusters, rare=[])
    with pytest.raises(ValueError, match="90 images need as many labels"):
        paired_differences(a, b, labels[:-1], clusters, rare=[])
    with pytest.raises(ValueError, match=r"Labels must be in 0\.\.3"):
        paired_differences(a, b, labels + 1, clusters, rare=[])


SEED_SPREAD, IMAGE_NOISE = 0.2, 0.3


def simulated(
    random: np.random.Generator, gain: float, n_seeds: int, patients: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arms with a known expected recall: an image is right if its margin is over 0.

    The margin is that of the arm, plus how easy patient and image are (in both arms), plus a part by seed and class and
    a part by seed and image. Patients of two images, a quarter of class 1.
    """
    clusters = np.repeat(np.arange(patients), 2)
    labels = np.where(clusters < patients * 3 // 4, 0, 1)
    n = len(labels)
    easy = np.sqrt(0.5) * (random.normal(size=patients)[clusters] + random.normal(size=n))
    arms = []
    for mean in (0.5 + gain, 0.5):
        by_class = SEED_SPREAD * random.normal(size=(n_seeds, 2))[:, labels]
        margin = mean + easy + by_class + IMAGE_NOISE * random.normal(size=(n_seeds, n))
        own = 1 / (1 + np.exp(-margin))
        first = np.where(labels == 0, own, 1 - own)
        arms.append(np.stack([first, 1 - first], axis=-1))
    return arms[0], arms[1], labels, clusters


def true_difference(gain: float) -> float:
    spread = np.sqrt(1 + SEED_SPREAD**2 + IMAGE_NOISE**2)
    return float(norm.cdf((0.5 + gain) / spread) - norm.cdf(0.5 / spread))


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.0, 0.6])
def test_intervals_cover_the_true_difference(gain: float) -> None:
    random = np.random.default_rng(12)
    truth = true_difference(gain)
    found = [
        paired_differences(
            *simulated(random, gain, 4), rare=[], n_resamples=200, seed=repetition, recall_labels=[], auprc_labels=[]
        )["balanced_accuracy"]
        for repetition in range(500)
    ]
    covered = sum(item.low <= truth <= item.high for item in found)
    assert covered >= 450
    # The estimate is unbiased, and the intervals are not so wide as to cover anything.
    estimates = np.array([item.estimate for item in found])
    assert estimates.mean() == pytest.approx(truth, abs=4 * estimates.std() / np.sqrt(500))
    assert np.mean([item.high - item.low for item in found]) < 2.5 * 2 * 1.96 * estimates.std()
    above = sum(item.low > 0 for item in found)
    if gain == 0:
        assert binomtest(above, 500, 0.05, alternative="greater").pvalue > 0.01
    else:
        assert above > 250


def test_more_seeds_narrow_the_interval() -> None:
    widths = []
    for n_seeds in (3, 5, 10):
        random = np.random.default_rng(3)
        found = [
            paired_differences(*simulated(random, 0.3, n_seeds), rare=[1], n_resamples=200, recall_labels=[])
            for _ in range(10)
        ]
        widths.append([np.mean([item[key].high - item[key].low for item in found]) for key in found[0]])
    assert (np.diff(np.array(widths), axis=0) < 0).all()


def test_one_seed_leaves_the_chance_of_the_images() -> None:
    a, b, labels, clusters = simulated(np.random.default_rng(2), 0.6, 1)
    found = paired_differences(a, b, labels, clusters, rare=[], n_resamples=300, seed=2)["recall/1"]
    right = (a[0].argmax(1) == labels).astype(float) - (b[0].argmax(1) == labels)
    weights = resample_weights(labels, clusters, 300, 2)[:, labels == 1]
    low, high = np.quantile(weights @ right[labels == 1] / weights.sum(1), [0.025, 0.975])
    assert (found.estimate, found.low, found.high) == pytest.approx((right[labels == 1].mean(), low, high))


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_the_standard_error_is_that_of_images_and_of_seeds(n_seeds: int) -> None:
    random = np.random.default_rng(n_seeds)
    labels = np.repeat([0, 1], [400, 100])
    a, b = (np.eye(2)[np.where(random.random((n_seeds, 500)) < share, labels, 1 - labels)] for share in (0.8, 0.7))
    correct = [one.argmax(-1) == labels for one in (a, b)]
    lead = (correct[0].astype(float) - correct[1]).mean(0)
    images = sum(lead[labels == label].var() / (labels == label).sum() for label in (0, 1)) / 4
    scores = [[balanced_accuracy(labels, one.argmax(1)) for one in arm] for arm in (a, b)]
    seeds = np.var(np.subtract(*scores), ddof=1) / n_seeds if n_seeds > 1 else 0
    found = standard_error(a, b, labels, np.arange(500), "balanced_accuracy", n_resamples=4000)
    assert found == pytest.approx(np.sqrt(images + seeds), rel=0.04)
    # Images of one patient are no further witnesses: each stands there five times.
    again = [np.repeat(one, 5, axis=1) for one in (a, b)]
    patients = np.repeat(np.arange(500), 5)
    whole = standard_error(*again, np.repeat(labels, 5), patients, "balanced_accuracy", n_resamples=4000)
    assert whole == pytest.approx(found, rel=0.06)


# Subgroups


def test_subgroups_are_compared_on_their_own() -> None:
    a, b, labels, clusters = simulated(np.random.default_rng(8), 0.6, 3, patients=60)
    groups = np.full(120, None, dtype=object)
    groups[clusters % 3 == 0] = "north"  # 40 images of both classes
    groups[(clusters % 3 == 1) & (labels == 0)] = "one class"
    groups[[2 * 59, 2 * 59 + 1, 4]] = "tiny"
    groups[5] = np.nan
    found, left_out = group_differences(a, b, labels, clusters, groups, "macro_f1", n_resamples=200, seed=5)
    assert set(found) == {"north"}
    assert left_out == {"one class": "test images of one class only", "tiny": "3 test images, fewer than 10"}
    rows = groups == "north"
    n, before, after, gain = found["north"]
    assert n == 40
    assert before == pytest.approx(np.mean([macro_f1_oracle(labels[rows], one[rows].argmax(1)) for one in b]))
    assert after == pytest.approx(np.mean([macro_f1_oracle(labels[rows], one[rows].argmax(1)) for one in a]))
    alone = paired_differences(a[:, rows], b[:, rows], labels[rows], clusters[rows], rare=[], n_resamples=200, seed=5)[
        "macro_f1"
    ]
    assert gain == alone
    assert gain.estimate == pytest.approx(after - before)


def test_a_subgroup_of_one_patient_is_left_out() -> None:
    a, b, labels, clusters = simulated(np.random.default_rng(8), 0.6, 3)
    groups = np.where(labels == 1, "mixed", "rest").astype(object)
    groups[:4] = "mixed"
    clusters = np.where(groups == "mixed", 0, clusters)
    found, left_out = group_differences(a, b, labels, clusters, groups, "balanced_accuracy", n_resamples=20)
    assert not found
    assert left_out["mixed"] == "all test images belong together, such as those of one patient"
