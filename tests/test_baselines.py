"""trainer/baselines.py: the baselines that a trained model is compared with."""

import pytest

from trainer.baselines import fit_linear_svm, measure_baselines, rows_of_table
from trainer.metrics import StreamingMetrics


@pytest.mark.parametrize(
    "labels, num_labels, learned",
    [([[0], [], [0], []], 1, [0]), ([[1], [], [1], []], 3, [1]), ([[0]] * 4, 1, [0]), ([[], [], [], []], 2, [])],
)
@pytest.mark.filterwarnings("error")
def test_a_linear_model_learns_whatever_labels_there_are(labels, num_labels, learned):
    texts = ["star light", "market price", "a star", "the price"]
    scores = fit_linear_svm(texts, labels, num_labels)(["star star", "price price"])
    assert scores.shape == (2, num_labels)
    for label in range(num_labels):
        if label not in learned:
            assert (scores[:, label] == -1e3).all()
        elif [] in labels:
            assert scores[0, label] > scores[1, label]


def test_a_linear_model_reads_texts_without_words_of_two_letters():
    scores = fit_linear_svm(["a b", "\N{GRINNING FACE}", "a", "\N{ROCKET} ?"], [[0], [1], [0], [1]], 2)(
        ["a", "\N{ROCKET}"]
    )
    assert scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0]


def test_the_heads_of_a_table_stand_apart_and_its_rows_have_the_same_length():
    names = ["p@1", "f1_macro", "hierarchical_f1"]
    lines = list(rows_of_table({"SEP-MLDC": {"p@1": 1.0, "f1_macro": 0.5}, "a longer name": {}}, names))
    assert lines[0].split() == names and len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["SEP-MLDC", "100.00", "50.00", "-"]


def test_baselines_are_measured_on_the_same_documents():
    texts, labels = ["star light", "star price", "a star", "the price"], [[0], [0, 1], [0], [1]]
    results = measure_baselines(
        texts, labels, texts, labels, new_metrics=lambda: StreamingMetrics(2, (1,), thresholds=0.5), top_k=2
    )
    assert list(results) == ["TF-IDF + LinearSVC", "majority labels"]
    metrics, predictions = results["TF-IDF + LinearSVC"]
    assert metrics["p@1"] == 1 and predictions.indices.shape == predictions.assigned.shape == (4, 2)
    metrics, predictions = results["majority labels"]
    assert metrics["p@1"] == 0.75 and predictions.indices.tolist() == [[0, 1]] * 4
    assert predictions.assigned.all()  # half of the documents have the second label
