"""Ranking and classification metrics of multi-label predictions, without an N x L matrix."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "MultiLabelMetric",
    "StreamingMetrics",
    "head_body_tail",
    "inverse_propensities",
    "ranking_metrics",
]

if TYPE_CHECKING:
    from .evaluate_metric import MultiLabelMetric
    from .label_groups import head_body_tail
    from .ranking import inverse_propensities
    from .streaming import StreamingMetrics, ranking_metrics
