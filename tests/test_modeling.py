"""The model against slow references of the paper's equations, for every kind of encoder, classifier, loss and pooling."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import HIDDEN_SIZE, KINDS, tiny_backbone, tiny_batch, tiny_candidates, tiny_model, tiny_tokenizer
from transformers import AutoModel
from transformers.utils.generic import find_labels

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification, SepMldcOutput
from modeling_sep_mldc.label_texts_sep_mldc import pad_label_inputs, tokenize_label_texts
from modeling_sep_mldc.modeling_sep_mldc import multi_label_loss


pytestmark = pytest.mark.numeric

CLASSIFIERS = ("mlp", "similarity", "mlp+similarity")
LABELS = ["cs.IR", "cs.CL", "math.CO"]
DESCRIPTIONS = {"cs.IR": "search engines and ranking", "math.CO": "graphs"}


def parameters_without_gradient(model):
    # A key's bias moves all scores of a query alike, which the softmax takes out again: its gradient is rounding noise.
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (
            parameter.grad is None
            or not parameter.grad.isfinite().all()
            or not (parameter.grad.any() or name.endswith(("key.bias", "k_lin.bias", "attn.k.bias")))
        )
    ]


# --- encoders


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient_with_any_encoder(kind):
    model = tiny_model(kind=kind, hidden_dropout=0.1, attention_dropout=0.1, classifier="mlp+similarity").train()
    out = model(**tiny_batch(), **tiny_candidates(model, [3, 0]))
    out.loss.backward()
    assert isinstance(out, SepMldcOutput)
    assert out.logits.shape == out.label_attention.shape == (4, 5)
    assert out.document_embeds.shape == (4, HIDDEN_SIZE) and out.label_embeds.shape == (5, HIDDEN_SIZE)
    assert parameters_without_gradient(model) == []
    assert model.label_embeddings.grad is None
    assert not any("pooler" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_from_backbone_takes_over_the_encoder_and_encodes_the_label_texts_with_it(tmp_path, kind):
    folder = tiny_backbone(tmp_path / "encoder", kind)
    model = SepMldcForMultiLabelClassification.from_backbone(
        folder, tiny_tokenizer(), labels=LABELS, label_descriptions=DESCRIPTIONS
    )
    encoder = AutoModel.from_pretrained(folder).eval()
    theirs, ours = encoder.state_dict(), model.backbone.state_dict()
    assert {name.split(".")[0] for name in theirs.keys() - ours.keys()} <= {"pooler"}
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    for row, text in zip(
        model.label_embeddings, ["cs.IR: search engines and ranking", "cs.CL", "math.CO: graphs"], strict=True
    ):
        states = encoder(**tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        torch.testing.assert_close(row, states[0].mean(dim=0), atol=1e-5, rtol=1e-4)
    assert not model.training and not model.label_embeddings.requires_grad
    assert model.config.id2label == {0: "cs.IR", 1: "cs.CL", 2: "math.CO"}
    assert model.config.label2id == {"cs.IR": 0, "cs.CL": 1, "math.CO": 2}
    assert str(tmp_path) not in model.config.to_json_string()


def test_the_encoder_has_no_dropout_unless_requested(tmp_path):
    folder = tiny_backbone(tmp_path)
    AutoModel.from_pretrained(folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).save_pretrained(
        folder
    )

    def dropouts(**arguments):
        model = SepMldcForMultiLabelClassification.from_backbone(folder, tiny_tokenizer(), LABELS, **arguments)
        return {module.p for module in model.backbone.modules() if isinstance(module, torch.nn.Dropout)}

    assert dropouts() == {0.0} and dropouts(backbone_dropout=0.3) == {0.3} and dropouts(backbone_dropout=None) == {0.2}
    assert dropouts(backbone_kwargs={"hidden_dropout_prob": 0.1}) == {0.0, 0.1}
    with pytest.raises(ValueError, match="`backbone_dropout` is 1, but"):
        dropouts(backbone_dropout=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"clasifier_dropout": 0.3}, "`clasifier_dropout` is neither .*Did you mean `classifier_dropout`?"),
        ({"lexical_scores": True}, "`lexical_scores` is neither an argument of `from_backbone` nor a field"),
    ],
)
def test_from_backbone_refuses_unknown_arguments(tmp_path, arguments, message):
    with pytest.raises(TypeError, match=message):
        SepMldcForMultiLabelClassification.from_backbone(tmp_path, tiny_tokenizer(), LABELS, **arguments)


def test_an_encoder_stored_in_half_precision_is_trained_in_float32(tmp_path):
    folder = tiny_backbone(tmp_path)
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    model = SepMldcForMultiLabelClassification.from_backbone(folder, tiny_tokenizer(), labels=LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_label_texts_are_cut_after_max_label_length_tokens(tmp_path):
    folder = tiny_backbone(tmp_path)
    long, short = (
        SepMldcForMultiLabelClassification.from_backbone(
            folder, tiny_tokenizer(), ["a"], {"a": "graph " * n}, max_label_length=8
        ).label_embeddings
        for n in (60, 5)
    )
    # Eight tokens: [CLS] a : graph graph graph graph [SEP].
    torch.testing.assert_close(long, short)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_no_embedding(kind, pooling):
    model = tiny_model(kind=kind, pooling=pooling)
    batch = tiny_batch()
    together = model(**batch).document_embeds
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        alone = model(input_ids=ids[mask.bool()].unsqueeze(0)).document_embeds
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)


def test_mean_pooling_is_the_mean_over_attended_tokens_and_cls_pooling_is_the_first_state():
    batch = tiny_batch()
    mean, cls = tiny_model(pooling="mean"), tiny_model(pooling="cls")
    states = mean.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    for row, mask in enumerate(batch["attention_mask"].tolist()):
        attended = [states[row, position] for position, on in enumerate(mask) if on]
        torch.testing.assert_close(mean(**batch).document_embeds[row], sum(attended) / len(attended))
    torch.testing.assert_close(cls(**batch).document_embeds, states[:, 0])


def test_a_document_whose_tokens_are_all_masked_gives_finite_scores():
    batch = tiny_batch()
    batch["attention_mask"][1] = 0
    assert tiny_model()(**batch).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_token_type_ids_reach_only_encoders_that_know_segments(kind):
    model, batch = tiny_model(kind=kind), tiny_batch()
    plain = model(**batch).logits
    with_segments = model(**batch, token_type_ids=batch["attention_mask"]).logits
    assert torch.allclose(plain, with_segments, atol=1e-5) == (kind not in ("bert", "electra"))


def test_embedded_inputs_score_like_their_token_ids():
    model, batch = tiny_model(), tiny_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(by_embeds.logits, model(**batch).logits)


def test_hidden_states_and_attentions_of_the_encoder_are_returned_on_request():
    model, batch = tiny_model(attn_implementation="eager"), tiny_batch()
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [len(out.hidden_states), len(out.attentions)] == [3, 2]
    assert out.hidden_states[-1].shape == (4, 12, HIDDEN_SIZE) and out.attentions[0].shape == (4, 2, 12, 12)
    assert model(**batch).hidden_states is None and model(**batch).attentions is None


def test_return_dict_false_gives_loss_and_logits_first():
    model, batch = tiny_model(), tiny_batch()
    loss, logits = model(**batch, return_dict=False)[:2]
    expected = model(**batch)
    torch.testing.assert_close((loss, logits), (expected.loss, expected.logits))


# --- label-guided feature selection and classifiers (Eq. 16-18)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def slow_label_attention(document, rows):
    """Eq. 16-17 for one document: α over the labels, and the labels' weighted sum."""
    exponents = [math.exp(dot(document, row)) for row in rows]
    attention = [value / sum(exponents) for value in exponents]
    mix = [sum(weight * row[k] for weight, row in zip(attention, rows)) for k in range(len(document))]
    return attention, mix


def affine(layer, x):
    biases = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), biases)]


def slow_logits(classifier, features, rows):
    logits = classifier.bias.tolist()
    if hasattr(classifier, "dense"):
        hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in affine(classifier.dense, features)]
        logits = [z + y for z, y in zip(logits, affine(classifier.out_proj, hidden))]
    if hasattr(classifier, "similarity_proj"):
        query = affine(classifier.similarity_proj, features)
        cosines = [dot(query, row) / math.sqrt(dot(query, query) * dot(row, row)) for row in rows]
        logits = [z + classifier.similarity_scale.item() * cosine for z, cosine in zip(logits, cosines)]
    return logits


@pytest.mark.parametrize("label_attention", [True, False])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_logits_equal_a_loop_over_documents_and_labels(kind, label_attention):
    model = tiny_model(
        classifier=kind, label_attention=label_attention, classifier_hidden_size=7, similarity_scale_init=3.0
    )
    torch.nn.init.normal_(model.classifier.bias)
    out = model(**tiny_batch())
    rows = model.label_embeddings.tolist()
    for row, document in enumerate(out.document_embeds.tolist()):
        features = document
        if label_attention:
            attention, mix = slow_label_attention(document, rows)
            features = mix + document
            torch.testing.assert_close(out.label_attention[row], torch.tensor(attention), atol=1e-5, rtol=1e-4)
        expected = torch.tensor(slow_logits(model.classifier, features, rows))
        torch.testing.assert_close(out.logits[row], expected, atol=1e-4, rtol=1e-4)
    if not label_attention:
        assert out.label_attention is None


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_only_a_classifier_with_mlp_has_a_weight_row_for_each_label(kind):
    shapes = [tuple(p.shape) for p in tiny_model(num_labels=77, classifier=kind).classifier.parameters()]
    assert ((77, HIDDEN_SIZE) in shapes) == ("mlp" in kind)
    assert (77,) in shapes


def test_without_label_attention_and_similarity_the_stored_embeddings_play_no_part():
    model, batch = tiny_model(label_attention=False), tiny_batch()
    before = model(**batch).logits
    model.label_embeddings.data.normal_()
    torch.testing.assert_close(before, model(**batch).logits)
    assert not model.uses_label_embeds
    assert tiny_model().uses_label_embeds
    assert tiny_model(label_attention=False, classifier="similarity").uses_label_embeds


def test_the_classifier_drops_features_in_training_only():
    model, batch = tiny_model(classifier_dropout=0.5), tiny_batch()
    torch.testing.assert_close(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.allclose(model(**batch).logits, model(**batch).logits, atol=1e-2)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_stored_embeddings_that_are_still_zero_give_finite_scores_and_gradients(kind):
    model = tiny_model(classifier=kind)
    model.set_label_embeddings(torch.zeros(5, HIDDEN_SIZE))
    model(**tiny_batch()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- losses


def slow_loss(logits, labels, kind):
    total = 0.0
    for scores, targets in zip(logits.double().tolist(), labels.tolist()):
        normalizer = math.log(sum(math.exp(z) for z in scores))
        negatives = sum(math.exp(z) for z, y in zip(scores, targets) if not y)
        for z, y in zip(scores, targets):
            probability = 1 / (1 + math.exp(-z))
            if "bce" in kind:
                total -= math.log(probability if y else 1 - probability)
            if "softmax" in kind.split("+") and y:
                total -= z - normalizer
            if "decoupled_softmax" in kind and y:
                total += math.log(math.exp(z) + negatives) - z
    return total / len(logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bce", "softmax", "bce+softmax", "decoupled_softmax", "bce+decoupled_softmax"])
def test_loss_equals_a_loop_over_documents_and_labels_for_any_label_dtype(kind, dtype):
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    labels = tiny_batch(6, 9)["labels"]
    labels[2] = 0  # A document without labels.
    expected = slow_loss(logits, labels, kind)
    assert multi_label_loss(logits, labels.to(dtype), kind).item() == pytest.approx(expected, rel=1e-5)
    batch, model = tiny_batch(), tiny_model(classification_loss=kind)
    out = model(**{**batch, "labels": batch["labels"].to(dtype)})
    assert out.loss.item() == pytest.approx(slow_loss(out.logits, batch["labels"], kind), rel=1e-5)


def test_loss_of_half_precision_logits_is_computed_in_float32():
    logits, labels = (10 * torch.randn(4, 500)).to(torch.bfloat16), torch.rand(4, 500) < 0.1
    loss = multi_label_loss(logits, labels, "bce+softmax")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(multi_label_loss(logits.double(), labels, "bce+softmax").item(), rel=1e-5)


def test_without_labels_there_is_no_loss():
    batch = tiny_batch()
    del batch["labels"]
    assert tiny_model()(**batch).loss is None


# --- the start of the output bias


def test_similarity_logits_start_from_the_cosines_of_documents_and_label_texts(tmp_path):
    folder, tokenizer = tiny_backbone(tmp_path), tiny_tokenizer()
    for attention in (False, True):
        model = SepMldcForMultiLabelClassification.from_backbone(
            folder, tokenizer, LABELS, classifier="similarity", label_attention=attention, token_attention=False
        )
        labels = F.normalize(model.label_embeddings, dim=-1)
        common = F.normalize(labels.mean(0), dim=0)
        batch = tokenizer(["graph search", "a proof of the theorem"], padding=True, return_tensors="pt")
        embeds = model.encode(**batch)[0]
        cosines = F.normalize(embeds - (embeds @ common)[:, None] * common, dim=-1) @ labels.t()
        scale = model.config.similarity_scale_init
        torch.testing.assert_close(model(**batch).logits, scale * cosines, atol=1e-4, rtol=1e-4)
        # The direction that all label texts share is taken out, so that logits start around the bias.
        torch.testing.assert_close(model(**batch).logits.mean(1), torch.zeros(2), atol=1e-4, rtol=0)


def test_prior_bias_starts_at_the_log_odds_and_shrinks_the_output_weights(tmp_path):
    folder, frequencies = tiny_backbone(tmp_path), [0.5, 0.01, 0.2]
    models = []
    for bias_init in ("zero", "prior"):
        torch.manual_seed(3)
        models.append(
            SepMldcForMultiLabelClassification.from_backbone(
                folder, tiny_tokenizer(), LABELS, label_frequencies=frequencies, classifier_bias_init=bias_init
            )
        )
    zero, prior = (model.classifier for model in models)
    torch.testing.assert_close(prior.bias.tolist(), [math.log(p / (1 - p)) for p in frequencies], atol=1e-5, rtol=1e-5)
    assert not zero.bias.any()
    torch.testing.assert_close(prior.out_proj.weight, 0.1 * zero.out_proj.weight)
    torch.testing.assert_close(prior.dense.weight, zero.dense.weight)


def test_labels_that_no_document_or_every_document_has_get_a_finite_prior_bias():
    model = tiny_model(num_labels=2, classifier="similarity")
    model.init_prior_bias(torch.tensor([0.0, 1.0]))
    assert model.classifier.bias.isfinite().all()
    assert model.classifier.bias[0] < -10 < 10 < model.classifier.bias[1]


# --- label texts


def test_a_label_text_is_label_colon_description_or_the_bare_name():
    config = SepMldcConfig(id2label=dict(enumerate(LABELS)), label_descriptions={**DESCRIPTIONS, "cs.CL": ""})
    assert config.label_texts == ["cs.IR: search engines and ranking", "cs.CL", "math.CO: graphs"]
    assert SepMldcConfig(id2label={0: "a"}).label_texts == ["a"]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_labels_encoded_in_chunks_equal_labels_encoded_one_by_one(batch_size):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = [" ".join(["graph", "image", "star"][: 1 + i % 3]) + " of data" * (i * 5 % 11) for i in range(9)]
    done = []
    rows = model.encode_labels(tokenize_label_texts(tokenizer, texts), batch_size=batch_size, progress=done.append)
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(
            row, model.encode(**tokenizer(text, return_tensors="pt"))[0][0], atol=1e-5, rtol=1e-4
        )
    assert sum(done) == 9 and max(done) == min(batch_size, 9)
    assert not rows.requires_grad


def test_encoding_labels_uses_no_dropout_and_leaves_training_mode_unchanged():
    model = tiny_model(hidden_dropout=0.5, attention_dropout=0.5)
    inputs = tokenize_label_texts(tiny_tokenizer(), ["graph", "image data"])
    expected = model.encode_labels(inputs)
    model.train()
    torch.testing.assert_close(model.encode_labels(inputs), expected)
    assert model.training
    with pytest.raises(IndexError):
        model.encode_labels({"input_ids": [[10_000]], "pad_token_id": 1})
    assert model.training


def test_label_inputs_are_padded_to_a_multiple_of_eight_with_a_mask():
    inputs = tokenize_label_texts(tiny_tokenizer(), ["graph", "the graph of images and of vision models", "data"])
    batch = pad_label_inputs(inputs, [1, 2])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(inputs["input_ids"][i]) for i in (1, 2)]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tiny_tokenizer().pad_token_id).all()


def test_storing_some_rows_leaves_the_others():
    model = tiny_model()
    before = model.label_embeddings.clone()
    model.set_label_embeddings(torch.ones(2, HIDDEN_SIZE, dtype=torch.bfloat16), torch.tensor([4, 1]))
    assert torch.equal(model.label_embeddings[[4, 1]], torch.ones(2, HIDDEN_SIZE))
    assert torch.equal(model.label_embeddings[[0, 2, 3]], before[[0, 2, 3]])


def test_counts_may_be_given_by_name_and_as_numbers_of_numpy(tmp_path):
    folder, counts = tiny_backbone(tmp_path), {"b": np.int64(2), "a": np.int64(1)}
    model = SepMldcForMultiLabelClassification.from_backbone(
        folder,
        tiny_tokenizer(),
        ["a", "b", "c"],
        label_descriptions={"a": "first", "b": None},
        label_counts=counts,
        num_train_documents=np.int64(3),
        thresholds=np.array([0.25, 0.5, 0.75]),
    )
    assert model.config.label_counts == [1, 2, 0] and model.config.num_train_documents == 3
    assert model.config.thresholds == [0.25, 0.5, 0.75]
    assert model.config.label_texts == ["a: first", "b", "c"]


def test_an_encoder_is_given_by_name(tmp_path):
    encoder = AutoModel.from_pretrained(tiny_backbone(tmp_path))
    with pytest.raises(ValueError, match="`backbone` is a BertModel, but the name or folder"):
        SepMldcForMultiLabelClassification.from_backbone(encoder, tiny_tokenizer(), ["a"])


# --- the interface


def test_no_forward_argument_but_labels_looks_like_a_target_to_transformers():
    assert find_labels(SepMldcForMultiLabelClassification) == ["labels"]
    names = inspect.signature(SepMldcForMultiLabelClassification.forward).parameters
    assert [name for name in names if "label" in name] == ["labels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, r"`labels` is \[\], but a list of label names is needed"),
        ({"labels": "stars"}, "`labels` is 'stars', but a list of label names is needed"),
        ({"labels": {"stars"}}, "`labels` is {'stars'}, but a list of label names is needed"),
        ({"labels": ["fore\u0302t", "for\u00eat"]}, "more than once.*Rename or merge"),
        ({"labels": ["a", "b", "a"]}, "'a' more than once.*Rename or merge"),
        ({"labels": ["a", "b"], "label_descriptions": {"c": "graphs"}}, "'c', which is not among the 2 labels"),
        ({"labels": ["a", "b"], "thresholds": [0.5]}, "`thresholds` has 1 values for 2 labels"),
        ({"labels": ["a"], "classifier_bias_init": "prior"}, "needs `label_frequencies`"),
        (
            {"labels": ["a"], "classifier_bias_init": "prior", "label_frequencies": [0.1, 0.2]},
            r"shape \(2,\), but there are 1 labels",
        ),
        (
            {"labels": ["a"], "label_frequencies": [1.5]},
            "`label_frequencies` contains 1.5, but it is the share .* from 0 to 1",
        ),
        ({"labels": [1, 2]}, "`labels` contains 1, but label names are strings"),
        ({"labels": ["a"], "problem_type": "regression"}, "`problem_type` is 'regression'"),
    ],
)
def test_a_model_that_cannot_be_made_says_why_in_one_sentence(tmp_path, arguments, message):
    folder = tiny_backbone(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        SepMldcForMultiLabelClassification.from_backbone(folder, tiny_tokenizer(), **arguments)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_does_not_fit_the_encoder_is_refused(tmp_path):
    folder, tokenizer = tiny_backbone(tmp_path), tiny_tokenizer()
    with pytest.raises(ValueError, match="`tokenizer` is None, but a tokenizer is needed"):
        SepMldcForMultiLabelClassification.from_backbone(folder, None, LABELS)
    encoder = AutoModel.from_pretrained(folder)
    tokenizer.add_tokens(["robotics", "stellar"])
    with pytest.raises(ValueError, match=f"token ids up to {len(tokenizer) - 1}, but the encoder has embeddings for"):
        SepMldcForMultiLabelClassification.from_backbone(folder, tokenizer, LABELS)
    encoder.resize_token_embeddings(len(tokenizer))
    encoder.save_pretrained(tmp_path / "resized")
    model = SepMldcForMultiLabelClassification.from_backbone(str(tmp_path / "resized"), tokenizer, ["robotics"])
    assert model(**tokenizer("stellar", return_tensors="pt")).logits.isfinite().all()


def test_a_trained_model_is_not_taken_for_an_encoder_nor_an_encoder_for_a_trained_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="is a trained SEP-MLDC model, but an encoder is needed"):
        SepMldcForMultiLabelClassification.from_backbone(str(tmp_path / "trained"), tiny_tokenizer(), LABELS)
    encoder = tiny_backbone(tmp_path / "encoder")
    for loaded in (SepMldcForMultiLabelClassification, SepMldcConfig):
        with pytest.raises(
            ValueError, match="has model_type 'bert'.*use `SepMldcForMultiLabelClassification.from_backbone`"
        ):
            loaded.from_pretrained(encoder)


def test_a_forward_pass_without_texts_is_refused():
    with pytest.raises(ValueError, match="Neither `input_ids` nor `inputs_embeds` is given"):
        tiny_model()()


@pytest.mark.parametrize(
    ("field", "value"),
    [("pooling", "max"), ("classification_loss", "focal"), ("classifier", "linear"), ("classifier_bias_init", "one")],
)
def test_a_choice_that_does_not_exist_is_refused_with_the_choices_that_do(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{field}' expected one of .*got {value}"):
        SepMldcConfig(num_labels=2, **{field: value})


@pytest.mark.parametrize("columns", [1, 4, 6])
def test_labels_with_another_number_of_columns_than_labels_are_refused(columns):
    batch = tiny_batch()
    batch["labels"] = torch.ones(4, columns)
    with pytest.raises(ValueError, match=f"`labels` has {columns} columns, but the model has 5 labels"):
        tiny_model()(**batch)


def test_an_unknown_encoder_type_or_one_that_is_not_a_single_encoder_is_refused():
    with pytest.raises(ValueError, match="model_type 'brt', which transformers does not know"):
        SepMldcConfig(backbone_config={"model_type": "brt"}, num_labels=2)
    with pytest.raises(ValueError, match="model_type 'funnel', for which `AutoModel` has no single model"):
        SepMldcForMultiLabelClassification(SepMldcConfig(backbone_config={"model_type": "funnel"}, num_labels=2))


def test_a_configuration_without_labels_makes_no_model():
    with pytest.raises(ValueError, match="no labels"):
        tiny_model(num_labels=0)
