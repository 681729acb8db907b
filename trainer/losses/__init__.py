"""The two similarity-weighted contrastive losses of the paper (Eq. 5-15), as pure functions."""

from typing import TYPE_CHECKING

from .._lazy import attach


_MODULES = {
    "document_contrastive_loss": ".contrastive",
    "document_similarity": ".contrastive",
    "label_contrastive_loss": ".contrastive",
    "label_similarity": ".contrastive",
    "present_labels": ".contrastive",
    "share_of_anchors_with_positive": ".contrastive",
}
__getattr__, __dir__ = attach(__name__, _MODULES)
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
