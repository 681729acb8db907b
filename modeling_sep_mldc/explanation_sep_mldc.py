"""Explanations: the contribution of each word to a label's logit, from the encoder's attention to words and from lexical scores."""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .encoder_sep_mldc import cpu_computes_bfloat16


# Log weights of all words at which the derivative with respect to each word's log weight is taken; 0 leaves the window as it is.
FADES = (0.0, -3.0)
# At this log weight, a word counts as masked.
GONE = -30.0
# For longer windows, attention weights and their gradients may not fit into memory, so masked copies are used instead.
MOST_FADED_TOKENS = 1024
# Maximum number of tokens in all masked copies for one explanation: 32 copies of 256 tokens.
EXPLANATION_BUDGET = 8192
# Minimum number of groups of words per window, however long the document is.
FEWEST_GROUPS = 4
TOKENS_PER_BATCH = 4096
# Shorter windows are fast enough in float32.
BFLOAT16_FROM = 64
# Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between words.
WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
EDGES = re.compile(r"^\W+|\W+$")


@dataclass
class WindowParts:
    r"""
    Decomposition of the logits of n labels for one window with W words. For each label,
    `logit = bias + lexical.sum() + encoder.sum() + remainder`.

    Attributes:
        logit (`torch.Tensor` of shape `(n,)`): the logits, as the model returns them.
        bias (`torch.Tensor` of shape `(n,)`): the logit of a window without words.
        lexical (`torch.Tensor` of shape `(W, n)`): what each word adds to the lexical scores, exactly.
        encoder (`torch.Tensor` of shape `(W, n)`): by how much the encoder's part drops without the word: an estimate from
            derivatives, or the word's share of the drop for its group.
        remainder (`torch.Tensor` of shape `(n,)`): what all words together add to the encoder's part, minus the sum of `encoder`.
        words_per_group (`int`): maximum number of words that were masked together.
    """

    logit: torch.Tensor
    bias: torch.Tensor
    lexical: torch.Tensor
    encoder: torch.Tensor
    remainder: torch.Tensor
    words_per_group: int


def words_of_tokens(
    text: str, offsets: list[tuple[int, int]], special: list[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """
    The words of a text that tokens belong to: characters `(start, end)` of each, without punctuation at its ends, and for each
    token the position of its word in that list, -1 for special tokens and whitespace.

    Words are separated by whitespace; in scripts without spaces, each token is a word.

    Args:
        text (`str`): the document.
        offsets (`list[tuple[int, int]]`): characters of each token, ascending, as a fast tokenizer gives them.
        special (`list[int]`): 1 for special tokens.
    """
    runs = [match.span() for match in re.finditer(r"\S+", text)]
    spans: list[tuple[int, int]] = []
    word_ids: list[int] = []
    run, last = 0, -1
    for (start, end), is_special in zip(offsets, special):
        while run < len(runs) and runs[run][1] <= start:
            run += 1
        if is_special or end <= start or run == len(runs) or runs[run][0] >= end:
            word_ids.append(-1)
            continue
        begin, stop = runs[run]
        if WITHOUT_SPACES.search(text, begin, stop):
            if not spans or spans[-1] != (start, end):  # bytes of one character have the same offsets
                spans.append((start, end))
        elif run != last:
            spans.append(_without_punctuation(text, begin, stop))
        last = run
        word_ids.append(len(spans) - 1)
    return spans, word_ids


def _without_punctuation(text: str, start: int, end: int) -> tuple[int, int]:
    word = text[start:end]
    bare = EDGES.sub("", word)
    if not bare:
        return start, end
    start += word.index(bare)
    return start, start + len(bare)


@torch.no_grad()
def explain_window(
    model: Any,
    inputs: dict[str, torch.Tensor],
    word_ids: list[int],
    labels: list[int],
    num_groups: int,
    pad_token_id: int,
) -> WindowParts:
    r"""
    Decompose the logits of some labels for one window.

    The lexical part is exact. For the encoder's part, a weight $m_w$ for each word multiplies the attention to its tokens in all layers,
    and their weight in pooling and token attention (AtMan: Deiseroth et al., 2023): 1 is the window as it is, 0 masks the
    word. A word's part is $\partial \text{logit} / \partial \ln m_w$, averaged over two points, all words at weight 1 and all words at
    $e^{-3}$: integrated gradients (Sundararajan et al., 2017) with two points. At the first point, this is the effect of masking the
    word, to first order; if `num_groups` copies are enough to mask every word, the measured effect replaces it. At the second point,
    words that other words repeat get a share, too. Tokens keep their positions: deleting a word would shift all later tokens, which
    changes logits more than the word does.

    For encoders that do not accept such weights, exports, and windows of more than 1,024 tokens, the model reads copies of the window
    instead, each with the tokens of a group of neighboring words masked (occlusion: Zeiler & Fergus, 2014). Groups are single words if
    `num_groups` copies are enough. In a larger group, the effect is divided among the words in proportion to the inverse document
    frequencies of their tokens or, without lexical scores, to their numbers of tokens.

    Args:
        model: returns `logits`; other parts, such as lexical scores, are optional.
        inputs (`dict[str, torch.Tensor]`): `input_ids`, `attention_mask`, ... of shape `(1, T)`, without padding.
        word_ids (`list[int]`): the word of each token, see [`words_of_tokens`].
        labels (`list[int]`): n labels.
        num_groups (`int`): maximum number of masked copies.
        pad_token_id (`int`): of the tokenizer.
    """
    window = _Window(model, inputs, word_ids, labels, pad_token_id)
    masks = torch.stack([torch.zeros_like(window.is_word), window.is_word])
    (full, bias), (full_lexical, bias_lexical) = window.read(masks)
    ends = torch.stack([full - full_lexical, bias - bias_lexical])
    encoder, per_group = full.new_zeros(window.num_words, len(labels)), 0
    if window.num_read:
        encoder, per_group = _encoder_part(window, ends, min(num_groups, window.num_read))
    lexical = full.new_zeros(window.num_words, len(labels))
    if window.lexical is not None:
        contributions = window.scale * window.lexical.contributions(inputs["input_ids"][0], labels).t().to(lexical)
        lexical.index_add_(0, window.of_token[window.is_word], contributions[window.is_word])
    remainder = ends[0] - ends[1] - encoder.sum(dim=0)
    # The lexical part of special tokens, which is 0 in fitted models, belongs to the bias.
    bias = full - lexical.sum(dim=0) - encoder.sum(dim=0) - remainder
    return WindowParts(full, bias, lexical, encoder, remainder, per_group)


class _Window:
    """The model, and which of its tokens belong to which word."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], word_ids: list[int], labels: list[int], pad: int):
        self.model, self.inputs, self.labels, self.pad_token_id = model, inputs, labels, pad
        self.lexical = getattr(model, "lexical", None)
        self.scale = model.config.logit_calibration[0] if self.lexical is not None else 1.0
        self.of_token = torch.tensor(word_ids, device=inputs["input_ids"].device)
        self.is_word = self.of_token >= 0
        self.num_words = max(word_ids, default=-1) + 1
        # Words that the encoder does not read have no effect on it.
        self.limit = min(model.config.encoder_max_length or len(word_ids), len(word_ids))
        self.num_read = max(word_ids[: self.limit], default=-1) + 1

    def read(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the labels, and the lexical part of them, with masked tokens, (K, T) to (K, n) each."""
        logits, of_lexical = [], []
        for rows in masks.split(max(TOKENS_PER_BATCH // masks.shape[1], 1)):
            batch = masked_copies(self.inputs, rows, self.pad_token_id)
            output = self.model(**batch, return_label_embeds=False)
            logits.append(output.logits.float()[:, self.labels])
            if self.lexical is not None:
                scores = self.lexical(batch["input_ids"], batch["attention_mask"])
                of_lexical.append(self.scale * scores[:, self.labels])
        found = torch.cat(logits)
        return found, torch.cat(of_lexical) if of_lexical else torch.zeros_like(found)

    def sums(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of each word that the encoder reads, (T, ...) to (W, ...)."""
        read = self.is_word[: self.limit]
        total = of_tokens.new_zeros(self.num_words, *of_tokens.shape[1:])
        return total.index_add(0, self.of_token[: self.limit][read], of_tokens[: self.limit][read])


def _encoder_part(window: _Window, ends: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, int]:
    """The encoder's part of each word, (W, n), and words that were measured together; `ends` as in `_by_attention`."""
    derivatives = _by_attention(window, ends)
    if derivatives is None:
        return _by_copies(window, num_groups), -(-window.num_read // num_groups)
    if num_groups == window.num_read:
        # A model that reads one word only has no derivative by the attention to it.
        derivatives[0] = _by_copies(window, num_groups)
    return derivatives.mean(dim=0), 1


def masked_copies(inputs: dict[str, torch.Tensor], masks: torch.Tensor, pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Copies (K, T) of a window (1, T) in which the attention mask is 0 for the tokens `masks` (K, T). All others keep their positions.
    """
    copies = {name: value.expand(len(masks), -1) for name, value in inputs.items()}
    # Encoders need at least one token to attend to. Token ids stay the same, because some encoders count positions by them.
    padding = masks.all(dim=1, keepdim=True) & (torch.arange(masks.shape[1], device=masks.device) == 0)
    copies["input_ids"] = copies["input_ids"].masked_fill(padding, pad_token_id)
    copies["attention_mask"] = (~masks | padding).to(copies["attention_mask"].dtype)
    return copies


def _by_attention(window: _Window, ends: torch.Tensor) -> torch.Tensor | None:
    """
    Derivatives of the logits with respect to the log weight of each word at each of `FADES`, (F, W, n); `None` if the encoder does not
    accept token weights.

    Args:
        ends (`torch.Tensor` of shape `(2, n)`): the encoder's part of the logits of the window, and of the window without words.
    """
    model, is_word = window.model, window.is_word[: window.limit]
    if not hasattr(model, "score_documents") or len(is_word) > MOST_FADED_TOKENS:
        return None
    fades = torch.tensor([*FADES, GONE], device=is_word.device).unsqueeze(1) * is_word
    try:
        with torch.enable_grad():
            weights = fades[: len(FADES)].clone().requires_grad_()
            logits = _weighted_logits(window, weights)
            gradients = [
                torch.autograd.grad(column.sum(), weights, retain_graph=True)[0] for column in logits.unbind(dim=1)
            ]
        gone = _weighted_logits(window, fades[-1:])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # an encoder that takes masks of shape (B, T) only
    # Other encoders ignore such a mask or use it differently.
    tolerance = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    found = torch.cat([logits[:1].detach(), gone])
    if not torch.allclose(found, ends, rtol=tolerance, atol=tolerance):
        return None
    of_tokens = torch.stack(gradients, dim=-1).float()
    return torch.stack([window.sums(point) for point in of_tokens])


def _weighted_logits(window: _Window, weights: torch.Tensor) -> torch.Tensor:
    """The encoder's part of the logits of the labels, (K, n), with the logarithms of weights of tokens, (K, T)."""
    model, (num_copies, length) = window.model, weights.shape
    inputs = {"input_ids": window.inputs["input_ids"]}
    if model.takes_token_type_ids and "token_type_ids" in window.inputs:
        inputs["token_type_ids"] = window.inputs["token_type_ids"]
    inputs = {name: value[:, :length].expand(num_copies, -1) for name, value in inputs.items()}
    if model.takes_use_cache:
        inputs["use_cache"] = False
    mask = _attention_mask(model.backbone.config, weights.to(model.dtype))
    states = model.backbone(attention_mask=mask, **inputs).last_hidden_state.float()
    if model.config.pooling == "cls":
        pooled = states[:, 0]
    else:
        pooled = (torch.softmax(weights, dim=1).unsqueeze(-1) * states).sum(dim=1)
    logits = model.score_documents(pooled)[0].float()[:, window.labels]
    if model.token_attention is not None:
        scores, products = model.token_attention.scores_and_products(states, window.labels)
        logits = logits + (torch.softmax(scores + weights.unsqueeze(-1), dim=1) * products).sum(dim=1)
    return model.calibrate(logits)


def _attention_mask(config: Any, weights: torch.Tensor) -> Any:
    """Weights of tokens (K, T) as they are added to the scores of attention, for each token that attends: (K, 1, T, T)."""
    length = weights.shape[1]
    mask = weights[:, None, None, :].expand(-1, 1, length, -1)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    # ModernBERT: in some layers tokens attend to their neighbors only.
    positions = torch.arange(length, device=weights.device)
    is_far = (positions.unsqueeze(1) - positions).abs() > config.sliding_window
    sliding = mask.masked_fill(is_far, torch.finfo(weights.dtype).min)
    return {"full_attention": mask, "sliding_attention": sliding}


def _by_copies(window: _Window, num_groups: int) -> torch.Tensor:
    """The encoder's part of each word, (W, n), from `num_groups` copies of the window without some of its words each."""
    model, of_token, num_read = window.model, window.of_token, window.num_read
    length, device = len(of_token), of_token.device
    groups = torch.arange(num_read, device=device) * num_groups // num_read
    outside = groups.new_full((window.num_words - num_read + 1,), -1)  # words that are not read, and no word
    copies = torch.arange(num_groups, device=device).unsqueeze(1) == torch.cat([groups, outside])[of_token]
    # In bfloat16 if the CPU supports it, in a third of the time. All copies are rounded alike, so their differences stay meaningful.
    with _bfloat16(model, length):
        logits, of_lexical = window.read(torch.cat([torch.zeros_like(copies[:1]), copies]))
    of_encoder = logits - of_lexical
    effects = of_encoder[0] - of_encoder[1:]
    # Rare words are more informative than frequent ones; without lexical scores, frequencies are unknown.
    ids = window.inputs["input_ids"][0]
    of_tokens = torch.ones(length, device=device)
    if window.lexical is not None:
        of_tokens = 0.1 + window.lexical.idf[ids].float()
    sizes = window.sums(of_tokens)[:num_read]
    group_sizes = torch.zeros(num_groups, device=device).index_add(0, groups, sizes)
    encoder = effects.new_zeros(window.num_words, len(window.labels))
    encoder[:num_read] = effects[groups] * (sizes / group_sizes[groups]).unsqueeze(1)
    return encoder


def _bfloat16(model: Any, length: int) -> AbstractContextManager:
    """Autocast to bfloat16 for a float32 model of PyTorch on a processor that has the instructions."""
    is_float32 = isinstance(model, torch.nn.Module) and model.device.type == "cpu" and model.dtype == torch.float32
    # A static encoder is a table lookup, which bfloat16 does not speed up.
    has_layers = getattr(model.config.backbone_config, "num_hidden_layers", None)
    if length < BFLOAT16_FROM or not is_float32 or not has_layers:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16) if cpu_computes_bfloat16() else nullcontext()
