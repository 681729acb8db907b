"""Reads and checks documents from files or from a dataset on the Hub, and returns Arrow tables."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
)
from datasets import List as ListFeature
from datasets.exceptions import DatasetGenerationError

from ..files import atomic_write
from .bad_rows import MAX_LISTED, BadRows
from .columns import Columns
from .messages import join_names
from .readers import Records, decode_class_labels, expand_files, read_column_names, read_records, signatures
from .text_lines import DataFileError, display_name, is_regular


AnyDataset: TypeAlias = Dataset | IterableDataset
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# Part of the cache key of loaded files. Increase it when the same file should give a different table than before.
READER_VERSION = 2


def _documents(records: Records, columns: Columns, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
    for where, record in records:
        try:
            document = columns.normalize(record, where)
        except DataFileError as error:
            bad_rows.add(error)
        else:
            yield document


def _generate(
    files: list[tuple[str, tuple]], data_format: str, columns: Columns, bad_rows: BadRows, version: int
) -> Iterator[dict[str, Any]]:
    bad_rows.was_used, empty = True, True
    for path, _ in files:
        for document in _documents(read_records(path, data_format, columns.used, bad_rows.add), columns, bad_rows):
            empty = False
            yield document
    bad_rows.finish()
    if empty:
        raise _no_documents(join_names(path for path, _ in files))


def _check_columns(paths: list[str], data_format: str, columns: Columns) -> Columns:
    for path in paths:
        found = read_column_names(path, data_format)
        if found is None:
            raise _no_documents(path)
        where, names = found
        checked = columns.check(names, where)
        columns = checked if path == paths[0] else columns
    return columns


def _no_documents(where: str) -> DataFileError:
    return DataFileError(f"{where}: contains no documents. Specify a file with at least one.")


def _load_once(path: str, split: str, columns: Columns, data_format: str, bad_rows: BadRows) -> Dataset:
    """Documents from inputs that can be read only once (standard input, a pipe), kept in memory instead of the cache."""
    records = read_records(path, data_format, on_error=bad_rows.add)
    where, first = next(records, (path, None))
    if first is None:
        raise _no_documents(display_name(path))
    columns = columns.check(list(first), where)
    documents = list(_documents(itertools.chain([(where, first)], records), columns, bad_rows))
    bad_rows.finish()
    return Dataset.from_list(documents, features=columns.features, split=split)


def load_files(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    split: str,
    columns: Columns,
    data_format: str,
    cache_dir: str | None,
    streaming: bool,
    bad_rows: BadRows,
) -> AnyDataset:
    paths = expand_files(files)
    if not all(map(is_regular, paths)):
        if len(paths) > 1 or streaming:
            raise ValueError(
                f"{join_names(map(display_name, paths))} cannot be read twice, so it can neither be streamed nor combined with other "
                "files. Write it to a file first."
            )
        dataset = _load_once(paths[0], split, columns, data_format, bad_rows)
    else:
        columns = _check_columns(paths, data_format, columns)
        dataset = _load_regular_files(paths, split, columns, data_format, cache_dir, streaming, bad_rows)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise _no_documents(join_names(paths))
    return dataset


def _load_regular_files(
    paths: list[str],
    split: str,
    columns: Columns,
    data_format: str,
    cache_dir: str | None,
    streaming: bool,
    bad_rows: BadRows,
) -> AnyDataset:
    # `_generate` gets sizes and times of the files only so that a changed file is not read from the cache.
    keywords: dict[str, Any] = {
        "files": [(path, signatures(path, data_format)) for path in paths],
        "data_format": data_format,
        "columns": columns,
        "bad_rows": bad_rows,
        "version": READER_VERSION,
    }
    if streaming:
        return IterableDataset.from_generator(_generate, features=columns.features, gen_kwargs=keywords, split=split)
    try:
        dataset = Dataset.from_generator(
            _generate, features=columns.features, gen_kwargs=keywords, split=split, cache_dir=cache_dir
        )
    except DatasetGenerationError as error:
        # datasets wraps errors of a generator; the cause has the helpful message
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    if bad_rows.on_bad_rows == "skip" and not bad_rows.was_used:  # read from the cache: find the bad rows again
        for _ in _generate(**keywords):
            pass
    return dataset


def _normalize_dataset(
    dataset: AnyDataset, where: str, columns: Columns, num_proc: int | None, bad_rows: BadRows
) -> AnyDataset:
    available = dataset.column_names or list(next(iter(dataset), {}))
    if not available or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise DataFileError(f"{where}: contains no documents. Specify a dataset with at least one in each split.")
    columns = columns.check(available, where)
    names = {name: labels for name, labels in _class_label_names(dataset.features).items() if name == columns.labels}
    dataset = dataset.select_columns(columns.used)
    keywords: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        keywords = {"num_proc": num_proc, "desc": f"Reading {where}"}
        if bad_rows.on_bad_rows == "skip":  # one process and no cache, so that bad rows are counted here
            keywords |= {"num_proc": None, "load_from_cache_file": False}
    dataset = dataset.map(
        _normalize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"columns": columns, "names": names, "where": where, "bad_rows": bad_rows},
        remove_columns=columns.used,
        features=columns.features,
        **keywords,
    )
    bad_rows.finish()
    return dataset


def _class_label_names(features: Features | None) -> dict[str, list[str]]:
    """The names of every column that is a ClassLabel or a list of them."""
    names = {}
    for column, feature in (features or {}).items():
        inner = feature.feature if isinstance(feature, ListFeature) else feature
        if isinstance(inner, ClassLabel):
            names[column] = inner.names
    return names


def _normalize_batch(
    batch: dict[str, list],
    indices: list[int],
    columns: Columns,
    names: dict[str, list[str]],
    where: str,
    bad_rows: BadRows,
) -> dict[str, list]:
    rows = []
    for index, values in zip(indices, zip(*batch.values())):
        position = f"{where}, row {index + 1}"
        try:
            record = decode_class_labels(dict(zip(batch, values)), names, position)
            rows.append(columns.normalize(record, position))
        except DataFileError as error:
            bad_rows.add(error)
    if bad_rows.on_bad_rows == "error":
        bad_rows.finish()
    return {name: [row[name] for row in rows] for name in columns.features}


def load_splits(
    train_file: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    validation_file: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    test_file: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_columns: str | Sequence[str] = ("text",),
    label_column: str | Sequence[str] | None = "labels",
    id_column: str | None = None,
    label_delimiter: str | None = None,
    data_format: str = "auto",
    text_separator: str = " ",
    cache_dir: str | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    on_bad_rows: str = "error",
    bad_rows_file: str | os.PathLike | None = None,
) -> DatasetDict | IterableDatasetDict:
    r"""
    Loads documents and their labels from local files or from a dataset of the Hub, checking every document once.

    Local files are read line by line and written to the Arrow cache, which is reused if the file has not changed; with streaming,
    they are read again each time. Label names are stripped and normalized to Unicode NFC. Duplicate labels of a document count once,
    and an empty list of labels is allowed.

    Args:
        train_file, validation_file, test_file (`str` or list of `str`):
            Files or glob patterns: .csv, .tsv, .json, .jsonl, .parquet or .txt (one document per line), each also with .gz or
            .zst; "-" is standard input.
        dataset_name, dataset_config_name (`str`):
            Instead of files, a dataset for `datasets.load_dataset`; its splits train, validation (also valid, val,
            dev) and test are taken.
        text_columns (`str` or sequence of `str`):
            The columns with the text; several are joined by `text_separator`, empty ones left out.
        label_column (`str`, sequence of `str` or `None`):
            A single column contains a list of names, the string representation of a Python list, names joined by
            `label_delimiter`, or ClassLabel ids. Several columns are multi-hot: each is a label with values 0 or 1. `None` reads
            documents without labels.
        id_column (`str`, *optional*): The column with the documents' ids; by default "id", if there is one.
        data_format (`str`):
            By default that of the file's extension. "aapd" (SGM's text_train and label_train), "rcv1" (LYRL2004 token
            files and rcv1-v2.topics.qrels) and "eurlex" (train_raw_texts.txt and train_labels.txt) find the labels'
            file next to it.
        streaming (`bool`): Return iterable datasets, which are read lazily; bad rows are found when they are reached.
        on_bad_rows (`"error"` or `"skip"`): "error" raises an error that lists the first twenty bad rows of a split; "skip"
            skips them and logs their number.
        bad_rows_file (`str`, *optional*): A JSON Lines file for the rows that are skipped, `{"split", "problem"}`; not with
            `streaming`.

    Returns:
        A dictionary of the requested splits, with the columns "id" (if there are ids), "text" and "labels" (list of
        names).

    Raises:
        DataFileNotFoundError: if a file does not exist. It is a `FileNotFoundError`.
        DataFileError: if a column is missing or a row is bad, with file, line, rule and remedy. It is a `ValueError`.
        ValueError: if arguments contradict each other.
    """
    files = {name: f for name, f in (("train", train_file), ("validation", validation_file), ("test", test_file)) if f}
    if bool(files) == bool(dataset_name):
        raise ValueError(
            f"dataset_name is {dataset_name!r} and the files are {files}, but one source is needed. Name either a "
            "dataset or files."
        )
    columns = make_columns(text_columns, label_column, id_column, label_delimiter, text_separator)
    if bad_rows_file is not None and (streaming or on_bad_rows != "skip"):
        raise ValueError(
            f'`bad_rows_file` is {os.fspath(bad_rows_file)!r}, but it is written only with `on_bad_rows="skip"` and without '
            "`streaming`. Leave it out, or change these."
        )
    container = IterableDatasetDict if streaming else DatasetDict
    with atomic_write(bad_rows_file) if bad_rows_file else contextlib.nullcontext() as file:

        def bad_rows(split: str) -> BadRows:
            return BadRows(on_bad_rows, split, file, max_listed=1 if streaming else MAX_LISTED)

        if files:
            return container(
                {
                    split: load_files(paths, split, columns, data_format, cache_dir, streaming, bad_rows(split))
                    for split, paths in files.items()
                }
            )
        return container(
            {
                split: _normalize_dataset(dataset, f"{dataset_name}, split {name}", columns, num_proc, bad_rows(split))
                for split, (name, dataset) in _hub_splits(
                    str(dataset_name), dataset_config_name, cache_dir, streaming
                ).items()
            }
        )


def make_columns(
    text_columns: str | Sequence[str],
    label_column: str | Sequence[str] | None,
    id_column: str | None,
    label_delimiter: str | None,
    text_separator: str,
) -> Columns:
    """
    [`Columns`] of the arguments of [`load_splits`].

    Raises:
        ValueError: if one is empty.
    """
    columns = Columns(
        (text_columns,) if isinstance(text_columns, str) else tuple(text_columns),
        label_column if label_column is None or isinstance(label_column, str) else tuple(label_column),
        id_column,
        label_delimiter,
        text_separator,
    )
    if not columns.text or columns.labels == () or label_delimiter == "":
        raise ValueError(
            f"`text_columns` is {text_columns!r}, `label_column` {label_column!r} and `label_delimiter` {label_delimiter!r}, but "
            "none may be empty. Specify at least one column, and leave the delimiter out if labels are lists."
        )
    return columns


def _hub_splits(name: str, config: str | None, cache_dir: str | None, streaming: bool) -> dict[str, tuple[str, Any]]:
    loaded = load_dataset(name, config, cache_dir=cache_dir, streaming=streaming)
    splits = {SPLIT_NAMES[split]: (split, loaded[split]) for split in loaded if split in SPLIT_NAMES}
    if not splits:
        raise DataFileError(
            f"{name}: has the splits {join_names(loaded)}, but train, validation or test is needed. Use its files."
        )
    return splits
