"""Labels that are added to a trained model: calibrated cosines, and learning from the first documents."""

import copy

import numpy as np
import pytest
import torch
from answers import assert_same_answers
from datasets import Dataset
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from tiny_training import make_trainer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, SepMldcForMultiLabelClassification
from modeling_sep_mldc.added_labels_sep_mldc import AddedLabelScores, fit_cosine_calibration
from modeling_sep_mldc.label_texts_sep_mldc import tokenize_label_texts
from modeling_sep_mldc.lexical_sep_mldc import LexicalScores
from trainer import fit_new_labels


pytestmark = pytest.mark.numeric

NEW = {"cells": "cell cells", "markets": "market price"}
DOCUMENTS = [
    {"text": "the cell of the cells in cells", "labels": ["cells"]},
    {"text": "cells and cell learning", "labels": ["cells", "label 1"]},
    {"text": "market price of the market", "labels": ["markets"]},
    {"text": "price model with price data", "labels": ["markets"]},
    {"text": "the proof of a theorem", "labels": ["label 0"]},
]
TEXTS = ["cell cells", "the market price", "a robot", "star galaxy data", "speech and code"]


def inputs():
    return {name: value for name, value in tiny_batch(num_documents=6).items() if name != "labels"}


def logits(model, **more):
    with torch.no_grad():
        return model(**{**inputs(), **more}).logits


def lexical_scores(model, num_bigrams=7):
    generator = torch.Generator().manual_seed(0)
    config = model.config
    vocab_size = config.backbone_config.vocab_size
    lexical = LexicalScores(vocab_size, config.num_labels, 9, num_bigrams)
    lexical.idf.copy_(1 + torch.rand(len(lexical.idf), generator=generator))
    lexical.feature_ids.random_(len(lexical.idf), generator=generator)
    lexical.feature_weights.normal_(generator=generator)
    lexical.scale.fill_(1.5)
    model.lexical, config.num_lexical_features, config.num_lexical_bigrams = lexical, 9, num_bigrams
    return model


def with_new_labels(**kwargs):
    kwargs = {"classifier": "mlp+similarity", "token_attention": True, **kwargs}
    lexical = kwargs.pop("lexical", False)
    model = tiny_model(**kwargs)
    if lexical:
        lexical_scores(model)
    model.add_labels(dict(NEW), tiny_tokenizer(), documents=TEXTS)
    return model


# ---- Calibrated cosines ----


def test_the_calibration_is_that_of_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    cosines = generator.uniform(-0.3, 0.8, 4000)
    targets = generator.uniform(size=4000) < 1 / (1 + np.exp(-(7 * cosines - 4)))
    found = fit_cosine_calibration(torch.tensor(cosines), torch.tensor(targets))
    reference = LogisticRegression(C=1e6).fit(cosines[:, None], targets)
    assert found["scale"] == pytest.approx(reference.coef_[0, 0], rel=0.02)
    assert found["bias"] == pytest.approx(reference.intercept_[0], rel=0.02)


@pytest.mark.parametrize(
    ("cosines", "targets"),
    [([0.1, 0.9], [0.0, 1.0]), ([0.5, 0.5], [0.0, 0.0]), ([0.9, -0.9] * 50, [0.0, 1.0] * 50)],
    ids=["separable", "none", "opposed"],
)
def test_a_calibration_is_finite_and_rises_with_the_cosine(cosines, targets):
    found = fit_cosine_calibration(torch.tensor(cosines), torch.tensor(targets))
    assert 1 <= found["scale"] < 100 and abs(found["bias"]) < 100


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("lexical", [False, True])
def test_the_probability_of_a_new_label_is_the_calibrated_cosine(calibrated, lexical):
    stored = {"scale": 6.0, "bias": -2.5}
    model = tiny_model(
        classifier="mlp+similarity",
        token_attention=True,
        cosine_calibration=stored,
        score_calibration={"scale": 0.5, "bias": 0.3} if calibrated else None,
    )
    if lexical:
        lexical_scores(model)
    tokenizer = tiny_tokenizer()
    model.add_labels(dict(NEW), tokenizer)
    texts = [f"{name}: {text}" for name, text in NEW.items()]
    labels = torch.nn.functional.normalize(model.encode_labels(tokenize_label_texts(tokenizer, texts)), dim=-1)
    with torch.no_grad():
        output = model(**inputs())
    cosines = torch.nn.functional.normalize(output.document_embeds, dim=-1) @ labels.t()
    torch.testing.assert_close(output.logits[:, 5:], 6.0 * cosines - 2.5, atol=1e-4, rtol=1e-4)


def test_on_documents_new_labels_score_as_trained_ones_with_the_same_cosine():
    """Trained labels whose logits are a function of the cosine: new labels must get the same function."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(num_labels=30, classifier="similarity", label_attention=False)
    with torch.no_grad():
        model.classifier.similarity_proj.weight.copy_(torch.eye(32))
        model.classifier.similarity_proj.bias.zero_()
        model.classifier.similarity_scale.fill_(7.0)
        model.classifier.bias.fill_(-4.0)
    model.add_labels(dict(NEW), tokenizer, documents=TEXTS * 4)
    with torch.no_grad():
        output = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"))
    texts = tokenize_label_texts(tokenizer, model.config.label_texts[30:])
    labels = torch.nn.functional.normalize(model.encode_labels(texts), dim=-1)
    cosines = torch.nn.functional.normalize(output.document_embeds, dim=-1) @ labels.t()
    torch.testing.assert_close(output.logits[:, 30:], 7.0 * cosines - 4.0, atol=0.1, rtol=0)
    assert (output.logits[:, 30:] + 4).abs().mean() > 0.5


def test_the_threshold_of_a_new_label_is_the_best_one_for_all_or_the_median():
    thresholds = [0.1, 0.2, 0.3, 0.4, 0.9]
    model = with_new_labels(thresholds=thresholds, threshold_info={"global_threshold": 0.25, "guarantee": "x"})
    assert model.config.thresholds == [*thresholds, 0.25, 0.25] and "guarantee" not in model.config.threshold_info
    assert with_new_labels(thresholds=thresholds).config.thresholds == [*thresholds, 0.3, 0.3]


def test_a_model_that_only_ranks_gets_new_labels_on_the_level_of_its_logits():
    model = tiny_model(num_labels=30, classifier="similarity", classification_loss="softmax", label_attention=False)
    with torch.no_grad():
        model.classifier.bias.fill_(20.0)
    model.add_labels(dict(NEW), tiny_tokenizer(), documents=TEXTS)
    assert model.config.is_ranking and 10 < logits(model)[:, 30:].mean() < 30


def test_tuning_thresholds_measures_what_a_cosine_is_worth(tmp_path):
    trainer = make_trainer(tmp_path)
    documents = [{"input_ids": row.tolist(), "label_indices": [i % 5]} for i, row in enumerate(inputs()["input_ids"])]
    dataset = Dataset.from_list(documents)
    trainer.tune_thresholds(dataset)
    found = trainer.model.config.cosine_calibration
    embeds, labels = [], []
    for batch in trainer.logit_batches(dataset, with_embeds=True):
        embeds.append(batch.inputs["document_embeds"])
        labels.append(batch.labels)
    texts = tokenize_label_texts(tiny_tokenizer(), trainer.model.config.label_texts)
    label_embeds = torch.nn.functional.normalize(trainer.model.encode_labels(texts), dim=-1)
    cosines = torch.nn.functional.normalize(torch.cat(embeds), dim=-1) @ label_embeds.t()
    expected = fit_cosine_calibration(cosines, torch.cat(labels))
    assert found == pytest.approx(expected, rel=1e-3)
    trainer.model.save_pretrained(tmp_path / "saved")
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.cosine_calibration == found


# ---- Learning from the first documents ----


@pytest.mark.parametrize("lexical", [False, True])
def test_fitting_raises_the_new_labels_on_their_documents_and_changes_no_bit_of_the_others(tmp_path, lexical):
    model, tokenizer = with_new_labels(lexical=lexical, thresholds=[0.3] * 5), tiny_tokenizer()
    batch = tokenizer([document["text"] for document in DOCUMENTS], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits
    untouched = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("added", "lexical"))}
    assert fit_new_labels(model, tokenizer, DOCUMENTS) == {"cells": 2, "markets": 2}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in untouched.items())
    with torch.no_grad():
        after = model(**batch).logits
    assert torch.equal(after[:, :5], before[:, :5])
    moved = after[:, 5:] - before[:, 5:]
    assert moved[2:, 0].max() < moved[:2, 0].min() and moved[[0, 1, 4], 1].max() < moved[2:4, 1].min()
    assert (model.lexical.feature_weights[5:].abs().sum() > 0) if lexical else model.lexical is None

    model.save_pretrained(tmp_path)
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, after)
    pipes = [MultiLabelDocumentClassificationPipeline(model=m, tokenizer=tokenizer) for m in (model, loaded)]
    one, two = ([p(text, top_k=7) for text in TEXTS] for p in pipes)
    assert_same_answers(one, two)


def test_the_pipeline_gives_former_labels_the_same_scores_before_and_after_a_fit():
    model, tokenizer = with_new_labels(), tiny_tokenizer()

    def scores():
        classify = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tokenizer)
        return [
            {entry["label"]: entry["score"] for entry in classify(text, top_k=7) if entry["label"] not in NEW}
            for text in TEXTS
        ]

    before = scores()
    fit_new_labels(model, tokenizer, DOCUMENTS)
    assert scores() == before


def test_the_fit_minimizes_the_documented_loss():
    model, tokenizer = with_new_labels(token_attention=False), tiny_tokenizer()
    start, bias = model.added.weights.detach().clone(), model.added.bias.detach().clone()
    others = ["a robot in space", "code for the web"]
    fit_new_labels(model, tokenizer, DOCUMENTS, others)
    texts = [document["text"] for document in DOCUMENTS] + others
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0]])
    with torch.no_grad():
        embeds = torch.cat([model.encode(**tokenizer([text], return_tensors="pt"))[0] for text in texts])
    directions = torch.nn.functional.normalize(embeds, dim=-1)
    for label in range(2):
        weights = model.added.weights[label].detach().clone().requires_grad_()
        counts = torch.where(targets[:, label] > 0, 1.0, 2 * 9 / 5)
        terms = torch.nn.functional.binary_cross_entropy_with_logits(
            directions @ weights + bias[label], targets[:, label], weight=counts, reduction="sum"
        )
        (terms + 0.1 * (weights - start[label]).square().sum()).backward()
        assert weights.grad.abs().max() < 1e-3
    assert torch.equal(model.added.bias.detach(), bias)


def test_a_second_fit_starts_from_the_cosine_again():
    model, tokenizer = with_new_labels(lexical=True), tiny_tokenizer()
    fit_new_labels(model, tokenizer, DOCUMENTS)
    once = logits(model)
    fit_new_labels(model, tokenizer, DOCUMENTS)
    torch.testing.assert_close(logits(model), once, atol=1e-4, rtol=1e-4)


def test_labels_without_documents_keep_the_cosine_and_their_threshold():
    model, tokenizer = with_new_labels(thresholds=[0.3] * 5), tiny_tokenizer()
    model.config.thresholds[5:] = [0.7, 0.8]
    before = logits(model)
    assert fit_new_labels(model, tokenizer, DOCUMENTS[2:]) == {"markets": 2}
    assert torch.equal(logits(model)[:, :6], before[:, :6]) and not torch.equal(logits(model)[:, 6], before[:, 6])
    assert model.config.thresholds == [0.3] * 5 + [0.7, 0.3]


def test_fitting_reads_a_dataset_and_keeps_the_mode_of_the_model():
    model, tokenizer = with_new_labels().train(), tiny_tokenizer()
    assert fit_new_labels(model, tokenizer, Dataset.from_list(DOCUMENTS)) == {"cells": 2, "markets": 2}
    assert model.training


@pytest.mark.parametrize("lexical", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 6, 7, 100])
def test_the_best_labels_are_found_in_chunks(chunk_size, lexical):
    model, tokenizer = with_new_labels(lexical=lexical), tiny_tokenizer()
    fit_new_labels(model, tokenizer, DOCUMENTS)
    scores, indices = model.predict_top_k(**inputs(), k=7, chunk_size=chunk_size)
    expected = logits(model)
    torch.testing.assert_close(scores, expected.topk(7).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(expected.gather(1, indices), scores, atol=1e-4, rtol=1e-4)


def test_added_labels_are_removed_in_any_combination():
    model, tokenizer = with_new_labels(), tiny_tokenizer()
    fit_new_labels(model, tokenizer, DOCUMENTS)
    expected = logits(model)
    one = copy.deepcopy(model)
    one.remove_labels(["label 2", "cells"])
    assert one.config.num_added_labels == len(one.added) == 1
    torch.testing.assert_close(logits(one)[:, 4], expected[:, 6], atol=1e-5, rtol=1e-5)
    none = copy.deepcopy(model)
    none.remove_labels(list(NEW))
    assert none.config.num_added_labels == 0 and none.added is None
    only = copy.deepcopy(model)
    only.remove_labels([f"label {index}" for index in range(5)])
    torch.testing.assert_close(logits(only), expected[:, 5:], atol=1e-5, rtol=1e-5)
    assert only.predict_top_k(**inputs(), k=2)[0].isfinite().all()
    only.add_labels({"stars": "star galaxy"}, tokenizer)
    assert logits(only).isfinite().all() and only.config.num_added_labels == 3


def test_labels_are_added_in_several_steps():
    model, tokenizer = with_new_labels(), tiny_tokenizer()
    fit_new_labels(model, tokenizer, DOCUMENTS)
    before = logits(model)
    model.add_labels({"robots": "robot speech"}, tokenizer)
    torch.testing.assert_close(logits(model)[:, :7], before, atol=1e-5, rtol=1e-5)
    assert model.config.num_added_labels == 3 and len(model.added) == 3


def test_a_model_with_added_labels_can_be_trained():
    model = with_new_labels().train()
    before = {name: value.clone() for name, value in model.added.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs(), labels=torch.ones(6, 7)).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.added.named_parameters())


def test_a_chunk_replaces_the_last_columns_only():
    layer = AddedLabelScores(3, 4)
    with torch.no_grad():
        layer.weights.normal_()
    embeds, scores = torch.randn(2, 4), torch.randn(2, 5)
    found = layer(scores, embeds, slice(1, 3))
    directions = torch.nn.functional.normalize(embeds, dim=-1)
    assert torch.equal(found[:, :3], scores[:, :3])
    torch.testing.assert_close(found[:, 3:], directions @ layer.weights[1:].t())


# ---- Bad input ----


@pytest.mark.parametrize(
    ("documents", "others", "message"),
    [
        ([{"text": "cells", "labels": ["planets"]}], [], "has the label 'planets'"),
        ([{"text": "cells", "labels": "cells"}], [], "a list of label names"),
        ([{"text": " ", "labels": ["cells"]}], [], "a text and a list"),
        (["cells"], [], "a text and a list"),
        ([{"text": "cells", "labels": ["label 1"]}], [], "None of the 1 documents has one of the 2 added labels"),
        ([], [], "None of the 0 documents"),
        (DOCUMENTS, "one text", "a list of texts is needed"),
        (DOCUMENTS, [3], "a list of texts is needed"),
    ],
)
def test_a_bad_fit_is_explained_and_leaves_the_model_unchanged(documents, others, message):
    model = with_new_labels()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        fit_new_labels(model, tiny_tokenizer(), documents, others)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters()))


def test_a_model_without_added_labels_is_refused():
    with pytest.raises(ValueError, match="no added labels"):
        fit_new_labels(tiny_model(), tiny_tokenizer(), DOCUMENTS)


@pytest.mark.parametrize("documents", ["a text", [], [3]])
def test_documents_for_the_calibration_must_be_texts(documents):
    model = tiny_model()
    with pytest.raises(ValueError, match="a list of texts is needed"):
        model.add_labels({"cells": None}, tiny_tokenizer(), documents=documents)
    assert model.config.num_added_labels == 0


def test_a_damaged_number_of_added_labels_is_refused():
    with pytest.raises(ValueError, match="num_added_labels"):
        tiny_model(num_added_labels=6)
    with pytest.raises(ValueError, match="cosine_calibration"):
        tiny_model(cosine_calibration={"scale": -1.0, "bias": 0.0})


def test_a_student_starts_with_the_added_labels_of_its_teacher():
    from trainer.distillation import document_embeddings, new_student

    teacher, tokenizer = with_new_labels(token_attention=False), tiny_tokenizer()
    fit_new_labels(teacher, tokenizer, DOCUMENTS)
    documents = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in TEXTS]})
    embeds = document_embeddings(teacher, tokenizer, documents, hide_progress=True)
    student = new_student(teacher, tokenizer, documents["input_ids"], embeds, hide_progress=True)
    with torch.no_grad():
        expected, found = (model.score_documents(embeds.float())[0] for model in (teacher, student))
    torch.testing.assert_close(found[:, 5:], expected[:, 5:], atol=1e-4, rtol=1e-4)
    assert torch.equal(student.added.prior, teacher.added.prior)
