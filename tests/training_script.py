"""Small training runs for the tests of several processes and of killed runs; used as a module and as a script."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tiny_models import tiny_model, tiny_tokenizer
from tiny_training import NUM_LABELS, tiny_documents
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from trainer import SepMldcTrainer, SepMldcTrainingArguments
from trainer.checkpoints import last_complete_checkpoint


# Global batch 8: 24 documents are three steps (or micro-steps) an epoch.
EQUIVALENCE = {
    "encoder": {"label_encoding": "encoder", "labels_per_step": NUM_LABELS},
    "encoder_capped": {"label_encoding": "encoder", "labels_per_step": 3},
    "encoder_capped_accumulated": {
        "label_encoding": "encoder",
        "labels_per_step": 3,
        "gradient_accumulation_steps": 2,
    },
    "embedding": {"label_encoding": "embedding"},
    "streamed": {"label_encoding": "encoder", "labels_per_step": 3, "stream": True, "group_by_label_set": False},
    "embedding_accumulated": {"label_encoding": "embedding", "gradient_accumulation_steps": 2},
}


class LossLog(TrainerCallback):
    """Appends (step, loss) of each step to a file, and may kill the process right after a step."""

    def __init__(self, path, kill_at=None):
        self.path, self.kill_at = path, kill_at

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            with open(self.path, "a") as file:
                file.write(json.dumps([state.global_step, logs["loss"]]) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at and state.is_world_process_zero:
            # The log of this very step has not been written yet: the run dies between two steps.
            os.kill(os.getpid(), signal.SIGKILL)


class Stream(IterableDataset):
    """Documents that are read one after another, padded to different lengths in different batches."""

    def __init__(self, documents):
        self.documents = documents

    def __iter__(self):
        return iter(self.documents)


def build(output_dir, dropout=0.0, callbacks=None, documents=24, stream=False, **settings):
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    args = SepMldcTrainingArguments(
        str(output_dir),
        **{
            "per_device_train_batch_size": 8 // world_size,
            "max_steps": 3,
            "learning_rate": 0.05,
            "optim": "sgd",
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "label_loss_weight": 0.5,
            "document_loss_weight": 0.5,
            "group_by_label_set": True,
            **settings,
        },
    )
    return SepMldcTrainer(
        model=tiny_model(
            num_labels=NUM_LABELS, hidden_dropout=dropout, attention_dropout=dropout, classifier_dropout=dropout
        ),
        args=args,
        train_dataset=Stream(tiny_documents(documents)) if stream else tiny_documents(documents),
        eval_dataset=tiny_documents(9, seed=3),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def run_equivalence(folder) -> dict:
    """Parameters, logged losses and evaluation of every scenario."""
    results = {}
    for name, settings in EQUIVALENCE.items():
        trainer = build(os.path.join(folder, name), **settings)
        trainer.train()
        state = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
        tables = [torch.zeros_like(state["label_embeddings"]) for _ in range(trainer.args.world_size)]
        if trainer.args.world_size > 1:
            torch.distributed.all_gather(tables, state["label_embeddings"])
            assert torch.equal(tables[0], tables[1]), "the processes hold different label embeddings"
        metrics = trainer.evaluate()
        output = trainer.predict(trainer.eval_dataset)
        results[name] = {
            "state": state,
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "metrics": {k: v for k, v in metrics.items() if "@" in k or "f1" in k},
            "predictions": torch.tensor(output.predictions[1]),
        }
    return results


# AdamW, because its state is sharded too; its weights are compared by what they compute, because it divides what rounding
# leaves of a zero gradient by its size.
SHARDED = {"sgd": {"optim": "sgd", "learning_rate": 0.05}, "adamw": {"optim": "adamw_torch", "learning_rate": 0.01}}


def run_sharded(folder, optimizer: str) -> dict:
    """
    Parameters, losses and logits of a run whose model `fully_shard` spreads over the processes; of one process, unsharded.

    accelerate refuses FSDP on a CPU, so its own wrapping is left out and the model is sharded before.
    """
    trainer = build(
        os.path.join(folder, f"sharded_{optimizer}"),
        label_encoding="embedding",
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
        **SHARDED[optimizer],
    )
    sharded = trainer.args.world_size > 1
    if sharded:
        for layer in trainer.model.backbone.encoder.layer:
            fully_shard(layer)
        # `True` is what FSDP configurations of accelerate ask for; the default would keep the root's parameters anyway.
        fully_shard(trainer.model, reshard_after_forward=True)
        trainer.accelerator.prepare_model = lambda model, **kwargs: model
        # Saving gathers the parameters through accelerate's FSDP plugin; only what the trainer does before is run here.
        trainer._save = lambda output_dir, **kwargs: os.makedirs(output_dir, exist_ok=True)
    trainer.train()
    state = trainer.model.state_dict()
    if sharded:
        assert isinstance(trainer.model.label_embeddings, DTensor)
        assert len(trainer.model.label_embeddings.to_local()) == NUM_LABELS // trainer.args.world_size
        state = {name: value.full_tensor() for name, value in state.items()}
    result = {
        "state": {name: value.detach().clone() for name, value in state.items()},
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "logits": torch.cat([batch.logits for batch in trainer.logit_batches()]),
    }
    if sharded:
        try:
            SepMldcTrainer(
                trainer.model,
                SepMldcTrainingArguments(folder, label_encoding="encoder", use_cpu=True, report_to=[]),
                processing_class=tiny_tokenizer(),
            )
        except ValueError as error:
            result["error"] = str(error)
    return result


def run_streamed(folder, **settings):
    """A trainer, trained for seven steps of one pass over a stream; resumes where there is a checkpoint."""
    trainer = build(
        folder,
        dropout=0.3,
        stream=True,
        documents=64,
        group_by_label_set=False,
        max_steps=7,
        save_strategy="steps",
        save_steps=4,
        **settings,
    )
    trainer.train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)
    return trainer


def run_resumable(folder, kill_at=None, kill_in_save=None, resume=False) -> None:
    """Seven steps of three an epoch, saved after the second, fourth and sixth."""
    log = LossLog(os.path.join(folder, "losses.jsonl"), kill_at)
    trainer = build(
        folder, dropout=0.3, callbacks=[log], max_steps=7, save_strategy="steps", save_steps=2, labels_per_step=3
    )
    if kill_in_save is not None:
        save = trainer._save_scaler

        def killed(output_dir):
            if trainer.state.global_step == kill_in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            save(output_dir)

        trainer._save_scaler = killed
    trainer.train(resume_from_checkpoint=True if resume else None)


def run_to_a_busy_end() -> None:
    """
    One step, and a prediction after which the worker threads of gloo get the processor last: the bad luck of a busy machine.
    Returning frees the model.
    """
    trainer = build(tempfile.mkdtemp(), max_steps=1, label_encoding="embedding")
    trainer.train()
    cpu = min(os.sched_getaffinity(0))
    workers = [
        int(thread)
        for thread in os.listdir("/proc/self/task")
        if "gloo" in Path(f"/proc/self/task/{thread}/comm").read_text()
    ]
    assert workers, "no worker thread of gloo was found"
    for worker in workers:
        os.sched_setscheduler(worker, os.SCHED_IDLE, os.sched_param(0))
        os.sched_setaffinity(worker, {cpu})
    busy = f"import os, time; os.sched_setaffinity(0, {{{cpu}}}); end = time.time() + 6\nwhile time.time() < end: pass"
    for _ in range(2):
        subprocess.Popen([sys.executable, "-c", busy])
    trainer.predict(trainer.eval_dataset)
    trainer.end()


def run_tasks(tasks: list[dict]) -> None:
    """What one of the processes does."""
    for step in tasks:
        if "equivalence" in step:
            results = run_equivalence(step["equivalence"])
            for optimizer in SHARDED:
                results[f"sharded_{optimizer}"] = run_sharded(step["equivalence"], optimizer)
            if int(os.environ.get("RANK", "0")) == 0:
                torch.save(results, os.path.join(step["equivalence"], "results.pt"))
        elif "busy_end" in step:
            run_to_a_busy_end()
        else:
            run_resumable(**step)
    if torch.distributed.is_initialized():
        # A process that leaves while another still talks to it would abort that one.
        torch.distributed.barrier()
        group = weakref.ref(torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()
        gc.collect()
        assert group() is not None, "the process group must not be freed before the process has ended"


def run_rank(tasks: list[dict], rank: int, processes: int, port: int) -> None:
    """`run_tasks` in a fork of the tests, as one of several processes."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # what the tests have set up for one process
    run_tasks(tasks)


if __name__ == "__main__":
    expected = os.environ["EXPECTED_PROCESSES"]
    assert os.environ.get("WORLD_SIZE", "1") == expected, f"{expected} processes were requested"
    run_tasks(json.loads(sys.argv[1]))
