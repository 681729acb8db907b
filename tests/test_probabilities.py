"""What the logits of a model say about the probability of its labels."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_model


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
    if is_ranking:
        torch.testing.assert_close(scores, LOGITS.softmax(dim=-1))
    else:
        a, b = (1.0, 0.0) if calibration is None else (0.5, -1.0)
        torch.testing.assert_close(scores, 1 / (1 + torch.exp(-(a * LOGITS + b))))


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
