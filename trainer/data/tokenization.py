"""Texts to tokens."""

import logging
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset


logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset


def _tokenize_batch(batch: dict[str, list], tokenizer: Any, max_length: int, text_column: str) -> dict[str, list]:
    encoded = tokenizer(batch[text_column], truncation=True, max_length=max_length, verbose=False)
    return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}


def check_max_length(max_length: int | None, tokenizer: Any, name: str = "max_length") -> None:
    """
    Check that `max_length` leaves room for at least one token of the text besides the special tokens of the tokenizer.

    Raises:
        ValueError: it does not. The message uses `name` as the name of the setting.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length is not None and max_length <= special:
        raise ValueError(
            f"`{name}` is {max_length}, but a document has {special} special tokens and needs at least one of its text. Use at least "
            f"{special + 1}, or leave it out."
        )


def tokenize(
    dataset: AnyDataset,
    tokenizer: Any,
    max_length: int | None = None,
    num_proc: int | None = None,
    text_column: str = "text",
    batch_size: int = 1000,
) -> AnyDataset:
    """
    Replaces the text by its token ids, truncated but not padded, and adds a column "length" (in tokens) for grouping by length.

    The result is cached: the same documents, tokenizer and length are not tokenized again, in this process or another.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the backbone.
        max_length (`int`, *optional*): Maximum number of tokens per document, special tokens included; by default, and at
            most, the tokenizer's `model_max_length`.
        num_proc (`int`, *optional*): Processes; not used when streaming.

    Raises:
        ValueError: `max_length` leaves no room for a token of the text.
    """
    check_max_length(max_length, tokenizer)
    if max_length is not None and max_length > tokenizer.model_max_length:
        logger.warning(
            f"`max_length` is {max_length}, but the model reads {tokenizer.model_max_length} tokens: documents are cut "
            "there."
        )
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    keywords = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Tokenizing"}
    return dataset.map(
        _tokenize_batch,
        batched=True,
        batch_size=batch_size,
        fn_kwargs={"tokenizer": tokenizer, "max_length": limit, "text_column": text_column},
        remove_columns=[text_column],
        **keywords,
    )
