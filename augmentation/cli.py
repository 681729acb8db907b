"""Command line: `sep-mldc-augment COMMAND ...`."""

import argparse
import json
import logging
import os
import sys

from .client import RequestSettings
from .files import AugmentationError, read_documents, read_expansions
from .prompts import LANGUAGES, PromptBuilder, template_names


DONE, ERROR, UNFINISHED, INTERRUPTED = 0, 1, 3, 130
EXAMPLE = (
    "cs.IR",
    "Retrieval, ranking and recommendation of documents and items.",
    "We study how users reformulate queries.",
)


def _json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _endpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and endpoint")
    group.add_argument("--model", required=True, help="model name that the endpoint knows")
    group.add_argument("--base-url", help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    group.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key"
    )
    group.add_argument("--temperature", type=float, help="overrides the command's own")
    group.add_argument("--max-tokens", type=int, help="longest answer; reasoning models need more than the default")
    group.add_argument(
        "--parameters",
        type=_json_object,
        default={},
        metavar="JSON",
        help='more fields of a request, such as {"top_p": 0.9}',
    )
    group.add_argument("--structured-output", choices=["auto", "json_schema", "text"], default="auto")
    group.add_argument("--batch", action="store_true", help="use the Batch API: half the price, answers within a day")
    group.add_argument("--batch-poll-seconds", type=float, default=30.0, help="time between two looks at a batch")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--dry-run", action="store_true", help="show requests, tokens, cost and five prompts; send nothing"
    )
    group.add_argument("--max-cost", type=float, help="most money for all answers of the journal")
    group.add_argument("--max-requests", type=int, help="most HTTP requests of this run, retries included")
    group.add_argument("--prices", metavar="FILE", help="price file that overrides the package's")
    group.add_argument("--concurrency", type=int, default=8, help="requests under way at the same time")
    group.add_argument("--requests-per-minute", type=float)
    group.add_argument("--tokens-per-minute", type=float)
    group.add_argument("--max-retries", type=int, default=6)
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for one attempt")
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", default=".", help="folder of the output, the journal and the failed requests")
    group.add_argument("--partial", action="store_true", help="write the output even if items are missing")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--template", default="generic", help=f"{', '.join(template_names())}, or the path of an own one"
    )
    group.add_argument("--dataset-description", default="", help="what the documents and labels are")
    group.add_argument("--genre", default="", help='what one document is called, such as "abstract"')
    group.add_argument("--language", default="en", choices=sorted(LANGUAGES), metavar="CODE", help="ISO 639-1 code")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    parser = argparse.ArgumentParser(prog="sep-mldc-augment", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    expand = commands.add_parser("expand-labels", help="explain each label in one sentence")
    expand.add_argument("labels", help="txt, json, csv or jsonl file of labels, or a train file")
    _prompt_options(expand)
    _endpoint_options(expand)

    tail = commands.add_parser("tail-samples", help="write pseudo-documents for rare labels")
    tail.add_argument("train", nargs="+", help='train file(s), JSON Lines of {"text", "labels"}')
    tail.add_argument("--expansions", metavar="FILE", help="label_descriptions.jsonl of expand-labels")
    tail.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="validation and test files")
    tail.add_argument("--labels", metavar="FILE", help="file of all labels, where some have no training document")
    tail.add_argument(
        "--tail-threshold", type=int, default=50, help="labels with fewer training documents are tail labels"
    )
    tail.add_argument("--per-label", type=int, default=50, help="pseudo-documents for each tail label")
    tail.add_argument("--tail-labels", nargs="+", metavar="LABEL", help="these labels instead of all tail labels")
    tail.add_argument(
        "--allow-no-demonstration", action="store_true", help="use the expansion alone where no document is usable"
    )
    tail.add_argument(
        "--max-document-tokens", type=int, default=2000, help="longest demonstration; longer ones are cut"
    )
    tail.add_argument("--seed", type=int, default=0)
    _prompt_options(tail)
    _endpoint_options(tail)

    check = commands.add_parser("review", help="keep good pseudo-documents, reject the others with a reason")
    check.add_argument("samples", help="pseudo_samples.jsonl")
    check.add_argument("--train", nargs="+", required=True, metavar="FILE", help="train file(s) of tail-samples")
    check.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="validation and test files")
    check.add_argument("--min-length-ratio", type=float, default=0.4, help="shortest, as a share of the demonstration")
    check.add_argument("--max-length-ratio", type=float, default=2.5, help="longest, as a share of the demonstration")
    check.add_argument("--near-duplicate-threshold", type=float, default=0.6, help="Jaccard similarity of 3-word runs")
    check.add_argument(
        "--scores", metavar="FILE", help="a trained model's scores of the samples, of examples/predict.py"
    )
    check.add_argument(
        "--min-agreement", type=float, help="smallest mean score of the intended labels; needs --scores"
    )
    check.add_argument("--output-dir", default=".", help="folder of the kept and the rejected samples")
    _prompt_options(check)

    sft = commands.add_parser("export-sft", help="write reviewed answers as chats, to tune an open model on")
    sft.add_argument("reviewed", nargs="+", help="pseudo_samples_kept.jsonl, label_descriptions.jsonl")
    sft.add_argument("--journal", required=True, metavar="FILE", help="journal.jsonl of the runs that wrote them")
    sft.add_argument("--output", default="sft.jsonl", metavar="FILE")
    sft.add_argument("--form", choices=["messages", "prompt-completion"], default="messages")

    summary = commands.add_parser("report", help="labels per decile before and after, tokens, cost, a picture")
    summary.add_argument("--train", nargs="+", required=True, metavar="FILE")
    summary.add_argument("--samples", metavar="FILE", help="pseudo-documents that training will use")
    summary.add_argument("--journal", nargs="+", default=[], metavar="FILE", help="journal.jsonl of all runs")
    summary.add_argument("--prices", metavar="FILE", help="price file that overrides the package's")
    summary.add_argument("--tail-threshold", type=int, default=50)
    summary.add_argument("--no-picture", action="store_true", help="do not draw the histogram")
    summary.add_argument("--output-dir", default=".", help="folder of the report and the picture")

    prompts = commands.add_parser("prompts", help="list the prompt templates, or show one filled in")
    prompts.add_argument("action", choices=["list", "show"])
    prompts.add_argument("name", nargs="?", default="generic", help="a template's name or path")
    prompts.add_argument("--train", metavar="FILE", help="show it with a document of this file")
    prompts.add_argument("--expansions", metavar="FILE", help="and with these expansions")
    _prompt_options(prompts)
    return parser


def _settings(args: argparse.Namespace) -> RequestSettings:
    return RequestSettings(
        model=args.model,
        base_url=args.base_url,
        api_key_env=args.api_key_env,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        parameters=args.parameters,
        structured_output=args.structured_output,
        concurrency=args.concurrency,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        max_requests=args.max_requests,
        max_cost=args.max_cost,
        max_retries=args.max_retries,
        timeout=args.timeout,
        prices=args.prices,
        batch=args.batch,
        batch_poll_seconds=args.batch_poll_seconds,
        progress=not args.quiet,
    )


def _prompts(args: argparse.Namespace) -> PromptBuilder:
    return PromptBuilder(args.template, args.dataset_description, args.genre, args.language)


def _finish(result) -> int:
    print(result)
    if getattr(result, "stopped", None) == "interrupted":
        return INTERRUPTED
    unfinished = getattr(result, "stopped", None) or getattr(result, "failed", 0)
    return UNFINISHED if unfinished else DONE


def _expand_labels(args: argparse.Namespace) -> int:
    from .expansion import expand_labels

    return _finish(
        expand_labels(args.labels, args.output_dir, _settings(args), _prompts(args), args.dry_run, args.partial)
    )


def _tail_samples(args: argparse.Namespace) -> int:
    from .tail_samples import TailOptions, generate_tail_samples

    options = TailOptions(
        args.tail_threshold,
        args.per_label,
        args.tail_labels,
        args.allow_no_demonstration,
        args.max_document_tokens,
        args.seed,
    )
    return _finish(
        generate_tail_samples(
            args.train,
            args.output_dir,
            _settings(args),
            args.expansions,
            _prompts(args),
            options,
            args.exclude,
            args.labels,
            args.dry_run,
            args.partial,
        )
    )


def _review(args: argparse.Namespace) -> int:
    from .review import ReviewOptions, review

    options = ReviewOptions(
        min_length_ratio=args.min_length_ratio,
        max_length_ratio=args.max_length_ratio,
        near_duplicate_threshold=args.near_duplicate_threshold,
        language=args.language,
        min_agreement=args.min_agreement,
    )
    print(review(args.samples, args.output_dir, args.train, args.exclude, options, _prompts(args), args.scores))
    return DONE


def _export_sft(args: argparse.Namespace) -> int:
    from .sft import export_sft

    print(f"{export_sft(args.reviewed, args.journal, args.output, args.form)} chats written: {args.output}")
    return DONE


def _report(args: argparse.Namespace) -> int:
    from .report import report

    picture = not args.no_picture
    print(report(args.train, args.output_dir, args.samples, args.journal, args.prices, args.tail_threshold, picture))
    return DONE


def _show_prompts(args: argparse.Namespace) -> int:
    if args.action == "list":
        print("\n".join(template_names()))
        return DONE
    args.template = args.name
    builder = _prompts(args)
    label, expansion, text = EXAMPLE
    labels = [(label, expansion)]
    if args.train:
        document = next((item for item in read_documents(args.train) if item.text and item.labels), None)
        if document is None:
            raise AugmentationError(f"{args.train} has no document with text and labels to show; give another file.")
        expansions = read_expansions(args.expansions) if args.expansions else {}
        label, text = document.labels[0], document.text
        labels = [(name, expansions.get(name, "")) for name in document.labels]
    from .prompts import approximate_tokens

    system, expand = builder.expand(label)
    _, sample = builder.sample(labels, text, approximate_tokens(text))
    print(f"template {builder.name}, hash {builder.template_hash}\n")
    for title, message in (("system", system), ("expand-labels", expand), ("tail-samples", sample)):
        print(f"[{title}]\n{message['content']}\n")
    return DONE


COMMANDS = {
    "expand-labels": _expand_labels,
    "tail-samples": _tail_samples,
    "review": _review,
    "export-sft": _export_sft,
    "report": _report,
    "prompts": _show_prompts,
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs a command.

    Returns:
        0 done; 1 stopped by a problem that its one sentence names; 3 unfinished (a limit, or failed items): the same command
        goes on; 130 interrupted. Wrong arguments exit with 2.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except AugmentationError as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
