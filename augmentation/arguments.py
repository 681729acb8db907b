"""The arguments of `sep-mldc-augment`."""

import argparse
import json
from typing import Any

from .prompts import LANGUAGES, template_names
from .sft import FORMS


DESCRIPTION = "Label descriptions and pseudo-documents from a language model."


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    parser = argparse.ArgumentParser(prog="sep-mldc-augment", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_describe_labels, _write_pseudo_documents, _review, _export_sft, _report, _prompts):
        add(commands)
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a JSON object; write '{{\"top_p\": 0.9}}'")
    return value


def _describe_labels(commands: Any) -> None:
    parser = commands.add_parser("describe-labels", help="describe each label in one sentence")
    parser.add_argument("labels", help="txt, json, jsonl, csv or tsv file of labels, or a training file")
    _add_label_delimiter(parser)
    _add_prompt(parser)
    _add_endpoint(parser)
    _add_limits(parser)
    _add_output(parser)


def _write_pseudo_documents(commands: Any) -> None:
    parser = commands.add_parser(
        "write-pseudo-documents", help="write pseudo-documents for tail labels, or for all labels"
    )
    parser.add_argument(
        "train",
        nargs="*",
        help='training file(s), JSON Lines of {"text", "labels"}; without one, all labels get pseudo-documents',
    )
    parser.add_argument("--label-descriptions", metavar="FILE", help="label_descriptions.jsonl of describe-labels")
    _add_label_delimiter(parser)
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="validation and test files")
    parser.add_argument("--labels", metavar="FILE", help="file of all labels, if some have no training document")
    parser.add_argument(
        "--label-parents",
        metavar="FILE",
        help="label parents, as csv of child and parent, json, or SKOS: excludes near misses of broader and narrower labels",
    )
    parser.add_argument(
        "--tail-threshold", type=int, default=50, help="labels with fewer training documents are tail labels"
    )
    parser.add_argument("--per-label", type=int, default=50, help="pseudo-documents per tail label")
    parser.add_argument("--tail-labels", nargs="+", metavar="LABEL", help="these labels instead of all tail labels")
    parser.add_argument(
        "--allow-no-demonstration",
        action="store_true",
        help="use the description alone for labels without a usable document",
    )
    parser.add_argument(
        "--max-document-tokens",
        type=int,
        default=2000,
        help="maximum length of a demonstration; longer ones are truncated",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the order of demonstrations and the choice of candidate labels",
    )
    parser.add_argument(
        "--hard-share",
        type=float,
        metavar="SHARE",
        help="share of near misses, which only seem to have a similar label; defaults to 0.2 without training file, else 0",
    )
    parser.add_argument(
        "--several-share",
        type=float,
        metavar="SHARE",
        help="share of documents, among those without demonstration, for which the model chooses additional labels; defaults to 0.4 without training file, else 0",
    )
    parser.add_argument("--max-labels", type=int, default=3, help="maximum number of labels of these documents")
    parser.add_argument(
        "--length",
        type=int,
        metavar="TOKENS",
        help="length in tokens of a document without demonstration; defaults to 150 without training file",
    )
    _add_prompt(parser)
    _add_endpoint(parser)
    _add_limits(parser)
    _add_output(parser)


def _review(commands: Any) -> None:
    parser = commands.add_parser("review", help="keep good pseudo-documents, reject the others with a reason")
    parser.add_argument("pseudo_documents", help="pseudo_documents.jsonl")
    parser.add_argument(
        "--train", nargs="+", metavar="FILE", help="training file(s) they were made from, if there are any"
    )
    _add_label_delimiter(parser)
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="validation and test files")
    parser.add_argument(
        "--min-length-ratio", type=float, default=0.4, help="minimum length, relative to the demonstration"
    )
    parser.add_argument(
        "--max-length-ratio", type=float, default=2.5, help="maximum length, relative to the demonstration"
    )
    parser.add_argument(
        "--near-duplicate-threshold", type=float, default=0.6, help="Jaccard similarity of three-word shingles"
    )
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="scores of the pseudo-documents from a trained model, written by examples/predict.py",
    )
    parser.add_argument(
        "--min-agreement", type=float, help="minimum mean score of the intended labels; needs --scores"
    )
    parser.add_argument("--output-dir", default=".", help="folder of the kept and the rejected pseudo-documents")
    _add_prompt(parser)


def _export_sft(commands: Any) -> None:
    parser = commands.add_parser("export-sft", help="write reviewed answers as chats, to fine-tune an open model")
    parser.add_argument("reviewed", nargs="+", help="pseudo_documents_kept.jsonl, label_descriptions.jsonl")
    parser.add_argument("--journal", required=True, metavar="FILE", help="journal.jsonl of the runs that wrote them")
    parser.add_argument("--output", default="sft.jsonl", metavar="FILE", help="file to write")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="form of a chat")


def _report(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="report labels per decile before and after, tokens and cost, with a histogram"
    )
    parser.add_argument("--train", nargs="+", metavar="FILE", help="training file(s), if there are any")
    _add_label_delimiter(parser)
    parser.add_argument("--pseudo-documents", metavar="FILE", help="pseudo-documents that training will use")
    parser.add_argument("--journal", nargs="+", default=[], metavar="FILE", help="journal.jsonl of all runs")
    parser.add_argument("--prices", metavar="FILE", help="price file that overrides the package's")
    parser.add_argument(
        "--tail-threshold", type=int, default=50, help="labels with fewer training documents are tail labels"
    )
    parser.add_argument("--no-picture", action="store_true", help="do not draw the histogram")
    parser.add_argument("--output-dir", default=".", help="folder of the report and the histogram")


def _prompts(commands: Any) -> None:
    parser = commands.add_parser("prompts", help="list the prompt templates, or show one filled in")
    parser.add_argument("action", choices=["list", "show"])
    parser.add_argument("name", nargs="?", default="generic", help="a template's name or path")
    parser.add_argument("--train", metavar="FILE", help="show it with a document from this file")
    parser.add_argument("--label-descriptions", metavar="FILE", help="and with these label descriptions")
    _add_prompt(parser)


def _add_label_delimiter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label-delimiter", metavar="TEXT", help="separator of joined labels in a training file")


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--template", default="generic", help=f"{', '.join(template_names())}, or the path of your own template"
    )
    group.add_argument("--dataset-description", default="", help="what the documents and labels are")
    group.add_argument("--genre", default="", help='what one document is called, such as "abstract"')
    group.add_argument("--language", default="en", choices=sorted(LANGUAGES), metavar="CODE", help="ISO 639-1 code")


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and endpoint")
    group.add_argument("--model", required=True, help="model name that the endpoint knows")
    group.add_argument("--base-url", help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    group.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key"
    )
    group.add_argument("--temperature", type=float, help="overrides the command's default temperature")
    group.add_argument(
        "--max-tokens", type=int, help="maximum length of an answer; reasoning models need more than the default"
    )
    group.add_argument(
        "--parameters",
        type=_json_object,
        default={},
        metavar="JSON",
        help='more fields of a request, such as {"top_p": 0.9}',
    )
    group.add_argument(
        "--structured-output",
        choices=["auto", "json_schema", "text"],
        default="auto",
        help="requested format of answers",
    )
    group.add_argument("--batch", action="store_true", help="use the Batch API: half the price, answers within a day")
    group.add_argument(
        "--batch-poll-seconds", type=float, default=30.0, help="time between two status checks of a batch"
    )
    group.add_argument(
        "--abandon-batches",
        action="store_true",
        help="send, and pay for, the requests of batches again that can no longer be accessed",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--dry-run", action="store_true", help="show requests, tokens, cost and five prompts; send nothing"
    )
    group.add_argument("--max-cost", type=float, help="maximum cost of all answers in the journal")
    group.add_argument(
        "--max-requests", type=int, help="maximum number of HTTP requests of this run, retries included"
    )
    group.add_argument("--prices", metavar="FILE", help="price file that overrides the package's")
    group.add_argument("--concurrency", type=int, default=8, help="maximum number of concurrent requests")
    group.add_argument("--requests-per-minute", type=float, help="rate limit of the endpoint")
    group.add_argument("--tokens-per-minute", type=float, help="rate limit of the endpoint, prompt plus answer")
    group.add_argument("--max-retries", type=int, default=6, help="maximum number of retries after a transient error")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds per attempt")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", default=".", help="folder of the output, the journal and the failed requests")
    group.add_argument("--partial", action="store_true", help="write the output even if items are missing")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
