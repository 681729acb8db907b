"""Classification loss (Eq. 19), computed in chunks of labels when there are many."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# A loss over more scores than this is computed in chunks of this size (4 MiB in float32).
LOSS_CHUNK_SIZE = 2**20


def multi_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, kind: str, positive_weights: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Classification loss of Eq. 19, read as binary or as softmax cross-entropy, in float32.

    $$\text{bce}: -\frac1B \sum_{i,l} y_{il}\log\sigma(z_{il}) + (1-y_{il})\log(1-\sigma(z_{il})) \qquad
      \text{softmax}: -\frac1B \sum_{i,l} y_{il} \log \text{softmax}(z_i)_l$$

    In the decoupled softmax (Gupta et al., 2024, Dual-encoders for extreme multi-label classification, ICLR), the positives of a
    document do not compete with each other:

    $$\text{decoupled\_softmax}: -\frac1B \sum_{i,l} y_{il} \log \frac{\exp z_{il}}{\exp z_{il} + \sum_{k: y_{ik} = 0} \exp z_{ik}}$$

    If there are more than `LOSS_CHUNK_SIZE` scores, the loss is computed in chunks of labels: only the logits are kept for the backward
    pass, which writes one tensor of their size, the gradient. Value and gradient are the same.

    Args:
        logits (`torch.Tensor` of shape `(B, L)`): scores.
        labels (`torch.Tensor` of shape `(B, L)`): multi-hot targets of any dtype; `torch.uint8` needs the least memory.
        kind (`str`): `"bce"`, `"softmax"`, `"decoupled_softmax"`, or a sum: `"bce+softmax"`, `"bce+decoupled_softmax"`.
        positive_weights (`torch.Tensor` of shape `(L,)`, *optional*): weight of $\log\sigma(z_{il})$ of each label in `"bce"`, see
            `class_weights_sep_mldc`.

    Returns:
        `torch.Tensor`: a float32 scalar; 0 for a batch without documents.
    """
    terms = kind.split("+")
    # A compiler fuses the casts, so it gets the plain formula.
    if positive_weights is not None:
        positive_weights = positive_weights.to(device=logits.device, dtype=torch.float32)
    if logits.numel() > LOSS_CHUNK_SIZE and not torch.compiler.is_compiling():
        return _ChunkedLoss.apply(logits, labels.to(logits.device), terms, positive_weights)
    logits, labels = logits.float(), labels.to(device=logits.device, dtype=torch.float32)
    loss = logits.new_zeros(())
    if "bce" in terms:
        loss = loss + F.binary_cross_entropy_with_logits(logits, labels, pos_weight=positive_weights, reduction="sum")
    if "softmax" in terms:
        loss = loss - (labels * F.log_softmax(logits, dim=-1)).sum()
    if "decoupled_softmax" in terms:
        # A document that has every label has no negatives: log(0) would give NaN gradients, so the smallest float is used instead.
        negatives = logits.masked_fill(labels > 0, torch.finfo(logits.dtype).min).logsumexp(dim=-1, keepdim=True)
        loss = loss + (labels * F.softplus(negatives - logits)).sum()
    return loss / max(len(logits), 1)


class _ChunkedLoss(torch.autograd.Function):
    """[`multi_label_loss`] whose temporaries hold `LOSS_CHUNK_SIZE` scores, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, terms: list[str], positive_weights: torch.Tensor | None
    ) -> torch.Tensor:
        loss = torch.zeros((), device=logits.device)
        normalizers = []
        at = 0
        for scores, targets in _chunks(logits, labels):
            if "bce" in terms:
                weights = None if positive_weights is None else positive_weights[at : at + scores.shape[1]]
                loss += F.binary_cross_entropy_with_logits(scores, targets, pos_weight=weights, reduction="sum")
            at += scores.shape[1]
        if "softmax" in terms:
            log_total = _log_sum_exp(logits, labels, negatives_only=False)
            count = torch.zeros_like(log_total)
            for scores, targets in _chunks(logits, labels):
                loss -= (targets * (scores - log_total)).sum()
                count += targets.sum(dim=-1, keepdim=True)
            normalizers += [log_total, count]
        if "decoupled_softmax" in terms:
            log_negatives = _log_sum_exp(logits, labels, negatives_only=True)
            weight = torch.zeros_like(log_negatives)
            for scores, targets in _chunks(logits, labels):
                margins = log_negatives - scores
                loss += (targets * F.softplus(margins)).sum()
                weight += (targets * margins.sigmoid_()).sum(dim=-1, keepdim=True)
            normalizers += [log_negatives, weight]
        ctx.save_for_backward(logits, labels, *normalizers)
        ctx.terms, ctx.positive_weights = terms, positive_weights
        return loss / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, *normalizers = ctx.saved_tensors
        scale = grad_output / len(logits)
        gradient = torch.empty_like(logits)
        at = 0
        for scores, targets in _chunks(logits, labels):
            rest = torch.zeros_like(scores)
            if "bce" in ctx.terms and ctx.positive_weights is None:
                rest += scores.sigmoid().sub_(targets)
            elif "bce" in ctx.terms:
                weighted = targets * ctx.positive_weights[at : at + scores.shape[1]]
                rest += scores.sigmoid().mul_(1 - targets + weighted).sub_(weighted)
            if "softmax" in ctx.terms:
                log_total, count = normalizers[:2]
                rest += (scores - log_total).exp_().mul_(count).sub_(targets)
            if "decoupled_softmax" in ctx.terms:
                log_negatives, weight = normalizers[-2:]
                rest -= (log_negatives - scores).sigmoid_().mul_(targets)
                share = (scores - log_negatives).masked_fill_(targets > 0, -torch.inf).exp_()
                rest += share.mul_(weight)
            gradient[:, at : at + scores.shape[1]] = rest.mul_(scale)
            at += scores.shape[1]
        return gradient, None, None, None


def _log_sum_exp(logits: torch.Tensor, labels: torch.Tensor, negatives_only: bool) -> torch.Tensor:
    """Log-sum-exp of the scores of each document (B, 1), over all labels or only over its negatives."""
    largest = logits.new_full((len(logits), 1), torch.finfo(torch.float32).min, dtype=torch.float32)
    total = torch.zeros_like(largest)
    for scores, targets in _chunks(logits, labels):
        if negatives_only:
            scores = scores.masked_fill(targets > 0, torch.finfo(torch.float32).min)
        new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        total = total * (largest - new_largest).exp() + (scores - new_largest).exp_().sum(dim=-1, keepdim=True)
        largest = new_largest
    return largest + total.log()


def _chunks(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and targets of `LOSS_CHUNK_SIZE` pairs of document and label at a time, in float32."""
    width = max(LOSS_CHUNK_SIZE // len(logits), 1)
    for start in range(0, logits.shape[1], width):
        columns = slice(start, start + width)
        yield logits[:, columns].float(), labels[:, columns].float()
