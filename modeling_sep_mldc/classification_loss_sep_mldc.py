"""Classification loss (Eq. 19), computed in chunks of labels when there are many."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# A loss over more scores than this goes through them in chunks of so many (4 MiB in float32).
LOSS_CHUNK_SIZE = 2**20


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    r"""
    Classification loss of Eq. 19, read as binary or as softmax cross-entropy, in float32.

    $$\text{bce}: -\frac1B \sum_{i,l} y_{il}\log\sigma(z_{il}) + (1-y_{il})\log(1-\sigma(z_{il})) \qquad
      \text{softmax}: -\frac1B \sum_{i,l} y_{il} \log \text{softmax}(z_i)_l$$

    More than `LOSS_CHUNK_SIZE` scores are read in chunks of labels, which keeps the logits themselves for backward and
    writes one tensor of their size, the gradient. Value and gradient are the same.

    Args:
        logits (`torch.Tensor` of shape `(B, L)`): scores.
        labels (`torch.Tensor` of shape `(B, L)`): multi-hot targets, of any dtype; a byte a label is the smallest.
        kind (`str`): `"bce"`, `"softmax"` or `"bce+softmax"`, their sum.

    Returns:
        `torch.Tensor`: a float32 scalar; 0 for a batch without documents.
    """
    # A compiler fuses the casts, so it gets the formula as it stands.
    if logits.numel() > LOSS_CHUNK_SIZE and not torch.compiler.is_compiling():
        return _ChunkedLoss.apply(logits, labels.to(logits.device), kind)
    logits, labels = logits.float(), labels.to(device=logits.device, dtype=torch.float32)
    loss = logits.new_zeros(())
    if "bce" in kind:
        loss = loss + F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    if "softmax" in kind:
        loss = loss - (labels * F.log_softmax(logits, dim=-1)).sum()
    return loss / max(len(logits), 1)


class _ChunkedLoss(torch.autograd.Function):
    """[`multi_label_loss`] whose temporaries are `LOSS_CHUNK_SIZE` scores large, forward and backward."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
        loss = torch.zeros((), device=logits.device)
        if "softmax" in kind:
            # Shifted by each document's largest score: exponentials cannot overflow, and nothing large is cancelled below.
            largest = logits.amax(dim=-1, keepdim=True).float()
            total, count = torch.zeros_like(largest), torch.zeros_like(largest)
        for columns in _chunks(logits):
            scores, targets = logits[:, columns].float(), labels[:, columns].float()
            if "bce" in kind:
                loss += F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
            if "softmax" in kind:
                shifted = scores - largest
                loss -= (targets * shifted).sum()
                count += targets.sum(dim=-1, keepdim=True)
                total += shifted.exp_().sum(dim=-1, keepdim=True)
        saved = [logits, labels]
        if "softmax" in kind:
            loss += (count * total.log()).sum()
            saved += [largest + total.log(), count]
        ctx.save_for_backward(*saved)
        ctx.kind = kind
        return loss / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, *normaliser = ctx.saved_tensors
        scale = grad_output / len(logits)
        gradient = torch.empty_like(logits)
        for columns in _chunks(logits):
            scores, targets = logits[:, columns].float(), labels[:, columns].float()
            if normaliser:
                log_total, count = normaliser
                rest = (scores - log_total).exp_().mul_(count).sub_(targets)
                if "bce" in ctx.kind:
                    rest += scores.sigmoid().sub_(targets)
            else:
                rest = scores.sigmoid().sub_(targets)
            gradient[:, columns] = rest.mul_(scale)
        return gradient, None, None


def _chunks(logits: torch.Tensor):
    width = max(LOSS_CHUNK_SIZE // len(logits), 1)
    return (slice(start, start + width) for start in range(0, logits.shape[1], width))
