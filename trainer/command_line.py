"""Arguments from the command line and from a file, and one-sentence error messages."""

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser


DEBUG_VARIABLE = "SEP_MLDC_DEBUG"
ARGUMENT_FILES = (".json", ".yaml", ".yml")
_NOT_NAMED = object()


class Arguments(NamedTuple):
    """
    Attributes:
        groups (`tuple`): an instance of each dataclass.
        named (`dict[str, Any]`): the arguments that the user specified, in a file or on the command line. All others are defaults, which
            recommended settings may override.
    """

    groups: tuple[Any, ...]
    named: dict[str, Any]


class _Parser(HfArgumentParser):
    """Raises a one-sentence error instead of printing the usage of 200 arguments."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. All arguments: `--help`.")


def parse_arguments(
    groups: Sequence[type],
    argv: Sequence[str],
    former_names: Mapping[str, str] | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> Arguments:
    """
    Parse the arguments of a program: from a JSON or YAML file, if the first word names one, and from the command line, which takes
    precedence.

    In a file, `null` means "not given", dictionaries and empty lists are passed as they are, and numbers, Booleans and strings are parsed
    as on the command line.

    Args:
        groups (sequence of dataclasses): as for `HfArgumentParser`. No field may be required.
        argv (`list[str]`): the words after the program's name.
        former_names (`dict[str, str]`, *optional*): old names of arguments, which still work with a `FutureWarning`.
        defaults (callable, *optional*): takes the specified arguments and returns defaults that override those of the dataclasses.
        kwargs: for `argparse.ArgumentParser` (`prog`, `description`, ...).

    Returns:
        [`Arguments`].

    Raises:
        ValueError: an unknown argument, a value of the wrong type, or a file that cannot be read.
    """
    parser = _Parser(groups, allow_abbrev=False, **kwargs)
    types = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    fields = {field.name for group in groups for field in dataclasses.fields(group) if field.init}
    words, values = list(argv), {}
    if words and words[0].lower().endswith(ARGUMENT_FILES) and not words[0].startswith("-"):
        path = words.pop(0)
        for name, value in read_argument_file(path).items():
            name = _current_name(name.replace("-", "_"), former_names or {}, "")
            if name not in fields:
                raise ValueError(f"{path}: {_unknown(name, fields, '')}")
            if value is None:
                continue
            try:
                values[name] = _value(parser, name, value, types[name])
            except ValueError as error:
                raise ValueError(f"{path}, `{name}`: {error}") from None
    namespace = Namespace(**dict.fromkeys(fields, _NOT_NAMED))
    namespace, unknown = parser.parse_known_args([_current_word(w, former_names or {}) for w in words], namespace)
    if unknown:
        raise ValueError(
            _unknown(unknown[0].lstrip("-").partition("=")[0], fields, "--" if unknown[0][:1] == "-" else "")
        )
    values |= {name: value for name, value in vars(namespace).items() if value is not _NOT_NAMED}
    filled = {**(defaults(values) if defaults is not None else {}), **values}
    built = []
    for group in groups:
        own = {field.name for field in dataclasses.fields(group) if field.init}
        built.append(group(**{name: value for name, value in filled.items() if name in own}))
    return Arguments(tuple(built), values)


def read_argument_file(path: str | os.PathLike) -> dict[str, Any]:
    """
    The arguments in a JSON or YAML file.

    Raises:
        ValueError: there is no such file, it cannot be parsed, does not contain named arguments, or contains one of them twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_without_duplicates)
        else:
            import yaml

            values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}. Specify a JSON or YAML file of arguments.") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}). Specify a JSON or YAML file of arguments."
        ) from None
    except RecursionError:
        raise ValueError(
            f"{path} is nested too deeply for a file of arguments. Write one value per argument."
        ) from None
    except Exception as error:  # yaml has errors of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be parsed ({reason}). Correct it there.") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f'{path} contains no named arguments. Write {{"train_file": "train.csv", ...}}.')
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return values


def _value(parser: HfArgumentParser, name: str, value: Any, hint: Any) -> Any:
    """A value from a file, parsed as argparse would parse it on the command line."""
    kinds = {getattr(kind, "__origin__", kind) for kind in (hint, *get_args(hint))}
    if isinstance(value, dict):
        if dict not in kinds:
            raise ValueError("a dictionary is given, but a single value is needed. Write the value alone.")
        return value
    if isinstance(value, list):
        if list not in kinds:
            raise ValueError("a list is given, but a single value is needed. Write the value alone.")
        if not value or dict in kinds or str in kinds:
            return value
        return [item for element in value for item in _parsed(parser, name, element)]
    if not isinstance(value, (str, int, float, bool)):
        value = str(value)  # a date of YAML
    parsed = _parsed(parser, name, value)
    return parsed


def _parsed(parser: HfArgumentParser, name: str, value: Any) -> Any:
    if isinstance(value, (dict, list)) or value is None:
        raise ValueError(f"{value!r} is in a list, but texts and numbers are needed there. Write a flat list.")
    namespace, unknown = parser.parse_known_args([f"--{name}={value}"], Namespace())
    return getattr(namespace, name)


def _current_word(word: str, former_names: Mapping[str, str]) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{_current_name(name.replace('-', '_'), former_names, '--', word=name)}{equals}{value}"


def _current_name(name: str, former_names: Mapping[str, str], dashes: str, word: str | None = None) -> str:
    if name not in former_names:
        return name if word is None else word
    new = former_names[name]
    warnings.warn(
        f"`{dashes}{name}` is called `{dashes}{new}` now; the old name will be removed in the next version.",
        FutureWarning,
        stacklevel=4,
    )
    return new


def _unknown(name: str, fields: set[str], dashes: str) -> str:
    if not dashes and name not in fields and not name.isidentifier():
        return f"{name!r} belongs to no argument. Write it after the argument's name. All arguments: `--help`."
    close = difflib.get_close_matches(name.replace("-", "_"), sorted(fields), n=1)
    remedy = f"The closest is `{dashes}{close[0]}`." if close else "All arguments: `--help`."
    return f"There is no argument `{dashes}{name}`. {remedy}"


# ---- Running a program ----


class _TolerantStream:
    """A standard stream that ignores a closed pipe or a full disk, so that neither ends the training."""

    def __init__(self, stream: Any):
        self._stream, self._broken = stream, False

    def write(self, text: str) -> int:
        if not self._broken:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):
                self._broken = True
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_standard_streams() -> None:
    """
    Make sure that file descriptors 0, 1 and 2 belong to the standard streams, so that a file opened later cannot get the descriptor of a
    closed stream and receive what is printed; and that a broken stream does not end the program.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif not isinstance(stream, _TolerantStream):
            setattr(sys, name, _TolerantStream(stream))


def run_program(main: Callable[[], None], name: str) -> None:
    """
    Run a program. For errors that the user can fix, print one sentence to standard error and exit: with code 2 for invalid input, with
    code 1 for others (full disk, memory, network). `SEP_MLDC_DEBUG=1` shows the traceback.

    Args:
        main (callable): the program.
        name (`str`): its name, printed before the sentence.
    """
    keep_standard_streams()
    try:
        main()
    except KeyboardInterrupt:
        _stop(name, "Interrupted.", 130)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        sentence = one_sentence(error)
        if sentence is None:
            raise
        _stop(name, sentence, 2 if isinstance(error, ValueError) else 1)
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def one_sentence(error: BaseException) -> str | None:
    """The message for the user, or `None` for a bug. A list after the first line is kept as a list."""
    first, *others = str(error).splitlines() or [""]
    is_list = bool(others) and all(line.startswith("- ") for line in others)
    text = "\n".join(" ".join(line.split()) for line in (first, *others)) if is_list else " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"Out of memory ({text[:200] or 'no details'}). Lower `per_device_train_batch_size` or `max_length`."
    if type(error).__name__ == "SafetensorError":
        return f"The weights cannot be read or written ({text})."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or text}."
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)) and not isinstance(
        error, UnicodeError
    ):
        return text or type(error).__name__
    return None


def _stop(name: str, sentence: str, code: int) -> NoReturn:
    sys.stderr.write(f"{name}: {sentence}\n")
    sys.stderr.flush()
    sys.exit(code)
