"""The pictures of a model card: training curve and recall by label frequency, as PNG (extra `plot`)."""

import io
import math
from collections.abc import Mapping, Sequence

from .model_card_text import DECILE, GROUP, METRIC, pretty_metric, split_metrics


def draw_pictures(log_history: Sequence[Mapping] | None, metrics: Mapping[str, float] | None) -> dict[str, bytes]:
    """
    The pictures of a card as PNG: `training_curve.png` from the trainer's `state.log_history`, `decile_recall.png` from
    metrics whose names hold `decile_N`. None without matplotlib (extra `plot`), or where there is nothing to draw.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}
    return {
        name: picture
        for name, picture in {
            "training_curve.png": _training_curve(log_history or []),
            "decile_recall.png": _decile_recall(split_metrics(metrics or {})),
        }.items()
        if picture is not None
    }


def _series(log_history, keys) -> dict[str, tuple[list, list]]:
    series = {}
    for entry in log_history:
        for key in keys:
            if key in entry and "step" in entry and math.isfinite(entry[key]):
                steps, values = series.setdefault(key, ([], []))
                steps.append(entry["step"])
                values.append(entry[key])
    return series


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})  # same data, same bytes: no new upload
    return buffer.getvalue()


def _training_curve(log_history) -> bytes | None:
    from matplotlib.figure import Figure

    losses = ["loss", "eval_loss", "classification_loss", "label_contrastive_loss", "document_contrastive_loss"]
    measured = [key for key in dict.fromkeys(k for entry in log_history for k in entry) if key.startswith("eval_")]
    measured = [k for k in measured if METRIC.search(k) and not GROUP.search(k) and not DECILE.search(k)][:6]
    panels = [("loss", _series(log_history, losses)), ("measured on validation", _series(log_history, measured))]
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


def _decile_recall(splits) -> bytes | None:
    from matplotlib.figure import Figure

    curves = {}
    for split, values in splits.items():
        for metric, value in values.items():
            match = DECILE.search(metric)
            if match:
                base = (metric[: match.start()] + metric[match.end() :]).strip("_/")
                curves.setdefault(f"{pretty_metric(base)}, {split}", {})[int(match.group(2))] = value
    if not curves:
        return None
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for title, curve in curves.items():
        deciles = sorted(curve)
        axes.plot(deciles, [100 * curve[decile] for decile in deciles], marker="o", label=title)
    axes.set(xlabel="decile of the labels by training documents", ylabel="%", ylim=(0, 102))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return _png(figure)
