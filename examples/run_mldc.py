#!/usr/bin/env python
"""
Fine-tune, evaluate and run SEP-MLDC on documents with several labels each.

    accelerate launch examples/run_mldc.py examples/configs/quickstart.json
    accelerate launch examples/run_mldc.py --train_file train.csv --validation_file dev.csv --model_name_or_path roberta-base \
        --label_delimiter ";" --output_dir outputs --do_train --do_eval

All arguments: `python examples/run_mldc.py --help`. They can stand in one JSON or YAML file instead.
"""

import csv
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import transformers
from transformers import AutoTokenizer, EarlyStoppingCallback, HfArgumentParser, set_seed
from transformers.utils import logging

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.backbones import dropout_settings, freeze_layers, resolve_backbone
from trainer.baselines import linear_svm_baseline, majority_baseline, rows_of_table
from trainer.checkpoints import last_whole_checkpoint
from trainer.data import (
    add_pseudo_documents,
    build_label_list,
    count_label_names,
    count_unknown_labels,
    encode_labels,
    label_counts,
    load_label_descriptions,
    load_pseudo_documents,
    load_splits,
    num_real_documents,
    tokenize,
)


logger = logging.get_logger("run_mldc")
TABLE = ["p@1", "p@3", "p@5", "ndcg@3", "ndcg@5", "psp@1", "psp@3", "psp@5", "f1_micro", "f1_macro"]


@dataclass
class ModelArguments:
    """Which encoder, and which head on it."""

    model_name_or_path: str = field(
        metadata={
            "help": "A text encoder (Hub name, folder, or package:NAME/FOLDER for one inside a Python package), or a trained "
            "SEP-MLDC checkpoint to go on with, evaluate or run."
        }
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    pooling: str = field(default="mean", metadata={"help": "'mean' or 'cls'.", "choices": ["mean", "cls"]})
    classification_loss: str = field(
        default="bce", metadata={"help": "Loss of Eq. 19.", "choices": ["bce", "softmax", "bce+softmax"]}
    )
    classifier: str = field(
        default="mlp+similarity",
        metadata={"help": "Kind of head; 'mlp' is the paper's.", "choices": ["mlp", "similarity", "mlp+similarity"]},
    )
    classifier_dropout: float = field(default=0.5, metadata={"help": "Dropout of the head."})
    classifier_bias_init: str = field(
        default="prior",
        metadata={
            "help": "'prior' starts each bias at its label's log-odds in training.",
            "choices": ["zero", "prior"],
        },
    )
    label_attention: bool = field(default=True, metadata={"help": "Label-guided feature selection (Eq. 16-18)."})
    freeze_layers: int = field(
        default=0, metadata={"help": "Keep the encoder's embeddings and first so many layers as they are: faster."}
    )
    backbone_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout inside the encoder; its own if not given. With 0, training on a CPU is much faster."
        },
    )
    encoder_max_length: int | None = field(
        default=None, metadata={"help": "Tokens that the encoder sees of a document; lexical scores see `max_length`."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2, eager, ...; the encoder's default if not given."}
    )


@dataclass
class DataArguments:
    """Which documents and labels."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl or parquet, each also .gz or .zst."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "As `train_file`."})
    test_file: list[str] | None = field(default=None, metadata={"help": "As `train_file`."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    data_format: str = field(
        default="auto", metadata={"help": "'auto' by file ending, or the paper's data sets: 'aapd', 'rcv1', 'eurlex'."}
    )
    text_columns: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "Joined by a blank."})
    label_column: list[str] = field(
        default_factory=lambda: ["labels"],
        metadata={"help": "A column of label lists or joined labels, or several 0/1 columns."},
    )
    id_column: str | None = field(default=None, metadata={"help": "Column of document ids for predictions.jsonl."})
    label_delimiter: str | None = field(default=None, metadata={"help": "What joins labels in one string."})
    label_list_file: str | None = field(
        default=None, metadata={"help": "Label names, one a line, instead of train's."}
    )
    label_descriptions_file: str | None = field(
        default=None, metadata={"help": "json, jsonl or csv of `label` and `expansion`: what the labels mean."}
    )
    pseudo_documents_file: str | None = field(
        default=None, metadata={"help": "jsonl of `text` and `labels`: documents that an LLM wrote for rare labels."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Documents are cut after so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training documents."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many documents."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training documents anew as they are needed, for files that are larger than memory and cache. One "
            "pass before training counts their labels. Needs `--max_steps`."
        },
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "A stream is shuffled within so many documents; 0 keeps its order."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    baselines: bool = field(
        default=False, metadata={"help": "Also train and report a majority and a linear TF-IDF baseline."}
    )
    lexical_scores: bool = field(
        default=False,
        metadata={
            "help": "After training, add a sparse linear classifier on the document's tokens, weighed on the validation "
            "documents. Time and memory go with training documents x labels."
        },
    )
    num_lexical_features: int = field(default=300, metadata={"help": "Token weights kept for each label."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better `metric_for_best_model`."}
    )
    tune_thresholds: bool = field(
        default=True, metadata={"help": "Tune decision thresholds on the validation documents after training."}
    )
    threshold_objective: str = field(
        default="f1",
        metadata={
            "help": "What thresholds maximise: 'f1' (mean of micro and macro), 'macro', 'micro', or 'precision:0.9'."
        },
    )
    score_calibration: str | None = field(
        default=None, metadata={"help": "Also calibrate probabilities: 'temperature' or 'platt'."}
    )
    language: str | None = field(default=None, metadata={"help": "Of the documents, for the model card: en, de, ..."})
    license: str | None = field(
        default=None, metadata={"help": "Of the checkpoint, for the model card: apache-2.0, ..."}
    )
    num_examples: int = field(default=2, metadata={"help": "Show the labels of so many test documents in words."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Go ahead in a folder that holds a run."})


def parse_arguments():
    parser = HfArgumentParser((ModelArguments, DataArguments, SepMldcTrainingArguments))
    if len(sys.argv) >= 2 and sys.argv[1].endswith((".json", ".yaml", ".yml")):
        # The file first, then what the command line adds to or changes in it.
        path = Path(sys.argv[1])
        if not path.is_file():
            raise ValueError(f"There is no file {path}. Name a JSON or YAML file of arguments.")
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
        else:
            import yaml

            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        flat = []
        for name, value in values.items():
            flat += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return parser.parse_args_into_dataclasses(args=flat + sys.argv[2:])
    return parser.parse_args_into_dataclasses()


def check_output_dir(args, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder."""
    if args.resume_from_checkpoint in ("true", "True", "last"):
        args.resume_from_checkpoint = True
    if not args.do_train or args.resume_from_checkpoint or overwrite or not os.path.isdir(args.output_dir):
        return
    if last_whole_checkpoint(args.output_dir) or os.path.exists(os.path.join(args.output_dir, "all_results.json")):
        raise ValueError(
            f"The output folder {args.output_dir!r} already holds a run. Add `--resume_from_checkpoint last` to go on with it, "
            "`--overwrite_output_dir` to write over it, or name another `--output_dir`."
        )


def check_streaming(data_args, args) -> None:
    """Refuse what a stream of training documents cannot do."""
    if not data_args.streaming:
        return
    if args.do_train and args.max_steps <= 0:
        raise ValueError(
            "`--streaming` does not know how many documents there are. Say how long to train: `--max_steps`."
        )
    if data_args.dataset_name:
        raise ValueError("`--streaming` reads files, but `--dataset_name` names a data set of the Hub. Use its files.")
    if data_args.shuffle_buffer_size < 0:
        raise ValueError(
            f"`--shuffle_buffer_size` is {data_args.shuffle_buffer_size}, but a buffer holds 0 documents at least. Use 0 to keep "
            "the order of the files."
        )
    for name, wrong in (
        ("baselines", data_args.baselines),
        ("pseudo_documents_file", data_args.pseudo_documents_file),
        ("group_by_label_set", args.group_by_label_set),
        ("lexical_scores", data_args.lexical_scores),
    ):
        if wrong:
            raise ValueError(
                f"`--{name}` needs all training documents at once, which `--streaming` never has. Leave one of the two out"
                + (
                    ", or write the pseudo-documents into the training files."
                    if name == "pseudo_documents_file"
                    else "."
                )
            )


def load_documents(data_args):
    if data_args.streaming and data_args.train_file:
        stream = load_files(data_args, train_file=data_args.train_file, streaming=True)
        others = {"validation_file": data_args.validation_file, "test_file": data_args.test_file}
        return {**stream, **(load_files(data_args, **others) if any(others.values()) else {})}
    return load_files(
        data_args,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        test_file=data_args.test_file,
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
    )


def load_files(data_args, **sources):
    return load_splits(
        **sources,
        text_columns=data_args.text_columns,
        label_column=data_args.label_column[0] if len(data_args.label_column) == 1 else data_args.label_column,
        id_column=data_args.id_column,
        label_delimiter=data_args.label_delimiter,
        data_format=data_args.data_format,
        num_proc=data_args.preprocessing_num_workers,
    )


def first(dataset, limit: int | None):
    if limit is not None and isinstance(dataset, datasets.IterableDataset):
        return dataset.take(limit)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def load_model(model_args, data_args, args, backbone, tokenizer, labels, counts, num_documents):
    """A trained checkpoint as it is, or a new head on an encoder."""
    if is_trained(backbone):
        model = SepMldcForMultiLabelClassification.from_pretrained(backbone, revision=model_args.model_revision)
    else:
        descriptions = {}
        if data_args.label_descriptions_file:
            descriptions = load_label_descriptions(data_args.label_descriptions_file, labels)
        head = {
            name: getattr(model_args, name)
            for name in (
                "pooling",
                "classification_loss",
                "classifier",
                "classifier_dropout",
                "classifier_bias_init",
                "label_attention",
            )
        }
        if model_args.attn_implementation:
            head["attn_implementation"] = model_args.attn_implementation
        model = SepMldcForMultiLabelClassification.from_backbone(
            backbone,
            tokenizer,
            labels,
            descriptions,
            label_frequencies=counts / max(num_documents, 1),
            max_label_length=args.max_label_length,
            backbone_kwargs={
                "revision": model_args.model_revision,
                **dropout_settings(backbone, model_args.backbone_dropout, revision=model_args.model_revision),
            },
            encoder_max_length=model_args.encoder_max_length,
            label_counts=[int(count) for count in counts],
            num_train_documents=num_documents,
            **head,
        )
    freeze_layers(model.backbone, model_args.freeze_layers)
    return model


def is_trained(backbone: str) -> bool:
    return transformers.AutoConfig.from_pretrained(backbone).model_type == "sep_mldc"


def load_provenance(path: str) -> list[dict]:
    """What the pseudo-documents say of how they were made, for the model card."""
    rows = datasets.load_dataset("json", data_files=path, split="train")
    return list(rows.remove_columns([name for name in ("text", "labels") if name in rows.column_names]))


def write_predictions(path: Path, output, labels: list[str], ids) -> None:
    scores, indices = output.predictions
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for position, (row_scores, row_indices) in enumerate(zip(scores, indices)):
            ranked = [
                {"label": labels[index], "score": round(float(score), 6)}
                for score, index in zip(row_scores, row_indices)
            ]
            file.write(json.dumps({"id": ids[position], "labels": ranked}, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def write_per_label_metrics(path: Path, metrics, labels: list[str]) -> None:
    columns = metrics.per_label()
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = [
            name for name in ("train_count", "support", "precision", "recall", "f1", "threshold") if name in columns
        ]
        writer.writerow(["label", *names])
        for index, label in enumerate(labels):
            writer.writerow([label, *(round(float(columns[name][index]), 6) for name in names)])
    os.replace(temporary, path)


def show_examples(texts, output, labels: list[str], thresholds, count: int) -> None:
    scores, indices = output.predictions
    for text, row_scores, row_indices in list(zip(texts, scores, indices))[:count]:
        chosen = [
            f"{labels[index]} {score:.2f}"
            for score, index in zip(row_scores, row_indices)
            if score >= (thresholds[index] if thresholds else 0.5)
        ]
        chosen = chosen or [f"{labels[row_indices[0]]} {row_scores[0]:.2f} (below its threshold)"]
        print(f"\n  {text[:300]}{'...' if len(text) > 300 else ''}\n  -> {', '.join(chosen)}")


def main() -> None:
    model_args, data_args, args = parse_arguments()
    check_output_dir(args, data_args.overwrite_output_dir)
    check_streaming(data_args, args)
    set_seed(args.seed)
    if args.should_log:
        logging.set_verbosity_info() if args.get_process_log_level() <= 20 else logging.set_verbosity_warning()

    # Everything that can be wrong with the input is found before the encoder is loaded.
    backbone = resolve_backbone(model_args.model_name_or_path)
    with args.main_process_first(desc="reading documents"):
        documents = load_documents(data_args)
    needed = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}
    for flag, split in needed.items():
        if getattr(args, flag) and split not in documents:
            raise ValueError(
                f"`--{flag}` needs {split} documents. Name them with `--{split}_file`, or leave the flag out."
            )
    if args.do_train and data_args.lexical_scores and "validation" not in documents:
        raise ValueError(
            "`--lexical_scores` are weighed on validation documents. Name them with `--validation_file`, or leave the flag out."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone, revision=model_args.model_revision)
        trained = is_trained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The encoder {model_args.model_name_or_path!r} cannot be loaded: {str(error).splitlines()[0]} Name a Hub model "
            "or a folder with config, weights and tokenizer."
        ) from error
    streamed = isinstance(documents.get("train"), datasets.IterableDataset)
    names = None
    if streamed and not trained:
        names, num_documents = count_label_names(first(documents["train"], data_args.max_train_samples))
    if trained:
        labels = transformers.AutoConfig.from_pretrained(backbone, revision=model_args.model_revision).labels
    elif "train" in documents:
        labels = build_label_list(names if streamed else documents["train"], data_args.label_list_file)
    else:
        raise ValueError("Labels are learnt from training documents. Name them with `--train_file`.")
    too_large = [k for k in args.ks if k > len(labels)]
    if too_large:
        raise ValueError(
            f"`--metric_ks` asks for k = {too_large[0]}, but there are only {len(labels)} labels. Lower it."
        )

    # Only now: labels are learnt from all training documents, so that a short trial has the same ones.
    for split in documents:
        limit = data_args.max_train_samples if split == "train" else data_args.max_eval_samples
        documents[split] = first(documents[split], limit)
    if data_args.pseudo_documents_file and "train" in documents:
        pseudo = load_pseudo_documents(data_args.pseudo_documents_file, labels)
        documents["train"] = add_pseudo_documents(documents["train"], first(pseudo, data_args.max_train_samples))
    label2id = {label: index for index, label in enumerate(labels)}
    encoded = {}
    with args.main_process_first(desc="tokenising documents"):
        for split, dataset in documents.items():
            if split != "train":
                count_unknown_labels(dataset, labels, split)
            dataset = encode_labels(dataset, label2id)
            if streamed and split == "train" and data_args.shuffle_buffer_size:
                dataset = dataset.shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer_size)
            encoded[split] = tokenize(
                dataset, tokenizer, data_args.max_length, num_proc=data_args.preprocessing_num_workers
            )

    train = encoded.get("train")
    if streamed:
        counts = None if trained else np.array([names[label] for label in labels])
    else:
        counts = label_counts(train, len(labels)) if train is not None else None
        num_documents = num_real_documents(train) if train is not None else 0
    model = load_model(
        model_args, data_args, args, backbone, tokenizer, labels, counts, 0 if counts is None else num_documents
    )
    callbacks = []
    if data_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(data_args.early_stopping_patience))
    trainer = SepMldcTrainer(
        model=model,
        args=args,
        train_dataset=train if args.do_train else None,
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        callbacks=callbacks,
    )

    pseudo_rows = ()
    if data_args.pseudo_documents_file:
        pseudo_rows = load_provenance(data_args.pseudo_documents_file)
    sources = data_args.dataset_name or [Path(name).name for name in data_args.train_file or []]
    trainer.model_card_kwargs = {
        "datasets": sources,
        "language": data_args.language,
        "license": data_args.license,
        "pseudo_document_provenance": pseudo_rows,
    }

    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if data_args.lexical_scores:
            trainer.fit_lexical_scores(train, encoded["validation"], num_features=data_args.num_lexical_features)
        if data_args.tune_thresholds and "validation" in encoded:
            trainer.tune_thresholds(
                encoded["validation"],
                objective=data_args.threshold_objective,
                calibration=data_args.score_calibration,
            )
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            write_per_label_metrics(Path(args.output_dir) / "per_label_metrics.csv", trainer.last_metrics, labels)
    results, where = {}, "eval"
    if args.do_predict:
        output = trainer.predict(encoded["test"], metric_key_prefix="test")
        trainer.save_metrics("test", output.metrics)
        where = "test"
        if trainer.is_world_process_zero():
            ids = encoded["test"]["id"] if "id" in encoded["test"].column_names else range(len(encoded["test"]))
            write_predictions(Path(args.output_dir) / "predictions.jsonl", output, labels, list(ids))
            write_per_label_metrics(Path(args.output_dir) / "per_label_metrics.csv", trainer.last_metrics, labels)
    if (args.do_eval or args.do_predict) and trainer.is_world_process_zero():
        measured = output.metrics if args.do_predict else metrics
        results["SEP-MLDC"] = {name.removeprefix(f"{where}_"): value for name, value in measured.items()}
        split = "test" if args.do_predict else "validation"
        if data_args.baselines and "train" in documents:
            test = (list(documents[split]["text"]), list(encoded[split]["label_indices"]))
            known = (list(documents["train"]["text"]), list(encoded["train"]["label_indices"]))
            untuned = {"thresholds": 0.5}
            results["TF-IDF + LinearSVC"] = linear_svm_baseline(
                *known, *test, trainer.new_streaming_metrics(**untuned)
            )
            results["majority labels"] = majority_baseline(known[1], test[1], trainer.new_streaming_metrics(**untuned))
            path = Path(args.output_dir) / "baseline_results.json"
            path.write_text(
                json.dumps({k: v for k, v in results.items() if k != "SEP-MLDC"}, indent=1), encoding="utf-8"
            )
        print(f"\n{split} documents: {len(encoded[split])}, labels: {len(labels)}; all figures in per cent\n")
        print("\n".join(rows_of_table(results, [name for name in TABLE if name in results["SEP-MLDC"]])))
        if args.do_predict:
            show_examples(documents["test"]["text"], output, labels, model.config.thresholds, data_args.num_examples)
        trainer.model_card_kwargs["metrics"] = measured
        trainer.create_model_card()
        print(f"\nEverything is in {args.output_dir}/: the checkpoint, all_results.json, per_label_metrics.csv")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        # Wrong input is the user's business: one sentence says more than a stack of frames.
        if os.environ.get("SEP_MLDC_DEBUG"):
            raise
        sys.exit(f"run_mldc.py: {error}")
