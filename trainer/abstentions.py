"""Abstained documents, for which no label reaches its threshold: counting them and listing them for review."""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from .files import atomic_write


def abstained_rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """
    The predictions of abstained documents.

    Args:
        lines (iterable of `bytes`): JSON Lines as written by `examples/predict.py`. A line without the key `abstained`, from an older version,
            counts as abstained if it has no labels.

    Example:

    ```python
    >>> [row["index"] for row in abstained_rows([b'{"index": 0, "labels": [], "abstained": true}', b'{"index": 1, "labels": [], "abstained": false}'])]
    [0]

    ```
    """
    for line in lines:
        if b'"abstained": true' in line or b'"labels": []' in line:  # most lines need not be parsed
            row = json.loads(line)
            if row.get("abstained", not row["labels"]):
                yield row


def write_abstained(
    path: str | os.PathLike, rows: Iterable[dict[str, Any]], texts: Iterable[str] | None = None
) -> int:
    """
    Write abstained documents as JSON Lines for review: `id` (if there is one), `index`, `text` and `labels`, the best labels below their
    threshold (none without `min_labels`).

    Args:
        path (path): the file. It is written atomically.
        rows (iterable of `dict`): from [`abstained_rows`], by ascending `index`.
        texts (iterable of `str`, *optional*): the texts of all documents, in order; without them the list has no texts.

    Returns:
        `int`: the number of documents.
    """
    numbered = None if texts is None else enumerate(texts)
    count = 0
    with atomic_write(path) as file:
        for row in rows:
            kept: dict[str, Any] = {name: row[name] for name in ("id", "index") if name in row}
            if numbered is not None:
                kept["text"] = next(text for index, text in numbered if index == row["index"])
            file.write(json.dumps({**kept, "labels": row["labels"]}, ensure_ascii=False) + "\n")
            count += 1
    return count
