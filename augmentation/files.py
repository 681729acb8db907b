"""Reading of documents, labels and label descriptions."""

import ast
import csv
import gzip
import json
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AugmentationError


MAX_LABEL_LENGTH = 300  # characters; a longer "label" is a document that was taken for one

__all__ = [
    "AugmentationError",
    "Document",
    "clean",
    "label_name",
    "read_documents",
    "read_json_lines",
    "read_label_descriptions",
    "read_labels",
]


@dataclass(frozen=True)
class Document:
    """
    One labelled document.

    Args:
        id (`str`): The document's `id` column, or `"{file name}:{line number}"` where there is none.
        text (`str`): The text; a `title` column is not part of it.
        labels (`tuple[str, ...]`): Label names, in the file's order, without repetition.
        has_own_id (`bool`): Whether `id` comes from the file.
    """

    id: str
    text: str
    labels: tuple[str, ...]
    has_own_id: bool = True


# ------------------------------------------------------------------------------------------------- texts and names


def clean(text: str) -> str:
    """Removes what cannot be sent: control characters but tab and newline, and lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", " ", text).strip()


def label_name(value: Any, where: str) -> str:
    """
    A label name as the trainer reads it: without blanks around it, in Unicode's composed form (NFC).

    Raises:
        AugmentationError: if the value is no name.
    """
    name = unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else ""
    if not name:
        raise AugmentationError(
            f"{where}: the label {str(value)[:80]!r} is not a name; write a string that is not empty."
        )
    if len(name) > MAX_LABEL_LENGTH:
        raise AugmentationError(
            f"{where}: the label {name[:60]!r}... has {len(name)} characters, but a label name has at most {MAX_LABEL_LENGTH}; "
            "is this a file of documents?"
        )
    return name


# ------------------------------------------------------------------------------------------------- lines and records


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """
    The lines of a UTF-8 text file with their ends, gzip or plain, with their numbers from 1.

    Raises:
        AugmentationError: if the file cannot be opened, is not UTF-8 or is a damaged gzip file.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise AugmentationError(
            f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8, but text files must be; convert "
            f"the file first, for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise AugmentationError(f"{path} is not a whole gzip file; write it again or give the plain file.") from None
    except OSError as error:
        raise AugmentationError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions."
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        problem = f"{type(error).__name__}: {str(error)[:80]}"
    raise AugmentationError(
        f"{where}: not JSON ({problem}), but a JSON Lines file holds one JSON object in each line; repair or remove the line."
    )


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSON Lines file (`.gz` or plain) with their line numbers; empty lines are left out."""
    for number, line in _read_lines(Path(path)):
        if not line.strip():
            continue
        value = _parse(line, f"{path}, line {number}")
        if not isinstance(value, dict):
            raise AugmentationError(
                f'{path}, line {number}: a JSON {type(value).__name__}, but an object such as {{"text": "..."}} is '
                "needed; repair or remove the line."
            )
        yield number, value


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than many documents
    rows = csv.DictReader((line for _, line in _read_lines(path)), delimiter=delimiter, restkey="", strict=True)
    try:
        for row in rows:
            if "" in row or None in row.values():
                raise AugmentationError(
                    f"{path}, line {rows.line_num}: the row has another number of columns than the header; put a value that "
                    'holds the separator in "quotes".'
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise AugmentationError(f"{path}, line {rows.line_num}: {error}; correct the quotes of the row.") from None


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with its place for messages."""
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        records = _read_table(path, "," if kind == ".csv" else "\t")
    else:
        records = read_json_lines(path)
    for number, record in records:
        yield f"{path}, line {number}", record


def _label_list(value: Any, where: str, delimiter: str | None) -> list[str]:
    if isinstance(value, str):
        if value.strip().startswith("["):  # a list that was written into a table
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                pass
        elif delimiter:
            value = [name for name in value.split(delimiter) if name.strip()]
    if not isinstance(value, (list, tuple)):
        raise AugmentationError(
            f'{where}: `labels` is {str(value)[:80]!r}, but a list of label names is needed; write ["a", "b"], or name the '
            "separator of joined labels with `label_delimiter`."
        )
    return list(dict.fromkeys(label_name(name, where) for name in value))


# ------------------------------------------------------------------------------------------------- documents


def read_documents(
    paths: str | Path | Iterable[str | Path], need_labels: bool = True, label_delimiter: str | None = None
) -> list[Document]:
    """
    Documents of one or more files, `{"text": str, "labels": [str], "id"?: str}`.

    Args:
        paths: File or files (JSON Lines, csv or tsv), plain or `.gz`.
        need_labels (`bool`): False also takes documents without a `labels` column, and lines that hold only an `id`
            (the files of `--exclude`).
        label_delimiter (`str`, *optional*): Separator of joined labels.

    Raises:
        AugmentationError: if a line has no text or if `labels` is not a list of label names.
    """
    documents = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for where, row in _read_records(Path(path)):
            text, labels, own_id = row.get("text"), row.get("labels"), row.get("id")
            if not isinstance(text, str) and (need_labels or own_id is None):
                raise AugmentationError(
                    f"{where}: `text` is {str(text)[:80]!r}, but a string is needed; name the column of the document "
                    '"text".'
                )
            documents.append(
                Document(
                    id=str(own_id) if own_id is not None else f"{Path(path).name}:{where.rpartition(' ')[2]}",
                    text=clean(text or ""),
                    labels=tuple(_label_list(labels, where, label_delimiter)) if need_labels or labels else (),
                    has_own_id=own_id is not None,
                )
            )
    return documents


# ------------------------------------------------------------------------------------------------- labels


def read_labels(path: str | Path, label_delimiter: str | None = None) -> dict[str, str]:
    """
    Label names, each with the data set's own note on it ("" where there is none).

    Args:
        path: One of (each also as `.gz`)
            - `.txt`: a label in each line;
            - `.csv`, `.tsv`: a column `label`, optionally `description`; or a training file with a column `labels`;
            - `.json`: `["a", "b"]`, `{"a": "note"}` or `{"a": {"name": ..., "description": ...}}`;
            - `.jsonl`: rows with `label`, optionally `description`; or a training file, whose rows have `labels`.

            The labels of a training file are taken in sorted order.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training file.

    Raises:
        AugmentationError: if the file has another form, or holds no label. Nothing but a label is ever taken for one.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == ".txt":
        labels = _labels_of_text(path)
    elif kind == ".json":
        labels = _labels_of_json(path)
    elif kind in (".csv", ".tsv", ".jsonl", ".ndjson"):
        labels = _labels_of_records(_read_records(path), label_delimiter)
    else:
        raise AugmentationError(
            f"{path}: the form of a label file is known from its name, which must end in .txt, .csv, .tsv, .json or .jsonl; "
            "rename it."
        )
    if not labels:
        raise AugmentationError(
            f"{path} holds no label, but at least one is needed; give a file with a label in each line."
        )
    return labels


def _labels_of_text(path: Path) -> dict[str, str]:
    labels = {}
    for number, line in _read_lines(path):
        where, text = f"{path}, line {number}", clean(line)
        if not text:
            continue
        if text.startswith(("{", '["', "__label__")) or "\t" in text:
            raise AugmentationError(
                f"{where}: {text[:60]!r} is a record, not a label; name the file by its form (.jsonl, .tsv), or write one label "
                "in each line."
            )
        labels[label_name(text, where)] = ""
    return labels


def _labels_of_records(records: Iterable[tuple[str, dict[str, Any]]], delimiter: str | None) -> dict[str, str]:
    labels: dict[str, str] = {}
    used: set[str] = set()
    for where, row in records:
        if isinstance(row.get("label"), str) and row["label"].strip().startswith("["):  # a list in a table
            used.update(_label_list(row["label"], where, delimiter))
        elif row.get("label") is not None:
            name = label_name(row["label"], where)
            labels[name] = labels.get(name) or clean(str(row.get("description") or ""))
        elif "labels" in row:
            used.update(_label_list(row["labels"], where, delimiter))
        else:
            raise AugmentationError(
                f"{where}: the columns are {', '.join(map(str, row))[:120]}, but labels are read from a column `label`, or from "
                "`labels` of a training file; rename the column that holds them."
            )
    return labels | {name: "" for name in sorted(used) if name not in labels}


def _labels_of_json(path: Path) -> dict[str, str]:
    value = _parse("".join(line for _, line in _read_lines(path)), str(path))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _labels_of_records(((f"{path}, item {n}", item) for n, item in enumerate(value, start=1)), None)
    if isinstance(value, list):
        return {label_name(name, str(path)): "" for name in value}
    if isinstance(value, dict) and not {"text", "labels"} <= value.keys():
        return {label_name(name, str(path)): _note(note, f"{path}, {name!r}") for name, note in value.items()}
    raise AugmentationError(
        f"{path} is a JSON {type(value).__name__} of another form, but labels are a list or an object of names; write "
        '["a", "b"] or {"a": "what it means"}.'
    )


def _note(note: Any, where: str) -> str:
    if isinstance(note, dict) and {"name", "description"} & note.keys():
        note = ". ".join(str(note[key]) for key in ("name", "description") if note.get(key))
    if note is not None and not isinstance(note, str):
        raise AugmentationError(
            f"{where} is a JSON {type(note).__name__}, but what is said about a label is a string; write "
            '{"label": "what it means"}.'
        )
    return clean(note or "")


def read_label_descriptions(path: str | Path) -> dict[str, str]:
    """
    `{label: description}` from a file of rows `{"label", "description"}`, as `describe-labels` writes it.

    Rows of version 0.1, `{"label", "expansion"}`, are read with a `FutureWarning`.

    Raises:
        AugmentationError: if a row has another form or a label comes twice.
    """
    descriptions: dict[str, str] = {}
    old = False
    for where, row in _read_records(Path(path)):
        old = old or ("expansion" in row and "description" not in row)
        label, text = row.get("label"), row.get("description", row.get("expansion"))
        if not isinstance(label, str) or not isinstance(text, str):
            raise AugmentationError(
                f"{where}: `label` and `description` must both be strings, but the columns are {sorted(map(str, row))}; write "
                "the file with `describe-labels`."
            )
        name = label_name(label, where)
        if name in descriptions:
            raise AugmentationError(f"{where}: the label {name!r} comes twice; remove one of the lines.")
        descriptions[name] = clean(text)
    if old:
        warnings.warn(
            f"{path} holds label descriptions in the column `expansion` of version 0.1; rename it to `description`.",
            FutureWarning,
            stacklevel=2,
        )
    return descriptions
