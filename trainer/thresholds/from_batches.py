"""Decision thresholds and calibration from batches of logits and labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..metrics.ranking import ratio
from ..metrics.streaming import StreamingMetrics
from .conformal import RiskCurve, check_guarantee
from .tuning import (
    CALIBRATIONS,
    check_objective,
    choose_shrinkage,
    expected_calibration_error,
    global_threshold,
    platt_scaling,
    temperature_scaling,
    tune_thresholds,
)


logger = logging.get_logger(__name__)

# With a softmax loss, the level of logits is undetermined, and lexical scores widen their range, so histograms need a wider range.
WIDE_RANGE = (-40.0, 40.0)
# Positives and negatives (L, bins) each, and the edges of the bins.
Histograms = tuple[np.ndarray, np.ndarray, np.ndarray]


class HalvedHistograms:
    """Score histograms of the documents at even and at odd positions, so that what is tuned on one half can be evaluated on the other."""

    def __init__(self, num_labels: int, **kwargs: Any):
        self.halves = [
            StreamingMetrics(num_labels, ks=(1,), thresholds=None, histograms=True, **kwargs) for _ in range(2)
        ]
        self.num_seen = 0

    def update(self, scores: Any, labels: Any = None, label_indices: Any = None) -> None:
        """Like [`~trainer.metrics.StreamingMetrics.update`]: adds scores (B, L), with labels in either form."""
        for parity, half in enumerate(self.halves):
            own = slice((parity - self.num_seen) % 2, None, 2)
            half.update(
                scores[own],
                labels=None if labels is None else labels[own],
                label_indices=None if label_indices is None else label_indices[own],
            )
        self.num_seen += len(scores)

    def histograms(self) -> list[Histograms]:
        """Positives, negatives and bin edges of both halves; a single document is used for both."""
        even, odd = self.halves
        return [half.histograms() for half in (even, odd if odd.num_seen else even)]


@dataclass
class TunedThresholds:
    """
    The result of `tune_thresholds_from_batches`; attributes are named as in the model's configuration.

    Attributes:
        thresholds (`list[float]` of length `num_labels`): a label is predicted from this probability on.
        score_calibration (`dict`, *optional*): `{"scale", "bias"}` of the logits, see `platt_scaling`.
        threshold_info (`dict`): the settings, the number of documents, the global threshold, F1 (`f1_micro`, `f1_macro`) with
            the thresholds and at 0.5, and with a calibration the expected calibration error before and after.
    """

    thresholds: list[float]
    score_calibration: dict[str, float] | None
    threshold_info: dict


def tune_thresholds_from_batches(
    batches: Iterable,
    num_labels: int,
    objective: str = "f1",
    shrinkage: float | None = None,
    calibration: str | None = None,
    wide: bool = False,
    label_counts: np.ndarray | None = None,
) -> TunedThresholds:
    r"""
    Tune each label's decision threshold on batches of logits and labels of held-out documents.

    Scores are kept as one histogram per label, never as an N x L matrix. Thresholds of labels
    with few positives are shrunk toward a common rule (see [`~trainer.thresholds.tune_thresholds`]). The F1 in the
    answer is cross-fitted: thresholds of the even documents are scored on the odd ones and vice versa, so
    no document evaluates thresholds that were tuned on it. The thresholds themselves are tuned on all documents.

    Args:
        batches (iterable of tuples): each starts with logits (B, L) and multi-hot labels (B, L), such as a
            [`~trainer.LogitBatch`].
        num_labels (`int`): L.
        objective (`str`, defaults to `"f1"`): `"f1"` / `"macro"`, `"micro"` or `"precision:0.9"`; `"recall:0.9"` or `"fdr:0.1"` for one
            threshold with a guarantee (see [`~trainer.thresholds.RiskCurve`]), whose F1 in the answer is not cross-fitted.
        shrinkage (`float`, *optional*): in positives; 0 uses the threshold of each label as it is. Chosen on two halves of the
            documents if not given, see [`~trainer.thresholds.choose_shrinkage`]; 20 for `"precision:P"`.
        calibration (`str`, *optional*): `"temperature"` or `"platt"`.
        wide (`bool`, defaults to `False`): histograms that span logits of -40 to 40, as a softmax loss and lexical scores make.
        label_counts (`Sequence[int]` of length `num_labels`, *optional*): training documents of each label, for thresholds that
            depend on their frequency.

    Raises:
        ValueError: there are no documents, or too few for a guarantee, some have no labels, or an unknown objective or calibration.
    """
    check_threshold_settings(objective, shrinkage, calibration)
    guarantee = check_guarantee(objective)
    curve = None if guarantee is None else RiskCurve(*guarantee)
    halves = HalvedHistograms(num_labels, **({"histogram_range": WIDE_RANGE} if wide else {}))
    for logits, labels, *_ in batches:
        if labels is None:
            raise ValueError(
                "Thresholds are tuned on documents with labels, but these have none. Add `label_indices`."
            )
        halves.update(logits, labels)
        if curve is not None:
            curve.update(torch.as_tensor(logits), torch.as_tensor(labels))
    if not halves.num_seen:
        raise ValueError("There are no documents to tune thresholds on. Pass a dataset that is not empty.")
    even, odd = halves.histograms()
    both = (even[0] + odd[0], even[1] + odd[1], even[2])
    scale = None
    if calibration is not None:
        scale = (platt_scaling if calibration == "platt" else temperature_scaling)(*both)
    if curve is not None:
        return _guaranteed(curve, both, objective, halves.num_seen, calibration, scale)
    if shrinkage is None:
        shrinkage = choose_shrinkage(even, odd, objective, label_counts=label_counts)
    settings: dict[str, Any] = {
        "objective": objective,
        "shrinkage": shrinkage,
        "calibration": scale,
        "label_counts": label_counts,
    }
    thresholds = tune_thresholds(*both, **settings)

    crossed = np.zeros((3, len(thresholds)))
    for tuned, held_out in ((even, odd), (odd, even)):
        if tuned[0].sum():
            crossed += _decisions(*held_out, tune_thresholds(*tuned, **settings), scale)
    at_half = _f1(_decisions(*both, np.full(len(thresholds), 0.5), scale))
    info = {
        "objective": objective,
        "shrinkage": shrinkage,
        "num_documents": halves.num_seen,
        "global_threshold": global_threshold(*both, objective=objective, calibration=scale),
        **_f1(crossed),
        **{f"{name}_at_0.5": value for name, value in at_half.items()},
    }
    return _tuned(thresholds, both, info, calibration, scale)


def _guaranteed(
    curve: RiskCurve, both: Histograms, objective: str, num_documents: int, calibration: str | None, scale: dict | None
) -> TunedThresholds:
    """One threshold for all labels."""
    threshold, found = curve.choose(scale)
    thresholds = np.full(len(both[0]), threshold)
    at_half = _f1(_decisions(*both, np.full(len(thresholds), 0.5), scale))
    info = {
        "objective": objective,
        "num_documents": num_documents,
        "global_threshold": threshold,
        "guaranteed_calibration": scale,
        **found,
        **_f1(_decisions(*both, thresholds, scale)),
        **{f"{name}_at_0.5": value for name, value in at_half.items()},
    }
    if found["share_abstained"] > 0.5:
        logger.warning(
            f"{objective!r} leaves {found['share_abstained']:.0%} of the documents without any label: the scores do not separate correct labels from "
            "wrong ones well enough. Allow more errors, or train on more documents."
        )
    elif threshold == 0:
        logger.warning(
            f"{objective!r} is reached only by returning every label for every document. Ask for less recall, or train on more documents."
        )
    return _tuned(thresholds, both, info, calibration, scale)


def _tuned(
    thresholds: np.ndarray, both: Histograms, info: dict, calibration: str | None, scale: dict | None
) -> TunedThresholds:
    if calibration is not None:
        info["calibration"] = calibration
        info["expected_calibration_error_before"] = expected_calibration_error(*both)
        info["expected_calibration_error"] = expected_calibration_error(*both, calibration=scale)
    logger.info(
        f"Thresholds tuned on {info['num_documents']} documents: F1 micro {info['f1_micro']:.4f}, macro {info['f1_macro']:.4f}."
    )
    return TunedThresholds([float(value) for value in thresholds], scale, info)


def check_threshold_settings(
    objective: str = "f1", shrinkage: float | None = None, calibration: str | None = None
) -> None:
    """
    Check those arguments of `tune_thresholds_from_batches` that can be checked without documents, so that errors occur before training.

    Raises:
        ValueError: an unknown objective or calibration, or a negative shrinkage.
    """
    if check_guarantee(objective) is None:
        check_objective(objective)
    if shrinkage is not None and not 0 <= shrinkage < np.inf:
        raise ValueError(
            f"`shrinkage` is {shrinkage}, but it must be a number of positives of at least 0. Leave it out to have it chosen."
        )
    if calibration not in (None, *CALIBRATIONS):
        raise ValueError(
            f"`calibration` is {calibration!r}, but it must be 'temperature', 'platt' or None. Leave it out for none."
        )


def _decisions(
    positives: np.ndarray,
    negatives: np.ndarray,
    edges: np.ndarray,
    thresholds: np.ndarray,
    calibration: dict[str, float] | None,
) -> np.ndarray:
    """True positives, predictions and positives per label, (3, L), up to the width of the bins."""
    middles = (edges[:-1] + edges[1:]) / 2
    if calibration is not None:
        middles = calibration["scale"] * middles + calibration["bias"]
    clipped = np.clip(thresholds, 1e-7, 1 - 1e-7)
    predicted = middles >= np.log(clipped / (1 - clipped))[:, None]
    correct, wrong = (positives * predicted).sum(1), (negatives * predicted).sum(1)
    return np.stack([correct, correct + wrong, positives.sum(1)]).astype(float)


def _f1(decisions: np.ndarray) -> dict[str, float]:
    correct, predicted, support = decisions
    return {
        "f1_micro": float(ratio(2 * correct.sum(), predicted.sum() + support.sum())),
        "f1_macro": float(ratio(2 * correct, predicted + support).mean()),
    }
