"""The metrics against loop-by-loop references, scikit-learn, and golden values of LibMultiLabel and napkinXC."""

import math

import evaluate
import numpy as np
import pytest
import scipy.sparse
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics import StreamingMetrics, inverse_propensities, ranking_metrics
from trainer.metrics.evaluate_metric import MultiLabelMetric
from trainer.metrics.ranking import top_k


def golden_data():
    rng = np.random.default_rng(7)
    labels = (rng.random((40, 12)) < np.linspace(0.5, 0.02, 12)).astype(int)
    return rng.normal(size=(40, 12)) + 1.5 * labels - 0.5, labels


def random_data(seed: int, num_documents: int = 30, num_labels: int = 8):
    """Scores with many ties, sparse labels, documents without labels, labels without documents."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_documents, num_labels)) < 0.2).astype(int)
    labels[:, -1] = 0
    return rng.integers(-3, 4, size=(num_documents, num_labels)) / 2, labels


def slow_ranking(scores, labels, ks, propensities) -> dict[str, float]:
    per_document = {f"{name}@{k}": [] for name in ("p", "recall", "ndcg", "psp", "psndcg") for k in ks}
    best = {f"{name}@{k}": [] for name in ("psp", "psndcg") for k in ks}
    for row, truth in zip(np.asarray(scores).tolist(), np.asarray(labels).tolist()):
        positives = {i for i, value in enumerate(truth) if value}
        ranking = sorted(range(len(row)), key=lambda i: (-row[i], i))
        perfect = sorted(positives, key=lambda i: -propensities[i])
        for k in ks:
            hits = [(rank, i) for rank, i in enumerate(ranking[:k]) if i in positives]
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(positives)))) or 1.0
            per_document[f"p@{k}"].append(len(hits) / k)
            per_document[f"recall@{k}"].append(len(hits) / len(positives) if positives else 0.0)
            per_document[f"ndcg@{k}"].append(sum(1 / math.log2(rank + 2) for rank, _ in hits) / ideal)
            per_document[f"psp@{k}"].append(sum(propensities[i] for _, i in hits))
            best[f"psp@{k}"].append(sum(propensities[i] for i in perfect[:k]))
            gain = sum(propensities[i] / math.log2(rank + 2) for rank, i in hits)
            per_document[f"psndcg@{k}"].append(gain / ideal)
            gain = sum(propensities[i] / math.log2(rank + 2) for rank, i in enumerate(perfect[:k]))
            best[f"psndcg@{k}"].append(gain / ideal)
    result = {}
    for name, values in per_document.items():
        result[name] = sum(values) / (sum(best[name]) or 1.0) if name in best else sum(values) / len(values)
    return result


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_ranking_metrics_equal_a_loop_by_loop_reference():
    propensities = np.linspace(1, 9, 8)
    for seed in range(20):
        scores, labels = random_data(seed)
        expected = slow_ranking(scores, labels, (1, 2, 5, 8), propensities)
        assert ranking_metrics(scores, labels, (1, 2, 5, 8), propensities) == pytest.approx(expected)


def test_ranking_metrics_equal_those_of_libmultilabel_and_napkinxc():
    """
    Made with libmultilabel 0.10.0 (`libmultilabel.linear.compute_metrics(scores, labels, ["P@1", ..., "Macro-F1"])`,
    which predicts a label from a score of 0 on) and napkinXC 0.7.2 (`psprecision_at_k`, `psndcg_at_k`,
    `ndcg_at_k`, `f1_measure(labels, scores >= 0, "samples")`, `coverage_at_k`,
    `Jain_et_al_inverse_propensity(labels)`), both on `golden_data()`.
    """
    scores, labels = golden_data()
    counts = labels.sum(axis=0)
    metrics = StreamingMetrics(12, (1, 3, 5), label_counts=counts * 20, num_documents=1000)
    metrics.update(scores, labels)
    found = metrics.compute()
    libmultilabel = {"p@1": 0.8, "p@3": 0.6083333333, "p@5": 0.47, "recall@3": 0.6771428571, "recall@5": 0.8347023810}
    libmultilabel |= {
        "ndcg@3": 0.7409342469,
        "ndcg@5": 0.7998319390,
        "f1_micro": 0.6455696203,
        "f1_macro": 0.5498536492,
    }
    napkinxc = {"psp@1": 0.7503288399, "psp@3": 0.7359583376, "psp@5": 0.8395214054, "f1_sample": 0.6331349206}
    napkinxc |= {"psndcg@1": 0.7503288399, "psndcg@3": 0.7294011739, "psndcg@5": 0.7893858073, "ndcg@1": 0.8}
    for name, value in (libmultilabel | napkinxc).items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    of_head = inverse_propensities(counts, num_documents=40)[[0, 9, 10]]
    np.testing.assert_allclose(of_head, [1.803041431468464, 3.6888794541139367, 4.561132599135828])


def test_coverage_of_all_labels_equals_that_of_napkinxc():
    scores, labels = golden_data()
    metrics = StreamingMetrics(12, (1, 2, 3), label_counts=np.zeros(12, int), num_documents=40)  # all labels are tail
    metrics.update(scores, labels)
    found = metrics.compute()
    assert [found[f"tail_coverage@{k}"] for k in (1, 2, 3)] == pytest.approx([0.9, 0.9, 1.0])


def test_ndcg_and_f1_equal_those_of_scikit_learn():
    scores, labels = golden_data()
    labels[:3] = 0
    thresholds = np.linspace(0.2, 0.7, 12)
    metrics = StreamingMetrics(12, (1, 3, 5), thresholds=thresholds)
    metrics.update(scores, labels)
    found, predicted = metrics.compute(), sigmoid(scores) >= thresholds
    for k in (1, 3, 5):
        assert found[f"ndcg@{k}"] == pytest.approx(sklearn.metrics.ndcg_score(labels, scores, k=k))
    for ours, theirs in (("micro", "micro"), ("macro", "macro"), ("sample", "samples")):
        expected = sklearn.metrics.f1_score(labels, predicted, average=theirs, zero_division=0)
        assert found[f"f1_{ours}"] == pytest.approx(expected)
    table = metrics.per_label()
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, zero_division=0
    )
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        np.testing.assert_allclose(table[name], expected)
    np.testing.assert_array_equal(table["predicted"], predicted.sum(axis=0))
    np.testing.assert_allclose(table["threshold"], thresholds)


def slow_f1_of_kept(expected_f1, predicted, labels, share):
    order = np.argsort(-expected_f1, kind="stable")[: round(share * len(labels))]
    return sklearn.metrics.f1_score(labels[order], predicted[order], average="micro", zero_division=0)


@pytest.mark.parametrize("form", ["logits", "probabilities", "calibrated"])
def test_f1_of_the_kept_documents_equals_a_slow_count_and_abstained_ones_are_left_out_first(form):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 7)) * 2 - 1.5
    labels = (rng.random((200, 7)) < sigmoid(logits)).astype(int)
    thresholds = np.linspace(0.3, 0.8, 7)
    metrics = StreamingMetrics(
        7, (1,), thresholds=thresholds, activation=None if form == "probabilities" else "sigmoid"
    )
    for rows in np.array_split(np.arange(200), 9):
        scores = sigmoid(logits[rows]) if form == "probabilities" else logits[rows]
        known = torch.tensor(sigmoid(logits[rows])) if form == "calibrated" else None
        metrics.update(scores * (3 if form == "calibrated" else 1), labels[rows], probabilities=known)
    predicted = sigmoid(logits) >= thresholds
    probabilities = sigmoid(logits)
    expected_f1 = np.array(
        [2 * p[own].sum() / (own.sum() + p.sum()) for p, own in zip(probabilities, predicted, strict=True)]
    )
    table = metrics.f1_of_kept((1.0, 0.9, 0.5, 0.1))
    for row in table:
        expected = slow_f1_of_kept(expected_f1, predicted, labels, row["share_kept"])
        assert row["f1_micro"] == pytest.approx(expected, abs=0.004), row  # documents of the last bin count in part
        assert row["num_documents"] == round(200 * row["share_kept"])
    assert table[0]["f1_micro"] == pytest.approx(metrics.compute()["f1_micro"])
    assert table[-1]["f1_micro"] > table[0]["f1_micro"] + 0.05
    share = metrics.compute()["share_abstained"]
    assert share == pytest.approx(np.mean(predicted.sum(1) == 0)) and 0.05 < share < 0.5
    (last,) = metrics.f1_of_kept((1 - share,))
    accepted = predicted.any(axis=1)
    expected = sklearn.metrics.f1_score(labels[accepted], predicted[accepted], average="micro")
    assert last["f1_micro"] == pytest.approx(expected, abs=0.004)
    assert 0 < last["min_expected_f1"] <= expected_f1[accepted].min()


def test_thresholds_of_zero_and_one_leave_the_table_of_kept_documents_finite():
    metrics = StreamingMetrics(3, (1,), thresholds=np.array([0.0, 1.0, 0.5]))
    metrics.update(np.array([[-3.0, 90.0, 0.1], [-50.0, -50.0, -50.0]]), np.array([[0, 1, 1], [1, 0, 0]]))
    assert [np.isfinite(list(row.values())).all() for row in metrics.f1_of_kept()] == [True] * 6


def test_probabilities_and_logits_give_the_same_decisions():
    scores, labels = golden_data()
    logits, probabilities = StreamingMetrics(12), StreamingMetrics(12, activation=None)
    logits.update(scores, labels)
    probabilities.update(sigmoid(scores), labels)
    assert logits.compute() == probabilities.compute()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), num_labels=st.integers(1, 9), data=st.data())
def test_ties_go_to_the_lower_label_index(seed, num_labels, data):
    k = data.draw(st.integers(1, num_labels))
    scores = torch.randint(0, 3, (6, num_labels), generator=torch.Generator().manual_seed(seed)).float()
    scores[scores == 2] = data.draw(st.sampled_from([2.0, math.inf, -math.inf]))
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_k(scores, k), expected)


@pytest.mark.parametrize("form", ["tensor", "bool", "numpy", "csr", "csc", "coo", "indices", "index arrays"])
def test_every_form_of_labels_gives_the_same_metrics(form):
    scores, labels = random_data(3)
    settings_ = {"ks": (1, 3), "label_counts": labels.sum(axis=0) * 9, "num_documents": 400}
    dense, other = StreamingMetrics(8, **settings_), StreamingMetrics(8, **settings_)
    dense.update(torch.tensor(scores), torch.tensor(labels))
    ids = [np.flatnonzero(row)[::-1] for row in labels]
    forms = {
        "tensor": lambda: {"labels": torch.tensor(labels, dtype=torch.bfloat16)},
        "bool": lambda: {"labels": torch.tensor(labels).bool()},
        "numpy": lambda: {"labels": labels.astype(np.float32)},
        "csr": lambda: {"labels": scipy.sparse.csr_matrix(labels)},
        "csc": lambda: {"labels": scipy.sparse.csc_array(labels)},
        "coo": lambda: {"labels": scipy.sparse.coo_array(labels)},
        "indices": lambda: {"label_indices": [[*row.tolist(), *row.tolist()[:1]] for row in ids]},  # one repeated
        "index arrays": lambda: {"label_indices": ids},
    }
    other.update(scores, **forms[form]())
    assert other.compute() == dense.compute()
    if "ind" not in form:
        expected = ranking_metrics(scores, labels, (1, 3))
        assert ranking_metrics(torch.tensor(scores), forms[form]()["labels"], (1, 3)) == expected


@pytest.mark.parametrize("histograms", [False, True])
def test_batches_and_merged_processes_give_the_same_as_one_pass(histograms):
    scores, labels = random_data(4, num_documents=50)
    settings_ = {
        "label_counts": labels.sum(axis=0) * 7,
        "num_documents": 400,
        "histograms": histograms,
        "num_bins": 16,
    }
    whole, first, second, empty = (StreamingMetrics(8, **settings_) for _ in range(4))
    whole.update(scores, labels)
    first.update(scores[:0], labels[:0])
    for start in range(0, 30, 7):
        first.update(scores[start : min(start + 7, 30)], labels[start : min(start + 7, 30)])
    second.update(scores[30:], labels[30:])
    first.merge(empty)
    empty.merge(first)
    empty.merge(second)
    assert empty.compute() == pytest.approx(whole.compute())
    assert empty.num_seen == 50
    if histograms:
        for ours, expected in zip(empty.histograms(), whole.histograms()):
            np.testing.assert_array_equal(ours, expected)
    whole.reset()
    with pytest.raises(ValueError, match="No document has been added"):
        whole.compute()


def test_ranking_metrics_do_not_depend_on_the_slices(monkeypatch):
    scores, labels = random_data(5)
    expected = ranking_metrics(scores, labels)
    monkeypatch.setattr("trainer.metrics.streaming.SCORES_PER_SLICE", 24)
    assert ranking_metrics(scores, scipy.sparse.csr_array(labels)) == pytest.approx(expected)


def test_documents_without_labels_count_as_zero():
    found = ranking_metrics(np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[1, 0], [0, 0]]), (1, 2), [1.0, 2.0])
    expected = {"p@1": 0.5, "p@2": 0.25, "recall@1": 0.5, "recall@2": 0.5, "ndcg@1": 0.5, "ndcg@2": 0.5}
    assert found == pytest.approx(expected | {"psp@1": 1.0, "psp@2": 1.0, "psndcg@1": 1.0, "psndcg@2": 1.0})
    assert set(ranking_metrics(np.ones((2, 2)), np.zeros((2, 2)), (1,), [1.0, 2.0]).values()) == {0.0}


def test_groups_split_labels_by_real_training_documents():
    counts = np.array([49, 50, 900, 300, 0, 70, 60, 55, 900, 80, 51, 52])
    metrics = StreamingMetrics(12, (1,), label_counts=counts, num_documents=1000)
    groups = {name: members.tolist() for name, members in metrics.label_groups().items()}
    assert groups == {"head": [2, 8], "body": [1, 3, 5, 6, 7, 9, 10, 11], "tail": [0, 4]}
    few = StreamingMetrics(3, (1,), label_counts=[9, 8, 7], num_documents=20)
    assert [members.tolist() for members in few.label_groups().values()] == [[], [], [0, 1, 2]]


def test_recall_coverage_and_f1_of_groups_and_deciles_equal_a_slow_count():
    scores, labels = golden_data()
    counts = labels.sum(axis=0) * 6
    metrics = StreamingMetrics(12, (2, 1), label_counts=counts, num_documents=300)
    metrics.update(scores, labels)
    found = metrics.compute()
    f1 = sklearn.metrics.f1_score(labels, scores >= 0, average=None, zero_division=0)
    rankings = [sorted(range(12), key=lambda i: -row[i]) for row in scores]

    def expected(members):
        result = {"f1_macro": f1[members].mean() if len(members) else 0.0}
        for k in (1, 2):
            hits = [(d, i) for d, ranking in enumerate(rankings) for i in ranking[:k] if labels[d, i] and i in members]
            positives = [(d, i) for d, i in zip(*labels.nonzero()) if i in members]
            result[f"recall@{k}"] = len(hits) / len(positives) if positives else 0.0
            having = {i for _, i in positives}
            result[f"coverage@{k}"] = len({i for _, i in hits}) / len(having) if having else 0.0
        return result

    for name, members in metrics.label_groups().items():
        assert {key: found[f"{name}_{key}"] for key in expected(members)} == pytest.approx(expected(members))

    deciles = metrics.deciles()
    order = np.argsort(-counts, kind="stable")
    assert [decile["num_labels"] for decile in deciles] == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    for decile, members in zip(deciles, np.array_split(order, 10)):
        assert {key: decile[key] for key in expected(members)} == pytest.approx(expected(members))
        assert (decile["min_train_count"], decile["max_train_count"]) == (counts[members].min(), counts[members].max())
        assert decile["support"] == labels[:, members].sum()


def test_histograms_count_every_logit_in_its_bin():
    scores, labels = golden_data()
    metrics = StreamingMetrics(12, histograms=True, num_bins=10, histogram_range=(-2, 2))
    metrics.update(scores, labels)
    positives, negatives, edges = metrics.histograms()
    inside = np.clip(scores, -1.999, 1.999)
    for label in range(12):
        of_label = inside[:, label]
        np.testing.assert_array_equal(positives[label], np.histogram(of_label[labels[:, label] == 1], edges)[0])
        np.testing.assert_array_equal(negatives[label], np.histogram(of_label[labels[:, label] == 0], edges)[0])
    probabilities = StreamingMetrics(12, histograms=True, num_bins=10, histogram_range=(-2, 2), activation=None)
    probabilities.update(sigmoid(scores), labels)
    np.testing.assert_array_equal(probabilities.histograms()[0], positives)


@pytest.mark.parametrize(("num_labels", "num_bins"), [(10, 1024), (3_201, 1024), (100_000, 160), (670_000, 32)])
def test_histograms_of_many_labels_have_fewer_bins(num_labels, num_bins):
    assert StreamingMetrics(num_labels, histograms=True).num_bins == num_bins


def test_nothing_of_a_batch_is_kept():
    metrics = StreamingMetrics(50, label_counts=np.full(50, 9), num_documents=90)
    sizes = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(400, 50, generator=generator)
        metrics.update(scores, torch.randint(0, 2, (400, 50), generator=generator))
        # The counts by expected F1 have as many bins for few labels as for many.
        sizes.append(sum(value.numel() for name, value in metrics._sums.items() if name != "kept"))
        assert metrics._sums["kept"].shape == (4, 2000)
    assert sizes[0] == sizes[-1] < 400


def test_half_precision_scores_are_taken():
    scores, labels = golden_data()
    half = torch.tensor(scores).bfloat16()
    assert ranking_metrics(half, labels) == ranking_metrics(half.float(), labels)


def test_inverse_propensities_of_tiny_training_sets_are_one():
    for num_documents in (1, 2):
        assert inverse_propensities([0, 1], num_documents).tolist() == [1.0, 1.0]


def test_the_evaluate_metric_gives_the_same_values_and_combines():
    scores, labels = golden_data()
    expected = StreamingMetrics(12, ks=(1, 3), thresholds=0.4)
    expected.update(scores, labels)
    options = {"ks": (1, 3), "thresholds": 0.4}
    metric = MultiLabelMetric(settings=options, keep_in_memory=True)
    assert metric.compute(predictions=scores, references=labels) == pytest.approx(expected.compute())
    metric = MultiLabelMetric(keep_in_memory=True)
    for row, truth in zip(scores, labels):
        metric.add(predictions=row, references=truth)
    assert metric.compute(**options) == pytest.approx(expected.compute())

    combined = evaluate.combine(
        {
            "at_one": MultiLabelMetric(settings={"ks": (1,), "thresholds": None}, keep_in_memory=True),
            "strict": MultiLabelMetric(settings={"ks": (3,), "thresholds": 0.9}, keep_in_memory=True),
        }
    )
    found = combined.compute(predictions=scores, references=labels)
    assert found["p@1"] == pytest.approx(expected.compute()["p@1"])
    assert found["p@3"] == pytest.approx(expected.compute()["p@3"])
    with pytest.raises(ValueError, match="multi-hot labels, not label ids"):
        MultiLabelMetric(keep_in_memory=True).compute(predictions=scores, references=[[1, 2]] * 40)


def update(scores=None, labels=None, **kwargs):
    arguments = {"num_labels": 4, "ks": (1,)} | {k: v for k, v in kwargs.items() if k != "label_indices"}
    metrics = StreamingMetrics(**arguments)
    indices = kwargs.get("label_indices")
    labels = torch.zeros(2, 4) if labels is None and indices is None else labels
    metrics.update(torch.zeros(2, 4) if scores is None else scores, labels, label_indices=indices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ks": (1, 5)}, "`ks` contains 5.*number of labels .4."),
        ({"ks": (0,)}, "`ks` contains 0"),
        ({"ks": ()}, "`ks` is empty"),
        ({"scores": torch.tensor([[1.0, math.nan, 0, 0]] * 2)}, "`scores` hold NaN"),
        ({"scores": torch.zeros(2, 3)}, r"`scores` has shape \(2, 3\).*4 labels"),
        ({"labels": torch.zeros(3, 4)}, r"labels are \(3, 4\)"),
        ({"labels": torch.zeros(2, 4), "label_indices": [[0], [1]]}, "Exactly one of"),
        ({"label_indices": [[0], [4]]}, "`label_indices` contains 4.*between 0 and 3"),
        ({"label_indices": [[0], [-1]]}, "`label_indices` contains -1"),
        ({"thresholds": 1.2}, "`thresholds` contains values that are not probabilities"),
        ({"thresholds": [0.5, 0.5]}, r"`thresholds` has shape \(2,\).*4 labels"),
        ({"label_counts": [1, 2, 3]}, r"`label_counts` has shape \(3,\)"),
        ({"label_counts": [1, 2, 3, 30], "num_documents": 20}, "between 0 and `num_documents` .20."),
        ({"label_counts": [1, 2, 3, 4], "num_documents": 0}, "`num_documents` is 0"),
        ({"propensities": [0.5, 1, 1, 1]}, "`propensities` contains 0.5.*inverse_propensities"),
        ({"activation": "softmax"}, "`activation` is 'softmax'"),
        ({"scores": torch.full((2, 4), 1.5), "activation": None, "histograms": True}, "outside 0..1"),
    ],
)
def test_bad_arguments_are_reported_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        update(**arguments)


def test_shares_of_kept_documents_are_checked():
    metrics = StreamingMetrics(3, (1,))
    with pytest.raises(ValueError, match="No document has been added"):
        metrics.f1_of_kept()
    metrics.update(np.zeros((1, 3)), np.ones((1, 3)))
    with pytest.raises(
        ValueError, match="`shares` contains 1.5, but a share of the documents must be above 0 and at most 1"
    ):
        metrics.f1_of_kept((1.5,))
    with pytest.raises(ValueError, match="No label is predicted without thresholds"):
        StreamingMetrics(3, (1,), thresholds=None).f1_of_kept()


def test_unavailable_results_are_reported():
    metrics = StreamingMetrics(4, (1,))
    metrics.update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="histograms=True"):
        metrics.histograms()
    for method in (metrics.label_groups, metrics.deciles):
        with pytest.raises(ValueError, match="without `label_counts`"):
            method()
    with pytest.raises(ValueError, match="differ in `ks`, `thresholds`"):
        metrics.merge(StreamingMetrics(4, (1, 2), thresholds=0.3))
    with pytest.raises(ValueError, match=r"`scores` has shape \(2, 4\) and `labels` \(2, 3\)"):
        ranking_metrics(np.zeros((2, 4)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="No document has been added"):
        ranking_metrics(np.zeros((0, 5)), np.zeros((0, 5)))


def test_thresholds_can_be_compared_with_probabilities_that_are_not_the_activation_of_the_scores():
    rng = np.random.default_rng(0)
    scores, labels = torch.tensor(rng.normal(size=(20, 4))), torch.tensor(rng.integers(0, 2, (20, 4)))
    calibrated, plain = (StreamingMetrics(4, ks=(1,), thresholds=[0.3, 0.5, 0.6, 0.9]) for _ in range(2))
    calibrated.update(scores, labels, probabilities=torch.sigmoid(3 * scores - 1).float())
    plain.update(3 * scores - 1, labels)
    assert calibrated.compute() == plain.compute()
    assert calibrated.per_label()["predicted"].tolist() == plain.per_label()["predicted"].tolist()
