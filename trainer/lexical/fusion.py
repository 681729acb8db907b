"""Chooses the weights of logits and lexical margins in their sum on held-out documents."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from transformers.utils import logging

from ..metrics.streaming import StreamingMetrics


logger = logging.get_logger(__name__)

# Maximum number of document-label pairs: two matrices of 64 MB.
MAX_PAIRS = 16_000_000
TAIL_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
# Chosen on validation documents, see "Margins as log-odds" in docs/ablations.md.
USUAL_TAIL_WEIGHT = 0.75


class BalancedObjective:
    """
    The objective for the weight of lexical scores: the mean of P@1, P@3, P@5, nDCG@5, micro F1 at its best common threshold and, if label
    frequencies are known, PSP@1, PSP@3, PSP@5. With fewer than 5 labels, k is limited to the number of labels.

    Args:
        config (`SepMldcConfig`): number of labels, and their frequencies.
    """

    # Scores are binned, and only the highest ones of each document are kept, because no useful threshold predicts more labels.
    RANGE, BINS, TOP = (-80.0, 80.0), 6400, 100

    def __init__(self, config: Any):
        self.ks = tuple(k for k in (1, 3, 5) if k <= config.num_labels)
        self.ranking = StreamingMetrics(
            config.num_labels,
            ks=self.ks,
            thresholds=None,
            label_counts=config.label_counts,
            num_documents=config.num_train_documents,
        )
        # Histograms of all scores and of those of positives; kept on the device of the scores until the end.
        self.counts = torch.zeros(2, self.BINS, dtype=torch.int64)
        self.num_positives = torch.zeros((), dtype=torch.int64)

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits and multi-hot labels, both (B, L)."""
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


class ValidationScores:
    """
    Logits, margins and labels of validation documents: lists of batches (B, L), up to `max_pairs` document-label pairs.
    """

    def __init__(self, batches: Iterable, lexical: Any, max_pairs: int = MAX_PAIRS):
        self.batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.num_documents, num_left_out = 0, 0
        for logits, labels, inputs in batches:
            if self.num_documents * logits.shape[1] >= max_pairs:
                num_left_out += len(logits)
                continue
            margins = lexical.margins(inputs["input_ids"], inputs.get("attention_mask"))
            self.batches.append((logits.float(), margins, labels))
            self.num_documents += len(logits)
        if num_left_out:
            logger.info(
                f"{num_left_out} validation documents are not used to choose the weight of the lexical scores: {self.num_documents} are enough."
            )

    def metrics(self, config: Any, scale: float = 0.0, lift: torch.Tensor | float = 0.0) -> dict[str, float]:
        """[`BalancedObjective`] of logits + scale * margins + lift (L,)."""
        objective = BalancedObjective(config)
        for logits, margins, labels in self.batches:
            objective.update(logits + scale * margins + lift, labels)
        return objective.compute()


def stack_scores(scores: ValidationScores) -> tuple[float, float, float]:
    r"""
    Maximum-likelihood weights $w_z, w_m \ge 0$ and bias c of $\sigma(w_z z + w_m m + c)$ for logits z and margins m, over all
    document-label pairs (stacking: Wolpert, 1992, Neural Networks 5).

    Thirty documents are enough, because only three parameters are fitted on thousands of pairs.
    """
    # Both are standardized, and a penalty as weak as a single pair keeps the weights finite even if the scores separate the labels.
    spreads = [
        max(float(torch.cat([batch[part].flatten() for batch in scores.batches]).std(correction=0)), 1e-6)
        for part in (0, 1)
    ]
    scaled = [
        (logits / spreads[0], margins / spreads[1], labels.to(logits.dtype))
        for logits, margins, labels in scores.batches
    ]
    total = sum(z.numel() for z, _, _ in scaled)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value = 0.5 * float(weights[:2] @ weights[:2])
        slope: np.ndarray = np.array([weights[0], weights[1], 0.0])
        for z, m, y in scaled:
            fused = float(weights[0]) * z + float(weights[1]) * m + float(weights[2])
            value += float(torch.nn.functional.binary_cross_entropy_with_logits(fused, y, reduction="sum"))
            difference = fused.sigmoid() - y
            slope += [float((difference * z).sum()), float((difference * m).sum()), float(difference.sum())]
        return value / total, slope / total

    bounds = [(0.0, None), (0.0, None), (None, None)]
    found = minimize(loss, [0.5, 0.5, 0.0], jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-9}).x
    return float(found[0] / spreads[0]), float(found[1] / spreads[1]), float(found[2])


def choose_tail_weight(objectives: dict[float, float], num_documents: int, usual: float = USUAL_TAIL_WEIGHT) -> float:
    r"""
    The weight κ of the bonus for rare labels that maximizes the objective minus $\frac{(\kappa - \kappa_0)^2}{10 \sqrt{N}}$: with few
    documents, differences are noise, and κ stays close to the default.

    Args:
        objectives (`dict[float, float]`): objective by κ, in [0, 1].
        num_documents (`int`): N.
        usual (`float`, defaults to 0.75): κ_0.

    Example:

    ```python
    >>> choose_tail_weight({0.5: 0.500, 1.5: 0.505}, num_documents=30), choose_tail_weight({0.5: 0.500, 1.5: 0.505}, 1000)
    (0.5, 1.5)

    ```
    """
    return max(objectives, key=lambda weight: objectives[weight] - (weight - usual) ** 2 / (10 * num_documents**0.5))
