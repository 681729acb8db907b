"""Evaluation and prediction without an N x L matrix, and the metric by which models are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import (
    EvalLoopOutput,
    IntervalStrategy,
    PredictionOutput,
    default_compute_objective,
)

from .data.collator import SepMldcDataCollator, collate_without_tokenizer
from .data.tokenization import NO_DOCUMENTS, check_documents
from .losses.terms import TermMeans
from .metrics.streaming import StreamingMetrics
from .transformers_internals import TransformersInternals


class LogitBatch(NamedTuple):
    """
    A batch of evaluated documents, of all processes.

    Attributes:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): float32.
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*): multi-hot; `None` for documents without labels.
        inputs (`dict[str, torch.Tensor]`): the model's inputs `input_ids` and `attention_mask`, `(batch_size, length)` each; and, if
            requested, `document_embeds`, `(batch_size, d)`.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None
    inputs: dict[str, torch.Tensor]


class EvaluationMixin(TransformersInternals):
    """
    Mixin for a `Trainer`: accumulates metrics batch by batch, and lets `predict` return the best labels of each document.

    Subclasses compute losses and refresh label embeddings.
    """

    args: Any
    model: Any
    eval_dataset: Any
    data_collator: Any
    _terms: TermMeans
    _metrics: StreamingMetrics | None = None
    _last_metrics: StreamingMetrics | None = None
    _label_sets: list[np.ndarray] | None = None
    _predicting = False

    def bare_model(self) -> nn.Module:
        """The model without the wrappers of accelerate and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def refresh_label_embeddings(self) -> None:
        """Called before each evaluation; subclasses may override it."""

    # ---- Documents ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers, but no document is left out of an evaluation, regardless of `dataloader_drop_last`."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            # With persistent workers, transformers would return the cached loader of an earlier dataset.
            return self.get_test_dataloader(eval_dataset)
        if eval_dataset is None:
            self.check_documents(self.eval_dataset, "`eval_dataset`")
        else:
            self.check_documents(self.eval_dataset[eval_dataset], f"`eval_dataset` {eval_dataset!r}")
        with self._every_document():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in transformers, but no document is left out of a prediction, regardless of `dataloader_drop_last`."""
        self.check_documents(test_dataset, "The dataset")
        with self._every_document():
            return super().get_test_dataloader(test_dataset)

    def check_documents(self, dataset: Any, name: str) -> None:
        """
        Check that a dataset has documents and, unless `data_collator` is the user's own, that these are tokenized.

        Raises:
            ValueError: it has none, or they have no `input_ids`.
        """
        own = isinstance(self.data_collator, SepMldcDataCollator) or self.data_collator is collate_without_tokenizer
        check_documents(dataset, name, tokenized=own)

    @contextmanager
    def _every_document(self) -> Iterator[None]:
        """Within this context, data loaders return all documents in order, so that predictions are aligned with them."""
        names = ("dataloader_drop_last", "train_sampling_strategy")
        former = {name: getattr(self.args, name) for name in names}
        self.args.dataloader_drop_last, self.args.train_sampling_strategy = False, "random"
        try:
            yield
        finally:
            for name, value in former.items():
                setattr(self.args, name, value)

    # ---- Metrics ----

    def new_streaming_metrics(self, **kwargs: Any) -> StreamingMetrics:
        """An accumulator with this model's labels, thresholds and training counts."""
        config = self.model.config
        thresholds = config.thresholds if config.thresholds is not None else self.args.prediction_threshold
        if config.is_ranking:
            thresholds = None  # no per-label probabilities, so no decisions
        settings = {
            "ks": self.args.cutoffs(config.num_labels),
            "label_counts": config.label_counts,
            "num_documents": config.num_train_documents,
            "thresholds": thresholds,
            "hierarchy": self.bare_model().label_hierarchy,
        }
        return StreamingMetrics(config.num_labels, **{**settings, **kwargs})

    @property
    def last_metrics(self) -> StreamingMetrics:
        """
        The accumulator of the last evaluation or prediction of documents with labels: `per_label()`, `deciles()`, ...

        Raises:
            ValueError: there has been none.
        """
        if self._last_metrics is None:
            raise ValueError(
                "Nothing has been evaluated yet. Call `evaluate` or `predict` on documents with labels first."
            )
        return self._last_metrics

    # ---- Evaluation and prediction ----

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        As in transformers; `predictions` are the best `prediction_top_k` labels per document, `(probabilities, label ids)` of
        shape `(num_documents, k)` each, in the order of the documents. The labels that are assigned are in `last_label_sets`. A model
        that only ranks labels (`config.is_ranking`) gives logits instead of probabilities and assigns no labels.
        """
        self._predicting = True
        try:
            output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._predicting = False
        if self.compute_metrics is not None:
            return output  # whatever the model returns
        scores, indices, *assigned = output.predictions
        self._label_sets = [row[row >= 0] for row in assigned[0]] if assigned else None
        return output._replace(predictions=(scores, indices))

    @property
    def last_label_sets(self) -> list[np.ndarray] | None:
        """
        Label ids of the predicted label set of each document of the last `predict`, best first, at most `prediction_top_k` per document;
        `None` for a model that only ranks labels.
        """
        return self._label_sets

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.refresh_label_embeddings()
        of_training, self._terms = self._terms, TermMeans()
        self._metrics = self.new_streaming_metrics() if self.compute_metrics is None else None
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if output.num_samples == 0:  # a stream: the length of other datasets has been checked
                raise ValueError(NO_DOCUMENTS.format("The dataset"))
            values = self._terms.pop(self.accelerator)
            if self._metrics is not None and self._metrics.num_seen > 0:
                values.update(self._metrics.compute())
                self._last_metrics = self._metrics
        finally:
            self._terms, self._metrics = of_training, None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._metrics is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = send_to_device(inputs, self.args.device)
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if inputs.get("labels") is not None:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss = loss.detach()
            else:
                outputs = model(**inputs)
        bare = self.bare_model()
        logits = bare.close_scores(outputs["logits"].float())
        if inputs.get("labels") is not None:
            logits_of_all, labels_of_all = self.gather_function((logits, inputs["labels"]))
            calibrated = self.model.config.score_calibration is not None
            self._metrics.update(
                logits_of_all,
                labels_of_all,
                probabilities=bare.probabilities(logits_of_all) if calibrated else None,
                predicted=self._predicted_label_sets(logits_of_all),
            )
        if not self._predicting:
            return loss, None, None
        scores, indices = logits.topk(min(self.args.prediction_top_k, logits.shape[1]), dim=-1)
        if bare.config.is_ranking:  # there are no probabilities
            return loss, (scores, indices), None
        found = (bare.probabilities(scores, logits), indices)
        return loss, (*found, self._assigned(logits, *found)), None

    def _predicted_label_sets(self, logits: torch.Tensor, leaves: bool = False) -> torch.Tensor | None:
        """Label sets (B, L) if there is a hierarchy or there are constraints, closed unless `leaves`; else `None`."""
        bare = self.bare_model()
        config = bare.config
        if config.is_ranking or (config.hierarchy is None and not config.label_constraints):
            return None
        threshold = None if config.thresholds is not None else self.args.prediction_threshold
        return bare.label_sets(bare.probabilities(logits), threshold, leaves=leaves and config.hierarchy == "leaves")

    def _assigned(self, logits: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """For logits (B, L): ids (B, k) of the assigned labels, best first, padded with -1; and probabilities and ids (B, k) of the best labels."""
        decided = self._predicted_label_sets(logits, leaves=True)
        if decided is not None:
            best = torch.where(decided, logits, -torch.inf).topk(indices.shape[1], dim=-1)
            return best.indices.masked_fill(best.values == -torch.inf, -1)
        thresholds: Any = self.model.config.thresholds
        if thresholds is None:
            thresholds = [self.args.prediction_threshold] * logits.shape[1]
        reached = scores >= torch.tensor(thresholds, device=scores.device)[indices]
        order = reached.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return indices.masked_fill(~reached, -1).gather(1, order)

    def logit_batches(
        self, dataset: Any = None, description: str = "Evaluation", with_embeds: bool = False
    ) -> Iterator[LogitBatch]:
        """
        Logits of all documents of a dataset, in order, batch by batch; used for thresholds, lexical scores and custom metrics. Label
        embeddings are refreshed first, and the model is in evaluation mode. With several processes, each process gets all documents.

        Args:
            dataset (`Dataset` or `str`, *optional*): encoded documents, with labels or without; `eval_dataset` if not given, or
                the one with this name where `eval_dataset` is a dictionary.
            description (`str`, defaults to `"Evaluation"`): of the progress bar.
            with_embeds (`bool`, defaults to `False`): also yield document embeddings.

        Yields:
            [`LogitBatch`].

        Raises:
            ValueError: there is no dataset, or `eval_dataset` is a dictionary and none of its names is given.
        """
        loader = self.get_test_dataloader(self._one_eval_dataset(dataset))
        self.refresh_label_embeddings()
        model = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        pad = {"input_ids": getattr(self.processing_class, "pad_token_id", None) or 0}
        model.eval()
        try:
            for inputs in tqdm(loader, desc=description, disable=self.args.disable_tqdm, leave=False):
                inputs = send_to_device(inputs, self.args.device)
                labels = inputs.pop("labels", None)
                with torch.no_grad(), self.accelerator.autocast():
                    outputs = model(**inputs)
                logits = outputs["logits"].float()
                batch = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
                if self.args.world_size > 1:  # each process pads to a different length
                    batch = {
                        name: self.accelerator.pad_across_processes(value, dim=1, pad_index=pad.get(name, 0))
                        for name, value in batch.items()
                    }
                if with_embeds:
                    batch["document_embeds"] = outputs["document_embeds"].float()
                batch["logits"] = logits
                if labels is not None:
                    batch["labels"] = labels
                batch = self.accelerator.gather_for_metrics(batch)
                yield LogitBatch(batch.pop("logits"), batch.pop("labels", None), batch)
        finally:
            loader.end()  # otherwise, accelerate considers a loop that was left early as still running
            model.train(was_training)

    def _one_eval_dataset(self, dataset=None):
        dataset = self.eval_dataset if dataset is None else dataset
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if isinstance(dataset, str) and dataset in names:
            return self.eval_dataset[dataset]
        if dataset is None or isinstance(dataset, str):
            raise ValueError(
                f"`dataset` is {dataset!r}, but documents are needed. Pass a dataset, or create the trainer with `eval_dataset`."
            )
        if isinstance(dataset, dict):
            raise ValueError(
                f"There are several datasets ({', '.join(map(str, dataset))}), but one is needed. Pass the dataset, or its "
                "name, as `dataset`."
            )
        return dataset

    # ---- The metric by which models are compared ----

    def check_metric_for_best_model(self) -> None:
        """
        Check `metric_for_best_model` and early stopping before training; transformers checks them only after the first evaluation.

        Raises:
            ValueError: evaluations do not measure this metric, or early stopping has no metric.
        """
        args = self.args
        early = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        if early and (args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO):
            missing = "`metric_for_best_model`" if args.metric_for_best_model is None else "`eval_strategy`"
            raise ValueError(
                f"Early stopping is on, but {missing} is not given, and it watches a metric of evaluations during the training. "
                'Set `eval_strategy="epoch"` and, for example, `metric_for_best_model="ndcg@5"`.'
            )
        if args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO:
            return
        if self.compute_metrics is not None:
            return  # its names are not known
        names = self.metric_names()
        sets = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if sets:
            names = [f"{dataset}_{name}" for dataset in sets for name in names]
        if args.metric_for_best_model.removeprefix("eval_") not in names:
            raise ValueError(
                f"`metric_for_best_model` is {args.metric_for_best_model!r}, but an evaluation of this model measures only "
                f"{', '.join(names)}. Choose one of these."
            )

    def metric_names(self) -> list[str]:
        """Names of the metrics that `evaluate` computes on labeled documents, without the prefix `eval_`."""
        args, metrics = self.args, self.new_streaming_metrics()
        names = ["loss", "classification_loss"]
        if args.label_loss_weight > 0:
            names.append("label_contrastive_loss")
        if args.document_loss_weight > 0:
            names += ["document_contrastive_loss", "anchors_with_positive"]
        metrics.update(torch.zeros(1, metrics.num_labels), label_indices=[[0]])
        return names + list(metrics.compute())

    def compute_objective(self, metrics: dict[str, float]) -> float:
        """
        The default objective of `hyperparameter_search`, to be maximized: `metric_for_best_model` if given, else nDCG at the largest k of
        `metric_ks`; the mean over all evaluation sets. (transformers would add up all metrics, including losses.)
        """
        name = self.args.metric_for_best_model
        if name is not None:
            return metrics[f"eval_{name.removeprefix('eval_')}"]
        k = max(self.args.cutoffs(self.model.config.num_labels))
        values = [value for name, value in metrics.items() if name.endswith(f"ndcg@{k}")]
        return sum(values) / len(values) if values else default_compute_objective(metrics)

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        *more: Any,
        **kwargs: Any,
    ) -> Any:
        """
        As in transformers, but by default one metric is maximized, see `compute_objective`. With a custom `compute_objective`,
        `direction` is `"minimize"` unless it is given, as in transformers.
        """
        if direction is None:
            name = self.args.metric_for_best_model
            is_loss = name is not None and name.endswith("loss")
            direction = "minimize" if compute_objective is not None or is_loss else "maximize"
        own = type(self).compute_objective.__get__(self)
        objective = own if compute_objective is None else compute_objective
        try:
            return super().hyperparameter_search(hp_space, objective, n_trials, direction, *more, **kwargs)
        finally:
            self.__dict__.pop("compute_objective", None)  # transformers keeps it from the last search
