#!/usr/bin/env python
"""
Resident memory while a stream of documents that does not fit into memory passes through the data loading of a training run.

    python benchmarks/streaming.py --documents 5000000
    python benchmarks/streaming.py --smoke

Random documents (their words follow Zipf's law) are generated one by one, tokenized and label-encoded on the fly by
the functions of run_mldc.py, shuffled in a buffer, collated and batched by SepMldcTrainer's own loader. The first steps train
a tiny model; after them the loader runs alone, because the data path is what could hold on to documents. Memory is read at
every tenth of the way and must not grow by more than `--tolerance_mib` after the first.
"""

import argparse
import itertools
import json
import platform
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import BertConfig, BertTokenizer

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.data import encode_labels, tokenize


RESULTS = Path(__file__).parent / "results"
VOCABULARY = 2000
CHUNK = 10_000


def random_documents(count: int, words: int, num_labels: int):
    """`{"text", "labels"}` one after another; a document's text holds a word of each of its labels."""
    rng = np.random.default_rng(0)
    names = np.array([f"word{number}" for number in range(VOCABULARY)])
    made = 0
    while made < count:
        drawn = names[rng.zipf(1.3, size=(CHUNK, words)) % VOCABULARY].tolist()
        labels = (rng.zipf(1.5, size=(CHUNK, 2)) % num_labels).tolist()
        for row, ids in itertools.islice(zip(drawn, labels), count - made):
            yield {"text": " ".join(row), "labels": [f"label{number}" for number in dict.fromkeys(ids)]}
        made += CHUNK


def make_stream(options, tokenizer) -> datasets.IterableDataset:
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.List(datasets.Value("string"))})
    stream = datasets.IterableDataset.from_generator(
        random_documents,
        features=features,
        gen_kwargs={"count": options.documents, "words": options.words, "num_labels": options.labels},
    )
    stream = encode_labels(stream, {f"label{number}": number for number in range(options.labels)})
    if options.shuffle_buffer_size:
        stream = stream.shuffle(seed=0, buffer_size=options.shuffle_buffer_size)
    return tokenize(stream, tokenizer, max_length=64)


def make_trainer(options) -> SepMldcTrainer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(VOCABULARY))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=64)
    backbone = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=len(words)
    )
    model = SepMldcForMultiLabelClassification(SepMldcConfig(backbone_config=backbone, num_labels=options.labels))
    arguments = SepMldcTrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        label_encoding="embedding",
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return SepMldcTrainer(model, arguments, train_dataset=make_stream(options, tokenizer), processing_class=tokenizer)


def resident_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(options) -> dict:
    trainer = make_trainer(options)
    trainer.train()
    start = time.perf_counter()
    seen, samples = 0, []
    for batch in trainer.get_train_dataloader():
        seen += len(batch["labels"])
        while len(samples) < 10 and seen >= (len(samples) + 1) * options.documents // 10:
            samples.append(resident_mib())
            print(f"{seen:>10} documents{samples[-1]:>10.1f} MiB{time.perf_counter() - start:>8.0f} s", flush=True)
    seconds = time.perf_counter() - start
    assert seen == options.documents, f"{seen} of {options.documents} documents came out of the loader"
    return {
        "documents": seen,
        "seconds": seconds,
        "documents_per_second": seen / seconds,
        "resident_mib_at_each_tenth": samples,
        "growth_mib_after_the_first_tenth": max(samples) - samples[0],
        "training_steps": trainer.state.global_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--words", type=int, default=30, help="words per document")
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="training steps before the loader runs alone")
    parser.add_argument("--shuffle_buffer_size", type=int, default=10_000, help="0: file order")
    parser.add_argument("--tolerance_mib", type=float, default=50.0)
    parser.add_argument("--smoke", action="store_true", help="few documents: only checks that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.documents, options.words, options.steps, options.shuffle_buffer_size = 2000, 8, 2, 100
    result = measure(options)
    if options.smoke:
        assert len(result["resident_mib_at_each_tenth"]) == 10 and result["training_steps"] == 2
        return
    print(f"{result['documents_per_second']:.0f} documents/s")
    path = RESULTS / "streaming.json"
    settings = {
        "settings": vars(options),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "datasets": datasets.__version__,
    }
    path.write_text(json.dumps({**settings, "result": result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.name}")
    growth = result["growth_mib_after_the_first_tenth"]
    assert growth < options.tolerance_mib, f"resident memory grew by {growth:.0f} MiB after the first tenth"


if __name__ == "__main__":
    main()
