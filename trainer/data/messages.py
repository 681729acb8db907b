"""Values and names in error messages."""

from collections.abc import Iterable
from typing import Any


def shorten(value: Any, width: int = 60) -> str:
    """`repr` of a value, truncated to `width` characters."""
    text = repr(value[: width + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= width else text[: width - 3] + "..."


def join_names(names: Iterable[Any], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
