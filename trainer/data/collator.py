"""Batches of tokenised documents with multi-hot labels."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass
class SepMldcDataCollator:
    """
    Pads token ids and makes `labels` a multi-hot matrix (B, L). The only place where labels become dense.

    A feature carries `labels` (already multi-hot) or `label_indices` (the ids of its labels, possibly none).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): pads.
        num_labels (`int`, *optional*): L; needed for `label_indices`.
        pad_to_multiple_of (`int`, *optional*): pads lengths up to a multiple of this.
        label_dtype (`torch.dtype`, defaults to `torch.float32`): of the `labels` made from `label_indices`. Float is what the losses
            of transformers need; this project's take any, and `SepMldcTrainer` uses `torch.uint8`, a quarter of the size.

    Raises:
        ValueError: `label_indices` without `num_labels`, or an id outside 0 .. L - 1.
    """

    tokenizer: PreTrainedTokenizerBase
    num_labels: int | None = None
    pad_to_multiple_of: int | None = None
    label_dtype: torch.dtype = torch.float32

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = set(self.tokenizer.model_input_names)
        batch = dict(
            self.tokenizer.pad(
                [{name: value for name, value in feature.items() if name in names} for feature in features],
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors="pt",
            )
        )
        if "label_indices" in features[0]:
            batch["labels"] = self.multi_hot([feature["label_indices"] for feature in features])
        elif "labels" in features[0]:
            batch["labels"] = torch.stack(
                [torch.as_tensor(feature["labels"], dtype=torch.float32) for feature in features]
            )
        return batch

    def multi_hot(self, label_indices: list[list[int]]) -> torch.Tensor:
        """Multi-hot (B, L) of lists of label ids."""
        if self.num_labels is None:
            raise ValueError(
                "The documents carry `label_indices`, but the collator does not know how many labels there are. Create it with "
                "`SepMldcDataCollator(tokenizer, num_labels=...)`."
            )
        rows = [row for row, indices in enumerate(label_indices) for _ in indices]
        columns = [int(index) for indices in label_indices for index in indices]
        if columns and not (0 <= min(columns) and max(columns) < self.num_labels):
            wrong = min(columns) if min(columns) < 0 else max(columns)
            raise ValueError(
                f"`label_indices` holds {wrong}, but the labels are 0 to {self.num_labels - 1}. Encode the documents with the "
                "model's own label list."
            )
        labels = torch.zeros(len(label_indices), self.num_labels, dtype=self.label_dtype)
        labels[torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)] = 1
        return labels
