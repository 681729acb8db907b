"""
Documents, labels and label descriptions from files.

`trainer.data` reads them, as it does for training; here its errors become `AugmentationError`, and its records documents.
"""

import graphlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import label_files, parent_files, readers
from trainer.data.label_names import check_label, split_labels
from trainer.data.messages import shorten
from trainer.data.text_lines import DataFileError, bare_name

from .errors import AugmentationError
from .texts import clean


__all__ = [
    "AugmentationError",
    "Document",
    "label_name",
    "read_documents",
    "read_described_labels",
    "read_label_descriptions",
    "read_label_parents",
    "read_labels",
    "read_rows",
]


@dataclass(frozen=True)
class Document:
    """
    One labeled document.

    Args:
        id (`str`): The document's `id` column, or `"{file name}:{line number}"` if there is none.
        text (`str`): The text; a `title` column is not part of it.
        labels (`tuple[str, ...]`): Label names, in the file's order, without repetition.
        has_own_id (`bool`): Whether `id` comes from the file.
    """

    id: str
    text: str
    labels: tuple[str, ...]
    has_own_id: bool = True


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except DataFileError as error:
        raise AugmentationError(str(error)) from None


def label_name(value: Any, where: str) -> str:
    """
    Normalizes a label name as in training: stripped, in Unicode normalization form NFC.

    Raises:
        AugmentationError: if the value is not a valid name.
    """
    with _reading():
        name = check_label(value, where)
    if len(name) > label_files.MAX_LABEL_LENGTH:
        raise AugmentationError(
            f"{where}: the label {shorten(name)} has {len(name)} characters, but a label name has at most "
            f"{label_files.MAX_LABEL_LENGTH}; give names, not documents."
        )
    return name


def read_rows(path: str | Path, data_format: str = "jsonl") -> Iterator[tuple[str, dict[str, Any]]]:
    """
    The rows of a file, each with its location for messages.

    Raises:
        AugmentationError: if the file cannot be read or a line is malformed.
    """
    with _reading():
        yield from readers.read_records(path, data_format)


def _format_of(path: str | Path) -> str:
    """From the file extension; JSON Lines if it is unknown, as for a pipe."""
    known = Path(bare_name(os.fspath(path))).suffix.lower() in readers.EXTENSIONS
    return "auto" if known else "jsonl"


def read_documents(
    paths: str | Path | Iterable[str | Path], need_labels: bool = True, label_delimiter: str | None = None
) -> list[Document]:
    """
    Documents of one or more files, `{"text": str, "labels": [str], "id"?: str}`.

    Args:
        paths: File or files in a form that training reads, plain or compressed.
        need_labels (`bool`): False also takes documents without a `labels` column, and lines that hold only an `id`
            (the files of `--exclude`).
        label_delimiter (`str`, *optional*): Separator of joined labels.

    Raises:
        AugmentationError: if a line has no text or if `labels` is not a list of label names.
    """
    documents = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for where, row in read_rows(path, _format_of(path)):
            text, labels, own_id = row.get("text"), row.get("labels"), row.get("id")
            if not isinstance(text, str) and (need_labels or own_id is None):
                raise AugmentationError(
                    f'{where}: `text` is {shorten(text)}, but a string is needed; name the column of the document "text".'
                )
            names: list[str] = []
            if need_labels or labels:
                with _reading():
                    names = split_labels(labels, where, "labels", label_delimiter)
            documents.append(
                Document(
                    id=str(own_id) if own_id is not None else f"{Path(path).name}:{where.rpartition(' ')[2]}",
                    text=clean(text) if isinstance(text, str) else "",
                    labels=tuple(names),
                    has_own_id=own_id is not None,
                )
            )
    return documents


def read_labels(path: str | Path, label_delimiter: str | None = None) -> dict[str, str]:
    """
    Label names, each with the note of the dataset ("" if there is none); see `trainer.data.label_files.read_labels`.

    Args:
        path: File of labels, or a training file with a column `labels`.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training file.

    Raises:
        AugmentationError: if the file is in a different format, or contains no label. Other columns are never interpreted as labels.
    """
    with _reading():
        return label_files.read_labels(path, label_delimiter)


def read_label_descriptions(path: str | Path) -> dict[str, str]:
    """
    `{label: description}` from a file of rows `{"label", "description"}`, as `describe-labels` writes it.

    Raises:
        AugmentationError: if a row is malformed or a label occurs twice.
    """
    with _reading():
        return label_files.read_label_descriptions(path)


def read_described_labels(path: str | Path) -> dict[str, str]:
    """As `read_label_descriptions`, with the labels whose description is empty (csv, tsv, parquet)."""
    with _reading():
        return label_files.read_described_labels(path)


def read_label_parents(path: str | Path, labels: Collection[str] = ()) -> dict[str, list[str]]:
    """
    `{label: [parents]}` from a file in a form that training reads: csv of `child` and `parent`, json, or SKOS.

    Args:
        path: The file.
        labels: Label names, which determine how SKOS concepts are named.

    Raises:
        AugmentationError: if the file is in a different format, names no parent, or has a cycle.
    """
    parents: dict[str, list[str]] = {}
    try:
        with _reading():
            for child, parent in parent_files.parent_pairs(path, labels):
                parents.setdefault(child, []).append(parent)
    except ImportError as error:  # SKOS without rdflib
        raise AugmentationError(str(error)) from None
    if not parents:
        raise AugmentationError(f"{path}: names no parent of any label; write rows with `child` and `parent`.")
    try:
        graphlib.TopologicalSorter(parents).prepare()
    except graphlib.CycleError as error:
        circle = " > ".join(repr(name) for name in reversed(error.args[1]))
        raise AugmentationError(f"{path}: has a cycle: {circle}; remove one of these parents.") from None
    return parents
