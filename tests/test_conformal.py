"""Thresholds with a guarantee: conformal risk control."""

import logging

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_training import NUM_LABELS, make_trainer, tiny_documents

from trainer.distillation import document_embeddings, new_student
from trainer.hub.model_card_text import MAX_CELL_CHARACTERS
from trainer.thresholds import RiskCurve, documents_needed, tune_thresholds_from_batches


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
    assert np.mean(realized) > limit / 3  # and not by predicting everything or nothing


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
    assert nothing.thresholds[0] > 1 / (1 + np.exp(-1.0)) and nothing.threshold_info["share_abstained"] == 1
    assert nothing.threshold_info["labels_per_document"] == 0 and recall.threshold_info["labels_per_document"] == 1


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
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert config.threshold_info["guarantee"] in card and len(config.threshold_info["guarantee"]) > MAX_CELL_CHARACTERS


@pytest.mark.parametrize("closed", [True, False])
def test_documents_without_the_ancestors_of_their_labels_are_told_once(tmp_path, caplog, closed):
    model = tiny_model(num_labels=NUM_LABELS, label_parents={"label 1": ["label 0"]}, hierarchy="closure")
    ids = [0, 1] if closed else [1]
    evaluation = tiny_documents(24, seed=1).map(lambda row: {"label_indices": ids})
    trainer = make_trainer(tmp_path, model=model, evaluation=evaluation, per_device_eval_batch_size=4)
    with caplog.at_level(logging.WARNING):
        trainer.tune_thresholds(objective="recall:0.8")
    told = [record.getMessage() for record in caplog.records if "ancestors" in record.getMessage()]
    assert len(told) == (0 if closed else 1)
    assert closed or "24 documents lack ancestors" in told[0] and "`close_labels(documents, label_parents)`" in told[0]


def guaranteed(num_labels=3, **kwargs):
    model = tiny_model(num_labels=num_labels, **kwargs)
    model.config.thresholds = [0.5] * num_labels
    model.config.threshold_info = {"objective": "recall:0.8", "global_threshold": 0.5, "guarantee": "On average"}
    return model


def has_guarantee(model):
    return "guarantee" in (model.config.threshold_info or {})


def test_a_guarantee_ends_with_other_labels_and_with_another_training(tmp_path):
    added, removed, tuned = guaranteed(), guaranteed(), guaranteed()
    added.add_labels({"cells": "cell cells"}, tiny_tokenizer())
    removed.remove_labels([removed.config.labels[0]])
    again = make_trainer(tmp_path, tiny_model(num_labels=3, seed=1))
    again.keep_tuning_of(tuned)
    for config in (added.config, removed.config, again.model.config):
        assert config.threshold_info == {"objective": "recall:0.8", "global_threshold": 0.5}
    assert has_guarantee(tuned)


@pytest.mark.parametrize("with_init", [False, True])
def test_a_guarantee_ends_when_training_begins(tmp_path, caplog, with_init):
    trainer = make_trainer(tmp_path, guaranteed(6), max_steps=1)
    if with_init:
        trainer.model_init = lambda: guaranteed(6)
    assert has_guarantee(trainer.model)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert not has_guarantee(trainer.model)
    (line,) = [record.message for record in caplog.records if "guarantee" in record.message]
    assert "'recall:0.8': the model is trained. Tune them again" in line


def test_a_guarantee_ends_with_new_lexical_scores(tmp_path, caplog):
    trainer = make_trainer(tmp_path, guaranteed(6), documents=tiny_documents(60))
    with caplog.at_level("WARNING"):
        trainer.fit_lexical_scores(num_features=8)
    assert not has_guarantee(trainer.model) and "lexical scores are fitted again" in caplog.text


def test_a_student_does_not_inherit_a_guarantee():
    teacher = guaranteed(6)
    documents = tiny_documents(30)
    embeds = document_embeddings(teacher, tiny_tokenizer(), documents, hide_progress=True)
    student = new_student(teacher, tiny_tokenizer(), documents["input_ids"], embeds, hide_progress=True)
    assert has_guarantee(teacher) and not has_guarantee(student)
    assert student.config.thresholds == teacher.config.thresholds


@pytest.mark.parametrize(
    "change, why",
    [
        ({"thresholds": [0.5, 0.4, 0.5]}, "`thresholds` were changed"),
        ({"thresholds": None}, "`thresholds` were changed"),
        ({"score_calibration": {"scale": 2.0, "bias": 0.0}}, "`score_calibration` was changed"),
        ({}, None),
    ],
)
def test_a_guarantee_ends_with_other_thresholds_or_another_calibration(tmp_path, caplog, change, why):
    model = guaranteed()
    model.config.threshold_info["guaranteed_calibration"] = None
    model.save_pretrained(tmp_path / "before")
    for name, value in change.items():
        setattr(model.config, name, value)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path / "saved")
        loaded = type(model.config).from_pretrained(tmp_path / "before", **change)  # as in a file edited by hand
    for config in (model.config, type(model.config).from_pretrained(tmp_path / "saved"), loaded):
        assert ("guarantee" in config.threshold_info) is (why is None)
    assert why is None or caplog.text.count(why) == 2


def test_a_guarantee_survives_a_new_name_until_label_texts_are_encoded_again(tmp_path):
    model = guaranteed(6)
    trainer = make_trainer(tmp_path, model)
    trainer.refresh_label_embeddings()
    model.config.threshold_info["guarantee"] = "On average"  # the labels are encoded as they were when it was given
    trainer.label_schedule.invalidate()
    trainer.evaluate()
    assert has_guarantee(model)
    model.rename_label(model.config.labels[0], "proteins and cells")
    assert has_guarantee(model)
    trainer.evaluate()
    assert not has_guarantee(model)


def test_thresholds_that_keep_a_guarantee_by_labeling_nothing_or_everything_cause_a_warning(caplog):
    logits, labels = torch.zeros(40, 2), torch.zeros(40, 2)
    labels[:, 0] = 1
    with caplog.at_level("WARNING"):
        tune_thresholds_from_batches([(logits, labels)], 2, "fdr:0.1")  # the labels cannot be distinguished
    assert "'fdr:0.1' leaves 100% of the documents without any label" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        tune_thresholds_from_batches([(logits - 90 * labels, labels)], 2, "recall:0.9")
    assert "'recall:0.9' is reached only by returning every label" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        tune_thresholds_from_batches([(logits + 2 * labels, labels)], 2, "recall:0.9")
    assert not caplog.text


def test_the_documents_that_a_guarantee_needs_are_the_fewest_with_which_it_can_be_kept():
    for limit in (0.5, 0.2, 0.1, 0.05, 0.01, 0.3):
        needed = documents_needed(limit)
        assert 1 / (needed + 1) <= limit + 1e-12 and 1 / needed > limit - 1e-12
        curve = RiskCurve("fdr", limit)
        logits, labels = torch.full((needed, 1), 3.0), torch.ones(needed, 1)
        curve.update(logits, labels)
        curve.choose()
        fewer = RiskCurve("fdr", limit)
        fewer.update(logits[:-1], labels[:-1])
        with pytest.raises(ValueError, match=f"at least {needed} are needed"):
            fewer.choose()


def test_a_guarantee_ends_with_another_hierarchy(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=tiny_documents(24, seed=1))
    trainer.tune_thresholds(objective="recall:0.8")
    config = trainer.model.config
    config.check_guarantee()
    assert has_guarantee(trainer.model)
    config.label_parents, config.hierarchy = {config.labels[1]: [config.labels[0]]}, "closure"
    trainer.model.save_pretrained(tmp_path / "saved")
    assert not has_guarantee(trainer.model)
