"""SEP-MLDC model: a text encoder with label-guided feature selection (Eq. 16-18) and a multi-label head."""

import contextlib
import dataclasses
import difflib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple, logging

from .added_labels_sep_mldc import AddedLabelScores
from .checkpoint_checks_sep_mldc import check_finite, check_loading_report, explained_loading_errors
from .class_weights_sep_mldc import class_weights
from .classification_loss_sep_mldc import multi_label_loss
from .configuration_sep_mldc import FORMER_FIELDS, SepMldcConfig
from .encoder_sep_mldc import (
    TextEncodingMixin,
    check_token_ids,
    limit_tokenizer,
    load_encoder,
    new_encoder,
    set_padding_token,
)
from .label_editing_sep_mldc import LabelEditingMixin
from .label_sets_sep_mldc import LabelSetsMixin
from .label_table_sep_mldc import LabelTable, attention_weights
from .label_texts_sep_mldc import tokenize_label_texts
from .lexical_sep_mldc import LexicalScores
from .token_attention_sep_mldc import INIT_STD, TokenAttention
from .top_k_sep_mldc import TopKMixin


logger = logging.get_logger(__name__)

# `auto_map` of a checkpoint's config.json, with which it loads without this package (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_sep_mldc.SepMldcConfig",
    "AutoModel": "modeling_sep_mldc.SepMldcForMultiLabelClassification",
    "AutoModelForSequenceClassification": "modeling_sep_mldc.SepMldcForMultiLabelClassification",
}


@dataclass
class SepMldcOutput(ModelOutput):
    """
    Output of [`SepMldcForMultiLabelClassification`]. `B` documents, `L` labels, hidden size `d`, `C` candidate labels.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            The classification loss alone (Eq. 19); the trainer adds the contrastive terms.
        logits (`torch.FloatTensor` of shape `(B, L)`):
            Scores before the sigmoid.
        label_attention (`torch.FloatTensor` of shape `(B, L)`, *optional*):
            α of Eq. 16, `None` without label attention.
        document_embeds (`torch.FloatTensor` of shape `(B, d)`):
            e_x.
        label_embeds (`torch.FloatTensor` of shape `(L, d)`, *optional*):
            e_y; never the stored parameter itself. See `return_label_embeds` in the model's `forward`.
        candidate_embeds (`torch.FloatTensor` of shape `(C, d)`, *optional*):
            The freshly encoded rows of `label_embeds`, with gradient, when candidates were given.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            Those of the encoder for the documents, if requested.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    label_attention: torch.FloatTensor | None = None
    document_embeds: torch.FloatTensor | None = None
    label_embeds: torch.FloatTensor | None = None
    candidate_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class SepMldcClassifier(nn.Module):
    """
    Scores every label from the input features (B, f) and the label embeddings: `"mlp"`, `"similarity"` or their sum.

    The similarity logit of label l is `scale · cos(W e_input, e_y[l])`. All kinds share one bias per label.
    """

    def __init__(self, config: SepMldcConfig):
        super().__init__()
        hidden_size = config.hidden_size
        input_size = 2 * hidden_size if config.label_attention else hidden_size
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.bias = nn.Parameter(torch.zeros(config.num_labels))
        kind = config.classifier or ""  # never empty: the configuration has chosen one
        if "mlp" in kind:
            width = config.classifier_hidden_size or hidden_size
            self.dense = nn.Linear(input_size, width)
            self.out_proj = nn.Linear(width, config.num_labels, bias=False)
        if "similarity" in kind:
            self.similarity_proj = nn.Linear(input_size, hidden_size)
            self.similarity_scale = nn.Parameter(torch.tensor(float(config.similarity_scale_init)))

    @property
    def uses_label_embeds(self) -> bool:
        return hasattr(self, "similarity_proj")

    @torch.no_grad()
    def start_from_similarities(self, label_embeds: torch.Tensor | None = None) -> None:
        """
        Initialize the similarity logits with the cosine of the document embedding, which is the last part of the features, and the label
        embedding, instead of a random projection.

        With `label_embeds` (L, d), without the direction that all label texts have in common: encoders without sentence-level training place
        all texts close together, so that all cosines would be about 1.
        """
        weight = self.similarity_proj.weight
        identity = torch.eye(len(weight), device=weight.device)
        if label_embeds is not None:
            common = F.normalize(F.normalize(label_embeds.float(), dim=-1).mean(dim=0), dim=0)
            identity -= torch.outer(common, common)
        weight.zero_()
        weight[:, -len(weight) :] = identity
        self.similarity_proj.bias.zero_()

    def forward(self, features: torch.Tensor, score_labels: Callable[..., torch.Tensor]) -> torch.Tensor:
        """`score_labels(queries (B, d), cosine=True)` returns the (B, L) products of queries and label embeddings."""
        features = self.dropout(features)
        logits = self.bias
        if hasattr(self, "dense"):
            logits = logits + self.out_proj(self.dropout(F.gelu(self.dense(features))))
        if self.uses_label_embeds:
            query = F.normalize(self.similarity_proj(features).float(), dim=-1)
            logits = logits + self.similarity_scale * score_labels(query, cosine=True)
        return logits


class SepMldcForMultiLabelClassification(
    TextEncodingMixin, LabelEditingMixin, LabelSetsMixin, TopKMixin, PreTrainedModel
):
    r"""
    SEP-MLDC: document embedding e_x = f(x), label-guided feature selection and a multi-label classifier.

    The label embeddings e_y are stored in the state dict (`label_embeddings`, L x d): prediction needs no label text.

    Args:
        config ([`SepMldcConfig`]): the configuration; weights start at random. See [`from_backbone`] to start from a
            pretrained encoder, and `from_pretrained` to load a trained model.
    """

    config_class = SepMldcConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # As in other composite models, the encoder's class checks what is requested.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over the documents of a batch, so the Trainer must divide it by the accumulation steps.
    accepts_loss_kwargs = False
    _auto_class = "AutoModel"

    def __init__(self, config: SepMldcConfig):
        super().__init__(config)
        if config.num_labels < 1:
            raise ValueError("The configuration has no labels, but one is needed. Give `num_labels` or `id2label`.")
        self.backbone = new_encoder(config.backbone_config)
        self.label_embeddings = nn.Parameter(torch.zeros(config.num_labels, config.hidden_size), requires_grad=False)
        self.classifier = SepMldcClassifier(config)
        self.token_attention = None
        if config.token_attention:
            self.token_attention = TokenAttention(config.num_labels, config.hidden_size, config.token_attention_size)
        self.lexical = None
        if config.num_lexical_features is not None:
            vocab_size = config.get_text_config().vocab_size
            self.lexical = LexicalScores(
                vocab_size, config.num_labels, config.num_lexical_features, config.num_lexical_bigrams
            )
        self.added = None
        if config.num_added_labels:
            self.added = AddedLabelScores(config.num_added_labels, config.hidden_size)
        arguments = inspect.signature(type(self.backbone).forward).parameters
        self.takes_use_cache = "use_cache" in arguments
        self.takes_token_type_ids = (
            "token_type_ids" in arguments and getattr(config.backbone_config, "type_vocab_size", 1) > 1
        )
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SepMldcClassifier):
            init.zeros_(module.bias)
            if module.uses_label_embeds:
                init.constant_(module.similarity_scale, float(self.config.similarity_scale_init))
        elif isinstance(module, TokenAttention):
            init.zeros_(module.queries)
            init.normal_(module.weights, std=INIT_STD)
        elif isinstance(module, AddedLabelScores):
            init.zeros_(module.weights)
            init.zeros_(module.bias)
        elif module is self:
            init.zeros_(self.label_embeddings)

    @classmethod
    def from_backbone(
        cls,
        backbone: str,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str],
        label_descriptions: dict[str, str] | None = None,
        label_frequencies: "torch.Tensor | list[float] | None" = None,
        max_label_length: int = 64,
        backbone_dropout: float | None = 0.0,
        backbone_kwargs: dict[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> "SepMldcForMultiLabelClassification":
        r"""
        Create a model over a pretrained encoder. The label embeddings start at f("{label}: {description}") (Eq. 1-2, 5).

        Args:
            backbone (`str`): any text encoder that `AutoModel` loads, a Hub name or a folder.
            tokenizer (`PreTrainedTokenizerBase`): encodes the label texts, once. If it has no padding token, it gets one, and
                its `model_max_length` is lowered to the encoder's number of positions.
            labels (`list[str]`): label names, in the order of the logits.
            label_descriptions (`dict[str, str]`, *optional*): label description by label name, for labels that have one.
            label_frequencies (`torch.Tensor` of shape `(L,)`, *optional*): fraction of the training documents that have
                each label. Defaults to `label_counts / num_train_documents` if both are given.
            max_label_length (`int`, defaults to 64): maximum number of tokens per label text.
            backbone_dropout (`float`, *optional*, defaults to 0.0): dropout probability inside the encoder. `None` keeps the encoder's own,
                with which training on a CPU is much slower.
            backbone_kwargs (`dict`, *optional*): passed on to `AutoModel.from_pretrained` (`revision`, `token`, ...).
            config_kwargs: fields of [`SepMldcConfig`], and `attn_implementation`. `label_counts` may also be a dictionary by label name.
                `classifier_bias_init` defaults to `"prior"` if label frequencies are known.

        Raises:
            ValueError: there are no labels, two have the same name, a description belongs to none of them, the number of frequencies is wrong, a
                value is out of range, the encoder is a trained SEP-MLDC model, or it has no embeddings for some tokens of the tokenizer.
            TypeError: an argument is neither named above nor a field of the configuration.
            OSError: the encoder cannot be loaded.

        Example:

        ```python
        model = SepMldcForMultiLabelClassification.from_backbone(
            "roberta-base", AutoTokenizer.from_pretrained("roberta-base"), labels=["cs.IR", "cs.CL"],
            label_descriptions={"cs.IR": "Search engines, ranking and recommendation."},
        )
        ```
        """
        _check_config_fields(cls.config_class, config_kwargs)
        # Numbers and arrays of NumPy, and tensors, become numbers and lists.
        config_kwargs = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in config_kwargs.items()}
        labels, descriptions = _checked_labels(labels, label_descriptions or {})
        set_padding_token(tokenizer)
        encoder = load_encoder(backbone, backbone_dropout, **(backbone_kwargs or {}))
        check_token_ids(tokenizer, encoder.config)
        if config_kwargs.get("label_counts") is not None:
            counts = config_kwargs["label_counts"]
            counts = [counts.get(label, 0) for label in labels] if isinstance(counts, Mapping) else counts
            config_kwargs["label_counts"] = [int(count) for count in counts]
            if label_frequencies is None and config_kwargs.get("num_train_documents"):
                total = config_kwargs["num_train_documents"]
                label_frequencies = [count / total for count in config_kwargs["label_counts"]]
        config_kwargs.setdefault("classifier_bias_init", "zero" if label_frequencies is None else "prior")
        config = cls.config_class(
            backbone_config=encoder.config,
            id2label=dict(enumerate(labels)),
            label_descriptions=descriptions or None,
            **config_kwargs,
        )
        model = cls(config)
        # Loading the encoder separately and copying it drops the pooler and other heads without warnings about unused weights.
        report = model.backbone.load_state_dict(encoder.state_dict(), strict=False)
        if report.missing_keys:
            raise ValueError(
                f"{backbone} has no weights for {report.missing_keys[0]!r}. Choose a checkpoint of a "
                f"{encoder.config.model_type} encoder."
            )
        limit_tokenizer(tokenizer, config.backbone_config, config.encoder_max_length)
        max_label_length = min(max_label_length, config.max_tokens(tokenizer))
        model.set_label_embeddings(
            model.encode_labels(tokenize_label_texts(tokenizer, config.label_texts, max_label_length))
        )
        if model.token_attention is not None:
            model.token_attention.start_from(model.label_embeddings)
        if model.classifier.uses_label_embeds:
            model.classifier.start_from_similarities(model.label_embeddings)
        if config.classifier_bias_init == "prior":
            if label_frequencies is None:
                raise ValueError(
                    '`classifier_bias_init="prior"` needs `label_frequencies`, the share of the training documents that '
                    "have each label, or `label_counts` and `num_train_documents`. Pass them, or use "
                    '`classifier_bias_init="zero"`.'
                )
            model.init_prior_bias(torch.as_tensor(label_frequencies, dtype=torch.float32))
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Load a trained model, as in transformers, and check that it is complete. The label embeddings are loaded as constants.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a Hub name or a folder.
            args, kwargs: as in transformers. With `ignore_mismatched_sizes=True`, missing and unexpected weights, and weights of
                a different shape, are accepted; missing ones are initialized as in a new model.

        Raises:
            OSError: there are no safetensors weights, or a weight file is damaged.
            ValueError: a pickle is requested, weights are missing or do not match the configuration, or some are NaN or infinite.
        """
        name = pretrained_model_name_or_path
        with_report = kwargs.pop("output_loading_info", False)
        with explained_loading_errors(name, kwargs):
            model, report = super().from_pretrained(
                name, *args, **{**kwargs, "use_safetensors": True, "output_loading_info": True}
            )
        if not kwargs.get("ignore_mismatched_sizes", False):
            check_loading_report(name, report)
        check_finite(name, model)
        if model.lexical is not None:
            model.lexical.check(name)
        model.label_embeddings.requires_grad_(False)
        return (model, report) if with_report else model

    @torch.no_grad()
    def init_prior_bias(self, label_frequencies: torch.Tensor) -> None:
        """
        Initialize each output bias to its label's log-odds, and scale the MLP's initial output weights by a tenth, so that the first steps
        are not spent on learning how rare the labels are.

        For the similarity classifier, this assumes that cosines are about zero before training.

        Args:
            label_frequencies (`torch.Tensor` of shape `(L,)`): share of the training documents of each label.
        """
        if label_frequencies.shape != self.classifier.bias.shape:
            raise ValueError(
                f"`label_frequencies` has shape {tuple(label_frequencies.shape)}, but there are {self.config.num_labels} "
                "labels. Give one share per label."
            )
        wrong = label_frequencies[~((label_frequencies >= 0) & (label_frequencies <= 1))]
        if len(wrong):
            raise ValueError(
                f"`label_frequencies` contains {wrong[0].item():g}, but it is the share of the training documents that have a label, "
                "from 0 to 1. Divide counts by the number of documents."
            )
        rates = label_frequencies.to(self.classifier.bias).clamp(1e-6, 1 - 1e-6)
        self.classifier.bias.copy_(torch.logit(rates))
        if hasattr(self.classifier, "out_proj"):
            self.classifier.out_proj.weight.mul_(0.1)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the error names the encoder, which checkpointing depends on."""
        if not self.backbone.supports_gradient_checkpointing:
            raise ValueError(
                f"`gradient_checkpointing` is not supported by {type(self.backbone).__name__}. Leave it out, or choose another encoder."
            )
        super().activation_checkpointing_enable(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers. The tables of the lexical scores are resized as well."""
        text_config = self.config.get_text_config()
        old_size = text_config.vocab_size
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.lexical is not None and text_config.vocab_size != old_size:
            self.lexical.resize_vocabulary(old_size, text_config.vocab_size)
        return embeddings

    @property
    def uses_label_embeds(self) -> bool:
        """Whether logits depend on the label embeddings."""
        return self.config.label_attention or self.classifier.uses_label_embeds

    def calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Apply `config.logit_calibration` to logits of any shape, as `forward` does in evaluation mode, so that their sigmoid is the
        calibrated probability. In training mode, logits are returned unchanged.
        """
        scale, bias = self.config.logit_calibration
        return logits if self.training or (scale, bias) == (1.0, 0.0) else scale * logits + bias

    def probabilities(self, logits: torch.Tensor, all_logits: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        Probabilities of labels from the logits that the model returns in evaluation mode.

        Each label's probability is $\sigma(z)$, as logits are already calibrated ($\sigma(a z + b)$ for checkpoints of version 0.1, see
        `config.calibrate_logits`). It depends only on the label's own logit, so the logits of any subset of labels can be passed. A model
        that only ranks labels (`config.is_ranking`) has no such probabilities; the result is then each label's share of the softmax over
        all labels.

        Args:
            logits (`torch.Tensor` of shape `(B, L)` or `(B, k)`): logits of all labels, or of some, such as those that
                `predict_top_k` returns.
            all_logits (`torch.Tensor` of shape `(B, L)`, *optional*): the logits of all labels, if `logits` is a subset.
                Only used for a model that ranks labels; without it, the shares within `logits` sum to 1.

        Returns:
            `torch.Tensor`: of the shape of `logits`, in float32, between 0 and 1.
        """
        logits = logits.float()
        if self.config.is_ranking:
            others = logits if all_logits is None else all_logits.float()
            return torch.exp(logits - torch.logsumexp(others, dim=-1, keepdim=True))
        calibration = self.config.score_calibration
        if calibration is not None and not self.config.calibrate_logits:
            logits = calibration["scale"] * logits + calibration["bias"]
        return torch.sigmoid(logits)

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of Eq. 19 of uncalibrated logits (B, L) and multi-hot labels (B, L), with the class weights of the configuration."""
        config = self.config
        weights = class_weights(config.label_counts or [], config.num_train_documents or 0, config.class_weights)
        return multi_label_loss(logits, labels, config.classification_loss, weights)

    def score_documents(
        self, document_embeds: torch.Tensor, table: LabelTable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Logits (B, L) of document embeddings (B, d), without token attention, lexical scores and calibration, and α (B, L) of Eq. 16,
        which is `None` without label attention. `table` holds the label embeddings; the stored ones if it is not given.
        """
        table = LabelTable(self.label_embeddings) if table is None else table
        features, attention = document_embeds, None
        if self.config.label_attention:
            # Added labels are left out, because the classifier was trained with mixtures of the others.
            scores, num_added = table.products(document_embeds), self.config.num_added_labels
            attention = attention_weights(scores[:, : scores.shape[1] - num_added])  # Eq. 16
            if num_added:
                attention = F.pad(attention, (0, num_added))
            features = torch.cat([table.mix(attention), document_embeds], dim=-1)  # Eq. 17-18
        logits = self.classifier(features.to(self.classifier.bias.dtype), table.products)
        if self.added is not None:
            logits = self.added(logits, document_embeds)
        return logits, attention

    def score_texts(
        self,
        document_embeds: torch.Tensor,
        encoder_output: ModelOutput,
        attention_mask: torch.Tensor,
        table: LabelTable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Like [`score_documents`], but with token attention, for the output of `encode_tokens`."""
        logits, attention = self.score_documents(document_embeds, table)
        if self.token_attention is not None:
            logits = logits + self.token_attention(encoder_output.last_hidden_state, attention_mask)
        return logits, attention

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        candidate_input_ids: torch.LongTensor | None = None,
        candidate_attention_mask: torch.Tensor | None = None,
        candidate_indices: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,  # `return_label_embeds`: transformers takes every named argument with "label" in it for a target
    ) -> SepMldcOutput:
        r"""
        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(B, T)`): the documents;
                `token_type_ids` is passed only to encoders that accept it.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, d)`, *optional*): instead of `input_ids`; lexical scores, which
                need token ids, are then left out.
            labels (`torch.Tensor` of shape `(B, L)`, *optional*): multi-hot; gives `loss`.
            candidate_input_ids, candidate_attention_mask (`torch.Tensor` of shape `(C, T')`, *optional*):
                label texts to encode with gradient in this forward pass; they replace the stored embeddings of their labels.
            candidate_indices (`torch.LongTensor` of shape `(C,)`, *optional*): which labels these are, each once.
            return_label_embeds (`bool`, *optional*): whether to return `label_embeds`, which with candidates is an L x d copy. By
                default, they are returned in training mode and if `labels` are given; for prediction they are not, because an output
                without a batch dimension breaks transformers' batched pipelines.
        """
        if labels is not None and labels.shape[-1] != self.config.num_labels:
            raise ValueError(
                f"`labels` has {labels.shape[-1]} columns, but the model has {self.config.num_labels} labels. Pass a "
                "multi-hot matrix with one column per label."
            )
        if "return_table" in kwargs:
            warnings.warn(
                "`return_table` is now called `return_label_embeds`. The old name will stop working in version 0.3. Use the new "
                "one.",
                FutureWarning,
                stacklevel=2,
            )
            kwargs["return_label_embeds"] = kwargs.pop("return_table")
        return_label_embeds = kwargs.pop("return_label_embeds", None)
        if return_label_embeds is None:
            return_label_embeds = self.training or labels is not None
        if kwargs:
            raise TypeError(f"forward() got an unexpected keyword argument {next(iter(kwargs))!r}")
        document_embeds, encoder_output, token_mask = self.encode_tokens(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            max_length=self.config.encoder_max_length,
            with_states=self.token_attention is not None,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        fresh = None
        if candidate_input_ids is not None:
            fresh = self.encode(candidate_input_ids, candidate_attention_mask)[0]
        table = LabelTable(self.label_embeddings, fresh, candidate_indices)

        logits, attention = self.score_texts(document_embeds, encoder_output, token_mask, table)
        # Lexical margins of training documents are near 1 for their labels, so if added during training, they would leave nothing to learn.
        if self.lexical is not None and not self.training and input_ids is not None:
            logits = logits + self.lexical(input_ids, attention_mask).to(logits.dtype)

        return SepMldcOutput(
            loss=None if labels is None else self.classification_loss(logits, labels),
            logits=self.calibrate(logits),
            label_attention=attention,
            document_embeds=document_embeds,
            label_embeds=table.dense() if return_label_embeds else None,
            candidate_embeds=fresh,
            hidden_states=encoder_output.get("hidden_states"),
            attentions=encoder_output.get("attentions"),
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As in transformers; the checkpoint also includes, and refers to, the code of the model, its pipeline and the handler for Inference
        Endpoints.
        """
        # transformers also copies relatively imported files, so these two classes are saved with everything that they need.
        from .handler import REQUIREMENTS
        from .pipeline_sep_mldc import custom_pipelines

        self.config.check_label_names()
        self.config.check_values()
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = custom_pipelines()
        self.config.architectures = [type(self).__name__]
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            Path(save_directory, "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
            apply_umask(save_directory)
        return saved


def apply_umask(folder: str | os.PathLike) -> None:
    """
    Give the weight files of a folder the permissions of any new file (0666 without the umask's bits). safetensors creates them with 0600,
    which no other user can read, such as the user of a container that a checkpoint is mounted into.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).glob("*.safetensors"):
        with contextlib.suppress(OSError):  # a file system without permissions, or a file of another user
            path.chmod(0o666 & ~mask)


def _check_config_fields(config_class: type[SepMldcConfig], given: dict[str, Any]) -> None:
    """Reject arguments that the configuration would store without using them, such as a misspelled field."""
    fields = {field.name for field in dataclasses.fields(config_class)} | {"attn_implementation"}
    unknown = [name for name in given if name not in fields and name not in FORMER_FIELDS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], sorted(fields), n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"See the fields of `{config_class.__name__}`."
        raise TypeError(
            f"`{unknown[0]}` is neither an argument of `from_backbone` nor a field of the configuration. {hint}"
        )


def _checked_labels(labels: Any, label_descriptions: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Label names and descriptions of a new model, in Unicode normalization form NFC."""
    if isinstance(labels, (str, set, frozenset)) or not (labels := list(labels)):  # a set has no order
        raise ValueError(f"`labels` is {repr(labels)[:80]}, but a list of label names is needed. Pass at least one.")
    wrong = [label for label in labels if not isinstance(label, str)]
    if wrong:
        raise ValueError(
            f"`labels` contains {wrong[0]!r}, but label names are strings. Write numbers that are names as strings, such as '1'."
        )
    labels = [normalize("NFC", label) for label in labels]
    descriptions = {normalize("NFC", label): text for label, text in label_descriptions.items() if text is not None}
    unknown = sorted(set(descriptions) - set(labels))
    if unknown:
        raise ValueError(
            f"`label_descriptions` describes {unknown[0]!r}, which is not among the {len(labels)} labels. Remove it or "
            "correct its name."
        )
    return labels, descriptions
