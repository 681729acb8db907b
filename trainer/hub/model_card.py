"""The model card of a trained model, with its metrics and training settings. Written at every save and push."""

import csv
import hashlib
import importlib.metadata
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..metrics.label_groups import head_body_tail
from .model_card_pictures import draw_pictures
from .model_card_text import GROUP, escape_markdown, headline_metrics, pretty_metric, split_metrics


# Their positions are counted from the id of the padding token + 1.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
TEMPLATE = Path(__file__).with_name("model_card_template.md")
MAX_LABEL_ROWS = 50
_FILE_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".gz", ".zst")
_MARKER = (
    "<!-- Written by sep-mldc ({digest}). It is written anew at each save, until you change it: then it is yours. -->"
)
_MARKER_PATTERN = re.compile(re.escape(_MARKER).replace(re.escape("{digest}"), "([0-9a-f]{64})"))


def is_generated_card(text: str) -> bool:
    """Whether `text` is a card of [`save_model_card`] that nobody has changed since."""
    text = text.replace("\r\n", "\n")
    match = _MARKER_PATTERN.search(text)
    return match is not None and match.group(1) == _digest(_MARKER_PATTERN.sub("", text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the name of a Hub repository, else `None` (a local folder or file)."""
    if not name or os.path.exists(name) or name.startswith((".", "~")) or name.endswith(_FILE_ENDINGS):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _shown_name(name: str) -> str:
    """A Hub name as a link; only the last part of a local path, so that cards do not reveal local folders."""
    if hub_id(name):
        return f"[{escape_markdown(name)}](https://huggingface.co/{name})"
    return escape_markdown(re.split(r"[/\\]", name.rstrip("/\\"))[-1])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def summarize_provenance(rows: Iterable[Mapping]) -> dict:
    """
    Summarize pseudo-documents for a card, from their rows (each with a `provenance`, or with its fields directly).

    Returns:
        `dict`: `count`, sorted lists `models`, `templates` (prompt names with the start of their hash) and `dates`
        (first and last day), and `kinds` (number by kind, if rows have a `kind`). Endpoints and requests are left out, because they may
        reveal host names.
    """
    count, models, templates, dates = 0, set(), set(), set()
    kinds: Counter[str] = Counter()
    for row in rows:
        count += 1
        if row.get("kind"):
            kinds[str(row["kind"])] += 1
        own = row.get("provenance")
        fields = own if isinstance(own, Mapping) else row
        if fields.get("model"):
            models.add(str(fields["model"]))
        if fields.get("template"):
            digest = str(fields.get("template_hash") or "")[:12]
            templates.add(f"{fields['template']} ({digest})" if digest else str(fields["template"]))
        if fields.get("time"):
            dates.add(str(fields["time"])[:10])
    days = sorted(dates)
    return {
        "count": count,
        "models": sorted(models),
        "templates": sorted(templates),
        "dates": days[:1] + days[1:][-1:],
        "kinds": dict(sorted(kinds.items())),
    }


def _setting(value: Any) -> str:
    value = getattr(value, "value", value)
    return f"{value:g}" if isinstance(value, float) else escape_markdown(value)


def _rows(source: Any, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """(description, value) of the attributes that `source` has, from a fixed list, so that no secret is included."""
    values = ((title, getattr(source, name, None)) for name, title in names.items())
    return [(title, _setting(value)) for title, value in values if value is not None]


_MODEL_SETTINGS = {
    "classifier": "classifier",
    "label_attention": "label-guided feature selection (Eq. 16-18)",
    "token_attention": "label-wise attention over tokens",
    "token_attention_size": "dimensions of label-wise attention",
    "pooling": "pooling",
    "classification_loss": "classification loss (Eq. 19)",
    "class_weights": "class weights of the binary cross-entropy",
    "classifier_dropout": "dropout of the classifier",
    "num_lexical_features": "lexical scores, token weights per label",
}
_LOSS_SETTINGS = {
    "label_loss_weight": "weight of the label contrastive loss, β",
    "document_loss_weight": "weight of the document contrastive loss, γ",
    "contrastive_temperature": "temperature of both, τ",
    "contrastive_weighting": "weighting of the negatives",
    "label_encoding": "label embeddings",
    "labels_per_step": "labels encoded per step, at most",
}
_TRAINING_SETTINGS = {
    "learning_rate": "learning rate",
    "head_learning_rate": "learning rate of the head",
    "per_device_train_batch_size": "batch size per device",
    "gradient_accumulation_steps": "gradient accumulation steps",
    "world_size": "processes",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "optim": "optimizer",
    "lr_scheduler_type": "learning rate schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "largest gradient norm",
    "bf16": "bfloat16 autocast",
    "fp16": "float16 autocast",
    "seed": "seed",
}


def _label_table(config: Any, counts: Sequence[int] | None) -> tuple[list[str], list[list]]:
    """Header and rows of the most frequent labels; a column that would be empty is left out."""
    descriptions, names = config.label_descriptions or {}, [config.id2label[i] for i in range(config.num_labels)]
    order = list(range(len(names)) if counts is None else sorted(range(len(names)), key=lambda i: -counts[i]))
    order = order[:MAX_LABEL_ROWS]
    columns: dict[str, list] = {"Label": [escape_markdown(names[i]) for i in order]}
    if any(descriptions.get(names[i]) for i in order):
        columns["Description"] = [escape_markdown(descriptions.get(names[i], "")) for i in order]
    if counts is not None:
        columns["Training documents"] = [int(counts[i]) for i in order]
    if config.thresholds is not None:
        columns["Threshold"] = [f"{config.thresholds[i]:.3f}" for i in order]
    return list(columns), [list(row) for row in zip(*columns.values())]


def _co2_grams(run_dir: str | os.PathLike | None) -> float | None:
    """Emissions of the run, in g CO2eq, from the `emissions.csv` that codecarbon's callback leaves in the output folder."""
    path = Path(run_dir or "", "emissions.csv")
    if run_dir is None or not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        runs = {row["run_id"]: float(row["emissions"]) for row in csv.DictReader(file)}  # kg, cumulative in a run
    return 1000 * sum(runs.values())


def _unused_limit(training_args: Any) -> str:
    """The one of "epochs" and "steps" that did not determine how long to train."""
    return "num_train_epochs" if (getattr(training_args, "max_steps", None) or 0) > 0 else "max_steps"


def _environment() -> list[tuple[str, str]]:
    versions = [("Python", platform.python_version())]
    for package in ("sep-mldc", "torch", "transformers", "datasets", "accelerate", "huggingface_hub"):
        try:
            versions.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def build_model_card(
    config: Any,
    *,
    metrics: Mapping[str, float] | None = None,
    metric_note: str | None = None,
    training_args: Any = None,
    label_counts: Sequence[int] | None = None,
    pseudo_document_provenance: Iterable[Mapping] | Mapping | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    datasets: str | Sequence[str] | None = None,
    repo_id: str | None = None,
    model_name: str | None = None,
    run_dir: str | os.PathLike | None = None,
    max_length: int | None = None,
    evaluation_sets: Sequence[str] = (),
    pictures: Iterable[str] = (),
    recipe: str | None = None,
    settings: Sequence[tuple[str, Any, str]] = (),
    untrained: bool = False,
    kept: Sequence[Mapping] | None = None,
) -> ModelCard:
    """
    Build the card of a model from its configuration and metrics. Nothing is fetched or written.

    Args:
        config ([`SepMldcConfig`]):
            Labels, descriptions, counts, thresholds and how they were found are read from it.
        metrics (`dict[str, float]`, *optional*):
            As the trainer logs them, in [0, 1]: `eval_...` is the validation split, `test_...` the test split. Losses,
            speeds and values that are not finite are left out. The metadata contains the eight [`headline_metrics`] on the test
            documents, or on the validation documents if there are no test metrics.
        metric_note (`str`, *optional*):
            When they were measured ("at step 500").
        training_args ([`SepMldcTrainingArguments`], *optional*):
            Loss settings and hyperparameters are read from it, from a fixed list that includes no tokens or folders.
        label_counts (`Sequence[int]` of length `num_labels`, *optional*):
            Real training documents of each label; `config.label_counts` by default.
        pseudo_document_provenance (*optional*):
            The rows of the pseudo-documents used in training, or the result of [`summarize_provenance`] for them. `()` means that
            there were none; `None` that it is not known.
        base_model, datasets (`str`, or a list for `datasets`, *optional*):
            Hub names are linked and added to the metadata; of local paths only the last part is shown.
        license, language, tags (*optional*):
            For the metadata. Left out if not given.
        repo_id (`str`, *optional*):
            The Hub name that the usage examples load.
        model_name (`str`, *optional*):
            The title; by default the last part of `repo_id`, or of `run_dir`.
        run_dir (path, *optional*):
            The folder of the training run, which may contain codecarbon's `emissions.csv`.
        max_length (`int`, *optional*):
            Number of tokens to which documents were truncated.
        evaluation_sets (`Sequence[str]`, *optional*):
            Names of several evaluation sets, whose metrics are called `eval_NAME_...`.
        pictures (`Iterable[str]`, *optional*):
            File names of plots in the same folder.
        recipe (`str`, *optional*), settings (`Sequence[tuple[str, Any, str]]`, *optional*):
            How settings were chosen: name of the recipe, and (setting, value, why) as [`RecommendedSettings.rows`] returns them.
        untrained (`bool`, defaults to `False`):
            Whether the model was not trained: documents and label texts are compared with the encoder as it is.
        kept (`list[dict]`, *optional*):
            What `StreamingMetrics.f1_of_kept()` returned: F1 of the documents that are kept, by their share.

    Returns:
        [`~huggingface_hub.ModelCard`]: with the measured values as `data.eval_results`.

    Raises:
        ValueError: `label_counts` does not have one value per label.
    """
    counts = label_counts if label_counts is not None else config.label_counts
    if counts is not None and len(counts) != config.num_labels:
        raise ValueError(
            f"`label_counts` has {len(counts)} values for {config.num_labels} labels. Give the number of training documents "
            "of each label, in the order of `config.id2label`, or none at all."
        )
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    name = model_name or (repo_id or "").split("/")[-1] or Path(run_dir or "").name or "sep-mldc"
    splits = split_metrics(metrics or {}, evaluation_sets)
    co2 = _co2_grams(run_dir)
    data = _metadata(
        name, splits, datasets, base_model=base_model, license=license, language=language, tags=tags, co2=co2
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=escape_markdown(name),
        base_model_text=_shown_name(base_model) if base_model else None,
        dataset_text=", ".join(map(_shown_name, datasets)),
        repo_id=repo_id or "user/model",
        repo_id_known=repo_id is not None,
        metric_note=metric_note,
        encoder_tokens=_encoder_tokens(config, max_length),
        lexical_tokens=max_length if config.num_lexical_features and config.encoder_max_length else None,
        environment=_environment(),
        co2=f"{co2:.3g}" if co2 else None,
        pictures=set(pictures),
        untrained=untrained,
        recipe=escape_markdown(recipe or ""),
        setting_rows=[[escape_markdown(name), _setting(value), escape_markdown(why)] for name, value, why in settings],
        **_label_values(config, counts),
        **_metric_values(splits, counts),
        kept_rows=[
            [
                f"{row['share_kept']:.0%}",
                # Cards may be created from results of older versions.
                f"{row['min_expected_f1']:.3f}" if "min_expected_f1" in row else "-",
                *(_percent(row[name]) for name in KEPT_COLUMNS),
            ]
            for row in kept or ()
        ],
        share_abstained=_abstained(metrics or {}),
        **_setting_values(config, training_args),
        **_pseudo_document_values(pseudo_document_provenance, config.num_train_documents),
    )
    card.text = f"\n{_MARKER}\n\n{card.text.strip()}\n"
    # The marker contains a digest of everything else, including metadata, so that later edits are detected.
    card.text = card.text.replace("{digest}", _digest(card.content.replace(_MARKER, "")), 1)
    return card


def _metadata(
    name: str,
    splits: Mapping[str, Mapping[str, float]],
    datasets: Sequence[str],
    *,
    base_model: str | None,
    license: str | None,
    language: str | Sequence[str] | None,
    tags: Sequence[str],
    co2: float | None,
) -> ModelCardData:
    """The metadata of a card, with the headline metrics on the test documents, or on all splits if there are no test metrics."""
    dataset_ids = [dataset for dataset in datasets if hub_id(dataset)]
    dataset_name = ", ".join(re.split(r"[/\\]", dataset.rstrip("/\\"))[-1] for dataset in datasets) or "not stated"
    headline = [split for split in splits if split.startswith("test")] or list(splits)
    eval_results = [
        EvalResult(
            task_type="text-classification",
            task_name="Multi-label document classification",
            dataset_type=dataset_ids[0] if dataset_ids else "local",
            dataset_name=dataset_name,
            dataset_split=split,
            metric_type=metric,
            metric_name=pretty_metric(metric),
            metric_value=splits[split][metric],
        )
        for split in headline
        for metric in headline_metrics(splits[split])
    ]
    emissions = {"emissions": co2, "source": "codecarbon", "training_type": "fine-tuning"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=hub_id(base_model),
        license=license,
        language=list(language) if isinstance(language, (list, tuple)) else language,
        tags=list(dict.fromkeys(["sep-mldc", "multi-label-classification", "generated_from_trainer", *tags])),
        datasets=dataset_ids or None,
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
        **({"co2_eq_emissions": emissions} if co2 else {}),
    )


def _label_values(config: Any, counts: Sequence[int] | None) -> dict[str, Any]:
    """What the template shows of the configuration."""
    config.check_guarantee()
    header, rows = _label_table(config, counts)
    return {
        "num_labels": config.num_labels,
        "encoder": escape_markdown(config.backbone_config.model_type),
        "num_train_documents": config.num_train_documents,
        "num_rows": len(rows),
        "label_header": header,
        "label_rows": rows,
        "has_counts": counts is not None,
        "has_descriptions": bool(config.label_descriptions),
        "has_thresholds": config.thresholds is not None,
        "hierarchy": config.hierarchy,
        "num_children": len(config.label_parents or {}),
        "constraints": [_constraint_text(group) for group in config.label_constraints or ()],
        "threshold_rows": [
            (escape_markdown(k), escape_markdown(v, limit=len(v)) if k == "guarantee" else _setting(v))
            for k, v in (config.threshold_info or {}).items()
            if not k.startswith("guaranteed_")
        ],
        "probabilities": not config.is_ranking,
    }


def _constraint_text(group: Mapping[str, Any], shown: int = 5) -> str:
    """A group of labels and its bounds as a phrase."""
    names = [escape_markdown(name) for name in group["labels"][:shown]]
    more = len(group["labels"]) - len(names)
    bounds = " and ".join(
        f"{bound.replace('_', ' ')} {group[bound]}" for bound in ("at_least", "at_most") if bound in group
    )
    return f"{bounds} of {', '.join(names)}{f' and {more} more' if more else ''}"


def _metric_values(splits: Mapping[str, Mapping[str, float]], counts: Sequence[int] | None) -> dict[str, Any]:
    """What the template shows of the metrics."""
    plain = {m: None for values in splits.values() for m in values if not GROUP.search(m) and "psndcg" not in m}
    shown = [split for split in splits if any(m in splits[split] for m in plain)]
    rows = [(pretty_metric(m), [_percent(splits[split].get(m)) for split in shown]) for m in plain]
    group_header, group_rows = _group_table(splits, counts)
    return {
        "splits": shown,
        "metric_rows": rows,
        "terms": [text for start, text in TERMS.items() if any(name.startswith(start) for name, _ in rows)],
        "group_header": group_header,
        "group_rows": group_rows,
    }


def _setting_values(config: Any, training_args: Any) -> dict[str, Any]:
    """What the template shows of the settings."""
    of_model, losses = dict(_MODEL_SETTINGS), dict(_LOSS_SETTINGS)
    if not config.token_attention:
        del of_model["token_attention_size"]
    if getattr(training_args, "label_encoding", None) == "embedding":
        del losses["labels_per_step"]
    settings = {name: title for name, title in _TRAINING_SETTINGS.items() if name != _unused_limit(training_args)}
    return {
        "loss_rows": _rows(config, of_model) + _rows(training_args, losses),
        "training_rows": _rows(training_args, settings),
    }


def _pseudo_document_values(
    provenance: Iterable[Mapping] | Mapping | None, num_train_documents: int | None
) -> dict[str, Any]:
    """What the template shows of the pseudo-documents."""
    summary = provenance
    if summary is not None and not isinstance(summary, Mapping):
        summary = summarize_provenance(summary)
    return {
        "pseudo": _pseudo_documents(summary, num_train_documents),
        "no_pseudo_text": "Not stated." if summary is None else "None were used.",
    }


def _group_table(
    splits: Mapping[str, Mapping[str, float]], counts: Sequence[int] | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the metrics by label frequency; a group without labels is left out."""
    groups = ["head", "body", "tail"]
    if counts is not None:
        members = head_body_tail(np.asarray(counts))
        groups = [group for group in groups if len(members[group])]
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for split, values in splits.items():
        for metric, value in values.items():
            match = GROUP.search(metric)
            if match and match.group(2) in groups:
                base = (metric[: match.start()] + metric[match.end() :]).strip("_/")
                rows.setdefault((base, split), {})[match.group(2)] = value
    groups = [group for group in groups if any(group in values for values in rows.values())]
    if len(groups) < 2:  # a single group contains all labels, whose figures are already shown
        return [], []
    return ["Metric", "Split", *(group.capitalize() for group in groups)], [
        [pretty_metric(base), split, *(_percent(values.get(group)) for group in groups)]
        for (base, split), values in rows.items()
    ]


KEPT_COLUMNS = ("f1_micro", "precision_micro", "recall_micro")


def _abstained(metrics: Mapping[str, float]) -> str | None:
    """Share of documents without a predicted label, among the test documents or else the validation documents."""
    shares = [metrics.get(f"{split}_share_abstained") for split in ("test", "predict", "eval")]
    return next((_percent(share) for share in shares if share is not None), None)


TERMS = {
    "P@": "**P@k**: share of the k best-scored labels that are correct.",
    "Recall@": "**Recall@k**: share of a document's labels that are among the k best-scored ones.",
    "nDCG@": "**nDCG@k**: like P@k, but a correct label counts more the higher it is ranked; 100 for a perfect ranking.",
    "PSP@": "**PSP@k**: P@k that counts rare labels more (propensity-scored), relative to the best possible ranking.",
    "Micro F1": "**Micro F1**: F1 of all assignments of labels to documents together; frequent labels dominate.",
    "Macro F1": "**Macro F1**: mean of the F1 of each label; all labels count the same.",
}


def _encoder_tokens(config: Any, max_length: int | None) -> int | None:
    """Number of tokens that the encoder reads of a document in training, special tokens included."""
    backbone = config.backbone_config
    positions = getattr(backbone, "max_position_embeddings", None)
    if positions is not None and backbone.model_type in _POSITIONS_AFTER_PADDING:
        positions -= (getattr(backbone, "pad_token_id", None) or 0) + 1
    known = [n for n in (positions, max_length, config.encoder_max_length) if n is not None and 0 < n < 10**6]
    return min(known, default=None)


def _pseudo_documents(summary: Mapping | None, num_real: int | None) -> dict | None:
    if not summary or not summary["count"]:
        return None
    rows = [("written by", ", ".join(summary["models"])), ("prompts", ", ".join(summary["templates"]))]
    rows.append(("date", " to ".join(summary["dates"])))
    if summary.get("kinds"):
        rows.append(("kinds", ", ".join(f"{number} {kind}" for kind, number in summary["kinds"].items())))
    share = f"{summary['count'] / (summary['count'] + num_real):.1%}" if num_real else None
    rows = [(title, escape_markdown(value) or "not stated") for title, value in rows]
    return {"count": summary["count"], "share": share, "rows": rows}


def save_model_card(
    output_dir: str | os.PathLike,
    config: Any,
    *,
    log_history: Sequence[Mapping] | None = None,
    metrics: Mapping[str, float] | None = None,
    deciles: Sequence[Mapping] | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """
    Write `README.md` and its plots to `output_dir`, each under a temporary name and then renamed, the card last.

    Args:
        output_dir (path): the folder; made if it is missing.
        config ([`SepMldcConfig`]), metrics: as for [`build_model_card`], which takes `kwargs` too.
        log_history (`list[dict]`, *optional*): `trainer.state.log_history`, for the training curve.
        deciles (`list[dict]`, *optional*): what `StreamingMetrics.deciles()` returned, for the plot of recall by decile.
        overwrite (`bool`): replace a README even if it was not written by this function or was edited since.

    Raises:
        FileExistsError: if a README exists that was edited or written by someone, and `overwrite` is not set. Nothing is written then.
    """
    folder = Path(output_dir)
    path = folder / "README.md"
    if path.exists() and not overwrite and not is_generated_card(path.read_text(encoding="utf-8", errors="replace")):
        raise FileExistsError(
            f"{path.name} of {folder.name!r} was not written by this package, or was edited, so it is kept and no model card is written. Move "
            "it away, or pass `overwrite=True` to replace it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(log_history, deciles)
    card = build_model_card(
        config, metrics=metrics, pictures=pictures, run_dir=kwargs.pop("run_dir", folder), **kwargs
    )
    for name, content in {**pictures, path.name: str(card).encode()}.items():
        temporary = folder / f"_{name}.{os.getpid()}.tmp"  # because of the "_", concurrent pushes skip it
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)
    return path
