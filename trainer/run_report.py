"""The report of a run: results compared with baselines, the worst labels, example documents, and next steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import IterableDataset

from .baselines import measure_baselines, rows_of_table
from .report import (
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
from .run_arguments import RunSettings
from .run_data import RunData, first_documents
from .run_evaluation import MOST_ASSIGNED, Evaluation, assigned_among
from .run_outputs import write_json
from .sep_mldc_trainer import SepMldcTrainer


TABLE = ["p@1", "p@3", "p@5", "ndcg@3", "ndcg@5", "psp@1", "psp@3", "psp@5", "f1_micro", "f1_macro", "hierarchical_f1"]
# By default, baselines are trained if this takes less than this share of the training time.
BASELINE_SHARE = 0.1
# Number of labels shown per document if the model only ranks labels.
SHOWN_RANKED = 3


def print_report(settings: RunSettings, data: RunData, trainer: SepMldcTrainer, result: Evaluation) -> None:
    """
    Print the results compared with baselines, the worst labels, example documents, and next steps. Write `comparison.json`,
    `worst_labels.csv`, `baseline_results.json` if there are baselines, and the model card. Only the first process does this.

    Args:
        settings ([`RunSettings`]): of the run.
        data ([`RunData`]): the training documents, and the documents of the reported split.
        trainer ([`SepMldcTrainer`]): of the model.
        result ([`Evaluation`]): metrics and predictions on the reported split.
    """
    if not trainer.is_world_process_zero():
        return
    folder, split = Path(settings.args.output_dir), result.split
    gold = list(data.encoded[split]["label_indices"])
    assigned = assigned_among(result, trainer.bare_model())
    systems = {"SEP-MLDC": result.metrics}
    ks = settings.args.cutoffs(len(data.labels))
    documents = {"SEP-MLDC": DocumentResults(Predictions(result.indices, assigned), gold, len(data.labels), ks)}
    if _should_fit_baselines(settings, data, trainer):
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

    print(f"\n{split} documents: {len(gold):,}, labels: {len(data.labels):,}; all metrics in percent")
    if settings.run.refit_on_all:
        print(
            "These are the results of the model that was trained again on training and validation documents."
            if split == "test"
            else "These results were measured before the model was trained again with these documents included."
        )
    print()
    print("\n".join(rows_of_table(systems, [name for name in TABLE if name in systems["SEP-MLDC"]])))
    key = f"ndcg@{max(k for k in ks if k <= 5) if min(ks) <= 5 else max(ks)}"
    low, high = compared["intervals"]["SEP-MLDC"][key]
    print(f"\n95% confidence interval of {key} for SEP-MLDC: {100 * low:.1f} to {100 * high:.1f}")
    print("\n".join(f"SEP-MLDC is {line}" for line in comparison_lines(compared, key)))
    if result.kept:
        print("\n" + "\n".join(abstention_lines(result.metrics["share_abstained"], len(gold), result.kept)))
    worst: list[WorstLabel] = []
    if result.label_sets is not None:
        worst = worst_labels(documents["SEP-MLDC"], data.labels, trainer.model.config.label_counts)
        write_worst_labels(folder, worst)
        print("\nLabels with the lowest F1 (all in worst_labels.csv):")
        print("\n".join(f"- {line}" for line in worst_label_lines(worst)) if worst else "- none: no errors")
    if split == "test":
        _show_examples(data.documents["test"]["text"], result, data.labels, settings.report.num_examples)
    if settings.args.do_train:
        behind = any(high < 0 for name, d in compared["differences"].items() if "SVC" in name for _, high in [d[key]])
        lines = _advice(settings, data, trainer, behind, has_errors=bool(worst))
        if lines:
            print("\nNext steps:\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1)))
    trainer.create_model_card()
    tables = "per_label_metrics.csv" + ("" if result.label_sets is None else ", worst_labels.csv")
    print(f"\nOutputs in {folder}/: the checkpoint, all_results.json, {tables}, ...")


def _should_fit_baselines(settings: RunSettings, data: RunData, trainer: SepMldcTrainer) -> bool:
    """Whether baselines are requested, or cheap compared with training."""
    train = data.documents.get("train")
    if train is None or isinstance(train, IterableDataset):
        return False
    if settings.report.baselines is not None:
        return settings.report.baselines
    runtime = sum(entry.get("train_runtime", 0) for entry in trainer.state.log_history)
    sample = first_documents(train, 1000)["text"]
    num_words = len(train) * sum(len(text.split()) for text in sample) / len(sample)
    return linear_baseline_seconds(int(num_words), len(data.labels)) < BASELINE_SHARE * runtime


def _show_examples(texts: Sequence[str], result: Evaluation, labels: list[str], count: int) -> None:
    """Print the first documents with their label sets, or with their best labels if the model only ranks labels."""
    for number, text in enumerate(list(texts[:count])):
        scores = dict(zip(result.indices[number].tolist(), result.scores[number].tolist()))
        best = next(iter(scores))
        if result.label_sets is None:
            shown = [f"{labels[index]} {score:.2f}" for index, score in list(scores.items())[:SHOWN_RANKED]]
        else:
            chosen = result.label_sets[number].tolist()
            shown = [f"{labels[index]} {scores[index]:.2f}" for index in chosen if index in scores]
            shown = shown or [f"{labels[best]} {scores[best]:.2f} (below its threshold)"]
        print(f"\n  {text[:300]}{'...' if len(text) > 300 else ''}\n  -> {', '.join(shown)}")


def _advice(
    settings: RunSettings, data: RunData, trainer: SepMldcTrainer, behind_linear: bool, has_errors: bool
) -> list[str]:
    train, config = data.encoded["train"], trainer.model.config
    share_cut = 0.0
    if not isinstance(train, IterableDataset):
        limits = (config.encoder_max_length, settings.data.max_length, trainer.processing_class.model_max_length)
        limit = min(n for n in limits if n)
        share_cut = float(np.mean(np.asarray(first_documents(train, 10_000)["length"]) >= limit))
    return next_steps(
        label_counts=config.label_counts,
        num_steps=trainer.state.global_step,
        share_cut=share_cut,
        has_validation="validation" in data.encoded,
        has_descriptions=bool(config.label_descriptions),
        has_lexical_scores=bool(config.num_lexical_features),
        behind_linear=behind_linear,
        has_errors=has_errors,
        train_file=(settings.data.train_file or ["train.jsonl"])[0],
    )
