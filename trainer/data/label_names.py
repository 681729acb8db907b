"""Label names: one spelling for each, and the forms in which a document lists them. Imports the standard library only."""

import ast
import contextlib
import io
import json
import tokenize
import unicodedata
from typing import Any

from .messages import shorten
from .text_lines import DataFileError


def normalize_label(name: str) -> str:
    """The name without surrounding whitespace, in Unicode normalization form NFC: macOS and Windows encode "é" differently."""
    return unicodedata.normalize("NFC", name).strip()


def check_label(value: Any, where: str, column: str = "label") -> str:
    """
    `normalize_label` of a value that should be a name.

    Raises:
        DataFileError: if it is not a string, is blank, or has an unpaired surrogate.
    """
    name = normalize_label(value) if isinstance(value, str) else ""
    if not name:
        raise DataFileError(
            f"{where}: `{column}` is {shorten(value)}, but a label name is needed. Write a string that is not blank."
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataFileError(
            f"{where}: the label {shorten(name)} contains an unpaired surrogate, which is not a character. Remove it."
        ) from None
    return name


def split_labels(value: Any, where: str, column: str = "labels", delimiter: str | None = None) -> list[str]:
    """
    The distinct label names of one document, in the given order.

    Args:
        value: a list of names; a string that is a list as Python, JSON or NumPy prints it (`"['a', 'b']"`, as pandas writes lists
            into a csv file); or, with `delimiter`, a string of joined names.
        where (`str`): the place for messages, "FILE, line N".
        column (`str`): the name of the column, for messages.
        delimiter (`str`, *optional*): separates joined names. A backslash and `t`, as a tab arrives from most shells, is read as a tab.

    Raises:
        DataFileError: if it is none of these.
    """
    names = value
    if isinstance(value, str):
        listed = _printed_list(value.strip())
        if listed is not None:
            names = listed
        elif delimiter is not None:
            names = [name for name in value.split(read_delimiter(delimiter)) if name.strip()]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataFileError(f"{where}: `{column}` is {shorten(value)}, but {_remedy(names)}")
    return list(dict.fromkeys(check_label(name, where, column) for name in names))


def read_delimiter(delimiter: str) -> str:
    r"""The separator of joined names; a backslash and `t`, as `"\t"` arrives from most shells, is a tab."""
    return delimiter.replace("\\t", "\t")


def _remedy(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, (int, float)) for name in value):
        return (
            'a list of label names is needed. Write numbers that are names as strings, ["1", "0"]; where they are 0 or 1 for each '
            "label, give each label a column of its own and name these columns with `label_column`."
        )
    return (
        'a list of label names is needed. Write ["a", "b"] (or [] for a document without labels), or specify the separator of joined '
        "labels with `label_delimiter`."
    )


def _printed_list(text: str) -> list | None:
    """The list that a string represents, or None if it does not represent a list."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)  # Python would read the escapes of JSON differently
    try:
        value = ast.literal_eval(text)
        if not isinstance(value, list):
            return None
        strings = [token.string for token in _tokens(text) if token.type == tokenize.STRING]
        if all(isinstance(item, str) for item in value) and len(strings) > len(value):
            return [
                ast.literal_eval(string) for string in strings
            ]  # NumPy prints no commas, so Python would concatenate the names
        return value
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(text).readline))
