"""Short progress logs: of the about fifty values of an evaluation, only four are shown."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .hub.model_card_text import pretty_metric


TRAINING = ("loss", "learning_rate", "epoch", "train_runtime", "train_loss")


def short_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values of a log entry to show: for an evaluation, loss, P@1, nDCG@5 (or the largest k below 5), micro and macro F1; for a training
    step, loss, learning rate and epoch. Other logs are returned unchanged.

    Example:

    ```python
    >>> short_logs({"eval_loss": 0.5, "eval_p@1": 0.8, "eval_recall@1": 0.6, "eval_ndcg@1": 0.8, "eval_ndcg@3": 0.7, "epoch": 1.0})
    {'eval_loss': 0.5, 'P@1': 80.0, 'nDCG@3': 70.0, 'epoch': 1.0}

    ```
    """
    measured = [name for name in logs if re.search(r"(^|_)p@1$", name)]
    if not measured:
        short = {name: logs[name] for name in TRAINING if name in logs}
        return short if "loss" in short or "train_loss" in short else dict(logs)
    prefix = measured[0].removesuffix("p@1")
    ks = [int(name.rpartition("@")[2]) for name in logs if name.startswith(f"{prefix}ndcg@")]
    k = max([k for k in ks if k <= 5], default=max(ks, default=1))
    short = {name: logs[name] for name in (f"{prefix}loss",) if name in logs}
    for metric in ("p@1", f"ndcg@{k}", "f1_micro", "f1_macro"):
        if f"{prefix}{metric}" in logs:
            short[pretty_metric(metric)] = round(100 * float(logs[f"{prefix}{metric}"]), 2)
    return short | {name: logs[name] for name in ("epoch",) if name in logs}


class ShortProgressCallback(ProgressCallback):
    """Bars as in transformers, with [`short_logs`]."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=short_logs(logs or {}), **kwargs)


class ShortPrinterCallback(PrinterCallback):
    """Lines as in transformers, with [`short_logs`]."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=short_logs(logs or {}), **kwargs)


def use_short_lines(trainer: Any) -> None:
    """Replace the progress callbacks of a trainer by those with short lines."""
    pairs: tuple[tuple[type[TrainerCallback], type[TrainerCallback]], ...] = (
        (ProgressCallback, ShortProgressCallback),
        (PrinterCallback, ShortPrinterCallback),
    )
    for callback, short in pairs:
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(short)
