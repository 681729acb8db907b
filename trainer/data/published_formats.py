"""The published files of the paper's datasets: texts in one file, labels in another."""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .messages import shorten
from .text_lines import COMPRESSIONS, DataFileError, DataFileNotFoundError, OnError, bare_name, read_lines


Records = Iterator[tuple[str, dict[str, Any]]]


def _read_text_and_label_lines(path: str, label_path: str) -> Records:
    """One document per line; the same line of a second file contains its labels, separated by spaces."""
    texts, labels = read_lines(path), read_lines(label_path)
    for number, text in texts:
        _, label_line = next(labels, (0, None))
        if label_line is None:
            raise DataFileError(
                f"{label_path}: has {number - 1} lines, but {path} has more. Both need one line for each document, in "
                "the same order."
            )
        yield f"{path}, line {number}", {"text": text.strip(), "labels": label_line.split()}
    extra, _ = next(labels, (None, None))
    if extra is not None:
        raise DataFileError(
            f"{label_path}: has more lines than {path}, which has {extra - 1}. Both need one line for each document, "
            "in the same order."
        )


def _beside(path: str, name: str, data_format: str) -> str:
    """`name` in the folder of `path`, also with another compression."""
    bare = bare_name(name)
    for candidate in dict.fromkeys([name, bare, *(bare + suffix for suffix in COMPRESSIONS)]):
        found = Path(path).parent / candidate
        if found.is_file():
            return str(found)
    raise DataFileNotFoundError(
        f"{path}: the labels are read from `{bare}` (or .gz, .zst) in the same folder, which does not exist. "
        f"Put it there; data_format {data_format!r} takes the published pair of files."
    )


def _read_aapd(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """AAPD as SGM publishes it: `text_train` and `label_train` (or `_val`, `_test`), one document per line."""
    name = Path(path).name
    if "text" not in name:
        raise DataFileError(
            f"{path}: data_format 'aapd' reads a file named like `text_train`, with `label_train` next to it. Rename "
            "it."
        )
    yield from _read_text_and_label_lines(path, _beside(path, name.replace("text", "label", 1), "aapd"))


def _read_eurlex(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """
    EUR-Lex in the form of extreme classification: `train_raw_texts.txt` or `train_texts.txt` and `train_labels.txt`.
    """
    name = Path(path).name
    label_name = re.sub(r"(_raw)?_texts?(?=\.|$)", "_labels", name, count=1)
    if label_name == name:
        raise DataFileError(
            f"{path}: data_format 'eurlex' reads a file named like `train_raw_texts.txt`, with `train_labels.txt` "
            "next to it. Rename it."
        )
    yield from _read_text_and_label_lines(path, _beside(path, label_name, "eurlex"))


def _read_qrels(path: str) -> dict[str, tuple[str, ...]]:
    topics: dict[str, tuple[str, ...]] = {}
    for number, line in read_lines(path):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3:
            raise DataFileError(
                f"{path}, line {number}: {shorten(line.strip())} is not `topic document-id 1`. Use the published "
                "topics.qrels file."
            )
        topics[fields[1]] = (*topics.get(fields[1], ()), sys.intern(fields[0]))
    return topics


def _read_rcv1(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """RCV1-v2 as LYRL2004 publishes it: a token file (`.I id`, `.W`, tokens) and `rcv1-v2.topics.qrels` next to it."""
    found = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path) or "."), "*topics.qrels*")))
    if len(found) != 1:
        raise DataFileNotFoundError(
            f"{path}: the labels are read from one file `*topics.qrels*` in the same folder, but {len(found)} are "
            "there. Put the "
            "published rcv1-v2.topics.qrels there; data_format 'rcv1' takes the token files with it."
        )
    topics = _read_qrels(found[0])

    def record(start: int, document: str, tokens: list[str]) -> tuple[str, dict[str, Any]]:
        where = f"{path}, line {start}"
        if document not in topics:
            raise DataFileError(
                f"{where}: document {document} has no topic in {found[0]}. Use the qrels file of the same collection."
            )
        return where, {"id": document, "text": " ".join(tokens), "labels": list(topics[document])}

    start, document = 0, None
    tokens: list[str] = []
    for number, line in read_lines(path):
        line = line.strip()
        if line.startswith(".I "):
            if document is not None:
                yield record(start, document, tokens)
            start, document, tokens = number, line[3:].strip(), []
        elif document is None and line:
            raise DataFileError(
                f"{path}, line {number}: {shorten(line)} comes before the first `.I document-id`. Use a published "
                "token file."
            )
        elif line and line != ".W":
            tokens.append(line)
    if document is not None:
        yield record(start, document, tokens)


READERS: dict[str, Callable[[str, Sequence[str] | None, OnError], Records]] = {
    "aapd": _read_aapd,
    "eurlex": _read_eurlex,
    "rcv1": _read_rcv1,
}
