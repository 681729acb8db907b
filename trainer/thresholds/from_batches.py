"""Decision thresholds and calibration of a trained model, tuned on validation documents."""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..metrics.ranking import ratio
from ..metrics.streaming import StreamingMetrics
from .tuning import (
    choose_shrinkage,
    expected_calibration_error,
    global_threshold,
    platt_scaling,
    temperature_scaling,
    tune_thresholds,
)


logger = logging.get_logger(__name__)

# Logits of a softmax loss are shifted at will, lexical scores spread them: their histograms span more than those of a sigmoid.
WIDE_RANGE = (-40.0, 40.0)


class HalvedHistograms:
    """Histograms of the scores of documents at even and at odd positions, for what one half is tuned on and the other judges."""

    def __init__(self, num_labels: int, **kwargs):
        self.halves = [
            StreamingMetrics(num_labels, ks=(1,), thresholds=None, histograms=True, **kwargs) for _ in range(2)
        ]
        self.num_seen = 0

    def update(self, scores, labels=None, label_indices=None) -> None:
        """As [`~trainer.metrics.StreamingMetrics.update`]: scores (B, L), and labels in either form."""
        for parity, half in enumerate(self.halves):
            own = slice((parity - self.num_seen) % 2, None, 2)
            half.update(
                scores[own],
                labels=None if labels is None else labels[own],
                label_indices=None if label_indices is None else label_indices[own],
            )
        self.num_seen += len(scores)

    def histograms(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Positives, negatives and bin edges of both halves; a single document counts for both."""
        even, odd = self.halves
        return [half.histograms() for half in (even, odd if odd.num_seen else even)]


class ThresholdMixin:
    """For a `Trainer` of SEP-MLDC models: `tune_thresholds`."""

    def tune_thresholds(
        self, dataset=None, objective: str = "f1", shrinkage: float | None = None, calibration: str | None = None
    ) -> dict:
        r"""
        Choose each label's decision threshold on documents that were not trained on, and store them in the model's
        configuration (`thresholds`, `threshold_info`, and `score_calibration` where there is one).

        What the documents give is kept as one histogram of scores a label, never as an N x L matrix. Thresholds of labels
        with few positives are shrunk towards the global one (see [`~trainer.thresholds.tune_thresholds`]). The F1 in the
        answer is cross-fitted: thresholds of the even documents are scored on the odd ones and the other way round, so
        no document scores thresholds that it helped to choose. The stored thresholds come from all of them.

        Args:
            dataset (`Dataset`, *optional*): encoded documents with labels; `eval_dataset` if not given.
            objective (`str`, defaults to `"f1"`): `"f1"` / `"macro"`, `"micro"` or `"precision:0.9"`.
            shrinkage (`float`, *optional*): in positives; 0 trusts every label's own threshold. Chosen on two halves of the
                documents if not given, see [`~trainer.thresholds.choose_shrinkage`]; 20 for `"precision:P"`.
            calibration (`str`, *optional*): `"temperature"` or `"platt"`. A model trained with the softmax loss alone has no
                per-label probabilities and always gets `"platt"`; one with lexical scores gets it unless another is named.

        Returns:
            `dict`: what is stored as `threshold_info`: the settings, the number of documents, the global threshold, F1
            (`f1_micro`, `f1_macro`) with the thresholds and at 0.5, and with a calibration the expected calibration error
            before and after.

        Raises:
            ValueError: no documents or none with labels, or an unknown objective or calibration.
        """
        config = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError(
                "There are no documents to tune thresholds on. Pass `dataset`, or create the trainer with `eval_dataset`."
            )
        if config.classification_loss == "softmax" or (config.num_lexical_features and calibration is None):
            calibration = "platt"
        if calibration not in (None, "temperature", "platt"):
            raise ValueError(f"`calibration` is {calibration!r}, but it must be 'temperature', 'platt' or None.")

        even, odd = self._score_histograms(dataset)
        edges = even[2]
        both = (even[0] + odd[0], even[1] + odd[1], edges)
        scale = None
        if calibration is not None:
            scale = (platt_scaling if calibration == "platt" else temperature_scaling)(*both)
        if shrinkage is None:
            shrinkage = choose_shrinkage(even, odd, objective)
        thresholds = tune_thresholds(*both, objective=objective, shrinkage=shrinkage, calibration=scale)

        crossed = np.zeros((3, len(thresholds)))
        for tuned, held_out in ((even, odd), (odd, even)):
            if tuned[0].sum():
                own = tune_thresholds(*tuned, objective=objective, shrinkage=shrinkage, calibration=scale)
                crossed += _decisions(*held_out, own, scale)
        info = {
            "objective": objective,
            "shrinkage": shrinkage,
            "num_documents": self._num_tuning_documents,
            "global_threshold": global_threshold(*both, objective=objective, calibration=scale),
            **_f1(crossed),
            **{
                f"{name}_at_0.5": value
                for name, value in _f1(_decisions(*both, np.full(len(thresholds), 0.5), scale)).items()
            },
        }
        if calibration is not None:
            info["calibration"] = calibration
            info["expected_calibration_error_before"] = expected_calibration_error(*both)
            info["expected_calibration_error"] = expected_calibration_error(*both, calibration=scale)
        config.thresholds = [float(value) for value in thresholds]
        config.score_calibration = scale
        config.threshold_info = info
        logger.info(
            f"Thresholds tuned on {info['num_documents']} documents: F1 micro {info['f1_micro']:.4f}, macro {info['f1_macro']:.4f}."
        )
        return info

    def _score_histograms(self, dataset) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Histograms of positives and negatives, and bin edges, of the documents at even and at odd positions."""
        self.refresh_label_embeddings()
        config = self.model.config
        wide = config.classification_loss == "softmax" or config.num_lexical_features
        wide = {"histogram_range": WIDE_RANGE} if wide else {}
        halves = HalvedHistograms(config.num_labels, **wide)
        loader = self.get_eval_dataloader(dataset)
        model = self.model_wrapped if self.is_in_train else self.model
        model.eval()
        progress = tqdm(loader, desc="Tuning thresholds", disable=self.args.disable_tqdm, leave=False)
        for inputs in progress:
            inputs = self._prepare_inputs(inputs)
            labels = inputs.pop("labels", None)
            if labels is None:
                raise ValueError(
                    "Thresholds are tuned on documents with labels, but these have none. Add `label_indices`."
                )
            with torch.no_grad(), self.accelerator.autocast():
                logits = model(**inputs)["logits"].float()
            logits, labels = self.accelerator.gather_for_metrics((logits, labels))
            halves.update(logits, labels)
        if not halves.num_seen:
            raise ValueError("There are no documents to tune thresholds on. Pass a data set that is not empty.")
        self._num_tuning_documents = halves.num_seen
        return halves.histograms()


def _decisions(positives, negatives, edges, thresholds, calibration) -> np.ndarray:
    """True positives, predictions and positives of each label, (3, L), to the precision of the bins."""
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
