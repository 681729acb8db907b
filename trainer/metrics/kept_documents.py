"""F1 of the documents that are kept when the least certain ones are left to people, from counts per degree of certainty."""

from collections.abc import Sequence

import numpy as np
import torch

from .ranking import ratio


# Certainties are kept in bins, so that memory does not depend on the number of documents.
LOW, STEP, NUM_BINS = -40.0, 0.02, 4000
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


def certainty(logits: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    """
    How far the best label of each document is above its threshold, (B,): the maximum over labels of logit less threshold. A model abstains
    from documents where it is negative.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): calibrated ones, where the model is calibrated.
        cuts (`torch.Tensor` of shape `(num_labels,)`): thresholds as logits.
    """
    return (logits - cuts).amax(dim=1)


def count_by_certainty(certainties: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Sums of counts per bin of certainty.

    Args:
        certainties (`torch.Tensor` of shape `(batch_size,)`): from [`certainty`].
        counts (`torch.Tensor` of shape `(3, batch_size)`): true positives, predicted labels and labels of each document.

    Returns:
        `torch.Tensor` of shape `(4, NUM_BINS)`: number of documents, and the sums of the counts, int64.
    """
    bins = ((certainties.double().clamp(LOW, -LOW) - LOW) / STEP).long().clamp(0, NUM_BINS - 1)
    rows = torch.cat([torch.ones_like(counts[:1]), counts]).long()
    return torch.zeros(4, NUM_BINS, dtype=torch.int64, device=rows.device).index_add_(1, bins, rows)


def f1_of_kept(counts: np.ndarray, shares: Sequence[float] = SHARES) -> list[dict[str, float]]:
    """
    Micro F1, precision and recall of the most certain documents, for each share of documents that is kept. Where a share ends inside a bin,
    the documents of this bin count in part.

    Args:
        counts (`np.ndarray` of shape `(4, NUM_BINS)`): sums of what [`count_by_certainty`] returns.
        shares (`Sequence[float]`): above 0, at most 1.

    Returns:
        `list[dict]`: `share_kept`, `num_documents`, `f1_micro`, `precision_micro`, `recall_micro` and `min_certainty`, the lower edge of the last bin.

    Raises:
        ValueError: a share is out of range, or there are no documents.
    """
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise ValueError(
            f"`shares` holds {wrong[0]}, but a share of the documents must be above 0 and at most 1. Use 0.9, for example."
        )
    best_first = np.asarray(counts, dtype=np.float64)[:, ::-1]
    sums = np.concatenate([np.zeros((4, 1)), best_first.cumsum(axis=1)], axis=1)
    total = sums[0, -1]
    if not total:
        raise ValueError("no document has been seen, but a table needs at least one. Call `update` first.")
    rows = []
    for share in shares:
        wanted = share * total
        last = int(np.searchsorted(sums[0, 1:], wanted - 1e-9))
        part = (wanted - sums[0, last]) / best_first[0, last]
        documents, correct, predicted, labels = sums[:, last] + part * best_first[:, last]
        rows.append(
            {
                "share_kept": float(share),
                "num_documents": int(round(documents)),
                "f1_micro": float(ratio(2 * correct, predicted + labels)),
                "precision_micro": float(ratio(correct, predicted)),
                "recall_micro": float(ratio(correct, labels)),
                "min_certainty": round(LOW + STEP * (NUM_BINS - 1 - last), 6),
            }
        )
    return rows
