"""A trained model, ready to label documents: from a checkpoint or from an ONNX export."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcConfig,
    SepMldcForMultiLabelClassification,
)
from modeling_sep_mldc.static_encoder_sep_mldc import StaticEncoderConfig

from .labeler import StudentPipeline


def load_pipeline(
    name_or_path: str | os.PathLike,
    revision: str = "main",
    device: str | torch.device | None = None,
    **parameters: Any,
) -> MultiLabelDocumentClassificationPipeline:
    """
    The pipeline of a trained model; of a student of [`~trainer.distill`], one that labels lists of short texts much faster.

    Args:
        name_or_path (`str`): folder or Hub name of a checkpoint, or folder of an ONNX export ([`~trainer.export_onnx`]).
        revision (`str`, defaults to `"main"`): branch, tag or commit of a Hub model.
        device (`str`, *optional*): `"cpu"`, `"cuda"`, `"cuda:1"`, ...; the best that is available if not given. An ONNX export runs on the
            CPU.
        parameters: of the pipeline, such as `top_k` or `threshold`.

    Raises:
        ValueError: the model is not a SEP-MLDC model, the checkpoint is damaged, the device cannot be used, or a parameter is
            out of range.
        OSError: there is no such model.
        ImportError: an ONNX export is named, but ONNX Runtime is not installed.

    Example:

    ```python
    classify = load_pipeline("outputs/quickstart", top_k=3)
    classify("A new proof of an old theorem.")
    ```
    """
    name = os.fspath(name_or_path)
    _check_device(device)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type != SepMldcConfig.model_type:
            raise ValueError(
                f"{name} is a {config.model_type} model, but a trained {SepMldcConfig.model_type} model is needed. Train one with "
                "examples/run_mldc.py."
            )
        if is_onnx_export(name):
            from .export import load_onnx

            model: Any = load_onnx(name, num_threads=torch.get_num_threads())
            device = "cpu"
        else:
            model = SepMldcForMultiLabelClassification.from_pretrained(name, revision=revision).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # libraries raise many kinds of errors for damaged checkpoints
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {reason}). Save or download the checkpoint again."
        ) from error
    kind: type[MultiLabelDocumentClassificationPipeline] = MultiLabelDocumentClassificationPipeline
    if isinstance(model, torch.nn.Module) and config.backbone_config.model_type == StaticEncoderConfig.model_type:
        kind = StudentPipeline
    return kind(model=model, tokenizer=tokenizer, device=device, **parameters)


def is_onnx_export(name_or_path: str | os.PathLike) -> bool:
    """Whether this is a folder that [`~trainer.export_onnx`] wrote."""
    return Path(name_or_path, "export.json").is_file()


def _check_device(device: str | torch.device | None) -> None:
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {str(device)!r}, which cannot be used ({reason}). Use 'cpu'.") from None
