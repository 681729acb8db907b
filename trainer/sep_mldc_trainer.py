"""Trainer of SEP-MLDC models."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers.trainer_utils import (
    IntervalStrategy,
    TrainOutput,
    has_length,
)
from transformers.utils import logging

from modeling_sep_mldc import SepMldcConfig
from modeling_sep_mldc.modeling_sep_mldc import apply_umask

from .adapters import load_adapters, lora_rank, save_adapters
from .checkpoints import MANIFEST_NAME, CheckpointGuard, damaged_files, last_whole_checkpoint
from .cpu_attention import float32_attention
from .data.collator import (
    SepMldcDataCollator,
    check_input_ids,
    check_label_indices,
    check_multi_hot,
    collate_without_tokenizer,
)
from .data.sampler import DocumentSampler
from .devices import release_freed_memory
from .evaluation import EvaluationMixin, LogitBatch
from .frozen_layers import cached_frozen_layers
from .hub.mixin import HubMixin
from .label_schedule import LabelSchedule
from .losses.contrastive import (
    document_contrastive_loss,
    label_contrastive_loss,
    present_labels,
    share_of_anchors_with_positive,
)
from .losses.gradient_norms import gradient_norms, parameter_groups
from .losses.terms import TermMeans
from .new_labels import CosineSample
from .processes import keep_process_group
from .run_record import EpochOrder, RestoreCallbacks, RunRecord, check_same_run, read_record, run_fingerprint
from .thresholds import check_no_guarantee, check_threshold_settings, tune_thresholds_from_batches
from .training_arguments import SepMldcTrainingArguments, recommended_head_learning_rate


logger = logging.get_logger(__name__)

# On a CPU, after this number of batches, freed memory goes back to the operating system.
RELEASE_EVERY = 50


def _is_sharded(model: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied."""
    return hasattr(model, "set_reshard_after_forward")


def _checked_arguments(
    args: SepMldcTrainingArguments | None, processing_class: Any, compute_metrics: Callable | None
) -> SepMldcTrainingArguments:
    """Check the arguments of a trainer: their class, a tokenizer if one is needed, and that own metrics can be called."""
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
    if compute_metrics is not None and args.batch_eval_metrics:
        parameters = inspect.signature(compute_metrics).parameters
        if "compute_result" not in parameters:
            raise ValueError(
                f"`compute_metrics` takes ({', '.join(parameters)}), but with `batch_eval_metrics=True`, the default, it is called for each "
                "batch as `compute_metrics(prediction, compute_result=...)`. Pass `batch_eval_metrics=False` to "
                "SepMldcTrainingArguments: it is then called once, with the scores of all documents."
            )
    return args


def _check_model(model: Any) -> None:
    """Check that the model of a trainer, if given, is a SEP-MLDC model, possibly wrapped by PEFT or compiled."""
    if model is not None and getattr(getattr(model, "config", None), "model_type", None) != SepMldcConfig.model_type:
        kind = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise ValueError(
            f"`model` is {kind}, but a SepMldcForMultiLabelClassification is needed. Create one with `from_backbone`, or load one with "
            "`from_pretrained`."
        )


class SepMldcTrainer(HubMixin, EvaluationMixin):
    r"""
    `Trainer` for [`SepMldcForMultiLabelClassification`]: L = L_ce + β L1 + γ L2 (Eq. 21).

    It decides which labels are encoded in a step, stores their embeddings after the backward pass, encodes all labels before evaluation
    and saving, and logs every loss term. With several processes, it gathers embeddings and labels, so that N processes with batches of b
    documents compute the same as one process with N·b.

    Evaluation and prediction never hold an N x L matrix: `evaluate` accumulates counts, `predict` returns the best
    `prediction_top_k` labels per document, `(probabilities, label ids)`, in the order of the documents. A custom
    `compute_metrics` switches to the protocol of transformers' `batch_eval_metrics`, which is on by default: it is called for each batch, with
    `compute_result`. With `batch_eval_metrics=False`, it is called once, as in `Trainer`.

    Args:
        model (`SepMldcForMultiLabelClassification`): the model to train.
        args ([`SepMldcTrainingArguments`]): the training arguments.
        data_collator (`Callable`, *optional*): defaults to a [`SepMldcDataCollator`].
        train_dataset, eval_dataset (`Dataset`, *optional*): documents with `input_ids`, ... and `label_indices` (ids of the
            labels) or `labels` (multi-hot). `eval_dataset` may be a dictionary of data sets.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer; needed for `label_encoding="encoder"`.
        model_init (`Callable`, *optional*): as in `Trainer`.
        compute_loss_func (`Callable`, *optional*): maps `(outputs, labels, num_items_in_batch)` to a loss that replaces the
            classification loss L_ce; the contrastive terms are added to it. As in `Trainer`, it is not divided by
            `gradient_accumulation_steps`.
        compute_metrics, callbacks, optimizers, kwargs: as in `Trainer`.

    Raises:
        ValueError: a model or arguments of another class, a `compute_metrics` that cannot be called batch by batch, `label_encoding="encoder"`
            without a tokenizer, with PEFT adapters (which do not save the label embeddings) or under a wrapper that cannot run it, or a k
            of `metric_ks` above the number of labels.
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
        _check_model(model)
        args = _checked_arguments(args, processing_class, compute_metrics)
        self.label_schedule: LabelSchedule | None = None
        if args.label_encoding == "encoder":
            self.label_schedule = LabelSchedule(
                processing_class, args.labels_per_step, args.max_label_length, args.seed
            )
        self._terms, self._norms = TermMeans(), TermMeans()
        self._encoded: tuple[torch.Tensor, torch.Tensor] | None = None
        self._unlogged_loss: torch.Tensor | float = 0.0
        self._num_batches = 0
        self._has_documents = False
        self._last_logged_step = 0
        self._caches_layers = False
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
        elif data_collator is None:
            self.data_collator = collate_without_tokenizer
        if self.label_schedule is not None:
            self._check_label_encoding()
            self.label_schedule.prepare(self.model.config.label_texts)
        if args.log_gradient_norms and (self.is_fsdp_enabled or self.is_deepspeed_enabled or _is_sharded(self.model)):
            raise ValueError(
                "`log_gradient_norms` is True, but FSDP and DeepSpeed shard the parameters, so that no process has a whole "
                "gradient. Leave it out, or train with DDP."
            )
        keep_process_group()
        args.cutoffs(self.model.config.num_labels)
        if args.head_learning_rate is None:
            config = self.model.config
            args.head_learning_rate = recommended_head_learning_rate(config.classifier, config.token_attention)
        if lora_rank(self.bare_model()) is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "The model has LoRA adapters, which FSDP and DeepSpeed would save unmerged. Train with DDP, or without adapters."
            )
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
        # A trainable table that does not contribute to the loss would have no gradient, which makes DDP fail.
        used = model.uses_label_embeds or self.args.label_loss_weight > 0
        if used and getattr(model, "peft_config", None):
            # A saved PEFT adapter does not contain the table of label embeddings.
            if self.args.label_encoding == "encoder":
                raise ValueError(
                    '`label_encoding="encoder"` changes the label embeddings, which a PEFT adapter does not save. Choose '
                    '`label_encoding="embedding"`, which then keeps the label embeddings of the base model, or train without PEFT.'
                )
            logger.warning(
                "A PEFT adapter does not save label embeddings, so those of the base model are used and not trained."
            )
            used = False
        model.label_embeddings.requires_grad_(self.args.label_encoding == "embedding" and used)

    def refresh_label_embeddings(self) -> None:
        """
        Encode all label texts with the current weights and store the embeddings. Does nothing with `label_encoding="embedding"`. Called
        by evaluation, prediction and saving.
        """
        if self.label_schedule is None:
            return
        model = self.bare_model()
        guaranteed = bool((model.config.threshold_info or {}).get("guarantee"))
        former = model.label_embeddings.detach().clone() if guaranteed else None
        hidden = self.args.disable_tqdm or not self.is_local_process_zero() or model.config.num_labels < 1000
        with tqdm(total=model.config.num_labels, desc="Encoding labels", disable=hidden, leave=False) as bar:
            batch_size = max(self.args.eval_batch_size, 64)
            self.label_schedule.refresh(model, batch_size, self.accelerator.autocast, bar.update)
        # More than rounding errors of another precision: a label was renamed or its description was changed.
        if former is not None and cosine_similarity(former.float(), model.label_embeddings.float()).min() < 0.99:
            model.config.drop_guarantee("label texts were changed and encoded again")

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
        present = (
            present_labels(all_labels) if contrastive else None
        )  # only once per step, because it forces a device sync

        candidates = None
        uses_labels = self.model.uses_label_embeds or args.label_loss_weight > 0
        if model.training and self.label_schedule is not None and uses_labels:
            # A hyperparameter search may have changed the weights.
            self.label_schedule.seed, self.label_schedule.labels_per_step = args.seed, args.labels_per_step
            candidates = self.label_schedule.select(all_labels, self.state.global_step, present)
            inputs = {**inputs, **self.label_schedule.inputs(candidates, labels.device)}
            candidates = inputs["candidate_indices"]
        if model.training and _is_sharded(model):
            # The label loss uses `label_embeds` after the forward pass, so FSDP must not free the root's parameters before the backward pass.
            model.set_reshard_after_forward(False, recurse=False)
        outputs = model(**inputs, return_label_embeds=candidates is None)
        if candidates is not None:
            self._encoded = (candidates, outputs["candidate_embeds"].detach())

        loss = outputs["loss"]
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        terms = {"classification_loss": loss.detach()}
        weighted = {"classification": loss}
        if contrastive:
            weighted |= self._contrastive_terms(outputs, all_labels, present, candidates, distributed, terms)
        if self._logs_gradient_norms():
            self._norms.add(gradient_norms(weighted, parameter_groups(self.bare_model())))
        if contrastive:
            added = sum(term for name, term in weighted.items() if name != "classification")
            if self.compute_loss_func is not None and model.training:
                added = added / self.current_gradient_accumulation_steps  # transformers does not divide custom losses
            loss = loss + added
        # A document counts the same in every evaluation, regardless of the batch size; a step of training is a batch.
        self._terms.add(terms, 1 if model.training else len(labels))
        return (loss, outputs) if return_outputs else loss

    def _contrastive_terms(
        self,
        outputs: Any,
        labels: torch.Tensor,
        present: torch.Tensor,
        candidates: torch.Tensor | None,
        distributed: bool,
        terms: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """β L1 and γ L2 over the documents of all processes, by name. Values to be logged are added to `terms`."""
        args = self.args
        # Labels that no document of the batch has do not change the losses, so they are left out, and no B x L tensor is created.
        labels = labels.index_select(1, present)
        weighted = {}
        if args.label_loss_weight > 0:
            rows = self._label_rows(outputs, candidates, present)
            term = label_contrastive_loss(rows, labels, args.contrastive_temperature, args.contrastive_weighting)
            terms["label_contrastive_loss"] = term.detach()
            weighted["label_contrastive"] = args.label_loss_weight * term
        if args.document_loss_weight > 0:
            embeds = outputs["document_embeds"]
            embeds = self._gather_with_gradient(embeds) if distributed else embeds
            term = document_contrastive_loss(embeds, labels, args.contrastive_temperature, args.contrastive_weighting)
            terms["document_contrastive_loss"] = term.detach()
            terms["anchors_with_positive"] = share_of_anchors_with_positive(labels)
            if distributed:
                # DDP averages gradients over N processes, but each process only has the gradient for its own documents.
                term = args.world_size * term - (args.world_size - 1) * term.detach()
            weighted["document_contrastive"] = args.document_loss_weight * term
        return weighted

    def _logs_gradient_norms(self) -> bool:
        """Whether gradient norms are to be logged in this step."""
        asked = self.args.log_gradient_norms and self.model.training
        return asked and (self.state.global_step + 1) % max(self.state.logging_steps, 1) == 0

    def _label_rows(self, outputs: Any, candidates: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor:
        """Embeddings of the present labels: freshly encoded ones, with gradient, if available, else stored ones."""
        if candidates is None:
            return outputs["label_embeds"].index_select(0, present)
        rows = self.bare_model().label_embeddings.detach().index_select(0, present).float()
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
        on_cpu = self.args.device.type == "cpu"
        with float32_attention() if on_cpu else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._num_batches += 1
        if on_cpu and self._num_batches % RELEASE_EVERY == 0:
            release_freed_memory()
        self._unlogged_loss = self._unlogged_loss + loss
        if self.label_schedule is not None:
            encoded, self._encoded = self._encoded, None
            if encoded is not None:
                self.label_schedule.commit(self.bare_model(), *encoded)
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
            lengths = dataset[name] if name in columns else [len(check_input_ids(document)) for document in dataset]
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

    # ---- Thresholds and lexical scores ----

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
        afterwards, because thresholds and calibration of the previous scores are dropped.

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

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, but with every loss term. `train_loss` is the mean over the whole run, even if it was resumed."""
        if "loss" in logs and self.is_in_train:
            self._stop_if_not_finite(logs["loss"])
            self._record.loss_sum += self._mean_of_processes(self._unlogged_loss)
            self._unlogged_loss, self._last_logged_step = 0.0, self.state.global_step
            logs.update(self._terms.pop(self.accelerator))
            logs.update(self._norms.pop(self.accelerator))
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
                f"The loss became {loss} between steps {self._last_logged_step + 1} and {self.state.global_step}, so the model "
                "is unusable; no checkpoint of it was written. Lower the learning rate or use bf16 instead of fp16, and "
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
        As in transformers. `resume_from_checkpoint=True` uses the newest checkpoint that is complete and undamaged. In a resumed run,
        `train_loss` and the patience of early stopping cover the whole run.

        Raises:
            ValueError: a data set has no documents, or they are not tokenized; there is no complete checkpoint, it is damaged or belongs to
                another run (other labels, label descriptions or model settings); or `metric_for_best_model` is unknown.
            FloatingPointError: the loss became NaN or infinite.
        """
        if self.model is None:  # a hyperparameter search frees the model of the previous trial
            self.model = self.call_model_init(trial)
        self.check_documents(self.train_dataset, "`train_dataset`")
        if self.args.eval_strategy != IntervalStrategy.NO:
            self.check_documents(self.eval_dataset, "`eval_dataset`")
        self.check_metric_for_best_model()
        checkpoint = self._checked_checkpoint(resume_from_checkpoint)
        self._record.fingerprint = run_fingerprint(self.bare_model(), self.args, self.train_dataset)
        self._record.loss_sum = 0.0
        if checkpoint is not None:
            check_same_run(checkpoint, self.model.config.labels, self._record.fingerprint)
            self._record.loss_sum = read_record(checkpoint).get("loss_sum", 0.0)
            load_adapters(self.bare_model(), checkpoint)
        self._restore.callbacks = list(self.callback_handler.callbacks)
        self._terms, self._norms = TermMeans(), TermMeans()
        self._unlogged_loss, self._last_logged_step, self._has_documents = 0.0, 0, False
        if self.label_schedule is not None:
            self.label_schedule.restart()
            self.label_schedule.prepare(self.model.config.label_texts)
        try:
            with self.cached_frozen_layers(self.args.eval_strategy != IntervalStrategy.NO):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._checkpoint_guard.close()
        if not self._has_documents and output.global_step < self.state.max_steps:
            raise ValueError(
                f"`train_dataset` is a stream without documents after step {output.global_step} of {self.state.max_steps}, so nothing was "
                "trained. Pass a stream that is not empty; to resume, pass the same documents."
            )
        return output._replace(training_loss=output.metrics["train_loss"])

    @contextmanager
    def cached_frozen_layers(self, evaluates: bool = True, reserved_bytes: int = 0) -> Iterator[None]:
        """
        Within this context, training and evaluation read the states of frozen layers from the disk (see `cache_frozen_layers`).
        `train` enters it automatically. Enter it yourself if `eval_dataset` is read again after training, for example to tune thresholds.

        Args:
            evaluates (`bool`, defaults to `True`): also keep the states of `eval_dataset`.
            reserved_bytes (`int`, defaults to 0): disk space to leave for checkpoints and the model.
        """
        # Layers with sharded parameters cannot be run individually; with `model_init`, training creates a new model.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or _is_sharded(self.model)
        if self._caches_layers or sharded or self.model_init is not None:
            yield
            return
        datasets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        datasets = [self.train_dataset, *(datasets if evaluates else ())]
        model, self._caches_layers = self.model, True
        try:
            length = model.config.encoder_max_length
            with cached_frozen_layers(model.backbone, datasets, self.args, length, reserved_bytes):
                yield
        finally:
            self._caches_layers = False

    @property
    def _record(self) -> RunRecord:
        # Looked up each time, because `restore_callback_states_from_checkpoint` replaces it.
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RunRecord))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but does nothing after the last step, because resuming a finished run would train one more step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._has_documents = self._has_documents or bool(batches)
        return batches, num_items

    def _checked_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if not resume_from_checkpoint:
            return None
        whole = last_whole_checkpoint(self.args.output_dir)
        if resume_from_checkpoint is True:
            if whole is None:
                raise ValueError(
                    f"{self.args.output_dir} has no complete checkpoint to resume from. Start without `resume_from_checkpoint`."
                )
            return whole
        damaged = damaged_files(resume_from_checkpoint)
        if damaged and damaged != [MANIFEST_NAME]:  # a folder of another trainer has no manifest
            remedy = f"Resume from {whole}." if whole else "Start without `resume_from_checkpoint`."
            raise ValueError(
                f"{resume_from_checkpoint} is damaged: {', '.join(damaged)} is missing or has changed since it was saved. {remedy}"
            )
        return resume_from_checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with label embeddings that are up to date."""
        if self.is_in_train and _internal_call and output_dir is not None:
            self._begin_checkpoint(output_dir)
        self.refresh_label_embeddings()
        super().save_model(output_dir, _internal_call)
        if self.is_in_train and _internal_call and output_dir is not None and self.args.should_save:
            save_adapters(self.bare_model(), output_dir)
        if self.args.should_save:  # adapters, and models that transformers or PEFT saves itself
            apply_umask(self.args.output_dir if output_dir is None else output_dir)

    def _begin_checkpoint(self, folder: str) -> None:
        # Each process checks its own shard of the weights. If one of them has to stop, all stop.
        parts = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self.model.parameters())
        weights = sum(part.detach().float().sum() for part in parts)
        pending = self._mean_of_processes(self._unlogged_loss + 0 * weights)
        self._stop_if_not_finite(pending)
        self._record.loss_sum += pending
        self._unlogged_loss = 0.0
        self._checkpoint_guard.begin(folder, self.args)

    def end(self) -> None:
        """As in transformers, but after a barrier, because a process that ends earlier would abort the others."""
        self.accelerator.wait_for_everyone()
        super().end()
