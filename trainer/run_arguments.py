"""The arguments of `examples/run_mldc.py`, in groups by what they control, and checks of their values."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from modeling_sep_mldc import SepMldcConfig

from .cold_start import check_labels_per_document
from .devices import has_accelerator, is_bfloat16_native
from .recipes import RECIPES
from .thresholds import check_no_guarantee, check_threshold_settings
from .training_arguments import SepMldcTrainingArguments


# Names of version 0.1.
FORMER_NAMES = {
    "pseudo_samples_file": "pseudo_documents_file",
    "lexical_features": "num_lexical_features",
}


@dataclass
class ModelArguments:
    """Which encoder, and which head on it."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A text encoder (Hub name, folder, or package:NAME/FOLDER for one inside a Python package), or a trained "
            "SEP-MLDC checkpoint to train further, evaluate or apply. Required."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    pooling: str = field(default="mean", metadata={"help": "'mean' or 'cls'.", "choices": ["mean", "cls"]})
    classification_loss: str = field(
        default=SepMldcConfig.classification_loss,
        metadata={
            "help": "Loss of Eq. 19.",
            "choices": ["bce", "softmax", "decoupled_softmax", "bce+softmax", "bce+decoupled_softmax"],
        },
    )
    class_weights: str = field(
        default=SepMldcConfig.class_weights,
        metadata={
            "help": "Weights of the positive terms of binary cross-entropy: 'balanced', 'effective' (effective number of documents), "
            "'none', or 'auto', the one that is best on the validation documents.",
            "choices": ["none", "balanced", "effective", "auto"],
        },
    )
    classifier: str = field(
        default="mlp+similarity",
        metadata={"help": "Kind of head. 'mlp' is the paper's.", "choices": ["mlp", "similarity", "mlp+similarity"]},
    )
    classifier_dropout: float = field(default=0.5, metadata={"help": "Dropout probability of the head."})
    classifier_bias_init: str = field(
        default="prior",
        metadata={
            "help": "'prior' initializes the bias of each label with its log-odds in the training documents.",
            "choices": ["zero", "prior"],
        },
    )
    label_attention: bool = field(default=True, metadata={"help": "Label-guided feature selection (Eq. 16-18)."})
    token_attention: bool = field(
        default=True, metadata={"help": "Each label attends to the tokens of the document (label-wise attention)."}
    )
    token_attention_size: int | None = field(
        default=None,
        metadata={
            "help": "Dimensions in which labels attend to tokens, up to the encoder's hidden size. Defaults to 128."
        },
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "Number of lowest encoder layers to freeze, together with the embeddings."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters of this rank instead of the encoder's weights. They are saved merged. Needs the package "
            "peft."
        },
    )
    backbone_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout probability inside the encoder. Defaults to the encoder's own. With 0, training on a CPU is much "
            "faster."
        },
    )
    encoder_max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens that the encoder reads. Lexical scores read `max_length` tokens."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa', 'flash_attention_2', 'eager', ... Defaults to the encoder's own."}
    )


@dataclass
class DataArguments:
    """Which documents."""

    _argument_group_name = "Documents"

    train_file: list[str] | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl or parquet, each also .gz or .zst."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "As `train_file`."})
    test_file: list[str] | None = field(default=None, metadata={"help": "As `train_file`."})
    validation_split: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training documents that is set aside for validation if there is no validation file. "
            "Defaults to 0.1 in training; 0 sets none aside."
        },
    )
    test_split: float | None = field(
        default=None,
        metadata={"help": "Share of the training documents that is set aside for testing if there is no test file."},
    )
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with invalid rows: 'error' lists the first twenty, 'skip' leaves them out and writes "
            "them to bad_rows.jsonl.",
            "choices": ["error", "skip"],
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    data_format: str = field(
        default="auto",
        metadata={
            "help": "'auto' (by file extension), or a format of the paper's datasets: 'aapd', 'rcv1', 'eurlex'."
        },
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns of the text, joined by a space."}
    )
    id_column: str | None = field(default=None, metadata={"help": "Column of document ids, for predictions.jsonl."})
    max_length: int | None = field(default=None, metadata={"help": "Maximum number of tokens per document."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train only on the first documents."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate and predict only the first documents."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Stream the training documents from their files instead of loading them, for files larger than memory and "
            "disk cache. They are read once before training to count labels. Needs `max_steps`."
        },
    )
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={"help": "Size of the buffer in which streamed documents are shuffled. 0 keeps their order."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Number of tokenizing processes."})


@dataclass
class LabelArguments:
    """Which labels, and what they mean."""

    _argument_group_name = "Labels"

    label_column: list[str] = field(
        default_factory=lambda: ["labels"],
        metadata={"help": "A column of label lists or joined labels, or several 0/1 columns."},
    )
    label_delimiter: str | None = field(
        default=None, metadata={"help": r"Separator of labels that are joined in one string; \t is a tab."}
    )
    label_list_file: str | None = field(
        default=None, metadata={"help": "Label names, one per line. Defaults to those of the training documents."}
    )
    label_descriptions_file: str | None = field(
        default=None, metadata={"help": "json, jsonl or csv of `label` and `description`: what the labels mean."}
    )
    label_parents_file: str | None = field(
        default=None,
        metadata={
            "help": "Parents of labels: csv of `child` and `parent`, json of {child: [parents]}, or SKOS (extra `skos`). Their names "
            "become part of the label texts, and hierarchical metrics are reported."
        },
    )
    hierarchy: str | None = field(
        default=None,
        metadata={
            "help": "Make label sets consistent with the parents: 'closure' adds all ancestors, also to the labels of the documents; "
            "'leaves' then removes the ancestors of assigned labels.",
            "choices": ["closure", "leaves"],
        },
    )
    label_constraints_file: str | None = field(
        default=None,
        metadata={
            "help": 'json or jsonl of groups {"labels": [names], "at_least": n, "at_most": m} that label sets satisfy. "at_most": 1 is an '
            "exclusive group."
        },
    )
    parents_in_label_texts: bool = field(
        default=True, metadata={"help": "Encode the names of a label's ancestors with its own."}
    )
    pseudo_documents_file: str | None = field(
        default=None,
        metadata={"help": "jsonl with `text` and `labels`: documents written by a language model, for rare labels."},
    )
    unlabeled_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Documents without labels, in the format of `train_file`, for a model without training documents. They show which "
            "similarities are typical, so that thresholds can be chosen."
        },
    )
    labels_per_document: float | None = field(
        default=None,
        metadata={
            "help": "Average number of labels per document, for the thresholds of a model without training documents. Defaults to that "
            "of the pseudo-documents, or 1."
        },
    )


@dataclass
class ThresholdArguments:
    """How ranked labels become label sets."""

    _argument_group_name = "Thresholds"

    tune_thresholds: bool = field(
        default=True, metadata={"help": "Tune decision thresholds on the validation documents after training."}
    )
    threshold_objective: str = field(
        default="f1",
        metadata={
            "help": "Objective of the thresholds: 'f1' (mean of micro and macro F1), 'macro', 'micro', or 'precision:0.9'; or a "
            "guarantee for one common threshold: 'recall:0.9' or 'fdr:0.1' (false discovery rate)."
        },
    )
    score_calibration: str | None = field(
        default=None, metadata={"help": "Also calibrate probabilities: 'temperature' or 'platt'."}
    )


@dataclass
class LexicalArguments:
    """Lexical scores, which are added to those of the encoder."""

    _argument_group_name = "Lexical scores"

    lexical_scores: bool = field(
        default=False,
        metadata={
            "help": "After training, add the scores of a sparse linear classifier on tokens, with a weight chosen on the validation "
            "documents. Time and memory grow with training documents times labels."
        },
    )
    num_lexical_features: int | None = field(
        default=None,
        metadata={
            "help": "Number of weights kept per label. Defaults to a million in all, at least 300 and at most 1,000 per label."
        },
    )
    lexical_class_weights: str = field(
        default="none",
        metadata={
            "help": "'balanced': the rarer a label, the more errors on its documents cost; 'auto': the better of 'none' and 'balanced' on "
            "the validation documents. Both fit support vector machines instead of ridge regressions, which takes longer.",
            "choices": ["none", "balanced", "auto"],
        },
    )


@dataclass
class ReportArguments:
    """What a run reports."""

    _argument_group_name = "Report"

    baselines: bool | None = field(
        default=None,
        metadata={
            "help": "Also train and report a majority and a linear TF-IDF baseline. Defaults to yes if that takes less than "
            "a tenth of the training time."
        },
    )
    num_examples: int = field(default=2, metadata={"help": "Number of test documents shown with their labels."})
    language: str | None = field(
        default=None, metadata={"help": "Language of the documents, for the model card: en, de, ..."}
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the checkpoint, for the model card: apache-2.0, ..."}
    )


@dataclass
class RunArguments:
    """How the run itself behaves."""

    _argument_group_name = "Run"

    recipe: str = field(
        default="best",
        metadata={
            "help": "How settings that you do not specify are chosen: 'best' and 'fast' choose them from the data, 'paper' uses those of the "
            "paper. See `trainer.recommend_settings`.",
            "choices": list(RECIPES),
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Check the input, print what would be done, and stop."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this number of evaluations without a better `metric_for_best_model`."},
    )
    refit_on_all: bool = field(
        default=False,
        metadata={
            "help": "After everything has been chosen on the validation documents, train again on training and validation documents, for "
            "the chosen number of steps. Thresholds and the weights of lexical scores are kept."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow an output folder that already contains a run."}
    )


ARGUMENT_GROUPS = (
    ModelArguments,
    DataArguments,
    LabelArguments,
    ThresholdArguments,
    LexicalArguments,
    ReportArguments,
    RunArguments,
    SepMldcTrainingArguments,
)


class RunSettings(NamedTuple):
    """
    All arguments of a run, by group.

    Attributes:
        model, data, labels, thresholds, lexical, report, run: the groups above.
        args ([`SepMldcTrainingArguments`]): arguments of the trainer.
        named (`dict[str, Any]`): the arguments that the user specified; all others are defaults, which the recipe may change.
    """

    model: ModelArguments
    data: DataArguments
    labels: LabelArguments
    thresholds: ThresholdArguments
    lexical: LexicalArguments
    report: ReportArguments
    run: RunArguments
    args: SepMldcTrainingArguments
    named: dict[str, Any]


def run_defaults(named: Mapping[str, Any]) -> dict[str, Any]:
    """
    Defaults of a run that depend on the machine and on the arguments that the user specified: the device, the precision, how often the
    loss is logged, and what early stopping needs.

    Args:
        named (`dict[str, Any]`): the arguments that the user specified, which take precedence.
    """
    use_cpu = named.get("use_cpu", not has_accelerator())
    defaults: dict[str, Any] = {"use_cpu": use_cpu, "logging_steps": 0.02}
    if not any(named.get(name) for name in ("fp16", "fp16_full_eval", "bf16_full_eval")):
        defaults["bf16"] = is_bfloat16_native(use_cpu)
    evaluates = named.get("eval_strategy", "no")
    if named.get("early_stopping_patience") is not None and evaluates != "no":
        defaults |= {"save_strategy": evaluates, "load_best_model_at_end": True}
        if "eval_steps" in named:
            defaults["save_steps"] = named["eval_steps"]
        if named.get("save_strategy", evaluates) != evaluates:
            defaults["load_best_model_at_end"] = False
    return defaults


def check_arguments(
    model: ModelArguments,
    data: DataArguments,
    labels: LabelArguments,
    thresholds: ThresholdArguments,
    lexical: LexicalArguments,
    report: ReportArguments,
    run: RunArguments,
    args: SepMldcTrainingArguments,
) -> None:
    """
    Check everything that can be checked without reading files.

    Raises:
        ValueError: a value is out of range, or arguments contradict each other.
    """
    if not model.model_name_or_path:
        raise ValueError("No encoder is specified. Specify a Hub model or a folder with `--model_name_or_path`.")
    whole: list[tuple[Any, str, int, str]] = [
        (data, "max_length", 1, "Leave it out to use the encoder's own."),
        (data, "max_train_samples", 1, "Leave it out to use all documents."),
        (data, "max_eval_samples", 1, "Leave it out to use all documents."),
        (data, "preprocessing_num_workers", 1, "Leave it out to use this process alone."),
        (data, "shuffle_buffer_size", 0, "Use 0 to keep the order of the files."),
        (model, "freeze_layers", 0, "Use 0 to train all layers."),
        (model, "encoder_max_length", 1, "Leave it out to use `max_length`."),
        (model, "lora_rank", 1, "Leave it out to train the encoder's own weights."),
        (lexical, "num_lexical_features", 1, "Leave out `--lexical_scores` to have none."),
        (report, "num_examples", 0, "Use 0 to show none."),
        (run, "early_stopping_patience", 1, "Leave it out to train to the end."),
    ]
    for group, name, least, remedy in whole:
        _check_range(group, name, partial(operator.le, least), f"an integer of at least {least}", remedy)
    for name in ("classifier_dropout", "backbone_dropout"):
        _check_range(
            model, name, lambda value: 0 <= value < 1, "a probability of at least 0 and below 1", "Use 0 for none."
        )
    for name in ("validation_split", "test_split"):
        _check_range(
            data, name, lambda value: 0 <= value < 1, "a share of at least 0 and below 1", "Use 0.1, for example."
        )
        if getattr(data, name) and getattr(data, name.replace("split", "file")):
            raise ValueError(
                f"`--{name}` is {getattr(data, name)}, but `--{name.replace('split', 'file')}` specifies documents. Remove one of "
                "the two."
            )
    check_threshold_settings(thresholds.threshold_objective, None, thresholds.score_calibration)
    if thresholds.tune_thresholds and (labels.hierarchy == "leaves" or labels.label_constraints_file):
        check_no_guarantee(thresholds.threshold_objective)
    if not thresholds.tune_thresholds:
        for name, usual in (("threshold_objective", "f1"), ("score_calibration", None)):
            if getattr(thresholds, name) != usual:
                raise ValueError(
                    f"`--{name}` is {getattr(thresholds, name)}, but `--tune_thresholds false` disables tuning. Remove one of the two."
                )
    if model.class_weights != "none" and "bce" not in model.classification_loss:
        raise ValueError(
            f"`--class_weights` is {model.class_weights}, but `--classification_loss {model.classification_loss}` has no binary "
            "cross-entropy to weight. Choose a loss with `bce`, or remove the argument."
        )
    if run.early_stopping_patience is not None and args.eval_strategy == "no":
        raise ValueError(
            f"`--early_stopping_patience` is {run.early_stopping_patience}, but there is no evaluation during training. Add "
            "`--eval_strategy epoch`, or remove the argument."
        )
    if run.refit_on_all and not args.do_train:
        raise ValueError("`--refit_on_all` trains again, but `--do_train` is missing. Add it, or remove the other.")
    without_documents = not (data.train_file or data.dataset_name)
    if labels.labels_per_document is not None:
        check_labels_per_document(labels.labels_per_document)
    if not without_documents and (labels.unlabeled_file or labels.labels_per_document is not None):
        name = "unlabeled_file" if labels.unlabeled_file else "labels_per_document"
        raise ValueError(
            f"`--{name}` is for a model without training documents, but there are training documents. Remove the argument."
        )
    label_texts = labels.label_descriptions_file or labels.label_list_file
    if not (args.do_train or args.do_eval or args.do_predict or run.dry_run or (without_documents and label_texts)):
        raise ValueError("There is nothing to do. Add `--do_train`, `--do_eval`, `--do_predict` or `--dry_run`.")
    if data.streaming:
        _check_streaming(model, data, labels, report, run, args)


# Settings that cannot be changed in a trained checkpoint.
OF_THE_CHECKPOINT = (
    "pooling",
    "classification_loss",
    "class_weights",
    "classifier",
    "classifier_dropout",
    "label_attention",
    "token_attention",
    "token_attention_size",
)


def check_named_of_checkpoint(named: Mapping[str, Any], checkpoint: Any) -> None:
    """
    Check the arguments that the user specified against a trained checkpoint.

    Args:
        named (`dict[str, Any]`): the arguments that the user specified.
        checkpoint (`SepMldcConfig`): of the checkpoint.

    Raises:
        ValueError: the checkpoint has another value.
    """
    for name in OF_THE_CHECKPOINT:
        value = getattr(checkpoint, name)
        if named.get(name, value) != value:
            raise ValueError(
                f"`--{name}` is {named[name]}, but the trained checkpoint has {value}, which cannot be changed. Remove the argument, or specify an "
                "encoder to train a new model."
            )


def check_frozen_layers(settings: RunSettings, num_layers: int) -> None:
    """
    Check how many layers of the encoder are frozen, which the recipe determines unless the user specified it, before documents are read.

    Args:
        settings ([`RunSettings`]): as specified by the user.
        num_layers (`int`): layers of the encoder.

    Raises:
        ValueError: more layers are frozen than there are, or LoRA adapters are requested although all layers are frozen.
    """
    model, recipe = settings.model, settings.run.recipe
    if model.freeze_layers > num_layers:
        raise ValueError(
            f"`--freeze_layers` is {model.freeze_layers}, but the encoder has {num_layers} layers. Choose 0 to {num_layers}."
        )
    if model.lora_rank is None:
        return
    of_recipe = recipe == "fast" and settings.args.do_train and "freeze_layers" not in settings.named
    if of_recipe or model.freeze_layers == num_layers:
        setting = "`--recipe fast`" if of_recipe else f"`--freeze_layers {model.freeze_layers}`"
        remedy = "Choose `--recipe best`" if of_recipe else "Freeze fewer layers"
        raise ValueError(
            f"`--lora_rank` is {model.lora_rank}, but {setting} freezes all {num_layers} layers of the encoder, and frozen layers get no "
            f"adapters. {remedy}, or leave out `--lora_rank`."
        )


def _check_range(group: Any, name: str, rule: Callable[[float], bool], requirement: str, remedy: str) -> None:
    value = getattr(group, name)
    if value is not None and not (math.isfinite(value) and rule(value)):
        raise ValueError(f"`--{name}` is {value}, but it must be {requirement}. {remedy}")


def _check_streaming(
    model: ModelArguments,
    data: DataArguments,
    labels: LabelArguments,
    report: ReportArguments,
    run: RunArguments,
    args: SepMldcTrainingArguments,
) -> None:
    if args.do_train and args.max_steps <= 0:
        raise ValueError(
            "With `--streaming`, the number of documents is unknown. Set the length of training with `--max_steps`."
        )
    if data.dataset_name:
        raise ValueError("`--streaming` reads files, but `--dataset_name` is a dataset on the Hub. Use its files.")
    for name, named in (
        ("baselines", report.baselines),
        ("validation_split", data.validation_split),
        ("test_split", data.test_split),
        ("pseudo_documents_file", labels.pseudo_documents_file),
        ("group_by_label_set", args.group_by_label_set),
        ("refit_on_all", run.refit_on_all),
        ("cache_frozen_layers", args.cache_frozen_layers),
        ("class_weights", model.class_weights == "auto"),
    ):
        if named:
            further = (
                ", or write the pseudo-documents into the training files" if name == "pseudo_documents_file" else ""
            )
            raise ValueError(
                f"`--{name}` needs all training documents at once, which `--streaming` does not provide. Remove one of the two{further}."
            )
