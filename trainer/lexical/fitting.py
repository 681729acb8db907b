"""Fits the lexical scores of a trained model: linear classifiers on tokens, whose weight is chosen on held-out documents."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from modeling_sep_mldc.lexical_sep_mldc import LexicalScores

from ..metrics.ranking import inverse_propensities
from ..run_needs import available_memory, gib
from .features import NUM_BIGRAMS, token_tf_idf
from .fusion import MAX_PAIRS, TAIL_WEIGHTS, ValidationScores, choose_tail_weight, stack_scores
from .solvers import PENALTY, fit_kernel_ridge, fit_shortlist_svms, fit_sparse_svms, kernel_bytes


logger = logging.get_logger(__name__)

SOLVERS = ("ridge", "svm", "shortlist")
CLASS_WEIGHTS = ("none", "balanced", "auto")
# Up to this number of documents x labels, SVMs are fitted on all documents: minutes of CPU time.
MAX_SVM_PAIRS = 50_000_000
# Total number of weights kept: frequent labels need a thousand each, while thousands of rare labels do better with a few hundred each.
TOTAL_WEIGHTS, MIN_FEATURES, MAX_FEATURES = 1_000_000, 300, 1000


def default_num_features(num_labels: int) -> int:
    """
    Weights kept per label: a million in all, at least 300 and at most 1,000 per label.

    Example:

    ```python
    >>> [default_num_features(num_labels) for num_labels in (10, 2000, 20_000)]
    [1000, 500, 300]

    ```
    """
    return min(max(TOTAL_WEIGHTS // num_labels, MIN_FEATURES), MAX_FEATURES)


def default_solver(num_documents: int, num_labels: int, max_memory: float = 2.0) -> str:
    """
    The default solver of [`fit_lexical_scores`].

    Example:

    ```python
    >>> [default_solver(*size) for size in ((6_000, 3_000), (30_000, 80), (300_000, 20_000))]
    ['ridge', 'svm', 'shortlist']

    ```
    """
    if kernel_bytes(num_documents) <= max_memory * 2**30:
        return "ridge"
    return "svm" if num_documents * num_labels <= MAX_SVM_PAIRS else "shortlist"


def fit_lexical_scores(
    model: Any,
    train_dataset: Any,
    batches: Iterable,
    num_features: int | None = None,
    num_bigrams: int = NUM_BIGRAMS,
    solver: str | None = None,
    penalty: float = PENALTY,
    calibrate: bool = True,
    cost: float = 1.0,
    class_weights: str = "none",
    max_memory: float = 2.0,
    num_jobs: int | None = None,
    tail_weights: Sequence[float] = TAIL_WEIGHTS,
    special_ids: Sequence[int] = (),
    hide_progress: bool = False,
) -> dict:
    r"""
    Add lexical scores to a trained model, and choose their weight on validation documents.

    The linear classifiers are fitted on the tokens and the pairs of neighboring tokens of the training documents, without the
    encoder. The weights of logits z and margins m in the sum $w_z z + w_m m + c$ are chosen on held-out documents by maximum
    likelihood (see [`~trainer.lexical.stack_scores`]). Then κ times the logarithm of each label's inverse propensity w (Jain et al., 2016)
    is added, which raises rare labels; κ maximizes the mean of P@k, PSP@k (k = 1, 3, 5), nDCG@5 and micro F1 (see
    [`~trainer.lexical.choose_tail_weight`]). Expressed in units of the logit, the model adds
    $\frac{w_m}{w_z} m + \frac{\kappa}{w_z} \ln w$. If the margins get no weight, or the mean drops by more than 1 / (10 √N), the noise level
    with N documents, nothing is stored and the scores do not change. Thresholds and calibration of the previous scores are dropped.

    Args:
        model (`SepMldcForMultiLabelClassification`): gets the scores. Existing lexical scores are removed before `batches` is read.
        train_dataset (`Dataset`): tokenized documents with `label_indices`.
        batches (iterable of [`~trainer.LogitBatch`]): validation documents, as `trainer.logit_batches(dataset)` yields them;
            read once, lazily, so that the logits are those without lexical scores.
        num_features (`int`, *optional*): weights kept per label; see [`~trainer.lexical.default_num_features`] if not given.
        num_bigrams (`int`, defaults to 131,071): hash buckets for pairs of neighboring tokens; 0: tokens alone.
        solver (`str`, *optional*): `"ridge"` ([`~trainer.lexical.fit_kernel_ridge`]), `"svm"`
            ([`~trainer.lexical.fit_sparse_svms`]) or `"shortlist"` ([`~trainer.lexical.fit_shortlist_svms`]). If not given, `"ridge"`
            if its kernel matrix, 4 N² bytes, fits into `max_memory`; else `"svm"` up to 50 million documents x labels.
        penalty (`float`, defaults to 0.3): L2 penalty of the ridge regressions.
        calibrate (`bool`, defaults to `True`): whether to convert the margins of ridge regressions to log-odds, with their leave-one-out
            margins. Better for rare labels and F1, but up to 0.7 points of P@1 worse.
        cost (`float`, defaults to 1.0): C of the support vector machines.
        class_weights (`str`, defaults to `"none"`): with `"balanced"`, the rarer a label, the more an error on its documents costs (see
            [`~trainer.lexical.fit_sparse_svms`]); `"auto"` fits both and keeps the one with better validation metrics. Only for support
            vector machines, which then become the default solver.
        max_memory (`float`, defaults to 2.0): memory limit in GiB; 2 GiB allow ridge regression for up to 23,170 documents.
        num_jobs (`int`, *optional*): threads of the support vector machines; by default, the number of CPUs of this process.
        tail_weights (`Sequence[float]`): candidates for κ; needs `config.label_counts`, otherwise κ is 0.
        special_ids (`Sequence[int]`): ids of special tokens, which are ignored.
        hide_progress (`bool`, defaults to `False`): no progress bar.

    Returns:
        `dict`: the value stored in `config.lexical_info`: scale and κ, the settings, the number of documents, and the validation metrics
        without and with lexical scores.

    Raises:
        ValueError: documents are missing, streamed or unlabeled; the kernel matrix does not fit into the free memory; class weights are
            requested for ridge regression; `num_features` is below 1 or `num_bigrams` below 0; the solver is unknown; there are no
            `tail_weights`.
    """
    check_lexical_documents("train_dataset", train_dataset)
    config = model.config
    num_features = default_num_features(config.num_labels) if num_features is None else num_features
    _check_settings(num_features, num_bigrams, solver, tail_weights, class_weights)
    if solver is None:
        # Ridge regressions share one factorization of the kernel matrix, so they cannot weight documents per label.
        memory = max_memory if class_weights == "none" else 0.0
        solver = default_solver(len(train_dataset), config.num_labels, memory)
    if solver == "ridge":
        _check_kernel(len(train_dataset))
    vocab_size = config.get_text_config().vocab_size
    fitted = []
    for kind in ("none", "balanced") if class_weights == "auto" else (class_weights,):
        lexical = LexicalScores(vocab_size, config.num_labels, num_features, num_bigrams).to(model.device)
        settings: dict[str, Any] = {"cost": cost, "class_weights": kind, "num_jobs": num_jobs}
        if solver == "ridge":
            settings = {"penalty": penalty, "calibrate": calibrate}
        fit_classifiers(lexical, train_dataset, special_ids, solver, {**settings, "hide_progress": hide_progress})
        settings = {name: value for name, value in settings.items() if name != "num_jobs"}
        fitted.append((lexical, {"solver": solver, **settings, "num_documents": len(train_dataset)}))
    if len(fitted) == 1:
        return weigh_lexical_scores(model, fitted[0][0], batches, tail_weights, fitted[0][1])
    return _weigh_better_one(model, fitted, batches, tail_weights)


def _weigh_better_one(
    model: Any, fitted: list[tuple[LexicalScores, dict]], batches: Iterable, tail_weights: Sequence[float]
) -> dict:
    """Of two fitted lexical scores, add the second one to a model if it is better by more than the noise, else the first one."""
    _remove_lexical_scores(model)  # before `batches` is read
    kept, num_pairs = [], 0
    for batch in batches:
        if num_pairs < MAX_PAIRS:
            kept.append(batch)
            num_pairs += batch[0].numel()
    infos = [weigh_lexical_scores(model, lexical, kept, tail_weights, info) for lexical, info in fitted]
    first, second = (float(np.mean(list(info["with"].values()))) for info in infos)
    noise = 0.1 * infos[0]["num_validation_documents"] ** -0.5
    if second > first + noise:
        return infos[1]  # the model still has the second ones
    lexical, info = fitted[0]
    return weigh_lexical_scores(model, lexical, kept, tail_weights, info)


def _remove_lexical_scores(model: Any) -> None:
    """Remove the lexical scores of a model, and the thresholds and calibration that belong to them."""
    config = model.config
    config.drop_guarantee("lexical scores are fitted again")
    config.thresholds = config.threshold_info = config.score_calibration = None
    model.lexical, config.num_lexical_features, config.num_lexical_bigrams, config.lexical_info = None, None, 0, None


def refit_lexical_scores(
    model: Any, tuned: Any, train_dataset: Any, special_ids: Sequence[int] = (), hide_progress: bool = False
) -> dict:
    """
    Refit the classifiers of another model's lexical scores on other documents, for example on training and validation documents, and add
    them to a model. The scale and the bonus for rare labels are kept.

    Args:
        model (`SepMldcForMultiLabelClassification`): gets the scores.
        tuned (`SepMldcForMultiLabelClassification`): has lexical scores, from [`fit_lexical_scores`], and the same labels.
        train_dataset, special_ids, hide_progress: as in [`fit_lexical_scores`].

    Returns:
        `dict`: what is stored as `config.lexical_info`.
    """
    check_lexical_documents("train_dataset", train_dataset)
    config, former, info = model.config, tuned.lexical, dict(tuned.config.lexical_info or {})
    lexical = LexicalScores(
        len(former.idf) - former.num_bigrams, config.num_labels, former.feature_ids.shape[1], former.num_bigrams
    ).to(model.device)
    solver = info.get("solver", "ridge")
    settings = {name: info[name] for name in ("penalty", "cost", "class_weights") if name in info}
    # The scale that is kept is valid only for margins of this kind.
    settings |= {"calibrate": info.get("calibrate", False)} if solver == "ridge" else {"num_jobs": None}
    fit_classifiers(lexical, train_dataset, special_ids, solver, {**settings, "hide_progress": hide_progress})
    lexical.scale.copy_(former.scale)
    lexical.lift.copy_(former.lift)
    model.lexical, config.num_lexical_features = lexical, lexical.feature_ids.shape[1]
    config.num_lexical_bigrams = lexical.num_bigrams
    config.lexical_info = {**info, "num_documents": len(train_dataset)}
    return config.lexical_info


def weigh_lexical_scores(
    model: Any,
    lexical: LexicalScores,
    batches: Iterable,
    tail_weights: Sequence[float] = TAIL_WEIGHTS,
    info: dict | None = None,
) -> dict:
    """
    Choose the weight of fitted lexical scores on validation documents, and add them to a model, as described in [`fit_lexical_scores`].
    Thresholds and calibration of the model's previous scores are dropped.

    Args:
        model (`SepMldcForMultiLabelClassification`): gets the scores, if they have a weight.
        lexical (`LexicalScores`): fitted on training documents.
        batches, tail_weights: as in [`fit_lexical_scores`].
        info (`dict`, *optional*): how the scores were fitted.

    Returns:
        `dict`: what is stored as `config.lexical_info`.
    """
    config, info = model.config, info or {}
    _remove_lexical_scores(model)
    scores = ValidationScores(batches, lexical)
    of_logits, of_margins, _ = stack_scores(scores)
    # If the logits get no weight, labels are ranked by the margins alone, with values that fit into half-precision logits.
    of_logits = max(of_logits, 0.01 * of_margins)
    scale = of_margins / of_logits if of_margins > 0 else 0.0
    tail = _log_inverse_propensities(config).to(model.device) / of_logits if scale else torch.zeros(config.num_labels)
    results = {
        weight: scores.metrics(config, scale, weight * tail)
        for weight in (sorted({*tail_weights}) if tail.any() else (0.0,))
    }
    without = scores.metrics(config)
    best = choose_tail_weight({weight: found["objective"] for weight, found in results.items()}, scores.num_documents)
    noise = 0.1 * scores.num_documents**-0.5
    kept = scale > 0 and results[best]["objective"] > without["objective"] - noise
    shown = [name for name in without if name.split("@")[0] in ("p", "ndcg", "psp", "f1_micro")]
    info = {
        "scale": scale if kept else 0.0,
        "tail_weight": best if kept else 0.0,
        **info,
        "num_validation_documents": scores.num_documents,
        "without": {name: without[name] for name in shown},
        "with": {name: (results[best] if kept else without)[name] for name in shown},
    }
    if kept:
        lexical.scale.fill_(scale)
        lexical.lift.copy_(best * tail)
        model.lexical, config.num_lexical_features = lexical, lexical.feature_ids.shape[1]
        config.num_lexical_bigrams = lexical.num_bigrams
        config.lexical_info = info
    logger.info(
        f"Weight of the lexical scores chosen on {scores.num_documents} documents: scale {info['scale']:.2f}, weight of the tail "
        f"{info['tail_weight']}: mean of the validation metrics {without['objective']:.4f} -> {results[best]['objective']:.4f}."
    )
    return info


def check_lexical_documents(name: str, dataset: Any) -> None:
    """
    Raises:
        ValueError: the dataset `name` is missing, a stream or empty, or lacks `input_ids` or `label_indices`.
    """
    columns = getattr(dataset, "column_names", None) or []
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError(
            f"`{name}` is {dataset!r}, but lexical scores are fitted on training documents and weighted on validation "
            "documents that fit in memory. Pass a dataset of tokenized documents."
        )
    if not {"input_ids", "label_indices"} <= set(columns):
        raise ValueError(
            f"`{name}` has the columns {', '.join(columns)}, but `input_ids` and `label_indices` are needed. Tokenize "
            "the documents and encode their labels."
        )


def _check_settings(
    num_features: int, num_bigrams: int, solver: str | None, tail_weights: Sequence[float], class_weights: str
) -> None:
    if class_weights not in CLASS_WEIGHTS:
        raise ValueError(
            f"`class_weights` is {class_weights!r}, but it must be 'none', 'balanced' or 'auto'. Use 'none'."
        )
    if class_weights != "none" and solver == "ridge":
        raise ValueError(
            f"`class_weights` is {class_weights!r}, but ridge regressions share one factor of the kernel and cannot weight documents by "
            'label. Use `solver="svm"`, or remove one of the two.'
        )
    if num_features < 1:
        raise ValueError(f"`num_features` is {num_features}, but each label needs at least one weight. Use 300.")
    if num_bigrams < 0:
        raise ValueError(
            f"`num_bigrams` is {num_bigrams}, but it must be 0 or more. Use {NUM_BIGRAMS}, or 0 for none."
        )
    if solver not in (None, *SOLVERS):
        raise ValueError(f"`solver` is {solver!r}, but it must be 'ridge', 'svm', 'shortlist' or None. Leave it out.")
    if not len(tail_weights):
        raise ValueError("`tail_weights` is empty, but one is needed. Pass (0.0,) for no bonus for rare labels.")


def _check_kernel(num_documents: int) -> None:
    needed, free = kernel_bytes(num_documents), available_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"The kernel of {num_documents:,} documents needs {gib(needed)} of memory, but {gib(free)} are free. Free some memory, fit on "
            'fewer documents, or use `solver="svm"`.'
        )


def _log_inverse_propensities(config: Any) -> torch.Tensor:
    """ln w (L,); zeros if label frequencies are unknown."""
    if config.label_counts is None or not config.num_train_documents:
        return torch.zeros(config.num_labels)
    weights = inverse_propensities(np.asarray(config.label_counts), config.num_train_documents)
    return torch.as_tensor(np.log(weights), dtype=torch.float32)


def fit_classifiers(
    lexical: LexicalScores, dataset: Any, special_ids: Sequence[int], solver: str, settings: dict
) -> None:
    """Fit the classifiers on the first process and copy them to the others."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        vocab_size = len(lexical.idf) - lexical.num_bigrams
        features, idf = token_tf_idf(
            dataset["input_ids"], vocab_size, [i for i in special_ids if i < vocab_size], lexical.num_bigrams
        )
        if settings.get("num_jobs", 0) is None:
            settings = {**settings, "num_jobs": max(torch.get_num_threads(), 1)}
        fit: Any = {"ridge": fit_kernel_ridge, "svm": fit_sparse_svms, "shortlist": fit_shortlist_svms}[solver]
        fitted = fit(features, dataset["label_indices"], *lexical.feature_ids.shape, **settings)
        for name, values in zip(("idf", "feature_ids", "feature_weights", "bias"), (idf, *fitted)):
            getattr(lexical, name).copy_(torch.from_numpy(values))
    if distributed:
        for buffer in lexical.buffers():
            torch.distributed.broadcast(buffer, src=0)
