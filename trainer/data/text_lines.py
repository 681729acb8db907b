"""Reads lines of text from files and standard input, and decompresses and decodes them. Imports only the standard library."""

import contextlib
import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO


STANDARD_INPUT = "-"
COMPRESSIONS = (".gz", ".zst")
GZIP, ZSTD, ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}


class DataFileError(ValueError):
    """The content of a file is invalid. The message names file, line, rule and remedy."""


class DataFileNotFoundError(FileNotFoundError, DataFileError):
    """A file, or the label file that belongs to it, does not exist."""


OnError = Callable[[DataFileError], None]


def raise_error(error: DataFileError) -> None:
    """The default of every reader: stop at the first bad line."""
    raise error


def display_name(path: str) -> str:
    return "standard input" if path == STANDARD_INPUT else path


def bare_name(path: str) -> str:
    """The file name without a compression extension."""
    return path.removesuffix(".gz").removesuffix(".zst")


def check_file(path: str) -> None:
    """
    Raises:
        DataFileNotFoundError: if there is no such file.
        DataFileError: if it is a folder, or standard input is closed.
    """
    if path == STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.closed:
            raise DataFileError(
                "standard input is closed, so there is nothing to read. Specify a file, or pipe one in."
            )
    elif not os.path.exists(path):
        raise DataFileNotFoundError(f"{path}: no such file. Check the path; relative ones start at {os.getcwd()}.")
    elif os.path.isdir(path):
        raise DataFileError(
            f"{path}: is a folder, but a file is needed. Specify the files in it, for example `{path}/*.csv`."
        )


def is_regular(path: str) -> bool:
    """Whether the file can be read more than once, which standard input and pipes cannot."""
    return path != STANDARD_INPUT and os.path.isfile(path)


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """
    The bytes of a file or of standard input (`-`), decompressed if the contents are gzip or zstd, regardless of the name.

    Raises:
        DataFileError: if the file is a folder, a zip archive or an Excel workbook, or is empty under a compressed name.
        DataFileNotFoundError: if there is no such file.
    """
    check_file(path)
    with contextlib.ExitStack() as stack:
        raw: Any = sys.stdin.buffer if path == STANDARD_INPUT else stack.enter_context(open(path, "rb"))
        start = raw.peek(4)
        if start.startswith(GZIP):
            yield stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=raw)))
        elif start.startswith(ZSTD):
            import pyarrow as pa

            yield stack.enter_context(io.BufferedReader(pa.input_stream(raw, compression="zstd")))
        elif start.startswith(ZIP):
            raise DataFileError(
                f"{display_name(path)}: is an Excel workbook or a zip archive, but neither is read. Save the sheet as "
                '"CSV UTF-8", or unpack the archive.'
            )
        elif not start and path.endswith(COMPRESSIONS):
            raise DataFileError(f"{path}: has 0 bytes, so it is not a compressed file. Download or write it again.")
        else:
            yield raw


def read_lines(path: str, on_error: OnError = raise_error) -> Iterator[tuple[int, str]]:
    r"""
    Yields `(line number from 1, line with its line end)` of a text file.

    The text is UTF-8, or has the byte order mark of UTF-8, UTF-16 (as Excel writes it) or UTF-32. Lines end with `\n`.

    Args:
        path (`str`): a file, or `-` for standard input; gzip and zstd are decompressed.
        on_error (`Callable`): called for each line that is not text, which is then left out; without it, the error is raised.

    Raises:
        DataFileError: if the file cannot be opened, decompressed or decoded.
    """
    number, name = 0, display_name(path)
    try:
        with open_binary(path) as stream:
            encoding = _encoding(stream.peek(4))  # type: ignore[attr-defined]
            lines: Any = stream if encoding.startswith("utf-8") else io.TextIOWrapper(stream, encoding, newline="\n")
            for number, line in enumerate(lines, start=1):
                try:
                    text = line.decode(encoding if number == 1 else "utf-8") if isinstance(line, bytes) else line
                    _check_characters(text, f"{name}, line {number}")
                except UnicodeDecodeError as error:
                    on_error(_not_text(error, f"{name}, line {number}"))
                except DataFileError as error:
                    on_error(error)
                else:
                    yield number, text
    except UnicodeDecodeError as error:  # UTF-16 is decoded in blocks
        raise _not_text(error, f"{name}, after line {number}") from None
    except DataFileError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(error, path, number) from None


def _encoding(start: bytes) -> str:
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def _check_characters(text: str, where: str) -> None:
    if "\0" in text:
        raise DataFileError(
            f"{where}: contains a NUL character, which is not allowed in text. If the file is UTF-16, convert it with "
            "`iconv -f utf-16 -t utf-8`; otherwise write it again."
        )


def _not_text(error: UnicodeDecodeError, where: str) -> DataFileError:
    if error.encoding.startswith("utf-8"):
        return DataFileError(
            f"{where}: byte {error.object[error.start]:#04x} is not UTF-8. Convert the file, for example with "
            '`iconv -f cp1252 -t utf-8`, or save it as "CSV UTF-8".'
        )
    return DataFileError(
        f"{where}: is not {error.encoding.upper()} ({error.reason}), as the first bytes of the file indicate. Write it "
        "again, best as UTF-8."
    )


def _unreadable(error: Exception, path: str, number: int) -> DataFileError:
    name = display_name(path)
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) or path.endswith(COMPRESSIONS):
        return DataFileError(
            f"{name}: cannot be decompressed after line {number} ({error}). The file is damaged or truncated: download it "
            "again."
        )
    reason = getattr(error, "strerror", None) or error
    return DataFileError(f"{name}: cannot be read after line {number} ({reason}). Check the file and its permissions.")
