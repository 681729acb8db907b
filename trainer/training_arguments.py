"""Arguments of [`SepMldcTrainer`]."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments


DEFAULT_KS = (1, 3, 5)
SECRET_NAME = re.compile(r"(token|secret|password|api_key)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


# Up to this number of training documents, batches and some learning rates are smaller.
SMALL_DATASET = 2000


def recommended_head_learning_rate(classifier: str, token_attention: bool, num_documents: int | None) -> float:
    """
    The recommended `head_learning_rate`. `"similarity"` without token attention starts from the cosine of document and label text: with few
    training documents, a low learning rate preserves it; with many, or an unknown number, a high one learns more.
    """
    if classifier != "similarity" or token_attention:
        return 1e-3
    return 5e-4 if num_documents is not None and num_documents <= SMALL_DATASET else 3e-3


if TYPE_CHECKING:
    Cutoff = int
else:

    def Cutoff(text: str) -> int | str:
        """Parses one value of `--metric_ks`. The deprecated form "1,3,5" is split later."""
        return text if "," in text else int(text)


@dataclass
class SepMldcTrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments` with additional arguments for SEP-MLDC: the weights of the two contrastive losses (Eq. 21), the training of label
    embeddings, the order of documents, and the settings of evaluation and prediction.

    These defaults differ from transformers: `learning_rate=1e-4`, `warmup_steps=0.1` (a tenth of the steps), `weight_decay=0.01`,
    `train_sampling_strategy="group_by_length"`, `batch_eval_metrics=True`,
    `logging_nan_inf_filter=False` (a NaN loss stops the run instead of being averaged away) and `dispatch_batches=False` in
    `accelerator_config` (each process reads its own batches of a stream, padded to their own length).

    `label_smoothing_factor` is not supported: transformers defines label smoothing for a single label per document.

    Raises:
        ValueError: an argument is out of its range, NaN or infinite.

    Example:

    ```python
    >>> from trainer import SepMldcTrainingArguments

    >>> args = SepMldcTrainingArguments("outputs", label_encoding="encoder", label_loss_weight=0.1)
    >>> args.document_loss_weight, args.contrastive_temperature
    (0.0, 0.1)

    ```
    """

    # Contrastive losses
    label_loss_weight: float = field(
        default=0.0, metadata={"help": "β, the weight of the label loss L1 (Eq. 21). The paper uses 0.01."}
    )
    document_loss_weight: float = field(
        default=0.0, metadata={"help": "γ, the weight of the document loss L2 (Eq. 21). The paper uses 0.01."}
    )
    contrastive_temperature: float = field(
        default=0.1, metadata={"help": "τ, the temperature of both contrastive losses."}
    )
    contrastive_weighting: str = field(
        default="jaccard",
        metadata={
            "help": "Weights of the negatives: 'jaccard' (as in the paper), 'complement' (1 - W) or 'uniform' (1).",
            "choices": ["jaccard", "complement", "uniform"],
        },
    )

    # Label embeddings
    label_encoding: str = field(
        default="embedding",
        metadata={
            "help": "'embedding': label embeddings are initialized from the label texts and trained as parameters. 'encoder': "
            "`labels_per_step` label texts are encoded in each training step; slower, and not better in our measurements.",
            "choices": ["encoder", "embedding"],
        },
    )
    labels_per_step: int = field(
        default=8,
        metadata={
            "help": "Maximum number of label texts encoded per step: the positive labels of the batch first, then random "
            "ones. All other labels use their stored embeddings, which may be slightly out of date."
        },
    )
    max_label_length: int = field(default=64, metadata={"help": "Maximum number of tokens per label text."})

    # Optimization
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of the encoder."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Number of warmup steps, or their share of all steps if below 1."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of all weights but biases and norms."})
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate of all parameters outside the encoder. Defaults to 1e-3; with the classifier "
            "'similarity' without token attention, to 5e-4 with up to 2,000 training documents and to 3e-3 with more."
        },
    )

    # Order of documents
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "'group_by_length': documents of similar length share a batch; 'random'; or 'sequential'.",
            "choices": ["group_by_length", "random", "sequential"],
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Pad batches to a multiple of this number of tokens. Few distinct lengths mean few compiled graphs with "
            "`torch_compile`."
        },
    )
    cache_frozen_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the states of frozen layers once and read them from disk in each epoch. By default, this is done if layers "
            "are frozen, there is more than one epoch and the disk has room. With True, too little disk space is an error."
        },
    )
    group_by_label_set: bool = field(
        default=False,
        metadata={
            "help": "Put pairs of documents with the same label set into the same batch, so that L2 has positives (Eq. 14)."
        },
    )

    # Evaluation and prediction
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Accumulate metrics batch by batch."})
    metric_ks: list[Cutoff] | None = field(
        default=None,
        metadata={
            "help": "The k of P@k, R@k, nDCG@k and PSP@k, for example `--metric_ks 1 3 5`. Defaults to those of 1, 3 and 5 "
            "that do not exceed the number of labels."
        },
    )
    prediction_top_k: int = field(
        default=10, metadata={"help": "Number of labels per document that `predict` returns."}
    )
    prediction_threshold: float = field(
        default=0.5,
        metadata={
            "help": "Decision threshold on the probability for the F1 metrics, until thresholds have been tuned."
        },
    )

    # Logging
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Must stay off: a NaN or infinite loss stops the run and names its steps."},
    )
    log_gradient_norms: bool = field(
        default=False,
        metadata={
            "help": "At each logging step, log the gradient norm of each loss term with respect to the encoder, the label embeddings "
            "and the head. Not with FSDP or DeepSpeed."
        },
    )

    def __post_init__(self):
        self.metric_ks = _checked_ks(self.metric_ks)
        self._check_ranges()
        super().__post_init__()
        if self.accelerator_config is not None and self.accelerator_config.dispatch_batches is None:
            # For streams: dispatching would concatenate batches that are padded to different lengths.
            self.accelerator_config.dispatch_batches = False
        self._check_combinations()

    def _check_ranges(self) -> None:
        at_least_zero = "Use 0 to switch it off."
        for name, remedy in (
            ("label_loss_weight", at_least_zero),
            ("document_loss_weight", at_least_zero),
            ("learning_rate", "Use 1e-4, for example."),
            ("head_learning_rate", "Use 1e-3, for example, or leave it out."),
            ("weight_decay", at_least_zero),
            ("max_grad_norm", at_least_zero),
        ):
            self._check(name, lambda value: value >= 0, "a number of at least 0", remedy)
        self._check("contrastive_temperature", lambda value: value > 0, "a number above 0", "The paper uses 0.1.")
        self._check(
            "prediction_threshold",
            lambda value: 0 < value < 1,
            "a probability between 0 and 1",
            "Use 0.5, for example.",
        )
        self._check(
            "labels_per_step",
            lambda value: value >= 1,
            "an integer of at least 1",
            'Use `label_encoding="embedding"` to encode no label texts.',
            whole=True,
        )
        for name, example in (
            ("max_label_length", 64),
            ("prediction_top_k", 10),
            ("pad_to_multiple_of", 32),
            ("per_device_train_batch_size", 16),
            ("per_device_eval_batch_size", 32),
            ("gradient_accumulation_steps", 1),
        ):
            self._check(
                name,
                lambda value: value >= 1,
                "an integer of at least 1",
                f"Use {example}, for example.",
                whole=True,
            )
        self._check(
            "num_train_epochs",
            lambda value: value > 0 or (self.max_steps or 0) > 0,
            "a number above 0",
            "Use 3, for example, or give `max_steps`.",
        )
        self._check("max_steps", lambda value: value >= 1 or value == -1, "an integer of at least 1", "Leave it out.")
        for name, choices in (
            ("contrastive_weighting", ("jaccard", "complement", "uniform")),
            ("label_encoding", ("encoder", "embedding")),
            ("train_sampling_strategy", ("group_by_length", "random", "sequential")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but it must be one of {', '.join(choices)}.")

    def _check(
        self, name: str, rule: Callable[[Any], bool], requirement: str, remedy: str, whole: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (whole and value != int(value)) or not rule(value):
            raise ValueError(f"`{name}` is {value!r}, but it must be {requirement}. {remedy}")

    def _check_combinations(self) -> None:
        if self.logging_nan_inf_filter:
            raise ValueError(
                "`logging_nan_inf_filter` is True, but it would hide a NaN loss from the check that stops the run. Leave it off."
            )
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor!r}, but label smoothing is defined for a single label "
                "per document. Leave it out, or pass a loss of your own to the trainer as `compute_loss_func`."
            )
        if self.group_by_label_set and self.train_sampling_strategy == "sequential":
            raise ValueError(
                '`group_by_label_set` is True, but `train_sampling_strategy="sequential"` keeps the order of the documents. Use '
                '"group_by_length" or "random", or leave `group_by_label_set` out.'
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of the ranking metrics, regardless of the number of labels; see `cutoffs`."""
        return tuple(self.metric_ks or DEFAULT_KS)

    def cutoffs(self, num_labels: int) -> tuple[int, ...]:
        """
        The k of the ranking metrics of a model with `num_labels` labels.

        Raises:
            ValueError: a k of `metric_ks` exceeds the number of labels.
        """
        if self.metric_ks is None:
            return tuple(k for k in DEFAULT_KS if k <= num_labels)
        too_large = [k for k in self.metric_ks if k > num_labels]
        if too_large:
            raise ValueError(
                f"`metric_ks` contains k = {too_large[0]}, but there are only {num_labels} labels. Leave out the larger k."
            )
        return tuple(self.metric_ks)

    @contextmanager
    def postponed_rotation(self) -> Iterator[int | None]:
        """
        Within this context, `save_total_limit` is `None`, so that transformers deletes no older checkpoints; yields the limit. A copy that is
        pickled within the context (`training_args.bin`) contains the limit.
        """
        limit: int | None = vars(self)["save_total_limit"]
        self.save_total_limit, self._postponed_limit = None, limit
        try:
            yield limit
        finally:
            self.save_total_limit = limit
            del self._postponed_limit

    def __getstate__(self):
        # `training_args.bin` is the pickle of this object, next to weights that get published.
        state = _without_secrets(self.__dict__)
        if "_postponed_limit" in state:
            state["save_total_limit"] = state.pop("_postponed_limit")
        return state


def _checked_ks(value: Any) -> list[int] | None:
    """`metric_ks` as ascending integers; also accepts the deprecated form "1,3,5"."""
    if value is None:
        return None
    parts = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    try:
        ks = []
        for part in parts:
            if isinstance(part, str) and "," in part:
                warnings.warn(
                    f"`metric_ks` as a string ({part!r}) is deprecated. Pass a list of ints, such as [1, 3, 5], on the command "
                    "line `--metric_ks 1 3 5`.",
                    FutureWarning,
                    stacklevel=4,
                )
            texts = part.split(",") if isinstance(part, str) else [part]
            ks += [int(text) for text in texts if int(text) == float(text)] if not isinstance(part, bool) else []
    except (TypeError, ValueError):
        ks = []
    if not ks or min(ks) < 1:
        raise ValueError(
            f"`metric_ks` is {value!r}, but it must be a list of integers of at least 1, such as [1, 3, 5]."
        )
    return sorted(set(ks))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A copy in which tokens and passwords, recognized by value or by name, are `None`."""
    clean: dict[str, Any] = {}
    for name, value in values.items():
        secret = SECRET_NAME.search(str(name)) and isinstance(value, str)
        if secret or (isinstance(value, str) and SECRET_VALUE.search(value)):
            clean[name] = None
        elif type(value) is dict:
            clean[name] = _without_secrets(value)
        else:
            clean[name] = value
    return clean
