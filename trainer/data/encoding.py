"""Encodes label names as ids, and counts labels. There is no N x L matrix: labels stay lists of ids until they reach the collator."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value
from datasets import List as ListFeature

from .label_files import iterate_labels
from .label_names import normalize_label
from .messages import join_names
from .readers import expand_files
from .text_lines import DataFileError
from .tokenization import check_is_dataset


logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
ARROW_TYPES = {"labels": pa.list_(pa.string()), "label_indices": pa.list_(pa.int32()), "is_pseudo": pa.bool_()}


def _iterate_columns(dataset: AnyDataset, *columns: str) -> Iterator[tuple[pa.Array, ...]]:
    """The columns of a dataset as arrow arrays, batch by batch."""
    batches = dataset.select_columns(list(columns))
    if isinstance(dataset, Dataset):
        for table in batches.with_format("arrow").iter(batch_size=10_000):
            yield tuple(table[name].combine_chunks() for name in columns)
    else:  # column types of a stream may be unknown, and differ if a batch has only empty lists
        for batch in batches.iter(batch_size=10_000):
            yield tuple(pa.array(batch[name], ARROW_TYPES[name]) for name in columns)


def count_label_names(dataset: AnyDataset) -> tuple[Counter, int]:
    """Counts the documents of each label name in "labels", and all documents, in one pass; for streams."""
    counts: Counter = Counter()
    num_documents = 0
    for (lists,) in _iterate_columns(dataset, "labels"):
        num_documents += len(lists)
        _names(lists[0].as_py())
        for pair in lists.flatten().value_counts():
            counts[_label_name(pair["values"].as_py())] += pair["counts"].as_py()
    return counts, num_documents


def _label_name(value: object) -> str:
    if not isinstance(value, str):
        raise DataFileError(
            f"`labels` contains {value!r}, but names are needed here. Ids belong in a column `label_indices`, which needs no encoding; "
            "multi-hot rows are trained on as they are."
        )
    return normalize_label(value)


def _names(value: object) -> list:
    if not isinstance(value, (list, np.ndarray)):
        raise DataFileError(
            f"`labels` is {value!r}, but a list of label names is needed for each document. Write `['a', 'b']`; `trainer.load_documents` "
            "splits joined names."
        )
    return list(value)


def _counts(documents: AnyDataset | Counter) -> Counter:
    return documents if isinstance(documents, Counter) else count_label_names(documents)[0]


def build_label_list(train: AnyDataset | Counter, label_list_file: str | os.PathLike | None = None) -> list[str]:
    """
    The label names in a fixed order: those of `label_list_file`, in its order, or else the sorted names in `train`.

    Pass only the training documents: labels that occur only in validation or test documents cannot be learned.
    [`count_unknown_labels`] reports those.

    Args:
        train (`Dataset`, `IterableDataset` or `Counter`): training documents with "labels", or the counts of
            [`count_label_names`].
        label_list_file (`str`, *optional*): a file that [`read_labels`] reads. Labels of `train` that it lacks are left out,
            with a warning that names them.

    Raises:
        ValueError: if there are no labels, the file names one twice, or no training document has a label of the file.
    """
    counts = _counts(train)
    if not counts:
        raise DataFileError("The training documents have no labels, but at least one is needed. Check `label_column`.")
    if label_list_file is None:
        return sorted(counts)
    labels = read_label_list(label_list_file)
    _check_overlap(counts, labels, os.fspath(label_list_file))
    count_unknown_labels(counts, labels, "train")
    return labels


def read_label_list(label_list_file: str | os.PathLike) -> list[str]:
    """The label names of a file in a format that [`read_labels`] reads, in its order; duplicate names are an error."""
    (path,) = expand_files(label_list_file)
    places: dict[str, str] = {}
    for where, name, _ in iterate_labels(path):
        if name in places:
            raise DataFileError(
                f"{where}: label {name!r} already appears in {places[name].removeprefix(f'{path}, ')}. Remove one of them."
            )
        places[name] = where
    if not places:
        raise DataFileError(f"{path}: contains no labels. Write one label name per line.")
    return list(places)


def _check_overlap(counts: Counter, labels: Sequence[str], source: str) -> None:
    if counts and not any(normalize_label(name) in counts for name in labels):
        raise DataFileError(
            f"{source}: contains {join_names(labels)}, but no training document has one of them; they have {join_names(counts)}. "
            "List the names that the documents use, not codes for them."
        )


def count_unknown_labels(
    dataset: AnyDataset | Counter, labels: Sequence[str], split: str = "validation"
) -> dict[str, int]:
    """
    Counts, for every label of `dataset` that is not in `labels`, the documents that have it; warns if there are any.

    A model cannot predict them: [`encode_labels`] leaves them out, so that metrics are over the known labels.
    """
    unknown = _unknown(dataset, labels)
    if unknown:
        logger.warning(
            f"{split}: {len(unknown)} labels with {sum(unknown.values())} assignments are not among the {len(labels)} labels of "
            f"the model and are left out: {_with_counts(unknown)}."
        )
    return unknown


def check_training_labels(train: AnyDataset | Counter, labels: Sequence[str]) -> None:
    """
    Checks that the labels of a model which is trained further cover the training documents.

    A label that the model does not know would be left out, and its documents would be used as negatives for all other labels.

    Args:
        train (`Dataset`, `IterableDataset` or `Counter`): training documents with "labels", or their counts.
        labels (`Sequence[str]`): the label names of the model.

    Raises:
        ValueError: if a training document has another label.
    """
    unknown = _unknown(train, labels)
    if unknown:
        raise DataFileError(
            f"train: {len(unknown)} labels with {sum(unknown.values())} assignments are not among the {len(labels)} labels of the "
            f"model: {_with_counts(unknown)}. Add them with `model.add_labels`, or list the model's labels in a label list file to "
            "leave the others out."
        )


def _unknown(dataset: AnyDataset | Counter, labels: Sequence[str]) -> dict[str, int]:
    known = {normalize_label(name) for name in labels}
    return {name: count for name, count in _counts(dataset).most_common() if name not in known}


def _with_counts(unknown: Mapping[str, int]) -> str:
    examples = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:5])
    return examples + (" ..." if len(unknown) > 5 else "")


def _encode_batch(batch: dict[str, list], label2id: dict[str, int]) -> dict[str, list]:
    return {
        "label_indices": [
            sorted({label2id[name] for name in map(_label_name, _names(names)) if name in label2id})
            for names in batch["labels"]
        ]
    }


def encode_labels(dataset: Any, label2id: Mapping[str, int], num_proc: int | None = None) -> Any:
    """
    Replaces the column "labels" (names) by "label_indices": each document's sorted, distinct label ids. Of a `DatasetDict`, in each split.

    "labels" is removed because a column of that name would be taken for the multi-hot target. Names not in `label2id` are
    left out ([`count_unknown_labels`] reports them). The lists are made dense only in `SepMldcDataCollator`.

    Raises:
        ValueError: if "labels" holds ids or multi-hot rows instead of names, or the documents are not a dataset.
    """
    if isinstance(dataset, dict):
        return type(dataset)({split: encode_labels(one, label2id, num_proc) for split, one in dataset.items()})
    check_is_dataset(dataset)
    features = None
    if dataset.features is not None:
        kept = {name: feature for name, feature in dataset.features.items() if name != "labels"}
        features = Features({**kept, "label_indices": ListFeature(Value("int32"))})
    keywords = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Encoding labels"}
    return dataset.map(
        _encode_batch,
        batched=True,
        fn_kwargs={"label2id": {normalize_label(name): i for name, i in label2id.items()}},
        remove_columns=["labels"],
        features=features,
        **keywords,
    )


def label_counts(dataset: AnyDataset, num_labels: int) -> np.ndarray:
    """
    The number of real documents per label, from "label_indices". Propensities, tail labels and the initial bias are based on it.

    Returns:
        `np.ndarray` of shape `(num_labels,)`, int64; documents with "is_pseudo" are not counted.
    """
    counts: np.ndarray = np.zeros(num_labels, dtype=np.int64)
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
