"""Label-wise attention over tokens: a slow reference, chunks, and behavior in saving, editing and training."""

import json
import math

import pytest
import torch
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer

from modeling_sep_mldc import (
    SepMldcConfig,
    SepMldcForMultiLabelClassification,
    token_attention_sep_mldc,
)
from modeling_sep_mldc.configuration_sep_mldc import (
    FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION,
    MOST_LABELS_FOR_TOKEN_ATTENTION,
)
from modeling_sep_mldc.token_attention_sep_mldc import TokenAttention, token_attention_weights
from trainer import recommend_settings


pytestmark = pytest.mark.numeric


def slow_logits(layer, states, mask):
    """Loops over documents and labels, in Python floats."""
    keys = states if layer.key is None else states @ layer.key.weight.t()
    values = states if layer.value is None else states @ layer.value.weight.t()
    rows = []
    for key_rows, value_rows, attended in zip(keys.tolist(), values.tolist(), mask.tolist(), strict=True):
        tokens = [pair for *pair, kept in zip(key_rows, value_rows, attended, strict=True) if kept]
        logits = []
        for query, weight in zip(layer.queries.tolist(), layer.weights.tolist(), strict=True):
            dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
            scores = [math.exp(dot(key, query) / math.sqrt(states.shape[-1])) for key, _ in tokens]
            total = sum(score * dot(value, weight) for score, (_, value) in zip(scores, tokens))
            logits.append(total / max(sum(scores), 1e-9))
        rows.append(logits)
    return torch.tensor(rows)


def random_layer(num_labels=7, hidden_size=6, size=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = TokenAttention(num_labels, hidden_size, size)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(3, 5, hidden_size, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    return layer, states, mask


def documents():
    return {name: value for name, value in tiny_batch().items() if name != "labels"}


@pytest.mark.parametrize("size", [6, 4])
def test_logits_equal_a_loop_over_documents_labels_and_tokens(size):
    layer, states, mask = random_layer(size=size)
    assert layer.queries.shape == layer.weights.shape == (7, size)
    expected = slow_logits(layer, states, mask)
    torch.testing.assert_close(layer(states, mask), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(states, mask, slice(2, 5)), expected[:, 2:5], rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in layer.parameters()) == token_attention_weights(7, 6, size)


def test_large_scores_do_not_overflow():
    layer, states, mask = random_layer()
    expected = layer(1e4 * states, mask)
    assert expected.isfinite().all()
    layer.queries.data[0], states[0] = (
        0,
        states[0] - 100,
    )  # all scores of a label may be far below or above those of others
    assert layer(1e4 * states, mask).isfinite().all()


def test_padding_plays_no_part_and_a_document_without_tokens_gets_zero():
    layer, states, mask = random_layer()
    other = states.masked_fill(mask[..., None] == 0, 1e6)
    torch.testing.assert_close(layer(states, mask), layer(other, mask))
    mask[2] = 0
    logits = layer(states, mask)
    assert torch.equal(logits[2], torch.zeros(7))
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("size", [6, 4])
@pytest.mark.parametrize("limit", [1, 30, 60, 10**9])
def test_chunks_of_labels_give_the_logits_and_gradients_of_autograd(monkeypatch, size, limit):
    layer, states, mask = random_layer(size=size)
    mask[2] = 0
    states.requires_grad_()
    inputs = [states, *layer.parameters()]
    logits = token_attention_sep_mldc.weighted_sums(*layer.scores_and_products(states), mask.bool())
    monkeypatch.setitem(token_attention_sep_mldc.MAX_SCORES, "cpu", limit)
    monkeypatch.setattr(token_attention_sep_mldc, "CHUNKS_PER_SUM", 2)
    found = layer(states, mask)
    torch.testing.assert_close(found, logits)
    gradients = torch.autograd.grad((found + 1).square().sum(), inputs)
    expected = torch.autograd.grad((logits + 1).square().sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(states, mask), logits.detach())


def test_the_model_adds_them_to_the_logits_of_the_classifier():
    model, batch = tiny_model(classifier="mlp+similarity", token_attention=True), documents()
    states = model(**batch, output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        added = model.token_attention(states, batch["attention_mask"])
        total = model(**batch).logits
        model.token_attention.weights.zero_()
        torch.testing.assert_close(total - model(**batch).logits, added, atol=1e-5, rtol=1e-4)
    assert added.abs().max() > 1e-4


def test_scores_do_not_depend_on_the_side_of_the_padding_and_tokens_beyond_the_limit():
    model = tiny_model(token_attention=True, encoder_max_length=6)
    batch = documents()
    left = {name: torch.zeros_like(value) for name, value in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for name, value in batch.items():
            left[name][row, -length:] = value[row, :length]
    cut = {name: value[:, :6] for name, value in batch.items()}
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(model(**left).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(**cut).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classifier", ["mlp", "similarity", "mlp+similarity"])
def test_top_k_in_chunks_equals_top_k_of_the_logits(classifier):
    model = tiny_model(num_labels=24, classifier=classifier, token_attention=True)
    torch.nn.init.normal_(model.token_attention.weights)
    with torch.no_grad():
        expected = model(**documents()).logits.topk(5, dim=-1)
    for chunk_size in (1, 10, 1000):
        scores, indices = model.predict_top_k(**documents(), k=5, chunk_size=chunk_size)
        torch.testing.assert_close(scores, expected.values, rtol=1e-4, atol=1e-5)
        assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("size", [None, 8])
def test_it_is_saved_and_loaded_and_a_checkpoint_from_before_has_none(tmp_path, size):
    model = tiny_model(token_attention=True, token_attention_size=size)
    model.save_pretrained(tmp_path)
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**documents()).logits, model(**documents()).logits)
    values = model.config.to_dict()
    values.pop("token_attention")
    assert SepMldcConfig.from_dict(values).token_attention is False
    assert SepMldcForMultiLabelClassification(SepMldcConfig.from_dict(values)).token_attention is None


@pytest.mark.parametrize("hidden_size, expected", [(32, 32), (128, 128), (256, 128)])
def test_states_are_projected_to_128_dimensions_by_default(tmp_path, hidden_size, expected):
    config = SepMldcConfig(backbone_config={"model_type": "bert", "hidden_size": hidden_size}, token_attention=True)
    assert config.token_attention_size == expected
    config.save_pretrained(tmp_path)
    assert SepMldcConfig.from_pretrained(tmp_path).token_attention_size == expected
    loaded = SepMldcConfig.from_dict(config.to_dict(), token_attention_size=8)
    assert loaded.token_attention_size == 8
    values = config.to_dict()
    del values["token_attention_size"]
    assert SepMldcConfig.from_dict(values).token_attention_size == hidden_size  # saved before states were projected


def test_a_checkpoint_from_before_there_were_sizes_has_the_full_one(tmp_path):
    model = tiny_model(token_attention=True, token_attention_size=32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("token_attention_size") == 32
    path.write_text(json.dumps(values))
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    assert loaded.config.token_attention_size == 32 and loaded.token_attention.key is None
    with torch.no_grad():
        assert torch.equal(loaded(**documents()).logits, model(**documents()).logits)


@pytest.mark.parametrize("size, message", [(0, "`token_attention_size` is 0"), (33, "states have 32 dimensions")])
def test_a_size_that_makes_no_sense_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(token_attention=True, token_attention_size=size)


@pytest.mark.parametrize(
    "num_labels, num_documents, expected",
    [
        (3, FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION + 1, True),
        (3, FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION, False),
        (3, None, False),
        (MOST_LABELS_FOR_TOKEN_ATTENTION, 10**6, True),
        (MOST_LABELS_FOR_TOKEN_ATTENTION + 1, 10**6, False),
    ],
)
def test_it_is_on_by_default_for_enough_documents_and_not_too_many_labels(num_labels, num_documents, expected):
    assert SepMldcConfig(num_labels=num_labels, num_train_documents=num_documents).token_attention is expected
    assert SepMldcConfig(num_labels=3, token_attention=not expected).token_attention is not expected
    if num_documents is not None:
        assert recommend_settings(num_documents, num_labels)["token_attention"] is expected


@pytest.mark.parametrize("size", [32, 8])
def test_a_new_model_starts_with_the_label_embeddings_as_queries(tmp_path, size):
    tiny_model().backbone.save_pretrained(tmp_path)
    model = SepMldcForMultiLabelClassification.from_backbone(
        str(tmp_path), tiny_tokenizer(), ["star", "market"], token_attention=True, token_attention_size=size
    )
    layer, states = model.token_attention, torch.randn(1, 5, 32)
    # Two label embeddings lie in two dimensions: a projection to eight keeps their products with the states.
    scores = layer.scores_and_products(states)[0]
    torch.testing.assert_close(scores, states @ model.label_embeddings.t() / 32**0.5, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in layer.parameters()) and layer.weights.std() < 0.1


@pytest.mark.parametrize("size", [32, 8])
def test_labels_are_added_and_removed(size):
    model = tiny_model(token_attention=True, token_attention_size=size)
    layer = model.token_attention
    with torch.no_grad():
        before = model(**documents()).logits
    model.add_labels({"star": "star galaxy", "price": None}, tiny_tokenizer())
    assert layer.queries.shape == layer.weights.shape == (7, size)
    torch.testing.assert_close(layer.queries[5:], layer.queries_of(model.label_embeddings[5:]))
    assert layer.queries.requires_grad and layer.queries.is_leaf
    model.remove_labels(["star", "price"])
    with torch.no_grad():
        torch.testing.assert_close(model(**documents()).logits, before)


@pytest.mark.parametrize("size", [32, 8])
def test_training_moves_queries_and_weights(size):
    model = tiny_model(token_attention=True, token_attention_size=size).train()
    before = {name: value.clone() for name, value in model.token_attention.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.token_attention.state_dict().items())


def test_autocast_is_near_full_precision():
    model = tiny_model(token_attention=True)
    with torch.no_grad():
        expected = model(**documents()).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**documents()).logits
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [6, 4])
def test_gradients_are_those_of_finite_differences(size):
    layer, states, mask = random_layer(size=size)
    layer, states = layer.double(), states.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda states, *_: layer(states, mask).double(),
        (states, *layer.parameters()),
        atol=1e-3, rtol=1e-3, eps=1e-3,
    )  # fmt: skip


def test_a_compiled_layer_is_one_graph_and_gives_the_same_logits():
    layer, states, mask = random_layer(size=4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(states, mask), layer(states, mask))
