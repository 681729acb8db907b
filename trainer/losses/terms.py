"""Means of loss terms, for logging."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator


class TermMeans:
    """Sums terms batch by batch, as tensors on their device, so that no step forces a device synchronization."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, terms: Mapping[str, torch.Tensor], weight: int = 1) -> None:
        """Add the terms of one batch, with a weight such as its number of documents."""
        self._count += weight
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + weight * value

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Weighted means over batches, and means over processes, since the last call; empty if there was no batch."""
        if not self._count:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].float() for name in names]) / self._count
        means = accelerator.reduce(means, reduction="mean")
        self._sums, self._count = {}, 0
        return dict(zip(names, means.tolist()))
