"""The text encoder of a SEP-MLDC model: its class, its maximum length, and the pooling of its hidden states."""

import contextlib
import inspect
import json
import os
from functools import lru_cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .static_encoder_sep_mldc import StaticEncoder


# Maximum length if neither the encoder's configuration nor the tokenizer states a limit (XLNet, T5).
DEFAULT_MAX_TOKENS = 512


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16: AVX512-BF16 or AMX (x86), or those of Arm. Others emulate it."""
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16"))


def encoder_class(backbone_config: PreTrainedConfig) -> Any:
    """
    The class of the text encoder with this configuration: that of `AutoModel`, or the encoder half of T5 and its relatives.

    Raises:
        ValueError: the configuration is not that of a text encoder.
    """
    kind = backbone_config.model_type
    if kind == "sep_mldc":
        raise ValueError(
            "The backbone is a trained SEP-MLDC model, but an encoder is needed. Load the model with `from_pretrained` to train it further "
            "(`model.add_labels` adds labels), or choose the encoder that it was trained from."
        )
    remedy = "Choose a text encoder such as BERT, RoBERTa, DeBERTa-v2 or ModernBERT."
    found: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(backbone_config), None)
    if found is None:
        if backbone_config.is_encoder_decoder:
            raise ValueError(
                f"The backbone has model_type {kind!r}, an encoder-decoder model without an encoder class of its own. {remedy} T5 works "
                "too: only its encoder is used."
            )
        found = MODEL_MAPPING.get(type(backbone_config), None)
    if not isinstance(found, type):
        raise ValueError(f"The backbone has model_type {kind!r}, for which `AutoModel` has no single model. {remedy}")
    encoder: Any = found  # a class of transformers
    arguments = inspect.signature(encoder.forward).parameters
    if encoder.main_input_name != "input_ids" or "attention_mask" not in arguments:
        raise ValueError(
            f"The backbone has model_type {kind!r}, which does not take `input_ids` with an `attention_mask`. {remedy}"
        )
    return found


def dropout_settings(config: PreTrainedConfig, probability: float | None) -> dict[str, float]:
    """
    The dropout fields of an encoder's configuration, all set to `probability`, to be passed to `AutoModel.from_pretrained`. Empty if
    `probability` is `None`.

    Without dropout inside the encoder, attention uses the fused kernel and no random numbers are drawn, which makes training on a CPU
    much faster. The dropout of the head is not affected.

    Args:
        config (`PreTrainedConfig`): the encoder's configuration.
        probability (`float`, *optional*): dropout probability, at least 0 and below 1.

    Raises:
        ValueError: the probability is out of range.
    """
    if probability is None:
        return {}
    if not 0 <= probability < 1:
        raise ValueError(
            f"`backbone_dropout` is {probability}, but a dropout probability is at least 0 and below 1. Use 0 for none."
        )
    return {
        field: float(probability)
        for field, value in config.to_dict().items()
        if "drop" in field and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def load_encoder(backbone: str, dropout: float | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    A pretrained encoder, in float32 by default: its weights will be trained, and half precision comes from autocast.

    Args:
        backbone (`str`): a Hub name or a folder.
        dropout (`float`, *optional*): dropout probability inside the encoder; `None` keeps its own.
        kwargs: for `AutoModel.from_pretrained` (`revision`, `token`, ...).

    Raises:
        OSError: it cannot be loaded.
        ValueError: it is not a text encoder, or the probability is out of range.
    """
    if not isinstance(backbone, (str, os.PathLike)):
        raise ValueError(
            f"`backbone` is a {type(backbone).__name__}, but the name or folder of an encoder is needed. Save it with `save_pretrained`, "
            "and pass the folder."
        )
    kwargs.setdefault("dtype", torch.float32)
    config = AutoConfig.from_pretrained(backbone, **kwargs)
    kwargs = dropout_settings(config, dropout) | kwargs
    encoder = encoder_class(config).from_pretrained(backbone, **kwargs)
    if os.path.isdir(backbone):
        # A local path is meaningless to users of the checkpoint.
        encoder.config._name_or_path = os.path.basename(os.path.normpath(backbone))
    return encoder


def new_encoder(backbone_config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with random weights and without a pooler: its unused parameters would make `DistributedDataParallel` fail."""
    found = encoder_class(backbone_config)
    takes_it = "add_pooling_layer" in inspect.signature(found.__init__).parameters
    return found(backbone_config, **({"add_pooling_layer": False} if takes_it else {}))


def possible_autocast(encoder: PreTrainedModel) -> contextlib.AbstractContextManager:
    """
    A context without autocast for encoders that fail in it: DeBERTa (not DeBERTa-v2) masks 16-bit scores with the smallest float32.
    """
    if encoder.config.model_type != "deberta":
        return contextlib.nullcontext()
    return torch.autocast(encoder.device.type, enabled=False)


def num_positions(encoder: PreTrainedModel) -> int | None:
    """Largest number of tokens that an encoder has positions for, or `None` if it states no limit."""
    stated = getattr(encoder.config, "max_position_embeddings", None) or -1
    limits = [stated] if stated > 0 else []
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its relatives count positions from the id of the padding token + 1.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limits, default=None)


@lru_cache(maxsize=16)
def _num_positions_of(model_type: str, backbone_json: str) -> int | None:
    config_class = CONFIG_MAPPING[model_type]
    with torch.device("meta"):
        return num_positions(new_encoder(config_class.from_dict(json.loads(backbone_json))))


def max_tokens(
    backbone_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoder_max_length: int | None = None,
) -> int:
    """
    Number of tokens of a text that an encoder reads, special tokens included: the minimum of its number of positions, the tokenizer's
    `model_max_length` and `encoder_max_length`; 512 if none of them sets a limit.
    """
    limits = [_num_positions_of(backbone_config.model_type, backbone_config.to_json_string()), encoder_max_length]
    # Tokenizers without a limit state 1e30.
    if tokenizer is not None and tokenizer.model_max_length < 10**9:
        limits.append(int(tokenizer.model_max_length))
    return min((limit for limit in limits if limit is not None), default=DEFAULT_MAX_TOKENS)


def set_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Set an existing token as the padding token of a tokenizer that has none (GPT-2, Llama). Padding is masked, so any token will do.

    Raises:
        ValueError: it is not a tokenizer, or has no end-of-text, separator or unknown token either.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`tokenizer` is {repr(tokenizer)[:80]}, but a tokenizer is needed. Pass `AutoTokenizer.from_pretrained(...)` of the encoder."
        )
    if tokenizer.pad_token_id is not None:
        return
    for name in ("eos_token", "sep_token", "unk_token"):
        if getattr(tokenizer, name, None) is not None:
            tokenizer.pad_token = getattr(tokenizer, name)
            return
    raise ValueError(
        f"{type(tokenizer).__name__} has no padding token, which batches need, and no end-of-text token to take its place. Set "
        "`tokenizer.pad_token`."
    )


def check_token_ids(tokenizer: PreTrainedTokenizerBase, backbone_config: PreTrainedConfig) -> None:
    """
    Check that an encoder has embeddings for all tokens of a tokenizer.

    Raises:
        ValueError: it does not, because tokens were added to the tokenizer, or because the tokenizer belongs to a different encoder.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    size = getattr(backbone_config.get_text_config(), "vocab_size", None)  # encoders of characters have none
    if size is not None and largest >= size:
        raise ValueError(
            f"The tokenizer has token ids up to {largest}, but the encoder has embeddings for {size} tokens only. Use the encoder's own "
            "tokenizer, or, for added tokens, call `resize_token_embeddings(len(tokenizer))` of the encoder and save it first."
        )


def limit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, backbone_config: PreTrainedConfig, encoder_max_length: int | None = None
) -> None:
    """
    Lower a tokenizer's `model_max_length` to what the encoder has positions for: many tokenizers state no limit (1e30) or the limit of
    a different encoder. With `encoder_max_length`, texts are truncated by the model, so any stated limit is kept.
    """
    limit = max_tokens(backbone_config)
    states_none = tokenizer.model_max_length >= 10**9
    if states_none or (encoder_max_length is None and tokenizer.model_max_length > limit):
        tokenizer.model_max_length = limit


def padding_last(attention_mask: torch.Tensor, *values: torch.Tensor | None) -> list[Any]:
    """
    The attention mask (B, T) and tensors (B, T, ...) with each row rotated so that its first attended token comes first.

    Encoders count positions from the left and `"cls"` is the first token, so padding on the left would change the scores of a
    document. The operations do not depend on the data: no dynamic shapes, no device sync.
    """
    length = attention_mask.shape[1]
    first = (attention_mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    order = torch.arange(length, device=attention_mask.device) + first
    order = torch.where(order < length, order, order - length)
    rotated = [attention_mask.gather(1, order)]
    for value in values:
        if value is not None:
            index = order if value.dim() == 2 else order.unsqueeze(-1).expand_as(value)
            value = value.gather(1, index)
        rotated.append(value)
    return rotated


class TextEncodingMixin:
    """Embeddings of texts for [`SepMldcForMultiLabelClassification`]."""

    config: Any
    backbone: Any
    takes_token_type_ids: bool
    takes_use_cache: bool

    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        max_length: int | None = None,
        **encoder_kwargs: Any,
    ) -> tuple[torch.Tensor, ModelOutput]:
        """
        Encode and pool texts (f in Eq. 1-5). The result does not depend on the padding side.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(B, T)`), inputs_embeds (`torch.Tensor` of shape
                `(B, T, d)`): the texts, as in `forward`.
            max_length (`int`, *optional*): only the first `max_length` attended tokens are read.
            encoder_kwargs: passed on to the encoder.

        Returns:
            `tuple(torch.Tensor, ModelOutput)`: embeddings of shape `(B, d)` in float32, pooled as the configuration says, and the
            encoder's output for the tokens that it read, padding last.
        """
        return self.encode_tokens(
            input_ids, attention_mask, token_type_ids, inputs_embeds, max_length, with_states=False, **encoder_kwargs
        )[:2]

    def encode_tokens(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        max_length: int | None = None,
        with_states: bool = True,
        **encoder_kwargs: Any,
    ) -> tuple[torch.Tensor, ModelOutput, torch.Tensor]:
        """
        Like [`encode`], but also returns the attention mask (B, T') of the tokens that were read. With `with_states=False`, an encoder that
        can pool without token states may omit `last_hidden_state`.
        """
        tokens: Any = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError(
                "Neither `input_ids` nor `inputs_embeds` is given, but texts are needed. Pass one of them."
            )
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if not self.takes_token_type_ids:
            token_type_ids = None
        attention_mask, *values = padding_last(attention_mask, input_ids, token_type_ids, inputs_embeds)
        if max_length is not None and torch.compiler.is_exporting():
            # A graph exported for any length cannot compute min(T, n), so the remaining tokens are masked instead of truncated.
            positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            attention_mask = attention_mask * (positions < max_length)
        elif max_length is not None:
            attention_mask = attention_mask[:, :max_length]
            values = [None if value is None else value[:, :max_length] for value in values]
        if not with_states and self._is_one_bag(values[0], encoder_kwargs):
            return self.backbone.mean_embeds(values[0], attention_mask).float(), BaseModelOutput(), attention_mask
        inputs = dict(zip(("input_ids", "token_type_ids", "inputs_embeds"), values))
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self.takes_use_cache:
            encoder_kwargs.setdefault("use_cache", False)  # decoders would keep keys and values for generation
        with possible_autocast(self.backbone):
            output = self.backbone(attention_mask=attention_mask, **inputs, **encoder_kwargs)
        states = output.last_hidden_state
        if self.config.pooling == "cls":
            return states[:, 0].float(), output, attention_mask
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        total = (states * mask).sum(dim=1, dtype=torch.float32)
        return total / mask.sum(dim=1, dtype=torch.float32).clamp_min(1.0), output, attention_mask

    def _is_one_bag(self, input_ids: torch.Tensor | None, encoder_kwargs: dict[str, Any]) -> bool:
        """Whether the encoder computes text embeddings directly, without token states. Not in exports: ONNX has no operator for it."""
        return (
            isinstance(self.backbone, StaticEncoder)
            and self.config.pooling == "mean"
            and input_ids is not None
            and not any(encoder_kwargs.values())
            and not torch.compiler.is_exporting()
        )
