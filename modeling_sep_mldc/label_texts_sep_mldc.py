"""Token ids of label texts, and batches of them."""

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase


def label_text(label: str, label_parents: Mapping[str, Sequence[str]], descriptions: Mapping[str, str]) -> str:
    """
    The text of a label: `"{label}: {description}"`, or the bare name if it has no description (Eq. 1-2). The name is
    preceded by the names of its ancestors, `"{grandparent} > {parent} > {label}"`; if there are several parents, by the first one.
    """
    path = [label]
    while above := label_parents.get(path[0]):
        path.insert(0, above[0])
    name, description = " > ".join(path), descriptions.get(label)
    return f"{name}: {description}" if description else name


def tokenize_label_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int = 64
) -> dict[str, list[list[int]]]:
    """Token ids of label texts, truncated to `max_length` tokens and not padded, with the information needed for padding."""
    max_length = min(max_length, tokenizer.model_max_length)
    input_ids = tokenizer(texts, truncation=True, max_length=max_length, padding=False)["input_ids"]
    return {"input_ids": input_ids, "pad_token_id": tokenizer.pad_token_id or 0, "max_length": max_length}


def pad_label_inputs(label_inputs: dict, indices: list[int], device: torch.device | str = "cpu") -> dict:
    """`{"input_ids", "attention_mask"}` (n, T) of the label texts `indices`, padded to the longest of them."""
    rows = [label_inputs["input_ids"][index] for index in indices]
    # Multiples of eight, within the encoder's limit, suit tensor cores and keep the number of compiled graphs small.
    longest = max(len(row) for row in rows)
    length = min(8 * math.ceil(longest / 8), max(longest, label_inputs.get("max_length", 8 * longest)))
    input_ids = torch.full((len(rows), length), label_inputs["pad_token_id"])
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for position, row in enumerate(rows):
        input_ids[position, : len(row)] = torch.tensor(row)
        attention_mask[position, : len(row)] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
