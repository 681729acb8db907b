"""Files of labels and of label descriptions, read alike for training and augmentation. Imports no torch."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from .label_names import check_label, split_labels
from .messages import join_names, shorten
from .readers import find_format, parse_json, read_records
from .text_lines import DataFileError, bare_name, display_name, read_lines


MAX_LABEL_LENGTH = 300  # characters; a longer "label" is probably a document
LABEL_FILE_EXTENSIONS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
Labels = Iterator[tuple[str, str, str]]  # where, name, note


def read_labels(path: str | os.PathLike, label_delimiter: str | None = None) -> dict[str, str]:
    """
    Label names, each with the note of the dataset ("" if there is none).

    Args:
        path (`str`): one of (each also as `.gz` or `.zst`)
            - `.txt`: one label per line;
            - `.csv`, `.tsv`, `.jsonl`, `.parquet`: rows with `label`, optionally `description`; or a training file, whose rows
              have `labels`;
            - `.json`: `["a", "b"]`, `{"a": "note"}` or `{"a": {"name": ..., "description": ...}}`, or an array of such rows.

            The labels of a training file are sorted.
        label_delimiter (`str`, *optional*): separator of joined labels in a training file.

    Raises:
        DataFileError: if the file is in a different format, or contains no label. Other columns are never interpreted as labels.
    """
    labels: dict[str, str] = {}
    for _, name, note in iterate_labels(path, label_delimiter):
        labels[name] = labels.get(name) or note
    if not labels:
        raise DataFileError(f"{path}: contains no label, but at least one is needed. Write one label name per line.")
    return labels


def iterate_labels(path: str | os.PathLike, label_delimiter: str | None = None) -> Labels:
    """Yields `(where, name, note)` for every label of a label file, without normalization and including duplicates. See [`read_labels`]."""
    path = os.fspath(path)
    if os.path.splitext(bare_name(path))[1].lower() not in LABEL_FILE_EXTENSIONS:
        raise DataFileError(
            f"{path}: the format of a label file is determined by its extension, which must be .txt, .csv, .tsv, .json, .jsonl or "
            ".parquet. Rename it."
        )
    data_format = find_format(path)
    if data_format == "txt":
        labels = _labels_of_lines(path)
    elif data_format == "json":
        labels = _labels_of_json(path, label_delimiter)
    else:
        labels = _labels_of_records(read_records(path), label_delimiter)
    for where, name, note in labels:
        yield where, _check_length(name, where), note


def _check_length(name: str, where: str) -> str:
    if len(name) > MAX_LABEL_LENGTH:
        raise DataFileError(
            f"{where}: the label {shorten(name)} has {len(name)} characters, but a label name has at most {MAX_LABEL_LENGTH}. Is this "
            "a file of documents? Specify the file with the labels."
        )
    return name


def _labels_of_lines(path: str) -> Labels:
    for number, line in read_lines(path):
        where, text = f"{display_name(path)}, line {number}", line.strip()
        if not text:
            continue
        if text.startswith(("{", '["', "__label__")) or "\t" in text:
            raise DataFileError(
                f"{where}: {shorten(text)} is a record, not a label. Use the extension of its format (.jsonl, .tsv), or write one label "
                "per line."
            )
        yield where, check_label(text, where), ""


def _labels_of_records(records: Iterable[tuple[str, dict[str, Any]]], delimiter: str | None) -> Labels:
    used: dict[str, str] = {}
    for where, row in records:
        label = row.get("label")
        if isinstance(label, str) and label.strip().startswith("["):
            names = split_labels(label, where, "label", delimiter)
        elif label is not None:
            note = row.get("description")
            yield where, check_label(label, where), note.strip() if isinstance(note, str) else ""
            continue
        elif "labels" in row:
            names = split_labels(row["labels"], where, "labels", delimiter)
        else:
            raise DataFileError(
                f"{where}: the columns are {join_names(row, 10)}, but labels are read from a column `label`, or from `labels` of a "
                "training file. Rename the column that holds them."
            )
        for name in names:
            used.setdefault(name, where)
    for name in sorted(used):
        yield used[name], name, ""


def _labels_of_json(path: str, delimiter: str | None) -> Labels:
    value = _load_json(path)
    if value is None or isinstance(value, list) and value and all(isinstance(item, _Members) for item in value):
        yield from _labels_of_records(read_records(path, "json"), delimiter)
    elif isinstance(value, _Members) and not {"text", "labels"} <= dict(value).keys():
        for name, note in value:
            where = f"{path}, {shorten(name)}"
            yield where, check_label(name, where), _note(note, where)
    elif isinstance(value, list) and not isinstance(value, _Members):
        for name in value:
            yield path, check_label(name, path), ""
    else:
        raise DataFileError(
            f"{path}: is a JSON {type(value).__name__.strip('_').lower()} of a different structure, but labels must be a list or an object "
            'of names. Write ["a", "b"] or {"a": "what it means"}.'
        )


class _Members(list):
    """The members of a JSON object as pairs, so that repeated names are kept."""


def _load_json(path: str) -> Any:
    """The value of a JSON file, with objects as [`_Members`]; None if the file is empty or has one record per line."""
    text = "".join(line for _, line in read_lines(path))
    if not text.strip():
        return None
    try:
        value = parse_json(text, path, object_pairs_hook=_Members)
    except DataFileError as error:
        if isinstance(error.__cause__, json.JSONDecodeError) and error.__cause__.msg == "Extra data":
            return None
        raise
    if isinstance(value, _Members) and isinstance(dict(value).get("label"), str) and len(value) > 1:
        return None  # a single record
    return value


def json_members(path: str | os.PathLike) -> list[tuple[str, Any]] | None:
    """Names and values of a JSON file that consists of one object, including repeated names; None if it consists of records."""
    value = _load_json(os.fspath(path))
    return list(value) if isinstance(value, _Members) else None


def _note(note: Any, where: str) -> str:
    if isinstance(note, _Members):
        members = dict(note)
        if {"name", "description"} & members.keys():
            note = ". ".join(str(members[key]) for key in ("name", "description") if members.get(key))
    if note is not None and not isinstance(note, str):
        raise DataFileError(
            f'{where}: {shorten(note)} is not a note on a label, which is a string. Write {{"label": "what it means"}}.'
        )
    return (note or "").strip()


# ------------------------------------------------------------------------------------------------- descriptions


def read_label_descriptions(path: str | os.PathLike) -> dict[str, str]:
    """
    `{label: description}`, as `sep-mldc-augment describe-labels` writes them, of the labels that have a description.

    Args:
        path (`str`): json, jsonl, csv, tsv or parquet (also .gz, .zst) with the columns "label" and "description"; a json file may
            also hold one object `{label: text}` or `{label: {"description": text}}`. The column "expansion" of version 0.1 is read
            with a `FutureWarning`. In a table (csv, tsv, parquet), the description may be empty.

    Raises:
        DataFileError: if a label is described twice, or a label or description is missing.
    """
    return {name: text for name, text in read_described_labels(path).items() if text}


def read_described_labels(path: str | os.PathLike) -> dict[str, str]:
    """All labels of a file of label descriptions, each with its description ("" if it is empty). See [`read_label_descriptions`]."""
    path = os.fspath(path)
    is_table = find_format(path) in ("csv", "tsv", "parquet")
    descriptions: dict[str, str] = {}
    former = False
    for where, record in _description_records(path):
        column = "expansion" if "expansion" in record and "description" not in record else "description"
        former = former or column == "expansion"
        name = check_label(record.get("label"), where)
        text = record.get(column)
        if is_table and text is None and column in record:
            text = ""
        if not isinstance(text, str) or not (text.strip() or is_table):
            remedy = 'Write {"label": ..., "description": ...}.'
            if is_table:
                remedy = "Name the columns `label` and `description`; the description of a label may be empty."
            raise DataFileError(f"{where}: `{column}` is {shorten(text)}, but a text is needed. {remedy}")
        if name in descriptions:
            raise DataFileError(f"{where}: label {name!r} is described a second time. Remove one of them.")
        descriptions[name] = text.strip()
    if former:
        warnings.warn(
            f"{path} contains label descriptions in the column `expansion` of version 0.1. Rename it to `description`.",
            FutureWarning,
            stacklevel=3,
        )
    return descriptions


def _description_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    value = _load_json(path) if find_format(path) == "json" else None
    if not isinstance(value, _Members):
        yield from read_records(path)
        return
    for name, text in value:
        record = dict(text) if isinstance(text, _Members) else {"description": text}
        yield f"{path}, {shorten(name)}", {**record, "label": name}
