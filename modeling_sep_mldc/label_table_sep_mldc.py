"""The label embeddings of one forward, and what the head reads from them: inner products and attention (Eq. 16-17)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# The gradient of a label table with more numbers than this (16 MiB in float32) is added up in one tensor.
TABLE_GRADIENT_SIZE = 2**22
# Attention weights end here, relative to the largest: far below what a float32 sum of a million of them notices, and far
# above subnormal numbers, with which a CPU multiplies ten times slower.
SMALLEST_LOG_WEIGHT = -60.0


class LabelTable:
    """
    The label embeddings of one forward: the stored rows, some of them replaced out of place by fresh ones.

    Replaced columns are swapped in the (B, L) products, not in the (L, d) table: nothing of the table's size is copied,
    and no gradient of its size is made when the stored rows are constants.
    """

    def __init__(self, stored: torch.Tensor, fresh: torch.Tensor | None = None, indices: torch.Tensor | None = None):
        self.stored, self.fresh, self.indices = stored, fresh, indices
        self.gradient = None
        # Each use of a trained table has a gradient of its size: added up in place, they cost one tensor instead of ten.
        if stored.requires_grad and torch.is_grad_enabled() and stored.numel() > TABLE_GRADIENT_SIZE:
            if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(stored.device.type):
                self.gradient = _TableGradient()
                self.stored = _Collect.apply(stored, self.gradient)

    def products(self, queries: torch.Tensor, cosine: bool = False) -> torch.Tensor:
        """Inner products (B, L) of queries (B, d) with each label embedding, or with its direction (`cosine=True`)."""
        if self.gradient is not None and queries.dtype == self.stored.dtype:
            scores = _Products.apply(queries, self.stored, self.gradient, cosine)
        else:
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
            if self.gradient is not None and weights.dtype == self.stored.dtype:
                return _Mix.apply(weights, self.stored, self.gradient)
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
    floor = scores.detach().amax(dim=-1, keepdim=True) + SMALLEST_LOG_WEIGHT
    return torch.softmax(torch.maximum(scores, floor), dim=-1)


class _TableGradient:
    """The gradient (L, d) that the uses of a label table add up during one backward."""

    def __init__(self):
        self.total, self.backward_id = None, None

    def add(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Add left^T right, (B, L) and (B, d), in place."""
        current = torch._C._current_graph_task_id()
        # What another backward has left here (one that asked for other gradients only) is not part of this one.
        if self.total is None or self.backward_id != current:
            self.total, self.backward_id = left.t() @ right, current
        else:
            self.total.addmm_(left.t(), right)
        return self.total

    def take(self) -> torch.Tensor | None:
        total = self.total if self.backward_id == torch._C._current_graph_task_id() else None
        self.total = self.backward_id = None
        return total


class _Collect(torch.autograd.Function):
    """The table itself; its gradient is what its uses have added up, and what came by other ways."""

    @staticmethod
    def forward(ctx, stored: torch.Tensor, gradient: _TableGradient) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)  # the uses below return none, and run before this
        return stored.view_as(stored)

    @staticmethod
    @once_differentiable
    def backward(ctx, other: torch.Tensor | None):
        total = ctx.gradient.take()
        if total is None:
            return other, None
        return total if other is None else total.add_(other), None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, table, gradient: _TableGradient, cosine: bool) -> torch.Tensor:
        scores, inverse = queries @ table.t(), None
        if cosine:
            inverse = table.norm(dim=-1).clamp_min(1e-6).reciprocal()
            scores *= inverse
        ctx.gradient = gradient
        ctx.save_for_backward(queries, table, inverse, scores if cosine else None)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        queries, table, inverse, scores = ctx.saved_tensors
        scaled = grad_output if inverse is None else grad_output * inverse
        total = ctx.gradient.add(scaled, queries)
        if inverse is not None:
            # The length of a label embedding changes nothing; one shorter than 1e-6 is not divided by its length.
            along = (grad_output * scores).sum(dim=0) * inverse**2
            total.addcmul_(table, along.masked_fill(inverse >= 1e6, 0.0).unsqueeze(-1), value=-1.0)
        return scaled @ table, None, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, table, gradient: _TableGradient) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(weights, table)
        return weights @ table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        weights, table = ctx.saved_tensors
        ctx.gradient.add(weights, grad_output)
        return grad_output @ table.t(), None, None
