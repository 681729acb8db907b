"""Batches of tokenized documents with multi-hot labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, default_data_collator

from .messages import join_names
from .tokenization import not_tokenized


@dataclass
class SepMldcDataCollator:
    """
    Pads token ids and converts labels to a multi-hot matrix `labels` (B, L). This is the only place where labels become dense.

    Each document has `label_indices` (the ids of its labels, possibly none) or `labels` (multi-hot already), or neither.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): pads.
        num_labels (`int`, *optional*): L; needed for `label_indices`.
        pad_to_multiple_of (`int`, *optional*): pad lengths up to a multiple of this.
        label_dtype (`torch.dtype`, defaults to `torch.float32`): dtype of the `labels` made from `label_indices`. The losses of
            transformers need float; those of this project accept any dtype, and `SepMldcTrainer` uses `torch.uint8`, a quarter of
            the size.

    Raises:
        ValueError: documents that are not tokenized, `label_indices` without `num_labels`, label names instead of ids, an id outside
            0 .. L - 1, or `labels` that are not multi-hot.
    """

    tokenizer: PreTrainedTokenizerBase
    num_labels: int | None = None
    pad_to_multiple_of: int | None = None
    label_dtype: torch.dtype = torch.float32

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = set(self.tokenizer.model_input_names)
        for feature in features:
            check_input_ids(feature)
        batch = dict(
            self.tokenizer.pad(
                [{name: value for name, value in feature.items() if name in names} for feature in features],
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors="pt",
            )
        )
        if any("label_indices" in feature for feature in features):
            batch["labels"] = self.multi_hot([feature.get("label_indices") for feature in features])
        elif any("labels" in feature for feature in features):
            width = self.num_labels
            rows = []
            for feature in features:
                rows.append(torch.as_tensor(check_multi_hot(feature.get("labels"), width), dtype=torch.float32))
                width = len(rows[0])
            batch["labels"] = torch.stack(rows)
        return batch

    def multi_hot(self, label_indices: Sequence[Any]) -> torch.Tensor:
        """Multi-hot (B, L) of lists of label ids."""
        if self.num_labels is None:
            raise ValueError(
                "The documents have `label_indices`, but the collator does not know the number of labels. Create it with "
                "`SepMldcDataCollator(tokenizer, num_labels=...)`."
            )
        rows, columns = [], []
        for row, indices in enumerate(label_indices):
            ids = check_label_indices(indices, self.num_labels)
            rows += [row] * len(ids)
            columns += ids
        labels = torch.zeros(len(label_indices), self.num_labels, dtype=self.label_dtype)
        labels[torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)] = 1
        return labels


def check_input_ids(document: Any) -> Any:
    """
    The token ids of a document.

    Raises:
        ValueError: it has none.
    """
    if "input_ids" not in document:
        raise ValueError(not_tokenized(f"A document has {join_names(document, 10) or 'no columns'}"))
    return document["input_ids"]


def collate_without_tokenizer(features: list[Any]) -> dict[str, Any]:
    """
    As `default_data_collator` of transformers, for documents that are padded already and have multi-hot `labels`.

    Raises:
        ValueError: documents of different lengths, or with `label_indices`.
    """
    features = [feature if isinstance(feature, Mapping) else vars(feature) for feature in features]
    lengths = {len(check_input_ids(feature)) for feature in features}
    if len(lengths) > 1:
        found = f"have {min(lengths)} to {max(lengths)} tokens and must be padded"
    elif any("label_indices" in feature for feature in features):
        found = "have `label_indices`, which must be converted to multi-hot rows"
    else:
        batch: dict[str, Any] = default_data_collator(features)
        return batch
    raise ValueError(
        f"The documents of a batch {found}, but the trainer has no tokenizer. Pass `processing_class=tokenizer` to the trainer, or a "
        "`data_collator` of your own."
    )


def check_label_indices(value: Any, num_labels: int) -> list[int]:
    """
    The ids of a document's labels as a list of ints.

    Raises:
        ValueError: they are not a list of integers from 0 to `num_labels` - 1.
    """
    ids = _as_list(value)
    if ids is None or not all(_is_integer(index) for index in ids):
        raise ValueError(
            f"`label_indices` is {_shown(value)}, but a list of label ids is needed. Convert label names to ids with "
            "`trainer.encode_labels`; a document without labels has an empty list."
        )
    wrong = next((index for index in ids if not 0 <= index < num_labels), None)
    if wrong is not None:
        raise ValueError(
            f"`label_indices` contains {wrong}, but the labels are 0 to {num_labels - 1}. Encode the documents with the "
            "model's own label list."
        )
    return [int(index) for index in ids]


def check_multi_hot(value: Any, num_labels: int | None = None) -> np.ndarray:
    """
    A document's multi-hot labels as an array of shape `(num_labels,)`.

    Raises:
        ValueError: they are not a list of `num_labels` zeros and ones.
    """
    try:
        row = np.asarray(value, dtype=None if hasattr(value, "__array__") else np.float32)
    except (TypeError, ValueError):
        row = np.empty(0)
    right = row.ndim == 1 and len(row) == (len(row) if num_labels is None else num_labels) and row.dtype.kind in "biuf"
    if not right or not len(row) or not ((row >= 0) & (row <= 1)).all():
        length = "one number per label" if num_labels is None else f"{num_labels} numbers"
        raise ValueError(
            f"`labels` is {_shown(value)}, but a multi-hot row is needed: {length}, "
            "1 for the labels of the document and 0 for all others. Put label ids into a column `label_indices` instead; "
            "`trainer.encode_labels` makes it from label names."
        )
    return row


def _as_list(value: Any) -> list | None:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    return list(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
