#!/usr/bin/env python
"""
Find likely errors in the labels of documents, and write the corrected documents.

    python examples/audit_labels.py --train_file train.csv --text_columns title body --label_column tags --label_delimiter ";" \
        --model_name_or_path roberta-base --findings_file findings.csv
    python examples/app.py --audit findings.csv     # or any spreadsheet: write accept or reject into the column `decision`
    python examples/audit_labels.py --apply findings.csv --output_file corrected.csv

findings.json, next to the findings, says which documents they are about. Needs the extra `audit`. All arguments:
`python examples/audit_labels.py --help`. See docs/audit.md.
"""

import os
import sys
from dataclasses import dataclass, field

from trainer import audit_labels, load_documents, load_label_descriptions
from trainer.audit.files import (
    AuditedFiles,
    apply_findings,
    check_findings_file,
    default_output_file,
    description_path,
    digest_of_texts,
    write_findings,
)
from trainer.audit.findings import import_cleanlab
from trainer.command_line import parse_arguments, run_program
from trainer.data.readers import expand_files
from trainer.files import make_writable_folder


@dataclass
class AuditArguments:
    """Documents, encoder, and what to list; or findings to apply."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl or parquet, each also .gz or .zst."}
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns of the text, joined by a space."}
    )
    label_column: list[str] = field(
        default_factory=lambda: ["labels"],
        metadata={"help": "A column of label lists or joined labels, or several 0/1 columns."},
    )
    label_delimiter: str | None = field(
        default=None, metadata={"help": "Separator of labels that are joined in one string."}
    )
    label_list_file: str | None = field(
        default=None, metadata={"help": "Labels to audit, one per line. Defaults to those of the documents."}
    )
    label_descriptions_file: str | None = field(
        default=None, metadata={"help": "json, jsonl or csv of `label` and `description`: what the labels mean."}
    )
    id_column: str | None = field(default=None, metadata={"help": "Column of document ids."})
    data_format: str = field(
        default="auto",
        metadata={
            "help": "'auto' (by file extension), or a format of the paper's datasets: 'aapd', 'rcv1', 'eurlex'."
        },
    )
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with invalid rows: 'error' lists the first twenty, 'skip' leaves them out, including from the corrected "
            "documents.",
            "choices": ["error", "skip"],
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder: Hub name, folder, or package:NAME/FOLDER. It is not trained."}
    )
    findings_file: str = field(default="findings.csv", metadata={"help": "The csv file to write findings to."})
    overwrite: bool = field(default=False, metadata={"help": "Replace findings, and the decisions about them."})
    max_findings: int = field(default=1000, metadata={"help": "Maximum number of findings about documents."})
    min_documents: int = field(default=5, metadata={"help": "A label with fewer documents is listed as too rare."})
    num_folds: int = field(default=5, metadata={"help": "Number of folds, each scored by models of the other folds."})
    max_length: int | None = field(default=None, metadata={"help": "Maximum number of tokens per document."})
    seed: int = field(default=0, metadata={"help": "Random seed of the folds and of training."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is an accelerator."})
    apply: str | None = field(
        default=None,
        metadata={"help": "A csv file of findings: write the documents with the accepted findings applied."},
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "Corrected documents: jsonl, csv, tsv (each also .gz) or parquet. Defaults to FINDINGS.corrected and the format of "
            "the documents."
        },
    )


def main() -> None:
    (options,), _ = parse_arguments(
        (AuditArguments,), sys.argv[1:], prog="audit_labels.py", description=__doc__.strip().split("\n")[0]
    )
    if options.apply:
        apply(options)
    else:
        audit(options)


def audit(options: AuditArguments) -> None:
    """Write the findings, and print them on one page."""
    for name in ("train_file", "model_name_or_path"):
        if not getattr(options, name):
            raise ValueError(f"`--{name}` is not given, but an audit needs documents and an encoder. Specify it.")
    path = options.findings_file
    description = description_path(path)  # a wrong extension is reported before files are searched
    others = [name for name in (options.label_list_file, options.label_descriptions_file) if name]
    check_findings_file(path, [*expand_files(options.train_file), *others])
    if os.path.exists(path) and not options.overwrite:
        raise ValueError(
            f"{path} exists, perhaps with decisions. Specify another `--findings_file`, or replace it with `--overwrite`."
        )
    if os.path.exists(description) and not options.overwrite:
        raise ValueError(
            f"{description} exists, but the description of the findings is written there. Specify another `--findings_file`, or "
            "replace it with `--overwrite`."
        )
    make_writable_folder(os.path.dirname(path) or ".")
    import_cleanlab()
    columns = {
        "text_columns": options.text_columns,
        "label_column": options.label_column[0] if len(options.label_column) == 1 else options.label_column,
        "label_delimiter": options.label_delimiter,
        "id_column": options.id_column,
        "data_format": options.data_format,
        "on_bad_rows": options.on_bad_rows,
    }
    documents = load_documents(options.train_file, label_list_file=options.label_list_file, **columns)
    descriptions = None
    if options.label_descriptions_file:
        descriptions = load_label_descriptions(options.label_descriptions_file, documents.labels)
    texts = digest_of_texts(documents.dataset["text"][:])
    source = AuditedFiles([os.path.abspath(name) for name in options.train_file], texts=texts, **columns)
    found = audit_labels(
        documents,
        options.model_name_or_path,
        descriptions,
        num_folds=options.num_folds,
        max_findings=options.max_findings,
        min_documents=options.min_documents,
        max_length=options.max_length,
        seed=options.seed,
        use_cpu=options.use_cpu or None,
    )
    write_findings(path, found.findings, source)
    print(f"\n{found}\n")
    print(
        f"{path} lists {len(found.findings):,} findings. Review them on the page (python examples/app.py --audit {path}) or in a "
        f"spreadsheet (column `decision`: accept or reject), then run python examples/audit_labels.py --apply {path}."
    )


def apply(options: AuditArguments) -> None:
    """Write the corrected documents."""
    output_file = options.output_file or default_output_file(options.apply)
    counts = apply_findings(options.apply, output_file)
    print(
        f"{output_file}: {counts['documents']:,} documents, {counts['changed']:,} of them changed; {counts['remove']:,} labels removed, "
        f"{counts['add']:,} added, {counts['drop']:,} dropped from all documents."
    )


if __name__ == "__main__":
    run_program(main, "audit_labels.py")
