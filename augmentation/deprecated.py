"""Names of version 0.1, which keep working for one release."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import read_rows
from .label_descriptions import describe_labels
from .pseudo_documents import PseudoDocumentOptions, write_pseudo_documents
from .settings import RequestSettings
from .summary import Plan, RunSummary
from .writing import write_json_lines


OLD_PSEUDO_DOCUMENTS = "pseudo_samples.jsonl"
OLD_NAMES: dict[str, Any] = {"TailOptions": ("PseudoDocumentOptions", PseudoDocumentOptions)}


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that a name has changed."""
    warnings.warn(
        f"{old} is called {new} now; the old name will be removed in the next version.", FutureWarning, stacklevel
    )


def old_name(name: str, module: str) -> Any:
    """What a name of version 0.1 stands for, with a `FutureWarning`; for the `__getattr__` of a module."""
    if name not in OLD_NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new, value = OLD_NAMES[name]
    warn(f"`{name}`", f"`{new}`", stacklevel=4)
    return value


def expand_labels(
    labels: str | Path | Sequence[str] | Mapping[str, str],
    output_dir: str | Path,
    settings: RequestSettings,
    *args: Any,
    **kwargs: Any,
) -> RunSummary | Plan:
    """`describe_labels` under its name of version 0.1; rows also hold the description as `expansion`."""
    warn("`expand_labels`", "`describe_labels`")
    result = describe_labels(labels, output_dir, settings, *args, **kwargs)
    if isinstance(result, RunSummary) and result.output is not None:
        rows = [{**row, "expansion": row["description"]} for _, row in read_rows(result.output)]
        write_json_lines(result.output, rows)
    return result


def generate_tail_samples(
    train: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    settings: RequestSettings,
    expansions: str | Path | None = None,
    *args: Any,
    **kwargs: Any,
) -> RunSummary | Plan:
    """`write_pseudo_documents` under its name of version 0.1; it also writes `pseudo_samples.jsonl`."""
    warn("`generate_tail_samples`", "`write_pseudo_documents`")
    result = write_pseudo_documents(train, output_dir, settings, expansions, *args, **kwargs)
    if isinstance(result, RunSummary) and result.output is not None:
        rows = [row for _, row in read_rows(result.output)]
        result.output = Path(output_dir) / OLD_PSEUDO_DOCUMENTS
        write_json_lines(result.output, rows)
    return result
