#!/usr/bin/env python
"""
Speed of attention in bfloat16 on a CPU: PyTorch's kernel compared with `float32_attention`, which training steps use.

    python benchmarks/cpu_attention.py
    python benchmarks/cpu_attention.py --smoke      # only checks that it runs; timings are meaningless

Two measurements, on one thread, of both in turn; figures are medians, ratios those of neighboring repeats. *kernel*: forward and backward of the attention
of a MiniLM layer (12 heads of 32 dimensions), by length. *step*: a training step of MiniLM with two trained layers, whose lower
layers are read from the cache, as by default on a CPU.
"""

import argparse
import json
import platform
import statistics
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import training_speed
from torch import nn
from training_speed import seconds
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.cpu_attention import float32_attention


CONTEXTS = {"bfloat16": nullcontext, "float32": float32_attention}


def attend(context, inputs: list[torch.Tensor], gradient: torch.Tensor) -> None:
    """Forward and backward of the attention of one layer."""
    with context(), torch.autocast("cpu", torch.bfloat16):
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Module(), *inputs, None, is_causal=False)
        torch.autograd.grad(output, inputs, gradient)


def attention_inputs(length: int, batch_size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value of 12 heads, and the gradient of the output."""
    shape = (batch_size, length, 12, 32)
    inputs = [torch.randn(shape).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    return inputs, torch.randn(shape).bfloat16()


def step(context, trainer, batch) -> None:
    with mock.patch("trainer.sep_mldc_trainer.float32_attention", context):
        training_speed.step(trainer, batch)


def upper_layers(options):
    """The configuration of the layers that are trained: those of MiniLM's six that are not frozen, without dropout."""
    config = training_speed.backbone_config(options.smoke)
    config.num_hidden_layers = 2
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


def compare(function, options, *args) -> dict[str, float]:
    times = {name: [] for name in CONTEXTS}
    for repeat in range(options.repeats + 1):
        for name, context in CONTEXTS.items():
            taken = seconds(function, context, *args)
            if repeat:  # the first repeat is a warm-up
                times[name].append(taken)
    ratios = [slow / fast for slow, fast in zip(*times.values(), strict=True)]
    return {
        **{f"{name}_seconds": statistics.median(taken) for name, taken in times.items()},
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 96, 128, 256, 512])
    parser.add_argument("--step_lengths", type=int, nargs="+", default=[96, 256])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--labels", type=int, default=76)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "cpu_attention.json"))
    options = parser.parse_args()
    if options.smoke:
        options.lengths, options.step_lengths, options.batch_size, options.repeats = [8], [8], 2, 1
    options.dtype, options.classifier = "bf16", "mlp+similarity"
    torch.set_num_threads(1)
    rows = []
    for length in options.lengths:
        row = {
            "what": "kernel",
            "length": length,
            **compare(attend, options, *attention_inputs(length, options.batch_size)),
        }
        rows.append(row)
        print(row, flush=True)
    for length in options.step_lengths:
        options.length = length
        config = upper_layers(options)
        with mock.patch("training_speed.backbone_config", return_value=config):
            trainer = training_speed.build("embedding tokens", options, options.labels)
        trainer.args.label_loss_weight = trainer.args.document_loss_weight = 0.0
        # The states of lower layers come from a cache: nothing below the trained layers gets a gradient.
        trainer.bare_model().backbone.get_input_embeddings().requires_grad_(False)
        batch = training_speed.make_batches(options, options.labels, 1)[0]
        row = {"what": "step", "length": length, **compare(step, options, trainer, batch)}
        rows.append(row)
        print(row, flush=True)
    if options.smoke:
        assert {row["what"] for row in rows} == {"kernel", "step"}
        return
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    result = {"settings": settings, "hardware": platform.machine(), "torch": torch.__version__, "rows": rows}
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
