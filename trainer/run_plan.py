"""Before training: choose settings and class weights, estimate the resources that they need, and print and check the plan."""

import dataclasses
import math
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from modeling_sep_mldc.configuration_sep_mldc import recommended_token_attention_size

from .class_weights import choose_class_weights
from .data.documents import LabeledDocuments
from .data.encoding import label_counts
from .frozen_layers import caches_states
from .lexical.fitting import default_num_features, default_solver
from .lexical.solvers import kernel_bytes
from .recipes import recommend_settings
from .run_arguments import RunSettings
from .run_data import MAX_STREAMED_DOCUMENTS, RunData, first_documents
from .run_needs import RunNeeds, available_memory, check_fits, estimate_run, free_disk_space, gib


logger = logging.get_logger(__name__)


def choose_settings(settings: RunSettings, data: RunData, encoder_config: Any) -> RunSettings:
    """
    Fill in every setting that the user did not specify, from the data and the device, and print the values and the reasons.

    Args:
        settings ([`RunSettings`]): as specified by the user.
        data ([`RunData`]): with training documents; its `settings` are set.
        encoder_config (`PreTrainedConfig`): of the encoder or the trained checkpoint.

    Returns:
        [`RunSettings`]: complete.
    """
    args, validation, train = settings.args, data.encoded.get("validation"), data.encoded["train"]
    streamed = isinstance(train, IterableDataset)
    sample = [len(document["input_ids"]) for document in first_documents(train, 2000)]
    known = {
        "document_lengths": sample,
        "num_validation_documents": 0 if validation is None else len(validation),
        "num_layers": encoder_config.get_text_config().num_hidden_layers,
        "max_tokens": settings.data.max_length or 512,
        "device": args.device.type,
        "num_devices": args.world_size * max(args.n_gpu, 1),
        "bf16": args.bf16,
        "recipe": settings.run.recipe,
    }
    num_documents = len(train) if data.starts_cold else data.num_documents  # pseudo-documents
    known["num_pseudo_documents"] = 0 if streamed else len(train) - num_documents
    chosen = recommend_settings(num_documents, len(data.labels), named=settings.named, **known)
    unnamed = recommend_settings(num_documents, len(data.labels), **known)
    contradicted = [
        name for name in chosen if name in settings.named and chosen[name] != unnamed.get(name, chosen[name])
    ]
    if validation is None:
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
            "why": "specified by the user: train again, including the validation documents",
        }
    if args.should_log:
        print(f"\nSettings (recipe {settings.run.recipe!r})\n")
        print("\n".join(chosen.table()))
        if contradicted:
            print(f"\nSpecified by you instead of by the recipe {settings.run.recipe!r}: {', '.join(contradicted)}.")
    return settings._replace(**groups)


def show_plan(settings: RunSettings, data: RunData, encoder_config: Any) -> RunNeeds:
    """
    Print the plan of the run and the resources that it needs, and stop a run that does not fit.

    Args:
        settings ([`RunSettings`]): complete, see [`choose_settings`].
        data ([`RunData`]): with training documents.
        encoder_config (`PreTrainedConfig`): of the encoder or the trained checkpoint.

    Returns:
        [`RunNeeds`]: steps, tokens, memory and disk space.

    Raises:
        ValueError: if there is too little memory or disk space, or if a cache of frozen layers is requested that would not be used.
    """
    args, frozen = settings.args, settings.model.freeze_layers
    if args.cache_frozen_layers and (not frozen or args.torch_compile):
        reason, remedy = (
            ("`--torch_compile` cannot use it", "Remove one of the two options.")
            if frozen
            else ("no layer is frozen", "Set `--freeze_layers`, or remove the option.")
        )
        raise ValueError(f"`--cache_frozen_layers` requests a cache, but {reason}. {remedy}")
    needs = estimate_needs(settings, data, encoder_config)
    if not args.should_save:
        return needs
    memory, disk = available_memory(args.device), free_disk_space(args.output_dir)
    further = ["lexical scores"] if settings.lexical.lexical_scores else []
    if settings.thresholds.tune_thresholds and "validation" in data.encoded:
        further.append("thresholds")
    if args.should_log:
        print(
            f"\nWill train for {needs.num_steps} steps ({needs.num_tokens:,} tokens) on {args.device.type}"
            + (" in bfloat16" if args.bf16 else "")
            + (f", then fit {' and '.join(further)} on the validation documents" if further else "")
            + (", then train again with these documents added" if settings.run.refit_on_all else "")
            + f"; results go to {args.output_dir}/.\nThis needs about {gib(needs.state_bytes + needs.batch_bytes)} of memory"
            + (f" ({gib(memory)} are free)" if memory is not None else "")
            + f" in addition to the documents, and {gib(needs.disk_bytes)} of disk space"
            + (
                f", {gib(needs.cache_bytes)} more to cache the states of frozen layers"
                if needs.cache_bytes > 2**20
                else ""
            )
            + f" ({gib(disk)} are free). A time estimate follows after the first steps."
        )
        if settings.model.class_weights == "auto":
            print(
                f"First, class weights are chosen: {len(data.encoded['train']) + len(data.encoded['validation']):,} documents are encoded once "
                "more, and three classifiers are trained on their embeddings."
            )
        if needs.kernel_bytes > needs.state_bytes + needs.batch_bytes:
            print(f"Lexical scores need about {gib(needs.kernel_bytes)} of memory after training.")
    main_memory = None if args.device.type == "cpu" else available_memory()
    check_fits(needs, memory, disk, main_memory, must_cache=bool(args.cache_frozen_layers))
    if memory is not None and needs.state_bytes + needs.batch_bytes > memory:
        logger.warning(
            f"Training may not fit into the {gib(memory)} of free memory. If it runs out of memory, lower "
            "`--per_device_train_batch_size` or `--encoder_max_length`."
        )
    return needs


def weigh_classes(settings: RunSettings, data: RunData, backbone: str) -> RunSettings:
    """
    Choose and print the class weights that are best on the validation documents.

    Args:
        settings ([`RunSettings`]): with `class_weights="auto"`.
        data ([`RunData`]): with training and validation documents; the choice is added to its `settings`.
        backbone (`str`): Hub name or folder of the encoder.

    Returns:
        [`RunSettings`]: with the chosen `class_weights`.

    Raises:
        ValueError: if there are no training documents.
    """
    args = settings.args
    answer: list[Any] = [None]
    if data.starts_cold:
        raise ValueError("`--class_weights auto` needs training documents, but there are none. Remove the argument.")
    if args.process_index == 0:
        parts = {}
        for split in ("train", "validation"):
            columns = {
                "text": data.documents[split]["text"][:],
                "label_indices": data.encoded[split]["label_indices"][:],
            }
            counts = label_counts(data.encoded[split], len(data.labels)).tolist()
            parts[split] = LabeledDocuments(Dataset.from_dict(columns), data.labels, counts)
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


def estimate_needs(settings: RunSettings, data: RunData, encoder_config: Any) -> RunNeeds:
    """
    Estimate the resources that a run needs.

    Args:
        settings ([`RunSettings`]): complete, see [`choose_settings`].
        data ([`RunData`]): with training documents.
        encoder_config (`PreTrainedConfig`): of the encoder or the trained checkpoint.

    Returns:
        [`RunNeeds`]: steps, tokens, memory and disk space.
    """
    args, train, limit = settings.args, data.encoded["train"], settings.model.encoder_max_length
    lengths = [len(document["input_ids"]) for document in first_documents(train, 2000)]
    lengths = np.minimum(lengths, limit) if limit else np.asarray(lengths)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps > 0:
        steps, num_documents = args.max_steps, args.max_steps * batch
    else:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(train) / batch))
        num_documents = round(args.num_train_epochs * len(train))
    hidden_size = getattr(encoder_config, "hidden_size", None)
    size = settings.model.token_attention_size or (hidden_size and recommended_token_attention_size(hidden_size))
    if encoder_config.model_type == "sep_mldc":
        encoder_config, size = encoder_config.backbone_config, encoder_config.token_attention_size
    features = settings.lexical.num_lexical_features or default_num_features(len(data.labels))
    kept = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    lexical = settings.lexical.lexical_scores
    num_fitted = min(data.num_documents, MAX_STREAMED_DOCUMENTS) if isinstance(train, IterableDataset) else len(train)
    ridge = (
        lexical
        and settings.lexical.lexical_class_weights == "none"
        and default_solver(num_fitted, len(data.labels)) == "ridge"
    )
    cached = 0
    if settings.model.freeze_layers and caches_states(args):
        parts = [data.encoded[split] for split in ("train", "validation") if split in data.encoded]
        cached = sum(_num_tokens(part, limit) for part in parts if not isinstance(part, IterableDataset))
    return estimate_run(
        encoder_config,
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
        kernel_bytes=kernel_bytes(num_fitted) if ridge else 0,
        num_cached_tokens=cached,
    )


def _num_tokens(encoded: Dataset, limit: int | None) -> int:
    """Number of tokens that the encoder reads, at most `limit` per document."""
    lengths = np.asarray(encoded["length"][:], dtype=np.int64)
    return int(np.minimum(lengths, limit).sum() if limit else lengths.sum())
