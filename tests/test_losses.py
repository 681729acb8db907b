"""The contrastive losses against loop-by-loop references, golden values worked out by hand, and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses.contrastive import (
    WEIGHTINGS,
    document_contrastive_loss,
    document_similarity,
    label_contrastive_loss,
    label_similarity,
    present_labels,
    share_of_anchors_with_positive,
)


pytestmark = pytest.mark.numeric

LOSSES = {"label": label_contrastive_loss, "document": document_contrastive_loss}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def weigh(similarity: float, weighting: str) -> float:
    return {"jaccard": similarity, "complement": 1 - similarity, "uniform": 1.0}[weighting]


def inner_products(embeds: torch.Tensor, normalize: bool) -> list[list[float]]:
    rows = embeds.double().tolist()
    if normalize:
        rows = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    return [[sum(a * b for a, b in zip(row, other)) for other in rows] for row in rows]


def slow_label_loss(embeds, labels, temperature=0.1, weighting="jaccard", normalize=True) -> float:
    """Eq. 9 as fixed in the docstring of `label_contrastive_loss`, over all labels, present or not."""
    dots = inner_products(embeds, normalize)
    documents = [{b for b, row in enumerate(labels.tolist()) if row[i]} for i in range(labels.shape[1])]
    terms = []
    for i, own in enumerate(documents):
        if not own:
            continue
        negatives = 0.0
        for k, other in enumerate(documents):
            if k != i and other:
                negatives += math.exp(dots[i][k] / temperature) * weigh(jaccard(own, other), weighting)
        if negatives > 0:
            terms.append(-math.log(math.exp(dots[i][i] / temperature) / negatives))
    return sum(terms) / len(terms) if terms else 0.0


def slow_document_loss(embeds, labels, temperature=0.1, weighting="jaccard", normalize=True) -> float:
    """Eq. 14-15 as fixed in the docstring of `document_contrastive_loss`."""
    dots = inner_products(embeds, normalize)
    label_sets = [{i for i, value in enumerate(row) if value} for row in labels.tolist()]
    total = 0.0
    for i, own in enumerate(label_sets):
        if not own:
            continue
        negatives = 0.0
        for k, other in enumerate(label_sets):
            if other != own:
                negatives += math.exp(dots[i][k] / temperature) * weigh(jaccard(own, other), weighting)
        if negatives == 0:
            continue
        for j, other in enumerate(label_sets):
            if j != i and other == own:
                total += -math.log(math.exp(dots[i][j] / temperature) / negatives)
    return total / max(len(label_sets), 1)


SLOW = {"label": slow_label_loss, "document": slow_document_loss}


def random_batch(kind: str, seed: int, batch_size: int = 12, num_labels: int = 5, hidden_size: int = 4):
    """Sparse labels of few kinds, so that identical sets, absent labels and empty documents all occur."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(batch_size, num_labels, generator=generator) < 0.3).long()
    rows = num_labels if kind == "label" else batch_size
    return torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64), labels


@st.composite
def batches(draw):
    batch_size, num_labels = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=batch_size * num_labels, max_size=batch_size * num_labels))
    return torch.tensor(bits, dtype=torch.float32).reshape(batch_size, num_labels), draw(st.integers(0, 2**31))


def embeddings_for(kind: str, labels: torch.Tensor, seed: int, dtype=torch.float32) -> torch.Tensor:
    rows = labels.shape[1] if kind == "label" else labels.shape[0]
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_equal_their_loop_by_loop_references(kind, weighting, normalize):
    for seed in range(20):
        embeds, labels = random_batch(kind, seed)
        value = LOSSES[kind](embeds, labels, 0.3, weighting, normalize)
        assert value.item() == pytest.approx(
            SLOW[kind](embeds, labels, 0.3, weighting, normalize), rel=1e-9, abs=1e-12
        )


def test_label_loss_has_the_value_worked_out_by_hand():
    """
    Documents {a, b}, {a, b}, {a, c}, {a}; document sets a = 0123, b = 01, c = 2; label d is absent.
    W_ab = 2/4, W_ac = 1/4, W_bc = 0. Unit embeddings a = (1, 0), b = (0, 1), c = (0.6, 0.8); τ = 0.5 doubles e·e:
    a: negatives 0.5 exp(0) + 0.25 exp(1.2) ; b: 0.5 exp(0) ; c: 0.25 exp(1.2); the positive is exp(2) each time.
    Mean over the three defined terms of log(negatives) - 2.
    """
    labels = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]])
    embeds = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.6, 0.8], [9.0, 9.0]])
    a = math.log(0.5 + 0.25 * math.exp(1.2)) - 2
    b = math.log(0.5) - 2
    c = math.log(0.25) + 1.2 - 2
    golden = (a + b + c) / 3
    assert golden == pytest.approx(-2.1980802, abs=1e-7)
    assert label_contrastive_loss(embeds, labels, temperature=0.5).item() == pytest.approx(golden, abs=1e-6)


def test_document_loss_has_the_value_worked_out_by_hand():
    """
    Documents {a, b}, {a, b}, {a}, {c}, {}. Only the first two have a positive (each other). Their negatives: {a} with
    W = 1/2, {c} and {} with W = 0. Unit embeddings (1, 0), (0.8, 0.6), (0, 1), ...; τ = 1:
    first: -log(exp(0.8) / (0.5 exp(0))); second: -log(exp(0.8) / (0.5 exp(0.6))); divided by B = 5.
    With complement weights {a} weighs 1/2, {c} and {} weigh 1; they lie at (-1, 0) and (0, -1).
    """
    labels = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    embeds = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    golden = ((math.log(0.5) - 0.8) + (math.log(0.5) + 0.6 - 0.8)) / 5
    assert golden == pytest.approx(-0.4772589, abs=1e-7)
    assert document_contrastive_loss(embeds, labels, temperature=1.0).item() == pytest.approx(golden, abs=1e-6)

    first = math.log(0.5 + math.exp(-1.0) + 1.0) - 0.8
    second = math.log(0.5 * math.exp(0.6) + math.exp(-0.8) + math.exp(-0.6)) - 0.8
    value = document_contrastive_loss(embeds, labels, temperature=1.0, weighting="complement")
    assert value.item() == pytest.approx((first + second) / 5, abs=1e-6)


def test_similarities_are_jaccard_similarities():
    _, labels = random_batch("document", seed=3)
    label_sets = [{i for i, value in enumerate(row) if value} for row in labels.tolist()]
    expected = torch.tensor([[jaccard(a, b) for b in label_sets] for a in label_sets])
    torch.testing.assert_close(document_similarity(labels), expected)

    similarity, present = label_similarity(labels)
    documents = [set(labels[:, i].nonzero().squeeze(1).tolist()) for i in present.tolist()]
    torch.testing.assert_close(similarity, torch.tensor([[jaccard(a, b) for b in documents] for a in documents]))


@pytest.mark.parametrize("kind", LOSSES)
@settings(deadline=None, max_examples=60)
@given(batch=batches(), weighting=st.sampled_from(WEIGHTINGS), normalize=st.booleans())
def test_values_and_gradients_are_finite_for_any_multi_hot_matrix(kind, batch, weighting, normalize):
    labels, seed = batch
    embeds = embeddings_for(kind, labels, seed).requires_grad_()
    loss = LOSSES[kind](embeds, labels, weighting=weighting, normalize=normalize)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(embeds.grad).all()
    if normalize:
        assert loss.item() == pytest.approx(SLOW[kind](embeds.detach(), labels, weighting=weighting), abs=1e-4)


@settings(deadline=None, max_examples=40)
@given(batch=batches(), weighting=st.sampled_from(WEIGHTINGS))
def test_losses_do_not_depend_on_the_order_of_documents_or_labels(batch, weighting):
    labels, seed = batch
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randperm(labels.shape[0], generator=generator)
    columns = torch.randperm(labels.shape[1], generator=generator)
    shuffled = labels[documents][:, columns]
    for kind, order in (("label", columns), ("document", documents)):
        embeds = embeddings_for(kind, labels, seed, torch.float64)
        expected = LOSSES[kind](embeds, labels, weighting=weighting)
        torch.testing.assert_close(LOSSES[kind](embeds[order], shuffled, weighting=weighting), expected)


@settings(deadline=None, max_examples=40)
@given(batch=batches(), weighting=st.sampled_from(WEIGHTINGS))
def test_label_loss_ignores_labels_absent_from_the_batch(batch, weighting):
    labels, seed = batch
    embeds = embeddings_for("label", labels, seed, torch.float64)
    wide = torch.zeros(labels.shape[0], 3 * labels.shape[1])
    wide[:, 1::3] = labels
    wide_embeds = torch.full((wide.shape[1], 3), float("nan"), dtype=torch.float64)
    wide_embeds[1::3] = embeds
    expected = label_contrastive_loss(embeds, labels, weighting=weighting)
    torch.testing.assert_close(label_contrastive_loss(wide_embeds, wide, weighting=weighting), expected)

    ids = present_labels(labels)
    rows_only = label_contrastive_loss(embeds[ids], labels[:, ids], weighting=weighting)
    torch.testing.assert_close(rows_only, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_equal_finite_differences(kind, weighting):
    embeds, labels = random_batch(kind, seed=5, batch_size=8, num_labels=4)
    embeds.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: LOSSES[kind](e, labels, 0.5, weighting), (embeds,))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_take_labels_of_any_dtype(kind, dtype):
    embeds, labels = random_batch(kind, seed=1)
    expected = LOSSES[kind](embeds, labels)
    torch.testing.assert_close(LOSSES[kind](embeds, labels.to(dtype)), expected)
    assert share_of_anchors_with_positive(labels.to(dtype)) == share_of_anchors_with_positive(labels)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_stay_in_float32_under_autocast(kind):
    embeds, labels = random_batch(kind, seed=2, hidden_size=64)
    embeds = embeds.float()
    expected = LOSSES[kind](embeds, labels)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[kind](embeds, labels)
        half = LOSSES[kind](embeds.bfloat16(), labels)
    assert value.dtype == half.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(half, LOSSES[kind](embeds.bfloat16().float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize(
    "labels", [torch.zeros(3, 4), torch.eye(3, 4), torch.zeros(0, 4), torch.zeros(1, 4), torch.ones(1, 4)], ids=str
)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_without_a_defined_term_gives_a_connected_zero(kind, labels):
    if kind == "label" and labels.shape[0] == 1 and labels.any():
        labels = labels[:, :1]  # several labels of one document repel each other; a lone one has no negative
    embeds = embeddings_for(kind, labels, seed=0).requires_grad_()
    loss = LOSSES[kind](embeds, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embeds.grad, torch.zeros_like(embeds))


def test_only_rows_of_present_labels_receive_a_gradient():
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]])
    embeds = embeddings_for("label", labels, seed=0).requires_grad_()
    label_contrastive_loss(embeds, labels).backward()
    assert embeds.grad.abs().sum(1).gt(0).tolist() == [True, False, True, False]


def test_a_document_without_labels_is_a_negative_but_no_anchor():
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0]])
    embeds = embeddings_for("document", labels, seed=4).requires_grad_()
    assert document_contrastive_loss(embeds, labels).item() == 0  # as printed its weight is 0
    document_contrastive_loss(embeds, labels, weighting="uniform").backward()
    assert embeds.grad.abs().sum(1).gt(0).all()
    expected = slow_document_loss(embeds.detach(), labels, weighting="uniform")
    assert document_contrastive_loss(embeds, labels, weighting="uniform").item() == pytest.approx(expected, abs=1e-5)


def test_embeddings_that_are_zero_or_huge_stay_finite():
    labels = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1]])
    for scale in (0.0, 1e-30, 1e15):
        for loss in LOSSES.values():
            embeds = (torch.ones(3, 3) * scale).requires_grad_()
            value = loss(embeds, labels)
            value.backward()
            assert torch.isfinite(value) and torch.isfinite(embeds.grad).all()


def test_share_of_anchors_with_positive_counts_exact_label_sets_of_labeled_documents():
    for seed in range(20):
        _, labels = random_batch("document", seed)
        label_sets = [tuple(row) for row in labels.tolist() if any(row)]
        expected = sum(label_sets.count(s) > 1 for s in label_sets) / max(len(label_sets), 1)
        assert share_of_anchors_with_positive(labels).item() == pytest.approx(expected)
    assert share_of_anchors_with_positive(torch.zeros(0, 3)) == 0


def test_nothing_of_size_labels_squared_is_built():
    num_labels = 200_000  # squared, in float32: 160 GB
    labels = torch.zeros(4, num_labels)
    labels[:2, [7, 150_000]] = 1
    labels[2, 7] = 1
    embeds = torch.randn(num_labels, 2)
    rows = embeds[[7, 150_000]]
    expected = label_contrastive_loss(rows, labels[:, [7, 150_000]])
    torch.testing.assert_close(label_contrastive_loss(embeds, labels), expected)
    assert torch.isfinite(document_contrastive_loss(torch.randn(4, 2), labels))


def test_document_loss_compiles_without_a_graph_break():
    embeds, labels = random_batch("document", seed=6)
    compiled = torch.compile(document_contrastive_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(embeds, labels), document_contrastive_loss(embeds, labels))
    compiled = torch.compile(label_contrastive_loss, backend="eager")
    embeds, labels = random_batch("label", seed=6)
    torch.testing.assert_close(compiled(embeds, labels), label_contrastive_loss(embeds, labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.zeros(4)}, r"`labels` has shape \(4,\)"),
        ({"labels": torch.zeros(5, 7)}, r"_embeds` has shape \(4, 3\)"),
        ({"embeds": torch.zeros(4)}, r"_embeds` has shape \(4,\)"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"weighting": "cosine"}, "`weighting` is 'cosine'.*'jaccard', 'complement', 'uniform'"),
    ],
)
@pytest.mark.parametrize("kind", LOSSES)
def test_bad_arguments_are_reported_in_one_sentence(kind, arguments, message):
    arguments = {"embeds": torch.zeros(4, 3), "labels": torch.zeros(4, 4), **arguments}
    with pytest.raises(ValueError, match=message):
        LOSSES[kind](arguments.pop("embeds"), arguments.pop("labels"), **arguments)
