"""
Documents in, arrow tables out: loads and checks documents, learns the labels from the training documents, reads label
descriptions and pseudo-documents, encodes labels and tokenizes. Nothing here is N x L: labels stay lists of ids until
the collator.
"""

import difflib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets import List as ListFeature
from datasets.exceptions import DatasetGenerationError

from .columns import Columns
from .document_files import (
    class_label_names,
    expand_files,
    join_names,
    read_records,
    signatures,
)
from .label_descriptions import load_label_descriptions


__all__ = [
    "add_pseudo_documents",
    "build_label_list",
    "count_label_names",
    "count_unknown_labels",
    "encode_labels",
    "label_counts",
    "load_label_descriptions",
    "load_pseudo_documents",
    "load_splits",
    "num_real_documents",
    "tokenize",
]

logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# Part of the cache key of loaded files: raise it when the same file should give another table than before.
READER_VERSION = 1


def _generate(
    files: list[tuple[str, tuple]], data_format: str, columns: Columns, version: int
) -> Iterator[dict[str, Any]]:
    for path, _ in files:
        for where, record in read_records(path, data_format):
            yield columns.normalize(record, where)


def _load_files(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    split: str,
    columns: Columns,
    data_format: str,
    cache_dir: str | None,
    streaming: bool,
) -> AnyDataset:
    paths = expand_files(files)
    for path in paths:
        where, first = next(read_records(path, data_format), (path, None))
        if first is None:
            raise ValueError(f"{path}: holds no documents. Name a file with at least one.")
        checked = columns.check(list(first), where)
        columns = checked if path == paths[0] else columns
    # `_generate` sees sizes and times of the files only so that a changed file is not taken from the cache.
    keywords = {
        "files": [(path, signatures(path, data_format)) for path in paths],
        "data_format": data_format,
        "columns": columns,
        "version": READER_VERSION,
    }
    if streaming:
        return IterableDataset.from_generator(_generate, features=columns.features, gen_kwargs=keywords, split=split)
    try:
        return Dataset.from_generator(
            _generate, features=columns.features, gen_kwargs=keywords, split=split, cache_dir=cache_dir
        )
    except DatasetGenerationError as error:
        # datasets wraps what a generator raises; the cause is the sentence that helps
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def _normalize_dataset(dataset: AnyDataset, where: str, columns: Columns, num_proc: int | None) -> AnyDataset:
    available = dataset.column_names or list(next(iter(dataset), {}))
    if not available or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{where}: holds no documents. Name a data set with at least one in each split.")
    columns = columns.check(available, where)
    labels = (columns.labels,) if isinstance(columns.labels, str) else columns.labels or ()
    used = list(dict.fromkeys([*([columns.id] if columns.id else []), *columns.text, *labels]))
    names = {
        name: of for name, of in class_label_names(dataset.features).items() if name in used and name == columns.labels
    }
    dataset = dataset.select_columns(used)
    keywords = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": f"Reading {where}"}
    return dataset.map(
        columns.normalize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"names": names, "where": where},
        remove_columns=used,
        features=columns.features,
        **keywords,
    )


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
) -> DatasetDict | IterableDatasetDict:
    r"""
    Loads documents and their labels from local files or from a data set of the Hub, checking every document once.

    Local files are read line by line and written to the arrow cache, where an unchanged file is found again; streaming
    reads them anew each time. Label names are stripped of surrounding blanks, a label that a document names twice
    counts once, and an empty list of labels is allowed.

    Args:
        train_file, validation_file, test_file (`str` or list of `str`):
            Files or glob patterns: .csv, .tsv, .json, .jsonl or .parquet, each also with .gz or .zst.
        dataset_name, dataset_config_name (`str`):
            Instead of files, a data set for `datasets.load_dataset`; its splits train, validation (also valid, val,
            dev) and test are taken.
        text_columns (`str` or sequence of `str`):
            The columns with the text; several are joined by `text_separator`, empty ones left out.
        label_column (`str`, sequence of `str` or `None`):
            One column holds a list of names, a string joined by `label_delimiter`, or ClassLabel ids. Several columns
            are multi-hot: each is a label, its values are 0 or 1. `None` reads unlabelled documents.
        id_column (`str`, *optional*): The column with the documents' ids; a column "id" is taken by itself.
        data_format (`str`):
            "auto" goes by the file's extension. "aapd" (SGM's text_train and label_train), "rcv1" (LYRL2004 token
            files and rcv1-v2.topics.qrels) and "eurlex" (train_raw_texts.txt and train_labels.txt) find the labels'
            file beside the one named.
        streaming (`bool`): Return iterable data sets that read as they go; a bad document is then met when it
            is reached.

    Returns:
        A dictionary of the splits asked for, with the columns "id" (if there are ids), "text" and "labels" (list of
        names).

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a column is missing or a document is bad, with file, line, rule and remedy.
    """
    files = {name: f for name, f in (("train", train_file), ("validation", validation_file), ("test", test_file)) if f}
    if bool(files) == bool(dataset_name):
        raise ValueError(
            f"dataset_name is {dataset_name!r} and the files are {files}, but one source is needed. Name either a "
            "data set or files."
        )
    columns = Columns(
        (text_columns,) if isinstance(text_columns, str) else tuple(text_columns),
        label_column if label_column is None or isinstance(label_column, str) else tuple(label_column),
        id_column,
        label_delimiter,
        text_separator,
    )
    if not columns.text or columns.labels == () or label_delimiter == "":
        raise ValueError(
            f"text_columns is {text_columns!r}, label_column {label_column!r} and label_delimiter "
            f"{label_delimiter!r}, but none may be "
            "empty. Name at least one column, and leave the delimiter out if labels are lists."
        )
    container = IterableDatasetDict if streaming else DatasetDict
    if files:
        return container({s: _load_files(f, s, columns, data_format, cache_dir, streaming) for s, f in files.items()})

    loaded = load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir, streaming=streaming)
    splits = {SPLIT_NAMES[name]: name for name in loaded if name in SPLIT_NAMES}
    if not splits:
        raise ValueError(
            f"{dataset_name}: has the splits {join_names(loaded)}, but train, validation or test is needed. Use its "
            "files."
        )
    return container(
        {
            split: _normalize_dataset(loaded[name], f"{dataset_name}, split {name}", columns, num_proc)
            for split, name in splits.items()
        }
    )


ARROW_TYPES = {"labels": pa.list_(pa.string()), "label_indices": pa.list_(pa.int32()), "is_pseudo": pa.bool_()}


def _iterate_columns(dataset: AnyDataset, *columns: str) -> Iterator[tuple[pa.Array, ...]]:
    """The columns of a data set as arrow arrays, batch by batch."""
    batches = dataset.select_columns(list(columns))
    if isinstance(dataset, Dataset):
        for table in batches.with_format("arrow").iter(batch_size=10_000):
            yield tuple(table[name].combine_chunks() for name in columns)
    else:  # the types of a stream may be unknown, and differ where a batch has empty lists only
        for batch in batches.iter(batch_size=10_000):
            yield tuple(pa.array(batch[name], ARROW_TYPES[name]) for name in columns)


def count_label_names(dataset: AnyDataset) -> tuple[Counter, int]:
    """The number of documents of every label name in "labels", and of documents, in one pass: for streams."""
    counts: Counter = Counter()
    num_documents = 0
    for (lists,) in _iterate_columns(dataset, "labels"):
        num_documents += len(lists)
        for pair in lists.flatten().value_counts():
            counts[pair["values"].as_py()] += pair["counts"].as_py()
    return counts, num_documents


def _count_names(dataset: AnyDataset) -> Counter:
    return count_label_names(dataset)[0]


def build_label_list(train: AnyDataset | Counter, label_list_file: str | os.PathLike | None = None) -> list[str]:
    """
    The label names in a fixed order: those of `label_list_file` (one a line, kept in its order) or else the sorted
    names in `train`, which may also be the counts of [`count_label_names`].

    Give it the training documents only: what validation or test alone have seen is not learnt. `count_unknown_labels`
    reports it.

    Raises:
        ValueError: if there are no labels, or the file names one twice.
    """
    if label_list_file is None:
        labels = sorted(train if isinstance(train, Counter) else _count_names(train))
        if not labels:
            raise ValueError(
                "The training documents have no labels, but at least one is needed. Check `--label_column`."
            )
        return labels
    lines: dict[str, int] = {}
    (path,) = expand_files(label_list_file)
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            name = line.strip()
            if name in lines:
                raise ValueError(
                    f"{path}, line {number}: label {name!r} already stands in line {lines[name]}. Remove one of them."
                )
            if name:
                lines[name] = number
    if not lines:
        raise ValueError(f"{path}: holds no labels. Write one label name a line.")
    return list(lines)


def count_unknown_labels(dataset: AnyDataset, labels: Sequence[str], split: str = "validation") -> dict[str, int]:
    """
    Counts, for every label of `dataset` that is not in `labels`, the documents that have it; warns if there are any.

    A model cannot predict them: `encode_labels` leaves them out, so that metrics are over the known labels.
    """
    known = set(labels)
    unknown = {name: count for name, count in _count_names(dataset).most_common() if name not in known}
    if unknown:
        examples = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:5])
        logger.warning(
            f"{split}: {len(unknown)} labels with {sum(unknown.values())} assignments are not among the {len(known)} "
            "labels learnt from the "
            f"training documents and are left out: {examples}{' ...' if len(unknown) > 5 else ''}."
        )
    return unknown


def load_pseudo_documents(path: str | os.PathLike, labels: Sequence[str], cache_dir: str | None = None) -> Dataset:
    """
    Reads documents that a language model wrote for tail labels (Eq. 3-4), with the columns "text" and "labels".

    Returns:
        A data set with the columns "text", "labels" and "is_pseudo" (always `True`).

    Raises:
        ValueError: if a document is bad or has a label that is not in `labels`.
    """
    known = set(labels)
    columns = Columns()
    (path,) = expand_files(path)
    for where, record in read_records(path):
        names = columns.check(list(record), where).normalize(record, where)["labels"]
        unknown = [name for name in names if name not in known]
        if unknown:
            close = difflib.get_close_matches(unknown[0], labels, n=1, cutoff=0.0)
            hint = f" The closest is {close[0]!r}." if close else ""
            raise ValueError(
                f"{where}: the training documents have no label {unknown[0]!r}.{hint} pseudo-documents carry the labels "
                "of a training "
                "document: correct the name or remove the sample."
            )
    dataset = _load_files(path, "train", columns, "auto", cache_dir, streaming=False).select_columns(
        ["text", "labels"]
    )
    return _add_constant(dataset, "is_pseudo", True)


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


def _encode_batch(batch: dict[str, list], label2id: dict[str, int]) -> dict[str, list]:
    return {
        "label_indices": [sorted({label2id[name] for name in names if name in label2id}) for names in batch["labels"]]
    }


def encode_labels(dataset: AnyDataset, label2id: Mapping[str, int], num_proc: int | None = None) -> AnyDataset:
    """
    Replaces the column "labels" (names) by "label_indices": each document's sorted, distinct label ids.

    "labels" goes because a column of that name would be taken for the multi-hot target. Names not in `label2id` are
    left out (`count_unknown_labels` reports them). The lists are made dense only in `SepMldcDataCollator`.
    """
    features = None
    if dataset.features is not None:
        kept = {name: feature for name, feature in dataset.features.items() if name != "labels"}
        features = Features({**kept, "label_indices": ListFeature(Value("int32"))})
    keywords = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Encoding labels"}
    return dataset.map(
        _encode_batch,
        batched=True,
        fn_kwargs={"label2id": dict(label2id)},
        remove_columns=["labels"],
        features=features,
        **keywords,
    )


def label_counts(dataset: AnyDataset, num_labels: int) -> np.ndarray:
    """
    The number of real documents of every label, from "label_indices": what propensities, tail labels and the prior
    bias are based on.

    Returns:
        `np.ndarray` of shape `(num_labels,)`, int64; documents with "is_pseudo" are not counted.
    """
    counts = np.zeros(num_labels, dtype=np.int64)
    marked = "is_pseudo" in (dataset.column_names or [])
    for lists, *pseudo in _iterate_columns(dataset, "label_indices", *(["is_pseudo"] if marked else [])):
        if marked:
            lists = lists.filter(pc.invert(pseudo[0]))
        counts += np.bincount(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64), minlength=num_labels)
    return counts


def num_real_documents(dataset: AnyDataset) -> int:
    """The number of documents that are not pseudo-documents: N of the propensities."""
    if "is_pseudo" in (dataset.column_names or []):
        return sum(pc.sum(pc.invert(pseudo)).as_py() or 0 for (pseudo,) in _iterate_columns(dataset, "is_pseudo"))
    return len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in dataset)


def _tokenize_batch(batch: dict[str, list], tokenizer: Any, max_length: int, text_column: str) -> dict[str, list]:
    encoded = tokenizer(batch[text_column], truncation=True, max_length=max_length, verbose=False)
    return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}


def tokenize(
    dataset: AnyDataset,
    tokenizer: Any,
    max_length: int | None = None,
    num_proc: int | None = None,
    text_column: str = "text",
    batch_size: int = 1000,
) -> AnyDataset:
    """
    Replaces the text by its tokens, truncated but not padded, and adds "length" (tokens) to group documents by.

    The result is cached: the same documents, tokenizer and length are not tokenized again, in this process or another.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the backbone.
        max_length (`int`, *optional*): The longest document in tokens, special tokens included; by default, and at
            most, the tokenizer's `model_max_length`.
        num_proc (`int`, *optional*): Processes; not used when streaming.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"max_length is {max_length}, but a document needs at least one token. Use a positive number or None."
        )
    if max_length is not None and max_length > tokenizer.model_max_length:
        logger.warning(
            f"max_length is {max_length}, but the model takes {tokenizer.model_max_length} tokens: documents are cut "
            "there."
        )
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    keywords = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Tokenizing"}
    return dataset.map(
        _tokenize_batch,
        batched=True,
        batch_size=batch_size,
        fn_kwargs={"tokenizer": tokenizer, "max_length": limit, "text_column": text_column},
        remove_columns=[text_column],
        **keywords,
    )
