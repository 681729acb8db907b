"""Parents of labels: files of them, those of a model's labels, and documents that have the ancestors of their labels."""

import importlib.util
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from modeling_sep_mldc.hierarchy_sep_mldc import ancestors_of, check_label_parents
from modeling_sep_mldc.label_sets_sep_mldc import check_label_constraints

from .label_files import json_members
from .label_names import check_label, normalize_label
from .messages import join_names, shorten
from .readers import expand_files, find_format, read_records
from .text_lines import DataFileError, bare_name, check_file, open_binary


logger = logging.getLogger(__name__)

# Extensions of RDF files, and their names in rdflib.
RDF_FORMATS = {
    ".ttl": "turtle",
    ".rdf": "xml",
    ".owl": "xml",
    ".xml": "xml",
    ".nt": "nt",
    ".n3": "n3",
    ".jsonld": "json-ld",
    ".trig": "trig",
}
Pairs = Iterator[tuple[str, str]]  # child, parent


def read_label_parents(path: str | os.PathLike, labels: Collection[str] = ()) -> dict[str, list[str]]:
    """
    The parents of labels, by name.

    Args:
        path (`str`): one of (each also as .gz or .zst)
            - csv, tsv, jsonl or parquet with the columns `child` and `parent`; several parents as several rows, or as a list; a row
              without parent is a label at the top;
            - json: `{child: parent}` or `{child: [parents]}`, or an array of such rows;
            - SKOS in RDF (ttl, rdf, xml, nt, n3, jsonld): `skos:broader` and `skos:narrower`. Needs the extra `skos`.
        labels (`Collection[str]`, *optional*): label names of the documents. They tell how concepts of SKOS are called: by their URI,
            `skos:notation` or `skos:prefLabel` in one language, whichever is the name of most labels; by an English `skos:prefLabel`
            without them. Concepts without such a name are called by any other one.

    Returns:
        `dict[str, list[str]]`: parents of each label that has one.

    Raises:
        DataFileError: the file has another form, a label is its own parent, or labels are parents of each other in a circle. It is a
            `ValueError`.
        ImportError: the file is RDF and rdflib is not installed.

    Example:

    ```python
    parents = read_label_parents("parents.csv")  # {"genetics": ["biology"], ...}
    ```
    """
    (path,) = expand_files(path)
    check_file(path)
    pairs = _pairs_of_rdf(path, labels) if is_rdf(path) else _pairs_of_records(path)
    parents: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for child, parent in pairs:
        parents[child][parent] = None
    if not parents:
        raise DataFileError(f"{path}: names no parent of any label. Write rows with `child` and `parent`.")
    return _with_place(path, check_label_parents, {child: list(above) for child, above in parents.items()})


def is_rdf(path: str | os.PathLike) -> bool:
    """Whether the name of a file is that of RDF, whose concepts are named by the labels of the documents."""
    return os.path.splitext(bare_name(os.fspath(path)))[1].lower() in RDF_FORMATS


def _with_place(where: str, check: Any, *values: Any) -> Any:
    try:
        return check(*values)
    except ValueError as error:
        raise DataFileError(f"{where}: {error}") from None


def _pairs_of_records(path: str) -> Pairs:
    members = json_members(path) if find_format(path) == "json" else None
    if members is not None and "child" not in dict(members):
        for name, value in members:
            yield from _pairs(name, value, f"{path}, {shorten(name)}")
        return
    for where, record in read_records(path):
        if not {"child", "parent"} <= record.keys():
            raise DataFileError(
                f"{where}: the columns are {join_names(record, 10)}, but `child` and `parent` are needed. Rename the columns."
            )
        yield from _pairs(record["child"], record["parent"], where)


def _pairs(child: Any, value: Any, where: str) -> Pairs:
    child = check_label(child, where, "child")
    parents = value if isinstance(value, (list, tuple)) else [value]
    for parent in parents:
        if parent is not None and parent != "":
            yield child, check_label(parent, where, "parent")


def _pairs_of_rdf(path: str, labels: Collection[str]) -> Pairs:
    rdf_format = RDF_FORMATS[os.path.splitext(bare_name(path))[1].lower()]
    if importlib.util.find_spec("rdflib") is None:
        raise ImportError(
            f"{path} is RDF, which needs the package rdflib, but it is not installed. Run `pip install sep-mldc[skos]`."
        )
    import rdflib
    from rdflib.namespace import SKOS

    graph = rdflib.Graph()
    try:
        with open_binary(path) as stream:
            graph.parse(stream, format=rdf_format)
    except (MemoryError, DataFileError):
        raise
    except Exception as error:  # every parser of rdflib has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise DataFileError(
            f"{path}: is not {rdf_format} that rdflib can read ({reason}). Repair it, or convert it to csv."
        ) from None
    edges = dict.fromkeys((child, parent) for child, parent in graph.subject_objects(SKOS.broader))
    edges |= dict.fromkeys((child, parent) for parent, child in graph.subject_objects(SKOS.narrower))
    if not edges:
        raise DataFileError(
            f"{path}: has neither `skos:broader` nor `skos:narrower`. Name a SKOS file, or a csv file."
        )
    names = _concept_names(graph, sorted({str(concept) for edge in edges for concept in edge}), labels)
    for child, parent in edges:
        yield names[str(child)], names[str(parent)]


def _concept_names(graph: Any, concepts: Sequence[str], labels: Collection[str]) -> dict[str, str]:
    """The name of each concept, by URI."""
    from rdflib import URIRef
    from rdflib.namespace import SKOS

    known = {normalize_label(label) for label in labels}
    found: dict[str, dict[str, str]] = {}  # names of each concept, by kind
    matches: Counter[str] = Counter()
    for concept in concepts:
        kinds = {"uri": concept}
        for notation in sorted(map(str, graph.objects(URIRef(concept), SKOS.notation))):
            kinds.setdefault("notation", normalize_label(notation))
        for literal in sorted(graph.objects(URIRef(concept), SKOS.prefLabel), key=str):
            kinds.setdefault(f"prefLabel {literal.language or ''}", normalize_label(str(literal)))
        found[concept] = {kind: name for kind, name in kinds.items() if name}
        matches.update(kind for kind, name in found[concept].items() if name in known)
    order = [kind for kind, _ in matches.most_common()] + ["prefLabel en", "prefLabel "]

    def name_of(kinds: dict[str, str]) -> str:
        others = [kind for kind in sorted(kinds) if kind.startswith("prefLabel")]
        return next(kinds[kind] for kind in [*order, *others, "uri"] if kind in kinds)

    return {concept: name_of(kinds) for concept, kinds in found.items()}


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
    Documents whose column `labels` (names) also holds the ancestors of its labels. So a parent that no document names becomes a label,
    with the documents of its children.

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
        DataFileError: as [`check_label_constraints`], or the file has another form.
    """
    (path,) = expand_files(path)
    groups = []
    for where, record in read_records(path):
        groups += _with_place(where, check_label_constraints, [record], labels, label_parents)
    if not groups:
        raise DataFileError(f'{path}: holds no constraint. Write [{{"labels": ["a", "b"], "at_most": 1}}].')
    return groups
