"""LoRA adapters that are trained instead of the encoder's weights and merged into them when the model is saved."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


# Saved next to the merged weights of a checkpoint, for resuming. Not a name that transformers or PEFT would load automatically.
ADAPTERS_NAME = "lora_adapters.safetensors"


def add_lora_adapters(model: Any, rank: int, alpha: int | None = None, dropout: float = 0.0) -> None:
    r"""
    Add LoRA adapters (Hu et al., 2022, LoRA: Low-rank adaptation of large language models, ICLR) to the trainable linear layers of
    the encoder, through PEFT. The encoder's own weights are frozen: each layer $W x$ becomes $W x + \frac{\alpha}{r} B A x$, and only
    A and B are trained. The head and the label embeddings are trained as usual.

    The state dict of the model holds the merged weights $W + \frac{\alpha}{r} B A$ under their ordinary names, so that saved checkpoints
    load without PEFT and inference costs the same. To freeze layers, freeze them first: frozen layers get no adapters.

    Args:
        model (`SepMldcForMultiLabelClassification`): changed in place.
        rank (`int`): r, at least 1.
        alpha (`int`, *optional*): α; twice the rank if not given.
        dropout (`float`, defaults to 0.0): dropout probability before A.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: a rank below 1, the model already has adapters, or the encoder has no trainable linear layer.

    Example:

    ```python
    model = SepMldcForMultiLabelClassification.from_backbone("roberta-base", tokenizer, labels)
    add_lora_adapters(model, rank=16)
    SepMldcTrainer(model, SepMldcTrainingArguments("outputs", learning_rate=5e-4), train_dataset=train).train()
    ```
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA adapters need the package peft. Run `pip install sep-mldc[lora]`.") from error
    if rank < 1:
        raise ValueError(f"`rank` is {rank}, but it must be at least 1. Use 16, for example.")
    if lora_rank(model) is not None:
        raise ValueError(f"The model already has adapters of rank {lora_rank(model)}. Add them once.")
    kinds = (nn.Linear, _conv1d())
    targets = [
        name
        for name, module in model.backbone.named_modules()
        if isinstance(module, kinds) and module.weight.requires_grad and "pooler" not in name
    ]
    if not targets:
        raise ValueError(
            "The encoder has no trainable linear layer that could get an adapter. Freeze fewer layers, or add no adapters."
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, target_modules=targets
    )
    peft.inject_adapter_in_model(config, model.backbone)
    model.saves_merged_adapters = True
    model.register_state_dict_post_hook(_merge)
    model.register_load_state_dict_pre_hook(_split)


def lora_rank(model: Any) -> int | None:
    """Rank of the adapters of a model, or `None` if it has none."""
    return next((layer.r["default"] for _, layer in _adapted_layers(model)), None)


def save_adapters(model: Any, folder: str | os.PathLike) -> None:
    """Write the adapters, if there are any, into a checkpoint with merged weights. They are needed for resuming."""
    weights = _adapter_weights(model)
    if weights:
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, Path(folder, ADAPTERS_NAME)
        )


def load_adapters(model: Any, folder: str | os.PathLike) -> None:
    """
    Load the adapters that [`save_adapters`] wrote. To be called before the merged weights of the same checkpoint are loaded.

    Raises:
        ValueError: the checkpoint has other adapters, or none.
    """
    weights = _adapter_weights(model)
    if not weights:
        return
    path = Path(folder, ADAPTERS_NAME)
    stored = load_file(path) if path.exists() else {}
    if {name: weight.shape for name, weight in stored.items()} != {
        name: weight.shape for name, weight in weights.items()
    }:
        raise ValueError(
            f"{os.fspath(folder)} does not hold the adapters of this model. Resume with the same rank and number of frozen layers, or "
            "start a new run without `resume_from_checkpoint`."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored[name])
    model.adapters_are_loaded = True


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D  # the linear layers of GPT-2

    kind: type[nn.Module] = Conv1D
    return kind


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of each layer with an adapter from [`add_lora_adapters`]; empty for a model wrapped by PEFT."""
    if not getattr(model, "saves_merged_adapters", False):
        return
    for name, module in model.backbone.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield f"backbone.{name}", module


def _adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(layer, part)["default"].weight
        for name, layer in _adapted_layers(model)
        for part in ("lora_A", "lora_B")
    }


@torch.no_grad()
def _merge(model: Any, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: Any) -> None:
    """State dict hook: replaces base weights and adapters by merged weights under their ordinary names."""
    merged = {}
    for name, layer in _adapted_layers(model):
        own = {key: state_dict.pop(key) for key in [*state_dict] if key.startswith(f"{prefix}{name}.")}
        for part, value in own.items():
            if ".base_layer." in part:
                value = value + layer.get_delta_weight("default").to(value) if part.endswith(".weight") else value
                merged[part.replace(".base_layer.", ".")] = value
    state_dict.update(merged)


@torch.no_grad()
def _split(model: Any, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """
    Load hook: turns merged weights into base weights by subtracting the adapters' contribution. Adapters that were not loaded before are
    reinitialized; in both cases, the model computes the same as the merged weights.
    """
    loaded = model.__dict__.pop("adapters_are_loaded", False)
    for name, layer in _adapted_layers(model):
        if not loaded:
            layer.lora_B["default"].weight.zero_()
        base = layer.base_layer
        for part, value in base.state_dict().items():
            merged = state_dict.pop(f"{prefix}{name}.{part}", None)
            if merged is not None and part == "weight" and loaded:
                delta = layer.get_delta_weight("default")
                # Use the frozen weights themselves if they differ only by rounding, so that a resumed run is exact.
                same = torch.allclose(merged.to(value), value + delta.to(value), rtol=1e-5, atol=1e-6)
                merged = value if same else merged.to(value) - delta.to(value)
            state_dict[f"{prefix}{name}.base_layer.{part}"] = value if merged is None else merged
        for part in ("lora_A", "lora_B"):
            state_dict[f"{prefix}{name}.{part}.default.weight"] = getattr(layer, part)["default"].weight
