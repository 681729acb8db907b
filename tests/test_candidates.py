"""Labels encoded in a forward: they act as rows of the table, carry gradient, and the stored table is never written."""

import copy

import pytest
import torch
from tiny_models import HIDDEN_SIZE, tiny_batch, tiny_candidates, tiny_model


pytestmark = pytest.mark.numeric

CLASSIFIERS = ("mlp", "similarity", "mlp+similarity")


@pytest.mark.parametrize("label_attention", [True, False])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_candidate_labels_act_like_a_table_with_their_rows_replaced(kind, label_attention):
    model = tiny_model(classifier=kind, label_attention=label_attention)
    batch, indices = tiny_batch(), [4, 0, 2]
    candidates = tiny_candidates(model, indices)
    fresh = model.encode(candidates["candidate_input_ids"], candidates["candidate_attention_mask"])[0]
    replaced = copy.deepcopy(model)
    replaced.set_label_embeddings(fresh.detach(), torch.tensor(indices))
    out, expected = model(**batch, **candidates), replaced(**batch)
    for name in ("loss", "logits", "label_embeds") + ("label_attention",) * label_attention:
        torch.testing.assert_close(out[name], expected[name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.candidate_embeds, fresh)
    if model.uses_label_embeds:
        assert not torch.allclose(out.logits, model(**batch).logits, atol=1e-4)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_gradient_flows_through_candidates_as_if_the_whole_table_were_in_the_graph(kind):
    model, batch = tiny_model(classifier=kind), tiny_batch()
    candidates = tiny_candidates(model, [4, 0, 2])
    model(**batch, **candidates).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    fresh = model.encode(candidates["candidate_input_ids"], candidates["candidate_attention_mask"])[0]
    table = model.label_embeddings.index_copy(0, candidates["candidate_indices"], fresh)
    torch.func.functional_call(model, {"label_embeddings": table}, kwargs=batch).loss.backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-4, rtol=1e-3, msg=name)
    # The labels' own share of it is more than rounding.
    model.zero_grad()
    model(**batch).loss.backward()
    assert not torch.allclose(
        ours["backbone.encoder.layer.0.output.dense.weight"],
        model.backbone.encoder.layer[0].output.dense.weight.grad,
        atol=1e-3,
    )


def test_candidate_embeds_and_their_rows_of_label_embeds_carry_gradient_to_the_encoder():
    model = tiny_model()
    for pick in (lambda out: out.candidate_embeds, lambda out: out.label_embeds[torch.tensor([3, 1])]):
        model.zero_grad()
        pick(model(**tiny_batch(), **tiny_candidates(model, [3, 1]))).square().sum().backward()
        assert model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("trained_table", [False, True])
def test_forward_and_backward_never_write_to_the_stored_table(trained_table):
    model = tiny_model(classifier="mlp+similarity").train()
    model.label_embeddings.requires_grad_(trained_table)
    before, version = model.label_embeddings.detach().clone(), model.label_embeddings._version
    model(**tiny_batch(), **tiny_candidates(model, [1, 2])).loss.backward()
    model(**tiny_batch()).loss.backward()
    assert torch.equal(model.label_embeddings, before) and model.label_embeddings._version == version


@pytest.mark.parametrize("with_candidates", [False, True])
def test_label_embeds_are_never_the_stored_leaf_but_send_it_gradient_when_it_is_trained(with_candidates):
    model = tiny_model()
    candidates = tiny_candidates(model, [1]) if with_candidates else {}
    assert model(**tiny_batch(), **candidates).label_embeds is not model.label_embeddings
    model.label_embeddings.requires_grad_(True)
    out = model(**tiny_batch(), **candidates)
    assert not out.label_embeds.is_leaf
    out.label_embeds.sum().backward()
    expected = torch.ones(5, HIDDEN_SIZE)
    if with_candidates:
        expected[1] = 0.0
    assert torch.equal(model.label_embeddings.grad, expected)


def test_a_trained_table_gets_a_gradient_from_the_classification_loss():
    model = tiny_model()
    model.label_embeddings.requires_grad_(True)
    model(**tiny_batch()).loss.backward()
    assert model.label_embeddings.grad.any(dim=1).all()


def test_the_table_is_returned_in_training_and_with_labels_but_not_in_mere_prediction():
    model, batch = tiny_model(), tiny_batch()
    assert model(**batch).label_embeds is not None
    del batch["labels"]
    assert model(**batch).label_embeds is None
    assert model(**batch, return_label_embeds=True).label_embeds is not None
    assert model.train()(**batch).label_embeds is not None


def test_label_embeds_are_left_out_on_request_and_that_changes_nothing_else():
    model = tiny_model()
    arguments = {**tiny_batch(), **tiny_candidates(model, [1, 3])}
    with_table, without = model(**arguments), model(**arguments, return_label_embeds=False)
    assert without.label_embeds is None and with_table.label_embeds is not None
    assert set(without.keys()) == set(with_table.keys()) - {"label_embeds"}
    assert all(torch.equal(value, with_table[key]) for key, value in without.items())
