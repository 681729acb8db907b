"""Augmentation with a language model: label expansions (Eq. 1-2) and pseudo-documents for tail labels (Eq. 3-4)."""

from .client import RequestSettings
from .expansion import expand_labels
from .files import AugmentationError
from .prompts import PromptBuilder
from .report import Report, report
from .review import ReviewOptions, ReviewSummary, review
from .sft import export_sft
from .tail_samples import TailOptions, generate_tail_samples
from .tasks import Plan, RunSummary


__all__ = [
    "AugmentationError",
    "Plan",
    "PromptBuilder",
    "Report",
    "RequestSettings",
    "ReviewOptions",
    "ReviewSummary",
    "RunSummary",
    "TailOptions",
    "expand_labels",
    "export_sft",
    "generate_tail_samples",
    "report",
    "review",
]
