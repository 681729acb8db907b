"""Choosing class weights on validation documents, with classifiers on embeddings that are computed once."""

from typing import Any

import numpy as np
import torch

from modeling_sep_mldc.class_weights_sep_mldc import CLASS_WEIGHTS

from .audit.scores import HeadTrainer
from .data.documents import LabeledDocuments
from .thresholds import check_guarantee, tune_thresholds_from_batches


def choose_class_weights(
    train: LabeledDocuments,
    validation: LabeledDocuments,
    model_name_or_path: str,
    label_descriptions: dict[str, str] | None = None,
    objective: str = "f1",
    classification_loss: str | None = None,
    **settings: Any,
) -> tuple[str, dict[str, dict[str, float]]]:
    r"""
    The kind of class weights with the best F1 on validation documents.

    The encoder stays frozen and reads each document once. One classifier for each kind is trained on its embeddings with the settings of
    the recipe `"fast"`, thresholds are tuned, and the cross-fitted F1 scores are compared. `"none"` wins unless another kind is better by
    more than $1 / (10 \sqrt{N})$, the noise level with N validation documents.

    Args:
        train ([`LabeledDocuments`]), validation ([`LabeledDocuments`]): with the same labels.
        model_name_or_path (`str`): Hub name or folder of an encoder.
        label_descriptions (`dict[str, str]`, *optional*): by label name.
        objective (`str`, defaults to `"f1"`): metric to compare: micro F1 (`"micro"`), macro F1 (`"macro"`), or else their mean.
        classification_loss (`str`, *optional*): must include `"bce"`; the recipe's loss if not given.
        settings: `max_length`, `seed`, `use_cpu` and `hide_progress`, as in [`~trainer.audit.out_of_fold_scores`].

    Returns:
        `tuple[str, dict]`: the kind, and `f1_micro` and `f1_macro` of each.

    Raises:
        ValueError: no validation documents, a loss without binary cross-entropy, or an encoder that cannot be loaded.
    """
    if not len(validation.dataset):
        raise ValueError("There are no validation documents to choose class weights on. Specify some, or use `none`.")
    heads = HeadTrainer(train, model_name_or_path, label_descriptions, **settings)
    config = heads.model.config
    config.classification_loss = classification_loss or config.classification_loss
    if "bce" not in config.classification_loss:
        raise ValueError(
            f"`classification_loss` is {config.classification_loss!r}, which has no binary cross-entropy to weight. Use a loss with `bce`."
        )
    config.label_counts = list(train.label_counts)
    config.num_train_documents = len(train.dataset)
    known = train.dataset["label_indices"][:]
    embeds = heads.encode(heads.tokenize(validation.dataset["text"][:]))
    gold: np.ndarray = np.zeros((len(embeds), len(train.labels)), np.float32)
    for row, ids in enumerate(validation.dataset["label_indices"]):
        gold[row, ids] = 1
    found = {}
    for kind in CLASS_WEIGHTS:
        config.class_weights = kind
        heads.train(heads.embeds, known)
        batch = torch.from_numpy(heads.logits(embeds)), torch.from_numpy(gold)
        tuned_for = "f1" if check_guarantee(objective) else objective
        info = tune_thresholds_from_batches(
            [batch], len(train.labels), tuned_for, wide=True, label_counts=np.asarray(train.label_counts)
        ).threshold_info
        found[kind] = {name: info[name] for name in ("f1_micro", "f1_macro")}
    names = {"micro": ["f1_micro"], "macro": ["f1_macro"]}.get(objective, ["f1_micro", "f1_macro"])
    values = {kind: float(np.mean([of_kind[name] for name in names])) for kind, of_kind in found.items()}
    best = max(values, key=values.__getitem__)
    return (best if values[best] > values["none"] + 0.1 * len(embeds) ** -0.5 else "none"), found
