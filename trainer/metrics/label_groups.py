"""Groups of labels by training frequency: head, body and tail."""

import numpy as np

from .ranking import ratio


def head_body_tail(label_counts: np.ndarray, tail_threshold: int = 50) -> dict[str, np.ndarray]:
    """
    Split labels by their training counts: `tail` has fewer than `tail_threshold` documents, `head` is the most frequent
    tenth of all labels (rounded up) except tail labels, `body` is the rest. Ties go to the lower id.

    Args:
        label_counts (`np.ndarray` of shape `(num_labels,)`): number of real training documents per label.
        tail_threshold (`int`, defaults to 50): the paper's value.

    Returns:
        `dict[str, np.ndarray]`: ascending label ids of `"head"`, `"body"` and `"tail"`.

    Example:

    ```python
    >>> head_body_tail(np.array([3, 900, 70, 80, 2]))
    {'head': array([1]), 'body': array([2, 3]), 'tail': array([0, 4])}

    ```
    """
    tail = label_counts < tail_threshold
    head: np.ndarray = np.zeros(len(label_counts), dtype=bool)
    head[most_frequent_first(label_counts)[: -(-len(label_counts) // 10)]] = True
    head &= ~tail
    return {name: np.flatnonzero(mask) for name, mask in (("head", head), ("body", ~head & ~tail), ("tail", tail))}


def most_frequent_first(label_counts: np.ndarray) -> np.ndarray:
    """Label ids by descending count. Ties go to the lower id."""
    return np.argsort(-label_counts, kind="stable")


def summarize(labels: dict[str, np.ndarray], members: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """
    Metrics of a group of labels, from `StreamingMetrics.per_label()`.

    Returns:
        `dict[str, float]`: `recall@k`, the share of the group's positives found in the top k; `coverage@k`, the share of the
        group's labels (among those with positives) that are found at least once in the top k; with predictions also `f1_macro`.
    """
    support = labels["support"][members]
    result = {}
    for k in ks:
        hits = labels[f"hits@{k}"][members]
        result[f"recall@{k}"] = float(ratio(hits.sum(), support.sum()))
        result[f"coverage@{k}"] = float(ratio((hits > 0).sum(), (support > 0).sum()))
    if "f1" in labels:
        result["f1_macro"] = float(labels["f1"][members].mean()) if len(members) else 0.0
    return result
