"""Checks of loaded weights, with error messages that say what is wrong with a checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn


@contextmanager
def explained_loading_errors(name: str | os.PathLike | None, kwargs: dict[str, Any]) -> Iterator[None]:
    """
    Context manager that converts errors from loading the weights of `name` into one-sentence errors. `kwargs` are those of `from_pretrained`.

    Raises:
        OSError: there are no safetensors weights, or a weight file is damaged.
        ValueError: a pickle is requested, or the shapes of the weights do not match the configuration.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            f"`use_safetensors=False` would let the pickled weights of {name} run any code, so they are not loaded. Ask "
            "the author of the checkpoint to save it with `save_pretrained`, which writes safetensors."
        )
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"The weights of {name} cannot be read ({error}): a file is truncated or damaged. Copy or download it again."
        ) from error
    except OSError as error:
        if name is not None and os.path.isfile(os.path.join(name, "export.json")):
            raise OSError(
                f"{name} is an ONNX export, which contains no PyTorch weights. Load it with `trainer.export.load_onnx`, or load the "
                "checkpoint that it was exported from."
            ) from error
        if "file named" in str(error) and "safetensors" in str(error):
            raise OSError(
                f"{name} has no safetensors weights. Pickled weights (`pytorch_model.bin`) can run any code when they are "
                "loaded, so they are not supported: save them again with `save_pretrained`."
            ) from error
        raise
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                f"The weights of {name} do not match its `config.json`, which specifies a different number of labels or a different "
                "encoder (the report above lists the tensors). Use the `config.json` that they were saved with."
            ) from error
        raise


def check_loading_report(name: str | os.PathLike | None, report: dict[str, Any]) -> None:
    """
    Reject weights with missing or unexpected tensors.

    Args:
        name (`str` or `os.PathLike`): the checkpoint.
        report (`dict`): what `from_pretrained(..., output_loading_info=True)` returns with the model.
    """
    for problem, text in (
        ("missing_keys", "lack {} of the model ({}), which would be initialized at random"),
        ("unexpected_keys", "contain {} that the model of its `config.json` does not have ({})"),
    ):
        keys = sorted(report[problem])
        if keys:
            count = "1 tensor" if len(keys) == 1 else f"{len(keys)} tensors"
            named = ", ".join(f"`{key}`" for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(
                f"The weights of {name} {text.format(count, named)}. Use the files that were saved together; to start from a "
                "pretrained encoder, use `from_backbone`; to change the architecture on purpose, pass "
                "`ignore_mismatched_sizes=True`."
            )


def check_finite(name: str | os.PathLike | None, model: nn.Module) -> None:
    """Reject weights and buffers of a model loaded from `name` that contain NaN or infinite values."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for tensor_name, tensor in tensors:
            tensor = tensor.detach()
            # Offloaded weights are on the meta device; 8-bit weights do not support `sum`.
            if tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2:
                continue
            # Unlike `isfinite`, a sum needs no memory. It may overflow, so tensors with a sum that is not finite are checked in full.
            if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"`{tensor_name}` of {name} contains NaN or infinite values, so its scores are meaningless: training "
                    "diverged. Load an earlier checkpoint."
                )
