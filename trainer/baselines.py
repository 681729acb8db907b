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
from tqdm.auto import tqdm

from .metrics.streaming import StreamingMetrics


BATCH_SIZE = 256


def majority_baseline(
    train_labels: Sequence[Sequence[int]], test_labels: Sequence[Sequence[int]], metrics: StreamingMetrics
) -> dict[str, float]:
    """
    Baseline that ranks the labels of every document by training frequency. A label is predicted if half of the training documents have it.

    Args:
        train_labels, test_labels (`Sequence[Sequence[int]]`): label ids of each document.
        metrics ([`StreamingMetrics`]): an empty accumulator over probabilities or logits.
    """
    counts = np.bincount(
        np.concatenate([np.asarray(ids, dtype=int) for ids in train_labels]), minlength=metrics.num_labels
    )
    share = np.clip(counts / max(len(train_labels), 1), 1e-6, 1 - 1e-6)
    scores = torch.from_numpy(np.log(share / (1 - share)))
    for start in range(0, len(test_labels), BATCH_SIZE):
        batch = test_labels[start : start + BATCH_SIZE]
        metrics.update(scores.expand(len(batch), -1), label_indices=batch)
    return metrics.compute()


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


def linear_svm_baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[Sequence[int]],
    test_texts: Sequence[str],
    test_labels: Sequence[Sequence[int]],
    metrics: StreamingMetrics,
) -> dict[str, float]:
    """
    Metrics of [`fit_linear_svm`] on test documents; a label is predicted if its margin is positive.

    Args:
        train_texts, test_texts (`Sequence[str]`): documents.
        train_labels, test_labels (`Sequence[Sequence[int]]`): label ids of each document.
        metrics ([`StreamingMetrics`]): an empty accumulator with threshold 0.5, which is a margin of 0.
    """
    score = fit_linear_svm(train_texts, train_labels, metrics.num_labels)
    for start in tqdm(range(0, len(test_texts), BATCH_SIZE), desc="Linear SVM", leave=False):
        metrics.update(
            score(test_texts[start : start + BATCH_SIZE]), label_indices=test_labels[start : start + BATCH_SIZE]
        )
    return metrics.compute()


def rows_of_table(systems: dict[str, dict[str, float]], names: list[str]) -> Iterator[str]:
    """Lines of a plain-text table in percent, with one row per system and one column per metric."""
    width = max(len(system) for system in systems)
    yield " " * width + "".join(f"{name:>10}" for name in names)
    for system, metrics in systems.items():
        values = (f"{100 * metrics[name]:.2f}" if name in metrics else "-" for name in names)
        yield f"{system:<{width}}" + "".join(f"{value:>10}" for value in values)
