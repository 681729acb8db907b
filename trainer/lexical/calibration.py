"""Calibrates the margins of each label to log-odds, with margins on documents that the classifier was not fitted on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression


# Maximum number of document-label pairs for fitting the common line; more would hardly change its few parameters.
MAX_PAIRS = 4_000_000
# Precision of the priors that shrink each label's line to the common line: standard deviations 0.35 (slope) and 0.7 (intercept).
SLOPE_PENALTY, INTERCEPT_PENALTY = 8.0, 2.0
# Maximum number of Newton steps; iteration stops when the parameters no longer change.
STEPS, TOLERANCE = 25, 1e-3


@dataclass(frozen=True)
class CommonLine:
    r"""
    The common line of all labels, which maps margins to logits. Slope and intercept are linear functions of a label's log frequency f.

    Attributes:
        center, spread (`float`): center and spread of f over the labels it was fitted on.
        slopes, intercepts (`tuple[float, float]`): value at the center, and change per spread.
        least (`float`): minimum slope.
    """

    center: float
    spread: float
    slopes: tuple[float, float]
    intercepts: tuple[float, float]
    least: float

    def at(self, log_frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and intercepts (n,) of labels with these log frequencies (n,)."""
        # Frequencies far outside the fitted range are clipped, because the line should not be extrapolated.
        place = np.clip((log_frequencies - self.center) / self.spread, -3, 3)
        slopes = np.maximum(self.slopes[0] + self.slopes[1] * place, self.least)
        return slopes, self.intercepts[0] + self.intercepts[1] * place


def log_frequencies(counts: np.ndarray, num_documents: int) -> np.ndarray:
    """ln((n + 1/2) / (N + 1)) of labels with n of N documents: finite for a label without documents."""
    return np.log((np.asarray(counts) + 0.5) / (num_documents + 1))


def fit_common_line(
    margins_of: Callable[[Sequence[int]], np.ndarray], members: Sequence[Sequence[int]], num_documents: int
) -> CommonLine:
    """
    Fit the line that all labels share by logistic regression, over up to four million pairs of a document and a label.

    When one of the n documents of a label is left out, its classifier is fitted on only n - 1 positives. The slope for such margins is
    therefore that of a label with n - 1 documents. Labels with one document are skipped, because no positive remains.

    Args:
        margins_of (`Callable`): gives the margins (N, n) of n labels on documents that their classifiers were not fitted on.
        members (`Sequence[Sequence[int]]` of length `L`): rows of the documents that have each label.
        num_documents (`int`): N.

    Raises:
        ValueError: no label has both documents with it and documents without it.
    """
    counts = np.array([len(rows) for rows in members])
    learned = np.flatnonzero((counts > 0) & (counts < num_documents))
    repeated = learned[counts[learned] > 1]
    learned = repeated if len(repeated) else learned
    if not len(learned):
        raise ValueError(
            f"None of the {len(members)} labels is on some of the {num_documents} documents but not on others. Check the labels."
        )
    # Evenly over the labels ordered by frequency.
    size = min(len(learned), max(MAX_PAIRS // num_documents, 16))
    ordered = learned[np.argsort(counts[learned], kind="stable")]
    chosen = ordered[np.unique(np.linspace(0, len(ordered) - 1, size).round().astype(int))]
    frequencies = log_frequencies(counts[chosen], num_documents)
    center, spread = float(frequencies.mean()), max(float(frequencies.std()), 0.5)
    margins = margins_of(chosen.tolist()).T.ravel()
    of_slopes = log_frequencies(counts[chosen] - 1, num_documents)
    place: np.ndarray = np.repeat(np.clip((frequencies - center) / spread, -3, 3), num_documents)
    place_of_slope: np.ndarray = np.repeat(np.clip((of_slopes - center) / spread, -3, 3), num_documents)
    targets: np.ndarray = np.zeros((len(chosen), num_documents), dtype=np.int8)
    for row, index in enumerate(chosen):
        targets[row, list(members[index])] = 1
    design = np.stack([margins, margins * place_of_slope, place], axis=1)
    line = LogisticRegression(C=100.0, max_iter=200).fit(design, targets.ravel())
    slope, slope_change, intercept_change = line.coef_[0].tolist()
    # Uninformative or inversely related margins get a slope close to 0.
    slope = max(slope, 1e-3)
    return CommonLine(center, spread, (slope, slope_change), (float(line.intercept_[0]), intercept_change), slope / 5)


def fit_lines(
    margins: np.ndarray, rows_of_labels: Sequence[Sequence[int]], prior: CommonLine
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Slope s and intercept b of each of n labels, so that $\sigma(s m + b)$ is the probability of the label where its margin is m
    (Platt, 1999, Probabilistic outputs for support vector machines). It is the maximum a posteriori estimate with a normal prior around
    the common line: a label with few documents stays close to the common line, and one with a single document lies on it.

    The slope is for the classifier that is fitted on all documents of the label. Leave-one-out margins come from a classifier with one
    document less, see [`fit_common_line`]; the common line gives the ratio of the two slopes.

    Args:
        margins (`np.ndarray` of shape `(N, n)`): on documents that the classifiers were not fitted on.
        rows_of_labels (`Sequence[Sequence[int]]` of length `n`): rows of the documents that have each label, at least one.
        prior ([`CommonLine`]): the common line.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: slopes and intercepts, both (n,).
    """
    num_documents = len(margins)
    counts = np.array([len(rows) for rows in rows_of_labels])
    slopes_of_all, intercepts_0 = prior.at(log_frequencies(counts, num_documents))
    slopes_0, _ = prior.at(log_frequencies(counts - 1, num_documents))
    slopes, intercepts = slopes_0.copy(), intercepts_0.copy()
    targets = np.zeros_like(margins)
    for column, rows in enumerate(rows_of_labels):
        targets[list(rows), column] = 1
    squares = margins * margins
    for _ in range(STEPS):
        probabilities = margins * slopes.astype(margins.dtype)
        probabilities += intercepts.astype(margins.dtype)
        np.clip(probabilities, -30, 30, out=probabilities)
        np.reciprocal(1 + np.exp(-probabilities), out=probabilities)
        errors = probabilities - targets
        curvature = probabilities * (1 - probabilities)
        relative = (slopes - slopes_0) / slopes_0
        slope_gradient = np.einsum("ij,ij->j", errors, margins) + SLOPE_PENALTY * relative / slopes_0
        intercept_gradient = errors.sum(0) + INTERCEPT_PENALTY * (intercepts - intercepts_0)
        ss = np.einsum("ij,ij->j", curvature, squares) + SLOPE_PENALTY / slopes_0**2
        sb = np.einsum("ij,ij->j", curvature, margins)
        bb = curvature.sum(0) + INTERCEPT_PENALTY
        determinant = ss * bb - sb**2
        # Step lengths are bounded, because the curvature is too small far from the optimum.
        move_slope = np.clip(
            (bb * slope_gradient - sb * intercept_gradient) / determinant, -slopes_0 / 2, slopes_0 / 2
        )
        move_intercept = np.clip((ss * intercept_gradient - sb * slope_gradient) / determinant, -2, 2)
        moved = np.maximum(slopes - move_slope, slopes_0 / 10)
        change = max(np.abs((moved - slopes) / slopes_0).max(), np.abs(move_intercept).max())
        slopes, intercepts = moved, intercepts - move_intercept
        if change < TOLERANCE:
            break
    single = counts == 1
    slopes[single], intercepts[single] = slopes_0[single], intercepts_0[single]
    return slopes * slopes_of_all / slopes_0, intercepts


def in_steps(labels: Sequence[int], size: int) -> Iterator[list[int]]:
    """`labels` in lists of up to `size`."""
    for start in range(0, len(labels), size):
        yield list(labels[start : start + size])
