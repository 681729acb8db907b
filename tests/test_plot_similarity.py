"""The heat maps of Figures 2 and 3: matrices against loops, order, rank correlation, and the pictures themselves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scripts import load_example
from tiny_models import tiny_model, tiny_tokenizer

from trainer.data import encode_labels


pytest.importorskip("matplotlib")
pytestmark = pytest.mark.pictures

SCRIPT = Path(__file__).parent.parent / "examples" / "plot_similarity.py"
plot_similarity = load_example("plot_similarity")

LABELS = ["images", "language", "proofs", "stars", "never seen", "a $5 label"]
DOCUMENTS = [
    {"text": "vision of images", "labels": ["images"]},
    {"text": "language of speech", "labels": ["language", "images"]},
    {"text": "a proof of the theorem", "labels": ["proofs"]},
    {"text": "galaxy and stars", "labels": ["stars", "images"]},
    {"text": "the market", "labels": ["a $5 label", "stars"]},
    {"text": "data", "labels": []},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(id2label=dict(enumerate(LABELS)))


@pytest.fixture(scope="module")
def documents(model):
    return encode_labels(Dataset.from_list(DOCUMENTS), model.config.label2id)


def jaccard(first: set, second: set) -> float:
    return len(first & second) / len(first | second) if first | second else 0.0


def test_label_matrices_equal_loops_over_labels_most_frequent_first(model, documents):
    matrices = plot_similarity.compare_labels(model, documents, num_labels=4)
    assert matrices["names"] == ["images", "stars", "language", "proofs"]
    having = {name: {i for i, row in enumerate(DOCUMENTS) if name in row["labels"]} for name in LABELS}
    for i, first in enumerate(matrices["names"]):
        for j, second in enumerate(matrices["names"]):
            rows = [model.label_embeddings[LABELS.index(name)] for name in (first, second)]
            cosine = torch.cosine_similarity(*rows, dim=0).item()
            assert matrices["embeddings"][i, j] == pytest.approx(cosine, abs=1e-5)
            assert matrices["data"][i, j] == pytest.approx(jaccard(having[first], having[second]))


def test_document_matrices_equal_loops_over_documents(model, documents):
    matrices = plot_similarity.compare_documents(model, tiny_tokenizer(), documents, max_length=32)
    assert matrices["names"][1] == "images, language" and matrices["names"][-1] == "(no label)"
    with torch.no_grad():
        embeds = [model(**tiny_tokenizer()(row["text"], return_tensors="pt")).document_embeds[0] for row in DOCUMENTS]
    for i, first in enumerate(DOCUMENTS):
        for j, second in enumerate(DOCUMENTS):
            cosine = torch.cosine_similarity(embeds[i], embeds[j], dim=0).item()
            assert matrices["embeddings"][i, j] == pytest.approx(cosine, abs=1e-5)
            expected = jaccard(set(first["labels"]), set(second["labels"]))
            assert matrices["data"][i, j] == pytest.approx(expected)


def test_labels_that_training_never_shows_are_not_drawn(model, documents):
    assert "never seen" not in plot_similarity.compare_labels(model, documents, num_labels=100)["names"]


def test_rank_correlation_sees_order_alone_and_not_the_diagonal():
    first = np.array([[9.0, 0.1, 0.2], [0.1, 9.0, 0.3], [0.2, 0.3, 9.0]])
    second = np.exp(first) * (1 - np.eye(3))
    assert plot_similarity.rank_correlation(first, second) == pytest.approx(1)
    assert plot_similarity.rank_correlation(first, -second) == pytest.approx(-1)


def test_rank_correlation_with_a_constant_matrix_is_undefined():
    assert plot_similarity.rank_correlation(np.eye(4), np.random.default_rng(0).random((4, 4))) is None


def test_clustered_order_puts_similar_rows_side_by_side():
    groups = np.array([0, 1, 0, 2, 1, 0, 2])
    noise = np.random.default_rng(0).random((7, 7)) * 0.05
    similarity = np.where(groups[:, None] == groups, 0.9, 0.1) + (noise + noise.T) / 2
    ordered = groups[plot_similarity.cluster_order(similarity)]
    assert np.count_nonzero(np.diff(ordered)) == 2


def run(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    plot_similarity.main()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("similarity")
    model.save_pretrained(folder / "checkpoint")
    tiny_tokenizer().save_pretrained(folder / "checkpoint")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    return folder


def test_the_command_writes_both_pictures_and_the_correlations(files, tmp_path, monkeypatch):
    run(files / "checkpoint", "--train_file", files / "train.jsonl", "--output_dir", tmp_path, monkeypatch=monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "document_similarity.png",
        "label_similarity.png",
        "similarity.json",
    ]
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    summary = json.loads((tmp_path / "similarity.json").read_text())
    assert [summary[kind]["rows"] for kind in ("label", "document")] == [5, 6]
    assert all(-1 <= entry["rank_correlation"] <= 1 for entry in summary.values())


def test_a_file_without_enough_known_labels_ends_in_a_one_sentence_error(files, tmp_path, monkeypatch):
    (tmp_path / "other.jsonl").write_text('{"text": "a", "labels": ["unknown"]}\n{"text": "b", "labels": ["stars"]}\n')
    with pytest.raises(ValueError, match="has 1 labels that the checkpoint knows, but 3 are needed"):
        run(files / "checkpoint", "--train_file", tmp_path / "other.jsonl", monkeypatch=monkeypatch)


def test_fewer_than_three_rows_are_refused(files, monkeypatch):
    with pytest.raises(ValueError, match="`--num_labels` is 2, but it must be at least 3"):
        run(
            files / "checkpoint",
            "--train_file",
            files / "train.jsonl",
            "--num_labels",
            "2",
            monkeypatch=monkeypatch,
        )
