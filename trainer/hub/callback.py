"""Collects metrics during a run for the model card."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import TrainerCallback

from .model_card_text import split_metrics


class Measurement(NamedTuple):
    """
    The metrics of one evaluation or prediction.

    Attributes:
        step (`int`): global step of the model that was measured.
        during_training (`bool`): whether training continued afterward.
        metrics (`dict[str, float]`): as the trainer logs them (`eval_...`, `test_...`).
        deciles (`list[dict]`, *optional*): `StreamingMetrics.deciles()`, for the plot of recall by label frequency.
        kept (`list[dict]`, *optional*): `StreamingMetrics.f1_of_kept()`, for the table of documents that are sent to human review.
    """

    step: int
    during_training: bool
    metrics: dict[str, float]
    deciles: list[dict[str, float]] | None
    kept: list[dict[str, float]] | None = None


class ModelCardCallback(TrainerCallback):
    """
    Records all measurements of a model, and when they were made, until a card is written.

    Args:
        trainer (`SepMldcTrainer`): its `last_metrics` provide the data for the plot.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.measurements: list[Measurement] = []
        self.is_training = self.was_trained = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training = self.was_trained = True
        # A resumed run finds earlier measurements in its log history.
        self.measurements = [
            Measurement(entry["step"], True, entry, None) for entry in state.log_history if split_metrics(entry)
        ]

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._keep(state, metrics or {})

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._keep(state, metrics or {})

    def _keep(self, state: Any, metrics: Mapping[str, float]) -> None:
        if not split_metrics(metrics):
            return
        tables: list[Any] = []
        for name in ("deciles", "f1_of_kept"):
            try:
                tables.append(getattr(self.trainer.last_metrics, name)())
            except ValueError:  # no label counts, no thresholds, or metrics of the user's own
                tables.append(None)
        self.measurements.append(Measurement(state.global_step, self.is_training, dict(metrics), *tables))

    def card_of(self, state: Any, args: Any) -> dict[str, Any]:
        """
        The measurements of the model with its current weights: `metrics`, `metric_note` (when), `deciles` and `kept`, for `save_model_card`.

        These are the measurements made after training, or else those of the last step, or of the best step if the trainer has loaded the
        best model.
        """
        measured = [m for m in self.measurements if not m.during_training]
        note = "after training" if self.was_trained else None
        if self.is_training or not measured:
            measured = [m for m in self.measurements if m.during_training]
            steps = [m.step for m in measured]
            if not steps:
                return {"metrics": {}, "metric_note": None, "deciles": None, "kept": None}
            best = args.load_best_model_at_end and not self.is_training and state.best_global_step in steps
            step = state.best_global_step if best else steps[-1]
            measured, note = [m for m in measured if m.step == step], f"at step {step}"
        metrics: dict[str, float] = {}
        for measurement in measured:
            metrics.update(measurement.metrics)
        # Tables for the test documents if there are any, else the latest ones.
        measured = sorted(measured, key=lambda m: "test" in split_metrics(m.metrics))
        deciles = next((m.deciles for m in reversed(measured) if m.deciles), None)
        kept = next((m.kept for m in reversed(measured) if m.kept), None)
        return {"metrics": metrics, "metric_note": note, "deciles": deciles, "kept": kept}
