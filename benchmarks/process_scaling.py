#!/usr/bin/env python
"""
Training speed of 1, 2 and 4 gloo processes of one thread each, and whether they compute the same as one process.

    python benchmarks/process_scaling.py                    # a MiniLM-sized random BERT, both label encodings
    python benchmarks/process_scaling.py --small            # a two-layer encoder
    python benchmarks/process_scaling.py --smoke            # tiny, 1 and 2 processes: checks the equality, not the speed

Each process has `--batch_size` documents per step (weak scaling), in documents per second; efficiency is documents/s over
processes times the documents/s of one. Processes beyond the number of cores share them, so their efficiency is meaningless.
Equality is checked separately, without dropout: N processes whose batches add up to the global batch log the
losses, classification and contrastive, that one process logs with all of it.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from transformers import BertConfig, BertTokenizer, TrainerCallback

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments


RESULTS = Path(__file__).parent / "results"
TERMS = ("loss", "classification_loss", "label_contrastive_loss", "document_contrastive_loss")
CHECK_STEPS = 3
SIZES = {  # hidden size, layers, heads, intermediate size, vocabulary
    "minilm": (384, 6, 12, 1536, 30522),
    "small": (128, 2, 2, 512, 8000),
    "tiny": (32, 1, 2, 64, 500),
}


class StepClock(TrainerCallback):
    """Start and end of the steps after the first `warmup`."""

    def __init__(self, warmup: int):
        self.warmup, self.start, self.end = warmup, None, None

    def on_step_end(self, args, state, control, **kwargs):
        self.end = time.perf_counter()
        if state.global_step == self.warmup:
            self.start = self.end


def make_model(size: str, num_labels: int, dropout: float) -> SepMldcForMultiLabelClassification:
    hidden, layers, heads, intermediate, vocabulary = SIZES[size]
    backbone = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    model = SepMldcForMultiLabelClassification(
        SepMldcConfig(backbone_config=backbone, num_labels=num_labels, classifier_dropout=dropout)
    )
    model.set_label_embeddings(torch.randn(num_labels, hidden))
    return model


def make_documents(size: str, count: int, length: int, num_labels: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, SIZES[size][-1], (count, length), generator=generator).tolist()
    rates = (2.5 / torch.arange(1, num_labels + 1)).clamp(max=0.6)
    labels = torch.rand(count, num_labels, generator=generator) < rates
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * length] * count,
            "label_indices": [row.nonzero().flatten().tolist() for row in labels],
        }
    )


def make_trainer(task: dict, batch_size: int, steps: int, dropout: float, callbacks=()) -> SepMldcTrainer:
    size, num_labels = task["size"], task["labels"]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(SIZES[size][-1] - 5))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=512)
    arguments = SepMldcTrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        label_encoding=task["label_encoding"],
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        label_loss_weight=0.01,
        document_loss_weight=0.01,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        # No parameter is left out of the loss, so DDP need not search for one in every step.
        ddp_find_unused_parameters=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SepMldcTrainer(
        make_model(size, num_labels, dropout),
        arguments,
        train_dataset=make_documents(size, batch_size * world_size * steps, task["length"], num_labels),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(12, 30, (num_labels,), generator=generator).tolist()
    if trainer.label_schedule is not None:
        trainer.label_schedule.label_inputs = {
            "input_ids": [torch.randint(5, len(words), (count,), generator=generator).tolist() for count in lengths],
            "pad_token_id": 0,
        }
    return trainer


def work(task: dict) -> None:
    """The work of each process; the first one writes its results to `task["output"]`."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    assert processes == task["processes"], f"{processes} processes started, but {task['processes']} were requested"
    result: dict = {}
    for encoding in task["encodings"]:
        task["label_encoding"] = encoding
        check = make_trainer(task, task["global_batch"] // processes, CHECK_STEPS, dropout=0.0)
        check.train()
        logged = [row for row in check.state.log_history if "loss" in row]
        clock = StepClock(task["warmup"])
        timed = make_trainer(task, task["batch_size"], task["warmup"] + task["steps"], dropout=0.1, callbacks=[clock])
        timed.train()
        documents = task["batch_size"] * processes * task["steps"]
        result[encoding] = {
            "losses": {name: [row[name] for row in logged] for name in TERMS},
            "documents_per_second": documents / (clock.end - clock.start),
        }
    if dist.is_initialized():
        dist.barrier()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(task["output"]).write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(task: dict, processes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        output = Path(folder) / "result.json"
        task = {**task, "processes": processes, "output": str(output)}
        command = [sys.executable, __file__, "--work", json.dumps(task)]
        if processes > 1:
            # Not `accelerate launch --cpu`: it starts one process and leaves the others to mpirun.
            where = ["--master_addr", "127.0.0.1", "--master_port", port]
            command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *where]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{processes} processes failed:\n{done.stderr[-3000:]}")
        return json.loads(output.read_text(encoding="utf-8"))


def largest_difference(found: dict, expected: dict) -> float:
    """The largest difference of a logged loss, relative to the expected one or to 1, whichever is larger."""
    return max(
        abs(a - b) / max(abs(b), 1.0) for name in TERMS for a, b in zip(found[name], expected[name], strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--encodings", nargs="+", default=["embedding", "encoder"])
    parser.add_argument("--labels", type=int, default=76)
    parser.add_argument("--batch_size", type=int, default=16, help="documents per process and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per document")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the losses against those of one process")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--work", type=json.loads, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        return work(options.work)
    size = "tiny" if options.smoke else "small" if options.small else "minilm"
    if options.smoke:
        options.processes, options.labels, options.batch_size, options.length = [1, 2], 6, 4, 8
        options.steps, options.warmup = 1, 1
    if options.processes[0] != 1:
        parser.error(
            f"`--processes` starts with {options.processes[0]}, but the others are compared with 1. Begin with 1."
        )
    shared = {
        name: getattr(options, name) for name in ("encodings", "labels", "batch_size", "length", "steps", "warmup")
    }
    task = {**shared, "size": size, "global_batch": max(options.processes) * 4}

    rows, first = [], {}
    for processes in options.processes:
        for encoding, entry in launch(task, processes).items():
            one = first.setdefault(encoding, entry)
            rows.append(
                {
                    "label_encoding": encoding,
                    "processes": processes,
                    "documents_per_second": entry["documents_per_second"],
                    "efficiency": entry["documents_per_second"] / one["documents_per_second"] / processes,
                    "largest_loss_difference": largest_difference(entry["losses"], one["losses"]),
                }
            )
    wrong = [row for row in rows if not row["largest_loss_difference"] <= options.tolerance]
    assert not wrong, f"losses differ from those of one process: {wrong}"
    if options.smoke:
        assert len(rows) == len(options.processes) * len(options.encodings)
        return
    print(f"{'encoding':<12}{'processes':>10}{'documents/s':>13}{'efficiency':>12}{'loss difference':>17}")
    for row in rows:
        print(
            f"{row['label_encoding']:<12}{row['processes']:>10}{row['documents_per_second']:>13.1f}"
            f"{row['efficiency']:>12.2f}{row['largest_loss_difference']:>17.1e}"
        )
    settings = {name: value for name, value in vars(options).items() if name != "work"}
    result = {
        "settings": {**settings, "size": size},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread per process",
        "torch": torch.__version__,
        "rows": rows,
    }
    path = RESULTS / "process_scaling.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
