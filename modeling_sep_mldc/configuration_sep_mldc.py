"""Configuration of SEP-MLDC models."""

import warnings
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .encoder_sep_mldc import max_tokens


# Names of fields in version 0.1 and their names now. The former ones are accepted for one release.
FORMER_FIELDS = {"label_support": "label_counts", "lexical_features": "num_lexical_features"}


def rename_former_fields(values: dict[str, Any], warn: bool = False) -> dict[str, Any]:
    """
    A copy of `values` with the former names of fields replaced by today's, with one `FutureWarning` if `warn`.

    Raises:
        ValueError: a field is given under both names.
    """
    former = [name for name in FORMER_FIELDS if name in values]
    renamed = {FORMER_FIELDS.get(name, name): value for name, value in values.items()}
    for name in former:
        if FORMER_FIELDS[name] in values:
            raise ValueError(
                f"`{name}` and `{FORMER_FIELDS[name]}` are both given, but they are the same field. Pass `{FORMER_FIELDS[name]}` only."
            )
    if former and warn:
        changes = ", ".join(f"`{name}` is now called `{FORMER_FIELDS[name]}`" for name in former)
        warnings.warn(
            f"{changes}. The former name will stop working in version 0.3. Use the new one.",
            FutureWarning,
            stacklevel=2,
        )
    return renamed


@strict
class SepMldcConfig(PreTrainedConfig):
    r"""
    Configuration of [`SepMldcForMultiLabelClassification`]: a text encoder (`backbone_config`) with a label-guided
    classification head. Label names are in `id2label`, what they mean in `label_descriptions`.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`):
            Configuration of the text encoder, of any type that `AutoModel` knows. A RoBERTa-base by default.
        pooling (`str`, defaults to `"mean"`):
            How token states become one embedding: `"mean"` over the attended tokens, or `"cls"`, the first token's
            last hidden state.
        classification_loss (`str`, defaults to `"bce"`):
            `"bce"` (binary cross-entropy, summed over labels, averaged over documents), `"softmax"` (cross-entropy
            against the multi-hot target: a ranking, no probabilities), `"decoupled_softmax"` (the same, but the positives of a
            document do not compete with each other), or a sum: `"bce+softmax"`, `"bce+decoupled_softmax"`.
        classifier (`str`, defaults to `"mlp"`):
            `"mlp"` (the paper's), `"similarity"` (a learnt scale times the cosine of the projected input and the label
            embedding, plus a bias; no matrix of one row a label) or `"mlp+similarity"`, the sum of both logits.
        classifier_dropout (`float`, defaults to 0.5):
            Dropout before each linear layer of the head.
        classifier_hidden_size (`int`, *optional*):
            Width of the MLP's hidden layer; the encoder's hidden size when not given.
        classifier_bias_init (`str`, defaults to `"zero"`):
            `"prior"` when the output bias started at each label's log-odds in the training set.
        similarity_scale_init (`float`, defaults to 10.0):
            Where the learnt scale of the similarity classifier starts.
        label_attention (`bool`, defaults to `True`):
            Label-guided feature selection (Eq. 16-18). `False` is the ablation without it: the head sees the document
            embedding alone.
        encoder_max_length (`int`, *optional*):
            The encoder sees so many tokens of a document at most, the lexical scores see all. No limit when not given.
        num_lexical_features (`int`, *optional*):
            Number of token weights stored for each label by the lexical scores, a sparse linear classifier on the document's tokens that
            is added to the logits outside training (see `SepMldcTrainer.fit_lexical_scores`); `None` without them.
        lexical_info (`dict`, *optional*):
            How the lexical scores were fitted (scale, number of documents, metrics without and with them, ...).
        label_descriptions (`dict[str, str]`, *optional*):
            Label name to expansion, for the labels that have one.
        thresholds (`list[float]`, *optional*):
            Decision threshold of each label on its probability, in `id2label` order.
        threshold_info (`dict`, *optional*):
            How `thresholds` were found (objective, number of documents, ...).
        score_calibration (`dict`, *optional*):
            `{"scale": a, "bias": b}`: the probability of a label is `sigmoid(a * logit + b)`.
        label_counts (`list[int]`, *optional*):
            Number of real training documents of each label, in `id2label` order.
        num_train_documents (`int`, *optional*):
            Number of real training documents.

    Example:

    ```python
    >>> from modeling_sep_mldc import SepMldcConfig

    >>> config = SepMldcConfig(backbone_config={"model_type": "bert", "num_hidden_layers": 2}, num_labels=3)
    >>> config.num_labels, config.backbone_config.num_hidden_layers, config.problem_type
    (3, 2, 'multi_label_classification')

    ```
    """

    model_type = "sep_mldc"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "label_attention",
        "document_embeds",
        "label_embeds",
        "candidate_embeds",
        "hidden_states",
        "attentions",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: Literal["mean", "cls"] = "mean"
    classification_loss: Literal["bce", "softmax", "decoupled_softmax", "bce+softmax", "bce+decoupled_softmax"] = "bce"
    classifier: Literal["mlp", "similarity", "mlp+similarity"] = "mlp"
    classifier_dropout: float | int = 0.5
    classifier_hidden_size: int | None = None
    classifier_bias_init: Literal["zero", "prior"] = "zero"
    similarity_scale_init: float | int = 10.0
    label_attention: bool = True
    encoder_max_length: int | None = None
    num_lexical_features: int | None = None
    lexical_info: dict | None = None
    label_descriptions: dict[str, str] | None = None
    thresholds: list[float] | None = None
    threshold_info: dict | None = None
    score_calibration: dict | None = None
    label_counts: list[int] | None = None
    num_train_documents: int | None = None

    def __post_init__(self, **kwargs):
        former = {name: kwargs.pop(name) for name in FORMER_FIELDS if name in kwargs}
        for name, value in rename_former_fields(former, warn=True).items():
            setattr(self, name, value)
        if self.backbone_config is None:
            self.backbone_config = CONFIG_MAPPING["roberta"]()
        elif isinstance(self.backbone_config, dict):
            backbone = dict(self.backbone_config)
            model_type = backbone.pop("model_type", None)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"`backbone_config` has model_type {model_type!r}, which transformers does not know. Name the type of "
                    "a text encoder of transformers, such as 'bert', 'roberta' or 'modernbert'."
                )
            self.backbone_config = CONFIG_MAPPING[model_type](**backbone)
        if self.problem_type is None:
            self.problem_type = "multi_label_classification"
        super().__post_init__(**kwargs)
        for field in ("encoder_max_length", "num_lexical_features"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"`{field}` is {value}, but it must be 1 or more, or `None`. Correct it.")
        if self.problem_type != "multi_label_classification":
            raise ValueError(
                f"`problem_type` is {self.problem_type!r}, but SEP-MLDC models are for 'multi_label_classification'. Leave "
                "`problem_type` out."
            )
        if self.id2label is not None:
            self.label2id = {label: index for index, label in self.id2label.items()}
            if len(self.label2id) != len(self.id2label):
                names = list(self.id2label.values())
                double = sorted({name for name in names if names.count(name) > 1})
                raise ValueError(
                    f"`id2label` has {double[0]!r} more than once, but label names must differ. Rename or merge them."
                )
            if self.thresholds is not None and len(self.thresholds) != len(self.id2label):
                raise ValueError(
                    f"`thresholds` has {len(self.thresholds)} values for {len(self.id2label)} labels. Give one a label, or "
                    "none at all."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "SepMldcConfig":
        """As in transformers. Former names of fields are accepted: silently in `config_dict`, with a warning in `kwargs`."""
        return super().from_dict(rename_former_fields(config_dict), **rename_former_fields(kwargs, warn=True))

    @property
    def label_support(self) -> list[int] | None:
        """Former name of `label_counts`."""
        return self._former_field("label_support")

    @property
    def lexical_features(self) -> int | None:
        """Former name of `num_lexical_features`."""
        return self._former_field("lexical_features")

    def _former_field(self, name: str):
        return next(iter(rename_former_fields({name: getattr(self, FORMER_FIELDS[name])}, warn=True).values()))

    @property
    def is_ranking(self) -> bool:
        """
        Whether the logits only rank labels: after training with the softmax loss alone and without calibration, they say nothing
        about the probability of a single label.
        """
        return "bce" not in self.classification_loss and self.score_calibration is None

    @property
    def hidden_size(self) -> int:
        """Hidden size `d` of the encoder, and so of document and label embeddings."""
        return self.backbone_config.hidden_size

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the logits."""
        return [self.id2label[index] for index in range(len(self.id2label))]

    @property
    def label_texts(self) -> list[str]:
        """The texts that are encoded as label embeddings, `"{label}: {expansion}"` or the bare name (Eq. 1-2)."""
        descriptions = self.label_descriptions or {}
        return [f"{label}: {descriptions[label]}" if descriptions.get(label) else label for label in self.labels]

    def max_tokens(self, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
        """
        Number of tokens of a document that the encoder reads, special tokens included. Lexical scores read all tokens.

        It is the least of the encoder's positions, `encoder_max_length` and the tokenizer's `model_max_length`, and 512 where
        none of them sets a limit.
        """
        return max_tokens(self.backbone_config, tokenizer, self.encoder_max_length)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The encoder's configuration (vocabulary size, maximum length, ...)."""
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)
