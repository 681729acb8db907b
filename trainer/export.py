"""ONNX export of trained models, through the exporters of transformers (extra `onnx`)."""

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.exporters import (
    ExportedModel,
    ExportFormat,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
    exporter_dynamo,
)
from transformers.exporters import utils as exporter_utils

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from modeling_sep_mldc.label_sets_sep_mldc import LabelSetsMixin

from .backbones import is_onnx_export, loading_problem


TOLERANCE = 1e-4
# Batch sizes and lengths for checking an export: a single token, a single document, and shapes that differ from the traced one.
TRACED_SHAPE = (2, 9)
CHECKED_SHAPES = ((1, 1), (1, 24), (5, 7), (3, 48))
# 2 * 255 * 64 < 2**15: the sum of two products of a uint8 and such a weight fits into 16 bits, in which AVX2 adds them.
MAX_INT8_WEIGHT = 64
# Tokens per run and thread. With more, the activations do not fit into the caches of a core.
TOKENS_PER_RUN = 512
# CPU features that determine which integer kernels ONNX Runtime uses, as spelled by Linux.
INTEGER_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
README = """\
# ONNX export, {precision}

Written by `export_onnx` of sep-mldc with transformers {transformers} and onnxruntime {onnxruntime}.
Load it with `trainer.export.load_onnx`, or with ONNX Runtime alone: `model.onnx` takes `input_ids` and `attention_mask` and returns `logits`.
`config.json` has the label names and thresholds.

## Checked against PyTorch in float32

On {num_documents} {kind}, on a processor of type {processor}:

| | |
|---|---|
| documents with a different label set at the thresholds of the model | {label_sets} |
| documents with a different best label | {best_labels} |
| difference of a logit: mean, largest | {mean_difference:.1e}, {max_difference:.1e} |
"""
INT8_README = """
## int8

Weights are stored in 7 bits (-64 to 64) with one scale per output channel; activations are quantized at run time.
With 8-bit weights, processors without VNNI instructions (most x86 desktops and laptops before 2021, and many since) saturate in the
16-bit sums of the products and return wrong logits. With 7 bits no sum can saturate, so every processor computes the same integers.
"""


class OnnxSepMldc(LabelSetsMixin, ExportedModel):
    """
    A model in ONNX Runtime. It is called like the original model, returns a `SepMldcOutput`, and can be passed to
    `MultiLabelDocumentClassificationPipeline(model=..., tokenizer=...)`. Explanations cannot separate lexical scores from the encoder,
    because the graph returns only their sum.
    """

    probabilities = SepMldcForMultiLabelClassification.probabilities
    num_threads = 1

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **ignored: Any) -> Any:
        """
        `SepMldcOutput` of documents (B, T). Other inputs from tokenizers and pipelines are ignored.

        On a CPU, documents of similar length are run together, `TOKENS_PER_RUN` tokens per thread, to avoid padding.
        """
        if self.device.type != "cpu" or not len(input_ids):
            return super().__call__(input_ids=input_ids, attention_mask=attention_mask)
        positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
        lengths = ((attention_mask != 0) * positions).amax(dim=1).clamp_min(1)
        order = lengths.argsort(descending=True, stable=True)
        runs, start = [], 0
        while start < len(order):
            length = int(lengths[order[start]])
            rows = order[start : start + max(TOKENS_PER_RUN * self.num_threads // length, 1)]
            inputs = {"input_ids": input_ids[rows, :length], "attention_mask": attention_mask[rows, :length]}
            runs.append(super().__call__(**inputs))
            start += len(rows)
        back = order.argsort()
        return type(runs[0])(**{name: torch.cat([run[name] for run in runs])[back] for name in runs[0]})


def export_onnx(
    model: SepMldcForMultiLabelClassification,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    int8: bool = False,
    tolerance: float = TOLERANCE,
    batches: Iterable[dict[str, torch.Tensor]] | None = None,
) -> ExportedModel:
    """
    Export a model to ONNX, for batches of any size and length, and check it in ONNX Runtime.

    The graph takes `input_ids` and `attention_mask` of shape `(B, T)` (int64, T up to the encoder's limit) and returns
    `logits` (B, L), `label_attention` (B, L; absent without label attention) and `document_embeds` (B, d) in float32.
    The folder holds `model.onnx`, its weights `model.onnx.data`, `config.json` with the label names and thresholds, the
    tokenizer, and `README.md`, which reports how much the export differs from the model, on which documents and which CPU. The folder is
    created only after everything has been written and checked.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): a model in float32.
        folder (`str` or path): where to write; must not exist, or be empty.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved with the model.
        int8 (`bool`, defaults to `False`): quantize with [`quantize_int8`] after the check in float32.
        tolerance (`float`, defaults to 1e-4): maximum allowed difference from PyTorch's logits, before quantization.
        batches (iterable of `dict`, *optional*): documents for the comparison in `README.md`, as `input_ids` and `attention_mask`
            of shape `(B, T)`; random tokens if not given.

    Returns:
        [`~transformers.exporters.ExportedModel`]: the export, as returned by [`load_onnx`]; it is called like the model.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is not installed.
        ValueError: the folder is in use, the model is another one or not in float32, or its logits differ by more than `tolerance`.

    Example:

    ```python
    export_onnx(model, "exported", tokenizer)
    exported = load_onnx("exported")
    exported(**tokenizer(["A proof."], return_tensors="pt")).logits
    ```
    """
    _check_packages()
    folder = check_folder(folder)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != SepMldcConfig.model_type:
        raise ValueError(
            f"`model` is a {type(model).__name__}, but a trained SEP-MLDC model is needed. Load one with "
            "`SepMldcForMultiLabelClassification.from_pretrained`."
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"The model is in {model.dtype}, but an export is in float32. Load it with `dtype=torch.float32`, and use int8 for a "
            "smaller one."
        )
    was_training = model.training
    model.eval()
    try:
        with _quiet():
            exported = OnnxExporter().export(model, _random_documents(model, *TRACED_SHAPE), OnnxConfig(dynamic=True))
        random_batches = [_random_documents(model, *shape) for shape in CHECKED_SHAPES]
        difference = compare_logits(model, exported, random_batches)["max_difference"]
    finally:
        model.train(was_training)
    if not difference <= tolerance:
        raise ValueError(
            f"Logits in ONNX Runtime differ by up to {difference:.1e} from PyTorch's, more than `tolerance` ({tolerance:.1e}). "
            "Nothing was written; try another version of onnxruntime, or a larger `tolerance`."
        )
    if int8:
        exported = quantize_int8(exported)
    try:
        found = compare_logits(model.eval(), exported, random_batches if batches is None else batches)
    finally:
        model.train(was_training)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written = Path(scratch, "export")
        exported.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        kind = "random documents" if batches is None else "documents"
        Path(written, "README.md").write_text(_readme(found, kind, int8), encoding="utf-8")
        written.rename(folder)
    return exported


def check_folder(folder: str | os.PathLike) -> Path:
    """
    The folder as a path.

    Raises:
        ValueError: it exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Specify a new folder for the export.")
    return folder


def quantize_int8(exported: ExportedModel) -> ExportedModel:
    """
    Create a copy of an export with int8 weights, one scale per output channel, and activations that are quantized at run time (dynamic
    quantization of ONNX Runtime). The logits change; see [`compare_logits`]. A guarantee of the thresholds is removed.

    Weights use only 7 of the 8 bits. CPUs without VNNI add two products of an activation (uint8) and a weight (int8) in 16 bits. With 8-bit
    weights, these sums could overflow, and logits would be wrong on such CPUs, even if they are correct on the exporting machine. With 7
    bits, no sum can overflow, and all CPUs compute the same integers.
    See https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8.

    Layer normalization is exported as elementary operators, which are faster in ONNX Runtime than its fused operator.

    Raises:
        RuntimeError: the installed version of ONNX Runtime left weights outside the 7-bit range.
    """
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True))
    component = exported.components["model"]
    with _quiet():
        program = quantizer.quantize(component.program, {}, ExportFormat.ONNX)
    _decompose_layer_norms(program)
    for name, weights in integer_weights(program).items():
        if abs(weights.astype("int32")).max(initial=0) > MAX_INT8_WEIGHT:
            raise RuntimeError(
                f"{name} contains int8 weights from {weights.min()} to {weights.max()}, but beyond +-{MAX_INT8_WEIGHT} they overflow "
                "on processors without VNNI. Install another version of onnxruntime."
            )
    config = copy.deepcopy(exported.config)
    config.drop_guarantee("int8 weights change scores")
    return type(exported)({"model": replace(component, program=program)}, exported.export_format, config)


def _decompose_layer_norms(program: Any) -> None:
    """
    Replace layer normalization by elementary operators. ONNX Runtime computes those with vector instructions, but its fused operator for
    CPUs without them, which takes a tenth of the run time of an int8 model. `Reciprocal` is used instead of a division, so that ONNX
    Runtime does not recognize the pattern and fuse it again.
    """
    from onnx_ir.tape import Tape

    for node in list(program.graph):
        axis = node.attributes.get_int("axis", -1)
        if node.op_type != "LayerNormalization" or node.domain or axis != -1 or len(node.outputs) > 1:
            continue
        (states, weight, *bias), output = node.inputs, node.outputs[0]
        tape = Tape()
        last = tape.op("Constant", [], attributes={"value_ints": [-1]})
        epsilon = tape.op("Constant", [], attributes={"value_float": node.attributes.get_float("epsilon", 1e-5)})
        centered = tape.op("Sub", [states, _mean(tape, states, last)])
        variance = tape.op("Add", [_mean(tape, tape.op("Mul", [centered, centered]), last), epsilon])
        scaled = tape.op("Mul", [centered, tape.op("Reciprocal", [tape.op("Sqrt", [variance])])])
        scaled = tape.op("Mul", [scaled, weight])
        new = tape.op("Add", [scaled, bias[0]]) if bias and bias[0] is not None else scaled
        program.graph.insert_before(node, tape.nodes)
        output.replace_all_uses_with(new, replace_graph_outputs=True)
        program.graph.remove(node, safe=True)


def _mean(tape: Any, values: Any, axis: Any) -> Any:
    return tape.op("ReduceMean", [values, axis], attributes={"keepdims": 1})


def integer_weights(program: Any) -> dict[str, Any]:
    """The constant operands of integer matrix products in a quantized graph: arrays (inputs, outputs) by name."""
    constants = program.graph.initializers
    names = {
        node.inputs[1].name
        for node in program.graph
        if node.op_type
        in ("MatMulInteger", "ConvInteger", "QAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    }
    return {name: constants[name].const_value.numpy() for name in names if name in constants}


def load_onnx(folder: str, num_threads: int | None = None, **kwargs: Any) -> OnnxSepMldc:
    """
    Load an export. Call it with a tokenizer's output as PyTorch tensors, or pass it to the pipeline.

    Args:
        folder (`str`): a folder that [`export_onnx`] wrote, or a Hub name.
        num_threads (`int`, *optional*): number of threads per operation; by default, ONNX Runtime uses all cores of the machine.
        kwargs: passed on to `ExportedModel.from_pretrained` (`device`, `revision`, `token`, ...).

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is not installed.
        OSError: the folder or repository has no export.
    """
    _check_packages()
    if num_threads is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        kwargs["session_options"] = options
    try:
        exported = OnnxSepMldc.from_pretrained(folder, **kwargs)
    except OSError as error:
        problem = loading_problem(str(folder), error)
        if os.path.isdir(folder) and not is_onnx_export(folder):
            problem = "the folder has no export.json, so `export_onnx` did not write it."
        raise OSError(
            f"The ONNX export {str(folder)!r} cannot be loaded: {problem} Specify an export; a checkpoint is loaded with `from_pretrained`."
        ) from error
    exported.num_threads = num_threads or os.cpu_count() or 1
    return exported


@torch.no_grad()
def compare_logits(
    model: SepMldcForMultiLabelClassification, exported: ExportedModel, batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """
    How much an export differs from its model, over batches of documents.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): in eval mode.
        exported ([`~transformers.exporters.ExportedModel`]): its export.
        batches (iterable of `dict`): `input_ids` and `attention_mask` of shape `(B, T)`.

    Returns:
        `dict`: `max_difference` and `mean_difference` of the logits (absolute); `same_best_label` and `same_label_set`, the
        shares of documents whose best label and whose label set at the thresholds of the model (0.5 if it has none) are the
        same; `num_documents`. For a model that only ranks labels (trained with the softmax loss, not calibrated),
        `same_label_set` is `None`.

    Raises:
        ValueError: there are no batches.
    """
    largest, total, size, same_best, same_set, documents = 0.0, 0.0, 0, 0, 0, 0
    for batch in batches:
        expected = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.cpu()
        logits = exported(**batch).logits.cpu()
        difference = (logits - expected).abs()
        # NaN must count as the largest difference, but Python's `max` would lose it.
        largest = torch.maximum(torch.tensor(largest), difference.max()).item()
        total, size = total + difference.sum().item(), size + difference.numel()
        same_best += (logits.argmax(dim=1) == expected.argmax(dim=1)).sum().item()
        same_set += (_label_sets(model, logits) == _label_sets(model, expected)).all(dim=1).sum().item()
        documents += len(logits)
    if not documents:
        raise ValueError("`batches` is empty, but a comparison needs at least one batch of documents. Pass some.")
    return {
        "max_difference": largest,
        "mean_difference": total / size,
        "same_best_label": same_best / documents,
        "same_label_set": None if model.config.is_ranking else same_set / documents,
        "num_documents": documents,
    }


def _label_sets(model: SepMldcForMultiLabelClassification, logits: torch.Tensor) -> torch.Tensor:
    """The labels of each document, (B, L), of logits (B, L)."""
    return model.label_sets(model.probabilities(logits))


def _readme(found: dict[str, Any], kind: str, int8: bool) -> str:
    """README.md of an export: what was compared, on which documents and which processor."""
    count = found["num_documents"]

    def different(same: float | None) -> str:
        if same is None:
            return "none: the model ranks labels and has no probabilities"
        return f"{round((1 - same) * count)} of {count} ({100 * (1 - same):.1f}%)"

    text = README.format(
        precision="int8" if int8 else "float32",
        transformers=importlib.metadata.version("transformers"),
        onnxruntime=importlib.metadata.version("onnxruntime"),
        kind=kind,
        processor=processor_features(),
        label_sets=different(found["same_label_set"]),
        best_labels=different(found["same_best_label"]),
        **{name: found[name] for name in ("num_documents", "mean_difference", "max_difference")},
    )
    return text + (INT8_README if int8 else "")


def processor_features() -> str:
    """The architecture of this machine, with the CPU features that determine how integers are multiplied."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return f"{platform.machine()} (features unknown)"
    features = [name for name in INTEGER_FEATURES if name in words]
    return f"{platform.machine()} ({', '.join(features) or 'none of ' + ', '.join(INTEGER_FEATURES)})"


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX needs the package {missing[0]}, which is not installed. Run `pip install sep-mldc[onnx]`."
        )


def _random_documents(model: SepMldcForMultiLabelClassification, size: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, (size, length), right-padded to different lengths."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    mask = (torch.arange(length) < (length - torch.arange(size) % length).unsqueeze(1)).long()
    padding = model.config.backbone_config.pad_token_id or 0
    input_ids = torch.where(mask.bool(), input_ids, padding)
    return {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}


# Warnings of transformers on every export that a user can do nothing about: tested versions of packages, and how shapes are traced.
EXPORTER_WARNINGS = (
    (exporter_utils.logger, "is experimental and patches many backend internals"),
    (exporter_dynamo.logger, "with no explicit `dynamic_shapes`"),
)


@contextlib.contextmanager
def _quiet():
    """
    Silences torch, which prints its progress to stdout, where the caller's results go, and warns about operators that no encoder uses, and the
    `EXPORTER_WARNINGS` of transformers.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            for logger, words in EXPORTER_WARNINGS:
                stack.enter_context(_without_messages(logger, words))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)


@contextlib.contextmanager
def _without_messages(logger: logging.Logger, words: str) -> Iterator[None]:
    """Within this context, a logger drops messages with these words."""

    def other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
