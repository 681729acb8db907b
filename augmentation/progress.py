"""Progress bars and messages on standard error, if it is open."""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A `tqdm` bar; none where standard error is closed, as some service managers leave it."""
    return tqdm(iterable, disable=not show or sys.stderr is None, **options)


def remark(text: str) -> None:
    """A line that does not break the progress bars."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(text, file=sys.stderr)
