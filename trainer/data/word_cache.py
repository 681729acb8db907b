"""Cached tokenization word by word, several times as fast as the tokenizer, for tokenizers that treat words independently."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


# `str.split` splits at these control characters, BERT's normalizer removes them.
_ODD_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
# Maximum number of cached words; Python needs about 150 bytes for each.
MAX_WORDS = 1_000_000


class WordCache:
    """
    Token ids of texts, the same as the tokenizer's. The tokenizer is called only for words that were not seen before.

    Caching is used for tokenizers that first split a text at whitespace (BERT's, and thus those of MiniLM, MPNet and ELECTRA). With any
    other tokenizer, every text is tokenized as a whole.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer.
        max_words (`int`, defaults to 1,000,000): maximum number of cached words. When it is exceeded, the cache is cleared.

    Example:

    ```python
    words = WordCache(tokenizer)
    words(["We rank documents.", "We rank pages."], max_length=256)  # as tokenizer(...)["input_ids"]
    ```
    """

    def __init__(self, tokenizer: Any, max_words: int = MAX_WORDS):
        self.tokenizer, self.max_words = tokenizer, max_words
        self.is_exact = _splits_at_spaces(tokenizer)
        # Ids as bytes of int32, because Python can join bytes without processing each id.
        self._ids: dict[str, bytes] = {}
        self.before, self.after = special_tokens_around(tokenizer)

    def __call__(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of texts, truncated to `max_length` tokens, special tokens included."""
        return [np.frombuffer(ids, np.int32).tolist() for ids in self.packed(texts, max_length)]

    def packed(self, texts: Sequence[str], max_length: int) -> list[bytes]:
        """The same ids as int32, in bytes."""
        if not self.is_exact:
            return list(map(_pack, self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]))
        if len(self._ids) > self.max_words:
            self._ids.clear()
        split = [text.split() for text in texts]
        new = list(set().union(*split).difference(self._ids))
        if new:
            encoded = self.tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
            self._ids.update(zip(new, map(_pack, encoded)))
        of_word, room = self._ids.__getitem__, max_length - len(self.before) - len(self.after)
        before, after, size = _pack(self.before), _pack(self.after), room * np.dtype(np.int32).itemsize
        rows = []
        for text, words in zip(texts, split):
            if any(character in text for character in _ODD_SPACES):
                rows.append(_pack(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"]))
                continue
            row = b"".join(map(of_word, words[:room]))  # each word has a token at least, or none
            if len(row) < size and len(words) > room:
                row = b"".join(map(of_word, words))
            rows.append(before + row[:size] + after)
        return rows


def _pack(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the special tokens before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return [], []
    return ids[: special.index(0)], ids[len(special) - special[::-1].index(0) :]


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer treats whitespace-separated words independently and truncates texts on the right."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.truncation_side != "right":
        return False
    parts = json.loads(backend.to_str())
    kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    added = (token["content"] for token in parts.get("added_tokens", ()))
    plain = not any(token != token.strip() or len(token.split()) != 1 for token in added)
    return kinds[0] in (None, "BertNormalizer") and kinds[1:] == ["BertPreTokenizer", "WordPiece"] and plain
