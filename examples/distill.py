#!/usr/bin/env python
"""
Distill a trained checkpoint into a fast student, whose encoder is a table of token embeddings.

    python examples/distill.py --teacher outputs/aapd --train_file unlabeled.jsonl --validation_file dev.jsonl \
        --test_file test.jsonl --output_dir outputs/aapd-student

Training documents need no labels. Validation documents do: the weight of lexical scores and the thresholds are tuned on them.
Student and teacher are compared on the test documents. All arguments: `python examples/distill.py --help`.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.command_line import parse_arguments, run_program
from trainer.data import close_labels, count_unknown_labels, encode_labels, load_splits, tokenize
from trainer.distillation import DEFAULTS, DistillationTrainer
from trainer.inference import load_trained
from trainer.run_arguments import run_defaults
from trainer.run_outputs import check_output_folder, removed_if_empty, save_model_atomically, write_json


TABLE = ("p@1", "p@5", "ndcg@5", "psp@5", "f1_micro", "f1_macro")


@dataclass
class DistillArguments:
    """The teacher and the documents."""

    teacher: str | None = field(default=None, metadata={"help": "Folder or Hub name of a trained checkpoint."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Documents, with labels or without: csv, tsv, json, jsonl or parquet, each also .gz or .zst."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Documents with labels, for tuning."})
    test_file: list[str] | None = field(
        default=None, metadata={"help": "Documents with labels, to compare student and teacher."}
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns of the text, joined by a space."}
    )
    label_column: str = field(default="labels", metadata={"help": "Column of label lists or joined labels."})
    label_delimiter: str | None = field(
        default=None, metadata={"help": "Separator of labels that are joined in one string."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens per document, including those that only lexical scores use."},
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Size of the token embeddings. Defaults to that of the teacher."}
    )


def defaults(named: dict[str, Any]) -> dict[str, Any]:
    return {**run_defaults(named), **DEFAULTS, "output_dir": "outputs/student"}


def main() -> None:
    (options, args), _ = parse_arguments(
        (DistillArguments, SepMldcTrainingArguments),
        sys.argv[1:],
        defaults=defaults,
        prog="distill.py",
        description=__doc__.strip().split("\n")[0],
    )
    for name in ("teacher", "train_file"):
        if not getattr(options, name):
            raise ValueError(f"`--{name}` is not given, but a student learns from a teacher on documents. Specify it.")
    if os.path.realpath(args.output_dir) == os.path.realpath(options.teacher):
        raise ValueError(
            f"`--output_dir` is {args.output_dir!r}, the folder of the teacher, which the student would overwrite. Specify another folder."
        )
    with removed_if_empty(args.output_dir):
        check_output_folder(args.output_dir, ("distillation.json",))
        make_student(options, args)


def make_student(options: DistillArguments, args: SepMldcTrainingArguments) -> None:
    """Train, tune, save and measure a student."""
    set_seed(args.seed)
    teacher, tokenizer = load_trained(options.teacher)
    documents = read_documents(options, teacher.config, tokenizer)
    trainer = DistillationTrainer(
        teacher, tokenizer, documents["train"], documents.get("validation"), args, options.hidden_size
    )
    trainer.model_card_kwargs = {"datasets": [Path(name).name for name in options.train_file]}
    trainer.train()
    if "validation" in documents:
        trainer.tune_scores()
    save_model_atomically(trainer)
    if "test" in documents:
        compare(teacher, trainer, documents["test"])
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def read_documents(options: DistillArguments, config, tokenizer) -> dict[str, Any]:
    """Tokenized documents by split: those of training without labels, all others with the ids of their labels."""
    columns = {"text_columns": options.text_columns}
    found = dict(load_splits(train_file=options.train_file, label_column=None, **columns))
    labeled = {f"{split}_file": getattr(options, f"{split}_file") for split in ("validation", "test")}
    if any(labeled.values()):
        columns |= {"label_column": options.label_column, "label_delimiter": options.label_delimiter}
        for split, dataset in load_splits(**labeled, **columns).items():
            count_unknown_labels(dataset, config.labels, split)
            if config.hierarchy is not None:  # the teacher's label sets and thresholds refer to closed labels
                dataset = close_labels(dataset, config.label_parents)
            found[split] = encode_labels(dataset, config.label2id)
    return {split: tokenize(dataset, tokenizer, options.max_length) for split, dataset in found.items()}


def compare(teacher, trainer: DistillationTrainer, documents) -> None:
    """Print and write the metrics of teacher and student, and the documents per second of their models without tokenization."""
    rows = {}
    for name, model in (("teacher", teacher), ("student", trainer.model)):
        evaluator = SepMldcTrainer(
            model, trainer.args, eval_dataset=documents, processing_class=trainer.processing_class
        )
        start = time.perf_counter()
        metrics = evaluator.evaluate()
        seconds = time.perf_counter() - start
        rows[name] = {metric: 100 * metrics[f"eval_{metric}"] for metric in TABLE if f"eval_{metric}" in metrics}
        rows[name]["documents per second"] = len(documents) / seconds
    if not trainer.is_world_process_zero():
        return
    print(f"\nOn {len(documents)} test documents, in percent:")
    for metric in rows["teacher"]:
        print(f"  {metric:<22}" + "".join(f"  {name} {values[metric]:9.1f}" for name, values in rows.items()))
    write_json(Path(trainer.args.output_dir) / "distillation.json", rows)


if __name__ == "__main__":
    run_program(main, "distill.py")
