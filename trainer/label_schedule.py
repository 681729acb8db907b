"""Schedules which label texts are encoded in a training step, and tracks whether the stored label embeddings are up to date."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_sep_mldc.label_texts_sep_mldc import pad_label_inputs, tokenize_label_texts

from .losses.contrastive import present_labels


class LabelSchedule:
    r"""
    Manages label embeddings with `label_encoding="encoder"`: at most `labels_per_step` label texts are encoded with gradient in each step,
    all other labels use their stored embeddings, and all label texts are encoded again before evaluation and saving.

    Call, in each (micro-)step of training:

    ```python
    candidates = schedule.select(labels, step)                  # label ids (C,)
    outputs = model(**batch, **schedule.inputs(candidates))
    ...                                                         # backward
    schedule.commit(model, candidates, outputs.candidate_embeds)
    ```

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizes the label texts.
        labels_per_step (`int`): maximum number of label texts encoded per step.
        max_label_length (`int`, defaults to 64): maximum number of tokens per label text.
        seed (`int`, defaults to 0): seed of the random choice of labels.

    Attributes:
        label_inputs (`dict`, *optional*): token ids of all label texts, as `tokenize_label_texts` returns them; set by
            `prepare`, or directly.
        is_fresh (`bool`): whether the stored embeddings are up to date with the encoder's weights.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, labels_per_step: int, max_label_length: int = 64, seed: int = 0
    ):
        self.tokenizer, self.labels_per_step, self.max_label_length = tokenizer, labels_per_step, max_label_length
        self.seed = seed
        self.label_inputs: dict[str, Any] | None = None
        self.is_fresh = False
        self._texts: list[str] | None = None
        self._last_draw = (-1, 0)

    def prepare(self, label_texts: list[str]) -> None:
        """Tokenize the label texts, unless they have not changed since the last call."""
        if label_texts != self._texts:
            self.label_inputs = tokenize_label_texts(self.tokenizer, label_texts, self.max_label_length)
            self._texts = list(label_texts)
            self.is_fresh = False

    def restart(self) -> None:
        """Reset at the start of training: the first selection for a step counts as its first micro-step again."""
        self._last_draw = (-1, 0)
        self.invalidate()

    def invalidate(self) -> None:
        """Mark the stored embeddings as out of date, so that the next `refresh` encodes the label texts again."""
        self.is_fresh = False

    def select(self, labels: torch.Tensor, step: int, present: torch.Tensor | None = None) -> torch.Tensor:
        """
        Select the labels to encode in this step: first those of the batch (a random subset if they exceed `labels_per_step`), then random
        others. A pure function of the seed, the step, the micro-step and the batch, and thus the same on every process and after resuming.
        Consecutive calls with the same `step` count as its micro-steps.

        Args:
            labels (`torch.Tensor` of shape `(batch_size, num_labels)`): multi-hot, of the documents of all processes.
            step (`int`): global step.
            present (`torch.Tensor`, *optional*): ascending ids of the labels in the batch, if already known.

        Returns:
            `torch.Tensor` of shape `(C,)`, int64, on the CPU: ascending label ids, C <= `labels_per_step`.
        """
        last, micro_step = self._last_draw
        micro_step = micro_step + 1 if step == last else 0
        self._last_draw = (step, micro_step)
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1009 + micro_step) % 2**63)
        num_labels, cap = labels.shape[1], self.labels_per_step
        if num_labels <= cap:
            return torch.arange(num_labels)
        present = (present_labels(labels) if present is None else present).cpu()
        if len(present) >= cap:
            chosen = present[torch.randperm(len(present), generator=generator)[:cap]]
        else:
            # More than needed are drawn, because some may be present already. This avoids a permutation of all labels.
            spare = torch.randint(num_labels, (cap + 4 * len(present),), generator=generator)
            rest = list(dict.fromkeys(spare[~torch.isin(spare, present)].tolist()))[: cap - len(present)]
            chosen = torch.cat([present, torch.tensor(rest, dtype=torch.long)])
        return chosen.sort().values

    def inputs(self, candidates: torch.Tensor, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """
        The arguments of the model's forward that encode the labels `candidates` (C,): `candidate_input_ids` and
        `candidate_attention_mask` (C, T), `candidate_indices` (C,).
        """
        padded = pad_label_inputs(self._prepared_inputs(), candidates.tolist(), device)
        return {
            "candidate_input_ids": padded["input_ids"],
            "candidate_attention_mask": padded["attention_mask"],
            "candidate_indices": candidates.to(device),
        }

    def commit(self, model: nn.Module, candidates: torch.Tensor, embeds: torch.Tensor) -> None:
        """
        Store the embeddings (C, d) of the encoded labels in the model. Call it after the backward pass: an earlier write would modify a
        tensor that autograd has saved. Every process stores the rows of the first process, because dropout differs between processes.
        """
        embeds = embeds.detach()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            embeds = embeds.contiguous()
            dist.broadcast(embeds, src=0)
        model.set_label_embeddings(embeds, candidates.to(embeds.device))
        self.invalidate()

    def refresh(
        self,
        model: nn.Module,
        batch_size: int = 64,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """
        Encode all label texts with the current weights and store the embeddings, unless they are up to date.

        Args:
            model (`SepMldcForMultiLabelClassification`): encodes and stores.
            batch_size (`int`, defaults to 64): number of label texts per forward pass.
            autocast (*optional*): returns a context manager for mixed precision.
            progress (*optional*): called after each forward pass with its number of texts.
        """
        self.prepare(model.config.label_texts)
        if self.is_fresh:
            return
        with autocast():
            rows = model.encode_labels(self._prepared_inputs(), batch_size, progress=progress)
        model.set_label_embeddings(rows)
        self.is_fresh = True

    def _prepared_inputs(self) -> dict[str, Any]:
        if self.label_inputs is None:
            raise ValueError("The label texts have not been tokenized. Call `prepare` with the texts first.")
        return self.label_inputs
