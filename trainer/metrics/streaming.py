"""
Ranking and classification metrics of multi-label predictions, accumulated batch by batch.

Only top-k hits, counts and (optionally) per-label score histograms are kept: memory depends on the number of labels, not on
the number of documents. The conventions are those of AttentionXML and pyxclib:

- a document without labels counts as 0 in the means of precision, recall and nDCG;
- ties are ranked by label index, lower first;
- nDCG's ideal ranking holds min(k, |y|) labels;
- PSP@k and PSnDCG@k are ratios of sums over all documents: the value of the ranking, divided by that of the best ranking;
- 0/0 counts as 0 (a label without positives and without predictions has an F1 of 0, as scikit-learn's
  `zero_division=0`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch

from modeling_sep_mldc.hierarchy_sep_mldc import LabelHierarchy
from modeling_sep_mldc.label_sets_sep_mldc import expected_f1

from .kept_documents import NUM_BINS, SHARES, count_by_expected_f1, f1_of_kept
from .label_groups import head_body_tail, most_frequent_first, summarize
from .ranking import inverse_propensities, positives, ratio, to_array, top_k


# Ranking metrics of whole datasets are computed in slices of this many scores (32 MB in float32).
SCORES_PER_SLICE = 8_000_000
# Two histograms of 4-byte counts per label share this many bytes, within the bounds on bins below.
HISTOGRAM_BYTES = 128_000_000
MIN_BINS, MAX_BINS = 32, 1024


def ranking_metrics(
    scores: Any, labels: Any, ks: Sequence[int] = (1, 3, 5), propensities: np.ndarray | None = None
) -> dict[str, float]:
    r"""
    P@k, recall@k, nDCG@k and, with propensities, PSP@k and PSnDCG@k of a whole dataset.

    Args:
        scores (`torch.Tensor` or `np.ndarray` of shape `(num_documents, num_labels)`): any scores that rank the
            labels of a document.
        labels (`torch.Tensor`, `np.ndarray` or scipy.sparse matrix of shape `(num_documents, num_labels)`): multi-hot.
        ks (`Sequence[int]`, defaults to `(1, 3, 5)`): cut-offs.
        propensities (`np.ndarray` of shape `(num_labels,)`, *optional*): what `inverse_propensities` returns.

    Returns:
        `dict[str, float]`: `"p@k"`, `"recall@k"`, `"ndcg@k"`, `"psp@k"`, `"psndcg@k"`, each in [0, 1].

    Raises:
        ValueError: if shapes do not match, there is no document, a k is not in 1..num_labels, a score is NaN or
            propensities are not inverse.

    Example:

    ```python
    >>> import numpy as np
    >>> scores = np.array([[0.9, 0.2, 0.7], [0.1, 0.8, 0.3]])
    >>> {k: round(v, 4) for k, v in ranking_metrics(scores, np.array([[1, 1, 0], [0, 1, 0]]), ks=(1, 2)).items()}
    {'p@1': 1.0, 'p@2': 0.5, 'recall@1': 0.75, 'recall@2': 0.75, 'ndcg@1': 1.0, 'ndcg@2': 0.8066}

    ```
    """
    scores = scores if isinstance(scores, torch.Tensor) else np.asarray(scores)
    if scipy.sparse.issparse(labels):
        labels = labels.tocsr()
    elif not isinstance(labels, torch.Tensor):
        labels = np.asarray(labels)
    if scores.ndim != 2 or tuple(scores.shape) != tuple(labels.shape):
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)} and `labels` {tuple(labels.shape)}, but both must be "
            "(num_documents, num_labels) of the same documents and labels."
        )
    num_documents, num_labels = scores.shape
    metrics = StreamingMetrics(num_labels, ks, propensities=propensities, thresholds=None)
    rows = max(SCORES_PER_SLICE // max(num_labels, 1), 1)
    for start in range(0, num_documents, rows):
        metrics.update(scores[start : start + rows], labels[start : start + rows])
    return metrics.compute()


class StreamingMetrics:
    r"""
    Metrics accumulated over batches, on the device of their tensors, for any number of documents.

    With label counts, metrics are also reported for head, body and tail labels, see `trainer.metrics.label_groups`:
    `recall@k`, the share of a group's positives (document-label pairs) found in the top k, `coverage@k`, the share of its
    labels with positives that are found at least once in the top k, and `f1_macro`.

    Args:
        num_labels (`int`): number of labels.
        ks (`Sequence[int]`, defaults to `(1, 3, 5)`): cut-offs of the ranking metrics.
        label_counts (`np.ndarray` of shape `(num_labels,)`, *optional*): number of real training documents per
            label. Enables the groups and, with `num_documents`, the propensities.
        num_documents (`int`, *optional*): number of real training documents.
        propensities (`np.ndarray` of shape `(num_labels,)`, *optional*): inverse propensities, instead of those of
            `label_counts`.
        thresholds (`float` or `np.ndarray` of shape `(num_labels,)`, *optional*, defaults to 0.5): a label is predicted
            from this probability on; `None` leaves out F1.
        activation (`str`, *optional*, defaults to `"sigmoid"`): scores are logits whose sigmoid is the probability;
            `None`: scores are probabilities.
        histograms (`bool`, defaults to `False`): keep per-label histograms of logits for thresholds and calibration.
        num_bins (`int`, *optional*): number of bins. By default as many as fit in 128 MB, between 32 and 1024 (171 MB at
            670,000 labels).
        histogram_range (`tuple[float, float]`, defaults to `(-12, 12)`): logits outside are counted in the outer bins.
        tail_threshold (`int`, defaults to 50): labels with fewer training documents are tail labels.
        hierarchy (`LabelHierarchy`, *optional*): parents of labels. Enables, with thresholds, the hierarchical metrics: precision,
            recall and F1 of all decisions together after adding the ancestors of predicted and of true labels (Kiritchenko et al., 2006,
            Learning and evaluation in the presence of class hierarchies, Canadian AI).

    Raises:
        ValueError: if a k is not in 1..num_labels, or an array does not have one valid value per label.

    Example:

    ```python
    >>> import torch
    >>> metrics = StreamingMetrics(num_labels=3, ks=(1,))
    >>> metrics.update(torch.tensor([[2.0, -1.0, -3.0]]), torch.tensor([[1, 0, 0]]))
    >>> metrics.update(torch.tensor([[0.5, -1.0, 0.1]]), label_indices=[[2]])
    >>> {name: round(value, 4) for name, value in metrics.compute().items()}
    {'p@1': 0.5, 'recall@1': 0.5, 'ndcg@1': 0.5, 'f1_micro': 0.8, 'f1_macro': 0.5556, 'f1_sample': 0.8333, 'share_abstained': 0.0}

    ```
    """

    def __init__(
        self,
        num_labels: int,
        ks: Sequence[int] = (1, 3, 5),
        label_counts: Any = None,
        num_documents: int | None = None,
        propensities: np.ndarray | None = None,
        thresholds: Any = 0.5,
        activation: str | None = "sigmoid",
        histograms: bool = False,
        num_bins: int | None = None,
        histogram_range: tuple[float, float] = (-12.0, 12.0),
        tail_threshold: int = 50,
        hierarchy: LabelHierarchy | None = None,
    ):
        self.num_labels = num_labels
        self.hierarchy = hierarchy
        self.label_parents = None if hierarchy is None else hierarchy.parents
        self.ks = tuple(ks)
        for k in self.ks:
            if not 1 <= k <= num_labels:
                raise ValueError(
                    f"`ks` contains {k}, but a cut-off must lie between 1 and the number of labels ({num_labels}). "
                    "Leave out the larger ones."
                )
        if not self.ks:
            raise ValueError("`ks` is empty, but at least one cut-off is needed, for example `ks=(1, 3, 5)`.")
        if activation not in ("sigmoid", None):
            raise ValueError(f"`activation` is {activation!r}, but it must be 'sigmoid' (scores are logits) or None.")
        self.activation = activation
        self.label_counts = None if label_counts is None else self._per_label(label_counts, "label_counts")
        if propensities is None and label_counts is not None and num_documents is not None:
            propensities = inverse_propensities(self.label_counts, num_documents)
        self.propensities = None if propensities is None else self._per_label(propensities, "propensities")
        if self.propensities is not None and not self.propensities.min() >= 1:
            raise ValueError(
                f"`propensities` contains {self.propensities.min()}, but inverse propensities (at least 1) are needed. "
                "Pass what `inverse_propensities(label_counts, num_documents)` returns."
            )
        self.thresholds = None
        if thresholds is not None:
            self.thresholds = self._per_label(
                np.full(num_labels, thresholds) if np.ndim(thresholds) == 0 else thresholds, "thresholds"
            )
            if not (self.thresholds.min() >= 0 and self.thresholds.max() <= 1):
                raise ValueError(
                    "`thresholds` contains values that are not probabilities between 0 and 1. Pass probabilities, one per label or one for all."
                )
        self.tail_threshold = tail_threshold
        if histograms and num_bins is None:
            num_bins = min(max(HISTOGRAM_BYTES // (8 * num_labels), MIN_BINS), MAX_BINS)
        self.num_bins: int = num_bins if histograms and num_bins is not None else 0
        self.histogram_range = histogram_range
        self.reset()

    def reset(self) -> None:
        """Discard all counts."""
        self.num_seen = 0
        self._sums: dict[str, torch.Tensor] = {}  # all are sums over documents, so merging adds them
        self._device: torch.device | None = None

    def update(
        self,
        scores: Any,
        labels: Any = None,
        *,
        label_indices: Sequence[Sequence[int]] | None = None,
        probabilities: torch.Tensor | None = None,
        predicted: torch.Tensor | None = None,
    ) -> None:
        """
        Add a batch. The batch itself is not kept.

        Args:
            scores (`torch.Tensor` or `np.ndarray` of shape `(batch_size, num_labels)`): logits, or probabilities with
                `activation=None`.
            labels (`torch.Tensor`, `np.ndarray` or scipy.sparse matrix of shape `(batch_size, num_labels)`): multi-hot.
            label_indices (`Sequence[Sequence[int]]` of length `batch_size`): label ids, instead of `labels`.
            probabilities (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*): probabilities to compare with the
                thresholds, if they are not the activation of `scores`, such as those of a calibrated model.
            predicted (`torch.BoolTensor` of shape `(batch_size, num_labels)`, *optional*): label sets, if they depend on more than
                thresholds, as returned by [`SepMldcForMultiLabelClassification.label_sets`].

        Raises:
            ValueError: if shapes do not match, a label id is out of range or a score is NaN.
        """
        scores = torch.as_tensor(scores).detach()
        if scores.device.type == "mps":
            scores = scores.cpu()  # Apple GPUs do not support float64, which the sums need
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if scores.dim() != 2 or scores.shape[1] != self.num_labels:
            raise ValueError(
                f"`scores` has shape {tuple(scores.shape)}, but it must be (batch_size, num_labels) with "
                f"{self.num_labels} labels. Pass one row of scores per document."
            )
        rows, cols = positives(labels, label_indices, scores.shape, scores.device)
        self._start(scores.device)
        if not len(scores):
            return
        top = top_k(scores, max(self.ks))
        sizes = torch.bincount(rows, minlength=len(scores))
        self._count_ranking(top, rows, cols, sizes)
        if self.thresholds is not None:
            if predicted is None:
                predicted = scores >= self._cuts if probabilities is None else probabilities >= self._thresholds
            if probabilities is None:
                probabilities = torch.sigmoid(scores) if self.activation == "sigmoid" else scores
            self._count_predictions(predicted, rows, cols, sizes, expected_f1(probabilities, predicted))
            if self.hierarchy is not None:
                self._count_closed(predicted, rows, cols)
        if self.num_bins:
            self._count_bins(scores, rows, cols)
        self.num_seen += len(scores)

    def merge(self, other: "StreamingMetrics") -> None:
        """
        Add the counts of another accumulator with the same settings, for example of another process.

        Raises:
            ValueError: if the settings differ.
        """
        names: tuple[str, ...] = ("num_labels", "ks", "activation", "num_bins", "histogram_range", "tail_threshold")
        names += ("label_counts", "propensities", "thresholds", "label_parents")
        differing = [name for name in names if not np.array_equal(getattr(self, name), getattr(other, name))]
        if differing:
            raise ValueError(
                f"Metrics that differ in {', '.join(f'`{name}`' for name in differing)} cannot be merged. Create both with "
                "the same arguments."
            )
        if other._device is None:
            return
        self._start(other._device)
        for name, value in other._sums.items():
            self._sums[name] += value.to(self._device)
        self.num_seen += other.num_seen

    def compute(self) -> dict[str, float]:
        """
        The metrics of all documents seen.

        Returns:
            `dict[str, float]`: `p@k`, `recall@k`, `ndcg@k`; with propensities `psp@k`, `psndcg@k`; with thresholds
            `f1_micro`, `f1_macro` (over all labels), `f1_sample`, `share_abstained` (documents for which no label is
            predicted), and with a hierarchy `hierarchical_precision`, `hierarchical_recall`, `hierarchical_f1`; with label counts
            `head_recall@k`, `head_coverage@k`, `head_f1_macro`, and the same of `body` and `tail`.

        Raises:
            ValueError: if no document has been seen.
        """
        self._check_seen()
        sums = {name: value.cpu().numpy() for name, value in self._sums.items() if value.dtype == torch.float64}
        per_k = {
            "p": sums["hits"] / (np.array(self.ks) * self.num_seen),
            "recall": sums["recall"] / self.num_seen,
            "ndcg": sums["ndcg"] / self.num_seen,
        }
        if self.propensities is not None:
            per_k["psp"] = ratio(sums["psp"], sums["psp_best"])
            per_k["psndcg"] = ratio(sums["psndcg"], sums["psndcg_best"])
        results = {f"{name}@{k}": float(value) for name, values in per_k.items() for k, value in zip(self.ks, values)}
        labels = self.per_label()
        if self.thresholds is not None:
            either = labels["support"].sum() + labels["predicted"].sum()
            results["f1_micro"] = float(ratio(2 * labels["true_positives"].sum(), either))
            results["f1_macro"] = float(labels["f1"].mean())
            results["f1_sample"] = float(sums["f1_sample"]) / self.num_seen
            if self.hierarchy is not None:
                correct, predicted, support = self._sums["closed"].cpu().numpy()
                results["hierarchical_precision"] = float(ratio(correct, predicted))
                results["hierarchical_recall"] = float(ratio(correct, support))
                results["hierarchical_f1"] = float(ratio(2 * correct, predicted + support))
            results["share_abstained"] = float(sums["abstained"]) / self.num_seen
        if self.label_counts is not None:
            for name, members in self.label_groups().items():
                results.update({f"{name}_{key}": value for key, value in summarize(labels, members, self.ks).items()})
        return results

    def per_label(self) -> dict[str, np.ndarray]:
        """
        Counts and scores of each label, as arrays of `num_labels` values.

        Returns:
            `dict[str, np.ndarray]`: `support` (positives seen), `hits@k` (positives among the first k) and, with
            thresholds, `predicted`, `true_positives`, `precision`, `recall`, `f1`, `threshold`; with label counts
            `train_count`.

        Raises:
            ValueError: if no document has been seen.
        """
        self._check_seen()
        counts: dict[str, np.ndarray] = {
            n: self._sums[n].cpu().numpy() for n in ("support", "predicted", "true_positives") if n in self._sums
        }
        label_hits = self._sums["label_hits"].view(self.num_labels, -1).cumsum(dim=1).cpu().numpy()
        result = {"support": counts["support"]}
        order = {k: column for column, k in enumerate(sorted(set(self.ks)))}
        result.update({f"hits@{k}": label_hits[:, order[k]] for k in self.ks})
        if self.label_counts is not None:
            result["train_count"] = self.label_counts.astype(np.int64)
        if self.thresholds is not None:
            result.update(counts)
            result["precision"] = ratio(counts["true_positives"], counts["predicted"])
            result["recall"] = ratio(counts["true_positives"], counts["support"])
            result["f1"] = ratio(2 * counts["true_positives"], counts["support"] + counts["predicted"])
            result["threshold"] = self.thresholds
        return result

    def label_groups(self) -> dict[str, np.ndarray]:
        """
        Ascending label ids of `"head"`, `"body"` and `"tail"`.

        Raises:
            ValueError: without `label_counts`.
        """
        return head_body_tail(self._check_counts(), self.tail_threshold)

    def deciles(self) -> list[dict[str, float]]:
        """
        Metrics of the labels in ten groups of (almost) equal size, most frequent in training first. Empty groups are left out.

        Returns:
            `list[dict[str, float]]`: `num_labels`, `min_train_count`, `max_train_count`, `support`, `recall@k`,
            `coverage@k` and, with thresholds, `f1_macro`, as for the groups.

        Raises:
            ValueError: without `label_counts`, or if no document has been seen.
        """
        counts_of_all = self._check_counts()
        labels = self.per_label()
        result = []
        for members in np.array_split(most_frequent_first(counts_of_all), 10):
            if len(members):
                counts = labels["train_count"][members]
                row = {"num_labels": len(members), "min_train_count": int(counts.min())}
                row |= {"max_train_count": int(counts.max()), "support": int(labels["support"][members].sum())}
                result.append(row | summarize(labels, members, self.ks))
        return result

    def f1_of_kept(self, shares: Sequence[float] = SHARES) -> list[dict[str, float]]:
        r"""
        Micro F1 of the documents that are kept if those with the lowest expected F1 are sent to human review (coverage versus F1).

        The expected F1 of a document's label set S is $2 \sum_{l \in S} p_l / (|S| + \sum_l p_l)$. It is 0 for abstained documents, which are
        therefore reviewed first.

        Args:
            shares (`Sequence[float]`): shares of documents to keep.

        Returns:
            `list[dict]`: for each share `share_kept`, `num_documents`, `f1_micro`, `precision_micro`, `recall_micro` and `min_expected_f1`, see
            [`~trainer.metrics.kept_documents.f1_of_kept`].

        Raises:
            ValueError: without thresholds, if no document has been seen, or if a share is not above 0 and at most 1.
        """
        if self.thresholds is None:
            raise ValueError("No label is predicted without thresholds. Create the metrics with `thresholds`.")
        self._check_seen()
        return f1_of_kept(self._sums["kept"].cpu().numpy(), shares)

    def histograms(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Per-label histograms of the logits of positives and of negatives.

        Returns:
            `tuple(np.ndarray, np.ndarray, np.ndarray)`: positives and negatives, `(num_labels, num_bins)` each, and
            the bin edges in logits, `(num_bins + 1,)`. Bin i holds edges[i] <= logit < edges[i + 1]; logits beyond
            the range are in the outer bins.

        Raises:
            ValueError: without `histograms=True`, or if no document has been seen.
        """
        if not self.num_bins:
            raise ValueError("No histograms were kept. Create the metrics with `histograms=True`.")
        self._check_seen()
        both = self._sums["histogram"].view(self.num_labels, self.num_bins).cpu().numpy()
        positive = self._sums["positive_histogram"].view(self.num_labels, self.num_bins).cpu().numpy()
        return positive, both - positive, np.linspace(*self.histogram_range, self.num_bins + 1)

    def _start(self, device: torch.device) -> None:
        """Create the sums on the device of the first batch, and move them if a later batch is on another device."""
        if self._device == device:
            return
        if self._device is None:
            num_ks = len(self.ks)
            shapes: dict[str, int | tuple] = {"hits": num_ks, "recall": num_ks, "ndcg": num_ks}
            if self.propensities is not None:
                shapes |= {"psp": num_ks, "psp_best": num_ks, "psndcg": num_ks, "psndcg_best": num_ks}
            counts: dict[str, int | tuple] = {
                "support": self.num_labels,
                "label_hits": self.num_labels * len(set(self.ks)),
            }
            if self.thresholds is not None:
                shapes |= {"f1_sample": (), "abstained": ()}
                counts |= {"predicted": self.num_labels, "true_positives": self.num_labels}
                if self.hierarchy is not None:
                    counts |= {"closed": 3}
                counts |= {"kept": (4, NUM_BINS)}
            self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
            self._sums |= {name: torch.zeros(shape, dtype=torch.int64) for name, shape in counts.items()}
            if self.num_bins:
                for name in ("histogram", "positive_histogram"):
                    self._sums[name] = torch.zeros(self.num_labels * self.num_bins, dtype=torch.int32)
        self._device = device
        self._sums = {name: value.to(device) for name, value in self._sums.items()}
        max_k = max(self.ks)
        # Constants of the updates: k - 1 as columns, the rank -> place in sorted(ks) map, discounts, ideal gains by |y|.
        self._columns = torch.tensor(self.ks, device=device) - 1
        steps = torch.tensor(sorted(set(self.ks)))
        self._place = torch.searchsorted(steps, torch.arange(1, max_k + 1)).to(device)
        self._discounts = (1 / torch.log2(torch.arange(max_k, dtype=torch.float64) + 2)).to(device)
        ideal = self._discounts.cumsum(0)
        sizes = torch.arange(max_k + 1, device=device).clamp(min=1)  # without labels, the gain is 0 anyway
        self._ideal = ideal[torch.minimum(sizes.unsqueeze(1), self._columns + 1) - 1]  # (max_k + 1, len(ks))
        if self.propensities is not None:
            self._weights = torch.tensor(self.propensities, dtype=torch.float64, device=device)
        if self.thresholds is not None:
            cuts = torch.tensor(self.thresholds, dtype=torch.float64)
            self._thresholds = cuts.float().to(device)
            # Thresholds as logits: finer than probabilities close to 0 and 1.
            self._cuts = (torch.logit(cuts) if self.activation == "sigmoid" else cuts).float().to(device)

    def _count_ranking(self, top: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, sizes: torch.Tensor) -> None:
        """Add hits, recall and gains, with and without propensities, and the hits of each label."""
        batch_size, max_k = top.shape
        # The positives have sorted row-major keys, so that each label of the top k can be found by binary search.
        keys = torch.cat([rows * self.num_labels + cols, torch.full((1,), -1, device=top.device)])
        queries = torch.arange(batch_size, device=top.device).unsqueeze(1) * self.num_labels + top
        found = keys[torch.searchsorted(keys[:-1], queries)] == queries
        hits = found.double()

        up_to_k = hits.cumsum(dim=1)[:, self._columns]
        ideal = self._ideal[sizes.clamp(max=max_k)]
        self._sums["hits"] += up_to_k.sum(dim=0)
        self._sums["recall"] += (up_to_k / sizes.clamp(min=1).unsqueeze(1)).sum(dim=0)
        self._sums["ndcg"] += ((hits * self._discounts).cumsum(dim=1)[:, self._columns] / ideal).sum(dim=0)
        place = (top * (len(set(self.ks))) + self._place).flatten()
        self._sums["label_hits"].scatter_add_(0, place, found.flatten().long())
        self._sums["support"] += torch.bincount(cols, minlength=self.num_labels)
        if self.propensities is None:
            return

        # The best possible ranking has each document's positives in the order of descending inverse propensity.
        weights = self._weights[cols]
        order = weights.argsort(descending=True)
        order = order[rows[order].argsort(stable=True)]  # rows[order] is `rows` again
        rank = torch.arange(len(rows), device=top.device) - (sizes.cumsum(0) - sizes)[rows]
        best = torch.zeros(batch_size, max_k + 1, dtype=torch.float64, device=top.device)
        best[rows, rank.clamp(max=max_k)] = weights[order]  # the last column takes those beyond max_k
        for suffix, gains in (("", hits * self._weights[top]), ("_best", best[:, :max_k])):
            self._sums[f"psp{suffix}"] += gains.cumsum(dim=1)[:, self._columns].sum(dim=0)
            discounted = (gains * self._discounts).cumsum(dim=1)[:, self._columns]
            self._sums[f"psndcg{suffix}"] += (discounted / ideal).sum(dim=0)

    def _count_predictions(
        self,
        predicted: torch.Tensor,
        rows: torch.Tensor,
        cols: torch.Tensor,
        sizes: torch.Tensor,
        expected: torch.Tensor,
    ) -> None:
        """Add the decisions, (batch_size, num_labels) bool."""
        correct = predicted[rows, cols].long()
        self._sums["predicted"] += predicted.sum(dim=0, dtype=torch.int32)
        self._sums["true_positives"].scatter_add_(0, cols, correct)
        of_document = torch.zeros(len(predicted), dtype=torch.int64, device=predicted.device).scatter_add_(
            0, rows, correct
        )
        num_predicted = predicted.sum(dim=1, dtype=torch.int32)
        either = sizes + num_predicted
        self._sums["f1_sample"] += (2 * of_document.double() / either.clamp(min=1)).sum()
        self._sums["abstained"] += (num_predicted == 0).sum()
        self._sums["kept"] += count_by_expected_f1(expected, torch.stack([of_document, num_predicted, sizes]))

    def _count_closed(self, predicted: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> None:
        """Add the sizes of the closed decisions (batch_size, num_labels), of the closed true label sets, and of their intersections."""
        assert self.hierarchy is not None
        gold = torch.zeros_like(predicted)
        gold[rows, cols] = True
        predicted, gold = self.hierarchy.close(predicted), self.hierarchy.close(gold)
        self._sums["closed"] += torch.stack([(predicted & gold).sum(), predicted.sum(), gold.sum()])

    def _count_bins(self, scores: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> None:
        """Add the scores to the per-label histograms of all documents and of the positives."""
        logits = scores if self.activation == "sigmoid" else torch.logit(scores)
        if self.activation is None and logits.isnan().any():
            raise ValueError(
                "`scores` hold values outside 0..1, which are not probabilities. Pass logits and `activation='sigmoid'`."
            )
        low, high = self.histogram_range
        # Bins have equal width, so no search is needed. A logit within rounding error of an edge may fall on either side.
        bins = ((logits - low) * (self.num_bins / (high - low))).clamp_(0, self.num_bins - 1).long()
        bins += torch.arange(self.num_labels, device=scores.device) * self.num_bins
        one = torch.ones(1, dtype=torch.int32, device=scores.device)
        for name, places in (("histogram", bins.flatten()), ("positive_histogram", bins[rows, cols])):
            self._sums[name].scatter_add_(0, places, one.expand(len(places)))

    def _check_counts(self) -> np.ndarray:
        if self.label_counts is None:
            raise ValueError(
                "Labels cannot be grouped by frequency without `label_counts`. Pass the counts of the training set."
            )
        return self.label_counts

    def _per_label(self, values: Any, name: str) -> np.ndarray:
        values = to_array(values).astype(np.float64)
        if values.shape != (self.num_labels,):
            raise ValueError(
                f"`{name}` has shape {values.shape}, but one value for each of the {self.num_labels} labels is needed."
            )
        return values

    def _check_seen(self) -> None:
        if not self.num_seen:
            raise ValueError("No document has been added, but metrics need at least one. Call `update` first.")
