"""Resources that a training run needs: steps, tokens, memory, disk space and time, reported before or soon after it starts."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from modeling_sep_mldc.encoder_sep_mldc import new_encoder
from modeling_sep_mldc.token_attention_sep_mldc import MAX_SCORES_ELSEWHERE, token_attention_weights

from .backbones import encoder_layers


GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
# The time of a run is estimated after this number of steps or seconds, whichever comes first, but not before the third step.
REPORT_AFTER_STEPS, REPORT_AFTER_SECONDS = 20, 30.0


@dataclass(frozen=True)
class RunNeeds:
    """
    The result of [`estimate_run`].

    Attributes:
        num_steps (`int`): optimizer steps.
        num_tokens (`int`): tokens read in all steps, without padding.
        state_bytes (`int`): memory of weights, gradients and optimizer states, which does not depend on the batch size.
        batch_bytes (`int`): memory of one batch, estimated.
        disk_bytes (`int`): checkpoints and the final model.
        kernel_bytes (`int`): main memory of the kernel matrix for fitting lexical scores after training.
        cache_bytes (`int`): disk space of the states of frozen layers, if they are cached.
    """

    num_steps: int
    num_tokens: int
    state_bytes: int
    batch_bytes: int
    disk_bytes: int
    kernel_bytes: int = 0
    cache_bytes: int = 0


def estimate_run(
    backbone_config: Any,
    num_labels: int,
    *,
    num_steps: int,
    num_tokens: int,
    batch_size: int,
    max_length: int,
    num_frozen_layers: int = 0,
    train_label_embeds: bool = True,
    half_precision: bool = False,
    num_lexical_features: int = 0,
    token_attention_size: int | None = None,
    num_checkpoints: int = 0,
    kernel_bytes: int = 0,
    num_cached_tokens: int = 0,
) -> RunNeeds:
    r"""
    Estimate the resources of a training run from its settings; no weights are loaded.

    A trained weight takes 16 bytes (weight, gradient and two moments of AdamW in float32), a frozen one 4. A token takes
    $34 H$ bytes in each trained layer with hidden size H in 16 bits (Korthikanti et al., 2022, Eq. 2 without the attention
    matrix), twice as many in 32 bits. Libraries and documents are not included.

    Args:
        backbone_config (`PreTrainedConfig`): configuration of the encoder.
        num_labels (`int`): L.
        num_steps (`int`), num_tokens (`int`): steps, and tokens in all of them.
        batch_size (`int`): documents per device and step.
        max_length (`int`): tokens of the longest document.
        num_frozen_layers (`int`, defaults to 0): lowest layers that are not trained.
        train_label_embeds (`bool`, defaults to `True`): whether the label embeddings are trained.
        half_precision (`bool`, defaults to `False`): autocast to 16 bits.
        num_lexical_features (`int`, defaults to 0): weights of the lexical scores per label.
        token_attention_size (`int`, *optional*): dimensions in which labels attend to tokens. `None` without token attention.
        num_checkpoints (`int`, defaults to 0): number of checkpoints on the disk at the same time.
        kernel_bytes (`int`, defaults to 0): memory of the kernel of the lexical scores, see [`~trainer.lexical.solvers.kernel_bytes`].
        num_cached_tokens (`int`, defaults to 0): number of tokens whose states after the frozen layers are cached.

    Returns:
        [`RunNeeds`]
    """
    with torch.device("meta"):
        encoder = new_encoder(backbone_config)
    total, width = sum(p.numel() for p in encoder.parameters()), encoder.config.hidden_size
    layers = list(encoder_layers(encoder))
    above = layers[num_frozen_layers:]
    trained = sum(p.numel() for layer in above for p in layer.parameters()) if num_frozen_layers else total
    classifier = num_labels * (width + 1) + 4 * width**2
    if token_attention_size is not None:
        classifier += token_attention_weights(num_labels, width, token_attention_size)
    table = num_labels * width
    trained += classifier + (table if train_label_embeds else 0)
    weights = 4 * (total + classifier + table)
    lexical = 8 * num_labels * num_lexical_features
    # Scores and products of all tokens and labels, up to the size of a chunk. On a CPU, chunks are smaller.
    attention = 0
    if token_attention_size is not None:
        attention = 8 * min(batch_size * max_length * num_labels, MAX_SCORES_ELSEWHERE)
    per_token = 34 * width * max(len(above), 1) * (1 if half_precision else 2)
    return RunNeeds(
        num_steps,
        num_tokens,
        state_bytes=weights + 12 * trained + lexical,
        batch_bytes=batch_size * (max_length * per_token + 32 * num_labels) + attention,
        # The final model is written next to the existing one before it replaces it.
        disk_bytes=num_checkpoints * (weights + 8 * trained) + 2 * (weights + lexical),
        kernel_bytes=kernel_bytes,
        cache_bytes=num_cached_tokens * width * (2 if half_precision else 4),
    )


def available_memory(device: str | torch.device = "cpu") -> int | None:
    """Bytes of memory that are still available on the machine, in the container or on the GPU; `None` if unknown."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind != "cpu":
        return None
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((CGROUP / "memory.max").read_text())  # "max": no limit
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])
        free = min(free, limit - int((CGROUP / "memory.current").read_text()) + cached)
    return free


def free_disk_space(folder: str | os.PathLike) -> int:
    """Free bytes where `folder` is or will be."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_fits(
    needs: RunNeeds, memory: int | None, disk: int, main_memory: int | None = None, must_cache: bool = False
) -> None:
    """
    Stop a run that cannot fit before anything is computed. Only requirements that are known exactly count: memory of the weights and the optimizer, of
    the kernel matrix of the lexical scores, and disk space for what is saved.

    Args:
        needs ([`RunNeeds`]): what the run needs.
        memory (`int`, *optional*), disk (`int`): free bytes on the device and on the disk.
        main_memory (`int`, *optional*): free bytes of main memory if the device has memory of its own.
        must_cache (`bool`, defaults to `False`): whether the states of frozen layers must be cached.

    Raises:
        ValueError: memory or disk space is too small.
    """
    if memory is not None and needs.state_bytes > memory:
        raise ValueError(
            f"The weights and the optimizer need {gib(needs.state_bytes)} of memory, but {gib(memory)} are free. Freeze layers "
            "(`freeze_layers`), choose a smaller encoder, or free some memory."
        )
    free, beside = (memory, needs.state_bytes) if main_memory is None else (main_memory, 0)
    if needs.kernel_bytes and free is not None and needs.kernel_bytes + beside > free:
        raise ValueError(
            f"Lexical scores need {gib(needs.kernel_bytes)} of memory after training"
            + (f", in addition to {gib(beside)} of weights and optimizer" if beside else "")
            + f", but {gib(free)} are free. Free some memory, train on fewer documents, or leave them out with `--lexical_scores false`."
        )
    if needs.disk_bytes > disk:
        raise ValueError(
            f"Checkpoints and the model need {gib(needs.disk_bytes)} of disk space, but {gib(disk)} are free. Free some, name "
            "another `output_dir`, or keep fewer checkpoints with `save_total_limit` or `save_strategy='no'`."
        )
    if must_cache and needs.disk_bytes + needs.cache_bytes > disk:
        raise ValueError(
            f"The states of the frozen layers need {gib(needs.cache_bytes)} of disk space in addition to {gib(needs.disk_bytes)} of checkpoints and "
            f"model, but {gib(disk)} are free. Free some, specify another `output_dir`, or leave `cache_frozen_layers` out."
        )


def gib(count: float) -> str:
    """
    A number of bytes in GiB.

    Example:

    ```python
    >>> gib(3 * 2**29)
    '1.5 GiB'

    ```
    """
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / GIB:.2f} GiB"


class TimeEstimate(TrainerCallback):
    """
    Reports once, after a few steps, how long the rest of training will take and how much memory is in use. The first step, which
    includes setup and has the longest documents, does not count.

    Args:
        clock (callable, defaults to `time.monotonic`): returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.reported = clock, False
        self.start: float | None = None
        self.first = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.reported = None, False

    def on_step_end(self, args, state, control, **kwargs):
        if self.start is None:
            self.start, self.first = self.clock(), state.global_step
            return
        seconds, steps = self.clock() - self.start, state.global_step - self.first
        if self.reported or steps < 2 or (steps < REPORT_AFTER_STEPS and seconds < REPORT_AFTER_SECONDS):
            return
        self.reported = True
        if state.is_world_process_zero:
            remaining = seconds / steps * (state.max_steps - state.global_step)
            tqdm.write(
                f"Step {state.global_step} of {state.max_steps}: about {_minutes(remaining)} of training left"
                f"{', plus evaluations' if args.eval_strategy != 'no' else ''}; "
                f"{gib(_memory_in_use(args.device))} of memory in use."
            )


def _minutes(seconds: float) -> str:
    return f"{round(seconds)} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
