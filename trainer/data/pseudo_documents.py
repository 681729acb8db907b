"""Pseudo-documents: documents written by a language model for tail labels, or for all labels."""

import difflib
import os
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from .bad_rows import BadRows
from .columns import Columns
from .label_names import normalize_label
from .loading import AnyDataset, load_files
from .readers import expand_files, read_records
from .text_lines import DataFileError


def load_pseudo_documents(path: str | os.PathLike, labels: Sequence[str], cache_dir: str | None = None) -> Dataset:
    """
    Reads documents that a language model wrote for tail labels (Eq. 3-4), with the columns "text" and "labels".

    Returns:
        A dataset with the columns "text", "labels" and "is_pseudo" (always `True`).

    Raises:
        DataFileError: if a document is bad or has a label that is not in `labels`.
    """
    (path,) = expand_files(path)
    columns = Columns()
    _check_pseudo_documents(path, columns, labels)
    dataset = load_files(path, "train", columns, "auto", cache_dir, False, BadRows(split="pseudo-documents"))
    return _add_constant(dataset.select_columns(["text", "labels"]), "is_pseudo", True)


def _check_pseudo_documents(path: str, columns: Columns, labels: Sequence[str]) -> None:
    known = {normalize_label(label) for label in labels}
    for where, record in read_records(path):
        names = columns.check(list(record), where).normalize(record, where)["labels"]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            close = difflib.get_close_matches(unknown, labels, n=1, cutoff=0.0)
            hint = f" The closest is {close[0]!r}." if close else ""
            raise DataFileError(
                f"{where}: there is no label {unknown!r}.{hint} Pseudo-documents have labels of the training documents or, without "
                "these, of the label texts: correct the name or remove the pseudo-document."
            )


def _add_constant(dataset: AnyDataset, name: str, value: bool) -> AnyDataset:
    if isinstance(dataset, Dataset):
        return dataset.add_column(name, np.full(len(dataset), value))
    features = Features({**dataset.features, name: Value("bool")}) if dataset.features else None
    return dataset.map(lambda row: {name: value}, features=features)


def add_pseudo_documents(train: AnyDataset, pseudo_documents: Dataset) -> AnyDataset:
    """
    Training set = real + pseudo (Eq. 20): marks the documents of `train` with "is_pseudo" `False` and appends the
    pseudo-documents.

    Where documents have ids, pseudo-documents get "pseudo-0", "pseudo-1", ... A streamed `train` yields them at its end:
    shuffle it.
    """
    if "id" in train.column_names:
        pseudo_documents = pseudo_documents.add_column("id", [f"pseudo-{i}" for i in range(len(pseudo_documents))])
    real = _add_constant(train, "is_pseudo", False)
    if isinstance(real, IterableDataset):
        pseudo_documents = pseudo_documents.select_columns(real.column_names).to_iterable_dataset()
    return concatenate_datasets([real, pseudo_documents])
