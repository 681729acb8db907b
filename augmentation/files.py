"""Reading of labels, documents and expansions, and writing of JSON Lines, whole or not at all."""

import csv
import gzip
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


class AugmentationError(Exception):
    """A problem that the user can solve; its message is one sentence with the value, the rule and the remedy."""


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


# ---------------------------------------------------------------------------------------------------- reading


def clean(text: str) -> str:
    """Removes what cannot be sent: control characters but tab and newline, and lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", " ", text).strip()


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """
    The lines of a UTF-8 text file, gzip or plain, with their numbers from 1; empty lines are left out.

    Raises:
        AugmentationError: if the file cannot be opened, is not UTF-8 or is a damaged gzip file.
    """
    path = Path(path)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise AugmentationError(
            f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8, but text files must be; convert "
            f"the file first, for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from None
    except (gzip.BadGzipFile, EOFError):
        raise AugmentationError(f"{path} is not a whole gzip file; write it again or give the plain file.") from None
    except OSError as error:
        raise AugmentationError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions."
        ) from None


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSON Lines file (`.gz` or plain) with their line numbers."""
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise AugmentationError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}), but a JSON Lines file holds one "
                "JSON object in each line; repair or remove the line."
            ) from None
        if not isinstance(value, dict):
            raise AugmentationError(
                f'{path}, line {number}: a JSON {type(value).__name__}, but an object such as {{"text": "..."}} is '
                "needed; repair or remove the line."
            )
        yield number, value


def read_documents(paths: str | Path | Iterable[str | Path], need_labels: bool = True) -> list[Document]:
    """
    Documents of one or more JSON Lines files, `{"text": str, "labels": [str], "id"?: str}`.

    Args:
        paths: File or files, plain or `.gz`.
        need_labels (`bool`): False also takes documents without a `labels` column, and lines that hold only an `id`
            (the files of `--exclude`).

    Raises:
        AugmentationError: if a line has no text or if `labels` is not a list of label names.
    """
    documents = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for number, row in read_json_lines(path):
            text, labels, own_id = row.get("text"), row.get("labels"), row.get("id")
            if not isinstance(text, str) and (need_labels or own_id is None):
                raise AugmentationError(
                    f"{path}, line {number}: `text` is {text!r}, but a string is needed; name the column of the document "
                    '"text".'
                )
            if labels is None and not need_labels:
                labels = []
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise AugmentationError(
                    f"{path}, line {number}: `labels` is {str(labels)[:80]!r}, but a list of label names is needed; write "
                    '["a", "b"].'
                )
            documents.append(
                Document(
                    id=str(own_id) if own_id is not None else f"{Path(path).name}:{number}",
                    text=clean(text or ""),
                    labels=tuple(dict.fromkeys(labels)),
                    has_own_id=own_id is not None,
                )
            )
    return documents


def read_labels(path: str | Path) -> dict[str, str]:
    """
    Label names, each with the data set's own note on it ("" where there is none).

    Args:
        path: One of
            - `.txt`: a label in each line;
            - `.csv`: a column `label` (or the first column), optionally `description`;
            - `.json`: `["a", "b"]`, `{"a": "note"}` or `{"a": {"name": ..., "description": ...}}`;
            - `.jsonl`, `.jsonl.gz`: rows with `label`, or a train file, whose rows have `labels` (taken in sorted order).

    Raises:
        AugmentationError: if the file has another form, or holds no label.
    """
    path = Path(path)
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    labels: dict[str, str] = {}
    if suffix == ".json":
        labels = _labels_of_json(path)
    elif suffix == ".csv":
        rows = csv.DictReader([line for _, line in read_lines(path)])
        name = "label" if "label" in (rows.fieldnames or []) else (rows.fieldnames or ["label"])[0]
        labels = {clean(row[name] or ""): clean(row.get("description") or "") for row in rows}
    elif suffix == ".jsonl":
        used = set()
        for number, row in read_json_lines(path):
            if isinstance(row.get("label"), str):
                labels[row["label"]] = clean(str(row.get("description") or ""))
            elif isinstance(row.get("labels"), list):
                used.update(map(str, row["labels"]))
            else:
                raise AugmentationError(
                    f"{path}, line {number}: neither `label` nor `labels`, but one of them must name the labels; give a "
                    "train file or a file of labels."
                )
        labels.update({label: "" for label in sorted(used) if label not in labels})
    else:
        labels = {clean(line): "" for _, line in read_lines(path)}
    labels.pop("", None)
    if not labels:
        raise AugmentationError(
            f"{path} holds no label, but at least one is needed; give a file with a label in each line."
        )
    return labels


def _labels_of_json(path: Path) -> dict[str, str]:
    try:
        value = json.loads("\n".join(line for _, line in read_lines(path)))
    except json.JSONDecodeError as error:
        raise AugmentationError(f"{path}, line {error.lineno}: not JSON ({error.msg}); repair the file.") from None
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return dict.fromkeys(value, "")
    if isinstance(value, dict):
        labels = {}
        for label, note in value.items():
            if isinstance(note, dict):
                note = ". ".join(str(note[key]) for key in ("name", "description") if note.get(key))
            labels[label] = clean(str(note or ""))
        return labels
    raise AugmentationError(
        f'{path} is a JSON {type(value).__name__}, but labels are a list or an object of names; write ["a", "b"] or '
        '{"a": "what it means"}.'
    )


def read_expansions(path: str | Path) -> dict[str, str]:
    """`{label: expansion}` from a file of rows `{"label", "expansion"}`, as `expand-labels` writes it."""
    expansions = {}
    for number, row in read_json_lines(path):
        label, expansion = row.get("label"), row.get("expansion")
        if not isinstance(label, str) or not isinstance(expansion, str):
            raise AugmentationError(
                f"{path}, line {number}: `label` and `expansion` must both be strings, but the keys are {sorted(row)}; "
                "write the file with `expand-labels`."
            )
        if label in expansions:
            raise AugmentationError(
                f"{path}, line {number}: the label {label!r} comes twice; remove one of the lines."
            )
        expansions[label] = clean(expansion)
    return expansions


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def replace_whole(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A stream to a temporary neighbour that takes the place of `path` only when the block ends without an error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise AugmentationError(
            f"{path} cannot be written ({error.strerror or error}); choose a folder that you may write to."
        ) from None
    try:
        text = (
            {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        )  # a lone surrogate stays JSON
        with os.fdopen(handle, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the rows, whole or not at all; returns their number."""
    number = 0
    with replace_whole(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
    return number


def check_writable(folder: str | Path) -> None:
    """
    Tries the output folder before anything is paid for.

    Raises:
        AugmentationError: if no file can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AugmentationError(
            f"the output folder {folder} cannot be written ({error.strerror or error}); choose another one with "
            "`--output-dir`."
        ) from None
