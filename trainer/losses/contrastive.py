r"""
Similarity-weighted contrastive losses over the labels and the documents of a batch (Eq. 5-15 of the SEP-MLDC paper).

Pure functions of embeddings and multi-hot labels. Everything is computed in float32 (float64 stays float64), regardless
of the autocast dtype, and restricted to the labels present in the batch: no tensor has `num_labels`² entries, and the labels are
read once.
"""

import torch
import torch.nn.functional as F


WEIGHTINGS = ("jaccard", "complement", "uniform")


def label_similarity(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Jaccard similarity of the labels present in a batch (Eq. 5-8): the number of documents with both labels, divided by that with either.

    $$W_y = Y^\top Y / (S_i + S_j - Y^\top Y)$$

    Labels absent from the batch have similarity 0 to every label including themselves (0/0 counts as 0), so only the block of
    the present labels is returned.

    Args:
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): 0/1 labels of any dtype.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: the similarities, of shape `(num_present, num_present)`, and the ascending
        ids of the present labels, of shape `(num_present,)`.

    Raises:
        ValueError: if `labels` is not a matrix.

    Example:

    ```python
    >>> import torch
    >>> similarity, present = label_similarity(torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]))
    >>> similarity
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    >>> present
    tensor([0, 2])

    ```
    """
    present = present_labels(labels)
    return _jaccard(*_overlaps(labels.index_select(1, present).T)), present


def document_similarity(labels: torch.Tensor) -> torch.Tensor:
    r"""
    Jaccard similarity of the documents of a batch (Eq. 10-13): the number of shared labels, divided by that of the labels of either.

    $$W_x = Y Y^\top / (S_i + S_j - Y Y^\top)$$

    A document without labels has similarity 0 to every document including itself (0/0 counts as 0).

    Args:
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): 0/1 labels of any dtype.

    Returns:
        `torch.Tensor` of shape `(batch_size, batch_size)`.

    Raises:
        ValueError: if `labels` is not a matrix.

    Example:

    ```python
    >>> import torch
    >>> document_similarity(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]))
    tensor([[1.0000, 0.5000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.0000, 0.0000, 0.0000]])

    ```
    """
    _check_labels(labels)
    return _jaccard(*_overlaps(labels))


def label_contrastive_loss(
    label_embeds: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 0.1,
    weighting: str = "jaccard",
    normalize: bool = True,
) -> torch.Tensor:
    r"""
    Similarity-weighted contrastive loss over the labels of a batch (Eq. 9).

    $$\frac{1}{|A|}\sum_{i \in A} -\log
      \frac{\exp(e_i \cdot e_i / \tau) W_{ii}}{\sum_{k \neq i} \exp(e_i \cdot e_k / \tau) W_{ik}}$$

    `A` holds the labels that are present in the batch and have a negative of non-zero weight; the paper prints a mean
    over all labels, which is undefined for the others. As printed, the denominator contains only the negatives, so the
    loss can be negative. Only the rows of the present labels are read. Passing just those,
    `label_contrastive_loss(rows, labels[:, ids])` with `ids = present_labels(labels)` or any superset of it, gives
    the same value.

    Args:
        label_embeds (`torch.Tensor` of shape `(num_labels, hidden_size)`): label embeddings. Rows without gradient are
            constants.
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): 0/1 labels of any dtype.
        temperature (`float`, defaults to 0.1): τ, above 0.
        weighting (`str`, defaults to `"jaccard"`): weight of a negative of Jaccard similarity W: `"jaccard"` (W, as
            printed: only labels that share a document repel each other), `"complement"` (1 - W) or `"uniform"` (1).
        normalize (`bool`, defaults to `True`): use cosine similarities instead of raw inner products. The paper does
            not say which; without normalization e·e/τ is unbounded.

    Returns:
        `torch.Tensor`: a scalar. If `A` is empty, 0 with a gradient of 0 for `label_embeds`.

    Raises:
        ValueError: if shapes do not match, `temperature` is not above 0 or `weighting` is unknown.

    Example: two labels that share their only document, with orthogonal embeddings: -log(exp(1 / 0.5) / exp(0)) = -2.

    ```python
    >>> import torch
    >>> label_contrastive_loss(torch.eye(2), torch.tensor([[1, 1]]), temperature=0.5)
    tensor(-2.)

    ```
    """
    _check(label_embeds, labels, temperature, weighting, "label_embeds", "(num_labels, hidden_size)", labels_dim=1)
    present = present_labels(labels)
    intersection, union = _overlaps(labels.index_select(1, present).T)
    with torch.autocast(label_embeds.device.type, enabled=False):
        logits = _inner_products(label_embeds.index_select(0, present), temperature, normalize)
        negative = ~torch.eye(len(present), dtype=torch.bool, device=labels.device)
        log_negatives, has_negative = _log_sum_negatives(logits, intersection, union, negative, weighting)
        terms = torch.where(has_negative, log_negatives - logits.diagonal(), 0.0)
        return terms.sum() / has_negative.sum().clamp(min=1)


def document_contrastive_loss(
    document_embeds: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 0.1,
    weighting: str = "jaccard",
    normalize: bool = True,
) -> torch.Tensor:
    r"""
    Similarity-weighted contrastive loss over the documents of a batch (Eq. 14-15).

    $$\frac{1}{B}\sum_i \sum_{j \in P_i} -\log
      \frac{\exp(e_i \cdot e_j / \tau) W_{ij}}{\sum_{k \in N_i} \exp(e_i \cdot e_k / \tau) W_{ik}}$$

    `P_i` holds the other documents with exactly i's label set, `N_i` all documents whose label set differs. An anchor
    without labels, without a positive or without a negative of non-zero weight contributes 0, and the sum is divided by the
    batch size, as printed. As printed, the denominator contains only the negatives, so the loss can be negative. A document
    without labels is a negative (of weight 0 under `"jaccard"`).

    Args:
        document_embeds (`torch.Tensor` of shape `(batch_size, hidden_size)`): document embeddings.
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): 0/1 labels of any dtype.
        temperature (`float`, defaults to 0.1): τ, above 0.
        weighting (`str`, defaults to `"jaccard"`): weight of a negative of Jaccard similarity W: `"jaccard"` (W, as
            printed: only documents that share a label repel each other), `"complement"` (1 - W) or `"uniform"` (1).
            A positive always weighs 1.
        normalize (`bool`, defaults to `True`): use cosine similarities instead of raw inner products.

    Returns:
        `torch.Tensor`: a scalar. If no anchor has a term, 0 with a gradient of 0 for `document_embeds`.

    Raises:
        ValueError: if shapes do not match, `temperature` is not above 0 or `weighting` is unknown.

    Example: the first two documents share their label set and the third overlaps it by half, so the two anchors give
    -log(exp(1) / (0.5 exp(0))) = -1.6931 each, and the third nothing: -3.3863 / 3.

    ```python
    >>> import torch
    >>> embeds = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> document_contrastive_loss(embeds, torch.tensor([[1, 1], [1, 1], [1, 0]]), temperature=1.0)
    tensor(-1.1288)

    ```
    """
    _check(
        document_embeds, labels, temperature, weighting, "document_embeds", "(batch_size, hidden_size)", labels_dim=0
    )
    intersection, union = _overlaps(labels)
    same, positive = _same_label_set(intersection, union)
    with torch.autocast(document_embeds.device.type, enabled=False):
        logits = _inner_products(document_embeds, temperature, normalize)
        log_negatives, has_negative = _log_sum_negatives(logits, intersection, union, ~same, weighting)
        terms = torch.where(positive & has_negative.unsqueeze(1), log_negatives.unsqueeze(1) - logits, 0.0)
        return terms.sum() / max(len(labels), 1)


def share_of_anchors_with_positive(labels: torch.Tensor) -> torch.Tensor:
    r"""
    Share of the labeled documents of a batch that have a positive in Eq. 14: another document with exactly the same
    label set.

    Args:
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): 0/1 labels of any dtype.

    Returns:
        `torch.Tensor`: a scalar in [0, 1], 0 for a batch without labels. Does not force a device synchronization.

    Raises:
        ValueError: if `labels` is not a matrix.

    Example:

    ```python
    >>> import torch
    >>> share_of_anchors_with_positive(torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0], [0, 0]]))
    tensor(0.5000)

    ```
    """
    _check_labels(labels)
    intersection, union = _overlaps(labels)
    _, positive = _same_label_set(intersection, union)
    anchors = intersection.diagonal() > 0
    return positive.any(dim=1).sum() / anchors.sum().clamp(min=1)


def present_labels(labels: torch.Tensor) -> torch.Tensor:
    r"""
    Ascending ids of the labels that at least one document of the batch has.

    Args:
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): 0/1 labels of any dtype.

    Returns:
        `torch.Tensor` of shape `(num_present,)`, int64. The shape depends on the data, so this forces a device synchronization.

    Raises:
        ValueError: if `labels` is not a matrix.

    Example:

    ```python
    >>> import torch
    >>> present_labels(torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]))
    tensor([1, 3])

    ```
    """
    _check_labels(labels)
    # On a CPU, `sum` would first convert bytes to int64, which takes 60 times as long. `amax` fails for an empty batch.
    in_batch = labels.amax(dim=0) if len(labels) else labels.sum(dim=0)
    return in_batch.nonzero().squeeze(1)


@torch.no_grad()
def _overlaps(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes of the pairwise intersections and unions of 0/1 rows, (n, n) each. Exact if each row has fewer than 2^24 ones."""
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(torch.float32)
        intersection = rows @ rows.T
        sizes = intersection.diagonal()
        return intersection, sizes.unsqueeze(0) + sizes.unsqueeze(1) - intersection


def _jaccard(intersection: torch.Tensor, union: torch.Tensor) -> torch.Tensor:
    return intersection / union.clamp(min=1)  # an empty union has an empty intersection: 0/0 counts as 0


def _same_label_set(intersection: torch.Tensor, union: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs with equal label sets, and those that are an anchor with its positive. Exact, because both inputs are counts."""
    same = intersection == union
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    return same, same & (intersection > 0) & ~itself


def _inner_products(embeds: torch.Tensor, temperature: float, normalize: bool) -> torch.Tensor:
    """e_i · e_k / τ of all pairs of rows, in float32 or higher."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    if normalize:
        embeds = F.normalize(embeds, dim=1)
    return embeds @ embeds.T / temperature


def _log_sum_negatives(
    logits: torch.Tensor, intersection: torch.Tensor, union: torch.Tensor, negative: torch.Tensor, weighting: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ_k exp(logits_ik) weight_ik over the negatives k, and whether there are any. Rows without negatives are finite."""
    if weighting == "uniform":
        weights = torch.ones_like(logits)
    else:
        weights = _jaccard(intersection.to(logits.dtype), union)
        if weighting == "complement":
            weights = 1 - weights
    log_weights = torch.where(negative, weights, 0.0).log()  # a weight of zero masks with -inf
    has_negative = (log_weights > -torch.inf).any(dim=1)
    # A row of only -inf would have a NaN gradient, which `torch.where` in the caller would not remove.
    log_weights = torch.where(has_negative.unsqueeze(1), log_weights, 0.0)
    return torch.logsumexp(logits + log_weights, dim=1), has_negative


def _check_labels(labels: torch.Tensor) -> None:
    if labels.dim() != 2:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, but a multi-hot matrix (batch_size, num_labels) is needed. "
            "Let `SepMldcDataCollator` build it from label ids."
        )


def _check(
    embeds: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    weighting: str,
    name: str,
    shape: str,
    labels_dim: int,
) -> None:
    _check_labels(labels)
    if embeds.dim() != 2 or embeds.shape[0] != labels.shape[labels_dim]:
        raise ValueError(
            f"`{name}` has shape {tuple(embeds.shape)}, but with `labels` of shape {tuple(labels.shape)} it must be "
            f"{shape} with {labels.shape[labels_dim]} rows. Pass embeddings and labels of the same batch."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}, but it must be above 0. The paper uses 0.1.")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` is {weighting!r}, but it must be one of {', '.join(map(repr, WEIGHTINGS))}.")
