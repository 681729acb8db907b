"""
The forms that documents, labels and label descriptions come in. Each reader streams through its file and yields
`(where, record)`: `where` is "FILE, line N" for messages, `record` a dictionary of columns. `columns.py` makes
documents of records.
"""

import csv
import functools
import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import List as ListFeature


COMPRESSIONS = (".gz", ".zst")
Records = Iterator[tuple[str, dict[str, Any]]]


def open_binary(path: str) -> BinaryIO:
    """Opens a file for reading bytes; `.gz` and `.zst` are decompressed on the way."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return open(path, "rb")


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """
    Yields `(line number from 1, line with its line end)` of a UTF-8 text file, compressed or not.

    Raises:
        ValueError: if a line is not UTF-8 or the compressed file is damaged.
    """
    number = 0
    try:
        with open_binary(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8. Convert the file, for "
            "example with "
            "`iconv -f latin1 -t utf-8`."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        if not path.endswith(COMPRESSIONS):
            raise
        raise ValueError(
            f"{path}: cannot be decompressed after line {number} ({error}). The file is damaged or cut short: fetch "
            "it again."
        ) from None


def _parse_json(text: str, path: str, first_line: int = 1, **kwargs) -> Any:
    try:
        return json.loads(text, **kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {first_line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}). Write "
            "one JSON object "
            "a line, or one array of objects in a .json file."
        ) from None


def _check_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{where}: {shorten(value)} is not a JSON object. Write {{"text": ..., "labels": [...]}}.')
    return value


def read_jsonl(path: str) -> Records:
    """JSON Lines: one object a line; blank lines are skipped."""
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _check_object(_parse_json(line.rstrip(), path, number), where)


def read_json(path: str) -> Records:
    """One JSON array of objects (read as a whole), or JSON Lines under the name `.json`."""
    first = next((line.lstrip() for _, line in read_lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from read_jsonl(path)
        return
    for number, value in enumerate(_parse_json("".join(line for _, line in read_lines(path)), path), start=1):
        where = f"{path}, item {number}"
        yield where, _check_object(value, where)


class _Pairs(list):
    """The members of a JSON object, a repeated name included."""


def read_json_object(path: str) -> list[tuple[str, Any]] | None:
    """The members of a .json file that is one object `{label: ...}`; None if the file holds records."""
    if not path.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        return None
    text = "".join(line for _, line in read_lines(path))
    if not text.lstrip().startswith("{"):
        return None
    try:
        members = _parse_json(text, path, object_pairs_hook=_Pairs)
    except ValueError as error:
        if "Extra data" in str(error):  # JSON Lines
            return None
        raise
    if "label" in dict(members) and len(members) > 1 and isinstance(dict(members)["label"], str):
        return None  # a single record
    return [(name, dict(value) if isinstance(value, _Pairs) else value) for name, value in members]


def read_csv(path: str, delimiter: str = ",") -> Records:
    """A table with a header line. Values stay strings: a label "NA" or "007" is taken as it is written."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is shorter than many a legal act
    rows = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    kind = "tabs" if delimiter == "\t" else "commas"
    header: list[str] | None = None
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{where}: {error}. Separate the columns with {kind}, put a value that holds quotes or line breaks in "
                '"quotes" and '
                "double the quotes inside."
            ) from None
        if not row:
            continue
        if header is None:
            header = row
            if len(set(header)) < len(header):
                raise ValueError(f"{where}: the header {header} names a column twice. Rename one of them.")
        elif len(row) != len(header):
            raise ValueError(
                f"{where}: {len(row)} columns, but the header has {len(header)} ({', '.join(header)}). Separate the "
                "columns with "
                f'{kind} and put a value that holds one in "quotes".'
            )
        else:
            yield where, dict(zip(header, row))


def class_label_names(features: Features | None) -> dict[str, list[str]]:
    """The names of every column of `features` that is a ClassLabel or a list of them."""
    names = {}
    for column, feature in (features or {}).items():
        inner = feature.feature if isinstance(feature, ListFeature) else feature
        if isinstance(inner, ClassLabel):
            names[column] = inner.names
    return names


def decode_class_labels(record: dict[str, Any], names: dict[str, list[str]], where: str) -> dict[str, Any]:
    """Replaces the ids in the columns of `class_label_names` by the list of their names."""
    for column, column_names in names.items():
        value = record.get(column)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        wrong = [i for i in ids if i is None or not 0 <= i < len(column_names)]
        if wrong:
            raise ValueError(
                f"{where}: `{column}` holds {wrong[0]}, but its {len(column_names)} classes are numbered from 0 to "
                f"{len(column_names) - 1}. "
                "Leave out documents whose labels are not known."
            )
        record[column] = [column_names[i] for i in ids]
    return record


def read_parquet(path: str) -> Records:
    """A Parquet file, batch by batch (a compressed one is decompressed in memory). ClassLabel ids become names."""
    try:
        if path.endswith(COMPRESSIONS):
            with open_binary(path) as stream:
                file = pq.ParquetFile(pa.BufferReader(stream.read()))
        else:
            file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}). Write it again.") from None
    names = class_label_names(Features.from_arrow_schema(file.schema_arrow))
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for record in batch.to_pylist():
            number += 1
            where = f"{path}, row {number}"
            yield where, decode_class_labels(record, names, where)


def _read_text_and_label_lines(path: str, label_path: str) -> Records:
    """One document a line and, in a second file, its labels in the same line, separated by blanks."""
    texts, labels = read_lines(path), read_lines(label_path)
    for number, text in texts:
        _, label_line = next(labels, (0, None))
        if label_line is None:
            raise ValueError(
                f"{label_path}: has {number - 1} lines, but {path} has more. Both need one line for each document, in "
                "the same order."
            )
        yield f"{path}, line {number}", {"text": text.strip(), "labels": label_line.split()}
    extra, _ = next(labels, (None, None))
    if extra is not None:
        raise ValueError(
            f"{label_path}: has more lines than {path}, which has {extra - 1}. Both need one line for each document, "
            "in the same order."
        )


def _beside(path: str, name: str, data_format: str) -> str:
    """`name` in the folder of `path`, also with another compression."""
    bare = name.removesuffix(".gz").removesuffix(".zst")
    for candidate in dict.fromkeys([name, bare, *(bare + suffix for suffix in COMPRESSIONS)]):
        found = Path(path).parent / candidate
        if found.is_file():
            return str(found)
    raise FileNotFoundError(
        f"{path}: the labels are read from `{bare}` (or .gz, .zst) in the same folder, which is not there. "
        f"Put it there; data_format {data_format!r} takes the published pair of files."
    )


def read_aapd(path: str) -> Records:
    """AAPD as SGM publishes it: `text_train` and `label_train` (or `_val`, `_test`), one document a line."""
    name = Path(path).name
    if "text" not in name:
        raise ValueError(
            f"{path}: data_format 'aapd' reads a file named like `text_train`, with `label_train` beside it. Rename "
            "it."
        )
    yield from _read_text_and_label_lines(path, _beside(path, name.replace("text", "label", 1), "aapd"))


def read_eurlex(path: str) -> Records:
    """
    EUR-Lex in the form of extreme classification: `train_raw_texts.txt` or `train_texts.txt` and `train_labels.txt`.
    """
    name = Path(path).name
    label_name = re.sub(r"(_raw)?_texts?(?=\.|$)", "_labels", name, count=1)
    if label_name == name:
        raise ValueError(
            f"{path}: data_format 'eurlex' reads a file named like `train_raw_texts.txt`, with `train_labels.txt` "
            "beside it. Rename it."
        )
    yield from _read_text_and_label_lines(path, _beside(path, label_name, "eurlex"))


def _read_qrels(path: str) -> dict[str, tuple[str, ...]]:
    topics: dict[str, tuple[str, ...]] = {}
    for number, line in read_lines(path):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3:
            raise ValueError(
                f"{path}, line {number}: {shorten(line.strip())} is not `topic document-id 1`. Use the published "
                "topics.qrels file."
            )
        topics[fields[1]] = (*topics.get(fields[1], ()), sys.intern(fields[0]))
    return topics


def read_rcv1(path: str) -> Records:
    """RCV1-v2 as LYRL2004 publishes it: a token file (`.I id`, `.W`, tokens) and `rcv1-v2.topics.qrels` beside it."""
    found = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path) or "."), "*topics.qrels*")))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{path}: the labels are read from one file `*topics.qrels*` in the same folder, but {len(found)} are "
            "there. Put the "
            "published rcv1-v2.topics.qrels there; data_format 'rcv1' takes the token files with it."
        )
    topics = _read_qrels(found[0])

    def record(start: int, document: str, tokens: list[str]) -> tuple[str, dict[str, Any]]:
        where = f"{path}, line {start}"
        if document not in topics:
            raise ValueError(
                f"{where}: document {document} has no topic in {found[0]}. Use the qrels file of the same collection."
            )
        return where, {"id": document, "text": " ".join(tokens), "labels": list(topics[document])}

    start, document, tokens = 0, None, []
    for number, line in read_lines(path):
        line = line.strip()
        if line.startswith(".I "):
            if document is not None:
                yield record(start, document, tokens)
            start, document, tokens = number, line[3:].strip(), []
        elif document is None and line:
            raise ValueError(
                f"{path}, line {number}: {shorten(line)} comes before the first `.I document-id`. Use a published "
                "token file."
            )
        elif line and line != ".W":
            tokens.append(line)
    if document is not None:
        yield record(start, document, tokens)


READERS = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": functools.partial(read_csv, delimiter="\t"),
    "parquet": read_parquet,
    "aapd": read_aapd,
    "rcv1": read_rcv1,
    "eurlex": read_eurlex,
}
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


def read_records(path: str, data_format: str = "auto") -> Records:
    """
    Yields `(where, record)` for every document of a file.

    Args:
        path (`str`): The file; `.gz` and `.zst` are decompressed.
        data_format (`str`): A key of `READERS`, or "auto" for the one of the file's extension.

    Raises:
        FileNotFoundError: if the file, or the label file that belongs to it, is not there.
        ValueError: if the format is unknown or the file is not in it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file. Check the path; relative ones start at {os.getcwd()}.")
    if data_format == "auto":
        bare = path.removesuffix(".gz").removesuffix(".zst")
        data_format = EXTENSIONS.get(os.path.splitext(bare)[1].lower(), "auto")
    if data_format not in READERS:
        raise ValueError(
            f"{path}: the format is not known from the name. Name the file {', '.join(EXTENSIONS)} (also .gz, .zst) "
            "or choose a "
            f"data_format among {', '.join(READERS)}."
        )
    return READERS[data_format](path)


def expand_files(files: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """One path, a glob pattern or a list of both → the sorted list of files."""
    names = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    found = []
    for name in map(os.fspath, names):
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if not matches:
            raise FileNotFoundError(f"{name}: no such file. Check the path; relative ones start at {os.getcwd()}.")
        found.extend(matches)
    return found


def file_signature(path: str) -> tuple[str, int, int]:
    """What changes when a file's content does: absolute path, size in bytes and time of the last change in ns."""
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def signatures(path: str, data_format: str) -> tuple[tuple[str, int, int], ...]:
    """The signatures of a file and, in the published forms, of the label files beside it."""
    paired = data_format in ("aapd", "rcv1", "eurlex")
    beside = [str(p) for p in Path(path).parent.iterdir() if "label" in p.name or "qrels" in p.name] if paired else []
    return tuple(file_signature(p) for p in (path, *sorted(beside)))


def shorten(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def join_names(names: Iterable[str], limit: int = 5) -> str:
    """The first names and how many more there are, for messages."""
    names = list(names)
    return ", ".join(repr(n) for n in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
