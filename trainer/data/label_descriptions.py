"""Label descriptions: one sentence per label that says what it means, encoded together with the name."""

import difflib
import logging
import os
from collections.abc import Callable, Sequence

from .label_files import read_label_descriptions
from .label_names import normalize_label
from .messages import join_names
from .readers import expand_files


logger = logging.getLogger(__name__)


def load_label_descriptions(path: str | os.PathLike, labels: Sequence[str]) -> dict[str, str]:
    """
    Reads the label descriptions of a model's labels (Eq. 2: what is encoded is "{label}: {description}").

    Args:
        path (`str`): a file that [`read_label_descriptions`] reads.
        labels (`Sequence[str]`): the label names of the model.

    Returns:
        `{label: description}` for the labels that have one. A label without one is encoded by its bare name; a description of
        a label that is not in `labels` is left out, with a warning that names the closest label.

    Raises:
        DataFileError: if a label is described twice, or a label or description is missing. It is a `ValueError`.
    """
    (path,) = expand_files(path)
    known = {normalize_label(label): label for label in labels}
    descriptions, unknown = {}, []
    for name, text in read_label_descriptions(path).items():
        if name in known:
            descriptions[known[name]] = text
        else:
            unknown.append(name)
    if unknown:
        logger.warning(
            f"{path}: {len(unknown)} descriptions are of labels that the training documents do not have and are left out: "
            f"{', '.join(map(_with_closest(labels), unknown[:5]))}{' ...' if len(unknown) > 5 else ''}. Correct the names if they "
            "were meant."
        )
    missing = [name for name in labels if name not in descriptions]
    if missing:
        logger.warning(
            f"{path}: {len(missing)} of {len(labels)} labels have no description and are encoded by name: "
            f"{join_names(missing)}."
        )
    return descriptions


def _with_closest(labels: Sequence[str]) -> Callable[[str], str]:
    def describe(name: str) -> str:
        match = difflib.get_close_matches(name, labels, n=1, cutoff=0.0)
        return f"{name!r} (closest: {match[0]!r})" if match else repr(name)

    return describe
