"""Inner products with label embeddings, attention over labels, and their gradients."""

import torch
from largest_tensors import LargestTensors

from modeling_sep_mldc.label_table_sep_mldc import LabelTable, attention_weights


def test_replaced_rows_give_the_products_mixes_and_gradients_of_a_table_that_holds_them():
    generator = torch.Generator().manual_seed(0)
    stored, fresh = torch.randn(7, 4, generator=generator), torch.randn(2, 4, generator=generator).requires_grad_()
    queries, weights = torch.randn(3, 4, generator=generator), torch.rand(3, 7, generator=generator)
    indices = torch.tensor([5, 1])
    table = LabelTable(stored, fresh, indices)
    dense = stored.index_copy(0, indices, fresh)
    for cosine in (False, True):
        rows = dense / dense.norm(dim=-1, keepdim=True) if cosine else dense
        actual, expected = table.products(queries, cosine), queries @ rows.t()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), fresh),
            torch.autograd.grad(expected.square().sum(), fresh, retain_graph=True),
        )
    torch.testing.assert_close(table.mix(weights), weights @ dense)
    torch.testing.assert_close(table.dense(), dense)


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


def test_gradients_are_those_of_the_formulas_and_the_label_embeddings_are_converted_once():
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(7, 4, generator=generator)
    stored[3] = 0  # a label whose embedding is not known yet
    queries, weights = torch.randn(3, 4, generator=generator), torch.rand(3, 7, generator=generator)

    def loss(table):
        return (table.products(queries).square() + table.products(queries, cosine=True)).sum() + table.mix(
            weights
        ).sum()

    actual, expected = stored.clone().requires_grad_(), stored.clone().requires_grad_()
    loss(LabelTable(actual)).backward()
    norms = expected.norm(dim=-1).clamp_min(1e-6)
    ((queries @ expected.t()).square() + queries @ expected.t() / norms).sum().backward()
    (weights @ expected).sum().backward()
    torch.testing.assert_close(actual.grad, expected.grad)
    assert actual.grad.isfinite().all()

    half = stored.clone().requires_grad_()
    with LargestTensors(stored.numel()) as large, torch.autocast("cpu", torch.bfloat16):
        loss(LabelTable(half)).backward()
    assert sum("_to_copy" in name for name, _ in large.made) == 2  # one for the products, one for their gradient
    torch.testing.assert_close(half.grad[:3], expected.grad[:3], rtol=0.05, atol=0.3)


def test_shapes_are_known_without_values():
    table = LabelTable(torch.empty(7, 4, device="meta"))  # a device without autocast
    assert table.products(torch.empty(3, 4, device="meta"), cosine=True).shape == (3, 7)
