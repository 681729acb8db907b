"""The plots of a model card: training curve and recall by label frequency, as PNG (extra `plot`)."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .model_card_text import GROUP, METRIC, pretty_metric


def draw_pictures(log_history: Sequence[Mapping] | None, deciles: Sequence[Mapping] | None) -> dict[str, bytes]:
    """
    The plots of a card as PNG, by file name: `training_curve.png` from the trainer's `state.log_history`,
    `decile_recall.png` from `StreamingMetrics.deciles()`. Empty without matplotlib (extra `plot`) or data.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}
    pictures = {
        "training_curve.png": _training_curve(log_history or []),
        "decile_recall.png": _decile_recall(deciles or []),
    }
    return {name: picture for name, picture in pictures.items() if picture is not None}


def _series(log_history: Sequence[Mapping], keys: Sequence[str]) -> dict[str, tuple[list, list]]:
    series: dict[str, tuple[list, list]] = {}
    for entry in log_history:
        for key in keys:
            if key in entry and "step" in entry and math.isfinite(entry[key]):
                steps, values = series.setdefault(key, ([], []))
                steps.append(entry["step"])
                values.append(entry[key])
    return series


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})  # same data, same bytes: no new upload
    return buffer.getvalue()


def _training_curve(log_history: Sequence[Mapping]) -> bytes | None:
    from matplotlib.figure import Figure

    losses = ["loss", "eval_loss", "classification_loss", "label_contrastive_loss", "document_contrastive_loss"]
    measured = [key for key in dict.fromkeys(k for entry in log_history for k in entry) if key.startswith("eval_")]
    measured = [k for k in measured if METRIC.search(k) and not GROUP.search(k)][:6]
    panels = [("loss", _series(log_history, losses)), ("validation", _series(log_history, measured))]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        return None
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for key, (steps, values) in series.items():
            axes.plot(steps, values, marker="o" if len(steps) < 20 else None, markersize=3, label=key)
        axes.set(xlabel="step", title=title)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return _png(figure)


def _decile_recall(deciles: Sequence[Mapping]) -> bytes | None:
    from matplotlib.figure import Figure

    measured = [key for key in (deciles[0] if deciles else ()) if key.startswith("recall@")]
    if not measured:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key in measured:
        axes.plot([100 * decile[key] for decile in deciles], marker="o", label=pretty_metric(key))
    ticks = [f"{decile['min_train_count']}-{decile['max_train_count']}" for decile in deciles]
    axes.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right")
    axes.set(
        xlabel="training documents per label (tenths of the labels, most frequent first)",
        ylabel="recall among the best k, %",
        ylim=(-2, 102),
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return _png(figure)
