#!/usr/bin/env python
"""
Fine-tune, evaluate and apply SEP-MLDC models for multi-label document classification.

    accelerate launch examples/run_mldc.py examples/configs/quickstart.json
    accelerate launch examples/run_mldc.py --train_file train.csv --validation_file dev.csv --model_name_or_path roberta-base \
        --label_delimiter ";" --output_dir outputs --do_train --do_eval

`python examples/run_mldc.py --help` lists all arguments. They can also be given in a JSON or YAML file.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback, set_seed
from transformers.utils import logging

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.configuration_sep_mldc import recommended_classifier
from modeling_sep_mldc.encoder_sep_mldc import limit_tokenizer, set_padding_token
from trainer import SepMldcTrainer
from trainer.adapters import add_lora_adapters
from trainer.backbones import freeze_layers, loading_problem, resolve_backbone
from trainer.checkpoints import last_complete_checkpoint
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
    inspect_documents,
    label_counts,
    load_label_descriptions,
    load_pseudo_documents,
    num_real_documents,
    read_records,
    tokenize,
)
from trainer.data.tokenization import check_max_length
from trainer.devices import bfloat16_slowdown, is_bfloat16_native
from trainer.hub import summarize_provenance
from trainer.inference import check_vocabulary
from trainer.progress import use_short_lines
from trainer.run_arguments import (
    ARGUMENT_GROUPS,
    FORMER_NAMES,
    ModelArguments,
    RunSettings,
    check_arguments,
    check_frozen_layers,
    check_named_of_checkpoint,
    run_defaults,
)
from trainer.run_data import (
    RunData,
    check_guarantee_documents,
    check_known_labels,
    encode_documents,
    first_documents,
    label_set_fields,
    lexical_documents,
    read_documents,
    read_hierarchy,
)
from trainer.run_evaluation import Evaluation, gold_names, measure
from trainer.run_needs import TimeEstimate
from trainer.run_outputs import (
    check_output_folder,
    removed_if_empty,
    save_metrics,
    save_model_atomically,
    write_json,
    write_per_label_metrics,
    write_predictions,
)
from trainer.run_plan import choose_settings, show_plan, weigh_classes
from trainer.run_report import print_report


logger = logging.get_logger("run_mldc")
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


class Encoder(NamedTuple):
    """
    What a run starts from.

    Attributes:
        name (`str`): folder or Hub name.
        config (`PreTrainedConfig`): configuration of the encoder or the checkpoint.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        trained (`bool`): whether it is a trained SEP-MLDC checkpoint.
    """

    name: str
    config: Any
    tokenizer: Any
    trained: bool


def main() -> None:
    settings = read_settings(sys.argv[1:])
    with removed_if_empty(settings.args.output_dir):
        check_output_dir(settings)
        run(settings)


def run(settings: RunSettings) -> None:
    """All steps of a run, whose settings were checked."""
    encoder = find_encoder(settings)
    data = prepare_data(settings, encoder)
    show_data(settings, data, encoder.tokenizer)
    if settings.args.do_train:
        settings = choose_settings(settings, data, encoder.config)
        needs = show_plan(settings, data, encoder.config)
        if settings.model.class_weights == "auto" and not settings.run.dry_run:
            settings = weigh_classes(settings, data, encoder.name)
    if settings.run.dry_run:
        return
    model = build_model(settings, data, encoder)
    trainer = build_trainer(settings, data, model, encoder.tokenizer)
    result = None
    if settings.args.do_train:
        with trainer.cached_frozen_layers("validation" in data.encoded, reserved_bytes=needs.disk_bytes):
            fit(settings, data, trainer)
            if settings.args.do_eval:  # while the states of the validation documents are still cached
                result = evaluate_validation(data, trainer)
    else:
        if data.starts_cold:
            save_untrained(settings, data, trainer)
        if settings.args.do_eval:
            result = evaluate_validation(data, trainer)
    if settings.run.refit_on_all:
        trainer, all_data = refit(settings, data, trainer, encoder)
    if settings.args.do_predict:
        data = all_data if settings.run.refit_on_all else data
        result = evaluate_test(data, trainer)
    if result is not None:
        print_report(settings, data, trainer, result)
    if settings.args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


# ---- Arguments ----


def read_settings(argv: list[str]) -> RunSettings:
    """Parse the arguments and check everything that can be checked before data is read."""
    groups, named = parse_arguments(
        ARGUMENT_GROUPS,
        argv,
        FORMER_NAMES,
        run_defaults,
        prog="run_mldc.py",
        description=__doc__.strip().split("\n")[0],
    )
    check_arguments(*groups)
    settings = RunSettings(*groups, named)
    args = settings.args
    if args.should_log:
        logging.set_verbosity_info() if args.get_process_log_level() <= 20 else logging.set_verbosity_warning()
    if any(word.partition("=")[0].replace("-", "_") == "__hub_token" for word in argv):
        logger.warning(
            "`--hub_token` on the command line is visible in process lists, and accelerate prints the whole command when a "
            "run fails. Set the environment variable HF_TOKEN or use `hf auth login` instead."
        )
    if named.get("bf16") and args.use_cpu and not is_bfloat16_native(use_cpu=True):
        logger.warning(
            f"`--bf16` is emulated by this processor: in a short test it took {bfloat16_slowdown():.1f} times as long as float32. "
            "Remove the flag."
        )
    set_seed(args.seed)
    return settings


def check_output_dir(settings: RunSettings) -> None:
    """Check that the output folder contains no other run and can be written to."""
    args = settings.args
    if str(args.resume_from_checkpoint).lower() in ("true", "last"):
        args.resume_from_checkpoint = True
    elif args.do_train and args.resume_from_checkpoint and not os.path.isdir(args.resume_from_checkpoint):
        raise ValueError(
            f"`--resume_from_checkpoint` is {args.resume_from_checkpoint!r}, but there is no such folder. Specify a checkpoint of the run, "
            "such as outputs/checkpoint-100, or `last`."
        )
    if args.should_save and not settings.run.dry_run:
        check_output_folder(args.output_dir, OUTPUTS)
    if not args.do_train or args.resume_from_checkpoint or settings.run.overwrite_output_dir:
        return
    written = (os.path.join(args.output_dir, name) for name in ("all_results.json", "config.json"))
    if last_complete_checkpoint(args.output_dir) or any(map(os.path.exists, written)):
        raise ValueError(
            f"The output folder {args.output_dir!r} already contains a run. Add `--resume_from_checkpoint last` to continue it, "
            "`--overwrite_output_dir` to overwrite it, or specify another `--output_dir`."
        )


# ---- Data ----


def find_encoder(settings: RunSettings) -> Encoder:
    """Load the configuration and the tokenizer, and check that they are compatible with the settings."""
    name, revision = resolve_backbone(settings.model.model_name_or_path), settings.model.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The encoder {settings.model.model_name_or_path!r} cannot be loaded: {loading_problem(name, error)} Specify a Hub model, or a "
            "folder with config, weights and tokenizer."
        ) from error
    trained = config.model_type == "sep_mldc"
    if trained:
        check_named_of_checkpoint(settings.named, config)
    check_frozen_layers(settings, config.get_text_config().num_hidden_layers)
    check_vocabulary(tokenizer, name)
    check_max_length(settings.data.max_length, tokenizer, "--max_length")
    check_max_length(settings.model.encoder_max_length, tokenizer, "--encoder_max_length")
    set_padding_token(tokenizer)
    limit_tokenizer(tokenizer, config.backbone_config if trained else config, settings.model.encoder_max_length)
    return Encoder(name, config, tokenizer, trained)


def prepare_data(settings: RunSettings, encoder: Encoder) -> RunData:
    """Read and check all input, collect the labels, and tokenize. Invalid input raises an error here."""
    args, checkpoint = settings.args, encoder.config if encoder.trained else None
    documents = read_documents(settings)
    label_parents, hierarchy = read_hierarchy(settings, documents, checkpoint)
    if hierarchy is not None:
        with args.main_process_first(desc="closing labels"):
            documents = {split: close_labels(dataset, label_parents) for split, dataset in documents.items()}
    streamed = isinstance(documents.get("train"), IterableDataset)
    names, num_documents = None, 0
    if streamed:
        names, num_documents = count_label_names(first_documents(documents["train"], settings.data.max_train_samples))
    if checkpoint is not None:
        labels = checkpoint.labels
    elif "train" in documents:
        labels = build_label_list(names if streamed else documents["train"], settings.labels.label_list_file)
    else:
        labels = labels_without_documents(settings.labels.label_list_file, settings.labels.label_descriptions_file)
    starts_cold = checkpoint is None and "train" not in documents
    choose_metrics(settings, len(labels))
    check_work(settings, starts_cold)
    data = RunData(documents, {}, labels, None, num_documents, starts_cold=starts_cold)
    if settings.labels.label_descriptions_file and checkpoint is None:
        data.descriptions = load_label_descriptions(settings.labels.label_descriptions_file, labels)
    data.label_sets = label_set_fields(settings, labels, label_parents, hierarchy, checkpoint)

    # Truncate only after the labels have been collected from all training documents, so that a short trial has the same labels.
    for split in documents:
        limit = settings.data.max_train_samples if split == "train" else settings.data.max_eval_samples
        documents[split] = first_documents(documents[split], limit)
    check_guarantee_documents(settings, documents, labels)
    for split, dataset in documents.items():
        check_known_labels(settings, dataset, labels, split, names)
    if settings.labels.pseudo_documents_file and ("train" in documents or starts_cold):
        path = settings.labels.pseudo_documents_file
        data.pseudo_documents = summarize_provenance(record for _, record in read_records(path))
        pseudo = first_documents(load_pseudo_documents(path, labels), settings.data.max_train_samples)
        if hierarchy is not None:
            pseudo = close_labels(pseudo, label_parents)
        documents["train"] = pseudo if starts_cold else add_pseudo_documents(documents["train"], pseudo)
    if starts_cold and settings.labels.unlabeled_file:
        data.unlabeled = read_texts(settings.labels.unlabeled_file, settings.data.text_columns)
    elif starts_cold and "train" in documents:
        data.unlabeled = documents["train"]["text"][:MAX_DOCUMENTS]
    with args.main_process_first(desc="tokenizing documents"):
        for split, dataset in documents.items():
            data.encoded[split] = encode_documents(settings, dataset, labels, encoder.tokenizer)
    if streamed:
        data.counts = np.array([names[label] for label in labels])
    elif "train" in documents:
        data.counts = label_counts(data.encoded["train"], len(labels))
        data.num_documents = num_real_documents(data.encoded["train"])
    return data


def choose_metrics(settings: RunSettings, num_labels: int) -> None:
    """Check the k of the metrics against the number of labels, and choose the metric for early stopping."""
    args = settings.args
    ks = args.cutoffs(num_labels)
    if settings.run.early_stopping_patience is not None and "metric_for_best_model" not in settings.named:
        args.metric_for_best_model, args.greater_is_better = f"ndcg@{max(ks)}", True


def check_work(settings: RunSettings, starts_cold: bool) -> None:
    """Check that there is something to do, and that an untrained model does not overwrite a model in the output folder."""
    args, run = settings.args, settings.run
    if not starts_cold:
        if not (args.do_train or args.do_eval or args.do_predict or run.dry_run):
            raise ValueError("There is nothing to do. Add `--do_train`, `--do_eval`, `--do_predict` or `--dry_run`.")
        return
    if run.refit_on_all:
        raise ValueError(
            "`--refit_on_all` trains again on training and validation documents, but there are no training documents. Remove the flag."
        )
    if os.path.exists(os.path.join(args.output_dir, "config.json")) and not (
        args.resume_from_checkpoint or run.overwrite_output_dir or run.dry_run
    ):
        raise ValueError(
            f"The output folder {args.output_dir!r} already contains a model. Add `--overwrite_output_dir` to overwrite it, or "
            "specify another `--output_dir`."
        )


def show_data(settings: RunSettings, data: RunData, tokenizer) -> None:
    """Print a report on the documents before training."""
    train = data.documents.get("train")
    if train is None or isinstance(train, IterableDataset) or not settings.args.should_log or data.starts_cold:
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


# ---- Model ----


def build_model(settings: RunSettings, data: RunData, encoder: Encoder) -> SepMldcForMultiLabelClassification:
    """Load a trained checkpoint, or add a new head to an encoder."""
    given = settings.model
    if encoder.trained:
        model = SepMldcForMultiLabelClassification.from_pretrained(encoder.name, revision=given.model_revision)
        if any(getattr(model.config, name) != value for name, value in data.label_sets.items()):
            model.set_hierarchy(**data.label_sets)
    else:
        if data.starts_cold:
            given = for_a_cold_start(settings, data)
        counted = {}
        if not data.starts_cold:
            counted = {
                "label_frequencies": data.counts / max(data.num_documents, 1),
                "label_counts": [int(count) for count in data.counts],
                "num_train_documents": data.num_documents,
            }
        attention = {"attn_implementation": given.attn_implementation} if given.attn_implementation else {}
        model = SepMldcForMultiLabelClassification.from_backbone(
            encoder.name,
            encoder.tokenizer,
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
            backbone_dropout=given.backbone_dropout,
            backbone_kwargs={"revision": given.model_revision},
            encoder_max_length=given.encoder_max_length,
            **counted,
            parents_in_label_texts=settings.labels.parents_in_label_texts,
            **data.label_sets,
            **attention,
        )
        if data.starts_cold:
            start_from_cosines(model, encoder.tokenizer, data.unlabeled, labels_per_document(settings, data))
    freeze_layers(model.backbone, given.freeze_layers)
    if given.lora_rank is not None:
        add_lora_adapters(model, given.lora_rank)
    return model


def for_a_cold_start(settings: RunSettings, data: RunData) -> ModelArguments:
    """Model settings for a head that compares documents with label texts, except those that the user specified."""
    given, named = settings.model, settings.named
    chosen = {"classifier_bias_init": "zero"}
    if not settings.args.do_train:
        chosen |= {"classifier": recommended_classifier(len(data.labels)), "token_attention": False}
    return dataclasses.replace(given, **{name: value for name, value in chosen.items() if name not in named})


def labels_per_document(settings: RunSettings, data: RunData) -> float:
    """The value set by the user, or else the mean over the pseudo-documents, or else 1."""
    if settings.labels.labels_per_document is not None:
        return settings.labels.labels_per_document
    pseudo = data.documents.get("train")
    return 1.0 if pseudo is None else float(np.mean([len(names) for names in pseudo["labels"]]))


def build_trainer(settings: RunSettings, data: RunData, model, tokenizer) -> SepMldcTrainer:
    """A trainer that logs short lines and the remaining time, and passes the training data and settings to the model card."""
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
    """Check the metric before training; otherwise, the run would fail only after the first evaluation."""
    args = trainer.args
    if not args.do_train or args.metric_for_best_model is None:
        return
    probe = trainer.new_streaming_metrics()
    probe.update(np.zeros((1, trainer.model.config.num_labels)), label_indices=[[0]])
    losses = ("loss", "classification_loss", "label_contrastive_loss", "document_contrastive_loss")
    known = [*losses, *probe.compute()]
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        raise ValueError(
            f"`--metric_for_best_model` is {args.metric_for_best_model!r}, but an evaluation reports {', '.join(known)}. Choose one "
            "of these."
        )


# ---- Training ----


def fit(settings: RunSettings, data: RunData, trainer: SepMldcTrainer) -> None:
    """Train and save, then fit lexical scores and tune thresholds."""
    result = trainer.train(resume_from_checkpoint=settings.args.resume_from_checkpoint)
    save_model_atomically(trainer)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_metrics(settings.args.output_dir, "train", result.metrics)
        save_metrics(settings.args.output_dir, "settings", {"settings": data.settings})
    logger.info(f"Trained model saved in {settings.args.output_dir}.")
    validation = data.encoded.get("validation")
    if validation is None:
        if data.starts_cold:
            choose_cardinality_threshold(settings, data, trainer)
            save_model_atomically(trainer)
        return
    if settings.lexical.lexical_scores:
        features = settings.lexical.num_lexical_features
        weights = settings.lexical.lexical_class_weights
        documents = lexical_documents(data.encoded["train"], hide_progress=settings.args.disable_tqdm)
        trainer.fit_lexical_scores(documents, validation, num_features=features, class_weights=weights)
    if settings.thresholds.tune_thresholds:
        objective, calibration = settings.thresholds.threshold_objective, settings.thresholds.score_calibration
        try:
            trainer.tune_thresholds(validation, objective=objective, calibration=calibration)
        except ValueError as error:
            # The trained model is already saved, so the run continues without tuned thresholds.
            logger.warning(f"Thresholds were not tuned: {error}")
    save_model_atomically(trainer)


def save_untrained(settings: RunSettings, data: RunData, trainer: SepMldcTrainer) -> None:
    """Save a model that compares documents with label texts, with thresholds tuned on validation documents if there are any."""
    validation = data.encoded.get("validation")
    if validation is not None and settings.thresholds.tune_thresholds:
        objective, calibration = settings.thresholds.threshold_objective, settings.thresholds.score_calibration
        trainer.tune_thresholds(validation, objective=objective, calibration=calibration)
    save_model_atomically(trainer)
    if settings.args.should_log:
        config = trainer.model.config
        print(
            f"\nNothing was trained: {settings.args.output_dir}/ scores {config.num_labels:,} labels by the similarity of document and label text. "
            + (
                "Without documents, it only ranks labels. To get thresholds, provide documents with `--unlabeled_file` or `--validation_file`."
                if config.is_ranking
                else "Once you have labeled documents, train it with `--train_file`."
            )
        )


def choose_cardinality_threshold(settings: RunSettings, data: RunData, trainer: SepMldcTrainer) -> None:
    """After training on pseudo-documents alone, choose one threshold for all labels that gives the requested number of labels per document."""
    model, wanted = trainer.bare_model(), labels_per_document(settings, data)
    batches = trainer.logit_batches(first_documents(data.encoded["train"], MAX_DOCUMENTS), "Choosing a threshold")
    if settings.labels.unlabeled_file:
        rows = Dataset.from_dict({"text": data.unlabeled})
        batches = trainer.logit_batches(
            tokenize(rows, trainer.processing_class, settings.data.max_length), "Choosing a threshold"
        )
    if model.config.is_ranking:
        return
    threshold = cardinality_threshold((model.probabilities(batch.logits) for batch in batches), wanted)
    set_cardinality_threshold(model.config, threshold, wanted, len(data.unlabeled))


# ---- Training again ----


def refit(
    settings: RunSettings, data: RunData, tuned: SepMldcTrainer, encoder: Encoder
) -> tuple[SepMldcTrainer, RunData]:
    """
    Train a new model on training and validation documents for the best number of steps, and give it the tuned thresholds and weights of
    lexical scores. The tuned model stays in the output folder until the new one is complete.

    Returns:
        `tuple(SepMldcTrainer, RunData)`: the trainer of the new model, and its training data.
    """
    everything = data.with_validation()
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
            f"\nWill train again on {everything.num_documents:,} documents, including the validation documents, for {steps} steps. "
            "Thresholds and weights of lexical scores are kept."
        )
    set_seed(args.seed)
    trainer = build_trainer(again, everything, build_model(again, everything, encoder), encoder.tokenizer)
    resumed = last_complete_checkpoint(folder) if settings.args.resume_from_checkpoint else None
    if resumed is None and args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    result = trainer.train(resume_from_checkpoint=resumed)
    trainer.keep_tuning_of(tuned.bare_model(), everything.encoded["train"])
    args.output_dir = settings.args.output_dir
    save_model_atomically(trainer)
    if trainer.is_world_process_zero():
        metrics = {"documents": everything.num_documents, "steps": steps, "loss": result.metrics["train_loss"]}
        save_metrics(args.output_dir, "refit", {f"refit_{name}": value for name, value in metrics.items()})
        shutil.rmtree(folder, ignore_errors=True)
    return trainer, everything


# ---- Evaluation ----


def measure_and_write_labels(data: RunData, trainer: SepMldcTrainer, split: str, prefix: str) -> Evaluation:
    """Measure on the documents of a split; also write the metrics of each label."""
    result = measure(data, trainer, split, prefix)
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "per_label_metrics.csv"
        write_per_label_metrics(path, trainer.last_metrics, data.labels)
    return result


def evaluate_validation(data: RunData, trainer: SepMldcTrainer) -> Evaluation:
    """Evaluate on the validation documents."""
    result = measure_and_write_labels(data, trainer, "validation", "eval")
    trainer.log({f"eval_{name}": value for name, value in result.metrics.items()})
    return result


def evaluate_test(data: RunData, trainer: SepMldcTrainer) -> Evaluation:
    """Evaluate on the test documents and write the predictions."""
    args = trainer.args
    result = measure_and_write_labels(data, trainer, "test", "test")
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


if __name__ == "__main__":
    run_program(main, "run_mldc.py")
