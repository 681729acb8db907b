"""Writing of output files, whole or not at all."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import AugmentationError


def check_output(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """
    Checks that an output may be written, before anything is done for it.

    Raises:
        AugmentationError: if the path is a directory, a device or a pipe, or one of the inputs.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # not there yet, or not reachable: writing says why
        return
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise AugmentationError(f"the output {path} is {kind}, but must be a file; choose another path.")
    for other in inputs:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, other):
                raise AugmentationError(
                    f"{other} would be read and replaced by the output of the same command; choose another output."
                )


@contextmanager
def replace_whole(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """
    A stream to a temporary neighbor that takes the place of `path` only when the block ends without an error.

    Raises:
        AugmentationError: if the file cannot be written; what was there before stays.
    """
    check_output(path)
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
        # backslashreplace: a lone surrogate stays a JSON escape
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with os.fdopen(handle, mode, encoding=encoding, errors=errors) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        _remove(temporary)
        raise AugmentationError(
            f"{path} cannot be written ({error.strerror or error}); make room there or choose another folder, and run the "
            "same command again."
        ) from None
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Has a new name in a folder survive a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the rows, whole or not at all; returns their number."""
    number = 0
    with replace_whole(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
    return number


def check_writable(folder: str | Path) -> None:
    """
    Tries the output folder before anything is paid for.

    Raises:
        AugmentationError: if no file can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x")
            stream.flush()
    except OSError as error:
        raise AugmentationError(
            f"the output folder {folder} cannot be written ({error.strerror or error}); choose another `output_dir`."
        ) from None
