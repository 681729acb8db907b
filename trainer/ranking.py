"""What the metrics need of a batch: its top k, its positives, and 0/0 = 0."""

import numpy as np
import scipy.sparse
import torch


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, k) of the largest scores, falling; among equal scores the lower index wins, as in a stable sort."""
    values, top = scores.topk(k, dim=1)
    last = values[:, -1:]
    at_least = (scores >= last).sum(dim=1)
    # NaN ranks first in `topk`, so the top k tell; one device synchronisation for both questions.
    has_nan, has_ties = torch.stack([values.isnan().any(), (at_least > k).any()]).tolist()
    if has_nan:
        raise ValueError(
            "`scores` hold NaN, which cannot be ranked. The model has diverged or its input is broken: look at the "
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


def positives(labels, label_indices, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the positives, row-major and without repeats, of any of the accepted forms of labels."""
    if (labels is None) == (label_indices is None):
        raise ValueError("one of `labels` (multi-hot) and `label_indices` (label ids) is needed, and not both.")
    given = (len(label_indices), shape[1]) if labels is None else tuple(labels.shape)
    if given != tuple(shape):
        raise ValueError(
            f"`scores` has shape {tuple(shape)} and the labels are {given}, but both must be (batch_size, num_labels)."
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
            raise ValueError(f"`label_indices` holds {wrong}, but label ids lie between 0 and {shape[1] - 1}.")
    else:
        rows, cols = labels.nonzero()
    keys = np.unique(rows.astype(np.int64) * shape[1] + cols)  # both forms may be unordered and repeat an entry
    return tuple(torch.from_numpy(x).to(device) for x in np.divmod(keys, max(shape[1], 1)))


def to_array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def ratio(numerator, denominator) -> np.ndarray:
    """numerator / denominator with 0/0 = 0, element by element."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1e-300), 0.0)
