"""Baselines that a trained model should beat: the most frequent labels, and linear SVMs on TF-IDF features."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer
from sklearn.svm import LinearSVC

from .metrics.streaming import StreamingMetrics
from .report import Predictions


BATCH_SIZE = 256


def fit_majority(labels: Sequence[Sequence[int]], num_labels: int) -> Callable[[Sequence[str]], torch.Tensor]:
    """
    Baseline that ranks the labels of every document by training frequency. A label is predicted if half of the training documents have it.

    Args:
        labels (`Sequence[Sequence[int]]` of length `N`): label ids of each training document.
        num_labels (`int`): L.

    Returns:
        A function from `n` texts to log-odds, `(n, L)`, the same for each text.
    """
    counts = np.bincount(np.concatenate([np.asarray(ids, dtype=int) for ids in labels]), minlength=num_labels)
    share = np.clip(counts / max(len(labels), 1), 1e-6, 1 - 1e-6)
    scores = torch.from_numpy(np.log(share / (1 - share)))
    return lambda texts: scores.expand(len(texts), -1)


def fit_linear_svm(
    texts: Sequence[str], labels: Sequence[Sequence[int]], num_labels: int, num_jobs: int | None = None
) -> Callable[[Sequence[str]], torch.Tensor]:
    """
    One linear SVM per label (`sklearn.svm.LinearSVC`, C = 1) on TF-IDF features of words.

    Args:
        texts (`Sequence[str]` of length `N`): training documents.
        labels (`Sequence[Sequence[int]]` of length `N`): label ids of each document.
        num_labels (`int`): L.
        num_jobs (`int`, *optional*): number of processes; 1 if not given.

    Returns:
        A function from `n` texts to their margins, `(n, L)`. Labels without a training document rank last.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, strip_accents="unicode")
    try:
        features = vectorizer.fit_transform(texts)
    except ValueError:  # no word has two letters
        vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+")
        features = vectorizer.fit_transform(texts)
    binarizer = MultiLabelBinarizer(classes=range(num_labels), sparse_output=True)
    targets = sparse.csc_matrix(binarizer.fit_transform(labels))
    learned = np.flatnonzero(np.asarray(targets.sum(axis=0)).ravel())
    # scikit-learn would interpret a single column as class numbers, so a single label is duplicated.
    columns: np.ndarray = np.resize(learned, max(2, len(learned)))
    with warnings.catch_warnings():
        # The report on the data names them.
        warnings.filterwarnings("ignore", "Label .* present in all training examples")
        classifier = OneVsRestClassifier(LinearSVC(), n_jobs=num_jobs).fit(features, targets[:, columns])

    def score(texts: Sequence[str]) -> torch.Tensor:
        margins = classifier.decision_function(vectorizer.transform(texts))
        scores = np.full((len(texts), num_labels), -1e3)
        scores[:, learned] = margins[:, : len(learned)]
        return torch.from_numpy(scores)

    return score


def measure_baselines(
    train_texts: Sequence[str],
    train_labels: Sequence[Sequence[int]],
    texts: Sequence[str],
    labels: Sequence[Sequence[int]],
    new_metrics: Callable[[], StreamingMetrics],
    top_k: int,
) -> dict[str, tuple[dict[str, float], Predictions]]:
    """
    Metrics and predictions of a linear model and of the majority labels. A label is assigned if its margin is not negative.

    Args:
        train_texts, texts (`Sequence[str]`): documents to learn from, and to measure on.
        train_labels, labels (`Sequence[Sequence[int]]`): label ids of each document.
        new_metrics (callable): returns an empty [`~trainer.metrics.StreamingMetrics`] with threshold 0.5, which is a margin of 0.
        top_k (`int`): number of best labels of a prediction.

    Returns:
        `dict[str, tuple]`: metrics and [`~trainer.report.Predictions`] by the name of the baseline.
    """
    num_labels = new_metrics().num_labels
    scorers = {
        "TF-IDF + LinearSVC": fit_linear_svm(train_texts, train_labels, num_labels),
        "majority labels": fit_majority(train_labels, num_labels),
    }
    results = {}
    for name, score in scorers.items():
        metrics, best = new_metrics(), []
        for start in range(0, len(texts), BATCH_SIZE):
            margins = score(texts[start : start + BATCH_SIZE])
            metrics.update(margins, label_indices=labels[start : start + BATCH_SIZE])
            best.append(margins.topk(top_k, dim=-1))
        indices = torch.cat([top.indices for top in best]).numpy()
        assigned = torch.cat([top.values for top in best]).numpy() >= 0
        results[name] = (metrics.compute(), Predictions(indices, assigned))
    return results


def rows_of_table(systems: dict[str, dict[str, float]], names: list[str]) -> Iterator[str]:
    """Lines of a plain-text table in percent, with one row per system and one column per metric."""
    rows = [["", *names]]
    for system, metrics in systems.items():
        rows.append([system, *(f"{100 * metrics[name]:.2f}" if name in metrics else "-" for name in names)])
    first, *others = (max(map(len, column)) for column in zip(*rows))
    for name, *values in rows:
        yield f"{name:<{first}}" + "".join(f"{value:>{max(width + 2, 10)}}" for value, width in zip(values, others))
