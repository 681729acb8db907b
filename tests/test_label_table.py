"""Inner products with label embeddings, attention over labels, and their gradients."""

import torch

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
