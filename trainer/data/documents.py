"""Documents, labels and counts from a file, in one call."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset

from .encoding import build_label_list, count_unknown_labels, encode_labels, label_counts
from .loading import load_splits


class LabeledDocuments(NamedTuple):
    """
    Labeled documents, ready for [`tokenize`].

    Args:
        dataset (`Dataset`): "id" (if there are ids), "text" and "label_indices", the sorted label ids of each document.
        labels (`list[str]` of length `L`): label names; a label id is a position in this list.
        label_counts (`list[int]` of length `L`): documents per label.
    """

    dataset: Dataset
    labels: list[str]
    label_counts: list[int]


def load_documents(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    text_columns: str | Sequence[str] = ("text",),
    label_column: str | Sequence[str] = "labels",
    label_delimiter: str | None = None,
    labels: Sequence[str] | None = None,
    label_list_file: str | os.PathLike | None = None,
    id_column: str | None = None,
    data_format: str = "auto",
    text_separator: str = " ",
    on_bad_rows: str = "error",
    bad_rows_file: str | os.PathLike | None = None,
    cache_dir: str | None = None,
) -> LabeledDocuments:
    """
    Documents of a file, their labels as ids, the label names and the number of documents per label.

    Args:
        files (`str` or list of `str`): see `train_file` of [`load_splits`].
        labels (`Sequence[str]`, *optional*): the labels of a model or of the training documents, in their order; pass them for validation
            and test documents. Other labels are left out with a warning. By default, the sorted labels of `files`.
        label_list_file (`str`, *optional*): a file with the labels, instead of `labels`.

    The other arguments are those of [`load_splits`].

    Raises:
        DataFileError: if a file or a row is bad, with file, line, rule and remedy. It is a `ValueError`.

    Example:

    ```python
    train = load_documents("train.csv", text_columns=["title", "body"], label_column="tags", label_delimiter=";")
    test = load_documents("test.csv", ["title", "body"], "tags", ";", labels=train.labels)
    model = SepMldcForMultiLabelClassification.from_backbone(
        "roberta-base", tokenizer, labels=train.labels, label_counts=train.label_counts
    )
    trainer = SepMldcTrainer(model, args, train_dataset=tokenize(train.dataset, tokenizer), processing_class=tokenizer)
    ```
    """
    if labels is not None and label_list_file is not None:
        raise ValueError("`labels` and `label_list_file` are both given, but one decides. Leave out the other.")
    dataset = load_splits(
        train_file=files,
        text_columns=text_columns,
        label_column=label_column,
        id_column=id_column,
        label_delimiter=label_delimiter,
        data_format=data_format,
        text_separator=text_separator,
        cache_dir=cache_dir,
        on_bad_rows=on_bad_rows,
        bad_rows_file=bad_rows_file,
    )["train"]
    if labels is None:
        labels = build_label_list(dataset, label_list_file)
    else:
        count_unknown_labels(dataset, labels, str(files))
    encoded = encode_labels(dataset, {name: i for i, name in enumerate(labels)})
    return LabeledDocuments(encoded, list(labels), label_counts(encoded, len(labels)).tolist())
