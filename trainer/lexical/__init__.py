"""Lexical scores: a sparse linear classifier per label on the tokens of a document."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "choose_tail_weight",
    "default_num_features",
    "default_solver",
    "fit_kernel_ridge",
    "fit_lexical_scores",
    "fit_shortlist_svms",
    "fit_sparse_svms",
    "refit_lexical_scores",
    "stack_scores",
    "token_tf_idf",
    "weigh_lexical_scores",
]

if TYPE_CHECKING:
    from .features import token_tf_idf
    from .fitting import (
        default_num_features,
        default_solver,
        fit_lexical_scores,
        refit_lexical_scores,
        weigh_lexical_scores,
    )
    from .fusion import choose_tail_weight, stack_scores
    from .solvers import fit_kernel_ridge, fit_shortlist_svms, fit_sparse_svms
