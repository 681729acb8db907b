"""ONNX export: the same logits in ONNX Runtime, for any batch and length, with and without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import KINDS, MAX_LENGTH, tiny_batch, tiny_model, tiny_tokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline
from trainer.export import compare_logits, export_onnx, load_onnx, quantize_int8


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SCRIPT = Path(__file__).parent.parent / "examples" / "export_onnx.py"
NUM_LABELS = 5
SHAPES = [(1, 5), (1, MAX_LENGTH), (7, 12), (33, 6)]


def documents(size: int, length: int) -> dict[str, torch.Tensor]:
    batch = tiny_batch(size, NUM_LABELS, length=length, seed=length)
    del batch["labels"]
    return batch


@pytest.fixture(scope="module")
def model():
    return tiny_model(NUM_LABELS, classifier="mlp+similarity", thresholds=[0.3] * NUM_LABELS).train()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "fp32"
    export_onnx(model, folder, tiny_tokenizer())
    return folder


@pytest.mark.parametrize("size, length", SHAPES)
def test_onnx_gives_the_logits_of_pytorch_for_any_batch_and_length(model, exported, size, length):
    batch = documents(size, length)
    output = load_onnx(exported, num_threads=1)(**batch)
    with torch.no_grad():
        expected = model.eval()(**batch)
    for name in ("logits", "label_attention", "document_embeds"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-4, rtol=0)


def test_padding_does_not_change_the_logits_of_an_export(exported):
    onnx = load_onnx(exported, num_threads=1)
    batch = documents(2, 20)
    short = int(batch["attention_mask"][1].sum())
    alone = {name: tensor[1:, :short] for name, tensor in batch.items()}
    torch.testing.assert_close(onnx(**batch).logits[1:], onnx(**alone).logits, atol=1e-5, rtol=0)


def test_an_export_runs_in_onnx_runtime_without_torch_or_this_package(model, exported, tmp_path):
    batch = documents(3, 9)
    np.savez(tmp_path / "batch.npz", **{name: tensor.numpy() for name, tensor in batch.items()})
    script = (
        "import sys, json, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx')\n"
        "(logits,) = session.run(['logits'], dict(numpy.load(sys.argv[2])))\n"
        "assert not {'torch', 'transformers', 'modeling_sep_mldc'} & set(sys.modules)\n"
        "print(json.dumps(logits.tolist()))\n"
    )
    command = [sys.executable, "-c", script, os.fspath(exported), os.fspath(tmp_path / "batch.npz")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    torch.testing.assert_close(torch.tensor(json.loads(printed)), expected, atol=1e-4, rtol=0)


def test_an_export_carries_label_names_thresholds_and_tokenizer(model, exported):
    onnx = load_onnx(exported, num_threads=1)
    assert onnx.config.labels == model.config.labels
    assert onnx.config.thresholds == model.config.thresholds
    assert (exported / "tokenizer.json").is_file()


def test_export_does_not_write_into_a_folder_in_use(tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="Name a new folder"):
        export_onnx(tiny_model(), occupied)
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]


def test_int8_is_smaller_and_ranks_like_the_model(model, exported, tmp_path):
    quantised = quantize_int8(load_onnx(exported, num_threads=1))
    quantised.save_pretrained(tmp_path)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (exported, tmp_path)]
    assert sizes[1] < 0.4 * sizes[0]
    batches = [documents(*shape) for shape in SHAPES]
    scales = [
        value.const_value.size
        for name, value in quantised.program.graph.initializers.items()
        if "weight" in name and name.endswith("_scale")
    ]
    assert max(scales) > 1, "one scale an output channel"
    found = compare_logits(model.eval(), load_onnx(tmp_path, num_threads=1), batches)
    assert 1e-4 < found["max_difference"] and found["mean_difference"] < 0.1
    assert found["same_best_label"] > 0.8


@pytest.mark.slow
def test_an_export_that_differs_too_much_is_not_written(model, tmp_path):
    model.train()
    with pytest.raises(ValueError, match="differ by up to"):
        export_onnx(model, tmp_path / "new", tolerance=0.0)
    assert list(tmp_path.iterdir()) == [] and model.training


def test_a_comparison_needs_documents(model):
    with pytest.raises(ValueError, match="`batches` is empty"):
        compare_logits(model, None, [])


def test_the_pipeline_runs_on_an_export(model, exported, caplog):
    texts = ["a proof of the theorem " * 40, "stars", ""]
    arguments = {"tokenizer": tiny_tokenizer(), "batch_size": 2}
    expected = MultiLabelDocumentClassificationPipeline(model=model.eval(), **arguments)(texts, top_k=2)
    pipe = MultiLabelDocumentClassificationPipeline(model=load_onnx(exported, num_threads=1), **arguments)
    found = pipe(texts, top_k=2)
    assert found[2] == [] and len(found[0]) == 2
    for rows, others in zip(found, expected):
        assert [row["label"] for row in rows] == [row["label"] for row in others]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in others], abs=1e-4)
    assert "Dropping inputs" not in caplog.text
    with pytest.raises(ValueError, match="has no gradients"):
        pipe(texts[0], top_k=1, return_explanation=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoder_exports_with_equal_logits(kind, tmp_path):
    model = tiny_model(kind=kind, pooling="cls" if kind == "roberta" else "mean", label_attention=kind != "electra")
    export_onnx(model, tmp_path / "onnx")
    batches = [documents(*shape) for shape in SHAPES]
    assert compare_logits(model, load_onnx(tmp_path / "onnx", num_threads=1), batches)["max_difference"] <= 1e-4


@pytest.mark.slow
def test_lexical_scores_are_exported_with_the_model(tmp_path):
    model = tiny_model(NUM_LABELS, num_lexical_features=3, encoder_max_length=6).eval()
    torch.manual_seed(0)
    lexical = model.lexical
    lexical.idf.uniform_(0.5, 2.0)
    lexical.feature_ids.random_(0, len(lexical.idf))
    lexical.feature_weights.normal_()
    lexical.scale.fill_(2.0)
    onnx = export_onnx(model, tmp_path / "onnx")
    batch = documents(3, 11)
    with torch.no_grad():
        torch.testing.assert_close(onnx(**batch).logits, model(**batch).logits, atol=1e-4, rtol=0)
        lexical.scale.fill_(0.0)
        assert not torch.allclose(onnx(**batch).logits, model(**batch).logits, atol=0.1)


def test_the_command_writes_an_export_and_says_how_far_it_is_off(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "documents.jsonl").write_text('{"text": "a proof"}\n{"text": "stars and galaxy"}\n')
    command = [sys.executable, str(SCRIPT), str(tmp_path / "checkpoint"), str(tmp_path / "onnx"), "--int8"]
    done = subprocess.run(
        [*command, "--documents", str(tmp_path / "documents.jsonl")], check=True, capture_output=True, text=True
    )
    assert "int8. On 2 documents: logits differ by" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.strip().endswith("Name a new folder for the export.")
