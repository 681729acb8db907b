"""The label embeddings of one forward, and what the head reads from them: inner products and attention (Eq. 16-17)."""

import torch
import torch.nn.functional as F


# Smallest log of an attention weight, relative to the largest weight: far below what a float32 sum of a million weights
# notices, and far above subnormal numbers, which CPUs multiply ten times slower.
SMALLEST_LOG_WEIGHT = -60.0


class LabelTable:
    """
    The label embeddings of one forward: the stored rows, some of them replaced out of place by fresh ones.

    Columns are replaced in the (B, L) products, not in the (L, d) table: nothing of the table's size is copied, and no gradient
    of its size is made when the stored rows are constants.

    Args:
        stored (`torch.Tensor` of shape `(L, d)`): stored label embeddings.
        fresh (`torch.Tensor` of shape `(C, d)`, *optional*): freshly encoded label embeddings.
        indices (`torch.LongTensor` of shape `(C,)`, *optional*): labels of the rows of `fresh`, each once.
    """

    def __init__(self, stored: torch.Tensor, fresh: torch.Tensor | None = None, indices: torch.Tensor | None = None):
        self.stored, self.fresh, self.indices = stored, fresh, indices

    def products(self, queries: torch.Tensor, cosine: bool = False) -> torch.Tensor:
        """Inner products (B, L) of queries (B, d) with each label embedding, or with its direction (`cosine=True`)."""
        scores = queries @ self.stored.t().to(queries.dtype)
        if cosine:
            scores = scores * self.stored.norm(dim=-1).clamp_min(1e-6).reciprocal()
        if self.fresh is not None:
            fresh = F.normalize(self.fresh, dim=-1, eps=1e-6) if cosine else self.fresh
            fresh_scores = queries @ fresh.t().to(queries.dtype)
            scores = scores.index_copy(1, self.indices, fresh_scores.to(scores.dtype))
        return scores

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums (B, d) of the label embeddings for weights (B, L), Eq. 17."""
        if self.fresh is None:
            return weights @ self.stored.to(weights.dtype)
        constant = weights.index_fill(1, self.indices, 0.0)
        return constant @ self.stored.to(weights.dtype) + weights.index_select(1, self.indices) @ self.fresh.to(
            weights.dtype
        )

    def dense(self) -> torch.Tensor:
        """The (L, d) matrix; a new tensor or a view, never the stored leaf."""
        if self.fresh is None:
            return self.stored.view_as(self.stored)
        return self.stored.index_copy(0, self.indices, self.fresh.to(self.stored.dtype))


def attention_weights(scores: torch.Tensor) -> torch.Tensor:
    """The softmax over labels of scores (B, L), Eq. 16, in float32."""
    scores = scores.float()
    if not scores.shape[1]:
        return scores
    floor = scores.detach().amax(dim=-1, keepdim=True) + SMALLEST_LOG_WEIGHT
    return torch.softmax(torch.maximum(scores, floor), dim=-1)
