"""Files of labels and their parents, as pairs of names. Needs neither torch nor transformers."""

import importlib.util
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from .label_files import json_members
from .label_names import check_label, normalize_label
from .messages import join_names, shorten
from .readers import expand_files, find_format, read_records
from .text_lines import DataFileError, bare_name, check_file, open_binary


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


def parent_pairs(path: str | os.PathLike, labels: Collection[str] = ()) -> Pairs:
    """
    Pairs of a label and a parent of it, as a file names them; see [`~trainer.data.read_label_parents`] for its forms.

    Args:
        path (`str`), labels (`Collection[str]`): as there.

    Raises:
        DataFileError: the file is in a different format.
        ImportError: the file is RDF and rdflib is not installed.
    """
    (path,) = expand_files(path)
    check_file(path)
    yield from _pairs_of_rdf(path, labels) if is_rdf(path) else _pairs_of_records(path)


def is_rdf(path: str | os.PathLike) -> bool:
    """Whether a file name has an RDF extension. How RDF concepts are named depends on the labels of the documents."""
    return os.path.splitext(bare_name(os.fspath(path)))[1].lower() in RDF_FORMATS


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
            f"{path}: has neither `skos:broader` nor `skos:narrower`. Specify a SKOS file, or a csv file."
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
