"""Atomic writes of output files."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trainer.files import atomic_write, is_special, make_writable_folder

from .errors import AugmentationError


def check_output(path: str | Path, inputs: Iterable[str | Path] = (), special: bool = True) -> None:
    """
    Checks that an output may be written, before any work is done.

    Args:
        path: The output.
        inputs: Input files, which the output must not be.
        special (`bool`): Whether it may be a pipe or a device, which is then written to directly.

    Raises:
        AugmentationError: if it may not.
    """
    try:
        is_other = is_special(path)
    except IsADirectoryError:
        is_other, special = True, False
    except OSError:  # not accessible: writing will report why
        return
    if is_other and not special:
        raise AugmentationError(f"the output {path} must be a file, but is something else; choose another path.")
    for other in inputs:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, other):
                raise AugmentationError(
                    f"{other} would be read and replaced by the output of the same command; choose another output."
                )


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """
    A byte stream that replaces `path` only if the block ends without an error.

    Raises:
        AugmentationError: if the file cannot be written; what was there before stays.
    """
    check_output(path)
    try:
        if not is_special(path):
            Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as stream:
            yield stream
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AugmentationError(
            f"{path} cannot be written ({error.strerror or error}); make room there or choose another folder, and run the "
            "same command again."
        ) from None


def encoded(value: Any, **options: Any) -> bytes:
    """A value as JSON in UTF-8; a lone surrogate stays a JSON escape."""
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "backslashreplace") + b"\n"


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the rows atomically; returns their number."""
    number = 0
    with replace_atomically(path) as stream:
        for row in rows:
            stream.write(encoded(row))
            number += 1
    return number


def check_writable(folder: str | Path) -> None:
    """
    Checks the output folder before anything is paid for.

    Raises:
        AugmentationError: if no file can be written there.
    """
    try:
        make_writable_folder(folder)
    except OSError as error:
        raise AugmentationError(
            f"the output folder {folder} cannot be written ({error.strerror or error}); choose another `output_dir`."
        ) from None
