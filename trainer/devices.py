"""Capabilities of the machine: whether there is an accelerator, and whether it computes in bfloat16 natively."""

import ctypes
import time

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from modeling_sep_mldc.encoder_sep_mldc import cpu_computes_bfloat16


def has_accelerator() -> bool:
    """Whether PyTorch can use a GPU, an NPU, a TPU, ..."""
    return torch.accelerator.is_available() or is_torch_xla_available()


def is_bfloat16_native(use_cpu: bool = False) -> bool:
    """
    Whether the device computes in bfloat16 instead of emulating it: a GPU that supports it, or a processor with the instructions.

    Args:
        use_cpu (`bool`, defaults to `False`): check the CPU even if there is an accelerator.
    """
    if has_accelerator() and not use_cpu:
        return is_torch_xla_available() or is_torch_bf16_gpu_available()
    return cpu_computes_bfloat16()


def bfloat16_slowdown(size: int = 512, repeats: int = 7) -> float:
    """
    Measure how many times as long a matrix product takes in bfloat16 as in float32 on this CPU: below 1 if the CPU has bfloat16
    instructions, far above 1 if it emulates them. Takes milliseconds, or up to a few seconds with emulation.

    Args:
        size (`int`, defaults to 512): rows and columns of the matrices.
        repeats (`int`, defaults to 7): measurements of each; the fastest one counts, because other programs can only slow it down.
    """
    matrices = {dtype: torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    fastest = dict.fromkeys(matrices, float("inf"))
    for repeat in range(repeats + 1):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            if repeat:  # the first one is a warm-up
                fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    return fastest[torch.bfloat16] / fastest[torch.float32]


def release_freed_memory() -> None:
    """
    Return memory of this process that is free to the operating system, where the C library is glibc.

    Batches of many lengths leave holes of many sizes on the heap, and glibc keeps them: a process that trained on documents of up to 512
    tokens grew to 3.7 GiB, of which 1.5 GiB were in use. A call takes some tenths of a second.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows
        return
