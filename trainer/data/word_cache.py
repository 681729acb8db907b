"""Token ids of many texts by looking up their words: several times as fast as the tokenizer where its words are independent."""

import json
import re
from collections.abc import Sequence
from typing import Any


# `str.split` splits at these control characters, BERT's normalizer removes them.
_ODD_SPACES = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
# Words that are remembered; Python keeps about 200 bytes for each.
MAX_WORDS = 1_000_000


class WordCache:
    """
    Token ids of texts, the same as the tokenizer's, which is asked only for words that were not seen before.

    That is right for tokenizers that split a text at white space first (BERT's, and so those of MiniLM, MPNet and ELECTRA). With
    any other tokenizer, every text goes to the tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer.
        max_words (`int`, defaults to 1,000,000): words that are remembered. When there are more, all are forgotten.

    Example:

    ```python
    words = WordCache(tokenizer)
    words(["We rank documents.", "We rank pages."], max_length=256)  # as tokenizer(...)["input_ids"]
    ```
    """

    def __init__(self, tokenizer: Any, max_words: int = MAX_WORDS):
        self.tokenizer, self.max_words = tokenizer, max_words
        self.is_exact = _splits_at_spaces(tokenizer)
        self._ids: dict[str, list[int]] = {}
        self.before, self.after = special_tokens_around(tokenizer)

    def __call__(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of texts, cut after `max_length` tokens, special tokens included."""
        if not self.is_exact:
            return self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        if len(self._ids) > self.max_words:
            self._ids.clear()
        split = [text.split() for text in texts]
        new = list({word for words in split for word in words if word not in self._ids})
        if new:
            encoded = self.tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
            self._ids.update(zip(new, encoded))
        ids, room = self._ids, max_length - len(self.before) - len(self.after)
        rows = []
        for text, words in zip(texts, split):
            if _ODD_SPACES.search(text):
                rows.append(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
                continue
            row: list[int] = []
            for word in words[:room]:  # each word has a token at least, or none
                row += ids[word]
            if len(row) < room and len(words) > room:
                row = [index for word in words for index in ids[word]]
            rows.append([*self.before, *row[:room], *self.after])
        return rows


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the special tokens before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return [], []
    return ids[: special.index(0)], ids[len(special) - special[::-1].index(0) :]


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer treats the words of a text, split at white space, one by one, and cuts texts at the right."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.truncation_side != "right":
        return False
    parts = json.loads(backend.to_str())
    kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    added = (token["content"] for token in parts.get("added_tokens", ()))
    plain = not any(token != token.strip() or len(token.split()) != 1 for token in added)
    return kinds[0] in (None, "BertNormalizer") and kinds[1:] == ["BertPreTokenizer", "WordPiece"] and plain
