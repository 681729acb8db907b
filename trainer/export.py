"""ONNX export of trained models, through the exporters of transformers (extra `onnx`)."""

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers.exporters import (
    ExportedModel,
    ExportFormat,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

from modeling_sep_mldc import SepMldcForMultiLabelClassification


TOLERANCE = 1e-4
# Batch size and length of what an export is checked on: one token, one document, and shapes unlike the traced one.
TRACED_SHAPE = (2, 9)
CHECKED_SHAPES = ((1, 1), (1, 24), (5, 7), (3, 48))


class OnnxSepMldc(ExportedModel):
    """
    A model in ONNX Runtime: called like the model it was exported from, it returns a `SepMldcOutput`, and
    `MultiLabelDocumentClassificationPipeline(model=..., tokenizer=...)` takes it for everything but explanations.
    """

    @cached_property
    def backbone(self) -> torch.nn.Module:
        """The encoder's structure without weights: the pipeline reads from it how long a document may be."""
        with torch.device("meta"):
            return AutoModel.from_config(self.config.backbone_config)

    def get_input_embeddings(self):
        raise ValueError(
            "An ONNX graph has no gradients, which explaining a label by tokens needs. Load the checkpoint it was exported from."
        )

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **ignored):
        """`SepMldcOutput` of documents (B, T). What else tokenizers and pipelines pass has no place in the graph."""
        return super().__call__(input_ids=input_ids, attention_mask=attention_mask)


def export_onnx(
    model: SepMldcForMultiLabelClassification,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    int8: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportedModel:
    """
    Write a model as ONNX, for any number of documents of any length, and check it in ONNX Runtime.

    The graph takes `input_ids` and `attention_mask` of shape `(B, T)` (int64, T up to the encoder's limit) and returns
    `logits` (B, L), `label_attention` (B, L; absent without label attention) and `document_embeds` (B, d) in float32.
    The folder holds `model.onnx`, its weights `model.onnx.data`, `config.json` with the label names and thresholds, and the
    tokenizer. It appears when all of it is written and checked, or not at all.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): a model in float32.
        folder (`str` or path): where to write; must not exist, or be empty.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved along.
        int8 (`bool`, defaults to `False`): quantise with [`quantize_int8`] after the check.
        tolerance (`float`, defaults to 1e-4): largest difference to a logit of PyTorch, before quantisation.

    Returns:
        [`~transformers.exporters.ExportedModel`]: the export, called like the model; as [`load_onnx`] returns it.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is not installed.
        ValueError: the folder is in use, the model is not in float32, or its logits differ by more than `tolerance`.

    Example:

    ```python
    export_onnx(model, "exported", tokenizer)
    exported = load_onnx("exported")
    exported(**tokenizer(["A proof."], return_tensors="pt")).logits
    ```
    """
    _check_packages()
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Name a new folder for the export.")
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
        batches = [_random_documents(model, *shape) for shape in CHECKED_SHAPES]
        difference = compare_logits(model, exported, batches)["max_difference"]
    finally:
        model.train(was_training)
    if not difference <= tolerance:
        raise ValueError(
            f"Logits in ONNX Runtime differ by up to {difference:.1e} from PyTorch's, more than `tolerance` ({tolerance:.1e}). "
            "Nothing was written; try another version of onnxruntime, or a larger `tolerance`."
        )
    if int8:
        exported = quantize_int8(exported)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written = Path(scratch, "export")
        exported.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        written.rename(folder)
    return exported


def quantize_int8(exported: ExportedModel) -> ExportedModel:
    """
    A copy of an export with weights in int8, one scale an output channel, and activations in int8 with scales found as it
    runs (dynamic quantisation of ONNX Runtime). Its logits differ: see [`compare_logits`].
    """
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    component = exported.components["model"]
    with _quiet():
        program = quantizer.quantize(component.program, {}, ExportFormat.ONNX)
    return type(exported)({"model": replace(component, program=program)}, exported.export_format, exported.config)


def load_onnx(folder: str, num_threads: int | None = None, **kwargs) -> OnnxSepMldc:
    """
    An export, ready to run; called with what a tokenizer returns as PyTorch tensors, or given to the pipeline.

    Args:
        folder (`str`): a folder that [`export_onnx`] wrote, or a Hub name.
        num_threads (`int`, *optional*): threads for one operation; ONNX Runtime takes every core of the machine if not given.
        kwargs: passed on to `ExportedModel.from_pretrained` (`device`, `revision`, `token`, ...).

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is not installed.
        OSError: there is no export.
    """
    _check_packages()
    if num_threads is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        kwargs["session_options"] = options
    return OnnxSepMldc.from_pretrained(folder, **kwargs)


@torch.no_grad()
def compare_logits(
    model: SepMldcForMultiLabelClassification, exported: ExportedModel, batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """
    How far an export is from its model, over batches of documents.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): in eval mode.
        exported ([`~transformers.exporters.ExportedModel`]): its export.
        batches (iterable of `dict`): `input_ids` and `attention_mask` of shape `(B, T)`.

    Returns:
        `dict`: `max_difference`, `mean_difference` of the logits (absolute), and `same_best_label`, the share of documents
        whose best label is the same.

    Raises:
        ValueError: there are no batches.
    """
    largest, total, size, same, documents = 0.0, 0.0, 0, 0, 0
    for batch in batches:
        expected = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.cpu()
        logits = exported(**batch).logits.cpu()
        difference = (logits - expected).abs()
        # A NaN is the largest difference there is; `max` of Python would lose it.
        largest = torch.maximum(torch.tensor(largest), difference.max()).item()
        total, size = total + difference.sum().item(), size + difference.numel()
        same += (logits.argmax(dim=1) == expected.argmax(dim=1)).sum().item()
        documents += len(logits)
    if not documents:
        raise ValueError("`batches` is empty, but a comparison needs one batch of documents at least. Pass some.")
    return {"max_difference": largest, "mean_difference": total / size, "same_best_label": same / documents}


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


@contextlib.contextmanager
def _quiet():
    """torch tells its progress on stdout, where the caller's results go, and warns of operators that no encoder uses."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
