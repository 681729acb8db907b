#!/usr/bin/env python
"""
Quality and speed of a student of `trainer.distill`, compared with its teacher.

    python benchmarks/distillation.py --teacher outputs/arxiv --data FOLDER --documents 8000
    python benchmarks/distillation.py report

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}. The student learns from the texts of `--documents`
training documents, a permutation with seed 0, without their labels. Lexical scores are weighted and thresholds tuned on the first
`--validation` documents. Metrics are in percent on the first `--test` documents, with the interval of a paired bootstrap of the
difference. Speed is documents per second of processor time on one thread, the best of several passes over `--speed` test documents:
of the model alone, of the tokenizer alone, and from text to label set.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tasks
import torch
from tasks import write_json
from transformers import AutoTokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, SepMldcForMultiLabelClassification
from trainer import FastLabeler, SepMldcTrainer, distill, distillation_arguments
from trainer.data import encode_labels, tokenize
from trainer.data.word_cache import WordCache
from trainer.devices import is_bfloat16_native


RESULTS = Path(__file__).parent / "results" / "distillation.json"
METRICS = ("p@1", "p@5", "ndcg@5", "psp@5", "f1_micro")
SPEEDS = ("model", "tokenizer", "words looked up", "pipeline", "text to labels")


def read(options, config, tokenizer) -> tuple[dict, list[str]]:
    """Tokenized documents by split, and the texts of the test documents."""
    labeled = tasks.read_splits(options.data, ("validation", "test"))
    train = tasks.read_splits(options.data, ("train",), label_column=None)["train"]
    limits = {"validation": options.validation, "test": options.test}
    parts = {split: labeled[split].select(range(min(limit, len(labeled[split])))) for split, limit in limits.items()}
    texts = list(parts["test"]["text"])
    encoded = {split: encode_labels(part, config.label2id) for split, part in parts.items()}
    encoded["train"] = tasks.sample(train, options.documents)
    return {name: tokenize(part, tokenizer, options.max_length) for name, part in encoded.items()}, texts


def ndcg_by_document(model, documents, tokenizer, folder: str) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of a model in percent, and nDCG@5 of each document."""
    args = distillation_arguments(folder, use_cpu=True, bf16=is_bfloat16_native(True), per_device_eval_batch_size=64)
    trainer = SepMldcTrainer(model, args, eval_dataset=documents, processing_class=tokenizer)
    metrics = trainer.new_streaming_metrics()
    values = []
    for logits, labels, _ in trainer.logit_batches():
        metrics.update(logits, labels, probabilities=trainer.model.probabilities(logits))
        values.append(ndcg_at_5(logits, labels))
    found = metrics.compute()
    return {name: 100 * found[name] for name in METRICS if name in found}, np.concatenate(values)


def ndcg_at_5(scores: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    k = min(5, scores.shape[1])
    discounts = 1 / torch.log2(torch.arange(k) + 2.0)
    hits = labels.float().gather(1, scores.topk(k, dim=1).indices)
    sizes = labels.sum(dim=1).long().clamp(1, k)
    return ((hits * discounts).sum(dim=1) / discounts.cumsum(0)[sizes - 1]).numpy()


def best_speed(count: int, run, passes: int) -> float:
    """Documents per second of processor time."""
    run()
    seconds = []
    for _ in range(passes):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return count / min(seconds)


@torch.inference_mode()
def speeds(model, tokenizer, texts: list[str], passes: int, fast: bool) -> dict[str, float]:
    """Of the model in batches of 64 documents of similar length, of the tokenizer, and of both."""
    limit = model.config.max_tokens(tokenizer)
    ids = sorted(tokenizer(texts, truncation=True, max_length=limit)["input_ids"], key=len)
    batches = [
        tokenizer.pad({"input_ids": ids[start : start + 64]}, return_tensors="pt") for start in range(0, len(ids), 64)
    ]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    pipe = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    found = {"model": best_speed(len(ids), lambda: [model(**batch) for batch in batches], passes)}
    if fast:
        found["pipeline"] = best_speed(len(ids), lambda: pipe(texts, batch_size=64), passes)
    found["tokenizer"] = best_speed(len(ids), lambda: tokenizer(texts, truncation=True, max_length=limit), passes)
    words, label = WordCache(tokenizer), FastLabeler(model, tokenizer)
    found["words looked up"] = best_speed(len(ids), lambda: words(texts, limit), passes)
    found["text to labels"] = best_speed(len(ids), lambda: list(label(texts)), passes)
    return found


def measure(options) -> None:
    torch.set_num_threads(1)
    teacher = SepMldcForMultiLabelClassification.from_pretrained(options.teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    documents, texts = read(options, teacher.config, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        bf16 = is_bfloat16_native(use_cpu=True)
        args = distillation_arguments(folder, use_cpu=True, bf16=bf16, disable_tqdm=True, **options.arguments)
        start = time.process_time()
        student = distill(
            teacher, tokenizer, documents["train"], documents["validation"], args, hidden_size=options.hidden_size
        )
        seconds = time.process_time() - start
        models = {"teacher": teacher, "student": student}
        quality_of, by_document = {}, {}
        for name, model in models.items():
            quality_of[name], by_document[name] = ndcg_by_document(model, documents["test"], tokenizer, folder)
        if options.save:
            student.save_pretrained(options.save)
            tokenizer.save_pretrained(options.save)
    difference = 100 * (by_document["student"] - by_document["teacher"])
    draws = np.random.default_rng(0).integers(0, len(difference), (1000, len(difference)))
    interval = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
    few = texts[: options.speed]
    result = {
        "teacher_documents": teacher.config.num_train_documents,
        "labels": teacher.config.num_labels,
        "documents": len(documents["train"]),
        "hidden_size": student.config.hidden_size,
        "cpu_seconds": seconds,
        "metrics": quality_of,
        "ndcg@5_difference": [float(difference.mean()), *map(float, interval)],
        "documents_per_second": {
            "teacher": speeds(teacher, tokenizer, few[: options.speed // 8], 1, fast=False),
            "student": speeds(student, tokenizer, few, options.passes, fast=True),
        },
        "megabytes": {
            name: sum(4e-6 * v.numel() for v in model.state_dict().values()) for name, model in models.items()
        },
    }
    print(json.dumps(result, indent=2))
    if options.output:
        path = Path(options.output)
        kept = json.loads(path.read_text()) if path.exists() else {}
        name = Path(options.data).name + ("" if options.hidden_size is None else f", {options.hidden_size} wide")
        write_json(path, {**kept, name: result})


def report(path: Path) -> None:
    """Two tables in Markdown."""
    results = json.loads(path.read_text())
    print("| data | labels | documents | nDCG@5 teacher | student | difference | micro F1 teacher | student |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in results.items():
        one, other = found["metrics"]["teacher"], found["metrics"]["student"]
        mean, low, high = found["ndcg@5_difference"]
        print(
            f"| {name} | {found['labels']:,} | {found['documents']:,} | {one['ndcg@5']:.1f} | {other['ndcg@5']:.1f} | "
            f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) | {one.get('f1_micro', float('nan')):.1f} | {other.get('f1_micro', float('nan')):.1f} |"
        )
    print(f"\n| documents per second | {' | '.join(SPEEDS)} |\n|---|{'---|' * len(SPEEDS)}")
    for name, found in results.items():
        for kind, values in found["documents_per_second"].items():
            cells = (f"{values[speed]:,.0f}" if speed in values else "" for speed in SPEEDS)
            print(f"| {name}, {kind} | {' | '.join(cells)} |")


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        return report(Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=1500)
    parser.add_argument("--speed", type=int, default=512)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=None)
    parser.add_argument("--arguments", type=json.loads, default={}, help="training arguments, as JSON")
    parser.add_argument("--save", default=None, help="folder for the student")
    parser.add_argument("--output", default=str(RESULTS))
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
