"""Fast labeling of many documents, for models that are faster than their tokenizer."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.pipeline_sep_mldc import (
    DEFAULT_RANKING_SIZE,
    MultiLabelDocumentClassificationPipeline,
    check_characters,
)

from .data.word_cache import WordCache


ALL_TOKENS = 2**30
# Data type of token ids in packed documents.
BYTES = 4
# Parameters of the pipeline that are supported without calling the pipeline.
FAST_PARAMETERS = ("top_k", "threshold", "min_score", "max_length", "window_merge")


class FastLabeler:
    """
    Labels many documents like the pipeline with `window_merge="first"`, but several times as fast for a student of [`~trainer.distill`].
    The words of a document are looked up in a [`~trainer.data.word_cache.WordCache`], and only the first `max_length` tokens are read.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): a trained model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        max_length (`int`, *optional*): tokens per document, special tokens included; by default, as many as the encoder reads.
        batch_size (`int`, defaults to 64): documents that go through the model together.
        block_size (`int`, defaults to 1024): documents that are read ahead and sorted by length.
        top_k (`int`, *optional*), threshold (`float`, *optional*), min_score (`float`, *optional*): which labels, as in the
            pipeline.
        words ([`~trainer.data.word_cache.WordCache`], *optional*): a word cache for `tokenizer`, to share it between labelers.

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
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        min_score: float | None = None,
        words: WordCache | None = None,
    ):
        self.model, self.words = model.eval(), WordCache(tokenizer) if words is None else words
        self.max_length = model.config.max_tokens(tokenizer) if max_length is None else max_length
        self.batch_size, self.block_size = batch_size, block_size
        self.top_k, self.threshold, self.min_score = top_k, threshold, min_score
        self.pad_token_id = tokenizer.pad_token_id or 0
        self.num_special = len(self.words.before) + len(self.words.after)

    def __call__(self, texts: Iterable[str]) -> Iterator[list[dict[str, Any]]]:
        """
        Label texts, in order. The texts are read lazily, as results are consumed.

        Raises:
            ValueError: the model computes scores that are not finite.
        """
        texts = iter(texts)
        while block := list(islice(texts, self.block_size)):
            yield from self._label_block(block)

    def _label_block(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        return self.label_packed(self.words.packed(texts, self.max_length))

    def label_packed(self, documents: list[bytes]) -> list[list[dict[str, Any]]]:
        """Label documents given as token ids, as [`~trainer.data.word_cache.WordCache.packed`] returns them."""
        order = np.argsort([len(ids) for ids in documents], kind="stable")
        results: list[list[dict[str, Any]]] = [[] for _ in documents]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size].tolist()
            for row, labels in zip(rows, self._label_batch([documents[row] for row in rows])):
                results[row] = labels
        return results

    @torch.inference_mode()
    def label_windows(self, documents: list[list[bytes]]) -> list[list[dict[str, Any]]]:
        """Label documents of several windows by the maximum over windows, like the pipeline with `window_merge="max"`."""
        answers = []
        for start in range(0, len(documents), self.batch_size):
            some = documents[start : start + self.batch_size]
            windows = [window for document in some for window in document]
            batches = [windows[at : at + self.batch_size] for at in range(0, len(windows), self.batch_size)]
            scores = torch.cat([self.model.probabilities(self._logits(batch)) for batch in batches])
            best = torch.stack([rows.amax(dim=0) for rows in scores.split(list(map(len, some)))])
            answers += self._label_sets(self.model.close_scores(best))
        return answers

    @torch.inference_mode()
    def _logits(self, documents: list[bytes]) -> torch.Tensor:
        """Logits (B, L) on the CPU."""
        lengths = np.array([_num_tokens(ids) for ids in documents])
        mask = np.arange(max(lengths.max(), 1)) < lengths[:, None]
        ids: np.ndarray = np.full(mask.shape, self.pad_token_id, dtype=np.int64)
        ids[mask] = np.frombuffer(b"".join(documents), np.int32)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        logits = self.model(**inputs, return_label_embeds=False).logits.float().cpu()
        if not torch.isfinite(logits).all():
            raise ValueError(
                "The model computes scores that are not finite numbers. Use float32 instead of 16 bits; if that does not help, the "
                "checkpoint is damaged."
            )
        return logits

    @torch.inference_mode()
    def _label_batch(self, documents: list[bytes]) -> list[list[dict[str, Any]]]:
        logits = self._logits(documents)
        if self.model.config.is_ranking:
            found = self._ranking(self.model.close_scores(logits))
        else:
            found = self._label_sets(self.model.close_scores(self.model.probabilities(logits)))
        # A text without tokens gets no labels.
        return [
            labels if length > self.num_special else [] for labels, length in zip(found, map(_num_tokens, documents))
        ]

    def _ranking(self, scores: torch.Tensor) -> list[list[dict[str, Any]]]:
        top_k = self.top_k
        if top_k is None and self.min_score is None:
            top_k = DEFAULT_RANKING_SIZE
        accepted = _best(scores, top_k)
        if self.min_score is not None:
            accepted &= scores >= self.min_score
        found = self._best_first(scores, accepted, top_k)
        return [[{**entry, "rank": rank} for rank, entry in enumerate(labels, start=1)] for labels in found]

    def _label_sets(self, scores: torch.Tensor) -> list[list[dict[str, Any]]]:
        if self.threshold is None and self.top_k is not None:
            accepted = _best(scores, self.top_k)
        else:
            accepted = self.model.label_sets(scores, self.threshold)
        if self.min_score is not None:
            accepted &= scores >= self.min_score
        return self._best_first(scores, accepted, self.top_k)

    def _best_first(
        self, scores: torch.Tensor, accepted: torch.Tensor, top_k: int | None
    ) -> list[list[dict[str, Any]]]:
        """The labels of each document for the mask `accepted` (B, L), best first, with ties broken as in the pipeline."""
        names, hierarchy = self.model.config.id2label, self.model.label_hierarchy
        found: list[list[dict[str, Any]]] = [[] for _ in scores]
        rows, labels = accepted.nonzero(as_tuple=True)
        if hierarchy is not None:
            # A parent whose score is that of a child comes before it.
            order = hierarchy.height[labels].argsort(descending=True, stable=True)
            rows, labels = rows[order], labels[order]
        for row, label, value in zip(rows.tolist(), labels.tolist(), scores[rows, labels].tolist()):
            found[row].append({"label": names[label], "score": value})
        return [sorted(chosen, key=_minus_score)[:top_k] for chosen in found]


def _best(scores: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Mask (B, L) of the labels with the `top_k` best scores; more than `top_k` if scores are tied."""
    if top_k is None or top_k >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores >= scores.topk(top_k, dim=1).values[:, -1:]


def _minus_score(entry: dict[str, Any]) -> float:
    return -entry["score"]


class StudentPipeline(MultiLabelDocumentClassificationPipeline):
    """
    A pipeline for a student of [`~trainer.distill`], with the same parameters and results. It uses a [`FastLabeler`] for lists of
    documents, as long as only the parameters `top_k`, `threshold`, `min_score`, `max_length` and `window_merge` are given. Documents of
    several windows are passed to the regular pipeline if windows are averaged or the tokenizer needs whole texts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._words = WordCache(self.tokenizer)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        parameters = {name: value for name, value in kwargs.items() if name not in ("batch_size", "num_workers")}
        preprocess, _, postprocess = self._sanitize_parameters(**parameters)
        chosen = {**self._preprocess_params, **self._postprocess_params, **preprocess, **postprocess}
        chosen = {name: value for name, value in chosen.items() if value is not None and value is not False}
        is_list = isinstance(inputs, list) and all(isinstance(text, str) for text in inputs)
        if not is_list or set(chosen) - set(FAST_PARAMETERS) or self.model.config.is_ranking:
            return super().__call__(inputs, **kwargs)
        for text in inputs:
            check_characters(text)
        max_length = chosen.pop("max_length", None) or self.model_max_length
        merge = chosen.pop("window_merge", "max")
        stride, is_exact = max_length // 8, self._words.is_exact
        # All tokens, or one more than a window, which is enough to see that a document is longer.
        limit = max_length if merge == "first" else ALL_TOKENS if is_exact and merge == "max" else max_length + 1
        documents = self._words.packed(inputs, limit)
        short: list[int] = []
        long: list[int] = []
        for position, ids in enumerate(documents):
            (short if _num_tokens(ids) <= max_length else long).append(position)
        batch_size = kwargs.get("batch_size") or 64
        label = FastLabeler(self.model, self.tokenizer, batch_size=batch_size, words=self._words, **chosen)
        if limit == ALL_TOKENS:
            of_long = label.label_windows(
                [self._windows(documents[position], max_length, stride) for position in long]
            )
        else:
            of_long = super().__call__([inputs[position] for position in long], **kwargs)
        answers: list[Any] = [None] * len(inputs)
        of_short = label.label_packed([documents[position] for position in short])
        for position, labels in zip(short + long, of_short + of_long, strict=True):
            answers[position] = labels
        return answers

    def _windows(self, ids: bytes, max_length: int, stride: int) -> list[bytes]:
        """Windows of a document that is longer than one, as the tokenizer makes them."""
        before, after = len(self._words.before), len(self._words.after)
        room, num_tokens = max_length - before - after, _num_tokens(ids)
        first, last = ids[: BYTES * before], ids[BYTES * (num_tokens - after) :]
        text = ids[BYTES * before : BYTES * (num_tokens - after)]
        starts = range(0, max(num_tokens - before - after - stride, 1), room - stride)
        return [first + text[BYTES * start : BYTES * (start + room)] + last for start in starts]


def _num_tokens(ids: bytes) -> int:
    return len(ids) // BYTES
