"""Tiny documents and trainers that the tests share: training for a few steps takes about a second."""

import copy
import functools

import datasets
import numpy as np
from tiny_models import tiny_model, tiny_tokenizer

from trainer import SepMldcTrainer, SepMldcTrainingArguments


NUM_LABELS = 6


def tiny_documents(count=24, seed=0):
    """Token ids with labels; label l makes token 10 + l frequent, so that there is something to learn."""
    return copy.copy(_tiny_documents(count, seed))


@functools.cache
def _tiny_documents(count, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        labels = sorted(rng.choice(NUM_LABELS, size=rng.integers(1, 3), replace=False).tolist())
        tokens = rng.choice([10 + label for label in labels], size=rng.integers(4, 12)).tolist()
        ids = [2, *tokens, 3]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "label_indices": labels, "length": len(ids)})
    return datasets.Dataset.from_list(rows)


def make_trainer(folder, model=None, documents=None, evaluation=None, callbacks=None, **arguments):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "label_encoding": "encoder",
        "labels_per_step": 4,
        "label_loss_weight": 0.01,
        "document_loss_weight": 0.01,
        **arguments,
    }
    settings.setdefault("head_learning_rate", settings["learning_rate"])
    return SepMldcTrainer(
        model=tiny_model(num_labels=NUM_LABELS) if model is None else model,
        args=SepMldcTrainingArguments(str(folder), **settings),
        train_dataset=tiny_documents() if documents is None else documents,
        eval_dataset=tiny_documents(10, seed=1) if evaluation is None else evaluation,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def batch_of(trainer, indices=range(8)):
    return trainer.data_collator([trainer.train_dataset[i] for i in indices])


def trained_trainer(tmp_path, **model_kwargs):
    model = tiny_model(num_labels=NUM_LABELS, **model_kwargs)
    trainer = make_trainer(tmp_path, model=model, documents=tiny_documents(200), max_steps=60, learning_rate=5e-3)
    trainer.train()
    return trainer
