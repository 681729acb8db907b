#!/usr/bin/env python
"""
Label the documents of files with a trained SEP-MLDC model, and write JSON Lines in the same order.

    python examples/predict.py --model_name_or_path outputs/aapd --input_file new.jsonl --output_file labels.jsonl
    python examples/predict.py --model_name_or_path outputs/aapd --input_file new.csv --text_columns title body --output_file labels.jsonl --resume
    cat texts.txt | python examples/predict.py --model_name_or_path outputs/aapd --input_file - --output_file - --top_k 5

Each line of the output is `{"id"?, "index", "labels": [{"label", "score"}, ...], "abstained"}`; `index` counts documents from 0, and `abstained`
is true if no label reaches its threshold. The number of abstained documents is reported at the end; `--abstained_file` lists them. Lines are
written to OUTPUT.partial, which is renamed to OUTPUT after the last one: a file with that name is always complete. OUTPUT.journal records what
the lines depend on. After a crash, a kill or a full disk, the same command with `--resume` continues after the last complete block.
See docs/prediction.md.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, is_abstained
from trainer.abstentions import abstained_rows, write_abstained
from trainer.backbones import is_onnx_export
from trainer.data.columns import Columns
from trainer.data.readers import expand_files, find_format, is_regular, read_records
from trainer.data.text_lines import COMPRESSIONS, check_file
from trainer.files import digest, is_special
from trainer.inference import load_pipeline
from trainer.ordered_workers import WorkerEnded, map_in_order
from trainer.resumable_lines import ResumableLines


FORMATS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")
STREAMED_FORMATS = ("txt", "jsonl", "csv", "tsv")
# Maximum size of a look-ahead block, so that a few huge documents do not fill the memory.
MAX_BLOCK_CHARACTERS = 16_000_000
# Arguments that affect the output. They must be the same when a prediction is resumed.
RESULT_ARGUMENTS = (
    "input_format",
    "text_columns",
    "id_column",
    "top_k",
    "threshold",
    "min_score",
    "min_labels",
    "min_expected_f1",
    "max_length",
    "window_stride",
    "window_merge",
    "bf16",
)


@dataclass
class PredictArguments:
    """What to label, with which model, and which labels to write."""

    model_name_or_path: str = field(
        metadata={"help": "A trained SEP-MLDC model: folder or Hub name of a checkpoint, or folder of an ONNX export."}
    )
    input_file: list[str] = field(
        metadata={
            "help": "Files or glob patterns: txt (one document per line), jsonl, json, csv, tsv, each also .gz or .zst, or "
            "parquet; or - for standard input."
        }
    )
    output_file: str = field(metadata={"help": "JSON Lines; - for standard output."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    input_format: str | None = field(
        default=None,
        metadata={"help": "Inferred from the file name; txt for standard input.", "choices": list(FORMATS)},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that make up the text, joined by a space. Defaults to `text`."}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column copied to `id`. Defaults to `id` if there is such a column."}
    )

    top_k: int | None = field(
        default=None, metadata={"help": "Return the best k labels, regardless of the thresholds."}
    )
    threshold: float | None = field(default=None, metadata={"help": "One threshold for all labels, from 0 to 1."})
    min_score: float | None = field(default=None, metadata={"help": "Leave out labels with a lower score."})
    min_labels: int | None = field(
        default=None,
        metadata={
            "help": 'If fewer labels reach their threshold, add the best of the others, with "below_threshold": true. Defaults to 0.'
        },
    )
    min_expected_f1: float | None = field(
        default=None,
        metadata={
            "help": "Also abstain on documents whose expected F1, according to the probabilities, is lower; from 0 to 1. The report of "
            "run_mldc.py shows how many documents each value sends to human review."
        },
    )
    abstained_file: str | None = field(
        default=None,
        metadata={
            "help": "Also list the documents none of whose labels reaches its threshold, for review: JSON Lines with id, index, text and, with "
            "`--min_labels`, the best labels."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per window. Defaults to as many as the model reads."}
    )
    window_stride: int | None = field(
        default=None, metadata={"help": "Tokens shared by neighboring windows. Defaults to an eighth of a window."}
    )
    window_merge: str = field(
        default="max",
        metadata={
            "help": "How the scores of the windows are combined; 'first' reads only the first window.",
            "choices": ["max", "mean", "attention", "first"],
        },
    )

    batch_size: int = field(default=32, metadata={"help": "Windows per forward pass."})
    look_ahead: int = field(
        default=1024,
        metadata={
            "help": "Documents per block. They are sorted by length within a block, and a kill loses at most one block."
        },
    )
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that label blocks at the same time, each with its own copy of the model. Defaults to the number of "
            "PyTorch's threads (cores, or OMP_NUM_THREADS) on a CPU, and to 1 on a GPU or for a single block."
        },
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16, which is faster on some hardware."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ... Defaults to the best available device."}
    )
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted prediction."})
    overwrite_output_file: bool = field(default=False, metadata={"help": "Replace an existing output."})

    def __post_init__(self):
        self._check_numbers()
        self._check_files()

    def _check_numbers(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("look_ahead", 1),
            ("num_workers", 1),
            ("top_k", 1),
            ("min_labels", 0),
            ("max_length", 1),
            ("window_stride", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`--{name}` is {value}, but it must be at least {least}. Choose a larger number.")
        for name in ("threshold", "min_expected_f1"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`--{name}` is {value}, but it must be from 0 to 1. Try 0.5.")
        # Scores of a model that ranks labels are not probabilities; the pipeline knows.
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ValueError(f"`--min_score` is {self.min_score}, but it must be a finite number. Try 0.1.")

    def _check_files(self) -> None:
        if not self.output_file or not all(self.input_file):
            raise ValueError("`--input_file` or `--output_file` is empty. Specify a file, or - for a standard stream.")
        for name in ("output_file", "abstained_file"):
            if (getattr(self, name) or "").endswith(COMPRESSIONS):
                raise ValueError(
                    f"`--{name}` is {getattr(self, name)}, but the file is not compressed. Leave out the last extension, and compress it later."
                )
        if self.output_file == "-" and self.resume:
            raise ValueError("`--resume` needs a file, but `--output_file` is standard output. Specify a file.")
        if self.output_file == "-" and self.abstained_file:
            raise ValueError(
                "`--abstained_file` is made from the output, but `--output_file` is standard output. Specify a file."
            )
        if "-" in self.input_file and len(self.input_file) > 1:
            raise ValueError(
                f"`--input_file` is {self.input_file}, but standard input must be the only input. Leave out the files."
            )
        if self.input_format == "txt" and (self.text_columns or self.id_column):
            raise ValueError("`--text_columns` and `--id_column` need columns, but txt has none. Leave them out.")


# ---- Reading ----


class Document(NamedTuple):
    index: int
    id: Any
    text: str


def input_paths(args: PredictArguments) -> list[str]:
    """The files to read, each of a known format that it can be read in."""
    paths = expand_files(args.input_file)
    for path in paths:
        check_file(path)
        kind = format_of(path, args)
        if kind not in STREAMED_FORMATS and not is_regular(path):
            raise ValueError(
                f"{path}: {kind} cannot be read from a pipe. Specify a file, or send {' or '.join(STREAMED_FORMATS)}."
            )
        if kind == "txt" and (args.text_columns or args.id_column):
            raise ValueError(
                f"{path}: a text file has no columns. Leave out `--text_columns` and `--id_column`, or specify the format of the file "
                "with `--input_format`."
            )
    return paths


def format_of(path: str, args: PredictArguments) -> str:
    return find_format(path, args.input_format or "auto")


def read_documents(paths: list[str], args: PredictArguments) -> Iterator[Document]:
    """The documents of all files in order, one at a time."""
    index = 0
    wanted = Columns(text=tuple(args.text_columns or ["text"]), labels=None, id=args.id_column)
    for path in paths:
        for where, record in read_records(path, format_of(path, args)):
            columns = wanted.check(record, where)
            yield Document(index, id_of(record, columns.id), columns.text_of(record, where))
            index += 1


def id_of(record: dict[str, Any], column: str | None) -> int | str | None:
    """An integer as it is, anything else as text; an unpaired surrogate, which is not a character, becomes a question mark."""
    value = None if column is None else record[column]
    if value is None or isinstance(value, int):
        return value
    return str(value).encode(errors="replace").decode()


def count_documents(paths: list[str], args: PredictArguments) -> int | None:
    """For the progress bar: the number of documents, if it can be found quickly and without reading a pipe."""
    total = 0
    for path in paths:
        kind = format_of(path, args)
        if not is_regular(path) or path.endswith((".gz", ".zst")):
            return None
        if kind == "parquet":
            try:
                total += pq.ParquetFile(path).metadata.num_rows
            except (pa.ArrowException, OSError):
                return None  # the reader says what is wrong
        elif kind in ("txt", "jsonl"):
            with open(path, "rb") as stream:
                total += sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
        else:
            return None
    return total


def blocks_of(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Blocks of up to `size` documents. Those read before a bad document are returned before its error is raised."""
    block, characters = [], 0
    try:
        for document in documents:
            block.append(document)
            characters += len(document.text)
            if len(block) == size or characters >= MAX_BLOCK_CHARACTERS:
                yield block
                block, characters = [], 0
    except ValueError:
        if block:
            yield block
        raise
    if block:
        yield block


def digest_of(document: Document) -> str:
    return digest(json.dumps(document.id), document.text)


class DocumentDigest:
    """Digest of all documents so far, ids included."""

    def __init__(self):
        self._total = hashlib.sha256()

    def add(self, documents: Iterable[Document]) -> str:
        return self.add_digests(map(digest_of, documents))

    def add_digests(self, digests: Iterable[str]) -> str:
        """As `add`, of what `digest_of` returned for each document."""
        for value in digests:
            self._total.update(value.encode())
        return self._total.hexdigest()


# ---- Writing ----


class DirectOutput:
    """Standard output, a FIFO or a device: written to as the lines come, and never replaced. It cannot be resumed."""

    num_done = 0
    is_complete = False

    def __init__(self, path: str):
        if path != "-":
            self.name, self._stream = path, open(path, "wb", buffering=0)
        elif sys.stdout is None:
            raise ValueError("Standard output is closed. Open it (`> file`), or specify a file with `--output_file`.")
        else:
            self.name, self._stream = "Standard output", sys.stdout.buffer

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.name != "Standard output":
            self._stream.close()

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Nothing to compare with."""

    def write(self, lines: list[bytes], num_items: int, input_digest: str) -> None:
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(f"{self.name} cannot be written any further ({error.strerror}). Make room.") from None

    def finish(self) -> None:
        """Nothing to rename."""


def open_output(args: PredictArguments, paths: list[str]) -> DirectOutput | ResumableLines:
    """The output, checked before a model is loaded."""
    path = args.output_file
    if path != "-":
        check_distinct(path, [*paths, *model_files(args.model_name_or_path)])
    if args.abstained_file:
        check_abstained_file(args, paths)
    if path == "-" or is_special(path):
        if args.resume or args.abstained_file:
            name = "resume" if args.resume else "abstained_file"
            raise ValueError(f"`--{name}` needs a file, but {path} is a pipe or a device. Specify a file.")
        return DirectOutput(path)
    return ResumableLines(path, resume=args.resume, overwrite=args.overwrite_output_file)


def check_abstained_file(args: PredictArguments, paths: list[str]) -> None:
    """Checks that the list can be written, and that it overwrites nothing except an existing list."""
    path = str(args.abstained_file)
    written = [args.output_file, f"{args.output_file}.partial", f"{args.output_file}.journal"]
    if os.path.realpath(path) in map(os.path.realpath, written):
        raise ValueError(f"`--abstained_file` is {path}, which the output is written to. Specify another file.")
    check_distinct(path, [*paths, *model_files(args.model_name_or_path)], "--abstained_file")
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(
            f"`--abstained_file` {path} cannot be written. Specify a file in a folder that exists and is writable."
        )
    if os.path.exists(path) and not is_special(path) and not (args.resume or args.overwrite_output_file):
        raise ValueError(f"{path} exists. Specify another `--abstained_file`, or add `--overwrite_output_file`.")


def check_distinct(output: str, others: list[str], argument: str = "--output_file") -> None:
    """Checks that no input file is also an output."""
    target = os.path.realpath(output)
    for written in (target, f"{target}.partial", f"{target}.journal"):
        for other in others:
            if os.path.exists(written) and os.path.exists(other) and os.path.samefile(written, other):
                if is_special(written):
                    continue  # a terminal
                raise ValueError(
                    f"`{argument}` would write to {written}, which is read as {other}. Specify another output."
                )


def model_files(folder: str) -> list[str]:
    return [entry.path for entry in os.scandir(folder)] if os.path.isdir(folder) else []


# ---- Prediction ----


def make_pipeline(args: PredictArguments) -> MultiLabelDocumentClassificationPipeline:
    chosen = {
        "top_k": args.top_k,
        "threshold": args.threshold,
        "min_score": args.min_score,
        "min_labels": args.min_labels,
        "min_expected_f1": args.min_expected_f1,
        "max_length": args.max_length,
        "stride": args.window_stride,
    }
    return load_pipeline(
        args.model_name_or_path,
        args.model_revision,
        args.device,
        window_merge=args.window_merge,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def fingerprint_of(classify: MultiLabelDocumentClassificationPipeline, args: PredictArguments) -> dict[str, Any]:
    """Everything that the output depends on, except the documents."""
    model, weights = classify.model, []
    if is_onnx_export(args.model_name_or_path):
        for path in sorted(Path(args.model_name_or_path).glob("*.onnx*")):
            weights += [path.name, path.read_bytes()]
    else:
        for name, tensor in sorted(model.state_dict().items()):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            weights += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", data.data]
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "model weights": digest(*weights),
        "model configuration": digest(json.dumps(config, sort_keys=True, default=str)),
        "tokenizer": digest(classify.tokenizer.backend_tokenizer.to_str(), str(classify.tokenizer.model_max_length)),
        **{f"--{name}": getattr(args, name) for name in RESULT_ARGUMENTS},
    }


def check_fingerprint(classify, args: PredictArguments, expected: dict[str, Any]) -> None:
    """Whether a worker has loaded the model that the prediction was started with."""
    if fingerprint_of(classify, args) != expected:
        raise ValueError(
            f"{args.model_name_or_path} has changed since this prediction was started. Specify a model that does not change."
        )


def label_texts(classify, texts: list[str], args: PredictArguments) -> list[list[dict[str, Any]]]:
    """The labels of each text. The model reads the texts by length, so that batches hold little padding."""
    order = sorted(range(len(texts)), key=lambda position: len(texts[position]))
    with torch.autocast(classify.device.type, dtype=torch.bfloat16, enabled=args.bf16):
        answers = classify([texts[position] for position in order], batch_size=args.batch_size)
    found: list[list[dict[str, Any]]] = [[] for _ in texts]
    for position, labels in zip(order, answers):
        found[position] = [{**entry, "score": round(entry["score"], 6)} for entry in labels]
    return found


def line_of(document: Document, labels: list[dict[str, Any]]) -> bytes:
    line = {"index": document.index, "labels": labels, "abstained": is_abstained(labels)}
    if document.id is not None:
        line = {"id": document.id, **line}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def label_block(classify, block: list[Document], args: PredictArguments) -> list[bytes]:
    """The lines of a block, in its order."""
    return list(map(line_of, block, label_texts(classify, [document.text for document in block], args)))


def label_blocks(
    classify: MultiLabelDocumentClassificationPipeline,
    blocks: Iterator[list[Document]],
    args: PredictArguments,
    fingerprint: dict[str, Any],
) -> Iterator[tuple[list[Document], list[bytes]]]:
    """Each block with its lines, in order: from this process, or from workers where there are several blocks for them."""
    num_workers = args.num_workers or (torch.get_num_threads() if classify.device.type == "cpu" else 1)
    if num_workers > 1:
        several, blocks = has_several(blocks)
        num_workers = num_workers if several else 1
    if num_workers == 1:
        for block in blocks:
            yield block, label_block(classify, block, args)
        return
    threads = max(1, torch.get_num_threads() // num_workers)
    yield from map_in_order(label_in_worker, blocks, num_workers, start_worker, (args, fingerprint, threads))


def has_several(blocks: Iterator[list[Document]]) -> tuple[bool, Iterator[list[Document]]]:
    """Whether there are at least two blocks, and an iterator over all of them."""
    first, error = [], None
    try:
        for block in blocks:
            first.append(block)
            if len(first) == 2:
                break
    except ValueError as bad:
        error = bad

    def everything() -> Iterator[list[Document]]:
        yield from first
        if error is not None:
            raise error
        yield from blocks

    return len(first) == 2, everything()


class Worker:
    """State of a worker process: its arguments, and the pipeline, which is loaded for the first block."""

    args: PredictArguments
    fingerprint: dict[str, Any]
    classify: MultiLabelDocumentClassificationPipeline | None = None


def start_worker(args: PredictArguments, fingerprint: dict[str, Any], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers_logging.disable_progress_bar()
    Worker.args, Worker.fingerprint = args, fingerprint


def label_in_worker(block: list[Document]) -> list[bytes]:
    if Worker.classify is None:
        classify = make_pipeline(Worker.args)
        check_fingerprint(classify, Worker.args, Worker.fingerprint)
        Worker.classify = classify
    return label_block(Worker.classify, block, Worker.args)


def skip_done(documents: Iterator[Document], output: DirectOutput | ResumableLines, seen: DocumentDigest) -> None:
    """Skip the documents whose lines are already written, and check that they have not changed."""
    for number in range(output.num_done):
        document = next(documents, None)
        if document is None:
            raise ValueError(
                f"{output.path} has {output.num_done} lines, but the input has only {number} documents. Resume with the same input, "
                "or start again with `--overwrite_output_file`."
            )
        so_far = seen.add([document])
    if output.num_done and so_far != output.input_digest:
        raise ValueError(
            f"The first {output.num_done} documents are not those that {output.path} was started with. Resume with the same input, "
            "or start again with `--overwrite_output_file`."
        )


def check_not_grown(rest: Iterator[Document], args: PredictArguments) -> None:
    if next(rest, None) is not None:
        raise ValueError(
            f"{args.output_file} is complete, but the input has grown since. Specify another output, or start again with "
            "`--overwrite_output_file`."
        )


def predict(args: PredictArguments) -> int:
    """Label all documents; returns how many were labeled by this run."""
    paths = input_paths(args)
    total = count_documents(paths, args)
    with open_output(args, paths) as output:
        classify = make_pipeline(args)
        if classify.device.type != "cpu" and (args.num_workers or 1) > 1:
            raise ValueError(
                f"`--num_workers` is {args.num_workers}, but the model runs on {classify.device}, which one process uses fully. Leave "
                "it out, or add `--device cpu`."
            )
        fingerprint = fingerprint_of(classify, args)
        output.begin(fingerprint)
        documents, seen = read_documents(paths, args), DocumentDigest()
        skip_done(documents, output, seen)
        if output.is_complete:
            check_not_grown(documents, args)
            print(f"{args.output_file} is complete: nothing to resume.", file=sys.stderr)
            report_abstained(args, paths)
            return 0
        count = num_abstained = 0
        with tqdm(
            total=total, initial=output.num_done, desc="Labeling", unit=" documents", mininterval=1.0
        ) as progress:
            blocks = blocks_of(documents, args.look_ahead)
            with contextlib.closing(label_blocks(classify, blocks, args, fingerprint)) as labeled:
                for block, lines in labeled:
                    output.write(lines, len(block), seen.add(block))
                    count += len(block)
                    num_abstained += sum(1 for _ in abstained_rows(lines))
                    progress.update(len(block))
        output.finish()
        report_abstained(args, paths, count, num_abstained)
    return count


def report_abstained(args: PredictArguments, paths: list[str], num_documents: int = 0, num_abstained: int = 0) -> None:
    """
    Report how many documents the model abstains from labeling, and list them if `--abstained_file` is given.

    Args:
        paths (`list[str]`): the input. Its texts are listed, unless it is a pipe.
        num_documents, num_abstained (`int`): of this run. With a list, those of all runs are counted.
    """
    where = ""
    if args.abstained_file:
        readable = all(map(is_regular, paths))
        texts = (document.text for document in read_documents(paths, args)) if readable else None
        with open(args.output_file, "rb") as lines:
            num_abstained = write_abstained(args.abstained_file, abstained_rows(lines), texts)
        with open(args.output_file, "rb") as lines:
            num_documents = sum(1 for _ in lines)
        where = f" {args.abstained_file} lists them."
    if num_abstained:
        print(
            f"The model abstains on {num_abstained:,} of {num_documents:,} documents: it assigns no label to them.{where}",
            file=sys.stderr,
        )


def open_closed_streams() -> None:
    """
    Open the null device in place of closed standard streams. Otherwise, the next file to be opened gets their file descriptor and receives
    what libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def main(arguments: list[str] | None = None) -> None:
    open_closed_streams()
    parser = HfArgumentParser(PredictArguments, description=__doc__.splitlines()[1])
    try:
        (args,) = parser.parse_args_into_dataclasses(args=arguments)
        predict(args)
    except BrokenPipeError:
        # The reader of standard output has stopped. Python would raise again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        sys.exit(f"predict.py: {str(error).splitlines()[0]} Choose a smaller `--batch_size`, then add `--resume`.")
    except KeyboardInterrupt:
        sys.exit("predict.py: interrupted. Add `--resume` to continue.")
    except (ValueError, OSError, ImportError, WorkerEnded) as error:
        sys.exit(f"predict.py: {error}")


if __name__ == "__main__":
    main()
