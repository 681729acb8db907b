"""Label-wise attention over the tokens of a document: each label reads the tokens that matter to it."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


# Attention weights (documents x tokens x labels) that are held at once. More labels are scored in chunks.
MAX_WEIGHTS = 2**25
# Standard deviation of the initial output weights: at first, the logits are those of the rest of the classifier.
INIT_STD = 0.02


class TokenAttention(nn.Module):
    r"""
    Logits of label-wise attention (LAAT, Vu et al. 2020, arXiv 2007.06351, with one query per label):

    $$z_l = w_l \cdot \sum_t \text{softmax}_t(h_t \cdot q_l / \sqrt{d}) \, h_t$$

    for the states h of a document's tokens. Queries q and output weights w have one row per label; queries start at the label
    embeddings. The cost of a document of T tokens is 4 T L d multiplications and additions, in training three times as many.

    Args:
        num_labels (`int`): L.
        hidden_size (`int`): d.
    """

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(num_labels, hidden_size))
        self.weights = nn.Parameter(torch.zeros(num_labels, hidden_size))

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor, labels: slice = slice(None)) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(B, T, d)`): last hidden states of the tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`): 0 for padding.
            labels (`slice`, *optional*): which labels to score. All by default.

        Returns:
            `torch.Tensor` of shape `(B, L)`: logits in float32. 0 for a document without tokens.
        """
        queries, weights = self.queries[labels], self.weights[labels]
        states = states.to(queries.dtype)
        mask = attention_mask.bool()
        chunks = 1
        if not torch.compiler.is_exporting():
            chunks = min(max(math.ceil(mask.numel() * len(queries) / MAX_WEIGHTS), 1), max(len(queries), 1))
        if chunks == 1:
            return _attend(states, mask, queries, weights)
        logits: list[Any] = []
        for rows in zip(queries.chunk(chunks), weights.chunk(chunks), strict=True):
            if torch.is_grad_enabled():
                # The backward pass computes the weights again: they are what does not fit.
                logits.append(checkpoint(_attend, states, mask, *rows, use_reentrant=False))
            else:
                logits.append(_attend(states, mask, *rows))
        return torch.cat(logits, dim=-1)


def _attend(states: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Logits (B, L) in float32 of states (B, T, d), a Boolean mask (B, T), queries and output weights (L, d)."""
    scores = states @ (queries * queries.shape[-1] ** -0.5).t()
    values = states @ weights.t()
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return _WeightedSum.apply(scores, values, mask)
    return (_attention(scores, mask) * values).sum(dim=1, dtype=torch.float32)


def _attention(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over tokens of scores (B, T, L), in their dtype: 0 for padding, and everywhere for a document without tokens."""
    # Finite, so that a document without tokens gives no NaN.
    scores = scores.masked_fill(~mask.unsqueeze(-1), -1e4)
    with torch.autocast(scores.device.type, enabled=False):  # which would make a copy in float32
        return torch.softmax(scores, dim=1) * mask.any(dim=1)[:, None, None]


class _WeightedSum(torch.autograd.Function):
    r"""
    $z_{bl} = \sum_t \text{softmax}_t(s_{btl}) \, v_{btl}$ with its gradients in closed form. The tensors have a value per token and label:
    autograd would keep twice as many of them and take half as long again.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attention = _attention(scores, mask)
        logits = (attention * values).sum(dim=1, dtype=torch.float32)
        ctx.save_for_backward(attention, values, logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attention, values, logits = ctx.saved_tensors
        for_values = attention * gradients[0].to(attention.dtype).unsqueeze(1)
        for_scores = (values - logits.to(values.dtype).unsqueeze(1)).mul_(for_values)
        return for_scores, for_values, None
