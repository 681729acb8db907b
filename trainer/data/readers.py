"""
Reader of data files, shared by training, prediction and augmentation.

Every format yields `(where, record)`: `where` is "FILE, line N" for messages, `record` a dictionary of columns. `columns.py`
turns records into documents, `label_files.py` into labels. Importing this module imports neither torch nor `datasets`;
pyarrow is imported for Parquet and zstd only.
"""

import contextlib
import csv
import glob
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import published_formats
from .messages import shorten
from .text_lines import (
    STANDARD_INPUT,
    DataFileError,
    DataFileNotFoundError,
    OnError,
    bare_name,
    check_file,
    display_name,
    is_regular,
    open_binary,
    raise_error,
    read_lines,
)


__all__ = [
    "DataFileError",
    "DataFileNotFoundError",
    "EXTENSIONS",
    "FORMATS",
    "STANDARD_INPUT",
    "Records",
    "expand_files",
    "find_format",
    "is_regular",
    "read_column_names",
    "read_lines",
    "read_records",
]

Records = Iterator[tuple[str, dict[str, Any]]]
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods")
PARQUET_BATCH = 1000  # rows


# ----------------------------------------------------------------------------------------------- entry points


def read_records(
    path: str | os.PathLike,
    data_format: str = "auto",
    columns: Sequence[str] | None = None,
    on_error: OnError = raise_error,
) -> Records:
    """
    Yields `(where, record)` for every record of a file, one at a time.

    Args:
        path (`str`): a file, or `-` for standard input. Contents that are gzip or zstd are decompressed.
        data_format (`str`): one of `FORMATS`, or "auto" for the one of the file's extension ("txt" for standard input).
        columns (`Sequence[str]`, *optional*): the columns that are needed; a Parquet file's others are not read.
        on_error (`Callable[[DataFileError], None]`): called for each line that is not a record, which is then skipped; without it,
            the first such error is raised. Errors after which reading cannot continue are always raised.

    Raises:
        DataFileNotFoundError: if the file, or the label file that belongs to it, does not exist.
        DataFileError: if the format is unknown or the file is not in it. It is a `ValueError`.
    """
    path = os.fspath(path)
    check_file(path)
    reader = FORMATS[find_format(path, data_format)]
    return _guard(reader(path, columns, on_error), path)


def _guard(records: Records, path: str) -> Records:
    """Turns any error of a reader into a one-sentence error with the location."""
    where = display_name(path)
    try:
        for where, record in records:
            yield where, record
    except (DataFileError, MemoryError):
        raise
    except Exception as error:
        raise DataFileError(
            f"{where}: what follows cannot be read ({type(error).__name__}: {str(error)[:200]}). Repair the file, or convert "
            "it to JSON Lines."
        ) from error


def find_format(path: str | os.PathLike, data_format: str = "auto") -> str:
    """
    The key of `FORMATS` for a file.

    Raises:
        DataFileError: if there is no such format, or none for the file's extension.
    """
    path = os.fspath(path)
    if data_format == "auto":
        extension = os.path.splitext(bare_name(path))[1].lower()
        data_format = "txt" if path == STANDARD_INPUT else EXTENSIONS.get(extension, "auto")
    if data_format not in FORMATS:
        if os.path.splitext(bare_name(path))[1].lower() in SPREADSHEETS:
            raise DataFileError(f'{path}: spreadsheets are not read. Save the sheet as "CSV UTF-8".')
        raise DataFileError(
            f"{display_name(path)}: the format is not known from the name. Name the file {', '.join(EXTENSIONS)} (also .gz, "
            f".zst), or choose a format among {', '.join(FORMATS)}."
        )
    return data_format


def read_column_names(path: str | os.PathLike, data_format: str = "auto") -> tuple[str, list[str]] | None:
    """`(where, column names)` of the first record of a file that can be read again; None if it holds no record."""
    path = os.fspath(path)
    if find_format(path, data_format) == "parquet":
        with _open_parquet(path) as file:
            return (path, file.schema_arrow.names) if file.metadata.num_rows else None
    where, record = next(read_records(path, data_format), (path, None))
    return None if record is None else (where, list(record))


def expand_files(files: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """
    Expand a path, a glob pattern or a list of both to a list of files.

    Raises:
        DataFileNotFoundError: if a path or pattern matches nothing.
    """
    names = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    found: list[str] = []
    for name in (os.fspath(name) for name in names):
        matches = [name] if name == STANDARD_INPUT or os.path.exists(name) else sorted(glob.glob(name))
        if not matches:
            check_file(name)
        found.extend(matches)
    return found


def file_signature(path: str) -> tuple[str, int, int]:
    """Identifies the contents of a file: absolute path, size in bytes, time of the last change in ns."""
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def signatures(path: str, data_format: str) -> tuple[tuple[str, int, int], ...]:
    """The signatures of a file and, in the published formats, of its label files."""
    paired = data_format in published_formats.READERS
    beside = [str(p) for p in Path(path).parent.iterdir() if "label" in p.name or "qrels" in p.name] if paired else []
    return tuple(file_signature(p) for p in (path, *sorted(beside)))


# ------------------------------------------------------------------------------------------------- text and JSON


def _read_txt(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """One document per line; a blank line is a document without text."""
    for number, line in read_lines(path, on_error):
        yield f"{display_name(path)}, line {number}", {"text": line.rstrip("\r\n")}


def parse_json(text: str, name: str, first_line: int = 1, **options: Any) -> Any:
    """`json.loads` whose errors name file and line; `options` are its own."""
    cause: Exception
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        line, problem, cause = first_line + error.lineno - 1, f"{error.msg}, column {error.colno}", error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, thousands of nested brackets
        line, problem, cause = first_line, str(error)[:100], error
    raise DataFileError(
        f"{name}, line {line}: not valid JSON ({problem}). Write one JSON object per line, or one array of objects in a .json "
        "file."
    ) from cause


def _check_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataFileError(f'{where}: {shorten(value)} is not a JSON object. Write {{"text": ..., "labels": [...]}}.')
    return value


def _read_jsonl(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """One JSON object per line; blank lines are skipped."""
    yield from _records_of_lines(read_lines(path, on_error), display_name(path), on_error)


def _records_of_lines(lines: Iterator[tuple[int, str]], name: str, on_error: OnError) -> Records:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = _check_object(parse_json(line.rstrip(), name, number), where)
        except DataFileError as error:
            on_error(error)
        else:
            yield where, record


def _read_json(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """One JSON array of objects, which is read as a whole, or JSON Lines under the name `.json`."""
    name, lines, head = display_name(path), read_lines(path, on_error), []
    for item in lines:
        head.append(item)
        if item[1].strip():
            break
    else:
        return
    if not head[-1][1].lstrip().startswith("["):
        yield from _records_of_lines(itertools.chain(head, lines), name, on_error)
        return
    text = "".join(line for _, line in itertools.chain(head, lines))
    for number, value in enumerate(parse_json(text, name), start=1):
        where = f"{name}, item {number}"
        try:
            record = _check_object(value, where)
        except DataFileError as error:
            on_error(error)
        else:
            yield where, record


# ------------------------------------------------------------------------------------------------- csv and tsv


def _read_csv(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """
    A table with a header line, separated by commas or, if the header has none, by semicolons or tabs, as Excel writes it.

    Values stay strings: a label "NA" or "007" is taken as it is written. Columns without a name are left out.
    """
    lines = (line for _, line in read_lines(path))
    first = next(lines, "")
    skipped = 0
    if first.startswith("sep=") and len(first.rstrip("\r\n")) == 5:  # Excel writes this line to specify the delimiter
        delimiter, first, skipped = first[4], next(lines, ""), 1
    else:
        delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    yield from _read_table(itertools.chain([first], lines), display_name(path), delimiter, skipped, on_error)


def _read_tsv(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """A table with a header line, separated by tabs."""
    yield from _read_table((line for _, line in read_lines(path)), display_name(path), "\t", 0, on_error)


def _read_table(lines: Iterator[str], name: str, delimiter: str, skipped: int, on_error: OnError) -> Records:
    csv.field_size_limit(2**31 - 1)  # many legal texts exceed the default of 128 KiB
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}, line {rows.line_num + skipped + 1}"
        try:
            row = next(rows)
            if not row:
                continue
            if header is None:
                header = _check_header(row, where)
                continue
            _check_row(row, header, delimiter, where)
        except StopIteration:
            return
        except csv.Error as error:
            on_error(
                DataFileError(
                    f"{where}: {error}. Separate the columns with {_delimiter_name(delimiter)}, put a value that contains quotes or "
                    'line breaks in "quotes" and double the quotes inside.'
                )
            )
        except DataFileError as error:
            if header is None:
                raise
            on_error(error)
        else:
            yield where, {column: value for column, value in zip(header, row) if column}


def _delimiter_name(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, repr(delimiter))


def _check_header(header: list[str], where: str) -> list[str]:
    header = [column.strip() for column in header]
    named = [column for column in header if column]
    if len(set(named)) < len(named):
        raise DataFileError(f"{where}: the header {header} names a column twice. Rename one of them.")
    return header


def _check_row(row: list[str], header: list[str], delimiter: str, where: str) -> None:
    if len(row) != len(header):
        raise DataFileError(
            f"{where}: {len(row)} columns, but the header has {len(header)} ({', '.join(header)}). Separate the columns with "
            f'{_delimiter_name(delimiter)} and put a value that holds one in "quotes".'
        )


# ------------------------------------------------------------------------------------------------- Parquet


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what cannot be read in pieces (compressed, standard input) is read as a whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(path) as stream:
        try:
            whole = not is_regular(path) or not isinstance(getattr(stream, "raw", None), io.FileIO)  # compressed
            file = pq.ParquetFile(pa.BufferReader(stream.read()) if whole else stream)
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            raise DataFileError(f"{display_name(path)}: not a whole Parquet file ({error}). Write it again.") from None
        yield file


def _read_parquet(path: str, columns: Sequence[str] | None, on_error: OnError) -> Records:
    """The rows of a Parquet file, batch by batch. The ids of a column of `datasets.ClassLabel` become names."""
    with _open_parquet(path) as file:
        available = file.schema_arrow.names
        used = None if columns is None else [column for column in available if column in columns]
        names = _class_label_names(file.schema_arrow.metadata)
        batches = file.iter_batches(batch_size=PARQUET_BATCH, columns=used)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, record in enumerate(rows, start=1):
            where = f"{display_name(path)}, row {number}"
            try:
                decode_class_labels(record, names, where)
            except DataFileError as error:
                on_error(error)
            else:
                yield where, record


def _class_label_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of every ClassLabel column (or list of them), from what `datasets` writes into a Parquet file."""
    info = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info") or {}
    names = {}
    for column, feature in (info.get("features") or {}).items():
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = inner.get("feature", inner) if isinstance(inner, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            names[column] = inner["names"]
    return names


def decode_class_labels(record: dict[str, Any], names: dict[str, list[str]], where: str) -> dict[str, Any]:
    """
    Replaces the ids of a record's ClassLabel columns by the list of their names, in place.

    Raises:
        DataFileError: if an id is not one of the column's.
    """
    for column, column_names in names.items():
        value = record.get(column)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < len(column_names)]
        if wrong:
            raise DataFileError(
                f"{where}: `{column}` contains {wrong[0]}, but its {len(column_names)} classes are numbered from 0 to "
                f"{len(column_names) - 1}. Leave out documents whose labels are not known."
            )
        record[column] = [column_names[i] for i in ids]
    return record


Reader = Callable[[str, Sequence[str] | None, OnError], Records]
FORMATS: dict[str, Reader] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "txt": _read_txt,
    **published_formats.READERS,
}
