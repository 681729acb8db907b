"""Label sets of many documents, for models that are faster than their tokenizer."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.pipeline_sep_mldc import DEFAULT_RANKING_SIZE

from .data.word_cache import WordCache


class FastLabeler:
    """
    Labels of many documents: the answers of the pipeline with `window_merge="first"`, several times as fast for a student of
    [`~trainer.distill`]. The words of a document are looked up in a [`~trainer.data.word_cache.WordCache`], and only the first
    `max_length` tokens are read.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): a trained model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        max_length (`int`, *optional*): tokens per document, special tokens included; as many as the encoder reads if not given.
        batch_size (`int`, defaults to 64): documents that go through the model together.
        block_size (`int`, defaults to 1024): documents that are read ahead and sorted by length.

    Example:

    ```python
    label = FastLabeler(student, tokenizer)
    for labels in label(texts):
        ...  # [{"label": "cs.IR", "score": 0.91}, ...], best first
    ```
    """

    def __init__(
        self,
        model: SepMldcForMultiLabelClassification,
        tokenizer: Any,
        max_length: int | None = None,
        batch_size: int = 64,
        block_size: int = 1024,
    ):
        self.model, self.words = model.eval(), WordCache(tokenizer)
        self.max_length = model.config.max_tokens(tokenizer) if max_length is None else max_length
        self.batch_size, self.block_size = batch_size, block_size
        self.pad_token_id = tokenizer.pad_token_id or 0
        self.num_special = len(self.words.before) + len(self.words.after)

    def __call__(self, texts: Iterable[str]) -> Iterator[list[dict[str, Any]]]:
        """
        Labels of texts, in their order, read as they are taken.

        Raises:
            ValueError: the model computes scores that are not finite.
        """
        texts = iter(texts)
        while block := list(islice(texts, self.block_size)):
            yield from self._label_block(block)

    def _label_block(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        documents = self.words(texts, self.max_length)
        order = np.argsort([len(ids) for ids in documents], kind="stable")
        results: list[list[dict[str, Any]]] = [[] for _ in texts]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size].tolist()
            for row, labels in zip(rows, self._label_batch([documents[row] for row in rows])):
                results[row] = labels
        return results

    @torch.inference_mode()
    def _label_batch(self, documents: list[list[int]]) -> list[list[dict[str, Any]]]:
        lengths = [len(ids) for ids in documents]
        ids: np.ndarray = np.full((len(documents), max(max(lengths), 1)), self.pad_token_id, dtype=np.int64)
        for row, tokens in enumerate(documents):
            ids[row, : len(tokens)] = tokens
        mask = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        logits = self.model(**inputs, return_label_embeds=False).logits.float().cpu()
        if not torch.isfinite(logits).all():
            raise ValueError(
                "The model computes scores that are not finite numbers. Use float32 instead of 16 bits; if that does not help, the "
                "checkpoint is damaged."
            )
        names, hierarchy = self.model.config.id2label, self.model.label_hierarchy
        found: list[list[dict[str, Any]]] = [[] for _ in documents]
        if self.model.config.is_ranking:
            logits = self.model.close_scores(logits)
            best = logits.topk(min(DEFAULT_RANKING_SIZE, logits.shape[1]), dim=-1)
            for row, (values, labels) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
                entries = enumerate(zip(labels, values), start=1)
                found[row] = [
                    {"label": names[label], "score": value, "rank": rank} for rank, (label, value) in entries
                ]
        else:
            scores = self.model.close_scores(self.model.probabilities(logits))
            rows, labels = self.model.label_sets(scores).nonzero(as_tuple=True)
            if hierarchy is not None:
                # As in the pipeline, a parent whose score is that of a child comes before it.
                order = hierarchy.height[labels].argsort(descending=True, stable=True)
                rows, labels = rows[order], labels[order]
            for row, label, value in zip(rows.tolist(), labels.tolist(), scores[rows, labels].tolist()):
                found[row].append({"label": names[label], "score": value})
            for chosen in found:
                chosen.sort(key=lambda entry: -entry["score"])
        # A text without tokens has no labels.
        return [chosen if length > self.num_special else [] for chosen, length in zip(found, lengths)]
