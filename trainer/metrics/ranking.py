"""Building blocks of the ranking metrics: propensities, top k and positives of a batch, and ratios with 0/0 = 0."""

from typing import Any

import numpy as np
import scipy.sparse
import torch


def inverse_propensities(label_counts: Any, num_documents: int, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    r"""
    Inverse propensities 1 + C (N_l + b)^-a with C = (log N - 1)(b + 1)^a (Jain et al., 2016, Section 4).

    For N < 3 the formula is below 1, and 1 is returned.

    Args:
        label_counts (`np.ndarray` of shape `(num_labels,)`): N_l, number of real training documents per label
            (without pseudo-documents).
        num_documents (`int`): N, number of real training documents.
        a, b (`float`): parameters of the dataset. 0.55 and 1.5 are those of EUR-Lex; Wikipedia has 0.5 and 0.4, Amazon 0.6
            and 2.6.

    Returns:
        `np.ndarray` of shape `(num_labels,)`, float64, each at least 1.

    Raises:
        ValueError: if a count is negative or above `num_documents`, or `num_documents` is below 1.

    Example:

    ```python
    >>> inverse_propensities([1000, 10, 0], num_documents=1000).round(4)
    array([1.2187, 3.5521, 8.8242])

    ```
    """
    counts: np.ndarray = to_array(label_counts).astype(np.float64)
    if num_documents < 1:
        raise ValueError(
            f"`num_documents` is {num_documents}, but at least 1 training document is needed. Count the training documents."
        )
    if counts.ndim != 1 or (counts.size and not (counts.min() >= 0 and counts.max() <= num_documents)):
        raise ValueError(
            f"`label_counts` of shape {counts.shape} must be one count per label between 0 and `num_documents` "
            f"({num_documents}). Count both on the same real training documents."
        )
    c = max(np.log(num_documents) - 1, 0.0) * (b + 1) ** a
    return 1 + c * (counts + b) ** -a


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, k) of the largest scores, in descending order. Of equal scores, the lower index comes first."""
    values, top = scores.topk(k, dim=1)
    last = values[:, -1:]
    at_least = (scores >= last).sum(dim=1)
    # NaN ranks first in `topk`, so it is enough to check the top k. Both checks need one device sync together.
    has_nan, has_ties = torch.stack([values.isnan().any(), (at_least > k).any()]).tolist()
    if has_nan:
        raise ValueError(
            "`scores` hold NaN, which cannot be ranked. The model has diverged or its input is wrong: check the "
            "training loss."
        )
    if has_ties:
        tied = (at_least > k).nonzero().squeeze(1)
        above, equal = scores[tied] > last[tied], scores[tied] == last[tied]
        chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
        top[tied] = chosen.nonzero()[:, 1].view(-1, k)
    top = top.sort(dim=1).values
    order = scores.gather(1, top).sort(dim=1, descending=True, stable=True).indices
    return top.gather(1, order)


def positives(
    labels: Any, label_indices: Any, shape: torch.Size, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the positives, row-major and without duplicates, for every accepted format of labels."""
    if (labels is None) == (label_indices is None):
        raise ValueError(
            "Exactly one of `labels` (multi-hot) and `label_indices` (label ids) is needed. Pass one of them."
        )
    given = (len(label_indices), shape[1]) if labels is None else tuple(labels.shape)
    if given != tuple(shape):
        raise ValueError(
            f"`scores` has shape {tuple(shape)} and the labels are {given}, but both must be (batch_size, num_labels). Pass labels of the same batch."
        )
    if labels is not None and not scipy.sparse.issparse(labels):
        rows, cols = torch.as_tensor(labels).nonzero().to(device).unbind(dim=1)
        return rows, cols
    if labels is None:
        sizes = [len(ids) for ids in label_indices]
        rows = np.repeat(np.arange(len(sizes)), sizes)
        cols = np.fromiter((i for ids in label_indices for i in ids), dtype=np.int64, count=sum(sizes))
        if cols.size and not 0 <= cols.min() <= cols.max() < shape[1]:
            wrong = cols.min() if cols.min() < 0 else cols.max()
            raise ValueError(
                f"`label_indices` contains {wrong}, but label ids lie between 0 and {shape[1] - 1}. Encode the labels with the model's label list."
            )
    else:
        rows, cols = labels.nonzero()
    keys = np.unique(rows.astype(np.int64) * shape[1] + cols)  # both formats may be unordered and have duplicates
    return tuple(torch.from_numpy(x).to(device) for x in np.divmod(keys, max(shape[1], 1)))


def to_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator / denominator with 0/0 = 0, element by element."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1e-300), 0.0)
