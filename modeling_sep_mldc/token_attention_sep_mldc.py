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
    # Finite, so that a document without tokens gives no NaN.
    scores = scores.float().masked_fill(~mask.unsqueeze(-1), -1e4)
    attention = torch.softmax(scores, dim=1) * mask.any(dim=1)[:, None, None]
    return (attention * values.float()).sum(dim=1)
