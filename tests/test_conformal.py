"""Thresholds with a guarantee: conformal risk control."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_training import make_trainer, tiny_documents

from trainer.thresholds import RiskCurve, tune_thresholds_from_batches


pytestmark = pytest.mark.numeric


def sample(count, seed, num_labels=6):
    """Logits and labels of documents, of which some have no label."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(count, 1))  # some documents are harder than others
    logits = rng.normal(size=(count, num_labels)) * 2 - 1
    labels = rng.random((count, num_labels)) < 1 / (1 + np.exp(-(logits + level)))
    return torch.tensor(logits), torch.tensor(labels).float()


def loss_of(risk, logits, labels, threshold):
    """Mean loss of documents at a threshold of the logit, straight from the definition."""
    losses = []
    for scores, gold in zip(logits.numpy(), labels.numpy() > 0):
        predicted = scores >= threshold
        if risk == "fdr":
            losses.append((predicted & ~gold).sum() / max(predicted.sum(), 1))
        elif gold.any():
            losses.append(1 - (predicted & gold).sum() / gold.sum())
    return np.mean(losses), len(losses)


def logit(threshold):
    return np.log(threshold / (1 - threshold))


@pytest.mark.parametrize("objective", ["recall:0.8", "fdr:0.3"])
def test_the_threshold_is_the_best_that_the_bound_allows(objective):
    logits, labels = sample(300, 0)
    found = tune_thresholds_from_batches([(logits[:170], labels[:170]), (logits[170:], labels[170:])], 6, objective)
    assert len(set(found.thresholds)) == 1
    risk, limit = ("recall", 0.2) if objective.startswith("recall") else ("fdr", 0.3)
    threshold = logit(found.thresholds[0])
    loss, count = loss_of(risk, logits, labels, threshold)
    assert (loss * count + 1) / (count + 1) <= limit
    assert found.threshold_info["guarantee"].startswith("On average over new documents")
    if risk == "recall":
        assert found.threshold_info["risk"] == pytest.approx(loss)
        step, slack = RiskCurve.STEP, 1e-9  # one step further, the bound does not hold
    else:
        # Of each document the largest loss at this or a higher threshold: a little above the loss at the threshold itself.
        assert loss <= found.threshold_info["risk"] <= limit
        step, slack = -RiskCurve.STEP, 0.05
    loss, count = loss_of(risk, logits, labels, threshold + step)
    assert (loss * count + 1) / (count + 1) > limit - slack


@pytest.mark.parametrize("risk, objective", [("recall", "recall:0.9"), ("fdr", "fdr:0.2")])
def test_new_documents_keep_the_risk_even_if_few_were_there_to_choose_by(risk, objective):
    limit = 0.1 if risk == "recall" else 0.2
    realized = []
    for seed in range(120):
        logits, labels = sample(230, seed)
        threshold = tune_thresholds_from_batches([(logits[:30], labels[:30])], 6, objective).thresholds[0]
        cut = {0.0: -np.inf, 1.0: np.inf}.get(threshold) or logit(threshold)
        realized.append(loss_of(risk, logits[30:], labels[30:], cut)[0])
    assert np.mean(realized) <= limit + 2 * np.std(realized) / len(realized) ** 0.5
    assert np.mean(realized) > limit / 3  # and it is not kept by predicting everything or nothing


def test_a_calibration_moves_the_threshold_and_not_the_decisions():
    logits, labels = sample(200, 1)
    plain, calibrated = (
        tune_thresholds_from_batches([(logits, labels)], 6, "recall:0.8", calibration=calibration)
        for calibration in (None, "platt")
    )
    scale = calibrated.score_calibration
    moved = scale["scale"] * logit(plain.thresholds[0]) + scale["bias"]
    assert logit(calibrated.thresholds[0]) == pytest.approx(moved, abs=1e-6)
    assert calibrated.threshold_info["risk"] == plain.threshold_info["risk"]


def test_documents_without_labels_have_no_recall_and_are_false_discoveries():
    logits, labels = torch.zeros(40, 2), torch.zeros(40, 2)
    logits[:, 0], labels[:30, 0] = 1.0, 1
    recall = tune_thresholds_from_batches([(logits, labels)], 2, "recall:0.9")
    assert 0.5 < recall.thresholds[0] <= 1 / (1 + np.exp(-1.0)) and recall.threshold_info["risk"] == 0
    # A quarter of the documents has no label: whatever is predicted for them is wrong.
    nothing = tune_thresholds_from_batches([(logits, labels)], 2, "fdr:0.1")
    assert nothing.thresholds[0] > 1 / (1 + np.exp(-1.0)) and nothing.threshold_info["share_without_labels"] == 1


@pytest.mark.parametrize(
    "objective, message",
    [
        ("recall:0.99", "40 documents with labels cannot guarantee a risk of 0.01: at least 99"),
        ("recall:1", "must be a number between 0 and 1"),
        ("fdr:x", "must be a number between 0 and 1, for example 'fdr:0.1'"),
    ],
)
def test_what_cannot_be_guaranteed_is_an_error(objective, message):
    logits = torch.zeros(40, 2)
    with pytest.raises(ValueError, match=message):
        tune_thresholds_from_batches([(logits, torch.ones(40, 2))], 2, objective)


def test_the_guarantee_is_stored_with_the_model(tmp_path):
    trainer = make_trainer(tmp_path, documents=tiny_documents(24), evaluation=tiny_documents(24, seed=1))
    trainer.tune_thresholds(objective="recall:0.8")
    config = trainer.model.config
    assert len(set(config.thresholds)) == 1 and "80.0% of a document's labels" in config.threshold_info["guarantee"]
    trainer.save_model(tmp_path / "saved")
    assert "80.0% of a document's labels" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_a_guarantee_ends_with_other_labels_and_with_another_training(tmp_path):
    def guaranteed():
        model = tiny_model(num_labels=3)
        model.config.thresholds = [0.5] * 3
        model.config.threshold_info = {"objective": "recall:0.8", "guarantee": "On average"}
        return model

    added, removed, tuned = guaranteed(), guaranteed(), guaranteed()
    added.add_labels({"cells": "cell cells"}, tiny_tokenizer())
    removed.remove_labels([removed.config.labels[0]])
    again = make_trainer(tmp_path, tiny_model(num_labels=3, seed=1))
    again.keep_tuning_of(tuned)
    for config in (added.config, removed.config, again.model.config):
        assert config.threshold_info == {"objective": "recall:0.8"}
    assert "guarantee" in tuned.config.threshold_info
