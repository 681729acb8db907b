"""Augmentation with a language model: label expansions (Eq. 1-2) and pseudo-documents for tail labels (Eq. 3-4)."""

from .client import RequestSettings
from .expansion import expand_labels
from .files import AugmentationError
from .prompts import PromptBuilder
from .tail_samples import TailOptions, generate_tail_samples
from .tasks import Plan, RunSummary


__all__ = [
    "AugmentationError",
    "Plan",
    "PromptBuilder",
    "RequestSettings",
    "RunSummary",
    "TailOptions",
    "expand_labels",
    "generate_tail_samples",
]
