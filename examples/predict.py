#!/usr/bin/env python
"""
Label documents with a trained SEP-MLDC model: files in, JSON Lines out, in the same order.

    python examples/predict.py --model_name_or_path outputs/aapd --input_file new.jsonl --output_file labels.jsonl
    python examples/predict.py --model_name_or_path outputs/aapd --input_file new.csv --text_columns title body --output_file labels.jsonl --resume
    cat texts.txt | python examples/predict.py --model_name_or_path outputs/aapd --input_file - --output_file - --top_k 5

A line of the output is `{"id"?, "index", "labels": [{"label", "score"}, ...]}`, with `index` counting documents from 0. It is
written to OUTPUT.partial and gets its name at the end: a file of that name is whole. After a crash, a kill or a full disk, the
same command with `--resume` goes on after the last complete line. docs/prediction.md tells more.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcConfig,
    SepMldcForMultiLabelClassification,
)
from trainer.data.document_files import EXTENSIONS, READERS, expand_files, join_names, read_lines, shorten


STDIN = "/dev/stdin"
FORMATS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")
# A look-ahead block also ends here, so that a few huge documents do not fill the memory.
MAX_BLOCK_CHARACTERS = 16_000_000


@dataclass
class PredictArguments:
    """What to label, with which model, and which labels to write."""

    model_name_or_path: str = field(metadata={"help": "A trained SEP-MLDC checkpoint: folder or Hub name."})
    input_file: list[str] = field(
        metadata={
            "help": "Files or glob patterns: txt (one document a line), jsonl, json, csv, tsv, each also .gz or .zst, or "
            "parquet; or - for standard input."
        }
    )
    output_file: str = field(metadata={"help": "JSON Lines; - for standard output."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    input_format: str | None = field(
        default=None,
        metadata={"help": "By file ending if not given; txt for standard input.", "choices": list(FORMATS)},
    )
    text_columns: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "Joined by a blank."})
    id_column: str | None = field(default=None, metadata={"help": "Copied to `id`; a column `id` if there is one."})

    top_k: int | None = field(default=None, metadata={"help": "The best so many labels, whatever the thresholds."})
    threshold: float | None = field(default=None, metadata={"help": "One threshold for all labels, 0..1."})
    min_score: float | None = field(default=None, metadata={"help": "Leave out labels with a lower score."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a window; what the model takes."})
    window_stride: int | None = field(
        default=None, metadata={"help": "Tokens that the windows of a long document share; an eighth of a window."}
    )
    window_merge: str = field(
        default="max",
        metadata={
            "help": "How the windows' scores become one; 'first' cuts documents after the first window.",
            "choices": ["max", "mean", "attention", "first"],
        },
    )

    batch_size: int = field(default=32, metadata={"help": "Windows that go through the model together."})
    look_ahead: int = field(
        default=1024, metadata={"help": "Documents read at a time, to batch those of like length; lost on a kill."}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 arithmetic: faster where the hardware has it."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ...; the best there is if not given."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on with OUTPUT.partial."})
    overwrite_output_file: bool = field(default=False, metadata={"help": "Write over an output of an earlier run."})

    def __post_init__(self):
        for name in ("batch_size", "look_ahead"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`--{name}` is {getattr(self, name)}, but at least 1 is needed. Choose a larger number."
                )
        if self.output_file == "-" and self.resume:
            raise ValueError("`--resume` goes on with a file, but `--output_file` is standard output. Name a file.")
        if "-" in self.input_file and len(self.input_file) > 1:
            raise ValueError(
                f"`--input_file` is {self.input_file}, but standard input goes alone. Leave out the files."
            )
        if self.input_file == ["-"] and self.input_format in ("json", "parquet"):
            raise ValueError(f"{self.input_format} cannot be read from standard input. Send jsonl, or name a file.")


# ---- Reading ----


class Document(NamedTuple):
    index: int
    id: Any
    text: str


def format_of(path: str, given: str | None) -> str:
    if given is not None:
        return given
    if path == STDIN:
        return "txt"
    ending = os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1].lower()
    found = {".txt": "txt", **EXTENSIONS}.get(ending)
    if found is None:
        raise ValueError(
            f"{path}: the format is not known from the name. Choose `--input_format` among {', '.join(FORMATS)}."
        )
    return found


def read_text_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One document a line; an empty line is an empty document."""
    for number, line in read_lines(path):
        yield f"{path}, line {number}", {"text": line.rstrip("\r\n")}


def check_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: `{column}` is {shorten(value)}, but a text is needed. Write a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: `{column}` holds half a surrogate pair ({half!r}). Remove it.") from None
    return value


def read_documents(paths: list[str], args: PredictArguments) -> Iterator[Document]:
    """The documents of all files in order, one at a time."""
    index = 0
    for path in paths:
        kind = format_of(path, args.input_format)
        columns = ["text"] if kind == "txt" else args.text_columns
        for where, record in read_text_lines(path) if kind == "txt" else READERS[kind](path):
            id_column = args.id_column or ("id" if "id" in record else None)
            missing = [name for name in (*columns, id_column) if name is not None and name not in record]
            if missing:
                raise ValueError(
                    f"{where}: no column {join_names(missing)}. The columns are {join_names(record, 20)}: name them with "
                    "`--text_columns` and `--id_column`."
                )
            texts = [check_text(record[name], where, name) for name in columns]
            document_id = record[id_column] if id_column else None
            if document_id is not None and not isinstance(document_id, int):
                document_id = check_text(str(document_id), where, id_column)
            yield Document(index, document_id, " ".join(text for text in texts if text))
            index += 1


def count_documents(paths: list[str], args: PredictArguments) -> int | None:
    """For the progress bar: how many documents there are, where that can be told quickly."""
    total = 0
    for path in paths:
        kind = format_of(path, args.input_format)
        if kind == "parquet" and path.endswith(".parquet"):
            total += pq.ParquetFile(path).metadata.num_rows
        elif kind in ("txt", "jsonl") and path != STDIN and not path.endswith((".gz", ".zst")):
            with open(path, "rb") as stream:
                total += sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
        else:
            return None
    return total


def blocks_of(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Blocks of up to `size` documents. What was read before a bad document comes out before its error."""
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


# ---- Writing ----


class Output:
    """
    The JSON Lines file. Lines go to `path + ".partial"`, complete or (kill, full disk) with a cut last one, which resuming
    removes; `finish` gives the file its name.
    """

    def __init__(self, path: str, resume: bool, overwrite: bool):
        self.path, self.partial = path, path + ".partial"
        self.done, self.last = 0, None
        self.finished = False
        if path == "-":
            self.stream: BinaryIO = sys.stdout.buffer
            return
        if os.path.exists(path) and not overwrite:
            self.finished = resume
            if resume:
                return
            raise ValueError(f"{path} exists. Name another `--output_file`, or add `--overwrite_output_file`.")
        started = os.path.exists(self.partial) and os.path.getsize(self.partial) > 0
        if started and not resume and not overwrite:
            raise ValueError(
                f"{self.partial} holds a part of an earlier run. Add `--resume` to go on with it, or `--overwrite_output_file` "
                "to start again."
            )
        try:
            # Unbuffered: what a block has written is in the file, and a failed write leaves nothing behind to fail again.
            self.stream = open(self.partial, "r+b" if resume and started else "wb", buffering=0)
        except OSError as error:
            raise ValueError(
                f"{self.partial} cannot be written ({error.strerror}). Name another `--output_file`."
            ) from None
        if resume and started:
            self._go_to_last_complete_line()

    def _go_to_last_complete_line(self) -> None:
        end, position, last = 0, 0, b""
        with open(self.partial, "rb") as stream:
            for line in stream:
                position += len(line)
                if line.endswith(b"\n"):
                    self.done, end, last = self.done + 1, position, line
        if last:
            try:
                self.last = json.loads(last)
                matches = self.last["index"] == self.done - 1
            except (ValueError, KeyError, TypeError):
                matches = False
            if not matches:
                raise ValueError(
                    f"{self.partial}, line {self.done}: not a line that this command wrote as its number {self.done}. Remove the "
                    "file, or start again with `--overwrite_output_file`."
                )
        self.stream.truncate(end)
        self.stream.seek(end)

    def write(self, lines: list[bytes]) -> None:
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[self.stream.write(rest) :]
            if self.path == "-":
                self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ValueError(
                f"{self.partial} cannot be written any further ({error.strerror}). Make room, then add `--resume` to go on."
            ) from None

    def finish(self) -> None:
        if self.path == "-":
            return
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self.partial, self.path)


def skip_done(documents: Iterator[Document], output: Output) -> Iterator[Document]:
    """Leave out the documents that the output already has, after a check that they are the same ones."""
    for number in range(output.done):
        document = next(documents, None)
        if document is None:
            raise ValueError(
                f"{output.partial} has {output.done} lines, but the input has only {number} documents. Give the input of the run "
                "that is to be resumed, or start again with `--overwrite_output_file`."
            )
    if output.done and output.last.get("id") != document.id:
        raise ValueError(
            f"{output.partial} ends with document {output.last.get('id')!r}, but in the input it is {document.id!r}. Give the input "
            "of the run that is to be resumed, or start again with `--overwrite_output_file`."
        )
    return documents


# ---- Prediction ----


def load_pipeline(args: PredictArguments) -> MultiLabelDocumentClassificationPipeline:
    chosen = {
        "top_k": args.top_k,
        "threshold": args.threshold,
        "min_score": args.min_score,
        "max_length": args.max_length,
        "stride": args.window_stride,
    }
    config = AutoConfig.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    if config.model_type != SepMldcConfig.model_type:
        raise ValueError(
            f"{args.model_name_or_path} is a {config.model_type} model, but a trained {SepMldcConfig.model_type} model is needed. "
            "Train one with examples/run_mldc.py."
        )
    return MultiLabelDocumentClassificationPipeline(
        model=SepMldcForMultiLabelClassification.from_pretrained(
            args.model_name_or_path, revision=args.model_revision
        ).eval(),
        tokenizer=AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.model_revision),
        device=args.device,
        window_merge=args.window_merge,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def label_block(classify, block: list[Document], args: PredictArguments) -> list[bytes]:
    """Output lines of a block, in its order; the model sees the documents by length, so that batches hold little padding."""
    order = sorted(range(len(block)), key=lambda position: len(block[position].text))
    with torch.autocast(classify.device.type, dtype=torch.bfloat16, enabled=args.bf16):
        answers = classify([block[position].text for position in order], batch_size=args.batch_size)
    lines = [b""] * len(block)
    for position, labels in zip(order, answers):
        document = block[position]
        line = {"index": document.index, "labels": [{**entry, "score": round(entry["score"], 6)} for entry in labels]}
        if document.id is not None:
            line = {"id": document.id, **line}
        lines[position] = json.dumps(line, ensure_ascii=False).encode() + b"\n"
    return lines


def predict(args: PredictArguments) -> int:
    """Label all documents; returns how many this run has labelled."""
    paths = [STDIN] if args.input_file == ["-"] else expand_files(args.input_file)
    total = count_documents(paths, args)
    output = Output(args.output_file, args.resume, args.overwrite_output_file)
    if output.finished:
        print(f"{args.output_file} is already whole: nothing to resume.", file=sys.stderr)
        return 0
    classify = load_pipeline(args)
    documents = skip_done(read_documents(paths, args), output)
    count = 0
    with tqdm(total=total, initial=output.done, desc="Labelling", unit=" documents", mininterval=1.0) as progress:
        for block in blocks_of(documents, args.look_ahead):
            output.write(label_block(classify, block, args))
            count += len(block)
            progress.update(len(block))
    output.finish()
    return count


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PredictArguments, description=__doc__.splitlines()[1])
    try:
        (args,) = parser.parse_args_into_dataclasses(args=arguments)
        predict(args)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever reads standard output has enough. Python would complain once more when it closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        sys.exit(f"predict.py: {error}")


if __name__ == "__main__":
    main()
