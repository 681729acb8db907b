"""Encoders of every family: what a document scores depends on neither its batch nor the side of the padding."""

import pytest
import torch
from tiny_models import (
    FAMILIES,
    MAX_LENGTH,
    tiny_backbone,
    tiny_backbone_config,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)
from transformers import CONFIG_MAPPING, BertTokenizer

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from modeling_sep_mldc.encoder_sep_mldc import num_positions, padding_last, set_padding_token
from modeling_sep_mldc.label_texts_sep_mldc import pad_label_inputs, tokenize_label_texts


# Families that state no limit: positions are relative.
UNLIMITED = ("xlnet", "t5")


def documents(**kwargs):
    return {name: value for name, value in tiny_batch(**kwargs).items() if name != "labels"}


def padded_left(batch):
    """The same documents with their padding on the left."""
    moved = {name: value.clone() for name, value in batch.items()}
    for row, n in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for value in moved.values():
            value[row] = value[row].roll(value.shape[1] - n)
    return moved


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"pooling": "cls"}, {"encoder_max_length": 5}], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_document_scores_the_same_alone_and_padded_on_either_side(kind, settings):
    model = tiny_model(kind=kind, **settings)
    batch = documents()
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.isfinite(logits).all() and logits.std() > 1e-3
        assert_close(model(**padded_left(batch)).logits, logits)
        for row, n in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            alone = {name: value[row : row + 1, :n] for name, value in batch.items()}
            assert_close(model(**alone).logits[0], logits[row])
        assert_close(model(batch["input_ids"][:1]).logits, logits[:1])  # no mask: every token counts
        best, indices = model.predict_top_k(**padded_left(batch), k=2)
        assert_close(best, logits.gather(1, indices))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_trains_saves_and_loads(tmp_path, kind):
    model = tiny_model(kind=kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(
        name.startswith("backbone.") and "layer" in name or ".h." in name or ".block." in name for name in moved
    )
    model.eval().save_pretrained(tmp_path)
    loaded, report = SepMldcForMultiLabelClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert_close(loaded(**documents()).logits, model(**documents()).logits)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_runs_in_bfloat16_autocast(kind):
    model = tiny_model(kind=kind)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**documents()).logits
    torch.testing.assert_close(logits.float(), model(**documents()).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_starts_from_a_saved_encoder(tmp_path, kind):
    folder = tiny_backbone(tmp_path, kind)
    model = SepMldcForMultiLabelClassification.from_backbone(
        folder, tiny_tokenizer(), ["a", "b"], attn_implementation=None
    )
    texts = tokenize_label_texts(tiny_tokenizer(), ["a", "b"])
    assert_close(model.encode_labels(texts), model.label_embeddings.detach())
    batch = documents()
    encoder = type(model.backbone).from_pretrained(folder)
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    assert_close(model.encode(**batch)[0].detach(), (states * mask).sum(dim=1) / mask.sum(dim=1))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_reads_as_many_tokens_as_the_configuration_says(kind):
    model = tiny_model(kind=kind)
    limit = model.config.max_tokens()
    positions = num_positions(model.backbone)
    assert (positions is None) == (kind in UNLIMITED)
    assert limit == (512 if kind in UNLIMITED else positions)
    assert model.config.max_tokens(tiny_tokenizer()) == min(limit, MAX_LENGTH)
    assert SepMldcConfig(backbone_config=tiny_backbone_config(kind), encoder_max_length=7).max_tokens() == 7
    endless = tiny_tokenizer()
    endless.model_max_length = int(1e30)
    assert model.config.max_tokens(endless) == limit
    tokens = torch.full((1, limit), 9)
    with torch.no_grad():
        assert torch.isfinite(model(tokens, torch.ones_like(tokens)).logits).all()
        if limit < 512 and kind not in ("deberta", "deberta-v2", "modernbert", "qwen2", "llama"):
            longer = torch.full((1, limit + 1), 9)
            with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)):
                model(longer, torch.ones_like(longer))


def test_a_roberta_whose_padding_token_is_0_has_one_position_less():
    config = tiny_backbone_config("roberta", pad_token_id=0, max_position_embeddings=66)
    assert SepMldcConfig(backbone_config=config).max_tokens() == 65


def test_label_texts_are_padded_no_further_than_the_encoder_reads(tmp_path):
    folder = tiny_backbone(tmp_path, "bert", max_position_embeddings=13)
    model = SepMldcForMultiLabelClassification.from_backbone(folder, tiny_tokenizer(), ["graph network " * 20, "star"])
    inputs = tokenize_label_texts(tiny_tokenizer(), ["graph network " * 20], model.config.max_tokens(tiny_tokenizer()))
    assert pad_label_inputs(inputs, [0])["input_ids"].shape == (1, 13)
    model.add_labels({"robot " * 20: None}, tiny_tokenizer())
    assert torch.isfinite(model.label_embeddings).all()


@pytest.mark.parametrize("kind", ["bart", "vit", "fnet", "funnel"])
def test_models_that_are_not_text_encoders_are_refused_in_one_sentence(kind):
    with pytest.raises(ValueError, match=f"model_type '{kind}'.* Choose a text encoder such as BERT"):
        SepMldcForMultiLabelClassification(SepMldcConfig(backbone_config=CONFIG_MAPPING[kind]()))


def test_padding_is_moved_to_the_end_and_nothing_else_changes():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    ids = torch.arange(16).reshape(4, 4)
    moved_mask, moved, missing, embeds = padding_last(mask, ids, None, ids.unsqueeze(-1).expand(4, 4, 3))
    assert moved_mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert moved.tolist() == [[2, 3, 0, 1], [4, 5, 6, 7], [9, 10, 11, 8], [12, 13, 14, 15]]
    assert missing is None and torch.equal(embeds[..., 2], moved)


def test_embeddings_instead_of_tokens_give_the_same_scores_on_either_side():
    model, batch = tiny_model(), documents()
    for inputs in (batch, padded_left(batch)):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        assert_close(
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, model(**batch).logits
        )


@pytest.mark.parametrize(
    "stated, settings, expected",
    [
        (int(1e30), {}, 20),
        (512, {}, 20),
        (9, {}, 9),
        (512, {"encoder_max_length": 8}, 512),
        (int(1e30), {"encoder_max_length": 8}, 20),
    ],
)
def test_a_tokenizer_without_a_limit_or_with_a_larger_one_gets_that_of_the_encoder(
    tmp_path, stated, settings, expected
):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = stated
    folder = tiny_backbone(tmp_path, max_position_embeddings=20)
    SepMldcForMultiLabelClassification.from_backbone(folder, tokenizer, ["a", "b"], **settings)
    assert tokenizer.model_max_length == expected


def test_a_tokenizer_without_padding_token_gets_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    SepMldcForMultiLabelClassification.from_backbone(tiny_backbone(tmp_path), tokenizer, ["a", "b"])
    assert tokenizer.pad_token == "[SEP]"
    bare = BertTokenizer(
        vocab={"a": 0}, pad_token=None, sep_token=None, unk_token=None, cls_token=None, mask_token=None
    )
    with pytest.raises(ValueError, match="no padding token.*tokenizer.pad_token"):
        set_padding_token(bare)
