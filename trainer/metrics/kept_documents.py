"""F1 of the documents that are kept if those with a low expected F1 are sent to human review, from counts per bin of expected F1."""

from collections.abc import Sequence

import numpy as np
import torch

from .ranking import ratio


# Expected F1 is binned, so that memory does not depend on the number of documents.
NUM_BINS = 2000
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


def count_by_expected_f1(expected: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Sums of counts per bin of expected F1.

    Args:
        expected (`torch.Tensor` of shape `(batch_size,)`): the expected F1 of each document's label set, from 0 to 1
            (`modeling_sep_mldc.label_sets_sep_mldc.expected_f1`).
        counts (`torch.Tensor` of shape `(3, batch_size)`): true positives, predicted labels and labels of each document.

    Returns:
        `torch.Tensor` of shape `(4, NUM_BINS)`: number of documents, and the sums of the counts, int64.
    """
    bins = (expected.double() * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    rows = torch.cat([torch.ones_like(counts[:1]), counts]).long()
    return torch.zeros(4, NUM_BINS, dtype=torch.int64, device=rows.device).index_add_(1, bins, rows)


def f1_of_kept(counts: np.ndarray, shares: Sequence[float] = SHARES) -> list[dict[str, float]]:
    """
    Micro F1, precision and recall of the documents with the highest expected F1, for each share of documents that is kept. If a
    share ends inside a bin, the documents of this bin count partially.

    Args:
        counts (`np.ndarray` of shape `(4, NUM_BINS)`): sums of the results of [`count_by_expected_f1`].
        shares (`Sequence[float]`): above 0, at most 1.

    Returns:
        `list[dict]`: `share_kept`, `num_documents`, `f1_micro`, `precision_micro`, `recall_micro` and `min_expected_f1`, the lower edge of the last bin.

    Raises:
        ValueError: a share is out of range, or there are no documents.
    """
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise ValueError(
            f"`shares` contains {wrong[0]}, but a share of the documents must be above 0 and at most 1. Use 0.9, for example."
        )
    best_first = np.asarray(counts, dtype=np.float64)[:, ::-1]
    sums = np.concatenate([np.zeros((4, 1)), best_first.cumsum(axis=1)], axis=1)
    total = sums[0, -1]
    if not total:
        raise ValueError("No document has been added, but a table needs at least one. Call `update` first.")
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
                "min_expected_f1": (NUM_BINS - 1 - last) / NUM_BINS,
            }
        )
    return rows
