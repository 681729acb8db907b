"""Report on an augmentation: labels per decile before and after, tokens, cost, and a histogram."""

import collections
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checks import check_number
from .errors import AugmentationError
from .files import read_documents
from .journal import Journal
from .pricing import PriceList
from .writing import check_output, encoded, replace_atomically


FILE_NAME, PICTURE = "augmentation_report.json", "label_histogram.png"
DECILES = 10


@dataclass
class Report:
    """
    Statistics of an augmentation; `as_dict` is the content of `augmentation_report.json`.

    Args:
        deciles: For each tenth of the labels, the rarest first: `{"decile", "labels", "before", "after"}`, the last two being
            mean numbers of documents per label.
        models: For each (model, endpoint, template): `{"model", "endpoint", "template", "answers", "prompt_tokens",
            "completion_tokens", "cost"}`.
    """

    train_documents: int
    pseudo_documents: int
    labels: int
    tail_labels_before: int
    tail_labels_after: int
    tail_threshold: int
    deciles: list[dict[str, Any]]
    models: list[dict[str, Any]]
    currency: str
    files: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.train_documents} training documents and {self.pseudo_documents} pseudo-documents, {self.labels} labels; "
            f"labels with fewer than {self.tail_threshold} documents: {self.tail_labels_before} before, "
            f"{self.tail_labels_after} after.",
            f"{'decile':>6} {'labels':>7} {'before':>10} {'after':>10}   (documents per label, mean)",
        ]
        lines += [
            f"{row['decile']:>6} {row['labels']:>7} {row['before']:>10.1f} {row['after']:>10.1f}"
            for row in self.deciles
        ]
        for row in self.models:
            cost = "cost unknown" if row["cost"] is None else f"{row['cost']:.4f} {self.currency}"
            lines.append(
                f"{row['model']} at {row['endpoint']} ({row['template']}): {row['answers']} answers, {row['prompt_tokens']} + "
                f"{row['completion_tokens']} tokens, {cost}"
            )
        return "\n".join([*lines, *(f"Written: {path}" for path in self.files)])


def report(
    train: str | Path | Sequence[str | Path] | None,
    output_dir: str | Path,
    pseudo_documents: str | Path | None = None,
    journals: Sequence[str | Path] = (),
    prices: str | Path | None = None,
    tail_threshold: int = 50,
    picture: bool = True,
    label_delimiter: str | None = None,
) -> Report:
    """
    Writes `augmentation_report.json` and `label_histogram.png`.

    Args:
        train: Training file or files; None where there are only pseudo-documents.
        output_dir: Folder of the two files.
        pseudo_documents (*optional*): The pseudo-documents that training will use.
        journals: Journals of all runs; every answer counts as paid for, whether or not it was kept.
        prices, tail_threshold, picture: As in the generating commands; `picture=False` leaves matplotlib out.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training table.

    Raises:
        AugmentationError: bad input.
    """
    check_number("tail_threshold", tail_threshold, integer=True)
    output_dir = Path(output_dir)
    outputs = [output_dir / FILE_NAME, *([output_dir / PICTURE] if picture else [])]
    trains = [train] if isinstance(train, (str, Path)) else list(train or ())
    for output in outputs:
        check_output(output, (*trains, *journals, *([pseudo_documents] if pseudo_documents else [])))
    documents = read_documents(trains, label_delimiter=label_delimiter)
    pseudo = read_documents(pseudo_documents) if pseudo_documents else []
    if not documents and (trains or not pseudo):
        raise AugmentationError(
            "the training file contains no documents, so there is nothing to report on; give another file."
            if trains
            else "there are neither training documents nor pseudo-documents to report on; give `train` or `pseudo_documents`."
        )
    before = collections.Counter(label for document in documents for label in document.labels)
    after = before + collections.Counter(label for document in pseudo for label in document.labels)
    names = sorted(after, key=lambda label: (before[label], label))
    price_list = PriceList(prices)
    result = Report(
        train_documents=len(documents),
        pseudo_documents=len(pseudo),
        labels=len(names),
        tail_labels_before=sum(before[label] < tail_threshold for label in names),
        tail_labels_after=sum(after[label] < tail_threshold for label in names),
        tail_threshold=tail_threshold,
        deciles=_deciles(names, before, after),
        models=_paid(journals, price_list),
        currency=price_list.currency,
    )
    with replace_atomically(outputs[0]) as stream:
        stream.write(encoded(result.as_dict(), indent=2))
    if picture:
        _draw(outputs[1], names, before, after, tail_threshold)
    result.files += map(str, outputs)
    return result


def _paid(journals: Sequence[str | Path], prices: PriceList) -> list[dict[str, Any]]:
    """Answers, tokens and cost by model, endpoint and template."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in journals:
        with Journal(path, read_only=True) as journal:
            journal.check_is_journal()
            for entry in journal.entries():
                key = (entry["model"], entry["endpoint"], entry["template"])
                counts = {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
                row = groups.setdefault(key, {**dict(zip(("model", "endpoint", "template"), key)), **counts})
                row["answers"] += 1
                for name in ("prompt_tokens", "completion_tokens"):
                    row[name] += entry["usage"][name]
                cost = prices.cost_of(entry)
                row["cost"] = None if cost is None or row["cost"] is None else row["cost"] + cost
    return [groups[key] for key in sorted(groups)]


def _deciles(
    names: list[str], before: collections.Counter[str], after: collections.Counter[str]
) -> list[dict[str, Any]]:
    rows = []
    for decile in range(DECILES):
        part = names[decile * len(names) // DECILES : (decile + 1) * len(names) // DECILES]
        if part:
            rows.append(
                {
                    "decile": decile + 1,
                    "labels": len(part),
                    "before": sum(before[label] for label in part) / len(part),
                    "after": sum(after[label] for label in part) / len(part),
                }
            )
    return rows


def _draw(
    path: Path,
    names: list[str],
    before: collections.Counter[str],
    after: collections.Counter[str],
    tail_threshold: int,
) -> None:
    from matplotlib.figure import Figure  # not pyplot, which may need a display

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(names))
    axes.fill_between(
        places, [after[name] for name in names], step="mid", color="#7fb2e5", label="real and pseudo-documents"
    )
    axes.fill_between(places, [before[name] for name in names], step="mid", color="#1f4e79", label="real documents")
    axes.axhline(
        tail_threshold, color="#b03a2e", linestyle="--", linewidth=1, label=f"tail threshold ({tail_threshold})"
    )
    axes.set(
        yscale="symlog",
        ylim=(0, None),
        xlabel="labels, the rarest first",
        ylabel="documents",
        xlim=(0, max(len(names) - 1, 1)),
    )
    axes.legend(loc="upper left", frameon=False)
    with replace_atomically(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
