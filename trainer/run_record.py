"""What a checkpoint records of its run: the sum of its losses, and a fingerprint that is compared when a run is resumed."""

import hashlib
import json
import os
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.utils import CONFIG_NAME, logging

from .adapters import lora_rank


logger = logging.get_logger(__name__)

# Resuming is an error if these fields of the configuration differ.
MODEL_FIELDS = ("pooling", "classification_loss", "class_weights", "classifier", "label_attention", "token_attention")
# Resuming causes a warning if these arguments differ.
ARGUMENTS = (
    "seed",
    "data_seed",
    "learning_rate",
    "head_learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "label_loss_weight",
    "document_loss_weight",
    "contrastive_temperature",
    "contrastive_weighting",
    "label_encoding",
    "labels_per_step",
    "max_label_length",
    "train_sampling_strategy",
    "group_by_label_set",
)
NUM_SAMPLED_DOCUMENTS = 1000


class RunRecord(TrainerCallback, ExportableState):
    """
    Saved with each checkpoint as part of `trainer_state.json`.

    Attributes:
        loss_sum (`float`): sum of the losses of all steps so far, across interruptions.
        fingerprint (`dict`): see [`run_fingerprint`].
    """

    def __init__(self):
        self.loss_sum = 0.0
        self.fingerprint: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Set here, because `model_init` creates a new model when training begins.
        model.config.drop_guarantee("the model is trained")

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"loss_sum": self.loss_sum, "fingerprint": self.fingerprint}}


class RestoreCallbacks(TrainerCallback):
    """
    Restores the counters of callbacks in a resumed run, such as the patience counter of early stopping.

    `restore_callback_states_from_checkpoint` of transformers replaces the callbacks by new ones with the checkpoint's arguments, so that a
    patience that was increased for the resumed run would be ignored. Here, callbacks keep the arguments they were created with.
    """

    def __init__(self):
        self.callbacks: list[TrainerCallback] = []

    def on_train_begin(self, args, state, control, **kwargs):
        for callback in self.callbacks:
            if not isinstance(callback, ExportableState):
                continue
            # transformers cannot save a callback that is not in the checkpoint.
            stored = state.stateful_callbacks.setdefault(type(callback).__name__, {})
            if not isinstance(stored, dict) or isinstance(callback, (RunRecord, TrainerControl)):
                continue
            for name, value in stored.get("attributes", {}).items():
                setattr(callback, name, value)


class EpochOrder(TrainerCallback):
    """
    Sets the epoch of a sampler, computed from the global step: accelerate's loader does not pass it on when it skips the batches of a
    resumed epoch.
    """

    def __init__(self):
        self.sampler: Any = None
        self._epoch = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if self.sampler is not None:
            self._epoch = state.global_step // max(-(-len(train_dataloader) // args.gradient_accumulation_steps), 1)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(self._epoch)
            self._epoch += 1


def run_fingerprint(model: Any, args: Any, train_dataset: Any) -> dict[str, Any]:
    """
    A fingerprint of everything that the result of a run depends on.

    Args:
        model (`SepMldcForMultiLabelClassification`): its label texts and settings.
        args (`SepMldcTrainingArguments`): see `ARGUMENTS`; the batch size counts all processes and accumulated batches.
        train_dataset (`Dataset`, *optional*): its length and up to 1,000 evenly spaced documents; for a stream, the numbers of documents
            in all and per label, from the configuration.

    Returns:
        `dict`: `"label_texts"` (digest), `"model"`, `"arguments"` (values by name), `"documents"` (number and digest).
    """
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    values = {name: getattr(args, name, None) for name in ARGUMENTS}
    config = model.config
    settings = {name: getattr(config, name) for name in MODEL_FIELDS} | {"lora_rank": lora_rank(model)}
    settings["token_attention_size"] = config.token_attention_size if config.token_attention else None
    return {
        "label_texts": _digest(config.label_texts),
        "model": settings,
        "arguments": {name: getattr(value, "value", value) for name, value in values.items()}
        | {"batch size": batch_size},
        "documents": _documents(train_dataset, config),
    }


def read_record(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """`loss_sum` and `fingerprint` of a checkpoint; empty for one saved by version 0.1 or by another trainer."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            stored = json.load(file)["stateful_callbacks"][RunRecord.__name__]["attributes"]
        return {"loss_sum": float(stored["loss_sum"]), "fingerprint": dict(stored["fingerprint"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_same_run(checkpoint: str | os.PathLike, labels: list[str], fingerprint: dict[str, Any]) -> None:
    """
    Compare a checkpoint with the run that resumes from it. Different documents or arguments cause a warning.

    Args:
        checkpoint (`str`): folder of the checkpoint.
        labels (`list[str]`): label names of this run, in order.
        fingerprint (`dict`): fingerprint of this run, see [`run_fingerprint`].

    Raises:
        ValueError: the checkpoint differs in its labels, their order, their texts, or the model settings.
    """
    _check_labels(checkpoint, labels)
    stored = read_record(checkpoint).get("fingerprint", {})
    if stored.get("label_texts", fingerprint["label_texts"]) != fingerprint["label_texts"]:
        raise ValueError(
            f"{checkpoint} was trained with different label descriptions from those of this run. Resume with the same descriptions, or "
            "start a new run without `resume_from_checkpoint`."
        )
    settings = _differences(stored.get("model", {}), fingerprint["model"])
    if settings:
        raise ValueError(
            f"{checkpoint} belongs to a model with different settings from this run: {settings}. Resume with the same settings, or "
            "start a new run without `resume_from_checkpoint`."
        )
    # Converted through JSON, like the stored ones.
    arguments = _differences(
        stored.get("arguments", {}), json.loads(json.dumps(fingerprint["arguments"], default=str))
    )
    if arguments:
        logger.warning(
            f"{checkpoint} was trained with different arguments from this run: {arguments}. The run continues with the new ones."
        )
    if (stored.get("documents") or fingerprint["documents"]) != fingerprint["documents"]:
        logger.warning(
            f"{checkpoint} was trained on different documents from those of this run. The run continues with the new ones, at the same position."
        )


def _check_labels(checkpoint: str | os.PathLike, labels: list[str]) -> None:
    try:
        with open(os.path.join(checkpoint, CONFIG_NAME), encoding="utf-8") as file:
            stored = json.load(file).get("id2label")
    except (OSError, ValueError):
        return  # loading the weights will report what is wrong
    if not isinstance(stored, dict):
        return
    names = [name for _, name in sorted(stored.items(), key=lambda item: int(item[0]))]
    if len(names) != len(labels):
        raise ValueError(
            f"{checkpoint} has {len(names)} labels, but this run has {len(labels)}. Resume with the same labels, or start a new run "
            "without `resume_from_checkpoint`."
        )
    different = [index for index, (old, new) in enumerate(zip(names, labels)) if old != new]
    if different:
        first = different[0]
        raise ValueError(
            f"{checkpoint} has different labels from this run, or a different order: label {first} is {names[first]!r} there and "
            f"{labels[first]!r} here ({len(different)} of {len(labels)} differ). Resume with the same labels, or start a new run "
            "without `resume_from_checkpoint`."
        )


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> str:
    pairs = [(name, stored[name], value) for name, value in current.items() if name in stored]
    return ", ".join(f"`{name}` {old!r} then, {new!r} now" for name, old, new in pairs if old != new)


def _documents(dataset: Any, config: Any) -> list | None:
    if dataset is None:
        return None
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return [config.num_train_documents, _digest(config.label_counts)]
    count = len(dataset)
    step = max(count // NUM_SAMPLED_DOCUMENTS, 1)
    sample = []
    for index in range(0, count, step):
        document = dataset[index]
        values = (document[name] for name in ("input_ids", "label_indices", "labels") if name in document)
        sample.append([value.tolist() if hasattr(value, "tolist") else value for value in values])
    return [count, _digest(sample)]


def _digest(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    ).hexdigest()[:32]
