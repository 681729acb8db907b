"""
Decision thresholds and calibration from per-label score histograms, as `StreamingMetrics.histograms()` returns them.

Single scores are not needed: `positives` and `negatives` are counts of shape `(num_labels, num_bins)`, `bin_edges` of shape
`(num_bins + 1,)` are logits. Candidates are the inner edges, for which the counts on both sides are exact.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ..metrics.ranking import ratio


OBJECTIVES = ("f1", "macro", "micro", "precision:P")
CALIBRATIONS = ("temperature", "platt")
# Default shrinkage, in numbers of positives; `choose_shrinkage` finds a better value on two halves of the documents.
SHRINKAGE = {"f1": 20.0, "macro": 1.0, "micro": 20.0, "precision": 20.0}
SHRINKAGES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
# Share of macro F1 in the objective "f1"; the rest is micro F1. Macro F1 on few documents is noisy, especially when it is optimized.
MACRO_SHARE, MACRO_SHARE_OF_SEARCH = 1 / 3, 0.2
# Slopes of `frequency_thresholds` for calibrated logits, in which the middle half of the positives spans about 3.
SLOPES = np.arange(-4, 5) / 4
SPAN_OF_POSITIVES = 3.0
SLOPE_PENALTY = 0.1
MAX_OFFSETS = 256


def tune_thresholds(
    positives: np.ndarray,
    negatives: np.ndarray,
    bin_edges: np.ndarray,
    objective: str = "f1",
    shrinkage: float | None = None,
    calibration: dict[str, float] | None = None,
    label_counts: np.ndarray | None = None,
) -> np.ndarray:
    r"""
    Per-label probability thresholds, shrunk toward a common rule for labels with few positives.

    The best threshold t_l of a single label is estimated from its n_l positives, and overfits if there are few. The result, in logits, is
    the credibility-weighted mean (Bühlmann, 1967, Experience rating and credibility, ASTIN Bulletin 4)

    $$t = \frac{n_l}{n_l + m} t_l + \frac{m}{n_l + m} t_{common}$$

    with m = `shrinkage`. A label with m positives gets the mean of both; a label without positives gets the common threshold.
    That is the best single threshold for all labels together or, if `label_counts` is given, [`frequency_thresholds`].

    Args:
        positives, negatives (`np.ndarray` of shape `(num_labels, num_bins)`): counts of logits.
        bin_edges (`np.ndarray` of shape `(num_bins + 1,)`): ascending logits.
        objective (`str`, defaults to `"f1"`): `"f1"` or `"macro"`: the F1 of each label (which maximizes macro F1; the two differ
            in the default of `shrinkage`); `"micro"`: the F1 of all decisions together (exactly, by Dinkelbach's method: for a share λ of the optimum each
            label maximizes 2 TP - λ (predicted + positives)); `"precision:0.9"`: the lowest threshold, hence the
            highest recall, with that precision; a label that never reaches it gets the highest threshold.
        shrinkage (`float`, *optional*): m, in positives; 0 uses the threshold of each label as it is. By default 1 for
            `"macro"`, else 20; `choose_shrinkage` finds a better value.
        calibration (`dict`, *optional*): `{"scale", "bias"}`, see `platt_scaling`: thresholds are then on
            sigmoid(scale · logit + bias).
        label_counts (`np.ndarray` of shape `(num_labels,)`, *optional*): training documents of each label.

    Returns:
        `np.ndarray` of shape `(num_labels,)`: a label is predicted from this probability on.

    Raises:
        ValueError: if shapes do not match, there is no positive, `objective` is unknown or `shrinkage` negative.

    Example: positives lie at and above 0, negatives below, of the first label only.

    ```python
    >>> import numpy as np
    >>> positives, negatives = np.array([[0, 0, 5, 5], [0, 0, 0, 0]]), np.array([[9, 9, 0, 0], [0, 9, 9, 0]])
    >>> tune_thresholds(positives, negatives, np.array([-2, -1, 0, 1, 2])).round(2)
    array([0.5, 0.5])

    ```
    """
    if shrinkage is None:
        shrinkage = SHRINKAGE.get(objective.partition(":")[0], 0.0)
    if not shrinkage >= 0:
        raise ValueError(
            f"`shrinkage` is {shrinkage}, but it must be a number of positives of at least 0. Leave it out to have it chosen."
        )
    logits = _shrunk(*_estimates(positives, negatives, bin_edges, objective, label_counts), shrinkage)
    return expit(_calibrated(logits, calibration))


def frequency_thresholds(
    positives: np.ndarray,
    negatives: np.ndarray,
    bin_edges: np.ndarray,
    label_counts: np.ndarray,
    objective: str = "f1",
) -> np.ndarray:
    r"""
    Thresholds, in logits, that rise or fall with the frequency of labels: $t_l = a + b \ln(n_l + 1)$.

    Models score rare labels lower than frequent ones, or higher if they get a bonus for ranking, so a common threshold predicts too few or
    too many of the rare ones. Two parameters can be learned from few documents, but a threshold per label cannot.
    a and b maximize micro F1, macro F1 or, for `"f1"`, 80% of micro and 20% of macro F1, less a penalty on the slope of
    0.1 / sqrt(number of documents) times the square of b, in units of the spread of positives. A moving mean over a smooths
    the objective.

    Args:
        positives, negatives, bin_edges: as in [`tune_thresholds`].
        label_counts (`np.ndarray` of shape `(num_labels,)`): n, training documents of each label.
        objective (`str`, defaults to `"f1"`): `"f1"`, `"micro"` or `"macro"`.

    Returns:
        `np.ndarray` of shape `(num_labels,)`.

    Raises:
        ValueError: as `tune_thresholds`, or if `label_counts` has a different length.
    """
    _check(positives, negatives, bin_edges)
    if np.shape(label_counts) != (len(positives),):
        raise ValueError(
            f"`label_counts` has shape {np.shape(label_counts)}, but the histograms are of {len(positives)} labels. Pass one "
            "count per label."
        )
    correct, predicted = _counts_from_edges(positives, negatives)
    inner, support = np.asarray(bin_edges, dtype=np.float64)[1:-1], positives.sum(axis=1)
    frequency = np.log1p(np.asarray(label_counts, dtype=np.float64))
    frequency = frequency - np.average(frequency, weights=support)
    # Offsets: the edges between which the scores of positives lie, and some below. Slopes: in units of their spread.
    share = correct.sum(axis=0) / support.sum()
    quartiles = [inner[np.argmax(share <= level)] if (share <= level).any() else inner[-1] for level in (0.75, 0.25)]
    span = max(quartiles[1] - quartiles[0], inner[1] - inner[0] if len(inner) > 1 else 1.0)
    num_documents = (positives.sum() + negatives.sum()) / len(positives)
    low, high = np.searchsorted(inner, quartiles[0] - 3 * span), np.searchsorted(inner, quartiles[1] + 2 * span)
    offsets = inner[low : high + 1][:: max((high + 1 - low) // MAX_OFFSETS, 1)]
    rows, best, found = np.arange(len(positives)), -np.inf, np.zeros(len(positives))
    for steepness in sorted(SLOPES, key=abs):  # prefer the flattest of equally good ones
        slope = steepness * span / SPAN_OF_POSITIVES
        values = np.empty(len(offsets))
        for index, offset in enumerate(offsets):
            at = np.searchsorted(inner, offset + slope * frequency).clip(max=len(inner) - 1)
            values[index] = _value(correct[rows, at], predicted[rows, at], support, objective, MACRO_SHARE_OF_SEARCH)
        width = min(5, len(offsets))
        smooth = np.convolve(
            np.pad(values, (width // 2, (width - 1) // 2), mode="edge"), np.full(width, 1 / width), "valid"
        )
        index = int(smooth.argmax())
        value = smooth[index] - SLOPE_PENALTY * steepness**2 / num_documents**0.5
        if value > best + 1e-12:
            best, found = value, offsets[index] + slope * frequency
    return found


def check_objective(objective: str) -> float | None:
    """
    The precision P of `"precision:P"`, `None` for the other objectives.

    Raises:
        ValueError: the objective is unknown.
    """
    if objective in OBJECTIVES[:-1]:
        return None
    name, _, wanted = str(objective).partition(":")
    try:
        precision = float(wanted)
    except ValueError:
        precision = np.nan
    if name != "precision" or not 0 < precision <= 1:
        raise ValueError(
            f"`objective` is {objective!r}, but it must be one of {', '.join(map(repr, OBJECTIVES))} with P above 0 and at "
            "most 1, for example 'precision:0.9', or 'recall:R' or 'fdr:Q', for example 'recall:0.9'."
        )
    return precision


def choose_shrinkage(
    even: tuple,
    odd: tuple,
    objective: str = "f1",
    candidates: tuple[float, ...] = SHRINKAGES,
    label_counts: np.ndarray | None = None,
) -> float:
    """
    The `shrinkage` of `tune_thresholds` with the best result on documents that the thresholds were not tuned on:
    thresholds of the even documents are scored on the odd ones and vice versa.

    Args:
        even, odd (`tuple` of three `np.ndarray`): histograms and bin edges of two halves, as
            `StreamingMetrics.histograms()` returns them.
        objective (`str`, defaults to `"f1"`): `"f1"` is two thirds of micro and one third of macro F1, `"micro"` and
            `"macro"` one of them; with `"precision:P"` nothing is chosen.
        candidates (`tuple[float]`): candidates for m, in positives. Ties go to the first.
        label_counts (`np.ndarray` of shape `(num_labels,)`, *optional*): as in [`tune_thresholds`].

    Returns:
        `float`: m, in positives.

    Raises:
        ValueError: as `tune_thresholds`.
    """
    kind = objective.partition(":")[0]
    if kind == "precision" or not (np.sum(even[0]) and np.sum(odd[0])):
        return SHRINKAGE.get(kind, 0.0)
    decisions = np.zeros((len(candidates), 3, len(even[0])))
    for tuned, held_out in ((even, odd), (odd, even)):
        estimates = _estimates(*tuned, objective, label_counts)
        correct, predicted = _counts_from_edges(*held_out[:2])
        inner, rows = np.asarray(held_out[2], dtype=np.float64)[1:-1], np.arange(len(correct))
        for index, shrinkage in enumerate(candidates):
            at = np.minimum(np.searchsorted(inner, _shrunk(*estimates, shrinkage)), len(inner) - 1)
            decisions[index] += correct[rows, at], predicted[rows, at], held_out[0].sum(axis=1)
    values = [_value(*decided, objective, MACRO_SHARE) for decided in decisions]
    return float(candidates[int(np.argmax(values))])


def global_threshold(
    positives: np.ndarray,
    negatives: np.ndarray,
    bin_edges: np.ndarray,
    objective: str = "f1",
    calibration: dict[str, float] | None = None,
) -> float:
    """
    The best common threshold for all labels, as a probability. Arguments and errors are as in `tune_thresholds`.

    Example:

    ```python
    >>> import numpy as np
    >>> round(global_threshold(np.array([[0, 0, 5]]), np.array([[9, 9, 0]]), np.array([-2, -1, 1, 2])), 4)
    0.7311

    ```
    """
    hits, misses = (np.asarray(counts).sum(axis=0, keepdims=True) for counts in (positives, negatives))
    return float(tune_thresholds(hits, misses, bin_edges, objective, shrinkage=0, calibration=calibration)[0])


def platt_scaling(positives: np.ndarray, negatives: np.ndarray, bin_edges: np.ndarray) -> dict[str, float]:
    r"""
    Scale and bias that turn scores into probabilities sigmoid(scale · score + bias), by maximum likelihood over all
    document-label pairs (Platt, 1999), with his targets (N+ + 1)/(N+ + 2) and 1/(N- + 2). For scores of a softmax
    loss, whose absolute level has no meaning.

    Args:
        positives, negatives (`np.ndarray` of shape `(num_labels, num_bins)`): counts of scores; use a
            `histogram_range` that contains nearly all scores.
        bin_edges (`np.ndarray` of shape `(num_bins + 1,)`): ascending scores.

    Returns:
        `dict[str, float]`: `"scale"` (above 0) and `"bias"`, as in `config.score_calibration`.

    Raises:
        ValueError: if shapes do not match, there is no positive or no negative, or positives score no higher.
    """
    _check(positives, negatives, bin_edges)
    centers, hits, misses = _pooled(positives, negatives, bin_edges)
    high, low = (hits.sum() + 1) / (hits.sum() + 2), 1 / (misses.sum() + 2)
    # Scores are standardized for the optimizer; scale and bias are transformed back below.
    mean = np.average(centers, weights=hits + misses)
    spread = np.sqrt(np.average((centers - mean) ** 2, weights=hits + misses)) or 1.0
    x = (centers - mean) / spread
    start = np.array([1.0, np.log((hits.sum() + 1) / (misses.sum() + 1))])
    slope, intercept = _fit(np.stack([x, np.ones_like(x)], axis=1), hits, misses, high, low, start)
    if not slope > 1e-9:
        raise ValueError(
            "The scores of positives are not above those of negatives, so they cannot be turned into probabilities. "
            "Train the model before it is calibrated."
        )
    return {"scale": float(slope / spread), "bias": float(intercept - slope * mean / spread)}


def temperature_scaling(positives: np.ndarray, negatives: np.ndarray, bin_edges: np.ndarray) -> dict[str, float]:
    r"""
    The scale 1/T of sigmoid(logit / T) by maximum likelihood over all document-label pairs (Guo et al., 2017). It changes
    no ranking and no decision at 0.5.

    Args:
        positives, negatives (`np.ndarray` of shape `(num_labels, num_bins)`): counts of logits.
        bin_edges (`np.ndarray` of shape `(num_bins + 1,)`): ascending logits.

    Returns:
        `dict[str, float]`: `"scale"` (1/T, above 0) and `"bias"` 0, as in `config.score_calibration`.

    Raises:
        ValueError: if shapes do not match, there is no positive or no negative, or the best temperature is not above 0.
    """
    _check(positives, negatives, bin_edges)
    centers, hits, misses = _pooled(positives, negatives, bin_edges)
    (scale,) = _fit(centers[:, None], hits, misses, 1.0, 0.0, np.ones(1))
    if not scale > 1e-9:
        raise ValueError(
            "The logits of positives are not above those of negatives, so no temperature calibrates them. Train the "
            "model before it is calibrated, or use Platt scaling, which has a bias."
        )
    return {"scale": float(scale), "bias": 0.0}


def expected_calibration_error(
    positives: np.ndarray,
    negatives: np.ndarray,
    bin_edges: np.ndarray,
    calibration: dict[str, float] | None = None,
    num_bins: int = 15,
) -> float:
    r"""
    Mean distance of probability and frequency over all document-label pairs, in bins of equal width of the probability
    (Guo et al., 2017, Eq. 3). Most pairs are easy negatives, so it is small; compare it before and after a calibration.

    Args:
        positives, negatives (`np.ndarray` of shape `(num_labels, num_bins)`): counts of logits.
        bin_edges (`np.ndarray` of shape `(num_bins + 1,)`): rising logits; a probability is that of its bin's middle.
        calibration (`dict`, *optional*): `{"scale", "bias"}` applied to the logits first.
        num_bins (`int`, defaults to 15): bins of the probability.

    Returns:
        `float` in [0, 1].

    Raises:
        ValueError: if shapes do not match or there is no positive or no negative.

    Example: of ten pairs at probability one half, five are positive.

    ```python
    >>> import numpy as np
    >>> expected_calibration_error(np.array([[5]]), np.array([[5]]), np.array([-1, 1]))
    0.0

    ```
    """
    _check(positives, negatives, bin_edges)
    centers, hits, misses = _pooled(positives, negatives, bin_edges)
    probability = expit(_calibrated(centers, calibration))
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    expected = np.bincount(bins, weights=probability * (hits + misses), minlength=num_bins)
    observed = np.bincount(bins, weights=hits, minlength=num_bins)
    return float(np.abs(expected - observed).sum() / (hits + misses).sum())


def _estimates(
    positives: np.ndarray,
    negatives: np.ndarray,
    bin_edges: np.ndarray,
    objective: str,
    label_counts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best threshold per label (L,) and the common one (1,) or (L,), in logits, and the number of positives (L,)."""
    _check(positives, negatives, bin_edges)
    if len(bin_edges) < 3:
        raise ValueError(
            f"`bin_edges` has {len(bin_edges)} edges, but a threshold needs at least 2 bins to lie between."
        )
    # Counts above each inner edge, so that no decision depends on scores outside the range of the histograms.
    correct, predicted = _counts_from_edges(positives, negatives)
    inner = np.asarray(bin_edges, dtype=np.float64)[1:-1]
    support = positives.sum(axis=1)
    own = inner[_best(correct, predicted, support, objective)]
    if label_counts is not None and check_objective(objective) is None:
        return own, frequency_thresholds(positives, negatives, bin_edges, label_counts, objective), support
    total = (counts.sum(axis=0, keepdims=True) for counts in (correct, predicted, support))
    return own, inner[_best(next(total), next(total), next(total), objective)], support


def _value(
    correct: np.ndarray, predicted: np.ndarray, support: np.ndarray, objective: str, macro_weight: float
) -> float:
    """F1 of decisions: micro, macro, or for `"f1"` a weighted mean."""
    micro = ratio(2 * correct.sum(), predicted.sum() + support.sum())
    macro = ratio(2 * correct, predicted + support).mean()
    return float({"micro": micro, "macro": macro}.get(objective, (1 - macro_weight) * micro + macro_weight * macro))


def _shrunk(own: np.ndarray, pooled: np.ndarray, support: np.ndarray, shrinkage: float) -> np.ndarray:
    credibility = ratio(support, support + shrinkage)
    return credibility * own + (1 - credibility) * pooled


def _counts_from_edges(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True positives and predictions of each label at each inner edge, (num_labels, num_bins - 1) each."""
    correct = positives[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    wrong = negatives[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    return correct, correct + wrong


def _best(correct: np.ndarray, predicted: np.ndarray, support: np.ndarray, objective: str) -> np.ndarray:
    """Index (num_labels,) of the best inner edge per label; the middle one of several equally good neighbors."""
    if objective in ("f1", "macro"):
        return _middle_of_best(ratio(2 * correct, predicted + support[:, None]))
    if objective == "micro":
        share = 0.0
        while True:
            # Dinkelbach (1967): each round solves a sum over labels; the share rises to the optimum and stops there.
            best = _middle_of_best(2 * correct - share * predicted)
            rows = np.arange(len(best))
            reached = float(ratio(2 * correct[rows, best].sum(), predicted[rows, best].sum() + support.sum()))
            if reached <= share + 1e-12:
                return best
            share = reached
    wanted = check_objective(objective)
    reaches = (ratio(correct, predicted) >= wanted) & (predicted > 0)
    return np.where(reaches.any(axis=1), reaches.argmax(axis=1), correct.shape[1] - 1)


def _middle_of_best(values: np.ndarray) -> np.ndarray:
    first = values.argmax(axis=1)
    columns = np.arange(values.shape[1])
    lower = (columns > first[:, None]) & (values < values.max(axis=1, keepdims=True))
    end = np.where(lower.any(axis=1), lower.argmax(axis=1), values.shape[1])
    return (first + end - 1) // 2


def _fit(
    features: np.ndarray, hits: np.ndarray, misses: np.ndarray, high: float, low: float, start: np.ndarray
) -> np.ndarray:
    """Weights of a logistic regression on binned scores, with soft targets for hits and misses."""
    total = (hits + misses).sum()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ weights
        # -log sigmoid(z) = log(1 + e^-z), -log(1 - sigmoid(z)) = log(1 + e^z)
        positive, negative = np.logaddexp(0, -logits), np.logaddexp(0, logits)
        value = hits @ (high * positive + (1 - high) * negative) + misses @ (low * positive + (1 - low) * negative)
        slope = (hits + misses) * expit(logits) - hits * high - misses * low
        return value / total, features.T @ slope / total

    return minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x


def _calibrated(logits: np.ndarray, calibration: dict[str, float] | None) -> np.ndarray:
    return logits if calibration is None else calibration["scale"] * logits + calibration["bias"]


def _pooled(
    positives: np.ndarray, negatives: np.ndarray, bin_edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centers of the non-empty bins, and their positives and negatives over all labels."""
    hits, misses = (np.asarray(counts).sum(axis=0).astype(np.float64) for counts in (positives, negatives))
    if not misses.sum():
        raise ValueError("The histograms contain no negatives, so scores cannot be calibrated. Use data with both.")
    edges = np.asarray(bin_edges, dtype=np.float64)
    used = hits + misses > 0
    return ((edges[:-1] + edges[1:]) / 2)[used], hits[used], misses[used]


def _check(positives: np.ndarray, negatives: np.ndarray, bin_edges: np.ndarray) -> None:
    shapes = [np.shape(array) for array in (positives, negatives, bin_edges)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0] or shapes[2] != (shapes[0][1] + 1,):
        raise ValueError(
            f"`positives`, `negatives` and `bin_edges` have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, but they must "
            "be (num_labels, num_bins) twice and (num_bins + 1,). Pass what `StreamingMetrics.histograms()` returns."
        )
    if not np.sum(positives):
        raise ValueError(
            "None of the documents has a label, so thresholds cannot be tuned on them. Pass documents with labels."
        )
