"""The metrics of `trainer.metrics` as a metric of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np

from .streaming import StreamingMetrics


DESCRIPTION = "Precision, recall, nDCG and propensity-scored precision at k, and F1, of multi-label predictions."
INPUTS_DESCRIPTION = """
Args:
    predictions (list of lists of float): one row of logits (or probabilities with `activation=None`) per document.
    references (list of lists of int): one multi-hot row per document.
"""


class MultiLabelMetric(evaluate.Metric):
    r"""
    For data whose dense scores and labels fit in memory. `StreamingMetrics` has no such limit.

    Args:
        config_name (`str`, *optional*), and `keep_in_memory`, `cache_dir`, `experiment_id`, ...: those of
            `evaluate.Metric`.
        settings (`dict`, *optional*): arguments of `StreamingMetrics` except `num_labels`. Those passed to `compute` take precedence.

    Raises:
        ValueError: as in `StreamingMetrics`, and for rows of different lengths.

    Example:

    ```python
    >>> metric = MultiLabelMetric(settings={"ks": (1,)}, keep_in_memory=True)
    >>> metric.compute(predictions=[[2.0, -1.0], [0.5, -0.5]], references=[[1, 0], [0, 1]])["p@1"]
    0.5

    ```
    """

    def __init__(self, config_name: str | None = None, settings: dict | None = None, **kwargs: Any):
        super().__init__(config_name=config_name, **kwargs)
        self.settings = settings or {}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions: list, references: list, **settings: Any) -> dict[str, float]:
        lengths = {len(row) for rows in (predictions, references) for row in rows}
        if len(lengths) != 1:
            raise ValueError(
                f"The rows of `predictions` and `references` have lengths {sorted(lengths)}, but each must have one value per "
                "label. Pass logits and multi-hot labels, not label ids."
            )
        metrics = StreamingMetrics(lengths.pop(), **{**self.settings, **settings})
        metrics.update(np.array(predictions), np.array(references))
        return metrics.compute()
