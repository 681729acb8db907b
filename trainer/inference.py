"""A trained model, ready to label documents: from a checkpoint or from an ONNX export."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcConfig,
    SepMldcForMultiLabelClassification,
)
from modeling_sep_mldc.static_encoder_sep_mldc import StaticEncoderConfig

from .backbones import is_onnx_export, loading_problem
from .labeler import StudentPipeline


def load_pipeline(
    name_or_path: str | os.PathLike,
    revision: str = "main",
    device: str | torch.device | None = None,
    **parameters: Any,
) -> MultiLabelDocumentClassificationPipeline:
    """
    Load the pipeline of a trained model. For a student of [`~trainer.distill`], it labels lists of short texts much faster.

    Args:
        name_or_path (`str`): folder or Hub name of a checkpoint, or folder of an ONNX export ([`~trainer.export_onnx`]).
        revision (`str`, defaults to `"main"`): branch, tag or commit of a Hub model.
        device (`str`, *optional*): `"cpu"`, `"cuda"`, `"cuda:1"`, ...; by default, the best available device. ONNX exports run on the CPU.
        parameters: parameters of the pipeline, such as `top_k` or `threshold`.

    Raises:
        ValueError: the model is not a SEP-MLDC model, the checkpoint is damaged, the device cannot be used, or a parameter is
            out of range.
        OSError: there is no such model.
        ImportError: an ONNX export is given, but ONNX Runtime is not installed.

    Example:

    ```python
    classify = load_pipeline("outputs/quickstart", top_k=3)
    classify("A new proof of an old theorem.")
    ```
    """
    name = os.fspath(name_or_path)
    _check_device(device)
    try:
        config = _trained_config(name, revision)
        if is_onnx_export(name):
            from .export import load_onnx

            model: Any = load_onnx(name, num_threads=torch.get_num_threads())
            device = "cpu"
        else:
            model = SepMldcForMultiLabelClassification.from_pretrained(name, revision=revision).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        check_vocabulary(tokenizer, name)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # libraries raise many types of exceptions for damaged checkpoints
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {reason}). Save or download the checkpoint again."
        ) from error
    kind: type[MultiLabelDocumentClassificationPipeline] = MultiLabelDocumentClassificationPipeline
    if isinstance(model, torch.nn.Module) and config.backbone_config.model_type == StaticEncoderConfig.model_type:
        kind = StudentPipeline
    return kind(model=model, tokenizer=tokenizer, device=device, **parameters)


def load_trained(name_or_path: str) -> tuple[SepMldcForMultiLabelClassification, Any]:
    """
    Load the model, in float32, and the tokenizer of a trained checkpoint.

    Raises:
        ValueError: it is not a SEP-MLDC checkpoint, or it is damaged.
        OSError: there is no such checkpoint.
    """
    _trained_config(name_or_path)
    model = SepMldcForMultiLabelClassification.from_pretrained(name_or_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    check_vocabulary(tokenizer, name_or_path)
    return model, tokenizer


def check_vocabulary(tokenizer: Any, name: str) -> None:
    """
    Check that a tokenizer has a vocabulary. If the vocabulary file is missing, `AutoTokenizer` silently creates a tokenizer with only
    special tokens, to which every word is unknown.

    Raises:
        ValueError: there are only special tokens.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"The tokenizer of {name} has {len(tokenizer)} special tokens and no others: the file of its vocabulary, such as tokenizer.json, "
            "is missing. Save or download it again."
        )


def _trained_config(name: str, revision: str = "main") -> Any:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The model {name!r} cannot be loaded: {loading_problem(name, error)} Specify a folder with a trained model, or a model of the "
            "Hub."
        ) from error
    if config.model_type != SepMldcConfig.model_type:
        raise ValueError(
            f"{name} is a {config.model_type} model, but a trained {SepMldcConfig.model_type} model is needed. Train one with "
            "examples/run_mldc.py."
        )
    return config


def _check_device(device: str | torch.device | None) -> None:
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {str(device)!r}, which cannot be used ({reason}). Use 'cpu'.") from None
