"""Augmentation with a language model: label descriptions (Eq. 1-2) and pseudo-documents for tail or all labels (Eq. 3-4)."""

from typing import Any

from .deprecated import expand_labels, generate_tail_samples, old_name
from .errors import AugmentationError
from .label_descriptions import describe_labels
from .prompts import PromptBuilder
from .pseudo_documents import PseudoDocumentOptions, write_pseudo_documents
from .report import Report, report
from .review import ReviewOptions, ReviewSummary, review
from .settings import RequestSettings
from .sft import export_sft
from .summary import Plan, RunSummary


__all__ = [
    "AugmentationError",
    "Plan",
    "PromptBuilder",
    "PseudoDocumentOptions",
    "Report",
    "RequestSettings",
    "ReviewOptions",
    "ReviewSummary",
    "RunSummary",
    "describe_labels",
    "expand_labels",
    "export_sft",
    "generate_tail_samples",
    "report",
    "review",
    "write_pseudo_documents",
]


def __getattr__(name: str) -> Any:
    return old_name(name, __name__)
