"""Lexical scores: a sparse linear classifier per label on the tokens of a document."""

from typing import TYPE_CHECKING

from .._lazy import attach


_MODULES = {
    "fit_lexical_scores": ".fitting",
    "fit_sparse_svms": ".fitting",
    "token_tf_idf": ".fitting",
}
__getattr__, __dir__ = attach(__name__, _MODULES)
__all__ = [
    "fit_lexical_scores",
    "fit_sparse_svms",
    "token_tf_idf",
]

if TYPE_CHECKING:
    from .fitting import fit_lexical_scores, fit_sparse_svms, token_tf_idf
