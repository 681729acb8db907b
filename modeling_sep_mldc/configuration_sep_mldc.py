"""Configuration of SEP-MLDC models."""

import math
import warnings
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import normalize

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .encoder_sep_mldc import max_tokens
from .hierarchy_sep_mldc import check_label_parents
from .label_sets_sep_mldc import check_label_constraints
from .label_texts_sep_mldc import label_text


logger = logging.get_logger(__name__)

# The recommended head. `trainer.recommend_settings` also reads these, so `from_backbone` and `run_mldc.py` use the same values.
# From this number of labels on, the classifier is label similarity alone.
MANY_LABELS = 1000
# Each label attends to the tokens above this number of training documents and up to this number of labels.
FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION = 1500
MOST_LABELS_FOR_TOKEN_ATTENTION = 5000
# Maximum number of dimensions that token attention projects hidden states to.
TOKEN_ATTENTION_SIZE = 128

# Old names of fields (version 0.1) and their current names. The old ones are accepted for one release.
FORMER_FIELDS = {"label_support": "label_counts", "lexical_features": "num_lexical_features"}


def recommended_classifier(num_labels: int) -> Literal["mlp+similarity", "similarity"]:
    """The recommended `classifier` for this number of labels."""
    return "similarity" if num_labels >= MANY_LABELS else "mlp+similarity"


def recommended_dropout(classifier: str, token_attention: bool) -> float:
    """The recommended `classifier_dropout`. `"similarity"` alone needs less, unless token attention is added."""
    return 0.2 if classifier == "similarity" and not token_attention else 0.5


def recommended_token_attention(num_labels: int, num_documents: int | None) -> bool:
    """
    Whether label-wise attention is recommended: it needs enough documents to learn its weights, and its cost grows with the number of
    labels. `False` if the number of training documents is unknown.
    """
    enough = num_documents is not None and num_documents > FEWEST_DOCUMENTS_FOR_TOKEN_ATTENTION
    return enough and num_labels <= MOST_LABELS_FOR_TOKEN_ATTENTION


def recommended_token_attention_size(hidden_size: int) -> int:
    """The recommended `token_attention_size`, below the hidden size: fewer weights per label generalize better."""
    return min(TOKEN_ATTENTION_SIZE, hidden_size)


def rename_former_fields(values: dict[str, Any], warn: bool = False) -> dict[str, Any]:
    """
    A copy of `values` in which old names of fields are replaced by the current ones, with one `FutureWarning` if `warn`.

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
            f"{changes}. The old name will stop working in version 0.3. Use the new one.",
            FutureWarning,
            stacklevel=2,
        )
    return renamed


def _check_label_ids(id2label: dict[int, str]) -> None:
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(
            f"`id2label` has the keys {sorted(id2label)[:5]}..., but labels are numbered from 0 on without gaps. Renumber them."
        )


@strict
class SepMldcConfig(PreTrainedConfig):
    r"""
    Configuration of [`SepMldcForMultiLabelClassification`]: a text encoder (`backbone_config`) with a label-guided
    classification head. Label names are in `id2label`, label descriptions in `label_descriptions`.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the text encoder, of any type that `AutoModel` knows. Defaults to RoBERTa-base.
        pooling (`str`, *optional*, defaults to `"mean"`):
            How token states become one embedding. `"mean"` averages over the attended tokens, `"cls"` takes the last hidden
            state of the first token.
        classification_loss (`str`, *optional*, defaults to `"bce+decoupled_softmax"`):
            `"bce"` is binary cross-entropy, summed over labels and averaged over documents. `"softmax"` is cross-entropy
            against the multi-hot target. In `"decoupled_softmax"`, the positives of a document do not compete with each
            other. `"bce+softmax"` and `"bce+decoupled_softmax"` are sums. Without `"bce"`, logits only rank labels until they
            are calibrated.
        class_weights (`str`, *optional*, defaults to `"none"`):
            Weights of the positive terms of binary cross-entropy, from `label_counts` and `num_train_documents`: `"balanced"`,
            `"effective"` (effective number of documents), or `"none"`. See `class_weights_sep_mldc`.
        classifier (`str`, *optional*):
            `"mlp"` is the paper's classifier. `"similarity"` is a learned scale times the cosine of the projected input and
            the label embedding, plus a bias, and has no weight matrix with one row per label. `"mlp+similarity"` is the sum
            of both logits. Defaults to `"mlp+similarity"`, and to `"similarity"` from 1,000 labels on.
        classifier_dropout (`float`, *optional*):
            Dropout probability before each linear layer of the head. Defaults to 0.5, and to 0.2 with `"similarity"` without
            token attention.
        classifier_hidden_size (`int`, *optional*):
            Width of the hidden layer of the MLP. Defaults to the encoder's hidden size.
        classifier_bias_init (`str`, *optional*, defaults to `"zero"`):
            `"prior"` if the output biases were initialized to the log-odds of the labels in the training set.
        similarity_scale_init (`float`, *optional*, defaults to 10.0):
            Initial value of the learned scale of the similarity classifier.
        label_attention (`bool`, *optional*, defaults to `True`):
            Whether to use label-guided feature selection (Eq. 16-18). If `False`, the head sees the document embedding alone.
        token_attention (`bool`, *optional*):
            Whether each label also attends to the tokens of the document (label-wise attention). Defaults to `True` if
            `num_train_documents` is above 1,500, for up to 5,000 labels. `False` for checkpoints saved without this field.
        token_attention_size (`int`, *optional*):
            Number of dimensions that token attention projects hidden states to. The encoder's hidden size is the maximum and means no
            projection. Defaults to 128, or to the hidden size if that is smaller. The hidden size for checkpoints saved without this
            field.
        encoder_max_length (`int`, *optional*):
            Maximum number of tokens of a document that the encoder reads. Lexical scores read all tokens. Defaults to no
            limit but the encoder's own.
        num_lexical_features (`int`, *optional*):
            Number of weights stored per label by the lexical scores, a sparse linear classifier on the tokens of the
            document that is added to the logits outside training (see `SepMldcTrainer.fit_lexical_scores`). `None` if there
            are none.
        num_lexical_bigrams (`int`, *optional*, defaults to 0):
            Number of hash buckets for pairs of neighboring tokens, which are further features of the lexical scores. 0 for tokens only.
        lexical_info (`dict`, *optional*):
            How the lexical scores were fitted: scale, number of documents, metrics without and with them.
        label_descriptions (`dict[str, str]`, *optional*):
            Label description by label name, for labels that have one.
        label_parents (`dict[str, list[str]]`, *optional*):
            Parents of each label that has one, by name (see [`check_label_parents`]).
        parents_in_label_texts (`bool`, *optional*, defaults to `True`):
            Whether the names of a label's ancestors are part of its label text.
        hierarchy (`str`, *optional*):
            How label sets are made consistent with `label_parents`: `"closure"` adds the ancestors of each label, `"leaves"` removes labels
            that have an assigned descendant. In both cases, the score of a label is the maximum over itself and its descendants. `None`
            for neither.
        label_constraints (`list[dict]`, *optional*):
            Groups `{"labels": [names], "at_least": n, "at_most": m}` that label sets satisfy (see [`check_label_constraints`]).
        thresholds (`list[float]` of length `num_labels`, *optional*):
            Decision threshold of each label on its probability.
        threshold_info (`dict`, *optional*):
            How `thresholds` were found: objective, number of documents, metrics.
        score_calibration (`dict`, *optional*):
            `{"scale": a, "bias": b}`: the probability of a label is `sigmoid(a * logit + b)` for uncalibrated logits.
        calibrate_logits (`bool`, *optional*, defaults to `True`):
            Whether the model applies `score_calibration` to its logits in evaluation mode, so that their sigmoid is the calibrated
            probability wherever the model is used, for example in the pipeline `text-classification`. `False` for checkpoints of
            version 0.1, whose logits are not changed.
        label_counts (`list[int]` of length `num_labels`, *optional*):
            Number of training documents that have each label, without pseudo-documents.
        num_train_documents (`int`, *optional*):
            Number of training documents, without pseudo-documents.
        num_added_labels (`int`, *optional*, defaults to 0):
            Number of labels, the last ones, that were added to the trained model (see `add_labels`).
        cosine_calibration (`dict`, *optional*):
            `{"scale": a, "bias": b}`: on documents that the model was not trained on, the probability of a label was
            `sigmoid(a * cosine + b)` for the cosine similarity of document and label text. Used to score added labels.

    Raises:
        ValueError: a value is out of its range, has the wrong length, or two labels have the same name.

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

    if TYPE_CHECKING:  # of `PreTrainedConfig`
        problem_type: Any
        id2label: Any
        label2id: Any

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: Literal["mean", "cls"] = "mean"
    classification_loss: Literal["bce", "softmax", "decoupled_softmax", "bce+softmax", "bce+decoupled_softmax"] = (
        "bce+decoupled_softmax"
    )
    class_weights: Literal["none", "balanced", "effective"] = "none"
    classifier: Literal["mlp", "similarity", "mlp+similarity"] | None = None
    classifier_dropout: float | int | None = None
    classifier_hidden_size: int | None = None
    classifier_bias_init: Literal["zero", "prior"] = "zero"
    similarity_scale_init: float | int = 10.0
    label_attention: bool = True
    token_attention: bool | None = None
    token_attention_size: int | None = None
    encoder_max_length: int | None = None
    num_lexical_features: int | None = None
    num_lexical_bigrams: int = 0
    lexical_info: dict | None = None
    label_descriptions: dict[str, str] | None = None
    label_parents: dict | None = None
    parents_in_label_texts: bool = True
    hierarchy: Literal["closure", "leaves"] | None = None
    label_constraints: list | None = None
    thresholds: list[float | int] | None = None
    threshold_info: dict | None = None
    score_calibration: dict | None = None
    calibrate_logits: bool = True
    label_counts: list[int] | None = None
    num_train_documents: int | None = None
    num_added_labels: int = 0
    cosine_calibration: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
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
                    f"`backbone_config` has model_type {model_type!r}, which transformers does not know. Specify the type of "
                    "a text encoder of transformers, such as 'bert', 'roberta' or 'modernbert'."
                )
            self.backbone_config = CONFIG_MAPPING[model_type](**backbone)
        if self.problem_type is None:
            self.problem_type = "multi_label_classification"
        super().__post_init__(**kwargs)
        if self.classifier is None:
            self.classifier = recommended_classifier(self.num_labels)
        if self.token_attention is None:
            self.token_attention = recommended_token_attention(self.num_labels, self.num_train_documents)
        if self.token_attention_size is None:
            self.token_attention_size = recommended_token_attention_size(self.hidden_size)
        if self.classifier_dropout is None:
            self.classifier_dropout = recommended_dropout(self.classifier, self.token_attention)
        if self.problem_type != "multi_label_classification":
            raise ValueError(
                f"`problem_type` is {self.problem_type!r}, but SEP-MLDC models are for 'multi_label_classification'. Leave "
                "`problem_type` out."
            )
        if self.id2label is not None:
            self.check_label_names()
            # Two Unicode forms of a name look the same and must not be two labels.
            self.id2label = {index: normalize("NFC", label) for index, label in self.id2label.items()}
            self.label2id = {label: index for index, label in self.id2label.items()}
        if self.label_descriptions is not None:
            self.label_descriptions = {normalize("NFC", name): text for name, text in self.label_descriptions.items()}
        self.check_values()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "id2label" and value is not None:
            value = {int(index): label for index, label in value.items()}  # JSON has string keys
        super().__setattr__(name, value)

    def check_label_names(self) -> None:
        """
        Check that each label has a unique name. Called when the configuration is created and on saving.

        Raises:
            ValueError: a name is blank, two labels have the same one, or labels are not numbered from 0 on.
        """
        _check_label_ids(self.id2label)
        for index, name in self.id2label.items():
            if not isinstance(name, str) or not name.strip():
                raise ValueError(
                    f"`id2label` calls label {index} {name!r}, but a name is needed. Give it one that is not blank."
                )
        counts = Counter(normalize("NFC", name) for name in self.id2label.values())
        double = [name for name, count in counts.items() if count > 1]
        if double:
            raise ValueError(
                f"`id2label` has {double[0]!r} more than once, but label names must differ. Rename or merge them."
            )

    def check_values(self) -> None:
        """
        Check ranges, lengths and finiteness, which type annotations cannot express.

        Raises:
            ValueError: a value is invalid, such as a threshold above 1.
        """
        for field in ("classifier_hidden_size", "encoder_max_length", "num_lexical_features", "token_attention_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"`{field}` is {value}, but it must be 1 or more, or `None`. Correct it.")
        if self.token_attention_size is not None and self.token_attention_size > self.hidden_size:
            raise ValueError(
                f"`token_attention_size` is {self.token_attention_size}, but the encoder's states have {self.hidden_size} dimensions. Use "
                f"{self.hidden_size} or less."
            )
        if self.num_lexical_bigrams < 0:
            raise ValueError(
                f"`num_lexical_bigrams` is {self.num_lexical_bigrams}, but it must be 0 or more. Correct it."
            )
        if self.classifier_dropout is not None and not 0 <= self.classifier_dropout <= 1:
            raise ValueError(
                f"`classifier_dropout` is {self.classifier_dropout}, but it is a probability from 0 to 1. Use 0.5, for example."
            )
        if not math.isfinite(self.similarity_scale_init):
            raise ValueError(
                f"`similarity_scale_init` is {self.similarity_scale_init}, but it must be finite. Use 10, for example."
            )
        self._check_length("thresholds", self.thresholds)
        wrong = [value for value in self.thresholds or () if not 0 <= value <= 1]
        if wrong:
            raise ValueError(
                f"`thresholds` contains {wrong[0]}, but thresholds are probabilities from 0 to 1. Tune them again."
            )
        for field in ("score_calibration", "cosine_calibration"):
            self._check_calibration(field, getattr(self, field))
        self._check_label_counts()
        self._check_label_sets()
        if not 0 <= self.num_added_labels <= self.num_labels:
            raise ValueError(
                f"`num_added_labels` is {self.num_added_labels}, but it must be from 0 to {self.num_labels}, the number of labels. "
                "Load the checkpoint again."
            )
        self.check_guarantee()

    def _check_length(self, field: str, values: list | None) -> None:
        if values is not None and len(values) != self.num_labels:
            raise ValueError(
                f"`{field}` has {len(values)} values for {self.num_labels} labels. Give one per label, or `None`. To change the labels of a "
                "trained model, load it without `num_labels` and `id2label`, and call `add_labels` or `remove_labels`."
            )

    def _check_calibration(self, field: str, calibration: dict | None) -> None:
        if calibration is None:
            return
        numbers = [value for value in calibration.values() if isinstance(value, (int, float)) and math.isfinite(value)]
        if set(calibration) != {"scale", "bias"} or len(numbers) != 2 or calibration["scale"] <= 0:
            raise ValueError(
                f"`{field}` is {calibration}, but it must be {{'scale': a, 'bias': b}} with finite numbers and a scale "
                "above 0. Tune the thresholds again, or use `None`."
            )

    def _check_label_counts(self) -> None:
        total = self.num_train_documents
        if total is not None and total < 0:
            raise ValueError(
                f"`num_train_documents` is {total}, but it cannot be negative. Correct it, or use `None`."
            )
        self._check_length("label_counts", self.label_counts)
        if self.class_weights != "none":
            self._check_class_weights()
        for label, count in enumerate(self.label_counts or ()):
            if count < 0 or (total is not None and count > total):
                raise ValueError(
                    f"`label_counts` is {count} for label {label}, but it must be from 0 to `num_train_documents`"
                    f"{'' if total is None else f', which is {total}'}. Count the labels of the training documents again."
                )

    def _check_label_sets(self) -> None:
        if self.label_parents is not None:
            self.label_parents = check_label_parents(self.label_parents, self.labels) or None
        if self.hierarchy is not None and self.label_parents is None:
            raise ValueError(
                f"`hierarchy` is {self.hierarchy!r}, but no label has a parent. Give `label_parents`, or leave `hierarchy` out."
            )
        if self.label_constraints is not None:
            closed = self.label_parents if self.hierarchy is not None else None
            self.label_constraints = check_label_constraints(self.label_constraints, self.labels, closed) or None
        if self.drops_or_adds_labels:
            self.drop_guarantee("`hierarchy` or `label_constraints` add or leave out labels")

    def _check_class_weights(self) -> None:
        if "bce" not in self.classification_loss:
            raise ValueError(
                f"`class_weights` is {self.class_weights!r}, but `classification_loss` is {self.classification_loss!r}, which has no "
                'binary cross-entropy to weight. Use a loss with "bce", or `class_weights="none"`.'
            )
        if self.label_counts is None or not self.num_train_documents:
            raise ValueError(
                f"`class_weights` is {self.class_weights!r}, but the number of documents per label is unknown. Give "
                '`label_counts` and `num_train_documents`, or use `class_weights="none"`.'
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "SepMldcConfig":
        """
        As in transformers. Old names of fields are accepted: silently in `config_dict`, with a warning in `kwargs`.

        Raises:
            ValueError: the configuration belongs to a different kind of model, such as an encoder.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"The configuration has model_type {kind!r}, but that of a trained SEP-MLDC model is {cls.model_type!r}. To start from a "
                "pretrained encoder, use `SepMldcForMultiLabelClassification.from_backbone`."
            )
        values = rename_former_fields(config_dict)
        values.setdefault("token_attention", False)  # saved before this field existed
        if values.get("score_calibration") is not None:
            values.setdefault("calibrate_logits", False)  # saved by version 0.1
        loaded = super().from_dict(values, **rename_former_fields(kwargs, warn=True))
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "token_attention_size" not in {**values, **kwargs}:
            config.token_attention_size = config.hidden_size  # saved before this field existed
        config.check_values()  # `kwargs` are set after the first check
        return loaded

    def drop_guarantee(self, why: str = "the scores of the model have changed") -> None:
        """
        Remove the guarantee of the thresholds, with a warning, because it holds only for the scores and labels for which it was computed.

        Args:
            why (`str`): the reason, for the warning. There is no warning if there is no guarantee.
        """
        info = self.threshold_info or {}
        if not info.get("guarantee"):
            return
        removed = ("guarantee", "guaranteed_calibration", "guaranteed_hierarchy")
        self.threshold_info = info = {name: value for name, value in info.items() if name not in removed}
        logger.warning(
            f"The thresholds no longer have the guarantee of {info.get('objective', 'their objective')!r}: {why}. "
            "Tune them again with `trainer.tune_thresholds` to have one."
        )

    def check_guarantee(self) -> None:
        """
        Remove the guarantee if `thresholds`, `score_calibration` or `hierarchy` have changed since it was computed. Called on loading and saving.
        """
        info = self.threshold_info or {}
        if not info.get("guarantee"):
            return
        chosen, given = info.get("global_threshold"), self.thresholds
        if chosen is not None and (given is None or any(value != chosen for value in given)):
            self.drop_guarantee("`thresholds` were changed")
        elif info.get("guaranteed_calibration", self.score_calibration) != self.score_calibration:
            self.drop_guarantee("`score_calibration` was changed")
        elif info.get("guaranteed_hierarchy", self.hierarchy) != self.hierarchy:
            self.drop_guarantee("`hierarchy` was changed")

    @property
    def drops_or_adds_labels(self) -> bool:
        """Whether label sets are changed after thresholds and closure, so that a guarantee of the thresholds does not hold."""
        return self.hierarchy == "leaves" or bool(self.label_constraints)

    @property
    def label_support(self) -> list[int] | None:
        """Old name of `label_counts`."""
        return self._former_field("label_support")

    @property
    def lexical_features(self) -> int | None:
        """Old name of `num_lexical_features`."""
        return self._former_field("lexical_features")

    def _former_field(self, name: str) -> Any:
        return next(iter(rename_former_fields({name: getattr(self, FORMER_FIELDS[name])}, warn=True).values()))

    @property
    def is_ranking(self) -> bool:
        """
        Whether the logits only rank labels. This is the case after training with only the softmax loss and without calibration: the logits
        then do not determine the probability of a single label.
        """
        return "bce" not in self.classification_loss and self.score_calibration is None

    @property
    def logit_calibration(self) -> tuple[float, float]:
        """Scale and bias that the model applies to its logits in evaluation mode; 1 and 0 for no calibration."""
        if self.score_calibration is None or not self.calibrate_logits:
            return 1.0, 0.0
        return self.score_calibration["scale"], self.score_calibration["bias"]

    @property
    def usual_threshold(self) -> float:
        """The threshold for a label without validation data: the best common threshold for all labels, or else the median."""
        usual = (self.threshold_info or {}).get("global_threshold")
        return float(median(self.thresholds or [0.5]) if usual is None else usual)

    @property
    def _backbone(self) -> Any:
        """`backbone_config`, which is a configuration after construction."""
        return self.backbone_config

    @property
    def hidden_size(self) -> int:
        """Hidden size `d` of the encoder, and thus of document and label embeddings."""
        return self._backbone.hidden_size

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the logits."""
        return [self.id2label[index] for index in range(len(self.id2label))]

    @property
    def label_texts(self) -> list[str]:
        """The texts that are encoded as label embeddings, with the names of ancestors and the description (Eq. 1-2)."""
        parents = self.label_parents if self.parents_in_label_texts else None
        return [label_text(label, parents or {}, self.label_descriptions or {}) for label in self.labels]

    def max_tokens(self, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
        """
        Number of tokens of a document that the encoder reads, special tokens included. Lexical scores read all tokens.

        It is the minimum of the encoder's number of positions, `encoder_max_length` and the tokenizer's `model_max_length`, or 512 if
        none of them sets a limit.
        """
        return max_tokens(self.backbone_config, tokenizer, self.encoder_max_length)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The encoder's configuration (vocabulary size, maximum length, ...)."""
        return self._backbone.get_text_config(decoder=decoder, encoder=encoder)
