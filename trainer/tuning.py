"""What is fitted after training, on documents that the model was not trained on: decision thresholds, calibration, lexical scores."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.utils import logging

from .evaluation import EvaluationMixin, LogitBatch
from .new_labels import CosineSample
from .thresholds import check_no_guarantee, check_threshold_settings, tune_thresholds_from_batches


logger = logging.get_logger(__name__)


class TuningMixin(EvaluationMixin):
    """Mixin for a `Trainer`: tunes thresholds and fits lexical scores, and stores them in the model."""

    def tune_thresholds(
        self,
        dataset: Any = None,
        objective: str = "f1",
        shrinkage: float | None = None,
        calibration: str | None = None,
    ) -> dict:
        """
        Choose each label's decision threshold on held-out documents, and store the thresholds in the model's configuration (`thresholds`,
        `threshold_info`, `score_calibration`). With a tokenizer, also calibrate the cosine similarity of documents and label texts
        (`cosine_calibration`), with which labels that are added later are scored.

        Args:
            dataset (`Dataset` or `str`, *optional*): as in `logit_batches`; must be labeled.
            objective, shrinkage, calibration: as in [`~trainer.thresholds.tune_thresholds_from_batches`]. A model trained with
                the softmax loss alone has no per-label probabilities and always gets `"platt"`; one with lexical scores gets
                it unless another calibration is given.

        Returns:
            `dict`: the value of `threshold_info`, see [`~trainer.thresholds.TunedThresholds`].

        Raises:
            ValueError: no documents or none with labels, an unknown objective or calibration, or a guarantee (`"recall:R"`, `"fdr:Q"`)
                for a model whose label sets are reduced to leaves or have constraints.

        With `config.hierarchy`, thresholds are tuned on closed scores, so documents should have the ancestors of their labels
        ([`~trainer.close_labels`]).
        """
        check_threshold_settings(objective, shrinkage, calibration)
        config = self.bare_model().config
        if config.drops_or_adds_labels:
            check_no_guarantee(objective)
        softmax = "bce" not in config.classification_loss
        if softmax or (config.num_lexical_features and calibration is None):
            calibration = "platt"
        # Thresholds are tuned on uncalibrated logits.
        former, config.score_calibration = config.score_calibration, None
        cosines = CosineSample(self.bare_model(), self.processing_class)
        try:
            tuned = tune_thresholds_from_batches(
                cosines.collect(self._closed_logit_batches(dataset, "Tuning thresholds", with_embeds=True)),
                config.num_labels,
                objective,
                shrinkage,
                calibration,
                wide=softmax or bool(config.num_lexical_features),
                label_counts=config.label_counts,
            )
        except BaseException:
            config.score_calibration = former
            raise
        config.thresholds, config.score_calibration = tuned.thresholds, tuned.score_calibration
        config.threshold_info, config.calibrate_logits = tuned.threshold_info, True
        config.cosine_calibration = cosines.calibration()
        if "guarantee" in tuned.threshold_info:
            config.threshold_info["guaranteed_hierarchy"] = config.hierarchy
        return tuned.threshold_info

    def _closed_logit_batches(self, dataset: Any, description: str, with_embeds: bool = False) -> Iterator[LogitBatch]:
        model = self.bare_model()
        hierarchy = model.label_hierarchy if model.config.hierarchy is not None else None
        num_open = 0
        for batch in self.logit_batches(dataset, description, with_embeds):
            if hierarchy is not None and batch.labels is not None:
                num_open += int((hierarchy.close(batch.labels > 0) != (batch.labels > 0)).any(dim=1).sum())
            yield batch._replace(logits=model.close_scores(batch.logits))
        if num_open and self.is_world_process_zero():
            logger.warning(
                f"{num_open} documents lack ancestors of their labels, which the label sets of this model have "
                f'(`hierarchy="{model.config.hierarchy}"`): thresholds and their guarantee hold for labels as they are, not with the '
                "ancestors. Add these with `close_labels(documents, label_parents)` before you encode the labels, and tune again."
            )

    def fit_lexical_scores(
        self, train_dataset: Any = None, eval_dataset: Any = None, num_features: int | None = None, **kwargs: Any
    ) -> dict:
        """
        Add lexical scores to the model, fitted on training documents, with a weight chosen on validation documents. Call `tune_thresholds`
        afterward, because thresholds and calibration of the previous scores are dropped.

        Args:
            train_dataset, eval_dataset (`Dataset`, *optional*): tokenized documents with `label_indices`; the trainer's own if
                not given. Pseudo-documents in the training documents are used like other documents.
            num_features, kwargs: as in [`~trainer.lexical.fit_lexical_scores`].

        Returns:
            `dict`: what is stored as `config.lexical_info`.

        Raises:
            ValueError: documents are missing, are a stream, or carry no labels; `num_features` below 1.
        """
        from .lexical.fitting import check_lexical_documents, fit_lexical_scores  # scikit-learn, only here

        eval_dataset = self._one_eval_dataset(eval_dataset)
        check_lexical_documents("eval_dataset", eval_dataset)
        return fit_lexical_scores(
            self.bare_model(),
            self.train_dataset if train_dataset is None else train_dataset,
            self.logit_batches(eval_dataset, "Weighting lexical scores"),
            num_features,
            special_ids=list(getattr(self.processing_class, "all_special_ids", None) or []),
            hide_progress=self.args.disable_tqdm,
            **kwargs,
        )

    def keep_tuning_of(self, tuned: nn.Module, train_dataset: Any = None) -> None:
        """
        Copy what was tuned for another model on validation documents: thresholds, calibration, and the weights of the lexical scores, whose
        classifiers are refitted. For a model that was then also trained on the validation documents. A guarantee of the thresholds does not
        hold for this model and is removed.

        Args:
            tuned (`SepMldcForMultiLabelClassification`): a model with the same labels.
            train_dataset (`Dataset`, *optional*): tokenized documents with `label_indices`, for the lexical scores; the trainer's
                own if not given.

        Raises:
            ValueError: the labels differ.
        """
        model, former = self.bare_model(), tuned.config
        if model.config.labels != former.labels:
            raise ValueError(
                f"`tuned` has {former.num_labels} labels and the model has {model.config.num_labels}, or their names differ, but both "
                "need the same labels. Pass a model with the same labels in the same order."
            )
        if tuned.lexical is not None:
            from .lexical.fitting import refit_lexical_scores

            dataset = self.train_dataset if train_dataset is None else train_dataset
            special_ids = list(getattr(self.processing_class, "all_special_ids", None) or [])
            refit_lexical_scores(model, tuned, dataset, special_ids, self.args.disable_tqdm)
        for name in ("thresholds", "threshold_info", "score_calibration", "calibrate_logits", "cosine_calibration"):
            setattr(model.config, name, copy.deepcopy(getattr(former, name)))
        model.config.drop_guarantee("the model was trained again, on other documents")
