#!/usr/bin/env python
"""
Documents per second of a trained model on the CPU: PyTorch in float32, bf16 and compiled, ONNX in float32 and int8, and the
bare encoder with a linear layer; with P@1, micro F1 and changed label sets of each.

    python benchmarks/inference_speed.py --checkpoint outputs/quickstart
    python benchmarks/inference_speed.py --checkpoint outputs/arxiv --test_file test.jsonl.gz --calibration_file train.jsonl.gz \
        --systems fp32 onnx_int8 onnx_int8_whole openvino_int8 --labels      # other int8 variants, see `OTHERS`
    python benchmarks/inference_speed.py --smoke               # a tiny encoder: only checks that it runs

All systems run in one process, one batch of each in turn, on the same test documents; speeds are medians, and `x bare` is
the median of the ratios of neighboring batches, so that a slowdown of the machine affects all of them equally. With one thread, time is that of the
processor. For label counts other than the checkpoint's, its encoder is used with random labels: only the speed is measured.
Label sets are those at the tuned thresholds; `changed` is the share of documents whose label set differs from that of PyTorch in float32.
"""

import argparse
import copy
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertConfig
from transformers.exporters import (
    NNCFOpenVINOQuantizer,
    NNCFQuantizationConfig,
    NNCFWeightCompressionConfig,
    OnnxConfig,
    OnnxExporter,
    OpenVINOConfig,
    OpenVINOExporter,
    onnxruntime_fusions,
)

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer import export
from trainer.data import encode_labels, load_splits
from trainer.data.collator import SepMldcDataCollator
from trainer.export import export_onnx, load_onnx, quantize_int8
from trainer.metrics import ranking_metrics


SYSTEMS = ("bare", "fp32", "bf16", "compiled", "onnx", "onnx_int8")
# Further variants for `--systems`.
# `whole`: one run for the whole batch; `single`: one for each document; `operator`: with ONNX Runtime's operator for layer normalization;
# `fused`: attention and layer normalization in ONNX Runtime's operators; `nbits`: 8-bit weights with a scale for 128 inputs;
# `openvino_int8`: NNCF, calibrated on documents of `--calibration_file`; `openvino_int8_weights`: int8 weights alone;
# `torch_int8`: dynamic quantization of PyTorch; `torchao_int8`: that of torchao.
OTHERS = (
    "onnx_int8_whole",
    "onnx_int8_single",
    "onnx_int8_operator",
    "onnx_int8_fused",
    "onnx_nbits",
    "openvino",
    "openvino_int8",
    "openvino_int8_weights",
    "torch_int8",
    "torchao_int8",
)
TEST_FILE = Path(__file__).parent.parent / "examples" / "data" / "test.jsonl.gz"
Batch = dict[str, torch.Tensor]


class BareEncoder(nn.Module):
    """The model's own encoder and pooling, then one linear layer."""

    def __init__(self, model: SepMldcForMultiLabelClassification):
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(model.config.hidden_size, model.config.num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.model.encode(input_ids, attention_mask)[0])


def smoke_model(num_labels: int) -> SepMldcForMultiLabelClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = SepMldcConfig(
        backbone_config=BertConfig(vocab_size=1000, **sizes), num_labels=num_labels, classifier="mlp+similarity"
    )
    return SepMldcForMultiLabelClassification(config).eval()


def with_labels(model: SepMldcForMultiLabelClassification, num_labels: int) -> SepMldcForMultiLabelClassification:
    """The same encoder and kind of head over random labels."""
    values = {name: getattr(model.config, name) for name in ("pooling", "classifier", "label_attention")}
    other = SepMldcForMultiLabelClassification(
        SepMldcConfig(backbone_config=model.config.backbone_config, num_labels=num_labels, **values)
    )
    other.backbone.load_state_dict(model.backbone.state_dict())
    generator = torch.Generator().manual_seed(0)
    other.set_label_embeddings(torch.randn(num_labels, model.config.hidden_size, generator=generator))
    return other.eval()


def build(
    system: str, model: SepMldcForMultiLabelClassification, threads: int, folder: str, calibration: list[Batch]
) -> Callable:
    """A function from a batch to logits (B, L)."""
    if system.startswith("onnx"):
        return build_onnx(system, model, threads, folder)
    if system.startswith("openvino"):
        return build_openvino(system, model, threads, calibration)
    if system == "bare":
        return BareEncoder(model).eval()
    if system == "compiled":
        model = torch.compile(model, dynamic=True)
    if system == "torch_int8":
        model = copy.deepcopy(model)
        model.backbone = torch.ao.quantization.quantize_dynamic(model.backbone, {nn.Linear}, dtype=torch.qint8)
    if system == "torchao_int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy.deepcopy(model)
        quantize_(model.backbone, Int8DynamicActivationInt8WeightConfig())
    if system == "bf16":

        def in_bf16(**batch):
            with torch.autocast("cpu", torch.bfloat16):
                return model(**batch).logits

        return in_bf16
    return lambda **batch: model(**batch).logits


def build_onnx(system: str, model: SepMldcForMultiLabelClassification, threads: int, folder: str) -> Callable:
    path = os.path.join(folder, system)
    if system == "onnx_int8_fused":
        config = OnnxConfig(dynamic=True, ort_fusions="cpu")
        # transformers splits attention up again, because it considers this slower. Here it is kept.
        steps = onnxruntime_fusions._STEPS
        onnxruntime_fusions._STEPS = tuple(
            step for step in steps if step[0] is not onnxruntime_fusions._unfuse_attentions
        )
        try:
            exported = OnnxExporter().export(model, export._random_documents(model, 2, 9), config)
        finally:
            onnxruntime_fusions._STEPS = steps
    else:
        plain = os.path.join(folder, "onnx")
        if not os.path.exists(plain):
            export_onnx(model, plain)
        exported = load_onnx(plain, num_threads=threads)
    if system == "onnx_nbits":
        program = onnx.load(os.path.join(folder, "onnx", "model.onnx"))
        settings = {"block_size": 128, "is_symmetric": True, "accuracy_level": 4, "bits": 8}
        algorithm = DefaultWeightOnlyQuantConfig(**settings)
        quantizer = MatMulNBitsQuantizer(program, **settings, algo_config=algorithm)
        quantizer.process()
        exported.save_pretrained(path)
        onnx.save_model(
            quantizer.model.model, f"{path}/model.onnx", save_as_external_data=True, location="model.onnx.data"
        )
    elif system != "onnx":
        spread = export._decompose_layer_norms
        if system == "onnx_int8_operator":
            export._decompose_layer_norms = lambda program: None
        try:
            quantize_int8(exported).save_pretrained(path)
        finally:
            export._decompose_layer_norms = spread
    exported = load_onnx(path, num_threads=threads)
    if system in ("onnx_int8_whole", "onnx_int8_operator"):
        exported.num_threads = 10**6
    if system == "onnx_int8_single":
        exported.num_threads = 0
    return lambda **batch: exported(**batch).logits


def build_openvino(
    system: str, model: SepMldcForMultiLabelClassification, threads: int, calibration: list[Batch]
) -> Callable:
    quantizer = None
    if system == "openvino_int8":
        quantizer = NNCFOpenVINOQuantizer(NNCFQuantizationConfig(), calibration_dataset=calibration)
    elif system == "openvino_int8_weights":
        quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig())
    config = OpenVINOConfig(dynamic=True, quantizer=quantizer)
    exported = OpenVINOExporter().export(model, export._random_documents(model, 2, 9), config)
    exported.to("cpu", config={"INFERENCE_NUM_THREADS": threads})
    return lambda **batch: exported(**batch).logits.clone()


def read_documents(options, model, tokenizer, file: str | None = None) -> list[dict]:
    """Documents of the file with `input_ids` and `label_indices`; random ones for the smoke run."""
    if options.smoke:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 17, (options.documents,), generator=generator).tolist()
        return [
            {
                "input_ids": torch.randint(1, 1000, (length,), generator=generator).tolist(),
                "label_indices": [i % model.config.num_labels],
            }
            for i, length in enumerate(lengths)
        ]
    documents = encode_labels(load_splits(test_file=file)["test"], model.config.label2id)
    documents = documents.select(range(min(options.documents, len(documents))))
    encoded = tokenizer(list(documents["text"]), truncation=True, max_length=options.length)
    return [
        {"input_ids": ids, "label_indices": labels}
        for ids, labels in zip(encoded["input_ids"], documents["label_indices"])
    ]


def make_batches(documents: list[dict], size: int) -> list[Batch]:
    """Right-padded batches of neighboring documents."""
    batches = []
    for start in range(0, len(documents), size):
        ids = [torch.tensor(document["input_ids"]) for document in documents[start : start + size]]
        mask = [torch.ones_like(row) for row in ids]
        batches.append(
            {
                "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
                "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
            }
        )
    return batches


@torch.inference_mode()
def measure_speed(systems: dict[str, Callable], batches: list[Batch], rounds: int, description: str) -> dict:
    """Median documents per second of each system, and the median of its speed over the bare encoder's on the same batch."""
    for run in systems.values():
        for batch in batches[:2]:  # two lengths: the compiled model now knows that they differ
            run(**batch)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in systems}
    for number in tqdm(range(rounds), desc=description, unit="round"):
        batch = batches[number % len(batches)]
        for name, run in systems.items():
            start = clock()
            run(**batch)
            times[name].append(clock() - start)
    size = len(batches[0]["input_ids"])
    return {
        name: {
            "documents_per_second": size / statistics.median(taken),
            "speed_over_bare": ratio(times["bare"], taken),
            **({"speed_over_fp32": ratio(times["fp32"], taken)} if "fp32" in times else {}),
        }
        for name, taken in times.items()
    }


def ratio(others: list[float], own: list[float]) -> float:
    return statistics.median(other / taken for other, taken in zip(others, own))


@torch.inference_mode()
def measure_quality(
    systems: dict[str, Callable], documents: list[dict], model: SepMldcForMultiLabelClassification
) -> dict[str, dict[str, float]]:
    """
    P@1, micro F1 and the share of changed label sets of each system but the bare encoder, whose linear layer is untrained.
    Documents run in batches of 8, as they come.
    """
    targets = SepMldcDataCollator(None, model.config.num_labels).multi_hot(
        [document["label_indices"] for document in documents]
    )
    found, expected = {}, None
    for name, run in systems.items():
        if name != "bare":
            batches = tqdm(make_batches(documents, 8), desc=f"quality of {name}", unit="batch", leave=False)
            scores = torch.cat([run(**batch).float() for batch in batches])
            found[name] = {"p@1": ranking_metrics(scores, targets, ks=(1,))["p@1"]}
            if not model.config.is_ranking:
                sets = model.label_sets(model.probabilities(scores)).bool()
                expected = sets if name == "fp32" else expected
                hits = (sets & targets.bool()).sum().item()
                found[name]["f1_micro"] = 2 * hits / max(sets.sum().item() + targets.sum().item(), 1)
                if expected is not None:
                    found[name]["changed"] = (sets != expected).any(dim=1).float().mean().item()
    return found


def print_table(rows: list[dict]) -> None:
    columns = {"documents_per_second": 1, "speed_over_bare": 2, "speed_over_fp32": 2}
    shares = ("p@1", "f1_micro", "changed")
    print(
        f"\n{'labels':>8}{'batch':>7}  {'system':<23}{'documents/s':>12}{'x bare':>8}{'x fp32':>8}{'P@1':>8}{'F1':>8}{'changed':>9}"
    )
    for row in rows:
        for name, entry in row["systems"].items():
            cells = [f"{entry[key]:.{digits}f}" if key in entry else "-" for key, digits in columns.items()]
            cells += [f"{100 * entry[key]:.2f}" if key in entry else "-" for key in shares]
            widths = (12, 8, 8, 8, 8, 9)
            print(
                f"{row['labels']:>8}{row['batch_size']:>7}  {name:<23}"
                + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--checkpoint", help="folder or Hub name of a trained model")
    parser.add_argument("--labels", type=int, nargs="*", default=[3201], help="further label counts")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS + OTHERS)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--length", type=int, default=128, help="maximum number of tokens per document")
    parser.add_argument("--documents", type=int, default=500, help="test documents for P@1")
    parser.add_argument("--test_file", default=str(TEST_FILE))
    parser.add_argument("--calibration_file", default=None, help="of openvino_int8: the last of its documents")
    parser.add_argument("--rounds", type=int, default=12, help="batches per system and setting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.smoke:
        options.labels, options.batch_sizes, options.documents, options.rounds = [], [1, 4], 16, 2
        options.systems = [
            name for name in SYSTEMS if name != "compiled"
        ]  # compiling takes a minute and adds nothing to this check
    elif options.checkpoint is None:
        parser.error("specify a trained model with --checkpoint; `make quickstart` makes one in outputs/quickstart")
    if "compiled" in options.systems and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        print("compiled: left out, because torch.compile needs a C++ compiler")
        options.systems.remove("compiled")
    if "bare" not in options.systems:
        options.systems.insert(0, "bare")
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.smoke:
        model, tokenizer = smoke_model(20), None
    else:
        model = SepMldcForMultiLabelClassification.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    documents = read_documents(options, model, tokenizer, options.test_file)
    calibration = []
    if "openvino_int8" in options.systems:
        calibration = make_batches(read_documents(options, model, tokenizer, options.calibration_file)[-200:], 4)
    if len(documents) < max(options.batch_sizes):
        raise SystemExit(
            f"inference_speed.py: there are {len(documents)} test documents, fewer than the batch of {max(options.batch_sizes)}. "
            "Specify a larger `--test_file`, or smaller `--batch_sizes`."
        )
    rows = []
    for num_labels in [model.config.num_labels, *options.labels]:
        own = num_labels == model.config.num_labels
        this = model if own else with_labels(model, num_labels)
        with tempfile.TemporaryDirectory() as folder:
            systems = {}
            for name in options.systems:
                try:
                    systems[name] = build(name, this, options.threads, folder, calibration)
                except (ImportError, RuntimeError) as error:
                    if name not in OTHERS:
                        raise
                    print(f"{name}: left out: {str(error).splitlines()[0]}")
            quality = measure_quality(systems, documents, this) if own else {}
            for size in options.batch_sizes:
                # A batch of one takes a fraction of the time and varies more: more rounds.
                rounds = options.rounds * (4 if size == 1 and not options.smoke else 1)
                whole = make_batches(documents, size)[: len(documents) // size]
                speed = measure_speed(systems, whole, rounds, f"{num_labels} labels, batch {size}")
                for name, entry in speed.items():
                    entry |= quality.get(name, {})
                rows.append({"labels": num_labels, "batch_size": size, "systems": speed})
                print_table(rows[-1:])
    if options.smoke and options.output is None:
        expected = set(SYSTEMS) - {"compiled"}
        assert len(rows) == 2 and all(set(row["systems"]) == expected for row in rows)
        assert all("p@1" in entry for name, entry in rows[0]["systems"].items() if name != "bare")
        return
    result = {
        "settings": {
            name: value
            for name, value in vars(options).items()
            if name not in ("checkpoint", "output", "test_file", "calibration_file")
        },
        "hardware": f"{export.processor_features()}, {options.threads} threads",
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "encoder": {
            "type": model.config.backbone_config.model_type,
            "layers": model.config.backbone_config.num_hidden_layers,
            "hidden_size": model.config.hidden_size,
        },
        "num_train_documents": model.config.num_train_documents,
        "rows": rows,
    }
    path = Path(options.output or Path(__file__).parent / "results" / "inference_speed.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
