#!/usr/bin/env python
"""
Would lexical scores be faster with an inverted index? CPU time per document of the margins of all labels, as the model
computes them (each label reads its own terms, for a batch of documents at once), and from postings (each term of a document reads the
labels that have a weight for it), next to the time of the whole prediction.

    python benchmarks/lexical_prediction.py --checkpoints usbills4k=FOLDER yso20k=FOLDER --files usbills4k=FILE yso20k=FILE

Checkpoints are outputs of `run_mldc.py` with lexical scores; files hold documents (.jsonl or .jsonl.gz of {"text"}). Both ways give the
same margins, which is checked. Times are the shortest of `--repeats`. Writes benchmarks/results/lexical_prediction.json.
"""

import argparse
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from scipy import sparse
from tasks import write_json
from transformers import AutoTokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.lexical_sep_mldc import present_term_weights
from trainer.devices import is_bfloat16_native


RESULT = Path(__file__).parent / "results" / "lexical_prediction.json"


def postings_of(lexical) -> sparse.csr_matrix:
    """The weights (terms, L), by term."""
    ids, weights = lexical.feature_ids.numpy(), lexical.feature_weights.float().numpy()
    labels = np.repeat(np.arange(len(ids)), ids.shape[1])
    matrix = sparse.csr_matrix((weights.ravel(), (ids.ravel(), labels)), shape=(len(lexical.idf), len(ids)))
    matrix.eliminate_zeros()
    return matrix


def margins_from_postings(lexical, postings: sparse.csr_matrix, batch) -> torch.Tensor:
    terms, row_of_term = present_term_weights(
        batch["input_ids"], batch["attention_mask"], lexical.idf, lexical.num_bigrams
    )
    present = row_of_term.nonzero().flatten().numpy()
    documents = sparse.csr_matrix(terms[1:].t().numpy())
    return torch.from_numpy((documents @ postings[present]).toarray()) + lexical.bias


def milliseconds(function, batches, repeats: int) -> float:
    """Milliseconds of CPU time per document."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for batch in batches:
            function(batch)
        times.append(time.process_time() - start)
    return 1000 * min(times) / sum(len(batch["input_ids"]) for batch in batches)


def measure(folder: str, file: str, options) -> dict:
    model = SepMldcForMultiLabelClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = datasets.load_dataset("json", data_files=file, split=f"train[:{options.documents}]")["text"]
    limit = model.config.max_tokens(tokenizer)
    batches = [
        tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=limit, return_tensors="pt")
        for i in range(0, len(texts), 32)
    ]
    lexical, postings = model.lexical, postings_of(model.lexical)

    def of_labels(batch):
        return lexical.margins(batch["input_ids"], batch["attention_mask"])

    def of_terms(batch):
        return margins_from_postings(lexical, postings, batch)

    for batch in batches:
        torch.testing.assert_close(of_terms(batch), of_labels(batch), atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16_native(use_cpu=True)):
        whole = milliseconds(lambda batch: model.predict_top_k(**batch), batches, 1)
    return {
        "labels": len(lexical.bias),
        "weights": int(postings.nnz),
        "tokens per document": float(np.mean([batch["attention_mask"].sum(1).float().mean() for batch in batches])),
        "by label": milliseconds(of_labels, batches, options.repeats),
        "by term": milliseconds(of_terms, batches, options.repeats),
        "whole prediction": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    for name in ("--checkpoints", "--files"):
        parser.add_argument(name, nargs="+", required=True, metavar="NAME=PATH")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = dict(pair.split("=", 1) for pair in options.files)
    rows = {}
    for name, folder in (pair.split("=", 1) for pair in options.checkpoints):
        rows[name] = measure(folder, files[name], options)
        print(name, rows[name], flush=True)
    write_json(RESULT, rows)


if __name__ == "__main__":
    main()
