"""Explanations: words and parts of logits against slow references that read one document at a time."""

import pytest
import torch
from tiny_models import tiny_backbone_config, tiny_model, tiny_tokenizer
from transformers import BertTokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, explanation_sep_mldc
from modeling_sep_mldc.explanation_sep_mldc import explain_window, masked_copies, words_of_tokens


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


@pytest.fixture
def by_copies(monkeypatch):
    """No encoder takes weights of tokens."""
    monkeypatch.setattr(explanation_sep_mldc, "MOST_FADED_TOKENS", 0)


def encode(words):
    """Inputs, and the word of each token."""
    text = " ".join(words)
    encoded = tiny_tokenizer()(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    _, word_ids = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
    assert max(word_ids) == len(words) - 1
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: torch.tensor([encoded[name]]) for name in names if name in encoded}, word_ids


@torch.no_grad()
def logits_of(model, words, masked=(), lexical=True):
    """Logits (L,) of a text whose words at the positions `masked` are masked."""
    inputs, word_ids = encode(words)
    inputs["attention_mask"][0, [owner in masked for owner in word_ids]] = 0
    kept, model.lexical = model.lexical, model.lexical if lexical else None
    try:
        return model(**inputs).logits[0]
    finally:
        model.lexical = kept


def explained(model, words, labels, num_groups=1):
    """The parts of the words of a text that is too long for a copy for each word."""
    return explain_window(model, *encode(words), labels, num_groups, 1)


def test_a_copy_without_a_word_shows_its_effect(by_copies):
    model = with_lexical_scores(score_calibration={"scale": 0.7, "bias": 0.2})
    words = "the robot reads images".split()
    answer = make_pipe(model)(" ".join(words), top_k=4, return_explanation=True, explanation_size=10)
    full, bare = logits_of(model, words), logits_of(model, words, lexical=False)
    none, none_bare = logits_of(model, words, range(4)), logits_of(model, words, range(4), lexical=False)
    for label, found in answer["explanations"].items():
        index = model.config.label2id[label]
        assert found["words_per_group"] == 1 and found["logit"] == pytest.approx(full[index].item(), abs=1e-5)
        assert found["bias"] == pytest.approx(none[index].item(), abs=1e-5)
        by_word = {word["word"]: word for word in found["words"]}
        for position, word in enumerate(words):
            rest = logits_of(model, words, [position], lexical=False)
            assert by_word[word]["encoder"] == pytest.approx((bare - rest)[index].item(), abs=1e-5)
        lexical = (full - bare - (none - none_bare))[index]
        assert sum(word["lexical"] for word in found["words"]) == pytest.approx(lexical.item(), abs=1e-5)


ENCODERS = [
    ("bert", {}),
    ("bert", {"pooling": "cls"}),
    ("bert", {"token_attention": True, "score_calibration": {"scale": 0.7, "bias": 0.2}}),
    ("bert", {"label_attention": False, "attn_implementation": "eager"}),
    ("roberta", {"token_attention": True, "token_attention_size": 8, "pooling": "cls"}),
    ("distilbert", {}),
    ("electra", {}),
    ("modernbert", {}),
]


@pytest.mark.parametrize(("kind", "config"), ENCODERS)
def test_what_attention_to_words_adds_is_complete(kind, config, monkeypatch):
    """Over all weights of words, from none to all, their parts sum to what words add to the logit (Sundararajan et al., 2017)."""
    model = tiny_model(num_labels=3, kind=kind, **config)
    words, deepest, points = "the robot reads images of a galaxy".split(), 14.0, 700
    steps = [-deepest * (point + 0.5) / points for point in range(points)]
    monkeypatch.setattr(explanation_sep_mldc, "FADES", (0.0, *steps))
    found = explained(model, words, [0, 1, 2])
    first = explained_at_full_weight(model, words, [0, 1, 2], monkeypatch)
    integral = (found.encoder * (points + 1) - first) * deepest / points
    added = logits_of(model, words) - logits_of(model, words, range(len(words)))
    assert found.words_per_group == 1
    torch.testing.assert_close(integral.sum(dim=0), added, rtol=0, atol=2e-3 + 1e-3 * added.abs().max().item())


def explained_at_full_weight(model, words, labels, monkeypatch):
    monkeypatch.setattr(explanation_sep_mldc, "FADES", (0.0,))
    return explained(model, words, labels).encoder


@pytest.mark.parametrize(("kind", "config"), ENCODERS)
def test_what_attention_to_a_word_adds_is_nearly_what_masking_it_changes(kind, config, monkeypatch):
    # Small weights, so that the effects of words are small.
    model = tiny_model(num_labels=3, backbone_config=tiny_backbone_config(kind, initializer_range=0.05), **config)
    words = (LONG.replace(",", "") * 2).split()[:13]
    full = logits_of(model, words)
    effects = torch.stack([full - logits_of(model, words, [position]) for position in range(len(words))])
    found = explained_at_full_weight(model, words, [0, 1, 2], monkeypatch)
    for estimated, true in zip(found.t(), effects.t()):
        assert torch.corrcoef(torch.stack([estimated, true]))[0, 1] > 0.7


@pytest.mark.parametrize("kind", ["deberta-v2", "llama", "xlnet", "t5", "longformer"])
def test_encoders_of_every_kind_are_explained(kind):
    """By derivatives or by copies; the parts of an encoder that takes weights differently, or not at all, are not guessed."""
    model = tiny_model(num_labels=3, kind=kind)
    words = "the robot reads images of a galaxy".split()
    found = explained(model, words, [0, 2], num_groups=1000)
    full = logits_of(model, words)[[0, 2]]
    torch.testing.assert_close(found.logit, full, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bias + found.encoder.sum(0) + found.remainder, full, rtol=0, atol=1e-4)
    if kind in ("deberta-v2", "llama", "longformer"):
        rest = logits_of(model, words, [1])[[0, 2]]
        torch.testing.assert_close(found.encoder[1], full - rest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("merge", ["max", "mean", "attention", "first"])
@pytest.mark.parametrize(("budget", "most_faded"), [(1, 0), (10_000, 0), (1, 1000)])
def test_the_parts_add_up_to_the_logit_of_every_label_whatever_the_windows_and_the_budget(
    merge, budget, most_faded, monkeypatch
):
    monkeypatch.setattr(explanation_sep_mldc, "MOST_FADED_TOKENS", most_faded)
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
        assert (found["words_per_group"] > 1) == (budget == 1 and most_faded == 0)
        shares = [token["score"] for token in answer["tokens"][label]]
        total = sum(abs(word["score"]) for word in found["words"])
        assert shares == pytest.approx([word["score"] / total for word in found["words"]])


def test_words_of_a_group_share_the_effect_of_the_group(by_copies):
    model = tiny_model(num_labels=3)
    words = "the robot reads images".split()
    (found,) = make_pipe(model, explanation_budget=1, top_k=1)(
        " ".join(words * 2), return_explanation=True, explanation_size=10
    )["explanations"].values()
    full = logits_of(model, words * 2)
    index = int(full.argmax())
    assert found["words_per_group"] == 2  # four groups at least
    scores = [word["encoder"] for word in sorted(found["words"], key=lambda word: word["start"])]
    effect = (full - logits_of(model, words * 2, [0, 1]))[index].item()
    sizes = [encode(words)[1].count(word) for word in (0, 1)]
    assert scores[:2] == pytest.approx([effect * size / sum(sizes) for size in sizes], abs=1e-5)


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
    spans, word_ids = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
    assert [text[start:end] for start, end in spans] == words
    assert word_ids[0] == word_ids[-1] == -1 and sorted(set(word_ids[1:-1])) == list(range(len(words)))


def test_in_scripts_without_spaces_a_word_is_a_token():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"日本語文書", "star"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})
    text = "日本語 star 文書"
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    spans, _ = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
    assert [text[start:end] for start, end in spans] == ["日", "本", "語", "star", "文", "書"]


def test_copies_lose_their_words_and_nothing_else():
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    masks = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = masked_copies(inputs, masks, pad_token_id=1)
    assert found["input_ids"].tolist() == [[2, 7, 8, 9, 3], [2, 7, 8, 9, 3], [1, 7, 8, 9, 3]]
    expected = [[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert found["attention_mask"].tolist() == expected, "an empty text has a token to attend to"


@pytest.mark.parametrize("most_faded", [0, 1000])
def test_the_same_passes_serve_all_labels(most_faded, monkeypatch):
    monkeypatch.setattr(explanation_sep_mldc, "MOST_FADED_TOKENS", most_faded)
    model = tiny_model(num_labels=4)
    sizes = []
    handle = model.backbone.register_forward_hook(
        lambda _, args, kwargs, __: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        make_pipe(model, top_k=4)("the robot reads images", return_explanation=True)
    finally:
        handle.remove()
    # The text; the text and none of it; the two weights, and none of it; the text and four copies.
    assert sizes == ([1, 2, 2, 1, 5] if most_faded else [1, 2, 5])


def test_in_a_short_text_half_of_a_words_part_is_what_masking_it_changes(monkeypatch):
    model, words = tiny_model(num_labels=3), "the robot reads images of a galaxy".split()
    monkeypatch.setattr(explanation_sep_mldc, "FADES", (0.0,))
    masked = explained(model, words, [0, 2], num_groups=7).encoder
    full = logits_of(model, words)[[0, 2]]
    rest = logits_of(model, words, [6])[[0, 2]]
    torch.testing.assert_close(masked[6], full - rest, rtol=0, atol=1e-5)
    monkeypatch.setattr(explanation_sep_mldc, "FADES", (0.0, -3.0))
    at_full_weight = explained_at_full_weight(model, words, [0, 2], monkeypatch)
    monkeypatch.setattr(explanation_sep_mldc, "FADES", (0.0, -3.0))
    by_derivatives = explained(model, words, [0, 2]).encoder
    mean = explained(model, words, [0, 2], num_groups=7).encoder
    torch.testing.assert_close(mean, by_derivatives + (masked - at_full_weight) / 2, rtol=0, atol=1e-5)


def test_an_explanation_leaves_no_gradients_and_no_changes():
    model = tiny_model(num_labels=4, token_attention=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_pipe(model, top_k=4)("the robot reads images", return_explanation=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_text_without_words_has_the_bias_only():
    model = tiny_model(num_labels=2)
    inputs = {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    found = explain_window(model, inputs, [-1, -1], [0, 1], 4, 1)
    assert found.encoder.shape == (0, 2)
    # Two equal rows of a batch may differ in the last bit.
    torch.testing.assert_close(found.logit, found.bias, rtol=0, atol=1e-6)
    assert found.remainder.abs().max() < 1e-6
