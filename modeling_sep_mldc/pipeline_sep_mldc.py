"""Pipeline `multi-label-document-classification`: from texts of any length to label sets, with explanations."""

import copy
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .explanation_sep_mldc import EXPLANATION_BUDGET, FEWEST_GROUPS, explain_window, words_of_tokens
from .label_sets_sep_mldc import DEFAULT_THRESHOLD, expected_f1


logger = logging.get_logger(__name__)

TASK = "multi-label-document-classification"
# Default number of labels of a ranking, which has no thresholds to end it.
DEFAULT_RANKING_SIZE = 10
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MERGES = ("max", "mean", "attention", "first")
PARAMETERS = (
    "top_k",
    "threshold",
    "min_score",
    "min_labels",
    "min_expected_f1",
    "max_length",
    "stride",
    "window_merge",
    "return_explanation",
    "explanation_size",
    "explanation_budget",
    "text_column",
)


def is_abstained(labels: list[dict[str, Any]]) -> bool:
    """
    Whether the model abstains from labeling a document because no label reaches its threshold, so that a person should review it.

    Args:
        labels (`list[dict]`): the pipeline's output for the document.

    Example:

    ```python
    >>> is_abstained([]), is_abstained([{"label": "cs.IR", "score": 0.3, "below_threshold": True}])
    (True, True)
    >>> is_abstained([{"label": "cs.IR", "score": 0.9}])
    False

    ```
    """
    return all(entry.get("below_threshold", False) for entry in labels)


def check_characters(text: str) -> None:
    """
    Raises:
        ValueError: the text contains an unpaired surrogate, half of a character, which no tokenizer accepts.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A document contains an unpaired surrogate ({error.object[error.start]!r}), which is not a character. Remove it."
        ) from None


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """The `custom_pipelines` entry of a checkpoint's config.json; a new dictionary each time, because `pipeline()` modifies it."""
    return {
        TASK: {
            "impl": f"pipeline_sep_mldc.{MultiLabelDocumentClassificationPipeline.__name__}",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "text",
        }
    }


class MultiLabelDocumentClassificationPipeline(ChunkPipeline):
    r"""
    Assigns labels to documents of any length.

    A text that exceeds the model's maximum length is split into overlapping windows that together cover every token. Windows of
    several documents are batched together. Each document gets a list of `{"label": str, "score": float}`, best first:

    - `score` is the probability of the label, `model.probabilities(logits)`.
    - Returned are the labels that reach their threshold: `config.thresholds`, or 0.5. The list is empty if none does: the model abstains
      (see [`is_abstained`]). With `min_labels`, the best labels are added, with `"below_threshold": True`.
    - A label hierarchy and constraints change these sets as described in `model.label_sets`; with a hierarchy, the score of a label is
      the maximum over itself and its descendants.
    - A model that only ranks labels (`config.is_ranking`: trained with the softmax loss, not calibrated) returns
      `{"label", "score", "rank"}`. `score` is the logit, which can be compared within one document only; `rank` counts from 1. The
      10 best labels are returned unless `top_k` or `min_score` is given. This causes one warning.
    - A text without tokens (empty or only whitespace) has no labels, regardless of the parameters.

    Args:
        model, tokenizer, device, batch_size, ...: as in every pipeline. The tokenizer must be a fast one.
        top_k (`int`, *optional*): return the `top_k` best labels instead of those above their thresholds. With `threshold`, at
            most `top_k` of those above it.
        threshold (`float`, *optional*): one threshold from 0 to 1 for all labels, instead of the stored ones.
        min_score (`float`, *optional*): leave out labels with a lower score.
        min_labels (`int`, defaults to 0): if fewer labels reach their threshold, add the best of the others, as far as `top_k` and
            `min_score` allow, ignoring hierarchy and constraints. They have `"below_threshold": True`; a document with
            no other labels still counts as abstained.
        min_expected_f1 (`float`, *optional*): the model also abstains on documents whose expected F1 is lower, as if no label reached its
            threshold. The expected F1 of the labels S that would be returned is 2 Σ_{l in S} p_l / (|S| + Σ_l p_l). The report of
            `run_mldc.py` and `StreamingMetrics.f1_of_kept` show how many documents each value sends to human review, and the F1 of the rest.
        max_length (`int`, *optional*): tokens per window, special tokens included. Defaults to as many as the model reads.
        stride (`int`, *optional*): tokens shared by neighboring windows. Defaults to an eighth of `max_length`.
        window_merge (`str`, defaults to `"max"`): how the scores of a label in the windows are combined. `"max"`: the
            maximum. `"mean"`: mean over tokens, where a token in two windows counts half in each. `"attention"`: mean weighted by the
            attention to the label in each window (Eq. 16). `"first"`: only the first window is read.
        truncation (`bool`, *optional*): as in transformers; `True` means `window_merge="first"`, unless another one is given.
        return_explanation (`bool`, defaults to `False`): return a dictionary instead, with `labels` as above; `attended_labels`, the
            `{"label", "weight"}` with the largest attention, averaged over tokens (empty for a model without label attention);
            `abstained`, whether no label reaches its threshold; and `explanations`, for each returned label by name the parts of its logit, which add up to it:

            - `logit`: the label's own, of its best window; with another `window_merge`, the mean over windows with the weights of their scores.
            - `bias`: the logit of a document without words.
            - `lexical`: the sum over words of what they add to the lexical scores, exact.
            - `encoder`: the sum over words of what attention to them adds to the encoder's part of the logit: an estimate, from
              derivatives, of how much the logit would change if that word alone were masked.
            - `remainder`: the effect of words in combination, beyond the sum of their individual effects.
            - `words`: the `{"word", "start", "end", "score", "lexical", "encoder"}` with the largest absolute `score`, which is
              `lexical` + `encoder`. `start` and `end` count characters of the text.
            - `words_per_group`: 1 if each word was measured by itself. Larger if the encoder does not accept token weights (an export,
              DeBERTa) and the document is long: up to this many neighboring words were masked together, and the effect is divided among
              them in proportion to the inverse document frequencies of their tokens.

            `tokens`, for each label the same words as `{"token", "start", "end", "score"}` with `score` as a share of all words'
            absolute scores, is the old format, which is kept until version 0.3.
        explanation_size (`int`, defaults to 5): number of `attended_labels`, and of `words` per label.
        explanation_budget (`int`, defaults to 8,192): maximum number of tokens in all masked copies of the document together.
            Masked copies are used if the budget allows one per word, or if the encoder does not accept token weights. The same copies are
            used for all labels.
        text_column (`str`, defaults to `"text"`): the key of the text in documents that are dictionaries.

    Raises:
        ValueError: a parameter is unknown or out of range, a document is not a text, the tokenizer is not fast, or the model
            computes scores that are not finite.

    Example:

    ```python
    classify = pipeline("multi-label-document-classification", model=folder, trust_remote_code=True)
    classify("A new proof of an old theorem.", top_k=3)
    for labels in classify(document["text"] for document in stream):  # generators and datasets are streamed
        ...
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _load_tokenizer = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer is {type(self.tokenizer).__name__}, but windows need the token offsets of a fast tokenizer. "
                "Pass `tokenizer=` one that `AutoTokenizer` loads."
            )

    # ---- Parameters ----

    def _sanitize_parameters(self, **kwargs):
        if kwargs.pop("truncation", False) not in (False, None, "do_not_truncate"):
            kwargs.setdefault("window_merge", "first")
        kwargs.pop("padding", None)  # batches are padded anyway
        unknown = sorted(set(kwargs) - set(PARAMETERS))
        if unknown:
            raise ValueError(
                f"The pipeline has no parameter `{unknown[0]}`. It takes {', '.join(f'`{name}`' for name in PARAMETERS)}."
            )
        for name, check in (
            ("top_k", _check_count),
            ("explanation_size", _check_count),
            ("explanation_budget", _check_count),
            ("threshold", self._check_threshold),
            ("min_score", self._check_min_score),
            ("max_length", self._check_max_length),
            ("stride", _check_stride),
            ("min_labels", _check_min_labels),
            ("min_expected_f1", self._check_threshold),
            ("window_merge", self._check_window_merge),
        ):
            if kwargs.get(name) is not None:
                check(name, kwargs[name])
        windows = ("max_length", "stride", "window_merge", "return_explanation", "text_column")
        preprocess = {name: kwargs[name] for name in windows if name in kwargs}
        postprocess = {name: kwargs[name] for name in kwargs if name not in ("max_length", "stride", "text_column")}
        return preprocess, {}, postprocess

    def _check_threshold(self, name: str, value: Any) -> None:
        if self.model.config.is_ranking:
            raise ValueError(
                f"`{name}` is {value!r}, but this model ranks labels and has no probabilities (`config.is_ranking`). Use `top_k`, or "
                "tune its thresholds first."
            )
        _check_probability(name, value)

    def _check_min_score(self, name: str, value: Any) -> None:
        if not self.model.config.is_ranking:
            _check_probability(name, value)
        elif isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"`{name}` is {value!r}, but it must be a finite number: the scores of this model are logits. Leave it out to get "
                "all labels that `top_k` allows."
            )

    def _check_max_length(self, name: str, value: Any) -> None:
        special = self.tokenizer.num_special_tokens_to_add()
        limit = self.longest_max_length
        if isinstance(value, bool) or not isinstance(value, Integral) or not special < value <= limit:
            raise ValueError(
                f"`{name}` is {value!r}, but it must be an integer from {special + 1} to {limit}, {special} special tokens "
                "included. Leave it out for as many as the model reads."
            )

    def _check_window_merge(self, name: str, value: Any) -> None:
        if value not in MERGES:
            raise ValueError(f"`{name}` is {value!r}, but it must be one of {', '.join(map(repr, MERGES))}.")
        if value == "attention" and not self.model.config.label_attention:
            raise ValueError(
                "`window_merge` is 'attention', but this model has no label attention (`config.label_attention`). Choose "
                "'max' or 'mean'."
            )

    @cached_property
    def model_max_length(self) -> int:
        """Number of tokens that the model reads, and so of a window by default."""
        reads = self.model.config.max_tokens(self.tokenizer)
        return reads if reads > self.tokenizer.num_special_tokens_to_add() else self._encoder_limit

    @cached_property
    def longest_max_length(self) -> int:
        """
        Largest `max_length`. Lexical scores read all tokens: with them, a window may be longer than `encoder_max_length`, as documents
        are in training.
        """
        return self._encoder_limit if self.model.config.num_lexical_features else self.model_max_length

    @cached_property
    def _encoder_limit(self) -> int:
        """Number of tokens that the encoder could read, `encoder_max_length` apart."""
        config = copy.copy(self.model.config)
        config.encoder_max_length = None
        return config.max_tokens(self.tokenizer)

    # ---- From texts to windows ----

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Labels of one text or of several.

        Args:
            inputs: a text, or a dictionary with one. A list or tuple of them returns a list. A generator, a `Dataset` or any other
                iterable of them, such as a dataset or column of `datasets`, returns an iterator that reads lazily.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        if not isinstance(inputs, (str, dict, list, bytes, Dataset)) and isinstance(inputs, Iterable):
            inputs = (document for document in inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(
        self,
        document: str | dict[str, Any],
        max_length: int | None = None,
        stride: int | None = None,
        window_merge: str = "max",
        return_explanation: bool = False,
        text_column: str = "text",
    ) -> Iterator[dict[str, Any]]:
        if isinstance(document, dict):
            if text_column not in document:
                raise ValueError(
                    f"A document has no `{text_column}`, only {', '.join(map(repr, document)) or 'nothing'}. Specify the key of its text with "
                    "`text_column`."
                )
            document = document[text_column]
        if not isinstance(document, str):
            raise ValueError(
                f"A document is {repr(document)[:60]} ({type(document).__name__}), but it must be a text. Pass a string, or a "
                "dictionary with one."
            )
        check_characters(document)
        max_length = max_length or self.model_max_length
        stride = max_length // 8 if stride is None else stride
        room = max_length - self.tokenizer.num_special_tokens_to_add()
        if stride >= room and window_merge != "first":
            raise ValueError(
                f"`stride` is {stride}, but it must be less than {room}, the tokens of the text in a window of {max_length}. Choose a "
                "smaller `stride`."
            )
        encoded = self.tokenizer(
            [document],
            truncation=True,
            max_length=max_length,
            stride=0 if window_merge == "first" else stride,
            return_overflowing_tokens=window_merge != "first",
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=True,
        )
        encoded.pop("overflow_to_sample_mapping", None)
        windows = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        # A tokenizer that truncates on the left returns the end of the text first.
        windows.sort(key=_first_offset)
        for number, window in enumerate(windows):
            yield {
                **{name: torch.tensor([window[name]]) for name in MODEL_INPUTS if name in window},
                "offsets": window["offset_mapping"] if return_explanation else None,
                "special": window["special_tokens_mask"],
                "shared": stride if number else 0,
                "text": document if return_explanation else None,
                "is_last": number == len(windows) - 1,
            }

    # ---- From windows to scores ----

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        extras = {name: model_inputs.pop(name) for name in ("offsets", "special", "shared", "text", "is_last")}
        output = self.model(**model_inputs, return_label_embeds=False)
        # The first entry tells transformers the size of the batch. Inputs are kept for the explanation only.
        kept = {"logits": output.logits.float(), "label_attention": output.label_attention, **extras}
        texts = extras["text"] if isinstance(extras["text"], list) else [extras["text"]]
        return kept if texts[0] is None else {**kept, **model_inputs}

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores (W, L) of logits (W, L): probabilities, or the logits themselves if the model ranks labels."""
        if not torch.isfinite(logits).all():
            raise ValueError(
                "The model computes scores that are not finite numbers. Use float32 instead of 16 bits; if that does not help, the "
                "checkpoint is damaged."
            )
        if self.model.config.is_ranking:
            logger.warning_once(
                "This model was trained with the softmax loss and is not calibrated, so its scores are not probabilities: the pipeline "
                "returns a ranking of labels. Tune thresholds with the trainer to get label sets."
            )
            return logits
        return self.model.probabilities(logits)

    def postprocess(
        self,
        windows: list[dict[str, Any]],
        top_k: int | None = None,
        threshold: float | None = None,
        min_score: float | None = None,
        min_labels: int | None = None,
        min_expected_f1: float | None = None,
        window_merge: str = "max",
        return_explanation: bool = False,
        explanation_size: int = 5,
        explanation_budget: int = EXPLANATION_BUDGET,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        special = [window["special"] for window in windows]
        sizes = [mask.count(0) for mask in special]
        labels: list[dict[str, Any]] = []
        chosen: list[int] = []
        if any(sizes):
            window_scores = self._scores(torch.cat([window["logits"] for window in windows]))
            shares = _token_shares(sizes, [window["shared"] for window in windows])
            attention = None
            if windows[0]["label_attention"] is not None:
                attention = torch.cat([window["label_attention"] for window in windows]).float()
            weights = _merge_weights(window_scores, window_merge, shares, attention)
            scores = self.model.close_scores((weights * window_scores).sum(dim=0, keepdim=True))[0]
            chosen = self._choose(scores, top_k, threshold, min_score)
            if min_expected_f1 is not None and self._expected_f1(scores, chosen) < min_expected_f1:
                # Treated as if no label reached its threshold.
                chosen, threshold = [], math.inf
            num_accepted = len(chosen)
            wanted = min(min_labels or 0, len(scores) if top_k is None else top_k)
            chosen = self._fill_up(chosen, scores, wanted, threshold, min_score)
            values = scores[chosen].tolist()
            names = self.model.config.id2label
            labels = [{"label": names[index], "score": value} for index, value in zip(chosen, values)]
            labels[num_accepted:] = [{**entry, "below_threshold": True} for entry in labels[num_accepted:]]
            if self.model.config.is_ranking:
                labels = [{**entry, "rank": rank} for rank, entry in enumerate(labels, start=1)]
        if not return_explanation:
            return labels
        explanation: dict[str, Any] = {"labels": labels, "abstained": is_abstained(labels)}
        explanation |= {"attended_labels": [], "explanations": {}, "tokens": {}}
        if any(sizes):
            if attention is not None:
                best = (shares @ attention).topk(min(explanation_size, attention.shape[1]))
                explanation["attended_labels"] = [
                    {"label": names[index], "weight": weight}
                    for index, weight in zip(best.indices.tolist(), best.values.tolist())
                ]
            found = self._explain(windows, chosen, weights, explanation_budget)
            for index, (parts, words) in zip(chosen, found):
                total = sum(abs(word["score"]) for word in words) or 1.0
                words = sorted(words, key=lambda word: -abs(word["score"]))[:explanation_size]
                explanation["explanations"][names[index]] = {**parts, "words": words}
                explanation["tokens"][names[index]] = [
                    {"token": w["word"], "start": w["start"], "end": w["end"], "score": w["score"] / total}
                    for w in words
                ]
        return explanation

    def _choose(
        self, scores: torch.Tensor, top_k: int | None, threshold: float | None, min_score: float | None
    ) -> list[int]:
        """Ids of the labels to return, best first."""
        if self.model.config.is_ranking:
            accepted = torch.ones_like(scores, dtype=torch.bool)
            if top_k is None and min_score is None:
                top_k = DEFAULT_RANKING_SIZE
        elif threshold is None and top_k is not None:
            accepted = torch.ones_like(scores, dtype=torch.bool)
        else:
            accepted = self.model.label_sets(scores.unsqueeze(0), threshold)[0]
        if min_score is not None:
            accepted &= scores >= min_score
        candidates = accepted.nonzero().flatten()
        hierarchy = self.model.label_hierarchy
        if hierarchy is not None:
            # A parent whose score is that of a child comes before it.
            candidates = candidates[hierarchy.height[candidates.cpu()].argsort(descending=True, stable=True)]
        # Stable: ties go to the lower label index.
        order = scores[candidates].sort(descending=True, stable=True).indices
        return candidates[order][:top_k].tolist()

    @staticmethod
    def _expected_f1(scores: torch.Tensor, chosen: list[int]) -> float:
        """The expected F1 of the chosen labels, from the scores (L,)."""
        predicted = torch.zeros(1, len(scores), dtype=torch.bool, device=scores.device)
        predicted[0, chosen] = True
        return float(expected_f1(scores.unsqueeze(0), predicted))

    def _fill_up(
        self,
        chosen: list[int],
        scores: torch.Tensor,
        min_labels: int,
        threshold: float | None,
        min_score: float | None,
    ) -> list[int]:
        """The chosen ids, followed by the best of those below their thresholds, until there are `min_labels`."""
        config = self.model.config
        if len(chosen) >= min_labels or config.is_ranking:
            return chosen
        cuts: Any = DEFAULT_THRESHOLD if threshold is None else threshold
        if threshold is None and config.thresholds is not None:
            cuts = torch.tensor(config.thresholds, dtype=scores.dtype)
        # A hierarchy or a constraint may have left out labels that reach their threshold: they are not added again.
        others = scores < cuts
        others[chosen] = False
        if min_score is not None:
            others &= scores >= min_score
        candidates = others.nonzero().flatten()
        order = scores[candidates].sort(descending=True, stable=True).indices
        return chosen + candidates[order][: min_labels - len(chosen)].tolist()

    # ---- Explanation ----

    def _explain(
        self, windows: list[dict[str, Any]], chosen: list[int], weights: torch.Tensor, budget: int
    ) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """For each chosen label, the parts of its logit and its words, those of its windows with their `weights` (W, L)."""
        totals: list[dict[str, Any]] = [
            {**dict.fromkeys(("logit", "bias", "lexical", "encoder", "remainder"), 0.0), "words_per_group": 1}
            for _ in chosen
        ]
        words: list[dict[tuple[int, int], list[float]]] = [{} for _ in chosen]
        text = windows[0]["text"]
        weights = weights[:, chosen]
        needed = [number for number, row in enumerate(weights) if row.any()]
        with self.device_placement():
            for number in needed:
                window = windows[number]
                # Padding may be on either side: `offsets` and `special` have the tokens where the attention mask is 1.
                real = window["attention_mask"][0].bool()
                inputs = {name: window[name][:, real].to(self.device) for name in MODEL_INPUTS if name in window}
                spans, word_ids = words_of_tokens(text, window["offsets"], window["special"])
                copies = max(budget // (len(word_ids) * len(needed)), FEWEST_GROUPS)
                positions = weights[number].nonzero().flatten().tolist()
                parts = explain_window(
                    self.model,
                    inputs,
                    word_ids,
                    [chosen[position] for position in positions],
                    copies,
                    self.tokenizer.pad_token_id or 0,
                )
                for column, position in enumerate(positions):
                    weight, total = float(weights[number, position]), totals[position]
                    total["words_per_group"] = max(total["words_per_group"], parts.words_per_group)
                    for name in ("logit", "bias", "remainder"):
                        total[name] += weight * float(getattr(parts, name)[column])
                    rows = zip(spans, parts.lexical[:, column].tolist(), parts.encoder[:, column].tolist())
                    for span, of_lexical, of_encoder in rows:
                        sums = words[position].setdefault(span, [0.0, 0.0])
                        sums[0] += weight * of_lexical
                        sums[1] += weight * of_encoder
        answers = []
        for total, found in zip(totals, words):
            total["lexical"], total["encoder"] = (sum(sums[part] for sums in found.values()) for part in (0, 1))
            listed = [
                {"word": text[start:end], "start": start, "end": end, "score": a + b, "lexical": a, "encoder": b}
                for (start, end), (a, b) in found.items()
            ]
            answers.append((total, listed))
        return answers


def _first_offset(window: dict[str, Any]) -> int:
    return next(
        (span[0] for span, special in zip(window["offset_mapping"], window["special_tokens_mask"]) if not special), 0
    )


def _token_shares(sizes: list[int], shared: list[int]) -> torch.Tensor:
    """Share of the text's tokens in each window, (W,), summing to 1: a token in n windows counts 1/n in each."""
    starts, position = [], 0
    for size, overlap in zip(sizes, shared):
        position = max(position - overlap, 0)
        starts.append(position)
        position += size
    coverage = torch.zeros(starts[-1] + sizes[-1])
    for start, size in zip(starts, sizes):
        coverage[start : start + size] += 1
    return torch.stack([(1 / coverage[start : start + size]).sum() for start, size in zip(starts, sizes)]) / len(
        coverage
    )


def _merge_weights(
    scores: torch.Tensor, merge: str, shares: torch.Tensor, attention: torch.Tensor | None
) -> torch.Tensor:
    """Weights (W, L) of the windows in each label's score; each column sums to 1."""
    if merge in ("max", "first"):
        return torch.zeros_like(scores).scatter_(0, scores.argmax(dim=0, keepdim=True), 1.0)
    if merge == "mean" or attention is None:
        return shares.unsqueeze(1).expand_as(scores)
    # A label that no window attends to gets the plain mean.
    weights = attention.clamp_min(1e-30) * shares.unsqueeze(1)
    return weights / weights.sum(dim=0, keepdim=True)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"`{name}` is {value!r}, but it must be an integer of at least 1. Leave it out for the default."
        )


def _check_min_labels(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(
            f"`{name}` is {value!r}, but it must be a number of labels of at least 0. Use 0 to return those above their thresholds only."
        )


def _check_stride(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(
            f"`{name}` is {value!r}, but it must be a number of tokens of at least 0. Use 0 for no overlap."
        )


def _check_probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"`{name}` is {value!r}, but it must be a probability from 0 to 1. Use 0.5, for example.")
