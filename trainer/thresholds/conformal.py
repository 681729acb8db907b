"""One decision threshold with a guarantee on recall or on false discoveries: conformal risk control."""

import math

import numpy as np
import torch


GUARANTEES = ("recall", "fdr")


def check_guarantee(objective: str) -> tuple[str, float] | None:
    """
    The risk and its limit for `"recall:R"` (limit 1 - R) and `"fdr:Q"` (limit Q); `None` for other objectives.

    Raises:
        ValueError: R or Q is not a number between 0 and 1.

    Example:

    ```python
    >>> check_guarantee("fdr:0.1"), check_guarantee("f1")
    (('fdr', 0.1), None)

    ```
    """
    name, _, wanted = str(objective).partition(":")
    if name not in GUARANTEES:
        return None
    try:
        value = float(wanted)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        example = "recall:0.9" if name == "recall" else "fdr:0.1"
        raise ValueError(
            f"`objective` is {objective!r}, but {name} must be a number between 0 and 1, for example {example!r}."
        )
    return name, round(1 - value, 12) if name == "recall" else value


def check_no_guarantee(objective: str) -> None:
    """
    Reject an objective with a guarantee if label sets are changed after thresholding.

    Raises:
        ValueError: it is `"recall:R"` or `"fdr:Q"`.
    """
    if check_guarantee(objective) is not None:
        raise ValueError(
            f"`objective` is {objective!r}, but its guarantee is of the labels that reach their thresholds, and label constraints or "
            '`hierarchy="leaves"` change these sets afterward. Use another objective such as "f1", or `hierarchy="closure"` without '
            "constraints."
        )


def documents_needed(limit: float) -> int:
    """
    The minimum number of documents for guaranteeing a risk of at most `limit`: the smallest n with 1 / (n + 1) <= `limit`.

    Example:

    ```python
    >>> documents_needed(0.1), documents_needed(0.05)
    (9, 19)

    ```
    """
    return math.ceil(round(1 / limit - 1, 9))


class RiskCurve:
    r"""
    The mean loss of documents at each threshold of a grid of logits, and the threshold chosen by conformal risk control.

    The loss of a document at a threshold is the share of its labels that are missed (`"recall"`), or the share of the predicted labels
    that are wrong (`"fdr"`; the largest one at this or any higher threshold, so that it never grows with the threshold). If n
    documents and a new one are exchangeable, the expected loss of the new one is at most α at any threshold λ with

    $$\frac{\sum_i \ell_i(\lambda) + 1}{n + 1} \le \alpha$$

    (Angelopoulos et al., 2022, Conformal risk control, arXiv 2208.02814, Theorem 1).

    Args:
        risk (`str`): `"recall"` or `"fdr"`.
        limit (`float`): α.
    """

    LOW, STEP, SIZE = -40.0, 0.05, 1601

    def __init__(self, risk: str, limit: float):
        self.risk, self.limit = risk, limit
        self.num_documents = 0
        self.losses = torch.zeros(self.SIZE + 1, dtype=torch.float64)
        self.abstained = torch.zeros(self.SIZE + 1, dtype=torch.float64)
        self.num_predicted = torch.zeros(self.SIZE + 1, dtype=torch.float64)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits and multi-hot labels, both (B, L). Documents without labels have no recall and are skipped for it."""
        self.add(*self.count(logits, labels))

    @classmethod
    def count(cls, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        For logits and multi-hot labels, both (B, L): the number of labels of each document that reach each threshold of the grid, and the
        number of correct ones among them, both (B, `SIZE` + 1). All labels reach the first threshold, none reaches the last one.
        """
        logits, labels = logits.float().cpu(), labels.double().cpu()
        bins = ((logits - cls.LOW) / cls.STEP).floor().long().clamp(0, cls.SIZE - 1)
        empty = torch.zeros(len(logits), cls.SIZE + 1, dtype=torch.float64)
        predicted = _sums_from_above(empty.scatter_add(1, bins, torch.ones_like(labels)))
        return predicted, _sums_from_above(empty.scatter_add(1, bins, labels))

    def add(self, predicted: torch.Tensor, correct: torch.Tensor) -> None:
        """Add what `count` returned for some documents, both (B, `SIZE` + 1)."""
        if self.risk == "recall":
            kept = correct[:, 0] > 0
            predicted, correct = predicted[kept], correct[kept]
            losses = 1 - correct / correct[:, :1]
        else:
            losses = (predicted - correct) / predicted.clamp_min(1)
            losses = losses.flip(1).cummax(dim=1).values.flip(1)
        self.losses += losses.sum(dim=0)
        self.abstained += (predicted == 0).sum(dim=0)
        self.num_predicted += predicted.sum(dim=0)
        self.num_documents += len(predicted)

    def choose_index(self) -> int:
        """
        The position of the threshold on the grid: `LOW` + `STEP` x index, as a logit.

        Raises:
            ValueError: there are too few documents for this limit.
        """
        n = self.num_documents
        if n < documents_needed(self.limit):
            raise ValueError(
                f"{n} documents with labels cannot guarantee a risk of {self.limit:g}: at least {documents_needed(self.limit)} are "
                "needed. Add validation documents, or allow more."
            )
        allowed = np.flatnonzero(((self.losses + 1) / (n + 1)).numpy() <= self.limit)
        # Recall needs the highest threshold within the limit, false discoveries the lowest.
        return int(allowed[-1] if self.risk == "recall" else allowed[0])

    def choose(self, calibration: dict[str, float] | None = None) -> tuple[float, dict]:
        """
        The threshold, as a probability, and information about it: the guarantee in words, the mean loss, the number of labels per document
        and the share of documents without any label.

        Args:
            calibration (`dict`, *optional*): `{"scale", "bias"}` of the logits.

        Raises:
            ValueError: there are too few documents for this limit.
        """
        n, index = self.num_documents, self.choose_index()
        logit = self.LOW + self.STEP * index
        if calibration is not None:
            logit = calibration["scale"] * logit + calibration["bias"]
        threshold = 0.0 if index == 0 else 1.0 if index == self.SIZE else 1 / (1 + math.exp(-max(logit, -700)))
        what = (
            f"On average over new documents, at least {1 - self.limit:.1%} of a document's labels are returned"
            if self.risk == "recall"
            else f"On average over new documents, at most {self.limit:.1%} of a document's returned labels are wrong"
        )
        return threshold, {
            "guarantee": f"{what}, if they are of the same kind as the {n} validation documents (exchangeable) and "
            "these chose nothing else, such as the checkpoint. One threshold for all labels, by conformal risk control.",
            "risk": float(self.losses[index] / n),
            "labels_per_document": float(self.num_predicted[index] / n),
            "share_abstained": float(self.abstained[index] / n),
        }


def _sums_from_above(counts: torch.Tensor) -> torch.Tensor:
    return counts.flip(1).cumsum(dim=1).flip(1)
