"""Weights of the positive terms of the binary cross-entropy, chosen from the number of training documents per label."""

from collections.abc import Sequence

import torch


CLASS_WEIGHTS = ("none", "balanced", "effective")
# β of the effective number of documents: a label with several hundred documents has about 1 / (1 - β) effective ones.
EFFECTIVE_BETA = 0.99


def class_weights(label_counts: Sequence[int], num_documents: int, kind: str) -> torch.Tensor | None:
    r"""
    Weight of the positive term $-\log\sigma(z_{il})$ of each label in the binary cross-entropy (`pos_weight` in PyTorch).

    - `"balanced"`: $(N - n_l) / n_l$, so that documents with and without the label count the same in total.
    - `"effective"`: $\propto (1 - \beta) / (1 - \beta^{n_l})$ with β = 0.99, one over the effective number of documents (Cui et al.,
      2019, Class-balanced loss based on effective number of samples, CVPR, Eq. 2). The weights have a mean of 1 over all positives, so
      that learning rates need not be changed.

    A label without documents is treated as one with a single document.

    Args:
        label_counts (`Sequence[int]` of length `L`): n, the number of training documents that have each label.
        num_documents (`int`): N, the number of training documents.
        kind (`str`): `"none"`, `"balanced"` or `"effective"`.

    Returns:
        `torch.Tensor` of shape `(L,)`, float32; `None` for `"none"`.

    Raises:
        ValueError: `kind` is unknown, or a label has more documents than the training set.

    Example:

    ```python
    >>> from modeling_sep_mldc.class_weights_sep_mldc import class_weights

    >>> class_weights([50, 10, 1], 100, "balanced").tolist()
    [1.0, 9.0, 99.0]

    ```
    """
    if kind not in CLASS_WEIGHTS:
        raise ValueError(f"`kind` is {kind!r}, but it must be one of {', '.join(map(repr, CLASS_WEIGHTS))}.")
    if kind == "none":
        return None
    largest = max(label_counts, default=0)
    if largest > num_documents:
        raise ValueError(
            f"`label_counts` contains {largest}, but there are {num_documents} documents. Count the labels again."
        )
    counts = torch.as_tensor(label_counts, dtype=torch.float64).clamp_min(1)
    if kind == "balanced":
        return ((num_documents - counts).clamp_min(1) / counts).float()
    weights = (1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**counts)
    return (weights * counts.sum() / (weights * counts).sum()).float()
