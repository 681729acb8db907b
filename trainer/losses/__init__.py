"""The two similarity-weighted contrastive losses of the paper (Eq. 5-15), as pure functions."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "document_contrastive_loss",
    "document_similarity",
    "label_contrastive_loss",
    "label_similarity",
    "present_labels",
    "share_of_anchors_with_positive",
]

if TYPE_CHECKING:
    from .contrastive import (
        document_contrastive_loss,
        document_similarity,
        label_contrastive_loss,
        label_similarity,
        present_labels,
        share_of_anchors_with_positive,
    )
