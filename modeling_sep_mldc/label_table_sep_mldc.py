"""The label embeddings of one forward pass, and the inner products and attention that the head computes with them (Eq. 16-17)."""

from typing import Any

import torch
import torch.nn.functional as F


# Smallest log attention weight, relative to the largest weight: too small to affect a float32 sum of a million weights, but far above
# subnormal numbers, which CPUs multiply ten times slower.
SMALLEST_LOG_WEIGHT = -60.0
SMALLEST_NORM = 1e-6


class LabelTable:
    """
    The label embeddings of one forward pass: the stored rows, some of them replaced out of place by freshly encoded ones.

    Columns are replaced in the (B, L) products, not in the (L, d) table: no copy of the table is made, and no gradient
    of its size if the stored rows are constants.

    Args:
        stored (`torch.Tensor` of shape `(L, d)`): stored label embeddings.
        fresh (`torch.Tensor` of shape `(C, d)`, *optional*): freshly encoded label embeddings.
        indices (`torch.LongTensor` of shape `(C,)`, *optional*): labels of the rows of `fresh`, each once.
    """

    def __init__(self, stored: torch.Tensor, fresh: torch.Tensor | None = None, indices: torch.Tensor | None = None):
        self.stored, self.fresh, self.indices = stored, fresh, indices
        self._converted: dict[torch.dtype, torch.Tensor] = {}

    def products(self, queries: torch.Tensor, cosine: bool = False) -> torch.Tensor:
        """Inner products (B, L) of queries (B, d) with each label embedding, normalized if `cosine=True`."""
        rows = self._rows(queries)
        scores = F.linear(queries, rows)
        if cosine:
            scores = scores * self._norms(rows).reciprocal()
        if self.fresh is not None:
            fresh = F.normalize(self.fresh, dim=-1, eps=1e-6) if cosine else self.fresh
            fresh_scores = queries @ fresh.t().to(queries.dtype)
            scores = scores.index_copy(1, self.indices, fresh_scores.to(scores.dtype))
        return scores

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums (B, d) of the label embeddings for weights (B, L), Eq. 17."""
        rows = self._rows(weights)
        if self.fresh is None:
            return weights @ rows
        constant = weights.index_fill(1, self.indices, 0.0)
        return constant @ rows + weights.index_select(1, self.indices) @ self.fresh.to(weights.dtype)

    def _rows(self, other: torch.Tensor) -> torch.Tensor:
        """
        The stored rows in the dtype in which they are multiplied with `other`. They are converted once per forward pass, and their gradient
        once per backward pass, because with 20,000 labels a conversion takes as long as the product.
        """
        kind = other.device.type
        has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if has_autocast else other.dtype
        if dtype not in self._converted:
            self._converted[dtype] = self.stored.to(dtype)
        return self._converted[dtype]

    def _norms(self, converted: torch.Tensor) -> torch.Tensor:
        """The norms (L,) of the stored rows, at least `SMALLEST_NORM`."""
        if converted.requires_grad and not torch.compiler.is_compiling():
            return _RowNorms.apply(converted, self.stored.detach())
        return self.stored.norm(dim=-1).clamp_min(SMALLEST_NORM)

    def dense(self) -> torch.Tensor:
        """The (L, d) matrix; a new tensor or a view, never the stored leaf."""
        if self.fresh is None:
            return self.stored.view_as(self.stored)
        return self.stored.index_copy(0, self.indices, self.fresh.to(self.stored.dtype))


class _RowNorms(torch.autograd.Function):
    """
    The norms of rows (L, d), with a gradient in the dtype of the converted rows. PyTorch's own gradient of a norm reads and writes an
    (L, d) matrix three times, this one only once.
    """

    @staticmethod
    def forward(ctx: Any, converted: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        norms = rows.norm(dim=-1).clamp_min(SMALLEST_NORM)
        ctx.save_for_backward(converted, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        converted, norms = ctx.saved_tensors
        return converted * (gradients[0] / norms).to(converted.dtype).unsqueeze(-1), None


def attention_weights(scores: torch.Tensor) -> torch.Tensor:
    """The softmax over labels of scores (B, L), Eq. 16, in float32."""
    scores = scores.float()
    if not scores.shape[1]:
        return scores
    floor = scores.detach().amax(dim=-1, keepdim=True) + SMALLEST_LOG_WEIGHT
    return torch.softmax(torch.maximum(scores, floor), dim=-1)
