"""Trainer of SEP-MLDC models."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints
from transformers.training_args import ParallelMode
from transformers.utils import logging

from modeling_sep_mldc.label_texts_sep_mldc import pad_label_inputs, tokenize_label_texts

from .checkpoints import MANIFEST_NAME, last_whole_checkpoint, write_manifest
from .data.collator import SepMldcDataCollator
from .data.sampler import DocumentSampler
from .frozen_layers import cached_frozen_layers
from .hub.mixin import HubMixin
from .losses.contrastive import (
    document_contrastive_loss,
    label_contrastive_loss,
    present_labels,
    share_of_anchors_with_positive,
)
from .metrics.streaming import StreamingMetrics
from .thresholds import check_threshold_settings, tune_thresholds_from_batches
from .training_arguments import SepMldcTrainingArguments


logger = logging.get_logger(__name__)


def _is_sharded(model: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` has been here."""
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


class SepMldcTrainer(HubMixin, Trainer):
    r"""
    `Trainer` for [`SepMldcForMultiLabelClassification`]: L = L_ce + β L1 + γ L2 (Eq. 21).

    It decides which labels are encoded in a step, stores their fresh embeddings after backward, refreshes all of them
    before evaluation and saving, and logs every term. With several processes it gathers embeddings and labels, so that N
    processes with batches of b documents compute what one computes with N·b.

    Evaluation and prediction never hold an N x L matrix: `evaluate` accumulates counts, `predict` returns the best
    `prediction_top_k` labels of each document, `(scores, label ids)`, in the order of the file. Passing one's own
    `compute_metrics` switches to the protocol of transformers' `batch_eval_metrics`.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, ...: as in `Trainer`. Documents carry `input_ids`, ... and
            `label_indices` (or multi-hot `labels`); `processing_class` is the tokenizer, needed to encode label texts.

    Raises:
        ValueError: `label_encoding="encoder"` without a tokenizer, or under a wrapper that cannot run it (see message).
    """

    def __init__(self, model=None, args=None, data_collator=None, processing_class=None, **kwargs):
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
        self._label_inputs = None
        self._terms: dict[str, torch.Tensor] = {}
        self._num_terms = 0
        self._streaming_metrics: StreamingMetrics | None = None
        self._predicting = False
        self._pending_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._labels_are_fresh = False
        self._micro_step = (-1, 0)
        self._last_logged_step = 0
        self._sampler: DocumentSampler | None = None
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        if data_collator is None and processing_class is not None:
            self.data_collator = SepMldcDataCollator(
                processing_class,
                num_labels=self.model.config.num_labels,
                pad_to_multiple_of=args.pad_to_multiple_of,
                label_dtype=torch.uint8,
            )
        if args.label_encoding == "encoder":
            if args.n_gpu > 1:
                raise ValueError(
                    f"{args.n_gpu} GPUs in one process would split the label texts among them. Start one process a GPU with "
                    '`accelerate launch`, or choose `label_encoding="embedding"`.'
                )
            if self.is_fsdp_enabled or _is_sharded(self.model):
                raise ValueError(
                    '`label_encoding="encoder"` writes label embeddings between steps, which FSDP shards. Choose '
                    '`label_encoding="embedding"`, or DDP.'
                )
        too_large = [k for k in args.ks if k > self.model.config.num_labels]
        if too_large:
            raise ValueError(
                f"`metric_ks` asks for k = {too_large[0]}, but there are only {self.model.config.num_labels} labels. Leave out "
                "the larger k."
            )
        self._configure_label_table(self.model)

    # ---- Label embeddings ----

    def call_model_init(self, trial=None) -> nn.Module:
        model = super().call_model_init(trial)
        self._configure_label_table(model)
        return model

    def _configure_label_table(self, model: nn.Module) -> None:
        # A trained table that no loss reaches would be a parameter without gradient, which stops DDP.
        used = model.uses_label_embeds or self.args.label_loss_weight > 0
        model.label_embeddings.requires_grad_(self.args.label_encoding == "embedding" and used)

    @property
    def label_inputs(self) -> dict:
        """Token ids of all label texts."""
        if self._label_inputs is None:
            texts = self.model.config.label_texts
            self._label_inputs = tokenize_label_texts(self.processing_class, texts, self.args.max_label_length)
        return self._label_inputs

    @label_inputs.setter
    def label_inputs(self, value: dict) -> None:
        self._label_inputs = value
        self._labels_are_fresh = False

    def refresh_label_embeddings(self) -> None:
        """Encode all label texts with the encoder as it is now and store the embeddings. Nothing to do for trained ones."""
        if self.args.label_encoding != "encoder" or self._labels_are_fresh:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        hidden = self.args.disable_tqdm or not self.is_local_process_zero() or model.config.num_labels < 1000
        with (
            self.accelerator.autocast(),
            tqdm(total=model.config.num_labels, desc="Encoding labels", disable=hidden, leave=False) as bar,
        ):
            rows = model.encode_labels(self.label_inputs, max(self.args.eval_batch_size, 64), progress=bar.update)
        model.set_label_embeddings(rows)
        self._labels_are_fresh = True

    def _pick_candidates(self, labels: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
        """
        Which labels to encode in this step, ascending ids (C,), C <= `labels_per_step`: those present in the global batch,
        then a random rest. The same on every process, a pure function of (seed, global step, micro-step, batch).
        """
        step, micro = self._micro_step
        self._micro_step = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1009 + self._micro_step[1]
        generator = torch.Generator().manual_seed(seed % 2**63)
        num_labels, cap = labels.shape[1], self.args.labels_per_step
        present = (present_labels(labels) if present is None else present).cpu()
        if num_labels <= cap:
            return torch.arange(num_labels)
        if len(present) >= cap:
            chosen = present[torch.randperm(len(present), generator=generator)[:cap]]
        else:
            # Drawn with spares, because some will be present already: no permutation of all labels.
            spare = torch.randint(num_labels, (cap + 4 * len(present),), generator=generator)
            rest = list(dict.fromkeys(spare[~torch.isin(spare, present)].tolist()))[: cap - len(present)]
            chosen = torch.cat([present, torch.tensor(rest, dtype=torch.long)])
        return chosen.sort().values

    def _store_pending_rows(self) -> None:
        if self._pending_rows is None:
            return
        indices, rows = self._pending_rows
        self._pending_rows = None
        if self.args.world_size > 1:
            dist.broadcast(rows, src=0)  # dropout differs between processes; the table must not
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).set_label_embeddings(rows, indices)
        self._labels_are_fresh = False

    # ---- Losses ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Classification loss of the model, plus β L1 + γ L2 over the documents of all processes."""
        args, training = self.args, model.training
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                "The documents have no `labels` or `label_indices`, but a loss needs them. Add one of them."
            )
        distributed = training and args.world_size > 1
        all_labels = self.accelerator.gather(labels.to(torch.uint8)) if distributed else labels

        candidates = present = None
        if args.label_loss_weight > 0 or args.document_loss_weight > 0:
            present = present_labels(all_labels)  # once a step: its length makes a GPU wait
        if (
            training
            and args.label_encoding == "encoder"
            and (self.model.uses_label_embeds or args.label_loss_weight > 0)
        ):
            candidates = self._pick_candidates(all_labels, present)
            padded = pad_label_inputs(self.label_inputs, candidates.tolist(), labels.device)
            candidates = candidates.to(labels.device)
            inputs = {
                **inputs,
                "candidate_input_ids": padded["input_ids"],
                "candidate_attention_mask": padded["attention_mask"],
                "candidate_indices": candidates,
            }
        if training and _is_sharded(model):
            # The label loss reads `label_embeds` after forward: the root's parameters must not be freed before backward.
            model.set_reshard_after_forward(False, recurse=False)
        outputs = model(**inputs, return_label_embeds=candidates is None)
        loss = outputs["loss"]
        terms = {"classification_loss": loss.detach()}

        if args.label_loss_weight > 0 or args.document_loss_weight > 0:
            # Both losses are the same without the labels that nothing in the batch has: nothing of size B x L is made.
            all_labels = all_labels.index_select(1, present)
        if args.label_loss_weight > 0:
            rows = self._label_rows(outputs, candidates, present)
            term = label_contrastive_loss(rows, all_labels, args.contrastive_temperature, args.contrastive_weighting)
            loss = loss + args.label_loss_weight * term
            terms["label_contrastive_loss"] = term.detach()
        if args.document_loss_weight > 0:
            embeds = (
                self._gather_with_gradient(outputs["document_embeds"]) if distributed else outputs["document_embeds"]
            )
            term = document_contrastive_loss(
                embeds, all_labels, args.contrastive_temperature, args.contrastive_weighting
            )
            terms["document_contrastive_loss"] = term.detach()
            terms["anchors_with_positive"] = share_of_anchors_with_positive(all_labels)
            if distributed:
                # DDP averages gradients over N processes, each of which has the gradient of its own documents only.
                term = args.world_size * term - (args.world_size - 1) * term.detach()
            loss = loss + args.document_loss_weight * term

        self._num_terms += 1
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value if name in self._terms else value.clone()
        if candidates is not None:
            self._pending_rows = (candidates, outputs["candidate_embeds"].detach())
        return (loss, outputs) if return_outputs else loss

    def _label_rows(self, outputs, candidates: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor:
        """Embeddings of the present labels: fresh rows with gradient where there are any, stored ones elsewhere."""
        if candidates is None:
            return outputs["label_embeds"].index_select(0, present)
        stored = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).label_embeddings.detach()
        rows = stored.index_select(0, present).float()
        position = torch.searchsorted(candidates, present).clamp_max(len(candidates) - 1)
        encoded = candidates[position] == present
        return torch.where(encoded.unsqueeze(1), outputs["candidate_embeds"][position], rows)

    def _gather_with_gradient(self, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of all processes, with gradient for this process's own rows."""
        gathered = list(self.accelerator.gather(embeds.detach()).split(len(embeds)))
        gathered[self.accelerator.process_index] = embeds
        return torch.cat(gathered)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # After backward: a write before it would change a tensor that autograd has saved.
        self._store_pending_rows()
        self._labels_are_fresh = False
        return loss

    # ---- Optimiser ----

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not name.endswith(("label_embeddings", "similarity_scale"))
        ]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in transformers, with `head_learning_rate` for all that is not the backbone."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.args.head_learning_rate is not None:
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

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "label_indices" not in self._signature_columns:
            self._signature_columns.append("label_indices")

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
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
            if "label_indices" in columns:
                label_sets = dataset["label_indices"]
            else:
                label_sets = [torch.as_tensor(document["labels"]).nonzero().flatten().tolist() for document in dataset]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._sampler = DocumentSampler(
            len(dataset), self.args.train_batch_size * self.args.world_size, lengths, label_sets, seed
        )
        return self._sampler

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        # File order: what `predict` returns must line up with the documents.
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def _run_epoch(self, *args, epoch, **kwargs):
        # accelerate's loader does not pass the epoch on when it skips the batches of a resumed epoch.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    # ---- Evaluation and prediction ----

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As in transformers, but no document is left out of an evaluation, whatever `dataloader_drop_last` says."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            # transformers would answer with the loader of an earlier data set where workers persist.
            return self.get_test_dataloader(eval_dataset)
        with self._every_document():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """As in transformers, but no document is left out of a prediction, whatever `dataloader_drop_last` says."""
        with self._every_document():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_document(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def new_streaming_metrics(self, **kwargs) -> StreamingMetrics:
        """An accumulator with this model's labels, thresholds and training counts."""
        config = self.model.config
        thresholds = config.thresholds if config.thresholds is not None else self.args.prediction_threshold
        if config.classification_loss == "softmax" and config.score_calibration is None:
            thresholds = None  # no probabilities of single labels, so no decisions
        settings = {
            "ks": self.args.ks,
            "label_counts": config.label_counts,
            "num_documents": config.num_train_documents,
            "thresholds": thresholds,
        }
        return StreamingMetrics(config.num_labels, **{**settings, **kwargs})

    @property
    def last_metrics(self) -> StreamingMetrics:
        """The accumulator of the last evaluation or prediction: `per_label()`, `deciles()`, ..."""
        if self._streaming_metrics is None or not self._streaming_metrics.num_seen:
            raise ValueError(
                "Nothing has been evaluated yet. Call `evaluate` or `predict` on documents with labels first."
            )
        return self._streaming_metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self.refresh_label_embeddings()
        training_terms, self._terms = self._terms, {}
        training_count, self._num_terms = self._num_terms, 0
        self._predicting = description == "Prediction"
        self._streaming_metrics = self.new_streaming_metrics() if self.compute_metrics is None else None
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            metrics = self._averaged_terms()
            if self._streaming_metrics is not None and self._streaming_metrics.num_seen > 0:
                metrics.update(self._streaming_metrics.compute())
        finally:
            self._terms, self._num_terms = training_terms, training_count
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._streaming_metrics is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
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
            self._streaming_metrics.update(self._calibrated(logits_of_all), labels_of_all)
        if not self._predicting:
            return loss, None, None
        scores, indices = logits.topk(min(self.args.prediction_top_k, logits.shape[1]), dim=-1)
        return loss, (self._probabilities(logits, scores), indices), None

    def logit_batches(self, dataset=None, description: str = "Evaluation") -> Iterator[LogitBatch]:
        """
        Logits of all documents of a data set in their order, batch by batch: what thresholds, lexical scores and own measures
        are made from. Label embeddings are refreshed first; the model is in evaluation mode meanwhile. With several processes,
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
                inputs = self._prepare_inputs(inputs)
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
            loader.end()  # accelerate would take a loop that was left early for one that still runs
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
        self, dataset=None, objective: str = "f1", shrinkage: float | None = None, calibration: str | None = None
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
        config = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config
        softmax = config.classification_loss == "softmax"
        if softmax or (config.num_lexical_features and calibration is None):
            calibration = "platt"
        tuned = tune_thresholds_from_batches(
            self.logit_batches(dataset, "Tuning thresholds"),
            config.num_labels,
            objective,
            shrinkage,
            calibration,
            wide=softmax or bool(config.num_lexical_features),
        )
        config.thresholds, config.score_calibration = tuned.thresholds, tuned.score_calibration
        config.threshold_info = tuned.threshold_info
        return tuned.threshold_info

    def fit_lexical_scores(
        self, train_dataset=None, eval_dataset=None, num_features: int = 300, cost: float = 1.0, **kwargs
    ) -> dict:
        """
        Give the model lexical scores fitted on training documents and weighed on validation documents. Call `tune_thresholds`
        afterwards: thresholds and calibration of the former scores are dropped.

        Args:
            train_dataset, eval_dataset (`Dataset`, *optional*): tokenized documents with `label_indices`; the trainer's own if
                not given. Pseudo-documents among the training documents count like others.
            num_features, cost, kwargs: as in [`~trainer.lexical.fit_lexical_scores`].

        Returns:
            `dict`: what is stored as `config.lexical_info`.

        Raises:
            ValueError: documents are missing, are a stream, or carry no labels; `num_features` below 1.
        """
        from .lexical.fitting import check_lexical_documents, fit_lexical_scores  # scikit-learn, only here

        eval_dataset = self._one_eval_dataset(eval_dataset)
        check_lexical_documents("eval_dataset", eval_dataset)
        return fit_lexical_scores(
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
            self.train_dataset if train_dataset is None else train_dataset,
            self.logit_batches(eval_dataset, "Weighing lexical scores"),
            num_features,
            cost,
            special_ids=list(getattr(self.processing_class, "all_special_ids", None) or []),
            hide_progress=self.args.disable_tqdm,
            **kwargs,
        )

    def _calibrated(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits whose sigmoid is the probability."""
        calibration = self.model.config.score_calibration
        return logits if calibration is None else calibration["scale"] * logits + calibration["bias"]

    def _probabilities(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities of the logits `scores`: of each label on its own, or, after softmax training, shares of one."""
        config = self.model.config
        if config.classification_loss == "softmax" and config.score_calibration is None:
            return torch.exp(scores - torch.logsumexp(logits, dim=-1, keepdim=True))
        return torch.sigmoid(self._calibrated(scores))

    # ---- Logging ----

    def _averaged_terms(self) -> dict[str, float]:
        """Mean of each loss term since the last call, over batches and processes."""
        if not self._num_terms:
            return {}
        names = sorted(self._terms)
        means = torch.stack([self._terms[name].float() for name in names]) / self._num_terms
        means = self.accelerator.reduce(means, reduction="mean")
        self._terms, self._num_terms = {}, 0
        return dict(zip(names, means.tolist()))

    def log(self, logs, start_time=None) -> None:
        if "loss" in logs and self.is_in_train:
            self._stop_if_not_finite(logs["loss"])
            self._last_logged_step = self.state.global_step
            logs.update(self._averaged_terms())
        super().log(logs, start_time)

    def _stop_if_not_finite(self, loss: float) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            whole = last_whole_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"The loss became {loss} between steps {self._last_logged_step + 1} and {self.state.global_step}, and a model "
                "trained on it is lost; no checkpoint of it was written. Lower the learning rate or use bf16 instead of fp16, and "
                f"{'resume from ' + whole if whole else 'start again'}."
            )

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in transformers; `resume_from_checkpoint=True` takes the newest checkpoint that was saved to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from. Start without `resume_from_checkpoint`."
                )
        self._labels_are_fresh = False
        self._terms, self._num_terms, self._micro_step = {}, 0, (-1, 0)
        datasets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if self.args.eval_strategy == "no":
            datasets = []
        config = self.model.config
        with cached_frozen_layers(
            self.model.backbone, [self.train_dataset, *datasets], self.args, config.encoder_max_length
        ):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        self.refresh_label_embeddings()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        # Each process looks at its own part of sharded weights; all stop if one of them must.
        parts = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self.model.parameters())
        weights = sum(part.detach().float().sum() for part in parts)
        pending = self.accelerator.gather((self._tr_loss.detach() + 0 * weights).reshape(1)).sum()
        self._stop_if_not_finite(pending.item())

        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and os.path.exists(os.path.join(folder, MANIFEST_NAME)):
            os.remove(os.path.join(folder, MANIFEST_NAME))
        # Older checkpoints go only once this one is known to be whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            dist.barrier()  # every process has written its random state
        if self.args.should_save:
            write_manifest(folder)
            rotate_checkpoints(
                output_dir=os.path.dirname(folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
