"""The report of a run against slow references, and its text in clear cases."""

import csv
import math
import sys

import numpy as np
import pytest
import torch

from trainer.metrics import StreamingMetrics
from trainer.progress import short_logs
from trainer.report import (
    DocumentResults,
    Predictions,
    abstention_lines,
    bootstrap,
    comparison_lines,
    next_steps,
    worst_label_lines,
    worst_labels,
    write_worst_labels,
)


LABELS = ["a", "b", "c", "d"]


def random_results(num_documents=40, num_labels=7, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    gold = [
        sorted(rng.choice(num_labels, size=rng.integers(0, 4), replace=False).tolist()) for _ in range(num_documents)
    ]
    scores = rng.normal(size=(num_documents, num_labels)) * noise
    for row, ids in zip(scores, gold):
        row[ids] += 1
    indices = np.argsort(-scores, axis=1)
    assigned = np.take_along_axis(scores, indices, axis=1) >= 0.5
    return DocumentResults(Predictions(indices, assigned), gold, num_labels), scores, gold


def streamed(scores, gold, documents):
    metrics = StreamingMetrics(scores.shape[1], ks=(1, 3, 5), thresholds=1 / (1 + math.exp(-0.5)))
    metrics.update(torch.from_numpy(scores[documents]), label_indices=[gold[i] for i in documents])
    return metrics.compute()


def test_metrics_of_all_documents_and_of_a_resample_are_those_of_streaming_metrics():
    results, scores, gold = random_results()
    for documents in (list(range(40)), [0, 0, 0, 5, 7, 7, 39]):
        measured = results.measure(np.bincount(documents, minlength=40))
        expected = streamed(scores, gold, documents)
        assert set(measured) == {"p@1", "p@3", "p@5", "ndcg@1", "ndcg@3", "ndcg@5", "f1_micro", "f1_macro"}
        for name, value in measured.items():
            assert value == pytest.approx(expected[name], abs=1e-6), name


def test_intervals_hold_the_measured_value_and_narrow_with_more_documents():
    widths = []
    for num_documents in (40, 4000):
        results, *_ = random_results(num_documents)
        low, high = bootstrap({"model": results})["intervals"]["model"]["ndcg@5"]
        assert low < results.measure()["ndcg@5"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_a_difference_is_judged_on_the_same_documents():
    good, bad, other = (random_results(300, noise=noise)[0] for noise in (0.3, 3.0, 0.3))
    compared = bootstrap({"good": good, "bad": bad, "other": other})
    assert compared == bootstrap({"good": good, "bad": bad, "other": other})
    first, second = comparison_lines(compared)
    assert first.startswith("ahead of bad on ndcg@5") and second.startswith("on par with other")
    (line,) = comparison_lines(bootstrap({"bad": bad, "good": good}))
    assert line.startswith("behind good")


def results_of(documents):
    """From (gold, assigned) pairs of texts of label letters."""
    ids = {name: number for number, name in enumerate(LABELS)}
    indices, assigned = [], []
    for _, given in documents:
        order = [ids[name] for name in given] + [i for i in range(4) if LABELS[i] not in given]
        indices.append(order)
        assigned.append([True] * len(given) + [False] * (4 - len(given)))
    gold = [[ids[name] for name in names] for names, _ in documents]
    return DocumentResults(Predictions(np.array(indices), np.array(assigned)), gold, 4)


def test_worst_labels_are_not_suggested_if_there_are_none():
    assert next_steps(has_errors=False) == []


def test_the_worst_labels_come_first_with_the_likely_reason():
    documents = [("a", "a")] * 6 + [("b", "c")] * 4 + [("c", "c")] * 4 + [("d", "")] * 2 + [("", "c")] * 20
    worst = worst_labels(results_of(documents), LABELS, [100, 50, 30, 3])
    assert [row.label for row in worst] == ["b", "d", "c"]  # `a` is perfect
    first, second, third = worst
    assert third.why == "assigned too often (28 times, 4 correct)" and third.recall == 1
    assert (first.support, first.predicted, first.f1, first.confused_with) == (4, 0, 0.0, "c")
    assert first.why == "never assigned; often confused with 'c'"
    assert second.why == "only 3 training documents; never assigned" and second.confused_with == ""
    assert worst_label_lines(worst)[0] == "b: F1 0, 4 documents; never assigned; often confused with 'c'"
    assert worst_label_lines([worst[0]._replace(support=1)])[0].startswith("b: F1 0, 1 document;")


@pytest.mark.parametrize(
    ("documents", "why"),
    [
        ([("a", "a")] * 2 + [("a", "")] + [("", "a")] * 9, "assigned too often (11 times, 2 correct)"),
        ([("a", "")] * 2 + [("", "a")] * 3, "never assigned correctly (3 false positives)"),
        ([("a", "a")] + [("a", "")] * 9, "missed in 9 of 10 documents"),
        ([("a", "a")] * 4 + [("a", "")] * 3 + [("", "a")] * 3, "false positives and false negatives"),
    ],
)
def test_reasons_depend_on_the_kind_of_error(documents, why):
    assert [row.why for row in worst_labels(results_of(documents), LABELS)] == [why]


@pytest.mark.pictures
def test_the_worst_labels_are_written_as_a_harmless_table_and_a_picture(tmp_path, monkeypatch):
    labels = ["=1+1", "$x$ and a name that is much longer than forty characters", "c", "d"]
    worst = worst_labels(results_of([("a", "c"), ("b", "")] * 3), labels)
    write_worst_labels(tmp_path, worst)
    assert [row["label"] for row in csv.DictReader(open(tmp_path / "worst_labels.csv"))] == ["'=1+1", labels[1]]
    assert (tmp_path / "worst_labels.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_worst_labels(tmp_path / "..", worst[:0])


def test_the_most_important_next_steps_come_first():
    assert next_steps() == [
        "Review worst_labels.csv: labels that are confused with each other may need clearer annotation guidelines."
    ]
    lines = next_steps(
        label_counts=[1, 2, 100], num_steps=104, share_cut=0.5, has_validation=False, behind_linear=True,
        has_lexical_scores=False, has_descriptions=False,
    )  # fmt: skip
    assert len(lines) == 3
    assert "--validation_file" in lines[0] and "--lexical_scores" in lines[1] and "only 104 steps" in lines[2]
    assert "Labels with fewer than 10 training documents: 2." in next_steps(label_counts=[1, 2, 100])[0]
    assert "50% of the documents" in next_steps(share_cut=0.5)[0]


def test_an_evaluation_is_one_short_line_and_other_logs_stay():
    logs = {f"eval_{m}@{k}": 0.5 for m in ("p", "ndcg", "recall", "psp") for k in (1, 3, 5, 10)}
    logs |= {"eval_loss": 1.0, "eval_f1_micro": 0.25, "eval_f1_macro": 0.125, "eval_runtime": 3.0, "epoch": 2.0}
    assert short_logs(logs) == {
        "eval_loss": 1.0, "P@1": 50.0, "nDCG@5": 50.0, "Micro F1": 25.0, "Macro F1": 12.5, "epoch": 2.0
    }  # fmt: skip
    step = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1, "classification_loss": 1.0, "epoch": 0.5}
    assert short_logs(step) == {"loss": 1.0, "learning_rate": 0.1, "epoch": 0.5}
    assert short_logs({"own": 1}) == {"own": 1}


def test_the_report_has_the_number_of_abstentions_and_the_f1_of_the_rest():
    kept = [{"share_kept": 1.0, "f1_micro": 0.5, "min_expected_f1": 0.0}]
    kept += [{"share_kept": 0.9, "f1_micro": 0.625, "min_expected_f1": 0.4321}]
    lines = abstention_lines(0.015, 200, kept)
    assert lines[0] == "The model abstains on 3 of 200 documents: none of their labels reaches its threshold."
    assert lines[2].split() == ["documents", "kept", "100%", "90%"]
    assert lines[3].split() == ["micro", "F1", "50.0", "62.5"]
    assert lines[4].split() == ["min_expected_f1", "0.000", "0.432"]
    assert abstention_lines(0.0, 200, kept)[0].startswith("The model does not abstain on any document")
