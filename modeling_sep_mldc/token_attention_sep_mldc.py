"""Label-wise attention over the tokens of a document: each label attends to the tokens that matter to it."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


# Maximum number of scores (documents x tokens x labels) that are held at once: on a CPU they fit into its cache, else into memory.
MAX_SCORES = {"cpu": 2**19}
MAX_SCORES_ELSEWHERE = 2**25
# On a CPU, gradients of the states are summed over this many chunks of labels at a time, because a sum takes as long as the rest of a
# chunk.
CHUNKS_PER_SUM = 8
# Standard deviation of the initial output weights, small so that token attention hardly contributes to the logits at first.
INIT_STD = 0.02


class TokenAttention(nn.Module):
    r"""
    Logits of label-wise attention (LAAT, Vu et al. 2020, arXiv 2007.06351, with one query per label):

    $$z_l = w_l \cdot \sum_t \text{softmax}_t(K h_t \cdot q_l / \sqrt{d}) \, V h_t$$

    for the hidden states h of a document's tokens. K and V project them to s dimensions; they are the identity if s = d.
    Queries q and output weights w have one row per label. The cost of a document of T tokens is 4 T (L + d) s multiplications and
    additions, plus some operations on T L scores that do not depend on s.

    Args:
        num_labels (`int`): L.
        hidden_size (`int`): d.
        size (`int`, *optional*): s. Defaults to d.
    """

    def __init__(self, num_labels: int, hidden_size: int, size: int | None = None):
        super().__init__()
        size = hidden_size if size is None else size
        self.scale = hidden_size**-0.5
        self.key = self.value = None
        if size < hidden_size:
            self.key = nn.Linear(hidden_size, size, bias=False)
            self.value = nn.Linear(hidden_size, size, bias=False)
        self.queries = nn.Parameter(torch.zeros(num_labels, size))
        self.weights = nn.Parameter(torch.zeros(num_labels, size))

    @torch.no_grad()
    def start_from(self, label_embeds: torch.Tensor) -> None:
        """
        Initialize so that each label attends to tokens that are similar to it: K and V project to the s principal dimensions of the label
        embeddings (L, d), and the queries are the projected label embeddings.
        """
        if self.key is not None and self.value is not None:
            embeds = label_embeds.double()
            basis = torch.linalg.eigh(embeds.t() @ embeds).eigenvectors[:, -len(self.key.weight) :].t()
            self.key.weight.copy_(basis)
            self.value.weight.copy_(basis)
        self.queries.copy_(self.queries_of(label_embeds))

    def queries_of(self, label_embeds: torch.Tensor) -> torch.Tensor:
        """The queries of labels that attend to tokens similar to them, (n, s), from their embeddings (n, d)."""
        label_embeds = label_embeds.to(self.queries.dtype)
        return label_embeds if self.key is None else self.key(label_embeds)

    def scores_and_products(
        self, states: torch.Tensor, labels: Any = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention scores before the softmax, and products of values and output weights, for states (B, T, d): (B, T, n) each."""
        keys, values, queries, weights = self._projected(states, labels)
        return keys @ queries.t(), values @ weights.t()

    def _projected(self, states: torch.Tensor, labels: Any) -> tuple[torch.Tensor, ...]:
        """Keys and values (B, T, s), queries and output weights (n, s)."""
        states = states.to(self.queries.dtype)
        keys = states if self.key is None else self.key(states)
        values = states if self.value is None else self.value(states)
        return keys, values, self.queries[labels] * self.scale, self.weights[labels]

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor, labels: slice = slice(None)) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(B, T, d)`): last hidden states of the tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`): 0 for padding.
            labels (`slice`, *optional*): which labels to score. All by default.

        Returns:
            `torch.Tensor` of shape `(B, L)`: logits in float32. 0 for a document without tokens.
        """
        mask = attention_mask.bool()
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return weighted_sums(*self.scores_and_products(states, labels), mask)
        keys, values, queries, weights = self._projected(states, labels)
        if self.key is None and torch.is_grad_enabled():
            return _with_kept_scores(keys, mask, queries, weights)
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            keys, values, queries, weights = (t.to(dtype) for t in (keys, values, queries, weights))
        rows = max(MAX_SCORES.get(kind, MAX_SCORES_ELSEWHERE) // max(mask.numel(), 1), 1)
        with torch.autocast(kind, enabled=False):  # all tensors already have the right dtype
            return _InChunks.apply(keys, values, mask, queries, weights, rows)


def token_attention_weights(num_labels: int, hidden_size: int, size: int) -> int:
    """The number of weights of [`TokenAttention`]."""
    size = min(size, hidden_size)
    return 2 * size * (num_labels + (hidden_size if size < hidden_size else 0))


def weighted_sums(scores: torch.Tensor, products: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Softmax over tokens of the scores (B, T, L), multiplied by the products of states and output weights (B, T, L) and summed over tokens:
    (B, L) in float32. The mask (B, T) is Boolean.
    """
    return (_attention(scores, mask) * products).sum(dim=1, dtype=torch.float32) * mask.any(dim=1, keepdim=True)


def _attention(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the tokens of scores (B, T, L). A document without tokens also gets weights; its sum is masked."""
    return torch.softmax(scores.masked_fill(~mask.unsqueeze(-1), _least(scores.dtype)), dim=1)


def _with_kept_scores(
    states: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """
    Same result as [`_InChunks`], but scores and products are kept for the backward pass as far as they fit into memory: with d dimensions,
    recomputing the products costs more than reading them.
    """
    chunks = min(max(math.ceil(mask.numel() * len(queries) / MAX_SCORES_ELSEWHERE), 1), max(len(queries), 1))
    if chunks == 1:
        return _attend(states, mask, queries, weights)
    parts = zip(queries.chunk(chunks), weights.chunk(chunks), strict=True)
    logits: list[Any] = [checkpoint(_attend, states, mask, *rows, use_reentrant=False) for rows in parts]
    return torch.cat(logits, dim=-1)


def _attend(states: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _WeightedSum.apply(states @ queries.t(), states @ weights.t(), mask)


class _WeightedSum(torch.autograd.Function):
    r"""
    $z_{bl} = \sum_t \text{softmax}_t(s_{btl}) \, v_{btl}$ with its gradients in closed form. The tensors have one value per document, token
    and label; autograd would keep twice as many of them and take 1.5 times as long.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(scores.device.type, enabled=False):  # which would make a copy in float32
            attention = _attention(scores, mask)
        has_tokens = mask.any(dim=1, keepdim=True)
        logits = (attention * values).sum(dim=1, dtype=torch.float32) * has_tokens
        ctx.save_for_backward(attention, values, logits, has_tokens)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attention, values, logits, has_tokens = ctx.saved_tensors
        for_values = attention * (gradients[0] * has_tokens).to(attention.dtype).unsqueeze(1)
        for_scores = (values - logits.to(values.dtype).unsqueeze(1)).mul_(for_values)
        return for_scores, for_values, None


class _InChunks(torch.autograd.Function):
    r"""
    The logits (B, L) and their gradients in closed form, for a chunk of labels at a time. Values per document, token and label are written
    and read a few times, which takes longer than the products unless the chunk stays in the cache. They are therefore not kept for the
    backward pass, but recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        queries: torch.Tensor,
        weights: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        shape, num_labels = mask.shape, len(queries)
        keys, values = keys.reshape(mask.numel(), -1), values.reshape(mask.numel(), -1)
        padding = None
        if mask.device.type != "cpu" or not mask.all():  # on a GPU, checking would force a device sync
            padding = keys.new_zeros(shape).masked_fill_(~mask, _least(keys.dtype))
        ones = keys.new_ones(shape[1])
        largest = keys.new_empty(num_labels, shape[0], 1)
        numerator, denominator = keys.new_empty(2, num_labels, shape[0])
        for start in range(0, num_labels, rows):
            chunk = slice(start, start + rows)
            scores = _scores(queries[chunk], keys, padding, shape)
            largest[chunk] = scores.amax(dim=-1, keepdim=True)
            scores = scores.sub_(largest[chunk]).exp_()
            denominator[chunk] = scores @ ones
            products = (weights[chunk] @ values.t()).view(-1, *shape)
            numerator[chunk] = products.mul_(scores) @ ones
        denominator = denominator.float()
        logits = numerator.float() / denominator
        has_tokens = mask.any(dim=1)
        ctx.rows, ctx.shape = rows, shape
        ctx.save_for_backward(keys, values, padding, queries, weights, largest, denominator, logits, has_tokens)
        return (logits * has_tokens).t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        keys, values, padding, queries, weights, largest, denominator, logits, has_tokens = ctx.saved_tensors
        factor = (gradients[0].t() * has_tokens / denominator).to(keys.dtype).unsqueeze(-1)
        logits = logits.to(keys.dtype).unsqueeze(-1)
        for_queries, for_weights = torch.empty_like(queries), torch.empty_like(weights)
        for_keys = torch.zeros_like(keys, dtype=torch.float32)
        for_values = torch.zeros_like(values, dtype=torch.float32)
        group = ctx.rows * (CHUNKS_PER_SUM if keys.device.type == "cpu" else 1)
        for start in range(0, len(queries), group):
            labels = slice(start, min(start + group, len(queries)))
            of_scores, of_products = keys.new_empty(2, labels.stop - start, len(keys))
            for first in range(start, labels.stop, ctx.rows):
                chunk = slice(first, min(first + ctx.rows, labels.stop))
                here = slice(first - start, chunk.stop - start)
                scores = _scores(queries[chunk], keys, padding, ctx.shape).sub_(largest[chunk]).exp_()
                torch.mul(scores, factor[chunk], out=of_products[here].view_as(scores))
                products = (weights[chunk] @ values.t()).view_as(scores).sub_(logits[chunk])
                torch.mul(products.view(-1, len(keys)), of_products[here], out=of_scores[here])
            for_queries[labels] = of_scores @ keys
            for_weights[labels] = of_products @ values
            for_keys += of_scores.t() @ queries[labels]
            for_values += of_products.t() @ weights[labels]
        for_states = (total.to(keys.dtype).view(*ctx.shape, -1) for total in (for_keys, for_values))
        return *for_states, None, for_queries, for_weights, None


def _least(dtype: torch.dtype) -> float:
    """The score of padding. Finite, so that a document without tokens gives no NaN, even if another score is added to it."""
    return torch.finfo(dtype).min / 2


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, padding: torch.Tensor | None, shape: torch.Size
) -> torch.Tensor:
    """Products (L, B, T) of queries (L, s) and keys (B * T, s), plus what is added to each token (B, T)."""
    scores = (queries @ keys.t()).view(-1, *shape)
    return scores if padding is None else scores.add_(padding)
