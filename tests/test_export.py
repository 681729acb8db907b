"""ONNX export: the same logits in ONNX Runtime, for any batch and length, with and without this package."""

import copy
import json
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripts import EXAMPLES, run_example
from tiny_models import KINDS, MAX_LENGTH, WORDS, tiny_batch, tiny_model, tiny_tokenizer
from transformers.exporters import OnnxRuntimeDynamicConfig
from transformers.utils import logging as transformers_logging

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcForMultiLabelClassification,
    SepMldcOutput,
)
from modeling_sep_mldc.static_encoder_sep_mldc import StaticEncoderConfig
from trainer import export
from trainer.export import compare_logits, export_onnx, integer_weights, load_onnx, quantize_int8


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.numeric

LABELS = ["science", "biology", "genetics", "sports", "cells", "robots", "stars"]
NUM_LABELS = len(LABELS)
SHAPES = [(1, 5), (1, MAX_LENGTH), (7, 12), (33, 6)]


def documents(size: int, length: int) -> dict[str, torch.Tensor]:
    batch = tiny_batch(size, NUM_LABELS, length=length, seed=length)
    del batch["labels"]
    return batch


@pytest.fixture(scope="module")
def model():
    """Two labels were added after training, labels have parents, and thresholds a guarantee."""
    model = tiny_model(
        id2label=dict(enumerate(LABELS[:5])),
        classifier="mlp+similarity",
        token_attention=True,
        token_attention_size=8,
        hierarchy="closure",
        label_parents={"genetics": ["biology"], "biology": ["science"]},
    )
    model.add_labels({"robots": "robot speech", "stars": "galaxy"}, tiny_tokenizer())
    model.config.thresholds = [0.3] * NUM_LABELS
    model.config.threshold_info = {"objective": "recall:0.8", "global_threshold": 0.3, "guarantee": "On average"}
    return model.train()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "fp32"
    export_onnx(model, folder, tiny_tokenizer())
    return folder


def test_an_export_and_a_checkpoint_are_not_taken_for_each_other(exported, tmp_path):
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(OSError, match="has no export.json, .* a checkpoint is loaded with `from_pretrained`"):
        load_onnx(tmp_path / "checkpoint")
    with pytest.raises(OSError, match="there is no such folder"):
        load_onnx(tmp_path / "missing")
    with pytest.raises(OSError, match="is an ONNX export, .* Load it with `trainer.export.load_onnx`"):
        SepMldcForMultiLabelClassification.from_pretrained(exported)


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


def test_an_export_returns_the_label_sets_of_its_model_with_parents_and_constraints(model, exported):
    texts = ["the market of cells", "robots search images", "a galaxy of stars", "proof of the theorem", "speech data"]
    both = copy.deepcopy(model).eval(), load_onnx(exported, num_threads=1)
    found = [label_sets(one, texts) for one in both]
    assert found[0] == found[1]
    both[0].config.hierarchy = None
    assert label_sets(both[0], texts) != found[0], "no set is changed by a parent, so nothing is tested"
    both[0].config.hierarchy = "closure"
    for one in both:
        one.config.label_constraints = [{"labels": LABELS, "at_most": 2}]
    constrained = [label_sets(one, texts) for one in both]
    assert constrained[0] == constrained[1] != found[0]


def label_sets(model, texts):
    pipe = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer(), device="cpu")
    return [{row["label"] for row in rows} for rows in pipe(texts)]


def test_an_export_in_float32_keeps_a_guarantee_and_int8_does_not(model, exported, quantized):
    assert "guarantee" in load_onnx(exported, num_threads=1).config.threshold_info
    assert "guarantee" not in quantized.config.threshold_info and quantized.config.thresholds is not None
    assert "guarantee" in model.config.threshold_info


def test_labels_that_were_added_later_are_scored_by_an_export(model, exported):
    batch = documents(3, 9)
    with torch.no_grad():
        expected = model.eval()(**batch).logits[:, 5:]
    assert model.config.num_added_labels == 2 and expected.std() > 0.1
    torch.testing.assert_close(load_onnx(exported, num_threads=1)(**batch).logits[:, 5:], expected, atol=1e-4, rtol=0)


def test_a_student_is_exported_with_its_lexical_scores_and_the_limit_of_its_encoder(tmp_path):
    encoder = StaticEncoderConfig(vocab_size=len(tiny_tokenizer()), hidden_size=16, initializer_range=1.0)
    student = tiny_model(4, backbone_config=encoder, num_lexical_features=3, encoder_max_length=6).eval()
    torch.manual_seed(0)
    student.lexical.idf.uniform_(0.5, 2.0)
    student.lexical.feature_ids.random_(0, len(student.lexical.idf))
    student.lexical.feature_weights.normal_()
    student.lexical.scale.fill_(2.0)
    export_onnx(student, tmp_path / "onnx")
    batch = documents(3, 20)
    with torch.no_grad():
        expected = student(**batch).logits
    torch.testing.assert_close(load_onnx(tmp_path / "onnx")(**batch).logits, expected, atol=1e-4, rtol=0)


def test_an_export_carries_label_names_thresholds_and_tokenizer(model, exported):
    onnx = load_onnx(exported, num_threads=1)
    assert onnx.config.labels == model.config.labels
    assert onnx.config.thresholds == model.config.thresholds
    assert (exported / "tokenizer.json").is_file()


def test_export_does_not_write_into_a_folder_in_use(tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="Specify a new folder"):
        export_onnx(tiny_model(), occupied)
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]


def test_another_model_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="`model` is a BertModel, but a trained SEP-MLDC model is needed"):
        export_onnx(tiny_model().backbone, tmp_path / "exported")


@pytest.fixture(scope="module")
def quantized(exported):
    return quantize_int8(load_onnx(exported, num_threads=1))


def test_int8_is_smaller_and_ranks_like_the_model(model, exported, quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (exported, tmp_path)]
    assert sizes[1] < 0.4 * sizes[0]
    batches = [documents(*shape) for shape in SHAPES]
    scales = [
        value.const_value.size
        for name, value in quantized.program.graph.initializers.items()
        if "weight" in name and name.endswith("_scale")
    ]
    assert max(scales) > 1, "one scale per output channel"
    found = compare_logits(model.eval(), load_onnx(tmp_path, num_threads=1), batches)
    assert 1e-4 < found["max_difference"] and found["mean_difference"] < 0.1
    assert found["same_best_label"] > 0.8


@pytest.mark.parametrize("kind", ["bert", "modernbert"])  # ModernBERT has no bias there
def test_layer_norms_of_int8_are_elementary_operators_that_compute_the_same(kind, tmp_path):
    model = tiny_model(kind=kind).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            parameter.data.normal_()
    plain = export_onnx(model, tmp_path / "fp32")
    quantize_int8(plain).save_pretrained(tmp_path / "int8")
    assert "LayerNormalization" in {node.op_type for node in plain.program.graph}, "the original is not changed"
    export._decompose_layer_norms(plain.program)
    plain.to("cpu")
    batch = documents(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-4, rtol=0)
    assert "LayerNormalization" not in {node.op_type for node in plain.program.graph}
    # Nor does ONNX Runtime put it back.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = os.fspath(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(os.fspath(tmp_path / "int8" / "model.onnx"), options)
    onnx = pytest.importorskip("onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node}
    assert "ReduceMean" in operators and not any("LayerNormalization" in name for name in operators)


def test_documents_of_a_batch_run_in_groups_of_similar_length_and_come_back_in_order(model, exported, monkeypatch):
    onnx = load_onnx(exported, num_threads=1)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    batch = {name: tensor[shuffled] for name, tensor in documents(9, 20).items()}
    runner, shapes = onnx.runners["model"], []

    def record(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return runner(**inputs)

    record.metadata, record.device = runner.metadata, runner.device
    onnx._runners = {"model": record}
    with torch.no_grad():
        expected = model.eval()(**batch)
    for tokens in (512, 40):
        monkeypatch.setattr(export, "TOKENS_PER_RUN", tokens)
        shapes.clear()
        found = onnx(**batch)
        for name in ("logits", "label_attention", "document_embeds"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
        assert sum(size for size, _ in shapes) == 9 and all(size * length <= tokens for size, length in shapes)
    assert len({length for _, length in shapes}) > 2


def products_without_vnni(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 (B, K) times int8 (K, N) as AVX2 multiplies them: two products are added with saturation to 16 bits."""
    products = activations.astype(np.int32)[:, :, None] * weights.astype(np.int32)[None]
    if products.shape[1] % 2:
        products = np.pad(products, ((0, 0), (0, 1), (0, 0)))
    pairs = products[:, 0::2] + products[:, 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(axis=1)


def test_int8_products_are_exact_on_processors_without_vnni(quantized):
    weights = integer_weights(quantized.program)
    assert len(weights) >= 12, "every matrix of the two layers"
    generator = np.random.default_rng(0)
    for name, matrix in weights.items():
        assert matrix.dtype == np.int8 and -64 <= matrix.min() and matrix.max() <= 64, name
        # The largest activations next to the largest weights of each column are the worst case.
        activations = generator.choice(np.array([0, 1, 254, 255], dtype=np.uint8), (64, len(matrix)))
        activations[0] = 255
        exact = activations.astype(np.int32) @ matrix.astype(np.int32)
        np.testing.assert_array_equal(products_without_vnni(activations, matrix), exact, err_msg=name)


def test_8_bit_weights_would_saturate_on_processors_without_vnni():
    activations, weights = np.full((1, 2), 255, dtype=np.uint8), np.full((2, 1), 127, dtype=np.int8)
    assert products_without_vnni(activations, weights) == 2**15 - 1 < 2 * 255 * 127


def test_weights_beyond_7_bits_are_not_exported(exported, monkeypatch):
    monkeypatch.setattr(
        export, "OnnxRuntimeDynamicConfig", lambda reduce_range, **others: OnnxRuntimeDynamicConfig(**others)
    )
    with pytest.raises(RuntimeError, match="overflow on processors without VNNI"):
        quantize_int8(load_onnx(exported, num_threads=1))


@pytest.fixture(scope="module")
def commanded(model, tmp_path_factory):
    """What the command prints, its export in int8, and the documents that it compared on."""
    folder = tmp_path_factory.mktemp("command")
    model.save_pretrained(folder / "checkpoint")
    tiny_tokenizer().save_pretrained(folder / "checkpoint")
    texts = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(20)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = ("--documents", folder / "documents.jsonl")
    done = run_example("export_onnx", folder / "checkpoint", folder / "onnx", "--int8", *files)
    assert done.returncode == 0, done.stderr
    return done, folder / "onnx", [dict(tiny_tokenizer()(texts, padding=True, return_tensors="pt"))]


def test_only_the_warnings_that_every_export_has_are_dropped(tmp_path, caplog):
    transformers_logging.warning_once.cache_clear()
    export_onnx(tiny_model(), tmp_path / "onnx")
    assert [record.getMessage() for record in caplog.records if "exporter" in record.pathname] == []
    for logger, words in export.EXPORTER_WARNINGS:
        with export._quiet():
            logger.warning(f"A message that {words}.")
            logger.warning("another message")
        logger.warning(f"Later, {words}.")
    assert [record.getMessage()[:7] for record in caplog.records if record.pathname == __file__] == [
        "another",
        "Later, ",
    ] * 2


def test_the_command_writes_an_export_and_says_how_far_it_is_off(commanded):
    done, folder, _ = commanded
    printed = r"int8. On 20 documents: [0-9.]+% have the same label set, [0-9.]+% the same best label"
    assert re.search(printed, done.stdout)
    again = run_example("export_onnx", folder.parent / "checkpoint", folder, "--int8")
    assert again.returncode == 2 and again.stderr.strip().endswith("Specify a new folder for the export.")


def test_the_readme_of_an_export_says_what_was_measured_on_which_processor(model, exported, commanded):
    readme = (exported / "README.md").read_text()
    assert "On 10 random documents" in readme and platform.machine() in readme and "float32" in readme
    assert "different label set at the thresholds of the model | 0 of 10 (0.0%)" in readme
    _, folder, batches = commanded
    readme = (folder / "README.md").read_text()
    batch = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    found = compare_logits(model.eval(), load_onnx(folder, num_threads=1), [batch])
    changed = round(20 * (1 - found["same_label_set"]))
    assert f"different label set at the thresholds of the model | {changed} of 20" in readme
    assert "On 20 documents" in readme and "int8 weights" not in readme and "no sum can saturate" in readme


def test_a_comparison_counts_the_documents_whose_label_set_is_different(model):
    batch = documents(7, 12)
    with torch.no_grad():
        output = model.eval()(**batch)
    probabilities = torch.sigmoid(output.logits)
    moved = output.logits.clone()
    cells = LABELS.index("cells")  # no other label depends on it
    moved[3, cells] = -20 if probabilities[3, cells] >= 0.3 else 20  # across its threshold
    found = compare_logits(model, lambda **inputs: SepMldcOutput(logits=moved), [batch])
    assert found["same_label_set"] == pytest.approx(6 / 7) and found["num_documents"] == 7


def test_a_model_that_ranks_has_no_label_sets_to_compare():
    model = tiny_model(NUM_LABELS, classification_loss="softmax").eval()
    assert compare_logits(model, model, [documents(7, 12)])["same_label_set"] is None


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
    (explanation,) = pipe("a proof of the theorem", top_k=1, return_explanation=True)["explanations"].values()
    parts = [explanation[name] for name in ("bias", "lexical", "encoder", "remainder")]
    assert sum(parts) == pytest.approx(explanation["logit"], abs=1e-4) and len(explanation["words"]) == 5


def test_an_export_labels_files_as_its_checkpoint_does_and_another_export_does_not_resume_it(
    model, exported, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import predict

    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    texts = ["a galaxy of stars", "robots search images", "", "proof of the theorem"] * 3
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    answers = []
    for name in (exported, tmp_path / "checkpoint"):
        output = tmp_path / "labels.jsonl"
        command = ["--model_name_or_path", str(name), "--input_file", str(tmp_path / "texts.txt")]
        command += ["--output_file", str(output), "--look_ahead", "5", "--num_workers", "1"]
        predict.main([*command, "--overwrite_output_file", "True"])
        answers.append([json.loads(line)["labels"] for line in output.read_text().splitlines()])
    assert [[one["label"] for one in labels] for labels in answers[0]] == [
        [one["label"] for one in labels] for labels in answers[1]
    ]
    scores = [[one["score"] for labels in each for one in labels] for each in answers]
    assert scores[0] and scores[0] == pytest.approx(scores[1], abs=1e-4)
    # The output is now the checkpoint's; the export must not continue it.
    command[1] = str(exported)
    with pytest.raises(SystemExit, match="model weights"):
        predict.main([*command, "--resume", "True"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoder_exports_with_equal_logits(kind, tmp_path):
    model = tiny_model(kind=kind, pooling="cls" if kind == "roberta" else "mean", label_attention=kind != "electra")
    export_onnx(model, tmp_path / "onnx")
    batches = [documents(*shape) for shape in SHAPES]
    assert compare_logits(model, load_onnx(tmp_path / "onnx", num_threads=1), batches)["max_difference"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("num_bigrams", [0, 50])
def test_lexical_scores_are_exported_with_the_model(tmp_path, num_bigrams):
    model = tiny_model(
        NUM_LABELS, num_lexical_features=3, num_lexical_bigrams=num_bigrams, encoder_max_length=6
    ).eval()
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
