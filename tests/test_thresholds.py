"""Thresholds and calibration from histograms against brute force over the scores, and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from trainer.metrics import StreamingMetrics
from trainer.thresholds.tuning import (
    choose_shrinkage,
    expected_calibration_error,
    frequency_thresholds,
    global_threshold,
    platt_scaling,
    temperature_scaling,
    tune_thresholds,
)


pytestmark = pytest.mark.numeric

EDGES = np.linspace(-3, 3, 7)


def random_scores(seed: int, num_documents: int = 60, num_labels: int = 3):
    """Scores in the middles of the bins of `EDGES`, so that histograms lose nothing, higher for positives."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_documents, num_labels)) < [0.5, 0.2, 0.05][:num_labels]).astype(int)
    labels[0] = 1
    scores = np.clip(np.floor(rng.normal(size=labels.shape) * 1.3 + 1.5 * labels - 0.5), -3, 2) + 0.5
    return scores, labels


def histograms(scores, labels, num_bins=6, limits=(-3, 3)):
    metrics = StreamingMetrics(
        labels.shape[1], (1,), thresholds=None, histograms=True, num_bins=num_bins, histogram_range=limits
    )
    metrics.update(torch.tensor(scores), torch.tensor(labels))
    return metrics.histograms()


@pytest.mark.parametrize("objective", ["f1", "macro"])
def test_own_thresholds_reach_the_best_f1_of_each_label(objective):
    for seed in range(10):
        scores, labels = random_scores(seed)
        thresholds = tune_thresholds(*histograms(scores, labels), objective, shrinkage=0)
        for label in range(3):
            best = max(f1_score(labels[:, label], scores[:, label] >= edge) for edge in EDGES[1:-1])
            found = f1_score(labels[:, label], scores[:, label] >= logit(thresholds[label]))
            assert found == pytest.approx(best)


def test_micro_thresholds_reach_the_best_micro_f1_of_all_combinations():
    for seed in range(10):
        scores, labels = random_scores(seed)
        thresholds = tune_thresholds(*histograms(scores, labels), "micro", shrinkage=0)
        best = max(
            f1_score(labels, scores >= np.array(edges), average="micro", zero_division=0)
            for edges in itertools.product(EDGES[1:-1], repeat=3)
        )
        found = f1_score(labels, scores >= logit(thresholds), average="micro", zero_division=0)
        assert found == pytest.approx(best)


def test_the_global_threshold_is_the_best_single_one():
    for seed in range(10):
        scores, labels = random_scores(seed)
        threshold = global_threshold(*histograms(scores, labels))
        best = max(f1_score(labels, scores >= edge, average="micro") for edge in EDGES[1:-1])
        assert f1_score(labels, scores >= logit(threshold), average="micro") == pytest.approx(best)


def test_precision_thresholds_are_the_lowest_with_the_wanted_precision():
    for seed in range(10):
        scores, labels = random_scores(seed)
        thresholds = tune_thresholds(*histograms(scores, labels), "precision:0.8", shrinkage=0)
        for label in range(3):
            edges = [
                edge
                for edge in EDGES[1:-1]
                if (scores[:, label] >= edge).any() and labels[scores[:, label] >= edge, label].mean() >= 0.8
            ]
            assert logit(thresholds[label]) == pytest.approx(min(edges, default=EDGES[-2]))


def test_labels_with_few_positives_are_shrunk_towards_the_global_threshold():
    """
    In the first label 12 positives lie in the bin at 2.5 and negatives up to 1.5: its best edge is 2. In the second 4
    positives lie at -1.5, negatives below: -2. The third has no positive. Pooled, edges -2 and 2 compete: at 2 are 12 of
    16 positives without error (F1 24/28), at -2 all 16 with 60 errors (32/92). With m = 4 the first gets
    12/16 · 2 + 4/16 · 2 = 2, the second 4/8 · -2 + 4/8 · 2 = 0, the third 2.
    """
    positives = np.array([[0, 0, 0, 0, 0, 12], [0, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    negatives = np.array([[20, 20, 20, 20, 20, 0], [50, 0, 0, 0, 0, 0], [50, 0, 0, 0, 0, 0]])
    assert logit(tune_thresholds(positives, negatives, EDGES, "f1", shrinkage=4)) == pytest.approx([2, 0, 2])
    assert logit(global_threshold(positives, negatives, EDGES)) == pytest.approx(2)
    assert logit(tune_thresholds(positives, negatives, EDGES, "f1", shrinkage=1e12)) == pytest.approx([2, 2, 2])
    for_macro = logit(tune_thresholds(positives, negatives, EDGES, "macro"))
    assert for_macro == pytest.approx([2, 4 / 5 * -2 + 1 / 5 * 2, 2])
    assert logit(tune_thresholds(positives, negatives, EDGES)) == pytest.approx([2, 4 / 24 * -2 + 20 / 24 * 2, 2])


def f1_of(histograms, thresholds):
    positives, negatives, edges = histograms
    above = (edges[:-1] + edges[1:]) / 2 >= thresholds[:, None]
    correct, wrong = (positives * above).sum(1), (negatives * above).sum(1)
    support = positives.sum(1)
    micro = 2 * correct.sum() / (correct + wrong + support).sum()
    return micro, (2 * correct / (correct + wrong + support)).mean()


@pytest.mark.parametrize(
    ("objective", "value"), [("f1", sum), ("macro", lambda f1: f1[1]), ("micro", lambda f1: f1[0])]
)
@pytest.mark.parametrize("separate", [True, False])
def test_the_shrinkage_is_the_one_whose_thresholds_do_best_on_the_other_half(objective, value, separate):
    """Where labels lie at levels of their own, own thresholds do best; where they do not, one for all."""
    rng = np.random.default_rng(3)
    labels = (rng.random((400, 30)) < 0.05).astype(int)
    scores = rng.normal(size=labels.shape) + 2.5 * labels + (rng.uniform(-6, 6, 30) if separate else 0)
    edges = np.linspace(-12, 12, 241)
    halves = [[counts[first::2] for counts in (scores, labels)] for first in (0, 1)]
    even, odd = ((*histograms(*half, 240, (-12, 12))[:2], edges) for half in halves)
    candidates = (1.0, 10.0, 1e6)
    reached = []
    for shrinkage in candidates:
        found = [
            f1_of(held_out, logit(tune_thresholds(*tuned, objective, shrinkage)))
            for tuned, held_out in ((even, odd), (odd, even))
        ]
        reached.append(value(np.mean(found, axis=0)))
    chosen = choose_shrinkage(even, odd, objective, candidates)
    # Halves are weighed together there, and one after the other here.
    assert reached[candidates.index(chosen)] > max(reached) - 0.02
    assert chosen == 1.0 if separate else chosen >= 10.0


def labels_scored_by_frequency(slope: float, num_documents: int, seed: int = 0):
    """Histograms of 40 labels with 1 to 300 training documents, whose scores lie `slope` higher per unit of ln(n + 1)."""
    rng = np.random.default_rng(seed)
    counts = np.geomspace(1, 300, 40).round().astype(int)
    labels = (rng.random((num_documents, 40)) < counts / 1000 + 0.01).astype(int)
    scores = rng.normal(size=labels.shape) + 4 * labels + slope * (np.log1p(counts) - 3)
    return histograms(scores, labels, 240, (-12, 12)), counts


@pytest.mark.parametrize("slope", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("objective", ["f1", "micro", "macro"])
def test_thresholds_follow_the_frequency_of_labels_as_the_scores_do(slope, objective):
    tuned, counts = labels_scored_by_frequency(slope, 400)
    thresholds = frequency_thresholds(*tuned, counts, objective)
    line = np.polyfit(np.log1p(counts), thresholds, 1)
    # Frequent labels want a lower threshold by themselves: log-odds of a fifth per unit.
    assert line[0] == pytest.approx(slope - 0.2, abs=0.6)
    assert thresholds == pytest.approx(np.polyval(line, np.log1p(counts)))
    held_out, _ = labels_scored_by_frequency(slope, 2000, seed=1)
    single = np.full(40, logit(global_threshold(*tuned, "micro")))
    better = np.subtract(f1_of(held_out, thresholds), f1_of(held_out, single))
    assert (better > 0.03).all() if slope else (better > -0.01).all()


def test_few_documents_allow_no_steep_slope():
    tuned, counts = labels_scored_by_frequency(0.0, 3)
    thresholds = frequency_thresholds(*tuned, counts)
    assert abs(np.polyfit(np.log1p(counts), thresholds, 1)[0]) < 0.3


def test_rare_labels_are_shrunk_towards_the_threshold_of_their_frequency():
    tuned, counts = labels_scored_by_frequency(1.0, 100)
    common = frequency_thresholds(*tuned, counts)
    found = logit(tune_thresholds(*tuned, shrinkage=1e12, label_counts=counts))
    assert found == pytest.approx(common)
    assert logit(tune_thresholds(*tuned, shrinkage=1e12)) == pytest.approx(logit(global_threshold(*tuned)))
    unseen = tuned[0].sum(axis=1) == 0
    assert unseen.any()
    assert logit(tune_thresholds(*tuned, shrinkage=5.0, label_counts=counts))[unseen] == pytest.approx(common[unseen])
    # The precision that is asked for is a promise per label, whatever its frequency.
    for_precision = tune_thresholds(*tuned, "precision:0.9", label_counts=counts)
    assert for_precision == pytest.approx(tune_thresholds(*tuned, "precision:0.9"))


def test_counts_of_other_labels_are_refused():
    tuned, counts = labels_scored_by_frequency(1.0, 100)
    with pytest.raises(ValueError, match=r"`label_counts` has shape \(3,\), but the histograms are of 40 labels"):
        tune_thresholds(*tuned, label_counts=counts[:3])


def test_without_positives_in_both_halves_or_for_a_precision_the_shrinkage_is_the_default():
    empty = (np.zeros((2, 6), int), np.full((2, 6), 3), EDGES)
    full = (np.full((2, 6), 2), np.full((2, 6), 3), EDGES)
    assert choose_shrinkage(full, empty) == choose_shrinkage(empty, full, "micro") == 20
    assert choose_shrinkage(full, full, "precision:0.9") == 20 and choose_shrinkage(empty, full, "macro") == 1
    with pytest.raises(ValueError, match="`objective` is 'best'"):
        choose_shrinkage(full, full, "best")


def test_a_threshold_lies_in_the_middle_of_the_gap_between_negatives_and_positives():
    threshold = tune_thresholds(np.array([[0, 0, 0, 0, 0, 3]]), np.array([[3, 0, 0, 0, 0, 0]]), EDGES)
    assert logit(threshold) == pytest.approx([0])


def test_tuned_thresholds_give_in_the_accumulator_what_the_histograms_promise():
    rng = np.random.default_rng(1)
    labels = (rng.random((500, 4)) < 0.2).astype(int)
    scores = rng.normal(size=(500, 4)) * 2 + 3 * labels - 3
    positives, negatives, edges = histograms(scores, labels, 240, (-12, 12))
    found = {}
    for name, thresholds in (("own", tune_thresholds(positives, negatives, edges, shrinkage=0)), ("half", 0.5)):
        metrics = StreamingMetrics(4, (1,), thresholds=thresholds)
        metrics.update(scores, labels)
        found[name] = metrics.compute()["f1_macro"]
    promised = [
        max(2 * p[i:].sum() / (p[i:].sum() + n[i:].sum() + p.sum()) for i in range(1, 240))
        for p, n in zip(positives, negatives)
    ]
    assert found["own"] == pytest.approx(np.mean(promised))
    assert found["own"] > found["half"]


def test_calibrated_thresholds_make_the_same_decisions():
    scores, labels = random_scores(2)
    counts = histograms(scores, labels)
    plain = tune_thresholds(*counts)
    calibrated = tune_thresholds(*counts, calibration={"scale": 0.7, "bias": -2.0})
    np.testing.assert_array_equal(expit(0.7 * scores - 2.0) >= calibrated, scores >= logit(plain))


def calibrated_data(scale: float, bias: float):
    """Logits whose true probability is sigmoid(scale · logit + bias)."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 2)) * 3
    return scores, (rng.random(scores.shape) < expit(scale * scores + bias)).astype(int)


def test_platt_scaling_equals_a_logistic_regression_on_the_scores():
    scores, labels = calibrated_data(0.4, -1.5)
    found = platt_scaling(*histograms(scores, labels, 1024, (-16, 16)))
    regression = LogisticRegression(C=np.inf).fit(scores.reshape(-1, 1), labels.ravel())
    assert found["scale"] == pytest.approx(regression.coef_[0, 0], rel=1e-2)
    assert found["bias"] == pytest.approx(regression.intercept_[0], rel=1e-2)


def test_platt_scaling_stays_finite_for_separable_scores():
    found = platt_scaling(np.array([[0, 0, 5]]), np.array([[9, 0, 0]]), np.array([-30.0, -10, 10, 30]))
    assert np.isfinite([found["scale"], found["bias"]]).all() and found["scale"] > 0
    # Platt's targets: 6/7 at the positives (20), 1/11 at the negatives (-20)
    assert expit(found["scale"] * 20 + found["bias"]) == pytest.approx(6 / 7, abs=1e-4)
    assert expit(found["scale"] * -20 + found["bias"]) == pytest.approx(1 / 11, abs=1e-4)


def test_temperature_scaling_finds_the_temperature_that_made_the_labels():
    scores, labels = calibrated_data(0.4, 0.0)
    found = temperature_scaling(*histograms(scores, labels, 1024, (-16, 16)))
    assert found["scale"] == pytest.approx(0.4, rel=0.03) and found["bias"] == 0


def test_calibration_lowers_the_expected_calibration_error():
    scores, labels = calibrated_data(0.4, -1.5)
    counts = histograms(scores, labels, 1024, (-16, 16))
    before = expected_calibration_error(*counts)
    temperature = expected_calibration_error(*counts, calibration=temperature_scaling(*counts))
    platt = expected_calibration_error(*counts, calibration=platt_scaling(*counts))
    assert platt < 0.01 < temperature < before


def test_expected_calibration_error_equals_a_slow_count():
    scores, labels = calibrated_data(0.4, -1.5)
    probability, truth = expit(scores).ravel(), labels.ravel()
    expected = 0.0
    for i in range(15):
        inside = (probability >= i / 15) & (probability < (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(probability[inside].mean() - truth[inside].mean())
    found = expected_calibration_error(*histograms(scores, labels, 1024, (-16, 16)))
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (tune_thresholds, {"objective": "recall:0.9"}, "`objective` is 'recall:0.9'.*precision:P"),
        (tune_thresholds, {"objective": "precision:90"}, "`objective` is 'precision:90'"),
        (tune_thresholds, {"objective": "precision:high"}, "`objective` is 'precision:high'"),
        (tune_thresholds, {"shrinkage": -1}, "`shrinkage` is -1"),
        (tune_thresholds, {"bin_edges": np.arange(3)}, r"\(3,\).*StreamingMetrics.histograms"),
        (tune_thresholds, {"positives": np.zeros((1, 4))}, "None of the documents has a label"),
        (temperature_scaling, {"negatives": np.zeros((1, 4))}, "no negative"),
        (platt_scaling, {"positives": np.array([[5, 1, 0, 0]])}, "positives are not above those of negatives"),
        (temperature_scaling, {"positives": np.array([[5, 1, 0, 0]])}, "positives are not above those of negatives"),
        (expected_calibration_error, {"positives": np.zeros(4)}, "must be .num_labels, num_bins. twice"),
    ],
)
def test_bad_arguments_are_reported_in_one_sentence(function, arguments, message):
    good = {
        "positives": np.array([[0, 0, 1, 3]]),
        "negatives": np.array([[0, 0, 3, 4]]),
        "bin_edges": np.arange(5) - 2,
    }
    with pytest.raises(ValueError, match=message):
        function(**{**good, **arguments})


def test_a_single_bin_cannot_hold_a_threshold():
    with pytest.raises(ValueError, match="at least 2 bins"):
        tune_thresholds(np.ones((1, 1)), np.ones((1, 1)), np.array([-1, 1]))
