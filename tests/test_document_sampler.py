"""Order of training documents."""

import random

import pytest
import torch

from trainer.data.sampler import DocumentSampler


def documents(count=1000, seed=0):
    rng = random.Random(seed)
    lengths = [rng.randint(5, 300) for _ in range(count)]
    label_sets = [tuple(rng.sample(range(8), rng.randint(0, 3))) for _ in range(count)]
    return lengths, label_sets


@pytest.mark.parametrize("grouped", [{}, {"lengths"}, {"label_sets"}, {"lengths", "label_sets"}])
@pytest.mark.parametrize("count", [1, 7, 32, 1000])
def test_every_document_comes_once_an_epoch(grouped, count):
    lengths, label_sets = documents(count)
    columns = {"lengths": lengths, "label_sets": label_sets}
    sampler = DocumentSampler(count, 32, **{name: columns[name] for name in grouped})
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_order_is_a_pure_function_of_seed_epoch_and_batch_size():
    lengths, label_sets = documents()
    torch.manual_seed(1)
    first = DocumentSampler(1000, 32, lengths, label_sets, seed=3)
    order = first.order(2)
    torch.manual_seed(99)
    torch.rand(5)
    second = DocumentSampler(1000, 32, lengths, label_sets, seed=3)
    list(second)  # having run an epoch changes nothing
    assert second.order(2) == order
    assert first.order(3) != order
    assert DocumentSampler(1000, 32, lengths, label_sets, seed=4).order(2) != order


def test_ordering_does_not_touch_the_global_random_state():
    lengths, label_sets = documents()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    DocumentSampler(1000, 32, lengths, label_sets).order(0)
    assert torch.equal(torch.rand(1), expected)


def test_length_grouping_wastes_little_padding():
    lengths, _ = documents(6000)

    def waste(order):
        padded = sum(max(lengths[i] for i in order[k : k + 32]) * len(order[k : k + 32]) for k in range(0, 6000, 32))
        return 1 - sum(lengths) / padded

    assert waste(DocumentSampler(6000, 32, lengths).order(0)) < 0.05
    assert waste(DocumentSampler(6000, 32).order(0)) > 0.3


def test_the_longest_documents_come_in_the_first_batch():
    lengths, _ = documents()
    order = DocumentSampler(1000, 32, lengths).order(0)
    assert max(lengths[i] for i in order[:32]) == max(lengths)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_pairs_with_one_label_set_share_a_batch(with_lengths):
    lengths, label_sets = documents(4000)
    sampler = DocumentSampler(4000, 32, lengths if with_lengths else None, label_sets)
    plain = DocumentSampler(4000, 32, lengths if with_lengths else None)

    def share(order):
        found = 0
        for k in range(0, 4000, 32):
            batch = [tuple(sorted(label_sets[i])) for i in order[k : k + 32]]
            found += sum(batch.count(labels) > 1 for labels in batch if labels)
        return found / sum(1 for labels in label_sets if labels)

    assert share(sampler.order(0)) > 0.95
    assert share(plain.order(0)) < 0.6


def test_pairs_change_from_epoch_to_epoch():
    label_sets = [(0,)] * 100
    sampler = DocumentSampler(100, 10, None, label_sets)
    partners = [dict(zip(order[::2], order[1::2])) for order in (sampler.order(0), sampler.order(1))]
    assert partners[0] != partners[1]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="`lengths` has 2 entries for 3 documents"):
        DocumentSampler(3, 2, lengths=[1, 2])
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        DocumentSampler(3, 0)
