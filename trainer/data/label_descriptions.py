"""Label descriptions: what a label means, in a sentence, for the encoder to read beside its name."""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .document_files import expand_files, join_names, read_json_object, read_records, shorten


logger = logging.getLogger(__name__)


def load_label_descriptions(path: str | os.PathLike, labels: Sequence[str]) -> dict[str, str]:
    """
    Reads the labels' expansions (Eq. 2: what is encoded is "{label}: {expansion}").

    Args:
        path: json, jsonl, csv or tsv (also .gz, .zst) with the columns "label" and "expansion" or "description"; a
            json file may also hold one object `{label: text}` or `{label: {"expansion" or "description": text}}`.
        labels: The label names of the model.

    Returns:
        `{label: text}` for the labels that have one. A label without one is encoded by its bare name; an expansion of
        a label that is not in `labels` is left out, with a warning that names the closest label.

    Raises:
        ValueError: if a label is described twice, or a label or text is missing.
    """
    (path,) = expand_files(path)
    known = set(labels)
    descriptions: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for where, record in _description_records(path):
        name = record.get("label")
        text = record.get("expansion", record.get("description"))
        for field, value in (("label", name), ("expansion", text)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"{where}: `{field}` is {shorten(value)}, but a text is needed. Write "
                    f'{{"label": ..., "expansion" or "description": ...}}.'
                )
        name = name.strip()
        if name in descriptions or name in unknown:
            raise ValueError(f"{where}: label {name!r} is described a second time. Remove one of them.")
        (descriptions if name in known else unknown)[name] = text.strip()
    if unknown:
        closest = []
        for name in list(unknown)[:5]:
            match = difflib.get_close_matches(name, labels, n=1, cutoff=0.0)
            closest.append(f"{name!r} (closest: {match[0]!r})" if match else repr(name))
        logger.warning(
            f"{path}: {len(unknown)} descriptions are of labels that the training documents do not have and are left "
            "out: "
            f"{', '.join(closest)}{' ...' if len(unknown) > 5 else ''}. Correct the names if they were meant."
        )
    missing = [name for name in labels if name not in descriptions]
    if missing:
        logger.warning(
            f"{path}: {len(missing)} of {len(labels)} labels have no description and are encoded by name: "
            f"{join_names(missing)}."
        )
    return descriptions


def _description_records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pairs = read_json_object(path)
    if pairs is None:
        yield from read_records(path)
        return
    for name, value in pairs:
        yield f"{path}, {name!r}", {**(value if isinstance(value, Mapping) else {"expansion": value}), "label": name}
