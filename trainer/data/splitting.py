"""Splits documents by iterative stratification, keeping near-duplicates together and every label in the training part."""

import heapq
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from .near_duplicates import duplicate_groups, signatures
from .tokenization import check_is_dataset


logger = logging.getLogger(__name__)


class DocumentSplit(NamedTuple):
    """
    A dataset split into two parts.

    Args:
        train (`Dataset`): the documents that stay.
        held_out (`Dataset`): those for validation or test.
    """

    train: Dataset
    held_out: Dataset


def split_documents(
    dataset: Dataset,
    fraction: float | None = None,
    size: int | None = None,
    seed: int = 0,
    group_near_duplicates: bool = True,
    text_column: str = "text",
) -> DocumentSplit:
    """
    Holds out documents so that, as far as possible, each label is divided in the same proportion (iterative stratification, Sechidis et al.
    2011).

    Every label keeps at least one training document, and near-duplicates stay in the same part. Documents without labels are stratified
    like a label of their own. The split is deterministic. Time grows linearly with the number of label assignments.

    Args:
        dataset (`Dataset`): documents with "labels" (names) or "label_indices" (ids), and their text.
        fraction (`float`, *optional*): share of the documents to set aside, between 0 and 1; 0.1 if neither is given.
        size (`int`, *optional*): their number, instead of `fraction`.
        seed (`int`): random seed for breaking ties.
        group_near_duplicates (`bool`): whether near-duplicates stay in the same part.
        text_column (`str`): the column of the text.

    Returns:
        [`DocumentSplit`], each part in the order of `dataset`.

    Raises:
        ValueError: if less than half of the requested documents, or none, can be held out without removing the last training document of
            a label, or the documents are not a dataset.

    Example:

    ```python
    train, validation = split_documents(documents.dataset, fraction=0.1)
    ```
    """
    check_is_dataset(dataset)
    target = _target(len(dataset), fraction, size)
    groups = np.arange(len(dataset))
    if group_near_duplicates:
        texts = (text for batch in dataset.select_columns(text_column).iter(1000) for text in batch[text_column])
        groups = duplicate_groups(signatures(texts))
    held_out = _stratify(_label_ids(dataset), groups, target, seed)
    _check_size(int(held_out.sum()), target, len(dataset), group_near_duplicates)
    return DocumentSplit(dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out)))


def _target(num_documents: int, fraction: float | None, size: int | None) -> int:
    if fraction is not None and size is not None:
        raise ValueError(f"`fraction` is {fraction} and `size` is {size}, but one decides. Leave out the other.")
    if size is None:
        fraction = 0.1 if fraction is None else fraction
        if not 0 < fraction < 1:
            raise ValueError(
                f"`fraction` is {fraction}, but a share between 0 and 1 is needed. Choose 0.1, for example."
            )
        size = max(1, round(fraction * num_documents))
    if not 1 <= size < num_documents:
        raise ValueError(
            f"{size} of {num_documents} documents are to be set aside, but at least one must be, and one must stay. Choose another "
            "`size` or `fraction`, or add documents."
        )
    return size


def _check_size(count: int, target: int, num_documents: int, grouped: bool) -> None:
    if count and count >= target - max(1, target // 10):
        return
    problem = (
        f"{target} of {num_documents} documents are to be set aside, but only {count} can be: the others hold the last training "
        "document of a label" + (" or are near-duplicates of one that does." if grouped else ".")
    )
    if 2 * count < target:
        raise ValueError(
            f"{problem} Choose a smaller `fraction` or `size`, leave out labels with one document, or specify a file of held-out "
            "documents instead."
        )
    logger.warning(problem)


def _label_ids(dataset: Dataset) -> list[Sequence[int]]:
    if "label_indices" in dataset.column_names:
        return dataset["label_indices"][:]
    if "labels" not in dataset.column_names:
        raise ValueError(
            f"The columns are {', '.join(dataset.column_names)}, but `labels` or `label_indices` is needed. Load the documents with "
            "`load_documents` or `load_splits`."
        )
    ids: dict[str, int] = {}
    return [[ids.setdefault(name, len(ids)) for name in names] for names in dataset["labels"]]


class _Units:
    """Groups of documents that stay together, with their labels and the number of documents for each."""

    def __init__(self, labels: Sequence[Sequence[int]], groups: np.ndarray) -> None:
        # "No label" counts as another label. Otherwise, unlabeled documents would fill up a held-out part that rare labels leave too small.
        unlabeled = 1 + max((label for ids in labels for label in ids), default=-1)
        self.num_labels = unlabeled + 1
        self.sizes = np.bincount(groups).tolist()
        self.counts: list[dict[int, int]] = [{} for _ in self.sizes]
        for group, ids in zip(groups.tolist(), labels):
            counts = self.counts[group]
            for label in set(ids) or {unlabeled}:
                counts[label] = counts.get(label, 0) + 1
        self.of_label: list[list[int]] = [[] for _ in range(self.num_labels)]
        for unit, counts in enumerate(self.counts):
            for label in counts:
                self.of_label[label].append(unit)


class _Assignment:
    """Which groups are held out so far, and how many documents each part still needs, per label and in total."""

    def __init__(self, units: _Units, target: int, rng: np.random.Generator) -> None:
        self.units, self.rng = units, rng
        num_documents = sum(units.sizes)
        totals = [sum(units.counts[unit][label] for unit in of) for label, of in enumerate(units.of_label)]
        share = target / num_documents
        self.held_out: list[bool | None] = [None] * len(units.sizes)
        self.in_training = totals[:]  # as long as it is not held out, a document is in training
        self.wanted = [[(1 - share) * total for total in totals], [share * total for total in totals]]
        self.wanted_documents = [num_documents - target, float(target)]

    def may_be_held_out(self, unit: int) -> bool:
        return all(self.in_training[label] > count for label, count in self.units.counts[unit].items())

    def assign(self, unit: int, label: int) -> None:
        """Assigns a group to the part that needs the label most; ties go to the part that needs more documents."""
        needs = [(self.wanted[side][label], self.wanted_documents[side]) for side in (0, 1)]
        side = int(needs[1] > needs[0]) if needs[0] != needs[1] else int(self.rng.integers(2))
        self.put(unit, bool(side) and self.may_be_held_out(unit))

    def put(self, unit: int, held_out: bool, was: bool | None = None) -> None:
        sign = -1 if held_out else 1
        for label, count in self.units.counts[unit].items():
            if held_out or was:
                self.in_training[label] += sign * count
            self.wanted[held_out][label] -= count
            if was is not None:
                self.wanted[was][label] += count
        self.wanted_documents[held_out] -= self.units.sizes[unit]
        if was is not None:
            self.wanted_documents[was] += self.units.sizes[unit]
        self.held_out[unit] = held_out


def _stratify(labels: Sequence[Sequence[int]], groups: np.ndarray, target: int, seed: int) -> np.ndarray:
    """Whether each document is held out, `(N,)`."""
    rng = np.random.default_rng(seed)
    units = _Units(labels, groups)
    assignment = _Assignment(units, target, rng)
    remaining = [len(of) for of in units.of_label]
    queue = [(count, label) for label, count in enumerate(remaining) if count]
    heapq.heapify(queue)
    while queue:  # the label with the fewest documents left comes first
        count, label = heapq.heappop(queue)
        if count != remaining[label]:
            continue
        left = [unit for unit in units.of_label[label] if assignment.held_out[unit] is None]
        for unit in rng.permutation(left).tolist():
            assignment.assign(unit, label)
            for other in units.counts[unit]:
                remaining[other] -= 1
                if remaining[other] and other != label:
                    heapq.heappush(queue, (remaining[other], other))
    _correct_size(assignment, rng)
    return np.asarray(assignment.held_out, dtype=bool)[groups]


def _correct_size(assignment: _Assignment, rng: np.random.Generator) -> None:
    """Moves random groups until the requested number of documents is held out, as far as labels allow it."""
    missing = assignment.wanted_documents[1]
    side = missing < 0  # too many are held out: move them back
    units = [unit for unit, held_out in enumerate(assignment.held_out) if held_out == side]
    for unit in rng.permutation(units).tolist():
        size = assignment.units.sizes[unit]
        if size > math.ceil(abs(assignment.wanted_documents[1])) or abs(assignment.wanted_documents[1]) < 1:
            continue
        if side or assignment.may_be_held_out(unit):
            assignment.put(unit, not side, was=side)
