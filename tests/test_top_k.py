"""The best labels from chunks of labels equal the best of all logits."""

import pytest
import torch
from largest_tensors import LargestTensors
from tiny_models import tiny_batch, tiny_model


CLASSIFIERS = ("mlp", "similarity", "mlp+similarity")
NUM_LABELS = 24


@pytest.mark.parametrize("label_attention", [True, False])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_top_k_in_chunks_equals_top_k_of_the_logits(classifier, label_attention):
    model = tiny_model(num_labels=NUM_LABELS, classifier=classifier, label_attention=label_attention)
    with torch.no_grad():
        model.classifier.bias.normal_()
        model.label_embeddings.mul_(3.0)  # a peaked α, whose maximum moves from chunk to chunk
        batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
        logits = model(**batch).logits
    for k in (1, 4, NUM_LABELS):
        expected = logits.topk(k, dim=-1)
        for chunk_size in (1, 3, 10, NUM_LABELS, 1000):
            scores, indices = model.predict_top_k(**batch, k=k, chunk_size=chunk_size)
            torch.testing.assert_close(scores, expected.values, rtol=1e-4, atol=1e-5)
            assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("label_attention", [True, False])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_top_k_never_makes_a_tensor_of_documents_times_labels(classifier, label_attention):
    model = tiny_model(num_labels=400, classifier=classifier, label_attention=label_attention)
    batch = {name: value[:, :6] for name, value in tiny_batch(num_documents=40).items() if name != "labels"}
    # The encoder's own activations are 40 x 6 x 64 at most.
    with LargestTensors(40 * 400) as large:
        scores, _ = model.predict_top_k(**batch, k=3, chunk_size=50)
    assert large.made == [] and scores.shape == (40, 3)
    with LargestTensors(40 * 400) as large, torch.no_grad():
        model(**batch)
    assert large.made


def test_top_k_is_predicted_without_gradient_and_dropout_and_leaves_training_mode_unchanged():
    model = tiny_model(num_labels=NUM_LABELS, hidden_dropout=0.5, classifier_dropout=0.5, classifier="mlp+similarity")
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    expected = model.predict_top_k(**batch, k=3)
    model.train()
    scores, indices = model.predict_top_k(**batch, k=3)
    assert model.training and not scores.requires_grad
    torch.testing.assert_close((scores, indices), expected)


def test_top_k_of_a_model_in_bf16_and_under_autocast_is_near_the_full_precision_one():
    model = tiny_model(num_labels=NUM_LABELS, classifier="mlp+similarity")
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(**batch).logits.float()
        scores, indices = model.predict_top_k(**batch, k=5, chunk_size=7)
    torch.testing.assert_close(scores.float(), expected.gather(1, indices), rtol=0.05, atol=0.05)
    with torch.no_grad():
        expected = model.to(torch.bfloat16)(**batch).logits.float()
        scores, indices = model.predict_top_k(**batch, k=5, chunk_size=7)
    torch.testing.assert_close(scores.float(), expected.gather(1, indices), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"k": 0}, "`k` is 0, but it must be an integer from 1 to 5"),
        ({"k": 6}, "`k` is 6, but it must be an integer from 1 to 5"),
        ({"k": 2.0}, "`k` is 2.0"),
        ({"k": 1, "chunk_size": 0}, "`chunk_size` is 0, but it must be an integer of at least 1"),
    ],
)
def test_top_k_refuses_numbers_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().predict_top_k(input_ids=torch.ones(1, 3, dtype=torch.long), **wrong)
