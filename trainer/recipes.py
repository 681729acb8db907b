"""
Recommended settings, chosen from the data.

Settings that do not depend on the data come from the defaults of `SepMldcConfig` and `SepMldcTrainingArguments`. The rules are based on
`benchmarks/recipe_sweep.py`: many short runs on three data sets with 300 to 6,000 documents, compared on validation data. See
docs/settings.md for the measurements.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_sep_mldc.configuration_sep_mldc import (
    FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION,
    MANY_LABELS,
    SepMldcConfig,
    recommended_classifier,
    recommended_dropout,
    recommended_token_attention,
)

from .training_arguments import SMALL_DATASET, SepMldcTrainingArguments, recommended_head_learning_rate


RECIPES = ("best", "fast", "paper")
PAPER = "as in the paper"
# Several devices share a batch, but each gets at least this many documents.
FEWEST_PER_DEVICE = 8
FEWEST_STEPS = 300
# Maximum number of epochs: with very few documents, a run has fewer than `FEWEST_STEPS` steps.
MOST_EPOCHS = 40
EVALUATIONS = 6
# With fewer validation documents, selecting a checkpoint is mostly noise.
ENOUGH_VALIDATION = 300
LORA_LEARNING_RATE = 5e-4
NAMED = "specified by the user"
VALIDATION_SETTINGS = ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end")
# Which settings belong to the model (`from_backbone`); all others are training arguments or steps of `run_mldc.py`.
MODEL_SETTINGS = (
    "pooling",
    "classification_loss",
    "class_weights",
    "classifier",
    "classifier_dropout",
    "classifier_bias_init",
    "label_attention",
    "token_attention",
    "encoder_max_length",
    "backbone_dropout",
)
PIPELINE_SETTINGS = ("freeze_layers", "lexical_scores", "early_stopping_patience")


@dataclass(frozen=True)
class Setting:
    """A recommended value and the reason for it."""

    value: Any
    why: str


@dataclass(frozen=True)
class RecommendedSettings(Mapping[str, Any]):
    """
    What [`recommend_settings`] returns: a mapping of setting to value, with the reasons.

    Attributes:
        recipe (`str`): the name of the recipe.
        settings (`dict[str, Setting]`): values and reasons, in the order in which they are shown.
    """

    recipe: str
    settings: Mapping[str, Setting]

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def model(self) -> dict[str, Any]:
        """Keyword arguments of `SepMldcForMultiLabelClassification.from_backbone`."""
        return {name: self[name] for name in MODEL_SETTINGS if name in self.settings}

    @property
    def training(self) -> dict[str, Any]:
        """Keyword arguments of `SepMldcTrainingArguments`."""
        return {name: self[name] for name in self if name not in (*MODEL_SETTINGS, *PIPELINE_SETTINGS)}

    def rows(self) -> list[tuple[str, str, str]]:
        """The table "setting, value, why"."""
        return [(name, str(setting.value), setting.why) for name, setting in self.settings.items()]

    def table(self) -> list[str]:
        """The rows as lines of text in columns."""
        rows = [("setting", "value", "why"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {why}" for name, value, why in rows]

    def without(self, *names: str) -> "RecommendedSettings":
        """The settings without the given ones."""
        return RecommendedSettings(self.recipe, {k: v for k, v in self.settings.items() if k not in names})


def recommend_settings(
    num_documents: int,
    num_labels: int,
    *,
    document_lengths: Sequence[int] | np.ndarray | None = None,
    num_validation_documents: int = 0,
    num_pseudo_documents: int = 0,
    num_layers: int = 12,
    max_tokens: int = 512,
    device: str = "cpu",
    num_devices: int = 1,
    bf16: bool = False,
    recipe: str = "best",
    named: Mapping[str, Any] | None = None,
) -> RecommendedSettings:
    r"""
    Settings for a training run, as a pure function of the size of the data and the capabilities of the device.

    Args:
        num_documents (`int`): training documents, without pseudo-documents.
        num_labels (`int`): number of labels.
        document_lengths (`Sequence[int]`, *optional*): lengths of training documents, in tokens. A sample is enough.
        num_validation_documents (`int`, defaults to 0): documents with labels that are not trained on.
        num_pseudo_documents (`int`, defaults to 0): pseudo-documents to train on as well.
        num_layers (`int`, defaults to 12): layers of the encoder.
        max_tokens (`int`, defaults to 512): how many tokens the encoder can read.
        device (`str`, defaults to `"cpu"`): `"cpu"`, or a type of accelerator such as `"cuda"`.
        num_devices (`int`, defaults to 1): devices that train together, each on its own batches.
        bf16 (`bool`, defaults to `False`): whether the device computes in bfloat16 without emulation.
        recipe (`str`, defaults to `"best"`): `"best"`; `"fast"`, which trains only the classifier, on embeddings that are computed once; or
            `"paper"`, the settings of the SEP-MLDC paper.
        named (`dict[str, Any]`, *optional*): settings that the user specified. They take precedence, and settings that depend on them are
            adapted.

    Returns:
        [`RecommendedSettings`]: values and reasons. Its `model` and `training` are keyword arguments of `from_backbone` and
        `SepMldcTrainingArguments`.

    Raises:
        ValueError: a number that is too small, or an unknown recipe.

    Example:

    ```python
    >>> settings = recommend_settings(num_documents=1000, num_labels=400, num_validation_documents=100)
    >>> settings["classifier"], settings["num_train_epochs"], settings["freeze_layers"]
    ('mlp+similarity', 11.1, 8)
    >>> settings.settings["freeze_layers"].why
    'two thirds of the layers on a CPU: a third of the training time, about 1 point of nDCG@5 lower'

    ```
    """
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` is {recipe!r}, but it must be one of {', '.join(map(repr, RECIPES))}.")
    for name, value in (
        ("num_documents", num_documents),
        ("num_labels", num_labels),
        ("num_layers", num_layers),
        ("num_devices", num_devices),
    ):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but it must be at least 1.")
    named = named or {}
    settings = _with_named(_model_settings(num_documents, num_labels, recipe, named), named)
    settings |= _with_named(_encoder_settings(document_lengths, num_layers, max_tokens, device, recipe), named)
    settings |= _with_named(
        _optimizer_settings(
            num_documents, num_labels, num_devices, recipe, settings, adapters=named.get("lora_rank") is not None
        ),
        named,
    )
    batches = math.ceil(
        (num_documents + num_pseudo_documents) / (settings["per_device_train_batch_size"].value * num_devices)
    )
    settings |= _with_named(_validation_settings(batches, num_validation_documents, settings, named), named)
    if named.get("max_steps", -1) > 0:  # overrides the number of epochs
        del settings["num_train_epochs"]
        settings["max_steps"] = Setting(named["max_steps"], NAMED)
    why = "supported natively by the device" if bf16 else "the device would emulate it, which is slow"
    settings |= _with_named({"bf16": Setting(bf16, why)}, named)
    return RecommendedSettings(recipe, settings)


def _with_named(settings: dict[str, Setting], named: Mapping[str, Any]) -> dict[str, Setting]:
    return {name: Setting(named[name], NAMED) if name in named else one for name, one in settings.items()}


def _model_settings(num_documents: int, num_labels: int, recipe: str, named: Mapping[str, Any]) -> dict[str, Setting]:
    if recipe == "paper":
        return {
            "classifier": Setting("mlp", PAPER),
            "classification_loss": Setting("bce", f"{PAPER}, Eq. 19 read as binary cross-entropy"),
            "class_weights": Setting("none", PAPER),
            "classifier_dropout": Setting(0.5, PAPER),
            "classifier_bias_init": Setting("zero", PAPER),
            "label_attention": Setting(True, f"{PAPER}, Eq. 16-18"),
            "token_attention": Setting(False, "not in the paper"),
            "label_encoding": Setting("encoder", f"{PAPER}, Eq. 5"),
            # The paper's 0.01 is for a loss that is averaged over labels; here it is summed.
            "label_loss_weight": Setting(0.01 * num_labels, f"{PAPER}, β of Eq. 21: 0.01 per label"),
            "document_loss_weight": Setting(0.01 * num_labels, f"{PAPER}, γ of Eq. 21: 0.01 per label"),
            "lexical_scores": Setting(False, "not in the paper"),
        }
    classifier = Setting(
        recommended_classifier(num_labels), f"better than either part alone below {MANY_LABELS:,} labels"
    )
    if recipe == "fast":
        classifier = Setting("mlp+similarity", "works on fixed embeddings")
    elif classifier.value == "similarity":
        classifier = Setting("similarity", f"{MANY_LABELS:,} labels or more: +0.5 to +2 points of nDCG@5")
    kind = named.get("classifier", classifier.value)
    token_attention = Setting(True, "+0.2 to +6 points of nDCG@5, more with more labels")
    if not recommended_token_attention(num_labels, num_documents):
        few = num_documents <= FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION
        why = (
            f"needs more than {FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION:,} training documents"
            if few
            else "its cost grows with the number of labels"
        )
        token_attention = Setting(False, why)
    attends = bool(named.get("token_attention", token_attention.value))
    return {
        "classifier": classifier,
        "classification_loss": Setting(
            SepMldcConfig.classification_loss, "best P@1 at every data size, and calibrated probabilities"
        ),
        "class_weights": Setting(
            SepMldcConfig.class_weights, "thresholds are tuned anyway, and probabilities stay calibrated"
        ),
        "classifier_dropout": Setting(recommended_dropout(kind, attends), _goes_with(kind, attends)),
        "classifier_bias_init": Setting("prior", "no steps are spent on learning label frequencies"),
        "label_attention": Setting(SepMldcConfig.label_attention, "+0.8 points of PSP@5, +1.3 points of macro F1"),
        "token_attention": token_attention,
        "label_encoding": Setting(
            SepMldcTrainingArguments.label_encoding, "as good as encoding the label texts in each step, and faster"
        ),
        "label_loss_weight": Setting(
            SepMldcTrainingArguments.label_loss_weight, "off: no measurable effect at any weight with this classifier"
        ),
        "document_loss_weight": Setting(
            SepMldcTrainingArguments.document_loss_weight,
            "off: no measurable effect at any weight with this classifier",
        ),
        "lexical_scores": Setting(True, "better than encoder or linear model alone at every data size"),
    }


def _goes_with(classifier: str, token_attention: bool) -> str:
    return f"recommended for `{classifier}`{' with token attention' if token_attention else ''}"


def _encoder_settings(
    lengths: Sequence[int] | np.ndarray | None, num_layers: int, max_tokens: int, device: str, recipe: str
) -> dict[str, Setting]:
    limit = min(max_tokens, 256 if device == "cpu" else 512)
    if lengths is None or not len(lengths):
        length = Setting(limit, "document lengths are unknown")
    else:
        # Rounded to multiples of 32, so that similar data sets get the same shapes.
        needed = 32 * math.ceil(float(np.quantile(np.asarray(lengths), 0.95)) / 32)
        why = f"95% of documents have at most {needed} tokens"
        length = Setting(max(min(needed, limit), 32), why if needed <= limit else f"maximum on {device}; {why}")
    if recipe == "fast":
        frozen = Setting(num_layers, "all layers: embeddings are computed once")
    elif device == "cpu" and recipe == "best":
        frozen = Setting(
            2 * num_layers // 3,
            "two thirds of the layers on a CPU: a third of the training time, about 1 point of nDCG@5 lower",
        )
    else:
        frozen = Setting(0, PAPER if recipe == "paper" else "all layers are trained on an accelerator")
    return {
        "encoder_max_length": length,
        "freeze_layers": frozen,
        "backbone_dropout": Setting(None, "the encoder's own value")
        if recipe == "paper"
        else Setting(0.0, "no effect on quality, and attention is faster without dropout"),
    }


def _optimizer_settings(
    num_documents: int,
    num_labels: int,
    num_devices: int,
    recipe: str,
    settings: Mapping[str, Setting],
    adapters: bool,
) -> dict[str, Setting]:
    if recipe == "paper":
        return {
            "learning_rate": Setting(5e-5, PAPER),
            "head_learning_rate": Setting(5e-5, PAPER),
            "per_device_train_batch_size": Setting(32, "not specified in the paper"),
            "num_train_epochs": Setting(10.0, "not specified in the paper"),
            "warmup_steps": Setting(0.1, "not specified in the paper"),
            "weight_decay": Setting(0.01, "not specified in the paper"),
        }
    wanted = 16 if num_documents <= SMALL_DATASET else 32
    per_device = min(wanted, max(math.ceil(wanted / num_devices), FEWEST_PER_DEVICE))
    batch = per_device * num_devices
    why = size = f"{'up to' if num_documents <= SMALL_DATASET else 'more than'} {SMALL_DATASET:,} documents"
    if num_devices > 1:
        why = f"total of {batch} on {num_devices} devices (a single device: {wanted}); {why}"
    if recipe == "fast":
        epochs = min(max(850 / math.sqrt(num_documents), 5), 40)
    else:
        # Fewer than 3 epochs only if there are more documents than were measured.
        fewest = min(3.0, max(1.0, 90_000 / num_documents))
        epochs = min(max(350 / math.sqrt(num_documents) * (num_labels / 400) ** 0.25, fewest), 20)
        epochs = max(epochs, min(FEWEST_STEPS * batch / num_documents, MOST_EPOCHS))
    kind, attends = settings["classifier"].value, bool(settings["token_attention"].value)
    partly_frozen = settings["freeze_layers"].value > 0 and num_documents <= 1000
    learning_rate = Setting(
        2e-4 if partly_frozen else SepMldcTrainingArguments.learning_rate,
        "few documents and frozen lower layers" if partly_frozen else "not sensitive",
    )
    if adapters:
        learning_rate = Setting(LORA_LEARNING_RATE, "LoRA adapters need a higher learning rate")
    return {
        "num_train_epochs": Setting(round(epochs, 1), "fewer with many documents, more with many labels"),
        "per_device_train_batch_size": Setting(per_device, why),
        "learning_rate": learning_rate,
        "head_learning_rate": Setting(
            recommended_head_learning_rate(kind, attends, num_documents),
            _goes_with(kind, attends) + (f" and {size}" if kind == "similarity" and not attends else ""),
        ),
        "warmup_steps": Setting(SepMldcTrainingArguments.warmup_steps, "10% of the steps"),
        "weight_decay": Setting(SepMldcTrainingArguments.weight_decay, "not sensitive"),
    }


def _validation_settings(
    batches_per_epoch: int, num_validation_documents: int, settings: Mapping[str, Setting], named: Mapping[str, Any]
) -> dict[str, Setting]:
    steps_per_epoch = math.ceil(batches_per_epoch / named.get("gradient_accumulation_steps", 1))
    steps = math.ceil(settings["num_train_epochs"].value * steps_per_epoch)
    if named.get("max_steps", -1) > 0:
        steps = named["max_steps"]
    logging = {"logging_steps": Setting(max(steps // 50, 1), "every 2% of the run")}
    if any(name in named for name in VALIDATION_SETTINGS):
        return logging  # the user has decided when to evaluate and save
    if num_validation_documents < ENOUGH_VALIDATION:
        why = f"selecting a checkpoint needs at least {ENOUGH_VALIDATION} validation documents"
        return {"eval_strategy": Setting("no", why), "save_strategy": Setting("no", why), **logging}
    every = max(math.ceil(steps / EVALUATIONS), 1)
    return {
        "eval_strategy": Setting("steps", f"{EVALUATIONS} evaluations"),
        "eval_steps": Setting(every, f"{EVALUATIONS} evaluations"),
        "save_strategy": Setting("steps", "same as `eval_strategy`"),
        "save_steps": Setting(every, "same as `eval_steps`"),
        "save_total_limit": Setting(2, "the best and the last checkpoint"),
        "load_best_model_at_end": Setting(True, "up to +1 point of nDCG@5 if the model overfits"),
        **logging,
    }
