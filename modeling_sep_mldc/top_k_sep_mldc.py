"""The best labels of each document, from chunks of labels."""

from typing import Any

import torch
from torch.func import functional_call

from .label_table_sep_mldc import SMALLEST_LOG_WEIGHT, LabelTable


class TopKMixin:
    """Prediction of [`SepMldcForMultiLabelClassification`] that never holds the scores of all labels."""

    config: Any
    training: bool
    label_embeddings: Any
    classifier: Any
    token_attention: Any
    lexical: Any
    added: Any
    encode_tokens: Any
    calibrate: Any
    train: Any
    eval: Any

    @torch.no_grad()
    def predict_top_k(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        k: int = 10,
        chunk_size: int = 16_384,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The best `k` labels of each document, as `forward(...).logits.topk(k)`, computed for `chunk_size` labels at a time.

        Use it if there are so many labels that logits (B, L) and attention weights (B, L) do not fit into memory. A first pass over the
        labels accumulates label attention (Eq. 16-17) with a running maximum; a second one ranks the logits. Without gradient and
        without dropout.

        Args:
            input_ids, attention_mask, token_type_ids, inputs_embeds: the documents, as in `forward`.
            k (`int`, defaults to 10): number of labels per document, from 1 to the number of labels.
            chunk_size (`int`, defaults to 16,384): labels that are scored together.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: logits and label ids, both of shape `(B, k)`, best first. Of labels with
            equal logits any may come first.

        Raises:
            ValueError: `k` or `chunk_size` out of range.

        Example:

        ```python
        scores, indices = model.predict_top_k(**tokenizer(texts, padding=True, return_tensors="pt"), k=5)
        probabilities = scores.sigmoid()
        ```
        """
        num_labels = self.config.num_labels
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_labels:
            raise ValueError(f"`k` is {k!r}, but it must be an integer from 1 to {num_labels}, the number of labels.")
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(
                f"`chunk_size` is {chunk_size!r}, but it must be an integer of at least 1. Use the default, or less "
                "if memory is limited."
            )
        chunks = [slice(start, min(start + chunk_size, num_labels)) for start in range(0, num_labels, chunk_size)]
        training = self.training
        self.eval()
        try:
            document_embeds, output, token_mask = self.encode_tokens(
                input_ids,
                attention_mask,
                token_type_ids,
                inputs_embeds,
                max_length=self.config.encoder_max_length,
                with_states=self.config.token_attention,
            )
            features = document_embeds
            num_attended = num_labels - self.config.num_added_labels
            if self.config.label_attention:
                attended = [slice(c.start, min(c.stop, num_attended)) for c in chunks if c.start < num_attended]
                features = torch.cat([self._attended_in_chunks(features, attended), features], dim=-1)
            features = features.to(self.classifier.bias.dtype)
            best: tuple[torch.Tensor, torch.Tensor] | None = None
            for chunk in chunks:
                logits = self._logits_of(chunk, features)
                if chunk.stop > num_attended:
                    own = slice(max(chunk.start - num_attended, 0), chunk.stop - num_attended)
                    logits = self.added(logits, document_embeds, own)
                if self.token_attention is not None:
                    logits = logits + self.token_attention(output.last_hidden_state, token_mask, chunk)
                if self.lexical is not None and input_ids is not None:
                    logits = logits + self.lexical(input_ids, attention_mask, chunk).to(logits.dtype)
                scores, indices = logits.topk(min(k, logits.shape[1]), dim=-1)
                indices = indices + chunk.start
                if best is not None:
                    scores, indices = torch.cat([best[0], scores], dim=-1), torch.cat([best[1], indices], dim=-1)
                    scores, order = scores.topk(min(k, scores.shape[1]), dim=-1)
                    indices = indices.gather(1, order)
                best = scores, indices
            return self.calibrate(scores), indices
        finally:
            self.train(training)

    def _attended_in_chunks(self, document_embeds: torch.Tensor, chunks: list[slice]) -> torch.Tensor:
        """Σ α e_y (B, d) of Eq. 16-17 with one chunk of α at a time: an online softmax, with a running maximum and sum."""
        largest = document_embeds.new_full((len(document_embeds), 1), -torch.inf)
        total, mixed = torch.zeros_like(largest), torch.zeros_like(document_embeds)
        for chunk in chunks:
            table = LabelTable(self.label_embeddings[chunk])
            scores = table.products(document_embeds).float()
            new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
            weights = (scores - new_largest).clamp_(min=SMALLEST_LOG_WEIGHT).exp_()
            kept = (largest - new_largest).exp()
            total = total * kept + weights.sum(dim=-1, keepdim=True)
            mixed = mixed * kept + table.mix(weights)
            largest = new_largest
        return mixed / total.clamp_min(torch.finfo(total.dtype).tiny)

    def _logits_of(self, chunk: slice, features: torch.Tensor) -> torch.Tensor:
        """The classifier's logits (B, n) for the n labels of a chunk: its `forward` with only these rows of its weights."""
        classifier = self.classifier
        rows = {"bias": classifier.bias[chunk]}
        if hasattr(classifier, "out_proj"):
            rows["out_proj.weight"] = classifier.out_proj.weight[chunk]
        return functional_call(classifier, rows, (features, LabelTable(self.label_embeddings[chunk]).products))
