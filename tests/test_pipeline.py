"""The pipeline `multi-label-document-classification`, and transformers' own text-classification pipeline on the same model."""

import json
import os
import random
import re
import subprocess
import sys
import threading
from functools import cache

import numpy as np
import pytest
import torch
from answers import assert_same_answers
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, WORDS, tiny_model, tiny_tokenizer
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcForMultiLabelClassification,
    is_abstained,
)
from modeling_sep_mldc.pipeline_sep_mldc import TASK, _token_shares, logger


pytestmark = pytest.mark.numeric

LONG = " ".join(f"the {WORDS[i % len(WORDS)]} {i}" for i in range(120))  # several windows of 128 tokens
TEXTS = ["star galaxy", LONG, "robot", "", "price of the market is data", LONG[200:900], "  \n", "proof"]


def make_pipeline(model=None, **kwargs):
    tokenizer = kwargs.pop("tokenizer", None) or tiny_tokenizer()
    return pipeline(TASK, model=model or tiny_model(), tokenizer=tokenizer, device="cpu", **kwargs)


CLASSIFY = make_pipeline()


def logits_of(model, text, **kwargs):
    encoded = tiny_tokenizer()(text, return_tensors="pt", **kwargs)
    with torch.no_grad():
        return model(**encoded)


def as_dict(labels):
    return {entry["label"]: entry["score"] for entry in labels}


def content(window):
    return [i for i, special in zip(window["input_ids"][0].tolist(), window["special"]) if not special]


# ---- Which labels ----


def test_the_labels_are_those_whose_probability_reaches_their_stored_threshold_best_first():
    model = tiny_model()
    probabilities = torch.sigmoid(logits_of(model, "star galaxy").logits[0]).tolist()
    model.config.thresholds = [0.0, 1.0, probabilities[2], 0.0, 1.0]
    labels = make_pipeline(model)("star galaxy")
    expected = sorted([(probabilities[i], f"label {i}") for i in (0, 2, 3)], reverse=True)
    assert [entry["label"] for entry in labels] == [name for _, name in expected]
    assert [entry["score"] for entry in labels] == pytest.approx([p for p, _ in expected], abs=1e-6)


def test_without_stored_thresholds_a_label_needs_a_probability_of_one_half():
    model = tiny_model()
    probabilities = torch.sigmoid(logits_of(model, "robot").logits[0])
    expected = {f"label {i}" for i in range(5) if probabilities[i] >= 0.5}
    assert 0 < len(expected) < 5
    assert set(as_dict(make_pipeline(model)("robot"))) == expected


def test_top_k_takes_the_best_labels_whatever_the_thresholds_and_with_a_threshold_at_most_so_many():
    model = tiny_model()
    model.config.thresholds = [1.0] * 5
    classify = make_pipeline(model)
    assert classify("robot") == []
    everything = classify("robot", top_k=5)
    assert len(everything) == 5
    assert_same_answers(classify("robot", top_k=2), everything[:2])
    assert_same_answers(classify("robot", threshold=0.0), everything)
    assert_same_answers(classify("robot", threshold=0.0, top_k=2), everything[:2])
    assert classify("robot", threshold=everything[0]["score"] + 1e-6, top_k=2) == []
    assert_same_answers(classify("robot", top_k=5, min_score=everything[2]["score"] - 1e-6), everything[:3])


def test_documents_whose_label_set_is_likely_wrong_by_its_probabilities_are_abstained():
    model = tiny_model()
    classify = make_pipeline(model)
    everything = classify("robot", top_k=5)
    scores = [entry["score"] for entry in everything]
    cut = (scores[1] + scores[2]) / 2
    expected = 2 * sum(scores[:2]) / (2 + sum(scores))
    assert [e["label"] for e in classify("robot", threshold=cut, min_expected_f1=expected - 1e-4)] == [
        entry["label"] for entry in everything[:2]
    ]
    assert classify("robot", threshold=cut, min_expected_f1=expected + 1e-4) == []
    # The best labels are shown to the person who decides, although they reach the threshold.
    shown = classify("robot", threshold=cut, min_expected_f1=expected + 1e-4, min_labels=1)
    assert [entry["label"] for entry in shown] == [everything[0]["label"]] and is_abstained(shown)
    assert classify("", min_expected_f1=0.5) == []


def test_min_labels_adds_the_best_labels_below_their_threshold_and_marks_them():
    model = tiny_model()
    everything = make_pipeline(model)("robot", top_k=5)
    names, scores = [entry["label"] for entry in everything], [entry["score"] for entry in everything]
    model.config.thresholds = [1.0] * 5
    model.config.thresholds[model.config.label2id[names[2]]] = 0.0  # the third one is the only one that is accepted
    classify = make_pipeline(model)
    assert [entry["label"] for entry in classify("robot", min_labels=1)] == [names[2]]
    found = classify("robot", min_labels=3)
    assert [entry["label"] for entry in found] == [names[2], names[0], names[1]]
    assert [entry.get("below_threshold") for entry in found] == [None, True, True] and not is_abstained(found)
    assert [e["label"] for e in classify("robot", min_labels=5, min_score=scores[1] - 1e-6)] == [names[0], names[1]]
    assert len(classify("robot", min_labels=9)) == 5
    assert classify("", min_labels=2) == []
    # `top_k` alone asks for no threshold, and is never exceeded.
    assert_same_answers(classify("robot", top_k=2, min_labels=4), everything[:2])
    assert len(classify("robot", top_k=2, threshold=1.0, min_labels=4)) == 2


def test_labels_that_a_hierarchy_left_out_are_not_added_again():
    labels = [f"label {i}" for i in range(5)]
    model = tiny_model(label_parents={labels[1]: [labels[0]]}, hierarchy="leaves")
    model.config.thresholds = [0.0, 0.0, 1.0, 1.0, 1.0]  # the parent is accepted, and left out as it is no leaf
    found = make_pipeline(model)("robot", min_labels=5)
    assert [entry["label"] for entry in found if "below_threshold" not in entry] == [labels[1]]
    assert {entry["label"] for entry in found if "below_threshold" in entry} == set(labels[2:])


def test_a_document_none_of_whose_labels_reaches_its_threshold_is_abstained():
    model = tiny_model()
    model.config.thresholds = [1.0] * 5
    classify = make_pipeline(model)
    assert (
        classify("robot") == [] and is_abstained(classify("robot")) and is_abstained(classify("robot", min_labels=1))
    )
    assert classify("robot", return_explanation=True)["abstained"]
    assert classify("robot", return_explanation=True, min_labels=1)["abstained"]
    accepted = classify("robot", return_explanation=True, threshold=0.0)
    assert not accepted["abstained"] and not is_abstained(accepted["labels"])


def test_parameters_given_at_creation_hold_for_every_call_and_a_call_may_change_them():
    classify = make_pipeline(top_k=2)
    assert len(classify("robot")) == 2
    assert len(classify("robot", top_k=4)) == 4
    assert_same_answers(classify("robot", top_k=None), make_pipeline()("robot"))


def test_calibration_is_applied_before_the_thresholds():
    model = tiny_model(classification_loss="softmax")
    expected = torch.sigmoid(0.5 * logits_of(model, "robot").logits[0] - 1.0)
    model.config.score_calibration = {"scale": 0.5, "bias": -1.0}
    model.config.thresholds = [0.0] * 5
    scores = as_dict(make_pipeline(model)("robot"))
    assert [scores[f"label {i}"] for i in range(5)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_softmax_model_without_calibration_returns_a_ranking_of_logits_and_says_so_once():
    model = tiny_model(num_labels=12, classification_loss="softmax")
    model.config.thresholds = [0.5] * 12  # means nothing without probabilities
    logging.warning_once.cache_clear()
    classify = make_pipeline(model)
    with CaptureLogger(logger) as captured:
        ranking = classify(["star galaxy", "robot"])[0]
        classify("robot")
    assert captured.out.count("ranking of labels") == 1
    logits = logits_of(model, "star galaxy").logits[0].sort(descending=True)
    assert [entry["label"] for entry in ranking] == [f"label {i}" for i in logits.indices[:10].tolist()]
    assert [entry["score"] for entry in ranking] == pytest.approx(logits.values[:10].tolist(), abs=1e-5)
    assert [entry["rank"] for entry in ranking] == list(range(1, 11))
    assert len(classify("robot", top_k=12)) == 12
    assert len(classify("robot", min_score=-1e9)) == 12


@pytest.mark.parametrize("ask", [{}, {"top_k": 3}, {"threshold": 0.0}, {"return_explanation": True, "top_k": 1}])
def test_a_text_without_tokens_has_no_labels(ask):
    for text in ("", " \n\t ", "\u200b"):
        answer = make_pipeline()(text, **ask)
        assert answer == (
            []
            if "return_explanation" not in ask
            else {"labels": [], "abstained": True, "attended_labels": [], "explanations": {}, "tokens": {}}
        )


# ---- Long documents ----


@given(
    words=st.lists(st.sampled_from(WORDS + ["xyz", "42"]), min_size=1, max_size=120),
    max_length=st.integers(4, 40),
    stride=st.integers(0, 30),
    side=st.sampled_from(["left", "right"]),
)
@settings(deadline=None, max_examples=60)
def test_windows_hold_every_token_of_the_text_and_share_stride_tokens(words, max_length, stride, side):
    classify = CLASSIFY
    classify.tokenizer.truncation_side = side
    stride = min(stride, max_length - 3)
    text = " ".join(words)
    windows = list(classify.preprocess(text, max_length=max_length, stride=stride))
    rebuilt = content(windows[0])
    for window in windows[1:]:
        assert stride == 0 or rebuilt[-stride:] == content(window)[:stride]
        rebuilt += content(window)[stride:]
    assert rebuilt == tiny_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert [window["is_last"] for window in windows] == [False] * (len(windows) - 1) + [True]
    assert all(window["input_ids"].shape[1] <= max_length for window in windows)


@cache
def pipeline_of(kind, encoder_max_length, num_lexical_features):
    return make_pipeline(
        tiny_model(kind=kind, encoder_max_length=encoder_max_length, num_lexical_features=num_lexical_features)
    )


@given(
    words=st.lists(st.sampled_from(WORDS + ["xyz", "42"]), min_size=1, max_size=300),
    kind=st.sampled_from(KINDS),
    encoder_max_length=st.sampled_from([None, 8, 96, 1000]),
    num_lexical_features=st.sampled_from([None, 3]),
    merge=st.sampled_from(["max", "mean"]),
)
@settings(deadline=None, max_examples=40)
def test_the_encoder_reads_every_token_of_a_text(words, kind, encoder_max_length, num_lexical_features, merge):
    classify = pipeline_of(kind, encoder_max_length, num_lexical_features)
    text, read = " ".join(words), []

    def remember(module, arguments, keywords):
        ids, mask = keywords["input_ids"], keywords["attention_mask"].bool()
        read.extend(i for row, attended in zip(ids, mask) for i in row[attended].tolist() if i not in special)

    special = set(classify.tokenizer.all_special_ids)
    handle = classify.model.backbone.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        classify(text, stride=0, window_merge=merge)
    finally:
        handle.remove()
    assert read == classify.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = list(classify.preprocess(text))
    assert all(window["input_ids"].shape[1] <= min(encoder_max_length or 128, 128) for window in windows)


def test_with_lexical_scores_a_window_may_be_as_long_as_documents_in_training():
    assert make_pipeline(tiny_model(encoder_max_length=8)).longest_max_length == 8
    classify = make_pipeline(tiny_model(encoder_max_length=8, num_lexical_features=3))
    assert (classify.model_max_length, classify.longest_max_length) == (8, 128)
    assert [window["input_ids"].shape[1] for window in classify.preprocess("the " * 60, max_length=62)] == [62]


def test_an_explanation_beyond_the_tokens_of_the_encoder_is_that_of_the_lexical_scores():
    classify = make_pipeline(tiny_model(encoder_max_length=8, num_lexical_features=3), top_k=1)
    answer = classify("star galaxy robot " * 4, max_length=20, return_explanation=True, explanation_size=20)
    (explanation,) = answer["explanations"].values()
    tokens = explanation["words"]
    # [CLS] and seven words.
    read = re.finditer(r"\w+", "star galaxy robot " * 2 + "star")
    assert {token["start"] for token in tokens if token["score"]} == {match.start() for match in read}


def test_a_token_in_several_windows_counts_once_in_all():
    # Tokens 0-3, 2-5, 4-6: tokens 2, 3, 4 and 5 lie in two windows.
    assert _token_shares([4, 4, 3], [0, 2, 2]) * 7 == pytest.approx([3.0, 2.0, 2.0])
    # A stride above half of the window: tokens 0-3, 1-4, 2-5.
    shares = _token_shares([4, 4, 4], [0, 3, 3])
    assert shares.sum() == pytest.approx(1.0)
    assert shares * 6 == pytest.approx(
        [1 + 1 / 2 + 1 / 3 + 1 / 3, 1 / 2 + 1 / 3 + 1 / 3 + 1 / 2, 1 / 3 + 1 / 3 + 1 / 2 + 1]
    )


@pytest.mark.parametrize("merge", ["max", "mean", "attention", "first"])
def test_window_scores_are_merged_as_documented(merge):
    model = tiny_model()
    classify = make_pipeline(model)
    windows = list(classify.preprocess(LONG, stride=30))
    assert len(windows) > 3
    covered, position, per_window = {}, 0, []
    for number, window in enumerate(windows):
        position -= 30 if number else 0
        tokens = list(range(position, position + len(content(window))))
        position = tokens[-1] + 1
        for token in tokens:
            covered[token] = covered.get(token, 0) + 1
        output = model(input_ids=window["input_ids"])
        per_window.append((tokens, torch.sigmoid(output.logits[0]), output.label_attention[0]))
    for label in range(5):
        scores = [scores[label].item() for _, scores, _ in per_window]
        shares = [sum(1 / covered[token] for token in tokens) for tokens, _, _ in per_window]
        attention = [share * alpha[label].item() for share, (_, _, alpha) in zip(shares, per_window)]
        expected = {
            "max": max(scores),
            "first": scores[0],
            "mean": sum(w * s for w, s in zip(shares, scores)) / sum(shares),
            "attention": sum(w * s for w, s in zip(attention, scores)) / sum(attention),
        }[merge]
        got = as_dict(classify(LONG, window_merge=merge, stride=30, top_k=5))[f"label {label}"]
        assert got == pytest.approx(expected, abs=1e-5)


def test_truncation_and_padding_are_accepted_as_in_transformers():
    classify = make_pipeline(top_k=5)
    first = classify(LONG, window_merge="first")
    assert_same_answers(classify(LONG, truncation=True, padding=True), first)
    assert_same_answers(make_pipeline(top_k=5, truncation="longest_first")(LONG), first)
    assert_same_answers(classify(LONG, truncation=False), classify(LONG))
    assert_same_answers(classify(LONG, truncation=True, window_merge="mean"), classify(LONG, window_merge="mean"))


def test_parameters_may_be_numbers_of_numpy():
    classify = make_pipeline()
    assert_same_answers(
        classify(LONG, top_k=np.int64(2), max_length=np.int32(64)), classify(LONG, top_k=2, max_length=64)
    )
    assert_same_answers(classify("robot", threshold=np.float32(0.5)), classify("robot", threshold=0.5))


def test_one_word_anywhere_in_a_long_text_reaches_the_scores():
    classify = make_pipeline(top_k=5, window_merge="mean")
    words = ["the"] * 600
    plain = as_dict(classify(" ".join(words)))
    for place in (0, 130, 300, 599):
        marked = [*words[:place], "galaxy", *words[place + 1 :]]
        assert as_dict(classify(" ".join(marked))) != pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_as_long_as_the_encoder_has_positions_for(kind):
    classify = make_pipeline(tiny_model(kind=kind))
    classify.tokenizer.model_max_length = int(1e30)
    longest = {"roberta": 128, "mpnet": 128}.get(kind, 130)
    assert classify.model_max_length == longest
    assert max(window["input_ids"].shape[1] for window in classify.preprocess(LONG)) == longest
    assert len(classify(LONG, top_k=1)) == 1


def test_a_text_of_a_million_characters_is_read_to_its_end():
    classify = make_pipeline(batch_size=64, max_length=128, stride=0, window_merge="mean", top_k=5)
    # A word too long for word pieces is one unknown token: fewer windows than English text of this length, all of it read.
    text = ("x" * 101 + " ") * 10_000
    assert len(text) > 1_000_000
    assert as_dict(classify(text + "robot " * 500)) != pytest.approx(as_dict(classify(text)), abs=1e-4)


# ---- Many documents ----


@pytest.mark.parametrize("batch_size", [2, 3, 64])
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_batches_in_which_documents_share_windows_give_what_single_documents_give(batch_size, kind):
    classify = make_pipeline(tiny_model(kind=kind), top_k=5, stride=20)
    single = [classify(text) for text in TEXTS]
    for one, other in zip(single, classify(TEXTS, batch_size=batch_size), strict=True):
        assert as_dict(one) == pytest.approx(as_dict(other), abs=1e-5)


def test_left_padding_gives_what_right_padding_gives():
    left = tiny_tokenizer()
    left.padding_side = "left"
    # BERT counts positions from the left edge, padding included; ModernBERT's rotary positions are relative.
    model = tiny_model(kind="modernbert")
    for one, other in zip(
        make_pipeline(model)(TEXTS, batch_size=4, top_k=5),
        make_pipeline(model, tokenizer=left)(TEXTS, batch_size=4, top_k=5),
    ):
        assert as_dict(one) == pytest.approx(as_dict(other), abs=1e-4)


def test_a_generator_is_read_no_further_than_the_results_that_are_taken():
    read = []

    def documents():
        for i in range(1000):
            read.append(i)
            yield "robot star"

    results = make_pipeline()(documents(), batch_size=4)
    next(iter(results))
    assert len(read) <= 8


def test_datasets_stream_with_rows_as_dictionaries_or_columns_of_texts():
    classify = make_pipeline(top_k=2)
    expected = [classify(text) for text in TEXTS]
    rows = Dataset.from_dict({"text": TEXTS, "other": list(range(len(TEXTS)))})
    assert_same_answers(list(classify(rows)), expected)
    assert_same_answers(list(classify(rows["text"])), expected)
    assert_same_answers(list(classify(KeyDataset(rows, "text"))), expected)
    assert_same_answers(list(classify(rows.rename_column("text", "body"), text_column="body")), expected)
    streamed = IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    assert_same_answers(list(classify(streamed)), expected)
    assert_same_answers(classify(tuple(TEXTS)), expected)
    assert classify([]) == [] and list(classify(iter([]))) == []


# ---- Explanation ----


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def keyword_model(request):
    """A model taught that "robot" means label 0 and "galaxy" label 1."""
    model = tiny_model(num_labels=2, kind=request.param)
    tokenizer = tiny_tokenizer()
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fillers = [word for word in WORDS if word not in ("robot", "galaxy")]
    for _ in range(100):
        texts, labels = [], []
        for _ in range(16):
            words = generator.choices(fillers, k=generator.randint(2, 12))
            present = [generator.random() < 0.5 for _ in range(2)]
            for word, there in zip(("robot", "galaxy"), present):
                if there:
                    words.insert(generator.randrange(len(words) + 1), word)
            texts.append(" ".join(words))
            labels.append([float(there) for there in present])
        loss = model(**tokenizer(texts, padding=True, return_tensors="pt"), labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_explanation_puts_the_decisive_word_of_a_label_first(keyword_model):
    text = " ".join(
        ["the data of the market and speech"] * 3 + ["robot"] + ["with price on the query"] * 3 + ["galaxy image"]
    )
    for merge in ("max", "mean", "attention"):
        answer = make_pipeline(keyword_model)(
            text, return_explanation=True, window_merge=merge, top_k=2, max_length=16
        )
        for label, word in (("label 0", "robot"), ("label 1", "galaxy")):
            best = answer["explanations"][label]["words"][0]
            assert best["word"] == word and best["score"] > 0
            assert text[best["start"] : best["end"]] == word


def test_the_attended_labels_are_those_with_the_largest_alpha():
    model = tiny_model()
    answer = make_pipeline(model)("star galaxy", return_explanation=True, explanation_size=3)
    best = logits_of(model, "star galaxy").label_attention[0].topk(3)
    assert [entry["label"] for entry in answer["attended_labels"]] == [f"label {i}" for i in best.indices.tolist()]
    assert [entry["weight"] for entry in answer["attended_labels"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    without = make_pipeline(tiny_model(label_attention=False))("star galaxy", return_explanation=True, top_k=1)
    assert without["attended_labels"] == [] and len(without["explanations"]) == 1


def test_explanations_and_classifications_in_other_threads_do_not_disturb_each_other():
    classify = make_pipeline(tiny_model(num_labels=6))
    text = "vision language data"
    expected = classify(text, top_k=1, return_explanation=True)
    stop, errors = threading.Event(), []

    def others():
        try:
            while not stop.is_set():
                classify("graph network search ranking " * 10, top_k=3)
                classify("star galaxy", top_k=2, return_explanation=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            assert_same_answers(classify(text, top_k=1, return_explanation=True), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_the_explanation_changes_neither_the_labels_nor_the_model():
    model = tiny_model()
    classify = make_pipeline(model, stride=20)
    plain = classify(TEXTS, batch_size=3)
    assert_same_answers([answer["labels"] for answer in classify(TEXTS, batch_size=3, return_explanation=True)], plain)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


# ---- Checkpoints ----


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return os.fspath(folder)


def test_a_checkpoint_brings_its_pipeline_to_a_process_without_this_package(tmp_path):
    model = tiny_model()
    folder = save(model, tmp_path / "model")
    script = (
        "import json, sys\n"
        "sys.modules['modeling_sep_mldc'] = None\n"
        "from transformers import pipeline\n"
        f"classify = pipeline({TASK!r}, model=sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "classify.model.rename_label('label 0', 'first')\n"
        "answers = [classify(sys.argv[3], top_k=5)]\n"
        "classify.save_pretrained(sys.argv[2])\n"
        "answers.append(pipeline(model=sys.argv[2], trust_remote_code=True, device='cpu')(sys.argv[3], top_k=5))\n"
        "print(json.dumps(answers))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder, str(tmp_path / "again"), LONG],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, again = json.loads(done.stdout)
    model.rename_label("label 0", "first")
    assert as_dict(first) == pytest.approx(as_dict(make_pipeline(model)(LONG, top_k=5)), abs=1e-5)
    assert as_dict(again) == pytest.approx(as_dict(first), abs=1e-6)


def test_with_the_package_the_task_needs_the_class_for_a_folder_and_nothing_for_a_model(tmp_path):
    model = tiny_model()
    folder = save(model, tmp_path)
    classify = pipeline(TASK, model=folder, pipeline_class=MultiLabelDocumentClassificationPipeline, device="cpu")
    assert type(classify.model) is SepMldcForMultiLabelClassification
    assert_same_answers(classify("robot"), make_pipeline(model)("robot"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline(TASK, model=folder)


def test_a_pipeline_can_be_saved_and_its_configuration_shown(tmp_path):
    folder = save(tiny_model(), tmp_path / "one")
    classify = pipeline(TASK, model=folder, pipeline_class=MultiLabelDocumentClassificationPipeline, device="cpu")
    assert TASK in repr(classify.model.config)
    classify.save_pretrained(tmp_path / "two")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert first["custom_pipelines"] == second["custom_pipelines"] and first["auto_map"] == second["auto_map"]
    assert (tmp_path / "two" / "pipeline_sep_mldc.py").is_file()


def test_the_stock_text_classification_pipeline_gives_sigmoid_scores_in_batches_of_any_size(tmp_path):
    model = tiny_model(num_labels=3)
    folder = save(model, tmp_path)
    classify = pipeline("text-classification", model=folder, top_k=None, device="cpu")
    for scores in classify(["star galaxy"] * 9, batch_size=8):
        expected = torch.sigmoid(logits_of(model, "star galaxy").logits[0])
        assert [as_dict(scores)[f"label {i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "`threshold` is 1.5, but it must be a probability from 0 to 1"),
        ({"threshold": "0.5"}, "it must be a probability from 0 to 1"),
        ({"min_score": -0.1}, "`min_score` is -0.1"),
        ({"min_score": float("nan")}, "`min_score` is nan"),
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"max_length": True}, "`max_length` is True"),
        ({"top_k": 0}, "`top_k` is 0, but it must be an integer of at least 1"),
        ({"top_k": True}, "integer"),
        ({"min_labels": -1}, "`min_labels` is -1, but it must be a number of labels of at least 0"),
        ({"min_expected_f1": 1.5}, "`min_expected_f1` is 1.5, but it must be"),
        ({"stride": -1}, "`stride` is -1"),
        ({"stride": 126}, "`stride` is 126, but it must be less than 126"),
        ({"max_length": 2}, "an integer from 3 to 128"),
        ({"max_length": 500}, "an integer from 3 to 128"),
        ({"window_merge": "sum"}, "must be one of 'max', 'mean'"),
        ({"topk": 3}, "no parameter `topk`. It takes `top_k`"),
        ({"explanation_size": 0}, "`explanation_size` is 0"),
        ({"explanation_budget": 0}, "`explanation_budget` is 0"),
    ],
)
def test_a_parameter_out_of_its_range_is_reported_with_its_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()("robot", **arguments)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "is None"),
        (["robot", None], "NoneType"),
        ([b"robot"], "bytes"),
        ({"body": "robot"}, "has no `text`, only 'body'"),
        ([{"text": 3}], "is 3"),
        ("robot \ud800", r"unpaired surrogate \('\\ud800'\).*Remove it"),
    ],
)
def test_a_document_that_is_not_text_is_shown_with_what_is_needed(document, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(document)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.5}, "this model ranks labels and has no probabilities"),
        ({"min_score": float("nan")}, "`min_score` is nan, but it must be a finite number"),
        ({"min_score": True}, "must be a finite number"),
    ],
)
def test_a_ranking_takes_no_threshold_and_only_finite_scores(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(tiny_model(classification_loss="softmax"))("robot", **arguments)


def test_scores_that_are_not_finite_are_an_error_and_not_a_document_without_labels():
    model = tiny_model()
    model.classifier.bias.data[2] = float("nan")
    with pytest.raises(ValueError, match="not finite numbers"):
        make_pipeline(model)("robot")


def test_merging_by_attention_needs_label_attention():
    with pytest.raises(ValueError, match="has no label attention"):
        make_pipeline(tiny_model(label_attention=False))("robot", window_merge="attention")


def test_a_slow_tokenizer_is_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="fast tokenizer"):
        make_pipeline(tokenizer=tokenizer)
