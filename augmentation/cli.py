"""Command line: `sep-mldc-augment COMMAND ...`."""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from .arguments import build_parser
from .deprecated import expand_labels, generate_tail_samples, warn
from .errors import AugmentationError
from .files import read_documents, read_label_descriptions
from .label_descriptions import describe_labels
from .prompts import PromptBuilder, template_names
from .pseudo_documents import PseudoDocumentOptions, write_pseudo_documents
from .redaction import Redactor
from .report import report
from .review import ReviewOptions, review
from .settings import RequestSettings
from .sft import export_sft
from .tokens import approximate_tokens


DONE, ERROR, UNFINISHED, INTERRUPTED = 0, 1, 3, 130
EXAMPLE = (
    "cs.IR",
    "Retrieval, ranking and recommendation of documents and items.",
    "We study how users reformulate queries.",
)
NEAR = ("cs.DB", "Database systems: storage, transactions and query processing.")
OLD_COMMANDS = {"expand-labels": "describe-labels", "tail-samples": "write-pseudo-documents"}
OLD_OPTIONS = {"--expansions": "--label-descriptions", "--samples": "--pseudo-documents"}


def _fields_of(kind: Any, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Those arguments that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names} | more


def _settings(args: argparse.Namespace) -> RequestSettings:
    return RequestSettings(**_fields_of(RequestSettings, args, progress=not args.quiet))


def _prompts(args: argparse.Namespace) -> PromptBuilder:
    return PromptBuilder(args.template, args.dataset_description, args.genre, args.language)


def _show(result: Any) -> None:
    """Prints a result."""
    try:
        print(result, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AugmentationError(
            f"standard output cannot be written ({error.strerror}); all files have been written, only the summary is lost."
        ) from None


def _finish(result: Any) -> int:
    _show(result)
    stopped = getattr(result, "stopped", None)
    if stopped == "interrupted":
        return INTERRUPTED
    return UNFINISHED if stopped or getattr(result, "failed", 0) else DONE


def _describe_labels(args: argparse.Namespace) -> int:
    function = expand_labels if args.old_name else describe_labels
    return _finish(
        function(
            args.labels,
            args.output_dir,
            _settings(args),
            _prompts(args),
            args.dry_run,
            args.partial,
            args.label_delimiter,
        )
    )


def _write_pseudo_documents(args: argparse.Namespace) -> int:
    function = generate_tail_samples if args.old_name else write_pseudo_documents
    return _finish(
        function(
            args.train,
            args.output_dir,
            _settings(args),
            args.label_descriptions,
            _prompts(args),
            PseudoDocumentOptions(**_fields_of(PseudoDocumentOptions, args)),
            args.exclude,
            args.labels,
            args.dry_run,
            args.partial,
            args.label_delimiter,
            args.label_parents,
        )
    )


def _review(args: argparse.Namespace) -> int:
    _show(
        review(
            args.pseudo_documents,
            args.output_dir,
            args.train,
            args.exclude,
            ReviewOptions(**_fields_of(ReviewOptions, args)),
            _prompts(args),
            args.scores,
            args.label_delimiter,
        )
    )
    return DONE


def _export_sft(args: argparse.Namespace) -> int:
    _show(f"{export_sft(args.reviewed, args.journal, args.output, args.form)} chats written: {args.output}")
    return DONE


def _report(args: argparse.Namespace) -> int:
    _show(
        report(
            args.train,
            args.output_dir,
            args.pseudo_documents,
            args.journal,
            args.prices,
            args.tail_threshold,
            not args.no_picture,
            args.label_delimiter,
        )
    )
    return DONE


def _show_prompts(args: argparse.Namespace) -> int:
    if args.action == "list":
        _show("\n".join(template_names()))
        return DONE
    args.template = args.name
    builder = _prompts(args)
    label, description, text = EXAMPLE
    labels = [(label, description)]
    if args.train:
        document = next((item for item in read_documents(args.train) if item.text and item.labels), None)
        if document is None:
            raise AugmentationError(f"{args.train} has no document with text and labels to show; give another file.")
        descriptions = read_label_descriptions(args.label_descriptions) if args.label_descriptions else {}
        label, text = document.labels[0], document.text
        labels = [(name, descriptions.get(name, "")) for name in document.labels]
    system, describe = builder.label_description(label)
    length = approximate_tokens(text)
    _, write = builder.pseudo_document(labels, text, length)
    _, near_miss = builder.pseudo_document(labels, text, length, near=NEAR)
    _, several = builder.pseudo_document(labels[:1], None, length, candidates=[NEAR])
    _show(f"template {builder.name}, hash {builder.template_hash}\n")
    titles = ("system", "describe-labels", "write-pseudo-documents", "a near miss", "several labels")
    for title, message in zip(titles, (system, describe, write, near_miss, several)):
        _show(f"[{title}]\n{message['content']}\n")
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "describe-labels": _describe_labels,
    "write-pseudo-documents": _write_pseudo_documents,
    "review": _review,
    "export-sft": _export_sft,
    "report": _report,
    "prompts": _show_prompts,
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; commands and options of version 0.1 are accepted with a `FutureWarning`."""
    words = list(sys.argv[1:] if argv is None else argv)
    old_name = bool(words) and words[0] in OLD_COMMANDS
    if old_name:
        warn(f"The command {words[0]}", OLD_COMMANDS[words[0]])
        words[0] = OLD_COMMANDS[words[0]]
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in OLD_OPTIONS:
            warn(f"The option {option}", OLD_OPTIONS[option])
            words[place] = f"{OLD_OPTIONS[option]}{equals}{value}"
    args = build_parser().parse_args(words)
    args.old_name = old_name
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Returns:
        The exit code: 0 success; 1 error, described in one sentence; 3 unfinished (a limit was reached or items failed; the same
        command continues); 130 interrupted. Invalid arguments exit with 2.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args = _parse(argv)
    redact = Redactor.of_environment(getattr(args, "api_key_env", "OPENAI_API_KEY"))
    try:
        return COMMANDS[args.command](args)
    except AugmentationError as error:
        _print_error(f"error: {redact(str(error))}")
        return ERROR
    except KeyboardInterrupt:
        _print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as head, has stopped reading
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:  # a bug, or an unexpected fault of the machine
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}, line {place.lineno}"
        logging.debug("unexpected error", exc_info=True)
        _print_error(
            f"error: something unexpected happened ({type(error).__name__}: {redact.line(error)}, at {where}); received answers "
            "are in the journal: run the same command again, and report the error if it occurs again."
        )
        return ERROR


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)
