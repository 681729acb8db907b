"""Trainer of SEP-MLDC models."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import (
    EvalLoopOutput,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
    default_compute_objective,
    has_length,
)
from transformers.utils import logging

from .checkpoints import MANIFEST_NAME, CheckpointGuard, damaged_files, last_whole_checkpoint
from .data.collator import SepMldcDataCollator, check_label_indices, check_multi_hot
from .data.sampler import DocumentSampler
from .frozen_layers import cached_frozen_layers
from .hub.mixin import HubMixin
from .label_schedule import LabelSchedule
from .losses.contrastive import (
    document_contrastive_loss,
    label_contrastive_loss,
    present_labels,
    share_of_anchors_with_positive,
)
from .losses.terms import TermMeans
from .metrics.streaming import StreamingMetrics
from .processes import keep_process_group
from .run_record import EpochOrder, RestoreCallbacks, RunRecord, check_same_run, read_record, run_fingerprint
from .thresholds import check_threshold_settings, tune_thresholds_from_batches
from .training_arguments import HEAD_LEARNING_RATE_BY_CLASSIFIER, SepMldcTrainingArguments
from .transformers_internals import TransformersInternals


logger = logging.get_logger(__name__)


def _is_sharded(model: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied."""
    return hasattr(model, "set_reshard_after_forward")


class LogitBatch(NamedTuple):
    """
    A batch of evaluated documents, of all processes.

    Attributes:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): float32.
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*): multi-hot; `None` for documents without labels.
        inputs (`dict[str, torch.Tensor]`): what the model read: `input_ids` and `attention_mask`, `(batch_size, length)` each.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None
    inputs: dict[str, torch.Tensor]


class SepMldcTrainer(HubMixin, TransformersInternals):
    r"""
    `Trainer` for [`SepMldcForMultiLabelClassification`]: L = L_ce + β L1 + γ L2 (Eq. 21).

    It decides which labels are encoded in a step, stores their embeddings after backward, encodes all of them before
    evaluation and saving, and logs every term. With several processes it gathers embeddings and labels, so that N
    processes with batches of b documents compute what one computes with N·b.

    Evaluation and prediction never hold an N x L matrix: `evaluate` accumulates counts, `predict` returns the best
    `prediction_top_k` labels per document, `(probabilities, label ids)`, in the order of the documents. A custom
    `compute_metrics` switches to the protocol of transformers' `batch_eval_metrics`.

    Args:
        model (`SepMldcForMultiLabelClassification`): to train.
        args ([`SepMldcTrainingArguments`]): settings.
        data_collator (`Callable`, *optional*): a [`SepMldcDataCollator`] by default.
        train_dataset, eval_dataset (`Dataset`, *optional*): documents with `input_ids`, ... and `label_indices` (ids of the
            labels) or `labels` (multi-hot). `eval_dataset` may be a dictionary of data sets.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer; needed for `label_encoding="encoder"`.
        model_init (`Callable`, *optional*): as in `Trainer`.
        compute_loss_func (`Callable`, *optional*): `(outputs, labels, num_items_in_batch)` to a loss that takes the place of the
            classification loss L_ce; the contrastive terms are added. As in `Trainer`, it is not divided by
            `gradient_accumulation_steps`.
        compute_metrics, callbacks, optimizers, kwargs: as in `Trainer`.

    Raises:
        ValueError: arguments of another class, `label_encoding="encoder"` without a tokenizer, with PEFT adapters (which do not save
            the label embeddings) or under a wrapper that cannot run it, or a k of `metric_ks` above the number of labels.
    """

    further_columns: tuple[str, ...] = ("label_indices",)

    def __init__(
        self,
        model: Any = None,
        args: SepMldcTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        *more: Any,
        **kwargs: Any,
    ):
        args = args if args is not None else SepMldcTrainingArguments(output_dir="outputs")
        if not isinstance(args, SepMldcTrainingArguments):
            raise ValueError(
                f"`args` is a {type(args).__name__}, but SepMldcTrainer needs SepMldcTrainingArguments (they hold the loss "
                "weights). Create those, or use transformers' Trainer."
            )
        if args.label_encoding == "encoder" and processing_class is None:
            raise ValueError(
                '`label_encoding="encoder"` encodes label texts during training and needs a tokenizer. Pass '
                '`processing_class=tokenizer`, or choose `label_encoding="embedding"`.'
            )
        self.label_schedule: LabelSchedule | None = None
        if args.label_encoding == "encoder":
            self.label_schedule = LabelSchedule(
                processing_class, args.labels_per_step, args.max_label_length, args.seed
            )
        self._terms = TermMeans()
        self._metrics: StreamingMetrics | None = None
        self._measured: StreamingMetrics | None = None
        self._evaluated: StreamingMetrics | None = None
        self._predicting = False
        self._encoded: tuple[torch.Tensor, torch.Tensor] | None = None
        self._unlogged_loss: torch.Tensor | float = 0.0
        self._last_logged_step = 0
        self._epoch_order, self._restore, self._checkpoint_guard = EpochOrder(), RestoreCallbacks(), CheckpointGuard()
        own = [self._restore, RunRecord(), self._epoch_order, self._checkpoint_guard]
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics,
            [*own, *(callbacks or [])],
            *more,
            **kwargs,
        )
        if data_collator is None and processing_class is not None:
            self.data_collator = SepMldcDataCollator(
                processing_class,
                num_labels=self.model.config.num_labels,
                pad_to_multiple_of=args.pad_to_multiple_of,
                label_dtype=torch.uint8,
            )
        if self.label_schedule is not None:
            self._check_label_encoding()
            self.label_schedule.prepare(self.model.config.label_texts)
        keep_process_group()
        args.cutoffs(self.model.config.num_labels)
        if args.head_learning_rate is None:
            args.head_learning_rate = HEAD_LEARNING_RATE_BY_CLASSIFIER[self.model.config.classifier]
        self._configure_label_table(self.model)

    def _check_label_encoding(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would split the label texts among them. Start one process per GPU with "
                '`accelerate launch`, or choose `label_encoding="embedding"`.'
            )
        if self.is_fsdp_enabled or _is_sharded(self.model):
            raise ValueError(
                '`label_encoding="encoder"` writes label embeddings between steps, which FSDP shards. Choose '
                '`label_encoding="embedding"`, or DDP.'
            )

    # ---- Label embeddings ----

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._configure_label_table(model)
        if self.label_schedule is not None:
            self.label_schedule.invalidate()
        return model

    def _configure_label_table(self, model: nn.Module) -> None:
        # A trained table that no loss reaches would be a parameter without gradient, which stops DDP.
        used = model.uses_label_embeds or self.args.label_loss_weight > 0
        if used and getattr(model, "peft_config", None):
            # A saved adapter does not contain the table.
            if self.args.label_encoding == "encoder":
                raise ValueError(
                    '`label_encoding="encoder"` changes the label embeddings, which a PEFT adapter does not save. Choose '
                    '`label_encoding="embedding"`, which then keeps the label embeddings of the base model, or train without PEFT.'
                )
            logger.warning(
                "A PEFT adapter does not save label embeddings: those of the base model are kept, untrained."
            )
            used = False
        model.label_embeddings.requires_grad_(self.args.label_encoding == "embedding" and used)

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def refresh_label_embeddings(self) -> None:
        """
        Encode all label texts with the encoder as it is now and store the embeddings; nothing to do under
        `label_encoding="embedding"`. Evaluation, prediction and saving call it.
        """
        if self.label_schedule is None:
            return
        model = self._bare_model()
        hidden = self.args.disable_tqdm or not self.is_local_process_zero() or model.config.num_labels < 1000
        with tqdm(total=model.config.num_labels, desc="Encoding labels", disable=hidden, leave=False) as bar:
            batch_size = max(self.args.eval_batch_size, 64)
            self.label_schedule.refresh(model, batch_size, self.accelerator.autocast, bar.update)

    # ---- Losses ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Classification loss of the model, plus β L1 + γ L2 over the documents of all processes."""
        args = self.args
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                "The documents have no `labels` or `label_indices`, but a loss needs them. Add one of them."
            )
        distributed = model.training and args.world_size > 1
        all_labels = self.accelerator.gather(labels.to(torch.uint8)) if distributed else labels
        contrastive = args.label_loss_weight > 0 or args.document_loss_weight > 0
        present = present_labels(all_labels) if contrastive else None  # once per step: it forces a device sync

        candidates = None
        uses_labels = self.model.uses_label_embeds or args.label_loss_weight > 0
        if model.training and self.label_schedule is not None and uses_labels:
            # A hyperparameter search may have changed them.
            self.label_schedule.seed, self.label_schedule.labels_per_step = args.seed, args.labels_per_step
            candidates = self.label_schedule.select(all_labels, self.state.global_step, present)
            inputs = {**inputs, **self.label_schedule.inputs(candidates, labels.device)}
            candidates = inputs["candidate_indices"]
        if model.training and _is_sharded(model):
            # The label loss reads `label_embeds` after forward: the root's parameters must not be freed before backward.
            model.set_reshard_after_forward(False, recurse=False)
        outputs = model(**inputs, return_label_embeds=candidates is None)
        if candidates is not None:
            self._encoded = (candidates, outputs["candidate_embeds"].detach())

        loss = outputs["loss"]
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        terms = {"classification_loss": loss.detach()}
        if contrastive:
            added = self._contrastive_terms(outputs, all_labels, present, candidates, distributed, terms)
            if self.compute_loss_func is not None and model.training:
                added = added / self.current_gradient_accumulation_steps  # transformers leaves that to a custom loss
            loss = loss + added
        self._terms.add(terms)
        return (loss, outputs) if return_outputs else loss

    def _contrastive_terms(
        self,
        outputs: Any,
        labels: torch.Tensor,
        present: torch.Tensor,
        candidates: torch.Tensor | None,
        distributed: bool,
        terms: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """β L1 + γ L2 of the documents of all processes; `terms` gets what is logged."""
        args = self.args
        # Both losses are the same without the labels that no document of the batch has: nothing of size B x L is made.
        labels = labels.index_select(1, present)
        weighted = []
        if args.label_loss_weight > 0:
            rows = self._label_rows(outputs, candidates, present)
            term = label_contrastive_loss(rows, labels, args.contrastive_temperature, args.contrastive_weighting)
            terms["label_contrastive_loss"] = term.detach()
            weighted.append(args.label_loss_weight * term)
        if args.document_loss_weight > 0:
            embeds = outputs["document_embeds"]
            embeds = self._gather_with_gradient(embeds) if distributed else embeds
            term = document_contrastive_loss(embeds, labels, args.contrastive_temperature, args.contrastive_weighting)
            terms["document_contrastive_loss"] = term.detach()
            terms["anchors_with_positive"] = share_of_anchors_with_positive(labels)
            if distributed:
                # DDP averages gradients over N processes, each of which has the gradient of its own documents only.
                term = args.world_size * term - (args.world_size - 1) * term.detach()
            weighted.append(args.document_loss_weight * term)
        return sum(weighted)

    def _label_rows(self, outputs: Any, candidates: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor:
        """Embeddings of the present labels: encoded ones with gradient where there are any, stored ones elsewhere."""
        if candidates is None:
            return outputs["label_embeds"].index_select(0, present)
        rows = self._bare_model().label_embeddings.detach().index_select(0, present).float()
        position = torch.searchsorted(candidates, present).clamp_max(len(candidates) - 1)
        encoded = candidates[position] == present
        return torch.where(encoded.unsqueeze(1), outputs["candidate_embeds"][position], rows)

    def _gather_with_gradient(self, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of all processes, with gradient for this process's own rows."""
        gathered = list(self.accelerator.gather(embeds.detach()).split(len(embeds)))
        gathered[self.accelerator.process_index] = embeds
        return torch.cat(gathered)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._unlogged_loss = self._unlogged_loss + loss
        if self.label_schedule is not None:
            encoded, self._encoded = self._encoded, None
            if encoded is not None:
                self.label_schedule.commit(self._bare_model(), *encoded)
            self.label_schedule.invalidate()
        return loss

    # ---- Optimizer ----

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not name.endswith(("label_embeddings", "similarity_scale"))
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with `head_learning_rate` for all parameters outside the backbone."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            named = (self.model if model is None else model).named_parameters()
            head = {id(parameter) for name, parameter in named if "backbone." not in name}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in head]
                if own:
                    options = {key: value for key, value in group.items() if key != "params"}
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                    optimizer.add_param_group({**options, "params": own, "lr": self.args.head_learning_rate})
            optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # ---- Order of documents ----

    def train_sampler(self, dataset: Any) -> Sampler | None:
        """The order of the training documents, a pure function of (seed, epoch, global batch size); `None` for a stream."""
        if dataset is None or not has_length(dataset):
            return None
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        columns = getattr(dataset, "column_names", None) or []
        lengths = label_sets = None
        if self.args.train_sampling_strategy == "group_by_length":
            name = self.args.length_column_name
            lengths = dataset[name] if name in columns else [len(document["input_ids"]) for document in dataset]
        if self.args.group_by_label_set:
            num_labels = self.model.config.num_labels
            if "label_indices" in columns:
                label_sets = [check_label_indices(ids, num_labels) for ids in dataset["label_indices"]]
            else:
                rows = (check_multi_hot(document["labels"], num_labels) for document in dataset)
                label_sets = [row.nonzero()[0].tolist() for row in rows]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        sampler = DocumentSampler(
            len(dataset), self.args.train_batch_size * self.args.world_size, lengths, label_sets, seed
        )
        self._epoch_order.sampler = sampler
        return sampler

    # ---- Evaluation and prediction ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers, but no document is left out of an evaluation, regardless of `dataloader_drop_last`."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            # With persistent workers, transformers would return the loader of an earlier data set.
            return self.get_test_dataloader(eval_dataset)
        with self._every_document():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in transformers, but no document is left out of a prediction, regardless of `dataloader_drop_last`."""
        with self._every_document():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_document(self) -> Iterator[None]:
        """Loaders made inside give all documents in their order: what `predict` returns must line up with them."""
        names = ("dataloader_drop_last", "train_sampling_strategy")
        former = {name: getattr(self.args, name) for name in names}
        self.args.dataloader_drop_last, self.args.train_sampling_strategy = False, "random"
        try:
            yield
        finally:
            for name, value in former.items():
                setattr(self.args, name, value)

    def new_streaming_metrics(self, **kwargs: Any) -> StreamingMetrics:
        """An accumulator with this model's labels, thresholds and training counts."""
        config = self.model.config
        thresholds = config.thresholds if config.thresholds is not None else self.args.prediction_threshold
        if config.is_ranking:
            thresholds = None  # no probabilities of single labels, so no decisions
        settings = {
            "ks": self.args.cutoffs(config.num_labels),
            "label_counts": config.label_counts,
            "num_documents": config.num_train_documents,
            "thresholds": thresholds,
        }
        return StreamingMetrics(config.num_labels, **{**settings, **kwargs})

    @property
    def last_metrics(self) -> StreamingMetrics:
        """
        The accumulator of the last evaluation or prediction of documents with labels: `per_label()`, `deciles()`, ...

        Raises:
            ValueError: there has been none.
        """
        if self._measured is None:
            raise ValueError(
                "Nothing has been evaluated yet. Call `evaluate` or `predict` on documents with labels first."
            )
        return self._measured

    @property
    def last_evaluation(self) -> StreamingMetrics | None:
        """The accumulator of the last `evaluate`, regardless of later predictions; `None` before the first."""
        return self._evaluated

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        As in transformers; `predictions` are the best `prediction_top_k` labels per document, `(probabilities, label ids)` of
        shape `(num_documents, k)` each, in the order of the documents.
        """
        self._predicting = True
        try:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._predicting = False

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
            values = self._terms.pop(self.accelerator)
            if self._metrics is not None and self._metrics.num_seen > 0:
                values.update(self._metrics.compute())
                self._measured = self._metrics
                self._evaluated = self._evaluated if self._predicting else self._metrics
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
        logits = outputs["logits"].float()
        if inputs.get("labels") is not None:
            logits_of_all, labels_of_all = self.gather_function((logits, inputs["labels"]))
            calibrated = self.model.config.score_calibration is not None
            probabilities = self._bare_model().probabilities(logits_of_all) if calibrated else None
            self._metrics.update(logits_of_all, labels_of_all, probabilities=probabilities)
        if not self._predicting:
            return loss, None, None
        scores, indices = logits.topk(min(self.args.prediction_top_k, logits.shape[1]), dim=-1)
        return loss, (self._bare_model().probabilities(scores, logits), indices), None

    def logit_batches(self, dataset: Any = None, description: str = "Evaluation") -> Iterator[LogitBatch]:
        """
        Logits of all documents of a data set in their order, batch by batch: the input of thresholds, lexical scores and custom
        metrics. Label embeddings are refreshed first, and the model is in evaluation mode. With several processes,
        each one gets the documents of all.

        Args:
            dataset (`Dataset` or `str`, *optional*): encoded documents, with labels or without; `eval_dataset` if not given, or
                the one with this name where `eval_dataset` is a dictionary.
            description (`str`, defaults to `"Evaluation"`): of the progress bar.

        Yields:
            [`LogitBatch`].

        Raises:
            ValueError: there is no data set, or `eval_dataset` is a dictionary and none of its names is given.
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
                    logits = model(**inputs)["logits"].float()
                batch = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
                if self.args.world_size > 1:  # processes pad to lengths of their own
                    batch = {
                        name: self.accelerator.pad_across_processes(value, dim=1, pad_index=pad.get(name, 0))
                        for name, value in batch.items()
                    }
                batch["logits"] = logits
                if labels is not None:
                    batch["labels"] = labels
                batch = self.accelerator.gather_for_metrics(batch)
                yield LogitBatch(batch.pop("logits"), batch.pop("labels", None), batch)
        finally:
            loader.end()  # accelerate would consider a loop that was left early as still running
            model.train(was_training)

    def _one_eval_dataset(self, dataset=None):
        dataset = self.eval_dataset if dataset is None else dataset
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if isinstance(dataset, str) and dataset in names:
            return self.eval_dataset[dataset]
        if dataset is None or isinstance(dataset, str):
            raise ValueError(
                f"`dataset` is {dataset!r}, but documents are needed. Pass a data set, or create the trainer with `eval_dataset`."
            )
        if isinstance(dataset, dict):
            raise ValueError(
                f"There are several data sets ({', '.join(map(str, dataset))}), but one is needed. Pass the data set, or its "
                "name, as `dataset`."
            )
        return dataset

    def tune_thresholds(
        self,
        dataset: Any = None,
        objective: str = "f1",
        shrinkage: float | None = None,
        calibration: str | None = None,
    ) -> dict:
        """
        Choose each label's decision threshold on documents that were not trained on, and store them in the model's
        configuration (`thresholds`, `threshold_info`, `score_calibration`).

        Args:
            dataset (`Dataset` or `str`, *optional*): as in `logit_batches`; its documents need labels.
            objective, shrinkage, calibration: as in [`~trainer.thresholds.tune_thresholds_from_batches`]. A model trained with
                the softmax loss alone has no per-label probabilities and always gets `"platt"`; one with lexical scores gets
                it unless another calibration is named.

        Returns:
            `dict`: what is stored as `threshold_info`, see [`~trainer.thresholds.TunedThresholds`].

        Raises:
            ValueError: no documents or none with labels, or an unknown objective or calibration.
        """
        check_threshold_settings(objective, shrinkage, calibration)
        config = self._bare_model().config
        softmax = "bce" not in config.classification_loss
        if softmax or (config.num_lexical_features and calibration is None):
            calibration = "platt"
        # Thresholds are tuned on uncalibrated logits.
        former, config.score_calibration = config.score_calibration, None
        try:
            tuned = tune_thresholds_from_batches(
                self.logit_batches(dataset, "Tuning thresholds"),
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
        return tuned.threshold_info

    def fit_lexical_scores(
        self, train_dataset: Any = None, eval_dataset: Any = None, num_features: int | None = None, **kwargs: Any
    ) -> dict:
        """
        Give the model lexical scores fitted on training documents and weighted on validation documents. Call `tune_thresholds`
        afterwards, because thresholds and calibration of the former scores are dropped.

        Args:
            train_dataset, eval_dataset (`Dataset`, *optional*): tokenized documents with `label_indices`; the trainer's own if
                not given. Pseudo-documents among the training documents count like others.
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
            self._bare_model(),
            self.train_dataset if train_dataset is None else train_dataset,
            self.logit_batches(eval_dataset, "Weighing lexical scores"),
            num_features,
            special_ids=list(getattr(self.processing_class, "all_special_ids", None) or []),
            hide_progress=self.args.disable_tqdm,
            **kwargs,
        )

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with every term of the loss; `train_loss` is the mean over the whole run, also after a resume."""
        if "loss" in logs and self.is_in_train:
            self._stop_if_not_finite(logs["loss"])
            self._record.loss_sum += self._mean_of_processes(self._unlogged_loss)
            self._unlogged_loss, self._last_logged_step = 0.0, self.state.global_step
            logs.update(self._terms.pop(self.accelerator))
        if "train_loss" in logs:
            total = self._record.loss_sum + self._mean_of_processes(self._unlogged_loss)
            logs["train_loss"] = total / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _mean_of_processes(self, value: torch.Tensor | float) -> float:
        value = torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
        return self.accelerator.reduce(value, reduction="mean").item()

    def _stop_if_not_finite(self, loss: float) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            whole = last_whole_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"The loss became {loss} between steps {self._last_logged_step + 1} and {self.state.global_step}, and a model "
                "trained on it is lost; no checkpoint of it was written. Lower the learning rate or use bf16 instead of fp16, and "
                f"{'resume from ' + whole if whole else 'start again'}."
            )

    # ---- Training and checkpoints ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As in transformers. `resume_from_checkpoint=True` takes the newest checkpoint that is complete and undamaged.
        A resumed run has the `train_loss` and the patience of early stopping of the whole run.

        Raises:
            ValueError: there is no whole checkpoint, it is damaged or belongs to another run (other labels, label descriptions
                or model settings), or `metric_for_best_model` is unknown.
            FloatingPointError: the loss became NaN or infinite.
        """
        self._check_metric_for_best_model()
        checkpoint = self._checked_checkpoint(resume_from_checkpoint)
        self._record.fingerprint = run_fingerprint(self._bare_model(), self.args, self.train_dataset)
        self._record.loss_sum = 0.0
        if checkpoint is not None:
            check_same_run(checkpoint, self.model.config.labels, self._record.fingerprint)
            self._record.loss_sum = read_record(checkpoint).get("loss_sum", 0.0)
        self._restore.callbacks = list(self.callback_handler.callbacks)
        self._terms, self._unlogged_loss, self._last_logged_step = TermMeans(), 0.0, 0
        if self.label_schedule is not None:
            self.label_schedule.restart()
            self.label_schedule.prepare(self.model.config.label_texts)
        try:
            with self._cached_frozen_layers():
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._checkpoint_guard.close()
        return output._replace(training_loss=output.metrics["train_loss"])

    def _cached_frozen_layers(self) -> AbstractContextManager:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or _is_sharded(self.model):
            return nullcontext()  # layers of sharded parameters cannot be run one by one
        datasets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if self.args.eval_strategy == IntervalStrategy.NO:
            datasets = []
        model = self.model
        return cached_frozen_layers(
            model.backbone, [self.train_dataset, *datasets], self.args, model.config.encoder_max_length
        )

    @property
    def _record(self) -> RunRecord:
        # Looked up, because `restore_callback_states_from_checkpoint` replaces it.
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RunRecord))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but nothing after the last step: a resume of a finished run would train one step more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _checked_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if not resume_from_checkpoint:
            return None
        whole = last_whole_checkpoint(self.args.output_dir)
        if resume_from_checkpoint is True:
            if whole is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from. Start without `resume_from_checkpoint`."
                )
            return whole
        damaged = damaged_files(resume_from_checkpoint)
        if damaged and damaged != [MANIFEST_NAME]:  # a folder of another trainer has no manifest
            remedy = f"Resume from {whole}." if whole else "Start without `resume_from_checkpoint`."
            raise ValueError(
                f"{resume_from_checkpoint} is damaged: {', '.join(damaged)} is missing or not as it was saved. {remedy}"
            )
        return resume_from_checkpoint

    def _check_metric_for_best_model(self) -> None:
        """Checks that transformers makes after the first evaluation only."""
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
        """Names of what `evaluate` measures on documents with labels, without the prefix `eval_`."""
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
        What `hyperparameter_search` maximizes by default: `metric_for_best_model` if it is given, else nDCG at the largest k of
        `metric_ks`, for several evaluation sets the mean over them. transformers would add up all metrics, losses included.
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
            self.__dict__.pop("compute_objective", None)  # transformers keeps the last one

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with the label embeddings of the encoder as it is now."""
        if self.is_in_train and _internal_call and output_dir is not None:
            self._begin_checkpoint(output_dir)
        self.refresh_label_embeddings()
        super().save_model(output_dir, _internal_call)

    def _begin_checkpoint(self, folder: str) -> None:
        # Each process looks at its own part of sharded weights; all stop if one of them must.
        parts = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self.model.parameters())
        weights = sum(part.detach().float().sum() for part in parts)
        pending = self._mean_of_processes(self._unlogged_loss + 0 * weights)
        self._stop_if_not_finite(pending)
        self._record.loss_sum += pending
        self._unlogged_loss = 0.0
        self._checkpoint_guard.begin(folder, self.args)

    def end(self) -> None:
        """As in transformers, after a barrier: a process that ends earlier would abort the others."""
        self.accelerator.wait_for_everyone()
        super().end()
