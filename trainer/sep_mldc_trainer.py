"""Trainer of SEP-MLDC models."""

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
from .checkpoints import MANIFEST_NAME, CheckpointGuard, damaged_files, last_complete_checkpoint
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
from .frozen_layers import cached_frozen_layers
from .hub.mixin import HubMixin
from .label_schedule import LabelSchedule
from .losses.terms import TermMeans
from .processes import keep_process_group
from .run_record import EpochOrder, RestoreCallbacks, RunRecord, check_same_run, read_record, run_fingerprint
from .training_arguments import SepMldcTrainingArguments, recommended_head_learning_rate
from .training_loss import LossMixin, is_sharded
from .tuning import TuningMixin


logger = logging.get_logger(__name__)

# On a CPU, after this number of batches, freed memory goes back to the operating system.
RELEASE_EVERY = 50


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


class SepMldcTrainer(HubMixin, TuningMixin, LossMixin):
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
            labels) or `labels` (multi-hot). `eval_dataset` may be a dictionary of datasets.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer; needed for `label_encoding="encoder"`.
        model_init (`Callable`, *optional*): as in `Trainer`.
        compute_loss_func (`Callable`, *optional*): maps `(outputs, labels, num_items_in_batch)` to a loss that replaces the
            classification loss L_ce; the contrastive terms are added to it. As in `Trainer`, it is not divided by
            `gradient_accumulation_steps`.
        compute_metrics, callbacks, optimizers, kwargs: as in `Trainer`.

    Raises:
        ValueError: a model or arguments of a different class, a `compute_metrics` that cannot be called batch by batch, `label_encoding="encoder"`
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
        if args.log_gradient_norms and (self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.model)):
            raise ValueError(
                "`log_gradient_norms` is True, but FSDP and DeepSpeed shard the parameters, so that no process has a complete "
                "gradient. Leave it out, or train with DDP."
            )
        keep_process_group()
        args.cutoffs(self.model.config.num_labels)
        if args.head_learning_rate is None:
            config = self.model.config
            args.head_learning_rate = recommended_head_learning_rate(
                config.classifier, config.token_attention, config.num_train_documents
            )
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
        if self.is_fsdp_enabled or is_sharded(self.model):
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
        # More than rounding errors of a different precision: a label was renamed or its description was changed.
        if former is not None and cosine_similarity(former.float(), model.label_embeddings.float()).min() < 0.99:
            model.config.drop_guarantee("label texts were changed and encoded again")

    # ---- Training step ----

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
            lengths = (
                dataset[name] if name in columns else [len(check_input_ids(dataset[i])) for i in range(len(dataset))]
            )
        if self.args.group_by_label_set:
            num_labels = self.model.config.num_labels
            if "label_indices" in columns:
                label_sets = [check_label_indices(ids, num_labels) for ids in dataset["label_indices"]]
            else:
                rows = (check_multi_hot(dataset[i]["labels"], num_labels) for i in range(len(dataset)))
                label_sets = [row.nonzero()[0].tolist() for row in rows]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        sampler = DocumentSampler(
            len(dataset), self.args.train_batch_size * self.args.world_size, lengths, label_sets, seed
        )
        self._epoch_order.sampler = sampler
        return sampler

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
            complete = last_complete_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"The loss became {loss} between steps {self._last_logged_step + 1} and {self.state.global_step}, so the model "
                "is unusable; no checkpoint of it was written. Lower the learning rate or use bf16 instead of fp16, and "
                f"{'resume from ' + complete if complete else 'start again'}."
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
            ValueError: a dataset has no documents, or they are not tokenized; there is no complete checkpoint, it is damaged or belongs to
                another run (different labels, label descriptions or model settings); or `metric_for_best_model` is unknown.
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
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.model)
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
        complete = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint is True:
            if complete is None:
                raise ValueError(
                    f"{self.args.output_dir} has no complete checkpoint to resume from. Start without `resume_from_checkpoint`."
                )
            return complete
        damaged = damaged_files(resume_from_checkpoint)
        if damaged and damaged != [MANIFEST_NAME]:  # a folder of another trainer has no manifest
            remedy = f"Resume from {complete}." if complete else "Start without `resume_from_checkpoint`."
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
