"""The metrics of `stacked_runs.py`, computed on the device of the scores."""

import numpy as np
import torch
import torch.nn.functional as F


def measure(scores, targets, propensities, size: int | None = None) -> dict:
    """Metrics of scores (N, L); with the number of training documents also nDCG@5 on small subsets."""
    number, labels = scores.shape
    top = scores.topk(5, dim=1).indices
    found = targets.gather(1, top)
    discounts = 1 / torch.log2(torch.arange(2, 7, device=scores.device).float())
    ideal = torch.cumsum(discounts, 0)[targets.sum(1).long().clamp(1, 5) - 1]
    gains = (found * discounts).sum(1) / ideal
    weighted = found * propensities[top]
    best = (targets * propensities).topk(5, dim=1).values
    deep = scores.topk(min(60, labels), dim=1)
    values, order = deep.values.flatten().sort(descending=True)
    correct = targets.gather(1, deep.indices).flatten()[order].cumsum(0)
    f1 = 2 * correct / (torch.arange(1, len(correct) + 1, device=scores.device) + targets.sum())
    place = f1.argmax()
    predicted = scores >= values[place]
    hits = (predicted * targets).sum(0)
    per_label = 2 * hits / (predicted.sum(0) + targets.sum(0)).clamp_min(1)
    summary = [
        found[:, 0].mean(),
        found.mean(),
        gains.mean(),
        weighted[:, 0].sum() / best[:, 0].sum(),
        weighted.sum() / best.sum(),
        f1[place],
        per_label.mean(),
    ]
    if size is not None:
        summary.append(F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / number)
        few = min(max(50, size // 10), number)
        for seed in range(3):
            subset = np.random.default_rng(seed).permutation(number)[:few]
            summary.append(gains[torch.from_numpy(subset).to(scores.device)].mean())
    numbers = [round(100 * value, 3) for value in torch.stack(summary).tolist()]
    names = ["p@1", "p@5", "ndcg@5", "psp@1", "psp@5", "f1_micro", "f1_macro"]
    result = dict(zip(names, numbers, strict=False))
    if size is not None:
        result["loss"] = round(numbers[7] / 100, 4)
        result["few"] = numbers[8:]
    return result
