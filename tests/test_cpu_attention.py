"""Attention in bfloat16 on a CPU: computed in float32 where that is faster, and nowhere else."""

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import NUM_LABELS, make_trainer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.cpu_attention import float32_attention


class Recorder(TorchFunctionMode):
    """The dtypes in which attention is computed, with and without gradients."""

    def __init__(self):
        super().__init__()
        self.dtypes = {True: set(), False: set()}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            self.dtypes[torch.is_grad_enabled() and args[0].requires_grad].add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def tensors(dtype=torch.bfloat16, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, 5, 4, generator=generator).bfloat16().to(dtype).requires_grad_(requires_grad) for _ in "qkv"
    ]


def attend(inputs, mask=None, **arguments):
    """Output and dtype of the attention of transformers in the context."""
    with Recorder() as recorder, torch.autocast("cpu", torch.bfloat16), float32_attention():
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Module(), *inputs, mask, is_causal=False, **arguments)
    (dtype,) = recorder.dtypes[True] | recorder.dtypes[False]
    return output, dtype


@pytest.mark.parametrize("kind", ["none", "boolean", "float"])
def test_outputs_and_gradients_are_those_of_float32(kind):
    mask = None
    if kind != "none":
        keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
        keep[0, ..., 3:] = False
        mask = keep if kind == "boolean" else torch.zeros(keep.shape).masked_fill(~keep, -1e4).bfloat16()
    inputs, references = tensors(), tensors(torch.float32)
    output, dtype = attend(inputs, mask)
    assert dtype == torch.float32 and output.dtype == torch.bfloat16
    mask = mask.float() if kind == "float" else mask
    expected = scaled_dot_product_attention(*references, attn_mask=mask).transpose(1, 2).bfloat16()
    for result in (output, expected):
        result.float().square().sum().backward()
    assert torch.equal(output, expected)
    for tensor, reference in zip(inputs, references, strict=True):
        assert torch.equal(tensor.grad, reference.grad.bfloat16())


def test_without_gradients_with_dropout_and_outside_of_the_context_attention_stays_in_bfloat16():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, dtype = attend(tensors(requires_grad=False))
    plain = scaled_dot_product_attention(*tensors(requires_grad=False)).transpose(1, 2)
    assert dtype == torch.bfloat16 and torch.equal(output, plain)
    assert attend(tensors(), dropout=0.5)[1] == torch.bfloat16
    with pytest.raises(ValueError), float32_attention():
        raise ValueError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_computes_it_in_float32_in_training_alone(tmp_path, checkpointing):
    model = tiny_model(num_labels=NUM_LABELS)
    trainer = make_trainer(
        tmp_path, model, bf16=True, max_steps=2, label_encoding="embedding", gradient_checkpointing=checkpointing
    )
    with Recorder() as recorder:
        trainer.train()
    assert recorder.dtypes[True] == {torch.float32}
    with Recorder() as recorder:
        trainer.evaluate()
    assert recorder.dtypes[False] == {torch.bfloat16}
