"""Explanations: words and parts of logits against slow references that read one document at a time."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import BertTokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline
from modeling_sep_mldc.explanation_sep_mldc import _without, explain_window, words_of_tokens


pytestmark = pytest.mark.numeric

PARTS = ("bias", "lexical", "encoder", "remainder")
LONG = "the robot reads images of a galaxy and a star, models search the graph "


def with_lexical_scores(**config):
    """A model with random lexical scores, pairs of tokens among them."""
    model = tiny_model(num_labels=4, num_lexical_features=6, num_lexical_bigrams=50, **config)
    lexical, generator = model.lexical, torch.Generator().manual_seed(0)
    lexical.idf.copy_(1 + torch.rand(lexical.idf.shape, generator=generator))
    lexical.idf[:5] = 0.0  # special tokens
    lexical.feature_ids.copy_(torch.randint(0, len(lexical.idf), lexical.feature_ids.shape, generator=generator))
    lexical.feature_weights.copy_(torch.randn(lexical.feature_weights.shape, generator=generator))
    lexical.scale.fill_(2.0)
    lexical.lift.copy_(torch.arange(4.0))
    return model


def make_pipe(model, **arguments):
    return MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer(), **arguments)


@torch.no_grad()
def logits_of(model, text, lexical=True):
    encoded = tiny_tokenizer()(text, return_tensors="pt")
    kept, model.lexical = model.lexical, model.lexical if lexical else None
    try:
        return model(**encoded).logits[0]
    finally:
        model.lexical = kept


def test_an_effect_of_a_word_is_the_difference_to_the_text_without_it():
    model = with_lexical_scores(score_calibration={"scale": 0.7, "bias": 0.2})
    words = "the robot reads images".split()
    answer = make_pipe(model)(" ".join(words), top_k=4, return_explanation=True, explanation_size=10)
    full, bare = logits_of(model, " ".join(words)), logits_of(model, " ".join(words), lexical=False)
    for label, found in answer["explanations"].items():
        index = model.config.label2id[label]
        assert found["words_per_group"] == 1 and found["logit"] == pytest.approx(full[index].item(), abs=1e-5)
        assert found["bias"] == pytest.approx(logits_of(model, "")[index].item(), abs=1e-5)
        by_word = {word["word"]: word for word in found["words"]}
        for position, word in enumerate(words):
            rest = logits_of(model, " ".join(words[:position] + words[position + 1 :]), lexical=False)
            assert by_word[word]["encoder"] == pytest.approx((bare - rest)[index].item(), abs=1e-5)
        lexical = full[index] - bare[index] - (logits_of(model, "") - logits_of(model, "", lexical=False))[index]
        assert sum(word["lexical"] for word in found["words"]) == pytest.approx(lexical.item(), abs=1e-5)


@pytest.mark.parametrize("merge", ["max", "mean", "attention", "first"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_the_parts_add_up_to_the_logit_of_every_label_whatever_the_windows_and_the_budget(merge, budget):
    model = with_lexical_scores(encoder_max_length=30)
    pipe = make_pipe(model, top_k=4, max_length=40, window_merge=merge, explanation_budget=budget)
    answer = pipe(LONG * 6, return_explanation=True, explanation_size=1000)
    assert len(answer["explanations"]) == 4
    for label, score in ((entry["label"], entry["score"]) for entry in answer["labels"]):
        found = answer["explanations"][label]
        assert sum(found[part] for part in PARTS) == pytest.approx(found["logit"], abs=1e-4)
        for part in ("lexical", "encoder"):
            assert sum(word[part] for word in found["words"]) == pytest.approx(found[part], abs=1e-4)
        if merge in ("max", "first"):
            assert torch.tensor(found["logit"]).sigmoid().item() == pytest.approx(score, abs=1e-5)
        assert (found["words_per_group"] > 1) == (budget == 1)
        shares = [token["score"] for token in answer["tokens"][label]]
        total = sum(abs(word["score"]) for word in found["words"])
        assert shares == pytest.approx([word["score"] / total for word in found["words"]])


def test_words_of_a_group_share_the_effect_of_the_group():
    model = tiny_model(num_labels=3)
    words = "the robot reads images".split()
    (found,) = make_pipe(model, explanation_budget=1, top_k=1)(
        " ".join(words * 2), return_explanation=True, explanation_size=10
    )["explanations"].values()
    index = int(logits_of(model, " ".join(words * 2)).argmax())
    assert found["words_per_group"] == 2  # four groups at least
    scores = [word["encoder"] for word in sorted(found["words"], key=lambda word: word["start"])]
    sizes = [len(tiny_tokenizer()(word, add_special_tokens=False)["input_ids"]) for word in words * 2]
    without_first = logits_of(model, " ".join((words * 2)[2:]))
    effect = (logits_of(model, " ".join(words * 2)) - without_first)[index].item()
    assert scores[:2] == pytest.approx([effect * size / sum(sizes[:2]) for size in sizes[:2]], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('A "state-of-the-art", model (v2).', ["A", "state-of-the-art", "model", "v2"]),
        ("robots -- and stars!", ["robots", "--", "and", "stars"]),
        ("  images\n\tof x_1  ", ["images", "of", "x_1"]),
    ],
)
def test_words_are_whole_and_without_punctuation_at_their_ends(text, words):
    encoded = tiny_tokenizer()(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    spans, owners = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
    assert [text[start:end] for start, end in spans] == words
    assert owners[0] == owners[-1] == -1 and sorted(set(owners[1:-1])) == list(range(len(words)))


def test_in_scripts_without_spaces_a_word_is_a_token():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"日本語文書", "star"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})
    text = "日本語 star 文書"
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    spans, _ = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
    assert [text[start:end] for start, end in spans] == ["日", "本", "語", "star", "文", "書"]


def test_copies_lose_their_words_and_nothing_else():
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    left_out = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = _without(inputs, left_out, pad_token_id=1)
    assert found["input_ids"].tolist() == [[2, 8, 3, 1, 1], [2, 7, 8, 9, 3], [1, 1, 1, 1, 1]]
    assert found["attention_mask"].sum(dim=1).tolist() == [3, 5, 1], "an empty text has a token to attend to"


def test_one_pass_over_the_copies_serves_all_labels():
    model = tiny_model(num_labels=4)
    sizes = []
    handle = model.register_forward_hook(
        lambda _, args, kwargs, __: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        make_pipe(model, top_k=4)("the robot reads images", return_explanation=True)
    finally:
        handle.remove()
    # The text; the text and none of it; the text and four copies.
    assert sizes == [1, 2, 5]


def test_a_text_without_words_has_the_bias_only():
    model = tiny_model(num_labels=2)
    inputs = {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    found = explain_window(model, inputs, [-1, -1], [0, 1], 4, 1)
    assert found.encoder.shape == (0, 2)
    # Two equal rows of a batch may differ in the last bit.
    torch.testing.assert_close(found.logit, found.bias, rtol=0, atol=1e-6)
    assert found.remainder.abs().max() < 1e-6
