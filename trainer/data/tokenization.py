"""Texts to tokens."""

import logging
from collections.abc import Mapping, Sized
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

from .messages import join_names, shorten


logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
NO_DOCUMENTS = "{} has 0 documents, but at least one is needed. Pass a dataset that is not empty."


def _tokenize_batch(batch: dict[str, list], tokenizer: Any, max_length: int, text_column: str) -> dict[str, list]:
    for text in batch[text_column]:
        if not isinstance(text, str):
            raise ValueError(
                f"A document has {shorten(text)} as its `{text_column}`, but that must be a text. Fill it in, or remove the document."
            )
    encoded = tokenizer(list(batch[text_column]), truncation=True, max_length=max_length, verbose=False)
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


def check_is_dataset(dataset: Any) -> None:
    """
    Raises:
        ValueError: it is not a dataset of `datasets`, but a list, for example.
    """
    if not hasattr(dataset, "map"):
        raise ValueError(
            f"The documents are a {type(dataset).__name__}, but a dataset is needed. Create it with `datasets.Dataset.from_list` or "
            "`Dataset.from_dict`."
        )


def _check_text_column(dataset: Any, text_column: str) -> None:
    check_is_dataset(dataset)
    columns = dataset.column_names  # unknown for some streams; by split for a `DatasetDict`
    if isinstance(columns, list) and text_column not in columns:
        raise ValueError(
            f"The dataset has the columns {join_names(columns, 10)}, but no `{text_column}`. Name the column of the texts with "
            "`text_column`."
        )


def check_documents(dataset: Any, name: str, tokenized: bool = True) -> None:
    """
    Check that a dataset has documents and that these are tokenized, as far as its length and its columns are known. Each of a dictionary
    of datasets is checked; `None` is not.

    Args:
        dataset (`Dataset` or `dict`): a dataset of any kind.
        name (`str`): what it is called in a message.
        tokenized (`bool`, defaults to `True`): whether the documents must have `input_ids`.

    Raises:
        ValueError: there are no documents, or they have no `input_ids`.
    """
    if isinstance(dataset, Mapping):
        for key, one in dataset.items():
            check_documents(one, f"{name} {key!r}", tokenized)
        return
    if isinstance(dataset, Sized) and _has_no_items(dataset):
        raise ValueError(NO_DOCUMENTS.format(name))
    columns = getattr(dataset, "column_names", None)
    if tokenized and columns and "input_ids" not in columns:
        raise ValueError(not_tokenized(f"{name} has the columns {join_names(columns, 10)}"))


def not_tokenized(found: str) -> str:
    """The message on documents without `input_ids`, which begins with what was found instead."""
    return (
        f"{found}, but no `input_ids`: the documents are not tokenized. Call `tokenize(dataset, tokenizer)` first "
        "(`from trainer import tokenize`)."
    )


def _has_no_items(dataset: Sized) -> bool:
    try:
        return len(dataset) == 0
    except (TypeError, NotImplementedError):  # a stream that inherits `__len__`
        return False


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
        ValueError: `max_length` leaves no room for a token of the text, there is no such column, or a document is not a text.
    """
    check_max_length(max_length, tokenizer)
    _check_text_column(dataset, text_column)
    if max_length is not None and max_length > tokenizer.model_max_length:
        logger.warning(
            f"`max_length` is {max_length}, but the model reads at most {tokenizer.model_max_length} tokens. Documents are truncated "
            "to this length."
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
