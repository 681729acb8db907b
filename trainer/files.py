"""Atomic writes, tables that are safe to open in a spreadsheet, and digests."""

import contextlib
import csv
import hashlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any


# Spreadsheets run a cell that begins with one of these as a formula; the last four are their full-width forms.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike, mode: str = "w", encoding: str | None = None, newline: str | None = None
) -> Iterator[IO]:
    """
    Open a file for writing. It appears under its name, complete and synced, only when the block ends without an error.

    Until then, and after an error, an existing file of that name is unchanged. Data is written to a temporary file in the same
    folder. A symbolic link is followed. FIFOs and character devices are written to directly.

    Args:
        path (`str` or path): the file.
        mode (`str`, defaults to `"w"`): `"w"` or `"wb"`.
        encoding (`str`, *optional*): of text; UTF-8 if not given.
        newline (`str`, *optional*): as in `open`.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or `path` is a directory, a socket or a block device.

    Example:

    ```python
    with atomic_write("results.json") as file:
        json.dump(results, file)
    ```
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"`mode` is {mode!r}, but only 'w' and 'wb' replace a file as a whole. Use one of them.")
    encoding = encoding if encoding or "b" in mode else "utf-8"
    if is_special(path):  # check the path itself: the target of /dev/stdout may have no name
        with open(path, mode, encoding=encoding, newline=newline) as file:
            yield file
        return
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name[:100]}-", suffix=".tmp")
    try:
        with open(descriptor, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _permissions(target))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync_folder(folder)


def is_special(path: str | os.PathLike) -> bool:
    """
    Whether a path, links followed, is a FIFO or character device, which is written to directly and cannot be replaced.

    Raises:
        OSError: it is a directory, a socket or a block device, or a loop of symbolic links.
    """
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISREG(kind):
        return False
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        return True
    raise IsADirectoryError(
        f"{os.fspath(path)} is a directory, a socket or a block device, but a file is needed. Specify another file."
    )


def make_writable_folder(folder: str | os.PathLike) -> None:
    """
    Create a folder if it is missing, and try to write a file in it.

    Raises:
        OSError: it cannot be created, or no file can be written in it.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
        file.write(b"x")
        file.flush()


def sync_folder(folder: str | os.PathLike) -> None:
    """Sync new and renamed entries of a folder to disk, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """
    Write a table as CSV, atomically, with every text made harmless by [`harmless_cell`] and in quotes.

    Args:
        path (`str` or path): the file.
        header (`list[str]`): names of the columns.
        rows (iterable of sequences): texts and numbers; `None` is an empty cell.
    """
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        for row in itertools.chain([header], rows):
            writer.writerow(["" if cell is None else harmless_cell(cell) for cell in row])


def harmless_cell(value: Any) -> Any:
    """A text with an apostrophe in front if a spreadsheet would run it as a formula; any other value as it is."""
    if isinstance(value, str) and value.lstrip(" \u00a0\ufeff").startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


def digest(*parts: str | bytes | memoryview) -> str:
    """SHA-256, in hexadecimal, of a sequence of texts and byte strings; the boundaries between them matter."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(f"{memoryview(data).nbytes}:".encode())
        total.update(data)
    return total.hexdigest()


def _permissions(path: str) -> int:
    """Those of the file that is replaced, or of a new file."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
