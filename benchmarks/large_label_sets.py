#!/usr/bin/env python
"""
Time and memory by number of labels: losses, head, loss of the head, metrics, collator and checkpoint, up to the size of
Amazon-670K, on random labels with a Zipf tail (5.45 labels per document, as there). The encoder is left out: its
cost does not depend on the number of labels.

    python benchmarks/large_label_sets.py --labels 76 3201 100000 670000

Each number of labels is measured in a separate process; memory is the increase of that process's peak. The following is
measured in further processes: the classification loss with its gradient: at once with float labels, and in chunks of labels with labels
of one byte; and the best ten labels of a batch: of all logits, and in chunks of labels. Writes
benchmarks/results/large_label_sets.json and, with matplotlib, a plot next to it.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from training_speed import peak_mib
from transformers import BertConfig, BertTokenizer

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification, classification_loss_sep_mldc
from modeling_sep_mldc.classification_loss_sep_mldc import multi_label_loss
from modeling_sep_mldc.label_table_sep_mldc import LabelTable, attention_weights
from trainer import SepMldcDataCollator
from trainer.losses import document_contrastive_loss, label_contrastive_loss, present_labels
from trainer.metrics import StreamingMetrics


RESULTS = Path(__file__).parent / "results"
LABELS_A_DOCUMENT = 5.45
LOSSES = ("bce", "softmax", "bce+softmax")
CLASSIFIERS = ("mlp", "similarity")


def median_seconds(function, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def documents(num_labels: int, batch_size: int, rng) -> list[list[int]]:
    """Label ids with Zipf frequencies; id = rank."""
    sizes = np.maximum(rng.poisson(LABELS_A_DOCUMENT, batch_size), 1)
    rows = []
    for size in sizes:
        ranks = np.exp(rng.random(4 * size) * np.log(num_labels)).astype(int) - 1
        rows.append(sorted(set(np.clip(ranks, 0, num_labels - 1).tolist()))[: int(size)])
    return rows


def measure(num_labels: int, options, pipe) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    d, size = options.hidden_size, options.batch_size
    label_ids = documents(num_labels, size, rng)
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    collator = SepMldcDataCollator(tokenizer, num_labels, label_dtype=torch.uint8)
    features = [{"input_ids": [2, 3], "attention_mask": [1, 1], "label_indices": ids} for ids in label_ids]
    row = {"labels": num_labels, "seconds": {}, "mib": {}}

    def part(name: str, function, repeats: int = 3) -> None:
        before = peak_mib()
        row["seconds"][name] = median_seconds(function, repeats)
        row["mib"][name] = peak_mib() - before

    part("collator", lambda: collator(features))
    labels = collator(features)["labels"]
    embeds = torch.randn(size, d, requires_grad=True)
    rows = torch.randn(len(present_labels(labels)), d, requires_grad=True)

    def losses():
        present = present_labels(labels)
        (label_contrastive_loss(rows, labels[:, present]) + document_contrastive_loss(embeds, labels)).backward()

    part("contrastive losses", losses)

    metrics = StreamingMetrics(
        num_labels, label_counts=np.maximum(1e5 / np.arange(1, num_labels + 1), 1).astype(int), num_documents=490_449
    )
    scores = torch.randn(size, num_labels)
    part("metrics of a batch", partial(metrics.update, scores, labels))

    tiny = BertConfig(hidden_size=d, num_hidden_layers=1, num_attention_heads=4, intermediate_size=d, vocab_size=64)
    for classifier in CLASSIFIERS:
        model = SepMldcForMultiLabelClassification(
            SepMldcConfig(backbone_config=tiny, num_labels=num_labels, classifier=classifier)
        )
        torch.nn.init.normal_(model.label_embeddings)
        parameters = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))

        def head(model=model):
            # What forward does after the encoder (Eq. 16-19), with constant label embeddings.
            table = LabelTable(model.label_embeddings)
            attention = attention_weights(table.products(embeds))
            logits = model.classifier(torch.cat([table.mix(attention), embeds], dim=-1), table.products)
            multi_label_loss(logits, labels, "bce").backward()
            model.zero_grad()

        part(f"head and loss, {classifier}", head)
        row[f"{classifier}_parameters"] = parameters
        if classifier == "similarity":
            with tempfile.TemporaryDirectory() as folder:
                part("save a checkpoint", partial(model.save_pretrained, folder), 1)
                part("load a checkpoint", partial(SepMldcForMultiLabelClassification.from_pretrained, folder), 1)
                row["checkpoint_mib"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 2**20
    row["peak_mib"] = peak_mib()
    pipe.send(row)


def measure_loss(num_labels: int, options, pipe, way: str, kind: str) -> None:
    """Classification loss and gradient of float32 logits (B, L), which exist beforehand, as do the labels."""
    torch.manual_seed(0)
    logits = torch.randn(options.batch_size, num_labels).requires_grad_()
    labels = torch.zeros(logits.shape, dtype=torch.uint8 if way == "chunked" else torch.float32)
    for row, ids in zip(labels, documents(num_labels, options.batch_size, np.random.default_rng(0))):
        row[ids] = 1
    classification_loss_sep_mldc.LOSS_CHUNK_SIZE = (
        classification_loss_sep_mldc.LOSS_CHUNK_SIZE if way == "chunked" else logits.numel()
    )

    def loss():
        logits.grad = None
        multi_label_loss(logits, labels, kind).backward()

    part_in_own_process(pipe, loss)


def measure_top_k(num_labels: int, options, pipe, way: str, classifier: str) -> None:
    """The best ten labels of documents of two tokens, with label attention."""
    torch.manual_seed(0)
    d = options.hidden_size
    tiny = BertConfig(hidden_size=d, num_hidden_layers=1, num_attention_heads=4, intermediate_size=d, vocab_size=64)
    config = SepMldcConfig(backbone_config=tiny, num_labels=num_labels, classifier=classifier)
    model = SepMldcForMultiLabelClassification(config).eval()
    torch.nn.init.normal_(model.label_embeddings)
    input_ids = torch.full((options.batch_size, 2), 2)

    @torch.no_grad()
    def top_k():
        return model.predict_top_k(input_ids) if way == "chunked" else model(input_ids).logits.topk(10)

    part_in_own_process(pipe, top_k)


def part_in_own_process(pipe, function) -> None:
    before = peak_mib()
    taken = median_seconds(function, 3)
    pipe.send((taken, peak_mib() - before))


def run(context, target, *arguments):
    """What `target` sends through its pipe, from a separate process."""
    receiver, sender = context.Pipe(duplex=False)
    num_labels, options, *rest = arguments
    process = context.Process(target=target, args=(num_labels, options, sender, *rest))
    process.start()
    while not receiver.poll(1):
        if not process.is_alive():
            raise SystemExit(f"the process for {num_labels} labels ended with exit code {process.exitcode}")
    answer = receiver.recv()
    process.join()
    return answer


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    sizes = [row["labels"] for row in rows]
    for name in (name for name in rows[0]["seconds"] if not name.endswith(("whole", "chunked"))):
        axes[0].loglog(sizes, [row["seconds"][name] for row in rows], marker="o", label=name)
    axes[0].set(xlabel="labels", ylabel="seconds per call", title="Time")
    axes[0].legend(fontsize=7)
    axes[1].loglog(sizes, [row["peak_mib"] for row in rows], marker="o")
    axes[1].set(xlabel="labels", ylabel="MiB", title="Peak memory of the process")
    figure.tight_layout()
    figure.savefig(RESULTS.parents[1] / "docs" / "large_label_sets.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--labels", type=int, nargs="+", default=[76, 3201, 100_000, 670_000])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.labels, options.hidden_size = [500], 16
    rows = []
    context = multiprocessing.get_context("spawn")
    for num_labels in options.labels:
        rows.append(run(context, measure, num_labels, options))
        row = rows[-1]
        print(f"\n{num_labels:,} labels, peak {row['peak_mib']:.0f} MiB, checkpoint {row['checkpoint_mib']:.0f} MiB")
        for name, value in row["seconds"].items():
            print(f"  {name:<28}{1000 * value:>10.1f} ms{row['mib'][name]:>10.0f} MiB more")
        for target, variants in ((measure_loss, LOSSES), (measure_top_k, CLASSIFIERS)):
            # A process takes seconds to start: the quick run tries one of each.
            for variant in variants[-1:] if options.smoke else variants:
                for way in ("whole", "chunked"):
                    name = f"{target.__name__.removeprefix('measure_')}, {variant}, {way}"
                    taken, mib = run(context, target, num_labels, options, way, variant)
                    row["seconds"][name], row["mib"][name] = taken, mib
                    print(f"  {name:<28}{1000 * taken:>10.1f} ms{mib:>10.0f} MiB more")
        if not options.smoke:  # after each number of labels, because the last one takes longest
            settings = {**vars(options), "threads": torch.get_num_threads()}
            content = json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n"
            (RESULTS / "large_label_sets.json").write_text(content, encoding="utf-8")
            draw(rows)
    assert [row["labels"] for row in rows] == options.labels


if __name__ == "__main__":
    main()
