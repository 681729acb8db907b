"""What is computed in chunks of labels equals what is computed at once: the classification loss and the best labels."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_sep_mldc import classification_loss_sep_mldc, label_table_sep_mldc
from modeling_sep_mldc.classification_loss_sep_mldc import multi_label_loss
from modeling_sep_mldc.label_table_sep_mldc import attention_weights


pytestmark = pytest.mark.numeric

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


class LargestTensors(TorchDispatchMode):
    """Counts the calls that made a new tensor of `numel` elements, by operator."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for out in tree_leaves(outputs):
            if isinstance(out, torch.Tensor) and out.numel() >= self.numel:
                if out.untyped_storage().data_ptr() not in known:
                    self.made.append((str(function), out.dtype))
        return outputs


# --- the loss


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


# --- the gradient of a trained label table


def trained_table(classifier, label_attention=True):
    model = tiny_model(num_labels=NUM_LABELS, classifier=classifier, label_attention=label_attention).train()
    model.label_embeddings.requires_grad_(True)
    with torch.no_grad():
        model.label_embeddings[3] = 0.0  # has no direction
    return model, tiny_batch(num_labels=NUM_LABELS)


def table_loss(model, batch):
    output = model(**batch)
    return output.loss + (output.label_embeds[[0, 3, 5]] ** 2).sum() + output.document_embeds.square().sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("label_attention", [True, False])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_large_label_table_gets_the_gradient_that_autograd_gives_a_small_one(
    monkeypatch, classifier, label_attention
):
    model, batch = trained_table(classifier, label_attention)
    expected = gradients(model, table_loss(model, batch))
    monkeypatch.setattr(label_table_sep_mldc, "TABLE_GRADIENT_SIZE", 0)
    loss = table_loss(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(loss, table_loss(model, batch))
    torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_asked_for_in_between_leaves_nothing_in_that_of_a_large_table(monkeypatch):
    model, batch = trained_table("mlp+similarity")
    expected = gradients(model, table_loss(model, batch))
    monkeypatch.setattr(label_table_sep_mldc, "TABLE_GRADIENT_SIZE", 0)
    output = model(**batch)
    loss = output.loss + (output.label_embeds[[0, 3, 5]] ** 2).sum() + output.document_embeds.square().sum()
    torch.autograd.grad(output.loss, output.document_embeds, retain_graph=True)
    (own,) = torch.autograd.grad(loss, model.label_embeddings, retain_graph=True)
    torch.testing.assert_close(own, expected["label_embeddings"], rtol=1e-4, atol=1e-6)
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        torch.testing.assert_close(model.label_embeddings.grad, own)


def test_the_gradient_of_a_large_table_makes_two_tensors_of_its_size_at_most(monkeypatch):
    model, batch = trained_table("mlp+similarity")
    made = {}
    for size in (2**22, 0):
        monkeypatch.setattr(label_table_sep_mldc, "TABLE_GRADIENT_SIZE", size)
        loss = model(**batch).loss
        with LargestTensors(model.label_embeddings.numel()) as backward:
            torch.autograd.grad(loss, model.label_embeddings)
        made[size] = len(backward.made)
    assert made[0] <= 2 < made[2**22]


def test_attention_weights_are_a_softmax_and_neither_they_nor_their_gradient_hold_subnormal_numbers():
    scores = (30 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    weights = attention_weights(scores)
    torch.testing.assert_close(weights, scores.double().softmax(dim=-1).float(), rtol=1e-5, atol=1e-25)
    value = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((weights @ value).sum(), scores)
    (expected,) = torch.autograd.grad((scores.double().softmax(dim=-1) @ value.double()).sum(), scores)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    smallest = torch.finfo(torch.float32).tiny
    for tensor in (weights, gradient):
        assert not ((tensor != 0) & (tensor.abs() < smallest)).any()
    plain = scores.softmax(dim=-1)
    assert ((plain != 0) & (plain < smallest)).any()  # what would slow a CPU down


# --- the best labels


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


def test_top_k_is_predicted_without_gradient_and_dropout_and_leaves_training_mode_as_it_was():
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
        ({"k": 0}, "`k` is 0, but it must be a whole number from 1 to 5"),
        ({"k": 6}, "`k` is 6, but it must be a whole number from 1 to 5"),
        ({"k": 2.0}, "`k` is 2.0"),
        ({"k": 1, "chunk_size": 0}, "`chunk_size` is 0, but a whole number of labels from 1 on is needed"),
    ],
)
def test_top_k_refuses_numbers_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().predict_top_k(input_ids=torch.ones(1, 3, dtype=torch.long), **wrong)
