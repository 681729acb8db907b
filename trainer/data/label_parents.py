"""Parents of labels: reading them from files, matching them to the labels of a model, and adding ancestors to the labels of documents."""

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from modeling_sep_mldc.hierarchy_sep_mldc import ancestors_of, check_label_parents
from modeling_sep_mldc.label_sets_sep_mldc import check_label_constraints

from .label_names import normalize_label
from .messages import join_names
from .parent_files import parent_pairs
from .readers import expand_files, read_records
from .text_lines import DataFileError


logger = logging.getLogger(__name__)


def read_label_parents(path: str | os.PathLike, labels: Collection[str] = ()) -> dict[str, list[str]]:
    """
    The parents of labels, by name.

    Args:
        path (`str`): one of (each also as .gz or .zst)
            - csv, tsv, jsonl or parquet with the columns `child` and `parent`; several parents as several rows, or as a list; a row
              without parent is a label at the top;
            - json: `{child: parent}` or `{child: [parents]}`, or an array of such rows;
            - SKOS in RDF (ttl, rdf, xml, nt, n3, jsonld): `skos:broader` and `skos:narrower`. Needs the extra `skos`.
        labels (`Collection[str]`, *optional*): label names of the documents, which determine how SKOS concepts are named: by their URI,
            `skos:notation` or `skos:prefLabel` in one language, whichever matches most labels. Without `labels`, the English
            `skos:prefLabel` is used. Concepts without such a name get any other name that they have.

    Returns:
        `dict[str, list[str]]`: parents of each label that has one.

    Raises:
        DataFileError: the file is in a different format, a label is its own parent, or there is a cycle. It is a `ValueError`.
        ImportError: the file is RDF and rdflib is not installed.

    Example:

    ```python
    parents = read_label_parents("parents.csv")  # {"genetics": ["biology"], ...}
    ```
    """
    parents: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for child, parent in parent_pairs(path, labels):
        parents[child][parent] = None
    if not parents:
        raise DataFileError(f"{path}: names no parent of any label. Write rows with `child` and `parent`.")
    return _with_place(os.fspath(path), check_label_parents, {child: list(above) for child, above in parents.items()})


def _with_place(where: str, check: Any, *values: Any) -> Any:
    try:
        return check(*values)
    except ValueError as error:
        raise DataFileError(f"{where}: {error}") from None


def parents_of_labels(
    label_parents: Mapping[str, Sequence[str]], labels: Sequence[str], source: str
) -> dict[str, list[str]]:
    """
    The parents of the labels of a model. Entries of other labels are left out, with a warning.

    Args:
        label_parents (`dict[str, list[str]]`): what [`read_label_parents`] returned.
        labels (`list[str]`): the labels of the model.
        source (`str`): where they come from, for messages.

    Raises:
        DataFileError: a parent, or a further ancestor, is not among the labels, or no label has a parent.
    """
    known = set(labels)
    kept = {name: list(parents) for name, parents in label_parents.items() if name in known}
    if not kept:
        raise DataFileError(
            f"{source}: names parents of {len(label_parents)} labels ({join_names(label_parents, 3)}), but none of them is among the "
            f"{len(known)} labels of the model ({join_names(labels, 3)}). Use the same names in both."
        )
    missing = [name for name in ancestors_of(label_parents, kept) if name not in known]
    if missing:
        raise DataFileError(
            f"{source}: {len(missing)} parents are not among the {len(known)} labels of the model: {join_names(missing)}. Add "
            "`--hierarchy closure`, which gives them the documents of their children, without `--label_list_file` and before training; "
            "or remove them from the file."
        )
    others = [name for name in label_parents if name not in known]
    if others:
        logger.warning(
            f"{source}: {len(others)} labels with parents are not among the {len(known)} labels of the model and are left out: "
            f"{join_names(others)}."
        )
    return kept


def close_labels(
    dataset: Dataset | IterableDataset, label_parents: Mapping[str, Sequence[str]]
) -> Dataset | IterableDataset:
    """
    Add the ancestors of labels to the column `labels` (names) of documents. A parent that no document is labeled with thus becomes a
    label, with the documents of its children.

    Args:
        dataset (`Dataset` or `IterableDataset`): documents with `labels`.
        label_parents (`dict[str, list[str]]`): parents by name.

    Example:

    ```python
    train = close_labels(train, read_label_parents("parents.csv"))
    ```
    """
    keywords: dict[str, Any] = {} if isinstance(dataset, IterableDataset) else {"desc": "Closing labels"}
    return dataset.map(
        _close_batch,
        batched=True,
        features=dataset.features,
        fn_kwargs={"label_parents": dict(label_parents)},
        **keywords,
    )


def _close_batch(batch: dict[str, list], label_parents: dict[str, list[str]]) -> dict[str, list]:
    closed = []
    for names in batch["labels"]:
        own = [normalize_label(name) for name in names]
        closed.append(list(dict.fromkeys([*own, *ancestors_of(label_parents, own)])))
    return {"labels": closed}


def read_label_constraints(
    path: str | os.PathLike, labels: Sequence[str], label_parents: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """
    Constraints on label sets.

    Args:
        path (`str`): json (an array) or jsonl of groups `{"labels": [names], "at_least": n, "at_most": m}`, with one bound or both.
        labels (`list[str]`): the labels of the model.
        label_parents (`dict[str, list[str]]`, *optional*): parents of labels, if label sets are closed.

    Raises:
        DataFileError: as in [`check_label_constraints`], or the file is in a different format.
    """
    (path,) = expand_files(path)
    groups = []
    for where, record in read_records(path):
        groups += _with_place(where, check_label_constraints, [record], labels, label_parents)
    if not groups:
        raise DataFileError(f'{path}: contains no constraints. Write [{{"labels": ["a", "b"], "at_most": 1}}].')
    return groups
