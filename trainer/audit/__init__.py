"""Likely errors in the labels of documents: finding, reviewing and correcting them."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "Finding",
    "FindingsFile",
    "LabelAudit",
    "OutOfFoldScores",
    "apply_findings",
    "audit_labels",
    "fuse_scores",
    "out_of_fold_scores",
    "suspicion",
]

if TYPE_CHECKING:
    from .files import FindingsFile, apply_findings
    from .findings import Finding, LabelAudit, audit_labels, fuse_scores, suspicion
    from .scores import OutOfFoldScores, out_of_fold_scores
