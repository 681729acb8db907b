"""Labels of many documents by looking up words: the answers of the pipeline, and the tokens of the tokenizer."""

import pytest
import torch
from answers import assert_same_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WORDS, tiny_model, tiny_tokenizer
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline
from trainer import FastLabeler
from trainer.data.word_cache import WordCache


pytestmark = pytest.mark.numeric

TEXTS = [
    "star galaxy",
    " ".join(WORDS) * 9,
    "robot",
    "",
    "price of the market is data.",
    "  \n",
    "caf\u00e9, [SEP] proof",
]
CACHE = WordCache(tiny_tokenizer(), max_words=50)
ODD = st.text(
    st.sampled_from("ab,.[]\u00e9\u0301\u200b\u3000\u4e2d\x0b\x0c\x1c\x1f\x85\x00\ufffd \t\n-'"), max_size=30
)


@given(st.lists(ODD | st.text(max_size=20) | st.sampled_from([*TEXTS, "[MASK]a", "a[SEP] b"]), max_size=4))
@settings(max_examples=100, deadline=None)
def test_words_give_the_tokens_of_the_tokenizer_for_any_text(texts):
    assert CACHE.is_exact
    for max_length in (3, 7, 40):
        expected = [tiny_tokenizer_ids(text, max_length) for text in texts]
        assert CACHE(texts, max_length) == expected


TOKENIZER = tiny_tokenizer()


def tiny_tokenizer_ids(text, max_length):
    return TOKENIZER(text, truncation=True, max_length=max_length)["input_ids"]


def test_a_tokenizer_whose_words_depend_on_their_neighbors_is_asked_for_every_text():
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a word, and another  word"] * 3, vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")
    words = WordCache(tokenizer)
    assert not words.is_exact
    texts = ["a  word", " another word", ""]
    assert words(texts, 5) == tokenizer(texts, truncation=True, max_length=5)["input_ids"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"thresholds": [0.1, 0.9, 0.4, 0.5, 0.6]}, {"classification_loss": "softmax"}, {"encoder_max_length": 12}],
)
def test_labels_are_those_of_the_pipeline_that_reads_the_first_window(settings):
    model = tiny_model(**settings)
    classify = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer())
    label = FastLabeler(model, tiny_tokenizer(), batch_size=2, block_size=4)
    found = list(label(iter(TEXTS)))
    for labels, expected in zip(found, classify(TEXTS, window_merge="first"), strict=True):
        assert_same_answers(labels, expected)
    assert any(found) and found[3] == found[5] == []


def test_scores_that_are_not_finite_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        list(FastLabeler(model, tiny_tokenizer())(["star"]))
