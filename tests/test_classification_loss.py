"""The classification loss in chunks of labels equals the loss at once."""

import pytest
import torch
from largest_tensors import LargestTensors
from tiny_models import tiny_batch, tiny_model

from modeling_sep_mldc import classification_loss_sep_mldc
from modeling_sep_mldc.class_weights_sep_mldc import class_weights
from modeling_sep_mldc.classification_loss_sep_mldc import multi_label_loss


KINDS = ("bce", "softmax", "bce+softmax", "decoupled_softmax", "bce+decoupled_softmax")
CLASSIFIERS = ("mlp", "similarity", "mlp+similarity")
NUM_LABELS = 24
# Labels a chunk: two equal chunks, a shorter last one, one label at a time.
WIDTHS = (12, 5, 1)


def a_batch(num_documents=6, num_labels=NUM_LABELS, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(num_documents, num_labels, generator=generator)
    labels = (torch.rand(num_documents, num_labels, generator=generator) < 0.3).to(torch.uint8)
    labels[1:2] = 0  # a document without labels
    return logits, labels


def float64_loss(logits, labels, kind):
    logits, labels = logits.double(), labels.double()
    loss = 0.0
    if "bce" in kind:
        loss = loss - (labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).sum()
    if "softmax" in kind.split("+"):
        loss = loss - (labels * logits.log_softmax(dim=-1)).sum()
    if "decoupled_softmax" in kind:
        negatives = logits.exp() * (1 - labels)
        loss = loss - (labels * (logits.exp() / (logits.exp() + negatives.sum(dim=-1, keepdim=True))).log()).sum()
    return loss / len(logits)


def value_and_gradient(loss_function, logits, labels, kind, factor=1.0):
    logits = logits.clone().requires_grad_()
    loss = loss_function(logits, labels, kind)
    (factor * loss).backward()
    return loss.detach(), logits.grad


def chunked(monkeypatch, num_documents, width):
    monkeypatch.setattr(classification_loss_sep_mldc, "LOSS_CHUNK_SIZE", num_documents * width)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_loss_and_its_gradient_equal_a_float64_reference(monkeypatch, kind, width, dtype):
    logits, labels = a_batch()
    expected = value_and_gradient(float64_loss, logits.double(), labels, kind, factor=7.0)
    chunked(monkeypatch, len(logits), width)
    loss, gradient = value_and_gradient(multi_label_loss, logits, labels.to(dtype), kind, factor=7.0)
    assert loss.dtype == gradient.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_loss_equals_the_plain_one_for_any_logits(monkeypatch, kind, dtype):
    logits, labels = a_batch(scale=30.0)
    logits = logits.to(dtype)
    plain = value_and_gradient(multi_label_loss, logits, labels, kind)
    chunked(monkeypatch, len(logits), 4)
    ours = value_and_gradient(multi_label_loss, logits, labels, kind)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_a_finite_chunked_loss_and_gradient(monkeypatch, kind):
    logits, labels = a_batch()
    logits[0], logits[1], logits[2, ::2] = 1e4, -1e4, 1e4
    plain = value_and_gradient(multi_label_loss, logits, labels, kind)
    chunked(monkeypatch, len(logits), 5)
    ours = value_and_gradient(multi_label_loss, logits, labels, kind)
    assert ours[0].isfinite() and ours[1].isfinite().all()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["decoupled_softmax", "bce+decoupled_softmax"])
def test_a_document_with_every_label_has_no_negatives_to_be_told_apart_from(monkeypatch, kind):
    logits, labels = a_batch()
    labels[0] = 1
    for width in (NUM_LABELS, 5):
        chunked(monkeypatch, len(logits), width)
        loss, gradient = value_and_gradient(multi_label_loss, logits, labels, kind)
        assert loss.isfinite() and gradient.isfinite().all()
        assert kind != "decoupled_softmax" or not gradient[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_has_a_loss_of_zero_with_gradient(monkeypatch, kind):
    chunked(monkeypatch, 1, 1)
    loss, gradient = value_and_gradient(multi_label_loss, *a_batch(num_documents=0), kind)
    assert loss == 0 and gradient.shape == (0, NUM_LABELS)


def test_backward_may_run_twice_through_the_chunked_loss_and_never_without_gradient(monkeypatch):
    logits, labels = a_batch()
    chunked(monkeypatch, len(logits), 5)
    logits.requires_grad_()
    loss = multi_label_loss(logits, labels, "bce+softmax")
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(2 * loss, logits)[0], 2 * first)
    with torch.no_grad():
        assert multi_label_loss(logits, labels, "bce+softmax") == loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_loss_makes_one_tensor_of_the_logits_size_the_gradient(monkeypatch, kind, dtype):
    logits, labels = a_batch(num_labels=200)
    logits = logits.to(dtype).requires_grad_()
    chunked(monkeypatch, len(logits), 20)
    with LargestTensors(logits.numel()) as forward:
        loss = multi_label_loss(logits, labels, kind)
    with LargestTensors(logits.numel()) as backward:
        torch.autograd.grad(loss, logits)
    assert forward.made == []
    assert backward.made == [("aten.empty_like.default", dtype)]


def test_small_batches_take_the_plain_path_and_large_ones_the_chunked_one(monkeypatch):
    logits, labels = a_batch()
    logits.requires_grad_()
    monkeypatch.setattr(classification_loss_sep_mldc, "LOSS_CHUNK_SIZE", logits.numel())
    assert "ChunkedLoss" not in type(multi_label_loss(logits, labels, "bce").grad_fn).__name__
    monkeypatch.setattr(classification_loss_sep_mldc, "LOSS_CHUNK_SIZE", logits.numel() - 1)
    assert "ChunkedLoss" in type(multi_label_loss(logits, labels, "bce").grad_fn).__name__


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_alike_with_the_chunked_loss(monkeypatch, kind):
    model = tiny_model(classification_loss=kind, classifier="mlp+similarity").train()
    batch = tiny_batch()
    gradients = []
    for width in (100, 2):
        chunked(monkeypatch, len(batch["labels"]), width)
        model.zero_grad()
        loss = model(**batch).loss
        assert ("ChunkedLoss" in type(loss.grad_fn).__name__) == (width == 2)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_compiles_to_one_graph_below_and_above_the_chunk_size(monkeypatch, kind):
    logits, labels = a_batch()
    expected = value_and_gradient(multi_label_loss, logits, labels, kind)
    for width in (NUM_LABELS + 1, 5):
        torch.compiler.reset()
        chunked(monkeypatch, len(logits), width)
        compiled = torch.compile(multi_label_loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(value_and_gradient(compiled, logits, labels, kind), expected)


@pytest.mark.parametrize("kind", ["bce", "bce+decoupled_softmax"])
@pytest.mark.parametrize("width", [NUM_LABELS + 1, 5])
def test_a_weighted_positive_counts_as_often_as_its_weight_says(monkeypatch, kind, width):
    logits, labels = a_batch()
    weights = torch.linspace(0.1, 20, NUM_LABELS)
    chunked(monkeypatch, len(logits), width)
    scores = logits.double().requires_grad_()
    added = -((weights.double() - 1) * labels.double() * scores.sigmoid().log()).sum() / len(logits)
    expected = added + float64_loss(scores, labels, kind)
    expected.backward()
    own = logits.clone().requires_grad_()
    loss = multi_label_loss(own, labels, kind, weights)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own.grad.double(), scores.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["balanced", "effective"])
def test_rarer_labels_weigh_more_and_the_effective_weights_of_all_positives_have_a_mean_of_1(kind):
    counts = [900, 100, 10, 1, 0]
    weights = class_weights(counts, 1000, kind)
    assert weights.tolist() == sorted(weights.tolist()) and weights[3] == weights[4] and weights.min() > 0
    if kind == "effective":
        occurrences = torch.tensor([900.0, 100, 10, 1, 1])
        torch.testing.assert_close((weights * occurrences).sum() / occurrences.sum(), torch.tensor(1.0))
        assert weights[0] / weights[1] > 0.6  # enough documents are enough
        torch.testing.assert_close(weights[3] / weights[2], torch.tensor(10.0), rtol=0.05, atol=0)
    else:
        torch.testing.assert_close(weights[0], torch.tensor(100 / 900))


def test_impossible_counts_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="`label_counts` contains 11, but there are 10 documents"):
        class_weights([11], 10, "balanced")
    with pytest.raises(ValueError, match="`kind` is 'auto'"):
        class_weights([1], 10, "auto")


def test_class_weights_are_part_of_a_checkpoint_and_follow_its_labels(tmp_path):
    known = {"label_counts": [9, 5, 1], "num_train_documents": 10}
    plain = tiny_model(num_labels=3, **known)
    model = tiny_model(num_labels=3, class_weights="balanced", **known)
    batch = tiny_batch(num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded(**batch).loss == model(**batch).loss != plain(**batch).loss
    loaded.remove_labels(["label 1"])
    expected = tiny_model(num_labels=3, **known)
    expected.remove_labels(["label 1"])
    batch["labels"] = batch["labels"][:, [0, 2]]
    logits = expected(**batch).logits
    weights = class_weights([9, 1], 10, "balanced")
    torch.testing.assert_close(loaded(**batch).loss, multi_label_loss(logits, batch["labels"], "bce", weights))
