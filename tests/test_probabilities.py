"""The relation between the logits of a model and the probabilities of its labels."""

import json

import pytest
import torch
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import pipeline

from modeling_sep_mldc.pipeline_sep_mldc import TASK


CALIBRATION = {"scale": 0.5, "bias": -1.0}
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0, 3.0], [0.0, 0.0, 9.0, -9.0, 1.0]])


@pytest.mark.parametrize(
    "loss, calibration, is_ranking",
    [
        ("bce", None, False),
        ("bce", CALIBRATION, False),
        ("bce+softmax", None, False),
        ("softmax", None, True),
        ("softmax", CALIBRATION, False),
    ],
)
def test_only_a_softmax_model_without_calibration_is_a_ranking(loss, calibration, is_ranking):
    model = tiny_model(classification_loss=loss, score_calibration=calibration)
    assert model.config.is_ranking is is_ranking
    scores = model.probabilities(LOGITS)
    torch.testing.assert_close(scores, LOGITS.softmax(dim=-1) if is_ranking else 1 / (1 + torch.exp(-LOGITS)))


def test_logits_are_calibrated_outside_training_and_the_loss_is_of_those_in_training():
    model, batch = tiny_model(num_lexical_features=3), tiny_batch()
    plain = model(**batch)
    best = {name: value for name, value in batch.items() if name != "labels"}
    plain_best = model.predict_top_k(**best, k=3)[0]
    model.config.score_calibration = CALIBRATION
    calibrated = model(**batch)
    torch.testing.assert_close(calibrated.logits, 0.5 * plain.logits - 1.0)
    torch.testing.assert_close(calibrated.loss, plain.loss)
    torch.testing.assert_close(model.predict_top_k(**best, k=3)[0], 0.5 * plain_best - 1.0)
    torch.testing.assert_close(model.train()(**batch).logits, plain.logits)


def test_a_label_has_one_probability_in_every_pipeline():
    model, tokenizer = tiny_model(score_calibration=CALIBRATION), tiny_tokenizer()
    text = "galaxy star robot"
    stock = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)([text])[0]
    own = pipeline(TASK, model=model, tokenizer=tokenizer)(text, top_k=5)
    assert {entry["label"]: entry["score"] for entry in own} == pytest.approx(
        {entry["label"]: entry["score"] for entry in stock}, abs=1e-5
    )


def test_logits_of_version_0_1_stay_uncalibrated_and_their_probabilities_are_calibrated(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    logits = model(**batch).logits
    model.config.score_calibration = CALIBRATION
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, 0.5 * logits - 1.0)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["calibrate_logits"]  # unknown to version 0.1
    (tmp_path / "config.json").write_text(json.dumps(config))
    former = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(former(**batch).logits, logits)
    torch.testing.assert_close(
        former.probabilities(former(**batch).logits), loaded.probabilities(loaded(**batch).logits)
    )


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_the_best_labels_keep_their_probabilities(loss):
    model = tiny_model(classification_loss=loss)
    best, indices = LOGITS.topk(2, dim=-1)
    expected = model.probabilities(LOGITS).gather(1, indices)
    torch.testing.assert_close(model.probabilities(best, LOGITS), expected)
    assert loss == "softmax" or torch.equal(model.probabilities(best), expected)


def test_shares_of_some_labels_alone_sum_to_one():
    model = tiny_model(classification_loss="softmax")
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    shares = model.probabilities(model.predict_top_k(**batch, k=3)[0])
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(4))
    assert (shares[:, :-1] >= shares[:, 1:]).all()


def test_probabilities_of_half_precision_logits_are_float32():
    scores = tiny_model().probabilities(LOGITS.bfloat16())
    assert scores.dtype is torch.float32
    torch.testing.assert_close(scores, LOGITS.bfloat16().float().sigmoid())
