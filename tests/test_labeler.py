"""Labels of many documents by looking up words: the answers of the pipeline, and the tokens of the tokenizer."""

import pytest
import torch
from answers import assert_same_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WORDS, tiny_model, tiny_tokenizer
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcConfig,
    SepMldcForMultiLabelClassification,
)
from modeling_sep_mldc.static_encoder_sep_mldc import StaticEncoderConfig
from trainer import FastLabeler
from trainer.data.word_cache import WordCache
from trainer.labeler import StudentPipeline


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


def student(**settings):
    """A model with a random static encoder, and its tokenizer with a limit of 24 tokens."""
    encoder = StaticEncoderConfig(vocab_size=len(tiny_tokenizer()), hidden_size=16)
    torch.manual_seed(0)
    labels = dict(enumerate(["math", "physics", "robots", "money", "law"]))
    config = SepMldcConfig(backbone_config=encoder, id2label=labels, encoder_max_length=24, **settings)
    model = SepMldcForMultiLabelClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"window_merge": "first"},
        {"top_k": 2},
        {"top_k": 2, "threshold": 0.4},
        {"threshold": 0.0},
        {"min_score": 0.6},
        {"min_labels": 3},
        {"max_length": 9},
        {"max_length": 9, "stride": 1, "window_merge": "mean"},
        {"return_explanation": True},
    ],
)
@pytest.mark.parametrize("settings", [{}, {"hierarchy": "closure", "label_parents": {"robots": ["physics"]}}])
def test_the_pipeline_of_a_student_answers_as_any_pipeline(settings, parameters, monkeypatch):
    model, tokenizer = student(thresholds=[0.3, 0.6, 0.4, 0.5, 0.6], **settings), tiny_tokenizer()
    expected = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tokenizer)(TEXTS, **parameters)
    classify = StudentPipeline(model=model, tokenizer=tokenizer)
    read = []
    logits = FastLabeler._logits
    monkeypatch.setattr(FastLabeler, "_logits", lambda *args: read.extend(args[1]) or logits(*args))
    assert_same_answers(classify(TEXTS, batch_size=2, **parameters), expected)
    assert_same_answers(StudentPipeline(model=model, tokenizer=tokenizer, **parameters)(TEXTS), expected)
    fast = set(parameters) <= {"top_k", "threshold", "min_score", "max_length", "window_merge"}
    assert (len(read) >= 2 * len(TEXTS)) == fast


def test_the_pipeline_of_a_student_remembers_its_words(monkeypatch):
    classify = StudentPipeline(model=student(), tokenizer=tiny_tokenizer())
    classify(TEXTS)
    monkeypatch.setattr(WordCache, "__init__", lambda *args: pytest.fail("the tokenizer is parsed again"))
    assert len(classify(TEXTS)) == len(TEXTS)


def test_the_pipeline_of_a_student_refuses_what_any_pipeline_refuses():
    classify = StudentPipeline(model=student(), tokenizer=tiny_tokenizer())
    assert classify([]) == []
    assert_same_answers(classify("star galaxy"), classify(["star galaxy"])[0])
    for parameters, message in (({"top_k": 0}, "top_k"), ({"size": 3}, "no parameter")):
        with pytest.raises(ValueError, match=message):
            classify(["star"], **parameters)
    with pytest.raises(ValueError, match="must be a text"):
        classify(["star", 3])


def test_scores_that_are_not_finite_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        list(FastLabeler(model, tiny_tokenizer())(["star"]))
