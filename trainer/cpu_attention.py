"""Attention in bfloat16 on a CPU, with a fast backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def float32_attention() -> Iterator[None]:
    """
    Context manager in which the encoders of transformers compute `sdpa` attention for bfloat16 tensors on a CPU in float32, if gradients
    are needed and there is no dropout. Everything else is unchanged.

    PyTorch's kernel for the backward pass is slower in bfloat16 than in float32, even on CPUs with native bfloat16: forward and
    backward take 1.3 to 4.3 times as long (PyTorch 2.13, 32 to 512 tokens, `benchmarks/cpu_attention.py`).
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: torch.nn.Module, query: torch.Tensor, *tensors: Any, dropout: float = 0.0, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        # With dropout, PyTorch uses another kernel.
        if not needs_gradient or query.device.type != "cpu" or query.dtype != torch.bfloat16 or dropout:
            return sdpa(module, query, *tensors, dropout=dropout, **kwargs)
        kwargs = {name: _to_float32(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            output, _ = sdpa(module, query.float(), *map(_to_float32, tensors), dropout=dropout, **kwargs)
        return output.to(query.dtype), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
