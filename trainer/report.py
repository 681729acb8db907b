"""The report at the end of a run: comparison with simple baselines, the worst labels with likely reasons, and next steps."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from .files import atomic_write, write_csv
from .metrics.ranking import ratio


RESAMPLES = 200
# Number of training documents above which labels are learned reasonably well.
FEW_DOCUMENTS = 10
# CPU seconds of the linear baseline per word of the training documents and per label, measured on arxiv_mlc and debtags.
SVM_SECONDS = 2.5e-8


class Predictions(NamedTuple):
    """
    Attributes:
        indices (`np.ndarray` of shape `(num_documents, k)`): label ids, best first.
        assigned (`np.ndarray` of shape `(num_documents, k)`): whether the label is assigned.
    """

    indices: np.ndarray
    assigned: np.ndarray


class DocumentResults:
    """
    The contributions of each document to the metrics, from which metrics of any resample of the documents can be computed.

    Args:
        predictions ([`Predictions`]): predictions of one system.
        gold (sequence of `Sequence[int]`): label ids of each document.
        num_labels (`int`): L.
        ks (`Sequence[int]`): the k of the ranking metrics; those above the number of predicted labels are left out.
    """

    def __init__(
        self, predictions: Predictions, gold: Sequence[Sequence[int]], num_labels: int, ks: Sequence[int] = (1, 3, 5)
    ):
        indices, assigned = np.asarray(predictions.indices), np.asarray(predictions.assigned, dtype=bool)
        self.num_documents, width = indices.shape
        self.gold = _matrix(
            np.repeat(np.arange(len(gold)), [len(ids) for ids in gold]), _flat(gold), num_labels, len(gold)
        )
        rows = np.repeat(np.arange(len(indices)), width).reshape(indices.shape)
        self.assigned = _matrix(rows[assigned], indices[assigned], num_labels, len(indices))
        self.correct = self.gold.multiply(self.assigned).tocsr()
        hits = np.asarray(self.gold[rows.ravel(), indices.ravel()]).reshape(indices.shape) > 0
        discounts = 1 / np.log2(np.arange(width) + 2)
        sizes = np.asarray(self.gold.sum(axis=1)).ravel().astype(int)
        self.per_document: dict[str, np.ndarray] = {}
        for k in [k for k in ks if k <= width]:
            self.per_document[f"p@{k}"] = hits[:, :k].mean(axis=1)
            ideal = np.concatenate([[1.0], np.cumsum(discounts[:k])])[np.minimum(sizes, k)]
            self.per_document[f"ndcg@{k}"] = (hits[:, :k] * discounts[:k]).sum(axis=1) / ideal

    def measure(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """
        Metrics with each document counted `weights` (num_documents,) times: `p@k`, `ndcg@k`, `f1_micro` and `f1_macro`, in [0, 1].
        """
        weights = np.ones(self.num_documents) if weights is None else np.asarray(weights, dtype=float)
        result = {name: float(weights @ values / weights.sum()) for name, values in self.per_document.items()}
        correct, assigned, gold = (matrix.T @ weights for matrix in (self.correct, self.assigned, self.gold))
        result["f1_micro"] = float(ratio(2 * correct.sum(), assigned.sum() + gold.sum()))
        result["f1_macro"] = float(ratio(2 * correct, assigned + gold).mean())
        return result


def _flat(lists: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(ids, dtype=int) for ids in lists]) if len(lists) else np.zeros(0, dtype=int)


def _matrix(rows: np.ndarray, columns: np.ndarray, num_labels: int, num_documents: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(num_documents, num_labels))


def bootstrap(results: Mapping[str, DocumentResults], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """
    95% bootstrap intervals of the metrics of each system, and of the difference between the first system and each other one on the same
    resamples (paired bootstrap).

    Args:
        results (`dict[str, DocumentResults]`): by the name of the system, over the same documents.
        resamples (`int`, defaults to 200): number of bootstrap samples of the documents.
        seed (`int`, defaults to 0): random seed of the samples.

    Returns:
        `dict`: `"intervals"` and `"differences"`, by system and metric: `(low, high)`.
    """
    generator = np.random.default_rng(seed)
    first, *others = results
    size = results[first].num_documents
    drawn: dict[str, list[dict[str, float]]] = {name: [] for name in results}
    for _ in range(resamples):
        weights = generator.multinomial(size, np.full(size, 1 / size))
        for name, result in results.items():
            drawn[name].append(result.measure(weights))
    values = {
        name: {metric: np.array([row[metric] for row in rows]) for metric in rows[0]} for name, rows in drawn.items()
    }
    return {
        "intervals": {name: {m: _interval(v) for m, v in metrics.items()} for name, metrics in values.items()},
        "differences": {
            name: {m: _interval(values[first][m] - v) for m, v in values[name].items() if m in values[first]}
            for name in others
        },
    }


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def comparison_lines(compared: Mapping[str, Any], metric: str = "ndcg@5") -> list[str]:
    """
    One sentence for each other system, saying whether the first one is ahead of it.

    Args:
        compared (`dict`): what [`bootstrap`] returned.
        metric (`str`, defaults to `"ndcg@5"`): metric to compare.
    """
    lines = []
    for name, metrics in compared["differences"].items():
        if metric not in metrics:
            continue
        low, high = (100 * value for value in metrics[metric])
        verdict = "ahead of" if low > 0 else "behind" if high < 0 else "on par with"
        lines.append(
            f"{verdict} {name} on {metric}: difference {low:+.2f} to {high:+.2f} points (95% confidence interval)"
        )
    return lines


# ---- Labels ----


class WorstLabel(NamedTuple):
    """
    Attributes:
        label (`str`), train_count, support, predicted (`int`), precision, recall, f1 (`float`): counts and metrics.
        why (`str`): the likely reason.
        confused_with (`str`): the label that is assigned most often where this one is missed; empty if there is none.
    """

    label: str
    train_count: int | None
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float
    why: str
    confused_with: str


def worst_labels(
    results: DocumentResults, labels: Sequence[str], label_counts: Sequence[int] | None = None
) -> list[WorstLabel]:
    """
    Labels with errors, worst F1 first; ties are ordered by descending number of documents.

    Args:
        results ([`DocumentResults`]): of the model.
        labels (`list[str]` of length `num_labels`): names.
        label_counts (`Sequence[int]`, *optional*): training documents of each label.
    """
    correct, predicted, support = (
        np.asarray(matrix.sum(axis=0)).ravel().astype(int)
        for matrix in (results.correct, results.assigned, results.gold)
    )
    missed, wrong = (results.gold - results.correct).tocsr(), (results.assigned - results.correct).tocsr()
    confused = (missed.T @ wrong).tocsr()  # documents that miss label i and are given label j
    rows = []
    for i in np.flatnonzero((support > 0) & (correct < np.maximum(support, predicted))).tolist():
        other, times = _most_frequent(confused[i])
        name = labels[other] if times >= max(2, 0.3 * (support[i] - correct[i])) else ""
        count = None if label_counts is None else int(label_counts[i])
        precision = float(ratio(correct[i], predicted[i]))
        recall = float(ratio(correct[i], support[i]))
        f1 = float(ratio(2 * correct[i], predicted[i] + support[i]))
        reasons = []
        if count is not None and count < FEW_DOCUMENTS:
            reasons.append(f"only {count} training document{'s' * (count != 1)}")
        if predicted[i] == 0:
            reasons.append("never assigned")
        elif correct[i] == 0:
            reasons.append(f"never assigned correctly ({predicted[i]} false positives)")
        elif precision < recall / 2:
            reasons.append(f"assigned too often ({predicted[i]} times, {correct[i]} correct)")
        elif recall < precision / 2:
            reasons.append(f"missed in {support[i] - correct[i]} of {support[i]} documents")
        if name:
            reasons.append(f"often confused with {name!r}")
        rows.append(
            WorstLabel(
                labels[i], count, int(support[i]), int(predicted[i]), precision, recall, f1,
                "; ".join(reasons) or "false positives and false negatives", name,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.f1, -row.support))


def _most_frequent(row: sparse.csr_matrix) -> tuple[int, int]:
    if not row.nnz:
        return 0, 0
    best = int(row.data.argmax())
    return int(row.indices[best]), int(row.data[best])


def write_worst_labels(folder: str | os.PathLike, worst: Sequence[WorstLabel], num_drawn: int = 20) -> None:
    """Write `worst_labels.csv` and, with matplotlib (extra `plot`), the plot `worst_labels.png` of the worst ones."""
    rows = [[round(value, 4) if isinstance(value, float) else value for value in row] for row in worst]
    write_csv(Path(folder) / "worst_labels.csv", WorstLabel._fields, rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = list(worst[:num_drawn])[::-1]
    if not shown:
        return
    figure = Figure(figsize=(8, 0.35 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    # "$" would start a formula.
    names = [f"{row.label[:40]} ({row.support})".replace("$", r"\$") for row in shown]
    axes.barh(range(len(shown)), [100 * row.recall for row in shown], 0.4, align="edge", label="recall")
    axes.barh(range(len(shown)), [100 * row.precision for row in shown], -0.4, align="edge", label="precision")
    axes.set_yticks(range(len(shown)), names, fontsize="small")
    axes.set(xlim=(0, 100), xlabel="%", title="Labels with the lowest F1 (number of documents)")
    axes.legend(fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    with atomic_write(Path(folder) / "worst_labels.png", "wb") as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})


def abstention_lines(share_abstained: float, num_documents: int, kept: Sequence[Mapping[str, float]]) -> list[str]:
    """
    Number of documents on which the model abstains, and F1 of the rest if more documents are sent to human review.

    Args:
        share_abstained (`float`): share of the documents none of whose labels reaches its threshold.
        num_documents (`int`): number of documents.
        kept (`list[dict]`): the result of `StreamingMetrics.f1_of_kept`.
    """
    count = round(share_abstained * num_documents)
    return [
        f"The model abstains on {count:,} of {num_documents:,} documents: none of their labels reaches its threshold."
        if count
        else "The model does not abstain on any document: each has a label that reaches its threshold.",
        "Micro F1 if documents with a low expected F1 are sent to human review (`predict.py --min_expected_f1`):",
        "  documents kept   " + "".join(f"{row['share_kept']:>7.0%}" for row in kept),
        "  micro F1         " + "".join(f"{100 * row['f1_micro']:>7.1f}" for row in kept),
        "  min_expected_f1  " + "".join(f"{row['min_expected_f1']:>7.3f}" for row in kept),
    ]


def worst_label_lines(worst: Sequence[WorstLabel], count: int = 5) -> list[str]:
    """The first labels of [`worst_labels`] as lines of text."""
    return [
        f"{row.label}: F1 {100 * row.f1:.0f}, {row.support:,} document{'s' * (row.support != 1)}; {row.why}"
        for row in worst[:count]
    ]


# ---- Next steps ----


def next_steps(
    *,
    label_counts: Sequence[int] | None = None,
    num_steps: int | None = None,
    share_cut: float = 0.0,
    has_validation: bool = True,
    has_descriptions: bool = True,
    has_lexical_scores: bool = True,
    behind_linear: bool = False,
    has_errors: bool = True,
    train_file: str = "train.jsonl",
    count: int = 3,
) -> list[str]:
    """
    Suggestions for improving the model, the most important first.

    Args:
        label_counts (`Sequence[int]`, *optional*): training documents of each label.
        num_steps (`int`, *optional*): number of training steps.
        share_cut (`float`): share of the training documents that exceed the encoder's maximum length.
        has_validation, has_descriptions, has_lexical_scores (`bool`): whether the run had these.
        behind_linear (`bool`): whether the linear baseline is ahead.
        has_errors (`bool`): whether worst_labels.csv lists any label.
        train_file (`str`): file name for suggested commands.
        count (`int`, defaults to 3): maximum number of suggestions.
    """
    lines = []
    if not has_validation:
        lines.append(
            "No thresholds were tuned, because there are no validation documents: specify some with `--validation_file`."
        )
    if behind_linear:
        remedy = "train longer or read more tokens" if has_lexical_scores else "add `--lexical_scores`"
        lines.append(f"The linear model is ahead: {remedy}, and check that the texts are read correctly.")
    if num_steps is not None and num_steps < 200:
        lines.append(f"Training ran for only {num_steps} steps: increase `--num_train_epochs` or `--max_steps`.")
    if share_cut > 0.2:
        lines.append(
            f"{share_cut:.0%} of the documents are longer than the encoder's limit: increase `--max_length` or `--encoder_max_length`."
        )
    rare = 0 if label_counts is None else int((np.asarray(label_counts) < FEW_DOCUMENTS).sum())
    if rare:
        lines.append(
            f"Labels with fewer than {FEW_DOCUMENTS} training documents: {rare:,}. Add documents, or generate pseudo-documents with "
            f"`sep-mldc-augment write-pseudo-documents {train_file}`."
        )
    if not has_descriptions:
        lines.append(
            f"No label has a description: write descriptions, or run `sep-mldc-augment describe-labels {train_file}`, and pass them with "
            "`--label_descriptions_file`."
        )
    if has_errors:
        lines.append(
            "Review worst_labels.csv: labels that are confused with each other may need clearer annotation guidelines."
        )
    return lines[:count]


def linear_baseline_seconds(num_words: int, num_labels: int) -> float:
    """A rough estimate of the training time of the linear baseline, in seconds, from the number of words of the training documents."""
    return SVM_SECONDS * num_words * num_labels
