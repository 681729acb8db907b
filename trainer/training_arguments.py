"""Arguments of [`SepMldcTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class SepMldcTrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments` with what SEP-MLDC adds: weights of the two contrastive losses (Eq. 21), how label embeddings are
    trained, and the order of documents.

    Other defaults than in transformers: `train_sampling_strategy="group_by_length"`, `batch_eval_metrics=True`,
    `logging_nan_inf_filter=False` (a NaN loss stops the run instead of being averaged away) and `dispatch_batches=False` of
    `accelerator_config` (of a stream, each process reads its own batches, padded to their own length).

    Example:

    ```python
    >>> from trainer import SepMldcTrainingArguments

    >>> args = SepMldcTrainingArguments("outputs", label_encoding="encoder", label_loss_weight=0.1)
    >>> args.document_loss_weight, args.contrastive_temperature
    (0.01, 0.1)

    ```
    """

    # Contrastive losses
    label_loss_weight: float = field(default=0.01, metadata={"help": "β, the weight of the label loss L1 (Eq. 21)."})
    document_loss_weight: float = field(
        default=0.01, metadata={"help": "γ, the weight of the document loss L2 (Eq. 21)."}
    )
    contrastive_temperature: float = field(default=0.1, metadata={"help": "τ of both contrastive losses."})
    contrastive_weighting: str = field(
        default="jaccard",
        metadata={
            "help": "Weights of the negatives: 'jaccard' (as printed), 'complement' (1 - W) or 'uniform' (1).",
            "choices": ["jaccard", "complement", "uniform"],
        },
    )

    # Label embeddings
    label_encoding: str = field(
        default="embedding",
        metadata={
            "help": "'embedding': the label embeddings start at f(label text) and are trained as parameters. 'encoder': label "
            "texts are encoded again during training, `labels_per_step` a step: slower, and no better where we measured.",
            "choices": ["encoder", "embedding"],
        },
    )
    labels_per_step: int = field(
        default=8,
        metadata={
            "help": "At most so many label texts are encoded in a step: the batch's positive labels first, then random "
            "others. The remaining label embeddings are the stored, slightly stale ones."
        },
    )
    max_label_length: int = field(default=64, metadata={"help": "Label texts are cut after so many tokens."})

    # Optimisation
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the classifier and of trained label embeddings; `learning_rate` if not given."
        },
    )

    # Order of documents
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "'group_by_length': batches of documents of like length; 'random'; or 'sequential'.",
            "choices": ["group_by_length", "random", "sequential"],
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Pad batches to a multiple of so many tokens: few distinct lengths, and so few graphs with `torch_compile`."
        },
    )
    cache_frozen_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the states of frozen layers once and read them from disk in each epoch. By default, if layers are frozen, "
            "there is more than one epoch and the disk has room. True makes a full disk an error."
        },
    )
    group_by_label_set: bool = field(
        default=False,
        metadata={
            "help": "Put pairs of documents with the same label set into one batch, so that L2 has positives (Eq. 14)."
        },
    )

    # Evaluation and prediction
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Metrics are accumulated batch by batch."})
    metric_ks: str = field(
        default="1,3,5", metadata={"help": "The k of P@k, R@k, nDCG@k and PSP@k, joined by commas."}
    )
    prediction_top_k: int = field(default=10, metadata={"help": "`predict` returns so many labels a document."})
    prediction_threshold: float = field(
        default=0.5, metadata={"help": "Decision threshold of the F1 metrics while the model has no tuned ones."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Kept off: a NaN or infinite loss stops the run with the steps it happened in."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.accelerator_config is not None and self.accelerator_config.dispatch_batches is None:
            # Concerns streams only. Dispatching would concatenate batches that are padded to different lengths.
            self.accelerator_config.dispatch_batches = False
        for name in ("label_loss_weight", "document_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but a loss weight is at least 0. Use 0 to switch it off."
                )
        if self.contrastive_temperature <= 0:
            raise ValueError(
                f"`contrastive_temperature` is {self.contrastive_temperature}, but a temperature is above 0. The paper uses 0.1."
            )
        for name, choices in (
            ("contrastive_weighting", ("jaccard", "complement", "uniform")),
            ("label_encoding", ("encoder", "embedding")),
            ("train_sampling_strategy", ("group_by_length", "random", "sequential")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but it must be one of {', '.join(choices)}.")
        if self.labels_per_step < 1:
            raise ValueError(
                f"`labels_per_step` is {self.labels_per_step}, but one label at least must be encoded a step. Use "
                '`label_encoding="embedding"` to encode none.'
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"`pad_to_multiple_of` is {self.pad_to_multiple_of}, but a length is a multiple of 1 at least. Use 32, for "
                "example, or leave it out."
            )
        if self.head_learning_rate is not None and self.head_learning_rate < 0:
            raise ValueError(f"`head_learning_rate` is {self.head_learning_rate}, but a learning rate is at least 0.")
        if self.logging_nan_inf_filter:
            raise ValueError(
                "`logging_nan_inf_filter` would hide a NaN loss from the check that stops the run. Leave it off."
            )
        try:
            self.ks = tuple(sorted({int(k) for k in str(self.metric_ks).split(",")}))
        except ValueError:
            self.ks = ()
        if not self.ks or self.ks[0] < 1:
            raise ValueError(
                f'`metric_ks` is {self.metric_ks!r}, but whole numbers from 1 on are needed, such as "1,3,5".'
            )

    def __getstate__(self):
        # `training_args.bin` is this object's pickle, next to weights that get published.
        state = dict(self.__dict__)
        for name in state:
            if name.endswith("_token"):
                state[name] = None
        return state
