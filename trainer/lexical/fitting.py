"""Fits the lexical scores of a trained model: one linear SVM a label on the tokens of the training documents."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.svm import LinearSVC
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_sep_mldc.lexical_sep_mldc import UNSEEN_MARGIN, LexicalScores

from ..metrics.ranking import inverse_propensities
from ..metrics.streaming import StreamingMetrics


logger = logging.get_logger(__name__)

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
TAIL_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


class BalancedObjective:
    """
    What the weight of lexical scores is chosen by: the mean of P@1, P@3, P@5, nDCG@5, micro F1 at its best single
    threshold and, where label frequencies are known, PSP@1, PSP@3, PSP@5; of smaller label sets the k up to their size.

    Args:
        config (`SepMldcConfig`): number of labels, and their support.
    """

    # Scores to the precision of a bin, of each document the highest only: no threshold of use predicts more labels.
    RANGE, BINS, TOP = (-80.0, 80.0), 6400, 100

    def __init__(self, config):
        self.ks = tuple(k for k in (1, 3, 5) if k <= config.num_labels)
        self.ranking = StreamingMetrics(
            config.num_labels,
            ks=self.ks,
            thresholds=None,
            label_counts=config.label_counts,
            num_documents=config.num_train_documents,
        )
        # Of all scores, and of those of positives; they stay on the device of the scores until the end.
        self.counts = torch.zeros(2, self.BINS, dtype=torch.int64)
        self.num_positives = torch.zeros((), dtype=torch.int64)

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits and multi-hot labels, (B, L) both."""
        self.ranking.update(scores, labels)
        top = scores.topk(min(self.TOP, scores.shape[1]), dim=1)
        values = top.values.float().clamp(*self.RANGE)
        kept = labels.gather(1, top.indices) > 0
        counts = [torch.histc(chosen, self.BINS, *self.RANGE) for chosen in (values.flatten(), values[kept])]
        self.counts = self.counts.to(scores.device) + torch.stack(counts).long()
        self.num_positives = self.num_positives.to(scores.device) + labels.sum().long()

    def compute(self) -> dict[str, float]:
        """The metrics, and their mean as `"objective"`."""
        predicted, correct = self.counts.cpu().flip(1).cumsum(1).numpy()
        metrics = self.ranking.compute()
        metrics["f1_micro"] = float((2 * correct / np.maximum(predicted + self.num_positives.item(), 1)).max())
        deepest = max(self.ks)
        names = [f"{name}@{k}" for name in ("p", "psp") for k in self.ks] + [f"ndcg@{deepest}", "f1_micro"]
        metrics["objective"] = float(np.mean([metrics[name] for name in names if name in metrics]))
        return metrics


def token_tf_idf(documents, vocab_size: int, special_ids: list[int]) -> tuple[sparse.csr_matrix, np.ndarray]:
    """
    The sparse (N, V) matrix of what [`~modeling_sep_mldc.lexical_sep_mldc.term_weights`] gives for a batch, and the idf (V,).

    That is scikit-learn's TF-IDF of the token ids with 1 + ln of the counts; special tokens are left out, and the idf of a
    token of no document is 0.

    Args:
        documents (iterable of `N` lists): token ids.
        vocab_size (`int`): V.
        special_ids (`list[int]`): tokens that say nothing about a document.
    """
    rows = [np.asarray(ids, dtype=np.int32) for ids in documents]
    offsets = np.cumsum([0] + [len(row) for row in rows])
    tokens = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    present = np.isin(tokens, special_ids, invert=True).astype(np.float64)
    counts = sparse.csr_matrix((present, tokens, offsets), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    counts.eliminate_zeros()
    transformer = TfidfTransformer(sublinear_tf=True)
    matrix = transformer.fit_transform(counts).astype(np.float32)
    seen = np.bincount(counts.indices, minlength=vocab_size) > 0
    return matrix, np.where(seen, transformer.idf_, 0.0).astype(np.float32)


def fit_sparse_svms(
    features: sparse.csr_matrix,
    label_indices,
    num_labels: int,
    num_features: int,
    cost: float = 1.0,
    num_jobs: int | None = None,
    hide_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    One linear SVM (squared hinge, scikit-learn's LinearSVC) a label; of each, the `num_features` weights largest in size.

    Args:
        features (`scipy.sparse.csr_matrix` of shape `(N, V)`): documents.
        label_indices (`Sequence[Sequence[int]]` of length `N`): label ids of each.
        num_labels (`int`), num_features (`int`): L, F.
        cost (`float`, defaults to 1.0): C.
        num_jobs (`int`, *optional*): threads; one if not given.

    Returns:
        token ids (L, F), weights (L, F) and biases (L,); a label without documents has weights of 0.
    """
    # Only the columns that occur: liblinear's time and memory for dense weights goes with them.
    used = np.flatnonzero(np.diff(features.tocsc().indptr))
    compact = features[:, used].astype(np.float64)
    members: list[list[int]] = [[] for _ in range(num_labels)]
    for row, ids in enumerate(label_indices):
        for index in ids:
            members[index].append(row)
    size = min(num_features, max(len(used), 1))
    token_ids = np.zeros((num_labels, num_features), dtype=np.int32)
    weights = np.zeros((num_labels, num_features), dtype=np.float32)
    biases = np.full(num_labels, UNSEEN_MARGIN, dtype=np.float32)

    def fit(index: int) -> None:
        rows = members[index]
        if not rows or not len(used):
            return
        if len(set(rows)) == compact.shape[0]:
            biases[index] = -UNSEEN_MARGIN  # every document has it: nothing to tell apart
            return
        target = np.zeros(compact.shape[0], dtype=np.int8)
        target[rows] = 1
        svm = LinearSVC(C=cost).fit(compact, target)
        kept = np.argpartition(-np.abs(svm.coef_[0]), size - 1)[:size]
        token_ids[index, :size], weights[index, :size] = used[kept], svm.coef_[0][kept]
        biases[index] = svm.intercept_[0]

    bar = tqdm(range(num_labels), desc="Lexical scores", disable=hide_progress, leave=False)
    # Threads: liblinear releases the interpreter, and each label writes rows of its own.
    Parallel(n_jobs=num_jobs or 1, prefer="threads")(delayed(fit)(index) for index in bar)
    return token_ids, weights, biases


def fit_lexical_scores(
    model,
    train_dataset,
    batches: Iterable,
    num_features: int = 300,
    cost: float = 1.0,
    num_jobs: int | None = None,
    scales: Sequence[float] = SCALES,
    tail_weights: Sequence[float] = TAIL_WEIGHTS,
    special_ids: Sequence[int] = (),
    hide_progress: bool = False,
) -> dict:
    r"""
    Give a trained model lexical scores, and choose their weight on validation documents.

    The linear classifiers are fitted on the tokens of the training documents, without the encoder. Two numbers are chosen on
    documents that were not trained on: the scale s of the margins, and the weight κ of the logarithm of each label's inverse
    propensity w (Jain et al., 2016), which lifts rare labels. s · margin + κ · ln w is added to each logit; the pair with the
    best mean of P@k, PSP@k (k = 1, 3, 5), nDCG@5 and micro F1 wins. With a scale of 0 the model keeps its scores, and nothing
    is stored. Thresholds and calibration of the former scores are dropped.

    Args:
        model (`SepMldcForMultiLabelClassification`): gets the scores. Its former ones are removed before `batches` is read.
        train_dataset (`Dataset`): tokenized documents with `label_indices`.
        batches (iterable of [`~trainer.LogitBatch`]): validation documents, as `trainer.logit_batches(dataset)` yields them;
            read once, lazily, so that the logits are those without lexical scores.
        num_features (`int`, defaults to 300): weights kept per label.
        cost (`float`, defaults to 1.0): C of the support vector machines.
        num_jobs (`int`, *optional*): threads; the number of CPUs of this process if not given.
        scales (`Sequence[float]`): s to choose from; 0 is always among them.
        tail_weights (`Sequence[float]`): κ to choose from; needs `config.label_counts`, 0 without it.
        special_ids (`Sequence[int]`): ids of special tokens, which are ignored.
        hide_progress (`bool`, defaults to `False`): no progress bar.

    Returns:
        `dict`: what is stored as `config.lexical_info`: s and κ, the settings, the number of documents and the validation
        metrics without and with the lexical scores.

    Raises:
        ValueError: documents are missing, are a stream, or carry no labels; `num_features` below 1.
    """
    check_lexical_documents("train_dataset", train_dataset)
    if num_features < 1:
        raise ValueError(f"`num_features` is {num_features}, but each label needs a weight at least. Use 300.")
    config = model.config
    lexical = LexicalScores(config.get_text_config().vocab_size, config.num_labels, num_features).to(model.device)
    _fit_on_first_process(lexical, train_dataset, special_ids, cost, num_jobs, hide_progress)

    config.thresholds = config.threshold_info = config.score_calibration = None
    model.lexical, config.num_lexical_features, config.lexical_info = None, None, None
    tail = torch.zeros(config.num_labels)
    if config.label_counts is not None and config.num_train_documents:
        weights = inverse_propensities(np.asarray(config.label_counts), config.num_train_documents)
        tail = torch.as_tensor(np.log(weights), dtype=torch.float32)
    tail = tail.to(model.device)
    pairs = [(0.0, 0.0)] + [
        (scale, weight)
        for scale in sorted({*scales} - {0.0})
        for weight in (sorted({*tail_weights}) if tail.any() else (0.0,))
    ]
    results, num_validation = _metrics_at(pairs, config, lexical, tail, batches)
    best = max(pairs, key=lambda pair: results[pair]["objective"])  # the first of equal ones: the smaller scale
    shown = [name for name in results[best] if name.split("@")[0] in ("p", "ndcg", "psp", "f1_micro")]
    info = {
        "scale": best[0],
        "tail_weight": best[1],
        "cost": cost,
        "num_documents": len(train_dataset),
        "num_validation_documents": num_validation,
        "without": {name: results[0.0, 0.0][name] for name in shown},
        "with": {name: results[best][name] for name in shown},
    }
    if best[0] > 0:
        lexical.scale.fill_(best[0])
        lexical.lift.copy_(best[1] * tail)
        model.lexical, config.num_lexical_features, config.lexical_info = lexical, num_features, info
    logger.info(
        f"Lexical scores fitted on {len(train_dataset)} documents, scale {best[0]}, weight of the tail {best[1]}: mean of the "
        f"validation metrics {results[0.0, 0.0]['objective']:.4f} -> {results[best]['objective']:.4f}."
    )
    return info


def check_lexical_documents(name: str, dataset) -> None:
    """
    Raises:
        ValueError: the data set `name` is missing, a stream or empty, or lacks `input_ids` or `label_indices`.
    """
    columns = getattr(dataset, "column_names", None) or []
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError(
            f"`{name}` is {dataset!r}, but lexical scores are fitted on training documents and weighed on validation "
            "documents that fit in memory. Pass a data set of tokenised documents."
        )
    if not {"input_ids", "label_indices"} <= set(columns):
        raise ValueError(
            f"`{name}` has the columns {', '.join(columns)}, but `input_ids` and `label_indices` are needed. Tokenise "
            "the documents and encode their labels."
        )


def _fit_on_first_process(lexical: LexicalScores, dataset, special_ids, cost, num_jobs, hide_progress: bool) -> None:
    """Fit the classifiers on the first process and copy them to the others."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        vocab_size = len(lexical.idf)
        features, idf = token_tf_idf(dataset["input_ids"], vocab_size, [i for i in special_ids if i < vocab_size])
        fitted = fit_sparse_svms(
            features,
            dataset["label_indices"],
            *lexical.feature_ids.shape,
            cost,
            num_jobs or max(torch.get_num_threads(), 1),
            hide_progress,
        )
        for name, values in zip(("idf", "feature_ids", "feature_weights", "bias"), (idf, *fitted)):
            getattr(lexical, name).copy_(torch.from_numpy(values))
    if distributed:
        for buffer in lexical.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _metrics_at(pairs, config, lexical: LexicalScores, tail: torch.Tensor, batches) -> tuple[dict[tuple, dict], int]:
    """Metrics of the validation documents at each (scale, weight of the tail), and the number of documents."""
    metrics = {pair: BalancedObjective(config) for pair in pairs}
    num_documents = 0
    for logits, labels, inputs in batches:
        margins = lexical.margins(inputs["input_ids"], inputs.get("attention_mask"))
        num_documents += len(logits)
        for (scale, weight), accumulator in metrics.items():
            accumulator.update(logits + scale * margins + weight * tail, labels)
    return {pair: accumulator.compute() for pair, accumulator in metrics.items()}, num_documents
