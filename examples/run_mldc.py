#!/usr/bin/env python
"""
Fine-tune, evaluate and run SEP-MLDC on documents with several labels each.

    accelerate launch examples/run_mldc.py examples/configs/quickstart.json
    accelerate launch examples/run_mldc.py --train_file train.csv --validation_file dev.csv --model_name_or_path roberta-base \
        --label_delimiter ";" --output_dir outputs --do_train --do_eval

All arguments: `python examples/run_mldc.py --help`. They can be given in one JSON or YAML file instead.
"""

import dataclasses
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback, set_seed
from transformers.utils import logging

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.configuration_sep_mldc import recommended_classifier, recommended_token_attention_size
from modeling_sep_mldc.encoder_sep_mldc import limit_tokenizer, set_padding_token
from modeling_sep_mldc.hierarchy_sep_mldc import ancestors_of
from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.adapters import add_lora_adapters
from trainer.backbones import dropout_settings, freeze_layers, resolve_backbone
from trainer.baselines import measure_baselines, rows_of_table
from trainer.checkpoints import last_whole_checkpoint
from trainer.class_weights import choose_class_weights
from trainer.cold_start import (
    MAX_DOCUMENTS,
    cardinality_threshold,
    labels_without_documents,
    read_texts,
    set_cardinality_threshold,
    start_from_cosines,
)
from trainer.command_line import parse_arguments, run_program
from trainer.data import (
    add_pseudo_documents,
    build_label_list,
    close_labels,
    count_label_names,
    count_unknown_labels,
    encode_labels,
    inspect_documents,
    label_counts,
    load_label_descriptions,
    load_pseudo_documents,
    load_splits,
    num_real_documents,
    parents_of_labels,
    read_label_constraints,
    read_label_parents,
    split_documents,
    tokenize,
)
from trainer.data.document_files import read_records
from trainer.data.documents import LabeledDocuments
from trainer.data.parent_files import is_rdf
from trainer.data.tokenization import check_max_length
from trainer.devices import bfloat16_slowdown, is_bfloat16_native
from trainer.frozen_layers import caches_states
from trainer.hub import summarize_provenance
from trainer.inference import check_vocabulary
from trainer.lexical.fitting import default_num_features, default_solver
from trainer.lexical.solvers import kernel_bytes
from trainer.progress import use_short_lines
from trainer.recipes import recommend_settings
from trainer.report import (
    DocumentResults,
    Predictions,
    WorstLabel,
    abstention_lines,
    bootstrap,
    comparison_lines,
    linear_baseline_seconds,
    next_steps,
    worst_label_lines,
    worst_labels,
    write_worst_labels,
)
from trainer.run_arguments import (
    ARGUMENT_GROUPS,
    FORMER_NAMES,
    DataArguments,
    LabelArguments,
    LexicalArguments,
    ModelArguments,
    ReportArguments,
    RunArguments,
    ThresholdArguments,
    check_arguments,
    check_named_of_checkpoint,
    run_defaults,
)
from trainer.run_needs import RunNeeds, TimeEstimate, available_memory, check_fits, estimate_run, free_disk_space, gib
from trainer.run_outputs import (
    check_output_folder,
    save_metrics,
    save_model_whole,
    write_json,
    write_per_label_metrics,
    write_predictions,
)
from trainer.thresholds import check_guarantee, documents_needed


logger = logging.get_logger("run_mldc")
TABLE = ["p@1", "p@3", "p@5", "ndcg@3", "ndcg@5", "psp@1", "psp@3", "psp@5", "f1_micro", "f1_macro", "hierarchical_f1"]
OUTPUTS = (
    "predictions.jsonl",
    "per_label_metrics.csv",
    "data_report.json",
    "bad_rows.jsonl",
    "worst_labels.csv",
    "worst_labels.png",
    "all_results.json",
    "baseline_results.json",
    "comparison.json",
    "README.md",
)
# Number of best labels from which the assigned ones are chosen.
MOST_ASSIGNED = 100
# Baselines are trained by default if they take less than this share of the training time.
BASELINE_SHARE = 0.1
DEFAULT_VALIDATION_SPLIT = 0.1


class Settings(NamedTuple):
    """All arguments, by group, and those that the user named."""

    model: ModelArguments
    data: DataArguments
    labels: LabelArguments
    thresholds: ThresholdArguments
    lexical: LexicalArguments
    report: ReportArguments
    run: RunArguments
    args: SepMldcTrainingArguments
    named: dict[str, Any]


@dataclass
class RunData:
    """
    What a run works on.

    Attributes:
        documents (`dict[str, Dataset]`): `"train"`, `"validation"`, `"test"`, those that there are: texts and label names.
        encoded (`dict[str, Dataset]`): the same documents as token ids and label ids.
        labels (`list[str]` of length `num_labels`): in the order of their ids.
        counts (`np.ndarray` of shape `(num_labels,)`, *optional*): real training documents of each label.
        num_documents (`int`): real training documents.
        descriptions (`dict[str, str]`): of the labels that have one.
        pseudo_documents (`dict`, *optional*): where the pseudo-documents come from, for the model card.
        settings (`dict`): value and reason of each setting that the recipe covers.
        label_sets (`dict`): `label_parents`, `hierarchy` and `label_constraints` of the model's configuration.
        starts_cold (`bool`): whether there is no real training document, only label texts.
        unlabeled (`list[str]`): documents without labels, for the thresholds of a model that starts cold.
    """

    documents: dict[str, Any]
    encoded: dict[str, Any]
    labels: list[str]
    counts: np.ndarray | None
    num_documents: int
    descriptions: dict[str, str] = field(default_factory=dict)
    pseudo_documents: dict | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    label_sets: dict[str, Any] = field(default_factory=dict)
    starts_cold: bool = False
    unlabeled: list[str] = field(default_factory=list)


def main() -> None:
    settings = read_settings(sys.argv[1:])
    backbone, tokenizer, trained = find_encoder(settings)
    data = prepare_data(settings, backbone, tokenizer, trained)
    show_data(settings, data, tokenizer)
    if settings.args.do_train:
        settings = choose_settings(settings, data, backbone)
        needs = show_plan(settings, data, backbone)
        if settings.model.class_weights == "auto" and not settings.run.dry_run:
            settings = weigh_classes(settings, data, backbone)
    if settings.run.dry_run:
        return
    model = build_model(settings, data, backbone, tokenizer, trained)
    trainer = build_trainer(settings, data, model, tokenizer)
    result = None
    if settings.args.do_train:
        with trainer.cached_frozen_layers("validation" in data.encoded, reserved_bytes=needs.disk_bytes):
            fit(settings, data, trainer)
            if settings.args.do_eval:  # as long as the states of the validation documents are stored
                result = evaluate_validation(data, trainer)
    else:
        if data.starts_cold:
            save_untrained(settings, data, trainer)
        if settings.args.do_eval:
            result = evaluate_validation(data, trainer)
    if settings.run.refit_on_all:
        trainer, all_data = refit(settings, data, trainer, backbone, tokenizer, trained)
    if settings.args.do_predict:
        data = all_data if settings.run.refit_on_all else data
        result = evaluate_test(data, trainer)
    if result is not None:
        report(settings, data, trainer, result)
    if settings.args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


# ---- Arguments ----


def read_settings(argv: list[str]) -> Settings:
    """Parse the arguments and check all that can be checked before anything is read."""
    groups, named = parse_arguments(
        ARGUMENT_GROUPS,
        argv,
        FORMER_NAMES,
        run_defaults,
        prog="run_mldc.py",
        description=__doc__.strip().split("\n")[0],
    )
    check_arguments(*groups)
    settings = Settings(*groups, named)
    args = settings.args
    if args.should_log:
        logging.set_verbosity_info() if args.get_process_log_level() <= 20 else logging.set_verbosity_warning()
    if any(word.partition("=")[0].replace("-", "_") == "__hub_token" for word in argv):
        logger.warning(
            "`--hub_token` is on the command line, where process lists show it, and accelerate prints the whole command when a "
            "run fails. Set the environment variable HF_TOKEN or use `hf auth login` instead."
        )
    if named.get("bf16") and args.use_cpu and not is_bfloat16_native(use_cpu=True):
        logger.warning(
            f"`--bf16` is emulated by this processor: in a short test it took {bfloat16_slowdown():.1f} times as long as float32. "
            "Leave it out."
        )
    check_output_dir(settings)
    set_seed(args.seed)
    return settings


def check_output_dir(settings: Settings) -> None:
    """Refuse to mix two runs in one folder, and a folder that cannot be written."""
    args = settings.args
    if str(args.resume_from_checkpoint).lower() in ("true", "last"):
        args.resume_from_checkpoint = True
    elif args.do_train and args.resume_from_checkpoint and not os.path.isdir(args.resume_from_checkpoint):
        raise ValueError(
            f"`--resume_from_checkpoint` is {args.resume_from_checkpoint!r}, but there is no such folder. Name a checkpoint of the run, "
            "such as outputs/checkpoint-100, or `last`."
        )
    if args.should_save and not settings.run.dry_run:
        check_output_folder(args.output_dir, OUTPUTS)
    if not args.do_train or args.resume_from_checkpoint or settings.run.overwrite_output_dir:
        return
    written = (os.path.join(args.output_dir, name) for name in ("all_results.json", "config.json"))
    if last_whole_checkpoint(args.output_dir) or any(map(os.path.exists, written)):
        raise ValueError(
            f"The output folder {args.output_dir!r} already holds a run. Add `--resume_from_checkpoint last` to go on with it, "
            "`--overwrite_output_dir` to write over it, or name another `--output_dir`."
        )


# ---- Data ----


def find_encoder(settings: Settings):
    """Folder or Hub name of the encoder, its tokenizer, and whether it is a trained SEP-MLDC checkpoint."""
    backbone, revision = resolve_backbone(settings.model.model_name_or_path), settings.model.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone, revision=revision)
        config = AutoConfig.from_pretrained(backbone, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The encoder {settings.model.model_name_or_path!r} cannot be loaded: {str(error).splitlines()[0]} Name a Hub model "
            "or a folder with config, weights and tokenizer."
        ) from error
    trained = config.model_type == "sep_mldc"
    if trained:
        check_named_of_checkpoint(settings.named, config)
    check_vocabulary(tokenizer, backbone)
    check_max_length(settings.data.max_length, tokenizer, "--max_length")
    check_max_length(settings.model.encoder_max_length, tokenizer, "--encoder_max_length")
    set_padding_token(tokenizer)
    limit_tokenizer(tokenizer, config.backbone_config if trained else config, settings.model.encoder_max_length)
    return backbone, tokenizer, trained


def prepare_data(settings: Settings, backbone: str, tokenizer, trained: bool) -> RunData:
    """Read and check all input, collect the labels, tokenize. Errors in the input are found here."""
    args = settings.args
    with args.main_process_first(desc="reading documents"):
        documents = load_documents(settings)
    with args.main_process_first(desc="splitting documents"):
        set_aside(settings, documents)
    check_splits(settings, documents)
    config = AutoConfig.from_pretrained(backbone, revision=settings.model.model_revision) if trained else None
    label_parents, hierarchy = read_hierarchy(settings, documents, config)
    if hierarchy is not None:
        with args.main_process_first(desc="closing labels"):
            documents = {split: close_labels(dataset, label_parents) for split, dataset in documents.items()}
    streamed = isinstance(documents.get("train"), datasets.IterableDataset)
    names, num_documents = None, 0
    if streamed:
        names, num_documents = count_label_names(first(documents["train"], settings.data.max_train_samples))
    if config is not None:
        labels = config.labels
    elif "train" in documents:
        labels = build_label_list(names if streamed else documents["train"], settings.labels.label_list_file)
    else:
        labels = labels_without_documents(settings.labels.label_list_file, settings.labels.label_descriptions_file)
    choose_metrics(settings, len(labels))
    check_work(settings, not trained and "train" not in documents)
    data = RunData(documents, {}, labels, None, num_documents, starts_cold=not trained and "train" not in documents)
    if settings.labels.label_descriptions_file and not trained:
        data.descriptions = load_label_descriptions(settings.labels.label_descriptions_file, labels)
    data.label_sets = label_set_fields(settings, labels, label_parents, hierarchy, config)

    # After the labels were collected from all training documents, so that a short trial has the same ones.
    for split in documents:
        limit = settings.data.max_train_samples if split == "train" else settings.data.max_eval_samples
        documents[split] = first(documents[split], limit)
    check_guarantee_documents(settings, documents, labels)
    for split, dataset in documents.items():
        check_known_labels(dataset, labels, split, settings, names)
    if settings.labels.pseudo_documents_file and ("train" in documents or data.starts_cold):
        path = settings.labels.pseudo_documents_file
        data.pseudo_documents = summarize_provenance(record for _, record in read_records(path))
        pseudo = first(load_pseudo_documents(path, labels), settings.data.max_train_samples)
        if hierarchy is not None:
            pseudo = close_labels(pseudo, label_parents)
        documents["train"] = pseudo if data.starts_cold else add_pseudo_documents(documents["train"], pseudo)
    if data.starts_cold and settings.labels.unlabeled_file:
        data.unlabeled = read_texts(settings.labels.unlabeled_file, settings.data.text_columns)
    elif data.starts_cold and "train" in documents:
        data.unlabeled = documents["train"]["text"][:MAX_DOCUMENTS]
    with args.main_process_first(desc="tokenizing documents"):
        for split, dataset in documents.items():
            data.encoded[split] = encode(settings, dataset, labels, tokenizer, split)
    if streamed:
        data.counts = np.array([names[label] for label in labels])
    elif "train" in documents:
        data.counts = label_counts(data.encoded["train"], len(labels))
        data.num_documents = num_real_documents(data.encoded["train"])
    return data


def check_work(settings: Settings, starts_cold: bool) -> None:
    """Without training documents, a model that is in the output folder must not be replaced by one that was not trained."""
    args, run = settings.args, settings.run
    if not starts_cold:
        if not (args.do_train or args.do_eval or args.do_predict or run.dry_run):
            raise ValueError("There is nothing to do. Add `--do_train`, `--do_eval`, `--do_predict` or `--dry_run`.")
        return
    if run.refit_on_all:
        raise ValueError(
            "`--refit_on_all` trains again on training and validation documents, but there are no training documents. Leave it out."
        )
    if os.path.exists(os.path.join(args.output_dir, "config.json")) and not (
        args.resume_from_checkpoint or run.overwrite_output_dir or run.dry_run
    ):
        raise ValueError(
            f"The output folder {args.output_dir!r} already holds a model. Add `--overwrite_output_dir` to write over it, or name "
            "another `--output_dir`."
        )


def load_documents(settings: Settings) -> dict[str, Any]:
    data = settings.data
    files = {"validation_file": data.validation_file, "test_file": data.test_file}
    if data.streaming and data.train_file:
        stream = load_files(settings, train_file=data.train_file, streaming=True)
        return {**stream, **(load_files(settings, **files) if any(files.values()) else {})}
    source = {"dataset_name": data.dataset_name, "dataset_config_name": data.dataset_config_name}
    if not (data.train_file or data.dataset_name or any(files.values())):
        return {}
    return dict(load_files(settings, train_file=data.train_file, **files, **source))


def read_hierarchy(
    settings: Settings, documents: dict[str, Any], config: Any
) -> tuple[dict[str, list[str]] | None, str | None]:
    """Parents by name, and how label sets follow them: as named, or as the trained checkpoint with this `config` says."""
    path, parents = settings.labels.label_parents_file, getattr(config, "label_parents", None)
    hierarchy = settings.labels.hierarchy or getattr(config, "hierarchy", None)
    if path is not None:
        names = [] if config is None else config.labels
        if config is None and is_rdf(path) and "train" in documents:
            names = list(count_label_names(first(documents["train"], settings.data.max_train_samples))[0])
        parents = read_label_parents(path, names)
    if hierarchy is not None and not parents:
        raise ValueError(
            f"`--hierarchy` is {hierarchy}, but no label has a parent. Name the parents with `--label_parents_file`, or leave it out."
        )
    return parents, hierarchy


def label_set_fields(settings: Settings, labels: list[str], parents, hierarchy: str | None, config) -> dict[str, Any]:
    """The fields of the configuration that shape label sets, for these labels."""
    path = settings.labels.label_parents_file
    if path is not None:
        parents = parents_of_labels(parents, labels, path)
    constraints = getattr(config, "label_constraints", None)
    if settings.labels.label_constraints_file is not None:
        closed = parents if hierarchy is not None else None
        constraints = read_label_constraints(settings.labels.label_constraints_file, labels, closed)
    return {"label_parents": parents, "hierarchy": hierarchy, "label_constraints": constraints}


def set_aside(settings: Settings, documents: dict[str, Any]) -> None:
    """Take test and validation documents from the training documents where no others are named."""
    train = documents.get("train")
    if train is None or not settings.args.do_train or isinstance(train, datasets.IterableDataset):
        return
    for split, share in (("test", settings.data.test_split), ("validation", settings.data.validation_split)):
        named = share is not None
        share = DEFAULT_VALIDATION_SPLIT if share is None and split == "validation" else share
        if split in documents or not share:
            continue
        try:
            documents["train"], documents[split] = split_documents(documents["train"], share, seed=settings.args.seed)
        except ValueError as error:
            if named:
                raise
            logger.warning(f"There are no {split} documents, and none can be set aside: {error}")
            continue
        if settings.args.should_log:
            print(f"{len(documents[split])} of {len(train)} training documents are set aside for {split}.")


def load_files(settings: Settings, streaming: bool = False, **sources):
    bad_rows = None
    if settings.data.on_bad_rows == "skip" and not streaming and not settings.run.dry_run:
        bad_rows = Path(settings.args.output_dir) / "bad_rows.jsonl" if settings.args.should_save else None
    columns = settings.labels.label_column
    return load_splits(
        **sources,
        streaming=streaming,
        on_bad_rows=settings.data.on_bad_rows,
        bad_rows_file=bad_rows,
        text_columns=settings.data.text_columns,
        label_column=columns[0] if len(columns) == 1 else columns,
        id_column=settings.data.id_column,
        label_delimiter=settings.labels.label_delimiter,
        data_format=settings.data.data_format,
        num_proc=settings.data.preprocessing_num_workers,
    )


def check_splits(settings: Settings, documents) -> None:
    for flag, split in {"do_train": "train", "do_eval": "validation", "do_predict": "test"}.items():
        if split == "train" and settings.labels.pseudo_documents_file and not settings.data.train_file:
            continue  # they are all that there is to train on
        if getattr(settings.args, flag) and split not in documents:
            raise ValueError(
                f"`--{flag}` needs {split} documents. Name them with `--{split}_file`, set some aside with `--{split}_split 0.1`, or "
                "leave the flag out."
                if split != "train"
                else f"`--{flag}` needs training documents. Name them with `--train_file`, or leave the flag out."
            )
    if "validation" in documents or not settings.args.do_train:
        return
    for flag, wanted in (
        ("lexical_scores", settings.lexical.lexical_scores),
        ("eval_strategy", settings.args.eval_strategy != "no"),
        ("refit_on_all", settings.run.refit_on_all),
        ("class_weights", settings.model.class_weights == "auto"),
        ("threshold_objective", wanted_guarantee(settings) is not None),
    ):
        if wanted:
            raise ValueError(
                f"`--{flag}` needs validation documents. Name them with `--validation_file`, or leave it out."
            )


def wanted_guarantee(settings: Settings) -> tuple[str, float] | None:
    """Risk and limit that the thresholds are to keep, see `check_guarantee`; `None` if no guarantee is asked for."""
    return check_guarantee(settings.thresholds.threshold_objective) if settings.thresholds.tune_thresholds else None


def check_guarantee_documents(settings: Settings, documents, labels: list[str]) -> None:
    """Before the training: whether there are enough validation documents for the guarantee of the thresholds."""
    wanted, validation = wanted_guarantee(settings), documents.get("validation")
    if wanted is None or validation is None or not settings.args.do_train:
        return
    (risk, limit), names = wanted, set(labels)
    known = sum(risk != "recall" or not names.isdisjoint(own) for own in validation["labels"])
    if known < documents_needed(limit):
        raise ValueError(
            f"`--threshold_objective` is {settings.thresholds.threshold_objective!r}, which needs at least {documents_needed(limit)} validation "
            f"documents{' with labels' if risk == 'recall' else ''}, but there are {known}. Add some, or allow more errors."
        )


def check_known_labels(dataset, labels: list[str], split: str, settings: Settings, names=None) -> None:
    """Say which labels of the documents the model cannot learn or predict; training documents need at least one that it can."""
    known = set(labels)
    if split != "train":
        count_unknown_labels(dataset, labels, split)
        if split == "validation" and not any(known.intersection(names) for names in dataset["labels"]):
            raise ValueError(
                f"None of the {len(dataset)} validation documents has one of the {len(labels)} labels of the model ({labels[0]!r}, ...), "
                "so nothing can be measured on them. Check the labels of `--validation_file`, or leave it out."
            )
        return
    names = count_label_names(dataset)[0] if names is None else names
    unknown = {name: count for name, count in names.most_common() if name not in known}
    if not unknown:
        return
    shown = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:5])
    source = settings.labels.label_list_file or settings.model.model_name_or_path
    if len(unknown) == len(names):
        raise ValueError(
            f"None of the {len(names)} labels of the training documents ({shown}) is among the {len(labels)} labels of {source}. Use "
            "the same names in both."
        )
    logger.warning(
        f"train: {len(unknown)} labels are not among the {len(labels)} labels of {source}, so they are not learned and their "
        f"documents count as negatives: {shown}{' ...' if len(unknown) > 5 else ''}. Add them to the label list, or to a trained model "
        "with `model.add_labels`."
    )


def first(dataset, limit: int | None):
    if limit is None:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(limit)
    return dataset.select(range(min(limit, len(dataset))))


def encode(settings: Settings, dataset, labels: list[str], tokenizer, split: str):
    dataset = encode_labels(dataset, {label: index for index, label in enumerate(labels)})
    if isinstance(dataset, datasets.IterableDataset) and settings.data.shuffle_buffer_size:
        dataset = dataset.shuffle(seed=settings.args.seed, buffer_size=settings.data.shuffle_buffer_size)
    workers = settings.data.preprocessing_num_workers
    return tokenize(dataset, tokenizer, settings.data.max_length, num_proc=workers)


def choose_metrics(settings: Settings, num_labels: int) -> None:
    """Check the k of the metrics against the number of labels, and choose what early stopping looks at."""
    args = settings.args
    ks = args.cutoffs(num_labels)
    if settings.run.early_stopping_patience is not None and "metric_for_best_model" not in settings.named:
        args.metric_for_best_model, args.greater_is_better = f"ndcg@{max(ks)}", True


def show_data(settings: Settings, data: RunData, tokenizer) -> None:
    """Print a report on the documents before training."""
    train = data.documents.get("train")
    if (
        train is None
        or isinstance(train, datasets.IterableDataset)
        or not settings.args.should_log
        or data.starts_cold
    ):
        return
    if "is_pseudo" in train.column_names:
        train = train.select(range(data.num_documents))  # pseudo-documents are at the end
    limit = min(n for n in (settings.data.max_length, tokenizer.model_max_length) if n)
    others = {split: data.documents[split] for split in ("validation", "test") if split in data.documents}
    found = inspect_documents(
        train, **others, tokenizer=tokenizer, max_length=limit, near_duplicates=len(train) <= 50_000
    )
    print(f"\n{found}")
    if not settings.run.dry_run:
        write_json(Path(settings.args.output_dir) / "data_report.json", found.to_dict())


# ---- Settings ----


def choose_settings(settings: Settings, data: RunData, backbone: str) -> Settings:
    """Fill in every setting that the user did not name, from the data and the device, and show what was chosen and why."""
    args, validation, train = settings.args, data.encoded.get("validation"), data.encoded["train"]
    config = AutoConfig.from_pretrained(backbone, revision=settings.model.model_revision).get_text_config()
    streamed = isinstance(train, datasets.IterableDataset)
    sample = [len(document["input_ids"]) for document in first(train, 2000)]
    known = {
        "document_lengths": sample,
        "num_validation_documents": 0 if validation is None else len(validation),
        "num_layers": config.num_hidden_layers,
        "max_tokens": settings.data.max_length or 512,
        "device": args.device.type,
        "bf16": args.bf16,
        "recipe": settings.run.recipe,
    }
    num_documents = len(train) if data.starts_cold else data.num_documents  # pseudo-documents
    chosen = recommend_settings(num_documents, len(data.labels), named=settings.named, **known)
    unnamed = recommend_settings(num_documents, len(data.labels), **known)
    contradicted = [
        name for name in chosen if name in settings.named and chosen[name] != unnamed.get(name, chosen[name])
    ]
    if validation is None or streamed:
        chosen = chosen.without("lexical_scores")
    named = set(settings.named)
    groups = {}
    for group in ("model", "lexical", "args"):
        own = {f.name for f in dataclasses.fields(getattr(settings, group))}
        values = {name: value for name, value in chosen.items() if name in own and name not in named}
        groups[group] = dataclasses.replace(getattr(settings, group), **values)
    if chosen.get("load_best_model_at_end") and args.metric_for_best_model is None:
        best = max(k for k in args.ks if k <= len(data.labels))
        groups["args"] = dataclasses.replace(
            groups["args"], metric_for_best_model=f"ndcg@{best}", greater_is_better=True
        )
    data.settings = {name: {"value": value, "why": why} for name, value, why in chosen.rows()}
    if settings.run.refit_on_all:
        data.settings["refit_on_all"] = {
            "value": "True",
            "why": "named by the user: trained again on validation documents too",
        }
    if args.should_log:
        print(f"\nSettings (recipe {settings.run.recipe!r})\n")
        print("\n".join(chosen.table()))
        if contradicted:
            print(
                f"\nNot those of the recipe {settings.run.recipe!r}, because you named them: {', '.join(contradicted)}."
            )
    return settings._replace(**groups)


def show_plan(settings: Settings, data: RunData, backbone: str) -> RunNeeds:
    """Print what will be done and what it takes, and refuse what cannot fit."""
    args, frozen = settings.args, settings.model.freeze_layers
    if args.cache_frozen_layers and (not frozen or args.torch_compile):
        reason = "`--torch_compile` does not read it" if frozen else "no layer is frozen"
        raise ValueError(f"`--cache_frozen_layers` asks for a cache, but {reason}. Leave one of the two out.")
    needs = run_needs(settings, data, backbone)
    if not args.should_save:
        return needs
    memory, disk = available_memory(args.device), free_disk_space(args.output_dir)
    further = ["lexical scores"] if settings.lexical.lexical_scores else []
    if settings.thresholds.tune_thresholds and "validation" in data.encoded:
        further.append("thresholds")
    if args.should_log:
        print(
            f"\nWill train {needs.num_steps} steps ({needs.num_tokens:,} tokens) on {args.device.type}"
            + (" in bfloat16" if args.bf16 else "")
            + (f", then fit {' and '.join(further)} on the validation documents" if further else "")
            + (", then train again with those too" if settings.run.refit_on_all else "")
            + f"; results go to {args.output_dir}/.\nThat takes about {gib(needs.state_bytes + needs.batch_bytes)} of memory"
            + (f" ({gib(memory)} are free)" if memory is not None else "")
            + f" in addition to the documents, and {gib(needs.disk_bytes)} of disk space"
            + (f", {gib(needs.cache_bytes)} more for the states of frozen layers" if needs.cache_bytes > 2**20 else "")
            + f" ({gib(disk)} are free). An estimate of the time follows after the first steps."
        )
        if settings.model.class_weights == "auto":
            print(
                f"First, class weights are chosen: {len(data.encoded['train']) + len(data.encoded['validation']):,} documents are encoded once "
                "more, and three classifiers are trained on their embeddings."
            )
        if needs.kernel_bytes > needs.state_bytes + needs.batch_bytes:
            print(f"Lexical scores take about {gib(needs.kernel_bytes)} of memory after the training.")
    main_memory = None if args.device.type == "cpu" else available_memory()
    check_fits(needs, memory, disk, main_memory, must_cache=bool(args.cache_frozen_layers))
    if memory is not None and needs.state_bytes + needs.batch_bytes > memory:
        logger.warning(
            f"Training may not fit into the {gib(memory)} of memory that are free. Lower `--per_device_train_batch_size` or "
            "`--encoder_max_length` if it ends."
        )
    return needs


def weigh_classes(settings: Settings, data: RunData, backbone: str) -> Settings:
    """The settings with the class weights that are best on the validation documents."""
    args, answer = settings.args, [None]
    if data.starts_cold:
        raise ValueError("`--class_weights auto` needs training documents, but there are none. Leave it out.")
    if args.process_index == 0:
        parts = {}
        for split in ("train", "validation"):
            columns = {
                "text": data.documents[split]["text"][:],
                "label_indices": data.encoded[split]["label_indices"][:],
            }
            counts = label_counts(data.encoded[split], len(data.labels))
            parts[split] = LabeledDocuments(datasets.Dataset.from_dict(columns), data.labels, counts)
        answer = [
            choose_class_weights(
                **parts,
                model_name_or_path=backbone,
                label_descriptions=data.descriptions,
                objective=settings.thresholds.threshold_objective,
                classification_loss=settings.model.classification_loss,
                max_length=settings.model.encoder_max_length,
                seed=args.seed,
                use_cpu=args.use_cpu,
                hide_progress=args.disable_tqdm,
            )
        ]
    chosen, found = broadcast_object_list(answer)[0]
    shown = ", ".join(
        f"{kind} {100 * f1['f1_micro']:.1f} and {100 * f1['f1_macro']:.1f}" for kind, f1 in found.items()
    )
    why = f"chosen on the validation documents; micro and macro F1 of a classifier on embeddings: {shown}"
    data.settings["class_weights"] = {"value": chosen, "why": why}
    if args.should_log:
        print(f"\nClass weights {chosen!r}: {why}.")
    return settings._replace(model=dataclasses.replace(settings.model, class_weights=chosen))


def run_needs(settings: Settings, data: RunData, backbone: str) -> RunNeeds:
    """What the chosen settings take."""
    args, train, limit = settings.args, data.encoded["train"], settings.model.encoder_max_length
    lengths = [len(document["input_ids"]) for document in first(train, 2000)]
    lengths = np.minimum(lengths, limit) if limit else np.asarray(lengths)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps > 0:
        steps, num_documents = args.max_steps, args.max_steps * batch
    else:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(train) / batch))
        num_documents = round(args.num_train_epochs * len(train))
    config = AutoConfig.from_pretrained(backbone, revision=settings.model.model_revision)
    hidden_size = getattr(config, "hidden_size", None)
    size = settings.model.token_attention_size or (hidden_size and recommended_token_attention_size(hidden_size))
    if config.model_type == "sep_mldc":
        config, size = config.backbone_config, config.token_attention_size
    features = settings.lexical.num_lexical_features or default_num_features(len(data.labels))
    kept = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    lexical = settings.lexical.lexical_scores
    ridge = (
        lexical
        and settings.lexical.lexical_class_weights == "none"
        and default_solver(len(train), len(data.labels)) == "ridge"
    )
    cached = 0
    if settings.model.freeze_layers and caches_states(args):
        parts = [data.encoded[split] for split in ("train", "validation") if split in data.encoded]
        cached = sum(num_tokens(part, limit) for part in parts if not isinstance(part, datasets.IterableDataset))
    return estimate_run(
        config,
        len(data.labels),
        num_steps=steps,
        num_tokens=round(num_documents * float(lengths.mean())),
        batch_size=args.per_device_train_batch_size,
        max_length=int(lengths.max()),
        num_frozen_layers=settings.model.freeze_layers,
        train_label_embeds=args.label_encoding == "embedding",
        half_precision=args.bf16 or args.fp16,
        num_lexical_features=features if lexical else 0,
        token_attention_size=size if settings.model.token_attention else None,
        num_checkpoints=kept,
        kernel_bytes=kernel_bytes(len(train)) if ridge else 0,
        num_cached_tokens=cached,
    )


def num_tokens(encoded, limit: int | None) -> int:
    """Tokens of documents that an encoder reads, at most `limit` of each."""
    lengths = np.asarray(encoded["length"][:], dtype=np.int64)
    return int(np.minimum(lengths, limit).sum() if limit else lengths.sum())


# ---- Model ----


def build_model(settings: Settings, data: RunData, backbone: str, tokenizer, trained: bool):
    """A trained checkpoint as it is, or a new head on an encoder."""
    given = settings.model
    if trained:
        model = SepMldcForMultiLabelClassification.from_pretrained(backbone, revision=given.model_revision)
        if any(getattr(model.config, name) != value for name, value in data.label_sets.items()):
            model.set_hierarchy(**data.label_sets)
    else:
        if data.starts_cold:
            given = for_a_cold_start(settings, data)
        dropout = dropout_settings(backbone, given.backbone_dropout, revision=given.model_revision)
        counted = {}
        if not data.starts_cold:
            counted = {
                "label_frequencies": data.counts / max(data.num_documents, 1),
                "label_counts": [int(count) for count in data.counts],
                "num_train_documents": data.num_documents,
            }
        attention = {"attn_implementation": given.attn_implementation} if given.attn_implementation else {}
        model = SepMldcForMultiLabelClassification.from_backbone(
            backbone,
            tokenizer,
            data.labels,
            data.descriptions,
            pooling=given.pooling,
            classification_loss=given.classification_loss,
            class_weights=given.class_weights,
            classifier=given.classifier,
            classifier_dropout=given.classifier_dropout,
            classifier_bias_init=given.classifier_bias_init,
            label_attention=given.label_attention,
            token_attention=given.token_attention,
            token_attention_size=given.token_attention_size,
            max_label_length=settings.args.max_label_length,
            backbone_kwargs={"revision": given.model_revision, **dropout},
            encoder_max_length=given.encoder_max_length,
            **counted,
            parents_in_label_texts=settings.labels.parents_in_label_texts,
            **data.label_sets,
            **attention,
        )
        if data.starts_cold:
            start_from_cosines(model, tokenizer, data.unlabeled, labels_per_document(settings, data))
    freeze_layers(model.backbone, given.freeze_layers)
    if given.lora_rank is not None:
        add_lora_adapters(model, given.lora_rank)
    return model


def for_a_cold_start(settings: Settings, data: RunData) -> ModelArguments:
    """The head that compares label texts, where the user named no other."""
    given, named = settings.model, settings.named
    chosen = {"classifier_bias_init": "zero"}
    if not settings.args.do_train:
        chosen |= {"classifier": recommended_classifier(len(data.labels)), "token_attention": False}
    return dataclasses.replace(given, **{name: value for name, value in chosen.items() if name not in named})


def labels_per_document(settings: Settings, data: RunData) -> float:
    """What the user said, or what the pseudo-documents have, or 1."""
    if settings.labels.labels_per_document is not None:
        return settings.labels.labels_per_document
    pseudo = data.documents.get("train")
    return 1.0 if pseudo is None else float(np.mean([len(names) for names in pseudo["labels"]]))


def build_trainer(settings: Settings, data: RunData, model, tokenizer) -> SepMldcTrainer:
    patience = settings.run.early_stopping_patience
    trainer = SepMldcTrainer(
        model=model,
        args=settings.args,
        train_dataset=data.encoded.get("train") if settings.args.do_train else None,
        eval_dataset=data.encoded.get("validation"),
        processing_class=tokenizer,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )
    sources = settings.data.dataset_name or [Path(name).name for name in settings.data.train_file or []]
    trainer.model_card_kwargs = {
        "datasets": sources,
        "language": settings.report.language,
        "license": settings.report.license,
        "pseudo_document_provenance": data.pseudo_documents or (),
        "max_length": settings.data.max_length,
        "untrained": (data.starts_cold and not settings.args.do_train) or None,
        "recipe": settings.run.recipe if data.settings else None,
        "settings": [(name, chosen["value"], chosen["why"]) for name, chosen in data.settings.items()],
    }
    use_short_lines(trainer)
    trainer.add_callback(TimeEstimate())
    check_metric_for_best_model(trainer)
    return trainer


def check_metric_for_best_model(trainer: SepMldcTrainer) -> None:
    """An unknown metric would be noticed after the first evaluation only."""
    args = trainer.args
    if not args.do_train or args.metric_for_best_model is None:
        return
    probe = trainer.new_streaming_metrics()
    probe.update(np.zeros((1, trainer.model.config.num_labels)), label_indices=[[0]])
    losses = ("loss", "classification_loss", "label_contrastive_loss", "document_contrastive_loss")
    known = [*losses, *probe.compute()]
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        raise ValueError(
            f"`--metric_for_best_model` is {args.metric_for_best_model!r}, but an evaluation measures {', '.join(known)}. Choose one "
            "of them."
        )


# ---- Training ----


def fit(settings: Settings, data: RunData, trainer: SepMldcTrainer) -> None:
    """Train and save, then fit lexical scores and thresholds."""
    result = trainer.train(resume_from_checkpoint=settings.args.resume_from_checkpoint)
    save_model_whole(trainer)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_metrics(settings.args.output_dir, "train", result.metrics)
        save_metrics(settings.args.output_dir, "settings", {"settings": data.settings})
    logger.info(f"The trained model is saved in {settings.args.output_dir}.")
    validation = data.encoded.get("validation")
    if validation is None:
        if data.starts_cold:
            choose_cardinality_threshold(settings, data, trainer, "train")
            save_model_whole(trainer)
        return
    if settings.lexical.lexical_scores:
        features = settings.lexical.num_lexical_features
        weights = settings.lexical.lexical_class_weights
        trainer.fit_lexical_scores(data.encoded["train"], validation, num_features=features, class_weights=weights)
    if settings.thresholds.tune_thresholds:
        objective, calibration = settings.thresholds.threshold_objective, settings.thresholds.score_calibration
        try:
            trainer.tune_thresholds(validation, objective=objective, calibration=calibration)
        except ValueError as error:
            # The model is saved; a run that was trained goes on without tuned thresholds.
            logger.warning(f"Thresholds are not tuned: {error}")
    save_model_whole(trainer)


def save_untrained(settings: Settings, data: RunData, trainer: SepMldcTrainer) -> None:
    """Save a model that compares label texts, with thresholds from validation documents where there are some."""
    validation = data.encoded.get("validation")
    if validation is not None and settings.thresholds.tune_thresholds:
        objective, calibration = settings.thresholds.threshold_objective, settings.thresholds.score_calibration
        trainer.tune_thresholds(validation, objective=objective, calibration=calibration)
    save_model_whole(trainer)
    if settings.args.should_log:
        config = trainer.model.config
        print(
            f"\nNothing was trained: {settings.args.output_dir}/ scores {config.num_labels} labels by the similarity of document and label text. "
            + (
                "Without documents it only ranks them; name some with `--unlabeled_file` or `--validation_file` for thresholds."
                if config.is_ranking
                else "With the first documents with labels, train: `--train_file`."
            )
        )


def choose_cardinality_threshold(settings: Settings, data: RunData, trainer: SepMldcTrainer, split: str) -> None:
    """One threshold for all labels, such that documents have as many labels as said, after training on pseudo-documents alone."""
    model, wanted = trainer.bare_model(), labels_per_document(settings, data)
    batches = trainer.logit_batches(first(data.encoded[split], MAX_DOCUMENTS), "Choosing a threshold")
    if settings.labels.unlabeled_file:
        rows = datasets.Dataset.from_dict({"text": data.unlabeled})
        batches = trainer.logit_batches(
            tokenize(rows, trainer.processing_class, settings.data.max_length), "Choosing a threshold"
        )
    if model.config.is_ranking:
        return
    threshold = cardinality_threshold((model.probabilities(batch.logits) for batch in batches), wanted)
    set_cardinality_threshold(model.config, threshold, wanted, len(data.unlabeled))


# ---- Training again ----


def refit(settings: Settings, data: RunData, tuned: SepMldcTrainer, backbone: str, tokenizer, trained: bool):
    """
    Train a new model on training and validation documents for the number of steps that was best, with the thresholds and the weights
    of lexical scores that were tuned. The tuned model stays in the output folder until the new one is complete.

    Returns:
        `tuple(SepMldcTrainer, RunData)`: the trainer of the new model, and the documents that it was trained on.
    """
    everything = with_validation(data)
    state, folder = tuned.state, Path(settings.args.output_dir) / "refit"
    steps = (
        state.best_global_step
        if settings.args.load_best_model_at_end and state.best_global_step
        else state.global_step
    )
    args = dataclasses.replace(
        settings.args,
        output_dir=str(folder),
        max_steps=steps,
        eval_strategy="no",
        save_strategy="no" if settings.args.save_strategy == "best" else settings.args.save_strategy,
        load_best_model_at_end=False,
        metric_for_best_model=None,
        hub_strategy="end",
    )
    again = settings._replace(args=args, run=dataclasses.replace(settings.run, early_stopping_patience=None))
    if args.should_log:
        print(
            f"\nWill train again on {everything.num_documents} documents, those for validation among them, for {steps} steps. "
            "Thresholds and weights of lexical scores are kept."
        )
    set_seed(args.seed)
    trainer = build_trainer(again, everything, build_model(again, everything, backbone, tokenizer, trained), tokenizer)
    resumed = last_whole_checkpoint(folder) if settings.args.resume_from_checkpoint else None
    if resumed is None and args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    result = trainer.train(resume_from_checkpoint=resumed)
    trainer.keep_tuning_of(tuned.bare_model(), everything.encoded["train"])
    args.output_dir = settings.args.output_dir
    save_model_whole(trainer)
    if trainer.is_world_process_zero():
        metrics = {"documents": everything.num_documents, "steps": steps, "loss": result.metrics["train_loss"]}
        save_metrics(args.output_dir, "refit", {f"refit_{name}": value for name, value in metrics.items()})
        shutil.rmtree(folder, ignore_errors=True)
    return trainer, everything


def with_validation(data: RunData) -> RunData:
    """The same data with the validation documents among the training documents, before the pseudo-documents."""

    def merge(train, validation):
        if "is_pseudo" not in train.column_names:
            return datasets.concatenate_datasets([train, validation])
        validation = validation.add_column("is_pseudo", [False] * len(validation))
        real, pseudo = range(data.num_documents), range(data.num_documents, len(train))
        return datasets.concatenate_datasets([train.select(real), validation, train.select(pseudo)])

    documents, encoded = (
        {**of, "train": merge(of["train"], of["validation"])} for of in (data.documents, data.encoded)
    )
    counts = label_counts(encoded["train"], len(data.labels))
    number = num_real_documents(encoded["train"])
    return dataclasses.replace(data, documents=documents, encoded=encoded, counts=counts, num_documents=number)


# ---- Evaluation ----


class Evaluation(NamedTuple):
    """
    What was measured on the documents that are reported.

    Attributes:
        split (`str`): `"validation"` or `"test"`.
        metrics (`dict[str, float]`): without prefix.
        scores, indices (`np.ndarray` of shape `(num_documents, k)`): probabilities and label ids, best first.
        label_sets (`list[np.ndarray]`, *optional*): ids of the assigned labels; `None` for a model that only ranks labels.
        kept (`list[dict]`): F1 of the documents that are kept when the least certain ones are left to people; empty without probabilities.
    """

    split: str
    metrics: dict[str, float]
    scores: np.ndarray
    indices: np.ndarray
    label_sets: list[np.ndarray] | None
    kept: list[dict[str, float]]


def evaluate_validation(data: RunData, trainer: SepMldcTrainer) -> Evaluation:
    """Measure on the validation documents."""
    result = measure(data, trainer, "validation", "eval")
    trainer.log({f"eval_{name}": value for name, value in result.metrics.items()})
    return result


def evaluate_test(data: RunData, trainer: SepMldcTrainer) -> Evaluation:
    """Measure on the test documents and write the predictions."""
    args = trainer.args
    result = measure(data, trainer, "test", "test")
    if trainer.is_world_process_zero():
        encoded = data.encoded["test"]
        write_predictions(
            Path(args.output_dir) / "predictions.jsonl",
            result.scores,
            result.indices,
            data.labels,
            result.label_sets,
            ids=encoded["id"] if "id" in encoded.column_names else None,
            gold=gold_names(data),
            top_k=args.prediction_top_k,
        )
    return result


def gold_names(data: RunData) -> list[list[str]]:
    """Labels of the test documents, in the form of the label sets of the model."""
    gold = list(data.documents["test"]["labels"])
    if data.label_sets.get("hierarchy") != "leaves":
        return gold
    covered = [ancestors_of(data.label_sets["label_parents"], names) for names in gold]
    return [[name for name in names if name not in above] for names, above in zip(gold, covered)]


def measure(data: RunData, trainer: SepMldcTrainer, split: str, prefix: str) -> Evaluation:
    """Metrics and the best labels of each document of a split."""
    args = trainer.args
    top_k = args.prediction_top_k
    args.prediction_top_k = max(top_k, min(len(data.labels), MOST_ASSIGNED))
    try:
        output = trainer.predict(data.encoded[split], metric_key_prefix=prefix)
    finally:
        args.prediction_top_k = top_k
    kept = trainer.last_metrics.f1_of_kept() if trainer.last_metrics.thresholds is not None else []
    if trainer.is_world_process_zero():
        save_metrics(args.output_dir, prefix, {**output.metrics, **({f"{prefix}_f1_of_kept": kept} if kept else {})})
        write_per_label_metrics(Path(args.output_dir) / "per_label_metrics.csv", trainer.last_metrics, data.labels)
    metrics = {name.removeprefix(f"{prefix}_"): value for name, value in output.metrics.items()}
    return Evaluation(split, metrics, *output.predictions, trainer.last_label_sets, kept)


def assigned_among(result: Evaluation, trainer: SepMldcTrainer) -> np.ndarray:
    """Which of the best labels of each document are assigned, (num_documents, k), with a hierarchy also as ancestors of others."""
    assigned = np.zeros(result.indices.shape, dtype=bool)
    hierarchy = trainer.bare_model().label_hierarchy if trainer.model.config.hierarchy is not None else None
    for row, ids in enumerate(result.label_sets or []):
        closed = ids if hierarchy is None else [*ids, *hierarchy.ancestors(ids.tolist())]
        assigned[row] = np.isin(result.indices[row], closed)
    return assigned


# ---- Report ----


def report(settings: Settings, data: RunData, trainer: SepMldcTrainer, result: Evaluation) -> None:
    """Print the results next to baselines, the worst labels, some documents, and what to do next."""
    if not trainer.is_world_process_zero():
        return
    folder, split = Path(settings.args.output_dir), result.split
    gold = list(data.encoded[split]["label_indices"])
    assigned = assigned_among(result, trainer)
    systems = {"SEP-MLDC": result.metrics}
    ks = settings.args.cutoffs(len(data.labels))
    documents = {"SEP-MLDC": DocumentResults(Predictions(result.indices, assigned), gold, len(data.labels), ks)}
    if wants_baselines(settings, data, trainer):
        baselines = measure_baselines(
            list(data.documents["train"]["text"]),
            list(data.encoded["train"]["label_indices"]),
            list(data.documents[split]["text"]),
            gold,
            new_metrics=lambda: trainer.new_streaming_metrics(thresholds=0.5),
            top_k=min(len(data.labels), MOST_ASSIGNED),
        )
        for name, (metrics, predictions) in baselines.items():
            systems[name] = metrics
            documents[name] = DocumentResults(predictions, gold, len(data.labels), ks)
        write_json(folder / "baseline_results.json", {k: v for k, v in systems.items() if k != "SEP-MLDC"})
    compared = bootstrap(documents)
    write_json(folder / "comparison.json", {"metrics": systems, **compared})

    print(f"\n{split} documents: {len(gold)}, labels: {len(data.labels)}; all figures in percent")
    if settings.run.refit_on_all:
        print(
            "They are those of the model that was trained again on training and validation documents."
            if split == "test"
            else "They were measured before the model was trained again on these documents too."
        )
    print()
    print("\n".join(rows_of_table(systems, [name for name in TABLE if name in systems["SEP-MLDC"]])))
    key = f"ndcg@{max(k for k in ks if k <= 5) if min(ks) <= 5 else max(ks)}"
    low, high = compared["intervals"]["SEP-MLDC"][key]
    print(f"\n{key} of SEP-MLDC with other documents of this kind: {100 * low:.1f} to {100 * high:.1f} (95% interval)")
    print("\n".join(f"SEP-MLDC is {line}" for line in comparison_lines(compared, key)))
    if result.kept:
        print("\n" + "\n".join(abstention_lines(result.metrics["share_abstained"], len(gold), result.kept)))
    worst: list[WorstLabel] = []
    if result.label_sets is not None:
        worst = worst_labels(documents["SEP-MLDC"], data.labels, trainer.model.config.label_counts)
        write_worst_labels(folder, worst)
        print("\nLabels with the lowest F1 (all in worst_labels.csv):")
        print(
            "\n".join(f"- {line}" for line in worst_label_lines(worst)) if worst else "- none: there are no mistakes"
        )
    if split == "test":
        show_examples(data.documents["test"]["text"], result, assigned, data.labels, settings.report.num_examples)
    if settings.args.do_train:
        behind = any(high < 0 for name, d in compared["differences"].items() if "SVC" in name for _, high in [d[key]])
        lines = advice(settings, data, trainer, behind, has_mistakes=bool(worst))
        if lines:
            print("\nWhat to do next:\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1)))
    trainer.create_model_card()
    tables = "per_label_metrics.csv" + ("" if result.label_sets is None else ", worst_labels.csv")
    print(f"\nEverything is in {folder}/: the checkpoint, all_results.json, {tables}, ...")


def wants_baselines(settings: Settings, data: RunData, trainer: SepMldcTrainer) -> bool:
    """Whether baselines are requested, or cheap compared with training."""
    train = data.documents.get("train")
    if train is None or isinstance(train, datasets.IterableDataset):
        return False
    if settings.report.baselines is not None:
        return settings.report.baselines
    runtime = sum(entry.get("train_runtime", 0) for entry in trainer.state.log_history)
    sample = first(train, 1000)["text"]
    num_words = len(train) * sum(len(text.split()) for text in sample) / len(sample)
    return linear_baseline_seconds(int(num_words), len(data.labels)) < BASELINE_SHARE * runtime


def show_examples(texts, result: Evaluation, assigned, labels: list[str], count: int) -> None:
    for text, scores, indices, chosen in list(zip(texts, result.scores, result.indices, assigned))[:count]:
        shown = [f"{labels[index]} {score:.2f}" for score, index, chosen in zip(scores, indices, chosen) if chosen]
        shown = shown or [f"{labels[indices[0]]} {scores[0]:.2f} (below its threshold)"]
        print(f"\n  {text[:300]}{'...' if len(text) > 300 else ''}\n  -> {', '.join(shown)}")


def advice(
    settings: Settings, data: RunData, trainer: SepMldcTrainer, behind_linear: bool, has_mistakes: bool
) -> list[str]:
    train, config = data.encoded["train"], trainer.model.config
    share_cut = 0.0
    if not isinstance(train, datasets.IterableDataset):
        limits = (config.encoder_max_length, settings.data.max_length, trainer.processing_class.model_max_length)
        limit = min(n for n in limits if n)
        share_cut = float(np.mean(np.asarray(first(train, 10_000)["length"]) >= limit))
    return next_steps(
        label_counts=config.label_counts,
        num_steps=trainer.state.global_step,
        share_cut=share_cut,
        has_validation="validation" in data.encoded,
        has_descriptions=bool(config.label_descriptions),
        has_lexical_scores=bool(config.num_lexical_features),
        behind_linear=behind_linear,
        has_mistakes=has_mistakes,
        train_file=(settings.data.train_file or ["train.jsonl"])[0],
    )


if __name__ == "__main__":
    run_program(main, "run_mldc.py")
