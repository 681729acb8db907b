"""Why a label: parts of its logit by word, from copies of the document without some words and from the lexical scores."""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .encoder_sep_mldc import cpu_computes_bfloat16


# Tokens that are read for one explanation, in all copies: 32 copies of 256 tokens.
EXPLANATION_BUDGET = 8192
# Groups of words per window at least, however long the document is.
FEWEST_GROUPS = 4
TOKENS_PER_BATCH = 4096
# Shorter windows are read fast enough in float32.
BFLOAT16_FROM = 64
# Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between words.
WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
EDGES = re.compile(r"^\W+|\W+$")


@dataclass
class WindowParts:
    r"""
    Parts of the logits of n labels for one window with W words. For each label
    `logit = bias + lexical.sum() + encoder.sum() + remainder`.

    Attributes:
        logit (`torch.Tensor` of shape `(n,)`): as the model returns them.
        bias (`torch.Tensor` of shape `(n,)`): the logit of a window without words.
        lexical (`torch.Tensor` of shape `(W, n)`): what each word adds to the lexical scores, exactly.
        encoder (`torch.Tensor` of shape `(W, n)`): by how much the encoder's part falls without the word, or the word's share
            of that of its group.
        remainder (`torch.Tensor` of shape `(n,)`): what all words together add to the encoder's part, less the sum of `encoder`.
        words_per_group (`int`): words that were left out together, at most.
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
    token the position of its word in that list, -1 for special tokens and blanks.

    A word is a run of characters without space; in scripts without spaces, it is a token.

    Args:
        text (`str`): the document.
        offsets (`list[tuple[int, int]]`): characters of each token, ascending, as a fast tokenizer gives them.
        special (`list[int]`): 1 for special tokens.
    """
    runs = [match.span() for match in re.finditer(r"\S+", text)]
    spans: list[tuple[int, int]] = []
    owners: list[int] = []
    run, last = 0, -1
    for (start, end), is_special in zip(offsets, special):
        while run < len(runs) and runs[run][1] <= start:
            run += 1
        if is_special or end <= start or run == len(runs) or runs[run][0] >= end:
            owners.append(-1)
            continue
        begin, stop = runs[run]
        if WITHOUT_SPACES.search(text, begin, stop):
            if not spans or spans[-1] != (start, end):  # bytes of one character have the same offsets
                spans.append((start, end))
        elif run != last:
            spans.append(_without_punctuation(text, begin, stop))
        last = run
        owners.append(len(spans) - 1)
    return spans, owners


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
    owners: list[int],
    labels: list[int],
    num_groups: int,
    pad_token_id: int,
) -> WindowParts:
    """
    Parts of the logits of some labels for one window.

    The lexical part is exact. For the encoder's part, each group of neighboring words is left out of a copy of the window (occlusion:
    Zeiler & Fergus, 2014; Li et al., 2016). Words are left out rather than replaced by a mask token, which encoders of documents
    have not seen in fine-tuning: there, masking any word moves logits, whatever it says. Groups are single words if there are
    `num_groups` copies for all of them. Words of a larger group share its effect by the inverse document frequencies of their
    tokens, or by their numbers of tokens without lexical scores.

    Args:
        model: returns `logits`; anything else of it, such as lexical scores, may be missing.
        inputs (`dict[str, torch.Tensor]`): `input_ids`, `attention_mask`, ... of shape `(1, T)`, without padding.
        owners (`list[int]`): the word of each token, see [`words_of_tokens`].
        labels (`list[int]`): n labels.
        num_groups (`int`): copies to make, beside the one without words.
        pad_token_id (`int`): of the tokenizer.
    """
    ids = inputs["input_ids"][0]
    of_token = torch.tensor(owners, device=ids.device)
    num_words = max(owners, default=-1) + 1
    lexical = getattr(model, "lexical", None)
    scale = model.config.logit_calibration[0] if lexical is not None else 1.0

    # Words that the encoder does not read have no effect on it.
    limit = model.config.encoder_max_length or len(owners)
    num_read = max(owners[:limit], default=-1) + 1
    num_groups = min(num_groups, num_read)
    group_of_word = torch.arange(num_read, device=ids.device) * num_groups // max(num_read, 1)
    group_of_word = torch.cat([group_of_word, group_of_word.new_full((num_words - num_read + 1,), -1)])  # -1: no word
    group_of_token = group_of_word[of_token]
    copies = torch.arange(num_groups, device=ids.device).unsqueeze(1) == group_of_token
    everything, nothing = (of_token >= 0).unsqueeze(0), torch.zeros_like(of_token, dtype=torch.bool).unsqueeze(0)

    def read(left_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the labels, and the lexical part of them, of copies without some tokens, (K, T) to (K, n) each."""
        logits, of_lexical = [], []
        for rows in left_out.split(max(TOKENS_PER_BATCH // len(ids), 1)):
            batch = _without(inputs, rows, pad_token_id)
            logits.append(model(**batch, return_label_embeds=False).logits.float()[:, labels])
            if lexical is not None:
                scores = lexical(batch["input_ids"], batch["attention_mask"])
                of_lexical.append(scale * scores[:, labels])
        found = torch.cat(logits)
        return found, torch.cat(of_lexical) if of_lexical else torch.zeros_like(found)

    (full, bias), (full_lexical, bias_lexical) = read(torch.cat([nothing, everything]))
    encoder = full.new_zeros(num_words, len(labels))
    if num_groups:
        # Differences between copies in bfloat16, where the processor has it: a rounding of all alike, at a third of the time.
        with _bfloat16(model, len(ids)):
            logits, of_lexical = read(torch.cat([nothing, copies]))
        of_encoder = logits - of_lexical
        effects = of_encoder[0] - of_encoder[1:]
        # Rare words say more than frequent ones; without lexical scores nothing is known of frequencies.
        of_tokens = torch.ones(len(ids), device=ids.device) if lexical is None else 0.1 + lexical.idf[ids].float()
        read_by = (of_token >= 0) & (torch.arange(len(ids), device=ids.device) < limit)
        sizes = torch.zeros(num_words, device=ids.device).index_add(0, of_token[read_by], of_tokens[read_by])[
            :num_read
        ]
        groups = group_of_word[:num_read]
        group_sizes = torch.zeros(num_groups, device=ids.device).index_add(0, groups, sizes)
        encoder[:num_read] = effects[groups] * (sizes / group_sizes[groups]).unsqueeze(1)
    words = full.new_zeros(num_words, len(labels))
    if lexical is not None:
        contributions = scale * lexical.contributions(ids, labels).t().to(words)
        words.index_add_(0, of_token[of_token >= 0], contributions[of_token >= 0])
    remainder = (full - full_lexical) - (bias - bias_lexical) - encoder.sum(dim=0)
    per_group = -(-num_read // num_groups) if num_groups else 0
    # The lexical part of special tokens, which is 0 in fitted models, belongs to the bias.
    bias = full - words.sum(dim=0) - encoder.sum(dim=0) - remainder
    return WindowParts(full, bias, words, encoder, remainder, per_group)


def _without(inputs: dict[str, torch.Tensor], left_out: torch.Tensor, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Copies (K, T') of a window (1, T) without the tokens `left_out` (K, T), padded on the right."""
    order = left_out.long().argsort(dim=1, stable=True)
    left = (~left_out).gather(1, order)
    left[:, 0] = True  # encoders need a token to attend to
    copies = {name: value.expand(len(order), -1).gather(1, order) for name, value in inputs.items()}
    copies["input_ids"] = copies["input_ids"].masked_fill(left_out.gather(1, order), pad_token_id)
    copies["attention_mask"] = left.to(copies["attention_mask"].dtype)
    longest = int(left.sum(dim=1).max())
    return {name: value[:, :longest] for name, value in copies.items()}


def _bfloat16(model: Any, length: int) -> AbstractContextManager:
    """Autocast to bfloat16 for a float32 model of PyTorch on a processor that has the instructions."""
    is_float32 = isinstance(model, torch.nn.Module) and model.device.type == "cpu" and model.dtype == torch.float32
    # Of a table of static embeddings there is nothing to speed up.
    has_layers = getattr(model.config.backbone_config, "num_hidden_layers", None)
    if length < BFLOAT16_FROM or not is_float32 or not has_layers:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16) if cpu_computes_bfloat16() else nullcontext()
