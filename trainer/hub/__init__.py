"""Model cards and pushes to the Hub."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "build_model_card",
    "is_generated_card",
    "save_model_card",
    "summarize_provenance",
]

if TYPE_CHECKING:
    from .model_card import build_model_card, is_generated_card, save_model_card, summarize_provenance
