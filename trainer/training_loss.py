"""The loss of a training step: classification loss plus weighted contrastive losses over the documents of all processes (Eq. 21)."""

from typing import Any

import torch
from torch import nn

from .evaluation import EvaluationMixin
from .label_schedule import LabelSchedule
from .losses.contrastive import (
    document_contrastive_loss,
    label_contrastive_loss,
    present_labels,
    share_of_anchors_with_positive,
)
from .losses.gradient_norms import gradient_norms, parameter_groups
from .losses.terms import TermMeans


def is_sharded(model: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied."""
    return hasattr(model, "set_reshard_after_forward")


class LossMixin(EvaluationMixin):
    """
    Mixin for a `Trainer`: L = L_ce + β L1 + γ L2 (Eq. 21).

    With several processes, embeddings and labels are gathered, so that N processes with batches of b documents compute the same loss as
    one process with a batch of N·b. The value of each term is recorded for the logs.
    """

    label_schedule: LabelSchedule | None
    # Gradient norms of the loss terms since the last log.
    _norms: TermMeans
    # Ids and embeddings of the label texts that were encoded in the current step.
    _encoded: tuple[torch.Tensor, torch.Tensor] | None

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
        if model.training and is_sharded(model):
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
