"""Evaluation of a run on its validation and test documents."""

from typing import Any, NamedTuple

import numpy as np

from modeling_sep_mldc.hierarchy_sep_mldc import ancestors_of

from .run_data import RunData
from .run_outputs import save_metrics
from .sep_mldc_trainer import SepMldcTrainer


# Assigned labels are chosen among this many top-ranked labels.
MOST_ASSIGNED = 100


class Evaluation(NamedTuple):
    """
    Metrics on the reported split.

    Attributes:
        split (`str`): `"validation"` or `"test"`.
        metrics (`dict[str, float]`): by name, without prefix.
        scores, indices (`np.ndarray` of shape `(num_documents, k)`): probabilities and label ids, best first.
        label_sets (`list[np.ndarray]`, *optional*): ids of the assigned labels; `None` if the model only ranks labels.
        kept (`list[dict]`): F1 of the remaining documents when the least certain ones are sent to human review; empty without
            probabilities.
    """

    split: str
    metrics: dict[str, float]
    scores: np.ndarray
    indices: np.ndarray
    label_sets: list[np.ndarray] | None
    kept: list[dict[str, float]]


def measure(data: RunData, trainer: SepMldcTrainer, split: str, prefix: str) -> Evaluation:
    """
    Compute metrics and the best labels of each document of a split, and write the metrics to `{prefix}_results.json` and
    `all_results.json`. Must be called by every process.

    Args:
        data ([`RunData`]): with documents of the split.
        trainer ([`SepMldcTrainer`]): of the model.
        split (`str`): `"validation"` or `"test"`.
        prefix (`str`): prefix of the metrics in the files: `"eval"` or `"test"`.

    Returns:
        [`Evaluation`]
    """
    args = trainer.args
    top_k = args.prediction_top_k
    args.prediction_top_k = max(top_k, min(len(data.labels), MOST_ASSIGNED))
    try:
        output = trainer.predict(data.encoded[split], metric_key_prefix=prefix)
    finally:
        args.prediction_top_k = top_k
    kept = trainer.last_metrics.f1_of_kept() if trainer.last_metrics.thresholds is not None else []
    if trainer.is_world_process_zero():
        save_metrics(args.output_dir, prefix, {**output.metrics, **({f"{prefix}_f1_of_kept": kept} if kept else {})})
    metrics = {name.removeprefix(f"{prefix}_"): value for name, value in output.metrics.items()}
    scores, indices = output.predictions
    return Evaluation(split, metrics, scores, indices, trainer.last_label_sets, kept)


def gold_names(data: RunData) -> list[list[str]]:
    """
    Gold labels of the test documents, in the same form as the model's label sets: with `hierarchy="leaves"`, without labels that are
    ancestors of other labels.

    Args:
        data ([`RunData`]): with test documents.
    """
    gold = list(data.documents["test"]["labels"])
    if data.label_sets.get("hierarchy") != "leaves":
        return gold
    covered = [ancestors_of(data.label_sets["label_parents"], names) for names in gold]
    return [[name for name in names if name not in above] for names, above in zip(gold, covered)]


def assigned_among(result: Evaluation, model: Any) -> np.ndarray:
    """
    Which of the best labels of each document are assigned. With a hierarchy, ancestors of assigned labels count as assigned.

    Args:
        result ([`Evaluation`]): of the model.
        model ([`SepMldcForMultiLabelClassification`]): the model, not wrapped.

    Returns:
        `np.ndarray` of shape `(num_documents, k)`, bool.
    """
    assigned: np.ndarray = np.zeros(result.indices.shape, dtype=bool)
    hierarchy = model.label_hierarchy if model.config.hierarchy is not None else None
    for row, ids in enumerate(result.label_sets or []):
        closed = ids if hierarchy is None else [*ids, *hierarchy.ancestors(ids.tolist())]
        assigned[row] = np.isin(result.indices[row], closed)
    return assigned
