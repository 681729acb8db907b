"""Checkpoints saved by earlier versions load and give the same predictions."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.pipeline_sep_mldc import TASK


pytestmark = pytest.mark.numeric

FOLDERS = sorted((Path(__file__).parent / "checkpoints").iterdir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def saved(request):
    """A saved model, its tokenizer and what the version that saved it answered."""
    folder = request.param
    model = SepMldcForMultiLabelClassification.from_pretrained(folder)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return model, AutoTokenizer.from_pretrained(folder), expected


def test_a_former_checkpoint_gives_the_same_logits_labels_and_thresholds(saved):
    model, tokenizer, expected = saved
    batch = tokenizer(expected["texts"], padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
    assert model.config.labels == expected["labels"]
    assert model.config.thresholds == pytest.approx(expected["thresholds"])


@pytest.mark.parametrize("name, options", [("pipeline", {}), ("pipeline_top_k_3", {"top_k": 3})])
def test_a_former_checkpoint_gives_the_same_pipeline_answers(saved, name, options):
    model, tokenizer, expected = saved
    classify = pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu")
    # Windows were longer than what the encoder reads.
    answers = classify(expected["texts"], max_length=classify.longest_max_length, **options)
    assert [[entry["label"] for entry in labels] for labels in answers] == [
        [entry["label"] for entry in labels] for labels in expected[name]
    ]
    for answer, former in zip(answers, expected[name], strict=True):
        assert [entry["score"] for entry in answer] == pytest.approx([entry["score"] for entry in former], abs=1e-4)
