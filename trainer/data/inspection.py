"""A one-page report on the documents before training, with statistics and likely problems."""

import dataclasses
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset

from .columns import Columns
from .label_names import normalize_label
from .loading import make_columns
from .messages import join_names, shorten
from .near_duplicates import duplicate_groups, signature, text_key
from .readers import expand_files, read_records
from .text_lines import DataFileError


Source: TypeAlias = str | os.PathLike | Sequence[str | os.PathLike] | Dataset | IterableDataset
QUANTILES = (0, 0.25, 0.5, 0.75, 0.95, 1)
MISSING_NAMES = {"nan", "none", "null", "na", "n/a", "nil", "-", "?", "unknown", "undefined", "<na>", "#n/a"}
NEAR_DUPLICATE_LIMIT = 200_000  # maximum number of documents to search for near-duplicates: 50 MB of signatures
LENGTH_SAMPLE = 10_000  # maximum number of documents to tokenize for length statistics
MAX_LISTED = 20
COMMON = 0.95  # a label on at least this share of the documents is reported as too common


@dataclass
class SplitReport:
    """
    Statistics of one split. Numbers count documents unless stated otherwise.

    Args:
        documents: valid rows, including documents without text.
        bad_rows: invalid rows; `first_bad_rows` lists the first twenty.
        empty: documents without text.
        unlabeled: documents without labels.
        duplicates: documents with the same words as an earlier document of the split.
        near_duplicates: documents that share most of their three-word runs with another one, duplicates included.
        duplicate_ids: documents with the same id as an earlier one.
        labels_per_document: quantiles 0, 0.25, 0.5, 0.75, 0.95 and 1.
        mean_labels: mean number of labels of a document.
        label_counts: documents per label name.
        lengths: tokens of each of a random sample of documents (words without a tokenizer).
    """

    documents: int = 0
    bad_rows: int = 0
    first_bad_rows: list[str] = field(default_factory=list)
    empty: int = 0
    unlabeled: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    duplicate_ids: int = 0
    labels_per_document: list[float] = field(default_factory=list)
    mean_labels: float = 0.0
    label_counts: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def length_quantiles(self) -> list[float]:
        return _quantiles(self.lengths)


@dataclass
class DataReport:
    """
    The result of [`inspect_documents`]; `print` shows it as a one-page report.

    Args:
        splits: a [`SplitReport`] per split.
        overlap: `"train, test"` → documents of the second split with the same words as a document of the first.
        near_overlap: the same, near-duplicates included.
        label_quantiles: quantiles 0, 0.25, 0.5, 0.75, 0.95 and 1 of the training documents per label.
        single_labels: number of labels with one training document.
        common_labels: labels that at least 95% of twenty or more training documents have.
        alike_labels: groups of labels that differ only in case or whitespace.
        missing_labels: labels that look like a missing value ("NaN", "none").
        joined_labels: labels that contain a semicolon, a vertical bar or a tab, or consist of several labels joined by a comma or slash.
        unseen_labels: split → label → documents, for labels that no training document has.
        max_length: number of tokens to which documents are truncated.
        unit: "tokens", or "words" without a tokenizer.
        near_duplicate_documents: maximum number of documents per split that were searched for near-duplicates.
    """

    splits: dict[str, SplitReport]
    overlap: dict[str, int] = field(default_factory=dict)
    near_overlap: dict[str, int] = field(default_factory=dict)
    label_quantiles: list[float] = field(default_factory=list)
    single_labels: int = 0
    common_labels: list[str] = field(default_factory=list)
    alike_labels: list[list[str]] = field(default_factory=list)
    missing_labels: list[str] = field(default_factory=list)
    joined_labels: list[str] = field(default_factory=list)
    unseen_labels: dict[str, dict[str, int]] = field(default_factory=dict)
    max_length: int | None = None
    unit: str = "words"
    near_duplicate_documents: int = NEAR_DUPLICATE_LIMIT

    @property
    def share_cut(self) -> float | None:
        """Share of training documents that are longer than `max_length`; None without `max_length` or tokenizer."""
        lengths = self.splits["train"].lengths
        if self.max_length is None or self.unit != "tokens" or not lengths:
            return None
        return float(np.mean(np.asarray(lengths) > self.max_length))

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, without the counts of all labels and the lengths of all documents."""
        report = dataclasses.asdict(self)
        for name, split in report["splits"].items():
            split["labels"] = len(split.pop("label_counts"))
            split["lengths"] = self.splits[name].length_quantiles()
        return {**report, "share_cut": self.share_cut}

    def __str__(self) -> str:
        return "\n".join(_page(self))


def inspect_documents(
    train: Source,
    validation: Source | None = None,
    test: Source | None = None,
    text_columns: str | Sequence[str] = ("text",),
    label_column: str | Sequence[str] | None = "labels",
    label_delimiter: str | None = None,
    id_column: str | None = None,
    data_format: str = "auto",
    text_separator: str = " ",
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    near_duplicates: bool = True,
    seed: int = 0,
) -> DataReport:
    """
    Reports on documents without loading them into memory. Bad rows are counted instead of raising an error.

    Files are streamed; 16 bytes per document stay in memory. The first 200,000 documents of each split are searched for near-duplicates
    (50 MB), and lengths are measured on a random sample of 10,000 documents.

    Args:
        train, validation, test: files (see [`load_splits`]), or datasets with "text" and "labels" (names) or "label_indices".
        labels (`Sequence[str]`, *optional*): label names of datasets with "label_indices".
        tokenizer (`PreTrainedTokenizerBase`, *optional*): counts tokens; without one, words are counted.
        max_length (`int`, *optional*): number of tokens to which documents will be truncated.
        near_duplicates (`bool`): whether to search for near-duplicates, which takes about 0.2 ms per document.

    The other arguments are those of [`load_splits`].

    Returns:
        [`DataReport`]

    Raises:
        DataFileError: if a file cannot be read at all, lacks a column or contains no rows.

    Example:

    ```python
    print(inspect_documents("train.csv", test="test.csv", label_delimiter=";"))
    ```
    """
    columns = make_columns(text_columns, label_column, id_column, label_delimiter, text_separator)
    sources = {"train": train, "validation": validation, "test": test}
    scans = {}
    for split, source in sources.items():
        if source is not None:
            scan = _Scan(near_duplicates, tokenizer, seed)
            scan.read(_records(source, columns, data_format, labels, scan.add_bad_row), split)
            scans[split] = scan
    report = DataReport({split: scan.finish() for split, scan in scans.items()})
    report.max_length, report.unit = max_length, "tokens" if tokenizer is not None else "words"
    _compare_splits(report, scans, near_duplicates)
    _find_label_problems(report)
    return report


Row = tuple[str, dict[str, Any], Columns]


def _records(
    source: Source, columns: Columns, data_format: str, labels: Sequence[str] | None, on_error: Callable
) -> Iterator[Row]:
    if not isinstance(source, (Dataset, IterableDataset)):
        for path in expand_files(source):
            checked: Columns | None = None
            for where, record in read_records(path, data_format, on_error=on_error):
                checked = checked or columns.check(list(record), where)
                yield where, record, checked
        return
    for number, record in enumerate(source, start=1):
        if "labels" not in record and "label_indices" in record:
            ids = record["label_indices"]
            record = {**record, "labels": [labels[i] if labels is not None else str(i) for i in ids]}
        own = Columns(labels="labels" if "labels" in record else None).check(list(record), f"row {number}")
        yield f"row {number}", record, own


class _Scan:
    """One pass over a split: counts, one number per document for duplicates, and a sample of texts for lengths."""

    def __init__(self, near_duplicates: bool, tokenizer: Any, seed: int) -> None:
        self.report = SplitReport()
        self.keys = array("Q")  # 8 bytes per document
        self.signatures: list[np.ndarray] = []
        self._near_duplicates, self._tokenizer = near_duplicates, tokenizer
        self._rng = np.random.default_rng(seed)
        self._sample: list[str] = []
        self._label_counts: Counter = Counter()
        self._cardinalities: Counter = Counter()
        self._ids = array("q")

    def read(self, rows: Iterator[Row], split: str) -> None:
        for where, record, columns in rows:
            try:
                self._add(record, where, columns)
            except DataFileError as error:
                self.add_bad_row(error)
        if self.report.documents == 0 and self.report.bad_rows == 0:
            raise DataFileError(f"{split}: contains no documents. Specify a file with at least one.")

    def add_bad_row(self, error: DataFileError) -> None:
        self.report.bad_rows += 1
        if self.report.bad_rows <= MAX_LISTED:
            self.report.first_bad_rows.append(str(error))

    def _add(self, record: Mapping[str, Any], where: str, columns: Columns) -> None:
        text = columns.text_of(record, where)
        labels = columns.labels_of(record, where)
        if not text:
            self.report.empty += 1
        else:
            self._add_text(text)
        self.report.documents += 1
        if labels is not None:
            self._label_counts.update(labels)
            self._cardinalities[len(labels)] += 1
        if columns.id and record.get(columns.id) is not None:
            self._ids.append(hash(str(record[columns.id])))

    def _add_text(self, text: str) -> None:
        self.keys.append(text_key(text))
        if self._near_duplicates and len(self.signatures) < NEAR_DUPLICATE_LIMIT:
            self.signatures.append(signature(text))
        if len(self._sample) < LENGTH_SAMPLE:
            self._sample.append(text)
        elif (place := int(self._rng.integers(len(self.keys)))) < LENGTH_SAMPLE:
            self._sample[place] = text

    def finish(self) -> SplitReport:
        report = self.report
        report.duplicates = len(self.keys) - len(np.unique(self.keys))
        report.duplicate_ids = len(self._ids) - len(np.unique(self._ids))
        if self.signatures:
            _, sizes = np.unique(duplicate_groups(np.stack(self.signatures)), return_counts=True)
            report.near_duplicates = int(sizes[sizes > 1].sum())
        report.unlabeled = self._cardinalities[0]
        report.label_counts = dict(self._label_counts)
        numbers: Any = (
            np.repeat(list(self._cardinalities), list(self._cardinalities.values())) if self._cardinalities else []
        )
        report.labels_per_document = _quantiles(numbers)
        report.mean_labels = float(np.mean(numbers)) if len(numbers) else 0.0
        report.lengths = list(self._lengths())
        self._sample = []
        return report

    def _lengths(self) -> Iterator[int]:
        for start in range(0, len(self._sample), 1000):
            texts = self._sample[start : start + 1000]
            if self._tokenizer is None:
                yield from (len(text.split()) for text in texts)
            else:
                yield from map(len, self._tokenizer(texts, truncation=False, verbose=False)["input_ids"])


def _quantiles(numbers: Any) -> list[float]:
    return [float(value) for value in np.quantile(numbers, QUANTILES)] if len(numbers) else []


def _compare_splits(report: DataReport, scans: dict[str, _Scan], near_duplicates: bool) -> None:
    names = list(scans)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            pair = f"{first}, {second}"
            report.overlap[pair] = int(np.isin(scans[second].keys, scans[first].keys).sum())
            if near_duplicates:
                report.near_overlap[pair] = _near_overlap(scans[first].signatures, scans[second].signatures)


def _near_overlap(first: list[np.ndarray], second: list[np.ndarray]) -> int:
    if not first or not second:
        return 0
    groups = duplicate_groups(np.stack([*first, *second]))
    return int(np.isin(groups[len(first) :], groups[: len(first)]).sum())


def _find_label_problems(report: DataReport) -> None:
    counts = report.splits["train"].label_counts
    report.label_quantiles = _quantiles(list(counts.values()))
    report.single_labels = sum(count == 1 for count in counts.values())
    number = report.splits["train"].documents
    if number >= 20:
        report.common_labels = [label for label, count in counts.items() if count >= COMMON * number]
    report.alike_labels = _alike(counts)
    report.missing_labels = sorted(name for name in counts if name.lower() in MISSING_NAMES)
    report.joined_labels = sorted(name for name in counts if _is_joined(name, counts))
    for split, scan in report.splits.items():
        unseen = {name: count for name, count in scan.label_counts.items() if name not in counts}
        if split != "train" and unseen:
            report.unseen_labels[split] = dict(sorted(unseen.items(), key=lambda item: -item[1]))


def _alike(counts: Mapping[str, int]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in counts:
        groups.setdefault("".join(normalize_label(name).casefold().split()), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def _is_joined(name: str, counts: Mapping[str, int]) -> bool:
    """Whether the name contains a character that is used to join names, or consists of several label names of the dataset."""
    if any(delimiter in name for delimiter in (";", "|", "\t")):
        return True
    parts = [part.strip() for part in name.replace("/", ",").split(",")]
    return len(parts) > 1 and all(part in counts for part in parts)


# ------------------------------------------------------------------------------------------------- the page


def _page(report: DataReport) -> Iterator[str]:
    yield f"{'':<26}" + "".join(f"{split:>12}" for split in report.splits)
    for title, attribute in (
        ("documents", "documents"),
        ("bad rows", "bad_rows"),
        ("without text", "empty"),
        ("without labels", "unlabeled"),
        ("duplicates", "duplicates"),
        ("near-duplicates", "near_duplicates"),
        ("duplicate ids", "duplicate_ids"),
    ):
        values = [getattr(split, attribute) for split in report.splits.values()]
        if attribute != "bad_rows" or any(values):  # documents that are already loaded have none
            yield f"{title:<26}" + "".join(f"{value:>12,}" for value in values)
    yield f"{'labels':<26}" + "".join(f"{len(split.label_counts):>12,}" for split in report.splits.values())
    yield f"{'labels per document':<26}" + "".join(f"{split.mean_labels:>12.2f}" for split in report.splits.values())
    medians = [split.length_quantiles()[2] if split.lengths else 0 for split in report.splits.values()]
    yield f"{f'{report.unit} per document':<26}" + "".join(f"{median:>12,.0f}" for median in medians) + "  (median)"
    yield from _details(report)
    warnings = list(_warnings(report))
    if warnings:
        yield ""
        yield from (f"! {warning}" for warning in warnings)


def _details(report: DataReport) -> Iterator[str]:
    train = report.splits["train"]
    if report.label_quantiles:
        yield "training documents per label: " + _show_quantiles(report.label_quantiles)
    if train.lengths:
        yield f"{report.unit} per training document: " + _show_quantiles(train.length_quantiles())
    if report.share_cut is not None:
        yield f"training documents truncated at {report.max_length} tokens: {100 * report.share_cut:.0f}%"


def _show_quantiles(values: Sequence[float]) -> str:
    names = ("min", "25%", "median", "75%", "95%", "max")
    return ", ".join(f"{name} {value:,.0f}" for name, value in zip(names, values))


def _warnings(report: DataReport) -> Iterator[str]:
    for split, found in report.splits.items():
        for problem in found.first_bad_rows[:3]:
            yield f"{split}: {problem}"
    for pair, count in report.overlap.items():
        near = report.near_overlap.get(pair, count)
        first, second = pair.split(", ")
        if near and first == "train":
            yield f"{near:,} {second} documents are duplicates or near-duplicates of {first} documents ({count:,} exact): metrics on them are too optimistic."
    if report.single_labels:
        yield f"labels with one training document: {report.single_labels:,}. They are hard to learn."
    if report.common_labels:
        yield f"labels on nearly all documents: {join_names(report.common_labels)}. They barely distinguish documents, and they inflate micro F1."
    for names in report.alike_labels[:5]:
        yield f"labels that differ only in case or whitespace: {join_names(names)}."
    if len(report.alike_labels) > 5:
        yield f"labels that differ only in case or whitespace: {len(report.alike_labels) - 5:,} more groups."
    if report.missing_labels:
        yield f"labels that look like missing values: {join_names(report.missing_labels)}."
    if report.joined_labels:
        yield f"labels that look like several labels joined by a different delimiter: {join_names(report.joined_labels)}."
    for split, unseen in report.unseen_labels.items():
        shown = ", ".join(f"{shorten(name)} ({count})" for name, count in list(unseen.items())[:5])
        yield f"{split}: {len(unseen):,} labels do not occur in the training documents and cannot be predicted: {shown}."
    lists = {tuple(split.labels_per_document) for split in report.splits.values()}
    if all(values and values[0] == values[-1] == 1 for values in lists):
        yield "every document has exactly one label: this is single-label classification."
